"""Exact thresholds by counting: without sorting, and without moving a parameter between devices.

For a silo with budget m we look for a threshold t with exactly m keys above it or, where equal keys forbid
that, the smallest t with fewer. A pass reads the keys once and counts how many exceed each of ``PROBES``
candidates; the counts narrow a bracket ``(lo, hi]`` around t. Half of the probes stand where the ranks at the
ends of the bracket say that t should be: the error of that interpolation is about the square root of the
entries left, so from a good guess (the last step's threshold) three or four passes suffice. The other half is
spaced evenly: where many keys are equal, ranks mislead, and at worst this is a search that divides by five.

The keys lie in one of two layouts, and this file alone knows which. On one CPU device silos become
rows of matrices, one matrix for all silos of a size, and are searched row by row, in cache; what is
compiled then grows with the number of different sizes, not of tensors. Everywhere else tensors stay
where and as they are, all silos share one loop, and only counts cross devices.

References:
  Floyd, Rivest, *Expected time bounds for selection*, CACM 18(3), 1975.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst_optax.counts import Counts, concatenate, sum_by_silo, sum_of_mask
from dst_optax.silos import LeafPlan, groups_that_share_silos

GUESS_OFFSETS = (-8.0, -2.0, -0.3, 0.3, 2.0, 8.0, 24.0)  # in units of the guess's spread
RANK_OFFSETS = (-2.0, -0.4, 0.4, 2.0)  # in standard errors
EVEN_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the bracket's width
PROBES = len(EVEN_SHARES) + len(RANK_OFFSETS)  # in the first pass one, -1, counts all keys that are ranked
CURVATURE = 0.05  # error of linear interpolation of ranks, for a bracket in which the density may double
BATCH = 2**22  # entries whose keys are in memory at one time on one CPU, or an eighth of the model
CHUNK = 2**12  # entries that one core counts at a time


Count = Callable[[jax.Array], Counts]  # of thresholds (silos, PROBES): how many keys of each silo exceed them


class Query(NamedTuple):
    """What is asked of each silo."""

    m: Counts  # (silos,): so many keys may lie above the threshold
    total: Counts  # (silos,): all keys
    guess: jax.Array  # (silos,) key dtype: where the threshold may be; below 0 for nowhere
    spread: jax.Array  # (silos,) key dtype, positive: how far off the guess may be


class Bracket(NamedTuple):
    """What is known of the thresholds: ``#(key > lo) > m >= #(key > hi)``, or ``lo`` is -1."""

    lo: jax.Array  # (silos,) key dtype
    hi: jax.Array  # (silos,) key dtype
    above_lo: Counts  # (silos,)
    above_hi: Counts  # (silos,)
    ranked: Counts  # (silos,): keys >= 0
    passes: jax.Array  # (silos,) int32

    def met(self, m: Counts) -> jax.Array:
        """Whether exactly the budget lies above ``hi``, shape (silos,) bool."""
        return self.above_hi.equals(m)

    def done(self, m: Counts) -> jax.Array:
        """Whether ``hi`` is the threshold and ``ranked`` is known, shape (silos,) bool."""
        return (self.passes > 0) & (self.met(m) | (self.hi - self.lo == 1))


def search(count: Count, query: Query, top: int, density_scale: int) -> Bracket:
    """Finds a threshold for every silo.

    Args:
      count: counts the silos' keys, see :meth:`Layout.for_each_silo`.
      query: what is asked.
      top: the largest possible key.
      density_scale: difference of keys over which their density may double.

    Returns:
      A bracket that is done for every silo; ``hi`` is the threshold.
    """
    m, guess = query.m, query.guess
    dtype = guess.dtype
    real = jnp.float64 if dtype == jnp.int64 else jnp.float32
    unsigned = jnp.uint64 if dtype == jnp.int64 else jnp.uint32  # hi - lo may exceed a signed integer
    start = Bracket(
        lo=jnp.full_like(guess, -1),
        hi=jnp.full_like(guess, top),
        above_lo=query.total,
        above_hi=m - m,
        ranked=query.total,
        passes=jnp.zeros(guess.shape, jnp.int32),
    )

    def inside(b: Bracket) -> jax.Array:
        """Probes at even shares of the bracket, and around the share p = (#lo - m) / n of its n entries.

        They lie within multiples of the standard error sqrt(p (1 - p) / n), at least 1 / 2n, and the bend
        of the density.
        """
        width = (b.hi.astype(unsigned) - b.lo.astype(unsigned)).astype(real)
        n = jnp.maximum((b.above_lo - b.above_hi).to_float(), 1.0)
        p = jnp.clip((b.above_lo - m).to_float() / n, 0.0, 1.0)
        error = jnp.sqrt(jnp.maximum(p * (1 - p) / n, 1 / (4 * n * n))).astype(real)
        error = error + CURVATURE * jnp.minimum(width / float(density_scale), 1.0)
        by_rank = p.astype(real)[:, None] + error[:, None] * jnp.array([RANK_OFFSETS], real)
        even = jnp.broadcast_to(jnp.array([EVEN_SHARES], real), by_rank.shape)
        share = jnp.clip(jnp.concatenate([even, by_rank], axis=1), 0.0, 1.0)
        offset = jnp.round(share * width[:, None]).astype(dtype)
        return b.lo[:, None] + jnp.minimum(offset, (b.hi - 1 - b.lo)[:, None])

    def around_guess() -> jax.Array:
        spread = jnp.minimum(query.spread.astype(real), float(density_scale))
        away = (spread[:, None] * jnp.array([(0.0, *GUESS_OFFSETS)], real)).astype(dtype)
        return guess[:, None] + jnp.clip(away, -guess[:, None], top - guess[:, None])

    def probes(b: Bracket) -> jax.Array:
        first = (b.passes == 0)[:, None]
        t = jnp.where(first & (guess >= 0)[:, None], around_guess(), inside(b))
        t = jnp.clip(t, b.lo[:, None] + 1, jnp.maximum(b.hi, 1)[:, None] - 1)
        return jnp.where(first & (jnp.arange(PROBES) == 0)[None], -1, t)

    def narrow(carry: tuple[Bracket, jax.Array]) -> tuple[Bracket, jax.Array]:
        b, t = carry
        above = count(t)
        fits = (above <= m[:, None]) & (t >= 0)
        lo = jnp.maximum(b.lo, jnp.max(jnp.where(fits, -1, t), axis=1))
        hi = jnp.minimum(b.hi, jnp.min(jnp.where(fits, t, top), axis=1))

        def count_at(end: jax.Array, old_end: jax.Array, old: Counts) -> Counts:
            """The count at the probe that is the new end; equal probes have equal counts."""
            at_end = jnp.where(t == end[:, None], 1, 0)
            count_at_end = Counts(jnp.max(above.high * at_end, axis=1), jnp.max(above.low * at_end, axis=1))
            return old.where(end == old_end, count_at_end)

        narrowed = Bracket(
            lo=lo,
            hi=hi,
            above_lo=count_at(lo, b.lo, b.above_lo),
            above_hi=count_at(hi, b.hi, b.above_hi),
            ranked=above[:, 0].where(b.passes == 0, b.ranked),
            passes=b.passes + 1,
        )
        b = jax.tree.map(partial(jnp.where, b.done(m)), b, narrowed)
        return b, probes(b)

    return lax.while_loop(lambda carry: ~carry[0].done(m).all(), narrow, (start, probes(start)))[0]


class Keys(NamedTuple):
    """Keys of entries that compete: those of a tensor, or of silos as the rows of a matrix.

    Attributes:
      values: int32 or int64 of any shape; entries below 0 are outside of the ranking.
      axis: axis whose slices are in different silos, or None.
      silos: indices of the silos, one or one per slice.
      offsets: for each of ``silos``, its entries that come before these.
      zero: uint32 zero that the compiler cannot know.
    """

    values: jax.Array
    axis: int | None
    silos: tuple[int, ...]
    offsets: tuple[int, ...]
    zero: jax.Array

    def take(self, per_silo: Any) -> Any:
        """Values of these silos out of those of all, ``(silos, ...)``."""
        if len(self.silos) != 1:
            return jax.tree.map(lambda x: x[np.array(self.silos, np.uint32)], per_silo)
        (silo,) = self.silos
        at = runtime_index(silo, self.zero)
        return jax.tree.map(lambda x: _row(x, at), per_silo)

    def broadcast(self, per_silo: Any) -> Any:
        """Values of these silos, shaped so that they broadcast against the keys."""
        return jax.tree.map(lambda x: _along(x, self.axis, self.values.ndim), self.take(per_silo))


def runtime_index(i: int, zero: jax.Array) -> jax.Array:
    """``i`` as a uint32 scalar that is read from memory.

    As a constant it would be part of the kernel, and XLA compiles kernels that are equal only once
    (test_compilation_does_not_grow_with_tensors_of_one_shape). Indices without a sign need not be wrapped.
    """
    return _row(jnp.asarray(np.array([i, i + 1], np.uint32)), zero).reshape(())


def _row(x: jax.Array, at: jax.Array) -> jax.Array:
    """One row of ``x`` as an array of one row."""
    start = (at, *[jnp.zeros_like(at)] * (x.ndim - 1))
    return lax.dynamic_slice(x, start, (1, *x.shape[1:]))


class Layout(Protocol):
    """How keys lie in memory, and so how they are counted."""

    def batches(self, leaves: Sequence[LeafPlan]) -> list[list[int]]:
        """Leaves in groups that are worked on one after another; no silo is in two of them."""
        ...

    def arrange(self, keys: list[Keys]) -> tuple[list[Keys], list[Keys]]:
        """Keys of tensors as they are searched, and the same keys in the tensors' shapes, read from there."""
        ...

    def for_each_silo(self, method: Callable[[Count, Any], Any], keys: list[Keys], per_silo: Any) -> Any:
        """``method(count, per_silo)`` for all silos.

        Args:
          method: works on as many silos as it is given, one or all.
          keys: their keys, arranged.
          per_silo: pytree of arrays, ``(silos, ...)``.

        Returns:
          What the method returned, arrays ``(silos, ...)``; 0 for silos of which there are no keys.
        """
        ...


def per_platform(method: Callable[..., Any], largest: int, *args: Any) -> Any:
    """``method(layout, *args)`` with the layout that suits the platform it is compiled for.

    Args:
      method: traced for each platform.
      largest: entries of the largest silo; a row has less than 2**31.
      *args: pytrees of arrays.
    """
    everywhere = partial(method, Tensors())
    on_a_mesh = any(axis is not None for x in jax.tree.leaves(args) for axis in jax.typeof(x).sharding.spec)
    if jax.device_count() > 1 or on_a_mesh or largest >= 2**31:
        return everywhere(*args)
    return lax.platform_dependent(*args, cpu=partial(method, Rows()), default=everywhere)


class Tensors:
    """Keys stay as the tensors lie, on whatever mesh; a pass counts all silos and is one exchange."""

    def batches(self, leaves: Sequence[LeafPlan]) -> list[list[int]]:
        """All at once."""
        return [list(range(len(leaves)))]

    def arrange(self, keys: list[Keys]) -> tuple[list[Keys], list[Keys]]:
        """As they are."""
        return keys, keys

    def for_each_silo(self, method: Callable[[Count, Any], Any], keys: list[Keys], per_silo: Any) -> Any:
        """See :class:`Layout`."""

        def count(t: jax.Array) -> Counts:
            above = [_above(x.values, x.take(t), x.axis) for x in keys]
            return sum_by_silo(concatenate(above), [s for x in keys for s in x.silos], len(t))

        return method(count, per_silo)


class _Block(NamedTuple):
    """Slices of a tensor that lie below each other in a matrix."""

    first: int
    number: int
    matrix: int  # which one, by the size of its silos
    start: tuple[jax.Array, jax.Array]  # row and column there


class Rows:
    """Silos as rows of matrices, on one CPU device."""

    def batches(self, leaves: Sequence[LeafPlan]) -> list[list[int]]:
        """Tensors that share silos stay together, tensors of one size beside each other."""
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        limit = max(BATCH, sum(sizes) // 8)
        batches: dict[tuple[int, ...], list[list[int]]] = {}
        for group in groups_that_share_silos(leaves):
            shape = tuple(sizes[j] for j in group)
            alike = batches.setdefault(shape, [[]])
            if sum(sizes[j] for j in alike[-1]) + sum(shape) > limit and alike[-1]:
                alike.append([])
            alike[-1].extend(group)
        ascending = sorted(
            (sorted(batch) for alike in batches.values() for batch in alike),
            key=lambda batch: sum(sizes[j] for j in batch),
        )
        # steps of a batch are in memory until they are applied: a small batch follows each large one
        pairs = zip(reversed(ascending), ascending, strict=True)
        return [batch for pair in pairs for batch in pair][: len(ascending)]

    def arrange(self, keys: list[Keys]) -> tuple[list[Keys], list[Keys]]:
        """Silos of one size, which must be numbered one after the other, become the rows of a matrix."""
        zero = keys[0].zero
        sizes: dict[int, int] = {}
        for x in keys:
            for silo, offset in zip(x.silos, x.offsets, strict=True):
                sizes[silo] = max(sizes.get(silo, 0), offset + x.values.size // len(x.silos))
        silos_of: dict[int, list[int]] = {}
        for silo, size in sorted(sizes.items()):
            silos_of.setdefault(size, []).append(silo)
        empty = zero.astype(keys[0].values.dtype)  # not a constant, or all matrices would be made first
        matrices = {n: jnp.broadcast_to(empty, (len(silos), n)) for n, silos in silos_of.items()}

        row_of = {silo: row for silos in silos_of.values() for row, silo in enumerate(silos)}

        def blocks(x: Keys) -> list[_Block]:
            """Slices whose rows follow each other in one matrix are moved together."""

            def place(i: int) -> tuple[int, int, int]:
                return sizes[x.silos[i]], row_of[x.silos[i]] - i, x.offsets[i]

            found = []
            for (n, above, offset), run in itertools.groupby(range(len(x.silos)), place):
                first, *rest = run
                start = (runtime_index(first + above, zero), runtime_index(offset, zero))
                found.append(_Block(first, 1 + len(rest), n, start))
            return found

        places = [blocks(x) for x in keys]
        for x, at in zip(keys, places, strict=True):
            slices = x.values[None] if x.axis is None else jnp.moveaxis(x.values, x.axis, 0)
            for b in at:
                block = lax.slice_in_dim(slices, b.first, b.first + b.number).reshape(b.number, -1)
                matrices[b.matrix] = lax.dynamic_update_slice(matrices[b.matrix], block, b.start)

        def read(x: Keys, at: list[_Block]) -> jax.Array:
            size, shape = x.values.size // len(x.silos), x.values.shape
            found = [lax.dynamic_slice(matrices[b.matrix], b.start, (b.number, size)) for b in at]
            if x.axis is None:
                return found[0].reshape(shape)
            slices = jnp.concatenate(found).reshape(len(x.silos), *np.delete(shape, x.axis))
            return jnp.moveaxis(slices, 0, x.axis)

        rows = [Keys(matrices[n], 0, tuple(s), (0,) * len(s), zero) for n, s in silos_of.items()]
        return rows, [x._replace(values=read(x, at)) for x, at in zip(keys, places, strict=True)]

    def for_each_silo(self, method: Callable[[Count, Any], Any], keys: list[Keys], per_silo: Any) -> Any:
        """See :class:`Layout`."""

        def visit(x: Keys, i: jax.Array, results: Any) -> Any:
            silo = runtime_index(x.silos[0], x.zero) + i
            row = x.values if len(x.silos) == 1 else _row(x.values, i)  # a matrix of one row is not copied
            of_silo = method(
                lambda t: _above(row.reshape(-1), t, None), jax.tree.map(lambda v: _row(v, silo), per_silo)
            )
            return jax.tree.map(
                lambda all_, own: lax.dynamic_update_slice(all_, own, (silo,)), results, of_silo
            )

        none_above = lambda t: Counts.from_int32(jnp.zeros(t.shape, jnp.int32))  # noqa: E731
        like = jax.eval_shape(partial(method, none_above), per_silo)
        results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        for x in keys:
            if x.silos != tuple(range(x.silos[0], x.silos[0] + len(x.silos))):
                raise ValueError(f"rows of silos {x.silos}, which are not numbered one after the other.")
            if len(x.silos) == 1:
                results = visit(x, jnp.uint32(0), results)
            else:
                results = lax.fori_loop(jnp.uint32(0), jnp.uint32(len(x.silos)), partial(visit, x), results)
        return results


def search_order(leaves: Sequence[LeafPlan], batches: list[list[int]], sizes: Sequence[int]) -> list[int]:
    """All silos, those that a batch searches together side by side and by size, as :class:`Rows` needs them.

    Args:
      leaves: the tensors that are searched.
      batches: of them, see :meth:`Layout.batches`.
      sizes: entries of each silo; silos of other tensors come last.
    """
    batch_of = {s: i for i, batch in enumerate(batches) for j in batch for s in leaves[j].silos}
    return sorted(range(len(sizes)), key=lambda s: (batch_of.get(s, len(batches)), sizes[s]))


def _along(values: jax.Array, axis: int | None, ndim: int) -> jax.Array:
    """A value for each slice of an axis, shaped so that it broadcasts against a tensor."""
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


@partial(jax.jit, static_argnames="axis")  # traced once for all tensors of a shape
def _above(keys: jax.Array, t: jax.Array, axis: int | None) -> Counts:
    """How many keys of each slice exceed each of its thresholds, shape (slices, probes) like ``t``."""
    masks = [keys > _along(t[:, j], axis, keys.ndim) for j in range(PROBES)]
    rest = tuple(i for i in range(keys.ndim) if i != axis)
    if math.prod(keys.shape[i] for i in rest) >= 2**31:
        parts = [sum_of_mask(mask, rest) for mask in masks]
        return jax.tree.map(lambda *x: jnp.stack([v.reshape(len(t)) for v in x], axis=1), *parts)
    ones = [mask.astype(jnp.int32) for mask in masks]
    if rest:
        ones = lax.platform_dependent(
            *ones, cpu=partial(_sums_on_cpu, rest), default=partial(_fused_sums, rest)
        )
    return Counts.from_int32(replicated(jnp.stack([x.reshape(len(t)) for x in ones], axis=1)))


def _sums_on_cpu(axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    """Sums of several int32 arrays in one read.

    XLA CPU reads once for one variadic reduction, not for several sums, and spreads a reduction over
    its cores only along dimensions that stay (test_structure.py, test_long_vectors_are_counted_in_rows).
    """
    if arrays[0].ndim == 1 and (chunks := _chunks(arrays[0].size)) > 1:
        arrays = tuple(x.reshape(chunks, -1) for x in arrays)
        return _sums_on_cpu((0,), *_variadic_sum((1,), *arrays))
    return _variadic_sum(axes, *arrays)


def _variadic_sum(axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    zeros = tuple(jnp.int32(0) for _ in arrays)
    return list(lax.reduce(arrays, zeros, lambda a, b: jax.tree.map(jnp.add, a, b), axes))


def _fused_sums(axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    """Sums of several int32 arrays, which accelerators fuse into one read."""
    return [jnp.sum(x, axis=axes, dtype=jnp.int32) for x in arrays]


def _chunks(size: int) -> int:
    """In how many chunks a vector is counted: the largest divisor that leaves ``CHUNK`` entries or more."""
    return next(n for n in range(max(1, min(64, size // CHUNK)), 0, -1) if size % n == 0)


def replicated(counts: jax.Array) -> jax.Array:
    """Counts of a sharded stacked axis, on a mesh of explicit axes, on every device."""
    sharding = jax.typeof(counts).sharding
    if all(axis is None for axis in sharding.spec):
        return counts
    everywhere = jax.sharding.PartitionSpec(*[None] * counts.ndim)
    return jax.sharding.reshard(counts, jax.sharding.NamedSharding(sharding.mesh, everywhere))
