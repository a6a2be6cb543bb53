"""Leaves of a pytree by path: once, for parameters, states, models and files."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import optax


def is_masked(x: Any) -> bool:
    """Whether ``x`` marks a place that a wrapper such as ``optax.masked`` has taken out."""
    return isinstance(x, optax.MaskedNode)


def leaf_path(key_path: Any) -> str:
    """A key path of jax as ``a/b/c``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] = is_masked) -> list[tuple[str, Any]]:
    """Leaves with their paths, in the order of ``jax.tree.leaves``.

    The array in a flax variable (or in a box around partitioned parameters) has the variable's path:
    nnx shows the same parameters with and without their variables.

    Args:
      tree: any pytree.
      is_leaf: what else is a leaf; ``optax.MaskedNode`` unless told otherwise.

    Returns:
      Pairs of path and leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> [path for path, _ in named_leaves({"attn": {"query": 1.0, "value": 2.0}})]
      ['attn/query', 'attn/value']
    """
    named = []
    for key_path, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: _is_box(x) or is_leaf(x))[
        0
    ]:
        if not _is_box(x):
            named.append((leaf_path(key_path), x))
            continue
        for inner, leaf in jax.tree_util.tree_flatten_with_path(x, is_leaf=is_leaf)[0]:
            named.append((leaf_path((*key_path, *inner[1:])), leaf))
    return named


def paths(tree: Any) -> list[str]:
    """The paths of ``jax.tree.leaves(tree)``."""
    return [path for path, _ in named_leaves(tree, is_leaf=lambda x: False)]


def map_named(change: Callable[[str, Any], Any], tree: Any) -> Any:
    """The pytree with ``change(path, leaf)`` in place of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([change(path, x) for path, x in zip(paths(tree), leaves, strict=True)])


def first_match(rules: Sequence[tuple[str, Any]], path: str, owner: str) -> Any:
    """The value of the first rule whose regex is found in ``path``.

    Args:
      rules: ``(regex, value)`` pairs.
      path: a leaf path.
      owner: whose rules these are, for the error.

    Returns:
      The value.

    Raises:
      ValueError: no rule matches.

    Example:
      >>> first_match([("bias$", 0.0), (".*", 0.1)], "layer/kernel", "fractions")
      0.1
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise ValueError(
        f"{owner}: no rule matches the parameter {path!r}; rules are {[p for p, _ in rules]}. "
        "Add a rule for it, for example a last one with the pattern '.*'."
    )


def compiled(pattern: str) -> re.Pattern:
    """The regex, or a ValueError that names it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}.") from error


def are_rules(x: Any) -> TypeGuard[Sequence[tuple[str, Any]]]:
    """Whether ``x`` is a sequence of ``(regex, value)`` pairs."""
    return (
        isinstance(x, Sequence)
        and not isinstance(x, str)
        and len(x) > 0
        and all(
            isinstance(rule, Sequence)
            and not isinstance(rule, str)
            and len(rule) == 2
            and isinstance(rule[0], str)
            for rule in x
        )
    )


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether ``x`` is there to be called; modules of equinox and flax are pytrees, though they can be."""
    return callable(x) and (isinstance(x, functools.partial) or jax.tree_util.all_leaves([x]))


def by_prefix(prefix: Any, path: str, owner: str) -> Any:
    """The value for a leaf in a pytree of values that has the leaves' structure, or a prefix of it.

    Where one name begins with another, as haiku's ``mlp`` and ``mlp/~/linear_0`` do, the longer one wins.

    Args:
      prefix: pytree of values.
      path: a leaf path.
      owner: whose values these are, for the error.

    Returns:
      The value.

    Raises:
      ValueError: there is none for the leaf.

    Example:
      >>> by_prefix({"embed": 0.0, "layers": 0.1}, "layers/0/kernel", "fractions")
      0.1
    """
    named = named_leaves(prefix)
    above = [(name, value) for name, value in named if name in ("", path) or path.startswith(f"{name}/")]
    if above:
        return max(above, key=lambda pair: len(pair[0]))[1]
    raise ValueError(
        f"{owner}: the pytree has no value for the parameter {path!r}; it has {[name for name, _ in named]}."
    )


def check_prefix(prefix: Any, paths: Sequence[str], owner: str) -> None:
    """Raises if a pytree for :func:`by_prefix` has a value that is for no leaf, nor for a part of one."""

    def meet(name: str, path: str) -> bool:
        return name in ("", path) or path.startswith(f"{name}/") or name.startswith(f"{path}/")

    for name, _ in named_leaves(prefix):
        if paths and not any(meet(name, path) for path in paths):
            hint = " If it is to be called at every step, wrap it in a function." if callable(prefix) else ""
            raise ValueError(
                f"{owner}: the pytree has a value for {name!r}, which the parameters lack; the paths are "
                f"{', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}.{hint}"
            )


def _is_box(x: Any) -> bool:
    """Whether ``x`` is a flax variable or partitioning box; asked by name, since flax is no requirement."""
    return any(
        c.__name__ in ("Variable", "AxisMetadata") and c.__module__.startswith("flax.")
        for c in type(x).__mro__
    )
