"""Gathers the runs of scripts/sweep_superglue.sh, wherever they ran, into one table and a figure a task.

python -m t5x_integration.collect gs://bucket/sweep runs/sweep
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dst_optax.finetuning import storage
from dst_optax.finetuning.experiments import figures, summary
from dst_optax.paths import as_path, is_local
from t5x_integration import checkpoints, export

RATE = re.compile(r"^utils\.create_learning_rate_scheduler\.base_learning_rate = (\S+)$", re.MULTILINE)


def collect(sweep: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads ``<sweep>/<task>/<fraction>/<seed>``, one T5X run each.

    A score is the mean of a task's metrics in the last evaluation; the number of free parameters is what the
    last checkpoint's state says, or the model's size where all were tuned. Runs that are not evaluated yet
    are passed over and named.

    Args:
      sweep: directory, local or ``gs://``.
      out: local directory for ``results.jsonl``, ``results.md`` and a figure a task.

    Returns:
      Rows as :func:`dst_optax.finetuning.experiments.score_vs_budget.score_vs_budget` returns them;
      ``seconds`` is 0, since T5X does not say.

    Raises:
      ValueError: no run has been evaluated, one does not say its learning rate, or ``out`` is not local.
    """
    if not is_local(as_path(out)):
        raise ValueError(f"{out} lies in an object store; write a local directory and copy it there.")
    rows: list[dict[str, Any]] = []
    for run in sorted(as_path(sweep).glob("*/*/*")):
        task, fraction, seed = run.parts[-3:]
        score = _last_score(run / "inference_eval" / f"superglue_{task}-metrics.jsonl")
        if score is None:
            print(f"{task}/{fraction}/{seed} is not evaluated yet.")
            continue
        size, free = _counts(run)
        whole = fraction == "full"
        rows.append(
            {
                "task": task,
                "method": "full" if whole else "dst",
                "budget": None if whole else round(float(fraction) * size),
                "learning_rate": _learning_rate(run / "config.gin"),
                "rng_seed": int(seed),
                "free_params": size if whole else free,
                "score": score,
                "test_score": None,
                "seconds": 0.0,
            }
        )
    if not rows:
        raise ValueError(
            f"{sweep} has no evaluated run <task>/<fraction>/<seed>; scripts/sweep_superglue.sh makes them."
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    storage.write_text(Path(out) / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    storage.write_text(Path(out) / "results.md", summary.markdown(rows))
    means = summary.summarise(rows)
    for task in dict.fromkeys(row["task"] for row in rows):
        ranges = summary.operational_ranges(means, task)
        figures.save(figures.score_vs_budget(means, task, ranges), Path(out) / f"score_vs_budget_{task}.png")
    return rows


def _last_score(file: Any) -> float | None:
    """That of the model whose parameters are exported: the best one would be chosen on what is reported."""
    text = file.read_text() if file.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be half written
    if not lines:
        return None
    try:
        return float(np.mean([v for k, v in json.loads(lines[-1]).items() if k != "step"]))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}:{len(lines)} is no line of metrics: {error}.") from error


def _counts(run: Any) -> tuple[int, int]:
    """Parameters of the model, and how many of them are free."""
    tensors = export.tensors(run)
    size = sum(int(np.prod(x.shape)) for name, x in tensors.items() if name.startswith("target/"))
    numbers = [tensors[f"{state}/memory/diagnostics/num_free"] for state in checkpoints.dst_states(tensors)]
    return size, sum(int(np.asarray(x)) for x in numbers)


def _learning_rate(config: Any) -> float:
    match = RATE.search(config.read_text()) if config.exists() else None
    if match is None:
        raise ValueError(
            f"{config} names no utils.create_learning_rate_scheduler.base_learning_rate; T5X writes it into "
            "the directory of every run that has its scheduler."
        )
    try:
        return float(match[1])
    except ValueError as error:
        raise ValueError(f"{config}: base_learning_rate is {match[1]}; give runs a number.") from error


def main(
    sweep: Annotated[str, typer.Argument(help="Directory of <task>/<fraction>/<seed>, local or gs://.")],
    out: Annotated[str, typer.Argument(help="Local directory for the table and the figures.")],
) -> None:
    """Gather the runs of scripts/sweep_superglue.sh into one table and a figure a task."""
    try:
        print(summary.markdown(collect(sweep, out)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
