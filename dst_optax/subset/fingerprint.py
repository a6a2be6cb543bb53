"""A 128-bit fingerprint of a tensor that does not depend on how it is sharded.

Four lanes of 32 bits. An entry with bits x at row-major index i, both split in 32-bit words, gives

    lane_j = mix(x_lo * A_j + x_hi * B_j + i_lo * C_j + i_hi * D_j + E_j)      mod 2**32

to each lane j, and a lane is the sum over all entries, plus a part of SHA-256 of dtype and shape. Sums
are the same in any order, so every device adds up what it holds, and streams need not be aligned.
``mix`` is the finalizer of MurmurHash3. The fingerprint tells models apart that differ by accident;
it is no protection against someone who looks for a collision.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dst_optax.subset import trees

A = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
B = (0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)
C = (0x2C1B3C6D, 0x297A2D39, 0xAC4C1B51, 0x31848BAB)
D = (0x6C8E9CF5, 0x7FEB352D, 0x846CA68B, 0xA2D9BB45)
E = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
MIX = (0x85EBCA6B, 0xC2B2AE35)
_BLOCK = 2**16  # entries that numpy works on at a time; their words stay in the cache
_STRIPE = 2**20  # entries that a thread takes at a time


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

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset.fingerprint import fingerprint, fingerprints
      >>> a, b = np.zeros(3, np.float32), np.ones(3, np.float32)
      >>> list(fingerprints([a, b])) == [fingerprint(a), fingerprint(b)]
      True
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
    if "jax" not in sys.modules:
        return lanes(np.asarray(x))
    from dst_optax.subset import fingerprint_jax  # a compiled program is several times as fast

    return fingerprint_jax.lanes(x)


def lanes(x: np.ndarray) -> np.ndarray:
    """Lanes of a numpy array, (4,) uint32, without jax."""
    flat = x.reshape(-1).view(np.dtype(f"u{x.dtype.itemsize}"))
    total = np.zeros(4, np.uint32)
    with ThreadPoolExecutor() as pool:
        starts = range(0, flat.size, _STRIPE)
        for part in pool.map(lambda start: _stripe(flat[start : start + _STRIPE], start), starts):
            total += part
    return total


def changed(fingerprint: str, positions: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    """The fingerprint of a tensor after some entries have changed; costs as much as they are many.

    Args:
      fingerprint: of the tensor before.
      positions: (k,) row-major positions.
      before: (k,) values that were there.
      after: (k,) values that are there now, of the same dtype.

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset.fingerprint import changed, fingerprint
      >>> x = np.arange(9, dtype=np.float32)
      >>> new = changed(fingerprint(x), np.array([2]), x[[2]], np.array([7], np.float32))
      >>> x[2] = 7
      >>> new == fingerprint(x)
      True
    """
    old = np.frombuffer(bytes.fromhex(fingerprint), ">u4").astype(np.uint32)
    index = positions.astype(np.uint64)
    lo, hi = (index & np.uint64(0xFFFFFFFF)).astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    gone, come = (_sums(x.view(np.dtype(f"u{x.dtype.itemsize}")), lo, hi) for x in (before, after))
    return (old - gone + come).astype(">u4").tobytes().hex()


def _stripe(flat: np.ndarray, start: int) -> np.ndarray:
    """Lanes of unsigned integers whose first one has the index ``start``."""
    total = np.zeros(4, np.uint32)
    for at in range(0, flat.size, _BLOCK):  # aligned, so a block's indices share their high word
        block, first = flat[at : at + _BLOCK], start + at
        lo = np.arange(block.size, dtype=np.uint32)
        lo += np.uint32(first & 0xFFFFFFFF)
        total += _sums(block, lo, np.full(1, first >> 32, np.uint32))
    return total


def _sums(block: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Lanes of unsigned integers, (k,), whose indices have the words ``lo``, (k,), and ``hi``."""
    word, other = block.astype(np.uint32), np.empty(block.size, np.uint32)  # the low word of wider ones
    word_hi = (block >> np.uint64(32)).astype(np.uint32) if block.itemsize == 8 else None
    sums = []
    for a, b, c, d, e in zip(A, B, C, D, E, strict=True):
        h = lo * np.uint32(c)
        h += hi * np.uint32(d) + np.uint32(e)
        h += np.multiply(word, np.uint32(a), out=other)
        if word_hi is not None:
            h += np.multiply(word_hi, np.uint32(b), out=other)
        for shift, factor in zip((16, 13), MIX, strict=True):
            h ^= np.right_shift(h, shift, out=other)
            h *= np.uint32(factor)
        h ^= np.right_shift(h, 16, out=other)
        sums.append(h.sum(dtype=np.uint32))
    return np.array(sums, np.uint32)
