"""Dynamic Subset Tuning as an optax transform.

At every step the inner optimizer proposes an update u of all parameters. The proposal
``theta_hat = params + u`` is compared with the seed model, and in every silo only the entries that
moved furthest from it stay; all others return to the seed:

    delta = d(seed, theta_hat, seed)
    params <- where(delta > q, theta_hat, seed),   q: the (1 - fraction) quantile of the silo

Kept entries pass u through, all others get ``seed - params``. That difference alone does not
always lead back to the seed, because ``params + (seed - params)`` rounds; :func:`apply_updates`
recognises it and sets the seed itself, so reverted entries equal the seed bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from dst_optax import budget, distances, selection
from dst_optax import silos as silos_lib
from dst_optax.silos import LeafPlan, SiloPlan, is_masked, leaf_path

NO_PARAMS = "dynamic_subset_tuning needs the current parameters: call tx.update(updates, state, params)."
BATCH = 2**22  # entries whose updates are in memory at one time, on one device
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


def dynamic_subset_tuning(
    fraction_of_free_params: Any = 0.1,
    *,
    num_free_params: int | None = None,
    silos: silos_lib.Silos | None = None,
    distance: distances.Distance = distances.absolute,
    ties: str = "strict",
) -> optax.GradientTransformationExtraArgs:
    """Lets only a small, moving subset of the parameters differ from the seed model.

    Chain it last, after any optimizer. In a silo of n entries the budget is
    ``ceil(fraction * (n - 1))``; at every step the entries whose proposed values lie furthest from
    the seed are kept and all others return to it. The seed is the model that the first ``update``
    sees, so parameters may be restored between ``init`` and the first step.

    Args:
      fraction_of_free_params: a number in [0, 1], an optax schedule, a traced float32 scalar, or
        ``[(regex, number), ...]`` of which the first match counts for each leaf path. 0 freezes, 1
        frees.
      num_free_params: absolute budget, shared over the silos in proportion to their sizes, instead
        of a fraction.
      silos: which entries compete, see :mod:`dst_optax.silos`; None makes every tensor a silo.
      distance: component-wise ``d(theta, theta_hat, theta_seed)``, non-negative, computed in float32
        at least.
      ties: "strict" keeps what lies above the threshold, so fewer than the budget when distances tie
        there; "fill" fills the budget from the tied entries in a fixed pseudo-random order.

    Returns:
      The transform. Apply its updates with :func:`dst_optax.apply_updates`.

    Raises:
      ValueError: a fraction outside [0, 1], a rule that matches nothing or a leaf that no rule
        matches, both kinds of budget, ``params=None``, a state of other parameters.
      TypeError: parameters that are not floating-point arrays.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), dst_optax.dynamic_subset_tuning(0.5))
      >>> params = jnp.zeros(5)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.arange(5.0), state, params)
      >>> dst_optax.apply_updates(params, updates, state).tolist()
      [0.0, 0.0, 0.0, -3.0, -4.0]

    References:
      Stahlberg, Lichtarge, Kumar, *Dynamic Subset Tuning: Expanding the Operational Range of
      Parameter-Efficient Training for Large Language Models*, arXiv 2411.08610.
    """
    if ties not in ("strict", "fill"):
        raise ValueError(f"ties: got {ties!r}; it must be 'strict' or 'fill'.")
    fraction = _static_fraction(fraction_of_free_params, num_free_params)

    def plan_of(params: Any) -> SiloPlan:
        return silos_lib.make_plan(params, silos, fraction, num_free_params)

    def init(params: Any) -> DynamicSubsetTuningState:
        plan = plan_of(params)
        ranked = set(plan.ranked)
        leaves, treedef = jax.tree.flatten(params)
        seed = [
            _copy(x) if i in ranked else Free() if plan.is_free(leaf) else Frozen()
            for i, (x, leaf) in enumerate(zip(leaves, plan.leaves, strict=True))
        ]
        return DynamicSubsetTuningState(
            seed=jax.tree.unflatten(treedef, seed),
            captured=jnp.zeros((), bool),
            threshold=jnp.zeros(len(plan.sizes), jnp.float32),
            movement=jnp.zeros(len(plan.sizes), jnp.float32),
            gap=jnp.zeros(len(ranked), jnp.float32),
            reach=jnp.full(len(ranked), jnp.inf, jnp.float32),
            step=jnp.zeros((), jnp.int32),
            passes=jnp.zeros((), jnp.int32),
            free=jnp.zeros(2, jnp.int32),
            budget=jnp.zeros(2, jnp.int32),
            nonfinite=jnp.zeros((), jnp.int32),
            unresolved=jnp.zeros((), jnp.int32),
            plan=jnp.uint32(plan.fingerprint),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DynamicSubsetTuningState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        plan = plan_of(params)
        _check_structure(plan, updates, state, params)
        if plan.budgets is not None:
            budgets = jnp.asarray(budget.limbs(plan.budgets))
        else:
            now = fraction_of_free_params
            now = jnp.asarray(now(state.step) if callable(now) else now)
            budgets = budget.traced_rank(now, plan.sizes)
        update_leaves, treedef = jax.tree.flatten(updates)
        seeds = _capture(state, [jax.tree.leaves(params)[i] for i in plan.ranked])
        out, facts = _step(
            plan, distance, ties, update_leaves, jax.tree.leaves(params), seeds, budgets, state
        )
        seed = jax.tree.unflatten(jax.tree.structure(state.seed), seeds)
        state = state._replace(seed=seed, captured=jnp.ones((), bool), step=state.step + 1, **facts)
        return jax.tree.unflatten(treedef, out), state

    return optax.GradientTransformationExtraArgs(init, update)


def wrap(
    inner: optax.GradientTransformation, fraction_of_free_params: Any = 0.1, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(inner, dynamic_subset_tuning(...))``: the order is guaranteed.

    Args:
      inner: any optimizer.
      fraction_of_free_params: see :func:`dynamic_subset_tuning`.
      **kwargs: further arguments of :func:`dynamic_subset_tuning`.

    Returns:
      The chained transform.

    Example:
      >>> import dst_optax, optax
      >>> tx = dst_optax.wrap(optax.adamw(1e-4), fraction_of_free_params=0.1)
    """
    return optax.chain(inner, dynamic_subset_tuning(fraction_of_free_params, **kwargs))


def apply_updates(params: Any, updates: Any, state: Any) -> Any:
    """``params + updates``, and exactly the seed where the update asks for the seed.

    Args:
      params: current parameters.
      updates: what ``tx.update`` returned with ``state``.
      state: the new optimizer state, or any pytree that holds DST states of disjoint leaves.

    Returns:
      The new parameters; outside the subset they equal the seed bit for bit.

    Raises:
      ValueError: the state holds no DST state, or one of other parameters.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([1.0, -5.0, 0.1]), state, params)
      >>> dst_optax.apply_updates(params, updates, state).tolist()
      [1.0, 2.5, 3.0]
    """

    def apply(p: jax.Array, u: jax.Array, place: Any) -> jax.Array:
        if u is None or isinstance(place, Frozen):
            return p
        p = jnp.asarray(p)
        added = _add(p, u)
        if not isinstance(place, _Place):
            return added
        asked = _asks_for_seed(u, place.seed, p) & (place.gap != FREE) & place.captured
        return jnp.where(asked, place.seed, added)

    return _map_places(apply, params, state, updates)


def finalize(params: Any, state: Any) -> Any:
    """Sets to the seed what a plain ``optax.apply_updates`` left a rounding error away from it.

    An entry returns to the seed when it is nearer to it than half the smallest distance of a kept
    entry of its tensor. After :func:`apply_updates` nothing changes.

    Args:
      params: parameters after the last step.
      state: the optimizer state after that step.

    Returns:
      The parameters; outside the subset they equal the seed bit for bit, but for the entries that
      ``diagnostics.metrics(state)["unresolved"]`` counts.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(jnp.array([1.0, -5.0, 0.1]), tx.init(params), params)
      >>> dst_optax.finalize(optax.apply_updates(params, updates), state).tolist()
      [1.0, 2.5, 3.0]
    """

    def settle(p: jax.Array, place: Any) -> jax.Array:
        if not isinstance(place, _Place):
            return p
        wide = _wide(p.dtype)
        near = jnp.abs(p.astype(wide) - place.seed.astype(wide)) < 0.5 * place.gap.astype(wide)
        return jnp.where(near & place.captured, place.seed, p)

    return _map_places(settle, params, state)


def reseed(state: Any, params: Any) -> Any:
    """Makes ``params`` the seed by hand.

    Args:
      state: any optimizer state that holds DST states.
      params: the model that the tuned one shall be compared with from now on.

    Returns:
      The state with a copy of ``params`` as the seed and no memory of thresholds.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1))
      >>> state = dst_optax.reseed(tx.init(jnp.zeros(3)), jnp.ones(3))
    """
    by_path = dict(_paths(params))

    def renew(dst: DynamicSubsetTuningState) -> DynamicSubsetTuningState:
        def copy(key_path: Any, old: Any) -> Any:
            path = leaf_path(key_path)
            new = by_path.get(path)
            if new is None or jnp.shape(new) != old.shape:
                raise ValueError(
                    f"reseed: parameter {path!r} must have the shape {old.shape}, got "
                    f"{None if new is None else jnp.shape(new)}."
                )
            return _copy(new)

        return dst._replace(
            seed=jax.tree_util.tree_map_with_path(copy, dst.seed),
            captured=jnp.ones((), bool),
            threshold=jnp.zeros_like(dst.threshold),
            movement=jnp.zeros_like(dst.movement),
            gap=jnp.zeros_like(dst.gap),
            reach=jnp.full_like(dst.reach, jnp.inf),
        )

    states(state)
    return jax.tree.map(lambda x: renew(x) if _is_state(x) else x, state, is_leaf=_is_state)


def subset_mask(params: Any, state: Any) -> Any:
    """Which entries differ from the seed, by their bits.

    Args:
      params: current parameters.
      state: the optimizer state.

    Returns:
      Pytree of bool like ``params``: all False before the first step, and for a leaf that is
      statically frozen; all True for one that is statically free.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(jnp.array([1.0, -5.0, 0.1]), tx.init(params), params)
      >>> params = dst_optax.apply_updates(params, updates, state)
      >>> dst_optax.subset_mask(params, state).tolist()
      [False, True, False]
    """

    def differs(p: jax.Array, place: Any) -> jax.Array:
        if isinstance(place, Free):
            return jnp.ones(jnp.shape(p), bool)
        if not isinstance(place, _Place):
            return jnp.zeros(jnp.shape(p), bool)
        return (_bits(jnp.asarray(p)) != _bits(place.seed)) & place.captured

    return _map_places(differs, params, state)


def seed_leaves(params: Any, state: Any) -> list[tuple[str, Any]]:
    """The seed of every leaf of ``params``, in order, with its path; a frozen leaf is its own seed.

    Returns:
      Pairs of path and seed; None where none is kept, as for a leaf that is statically free.

    Raises:
      ValueError: the seed is not captured yet.
    """
    for dst in states(state):
        if not bool(dst.captured):
            raise ValueError(
                "the seed is not captured yet: take a training step first, or call dst_optax.reseed(state, "
                "params) with the seed model."
            )
    places = _places(state)

    def seed(leaf: Any, place: Any) -> Any:
        if isinstance(place, Frozen):
            return leaf
        return place.seed if isinstance(place, _Place) else None

    return [(path, seed(leaf, places.get(path))) for path, leaf in _paths(params)]


class Free(optax.MaskedNode):
    """In place of a seed: every entry of the leaf is free at every step."""


class Frozen(optax.MaskedNode):
    """In place of a seed: no entry of the leaf ever moves."""


class _Place(NamedTuple):
    """What the state knows of one leaf."""

    seed: jax.Array
    gap: jax.Array  # (), float32
    captured: jax.Array  # (), bool


def _is_state(x: Any) -> bool:
    return isinstance(x, DynamicSubsetTuningState)


def states(state: Any) -> list[DynamicSubsetTuningState]:
    """All DST states in a pytree.

    Raises:
      ValueError: there is none.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
    if not found:
        raise ValueError(
            f"no DynamicSubsetTuningState in the state of type {type(state).__name__}; pass the optimizer "
            "state that tx.update returned."
        )
    return found


def _paths(params: Any) -> list[tuple[str, Any]]:
    return [(leaf_path(k), x) for k, x in jax.tree_util.tree_flatten_with_path(params)[0]]


def _places(state: Any) -> dict[str, _Place | Free | Frozen]:
    places: dict[str, _Place | Free | Frozen] = {}
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
            places[path] = seed if marked else _Place(seed, dst.gap[next(ranked)], dst.captured)
    return places


def _map_places(f: Callable[..., Any], params: Any, state: Any, *rest: Any) -> Any:
    """Maps ``f(leaf, *rest_leaves, place)`` over parameters; MaskedNode stays as it is."""
    places = _places(state)
    used = set()

    def visit(key_path: Any, p: Any, *others: Any) -> Any:
        if p is None or is_masked(p):
            return p
        path = leaf_path(key_path)
        place = places.get(path)
        used.add(path)
        if isinstance(place, _Place) and place.seed.shape != jnp.shape(p):
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


def _static_fraction(fraction: Any, num_free_params: int | None) -> Any:
    """The fraction for the plan: checked, or None if it is known at run time only."""
    if num_free_params is not None:
        if not isinstance(fraction, float) or fraction != 0.1:
            raise ValueError(
                f"got both fraction_of_free_params={fraction!r} and num_free_params={num_free_params!r}; "
                "give one of them."
            )
        if isinstance(num_free_params, bool) or not isinstance(num_free_params, int | np.integer):
            raise TypeError(f"num_free_params: expected an int, got {num_free_params!r}.")
        if num_free_params < 0:
            raise ValueError(f"num_free_params: got {num_free_params}; it must be 0 or more.")
        return None
    if callable(fraction) or isinstance(fraction, jax.Array):
        return None
    if isinstance(fraction, Sequence) and not isinstance(fraction, str):
        for pattern, value in fraction:
            silos_lib.check_fraction(value, f"fraction_of_free_params for the pattern {pattern!r}")
        return tuple((p, v) for p, v in fraction)
    silos_lib.check_fraction(fraction, "fraction_of_free_params")
    return fraction


def _check_structure(plan: SiloPlan, updates: Any, state: DynamicSubsetTuningState, params: Any) -> None:
    """Raises if updates, state and params are not of one model."""
    given = dict(_paths(params))
    for name, tree in (("updates", updates), ("the seed in the state", state.seed)):
        for path, leaf in _paths(tree):
            if path not in given:
                raise ValueError(
                    f"{name} has a leaf {path!r} that params lacks; was tx.init called with these parameters?"
                )
            if jnp.shape(leaf) != jnp.shape(given[path]):
                raise ValueError(
                    f"parameter {path!r} has the shape {jnp.shape(given[path])}, but {name} has "
                    f"{jnp.shape(leaf)} there; call tx.init again for a changed model."
                )
    if len(_paths(updates)) != len(given):
        lost = next(path for path in given if path not in dict(_paths(updates)))
        raise ValueError(f"updates lacks the parameter {lost!r}; pass an update for every parameter.")
    seeds = [path for path, _ in _paths(state.seed)]
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


def _capture(state: DynamicSubsetTuningState, params: list[jax.Array]) -> list[jax.Array]:
    """The seed: that of the state once it is captured, before that the parameters.

    A loop of no or one turn, so that a captured seed is passed on in place instead of rewritten.
    """
    seeds = jax.tree.leaves(state.seed)
    if not seeds:
        return seeds
    _, seeds = lax.while_loop(
        lambda carry: ~carry[0],
        lambda carry: (jnp.ones_like(carry[0]), [jnp.asarray(p) for p in params]),
        (state.captured, seeds),
    )
    return seeds


def _copy(x: Any) -> jax.Array:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.array(x, copy=True)


def _promote(a: Any, b: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def _wide(dtype: Any) -> Any:
    return _promote(dtype, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _add(p: jax.Array, u: jax.Array) -> jax.Array:
    both = _promote(p.dtype, u.dtype)
    return (p.astype(both) + u.astype(both)).astype(p.dtype)


def _back(seed: jax.Array, p: jax.Array, dtype: Any) -> jax.Array:
    """The update that asks for the seed."""
    both = _promote(p.dtype, dtype)
    return (seed.astype(both) - p.astype(both)).astype(dtype)


def _asks_for_seed(u: jax.Array, seed: jax.Array, p: jax.Array) -> jax.Array:
    """Whether ``u = seed - p``: compared as bits, which the compiler must round, and never for NaN."""
    back = _back(seed, p, u.dtype)
    return (_bits(u) == _bits(back)) & ~jnp.isnan(back)


def _rounded(x: jax.Array, zero: jax.Array) -> jax.Array:
    """``x`` in its own precision: XLA may otherwise carry a half-precision sum on in float32."""
    if x.dtype.itemsize > 2:
        return x
    return lax.bitcast_convert_type(_bits(x) ^ zero.astype(jnp.uint16), x.dtype)


def _mix(index: jax.Array) -> jax.Array:
    """A bijection of [0, 2**31) that scatters neighbours, uint32 to uint32."""
    mask = jnp.uint32(0x7FFFFFFF)
    x = (index * jnp.uint32(0x9E3779B1)) & mask
    x = ((x ^ (x >> 15)) * jnp.uint32(0x85EBCA6B)) & mask
    x = ((x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)) & mask
    return x ^ (x >> 16)


class _Ranked(NamedTuple):
    """One leaf whose entries compete."""

    plan: LeafPlan
    param: jax.Array
    update: jax.Array
    seed: jax.Array
    zero: jax.Array

    def proposal(self) -> jax.Array:
        return _rounded(_add(self.param, self.update), self.zero)

    def keys(self, distance: distances.Distance, dtype: Any) -> jax.Array:
        """Distances of the proposal from the seed as integers that order alike, -1 where it is not finite."""
        theta_hat, wide = self.proposal(), _wide(self.param.dtype)
        own = _settle(self.seed, self.zero)  # apart from later uses, or s - p would stay in memory for them
        seed = own.astype(wide)
        delta = distance(seed, theta_hat.astype(wide), seed)
        if jnp.shape(delta) != self.param.shape or delta.dtype != wide:
            raise ValueError(
                f"the distance of parameter {self.plan.path!r} has shape {jnp.shape(delta)} and dtype "
                f"{delta.dtype}; it must be component-wise, so {self.param.shape} and {wide}."
            )
        delta = jnp.where(jnp.isnan(delta), jnp.inf, delta)
        same = _bits(theta_hat) == _bits(own)
        same |= _asks_for_seed(self.update, own, self.param)
        same |= delta < jnp.finfo(wide).tiny
        delta = jnp.where(same, jnp.zeros_like(delta), delta)
        keys = lax.bitcast_convert_type(
            delta.astype(jnp.float64 if dtype == jnp.int64 else jnp.float32), dtype
        )
        return jnp.where(jnp.isfinite(theta_hat), keys, jnp.full_like(keys, -1))

    @property
    def precision(self) -> int:
        """Bits of mantissa that a difference of parameters keeps on its way through the update."""
        return min(jnp.finfo(self.param.dtype).nmant, jnp.finfo(self.update.dtype).nmant)

    def chosen(self, keep: jax.Array, zero: jax.Array) -> jax.Array:
        """The updates: unchanged where kept, back to the seed elsewhere; after ``zero`` is known."""
        back = _back(self.seed, self.param, self.update.dtype)
        return _settle(jnp.where(keep, self.update, back), zero)

    def extent(self, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Least and largest distance of kept entries from their seeds, in parameters' units."""
        wide = _wide(self.param.dtype)
        far = jnp.abs(self.proposal().astype(wide) - self.seed.astype(wide))
        return (
            jnp.min(jnp.where(keep, far, jnp.inf), initial=jnp.inf),
            jnp.max(jnp.where(keep, far, 0.0), initial=0.0),
        )

    def unresolved(
        self, kept: Callable[[], jax.Array], gap: jax.Array, reach: jax.Array, rowwise: bool
    ) -> jax.Array:
        """Reverted entries whose rounding error under a plain apply may look like a kept distance.

        The error of ``p + (s - p)`` is at most one unit in the last place of ``s - p``, and p lies
        no farther from s than ``reach``; so mostly there is nothing to count. Accelerators
        count all the same, in one pass with the updates: a branch would need these in memory.
        """
        wide = _wide(self.param.dtype)
        half = 0.5 * gap.astype(wide)
        least = max(float(jnp.finfo(wide).tiny), float(jnp.finfo(self.update.dtype).smallest_subnormal))
        error = jnp.maximum(reach.astype(wide) * 2.0**-self.precision, least)

        def count() -> jax.Array:
            keep = kept()
            back = _back(self.seed, self.param, self.update.dtype)
            landed = _rounded(_add(self.param, back), self.zero).astype(wide)
            residue = jnp.abs(landed - self.seed.astype(wide))
            return jnp.sum(~keep & (residue > 0) & (residue >= half), dtype=jnp.int32)

        if not rowwise:
            return count()
        return lax.cond(error < half, lambda: jnp.zeros((), jnp.int32), count)

    def order(self) -> tuple[jax.Array, jax.Array]:
        """Row-major index of each entry in its silo as (index // 2**31, mixed remainder), int32."""
        shape, axis = self.param.shape, self.plan.axis
        high = jnp.zeros(shape, jnp.int32)
        low = jnp.zeros(shape, jnp.uint32)
        offsets = np.array(self.plan.offsets, np.int64)
        leaf = selection.Leaf(lambda: low, axis, tuple(range(len(offsets))))
        start = jnp.asarray(offsets & 0x7FFFFFFF, jnp.uint32)
        terms = [(selection.spread_to_leaf(start, leaf, len(shape)), 1)]
        high += selection.spread_to_leaf(jnp.asarray(offsets >> 31, jnp.int32), leaf, len(shape))
        stride = 1
        for d in reversed(range(len(shape))):
            if d != axis:
                terms.append((lax.broadcasted_iota(jnp.uint32, shape, d), stride))
                stride *= shape[d]
        if stride >= 2**31:
            raise ValueError(
                f"parameter {self.plan.path!r}: ties='fill' takes tensors below 2**31 entries a silo, got "
                f"{stride}; use ties='strict' or stacked silos."
            )
        for term, factor in terms:
            low = low + term * jnp.uint32(factor)
            high += (low >> 31).astype(jnp.int32)
            low &= jnp.uint32(0x7FFFFFFF)
        return high, _mix(low).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _step(
    plan: SiloPlan,
    distance: distances.Distance,
    ties: str,
    updates: list[jax.Array],
    params: list[jax.Array],
    seeds: list[jax.Array],
    budgets: jax.Array,
    state: DynamicSubsetTuningState,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Updates that lead to the subset's proposals and the seed elsewhere, and what the state keeps."""
    out = [
        jnp.full_like(u, -0.0) if plan.is_frozen(leaf) else u
        for u, leaf in zip(updates, plan.leaves, strict=True)
    ]
    ranked = plan.ranked
    kept_facts = dict(
        budget=_total(budgets),
        free=_total(budgets),
        nonfinite=jnp.zeros((), jnp.int32),
        unresolved=jnp.zeros((), jnp.int32),
    )
    if not ranked:
        return out, kept_facts
    select = partial(_select, plan, distance, ties)
    args = (
        [updates[i] for i in ranked],
        [params[i] for i in ranked],
        seeds,
        budgets,
        state.threshold,
        state.movement,
        state.reach,
        state.step,
    )
    new, facts = lax.platform_dependent(
        *args, cpu=partial(select, jax.device_count() == 1), default=partial(select, False)
    )
    for i, u in zip(ranked, new, strict=True):
        out[i] = u
    if plan.budgets is not None:
        contested = {silo for i in ranked for silo in plan.leaves[i].silos}
        always = sum(m for silo, m in enumerate(plan.budgets) if silo not in contested)
        facts["free"] = budget.carry(facts["free"] + budget.limbs([always])[0])
    return out, kept_facts | facts


def _total(pairs: jax.Array) -> jax.Array:
    return budget.carry(jnp.sum(pairs, axis=0, dtype=jnp.int32))


def _components(leaves: Sequence[LeafPlan]) -> list[list[int]]:
    """Groups of leaves that share silos, in order of their first leaf."""
    group_of: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        old = sorted({group_of[s] for s in leaf.silos if s in group_of})
        groups[i] = [*sorted(j for g in old for j in groups.pop(g)), i]
        for j in groups[i]:
            for s in leaves[j].silos:
                group_of[s] = i
    return sorted(groups.values())


def _batches(leaves: Sequence[LeafPlan]) -> list[list[int]]:
    """Leaves in batches of at most ``BATCH`` entries; leaves that share a silo stay together."""
    batches: list[list[int]] = []
    room = 0
    for group in _components(leaves):
        size = sum(math.prod(leaves[j].shape) for j in group)
        if size > room or not batches:
            batches.append([])
            room = BATCH
        batches[-1] += group
        room -= size
    return [sorted(batch) for batch in batches]


def _settle(u: jax.Array, zero: jax.Array) -> jax.Array:
    """``u``, rounded once: no later sum may contract the product that u came from."""
    bits = _bits(u)
    return lax.bitcast_convert_type(bits ^ zero.astype(bits.dtype), u.dtype)


def _in_memory(x: jax.Array, zero: jax.Array) -> jax.Array:
    """``x``, by a loop of no turns: XLA neither computes it again in every pass nor before ``zero``."""
    return lax.while_loop(lambda c: c[0] != 0, lambda c: (c[0] >> 1, -c[1]), (zero, x))[1]


def _select(
    plan: SiloPlan,
    distance: distances.Distance,
    ties: str,
    one_by_one: bool,
    updates: list[jax.Array],
    params: list[jax.Array],
    seeds: list[jax.Array],
    budgets: jax.Array,
    threshold: jax.Array,
    movement: jax.Array,
    reach: jax.Array,
    step: jax.Array,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Thresholds and updates of the ranked leaves.

    One device takes batch after batch of silos, so that the updates of only one batch are in memory;
    a mesh takes all silos in one loop, so that a pass is one exchange.
    """
    leaves = [plan.leaves[i] for i in plan.ranked]
    groups = _batches(leaves) if one_by_one else [list(range(len(leaves)))]
    zero = step >> 31  # a zero that the compiler cannot know
    out: list[Any] = [None] * len(leaves)
    gaps: list[Any] = [None] * len(leaves)
    reaches: list[Any] = [None] * len(leaves)
    new_threshold, passes = threshold, []
    free = jnp.zeros(2, jnp.int32)
    nonfinite = unresolved = jnp.zeros((), jnp.int32)
    for group in groups:
        ids = sorted({s for j in group for s in leaves[j].silos})
        local = {s: i for i, s in enumerate(ids)}
        at = np.array(ids, np.int32)
        settled = {j: _settle(updates[j], zero) for j in group}
        if one_by_one:
            settled = {j: _in_memory(u, zero) for j, u in settled.items()}
        items = [_Ranked(leaves[j], params[j], settled[j], seeds[j], zero) for j in group]
        where = [tuple(local[s] for s in leaves[j].silos) for j in group]
        chosen = _select_group(
            items,
            where,
            budgets[at],
            [plan.sizes[s] for s in ids],
            threshold[at],
            movement[at],
            [reach[j] for j in group],
            distance,
            ties,
            one_by_one,
        )
        for j, *found in zip(group, chosen.updates, chosen.gaps, chosen.reaches, strict=True):
            out[j], gaps[j], reaches[j] = found
        new_threshold = new_threshold.at[at].set(chosen.threshold)
        passes.append(chosen.passes)
        free = budget.carry(free + chosen.free)
        nonfinite = nonfinite + chosen.nonfinite
        unresolved = unresolved + chosen.unresolved
        zero = chosen.passes >> 31
    known = (movement != 0) | (threshold != 0)
    moved = jnp.where(
        known & jnp.isfinite(new_threshold) & jnp.isfinite(threshold),
        new_threshold - threshold,
        0.0,
    )
    return out, dict(
        threshold=new_threshold,
        movement=moved,
        gap=jnp.stack(gaps),
        reach=jnp.stack(reaches),
        passes=jnp.max(jnp.stack(passes)),
        free=free,
        nonfinite=nonfinite,
        unresolved=unresolved,
    )


class _Chosen(NamedTuple):
    updates: list[jax.Array]
    gaps: list[jax.Array]
    reaches: list[jax.Array]
    threshold: jax.Array
    passes: jax.Array
    free: jax.Array
    nonfinite: jax.Array
    unresolved: jax.Array


def _select_group(
    items: list[_Ranked],
    where: list[tuple[int, ...]],
    m: jax.Array,
    sizes: Sequence[int],
    threshold: jax.Array,
    movement: jax.Array,
    reach: Sequence[jax.Array],
    distance: distances.Distance,
    ties: str,
    rowwise: bool,
) -> _Chosen:
    """Selects in silos that are connected by their leaves."""
    double = any(item.param.dtype == jnp.float64 for item in items)
    key_dtype, real = (jnp.int64, jnp.float64) if double else (jnp.int32, jnp.float32)
    infinity = int(np.array(np.inf, real).view(key_dtype))
    octave = 2**52 if double else 2**23
    precision = min(item.precision for item in items)

    def to_key(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(jnp.maximum(x, 0).astype(real), key_dtype)

    def to_distance(key: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(jnp.maximum(key, 0), real)

    expected = threshold + movement
    guess = jnp.where(jnp.isfinite(expected) & (threshold > 0) & (expected > 0), to_key(expected), -1)
    spread = jnp.maximum(jnp.abs(to_key(expected) - to_key(threshold)) // 8, 1 << (43 if double else 14))
    beyond = jnp.minimum(guess, infinity - 1 - (precision - 3) * octave) + (precision - 3) * octave
    far = jnp.where(guess < 0, infinity - 1, beyond)

    def leaf_keys(item: _Ranked) -> Callable[[], jax.Array]:
        if not rowwise:
            return lambda: item.keys(distance, key_dtype)
        keys = _in_memory(item.keys(distance, key_dtype), item.zero)
        return lambda: keys

    leaves = [
        selection.Leaf(leaf_keys(item), item.plan.axis, ids) for item, ids in zip(items, where, strict=True)
    ]
    total = jnp.asarray(budget.limbs(sizes))
    all_free = budget.equal(m, total)
    bracket = selection.thresholds(
        leaves,
        jnp.where(all_free[:, None], 0, m),
        total,
        infinity,
        guess,
        spread,
        far,
        float(octave),
        rowwise,
    )
    t = jnp.where(all_free, -1, bracket.hi)
    above = jnp.where(all_free[:, None], total, bracket.above_hi)
    passes = bracket.passes
    filled: list[Any] = [None] * len(items)
    if ties == "fill":
        lacking = ~all_free & ~bracket.met(m) & (t > 0)
        rest = jnp.where(lacking[:, None], budget.carry(m - above), 0)
        tied = jnp.where(lacking[:, None], budget.carry(bracket.above_lo - bracket.above_hi), 0)
        filled, more = _fill(items, leaves, t, lacking, rest, tied, max(sizes), rowwise)
        above = jnp.where(lacking[:, None], m, above)
        passes = passes + more
    nothing = budget.equal(above, jnp.zeros_like(above))
    some = ~budget.equal(m, jnp.zeros_like(m))
    nearest = jnp.where(all_free | nothing, jnp.inf, to_distance(t if ties == "fill" else t + 1))
    farthest = to_distance(bracket.most)
    out, gaps, reaches = [], [], []
    unresolved = jnp.zeros((), jnp.int32)
    for item, leaf, ids, extra, reached in zip(items, leaves, where, filled, reach, strict=True):
        ndim, at = item.param.ndim, np.array(ids, np.int32)

        def kept(leaf: selection.Leaf = leaf, extra: Any = extra, ndim: int = ndim) -> jax.Array:
            keys = leaf.keys()
            keep = keys > selection.spread_to_leaf(t, leaf, ndim)
            keep |= (keys < 0) & selection.spread_to_leaf(some, leaf, ndim)
            return keep if extra is None else keep | extra

        if distance is distances.absolute:
            gap, far_off = jnp.min(nearest[at]), jnp.max(farthest[at])
        else:
            gap, far_off = item.extent(kept())
        lost = item.unresolved(kept, gap, reached, rowwise)
        unresolved = unresolved + lost
        out.append(item.chosen(kept(), lost >> 31))
        gaps.append(jnp.where(all_free[at].all(), FREE, gap).astype(jnp.float32))
        reaches.append(far_off.astype(jnp.float32))
    shown = jnp.where(all_free, FREE, jnp.where(some, to_distance(t), jnp.inf).astype(jnp.float32))
    odd = budget.carry(total - bracket.counted)
    nonfinite = jnp.sum(jnp.where(some, odd[:, 0] * 2**16 + odd[:, 1], 0), dtype=jnp.int32)
    return _Chosen(out, gaps, reaches, shown, passes, _total(above), nonfinite, unresolved)


def _fill(
    items: list[_Ranked],
    leaves: list[selection.Leaf],
    t: jax.Array,
    lacking: jax.Array,
    rest: jax.Array,
    tied: jax.Array,
    largest: int,
    rowwise: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Takes ``rest`` of the ``tied`` entries at ``t``, in the fixed order of their positions."""
    top = 2**31 - 1
    taken = [jnp.zeros(item.param.shape, bool) for item in items]
    candidates = []
    for item, leaf in zip(items, leaves, strict=True):
        ndim = item.param.ndim

        def tie(leaf: selection.Leaf = leaf, ndim: int = ndim) -> jax.Array:
            at = leaf.keys() == selection.spread_to_leaf(t, leaf, ndim)
            return at & selection.spread_to_leaf(lacking, leaf, ndim)

        candidates.append(tie)
    passes = jnp.int32(0)
    levels = [1, 0] if largest > 2**31 else [1]
    for level in levels:
        positions = [
            leaf._replace(
                keys=lambda item=item, tie=tie, level=level: jnp.where(tie(), item.order()[level], -1)
            )
            for item, leaf, tie in zip(items, leaves, candidates, strict=True)
        ]
        none = jnp.full(t.shape, -1, jnp.int32)
        wanted = jnp.where(budget.equal(rest, tied)[:, None], 0, rest)
        bracket = selection.thresholds(
            positions,
            wanted,
            jnp.where(budget.equal(wanted, rest)[:, None], tied, 0),
            top,
            none,
            jnp.ones_like(none),
            jnp.full_like(none, top),
            float(2**40),
            rowwise,
        )
        cut = jnp.where(budget.equal(rest, tied), -1, bracket.hi)
        for i, (item, leaf) in enumerate(zip(items, positions, strict=True)):
            limit = selection.spread_to_leaf(cut, leaf, item.param.ndim)
            taken[i] |= leaf.keys() > limit
            candidates[i] = lambda leaf=leaf, limit=limit: leaf.keys() == limit
        rest = jnp.where(budget.equal(rest, tied)[:, None], 0, budget.carry(rest - bracket.above_hi))
        tied = budget.carry(bracket.above_lo - bracket.above_hi)
        passes = passes + bracket.passes
    return taken, passes
