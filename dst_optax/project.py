"""Dynamic Subset Tuning as a projection: the method.

At every step the optimizer proposes new values for all parameters. The proposal is projected onto the set
of models that differ from the seed in at most m entries of each silo:

    delta  = d(seed, proposed, seed)              the distance that an entry is taken back if it is reverted
    q      = the (1 - fraction) quantile of delta in every silo
    params = where(delta > q, proposed, seed)     the costliest entries are kept

Of the n entries of a silo, ``m = ceil(fraction * (n - 1))`` lie above q unless distances tie there. Entries
that are NaN or infinite are kept beside these, so that they are seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_optax import distances
from dst_optax.counts import Counts
from dst_optax.floats import add, difference
from dst_optax.select import Proposal, check_ties, choose
from dst_optax.silos import SiloPlan
from dst_optax.state import Memory, new_memory
from dst_optax.tree import paths


class Projection(NamedTuple):
    """What :func:`project` returns."""

    params: Any  # pytree of arrays: the projected parameters
    mask: Any  # same structure, bool: where they may differ from the seed
    memory: Memory  # for the next step


def project(
    plan: SiloPlan,
    proposed: Any,
    seed: Any,
    *,
    budgets: Counts | None = None,
    memory: Memory | None = None,
    distance: distances.Distance | None = None,
    ties: str = "strict",
) -> Projection:
    """Keeps the proposed entries that lie farthest from the seed; all others return to it.

    For trainers that set parameters themselves; in an optax pipeline
    :func:`dst_optax.dynamic_subset_tuning` does the same to updates.

    Args:
      plan: silos and budgets, see :func:`dst_optax.silos.make_plan`.
      proposed: pytree of floating-point arrays, the optimizer's parameters after its step.
      seed: pytree of arrays of the same shapes and dtypes.
      budgets: entries that each silo may free, where they change from step to step, see
        :meth:`dst_optax.silos.SiloPlan.budgets_at`; None takes the plan's.
      memory: what the last step learned. It makes the search shorter and changes no result.
      distance: component-wise ``d(theta, theta_hat, theta_seed)``; None means absolute.
      ties: "strict" or "fill", see :func:`dst_optax.dynamic_subset_tuning`.

    Returns:
      Projected parameters, mask and memory.

    Raises:
      ValueError: shapes or dtypes differ, or the plan was made for other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import silos
      >>> from dst_optax.project import project
      >>> seed, proposed = jnp.zeros(5), jnp.array([0.0, 1.0, -3.0, 2.0, 0.5])
      >>> project(silos.make_plan(seed, None, 0.5), proposed, seed).params.tolist()
      [0.0, 0.0, -3.0, 2.0, 0.0]
    """
    check_ties(ties)
    values, treedef = jax.tree.flatten(proposed)
    seeds = jax.tree.leaves(seed)
    _check(plan, values, seeds)
    _check_order(plan, proposed, seed)
    free = [x for x, leaf in zip(values, plan.leaves, strict=True) if plan.is_free(leaf)]
    choice = choose(
        plan,
        distance,
        ties,
        [Proposal(values[i]) for i in plan.ranked],
        [seeds[i] for i in plan.ranked],
        plan.budgets_at() if budgets is None else budgets,
        new_memory(len(plan.sizes)) if memory is None else memory,
    )
    masks = [jnp.full(leaf.shape, plan.is_free(leaf)) for leaf in plan.leaves]
    params = [x if plan.is_free(leaf) else s for leaf, x, s in zip(plan.leaves, values, seeds, strict=True)]
    for i, mask, x in zip(plan.ranked, choice.masks, choice.steps, strict=True):
        masks[i], params[i] = mask, jnp.where(mask, x, seeds[i])
    memory = _with_nonfinite(choice.memory, free)
    return Projection(treedef.unflatten(params), treedef.unflatten(masks), memory)


def project_updates(
    plan: SiloPlan,
    updates: list[jax.Array],
    params: list[jax.Array],
    seeds: list[jax.Array],
    budgets: Counts,
    memory: Memory,
    distance: distances.Distance | None,
    ties: str,
) -> tuple[list[jax.Array], list[jax.Array], Memory]:
    """The same projection of ``params + updates``, expressed as updates.

    Args:
      plan: silos and budgets.
      updates: proposed updates of all leaves, in any floating-point dtype.
      params: all leaves.
      seeds: seeds of the leaves ``plan.ranked``, which are neither free nor frozen at every step.
      budgets: entries that each silo may free, (silos,).
      memory: what the last step learned.
      distance: component-wise distance; None means absolute.
      ties: "strict" or "fill".

    Returns:
      Updates of all leaves (as proposed where an entry is kept, ``seed - params`` elsewhere), masks of
      the leaves ``plan.ranked``, and the memory for the next step.
    """
    free = [add(p, u) for p, u, leaf in zip(params, updates, plan.leaves, strict=True) if plan.is_free(leaf)]
    proposals = [Proposal(updates[i], jnp.asarray(params[i])) for i in plan.ranked]
    choice = choose(plan, distance, ties, proposals, seeds, budgets, memory)
    out = [
        jnp.full_like(u, -0.0) if plan.is_frozen(leaf) else u  # -0.0 changes no bit of what it is added to
        for u, leaf in zip(updates, plan.leaves, strict=True)
    ]
    for i, mask, u, seed in zip(plan.ranked, choice.masks, choice.steps, seeds, strict=True):
        out[i] = jnp.where(mask, u, difference(seed, params[i], u.dtype))
    return out, choice.masks, _with_nonfinite(choice.memory, free)


def _with_nonfinite(memory: Memory, free: list[jax.Array]) -> Memory:
    """The memory, with what is NaN or infinite where all is free at every step and nothing competes."""
    counts = [jnp.sum(~jnp.isfinite(x), dtype=jnp.float32) for x in free]
    number = sum(counts, start=memory.diagnostics.num_nonfinite)
    return memory._replace(diagnostics=memory.diagnostics._replace(num_nonfinite=number))


def _check_order(plan: SiloPlan, proposed: Any, seed: Any) -> None:
    """Raises if leaves of the same paths would be matched by another order."""
    orders = {"the proposed values": paths(proposed), "the seed": paths(seed)}
    planned = [leaf.path for leaf in plan.leaves]
    for name, order in orders.items():
        if order != planned and sorted(order) == sorted(planned):
            raise ValueError(
                f"project: {name} are in the order {order[:4]}, the plan's leaves in the order "
                f"{planned[:4]}; make all of the same containers."
            )


def _check(plan: SiloPlan, proposed: list[Any], seeds: list[Any]) -> None:
    if not len(proposed) == len(seeds) == len(plan.leaves):
        raise ValueError(
            f"project got {len(proposed)} proposed tensors and {len(seeds)} of the seed for a plan of "
            f"{len(plan.leaves)}; they must be those of one model."
        )
    for leaf, x, s in zip(plan.leaves, proposed, seeds, strict=True):
        for name, array in (("the proposed value", x), ("the seed", s)):
            if (array.shape, array.dtype.name) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"project: {name} of {leaf.path!r} is {array.dtype}{list(array.shape)}, the plan says "
                    f"{leaf.dtype}{list(leaf.shape)}."
                )
