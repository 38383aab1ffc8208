"""Ingest: what is stored is the source, packet by packet, in every kind of container."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from vstack.client import chunker, containers, proof, remux
from vstack.client.chunker import Chunk, CutRules, Ingest, ProofFailed
from vstack.client.containers import tracks_of
from vstack.client.decode import decode_alone
from vstack.client.output import write_file
from vstack.client.proof import compare_files
from vstack.errors import BadInput
from vstack.mesh.registers import Media
from vstack.samples import loop_copy, make_sample

SMALL: dict[str, Any] = {"seconds": 6, "size": (192, 108), "bit_rate": 250_000, "gop_seconds": 1.0}
CUES = (
    ("subrip", "eng", ((0.5, 1.0, "hello"), (2.0, 1.5, "world"), (5.5, 0.4, "end"))),
    ("ass", "deu", ((0.2, 2.0, "0,0,Default,,0,0,0,,Hallo"), (3.0, 1.0, "1,0,Default,,0,0,0,,Welt"))),
)


@dataclass(frozen=True)
class Format:
    """A kind of source: how to make one, how it must be stored, and which times its container stores."""

    name: str
    container: str
    make: Callable[[Path], Path]
    dts: bool = True
    duration: bool = False
    open_groups: bool = False


def _sample(**changes: Any) -> Callable[[Path], Path]:
    return lambda path: make_sample(path, **{**SMALL, **changes})


def _negative_start(path: Path) -> Path:
    """Picture and sound cut out of the middle of a longer file: neither starts at zero, nor together."""
    whole = make_sample(path.with_name("whole.mp4"), **SMALL)
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        streams = [out.add_stream_from_template(s, opaque=True) for s in source.streams]
        for packet in source.demux():
            begin = Fraction(29, 10) if packet.stream_index == 0 else Fraction(32, 10)
            if packet.size and packet.dts is not None and packet.dts * packet.time_base >= begin:
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    return path


FORMATS = [
    Format("h264.mp4", "mp4", _sample(), duration=True),
    Format("h264.mov", "mp4", _sample(), duration=True),
    Format("h264.mkv", "matroska", _sample(), dts=False),
    Format("h264.ts", "mpegts", _sample()),
    Format("hevc.mp4", "mp4", _sample(video_codec="libx265"), duration=True, open_groups=True),
    Format("hevc.ts", "mpegts", _sample(video_codec="libx265"), open_groups=True),
    Format("vp9.webm", "matroska", _sample(video_codec="libvpx-vp9", audio_codec="libopus"), dts=False),
    Format("aac.m4a", "mp4", _sample(video_codec=None), duration=True),
    Format("mp3.mp3", "mp4", _sample(video_codec=None, audio_codec="libmp3lame")),
    Format("opus.ogg", "mp4", _sample(video_codec=None, audio_codec="libopus"), dts=False),
    Format("mpeg4.avi", "mp4", _sample(video_codec="mpeg4", audio_codec="libmp3lame")),
    Format("h264.flv", "flv", _sample(sample_rate=44_100)),
    Format("tracks.mkv", "matroska", _sample(audio_tracks=3, subtitles=CUES), dts=False),
    Format("one-group.mp4", "mp4", _sample(gop_seconds=100), duration=True),
    Format("uneven.mp4", "mp4", _sample(variable_rate=True), duration=True),
    Format("uneven.mkv", "matroska", _sample(variable_rate=True), dts=False),
    Format("middle.mp4", "mp4", _negative_start, duration=True),
    Format("mpeg2.mpg", "mpegts", _sample(video_codec="mpeg2video", audio_codec="mp2")),
]
BY_NAME = {f.name: f for f in FORMATS}
WITH_VIDEO = [f for f in FORMATS if f.name not in ("aac.m4a", "mp3.mp3", "opus.ogg")]
RULES = CutRules(max_seconds=2.0, first=(1.0,))


@dataclass(frozen=True)
class Stored:
    source: Path
    init: bytes
    chunks: list[Chunk]
    media: Media

    @property
    def whole(self) -> bytes:
        return self.init + b"".join(chunk.data for chunk in self.chunks)


def ingest(source: Path, rules: CutRules = RULES, **options: Any) -> Stored:
    run = Ingest(source, rules, **options)
    chunks = list(run.chunks())
    return Stored(source, run.init, chunks, run.media)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def stored(folder: Path) -> Callable[[str], Stored]:
    made: dict[str, Stored] = {}

    def get(name: str) -> Stored:
        if name not in made:
            made[name] = ingest(BY_NAME[name].make(folder / name))
        return made[name]

    return get


@dataclass(frozen=True)
class Seen:
    """A packet as this test reads it, without the code under test; times in seconds."""

    pts: Fraction | None
    dts: Fraction | None
    duration: Fraction
    key: bool
    payload: bytes


def read(file: Path | io.BytesIO) -> list[list[Seen]]:
    with av.open(str(file) if isinstance(file, Path) else file, "r") as container:
        kept = [s for s in container.streams if s.type in ("video", "audio", "subtitle")]
        tracks: dict[int, list[Seen]] = {s.index: [] for s in kept}
        for packet in container.demux(*kept):
            if packet.size:
                base = packet.time_base
                tracks[packet.stream_index].append(
                    Seen(
                        None if packet.pts is None else packet.pts * base,
                        None if packet.dts is None else packet.dts * base,
                        (packet.duration or 0) * base,
                        packet.is_keyframe,
                        bytes(packet),
                    )
                )
        return list(tracks.values())


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_every_packet_comes_back_out_of_the_stored_bytes(
    form: Format, stored: Callable[[str], Stored]
) -> None:
    made = stored(form.name)
    assert made.media.container == form.container
    ours, theirs = read(made.source), read(io.BytesIO(made.whole))
    assert len(ours) == len(theirs) == len(made.media.tracks)
    for track, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert len(a) > 1, "a test without packets shows nothing"
        assert [p.payload for p in a] == [p.payload for p in b]
        assert [(p.pts, p.key) for p in a] == [(p.pts, p.key) for p in b]
        if form.dts:
            assert [p.dts for p in a] == [p.dts for p in b]
        if form.duration or made.media.tracks[track].kind == "subtitle":
            assert [p.duration for p in a] == [p.duration for p in b]
    assert all(track.offset == 0 for track in made.media.tracks)
    assert compare_files(made.source, io.BytesIO(made.whole)).equal


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_chunks_are_contiguous_and_a_chunk_starts_at_its_first_frame(
    form: Format, stored: Callable[[str], Stored]
) -> None:
    made = stored(form.name)
    entries = [chunk.entry for chunk in made.chunks]
    assert [e.index for e in entries] == list(range(len(entries)))
    for before, after in itertools.pairwise(entries):
        assert before.start + before.duration == after.start
        assert before.duration > 0
    assert sum(e.duration for e in entries) == made.media.duration
    tick = Fraction(*made.media.clock)
    assert made.media.duration * tick == pytest.approx(6, abs=3.1 if form.name == "middle.mp4" else 0.3)
    lead = [packet for packet in read(made.source)[0] if packet.key]
    assert {e.start * tick for e in entries if not e.dependent} <= {packet.pts for packet in lead}
    assert entries[0].start * tick == lead[0].pts
    if form.name == "one-group.mp4":
        assert len(entries) == 1
    elif "uneven" not in form.name:
        assert len(entries) >= 2
        assert entries[0].duration * tick == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("form", WITH_VIDEO, ids=lambda f: f.name)
def test_every_chunk_on_a_keyframe_plays_alone_at_its_true_times(
    form: Format, stored: Callable[[str], Stored]
) -> None:
    made = stored(form.name)
    tick = Fraction(*made.media.clock)
    packets = read(made.source)[0]
    keys = {p.pts: n for n, p in enumerate(packets) if p.key}
    starts = [keys[c.entry.start * tick] for c in made.chunks]
    for chunk, begin, end in zip(made.chunks, starts, [*starts[1:], len(packets)], strict=True):
        assert not chunk.entry.dependent
        start = chunk.entry.start * tick
        wanted = sorted(float(p.pts) for p in packets[begin:end] if p.pts is not None and p.pts >= start)
        alone = decode_alone(made.media, made.init, chunk.data)
        got = sorted(t for t in alone.times["video"] if t >= float(start) - 1e-6)
        assert got == pytest.approx(wanted, abs=1e-6)
        if not form.open_groups:
            assert alone.errors == 0


@pytest.mark.parametrize("name", ["aac.m4a", "mp3.mp3", "opus.ogg"])
def test_every_chunk_of_sound_plays_alone(name: str, stored: Callable[[str], Stored]) -> None:
    made = stored(name)
    tick = Fraction(*made.media.clock)
    for chunk in made.chunks:
        alone = decode_alone(made.media, made.init, chunk.data)
        assert alone.errors == 0
        start, length = float(chunk.entry.start * tick), float(chunk.entry.duration * tick)
        times = alone.times["audio"]
        # The decoder drops the samples that it needs to start: less than two frames.
        assert start - 1e-6 <= times[0] <= start + 0.06
        assert times[-1] == pytest.approx(start + length, abs=0.06)


def test_the_open_groups_of_the_samples_are_open(stored: Callable[[str], Stored]) -> None:
    """Else the tests above would not show that leading pictures are dealt with."""
    packets = read(stored("hevc.mp4").source)[0]
    keys = [n for n, p in enumerate(packets) if p.key]
    assert any(
        p.pts is not None and packets[n].pts is not None and p.pts < (packets[n].pts or 0)
        for n in keys[1:]
        for p in packets[n + 1 : n + 4]
    )


def test_equal_files_give_equal_chunks(stored: Callable[[str], Stored], folder: Path) -> None:
    for name in ("h264.mp4", "tracks.mkv", "h264.ts", "h264.flv"):
        first = stored(name)
        copy = folder / f"other-name-{name}"
        copy.write_bytes(first.source.read_bytes())
        again = ingest(copy)
        assert again.init == first.init
        assert [c.entry for c in again.chunks] == [c.entry for c in first.chunks]
        assert again.media == first.media


def test_real_film_comes_back(folder: Path) -> None:
    root = Path(os.environ.get("VSTACK_MEDIA", Path(__file__).parents[2] / "shared" / "media"))
    film = root / "big-buck-bunny-480p-30s.mp4"
    if not film.exists():
        pytest.skip("no real film on this machine; set VSTACK_MEDIA")
    made = ingest(film, CutRules())
    comparison = compare_files(film, io.BytesIO(made.whole))
    assert comparison.equal
    assert comparison.packets == 2128
    seconds = [round(c.entry.start * made.media.clock[0] / made.media.clock[1], 1) for c in made.chunks]
    assert seconds == [0.0, 10.4, 11.9, 15.8, 23.0], "cuts lie on the film's own keyframes"


def test_a_group_over_the_hard_limit_is_split_into_dependent_chunks(folder: Path) -> None:
    rules = CutRules(max_bytes=200_000, hard_bytes=1_500_000, first=())
    for name in ("long.mp4", "long.mkv", "long.ts", "long.flv"):
        source = make_sample(
            folder / name,
            seconds=8,
            size=(192, 108),
            bit_rate=5_000_000,
            gop_seconds=100,
            sample_rate=44_100,
            noise=60,
        )
        made = ingest(source, rules)
        dependent = [c.entry.dependent for c in made.chunks]
        assert dependent == [False] + [True] * (len(made.chunks) - 1), name
        assert len(made.chunks) >= 3
        assert all(c.entry.size <= rules.hard_bytes for c in made.chunks)
        assert compare_files(source, io.BytesIO(made.whole)).equal, name
        frames = decode_alone(made.media, made.init, [c.data for c in made.chunks])
        assert frames.frames("video") == 8 * 24, "together they play"


def test_a_group_after_a_split_one_begins_a_chunk_of_its_own(folder: Path) -> None:
    source = make_sample(
        folder / "mixed.mp4", seconds=12, size=(192, 108), bit_rate=5_000_000, gop_seconds=4, noise=60
    )
    made = ingest(source, CutRules(max_bytes=200_000, hard_bytes=1_200_000, first=()))
    tick = Fraction(*made.media.clock)
    assert [float(c.entry.start * tick) for c in made.chunks if not c.entry.dependent] == [0, 4, 8]
    assert any(c.entry.dependent for c in made.chunks)


def test_tags_chapters_languages_rotation_and_fonts_are_kept(folder: Path, tmp_path: Path) -> None:
    source = _with_everything(make_sample(folder / "plain.mkv", **SMALL, audio_tracks=2), folder / "rich.mkv")
    made = ingest(source)
    assert made.media.lost == ()
    assert [t.language for t in made.media.tracks] == ["", "eng", "deu"]
    with av.open(io.BytesIO(made.whole)) as container:
        assert [c["metadata"]["title"] for c in container.chapters()] == ["One", "Two"]
        assert container.metadata["title"] == "A film"
        assert [s.type for s in container.streams][-1] == "attachment"
        assert container.streams.audio[1].metadata["title"] == "Commentary"
        assert container.streams.audio[1].disposition & av.stream.Disposition.comment


def _with_everything(plain: Path, path: Path) -> Path:
    with av.open(str(plain)) as source, av.open(str(path), "w") as out:
        streams = [out.add_stream_from_template(s, opaque=True) for s in source.streams]
        for stream, original in zip(streams, source.streams, strict=True):
            stream.metadata.update(original.metadata)
        streams[2].metadata["title"] = "Commentary"
        streams[2].disposition = av.stream.Disposition.comment
        if path.suffix == ".mkv":
            out.add_attachment("font.ttf", "font/ttf", b"font" * 100)
        out.metadata["title"] = "A film"
        base = Fraction(1, 1000)
        out.set_chapters(
            [
                {"id": 1, "start": 0, "end": 2000, "time_base": base, "metadata": {"title": "One"}},
                {"id": 2, "start": 2000, "end": 6000, "time_base": base, "metadata": {"title": "Two"}},
            ]
        )
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    return path


def test_what_the_container_cannot_hold_is_told_beforehand(folder: Path) -> None:
    source = make_sample(folder / "timed.mov", **SMALL)
    timed = folder / "timecode.mov"
    with av.open(str(source)) as plain, av.open(str(timed), "w") as out:
        streams = [out.add_stream("mpeg4", rate=24) if s.type == "video" else None for s in plain.streams]
        assert isinstance(streams[0], av.VideoStream)
        streams[0].width, streams[0].height = 192, 108
        streams[0].metadata["timecode"] = "01:00:00:00"
        for frame in plain.decode(video=0):
            out.mux(streams[0].encode(frame))
        out.mux(streams[0].encode(None))
    with av.open(str(timed)) as check:
        assert any(s.type == "data" for s in check.streams), "the source must have a timecode track"
    assert [what.split(" (")[0] for what in Ingest(timed).lost] == ["timecode track 1"]


def test_opaque_keeps_every_byte_of_any_file(tmp_path: Path) -> None:
    source = tmp_path / "anything.bin"
    source.write_bytes(os.urandom(5_000_000))
    run = Ingest(source, opaque=True)
    chunks = list(run.chunks())
    assert b"".join(c.data for c in chunks) == source.read_bytes()
    assert run.init == b""
    assert [c.entry.size for c in chunks] == [2 * 1024 * 1024, 2 * 1024 * 1024, 5_000_000 - 4 * 1024 * 1024]
    assert run.media == Media(container="opaque", source_format="", clock=(1, 1), duration=0)
    assert all(c.entry.start == c.entry.duration == 0 for c in chunks)


def _store_only_with(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    muxer = dataclasses.replace(containers.STORED["mp4"], options=options)
    monkeypatch.setattr(chunker, "STORED", dict.fromkeys(containers.STORED, muxer))


def test_the_proof_refuses_a_recipe_that_moves_timestamps(
    stored: Callable[[str], Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    _store_only_with({"movflags": "frag_keyframe+empty_moov+default_base_moof+skip_trailer"}, monkeypatch)
    with pytest.raises(ProofFailed, match=r"mp4: audio track 1 \(aac\), packet 0: .* --opaque"):
        Ingest(stored("h264.mp4").source)


def test_a_constant_offset_is_recorded(
    stored: Callable[[str], Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remux, "movie_timescale", lambda source: 1000)
    made = ingest(stored("mpeg4.avi").source)
    assert [track.offset for track in made.media.tracks] == [-8, 0]
    assert not compare_files(made.source, io.BytesIO(made.whole)).equal


def test_the_proof_goes_on_after_the_trial(
    stored: Callable[[str], Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference that the trial cannot see ends the ingest, whatever was given out before."""
    source = stored("h264.mp4").source
    run = Ingest(source, RULES)
    honest, seen = proof.fingerprint, 0

    def lying(packet: av.Packet[Any]) -> Any:
        nonlocal seen
        seen += 1
        print_ = honest(packet)
        return print_._replace(digest=b"") if seen == 700 else print_

    monkeypatch.setattr("vstack.client.remux.fingerprint", lying)
    with pytest.raises(ProofFailed, match="payload"):
        list(run.chunks())
    assert run.alternatives == ("mov", "matroska", "mpegts")


def test_memory_does_not_grow_with_the_file(folder: Path) -> None:
    short = make_sample(
        folder / "short.mp4", seconds=5, size=(320, 180), bit_rate=8_000_000, noise=60, gop_seconds=1
    )
    source = loop_copy(short, folder / "big.mp4", 80)
    assert source.stat().st_size > 30_000_000
    run = Ingest(source)
    tracemalloc.start()
    try:
        total = sum(len(chunk.data) for chunk in run.chunks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 30_000_000
    assert peak < 16_000_000


def test_progress_reaches_the_size_of_the_source(stored: Callable[[str], Stored]) -> None:
    run = Ingest(stored("h264.mp4").source, RULES)
    seen = []
    for _ in run.chunks():
        seen.append(run.progress)
    assert seen == sorted(seen)
    assert seen[0] > 0
    assert run.progress == run.source_size == run.path.stat().st_size


def test_a_looped_file_keeps_sound_and_picture_together(folder: Path) -> None:
    short = make_sample(folder / "loop-me.mp4", **SMALL)
    long = loop_copy(short, folder / "looped.mp4", 20)
    video, audio = read(long)
    assert len(video) == 4 * 6 * 24
    for track in (video, audio):
        stamps = [p.dts for p in track if p.dts is not None]
        assert stamps == sorted(set(stamps))
    last_video = max(p.pts + p.duration for p in video if p.pts is not None)
    last_audio = max(p.pts + p.duration for p in audio if p.pts is not None)
    assert abs(last_video - last_audio) < Fraction(1, 10)
    assert ingest(long, CutRules()).media.duration > 0


def test_two_runs_may_be_interleaved(stored: Callable[[str], Stored]) -> None:
    one, two = Ingest(stored("h264.mp4").source, RULES), Ingest(stored("h264.mkv").source, RULES)
    pairs = list(zip(one.chunks(), two.chunks(), strict=False))
    assert [a.entry.sha256 for a, _ in pairs] == [c.entry.sha256 for c in stored("h264.mp4").chunks][
        : len(pairs)
    ]


def test_an_ingest_that_is_given_up_leaves_nothing_open(stored: Callable[[str], Stored]) -> None:
    chunks = Ingest(stored("h264.mp4").source, RULES).chunks()
    next(chunks)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    chunks.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) < before


def test_the_kept_tracks_are_picture_sound_and_subtitles(stored: Callable[[str], Stored]) -> None:
    with av.open(str(stored("tracks.mkv").source)) as container:
        assert [s.type for s in tracks_of(container)] == ["video", *["audio"] * 3, *["subtitle"] * 2]
    assert [t.codec for t in stored("tracks.mkv").media.tracks] == [
        "h264",
        "aac",
        "aac",
        "aac",
        "subrip",
        "ass",
    ]


def test_text_subtitles_of_an_mp4_come_back_without_additions(folder: Path) -> None:
    lines = [(0.0, 0.5, ""), (0.5, 1.0, "hello"), (1.5, 2.0, ""), (3.5, 1.0, "world"), (4.5, 1.5, "")]
    cues = [(start, length, chr(0) + chr(len(text)) + text) for start, length, text in lines]
    source = make_sample(folder / "text.mp4", **SMALL, subtitles=[("mov_text", "eng", cues)])
    made = ingest(source)
    assert made.media.container == "mp4"
    assert [t.codec for t in made.media.tracks] == ["h264", "aac", "mov_text"]
    # FFmpeg's own muxer puts empty texts between the others, and one at the end.
    empty = b"\0\0"
    ours, theirs = (
        [p for p in read(file)[2] if p.payload != empty] for file in (source, io.BytesIO(made.whole))
    )
    assert theirs == ours
    assert [p.payload[2:] for p in theirs] == [b"hello", b"world"]
    out = folder / "text-again.mp4"
    write_file(made.media, made.init, (chunk.data for chunk in made.chunks), out)
    assert compare_files(source, out).equal


def test_an_unsupported_codec_is_named(stored: Callable[[str], Stored], tmp_path: Path) -> None:
    odd = tmp_path / "odd.mp4"
    odd.write_bytes(stored("h264.mp4").source.read_bytes().replace(b"avc1", b"qqqq"))
    with pytest.raises(BadInput, match=r"video track 0 has an unsupported codec \(none \(qqqq .*--opaque"):
        Ingest(odd)


def test_a_track_that_begins_unannounced_is_not_lost_in_silence(folder: Path) -> None:
    source = make_sample(folder / "late.flv", **{**SMALL, "seconds": 20}, sample_rate=44_100)
    data = bytearray(source.read_bytes())
    at, tags = 13, []
    while at + 15 < len(data):
        tags.append(at)
        at += 15 + int.from_bytes(data[at + 1 : at + 4], "big")
    for at in tags[-40:]:
        if data[at] == 8:
            data[at + 11] = 0x2F  # the sound is MP3 from here on
    source.write_bytes(data)
    with pytest.raises(BadInput, match="1 of 3 tracks are announced only in the middle"):
        list(Ingest(source).chunks())


def test_sources_that_are_not_media_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(os.urandom(300_000))
    (tmp_path / "text.txt").write_text("not a film\n" * 1000)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    for name, words in {
        "noise.mp4": "not a media file.*--opaque",
        "text.txt": "--opaque",
        "empty.mp4": "is empty",
        "folder": "is a directory",
        "nowhere.mp4": "does not exist",
    }.items():
        with pytest.raises(BadInput, match=words) as caught:
            Ingest(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_mp4_cut_before_its_index_is_named_as_such(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    whole = stored("h264.mp4").source.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"truncated MP4: its index \(moov\) is missing"):
        Ingest(tmp_path / "cut.mp4")


@pytest.mark.parametrize("name", ["front.mp4", "cut.mkv", "cut.avi"])
def test_a_file_cut_in_the_middle_is_refused_and_can_be_salvaged(name: str, tmp_path: Path) -> None:
    options = {"movflags": "faststart"} if name == "front.mp4" else {}
    codecs: dict[str, Any] = (
        {"video_codec": "mpeg4", "audio_codec": "libmp3lame"} if name == "cut.avi" else {}
    )
    whole = make_sample(tmp_path / f"whole-{name}", **SMALL, **codecs, container_options=options)
    data = whole.read_bytes()
    cut = tmp_path / name
    cut.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(BadInput, match=r"truncated: \d+ of \d+ bytes.*--salvage"):
        Ingest(cut)
    made = ingest(cut, salvage=True)
    tick = Fraction(*made.media.clock)
    assert 2 < made.media.duration * tick < 5
    saved, all_of_it = read(io.BytesIO(made.whole)), read(whole)
    for part, full in zip(saved, all_of_it, strict=True):
        assert [p.payload for p in part] == [p.payload for p in full][: len(part)]
