#!/usr/bin/env python
"""Writes docs/benchmarks.md from the records in docs/benchmarks.

    python scripts/benchmark.py step --models small --out docs/benchmarks/step.json
    python scripts/benchmark_subset.py --out docs/benchmarks/files.json
    python scripts/benchmarks_page.py

A section shows the cells of its part, of every record that has some, with the machine, the versions, the date
and the command of the record.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

DOCS = pathlib.Path(__file__).parents[1] / "docs"
HEAD = """# Benchmarks

<!-- Written by scripts/benchmarks_page.py from the records in docs/benchmarks; do not edit. -->

Times are medians, and every ratio compares figures of one run. [Speed and memory](speed.md) says where the
time goes, and what was measured before these records were kept.
"""
Record = dict[str, Any]


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and all others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(x: float | None, unit: str = "") -> str:
    """Three digits, or nothing where there is no figure."""
    if x is None:
        return ""
    digits = f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return digits + unit


def step(cells: list[Record]) -> str:
    return "\n".join(map(_step, cells))


def _step(cell: Record) -> str:
    rows = [
        [
            name,
            number(times["ms"], " ms"),
            number(cell["x_adamw"][name]),
            number(cell["compile_seconds"].get(name), " s"),
            number(cell["temp_bytes_a_parameter"].get(name)),
        ]
        for name, times in cell["times"].items()
    ]
    title = f"{cell['model']}: {cell['parameters']:,} parameters in {cell['tensors']} tensors"
    columns = ["", "time", "of adamw's", "compile", "more temporary bytes a parameter"]
    return f"{title}, a fraction of {cell['fraction']}.\n\n{table(columns, rows)}"


def methods(cells: list[Record]) -> str:
    return "\n".join(map(_methods, cells))


def _methods(cell: Record) -> str:
    rows = [
        [
            row["method"],
            f"{row['free']:,}",
            number(row["times"]["ms"] / 1e3, " s"),
            number(row.get("compile_seconds"), " s"),
            number(row["step_bytes"] / 1e9 if "step_bytes" in row else None, " GB"),
            number(row["file_bytes"] / 1e6, " MB"),
        ]
        for row in cell["rows"]
    ]
    columns = ["method", "free parameters", "step", "compile", "memory of a step", "file"]
    layers = ", layers scanned" if cell.get("scan_layers") else ""
    tokens = cell.get("tokens", 64)
    return f"SmolLM2-135M, 8 examples of {tokens} tokens, clipped Adam{layers}.\n\n{table(columns, rows)}"


def selection(cells: list[Record]) -> str:
    ways = list(dict.fromkeys(way for cell in cells for way in cell["times"]))
    rows = []
    for cell in cells:
        times = {way: number(t["ms"], " ms") for way, t in cell["times"].items()}
        head = [f"{cell['n']:,}", f"{cell['fraction']:g}", str(cell["passes"]["warm"])]
        rows.append([*head, *(times.get(way, "") for way in ways)])
    names = {"warm": "counting from a near guess", "cold": "counting from none"}
    columns = ["distances", "fraction", "passes", *(names.get(way, f"`{way}`") for way in ways)]
    return table(columns, rows)


def serving(cells: list[Record]) -> str:
    rows = []
    for row in (row for cell in cells for row in cell["rows"]):
        medians = [number(row[x]["p50"], " ms") if x in row else "" for x in ("load", "switch", "request")]
        head = [row["model"], WAYS[row["way"]], f"{row['entries']:,}"]
        rows.append([*head, *medians, number(row["request"]["p99"], " ms")])
    columns = ["T5 v1.1", "served as", "free parameters", "load", "switch", "request", "p99"]
    return f"Every request wants another tuned model.\n\n{table(columns, rows)}"


def engines(cells: list[Record]) -> str:
    return "\n".join(map(_engine, cells))


def _engine(cell: Record) -> str:
    rows = []
    for row in cell["rows"]:
        medians = [number(row[x]["p50"], " ms") if x in row else "" for x in ("load", "switch", "request")]
        last = number(row["request"]["p99"], " ms") if "request" in row else ""
        rows.append([WAYS[row["way"]], f"{row['entries']:,}", *medians, last])
    model = cell["rows"][0]["model"]
    columns = ["served as", "free parameters", "load", "switch", "request", "p99"]
    return (
        f"{ENGINES[cell['engine']]}, {model}: every request wants another tuned model and a few tokens. A "
        f"checkpoint that is loaded is mapped into memory, and its pages are read by the request.\n\n"
        + table(columns, rows)
    )


def files(cells: list[Record]) -> str:
    return "\n".join(map(_files, cells))


def _files(record: Record) -> str:
    coding = [
        [
            f"{row['share']:g}",
            number(row["bits"]),
            number(row["ratio"]),
            number(row["bits_clustered_in_rows"]),
        ]
        for row in record["coding"]
    ]
    swap = record["swapping"]
    seconds = [
        [STEPS[name], number(1e3 * s, " ms"), number(1e3 * swap["cpu_seconds"][name], " ms")]
        for name, s in swap["seconds"].items()
    ]
    exact = f"{record['cycles']['bit_exact']:,} of {record['cycles']['cycles']:,}"
    return (
        f"A model of {swap['parameters']:,} parameters; subsets of {swap['entries']:,} entries in files of "
        f"{swap['file_bytes'] / 1e6:.3g} MB. Of the switches there and back {exact} were bit-exact.\n\n"
        + table(["", "time", "processor time"], seconds)
        + "\n"
        + table(["share of the entries", "bits a position", "of the entropy", "clustered in rows"], coding)
    )


WAYS = {
    "none": "one resident model",
    "full": "a checkpoint loaded for each request",
    "subset": "subset",
    "lora": "LoRA, merged anew",
    "lora unmerged": "LoRA, beside the weights",
    "patches": "vLLM's own sparse patches",
    "restart": "a server started on the checkpoint",
}
ENGINES = {"torch": "PyTorch", "vllm": "vLLM"}
STEPS = {
    "read_full": "read the whole model",
    "load": "load a subset",
    "activate": "seed to subset",
    "switch": "subset to subset",
    "scatter": "one bare scatter of all values",
}
PARTS: dict[str, tuple[str, Callable[[list[Record]], str], str]] = {
    "step": ("The optimizer's step", step, "benchmark.py step"),
    "training-step": ("A training step", step, "benchmark.py training-step"),
    "methods": ("Methods on a language model", methods, "benchmark_methods.py --checkpoint smollm2"),
    "selection": ("The threshold of one silo", selection, "benchmark.py selection"),
    "files": ("Subset files", files, "benchmark_subset.py"),
    "serving": ("Serving in JAX", serving, "benchmark.py serving"),
    "engines": ("Serving in PyTorch and vLLM", engines, "benchmark_engines.py torch --checkpoint smollm2"),
}

WHOLE = {"files": "swapping", "engines": "engine"}  # parts whose record is one cell, and a key that it has


def cells_of(record: Record, part: str) -> list[Record]:
    """The cells of a part; the records of benchmark_subset.py and benchmark_engines.py are one cell each."""
    if part in WHOLE:
        return [record] if WHOLE[part] in record else []
    return [cell for cell in record.get("cells", []) if cell["part"] == part]


def origin(environment: Record) -> str:
    machine = environment["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"*{environment['date']}: {machine['device']}, {machine['processor']}, {machine['cpus']} cores, "
        f"{machine['memory_gb']} GB; {versions}.* `{environment['command']}`\n"
    )


def page(records: list[Record]) -> str:
    """The page's Markdown."""
    out = [HEAD]
    for part, (title, render, command) in PARTS.items():
        out.append(f"## {title}\n")
        shown = [(cells, record["environment"]) for record in records if (cells := cells_of(record, part))]
        for cells, environment in shown:
            out += [render(cells), origin(environment)]
        if not shown:
            out.append(f"No record yet: `python scripts/{command} --out docs/benchmarks/{part}.json`.\n")
    return "\n".join(out)


def main() -> None:
    records = [json.loads(file.read_text()) for file in sorted((DOCS / "benchmarks").glob("*.json"))]
    (DOCS / "benchmarks.md").write_text(page(records))


if __name__ == "__main__":
    main()
