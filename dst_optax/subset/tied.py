"""Copies of tied tensors, an embedding's for one: some checkpoints repeat them, others leave them out.

Tensors whose names differ in numbers alone are never copies: experts and layers may begin equal, too.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dst_optax.subset import trees
from dst_optax.subset.core import Subset
from dst_optax.subset.entries import Entries, same_values


def without_copies(model: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A model without the copies of its own tensors that another one leaves out.

    Args:
      model: tensors by name.
      other: the model that it is to be compared with.

    Returns:
      The tensors of ``model``; all of them, where one that ``other`` lacks is no copy.

    Example:
      >>> embedding = np.arange(6.0).reshape(2, 3)
      >>> model = {"shared.weight": embedding, "lm_head.weight": embedding.copy()}
      >>> list(without_copies(model, {"shared.weight": embedding + 1}))
      ['shared.weight']
    """
    common = {name: x for name, x in model.items() if name in other}
    copies = all(_original(name, x, common) for name, x in model.items() if name not in common)
    return common if copies else dict(model)


def for_model(subset: Subset, model: Mapping[str, Any]) -> Subset:
    """A subset with the copies of tied tensors that a model has, and without those that it leaves out.

    Args:
      subset: any.
      model: tensors by name.

    Returns:
      A subset of the same values; what is no copy is left for :meth:`Subset.check` to refuse.
    """
    common = [name for name in subset if name in model]
    present = {name: model[name] for name in common}
    leaves = {
        name: e for name, e in subset.items() if name in present or original_of(name, subset, common) is None
    }
    for name, x in model.items():
        if name not in leaves and (original := _original(name, x, present)):
            leaves[name] = subset[original]
    return Subset(leaves, dict(subset.metadata))


def original_of(name: str, subset: Subset, others: Iterable[str]) -> str | None:
    """The first of some tensors whose seed and tuned values are those of another one, which may be its copy.

    Args:
      name: of the tensor that may be a copy.
      subset: has entries of it.
      others: names of other tensors in the subset.

    Returns:
      The first of them that had the same seed and became the same tuned tensor; None where none did.

    Example:
      >>> from dst_optax import subset
      >>> seed = dict.fromkeys(["shared.weight", "lm_head.weight"], np.zeros((2, 3)))
      >>> extracted = subset.from_models(seed, {name: x + 1 for name, x in seed.items()})
      >>> original_of("lm_head.weight", extracted, ["shared.weight"])
      'shared.weight'
    """
    return next(
        (n for n in others if not _are_siblings(n, name) and _same_entries(subset[n], subset[name])), None
    )


def _original(name: str, x: Any, tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor that ``x`` is a copy of."""
    return next((n for n, y in tensors.items() if not _are_siblings(n, name) and _same(x, y)), None)


def _are_siblings(a: str, b: str) -> bool:
    """Whether names differ in numbers alone, as those of experts and layers do."""
    return re.sub(r"\d+", "0", a) == re.sub(r"\d+", "0", b)


def _same(a: Any, b: Any) -> bool:
    """Whether two matrices are equal bit for bit; a constant one is no one's copy."""
    if len(a.shape) < 2 or 0 in a.shape or tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    first, second = (trees.bits(np.asarray(x)) for x in (a, b))
    return bool((first[0] == second[0]).all() and (first == second).all() and (first != first.flat[0]).any())


def _same_entries(a: Entries, b: Entries) -> bool:
    """Whether two matrices had one seed and became one tuned tensor."""
    return (
        len(a.shape) > 1
        and (a.shape, a.dtype) == (b.shape, b.dtype)
        and a.seed_fingerprint == b.seed_fingerprint is not None
        and same_values(a, b)
    )
