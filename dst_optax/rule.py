"""The validated arguments of Dynamic Subset Tuning, and one step taken with them."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst_optax import distances
from dst_optax import silos as silos_lib
from dst_optax import state as state_lib
from dst_optax.project import project, project_updates
from dst_optax.select import check_ties
from dst_optax.silos import SiloPlan
from dst_optax.state import DynamicSubsetTuningState
from dst_optax.tree import are_rules, is_function, named_leaves

DEFAULT_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class SubsetRule:
    """The arguments of :func:`dst_optax.dynamic_subset_tuning`, validated.

    Trainers that set parameters themselves use :meth:`init` and :meth:`project`; the optax transform uses
    :meth:`project_updates` and keeps masks.

    Attributes:
      fraction_of_free_params: see :func:`dst_optax.dynamic_subset_tuning`, like all that follow.
      num_free_params: likewise.
      silos: likewise.
      distance: likewise.
      ties: likewise.

    Example:
      >>> import jax.numpy as jnp
      >>> rule, params = SubsetRule(0.5), jnp.zeros(5)
      >>> state = rule.init(params)
      >>> params, state = rule.project(jnp.array([0.0, 1.0, -3.0, 2.0, 0.5]), params, state)
      >>> params.tolist()
      [0.0, 0.0, -3.0, 2.0, 0.0]
    """

    fraction_of_free_params: Any = None
    num_free_params: int | None = None
    silos: silos_lib.Silos | None = None
    distance: distances.Distance | None = None
    ties: str = "strict"

    def __post_init__(self):
        check_ties(self.ties)
        if self.distance is not None and not callable(self.distance):
            raise TypeError(
                f"distance: got {self.distance!r}; it must be a function, for example distances.relative."
            )
        if self.distance is not None and not isinstance(self.distance, Hashable):
            raise TypeError(
                f"distance: {self.distance!r} cannot be hashed, by which jax knows compiled programs; make "
                "it a function or a frozen dataclass."
            )
        _check_budget(self.fraction_of_free_params, self.num_free_params)

    @property
    def fraction(self) -> Any:
        """The fraction in effect; None where a number of parameters takes its place."""
        if self.fraction_of_free_params is None and self.num_free_params is None:
            return DEFAULT_FRACTION
        return self.fraction_of_free_params

    @property
    def at_run_time(self) -> bool:
        """Whether the fraction is known at each step only."""
        return is_function(self.fraction) or isinstance(self.fraction, jax.Array)

    def plan(self, params: Any) -> SiloPlan:
        """Silos and budgets for given parameters; no budgets where they are known at run time only."""
        fraction = None if self.at_run_time else self.fraction
        plan = silos_lib.make_plan(params, self.silos, fraction, self.num_free_params)
        return plan.canonical()

    def init(self, params: Any) -> DynamicSubsetTuningState:
        """The state of a trainer, without a mask: the parameters themselves show the subset."""
        return self.new_state(params, with_mask=False)

    def new_state(self, params: Any, *, with_mask: bool = True) -> DynamicSubsetTuningState:
        """The state before the first step."""
        if is_function(self.fraction):
            first = jnp.asarray(self.fraction(jnp.zeros((), jnp.int32)))
            silos_lib.check_scalar(first, "fraction_of_free_params")
        return state_lib.init(self.plan(params), params, with_mask=with_mask)

    def project(
        self, proposed: Any, params: Any, state: DynamicSubsetTuningState
    ) -> tuple[Any, DynamicSubsetTuningState]:
        """The optimizer's proposal inside the subset, exactly the seed outside of it.

        Args:
          proposed: pytree of arrays, what the optimizer would set the parameters to.
          params: pytree of arrays, the parameters before the step: the seed, if this is the first one.
          state: the state.

        Returns:
          The new parameters, and the new state.
        """
        plan, state = self._plan_and_capture(proposed, state, params)
        # a frozen leaf is its own seed, and a free one needs none
        seeds = iter(jax.tree.leaves(state.seed))
        ranked = set(plan.ranked)
        leaves, treedef = jax.tree.flatten(params)
        seed = treedef.unflatten([next(seeds) if i in ranked else p for i, p in enumerate(leaves)])
        projection = project(
            plan,
            proposed,
            seed,
            budgets=plan.budgets_at(state.step, self.fraction),
            memory=state.memory,
            distance=self.distance,
            ties=self.ties,
        )
        return projection.params, state._replace(step=state.step + 1, memory=projection.memory)

    def project_updates(
        self, updates: Any, params: Any, state: DynamicSubsetTuningState
    ) -> tuple[Any, DynamicSubsetTuningState]:
        """The same, spelled as updates; the new state holds the subset as a mask."""
        plan, state = self._plan_and_capture(updates, state, params)
        proposed, treedef = jax.tree.flatten(updates)
        projected, masks, memory = project_updates(
            plan,
            proposed,
            [jnp.asarray(p) for p in jax.tree.leaves(params)],  # numpy's float64 may be float32 here
            jax.tree.leaves(state.seed),
            plan.budgets_at(state.step, self.fraction),
            state.memory,
            self.distance,
            self.ties,
        )
        mask = jax.tree.structure(state.seed).unflatten(masks)
        return treedef.unflatten(projected), state._replace(mask=mask, step=state.step + 1, memory=memory)

    def _plan_and_capture(
        self, updates: Any, state: DynamicSubsetTuningState, params: Any
    ) -> tuple[SiloPlan, DynamicSubsetTuningState]:
        _refuse_parts(params, updates)
        plan = self.plan(params)
        state_lib.check_structure(plan, updates, state, params)
        leaves = jax.tree.leaves(params)
        return plan, state_lib.capture(state, [leaves[i] for i in plan.ranked])


def _refuse_parts(params: Any, updates: Any) -> None:
    """Raises inside ``shard_map`` where each device would budget its part of a tensor."""
    for path, p in named_leaves(params, is_leaf=lambda x: False):
        if axes := _varying_axes(p):
            raise ValueError(
                f"parameter {path!r} is split over the mesh axes {axes} inside shard_map, and "
                "budgets count whole tensors: update outside of shard_map, under jit alone, or replicate the "
                "parameters over these axes."
            )
    for path, u in named_leaves(updates, is_leaf=lambda x: False):
        if axes := _varying_axes(u):
            raise ValueError(
                f"the update of {path!r} differs over the mesh axes {axes} inside shard_map, and the "
                "parameter does not: average the gradients first, jax.lax.pmean(grads, axes)."
            )


def _varying_axes(x: Any) -> list[str]:
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)  # jax >= 0.9; ``vma`` before
    return sorted(manual.varying if manual is not None else getattr(aval, "vma", ()))


def _check_budget(fraction: Any, num_free_params: int | None) -> None:
    if num_free_params is not None:
        if fraction is not None:
            raise ValueError(
                f"got both fraction_of_free_params={fraction!r} and num_free_params={num_free_params!r}; "
                "give one of them."
            )
        if isinstance(num_free_params, bool) or not isinstance(num_free_params, int | np.integer):
            raise TypeError(f"num_free_params: expected an int, got {num_free_params!r}.")
        if num_free_params < 0:
            raise ValueError(f"num_free_params: got {num_free_params}; it must be 0 or more.")
    elif fraction is None or is_function(fraction):
        return
    elif isinstance(fraction, jax.Array):
        silos_lib.check_scalar(fraction, "fraction_of_free_params")
    elif are_rules(fraction):
        for pattern, value in fraction:
            silos_lib.check_fraction(value, f"fraction_of_free_params for the pattern {pattern!r}")
    else:
        for path, value in named_leaves(fraction):
            where = f" for {path!r}" if path else ""
            silos_lib.check_fraction(value, f"fraction_of_free_params{where}")
