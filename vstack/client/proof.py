"""The proof of ingest: that two sequences of packets are the same, track by track, in order.

Compared for each packet: payload (by length and SHA-256), presentation time, keyframe flag; decode
time and duration where the source's container stores them (`stored_fields`). Times are compared as
exact rationals, though their units may differ: each is scaled by an integer to a common unit.

A track may lie off by one constant, which is recorded (`Track.offset`) and taken back on output.

`Proof` runs along: what one side has and the other not yet is held as fingerprints of some 100
bytes, so memory follows how far the sides are apart and not how long the video is.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from vstack.client.containers import codec_name, is_real, open_input, time_base, tracks_of


class Fields(NamedTuple):
    """Which times, besides the presentation time, a container stores for a track."""

    dts: bool
    duration: bool


def stored_fields(format_names: str, kind: str) -> Fields:
    """What FFmpeg's demuxer `format_names` reads for a track of `kind` rather than works out for itself."""
    names = format_names.split(",")
    if "mov" in names:
        return Fields(dts=True, duration=True)
    if "matroska" in names:
        return Fields(dts=False, duration=kind == "subtitle")
    return Fields(dts="ogg" not in names, duration=False)


class Print(NamedTuple):
    """Fingerprint of a packet; times in ticks of its track."""

    pts: int | None
    dts: int | None
    duration: int
    key: bool
    size: int
    digest: bytes


def fingerprint(packet: Packet[Stream]) -> Print:
    return Print(
        packet.pts,
        packet.dts,
        packet.duration or 0,
        packet.is_keyframe,
        packet.size,
        hashlib.sha256(packet).digest(),
    )


class TrackProof:
    """One track of the source against the same track of the copy."""

    def __init__(self, name: str, source_base: Fraction, fields: Fields) -> None:
        self.name = name
        self.fields = fields
        self.copy_base = Fraction(1)
        """Length of the copy's ticks in seconds, once `against` was called."""
        self.equal = 0
        """Packets that were the same."""
        self.unequal = 0
        """Packets that were not, those that have no partner included (after `finish`)."""
        self.first_difference = ""
        """The first one, in words."""
        self._source_base = source_base
        self._source_scale = self._copy_scale = 1
        self._offset: int | None = None
        """Copy minus source, in 1/unit seconds; of the first packet, and so of all."""
        self._source: deque[Print] = deque()
        self._copy: deque[Print] = deque()

    def against(self, copy_base: Fraction) -> None:
        """Say what the copy's ticks are, before its first packet."""
        unit = math.lcm(self._source_base.denominator, copy_base.denominator)
        self.copy_base = copy_base
        self._source_scale = int(self._source_base * unit)
        self._copy_scale = int(copy_base * unit)

    @property
    def offset(self) -> Fraction:
        """Ticks of the copy's time base by which its times lie above the source's."""
        return Fraction(self._offset or 0, self._copy_scale)

    @property
    def waiting(self) -> int:
        """Packets of the source that the copy has not shown yet."""
        return len(self._source)

    def source(self, packet: Print) -> None:
        self._source.append(packet)
        self._compare()

    def copy(self, packet: Print) -> None:
        self._copy.append(packet)
        self._compare()

    def finish(self) -> None:
        """Both sides have ended: what is left over on one of them is a difference."""
        for side, other, left in (("source", "copy", self._source), ("copy", "source", self._copy)):
            if left:
                self._differs(f"the {side} has {len(left)} packets more than the {other}", len(left))
                left.clear()

    def _compare(self) -> None:
        while self._source and self._copy:
            difference = self._difference(self._source.popleft(), self._copy.popleft())
            if difference:
                self._differs(difference, 1)
            else:
                self.equal += 1

    def _difference(self, a: Print, b: Print) -> str:
        if (a.size, a.digest) != (b.size, b.digest):
            return f"payload of {a.size} bytes against {b.size}"
        if a.key != b.key:
            return f"keyframe {a.key} against {b.key}"
        if self._offset is None and a.pts is not None and b.pts is not None:
            self._offset = b.pts * self._copy_scale - a.pts * self._source_scale
        if not self._same(a.pts, b.pts):
            return f"presentation time {a.pts} against {b.pts}"
        if self.fields.dts and not self._same(a.dts, b.dts):
            return f"decode time {a.dts} against {b.dts}"
        if self.fields.duration and a.duration * self._source_scale != b.duration * self._copy_scale:
            return f"duration {a.duration} against {b.duration}"
        return ""

    def _same(self, a: int | None, b: int | None) -> bool:
        if a is None or b is None:
            return a is b
        return b * self._copy_scale - a * self._source_scale == (self._offset or 0)

    def _differs(self, difference: str, packets: int) -> None:
        if not self.first_difference:
            self.first_difference = f"{self.name}, packet {self.equal + self.unequal}: {difference}"
        self.unequal += packets


class Proof:
    """All tracks of a source against its stored form, in the order of `tracks_of`."""

    def __init__(self, source: InputContainer) -> None:
        self.tracks = [
            TrackProof(
                f"{track.type} track {track.index} ({codec_name(track)})",
                time_base(track),
                stored_fields(source.format.name, track.type),
            )
            for track in tracks_of(source)
        ]
        self._difference = ""

    def against(self, copy: InputContainer) -> None:
        """Say what the copy is, before its first packet."""
        theirs = tracks_of(copy, len(self.tracks))
        for ours, other in zip(self.tracks, theirs, strict=False):
            ours.against(time_base(other))
        if len(self.tracks) != len(theirs):
            self._difference = f"{len(self.tracks)} tracks against {len(theirs)}"

    @property
    def difference(self) -> str:
        """The first difference so far, in words; empty if none."""
        return self._difference or next((t.first_difference for t in self.tracks if t.first_difference), "")

    def finish(self) -> None:
        """Both sides have ended."""
        for track in self.tracks:
            track.finish()


class TrackCount(NamedTuple):
    """What `compare_files` found in one track."""

    name: str
    equal: int
    unequal: int
    offset_seconds: Fraction
    first_difference: str


@dataclass(frozen=True)
class Comparison:
    """Packet by packet: a file and its copy."""

    tracks: tuple[TrackCount, ...]
    difference: str
    """The first difference in words; empty if the files are equal."""

    @property
    def equal(self) -> bool:
        """Every packet of every track is the same, at the same time."""
        return not self.difference and all(t.unequal == 0 and t.offset_seconds == 0 for t in self.tracks)

    @property
    def packets(self) -> int:
        return sum(track.equal + track.unequal for track in self.tracks)


def compare_files(source: Path | str | BinaryIO, copy: Path | str | BinaryIO) -> Comparison:
    """Demux both and compare all packets, with what the source's container stores as the measure.

    Reads both in step, so memory stays small as long as their tracks are interleaved alike.
    Raises av.error.FFmpegError or OSError if one cannot be read.
    """
    with open_input(_path(source)) as a, open_input(_path(copy)) as b:
        proof = Proof(a)
        proof.against(b)
        left, right = _prints(a, tracks_of(a)), _prints(b, tracks_of(b))
        read_left = read_right = 0
        ended = [False, False]
        while not all(ended):
            behind = ended[0] or (not ended[1] and read_right < read_left)
            item = next(right if behind else left, None)
            if item is None:
                ended[behind] = True
                continue
            track, packet = item
            if behind:
                read_right += packet.size
            else:
                read_left += packet.size
            if track < len(proof.tracks):
                side = proof.tracks[track].copy if behind else proof.tracks[track].source
                side(packet)
        proof.finish()
        counts = tuple(
            TrackCount(t.name, t.equal, t.unequal, t.offset * t.copy_base, t.first_difference)
            for t in proof.tracks
        )
        return Comparison(counts, proof.difference)


def _path(file: Path | str | BinaryIO) -> Path | BinaryIO:
    return Path(file) if isinstance(file, str) else file


def _prints(container: InputContainer, tracks: Sequence[Stream]) -> Iterator[tuple[int, Print]]:
    numbers = {track.index: number for number, track in enumerate(tracks)}
    for packet in container.demux(*tracks):
        if is_real(packet):
            yield numbers[packet.stream_index], fingerprint(packet)
