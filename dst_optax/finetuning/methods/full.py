"""Full fine-tuning: every parameter is free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dst_optax.finetuning.methods import Params, SaveModel
from dst_optax.finetuning.methods.base import InPlace, Plain


@dataclass(frozen=True)
class Full(InPlace, Plain):
    """Tunes the whole model.

    Attributes:
      optimizer: any optax optimizer.
    """

    def export(self, directory: Path, seed: Params, tuned: Params, state: Any, save_model: SaveModel) -> None:  # noqa: D102
        del seed, state
        save_model(directory, tuned)
