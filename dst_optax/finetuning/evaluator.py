"""Scores and predictions of a model: decoding, or comparing options, with one compiled program each."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from jax.sharding import Mesh

from dst_optax.finetuning import inputs, placement
from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.models.base import LanguageModel
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.tasks.base import TaskSuite

LOOKED_AT = 20_000  # examples of a split, at most, whose lengths are counted before training


def target_scores(model: LanguageModel, params: Params, batch: inputs.Batch) -> dict[str, jax.Array]:
    """How likely the targets of a batch are.

    Args:
      model: what scores.
      params: its parameters.
      batch: of its feature converter.

    Returns:
      ``log_likelihood``, ``correct`` (targets that are the likeliest token) and ``tokens``, each
      ``(batch,)``, float32.
    """
    logits, targets = model.logits(params, batch), batch["decoder_target_tokens"]
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return {
        "log_likelihood": jnp.sum(chosen * weights, axis=1),
        "correct": jnp.sum(right * weights, axis=1),
        "tokens": jnp.sum(weights, axis=1),
    }


def option_tokens(vocabulary: seqio.Vocabulary, options: Sequence[str], length: int) -> list[list[int]]:
    """Options as tokens, with an end where one begins with another, which would always be likelier.

    Args:
      vocabulary: of targets.
      options: the texts to choose from.
      length: of targets.

    Raises:
      ValueError: an option is longer.

    Example:
      >>> [option_tokens(seqio.ByteVocabulary(), options, 3) for options in (["a", "b"], ["a", "ab"])]
      [[[100], [101]], [[100, 1], [100, 101, 1]]]
    """
    tokens = [list(vocabulary.encode(option)) for option in options]
    if any(len(a) < len(b) and a == b[: len(a)] for a in tokens for b in tokens):
        tokens = [[*each, vocabulary.eos_id] for each in tokens]
    for option, each in zip(options, tokens, strict=True):
        if len(each) > length:
            raise ValueError(
                f"recipe: the option {option!r} has {len(each)} tokens, but targets only {length}; make "
                "lengths longer."
            )
    return tokens


class Evaluator:
    """Evaluates splits in batches of one shape, so that each program is compiled once.

    Args:
      model: what is evaluated.
      data: tasks and vocabulary.
      recipe: lengths and batch size.
      mesh: devices.
    """

    def __init__(self, model: LanguageModel, data: TaskSuite, recipe: Recipe, mesh: Mesh):
        self._model, self._data, self._lengths = model, data, recipe.lengths
        self._batch_sharding = placement.batch_sharding(mesh)
        devices = mesh.shape["data"]
        self._batch_size = -(-recipe.eval_batch_size // devices) * devices
        self._splits: dict[tuple[str, str], inputs.EvalSplit] = {}
        self._options = functools.cache(self._read_options)
        self._decode = jax.jit(
            lambda params, batch: model.decode(params, batch, data.vocabulary, recipe.lengths["targets"]),
            out_shardings=placement.replicated(mesh),
        )
        self._scores = jax.jit(partial(target_scores, model), out_shardings=placement.replicated(mesh))

    def split(self, task: str, split: str) -> inputs.EvalSplit:
        """A split, read once."""
        if (task, split) not in self._splits:
            name = self._data.provider(task)
            self._splits[task, split] = inputs.eval_split(self._model, name, split, self._lengths)
        return self._splits[task, split]

    def predict(self, params: Params, split: inputs.EvalSplit) -> list[Any]:
        """Predictions for every example of a split, in the task's own terms."""
        if self._data.evaluation == "options":
            return self._likeliest_options(params, split)[0]
        decoded = self._in_batches(self._decode, params, split.batch)
        return split.predictions([self._model.text(self._data.vocabulary, row) for row in decoded.tolist()])

    def score(self, params: Params, split: str = "validation") -> tuple[dict[str, float], float]:
        """Metrics of all tasks on a split by name, and the one score."""
        metrics = {task: self._metrics(params, self.split(task, split)) for task in self._data.names}
        kind = "eval" if split == "validation" else split
        flat = {f"{kind}/{task}/{name}": x for task, values in metrics.items() for name, x in values.items()}
        return flat, self._data.score(metrics)

    @property
    def tests(self) -> bool:
        """Whether the test split of every task has labels; those of the official ones have none."""
        names = self._data.names
        return all(
            self._data.predicted_split(name) == "test" and self.split(name, "test").labelled for name in names
        )

    def _metrics(self, params: Params, split: inputs.EvalSplit) -> dict[str, float]:
        if self._data.evaluation == "options":
            likeliest, normalised = self._likeliest_options(params, split)
            of_normalised = {f"{name}_normalised": x for name, x in split.metrics(normalised).items()}
            return split.metrics(likeliest) | of_normalised
        metrics = split.metrics(self.predict(params, split))
        if self._data.token_metrics:
            totals = {k: float(x.sum()) for k, x in self._target_scores(params, split.batch).items()}
            metrics["token_accuracy"] = 100 * totals["correct"] / totals["tokens"]
            metrics["perplexity"] = float(np.exp(-totals["log_likelihood"] / totals["tokens"]))
        return metrics

    def _likeliest_options(self, params: Params, split: inputs.EvalSplit) -> tuple[list[Any], list[Any]]:
        """Predictions by the log-likelihood of each option, and by that divided by the option's bytes."""
        options, batch = self._options(split)
        scores = iter(self._target_scores(params, batch)["log_likelihood"].tolist())
        likeliest, normalised = [], []
        for example, each in zip(split.examples, options, strict=True):
            log_likelihoods = np.array([next(scores) for _ in each])
            sizes = np.array([len(option.encode()) for option in each])
            for chosen, values in ((likeliest, log_likelihoods), (normalised, log_likelihoods / sizes)):
                chosen.append(split.prediction(each[int(values.argmax())], example))
        return likeliest, normalised

    def _read_options(self, split: inputs.EvalSplit) -> tuple[list[Sequence[str]], inputs.Batch]:
        """The options of each example, and a batch of all of them, each after its inputs."""
        options = [self._data.options(split, example) for example in split.examples]
        pairs = [
            (example["inputs"], tokens)
            for example, each in zip(split.examples, options, strict=True)
            for tokens in option_tokens(self._data.vocabulary, each, self._lengths["targets"])
        ]
        return options, inputs.batch_of(self._model, pairs, self._lengths)

    def _target_scores(self, params: Params, batch: inputs.Batch) -> dict[str, np.ndarray]:
        return self._in_batches(self._scores, params, batch)

    def _in_batches(self, function: Callable[..., Any], params: Params, batch: inputs.Batch) -> Any:
        """What a function makes of the rows of a batch, on the host; a short last part is filled up."""
        rows, parts = len(next(iter(batch.values()))), []
        for at in range(0, rows, self._batch_size):
            taken = np.arange(at, at + self._batch_size)
            part = {name: x[np.where(taken < rows, taken, at)] for name, x in batch.items()}
            outputs = function(params, jax.device_put(part, self._batch_sharding))
            parts.append(jax.tree.map(lambda x, at=at: np.asarray(x)[: rows - at], outputs))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def cuts(self, most: int = LOOKED_AT) -> list[str]:
        """What is cut: one line for every feature of a split, of its first ``most`` examples."""
        lines = []
        for task in self._data.names:
            for split in ("train", "validation"):
                name = self._data.provider(task)
                seen, by_feature = inputs.count_cut(self._model, name, split, self._lengths, most)
                first = f" of the first {most:,}" if seen == most else ""
                lines += [
                    f"{task} {split}: {cut}{first} examples have {feature} longer than "
                    f"{self._lengths[feature]} tokens and are cut; the longest has {longest}."
                    for feature, (cut, longest) in by_feature.items()
                    if cut or first
                ]
        return lines
