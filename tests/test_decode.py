"""Decoding chunk by chunk gives every frame of the source, at its time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from vstack.client.chunker import Chunk, CutRules, Ingest
from vstack.client.decode import ChunkDecoder, DecodedChunk
from vstack.mesh.registers import Media
from vstack.samples import make_sample

SMALL: dict[str, Any] = {"seconds": 6, "size": (192, 108), "bit_rate": 250_000, "gop_seconds": 1.0}
SOURCES: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264.mkv": {"subtitles": (("subrip", "eng", ((0.5, 1.0, "hello"), (2.0, 1.5, "world"))),)},
    "h264.ts": {},
    "h264.flv": {"sample_rate": 44_100},
    "hevc.mp4": {"video_codec": "libx265"},
    "hevc.ts": {"video_codec": "libx265"},
    "vp9.webm": {"video_codec": "libvpx-vp9", "audio_codec": "libopus"},
    "mpeg4.avi": {"video_codec": "mpeg4", "audio_codec": "libmp3lame"},
    "aac.m4a": {"video_codec": None},
}


@dataclass(frozen=True)
class Stored:
    source: Path
    media: Media
    init: bytes
    chunks: list[Chunk]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    folder = tmp_path_factory.mktemp("media")
    made: dict[str, Stored] = {}

    def get(name: str) -> Stored:
        if name not in made:
            run = Ingest(make_sample(folder / name, **{**SMALL, **SOURCES[name]}), CutRules(1.0, first=()))
            chunks = list(run.chunks())
            made[name] = Stored(run.path, run.media, run.init, chunks)
        return made[name]

    return get


def source_times(path: Path) -> dict[str, list[float]]:
    """When each frame of the source is shown or heard, as FFmpeg decodes the file itself."""
    times: dict[str, list[float]] = {}
    for kind in ("video", "audio"):
        with av.open(str(path)) as container:
            for track in [s for s in container.streams if s.type == kind]:
                times[kind] = sorted(
                    float(f.pts * (f.time_base or 0))
                    for f in container.decode(track)
                    if isinstance(f, av.VideoFrame | av.AudioFrame) and f.pts is not None
                )
    return times


def gather(parts: list[DecodedChunk]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for part in parts:
        for kind, some in part.times.items():
            times.setdefault(kind, []).extend(some)
    return {kind: sorted(some) for kind, some in times.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_decoding_chunk_by_chunk_gives_every_frame_at_its_time(
    name: str, stored: Callable[[str], Stored]
) -> None:
    video = stored(name)
    assert len(video.chunks) >= 5
    decoder = ChunkDecoder(video.media, video.init)
    parts = [decoder.decode(chunk.data) for chunk in video.chunks]
    parts.append(decoder.flush())
    got, wanted = gather(parts), source_times(video.source)
    for kind, times in wanted.items():
        assert got[kind] == pytest.approx(times, abs=1e-6), kind
    assert sum(part.errors for part in parts) == 0
    if name == "h264.mkv":
        assert got["subtitle"] == [0.5, 2.0]


@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "vp9.webm"])
def test_after_a_seek_decoding_goes_on_from_a_keyframe(name: str, stored: Callable[[str], Stored]) -> None:
    video = stored(name)
    tick = Fraction(*video.media.clock)
    decoder = ChunkDecoder(video.media, video.init)
    decoder.decode(video.chunks[0].data)
    for index in (4, 2):
        decoder.reset()
        part = decoder.decode(video.chunks[index].data)
        assert part.errors == 0
        assert min(part.times["video"]) == pytest.approx(float(video.chunks[index].entry.start * tick))


def test_damage_is_counted_and_does_not_end_the_playback(stored: Callable[[str], Stored]) -> None:
    video = stored("h264.ts")
    decoder = ChunkDecoder(video.media, video.init)
    noise = random.Random(7)
    errors = frames = 0
    for chunk in video.chunks:
        data = bytearray(chunk.data)
        if chunk.entry.index == 2:
            for at in range(188 * 20, len(data) - 188, 188):
                data[at + 60 : at + 120] = noise.randbytes(60)
        part = decoder.decode(bytes(data))
        errors, frames = errors + part.errors, frames + part.frames("video")
    assert errors > 0
    assert frames > 4 * 24


def test_a_decoder_works_in_another_thread(stored: Callable[[str], Stored]) -> None:
    video = stored("h264.mp4")
    decoder = ChunkDecoder(video.media, video.init)
    parts: list[DecodedChunk] = []

    def work() -> None:
        parts.extend(decoder.decode(chunk.data) for chunk in video.chunks)
        parts.append(decoder.flush())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert sum(part.frames("video") for part in parts) == 6 * 24


def test_opaque_bytes_decode_to_nothing() -> None:
    media = Media(container="opaque", source_format="", clock=(1, 1), duration=0)
    part = ChunkDecoder(media, b"").decode(b"anything")
    assert part.times == {}
    assert part.errors == 0
