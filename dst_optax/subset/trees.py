"""Models as mappings from a path to an array, and boxes of sharded arrays.

Where jax is not imported there are no jax arrays, and no trees but of dictionaries, lists and tuples.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from dst_optax.subset.errors import SubsetError

if TYPE_CHECKING:
    import jax


def named_leaves(model: Any, what: str = "the model") -> dict[str, Any]:
    """The arrays of a pytree by path, ``a/b/c``; MaskedNode is passed over.

    Args:
      model: pytree of arrays, or a mapping from paths to arrays.
      what: its name in errors.

    Returns:
      The arrays, in tree order.

    Raises:
      SubsetError: a leaf is no array, or two leaves have one path.
    """
    leaves: dict[str, Any] = {}
    for path, x in _flat(model):
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise SubsetError(f"{what}: {path!r} is {type(x).__name__}, not an array.")
        if path in leaves:
            raise SubsetError(f"{what} has two leaves with the path {path!r}.")
        leaves[path] = x
    return leaves


def map_leaves(model: Any, new: Mapping[str, Any]) -> Any:
    """The pytree with the leaves named in ``new`` replaced."""
    if "jax" not in sys.modules:
        return _map_plain(model, new, ())
    from dst_optax.tree import map_named

    return map_named(lambda path, x: new.get(path, x), model)


def is_jax_array(x: Any) -> "TypeGuard[jax.Array]":
    """Whether ``x`` is a jax array; jax is not imported to find out."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def _flat(model: Any) -> Iterator[tuple[str, Any]]:
    """Paths and leaves in tree order."""
    if "jax" not in sys.modules:
        yield from _flat_plain(model, ())
        return
    from dst_optax.tree import named_leaves as of_jax

    yield from of_jax(model, is_leaf=lambda x: False)


def _flat_plain(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _flat_plain(tree[key], (*keys, str(key)))
    elif isinstance(tree, list | tuple):
        for key, x in zip(_fields(tree), tree, strict=True):
            yield from _flat_plain(x, (*keys, key))
    elif tree is not None:
        yield "/".join(keys), tree


def _map_plain(tree: Any, new: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    if isinstance(tree, dict):
        return tree | {key: _map_plain(x, new, (*keys, str(key))) for key, x in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [_map_plain(x, new, (*keys, key)) for key, x in zip(_fields(tree), tree, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return new.get("/".join(keys), tree)


def _fields(tree: Any) -> Sequence[str]:
    """The keys of a list, a tuple or a named tuple, as jax spells them."""
    return getattr(tree, "_fields", [str(i) for i in range(len(tree))])


def spans_processes(x: Any) -> bool:
    """Whether some of an array's shards are on devices of other processes."""
    return is_jax_array(x) and not x.is_fully_addressable


def boxes(x: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The parts of an array that this process is to read, each entry once over all processes.

    Yields:
      The part as a numpy array, and the index of its first entry along each axis.
    """
    if not is_jax_array(x):
        yield np.asarray(x), (0,) * len(x.shape)
        return
    for shard in x.addressable_shards:
        if shard.replica_id == 0 and shard.data.size:
            yield np.asarray(shard.data), box_start(shard.index)


def box_start(index: tuple[slice, ...]) -> tuple[int, ...]:
    """The first index along each axis of a shard."""
    return tuple(int(s.start or 0) for s in index)


def to_whole(
    local: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], whole: tuple[int, ...]
) -> np.ndarray:
    """Row-major positions in a box as positions in the whole array, (k,) int64."""
    if shape == whole:
        return local.astype(np.int64)
    coordinates = np.unravel_index(local, shape)
    moved = tuple(c + s for c, s in zip(coordinates, start, strict=True))
    return np.asarray(np.ravel_multi_index(moved, whole), np.int64)


def to_box(
    positions: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], whole: tuple[int, ...]
) -> tuple[np.ndarray | slice, np.ndarray]:
    """Which of the sorted positions lie in a box, and where in it.

    Returns:
      An index into ``positions``, and row-major positions in the box, sorted.
    """
    if shape == whole:
        return slice(None), positions
    coordinates = np.unravel_index(positions, whole)
    inside = np.ones(len(positions), bool)
    for c, s, extent in zip(coordinates, start, shape, strict=True):
        inside &= (c >= s) & (c < s + extent)
    chosen = np.flatnonzero(inside)
    moved = tuple(c[chosen] - s for c, s in zip(coordinates, start, strict=True))
    return chosen, np.asarray(np.ravel_multi_index(moved, shape), positions.dtype)


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of each entry, as an unsigned integer of the same width."""
    return np.ascontiguousarray(x).view(np.dtype(f"u{x.dtype.itemsize}")).reshape(x.shape)
