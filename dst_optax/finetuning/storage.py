"""Files that survive: trees of arrays, seed models, subsets, and checkpoints that are whole or absent."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dst_optax import subset
from dst_optax import tree as tree_lib
from dst_optax.atomic import atomic_file, publish
from dst_optax.finetuning import processes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")
_LOCKED: dict[tuple[int, int], int] = {}  # handles of locked files by device and inode


@contextmanager
def shared_directory(path: Path) -> Iterator[Path]:
    """Makes a directory that all processes fill: there with all its files, or not at all.

    Args:
      path: the directory; must not exist.

    Yields:
      Where to write; renamed to ``path`` at the end.

    Raises:
      ValueError: the disk is full; nothing is left of the attempt.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a"
      >>> with shared_directory(path) as temporary:
      ...     _ = (temporary / "x").write_text("1")
      >>> [p.name for p in path.iterdir()]
      ['x']
    """
    temporary = path.with_name(f".tmp-{path.name}")  # the same in all processes
    if processes.is_primary():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    processes.barrier(f"{path} is begun")
    try:
        yield temporary
        processes.barrier(f"{path} is filled")
        if processes.is_primary():
            publish(temporary, path)
        processes.barrier(f"{path} is published")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_full(error):
            free = shutil.disk_usage(path.parent).free
            raise ValueError(
                f"{path}: the disk is full ({free:,} bytes free); nothing was written and earlier "
                "checkpoints are untouched. Make room and rerun the command."
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; all processes take part, the first one writes.

    Args:
      path: the file.
      text: what it shall hold.
    """
    if processes.is_primary():
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    processes.barrier(f"{path} is written")


def lock(path: Path) -> bool:
    """Locks a file until this process ends, which may ask for it again.

    Where there are no locks, as on some shared file systems and on Windows, every process has it.

    Args:
      path: the file; is made if need be.

    Returns:
      Whether we have it; False if another process does.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / ".lock"
      >>> lock(path), lock(path)
      (True, True)
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return True
    path.touch()
    file = path.stat()
    if (file.st_dev, file.st_ino) in _LOCKED:
        return True
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:
        pass
    _LOCKED[file.st_dev, file.st_ino] = handle  # to close it would unlock the file
    return True


def _is_full(error: BaseException) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path.

    Example:
      >>> named_leaves({"a": {"b": 1}})
      {'a/b': 1}
    """
    return dict(tree_lib.named_leaves(tree, is_leaf=lambda x: False))


def save_tree(path: Path, tree: Any) -> None:
    """Writes the arrays of any pytree with orbax.

    Args:
      path: directory to make.
      tree: arrays.
    """
    import orbax.checkpoint as ocp

    if leaves := _numbered(tree):  # orbax refuses a tree without arrays, such as the slots of plain SGD
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), leaves)


def load_tree(path: Path, like: Any) -> Any:
    """Reads what :func:`save_tree` wrote.

    Args:
      path: the directory.
      like: a tree of the same structure; shapes, dtypes and shardings are taken from it.

    Returns:
      The tree.

    Raises:
      ValueError: the files are missing, damaged or of another tree.
    """
    import orbax.checkpoint as ocp

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    leaves = _numbered(jax.tree.map(abstract, like))
    if not leaves:
        return like
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path.absolute(), leaves)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read, or belongs to another model or optimizer: {str(error)[:300]} "
            "Delete this checkpoint to go on from an earlier one."
        ) from error
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])


def _numbered(tree: Any) -> dict[str, Any]:
    return {f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(tree))}


def save_model(path: Path, params: Any) -> None:
    """Writes parameters as one safetensors file, by path; all processes take part.

    Args:
      path: the file.
      params: nested dict of arrays.
    """
    from safetensors.numpy import save_file

    leaves = named_leaves(processes.on_host(params))
    if processes.is_primary():
        save_file({name: np.ascontiguousarray(x).reshape(x.shape) for name, x in leaves.items()}, path)


def load_model(path: Path, like: Any) -> Any:
    """Reads what :func:`save_model` wrote.

    Args:
      path: the file.
      like: nested dict with the shapes and dtypes that must be there.

    Returns:
      Nested dict of numpy arrays.

    Raises:
      ValueError: the file is missing, truncated or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ValueError(f"{path} does not exist; the run directory is damaged.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read, it is truncated or damaged: {error}") from error
    want = {name: f"{np.dtype(x.dtype)}{list(x.shape)}" for name, x in named_leaves(like).items()}
    have = {name: f"{x.dtype}{list(x.shape)}" for name, x in tensors.items()}
    if want != have:
        differ = sorted(set(want.items()) ^ set(have.items()))
        raise ValueError(
            f"{path} holds another model; the first differences are {differ[:4]}. Give the model "
            "configuration that it was made with."
        )
    return tree_lib.map_named(lambda path, x: tensors[path], like)


def pick(params: Any, like: Any) -> Any:
    """Copies of those leaves of ``params`` that ``like`` has, with its shardings."""
    leaves = named_leaves(params)
    return tree_lib.map_named(lambda path, x: jax.device_put(np.array(leaves[path]), x.sharding), like)


def fingerprint(params: Any) -> str:
    """Fingerprint of a whole model: changes with any bit, name, shape or dtype.

    Example:
      >>> import numpy as np
      >>> len(fingerprint({"w": np.zeros(3, np.float32)}))
      32
    """
    leaves = sorted(named_leaves(params).items())
    parts = zip((name for name, _ in leaves), subset.fingerprints(x for _, x in leaves), strict=True)
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: ``<directory>/<step>``, each whole.

    Attributes:
      directory: where they lie.
      seed: fingerprint of the seed model.
    """

    directory: Path
    seed: str

    def steps(self) -> list[int]:
        """Steps of the checkpoints, in order; clears what a killed run left unfinished."""
        if not self.directory.is_dir():
            return []
        if processes.is_primary():
            for left in self.directory.glob(".tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def save(self, step: int, write: Callable[[Path], None], progress: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes all but it and the best one.

        Args:
          step: its step.
          write: writes the model and the optimizer into a directory.
          progress: JSON values to keep with it; ``best_step`` names the checkpoint to keep.

        Raises:
          ValueError: the disk is full.
        """
        path = self.directory / f"{step:08d}"
        if not path.exists():
            with shared_directory(path) as temporary:
                write(temporary)
                if processes.is_primary():
                    text = json.dumps({"seed": self.seed, **progress})
                    (temporary / "progress.json").write_text(text)
        if processes.is_primary():
            for old in self.steps():
                if old not in (step, progress.get("best_step")):
                    shutil.rmtree(self.directory / f"{old:08d}")
        processes.barrier(f"{path} stays")

    def path(self, step: int) -> Path:
        """Directory of a checkpoint."""
        return self.directory / f"{step:08d}"

    def progress(self, step: int) -> dict[str, Any]:
        """The values that :meth:`save` kept with a checkpoint.

        Raises:
          ValueError: it is damaged, or was made from another seed model.
        """
        file = self.path(step) / "progress.json"
        try:
            progress = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}. Delete this checkpoint.") from error
        if (seed := progress.pop("seed")) != self.seed:
            raise ValueError(
                f"{self.path(step)} was made from the seed model {seed}, but the seed model given "
                f"now is {self.seed}; give the same seed or another run directory."
            )
        return progress
