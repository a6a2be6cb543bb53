"""Subsets written in place into the memory of PyTorch tensors.

A tensor's memory is seen as integers of its entries' width, so every bit pattern survives. A subset keeps the
seed's values beside its own: a switch is a write of the seed's values where the old subset was and of the new
subset's where it is, and nothing has to be read.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import abc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dst_optax.serving.store import Loaded, Store
from dst_optax.subset import Subset, SubsetError, dtypes

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {getattr(torch, d.name): d for d in dtypes.DTYPES.values() if hasattr(torch, d.name)}
"""Numpy's dtype of each of PyTorch's that subsets can hold."""


class Piece(NamedTuple):
    """Entries of one tensor, on its device."""

    offsets: torch.Tensor  # (k,) int64, from the tensor's first entry in memory
    values: torch.Tensor  # (k,) integers: the bits
    seed: torch.Tensor  # (k,) integers


class InPlaceStore(Store[torch.nn.Module, dict[str, Piece]]):
    """Named subsets on a module whose tensors are written in place."""

    def __init__(self, model: torch.nn.Module, *, max_bytes: int | None = None) -> None:
        super().__init__(max_bytes=max_bytes)
        self._model = model

    @abc.abstractmethod
    def _memory(self, path: str) -> torch.Tensor:
        """The memory that a piece's offsets are in; raises a SubsetError if it is the model's no longer."""

    def _current(self) -> torch.nn.Module:
        return self._model

    def _check(self, pieces: dict[str, Piece]) -> None:
        for path in pieces:
            self._memory(path)

    @torch.no_grad()
    def _switch(self, name: str | None) -> None:
        old, new = (self._get(n).pieces if n else {} for n in (self._active, name))
        targets = {path: self._memory(path) for path in dict.fromkeys([*old, *new])}

        def exchange(out: dict[str, Piece], into: dict[str, Piece]) -> None:
            """Tensor by tensor, so that the second write finds what the first has brought into the cache."""
            for path, target in targets.items():
                if path in out:
                    scatter(target, out[path].offsets, out[path].seed)
                if path in into:
                    scatter(target, into[path].offsets, into[path].values)

        try:
            exchange(old, new)
        except BaseException:
            exchange(new, old)
            raise
        finally:
            torch.clear_autocast_cache()  # it may hold weights in another dtype
        self._active = name

    def _seed_bits(self, path: str, offsets: torch.Tensor) -> torch.Tensor:
        """The seed's values that the model holds at offsets, also while a subset is active."""
        held = gather(self._memory(path), offsets)
        active = self._get(self._active).pieces.get(path) if self._active else None
        if active is None:
            return held
        ordered, order = active.offsets.sort()
        at = torch.searchsorted(ordered, offsets).clamp(max=len(ordered) - 1)
        return torch.where(ordered[at] == offsets, active.seed[order[at]], held)


def loaded(subset: Subset, pieces: dict[str, Piece]) -> Loaded[dict[str, Piece]]:
    """A subset's pieces and what they occupy."""
    return Loaded(pieces, subset.count, sum(x.nbytes for piece in pieces.values() for x in piece))


def memory(x: torch.Tensor) -> torch.Tensor:
    """The memory that a tensor lies in, from its first entry to its last, as integers of its width."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((span,), (1,)).view(_INTEGERS[x.element_size()])


def memory_offsets(positions: np.ndarray, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """Where row-major positions of a tensor lie in its :func:`memory`, (k,) int64."""
    positions = positions.astype(np.int64)
    offsets, stride = np.zeros_like(positions), 1
    for extent, step in zip(reversed(shape), reversed(strides), strict=True):
        offsets += positions // stride % extent * step
        stride *= extent
    return offsets


def bits(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Values as integers of their width."""
    integers = values.view(f"{'u' if values.itemsize == 1 else 'i'}{values.itemsize}")
    return torch.from_numpy(np.array(integers)).to(device)


def gather(memory: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What lies in memory at offsets."""
    return memory.index_select(0, offsets)


def scatter(memory: torch.Tensor, offsets: torch.Tensor, bits: torch.Tensor) -> None:
    """Writes into memory at offsets."""
    memory.scatter_(0, offsets, bits)


def check_writable(name: str, x: torch.Tensor) -> None:
    """Raises a SubsetError unless every entry of a tensor has memory of its own."""
    if torch.nn.parameter.is_lazy(x):
        raise SubsetError(f"{name!r} has no shape yet; run the model once first.")
    if type(x.detach()) is not torch.Tensor or x.layout != torch.strided:
        raise SubsetError(
            f"{name!r} is a {type(x).__name__} ({x.layout}); only plain tensors can be switched."
        )
    if x.device.type == "meta":
        raise SubsetError(f"{name!r} is on the meta device; load the model's weights first.")
    if x.dtype not in DTYPES:
        raise SubsetError(f"{name!r} has the dtype {x.dtype}, which subsets cannot hold.")
    if not is_nested(x.shape, x.stride()):
        raise SubsetError(f"{name!r} has several entries in one place of memory (an expanded tensor).")


def is_nested(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether each axis steps over all that the axes of smaller strides reach, so no place is met twice."""
    span = 1
    for stride, extent in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < span and 0 not in shape:
            return False
        span += (extent - 1) * stride
    return True
