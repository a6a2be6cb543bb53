"""Writing k values into a device array, bit for bit, wherever its shards lie.

Programs are compiled for padded numbers of entries, at most an eighth (and fifteen entries) above the
real ones, so that many subsets share few programs. Padding points behind the end of the array, where
nothing is written.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax.subset import trees
from dst_optax.subset.errors import SubsetError


class Piece(NamedTuple):
    """The entries that lie in one shard, on the shard's device."""

    where: tuple[Any, ...]  # (padded,) int32: row-major positions, or an index for each axis
    values: Any  # (padded,)


def padded(count: int) -> int:
    """The number of entries that programs for ``count`` entries are compiled for."""
    step = max(16, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


def pieces(wanted: Iterable[tuple[jax.Array, np.ndarray, np.ndarray]]) -> list[list[Piece]]:
    """Puts the entries of many arrays on the devices where they belong, in one transfer.

    Args:
      wanted: an array, (k,) row-major sorted positions, and (k,) values of its dtype.

    Returns:
      For each array one piece per shard that this process holds, in the order of ``addressable_shards``;
      not committed to a device if the array is not, and lies on the default one.
    """
    here = jax.device_put(np.zeros(())).device
    host: dict[bool, list[list[Piece]]] = {True: [], False: []}
    devices: list[Any] = []
    is_committed = []
    for x, positions, values in wanted:
        committed = x.committed or x.device != here
        pieces_of_x = []
        for shard in x.addressable_shards:
            shape = shard.data.shape
            chosen, local = trees.to_box(positions, shape, trees.box_start(shard.index), x.shape)
            pieces_of_x.append(_padded_piece(shape, local, values[chosen]))
            if committed:
                devices += [shard.device] * len(jax.tree.leaves(pieces_of_x[-1]))
        host[committed].append(pieces_of_x)
        is_committed.append(committed)
    flat, treedef = jax.tree.flatten(host[True])
    # a committed piece would commit an array that jit may now move to other devices
    placed = {
        True: iter(treedef.unflatten(jax.device_put(flat, devices))),
        False: iter(jax.device_put(host[False])),
    }
    return [next(placed[committed]) for committed in is_committed]


def _padded_piece(shape: tuple[int, ...], local: np.ndarray, values: np.ndarray) -> Any:
    extra, size = padded(len(local)) - len(local), math.prod(shape)
    if size + extra < 2**31:
        where = (np.concatenate([local, np.arange(size, size + extra)], dtype=np.int32),)
    elif shape[0] + extra >= 2**31:
        raise SubsetError(f"a tensor of shape {shape} is too long for one device; shard or split it.")
    else:
        behind = [shape[0] + np.arange(extra), *[np.zeros(extra, int)] * (len(shape) - 1)]
        parts = zip(np.unravel_index(local, shape), behind, strict=True)
        where = tuple(np.concatenate(part, dtype=np.int32) for part in parts)
    return Piece(where, np.concatenate([values, np.zeros(extra, values.dtype)]))


def scatter(x: jax.Array, entries: list[Piece], donate: bool = False) -> jax.Array:
    """The array with the pieces written into its shards; it keeps its sharding.

    Args:
      x: array.
      entries: one piece for each addressable shard.
      donate: whether ``x`` may be overwritten in place; it is deleted then.

    Returns:
      The new array.
    """
    write = _scatter_donated if donate else _scatter
    new = [write(data, *piece) for data, piece in zip(_data(x), entries, strict=True)]
    if isinstance(x.sharding, jax.sharding.SingleDeviceSharding):
        return new[0]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, new)


def stack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays of one shape and dtype as one with a new first axis, bit for bit."""
    return _from_bits(jnp.stack([_bits(x) for x in arrays]), arrays[0].dtype)


def gather(x: jax.Array, entries: list[Piece]) -> list[Piece]:
    """The pieces with the values that ``x`` has at their positions."""
    return [p._replace(values=_gather(data, p.where)) for data, p in zip(_data(x), entries, strict=True)]


def _data(x: jax.Array) -> list[jax.Array]:
    if isinstance(x.sharding, jax.sharding.SingleDeviceSharding):
        return [x]
    return [shard.data for shard in x.addressable_shards]


def _write(x: jax.Array, where: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
    bits = _bits(x)
    target = bits.reshape(-1) if len(where) == 1 else bits
    out = target.at[where].set(_bits(values), mode="drop", indices_are_sorted=True, unique_indices=True)
    return _from_bits(out.reshape(x.shape), x.dtype)


_scatter = jax.jit(_write)
_scatter_donated = jax.jit(_write, donate_argnums=0)


@jax.jit
def _gather(x: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
    bits = _bits(x)
    source = bits.reshape(-1) if len(where) == 1 else bits
    out = source.at[where].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)
    return _from_bits(out, x.dtype)


def _is_rounded(dtype: Any) -> bool:
    """Whether a platform may normalise NaNs on the way: CPU computes in float32 for narrow floats."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def _bits(x: jax.Array) -> jax.Array:
    """Integers for narrow floats; wider ones as they are, whose cast would cost a copy on CPU."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, unsigned) if _is_rounded(x.dtype) else x


def _from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype) if _is_rounded(dtype) else x
