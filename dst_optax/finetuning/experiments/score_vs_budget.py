"""Score against free parameters: methods, budgets, tasks and random seeds.

For each task, method and budget the learning rate with the best score on the validation split is chosen
from the method's grid, with the first random seeds; the runs of all seeds with that learning rate make
the figure. Scores are reported on the test split where it has labels, as ``sources.HeldOut`` gives it.
A run that diverges is noted and not tried again. Rerun the command to resume a sweep:

    <run_dir>/<task>/          a run directory of the trainer, one method a cell
    <run_dir>/results.jsonl    a line a run
    <run_dir>/results.md, score_vs_budget.png

Checkpoints of finished runs are removed.
"""

import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optax

from dst_optax.finetuning import processes, storage
from dst_optax.finetuning.context import RunContext
from dst_optax.finetuning.display import Diverged
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.experiments.summary import Row, best_rate, markdown, operational_ranges, summarise
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.tasks.base import TaskSuite
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue
from dst_optax.finetuning.trainer import Run
from dst_optax.paths import require_local

Optimizer = Callable[[float], optax.GradientTransformation]


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
        return f"{_named((self.method, self.budget))} lr {self.learning_rate:g}"


def _named(group: tuple[str, int | None]) -> str:
    name, budget = group
    return f"{name} {'all' if budget is None else budget}"


def score_vs_budget(
    run_dir: str,
    data: TaskSuite,
    model: Any,
    methods: Mapping[str, Callable[..., Method]],
    budgets: Mapping[str, Sequence[int | None]],
    learning_rates: Mapping[str, Sequence[float] | Mapping[int | None, Sequence[float]]] | Sequence[float],
    optimizer: Optimizer | Mapping[str, Optimizer],
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
      data: one task, or SuperGLUE's, of which each is tuned on by itself.
      model: shape of the network, or the name of a published one.
      methods: name to class; called with ``optimizer`` and, unless a budget is None, ``num_free_params``.
      budgets: name to budgets; the first ones of all methods are run first.
      learning_rates: the grid of each method, by name, or of each of its budgets; a sequence is that of all.
      optimizer: makes an optimizer from a learning rate; a mapping has that of each method, by name.
      recipe: how to train; the same for all.
      checkpoint: the seed model.
      rng_seeds: random seeds.
      tuning_seeds: how many of them choose the learning rate, that of the best mean score.
      config: text that a resumed command must repeat.

    Returns:
      Rows of all runs: ``task``, ``method``, ``budget``, ``learning_rate``, ``rng_seed``, ``free_params``,
      ``score``, ``test_score``, ``seconds`` and ``device``, the kind that the run was made on; of runs that
      diverged, ``diverged`` and a ``score`` of None instead.

    Raises:
      ValueError: bad input, or ``run_dir`` belongs to another sweep.
    """
    if not 1 <= tuning_seeds <= len(rng_seeds):
        raise ValueError(f"tuning_seeds: got {tuning_seeds}; it must be from 1 to {len(rng_seeds)}.")
    if unknown := set(budgets) - set(methods):
        raise ValueError(f"budgets of unknown methods: {', '.join(sorted(unknown))}.")
    root = require_local(run_dir, "run_dir")
    sheet = Sheet(root / "results.jsonl")

    def context(task: str, where: Path, recipe: Recipe, methods: Iterable[Method] = ()) -> RunContext:
        alone = replace(data, names=(task,)) if isinstance(data, SuperGlue) else data
        return RunContext(
            str(where), alone, model, recipe, methods=methods, checkpoint=checkpoint, config=config
        )

    def make(cell: Cell) -> Method:
        budget = {} if cell.budget is None else {"num_free_params": cell.budget}
        tx = optimizers[cell.method](cell.learning_rate)
        return methods[cell.method](optimizer=tx, **budget)

    def run(shared: RunContext, cell: Cell, rng_seeds: Sequence[int]) -> list[Row]:
        method, rows = make(cell), []
        for rng_seed in rng_seeds:
            cell_run = Run(shared, str(cell), method, rng_seed)
            row = _result(cell_run)
            shutil.rmtree(cell_run.directory / "checkpoints", ignore_errors=True)
            rows.append(sheet.add({"task": shared.data.names[0], **row, **vars(cell)}))
        return rows

    grids = learning_rates if isinstance(learning_rates, Mapping) else dict.fromkeys(budgets, learning_rates)
    optimizers = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(budgets, optimizer)
    for name, by_method in {"learning_rates": grids, "optimizer": optimizers}.items():
        if missing := set(budgets) - set(by_method):
            raise ValueError(f"{name}: nothing for {', '.join(sorted(missing))}.")
    groups = [
        (name, budget)
        for of_each in itertools.zip_longest(*([(name, x) for x in budgets[name]] for name in budgets))
        for name, budget in filter(None, of_each)
    ]
    cells = {(name, budget): _cells(name, budget, grids[name]) for name, budget in groups}
    every = [make(cell) for grid in cells.values() for cell in grid]
    shared = context(data.names[0], root / data.names[0], recipe, every)
    more = len(rng_seeds) - tuning_seeds
    runs = len(data.names) * sum(len(grid) * tuning_seeds + more for grid in cells.values())
    wanted = itertools.product(data.names, itertools.chain(*cells.values()), rng_seeds)
    done = sum((root / task / str(cell) / f"rng_{x}" / "result.json").exists() for task, cell, x in wanted)
    each = 0.0
    if done < runs:
        probe = functools.partial(context, data.names[0])
        each = _seconds_a_run(probe, root / "probe", every[0], recipe)
    rates = "; ".join(
        f"{_named(group)}: {', '.join(f'{x.learning_rate:g}' for x in grid)}" for group, grid in cells.items()
    )
    print(
        f"{runs} runs: {len(data.names)} tasks x {len(groups)} methods with budgets x (learning rates x "
        f"{tuning_seeds} random seeds + {more} more); {done} are done, the others take about {each / 60:.1f} "
        f"minutes each, {(runs - done) * each / 60:.0f} in all. Learning rates: {rates}.",
        flush=True,
    )
    for task in data.names:
        if shared.data.names != (task,):
            shared = context(task, root / task, recipe, every)
        for row in shared.baselines():
            sheet.add({"task": task, **row})
        chosen = []
        for group in groups:
            rows = [row for cell in cells[group] for row in run(shared, cell, rng_seeds[:tuning_seeds])]
            if (rate := best_rate(rows)) is not None:
                chosen.append(Cell(*group, rate))
            else:
                print(
                    f"{task}: {_named(group)} diverges with all learning rates; give lower ones, or check "
                    "the seed model.",
                    flush=True,
                )
            storage.write_text(root / "results.md", markdown(sheet.rows))
        for cell in chosen:
            run(shared, cell, rng_seeds[tuning_seeds:])
            storage.write_text(root / "results.md", markdown(sheet.rows))
        summary = summarise(sheet.rows)
        figures.save(
            figures.score_vs_budget(summary, task, operational_ranges(summary, task)),
            root / f"score_vs_budget_{task}.png",
        )
    return sheet.rows


def _cells(name: str, budget: int | None, grid: Any) -> list[Cell]:
    if isinstance(grid, Mapping):
        if budget not in grid:
            raise ValueError(f"learning_rates: nothing for {name} with a budget of {budget}.")
        grid = grid[budget]
    return [Cell(name, budget, rate) for rate in grid]


class Sheet:
    """Rows that are on disk as soon as they are known, a JSON line each.

    Args:
      path: the file; rows of other runs that an earlier command wrote stay there.

    Attributes:
      rows: what was added.
    """

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self._on_disk = {_run_of(row): row for row in map(json.loads, lines)}
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        """Adds a row, and returns it."""
        self.rows.append(row)
        self._on_disk[_run_of(row)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(self._path, "".join(json.dumps(x) + "\n" for x in self._on_disk.values()))
        return row


def _run_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("task", "method", "budget", "learning_rate", "rng_seed"))


def _result(run: Run) -> Row:
    """The row of a run. That it diverged is noted as one: the same command would compute the same again."""
    try:
        return run.result()
    except Diverged as error:
        run.context.console.print(f"{run.name} rng {run.rng_seed}: {error}", highlight=False)
        row = {"method": run.name, "rng_seed": run.rng_seed, "score": None, "diverged": True}
        storage.write_text(run.directory / "result.json", json.dumps(row, indent=1))
        return row


def _seconds_a_run(
    context: Callable[[Path, Recipe], RunContext], scratch: Path, method: Method, recipe: Recipe
) -> float:
    """Seconds of a run, from two short ones in a directory that all processes see."""
    spent, short = [], (2, 12)
    if processes.is_primary():
        shutil.rmtree(scratch, ignore_errors=True)  # a killed sweep left it
    processes.barrier(f"{scratch} is free")
    try:
        for steps in short:
            shared = context(scratch / str(steps), replace(recipe, steps=steps, eval_every=steps))
            start = time.perf_counter()
            _result(Run(shared, "probe", method, 0))
            spent.append(time.perf_counter() - start)
    finally:
        if processes.is_primary():
            shutil.rmtree(scratch, ignore_errors=True)
    step = max(spent[1] - spent[0], 0.0) / (short[1] - short[0])
    return spent[0] + step * recipe.steps
