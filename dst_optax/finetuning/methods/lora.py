"""LoRA: every weight matrix is the seed's plus a product of two thin ones.

The library qwix also does LoRA, by wrapping the network's methods so that each layer adds its product.
Here methods only know parameters, and merging them is one line: the network, decoding and export stay as
they are, ranks may differ from matrix to matrix, and a zero product is the seed model exactly.

References:
  Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dst_optax.finetuning import storage
from dst_optax.finetuning.methods import Params, SaveModel
from dst_optax.finetuning.methods.base import Plain
from dst_optax.finetuning.models.base import LanguageModel, flatten, unflatten


@dataclass(frozen=True)
class LoRA(Plain):
    r"""Tunes :math:`A` and :math:`B` of :math:`W + \frac{\alpha}{r} A B`; :math:`B` starts at 0.

    Attributes:
      optimizer: any optax optimizer.
      rank: :math:`r`, of all matrices of the layers.
      num_free_params: entries of all :math:`A` and :math:`B` together, instead of ``rank``; see
        :func:`ranks`.
      alpha: :math:`\alpha`.
    """

    rank: int = 8
    num_free_params: int | None = None
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: rank is {self.rank!r}; it must be an integer of at least 1.")

    def split(self, seed: Params, key: jax.Array, model: LanguageModel) -> tuple[Params, Params]:  # noqa: D102
        flat = flatten(seed)
        shapes = {path: flat[path].shape for path in model.matrices(flat)}
        if not shapes:
            raise ValueError(
                f"LoRA: {type(model).__name__} has no matrices among {', '.join(list(flat)[:5])}."
            )
        chosen = ranks(shapes, self.num_free_params, self.rank)
        keys = jax.random.split(key, len(chosen))
        tuned = {}
        for (path, rank), matrix_key in zip(chosen.items(), keys, strict=True):
            (rows, *stack, columns), dtype = shapes[path], flat[path].dtype
            a = jax.random.normal(matrix_key, (rows, *stack, rank), dtype) * rows**-0.5
            tuned[path] = {"a": a, "b": jnp.zeros((*stack, rank, columns), dtype)}
        return seed, tuned

    def merge(self, frozen: Params, tuned: Params) -> Params:  # noqa: D102
        flat = flatten(frozen)
        for path, pair in tuned.items():
            a, b = pair["a"], pair["b"]
            flat[path] = flat[path] + self.alpha / a.shape[-1] * jnp.einsum("i...r,...ro->i...o", a, b)
        return unflatten(flat)

    def export(self, directory: Path, seed: Params, tuned: Params, state: Any, save_model: SaveModel) -> None:  # noqa: D102
        del seed, state, save_model
        storage.save_model(directory / "lora.safetensors", tuned)


def ranks(
    shapes: Mapping[str, tuple[int, ...]], num_free_params: int | None, rank: int = 8
) -> dict[str, int]:
    """The rank of each matrix of a model.

    A budget is spent on the same rank for all, and what is left of it on one rank more for some, so that
    as little as possible remains.

    Args:
      shapes: of the matrices by path, those first that shall get more; a stacked matrix has its layers along
        axis 1.
      num_free_params: at most so many entries; None takes ``rank`` for all.
      rank: see above.

    Returns:
      Path to rank, without matrices of rank 0.

    Raises:
      ValueError: the budget is too small for any matrix.

    Example:
      >>> ranks({"attention/query/kernel": (4, 4), "mlp/wi_0/kernel": (4, 6)}, 28)
      {'attention/query/kernel': 1, 'mlp/wi_0/kernel': 2}
    """
    if num_free_params is None:
        return dict.fromkeys(shapes, rank)
    costs = {path: (x[0] + x[-1]) * (x[1] if len(x) == 3 else 1) for path, x in shapes.items()}
    everywhere, left = divmod(num_free_params, sum(costs.values()))
    spent: dict[int, tuple[str, ...]] = {0: ()}  # the first choice of matrices that costs so much
    for path, cost in costs.items():
        more = {total + cost: (*some, path) for total, some in spent.items() if total + cost <= left}
        spent = more | spent
    extra = spent[max(spent)]
    rank_of = {path: everywhere + (path in extra) for path in shapes}
    if not any(rank_of.values()):
        raise ValueError(
            f"LoRA: {num_free_params} free parameters are too few; the smallest matrix takes "
            f"{min(costs.values())} at rank 1."
        )
    return {path: rank for path, rank in rank_of.items() if rank}
