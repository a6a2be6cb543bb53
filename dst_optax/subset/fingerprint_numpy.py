"""The lanes of fingerprints without jax."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

A = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
B = (0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)
C = (0x2C1B3C6D, 0x297A2D39, 0xAC4C1B51, 0x31848BAB)
D = (0x6C8E9CF5, 0x7FEB352D, 0x846CA68B, 0xA2D9BB45)
E = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
MIX = (0x85EBCA6B, 0xC2B2AE35)
_BLOCK = 2**16  # entries that numpy works on at a time; their words stay in the cache
_STRIPE = 2**20  # entries that a thread takes at a time


def lanes(x: np.ndarray) -> np.ndarray:
    """Lanes of a numpy array, (4,) uint32."""
    flat = x.reshape(-1).view(np.dtype(f"u{x.dtype.itemsize}"))
    total = np.zeros(4, np.uint32)
    with ThreadPoolExecutor() as pool:
        starts = range(0, flat.size, _STRIPE)
        for part in pool.map(lambda start: _stripe(flat[start : start + _STRIPE], start), starts):
            total += part
    return total


def lanes_of_entries(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Lanes of some entries of a tensor, (k,), at row-major positions, (k,); (4,) uint32."""
    index = positions.astype(np.uint64)
    lo, hi = (index & np.uint64(0xFFFFFFFF)).astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    return _sums(values.view(np.dtype(f"u{values.dtype.itemsize}")), lo, hi)


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
    total = []
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
        total.append(h.sum(dtype=np.uint32))
    return np.array(total, np.uint32)
