"""What a sweep of budgets says: the rows of its runs as one row a cell, ranges and Markdown tables."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def best_rate(rows: Sequence[Row]) -> Any:
    """The learning rate of the best mean score over the random seeds that all rates were tried with.

    A rate with which fewer of these runs diverged is preferred.

    Args:
      rows: of one task, method and budget.

    Returns:
      The rate; None for a baseline, and where all runs diverged.

    Raises:
      ValueError: no seed was tried with all rates, so that they cannot be compared.

    Example:
      >>> runs = [(1e-3, 0, 50.0), (1e-3, 1, 90.0), (1e-2, 0, 60.0), (1e-2, 1, 65.0), (1e-2, 2, 99.0)]
      >>> names = "learning_rate", "rng_seed", "score"
      >>> best_rate([dict(zip(names, run)) for run in runs])
      0.001
    """
    scores: dict[Any, dict[Any, Any]] = {}  # None where the run diverged
    for row in rows:
        scores.setdefault(row.get("learning_rate"), {})[row.get("rng_seed")] = row["score"]
    common = set.intersection(*map(set, scores.values()))
    if not common:
        tried = "; ".join(f"{rate} with {sorted(of_seed)}" for rate, of_seed in scores.items())
        raise ValueError(f"learning rates: no random seed was tried with all of them: {tried}.")
    finished = {
        rate: [of_seed[seed] for seed in common if of_seed[seed] is not None]
        for rate, of_seed in scores.items()
    }
    best = max(finished, key=lambda rate: (len(finished[rate]), sum(finished[rate])))
    return best if finished[best] else None


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each task, method and budget: its best learning rate, mean and spread over seeds.

    Runs that diverged are left out, and so are budgets with no other ones.

    Args:
      rows: as :func:`~dst_optax.finetuning.experiments.score_vs_budget.score_vs_budget` returns them.

    Returns:
      Rows of ``task``, ``method``, ``budget``, ``learning_rate``, ``free_params``, ``mean``, ``std``,
      ``seconds`` and ``runs``; baselines have no budget and no learning rate.

    Example:
      >>> row = {"task": "rte", "method": "dst", "budget": 9, "free_params": 9, "seconds": 1.0}
      >>> rows = [{**row, "learning_rate": r, "rng_seed": 0, "score": r} for r in (1.0, 2.0)]
      >>> [(s["learning_rate"], s["mean"]) for s in summarise(rows)]
      [(2.0, 2.0)]
    """
    summary = []
    for task, method, budget in dict.fromkeys((r["task"], r["method"], r.get("budget")) for r in rows):
        group = [r for r in rows if (r["task"], r["method"], r.get("budget")) == (task, method, budget)]
        rate = best_rate(group)
        tried = [r for r in group if r.get("learning_rate") == rate]
        same = [r for r in tried if r["score"] is not None]
        if not same:
            continue
        scores = [r["score"] if r.get("test_score") is None else r["test_score"] for r in same]
        summary.append(
            {
                "task": task,
                "method": method,
                "budget": budget,
                "learning_rate": rate,
                "free_params": float(np.mean([r["free_params"] for r in same])),
                "mean": float(np.mean(scores)),
                "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
                "seconds": float(np.mean([r["seconds"] for r in same])),
                "runs": len(same),
                "diverged": len(tried) - len(same),
            }
        )
    return summary


def operational_ranges(summary: Sequence[Row], task: str) -> dict[str, tuple[float, float]]:
    """Budgets at which methods work: their means go at least half the way to full fine-tuning's.

    The way starts at the better baseline. Only budgets that were tried are known, and none between the
    ends is promised to work, nor one with which a run diverged.

    Args:
      summary: as :func:`summarise` returns it.
      task: whose rows count.

    Returns:
      Method to the fewest and the most free parameters at which it works; nothing for methods that never
      do, or where there are no baselines or no full fine-tuning to measure by.
    """
    same = [s for s in summary if s["task"] == task]
    baselines = [s["mean"] for s in same if s["learning_rate"] is None]
    tuned = [s for s in same if s["learning_rate"] is not None]
    unbounded = [s for s in tuned if s["budget"] is None]
    size = max((s["free_params"] for s in unbounded), default=0)
    if any(s["budget"] is not None and s["free_params"] > 0.9 * size for s in tuned):
        size = 0  # these are no models tuned in full, but variants that free about as much as others
    whole = [s["mean"] for s in unbounded if s["free_params"] == size]
    ranges: dict[str, tuple[float, float]] = {}
    if baselines and whole:
        halfway = (max(baselines) + max(whole)) / 2
        for s in same:
            if s["budget"] is not None and s["mean"] >= halfway and not s["diverged"]:
                free = s["free_params"]
                low, high = ranges.get(s["method"], (free, free))
                ranges[s["method"]] = min(low, free), max(high, free)
    return ranges


def markdown(rows: Sequence[Row]) -> str:
    """Tables, one a task: mean ± standard deviation; the best method of each budget is bold.

    A second table has the :func:`operational_ranges`, a third one the runs that diverged.

    Args:
      rows: as :func:`~dst_optax.finetuning.experiments.score_vs_budget.score_vs_budget` returns them.

    Returns:
      Markdown.
    """
    summary = summarise(rows)
    lines: list[str] = []
    for task in dict.fromkeys(r["task"] for r in rows):
        lines += [f"## {task}", "", "| method | budget | free parameters | learning rate | score | seconds |"]
        lines += ["|---|---:|---:|---:|---:|---:|", *_table([s for s in summary if s["task"] == task]), ""]
        if ranges := operational_ranges(summary, task):
            lines += ["| works with free parameters | from | to |", "|---|---:|---:|"]
            lines += [*(f"| {method} | {a:,.0f} | {b:,.0f} |" for method, (a, b) in ranges.items()), ""]
        if diverged := [r for r in rows if r["task"] == task and r.get("diverged")]:
            lines += ["| diverged | budget | learning rate | random seed |", "|---|---:|---:|---:|"]
            lines += [*map(_diverged, diverged), ""]
    return "\n".join(lines)


def _diverged(row: Row) -> str:
    budget = "" if row["budget"] is None else f"{row['budget']:,}"
    return f"| {row['method']} | {budget} | {row['learning_rate']:g} | {row['rng_seed']} |"


def _table(summary: list[Row]) -> Iterator[str]:
    for s in summary:
        tuned = [x for x in summary if x["budget"] == s["budget"] and x["learning_rate"] is not None]
        score = f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if s["runs"] > 1 else "")
        if s["diverged"]:
            score += f" ({s['diverged']} of {s['runs'] + s['diverged']} diverged)"
        elif (
            s in tuned and len(tuned) > 1 and s["mean"] == max(x["mean"] for x in tuned if not x["diverged"])
        ):
            score = f"**{score}**"
        budget = "" if s["budget"] is None else f"{s['budget']:,}"
        rate = "" if s["learning_rate"] is None else f"{s['learning_rate']:g}"
        yield (
            f"| {s['method']} | {budget} | {s['free_params']:,.0f} | {rate} | {score} | {s['seconds']:.0f} |"
        )
