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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optax

from dst_optax.finetuning import storage
from dst_optax.finetuning.context import RunContext
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.experiments.summary import Row, best_rate, markdown, operational_ranges, summarise
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue
from dst_optax.finetuning.trainer import Run


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
    model: Any,
    methods: Mapping[str, Callable[..., Method]],
    budgets: Mapping[str, Sequence[int | None]],
    learning_rates: Sequence[float],
    optimizer: Callable[[float], optax.GradientTransformation],
    recipe: Recipe,
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
      model: shape of the network, or the name of a published one.
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

    def context(task: str, where: Path, recipe: Recipe) -> RunContext:
        one = replace(data, names=(task,))
        return RunContext(str(where), one, model, recipe, checkpoint=checkpoint, config=config)

    def make(cell: Cell) -> Method:
        budget = {} if cell.budget is None else {"num_free_params": cell.budget}
        return methods[cell.method](optimizer=optimizer(cell.learning_rate), **budget)

    def run(shared: RunContext, cell: Cell, rng_seed: int) -> Row:
        row = Run(shared, str(cell), make(cell), rng_seed).result()
        return sheet.add({"task": shared.data.names[0], **row, **vars(cell)})

    groups = [(name, budget) for name in budgets for budget in budgets[name]]
    first = Cell(*groups[0], learning_rates[0])
    each = _seconds_a_run(lambda *where: context(data.names[0], *where), make(first), recipe)
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
        shared = context(task, root / task, recipe)
        for row in shared.baselines():
            sheet.add({"task": task, **row})
        for group in groups:
            cells = [Cell(*group, rate) for rate in learning_rates]
            grid = [run(shared, cell, seed) for seed in rng_seeds[:tuning_seeds] for cell in cells]
            for seed in rng_seeds[tuning_seeds:]:
                run(shared, Cell(*group, best_rate(grid)), seed)
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


def _seconds_a_run(context: Callable[[Path, Recipe], RunContext], method: Method, recipe: Recipe) -> float:
    """Seconds of a run, from two short ones."""
    spent, short = [], (2, 12)
    with tempfile.TemporaryDirectory() as scratch:
        for steps in short:
            shared = context(Path(scratch) / str(steps), replace(recipe, steps=steps, eval_every=steps))
            start = time.perf_counter()
            Run(shared, "probe", method, 0).result()
            spent.append(time.perf_counter() - start)
    step = max(spent[1] - spent[0], 0.0) / (short[1] - short[0])
    return spent[0] + step * recipe.steps
