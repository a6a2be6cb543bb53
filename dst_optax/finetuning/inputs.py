"""From seqio to arrays: batches to train on, whole splits to evaluate on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from dst_optax.finetuning.models.base import LanguageModel

Lengths = Mapping[str, int]
Batch = dict[str, np.ndarray]


def train_batches(
    model: LanguageModel, name: str, lengths: Lengths, batch_size: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """An endless, reproducible stream of batches.

    Args:
      model: what the batches are for.
      name: registered seqio task or mixture.
      lengths: tokens of ``inputs`` and ``targets``; longer ones are cut.
      batch_size: examples a batch.
      seed: of the order.
      start: batches to leave out, for a run that goes on.

    Yields:
      int32 arrays by the names of the model's feature converter, ``(batch, length)``.
    """
    data = seqio.get_dataset(
        name,
        task_feature_lengths=dict(lengths),
        feature_converter=model.feature_converter(),
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=seed,
        verbose=False,
    )
    batches = data.batch(batch_size, drop_remainder=True).skip(start).prefetch(2)
    for batch in _iterate(batches):
        _check_ids(model, batch, f"a batch of {name}")
        yield batch


def _iterate(data: tf.data.Dataset) -> Iterator[Any]:
    """The dataset's elements as numpy has them.

    The pipeline is not tuned while it is read: the thread that does so sleeps longer and longer, up to a
    minute, and whoever drops the iterator waits for it.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return iter(data.with_options(options).as_numpy_iterator())


@dataclass(frozen=True, eq=False)
class EvalSplit:
    """One split of a task, ready to decode.

    Attributes:
      provider: the seqio task.
      examples: as the task yields them.
      batch: what the model takes of all examples.
    """

    provider: Any
    examples: list[dict[str, Any]]
    batch: Batch

    @property
    def labelled(self) -> bool:
        """Whether the answers are known; those of official test splits are not."""
        return all(len(e["answers"]) if "answers" in e else e.get("label", 0) >= 0 for e in self.examples)

    def predictions(self, texts: list[str]) -> list[Any]:
        """What a text for each example says, in the task's own terms."""
        return [self.prediction(text, e) for text, e in zip(texts, self.examples, strict=True)]

    def prediction(self, text: str, example: Mapping[str, Any]) -> Any:
        """What one text says of an example."""
        return self.provider.postprocess_fn(text, example=example, is_target=False)

    def metrics(self, predictions: list[Any]) -> dict[str, float]:
        """The task's metrics of these predictions."""
        if not self.provider.metric_fns:  # the examples may have no texts
            return {}
        post = self.provider.postprocess_fn
        targets = [post(e["targets_pretokenized"].decode(), example=e, is_target=True) for e in self.examples]
        out: dict[str, float] = {}
        for metric in self.provider.metric_fns:
            out |= metric(targets, predictions)
        return out


def eval_split(model: LanguageModel, name: str, split: str, lengths: Lengths) -> EvalSplit:
    """Reads a split.

    Args:
      model: what it is for.
      name: registered seqio task.
      split: e.g. "validation".
      lengths: see :func:`train_batches`.

    Returns:
      The split.
    """
    provider = seqio.TaskRegistry.get(name)
    data = provider.get_dataset(dict(lengths), split=split, shuffle=False, num_epochs=1)
    examples = list(_iterate(data))
    pairs = [(example["inputs"], example["targets"]) for example in examples]
    return EvalSplit(provider, examples, batch_of(model, pairs, lengths))


def batch_of(
    model: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], lengths: Lengths
) -> Batch:
    """What a model takes of inputs and targets.

    Args:
      model: what the batch is for.
      pairs: inputs and targets, as token ids.
      lengths: at least those of the longest inputs and targets.

    Returns:
      One batch of all pairs; see :func:`train_batches`.
    """

    def examples() -> Iterator[dict[str, np.ndarray]]:
        for inputs, targets in pairs:
            yield {"inputs": np.asarray(inputs, np.int32), "targets": np.asarray(targets, np.int32)}

    ids = tf.TensorSpec([None], tf.int32)
    data = tf.data.Dataset.from_generator(examples, output_signature={"inputs": ids, "targets": ids})
    rows = list(_iterate(model.feature_converter()(data, dict(lengths))))
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    _check_ids(model, batch, "an example to evaluate on")
    return batch


def _check_ids(model: LanguageModel, features: Mapping[str, np.ndarray], where: str) -> None:
    """Raises a ValueError for a token that the model has no embedding for: jax would make NaN of it."""
    size = model.config.vocab_size
    for name, ids in features.items():
        if name.endswith("tokens") and ids.size and ids.max() >= size:
            raise ValueError(
                f"{where} has the token {ids.max()}, and the model's embedding only {size} rows: it was "
                "added to the tokenizer alone. Take it out of the texts, or give the model rows for it."
            )


def count_cut(
    model: LanguageModel, name: str, split: str, lengths: Lengths, most: int
) -> tuple[int, dict[str, tuple[int, int]]]:
    """How many examples are longer than the feature lengths.

    Args:
      model: what they are for.
      name: registered seqio task.
      split: e.g. "train".
      lengths: see :func:`train_batches`.
      most: examples to look at, the first ones.

    Returns:
      Examples that were looked at, and for each feature: those that are cut, and the longest one's tokens.

    Raises:
      ValueError: a token that the model has no embedding for.
    """
    provider = seqio.TaskRegistry.get(name)
    data = provider.get_dataset(None, split=split, shuffle=False, num_epochs=1).take(most)
    sizes = []
    for i, example in enumerate(_iterate(data)):
        tokens = {f"{feature}_tokens": example[feature] for feature in lengths}
        _check_ids(model, tokens, f"{name} {split}: example {i}, counted from 0,")
        sizes.append([len(example[feature]) for feature in lengths])
    by_feature = dict(zip(lengths, zip(*sizes, strict=True), strict=True))
    return len(sizes), {
        feature: (sum(n > lengths[feature] for n in counts), max(counts))
        for feature, counts in by_feature.items()
    }


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch that are no padding, inputs and targets."""
    if "encoder_input_tokens" in batch:
        inputs = np.count_nonzero(batch["encoder_input_tokens"])
    else:
        inputs = (batch["decoder_target_indices"][:, 0] + 1).sum()
    return int(inputs) + int(np.count_nonzero(batch["decoder_loss_weights"]))
