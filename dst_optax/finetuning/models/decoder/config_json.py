"""A ``config.json`` of Hugging Face as a DecoderConfig, and back.

What a file says and the network cannot carry exactly is refused by name.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dst_optax.finetuning.models.decoder.config import FAMILIES, DecoderConfig, Rope

CONFIG = "config.json"

_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "rope_theta": 1_000_000.0,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10_000.0},
    "qwen2": {"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10_000.0},
    "qwen3": {"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10_000.0, "head_dim": 128},
    "gemma3_text": _GEMMA_DEFAULTS,
}
"""What ``transformers`` takes a file that leaves a key out to mean."""

_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_new")}
_UNSUPPORTED = {
    "quantization_config": "its weights are quantised",
    "attention_bias": "its attention has biases that Llama, Qwen and Gemma do not have",
    "mlp_bias": "its MLP has biases",
    "attn_logit_softcapping": "its attention is soft-capped",
    "final_logit_softcapping": "its logits are soft-capped",
    "use_bidirectional_attention": "its attention sees what comes after",
    "use_sliding_window": "its family has a sliding window",
}
_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "default": {},
}


def read_config(path: str | os.PathLike[str], **layout: Any) -> DecoderConfig:
    """The shape of a model from its ``config.json``.

    Args:
      path: the file, or the directory of a checkpoint that holds it.
      **layout: ``dtype``, ``scan_layers`` and ``remat`` of the config.

    Returns:
      The config.

    Raises:
      ValueError: there is no such file, it is of another family, or it asks for what the network does not do.

    Example:
      >>> import tempfile
      >>> from dst_optax.finetuning.models import decoder
      >>> directory = Path(tempfile.mkdtemp())
      >>> text = decoder.config_text(decoder.CONFIGS["llama3_2_1b"])
      >>> _ = (directory / "config.json").write_text(text)
      >>> decoder.read_config(directory) == decoder.CONFIGS["llama3_2_1b"]
      True
    """
    file = Path(path)
    file = file / CONFIG if file.is_dir() else file
    if file.name != CONFIG or not file.is_file():
        raise ValueError(
            f"{path} holds no {CONFIG}; give the directory of a Hugging Face checkpoint, with all its files."
        )
    try:
        return _config(json.loads(file.read_text()), layout)
    except json.JSONDecodeError as e:
        raise ValueError(f"{file} is not JSON: {e}.") from e
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is no configuration of a decoder: {type(e).__name__} {e}.") from e
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def _config(written: dict[str, Any], layout: Mapping[str, Any]) -> DecoderConfig:
    family = written["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; {', '.join(FAMILIES)} are.")
    given = {key: value for key, value in written.items() if value is not None}
    if null := [key for key in _DEFAULTS[family] if key in written and key not in given]:
        raise ValueError(f"{null[0]} is null, which is not its default; write what it is, or leave it out.")
    for key, reason in _UNSUPPORTED.items():
        if given.get(key):
            raise ValueError(f"{key} is {given[key]!r}: {reason}, which is not supported.")
    settings = _DEFAULTS[family] | given
    activation = settings.get("hidden_activation", settings["hidden_act"])
    if activation not in _ACTIVATIONS[FAMILIES[family].activation]:
        raise ValueError(f"the activation {activation!r} is not {family}'s and not supported.")
    rope = _rope(settings, "full_attention", settings["rope_theta"], settings.get("rope_scaling", {}))
    head_dim = settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    return DecoderConfig(
        family=family,
        vocab_size=settings["vocab_size"],
        emb_dim=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings.get("num_key_value_heads", settings["num_attention_heads"]),
        head_dim=head_dim,
        mlp_dim=settings["intermediate_size"],
        tie_embeddings=settings["tie_word_embeddings"],
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        max_length=_length(settings.get("max_position_embeddings"), rope),
        rope=rope,
        **_sliding(settings),
        **layout,
    )


def _rope(settings: Mapping[str, Any], kind: str, theta: float, scaling: Mapping[str, Any]) -> Rope:
    """Positions of a kind of layer; ``transformers`` 5 writes them under ``rope_parameters``."""
    parameters = settings.get("rope_parameters", {})
    parameters = {"rope_theta": theta, **scaling, **parameters.get(kind, parameters)}
    scaling_type = parameters.get("rope_type", parameters.get("type", "default"))
    if scaling_type not in _ROPE_KEYS:
        raise ValueError(f"the rope type {scaling_type!r} is not supported; {', '.join(_ROPE_KEYS)} are.")
    if parameters.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            "partial_rotary_factor: only a part of each head is rotated, which is not supported."
        )
    if scaling_type == "llama3":
        parameters.setdefault("original_max_position_embeddings", settings.get("max_position_embeddings"))
    values = {ours: parameters[theirs] for theirs, ours in _ROPE_KEYS[scaling_type].items()}
    return Rope(float(parameters["rope_theta"]), scaling_type, **values)


def _length(pre_trained: int | None, rope: Rope) -> int | None:
    """Tokens that a model has positions for; ``linear`` scaling stretches those of the pre-training."""
    return round(pre_trained * rope.factor) if pre_trained and rope.scaling == "linear" else pre_trained


def _sliding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What only Gemma 3 says."""
    count = settings["num_hidden_layers"]
    if settings["model_type"] != "gemma3_text":
        if "sliding_attention" in settings.get("layer_types", ()):
            raise ValueError("layer_types: its family is only supported without a sliding window.")
        return {}
    pattern = settings.get("_sliding_window_pattern", settings["sliding_window_pattern"])
    default = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(count)]
    types = settings.get("layer_types", default)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types: {sorted(unknown)} are not supported.")
    return {
        "query_pre_attn_scalar": settings["query_pre_attn_scalar"],
        "sliding_window": settings["sliding_window"],
        "local_rope": _rope(settings, "sliding_attention", settings["rope_local_base_freq"], {}),
        "sliding_layers": tuple(kind == "sliding_attention" for kind in types),
    }


def config_text(config: DecoderConfig, dtype: str = "float32") -> str:
    """The text of a ``config.json`` that ``transformers`` 4 and 5 read.

    Args:
      config: the model's shape.
      dtype: of the weights beside it.

    Returns:
      JSON.

    Example:
      >>> from dst_optax.finetuning.models import decoder
      >>> json.loads(decoder.config_text(decoder.CONFIGS["smollm2_135m"]))["architectures"]
      ['LlamaForCausalLM']
    """
    settings: dict[str, Any] = {
        "architectures": [config.traits.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "torch_dtype": dtype,
    }
    if config.max_length is not None:
        settings["max_position_embeddings"] = config.max_length
    activation = "hidden_activation" if config.family == "gemma3_text" else "hidden_act"
    settings[activation] = _ACTIVATIONS[config.traits.activation][0]
    if config.rope.scaling != "default":
        values = {
            theirs: getattr(config.rope, ours) for theirs, ours in _ROPE_KEYS[config.rope.scaling].items()
        }
        settings["rope_scaling"] = {"rope_type": config.rope.scaling, **values}
    if config.local_rope is not None:
        settings |= {
            "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
            "sliding_window": config.sliding_window,
            "rope_local_base_freq": config.local_rope.theta,
            "layer_types": [
                "sliding_attention" if sliding else "full_attention" for sliding in config.sliding_layers
            ],
        }
    return json.dumps(settings, indent=2) + "\n"
