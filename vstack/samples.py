"""Sample video out of FFmpeg's own sources: a moving picture, a sound, and any encoder and container.

Demos, tests and benchmarks make their inputs here, so that nothing has to be downloaded. A sample
is the same packets on each call with the same arguments (one encoder thread where threads change
the result is not asked for: x264 and x265 are deterministic with any number). No clock and no
random numbers: lavfi's noise is seeded.

`loop_copy` makes long files out of short ones by stream copy: each turn of the loop is moved by the
length of the whole file, the same for every track, so that sound and picture do not drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.frame import PictureType
from av.video.stream import VideoStream

SPEED: Mapping[str, Mapping[str, str]] = {
    "libx264": {"preset": "superfast", "bf": "2"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=2"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12"},
    "mpeg4": {"bf": "2"},
}
"""Options that make each encoder fast, with B-frames where it has them."""


def make_sample(
    path: Path,
    *,
    seconds: float = 75,
    size: tuple[int, int] = (640, 360),
    fps: int = 24,
    video_codec: str | None = "libx264",
    audio_codec: str | None = "aac",
    audio_tracks: int = 1,
    gop_seconds: float = 2.0,
    bit_rate: int = 1_200_000,
    sample_rate: int = 48_000,
    kind: str = "testsrc2",
    noise: int = 10,
    variable_rate: bool = False,
    options: Mapping[str, str] | None = None,
    subtitles: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]] = (),
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """Write a sample to `path`, whose extension names the container, and return `path`.

    `video_codec` and `audio_codec` are FFmpeg's names of encoders, or None for no such track.
    `kind` is a lavfi source of pictures (testsrc2, mandelbrot, life, ...); `noise` (0..100) is
    laid over it, so that the bit rate (bits/s) is really used. `gop_seconds` is the distance
    of keyframes; none but those are made. `variable_rate` drops frames in an uneven pattern.
    `options` go to the video encoder, `container_options` to the muxer. `subtitles` are tracks of
    (codec, language, cues), each cue (start second, seconds, text as that codec stores it).

    Raises av.error.FFmpegError if this FFmpeg lacks the encoder or the container.
    """
    with av.open(str(path), "w", options=dict(container_options or {})) as out:
        feeds: list[Iterator[tuple[float, Packet[Stream]]]] = []
        if video_codec is not None:
            picture = out.add_stream(video_codec, rate=fps)
            assert isinstance(picture, VideoStream)
            picture.width, picture.height = size
            picture.pix_fmt = "yuv420p"
            picture.bit_rate = bit_rate
            picture.gop_size = max(1, round(gop_seconds * fps))
            picture.codec_context.time_base = Fraction(1, fps)
            fast = dict(SPEED.get(video_codec, {}))
            if video_codec == "libx264":
                fast["sc_threshold"] = "0"
            picture.options = {**fast, **(options or {})}
            graph = f"{kind}=size={size[0]}x{size[1]}:rate={fps}"
            if noise:
                graph += f",noise=alls={noise}:allf=t:all_seed=7"
            graph += ",format=yuv420p"
            feeds.append(_pictures(picture, graph, seconds, fps, variable_rate))
        for number in range(audio_tracks if audio_codec is not None else 0):
            assert audio_codec is not None
            sound = out.add_stream(audio_codec, rate=sample_rate)
            assert isinstance(sound, AudioStream)
            sound.layout = "stereo"
            sound.bit_rate = 96_000
            sound.metadata["language"] = ("eng", "deu", "fra", "spa")[number % 4]
            feeds.append(_sounds(sound, 330 * (number + 1), seconds, sample_rate))
        for codec, language, cues in subtitles:
            text = out.add_mux_stream(codec, time_base=Fraction(1, 1000))
            text.metadata["language"] = language
            feeds.append(_cues(text, cues))
        _mux_by_time(out, feeds)
    return path


def _pictures(
    stream: VideoStream, graph: str, seconds: float, fps: int, variable_rate: bool
) -> Iterator[tuple[float, Packet[Stream]]]:
    with av.open(graph, "r", format="lavfi") as source:
        for number, frame in enumerate(source.decode(video=0)):
            if number >= round(seconds * fps):
                break
            if variable_rate and number % 7 in (2, 3, 5):
                continue
            # Raw video calls each picture a keyframe; the encoder is to choose.
            frame.pict_type = PictureType.NONE
            frame.pts, frame.time_base = number, Fraction(1, fps)
            yield from _timed(stream.encode(frame))
    yield from _timed(stream.encode(None))


def _sounds(
    stream: AudioStream, hertz: int, seconds: float, sample_rate: int
) -> Iterator[tuple[float, Packet[Stream]]]:
    context = stream.codec_context
    context.open()
    resampler = AudioResampler(
        format=context.format, layout="stereo", rate=sample_rate, frame_size=context.frame_size or 1024
    )
    samples = 0
    graph = f"sine=frequency={hertz}:beep_factor=4:sample_rate={sample_rate}:duration={seconds}"
    with av.open(graph, "r", format="lavfi") as source:
        for frame in chain(source.decode(audio=0), (None,)):
            for piece in resampler.resample(frame):
                piece.pts, piece.time_base = samples, Fraction(1, sample_rate)
                samples += piece.samples
                yield from _timed(stream.encode(piece))
    yield from _timed(stream.encode(None))


def _cues(stream: Stream, cues: Sequence[tuple[float, float, str]]) -> Iterator[tuple[float, Packet[Stream]]]:
    for start, length, text in cues:
        packet: Packet[Stream] = Packet(text.encode())
        packet.stream = stream
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = round(start * 1000)
        packet.duration = round(length * 1000)
        packet.is_keyframe = True
        yield start, packet


def _timed(
    packets: Sequence[Packet[VideoStream]] | Sequence[Packet[AudioStream]],
) -> Iterator[tuple[float, Packet[Stream]]]:
    for packet in packets:
        stamp = packet.dts if packet.dts is not None else packet.pts
        yield (float(stamp * packet.time_base) if stamp is not None else 0.0), packet  # type: ignore[misc]


def _mux_by_time(out: OutputContainer, feeds: list[Iterator[tuple[float, Packet[Stream]]]]) -> None:
    """Take always the packet that is due first, so that the muxer has little to interleave."""
    heads = {number: next(feed, None) for number, feed in enumerate(feeds)}
    while True:
        due = [(head[0], number) for number, head in heads.items() if head is not None]
        if not due:
            return
        _, number = min(due)
        head = heads[number]
        assert head is not None
        out.mux(head[1])
        heads[number] = next(feeds[number], None)


def loop_copy(src: Path, dst: Path, seconds: float) -> Path:
    """Repeat `src` by stream copy until `dst` lasts at least `seconds`; return `dst`.

    Every turn moves all tracks by the same amount, the length of the longest of them rounded up
    to a tick of each track, so that dts rise and the tracks keep together to within a tick.
    """
    with av.open(str(src)) as first:
        streams = [s for s in first.streams if s.type in ("video", "audio", "subtitle")]
        length = _length(first, streams)
    turns = max(1, math.ceil(seconds / length))
    with av.open(str(dst), "w") as out:
        for turn in range(turns):
            with av.open(str(src)) as source:
                inputs = [s for s in source.streams if s.type in ("video", "audio", "subtitle")]
                if turn == 0:
                    outputs = {s.index: out.add_stream_from_template(s, opaque=True) for s in inputs}
                    for stream in inputs:
                        outputs[stream.index].metadata.update(stream.metadata)
                for packet in source.demux(inputs):
                    if not packet.size or (packet.dts is None and packet.pts is None):
                        continue
                    shift = math.ceil(turn * length / packet.time_base)
                    if packet.dts is not None:
                        packet.dts += shift
                    if packet.pts is not None:
                        packet.pts += shift
                    packet.stream = outputs[packet.stream_index]
                    out.mux(packet)
    return dst


def _length(container: InputContainer, streams: Sequence[Stream]) -> Fraction:
    """Seconds by which one turn must move all tracks: the longest span of dts, and one packet more."""
    spans: dict[int, tuple[Fraction, Fraction]] = {}
    for packet in container.demux(*streams):
        stamp = packet.dts if packet.dts is not None else packet.pts
        if not packet.size or stamp is None:
            continue
        begin = stamp * packet.time_base
        end = begin + (packet.duration or 0) * packet.time_base
        low, high = spans.get(packet.stream_index, (begin, end))
        spans[packet.stream_index] = (min(low, begin), max(high, end))
    return max((high - low for low, high in spans.values()), default=Fraction(1))
