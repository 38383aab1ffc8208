"""The scrub: reads everything the store holds, in the order of the keys, once in a period, and checks it.

It decides how fast: what is verified of a round may not lag behind the share of the period that has passed.
Time is counted while the node runs only; a clock that jumps makes no difference. A piece that moves while a
round is under way keeps its key, so the round still meets it; one that is stored behind the round's place is
met by the next round.

Where the scrub is lies in the index, under "c":

     0   8  seconds of the round so far, IEEE 754
     8   8  bytes of payload verified in the round
    16   8  rounds completed
    24   1  1 while the pieces are read, 2 while the tombstones are
    25  82  packed key of the last that was read; absent before the first

What a crash leaves: an older place. Then some pieces are read twice.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from vstack.errors import DamagedData, VstackError
from vstack.mesh.registers import PieceKey
from vstack.node.index import Index
from vstack.node.pieces import PieceNotFound, StoreFull, WriteFailed

if TYPE_CHECKING:
    from vstack.node.store import ChunkStore

log = logging.getLogger(__name__)

_PLACE = struct.Struct(">dQQB")

_STEP_BYTES = 4 << 20
_STEP_RECORDS = 200

_SAVE_EVERY = 60.0
"""Seconds of running time that a crash may take from the count."""

MOST_REMEMBERED = 200_000
"""Pieces of which the store remembers when they were verified: 32 MB."""

PIECES, TOMBSTONES, DONE = 1, 2, 3


class Place(NamedTuple):
    """How far a round is."""

    seconds: float = 0.0
    """Of running time since the round began."""
    verified: int = 0
    """Bytes of payload, in this round."""
    rounds: int = 0
    """Completed."""
    phase: int = PIECES
    key: bytes = b""
    """Packed; the last that was read in this phase."""

    def pack(self) -> bytes:
        return _PLACE.pack(*self[:4]) + self.key

    @classmethod
    def unpack(cls, raw: bytes) -> Place:
        return cls._make((*_PLACE.unpack_from(raw), raw[_PLACE.size :]))


class ScrubReport(NamedTuple):
    """What the scrub has seen since the node started."""

    pieces: int
    bytes: int
    damaged: int
    """Pieces found damaged, now in quarantine, and tombstones, now written anew."""
    errors: int
    """Reads that failed: not damage, tried again in the next round."""


def is_due(place: Place, total: int, period: float) -> bool:
    """Whether the round lags behind the share of the period that has passed, with `total` bytes to verify."""
    if place.phase == DONE:
        return place.seconds >= period
    return place.seconds >= period or place.verified * period <= place.seconds * total


class Verified:
    """When pieces were last written, or read whole and found good. In memory; thread-safe.

    Of more than `most`, those are forgotten whose last time is longest ago: then they count as never
    verified, and are read once more. They go by the sequence numbers of their records: a piece that was
    written anew has another one, and one that compaction has moved keeps its own, because it was read and
    compared with its hash on the way.
    """

    def __init__(self, most: int = MOST_REMEMBERED, now: Callable[[], float] = monotonic) -> None:
        self._most = most
        self._now = now
        self._lock = threading.Lock()
        self._times: OrderedDict[int, float] = OrderedDict()
        """Longest ago first."""

    def note(self, sequence: int) -> None:
        """It was written or verified just now."""
        with self._lock:
            self._times[sequence] = self._now()
            self._times.move_to_end(sequence)
            if len(self._times) > self._most:
                self._times.popitem(last=False)

    def is_within(self, sequence: int, seconds: float) -> bool:
        """Whether that was less than `seconds` ago."""
        with self._lock:
            at = self._times.get(sequence)
        return at is not None and self._now() - at < seconds


class Scrub:
    """One thread at a time."""

    def __init__(self, store: ChunkStore, index: Index, period: float) -> None:
        """`period`: seconds of running time in which everything is to be read once."""
        self.report = ScrubReport(0, 0, 0, 0)
        self._store = store
        self._index = index
        self._period = period
        self._unsaved = 0.0
        saved = index.scrub_place()
        self.place = Place() if saved is None else Place.unpack(saved)

    def begin(self) -> None:
        """A new round, from the beginning: what is left of the one under way is given up."""
        self.place = Place(rounds=self.place.rounds)

    def step(self, seconds: float, *, hurry: bool = False) -> int:
        """Verifies a little if the round is behind, or to `hurry`; the bytes that it read, 0 if neither.

        `seconds` is the running time since the last step. Raises IndexDamaged, IndexWriteFailed.
        """
        self.place = self.place._replace(seconds=self.place.seconds + seconds)
        read = self.run() if hurry or is_due(self.place, self._total(), self._period) else 0
        self._unsaved += seconds
        if read or self._unsaved >= _SAVE_EVERY:
            self._index.save_scrub_place(self.place.pack())
            self._unsaved = 0.0
        return read

    def run(self) -> int:
        """The next pieces or tombstones, due or not; the bytes that were read, at least 1."""
        match self.place.phase:
            case 1:
                return self._pieces()
            case 2:
                return self._tombstones()
            case _:
                self.begin()
                return 1

    def share(self) -> float:
        """Of the round that is done, 0 to 1."""
        total = self._total()
        return min(1.0, self.place.verified / total) if self.place.phase == PIECES and total else 1.0

    def seconds_left(self, rate: float, *, hurry: bool = False) -> float:
        """An estimate for the round: it takes the period, or, if it hurries, goes on as it did so far, and to
        begin with reads `rate` bytes a second."""
        seconds, verified = self.place.seconds, self.place.verified
        if self.place.phase == DONE:
            return 0.0
        if not hurry:
            return max(0.0, self._period - seconds)
        left = max(0, self._total() - verified)
        return left * seconds / verified if verified and seconds else left / rate

    def _total(self) -> int:
        """Bytes of payload that a round verifies."""
        return sum(state.payload_bytes for state in self._index.superblocks.values())

    def _pieces(self) -> int:
        read = 1
        page = list(itertools.islice(self._index.pieces(b"", self.place.key), _STEP_RECORDS))
        for key, row in page:
            self._verify(PieceKey.unpack(key), row.length)
            read += row.length
            self.place = self.place._replace(key=key, verified=self.place.verified + row.length)
            if read >= _STEP_BYTES:
                return read
        if len(page) < _STEP_RECORDS:
            self.place = self.place._replace(phase=TOMBSTONES, key=b"")
        return read

    def _tombstones(self) -> int:
        page = list(itertools.islice(self._index.tombstones(self.place.key), _STEP_RECORDS))
        for key, _ in page:
            try:
                if not self._store.check_tombstone(key):
                    self.report = self.report._replace(damaged=self.report.damaged + 1)
            except (OSError, StoreFull, WriteFailed) as error:
                self._note_error(error)
            self.place = self.place._replace(key=key)
        if len(page) < _STEP_RECORDS:
            self.place = self.place._replace(phase=DONE, key=b"", rounds=self.place.rounds + 1)
        return 1

    def _verify(self, key: PieceKey, length: int) -> None:
        seen = self.report
        try:
            self._store.verify(key)
        except DamagedData:
            self.report = seen._replace(damaged=seen.damaged + 1)
        except PieceNotFound:  # deleted since the page was read
            pass
        except OSError as error:
            self._note_error(error)
        else:
            self.report = seen._replace(pieces=seen.pieces + 1, bytes=seen.bytes + length)

    def _note_error(self, error: OSError | VstackError) -> None:
        log.error("the scrub could not read or mend: %s", error)
        self.report = self.report._replace(errors=self.report.errors + 1)
