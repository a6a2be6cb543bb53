"""Exact thresholds of all silos by counting, without sorting and without moving a parameter.

Distances are compared as integers: the bits of a non-negative float order as the float does. For a
silo with budget m we look for a threshold t with ``#(key > t) <= m`` and no smaller one that holds
to it. A pass reads the keys once and counts, for every silo, how many exceed each of ``PROBES``
thresholds; the counts narrow a bracket ``(lo, hi]`` around t. Ranks at the ends of the bracket tell
where in it the next probes belong: the error of that interpolation is about the square root of
the entries left, so a few passes suffice, from a good first guess (the last step's threshold) three
or four. The other half of the probes is spaced evenly: where many keys are equal ranks mislead, and
so the passes are never more than those of a search that divides by five. When a count meets the
budget the silo is done.

The first pass also learns how many keys there are at all (its lowest probe is -1) and whether any
key is far beyond the guess (its highest probe).

Nothing but the counts crosses devices. Counts are exact for silos of any size (see
:mod:`dst_optax.budget`), so the result does not depend on the mesh.

References:
  Floyd, Rivest, *Expected time bounds for selection*, CACM 18(3), 1975.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst_optax import budget

PROBES = 8
GUESS_OFFSETS = (-24.0, -24.0, -2.0, -0.3, 0.3, 2.0, 24.0, 24.0)  # in units of the guess's spread
RANK_OFFSETS = (-2.0, -0.4, 0.4, 2.0)  # in standard deviations
EVEN_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the bracket's width
CURVATURE = 0.05  # error of linear interpolation of ranks per octave of the bracket's width


class Leaf(NamedTuple):
    """Keys of one tensor and the silos they compete in.

    Attributes:
      keys: int32 or int64 of any shape; entries below 0 are never counted.
      axis: axis whose slices are in different silos, or None.
      silos: indices of the silos, one or one per slice.
    """

    keys: jax.Array
    axis: int | None
    silos: tuple[int, ...]


class Guess(NamedTuple):
    """What is known of the thresholds beforehand."""

    at: jax.Array  # (silos,) key dtype: the guess; below 0 for none
    spread: jax.Array  # (silos,) key dtype, positive: how far off it may be
    far: jax.Array  # (silos,) key dtype: few keys or none should exceed it; the first pass finds out


class Bracket(NamedTuple):
    """What is known about the thresholds: ``#(key > lo) > m >= #(key > hi)``."""

    lo: jax.Array  # (silos,) key dtype
    hi: jax.Array  # (silos,) key dtype
    above_lo: jax.Array  # (silos, 2) int32 limbs
    above_hi: jax.Array  # (silos, 2) int32 limbs
    counted: jax.Array  # (silos, 2) int32 limbs: keys >= 0
    most: jax.Array  # (silos,) key dtype: no key is known to exceed it
    passes: jax.Array  # () int32

    def met(self, m: jax.Array) -> jax.Array:
        """Whether exactly the budget lies above ``hi``, shape (silos,) bool."""
        return budget.equal(self.above_hi, m)

    def done(self, m: jax.Array) -> jax.Array:
        """Whether ``hi`` is the threshold, shape (silos,) bool."""
        return self.met(m) | (self.hi - self.lo == 1)


def pick(values: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """``values[ids]``, by a table of indices that XLA keeps in memory.

    A single constant index would be part of the kernel. So kernels for tensors of one shape are
    equal, and XLA compiles them once.
    """
    table = np.array([ids, ids[::-1]], np.int32)
    table[1] += np.where(table[1] == len(values) - 1, -1, 1)
    return _first_row(values, np.maximum(table, 0).astype(np.uint32))


@jax.jit  # traced once for all leaves of a shape, like what follows
def _first_row(values: jax.Array, table: jax.Array) -> jax.Array:
    return values[table][0]


def spread_to_leaf(values: jax.Array, leaf: Leaf) -> jax.Array:
    """Per-silo values shaped so that they broadcast against the leaf's keys."""
    return spread(pick(values, leaf.silos), leaf.axis, leaf.keys.ndim)


def spread(values: jax.Array, axis: int | None, ndim: int) -> jax.Array:
    """Values of the slices of ``axis``, shaped so that they broadcast against a tensor."""
    if axis is None:
        return values.reshape((1,) * ndim)
    return values.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))


def thresholds(
    leaves: Sequence[Leaf],
    m: jax.Array,
    total: jax.Array,
    top: int,
    guess: Guess,
    octave: int,
    rowwise: bool,
) -> Bracket:
    """Finds the smallest t of every silo with at most ``m`` keys above it, or one that meets ``m``.

    Args:
      leaves: the keys.
      m: budgets, (silos, 2) int32 limbs.
      total: number of keys of each silo, (silos, 2) int32 limbs; at least those >= 0.
      top: the largest possible key.
      guess: first guess of t.
      octave: difference of keys over which the density of keys may change by its own size.
      rowwise: count per row first; fast on CPU, where only such reductions run on all cores.

    Returns:
      A bracket that is done for every silo, after one pass at least; ``hi`` is the threshold.
    """
    dtype = guess.at.dtype
    start = Bracket(
        lo=jnp.full_like(guess.at, -1),
        hi=jnp.full_like(guess.at, top),
        above_lo=total,
        above_hi=jnp.zeros_like(total),
        counted=total,
        most=jnp.full_like(guess.at, top),
        passes=jnp.int32(0),
    )
    real = jnp.float64 if dtype == jnp.int64 else jnp.float32

    def probes(b: Bracket) -> jax.Array:
        unsigned = jnp.uint64 if dtype == jnp.int64 else jnp.uint32  # hi - lo may exceed a signed integer
        width = (b.hi.astype(unsigned) - b.lo.astype(unsigned)).astype(real)
        left = jnp.maximum(budget.to_float(b.above_lo) - budget.to_float(b.above_hi), 1.0)
        at = jnp.clip((budget.to_float(b.above_lo) - budget.to_float(m)) / left, 0.0, 1.0)
        deviation = jnp.sqrt(jnp.maximum(at * (1 - at) / left, 1 / (4 * left * left))).astype(real)
        deviation = deviation + CURVATURE * jnp.minimum(width / float(octave), 1.0)
        ranked = at.astype(real)[:, None] + deviation[:, None] * jnp.array([RANK_OFFSETS], real)
        even = jnp.broadcast_to(jnp.array([EVEN_SHARES], real), ranked.shape)
        share = jnp.clip(jnp.concatenate([even, ranked], axis=1), 0.0, 1.0)
        offset = jnp.round(share * width[:, None]).astype(dtype)
        inside = b.lo[:, None] + jnp.minimum(offset, (b.hi - 1 - b.lo)[:, None])
        spread = jnp.minimum(guess.spread.astype(real), float(octave))
        away = (spread[:, None] * jnp.array([GUESS_OFFSETS], real)).astype(dtype)
        around = guess.at[:, None]
        guessed = around + jnp.clip(away, -around, top - around)
        first = b.passes == 0
        t = jnp.where(first & (around >= 0), guessed, inside)
        t = jnp.clip(t, b.lo[:, None] + 1, jnp.maximum(b.hi, 1)[:, None] - 1)
        lowest = jnp.where(first, -1, t[:, :1])
        highest = jnp.where(first, guess.far[:, None], t[:, -1:])
        return jnp.concatenate([lowest, t[:, 1:-1], highest], axis=1)

    def narrow(carry: tuple[Bracket, jax.Array]) -> tuple[Bracket, jax.Array]:
        b, asked = carry
        t, active = asked[:, :-1], asked[:, -1] != 0
        above = count(leaves, asked, rowwise)
        fits = budget.less_equal(above, m[:, None]) & (t >= 0)
        ends = jnp.concatenate([b.lo[:, None], t, b.hi[:, None]], axis=1)
        counts = jnp.concatenate([b.above_lo[:, None], above, b.above_hi[:, None]], axis=1)
        fits = jnp.pad(fits, ((0, 0), (1, 1))) | (jnp.arange(PROBES + 2) == PROBES + 1)[None]

        def pick(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            index = index[:, None]
            return (
                jnp.take_along_axis(ends, index, axis=1)[:, 0],
                jnp.take_along_axis(counts, index[..., None], axis=1)[:, 0],
            )

        lo, above_lo = pick(jnp.argmax(jnp.where(fits, -2, ends), axis=1))
        last = jnp.argmin(jnp.where(fits, ends, top)[:, ::-1], axis=1)
        hi, above_hi = pick(PROBES + 1 - last)
        first = b.passes == 0
        counted = jnp.where(first, above[:, 0], b.counted)
        empty = (above == 0).all(axis=-1)
        most = jnp.minimum(b.most, jnp.min(jnp.where(empty, t, top), axis=1))

        def unless_done(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        found = (lo, hi, above_lo, above_hi, counted, most)
        b = Bracket(*map(unless_done, found, b[:-1]), passes=b.passes + 1)
        return b, questions(b)

    def questions(b: Bracket) -> jax.Array:
        """What the next pass shall count; carried by the loop, or XLA would compute it for every leaf."""
        active = (b.passes == 0) | ~b.done(m)
        return jnp.concatenate([probes(b), active[:, None].astype(dtype)], axis=1)

    return lax.while_loop(lambda carry: (carry[1][:, -1] != 0).any(), narrow, (start, questions(start)))[0]


def by_leaf(values: jax.Array, leaves: Sequence[Leaf]) -> jax.Array:
    """Values of the silos that each leaf lies in, (leaves, silos of the leaf); the last one repeated."""
    width = max(len(leaf.silos) for leaf in leaves)
    at = [leaf.silos + leaf.silos[-1:] * (width - len(leaf.silos)) for leaf in leaves]
    return values[np.array(at, np.int32)]


def count(leaves: Sequence[Leaf], asked: jax.Array, rowwise: bool) -> jax.Array:
    """Counts the keys above each threshold.

    Args:
      leaves: the keys.
      asked: thresholds, and 0 in a last column if a silo is done, (silos, probes + 1) key dtype.
      rowwise: see :func:`thresholds`; then leaves all of whose silos are done are passed over, too.

    Returns:
      Limbs, (silos, probes, 2) int32; 0 or right for silos that are done.
    """
    silos, probes = asked.shape[0], asked.shape[1] - 1
    counts = []
    for leaf in leaves:
        row = pick(asked, leaf.silos)
        above = partial(_above, axis=leaf.axis, rowwise=rowwise)
        if rowwise:
            limbed = (2,) if _are_many(leaf.keys.shape, leaf.axis) else ()
            none = jnp.zeros((len(leaf.silos), probes, *limbed), jnp.int32)
            awake = (row[:, -1] != 0).any()
            counts.append(lax.cond(awake, above, lambda *_, none=none: none, leaf.keys, row[:, :-1]))
        else:
            counts.append(_replicated(above(leaf.keys, row[:, :-1])))
    huge = any(found.ndim == 3 for found in counts)
    limbs = jnp.concatenate([_as_limbs(x) for x in counts]) if huge else budget.split(jnp.concatenate(counts))
    ids = np.array([s for leaf in leaves for s in leaf.silos], np.int32)
    if np.array_equal(ids, np.arange(len(ids))):
        return jnp.pad(limbs, ((0, silos - len(ids)), (0, 0), (0, 0)))
    return budget.carry(jnp.zeros((silos, probes, 2), jnp.int32).at[ids].add(limbs))


@partial(jax.jit, static_argnames=("axis", "rowwise"))
def _above(keys: jax.Array, t: jax.Array, axis: int | None, rowwise: bool) -> jax.Array:
    """How many keys of each slice exceed each of its thresholds, (slices, probes) or limbs of that."""
    masks = [keys > spread(t[:, j], axis, keys.ndim).astype(keys.dtype) for j in range(t.shape[1])]
    sums = [x.reshape(len(t), *x.shape[axis is not None :]) for x in _sums(masks, axis, rowwise)]
    return jnp.stack(sums, axis=1)


@partial(jax.jit, static_argnames="rowwise")
def how_many(mask: jax.Array, rowwise: bool) -> jax.Array:
    """How many entries are set, () int32."""
    # one array alone XLA CPU sums as a tree, for which it writes down the addends
    one, other = (x if x.ndim == 0 else (x[0] << 16) + x[1] for x in _sums([mask, mask], None, rowwise))
    return one | other


def _as_limbs(counts: jax.Array) -> jax.Array:
    return counts if counts.ndim == 3 else budget.split(counts)


def _replicated(counts: jax.Array) -> jax.Array:
    """Counts of a sharded stacked axis, on a mesh of explicit axes, on every device."""
    spec = jax.typeof(counts).sharding.spec
    if all(axis is None for axis in spec):
        return counts
    return jax.sharding.reshard(counts, jax.sharding.PartitionSpec(*[None] * counts.ndim))


def _sums(masks: list[jax.Array], axis: int | None, rowwise: bool) -> list[jax.Array]:
    """How many entries of each mask are set in each slice of ``axis``; as limbs where they may be many."""
    shape = masks[0].shape
    rest = tuple(i for i in range(len(shape)) if i != axis)
    if _are_many(shape, axis):
        return [_huge_sum(mask, rest) for mask in masks]
    ones = [mask.astype(jnp.int32) for mask in masks]
    if not rest:
        return ones
    if not rowwise:
        return lax.platform_dependent(
            *ones, cpu=partial(_one_reduction, rest), default=partial(_fused_sums, rest)
        )
    if len(shape) == 1 and (rows := _rows(shape[0])) > 1:
        ones, rest = [x.reshape(rows, -1) for x in ones], (0, 1)
    first, *others = rest
    sums = _one_reduction(tuple(others), *ones) if others else ones
    return _one_reduction((int(axis is not None and axis < first),), *sums)


def _rows(size: int) -> int:
    """How many rows a vector is counted in: if it is long, the largest divisor up to its square root."""
    return next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0) if size >= 2**16 else 1


def _are_many(shape: tuple[int, ...], axis: int | None) -> bool:
    """Whether a slice of ``axis`` has more entries than an int32 counts."""
    return math.prod(n for i, n in enumerate(shape) if i != axis) >= 2**31


def _one_reduction(axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    """Sums of several int32 arrays in one read, on CPU."""
    zeros = tuple(jnp.int32(0) for _ in arrays)
    return list(lax.reduce(arrays, zeros, lambda a, b: jax.tree.map(jnp.add, a, b), axes))


def _fused_sums(axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    """Sums of several int32 arrays, which accelerators fuse into one read."""
    return [jnp.sum(x, axis=axes, dtype=jnp.int32) for x in arrays]


def _huge_sum(mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum over more than 2**31 entries, axis by axis in limbs."""
    pair = jnp.stack([jnp.zeros(mask.shape, jnp.int32), mask.astype(jnp.int32)], axis=-1)
    for axis in sorted(axes, reverse=True):
        hi, lo = pair[..., 0], pair[..., 1]
        low_byte = jnp.sum(lo & 0xFF, axis=axis, dtype=jnp.int32)
        high_byte = jnp.sum(lo >> 8, axis=axis, dtype=jnp.int32)
        hi = jnp.sum(hi, axis=axis, dtype=jnp.int32) + (high_byte >> 8)
        pair = budget.carry(jnp.stack([hi, low_byte + ((high_byte & 0xFF) << 8)], axis=-1))
    return pair
