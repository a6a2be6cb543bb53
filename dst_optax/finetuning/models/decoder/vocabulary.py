"""A model's own tokenizer as a seqio vocabulary."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from dst_optax.finetuning import hub

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


class HuggingFaceVocabulary(seqio.Vocabulary):
    """Text as the ids of a ``tokenizer.json``; what ends a text is what the model's configuration says.

    Encoding adds no special tokens. Id 0 may be a token like any other: padding is told by lengths.

    Attributes:
      prefix_ids: what the tokenizer puts before every text, e.g. the id of ``<bos>``; may be empty.
      eos_ids: ids that end a text.
      pieces: ids of all pieces, added ones too.

    Args:
      directory: of a checkpoint: ``tokenizer.json`` with ``generation_config.json`` or ``config.json``, and
        ``tokenizer_config.json`` if there is one.

    Raises:
      ValueError: files are missing or damaged, or no end of text is named.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        if directory is None:
            raise ValueError("the vocabulary has no directory: give CHECKPOINT, after the gin files.")
        self._directory = Path(hub.local_path(os.fspath(directory)))
        self._tokenizer = _tokenizer(self._directory)
        self._settings = _json(self._directory / "tokenizer_config.json")
        self.eos_ids = self._ends()
        self.prefix_ids = self._prefix()
        self.pieces: Mapping[str, int] = self._tokenizer.get_vocab()
        pieces = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self._size = 1 + max(*pieces, *self.eos_ids, *self.prefix_ids)
        super().__init__()

    def __repr__(self) -> str:
        return f"HuggingFaceVocabulary({str(self._directory)!r})"

    @property
    def eos_id(self) -> int:
        """The id that ends what is trained on: the tokenizer's own, if the model knows several."""
        own = self._id(self._settings.get("eos_token"))
        return own if own in self.eos_ids else self.eos_ids[0]

    @property
    def bos_id(self) -> int | None:
        """The first of ``prefix_ids``."""
        return self.prefix_ids[0] if self.prefix_ids else None

    @property
    def unk_id(self) -> None:
        """None: bytes have no unknown pieces."""

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: tf.Tensor) -> Any:
            return tf.constant(self._encode(tf.compat.as_text(text.numpy())), tf.int32)

        ids = tf.py_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        text = tf.py_function(lambda x: self._decode(x.numpy().tolist()), [ids], tf.string)
        text.set_shape([])
        return text

    def decode_until_end(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, up to the first of ``eos_ids``.

        Args:
          ids: tokens, not padded with anything but what ends a text.

        Returns:
          Text without special tokens.
        """
        ends = [i for i, token in enumerate(ids) if token in self.eos_ids]
        return self._decode(ids[: ends[0]] if ends else ids)

    def check_same(self, directory: str | os.PathLike[str]) -> None:
        """Raises a ValueError if a checkpoint comes with another tokenizer than this one.

        Args:
          directory: of the checkpoint; without a tokenizer nothing is known, and nothing is said.
        """
        if not (Path(directory) / TOKENIZER).is_file():
            return
        other = HuggingFaceVocabulary(directory)
        ours, theirs = self.pieces, other.pieces
        differ = sorted(
            piece for piece in ours.keys() | theirs.keys() if ours.get(piece) != theirs.get(piece)
        )
        if differ:
            raise ValueError(
                f"{self!r} is not the tokenizer of {directory}: {len(differ)} pieces differ, for example "
                f"{differ[0]!r} is {ours.get(differ[0])} and there {theirs.get(differ[0])}."
            )
        if set(self.eos_ids) != set(other.eos_ids):
            raise ValueError(
                f"{self!r} ends texts with {list(self.eos_ids)}, {directory} with {list(other.eos_ids)}; "
                "take the tokenizer and the settings of the checkpoint."
            )
        for part in ("normalizer", "pre_tokenizer", "model"):
            if self._described[part] != other._described[part]:
                raise ValueError(
                    f"{self!r} has another {part} than the tokenizer of {directory}; take that one."
                )
        if self.prefix_ids != other.prefix_ids:
            raise ValueError(
                f"{self!r} begins texts with {list(self.prefix_ids)}, {directory} with "
                f"{list(other.prefix_ids)}; take the tokenizer of the checkpoint."
            )

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """A conversation in the words of the model's chat template.

        Args:
          messages: ``{"role": ..., "content": ...}``, the last of them to be learned.

        Returns:
          What the model is given, and what it shall answer, without the end of text.

        Raises:
          ValueError: there is no template, it refuses the messages or leaves words of them out, or what it
            makes of them does not begin with what it makes of all but the last.
        """
        given = self._template(messages[:-1], add_generation_prompt=True)
        whole = self._template(messages)
        if not messages or not whole.startswith(given):
            raise ValueError("the chat template words earlier messages anew when an answer is added.")
        ends = [x.content for x in self._tokenizer.get_added_tokens_decoder().values() if x.special]
        ends += [self._tokenizer.id_to_token(i) for i in self.eos_ids]
        answer = whole[len(given) :].rstrip()
        while end := next((x for x in ends if answer.endswith(x)), ""):
            answer = answer.removesuffix(end).rstrip()
        # of earlier answers templates leave reasoning out, as the model is used to
        asked = [(given, message) for message in messages[:-1] if message["role"] != "assistant"]
        for text, message in [*asked, (answer, messages[-1])]:
            if "".join(message["content"].split()) not in "".join(text.split()):
                raise ValueError(
                    f"the chat template leaves out words of a message of {message['role']!r}, "
                    f"{message['content']!r:.80}; give prompts and completions that are worded already."
                )
        return given, answer

    @cached_property
    def identity(self) -> Sequence[Any]:
        """All that says how texts become tokens and where they end, as values of JSON."""
        return [self._described, self.eos_ids, self.eos_id, self.prefix_ids]

    @cached_property
    def _described(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    @cached_property
    def _template(self) -> Any:
        file, text = self._directory / CHAT_TEMPLATE, self._settings.get("chat_template")
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        elif isinstance(text, list):  # several, by name
            text = {each["name"]: each["template"] for each in text}.get("default")
        if not isinstance(text, str):
            raise ValueError(f"{self._directory} has no chat template; give prompts and completions.")
        try:
            from dst_optax.finetuning.models.decoder.chat_template import ChatTemplate
        except ModuleNotFoundError as e:
            raise ValueError("chat templates need jinja2: pip install 'dst-optax[hub]'.") from e
        tokens = _json(self._directory / "special_tokens_map.json") | self._settings
        special = {name: _content(x) for name, x in tokens.items() if name.endswith("_token") and x}
        return ChatTemplate(text, special)

    def _ends(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            ids = _json(self._directory / name).get("eos_token_id")
            if ids is not None:
                ids = tuple(ids) if isinstance(ids, list) else (ids,)
                unknown = [i for i in ids if self._tokenizer.id_to_token(i) is None]
                if unknown or not ids:
                    raise ValueError(
                        f"{self._directory / name}: {TOKENIZER} has no token for the eos_token_id {unknown}."
                    )
                return ids
        own = self._id(self._settings.get("eos_token"))
        if own is None:
            raise ValueError(
                f"{self._directory}: neither generation_config.json nor config.json names an eos_token_id."
            )
        return (own,)

    def _prefix(self) -> tuple[int, ...]:
        text = "a"
        bare = self._tokenizer.encode(text, add_special_tokens=False).ids
        full = self._tokenizer.encode(text, add_special_tokens=True).ids
        return tuple(full[: full.index(bare[0])])

    def _id(self, token: Any) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(_content(token))


def _tokenizer(directory: Path) -> Any:
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as e:
        raise ValueError(f"{TOKENIZER} is read by tokenizers: pip install 'dst-optax[hub]'.") from e
    file = directory / TOKENIZER
    if not file.is_file():
        raise ValueError(
            f"{file} is missing; the directory of a decoder-only checkpoint holds its tokenizer, too. A T5 "
            "has a SentencePiece model instead: leave models/decoder.gin out and set MODEL and VOCAB."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is no tokenizer that can be read: {e}.") from e
    # whoever saved it may have cut or padded texts; transformers forgets that, too
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as e:
        raise ValueError(f"{file} is not JSON: {e}.") from e


def _content(token: Any) -> Any:
    """The text of a special token, which may be spelled with its properties."""
    return token["content"] if isinstance(token, dict) else token
