"""The parameters' names, shapes, layouts and places on a mesh; no computation."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jax.sharding import Mesh, PartitionSpec

from dst_optax.finetuning.models.base import dividing, flatten, unflatten
from dst_optax.finetuning.models.t5.config import T5Config
from dst_optax.finetuning.models.t5.network import Transformer

LOGICAL_AXES = (
    (r"embedder/embedding$", ("vocab", "embed")),
    (r"/rel_embedding$", ("heads", "relpos_buckets")),
    (r"/(query|key|value)/kernel$", ("embed", "joined_kv")),
    (r"/out/kernel$", ("joined_kv", "embed")),
    (r"/wi(_\d+)?/kernel$", ("embed", "mlp")),
    (r"/wo/kernel$", ("mlp", "embed")),
    (r"/logits_dense/kernel$", ("embed", "vocab")),
    (r"/scale$", ("embed",)),
)
"""Names of each parameter's axes, by its path; those of T5X."""

AXIS_RULES = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("kv", None),
    ("relpos_buckets", None),
    ("length", None),
    ("layers", None),
)
"""Where axes lie on a mesh of ``data`` and ``model``: T5X's rules with one partitioned dimension."""

STACKED = re.compile(r"^(encoder|decoder)/\1/(.*)$")
LAYER = re.compile(r"^(encoder|decoder)/layers_(\d+)/(.*)$")


def shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path.

    Args:
      config: the model's shape.

    Returns:
      Path, spelled ``a/b/c``, to shape.

    Example:
      >>> from dst_optax.finetuning.models import t5
      >>> t5.shapes(t5.CONFIGS["byt5_small"])["encoder/layers_11/mlp/wi_0/kernel"]
      (1472, 3584)
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    params = jax.eval_shape(init, tokens, tokens, tokens)["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def num_params(config: T5Config) -> int:
    """How many parameters the model has.

    Example:
      >>> from dst_optax.finetuning.models import t5
      >>> t5.num_params(t5.CONFIGS["t5_1_1_small"])
      76961152
    """
    return sum(
        int(np.prod(shape)) for shape in shapes(dataclasses.replace(config, scan_layers=True)).values()
    )


def stack_layers(params: Any) -> dict[str, Any]:
    """Parameters as ``scan_layers=True`` has them, from those of ``scan_layers=False``.

    Args:
      params: a tree with ``encoder/layers_0``, ``encoder/layers_1`` and so on.

    Returns:
      The tree with ``encoder/encoder``, layers stacked along axis 1.

    Example:
      >>> import numpy as np
      >>> from dst_optax.finetuning.models import t5
      >>> layers = {f"layers_{i}": {"scale": np.ones(8)} for i in range(3)}
      >>> t5.stack_layers({"encoder": layers})["encoder"]["encoder"]["scale"].shape
      (8, 3)
    """
    flat: dict[str, Any] = {}
    stacks: dict[str, dict[int, Any]] = {}
    for path, x in flatten(params).items():
        if match := LAYER.match(path):
            stack, index, name = match.groups()
            stacks.setdefault(f"{stack}/{stack}/{name}", {})[int(index)] = x
        else:
            flat[path] = x
    for path, layers in stacks.items():
        xs = [layers[i] for i in range(len(layers))]
        flat[path] = _numpy_of(xs[0]).stack(xs, axis=1)
    return unflatten(flat)


def unstack_layers(params: Any) -> dict[str, Any]:
    """Parameters as ``scan_layers=False`` has them; the inverse of :func:`stack_layers`.

    Args:
      params: a tree with ``encoder/encoder`` and ``decoder/decoder``.

    Returns:
      The tree with ``encoder/layers_0`` and so on.

    Example:
      >>> import numpy as np
      >>> from dst_optax.finetuning.models import t5
      >>> sorted(t5.unstack_layers({"encoder": {"encoder": {"scale": np.ones((8, 2))}}})["encoder"])
      ['layers_0', 'layers_1']
    """
    flat: dict[str, Any] = {}
    for path, x in flatten(params).items():
        if match := STACKED.match(path):
            stack, name = match.groups()
            for i in range(x.shape[1]):
                flat[f"{stack}/layers_{i}/{name}"] = x[:, i]
        else:
            flat[path] = x
    return unflatten(flat)


def logical_axes(params: Any) -> Any:
    """Names of the parameters' axes.

    Args:
      params: parameters, or their shapes, stacked or not.

    Returns:
      A tree of ``PartitionSpec`` of names, to be mapped to a mesh's axes by rules.

    Example:
      >>> import numpy as np
      >>> from dst_optax.finetuning.models import t5
      >>> axes = t5.logical_axes({"encoder": {"encoder": {"mlp": {"wo": {"kernel": np.ones((8, 2, 4))}}}}})
      >>> tuple(axes["encoder"]["encoder"]["mlp"]["wo"]["kernel"])
      ('mlp', 'layers', 'embed')
    """

    def axes(path: str) -> PartitionSpec:
        names = next(names for pattern, names in LOGICAL_AXES if re.search(pattern, path))
        return PartitionSpec(names[0], "layers", *names[1:]) if STACKED.match(path) else PartitionSpec(*names)

    return unflatten({path: axes(path) for path in flatten(params)})


def shardings(params: Any, mesh: Mesh, rules: Sequence[tuple[str, Any]] = AXIS_RULES) -> Any:
    """Where the parameters lie on a mesh.

    Args:
      params: parameters, or their shapes, stacked or not.
      mesh: a mesh with the axes that the rules name.
      rules: ``(logical axis, mesh axis or None)`` pairs. An axis that the mesh does not divide evenly
        stays whole.

    Returns:
      A tree of ``NamedSharding``, for ``jax.device_put`` or ``jax.jit``.

    Example:
      >>> import jax, numpy as np
      >>> from dst_optax.finetuning.models import t5
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> placed = t5.shardings({"token_embedder": {"embedding": np.ones((4, 2))}}, mesh)
      >>> tuple(placed["token_embedder"]["embedding"].spec)
      ('model', None)
    """
    wanted = spmd.logical_to_mesh_sharding(logical_axes(params), mesh, rules)
    return jax.tree.map(lambda x, sharding: dividing(sharding, x.shape), params, wanted)


def _numpy_of(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np
