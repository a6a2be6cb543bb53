"""Every way optax composes transforms: trains, then checks budget and exactness with numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import dst_optax

PARAMS = {"w": (24, 10), "b": (31,)}
FRACTION = 0.1


def dst(fraction=FRACTION, **kwargs):
    return dst_optax.dynamic_subset_tuning(fraction, **kwargs)


WRAPPERS = {
    "chain": lambda opt: optax.chain(opt, dst()),
    "masked": lambda opt: optax.chain(opt, optax.masked(dst(), {"w": True, "b": False})),
    "partition": lambda opt: optax.chain(
        opt, optax.partition({"x": dst(), "y": dst(0.2)}, {"w": "x", "b": "y"})
    ),
    "multi_steps": lambda opt: optax.MultiSteps(optax.chain(opt, dst()), 2),
    "apply_if_finite": lambda opt: optax.apply_if_finite(optax.chain(opt, dst()), 3),
    "inject_hyperparams": lambda opt: optax.chain(
        opt,
        optax.inject_hyperparams(dst_optax.dynamic_subset_tuning)(fraction_of_free_params=FRACTION),
    ),
    "schedule": lambda opt: optax.chain(opt, dst(optax.constant_schedule(FRACTION))),
    "frozen_partition": lambda opt: optax.partition(
        {"x": optax.chain(opt, dst()), "y": optax.set_to_zero()}, {"w": "x", "b": "y"}
    ),
}


def make(dtype):
    keys = jax.random.split(jax.random.key(0), len(PARAMS))
    return {n: jax.random.normal(k, s).astype(dtype) for k, (n, s) in zip(keys, PARAMS.items(), strict=True)}


def gradients(params, step):
    keys = jax.random.split(jax.random.key(100 + step), len(params))
    return {
        n: jax.random.normal(k, x.shape).astype(x.dtype)
        for k, (n, x) in zip(keys, params.items(), strict=True)
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_budget_and_exactness(wrapper, dtype):
    params = seed = make(dtype)
    tx = WRAPPERS[wrapper](optax.adamw(1e-2))
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=1)
    def step(p, s, g):
        updates, s = tx.update(g, s, p)
        return dst_optax.apply_updates(p, updates, s), s

    moved = 0
    for i in range(6):
        params, state = step(params, state, gradients(params, i))
        for name in params:
            if wrapper == "masked" and name == "b":
                continue
            fraction = 0.2 if (wrapper, name) == ("partition", "b") else FRACTION
            differ = oracle.bits(np.asarray(params[name])) != oracle.bits(np.asarray(seed[name]))
            assert differ.sum() <= oracle.rank(fraction, differ.size)
            moved += differ.sum()
    assert moved > 0
    assert step._cache_size() == 1


def test_bad_steps_under_apply_if_finite_leave_everything_as_it_was():
    params = make(jnp.float32)
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), dst()), 5)
    state = tx.init(params)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, state = tx.update(bad, state, params)
    after = dst_optax.apply_updates(params, updates, state)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    updates, state = tx.update(gradients(params, 0), state, after)
    after = dst_optax.apply_updates(after, updates, state)
    assert int((after["w"] != params["w"]).sum()) == oracle.rank(FRACTION, 240)


@pytest.mark.parametrize("wrapper", ["chain", "multi_steps", "apply_if_finite", "inject_hyperparams"])
def test_seed_is_what_was_restored_after_init(wrapper):
    """Also when the first updates are not applied: accumulated, or not finite."""
    random, restored = make(jnp.float32), jax.tree.map(lambda x: x + 1, make(jnp.float32))
    tx = WRAPPERS[wrapper](optax.sgd(0.1))
    params, state, update = restored, tx.init(random), jax.jit(tx.update)
    steps = [gradients(params, i) for i in range(4)]
    if wrapper == "apply_if_finite":
        steps[0] = jax.tree.map(lambda x: x * jnp.nan, steps[0])
    for g in steps:
        updates, state = update(g, state, params)
        params = dst_optax.apply_updates(params, updates, state)
    mask = dst_optax.subset_mask(params, state)
    for name, differs in mask.items():
        np.testing.assert_array_equal(differs, params[name] != restored[name])
        assert int(differs.sum()) == oracle.rank(FRACTION, differs.size)


def test_accumulated_steps_equal_one_of_their_mean():
    params = make(jnp.float32)
    opt = lambda: dst_optax.wrap(optax.sgd(1e-2, 0.9), FRACTION)  # noqa: E731
    many, one = optax.MultiSteps(opt(), 2), opt()
    p, q, s, r = params, params, many.init(params), one.init(params)
    many_update, one_update = jax.jit(many.update), jax.jit(one.update)
    for i in range(3):
        g = gradients(params, i)
        before = p
        for scale, still in ((0.5, True), (1.5, False)):
            updates, s = many_update(jax.tree.map(lambda x, c=scale: c * x, g), s, p)
            p = dst_optax.apply_updates(p, updates, s)
            same = jax.tree.map(np.array_equal, p, before)
            assert all(jax.tree.leaves(same)) == still
        updates, r = one_update(g, r, q)
        q = dst_optax.apply_updates(q, updates, r)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), p, q)


def test_scan_equals_a_loop():
    params = make(jnp.float32)
    tx = dst_optax.wrap(optax.adam(1e-2), FRACTION)
    all_gradients = [gradients(params, i) for i in range(5)]

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (dst_optax.apply_updates(carry[0], updates, state), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *all_gradients)
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, stacked))((params, tx.init(params)))
    carry, one = (params, tx.init(params)), jax.jit(step)
    for g in all_gradients:
        carry, _ = one(carry, g)
    differ = scanned["w"] != params["w"]
    assert int(differ.sum()) == oracle.rank(FRACTION, 240)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scanned, carry[0])


def test_vmap_over_models_equals_single_models():
    tx = dst_optax.wrap(optax.sgd(0.1), FRACTION)
    seeds = jax.random.normal(jax.random.key(0), (3, 200))
    grads = jax.random.normal(jax.random.key(1), (4, 3, 200))

    def train(p, g):
        state = tx.init(p)
        for i in range(4):
            updates, state = tx.update(g[i], state, p)
            p = dst_optax.apply_updates(p, updates, state)
        return p

    together = jax.jit(jax.vmap(train, in_axes=(0, 1)))(seeds, grads)
    for i in range(3):
        np.testing.assert_array_equal(together[i], jax.jit(train)(seeds[i], grads[:, i]))


def test_abstract_init_and_map_params():
    params = make(jnp.float32)
    tx = optax.chain(optax.adam(1e-2), dst())
    shapes = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    np.testing.assert_array_equal(doubled[-1].seed["w"], 2 * params["w"])
    np.testing.assert_array_equal(doubled[-1].memory.threshold, state[-1].memory.threshold)
    assert optax.tree.get(state, "count") == 0


def test_none_leaves():
    params = {"a": jnp.ones(20), "none": None}
    tx = dst_optax.wrap(optax.sgd(0.1), FRACTION)
    updates, state = tx.update({"a": jnp.arange(20.0), "none": None}, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    assert after["none"] is None
    assert int((after["a"] != 1).sum()) == 2


def test_masked_node_leaves():
    """As a wrapper hands them over: in parameters, updates and state alike."""
    params = {"a": jnp.ones(20), "masked": optax.MaskedNode()}
    tx = dst()
    updates, state = tx.update({"a": jnp.arange(20.0), "masked": optax.MaskedNode()}, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    assert after["masked"] == optax.MaskedNode()
    assert int((after["a"] != 1).sum()) == 2
    assert dst_optax.finalize(after, state)["masked"] == optax.MaskedNode()
