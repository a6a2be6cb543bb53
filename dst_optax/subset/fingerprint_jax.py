"""Fingerprints by compiled programs, of arrays on devices where they lie and of the host's in blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax.subset.fingerprint_numpy import MIX, A, B, C, D, E

_COLUMNS = 4096
_ROWS = (256, 16, 1)  # blocks of host arrays; few shapes, so few compilations


def lanes(x: Any) -> np.ndarray:
    """Lanes of what this process holds of a numpy or jax array, each entry once; (4,) uint32."""
    if not isinstance(x, jax.Array):
        return _of_host_array(np.asarray(x))
    if x.size == 0:
        return np.zeros(4, np.uint32)
    parts = [
        _of_shard(s.data, x.shape, [slc.start or 0 for slc in s.index])
        for s in x.addressable_shards
        if s.replica_id == 0 and s.data.size
    ]
    return functools.reduce(np.add, [np.asarray(p) for p in parts], np.zeros(4, np.uint32))


def _of_shard(data: jax.Array, shape: tuple[int, ...], offset: list[int]) -> jax.Array:
    """Lanes of a box of a tensor, computed where it lies."""
    if len(shape) <= 1:
        rows = np.zeros(1, np.uint64)
        first = offset[0] if offset else 0
    else:
        rows = np.zeros(data.shape[:-1], np.uint64)
        for axis, (extent, start) in enumerate(zip(data.shape[:-1], offset[:-1], strict=True)):
            stride = int(np.prod(shape[axis + 1 :], dtype=object))
            index = (np.arange(extent, dtype=np.uint64) + np.uint64(start)) * np.uint64(stride)
            rows += index.reshape((-1,) + (1,) * (rows.ndim - axis - 1))
        first = offset[-1]
    rows = rows.reshape(-1) + np.uint64(first)
    lo, hi = (rows & np.uint64(0xFFFFFFFF)).astype(np.uint32), (rows >> np.uint64(32)).astype(np.uint32)
    columns = data.shape[-1] if data.ndim else 1
    return _lanes(data, lo, hi, np.uint32(columns), columns)


def _of_host_array(x: np.ndarray) -> np.ndarray:
    """Lanes of a numpy array, streamed in blocks."""
    flat = x.reshape(-1).view(np.dtype(f"u{x.dtype.itemsize}"))
    total = np.zeros(4, np.uint32)
    running: list[jax.Array] = []
    start = 0
    with jax.default_device(_host_device()):
        while start < flat.size:
            left = flat.size - start
            rows = next((r for r in _ROWS if r * _COLUMNS <= left), 1)
            block = flat[start : start + rows * _COLUMNS]
            valid = len(block)
            if valid < _COLUMNS:
                block = np.pad(block, (0, _COLUMNS - valid))
            first = np.arange(rows, dtype=np.uint64) * np.uint64(_COLUMNS) + np.uint64(start)
            lo = (first & np.uint64(0xFFFFFFFF)).astype(np.uint32)
            hi = (first >> np.uint64(32)).astype(np.uint32)
            words = block.view(np.uint32) if flat.itemsize == 8 else block
            running.append(_lanes(words, lo, hi, np.uint32(valid), _COLUMNS))
            start += valid
            if len(running) == 8:
                total += np.asarray(running.pop(0))
    return functools.reduce(np.add, [np.asarray(r) for r in running], total)


def _host_device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the platform runs without a CPU backend
        return jax.local_devices()[0]


@functools.partial(jax.jit, static_argnums=4)
def _lanes(data: jax.Array, lo: jax.Array, hi: jax.Array, valid: jax.Array, columns: int) -> jax.Array:
    """Sums of the lanes of ``data``, whose rows start at the 64-bit indices (hi, lo); (4,) uint32.

    Args:
      data: entries of any dtype and shape, or pairs of uint32 words of wider entries.
      lo: low words of the rows' first indices, (rows,) uint32.
      hi: high words, (rows,) uint32.
      valid: entries of a row that count, () uint32.
      columns: entries of a row.
    """
    word, word_hi = _words(data, lo.shape[0], columns)
    column = jnp.arange(columns, dtype=jnp.uint32)[None]
    index = lo[:, None] + column
    index_hi = hi[:, None] + (index < column).astype(jnp.uint32)
    used = jnp.broadcast_to(column < valid, index.shape)
    sums = []
    for a, b, c, d, e in zip(A, B, C, D, E, strict=True):
        h = word * np.uint32(a) + index * np.uint32(c) + index_hi * np.uint32(d) + np.uint32(e)
        if word_hi is not None:
            h += word_hi * np.uint32(b)
        sums.append(jnp.where(used, _mix(h), np.uint32(0)))
    return jnp.stack(_sums(_sums(sums, (1,)), (0,)))


def _words(data: jax.Array, rows: int, columns: int) -> tuple[jax.Array, jax.Array | None]:
    """Bits of each entry as a low and, where it is wider than 32 bits, a high word."""
    if data.dtype == jnp.bool_:
        data = data.astype(jnp.uint8)
    width = data.dtype.itemsize
    if width == 8 or data.size == 2 * rows * columns:
        pairs = data if width == 4 else jax.lax.bitcast_convert_type(data, jnp.uint32)
        pairs = pairs.reshape(rows, columns, 2)
        return pairs[..., 0], pairs[..., 1]
    bits = jax.lax.bitcast_convert_type(data, jnp.dtype(f"uint{8 * width}"))
    return bits.reshape(rows, columns).astype(jnp.uint32), None


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * np.uint32(MIX[0])
    h = (h ^ (h >> 13)) * np.uint32(MIX[1])
    return h ^ (h >> 16)


def _sums(parts: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums of the lanes in one read."""

    def add(a: Any, b: Any) -> Any:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = tuple(jnp.uint32(0) for _ in parts)
    return list(jax.lax.reduce(tuple(parts), zeros, add, axes))
