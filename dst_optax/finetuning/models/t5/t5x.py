"""T5X checkpoints: the legacy format (msgpack and tensorstore) and Orbax."""

import math
from functools import cache, partial
from pathlib import Path

import numpy as np

from dst_optax.finetuning.models.t5.parameters import STACKED, Tensor
from dst_optax.subset import models


def read(path: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint by their paths, layers unstacked, none read yet.

    The optimizer's state is left alone. Checkpoints of the scalable T5 fit when all layers have the
    same relative position bias.

    Args:
      path: a directory ``checkpoint_<step>`` that T5X wrote, or a msgpack file of the time before.

    Returns:
      Path to tensor.

    Raises:
      ValueError: the checkpoint is missing, truncated or of another kind.
    """
    arrays = models.open_model(path)
    return _unstacked(
        path, {name: Tensor(tuple(x.shape), partial(np.asarray, x)) for name, x in arrays.items()}
    )


def _unstacked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of single layers from stacked ones; attention kernels with two axes."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = STACKED.match(name)
        if found is None:
            flat[name] = tensor
            continue
        stack, rest = found.groups()
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
