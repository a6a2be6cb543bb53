"""A random subset: what a budget alone is worth, without a choice."""

from dataclasses import dataclass

import jax
import optax

from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.methods.dst import DST
from dst_optax.finetuning.methods.fixed_subset import fixed


@dataclass(frozen=True)
class RandomSubset(DST):
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

    @property
    def transform(self) -> optax.GradientTransformationExtraArgs:  # noqa: D102
        def noise(updates: Params, step: jax.Array) -> Params:
            leaves, structure = jax.tree.flatten(updates)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self.subset_seed), step), len(leaves))
            drawn = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
            return jax.tree.unflatten(structure, drawn)

        return fixed(self.optimizer, self.selection, 1, noise)
