"""Benchmark of subset files and swapping: position coding, fingerprints, loading, activation.

Run with ``python scripts/benchmark_subset.py [--small] [--out FILE]``; prints JSON. Times are medians; the
model has the shapes of T5-base. Single-core rates are entries per second of CPU time.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import record
import safetensors
import safetensors.numpy

from dst_optax import serving, subset
from dst_optax.subset import gaps

SHAPES = (
    {"shared/embedding": (32128, 768)}
    | {f"{side}/{i}/mlp/wi": (768, 3072) for side in ("encoder", "decoder") for i in range(12)}
    | {f"{side}/{i}/mlp/wo": (3072, 768) for side in ("encoder", "decoder") for i in range(12)}
    | {f"encoder/{i}/attention/{k}": (768, 768) for k in "qkvo" for i in range(12)}
    | {f"decoder/{i}/{a}/{k}": (768, 768) for a in ("self", "cross") for k in "qkvo" for i in range(12)}
    | {f"norms/{i}/scale": (768,) for i in range(62)}
)


def median(f: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of ``f``; its result must be ready when it returns."""
    f()
    times = []
    for _ in range(repeats):
        start = clock()
        f()
        times.append(clock() - start)
    return statistics.median(times)


def coding(count: int) -> list[dict[str, float]]:
    """Bits per position and rates, for random positions and for clustered ones."""
    rng = np.random.default_rng(0)
    rows = []
    for share in (0.1, 0.01, 1e-3, 1e-4):
        positions = np.cumsum(rng.geometric(share, count)) - 1
        entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) / share
        size = int(positions[-1]) + 1
        positions = positions.astype(gaps.position_dtype(size))
        stream = gaps.encode(positions)
        bits = 8 * len(stream) / count
        row = {"share": share, "bits": bits, "entropy": entropy, "ratio": bits / entropy}
        row["encode_per_s"] = count / median(lambda p=positions: gaps.encode(p), 9, time.process_time)
        decode = lambda s=stream, n=size: gaps.decode(s, count, n)  # noqa: E731
        row["decode_per_s"] = count / median(decode, 9, time.process_time)
        width = 768  # the same share in one row out of ten, evenly filled
        inner = np.sort(rng.choice(width, max(1, min(width, round(10 * share * width))), replace=False))
        clustered = (np.arange(count // len(inner))[:, None] * 10 * width + inner).reshape(-1)
        row["bits_clustered_in_rows"] = 8 * len(gaps.encode(clustered)) / len(clustered)
        rows.append(row)
    return rows


def swapping(shapes: dict[str, tuple[int, ...]], share: float, directory: pathlib.Path) -> dict[str, Any]:
    """Loading and activating a subset, against reading the whole model."""
    rng = np.random.default_rng(0)
    seed = {p: rng.standard_normal(s, np.float32) for p, s in shapes.items()}
    names = ("a", "b")
    for name in names:
        leaves = {}
        for path, x in seed.items():
            count = max(1, int(share * x.size))
            where = np.sort(rng.choice(x.size, count, replace=False))
            leaves[path] = subset.Entries(x.shape, where, rng.standard_normal(count, np.float32))
        prints = dict(zip(seed, subset.fingerprints(seed.values()), strict=True))
        leaves = {
            p: subset.Entries(e.shape, e.positions, e.values, None, prints[p]) for p, e in leaves.items()
        }
        subset.Subset(leaves).save(directory / name)
    full = directory / "model.safetensors"
    safetensors.numpy.save_file(seed, full)
    out: dict[str, Any] = {"parameters": sum(x.size for x in seed.values()), "share": share}
    out["entries"] = sum(len(e) for e in leaves.values())
    out["file_bytes"] = (directory / "a" / "subset.safetensors").stat().st_size

    def read_full() -> None:
        with safetensors.safe_open(full, "np") as f:
            jax.block_until_ready([jnp.array(f.get_tensor(n)) for n in f.keys()])  # noqa: SIM118

    store = serving.SubsetStore({p: jnp.array(x) for p, x in seed.items()})
    out["fingerprint_bytes_per_s"] = sum(x.nbytes for x in seed.values()) / median(
        lambda: list(subset.fingerprints(seed.values())), 3
    )
    out["fingerprint_device_bytes_per_s"] = sum(x.nbytes for x in seed.values()) / median(
        lambda: list(subset.fingerprints(store.params.values())), 3
    )

    def load() -> None:
        store.load("new", directory / "a")
        jax.block_until_ready(store._loaded["new"].pieces)
        store.unload("new")

    for name in names:
        store.load(name, directory / name)

    def activate() -> None:
        jax.block_until_ready(store.activate("a"))

    def switch() -> None:
        jax.block_until_ready(store.activate("b"))

    def bare() -> Callable[[], None]:
        x = [jnp.array(v) for v in seed.values()]
        where = [jnp.asarray(e.positions) for e in leaves.values()]
        values = [jnp.asarray(e.values) for e in leaves.values()]

        @lambda f: jax.jit(f, donate_argnums=0)
        def write(x: Any, where: Any, values: Any) -> Any:
            return [
                a.reshape(-1).at[i].set(v, indices_are_sorted=True, unique_indices=True).reshape(a.shape)
                for a, i, v in zip(x, where, values, strict=True)
            ]

        def run() -> None:
            nonlocal x
            x = jax.block_until_ready(write(x, where, values))

        return run

    steps = {"read_full": read_full, "load": load, "activate": activate, "switch": switch, "scatter": bare()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(10):  # interleaved, so that all see the same machine
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        jax.block_until_ready(store.deactivate())
    for i, clock in enumerate(("seconds", "cpu_seconds")):
        middle = {k: statistics.median(x[i] for x in v[1:]) for k, v in times.items()}
        out[clock] = middle
        out[f"load_over_read_{clock}"] = middle["load"] / middle["read_full"]
        out[f"activate_over_read_{clock}"] = middle["activate"] / middle["read_full"]
        out[f"activate_over_scatter_{clock}"] = middle["activate"] / middle["scatter"]
    entries = out["entries"]
    out["resident_over_values_and_positions"] = store.list()[0].nbytes / (entries * 8)
    return out


def cycles(count: int) -> dict[str, Any]:
    """A -> B -> A -> seed, many times, on a small model."""
    rng = np.random.default_rng(1)
    seed = {f"w{i}": rng.standard_normal((64, 96), np.float32) for i in range(4)}
    tuned = [{p: np.where(rng.random(x.shape) < 0.05, x * 2, x) for p, x in seed.items()} for _ in range(2)]
    store = serving.SubsetStore({p: jnp.array(x) for p, x in seed.items()})
    for name, t in zip("ab", tuned, strict=True):
        store.add(name, subset.from_models(seed, t))
    exact = 0
    for _ in range(count):
        steps = [(store.activate(n), t) for n, t in (("a", 0), ("b", 1), ("a", 0))][-1:]
        ok = all((np.asarray(params[p]) == tuned[t][p]).all() for params, t in steps for p in seed)
        back = store.deactivate()
        exact += ok and all(np.asarray(back[p]).tobytes() == seed[p].tobytes() for p in seed)
    return {"cycles": count, "bit_exact": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small model, for a quick look")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON here too")
    arguments = parser.parse_args()
    shapes = dict(list(SHAPES.items())[1:20]) if arguments.small else SHAPES
    report: dict[str, Any] = {
        "environment": record.environment(),
        "coding": coding(200_000 if arguments.small else 2_000_000),
        "cycles": cycles(1000),
    }
    with tempfile.TemporaryDirectory() as directory:
        report["swapping"] = swapping(shapes, 0.01, pathlib.Path(directory))
    print(json.dumps(report, indent=1))
    if arguments.out:
        record.write(report, arguments.out)


if __name__ == "__main__":
    main()
