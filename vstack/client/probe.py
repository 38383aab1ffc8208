"""Is this file media that can be stored? Opens it, or says in one sentence why not and what to do.

A file that was cut short is recognised where its container says how long it ought to be: an MP4
whose index points past its end or is missing, a Matroska segment or RIFF list longer than the file.
Where it does not (MPEG-TS, MP3), a file cut short is simply a shorter file.
"""

from __future__ import annotations

from pathlib import Path

import av
from av.container import InputContainer

from vstack.client.containers import codec_name, open_input, tracks_of
from vstack.errors import BadInput

AS_IT_IS = "--opaque stores its bytes as they are"


def open_source(path: Path, *, check_length: bool = True) -> InputContainer:
    """Open `path` for demuxing. Raises BadInput unless it has packets of codecs that can be carried.

    Without `check_length`, a file that was cut short is taken for what is left of it.
    """
    check_readable(path)
    head = head_of(path)
    try:
        source = open_input(path)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if _mp4_without_index(path, head):
            raise BadInput(
                f"{path} is a truncated MP4: its index (moov) is missing, nothing can be salvaged; {AS_IT_IS}"
            ) from error
        raise BadInput(f"{path} is not a media file that FFmpeg can read; {AS_IT_IS}") from error
    try:
        _check_tracks(path, source)
        if check_length:
            _check_length(path, head, source)
    except BaseException:
        source.close()
        raise
    return source


def check_readable(path: Path) -> None:
    """Raises BadInput if `path` is not a file with something in it."""
    if path.is_dir():
        raise BadInput(f"{path} is a directory, not a media file")
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise BadInput(f"{path} is empty")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _check_tracks(path: Path, source: InputContainer) -> None:
    if source.format.name in ("tty", "image2", "bin", "data") or source.format.name.endswith("_pipe"):
        raise BadInput(f"{path} is not video or sound ({source.format.long_name}); {AS_IT_IS}")
    tracks = tracks_of(source)
    if not any(track.type in ("video", "audio") for track in tracks):
        raise BadInput(f"{path} has no video or audio track; {AS_IT_IS}")
    for track in tracks:
        if track.codec_context is None:
            what = f"{track.type} track {track.index}"
            raise BadInput(f"{path}: {what} has an unsupported codec ({codec_name(track)}); {AS_IT_IS}")


def _check_length(path: Path, head: bytes, source: InputContainer) -> None:
    size = path.stat().st_size
    promised = _promised_size(path, head)
    playable = ""
    if "mov" in source.format.name.split(","):
        for track in tracks_of(source):
            entries = track.index_entries
            for number in range(len(entries)):
                entry = entries[number]
                if entry.pos + entry.size > promised:
                    promised = entry.pos + entry.size
    if promised > size:
        if source.duration:
            whole = source.duration / 1e6
            playable = f" (about {whole * size / promised:.0f} of {whole:.0f} s)"
        raise BadInput(
            f"{path} is truncated: {size} of {promised} bytes are there; "
            f"--salvage keeps what is left{playable}, {AS_IT_IS}"
        )


def _promised_size(path: Path, head: bytes) -> int:
    """Bytes that the outermost element says the file has; 0 if it does not say."""
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 if head[8:12] != b"WAVE" else 0
    if head[:4] == b"\x1a\x45\xdf\xa3":
        at = 5 + (head[4] & 0x7F) if head[4] & 0x80 else 12 + int.from_bytes(head[5:12], "big")
        if head[at : at + 4] != b"\x18\x53\x80\x67":
            return 0
        length = 9 - head[at + 4].bit_length()
        field = int.from_bytes(head[at + 4 : at + 4 + length], "big") & ((1 << 7 * length) - 1)
        return 0 if field == (1 << 7 * length) - 1 else at + 4 + length + field
    if head[4:8] == b"ftyp":
        return _mp4_size(path)
    return 0


def _mp4_size(path: Path) -> int:
    """Where the last of the outermost boxes ends, by its own account."""
    at, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length < 8:
                break
            at += length
    return at


def _mp4_without_index(path: Path, head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"mdat", b"wide") and _mp4_size(path) > path.stat().st_size


def head_of(path: Path) -> bytes:
    """The first bytes of a file, by which formats are told apart."""
    with path.open("rb") as file:
        return file.read(4096)
