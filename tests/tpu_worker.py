"""Compiles an optimizer step ahead of time for a TPU topology and prints what it does as JSON.

python tpu_worker.py <topology> (adamw | strict | fill | naive) ...
"""

import json
import math
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from multiprocess_worker import SIZE

import dst_optax
from dst_optax import reference

VOCAB = 32128
SIZES = {"v5e:2x4": (512, 384, 1024), "v5e:4x4": (1024, 1024, 2816)}  # T5 v1.1 small and large


def t5(embed, heads, mlp, layers):
    """Shapes and partition specs as T5X gives them on a (data, model) mesh, fully sharded."""
    attention = {n: ((embed, heads), P("data", "model")) for n in ("query", "key", "value")}
    attention["out"] = ((heads, embed), P("model", "data"))
    feed_forward = {n: ((embed, mlp), P("data", "model")) for n in ("wi_0", "wi_1")} | {
        "wo": ((mlp, embed), P("model", "data"))
    }
    norm = {"scale": ((embed,), P("data"))}
    block = {"attention": attention, "attention_norm": norm, "mlp": feed_forward, "mlp_norm": norm}
    crossed = block | {"cross_attention": attention, "cross_attention_norm": norm}
    stacks = {
        stack: {f"layers_{i}": parts for i in range(layers)}
        | {"norm": norm, "relpos_bias": ((heads // 64, 32), P())}
        for stack, parts in (("encoder", block), ("decoder", crossed))
    }
    return stacks | {
        "token_embedder": ((VOCAB, embed), P("model", "data")),
        "logits_dense": ((embed, VOCAB), P("data", "model")),
    }


def transform(name):
    adamw = optax.adamw(1e-3)
    if name in ("strict", "fill"):
        return dst_optax.wrap(adamw, 0.1, ties=name), dst_optax.apply_updates
    if name == "naive":
        adamw = optax.chain(adamw, reference.dynamic_subset_tuning(0.1))
    return adamw, lambda params, updates, state: optax.apply_updates(params, updates)


def compile_step(name, params, everywhere):
    tx, apply_updates = transform(name)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates, state), state

    def placed(struct, sharding):
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

    state = optax.tree.map_params(
        tx,
        lambda x, p: placed(x, p.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: placed(x, everywhere),
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def size_of(result):
    return sum(
        SIZE.get(dtype, 4) * int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
    )


COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def facts(text):
    """Sorts, the largest collective of each kind, and the bytes all-reduced in a turn of each loop."""
    computations = {
        name: body
        for name, body in re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    }
    largest, reduced, calls, bodies = {}, {}, {}, set()
    for name, body in computations.items():
        reduced[name] = 0
        for result, kind in COLLECTIVE.findall(body):
            largest[kind] = max(largest.get(kind, 0), size_of(result))
            reduced[name] += size_of(result) if kind == "all-reduce" else 0
        bodies |= set(re.findall(r"body=%?([\w.\-]+)", body))
        calls[name] = re.findall(
            r"(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation)="
            r"\{?%?([\w.\-]+)",
            body,
        )

    def total(name):
        return reduced.get(name, 0) + sum(total(c) for c in calls.get(name, ()))

    return {
        "sorts": len(re.findall(r" sort\(", text)),
        "largest": largest,
        "pass_bytes": max((total(name) for name in bodies), default=0),
    }


def main(topology, names):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = tuple(int(x) for x in topology.split(":")[1].split("x"))
    mesh = Mesh(np.array(devices).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf[0], jnp.float32, sharding=NamedSharding(mesh, leaf[1])),
        t5(*SIZES[topology], layers=1),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    one = {"wo": params["encoder"]["layers_0"]["mlp"]["wo"]}  # sorts compile slowly
    report = {}
    for name in names:
        tree = one if name == "naive" else params
        leaves = jax.tree.leaves(tree)
        start = time.perf_counter()
        compiled = compile_step(name, tree, NamedSharding(mesh, P()))
        report[name] = facts(compiled.as_text()) | {
            "silos": len(leaves),
            "local": sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves),
            "temp": compiled.memory_analysis().temp_size_in_bytes,
            "seconds": round(time.perf_counter() - start, 1),
        }
    return report


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
