#!/usr/bin/env python
"""Joins the rows of sweeps that were run in parts, draws their scores, and prints their table.

    python scripts/sweep_figure.py runs/a/results.jsonl runs/b/results.jsonl \
        --rows docs/records/smollm2_cb.jsonl --figure docs/images/smollm2_cb.png

Rows of one task, method, budget, learning rate and random seed count once; those of a baseline, too.
"""

import argparse
import json
from pathlib import Path

from dst_optax.finetuning import storage
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.experiments.summary import Row, markdown, operational_ranges, summarise

KEY = ("task", "method", "budget", "learning_rate", "rng_seed")


def joined(files: list[Path]) -> list[Row]:
    """The rows of all files, sorted by method, budget and learning rate.

    Raises:
      ValueError: two rows of one run differ in their scores.
    """
    found: dict[tuple, Row] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            key = tuple(row.get(name) for name in KEY)
            other = found.setdefault(key, row)
            if any(other.get(name) != row.get(name) for name in ("score", "test_score")):
                raise ValueError(f"{file}: another score of the run {dict(zip(KEY, key, strict=True))}.")
    return sorted(
        found.values(), key=lambda row: (*(row[x] for x in KEY[:2]), *(row.get(x) or 0 for x in KEY[2:]))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.jsonl of sweeps")
    parser.add_argument("--rows", type=Path, help="where the joined rows go")
    parser.add_argument("--figure", type=Path, help="where the figure goes; one task only")
    given = parser.parse_args()
    rows = joined(given.results)
    print(markdown(rows))
    if given.rows:
        storage.write_text(given.rows, "".join(json.dumps(row) + "\n" for row in rows))
    if given.figure:
        (task,) = {row["task"] for row in rows}
        found = summarise(rows)
        drawn = figures.score_vs_budget(found, task, operational_ranges(found, task))
        figures.save(drawn, given.figure)


if __name__ == "__main__":
    main()
