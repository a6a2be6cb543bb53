"""Where SuperGLUE rows come from: the official files, TFDS, or the built-in synthetic stand-in.

:class:`HeldOut` keeps the official validation split for reporting; :class:`Few` makes training data scarce
and its labels wrong.

A source answers ``rows(task, split)`` with flat rows (:mod:`dst_optax.finetuning.tasks.superglue.benchmark`).
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dst_optax.finetuning.tasks.rows import read_rows, version_of
from dst_optax.finetuning.tasks.superglue import synthetic
from dst_optax.finetuning.tasks.superglue.benchmark import flatten, spec
from dst_optax.finetuning.tasks.superglue.text import to_text
from dst_optax.paths import as_path

FILES = {"train": "train", "validation": "val", "test": "test"}


class Source(Protocol):
    """Anything that has rows."""

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """All flat rows of a split, in order."""
        ...


@dataclass(frozen=True)
class JsonlSource:
    """The directory that the official archives unpack to: ``<directory>/<TASK>/{train,val,test}.jsonl``.

    Attributes:
      directory: the directory that holds ``BoolQ``, ``CB``, and so on, local or ``gs://``.
    """

    directory: str

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Reads and checks a file; again only after it has changed.

        Raises:
          ValueError: the file is missing or empty, or rows are bad: each is named by file and line.
        """
        path = self._path(task, split)
        return _read(path, task, split, version_of(path))

    def _path(self, task: str, split: str) -> Path:
        task_spec = spec(task)
        if split not in task_spec.splits:
            raise ValueError(
                f"SuperGLUE's {task} has no split {split!r}, only {', '.join(task_spec.splits)}."
            )
        root = as_path(self.directory) / task_spec.directory
        names = [f"{FILES[split]}.jsonl"] + [f"{task_spec.directory}.jsonl"] * (task_spec.splits == ("test",))
        for name in names:
            if (root / name).is_file():
                return root / name
        raise ValueError(
            f"{root / names[-1]} does not exist; download the {task_spec.directory} archive from "
            f"https://super.gluebenchmark.com/tasks and unpack it into {self.directory}."
        )


@lru_cache(maxsize=64)
def _read(path: Path, task: str, split: str, version: Any) -> list[dict[str, Any]]:
    del version  # another one is read anew
    lines: dict[str, int] = {}  # where an index was read first

    def parse(row: Any, number: int) -> list[dict[str, Any]]:
        flat = flatten(task, row, labelled=split != "test")
        for example in flat:
            for text in (*to_text(task, example), *example.get("answers", ())):
                text.encode()  # half of a surrogate pair is no text
            index = str(example["idx"])
            if index in lines and split != "train":  # predictions and groups go by it
                raise ValueError(f"the index {index} is already that of line {lines[index]}")
            lines[index] = number
        return flat

    return read_rows(path, parse)


@dataclass(frozen=True)
class TfdsSource:
    """The ``super_glue`` datasets of TensorFlow Datasets.

    Attributes:
      data_dir: where TFDS keeps its data; None for its default.
      version: of the datasets; empty for the newest.
    """

    data_dir: str | None = None
    version: str = ""

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Downloads the data if need be and reads a split."""
        import tensorflow_datasets as tfds

        name = "wsc.fixed" if task == "wsc" else task
        version = f":{self.version}" if self.version else ""
        data = tfds.data_source(
            f"super_glue/{name}{version}", split=split, data_dir=self.data_dir, try_gcs=False
        )
        return [_plain(row) for row in data]


def _plain(value: Any) -> Any:
    """TFDS's numpy values as Python values."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.decode("utf-8") if isinstance(value, bytes) else value


@dataclass(frozen=True)
class SyntheticSource:
    """Made-up rows, see :mod:`dst_optax.finetuning.tasks.superglue.synthetic`.

    Attributes:
      seed: another seed makes other rows.
      train_size: rows of each training split.
    """

    seed: int = 0
    train_size: int = synthetic.SIZES["train"]

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Makes a split."""
        official = synthetic.rows(task, split, self.seed, self.train_size)
        return [flat for row in official for flat in flatten(task, row, labelled=True)]


@dataclass(frozen=True)
class HeldOut:
    """Validates on a part of the training rows, so that nothing is chosen on the split that is reported.

    Some rows of the training split become the validation split, and the official validation split, whose
    labels are public, becomes the test split. Rows about one text stay together, MultiRC's of a paragraph and
    ReCoRD's of a passage: there a few more than ``size`` may be held out. Predictions of a test split that
    is none of the leaderboard's are named after the official one, ``RTE_validation.jsonl``.

    Attributes:
      source: the official splits.
      size: training rows that are held out.
      rng_seed: draws them; None takes the last ones. Official files are not shuffled: the last 50 rows of CB
        hold half of its rarest class.

    Example:
      >>> held_out = HeldOut(SyntheticSource(train_size=50), size=10)
      >>> [len(held_out.rows("cb", split)) for split in ("train", "validation")]
      [40, 10]
      >>> held_out.rows("cb", "test") == SyntheticSource(train_size=50).rows("cb", "validation")
      True
    """

    source: Source
    size: int
    rng_seed: int | None = None

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Rows of a split.

        Raises:
          ValueError: as the source does, or the training split is not larger than ``size``.
        """
        if "train" not in spec(task).splits:
            return self.source.rows(task, split)
        if split == "test":
            return self.source.rows(task, "validation")
        rows = self.source.rows(task, "train")
        if not 0 < self.size < len(rows):
            raise ValueError(
                f"{task}: {self.size} of {len(rows)} training rows cannot be held out; hold out from 1 to "
                f"{len(rows) - 1}."
            )
        text_of = [_text_of(row["idx"], i) for i, row in enumerate(rows)]
        texts = list(dict.fromkeys(text_of))
        order = range(len(texts))[::-1]
        if self.rng_seed is not None:
            order = np.random.default_rng(self.rng_seed).permutation(len(texts))
        sizes, held_out, count = Counter(text_of), set(), 0
        for i in order:
            if count >= self.size:
                break
            held_out.add(texts[i])
            count += sizes[texts[i]]
        if count == len(rows):
            raise ValueError(f"{task}: all training rows are about the texts that would be held out.")
        return [
            row for row, text in zip(rows, text_of, strict=True) if (text in held_out) == (split != "train")
        ]


def official_split(source: Source, task: str) -> str:
    """Which official split a source's test split is.

    Example:
      >>> official_split(HeldOut(SyntheticSource(), size=10), "rte"), official_split(SyntheticSource(), "rte")
      ('validation', 'test')
    """
    while isinstance(source, Few):
        source = source.source
    return "validation" if isinstance(source, HeldOut) and "train" in spec(task).splits else "test"


def _text_of(index: Any, row: int) -> int:
    """Which text a row is about: MultiRC's paragraph, ReCoRD's passage; elsewhere each has one of its own."""
    return index["paragraph" if "paragraph" in index else "passage"] if isinstance(index, dict) else row


@dataclass(frozen=True)
class Few:
    """Few training rows, some of them with a wrong label.

    Rows are drawn without replacement, and a smaller number of them is the beginning of a larger one. A wrong
    label is any other of the task's labels. The other splits stay as they are.

    Attributes:
      source: of all rows.
      size: training rows.
      label_noise: share of them whose label is wrong, rounded to whole rows.
      rng_seed: of the draw and of the wrong labels.

    Example:
      >>> few = Few(SyntheticSource(train_size=50), size=8, label_noise=0.25)
      >>> clean = Few(SyntheticSource(train_size=50), size=8)
      >>> rows = zip(few.rows("cb", "train"), clean.rows("cb", "train"), strict=True)
      >>> sum(a["label"] != b["label"] for a, b in rows)
      2
    """

    source: Source
    size: int
    label_noise: float = 0.0
    rng_seed: int = 0

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Rows of a split.

        Raises:
          ValueError: as the source does; the training split has fewer than ``size`` rows; or the noise is
            no share, or the task has no labels to be wrong.
        """
        rows = self.source.rows(task, split)
        if split != "train":
            return rows
        if not 0 < self.size <= len(rows):
            raise ValueError(f"{task}: {self.size} training rows were asked for; ask for 1 to {len(rows)}.")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"{task}: label_noise is {self.label_noise}; it must be from 0 to 1.")
        labels = len(spec(task).labels)
        if self.label_noise and not labels:
            raise ValueError(f"{task} has no labels that could be wrong; set label_noise to 0.")
        rng = np.random.default_rng(self.rng_seed)
        few = [dict(rows[i]) for i in rng.permutation(len(rows))[: self.size]]
        for i in rng.permutation(self.size)[: round(self.label_noise * self.size)]:
            few[i]["label"] = (few[i]["label"] + int(rng.integers(1, labels))) % labels
        return few
