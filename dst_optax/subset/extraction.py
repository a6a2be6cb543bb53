"""Making subsets: from a training run, or from any two models of one shape."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax import distances, silos, transform
from dst_optax.subset import scatter, trees
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
    return _difference(seeds, tuned, with_seed_values, metadata)


def from_models(
    seed: Any,
    tuned: Any,
    fraction_of_free_params: float | silos.FractionRules | None = None,
    *,
    num_free_params: int | None = None,
    silos: silos.Silos | None = None,
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
      SubsetError: the models do not match, or an array spans processes and a fraction is given.

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
    if fraction_of_free_params is None and num_free_params is None:
        return _difference(seeds, tuneds, with_seed_values, metadata)
    for path, x in [*seeds.items(), *tuneds.items()]:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise SubsetError(f"{path!r} spans processes; a fraction needs arrays that this process holds.")
    full = _difference(seeds, tuneds, True, metadata)
    kept = _largest(full, fraction_of_free_params, num_free_params, silos, distance)
    if with_seed_values:
        return kept
    leaves = {p: Entries(e.shape, e.positions, e.values, None, e.seed_fingerprint) for p, e in kept.items()}
    return Subset(leaves, kept.metadata)


def _difference(
    seeds: dict[str, Any], tuned: dict[str, Any], with_seed_values: bool, metadata: dict[str, Any] | None
) -> Subset:
    _check_models(seeds, tuned)
    prints = fingerprints(seeds.values())
    parts = {path: _local_difference(seeds[path], x) for path, x in tuned.items()}
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in tuned.values()):
        parts = _exchange(parts)
    leaves = {}
    for (path, (positions, values, before)), fingerprint in zip(parts.items(), prints, strict=True):
        shape = tuple(tuned[path].shape)
        leaves[path] = Entries(shape, positions, values, before if with_seed_values else None, fingerprint)
    return Subset(leaves, dict(metadata or {}))


def _check_models(seeds: dict[str, Any], tuned: dict[str, Any]) -> None:
    for path in [*seeds, *tuned]:
        if path not in seeds or path not in tuned:
            owner = "tuned model" if path not in tuned else "seed"
            raise SubsetError(f"the {owner} lacks {path!r}.")
        a, b = seeds[path], tuned[path]
        if tuple(a.shape) != tuple(b.shape) or scatter.dtype_of(a) != scatter.dtype_of(b):
            raise SubsetError(
                f"{path!r} is {a.dtype}{list(a.shape)} in the seed, "
                f"{b.dtype}{list(b.shape)} in the tuned model."
            )


_Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions, tuned values, seed values


def _local_difference(seed: Any, tuned: Any) -> _Part:
    """Differing entries of the boxes that this process reads."""
    shape = tuple(tuned.shape)
    found: list[_Part] = []
    for (data, start), before in zip(trees.boxes(tuned), _like_boxes(seed, tuned), strict=True):
        local = np.flatnonzero((trees.bits(data) != trees.bits(before)).reshape(-1))
        where = trees.to_whole(local, data.shape, start, shape)
        found.append((where, data.reshape(-1)[local], before.reshape(-1)[local]))
    if len(found) == 1:
        return found[0]
    nothing = np.empty(0, scatter.dtype_of(tuned))
    return _sorted(found or [(np.empty(0, np.int64), nothing, nothing)])


def _like_boxes(seed: Any, tuned: Any) -> Iterable[np.ndarray]:
    """The seed's entries in the boxes of ``tuned``."""
    if isinstance(tuned, jax.Array) and isinstance(seed, jax.Array):
        if not seed.sharding.is_equivalent_to(tuned.sharding, tuned.ndim):
            seed = jax.device_put(seed, tuned.sharding)
        return (data for data, _ in trees.boxes(seed))
    seed = np.asarray(seed)
    return (
        seed[tuple(slice(s, s + n) for s, n in zip(start, data.shape, strict=True))]
        for data, start in trees.boxes(tuned)
    )


def _sorted(parts: list[_Part]) -> _Part:
    positions, values, before = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(positions)
    return positions[order], values[order], before[order]


def _exchange(parts: dict[str, _Part]) -> dict[str, _Part]:
    """Every process's entries, on every process."""
    from jax.experimental import multihost_utils

    blob = b"".join(a.tobytes() for part in parts.values() for a in part)
    counts = np.array([len(part[0]) for part in parts.values()], np.uint32)
    all_counts = np.asarray(multihost_utils.process_allgather(counts)).astype(np.int64)
    lengths = [
        sum(int(n) * (8 + 2 * part[1].itemsize) for n, part in zip(row, parts.values(), strict=True))
        for row in all_counts
    ]
    filled = np.zeros(max(lengths), np.uint8)
    filled[: len(blob)] = np.frombuffer(blob, np.uint8)
    blobs = np.asarray(multihost_utils.process_allgather(filled))
    found: dict[str, list[_Part]] = {path: [] for path in parts}
    for row, received in zip(all_counts, blobs, strict=True):
        at, memory = 0, received.tobytes()
        for count, (path, part) in zip(row.tolist(), parts.items(), strict=True):
            arrays = []
            for dtype in (np.dtype(np.int64), part[1].dtype, part[1].dtype):
                arrays.append(np.frombuffer(memory, dtype, count, at))
                at += count * dtype.itemsize
            found[path].append((arrays[0], arrays[1], arrays[2]))
    return {path: _sorted(p) for path, p in found.items()}


def _largest(
    full: Subset,
    fraction: float | silos.FractionRules | None,
    num_free_params: int | None,
    rule: silos.Silos | None,
    distance: distances.Distance,
) -> Subset:
    """Of every silo the entries whose distance exceeds that of the first one over the budget."""
    model = {path: jax.ShapeDtypeStruct(e.shape, e.dtype) for path, e in full.items()}
    plan = silos.make_plan(model, rule, fraction, num_free_params)
    assert plan.budgets is not None
    keys = {path: _keys(e, distance) for path, e in full.items()}
    owners = {leaf.path: _owners(leaf, full[leaf.path]) for leaf in plan.leaves}
    members: list[list[np.ndarray]] = [[] for _ in plan.sizes]
    for path, key in keys.items():
        for silo in np.unique(owners[path]).tolist():
            members[silo].append(key[np.broadcast_to(owners[path] == silo, key.shape)])
    thresholds = np.array([_threshold(*x) for x in zip(members, plan.sizes, plan.budgets, strict=True)])
    leaves = {}
    for path, e in full.items():
        t = thresholds[owners[path]]
        odd = ~np.isfinite(e.values.astype(np.float32)) & np.isfinite(t)  # passes outside the ranking
        leaves[path] = e.take(np.flatnonzero((keys[path] > t) | odd))
    return Subset(leaves, full.metadata)


def _keys(e: Entries, distance: distances.Distance) -> np.ndarray:
    """Distances, widened; 0 where the tuned value is not finite."""
    assert e.seed_values is not None
    wide = np.float64 if e.dtype == np.float64 else np.float32
    before, after = e.seed_values.astype(wide), e.values.astype(wide)
    key = np.asarray(distance(jnp.asarray(before), jnp.asarray(after), jnp.asarray(before)))
    return np.where(np.isfinite(after), np.where(np.isnan(key), np.inf, key), 0)


def _owners(leaf: silos.LeafPlan, e: Entries) -> Any:
    """The silo of each entry, or one silo for all."""
    if leaf.axis is None:
        return np.int64(leaf.silos[0])
    inner = int(np.prod(e.shape[leaf.axis + 1 :]))
    return np.asarray(leaf.silos)[e.positions // inner % e.shape[leaf.axis]]


def _threshold(parts: list[np.ndarray], size: int, budget: int) -> float:
    if budget == size:
        return -np.inf
    if budget == 0:
        return np.inf
    key = np.concatenate(parts) if parts else np.empty(0)
    if len(key) <= budget:
        return 0.0
    return float(np.partition(key, len(key) - budget - 1)[len(key) - budget - 1])
