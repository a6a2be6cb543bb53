"""What the transform remembers, and how it is found again in any optimizer's state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dst_optax.silos import SiloPlan, is_masked, leaf_path

FREE = -1.0  # in `gap`: every entry of the leaf is free at this step


class DynamicSubsetTuningState(NamedTuple):
    """State of :func:`dynamic_subset_tuning`."""

    seed: Any  # like params, their dtypes; a MaskedNode (Free, Frozen) where a leaf is so at every step
    captured: jax.Array  # (), bool: the seed is the model that training started from
    threshold: jax.Array  # (silos,), float32: the last threshold; -1 free, inf frozen
    movement: jax.Array  # (silos,), float32: its change in the last step
    gap: jax.Array  # (leaves with a seed,), float32: no kept entry is nearer to its seed; -1 free
    reach: jax.Array  # (leaves with a seed,), float32: no kept entry is farther from its seed
    step: jax.Array  # (), int32: updates so far
    passes: jax.Array  # (), int32: counting passes of the last step
    free: jax.Array  # (2,), int32 limbs: entries above the thresholds in the last step
    budget: jax.Array  # (2,), int32 limbs: entries that could be free in the last step
    nonfinite: jax.Array  # (), int32: entries that passed because they were NaN or infinite
    unresolved: jax.Array  # (), int32: reverted entries that finalize may take for kept ones
    plan: jax.Array  # (), uint32: fingerprint of the silo plan


class Free(optax.MaskedNode):
    """In place of a seed: every entry of the leaf is free at every step."""


class Frozen(optax.MaskedNode):
    """In place of a seed: no entry of the leaf ever moves."""


class Place(NamedTuple):
    """What the state knows of one leaf."""

    seed: jax.Array
    gap: jax.Array  # (), float32
    captured: jax.Array  # (), bool


def is_state(x: Any) -> bool:
    """Whether ``x`` is a DST state."""
    return isinstance(x, DynamicSubsetTuningState)


def states(state: Any) -> list[DynamicSubsetTuningState]:
    """All DST states in a pytree.

    Raises:
      ValueError: there is none.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if not found:
        raise ValueError(
            f"no DynamicSubsetTuningState in the state of type {type(state).__name__}; pass the optimizer "
            "state that tx.update returned."
        )
    return found


def map_states(change: Callable[[DynamicSubsetTuningState], Any], state: Any) -> Any:
    """The pytree with each of its DST states changed."""
    return jax.tree.map(lambda x: change(x) if is_state(x) else x, state, is_leaf=is_state)


def paths(params: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths, ``a/b/c``."""
    return [(leaf_path(k), x) for k, x in jax.tree_util.tree_flatten_with_path(params)[0]]


def places_of(state: Any) -> dict[str, Place | Free | Frozen]:
    """What the DST states in a pytree know of each leaf, by path."""
    places: dict[str, Place | Free | Frozen] = {}
    for dst in states(state):
        leaves = jax.tree_util.tree_flatten_with_path(dst.seed, is_leaf=is_masked)[0]
        ranked = iter(range(len(leaves)))
        for key_path, seed in leaves:
            path = leaf_path(key_path)
            marked = isinstance(seed, Free | Frozen)
            if is_masked(seed) and not marked:
                continue
            if path in places:
                raise ValueError(
                    f"two DST states hold the parameter {path!r}; their leaves must be disjoint."
                )
            places[path] = seed if marked else Place(seed, dst.gap[next(ranked)], dst.captured)
    return places


def map_places(f: Callable[..., Any], params: Any, state: Any, *rest: Any) -> Any:
    """Maps ``f(leaf, *rest_leaves, place)`` over parameters; MaskedNode stays as it is."""
    places = places_of(state)
    used = set()

    def visit(key_path: Any, p: Any, *others: Any) -> Any:
        if p is None or is_masked(p):
            return p
        path = leaf_path(key_path)
        place = places.get(path)
        used.add(path)
        if isinstance(place, Place) and place.seed.shape != jnp.shape(p):
            raise ValueError(
                f"parameter {path!r} has the shape {jnp.shape(p)}, its seed {place.seed.shape}; the state "
                "belongs to another model."
            )
        others = tuple(None if is_masked(o) else o for o in others)
        return f(p, *others, place)

    out = jax.tree_util.tree_map_with_path(visit, params, *rest, is_leaf=lambda x: x is None or is_masked(x))
    missing = [path for path in places if path not in used]
    if missing:
        raise ValueError(
            f"the state knows of {missing[0]!r}, which the parameters lack; pass the parameters "
            "that the state was made for."
        )
    return out


def check_structure(plan: SiloPlan, updates: Any, state: DynamicSubsetTuningState, params: Any) -> None:
    """Raises if updates, state and params are not of one model."""
    given = dict(paths(params))
    for name, tree in (("updates", updates), ("the seed in the state", state.seed)):
        for path, leaf in paths(tree):
            if path not in given:
                raise ValueError(
                    f"{name} has a leaf {path!r} that params lacks; was tx.init called with these parameters?"
                )
            if jnp.shape(leaf) != jnp.shape(given[path]):
                raise ValueError(
                    f"parameter {path!r} has the shape {jnp.shape(given[path])}, but {name} has "
                    f"{jnp.shape(leaf)} there; call tx.init again for a changed model."
                )
    if len(paths(updates)) != len(given):
        lost = next(path for path in given if path not in dict(paths(updates)))
        raise ValueError(f"updates lacks the parameter {lost!r}; pass an update for every parameter.")
    seeds = [path for path, _ in paths(state.seed)]
    expected = [plan.leaves[i].path for i in plan.ranked]
    if seeds != expected or state.threshold.shape != (len(plan.sizes),):
        odd = sorted(set(seeds) ^ set(expected))
        raise ValueError(
            f"the state was made by another transform: it has {state.threshold.shape[0]} silos and "
            f"{len(seeds)} seeds, this transform {len(plan.sizes)} and {len(expected)}"
            f"{f' (first difference: {odd[0]!r})' if odd else ''}; use the silos and fractions it was "
            "made with or call tx.init again."
        )
    if isinstance(state.plan, Tracer):
        return
    fingerprint = int(np.asarray(state.plan).max())
    if fingerprint != plan.fingerprint:
        raise ValueError(
            f"the state carries the plan fingerprint {fingerprint:#010x}, this transform has "
            f"{plan.fingerprint:#010x}: paths, dtypes or silos differ; use those it was made with or call "
            "tx.init again."
        )
