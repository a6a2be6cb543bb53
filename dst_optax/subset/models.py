"""Models on disk as mappings from a path to an array, and tuned models written as safetensors.

Arrays are read when they are used, so a model larger than memory can be read tensor by tensor.
"""

import json
import math
import os
import pathlib
import secrets
import shutil
import struct
from typing import Any

import numpy as np

from dst_optax.subset import files
from dst_optax.subset.core import Subset
from dst_optax.subset.errors import SubsetError

INDEX = "model.safetensors.index.json"


def open_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of a model on disk, by path.

    Args:
      path: a safetensors file; a Hugging Face directory of one or several; an Orbax checkpoint; or a T5X
        checkpoint, old (msgpack and zarr) or new. Of checkpoints, what lies under ``target`` or ``params``
        is taken; they need ``orbax-checkpoint``, or ``msgpack`` and ``tensorstore``.

    Returns:
      Read-only arrays, or what ``numpy.asarray`` makes one.

    Raises:
      SubsetError: there is no model of a known kind.
    """
    source = pathlib.Path(path)
    if shards := shard_files(source):
        tensors: dict[str, Any] = {}
        for file in shards:
            for name, x in _open_safetensors(file)[1].items():
                if name in tensors:
                    raise SubsetError(f"{source}: two files hold the tensor {name!r}.")
                tensors[name] = x
        return tensors
    from dst_optax.subset import checkpoints

    try:
        if (found := checkpoints.open_parameters(source)) is not None:
            return found
    except ModuleNotFoundError as e:
        raise SubsetError(f"{source} is a checkpoint; to read it, pip install {e.name}.") from e
    raise SubsetError(f"{source} is no safetensors file or directory, and no T5X or Orbax checkpoint.")


def shard_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model: the file, those that the index names, or all in the directory."""
    if not source.is_dir():
        return [source] if source.suffix == ".safetensors" else []
    if (source / INDEX).exists():
        try:
            names = sorted(set(json.loads(files.read_file(source / INDEX))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise SubsetError(f"{source / INDEX} is no index of safetensors files.") from e
        if any(not isinstance(n, str) or pathlib.PurePath(n).name != n for n in names):
            raise SubsetError(f"{source / INDEX} names files outside of its directory.")
        return [source / n for n in names]
    return sorted(source.glob("*.safetensors"))


def apply_to_files(
    subset: Subset, seed: str | os.PathLike[str], out: str | os.PathLike[str], verify: bool = True
) -> None:
    """Writes the tuned model as safetensors, tensor by tensor.

    Args:
      subset: what to apply.
      seed: what :func:`open_model` takes. Safetensors keep their names, and the other files in their
        directory are copied; a checkpoint becomes ``model.safetensors``.
      out: directory that does not exist yet.
      verify: compare fingerprints, which reads the seed once more.

    Raises:
      SubsetError: the seed is not the subset's, or ``out`` exists; nothing is written then.
    """
    source, target = pathlib.Path(seed), pathlib.Path(out)
    if target.exists():
        raise SubsetError(f"{target} exists; name a new directory.")
    model = open_model(source)
    subset.check(model, verify=verify)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    temporary.mkdir(parents=True)
    try:
        shards = shard_files(source)
        for file in shards:
            _write_tuned(subset, *_open_safetensors(file), temporary / file.name)
        if not shards:
            _write_tuned(subset, _new_header(model), model, temporary / "model.safetensors")
        elif source.is_dir():
            for file in source.iterdir():
                if file.is_file() and file not in shards:
                    shutil.copyfile(file, temporary / file.name)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tuned(subset: Subset, header: bytes, tensors: dict[str, Any], target: pathlib.Path) -> None:
    with open(target, "xb") as f:
        f.write(header)
        for name, x in tensors.items():
            data = np.array(x, order="C").reshape(-1)
            data[subset[name].positions] = subset[name].values
            f.write(data.view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())


def _new_header(model: dict[str, Any]) -> bytes:
    header, at = {}, 0
    for name, x in model.items():
        dtype = np.dtype(x.dtype)
        kind = next((k for k, d in files.DTYPES.items() if d == dtype), None)
        if kind is None:
            raise SubsetError(f"{name!r} has the dtype {dtype}, which safetensors files cannot hold.")
        stop = at + math.prod(x.shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file start, and its checked header."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(size - 8, 10**8):
                raise ValueError("its header is longer than the file")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        expected = 0
        for entry in header.values():
            first, last = entry["data_offsets"]
            nbytes = math.prod(entry["shape"]) * files.DTYPES[entry["dtype"]].itemsize
            if first != expected or last - first != nbytes:
                raise ValueError("its tensors overlap or have gaps")
            expected = last
        if 8 + length + expected != size:
            raise ValueError("its size is not that of its tensors")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise SubsetError(f"{path} is no safetensors file that can be read: {str(e)[:200]}.") from e
    return 8 + length, header


def _open_safetensors(path: pathlib.Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """The bytes before the tensors, and the tensors in the order of the file, mapped into memory."""
    start, header = _header(path)
    data = np.memmap(path, np.uint8, "r")
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        part = np.asarray(data[start + first : start + last])
        found[name] = part.view(files.DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return data[:start].tobytes(), found
