"""The threads that touch pieces: a writer, which commits in groups, a few readers, one that takes stock of
what is there (inventories, usage) when nobody waits to read, and the upkeep.

The reactor hands requests in and takes finished ones out; nothing here touches a socket. While
the writer waits for the disk, whatever arrives gathers, and the next commit takes all of it: group
commit falls out of one thread and one queue. A request whose deadline has passed is dropped. Taking stock
may mean to read much: before each piece it waits for those who read, but for a while only, so that under
constant load it still gets somewhere.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vstack.errors import DamagedData, VstackError
from vstack.mesh.messages import (
    Body,
    Failure,
    GetInventory,
    GetPiece,
    GetUsage,
    Held,
    Inventory,
    PieceData,
    PutPiece,
    Stored,
    Usage,
    WirePieceKey,
)
from vstack.mesh.registers import Generation, PieceKey, UploadId
from vstack.mesh.sockets import Wakeup
from vstack.mesh.transport import Incoming
from vstack.node.store import ChunkStore, Piece, PieceNotFound, Purpose, PutResult, StoreFull
from vstack.node.upkeep import Upkeep, UpkeepStats

log = logging.getLogger(__name__)

BATCH_BYTES = 32 << 20
"""Payload that one commit takes at most; the rest waits for the next."""
YIELD = 0.25
"""Seconds that an inventory waits for readers, at most, before it reads its next piece."""
_LOOK = 0.005


class Done(NamedTuple):
    """A finished request and its answer."""

    request: Incoming
    body: Body
    payload: bytes | memoryview = b""


def piece_key(key: WirePieceKey) -> PieceKey:
    return PieceKey(key.video, UploadId(*key.upload), key.chunk, key.piece, Generation(*key.generation))


class PieceWorkers:
    """Bounded by the transport: a connection has only so many requests and bytes in flight."""

    def __init__(self, store: ChunkStore, wakeup: Wakeup, now: Callable[[], float], readers: int = 2) -> None:
        self._store = store
        self._wakeup = wakeup
        self._now = now
        self._puts: deque[Incoming] = deque()
        self._gets: deque[Incoming] = deque()
        self._surveys: deque[Incoming] = deque()
        self._lock = threading.Lock()
        """Of the queues. Each has a condition of its own: news of a put would wake readers in vain."""
        self._to_put = threading.Condition(self._lock)
        self._to_get = threading.Condition(self._lock)
        self._to_survey = threading.Condition(self._lock)
        self._done: deque[Done] = deque()
        self._closing = False
        self.figures = store.stats()
        """As they were after the last change: asking the store itself would wait for its fsync."""
        self._threads = [
            threading.Thread(target=self._write_loop, name="writer", daemon=True),
            threading.Thread(target=self._survey_loop, name="surveyor", daemon=True),
        ]
        self._threads += [
            threading.Thread(target=self._read_loop, name=f"reader-{i}", daemon=True) for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()
        self._upkeep = Upkeep(store, self._is_busy, self.refresh)

    def submit(self, request: Incoming) -> None:
        """Takes a PutPiece, GetPiece, GetInventory or GetUsage request."""
        match request.body:
            case PutPiece():
                queue, news = self._puts, self._to_put
            case GetPiece():
                queue, news = self._gets, self._to_get
            case _:
                queue, news = self._surveys, self._to_survey
        with self._lock:
            queue.append(request)
            news.notify()

    def hasten_scrub(self) -> None:
        """As `Upkeep.hasten_scrub`."""
        self._upkeep.hasten_scrub()

    def refresh(self) -> None:
        """Takes the store's figures anew. From any thread; may wait for a commit."""
        self.figures = self._store.stats()

    def upkeep_figures(self) -> UpkeepStats:
        """As `Upkeep.figures`."""
        return self._upkeep.figures()

    def take_done(self) -> list[Done]:
        """What has finished since the last call."""
        done: list[Done] = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def close(self) -> None:
        """Finishes what was begun; what only waits is dropped without an answer."""
        with self._lock:
            self._closing = True
            for news in (self._to_put, self._to_get, self._to_survey):
                news.notify_all()
        for thread in self._threads:
            thread.join()
        self._upkeep.close()

    def _is_busy(self) -> bool:
        return bool(self._puts or self._gets)

    # -- threads ----------------------------------------------------------------------------------

    def _next(self, queue: deque[Incoming], news: threading.Condition, most_bytes: int) -> list[Incoming]:
        """Blocks for work; empty when closing."""
        with self._lock:
            while not queue and not self._closing:
                news.wait()
            if self._closing:
                return []
            batch = [queue.popleft()]
            size = len(batch[0].payload)
            while queue and most_bytes and size + len(queue[0].payload) <= most_bytes:
                size += len(queue[0].payload)
                batch.append(queue.popleft())
        return batch

    def _finish(self, request: Incoming, body: Body, payload: bytes | memoryview = b"") -> None:
        self._done.append(Done(request, body, payload))
        self._wakeup.set()

    def _in_time(self, batch: list[Incoming]) -> list[Incoming]:
        now = self._now()
        for request in batch:
            if request.deadline < now:
                self._finish(request, LATE)
        return [r for r in batch if r.deadline >= now]

    def _write_loop(self) -> None:
        while batch := self._next(self._puts, self._to_put, BATCH_BYTES):
            batch = self._in_time(batch)
            pieces: dict[str, dict[int, Piece]] = {}
            for i, request in enumerate(batch):
                m = request.body
                assert isinstance(m, PutPiece)
                piece = Piece(piece_key(m.key), m.k, m.m, m.chunk_length, m.sha256, request.payload)
                pieces.setdefault(m.purpose, {})[i] = piece
            results: dict[int, PutResult] = {}
            try:
                for purpose, some in pieces.items():
                    told = self._store.put(list(some.values()), purpose=Purpose(purpose))
                    results |= zip(some, told, strict=True)
            except Exception as e:
                log.exception("a batch of %d pieces was not stored", len(batch))
                for request in batch:
                    self._finish(request, failure(e))
                continue
            self.refresh()
            for i, request in enumerate(batch):
                result = results[i]
                if result.error is not None:
                    self._finish(request, failure(result.error))
                else:
                    self._finish(request, Stored(present=result.outcome == "present"))

    def _read_loop(self) -> None:
        while batch := self._next(self._gets, self._to_get, 0):
            for request in self._in_time(batch):
                m = request.body
                assert isinstance(m, GetPiece)
                try:
                    found = self._store.read(piece_key(m.key), m.offset, m.length)
                except (VstackError, OSError) as e:
                    self._finish(request, failure(e))
                    if isinstance(e, DamagedData):
                        self.refresh()
                except Exception as e:  # one bad read must not end the thread
                    log.exception("a read failed")
                    self._finish(request, failure(e))
                else:
                    self._finish(request, PieceData(found.info.length), found.payload)

    def _survey_loop(self) -> None:
        while batch := self._next(self._surveys, self._to_survey, 0):
            for request in self._in_time(batch):
                m = request.body
                try:
                    if isinstance(m, GetUsage):
                        rows, after = self._store.usage(m.after)
                        self._finish(request, Usage(tuple(rows), after))
                    else:
                        assert isinstance(m, GetInventory)
                        self._take_inventory(request, m)
                except (VstackError, OSError) as e:
                    self._finish(request, failure(e))
                except Exception as e:  # as in _read_loop
                    log.exception("an inventory failed")
                    self._finish(request, failure(e))

    def _take_inventory(self, request: Incoming, m: GetInventory) -> None:
        """Raises VstackError, OSError."""
        verify = m.verified_within is not None
        held = []
        for key in m.keys:
            if verify:
                self._let_readers_go_first()
                if self._closing:
                    return
                if request.deadline < self._now():
                    self._finish(request, LATE)
                    return
            (found,) = self._store.inventory([piece_key(key)], verify=verify, within=m.verified_within or 0)
            held.append(Held(found.state, found.sha256))
            if verify and found.state == "quarantined":
                self.refresh()
        self._finish(request, Inventory(tuple(held)))

    def _let_readers_go_first(self) -> None:
        until = self._now() + YIELD
        with self._lock:
            while self._gets and not self._closing and self._now() < until:
                self._to_survey.wait(_LOOK)


LATE = Failure("late", "the request's time was over before it was its turn")


def failure(e: Exception) -> Failure:
    """How an error of the store looks on the wire."""
    code = (
        "not-found" if isinstance(e, PieceNotFound)
        else "full" if isinstance(e, StoreFull)
        else "damaged" if isinstance(e, DamagedData)
        else "io" if isinstance(e, OSError)
        else "refused"
    )  # fmt: skip
    return Failure(code, str(e)[:1000])
