"""What is compared: one method a file, all of the same small interface.

A method says which parameters are tuned, which optimizer moves them and what of them a checkpoint
must hold beside the seed model. The trainer knows no method by name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax

from dst_optax.finetuning.models.base import LanguageModel

Params = Any
SaveModel = Callable[[Path, Params], None]  # writes a whole model


class Method(Protocol):
    """A way of fine-tuning."""

    def split(self, seed: Params, key: jax.Array, model: LanguageModel) -> tuple[Params, Params]:
        """Parts the seed model into what stays and what is tuned, e.g. ``({}, seed)``.

        Args:
          seed: parameters of the seed model, or of where training starts from instead.
          key: randomness, for methods that add parameters.
          model: whose parameters they are; which of them are matrices, and where prompts come from.

        Returns:
          Frozen parameters and tuned ones.
        """
        ...

    def init(self, seed: Params, tuned: Params) -> Any:
        """The optimizer's state before the first step.

        Args:
          seed: parameters of the seed model; ``tuned`` may already differ from it.
          tuned: tuned parameters.
        """
        ...

    def merge(self, frozen: Params, tuned: Params) -> Params:
        """The parameters that the network runs with; differentiable in ``tuned``."""
        ...

    def update(self, grads: Params, state: Any, tuned: Params) -> tuple[Params, Any]:
        """The tuned parameters and the optimizer's state after a step."""
        ...

    def mark(self, tuned: Params, state: Any) -> Any:
        """What :meth:`metrics` wants to know of the parameters before a step; masks, or nothing."""
        ...

    def metrics(self, tuned: Params, state: Any, before: Any) -> dict[str, jax.Array]:
        """Scalars to log after a step.

        Args:
          tuned: tuned parameters.
          state: the optimizer's state.
          before: what :meth:`mark` said before the step.

        Returns:
          ``free_params``, the parameters that differ from the seed or were added, and more.
        """
        ...

    def export(self, directory: Path, seed: Params, tuned: Params, state: Any, save_model: SaveModel) -> None:
        """Writes the tuned model as small as the method allows.

        Args:
          directory: where to.
          seed: parameters of the seed model.
          tuned: tuned parameters.
          state: the optimizer's state.
          save_model: writes a whole model.
        """
        ...

    def save(self, directory: Path, seed: Params, tuned: Params, state: Any) -> None:
        """Writes the tuned model and the optimizer's state, but nothing that the seed holds."""
        ...

    def load(self, directory: Path, seed: Params, tuned: Params, state: Any) -> tuple[Params, Any]:
        """Reads what :meth:`save` wrote.

        Args:
          directory: where it lies.
          seed: parameters of the seed model.
          tuned: tuned parameters of the right shapes, dtypes and shardings.
          state: likewise the optimizer's state.

        Returns:
          Tuned parameters and state.
        """
        ...
