"""Dynamic Subset Tuning in numpy: the contract, written without any code of the package.

One silo at a time, sorting with float64 or exact integers. Subnormal numbers are flushed where the
platform flushes them: CPUs and TPUs do, GPUs do not.
"""

import functools
from fractions import Fraction

import jax
import ml_dtypes
import numpy as np
from precision import x64

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(x):
    return np.ascontiguousarray(x).view(BITS[x.dtype.itemsize])


@functools.cache
def flushes(dtype):
    """Whether sums of this dtype that are subnormal become 0."""
    if dtype == np.float16:  # computed in float32, where its subnormals are normal
        return False
    with x64():
        quarter = np.asarray(ml_dtypes.finfo(dtype).tiny / 4, dtype)
        return not np.asarray(jax.jit(jax.numpy.add)(quarter, quarter)).any()


def flush(x):
    if not flushes(x.dtype):
        return x
    info = ml_dtypes.finfo(x.dtype)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(x) < info.tiny, np.zeros_like(x), x)


def rank(fraction, n):
    if fraction >= 1:
        return n
    product = Fraction(str(fraction)) * (n - 1)
    return -(-product.numerator // product.denominator) if fraction > 0 else 0


def mix(index):
    """The fixed order of tied entries: a larger value comes first."""
    mask = 0x7FFFFFFF
    x = index * 0x9E3779B1 & mask
    x = (x ^ x >> 15) * 0x85EBCA6B & mask
    x = (x ^ x >> 13) * 0xC2B2AE35 & mask
    return x ^ x >> 16


def distance_keys(seed, p, u):
    """Distances of the proposal from the seed, and which proposals are not finite."""
    wide = np.float64 if p.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        proposal = flush((flush(p) + flush(u)).astype(p.dtype))
        delta = np.abs(flush(seed).astype(wide) - proposal.astype(wide))
    delta = np.where(np.isnan(delta), np.inf, flush(delta)).astype(wide)
    odd = ~np.isfinite(proposal.astype(wide))
    same = (bits(proposal) == bits(seed)) | odd
    return np.where(same, 0, delta), odd


def keep(delta, m, ties="strict", n=None):
    """Mask of kept entries of one silo of flat distances."""
    n = delta.size
    if m >= n:
        return np.ones(n, bool)
    if m == 0:
        return np.zeros(n, bool)
    ordered = np.sort(delta)
    q = ordered[n - m - 1]
    kept = delta > q
    if ties == "fill" and q > 0:
        tied = [i for i in range(n) if delta[i] == q]
        tied.sort(key=mix, reverse=True)
        kept[tied[: m - int(kept.sum())]] = True
    return kept
