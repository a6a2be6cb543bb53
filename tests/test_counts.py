"""Counts beyond 2**31 against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst_optax import counts
from dst_optax.counts import Counts

pytestmark = pytest.mark.usefixtures("strict")
NUMBERS = st.lists(st.integers(0, 2**45), min_size=2, max_size=2)


def integers(x):
    return (np.asarray(x.high, np.int64) * 2**16 + np.asarray(x.low, np.int64)).tolist()


def test_a_long_axis_is_summed_before_its_counts_are_large():
    sum_ = jax.jit(lambda one: counts.sum_of_mask(jnp.broadcast_to(one, (2**24, 200)), (0, 1)))
    assert integers(sum_(jnp.ones((1, 1), bool))) == 200 * 2**24


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31))
def test_products_have_two_words(x, factor):
    low, high = counts.product_words(jnp.uint32(x), factor)
    assert int(low) + (int(high) << 32) == x * factor


@given(NUMBERS)
def test_arithmetic_is_exact(numbers):
    a, b = (Counts.of([n]) for n in numbers)
    assert integers(a + b) == [sum(numbers)]
    assert integers(a + b - a) == [numbers[1]]
    assert bool((a <= b)[0]) == (numbers[0] <= numbers[1])
    assert bool(a.equals(b)[0]) == (numbers[0] == numbers[1])
    assert bool(a.is_zero()[0]) == (numbers[0] == 0)
    np.testing.assert_allclose(a.to_float(), np.float32([numbers[0]]), rtol=2**-23)


def test_sums_of_more_than_2_to_the_31_entries():
    assert integers(Counts.from_int32(jnp.full((3, 5), 2**30, jnp.int32)).sum(axis=1)) == [5 * 2**30] * 3
    parts = counts.concatenate([Counts.of([2**31, 1]), Counts.of([2**31])])
    assert integers(counts.sum_by_silo(parts, (0, 1, 0), 2)) == [2**32, 1]


@pytest.mark.parametrize("shape", [(7,), (4, 300), (2, 3, 70_000)])
def test_sums_of_masks(shape):
    mask = np.random.default_rng(0).random(shape) < 0.7
    assert integers(counts.sum_of_mask(jnp.asarray(mask), tuple(range(len(shape))))) == mask.sum()
