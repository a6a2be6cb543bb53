"""Decoder-only models as the trainer sees them."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dst_optax.finetuning.models.base import Batch, Params, Rules, replace_given
from dst_optax.finetuning.models.decoder import config_json, huggingface, parameters
from dst_optax.finetuning.models.decoder.config import DecoderConfig
from dst_optax.finetuning.models.decoder.decoding import decode
from dst_optax.finetuning.models.decoder.network import Decoder

if TYPE_CHECKING:
    import seqio

MATRICES = (r"/(q|v)_proj/kernel$", r"/(k|o|gate|up|down)_proj/kernel$")


@dataclass(frozen=True)
class CausalLM:
    """A decoder behind :class:`~dst_optax.finetuning.models.base.LanguageModel`.

    Attributes:
      config: its shape.
    """

    config: DecoderConfig
    decoder_only = True
    embedding = "embed_tokens/embedding"
    axis_rules = parameters.AXIS_RULES

    @property
    def network(self) -> Decoder:
        """The linen module."""
        return Decoder(self.config)

    def feature_converter(self) -> "seqio.FeatureConverter":  # noqa: D102
        from dst_optax.finetuning.models.decoder.features import DecoderFeatureConverter

        return DecoderFeatureConverter()

    def configured(self, *, dropout_rate: float | None = None, **how: Any) -> "CausalLM":  # noqa: D102
        if dropout_rate:
            raise ValueError(
                f"recipe: dropout is {dropout_rate}, but decoder-only models have none; set None."
            )
        return CausalLM(replace_given(self.config, how))

    def init(self, key: jax.Array) -> Params:  # noqa: D102
        return self.network.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def load(self, checkpoint: str) -> Params:  # noqa: D102
        self._check_config(checkpoint)
        return huggingface.load(checkpoint, self.config)

    def save(self, directory: Path, params: Params, source: Path | None = None) -> None:  # noqa: D102
        huggingface.save_hf(params, self.config, directory, source)

    def shardings(self, params: Params, mesh: Mesh, rules: Rules | None = None) -> Any:  # noqa: D102
        del params
        return parameters.shardings(self.config, mesh, rules or self.axis_rules)

    def logits(self, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:  # noqa: D102
        del key
        logits: Any = self.network.apply(
            {"params": params}, batch["decoder_input_tokens"], at=batch["decoder_target_indices"]
        )
        return logits

    def decode(  # noqa: D102
        self, params: Params, batch: Batch, vocabulary: Any, max_length: int
    ) -> jax.Array:
        lengths = batch["decoder_target_indices"][:, 0] + 1
        return decode(
            self.network, params, batch["decoder_input_tokens"], lengths, max_length, vocabulary.eos_ids
        )

    def text(self, vocabulary: Any, tokens: Sequence[int]) -> str:  # noqa: D102
        return vocabulary.decode_until_end(list(tokens))

    def check(self, vocabulary: Any, checkpoint: str | None = None) -> None:  # noqa: D102
        from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary

        if not hasattr(vocabulary, "eos_ids"):
            raise ValueError(
                f"a decoder-only model needs its own tokenizer, not {type(vocabulary).__name__}: give "
                "HuggingFaceVocabulary the directory of its checkpoint."
            )
        for more in (" b", "b"):
            text = vocabulary.decode([*vocabulary.encode("a:"), *vocabulary.encode(more)])
            if text != "a:" + more:
                raise ValueError(
                    f"{vocabulary!r} makes {text!r} of 'a:' and {more!r}: like those of Llama 1 and 2 it "
                    "begins every text anew, so that targets would not continue their inputs. Take another "
                    "model."
                )
        if vocabulary.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the vocabulary has {vocabulary.vocab_size} pieces, the model's embedding only "
                f"{self.config.vocab_size}; they do not belong together."
            )
        if checkpoint is not None:
            self._check_config(checkpoint)
            if isinstance(vocabulary, HuggingFaceVocabulary):
                vocabulary.check_same(checkpoint)

    def _check_config(self, checkpoint: str) -> None:
        like = dict(scan_layers=self.config.scan_layers, dtype=self.config.dtype, remat=self.config.remat)
        said = config_json.read_config(checkpoint, **like)
        if said != self.config:
            differ = [
                f"{field.name} is {getattr(said, field.name)!r} there and {value!r} here"
                for field in dataclasses.fields(said)
                if field.compare and (value := getattr(self.config, field.name)) != getattr(said, field.name)
            ]
            raise ValueError(f"{checkpoint} is another model: {'; '.join(differ)}.")

    def matrices(self, paths: Iterable[str]) -> list[str]:  # noqa: D102
        paths = list(paths)
        return [path for pattern in MATRICES for path in paths if re.search(pattern, path)]
