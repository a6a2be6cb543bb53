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

    Raises:
      ValueError: a negative total.

    Example:
      >>> share(3, [10, 10, 100])
      [0, 0, 3]
    """
    if total < 0:
        raise ValueError(f"num_free_params: got {total}; it must be 0 or more.")
    everything = max(sum(sizes), 1)
    total = min(total, sum(sizes))
    budgets = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % everything), i))
    for i in by_remainder[: total - sum(budgets)]:
        budgets[i] += 1
    return budgets


def traced_rank(fraction: jax.Array, sizes: Sequence[int]) -> Counts:
    """The rank for a fraction known only at run time, in integer arithmetic.

    A fraction f stands for the lower end of its rounding interval, halfway to the next number of its dtype
    below it: never more entries are free than with the decimal that was rounded to f. As a float32
    f = M * 2**(e-23) with a 24-bit M. If the number below it is 2**k of these units away, the lower end is
    (4M - 2**(k+1)) * 2**(e-25), and the budget its product with n - 1, rounded up; n at f >= 1, 0 at f <= 0.

    Args:
      fraction: floating-point scalar.
      sizes: entries of each silo, below 2**47.

    Returns:
      Budgets, (len(sizes),).
    """
    bits = jax.lax.bitcast_convert_type(fraction.astype(jnp.float32), jnp.uint32)
    exponent = ((bits >> 23).astype(jnp.int32) & 0xFF) - 127
    info = jnp.finfo(fraction.dtype)
    subnormal = jnp.clip(info.minexp - exponent, 0, info.nmant)
    k = max(23 - info.nmant, 0) + subnormal
    is_power_of_two = (bits & 0x7FFFFF) == 0  # below it numbers lie half as far apart, above minexp
    k -= (is_power_of_two & (exponent > info.minexp)).astype(jnp.int32)
    lower_end = ((bits & 0x7FFFFF) | 0x800000) * 4 - (jnp.uint32(1) << (k + 1).astype(jnp.uint32))
    ranks = ceil_of_product([max(n - 1, 0) for n in sizes], lower_end, jnp.clip(25 - exponent, 1, 151))
    ranks = Counts.of(sizes).where(fraction >= 1, ranks)
    return ranks.where(fraction > 0, Counts.of([0] * len(sizes)))
