"""Files on this machine and in object stores, by paths with pathlib's methods."""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dst_optax.atomic import atomic_file, sync


def as_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path whose methods reach the file: pathlib's, or etils' for ``gs://bucket/file`` and its like.

    ``pathlib.Path("gs://bucket")`` would be the local ``gs:/bucket``.

    Args:
      path: a local path, or one with a scheme.

    Returns:
      The path. Object stores have pathlib's methods, but no file descriptors, links or directories of
      their own.

    Raises:
      ValueError: the scheme is unknown, or etils is not installed.

    Example:
      >>> as_path("runs/cb")
      PosixPath('runs/cb')
      >>> str(as_path("gs://bucket/runs") / "cb")
      'gs://bucket/runs/cb'
    """
    name = os.fspath(path)
    scheme, separator, _ = name.partition("://")
    if not separator:
        return pathlib.Path(path)
    try:
        from etils import epath
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} lies in an object store; to reach it, pip install etils[epath].") from error
    try:
        remote: Any = epath.Path(name)
    except KeyError as error:
        raise ValueError(
            f"{name}: no file system is known by {scheme}://; etils.epath has gs:// and s3://."
        ) from error
    return remote


def require_local(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """A path of this machine's file system.

    Args:
      path: any.
      name: the argument's, for the error.

    Returns:
      The path.

    Raises:
      ValueError: it lies in an object store; pathlib would silently make the local ``gs:/bucket`` of it.

    Example:
      >>> require_local("runs/cb", "run_dir")
      PosixPath('runs/cb')
    """
    if "://" in os.fspath(path):
        raise ValueError(
            f"{name}: {os.fspath(path)} lies in an object store, and this is read and written on a local "
            "file system; give a local directory and copy what it holds."
        )
    return pathlib.Path(path)


def is_local(path: pathlib.PurePath) -> bool:
    """Whether a path of :func:`as_path` is of this machine's file system."""
    return isinstance(path, pathlib.Path)


def write_files(directory: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files that are there whole or not at all; none is replaced before all are on the disk.

    Args:
      directory: see :func:`as_path`; must exist.
      contents: of the files by name, in the order in which they appear.
    """
    if not is_local(directory):
        for name, content in contents.items():  # an object appears when all of it has arrived
            (directory / name).write_bytes(content)
        return
    with contextlib.ExitStack() as renames:
        for name, content in reversed(list(contents.items())):
            temporary = renames.enter_context(atomic_file(directory / name))
            temporary.write_bytes(content)
            sync(temporary)
