"""Score against free parameters: methods, budgets, tasks and seeds of randomness.

For each task, method and budget the learning rate with the best score on the validation split is chosen
from one grid, with the first seed of randomness; the runs of all seeds with that learning rate make the
figure. Where a test split has labels, scores are reported on it. A killed sweep goes on where it was:

    <run_dir>/<task>/          a run directory of the trainer, one method a cell
    <run_dir>/results.jsonl    a line a run
    <run_dir>/results.md, score_vs_budget.png
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optax

from dst_optax.finetuning import storage, trainer
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.models import t5
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One method with one budget and one learning rate.

    Attributes:
      method: its name.
      budget: free parameters; None frees all.
      learning_rate: peak of the schedule.
    """

    method: str
    budget: int | None
    learning_rate: float

    def __str__(self) -> str:
        """Name of its directory."""
        budget = "all" if self.budget is None else self.budget
        return f"{self.method} {budget} lr {self.learning_rate:g}"


def score_vs_budget(
    run_dir: str,
    data: SuperGlue,
    model: t5.T5Config,
    methods: Mapping[str, Callable[..., Method]],
    budgets: Mapping[str, Sequence[int | None]],
    learning_rates: Sequence[float],
    optimizer: Callable[[float], optax.GradientTransformation],
    recipe: trainer.Recipe,
    *,
    checkpoint: str | None = None,
    rng_seeds: Sequence[int] = (0, 1, 2),
    tuning_seeds: int = 1,
    config: str = "",
) -> list[Row]:
    """Runs the sweep, or what is left of it.

    Args:
      run_dir: where everything goes.
      data: tasks; each is tuned on by itself.
      model: of the network.
      methods: name to class; called with ``optimizer`` and, unless a budget is None, ``num_free_params``.
      budgets: name to budgets.
      learning_rates: the grid, the same for all.
      optimizer: makes an optimizer from a learning rate.
      recipe: how to train; the same for all.
      checkpoint: the seed model.
      rng_seeds: seeds of randomness.
      tuning_seeds: how many of them choose the learning rate, that of the best mean score.
      config: text that a resumed command must repeat.

    Returns:
      Rows of all runs: ``task``, ``method``, ``budget``, ``learning_rate``, ``rng_seed``, ``free_params``,
      ``score``, ``test_score`` and ``seconds``.

    Raises:
      ValueError: bad input, or ``run_dir`` belongs to another sweep.
    """
    if not 1 <= tuning_seeds <= len(rng_seeds):
        raise ValueError(f"tuning_seeds: got {tuning_seeds}; it must be from 1 to {len(rng_seeds)}.")
    if unknown := set(budgets) - set(methods):
        raise ValueError(f"budgets of unknown methods: {', '.join(sorted(unknown))}.")
    root, sheet = Path(run_dir), Sheet(Path(run_dir) / "results.jsonl")

    def bench(task: str, where: Path, recipe: trainer.Recipe) -> trainer.Bench:
        one = replace(data, names=(task,))
        return trainer.Bench(str(where), one, model, recipe, checkpoint=checkpoint, config=config)

    def make(cell: Cell) -> Method:
        budget = {} if cell.budget is None else {"num_free_params": cell.budget}
        return methods[cell.method](optimizer=optimizer(cell.learning_rate), **budget)

    def run(opened: trainer.Bench, cell: Cell, rng_seed: int) -> Row:
        row = opened.run(str(cell), make(cell), rng_seed)
        return sheet.add({"task": opened.data.names[0], **row, **vars(cell)})

    groups = [(name, budget) for name in budgets for budget in budgets[name]]
    first = Cell(*groups[0], learning_rates[0])
    each = _seconds_a_run(lambda *where: bench(data.names[0], *where), make(first), recipe)
    more = len(rng_seeds) - tuning_seeds
    runs = len(data.names) * len(groups) * (len(learning_rates) * tuning_seeds + more)
    done = sum(1 for _ in root.glob("*/*/rng_*/result.json"))
    rates = ", ".join(f"{x:g}" for x in learning_rates)
    print(
        f"{runs} runs: {len(data.names)} tasks x {len(groups)} methods with budgets x ({len(learning_rates)} "
        f"learning rates {rates} x {tuning_seeds} seeds of randomness + {more} more seeds); {done} are done, "
        f"the others take about {(runs - done) * each / 60:.0f} minutes.",
        flush=True,
    )
    for task in data.names:
        opened = bench(task, root / task, recipe)
        for row in opened.baselines():
            sheet.add({"task": task, **row})
        for group in groups:
            cells = [Cell(*group, rate) for rate in learning_rates]
            grid = [run(opened, cell, seed) for seed in rng_seeds[:tuning_seeds] for cell in cells]
            for seed in rng_seeds[tuning_seeds:]:
                run(opened, Cell(*group, best_rate(grid)), seed)
            storage.write_text(root / "results.md", markdown(sheet.rows))
        found = summarise(sheet.rows)
        figures.save(
            figures.score_vs_budget(found, task, operational_ranges(found, task)),
            root / f"score_vs_budget_{task}.png",
        )
    return sheet.rows


class Sheet:
    """Rows that are on disk as soon as they are known, a JSON line each.

    Args:
      path: the file; what an earlier command wrote is replaced.
    """

    def __init__(self, path: Path):
        self._path = path
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        """Adds a row, and returns it."""
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(self._path, "".join(json.dumps(x) + "\n" for x in self.rows))
        return row


def best_rate(rows: Sequence[Row]) -> Any:
    """The learning rate of the best mean score over the seeds of randomness that all rates were tried with.

    Args:
      rows: of one task, method and budget.

    Returns:
      The rate; None for a baseline.

    Example:
      >>> runs = [(1e-3, 0, 50.0), (1e-3, 1, 90.0), (1e-2, 0, 60.0), (1e-2, 1, 65.0), (1e-2, 2, 99.0)]
      >>> names = "learning_rate", "rng_seed", "score"
      >>> best_rate([dict(zip(names, run)) for run in runs])
      0.001
    """
    scores: dict[Any, dict[Any, float]] = {}
    for row in rows:
        scores.setdefault(row.get("learning_rate"), {})[row.get("rng_seed")] = row["score"]
    common = set.intersection(*map(set, scores.values()))
    return max(scores, key=lambda rate: sum(scores[rate][seed] for seed in common))


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each task, method and budget: its best learning rate, mean and spread over seeds.

    Args:
      rows: as :func:`score_vs_budget` returns them.

    Returns:
      Rows of ``task``, ``method``, ``budget``, ``learning_rate``, ``free_params``, ``mean``, ``std``,
      ``seconds`` and ``runs``; baselines have no budget and no learning rate.

    Example:
      >>> row = {"task": "rte", "method": "dst", "budget": 9, "free_params": 9, "seconds": 1.0}
      >>> rows = [{**row, "learning_rate": r, "rng_seed": 0, "score": r} for r in (1.0, 2.0)]
      >>> [(s["learning_rate"], s["mean"]) for s in summarise(rows)]
      [(2.0, 2.0)]
    """
    made = []
    for task, method, budget in dict.fromkeys((r["task"], r["method"], r.get("budget")) for r in rows):
        group = [r for r in rows if (r["task"], r["method"], r.get("budget")) == (task, method, budget)]
        rate = best_rate(group)
        same = [r for r in group if r.get("learning_rate") == rate]
        scores = [r["score"] if r.get("test_score") is None else r["test_score"] for r in same]
        made.append(
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
            }
        )
    return made


def operational_ranges(found: Sequence[Row], task: str) -> dict[str, tuple[float, float]]:
    """Budgets at which methods work: their means go at least half the way to full fine-tuning's.

    The way starts at the better baseline. Only budgets that were tried are known, and none between the
    ends is promised to work.

    Args:
      found: as :func:`summarise` returns it.
      task: whose rows count.

    Returns:
      Method to the fewest and the most free parameters at which it works; nothing for methods that never
      do, or where there are no baselines or no full fine-tuning to measure by.
    """
    same = [s for s in found if s["task"] == task]
    baselines = [s["mean"] for s in same if s["learning_rate"] is None]
    whole = [s["mean"] for s in same if s["budget"] is None and s["learning_rate"] is not None]
    ranges: dict[str, tuple[float, float]] = {}
    if baselines and whole:
        halfway = (max(baselines) + max(whole)) / 2
        for s in same:
            if s["budget"] is not None and s["mean"] >= halfway:
                free = s["free_params"]
                low, high = ranges.get(s["method"], (free, free))
                ranges[s["method"]] = min(low, free), max(high, free)
    return ranges


def markdown(rows: Sequence[Row]) -> str:
    """Tables, one a task: mean ± standard deviation; the best method of each budget is bold.

    A second table has the :func:`operational_ranges`.

    Args:
      rows: as :func:`score_vs_budget` returns them.

    Returns:
      Markdown.
    """
    found = summarise(rows)
    lines: list[str] = []
    for task in dict.fromkeys(s["task"] for s in found):
        lines += [f"## {task}", "", "| method | budget | free parameters | learning rate | score | seconds |"]
        lines += ["|---|---:|---:|---:|---:|---:|", *_table([s for s in found if s["task"] == task]), ""]
        if ranges := operational_ranges(found, task):
            lines += ["| works with free parameters | from | to |", "|---|---:|---:|"]
            lines += [*(f"| {method} | {a:,.0f} | {b:,.0f} |" for method, (a, b) in ranges.items()), ""]
    return "\n".join(lines)


def _table(found: list[Row]) -> Iterator[str]:
    for s in found:
        rivals = [x["mean"] for x in found if x["budget"] == s["budget"] and x["learning_rate"] is not None]
        score = f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if s["runs"] > 1 else "")
        if s["learning_rate"] is not None and len(rivals) > 1 and s["mean"] == max(rivals):
            score = f"**{score}**"
        budget = "" if s["budget"] is None else f"{s['budget']:,}"
        rate = "" if s["learning_rate"] is None else f"{s['learning_rate']:g}"
        yield (
            f"| {s['method']} | {budget} | {s['free_params']:,.0f} | {rate} | {score} | {s['seconds']:.0f} |"
        )


def _seconds_a_run(
    bench: Callable[[Path, trainer.Recipe], trainer.Bench], method: Method, recipe: trainer.Recipe
) -> float:
    """Seconds of a run, from two short ones."""
    spent, short = [], (2, 12)
    with tempfile.TemporaryDirectory() as scratch:
        for steps in short:
            opened = bench(Path(scratch) / str(steps), replace(recipe, steps=steps, eval_every=steps))
            start = time.perf_counter()
            opened.run("probe", method, 0)
            spent.append(time.perf_counter() - start)
    step = max(spent[1] - spent[0], 0.0) / (short[1] - short[0])
    return spent[0] + step * recipe.steps
