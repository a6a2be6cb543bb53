"""What methods have in common: tuning the seed's own parameters, and plain optimizers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dst_optax.finetuning import storage
from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.models.base import LanguageModel


class InPlace:
    """Methods that tune the seed's own parameters and add none."""

    def split(self, seed: Params, key: jax.Array, model: LanguageModel) -> tuple[Params, Params]:  # noqa: D102
        del key, model
        return {}, seed

    def merge(self, frozen: Params, tuned: Params) -> Params:  # noqa: D102
        del frozen
        return tuned


@dataclass(frozen=True)
class Plain:
    """Methods whose tuned parameters are all free and moved by a plain optimizer.

    Attributes:
      optimizer: any optax optimizer.
    """

    optimizer: optax.GradientTransformation

    def init(self, seed: Params, tuned: Params) -> Any:  # noqa: D102
        del seed
        return self.optimizer.init(tuned)

    def update(self, grads: Params, state: Any, tuned: Params) -> tuple[Params, Any]:  # noqa: D102
        updates, state = self.optimizer.update(grads, state, tuned)
        return optax.apply_updates(tuned, updates), state

    def mark(self, tuned: Params, state: Any) -> None:  # noqa: D102
        del tuned, state

    def metrics(self, tuned: Params, state: Any, before: None) -> dict[str, jax.Array]:  # noqa: D102
        del state, before
        return {"free_params": jnp.float32(sum(x.size for x in jax.tree.leaves(tuned)))}

    def save(self, directory: Path, seed: Params, tuned: Params, state: Any) -> None:  # noqa: D102
        del seed
        storage.save_tree(directory / "tuned", tuned)
        storage.save_tree(directory / "slots", state)

    def load(self, directory: Path, seed: Params, tuned: Params, state: Any) -> tuple[Params, Any]:  # noqa: D102
        del seed
        return storage.load_tree(directory / "tuned", tuned), storage.load_tree(directory / "slots", state)
