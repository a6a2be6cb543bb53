"""Dynamic Subset Tuning as an optax transform.

:mod:`dst_optax.project` is the method; here it is an ``optax.GradientTransformation``. The optimizer before
it in the chain proposes ``params + u``. Kept entries pass u through, all others get ``seed - params``. That
difference alone does not always lead back to the seed, because ``params + (seed - params)`` rounds; so the
state holds the subset as a mask, and :func:`apply_updates` sets everything outside of it to the seed, bit for
bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dst_optax import distances
from dst_optax import silos as silos_lib
from dst_optax import state as state_lib
from dst_optax.floats import add, bits
from dst_optax.rule import SubsetRule
from dst_optax.state import DynamicSubsetTuningState, Free, Frozen, LeafState
from dst_optax.tree import is_masked, named_leaves, paths

NO_PARAMS = "dynamic_subset_tuning needs the current parameters: call tx.update(updates, state, params)."


def dynamic_subset_tuning(
    fraction_of_free_params: Any = None,
    *,
    num_free_params: int | None = None,
    silos: silos_lib.Silos | None = None,
    distance: distances.Distance | None = None,
    ties: str = "strict",
) -> optax.GradientTransformationExtraArgs:
    """Lets only a small, moving subset of the parameters differ from the seed model.

    Chain it last, after any optimizer. In a silo of n entries the budget is
    ``ceil(fraction * (n - 1))``; at every step the entries whose proposed values lie farthest from
    the seed are kept and all others return to it. Entries that are NaN or infinite are kept beside the
    budget and counted, so that they are seen. The seed is the model that the first ``update``
    sees, so parameters may be restored between ``init`` and the first step.

    Args:
      fraction_of_free_params: a number in [0, 1], an optax schedule, a traced scalar,
        ``[(regex, number), ...]`` of which the first match counts for each leaf path, or a pytree of
        numbers with the parameters' structure or a prefix of it. 0 freezes, 1 frees. Defaults to 0.1
        if ``num_free_params`` is not given either.
      num_free_params: absolute budget, shared over the silos in proportion to their sizes, instead
        of a fraction.
      silos: groups of entries that share a budget, see :mod:`dst_optax.silos`; None makes every tensor one.
      distance: component-wise ``d(theta, theta_hat, theta_seed)``, non-negative, evaluated in float32
        or wider; None means :func:`dst_optax.distances.absolute`.
      ties: "strict" keeps what lies above the threshold, so fewer than the budget when distances tie
        there; "fill" fills the budget from the tied entries in a fixed pseudo-random order.

    Returns:
      The transform. Apply its updates with :func:`dst_optax.apply_updates`.

    Raises:
      ValueError: a fraction outside [0, 1], a rule that matches nothing or a leaf that no rule
        matches, both kinds of budget, ``params=None``, a state of other parameters, or an update inside
        ``shard_map`` that sees only a part of each tensor. Fractions that are known inside ``jit`` only,
        such as a schedule's after the first step, are checked where ``checkify`` is used.
      TypeError: parameters or updates that are not floating-point arrays.

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
    rule = SubsetRule(fraction_of_free_params, num_free_params, silos, distance, ties)

    def init(params: Any) -> DynamicSubsetTuningState:
        return rule.new_state(params)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DynamicSubsetTuningState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        return rule.project_updates(updates, params, state)

    return optax.GradientTransformationExtraArgs(init, update)


def wrap(
    inner: optax.GradientTransformation,
    fraction_of_free_params: Any = None,
    *,
    num_free_params: int | None = None,
    silos: silos_lib.Silos | None = None,
    distance: distances.Distance | None = None,
    ties: str = "strict",
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(inner, dynamic_subset_tuning(...))``, in that order.

    Args:
      inner: any optimizer.
      fraction_of_free_params: see :func:`dynamic_subset_tuning`, like all that follow.
      num_free_params: likewise.
      silos: likewise.
      distance: likewise.
      ties: likewise.

    Returns:
      The chained transform.

    Example:
      >>> import dst_optax, optax
      >>> tx = dst_optax.wrap(optax.adamw(1e-4), fraction_of_free_params=0.1)
    """
    subset = dynamic_subset_tuning(
        fraction_of_free_params, num_free_params=num_free_params, silos=silos, distance=distance, ties=ties
    )
    return optax.chain(inner, subset)


def apply_updates(params: Any, updates: Any, state: Any) -> Any:
    """``params + updates`` inside the subset, exactly the seed outside of it.

    Args:
      params: current parameters.
      updates: what ``tx.update`` returned with ``state``; leaves may be missing or None where nothing
        changes.
      state: the new optimizer state, or any pytree that holds DST states of disjoint leaves, as
        ``optax.partition`` makes them.

    Returns:
      The new parameters; outside the subset they equal the seed bit for bit.

    Raises:
      ValueError: the state holds no DST state, or one of other parameters; or an update has no parameter, or
        another shape than its own.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([1.0, -5.0, 0.1]), state, params)
      >>> dst_optax.apply_updates(params, updates, state).tolist()
      [1.0, 2.5, 3.0]
    """
    moves = {path: u for path, u in named_leaves(updates) if u is not None and not is_masked(u)}
    if unknown := sorted(moves.keys() - set(paths(params))):
        raise ValueError(f"updates: {unknown[0]!r} is no parameter; pass those that tx.update returned.")

    def apply(path: str, p: Any, leaf: LeafState | None) -> Any:
        u = moves.get(path)
        if u is None or getattr(u, "dtype", None) == jax.dtypes.float0:
            return p
        if jnp.shape(u) != jnp.shape(p):
            raise ValueError(f"updates: {path!r} has the shape {jnp.shape(u)}, its parameter {jnp.shape(p)}.")
        if leaf is not None and isinstance(leaf.seed, Frozen):
            return p
        p = jnp.asarray(p)
        moved = add(p, jnp.asarray(u))
        if leaf is not None and leaf.mask is not None:
            # an update of nothing, as MultiSteps makes before the first step, must not turn -0.0 of what will
            # be the seed into 0.0
            moved = jnp.where(leaf.captured | (u != 0), moved, p)
        return _restore_outside(path, moved, leaf)

    return state_lib.map_leaf_states(apply, params, state)


def finalize(params: Any, state: Any) -> Any:
    """Sets everything outside the subset to the seed, where ``optax.apply_updates`` rounded.

    After :func:`apply_updates` nothing changes.

    Args:
      params: parameters after the last step.
      state: the optimizer state after that step.

    Returns:
      The parameters; outside the subset they equal the seed bit for bit.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(jnp.array([1.0, -5.0, 0.1]), tx.init(params), params)
      >>> dst_optax.finalize(optax.apply_updates(params, updates), state).tolist()
      [1.0, 2.5, 3.0]
    """
    return state_lib.map_leaf_states(_restore_outside, params, state)


def reseed(state: Any, params: Any) -> Any:
    """Makes ``params`` the seed by hand.

    Args:
      state: any optimizer state that holds DST states.
      params: the model that the tuned one is compared with from now on.

    Returns:
      The state with a copy of ``params`` as the seed and no memory of thresholds. Until the next update
      every entry counts as tuned, since it is not known which parameters will be.

    Raises:
      ValueError: a parameter is missing or has another shape or dtype than before.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> tx = dst_optax.wrap(optax.sgd(0.1))
      >>> state = dst_optax.reseed(tx.init(jnp.zeros(3)), jnp.ones(3))
    """
    state_lib.states(state)  # raises if there is none
    return state_lib.map_states(lambda dst: state_lib.reseed(dst, params), state)


def subset_mask(params: Any, state: Any) -> Any:
    """Entries inside the current subset whose bits differ from the seed's.

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

    def tuned(path: str, p: Any, leaf: LeafState | None) -> jax.Array:
        differs = _differs(path, p, leaf)
        return differs if leaf is None or leaf.mask is None or is_masked(leaf.mask) else differs & leaf.mask

    return state_lib.map_leaf_states(tuned, params, state)


def differing(params: Any, state: Any) -> Any:
    """Which entries differ from the seed, by their bits: of any parameters, since no mask is asked.

    Args:
      params: pytree of arrays.
      state: any optimizer state that holds DST states.

    Returns:
      Pytree of bool like ``params``, see :func:`subset_mask`.
    """
    return state_lib.map_leaf_states(_differs, params, state)


def _differs(path: str, p: Any, leaf: LeafState | None) -> jax.Array:
    del path
    if leaf is None or isinstance(leaf.seed, Free | Frozen):
        return jnp.full(jnp.shape(p), leaf is not None and isinstance(leaf.seed, Free))
    return (bits(jnp.asarray(p)) != bits(leaf.seed)) & leaf.captured


def _restore_outside(path: str, p: Any, leaf: LeafState | None) -> Any:
    """``p`` inside the subset and the seed outside; ``p`` where the state has no mask, or no seed yet."""
    del path
    if leaf is None or leaf.mask is None or isinstance(leaf.seed, Free | Frozen):
        return p
    return jnp.where(leaf.mask | ~leaf.captured, p, leaf.seed)
