"""T5X and Orbax checkpoints as mappings from a path to an array that is read when it is used."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dst_optax.silos import leaf_path
from dst_optax.subset import trees
from dst_optax.subset.errors import SubsetError

_PLACEHOLDER = "PLACEHOLDER://"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """An array on disk; ``numpy.asarray`` reads it, every time.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      read: reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def open_orbax(path: pathlib.Path) -> dict[str, Any]:
    """The parameters of an Orbax checkpoint: what lies under ``target`` or ``params``, or all.

    Raises:
      SubsetError: Orbax cannot read it.
    """
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def metadata() -> Any:
        found: Any = checkpointer.metadata(path.absolute()).item_metadata
        return found.tree

    everything = _tried(path, metadata)
    above, tree = _parameters(everything)

    def read(key_path: Any) -> np.ndarray:
        item = _pruned(everything, [*above, *(getattr(k, "key", None) for k in key_path)])
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=wanted, partial_restore=True)
        restored = _tried(path, lambda: checkpointer.restore(path.absolute(), args=args))
        return trees.named_leaves(_parameters(restored)[1])[leaf_path(key_path)]

    def stored(key_path: Any, x: Any) -> StoredArray:
        return StoredArray(tuple(x.shape), np.dtype(x.dtype), lambda: read(key_path))

    return trees.named_leaves(jax.tree_util.tree_map_with_path(stored, tree), str(path))


def open_legacy(path: pathlib.Path) -> dict[str, Any]:
    """The parameters of a T5X checkpoint of the time before Orbax: a msgpack file and zarr directories.

    Raises:
      SubsetError: it is missing, truncated or of another kind.
    """
    import msgpack

    content = _tried(path, lambda: msgpack.unpackb(path.read_bytes(), ext_hook=_array, strict_map_key=False))
    _, tree = _parameters(content)
    is_spec = lambda x: isinstance(x, dict) and "kvstore" in x  # noqa: E731
    arrays = jax.tree.map(lambda x: _legacy_array(path, x), tree, is_leaf=is_spec)
    return trees.named_leaves(arrays, str(path))


def _parameters(tree: Any) -> tuple[list[str], Any]:
    """The keys under which the parameters lie, and they."""
    above = []
    for key in ("optimizer", "target", "params"):
        if isinstance(tree, dict) and key in tree:
            above.append(key)
            tree = tree[key]
    return above, tree


def _pruned(tree: Any, keys: list[Any]) -> Any:
    """Of nested dictionaries only those on the way; what is no dictionary stays whole."""
    return {keys[0]: _pruned(tree[keys[0]], keys[1:])} if isinstance(tree, dict) else tree


def _legacy_array(path: pathlib.Path, leaf: Any) -> Any:
    """An array in the file as it is; one that the file only names as the zarr directory beside it."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        leaf = {"driver": "zarr", "kvstore": {"path": leaf.removeprefix(_PLACEHOLDER)}}
    if not isinstance(leaf, dict):
        return leaf
    import tensorstore as ts

    name = leaf["kvstore"].get("path") or leaf["path"]
    directory = path.parent / pathlib.PurePath(name).name
    spec = {"driver": leaf["driver"], "kvstore": {"driver": "file", "path": f"{directory.absolute()}/"}}
    stored = _tried(directory, lambda: ts.open(spec, open=True, read=True).result())
    halves = stored.dtype.numpy_dtype == np.uint16  # T5X's bfloat16 until June 2021
    dtype = np.dtype(ml_dtypes.bfloat16) if halves else stored.dtype.numpy_dtype
    return StoredArray(
        tuple(stored.shape), dtype, lambda: _tried(directory, lambda: stored.read().result().view(dtype))
    )


def _array(code: int, data: bytes) -> np.ndarray:
    """Flax's extension 1 of msgpack: shape, name of the dtype, bytes; 3 is a scalar of the same form."""
    import msgpack

    if code not in (1, 3):
        raise ValueError(f"the msgpack extension {code} is unknown")
    shape, dtype, content = msgpack.unpackb(data)
    return np.frombuffer(content, np.dtype(getattr(ml_dtypes, dtype, dtype))).reshape(shape)


def _tried(path: pathlib.Path, f: Callable[[], Any]) -> Any:
    try:
        return f()
    except Exception as e:  # msgpack, orbax and tensorstore raise what comes their way
        raise SubsetError(f"{path} cannot be read as a checkpoint: {type(e).__name__}: {str(e)[:300]}") from e
