"""Models on disk as mappings from a path to an array, and tuned models written as safetensors.

Arrays are read when they are used, so a model larger than memory can be read tensor by tensor.
"""

import json
import math
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dst_optax.atomic import atomic_directory
from dst_optax.paths import as_path, is_local
from dst_optax.subset import files, tied, trees
from dst_optax.subset.core import Subset
from dst_optax.subset.dtypes import DTYPES, checked
from dst_optax.subset.errors import SubsetError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_OTHER_WEIGHTS = re.compile(
    r"adapter_.*|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|npz|ot|tflite)(\.data.*|\.index.*)?"
)


def open_model(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Any]:
    """The tensors of a model on disk, by path.

    Args:
      path: a safetensors file; a Hugging Face directory of one or several; an Orbax checkpoint; or a T5X
        checkpoint, old (msgpack and zarr) or new. Of checkpoints, the parameters are taken and the
        optimizer's state is left; they need ``orbax-checkpoint``, or ``msgpack`` and ``tensorstore``.
      names: paths of the tensors, where they are known; see :func:`training_state.parameter_keys`.

    Returns:
      Read-only arrays, or what ``numpy.asarray`` makes one.

    Raises:
      SubsetError: there is no model of a known kind, or files of it are missing or damaged.

    Example:
      >>> import tempfile
      >>> import numpy as np, safetensors.numpy
      >>> from dst_optax.subset import models
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     safetensors.numpy.save_file({"a.weight": np.ones((2, 3))}, f"{directory}/model.safetensors")
      ...     print(models.open_model(directory)["a.weight"].shape)
      (2, 3)
    """
    source = as_path(path)
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
        if (parameters := checkpoints.open_parameters(source, names)) is not None:
            return parameters
    except ModuleNotFoundError as e:
        raise SubsetError(f"{source} is a checkpoint; to read it, pip install {e.name}.") from e
    raise SubsetError(f"{source} is no safetensors file or directory, and no T5X or Orbax checkpoint.")


def shard_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model: the file, or those of a directory that transformers would read.

    Args:
      source: a file or a directory.

    Returns:
      ``model.safetensors``; the files that the index names; or the one model without either. Empty
      where no safetensors lie.

    Raises:
      SubsetError: a shard is missing, or several models lie there.
    """
    if not source.is_dir():
        return [source] if source.suffix == ".safetensors" else []
    if (source / WEIGHTS).exists():
        return [source / WEIGHTS]
    if (source / INDEX).exists():
        return _indexed(source)
    everything = sorted(source.glob("*.safetensors"))
    others = (files.TENSORS,) if (source / files.CONFIG).exists() else ()
    everything = [file for file in everything if file.name not in others]
    candidates = [file for file in everything if not file.name.startswith("adapter_")]
    if everything and not candidates:
        raise SubsetError(f"{source} holds an adapter, no model; merge it into its model first.")
    kinds = {(s[1], int(s[2])) if (s := _SHARD.fullmatch(f.name)) else (f.stem, 1) for f in candidates}
    if len(kinds) > 1 or any(shards != len(candidates) for _, shards in kinds):
        names = ", ".join(file.name for file in candidates[:5])
        raise SubsetError(f"{source} holds {names}: several models, or a part of one; name a file.")
    return candidates


def _indexed(source: pathlib.Path) -> list[pathlib.Path]:
    """The shards that an index names."""
    try:
        shard_of = json.loads(files.read_file(source / INDEX))["weight_map"]
        names = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SubsetError(f"{source / INDEX} is no index of safetensors files.") from e
    if any(not isinstance(n, str) or pathlib.PurePath(n).name != n for n in names):
        raise SubsetError(f"{source / INDEX} names files outside of its directory.")
    for name in names:
        if not (source / name).is_file():
            raise SubsetError(f"{source / name} is missing, which {INDEX} names; download all shards.")
    held = {tensor for name in names for tensor in _header(source / name)[1]}
    if missing := sorted(set(shard_of) - held):
        raise SubsetError(f"{source}: no shard holds {missing[0]!r}, which {INDEX} names.")
    return [source / n for n in names]


def apply_to_files(
    subset: Subset, seed: str | os.PathLike[str], out: str | os.PathLike[str], verify: bool = True
) -> list[str]:
    """Writes the tuned model as safetensors, tensor by tensor.

    Args:
      subset: what to apply.
      seed: what :func:`open_model` takes. Safetensors keep their names, and the other files and folders
        beside them are copied, but for weights of the seed that a loader might prefer (``*.bin``, ``*.h5``,
        an adapter, another precision). A checkpoint becomes ``model.safetensors``; tensors that are named
        as in JAX, ``a/b``, go to ``params.safetensors``, which transformers does not take for its own.
      out: directory that does not exist yet.
      verify: compare fingerprints, which reads the seed once more.

    Returns:
      The files of the seed's directory that were left out.

    Raises:
      SubsetError: the seed is not the subset's, or ``out`` exists; nothing is written then.

    Example:
      >>> import tempfile
      >>> import numpy as np, safetensors.numpy
      >>> from dst_optax import subset
      >>> from dst_optax.subset import models
      >>> seed, tuned = {"a.weight": np.zeros(3)}, {"a.weight": np.array([0.0, 5.0, 0.0])}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     safetensors.numpy.save_file(seed, f"{directory}/model.safetensors")
      ...     extracted = subset.from_models(seed, tuned)
      ...     left_out = models.apply_to_files(extracted, directory, f"{directory}/tuned")
      ...     print(models.open_model(f"{directory}/tuned")["a.weight"].tolist())
      [0.0, 5.0, 0.0]
    """
    source, target = as_path(seed), as_path(out)
    if not is_local(target):
        raise SubsetError(f"{target} lies in an object store; write a local directory and copy it there.")
    if target.exists():
        raise SubsetError(f"{target} exists; name a new directory.")
    model = open_model(source, subset)
    subset = tied.for_model(subset, model)
    subset.check(model, verify=verify)
    with atomic_directory(target) as temporary:
        shards = shard_files(source)
        for file in shards:
            header, tensors = _open_safetensors(file)
            _write_tuned(subset, header, tensors, temporary / _output_name(file.name, tensors))
        if not shards:
            _write_tuned(subset, _new_header(model), model, temporary / _output_name(WEIGHTS, model))
        return _copy_others(source, shards, model, temporary) if source.is_dir() and shards else []


def _output_name(name: str, tensors: Iterable[str]) -> str:
    return "params.safetensors" if name == WEIGHTS and any("/" in t for t in tensors) else name


def _copy_others(
    source: pathlib.Path, shards: Sequence[pathlib.Path], model: Mapping[str, Any], target: pathlib.Path
) -> list[str]:
    """Copies what is no weight of the seed, folders too; returns the names of what it leaves out."""
    left_out = []
    of_a_subset = (files.TENSORS, files.CONFIG, files.CARD) if (source / files.CONFIG).exists() else ()
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source)
        if not file.is_file() or file in shards or any(part.startswith(".") for part in path.parts[:-1]):
            continue
        if file.name == INDEX and len(path.parts) == 1 and shards[0].name != WEIGHTS:
            stale = False
        elif file.suffix == ".safetensors" and len(path.parts) > 1:  # a module of its own may lie in a folder
            stale = any(name in model for name in _open_safetensors(file)[1])
        else:
            stale = _OTHER_WEIGHTS.fullmatch(file.name) is not None or str(path) in of_a_subset
        if stale:
            left_out.append(str(path))
        else:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)
    return left_out


def _write_tuned(subset: Subset, header: bytes, tensors: dict[str, Any], target: pathlib.Path) -> None:
    with open(target, "xb") as f:
        f.write(header)
        for name, x in tensors.items():
            data = np.array(x, order="C").reshape(-1)
            (path,) = trees.named_leaves({name: x})
            data[subset[path].positions] = subset[path].values
            f.write(data.view(np.uint8).data)


def _new_header(model: dict[str, Any]) -> bytes:
    header, at = {}, 0
    for name, x in model.items():
        dtype = checked(x.dtype, name)
        kind = next(k for k, d in DTYPES.items() if d == dtype)
        stop = at + math.prod(x.shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file start, and its checked header."""
    if not is_local(path):
        raise SubsetError(
            f"{path} lies in an object store; safetensors are mapped into memory, copy them here."
        )
    if not path.is_file():
        raise SubsetError(f"{path} cannot be read: it is no regular file, or does not exist.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(size - 8, 10**8):
                raise ValueError("its header is longer than the file")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        expected = 0
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if any(type(n) is not int for n in (first, last)):
                raise ValueError(f"{name!r} has the data_offsets {entry['data_offsets']}")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}, which is not supported")
            if any(type(n) is not int or n < 0 for n in entry["shape"]):
                raise ValueError(f"{name!r} has the shape {entry['shape']}")
            nbytes = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if first != expected or last - first != nbytes:
                raise ValueError("its tensors overlap or have gaps")
            expected = last
        if 8 + length + expected != size:
            raise ValueError("its size is not that of its tensors")
    except OSError as e:
        raise SubsetError(f"{path} cannot be read: {e.strerror}.") from e
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise SubsetError(f"{path} is no safetensors file that can be read: {str(e)[:200]}.") from e
    return 8 + length, header


def _open_safetensors(path: pathlib.Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """The bytes before the tensors, and the tensors in the order of the file, mapped into memory."""
    start, header = _header(path)
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        part = np.asarray(data[start + first : start + last])
        tensors[name] = part.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return data[:start].tobytes(), tensors
