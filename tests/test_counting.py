"""Thresholds by counting against sorting, in both layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst_optax import counting
from dst_optax.counting import Keys, Query
from dst_optax.counts import Counts

pytestmark = pytest.mark.usefixtures("strict")
TOP = 0x7F800000
LAYOUTS = {"tensors": counting.Tensors(), "rows": counting.Rows()}


@functools.partial(jax.jit, static_argnums=(0, 5))
def search(layout, keys, m, guess, spread, top=TOP):
    silos, size = keys.shape
    rows = Keys(keys, 0, tuple(range(silos)), (0,) * silos, jnp.uint32(0))
    total = Counts.of([size] * silos)
    method = functools.partial(counting.search, top=top, density_scale=2**23)
    return LAYOUTS[layout].for_each_silo(method, [rows], Query(m, total, guess, spread))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=75)
@given(data=st.data())
def test_any_guess_leads_to_the_exact_threshold(layout, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, silos = 200, 3
    spans = np.array([[1], [50], [TOP + 1]])
    keys = rng.integers(0, spans, (silos, n)).astype(np.int32)
    m = rng.integers(0, n, silos)
    guess = data.draw(st.lists(st.integers(-1, TOP), min_size=silos, max_size=silos))
    spread = data.draw(st.lists(st.integers(1, 2**31 - 1), min_size=silos, max_size=silos))
    found = search(layout, keys, Counts.of(m.tolist()), np.array(guess, np.int32), np.array(spread, np.int32))
    q = np.sort(keys, axis=1)[np.arange(silos), n - m - 1]
    wanted = (keys > q[:, None]) & (m > 0)[:, None]
    np.testing.assert_array_equal(keys > np.asarray(found.hi)[:, None], wanted)
    np.testing.assert_array_equal(found.above_hi.to_float(), wanted.sum(axis=1))
    assert int(found.passes.max()) <= 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probes_stay_sorted_where_the_bracket_spans_all_integers(layout):
    """Found by random tests: a probe beyond the largest integer wrapped around and spoilt the counts."""
    rng = np.random.default_rng(0)
    for n in (3, 37, 64):
        keys = rng.integers(0, 2**31, (50, n)).astype(np.int32)
        m = rng.integers(1, n, 50)
        none = np.full(50, -1, np.int32)
        found = search(layout, keys, Counts.of(m.tolist()), none, np.ones_like(none), 2**31 - 1)
        above = (keys > np.asarray(found.hi)[:, None]).sum(axis=1)
        np.testing.assert_array_equal(above, m)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_below_zero_are_outside_of_the_ranking_and_told(layout):
    keys = np.array([[-1, 5, -1, 3, 4], [1, 1, 2, 2, 2]], np.int32)
    none = np.full(2, -1, np.int32)
    found = search(layout, keys, Counts.of([2, 1]), none, np.ones_like(none))
    np.testing.assert_array_equal(found.ranked.to_float(), [3, 5])
    np.testing.assert_array_equal(keys > np.asarray(found.hi)[:, None], [[0, 1, 0, 0, 1], [0] * 5])


@pytest.mark.parametrize("n", [65_537, 70_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thresholds_of_long_vectors(layout, n):
    keys = np.random.default_rng(n).integers(0, TOP, (1, n)).astype(np.int32)
    m, none = n // 10, np.full(1, -1, np.int32)
    found = search(layout, keys, Counts.of([m]), none, np.ones_like(none))
    np.testing.assert_array_equal(keys > np.asarray(found.hi), keys > np.sort(keys[0])[n - m - 1])


@pytest.mark.parametrize(("n", "rows"), [(300, 1), (65_537, 1), (65_536, 16), (70_000, 16)])
def test_long_vectors_are_counted_in_rows(n, rows):
    """On a CPU only rows are counted on all cores."""
    keys = np.random.default_rng(0).integers(0, 100, n).astype(np.int32)
    t = jnp.full((1, counting.PROBES), 30, jnp.int32)
    np.testing.assert_array_equal(counting._above(keys, t, None).to_float(), (keys > 30).sum())
    sums = jax.make_jaxpr(functools.partial(counting._sums_on_cpu, (0,)))(keys, keys)
    first, *_ = (eqn for eqn in sums.eqns if eqn.primitive.name == "reduce")
    assert first.invars[0].aval.shape == ((rows, n // rows) if rows > 1 else (n,))


def slots(arranged):
    return [np.asarray(x.values) for x in arranged]


def test_rows_are_silos_and_read_back_as_tensors():
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "stack": (3, 2, 5), "b": (20,), "c": (7,)}
    x = {n: rng.integers(0, 99, s).astype(np.int32) for n, s in shapes.items()}
    zero = jnp.uint32(0)
    keys = [
        Keys(jnp.asarray(x["a"]), None, (0,), (0,), zero),
        Keys(jnp.asarray(x["stack"]), 1, (1, 2), (0, 0), zero),
        Keys(jnp.asarray(x["b"]), None, (3,), (0,), zero),
        Keys(jnp.asarray(x["c"]), None, (1,), (15,), zero),
    ]
    rows, back = counting.Rows().arrange(keys)
    by_silo = {s: row for m in rows for s, row in zip(m.silos, np.asarray(m.values), strict=True)}
    np.testing.assert_array_equal(by_silo[0], x["a"].ravel())
    np.testing.assert_array_equal(by_silo[1], [*x["stack"][:, 0].ravel(), *x["c"]])
    np.testing.assert_array_equal(by_silo[2], x["stack"][:, 1].ravel())
    np.testing.assert_array_equal(by_silo[3], x["b"])
    for before, after in zip(keys, back, strict=True):
        np.testing.assert_array_equal(before.values, after.values)


def test_rows_whose_silos_are_not_neighbours_are_refused():
    rows = Keys(jnp.zeros((2, 5), jnp.int32), 0, (0, 2), (0, 0), jnp.uint32(0))
    with pytest.raises(ValueError, match="one after the other"):
        counting.Rows().for_each_silo(lambda count, x: x, [rows], jnp.zeros(3))
