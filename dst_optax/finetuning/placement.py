"""Where arrays lie on the devices: a mesh of ``data`` and ``model``, models' own rules."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dst_optax.finetuning import storage
from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.models.base import LanguageModel
from dst_optax.tree import map_named


def make_mesh(shape: tuple[int, int] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      shape: devices along ``data`` and ``model``; None puts all along ``data``.

    Raises:
      ValueError: the shape is not that of the devices there are.
    """
    shape = shape or (jax.device_count(), 1)
    if not isinstance(shape, tuple | list) or len(shape) != 2 or not all(isinstance(n, int) for n in shape):
        raise ValueError(f"mesh_shape {shape!r} is no pair of devices along data and model, such as (4, 2).")
    if shape[0] * shape[1] != jax.device_count():
        raise ValueError(f"mesh_shape {shape} does not hold the {jax.device_count()} devices there are.")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=kinds)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are divided along ``data``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_model(model: LanguageModel, params: Params, mesh: Mesh) -> Params:
    """Puts a model's parameters on the devices, divided as their logical axes say."""
    return jax.device_put(params, model.shardings(params, mesh))


def place_added(tuned: Params, mesh: Mesh) -> Params:
    """Puts parameters that a method added on every device; those of the model stay where they are."""

    def place(x: jax.Array) -> jax.Array:
        on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if on_mesh else jax.device_put(x, replicated(mesh))

    return jax.tree.map(place, tuned)


def place_like(opt_state: Any, tuned: Params, mesh: Mesh) -> Any:
    """Puts an optimizer's arrays beside the parameters that they belong to, all others on every device."""
    shardings = {name: (x.shape, x.sharding) for name, x in storage.named_leaves(tuned).items()}

    def place(path: str, x: Any) -> Any:
        for name, (shape, sharding) in shardings.items():
            if x.shape == shape and f"/{path}".endswith(f"/{name}"):
                return jax.device_put(x, sharding)
        return jax.device_put(x, replicated(mesh))

    return map_named(place, opt_state)
