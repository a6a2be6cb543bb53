"""Your own data: prompts and completions, or conversations, in JSONL files."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dst_optax.finetuning.tasks.pairs import Pair, Pairs, read_pairs, text_field
from dst_optax.finetuning.tasks.rows import read_rows
from dst_optax.paths import as_path

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Jsonl(Pairs):
    """``train.jsonl`` and ``validation.jsonl``, and ``test.jsonl`` if there is one.

    A row is an object with a prompt and a completion, or one with messages, ``{"role": ..., "content":
    ...}``, of which the last is learned in the words of the model's chat template. The completion follows
    the prompt as it is: a space between them must stand in one of them.

    Attributes:
      directory: where the files lie, local or ``gs://``.
      vocabulary: of inputs and targets.
      prompt: name of the field of prompts.
      completion: name of the field of completions.
      messages: name of the field of messages; of rows that have it no others are read.

    Example:
      >>> import pathlib, tempfile
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> for split in ("train", "validation"):
      ...     _ = (directory / f"{split}.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}')
      >>> import seqio
      >>> Jsonl(str(directory), seqio.ByteVocabulary()).pairs("train")
      (('1+1=', '2'),)
    """

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    name: ClassVar[str] = "jsonl"

    def splits(self) -> Sequence[str]:  # noqa: D102
        has_test = (as_path(self.directory) / "test.jsonl").is_file()
        return SPLITS if has_test else SPLITS[:2]

    def pairs(self, split: str) -> Sequence[Pair]:  # noqa: D102
        return read_pairs(as_path(self.directory) / f"{split}.jsonl", self._pair)

    def is_right(self, said: str, wanted: str) -> bool:  # noqa: D102
        return said == wanted

    def unread(self, split: str) -> Mapping[str, int]:  # noqa: D102
        def fields(row: dict[str, Any], line: int) -> list[list[str]]:
            used = {self.messages} if self.messages in row else {self.prompt, self.completion}
            return [[name for name in row if name not in used]]

        rows = read_rows(as_path(self.directory) / f"{split}.jsonl", fields)
        return Counter(itertools.chain.from_iterable(rows))

    def _pair(self, row: dict[str, Any]) -> Pair:
        if self.messages not in row:
            return text_field(row, self.prompt), text_field(row, self.completion)
        if row.get("tools"):
            raise ValueError("'tools' are not given to the chat template; leave the field out")
        messages = row[self.messages]
        well_formed = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not well_formed or len(messages) < 2:
            raise ValueError(f"{self.messages!r} must be a list of two objects or more, got {messages!r:.80}")
        for message in messages:
            for name in ("role", "content"):
                text_field(message, name)
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"the last of {self.messages!r} is of {messages[-1]['role']!r}, not of 'assistant'"
            )
        chat = getattr(self.vocabulary, "chat", None)
        if chat is None:
            raise ValueError(
                f"{type(self.vocabulary).__name__} has no chat template; give prompts and completions"
            )
        return chat(messages)
