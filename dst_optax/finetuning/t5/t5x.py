"""T5X checkpoints: the legacy format (msgpack and tensorstore) and Orbax."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization

from dst_optax.finetuning.t5.parameters import STACKED, Tensor, flatten

_PLACEHOLDER = "PLACEHOLDER://"


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
    directory = path / "state" if (path / "state").is_dir() else path
    if (directory / "_METADATA").is_file():
        tensors = _read_orbax(directory)
    else:
        tensors = _read_legacy(directory / "checkpoint" if directory.is_dir() else directory)
    return _unstacked(path, tensors)


def _read_legacy(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = serialization.msgpack_restore(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: no T5X checkpoint lies there.") from None
    except Exception as e:  # msgpack and flax raise what comes their way
        raise ValueError(f"{path} is not a whole T5X checkpoint: {type(e).__name__}: {e}.") from e
    try:
        target = content.get("optimizer", content)["target"]
        leaves = flatten(_specs_as_leaves(target))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} holds no parameters under 'target', where T5X writes them.") from e
    return {name: _legacy_tensor(path, name, leaf) for name, leaf in leaves.items()}


class _Spec(NamedTuple):
    """A tensorstore, relative to the checkpoint."""

    driver: str
    directory: str


def _specs_as_leaves(tree: Any) -> Any:
    if isinstance(tree, str) and tree.startswith(_PLACEHOLDER):
        return _Spec("zarr", tree.removeprefix(_PLACEHOLDER))
    if not isinstance(tree, dict):
        return tree
    if "kvstore" in tree:
        return _Spec(tree["driver"], tree["kvstore"].get("path") or tree["path"])
    return {name: _specs_as_leaves(child) for name, child in tree.items()}


def _legacy_tensor(path: Path, name: str, leaf: Any) -> Tensor:
    if isinstance(leaf, np.ndarray):
        return Tensor(leaf.shape, lambda: leaf)
    if not isinstance(leaf, _Spec):
        raise ValueError(f"{path}: {name} is neither an array nor a tensorstore, but {leaf!r:.80}.")
    directory = path.parent / Path(leaf.directory).name
    spec = {"driver": leaf.driver, "kvstore": {"driver": "file", "path": f"{directory.absolute()}/"}}

    def read(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except (ValueError, OSError) as e:
            raise ValueError(f"{path}: the values of {name} cannot be read from {directory}: {e}") from e

    array = read(ts.open(spec, open=True, read=True).result)

    def values() -> np.ndarray:
        x = read(array.read().result)
        return x.view(jnp.bfloat16) if x.dtype == np.uint16 else x  # T5X's bfloat16 until June 2021

    return Tensor(tuple(array.shape), values)


def _read_orbax(path: Path) -> dict[str, Tensor]:
    path = path.absolute()
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        metadata: Any = checkpointer.metadata(path).item_metadata
        tree = metadata.tree
        part = {"target": tree["target"]} if "target" in tree else tree
        leaves = flatten(part)
        shapes = {name.removeprefix("target/"): tuple(leaf.shape) for name, leaf in leaves.items()}
    except Exception as e:  # orbax raises what comes its way
        raise ValueError(f"{path} is not a whole Orbax checkpoint: {type(e).__name__}: {e}") from e

    @cache
    def values() -> dict[str, np.ndarray]:
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
        args = ocp.args.PyTreeRestore(item=part, restore_args=wanted, partial_restore=True)
        try:
            restored = flatten(checkpointer.restore(path, args=args))
        except Exception as e:  # as above
            raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from e
        return {name.removeprefix("target/"): x for name, x in restored.items()}

    return {name: Tensor(shape, lambda name=name: values()[name]) for name, shape in shapes.items()}


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
