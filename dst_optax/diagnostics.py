"""Numbers about a subset: its size, budget, movement and place. Pure functions, fit for jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dst_optax import silos
from dst_optax.counting import replicated
from dst_optax.state import DynamicSubsetTuningState, states
from dst_optax.transform import differing
from dst_optax.tree import named_leaves


def _count(mask: Any) -> jax.Array:
    leaves = jax.tree.leaves(mask)
    return sum((jnp.sum(x, dtype=jnp.float32) for x in leaves), start=jnp.zeros((), jnp.float32))


def metrics(
    state: Any, params: Any = None, *, previous: Any = None, plan: silos.SiloPlan | None = None
) -> dict[str, jax.Array]:
    """Scalars to log at every step.

    Args:
      state: any optimizer state that holds DST states.
      params: current parameters; adds ``subset_size``, the entries that differ from the seed.
      previous: parameters before the step; with ``params`` adds ``entered``, ``left`` and
        ``overlap``, the Jaccard index of both subsets.
      plan: the plan of :func:`dst_optax.silos.make_plan`; adds ``threshold/<silo>`` and
        ``budget/<silo>``, and with ``params`` ``subset_size/<silo>`` and ``share/<silo>``.

    Returns:
      Float32 scalars by name: ``num_free`` (entries chosen in the last step), ``budget``,
      ``num_nonfinite``, ``passes``, ``step`` and what the arguments add. Before the first step nothing
      differs from the seed but what is free at every step. Counts above 2**24 are rounded.

    Raises:
      ValueError: ``previous`` without ``params``, or the plan is not that of the state.

    Example:
      >>> import dst_optax, jax.numpy as jnp, optax
      >>> from dst_optax import diagnostics
      >>> tx = dst_optax.wrap(optax.sgd(0.1), fraction_of_free_params=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(jnp.array([1.0, -5.0, 0.1]), tx.init(params), params)
      >>> params = dst_optax.apply_updates(params, updates, state)
      >>> int(diagnostics.metrics(state, params)["subset_size"])
      1
    """
    dst_states = states(state)
    last = [s.memory.diagnostics for s in dst_states]
    out = {
        "num_free": sum(x.num_free for x in last),
        "budget": sum(x.budget for x in last),
        "num_nonfinite": sum(x.num_nonfinite for x in last),
        "passes": jnp.max(jnp.stack([x.passes for x in last])),
        "step": jnp.max(jnp.stack([s.step for s in dst_states])),
    }
    if previous is not None and params is None:
        raise ValueError("previous: pass params, too; the two are compared.")
    mask = None if params is None else differing(params, state)
    if mask is not None:
        out["subset_size"] = _count(mask)
        if previous is not None:
            out |= overlap(differing(previous, state), mask)
    if plan is not None:
        if len(dst_states) != 1:
            raise ValueError(f"a plan describes one DST state, got {len(dst_states)}.")
        _check_plan(plan, dst_states[0])
        out |= _per_silo(dst_states[0], mask, plan)
    return {name: jnp.asarray(value).astype(jnp.float32) for name, value in out.items()}


def overlap(before: Any, after: Any) -> dict[str, jax.Array]:
    """How one subset turns into another.

    Args:
      before: pytree of bool masks.
      after: pytree of bool masks of the same shapes.

    Returns:
      ``entered`` and ``left``, entries in one of them only, and ``overlap``, the Jaccard index (1 if
      both are empty).

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import diagnostics
      >>> a, b = jnp.array([True, True, False]), jnp.array([False, True, False])
      >>> {k: float(v) for k, v in diagnostics.overlap(a, b).items()}
      {'entered': 0.0, 'left': 1.0, 'overlap': 0.5}
    """
    both = _count(jax.tree.map(jnp.logical_and, before, after))
    either = _count(jax.tree.map(jnp.logical_or, before, after))
    return {
        "entered": _count(after) - both,
        "left": _count(before) - both,
        "overlap": jnp.where(either > 0, both / jnp.maximum(either, 1.0), 1.0),
    }


def _check_plan(plan: silos.SiloPlan, state: DynamicSubsetTuningState) -> None:
    """Raises if a plan is not the state's, as far as that can be told: inside jit by the number of silos."""
    same = state.memory.threshold.shape == (len(plan.sizes),)
    if same and not isinstance(state.fingerprint, Tracer):
        same = int(state.fingerprint) == plan.canonical().fingerprint
    recorded = state.memory.diagnostics.budget
    if same and plan.budgets is not None and not isinstance(recorded, Tracer) and int(state.step) > 0:
        same = abs(float(recorded) - sum(plan.budgets)) <= 1e-6 * float(recorded)  # float32
    if not same:
        raise ValueError(
            "plan: it is of other parameters, silos or fractions than the state; make it with those of the "
            "transform, silos.make_plan(params, silos, fraction), and None for a fraction that is known "
            "at run time only, such as a schedule."
        )


def _per_silo(state: Any, mask: Any, plan: silos.SiloPlan) -> dict[str, jax.Array]:
    out = {f"threshold/{name}": state.memory.threshold[i] for i, name in enumerate(plan.labels)}
    if plan.budgets is not None:
        out |= {f"budget/{name}": jnp.float32(m) for name, m in zip(plan.labels, plan.budgets, strict=True)}
    if mask is None:
        return out
    sizes = jnp.zeros(len(plan.sizes), jnp.float32)
    by_path = dict(named_leaves(mask))  # parameters outside of DST, too
    for leaf in plan.leaves:
        free = by_path[leaf.path]
        axes = tuple(i for i in range(free.ndim) if i != leaf.axis)
        counts = replicated(jnp.sum(free, axis=axes, dtype=jnp.float32))
        sizes = sizes.at[np.array(leaf.silos, np.int32)].add(jnp.atleast_1d(counts))
    total = jnp.maximum(jnp.sum(sizes), 1.0)
    for i, name in enumerate(plan.labels):
        out[f"subset_size/{name}"] = sizes[i]
        out[f"share/{name}"] = sizes[i] / total
    return out
