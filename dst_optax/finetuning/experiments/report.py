"""One HTML page about one or several runs that needs nothing else: no network, no other files."""

import base64
import html
import json
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dst_optax.finetuning import storage

PACKAGES = ("dst-optax", "jax", "optax", "flax", "numpy", "orbax-checkpoint", "seqio")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
pre { overflow-x: auto; background: var(--soft); padding: .8rem; font-size: .8rem; }
"""


def report(runs: Sequence[str], out: str) -> Path:
    """Writes the page.

    Args:
      runs: directories of runs or experiments: tables (``*.md``, ``results.json``), figures (``*.png``) and
        ``run.json`` in them are shown.
      out: the HTML file.

    Returns:
      Its path.

    Raises:
      ValueError: a directory holds nothing to show.
    """
    body = "".join(_section(Path(run)) for run in runs)
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version}" for name, version in _versions())
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Dynamic Subset Tuning</title><style>{STYLE}</style></head>"
        f"<body><h1>Dynamic Subset Tuning</h1><p>{html.escape(machine)}; {html.escape(versions)}.</p>"
        f"{body}</body></html>\n"
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(path, page)
    return path


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _section(run: Path) -> str:
    parts = [_table(text) for file in sorted(run.glob("*.md")) for text in _tables(file.read_text())]
    if (run / "results.json").is_file():
        parts.append(_table(_rows(json.loads((run / "results.json").read_text()))))
    parts += [_image(file) for file in sorted(run.glob("*.png"))]
    if not parts:
        raise ValueError(f"{run} holds neither tables nor figures; is it the directory of a finished run?")
    for file in sorted([*run.glob("run.json"), *run.glob("*/run.json")]):
        config = json.loads(file.read_text())
        text = config.pop("config", "") + "\n" + json.dumps(config, indent=1)
        parts.append(
            f"<details><summary>Configuration of {html.escape(str(file.relative_to(run).parent))}</summary>"
            f"<pre>{html.escape(text.strip())}</pre></details>"
        )
    return f"<h2>{html.escape(str(run))}</h2>{''.join(parts)}"


def _tables(text: str) -> Iterator[list[list[str]]]:
    """Tables of a Markdown text; everything else is left out."""
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            yield [table[0], *table[2:]]
            table = []


def _rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    names = [
        n for n in ("method", "rng_seed", "score", "test_score", "free_params", "seconds") if n in rows[-1]
    ]
    return [names, *([_cell(row.get(name)) for name in names] for row in rows)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _table(cells: list[list[str]]) -> str:
    head, *rows = ([_bold(cell) for cell in row] for row in cells)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _bold(cell: str) -> str:
    text = html.escape(cell.strip("*"))
    return f"<b>{text}</b>" if cell.startswith("**") else text


def _image(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}"></p>'
