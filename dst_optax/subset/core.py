"""A subset: the entries in which a tuned model differs from its seed, and what one can do with them."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dst_optax.subset import coordinates, dtypes, files, trees
from dst_optax.subset.coordinates import COORDINATES, HUGGING_FACE, Tensor
from dst_optax.subset.entries import Entries, has_seed_values
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.fingerprint import fingerprints


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Mapping[str, Entries]):
    """What tuning leaves behind: for every tensor by path, the entries that differ from the seed.

    Attributes:
      leaves: entries of every tensor of the model, none left out.
      metadata: what the model card should tell; values that JSON can express.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> seed = {"w": np.zeros(5, np.float32), "b": np.ones(2, np.float32)}
      >>> tuned = {"w": np.array([0, 0, 3, 0, 4], np.float32), "b": np.ones(2, np.float32)}
      >>> extracted = subset.from_models(seed, tuned, with_seed_values=True)
      >>> extracted
      Subset(2 tensors, 2 of 7 entries)
      >>> extracted["w"].positions.tolist()
      [2, 4]
      >>> extracted.apply(seed)["w"].tolist()
      [0.0, 0.0, 3.0, 0.0, 4.0]
      >>> extracted.revert(tuned)["w"].tolist()
      [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    leaves: dict[str, Entries]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> Entries:
        return self.leaves[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __repr__(self) -> str:
        return f"Subset({len(self)} tensors, {self.count} of {self.size} entries)"

    @property
    def count(self) -> int:
        """Entries that differ from the seed."""
        return sum(len(e) for e in self.values())

    @property
    def size(self) -> int:
        """Entries of the model."""
        return sum(e.size for e in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = [a for e in self.values() for a in (e.positions, e.values, e.seed_values)]
        return sum(a.nbytes for a in arrays if a is not None)

    @property
    def has_seed_values(self) -> bool:
        """Whether :meth:`revert` is possible."""
        return has_seed_values(self)

    def apply(self, seed: Any, *, verify: bool = True) -> Any:
        """The tuned model.

        Args:
          seed: pytree of numpy or jax arrays, any sharding; it is not changed.
          verify: compare fingerprints, which reads the seed once.

        Returns:
          Pytree like ``seed``, same shardings. Arrays in which nothing differs are the seed's own.

        Raises:
          SubsetError: the seed has other paths, shapes, dtypes or content than this subset is for.
        """
        named = self.check(seed, verify=verify)
        return trees.map_leaves(
            seed,
            {p: _written(x, self[p].positions, self[p].values) for p, x in named.items() if len(self[p])},
        )

    def revert(self, tuned: Any, *, verify: bool = True) -> Any:
        """The seed model, bit for bit: the inverse of :meth:`apply`.

        Args:
          tuned: pytree of numpy or jax arrays, any sharding; it is not changed.
          verify: compare the result's fingerprints with the seed's, which reads it once.

        Returns:
          Pytree like ``tuned``, same shardings.

        Raises:
          SubsetError: no seed values are stored, or ``tuned`` is not the model that :meth:`apply` makes.
        """
        if not self.has_seed_values:
            raise SubsetError("this subset has no seed values; extract it with with_seed_values=True.")
        named = self.check(tuned, verify=False)
        new = {}
        for path, x in named.items():
            e = self[path]
            if not len(e):
                continue
            if not _holds(x, e):
                raise SubsetError(
                    f"{path!r} does not hold this subset's values; revert takes the model that apply made."
                )
            new[path] = _written(x, e.positions, e.seed_values)
        reverted = trees.map_leaves(tuned, new)
        self.check(reverted, verify=verify)
        return reverted

    def check(self, seed: Any, *, verify: bool = True) -> dict[str, Any]:
        """Raises unless this subset is for the model ``seed``.

        Args:
          seed: pytree of arrays.
          verify: compare fingerprints too, where they are known.

        Returns:
          The model's arrays by path.

        Raises:
          SubsetError: names the tensor and the difference.
        """
        named = trees.named_leaves(seed)
        self.check_structure(structure(named))
        if verify:
            paths = [p for p, e in self.items() if e.seed_fingerprint is not None]
            self.check_fingerprints(dict(zip(paths, fingerprints(named[p] for p in paths), strict=True)))
        return named

    def check_structure(self, structure: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """Raises unless paths, shapes and dtypes are those of the seed."""
        systems = [_coordinate_system(paths) for paths in (self, structure)]
        if None not in systems and systems[0] != systems[1]:
            raise SubsetError(
                f"the subset has the coordinates of {systems[0]} ({next(iter(self))!r}), the model those of "
                f"{systems[1]} ({next(iter(structure))!r}): names and layouts differ, so that positions mean "
                "nothing there. Give the seed as the subset knows it: for a run of dst-optax finetune, its "
                "directory seed/."
            )
        for path, e in self.items():
            if path not in structure:
                raise SubsetError(f"the model lacks {path!r}, which the subset is for.")
            shape, dtype = structure[path]
            if shape != e.shape or dtype != e.dtype:
                raise SubsetError(
                    f"{path!r} is {dtype}{list(shape)} in the model, {e.dtype}{list(e.shape)} in the subset; "
                    "give the seed in its own dtype, or convert the subset with astype."
                )
        for path in structure:
            if path not in self:
                raise SubsetError(f"the subset lacks {path!r}, which the model has.")

    def check_fingerprints(self, of_seed: Mapping[str, str]) -> None:
        """Raises if a fingerprint of the seed is not the one the subset was made for."""
        for path, value in of_seed.items():
            expected = self[path].seed_fingerprint
            if expected is not None and expected != value:
                raise SubsetError(
                    f"{path!r} is not the seed's: its fingerprint is {value}, "
                    f"the subset was made for {expected}."
                )

    def astype(self, dtype: Any) -> "Subset":
        """The subset of the model converted to other dtypes; integers and booleans stay as they are.

        Args:
          dtype: the new dtype of every floating-point tensor; or ``(regex, dtype)`` rules, of which the first
            that is found in a path holds, and a tensor without one keeps its dtype.

        Returns:
          A subset for the converted seed, whose fingerprints are not known where a dtype is new. Where seed
          values are stored, entries that have become equal to the seed are left out.

        Raises:
          SubsetError: the dtype is none of floating-point numbers, or too narrow for a value.

        Example:
          >>> import jax.numpy as jnp, numpy as np
          >>> from dst_optax import subset
          >>> seed, tuned = np.ones(3, np.float32), np.array([1, 2, 1.0001], np.float32)
          >>> subset.from_models(seed, tuned, with_seed_values=True).astype(jnp.bfloat16).count
          1
          >>> both = subset.from_models({"wi": seed, "wo": seed}, {"wi": tuned, "wo": tuned})
          >>> [str(e.dtype) for e in both.astype([("wo", "float32"), ("", "bfloat16")]).values()]
          ['bfloat16', 'float32']
        """
        rules = dtype if isinstance(dtype, list | tuple) else [("", dtype)]
        leaves = {}
        for path, e in self.items():
            new = next((np.dtype(d) for pattern, d in rules if re.search(pattern, path)), e.dtype)
            leaves[path] = e if new == e.dtype or not dtypes.is_float(e.dtype) else _converted(path, e, new)
        return Subset(leaves, dict(self.metadata))

    def intersection(self, other: "Subset") -> "Subset":
        """Entries whose positions are in both; values are this subset's."""
        _check_same_seed([self, other])
        shared = {p: np.isin(e.positions, other[p].positions, assume_unique=True) for p, e in self.items()}
        return Subset({p: e.take(shared[p]) for p, e in self.items()}, dict(self.metadata))

    def union(self, other: "Subset") -> "Subset":
        """Entries whose positions are in either; where they are in both, values are this subset's."""
        return compose([self, other], on_conflict="first")

    def jaccard(self, other: "Subset") -> float:
        """Share of the union's positions that are in both; 1.0 if both are empty."""
        both = self.intersection(other).count
        either = self.count + other.count - both
        return both / either if either else 1.0

    def to_hf(self, table: Sequence[Tensor], seed: Mapping[str, Any]) -> "Subset":
        """The subset for the Hugging Face checkpoint of the same model.

        Args:
          table: the family's, such as ``decoder.tensors(config)``, stacked or not as the parameters are.
          seed: the seed's tensors by name or by path, of either side; read once.

        Returns:
          The subset for the checkpoint. What the seed has beyond the table is left as it is. Fingerprints are
          known where the subset's own recognise the seed.

        Raises:
          SubsetError: paths or shapes are not the table's, or the seed is another one.

        Example:
          >>> import numpy as np
          >>> from dst_optax import subset
          >>> table = [subset.coordinates.Tensor("proj.weight", (3, 2), "proj/kernel", True)]
          >>> seed = {"proj/kernel": np.zeros((2, 3))}
          >>> tuned = {"proj/kernel": np.array([[0.0, 0, 7], [0, 0, 0]])}
          >>> converted = subset.from_models(seed, tuned).to_hf(table, seed)
          >>> converted["proj.weight"].positions.tolist(), converted["proj.weight"].values.tolist()
          ([4], [7.0])
        """
        if self.metadata.get(COORDINATES) == HUGGING_FACE:
            raise SubsetError("the subset is in Hugging Face's coordinates already.")
        return Subset(coordinates.to_hf(self, table, seed), self.metadata | {COORDINATES: HUGGING_FACE})

    def from_hf(self, table: Sequence[Tensor], seed: Mapping[str, Any]) -> "Subset":
        """The subset of a Hugging Face checkpoint as one of the parameters: the inverse of :meth:`to_hf`.

        Args:
          table: the family's, stacked or not as the parameters are to be.
          seed: the seed's tensors by name or by path, of either side; read once.

        Returns:
          The subset for the parameters.

        Raises:
          SubsetError: names or shapes are not the table's, entries are in tensors that the model does not
            have, or the seed is another one.

        Example:
          >>> import numpy as np
          >>> from dst_optax import subset
          >>> table = [subset.coordinates.Tensor("proj.weight", (3, 2), "proj/kernel", True)]
          >>> seed = {"proj.weight": np.zeros((3, 2))}
          >>> tuned = {"proj.weight": np.array([[0.0, 0], [0, 0], [7, 0]])}
          >>> converted = subset.from_models(seed, tuned).from_hf(table, seed)
          >>> converted["proj/kernel"].positions.tolist(), converted["proj/kernel"].values.tolist()
          ([2], [7.0])
        """
        metadata = {k: v for k, v in self.metadata.items() if k != COORDINATES}
        return Subset(coordinates.from_hf(self, table, seed), metadata)

    def save(self, directory: str | os.PathLike[str], encoding: str = "gaps") -> None:
        """Writes ``subset.safetensors``, ``subset_config.json`` and ``README.md``, each atomically.

        Args:
          directory: local or ``gs://``; made if it is missing. A subset in it is replaced.
          encoding: of positions: ``"gaps"``, or ``"raw"`` for plain integers, which other programs read.

        Raises:
          SubsetError: a dtype that safetensors lacks, seed values of some tensors only, metadata that JSON
            cannot express, or another README.md.
        """
        files.save(self.leaves, self.metadata, directory, encoding)

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> "Subset":
        """Reads what :meth:`save` wrote.

        Args:
          directory: of unknown origin; everything in it is checked before it is used.

        Returns:
          The subset.

        Raises:
          SubsetError: the files are damaged, of another version, or still being saved.
        """
        return Subset(*files.load(directory))


def collisions(subsets: Sequence[Subset]) -> dict[str, int]:
    """How many positions of each tensor have different values in several subsets.

    Args:
      subsets: of one seed.

    Returns:
      Number of positions by path, without zeros.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> seed = {"w": np.zeros(3, np.float32)}
      >>> a = subset.from_models(seed, {"w": np.array([1, 1, 0], np.float32)})
      >>> b = subset.from_models(seed, {"w": np.array([0, 2, 2], np.float32)})
      >>> subset.collisions([a, b])
      {'w': 1}
    """
    _check_same_seed(subsets)
    counts = {p: _merge([s[p] for s in subsets], "first")[1] for p in subsets[0]}
    return {p: n for p, n in counts.items() if n}


def compose(subsets: Sequence[Subset], on_conflict: str = "error") -> Subset:
    """One subset out of several that were tuned from one seed.

    Args:
      subsets: at least one.
      on_conflict: what to do where several subsets have different values for one entry: ``"error"``,
        ``"first"`` or ``"last"`` subset wins, or ``"mean"`` of the values, computed in float64.

    Returns:
      The subset of all positions. Its metadata name the ``collisions`` by path.

    Raises:
      SubsetError: the seeds differ, or values do and ``on_conflict="error"``, or those of integers do and
        it is ``"mean"``.

    Example:
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> seed = {"w": np.zeros(3, np.float32)}
      >>> a = subset.from_models(seed, {"w": np.array([1, 1, 0], np.float32)})
      >>> b = subset.from_models(seed, {"w": np.array([0, 2, 2], np.float32)})
      >>> both = subset.compose([a, b], on_conflict="mean")
      >>> both["w"].values.tolist(), both.metadata["collisions"]
      ([1.0, 1.5, 2.0], {'w': 1})
    """
    if on_conflict not in ("error", "first", "last", "mean"):
        raise SubsetError(f'on_conflict: got {on_conflict!r}; it is "error", "first", "last" or "mean".')
    _check_same_seed(subsets)
    merged = {p: _merge([s[p] for s in subsets], on_conflict) for p in subsets[0]}
    counts = {p: n for p, (_, n) in merged.items() if n}
    if counts and on_conflict == "error":
        worst = max(counts, key=lambda p: counts[p])
        raise SubsetError(
            f"the subsets have different values for {sum(counts.values())} entries, most of them "
            f'({counts[worst]}) in {worst!r}; say which to take with on_conflict="first", "last" or "mean".'
        )
    if on_conflict == "mean" and (exact := [p for p in counts if not dtypes.is_float(subsets[0][p].dtype)]):
        raise SubsetError(
            f'{exact[0]!r} holds {subsets[0][exact[0]].dtype}, which have no mean; take "first" or "last".'
        )
    leaves = {p: e for p, (e, _) in merged.items()}
    metadata = {"collisions": counts, "composed": [s.metadata for s in subsets]}
    # paths are the same, so coordinates are; some subset may have lost them
    system = next((c for s in subsets if (c := s.metadata.get(COORDINATES))), None)
    return Subset(leaves, metadata | ({COORDINATES: system} if system else {}))


def _merge(entries: Sequence[Entries], on_conflict: str) -> tuple[Entries, int]:
    """Several subsets' entries of one tensor as one, and how many positions have different values."""
    positions = np.concatenate([e.positions for e in entries])
    order = np.argsort(positions, kind="stable")  # of one position the first subset's entry comes first
    positions, values = positions[order], np.concatenate([e.values for e in entries])[order]
    first = np.flatnonzero(np.diff(positions, prepend=-1))
    counts = np.diff(first, append=len(positions))
    differs = trees.bits(values) != trees.bits(np.repeat(values[first], counts))
    conflicts = np.unique(np.repeat(np.arange(len(first)), counts)[differs])
    chosen = values[first + counts - 1] if on_conflict == "last" else values[first]
    if on_conflict == "mean" and len(conflicts):
        with np.errstate(over="ignore", invalid="ignore"):
            means = np.add.reduceat(values.astype(np.float64), first) / counts
            chosen[conflicts] = means[conflicts].astype(values.dtype)
    seeds = [e.seed_values for e in entries if e.seed_values is not None]
    has_seed_values = len(seeds) == len(entries)
    like = next((e for e in entries if e.seed_fingerprint is not None), entries[0])
    merged = dataclasses.replace(
        like,
        positions=positions[first],
        values=chosen,
        seed_values=np.concatenate(seeds)[order][first] if has_seed_values else None,
        before_astype=None,
    )
    return merged, len(conflicts)


def structure(named: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes by path, see :meth:`Subset.check_structure`.

    Raises:
      SubsetError: a leaf has a dtype that subsets cannot hold.
    """
    return {path: (tuple(x.shape), dtypes.checked(x.dtype, path)) for path, x in named.items()}


def _coordinate_system(paths: Iterable[str]) -> str | None:
    """Who names tensors so: JAX ``a/b``, Hugging Face ``a.b``; None where the names do not tell."""
    names = list(paths)
    if any("/" in name for name in names):
        return "JAX"
    return "Hugging Face" if any("." in name for name in names) else None


def _converted(path: str, e: Entries, dtype: np.dtype) -> Entries:
    """Entries of the tensor in another floating-point dtype."""
    if not dtypes.is_float(dtypes.checked(dtype, path)):
        raise SubsetError(
            f"{path!r} is {e.dtype}; it cannot become {dtype}, only another floating-point dtype."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values = e.values.astype(dtype)
        seeds = None if e.seed_values is None else e.seed_values.astype(dtype)
    for old, new in ((e.values, values), (e.seed_values, seeds)):
        if old is None or new is None:
            continue
        lost = old[_is_finite(old) & ~_is_finite(new)]
        if len(lost):
            raise SubsetError(
                f"{dtype} cannot hold {len(lost)} of the values of {path!r}, the first of them {lost[0]}; "
                "choose a dtype of a wider range, for this tensor alone with a rule."
            )
    before = e.before_astype if e.seed_fingerprint is None else (e.dtype, e.seed_fingerprint)
    out = Entries(e.shape, e.positions, values, seeds, before_astype=before)
    return out if seeds is None else out.take(np.flatnonzero(trees.bits(values) != trees.bits(seeds)))


def _is_finite(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values.astype(np.float64))


def _check_same_seed(subsets: Sequence[Subset]) -> None:
    """Raises an error that counts the subsets from 1."""
    if not subsets:
        raise SubsetError("no subset was given.")
    structure = {p: (e.shape, e.dtype) for p, e in subsets[0].items()}
    for i, other in enumerate(subsets[1:], 2):
        try:
            other.check_structure(structure)
        except SubsetError as e:
            raise SubsetError(f"subset {i} is not for the model of subset 1: {e}") from e
    for path in structure:
        first: dict[str, int] = {}
        for i, each in enumerate(subsets, 1):
            if (mark := each[path].seed_fingerprint) is not None:
                first.setdefault(mark, i)
        if len(first) > 1:
            (a, i), (b, j), *_ = first.items()
            raise SubsetError(
                f"subsets {i} and {j} are of different seeds: {path!r} has the fingerprints {a} and {b}."
            )


def _written(x: Any, positions: np.ndarray, values: np.ndarray | None) -> Any:
    assert values is not None
    if trees.is_jax_array(x):
        from dst_optax.subset import scatter

        return scatter.scatter(x, scatter.pieces([(x, positions, values)])[0])
    out = np.array(x, order="C")
    out.reshape(-1)[positions] = values
    return out


def _holds(x: Any, e: Entries) -> bool:
    """Whether ``x`` has the entries' values, as far as this process sees it."""
    for data, start in trees.boxes(x):
        chosen, local = trees.to_box(e.positions, data.shape, start, e.shape)
        if not np.array_equal(trees.bits(data.reshape(-1)[local]), trees.bits(e.values[chosen])):
            return False
    return True
