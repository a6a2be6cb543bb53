"""Many tuned models on one resident seed model.

Activating a subset exchanges its values with the seed's, in place: k values are gathered and k are
scattered into donated arrays. The subset's buffers hold the seed's values for as long as it is active,
so deactivating is the same exchange again, bit for bit, and neither a second model nor a second set of
values is ever resident.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_optax.subset import Subset, SubsetError, fingerprints, scatter, trees
from dst_optax.subset.core import structure

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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


_Pieces = dict[str, list[scatter.Piece]]


class _Loaded(NamedTuple):
    pieces: _Pieces  # by path; the seed's values while the subset is active
    entries: int
    nbytes: int


class SubsetStore:
    """Named subsets on one resident seed model, one of them active at a time.

    All methods may be called from several threads. A model that one thread uses must not be switched by
    another meanwhile: use :meth:`use`, which holds the store for as long as its block runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import serving, subset
      >>> seed = {"w": jnp.zeros(4)}
      >>> tuned = subset.from_models(seed, {"w": jnp.array([0.0, 1.0, 0.0, 2.0])})
      >>> store = serving.SubsetStore(seed)
      >>> store.add("boolq", tuned)
      >>> store.activate("boolq")["w"].tolist()
      [0.0, 1.0, 0.0, 2.0]
      >>> store.deactivate()["w"].tolist()
      [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, seed_params: Any, *, max_bytes: int | None = None) -> None:
        """Takes over a seed model.

        Args:
          seed_params: pytree of jax arrays, any sharding, or numpy arrays. The store owns the jax arrays
            from now on: switching overwrites them in place and deletes the old references. Leaves that
            share one buffer, such as tied embeddings, get one each. It is read once for the fingerprints.
          max_bytes: bound on the bytes of all loaded subsets on this process's devices; the least
            recently used ones make room. None for no bound.

        Raises:
          SubsetError: jax cannot hold a leaf in its own dtype, or subsets cannot.
        """
        self._lock = threading.RLock()
        named = trees.named_leaves(seed_params, "the seed")
        self._structure = structure(named)
        for path, (_, dtype) in self._structure.items():
            if jax.dtypes.canonicalize_dtype(dtype) != dtype and not isinstance(named[path], jax.Array):
                raise SubsetError(
                    f"{path!r} is {dtype}, which jax would round; set jax_enable_x64, or convert the seed "
                    "and, with astype, its subsets."
                )
        self._fingerprints = dict(zip(named, fingerprints(named.values()), strict=True))
        self._params = _unshared(named)
        self._treedef = jax.tree.structure(trees.map_leaves(seed_params, self._params))
        self._loaded: dict[str, _Loaded] = {}  # least recently used first
        self._active: str | None = None
        self._max_bytes = max_bytes

    @property
    def params(self) -> Any:
        """The model as it is now: the seed, or the active subset's."""
        with self._lock:
            return jax.tree.unflatten(self._treedef, self._params.values())

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
        self._check_name(name)
        self.add(name, Subset.load(directory))

    def add(self, name: str, subset: Subset) -> None:
        """Adds a subset from memory; see :meth:`load`.

        Args:
          name: its name.
          subset: for this store's seed; it is copied to the devices.

        Raises:
          SubsetError: as in :meth:`load`.
        """
        self._check_name(name)
        subset.check_structure(self._structure)
        subset.check_fingerprints(self._fingerprints)
        with self._lock:
            wanted = {p: (self._params[p], e.positions, e.values) for p, e in subset.items() if len(e)}
            pieces = dict(zip(wanted, scatter.pieces(wanted.values()), strict=True))
            nbytes = sum(x.nbytes for parts in pieces.values() for x in jax.tree.leaves(parts))
            self._make_room(name, nbytes)
            self._loaded[name] = _Loaded(pieces, subset.count, nbytes)

    def activate(self, name: str) -> Any:
        """Gives the model the values of a subset; touches only what differs from the current ones.

        Args:
          name: a loaded subset.

        Returns:
          The tuned model. Earlier results of this method are deleted where they differ from it.

        Raises:
          SubsetError: the name is not loaded.
        """
        with self._lock:
            self._get(name)
            if self._active != name:
                self.deactivate()
                self._exchange(name)
                self._active = name
            self._loaded[name] = self._loaded.pop(name)
            return self.params

    def deactivate(self) -> Any:
        """Gives the model the seed's values back, bit for bit.

        Returns:
          The seed model.
        """
        with self._lock:
            if self._active is not None:
                self._exchange(self._active)
                self._active = None
            return self.params

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
    def use(self, name: str | None) -> Iterator[Any]:
        """Holds the store and gives the model of a subset; for servers with threads.

        Args:
          name: a loaded subset, or None for the seed.

        Yields:
          The model; not to be used after the block.

        Example:
          >>> import jax.numpy as jnp
          >>> from dst_optax import serving
          >>> store = serving.SubsetStore({"w": jnp.ones(4)})
          >>> with store.use(None) as params:
          ...     print(params["w"].sum())
          4.0
        """
        with self._lock:
            yield self._switch(name)

    def stack(self, names: Sequence[str | None], leaves: str | None = None) -> tuple[Any, Any]:
        """Several tuned models for one batch, through ``jax.vmap``.

        A tensor in which any of them differs is stored once for each, so this costs ``len(names)`` times
        its bytes, and products with it become batched; all other tensors are shared. It pays for
        subsets that touch few or small tensors.

        Args:
          names: loaded subsets, at least one; None stands for the seed.
          leaves: regex of the paths to stack; None for those in which a subset has entries.

        Returns:
          The model with stacked tensors, and the ``in_axes`` for it: 0 for those, None for others.

        Raises:
          SubsetError: a name is not loaded, or a subset has entries in a tensor that is not stacked.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from dst_optax import serving, subset
          >>> seed = {"w": jnp.zeros(2), "b": jnp.ones(())}
          >>> tuned = subset.from_models(seed, {"w": jnp.array([0.0, 3.0]), "b": jnp.ones(())})
          >>> store = serving.SubsetStore(seed)
          >>> store.add("one", tuned)
          >>> store.add("two", tuned)
          >>> params, axes = store.stack(["one", "two"])
          >>> jax.vmap(lambda p, x: p["w"] @ x + p["b"], (axes, 0))(params, jnp.ones((2, 2))).tolist()
          [4.0, 4.0]
        """
        with self._lock:
            touched = {p for name in names if name is not None for p in self._get(name).pieces}
            chosen = touched if leaves is None else {p for p in self._params if re.search(leaves, p)}
            if not names or touched - chosen:
                raise SubsetError(
                    f"cannot stack {list(names)}: {sorted(touched - chosen)[:3]} would be shared."
                )
            before = self._active
            copies: dict[str, Any] = {p: [] for p in chosen}
            for name in names:
                self._switch(name)
                for path in chosen:
                    copies[path].append(jnp.copy(self._params[path]))
            self._switch(before)
            stacked = [jnp.stack(copies[p]) if p in chosen else x for p, x in self._params.items()]
            axes = [0 if p in chosen else None for p in self._params]
            return jax.tree.unflatten(self._treedef, stacked), jax.tree.unflatten(self._treedef, axes)

    def _switch(self, name: str | None) -> Any:
        """The model of a subset, or of the seed."""
        return self.deactivate() if name is None else self.activate(name)

    def _exchange(self, name: str) -> None:
        """Swaps the values of a subset with the model's; all of them or none."""
        pieces = self._loaded[name].pieces
        done: list[str] = []
        try:
            for path in pieces:
                self._exchange_leaf(path, pieces)
                done.append(path)
        except BaseException:
            for path in done:
                self._exchange_leaf(path, pieces)
            raise

    def _exchange_leaf(self, path: str, pieces: _Pieces) -> None:
        x, new = self._params[path], pieces[path]
        old = scatter.gather(x, new)
        self._params[path] = scatter.scatter(x, new, donate=True)
        pieces[path] = old

    def _make_room(self, name: str, nbytes: int) -> None:
        if name in self._loaded:
            raise SubsetError(f"the name {name!r} is in use; unload it first.")
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

    def _get(self, name: str) -> _Loaded:
        if name not in self._loaded:
            raise SubsetError(
                f"no subset {str(name)[:128]!r} is loaded; loaded are {list(self._loaded)[:8]}."
            )
        return self._loaded[name]

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SubsetError(
                f"the name {str(name)[:128]!r} is not allowed: use up to 128 letters, digits, '.', '_' and "
                "'-', a letter or digit first."
            )


def _unshared(named: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves as jax arrays, each in buffers of its own: switching overwrites them one by one."""
    owned: dict[str, jax.Array] = {}
    taken: set[tuple[Any, int]] = set()
    for path, x in named.items():
        owned[path] = x if isinstance(x, jax.Array) else jnp.array(x)
        buffers = {
            (shard.device, shard.data.unsafe_buffer_pointer())
            for shard in owned[path].addressable_shards
            if shard.data.nbytes
        }
        if buffers & taken:
            owned[path] = jnp.copy(owned[path])
        taken |= buffers
    return owned
