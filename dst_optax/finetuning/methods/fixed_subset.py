"""A subset that is chosen once: what Dynamic Subset Tuning is without its movement."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dst_optax
from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.methods.dst import DST


class FixedState(NamedTuple):
    """State of :class:`FixedSubset`."""

    optimizer: Any  # the optimizer's state
    dst: Any  # the seed, and the budget's last selection
    mask: Any  # bool, like the parameters: the subset
    step: jax.Array  # int32, ()


@dataclass(frozen=True)
class FixedSubset(DST):
    """Tunes the subset that Dynamic Subset Tuning has after a few steps.

    Attributes:
      optimizer: any optax optimizer.
      fraction_of_free_params: see :class:`DST`, like all up to ``ties``.
      num_free_params: likewise.
      silos: likewise.
      distance: likewise.
      ties: likewise.
      dynamic_steps: steps until the subset stays. With a learning rate that warms up from 0, nothing
        moves in the first one: the subset stays after the first later step in which something did.
    """

    dynamic_steps: int = 1

    def init(self, seed: Params, tuned: Params) -> FixedState:  # noqa: D102
        dst = dst_optax.reseed(self.rule.init(tuned), seed)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), tuned)
        return FixedState(self.optimizer.init(tuned), dst, nothing, jnp.zeros((), jnp.int32))

    def candidates(self, proposed: Params, tuned: Params, step: jax.Array) -> Params:
        """The values that the subset is chosen by."""
        del tuned, step
        return proposed

    def update(self, grads: Params, state: FixedState, tuned: Params) -> tuple[Params, FixedState]:  # noqa: D102
        updates, slots = self.optimizer.update(grads, state.optimizer, tuned)
        proposed = optax.apply_updates(tuned, updates)

        def choose(dst: Any, mask: Any) -> tuple[Any, Any, Any]:
            del mask
            chosen, dst = self.rule.project(self.candidates(proposed, tuned, state.step), tuned, dst)
            return chosen, dst, dst_optax.subset_mask(chosen, dst)

        def stay(dst: Any, mask: Any) -> tuple[Any, Any, Any]:
            return tuned, dst, mask

        is_chosen = jax.tree.reduce(jnp.logical_or, jax.tree.map(jnp.any, state.mask))
        stays = (state.step >= self.dynamic_steps) & is_chosen
        outside, dst, mask = jax.lax.cond(stays, stay, choose, state.dst, state.mask)
        tuned = jax.tree.map(jnp.where, mask, proposed, outside)
        return tuned, FixedState(slots, dst, mask, state.step + 1)
