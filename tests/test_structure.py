"""What the compiled step is made of, what it keeps, and what importing the package costs."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst_optax
from dst_optax import projection, reference, selection, silos

PARAMS = {"a": jnp.ones((64, 48)), "b": jnp.ones(300, jnp.bfloat16), "stack": jnp.ones((3, 20, 9))}
HEAVY = {"flax", "orbax", "seqio", "tensorflow", "gin", "torch", "transformers", "equinox", "rich", "pandas"}
TRANSFORMS = {
    "strict": dst_optax.dynamic_subset_tuning(0.1),
    "fill": dst_optax.dynamic_subset_tuning(0.1, ties="fill"),
    "stacked": dst_optax.dynamic_subset_tuning(0.1, silos=silos.per_tensor(stacked=[("stack", 0)])),
    "model": dst_optax.dynamic_subset_tuning(0.1, silos=silos.whole_model()),
}


def programs(tx):
    lowered = jax.jit(tx.update).trace(PARAMS, tx.init(PARAMS), PARAMS)
    return str(lowered.jaxpr), lowered.lower().compile().as_text()


def sorts(jaxpr, hlo):
    return re.findall(r"\b(sort|top_k|approx_top_k|argsort)\[", jaxpr) + re.findall(r" sort\(", hlo)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_nothing_is_sorted(kind):
    assert sorts(*programs(TRANSFORMS[kind])) == []


def test_the_naive_quantile_is_caught():
    params = {n: x.astype(jnp.float32) for n, x in PARAMS.items()}
    tx = reference.dynamic_subset_tuning(0.1)
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    assert "sort" in sorts(str(traced.jaxpr), "")
    assert " sort(" in sorts("", traced.lower().compile().as_text())


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_state_is_the_seed_and_a_few_bytes_a_silo(kind):
    state = TRANSFORMS[kind].init(PARAMS)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state.seed)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(PARAMS)
    ]
    rest = jax.tree.leaves(state._replace(seed=()))
    scalars = sum(x.nbytes for x in rest if x.size <= 2)
    vectors = sum(x.nbytes for x in rest if x.size > 2)
    count = state.threshold.size
    assert vectors <= 8 * count + 8 * len(PARAMS)
    assert scalars <= 64


def test_state_grows_by_eight_bytes_a_silo_and_eight_a_leaf():
    def rest(n, stacked):
        rule = silos.per_tensor(stacked=[("", 0)] if stacked else [])
        tx = dst_optax.dynamic_subset_tuning(0.1, silos=rule)
        state = jax.eval_shape(tx.init, {f"p{i}": jnp.ones((100, 3)) for i in range(n)})
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(seed=())))

    assert rest(20, False) - rest(10, False) <= 10 * 16
    assert rest(10, True) - rest(10, False) <= 990 * 8


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_buffer_is_there_once(kind):
    """A trainer donates the state, and XLA refuses to take a buffer twice."""
    state = TRANSFORMS[kind].init(PARAMS)
    for made in (state, dst_optax.reseed(state, PARAMS)):
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((made, PARAMS))]
        assert len(set(buffers)) == len(buffers)


def test_no_recompile_when_parameters_and_states_change():
    tx = optax.chain(optax.adam(1e-2), TRANSFORMS["stacked"])

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(4):
        gradients = jax.tree.map(lambda x, i=i: x * np.asarray(i - 1, x.dtype), PARAMS)
        params, state = step(params, state, gradients)
    step(params, dst_optax.reseed(state, params), PARAMS)
    assert step._cache_size() == 1


def test_batches_are_alike_so_that_xla_compiles_their_kernels_once(monkeypatch):
    monkeypatch.setattr(projection, "BATCH", 4000)
    params = {f"{i}": jnp.ones((50, 20)) for i in range(10)}  # batches of 4, 4 and 2 tensors
    tx = dst_optax.dynamic_subset_tuning(0.1)
    hlo = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert set(re.findall(rf"s32\[(\d+),{selection.PROBES + 1}\]", hlo)) == {
        "1",
        "4",
    }  # a tensor's row of a table


def test_tensors_of_one_shape_are_traced_once():
    traced = []

    def distance(theta, theta_hat, seed):
        traced.append(theta.shape)
        return dst_optax.distances.absolute(theta, theta_hat, seed)

    params = {f"{i}": jnp.ones((20, 30 + i % 2)) for i in range(10)}
    tx = dst_optax.dynamic_subset_tuning(0.1, distance=distance)
    jax.jit(tx.update).lower(params, tx.init(params), params)
    assert {shape: traced.count(shape) for shape in set(traced)} == {(20, 30): 2, (20, 31): 2}


def test_import_brings_no_heavy_package():
    script = "import sys, jax, optax; before = set(sys.modules); import dst_optax; "
    script += "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    new = set(found.stdout.split())
    assert "dst_optax" in new
    assert not new & HEAVY
    third_party = {m for m in new if m not in sys.stdlib_module_names and not m.startswith("_")}
    assert third_party <= {"dst_optax", "jax", "jaxlib", "optax", "numpy", "safetensors"}
