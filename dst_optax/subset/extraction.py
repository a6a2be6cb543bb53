"""Making subsets: from a training run, or from any two models of one shape."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax import distances, transform
from dst_optax.silos import FractionRules, LeafPlan, SiloPlan, Silos, make_plan
from dst_optax.subset import trees
from dst_optax.subset.core import Entries, Subset
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.fingerprint import fingerprints


def extract(
    params: Any,
    state: Any,
    *,
    seed: Any = None,
    with_seed_values: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Subset:
    """The subset that training with :func:`dst_optax.dynamic_subset_tuning` arrived at.

    Args:
      params: tuned parameters, any sharding; call :func:`dst_optax.finalize` first where the trainer
        applies updates with plain ``optax.apply_updates``.
      state: the optimizer state.
      seed: the seed model, needed only for tensors of which the state keeps no seed (fraction 1).
      with_seed_values: store the seed's values too, for :meth:`Subset.revert`.
      metadata: what the model card should tell.

    Returns:
      The subset; the same on every process.

    Raises:
      ValueError: the seed is not captured yet, or not known for a tensor.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> from dst_optax import subset
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> updates, state = tx.update({"w": jnp.array([1.0, -5.0, 0.1])}, tx.init(params), params)
      >>> params = dst_optax.apply_updates(params, updates, state)
      >>> found = subset.extract(params, state)
      >>> found["w"].positions.tolist(), found["w"].values.tolist()
      ([1], [2.5])
    """
    given = {} if seed is None else trees.named_leaves(seed, "the seed")
    tuned = trees.named_leaves(params, "the parameters")
    known = dict(transform.seed_leaves(params, state))
    seeds = {}
    for path in tuned:
        found = known.get(path)
        found = given.get(path) if found is None else found
        if found is None:
            raise SubsetError(
                f"the state keeps no seed of {path!r} (its fraction is 1, or it is masked); pass the "
                "seed model as seed=."
            )
        seeds[path] = found
    return _subset(seeds, tuned, _differences(seeds, tuned), with_seed_values, metadata)


def from_models(
    seed: Any,
    tuned: Any,
    fraction_of_free_params: float | FractionRules | None = None,
    *,
    num_free_params: int | None = None,
    silos: Silos | None = None,
    distance: distances.Distance = distances.absolute,
    with_seed_values: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Subset:
    """Turns any fine-tuned model into a subset of its seed.

    Args:
      seed: pytree of arrays.
      tuned: pytree of arrays with the same paths, shapes and dtypes.
      fraction_of_free_params: None for the exact difference; else of every silo the entries with the
        largest distances are kept, as many as :func:`dst_optax.dynamic_subset_tuning` would free.
      num_free_params: absolute budget instead of a fraction.
      silos: which entries compete, see :mod:`dst_optax.silos`.
      distance: see :mod:`dst_optax.distances`.
      with_seed_values: store the seed's values too, for :meth:`Subset.revert`.
      metadata: what the model card should tell.

    Returns:
      The subset; the same on every process.

    Raises:
      SubsetError: the models do not match.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> seed = {"w": np.zeros(5, np.float32)}
      >>> tuned = {"w": np.array([1, -3, 0, 2, 1], np.float32)}
      >>> subset.from_models(seed, tuned)["w"].positions.tolist()
      [0, 1, 3, 4]
      >>> subset.from_models(seed, tuned, 0.5)["w"].positions.tolist()
      [1, 3]
    """
    seeds, tuneds = trees.named_leaves(seed, "the seed"), trees.named_leaves(tuned, "the tuned model")
    parts = _differences(seeds, tuneds)
    if fraction_of_free_params is not None or num_free_params is not None:
        model = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in tuneds.items()}
        plan = make_plan(model, silos, fraction_of_free_params, num_free_params)
        parts = _largest(parts, plan, distance, _shared(tuneds))
    return _subset(seeds, tuneds, parts, with_seed_values, metadata)


class _Part(NamedTuple):
    """The entries of a tensor that differ, as far as this process reads it."""

    positions: np.ndarray  # (k,) int64
    values: np.ndarray  # (k,)
    before: np.ndarray  # (k,): the seed's values

    def take(self, index: Any) -> "_Part":
        return _Part(*(x[index] for x in self))


def _shared(model: dict[str, Any]) -> bool:
    """Whether the model spans processes, which then read a part each."""
    return any(trees.spans_processes(x) for x in model.values())


def _subset(
    seeds: dict[str, Any],
    tuned: dict[str, Any],
    parts: dict[str, _Part],
    with_seed_values: bool,
    metadata: dict[str, Any] | None,
) -> Subset:
    if _shared(tuned):
        parts = _exchange(parts)
    leaves = {}
    prints = fingerprints(seeds[path] for path in parts)
    for (path, part), fingerprint in zip(parts.items(), prints, strict=True):
        before = part.before if with_seed_values else None
        leaves[path] = Entries(tuple(tuned[path].shape), part.positions, part.values, before, fingerprint)
    return Subset(leaves, dict(metadata or {}))


def _differences(seeds: dict[str, Any], tuned: dict[str, Any]) -> dict[str, _Part]:
    _check_models(seeds, tuned)
    parts = {path: _local_difference(seeds[path], x) for path, x in tuned.items()}
    if _shared(tuned) and jax.process_index() > 0:  # arrays that do not span processes count once
        parts = {p: x if trees.spans_processes(tuned[p]) else x.take(slice(0)) for p, x in parts.items()}
    return parts


def _check_models(seeds: dict[str, Any], tuned: dict[str, Any]) -> None:
    for path in [*seeds, *tuned]:
        if path not in seeds or path not in tuned:
            owner = "tuned model" if path not in tuned else "seed"
            raise SubsetError(f"the {owner} lacks {path!r}.")
        a, b = seeds[path], tuned[path]
        if tuple(a.shape) != tuple(b.shape) or np.dtype(a.dtype) != np.dtype(b.dtype):
            raise SubsetError(
                f"{path!r} is {a.dtype}{list(a.shape)} in the seed, "
                f"{b.dtype}{list(b.shape)} in the tuned model."
            )


def _local_difference(seed: Any, tuned: Any) -> _Part:
    shape, nothing = tuple(tuned.shape), np.empty(0, np.dtype(tuned.dtype))
    found = [_Part(np.empty(0, np.int64), nothing, nothing)]
    for data, before, start in _boxes(seed, tuned):
        local = np.flatnonzero((trees.bits(data) != trees.bits(before)).reshape(-1))
        where = trees.to_whole(local, data.shape, start, shape)
        found.append(_Part(where, data.reshape(-1)[local], before.reshape(-1)[local]))
    return _merged(found)


def _boxes(seed: Any, tuned: Any) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, ...]]]:
    """The boxes of ``tuned`` that this process reads, the seed's entries there, and where they start."""
    if isinstance(tuned, jax.Array) and isinstance(seed, jax.Array):
        if not seed.sharding.is_equivalent_to(tuned.sharding, tuned.ndim):
            seed = jax.device_put(seed, tuned.sharding)
        for (data, start), (before, _) in zip(trees.boxes(tuned), trees.boxes(seed), strict=True):
            yield data, before, start
        return
    seed = np.asarray(seed)
    for data, start in trees.boxes(tuned):
        yield data, seed[tuple(slice(s, s + n) for s, n in zip(start, data.shape, strict=True))], start


def _merged(parts: Sequence[_Part]) -> _Part:
    """Parts of one tensor as one, sorted by position."""
    filled = [part for part in parts if len(part.positions)]
    if len(filled) < 2:
        return next(iter(filled), parts[0])
    whole = _Part(*(np.concatenate(x) for x in zip(*filled, strict=True)))
    return whole.take(np.argsort(whole.positions))


def _exchange(parts: dict[str, _Part]) -> dict[str, _Part]:
    """Every process's entries, on every process; one tensor at a time."""
    lengths = _gathered(np.array([len(part.positions) for part in parts.values()], np.uint32))
    whole = {}
    for (path, part), counts in zip(parts.items(), lengths.T.tolist(), strict=True):
        received = []
        for x in part if max(counts) else ():
            rows = np.zeros((max(counts), x.itemsize), np.uint8)
            rows[: len(x)] = x.view(np.uint8).reshape(-1, x.itemsize)
            received.append(
                [r[:n].reshape(-1).view(x.dtype) for r, n in zip(_gathered(rows), counts, strict=True)]
            )
        whole[path] = _merged([_Part(*x) for x in zip(*received, strict=True)] or [part])
    return whole


def _gathered(x: np.ndarray) -> np.ndarray:
    """What each process has, one after another."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x))


def _largest(
    parts: dict[str, _Part], plan: SiloPlan, distance: distances.Distance, shared: bool
) -> dict[str, _Part]:
    """Of every silo the entries whose distance exceeds that of the first one over the budget."""
    widest = _wide(*(part.values.dtype for part in parts.values()))
    keys = {path: _keys(x, distance, widest) for path, x in parts.items()}
    owners = {leaf.path: _owners(leaf, parts[leaf.path].positions) for leaf in plan.leaves}
    members: list[list[np.ndarray]] = [[] for _ in plan.sizes]
    for path, key in keys.items():
        for silo in np.unique(owners[path]).tolist():
            members[silo].append(key[owners[path] == silo])
    budgets, sizes = np.array(plan.budgets), np.array(plan.sizes)
    nothing, top = _ordered(np.empty(0, widest)), _ordered(np.full((), np.inf, widest))
    ordered = [np.sort(np.concatenate([nothing, *x])) for x in members]
    found = _thresholds(ordered, top, budgets, shared)
    found[budgets == sizes] = -1
    kept = {}
    for path, part in parts.items():
        silo = owners[path]
        odd = ~np.isfinite(part.values.astype(np.float32)) & (budgets[silo] > 0)  # passes outside the ranking
        kept[path] = part.take(np.flatnonzero((keys[path] > found[silo]) | odd))
    return kept


def _wide(*dtypes: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _keys(part: _Part, distance: distances.Distance, widest: np.dtype) -> np.ndarray:
    """Distances as integers of the same order; 0 where the tuned value is not finite."""
    wide = _wide(part.values.dtype)
    before, after = part.before.astype(wide), part.values.astype(wide)
    key = np.asarray(distance(jnp.asarray(before), jnp.asarray(after), jnp.asarray(before)))
    key = np.where(np.isfinite(after), np.where(np.isnan(key), np.inf, key), 0)
    return _ordered(key.astype(widest))


def _ordered(x: np.ndarray) -> np.ndarray:
    """Non-negative floats as integers of the same order."""
    return (x + x.dtype.type(0)).view(f"i{x.itemsize}")  # -0.0 + 0.0 is 0.0


def _owners(leaf: LeafPlan, positions: np.ndarray) -> np.ndarray:
    """The silo of each entry."""
    if leaf.axis is None:
        return np.full(len(positions), leaf.silos[0])
    inner = math.prod(leaf.shape[leaf.axis + 1 :])
    return np.array(leaf.silos)[positions // inner % leaf.shape[leaf.axis]]


def _thresholds(
    members: Sequence[np.ndarray], top: np.ndarray, budgets: np.ndarray, shared: bool
) -> np.ndarray:
    """The smallest key of each silo that no more entries exceed than its budget, found by bisection.

    Args:
      members: keys of each silo, sorted, none negative; this process's where ``shared``.
      top: no key is larger.
      budgets: (silos,) int64.
      shared: whether to count over all processes.
    """
    low, high = np.full(len(members), -1, top.dtype), np.full(len(members), top)
    while (high - low > 1).any():
        middle = low + (high - low) // 2
        above = np.array(
            [len(x) - np.searchsorted(x, t, "right") for x, t in zip(members, middle, strict=True)]
        )
        if shared:
            above = _gathered(above.astype(np.uint32)).sum(0, dtype=np.int64)
        low, high = np.where(above <= budgets, low, middle), np.where(above <= budgets, middle, high)
    return high
