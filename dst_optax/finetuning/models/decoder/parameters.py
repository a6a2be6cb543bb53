"""The parameters' names, axes, shapes and places on a mesh; no computation.

Paths are Hugging Face's, with ``/`` for dots and Flax's names for leaves; matrices map ``(in, out)``.
Layers lie at ``layers_0``, ``layers_1`` and so on; with ``scan_layers`` at ``layers``, stacked along axis 1.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dst_optax.finetuning.models.base import dividing, unflatten
from dst_optax.finetuning.models.decoder.config import DecoderConfig

AXIS_RULES = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("embed", None),
    ("head_dim", None),
    ("length", None),
    ("layers", None),
)
"""Where axes lie on a mesh of ``data`` and ``model``; ``heads`` are as long as all heads together."""


def axes(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The names of every parameter's axes by its path.

    Args:
      config: the model's shape.

    Returns:
      Path to names.

    Example:
      >>> from dst_optax.finetuning.models import decoder
      >>> decoder.axes(decoder.CONFIGS["smollm2_135m"])["layers_29/mlp/down_proj/kernel"]
      ('mlp', 'embed')
    """
    layer = layer_axes(config)
    if config.scan_layers:
        layers = {f"layers/{path}": (names[0], "layers", *names[1:]) for path, names in layer.items()}
    else:
        layers = {
            f"layers_{i}/{path}": names for i in range(config.num_layers) for path, names in layer.items()
        }
    untied: dict[str, tuple[str, ...]] = {"lm_head/kernel": ("embed", "vocab")}
    return {
        "embed_tokens/embedding": ("vocab", "embed"),
        **layers,
        "norm/scale": ("embed",),
        **({} if config.tie_embeddings else untied),
    }


def layer_axes(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """What :func:`axes` says of one layer, by the path in the layer."""
    traits = config.traits
    bias: dict[str, tuple[str, ...]] = {
        "self_attn/q_proj/bias": ("heads",),
        "self_attn/k_proj/bias": ("kv_heads",),
        "self_attn/v_proj/bias": ("kv_heads",),
    }
    qk_norm: dict[str, tuple[str, ...]] = {
        "self_attn/q_norm/scale": ("head_dim",),
        "self_attn/k_norm/scale": ("head_dim",),
    }
    sandwich: dict[str, tuple[str, ...]] = {
        "pre_feedforward_layernorm/scale": ("embed",),
        "post_feedforward_layernorm/scale": ("embed",),
    }
    return {
        "input_layernorm/scale": ("embed",),
        "self_attn/q_proj/kernel": ("embed", "heads"),
        "self_attn/k_proj/kernel": ("embed", "kv_heads"),
        "self_attn/v_proj/kernel": ("embed", "kv_heads"),
        "self_attn/o_proj/kernel": ("heads", "embed"),
        **(bias if traits.qkv_bias else {}),
        **(qk_norm if traits.qk_norm else {}),
        "post_attention_layernorm/scale": ("embed",),
        **(sandwich if traits.sandwich_norms else {}),
        "mlp/gate_proj/kernel": ("embed", "mlp"),
        "mlp/up_proj/kernel": ("embed", "mlp"),
        "mlp/down_proj/kernel": ("mlp", "embed"),
    }


def sizes(config: DecoderConfig) -> dict[str, int]:
    """How long each named axis is."""
    return {
        "vocab": config.vocab_size,
        "embed": config.emb_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "layers": config.num_layers,
    }


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path.

    Args:
      config: the model's shape.

    Returns:
      Path, spelled ``a/b/c``, to shape.

    Example:
      >>> from dst_optax.finetuning.models import decoder
      >>> decoder.shapes(decoder.CONFIGS["qwen2_5_0_5b"])["layers_0/self_attn/k_proj/kernel"]
      (896, 128)
    """
    size = sizes(config)
    return {path: tuple(size[name] for name in names) for path, names in axes(config).items()}


def num_params(config: DecoderConfig) -> int:
    """How many parameters the model has.

    Example:
      >>> from dst_optax.finetuning.models import decoder
      >>> decoder.num_params(decoder.CONFIGS["smollm2_135m"])
      134515008
    """
    return sum(math.prod(shape) for shape in shapes(config).values())


def shardings(config: DecoderConfig, mesh: Mesh, rules: Sequence[tuple[str, Any]] = AXIS_RULES) -> Any:
    """Where the parameters lie on a mesh.

    Args:
      config: the model's shape.
      mesh: a mesh with the axes that the rules name.
      rules: ``(logical axis, mesh axis or None)`` pairs. An axis that the mesh does not divide evenly
        stays whole.

    Returns:
      A tree of ``NamedSharding``, for ``jax.device_put`` or ``jax.jit``.

    Example:
      >>> import jax
      >>> from dst_optax.finetuning.models import decoder
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> placed = decoder.shardings(decoder.CONFIGS["smollm2_135m"], mesh)
      >>> tuple(placed["embed_tokens"]["embedding"].spec)
      ('model', None)
    """
    names, where = axes(config), dict(rules)

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return dividing(NamedSharding(mesh, PartitionSpec(*map(where.get, names[path]))), shape)

    return unflatten({path: place(path, shape) for path, shape in shapes(config).items()})
