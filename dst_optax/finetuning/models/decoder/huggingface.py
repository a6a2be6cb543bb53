"""Hugging Face checkpoints of decoders: names, layouts, reading and writing.

:func:`tensors` is the one table of how our parameters relate to a checkpoint's tensors.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from dst_optax.atomic import atomic_file
from dst_optax.finetuning import hub
from dst_optax.finetuning.models.base import flatten, unflatten
from dst_optax.finetuning.models.decoder import config_json, parameters
from dst_optax.finetuning.models.decoder.config import DecoderConfig
from dst_optax.subset import models
from dst_optax.subset.coordinates import Tensor
from dst_optax.subset.dtypes import is_float

WEIGHTS = models.WEIGHTS
INDEX = models.INDEX
SHARD_BYTES = 5_000_000_000


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
    path, rows = Path(path), tensors(config)
    hub.require_safetensors(path)
    try:
        held = models.open_model(path)
    except OSError as e:
        raise ValueError(f"{path} is no whole checkpoint: {e}; download all of its files.") from e
    weights = {name: x for name, x in held.items() if not name.endswith(".inv_freq")}
    by_name = {row.name: row for row in rows}
    for row in rows:
        for copy in row.copies:
            if copy in weights and row.name in weights:
                _check_copy(path, copy, weights.pop(copy), row.name, weights[row.name])
    _check(path, {name: x.shape for name, x in weights.items()}, {row.name: row.shape for row in rows})
    params: dict[str, np.ndarray] = {}
    for path_of, shape in parameters.shapes(config).items():
        held_as = [weights[row.name].dtype for row in rows if row.path == path_of]
        params[path_of] = np.empty(shape, dtype or np.result_type(*held_as))
    for name, row in by_name.items():
        row.place(params[row.path], _values(path, name, weights[name]))
    return unflatten(params)


def _values(path: Path, name: str, x: Any) -> np.ndarray:
    if not is_float(x.dtype):
        raise ValueError(f"{path}: {name} has dtype {x.dtype}; parameters are floating-point numbers.")
    return np.asarray(x)


def _check_copy(path: Path, name: str, copy: Any, original: str, values: Any) -> None:
    if copy.shape != values.shape or not np.array_equal(copy, values):
        raise ValueError(
            f"{path}: {name} differs from {original}, but its config.json says that they are tied; set "
            "tie_word_embeddings to false there if they are not."
        )


def _check(path: Any, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError that names what is missing, what is too much and what has another shape."""
    faults = [
        f"{name} has shape {tuple(shapes[name])}, the model's is {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    faults += [f"{name} is missing" for name in wanted if name not in shapes]
    faults += [f"{name} has no place in the model" for name in shapes if name not in wanted]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{path} does not fit its config: {'; '.join(faults[:5])}{more}. Give the config.json of this "
            "checkpoint."
        )


def save_hf(
    params: Any,
    config: DecoderConfig,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
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
      ValueError: the parameters are not those of ``config``; nothing is written.

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
    _check("the parameters", {p: x.shape for p, x in flat.items()}, parameters.shapes(config))
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(flat["embed_tokens/embedding"].dtype)
    config_text = config_json.config_text(config, dtype)
    if source is not None:
        settings = json.loads((Path(source) / config_json.CONFIG).read_text())
        config_text = json.dumps(settings | {"torch_dtype": dtype, "dtype": dtype}, indent=2) + "\n"
        hub.copy_settings(Path(source), path)
    shards = _shards(tensors(config), flat, shard_bytes)
    for name, rows in shards.items():
        held = {row.name: np.ascontiguousarray(row.take(_on_host(flat[row.path]))) for row in rows}
        with atomic_file(path / name) as temporary:
            safetensors.numpy.save_file(held, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in flat.values())},
            "weight_map": {row.name: name for name, rows in shards.items() for row in rows},
        }
        with atomic_file(path / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n")
    with atomic_file(path / config_json.CONFIG) as temporary:
        temporary.write_text(config_text)


def _shards(rows: Sequence[Tensor], params: Mapping[str, Any], limit: int) -> dict[str, list[Tensor]]:
    """Which tensors go into which file: in order, each file as full as it may be."""
    files: list[list[Tensor]] = [[]]
    full = 0
    for row in rows:
        size = math.prod(row.shape) * params[row.path].dtype.itemsize
        if files[-1] and full + size > limit:
            files.append([])
            full = 0
        files[-1].append(row)
        full += size
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": held for i, held in enumerate(files)}


def _on_host(x: Any) -> np.ndarray:
    return np.asarray(jax.device_get(x))
