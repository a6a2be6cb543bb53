"""A 128-bit fingerprint of a tensor that does not depend on how it is sharded.

Four lanes of 32 bits. An entry with bits x at row-major index i, both split in 32-bit words, gives

    lane_j = mix(x_lo * A_j + x_hi * B_j + i_lo * C_j + i_hi * D_j + E_j)      mod 2**32

to each lane j, and a lane is the sum over all entries, plus a part of SHA-256 of dtype and shape. Sums
are the same in any order, so every device adds up what it holds, and streams need not be aligned.
``mix`` is the finalizer of MurmurHash3. The fingerprint tells models apart that differ by accident;
it is no protection against someone who looks for a collision.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax.subset import trees

_A = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_B = (0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)
_C = (0x2C1B3C6D, 0x297A2D39, 0xAC4C1B51, 0x31848BAB)
_D = (0x6C8E9CF5, 0x7FEB352D, 0x846CA68B, 0xA2D9BB45)
_E = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
_COLUMNS = 4096
_ROWS = (256, 16, 1)  # blocks of host arrays; few shapes, so few compilations


def fingerprint(x: Any) -> str:
    """Fingerprint of a tensor.

    Args:
      x: numpy or jax array, any shape, dtype and sharding. Where it spans processes, all of them must
        call.

    Returns:
      32 hexadecimal digits, the same on every process.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from dst_optax.subset.fingerprint import fingerprint
      >>> fingerprint(np.ones((2, 3), np.float32))
      '79864dea55c02322131571a7ef041457'
      >>> fingerprint(jnp.ones((2, 3))) == fingerprint(np.ones((2, 3), np.float32))
      True
    """
    return next(fingerprints([x]))


def fingerprints(arrays: Iterable[Any]) -> Iterator[str]:
    """Fingerprints of many tensors; one exchange between processes for all that span them.

    Args:
      arrays: numpy or jax arrays; read one after another.

    Yields:
      32 hexadecimal digits for each.
    """
    pending = [(_salt(x.dtype, x.shape), _partial(x), trees.spans_processes(x)) for x in arrays]
    if any(spans for _, _, spans in pending):
        from jax.experimental import multihost_utils

        local = np.stack([np.asarray(p) if spans else np.zeros(4, np.uint32) for _, p, spans in pending])
        total = np.asarray(multihost_utils.process_allgather(local)).sum(0, dtype=np.uint32)
    else:
        total = None
    for i, (salt, partial, spans) in enumerate(pending):
        lanes = total[i] if spans and total is not None else np.asarray(partial)
        yield (lanes + salt).astype(">u4").tobytes().hex()


def _salt(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    text = f"{np.dtype(dtype).name}{list(shape)}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], ">u4").astype(np.uint32)


def _partial(x: Any) -> Any:
    """Lanes of what this process holds of ``x``, each entry once; (4,) uint32."""
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
    lanes = []
    for a, b, c, d, e in zip(_A, _B, _C, _D, _E, strict=True):
        h = word * np.uint32(a) + index * np.uint32(c) + index_hi * np.uint32(d) + np.uint32(e)
        if word_hi is not None:
            h += word_hi * np.uint32(b)
        lanes.append(jnp.where(used, _mix(h), np.uint32(0)))
    return jnp.stack(_sums(_sums(lanes, (1,)), (0,)))


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
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _sums(lanes: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums of the lanes in one read."""

    def add(a: Any, b: Any) -> Any:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = tuple(jnp.uint32(0) for _ in lanes)
    return list(jax.lax.reduce(tuple(lanes), zeros, add, axes))
