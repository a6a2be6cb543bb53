"""Where the parameters lie in the checkpoint of a training run, among an optimizer's state and counters.

Known are the trees of T5X (``target``), of Flax's and Orbax's users (``params``, ``model``) and bare
parameters. An optimizer's state has the paths and shapes of the parameters, so a tree that leaves them
unclear is refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dst_optax.subset.errors import SubsetError

_OPTIMIZER = re.compile(r"opt(im(izer)?)?(_?states?)?")


def parameter_keys(tree: Any, names: Iterable[str] | None = None) -> list[str]:
    """The keys that lead from a checkpoint's root to its parameters.

    Args:
      tree: nested containers of arrays, or of what stands for them.
      names: paths of the parameters, where they are known. They settle whether ``params`` is part of the
        paths, as it is after training on linen's whole ``variables``.

    Returns:
      The keys, none for bare parameters.

    Example:
      >>> import numpy as np
      >>> w, variables = np.ones(2), {"params": {"dense": np.ones(2)}}
      >>> parameter_keys({"model": {"w": w}, "optimizer": {"mu": {"w": w}}, "step": 1})
      ['model']
      >>> parameter_keys(variables), parameter_keys(variables, ["params/dense"])
      (['params'], [])
    """
    keys: list[str] = []
    while "params" not in keys and (key := _next_key(under(tree, keys))) is not None:
        keys.append(key)
    if names is None:
        return keys
    first = {name.split("/")[0] for name in names}
    candidates = [*(keys[:depth] for depth in range(len(keys) + 1)), [*keys, "params"]]
    return next((c for c in candidates if _names(under(tree, c)) == first), keys)


def t5x_keys(tree: Any) -> list[str]:
    """The keys that lead to T5X's ``target`` and ``state``."""
    return ["optimizer"] if _is_legacy_t5x(tree) else []


def under(tree: Any, keys: Iterable[str]) -> Any:
    """What lies under the keys; None where one is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def is_optimizer(name: str) -> bool:
    """Whether a key is a usual name of an optimizer's state.

    Example:
      >>> [is_optimizer(name) for name in ("opt_state", "optimizer", "optical")]
      [True, True, False]
    """
    return _OPTIMIZER.fullmatch(name) is not None


def check(source: Any, arrays: Mapping[str, Any]) -> None:
    """Raises a SubsetError where there are no parameters, or an optimizer's state is among them."""
    for name in arrays:
        parts = name.split("/")
        twin = "/".join("nu" if part == "mu" else part for part in parts)  # Adam's moments
        if any(map(is_optimizer, parts)) or (twin != name and twin in arrays):
            raise SubsetError(
                f"{source}: {name!r} belongs to an optimizer's state, and no 'params', 'model' or 'target' "
                "beside it says where the parameters are. Save the parameters alone, or under 'params'."
            )
    if not arrays:
        raise SubsetError(f"{source} holds no parameters.")


def _next_key(tree: Any) -> str | None:
    """The key under which a level keeps the model; None where the level is the model itself."""
    if not isinstance(tree, dict):
        return None
    if "params" in tree:
        return "params"
    if _is_legacy_t5x(tree):
        return "optimizer"
    if "target" in tree and set(tree) <= {"target", "state", "flax_mutables"}:  # T5X's, no target network
        return "target"
    beside = {k for k, x in tree.items() if not is_optimizer(str(k)) and not _is_counter(x)}
    return "model" if beside == {"model"} and len(tree) > 1 else None


def _is_legacy_t5x(tree: Any) -> bool:
    return "target" in (_names(under(tree, ["optimizer"])) or ())


def _is_counter(tree: Any) -> bool:
    """Whether it has no array with an axis, as step numbers."""
    return all(getattr(x, "shape", ()) == () for x in jax.tree.leaves(tree))


def _names(tree: Any) -> set[str] | None:
    return {str(key) for key in tree} if isinstance(tree, dict) else None
