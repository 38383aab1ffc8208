"""Out of the mesh again: init segment and chunks become an ordinary file, or a stream.

`write_file` copies packets into a file with an index, so that it seeks: MP4 with its `moov`,
Matroska with cues. What it takes in is read once, in order, and never held as a whole. The file
appears under its name only when it is complete and on disk; a failure leaves nothing behind.

The stored timestamps are written as they are (less `Track.offset`): in the family of the stored
container the packets are those of the source. In another family they are as exact as that family
can be: Matroska counts in milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path

import av
from av.container import InputContainer

from vstack.client.containers import (
    STORED,
    copy_tracks,
    is_real,
    movie_timescale,
    open_input,
    open_output,
    tracks_of,
)
from vstack.client.feed import Feed
from vstack.errors import DamagedData, UsageError, VstackError
from vstack.mesh.registers import Media

MUXERS: Mapping[str, str] = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".m4a": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".mka": "matroska",
    ".webm": "webm",
    ".ts": "mpegts",
    ".m2ts": "mpegts",
    ".flv": "flv",
    ".mp3": "mp3",
    ".ogg": "ogg",
    ".opus": "opus",
    ".flac": "flac",
    ".wav": "wav",
    ".aac": "adts",
}
"""What each extension of an output file means, by FFmpeg's name of the muxer."""

_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "flv": {"flvflags": "add_keyframe_index"},
    "mpegts": STORED["mpegts"].options,
}
_FAMILY = {"mp4": {".mp4", ".mov"}, "matroska": {".mkv", ".webm"}, "mpegts": {".ts"}, "flv": {".flv"}}
_USUAL = {"mp4": ".mp4", "mov": ".mov", "matroska": ".mkv", "webm": ".webm", "mpegts": ".ts", "flv": ".flv"}
_SOUND = {"mp3": ".mp3", "ogg": ".ogg", "flac": ".flac", "wav": ".wav", "aac": ".aac"}
"""What a single track of sound goes back into, by the format it came in."""


def default_extension(media: Media) -> str:
    """The extension of the file that `write_file` restores best; empty for opaque bytes."""
    if media.container == "opaque":
        return ""
    extension = _USUAL.get(media.source_format, "")
    if extension not in _FAMILY[media.container]:
        extension = _USUAL[media.container]
    if [track.kind for track in media.tracks] == ["audio"]:
        return _SOUND.get(media.source_format, ".m4a" if extension == ".mp4" else extension)
    return extension


def stream(media: Media, init: bytes, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The stored form from its beginning: plays from a pipe, has no index. `media` may be opaque."""
    if init and media.container != "opaque":
        yield init
    yield from chunks


def write_file(
    media: Media,
    init: bytes,
    chunks: Iterable[bytes | memoryview],
    path: Path,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the video to `path`, in the container that its extension names; on disk on return.

    `on_progress` hears how many bytes of chunks were taken so far.

    Raises UsageError if that container is unknown or cannot hold the video's codecs (the message
    names some that can), DamagedData if the stored form cannot be read, VstackError if the file
    cannot be written, and whatever `chunks` raises. In all cases no part of a file is left.
    """
    parts = stream(media, init, _counted(chunks, on_progress))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if media.container == "opaque" or MUXERS.get(path.suffix.lower()) == media.container == "mpegts":
            _write_bytes(parts, part, path)
        else:
            _write_media(media, Feed(parts), part, path)
        with _writing(path):
            _into_place(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An error of the operating system in here means that the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise VstackError(f"cannot write {path}: {error.strerror or error}") from error


def _counted(
    chunks: Iterable[bytes | memoryview], on_progress: Callable[[int], None] | None
) -> Iterator[bytes | memoryview]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if on_progress is not None:
            on_progress(done)


def _write_bytes(parts: Iterator[bytes | memoryview], part: Path, path: Path) -> None:
    with ExitStack() as stack:
        with _writing(path):
            file = stack.enter_context(part.open("wb"))
        for data in parts:
            with _writing(path):
                file.write(data)


def _write_media(media: Media, feed: Feed, part: Path, path: Path) -> None:
    muxer = MUXERS.get(path.suffix.lower())
    if muxer is None:
        raise UsageError(f"{path}: no container is known by that extension; use one of {', '.join(MUXERS)}")
    try:
        source = open_input(feed, media.container)
    except (av.error.FFmpegError, OSError) as error:
        feed.check()
        raise DamagedData(f"the stored video cannot be read ({error.strerror})") from error
    with source:
        try:
            with _writing(path):
                _copy(media, source, part, muxer)
        except (av.error.FFmpegError, ValueError) as error:
            feed.check()
            fit = _holding(source, len(media.tracks))
            reason = error.strerror if isinstance(error, av.error.FFmpegError) else error
            if path.suffix.lower() in fit:
                raise DamagedData(f"the stored video cannot be copied to {path} ({reason})") from error
            raise UsageError(
                f"{path.suffix} cannot hold this video ({reason}); use {' or '.join(fit)}"
            ) from error
        feed.check()


def _copy(media: Media, source: InputContainer, part: Path, muxer: str) -> None:
    """Raises ValueError (FFmpeg's among them) if the muxer does not take the tracks."""
    options = dict(_OPTIONS.get(muxer, {}))
    if muxer in ("mp4", "mov"):
        options["movie_timescale"] = str(movie_timescale(source))
    tracks = tracks_of(source, len(media.tracks))
    offsets = {track.index: known.offset for track, known in zip(tracks, media.tracks, strict=False)}
    with open_output(part, muxer, options) as out:
        streams = dict(
            zip(
                (track.index for track in tracks),
                copy_tracks(source, out, attachments=muxer == "matroska", count=len(media.tracks)),
                strict=True,
            )
        )
        for packet in source.demux(*tracks):
            if not is_real(packet):
                continue
            if offset := offsets.get(packet.stream_index, 0):
                packet.pts = None if packet.pts is None else packet.pts - offset
                packet.dts = None if packet.dts is None else packet.dts - offset
            packet.stream = streams[packet.stream_index]
            out.mux_one(packet)


def _holding(source: InputContainer, count: int) -> list[str]:
    """Extensions of containers that take the tracks of `source`."""
    fit = []
    for extension, muxer in MUXERS.items():
        try:
            with open_output(BytesIO(), muxer, {}) as out:
                copy_tracks(source, out, attachments=False, count=count)
                out.start_encoding()
        except (av.error.FFmpegError, ValueError):
            continue
        fit.append(extension)
    return fit


def _into_place(part: Path, path: Path) -> None:
    """Make the file durable, then give it its name, then make the name durable."""
    for target in (part, None):
        if target is None:
            os.replace(part, path)
        handle = os.open(target or path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
