"""Many tuned models on one resident seed model.

Activating a subset exchanges its values with the seed's, in place: k values are gathered and k are
scattered into donated arrays. The subset's buffers hold the seed's values for as long as it is active,
so deactivating is the same exchange again, bit for bit, and neither a second model nor a second set of
values is ever resident.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dst_optax.serving.store import Listed, Loaded, Store
from dst_optax.subset import Subset, SubsetError, fingerprints, scatter, trees
from dst_optax.subset.core import structure

__all__ = ["Listed", "SubsetStore"]

_Pieces = dict[str, list[scatter.Piece]]  # by path; the seed's values while the subset is active


class SubsetStore(Store[Any, _Pieces]):
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
        super().__init__(max_bytes=max_bytes)
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

    @property
    def params(self) -> Any:
        """The model as it is now: the seed, or the active subset's."""
        with self._lock:
            return jax.tree.unflatten(self._treedef, self._params.values())

    def stack(self, names: Sequence[str | None], leaves: str | None = None) -> tuple[Any, Any]:
        """Several tuned models for one batch, through ``jax.vmap``.

        A tensor in which any of them differs is stored once for each, so this costs ``len(names)`` times
        its bytes, and products with it become batched; all other tensors are shared. It pays for
        subsets that touch few or small tensors.

        Args:
          names: loaded subsets, at least one; None stands for the seed.
          leaves: regex of the paths to stack; None for those in which a subset has entries.

        Returns:
          The model with stacked tensors, and the ``in_axes`` for it: 0 for those, None for others. Tensors
          that are shared are the store's own: not to be used after the next switch.

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
            try:
                for name in names:
                    self._become(name)
                    for path in chosen:
                        copies[path].append(jnp.copy(self._params[path]))
            finally:
                self._become(before)
            stacked = [scatter.stack(copies[p]) if p in chosen else x for p, x in self._params.items()]
            axes = [0 if p in chosen else None for p in self._params]
            return jax.tree.unflatten(self._treedef, stacked), jax.tree.unflatten(self._treedef, axes)

    def _current(self) -> Any:
        return self.params

    def _place(self, subset: Subset) -> Loaded[_Pieces]:
        subset.check_structure(self._structure)
        subset.check_fingerprints(self._fingerprints)
        wanted = {p: (self._params[p], e.positions, e.values) for p, e in subset.items() if len(e)}
        pieces = dict(zip(wanted, scatter.pieces(wanted.values()), strict=True))
        nbytes = sum(x.nbytes for parts in pieces.values() for x in jax.tree.leaves(parts))
        return Loaded(pieces, subset.count, nbytes)

    def _check(self, pieces: _Pieces) -> None:
        """The arrays are the store's own; nobody moves them."""

    def _switch(self, name: str | None) -> None:
        if self._active not in (None, name):
            self._exchange(self._active)
            self._active = None
        if name is not None and self._active is None:
            self._exchange(name)
            self._active = name

    def _exchange(self, name: str) -> None:
        """Swaps the values of a subset with the model's; all of them or none."""
        pieces = self._get(name).pieces
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
