"""Scores and predictions of a model: decoding whole splits with one compiled program."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dst_optax.finetuning import inputs, placement
from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.models import t5
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue


class Evaluator:
    """Decodes splits in batches of one shape, so that decoding is compiled once.

    Args:
      network: the T5.
      data: tasks and vocabulary.
      recipe: lengths and batch size.
      mesh: devices.
    """

    def __init__(self, network: Any, data: SuperGlue, recipe: Recipe, mesh: Mesh):
        self._data, self._lengths = data, recipe.lengths
        self._batch_sharding = placement.batch_sharding(mesh)
        devices = mesh.shape["data"]
        self._batch_size = -(-recipe.eval_batch_size // devices) * devices
        self._splits: dict[tuple[str, str], inputs.EvalSplit] = {}
        self._decode = jax.jit(
            lambda params, tokens: t5.decode(network, params, tokens, recipe.lengths["targets"]),
            out_shardings=placement.replicated(mesh),
        )

    def split(self, task: str, split: str) -> inputs.EvalSplit:
        """A split, read once."""
        if (task, split) not in self._splits:
            name = self._data.provider(task)
            self._splits[task, split] = inputs.eval_split(name, split, self._lengths)
        return self._splits[task, split]

    def predict(self, params: Params, split: inputs.EvalSplit) -> list[Any]:
        """Predictions for every example of a split, in the task's own terms."""
        texts = []
        for at in range(0, len(split.tokens), self._batch_size):
            tokens = split.tokens[at : at + self._batch_size]
            short = self._batch_size - len(tokens)
            padded = np.concatenate([tokens, np.repeat(tokens[:1], short, 0)])
            decoded = np.asarray(self._decode(params, jax.device_put(padded, self._batch_sharding)))
            texts += [inputs.decode_text(self._data.vocabulary, row) for row in decoded[: len(tokens)]]
        return split.predictions(texts)

    def score(self, params: Params, split: str = "validation") -> tuple[dict[str, float], float]:
        """Metrics of all tasks on a split by name, and the one score."""
        metrics = {
            task: examples.metrics(self.predict(params, examples))
            for task in self._data.names
            for examples in [self.split(task, split)]
        }
        kind = "eval" if split == "validation" else split
        flat = {f"{kind}/{task}/{name}": x for task, values in metrics.items() for name, x in values.items()}
        return flat, self._data.score(metrics)

    def cuts(self) -> list[str]:
        """One line for every feature whose examples are cut."""
        lines = []
        for task in self._data.names:
            for split in ("train", "validation"):
                name = self._data.provider(task)
                for feature, (cut, longest) in inputs.count_cut(name, split, self._lengths).items():
                    if cut:
                        lines.append(
                            f"{task} {split}: {cut} examples have {feature} longer than "
                            f"{self._lengths[feature]} tokens and are cut; the longest has {longest}."
                        )
        return lines
