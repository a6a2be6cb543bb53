"""Subsets in memory against numpy oracles: extract, from_models, apply, revert, algebra."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bits, rank

import dst_optax
from dst_optax import silos, subset
from dst_optax.subset import Entries, Subset, SubsetError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = [(), (1,), (0,), (3, 0), (7,), (4, 9), (3, 5, 2), (300,), (40, 700)]


def model(rng, dtype=np.float32, shapes=SHAPES):
    return {f"l{i}": {"w": np.asarray(rng.normal(size=s).astype(dtype))} for i, s in enumerate(shapes)}


def perturbed(rng, tree, share):
    """Random bit patterns, NaNs and negative zeros among them, in a share of the entries."""

    def change(x):
        noise = rng.integers(0, 2 ** (8 * x.dtype.itemsize), size=x.shape, dtype=np.uint64)
        noise = noise.astype(bits(x).dtype).view(x.dtype)
        return np.asarray(np.where(rng.random(x.shape) < share, noise, x))

    return jax.tree.map(change, tree)


def same(a, b):
    flat_a, flat_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and (bits(np.asarray(x)) == bits(np.asarray(y))).all()
        for x, y in zip(flat_a, flat_b, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("put", [lambda t: t, lambda t: jax.tree.map(jnp.asarray, t)], ids=["numpy", "jax"])
def test_apply_and_revert_are_exact(dtype, share, put, strict):
    rng = np.random.default_rng(3)
    seed = model(rng, dtype)
    tuned = perturbed(rng, seed, share)
    before = jax.tree.map(np.copy, seed)
    found = subset.from_models(put(seed), put(tuned), with_seed_values=True)
    for path, e in found.items():
        s, t = seed[path.split("/")[0]]["w"], tuned[path.split("/")[0]]["w"]
        assert e.positions.tolist() == np.flatnonzero(bits(s).ravel() != bits(t).ravel()).tolist()
    applied = found.apply(put(seed))
    assert same(applied, tuned)
    assert same(found.revert(applied), seed)
    assert same(seed, before)
    assert type(jax.tree.leaves(applied)[0]) is type(jax.tree.leaves(put(seed))[0])


def train(tx, params, steps=3):
    state = tx.init(params)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape).astype(p.dtype)), params)
        updates, state = tx.update(grads, state, params)
        params = dst_optax.apply_updates(params, updates, state)
    return params, state


def test_extract_finds_what_training_changed():
    seed = jax.tree.map(jnp.asarray, model(np.random.default_rng(1), shapes=[(), (7,), (40, 70)]))
    tuned, state = train(dst_optax.wrap(optax.adam(0.1), fraction_of_free_params=0.1), seed)
    found = subset.extract(tuned, state, seed=seed, with_seed_values=True, metadata={"seed": "toy"})
    masks = dict(zip(found, jax.tree.leaves(dst_optax.subset_mask(tuned, state)), strict=True))
    for path, e in found.items():
        assert e.positions.tolist() == np.flatnonzero(masks[path]).tolist()
    assert 0 < found.count <= rank(0.1, 2800) + rank(0.1, 7)
    assert same(found.apply(seed), tuned)
    assert same(found.revert(tuned), seed)
    assert found.metadata == {"seed": "toy"}
    other = subset.from_models(seed, tuned, with_seed_values=True)
    assert same(
        {p: [e.positions, e.values] for p, e in other.items()},
        {p: [e.positions, e.values] for p, e in found.items()},
    )


def test_extract_needs_a_captured_and_known_seed():
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=[("a", 1.0), ("b", 0.5)])
    with pytest.raises(ValueError, match="not captured"):
        subset.extract(params, tx.init(params))
    tuned, state = train(tx, params)
    with pytest.raises(SubsetError, match=r"keeps no seed of 'a'.*seed="):
        subset.extract(tuned, state)
    assert same(subset.extract(tuned, state, seed=params).apply(params), tuned)


def trained():
    seed = {"a": jnp.arange(40.0), "b": jnp.ones(30)}
    return train(dst_optax.wrap(optax.adam(0.1), fraction_of_free_params=0.1), seed)


def test_extract_refuses_what_changed_after_the_subset_was_chosen():
    tuned, state = trained()
    averaged = jax.tree.map(lambda x: x * np.float32(0.99), tuned)
    with pytest.raises(SubsetError, match=r"'a'.*chained after|average"):
        subset.extract(averaged, state)
    one = {**tuned, "b": tuned["b"] + jnp.zeros(30).at[7].set(1e-7)}
    with pytest.raises(SubsetError, match=r"^\d entries of 'b'.*finalize"):
        subset.extract(one, state)
    assert subset.extract(dst_optax.finalize(one, state), state).count == subset.extract(tuned, state).count


def test_tensors_that_are_not_floats_are_taken_whole_and_floats_ranked():
    seed = {"ids": np.arange(6), "w": np.zeros(21, np.float32)}
    tuned = {"ids": np.arange(6) * 2, "w": np.arange(21, dtype=np.float32)}
    found = subset.from_models(seed, tuned, 0.1)
    assert found["ids"].positions.tolist() == [1, 2, 3, 4, 5]
    assert found["w"].positions.tolist() == [19, 20]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, np.float64])
def test_largest_distances_of_each_silo(fraction, dtype):
    rng = np.random.default_rng(5)
    seed = {"a": rng.normal(size=(40, 30)), "b": rng.normal(size=(5, 1)), "c": rng.normal(size=17)}
    seed = jax.tree.map(lambda x: x.astype(dtype), seed)
    tuned = jax.tree.map(
        lambda x: (x + rng.normal(size=x.shape) * (rng.random(x.shape) < 0.6)).astype(dtype), seed
    )
    rule = silos.per_group([("a|c", "ac"), ("b", "b")])
    found = subset.from_models(seed, tuned, fraction, silos=rule)
    for names in (["a", "c"], ["b"]):
        delta = np.concatenate(
            [np.abs(seed[n].astype(np.float32) - tuned[n].astype(np.float32)).ravel() for n in names]
        )
        m = rank(fraction, delta.size)
        q = np.sort(delta)[delta.size - m - 1] if m < delta.size else -1
        expected = (delta > q) if m else np.zeros(delta.size, bool)
        expected &= delta > 0
        offset = 0
        for n in names:
            part = expected[offset : offset + seed[n].size]
            offset += seed[n].size
            assert found[n].positions.tolist() == np.flatnonzero(part).tolist()
            assert same(found[n].values, tuned[n].ravel()[part])


def test_stacked_silos_and_absolute_budget():
    rng = np.random.default_rng(6)
    seed = {"layers": np.zeros((3, 4, 50), np.float32)}
    tuned = {"layers": rng.normal(size=(3, 4, 50)).astype(np.float32)}
    found = subset.from_models(seed, tuned, 0.1, silos=silos.per_tensor(stacked=[("layers", 1)]))
    per_slice = np.bincount(found["layers"].positions // 50 % 4, minlength=4)
    assert per_slice.tolist() == [rank(0.1, 150)] * 4
    for i in range(4):
        kept = found["layers"].positions[found["layers"].positions // 50 % 4 == i]
        delta = np.abs(tuned["layers"]).ravel()
        members = np.flatnonzero(np.arange(600) // 50 % 4 == i)
        assert sorted(kept) == sorted(members[np.argsort(-delta[members])[: len(kept)]])
    assert subset.from_models(seed, tuned, num_free_params=7, silos=silos.whole_model()).count == 7


def test_models_may_name_their_tensors_in_different_order():
    seed = collections.OrderedDict(b=np.zeros(3, np.float32), a=np.ones(3, np.float32))
    tuned = {"a": np.array([1, 2, 1], np.float32), "b": np.array([0, 0, 4], np.float32)}
    found = subset.from_models(seed, tuned)
    assert found["a"].seed_fingerprint == subset.fingerprint(seed["a"])
    assert same(dict(found.apply(seed)), tuned)


def test_nan_passes_outside_the_ranking():
    seed = {"w": np.zeros(10, np.float32)}
    tuned = {"w": np.array([np.nan, 5, 4, 3, 2, 1, 0, 0, 0, np.inf], np.float32)}
    found = subset.from_models(seed, tuned, 0.2)
    assert found["w"].positions.tolist() == [0, 1, 2, 9]
    assert subset.from_models(seed, tuned, 0.0).count == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("a"), "lacks 'a'"),
        (lambda m: m.update(c=np.zeros(1, np.float32)), "subset lacks 'c'"),
        (lambda m: m.update(a=np.zeros((2, 6), np.float32)), r"'a' is float32\[2, 6\] in the model"),
        (lambda m: m.update(a=m["a"].astype(np.float16)), r"'a' is float16\[3, 4\] in the model"),
        (lambda m: m.update(a=m["a"] + 1), "'a' is not the seed's"),
        (lambda m: m.update(b=m["b"][::-1]), "'b' is not the seed's"),
    ],
)
def test_another_model_is_refused(change, message):
    seed = {"a": np.zeros((3, 4), np.float32), "b": np.arange(5, dtype=np.float32)}
    tuned = {"a": np.eye(3, 4, dtype=np.float32), "b": seed["b"]}
    found = subset.from_models(seed, tuned)
    wrong = dict(seed)
    change(wrong)
    with pytest.raises(SubsetError, match=message):
        found.apply(wrong)
    with pytest.raises(SubsetError, match="no seed values"):
        found.revert(tuned)
    if set(wrong) == set(seed) and wrong["a"].shape == (3, 4) and wrong["a"].dtype == np.float32:
        found.apply(wrong, verify=False)
    with pytest.raises(SubsetError, match=r"lacks|is float|tuned model"):
        subset.from_models(seed, {"a": seed["a"].astype(np.float16), "b": seed["b"]})


def test_revert_refuses_what_apply_did_not_make():
    seed = {"w": np.zeros(4, np.float32)}
    found = subset.from_models(seed, {"w": np.array([0, 1, 0, 2], np.float32)}, with_seed_values=True)
    with pytest.raises(SubsetError, match="does not hold this subset's values"):
        found.revert(seed)
    other = {"w": np.array([9, 1, 9, 2], np.float32)}  # differs elsewhere, too
    with pytest.raises(SubsetError, match="'w' is not the seed's"):
        found.revert(other)
    assert found.revert(other, verify=False)["w"].tolist() == [9, 0, 9, 0]


@pytest.mark.parametrize(
    ("positions", "values"),
    [
        (np.array([1, 1]), np.zeros(2)),
        (np.array([2, 1]), np.zeros(2)),
        (np.array([-1, 1]), np.zeros(2)),
        (np.array([1, 4]), np.zeros(2)),
        (np.array([1.0, 2.0]), np.zeros(2)),
        (np.array([[1]]), np.zeros((1, 1))),
        (np.array([1]), np.zeros(2)),
    ],
)
def test_entries_are_checked(positions, values):
    with pytest.raises(SubsetError, match=r"positions|values"):
        Entries((4,), positions, values)


def sparse(draw_positions, size=20):
    p = np.array(sorted(draw_positions), int)
    return Subset(
        {"w": Entries((size,), p, (p * 2 + len(p)).astype(np.float32), np.zeros(len(p), np.float32))}
    )


sets = st.sets(st.integers(0, 19))


@settings(max_examples=60, deadline=None)
@given(sets, sets, sets)
def test_algebra_is_that_of_sets(x, y, z):
    a, b, c = sparse(x), sparse(y), sparse(z)
    assert set(a.intersection(b)["w"].positions.tolist()) == x & y
    assert set(a.union(b)["w"].positions.tolist()) == x | y
    assert a.jaccard(b) == (len(x & y) / len(x | y) if x | y else 1)
    values = [dict(zip(s["w"].positions.tolist(), s["w"].values.tolist(), strict=True)) for s in (a, b, c)]
    for how in ("first", "last", "mean"):
        got = subset.compose([a, b, c], how)["w"]
        for position, value in zip(got.positions.tolist(), got.values.tolist(), strict=True):
            has = [v[position] for v in values if position in v]
            expected = {"first": has[0], "last": has[-1], "mean": np.float32(np.mean(has))}[how]
            assert value == expected
        assert set(got.positions.tolist()) == x | y | z
    conflicts = sum(len({v[p] for v in values if p in v}) > 1 for p in x | y | z)
    assert sum(subset.collisions([a, b, c]).values()) == conflicts
    if conflicts:
        with pytest.raises(SubsetError, match=f"different values for {conflicts} entries.*'w'"):
            subset.compose([a, b, c])
    else:
        assert subset.compose([a, b, c]).count == len(x | y | z)


def test_subsets_of_unknown_seeds_do_not_hide_that_others_differ():
    seed = {"w": np.zeros(3, np.float32)}
    others = [subset.from_models({"w": x}, {"w": x}) for x in (seed["w"], seed["w"] + 1)]
    unknown = Subset({"w": dataclasses.replace(others[0]["w"], seed_fingerprint=None)})
    with pytest.raises(SubsetError, match="subsets 2 and 3 are of different seeds: 'w'"):
        subset.compose([unknown, *others])


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"fraction_of_free_params": 0.5, "num_free_params": 1}, "give one of them"),
        ({"num_free_params": -1}, "got -1; it must be 0 or more"),
        ({"num_free_params": True}, "expected an int, got True"),
        ({"num_free_params": 1.5}, "expected an int, got 1.5"),
        ({"fraction_of_free_params": lambda step: 0.1}, "is at no step, so give a number"),
        ({"fraction_of_free_params": jnp.float32(0.1)}, "is at no step, so give a number"),
    ],
)
def test_budgets_of_tuned_models_are_those_of_the_transform(budget, says):
    seed = {"w": np.zeros(3, np.float32)}
    with pytest.raises((TypeError, ValueError), match=says):
        subset.from_models(seed, seed, **budget)


def test_differences_below_float32_are_ranked():
    seed = {"w": np.ones(5)}
    tuned = {"w": np.array([1, 1 + 1e-12, 1, 1 - 3e-12, 1 + 2e-12])}
    assert subset.from_models(seed, tuned, num_free_params=2)["w"].positions.tolist() == [3, 4]


def test_parameters_that_lack_what_the_state_knows_are_refused():
    params = {"w": jnp.zeros(3), "v": jnp.zeros(3)}
    tx = dst_optax.wrap(optax.sgd(1.0), 0.5)
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="the state knows of 'v', which the parameters lack"):
        subset.extract({"w": params["w"]}, state)


def test_composed_subsets_revert():
    rng = np.random.default_rng(4)
    seed = model(rng, shapes=[(30,), (4, 5)])
    a, b = (subset.from_models(seed, perturbed(rng, seed, 0.4), with_seed_values=True) for _ in range(2))
    for how in ("first", "last", "mean"):
        both = subset.compose([a, b], how)
        assert both.has_seed_values
        assert same(both.revert(both.apply(seed)), seed)
    assert not subset.compose([a, subset.from_models(seed, seed)], "first").has_seed_values


def test_values_conflict_where_their_bits_differ():
    seed = {"w": np.ones(4, np.float32)}
    nan = np.array([0x7FC00001, 0x7FC00002], np.uint32).view(np.float32)
    a = subset.from_models(seed, {"w": np.array([nan[0], nan[0], 0.0, 0.0], np.float32)})
    b = subset.from_models(seed, {"w": np.array([nan[0], nan[1], -0.0, -0.0], np.float32)})
    assert subset.collisions([a, b]) == {"w": 3}
    composed = subset.compose([a, b], "last")
    assert composed.metadata["collisions"] == {"w": 3}
    assert same(composed["w"].values, b["w"].values)


def test_integers_have_no_mean():
    seed = {"w": np.zeros(2, np.int32)}
    parts = [subset.from_models(seed, {"w": np.array([x, 0], np.int32)}) for x in (1, 2)]
    with pytest.raises(SubsetError, match=r"'w' holds int32, which have no mean"):
        subset.compose(parts, "mean")
    assert subset.compose(parts, "last")["w"].values.tolist() == [2]
    assert subset.compose(parts[:1] * 2, "mean")["w"].values.tolist() == [1]


def test_compose_refuses_other_seeds():
    one = subset.from_models({"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)})
    two = subset.from_models({"w": np.full(3, 2, np.float32)}, {"w": np.ones(3, np.float32)})
    with pytest.raises(SubsetError, match="subsets 1 and 3 are of different seeds: 'w'"):
        subset.compose([one, one, two], "first")
    long = subset.from_models({"w": np.zeros(4, np.float32)}, {"w": np.ones(4, np.float32)})
    with pytest.raises(SubsetError, match="subset 3 is not for the model of subset 1: 'w'"):
        subset.compose([one, one, long], "first")
    with pytest.raises(SubsetError, match="no subset"):
        subset.compose([])
    with pytest.raises(SubsetError, match=re.escape('on_conflict: got "sum"'.replace('"', "'"))):
        subset.compose([one], "sum")


def test_astype_commutes_with_apply():
    rng = np.random.default_rng(8)
    seed = model(rng, shapes=[(30, 40)])
    tuned = jax.tree.map(
        lambda x: x + (rng.random(x.shape) < 0.3) * rng.choice([1e-6, 1.0]).astype(x.dtype), seed
    )
    tuned = jax.tree.map(lambda x: x.astype(np.float32), tuned)
    cast = lambda t: jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), t)  # noqa: E731
    for stored in (False, True):
        found = subset.from_models(seed, tuned, with_seed_values=stored).astype(jnp.bfloat16)
        assert same(found.apply(cast(seed)), cast(tuned))
    assert found.count == subset.from_models(cast(seed), cast(tuned)).count


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.float8_e4m3fn])
def test_astype_makes_no_value_infinite(dtype):
    seed = {"w": np.zeros(4, np.float32)}
    found = subset.from_models(seed, {"w": np.array([1, np.inf, -70000, np.nan], np.float32)})
    with pytest.raises(SubsetError, match=f"{np.dtype(dtype)} cannot hold 1 of the values of 'w', .* -70000"):
        found.astype(dtype)
    kept = found["w"].take(np.array([0, 1, 3]))  # those that are not finite stay so
    values = Subset({"w": kept}).astype(dtype)["w"].values.astype(np.float32)
    assert np.isfinite(values).tolist() == [True, False, False]


@pytest.mark.parametrize("device", [None, jax.devices()[0]])
def test_arrays_stay_as_committed_as_they_are(device):
    """A committed one cannot be used with those of other devices."""
    seed, tuned = ({"w": jax.device_put(np.full(3, k, np.float32), device)} for k in (0, 1))
    found = subset.from_models(seed, tuned, with_seed_values=True)
    assert found.apply(seed)["w"].committed == found.revert(tuned)["w"].committed == (device is not None)


def test_astype_makes_no_seed_value_infinite():
    seed, tuned = {"w": np.float32([1e30, 1])}, {"w": np.float32([2, 1])}
    found = subset.from_models(seed, tuned, with_seed_values=True)
    with pytest.raises(SubsetError, match=r"float16 cannot hold 1 of the values of 'w'.*e\+30"):
        found.astype(np.float16)


def test_each_array_stays_as_committed_as_it_is():
    device = jax.devices()[0]
    seed = {
        p: jax.device_put(np.zeros(n, np.float32), d)
        for p, n, d in zip("abcd", (3, 4, 5, 6), [device, None] * 2, strict=True)
    }
    tuned = {p: np.arange(x.size, dtype=np.float32) for p, x in seed.items()}
    after = subset.from_models(seed, tuned).apply(seed)
    for path, x in after.items():
        assert x.committed == seed[path].committed
        np.testing.assert_array_equal(x, tuned[path])


def test_astype_converts_floats_alone_and_each_as_its_rule_says():
    rng = np.random.default_rng(0)
    shapes = {"enc/wi": (4, 5), "enc/wo": (5, 4), "norm": (6,)}
    seed = {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()} | {"ids": np.arange(7)}
    tuned = {
        p: np.where(np.arange(x.size).reshape(x.shape) % 2, x + 1, x).astype(x.dtype) for p, x in seed.items()
    }
    found = subset.from_models(seed, tuned)

    def converted(model, dtypes):
        return {p: x.astype(dtypes.get(p, x.dtype)) for p, x in model.items()}

    halves = dict.fromkeys(shapes, ml_dtypes.bfloat16)
    mixed = {"enc/wi": ml_dtypes.bfloat16, "norm": np.float16}  # the first rule that is found holds
    rules = [("wo$", "float32"), ("^enc/", ml_dtypes.bfloat16), ("norm", np.float16)]
    for wanted, dtypes in ((ml_dtypes.bfloat16, halves), (rules, mixed)):
        got = found.astype(wanted).apply(converted(seed, dtypes))
        for path, x in converted(tuned, dtypes).items():
            assert got[path].dtype == x.dtype
            assert (bits(got[path]) == bits(x)).all()
    assert found.astype(rules)["enc/wo"].seed_fingerprint == found["enc/wo"].seed_fingerprint
    with pytest.raises(SubsetError, match="'enc/wi' is float32; it cannot become int32"):
        found.astype(np.int32)
