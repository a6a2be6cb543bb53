"""Counts beyond 2**31 while 64-bit integers are off: pairs of int32 that add and compare exactly."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 16  # bits of the low part, so that it adds without overflow over 2**15 addends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Integers ``high * 2**16 + low`` below 2**47, of any shape.

    Example:
      >>> a, b = Counts.of([3 * 2**31, 5]), Counts.of([2**31, 5])
      >>> (a - b).to_float().tolist(), (a <= b).tolist()
      ([4294967296.0, 0.0], [False, True])
    """

    high: jax.Array  # any shape, int32
    low: jax.Array  # same shape, int32 in [0, 2**16)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Counts":
        """Python integers, exactly; shape ``(len(numbers),)``."""
        high = np.array([n >> DIGIT for n in numbers], np.int32)
        low = np.array([n & 0xFFFF for n in numbers], np.int32)
        return cls(jnp.asarray(high), jnp.asarray(low))

    @classmethod
    def carried(cls, high: jax.Array, low: jax.Array) -> "Counts":
        """From parts of which the low one may be negative or exceed 2**16."""
        return cls(high + (low >> DIGIT), low & 0xFFFF)

    @classmethod
    def from_int32(cls, counts: jax.Array) -> "Counts":
        """int32 counts of any shape."""
        return cls(counts >> DIGIT, counts & 0xFFFF)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts.carried(self.high + other.high, self.low + other.low)

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts.carried(self.high - other.high, self.low - other.low)

    def __le__(self, other: "Counts") -> jax.Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low <= other.low))

    def __getitem__(self, index: Any) -> "Counts":
        return Counts(self.high[index], self.low[index])

    def equals(self, other: "Counts") -> jax.Array:
        """Whether they are equal, elementwise, bool."""
        return (self.high == other.high) & (self.low == other.low)

    def is_zero(self) -> jax.Array:
        """Whether they are 0, elementwise, bool."""
        return (self.high == 0) & (self.low == 0)

    def where(self, condition: jax.Array, other: "Counts") -> "Counts":
        """These counts where ``condition`` holds, ``other`` elsewhere."""
        return Counts(jnp.where(condition, self.high, other.high), jnp.where(condition, self.low, other.low))

    def sum(self, axis: int | None = None) -> "Counts":
        """Their sum along an axis of up to 2**15 counts."""
        return Counts.carried(
            jnp.sum(self.high, axis, dtype=jnp.int32), jnp.sum(self.low, axis, dtype=jnp.int32)
        )

    def to_float(self) -> jax.Array:
        """Rounded to float32."""
        return self.high.astype(jnp.float32) * float(1 << DIGIT) + self.low.astype(jnp.float32)


def concatenate(parts: Sequence[Counts]) -> Counts:
    """Joins counts along their first axis."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def sum_by_silo(counts: Counts, silos: Sequence[int], num_silos: int) -> Counts:
    """Adds up rows of counts that belong to one silo.

    Args:
      counts: shape ``(rows, ...)``.
      silos: the silo of each row, at most 2**15 rows a silo.
      num_silos: how many silos there are.

    Returns:
      Counts of shape ``(num_silos, ...)``.
    """
    ids = np.array(silos, np.int32)

    def add(part: jax.Array) -> jax.Array:
        return jnp.zeros((num_silos, *part.shape[1:]), jnp.int32).at[ids].add(part)

    return Counts.carried(add(counts.high), add(counts.low))


def sum_of_mask(mask: jax.Array, axes: Sequence[int]) -> Counts:
    """How many entries are set, along axes that span less than 2**46 entries, each less than 2**31."""
    total = Counts(jnp.zeros(mask.shape, jnp.int32), mask.astype(jnp.int32))
    # bytes add up without overflow along axes below 2**23 entries, and bits, which come first, along any
    for axis in sorted(axes, key=lambda axis: (mask.shape[axis] >= 2**23, axis), reverse=True):
        add = partial(jnp.sum, axis=axis, dtype=jnp.int32, keepdims=True)
        low_byte, high_byte = add(total.low & 0xFF), add(total.low >> 8)
        total = Counts.carried(add(total.high) + (high_byte >> 8), low_byte + ((high_byte & 0xFF) << 8))
    return jax.tree.map(partial(jnp.squeeze, axis=tuple(axes)), total)


def product_words(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """``x * factor`` as its low and its high 32 bits.

    Args:
      x: uint32 of any shape.
      factor: below 2**48.

    Returns:
      Two uint32 arrays of that shape.

    Example:
      >>> low, high = product_words(jnp.uint32(3), 2**33 + 1)
      >>> int(low), int(high)
      (3, 6)
    """
    digits = [jnp.uint32((factor >> (DIGIT * i)) & 0xFFFF) for i in range(3)]
    product = _multiply([x & 0xFFFF, x >> DIGIT], digits)
    return product[0] | (product[1] << DIGIT), product[2] | (product[3] << DIGIT)


def ceil_of_product(numbers: Sequence[int], factor: jax.Array, shift: jax.Array) -> Counts:
    """``ceil(number * factor / 2**shift)``, exactly.

    Args:
      numbers: Python integers below 2**47.
      factor: uint32 scalar.
      shift: int32 scalar in [1, 151].

    Returns:
      Counts of shape ``(len(numbers),)``; the results must be below 2**47.
    """
    others = np.asarray(numbers, np.int64)
    digits = [jnp.asarray((others >> (DIGIT * i)) & 0xFFFF, jnp.uint32) for i in range(3)]
    product = _multiply(digits, [factor & 0xFFFF, factor >> DIGIT])
    whole, part = shift // DIGIT, (shift % DIGIT).astype(jnp.uint32)
    padded = jnp.stack([*product, *[jnp.zeros_like(product[0])] * 12])
    window = jax.lax.dynamic_slice_in_dim(padded, whole, 4)
    down = [((window[i] | (window[i + 1] << DIGIT)) >> part) & 0xFFFF for i in range(3)]
    below = jnp.arange(padded.shape[0], dtype=jnp.int32)[:, None] < whole
    cut = jnp.where(below, padded, 0).any(axis=0)
    cut |= (window[0] & ((jnp.uint32(1) << part) - 1)) != 0
    low, middle, high = _normalise([down[0] + cut.astype(jnp.uint32), down[1], down[2]])
    return Counts((middle | (high << DIGIT)).astype(jnp.int32), low.astype(jnp.int32))


def _multiply(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    """Schoolbook product of two numbers in 16-bit digits, least significant first, uint32."""
    columns = [jnp.zeros_like(a[0]) for _ in range(len(a) + len(b))]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            term = x * y
            columns[i + j] += term & 0xFFFF
            columns[i + j + 1] += term >> DIGIT
    return _normalise(columns)


def _normalise(columns: list[jax.Array]) -> list[jax.Array]:
    rest = jnp.zeros_like(columns[0])
    digits = []
    for column in columns:
        column = column + rest
        digits.append(column & 0xFFFF)
        rest = column >> DIGIT
    return digits
