"""Where an engine keeps each entry of a checkpoint, learned from the engine's own loader.

An engine packs a checkpoint's tensors as it likes: query, key and value in one matrix, the slice of this
device, a padded vocabulary. Its loader knows how. It is run once on tensors without storage, and each copy
that it would make is recorded instead: which view of the model's memory receives which part of which tensor.
Positions then go where the loader would have put them, at a cost that depends on their number alone.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dst_optax.serving import in_place
from dst_optax.serving.in_place import InPlaceStore, Piece
from dst_optax.serving.store import Loaded
from dst_optax.subset import Subset, SubsetError, dtypes, fingerprints, tied

_TORCH_DTYPES = {d.name: getattr(torch, d.name) for d in dtypes.DTYPES.values() if hasattr(torch, d.name)}
_PADDING = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


_FEW = 64  # entries of a tensor


class Route(NamedTuple):
    """One copy that the loader makes.

    Attributes:
      target: the view of the model's memory that is written.
      start: row-major position in the checkpoint's tensor of what the view's first entry gets.
      strides: how far that position moves along each axis of the view.
      owner: the module's dictionary that holds the tensor which the view is of, and its key there.
    """

    target: torch.Tensor
    start: int
    strides: tuple[int, ...]
    owner: tuple[dict[str, Any], str]

    def is_current(self) -> bool:
        """Whether the model still keeps its tensor in this memory."""
        tensors, key = self.owner
        return key in tensors and _storage(tensors[key]) == _storage(self.target)

    def follow(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where positions of the checkpoint's tensor go.

        Args:
          positions: (k,) row-major positions.

        Returns:
          The indices of those that take this route, (j,), and for each the offset from the view's first entry
          in the model's memory, (j,) int64.
        """
        left = positions.astype(np.int64) - self.start
        inside = left >= 0
        offsets = np.zeros_like(left)
        axes = zip(self.strides, self.target.shape, self.target.stride(), strict=True)
        for stride, extent, step in sorted((a for a in axes if a[1] > 1), reverse=True):
            index, left = np.divmod(left, stride)
            inside &= index < extent
            offsets += index * step
        chosen = np.flatnonzero(inside & (left == 0))
        return chosen, offsets[chosen]


def trace(model: torch.nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, list[Route]]:
    """Learns where a model's loader puts a checkpoint's tensors; the model is not changed.

    Args:
      model: has ``load_weights``, which takes pairs of name and tensor.
      checkpoint: the checkpoint's tensors by name; only shapes and dtypes are read.

    Returns:
      For each tensor the copies that are made of it; none where the loader passes it over.

    Raises:
      SubsetError: the loader does anything but copy views of a tensor to views of the model in one dtype.
    """
    tensors = {
        name: torch.empty(tuple(x.shape), dtype=_TORCH_DTYPES[np.dtype(x.dtype).name], device="meta")
        for name, x in checkpoint.items()
    }
    held = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    memory = [(k, p, p.data) for m in model.modules() for k, p in m._parameters.items() if p is not None]
    recorder = _Recorder(tensors, model)
    try:
        with recorder:
            model.load_weights(recorder.announced(tensors))
    except SubsetError:
        raise
    except Exception as e:  # a loader that reads values cannot be traced; models raise what they like
        raise SubsetError(f"{recorder.name!r} is not copied as it is: {type(e).__name__}: {e}") from e
    finally:
        replaced = [k for k, p, x in memory if p.data_ptr() != x.data_ptr()]
        for _, parameter, x in memory:
            parameter.data = x
        for module, *before in held:
            for now, then in zip((vars(module), module._parameters, module._buffers), before, strict=True):
                replaced += [
                    k for k, x in now.items() if isinstance(x, torch.Tensor) and x is not then.get(k)
                ]
                now.clear()
                now.update(then)
    if replaced:
        raise SubsetError(f"the loader replaces the tensors {replaced[:3]} instead of copying into them.")
    return recorder.routes


class _Recorder(TorchDispatchMode):
    """Notes copies from tensors without storage, and keeps the loader from writing to the model."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
        super().__init__()
        self.name = ""
        self.routes: dict[str, list[Route]] = {name: [] for name in tensors}
        self._names = {_storage(x): name for name, x in tensors.items()}
        self._taken: dict[tuple[Any, ...], tuple[str, Route]] = {}
        self._owners = {
            _storage(x): (held, key)
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for key, x in held.items()
            if x is not None
        }

    def announced(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors one by one, so that an error can name the one that was being loaded."""
        for self.name, x in tensors.items():
            yield self.name, x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = _written(func, args, kwargs or {})
        if func is torch.ops.aten.copy_.default and _storage(args[1]) in self._names:
            self._record(args[0], args[1])
        elif not any(_storage(x) in self._owners or x.is_meta for x in written):
            return func(*args, **(kwargs or {}))
        elif func not in _PADDING:
            raise SubsetError(f"{self.name!r} is not copied as it is: the loader calls {func}.")
        return args[0]

    def _record(self, target: torch.Tensor, source: torch.Tensor) -> None:
        name = self._names[_storage(source)]
        if _storage(target) not in self._owners:
            raise SubsetError(f"{name!r} is not copied as it is: the loader makes a copy of its own first.")
        if target.dtype != source.dtype:
            raise SubsetError(
                f"{name!r} is {source.dtype} in the checkpoint and {target.dtype} in the model; serve it "
                "in the checkpoint's dtype."
            )
        if target.shape != source.shape or not in_place.is_nested(source.shape, source.stride()):
            raise SubsetError(f"{name!r} is not copied entry by entry: the loader broadcasts it.")
        in_place.check_writable(name, target)
        route = Route(
            target.detach(), source.storage_offset(), source.stride(), self._owners[_storage(target)]
        )
        if target.numel() and self._is_new(name, route):
            self.routes[name].append(route)

    def _is_new(self, name: str, route: Route) -> bool:
        """Whether nothing went to the route's place so far; raises if something else did."""
        place = (route.target.device, route.target.data_ptr())
        other, before = self._taken.setdefault(place, (name, route))
        if before is route:
            return True
        if other != name or (before.start, before.strides) != (route.start, route.strides):
            raise SubsetError(f"{other!r} and {name!r} are loaded into the same place.")
        return False


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call writes to."""
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    targets = [
        given.get(a.name)
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    lists = [x if isinstance(x, list | tuple) else [x] for x in targets]
    return [x for each in lists for x in each if isinstance(x, torch.Tensor)]


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class RoutedStore(InPlaceStore):
    """Named subsets on a model that an engine keeps in an order of its own.

    Subsets name tensors and positions of the checkpoint. Before a subset is taken, what the engine holds at
    its positions is compared with the checkpoint, bit for bit: an engine may reorder weights in place after
    loading, and nothing else would tell.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Takes over an engine's model.

        Args:
          model: the seed, as the engine has it after loading; has ``load_weights``.
          checkpoint: the tensors that the engine loaded, by name; read for the fingerprints, and at the
            positions of each subset that is loaded.

        Raises:
          SubsetError: the model's loader does more than copy; see :func:`trace`.
        """
        super().__init__(model)
        self.checkpoint = checkpoint
        self._routes = trace(model, checkpoint)
        self._fingerprints = dict(zip(checkpoint, fingerprints(checkpoint.values()), strict=True))
        self._by_key = {
            f"{name}#{i}": (route, in_place.memory(route.target))
            for name, routes in self._routes.items()
            for i, route in enumerate(routes)
        }

    def missed(self, subset: Subset) -> dict[str, np.ndarray]:
        """Which entries of each tensor have no place in this process's part of the model.

        Args:
          subset: for this store's seed.

        Returns:
          (k,) bool by name, for tensors with such entries.
        """
        masks = {}
        for name, e in subset.items():
            missed = np.ones(len(e), bool)
            for route in self._routes[self._loaded_as(name, subset)]:
                missed[route.follow(e.positions)[0]] = False
            if missed.any():
                masks[name] = missed
        return masks

    def _loaded_as(self, name: str, subset: Subset) -> str:
        """The tensor that the loader takes where it passes over a copy, such as that of a tied embedding."""
        if self._routes[name] or not len(subset[name]):
            return name
        return tied.original_of(name, subset, (n for n in subset if self._routes[n])) or name

    def _place(self, subset: Subset) -> Loaded[dict[str, Piece]]:
        subset.check_structure({n: (tuple(x.shape), np.dtype(x.dtype)) for n, x in self.checkpoint.items()})
        subset.check_fingerprints(self._fingerprints)
        pieces = {}
        for name, e in subset.items():
            if not len(e):
                continue
            seed = np.asarray(self.checkpoint[name]).reshape(-1)[e.positions]
            for i, route in enumerate(self._routes[name]):
                chosen, offsets = route.follow(e.positions)
                if len(chosen):
                    device = route.target.device
                    values = (in_place.bits(x[chosen], device) for x in (e.values, seed))
                    key, piece = f"{name}#{i}", Piece(torch.from_numpy(offsets).to(device), *values)
                    _compare(key, self._seed_bits(key, piece.offsets), piece.seed, "the checkpoint")
                    pieces[key] = piece
        return in_place.loaded(subset, pieces)

    def _check(self, pieces: dict[str, Piece]) -> None:
        """Also finds weights that were loaded again, by a few entries of each tensor: loaders write all."""
        super()._check(pieces)
        active = None if self._active is None else self._loaded[self._active].pieces
        if active is not None and pieces is not active:
            return  # the active subset is checked, too
        whose = "the checkpoint" if active is None else f"the active subset {self._active!r}"
        for key, piece in pieces.items():
            held = in_place.gather(self._memory(key), piece.offsets[:_FEW])
            _compare(key, held, (piece.seed if active is None else piece.values)[:_FEW], whose)

    def _memory(self, path: str) -> torch.Tensor:
        route, memory = self._by_key[path]
        if not route.is_current():
            name = path.rsplit("#", 1)[0]
            raise SubsetError(f"{name!r} was moved or replaced since it was loaded; restart the engine.")
        return memory


def _compare(key: str, held: torch.Tensor, want: torch.Tensor, whose: str) -> None:
    """Raises unless the engine holds at a piece's offsets what it should."""
    wrong = int((held != want).sum())
    if wrong:
        raise SubsetError(
            f"{key.rsplit('#', 1)[0]!r}: at {wrong} of {len(want)} positions the engine holds other values "
            f"than {whose}. It was changed after loading, or the engine keeps these weights in an order of "
            "its own; subsets cannot be served on it."
        )


def answer(store: RoutedStore, verb: str, *args: Any) -> Any:
    """Does what a server asks of one of its engine's processes.

    Args:
      store: this process's.
      verb: ``load``, ``check``, ``activate``, ``discard`` or ``list``.
      *args: a subset's name, None for the seed; of ``load`` its directory, too.

    Returns:
      Of ``load`` a digest of the subset, and which entries have no place in this process, as bits by tensor;
      of ``list`` what is loaded.
    """
    match verb, *args:
        case "load", name, directory:
            subset = tied.for_model(Subset.load(directory), store.checkpoint)
            store.add(name, subset)
            missed = {path: np.packbits(mask).tobytes() for path, mask in store.missed(subset).items()}
            return _digest(subset), missed
        case "check", name:
            store.check(name)
        case "activate", None:
            store.deactivate()
        case "activate", name:
            store.activate(name)
        case "discard", name:  # a second attempt may find it gone
            if any(x.name == name for x in store.list()):
                store.unload(name)
        case ["list"]:
            return [tuple(x) for x in store.list()]
        case _:
            raise ValueError(f"no verb {verb!r} with {len(args)} arguments.")
    return None


def _digest(subset: Subset) -> str:
    digest = hashlib.sha256()
    for name, e in sorted(subset.items()):
        digest.update(f"{name!r} {len(e)} ".encode())
        digest.update(e.positions.tobytes())
        digest.update(e.values.tobytes())
    return digest.hexdigest()
