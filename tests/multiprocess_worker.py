"""Trains on a device mesh and prints digests of every step as JSON; test_sharding.py compares them.

python multiprocess_worker.py single | mesh | process <port> <index>
"""

import hashlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dst_optax
from dst_optax import silos

STEPS = 4
SHAPES = {"a": (64, 96), "bias": (64,), "half": (8, 40), "stack": (4, 16, 24)}
UNEVEN = {"a": (13, 7), "bias": (5,), "half": (3, 11), "stack": (4, 5, 3)}
SPECS = {"a": P("x", "y"), "bias": P("y"), "half": P(None, "x"), "stack": P("x", None, "y")}
RULES = {
    "strict": dict(fraction_of_free_params=0.1),
    "fill": dict(fraction_of_free_params=0.1, ties="fill"),
    "model": dict(fraction_of_free_params=0.02, silos=silos.whole_model()),
    "model_fill": dict(fraction_of_free_params=0.02, silos=silos.whole_model(), ties="fill"),
    "layers": dict(fraction_of_free_params=0.1, silos=silos.per_tensor(stacked=[("stack", 0)])),
    "total": dict(num_free_params=50, ties="fill"),
    "schedule": dict(fraction_of_free_params=optax.linear_schedule(0.2, 0.05, STEPS)),
    "mixed": dict(fraction_of_free_params=[("bias", 1.0), ("half", 0.0), (".*", 0.1)]),
}


def arrays(shapes, salt):
    rng = np.random.default_rng(salt)
    out = {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape).astype(np.float32)
        out[name] = np.asarray(x.astype(jnp.bfloat16)) if name == "half" else x
    return out


def digest(tree):
    return {n: hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:16] for n, x in sorted(tree.items())}


def transform(rule):
    return optax.chain(optax.identity(), dst_optax.dynamic_subset_tuning(**RULES[rule]))


def one_step(tx):
    def step(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    return jax.jit(step)


def put(tree, shardings):
    if shardings is None:
        return jax.tree.map(jnp.asarray, tree)
    return {
        n: jax.make_array_from_callback(x.shape, shardings[n], lambda index, x=x: x[index])
        for n, x in tree.items()
    }


def fetch(tree):
    """Whole arrays, also where their shards lie in other processes."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return {n: multihost_utils.process_allgather(x, tiled=True) for n, x in tree.items()}


def kept(tree, shardings):
    return all(
        x.sharding.is_equivalent_to(shardings[n], x.ndim)
        for n, x in tree.items()
        if isinstance(x, jax.Array)  # a leaf that needs no seed holds optax.MaskedNode
    )


def run(rule, shardings=None, shapes=SHAPES):
    """Digests after each step, and whether the parameters and the seed kept their shardings."""
    tx = transform(rule)
    params = put(arrays(shapes, 0), shardings)
    state, step = tx.init(params), one_step(tx)
    digests, same = [], True
    for i in range(STEPS):
        params, state = step(params, state, put(arrays(shapes, i + 1), shardings))
        digests.append(digest(fetch(params)))
        if shardings is not None:
            same &= kept(params, shardings) and kept(state[1].seed, shardings)
    return {"digests": digests, "kept": same, "compiled": step._cache_size()}


def run_uneven(rule, shardings=None):
    """The same inside one program, where a mesh axis need not divide a dimension."""
    tx = transform(rule)

    def constrain(tree):
        if shardings is None:
            return tree
        return {n: jax.lax.with_sharding_constraint(x, shardings[n]) for n, x in tree.items()}

    @jax.jit
    def train(params, all_updates):
        params = constrain(params)
        state, trace = tx.init(params), []
        for updates in all_updates:
            updates, state = tx.update(constrain(updates), state, params)
            params = constrain(dst_optax.apply_updates(params, updates, state))
            trace.append(params)
        return trace

    everywhere = None
    if shardings is not None:
        everywhere = {n: NamedSharding(s.mesh, P()) for n, s in shardings.items()}
    trace = train(
        put(arrays(UNEVEN, 0), everywhere), [put(arrays(UNEVEN, i + 1), everywhere) for i in range(STEPS)]
    )
    return {"digests": [digest(fetch(p)) for p in trace], "kept": True, "compiled": train._cache_size()}


SIZE = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "f64": 8, "s64": 8, "u64": 8}


def traffic(text):
    """Bytes of the largest result of each kind of collective in compiled HLO, and the sorts."""
    found = {"sort": len(re.findall(r" sort\(", text))}
    pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for result, kind in re.findall(pattern, text):
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result):
            size = SIZE.get(dtype, 4) * int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
            found[kind] = max(found.get(kind, 0), size)
    return found


def hlo(shardings, naive=False):
    params = put(arrays(SHAPES, 0), shardings)
    updates = put(arrays(SHAPES, 1), shardings)
    if naive:

        def step(params, updates):
            def leaf(p, u):
                delta = jnp.abs(u).astype(jnp.float32)
                return jnp.where(delta > jnp.quantile(delta, 0.9), p + u, p)

            return jax.tree.map(leaf, params, updates)

        return traffic(jax.jit(step).lower(params, updates).compile().as_text())
    found = {}
    for rule in RULES:
        tx = transform(rule)
        compiled = one_step(tx).lower(params, tx.init(params), updates).compile()
        found[rule] = traffic(compiled.as_text())
    return found


def attempt(f, *args):
    """One failing case must not hide the others."""
    try:
        return f(*args)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:2000]}


def shardings_of(mesh, replicated=False):
    return {n: NamedSharding(mesh, P() if replicated else spec) for n, spec in SPECS.items()}


def mesh_report():
    auto = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    explicit = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    report = {rule: {} for rule in RULES}
    for rule, results in report.items():
        results["auto"] = attempt(run, rule, shardings_of(auto))
        results["replicated"] = attempt(run, rule, shardings_of(auto, replicated=True))
        results["one_of_eight"] = attempt(run, rule)
        with jax.set_mesh(explicit):
            results["explicit"] = attempt(run, rule, shardings_of(explicit))
        results["uneven"] = attempt(run_uneven, rule, shardings_of(auto))
    two = jax.make_mesh((2, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    report["strict"]["two"] = attempt(run, "strict", shardings_of(two))
    return {
        "devices": jax.device_count(),
        "runs": report,
        "hlo": hlo(shardings_of(auto)),
        "naive": hlo(shardings_of(auto), naive=True),
    }


def single_report():
    runs = {rule: {"even": run(rule), "uneven": run_uneven(rule)} for rule in RULES}
    return {"devices": jax.device_count(), "runs": runs}


def process_report():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    runs = {rule: run(rule, shardings_of(mesh)) for rule in ("strict", "fill", "model")}
    return {"devices": jax.device_count(), "processes": jax.process_count(), "runs": runs}


if __name__ == "__main__":
    if sys.argv[1] == "process":
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
    print(
        json.dumps({"single": single_report, "mesh": mesh_report, "process": process_report}[sys.argv[1]]())
    )
