"""How many entries a silo may free: exact ranks from fractions, totals and traced fractions.

A fraction is read as its shortest decimal, so 0.1 means one tenth in every dtype.
"""

from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp

from dst_optax.counts import Counts, ceil_of_product


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
    everything = max(sum(sizes), 1)
    total = min(total, sum(sizes))
    budgets = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % everything), i))
    for i in by_remainder[: total - sum(budgets)]:
        budgets[i] += 1
    return budgets


def traced_rank(fraction: jax.Array, sizes: Sequence[int]) -> Counts:
    """The rank for a fraction known only at run time, in integer arithmetic.

    A fraction f stands for its rounding interval: half a unit in the last place of its dtype below
    it, so that 0.1 means 0.1 in bfloat16 too. For a float32 f = M * 2**(e-23) with a 24-bit M the lower
    end is (2M - 1) * 2**(e-24), and the budget ceil((2M - 1) * (n - 1) / 2**(24 - e)); n at
    f >= 1 and 0 at f <= 0.

    Args:
      fraction: floating-point scalar.
      sizes: entries of each silo, below 2**47.

    Returns:
      Budgets, (len(sizes),).
    """
    bits = jax.lax.bitcast_convert_type(fraction.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32) & 0xFF
    half_unit = 1 << max(23 - jnp.finfo(fraction.dtype).nmant, 0)
    mantissa = ((bits & 0x7FFFFF) | 0x800000) * 2 - half_unit
    shift = jnp.clip(151 - exponent, 1, 150)  # 24 - e with e = exponent - 127
    ranks = ceil_of_product([max(n - 1, 0) for n in sizes], mantissa, shift)
    ranks = Counts.of(sizes).where(fraction >= 1, ranks)
    return ranks.where(fraction > 0, Counts.of([0] * len(sizes)))
