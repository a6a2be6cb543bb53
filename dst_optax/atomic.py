"""Files and directories that are there with all they hold, or not at all, whenever a program dies."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replaces a file at once.

    Args:
      path: the file; its directory must exist.

    Yields:
      Where to write; synced and renamed to ``path`` at the end, removed after an error.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.txt"
      >>> with atomic_file(path) as temporary:
      ...     _ = temporary.write_text("1")
      >>> path.read_text()
      '1'
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a directory at once.

    Args:
      path: the directory; must not exist.

    Yields:
      An empty directory to fill; synced and renamed to ``path`` at the end, removed after an error.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a"
      >>> with atomic_directory(path) as temporary:
      ...     _ = (temporary / "x").write_text("1")
      >>> [p.name for p in path.iterdir()]
      ['x']
    """
    path = Path(path)
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file or directory, once all of it is on the disk.

    Args:
      temporary: what to rename; on the same file system as ``path``.
      path: its name from now on; a file of this name is replaced.
    """
    for part in (*temporary.rglob("*"), temporary):
        sync(part)
    temporary.replace(path)
    sync(path.parent)


def unfinished(path: Path) -> list[Path]:
    """What is being written for a file, or was left behind where a program was killed while it wrote it."""
    return list(path.parent.glob(f".tmp-{path.name}-*"))


def _beside(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(8)}")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
