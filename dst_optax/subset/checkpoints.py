"""T5X and Orbax checkpoints as mappings from a path to an array that is read when it is used."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
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


def open_parameters(path: pathlib.Path) -> dict[str, Any] | None:
    """The parameters of a checkpoint: what lies under ``target`` or ``params``, or all.

    Args:
      path: an Orbax checkpoint; T5X's, of Orbax or of the time before (a msgpack file and zarr
        directories); or such a file. Anything that has pathlib's methods.

    Returns:
      Arrays by path, :class:`StoredArray` but for those within the msgpack file; None where no checkpoint
      lies.

    Raises:
      SubsetError: it is missing, truncated or of another kind.
    """
    return _open(path, ("optimizer", "target", "params"))


def open_state(path: pathlib.Path) -> dict[str, Any] | None:
    """All arrays of a checkpoint, the optimizer's too; see :func:`open_parameters`."""
    return _open(path, ("optimizer",))


def _open(path: pathlib.Path, above: Sequence[str]) -> dict[str, Any] | None:
    for directory in (path, path / "state"):  # T5X's is in ``state``
        if (directory / "_METADATA").exists():
            return _open_orbax(directory, above)
    for file in (path, path / "checkpoint"):
        if file.is_file():
            return _open_legacy(file, above)
    return None


def _open_orbax(path: pathlib.Path, above: Sequence[str]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    where = path if "://" in os.fspath(path) else path.absolute()

    def metadata() -> Any:
        found: Any = checkpointer.metadata(where).item_metadata
        if found is None:
            raise ValueError("its _METADATA is damaged")
        return found.tree

    everything = _tried(f"{path} cannot be read as a checkpoint", metadata)
    keys, tree = _under(everything, above)

    def read(key_path: Any) -> np.ndarray:
        item = _pruned(everything, [*keys, *(getattr(k, "key", None) for k in key_path)])
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=wanted, partial_restore=True)
        name = leaf_path(key_path)
        restored = _tried(f"{path}: {name} cannot be read", lambda: checkpointer.restore(where, args=args))
        return trees.named_leaves(_under(restored, above)[1])[name]

    def stored(key_path: Any, x: Any) -> StoredArray:
        return StoredArray(tuple(x.shape), np.dtype(x.dtype), lambda: read(key_path))

    return trees.named_leaves(jax.tree_util.tree_map_with_path(stored, tree), str(path))


def _open_legacy(path: pathlib.Path, above: Sequence[str]) -> dict[str, Any]:
    import msgpack

    content = _tried(
        f"{path} cannot be read as a checkpoint",
        lambda: msgpack.unpackb(path.read_bytes(), ext_hook=_array, strict_map_key=False),
    )
    _, tree = _under(content, above)
    is_spec = lambda x: isinstance(x, dict) and "kvstore" in x  # noqa: E731
    arrays = jax.tree_util.tree_map_with_path(
        lambda k, x: _legacy_array(path, leaf_path(k), x), tree, is_leaf=is_spec
    )
    return trees.named_leaves(arrays, str(path))


def _under(tree: Any, above: Sequence[str]) -> tuple[list[str], Any]:
    """Those of the keys that there are, and what lies under them."""
    keys = []
    for key in above:
        if isinstance(tree, dict) and key in tree:
            keys.append(key)
            tree = tree[key]
    return keys, tree


def _pruned(tree: Any, keys: list[Any]) -> Any:
    """Of nested dictionaries only those on the way; what is no dictionary stays whole."""
    return {keys[0]: _pruned(tree[keys[0]], keys[1:])} if isinstance(tree, dict) else tree


def _legacy_array(path: pathlib.Path, name: str, leaf: Any) -> Any:
    """An array in the file as it is; one that the file only names as the zarr directory beside it."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        leaf = {"driver": "zarr", "kvstore": {"path": leaf.removeprefix(_PLACEHOLDER)}}
    if not isinstance(leaf, dict):
        return leaf
    import tensorstore as ts

    directory = path.parent / pathlib.PurePath(leaf["kvstore"].get("path") or leaf["path"]).name
    where = os.fspath(directory)
    store = f"{where}/" if "://" in where else {"driver": "file", "path": f"{os.path.abspath(where)}/"}
    spec = {"driver": leaf["driver"], "kvstore": store}
    failed = f"{path}: {name} cannot be read from {directory}"
    stored = _tried(failed, lambda: ts.open(spec, open=True, read=True).result())
    halves = stored.dtype.numpy_dtype == np.uint16  # T5X's bfloat16 until June 2021
    dtype = np.dtype(ml_dtypes.bfloat16) if halves else stored.dtype.numpy_dtype
    return StoredArray(
        tuple(stored.shape), dtype, lambda: _tried(failed, lambda: stored.read().result().view(dtype))
    )


def _array(code: int, data: bytes) -> np.ndarray:
    """Flax's extension 1 of msgpack: shape, name of the dtype, bytes; 3 is a scalar of the same form."""
    import msgpack

    if code not in (1, 3):
        raise ValueError(f"the msgpack extension {code} is unknown")
    shape, dtype, content = msgpack.unpackb(data)
    return np.frombuffer(content, np.dtype(getattr(ml_dtypes, dtype, dtype))).reshape(shape)


def _tried(failed: str, f: Callable[[], Any]) -> Any:
    try:
        return f()
    except Exception as e:  # msgpack, orbax and tensorstore raise what comes their way
        raise SubsetError(f"{failed}: {type(e).__name__}: {str(e)[:300]}") from e
