"""Where a muxer's output may be cut: init segment and fragments. Pure, incremental, no copies but one.

    mp4        boxes: 4 bytes size, 4 bytes type (size 1: 8 bytes of size follow).
               Init: all before the first `moof`. A fragment begins at each `moof`.
    matroska   EBML elements: id, size (both of variable length), payload. Segment (and a cluster of
               unknown size) is entered rather than skipped. Init: all before the first Cluster.
    mpegts     packets of 188 bytes. A fragment begins at each PAT (packet id 0), because FFmpeg's
               muxer writes one before each keyframe. No init: every fragment brings PAT and PMT.
    flv        9 bytes of header and 4 of tag size, then tags: type, 3 bytes size, 7 bytes of time and
               stream, payload, 4 bytes tag size. Init: header, metadata and codec headers. A
               fragment begins at each video keyframe, and where one has become long or large.

`Splitter.feed` gives back whole pieces; the first is the init segment (empty for mpegts).
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_TS_PACKET = 188


class Splitter(ABC):
    """Cuts a stream of bytes into the init segment and fragments, in order and without loss."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._scan = 0
        """Where, in the held bytes, the next unit (box, element, packet) begins."""

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes; return the pieces which that completes."""
        self._held += data
        pieces = []
        while (unit := self._unit()) is not None:
            begins, length = unit
            if begins:
                pieces.append(bytes(self._held[: self._scan]))
                del self._held[: self._scan]
                self._scan = 0
            self._scan += length
        return pieces

    def finish(self) -> bytes:
        """The last piece: all that is held."""
        rest = bytes(self._held)
        self._held.clear()
        self._scan = 0
        return rest

    @abstractmethod
    def _unit(self) -> tuple[bool, int] | None:
        """Whether the unit at `_scan` begins a fragment, and its length; None if more must be read."""


class Mp4Splitter(Splitter):
    def _unit(self) -> tuple[bool, int] | None:
        if len(self._held) < self._scan + 16:
            return None
        size, kind, large = struct.unpack_from(">I4sQ", self._held, self._scan)
        return kind == b"moof", large if size == 1 else max(size, 8)


class MatroskaSplitter(Splitter):
    def _unit(self) -> tuple[bool, int] | None:
        if len(self._held) < self._scan + 12:
            return None
        head = self._held[self._scan : self._scan + 12]
        id_length = 9 - head[0].bit_length()
        identifier = int.from_bytes(head[:id_length], "big")
        size_length = 9 - head[id_length].bit_length() if head[id_length] else 8
        field = int.from_bytes(head[id_length : id_length + size_length], "big")
        mask = (1 << 7 * size_length) - 1
        size = field & mask
        if identifier == _SEGMENT or size == mask:
            size = 0
        return identifier == _CLUSTER, id_length + size_length + size


class TsSplitter(Splitter):
    def __init__(self) -> None:
        super().__init__()
        self._packets = self._pats = 0

    def _unit(self) -> tuple[bool, int] | None:
        if len(self._held) < self._scan + 4:
            return None
        pid = int.from_bytes(self._held[self._scan + 1 : self._scan + 3], "big") & 0x1FFF
        self._packets += 1
        self._pats += pid == 0
        # The first fragment begins with the first packet: one that names the service, before the first PAT.
        return self._packets == 1 or (pid == 0 and self._pats > 1), _TS_PACKET


class FlvSplitter(Splitter):
    _HEADER, _TAG = 13, 15
    _AUDIO, _VIDEO = 8, 9
    _ALONE_MS = 1000
    _LARGE = 512 * 1024

    def __init__(self) -> None:
        super().__init__()
        self._media = False
        """Whether the first tag that is not metadata or a codec header was seen."""
        self._started_ms = 0
        self._has_video = False

    def _unit(self) -> tuple[bool, int] | None:
        if len(self._held) < self._scan + 18:
            return None
        head = self._held[self._scan : self._scan + 18]
        if head[:3] == b"FLV":
            return False, self._HEADER
        kind, size = head[0] & 0x1F, int.from_bytes(head[1:4], "big")
        time_ms = int.from_bytes(bytes([head[7]]) + head[4:7], "big")
        self._has_video |= kind == self._VIDEO
        begins = False
        if kind in (self._AUDIO, self._VIDEO) and not _is_flv_header(kind, head[11], head[12]):
            key = kind == self._VIDEO and (head[11] >> 4) & 7 == 1
            alone = not self._has_video and time_ms - self._started_ms >= self._ALONE_MS
            begins = key or alone or self._scan >= self._LARGE or not self._media
            self._media = True
            if begins:
                self._started_ms = time_ms
        return begins, self._TAG + size


def _is_flv_header(kind: int, first: int, second: int) -> bool:
    """Whether a tag carries a codec's configuration, or, in the extended header, ends or describes one."""
    if kind == FlvSplitter._VIDEO:
        return first & 0x0F in (0, 4, 5) if first & 0x80 else first & 0x0F == 7 and second == 0
    return first & 0x0F in (0, 4, 5) if first >> 4 == 9 else first >> 4 == 10 and second == 0
