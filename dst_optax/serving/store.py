"""The verbs that every engine's store shares; how values change places is the engine's own affair."""

import abc
import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from dst_optax.subset import Subset, SubsetError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Model = TypeVar("Model")
Pieces = TypeVar("Pieces")


def check_name(name: str) -> None:
    """Raises a SubsetError unless a name is allowed."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SubsetError(
            f"the name {str(name)[:128]!r} is not allowed: use up to 128 letters, digits, '.', '_' and "
            "'-', a letter or digit first."
        )


class Listed(NamedTuple):
    """A subset in a store.

    Attributes:
      name: its name.
      entries: entries in which it differs from the seed.
      nbytes: bytes that it occupies on this process's devices.
      active: whether the model has its values now.
    """

    name: str
    entries: int
    nbytes: int
    active: bool


class Loaded(NamedTuple, Generic[Pieces]):
    """What a store keeps of a subset.

    Attributes:
      pieces: its entries on the devices where they belong.
      entries: how many they are.
      nbytes: bytes that they occupy on this process's devices.
    """

    pieces: Pieces
    entries: int
    nbytes: int


class Store(abc.ABC, Generic[Model, Pieces]):
    """Named subsets on one resident seed model, one of them active at a time.

    All methods may be called from several threads. A model that one thread uses must not be switched by
    another meanwhile: use :meth:`use`, which holds the store for as long as its block runs.
    """

    def __init__(self, *, max_bytes: int | None = None) -> None:
        self._lock = threading.RLock()
        self._loaded: dict[str, Loaded[Pieces]] = {}  # least recently used first
        self._active: str | None = None
        self._uses = 0  # blocks of `use` that this thread is in
        self._max_bytes = max_bytes

    @abc.abstractmethod
    def _current(self) -> Model:
        """The model as it is now."""

    @abc.abstractmethod
    def _place(self, subset: Subset) -> Loaded[Pieces]:
        """The entries on their devices; raises a SubsetError unless the subset is for this seed."""

    @abc.abstractmethod
    def _check(self, pieces: Pieces) -> None:
        """Raises if the model can no longer be switched at these entries."""

    @abc.abstractmethod
    def _switch(self, name: str | None) -> None:
        """Gives the model a subset's values, or the seed's for None, in place of the active one's.

        A failure leaves a whole model: that of before, or the seed.
        """

    @property
    def active(self) -> str | None:
        """Name of the active subset."""
        return self._active

    def load(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Loads a subset from files and checks it against the seed.

        Args:
          name: letters, digits, ``.``, ``_`` and ``-``; not in use yet.
          directory: what :meth:`dst_optax.subset.Subset.save` wrote; may be of unknown origin.

        Raises:
          SubsetError: name, files or seed are not right, or ``max_bytes`` is too small; the store is as
            it was before.
        """
        check_name(name)
        self.add(name, Subset.load(directory))

    def add(self, name: str, subset: Subset) -> None:
        """Adds a subset from memory; see :meth:`load`.

        Args:
          name: its name.
          subset: for this store's seed; it is copied to the devices.

        Raises:
          SubsetError: as in :meth:`load`.
        """
        check_name(name)
        with self._lock:
            if name in self._loaded:
                raise SubsetError(f"the name {name!r} is in use; unload it first.")
            loaded = self._place(subset)
            self._make_room(name, loaded.nbytes)
            self._loaded[name] = loaded

    def check(self, name: str | None) -> None:
        """Raises unless the model could be switched now; nothing is written.

        Args:
          name: a loaded subset, or None for the seed.

        Raises:
          SubsetError: the name is not loaded, or a tensor was moved.
        """
        with self._lock:
            for each in {name, self._active} - {None}:
                self._check(self._get(each).pieces)

    def activate(self, name: str) -> Model:
        """Gives the model the values of a subset; touches only what differs from the current ones.

        Args:
          name: a loaded subset.

        Returns:
          The tuned model. In JAX, earlier results are deleted where they differ from it.

        Raises:
          SubsetError: the name is not loaded.
        """
        with self._lock:
            self._get(name)
            self._become(name)
            self._loaded[name] = self._loaded.pop(name)
            return self._current()

    def deactivate(self) -> Model:
        """Gives the model the seed's values back, bit for bit.

        Returns:
          The seed model.
        """
        with self._lock:
            self._become(None)
            return self._current()

    def unload(self, name: str) -> None:
        """Forgets a subset; an active one is deactivated.

        Args:
          name: a loaded subset.

        Raises:
          SubsetError: the name is not loaded.
        """
        with self._lock:
            self._get(name)
            if self._active == name:
                self.deactivate()
            del self._loaded[name]

    def list(self) -> list[Listed]:
        """What is loaded, least recently used first."""
        with self._lock:
            return [Listed(n, x.entries, x.nbytes, n == self._active) for n, x in self._loaded.items()]

    @contextlib.contextmanager
    def use(self, name: str | None) -> Iterator[Model]:
        """Holds the store and gives the model of a subset; for servers with threads.

        Other threads wait. Within the block its own thread may not switch the model either, which a coroutine
        would do that awaits there.

        Args:
          name: a loaded subset, or None for the seed.

        Yields:
          The model; not to be used after the block.

        Raises:
          SubsetError: the name is not loaded, or a block that uses another model is not left yet.

        Example:
          >>> import jax.numpy as jnp
          >>> from dst_optax import serving
          >>> store = serving.SubsetStore({"w": jnp.ones(4)})
          >>> with store.use(None) as params:
          ...     print(params["w"].sum())
          4.0
        """
        with self._lock:
            model = self.deactivate() if name is None else self.activate(name)
            self._uses += 1
            try:
                yield model
            finally:
                self._uses -= 1

    def _become(self, name: str | None) -> None:
        if name == self._active:
            return
        if self._uses:
            raise SubsetError(
                f"cannot switch to {name or 'the seed'!r}: a block `with store.use({self._active!r})` is not "
                "left yet. Leave it first; a coroutine must not await in it."
            )
        self._switch(name)

    def _make_room(self, name: str, nbytes: int) -> None:
        if self._max_bytes is None:
            return
        idle = [n for n in self._loaded if n != self._active]
        total = sum(x.nbytes for x in self._loaded.values())
        if nbytes + total - sum(self._loaded[n].nbytes for n in idle) > self._max_bytes:
            raise SubsetError(
                f"{name!r} needs {nbytes} bytes; max_bytes is {self._max_bytes}, and what is active stays."
            )
        for victim in idle:
            if total + nbytes <= self._max_bytes:
                break
            total -= self._loaded.pop(victim).nbytes

    def _get(self, name: str | None) -> Loaded[Pieces]:
        if name is None or name not in self._loaded:
            raise SubsetError(
                f"no subset {str(name)[:128]!r} is loaded; loaded are {list(self._loaded)[:8]}."
            )
        return self._loaded[name]
