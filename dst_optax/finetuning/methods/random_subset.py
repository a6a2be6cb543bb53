"""A random subset: what a budget alone is worth, without a choice."""

from dataclasses import dataclass

import jax

from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.methods.fixed_subset import FixedSubset


@dataclass(frozen=True)
class RandomSubset(FixedSubset):
    """Tunes a random subset with the same share of every silo as Dynamic Subset Tuning has.

    Attributes:
      optimizer: any optax optimizer.
      fraction_of_free_params: see :class:`DST`, like all up to ``ties``.
      num_free_params: likewise.
      silos: likewise.
      distance: likewise.
      ties: likewise.
      subset_seed: another one is another subset.
    """

    subset_seed: int = 0

    def candidates(self, proposed: Params, tuned: Params, step: jax.Array) -> Params:  # noqa: D102
        del proposed
        leaves, structure = jax.tree.flatten(tuned)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.subset_seed), step), len(leaves))
        drawn = [x + jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)
