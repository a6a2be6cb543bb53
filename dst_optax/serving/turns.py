"""Whose turn it is on a model that can be only one of many at a time.

Requests for one subset run together. Another one's turn comes when nobody runs, and once its oldest request
has waited for ``patience`` seconds nobody else is let in. Turns are given in the order of the oldest request,
so a request waits at most for ``patience`` and, for each other subset that was asked for before it, for the
longest request of its turn and a switch.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple


class _Waiter(NamedTuple):
    name: str | None
    since: float
    admitted: asyncio.Future[None]


class Turns:
    """Turns on one model, for requests in one event loop.

    Attributes:
      current: whose values the model has.
      running: requests that are being served.
    """

    def __init__(self, switch: Callable[[str | None], Awaitable[None]], patience: float = 0.5) -> None:
        """Starts with the seed's turn.

        Args:
          switch: gives the model the values of a subset, or the seed's for None; called while nobody runs.
          patience: seconds after which a request that waits keeps others from being let in before it.
        """
        self.current: str | None = None
        self.running = 0
        self._switch = switch
        self._patience = patience
        self._waiting: list[_Waiter] = []
        self._gate = asyncio.Lock()  # held while the model is being switched
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def turn(self, name: str | None) -> AsyncIterator[None]:
        """Waits for the turn of a subset and holds it for as long as the block runs.

        Args:
          name: a subset, or None for the seed.

        Raises:
          Exception: what ``switch`` raised for this subset.
        """
        await self._admit(name)
        try:
            yield
        finally:
            self._leave()

    @contextlib.asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Lets nobody in for as long as the block runs; those who run go on."""
        try:
            async with self._gate:
                yield
        finally:
            self._advance()

    async def _admit(self, name: str | None) -> None:
        loop = asyncio.get_running_loop()
        due = self._waiting and loop.time() - self._waiting[0].since >= self._patience
        if name == self.current and not self._gate.locked() and not due:
            self.running += 1
            return
        waiter = _Waiter(name, loop.time(), loop.create_future())
        self._waiting.append(waiter)
        self._advance()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._advance()  # it may have been the one for whom the others waited
            elif not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
                self._leave()
            raise

    def _leave(self) -> None:
        self.running -= 1
        self._advance()

    def _advance(self) -> None:
        """Begins the next turn if it can begin now."""
        if self._can_begin() and not self._gate.locked():
            task = asyncio.ensure_future(self._begin())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _can_begin(self) -> bool:
        return bool(self._waiting) and (not self.running or self._waiting[0].name == self.current)

    async def _begin(self) -> None:
        async with self.closed():
            if not self._can_begin():
                return
            name, error = self._waiting[0].name, None
            if name != self.current:
                try:
                    await self._switch(name)
                    self.current = name
                except Exception as e:
                    error = e
            chosen = [w for w in self._waiting if w.name == name]
            self._waiting = [w for w in self._waiting if w.name != name]
            for waiter in chosen:
                if waiter.admitted.cancelled():
                    continue
                if error is not None:
                    waiter.admitted.set_exception(error)
                else:
                    self.running += 1
                    waiter.admitted.set_result(None)
