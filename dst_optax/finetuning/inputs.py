"""From seqio to arrays: batches to train on, whole splits to evaluate on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import seqio

Lengths = Mapping[str, int]
Batch = dict[str, np.ndarray]
EOS = 1


def train_batches(name: str, lengths: Lengths, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """An endless, reproducible stream of batches.

    Args:
      name: registered seqio task or mixture.
      lengths: tokens of ``inputs`` and ``targets``; longer ones are cut.
      batch_size: examples a batch.
      seed: of the order.
      start: batches to leave out, for a run that goes on.

    Yields:
      int32 arrays ``encoder_input_tokens``, ``decoder_input_tokens``, ``decoder_target_tokens``,
      (batch, length), and ``decoder_loss_weights``.
    """
    data = seqio.get_dataset(
        name,
        task_feature_lengths=dict(lengths),
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=seed,
        verbose=False,
    )
    batches = data.batch(batch_size, drop_remainder=True).skip(start).prefetch(2)
    return iter(batches.as_numpy_iterator())


@dataclass(frozen=True)
class EvalSplit:
    """One split of a task, ready to decode.

    Attributes:
      provider: the seqio task.
      examples: as the task yields them.
      tokens: encoder input tokens, (examples, length) int32, padded with 0.
    """

    provider: Any
    examples: list[dict[str, Any]]
    tokens: np.ndarray

    @property
    def labelled(self) -> bool:
        """Whether the answers are known; those of official test splits are not."""
        return all(len(e["answers"]) if "answers" in e else e["label"] >= 0 for e in self.examples)

    def predictions(self, texts: list[str]) -> list[Any]:
        """What the decoded texts say, in the task's own terms."""
        post = self.provider.postprocess_fn
        return [post(text, example=e, is_target=False) for text, e in zip(texts, self.examples, strict=True)]

    def metrics(self, predictions: list[Any]) -> dict[str, float]:
        """The task's metrics of these predictions."""
        post = self.provider.postprocess_fn
        targets = [post(e["targets_pretokenized"].decode(), example=e, is_target=True) for e in self.examples]
        out: dict[str, float] = {}
        for metric in self.provider.metric_fns:
            out |= metric(targets, predictions)
        return out


def eval_split(name: str, split: str, lengths: Lengths) -> EvalSplit:
    """Reads a split.

    Args:
      name: registered seqio task.
      split: e.g. "validation".
      lengths: see :func:`train_batches`.

    Returns:
      The split.
    """
    provider = seqio.TaskRegistry.get(name)
    data = provider.get_dataset(dict(lengths), split=split, shuffle=False, num_epochs=1)
    examples = list(data.as_numpy_iterator())
    tokens = np.zeros((len(examples), lengths["inputs"]), np.int32)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example["inputs"])] = example["inputs"]
    return EvalSplit(provider, examples, tokens)


def count_cut(name: str, split: str, lengths: Lengths) -> dict[str, tuple[int, int]]:
    """How many examples are longer than the feature lengths.

    Args:
      name: registered seqio task.
      split: e.g. "train".
      lengths: see :func:`train_batches`.

    Returns:
      For each feature: examples that are cut, and the longest one's tokens.
    """
    provider = seqio.TaskRegistry.get(name)
    data = provider.get_dataset(None, split=split, shuffle=False, num_epochs=1)
    sizes = {feature: [] for feature in lengths}
    for example in data.as_numpy_iterator():
        for feature, known in sizes.items():
            known.append(len(example[feature]))
    return {
        feature: (sum(n > lengths[feature] for n in known), max(known)) for feature, known in sizes.items()
    }


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch that are no padding, on both sides."""
    return sum(int(np.count_nonzero(batch[f"{side}_tokens"])) for side in ("encoder_input", "decoder_target"))


def decode_text(vocabulary: seqio.Vocabulary, tokens: np.ndarray) -> str:
    """The text of decoded tokens, up to the end mark.

    Example:
      >>> decode_text(seqio.ByteVocabulary(), np.array([100, 101, 1, 0, 0]))
      'ab'
    """
    ids = tokens.tolist()
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return vocabulary.decode([i for i in ids if i != 0])
