"""Full fine-tuning: every parameter is free."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.methods.base import InPlace, Plain


@dataclass(frozen=True)
class Full(InPlace, Plain):
    """Tunes the whole model.

    Attributes:
      optimizer: any optax optimizer.
    """

    def export(  # noqa: D102
        self,
        directory: Path,
        seed: Params,
        tuned: Params,
        state: Any,
        save_model: Callable[[Path, Params], None],
    ) -> None:
        del seed, state
        save_model(directory, tuned)
