"""Numbers about subsets against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst_optax
from dst_optax import diagnostics, silos
from dst_optax.rule import SubsetRule

SHAPES = {"b": (31,), "stack": (4, 3, 10), "w": (24, 10)}
FRACTION = 0.1


def draw(salt):
    keys = jax.random.split(jax.random.key(salt), len(SHAPES))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


def train(tx, steps):
    """The seed, parameters after each step, and the last state."""
    params, trace = draw(0), [draw(0)]
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    for i in range(steps):
        params, state = step(params, state, draw(i + 1))
        trace.append(params)
    return trace, state


def differ(a, b):
    return {n: np.asarray(a[n]) != np.asarray(b[n]) for n in SHAPES}


def flat(masks):
    return np.concatenate([masks[n].ravel() for n in sorted(masks)])


def test_metrics_count_what_numpy_counts():
    rule = silos.per_tensor(stacked=[("stack", 1)])
    trace, state = train(dst_optax.wrap(optax.adam(1e-2), FRACTION, silos=rule), 4)
    plan = silos.make_plan(trace[0], rule, FRACTION)
    metrics = jax.jit(lambda s, p, b: diagnostics.metrics(s, p, previous=b, plan=plan))
    got = {n: float(x) for n, x in metrics(state, trace[-1], trace[-2]).items()}
    old, new = (differ(x, trace[0]) for x in trace[-2:])
    slices = {f"stack[{i}]": new["stack"][:, i] for i in range(3)}
    by_silo = {"b": new["b"], "w": new["w"]} | slices
    sizes = {n: int(m.sum()) for n, m in by_silo.items()}
    old, new = flat(old), flat(new)
    expected = {
        "subset_size": new.sum(),
        "num_free": new.sum(),
        "budget": 3 + 24 + 3 * 4,
        "entered": (new & ~old).sum(),
        "left": (old & ~new).sum(),
        "overlap": (old & new).sum() / (old | new).sum(),
        "num_nonfinite": 0,
        "step": 4,
    }
    expected |= {f"subset_size/{n}": size for n, size in sizes.items()}
    expected |= {f"share/{n}": size / new.sum() for n, size in sizes.items()}
    expected |= {"budget/b": 3, "budget/w": 24} | {f"budget/{n}": 4 for n in slices}
    thresholds = {f"threshold/{n}" for n in by_silo}
    assert got.keys() == expected.keys() | thresholds | {"passes"}
    np.testing.assert_allclose([got[n] for n in expected], list(expected.values()), rtol=1e-6)
    assert got["entered"] > 0
    assert 1 <= got["passes"] <= 40


def test_threshold_lies_between_the_kept_and_the_others():
    tx = dst_optax.wrap(optax.identity(), FRACTION)
    (seed, after), state = train(tx, 1)
    got = diagnostics.metrics(state, plan=silos.make_plan(seed, None, FRACTION))
    for name, kept in differ(after, seed).items():
        delta = np.abs(np.asarray(draw(1)[name] + seed[name]) - np.asarray(seed[name]))
        assert delta[~kept].max() <= got[f"threshold/{name}"] < delta[kept].min()


def test_everything_is_zero_before_the_first_step():
    tx = dst_optax.wrap(optax.adam(1e-2), FRACTION)
    got = diagnostics.metrics(tx.init(draw(0)), draw(1), previous=draw(2))
    assert {n: float(x) for n, x in got.items() if x != 0} == {"overlap": 1.0}
    assert {x.dtype for x in got.values()} == {jnp.dtype("float32")}


def test_states_of_disjoint_leaves_add_up():
    parts = optax.partition(
        {"x": dst_optax.dynamic_subset_tuning(0.1), "y": dst_optax.dynamic_subset_tuning(0.5)},
        {"b": "x", "stack": "y", "w": "x"},
    )
    trace, state = train(optax.chain(optax.adam(1e-2), parts), 2)
    got = diagnostics.metrics(state, trace[-1])
    assert int(got["budget"]) == 3 + 24 + 60
    assert int(got["subset_size"]) == flat(differ(trace[-1], trace[0])).sum()
    with pytest.raises(ValueError, match="one DST state, got 2"):
        diagnostics.metrics(state, plan=silos.make_plan(trace[0]))


def test_two_states_of_one_leaf_are_refused():
    """Which of them would say where the subset is?"""
    tx = optax.chain(
        optax.sgd(0.1), dst_optax.dynamic_subset_tuning(0.5), dst_optax.dynamic_subset_tuning(0.1)
    )
    params = {"a": jnp.arange(10.0), "b": jnp.ones(5)}
    updates, state = tx.update(params, tx.init(params), params)
    for use in (dst_optax.apply_updates, dst_optax.finalize, dst_optax.subset_mask):
        with pytest.raises(ValueError, match="two DST states hold the parameter 'a'"):
            use(params, updates, state) if use is dst_optax.apply_updates else use(params, state)


def test_frozen_and_free_leaves():
    """A frozen leaf differs nowhere. A free one keeps no seed: nobody can tell where it differs."""
    rules = [("b", 1.0), ("w", 0.0), ("stack", FRACTION)]
    trace, state = train(dst_optax.wrap(optax.sgd(0.1), rules), 2)
    mask = dst_optax.subset_mask(trace[-1], state)
    assert mask["b"].all()
    assert not mask["w"].any()
    got = diagnostics.metrics(state, trace[-1], plan=silos.make_plan(trace[0], None, rules))
    assert int(got["subset_size"]) == int(got["budget"]) == int(got["num_free"]) == 31 + 12
    assert int(got["subset_size/w"]) == 0


@pytest.mark.parametrize("fraction", [0.5, optax.constant_schedule(1.0), 1.0])
def test_entries_that_are_not_finite_are_counted_where_all_are_free_too(fraction):
    tx, params = dst_optax.wrap(optax.identity(), fraction), jnp.zeros(4)
    updates = jnp.array([jnp.nan, 1.0, 2.0, 3.0])
    _, state = tx.update(updates, tx.init(params), params)
    assert int(diagnostics.metrics(state)["num_nonfinite"]) == 1
    rule = SubsetRule(fraction)
    _, state = rule.project(updates, params, rule.init(params))
    assert int(diagnostics.metrics(state)["num_nonfinite"]) == 1


def test_a_plan_describes_a_part_of_a_model():
    params = {"w": jnp.zeros(8), "statistics": jnp.zeros(3)}
    tx = optax.masked(dst_optax.wrap(optax.sgd(1.0), 0.5), {"w": True, "statistics": False})
    updates, state = tx.update({"w": jnp.arange(8.0), "statistics": jnp.ones(3)}, tx.init(params), params)
    plan = silos.make_plan({"w": params["w"]}, None, 0.5)
    got = diagnostics.metrics(state, dst_optax.apply_updates(params, updates, state), plan=plan)
    assert int(got["subset_size/w"]) == int(got["budget/w"]) == 4


def test_entries_that_are_not_finite_are_counted():
    params = {"a": jnp.ones(50)}
    tx = dst_optax.wrap(optax.identity(), FRACTION)
    u = {"a": jnp.arange(50.0).at[jnp.array([3, 7, 20])].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))}
    updates, state = tx.update(u, tx.init(params), params)
    after = dst_optax.apply_updates(params, updates, state)
    got = diagnostics.metrics(state, after)
    assert int(got["num_nonfinite"]) == 3
    assert int(got["num_free"]) == 5
    assert int(got["subset_size"]) == 8
    many = {"a": jnp.full(70_000, jnp.nan)}  # more than 16 bits hold
    params = {"a": jnp.ones(70_000)}
    _, state = tx.update(many, tx.init(params), params)
    assert int(diagnostics.metrics(state)["num_nonfinite"]) == 70_000


@pytest.mark.parametrize(("ties", "free"), [("strict", 3), ("fill", 10)])
def test_ties_that_are_filled_are_counted_as_free(ties, free):
    params = jnp.zeros(101)
    tx = dst_optax.wrap(optax.identity(), 0.1, ties=ties)
    u = jnp.ones(101).at[jnp.arange(3)].set(2.0)
    _, state = tx.update(u, tx.init(params), params)
    assert int(diagnostics.metrics(state)["num_free"]) == free


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0, 0, 0], [0, 0, 0], (0, 0, 1)),
        ([1, 1, 0], [1, 1, 0], (0, 0, 1)),
        ([1, 0, 0], [0, 1, 1], (2, 1, 0)),
        ([1, 1, 0], [0, 1, 1], (1, 1, 1 / 3)),
    ],
)
def test_overlap(before, after, expected):
    a, b = ({"x": jnp.array(m[:1], bool), "y": jnp.array(m[1:], bool)} for m in (before, after))
    got = jax.jit(diagnostics.overlap)(a, b)
    np.testing.assert_allclose([got["entered"], got["left"], got["overlap"]], expected, rtol=1e-6)


def test_a_plan_of_another_transform_is_refused():
    tx = dst_optax.wrap(optax.sgd(0.1), FRACTION)
    (*_, params), state = train(tx, 2)
    plans = {
        "silos": silos.make_plan(params, silos.whole_model(), FRACTION),
        "parameters": silos.make_plan({**params, "b": jnp.ones(7)}, None, FRACTION),
        "fractions": silos.make_plan(params, None, 0.5),
    }
    for plan in plans.values():
        with pytest.raises(ValueError, match=r"plan: .*of the transform"):
            diagnostics.metrics(state, params, plan=plan)
    with pytest.raises(ValueError, match="pass params, too"):
        diagnostics.metrics(state, previous=params)
    own = silos.make_plan(params, None, FRACTION)
    got = diagnostics.metrics(state, params, plan=own)
    assert [int(got[f"budget/{name}"]) for name in own.labels] == list(own.budgets)
