"""The entries of one tensor that differ from the seed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dst_optax.subset import gaps, trees
from dst_optax.subset.errors import SubsetError


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one tensor that differ from the seed.

    Attributes:
      shape: shape of the tensor.
      positions: (k,) row-major positions, strictly increasing; int32, int64 for more than 2**31 entries.
      values: (k,) values of the tuned tensor, in its dtype.
      seed_values: (k,) values of the seed, or None.
      seed_fingerprint: of the seed's tensor, or None where the seed is not known.
      before_astype: dtype and fingerprint of the seed's tensor before :meth:`Subset.astype`, by which
        conversions recognise it; not written to files.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> entries = subset.Entries((2, 3), np.array([1, 5]), np.array([0.5, 2.0], np.float32))
      >>> len(entries), entries.size, str(entries.dtype)
      (2, 6, 'float32')
    """

    shape: tuple[int, ...]
    positions: np.ndarray
    values: np.ndarray
    seed_values: np.ndarray | None = None
    seed_fingerprint: str | None = None
    before_astype: tuple[np.dtype, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        if self.size > gaps.MAX_SIZE:
            raise SubsetError(f"a tensor of shape {self.shape} has more than {gaps.MAX_SIZE} entries.")
        positions = np.asarray(self.positions)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise SubsetError(f"positions must be 1-d integers, got {positions.dtype}{positions.shape}.")
        if len(positions) and (
            not 0 <= positions[0] <= positions[-1] < self.size or not np.all(positions[1:] > positions[:-1])
        ):
            raise SubsetError(
                f"positions must increase strictly and lie in [0, {self.size}), the shape is {self.shape}."
            )
        object.__setattr__(self, "positions", positions.astype(gaps.position_dtype(self.size), copy=False))
        for values in (self.values, self.seed_values):
            if values is not None and (values.shape != positions.shape or values.dtype != self.dtype):
                raise SubsetError(
                    f"values must be {self.dtype}{positions.shape}, got {values.dtype}{values.shape}."
                )

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tensor."""
        return self.values.dtype

    @property
    def size(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, index: Any) -> "Entries":
        """The entries chosen by an index into ``positions``."""
        return dataclasses.replace(
            self,
            positions=self.positions[index],
            values=self.values[index],
            seed_values=None if self.seed_values is None else self.seed_values[index],
        )


def same_values(a: Entries, b: Entries) -> bool:
    """Whether entries have the same positions and, bit for bit, values."""
    return np.array_equal(a.positions, b.positions) and np.array_equal(
        trees.bits(a.values), trees.bits(b.values)
    )


def has_seed_values(leaves: Mapping[str, Entries]) -> bool:
    """Whether the seed's values are known for all entries of a model."""
    return all(e.seed_values is not None for e in leaves.values())
