"""A tuned model's way from one version to the next: what a trainer sends to a server between steps.

A version is a subset of the first seed. The step from one version to the next is a subset, too, whose seed is
the version before; its fingerprints are computed from the entries alone, so neither end reads a whole model.
"""

from typing import Any

import numpy as np

from dst_optax.subset import trees
from dst_optax.subset.core import Subset
from dst_optax.subset.entries import Entries
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.fingerprint import changed


def between(before: Subset, after: Subset) -> Subset:
    """What changed from one version to the next.

    Args:
      before: a version, with seed values.
      after: a later version of the same seed, with seed values.

    Returns:
      The subset that makes the one model of the other, with its seed's values: those of ``before``.

    Raises:
      SubsetError: the seeds differ, or seed values are missing.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> from dst_optax.subset import versions
      >>> seed = {"w": np.zeros(4, np.float32)}
      >>> first, second = {"w": np.float32([1, 2, 0, 0])}, {"w": np.float32([1, 0, 3, 0])}
      >>> a, b = (subset.from_models(seed, x, with_seed_values=True) for x in (first, second))
      >>> step = versions.between(a, b)
      >>> step["w"].positions.tolist(), step["w"].values.tolist()
      ([1, 2], [0.0, 3.0])
      >>> step.apply(first)["w"].tolist()
      [1.0, 0.0, 3.0, 0.0]
    """
    _check_pair(before, after)
    return Subset({path: _step(e, after[path]) for path, e in before.items()}, dict(after.metadata))


def then(before: Subset, step: Subset) -> Subset:
    """The version that a step leads to: the inverse of :func:`between`.

    Args:
      before: a version, with seed values.
      step: what changed since it.

    Returns:
      The next version, for the same seed.

    Raises:
      SubsetError: the step begins at another version, or seed values are missing.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> from dst_optax.subset import versions
      >>> seed = {"w": np.zeros(4, np.float32)}
      >>> first, second = {"w": np.float32([1, 2, 0, 0])}, {"w": np.float32([1, 0, 3, 0])}
      >>> a, b = (subset.from_models(seed, x, with_seed_values=True) for x in (first, second))
      >>> versions.then(a, versions.between(a, b)).apply(seed)["w"].tolist()
      [1.0, 0.0, 3.0, 0.0]
    """
    for path, e in step.items():
        if path not in before or before[path].shape != e.shape or before[path].dtype != e.dtype:
            raise SubsetError(f"the step is of another model: see {path!r}.")
        end, start = tuned_fingerprint(before[path]), e.seed_fingerprint
        if None not in (end, start) and end != start:
            raise SubsetError(
                f"{path!r}: the step begins at the fingerprint {start}, this version ends at {end}; "
                "a version between them is missing."
            )
    _check_pair(before, step)
    return Subset({path: _next(e, step[path]) for path, e in before.items()}, dict(step.metadata))


def tuned_fingerprint(e: Entries) -> str | None:
    """The fingerprint of the tuned tensor, at a cost that depends on the number of entries.

    Args:
      e: entries with seed values.

    Returns:
      32 hexadecimal digits; None where the seed's values or fingerprint are not known.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> from dst_optax.subset import versions
      >>> seed, tuned = np.zeros(4, np.float32), np.array([0, 7, 0, 0], np.float32)
      >>> extracted = subset.from_models({"w": seed}, {"w": tuned}, with_seed_values=True)
      >>> versions.tuned_fingerprint(extracted["w"]) == subset.fingerprint(tuned)
      True
    """
    if e.seed_fingerprint is None or e.seed_values is None:
        return None
    return changed(e.seed_fingerprint, e.positions, e.seed_values, e.values)


def _check_pair(before: Subset, after: Subset) -> None:
    after.check_structure({path: (e.shape, e.dtype) for path, e in before.items()})
    if not (before.has_seed_values and after.has_seed_values):
        raise SubsetError("versions need seed values; extract them with with_seed_values=True.")


def _step(a: Entries, b: Entries) -> Entries:
    if None not in (a.seed_fingerprint, b.seed_fingerprint) and a.seed_fingerprint != b.seed_fingerprint:
        raise SubsetError(
            f"the versions are of different seeds, {a.seed_fingerprint} and {b.seed_fingerprint}."
        )
    positions = np.union1d(a.positions, b.positions)
    seeds = _overlaid(positions, np.zeros(len(positions), a.dtype), a.seed_values, a, b.seed_values, b)
    old, new = _overlaid(positions, seeds, a.values, a), _overlaid(positions, seeds, b.values, b)
    differs = np.flatnonzero(trees.bits(old) != trees.bits(new))
    return Entries(a.shape, positions[differs], new[differs], old[differs], tuned_fingerprint(a))


def _next(a: Entries, step: Entries) -> Entries:
    positions = np.union1d(a.positions, step.positions)
    zeros = np.zeros(len(positions), a.dtype)
    seeds = _overlaid(positions, zeros, step.seed_values, step, a.seed_values, a)
    new = _overlaid(positions, zeros, a.values, a, step.values, step)
    differs = np.flatnonzero(trees.bits(seeds) != trees.bits(new))
    return Entries(a.shape, positions[differs], new[differs], seeds[differs], a.seed_fingerprint)


def _overlaid(positions: np.ndarray, below: np.ndarray, *layers: Any) -> np.ndarray:
    """``below`` with values written where entries have their positions; pairs of values and entries."""
    out = below.copy()
    for values, e in zip(layers[::2], layers[1::2], strict=True):
        out[np.searchsorted(positions, e.positions)] = values
    return out
