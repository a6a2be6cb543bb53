"""Which entries are kept: distances as keys, thresholds, and ties.

Non-negative floats sort like their bits read as integers, so distances are compared as integer keys:

    key > 0     competes; in every silo those above a threshold are kept, which counting.py finds
    key = 0     equals the seed, or lies within the smallest normal number of it: never kept
    key = -1    is NaN or infinite: outside of the ranking, and kept beside the budget, to be seen
"""

import math
from collections.abc import Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from dst_optax import counting, distances
from dst_optax.counting import Count, Keys, Layout, Query, search
from dst_optax.counts import Counts, product_words
from dst_optax.floats import add, bits, force_rounding, in_memory, opaque_zero, promote
from dst_optax.silos import LeafPlan, SiloPlan
from dst_optax.state import Diagnostics, Memory, new_memory

INDEX_BITS = 31  # low bits of an entry's index that int32 holds


class Proposal(NamedTuple):
    """What an optimizer proposes for a tensor: ``base + step``, or ``step`` itself where there is no base."""

    step: jax.Array  # any shape, floats
    base: jax.Array | None = None  # same shape, the parameters' dtype

    @property
    def dtype(self) -> Any:
        """The parameters' dtype."""
        return self.step.dtype if self.base is None else self.base.dtype

    def value(self, zero: jax.Array) -> jax.Array:
        """The proposed value in the parameters' dtype, rounded to it."""
        x = self.step if self.base is None else add(self.base, self.step)
        return force_rounding(x, zero) if x.dtype.itemsize <= 2 else x


class Choice(NamedTuple):
    """Which entries are kept."""

    masks: list[jax.Array]  # bool, like the tensors
    steps: list[jax.Array]  # those of the proposals, with the bits that were ranked
    memory: Memory


def check_ties(ties: str) -> None:
    """Raises if there is no such rule for ties."""
    if ties not in ("strict", "fill"):
        raise ValueError(f"ties: got {ties!r}; it must be 'strict' or 'fill'.")


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def choose(
    plan: SiloPlan,
    distance: distances.Distance | None,
    ties: str,
    proposals: list[Proposal],
    seeds: list[jax.Array],
    budgets: Counts,
    memory: Memory,
) -> Choice:
    """Chooses the entries of every silo whose proposed values lie farthest from the seed.

    Args:
      plan: the silos.
      distance: d(theta, theta_hat, theta_seed); None means absolute.
      ties: "strict" keeps what lies above the threshold; "fill" fills the budget from the entries
        at it, in a fixed order.
      proposals: one for each of the leaves ``plan.ranked``.
      seeds: their seeds, in the parameters' dtypes.
      budgets: entries that each silo may free, (silos,).
      memory: what the last step learned; its thresholds say where to look first.

    Returns:
      The choice.

    Raises:
      ValueError: a distance that is not component-wise.
    """
    distance = distance or distances.absolute
    if not plan.ranked:
        free, nothing = budgets.sum().to_float(), new_memory(len(plan.sizes))
        diagnostics = nothing.diagnostics._replace(num_free=free, budget=free)
        return Choice([], [], nothing._replace(diagnostics=diagnostics))
    leaves = [plan.leaves[i] for i in plan.ranked]
    for leaf, proposal in zip(leaves, proposals, strict=True):
        _check_distance(distance, leaf, proposal.dtype)
    method = partial(_choose, leaves, plan.sizes, distance, ties)
    return counting.per_platform(method, max(plan.sizes), proposals, seeds, budgets, memory)


@cache
def _check_distance(distance: distances.Distance, leaf: LeafPlan, dtype: Any) -> None:
    wide = promote(dtype, jnp.float32)
    result = jax.eval_shape(distance, *[jax.ShapeDtypeStruct(leaf.shape, wide)] * 3)
    if (result.shape, result.dtype) != (leaf.shape, wide):
        raise ValueError(
            f"the distance of parameter {leaf.path!r} has shape {result.shape} and dtype {result.dtype}; it "
            f"must be component-wise, so {leaf.shape} and {wide}."
        )


class _Scale(NamedTuple):
    """The integers that distances are compared as."""

    key: Any  # dtype
    real: Any  # dtype

    @classmethod
    def of(cls, dtypes: Sequence[Any]) -> "_Scale":
        if any(dtype == jnp.float64 for dtype in dtypes):
            return cls(jnp.int64, jnp.float64)
        return cls(jnp.int32, jnp.float32)

    @property
    def binade(self) -> int:
        """How far apart the keys of x and 2 x are."""
        return 1 << jnp.finfo(self.real).nmant

    @property
    def infinity(self) -> int:
        """The largest key."""
        return (2 ** jnp.finfo(self.real).nexp - 1) * self.binade

    def to_key(self, distance: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(distance.astype(self.real), self.key)

    def to_distance(self, key: jax.Array) -> jax.Array:
        """float32, finite."""
        real = lax.bitcast_convert_type(jnp.maximum(key, 0), self.real).astype(jnp.float32)
        return jnp.minimum(real, jnp.finfo(jnp.float32).max)

    def query(self, m: Counts, total: Counts, threshold: jax.Array, delta: jax.Array) -> Query:
        """A search that begins where the thresholds should be by now if they move on as they did."""
        expected = threshold + delta
        usable = (threshold > 0) & (expected > 0) & (expected < jnp.finfo(jnp.float32).max)
        guess = jnp.where(usable, self.to_key(expected), -1)
        moved = jnp.abs(guess - self.to_key(threshold))
        # a threshold rarely misses by more than an eighth of its last movement, or 0.2% where it rests
        return Query(m, total, guess, jnp.maximum(moved // 8, self.binade // 512))


class _Silos(NamedTuple):
    """What is known of some silos before the search."""

    budget: Counts  # (silos,)
    size: Counts  # (silos,)
    threshold: jax.Array  # (silos,) float32: that of the last step
    threshold_delta: jax.Array  # (silos,) float32


class _Facts(NamedTuple):
    """What became of some silos."""

    threshold: jax.Array  # (silos,) float32; 0 where all or none are free
    passes: jax.Array  # (silos,) int32
    num_free: Counts  # (silos,)
    num_nonfinite: Counts  # (silos,)


class _Cut(NamedTuple):
    """Where the rankings of some silos are cut."""

    above: jax.Array  # (silos,) key dtype: keys above it are kept
    below: jax.Array  # (silos,) key dtype: and those below it
    tie: jax.Array  # (silos,) key dtype: of the keys that equal it some are kept; -2 for none
    num_tied: Counts  # (silos,): how many there are
    num_filled: Counts  # (silos,): how many of them are kept


def _choose(
    leaves: Sequence[LeafPlan],
    sizes: Sequence[int],
    distance: distances.Distance,
    ties: str,
    layout: Layout,
    proposals: list[Proposal],
    seeds: list[jax.Array],
    budgets: Counts,
    memory: Memory,
) -> Choice:
    """Batch by batch, so that the steps and keys of only one are in memory."""
    batches = layout.batches(leaves)
    order = np.array(counting.search_order(leaves, batches, sizes), np.uint32)
    place = {s: i for i, s in enumerate(order.tolist())}
    silos = _Silos(
        budgets[order],
        Counts.of([sizes[s] for s in order]),
        memory.threshold[order],
        memory.threshold_delta[order],
    )
    zero = opaque_zero(memory.diagnostics.passes)
    masks: dict[int, jax.Array] = {}
    steps: dict[int, jax.Array] = {}
    facts_of: list[_Facts] = []
    for batch in batches:
        scale = _Scale.of([proposals[j].dtype for j in batch])
        rounded = [force_rounding(proposals[j].step, zero) for j in batch]
        if len(batches) > 1:
            rounded, zero = in_memory(rounded, zero)
        keys = []
        for j, step in zip(batch, rounded, strict=True):
            proposal = proposals[j]._replace(step=step)
            values, negative = _distance_keys(distance, scale, proposal, seeds[j], zero)
            checkify.debug_check(
                ~negative, f"the distance of parameter {leaves[j].path!r} is negative; it must be 0 or more."
            )
            places = tuple(place[s] for s in leaves[j].silos)
            keys.append(Keys(values, leaves[j].axis, places, leaves[j].offsets, zero))
        kept, facts = _keep(layout, keys, scale, ties, silos)
        zero = opaque_zero(facts.passes)
        if len(batches) > 1:
            kept, zero = in_memory(kept, zero)
        masks |= dict(zip(batch, kept, strict=True))
        steps |= dict(zip(batch, rounded, strict=True))
        facts_of.append(facts)
    facts = reduce(partial(jax.tree.map, jnp.add), facts_of)  # each is 0 for silos of other batches
    ranked = np.isin(order, [s for leaf in leaves for s in leaf.silos])
    threshold = jnp.zeros_like(memory.threshold).at[order].set(facts.threshold)
    both_known = (memory.threshold > 0) & (threshold > 0)
    diagnostics = Diagnostics(
        num_free=facts.num_free.where(ranked, silos.budget).sum().to_float(),
        budget=budgets.sum().to_float(),
        num_nonfinite=facts.num_nonfinite.sum().to_float(),
        passes=jnp.max(facts.passes),
    )
    return Choice(
        [masks[j] for j in range(len(leaves))],
        [steps[j] for j in range(len(leaves))],
        Memory(threshold, jnp.where(both_known, threshold - memory.threshold, 0.0), diagnostics),
    )


@partial(jax.jit, static_argnums=(0, 1))  # traced once for all tensors of a shape
def _distance_keys(
    distance: distances.Distance, scale: _Scale, proposal: Proposal, seed: jax.Array, zero: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The keys of a tensor, and whether any distance is negative."""
    theta_hat, wide = proposal.value(zero), promote(proposal.dtype, jnp.float32)
    origin = seed.astype(wide)
    delta = distance(origin, theta_hat.astype(wide), origin)
    negative = jnp.any(delta < 0)
    delta = jnp.where(jnp.isnan(delta), jnp.inf, delta)
    # some platforms take subnormal distances for 0, so all do
    nothing = (bits(theta_hat) == bits(seed)) | (delta < jnp.finfo(wide).tiny)
    keys = scale.to_key(jnp.where(nothing, 0, delta).astype(delta.dtype))
    return jnp.where(jnp.isfinite(theta_hat), keys, jnp.full_like(keys, -1)), negative


def _keep(
    layout: Layout, keys: list[Keys], scale: _Scale, ties: str, silos: _Silos
) -> tuple[list[jax.Array], _Facts]:
    """Keeps the ``m`` largest keys of each silo, and what is outside of the ranking."""
    searched, keys = layout.arrange(keys)
    cut, facts = layout.for_each_silo(partial(_cut, scale, ties), searched, silos)
    ends = [x.broadcast((cut.above, cut.below)) for x in keys]
    kept = [(x.values > above) | (x.values < below) for x, (above, below) in zip(keys, ends, strict=True)]
    if ties == "fill":
        filled, passes = _fill(layout, searched, keys, cut)
        kept = [a | b for a, b in zip(kept, filled, strict=True)]
        facts = facts._replace(passes=facts.passes + passes)
    return kept, facts


def _cut(scale: _Scale, ties: str, count: Count, silos: _Silos) -> tuple[_Cut, _Facts]:
    m, total = silos.budget, silos.size
    none = m - m
    all_free, none_free = m.equals(total), m.is_zero()
    # one pass meets a budget of 0
    query = scale.query(none.where(all_free, m), total, silos.threshold, silos.threshold_delta)
    bracket = search(count, query, scale.infinity, scale.binade)
    t = jnp.where(all_free, -1, bracket.hi)
    num_free = total.where(all_free, bracket.above_hi)
    lacking = ~all_free & ~bracket.met(m) & (t > 0) & (ties == "fill")
    cut = _Cut(
        above=t,
        below=jnp.where(none_free, -1, 0).astype(t.dtype),
        tie=jnp.where(lacking, t, -2),
        num_tied=bracket.above_lo - bracket.above_hi,
        num_filled=none.where(~lacking, m - bracket.above_hi),
    )
    facts = _Facts(
        threshold=jnp.where(all_free | none_free, 0.0, scale.to_distance(t)),
        passes=bracket.passes,
        num_free=m.where(lacking, num_free),
        num_nonfinite=none.where(none_free, total - bracket.ranked),
    )
    return cut, facts


def _fill(
    layout: Layout, searched: list[Keys], keys: list[Keys], cut: _Cut
) -> tuple[list[jax.Array], jax.Array]:
    """Of the keys that equal ``cut.tie``, those that come last in a fixed order, and the passes spent.

    The order is that of the entries' row-major indices in their silo, mixed, so it does not depend on
    the layout; the same search finds where the last ``cut.num_filled`` begin. Indices have two digits in
    silos with more than ``2**INDEX_BITS`` entries, compared one after the other.
    """
    largest = max(o + math.prod(x.values.shape) // len(x.silos) for x in searched for o in x.offsets)
    digits = 2 if largest > 2**INDEX_BITS else 1
    unknown = jnp.full(cut.tie.shape, -1, jnp.int32)
    find = partial(search, top=2**31 - 1, density_scale=2**40)  # mixed indices are evenly dense

    def cut_ties() -> tuple[list[jax.Array], jax.Array]:
        candidates = [x.values == x.broadcast(cut.tie) for x in searched]
        query = Query(cut.num_filled, cut.num_tied, unknown, jnp.ones_like(unknown))
        cuts, passes = [], jnp.zeros_like(unknown)
        for digit in range(digits):
            order = [
                x._replace(
                    values=jnp.where(candidate, _index_digits(x.values.shape, x.axis, x.offsets)[digit], -1)
                )
                for x, candidate in zip(searched, candidates, strict=True)
            ]
            bracket = layout.for_each_silo(find, order, query)
            candidates = [x.values == x.broadcast(bracket.hi) for x in order]
            query = query._replace(m=query.m - bracket.above_hi, total=bracket.above_lo - bracket.above_hi)
            cuts.append(bracket.hi)
            passes = passes + bracket.passes
        return cuts, passes

    cuts, passes = lax.cond(
        (cut.tie > 0).any(), cut_ties, lambda: ([unknown] * digits, jnp.zeros_like(unknown))
    )

    def after_cuts(x: Keys) -> jax.Array:
        tie, ends = x.broadcast((cut.tie, cuts))
        after = jnp.zeros(x.values.shape, bool)
        for digit, end in reversed(
            list(zip(_index_digits(x.values.shape, x.axis, x.offsets)[:digits], ends, strict=True))
        ):
            after = (digit > end) | (digit == end) & after
        return (x.values == tie) & after

    return [after_cuts(x) for x in keys], passes


@partial(jax.jit, static_argnums=(0, 1, 2))  # traced once for all tensors of a shape
def _index_digits(
    shape: tuple[int, ...], axis: int | None, offsets: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Each entry's row-major index in its silo: the low bits, mixed, and the bits above them; int32.

    Args:
      shape: of the keys.
      axis: see :class:`dst_optax.counting.Keys`.
      offsets: likewise.
    """
    start = np.array(offsets, np.int64).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    above = jnp.broadcast_to((start >> INDEX_BITS).astype(np.int32), shape)
    index = jnp.broadcast_to((start & (2**INDEX_BITS - 1)).astype(np.uint32), shape)
    stride = 1
    for d in reversed(range(len(shape))):
        if d != axis:
            position = lax.broadcasted_iota(jnp.uint32, shape, d)
            if stride * shape[d] <= 2**32:
                low, high = position * jnp.uint32(stride), jnp.uint32(0)
            else:
                low, high = product_words(position, stride)
            index = index + (low & jnp.uint32(2**INDEX_BITS - 1))
            carried = (low >> INDEX_BITS) + (high << (32 - INDEX_BITS)) + (index >> INDEX_BITS)
            above = above + carried.astype(jnp.int32)
            index = index & jnp.uint32(2**INDEX_BITS - 1)
            stride *= shape[d]
    return _mix(index).astype(jnp.int32), above


def _mix(index: jax.Array) -> jax.Array:
    """A bijection of [0, 2**31) that scatters neighbours, uint32 to uint32."""
    mask = jnp.uint32(0x7FFFFFFF)
    x = (index * jnp.uint32(0x9E3779B1)) & mask
    x = ((x ^ (x >> 15)) * jnp.uint32(0x85EBCA6B)) & mask
    x = ((x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)) & mask
    return x ^ (x >> 16)
