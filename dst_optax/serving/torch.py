"""Many tuned models on one resident PyTorch module.

The module keeps its tensors, so compiled or captured graphs that read them see the new values.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dst_optax.serving import in_place
from dst_optax.serving.in_place import DTYPES, InPlaceStore, Piece
from dst_optax.serving.store import Loaded
from dst_optax.subset import Subset, SubsetError, fingerprints
from dst_optax.subset.entries import same_values


class _Slot(NamedTuple):
    """Where a module holds a tensor, and the memory that it lay in when the store was made."""

    owner: torch.nn.Module
    attribute: str
    memory: torch.Tensor

    @property
    def tensor(self) -> torch.Tensor:
        return getattr(self.owner, self.attribute).detach()


class SubsetStore(InPlaceStore):
    """Named subsets on one resident module, one of them active at a time.

    All methods may be called from several threads. A module that one thread uses must not be switched by
    another meanwhile: use :meth:`use`, which holds the store for as long as its block runs. PEFT's verbs
    :meth:`load_adapter`, :meth:`set_adapter` and :meth:`disable_adapter` do what its users expect.

    Example:
      >>> import numpy as np, torch
      >>> from dst_optax import subset
      >>> from dst_optax.serving.torch import SubsetStore
      >>> layer = torch.nn.Linear(2, 1, bias=False)
      >>> _ = torch.nn.init.zeros_(layer.weight)
      >>> seed, tuned = np.zeros((1, 2), np.float32), np.array([[0, 3]], np.float32)
      >>> store = SubsetStore(layer)
      >>> store.add("boolq", subset.from_models({"weight": seed}, {"weight": tuned}))
      >>> with store.use("boolq") as model:
      ...     model(torch.ones(2)).tolist()
      [3.0]
      >>> store.deactivate().weight.tolist()
      [[0.0, 0.0]]
    """

    def __init__(self, model: torch.nn.Module, *, max_bytes: int | None = None) -> None:
        """Takes over a seed model.

        Args:
          model: holds the seed's values now. Its parameters, and its buffers that a checkpoint has, are named
            as the subsets name them, which is how ``transformers`` names a checkpoint's tensors; any dtypes,
            devices and strides. It may be compiled. It is read once for the fingerprints.
          max_bytes: bound on the bytes of all loaded subsets; the least recently used ones make room. None
            for no bound.

        Raises:
          SubsetError: a tensor cannot be written in place: it has no memory, is of another class, or shares
            memory with another tensor.
        """
        super().__init__(model, max_bytes=max_bytes)
        slots = dict(_slots(model))
        self._primary = _first_names(slots)
        self._slots = {name: slot for name, slot in slots.items() if self._primary[name] == name}
        _check_apart(self._slots)
        self._versions = {name: _version(slot.memory) for name, slot in self._slots.items()}
        arrays = (_host_array(slot.tensor) for slot in self._slots.values())
        self._fingerprints = dict(zip(self._slots, fingerprints(arrays), strict=True))

    def load_adapter(self, directory: str | os.PathLike[str], adapter_name: str) -> None:
        """PEFT's name for :meth:`load`."""
        self.load(adapter_name, directory)

    def set_adapter(self, adapter_name: str) -> None:
        """PEFT's name for :meth:`activate`."""
        self.activate(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[torch.nn.Module]:
        """Gives the seed model within a block, and after it the model of before, as PEFT does."""
        with self._lock:
            before, uses, self._uses = self._active, self._uses, 0  # a block of `use` gets its model back
            try:
                yield self.deactivate()
            finally:
                if before is None:
                    self.deactivate()
                elif before in self._loaded:
                    self.activate(before)
                self._uses = uses

    def _place(self, subset: Subset) -> Loaded[dict[str, Piece]]:
        subset = self._renamed(subset)
        pieces = {}
        for name, e in subset.items():
            if len(e):
                x = self._slots[name].tensor
                offsets = in_place.memory_offsets(e.positions, x.shape, x.stride())
                offsets = torch.from_numpy(offsets).to(x.device)
                seed = self._seed_bits(name, offsets)
                pieces[name] = Piece(offsets, in_place.bits(e.values, x.device), seed)
        return in_place.loaded(subset, pieces)

    def _renamed(self, subset: Subset) -> Subset:
        """The subset with tied tensors under their first names, once, if it is of this seed."""
        covered = {self._primary[name] for name in subset if name in self._primary}
        needed = [
            n for n, s in self._slots.items() if s.attribute in s.owner._parameters and n not in covered
        ]
        structure = {
            name: _structure(self._slots[self._primary[name]].tensor)
            for name in [*(n for n in subset if n in self._primary), *needed]
        }
        subset.check_structure(structure)
        subset.check_fingerprints({name: self._fingerprints[self._primary[name]] for name in subset})
        leaves = {}
        for name, e in subset.items():
            other = leaves.setdefault(self._primary[name], e)
            if not same_values(other, e):
                raise SubsetError(
                    f"{self._primary[name]!r} and {name!r} are one tensor in the model, and the subset gives "
                    "them different values."
                )
        return Subset(leaves, subset.metadata)

    def _switch(self, name: str | None) -> None:
        touched = [path for n in (self._active, name) if n for path in self._get(n).pieces]
        for path in touched:
            self._memory(path)
        try:
            super()._switch(name)
        finally:
            stores = {_storage(self._slots[path].memory) for path in touched}  # views of one share a version
            self._versions |= {
                path: _version(slot.memory)
                for path, slot in self._slots.items()
                if _storage(slot.memory) in stores
            }

    def _memory(self, path: str) -> torch.Tensor:
        slot = self._slots[path]
        if slot.tensor.data_ptr() != slot.memory.data_ptr():
            raise SubsetError(
                f"{path!r} was moved or converted after the store was made; make a new one from the seed."
            )
        if _version(slot.memory) != self._versions[path]:
            raise SubsetError(
                f"{path!r} was written to by others after the store was made; make a new one from the seed."
            )
        return slot.memory


def _storage(memory: torch.Tensor) -> int:
    return memory.untyped_storage()._cdata


def _version(memory: torch.Tensor) -> int:
    """How often a tensor was written to; PyTorch does not count it in inference mode."""
    return 0 if memory.is_inference() else memory._version


def _slots(model: torch.nn.Module) -> Iterator[tuple[str, _Slot]]:
    """The tensors that a checkpoint of a module has, tied ones under each of their names."""
    wrapped = {"_orig_mod"}  # what compiled and parallel modules call the module inside
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            wrapped.add(f"{prefix}.module".removeprefix("."))
        parts = prefix.split(".")
        inside = [
            ".".join(parts[: i + 1]) in wrapped or part in ("", "_orig_mod") for i, part in enumerate(parts)
        ]
        prefix = "".join(f"{part}." for part, drop in zip(parts, inside, strict=True) if not drop)
        transient = module._non_persistent_buffers_set
        buffers = {k: x for k, x in module._buffers.items() if k not in transient}
        for attribute, x in {**module._parameters, **buffers}.items():
            if x is not None:
                in_place.check_writable(prefix + attribute, x)
                yield prefix + attribute, _Slot(module, attribute, in_place.memory(x))


def _first_names(slots: dict[str, _Slot]) -> dict[str, str]:
    """The first name of the tensor behind each name."""
    first: dict[tuple[Any, ...], str] = {}
    names = {}
    for name, slot in slots.items():
        x = slot.tensor
        place = (x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) if x.numel() else (name,)
        names[name] = first.setdefault(place, name)
    return names


def _check_apart(slots: dict[str, _Slot]) -> None:
    """Raises if two tensors share memory."""
    filled = [(name, slot.tensor) for name, slot in slots.items() if slot.tensor.numel()]
    ordered = sorted(filled, key=lambda item: (str(item[1].device), item[1].data_ptr()))
    for (a, x), (b, y) in itertools.pairwise(ordered):
        if x.device == y.device and y.data_ptr() < x.data_ptr() + in_place.memory(x).nbytes:
            raise SubsetError(f"{a!r} and {b!r} overlap in memory; only whole tensors can be tied.")


def _structure(x: torch.Tensor) -> tuple[tuple[int, ...], np.dtype]:
    return tuple(x.shape), DTYPES[x.dtype]


def _host_array(x: torch.Tensor) -> np.ndarray:
    shape, dtype = _structure(x)
    return in_place.memory(x.cpu().contiguous()).numpy().view(dtype).reshape(shape)
