"""Silos: which entries compete with each other for the free places.

A silo is a set of entries with a budget of its own. Silos are disjoint and cover every parameter.
The rules here are turned, for given parameters, into a :class:`SiloPlan`: plain, static, hashable
numbers that the transform is compiled with.
"""

import dataclasses
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from dst_optax import budget
from dst_optax.counts import Counts
from dst_optax.tree import (
    are_rules,
    by_prefix,
    check_prefix,
    compiled,
    first_match,
    is_function,
    is_masked,
    named_leaves,
)

Stacked = Sequence[tuple[str, int]]
FractionRules = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Silos:
    """A rule that assigns every leaf, or every slice of a stacked leaf, to a silo.

    Attributes:
      label: maps a leaf path, and the slice index of a stacked leaf (else None), to a silo's name; or a
        pytree of names with the parameters' structure or a prefix of it.
      stacked: ``(regex, axis)`` pairs; the first that matches a path makes each slice of that axis
        an entry of its own for ``label``.
      patterns: regexes that must match at least one path.
    """

    label: Callable[[str, int | None], Any] | Any
    stacked: tuple[tuple[str, int], ...] = ()
    patterns: tuple[str, ...] = ()


def per_tensor(stacked: Stacked = ()) -> Silos:
    """Every tensor is a silo; of a stacked tensor, every slice.

    Args:
      stacked: ``(regex, axis)`` pairs for tensors that hold one layer per index of ``axis`` (as flax's
        ``nn.scan`` makes them). Such a model is tuned bit for bit like its unstacked twin.

    Returns:
      The rule, for ``dynamic_subset_tuning(silos=...)``.

    Example:
      >>> from dst_optax import silos
      >>> rule = silos.per_tensor(stacked=[("^layers/", 0)])
    """
    stacked = _checked_stacked(stacked, "per_tensor")
    return Silos(_Own, stacked, tuple(p for p, _ in stacked))


@dataclasses.dataclass(frozen=True)
class _Own:
    """The label of a silo of one tensor or slice, never equal to one that is only spelled like it."""

    path: str
    index: int | None

    def __str__(self):
        return self.path if self.index is None else f"{self.path}[{self.index}]"


def _checked_stacked(stacked: Stacked, owner: str) -> tuple[tuple[str, int], ...]:
    """Raises if these are no pairs of a regex and an axis."""
    pairs = tuple(stacked) if isinstance(stacked, Iterable) else None
    if pairs == ():
        return ()
    if not are_rules(pairs) or any(not hasattr(axis, "__index__") for _, axis in pairs):
        raise TypeError(f"silos.{owner}: stacked={stacked!r} is no list of pairs (regex, axis).")
    return tuple((pattern, operator.index(axis)) for pattern, axis in pairs)


def per_layer(pattern: str, stacked: Stacked = ()) -> Silos:
    r"""All tensors of a layer form one silo.

    Args:
      pattern: regex whose groups name the layer, for example ``r"(encoder|decoder)/layers_(\d+)"``.
        A tensor that it does not match is a silo of its own. Groups that do not take part in a match are left
        out of the name: layer 0 of ``enc_(\d+)|dec_(\d+)`` is one silo, of ``(enc|dec)_(\d+)`` two.
      stacked: ``(regex, axis)`` pairs; slice ``i`` belongs to the layer named by the groups and ``i``.

    Returns:
      The rule, for ``dynamic_subset_tuning(silos=...)``.

    Example:
      >>> from dst_optax import silos
      >>> rule = silos.per_layer(r"(encoder|decoder)/layers_(\d+)")
    """
    if not compiled(pattern).groups and not stacked:
        raise ValueError(
            f"per_layer got the pattern {pattern!r} without a group; put the part that names the layer "
            r"in parentheses, for example 'layers_(\d+)'."
        )

    stacked = _checked_stacked(stacked, "per_layer")

    def label(path: str, index: int | None) -> str | _Own:
        match = re.search(pattern, path)
        if match is None:
            return _Own(path, index)
        own = [] if index is None else [str(index)]
        return "/".join(["layer", *(g for g in match.groups() if g is not None), *own])

    return Silos(label, stacked, (pattern, *(p for p, _ in stacked)))


def per_group(groups: Callable[[str], str] | Sequence[tuple[str, str]] | Any) -> Silos:
    """Tensors with the same label form one silo.

    Args:
      groups: a function from a path to a label, ``(regex, label)`` pairs of which the first match wins,
        or a pytree of labels with the parameters' structure or a prefix of it. A path that no pair
        matches is an error.

    Returns:
      The rule, for ``dynamic_subset_tuning(silos=...)``.

    Example:
      >>> from dst_optax import silos
      >>> rule = silos.per_group([("embed", "embedding"), (".*", "rest")])
      >>> rule = silos.per_group({"embed": "embedding", "layers": "rest"})
    """
    if is_function(groups):
        return Silos(lambda path, index: groups(path))
    if are_rules(groups):
        rules = tuple(groups)
        return Silos(
            lambda path, index: first_match(rules, path, "silos.per_group"),
            patterns=tuple(p for p, _ in rules),
        )
    return Silos(groups)


def whole_model() -> Silos:
    """The whole model is one silo.

    Example:
      >>> from dst_optax import silos
      >>> rule = silos.whole_model()
    """
    return Silos(lambda path, index: "model")


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One tensor's place in the plan.

    Attributes:
      path: its path, ``a/b/c``.
      shape: its shape.
      dtype: its dtype's name.
      axis: the stacked axis, or None.
      silos: silo indices: one, or one per slice of ``axis``.
      offsets: for each of ``silos``, entries of that silo in earlier leaves.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    silos: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SiloPlan:
    """Silos and their budgets for given parameters; static and hashable.

    Attributes:
      leaves: one per tensor, in tree order.
      labels: name of each silo.
      sizes: entries of each silo.
      budgets: entries that each silo may free, or None when the fraction is known at run time only.
    """

    leaves: tuple[LeafPlan, ...]
    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    budgets: tuple[int, ...] | None

    def is_free(self, leaf: LeafPlan) -> bool:
        """Whether every entry of the leaf is free at every step, known statically."""
        full = self.budgets is not None and all(self.budgets[i] == self.sizes[i] for i in leaf.silos)
        return full and 0 not in leaf.shape

    def is_frozen(self, leaf: LeafPlan) -> bool:
        """Whether no entry of the leaf is ever free, known statically."""
        none = self.budgets is not None and all(self.budgets[i] == 0 for i in leaf.silos)
        return none or 0 in leaf.shape

    @property
    def ranked(self) -> tuple[int, ...]:
        """Indices of the leaves whose entries compete, and so need a seed."""
        return tuple(
            i for i, leaf in enumerate(self.leaves) if not self.is_free(leaf) and not self.is_frozen(leaf)
        )

    def canonical(self) -> "SiloPlan":
        """The same plan with the dtypes that JAX gives to such tensors: float32 for float64 by default."""
        return dataclasses.replace(
            self,
            leaves=tuple(
                dataclasses.replace(leaf, dtype=jax.dtypes.canonicalize_dtype(leaf.dtype).name)
                for leaf in self.leaves
            ),
        )

    def part(self, leaves: Sequence[int]) -> "SiloPlan":
        """The plan of one group of :func:`groups_that_share_silos`.

        Without the tensors' paths, so that it is the same for groups of like tensors.
        """
        ids = sorted({s for i in leaves for s in self.leaves[i].silos})
        local = {s: i for i, s in enumerate(ids)}
        kept = tuple(
            dataclasses.replace(leaf, path=f"tensor {n}", silos=tuple(local[s] for s in leaf.silos))
            for n, leaf in enumerate(self.leaves[i] for i in leaves)
        )
        budgets = None if self.budgets is None else tuple(self.budgets[s] for s in ids)
        return SiloPlan(kept, tuple(map(str, range(len(ids)))), tuple(self.sizes[s] for s in ids), budgets)

    def budgets_at(self, step: jax.Array | None = None, fraction: Any = None) -> Counts:
        """Entries that each silo may free at a step.

        Args:
          step: int32 scalar, updates so far.
          fraction: an optax schedule or a traced scalar, where the plan does not know the budgets.

        Returns:
          Budgets, (silos,).

        Raises:
          ValueError: a fraction that is no scalar, or not in [0, 1].
        """
        if self.budgets is not None:
            return Counts.of(self.budgets)
        if fraction is None:
            raise ValueError("the plan has no budgets (its fraction is known at run time only); give them.")
        now = jnp.asarray(fraction(step) if is_function(fraction) else fraction)
        check_scalar(now, "fraction_of_free_params")
        if not jnp.issubdtype(now.dtype, jnp.floating):
            now = now.astype(jnp.float32)
        return budget.traced_rank(now, self.sizes)

    @property
    def fingerprint(self) -> int:
        """32 bits over the paths, shapes, dtypes and silos (budgets may change between runs)."""
        text = repr([(leaf.path, leaf.shape, leaf.dtype, leaf.axis, leaf.silos) for leaf in self.leaves])
        text += repr(self.ranked)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def groups_that_share_silos(leaves: Sequence[LeafPlan]) -> list[list[int]]:
    """Indices of leaves that share silos, directly or through others, in order of their first leaf.

    Args:
      leaves: tensors' places in a plan.

    Returns:
      Disjoint groups that cover all leaves.
    """
    group_of: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        joined = sorted({group_of[s] for s in leaf.silos if s in group_of})
        groups[i] = [*sorted(j for g in joined for j in groups.pop(g)), i]
        for j in groups[i]:
            for s in leaves[j].silos:
                group_of[s] = i
    return sorted(groups.values())


def check_scalar(fraction: jax.Array, where: str) -> None:
    """Raises if a fraction that is an array is no scalar or, where its value is known, not in [0, 1]."""
    if fraction.shape:
        raise ValueError(f"{where}: it must be a scalar at every step, got the shape {fraction.shape}.")
    if isinstance(fraction, Tracer):
        inside = (fraction >= 0) & (fraction <= 1)
        checkify.debug_check(inside, f"{where}: the fraction must lie in [0, 1], got {{f}}", f=fraction)
    else:
        check_fraction(float(fraction), where)


def check_fraction(value: Any, where: str) -> None:
    """Raises if a concrete fraction is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(
            f"{where}: got {value!r} of type {type(value).__name__}; it must be a number, a list of (regex, "
            "number), a pytree of numbers or, for the whole model, an optax schedule or a JAX scalar (plans "
            "are made with None then)."
        )
    if not 0 <= value <= 1:
        raise ValueError(
            f"{where}: got the fraction {value!r}; it must lie in [0, 1] (0 freezes, 1 frees everything)."
        )


def make_plan(
    params: Any,
    silos: Silos | None = None,
    fraction_of_free_params: Any = 0.1,
    num_free_params: int | None = None,
) -> SiloPlan:
    """Applies silo and budget rules to parameters.

    Args:
      params: pytree of floating-point arrays or ``jax.ShapeDtypeStruct``; ``None`` and
        ``optax.MaskedNode`` are passed over.
      silos: the silo rule; None means :func:`per_tensor`.
      fraction_of_free_params: a number, ``(regex, number)`` pairs, or a pytree of numbers with the
        parameters' structure or a prefix of it; None if it is known at run time.
      num_free_params: absolute budget of all silos together, instead of a fraction.

    Returns:
      The plan.

    Raises:
      TypeError: a leaf that is not a floating-point array.
      ValueError: a rule that matches nothing, a leaf that no rule matches, a silo with two fractions,
        an axis that a stacked leaf does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import silos
      >>> plan = silos.make_plan({"a": jnp.zeros((4, 5)), "b": jnp.zeros(3)}, None, 0.1)
      >>> dict(zip(plan.labels, plan.budgets))
      {'a': 2, 'b': 1}
    """
    rule = per_tensor() if silos is None else silos
    if not isinstance(rule, Silos):
        raise TypeError(
            f"silos: got {silos!r}; use silos.per_tensor(), per_layer(...), per_group(...) or whole_model()."
        )
    named = named_leaves(params, is_leaf=lambda x: False)
    for path, leaf in named:
        _check_leaf(path, leaf)
    paths = [path for path, _ in named]
    _refuse_duplicates(paths, "parameters have the path", "rename them")
    fractions = fraction_of_free_params
    if num_free_params is not None:
        fractions = None
    patterns = list(rule.patterns)
    if are_rules(fractions):
        patterns += [p for p, _ in fractions]
    _check_patterns(patterns, paths)
    # what a wrapper has taken out, whole subtrees too, may have values
    everywhere = [path for path, _ in named_leaves(params, is_leaf=lambda x: x is None or is_masked(x))]
    for owner, values in (("fraction_of_free_params", fractions), ("silos.per_group", rule.label)):
        if values is not None and not are_rules(values) and not is_function(values):
            check_prefix(values, everywhere, owner)

    indices: dict[str | _Own, int] = {}
    sizes: list[int] = []
    per_silo: dict[int, tuple[float, str]] = {}
    leaves = []
    for path, leaf in named:
        axis = _stacked_axis(rule, path, leaf.shape)
        slices = [None] if axis is None else range(leaf.shape[axis])
        size = int(np.prod(leaf.shape, dtype=object)) // max(len(slices), 1)
        ids, offsets = [], []
        for index in slices:
            name = _label(rule, path, index)
            if not isinstance(name, str | _Own):
                raise TypeError(f"silos: the label of parameter {path!r} must be a str, got {name!r}.")
            silo = indices.setdefault(name, len(sizes))
            if silo == len(sizes):
                sizes.append(0)
            ids.append(silo)
            offsets.append(sizes[silo])
            sizes[silo] += size
            if fractions is not None:
                _assign_fraction(per_silo, silo, str(name), fractions, path)
        leaves.append(
            LeafPlan(path, tuple(leaf.shape), np.dtype(leaf.dtype).name, axis, tuple(ids), tuple(offsets))
        )
    if num_free_params is not None:
        budgets = tuple(budget.share(num_free_params, sizes))
    elif fractions is not None:
        budgets = tuple(budget.rank(per_silo[i][0], n) for i, n in enumerate(sizes))
    else:
        budgets = None
    labels = tuple(map(str, indices))
    _refuse_duplicates(labels, "silos are called", "rename the parameter or the group")
    plan = SiloPlan(tuple(leaves), labels, tuple(sizes), budgets)
    for leaf in (plan.leaves[i] for i in plan.ranked):
        if np.dtype(leaf.dtype).itemsize == 1:
            raise TypeError(
                f"parameter {leaf.path!r}: got dtype {leaf.dtype}, which is too coarse to tune single "
                "entries. Keep it in bfloat16, mask it (optax.masked), or give it the fraction 0."
            )
    return plan


def _refuse_duplicates(names: Sequence[str], they_have: str, remedy: str) -> None:
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise ValueError(f"{times} {they_have} {name!r}; {remedy}.")


def _label(rule: Silos, path: str, index: int | None) -> Any:
    return (
        rule.label(path, index) if is_function(rule.label) else by_prefix(rule.label, path, "silos.per_group")
    )


def _assign_fraction(
    per_silo: dict[int, tuple[float, str]], silo: int, name: str, fractions: Any, path: str
) -> None:
    take = first_match if are_rules(fractions) else by_prefix
    fraction = take(fractions, path, "fraction_of_free_params")
    check_fraction(fraction, f"fraction_of_free_params for {path!r}")
    other, other_path = per_silo.setdefault(silo, (fraction, path))
    if other != fraction:
        raise ValueError(
            f"fraction_of_free_params: the silo {name!r} holds {other_path!r} with fraction {other!r} and "
            f"{path!r} with fraction {fraction!r}; give all tensors of a silo the same fraction or put "
            "them in different silos."
        )


def _check_leaf(path: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise TypeError(
            f"parameter {path!r}: expected an array, got {leaf!r} of type {type(leaf).__name__}; take it "
            "out of the parameters or mask it (optax.masked)."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"parameter {path!r}: expected a floating-point array, got dtype {dtype}; a subset of such "
            "entries has no distance. Take it out of the parameters or mask it (optax.masked)."
        )
    if any(n >= 2**31 for n in leaf.shape):
        raise ValueError(
            f"parameter {path!r} of shape {tuple(leaf.shape)} has an axis of 2**31 entries or more; split it."
        )


def _check_patterns(patterns: Sequence[str], paths: Sequence[str]) -> None:
    if not paths:  # optax.tree.map_params calls init with an empty tree
        return
    for pattern in patterns:
        if not any(compiled(pattern).search(path) for path in paths):
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter; the paths are {', '.join(paths[:8])}"
                f"{', ...' if len(paths) > 8 else ''}. Correct it or take it out."
            )


def _stacked_axis(rule: Silos, path: str, shape: tuple[int, ...]) -> int | None:
    for pattern, axis in rule.stacked:
        if re.search(pattern, path):
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"parameter {path!r}: the rule ({pattern!r}, {axis}) names an axis that its shape "
                    f"{shape} does not have."
                )
            return axis % len(shape)
    return None
