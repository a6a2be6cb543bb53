"""Extracts, applies, reverts and serves subsets of sharded models; prints what held as JSON.

python subset/sharded_worker.py [<port> <index>]      # alone, or as one of two processes
"""

import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import bits

import dst_optax
from dst_optax import serving, silos, subset

SHAPES = {
    "both": (8, 12),
    "columns": (3, 8),
    "replicated": (5,),
    "rows": (16, 6),
    "scalar": (),
    "stack": (4, 2, 10),
}
SPECS = {"both": P("x", "y"), "columns": P(None, ("x", "y")), "rows": P("x"), "stack": P("x", "y")}
BUDGETS = {
    "a share of each tensor": {"fraction_of_free_params": 0.1},
    "a share of each slice": {"fraction_of_free_params": 0.3, "silos": silos.per_tensor([("stack", 2)])},
    "a total": {"num_free_params": 37, "silos": silos.whole_model()},
    "rules": {"fraction_of_free_params": [("both", 1.0), ("rows", 0.0), (".*", 0.5)]},
}


def arrays(salt, share=1.0):
    rng = np.random.default_rng(salt)
    out = {p: rng.normal(size=s) * (rng.random(s) < share) for p, s in SHAPES.items()}
    return {
        p: np.asarray(x.astype(ml_dtypes.bfloat16 if p == "rows" else np.float32)) for p, x in out.items()
    }


def same(model, expected):
    """Whether this process's shards have the expected bits."""
    return all(
        (bits(np.asarray(s.data)) == bits(np.asarray(x[s.index]))).all()
        for p, x in expected.items()
        for s in model[p].addressable_shards
    )


def equal(a, b):
    return list(a) == list(b) and all(
        e.shape == b[p].shape
        and e.seed_fingerprint == b[p].seed_fingerprint
        and e.positions.tolist() == b[p].positions.tolist()
        and (bits(e.values) == bits(b[p].values)).all()
        and (bits(e.seed_values) == bits(b[p].seed_values)).all()
        for p, e in a.items()
    )


def trained(params, gradients):
    tx = dst_optax.wrap(optax.sgd(0.5), fraction_of_free_params=0.2)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    state = jax.jit(tx.init)(params)
    for _ in range(2):
        params, state = step(params, state, gradients)
    return params, state


def report(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    shardings = {p: NamedSharding(mesh, SPECS.get(p, P())) for p in SHAPES}

    def put(model):
        return {
            p: jax.make_array_from_callback(x.shape, shardings[p], lambda index, x=x: x[index])
            for p, x in model.items()
        }

    seed = arrays(0)
    tuned = {p: np.asarray(x + d) for (p, x), d in zip(seed.items(), arrays(1, 0.4).values(), strict=True)}
    expected = subset.from_models(seed, tuned, with_seed_values=True)
    found = subset.from_models(put(seed), put(tuned), with_seed_values=True)
    applied, reverted = found.apply(put(seed)), found.revert(put(tuned))
    checks = {
        "exact difference": equal(found, expected),
        "seed on the host": equal(subset.from_models(seed, put(tuned), with_seed_values=True), expected),
        "applied": same(applied, tuned),
        "reverted": same(reverted, seed),
        "shardings": all(m[p].sharding == s for m in (applied, reverted) for p, s in shardings.items()),
    }
    for name, budget in BUDGETS.items() if kind == AxisType.Auto else [("rules", BUDGETS["rules"])]:
        few = subset.from_models(put(seed), put(tuned), **budget, with_seed_values=True)
        checks[name] = equal(few, subset.from_models(seed, tuned, **budget, with_seed_values=True))
        checks[name] &= 0 < few.count < found.count
    params, state = trained(put(seed), put(arrays(2)))
    whole = {p: multihost_utils.process_allgather(x, tiled=True) for p, x in params.items()}
    extracted = subset.extract(params, state, with_seed_values=True)
    checks["extracted"] = equal(extracted, subset.from_models(seed, whole, with_seed_values=True))
    checks["a few are free"] = 0 < extracted.count <= 0.2 * extracted.size + len(SHAPES)
    away = jax.local_devices()[-1]
    with jax.default_device(away):
        elsewhere = {
            p: jnp.array(x) for p, x in seed.items()
        }  # committed to no device, and not on the default one
    checks["arrays elsewhere stay there"] = all(x.device == away for x in expected.apply(elsewhere).values())
    store = serving.SubsetStore(put(seed))
    store.add("a", expected)
    store.add("b", extracted)
    for name, model in (("a", tuned), ("b", whole), ("a", tuned)):
        checks[f"served {name}"] = checks.get(f"served {name}", True) and same(store.activate(name), model)
    checks["served seed"] = same(store.deactivate(), seed)
    checks["served shardings"] = all(store.params[p].sharding == s for p, s in shardings.items())
    if jax.process_count() > 1:
        one = ("replicated", "scalar")
        local = ({**put(m), **{p: jnp.array(m[p]) for p in one}} for m in (seed, tuned))
        checks["arrays of one process"] = equal(subset.from_models(*local, with_seed_values=True), expected)
        checks["arrays of one process"] &= len(expected["replicated"]) > 0
    return {name: bool(held) for name, held in checks.items()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
    checks = {kind.name: report(kind) for kind in (AxisType.Auto, AxisType.Explicit)}
    print(json.dumps({"processes": jax.process_count(), "devices": jax.device_count(), "checks": checks}))
