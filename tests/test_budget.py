"""Ranks at run time against exact rationals."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst_optax import budget

pytestmark = pytest.mark.usefixtures("strict")
SIZES = (1, 2, 3, 11, 100_003, 2**31 - 1, 2**31 + 5, 10**10, 2**45 + 1)


def exact_rank(fraction, n):
    if fraction >= 1:
        return n
    if fraction <= 0:
        return 0
    below = np.nextafter(fraction, fraction.dtype.type(-1))
    product = (Fraction(float(below)) + Fraction(float(fraction))) / 2 * (n - 1)
    return -(-product.numerator // product.denominator)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([float, np.float32]))
def test_a_fraction_is_its_shortest_decimal(digit, places, tens, dtype):
    """Of n - 1 = k 10**places entries exactly k are free for every unit of the last place."""
    fraction = dtype(f"{digit}e-{places}")
    assert budget.rank(fraction, tens * 10**places + 1) == digit * tens


FRACTIONS = st.floats(-0.5, 1.5, width=32, allow_subnormal=False) | st.integers(0, 30).map(lambda k: 0.5**k)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@settings(max_examples=300)
@given(FRACTIONS)
def test_traced_rank_is_exact(dtype, fraction):
    fraction = np.asarray(fraction, dtype)[()]
    got = jax.jit(budget.traced_rank, static_argnums=1)(jnp.asarray(fraction), SIZES)
    got = np.asarray(got.high, np.int64) * 2**16 + np.asarray(got.low, np.int64)
    assert got.tolist() == [exact_rank(fraction, n) for n in SIZES]


@given(st.integers(0, 10**6), st.lists(st.integers(1, 10**5), min_size=1, max_size=20))
def test_share_is_proportional_and_complete(total, sizes):
    shares = budget.share(total, sizes)
    assert sum(shares) == min(total, sum(sizes))
    for got, size in zip(shares, sizes, strict=True):
        assert abs(Fraction(got) - Fraction(min(total, sum(sizes)) * size, sum(sizes))) < 1


@settings(max_examples=300)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 400))
def test_shares_are_those_of_the_largest_remainder(sizes, total):
    everything = sum(sizes)
    if everything == 0:
        return
    total = min(total, everything)
    exact = [Fraction(total * n, everything) for n in sizes]
    got = budget.share(total, sizes)
    assert sum(got) == total
    assert all(x // 1 <= k <= -(-x // 1) for k, x in zip(got, exact, strict=True))
    up = [x % 1 for k, x in zip(got, exact, strict=True) if k > x]
    down = [x % 1 for k, x in zip(got, exact, strict=True) if k < x]
    assert min(up, default=1) >= max(down, default=0)
