"""T5X and Orbax checkpoints as mappings from a path to an array that is read when it is used."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dst_optax.subset import training_state, trees
from dst_optax.subset.errors import SubsetError
from dst_optax.tree import leaf_path

_PLACEHOLDER = "PLACEHOLDER://"
_METADATA = "_METADATA"
_CHUNKED = "__msgpack_chunked_array__"


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


def open_parameters(path: pathlib.Path, names: Iterable[str] | None = None) -> dict[str, Any] | None:
    """The parameters of a checkpoint, without what training keeps beside them.

    Args:
      path: an Orbax checkpoint, also a step of its ``CheckpointManager``; T5X's, of Orbax or of the time
        before (a msgpack file and zarr directories); or a msgpack file of Flax. Anything that has pathlib's
        methods.
      names: paths of the parameters, where they are known; see :func:`training_state.parameter_keys`.

    Returns:
      Arrays by path, :class:`StoredArray` but for those within the msgpack file; None where no checkpoint
      lies.

    Raises:
      SubsetError: it is missing, truncated or of another kind, or holds no parameters.
    """
    arrays = _open(path, lambda tree: training_state.parameter_keys(tree, names))
    if arrays is None:
        return None
    training_state.check(path, arrays)
    return _unboxed(arrays, set(names or ()))


def open_state(path: pathlib.Path) -> dict[str, Any] | None:
    """All arrays of a checkpoint of T5X, the optimizer's too; see :func:`open_parameters`."""
    return _open(path, training_state.t5x_keys)


def _unboxed(arrays: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Arrays by the paths of their flax variables, of which a checkpoint keeps the array as ``value``."""

    def unboxed(name: str) -> str:
        path = name.removesuffix("/value")
        alone = all(other == name or not other.startswith(f"{path}/") for other in arrays)
        return path if alone and name not in names else name

    return {unboxed(name) if name.endswith("/value") else name: x for name, x in arrays.items()}


def _open(path: pathlib.Path, locate: Callable[[Any], list[str]]) -> dict[str, Any] | None:
    if (directory := _orbax_directory(path)) is not None:
        return _open_orbax(directory, locate)
    for file in (path, path / "checkpoint"):
        if file.is_file():
            return _open_legacy(file, locate)
    return None


def _orbax_directory(path: pathlib.Path) -> pathlib.Path | None:
    """Where Orbax's files lie: here, or in the one item of a step that holds a model."""
    for directory in (path, path / "state", path / "default"):  # T5X's; the manager's without a name
        if (directory / _METADATA).exists():
            return directory
    if not path.is_dir():
        return None
    children = sorted(path.iterdir())
    items = [d for d in children if (d / _METADATA).exists() and not training_state.is_optimizer(d.name)]
    if len(items) > 1:
        names = ", ".join(d.name for d in items)
        raise SubsetError(f"{path} holds several trees, {names}; name one of them, e.g. {items[-1]}.")
    steps = [d for d in children if (d / "_CHECKPOINT_METADATA").exists()]
    if steps and not items:
        names = ", ".join(d.name for d in steps)
        raise SubsetError(f"{path} holds the checkpoints {names}; name one of them, e.g. {steps[-1]}.")
    return next(iter(items), None)


def _open_orbax(path: pathlib.Path, locate: Callable[[Any], list[str]]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    where = path if "://" in os.fspath(path) else path.absolute()

    def metadata() -> Any:
        item_metadata: Any = checkpointer.metadata(where).item_metadata
        if item_metadata is None:
            raise ValueError("its _METADATA is damaged")
        return item_metadata.tree

    everything = _tried(f"{path} cannot be read as a checkpoint", metadata)
    keys = locate(everything)

    def read(key_path: Any) -> np.ndarray:
        item = _pruned(everything, [*keys, *(getattr(k, "key", None) for k in key_path)])
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=wanted, partial_restore=True)
        name = leaf_path(key_path)
        restored = _tried(f"{path}: {name} cannot be read", lambda: checkpointer.restore(where, args=args))
        return trees.named_leaves(training_state.under(restored, keys))[name]

    def stored(key_path: Any, x: Any) -> StoredArray:
        return StoredArray(tuple(x.shape), np.dtype(x.dtype), lambda: read(key_path))

    tree = training_state.under(everything, keys)
    return trees.named_leaves(jax.tree_util.tree_map_with_path(stored, tree), str(path))


def _open_legacy(path: pathlib.Path, locate: Callable[[Any], list[str]]) -> dict[str, Any]:
    import msgpack

    content = _tried(
        f"{path} cannot be read as a checkpoint",
        lambda: _joined(msgpack.unpackb(path.read_bytes(), ext_hook=_array, strict_map_key=False)),
    )
    arrays = jax.tree_util.tree_map_with_path(
        lambda k, x: _legacy_array(path, leaf_path(k), x),
        training_state.under(content, locate(content)),
        is_leaf=_is_spec,
    )
    return trees.named_leaves(arrays, str(path))


def _is_spec(x: Any) -> bool:
    """Whether it is tensorstore's description of an array."""
    return isinstance(x, dict) and "kvstore" in x


def _joined(tree: Any) -> Any:
    """The tree with the arrays that Flax cut in chunks, those of 1 GiB and more, whole again."""
    if not isinstance(tree, dict):
        return tree
    if _CHUNKED not in tree:
        return {key: _joined(x) for key, x in tree.items()}
    shape, chunks = ([tree[k][str(i)] for i in range(len(tree[k]))] for k in ("shape", "chunks"))
    return np.concatenate(chunks).reshape(shape)


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

    driver, name_there = _tried(
        f"{path}: {name} is not described as T5X does",
        lambda: (leaf["driver"], pathlib.PurePath(leaf["kvstore"].get("path") or leaf["path"]).name),
    )
    directory = path.parent / name_there
    where = os.fspath(directory)
    store = f"{where}/" if "://" in where else {"driver": "file", "path": f"{os.path.abspath(where)}/"}
    spec = {"driver": driver, "kvstore": store}
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
