"""The thread that keeps the chunk store in order: compaction and scrub, a little at a time.

It decides only when: at most `RATE` bytes are read a second, and while somebody waits for a piece it waits
too, up to a second, so that under constant load it still gets somewhere. A scrub that is hastened begins
a round and goes on at that rate until it is over. What is done, and how far it is,
the store's `compaction` and `scrub` know; a stop or a crash between two steps loses nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from vstack.node.scrub import DONE
from vstack.node.store import ChunkStore

log = logging.getLogger(__name__)

RATE = 32 << 20
"""Bytes a second."""

_IDLE = 1.0
_AFTER_ERROR = 60.0
_YIELD = 0.05
_MOST_YIELDS = 20


class UpkeepStats(NamedTuple):
    """How far the upkeep is, and what it did since the node started."""

    scrub_rounds: int
    """Completed, since the index was made."""
    scrub_share: float
    """Of the current round that is done, 0 to 1."""
    scrub_seconds_left: float
    """Estimated, of the current round; 0 if the next one has not begun."""
    scrub_hastened: bool
    """A round that was asked for is under way, or is to begin."""
    scrub_pieces: int
    """Verified by the scrub."""
    scrub_bytes: int
    """Of payload, verified by the scrub."""
    scrub_damaged: int
    """Pieces and tombstones that the scrub found damaged."""
    scrub_errors: int
    """Reads of the scrub that failed."""
    compacted_superblocks: int
    """Removed, after what was live in them had been copied."""
    compacted_bytes: int
    """That these superblocks had taken: dead records, and what was copied."""
    reclaimed_bytes: int
    """What that has given back: `compacted_bytes` less what was copied, by those under way too."""


class Upkeep:
    """Works from when it is made until `close`."""

    def __init__(self, store: ChunkStore, busy: Callable[[], bool], changed: Callable[[], None]) -> None:
        """`busy` says whether requests wait; `changed` is called after each step that did something."""
        self._store = store
        self._busy = busy
        self._changed = changed
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._asked = threading.Event()
        """A round of the scrub is to begin."""
        self._hastened = False
        """It is under way. Only our thread changes it, and after `changed` was told of the round's end."""
        self._compacted = self._compacted_bytes = 0
        self._thread = threading.Thread(target=self._loop, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when the step that is under way, if any, is done."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def hasten_scrub(self) -> None:
        """Begins a round now, unless one that was hastened is under way. From any thread."""
        if not self._hastened:
            self._asked.set()
            self._wake.set()

    def figures(self) -> UpkeepStats:
        """As they are now. From any thread."""
        hastened = self._asked.is_set() or self._hastened
        scrub = self._store.scrub
        report = scrub.report
        return UpkeepStats(
            scrub.place.rounds,
            0.0 if self._asked.is_set() else scrub.share(),
            scrub.seconds_left(RATE, hurry=hastened),
            hastened,
            *report,
            self._compacted,
            self._compacted_bytes,
            self._store.compaction.reclaimed,
        )

    def _loop(self) -> None:
        pause, before = _IDLE, monotonic()
        while not self._sleep(pause):
            for _ in range(_MOST_YIELDS):
                if not self._busy() or self._stop.wait(_YIELD):
                    break
            now = monotonic()
            try:
                read = self._step(now - before)
            except Exception:  # a damaged index, say, must not end the node while it can still serve
                log.exception("compaction or scrub failed")
                pause = _AFTER_ERROR
            else:
                pause = read / RATE if read else _IDLE
                if read:
                    self._changed()
                if self._store.scrub.place.phase == DONE:
                    self._hastened = False
            before = now

    def _sleep(self, seconds: float) -> bool:
        """Whether to stop. Ends early when there is something to do."""
        self._wake.wait(seconds)
        self._wake.clear()
        return self._stop.is_set()

    def _step(self, seconds: float) -> int:
        """The bytes that were read, 0 if there is nothing to do. Raises IndexDamaged, IndexWriteFailed."""
        scrub = self._store.scrub
        if self._asked.is_set():
            scrub.begin()
            self._hastened = True
            self._asked.clear()
        sizes = self._store.superblock_sizes()
        read = self._store.compaction.step()
        for number in sizes.keys() - self._store.superblock_sizes().keys():
            self._compacted += 1
            self._compacted_bytes += sizes[number]
            read = max(read, 1)  # that, too, is something to tell
        return read + scrub.step(seconds, hurry=self._hastened)
