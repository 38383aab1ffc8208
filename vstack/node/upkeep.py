"""The thread that keeps the chunk store in order: compaction and scrub, a little at a time.

It decides only when: at most `RATE` bytes are read a second, and while somebody waits for a piece it waits
too, up to a second, so that under constant load it still gets somewhere. What is done, and how far it is,
the store's `compaction` and `scrub` know; a stop or a crash between two steps loses nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

from vstack.node.store import ChunkStore

log = logging.getLogger(__name__)

RATE = 32 << 20
"""Bytes a second."""

_IDLE = 1.0
_AFTER_ERROR = 60.0
_YIELD = 0.05
_MOST_YIELDS = 20


class Upkeep:
    """Works from when it is made until `close`."""

    def __init__(self, store: ChunkStore, busy: Callable[[], bool], changed: Callable[[], None]) -> None:
        """`busy` says whether requests wait; `changed` is called after each step that did something."""
        self._store = store
        self._busy = busy
        self._changed = changed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when the step that is under way, if any, is done."""
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        pause, before = _IDLE, monotonic()
        while not self._stop.wait(pause):
            for _ in range(_MOST_YIELDS):
                if not self._busy() or self._stop.wait(_YIELD):
                    break
            now = monotonic()
            try:
                read = self._store.compaction.step() + self._store.scrub.step(now - before)
            except Exception:  # a damaged index, say, must not end the node while it can still serve
                log.exception("compaction or scrub failed")
                pause = _AFTER_ERROR
            else:
                pause = read / RATE if read else _IDLE
                if read:
                    self._changed()
            before = now
