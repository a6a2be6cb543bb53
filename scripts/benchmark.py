#!/usr/bin/env python
"""Times Dynamic Subset Tuning against its baselines in one run and writes the figures as JSON.

    python scripts/benchmark.py                       # everything
    python scripts/benchmark.py step --models small   # one part
    python scripts/benchmark.py training-step         # needs the extra finetuning
    python scripts/benchmark.py serving               # the same; nine minutes
    python scripts/benchmark.py kernels --models small  # where the bytes and the time of a step go

selection: thresholds of one silo of n distances, against numpy's and jax's sorts.
step: a whole training step's optimizer on T5-shaped trees, with compile time, memory and passes.
training-step: forward, backward and update of T5 v1.1 small, 8 examples of 128 tokens.
serving: requests that each want another tuned T5, by subsets, by merged LoRA, by loading checkpoints.
kernels: one profiled step of adamw+DST: time, bytes and bytes a parameter of each kind of kernel.
A cell that would take more than a minute or the memory of the machine is skipped and says so.
Figures are medians; `min` and `max` stand beside them in the JSON. A record that is put into docs/benchmarks
becomes a part of the site: scripts/benchmarks_page.py.
"""

import argparse
import functools
import math
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record

import dst_optax
from dst_optax import budget, counting, reference
from dst_optax.counts import Counts

LIMIT = 60.0  # seconds that a cell may take
INFINITY = 0x7F800000


def t5_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of T5 v1.1, named as T5X does."""
    emb, heads, mlp, layers = {
        "small": (512, 6, 1024, 8),
        "base": (768, 12, 2048, 12),
        "large": (1024, 16, 2816, 24),
    }[size]
    joined, vocab = heads * 64, 32128
    attention = {"query": (emb, joined), "key": (emb, joined), "value": (emb, joined), "out": (joined, emb)}
    feed_forward = {"wi_0": (emb, mlp), "wi_1": (emb, mlp), "wo": (mlp, emb)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedder/embedding": (vocab, emb),
        "decoder/logits_dense/kernel": (emb, vocab),
    }
    blocks = {
        "encoder": {"attention": attention, "mlp": feed_forward},
        "decoder": {"self_attention": attention, "encoder_decoder_attention": attention, "mlp": feed_forward},
    }
    for stack, parts in blocks.items():
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (heads, 32)
        shapes[f"{stack}/{stack}_norm/scale"] = (emb,)
        for i in range(layers):
            for part, kernels in parts.items():
                shapes[f"{stack}/layers_{i}/pre_{part}_layer_norm/scale"] = (emb,)
                for name, shape in kernels.items():
                    shapes[f"{stack}/layers_{i}/{part}/{name}/kernel"] = shape
    return shapes


def shapes_of(model: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A model's name, and the shapes of its parameters."""
    if model != "smollm2":
        return f"T5 v1.1 {model}", t5_shapes(model)
    from dst_optax.finetuning.models import decoder

    return "SmolLM2-135M", decoder.shapes(decoder.CONFIGS["smollm2_135m"])


def random_tree(shapes: dict[str, tuple[int, ...]], seed: int, scale: float) -> dict[str, jax.Array]:
    """Normal entries; the scale differs from tensor to tensor, as that of gradients does."""
    tree = {}
    for i, (path, shape) in enumerate(shapes.items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        tree[path] = jax.random.normal(key, shape) * scale * (1 + i % 7)
    return tree


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, least and most."""
    ms = [1e3 * s for s in seconds]
    return {"ms": statistics.median(ms), "min": min(ms), "max": max(ms), "runs": len(ms)}


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds until all results are there."""
    start = clock()
    jax.block_until_ready(call())
    return clock() - start


def alternate(
    calls: dict[str, Callable[[], Any]],
    runs: int,
    prepare: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Times calls in turn, so that what disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + 1):
        for name, call in calls.items():
            if sum(times[name]) < LIMIT:
                prepare(name)
                times[name].append(timed(call, clock))
    times = {name: seconds[1:] or seconds for name, seconds in times.items()}  # the first one warms up
    return {name: summary(seconds) for name, seconds in times.items()}


# --- selection -----------------------------------------------------------------------------------


def key_of(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


@functools.partial(jax.jit, static_argnums=3)
def search(delta: jax.Array, guess: jax.Array, spread: jax.Array, m: int) -> counting.Bracket:
    """The threshold as the transform finds it; a negative guess is a cold start."""

    def method(layout: counting.Layout, keys: jax.Array, query: counting.Query) -> counting.Bracket:
        row = counting.Keys(keys[None], 0, (0,), (0,), jnp.uint32(0))
        find = functools.partial(counting.search, top=INFINITY, density_scale=2**23)
        return layout.for_each_silo(find, [row], query)

    query = counting.Query(Counts.of([m]), Counts.of([delta.size]), guess, spread)
    return counting.per_platform(method, delta.size, key_of(delta), query)


def selection_cells(largest: int, runs: int) -> Iterator[dict[str, Any]]:
    """Selection alone for n = 1e4 ... largest and four fractions."""
    sizes = [10**k for k in range(4, 10) if 10**k <= largest]
    for n in sizes:
        delta = jnp.abs(jax.random.normal(jax.random.key(n), (n,)))
        for fraction in (0.5, 0.1, 1e-3, 1e-5):
            yield selection_cell(delta, fraction, runs)


def selection_cell(delta: jax.Array, fraction: float, runs: int) -> dict[str, Any]:
    """One silo and one fraction."""
    n, host = delta.size, np.asarray(delta)
    m = budget.rank(fraction, n)
    none, spread = jnp.full(1, -1, jnp.int32), jnp.ones(1, jnp.int32)
    cold = search(delta, none, spread, m)
    threshold = jax.lax.bitcast_convert_type(cold.hi, jnp.float32)
    off = key_of(threshold * 1.003)  # the last step's threshold, 0.3% off
    around = jnp.full(1, 1 << 14, jnp.int32)
    calls: dict[str, Callable[[], Any]] = {
        "warm": lambda: search(delta, off, around, m),
        "cold": lambda: search(delta, none, spread, m),
        "np.partition": lambda: np.partition(host, n - m - 1)[n - m - 1],
    }
    skipped = {}
    if n * 1.2e-7 * 4.5 < LIMIT:  # measured: 0.5 s a million
        quantile = jax.jit(lambda x: jnp.quantile(x, 1 - fraction, method="lower"))
        calls["jnp.quantile"] = lambda: quantile(delta)
    else:
        skipped["jnp.quantile"] = f"would take more than {LIMIT:.0f} s"
    if m > 2000:
        skipped["lax.top_k"] = f"k = {m} is a sort"
    elif n * 2.6e-7 * 4.5 < LIMIT:  # measured: 2.6 s for ten million
        top_k = jax.jit(lambda x: jax.lax.top_k(x, m + 1)[0][-1])
        calls["lax.top_k"] = lambda: top_k(delta)
    else:
        skipped["lax.top_k"] = f"would take more than {LIMIT:.0f} s"
    jax.block_until_ready([c() for name, c in calls.items() if name != "jnp.quantile"])
    times = alternate(calls, runs)
    warm = times["warm"]["ms"]
    passes = int(search(delta, off, around, m).passes[0])
    quantile_below = np.partition(host, n - m - 1)[n - m - 1]
    assert int((delta > threshold[0]).sum()) == int(
        (host > quantile_below).sum()
    )  # fewer than m where they tie
    return {
        "part": "selection",
        "n": n,
        "fraction": fraction,
        "passes": {"warm": passes, "cold": int(cold.passes[0])},
        "times": times,
        "x_warm": {name: t["ms"] / warm for name, t in times.items()},
        "skipped": skipped,
    }


# --- whole step ----------------------------------------------------------------------------------


def fused_where(threshold: float) -> optax.GradientTransformation:
    """The floor: the same bytes as Dynamic Subset Tuning with thresholds that are given."""

    def update(updates: Any, seed: Any, params: Any) -> tuple[Any, Any]:
        new = jax.tree.map(
            lambda u, s, p: jnp.where(jnp.abs(p + u - s) > threshold, u, s - p), updates, seed, params
        )
        return new, seed

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.copy, params), update)  # type: ignore[arg-type]


@jax.jit
def noisy(drift: dict[str, jax.Array], turn: int) -> dict[str, jax.Array]:
    """Stochastic gradients: the same drift in noise that is never the same."""
    key = jax.random.fold_in(jax.random.key(0), turn)
    return {
        name: x + 3 * jnp.std(x) * jax.random.normal(jax.random.fold_in(key, i), x.shape)
        for i, (name, x) in enumerate(drift.items())
    }


class Trainee:
    """One optimizer on one tree: compiled, stepped, timed."""

    gradient: Any = None  # that of the trainee which is prepared, the only one in memory

    def __init__(self, tx: optax.GradientTransformation, exact: bool, params: Any, drift: Any):
        self.drift, self.turn = drift, 0
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)

        def step(params: Any, state: Any, g: Any) -> tuple[Any, Any]:
            updates, state = tx.update(g, state, params)
            if exact:
                return dst_optax.apply_updates(params, updates, state), state
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, drift).compile()
        self.compile_seconds = time.perf_counter() - start
        self.compiled = compiled
        analysis = compiled.memory_analysis()
        self.temp = int(analysis.temp_size_in_bytes) if analysis is not None else -1

    def prepare(self) -> None:
        """New gradients: as in training, a drift in three times as much noise."""
        self.turn += 1
        Trainee.gradient = None
        Trainee.gradient = jax.block_until_ready(noisy(self.drift, self.turn))

    def step(self) -> Any:
        """One step; the new parameters."""
        self.params, self.state = self.compiled(self.params, self.state, Trainee.gradient)
        return self.params


def memory() -> int:
    """Bytes that arrays may take: of the device, or three quarters of the host's if that is the device."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def step_cell(model: str, fraction: float, runs: int, naive: bool) -> dict[str, Any]:
    """The optimizer adamw alone, with DST, with the naive DST, and with a fused where."""
    title, shapes = shapes_of(model)
    params = random_tree(shapes, 0, 0.02)
    drift = random_tree(shapes, 1, 1e-3)
    size = sum(p.size for p in params.values())
    adamw = optax.adamw(optax.linear_schedule(1e-3, 1e-4, 1000))
    kinds: dict[str, tuple[optax.GradientTransformation, bool]] = {
        "adamw": (adamw, False),
        "adamw+where": (optax.chain(adamw, fused_where(1e-3)), False),
        "adamw+dst": (dst_optax.wrap(adamw, fraction), True),
        "adamw+dst fill": (dst_optax.wrap(adamw, fraction, ties="fill"), True),
    }
    trainees, skipped = {}, {}
    room = memory() - 16 * size  # params, drift, one gradient, and temporary memory
    for name, (tx, exact) in kinds.items():
        held = 4 * size * (3 if name == "adamw" else 4)
        if held > room:
            skipped[name] = f"would take more than the {memory() / 1e9:.0f} GB that there are for it"
            continue
        room -= held
        trainees[name] = Trainee(tx, exact, params, drift)
    if naive and size * 3.5e-7 < LIMIT and 32 * size < room:  # measured: 22.5 s for 77 million
        naive_tx = optax.chain(adamw, reference.dynamic_subset_tuning(fraction))
        trainees["adamw+naive"] = Trainee(naive_tx, False, params, drift)
    else:
        why = f"would take more than {LIMIT:.0f} s a step, or too much memory" if naive else "not asked for"
        skipped["adamw+naive"] = why
    for name, trainee in trainees.items():  # past the first, cold steps
        for _ in range(1 if name == "adamw+naive" else 4):
            trainee.prepare()
            jax.block_until_ready(trainee.step())
    naive_step = trainees.pop("adamw+naive", None)
    times = alternate(
        {name: t.step for name, t in trainees.items()}, runs, lambda name: trainees[name].prepare()
    )
    if naive_step is not None:
        naive_step.prepare()
        times["adamw+naive"] = summary([timed(naive_step.step)])
    facts = dst_optax.diagnostics.metrics(trainees["adamw+dst"].state)
    plain = trainees["adamw"]
    return {
        "part": "step",
        "model": title,
        "parameters": size,
        "tensors": len(shapes),
        "fraction": fraction,
        "times": times,
        "x_adamw": {name: t["ms"] / times["adamw"]["ms"] for name, t in times.items()},
        "compile_seconds": {name: t.compile_seconds for name, t in trainees.items()},
        "temp_bytes_a_parameter": {
            name: (t.temp - plain.temp) / size for name, t in trainees.items() if t.temp >= 0
        },
        "passes": int(facts["passes"]),
        "free": int(facts["num_free"]),
        "budget": int(facts["budget"]),
        "skipped": skipped,
    }


# --- training step -------------------------------------------------------------------------------


def training_step_cell(fraction: float, runs: int, tokens: int = 128) -> dict[str, Any]:
    """A whole step of T5 v1.1 small with adamw, alone and with DST; 8 examples, inputs as long as targets."""
    from dst_optax.finetuning.methods.dst import DST
    from dst_optax.finetuning.methods.full import Full
    from dst_optax.finetuning.models import t5
    from dst_optax.finetuning.steps import TrainState, make_step

    model = t5.T5(t5.CONFIGS["t5_1_1_small"])
    seed = jax.jit(model.init)(jax.random.key(0))
    adamw = optax.adamw(optax.linear_schedule(1e-3, 1e-4, 1000))
    key = jax.random.key(1)
    draw = lambda turn: jax.random.randint(jax.random.fold_in(key, turn), (8, tokens), 1, 32000)  # noqa: E731
    turn = 0

    def batch() -> dict[str, jax.Array]:
        targets = draw(2 * turn + 1)
        shifted = jnp.roll(targets, 1, 1).at[:, 0].set(0)
        names = (
            "encoder_input_tokens",
            "decoder_input_tokens",
            "decoder_target_tokens",
            "decoder_loss_weights",
        )
        return dict(zip(names, (draw(2 * turn), shifted, targets, jnp.ones_like(targets)), strict=True))

    steps, state, compile_seconds, temp = {}, {}, {}, {}
    for name, method in {"adamw": Full(adamw), "adamw+dst": DST(adamw, fraction)}.items():
        tuned = jax.tree.map(jnp.copy, seed)
        state[name] = TrainState({}, tuned, method.init(seed, tuned))
        start = time.perf_counter()
        steps[name] = (
            jax.jit(make_step(model, method), donate_argnums=0).lower(state[name], batch(), key).compile()
        )
        compile_seconds[name] = time.perf_counter() - start
        temp[name] = int(steps[name].memory_analysis().temp_size_in_bytes)

    def step(name: str) -> Any:
        state[name], measured = steps[name](state[name], given, key)
        return measured

    def prepare(name: str) -> None:
        nonlocal turn, given
        turn += name == "adamw"
        given = jax.block_until_ready(batch())

    given = batch()
    for _ in range(3):  # past the first, cold steps
        for name in steps:
            prepare(name)
            jax.block_until_ready(step(name))
    # processor time: forward and backward take long, and other programs would be measured with them
    calls = {name: functools.partial(step, name) for name in steps}
    times = alternate(calls, runs, prepare, time.process_time)
    facts = dst_optax.diagnostics.metrics(state["adamw+dst"].slots)
    size = sum(x.size for x in jax.tree.leaves(seed))
    return {
        "part": "training-step",
        "model": f"T5 v1.1 small, 8 x {tokens} tokens, processor time",
        "parameters": size,
        "tensors": len(jax.tree.leaves(seed)),
        "fraction": fraction,
        "times": times,
        "x_adamw": {name: t["ms"] / times["adamw"]["ms"] for name, t in times.items()},
        "compile_seconds": compile_seconds,
        "temp_bytes_a_parameter": {name: (t - temp["adamw"]) / size for name, t in temp.items()},
        "passes": int(facts["passes"]),
        "free": int(facts["num_free"]),
        "budget": int(facts["budget"]),
        "skipped": {},
    }


# --- serving -------------------------------------------------------------------------------------


def serving_cells(models: list[str]) -> Iterator[dict[str, Any]]:
    """Random T5s of published shapes; see the experiment of this name."""
    from dst_optax.finetuning.experiments.serving_latency import serving_latency
    from dst_optax.finetuning.models import t5

    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            rows = serving_latency(directory, {model: t5.CONFIGS[f"t5_1_1_{model}"]})
        yield {"part": "serving", "model": model, "rows": rows, "skipped": {}}


# --- kernels -------------------------------------------------------------------------------------


def array_bytes(shape: str) -> int:
    """Bytes of the arrays that an HLO type names."""
    arrays = re.findall(r"(f|bf|s|u|pred)(\d*)\[([\d,]*)\]", shape)
    return sum(
        (int(bits or 8) // 8) * math.prod(int(n) for n in dims.split(",") if n) for _, bits, dims in arrays
    )


def kernel_bytes(hlo: str) -> dict[str, int]:
    """Bytes that each instruction reads and writes, by its name."""
    hlo = re.sub(r"/\*.*?\*/", "", hlo)
    instructions = re.findall(r"%([\w.-]+) = (\([^=]*?\)|\S+) [\w-]+\(([^)]*)\)", hlo)
    size = {name: array_bytes(shape) for name, shape, _ in instructions}
    return {
        name: size[name] + sum(size.get(x, 0) for x in re.findall(r"%([\w.-]+)", operands))
        for name, _, operands in instructions
    }


def kernels_cell(model: str, fraction: float) -> dict[str, Any]:
    """A profiled step; a kernel's time is that of the thread that started it."""
    title, shapes = shapes_of(model)
    params = random_tree(shapes, 0, 0.02)
    adamw = optax.adamw(optax.linear_schedule(1e-3, 1e-4, 1000))
    drift = random_tree(shapes, 1, 1e-3)
    trainee = Trainee(dst_optax.wrap(adamw, fraction), True, params, drift)
    for _ in range(5):
        trainee.prepare()
        jax.block_until_ready(trainee.step())
    trainee.prepare()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            seconds = timed(trainee.step)
        (file,) = pathlib.Path(directory).glob("**/*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        events = [(e.name, e.duration_ns) for p in planes for line in p.lines for e in line.events]
    moved = kernel_bytes(trainee.compiled.as_text())
    kinds: dict[str, dict[str, float]] = {}
    for name, ns in events:
        if name in moved and "fusion" in name:
            kind = kinds.setdefault(name.split(".")[0], {"runs": 0, "ms": 0.0, "bytes": 0})
            kind["runs"] += 1
            kind["ms"] += ns / 1e6
            kind["bytes"] += moved[name]
    return {
        "part": "kernels",
        "model": title,
        "parameters": sum(p.size for p in params.values()),
        "ms": 1e3 * seconds,
        "kinds": dict(sorted(kinds.items(), key=lambda x: -x[1]["ms"])),
        "skipped": {},
    }


def show(cell: dict[str, Any]) -> None:
    if cell["part"] == "serving":
        return  # printed row by row
    if cell["part"] == "kernels":
        print(f"{cell['model']}: one step of adamw+dst, {cell['ms']:.0f} ms while it is profiled")
        for name, kind in cell["kinds"].items():
            if kind["bytes"] > cell["parameters"] / 10:
                print(
                    f"  {name:<36} {kind['runs']:5d} runs {kind['ms']:8.1f} ms over all threads "
                    f"{kind['bytes'] / cell['parameters']:6.1f} B/parameter"
                )
    elif cell["part"] == "selection":
        times = "  ".join(
            f"{name} {t['ms']:.3g} ms (x{cell['x_warm'][name]:.3g})" for name, t in cell["times"].items()
        )
        print(
            f"n={cell['n']:<11,} fraction={cell['fraction']:<7} passes={cell['passes']}  {times}", flush=True
        )
    else:
        print(f"{cell['model']}: {cell['parameters']:,} parameters in {cell['tensors']} tensors")
        for name, t in cell["times"].items():
            memory = cell["temp_bytes_a_parameter"].get(name)
            compiled = cell["compile_seconds"].get(name)
            print(
                f"  {name:<15} {t['ms']:9.1f} ms  x{cell['x_adamw'][name]:<7.3f}"
                + (f" compile {compiled:5.1f} s" if compiled is not None else "")
                + (f"  temp +{memory:.2f} B/parameter" if memory is not None else "")
            )
        print(f"  passes of the slowest silo: {cell['passes']}; free {cell['free']:,} of {cell['budget']:,}")
    for name, why in cell["skipped"].items():
        print(f"  {name}: skipped, {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "part",
        nargs="?",
        choices=["all", "selection", "step", "training-step", "serving", "kernels"],
        default="all",
    )
    parser.add_argument("--out", default="benchmark.json", help="where the figures go")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each cell")
    parser.add_argument("--largest", type=float, default=1e8, help="largest n of the selection part")
    parser.add_argument(
        "--models", nargs="+", choices=["small", "base", "large", "smollm2"], default=["small", "base"]
    )
    parser.add_argument("--fraction", type=float, default=0.1, help="fraction of the step part")
    parser.add_argument("--skip-naive", action="store_true", help="leave out the naive step (22 s a run)")
    args = parser.parse_args()
    if args.part == "serving" and "smollm2" in args.models:
        parser.error("serving is of T5 v1.1: give --models small, base or large.")
    report: dict[str, Any] = {"environment": record.environment(), "cells": []}
    print(report["environment"], flush=True)
    cells: list[Iterator[dict[str, Any]]] = []
    if args.part in ("all", "selection"):
        cells.append(selection_cells(int(args.largest), args.runs))
    if args.part in ("all", "step"):
        cells.append(step_cell(m, args.fraction, args.runs, not args.skip_naive) for m in args.models)
    if args.part == "kernels":
        cells.append(kernels_cell(m, args.fraction) for m in args.models)
    if args.part == "training-step":
        cells.append(iter([training_step_cell(args.fraction, args.runs)]))
    if args.part == "serving":
        cells.append(serving_cells(args.models))
    for part in cells:
        for cell in part:
            show(cell)
            report["cells"].append(cell)
            record.write(report, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
