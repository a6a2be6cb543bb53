"""Dynamic Subset Tuning: a small, moving subset of the parameters is free."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dst_optax
from dst_optax import diagnostics, distances, subset
from dst_optax import silos as silos_lib
from dst_optax.finetuning import processes, storage
from dst_optax.finetuning.methods import Params, SaveModel
from dst_optax.finetuning.methods.base import InPlace
from dst_optax.finetuning.models.base import STACKED
from dst_optax.rule import SubsetRule
from dst_optax.state import DynamicSubsetTuningState, map_states, states

# every tensor, and every layer of one that holds all of them; models need not be stacked
BY_LAYER = replace(silos_lib.per_tensor(STACKED), patterns=())


class DSTState(NamedTuple):
    """State of :class:`DST`."""

    optimizer: Any  # the optimizer's state
    dst: DynamicSubsetTuningState


@dataclass(frozen=True)
class DST(InPlace):
    """Tunes a subset that is chosen anew at each step.

    Attributes:
      optimizer: any optax optimizer.
      fraction_of_free_params: see :func:`dst_optax.dynamic_subset_tuning`, like all that follow.
      num_free_params: likewise.
      silos: likewise, but None makes every layer of stacked parameters a silo, too.
      distance: likewise.
      ties: likewise.
    """

    optimizer: optax.GradientTransformation
    fraction_of_free_params: Any = None
    num_free_params: int | None = None
    silos: silos_lib.Silos | None = None
    distance: distances.Distance | None = None
    ties: str = "strict"

    @property
    def rule(self) -> SubsetRule:
        """What keeps the subset within its budget."""
        silos = self.silos or BY_LAYER
        try:
            return SubsetRule(
                self.fraction_of_free_params, self.num_free_params, silos, self.distance, self.ties
            )
        except TypeError as e:  # of what a gin file says
            raise ValueError(str(e)) from e

    def init(self, seed: Params, tuned: Params) -> Any:  # noqa: D102
        return DSTState(self.optimizer.init(tuned), dst_optax.reseed(self.rule.init(tuned), seed))

    def update(self, grads: Params, state: Any, tuned: Params) -> tuple[Params, Any]:  # noqa: D102
        updates, slots = self.optimizer.update(grads, state.optimizer, tuned)
        proposed = optax.apply_updates(tuned, updates)
        tuned, dst = self.rule.project(proposed, tuned, state.dst)
        return tuned, DSTState(slots, dst)

    def mark(self, tuned: Params, state: Any) -> Any:  # noqa: D102
        return dst_optax.subset_mask(tuned, state)

    def metrics(self, tuned: Params, state: Any, before: Any) -> dict[str, jax.Array]:  # noqa: D102
        metrics = diagnostics.metrics(state, tuned)
        moved = diagnostics.overlap(before, dst_optax.subset_mask(tuned, state))
        thresholds = jnp.concatenate([s.memory.threshold for s in states(state)])
        return {
            "threshold_min": thresholds.min(),
            "threshold_median": jnp.median(thresholds),
            "threshold_max": thresholds.max(),
            "free_params": metrics["subset_size"],
            "churn": 1.0 - moved["overlap"],
            **{name: metrics[name] for name in ("budget", "passes", "num_nonfinite")},
        }

    def export(self, directory: Path, seed: Params, tuned: Params, state: Any, save_model: SaveModel) -> None:  # noqa: D102
        del save_model
        _save_subset(directory, seed, tuned, state)

    def save(self, directory: Path, seed: Params, tuned: Params, state: Any) -> None:  # noqa: D102
        _save_subset(directory, seed, tuned, state)
        storage.save_tree(directory / "slots", map_states(lambda s: s._replace(seed=None), state))

    def load(self, directory: Path, seed: Params, tuned: Params, state: Any) -> tuple[Params, Any]:  # noqa: D102
        seeds = [s.seed for s in states(state)]
        bare = map_states(lambda s: s._replace(seed=None), state)
        restored = storage.load_tree(directory / "slots", bare)
        remaining = iter(seeds)
        filled = map_states(lambda s: s._replace(seed=storage.pick(seed, next(remaining))), restored)
        patched = subset.Subset.load(directory / "subset").apply(seed)
        return storage.pick(patched, tuned), filled


def _save_subset(directory: Path, seed: Params, tuned: Params, state: Any) -> None:
    extracted = subset.extract(tuned, state, seed=seed)
    if processes.is_primary():
        extracted.save(directory / "subset")
