"""Shapes of decoder-only models: what a ``config.json`` says, and the dimensions that were published."""

import dataclasses
from typing import Any

from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Family:
    """What all models of a family have in common, beyond rotary positions, RMS norms and a gated MLP.

    Attributes:
      architecture: the class in ``transformers``.
      activation: of the gate, a name in ``jax.nn``.
      qkv_bias: whether queries, keys and values have biases.
      qk_norm: whether each head's queries and keys are normalised.
      sandwich_norms: whether attention and MLP are normalised after as well as before.
      unit_offset: whether a norm multiplies by 1 + its parameter instead of its parameter.
      scaled_embeddings: whether embeddings are multiplied by the square root of their width.
    """

    architecture: str
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    unit_offset: bool = False
    scaled_embeddings: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        activation="gelu",
        qk_norm=True,
        sandwich_norms=True,
        unit_offset=True,
        scaled_embeddings=True,
    ),
}
"""Families by the ``model_type`` of their ``config.json``."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings.

    Attributes:
      theta: base of the frequencies.
      scaling: ``default``; ``linear``, where all frequencies are divided by ``factor``; or ``llama3``,
        where only low ones are.
      factor: what frequencies are divided by.
      low_freq_factor: wavelengths above ``original_length / low_freq_factor`` are scaled whole.
      high_freq_factor: wavelengths below ``original_length / high_freq_factor`` are not scaled.
      original_length: context of the pre-training.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.scaling not in ("default", "linear", "llama3"):
            raise ValueError(
                f"Rope: the scaling {self.scaling!r} is not supported; default, linear and llama3 are."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyperparameters of a decoder-only model; :func:`read_config` takes them from a ``config.json``.

    Attributes:
      family: a key of ``FAMILIES``.
      vocab_size: rows of the embedding.
      emb_dim: width of the residual stream.
      num_layers: layers.
      num_heads: heads of queries.
      num_kv_heads: heads of keys and values, each shared by as many heads of queries.
      head_dim: width of a head.
      mlp_dim: width of the hidden layer.
      tie_embeddings: whether the embedding also makes the logits.
      norm_eps: added to mean squares.
      rope: positions, in layers that see all that went before.
      query_pre_attn_scalar: products of queries and keys are divided by its square root; None is
        ``head_dim``.
      sliding_window: how many tokens a sliding layer sees, its own included.
      local_rope: positions in sliding layers.
      sliding_layers: whether each layer is a sliding one; empty if none is.
      dtype: dtype of the computation; parameters are initialised in float32 whatever it is.
      scan_layers: whether layers are stacked along axis 1 of their parameters and run in a
        ``lax.scan``: one layer is compiled instead of all.
      remat: whether a layer's activations are computed again in the backward pass, to save memory.
      max_length: tokens that the model was made for at most; None if that is not known. Computes nothing.

    Example:
      >>> from dst_optax.finetuning.models import decoder
      >>> decoder.CONFIGS["smollm2_135m"].num_kv_heads
      3
    """

    family: str
    vocab_size: int
    emb_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    tie_embeddings: bool
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    query_pre_attn_scalar: float | None = None
    sliding_window: int | None = None
    local_rope: Rope | None = None
    sliding_layers: tuple[bool, ...] = ()
    dtype: DTypeLike = "float32"
    scan_layers: bool = False
    remat: bool = False
    max_length: int | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sliding_layers", tuple(self.sliding_layers))
        if self.family not in FAMILIES:
            raise ValueError(f"DecoderConfig: family {self.family!r} is none of {', '.join(FAMILIES)}.")
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"DecoderConfig: {field.name} must be at least 1, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads {self.num_heads} is no multiple of "
                f"num_kv_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig: head_dim must be even to be rotated, got {self.head_dim}.")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"DecoderConfig: sliding_layers speaks of {len(self.sliding_layers)} layers, there are "
                f"{self.num_layers}."
            )
        if any(self.sliding_layers) and not (self.sliding_window and self.local_rope):
            raise ValueError("DecoderConfig: sliding_layers need sliding_window and local_rope.")

    @property
    def traits(self) -> Family:
        """What the family has in common."""
        return FAMILIES[self.family]


CONFIGS: dict[str, DecoderConfig] = {
    "smollm2_135m": DecoderConfig(
        family="llama",
        vocab_size=49_152,
        emb_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        tie_embeddings=True,
        norm_eps=1e-5,
        rope=Rope(100_000.0),
    ),
    "llama3_2_1b": DecoderConfig(
        family="llama",
        vocab_size=128_256,
        emb_dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        tie_embeddings=True,
        norm_eps=1e-5,
        rope=Rope(500_000.0, "llama3", factor=32.0),
    ),
    "qwen2_5_0_5b": DecoderConfig(
        family="qwen2",
        vocab_size=151_936,
        emb_dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=4864,
        tie_embeddings=True,
        rope=Rope(1_000_000.0),
    ),
    "qwen3_0_6b": DecoderConfig(
        family="qwen3",
        vocab_size=151_936,
        emb_dim=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=3072,
        tie_embeddings=True,
        rope=Rope(1_000_000.0),
    ),
    "gemma3_270m": DecoderConfig(
        family="gemma3_text",
        vocab_size=262_144,
        emb_dim=640,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=2048,
        tie_embeddings=True,
        rope=Rope(1_000_000.0),
        query_pre_attn_scalar=256,
        sliding_window=512,
        local_rope=Rope(10_000.0),
        sliding_layers=(True, True, True, True, True, False) * 3,
    ),
}
"""Published sizes, to plan with; a model is built from its checkpoint's own ``config.json``."""
