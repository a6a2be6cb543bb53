"""Checkpoints with T5X's names, those of the minimal and of the scalable T5."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from dst_optax.finetuning.models import checkpoints
from dst_optax.finetuning.models.t5 import parameters
from dst_optax.finetuning.models.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter in a file, read when it is wanted.

    Attributes:
      shape: its shape.
      read: reads it.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read(path: Path, arrays: Mapping[str, Any], config: T5Config, dtype: DTypeLike | None) -> dict[str, Any]:
    """The parameters that a checkpoint holds; names and shapes are checked before most values are read.

    Checkpoints of the scalable T5 fit when all layers have the same relative position bias.

    Args:
      path: of the checkpoint, for errors.
      arrays: arrays by T5X's paths.
      config: the model's shape; with ``scan_layers`` its layers are stacked.
      dtype: dtype of the parameters; None keeps the checkpoint's.

    Returns:
      The tree of parameters.

    Raises:
      ValueError: the checkpoint is of another model, or layers have different relative position biases.
    """
    tensors = _unstacked(
        path, {name: Tensor(tuple(x.shape), partial(np.asarray, x)) for name, x in arrays.items()}
    )
    wanted = parameters.shapes(dataclasses.replace(config, scan_layers=False))
    checkpoints.check(path, {name: tensor.shape for name, tensor in tensors.items()}, wanted)
    params = parameters.unflatten({name: _values(path, name, tensors[name], dtype) for name in wanted})
    return parameters.stack_layers(params) if config.scan_layers else params


def _unstacked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of single layers from stacked ones; attention kernels with two axes."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = parameters.STACKED.match(name)
        if match is None:
            flat[name] = tensor
            continue
        stack, rest = match.groups()
        values = cache(tensor.read)
        if rest == "relpos_bias/rel_embedding":
            flat[f"{stack}/{rest}"] = _shared_bias(path, name, tensor)
            continue
        shape = tensor.shape[:1] + tensor.shape[2:]
        if len(shape) == 3:  # heads are an axis of their own
            head, tail = shape[:-1], shape[1:]
            shape = (math.prod(head), shape[-1]) if "/out/" in rest else (shape[0], math.prod(tail))
        for i in range(tensor.shape[1]):
            flat[f"{stack}/layers_{i}/{rest}"] = Tensor(
                shape, lambda i=i, values=values, shape=shape: values()[:, i].reshape(shape)
            )
    return flat


def _shared_bias(path: Path, name: str, tensor: Tensor) -> Tensor:
    values = tensor.read()
    if not (values == values[:, :1]).all():
        raise ValueError(
            f"{path}: {name} differs between layers, as in umT5 and models trained with T5X's scalable_t5; "
            "T5 1.0, T5 1.1 and ByT5 share it, and only those are supported."
        )
    return Tensor(values[:, 0].shape, lambda: values[:, 0])


def _values(path: Path, name: str, tensor: Tensor, dtype: DTypeLike | None) -> np.ndarray:
    x = tensor.read()
    checkpoints.float_dtype(path, name, x)
    return np.array(x, dtype, order="C")
