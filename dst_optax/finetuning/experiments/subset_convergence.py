"""How a subset settles: churn, overlap with itself later and with other runs, and where it lies.

Needs runs with snapshots (``trainer.Recipe.snapshot_every``):

    <run_dir>/rng_*/snapshots/<step>/subset    read
    <run_dir>/rng_*/metrics.jsonl              read
    <run_dir>/subset_convergence.json          the numbers
    <run_dir>/subset_convergence.png           curves
    <run_dir>/subset_places.png                layer x module at some steps
"""

import json
import math
import re
from collections.abc import Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dst_optax import subset
from dst_optax.finetuning import storage
from dst_optax.finetuning.experiments import figures
from dst_optax.paths import require_local

LOGGED = ("churn", "free_params", "threshold_min", "threshold_median", "threshold_max")
_TENSOR = r"(?P<tensor>(?P<module>.*?)(/kernel|/scale)?)$"
_LAYER = re.compile(r"^(?:(?P<stack>encoder|decoder)/)?layers_(?P<layer>\d+)/" + _TENSOR)
_STACKED = re.compile(r"^(?:(?P<stack>encoder|decoder)/(?P=stack)|layers)/" + _TENSOR)


def subset_convergence(run_dir: str, *, panels: int = 4) -> dict[str, Any]:
    """Measures how the subsets of a method's runs settle.

    Args:
      run_dir: of one method: it holds ``rng_<n>``, one for each random seed.
      panels: steps that the map of places shows.

    Returns:
      ``rng`` with, for each random seed, ``logged`` series of step and value, ``overlap_final`` and
      ``overlap_previous``, by step; ``overlap_seeds`` by step, the mean over pairs of seeds; ``places``, by
      step, the share of free entries of each layer and module of the first seed; ``share``, of the last
      subset's entries, by kind of tensor. Overlaps are Jaccard indices.

    Raises:
      ValueError: there are no snapshots.
    """
    root = require_local(run_dir, "run_dir")
    runs = {path.parent.name: _snapshots(path) for path in sorted(root.glob("rng_*/snapshots"))}
    if not runs or not all(runs.values()):
        raise ValueError(f"{root} has no rng_*/snapshots; train with Recipe.snapshot_every.")
    first = next(iter(runs.values()))
    common = sorted(set.intersection(*(set(run) for run in runs.values())))
    pairs = list(combinations(runs.values(), 2))
    results = {
        "rng": {name: _curves(root / name, run) for name, run in runs.items()},
        "overlap_seeds": {
            step: float(np.mean([a[step].jaccard(b[step]) for a, b in pairs])) for step in common if pairs
        },
        "places": {step: places(taken) for step, taken in first.items()},
        "share": share_by_kind(first[max(first)]),
    }
    storage.write_text(root / "subset_convergence.json", json.dumps(results, indent=1))
    figures.save(figures.convergence(results), root / "subset_convergence.png")
    steps = sorted(first)
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, panels).round().astype(int))]
    figures.save(figures.places({s: results["places"][s] for s in shown}), root / "subset_places.png")
    return results


def _snapshots(directory: Path) -> dict[int, subset.Subset]:
    whole = sorted(p for p in directory.iterdir() if p.name.isdigit())  # a killed run leaves others
    return {int(p.name): subset.Subset.load(p / "subset") for p in whole}


def _curves(run: Path, taken: Mapping[int, subset.Subset]) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = taken[max(taken)]
    return {
        "logged": {
            name: [(line["step"], line[name]) for line in lines if name in line]
            for name in LOGGED
            if any(name in line for line in lines)
        },
        "overlap_final": {step: snapshot.jaccard(last) for step, snapshot in taken.items()},
        "overlap_previous": {b: taken[a].jaccard(taken[b]) for a, b in pairwise(sorted(taken))},
    }


def places(taken: subset.Subset) -> dict[str, dict[str, float]]:
    """The share of free entries of every module of every layer.

    Args:
      taken: a subset of a T5 or decoder, its layers stacked or not.

    Returns:
      Module, e.g. "attention/query", to layer, e.g. "encoder 0" or "layer 0", to the share of its entries.
    """
    out: dict[str, dict[str, float]] = {}
    for path, entries in taken.items():
        if match := _LAYER.match(path):
            shares = {match["layer"]: len(entries) / entries.size}
        elif match := _STACKED.match(path):
            _, layers, *rest = entries.shape
            counts = np.bincount(entries.positions // math.prod(rest) % layers, minlength=layers)
            shares = dict(enumerate((counts * layers / entries.size).tolist()))
        else:
            continue
        stack = match["stack"] or "layer"
        out.setdefault(match["module"], {}).update({f"{stack} {i}": share for i, share in shares.items()})
    return out


def share_by_kind(taken: subset.Subset) -> dict[str, float]:
    """The share of a subset's entries that lies in each kind of tensor; layers are drawn together."""
    counts: dict[str, int] = {}
    for path, entries in taken.items():
        match = _LAYER.match(path) or _STACKED.match(path)
        kind = "/".join(filter(None, (match["stack"], match["tensor"]))) if match else path
        counts[kind] = counts.get(kind, 0) + len(entries)
    return {kind: count / max(taken.count, 1) for kind, count in counts.items()}
