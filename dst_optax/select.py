"""Which entries are kept: distances as keys, thresholds, and ties.

Distances are compared as integers: the bits of a float that is not negative order as the float does.
In every silo the entries above a threshold are kept; :mod:`dst_optax.counting` finds it.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from dst_optax import counting, distances
from dst_optax.counting import Bracket, Guess, Keys, Layout
from dst_optax.counts import Counts, concatenate
from dst_optax.silos import LeafPlan, SiloPlan
from dst_optax.state import Diagnostics, Memory, new_memory

INDEX_BITS = 31  # low bits of an entry's index that int32 holds


class Proposal(NamedTuple):
    """The value that an optimizer proposes for a tensor: ``update``, or ``param + update``."""

    update: jax.Array  # any shape, floats
    param: jax.Array | None = None  # same shape, the parameters' dtype

    @property
    def dtype(self) -> Any:
        """The parameters' dtype."""
        return self.update.dtype if self.param is None else self.param.dtype

    def value(self, zero: jax.Array) -> jax.Array:
        """The proposed value in the parameters' dtype, rounded to it."""
        x = self.update if self.param is None else add(self.param, self.update)
        return force_rounding(x, zero) if x.dtype.itemsize <= 2 else x


class Choice(NamedTuple):
    """Which entries are kept."""

    masks: list[jax.Array]  # bool, like the tensors
    updates: list[jax.Array]  # those of the proposals, as they were ranked
    memory: Memory


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def choose(
    plan: SiloPlan,
    distance: distances.Distance,
    ties: str,
    proposals: list[Proposal],
    seeds: list[jax.Array],
    budgets: Counts,
    memory: Memory,
) -> Choice:
    """Chooses the entries of every silo whose proposed values lie farthest from the seed.

    Args:
      plan: the silos.
      distance: d(theta, theta_hat, theta_seed).
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
    if not plan.ranked:
        free = budgets.sum().to_float()
        nothing = new_memory(len(plan.sizes))
        return Choice(
            [], [], nothing._replace(diagnostics=nothing.diagnostics._replace(num_free=free, budget=free))
        )
    leaves = [plan.leaves[i] for i in plan.ranked]
    for leaf, proposal in zip(leaves, proposals, strict=True):
        _check_distance(distance, leaf, proposal.dtype)
    method = partial(_choose, leaves, plan.sizes, distance, ties)
    return counting.per_platform(method, proposals, seeds, budgets, memory)


def add(p: jax.Array, u: jax.Array) -> jax.Array:
    """``p + u`` in the dtype of ``p``, as ``optax.apply_updates`` computes it."""
    both = promote(p.dtype, u.dtype)
    return (p.astype(both) + u.astype(both)).astype(p.dtype)


def difference(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """``a - b``, rounded to ``dtype``."""
    both = promote(b.dtype, dtype)
    return (a.astype(both) - b.astype(both)).astype(dtype)


def promote(a: Any, b: Any) -> Any:
    """The dtype of ``a + b``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def bits(x: jax.Array) -> jax.Array:
    """``x`` as unsigned integers."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def force_rounding(x: jax.Array, zero: jax.Array) -> jax.Array:
    """``x``, rounded to its dtype; ``zero`` is an int32 zero that the compiler cannot know.

    XLA contracts a product and a sum, and carries half-precision sums on in float32: the same subset
    would then not be chosen on every mesh (test_updates_that_are_products_in_the_same_program).
    """
    own = bits(x)
    return lax.bitcast_convert_type(own ^ zero.astype(own.dtype), x.dtype)


def in_memory(xs: list[jax.Array], zero: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """``xs``, computed once and only after ``zero`` is known, and a ``zero`` that is known after them.

    By a loop of no turns. Otherwise XLA computes them anew for each use, or those of all batches first,
    which takes four bytes a parameter (test_temporary_memory_is_that_of_one_batch).
    """
    turn = lambda carry: (carry[0] >> 1, [jnp.where(carry[0] > 0, x, jnp.zeros_like(x)) for x in carry[1]])  # noqa: E731
    zero, xs = lax.while_loop(lambda carry: carry[0] != 0, turn, (zero, xs))
    return xs, zero


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
    """Batch by batch, so that the updates and keys of only one are in memory."""
    batches = layout.batches(leaves)
    zero = memory.diagnostics.passes >> 31
    masks: dict[int, jax.Array] = {}
    updates: dict[int, jax.Array] = {}
    silos_in_order: list[int] = []
    found: list[_Found] = []
    for batch in batches:
        ids = sorted({s for j in batch for s in leaves[j].silos})
        local = {s: i for i, s in enumerate(ids)}
        rounded = [force_rounding(proposals[j].update, zero) for j in batch]
        if len(batches) > 1:
            rounded, zero = in_memory(rounded, zero)
        scale = _Scale.of([proposals[j].dtype for j in batch])
        keys = []
        for j, u in zip(batch, rounded, strict=True):
            proposal = proposals[j]._replace(update=u)
            values, negative = _distance_keys(distance, scale, proposal, seeds[j], zero)
            checkify.debug_check(
                ~negative, f"the distance of parameter {leaves[j].path!r} is negative; it must be 0 or more."
            )
            silos = tuple(local[s] for s in leaves[j].silos)
            keys.append(Keys(values, leaves[j].axis, silos, leaves[j].offsets, zero))
        mine = np.array(ids, np.int32)
        total = Counts.of([sizes[s] for s in ids])
        guess = scale.guess(memory.threshold[mine], memory.threshold_delta[mine])
        kept, facts = _keep(layout, keys, scale, ties, budgets[mine], total, guess)
        zero = jnp.max(facts.passes) >> 31
        if len(batches) > 1:
            kept, zero = in_memory(kept, zero)
        masks |= dict(zip(batch, kept, strict=True))
        updates |= dict(zip(batch, rounded, strict=True))
        silos_in_order += ids
        found.append(facts)
    order = np.array(silos_in_order, np.int32)
    threshold = jnp.zeros_like(memory.threshold).at[order].set(jnp.concatenate([f.threshold for f in found]))
    known = (memory.threshold > 0) & (threshold > 0)
    uncontested = budgets[np.setdiff1d(np.arange(len(sizes)), order)]  # free or frozen at every step
    diagnostics = Diagnostics(
        num_free=concatenate([uncontested, *(f.num_free for f in found)]).sum().to_float(),
        budget=budgets.sum().to_float(),
        num_nonfinite=concatenate([f.num_nonfinite for f in found]).sum().to_float(),
        passes=jnp.max(jnp.concatenate([f.passes for f in found])),
    )
    return Choice(
        [masks[j] for j in range(len(leaves))],
        [updates[j] for j in range(len(leaves))],
        Memory(threshold, jnp.where(known, threshold - memory.threshold, 0.0), diagnostics),
    )


@cache
def _check_distance(distance: distances.Distance, leaf: LeafPlan, dtype: Any) -> None:
    wide = promote(dtype, jnp.float32)
    found = jax.eval_shape(distance, *[jax.ShapeDtypeStruct(leaf.shape, wide)] * 3)
    if (found.shape, found.dtype) != (leaf.shape, wide):
        raise ValueError(
            f"the distance of parameter {leaf.path!r} has shape {found.shape} and dtype {found.dtype}; it "
            f"must be component-wise, so {leaf.shape} and {wide}."
        )


@partial(jax.jit, static_argnums=(0, 1))  # traced once for all tensors of a shape
def _distance_keys(
    distance: distances.Distance, scale: "_Scale", proposal: Proposal, seed: jax.Array, zero: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Distances as integers of the same order, -1 where nothing finite is proposed; is one negative?"""
    theta_hat, wide = proposal.value(zero), promote(proposal.dtype, jnp.float32)
    origin = seed.astype(wide)
    delta = distance(origin, theta_hat.astype(wide), origin)
    negative = jnp.any(delta < 0)
    delta = jnp.where(jnp.isnan(delta), jnp.inf, delta)
    nothing = (bits(theta_hat) == bits(seed)) | (delta < jnp.finfo(wide).tiny)
    keys = scale.to_key(jnp.where(nothing, 0, delta).astype(delta.dtype))
    return jnp.where(jnp.isfinite(theta_hat), keys, jnp.full_like(keys, -1)), negative


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

    def guess(self, threshold: jax.Array, delta: jax.Array) -> Guess:
        """Where the thresholds should be by now if they move on as they did."""
        expected = threshold + delta
        known = (threshold > 0) & (expected > 0) & (expected < jnp.finfo(jnp.float32).max)
        at = jnp.where(known, self.to_key(expected), -1)
        moved = jnp.abs(at - self.to_key(threshold))
        return Guess(at, jnp.maximum(moved // 8, self.binade // 512))


class _Found(NamedTuple):
    """What became of some silos."""

    threshold: jax.Array  # (silos,) float32; 0 where all or none are free
    passes: jax.Array  # (silos,) int32
    num_free: Counts  # (silos,)
    num_nonfinite: Counts  # (silos,)


def _keep(
    layout: Layout, keys: list[Keys], scale: _Scale, ties: str, m: Counts, total: Counts, guess: Guess
) -> tuple[list[jax.Array], _Found]:
    """Keeps the ``m`` largest keys of each silo, and what is outside of the ranking."""
    rows, keys = layout.arrange(keys)
    all_free, none_free = m.equals(total), m.is_zero()
    zero = Counts(jnp.zeros_like(m.high), jnp.zeros_like(m.low))
    bracket = layout.thresholds(rows, zero.where(all_free, m), total, scale.infinity, guess, scale.binade)
    t = jnp.where(all_free, -1, bracket.hi)
    num_free = total.where(all_free, bracket.above_hi)
    floor = jnp.where(none_free, -1, 0).astype(t.dtype)  # entries that are not finite have the key -1
    kept = [(x.values > x.broadcast(t)) | (x.values < x.broadcast(floor)) for x in keys]
    passes = bracket.passes
    if ties == "fill":
        lacking = ~all_free & ~bracket.met(m) & (t > 0)
        tie = jnp.where(lacking, t, -2)
        filled, more = _fill(layout, rows, keys, tie, bracket, zero.where(~lacking, m - bracket.above_hi))
        kept = [a | b for a, b in zip(kept, filled, strict=True)]
        num_free = m.where(lacking, num_free)
        passes = passes + more
    threshold = jnp.where(all_free | none_free, 0.0, scale.to_distance(t))
    num_nonfinite = zero.where(none_free | all_free, total - bracket.ranked)
    return kept, _Found(threshold, passes, num_free, num_nonfinite)


def _fill(
    layout: Layout, rows: list[Keys], keys: list[Keys], tie: jax.Array, bracket: Bracket, rest: Counts
) -> tuple[list[jax.Array], jax.Array]:
    """Of the keys at ``tie`` the last ``rest`` of a fixed order, and the passes that took.

    The order is a bijection of the entries' row-major indices in their silo, so it does not depend on
    the layout. It has a second digit in silos whose indices have more than ``INDEX_BITS`` bits.
    """
    top = 2**31 - 1
    largest = max(o + math.prod(x.values.shape) // len(x.silos) for x in rows for o in x.offsets)
    digits = 2 if largest > 2**INDEX_BITS else 1
    none = jnp.full(tie.shape, -1, jnp.int32)

    def search() -> tuple[list[jax.Array], jax.Array]:
        candidates = [x.values == x.broadcast(tie) for x in rows]
        wanted, of = rest, bracket.above_lo - bracket.above_hi
        cuts, passes = [], jnp.zeros(tie.shape, jnp.int32)
        for digit in range(digits):
            order = [
                x._replace(values=jnp.where(candidate, _order(x)[digit], -1))
                for x, candidate in zip(rows, candidates, strict=True)
            ]
            found = layout.thresholds(order, wanted, of, top, Guess(none, jnp.ones_like(none)), 2**40)
            candidates = [x.values == x.broadcast(found.hi) for x in order]
            wanted, of = wanted - found.above_hi, found.above_lo - found.above_hi
            cuts.append(found.hi)
            passes = passes + found.passes
        return cuts, passes

    cuts, passes = lax.cond(
        (tie >= 0).any(), search, lambda: ([none] * digits, jnp.zeros(tie.shape, jnp.int32))
    )

    def after_cuts(x: Keys) -> jax.Array:
        after = jnp.zeros(x.values.shape, bool)
        for place, cut in reversed(list(zip(_order(x)[:digits], cuts, strict=True))):
            after = (place > x.broadcast(cut)) | (place == x.broadcast(cut)) & after
        return (x.values == x.broadcast(tie)) & after

    return [after_cuts(x) for x in keys], passes


def _order(keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Row-major index of each entry in its silo, its low bits mixed, and what lies above them; int32."""
    shape, axis = keys.values.shape, keys.axis
    offsets = np.array(keys.offsets, np.int64)
    low = jnp.asarray((offsets & (2**INDEX_BITS - 1)).astype(np.uint32))
    high = jnp.asarray((offsets >> INDEX_BITS).astype(np.int32))
    local = keys._replace(silos=tuple(range(len(offsets))))
    above = jnp.broadcast_to(local.broadcast(high), shape)
    index = jnp.broadcast_to(local.broadcast(low), shape)
    stride = 1
    for d in reversed(range(len(shape))):
        if d != axis:
            index = index + lax.broadcasted_iota(jnp.uint32, shape, d) * jnp.uint32(stride)
            above = above + (index >> INDEX_BITS).astype(jnp.int32)
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
