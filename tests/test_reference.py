"""The page that is the paper and the fast transform agree, where float32 ranks are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import dst_optax
from dst_optax import distances, reference


def subset(tx, seed, u):
    state = tx.init(seed)
    updates, _ = jax.jit(tx.update)(u, state, seed)
    return np.asarray(updates != 0)


def draw(n, salt):
    return jnp.asarray(np.random.default_rng(salt).normal(size=n), jnp.float32)


@pytest.mark.parametrize("name", ["absolute", "relative", "squared"])
@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1, 0.01])
def test_the_first_subset_is_the_same(name, fraction):
    distance = getattr(distances, name)
    seed, u = draw(1001, 0), draw(1001, 1)
    mine = subset(dst_optax.dynamic_subset_tuning(fraction, distance=distance), seed, u)
    papers = subset(reference.dynamic_subset_tuning(fraction, distance=distance), seed, u)
    np.testing.assert_array_equal(mine, papers)
    assert mine.sum() == oracle.rank(fraction, 1001)


def test_training_stays_the_same():
    """Where p + (seed - p) does not round: entries on a grid of powers of two."""

    def grid(salt):
        return {n: jnp.round(draw(s, salt + i) * 2**12) / 2**16 for i, (n, s) in enumerate(SIZES.items())}

    SIZES = {"a": 300, "b": 41}
    seed = p = r = grid(0)
    fast, paper = dst_optax.dynamic_subset_tuning(0.1), reference.dynamic_subset_tuning(0.1)
    fast_state, paper_state = fast.init(seed), paper.init(seed)
    fast_update, paper_update = jax.jit(fast.update), jax.jit(paper.update)
    for step in range(5):
        u = grid(10 * step + 10)
        updates, fast_state = fast_update(u, fast_state, p)
        p = dst_optax.apply_updates(p, updates, fast_state)
        updates, paper_state = paper_update(u, paper_state, r)
        r = optax.apply_updates(r, updates)
        jax.tree.map(np.testing.assert_array_equal, p, r)
        assert (np.asarray(p["a"]) != np.asarray(seed["a"])).any()


def test_float32_ranks_are_why_the_default_differs():
    n, fraction = 100_003, 1e-3
    seed, u = jnp.zeros(n), jnp.asarray(np.random.default_rng(0).permutation(n) + 1.0, jnp.float32)
    assert subset(dst_optax.dynamic_subset_tuning(fraction), seed, u).sum() == oracle.rank(fraction, n)
    assert subset(reference.dynamic_subset_tuning(fraction), seed, u).sum() != oracle.rank(fraction, n)
