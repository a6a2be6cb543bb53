"""Distances against their formulas, and the subsets that they choose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from precision import x64

import dst_optax
from dst_optax import distances

FORMULAS = {
    "absolute": lambda a, b, s: abs(a - b),
    "squared": lambda a, b, s: (a - b) ** 2,
    "relative": lambda a, b, s: abs(a - b) / np.maximum(abs(s), 1e-6),
}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_formula(name, dtype):
    rng = np.random.default_rng(0)
    theta, theta_hat, seed = rng.normal(size=(3, 4, 5)).astype(dtype)
    seed[0] = 0
    with x64(dtype == "float64"):
        got = getattr(distances, name)(*map(jnp.asarray, (theta, theta_hat, seed)))
        assert got.dtype == dtype
        np.testing.assert_allclose(got, FORMULAS[name](theta, theta_hat, seed), rtol=1e-6)
        assert (np.asarray(got) >= 0).all()
        np.testing.assert_array_equal(getattr(distances, name)(theta, theta, seed), 0)


def test_floor_of_the_relative_distance():
    got = distances.relative(jnp.zeros(2), jnp.full(2, 0.5), jnp.array([0.0, 2.0]), floor=1.0)
    np.testing.assert_array_equal(got, [0.5, 0.25])


def kept_by(distance, dtype=jnp.float32, fraction=0.1):
    rng = np.random.default_rng(6)
    seed, u = (jnp.asarray(rng.normal(size=300), dtype) for _ in range(2))
    tx = dst_optax.wrap(optax.identity(), fraction, distance=distance)
    updates, state = jax.jit(tx.update)(u, tx.init(seed), seed)
    mask = dst_optax.subset_mask(dst_optax.apply_updates(seed, updates, state), state)
    return np.asarray(seed, np.float32), np.asarray(seed + u, np.float32), np.asarray(mask)


def test_the_seed_is_the_third_argument():
    """A distance of the user's own: only entries with a positive seed may move."""
    seed, _, mask = kept_by(lambda theta, theta_hat, seed: jnp.abs(theta - theta_hat) * (seed > 0))
    assert mask.sum() == 30
    assert (seed[mask] > 0).all()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_ranked_in_float32(name, dtype):
    seen = []

    def distance(*args):
        seen.extend(x.dtype for x in args)
        return getattr(distances, name)(*args)

    seed, proposal, mask = kept_by(distance, dtype)
    delta = FORMULAS[name](seed, proposal, seed)
    assert set(seen) == {jnp.dtype("float32")}
    assert 0 < mask.sum() <= 30
    assert delta[mask].min() > delta[~mask].max()


@pytest.mark.parametrize(
    ("distance", "says"),
    [
        (lambda a, b, c: jnp.sum(jnp.abs(a - b)), r"shape \(\)"),
        (lambda a, b, c: jnp.abs(a - b).astype(jnp.bfloat16), "bfloat16"),
        (lambda a, b, c: a > b, "bool"),
    ],
)
def test_a_distance_that_is_not_component_wise_is_refused(distance, says):
    with pytest.raises(ValueError, match=f"component-wise|{says}") as caught:
        kept_by(distance)
    assert caught.match(says)


def test_a_subnormal_distance_is_none():
    """A user's distance may make one by its bits, which no platform flushes."""

    def tiny(theta, theta_hat, theta_seed):
        return jax.lax.bitcast_convert_type((theta_hat != theta_seed).astype(jnp.int32) * 5, jnp.float32)

    params = jnp.arange(8.0)
    tx = dst_optax.wrap(optax.sgd(1.0), 0.5, distance=tiny, ties="fill")
    updates, state = tx.update(jnp.ones(8), tx.init(params), params)
    assert (dst_optax.apply_updates(params, updates, state) == params).all()


def test_a_distance_that_overflows_ranks_largest():
    seed = jnp.array([1.0, -3e38, 2.0, 3.0, 4.0])
    tx = dst_optax.wrap(optax.identity(), 0.25)
    state = dst_optax.reseed(tx.init(seed), seed)
    params = seed.at[1].set(3e38)
    updates, state = tx.update(jnp.array([0.0, 0.0, 1e30, 1.0, 0.0]), state, params)
    assert dst_optax.apply_updates(params, updates, state).tolist() == params.tolist()


def test_what_equals_the_seed_has_no_distance():
    """Whatever a user's distance says."""
    tx = dst_optax.wrap(optax.sgd(1.0), 0.6, distance=lambda a, b, s: 1 + jnp.abs(a - b), ties="fill")
    params = jnp.arange(9.0)
    _, state = tx.update((params < 3).astype(jnp.float32), tx.init(params), params)
    assert float(dst_optax.diagnostics.metrics(state)["num_free"]) == 3


def signed(theta, theta_hat, theta_seed):
    return theta_hat - theta_seed


def test_a_negative_distance_is_found_by_checkify():
    def message(distance):
        tx = dst_optax.wrap(optax.sgd(1.0), 0.5, distance=distance)
        params = {"a": jnp.arange(8.0)}
        return checkify.checkify(jax.jit(tx.update))(params, tx.init(params), params)[0].get()

    assert message(distances.absolute) is None
    assert "'a' is negative" in message(signed)


def test_a_negative_distance_counts_as_none():
    tx = dst_optax.wrap(optax.sgd(1.0), 0.5, distance=signed)
    params = jnp.arange(8.0)
    updates, state = tx.update(params, tx.init(params), params)
    assert (dst_optax.apply_updates(params, updates, state) == params).all()


def test_a_distance_that_is_not_a_number_counts_as_infinite():
    """A seed that is not a number, and a finite proposal for it."""
    params = jnp.array([1.0, jnp.nan, 2.0, 3.0, 4.0])
    tx = dst_optax.wrap(optax.set_to_zero(), 0.25)
    state = dst_optax.reseed(tx.init(params), params)
    repaired = params.at[1].set(7.0)
    updates, state = tx.update(jnp.ones(5), state, repaired)
    np.testing.assert_array_equal(dst_optax.apply_updates(repaired, updates, state), repaired)
    moved = jnp.array([1.0, 7.0, 2.0, 3.5, 4.0])
    updates, state = tx.update(jnp.ones(5), state, moved)
    np.testing.assert_array_equal(dst_optax.apply_updates(moved, updates, state), repaired)
    three = jnp.array([1.0, jnp.nan, jnp.nan, jnp.nan, 4.0])  # more than the budget, and alike
    state = dst_optax.reseed(tx.init(three), three)
    updates, state = tx.update(jnp.ones(5), state, jnp.arange(5.0))
    after = dst_optax.apply_updates(jnp.arange(5.0), updates, state)
    np.testing.assert_array_equal(after, three)
