"""How fast a keeper may go: bytes read and written, at a rate that may change while it works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Budget:
    """A token bucket that holds a second's worth. What one piece takes over that, the next ones wait for."""

    def __init__(self, rate: Callable[[], float], now: Callable[[], float]) -> None:
        """`rate`: bytes a second, asked each time; `now`: monotonic seconds."""
        self._rate = rate
        self._now = now
        self._left = 0.0
        self._at = now()

    async def take(self, size: int) -> None:
        """Returns when `size` more bytes may be moved."""
        self._refill()
        self._left -= size
        while self._left < 0:
            await asyncio.sleep(min(1.0, -self._left / self._rate()))  # the rate may be raised meanwhile
            self._refill()

    def _refill(self) -> None:
        now, rate = self._now(), self._rate()
        self._left = min(rate, self._left + (now - self._at) * rate)
        self._at = now
