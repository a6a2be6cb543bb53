"""Prompt tuning: the inputs begin with a few embeddings that are trained; the model stays.

References:
  Lester et al., *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv 2104.08691.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dst_optax.finetuning import storage
from dst_optax.finetuning.methods import Params, SaveModel
from dst_optax.finetuning.methods.base import Plain
from dst_optax.finetuning.models.base import LanguageModel, flatten


@dataclass(frozen=True)
class Prompt(Plain):
    """Tunes a soft prompt, which starts as embeddings of random pieces of the vocabulary.

    Attributes:
      optimizer: any optax optimizer.
      length: embeddings of the prompt.
      num_free_params: entries of the prompt instead of ``length``; what is no whole embedding is not used.
    """

    length: int = 20
    num_free_params: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"prompt: length is {self.length!r}; it must be an integer of at least 1.")

    def split(self, seed: Params, key: jax.Array, model: LanguageModel) -> tuple[Params, Params]:  # noqa: D102
        table = flatten(seed)[model.embedding]
        pieces, width = table.shape
        length = self.length if self.num_free_params is None else self.num_free_params // width
        if self.num_free_params is not None and not length:
            raise ValueError(
                f"prompt: {self.num_free_params} free parameters are too few; an embedding takes {width}."
            )
        chosen = jax.random.choice(key, jnp.arange(1, pieces), (length,), replace=length >= pieces)
        return seed, {"prompt": table[chosen]}

    def merge(self, frozen: Params, tuned: Params) -> Params:  # noqa: D102
        return frozen | tuned

    def export(self, directory: Path, seed: Params, tuned: Params, state: Any, save_model: SaveModel) -> None:  # noqa: D102
        del seed, state, save_model
        storage.save_model(directory / "prompt.safetensors", tuned)
