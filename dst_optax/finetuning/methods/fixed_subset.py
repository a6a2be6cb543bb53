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
    """State of :func:`fixed`."""

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

    @property
    def transform(self) -> optax.GradientTransformationExtraArgs:  # noqa: D102
        return fixed(self.optimizer, self.selection, self.dynamic_steps, lambda updates, step: updates)


def fixed(
    optimizer: optax.GradientTransformation, selection: Any, dynamic_steps: int, candidates: Any
) -> optax.GradientTransformationExtraArgs:
    """Tunes a subset that stays as it is after some steps.

    Args:
      optimizer: any optax optimizer.
      selection: ``dynamic_subset_tuning(...)``, which chooses the subset.
      dynamic_steps: steps in which it is chosen.
      candidates: function of the optimizer's updates and the step: the updates that it is chosen by.

    Returns:
      The transformation; the parameters outside the subset keep the seed's bits.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> FixedState:
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), params)
        return FixedState(optimizer.init(params), selection.init(params), nothing, jnp.zeros((), jnp.int32))

    def update(updates: Params, state: FixedState, params: Params, **extra: Any) -> tuple[Params, FixedState]:
        updates, slots = optimizer.update(updates, state.optimizer, params, **extra)

        def choose(dst: Any, mask: Any) -> tuple[Any, Any, Any]:
            del mask
            kept, dst = selection.update(candidates(updates, state.step), dst, params)
            return kept, dst, dst_optax.subset_mask(dst_optax.apply_updates(params, kept, dst), dst)

        def stay(dst: Any, mask: Any) -> tuple[Any, Any, Any]:
            return jax.tree.map(jnp.zeros_like, updates), dst, mask

        chosen = jax.tree.reduce(jnp.logical_or, jax.tree.map(jnp.any, state.mask))
        stays = (state.step >= dynamic_steps) & chosen
        others, dst, mask = jax.lax.cond(stays, stay, choose, state.dst, state.mask)
        kept = jax.tree.map(jnp.where, mask, updates, others)
        return kept, FixedState(slots, dst, mask, state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
