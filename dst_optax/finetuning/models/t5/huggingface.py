"""Hugging Face checkpoints of T5: ``*.safetensors`` and ``config.json``."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dst_optax.atomic import atomic_file
from dst_optax.finetuning.models.t5 import parameters
from dst_optax.finetuning.models.t5.config import T5Config
from dst_optax.finetuning.models.t5.parameters import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

_SUBLAYERS = {
    "encoder": {"attention": "0.SelfAttention", "mlp": "1.DenseReluDense"},
    "decoder": {
        "self_attention": "0.SelfAttention",
        "encoder_decoder_attention": "1.EncDecAttention",
        "mlp": "2.DenseReluDense",
    },
}
_NORMED = {"pre_cross_attention_layer_norm": "encoder_decoder_attention", "pre_mlp_layer_norm": "mlp"}
_FEED_FORWARD = {("relu",): "relu", ("gelu", "linear"): "gated-gelu"}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}

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


def is_transposed(path: str) -> bool:
    """Whether ``transformers`` holds this parameter the other way round."""
    return path.endswith(("/kernel", "/rel_embedding"))


def _index(layer: str) -> str:
    return layer.removeprefix("layers_")


def read(path: Path, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by our paths, none read yet.

    Args:
      path: a ``.safetensors`` file, or a directory with one or with an index of several.
      wanted: path to shape of the parameters in the unstacked layout.

    Returns:
      Path to tensor; what has no place in ``wanted`` keeps its Hugging Face name.

    Raises:
      ValueError: files are missing, truncated or not safetensors; copies of the embedding differ.

    Example:
      >>> import tempfile, numpy as np
      >>> from dst_optax.finetuning.models import t5
      >>> from dst_optax.finetuning.models.t5 import huggingface
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> safetensors.numpy.save_file({"shared.weight": np.ones((3, 2))}, file)
      >>> huggingface.read(file, t5.shapes(t5.CONFIGS["tiny"]))["token_embedder/embedding"].shape
      (3, 2)
    """
    found = _tensors(path)
    found.pop(UNUSED, None)
    names = {name_of(ours): ours for ours in wanted}
    for copy in COPIES:
        if copy in found and copy not in names and SHARED in found:
            _check_copy(path, copy, found.pop(copy), found[SHARED])
    return {
        names.get(name, name): _turned(tensor) if is_transposed(names.get(name, "")) else tensor
        for name, tensor in found.items()
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        return _tensors_of_file(path)
    if not (path / INDEX).is_file():
        return _tensors_of_file(path / WEIGHTS)
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        if any(Path(file).name != file for file in files):
            raise ValueError(f"names files outside of its directory: {files}")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{path / INDEX} is not an index of safetensors: {e}.") from e
    found: dict[str, Tensor] = {}
    for file in files:
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing, which {INDEX} names; download all shards.")
        found |= _tensors_of_file(path / file)
    if absent := sorted(set(weight_map) - set(found)):
        raise ValueError(f"{path / INDEX} names tensors that its files do not hold: {absent[:5]}.")
    return found


def _tensors_of_file(path: Path) -> dict[str, Tensor]:
    try:
        file = safetensors.safe_open(path, "np")
        return {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, safetensors.SafetensorError) as e:
        raise ValueError(f"{path} is not a whole safetensors file: {e}.") from e


def _tensor(file: Any, name: str) -> Tensor:
    return Tensor(tuple(file.get_slice(name).get_shape()), lambda: file.get_tensor(name))


def _turned(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape[::-1], lambda: tensor.read().T)


def _check_copy(path: Path, name: str, copy: Tensor, shared: Tensor) -> None:
    if copy.shape != shared.shape or not np.array_equal(copy.read(), shared.read()):
        raise ValueError(
            f"{path}: {name} differs from {SHARED}, but by this config T5 shares them; "
            "give the T5Config of this checkpoint (logits_via_embedding=False if its logits are untied)."
        )


def save_hf(params: Any, config: T5Config, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint that ``transformers.T5ForConditionalGeneration.from_pretrained`` reads.

    Each file appears whole or not at all.

    Args:
      params: a T5's parameters, stacked or not; written in their dtype.
      config: its shape.
      path: a directory; made if missing. Gets ``model.safetensors`` and ``config.json``.

    Raises:
      ValueError: the parameters are not those of ``config``, or ``transformers`` has no such T5;
        nothing is written.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import t5
      >>> config, tokens, path = t5.CONFIGS["tiny"], jnp.ones((1, 1), int), tempfile.mkdtemp()
      >>> params = t5.Transformer(config).init(jax.random.key(0), tokens, tokens, tokens)["params"]
      >>> t5.save_hf(params, config, path)
      >>> t5.load(path, config)["token_embedder"]["embedding"].shape
      (384, 64)
    """
    if config.mlp_activations not in _FEED_FORWARD:
        raise ValueError(
            f"transformers' T5 has no mlp_activations={config.mlp_activations}; it has {list(_FEED_FORWARD)}."
        )
    flat = parameters.flatten(parameters.unstack_layers(params))
    wanted = parameters.shapes(dataclasses.replace(config, scan_layers=False))
    parameters.check("the parameters", {p: x.shape for p, x in flat.items()}, wanted)
    tensors = {}
    for name, x in flat.items():
        x = np.asarray(jax.device_get(x))
        tensors[name_of(name)] = np.ascontiguousarray(x.T if is_transposed(name) else x)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with atomic_file(path / "config.json") as temporary:
        dtype = flat["token_embedder/embedding"].dtype
        temporary.write_text(json.dumps(_config_json(config, str(dtype)), indent=2) + "\n")
    with atomic_file(path / WEIGHTS) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})


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
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": _FEED_FORWARD[config.mlp_activations],
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": dtype,
    }
