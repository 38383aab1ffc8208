"""Counting views: what this node has taken note of, and how it comes into the registers.

The register `views/<video>/<day>` has a slot for each (NodeId, boot) that counted views of that
video (CHUNKPAXOS, *Views*). A slot is raised by its own process alone, to a number, by
compare-and-swap: a change whose outcome is unknown is simply made again. A node notes views in
memory and writes them in batches:

    IDLE --PERIOD after the first view, or BATCH views--> READ --found--> RAISE --Ok--> forgotten
                                                           |               ^  \\--Mismatch--> RAISE
                                                           +-absent-> CHECK
    any Unknown --> IDLE, and from there again after PERIOD

What the slot held when it was first read is the base; views noted since are added to that. A count
is forgotten only when a quorum is known to hold all of it, so that the next read finds no less, and
nothing of this node is still on its way: a view is written at most once. What was noted and not
written when the process ended is lost. CHECK asks whether there is such a video at all, so that
nobody fills the mesh with registers for videos that it does not have.

Pure: events and the time in, operations out. Nothing here is durable, and nothing needs to be.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import count
from random import Random

import msgspec

from vstack.mesh.config import NodeId, View
from vstack.mesh.messages import Found, Mismatch, Ok, Op, Outcome
from vstack.mesh.registers import RecordTooLarge, Slot, ViewRecord, pack, unpack_views, video_key, views_key

PERIOD = 5.0
"""Seconds from a view to the write that carries it, and between two tries."""
BATCH = 100
"""Views of one video that are written without waiting for the period to end."""
WINDOW = 128
"""Registers that are being written at once."""
MAX_KEYS = 10_000
"""Videos and days with views that are not written yet."""
MAX_PLAYBACKS = 20_000
"""Playbacks that are remembered: one of them that is told again does not count again."""
MAX_OLD_BOOTS = 4
"""Slots of ended processes of this node, above which they become one."""


class Step(Enum):
    IDLE = "idle"
    READ = "read"
    CHECK = "check"
    RAISE = "raise"


@dataclass(slots=True, eq=False)
class Unwritten:
    """Views of one video on one day, from the first one noted until all are known to be written."""

    video: str
    key: str
    due: float
    """When the next write begins, while IDLE."""
    step: Step = Step.IDLE
    noted: int = 0
    written: int = 0
    """Of those noted, how many are known to be in the register."""
    tried: int = 0
    """Of those noted, how many there were when the last write began."""
    raising: int = 0
    """Of those noted, how many the change under way brings into the register."""
    base: int | None = None
    """What the slot held before; None until it was read."""
    version: int = 0
    """Of the register, when it was last read."""
    exists: bool = False
    """Whether it is known that there is such a video."""


class Views:
    """See above. The caller submits what `take` returns and hands each outcome to `on_outcome`."""

    def __init__(self, node: NodeId, boot: int, view: View, rng: Random) -> None:
        self.counters: Counter[str] = Counter(counted=0, written=0, repeated=0, dropped=0)
        self._node = bytes.fromhex(node)
        self._boot = boot
        self._view = view
        self._rng = rng
        self._counts: dict[str, Unwritten] = {}
        self._playbacks: OrderedDict[bytes, None] = OrderedDict()
        self._wakes: list[tuple[float, int, str]] = []
        self._order = count()
        self._writing = 0
        self._ready: list[tuple[str, Op]] = []

    @property
    def unwritten(self) -> int:
        """Views that would be lost if the process ended now."""
        return sum(c.noted - c.written for c in self._counts.values())

    def note(self, video: str, playback: bytes, day: int, now: float) -> bool:
        """Counts a playback, unless it was counted here before. False: there is no room for it."""
        if playback in self._playbacks:
            self.counters["repeated"] += 1
            return True
        key = views_key(video, day)
        c = self._counts.get(key)
        if c is None:
            if len(self._counts) >= MAX_KEYS:
                return False
            c = self._counts[key] = Unwritten(video, key, 0.0)
            self._wake(c, now + PERIOD)
        self._playbacks[playback] = None
        if len(self._playbacks) > MAX_PLAYBACKS:
            self._playbacks.popitem(last=False)
        c.noted += 1
        self.counters["counted"] += 1
        if c.step is Step.IDLE and c.noted - c.tried >= BATCH and c.due > now:
            self._wake(c, now)
        return True

    def tick(self, now: float) -> None:
        """Begins the writes that are due."""
        while self._wakes and self._wakes[0][0] <= now and self._writing < WINDOW:
            when, _, key = heapq.heappop(self._wakes)
            c = self._counts.get(key)
            if c is not None and c.step is Step.IDLE and c.due == when:
                self._writing += 1
                c.tried = c.noted
                c.step = Step.READ
                self._submit(c, key)

    def hurry(self, now: float) -> None:
        """The process is to end: whatever waits is due."""
        for c in self._counts.values():
            if c.step is Step.IDLE and c.due > now:
                self._wake(c, now)

    def take(self) -> list[tuple[str, Op]]:
        """What is to be submitted: each with the key to give to `on_outcome`."""
        ready, self._ready = self._ready, []
        return ready

    def on_outcome(self, key: str, outcome: Outcome, now: float) -> None:
        """What became of an operation that `take` returned with `key`."""
        c = self._counts[key]
        if c.step is Step.CHECK and isinstance(outcome, Found):
            c.exists = True
            if outcome.data is None:
                self._forget(c)
            else:
                self._raise(c, ViewRecord())
        elif isinstance(outcome, Found | Mismatch):
            c.version = outcome.version
            self._on_value(c, outcome.data)
        elif isinstance(outcome, Ok):
            self._wrote(c, c.raising)
            if c.written == c.noted:
                self._forget(c)
            else:
                self._rest(c, now + (0.0 if c.noted - c.tried >= BATCH else PERIOD))
        else:
            self._rest(c, now + PERIOD)

    def _on_value(self, c: Unwritten, data: bytes | None) -> None:
        try:
            record = ViewRecord() if data is None else unpack_views(data)
        except msgspec.DecodeError:  # a newer version's: not ours to change
            self._forget(c)
            return
        slot = record.of(self._node, self._boot)
        if c.base is None:
            c.base = slot
        self._wrote(c, slot - c.base)
        if c.written == c.noted:
            self._forget(c)
        elif data is None and not c.exists:
            c.step = Step.CHECK
            self._submit(c, video_key(c.video))
        else:
            self._raise(c, record)

    def _raise(self, c: Unwritten, record: ViewRecord) -> None:
        assert c.base is not None
        try:
            data = packed(raised(record, self._node, self._boot, c.base + c.noted))
        except RecordTooLarge:
            self._forget(c)
            return
        c.step = Step.RAISE
        c.raising = c.noted
        self._submit(c, c.key, c.version, data)

    def _submit(self, c: Unwritten, key: str, expect: int | None = None, data: bytes | None = None) -> None:
        self._ready.append((c.key, Op(self._rng.randbytes(16), key, self._view.epoch, expect, data)))

    def _wrote(self, c: Unwritten, views: int) -> None:
        more = max(0, min(views, c.noted) - c.written)
        c.written += more
        self.counters["written"] += more

    def _wake(self, c: Unwritten, when: float) -> None:
        c.due = when
        heapq.heappush(self._wakes, (when, next(self._order), c.key))

    def _rest(self, c: Unwritten, until: float) -> None:
        self._writing -= 1
        c.step = Step.IDLE
        self._wake(c, until)

    def _forget(self, c: Unwritten) -> None:
        """All of it is written, or can never be."""
        self._writing -= 1
        self.counters["dropped"] += c.noted - c.written
        del self._counts[c.key]


def raised(record: ViewRecord, node: bytes, boot: int, views: int) -> ViewRecord:
    """The record with the slot of (node, boot) at `views`; older boots of the node become one if many."""
    slots = {(s.node, s.boot): s.views for s in record.slots}
    slots[node, boot] = views
    if sum(n == node and 0 < b < boot for n, b in slots) > MAX_OLD_BOOTS:
        slots = _folded(slots, {node})
    return _record(slots)


def packed(record: ViewRecord) -> bytes:
    """As `registers.pack`; if it does not fit as it is, then with one slot for all that has ended.

    Raises RecordTooLarge if that does not fit either.
    """
    try:
        return pack(record)
    except RecordTooLarge:
        slots = {(s.node, s.boot): s.views for s in record.slots}
        return pack(_record(_folded(slots, {n for n, _ in slots})))


def _folded(slots: dict[tuple[bytes, int], int], nodes: Iterable[bytes]) -> dict[tuple[bytes, int], int]:
    """Boots of `nodes` before the last one that has a slot become boot 0. Those processes have ended, and
    what they may have on its way names an older version of the register: they raise nothing any more."""
    last = {n: max(b for m, b in slots if m == n) for n in nodes}
    out: Counter[tuple[bytes, int]] = Counter()
    for (n, b), views in slots.items():
        out[n, 0 if b < last.get(n, 0) else b] += views
    return out


def _record(slots: dict[tuple[bytes, int], int]) -> ViewRecord:
    return ViewRecord(tuple(Slot(n, b, views) for (n, b), views in sorted(slots.items())))
