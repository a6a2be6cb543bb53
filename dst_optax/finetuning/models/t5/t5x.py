"""Checkpoints with T5X's names, those of the minimal and of the scalable T5."""

import math
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dst_optax.finetuning.models.t5.parameters import STACKED, Tensor


def renamed(path: Path, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by our paths, layers unstacked, none read yet.

    Checkpoints of the scalable T5 fit when all layers have the same relative position bias.

    Args:
      path: of the checkpoint, for errors.
      arrays: arrays by T5X's paths.

    Returns:
      Path to tensor.

    Raises:
      ValueError: layers have different relative position biases.
    """
    return _unstacked(
        path, {name: Tensor(tuple(x.shape), partial(np.asarray, x)) for name, x in arrays.items()}
    )


def _unstacked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of single layers from stacked ones; attention kernels with two axes."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = STACKED.match(name)
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
