"""Whether a small budget keeps a model from memorising its training examples.

<run_dir>/<examples>/           a run directory of the trainer
<run_dir>/regularisation.json   a row a run
<run_dir>/regularisation.md, regularisation.png
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import seqio

from dst_optax.finetuning import storage
from dst_optax.finetuning.context import RunContext
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.tasks.superglue.sources import Few, SyntheticSource
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue
from dst_optax.finetuning.trainer import Run
from dst_optax.paths import require_local

Row = dict[str, Any]


def regularisation(
    run_dir: str,
    data: Callable[[int], SuperGlue],
    model: Any,
    methods: Mapping[str, Method],
    recipe: Recipe,
    *,
    sizes: Sequence[int] = (32, 100, 250, 1000),
    checkpoint: str | None = None,
    rng_seeds: Sequence[int] = (0, 1, 2),
    config: str = "",
) -> list[Row]:
    """Tunes on few examples to the end, and compares scores on them and on others.

    Args:
      run_dir: where everything goes.
      data: from a number of training examples.
      model: shape of the network, or the name of a published one.
      methods: e.g. DST at several fractions, by name.
      recipe: how to train; evaluated at the end only, so that no checkpoint is chosen.
      sizes: numbers of training examples.
      checkpoint: the seed model.
      rng_seeds: random seeds.
      config: text that a resumed command must repeat.

    Returns:
      Rows of ``method``, ``examples``, ``rng_seed``, ``free_params``, ``train``, ``score`` and ``gap``.

    Raises:
      ValueError: bad input, ``recipe`` has ``patience``, or the tasks have other examples to train on than
        to validate on, as WSC has for a T5; or a run directory belongs to another run.
    """
    if recipe.patience is not None:
        raise ValueError(
            f"recipe: patience is {recipe.patience}, but runs are evaluated at their ends only; leave it out."
        )
    if "wsc" in data(sizes[0]).names and not language_model(model).decoder_only:
        raise ValueError(
            "a T5 is trained on the true candidates of WSC only, so its scores on training examples and on "
            "others cannot be compared; leave wsc out, or take a decoder-only model."
        )
    root, rows = require_local(run_dir, "run_dir"), []
    recipe = replace(recipe, eval_every=recipe.steps, score_train=True)
    for size in sizes:
        context = RunContext(
            str(root / str(size)),
            data(size),
            model,
            recipe,
            checkpoint=checkpoint,
            config=config,
            methods=methods.values(),
        )
        for name, method in methods.items():
            for rng_seed in rng_seeds:
                row = Run(context, name, method, rng_seed).result()
                score = row["score"] if row["test_score"] is None else row["test_score"]
                gap = row["train_score"] - score
                rows.append(
                    {
                        "method": name,
                        "examples": size,
                        "rng_seed": rng_seed,
                        "free_params": row["free_params"],
                        "train": row["train_score"],
                        "score": score,
                        "gap": gap,
                    }
                )
                storage.write_text(root / "regularisation.json", json.dumps(rows, indent=1))
        storage.write_text(root / "regularisation.md", markdown(rows))
    figures.save(figures.regularisation(rows), root / "regularisation.png")
    return rows


def synthetic(train_size: int, vocabulary: seqio.Vocabulary, names: Sequence[str]) -> SuperGlue:
    """Synthetic tasks with few training examples.

    Args:
      train_size: training examples of each task.
      vocabulary: of inputs and targets.
      names: tasks.
    """
    return SuperGlue(SyntheticSource(train_size=train_size), vocabulary, names)


def few(train_size: int, data: SuperGlue, label_noise: float = 0.0) -> SuperGlue:
    """Given tasks with few training examples, some of them with a wrong label.

    Args:
      train_size: training examples of each task.
      data: the tasks.
      label_noise: share of wrong labels; see :class:`~dst_optax.finetuning.tasks.superglue.sources.Few`.
    """
    return replace(data, source=Few(data.source, train_size, label_noise))


def markdown(rows: Sequence[Row]) -> str:
    """A table: training score, score on other examples, and the gap; means over random seeds.

    Args:
      rows: of :func:`regularisation`.

    Returns:
      Markdown.
    """
    lines = [
        "| examples | method | free parameters | training | others | gap |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for size, method in dict.fromkeys((r["examples"], r["method"]) for r in rows):
        same = [r for r in rows if (r["examples"], r["method"]) == (size, method)]
        free, train, score, gap = (
            float(np.mean([r[x] for r in same])) for x in ("free_params", "train", "score", "gap")
        )
        spread = f" ± {np.std([r['score'] for r in same], ddof=1):.1f}" if len(same) > 1 else ""
        lines.append(f"| {size} | {method} | {free:,.0f} | {train:.1f} | {score:.1f}{spread} | {gap:.1f} |")
    return "\n".join(lines) + "\n"
