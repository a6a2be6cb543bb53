"""How many entries a silo may free: exact ranks from fractions, totals and traced fractions.

Counts may exceed 2**31 (a whole model as one silo) while 64-bit integers are off by default, so at
run time a count is a pair of int32 limbs in base 2**16, ``hi * 2**16 + lo``, stored in a trailing
axis of length 2. Limbs add without overflow over up to 2**15 addends and compare exactly.
"""

from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

LIMB = 16


def exact(fraction: float) -> Fraction:
    """The shortest decimal that reads back as ``fraction``, as an exact rational.

    Example:
      >>> exact(0.1)
      Fraction(1, 10)
    """
    return Fraction(str(fraction))


def rank(fraction: float, size: int) -> int:
    """Entries that a silo may free: ``ceil(fraction * (size - 1))``, all at 1, none at 0.

    Args:
      fraction: free fraction in [0, 1], read as its shortest decimal.
      size: entries of the silo.

    Returns:
      The budget of the silo.

    Example:
      >>> rank(0.1, 11), rank(0.1, 12), rank(1.0, 5), rank(0.0, 5)
      (1, 2, 5, 0)
    """
    if fraction >= 1:
        return size
    product = exact(fraction) * (size - 1)
    return -(-product.numerator // product.denominator)


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides ``total`` over silos in proportion to their sizes, by largest remainder.

    Args:
      total: entries that may be free in all.
      sizes: entries of each silo.

    Returns:
      The budget of each silo; they add up to ``min(total, sum(sizes))``.

    Example:
      >>> share(3, [10, 10, 100])
      [0, 0, 3]
    """
    everything = sum(sizes)
    total = min(total, everything)
    budgets = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % everything), i))
    for i in by_remainder[: total - sum(budgets)]:
        budgets[i] += 1
    return budgets


def limbs(counts: Sequence[int]) -> np.ndarray:
    """Python integers as limbs, int32 of shape ``(len(counts), 2)``."""
    return np.array([[c >> LIMB, c & 0xFFFF] for c in counts], np.int32).reshape(-1, 2)


def split(counts: jax.Array) -> jax.Array:
    """int32 counts of any shape as limbs, shape ``counts.shape + (2,)``."""
    return jnp.stack([counts >> LIMB, counts & 0xFFFF], axis=-1)


def carry(pair: jax.Array) -> jax.Array:
    """Limbs whose low part may exceed 2**16 (or be negative), normalised."""
    hi, lo = pair[..., 0], pair[..., 1]
    return jnp.stack([hi + (lo >> LIMB), lo & 0xFFFF], axis=-1)


def less_equal(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a <= b`` for normalised limbs."""
    return (a[..., 0] < b[..., 0]) | ((a[..., 0] == b[..., 0]) & (a[..., 1] <= b[..., 1]))


def equal(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a == b`` for normalised limbs."""
    return (a == b).all(axis=-1)


def to_float(pair: jax.Array) -> jax.Array:
    """Limbs as float32, rounded."""
    return pair[..., 0].astype(jnp.float32) * float(1 << LIMB) + pair[..., 1].astype(jnp.float32)


def traced_rank(fraction: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The rank for a fraction known only at run time, in integer arithmetic.

    A fraction f stands for its rounding interval: half a unit in the last place of its dtype below
    it, so that 0.1 means 0.1 in bfloat16 too. For a float32 f = M * 2**(e-23) with a 24-bit M the lower
    end is (2M - 1) * 2**(e-24), and the budget ceil((2M - 1) * (n - 1) / 2**(24 - e)), the product
    formed in 16-bit limbs; n at f >= 1 and 0 at f <= 0.

    Args:
      fraction: float32 scalar.
      sizes: entries of each silo, below 2**47.

    Returns:
      Limbs, int32 of shape ``(len(sizes), 2)``.
    """
    bits = jax.lax.bitcast_convert_type(fraction.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32) & 0xFF
    half_unit = 1 << max(23 - jnp.finfo(fraction.dtype).nmant, 0)
    mantissa = ((bits & 0x7FFFFF) | 0x800000) * 2 - half_unit
    shift = jnp.clip(151 - exponent, 1, 150)  # 24 - e with e = exponent - 127
    others = np.maximum(np.asarray(sizes, np.int64) - 1, 0)
    digits = [jnp.asarray((others >> (LIMB * i)) & 0xFFFF, jnp.uint32) for i in range(3)]
    product = _multiply(digits, [mantissa & 0xFFFF, mantissa >> LIMB])
    ranks = _ceil_shift(product, shift)
    everything, nothing = limbs(list(sizes)), np.zeros((len(sizes), 2), np.int32)
    ranks = jnp.where(fraction >= 1, everything, ranks)
    return jnp.where(fraction > 0, ranks, nothing)


def _multiply(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    """Schoolbook product of two numbers in 16-bit digits, least significant first, uint32."""
    columns = [jnp.zeros_like(a[0]) for _ in range(len(a) + len(b))]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            term = x * y
            columns[i + j] += term & 0xFFFF
            columns[i + j + 1] += term >> LIMB
    return _normalise(columns)


def _normalise(columns: list[jax.Array]) -> list[jax.Array]:
    rest = jnp.zeros_like(columns[0])
    digits = []
    for column in columns:
        column = column + rest
        digits.append(column & 0xFFFF)
        rest = column >> LIMB
    return digits


def _ceil_shift(digits: list[jax.Array], shift: jax.Array) -> jax.Array:
    """``ceil(number / 2**shift)`` as limbs, for results below 2**47."""
    whole, part = shift // LIMB, (shift % LIMB).astype(jnp.uint32)
    padded = jnp.stack([*digits, *[jnp.zeros_like(digits[0])] * 12])
    window = jax.lax.dynamic_slice_in_dim(padded, whole, 4)
    down = [((window[i] | (window[i + 1] << LIMB)) >> part) & 0xFFFF for i in range(3)]
    below = jnp.arange(padded.shape[0])[:, None] < whole
    cut = jnp.where(below, padded, 0).any(axis=0)
    cut |= (window[0] & ((jnp.uint32(1) << part) - 1)) != 0
    lo, mid, hi = _normalise([down[0] + cut.astype(jnp.uint32), down[1], down[2]])
    return jnp.stack([(mid | (hi << LIMB)).astype(jnp.int32), lo.astype(jnp.int32)], axis=-1)
