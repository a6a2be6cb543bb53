"""Every way optax composes transforms: trains, then checks budget and exactness with numpy."""

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


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "sgd_momentum": lambda: optax.sgd(1e-1, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2),
}
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
        optax.inject_hyperparams(dst_optax.dynamic_subset_tuning, static_args=("distance", "silos", "ties"))(
            FRACTION
        ),
    ),
    "schedule": lambda opt: optax.chain(opt, dst(optax.constant_schedule(FRACTION))),
}
CASES = [(o, "chain") for o in OPTIMIZERS] + [("adamw", w) for w in WRAPPERS if w != "chain"]


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
@pytest.mark.parametrize(("optimizer", "wrapper"), CASES)
def test_budget_and_exactness(optimizer, wrapper, dtype):
    params = seed = make(dtype)
    tx = WRAPPERS[wrapper](OPTIMIZERS[optimizer]())
    state = tx.init(params)

    @jax.jit
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
    np.testing.assert_array_equal(doubled[-1].threshold, state[-1].threshold)
    assert optax.tree.get(state, "count") == 0


def test_none_leaves():
    params = {"a": jnp.ones(20), "none": None}
    tx = dst_optax.wrap(optax.sgd(0.1), FRACTION)
    updates, state = tx.update({"a": jnp.arange(20.0), "none": None}, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    assert after["none"] is None
    assert int((after["a"] != 1).sum()) == 2


def test_metrics_count_what_numpy_counts():
    params = seed = make(jnp.float32)
    tx = dst_optax.wrap(optax.adam(1e-2), FRACTION)
    state, before = tx.init(params), params
    for i in range(4):
        before = params
        updates, state = tx.update(gradients(params, i), state, params)
        params = dst_optax.apply_updates(params, updates, state)
    plan = dst_optax.silos.make_plan(seed, None, FRACTION)
    got = jax.jit(lambda s, p, b: dst_optax.diagnostics.metrics(s, p, previous=b, plan=plan))(
        state, params, before
    )
    old, new = (
        np.concatenate([np.asarray(t[n] != seed[n]).ravel() for n in ("b", "w")]) for t in (before, params)
    )
    assert int(got["subset_size"]) == int(got["free"]) == new.sum()
    assert int(got["budget"]) == 3 + 24
    assert int(got["entered"]) == (new & ~old).sum()
    assert int(got["left"]) == (old & ~new).sum()
    assert np.isclose(got["overlap"], (old & new).sum() / (old | new).sum())
    assert int(got["subset_size/b"]) == 3
    assert np.isclose(got["share/w"], 24 / 27)
