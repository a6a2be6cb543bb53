#!/usr/bin/env python
"""Joins the rows of sweeps that were run in parts, draws their scores, and prints their table.

    python scripts/sweep_figure.py runs/a/results.jsonl runs/b/results.jsonl \
        --rows docs/records/smollm2_cb.jsonl --figure docs/images/smollm2_cb.png --pair dst fixed

Rows of one task, method, budget, learning rate and random seed count once; those of a baseline, once for
each choice of held-out rows.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dst_optax.finetuning import storage
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.experiments.summary import Row, best_rate, operational_ranges, summarise

KEY = ("task", "method", "budget", "learning_rate", "rng_seed")


def joined(files: list[Path]) -> list[Row]:
    """The rows of all files, sorted by method, budget and learning rate.

    Raises:
      ValueError: two rows of one run differ in their scores.
    """
    runs: dict[tuple, Row] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            key = tuple(row.get(name) for name in KEY)
            if "rng_seed" not in row:  # a baseline has a score for each choice of held-out rows
                key += (row["score"],)
            other = runs.setdefault(key, row)
            if any(other.get(name) != row.get(name) for name in ("score", "test_score")):
                raise ValueError(f"{file}: another score of the run {dict(zip(KEY, key, strict=False))}.")
    return sorted(
        runs.values(), key=lambda row: (*(row[x] for x in KEY[:2]), *(row.get(x) or 0 for x in KEY[2:]))
    )


def complete(rows: list[Row]) -> list[Row]:
    """The rows less those of rates that were tried with fewer seeds than others of their budget."""
    seeds: dict[tuple, dict[Any, set]] = {}
    for row in rows:
        tried = seeds.setdefault(tuple(row.get(name) for name in KEY[:3]), {})
        tried.setdefault(row.get("learning_rate"), set()).add(row.get("rng_seed"))

    def is_whole(row: Row) -> bool:
        tried = seeds[tuple(row.get(name) for name in KEY[:3])]
        return len(tried[row.get("learning_rate")]) == max(map(len, tried.values()))

    return [row for row in rows if is_whole(row)]


def reported(row: Row) -> float:
    """The score on the split that chose nothing, where there is one."""
    return row["score"] if row.get("test_score") is None else row["test_score"]


def table(rows: list[Row], every_rate: bool) -> Iterator[str]:
    """Lines of a table: the chosen rate of each method and budget, or every rate."""
    yield "| method | free parameters | learning rate | held out | validation, each seed | mean |"
    yield "|---|---:|---:|---:|---|---:|"
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row.get("budget")), []).append(row)
    for (method, _), group in groups.items():
        best = best_rate(group)
        for rate in dict.fromkeys(row.get("learning_rate") for row in group):
            if rate != best and not every_rate:
                continue
            same = [row for row in group if row.get("learning_rate") == rate]
            free, held_out = ([row[name] for row in same] for name in ("free_params", "score"))
            test_scores = [reported(row) for row in same]
            chosen_on = f"{np.mean(held_out):.1f}"
            if "rng_seed" not in same[0]:  # a baseline: one model, perhaps several choices of held-out rows
                chosen_on, test_scores = ", ".join(f"{x:.1f}" for x in held_out), test_scores[:1]
            mean = f"{np.mean(test_scores):.1f}" + (
                f" ± {np.std(test_scores, ddof=1):.1f}" if len(test_scores) > 1 else ""
            )
            mean = f"**{mean}**" if every_rate and rate == best and len(group) > len(same) else mean
            yield (
                f"| {method} | {np.mean(free):,.0f} | {'' if rate is None else format(rate, 'g')} | "
                f"{chosen_on} | {', '.join(f'{x:.1f}' for x in test_scores)} | {mean} |"
            )


def pair(rows: list[Row], one: str, other: str) -> str:
    """One method against another at the same budget, learning rate and random seed, with a sign test."""
    scores = {tuple(row.get(name) for name in KEY[1:]): reported(row) for row in rows}
    differences = [
        score - scores[other, *rest]
        for (method, *rest), score in scores.items()
        if method == one and (other, *rest) in scores
    ]
    if not differences:
        raise ValueError(f"no runs of {one!r} and {other!r} have budget, learning rate and seed in common.")
    wins, losses = sum(x > 0 for x in differences), sum(x < 0 for x in differences)
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(max(wins, losses), n + 1)) / 2**n
    return (
        f"{one} - {other}: {np.mean(differences):+.2f} in the mean of {len(differences)} pairs of runs; "
        f"better in {wins}, worse in {losses}; sign test p = {min(1.0, 2 * tail):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.jsonl of sweeps")
    parser.add_argument("--rows", type=Path, help="where the joined rows go")
    parser.add_argument("--figure", type=Path, help="where the figure goes; one task only")
    parser.add_argument("--every-rate", action="store_true", help="not only those that were chosen")
    parser.add_argument("--pair", nargs=2, metavar="METHOD", help="methods to compare run by run")
    given = parser.parse_args()
    rows = joined(given.results)
    if len({row.get("test_score") is None for row in rows if row["score"] is not None}) > 1:
        parser.error("some rows have a test score and some have none; their scores cannot be compared.")
    if given.figure and len({row["task"] for row in rows}) > 1:
        parser.error("--figure: the rows are of several tasks; give those of one.")
    if given.rows:
        storage.write_text(given.rows, "".join(json.dumps(row) + "\n" for row in rows))
    tried = complete(rows)
    whole = [row for row in tried if row["score"] is not None]
    for task in dict.fromkeys(row["task"] for row in whole):
        same = [row for row in whole if row["task"] == task]
        print(f"## {task}\n", *table(same, given.every_rate), "", sep="\n")
        if given.pair:
            print(pair(same, *given.pair))
    if len(whole) < len(tried):
        print(f"Runs that diverged and are left out: {len(tried) - len(whole)}.")
    if len(tried) < len(rows):
        print(f"{len(rows) - len(tried)} runs at rates that were not tried with all seeds are left out.")
    if given.figure:
        (task,) = {row["task"] for row in whole}
        means = summarise(whole)
        drawn = figures.score_vs_budget(means, task, operational_ranges(means, task))
        figures.save(drawn, given.figure)


if __name__ == "__main__":
    main()
