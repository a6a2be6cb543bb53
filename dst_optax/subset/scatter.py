"""Writing k values into a device array, bit for bit, wherever its shards lie.

Programs are compiled for padded numbers of entries, at most an eighth (and fifteen entries) above the
real ones, so that many subsets share few programs. Padding points behind the end of the array, where
nothing is written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax.subset import trees


class Piece(NamedTuple):
    """The entries that lie in one shard, on the shard's device."""

    where: tuple[jax.Array, ...]  # (padded,) int32: row-major positions, or an index for each axis
    values: jax.Array  # (padded,)


def padded(count: int) -> int:
    """The number of entries that programs for ``count`` entries are compiled for."""
    step = max(16, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


def pieces(x: jax.Array, positions: np.ndarray, values: np.ndarray) -> list[Piece]:
    """Entries as one piece for each shard of ``x`` that this process holds.

    Args:
      x: the array that the entries are for.
      positions: (k,) row-major positions, sorted.
      values: (k,) values of the dtype of ``x``.

    Returns:
      Pieces in the order of ``x.addressable_shards``.
    """
    out = []
    for shard in x.addressable_shards:
        start = trees.box_start(shard.index)
        chosen, local = trees.to_box(positions, shard.data.shape, start, x.shape)
        out.append(_piece(shard.data, local, values[chosen], shard.device))
    return out


def _piece(data: jax.Array, local: np.ndarray, values: np.ndarray, device: Any) -> Piece:
    extra = padded(len(local)) - len(local)
    if data.size + extra < 2**31:
        behind = np.arange(data.size, data.size + extra)
        where = [np.concatenate([local, behind]).astype(np.int32)]
    else:
        coordinates = np.unravel_index(local, data.shape)
        behind = [data.shape[0] + np.arange(extra), *[np.zeros(extra, int)] * (data.ndim - 1)]
        where = [np.concatenate(c).astype(np.int32) for c in zip(coordinates, behind, strict=True)]
    filled = np.concatenate([values, np.zeros(extra, values.dtype)])
    *where, filled = jax.device_put([*where, filled], device)
    return Piece(tuple(where), filled)


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
    return _on_shards(x, [lambda data, p=p: write(data, p.where, p.values) for p in entries])


def gather(x: jax.Array, entries: list[Piece]) -> list[Piece]:
    """The pieces with the values that ``x`` has at their positions."""
    return [p._replace(values=_gather(data, p.where)) for data, p in zip(_data(x), entries, strict=True)]


def _data(x: jax.Array) -> list[jax.Array]:
    if isinstance(x.sharding, jax.sharding.SingleDeviceSharding):
        return [x]
    return [shard.data for shard in x.addressable_shards]


def _on_shards(x: jax.Array, functions: list[Callable[[jax.Array], jax.Array]]) -> jax.Array:
    new = [f(data) for f, data in zip(functions, _data(x), strict=True)]
    if isinstance(x.sharding, jax.sharding.SingleDeviceSharding):
        return new[0]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, new)


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


def _bits(x: jax.Array) -> jax.Array:
    """Integers, which no platform rounds or normalises (CPU does so with half-precision NaNs)."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return x


def _from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype) if jnp.issubdtype(dtype, jnp.floating) else x


def dtype_of(x: Any) -> np.dtype:
    """The numpy dtype of an array."""
    return np.dtype(jnp.dtype(x.dtype))
