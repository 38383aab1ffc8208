"""An event loop whose clock jumps to the next timer: no sockets, no threads, no waiting."""

from __future__ import annotations

import asyncio
from typing import Any


class Stuck(Exception):
    """Nothing will ever happen any more."""


class _Jump:
    """In the place of a selector: what would be waited for is over at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck
        self._loop.now += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of their times, and of their making where these are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        """Seconds since the loop was made."""
        self._selector = _Jump(self)

    def time(self) -> float:
        return self.now

    def _process_events(self, events: list[Any]) -> None:
        """There are none: nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody waits: nobody has to be woken."""
