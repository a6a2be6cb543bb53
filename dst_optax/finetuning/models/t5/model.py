"""T5 as the trainer sees it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dst_optax.finetuning.models.base import Batch, Params, Rules, replace_given
from dst_optax.finetuning.models.t5 import parameters
from dst_optax.finetuning.models.t5.checkpoints import load
from dst_optax.finetuning.models.t5.config import T5Config
from dst_optax.finetuning.models.t5.decoding import decode
from dst_optax.finetuning.models.t5.huggingface import save_hf
from dst_optax.finetuning.models.t5.network import Transformer
from dst_optax.paths import as_path

if TYPE_CHECKING:
    import seqio

EOS = 1
MAX_UNUSED = (
    255  # rows of an embedding: 100 sentinels that a vocabulary may lack, padded to a multiple of 128
)
MATRICES = (r"/(query|value)/kernel$", r"/(key|out|wi(_\d+)?|wo)/kernel$")


@dataclass(frozen=True)
class T5:
    """A T5 behind :class:`~dst_optax.finetuning.models.base.LanguageModel`.

    Attributes:
      config: its shape.
    """

    config: T5Config
    decoder_only = False
    embedding = "token_embedder/embedding"
    axis_rules = parameters.AXIS_RULES

    @property
    def network(self) -> Transformer:
        """The linen module."""
        return Transformer(self.config)

    def feature_converter(self) -> "seqio.FeatureConverter":  # noqa: D102
        import seqio

        return seqio.EncDecFeatureConverter(pack=False)

    def configured(self, **how: Any) -> "T5":  # noqa: D102
        return T5(replace_given(self.config, how))

    def init(self, key: jax.Array) -> Params:  # noqa: D102
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self.network.init(key, tokens, tokens, tokens, enable_dropout=False)["params"]

    def load(self, checkpoint: str) -> Params:  # noqa: D102
        return load(checkpoint, self.config)

    def save(self, directory: Path, params: Params, source: Path | None = None) -> None:  # noqa: D102
        save_hf(params, self.config, directory, source)

    def shardings(self, params: Params, mesh: Mesh, rules: Rules | None = None) -> Any:  # noqa: D102
        return parameters.shardings(params, mesh, rules or self.axis_rules)

    def logits(self, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:  # noqa: D102
        logits: Any = self.network.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            enable_dropout=key is not None,
            rngs=None if key is None else {"dropout": key},
        )
        return logits

    def decode(  # noqa: D102
        self, params: Params, batch: Batch, vocabulary: Any, max_length: int
    ) -> jax.Array:
        del vocabulary
        return decode(self.network, params, batch["encoder_input_tokens"], max_length)

    def text(self, vocabulary: Any, tokens: Sequence[int]) -> str:
        """The text of decoded tokens, up to the end mark.

        Example:
          >>> import seqio
          >>> from dst_optax.finetuning.models import t5
          >>> t5.T5(t5.CONFIGS["tiny"]).text(seqio.ByteVocabulary(), [100, 101, 1, 0, 0])
          'ab'
        """
        ids = list(tokens)
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return vocabulary.decode([i for i in ids if i != 0])

    def check(self, vocabulary: Any, checkpoint: str | None = None) -> None:  # noqa: D102
        if hasattr(vocabulary, "eos_ids"):
            raise ValueError(
                f"{type(vocabulary).__name__} is for decoder-only models, and this one is a T5: give its "
                "SentencePieceVocabulary, or ByteVocabulary for ByT5, and leave models/decoder.gin out."
            )
        file = getattr(vocabulary, "sentencepiece_model_file", None)
        if file is not None and not as_path(file).exists():
            raise ValueError(f"the vocabulary {file} does not exist; VOCAB names T5's spiece.model.")
        unused = self.config.vocab_size - vocabulary.vocab_size
        if unused < 0 or (checkpoint is not None and unused > MAX_UNUSED):
            raise ValueError(
                f"the vocabulary has {vocabulary.vocab_size} pieces, the model's embedding "
                f"{self.config.vocab_size} rows; they do not belong together."
            )
        own = None if checkpoint is None else as_path(checkpoint) / "spiece.model"
        if file is not None and own is not None and own.exists():
            _require_same_pieces(file, own)
        if (vocabulary.pad_id, vocabulary.eos_id) != (0, EOS):
            raise ValueError(
                f"T5 pads with 0 and ends with {EOS}; the vocabulary has {vocabulary.pad_id} and "
                f"{vocabulary.eos_id}. Give T5's own vocabulary."
            )

    def matrices(self, paths: Iterable[str]) -> list[str]:  # noqa: D102
        paths = list(paths)
        return [path for pattern in MATRICES for path in paths if re.search(pattern, path)]


def _require_same_pieces(vocabulary: str, own: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    ours, theirs = (
        SentencePieceProcessor(model_proto=as_path(file).read_bytes()) for file in (vocabulary, own)
    )
    for i in range(min(len(ours), len(theirs))):  # one of them may spell out the sentinels
        piece, other = ours.id_to_piece(i), theirs.id_to_piece(i)
        if piece != other:
            raise ValueError(
                f"the vocabulary {vocabulary} is not the checkpoint's own, {own}: token {i} is {piece!r} and "
                f"there {other!r}. Set VOCAB to the checkpoint's."
            )
