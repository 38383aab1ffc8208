"""One pass of a source through one muxer and the proof: fragments come out, proved.

The stored side pulls: a demuxer reads the output (`Feed`), which draws packets from the source,
muxes them, and splits what the muxer wrote. Nothing runs ahead, and there is no thread. What the
demuxer reads are the very pieces that become init segment and chunks.

A fragment is given out when a later packet of the lead track (whose keyframes are the cuts) was
demuxed, for only then is known with what it begins and when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from vstack.client.containers import (
    Muxer,
    codec_name,
    copy_tracks,
    differences,
    format_name,
    is_real,
    lead_track,
    movie_timescale,
    open_input,
    open_output,
    streams_by_now,
    time_base,
    tracks_of,
)
from vstack.client.cuts import Fragment
from vstack.client.feed import Feed, Sink
from vstack.client.probe import AS_IT_IS, head_of, open_source
from vstack.client.proof import Proof, fingerprint
from vstack.errors import BadInput
from vstack.mesh.registers import Track

TRIAL_SECONDS = 12
TRIAL_PACKETS = 1500
TRIAL_BYTES = 16 * 1024 * 1024
"""How much of the beginning decides whether a container will do: whichever comes first."""

_SHORT_PACKET_IS_DAMAGE = {"mov", "matroska", "avi", "flv"}
"""Demuxers which know the length of a packet beforehand and mark one that the file ends in."""


class ProofFailed(BadInput):
    """What would be stored is not the source's video, packet by packet."""


@dataclass
class _Piece:
    """A fragment that was muxed and waits to be understood."""

    begin: int
    """Offset in the stored form."""
    data: bytes
    seen: bool = False
    """Whether a packet of the lead track that begins in it was demuxed."""
    key: bool = False
    start: int | None = None

    @property
    def end(self) -> int:
        return self.begin + len(self.data)

    def fragment(self) -> Fragment:
        return Fragment(self.data, self.key, self.start)


class _Span:
    """How many seconds of a source were read, by the clock of its first track."""

    def __init__(self) -> None:
        self._track = -1
        self._first = self._last = 0
        self._tick = 0.0

    def add(self, packet: Packet[Stream]) -> None:
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            return
        if self._track < 0:
            self._track, self._first = packet.stream_index, stamp
            self._tick = float(packet.time_base)
        if packet.stream_index == self._track:
            self._last = stamp

    @property
    def seconds(self) -> float:
        return (self._last - self._first) * self._tick


class Remux:
    """Use once: read `fragments` to the end. `clock` and `init` hold from the first fragment on."""

    def __init__(self, path: Path, muxer: Muxer, *, salvage: bool = False, trial: bool = False) -> None:
        """`path` was accepted by `open_source` before. `salvage` ends quietly where it breaks off.

        `trial` stops after the beginning of the source, as if it ended there.
        """
        self._path = path
        self._muxer = muxer
        self._salvage = salvage
        self._trial = trial
        self._pieces: deque[_Piece] = deque()
        self.init = b""
        """All that comes before the first fragment."""
        self.lost: tuple[str, ...] = ()
        """What the stored form lacks, besides packets."""
        self.tracks: tuple[Track, ...] = ()
        """Complete at the end."""
        self.clock = Fraction(1)
        """Seconds in a tick of the lead track, as stored."""
        self.source_format = ""
        self.end = 0
        """Tick of `clock` at which the last picture or sound ends."""
        self.progress = 0
        """Bytes of the source read."""

    def fragments(self) -> Iterator[Fragment]:
        """Raises ProofFailed, or BadInput if the source cannot be read or breaks off."""
        with ExitStack() as stack:
            source = stack.enter_context(open_source(self._path, check_length=False))
            self.source_format = format_name(source, head_of(self._path))
            proof = Proof(source)
            output = self._output(source, proof)
            stack.callback(output.close)
            feed = Feed(output)
            try:
                stored = stack.enter_context(open_input(feed, self._muxer.demuxer))
                proof.against(stored)
                if proof.difference:
                    raise ProofFailed(proof.difference)
                yield from self._prove(stored, proof)
            except (av.error.FFmpegError, OSError) as error:
                feed.check()
                raise ProofFailed(f"{self._muxer.name} output cannot be read ({error.strerror})") from error
            feed.check()
            proof.finish()
            if proof.difference:
                raise ProofFailed(proof.difference)
            self.lost = differences(source, stored)
            self.tracks = _tracks(source, stored, proof)
            yield from self._give(math.inf)

    def _output(self, source: InputContainer, proof: Proof) -> Generator[bytes, None, None]:
        """The stored form piece by piece: the init segment, then fragments."""
        numbers = {track.index: number for number, track in enumerate(tracks_of(source))}
        sink = Sink()
        splitter = self._muxer.splitter()
        has_video = any(track.type == "video" for track in tracks_of(source))
        options = {**self._muxer.options, **({} if has_video else self._muxer.audio_options)}
        if self._muxer.container == "mp4":
            options["movie_timescale"] = str(movie_timescale(source))
        written = 0
        out = open_output(sink, self._muxer.name, options)
        try:
            streams = copy_tracks(source, out, attachments=self._muxer.keeps_attachments)
            for packet in self._packets(source):
                number = numbers[packet.stream_index]
                proof.tracks[number].source(fingerprint(packet))
                packet.stream = streams[number]
                out.mux_one(packet)
                for data in splitter.feed(sink.take()):
                    yield self._note(data, written)
                    written += len(data)
            out.close()
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ProofFailed(f"the {self._muxer.name} container refuses this video ({reason})") from error
        finally:
            with suppress(av.error.FFmpegError, ValueError):
                out.close()
        for data in [*splitter.feed(sink.take()), splitter.finish()]:
            yield self._note(data, written)
            written += len(data)

    def _note(self, data: bytes, begin: int) -> bytes:
        if begin == 0 and not self._pieces and not self.init and self._muxer.has_init:
            self.init = data
        elif data:
            self._pieces.append(_Piece(begin, data))
        return data

    def _packets(self, source: InputContainer) -> Iterator[Packet[Stream]]:
        """The source's packets in its order; in a trial, those of the beginning."""
        marks_damage = bool(_SHORT_PACKET_IS_DAMAGE & set(source.format.name.split(",")))
        span = _Span()
        count = size = 0
        damage = ""
        try:
            for packet in source.demux(*tracks_of(source)):
                if not is_real(packet):
                    continue
                if packet.is_corrupt and marks_damage:
                    damage = "the file ends in the middle of a packet"
                    break
                if packet.pts is None and packet.dts is None:
                    raise ProofFailed("a packet without a time: a raw stream cannot be cut")
                span.add(packet)
                count += 1
                size += packet.size
                self.progress = max(self.progress, (packet.pos or 0) + packet.size)
                yield packet
                if self._trial and (
                    count >= TRIAL_PACKETS or size >= TRIAL_BYTES or span.seconds > TRIAL_SECONDS
                ):
                    return
        except (av.error.FFmpegError, OSError) as error:
            damage = error.strerror or str(error)
        except IndexError:  # PyAV, about a stream that began late
            pass
        if (streams := streams_by_now(source)) > len(source.streams):
            raise BadInput(
                f"{self._path}: {streams - len(source.streams)} of {streams} tracks are announced only "
                f"in the middle of the file and would be lost; {AS_IT_IS}"
            )
        if damage and not self._salvage:
            raise BadInput(
                f"{self._path} is damaged or truncated after {span.seconds:.1f} s ({damage}); "
                f"--salvage keeps what comes before, {AS_IT_IS}"
            )
        if not count:
            raise BadInput(f"{self._path} has no packets; {AS_IT_IS}")

    def _prove(self, stored: InputContainer, proof: Proof) -> Iterator[Fragment]:
        tracks = tracks_of(stored, len(proof.tracks))
        numbers = {track.index: number for number, track in enumerate(tracks)}
        lead = lead_track(tracks) if tracks else 0
        if tracks:
            self.clock = time_base(tracks[lead])
        ends = [0] * len(tracks)
        for packet in stored.demux(*tracks):
            if not is_real(packet):
                continue
            number = numbers[packet.stream_index]
            proof.tracks[number].copy(fingerprint(packet))
            if proof.difference:
                raise ProofFailed(proof.difference)
            if packet.pts is not None:
                ends[number] = max(ends[number], packet.pts + (packet.duration or 0))
            if number == lead and packet.pos is not None:
                yield from self._give(packet.pos)
                self._understand(packet)
        for track, end in zip(tracks, ends, strict=True):
            if track.type in ("video", "audio"):
                self.end = max(self.end, math.ceil(end * time_base(track) / self.clock))

    def _give(self, position: float) -> Iterator[Fragment]:
        """The fragments that end at or before `position`."""
        while self._pieces and self._pieces[0].end <= position:
            yield self._pieces.popleft().fragment()

    def _understand(self, packet: Packet[Stream]) -> None:
        """A packet of the lead track begins in the first fragment that waits."""
        if not self._pieces:
            return
        piece = self._pieces[0]
        if not piece.seen:
            piece.seen, piece.key, piece.start = True, packet.is_keyframe, packet.pts
        elif not piece.key and packet.pts is not None:
            piece.start = packet.pts if piece.start is None else min(piece.start, packet.pts)


def _tracks(source: InputContainer, stored: InputContainer, proof: Proof) -> tuple[Track, ...]:
    """Raises ProofFailed if a track is off by a time that cannot be recorded."""
    tracks = []
    copies = tracks_of(stored, len(proof.tracks))
    for ours, theirs, proved in zip(tracks_of(source), copies, proof.tracks, strict=True):
        if proved.offset.denominator != 1:
            raise ProofFailed(f"{proved.name} is off by {proved.offset} ticks")
        base, source_base = time_base(theirs), time_base(ours)
        tracks.append(
            Track(
                kind=ours.type,
                codec=codec_name(ours),
                time_base=(base.numerator, base.denominator),
                source_time_base=(source_base.numerator, source_base.denominator),
                offset=int(proved.offset),
                language=ours.language or "",
                width=ours.width if isinstance(ours, VideoStream) else 0,
                height=ours.height if isinstance(ours, VideoStream) else 0,
                sample_rate=ours.sample_rate if isinstance(ours, AudioStream) else 0,
                channels=ours.channels if isinstance(ours, AudioStream) else 0,
            )
        )
    return tuple(tracks)
