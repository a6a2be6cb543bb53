"""Rules become plans: which entries compete, for how many places, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst_optax
from dst_optax import silos

PARAMS = {
    "decoder": {
        "layers_0": {"w": jnp.zeros((4, 5)), "b": jnp.zeros(5)},
        "layers_1": {"w": jnp.zeros((4, 5))},
    },
    "embed": jnp.zeros((7, 3), jnp.bfloat16),
    "scan": jnp.zeros((2, 3, 4)),
}
PATHS = ("decoder/layers_0/b", "decoder/layers_0/w", "decoder/layers_1/w", "embed", "scan")


def sizes(rule, params=PARAMS):
    plan = silos.make_plan(params, rule)
    return dict(zip(plan.labels, plan.sizes, strict=True))


def test_per_tensor():
    plan = silos.make_plan(PARAMS, silos.per_tensor())
    assert plan.labels == PATHS
    assert plan.sizes == (5, 20, 20, 21, 24)
    assert plan.budgets == (1, 2, 2, 2, 3)
    assert [leaf.shape for leaf in plan.leaves] == [(5,), (4, 5), (4, 5), (7, 3), (2, 3, 4)]
    assert plan.leaves[3].dtype == "bfloat16"
    assert plan == silos.make_plan(PARAMS, None)


@pytest.mark.parametrize(("axis", "count", "size"), [(0, 2, 12), (1, 3, 8), (-1, 4, 6)])
def test_stacked_axis_makes_a_silo_of_every_slice(axis, count, size):
    found = sizes(silos.per_tensor(stacked=[("^scan$", axis)]))
    assert {n: s for n, s in found.items() if n.startswith("scan")} == {
        f"scan[{i}]": size for i in range(count)
    }


def test_per_layer():
    found = sizes(silos.per_layer(r"decoder/layers_(\d+)"))
    assert found == {"layer/0": 25, "layer/1": 20, "embed": 21, "scan": 24}


def test_slices_join_the_layer_of_their_index():
    found = sizes(silos.per_layer(r"decoder|scan", stacked=[("^scan$", 0)]))
    assert found == {"layer": 45, "embed": 21, "layer/0": 12, "layer/1": 12}


@pytest.mark.parametrize(
    "groups", [[("decoder", "d"), ("", "rest")], lambda path: "d" if path.startswith("decoder") else "rest"]
)
def test_per_group(groups):
    assert sizes(silos.per_group(groups)) == {"d": 45, "rest": 45}


def test_groups_may_be_a_pytree_of_labels():
    params = {"a": {"k": jnp.ones(4), "b": jnp.ones(3)}, "c": jnp.ones(2)}
    plan = silos.make_plan(params, silos.per_group({"a": "inner", "c": "outer"}), 0.5)
    assert dict(zip(plan.labels, plan.sizes, strict=True)) == {"inner": 7, "outer": 2}
    with pytest.raises(ValueError, match=r"per_group.*'c'"):
        silos.make_plan(params, silos.per_group({"a": "inner"}), 0.5)


def test_whole_model_counts_offsets_in_path_order():
    plan = silos.make_plan(PARAMS, silos.whole_model())
    assert plan.sizes == (90,)
    assert [leaf.offsets for leaf in plan.leaves] == [(0,), (5,), (25,), (45,), (66,)]


def test_silos_beyond_32_bits():
    struct = jax.ShapeDtypeStruct((2**20, 2**13), jnp.float32)
    plan = silos.make_plan({"a": struct, "b": struct}, silos.whole_model(), 0.1)
    assert plan.sizes == (2**34,)
    assert plan.budgets == (-(-(2**34 - 1) // 10),)
    assert plan.leaves[1].offsets == (2**33,)


def test_masked_and_missing_leaves_are_passed_over():
    params = {"a": jnp.zeros(3), "gone": None, "masked": optax.MaskedNode()}
    assert sizes(None, params) == {"a": 3}


def test_nothing_at_all_makes_an_empty_plan():
    plan = silos.make_plan({}, silos.per_tensor(stacked=[("x", 0)]), [("y", 0.1)])
    assert plan.leaves == ()
    assert plan.budgets == ()


def test_leaves_that_need_no_seed():
    plan = silos.make_plan(PARAMS, None, [("embed", 0.0), ("scan", 1.0), ("", 0.1)])
    assert [plan.leaves[i].path for i in plan.ranked] == list(PATHS[:3])
    assert [leaf.path for leaf in plan.leaves if plan.is_frozen(leaf)] == ["embed"]
    assert [leaf.path for leaf in plan.leaves if plan.is_free(leaf)] == ["scan"]


def test_first_rule_wins():
    plan = silos.make_plan(PARAMS, None, [("layers_1", 0.5), ("decoder", 0.1), ("", 0.2)])
    assert plan.budgets == (1, 2, 10, 4, 5)


def test_absolute_budget_is_shared():
    plan = silos.make_plan(PARAMS, None, num_free_params=9)
    assert sum(plan.budgets) == 9
    assert silos.make_plan(PARAMS, None, num_free_params=10**6).budgets == plan.sizes


def test_fingerprint_tells_plans_apart_but_not_budgets():
    def fingerprint(params=PARAMS, rule=None, fraction=0.1):
        return silos.make_plan(params, rule, fraction).fingerprint

    assert fingerprint() == fingerprint(fraction=0.2)
    others = {
        fingerprint(),
        fingerprint(rule=silos.whole_model()),
        fingerprint(rule=silos.per_tensor(stacked=[("scan", 0)])),
        fingerprint(rule=silos.per_tensor(stacked=[("scan", 1)])),
        fingerprint(params=PARAMS | {"embed": jnp.zeros((3, 7), jnp.bfloat16)}),
        fingerprint(params=PARAMS | {"embed": jnp.zeros((7, 3))}),
        fingerprint(params=PARAMS | {"other": jnp.zeros(3)}),
    }
    assert len(others) == 7


REFUSED = [
    (dict(silos="per_tensor"), TypeError, r"'per_tensor'.*whole_model\(\)"),
    (dict(silos=silos.per_tensor(stacked=[("zz", 0)])), ValueError, "'zz' matches no parameter"),
    (dict(silos=silos.per_tensor(stacked=[("embed", 2)])), ValueError, r"'embed'.*\('embed', 2\).*\(7, 3\)"),
    (dict(silos=silos.per_tensor(stacked=[("embed", -3)])), ValueError, r"'embed'.*-3"),
    (dict(silos=silos.per_layer("(zz)")), ValueError, "zz.*matches no parameter"),
    (dict(silos=silos.per_group([("decoder", "d")])), ValueError, r"'embed'.*'decoder'.*\.\*"),
    (dict(silos=silos.per_group(lambda path: 3)), TypeError, "'decoder/layers_0/b'.*3"),
    (dict(fraction_of_free_params=[("decoder", 0.1)]), ValueError, "'embed'"),
    (dict(fraction_of_free_params=[("decoder", 0.1), ("zz", 0.2), ("", 1)]), ValueError, "'zz'"),
    (dict(fraction_of_free_params=[("", 2)]), ValueError, r"2.*\[0, 1\]"),
    (dict(fraction_of_free_params=True), TypeError, "True of type bool"),
    (dict(fraction_of_free_params=optax.constant_schedule(0.1)), TypeError, "made with None"),
    (dict(fraction_of_free_params=[("(embed", 0.1)]), ValueError, r"'\(embed' is no regular expression"),
    (dict(num_free_params=-3), ValueError, "-3"),
    (dict(fraction_of_free_params=float("nan")), ValueError, "nan"),
    (
        dict(silos=silos.whole_model(), fraction_of_free_params=[("embed", 0.1), ("", 0.2)]),
        ValueError,
        "'model'.*0.2.*'embed'.*0.1",
    ),
]


@pytest.mark.parametrize("labels", [["l1", "l2"], ["layer1", "layer2"]])
def test_labels_of_two_letters_are_no_rules(labels):
    params = [{"kernel": jnp.ones(10)}, {"kernel": jnp.ones(10)}]
    assert silos.make_plan(params, silos.per_group(labels)).labels == tuple(labels)


def test_values_for_what_a_wrapper_takes_out_are_no_mistake():
    params = {"a": jnp.ones(3), "b": optax.MaskedNode()}
    assert silos.make_plan(params, None, {"a": 0.5, "b": 0.1}).budgets == (1,)
    params = {"a": jnp.ones(3), "b": optax.MaskedNode(), "act": None}  # of a prefix mask, and equinox's
    fractions = {"a": 0.5, "b": {"kernel": 0.1, "bias": 0.2}, "act": {"x": 0.1}}
    assert silos.make_plan(params, None, fractions).budgets == (1,)
    assert silos.make_plan(params, silos.per_group(fractions | {"a": "x"}), 0.5).labels == ("x",)
    whole = {"embed": {"kernel": jnp.ones(3), "bias": jnp.ones(2)}, "out": jnp.ones(5)}
    tx = optax.masked(
        dst_optax.wrap(optax.sgd(0.1), {"embed": {"kernel": 0.1, "bias": 0.1}, "out": 0.5}),
        {"embed": False, "out": True},
    )
    assert tx.init(whole)


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED)
def test_bad_rules_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        silos.make_plan(PARAMS, **arguments)


@pytest.mark.parametrize(
    "stacked", [None, ("scan", 0), {"scan": 0}, [("scan", "0")], [("scan", 1.0)], "scan"]
)
@pytest.mark.parametrize("rule", [silos.per_tensor, functools.partial(silos.per_layer, "(decoder)")])
def test_stacked_tensors_are_named_with_their_axes(stacked, rule):
    with pytest.raises(TypeError, match=r"stacked=.* list of pairs \(regex, axis\)"):
        rule(stacked=stacked)


SPELLED_ALIKE = {
    "w[0]": (silos.per_tensor([("^w$", 0)]), {"w": jnp.zeros((2, 10)), "w[0]": jnp.zeros(10)}),
    "layer/0": (silos.per_layer(r"block_(\d+)"), {"block_0": jnp.zeros(10), "layer": [jnp.zeros(7)]}),
}


@pytest.mark.parametrize("name", SPELLED_ALIKE)
def test_silos_that_are_only_spelled_alike_are_not_one(name):
    rule, params = SPELLED_ALIKE[name]
    with pytest.raises(ValueError, match=rf"2 silos are called '{re.escape(name)}'"):
        silos.make_plan(params, rule)


def test_a_layer_pattern_needs_a_group():
    with pytest.raises(ValueError, match=r"'layers_.*'.*parentheses"):
        silos.per_layer(r"layers_\d+")
    with pytest.raises(ValueError, match=r"'\(layers' is no regular expression"):
        silos.per_layer("(layers")


def test_a_plan_without_budgets_says_so():
    with pytest.raises(ValueError, match="no budgets"):
        silos.make_plan(PARAMS, None, None).budgets_at()


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (jnp.arange(3), "int32"),
        (np.ones(3, bool), "bool"),
        (jax.random.key(0), "key"),
        (1.0, "float"),
    ],
)
def test_leaves_without_a_distance_are_refused(leaf, says):
    with pytest.raises(TypeError, match=f"'a/b'.*{says}"):
        silos.make_plan({"a": {"b": leaf}})


def test_leaves_that_could_not_be_ranked_or_named_are_refused():
    params = {"w": jnp.ones(2, jnp.float8_e5m2)}
    with pytest.raises(TypeError, match="'w': got dtype float8_e5m2"):
        silos.make_plan(params, None, 0.5)
    assert silos.make_plan(params, None, 0.0).ranked == ()
    with pytest.raises(ValueError, match=r"'w' of shape \(2147483648,\) has an axis of 2\*\*31"):
        silos.make_plan({"w": jax.ShapeDtypeStruct((2**31,), jnp.float32)})
    with pytest.raises(ValueError, match="2 parameters have the path 'a/b'"):
        silos.make_plan({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
