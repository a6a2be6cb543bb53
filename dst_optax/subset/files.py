"""A subset as a directory: ``subset.safetensors``, ``subset_config.json`` and a model card.

For each tensor with entries the safetensors file holds ``<path>.values``, ``<path>.positions`` (bytes, see
:mod:`dst_optax.subset.gaps`, or raw integers) and, when stored, ``<path>.seed_values``. The JSON file has
shape, dtype, number of entries and the seed's fingerprint of every tensor, and SHA-256 of both files'
content. Files are taken to be of unknown origin: nothing is allocated for a number that they only claim.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dst_optax.atomic import unfinished
from dst_optax.paths import as_path, is_local, write_files
from dst_optax.subset import gaps
from dst_optax.subset.dtypes import BY_NAME, DTYPES, checked
from dst_optax.subset.entries import Entries, has_seed_values
from dst_optax.subset.errors import SubsetError

FORMAT = "dst-optax-subset"
VERSION = 1
TENSORS = "subset.safetensors"
CONFIG = "subset_config.json"
CARD = "README.md"
MAX_CONFIG = 2**26  # bytes
_RETRIES = 5
KINDS = ("values", "positions", "seed_values")  # of arrays, for each tensor with entries
_CARD_MARK = "library_name: dst_optax"
_HEX = re.compile("[0-9a-f]*")
_ENCODINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gaps": lambda positions: np.frombuffer(gaps.encode(positions), np.uint8),
    "raw": np.ascontiguousarray,
}


Content = tuple[dict[str, Entries], dict[str, Any]]  # a subset's leaves and metadata


def save(
    leaves: Mapping[str, Entries],
    metadata: Mapping[str, Any],
    directory: str | os.PathLike[str],
    encoding: str = "gaps",
) -> None:
    """Writes a subset, see :meth:`dst_optax.subset.Subset.save`.

    No file is replaced before all of it is on the disk.
    """
    if encoding not in _ENCODINGS:
        raise SubsetError(f"encoding: got {encoding!r}; it is one of {list(_ENCODINGS)}.")
    without = [path for path, e in leaves.items() if e.seed_values is None]
    if 0 < len(without) < len(leaves):
        raise SubsetError(
            f"{without[0]!r} has no seed values, others have; give them to all tensors or to none."
        )
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for path, e in leaves.items():
        checked(e.dtype, path)
        described[path] = {
            "shape": [int(n) for n in e.shape],
            "dtype": e.dtype.name,
            "entries": len(e),
            "seed_fingerprint": e.seed_fingerprint,
        }
        if len(e):
            tensors[f"{path}.values"] = np.ascontiguousarray(e.values)
            tensors[f"{path}.positions"] = _ENCODINGS[encoding](e.positions)
            if e.seed_values is not None:
                tensors[f"{path}.seed_values"] = np.ascontiguousarray(e.seed_values)
    content = safetensors.numpy.save(tensors, {"format": FORMAT})  # of several, the order is random
    config = {
        "format": FORMAT,
        "version": VERSION,
        "seed_values": has_seed_values(leaves),
        "leaves": described,
        "metadata": metadata,
    }
    try:
        # as it will be read: keys are texts there
        config = json.loads(json.dumps(config, allow_nan=False), object_pairs_hook=_no_duplicates)
        config["sha256"] = {TENSORS: hashlib.sha256(content).hexdigest(), CONFIG: _digest(config)}
        text = json.dumps(config, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise SubsetError(f"metadata must be values that JSON can express: {e}.") from e
    if len(text.encode()) > MAX_CONFIG:
        raise SubsetError(f"{CONFIG} would have {len(text.encode())} bytes, at most {MAX_CONFIG} are read.")
    target = as_path(directory)
    card_of_ours = (target / CONFIG).exists() or not (target / CARD).exists()
    if not card_of_ours and _CARD_MARK not in (target / CARD).read_text(errors="replace"):
        raise SubsetError(f"{target / CARD} is not of a subset; give the subset a directory of its own.")
    target.mkdir(parents=True, exist_ok=True)
    about = card(leaves, metadata, len(content))
    readme = about.encode(errors="backslashreplace")  # names of files may be no UTF-8
    write_files(target, {TENSORS: content, CONFIG: text.encode(), CARD: readme})


def load(directory: str | os.PathLike[str]) -> Content:
    """Reads a subset, see :meth:`dst_optax.subset.Subset.load`."""
    source = as_path(directory)
    for _ in range(_RETRIES):
        before = _configurations(source)
        for path in before:
            with contextlib.suppress(SubsetError):
                return _decoded(path, source / TENSORS)
        if _configurations(source) == before:  # no save came between
            break
        time.sleep(0.02)
    return _decoded(source / CONFIG, source / TENSORS)


def _configurations(source: pathlib.Path) -> dict[pathlib.Path, Any]:
    """The configuration, and those without a name yet: a save names its tensors first."""
    found: dict[pathlib.Path, Any] = {source / CONFIG: None}
    for path in [source / CONFIG, *unfinished(source / CONFIG)] if is_local(source) else []:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def _decoded(config_path: pathlib.Path, tensors: pathlib.Path) -> Content:
    text = read_file(config_path, MAX_CONFIG)
    try:
        config = parse_config(text)
    except SubsetError as e:
        raise SubsetError(f"{config_path}: {e}") from e
    content = read_file(tensors, _max_bytes(config))
    with ThreadPoolExecutor(1) as pool:  # hashing and decoding run side by side
        digest = pool.submit(lambda: hashlib.sha256(content).hexdigest())
        try:
            return parse(config, content)
        except SubsetError as e:
            raise SubsetError(f"{tensors}: {e}") from e
        finally:
            if digest.result() != config["sha256"][TENSORS]:
                raise SubsetError(f"{tensors} is damaged: its checksum is not the one in {CONFIG}.")


def _max_bytes(config: Mapping[str, Any]) -> int:
    """What a safetensors file can have at most: 100 MB of header, and for an entry 12 bytes of position."""
    copies = 1 + config["seed_values"]
    sizes = [x["entries"] * (copies * x["dtype"].itemsize + 12) for x in config["leaves"].values()]
    return 2**27 + sum(sizes)


def stored_bytes(directory: str | os.PathLike[str]) -> dict[str, int]:
    """The bytes of each array in a subset's safetensors file, by its name there.

    Args:
      directory: of a subset that :func:`load` has accepted.
    """
    with (as_path(directory) / TENSORS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    offsets = {name: x["data_offsets"] for name, x in header.items() if name != "__metadata__"}
    return {name: stop - start for name, (start, stop) in offsets.items()}


def parse_config(content: bytes) -> dict[str, Any]:
    """Checks the JSON file.

    Args:
      content: its bytes.

    Returns:
      The document; ``leaves`` has shapes as tuples and dtypes as numpy dtypes.

    Raises:
      SubsetError: it is not what :func:`save` writes.
    """
    try:
        config = json.loads(
            content.decode(),
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as e:  # JSON and unicode errors are ValueErrors
        raise SubsetError(f"it cannot be read: {str(e)[:200]}.") from e
    _expect(isinstance(config, dict), "an object")
    _expect(config.get("format") == FORMAT, f'"format" to be {FORMAT!r}')
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        raise SubsetError(
            f"version {str(config.get('version'))[:40]} is not known; this is version {VERSION}."
        )
    keys = {"format", "version", "seed_values", "leaves", "metadata", "sha256"}
    _expect(set(config) == keys, f"the keys {sorted(keys)}")
    _expect(isinstance(config["seed_values"], bool), '"seed_values" to be true or false')
    _expect(isinstance(config["leaves"], dict), '"leaves" to be an object')
    _expect(isinstance(config["metadata"], dict), '"metadata" to be an object')
    sums = config["sha256"]
    _expect(isinstance(sums, dict) and set(sums) == {TENSORS, CONFIG}, '"sha256" of both files')
    _expect(all(_is_hex(v, 64) for v in sums.values()), '"sha256" of 64 hexadecimal digits')
    digest = _digest({k: v for k, v in config.items() if k != "sha256"})
    _expect(digest == sums[CONFIG], "another checksum of its own content: it was changed or is damaged")
    config["leaves"] = {p: _parse_leaf(p, leaf) for p, leaf in config["leaves"].items()}
    return config


def _parse_leaf(path: str, leaf: Any) -> dict[str, Any]:
    name = repr(path[:200])
    keys = {"shape", "dtype", "entries", "seed_fingerprint"}
    _expect(isinstance(leaf, dict) and set(leaf) == keys, f"{name} to have the keys {sorted(keys)}")
    shape, count, fingerprint = leaf["shape"], leaf["entries"], leaf["seed_fingerprint"]
    _expect(isinstance(shape, list) and len(shape) <= 32, f"{name} to have a shape of at most 32 axes")
    _expect(all(type(n) is int and 0 <= n <= gaps.MAX_SIZE for n in shape), f"{name} to have a valid shape")
    size = math.prod(shape)
    _expect(size <= gaps.MAX_SIZE, f"{name} to have at most {gaps.MAX_SIZE} entries")
    _expect(type(count) is int and 0 <= count <= size, f"{name} to have 0 to {size} entries")
    is_supported = isinstance(leaf["dtype"], str) and leaf["dtype"] in BY_NAME
    _expect(is_supported, f"{name} to have one of the dtypes {sorted(BY_NAME)}")
    _expect(fingerprint is None or _is_hex(fingerprint, 32), f"{name} to have a fingerprint of 32 digits")
    return {**leaf, "shape": tuple(shape), "dtype": BY_NAME[leaf["dtype"]]}


def parse(config: Mapping[str, Any], content: bytes) -> Content:
    """Decodes the safetensors file that belongs to a checked configuration.

    Raises:
      SubsetError: they do not fit each other, or the content is damaged.
    """
    try:
        tensors = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as e:
        raise SubsetError(f"it is no safetensors file: {str(e)[:200]}.") from e
    del content
    kinds = KINDS if config["seed_values"] else KINDS[:2]
    filled = {path: leaf for path, leaf in config["leaves"].items() if leaf["entries"]}
    expected = {f"{path}.{kind}" for path in filled for kind in kinds}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0][:200]
        raise SubsetError(f"it {'lacks' if odd in expected else 'has too'} the tensor {odd!r}.")

    def entries(path: str, leaf: dict[str, Any]) -> Entries:
        count = leaf["entries"]
        if not count:
            nothing = np.empty(0, leaf["dtype"])
            seeds = nothing if config["seed_values"] else None
            return Entries(leaf["shape"], np.empty(0, int), nothing, seeds, leaf["seed_fingerprint"])
        arrays = [_array(tensors.pop(f"{path}.{k}"), f"{path}.{k}") for k in kinds]
        size = math.prod(leaf["shape"])
        for kind, x in zip(kinds, arrays, strict=True):
            dtype, shape = leaf["dtype"], (count,)
            if kind == "positions" and x.dtype == np.uint8:
                dtype, shape = x.dtype, x.shape  # a stream of gaps
            elif kind == "positions":
                dtype = gaps.position_dtype(size)
            if x.dtype != dtype or x.ndim != 1 or x.shape != shape:
                raise SubsetError(f"{path[:200]!r}.{kind} is {x.dtype}{x.shape}, expected {dtype}{shape}.")
        values, positions, *seeds = arrays
        try:
            if positions.dtype == np.uint8:
                positions = gaps.decode(positions.data, count, size)
            return Entries(
                leaf["shape"], positions, values, next(iter(seeds), None), leaf["seed_fingerprint"]
            )
        except SubsetError as e:
            raise SubsetError(f"{path[:200]!r}: {e}") from e

    return {path: entries(path, leaf) for path, leaf in config["leaves"].items()}, config["metadata"]


def _array(tensor: dict[str, Any], name: str) -> np.ndarray:
    dtype = DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise SubsetError(f"{name[:200]!r} has the unknown dtype {tensor['dtype']}.")
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


def read_file(path: pathlib.Path, limit: int | None = None) -> bytes:
    """The content of a regular file, or of an object in a store, of at most ``limit`` bytes."""
    try:
        if not is_local(path):
            _check_size(path, path.stat().length, limit)  # pyright: ignore[reportAttributeAccessIssue]
            return path.read_bytes()
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as f:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise SubsetError(f"{path} is not a regular file.")
            _check_size(path, status.st_size, limit)
            return f.read(status.st_size)
    except OSError as e:
        raise SubsetError(f"{path} cannot be read: {e.strerror or 'there is no such file'}.") from e


def _check_size(path: pathlib.Path, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise SubsetError(f"{path} has {size} bytes; at most {limit} are read.")


def card(leaves: Mapping[str, Entries], metadata: Mapping[str, Any], file_bytes: int) -> str:
    """The model card, Markdown."""
    count, size = sum(len(e) for e in leaves.values()), sum(e.size for e in leaves.values())
    share = count / size if size else 0.0
    seeds = "" if has_seed_values(leaves) else "not "
    lines = [
        "---",
        _CARD_MARK,
        "tags: [dynamic-subset-tuning, subset]",
        "---",
        "# A subset of tuned parameters",
        "",
        f"{count:,} of {size:,} parameters ({share:.3g}) differ from the seed model, in "
        f"{sum(1 for e in leaves.values() if len(e))} of {len(leaves)} tensors; {file_bytes:,} bytes. "
        f"The seed's values are {seeds}stored.",
        "",
        "```python",
        "from dst_optax import subset",
        "",
        'tuned = subset.Subset.load("path/to/this/directory").apply(seed)',
        "```",
        "",
        "The seed model must be the one whose fingerprints `subset_config.json` names; `apply` checks it.",
    ]
    if metadata:
        lines += ["", "| | |", "|---|---|"]
        for key, value in metadata.items():
            text = json.dumps(value) if not isinstance(value, str) else value
            cells = (str(x).replace("|", "\\|").replace("\n", " ") for x in (key, text))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _digest(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("an object has a key twice")
    return mapping


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        _refuse_constant(text)
    return number


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and _HEX.fullmatch(value) is not None


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise SubsetError(f"expected {what}.")
