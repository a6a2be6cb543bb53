"""Hugging Face checkpoints of decoders: names, layouts, reading and writing.

:func:`tensors` is the one table of how our parameters relate to a checkpoint's tensors.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from dst_optax.finetuning import hub
from dst_optax.finetuning.models import checkpoints
from dst_optax.finetuning.models.base import flatten, unflatten
from dst_optax.finetuning.models.decoder import config_json, parameters
from dst_optax.finetuning.models.decoder.config import DecoderConfig
from dst_optax.subset import models
from dst_optax.subset.coordinates import Tensor


def tensors(config: DecoderConfig) -> list[Tensor]:
    """Every tensor of a checkpoint, in the order of the layers.

    Args:
      config: the model's shape; ``scan_layers`` decides where the tensors lie in our parameters.

    Returns:
      One row a tensor. Together they fill every parameter.

    Example:
      >>> from dst_optax.finetuning.models import decoder
      >>> config = decoder.CONFIGS["smollm2_135m"]
      >>> decoder.tensors(config)[1].name
      'model.layers.0.input_layernorm.weight'
    """
    size = parameters.sizes(config)

    def tensor(name: str, path: str, axes: Sequence[str], **where: Any) -> Tensor:
        shape = tuple(size[axis] for axis in axes)
        transposed = path.endswith("/kernel")
        return Tensor(name, shape[::-1] if transposed else shape, path, transposed, **where)

    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    rows = [
        tensor("model.embed_tokens.weight", "embed_tokens/embedding", ("vocab", "embed"), copies=tied),
    ]
    for i in range(config.num_layers):
        for path, axes in parameters.layer_axes(config).items():
            name = f"model.layers.{i}.{_name(path)}"
            if config.scan_layers:
                rows.append(tensor(name, f"layers/{path}", axes, layer=i))
            else:
                rows.append(tensor(name, f"layers_{i}/{path}", axes))
    rows.append(tensor("model.norm.weight", "norm/scale", ("embed",)))
    if not config.tie_embeddings:
        rows.append(tensor("lm_head.weight", "lm_head/kernel", ("embed", "vocab")))
    return rows


def _name(path: str) -> str:
    """``self_attn/q_proj/kernel`` in Hugging Face's spelling, ``self_attn.q_proj.weight``."""
    module, leaf = path.rsplit("/", 1)
    return f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"


def load(
    path: str | os.PathLike[str], config: DecoderConfig, dtype: DTypeLike | None = "float32"
) -> dict[str, Any]:
    """Loads parameters from a Hugging Face checkpoint.

    Names and shapes are checked, all of them, before any value is read.

    Args:
      path: a directory of Hugging Face's, with one safetensors file or an index of several; or one file.
      config: the model's shape; with ``scan_layers`` its layers are stacked.
      dtype: dtype of the parameters; None keeps the checkpoint's, of stacked layers the widest.

    Returns:
      Parameters as numpy arrays in the host's memory; ``jax.device_put(params, decoder.shardings(config,
      mesh))`` places them.

    Raises:
      ValueError: no such checkpoint, a damaged one, or one of another model.

    Example:
      >>> import dataclasses, tempfile, jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import decoder
      >>> config = decoder.DecoderConfig("llama", 32, 16, 2, 4, 2, 8, 24, tie_embeddings=True)
      >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.ones((1, 1), int))["params"]
      >>> path = tempfile.mkdtemp()
      >>> decoder.save_hf(params, config, path)
      >>> stacked = decoder.load(path, dataclasses.replace(config, scan_layers=True), dtype="bfloat16")
      >>> stacked["layers"]["mlp"]["down_proj"]["kernel"].shape
      (24, 2, 16)
    """
    path = Path(path)
    hub.require_safetensors(path)
    try:
        held = models.open_model(path)
    except OSError as e:
        raise ValueError(f"{path} is no whole checkpoint: {e}; download all of its files.") from e
    weights = {name: x for name, x in held.items() if not name.endswith(".inv_freq")}
    return unflatten(checkpoints.read(path, weights, tensors(config), parameters.shapes(config), dtype))


def save_hf(
    params: Any,
    config: DecoderConfig,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    shard_bytes: int = checkpoints.SHARD_BYTES,
) -> None:
    """Writes a checkpoint that ``transformers.AutoModelForCausalLM.from_pretrained`` reads.

    Each file appears whole or not at all; the configuration comes last.

    Args:
      params: the parameters, stacked or not as ``config`` says; written in their dtype.
      config: the model's shape.
      path: a directory; made if missing.
      source: the directory of a checkpoint of the same model, whose tokenizer and settings are copied.
      shard_bytes: weights beyond so many bytes are written as several files and an index.

    Raises:
      ValueError: the parameters are not those of ``config``, or a model lies in ``path`` and not as one file
        that one file replaces whole; nothing is written.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import decoder
      >>> config = decoder.DecoderConfig("llama", 32, 16, 2, 4, 2, 8, 24, tie_embeddings=True)
      >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.ones((1, 1), int))["params"]
      >>> path = Path(tempfile.mkdtemp())
      >>> decoder.save_hf(params, config, path)
      >>> sorted(file.name for file in path.iterdir())
      ['config.json', 'model.safetensors']
    """
    flat = flatten(params)
    checkpoints.check("the parameters", {p: x.shape for p, x in flat.items()}, parameters.shapes(config))
    dtype = str(flat["embed_tokens/embedding"].dtype)
    config_text = config_json.config_text(config, dtype)
    if source is not None:
        source = Path(source)
        settings = json.loads((source / config_json.CONFIG).read_text())
        config_text = json.dumps(settings | {"torch_dtype": dtype, "dtype": dtype}, indent=2) + "\n"
    checkpoints.write(Path(path), flat, tensors(config), config_text, shard_bytes, source)
