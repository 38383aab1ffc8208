"""Which containers there are, and how a set of tracks is carried from one into another.

Sources: FFmpeg's muxers, `libavformat/movenc.c`, `matroskaenc.c`, `mpegtsenc.c`. The options of
`STORED` are the recipe with which packets come back exactly; the reasons stand beside them. What
must never change without a new `chunker.CHUNKER_VERSION`: everything in `STORED`, because equal
files must give equal chunks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import AttachmentStream, Discard, Disposition, Stream

from vstack.client.feed import Feed, Sink
from vstack.client.split import FlvSplitter, MatroskaSplitter, Mp4Splitter, Splitter, TsSplitter

if TYPE_CHECKING:
    from av.container.core import Chapter
    from av.container.core import Container as AnyContainer

Container = Literal["mp4", "matroska", "mpegts", "flv", "opaque"]

_BITEXACT = 0x0400  # AVFMT_FLAG_BITEXACT

IO_BUFFER = 256 * 1024
"""Bytes that FFmpeg asks of, or hands to, Python at a time."""


@dataclass(frozen=True)
class Muxer:
    """One way to store: a muxer of FFmpeg's with the options that make its output exact and cuttable."""

    name: str
    container: Container
    splitter: type[Splitter]
    options: Mapping[str, str] = field(default_factory=dict)
    audio_options: Mapping[str, str] = field(default_factory=dict)
    """Added where there is no video whose keyframes make fragments."""
    keeps_attachments: bool = False
    has_init: bool = True
    """Whether something comes before the first fragment without which no fragment can be read."""

    @property
    def demuxer(self) -> str:
        """FFmpeg's name of the demuxer for what this writes."""
        return self.container


_MP4 = {
    # empty_moov instead of delay_moov shifts all timestamps; cmaf and negative_cts_offsets the picture's.
    # skip_trailer: no index of fragments at the end, which would belong to no chunk.
    "movflags": "frag_keyframe+delay_moov+default_base_moof+skip_trailer",
    # No track made out of the tag "timecode": it needs a frame rate, which a template does not carry.
    "write_tmcd": "0",
    # Bounds a fragment, and so the memory, where keyframes are far apart.
    "frag_size": str(1024 * 1024),
}
_MP4_AUDIO = {"frag_duration": "1000000"}

STORED: Mapping[str, Muxer] = {
    "mp4": Muxer("mp4", "mp4", Mp4Splitter, _MP4, _MP4_AUDIO),
    "mov": Muxer("mov", "mp4", Mp4Splitter, _MP4, _MP4_AUDIO),
    "matroska": Muxer(
        "matroska",
        "matroska",
        MatroskaSplitter,
        # live: nothing is written that needs a seek back. A cluster also begins at each video keyframe.
        {"live": "1", "cluster_time_limit": "5000", "cluster_size_limit": str(512 * 1024)},
        {"cluster_time_limit": "1000"},
        keeps_attachments=True,
    ),
    "mpegts": Muxer(
        "mpegts",
        "mpegts",
        TsSplitter,
        # copyts: timestamps are not moved. One PES packet a frame, so that each has its own timestamp.
        {
            "mpegts_copyts": "1",
            "mpegts_flags": "pat_pmt_at_frames",
            "pes_payload_size": "0",
            "pat_period": "1",
        },
        has_init=False,
    ),
    # Times in ms, decode times among them: MP4 counts sound in samples, Matroska has no decode times.
    "flv": Muxer("flv", "flv", FlvSplitter, {"flvflags": "no_duration_filesize+no_sequence_end"}),
}

_FAMILY: Mapping[str, tuple[str, ...]] = {
    "mp4": ("mp4", "mov", "matroska", "mpegts"),
    "mov": ("mov", "mp4", "matroska", "mpegts"),
    "matroska": ("matroska", "mp4", "mov"),
    "webm": ("matroska", "mp4", "mov"),
    "mpegts": ("mpegts", "matroska"),
    "flv": ("flv", "mp4", "matroska"),
}


def candidates(source_format: str) -> tuple[str, ...]:
    """Names of the muxers to try for a source, its own family first."""
    return _FAMILY.get(source_format, ("mp4", "mov", "matroska", "mpegts"))


def open_input(file: Path | BinaryIO | Feed, container: str | None = None) -> InputContainer:
    """Open for demuxing. Raises av.error.FFmpegError or OSError."""
    return av.open(
        str(file) if isinstance(file, Path) else file,
        "r",
        format=container,
        metadata_errors="replace",
        buffer_size=IO_BUFFER,
    )


def open_output(file: Path | Sink | BinaryIO, muxer: str, options: Mapping[str, str]) -> OutputContainer:
    """Open for muxing, without the date, the random ids and the version that FFmpeg else writes."""
    out = av.open(
        str(file) if isinstance(file, Path) else file,
        "w",
        format=muxer,
        options=dict(options),
        buffer_size=IO_BUFFER,
    )
    out.flags |= _BITEXACT
    return out


def format_name(container: InputContainer, head: bytes) -> str:
    """The source's format, narrower than the demuxer: mp4 or mov, matroska or webm, else its first name.

    `head` is the beginning of the file, with the DocType if it is EBML.
    """
    names = container.format.name.split(",")
    if "mov" in names:
        return "mov" if container.metadata.get("major_brand", "qt").strip() == "qt" else "mp4"
    if "matroska" in names:
        return "webm" if b"\x42\x82\x84webm" in head else "matroska"
    return names[0]


def tracks_of(container: InputContainer, count: int | None = None) -> list[Stream]:
    """The streams that are kept: picture, sound and subtitles, without covers and chapter texts.

    `count`, where known, tells the stored tracks from the texts of chapters, which FFmpeg's MP4
    muxer adds as one more track behind the others, and which only a seeking demuxer recognises.
    """
    tracks = [
        stream
        for stream in container.streams
        if stream.type in ("video", "audio", "subtitle")
        and not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
        and stream.discard != Discard.all
    ]
    return tracks[:count]


def lead_track(tracks: Sequence[Stream]) -> int:
    """Position in `tracks` of the one that cuts follow: the first video, else the first sound."""
    kinds = [track.type for track in tracks]
    return next((kinds.index(kind) for kind in ("video", "audio") if kind in kinds), 0)


def time_base(stream: Stream) -> Fraction:
    return stream.time_base or Fraction(1)


def movie_timescale(source: InputContainer) -> int:
    """Ticks a second in which an MP4 says when each track starts: fine enough to be exact for all.

    FFmpeg's default of 1000 would move a track that starts at 1/24 s. Kept below 2**31.
    """
    scale = 1000
    for track in tracks_of(source):
        wider = math.lcm(scale, time_base(track).denominator)
        scale = wider if wider < 2**31 else scale
    return scale


def codec_name(stream: Stream) -> str:
    """FFmpeg's name of the codec, not of one of its decoders; a name, too, where it has no decoder."""
    if stream.codec_context is not None:
        return stream.codec_context.codec.canonical_name
    found = re.search(
        rf"Stream #0:{stream.index}\b.*?: \w+: (\w+(?: \([^)]*\))?)", _described(stream.container)
    )
    return found[1] if found else "unknown"


def streams_by_now(container: InputContainer) -> int:
    """How many streams the demuxer knows: more than `container.streams`, if some began late."""
    return _described(container).count("Stream #0:")


def _described(container: AnyContainer) -> str:
    """FFmpeg's own description, which it gives only to its log."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        return str(container.dumps_format())  # type: ignore[attr-defined]
    finally:
        av.logging.set_level(level)


_MADE_BY_MUXERS = {
    "encoder",
    "major_brand",
    "minor_version",
    "compatible_brands",
    "duration",
    "vendor_id",
    "software",
}
_MADE_BY_MUXERS_PREFIXES = ("_statistics", "duration-", "handler_")
"""Metadata that every muxer writes for itself (in lower case)."""


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Tags that say something about the video, rather than about the file it was in.

    MP4's demuxer calls `name` what its muxer, and all others, call `title`.
    """
    return {
        "title" if key == "name" and "title" not in metadata else key: value
        for key, value in metadata.items()
        if key.lower() not in _MADE_BY_MUXERS and not key.lower().startswith(_MADE_BY_MUXERS_PREFIXES)
    }


def copy_tracks(
    source: InputContainer, out: OutputContainer, *, attachments: bool, count: int | None = None
) -> list[Stream]:
    """Give `out` the source's tracks, tags and chapters; return its streams, in the order of `tracks_of`.

    Raises ValueError if the output container cannot hold a track's codec.
    """
    streams = []
    for track in tracks_of(source, count):
        stream = out.add_stream_from_template(track, opaque=True)
        stream.metadata.update(kept_metadata(track.metadata))
        stream.disposition = track.disposition
        if _codec_tag(track) == "hvc1" and out.format.name in ("mp4", "mov"):
            stream.codec_context.codec_tag = "hvc1"
        if out.format.name == "mpegts":
            stream.id = track.id
        if track.type == "subtitle" and out.format.name in ("mp4", "mov"):
            stream.time_base = _fine(track, source)
        streams.append(stream)
    if attachments:
        for extra in source.streams:
            if isinstance(extra, AttachmentStream) and extra.data:
                out.add_attachment(extra.name or "", extra.mimetype or "application/octet-stream", extra.data)
    out.metadata.update(kept_metadata(source.metadata))
    if chapters := source.chapters():
        out.set_chapters(chapters)
    return streams


def _fine(text: Stream, source: InputContainer) -> Fraction:
    """A tick for subtitles in MP4, finer than that of all other tracks.

    FFmpeg's muxer puts an empty text wherever a packet of another track lies behind the last text,
    and compares ticks without regard to their length.
    """
    own = time_base(text).denominator
    finest = max([100_000, *(time_base(track).denominator for track in tracks_of(source))])
    return Fraction(1, own * (finest // own + 1))


def _codec_tag(track: Stream) -> str:
    try:
        return track.codec_context.codec_tag
    except UnicodeDecodeError:  # four bytes that are no letters
        return ""


def is_real(packet: Packet[Stream]) -> bool:
    """Whether it carries something of the video.

    Not: what PyAV makes up to flush decoders at the end, and the empty text that lasts no time,
    which FFmpeg's MP4 muxer puts between the subtitles of a fragmented file.
    """
    if packet.size == 2 and not packet.duration and packet.stream.type == "subtitle":
        return bytes(packet) != b"\0\0"
    return packet.size > 0


def differences(source: InputContainer, stored: InputContainer) -> tuple[str, ...]:
    """What of the source, besides packets, is not in the stored form, in words."""
    lost: list[str] = []
    kept = tracks_of(source)
    for stream in source.streams:
        if stream in kept or stream.discard == Discard.all:
            continue
        if stream.disposition & Disposition.attached_pic:
            lost.append(f"cover picture (track {stream.index})")
        elif stream.type == "attachment":
            name = stream.metadata.get("filename", "")
            if name not in {s.metadata.get("filename", "") for s in stored.streams if s.type == "attachment"}:
                lost.append(f"attachment {name or stream.index}")
        else:
            what = "timecode track" if "timecode" in stream.metadata else f"{stream.type} track"
            lost.append(f"{what} {stream.index} ({codec_name(stream)})")
    chapters = [_chapter(c) for c in source.chapters()]
    if chapters and chapters != [_chapter(c) for c in stored.chapters()]:
        lost.append(f"{len(chapters)} chapters")
    for track, copy in zip(kept, tracks_of(stored, len(kept)), strict=True):
        if gone := [tag for tag in _gone(track.metadata, copy.metadata) if tag != "timecode"]:
            lost.append(f"{', '.join(gone)} of {track.type} track {track.index}")
        if missing := track.disposition & ~copy.disposition & ~Disposition.default:
            lost.append(f"disposition {missing.name} of {track.type} track {track.index}")
    if gone := _gone(source.metadata, stored.metadata):
        lost.append(f"tags {', '.join(gone)}")
    return tuple(lost)


def _gone(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names of the tags that the copy has not, or has otherwise."""
    had = {key.lower(): value for key, value in kept_metadata(ours).items()}
    has = {key.lower(): value for key, value in kept_metadata(theirs).items()}
    return sorted(
        key for key, value in had.items() if has.get(key) != value and (key, value) != ("language", "und")
    )


def _chapter(chapter: Chapter) -> tuple[str, float]:
    """What counts of a chapter: its title and the second it starts at (to a millisecond)."""
    base = chapter["time_base"] or Fraction(1)
    return chapter["metadata"].get("title", ""), round(float(chapter["start"] * base), 3)
