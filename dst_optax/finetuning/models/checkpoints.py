"""Hugging Face checkpoints by a family's table: one row relates a tensor of theirs to a parameter of ours."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from dst_optax.atomic import atomic_file
from dst_optax.finetuning import hub
from dst_optax.subset import models
from dst_optax.subset.coordinates import Tensor
from dst_optax.subset.dtypes import is_float

SHARD_BYTES = 5_000_000_000

Shapes = Mapping[str, tuple[int, ...]]


def read(
    path: Path, held: Mapping[str, Any], table: Sequence[Tensor], shapes: Shapes, dtype: DTypeLike | None
) -> dict[str, np.ndarray]:
    """The parameters that a checkpoint holds; names, shapes and dtypes are checked before any value is read.

    Args:
      path: of the checkpoint, for errors.
      held: its arrays by name.
      table: one row a tensor; together they fill every parameter.
      shapes: path to shape of the parameters.
      dtype: of the parameters; None keeps the checkpoint's, of stacked layers the widest.

    Returns:
      Path to parameter.

    Raises:
      ValueError: the checkpoint is of another model, or copies of a tensor that the model ties differ.

    Example:
      >>> import numpy as np
      >>> table = [Tensor("proj.weight", (3, 2), "proj/kernel", True)]
      >>> held = {"proj.weight": np.ones((3, 2), np.float32)}
      >>> read(Path("m"), held, table, {"proj/kernel": (2, 3)}, None)["proj/kernel"].shape
      (2, 3)
    """
    copies = {copy: row.name for row in table for copy in row.copies if copy in held and row.name in held}
    own = {name: x.shape for name, x in held.items() if name not in copies}
    check(path, own, {row.name: row.shape for row in table})
    parts: dict[str, list[np.dtype]] = {}
    for row in table:
        parts.setdefault(row.path, []).append(float_dtype(path, row.name, held[row.name]))
    for copy, original in copies.items():
        _check_copy(path, copy, held[copy], original, held[original])
    params = {p: np.empty(shape, dtype or np.result_type(*parts[p])) for p, shape in shapes.items()}
    for row in table:
        row.place(params[row.path], np.asarray(held[row.name]))
    return params


def write(
    directory: Path,
    params: Mapping[str, Any],
    table: Sequence[Tensor],
    config: str,
    shard_bytes: int = SHARD_BYTES,
    source: Path | None = None,
) -> None:
    """Writes a checkpoint of which each file appears whole or not at all; the configuration comes last.

    Args:
      directory: made if it is missing.
      params: path to parameter; written in their dtype.
      table: one row a tensor.
      config: text of ``config.json``.
      shard_bytes: weights beyond so many bytes are written as several files and an index.
      source: a checkpoint whose tokenizer and settings are copied.

    Raises:
      ValueError: another model lies there and not as one file that one file replaces whole; nothing is
        written.

    Example:
      >>> import tempfile, numpy as np
      >>> table = [Tensor(f"{name}.weight", (2,), name, False) for name in "ab"]
      >>> directory = Path(tempfile.mkdtemp())
      >>> write(directory, {"a": np.ones(2), "b": np.ones(2)}, table, "{}", shard_bytes=16)
      >>> sorted(file.name for file in directory.glob("*.safetensors"))
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    shards = _shards(table, params, shard_bytes)
    for name in (models.INDEX, *([models.WEIGHTS] if len(shards) > 1 else [])):
        if (directory / name).exists():  # files that are replaced one by one would be a mixture for a while
            raise ValueError(
                f"{directory} holds a model with a {name}, which the new one cannot replace at once. Give "
                "another directory, or move that model away."
            )
    directory.mkdir(parents=True, exist_ok=True)
    if source is not None:
        hub.copy_settings(source, directory)
    for name, rows in shards.items():
        held = {row.name: np.ascontiguousarray(row.take(jax.device_get(params[row.path]))) for row in rows}
        with atomic_file(directory / name) as temporary:
            safetensors.numpy.save_file(held, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in params.values())},
            "weight_map": {row.name: name for name, rows in shards.items() for row in rows},
        }
        with atomic_file(directory / models.INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n")
    with atomic_file(directory / "config.json") as temporary:
        temporary.write_text(config)


def check(source: Any, given: Shapes, wanted: Shapes) -> None:
    """Raises a ValueError that names what is missing, what is too much and what has another shape.

    Example:
      >>> check("the parameters", {"w": (2,)}, {"w": (2,)})
    """
    faults = [
        f"{name} has shape {tuple(given[name])}, the model's is {shape}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name]) != shape
    ]
    faults += [f"{name} is missing" for name in wanted if name not in given]
    faults += [f"{name} has no place in the model" for name in given if name not in wanted]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{source} does not fit the config: {'; '.join(faults[:5])}{more}. Give the configuration of "
            "this model."
        )


def float_dtype(path: Path, name: str, x: Any) -> np.dtype:
    """The dtype of a parameter in a checkpoint; a ValueError if it holds no floating-point numbers.

    Example:
      >>> import numpy as np
      >>> float_dtype(Path("m"), "w", np.ones(2))
      dtype('float64')
    """
    if not is_float(x.dtype):
        raise ValueError(f"{path}: {name} has dtype {x.dtype}; parameters are floating-point numbers.")
    return x.dtype


def _check_copy(path: Path, name: str, copy: Any, original: str, values: Any) -> None:
    if copy.shape != values.shape or not np.array_equal(copy, values):
        raise ValueError(
            f"{path}: {name} differs from {original}, but by the model's configuration they are one tensor. "
            "If the checkpoint has two, correct its config.json, or give the configuration that it has."
        )


def _shards(table: Sequence[Tensor], params: Mapping[str, Any], limit: int) -> dict[str, list[Tensor]]:
    """Which tensors go into which file: in order, each file as full as it may be."""
    files: list[list[Tensor]] = [[]]
    full = 0
    for row in table:
        size = math.prod(row.shape) * params[row.path].dtype.itemsize
        if files[-1] and full + size > limit:
            files.append([])
            full = 0
        files[-1].append(row)
        full += size
    if len(files) == 1:
        return {models.WEIGHTS: files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": held for i, held in enumerate(files)}
