"""Making subsets: from a training run, or from any two models of one shape."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax import distances
from dst_optax.project import project
from dst_optax.rule import SubsetRule
from dst_optax.silos import SiloPlan, Silos, groups_that_share_silos, make_plan
from dst_optax.state import Free, leaf_states, seed_leaves
from dst_optax.subset import trees
from dst_optax.subset.core import Subset
from dst_optax.subset.dtypes import checked, is_float
from dst_optax.subset.entries import Entries
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.fingerprint import fingerprints
from dst_optax.tree import is_masked


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
      SubsetError: entries differ from the seed that the optimizer did not allow to.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> from dst_optax import subset
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> updates, state = tx.update({"w": jnp.array([1.0, -5.0, 0.1])}, tx.init(params), params)
      >>> params = dst_optax.apply_updates(params, updates, state)
      >>> extracted = subset.extract(params, state)
      >>> extracted["w"].positions.tolist(), extracted["w"].values.tolist()
      ([1], [2.5])
    """
    given = {} if seed is None else trees.named_leaves(seed, "the seed")
    tuned = trees.named_leaves(params, "the parameters")
    kept = dict(seed_leaves(params, state))
    seeds = {}
    for path in tuned:
        leaf = kept.get(path)
        leaf = given.get(path) if leaf is None else leaf
        if leaf is None:
            raise SubsetError(
                f"the state keeps no seed of {path!r} (its fraction is 1, or it is masked); pass the "
                "seed model as seed=."
            )
        seeds[path] = leaf
    parts = _differences(seeds, tuned)
    _check_allowed(parts, tuned, state)
    return _subset(seeds, tuned, parts, with_seed_values, metadata)


def from_models(
    seed: Any,
    tuned: Any,
    fraction_of_free_params: Any = None,
    *,
    num_free_params: int | None = None,
    silos: Silos | None = None,
    distance: distances.Distance | None = None,
    with_seed_values: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Subset:
    """Turns any fine-tuned model into a subset of its seed.

    Args:
      seed: pytree of arrays.
      tuned: pytree of arrays with the same paths, shapes and dtypes.
      fraction_of_free_params: None for the exact difference; else of every silo the entries with the
        largest distances are kept, as many as :func:`dst_optax.dynamic_subset_tuning` would free. Of
        tensors that are not floating-point all entries that differ are kept.
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
    _check_models(seeds, tuneds)
    plan = None
    if fraction_of_free_params is not None or num_free_params is not None:
        floats = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in tuneds.items() if is_float(x.dtype)
        }
        rule = SubsetRule(fraction_of_free_params, num_free_params, silos, distance)
        if rule.at_run_time:
            raise SubsetError(
                f"fraction_of_free_params: got {fraction_of_free_params!r}; a model that is tuned already "
                "is at no step, so give a number."
            )
        plan = make_plan(floats, rule.silos, rule.fraction, rule.num_free_params)
    parts = _differences(seeds, tuneds, plan, distance)
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


def _differences(
    seeds: dict[str, Any],
    tuned: dict[str, Any],
    plan: SiloPlan | None = None,
    distance: distances.Distance | None = None,
) -> dict[str, _Part]:
    """The entries that differ; of the tensors of a plan, as many as their silos may free."""
    _check_models(seeds, tuned)
    parts = {} if plan is None else _within_budget(seeds, tuned, plan, distance)
    parts = {path: parts.get(path) or _local_difference(seeds[path], x) for path, x in tuned.items()}
    if _shared(tuned) and jax.process_index() > 0:  # arrays that do not span processes count once
        parts = {p: x if trees.spans_processes(tuned[p]) else x.take(slice(0)) for p, x in parts.items()}
    return parts


def _check_models(seeds: dict[str, Any], tuned: dict[str, Any]) -> None:
    for path in [*seeds, *tuned]:
        if path not in seeds or path not in tuned:
            owner = "tuned model" if path not in tuned else "seed"
            raise SubsetError(f"the {owner} lacks {path!r}.")
        a, b = seeds[path], tuned[path]
        checked(b.dtype, path)
        if tuple(a.shape) != tuple(b.shape) or np.dtype(a.dtype) != np.dtype(b.dtype):
            raise SubsetError(
                f"{path!r} is {a.dtype}{list(a.shape)} in the seed, "
                f"{b.dtype}{list(b.shape)} in the tuned model."
            )


def _local_difference(seed: Any, tuned: Any, mask: Any = None) -> _Part:
    shape, nothing = tuple(tuned.shape), np.empty(0, np.dtype(tuned.dtype))
    parts = [_Part(np.empty(0, np.int64), nothing, nothing)]
    masks = itertools.repeat(None) if mask is None else (x for _, x, _ in _boxes(mask, tuned))
    for (data, before, start), inside in zip(_boxes(seed, tuned), masks, strict=False):
        differs = trees.bits(data) != trees.bits(before)
        local = np.flatnonzero((differs if inside is None else differs & inside).reshape(-1))
        where = trees.to_whole(local, data.shape, start, shape)
        parts.append(_Part(where, data.reshape(-1)[local], before.reshape(-1)[local]))
    return _merged(parts)


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


def _within_budget(
    seeds: dict[str, Any], tuned: dict[str, Any], plan: SiloPlan, distance: distances.Distance | None
) -> dict[str, _Part]:
    """The farthest entries of each silo; one group of tensors that share silos is in memory at a time."""
    parts = {}
    with _x64(any(leaf.dtype == "float64" for leaf in plan.leaves)):
        for group in groups_that_share_silos(plan.leaves):
            paths = [plan.leaves[i].path for i in group]
            parts |= _group_within_budget(seeds, tuned, paths, plan.part(group), distance)
    return parts


def _group_within_budget(
    seeds: dict[str, Any],
    tuned: dict[str, Any],
    paths: list[str],
    plan: SiloPlan,
    distance: distances.Distance | None,
) -> dict[str, _Part]:
    after, before = ([_loaded(model[path]) for path in paths] for model in (tuned, seeds))
    masks = _project(plan, distance, *([jnp.asarray(x) for x in model] for model in (after, before)))
    # at once on all processes, of which some may have no entry of a tensor to read
    masks = [
        jax.device_put(m, x.sharding) if isinstance(x, jax.Array) else m
        for m, x in zip(masks, after, strict=True)
    ]
    parts = map(_local_difference, before, after, masks)
    return dict(zip(paths, parts, strict=True))


def _loaded(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else np.asarray(x)


@partial(jax.jit, static_argnums=(0, 1))  # compiled once for all groups of like tensors
def _project(plan: SiloPlan, distance: Any, tuned: list[jax.Array], seed: list[jax.Array]) -> Any:
    return project(plan, tuned, seed, distance=distance).mask


@contextlib.contextmanager
def _x64(on: bool) -> Iterator[None]:
    """64-bit arrays for models that have them (``jax.enable_x64`` is younger than the oldest jax)."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", on or before)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _check_allowed(parts: dict[str, _Part], tuned: dict[str, Any], state: Any) -> None:
    """Raises if entries differ that the optimizer did not allow to."""
    for path, leaf in leaf_states(state).items():
        if leaf.mask is None or isinstance(leaf.seed, Free):
            continue
        part = parts[path]
        if is_masked(leaf.mask):
            outside = part
        else:
            allowed = np.zeros(math.prod(tuned[path].shape), bool)
            allowed[_local_difference(np.zeros(tuned[path].shape, bool), leaf.mask).positions] = True
            outside = part.take(~allowed[part.positions])
        if not len(outside.positions):
            continue
        moved = np.abs(outside.values.astype(np.float64) - outside.before.astype(np.float64))
        scale = np.maximum(np.abs(outside.values), np.abs(outside.before)).astype(np.float64)
        near = moved <= 4 * float(jnp.finfo(outside.values.dtype).eps) * scale
        cause = (
            "They are a rounding error away from it: call dst_optax.finalize(params, state) first."
            if near.all()
            else "Something changed the parameters after it: an optimizer chained after it, averaged or "
            "schedule-free evaluation parameters, a moving average, or the state of another step."
        )
        raise SubsetError(
            f"{len(outside.positions)} entries of {path!r} differ from the seed although "
            f"dynamic_subset_tuning set them to it. {cause}"
        )
