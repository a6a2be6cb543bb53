"""From the coordinates of parameters to those of a Hugging Face checkpoint, and back.

A subset's positions are row-major indices in tensors of certain names and layouts: those of the parameters
that it was extracted from, unless its metadata say ``"coordinates": "huggingface"``. A family of models has
one table of how the two relate. Every entry is mapped by it exactly, at a cost that depends on their number.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dst_optax.subset import trees
from dst_optax.subset.entries import Entries, has_seed_values, same_values
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.fingerprint import fingerprint

COORDINATES = "coordinates"
"""Key of a subset's metadata that says whose names and layouts are meant, if not the parameters'."""

HUGGING_FACE = "huggingface"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and where it lies in our parameters.

    Attributes:
      name: in the checkpoint.
      shape: in the checkpoint.
      path: of the parameter that it is, or a part of.
      transposed: whether the parameter holds it the other way round.
      layer: its index along axis 1 of a parameter that stacks all layers; None if it is all of the parameter.
      copies: names under which a checkpoint may repeat it, because the model ties them.

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset.coordinates import Tensor
      >>> x = np.arange(6).reshape(2, 3)
      >>> stacked = np.zeros((3, 5, 2), int)
      >>> row = Tensor("q_proj.weight", (2, 3), "layers/q_proj/kernel", True, layer=4)
      >>> row.place(stacked, x)
      >>> row.take(stacked).tolist() == x.tolist() == stacked[:, 4].T.tolist()
      True
    """

    name: str
    shape: tuple[int, ...]
    path: str
    transposed: bool
    layer: int | None = None
    copies: tuple[str, ...] = ()

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """What the checkpoint holds of a parameter."""
        part = parameter if self.layer is None else parameter[:, self.layer]
        return part.T if self.transposed else part

    def place(self, parameter: np.ndarray, values: np.ndarray) -> None:
        """Writes what the checkpoint holds into a parameter."""
        part = parameter if self.layer is None else parameter[:, self.layer]
        part[...] = values.T if self.transposed else values


def to_hf(
    leaves: Mapping[str, Entries], table: Sequence[Tensor], seed: Mapping[str, Any]
) -> dict[str, Entries]:
    """Entries by path as those of the checkpoint by name, see :meth:`dst_optax.subset.Subset.to_hf`."""
    rows = _by_path(table, leaves)
    both = _Seed(seed, rows)
    converted: dict[str, Entries] = {}
    for path, e in leaves.items():
        known = _is_known(path, e, both.parameter(path, e.shape))
        for row, chosen, local in _split(e, rows[path]):
            part = dataclasses.replace(e.take(chosen), shape=_untransposed(row), positions=local)
            part = _transposed(part) if row.transposed else part
            mark = fingerprint(both.tensor(row)) if known else None
            converted[row.name] = dataclasses.replace(part, seed_fingerprint=mark, before_astype=None)
    for row in table:
        converted |= {copy: converted[row.name] for copy in row.copies if copy in both.named}
    if both.is_hf:
        rest = {name: x for name, x in both.named.items() if name not in converted}
        converted |= {name: _untouched(x, has_seed_values(leaves)) for name, x in rest.items()}
    return converted


def from_hf(
    leaves: Mapping[str, Entries], table: Sequence[Tensor], seed: Mapping[str, Any]
) -> dict[str, Entries]:
    """The inverse of :func:`to_hf`, see :meth:`dst_optax.subset.Subset.from_hf`."""
    rows = _rows(table)
    names = {row.name for row in table} | {copy for row in table for copy in row.copies}
    for row in table:
        if row.name not in leaves or leaves[row.name].shape != row.shape:
            raise SubsetError(
                f"the subset lacks {row.name!r} of shape {list(row.shape)}, which the model has."
            )
    for name, e in leaves.items():
        if name not in names and len(e):
            raise SubsetError(f"{name!r} has {len(e)} entries, and the model has no place for them.")
    for row in table:
        for copy in row.copies:
            if copy in leaves and not same_values(leaves[copy], leaves[row.name]):
                raise SubsetError(
                    f"{copy!r} and {row.name!r} are one tensor in the model, and the subset gives them "
                    "different values."
                )
    both = _Seed(seed, rows)
    converted = {}
    for path, parts in rows.items():
        known = all([_is_known(row.name, leaves[row.name], both.tensor(row)) for row in parts])
        entries = [_transposed(leaves[row.name]) if row.transposed else leaves[row.name] for row in parts]
        e = _joined(entries) if parts[0].layer is not None else entries[0]
        mark = fingerprint(both.parameter(path, e.shape)) if known else None
        converted[path] = dataclasses.replace(e, seed_fingerprint=mark, before_astype=None)
    return converted


class _Seed:
    """A seed model, seen from both sides."""

    def __init__(self, seed: Mapping[str, Any], rows: Mapping[str, Sequence[Tensor]]) -> None:
        self.named = trees.named_leaves(seed, "the seed")
        self._rows = rows
        self.is_hf = all(row.name in self.named for parts in rows.values() for row in parts)
        if not self.is_hf and (missing := next((p for p in rows if p not in self.named), None)):
            raise SubsetError(
                f"the seed has neither the checkpoint's tensors nor {missing!r}; name the seed."
            )

    def tensor(self, row: Tensor) -> np.ndarray:
        if not self.is_hf:
            return row.take(np.asarray(self.named[row.path]))
        x = np.asarray(self.named[row.name])
        if x.shape != row.shape:
            raise SubsetError(f"{row.name!r} is {list(x.shape)} in the seed, {list(row.shape)} in the model.")
        return x

    def parameter(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        if not self.is_hf:
            return np.asarray(self.named[path])
        whole = np.empty(shape, self.tensor(self._rows[path][0]).dtype)
        for row in self._rows[path]:
            row.place(whole, self.tensor(row))
        return whole


def _rows(table: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The table by our paths, in the order of the layers."""
    rows: dict[str, list[Tensor]] = {}
    for row in table:
        rows.setdefault(row.path, []).append(row)
    for path, parts in rows.items():
        layers = [row.layer for row in parts]
        if layers != [None] and set(layers) != set(range(len(parts))):
            raise SubsetError(
                f"{path!r} has the layers {layers} in the table; it must have each of 0 to {len(parts) - 1} "
                "once, or be one tensor without a layer."
            )
        parts.sort(key=lambda row: row.layer or 0)
    return rows


def _by_path(table: Sequence[Tensor], leaves: Mapping[str, Entries]) -> dict[str, list[Tensor]]:
    """The table by our paths, after a check that it is the subset's."""
    rows = _rows(table)
    for path in [*rows, *leaves]:
        if path not in rows or path not in leaves:
            where = "the table of the model" if path not in rows else "the subset"
            raise SubsetError(
                f"{where} lacks {path!r}: they are of different models, or layers are stacked in one."
            )
    for path, parts in rows.items():
        shape = _untransposed(parts[0])
        shape = shape if parts[0].layer is None else (shape[0], len(parts), *shape[1:])
        if leaves[path].shape != shape:
            raise SubsetError(
                f"{path!r} is {list(leaves[path].shape)} in the subset, {list(shape)} in the model."
            )
    return rows


def _untransposed(row: Tensor) -> tuple[int, ...]:
    """The shape that the parameter, or its layer, has."""
    return row.shape[::-1] if row.transposed else row.shape


def _split(e: Entries, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Any, np.ndarray]]:
    """For each layer which of the entries are in it, and where, sorted."""
    if rows[0].layer is None:
        yield rows[0], slice(None), e.positions
        return
    inner = math.prod(e.shape[2:])
    outer, rest = np.divmod(e.positions.astype(np.int64), e.shape[1] * inner)
    layer, within = np.divmod(rest, inner)
    order = np.argsort(layer, kind="stable")
    ends = np.searchsorted(layer[order], np.arange(e.shape[1] + 1))
    for row in rows:
        assert row.layer is not None
        chosen = order[ends[row.layer] : ends[row.layer + 1]]
        yield row, chosen, outer[chosen] * inner + within[chosen]


def _joined(layers: Sequence[Entries]) -> Entries:
    """The entries of a stacked parameter, from those of each layer."""
    shape, count = layers[0].shape, len(layers)
    inner = math.prod(shape[1:])
    positions = []
    for i, e in enumerate(layers):
        outer, within = np.divmod(e.positions.astype(np.int64), inner)
        positions.append((outer * count + i) * inner + within)
    seeds = [e.seed_values for e in layers if e.seed_values is not None]
    return _ordered(
        (shape[0], count, *shape[1:]),
        np.concatenate(positions),
        np.concatenate([e.values for e in layers]),
        np.concatenate(seeds) if len(seeds) == count else None,
    )


def _transposed(e: Entries) -> Entries:
    """The entries of the transposed matrix."""
    rows, columns = e.shape
    row, column = np.divmod(e.positions.astype(np.int64), columns)
    return _ordered((columns, rows), column * rows + row, e.values, e.seed_values)


def _ordered(
    shape: tuple[int, ...], positions: np.ndarray, values: np.ndarray, seeds: np.ndarray | None
) -> Entries:
    order = np.argsort(positions)
    return Entries(shape, positions[order], values[order], None if seeds is None else seeds[order])


def _untouched(x: Any, with_seed_values: bool) -> Entries:
    """No entries of a tensor of the seed."""
    none = np.empty(0, np.dtype(x.dtype))
    return Entries(
        tuple(x.shape),
        np.empty(0, np.int64),
        none,
        none if with_seed_values else None,
        fingerprint(np.asarray(x)),
    )


def _is_known(name: str, e: Entries, x: np.ndarray) -> bool:
    """Whether a tensor is known to be the seed's; raises if it is known to be another one."""
    if (x.dtype, x.shape) != (e.dtype, e.shape):
        raise SubsetError(
            f"{name!r} is {x.dtype}{list(x.shape)} in the seed, {e.dtype}{list(e.shape)} in the subset; give "
            "the seed that the subset was made for, or convert the subset with astype."
        )
    if e.seed_fingerprint is not None and fingerprint(x) != e.seed_fingerprint:
        raise SubsetError(f"{name!r} is not the seed's that the subset was made for.")
    if e.seed_values is not None:
        differ = trees.bits(x.reshape(-1)[e.positions]) != trees.bits(e.seed_values)
        if differ.any():
            raise SubsetError(
                f"{name!r} is not the seed's that the subset was made for: it differs from the seed values "
                f"that are stored at {differ.sum()} of {len(e)} positions."
            )
    return e.seed_fingerprint is not None or _was_converted(e, x)


def _was_converted(e: Entries, x: np.ndarray) -> bool:
    """Whether a tensor becomes the one that entries were converted from when it is converted back."""
    if e.before_astype is None:
        return False
    dtype, mark = e.before_astype
    with np.errstate(over="ignore", invalid="ignore"):
        return fingerprint(x.astype(dtype)) == mark
