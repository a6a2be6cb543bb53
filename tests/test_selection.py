"""Thresholds by counting against sorting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst_optax import budget, selection

pytestmark = pytest.mark.usefixtures("strict")
TOP = 0x7F800000


@functools.partial(jax.jit, static_argnums=(4, 5))
def search(keys, m, guess, spread, rowwise, top=TOP):
    leaf = selection.Leaf(keys, 0, tuple(range(keys.shape[0])))
    total = jnp.asarray(budget.limbs([keys.shape[1]] * keys.shape[0]))
    first = selection.Guess(guess, spread, far=jnp.full_like(guess, top - 1))
    return selection.thresholds([leaf], m, total, top, first, 2**23, rowwise)


@settings(max_examples=150)
@given(data=st.data())
def test_any_guess_leads_to_the_exact_threshold(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, silos = 200, 3
    spans = np.array([[1], [50], [TOP + 1]])
    keys = rng.integers(0, spans, (silos, n)).astype(np.int32)
    m = rng.integers(0, n, silos)
    guess = data.draw(st.lists(st.integers(-1, TOP), min_size=silos, max_size=silos))
    spread = data.draw(st.lists(st.integers(1, 2**31 - 1), min_size=silos, max_size=silos))
    found = search(
        keys,
        budget.limbs(m.tolist()),
        np.array(guess, np.int32),
        np.array(spread, np.int32),
        data.draw(st.booleans()),
    )
    q = np.sort(keys, axis=1)[np.arange(silos), n - m - 1]
    wanted = (keys > q[:, None]) & (m > 0)[:, None]
    np.testing.assert_array_equal(keys > np.asarray(found.hi)[:, None], wanted)
    assert int(found.passes) <= 15


def test_probes_stay_sorted_where_the_bracket_spans_all_integers():
    """Found by random tests: a probe beyond the largest integer wrapped around and spoilt the counts."""
    rng = np.random.default_rng(0)
    for n in (3, 37, 64):
        keys = rng.integers(0, 2**31, (50, n)).astype(np.int32)
        m = rng.integers(1, n, 50)
        none = np.full(50, -1, np.int32)
        found = search(keys, budget.limbs(m.tolist()), none, np.ones_like(none), True, top=2**31 - 1)
        above = (keys > np.asarray(found.hi)[:, None]).sum(axis=1)
        np.testing.assert_array_equal(above, m)


def test_limb_sums_of_more_than_2_to_the_31_entries():
    per_row = jnp.full((3, 5), 2**30, jnp.int32)
    pair = budget.split(per_row)
    total = budget.carry(jnp.sum(pair, axis=1, dtype=jnp.int32))
    assert [int(h) * 2**16 + int(low) for h, low in np.asarray(total)] == [5 * 2**30] * 3


@pytest.mark.parametrize("shape", [(7,), (4, 300), (2, 3, 70_000)])
def test_huge_sum_equals_numpy(shape):
    mask = np.random.default_rng(0).random(shape) < 0.7
    hi, lo = np.asarray(selection._huge_sum(jnp.asarray(mask), tuple(range(len(shape)))))
    assert int(hi) * 2**16 + int(lo) == mask.sum()


@pytest.mark.parametrize("n", [65_537, 70_000])
def test_thresholds_of_long_vectors(n):
    keys = np.random.default_rng(n).integers(0, TOP, n).astype(np.int32)
    m, none = n // 10, np.full(1, -1, np.int32)
    guess = selection.Guess(none, np.ones_like(none), np.full_like(none, TOP - 1))
    total, wanted = (jnp.asarray(budget.limbs([x])) for x in (n, m))
    leaf = selection.Leaf(jnp.asarray(keys), None, (0,))
    found = selection.thresholds([leaf], wanted, total, TOP, guess, 2**23, True)
    np.testing.assert_array_equal(keys > np.asarray(found.hi), keys > np.sort(keys)[n - m - 1])


@pytest.mark.parametrize(("n", "rows"), [(300, 1), (65_537, 1), (65_536, 256), (70_000, 250)])
def test_long_vectors_are_counted_in_rows(n, rows):
    mask = np.random.default_rng(0).random(n) < 0.3
    count = jax.jit(selection.how_many, static_argnums=1).lower(mask, True).compile()
    assert int(count(mask)) == mask.sum()
    assert (f"s32[{rows},{n // rows}]" in count.as_text()) == (rows > 1)
