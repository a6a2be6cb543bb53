"""Hugging Face checkpoints of T5: ``*.safetensors`` and ``config.json``."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from dst_optax.finetuning.models import checkpoints
from dst_optax.finetuning.models.t5 import parameters
from dst_optax.finetuning.models.t5.config import MLP_ACTIVATIONS, T5Config
from dst_optax.subset import coordinates

CONFIG = "config.json"
FAMILIES = ("t5", "mt5")
"""What ``model_type`` may be."""

_SUBLAYERS = {
    "encoder": {"attention": "0.SelfAttention", "mlp": "1.DenseReluDense"},
    "decoder": {
        "self_attention": "0.SelfAttention",
        "encoder_decoder_attention": "1.EncDecAttention",
        "mlp": "2.DenseReluDense",
    },
}
_NORMED = {"pre_cross_attention_layer_norm": "encoder_decoder_attention", "pre_mlp_layer_norm": "mlp"}
_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "num_heads": 8,
    "num_layers": 6,
    "d_kv": 64,
    "d_ff": 2048,
    "feed_forward_proj": "relu",
    "dropout_rate": 0.1,
    "tie_word_embeddings": True,  # transformers 5 says ``scale_decoder_outputs`` as well, which goes first
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
"""What ``transformers`` takes a file that leaves a key out to mean."""

_FEED_FORWARD = {name: ours for ours, name in MLP_ACTIVATIONS.items()} | {
    "gated-gelu_new": ("gelu", "linear"),  # other names of the same functions
    "gated-swish": ("silu", "linear"),
    "swish": ("silu",),
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}

_FREE = ("dropout_rate", "dtype", "scan_layers", "remat")  # how a model is trained, not what it computes
SHARED = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
"""Names under which a checkpoint may repeat the embedding."""
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
"""A tensor that early conversions of T5 1.0 hold and that no T5 reads."""


def name_of(path: str) -> str:
    """The Hugging Face name of a parameter.

    Args:
      path: its path in the unstacked layout.

    Returns:
      Its name in ``transformers``.

    Example:
      >>> from dst_optax.finetuning.models.t5 import huggingface
      >>> huggingface.name_of("decoder/layers_3/encoder_decoder_attention/out/kernel")
      'decoder.block.3.layer.1.EncDecAttention.o.weight'
    """
    match path.split("/"):
        case ["token_embedder", "embedding"]:
            return SHARED
        case ["decoder", "logits_dense", "kernel"]:
            return "lm_head.weight"
        case [stack, "relpos_bias", "rel_embedding"]:
            return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        case [stack, _, "scale"]:
            return f"{stack}.final_layer_norm.weight"
        case [stack, layer, norm, "scale"]:
            first = next(iter(_SUBLAYERS[stack]))
            sublayer = _SUBLAYERS[stack][_NORMED.get(norm, first)].split(".")[0]
            return f"{stack}.block.{_index(layer)}.layer.{sublayer}.layer_norm.weight"
        case [stack, layer, module, dense, "kernel"]:
            sublayer = _SUBLAYERS[stack][module]
            return f"{stack}.block.{_index(layer)}.layer.{sublayer}.{_PROJECTIONS.get(dense, dense)}.weight"
    raise ValueError(f"{path!r} is not a parameter of T5.")


def tensors(config: T5Config) -> list[coordinates.Tensor]:
    """Every tensor of a checkpoint, and where it lies in our parameters.

    Args:
      config: the model's shape; ``scan_layers`` decides where the tensors lie.

    Returns:
      One row a tensor. Together they fill every parameter.

    Example:
      >>> import dataclasses
      >>> from dst_optax.finetuning.models import t5
      >>> from dst_optax.finetuning.models.t5 import huggingface
      >>> config = dataclasses.replace(t5.CONFIGS["tiny"], scan_layers=True)
      >>> row = next(r for r in huggingface.tensors(config) if r.layer == 1)
      >>> row.name
      'decoder.block.1.layer.1.EncDecAttention.k.weight'
      >>> row.path
      'decoder/decoder/encoder_decoder_attention/key/kernel'
    """
    rows = []
    for path, shape in parameters.shapes(dataclasses.replace(config, scan_layers=False)).items():
        name, transposed, layer = name_of(path), path.endswith(("/kernel", "/rel_embedding")), None
        if config.scan_layers and (match := parameters.LAYER.match(path)):
            stack, index, rest = match.groups()
            path, layer = f"{stack}/{stack}/{rest}", int(index)
        copies = COPIES if config.logits_via_embedding else COPIES[:2]
        rows.append(
            coordinates.Tensor(
                name,
                shape[::-1] if transposed else shape,
                path,
                transposed,
                layer,
                copies if name == SHARED else (),
            )
        )
    return rows


def _index(layer: str) -> str:
    return layer.removeprefix("layers_")


def config_of(path: str | os.PathLike[str]) -> T5Config:
    """The shape of a Hugging Face checkpoint, as its ``config.json`` tells.

    Args:
      path: its directory.

    Returns:
      The shape; how to compute (``dtype``, ``scan_layers``, ``remat``) has its defaults.

    Raises:
      ValueError: there is no ``config.json``, or it describes a model that this T5 is not.

    Example:
      >>> import tempfile
      >>> from dst_optax.finetuning.models import t5
      >>> path = Path(tempfile.mkdtemp())
      >>> _ = (path / CONFIG).write_text('{"model_type": "t5", "feed_forward_proj": "gated-silu"}')
      >>> t5.config_of(path).mlp_activations
      ('silu', 'linear')
    """
    file = Path(path) / CONFIG
    try:
        settings = json.loads(file.read_text())
        kind = settings.get("model_type", "t5")
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{file} cannot be read as the configuration of a model: {e}.") from e
    if kind not in FAMILIES:
        raise ValueError(f"{file}: model_type is {kind!r}; T5 1.0, T5 1.1, mT5 and ByT5 are supported.")
    fixed_settings = {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
    }
    for name, fixed in fixed_settings.items():
        if settings.get(name) not in (None, fixed):
            raise ValueError(f"{file}: {name} is {settings[name]!r}; only {fixed!r} is supported.")
    if kind == "mt5" and settings.get("tie_word_embeddings") is not False:
        raise ValueError(
            f"{file}: an mT5 whose logits are tied to its embeddings is not supported. Published ones are "
            "not tied; if there is an lm_head.weight, set tie_word_embeddings to false."
        )
    if null := [name for name in _DEFAULTS if name in settings and settings[name] is None]:
        raise ValueError(f"{file}: {null[0]} is null; write what it is, or leave it out for the default.")
    given = _DEFAULTS | settings
    if given["feed_forward_proj"] not in _FEED_FORWARD:
        raise ValueError(
            f"{file}: feed_forward_proj is {given['feed_forward_proj']!r}; supported are "
            f"{', '.join(_FEED_FORWARD)}."
        )
    decoder_layers = given.get("num_decoder_layers")
    return T5Config(
        vocab_size=given["vocab_size"],
        emb_dim=given["d_model"],
        num_heads=given["num_heads"],
        num_encoder_layers=given["num_layers"],
        num_decoder_layers=given["num_layers"] if decoder_layers is None else decoder_layers,
        head_dim=given["d_kv"],
        mlp_dim=given["d_ff"],
        mlp_activations=_FEED_FORWARD[given["feed_forward_proj"]],
        dropout_rate=given["dropout_rate"],
        logits_via_embedding=given.get("scale_decoder_outputs", given["tie_word_embeddings"]),
        relpos_buckets=given["relative_attention_num_buckets"],
        relpos_max_distance=given["relative_attention_max_distance"],
        norm_epsilon=given["layer_norm_epsilon"],
    )


def check_config(path: Path, config: T5Config) -> None:
    """Raises a ValueError where ``config.json`` tells of another T5; only a lone file may have none."""
    directory = path if path.is_dir() else path.parent
    if path.is_file() and not (directory / CONFIG).is_file():
        return
    theirs = config_of(directory)
    differ = [
        f"{field.name} is {getattr(theirs, field.name)!r} there and {getattr(config, field.name)!r} here"
        for field in dataclasses.fields(config)
        if field.name not in _FREE and getattr(theirs, field.name) != getattr(config, field.name)
    ]
    if differ:
        raise ValueError(
            f"{directory / CONFIG} describes another T5: {'; '.join(differ)}. Take the model from it, with "
            "model=t5.config_of(path); in a gin file, MODEL is the path."
        )


def save_hf(
    params: Any,
    config: T5Config,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    shard_bytes: int = checkpoints.SHARD_BYTES,
) -> None:
    """Writes a checkpoint that ``transformers.T5ForConditionalGeneration.from_pretrained`` reads.

    Each file appears whole or not at all; the configuration comes last.

    Args:
      params: a T5's parameters, stacked or not; written in their dtype.
      config: its shape.
      path: a directory; made if missing.
      source: the directory of a checkpoint of the same model, whose tokenizer and settings are copied.
      shard_bytes: weights beyond so many bytes are written as several files and an index.

    Raises:
      ValueError: the parameters are not those of ``config``, or a model lies in ``path`` and not as one file
        that one file replaces whole; nothing is written.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import t5
      >>> config, tokens, path = t5.CONFIGS["tiny"], jnp.ones((1, 1), int), tempfile.mkdtemp()
      >>> params = t5.Transformer(config).init(jax.random.key(0), tokens, tokens, tokens)["params"]
      >>> t5.save_hf(params, config, path)
      >>> t5.load(path, config)["token_embedder"]["embedding"].shape
      (384, 64)
    """
    flat = parameters.flatten(parameters.unstack_layers(jax.device_get(params)))  # numpy changes no bits
    unstacked = dataclasses.replace(config, scan_layers=False)
    checkpoints.check("the parameters", {p: x.shape for p, x in flat.items()}, parameters.shapes(unstacked))
    text = json.dumps(_config_json(config, str(flat["token_embedder/embedding"].dtype)), indent=2) + "\n"
    settings = None if source is None else Path(source)
    checkpoints.write(Path(path), flat, tensors(unstacked), text, shard_bytes, settings)


def _config_json(config: T5Config, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relpos_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": MLP_ACTIVATIONS[config.mlp_activations],
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": dtype,
    }
