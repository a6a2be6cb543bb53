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
from dst_optax import counting, reference, select, silos

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
def test_state_is_the_seed_a_mask_and_a_few_bytes_a_silo(kind):
    state = TRANSFORMS[kind].init(PARAMS)
    described = [(x.shape, x.dtype) for x in jax.tree.leaves(PARAMS)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state.seed)] == described
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state.mask)] == [(s, jnp.bool) for s, _ in described]
    rest = jax.tree.leaves(state._replace(seed=(), mask=()))
    assert sum(x.nbytes for x in rest) <= 8 * state.memory.threshold.size + 32


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


def compiled(params, tx):
    gradients, state = jax.tree.map(jnp.ones_like, params), tx.init(params)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()


def different_kernels(program):
    """How many fused computations of a program differ by more than names."""
    bodies = re.findall(r"^%fused_computation\S* \(.*?^\}", program.as_text(), re.M | re.S)
    plain = [re.sub(r", metadata=\{[^}]*\}|%[\w.\-]+|param_[\d.]+", "", body) for body in bodies]
    return len(set(plain))


def test_compilation_does_not_grow_with_tensors_of_one_shape():
    """XLA compiles equal kernels once, and an index that is a constant would make them differ."""
    few, many = (
        compiled({f"{i:02}": jnp.ones((50, 20)) for i in range(n)}, dst_optax.dynamic_subset_tuning(0.1))
        for n in (8, 32)
    )
    assert different_kernels(many) <= different_kernels(few) + 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere all keys are in memory at one time")
def test_temporary_memory_is_that_of_one_batch(monkeypatch):
    monkeypatch.setattr(counting, "BATCH", 2**17)
    select.choose.clear_cache()
    params = {f"{i:02}": jnp.ones((256, 512)) for i in range(24)}
    tx = optax.chain(optax.adam(1e-2), dst_optax.dynamic_subset_tuning(0.1))
    program = compiled(params, tx)
    select.choose.clear_cache()
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= 2.1 * 24 * 2**17


def test_the_seed_is_passed_on_in_place():
    """Its buffer and the parameters' are those of the last step, and no other copy is made."""
    params = {"a": jnp.ones((256, 512))}
    program = compiled(params, dst_optax.dynamic_subset_tuning(0.1))
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= 8 * 2**17  # parameters and seed
    assert analysis.output_size_in_bytes <= 9.1 * 2**17  # and the mask


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
