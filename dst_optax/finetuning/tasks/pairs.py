"""Tasks of prompts and completions in JSONL files; subclasses say what a row means and what is right."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import seqio
import tensorflow as tf

from dst_optax.atomic import atomic_file
from dst_optax.finetuning import processes
from dst_optax.finetuning.inputs import EvalSplit
from dst_optax.finetuning.tasks import features
from dst_optax.finetuning.tasks.base import digest
from dst_optax.finetuning.tasks.rows import read_rows, version_of

SHUFFLE = 50_000  # at most so many examples wait to be drawn

Pair = tuple[str, str]


@dataclass(frozen=True)
class OneTask:
    """One task that is evaluated by decoding.

    Attributes:
      directory: where its files lie.
      vocabulary: of inputs and targets.
    """

    directory: str
    vocabulary: seqio.Vocabulary

    name: ClassVar[str]
    diagnostics: ClassVar[Sequence[str]] = ()
    evaluation: ClassVar[str] = "decode"
    token_metrics: ClassVar[bool] = True

    @property
    def source(self) -> str:
        """The directory."""
        return self.directory

    @property
    def names(self) -> Sequence[str]:
        """The one task."""
        return (self.name,)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Nothing that the rows do not show."""
        return {}

    def provider(self, task: str) -> str:
        """Name of the seqio task."""
        return task

    def options(self, split: EvalSplit, example: Mapping[str, Any]) -> Sequence[str]:
        """There are none: anything may be answered."""
        del split, example
        raise ValueError(f"{self.name} has no options to choose from; evaluate it by decoding.")

    def majority(self, split: str = "validation") -> float | None:
        """There is no most common answer."""
        del split
        return None

    def write(
        self,
        directory: str | Path,
        task: str,
        examples: Sequence[Mapping[str, Any]],
        predictions: Sequence[Any],
    ) -> Path:
        """Writes prompts, completions and predictions, a line of JSON each."""
        path = Path(directory) / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("w") as file:
            for example, said in zip(examples, predictions, strict=True):
                texts = {
                    "prompt": example["inputs_pretokenized"].decode(),
                    "completion": example["targets_pretokenized"].decode(),
                    "prediction": said,
                }
                file.write(json.dumps(texts, ensure_ascii=False) + "\n")
        return path


@dataclass(frozen=True)
class Pairs(OneTask, ABC):
    """One task of inputs and targets.

    Attributes:
      directory: where its files lie.
      vocabulary: of inputs and targets.
    """

    @abstractmethod
    def splits(self) -> Sequence[str]:
        """The splits that there are: train, validation and perhaps test."""

    @abstractmethod
    def pairs(self, split: str) -> Sequence[Pair]:
        """Inputs and targets of a split; raises a ValueError that names bad rows by file and line."""

    @abstractmethod
    def is_right(self, said: str, wanted: str) -> bool:
        """Whether a decoded text is the right answer where ``wanted`` is the target."""

    def register(self, decoder_only: bool = False) -> str:
        """Reads and checks the training data, registers the task and names it."""
        size = len(self.pairs("train"))
        if self.name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(self.name)
        source: Any = seqio.FunctionDataSource(self._dataset, splits=self.splits())
        seqio.TaskRegistry.add(
            self.name,
            source=source,
            preprocessors=features.preprocessors(self.vocabulary, decoder_only),
            output_features=features.output_features(self.vocabulary, decoder_only),
            postprocess_fn=_stripped,
            metric_fns=[self._exact_match],
            shuffle_buffer_size=min(size, SHUFFLE),
        )
        return self.name

    def check(self, target_length: int | None = None) -> str:
        """Reads every split; longer targets are counted later, and cut.

        Returns:
          A digest of all rows.

        Raises:
          ValueError: bad rows.
        """
        del target_length
        rows = {split: self.pairs(split) for split in self.splits()}
        for split in rows:
            completions = [completion for _, completion in rows[split]]
            changed = [x for x in completions if not self.is_right(self._spelled(x), x.strip())]
            if changed and processes.is_primary():
                print(
                    f"{self.name} {split}: {len(changed)} of {len(completions)} completions change when they "
                    "are encoded and decoded (special tokens are dropped), so no answer to them can count as "
                    "right: "
                    f"{changed[0]!r:.200} becomes {self._spelled(changed[0])!r:.200}.",
                    flush=True,
                )
            unknown = self.vocabulary.unk_id
            prompts = [prompt for prompt, _ in rows[split]] if unknown is not None else []
            odd = [prompt for prompt in prompts if unknown in self.vocabulary.encode(prompt)]
            if odd and processes.is_primary():
                print(
                    f"{self.name} {split}: {len(odd)} of {len(prompts)} prompts have characters that the "
                    f"vocabulary lacks: {odd[0]!r:.200} becomes {self._spelled(odd[0])!r:.200}.",
                    flush=True,
                )
            if (unread := self.unread(split)) and processes.is_primary():
                fields = ", ".join(f"{name!r} (in {count:,} rows)" for name, count in unread.items())
                print(f"{self.name} {split}: fields that are never read: {fields}.", flush=True)
        return digest(rows)

    def unread(self, split: str) -> Mapping[str, int]:
        """Fields of a split's rows that are not used, with the number of rows that have them."""
        del split
        return {}

    def _spelled(self, text: str) -> str:
        return self.vocabulary.decode(self.vocabulary.encode(text)).strip()

    def predicted_split(self, task: str) -> str:
        """The test split if there is one, else the validation split."""
        del task
        return "test" if "test" in self.splits() else "validation"

    def score(self, measured: Mapping[str, Mapping[str, float]]) -> float:
        """The share of exact matches, in percent."""
        return measured[self.name]["exact_match"]

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # the rows are in memory; seqio shuffles examples
        inputs, targets = zip(*self.pairs(split), strict=True)
        columns: Any = {"inputs": list(inputs), "targets": list(targets)}
        return tf.data.Dataset.from_tensor_slices(columns)

    def _exact_match(self, targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        right = [self.is_right(said, wanted) for wanted, said in zip(targets, predictions, strict=True)]
        return {"exact_match": 100 * sum(right) / len(right)}


def _stripped(text: str, example: Any = None, is_target: bool = False) -> str:
    del example, is_target
    return text.strip()


def read_pairs(path: Path, pair_of: Callable[[dict[str, Any]], Pair]) -> tuple[Pair, ...]:
    """The rows of a file of JSON lines, which is read again only after it has changed.

    Args:
      path: the file.
      pair_of: makes inputs and targets of a row, or raises a ValueError.

    Returns:
      Inputs and targets.

    Raises:
      ValueError: the file is missing or empty, or rows are bad: each is named by file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    return _read(path, pair_of, version_of(path))


@lru_cache(maxsize=16)
def _read(path: Path, pair_of: Callable[[dict[str, Any]], Pair], version: Any) -> tuple[Pair, ...]:
    del version
    return tuple(read_rows(path, lambda row, line: [_checked(pair_of(row))]))


def _checked(pair: Pair) -> Pair:
    for name, text in zip(("prompt", "completion"), pair, strict=True):
        if not text.strip():
            raise ValueError(f"the {name} is empty")
        text.encode()  # half of a surrogate pair is no text
    return pair


def text_field(row: Mapping[str, Any], name: str) -> str:
    """A field of a row that holds text.

    Raises:
      ValueError: it is missing or no text.

    Example:
      >>> text_field({"prompt": "Why?"}, "prompt")
      'Why?'
    """
    value = row.get(name)
    if not isinstance(value, str):
        fields = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{name!r} must be a text, got {value!r:.80}; the fields are {fields}")
    return value
