"""GSM8K: grade school mathematics in words, with worked answers.

References:
  Cobbe et al., *Training Verifiers to Solve Math Word Problems*, arXiv 2110.14168.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from dst_optax.finetuning.tasks.pairs import Pair, Pairs, read_pairs, text_field
from dst_optax.paths import as_path

MARK = "####"
NUMBER = re.compile(r"[-+]?\d*\.?\d+", re.ASCII)


@dataclass(frozen=True)
class Gsm8k(Pairs):
    """The official ``train.jsonl`` and ``test.jsonl``; the last rows of the former are for validation.

    An answer is right if the number after its ``####`` is that of the official answer.

    Attributes:
      directory: where the files lie, local or ``gs://``.
      vocabulary: of inputs and targets.
      validation_size: rows of ``train.jsonl`` that are not trained on.
    """

    validation_size: int = 500
    name: ClassVar[str] = "gsm8k"

    def splits(self) -> Sequence[str]:  # noqa: D102
        return ("train", "validation", "test")

    def pairs(self, split: str) -> Sequence[Pair]:  # noqa: D102
        file = as_path(self.directory) / ("test.jsonl" if split == "test" else "train.jsonl")
        pairs = read_pairs(file, _pair)
        if split == "test":
            return pairs
        if not 0 < self.validation_size < len(pairs):
            raise ValueError(
                f"Gsm8k: validation_size is {self.validation_size}, it must be from 1 to {len(pairs) - 1}, "
                f"since {file} has {len(pairs)} rows."
            )
        at = len(pairs) - self.validation_size
        return pairs[:at] if split == "train" else pairs[at:]

    def is_right(self, said: str, wanted: str) -> bool:  # noqa: D102
        return number(said) == number(wanted) != ""


def number(answer: str) -> str:
    r"""The number that an answer ends with, without a unit and needless zeros; empty if it names none.

    Example:
      >>> number("He pays 2*$600=$1200.\n#### 1,200"), number("#### 12.50%"), number("#### -$5")
      ('1200', '12.5', '-5')
    """
    _, mark, rest = answer.rpartition(MARK)
    words = rest.replace("$", "").replace(",", "").split()
    word = re.sub(r"\D+$", "", words[0]) if mark and words else ""
    return f"{Decimal(word).normalize() + 0:f}" if NUMBER.fullmatch(word) else word


def _pair(row: dict[str, Any]) -> Pair:
    question, answer = text_field(row, "question"), text_field(row, "answer")
    if not number(answer):
        raise ValueError(f"'answer' names no number after {MARK}, got {answer!r:.80}")
    return f"Question: {question}\nAnswer:", f" {answer}"
