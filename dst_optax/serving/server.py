"""Named subsets on an inference engine of one or several processes, switched between requests.

Everything is validated by all processes before any of them writes, a failure is undone on all of them, and
one that cannot be undone closes the server for good. Requests are served in turns, see
:mod:`dst_optax.serving.turns`.
"""

import asyncio
import contextlib
import os
import pathlib
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
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

    def __init__(
        self,
        engine: Engine,
        root: str | os.PathLike[str] | None,
        patience: float = 0.5,
        reserved: Collection[str] = (),
    ) -> None:
        """Makes a server; :meth:`start` comes first.

        Args:
          engine: holds the seed model.
          root: subsets are loaded from directories below this one only; None allows none.
          patience: seconds after which a waiting request keeps others from being let in before it.
          reserved: names of the seed model, which no subset may take.
        """
        self._engine = engine
        self._root = None if root is None else pathlib.Path(root).resolve()
        self._turns = Turns(self._switch, patience)
        self._reserved = {SEED_VERSION, *reserved}
        self._changes = asyncio.Lock()  # of what is loaded
        self._activations = asyncio.Lock()  # in the order in which they were asked for
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
        self._check_open()
        check_name(name)
        if name in self._reserved:
            raise SubsetError(f"the name {name!r} is the seed model's; give the subset another one.")
        source = self._confined(directory)
        async with self._changes:
            if name in self._loaded:
                raise SubsetError(f"the name {name!r} is in use; unload it first.")
            try:
                check_placed(await self._everywhere("load", name, str(source)))
            except BaseException as error:
                try:
                    await self._everywhere("discard", name)
                except Exception as again:
                    error.add_note(f"Some processes still keep it: {again}")
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
        async with self._activations:
            self._check_loaded(name)
            if mode == "wait":
                async with self._turn_of(name):
                    self._check_loaded(name)  # it may be unloaded right after
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
            was_default = self.default == name
            self.default = None if was_default else self.default
            self._loaded.discard(name)
            try:
                async with self._turns.closed():  # a switch to it may have begun; no other can
                    pass
                if self._turns.current == name:
                    async with self._turns.turn(self.default):
                        pass
                await self._everywhere("discard", name)
            except BaseException:
                self._loaded.add(name)
                if was_default and self.default is None:
                    self.default = name
                raise

    async def list(self) -> list[Listed]:
        """What is loaded, least recently used first; bytes are those of all processes."""
        ranks = [{row[0]: Listed(*row) for row in rows} for rows in await self._everywhere("list")]
        return [
            x._replace(nbytes=sum(rank[name].nbytes for rank in ranks if name in rank))
            for name, x in ranks[0].items()
            if name in self._loaded
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
        async with self._turn_of(self.default if name is None else name):
            yield

    @contextlib.asynccontextmanager
    async def _turn_of(self, name: str | None) -> AsyncIterator[None]:
        self._check_open()
        async with self._turns.turn(name):
            self._check_open()  # a switch may have failed while it waited
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
            pause = 0.01
            while mode == "abort" and self._turns.running:  # some may reach the engine only later
                await self._engine.pause("abort")
                await self._engine.resume()
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)
            if self._turns.current != name:
                await self._switch(name, mode)
                self._turns.current = name
            self._check_loaded(name)
            self.default = name

    async def _switch(self, name: str | None, mode: Mode = "wait") -> None:
        self._check_open()
        self._check_loaded(name)
        try:
            # nothing is written before all agree
            await _all(self._engine.pause(mode), self._everywhere("check", name))
            await self._exchange(name)
        finally:
            if self._broken is None:
                await self._go_on(name)

    async def _go_on(self, name: str | None) -> None:
        try:
            await self._engine.resume()
        except Exception as e:
            self._broken = f"the engine did not go on after a switch to {name!r} ({e})"
            self._check_open()

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
        if not isinstance(directory, str):
            raise SubsetError("directory: expected a path below the root.")
        outside = SubsetError(f"{directory[:200]!r} is not below the root directory.")
        try:
            source = (self._root / directory).resolve()
            resolved = [(source / name).resolve() for name in ("", files.CONFIG, files.TENSORS)]
        except (ValueError, OSError, RuntimeError) as e:  # names that no file can have, and loops of links
            raise outside from e
        if not all(path.is_relative_to(self._root) for path in resolved):
            raise outside
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


def check_placed(answers: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    """Raises unless all processes loaded one subset, and each of its entries has a place in one of them.

    Args:
      answers: for each process the subset's digest, and which entries it has no place for, as bits by tensor.

    Raises:
      SubsetError: the files changed meanwhile, or the engine has no place for an entry.
    """
    digests, missed = zip(*answers, strict=True)
    if len(set(digests)) > 1:
        raise SubsetError("the processes read different subsets: the files changed meanwhile; load again.")
    for name in set.intersection(*(set(m) for m in missed)):
        nowhere = np.bitwise_and.reduce([np.frombuffer(m[name], np.uint8) for m in missed])
        if nowhere.any():
            count = int(np.unpackbits(nowhere).sum())
            raise SubsetError(
                f"{name!r}: the engine does not load {count} of the entries that the subset has there."
            )
