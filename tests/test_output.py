"""Output: what `get` writes is an ordinary file with the source's packets, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from vstack.client.chunker import CutRules, Ingest
from vstack.client.output import default_extension, stream, write_file
from vstack.client.proof import compare_files
from vstack.errors import UsageError, VstackError
from vstack.mesh.registers import Media
from vstack.samples import make_sample

SMALL: dict[str, Any] = {"seconds": 6, "size": (192, 108), "bit_rate": 250_000, "gop_seconds": 1.0}
CUES = (("subrip", "eng", ((0.5, 1.0, "hello"), (2.0, 1.5, "world"), (5.5, 0.4, "end"))),)

SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "h264.mp4": ({}, ".mp4"),
    "h264.mov": ({}, ".mov"),
    "h264.mkv": ({}, ".mkv"),
    "h264.ts": ({}, ".ts"),
    "hevc.mp4": ({"video_codec": "libx265"}, ".mp4"),
    "vp9.webm": ({"video_codec": "libvpx-vp9", "audio_codec": "libopus"}, ".webm"),
    "aac.m4a": ({"video_codec": None}, ".m4a"),
    "mp3.mp3": ({"video_codec": None, "audio_codec": "libmp3lame"}, ".mp3"),
    "opus.ogg": ({"video_codec": None, "audio_codec": "libopus"}, ".ogg"),
    "pcm.wav": ({"video_codec": None, "audio_codec": "pcm_s16le"}, ".wav"),
    "flac.flac": ({"video_codec": None, "audio_codec": "flac"}, ".flac"),
    "mpeg4.avi": ({"video_codec": "mpeg4", "audio_codec": "libmp3lame"}, ".mp4"),
    "h264.flv": ({"sample_rate": 44_100}, ".flv"),
    "tracks.mkv": ({"audio_tracks": 3, "subtitles": CUES}, ".mkv"),
    "one-group.mp4": ({"gop_seconds": 100}, ".mp4"),
    "uneven.mp4": ({"variable_rate": True}, ".mp4"),
    "uneven.mkv": ({"variable_rate": True}, ".mkv"),
}
WITH_VIDEO = [name for name, (how, _) in SOURCES.items() if how.get("video_codec", "") is not None]


@dataclass(frozen=True)
class Stored:
    source: Path
    media: Media
    init: bytes
    chunks: list[bytes]

    def get(self, path: Path) -> Path:
        write_file(self.media, self.init, iter(self.chunks), path)
        return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def stored(folder: Path) -> Callable[[str], Stored]:
    made: dict[str, Stored] = {}

    def get(name: str) -> Stored:
        if name not in made:
            run = Ingest(make_sample(folder / name, **{**SMALL, **SOURCES[name][0]}), CutRules(2.0, first=()))
            chunks = [chunk.data for chunk in run.chunks()]
            made[name] = Stored(run.path, run.media, run.init, chunks)
        return made[name]

    return get


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_comes_back_with_every_packet_in_its_own_kind_of_container(
    name: str, stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    video = stored(name)
    assert default_extension(video.media) == SOURCES[name][1]
    out = video.get(tmp_path / f"out{SOURCES[name][1]}")
    comparison = compare_files(video.source, out)
    assert comparison.difference == ""
    assert comparison.equal
    assert comparison.packets > 60
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_what_comes_back_plays_to_the_end_and_seeks(
    name: str, stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    video = stored(name)
    out = video.get(tmp_path / f"out{SOURCES[name][1]}")
    times, keys = _frame_times(out), _key_times(video.source)
    assert times == _frame_times(video.source)
    for second in (4.5, 1.2, 5.9, 0.3, 3.0):
        target = times[0] + Fraction(second)
        landed = _after_seek(out, target)
        if name in ("h264.ts", "h264.flv"):
            # These have no index: FFmpeg plays from a keyframe behind the place that it finds.
            assert landed or target > keys[-1]
            if landed:
                assert landed[0] in keys
                assert abs(landed[0] - target) <= 2
                assert sorted(landed) == [t for t in times if t >= landed[0]]
        else:
            begin = max(key for key in keys if key <= target)
            assert landed[0] == begin
            assert sorted(landed) == [t for t in times if t >= begin]


def _frame_times(path: Path) -> list[Fraction]:
    return sorted(_after_seek(path, None))


def _after_seek(path: Path, second: Fraction | None) -> list[Fraction]:
    """When the frames are shown that FFmpeg decodes after a seek (None: from the start), as they come."""
    with av.open(str(path)) as container:
        track = container.streams.video[0]
        assert track.time_base is not None
        if second is not None:
            container.seek(int(second / track.time_base), stream=track)
        return [f.pts * track.time_base for f in container.decode(track) if f.pts is not None]


def _key_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.video[0])
        return [p.pts * p.time_base for p in packets if p.is_keyframe and p.pts is not None]


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.flv", "vp9.webm"])
def test_a_stream_plays_from_a_pipe(name: str, stored: Callable[[str], Stored]) -> None:
    video = stored(name)
    reader, writer = os.pipe()
    data = b"".join(stream(video.media, video.init, iter(video.chunks)))
    if os.fork() == 0:
        os.close(reader)
        with os.fdopen(writer, "wb") as inlet:
            inlet.write(data)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe, av.open(pipe, "r") as container:
        frames = sum(1 for _ in container.decode(video=0))
    os.wait()
    assert frames == 6 * 24


def test_another_container_may_be_asked_for(stored: Callable[[str], Stored], tmp_path: Path) -> None:
    video = stored("h264.mp4")
    out = video.get(tmp_path / "out.mkv")
    with av.open(str(out)) as container:
        assert "matroska" in container.format.name
        assert sum(1 for _ in container.decode(video=0)) == 6 * 24


def test_a_container_that_cannot_hold_it_is_refused_with_those_that_can(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"\.webm cannot hold this video .* use \.mp4 or .*\.mkv"):
        stored("h264.mp4").get(tmp_path / "out.webm")
    with pytest.raises(UsageError, match=r"no container is known by that extension; use one of \.mp4"):
        stored("h264.mp4").get(tmp_path / "out.xyz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ConnectionResetError("node gone"), KeyboardInterrupt(), VstackError("x")])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts"])
def test_a_failure_leaves_nothing_behind_and_is_told(
    name: str, error: BaseException, stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    video = stored(name)

    def broken() -> Iterator[bytes]:
        yield video.chunks[0]
        raise error

    with pytest.raises(type(error)) as caught:
        write_file(video.media, video.init, broken(), tmp_path / f"out{SOURCES[name][1]}")
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    video, out = stored("h264.mp4"), tmp_path / "out.mp4"
    out.write_bytes(b"the old one")

    def watched() -> Iterator[bytes]:
        for chunk in video.chunks:
            assert out.read_bytes() == b"the old one"
            yield chunk

    write_file(video.media, video.init, watched(), out)
    assert compare_files(video.source, out).equal


def test_a_folder_that_is_not_there_is_one_sentence(stored: Callable[[str], Stored], tmp_path: Path) -> None:
    for name in ("h264.mp4", "h264.ts"):
        with pytest.raises(VstackError, match="No such file or directory"):
            stored(name).get(tmp_path / "nowhere" / f"out{SOURCES[name][1]}")


def test_progress_counts_the_bytes_of_chunks(stored: Callable[[str], Stored], tmp_path: Path) -> None:
    video, seen = stored("h264.mp4"), list[int]()
    write_file(video.media, video.init, video.chunks, tmp_path / "out.mp4", on_progress=seen.append)
    assert seen == [sum(map(len, video.chunks[: n + 1])) for n in range(len(video.chunks))]


def test_opaque_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    run = Ingest(source, opaque=True)
    chunks = [chunk.data for chunk in run.chunks()]
    write_file(run.media, run.init, chunks, tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == source.read_bytes()
    assert b"".join(stream(run.media, run.init, chunks)) == source.read_bytes()
    assert default_extension(run.media) == ""


def test_a_recorded_offset_is_taken_back(
    stored: Callable[[str], Stored], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored("mpeg4.avi").source
    monkeypatch.setattr("vstack.client.remux.movie_timescale", lambda source: 1000)
    run = Ingest(source)
    chunks = [chunk.data for chunk in run.chunks()]
    assert [track.offset for track in run.media.tracks] == [-8, 0]
    write_file(run.media, run.init, chunks, tmp_path / "out.mp4")
    assert compare_files(source, tmp_path / "out.mp4").equal


def test_a_comparison_finds_one_changed_byte_and_one_moved_packet(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    video = stored("h264.ts")
    data = bytearray(b"".join(video.chunks))
    data[len(data) // 2 // 188 * 188 + 100] ^= 1
    (tmp_path / "changed.ts").write_bytes(data)
    comparison = compare_files(video.source, tmp_path / "changed.ts")
    assert not comparison.equal
    assert "payload" in comparison.difference
    fewer = tmp_path / "fewer.ts"
    fewer.write_bytes(b"".join(video.chunks[:-1]))
    assert "packets more than the copy" in compare_files(video.source, fewer).difference
    other = compare_files(video.source, stored("h264.mkv").source)
    assert not other.equal
