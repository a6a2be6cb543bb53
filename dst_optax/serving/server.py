"""Named subsets on an inference engine of one or several processes, switched between requests.

Everything is validated by all processes before any of them writes, a failure is undone on all of them, and
one that cannot be undone closes the server for good. Requests are served in turns, see
:mod:`dst_optax.serving.turns`.
"""

import asyncio
import contextlib
import os
import pathlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from dst_optax.serving.store import Listed, check_name
from dst_optax.serving.turns import Turns
from dst_optax.subset import SubsetError, files

Mode = Literal["wait", "abort", "keep"]
SEED_VERSION = "default"  # what engines call the weights they started with


class UnknownSubsetError(SubsetError):
    """No subset of this name is loaded."""


class BrokenServerError(RuntimeError):
    """The processes may hold different weights; the server answers no more."""


class Engine(Protocol):
    """What the server needs of an engine."""

    async def call(self, verb: str, *args: Any) -> list[dict[str, Any]]:
        """Runs :func:`dst_optax.serving.routing.answer` on every process; what each of them answers."""
        ...

    async def pause(self, mode: Mode) -> None:
        """Waits until no request runs, ends those that run, or freezes them; resets all caches."""
        ...

    async def resume(self) -> None:
        """Goes on serving."""
        ...

    async def set_version(self, version: str) -> None:
        """Names the weights in the answers from now on."""
        ...


class SubsetServer:
    """The verbs of a subset store on an engine, and turns for requests that name a subset."""

    def __init__(self, engine: Engine, root: str | os.PathLike[str] | None, patience: float = 0.5) -> None:
        """Makes a server; :meth:`start` comes first.

        Args:
          engine: holds the seed model.
          root: subsets are loaded from directories below this one only; None allows none.
          patience: seconds after which a waiting request keeps others from being let in before it.
        """
        self._engine = engine
        self._root = None if root is None else pathlib.Path(root).resolve()
        self._turns = Turns(self._switch, patience)
        self._changes = asyncio.Lock()  # of what is loaded and of the default
        self._loaded: set[str] = set()
        self._broken: str | None = None
        self.default: str | None = None
        """The subset for requests that name none."""

    async def start(self) -> None:
        """Has every process learn where it keeps the checkpoint's entries.

        Raises:
          SubsetError: subsets cannot be served on this model.
        """
        await self._everywhere("prepare")

    async def load(self, name: str, directory: str) -> None:
        """Loads a subset and checks it against the seed, the checkpoint and the engine's own values.

        Args:
          name: letters, digits, ``.``, ``_`` and ``-``; not in use yet.
          directory: below the root, of unknown origin.

        Raises:
          SubsetError: it is refused; everything is as it was before.
        """
        check_name(name)
        source = self._confined(directory)
        async with self._changes:
            if name in self._loaded:
                raise SubsetError(f"the name {name!r} is in use; unload it first.")
            try:
                check_coverage(await self._everywhere("load", name, str(source)))
            except BaseException:
                await self._everywhere("discard", name)
                raise
            self._loaded.add(name)

    async def activate(self, name: str | None, mode: Mode = "wait") -> None:
        """Gives the model the values of a subset, and has requests that name none use it.

        Args:
          name: a loaded subset, or None for the seed.
          mode: what happens to requests that run: they are waited for, ended, or, with ``"keep"``, go on with
            the new values, so that their answers mix two models.

        Raises:
          SubsetError: it is not loaded, or a process refused it; the model is as it was before.
          BrokenServerError: the processes may differ.
        """
        self._check_open()
        if mode not in ("wait", "abort", "keep"):
            raise SubsetError(f'mode: got {mode!r}; it is "wait", "abort" or "keep".')
        async with self._changes:
            self._check_loaded(name)
            if mode == "wait":
                async with self._turns.turn(name):
                    self.default = name
            else:
                await asyncio.shield(self._interrupt(name, mode))

    async def unload(self, name: str) -> None:
        """Forgets a subset; requests that wait for it are refused.

        Raises:
          SubsetError: it is not loaded.
        """
        self._check_open()
        async with self._changes:
            self._check_loaded(name)
            self.default = None if self.default == name else self.default
            self._loaded.discard(name)
            try:
                async with self._turns.closed():  # a switch to it may have begun; no other can
                    pass
                if self._turns.current == name:
                    async with self._turns.turn(self.default):
                        pass
                await self._everywhere("unload", name)
            except BaseException:
                self._loaded.add(name)
                raise

    async def list(self) -> list[Listed]:
        """What is loaded, least recently used first; bytes are those of all processes."""
        return [
            Listed(x[0][0], x[0][1], sum(row[2] for row in x), x[0][3])
            for x in zip(*await self._everywhere("list"), strict=True)
        ]

    @contextlib.asynccontextmanager
    async def turn(self, name: str | None) -> AsyncIterator[None]:
        """Serves a request with a subset's values.

        Args:
          name: a loaded subset, or None for the default.

        Raises:
          UnknownSubsetError: it is not loaded.
          BrokenServerError: the processes may differ.
        """
        self._check_open()
        async with self._turns.turn(self.default if name is None else name):
            yield

    @property
    def names(self) -> Sequence[str]:
        """The subsets that are loaded, in the order of their names."""
        return sorted(self._loaded)

    def has(self, name: Any) -> bool:
        """Whether a subset of this name is loaded."""
        return isinstance(name, str) and name in self._loaded

    async def _interrupt(self, name: str | None, mode: Mode) -> None:
        async with self._turns.closed():
            while mode == "abort" and self._turns.running:  # some may reach the engine only later
                await self._engine.pause("abort")
                await self._engine.resume()
                await asyncio.sleep(0.01)
            if self._turns.current != name:
                await self._switch(name, mode)
                self._turns.current = name
            self.default = name

    async def _switch(self, name: str | None, mode: Mode = "wait") -> None:
        self._check_loaded(name)
        try:
            # nothing is written before all agree
            await _all(self._engine.pause(mode), self._everywhere("check", name))
            await self._exchange(name)
        finally:
            if self._broken is None:
                await self._engine.resume()

    async def _exchange(self, name: str | None) -> None:
        try:
            await self._write(name)
        except Exception as e:
            try:
                await self._write(self._turns.current)
            except Exception as again:
                self._broken = f"a switch to {name!r} failed ({e}) and could not be undone ({again})"
                await self._engine.pause("abort")  # nobody is served from now on
                self._check_open()
            raise

    async def _write(self, name: str | None) -> None:
        version = SEED_VERSION if name is None else name
        await _all(self._everywhere("activate", name), self._engine.set_version(version))

    async def _everywhere(self, verb: str, *args: Any) -> Sequence[Any]:
        return results(await self._engine.call(verb, *args))

    def _confined(self, directory: str) -> pathlib.Path:
        if self._root is None:
            raise SubsetError("subsets are loaded from one directory only, and none is configured.")
        if not isinstance(directory, str) or "\0" in directory:
            raise SubsetError("directory: expected a path below the root.")
        source = (self._root / directory).resolve()
        for path in (source, source / files.CONFIG, source / files.TENSORS):
            if not path.resolve().is_relative_to(self._root):
                raise SubsetError(f"{directory[:200]!r} is not below the root directory.")
        return source

    def _check_loaded(self, name: str | None) -> None:
        if name is not None and not self.has(name):
            raise UnknownSubsetError(
                f"no subset {str(name)[:128]!r} is loaded; loaded are {sorted(self._loaded)[:8]}."
            )

    def _check_open(self) -> None:
        if self._broken is not None:
            raise BrokenServerError(f"{self._broken}; restart the server.")


async def _all(*calls: Awaitable[Any]) -> None:
    """Makes calls at once and waits for all of them; raises what the first of them raised."""
    for reply in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(reply, BaseException):
            raise reply


def results(replies: list[dict[str, Any]]) -> list[Any]:
    """What the processes returned; raises what one of them raised."""
    for rank, reply in enumerate(replies):
        if "refused" in reply:
            raise SubsetError(reply["refused"])
        if "error" in reply:
            raise RuntimeError(f"process {rank}: {reply['error']}")
    return [reply["result"] for reply in replies]


def check_coverage(missed: Sequence[dict[str, bytes]]) -> None:
    """Raises if an entry of a subset has a place in no process; ``missed`` are bits by tensor."""
    for name in set.intersection(*(set(m) for m in missed)):
        nowhere = np.bitwise_and.reduce([np.frombuffer(m[name], np.uint8) for m in missed])
        if nowhere.any():
            count = int(np.unpackbits(nowhere).sum())
            raise SubsetError(
                f"{name!r}: the engine does not load {count} of the entries that the subset has there."
            )
