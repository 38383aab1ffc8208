"""Where a video is cut into chunks. Pure: fragments of the stored container in, chunks out.

A fragment is the smallest thing that can be cut off: an MP4 `moof`+`mdat`, a Matroska cluster, a
run of MPEG-TS packets from one PAT to the next. The rules (`CutRules`):

- a chunk begins on a keyframe of the track that the cuts follow, or it is *dependent*;
- whole groups of pictures are gathered until the next one would make the chunk longer than
  `max_seconds` (less for the first chunks) or larger than `max_bytes`;
- a group larger than that alone is one chunk, up to `hard_bytes`; beyond, it is split between
  fragments, and the later parts are dependent. A dependent chunk never runs into the next group,
  so that every keyframe at which a chunk could begin is in a chunk which begins on a keyframe.

Held in memory at any time: the chunk being gathered and the group being read, together less than
`max_bytes + hard_bytes` and a fragment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class CutRules:
    """The bounds of chunks. Part of what names an upload: two uploads agree only if these do."""

    max_seconds: float = 10.0
    max_bytes: int = 2 * 1024 * 1024
    hard_bytes: int = 8 * 1024 * 1024
    first: tuple[float, ...] = (2.0, 4.0)
    """Seconds that the first chunks last at most, where keyframes allow."""

    def describe(self) -> str:
        """The rules in one short line, the same for equal rules."""
        first = "+".join(f"{seconds:g}" for seconds in self.first)
        return f"{self.max_seconds:g}s/{self.max_bytes}B/{self.hard_bytes}B/first {first}"

    def seconds(self, index: int) -> float:
        """The longest that chunk `index` should last."""
        return self.first[index] if index < len(self.first) else self.max_seconds


@dataclass(frozen=True)
class Fragment:
    """The smallest piece of the stored container that can be cut off."""

    data: bytes
    key: bool
    """Whether its first packet of the track that the cuts follow is a keyframe."""
    start: int | None
    """First presentation time in ticks of that track; of the keyframe, if `key`. None: no packet of it."""


@dataclass(frozen=True)
class Cut:
    """A chunk before its duration is known: that follows from where the next one starts."""

    data: bytes
    start: int
    dependent: bool


class Cutter:
    """Gathers fragments into cuts. `tick` is the length of one tick in seconds."""

    def __init__(self, rules: CutRules, tick: Fraction) -> None:
        self._rules = rules
        self._tick = tick
        self._index = 0
        self._last_start: int | None = None
        self._chunk: list[Fragment] = []
        """Whole groups, to be cut off together."""
        self._group: list[Fragment] = []
        """The group that is still growing."""
        self._group_dependent = False

    def add(self, fragment: Fragment) -> Iterator[Cut]:
        """Take the next fragment; yield the cuts which that completes."""
        if fragment.key:
            yield from self._close_group(fragment.start)
        size = _size(self._group) + len(fragment.data)
        if self._chunk and _size(self._chunk) + size > self._rules.max_bytes:
            yield self._cut(self._chunk, False)
            self._chunk = []
        if self._group and size > self._rules.hard_bytes:
            yield self._cut(self._group, self._group_dependent)
            self._group, self._group_dependent = [], True
        self._group.append(fragment)

    def finish(self, end: int) -> Iterator[Cut]:
        """Yield what is left of a video that ends at tick `end`."""
        yield from self._close_group(end)
        if self._chunk:
            yield self._cut(self._chunk, False)
            self._chunk = []

    def _close_group(self, end: int | None) -> Iterator[Cut]:
        """The group ends where the next one starts, at tick `end` (None: that has no time)."""
        if not self._group:
            return
        if self._group_dependent:
            yield self._cut(self._group, True)
        elif self._chunk and self._too_long(end):
            yield self._cut(self._chunk, False)
            self._chunk = self._group
        else:
            self._chunk += self._group
        self._group, self._group_dependent = [], False

    def _too_long(self, end: int | None) -> bool:
        """Whether chunk and group together pass the bounds."""
        start = _start(self._chunk)
        if start is not None and end is not None:
            seconds = (end - start) * self._tick
            # A hundredth more: groups of two seconds last 2.002 s at 23.976 frames per second.
            if seconds > self._rules.seconds(self._index) * 1.01:
                return True
        return _size(self._chunk) + _size(self._group) > self._rules.max_bytes

    def _cut(self, fragments: list[Fragment], dependent: bool) -> Cut:
        start = _start(fragments)
        if self._last_start is not None and (start is None or start < self._last_start):
            start = self._last_start
        start = start or 0
        # Nothing comes before the first chunk that it could depend on, whatever it begins with.
        cut = Cut(b"".join(f.data for f in fragments), start, dependent and self._index > 0)
        self._index += 1
        self._last_start = start
        return cut


def _size(fragments: list[Fragment]) -> int:
    return sum(len(fragment.data) for fragment in fragments)


def _start(fragments: list[Fragment]) -> int | None:
    return next((fragment.start for fragment in fragments if fragment.start is not None), None)
