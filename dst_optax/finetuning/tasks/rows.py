"""Rows of JSON lines, each checked where it is read."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dst_optax.paths import is_local

Row = TypeVar("Row")
SHOWN = 10  # bad rows that an error names


def read_rows(path: Path, parse: Callable[[dict[str, Any], int], Iterable[Row]]) -> list[Row]:
    """What a file of JSON lines holds; blank lines are passed over.

    Args:
      path: the file.
      parse: makes rows of an object and the number of its line, or raises a ValueError.

    Returns:
      The rows.

    Raises:
      ValueError: the file has none, or some are bad: each is named by file and line.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
      >>> _ = path.write_text('{"a": 1}')
      >>> read_rows(path, lambda row, line: [row["a"]])
      [1]
    """
    rows: list[Row] = []
    bad = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                encoding = "utf-8-sig" if number == 1 else "utf-8"  # some editors mark a file's beginning
                row = json.loads(line.decode(encoding), object_pairs_hook=_unique)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                rows += parse(row, number)
            except (ValueError, RecursionError) as error:
                bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = "\n  ".join(bad[:SHOWN])
        raise ValueError(f"{len(bad)} bad rows; correct or remove them:\n  {listed}{more}")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def version_of(path: Path) -> tuple[int, int]:
    """What tells a file from what it was before a change: its time and its size.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
      >>> _ = path.write_text('{"a": 1}')
      >>> version_of(path)[1]
      8
    """
    stat: Any = path.stat()
    return (stat.st_mtime_ns, stat.st_size) if is_local(path) else (stat.mtime, stat.length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return row
