"""Models on disk as mappings from a path to a numpy array, and tuned models written back.

Safetensors are mapped into memory, so a model larger than memory can be read tensor by tensor.
"""

import json
import math
import os
import pathlib
import secrets
import shutil
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from dst_optax.subset import files, trees
from dst_optax.subset.core import Subset
from dst_optax.subset.errors import SubsetError

INDEX = "model.safetensors.index.json"


def open_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of a model on disk, by path.

    Args:
      path: a safetensors file; a Hugging Face directory of one or several; or an Orbax checkpoint (as T5X
        writes it too), which needs ``orbax-checkpoint`` and of which ``target`` or ``params`` is taken.

    Returns:
      Read-only arrays; those of safetensors are read when they are used.

    Raises:
      SubsetError: there is no model of a known kind.
    """
    source = pathlib.Path(path)
    if source.is_file() or list(source.glob("*.safetensors")):
        found: dict[str, Any] = {}
        for file in shard_files(source):
            for name, x in _open_safetensors(file).items():
                if name in found:
                    raise SubsetError(f"{source}: two files hold the tensor {name!r}.")
                found[name] = x
        return found
    if any((source / marker).exists() for marker in ("_METADATA", "_CHECKPOINT_METADATA", "checkpoint")):
        return _open_orbax(source)
    raise SubsetError(f"{source} is no safetensors file or directory, and no Orbax checkpoint.")


def shard_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model: those that the index names, or all in the directory."""
    if source.is_file():
        return [source]
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
    """Writes the tuned model as safetensors, tensor by tensor; other files of the seed are copied.

    Args:
      subset: what to apply.
      seed: safetensors file or directory.
      out: directory that does not exist yet.
      verify: compare fingerprints, which reads the seed once more.

    Raises:
      SubsetError: the seed is not the subset's, or ``out`` exists; nothing is written then.
    """
    source, target = pathlib.Path(seed), pathlib.Path(out)
    if target.exists():
        raise SubsetError(f"{target} exists; name a new directory.")
    subset.check(open_model(source), verify=verify)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    temporary.mkdir(parents=True)
    try:
        shards = shard_files(source)
        for file in shards:
            _write_tuned(subset, file, temporary / file.name)
        others = [] if source.is_file() else [p for p in source.iterdir() if p.is_file() and p not in shards]
        for file in others:
            shutil.copyfile(file, temporary / file.name)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tuned(subset: Subset, source: pathlib.Path, target: pathlib.Path) -> None:
    start, header = _header(source)
    with open(source, "rb") as old, open(target, "xb") as new:
        new.write(old.read(start))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            old.seek(start + first)
            data = np.frombuffer(bytearray(old.read(last - first)), subset[name].dtype)
            data[subset[name].positions] = subset[name].values
            new.write(data.tobytes())
        new.flush()
        os.fsync(new.fileno())


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
        expected = 0
        for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
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


def _open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    start, header = _header(path)
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        part = data[start + first : start + last]
        found[name] = np.asarray(part).view(files.DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def _open_orbax(path: pathlib.Path) -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    handler: Callable[..., Any] = ocp.PyTreeCheckpointer
    with handler() as checkpointer:
        tree: Any = checkpointer.metadata(path.absolute()).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(path.absolute(), restore_args=arguments)
    for key in ("target", "params"):
        if isinstance(restored, dict) and key in restored:
            restored = restored[key]
    return trees.named_leaves(restored, str(path))
