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
from dst_optax import reference, silos

STEPS = 4
SHAPES = {"a": (64, 96), "bias": (4096,), "half": (8, 512), "stack": (4, 32, 24)}
UNEVEN = {"a": (13, 7), "bias": (5,), "half": (3, 11), "stack": (4, 5, 3)}
SPECS = {"a": P("x", "y"), "bias": P("y"), "half": P(None, "x"), "stack": P("x", None, "y")}
RULES = {
    "strict": dict(fraction_of_free_params=0.1),
    "model_fill": dict(fraction_of_free_params=0.02, silos=silos.whole_model(), ties="fill"),
    "layers": dict(fraction_of_free_params=0.1, silos=silos.per_tensor(stacked=[("stack", 0)])),
    "total": dict(num_free_params=50, ties="fill"),
    "schedule": dict(fraction_of_free_params=optax.linear_schedule(0.2, 0.05, STEPS)),
    "mixed": dict(fraction_of_free_params=[("bias", 1.0), ("half", 0.0), (".*", 0.1)]),
}
EXPLICIT_RULES = ("layers", "model_fill", "mixed")
UNEVEN_RULES = ("layers", "model_fill")
PROCESS_RULES = ("layers", "model_fill")


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


def step_of(tx):
    def step(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    return step


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


def run(rule, shardings=None):
    """Digests after each step, whether shardings were kept, and what crosses devices.

    One program serves all steps: it would refuse a state whose shardings its own step had changed.
    """
    tx = transform(rule)
    params, updates = (put(arrays(SHAPES, i), shardings) for i in range(2))
    state = jax.jit(tx.init)(params)
    step = jax.jit(step_of(tx)).lower(params, state, updates).compile()
    digests, same = [], shardings is None or kept(state[1].mask, shardings)
    for i in range(STEPS):
        params, state = step(params, state, put(arrays(SHAPES, i + 1), shardings))
        digests.append(digest(fetch(params)))
        if shardings is not None:
            same &= all(kept(tree, shardings) for tree in (params, state[1].seed, state[1].mask))
    return {"digests": digests, "kept": same, "traffic": traffic(step.as_text())}


def run_uneven(rule, shardings=None):
    """The same inside one program, where a mesh axis need not divide a dimension."""
    tx = transform(rule)
    step = step_of(tx)

    def constrain(tree):
        if shardings is None:
            return tree
        return {n: jax.lax.with_sharding_constraint(x, shardings[n]) for n, x in tree.items()}

    @jax.jit
    def train(params, all_updates):
        def body(carry, updates):
            params, state = step(constrain(carry[0]), carry[1], constrain(updates))
            return (constrain(params), state), params

        return jax.lax.scan(body, (params, tx.init(constrain(params))), all_updates)[1]

    everywhere = None
    if shardings is not None:
        everywhere = {n: NamedSharding(s.mesh, P()) for n, s in shardings.items()}
    all_updates = [arrays(UNEVEN, i + 1) for i in range(STEPS)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *all_updates)
    trace = fetch(train(put(arrays(UNEVEN, 0), everywhere), put(stacked, everywhere)))
    return {"digests": [digest({n: x[i] for n, x in trace.items()}) for i in range(STEPS)]}


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


def naive(shardings):
    tx = reference.dynamic_subset_tuning(0.1)
    params, updates = (put(arrays(SHAPES, i), shardings) for i in range(2))
    params, updates = ({n: x.astype(jnp.float32) for n, x in t.items()} for t in (params, updates))
    state = jax.jit(tx.init)(params)
    return traffic(jax.jit(tx.update).lower(updates, state, params).compile().as_text())


def attempt(f, *args):
    """One failing case must not hide the others."""
    try:
        return f(*args)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:2000]}


def shardings_of(mesh, replicated=False):
    return {n: NamedSharding(mesh, P() if replicated else spec) for n, spec in SPECS.items()}


def make_mesh(shape, axis_type):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("x", "y"), axis_types=(axis_type,) * 2, devices=devices)


def mesh_report():
    auto, explicit = (make_mesh((4, 2), t) for t in (AxisType.Auto, AxisType.Explicit))
    runs = {"auto": {rule: attempt(run, rule, shardings_of(auto)) for rule in RULES}}
    with jax.set_mesh(explicit):
        runs["explicit"] = {rule: attempt(run, rule, shardings_of(explicit)) for rule in EXPLICIT_RULES}
    runs["uneven"] = {rule: attempt(run_uneven, rule, shardings_of(auto)) for rule in UNEVEN_RULES}
    runs["replicated"] = {"strict": attempt(run, "strict", shardings_of(auto, replicated=True))}
    runs["one_of_eight"] = {"strict": attempt(run, "strict")}
    runs["two"] = {"strict": attempt(run, "strict", shardings_of(make_mesh((2, 1), AxisType.Auto)))}
    return {"runs": runs, "naive": naive(shardings_of(auto))}


def single_report():
    even = {rule: run(rule) for rule in RULES}
    return {"runs": {"even": even, "uneven": {rule: run_uneven(rule) for rule in UNEVEN_RULES}}}


def process_report():
    shardings = shardings_of(make_mesh((2, 2), AxisType.Auto))
    return {
        "processes": jax.process_count(),
        "runs": {rule: run(rule, shardings) for rule in PROCESS_RULES},
    }


if __name__ == "__main__":
    if sys.argv[1] == "process":
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
    report = {"single": single_report, "mesh": mesh_report, "process": process_report}[sys.argv[1]]()
    print(json.dumps(report | {"devices": jax.device_count()}))
