"""Decoding what is stored, chunk by chunk: what a player does, without a screen.

`ChunkDecoder` demuxes each chunk with the init segment before it, as a file by itself, and gives
the packets to decoders that live from chunk to chunk. So pictures of an open group, which need the
one before, decode, and timestamps are those of the chunk itself. Frames are counted and dropped.

FFmpeg releases the GIL while it decodes: meant for a worker thread; one thread at a time.
Memory: one chunk, and the frames that decoders hold back for reordering.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import av
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.packet import Packet
from av.stream import Stream
from av.subtitles.codeccontext import SubtitleCodecContext
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from vstack.client.containers import is_real, open_input, time_base, tracks_of
from vstack.client.feed import Feed
from vstack.mesh.registers import Media


@dataclass
class DecodedChunk:
    """What came out of the decoders for one chunk. Frames that wait for reordering come with a later one."""

    times: dict[str, list[float]] = field(default_factory=dict)
    """By kind of track (video, audio, subtitle): when each frame is shown or heard, in seconds."""
    errors: int = 0
    """Packets that a decoder refused, and pictures that it marked as damaged."""

    def frames(self, kind: str) -> int:
        """How many frames of tracks of that kind were decoded."""
        return len(self.times.get(kind, ()))


class ChunkDecoder:
    """Decodes the chunks of one video in the order of playback."""

    def __init__(self, media: Media, init: bytes) -> None:
        self._media = media
        self._init = init
        self._decoders: dict[int, _Decoder] = {}

    def decode(self, data: bytes) -> DecodedChunk:
        """Decode every packet of a chunk. Raises av.error.FFmpegError if it cannot be demuxed at all."""
        done = DecodedChunk()
        if self._media.container == "opaque":
            return done
        with open_input(Feed([self._init, data]), self._media.container) as container:
            tracks = tracks_of(container, len(self._media.tracks) or None)
            for number, track in enumerate(tracks):
                if number not in self._decoders and track.codec_context is not None:
                    self._decoders[number] = _Decoder(track, self._offset(number))
            numbers = {track.index: number for number, track in enumerate(tracks)}
            for packet in container.demux(*tracks):
                decoder = self._decoders.get(numbers[packet.stream_index])
                if decoder is not None and is_real(packet):
                    decoder.decode(packet, done)
        return done

    def flush(self) -> DecodedChunk:
        """The frames that decoders held back; call at the end. Afterwards only `reset` makes sense."""
        done = DecodedChunk()
        for decoder in self._decoders.values():
            decoder.decode(None, done)
        return done

    def reset(self) -> None:
        """Forget what was decoded: the next chunk comes after a seek."""
        for decoder in self._decoders.values():
            decoder.reset()

    def _offset(self, number: int) -> Fraction:
        """Seconds by which stored timestamps of a track lie above the source's."""
        if number >= len(self._media.tracks):
            return Fraction(0)
        track = self._media.tracks[number]
        return track.offset * Fraction(*track.time_base)


class _Decoder:
    """One track's decoder, and how its timestamps are meant."""

    def __init__(self, track: Stream, offset: Fraction) -> None:
        self.kind = track.type
        self.context = track.codec_context
        self._time_base = time_base(track)
        self._offset = offset
        self._begun = False
        """Whether a packet was decoded since the start or the last seek."""

    def reset(self) -> None:
        """The next packet does not follow the last one."""
        self.context.flush_buffers()
        self._begun = False

    def decode(self, packet: Packet[Stream] | None, done: DecodedChunk) -> None:
        """Give a packet to the decoder (None: end of the stream), and count what comes out."""
        if packet is not None:
            if self._begun:
                _skip_nothing(packet)
            self._begun = True
        times = done.times.setdefault(self.kind, [])
        frames: Sequence[VideoFrame | AudioFrame] = ()
        try:
            if isinstance(self.context, SubtitleCodecContext):
                if packet is not None and self.context.decode2(packet) is not None and packet.pts is not None:
                    times.append(float(packet.pts * self._time_base - self._offset))
            elif isinstance(self.context, VideoCodecContext | AudioCodecContext):
                frames = self.context.decode(packet)
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            done.errors += 1
        for frame in frames:
            if frame.pts is not None:
                times.append(float(frame.pts * (frame.time_base or self._time_base) - self._offset))
            done.errors += frame.is_corrupt


def _skip_nothing(packet: Packet[Stream]) -> None:
    """Take back the demuxer's order to drop the first samples of a file: this one is not its first.

    Each chunk is demuxed as if it began the file, so each would lose the encoder's delay once more.
    """
    if not packet.has_sidedata("skip_samples"):
        return
    order = packet.get_sidedata("skip_samples")
    memoryview(order)[:4] = bytes(4)
    packet.set_sidedata(order)


def decode_alone(media: Media, init: bytes, data: bytes | Iterable[bytes]) -> DecodedChunk:
    """Decode a chunk, or a chunk and those that depend on it, as if there were no others."""
    decoder = ChunkDecoder(media, init)
    done = decoder.decode(data if isinstance(data, bytes) else b"".join(data))
    rest = decoder.flush()
    for kind, times in rest.times.items():
        done.times.setdefault(kind, []).extend(times)
    done.errors += rest.errors
    return done
