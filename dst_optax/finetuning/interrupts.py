"""Ctrl-C and SIGTERM: asked to stop, a run first saves a checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop; it saved a checkpoint first."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Notes SIGINT and SIGTERM instead of dying; a second one kills as usual.

    Yields:
      A function that tells whether a signal has come.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
