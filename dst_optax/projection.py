"""One step of Dynamic Subset Tuning: which entries of the proposal stay within the budget.

The step is a projection. Of all models in which at most m entries of each silo differ from the seed
it takes the one that costs least, where the cost of an entry that returns to the seed is its
distance ``d(seed, theta_hat, seed)``; so the entries with the largest distances are kept.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from dst_optax import budget, distances, rounding, selection
from dst_optax.silos import LeafPlan, SiloPlan
from dst_optax.state import FREE, DynamicSubsetTuningState

BATCH = 2**22  # entries whose updates and keys are in memory at one time, on one device
INDEX_BITS = 31  # low bits of an entry's index that int32 holds


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def project(
    plan: SiloPlan,
    distance: distances.Distance,
    ties: str,
    updates: list[jax.Array],
    params: list[jax.Array],
    seeds: list[jax.Array],
    budgets: jax.Array,
    state: DynamicSubsetTuningState,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Updates that lead to the proposal inside the subset and to the seed elsewhere.

    Args:
      plan: the silos.
      distance: d(theta, theta_hat, theta_seed).
      ties: "strict" or "fill".
      updates: proposed updates of all leaves.
      params: all leaves.
      seeds: seeds of the leaves ``plan.ranked``.
      budgets: entries that each silo may free, (silos, 2) int32 limbs.
      state: the last step's state; its thresholds say where to look first.

    Returns:
      The updates, and the fields of the state that change.
    """
    out = [
        jnp.full_like(u, -0.0) if plan.is_frozen(leaf) else u
        for u, leaf in zip(updates, plan.leaves, strict=True)
    ]
    ranked = plan.ranked
    facts = dict(
        budget=_total(budgets),
        free=_total(budgets),
        nonfinite=jnp.zeros((), jnp.int32),
        unresolved=jnp.zeros((), jnp.int32),
    )
    if not ranked:
        return out, facts
    args = (
        [updates[i] for i in ranked],
        [params[i] for i in ranked],
        seeds,
        budgets,
        state._replace(seed=None),
    )
    on = partial(_project_ranked, plan, distance, ties)
    new, found = lax.platform_dependent(
        *args, cpu=partial(on, jax.device_count() == 1), default=partial(on, False)
    )
    for i, u in zip(ranked, new, strict=True):
        out[i] = u
    if plan.budgets is not None:
        contested = {silo for i in ranked for silo in plan.leaves[i].silos}
        always = sum(m for silo, m in enumerate(plan.budgets) if silo not in contested)
        found["free"] = budget.carry(found["free"] + budget.limbs([always])[0])
    return out, facts | found


class _Proposal(NamedTuple):
    """What the inner optimizer proposes for one leaf whose entries compete."""

    plan: LeafPlan
    param: jax.Array
    update: jax.Array
    seed: jax.Array
    zero: jax.Array

    def keys(self, distance: distances.Distance, scale: "_Scale") -> jax.Array:
        """Distances from the seed as integers that order alike; -1 where the proposal is not finite."""
        shape, wide = self.param.shape, rounding.wide(self.param.dtype)
        found = _distance_type(distance, shape, wide)
        if found != (shape, wide):
            raise ValueError(
                f"the distance of parameter {self.plan.path!r} has shape {found[0]} and dtype "
                f"{found[1]}; it must be component-wise, so {shape} and {wide}."
            )
        keys, negative = _keys(distance, scale, self.param, self.update, self.seed, self.zero)
        checkify.debug_check(
            ~negative, f"the distance of parameter {self.plan.path!r} is negative; it must be 0 or more."
        )
        return keys

    def projected(self, keep: jax.Array, zero: jax.Array) -> jax.Array:
        """The updates: unchanged where kept, back to the seed elsewhere; after ``zero`` is known."""
        return _projected(self.param, self.update, self.seed, keep, zero)

    def extent(self, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Least and largest distance of kept entries from their seeds, in parameters' units."""
        return _extent(self.param, self.update, self.seed, self.zero, keep)

    @property
    def precision(self) -> int:
        """Bits of mantissa that a difference of parameters keeps on its way through the update."""
        return min(jnp.finfo(self.param.dtype).nmant, jnp.finfo(self.update.dtype).nmant)

    @property
    def least(self) -> float:
        """The smallest rounding error that is not 0."""
        wide = rounding.wide(self.param.dtype)
        return max(float(jnp.finfo(wide).tiny), float(jnp.finfo(self.update.dtype).smallest_subnormal))

    def astray(self, keep: jax.Array, half: jax.Array, rowwise: bool) -> jax.Array:
        """How many reverted entries a plain apply leaves ``half`` or more away from the seed."""
        return _astray(self.param, self.update, self.seed, self.zero, keep, half, rowwise)

    def order(self) -> tuple[jax.Array, jax.Array]:
        """Row-major index of each entry in its silo, its low bits mixed, and what lies above them; int32."""
        shape, axis = self.param.shape, self.plan.axis
        apart = 1 if axis is None else shape[axis]
        if (entries := math.prod(shape) // max(apart, 1)) >= 2**31:
            raise ValueError(
                f"parameter {self.plan.path!r}: ties='fill' takes tensors below 2**31 entries a silo, got "
                f"{entries}; use ties='strict' or stacked silos."
            )
        offsets = np.array(self.plan.offsets, np.int64)
        low, high = offsets & (2**INDEX_BITS - 1), offsets >> INDEX_BITS
        return _order(shape, axis, low.astype(np.uint32), high.astype(np.int32))


@cache
def _distance_type(distance: distances.Distance, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """Shape and dtype of the distances of a tensor's entries."""
    found = jax.eval_shape(distance, *[jax.ShapeDtypeStruct(shape, dtype)] * 3)
    return found.shape, found.dtype


# One leaf's arithmetic is traced once for all leaves of its shape and dtype.


def _theta_hat(param: jax.Array, update: jax.Array, zero: jax.Array) -> jax.Array:
    return rounding.settle_half(rounding.add(param, update), zero)


@partial(jax.jit, static_argnums=(0, 1))
def _keys(
    distance: distances.Distance,
    scale: "_Scale",
    param: jax.Array,
    update: jax.Array,
    seed: jax.Array,
    zero: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Keys of distances, and whether a distance is negative."""
    theta_hat, wide = _theta_hat(param, update, zero), rounding.wide(param.dtype)
    # apart from later uses of the seed, or seed - param would stay in memory for them
    own = rounding.settle(seed, zero)
    origin = own.astype(wide)
    delta = distance(origin, theta_hat.astype(wide), origin)
    negative = jnp.any(delta < 0)
    delta = jnp.where(jnp.isnan(delta), jnp.inf, delta)
    same = rounding.bits(theta_hat) == rounding.bits(own)
    same |= rounding.asks_for_seed(update, own, param)
    same |= delta < jnp.finfo(wide).tiny
    keys = scale.to_key(jnp.where(same, jnp.zeros_like(delta), delta))
    return jnp.where(jnp.isfinite(theta_hat), keys, jnp.full_like(keys, -1)), negative


@jax.jit
def _projected(
    param: jax.Array, update: jax.Array, seed: jax.Array, keep: jax.Array, zero: jax.Array
) -> jax.Array:
    back = rounding.back(seed, param, update.dtype)
    return rounding.settle(jnp.where(keep, update, back), zero)


@jax.jit
def _extent(
    param: jax.Array, update: jax.Array, seed: jax.Array, zero: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array]:
    wide = rounding.wide(param.dtype)
    far = jnp.abs(_theta_hat(param, update, zero).astype(wide) - seed.astype(wide))
    return (
        jnp.min(jnp.where(keep, far, jnp.inf), initial=jnp.inf),
        jnp.max(jnp.where(keep, far, 0.0), initial=0.0),
    )


@partial(jax.jit, static_argnums=6)
def _astray(
    param: jax.Array,
    update: jax.Array,
    seed: jax.Array,
    zero: jax.Array,
    keep: jax.Array,
    half: jax.Array,
    rowwise: bool,
) -> jax.Array:
    back = rounding.back(seed, param, update.dtype)
    landed = rounding.settle_half(rounding.add(param, back), zero)
    residue = jnp.abs(landed.astype(half.dtype) - seed.astype(half.dtype))
    return selection.how_many(~keep & (residue > 0) & (residue >= half), rowwise)


@partial(jax.jit, static_argnums=3)
def _kept(keys: jax.Array, above: jax.Array, below: jax.Array, axis: int | None) -> jax.Array:
    """Keys outside of the bounds of their slice, (slices,) each."""
    above, below = (selection.spread(x, axis, keys.ndim) for x in (above, below))
    return (keys > above) | (keys < below)


@partial(jax.jit, static_argnames="axis")
def _later_ties(
    keys: jax.Array, tie: jax.Array, cuts: list[jax.Array], order: list[jax.Array], axis: int | None
) -> jax.Array:
    """Keys at ``tie`` whose place in the order is later than the cut; compared digit by digit."""
    spread = partial(selection.spread, axis=axis, ndim=keys.ndim)
    later = jnp.zeros(keys.shape, bool)
    for place, cut in reversed(list(zip(order, cuts, strict=True))):
        later = (place > spread(cut)) | (place == spread(cut)) & later
    return (keys == spread(tie)) & later


@partial(jax.jit, static_argnums=(0, 1))
def _order(
    shape: tuple[int, ...], axis: int | None, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Indices of a leaf's entries, from low and high bits of the index of the first entry of each slice."""
    spread = partial(selection.spread, axis=axis, ndim=len(shape))
    above = jnp.zeros(shape, jnp.int32) + spread(high)
    index = jnp.zeros(shape, jnp.uint32)
    terms, stride = [(spread(low), 1)], 1
    for d in reversed(range(len(shape))):
        if d != axis:
            terms.append((lax.broadcasted_iota(jnp.uint32, shape, d), stride))
            stride *= shape[d]
    for term, factor in terms:
        index = index + term * jnp.uint32(factor)
        above += (index >> INDEX_BITS).astype(jnp.int32)
        index &= jnp.uint32(2**INDEX_BITS - 1)
    return _mix(index).astype(jnp.int32), above


def _mix(index: jax.Array) -> jax.Array:
    """A bijection of [0, 2**31) that scatters neighbours, uint32 to uint32."""
    mask = jnp.uint32(0x7FFFFFFF)
    x = (index * jnp.uint32(0x9E3779B1)) & mask
    x = ((x ^ (x >> 15)) * jnp.uint32(0x85EBCA6B)) & mask
    x = ((x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)) & mask
    return x ^ (x >> 16)


class _Scale(NamedTuple):
    """Distances as integers: the bits of floats that are not negative order as they do."""

    key: Any  # dtype
    real: Any  # dtype
    infinity: int
    octave: int
    blur: int  # how far off a guess may be at least

    @classmethod
    def of(cls, proposals: Sequence[_Proposal]) -> "_Scale":
        if any(x.param.dtype == jnp.float64 for x in proposals):
            return cls(jnp.int64, jnp.float64, 0x7FF << 52, 1 << 52, 1 << 43)
        return cls(jnp.int32, jnp.float32, 0xFF << 23, 1 << 23, 1 << 14)

    def to_key(self, distance: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(distance.astype(self.real), self.key)

    def to_distance(self, key: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(jnp.maximum(key, 0), self.real)

    def guess(self, threshold: jax.Array, movement: jax.Array, precision: int) -> selection.Guess:
        """Where the thresholds should be by now if they move on as they did."""
        expected = threshold + movement
        known = jnp.isfinite(expected) & (threshold > 0) & (expected > 0)
        at = jnp.where(known, self.to_key(expected), -1)
        moved = jnp.abs(self.to_key(jnp.maximum(expected, 0)) - self.to_key(jnp.maximum(threshold, 0)))
        reach = (precision - 3) * self.octave
        far = jnp.minimum(at, self.infinity - 1 - reach) + reach
        return selection.Guess(
            at, jnp.maximum(moved // 8, self.blur), jnp.where(known, far, self.infinity - 1)
        )


class _Projection(NamedTuple):
    """What became of some silos, and of the leaves they lie in."""

    updates: list[jax.Array]
    gaps: list[jax.Array]  # apart, or the first update would wait for the last gap
    reach: jax.Array  # (leaves,)
    threshold: jax.Array  # (silos,)
    passes: jax.Array
    free: jax.Array  # (2,) limbs
    nonfinite: jax.Array
    unresolved: jax.Array


def _project_ranked(
    plan: SiloPlan,
    distance: distances.Distance,
    ties: str,
    one_by_one: bool,
    updates: list[jax.Array],
    params: list[jax.Array],
    seeds: list[jax.Array],
    budgets: jax.Array,
    state: DynamicSubsetTuningState,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Thresholds and updates of the ranked leaves.

    One device takes batch after batch of silos, so that the updates of only one batch are in memory;
    a mesh takes all silos in one loop, so that a pass is one exchange.
    """
    leaves = [plan.leaves[i] for i in plan.ranked]
    batches = _batches(leaves) if one_by_one else [list(range(len(leaves)))]
    zero = state.step >> 31  # a zero that the compiler cannot know
    done: list[_Projection] = []
    threshold = state.threshold
    silos_of = [sorted({s for j in batch for s in leaves[j].silos}) for batch in batches]
    most = max(map(len, silos_of))
    for batch, ids in zip(batches, silos_of, strict=True):
        local = {s: i for i, s in enumerate(ids)}
        silos = np.array(ids, np.int32)
        # empty silos make batches alike, and XLA compiles what is alike once
        pad = partial(_padded, to=most)
        settled = [rounding.settle(updates[j], zero) for j in batch]
        if one_by_one:
            settled = rounding.in_memory(settled, zero)
        found = _project_batch(
            [_Proposal(leaves[j], params[j], u, seeds[j], zero) for j, u in zip(batch, settled, strict=True)],
            [tuple(local[s] for s in leaves[j].silos) for j in batch],
            pad(budgets[silos]),
            [plan.sizes[s] for s in ids] + [0] * (most - len(ids)),
            pad(state.threshold[silos]),
            pad(state.movement[silos]),
            state.reach[np.array(batch, np.int32)],
            distance,
            ties,
            one_by_one,
        )
        threshold = threshold.at[silos].set(found.threshold[: len(ids)])
        zero = found.passes >> 31
        done.append(found)
    place = np.argsort([j for batch in batches for j in batch])
    known = (state.movement != 0) | (state.threshold != 0)
    known &= jnp.isfinite(threshold) & jnp.isfinite(state.threshold)
    out = [u for found in done for u in found.updates]
    gaps = [gap for found in done for gap in found.gaps]
    return [out[i] for i in place], dict(
        threshold=threshold,
        movement=jnp.where(known, threshold - state.threshold, 0.0),
        gap=jnp.stack([gaps[i] for i in place]),
        reach=jnp.concatenate([found.reach for found in done])[place],
        passes=jnp.max(jnp.stack([found.passes for found in done])),
        free=_total(jnp.stack([found.free for found in done])),
        nonfinite=jnp.sum(jnp.stack([found.nonfinite for found in done]), dtype=jnp.int32),
        unresolved=jnp.sum(jnp.stack([found.unresolved for found in done]), dtype=jnp.int32),
    )


def _padded(values: jax.Array, to: int) -> jax.Array:
    return jnp.pad(values, [(0, to - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _total(pairs: jax.Array) -> jax.Array:
    return budget.carry(jnp.sum(pairs, axis=0, dtype=jnp.int32))


def _batches(leaves: Sequence[LeafPlan]) -> list[list[int]]:
    """Leaves in batches of at most ``BATCH`` entries; leaves that share a silo stay together."""
    batches: list[list[int]] = []
    room = 0
    for group in _components(leaves):
        size = sum(math.prod(leaves[j].shape) for j in group)
        if size > room or not batches:
            batches.append([])
            room = BATCH
        batches[-1] += group
        room -= size
    return [sorted(batch) for batch in batches]


def _components(leaves: Sequence[LeafPlan]) -> list[list[int]]:
    """Groups of leaves that share silos, in order of their first leaf."""
    group_of: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        old = sorted({group_of[s] for s in leaf.silos if s in group_of})
        groups[i] = [*sorted(j for g in old for j in groups.pop(g)), i]
        for j in groups[i]:
            for s in leaves[j].silos:
                group_of[s] = i
    return sorted(groups.values())


def _project_batch(
    proposals: list[_Proposal],
    where: list[tuple[int, ...]],
    m: jax.Array,
    sizes: Sequence[int],
    threshold: jax.Array,
    movement: jax.Array,
    reach: jax.Array,
    distance: distances.Distance,
    ties: str,
    rowwise: bool,
) -> _Projection:
    """Keeps the farthest ``m`` entries of each silo."""
    scale = _Scale.of(proposals)

    leaves = [
        selection.Leaf(x.keys(distance, scale), x.plan.axis, ids)
        for x, ids in zip(proposals, where, strict=True)
    ]
    total = jnp.asarray(budget.limbs(sizes))
    all_free = budget.equal(m, total)
    bracket = selection.thresholds(
        leaves,
        jnp.where(all_free[:, None], 0, m),
        total,
        scale.infinity,
        scale.guess(threshold, movement, min(x.precision for x in proposals)),
        scale.octave,
        rowwise,
    )
    t = jnp.where(all_free, -1, bracket.hi)
    above = jnp.where(all_free[:, None], total, bracket.above_hi)
    passes = bracket.passes
    some = ~budget.equal(m, jnp.zeros_like(m))
    lacking = ~all_free & ~bracket.met(m) & (t > 0)
    cuts: list[jax.Array] = []
    tie = jnp.where(lacking, t, -2)
    if ties == "fill":
        rest = jnp.where(lacking[:, None], budget.carry(m - above), 0)
        tied = jnp.where(lacking[:, None], budget.carry(bracket.above_lo - bracket.above_hi), 0)
        cuts, more = _fill(proposals, leaves, tie, rest, tied, max(sizes), rowwise)
        above = jnp.where(lacking[:, None], m, above)
        passes = passes + more

    # proposals that are not finite are kept, too, unless nothing may be kept
    below = jnp.where(some, 0, -1).astype(t.dtype)
    bounds = [[selection.pick(x, leaf.silos) for x in (t, below)] for leaf in leaves]

    def keep(i: int) -> jax.Array:
        leaf = leaves[i]
        kept = _kept(leaf.keys, *bounds[i], leaf.axis)
        if cuts:
            at, *ends = [selection.pick(x, leaf.silos) for x in (tie, *cuts)]
            kept |= _later_ties(leaf.keys, at, ends, list(proposals[i].order()[: len(cuts)]), leaf.axis)
        return kept

    every = range(len(proposals))
    if distance is distances.absolute:
        nothing = all_free | budget.equal(above, jnp.zeros_like(above))
        nearest = jnp.where(nothing, jnp.inf, scale.to_distance(t if ties == "fill" else t + 1))
        gap = selection.by_leaf(nearest, leaves).min(axis=1)
        far = selection.by_leaf(scale.to_distance(bracket.most), leaves).max(axis=1)
    else:
        extents = [proposals[i].extent(keep(i)) for i in every]
        gap, far = (jnp.stack([x[k].astype(scale.real) for x in extents]) for k in range(2))
    gap = gap.astype(jnp.float32)
    unresolved = _unresolved(proposals, keep, gap.astype(scale.real), reach.astype(scale.real), rowwise)
    odd = budget.carry(total - bracket.counted)
    shown_gap = jnp.where(selection.by_leaf(all_free, leaves).all(axis=1), FREE, gap)
    shown = jnp.where(some, scale.to_distance(t).astype(jnp.float32), jnp.inf)
    return _Projection(
        updates=[proposals[i].projected(keep(i), unresolved >> 31) for i in every],
        gaps=[selection.pick(shown_gap, (i,))[0] for i in every],
        reach=far.astype(jnp.float32),
        threshold=jnp.where(all_free, FREE, shown),
        passes=passes,
        free=_total(above),
        nonfinite=jnp.sum(jnp.where(some, odd[:, 0] * 2**16 + odd[:, 1], 0), dtype=jnp.int32),
        unresolved=unresolved,
    )


def _unresolved(
    proposals: list[_Proposal],
    keep: Callable[[int], jax.Array],
    gap: jax.Array,
    reach: jax.Array,
    rowwise: bool,
) -> jax.Array:
    """Reverted entries whose rounding error under a plain apply may look like a kept distance.

    The error of ``p + (s - p)`` is at most one unit in the last place of ``s - p``, and p lies
    no farther from s than ``reach``; so mostly there is nothing to count. Accelerators
    count all the same, in one pass with the updates: a branch would need these in memory.
    """
    half = 0.5 * gap

    def count() -> jax.Array:
        counts = [x.astray(keep(i), selection.pick(half, (i,))[0], rowwise) for i, x in enumerate(proposals)]
        return jnp.sum(jnp.stack(counts), dtype=jnp.int32)

    if not rowwise:
        return count()
    unit = jnp.asarray([2.0**-x.precision for x in proposals], gap.dtype)
    error = jnp.maximum(reach * unit, jnp.asarray([x.least for x in proposals], gap.dtype))
    return lax.cond((error < half).all(), lambda: jnp.zeros((), jnp.int32), count)


def _fill(
    proposals: list[_Proposal],
    leaves: list[selection.Leaf],
    tie: jax.Array,
    rest: jax.Array,
    tied: jax.Array,
    largest: int,
    rowwise: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Where to cut the order of the ``tied`` entries at ``tie``, so that ``rest`` of them lie beyond.

    The order has a second digit in silos whose indices have more than ``INDEX_BITS`` bits.
    """
    top = 2**31 - 1
    none = jnp.full(tie.shape, -1, jnp.int32)
    digits = 2 if largest > 2**INDEX_BITS else 1

    def search() -> tuple[list[jax.Array], jax.Array]:
        candidates = [leaf.keys == selection.spread_to_leaf(tie, leaf) for leaf in leaves]
        cuts, passes, wanted, total = [], jnp.int32(0), rest, tied
        for digit in range(digits):
            places = [
                leaf._replace(keys=jnp.where(candidate, x.order()[digit], -1))
                for x, leaf, candidate in zip(proposals, leaves, candidates, strict=True)
            ]
            guess = selection.Guess(none, jnp.ones_like(none), jnp.full_like(none, top))
            found = selection.thresholds(places, wanted, total, top, guess, 2**40, rowwise)
            candidates = [x.keys == selection.spread_to_leaf(found.hi, x) for x in places]
            wanted = budget.carry(wanted - found.above_hi)
            total = budget.carry(found.above_lo - found.above_hi)
            cuts.append(found.hi)
            passes = passes + found.passes
        return cuts, passes

    return lax.cond((tie >= 0).any(), search, lambda: ([none] * digits, jnp.int32(0)))
