"""The contract, against an oracle that shares no code with the package."""

import dataclasses
import functools
import itertools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from precision import x64

import dst_optax
from dst_optax import counting, diagnostics, distances, select, silos, subset
from dst_optax import state as state_lib
from dst_optax.project import project

pytestmark = pytest.mark.usefixtures("strict")

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def given_updates():
    """An optimizer whose updates are its gradients."""
    return optax.identity()


def values(rng, kind, n, dtype):
    match kind:
        case "normal":
            x = rng.normal(size=n)
        case "tied":
            x = rng.integers(-2, 3, n) * 0.5
        case "zero":
            x = np.zeros(n)
        case "denormal":
            x = rng.normal(size=n) * 10.0 ** rng.integers(-45, -30, n)
        case "wide":
            x = rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n)
        case "neighbours":  # one bit apart, the hardest to tell
            x = np.float32(1) + np.spacing(np.float32(1)) * rng.integers(0, 9, n)
        case "nonfinite":
            x = rng.normal(size=n)
            x[rng.random(n) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        case _:
            raise AssertionError(kind)
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(dtype)


KINDS = ["normal", "tied", "zero", "denormal", "wide", "neighbours", "nonfinite"]


def run_steps(tx, seed, all_updates):
    """Yields parameters before, updates given, parameters after and the state of each step."""
    params, state = jnp.asarray(seed), tx.init(jnp.asarray(seed))
    step = jax.jit(tx.update)
    for u in all_updates:
        before = np.asarray(params)
        updates, state = step(jnp.asarray(u), state, params)
        params = dst_optax.apply_updates(params, updates, state)
        yield before, u, np.asarray(params), state


def check_against_oracle(seed, before, u, after, fraction, ties):
    delta, odd = oracle.distance_keys(seed, before, u)
    m = oracle.rank(fraction, seed.size)
    free = m >= seed.size
    kept = oracle.keep(delta, m, ties) | (odd & (m > 0))
    with np.errstate(all="ignore"):
        proposal = (oracle.flush(before) + oracle.flush(u)).astype(seed.dtype)
    expected = np.where(kept, oracle.flush(proposal), seed)
    same = oracle.bits(oracle.flush(after)) == oracle.bits(oracle.flush(expected))
    nan = np.isnan(after.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    wrong = np.flatnonzero(~(same | nan))
    assert wrong.size == 0, (wrong[:5], after[wrong[:5]], expected[wrong[:5]], kept[wrong[:5]])
    if not free:
        outside = ~kept
        assert (oracle.bits(after)[outside] == oracle.bits(seed)[outside]).all()


@pytest.mark.parametrize("ties", ["strict", "fill"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_equals_the_oracle(kind, dtype, ties):
    rng = np.random.default_rng(0)
    for n, fraction in ((2, 0.1), (37, 0.1), (300, 0.5)):
        seed = values(rng, "normal" if kind == "nonfinite" else kind, n, dtype)
        updates = [values(rng, kind, n, dtype) * np.asarray(0.5, dtype) for _ in range(3)]
        tx = dst_optax.wrap(given_updates(), fraction, ties=ties)
        for before, u, after, _ in run_steps(tx, seed, updates):
            check_against_oracle(seed, before, u, after, fraction, ties)


@settings(max_examples=25)
@given(data=st.data())
def test_random_silos_equal_the_oracle(data):
    n = data.draw(st.sampled_from([1, 2, 5, 64, 301]))
    dtype = data.draw(st.sampled_from(DTYPES))
    ties = data.draw(st.sampled_from(["strict", "fill"]))
    fraction = data.draw(st.sampled_from([0.01, 0.1, 0.25, 0.9]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    seed = values(rng, data.draw(st.sampled_from(KINDS[:-1])), n, dtype)
    tx = dst_optax.wrap(given_updates(), fraction, ties=ties)
    updates = [values(rng, kind, n, dtype) for kind in kinds]
    for before, u, after, _ in run_steps(tx, seed, updates):
        check_against_oracle(seed, before, u, after, fraction, ties)


@pytest.mark.parametrize("n", [100_003, 1_000_003])
@pytest.mark.parametrize("fraction", [1e-3, 0.1, 1e-5])
def test_rank_is_exact_where_float32_ranks_are_not(n, fraction):
    rng = np.random.default_rng(1)
    seed = rng.normal(size=n).astype(np.float32)
    tx = dst_optax.wrap(given_updates(), fraction)
    u = (rng.permutation(n).astype(np.float32) + 1) * np.float32(2.0**-20)
    seed = np.zeros_like(seed)
    _, _, after, _ = next(run_steps(tx, seed, [u]))
    assert (after != seed).sum() == oracle.rank(fraction, n)


def test_float64():
    with x64():
        rng = np.random.default_rng(2)
        seed = rng.normal(size=5000)
        updates = [rng.normal(size=5000) * 1e-12 for _ in range(4)]
        tx = dst_optax.wrap(given_updates(), 0.1)
        for before, u, after, _ in run_steps(tx, seed, updates):
            check_against_oracle(seed, before, u, after, 0.1, "strict")
            assert (after != seed).sum() == 500


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1e-3, 0.7, 1.0])
def test_traced_fraction_equals_static(fraction):
    rng = np.random.default_rng(3)
    params = {"a": jnp.asarray(rng.normal(size=(37, 11)), jnp.float32), "b": jnp.ones(101)}
    static = dst_optax.dynamic_subset_tuning(fraction)
    injected = optax.inject_hyperparams(dst_optax.dynamic_subset_tuning)(fraction_of_free_params=fraction)
    scheduled = dst_optax.dynamic_subset_tuning(optax.constant_schedule(fraction))
    results = []
    for tx in (static, injected, scheduled):
        p, state = params, tx.init(params)
        for i in range(4):
            keys = jax.random.split(jax.random.key(i))
            u = {n: jax.random.normal(k, p[n].shape) for n, k in zip("ab", keys, strict=True)}
            u, state = jax.jit(tx.update)(u, state, p)
            p = dst_optax.apply_updates(p, u, state)
        results.append(p)
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


def test_fraction_one_is_the_inner_optimizer_bit_for_bit_and_keeps_no_seed():
    params = {"w": jax.random.normal(jax.random.key(0), (50, 3))}
    tx, plain = dst_optax.wrap(optax.sgd(0.1, 0.9), 1.0), optax.sgd(0.1, 0.9)
    state, plain_state, p, r = tx.init(params), plain.init(params), params, params
    assert jax.tree.leaves(state[-1].seed) == []
    for i in range(3):
        g = {"w": jax.random.normal(jax.random.key(i), (50, 3))}
        u, state = tx.update(g, state, p)
        p = dst_optax.apply_updates(p, u, state)
        v, plain_state = plain.update(g, plain_state, r)
        r = optax.apply_updates(r, v)
    np.testing.assert_array_equal(p["w"], r["w"])


def test_frozen_leaves_keep_their_bits():
    seed = {"w": jnp.array([-0.0, 0.0, 1e-40, 1.0, jnp.inf]), "free": jnp.ones(3)}
    tx = dst_optax.wrap(optax.sgd(1.0), [("^w$", 0), ("free", 1)])
    state = tx.init(seed)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, seed), state, seed)
    after = dst_optax.apply_updates(seed, updates, state)
    np.testing.assert_array_equal(oracle.bits(np.asarray(after["w"])), oracle.bits(np.asarray(seed["w"])))
    np.testing.assert_array_equal(after["free"], 0)
    plain = np.asarray(optax.apply_updates(seed, updates)["w"])
    normal = [0, 1, 3, 4]  # a sum may flush a subnormal number
    np.testing.assert_array_equal(oracle.bits(plain)[normal], oracle.bits(np.asarray(seed["w"]))[normal])


def test_a_budget_that_is_0_at_run_time_frees_nothing_not_even_what_is_not_finite():
    seed = jnp.arange(6.0)
    tx = dst_optax.wrap(given_updates(), optax.constant_schedule(0.0))
    updates, state = tx.update(jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0, 2.0]), tx.init(seed), seed)
    np.testing.assert_array_equal(dst_optax.apply_updates(seed, updates, state), seed)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000])
def test_what_is_not_a_number_stays_visible(bits):
    """Also where the update has the very bits of ``seed - p``, which would ask for the seed."""
    seed, odd = jnp.arange(5.0), jnp.asarray(np.array([bits], np.uint32).view(np.float32))
    tx = dst_optax.wrap(given_updates(), 0.25)
    params, state = seed, tx.init(seed)
    for _ in range(3):
        updates, state = tx.update(jnp.zeros(5).at[0].set(odd[0]), state, params)
        params = dst_optax.apply_updates(params, updates, state)
        assert jnp.isnan(params[0])
        np.testing.assert_array_equal(params[1:], seed[1:])


def test_updates_that_are_products_in_the_same_program():
    """The proposal that is ranked and the one that is applied round alike (no fused multiply-add)."""
    tx = dst_optax.dynamic_subset_tuning(0.3)

    @jax.jit
    def step(p, g, c, state):
        updates, state = tx.update(g * c, state, p)
        return dst_optax.apply_updates(p, updates, state), state

    rng = np.random.default_rng(4)
    seed = rng.normal(size=100_000).astype(np.float32)
    p, state = jnp.asarray(seed), tx.init(jnp.asarray(seed))
    for _ in range(3):
        before, g = np.asarray(p), rng.normal(size=seed.size).astype(np.float32)
        p, state = step(p, jnp.asarray(g), jnp.float32(0.00317), state)
        u = g * np.float32(0.00317)
        check_against_oracle(seed, before, u, np.asarray(p), 0.3, "strict")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_finalize_heals_plain_apply(dtype):
    params = jax.random.normal(jax.random.key(0), (400, 10), dtype)
    tx = dst_optax.wrap(optax.sgd(1.0), 0.1, ties="fill")
    seed, p, state, healed = params, params, tx.init(params), 0
    for i in range(5):
        g = (jax.random.normal(jax.random.key(10 + i), p.shape) * 10).astype(dtype)
        u, state = tx.update(g, state, p)
        p = optax.apply_updates(p, u)
        final = dst_optax.finalize(p, state)
        healed += int(((p != seed) & (final == seed)).sum())
        assert int((final != seed).sum()) <= oracle.rank(0.1, 4000)
    assert healed > 0


def test_updates_are_the_optimizers_inside_the_subset_and_lead_back_outside():
    seed = jax.random.normal(jax.random.key(0), (1000,))
    inner, tx = optax.sgd(0.1), dst_optax.wrap(optax.sgd(0.1), 0.2)
    params, state = seed, tx.init(seed)
    for i in range(3):
        grads = jax.random.normal(jax.random.key(1 + i), seed.shape)
        updates, state = tx.update(grads, state, params)
        proposed, _ = inner.update(grads, inner.init(params))
        mask = state[-1].mask
        assert 0 < int(mask.sum()) < 300
        assert (updates == jnp.where(mask, proposed, seed - params)).all()
        params = dst_optax.apply_updates(params, updates, state)


def test_finalize_changes_nothing_after_an_exact_apply():
    params = jax.random.normal(jax.random.key(0), (500,))
    tx = dst_optax.wrap(optax.sgd(1e-3, 0.9), 0.1)
    p, state = params, tx.init(params)
    for i in range(4):
        u, state = tx.update(jax.random.normal(jax.random.key(i), p.shape), state, p)
        p = dst_optax.apply_updates(p, u, state)
        np.testing.assert_array_equal(dst_optax.finalize(p, state), p)


def test_seed_is_the_model_of_the_first_update():
    tx = dst_optax.wrap(optax.sgd(0.1), 0.2)
    random, restored = jnp.arange(20.0), jnp.arange(20.0) * 3
    state = tx.init(random)
    assert not bool(state[-1].captured)
    assert not dst_optax.subset_mask(restored, state).any()
    np.testing.assert_array_equal(dst_optax.finalize(restored, state), restored)
    u, state = tx.update(jnp.ones(20), state, restored)
    np.testing.assert_array_equal(state[-1].seed, restored)
    p = dst_optax.apply_updates(restored, u, state)
    u, state = tx.update(jnp.ones(20), state, p)
    np.testing.assert_array_equal(state[-1].seed, restored)


def test_reseed():
    tx = dst_optax.wrap(optax.sgd(0.1), 0.2)
    state = dst_optax.reseed(tx.init(jnp.zeros(20)), jnp.ones(20))
    assert bool(state[-1].captured)
    np.testing.assert_array_equal(state[-1].seed, 1)


def test_a_new_seed_leaves_the_parameters_as_they_are():
    tx = dst_optax.wrap(optax.sgd(0.1), 0.2)
    params = jnp.arange(20.0)
    _, state = tx.update(params, tx.init(params), params)
    assert float(state[-1].memory.threshold[0]) > 0
    state = dst_optax.reseed(state, params + 7)
    np.testing.assert_array_equal(dst_optax.finalize(params, state), params)
    assert dst_optax.subset_mask(params, state).all()
    assert not np.any([state[-1].memory.threshold, state[-1].memory.threshold_delta])
    plan = silos.make_plan(params, None, 0.2)
    assert int(diagnostics.metrics(state, params, plan=plan)["subset_size"]) == 20


def test_the_subset_is_told_by_bits():
    def with_signs(theta, theta_hat, theta_seed):
        changed = jnp.signbit(theta_hat) != jnp.signbit(theta_seed)
        return jnp.abs(theta_hat - theta_seed) + changed.astype(theta.dtype)

    seed = jnp.array([-0.0, 1.0, 2.0])
    tx = dst_optax.wrap(optax.identity(), 0.5, distance=with_signs)
    updates, state = tx.update(jnp.array([0.0, 0.25, 0.0]), tx.init(seed), seed)
    params = dst_optax.apply_updates(seed, updates, state)
    assert dst_optax.subset_mask(params, state).tolist() == [True, False, False]
    assert subset.extract(params, state)[""].positions.tolist() == [0]


MISPLACED = [
    ({"params": {"w": jnp.ones(4)}}, "'params/w' is no parameter"),
    ({"w": jnp.float32(7)}, r"'w' has the shape \(\), its parameter \(4,\)"),
    ({"w": jnp.ones((3, 4))}, r"'w' has the shape \(3, 4\)"),
]


@pytest.mark.parametrize(("updates", "says"), MISPLACED)
def test_updates_of_other_parameters_are_not_applied(updates, says):
    params = {"w": jnp.ones(4)}
    _, state = (tx := dst_optax.wrap(optax.sgd(0.1))).update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=says):
        dst_optax.apply_updates(params, updates, state)


def test_states_of_several_models_are_told_apart_from_one():
    tx, params = dst_optax.wrap(optax.sgd(0.1), 0.2), jnp.ones((4, 5))
    states = jax.vmap(tx.init)(params)
    updates, states = jax.vmap(tx.update)(params, states, params)
    inside = jax.vmap(dst_optax.apply_updates)(params, updates, states)
    assert inside.shape == params.shape
    with pytest.raises(ValueError, match=r"one of 4 models.*inside the vmap"):
        dst_optax.apply_updates(params, updates, states)


def test_stacked_equals_unstacked():
    key = jax.random.key(0)
    stacked = {"w": jax.random.normal(key, (7, 5, 4)), "b": jnp.zeros((3, 5))}
    flat = {f"w{i}": stacked["w"][:, i] for i in range(5)} | {f"b{i}": stacked["b"][:, i] for i in range(5)}
    for ties in ("strict", "fill"):
        one = dst_optax.wrap(
            optax.sgd(0.1, 0.9), 0.3, ties=ties, silos=silos.per_tensor(stacked=[("^[wb]$", 1)])
        )
        many = dst_optax.wrap(optax.sgd(0.1, 0.9), 0.3, ties=ties)
        p, s, q, r = stacked, one.init(stacked), flat, many.init(flat)
        for i in range(4):
            g = jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape), stacked)
            h = {f"{n}{i}": g[n][:, i] for n in "wb" for i in range(5)}
            u, s = one.update(g, s, p)
            p = dst_optax.apply_updates(p, u, s)
            v, r = many.update(h, r, q)
            q = dst_optax.apply_updates(q, v, r)
        for name, i in itertools.product("wb", range(5)):
            np.testing.assert_array_equal(p[name][:, i], q[f"{name}{i}"])


@pytest.mark.parametrize("ties", ["strict", "fill"])
def test_silo_over_tensors_of_different_dtypes(ties):
    rng = np.random.default_rng(5)
    params = {
        "a": jnp.asarray(rng.normal(size=(30, 4)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=50), jnp.bfloat16),
    }
    tx = dst_optax.wrap(given_updates(), 0.1, silos=silos.whole_model(), ties=ties)
    u = {k: jnp.asarray(rng.normal(size=v.shape), v.dtype) for k, v in params.items()}
    updates, state = tx.update(u, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    parts = [
        oracle.distance_keys(*(np.asarray(x[k]).reshape(-1) for x in (params, params, u)))[0] for k in "ab"
    ]
    kept = oracle.keep(np.concatenate(parts), oracle.rank(0.1, 170), ties)
    got = np.concatenate([(np.asarray(after[k]) != np.asarray(params[k])).ravel() for k in "ab"])
    np.testing.assert_array_equal(got, kept)


def test_num_free_params_with_fill_meets_the_budget_exactly():
    params = {"a": jnp.ones((40, 40)), "b": jnp.ones(100), "c": jnp.ones(())}
    tx = dst_optax.wrap(optax.sgd(0.1, 0.9), num_free_params=77, ties="fill")
    state = tx.init(params)
    g = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    u, state = tx.update(g, state, params)
    mask = dst_optax.subset_mask(dst_optax.apply_updates(params, u, state), state)
    assert sum(int(m.sum()) for m in jax.tree.leaves(mask)) == 77


def test_fill_orders_ties_over_all_tensors_of_a_silo():
    params = {"a": jnp.zeros((7, 5)), "b": jnp.zeros(11), "c": jnp.zeros((5, 7))}
    tx = dst_optax.wrap(given_updates(), 0.4, silos=silos.whole_model(), ties="fill")
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    kept = oracle.keep(np.ones(81), oracle.rank(0.4, 81), "fill")
    got = np.concatenate([np.asarray(after[k]).ravel() != 0 for k in "abc"])
    np.testing.assert_array_equal(got, kept)


def test_fill_orders_silos_whose_indices_need_two_digits(monkeypatch):
    """Silos of more than 2**31 entries, at a smaller scale; the shapes are of this test alone."""
    monkeypatch.setattr(select, "INDEX_BITS", 6)
    rng = np.random.default_rng(8)
    deltas = {
        "tied": np.full((23, 29), 3.0),
        "some_tied": np.where(rng.random((31, 19)) < 0.03, 9.0, 2.0),
        "distinct": rng.permutation(37 * 17).reshape(37, 17) + 1.0,
        "few": np.where(np.arange(41 * 13).reshape(41, 13) < 7, 1.0, 0.0),
    }
    seed = {k: jnp.zeros(v.shape) for k, v in deltas.items()}
    tx = dst_optax.wrap(given_updates(), 0.1, ties="fill")
    updates, state = tx.update(
        {k: jnp.asarray(v, jnp.float32) for k, v in deltas.items()}, tx.init(seed), seed
    )
    after = dst_optax.apply_updates(seed, updates, state)
    for k, delta in deltas.items():
        kept, m = np.asarray(after[k]) != 0, oracle.rank(0.1, delta.size)
        assert kept.sum() == min(m, (delta > 0).sum()), k
        assert not (~kept & (delta > delta[kept].min())).any(), k
    spread = np.flatnonzero(np.asarray(after["tied"]) != 0)
    assert spread.max() > 23 * 29 * 3 // 4
    assert spread.min() < 23 * 29 // 4


@pytest.mark.parametrize(
    ("shape", "offset"), [((16, 2**30), 5), ((3, 2**17, 2**17), 2**31 + 5), ((2**25, 99), 0)]
)
def test_indices_beyond_32_bits_are_told_apart(shape, offset):
    """Only a corner of the tensor is computed."""
    corner = tuple(slice(max(n - 3, 0), n) for n in shape)

    @jax.jit
    def digits():
        return [x[corner] for x in select._index_digits(shape, None, (offset,))]

    strides = [int(np.prod(shape[d + 1 :], dtype=object)) for d in range(len(shape))]
    positions = np.meshgrid(*[np.arange(s.start, s.stop) for s in corner], indexing="ij")
    index = offset + sum(x.astype(np.int64) * n for x, n in zip(positions, strides, strict=True))
    mixed, above = digits()
    np.testing.assert_array_equal(above, index >> 31)
    expected = select._mix(jnp.asarray(index & (2**31 - 1), jnp.uint32))
    np.testing.assert_array_equal(mixed, expected.astype(jnp.int32))


@pytest.mark.parametrize("rule", [silos.per_tensor(), silos.per_tensor([("e", 0)])])
@pytest.mark.parametrize("fraction", [0.5, optax.constant_schedule(0.5), [("e", 0), ("", 0.5)]])
def test_empty_leaves_take_no_part(fraction, rule):
    params = {"w": jnp.zeros(5), "e": jnp.zeros((0, 3))}
    tx = dst_optax.wrap(given_updates(), fraction, silos=rule)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = dst_optax.apply_updates(params, updates, state)
    assert {path: e.positions.size for path, e in subset.extract(params, state).items()}["e"] == 0


def test_silos_too_large_for_a_row_are_traced():
    params = {name: jax.ShapeDtypeStruct((40_000, 40_000), jnp.bfloat16) for name in "abcd"}
    tx = dst_optax.wrap(given_updates(), 0.5, silos=silos.whole_model())
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


def test_numpys_float64_becomes_float32():
    params = {"w": np.zeros(4)}
    tx = dst_optax.wrap(given_updates(), 0.5)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"w": jnp.ones(4)}, state, params)
        params = dst_optax.apply_updates(params, updates, state)
    assert params["w"].dtype == jnp.float32


@pytest.mark.parametrize(("ties", "distinct"), [("strict", True), ("fill", True), ("fill", False)])
def test_counts_of_several_tensors_carry(ties, distinct):
    """Counts of each tensor fit in 16 bits, their sum does not."""
    rng = np.random.default_rng(10)
    order = rng.permutation(120_000) + 1.0 if distinct else rng.integers(1, 4, 120_000)
    u = {"a": jnp.asarray(order[:60_000], jnp.float32), "b": jnp.asarray(order[60_000:], jnp.float32)}
    params = jax.tree.map(jnp.zeros_like, u)
    tx = dst_optax.wrap(given_updates(), 0.6, silos=silos.whole_model(), ties=ties)
    updates, state = tx.update(u, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    m = oracle.rank(0.6, 120_000)
    assert sum(int((x != 0).sum()) for x in jax.tree.leaves(after)) == m
    kept = np.concatenate([np.asarray(x) for x in jax.tree.leaves(after)])
    assert kept[kept != 0].min() >= np.sort(order)[-m]
    assert int(dst_optax.diagnostics.metrics(state)["num_free"]) == m


@pytest.mark.parametrize("ties", ["strict", "fill"])
def test_silos_of_one_size_need_not_be_neighbours(ties):
    rng = np.random.default_rng(3)
    params = {k: jnp.zeros(n) for k, n in zip("abcd", (40, 30, 40, 30), strict=True)}
    u = {k: jnp.asarray(rng.permutation(x.size) + 1.0, jnp.float32) for k, x in params.items()}
    tx = dst_optax.wrap(given_updates(), 0.1, ties=ties)
    updates, state = tx.update(u, tx.init(params), params)
    tuned = dst_optax.apply_updates(params, updates, state)
    for k, x in u.items():
        kept = x.size // 10  # the ceiling of a tenth of one entry less
        np.testing.assert_array_equal(tuned[k], np.where(x > x.size - kept, x, 0.0))


@pytest.mark.parametrize("ties", ["strict", "fill"])
@pytest.mark.parametrize(("groups", "batch"), [(("ac", "bd"), 100), (("a", "b", "c", "d"), 90)])
def test_batches_of_silos_change_nothing(monkeypatch, ties, groups, batch):
    """Silos that interleave, so that leaves leave their order; and batches of one, two and one silo."""
    rng = np.random.default_rng(9)
    seed = {
        k: jnp.asarray(rng.normal(size=n), jnp.float32) for k, n in zip("abcd", (47, 53, 31, 43), strict=True)
    }
    u = {
        k: jnp.asarray(rng.normal(size=x.shape) * i, jnp.float32) for i, (k, x) in enumerate(seed.items(), 1)
    }
    rule = silos.per_group(lambda path: next(group for group in groups if path in group))
    tx = dst_optax.wrap(given_updates(), 0.2, ties=ties, silos=rule)

    def run(batch):
        monkeypatch.setattr(counting, "BATCH", batch)
        select.choose.clear_cache()
        updates, state = tx.update(u, tx.init(seed), seed)
        return dst_optax.apply_updates(seed, updates, state), state[-1]

    (whole, expected), (parts, got) = run(2**22), run(batch)
    select.choose.clear_cache()
    for group in groups:
        key = lambda k: oracle.distance_keys(*(np.asarray(x[k]) for x in (seed, seed, u)))[0]  # noqa: E731
        delta = np.concatenate([key(k) for k in group])
        kept = oracle.keep(delta, oracle.rank(0.2, delta.size), ties)
        free = np.concatenate([np.asarray(parts[k] != seed[k]) for k in group])
        np.testing.assert_array_equal(free, kept)
    jax.tree.map(np.testing.assert_array_equal, got.memory, expected.memory)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("distance", [distances.relative, distances.squared])
def test_other_distances_rank_as_numpy_does(distance):
    rng = np.random.default_rng(6)
    seed, u = (rng.normal(size=200).astype(np.float32) for _ in range(2))
    tx = dst_optax.wrap(given_updates(), 0.1, distance=distance)
    _, _, after, _ = next(run_steps(tx, seed, [u]))
    moved = np.abs((seed + u) - seed)
    delta = moved / np.maximum(np.abs(seed), 1e-6) if distance is distances.relative else moved**2
    np.testing.assert_array_equal(after != seed, oracle.keep(delta, 20))


def test_state_is_small_and_named():
    params = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(8)}
    state = dst_optax.dynamic_subset_tuning(0.1).init(params)
    assert type(state).__name__.endswith("State")
    assert "count" not in state._fields
    assert jax.tree.map(lambda x: x.dtype, state.seed) == jax.tree.map(lambda x: x.dtype, params)
    assert [x.nbytes for x in jax.tree.leaves(state.mask)] == [64 * 64, 8]
    rest = sum(x.nbytes for x in jax.tree.leaves(state._replace(seed=(), mask=())))
    assert rest <= 8 * 2 + 40


def test_captured_seed_is_passed_on_in_place():
    """No step after the first writes the seed: its buffer is donated through."""
    tx = dst_optax.wrap(optax.sgd(0.1), 0.1)
    p = jnp.ones((256, 256))
    state = dst_optax.reseed(tx.init(p), p)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p)[1], donate_argnums=1)
    before = state[-1].seed.unsafe_buffer_pointer()
    state = step(p, state, p)
    assert state[-1].seed.unsafe_buffer_pointer() == before


@dataclasses.dataclass
class Unhashable:
    """A distance that jax could not tell from another one."""

    power: float = 2.0

    def __call__(self, theta, theta_hat, theta_seed):
        return jnp.abs(theta - theta_seed) ** self.power


REFUSED = [
    (dict(fraction_of_free_params=1.5), ValueError, "1.5"),
    (dict(fraction_of_free_params=-0.1), ValueError, "-0.1"),
    (dict(fraction_of_free_params="x"), TypeError, "'x'"),
    (dict(fraction_of_free_params=0.2, num_free_params=3), ValueError, "both"),
    (dict(num_free_params=-1), ValueError, "-1"),
    (dict(ties="some"), ValueError, "'some'"),
    (dict(fraction_of_free_params=[("nothing", 0.1), (".*", 0.1)]), ValueError, "'nothing'"),
    (dict(fraction_of_free_params=[("a", 0.1)]), ValueError, "'b'"),
    (dict(silos=silos.per_tensor(stacked=[("zz", 0)])), ValueError, "'zz'"),
    (dict(silos=silos.per_tensor(stacked=[("b", 4)])), ValueError, "axis"),
    (dict(silos=silos.per_group([("a", "x")])), ValueError, "'b'"),
    (dict(silos="per_tensor"), TypeError, "per_tensor"),
    (dict(fraction_of_free_params=jnp.float32(10)), ValueError, r"10\.0.*\[0, 1\]"),
    (dict(fraction_of_free_params=jnp.float32("nan")), ValueError, "nan"),
    (dict(fraction_of_free_params=optax.linear_schedule(50.0, 1.0, 9)), ValueError, r"50\.0.*\[0, 1\]"),
    (dict(fraction_of_free_params=lambda step: step / step), ValueError, "nan"),
    (dict(fraction_of_free_params={"a": 0.1, "b": 0.1, "head": 1.0}), ValueError, "'head'.*lack"),
    (dict(silos=silos.per_group({"a": "x", "b": "y", "head": "z"})), ValueError, "'head'.*lack"),
    (dict(distance=Unhashable()), TypeError, "hashed"),
    (dict(distance="absolute"), TypeError, "'absolute'.*function"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED)
def test_bad_arguments_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        dst_optax.dynamic_subset_tuning(**arguments).init({"a": jnp.ones(3), "b": jnp.ones(4)})


def test_bad_parameters_are_refused():
    tx = dst_optax.dynamic_subset_tuning()
    with pytest.raises(TypeError, match=r"'n/k'.*int32"):
        tx.init({"n": {"k": jnp.arange(3)}})
    with pytest.raises(TypeError, match="'key'"):
        tx.init({"key": jax.random.key(0)})
    params = {"a": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="'a'"):
        tx.update({"a": jnp.ones(4)}, state, {"a": jnp.ones(4)})
    with pytest.raises(ValueError, match="'a' that params lacks"):
        tx.update({"b": jnp.ones(3)}, state, {"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="fingerprint"):
        tx.update(params, state._replace(fingerprint=jnp.uint32(1)), params)
    with pytest.raises(ValueError, match="silos"):
        dst_optax.dynamic_subset_tuning(silos=silos.per_tensor(stacked=[("a", 0)])).update(
            params, state, params
        )
    with pytest.raises(TypeError, match="update of 'a' has the dtype int32"):
        tx.update({"a": jnp.ones(3, jnp.int32)}, state, params)
    with pytest.raises(TypeError, match="update of 'a' has the dtype float8"):
        tx.update({"a": jnp.ones(3, jnp.float8_e5m2)}, state, params)
    with pytest.raises(ValueError, match="no DynamicSubsetTuningState"):
        dst_optax.apply_updates(params, params, optax.EmptyState())


def test_distance_of_wrong_shape_is_refused():
    tx = dst_optax.wrap(optax.sgd(0.1), distance=lambda a, b, c: jnp.sum(jnp.abs(a - b)))
    params = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"'a'.*component-wise"):
        tx.update(params, tx.init(params), params)


def test_no_recompile_after_the_first_call():
    tx = dst_optax.wrap(optax.sgd(0.1, 0.9), 0.1)
    step = jax.jit(tx.update)
    params = {"a": jnp.ones((8, 8))}
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


@pytest.mark.parametrize("value", [jnp.asarray(1), lambda step: jnp.where(step < 1, 0, 1)])
def test_fractions_at_run_time_may_be_integers(value):
    tx = dst_optax.wrap(optax.sgd(1.0), value)
    params, state = jnp.zeros(6), tx.init(jnp.zeros(6))
    for _ in range(2):
        updates, state = tx.update(-jnp.arange(6.0), state, params)
        params = dst_optax.apply_updates(params, updates, state)
    expected = 2 * jnp.arange(6.0) if isinstance(value, jax.Array) else jnp.arange(6.0)
    np.testing.assert_array_equal(params, expected)


def test_a_schedule_that_gives_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"scalar.*\(3,\)"):
        dst_optax.dynamic_subset_tuning(lambda step: jnp.ones(3)).init(jnp.ones(4))


def test_fractions_outside_the_unit_interval_are_noticed_at_later_steps():
    tx = dst_optax.wrap(optax.sgd(0.1), lambda step: 0.5 + step.astype(jnp.float32))
    params = jnp.ones(4)
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"1\.5.*\[0, 1\]"):
        tx.update(params, state, params)
    checked = checkify.checkify(jax.jit(tx.update))
    error, _ = checked(params, state, params)
    with pytest.raises(checkify.JaxRuntimeError, match=r"\[0, 1\], got 1\.5"):
        error.throw()


@pytest.mark.parametrize("apply", [dst_optax.apply_updates, optax.apply_updates])
def test_derivatives_are_those_of_the_kept_updates(apply):
    params = gradients = jnp.arange(1.0, 7.0)

    def loss(learning_rate, params):
        tx = dst_optax.wrap(optax.sgd(learning_rate), 0.5)
        updates, state = tx.update(gradients, tx.init(params), params)
        after = apply(params, updates, state) if apply is dst_optax.apply_updates else apply(params, updates)
        return jnp.sum(after**2)

    kept = params > 3
    after = jnp.where(kept, params - 0.1 * gradients, params)
    expected = (jnp.sum(jnp.where(kept, -2 * after * gradients, 0)), 2 * after)
    for derivative in (jax.grad, jax.jacfwd):
        found = derivative(loss, (0, 1))(0.1, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_second_derivatives_through_a_scan():
    """A scan forgets the rules of derivatives, and would make 0 of the bits."""

    def loss(learning_rate, loop):
        tx = dst_optax.wrap(optax.sgd(learning_rate), 0.5)
        start = jnp.arange(1.0, 7.0)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params**2, state, params)
            return (dst_optax.apply_updates(params, updates, state), state), None

        carry = (start, tx.init(start))
        if loop:
            for _ in range(3):
                carry, _ = step(carry, None)
        else:
            carry, _ = jax.lax.scan(step, carry, None, 3)
        return jnp.sum(carry[0] ** 2)

    expected = jax.jacfwd(jax.jacfwd(loss))(0.01, True)
    assert abs(expected) > 100
    np.testing.assert_allclose(jax.hessian(loss)(0.01, False), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(0.01, False), jax.jacfwd(loss)(0.01, True), rtol=1e-5)


@pytest.mark.parametrize("wrapper", ["multi_steps", "apply_if_finite"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_seed_is_the_model_before_the_first_update_bit_for_bit(wrapper, dtype):
    """Updates of nothing, which wrappers make before it, would turn -0.0 into 0.0."""
    seed = params = jnp.array([-0.0, 1, 2, 3, 4, -0.0, 6, 1e-40], dtype)
    inner = dst_optax.wrap(optax.sgd(0.1), 0.3)
    tx = optax.MultiSteps(inner, 2) if wrapper == "multi_steps" else optax.apply_if_finite(inner, 3)
    state = tx.init(params)
    for i in range(4):
        gradients = jnp.full(8, jnp.nan if i == 0 else 1.0, dtype) * jnp.arange(8, dtype=dtype)
        gradients = jnp.nan_to_num(gradients) if wrapper == "multi_steps" else gradients
        with jax.numpy_dtype_promotion("standard"):  # the wrappers' own arithmetic
            updates, state = jax.jit(tx.update)(gradients, state, params)
        params = jax.jit(dst_optax.apply_updates)(params, updates, state)
    (dst,) = state_lib.states(state)
    np.testing.assert_array_equal(oracle.bits(np.asarray(dst.seed)), oracle.bits(np.asarray(seed)))


def test_leaves_in_another_order_are_refused():
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    updates = OrderedDict(b=jnp.arange(4.0), a=jnp.ones(4))
    tx = dst_optax.wrap(optax.sgd(1.0), 0.3)
    with pytest.raises(ValueError, match=r"order \['b', 'a'\]"):
        tx.update(updates, tx.init(params), params)
    with pytest.raises(ValueError, match=r"order \['b', 'a'\]"):
        project(silos.make_plan(params, None, 0.3), updates, OrderedDict(b=jnp.zeros(4), a=jnp.zeros(4)))
    with pytest.raises(ValueError, match=r"ties: got 'filled'"):
        project(silos.make_plan(params, None, 0.3), params, params, ties="filled")


def test_fractions_and_labels_in_the_shape_of_a_module_that_can_be_called():
    @jax.tree_util.register_pytree_node_class
    class Module:
        def __init__(self, w):
            self.w = w

        def __call__(self, x):
            return self.w @ x

        def tree_flatten(self):
            return (self.w,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    params = Module(jnp.zeros((2, 5)))
    tx = dst_optax.wrap(optax.sgd(1.0), Module(0.3), silos=silos.per_group(Module("x")))
    _, state = tx.update(params, tx.init(params), params)
    assert int(state[-1].memory.diagnostics.budget) == 3
    schedule = functools.partial(lambda value, step: value, 0.3)
    tx = dst_optax.wrap(optax.sgd(1.0), schedule)
    _, state = tx.update(params, tx.init(params), params)
    assert int(state[-1].memory.diagnostics.budget) == 3


def test_fractions_as_a_pytree():
    params = {"a": {"k": jnp.zeros(10), "b": jnp.zeros(4)}, "c": jnp.zeros(5)}
    tx = dst_optax.wrap(given_updates(), {"a": {"k": 0.5, "b": 0.0}, "c": 1.0})
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    assert [int((after["a"][n] != 0).sum()) for n in "kb"] == [0, 0]  # all tie at the threshold, and frozen
    assert int((after["c"] != 0).sum()) == 5
    assert int(state[-1].memory.diagnostics.budget) == 5 + 0 + 5
    with pytest.raises(ValueError, match=r"fraction_of_free_params for 'a/b'.*1.5"):
        dst_optax.dynamic_subset_tuning({"a": {"k": 0.5, "b": 1.5}, "c": 1.0})


def test_both_kinds_of_budget_are_refused_whatever_their_values():
    with pytest.raises(ValueError, match="both"):
        dst_optax.dynamic_subset_tuning(0.1, num_free_params=3)
    for default in (dst_optax.dynamic_subset_tuning(), dst_optax.dynamic_subset_tuning(None)):
        state = default.init(jnp.ones(101))
        _, state = default.update(jnp.arange(101.0), state, jnp.ones(101))
        assert int(state.memory.diagnostics.budget) == 10


def test_parameters_restored_in_another_dtype_are_refused():
    tx = dst_optax.dynamic_subset_tuning(0.1)
    state = tx.init({"w": jnp.ones(5)})
    half = {"w": jnp.ones(5, jnp.bfloat16)}
    for call in (
        lambda: tx.update(half, state, half),
        lambda: dst_optax.finalize(half, state),
        lambda: dst_optax.reseed(state, half),
    ):
        with pytest.raises(ValueError, match=r"'w'.*bfloat16.*float32"):
            call()


def test_a_state_of_another_kind_is_refused():
    tx = dst_optax.dynamic_subset_tuning(0.1)
    with pytest.raises(ValueError, match=r"dict.*eval_shape"):
        tx.update(jnp.ones(3), {"seed": jnp.ones(3), "gap": jnp.ones(1)}, jnp.ones(3))


@pytest.mark.parametrize("option", ["jax_debug_nans", "jax_debug_infs"])
def test_nothing_of_ours_is_infinite_or_nan(option):
    params = {"a": jnp.arange(30.0), "free": jnp.ones(3), "frozen": jnp.ones(4)}
    rules = [("free", 1.0), ("frozen", 0.0), ("", 0.2)]
    for fraction in (rules, optax.linear_schedule(0.0, 1.0, 2)):
        tx = dst_optax.wrap(optax.sgd(0.1), fraction)
        jax.config.update(option, True)
        try:
            p, state = params, tx.init(params)
            for i in range(3):
                updates, state = jax.jit(tx.update)(jax.tree.map(lambda x, i=i: x + i, params), state, p)
                p = dst_optax.apply_updates(p, updates, state)
            jax.block_until_ready(dst_optax.finalize(p, state))
        finally:
            jax.config.update(option, False)


def test_integer_leaves_may_be_masked():
    params = {"w": jnp.arange(10.0), "ids": jnp.arange(3)}
    tx = optax.masked(dst_optax.wrap(optax.sgd(1.0), 0.5), {"w": True, "ids": False})
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    updates, state = tx.update(grads, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    np.testing.assert_array_equal(after["ids"], params["ids"])
    assert int((after["w"] != params["w"]).sum()) == 5


def test_shard_map_sees_whole_tensors_or_is_refused():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = dst_optax.dynamic_subset_tuning(0.1)
    params = jnp.arange(8.0)
    spec = jax.sharding.PartitionSpec
    update = lambda u, p: tx.update(u, tx.init(p), p)[0]  # noqa: E731

    def inside(where):
        return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=where, out_specs=where))(params, params)

    with pytest.raises(ValueError, match=r"shard_map.*outside"):
        inside(spec("x"))
    with pytest.raises(ValueError, match=r"update of ''.*pmean"):
        jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(spec("x"), spec()), out_specs=spec()))(
            params, params
        )
    np.testing.assert_array_equal(inside(spec()), tx.update(params, tx.init(params), params)[0])


@pytest.mark.parametrize("rule", [silos.per_tensor(), silos.per_tensor([("", 0)])])
def test_explicit_axes_without_a_mesh_in_the_context(rule):
    """Also where parameters are split only after ``init``."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    placed = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
    tx = dst_optax.wrap(optax.sgd(0.1), 0.3, silos=rule)
    whole = jnp.arange(128.0).reshape(16, 8)
    params = jax.device_put(whole, placed("x", None))
    for update, made_of in itertools.product(
        (tx.update, jax.jit(tx.update)), (whole, jax.device_put(whole, placed(None, None)), params)
    ):
        updates, after = update(params, tx.init(made_of), params)
        expected, _ = tx.update(whole, tx.init(whole), whole)
        np.testing.assert_array_equal(updates, expected)
        tuned = dst_optax.apply_updates(params, updates, after)
        measured = diagnostics.metrics(after, tuned, plan=silos.make_plan(params, rule, 0.3))
        assert int(measured["subset_size"]) == int((np.asarray(tuned) != np.asarray(whole)).sum())
