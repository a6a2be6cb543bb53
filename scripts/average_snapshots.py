#!/usr/bin/env python
r"""Scores the last snapshot of runs of DST, the mean of their last snapshots, and that mean cut to a budget.

A mean's entries are those of all its snapshots, more than the budget allows; cutting keeps those that moved
furthest, with DST's own rule. For runs of score_vs_budget with SNAPSHOT_EVERY:

    python scripts/average_snapshots.py --checkpoint smollm2 --data reviews --budget 1345150 \
        runs/a/*/dst*/rng_0
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dst_optax
from dst_optax import subset
from dst_optax.finetuning import placement
from dst_optax.finetuning.evaluator import Evaluator
from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.tasks.jsonl import Jsonl


def snapshots(run: Path, last: int) -> dict[int, subset.Subset]:
    """The last snapshots of a run, by step."""
    taken = sorted(path for path in (run / "snapshots").glob("*") if path.name.isdigit())[-last:]
    if len(taken) < last:
        raise SystemExit(f"{run} has {len(taken)} snapshots, not {last}; train with SNAPSHOT_EVERY.")
    return {int(path.name): subset.Subset.load(path / "subset") for path in taken}


def mean(models: list[Any]) -> Any:
    """The mean of models; what none of them moved keeps its bits, for a sum in float64 is exact there."""
    return jax.tree.map(lambda *x: np.mean(x, axis=0, dtype=np.float64).astype(x[0].dtype), *models)


def cut(seed: Any, model: Any, budget: int) -> Any:
    """The model with the entries that moved furthest, and the seed elsewhere."""
    tx = dst_optax.dynamic_subset_tuning(num_free_params=budget, ties="fill")
    updates, state = jax.jit(tx.update)(jax.tree.map(np.subtract, model, seed), tx.init(seed), seed)
    return dst_optax.apply_updates(seed, updates, state)


def main() -> None:
    """Prints a JSON line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="directories that have snapshots/")
    parser.add_argument("--checkpoint", required=True, help="the seed model, a directory")
    parser.add_argument("--data", required=True, help="validation.jsonl and test.jsonl")
    parser.add_argument("--budget", type=int, required=True, help="free parameters")
    parser.add_argument("--last", type=int, default=5, help="snapshots of a mean (default: 5)")
    parser.add_argument("--inputs", type=int, default=40, help="tokens of a prompt (default: 40)")
    parser.add_argument("--targets", type=int, default=2, help="tokens of an answer (default: 2)")
    given = parser.parse_args()
    recipe = Recipe(steps=1, lengths={"inputs": given.inputs, "targets": given.targets}, eval_batch_size=50)
    data: Any = Jsonl(given.data, HuggingFaceVocabulary(given.checkpoint))
    plain = language_model(given.checkpoint)
    data.register(plain.decoder_only)
    model, mesh = plain.configured(dtype=recipe.dtype), placement.make_mesh(None)
    evaluator = Evaluator(model, data, recipe, mesh)
    seed = model.load(given.checkpoint)
    for run in given.runs:
        taken = snapshots(run, given.last)
        tuned = [each.apply(seed) for each in taken.values()]
        averaged = mean(tuned)
        for name, params in {
            "last": tuned[-1],
            "mean": averaged,
            "mean, cut": cut(seed, averaged, given.budget),
        }.items():
            placed = placement.place_model(model, params, mesh)
            row = {
                "run": run.parent.name,
                "rng": run.name,
                "steps": list(taken),
                "model": name,
                "free_params": subset.from_models(seed, params).count,
                "score": evaluator.score(placed)[1],
            }
            row["test_score"] = evaluator.score(placed, "test")[1] if evaluator.tests else None
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
