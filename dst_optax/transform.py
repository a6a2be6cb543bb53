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

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst_optax import budget, distances, projection, rounding
from dst_optax import silos as silos_lib
from dst_optax.silos import SiloPlan, leaf_path
from dst_optax.state import (
    FREE,
    DynamicSubsetTuningState,
    Free,
    Frozen,
    Place,
    check_structure,
    map_places,
    map_states,
    paths,
    places_of,
    states,
)

NO_PARAMS = "dynamic_subset_tuning needs the current parameters: call tx.update(updates, state, params)."


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
        check_structure(plan, updates, state, params)
        if plan.budgets is not None:
            budgets = jnp.asarray(budget.limbs(plan.budgets))
        else:
            now = fraction_of_free_params
            now = jnp.asarray(now(state.step) if callable(now) else now)
            budgets = budget.traced_rank(now, plan.sizes)
        update_leaves, treedef = jax.tree.flatten(updates)
        seeds = _capture(state, [jax.tree.leaves(params)[i] for i in plan.ranked])
        out, facts = projection.project(
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
        if not isinstance(place, Place):
            return rounding.add(p, u)
        return _apply_exactly(p, u, place.seed, (place.gap != FREE) & place.captured)

    return map_places(apply, params, state, updates)


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
        if not isinstance(place, Place):
            return p
        wide = rounding.wide(p.dtype)
        near = jnp.abs(p.astype(wide) - place.seed.astype(wide)) < 0.5 * place.gap.astype(wide)
        return jnp.where(near & place.captured, place.seed, p)

    return map_places(settle, params, state)


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
    by_path = dict(paths(params))

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
    return map_states(renew, state)


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
        if not isinstance(place, Place):
            return jnp.zeros(jnp.shape(p), bool)
        return (rounding.bits(jnp.asarray(p)) != rounding.bits(place.seed)) & place.captured

    return map_places(differs, params, state)


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
    places = places_of(state)

    def seed(leaf: Any, place: Any) -> Any:
        if isinstance(place, Frozen):
            return leaf
        return place.seed if isinstance(place, Place) else None

    return [(path, seed(leaf, places.get(path))) for path, leaf in paths(params)]


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


@jax.jit
def _apply_exactly(p: jax.Array, u: jax.Array, seed: jax.Array, may_ask: jax.Array) -> jax.Array:
    asked = rounding.asks_for_seed(u, seed, p) & may_ask
    return jnp.where(asked, seed, rounding.add(p, u))


def _copy(x: Any) -> jax.Array:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.array(x, copy=True)
