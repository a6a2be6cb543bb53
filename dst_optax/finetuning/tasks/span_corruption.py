"""T5's pre-training task on plain text: spans are replaced by sentinels, and the model writes them.

References:
  Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*,
  arXiv 1910.10683.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import seqio
import tensorflow as tf

from dst_optax.finetuning.tasks import features
from dst_optax.finetuning.tasks.pairs import OneTask
from dst_optax.paths import as_path

FEATURES = ("inputs", "targets")


@dataclass(frozen=True)
class SpanCorruption(OneTask):
    """Span corruption of the text files of a directory, for a T5.

    The files are read in the order of their names, tokenised, joined and cut into chunks of equal size. What
    a chunk loses depends on the chunk and on the number of the corruption alone, so runs are reproducible.

    Attributes:
      directory: where ``*.txt`` lie, local or ``gs://``.
      vocabulary: of inputs and targets; its last ids are the sentinels.
      tokens: of a chunk, before its corruption.
      noise_density: share of them that is lost.
      mean_span: tokens of a lost span, on average.
      validation_size: chunks, the last ones, that are not trained on.
      corruptions: of each chunk; training that sees it more often repeats them.
    """

    tokens: int = 568
    noise_density: float = 0.15
    mean_span: float = 3.0
    validation_size: int = 64
    corruptions: int = 10

    name: ClassVar[str] = "span_corruption"

    @property
    def noise(self) -> tuple[int, int]:
        """Lost tokens of a chunk, and their spans.

        Raises:
          ValueError: nothing would be lost or kept, or there are not enough sentinels.
        """
        lost = round(self.tokens * self.noise_density)
        if not 0 < lost < self.tokens or self.mean_span < 1:
            raise ValueError(
                f"SpanCorruption: {lost} of {self.tokens} tokens would be lost in spans of {self.mean_span}; "
                "choose a noise_density that loses some and keeps some, and a mean_span of 1 or more."
            )
        spans = min(max(round(lost / self.mean_span), 1), self.tokens - lost)
        if spans > self.vocabulary.extra_ids:
            raise ValueError(
                f"SpanCorruption: a chunk loses {spans} spans, but {type(self.vocabulary).__name__} has only "
                f"{self.vocabulary.extra_ids} extra_ids to stand for them; make tokens fewer or spans longer."
            )
        return lost, spans

    def chunks(self, split: str) -> np.ndarray:
        """The chunks of a split, (chunks, tokens), int32.

        Raises:
          ValueError: there are no files, one is no UTF-8, or there is too little text.
        """
        every = self._every
        if not 0 < self.validation_size < len(every):
            raise ValueError(
                f"SpanCorruption: validation_size is {self.validation_size}, but {self.directory} has "
                f"{len(every)} chunks of {self.tokens} tokens; there must be more of them."
            )
        at = len(every) - self.validation_size
        return every[:at] if split == "train" else every[at:]

    def example(self, chunk: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one corruption of a chunk, int32, without their ends.

        Args:
          chunk: int32, (tokens,).
          number: of the corruption.
        """
        lost, spans = self.noise
        rng = np.random.default_rng([number, *chunk[:8].tolist()])
        sizes = np.stack([_parts(len(chunk) - lost, spans, rng), _parts(lost, spans, rng)], axis=1)
        pieces = np.split(chunk, np.cumsum(sizes.ravel())[:-1])
        sentinels = [np.array([self.vocabulary.vocab_size - 1 - i], np.int32) for i in range(spans)]
        inputs = [part for i, mark in enumerate(sentinels) for part in (pieces[2 * i], mark)]
        targets = [part for i, mark in enumerate(sentinels) for part in (mark, pieces[2 * i + 1])]
        return np.concatenate(inputs), np.concatenate(targets)

    def register(self, decoder_only: bool = False) -> str:
        """Reads the text, registers the task and names it.

        Raises:
          ValueError: the model is no encoder-decoder, or see :attr:`noise` and :meth:`chunks`.
        """
        if decoder_only:
            raise ValueError("SpanCorruption trains encoder-decoders such as T5; the model is decoder-only.")
        _ = self.noise
        _ = self.chunks("train")
        if self.name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(self.name)
        source: Any = seqio.FunctionDataSource(self._dataset, splits=("train", "validation"))
        seqio.TaskRegistry.add(
            self.name,
            source=source,
            preprocessors=[seqio.preprocessors.append_eos_after_trim],
            output_features=features.output_features(self.vocabulary, decoder_only),
            metric_fns=[],
            shuffle_buffer_size=1,  # the source shuffles
        )
        return self.name

    def check(self, target_length: int | None = None) -> str:
        """Refuses lengths that would cut the targets.

        Returns:
          A digest of the text's tokens.

        Raises:
          ValueError: says which lengths chunks need.
        """
        lost, spans = self.noise
        inputs, targets = self.tokens - lost + spans + 1, lost + spans + 1
        if target_length is not None and targets > target_length:
            raise ValueError(
                f"SpanCorruption: chunks of {self.tokens} tokens make {inputs} inputs and {targets} targets, "
                f"but targets have a length of {target_length}; set lengths to that, or make tokens fewer."
            )
        return hashlib.sha256(self._every.tobytes()).hexdigest()

    @property
    def settings(self) -> Mapping[str, Any]:
        """How chunks are made of the text and corrupted."""
        names = ("tokens", "noise_density", "mean_span", "validation_size", "corruptions")
        return {name: getattr(self, name) for name in names}

    def predicted_split(self, task: str) -> str:
        """The validation split."""
        del task
        return "validation"

    def score(self, measured: Mapping[str, Mapping[str, float]]) -> float:
        """The share of target tokens that are the likeliest ones, in percent."""
        return measured[self.name]["token_accuracy"]

    @cached_property
    def _every(self) -> np.ndarray:
        files = sorted(as_path(self.directory).glob("*.txt"))
        if not files:
            raise ValueError(f"SpanCorruption: {self.directory} has no *.txt.")
        ids: list[int] = []
        for file in files:
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: {error}") from error
            for line in text.splitlines(keepends=True):
                ids += self.vocabulary.encode(line)
        whole = len(ids) // self.tokens * self.tokens
        return np.array(ids[:whole], np.int32).reshape(-1, self.tokens)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        chunks = self.chunks(split)
        numbers = tf.data.Dataset.range(len(chunks) * (self.corruptions if split == "train" else 1))
        if shuffle_files:  # numbers, since it takes minutes to make all the examples that wait to be drawn
            numbers = numbers.shuffle(len(numbers), seed=seed)

        def make(i: int) -> tuple[np.ndarray, np.ndarray]:
            return self.example(chunks[i % len(chunks)], int(i) // len(chunks))

        def example(i: tf.Tensor) -> dict[str, tf.Tensor]:
            tensors = tf.numpy_function(make, [i], (tf.int32, tf.int32))
            return {name: tf.ensure_shape(ids, [None]) for name, ids in zip(FEATURES, tensors, strict=True)}

        def with_texts(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            texts = {
                f"{name}_pretokenized": tf.numpy_function(text, [example[name]], tf.string)
                for name in FEATURES
            }
            return example | {name: tf.ensure_shape(text, []) for name, text in texts.items()}

        def text(ids: np.ndarray) -> bytes:
            return self.vocabulary.decode(ids.tolist()).encode()

        examples = numbers.map(example)
        return examples if split == "train" else examples.map(with_texts)


def _parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes, none of them 0, of a random division."""
    cuts = 1 + np.sort(rng.choice(total - 1, parts - 1, replace=False))
    return np.diff([0, *cuts, total])
