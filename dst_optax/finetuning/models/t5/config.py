"""Shapes of T5: the dimensions that were published, and a tiny one."""

import dataclasses
from collections.abc import Mapping

from jax.typing import DTypeLike

MLP_ACTIVATIONS: Mapping[tuple[str, ...], str] = {
    ("relu",): "relu",
    ("gelu", "linear"): "gated-gelu",
    ("gelu",): "gelu_new",
    ("silu",): "silu",
    ("relu", "linear"): "gated-relu",
    ("silu", "linear"): "gated-silu",
}
"""The feed-forward networks of T5, by the activations' names in ``flax.linen``, as ``transformers`` names
them; a tuned model could not be exported with another."""


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Hyperparameters of a T5 model; the defaults are those of T5 1.1 small.

    Attributes:
      vocab_size: rows of the embedding.
      emb_dim: width of the residual stream.
      num_heads: attention heads.
      num_encoder_layers: encoder layers.
      num_decoder_layers: decoder layers.
      head_dim: width of a head.
      mlp_dim: width of the hidden layer.
      mlp_activations: one of :data:`MLP_ACTIVATIONS`, names in ``flax.linen`` or ``linear``; the hidden
        layers they make are multiplied: ``("relu",)`` is T5 1.0, ``("gelu", "linear")`` the gated GELU of
        T5 1.1.
      dropout_rate: share of activations to drop when dropout is enabled.
      logits_via_embedding: whether the (scaled) embedding also makes the logits, as in T5 1.0.
      relpos_buckets: buckets of relative positions.
      relpos_max_distance: relative positions from here on share a bucket.
      norm_epsilon: added to the mean square in layer normalisation.
      dtype: dtype of the computation; parameters are initialised in float32 whatever it is.
      scan_layers: whether layers are stacked along axis 1 of their parameters and run in a
        ``lax.scan``: one layer is compiled instead of all.
      remat: whether a layer's activations are computed again in the backward pass, to save memory.

    Example:
      >>> import dataclasses
      >>> from dst_optax.finetuning.models import t5
      >>> dataclasses.replace(t5.CONFIGS["t5_1_1_small"], dtype="bfloat16").mlp_dim
      1024
    """

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 6
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = "float32"
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"T5Config: {field.name} must be at least 1, got {value!r}.")
        if self.mlp_activations not in MLP_ACTIVATIONS:
            raise ValueError(
                f"T5Config: mlp_activations is {self.mlp_activations}, no feed-forward network that "
                f"transformers has; it has {', '.join(map(str, MLP_ACTIVATIONS))}."
            )
        if self.relpos_buckets < 4 or self.relpos_max_distance <= self.relpos_buckets // 2:
            raise ValueError(
                f"T5Config: {self.relpos_buckets} relpos_buckets and relpos_max_distance "
                f"{self.relpos_max_distance} do not fit: at least 4 buckets, and a distance of more than "
                "half as many."
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"T5Config: dropout_rate must lie in [0, 1), got {self.dropout_rate!r}.")


def _t5(emb_dim: int, num_heads: int, num_layers: int, mlp_dim: int, head_dim: int = 64) -> T5Config:
    return T5Config(
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        mlp_activations=("relu",),
        logits_via_embedding=True,
    )


def _t5_1_1(emb_dim: int, num_heads: int, num_layers: int, mlp_dim: int) -> T5Config:
    return T5Config(
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        mlp_dim=mlp_dim,
    )


def _byt5(emb_dim: int, num_heads: int, num_decoder_layers: int, mlp_dim: int) -> T5Config:
    return T5Config(
        vocab_size=384,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=3 * num_decoder_layers,
        num_decoder_layers=num_decoder_layers,
        mlp_dim=mlp_dim,
    )


CONFIGS: dict[str, T5Config] = {
    "tiny": T5Config(
        vocab_size=384,
        emb_dim=64,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=16,
        mlp_dim=128,
    ),
    "t5_small": _t5(512, 8, 6, 2048),
    "t5_base": _t5(768, 12, 12, 3072),
    "t5_large": _t5(1024, 16, 24, 4096),
    "t5_3b": _t5(1024, 32, 24, 16384, head_dim=128),
    "t5_11b": _t5(1024, 128, 24, 65536, head_dim=128),
    "t5_1_1_small": _t5_1_1(512, 6, 8, 1024),
    "t5_1_1_base": _t5_1_1(768, 12, 12, 2048),
    "t5_1_1_large": _t5_1_1(1024, 16, 24, 2816),
    "t5_1_1_xl": _t5_1_1(2048, 32, 24, 5120),
    "t5_1_1_xxl": _t5_1_1(4096, 64, 24, 10240),
    "byt5_small": _byt5(1472, 6, 4, 3584),
    "byt5_base": _byt5(1536, 12, 6, 3968),
    "byt5_large": _byt5(1536, 16, 12, 3840),
    "byt5_xl": _byt5(2560, 32, 12, 6720),
    "byt5_xxl": _byt5(4672, 64, 12, 12352),
}
"""Published sizes of T5 1.0, T5 1.1 and ByT5 (arXiv 1910.10683, 2002.05202, 2105.13626), and ``tiny``."""
