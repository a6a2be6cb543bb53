"""DST around T5X's optimizers: what is set, how it is sharded, saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

flax = pytest.importorskip("flax")

from t5x import optimizers as t5x_optimizers  # noqa: E402

import dst_optax  # noqa: E402
from dst_optax import diagnostics, silos, subset  # noqa: E402
from t5x_integration import optimizers  # noqa: E402

RNG = np.random.default_rng(0)
PARAMS = flax.core.freeze(
    {
        "encoder": {"mlp": {"kernel": RNG.normal(size=(16, 4, 8)).astype(np.float32)}},
        "norm": {"scale": np.ones(12, np.float32)},
    }
)
AXES = flax.core.freeze(
    {"encoder": {"mlp": {"kernel": P("embed", "layers", "mlp")}}, "norm": {"scale": P("embed")}}
)
GRADIENTS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(5)]


@flax.struct.dataclass
class HyperParams:
    learning_rate: float | None = None


class Doubling(t5x_optimizers.OptimizerDef):
    """A rule that no difference of parameters expresses exactly: p * (1 - learning rate * gradient)."""

    def __init__(self):
        super().__init__(HyperParams())

    def init_state(self, params):
        return t5x_optimizers.OptimizerState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def apply_gradient(self, hyper_params, params, state, grads):
        new = jax.tree.map(lambda p, g: p * (1 - hyper_params.learning_rate * 9 * g), params, grads)
        slots = jax.tree.map(jnp.add, state.param_states, grads)
        return new, t5x_optimizers.OptimizerState(state.step + 1, slots)

    def derive_logical_axes(self, optimizer, axes):
        return t5x_optimizers.Optimizer(self, t5x_optimizers.OptimizerState(None, axes), axes)


def train(definition, gradients=GRADIENTS, axes=None, optimizer=None):
    if axes is not None:
        definition.set_param_axes(axes)
    optimizer = definition.create(jax.tree.map(jnp.asarray, PARAMS)) if optimizer is None else optimizer
    for g in gradients:
        optimizer = optimizer.apply_gradient(g, learning_rate=0.1)
    return optimizer


def differing(optimizer, seed=PARAMS):
    return jax.tree.map(lambda a, b: np.asarray(a) != b, optimizer.target, seed)


def test_free_entries_are_the_inner_optimizers_and_all_others_the_seeds():
    definition = optimizers.dynamic_subset_tuning(Doubling(), 0.1)
    optimizer = train(definition, GRADIENTS[:1])
    full = Doubling().create(PARAMS).apply_gradient(GRADIENTS[0], learning_rate=0.1)
    for name, budget in (("encoder", 52), ("norm", 2)):
        new, seed, free = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree[name])])
            for tree in (optimizer.target, PARAMS, differing(optimizer))
        )
        want = np.concatenate([np.ravel(x) for x in jax.tree.leaves(full.target[name])])
        assert free.sum() == budget
        np.testing.assert_array_equal(new, np.where(free, want, seed))
        assert np.abs(want - seed)[free].min() >= np.abs(want - seed)[~free].max()


def test_a_fraction_of_one_is_the_inner_optimizer():
    optimizer = train(optimizers.dynamic_subset_tuning(Doubling(), 1.0))
    full = train(Doubling())
    jax.tree.map(np.testing.assert_array_equal, optimizer.target, full.target)
    jax.tree.map(np.testing.assert_array_equal, optimizer.state.param_states, full.state.param_states)


def test_a_state_without_a_seed_is_refused():
    """MultiOptimizer keeps only what T5X's own optimizers have in their states."""
    definition = optimizers.dynamic_subset_tuning(Doubling(), 0.1)
    optimizer = definition.create(PARAMS).replace(state=Doubling().init_state(PARAMS))
    with pytest.raises(ValueError, match="around MultiOptimizer"):
        train(definition, optimizer=optimizer)


def test_the_seed_is_what_was_restored_after_init():
    definition = optimizers.dynamic_subset_tuning(Doubling(), 0.1)
    restored = jax.tree.map(lambda x: x + 1, PARAMS)
    optimizer = definition.create(PARAMS).replace(target=restored)
    optimizer = train(definition, optimizer=optimizer)
    for free in jax.tree.leaves(differing(optimizer, restored)):
        assert 0 < free.sum() <= np.ceil(0.1 * free.size)


def test_each_scanned_layer_is_a_silo():
    optimizer = train(optimizers.dynamic_subset_tuning(Doubling(), 0.1), axes=AXES)
    free = differing(optimizer)["encoder"]["mlp"]["kernel"]
    assert free.sum((0, 2)).tolist() == [13] * 4
    layers = {f"layers_{i}": PARAMS["encoder"]["mlp"]["kernel"][:, i] for i in range(4)}
    apart = optimizers.dynamic_subset_tuning(Doubling(), 0.1).create(layers)
    for g in GRADIENTS:
        g = {f"layers_{i}": g["encoder"]["mlp"]["kernel"][:, i] for i in range(4)}
        apart = apart.apply_gradient(g, learning_rate=0.1)
    for i in range(4):
        np.testing.assert_array_equal(
            optimizer.target["encoder"]["mlp"]["kernel"][:, i], apart.target[f"layers_{i}"]
        )


def test_silos_that_are_given_are_taken():
    definition = optimizers.dynamic_subset_tuning(Doubling(), 0.1, silos=silos.whole_model())
    optimizer = train(definition, axes=AXES)
    assert len(definition.plan(PARAMS).sizes) == 1
    assert sum(x.sum() for x in jax.tree.leaves(differing(optimizer))) == 53


@pytest.mark.parametrize("fraction", [0.1, [("norm", 1.0), ("", 0.1)], [("norm", 0.0), ("", 0.1)]])
def test_state_dicts_hold_no_empty_nodes_and_restore_everything(fraction):
    definition = optimizers.dynamic_subset_tuning(Doubling(), fraction)
    optimizer = train(definition, axes=AXES)
    saved = optimizer.state_dict()
    flat = flax.traverse_util.flatten_dict(saved, keep_empty_nodes=True)
    assert all(x is not flax.traverse_util.empty_node for x in flat.values())
    assert "mlp" in saved["state"]["param_states"]["encoder"]  # where a pre-trained checkpoint has slots
    restored = definition.create(PARAMS).restore_state(saved)
    assert jax.tree.structure(restored) == jax.tree.structure(optimizer)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(optimizer), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    again = train(definition, GRADIENTS[:2], optimizer=restored)
    straight = train(definition, GRADIENTS[:2], optimizer=optimizer)
    jax.tree.map(np.testing.assert_array_equal, again.target, straight.target)


def saved_in_bfloat16(optimizer):
    saved = optimizer.state_dict()
    return {**saved, "target": jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), saved["target"])}


WAYS = {
    "wrapper": lambda: optimizers.dynamic_subset_tuning(Doubling(), 0.1),
    "a free tensor": lambda: optimizers.dynamic_subset_tuning(Doubling(), [("norm", 1.0), ("", 0.1)]),
    "chain": lambda: optimizers.chain([optax.sgd(3.0), dst_optax.dynamic_subset_tuning(0.1)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_from_parameters_in_fewer_bits(way):
    definition = WAYS[way]()
    optimizer = train(definition)
    restored = definition.create(PARAMS).restore_state(saved_in_bfloat16(optimizer))
    for seed, p, q in zip(*map(jax.tree.leaves, (PARAMS, optimizer.target, restored.target)), strict=True):
        assert q.dtype == p.dtype
        rounded = np.asarray(p, jnp.bfloat16)
        seed_shows = (rounded == np.asarray(seed, jnp.bfloat16)) & (way != "a free tensor" or p.ndim > 1)
        np.testing.assert_array_equal(q, np.where(seed_shows, seed, rounded.astype(np.float32)))
    for free in jax.tree.leaves(differing(train(definition, GRADIENTS[:1], optimizer=restored))):
        assert 0 < free.sum() <= (free.size if free.ndim == 1 and way == "a free tensor" else 53)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_of_another_model_are_refused(way):
    definition = WAYS[way]()
    saved = train(definition).state_dict()
    saved["target"]["norm"]["scale"] = np.ones(13, np.float32)
    with pytest.raises(ValueError, match=r"'norm/scale' has the shape \(13,\) in the checkpoint and \(12,\)"):
        definition.create(PARAMS).restore_state(saved)


@pytest.mark.parametrize("lost", ["before the first step", "a frozen tensor"])
def test_what_was_rounded_off_and_is_nowhere_else_is_refused(lost):
    rules = [("norm", 0.0), ("", 0.1)] if lost == "a frozen tensor" else 0.1
    definition = optimizers.dynamic_subset_tuning(Doubling(), rules)
    optimizer = train(definition, GRADIENTS if lost == "a frozen tensor" else [])
    with pytest.raises(ValueError, match=r"restored as bfloat16.*SaveCheckpointConfig\.dtype"):
        definition.create(PARAMS).restore_state(saved_in_bfloat16(optimizer))


@pytest.mark.parametrize("fraction", [0.1, [("norm", 1.0), ("", 0.1)]])
def test_the_seed_is_sharded_as_its_parameter_and_nothing_is_without_a_spec(fraction):
    definition = optimizers.dynamic_subset_tuning(Doubling(), fraction)
    optimizer = train(definition, axes=AXES)
    found = definition.derive_logical_axes(optimizer, AXES)
    assert jax.tree.structure(found.state.dst, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(
        optimizer.state.dst
    )
    assert found.state.dst.seed["encoder"]["mlp"]["kernel"] == P("embed", "layers", "mlp")
    rest = found.state.dst._replace(seed=())
    assert all(x == P() for x in jax.tree.leaves(rest, is_leaf=lambda x: x is None))


def test_a_chain_sets_the_seed_exactly():
    transforms = [optax.sgd(3.0), dst_optax.dynamic_subset_tuning(0.05)]
    optimizer = train(optimizers.chain(transforms))
    for free in jax.tree.leaves(differing(optimizer)):
        assert 0 < free.sum() <= np.ceil(0.05 * free.size)


def specs(transform, axes=AXES):
    state = jax.eval_shape(transform.init, PARAMS)
    return t5x_optimizers.OptaxStatePartitionRules.derive_optax_logical_axes(state, axes)


@pytest.mark.parametrize("around", [False, True])
def test_counts_of_optax_are_not_without_a_spec(around):
    definition = optimizers.chain([optax.adam(0.1), dst_optax.dynamic_subset_tuning(0.1)])
    if around:
        definition = optimizers.dynamic_subset_tuning(optimizers.chain([optax.adam(0.1)]))
    optimizer = definition.create(PARAMS)
    found = definition.derive_logical_axes(optimizer, AXES).state.param_states[0][0]
    assert found.count == P()
    assert found.mu == AXES


def test_partition_rule_of_dst_in_a_chain():
    found = specs(optax.chain(optax.adam(0.1), dst_optax.dynamic_subset_tuning(0.1)))
    assert found[1].seed == AXES
    assert found[1].mask == AXES
    assert {*jax.tree.leaves(found[1]._replace(seed=(), mask=()))} == {P()}


def test_partition_rule_of_adafactor():
    found = specs(optax.adafactor(0.1, min_dim_size_to_factor=8))
    state = next(
        x
        for x in jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, optax.FactoredState))
        if isinstance(x, optax.FactoredState)
    )
    assert state.count == P()
    assert state.v_row == state.v_col == jax.tree.map(lambda _: P(), AXES)
    assert state.v == flax.core.freeze({"encoder": {"mlp": {"kernel": P()}}, "norm": {"scale": P("embed")}})


def test_partition_rule_of_injected_hyperparameters():
    found = specs(optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 10)))
    assert found.count == P()
    assert all(x == P() for x in jax.tree.leaves((found.hyperparams, found.hyperparams_states)))
    assert found.inner_state[0].mu == AXES


def test_the_state_serves_metrics_and_subset_files():
    definition = optimizers.dynamic_subset_tuning(Doubling(), 0.1)
    optimizer = train(definition, axes=AXES)
    found = diagnostics.metrics(optimizer.state, optimizer.target, plan=definition.plan(PARAMS))
    assert int(found["subset_size"]) == sum(x.sum() for x in jax.tree.leaves(differing(optimizer)))
    assert int(found["budget/encoder/mlp/kernel[3]"]) == 13
    tuned = subset.extract(optimizer.target, optimizer.state.dst).apply(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, tuned, optimizer.target)


def test_metrics_tell_silos_apart_under_the_wrapper_and_totals_in_a_chain():
    from t5x_integration.metrics import WeightMetricsComputer

    class State:
        def __init__(self, optimizer):
            self._optimizer, self.params = optimizer, optimizer.target

    wrapped = optimizers.dynamic_subset_tuning(Doubling(), 0.1)
    chained = optimizers.chain([optax.sgd(3.0), dst_optax.dynamic_subset_tuning(0.1)])
    for definition, named in ((wrapped, True), (chained, False)):
        before = train(definition, GRADIENTS[:2])
        after = train(definition, GRADIENTS[2:3], optimizer=before)
        found = WeightMetricsComputer().compute_metrics(GRADIENTS[2], State(before), State(after))
        assert {"dst/subset_size", "dst/budget", "dst/entered", "dst/left", "dst/overlap"} <= found.keys()
        assert ("dst/threshold/encoder/mlp/kernel" in found) == named
        assert all(name.startswith("dst/") for name in found)
