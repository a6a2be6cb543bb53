"""What it costs to serve many tuned models: swapping subsets against loading models and merging LoRA.

Times do not depend on what a model has learned: seed models and subsets are random here.

    <run_dir>/serving_latency.json    a row a model, way and fraction; resumed by row
    <run_dir>/serving_latency.md, serving_latency.png
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dst_optax import serving, subset
from dst_optax.finetuning import inputs, storage
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.methods.lora import LoRA
from dst_optax.finetuning.models.base import LanguageModel, flatten, unflatten
from dst_optax.finetuning.models.named import language_model
from dst_optax.paths import require_local

Row = dict[str, Any]
PERCENTILES = (50, 95, 99)


def serving_latency(
    run_dir: str,
    models: Mapping[str, Any],
    fractions: Sequence[float] = (0.1, 0.01, 0.001),
    *,
    requests: int = 20,
    input_length: int = 64,
    target_length: int = 4,
) -> list[Row]:
    """Measures loading, switching, and requests that each want another tuned model.

    Args:
      run_dir: where the results and scratch files go.
      models: by name, what :func:`~dst_optax.finetuning.models.named.language_model` takes.
      fractions: shares of free parameters.
      requests: timed ones of each kind.
      input_length: tokens of a request's one input.
      target_length: tokens that are decoded.

    Returns:
      Rows of ``model``, ``parameters``, the three settings, ``way``, ``fraction``, ``entries``, and
      milliseconds by percentile: ``load`` from files, ``switch``, and ``request`` (switch and decode). The
      ways are "subset", "lora" of as many parameters (merged into the seed anew), "full" (a checkpoint
      loaded for each request) and "none".

    Raises:
      ValueError: ``run_dir`` has rows of other models, fractions or settings.
    """
    root = require_local(run_dir, "run_dir")
    root.mkdir(parents=True, exist_ok=True)
    settings = {"requests": requests, "input_length": input_length, "target_length": target_length}
    ways = [("none", None), ("full", 1.0), *((way, f) for f in fractions for way in ("subset", "lora"))]
    language_models = {name: language_model(model) for name, model in models.items()}
    sizes = {
        name: sum(math.prod(shape) for shape in _shapes(model).values())
        for name, model in language_models.items()
    }
    cells = [
        {"model": name, "parameters": size, **settings, "way": way, "fraction": fraction}
        for name, size in sizes.items()
        for way, fraction in ways
    ]
    done = _measured(root / "serving_latency.json", cells)
    rows: list[Row] = []
    bench = None
    for cell in cells:
        name = cell["model"]
        row = next((r for r in done if cell.items() <= r.items()), None)
        if row is None:
            if bench is None or bench.name != name:
                bench = _Bench(name, root / "scratch" / name, language_models[name], **settings)
            row = {**cell, **bench.measure(cell["way"], cell["fraction"])}
        rows.append(row)
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
        later = [row for row in done if row not in rows]
        storage.write_text(root / "serving_latency.json", json.dumps(rows + later, indent=1))
    storage.write_text(root / "serving_latency.md", markdown(rows))
    figures.save(figures.latency(rows), root / "serving_latency.png")
    return rows


def _measured(file: Path, cells: Sequence[Row]) -> list[Row]:
    """Rows of an earlier command."""
    rows = json.loads(file.read_text()) if file.exists() else []
    for row in rows:
        if not any(cell.items() <= row.items() for cell in cells):
            kind = {k: v for k, v in row.items() if not isinstance(v, dict)}
            raise ValueError(f"{file} has the row {kind}, which is not asked for; give another run_dir.")
    return rows


def _shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in flatten(jax.eval_shape(model.init, jax.random.key(0))).items()}


class _NoEnd:
    """A vocabulary without an end mark: a decoder-only model decodes all of its tokens (T5 knows its own)."""

    eos_ids = (-1,)


class _Bench:
    """One model, and requests for it."""

    def __init__(
        self,
        name: str,
        scratch: Path,
        model: LanguageModel,
        requests: int,
        input_length: int,
        target_length: int,
    ):
        self.name = name
        self._scratch, self._requests = scratch, requests
        random = np.random.default_rng(0)
        self._seed = {
            path: random.standard_normal(shape, np.float32) * 0.05 for path, shape in _shapes(model).items()
        }
        self.size = sum(x.size for x in self._seed.values())
        self._random = random
        tokens = random.integers(2, model.config.vocab_size, input_length)
        lengths = {"inputs": input_length, "targets": target_length}
        batch = jax.device_put(inputs.batch_of(model, [(tokens.tolist(), [1])], lengths))
        decode = jax.jit(lambda params, batch: model.decode(params, batch, _NoEnd(), target_length))
        self._model = model
        self._decode = lambda params: decode(params, batch)
        jax.block_until_ready(self._decode(self._placed()))

    def _placed(self) -> Any:
        return jax.tree.map(jnp.array, unflatten(self._seed))

    def measure(self, way: str, fraction: float | None) -> Row:
        """``entries``, and milliseconds of what the way consists of."""
        if way == "none":
            return self._none()
        if way == "full":
            return self._full()
        assert fraction is not None
        return self._swap(fraction) if way == "subset" else self._merge(fraction)

    def _row(self, entries: int, **calls: Callable[[], Any]) -> Row:
        return {"entries": entries, **{name: self._time(call) for name, call in calls.items()}}

    def _time(self, call: Callable[[], Any]) -> dict[str, float]:
        jax.block_until_ready(call())
        spent = []
        for _ in range(self._requests):
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent.append(1e3 * (time.perf_counter() - start))
        return {f"p{p}": float(np.percentile(spent, p)) for p in PERCENTILES}

    def _none(self) -> Row:
        """Requests for one resident model."""
        params = self._placed()
        return self._row(0, request=lambda: self._decode(params))

    def _full(self) -> Row:
        """Requests that each load a whole checkpoint."""
        file = self._scratch / "model.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        like = unflatten(self._seed)
        storage.save_model(file, like)

        def load() -> Any:
            return jax.tree.map(jnp.asarray, storage.load_model(file, like))

        return self._row(self.size, load=load, request=lambda: self._decode(load()))

    def _swap(self, fraction: float) -> Row:
        """Requests that each activate another subset."""
        store = serving.SubsetStore(self._placed())
        entries, names = 0, ("a", "b")
        for name in names:
            random_subset = subset.Subset(
                {path: self._entries(x, fraction) for path, x in self._seed.items()}
            )
            random_subset.save(self._scratch / f"{name}_{fraction:g}")
            store.load(name, self._scratch / f"{name}_{fraction:g}")
            entries = random_subset.count

        def load() -> None:
            store.load("c", self._scratch / f"a_{fraction:g}")
            store.unload("c")

        def switch() -> Any:
            return store.activate("b" if store.active == "a" else "a")

        return self._row(entries, load=load, switch=switch, request=lambda: self._decode(switch()))

    def _entries(self, x: np.ndarray, fraction: float) -> subset.Entries:
        count = max(1, round(fraction * x.size))
        positions = np.unique(self._random.integers(0, x.size, count))
        return subset.Entries(x.shape, positions, self._random.standard_normal(len(positions), np.float32))

    def _merge(self, fraction: float) -> Row:
        """Requests that each merge another LoRA of as many parameters into the seed."""
        method = LoRA(optax.identity(), num_free_params=round(fraction * self.size))
        frozen, tuned = method.split(self._placed(), jax.random.key(0), self._model)
        file = self._scratch / f"lora_{fraction:g}.safetensors"
        storage.save_model(file, tuned)
        merge = jax.jit(method.merge)
        entries = sum(x.size for x in jax.tree.leaves(tuned))
        return self._row(
            entries,
            load=lambda: jax.tree.map(jnp.asarray, storage.load_model(file, tuned)),
            switch=lambda: merge(frozen, tuned),
            request=lambda: self._decode(merge(frozen, tuned)),
        )


def markdown(rows: Sequence[Row]) -> str:
    """A table of medians, with the 95th and 99th percentile of requests.

    Args:
      rows: of :func:`serving_latency`.

    Returns:
      Markdown.
    """
    lines = [
        "| model | way | free parameters | load, ms | switch, ms | switches/s | request, ms | p95 | p99 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        load, switch = (f"{row[x]['p50']:.3g}" if x in row else "" for x in ("load", "switch"))
        rate = f"{1e3 / row['switch']['p50']:.3g}" if "switch" in row else ""
        p50, p95, p99 = (f"{row['request'][f'p{p}']:.3g}" for p in PERCENTILES)
        head = f"| {row['model']} | {row['way']} | {row['entries']:,}"
        lines.append(f"{head} | {load} | {switch} | {rate} | {p50} | {p95} | {p99} |")
    return "\n".join(lines) + "\n"
