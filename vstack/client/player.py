"""Playback in real time without a screen: fetch, decode every frame, keep a clock, count stalls.

A playback is told to the mesh as a view once it has played 10 s of the video, or half of it if that is
less, whatever the speed: seconds of the video that were played, not skipped.

The clock runs from the moment the first chunk is decoded. A chunk is requested when what is
buffered leaves room for it under the cap, or when no more than MARGIN seconds are left: a chunk
longer than the cap must come whole, or not at all. Where the clock reaches the end of what is
decoded, playback stalls, and goes on with the next chunk.

Metrics: startup is the time from `play` to the first frame; a rebuffer is one stall; the rebuffer
ratio is stall / (stall + play); the buffer is what lies decoded ahead of the clock, averaged over
the time of playback; chunk time is from request to verified chunk; wasted are bytes that arrived
and were not needed; failover time is from a request's failure to the next byte for its chunk.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from vstack.client.catalogue import Video, chunk_table
from vstack.client.decode import ChunkDecoder, DecodedChunk
from vstack.client.downloader import fetch_init, media_of
from vstack.client.fetcher import ChunkFetcher, FetchedChunk
from vstack.errors import UsageError
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ChunkRecord

MARGIN = 2.5
"""Seconds before it is needed at which a chunk is requested, whatever its length."""
LATE = 0.02
"""Seconds by which the clock may look late without that being a stall."""
VIEW = 10.0
"""Seconds of the video after which a playback is a view; for a video shorter than twice that, half of it."""
VIEW_PATIENCE = 2.0
"""Seconds that an ended playback waits at most until a node has taken note of the view."""
TICK = 0.25
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class PlayOptions:
    start: float = 0.0
    """Seconds into the video."""
    speed: float = 1.0
    buffer: float = 30.0
    """Cap, in seconds of playback."""
    decode: bool = True


@dataclass(frozen=True)
class PlayedChunk:
    """One row of the table of what was played."""

    index: int
    start: float
    """Seconds into the video."""
    seconds: float
    size: int
    served: dict[NodeId, int]
    """Bytes by node."""
    requested_at: float
    """Seconds since `play`."""
    took: float
    failovers: int
    frames: int
    """Pictures decoded."""


@dataclass
class Playback:
    """The state and the metrics of one playback; final once `play` returns."""

    position: float = 0.0
    """Seconds into the video."""
    end: float = 0.0
    buffered: float = 0.0
    """Seconds ahead of the position."""
    state: str = "starting"
    """starting, playing, stalled or ended."""
    startup_s: float = 0.0
    played_s: float = 0.0
    rebuffers: int = 0
    stall_s: float = 0.0
    buffer_average_s: float = 0.0
    buffer_max_s: float = 0.0
    video_frames: int = 0
    audio_frames: int = 0
    decode_errors: int = 0
    bytes_received: int = 0
    bytes_wasted: int = 0
    failovers: int = 0
    failover_max_s: float = 0.0
    chunks: list[PlayedChunk] = field(default_factory=list)

    @property
    def rebuffer_ratio(self) -> float:
        whole = self.stall_s + self.played_s
        return self.stall_s / whole if whole else 0.0

    def chunk_time(self, percent: int) -> float:
        """Percentile of the chunks' fetch times, in seconds."""
        times = sorted(c.took for c in self.chunks)
        if len(times) < 2:
            return times[0] if times else 0.0
        return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]

    def metrics(self) -> dict[str, float]:
        """The figures by their names in `--json`."""
        return {
            "startup_s": round(self.startup_s, 4),
            "played_s": round(self.played_s, 3),
            "rebuffers": self.rebuffers,
            "rebuffer_s": round(self.stall_s, 3),
            "rebuffer_ratio": round(self.rebuffer_ratio, 5),
            "buffer_average_s": round(self.buffer_average_s, 3),
            "buffer_max_s": round(self.buffer_max_s, 3),
            "chunk_p50_s": round(self.chunk_time(50), 4),
            "chunk_p95_s": round(self.chunk_time(95), 4),
            "chunk_p99_s": round(self.chunk_time(99), 4),
            "wasted_percent": round(100 * self.bytes_wasted / max(1, self.bytes_received), 3),
            "failovers": self.failovers,
            "failover_max_s": round(self.failover_max_s, 3),
            "video_frames": self.video_frames,
            "audio_frames": self.audio_frames,
            "decode_errors": self.decode_errors,
            "bytes": self.bytes_received,
        }


class Player:
    """Plays one video once. `playback` may be read at any time from the same event loop."""

    def __init__(
        self,
        mesh: MeshClient,
        video: Video,
        options: PlayOptions | None = None,
        on_progress: Callable[[Playback], None] = lambda _: None,
    ) -> None:
        self.mesh = mesh
        self.video = video
        self.options = options or PlayOptions()
        self.playback = Playback()
        self.on_progress = on_progress
        """Called with the playback several times a second."""
        self._media = media_of(video)
        if self._media.container == "opaque":
            raise UsageError(f"{video.record.title!r} was stored opaque: it can be fetched, not played")
        self._tick_seconds = self._media.clock[0] / self._media.clock[1]
        self._began = 0.0
        self._decoded_to = 0.0
        self._loaded = False
        self._news = asyncio.Event()
        self._weighed = 0.0
        """Integral of the buffer over the time of playback, in square seconds."""
        self._shown = 0.0
        """Seconds of the video that were played."""
        self._view: asyncio.Task[bool] | None = None
        """Tells the mesh that this playback is a view."""
        self._clock_read = 0.0
        """When `position` was last brought up to date (monotonic)."""

    def _at(self, ticks: int) -> float:
        return ticks * self._tick_seconds

    async def play(self) -> Playback:
        """To the end of the video. Raises MeshUnavailable, DamagedData, UsageError."""
        self._began = monotonic()
        table = await chunk_table(self.mesh, self.video)
        table = self._from_start(table)
        first, last = table[0].entry, table[-1].entry
        self.playback.end = self._at(last.start + last.duration)
        self.playback.position = max(self.options.start, self._at(first.start))
        self._decoded_to = self._at(first.start)
        async with ChunkFetcher(self.mesh, self.video.id, self.video.upload) as fetcher:
            loading = asyncio.create_task(self._load(fetcher, table))
            clock = asyncio.create_task(self._run_clock())
            try:
                done, _ = await asyncio.wait({loading, clock}, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                if self._view is not None:
                    await asyncio.wait({self._view}, timeout=VIEW_PATIENCE)
            finally:
                ours = (loading, clock) if self._view is None else (loading, clock, self._view)
                for unfinished in ours:
                    unfinished.cancel()
                await asyncio.gather(*ours, return_exceptions=True)
                self._measure(fetcher)
        return self.playback

    def _from_start(self, table: list[ChunkRecord]) -> list[ChunkRecord]:
        """The chunks from the one that holds the start: from its keyframe, if that lies before it."""
        start = self.options.start
        if not table or start >= self._at(table[-1].entry.start + table[-1].entry.duration):
            raise UsageError(
                f"{self.video.record.title!r} is {self.video.seconds:.1f} s long: "
                f"it cannot start at {start:g} s"
            )
        at = max((i for i, r in enumerate(table) if self._at(r.entry.start) <= start), default=0)
        while table[at].entry.dependent and at > 0:
            at -= 1
        return table[at:]

    # -- loading ----------------------------------------------------------------------------------

    async def _load(self, fetcher: ChunkFetcher, table: Sequence[ChunkRecord]) -> None:
        init = await fetch_init(fetcher, self.video)
        decoder = ChunkDecoder(self._media, init) if self.options.decode else None
        for record in table:
            await self._wait_for_room(self._at(record.entry.duration))
            requested = monotonic()
            chunk = await fetcher.fetch(record, within=max(0.1, self.playback.buffered))
            decoded = DecodedChunk()
            if decoder is not None:
                decoded = await asyncio.to_thread(decoder.decode, chunk.data)
            self._loaded_chunk(chunk, decoded, requested)
        if decoder is not None:
            self._count(await asyncio.to_thread(decoder.flush))
        self._loaded = True
        self._news.set()

    async def _wait_for_room(self, seconds: float) -> None:
        while True:
            ahead = self._decoded_to - self._now_at()
            level = max(self.options.buffer - seconds, MARGIN * self.options.speed)
            if self.playback.state in ("starting", "stalled") or ahead <= level:
                return
            await asyncio.sleep(min(TICK, (ahead - level) / self.options.speed))

    def _loaded_chunk(self, chunk: FetchedChunk, decoded: DecodedChunk, requested: float) -> None:
        entry = chunk.entry
        self._count(decoded)
        self.playback.failovers += chunk.failovers
        self.playback.chunks.append(
            PlayedChunk(
                entry.index,
                self._at(entry.start),
                self._at(entry.duration),
                entry.size,
                dict(chunk.served),
                requested - self._began,
                chunk.seconds,
                chunk.failovers,
                decoded.frames("video"),
            )
        )
        self._notice_stall()
        self._decoded_to = max(self._decoded_to, self._at(entry.start + entry.duration))
        self.playback.buffer_max_s = max(self.playback.buffer_max_s, self._decoded_to - self._now_at())
        self._news.set()

    def _count(self, decoded: DecodedChunk) -> None:
        self.playback.video_frames += decoded.frames("video")
        self.playback.audio_frames += decoded.frames("audio")
        self.playback.decode_errors += decoded.errors

    # -- the clock --------------------------------------------------------------------------------

    def _now_at(self) -> float:
        """Where the clock stands, between two of its ticks."""
        p = self.playback
        if p.state != "playing":
            return p.position
        since = (monotonic() - self._clock_read) * self.options.speed
        return min(p.position + since, self._decoded_to)

    async def _run_clock(self) -> None:
        p = self.playback
        while self._decoded_to <= p.position and not self._loaded:
            await self._next_news()
        p.startup_s = monotonic() - self._began
        p.state = "playing"
        self._clock_read = monotonic()
        while True:
            self._advance()
            self._tell_view()
            p.buffered = self._decoded_to - p.position
            self.on_progress(p)
            if p.buffered > 1e-6:
                await asyncio.sleep(min(TICK, p.buffered / self.options.speed))
                continue
            if self._loaded:
                break
            if p.position >= p.end - 1e-6:
                await self._next_news()  # the end is shown; the last decoder output is still to come
                continue
            await self._stall()
        p.state = "ended"
        p.buffer_average_s = self._weighed / p.played_s if p.played_s else 0.0
        self.on_progress(p)

    def _advance(self) -> None:
        """Moves the clock on to now, but not past what is decoded."""
        p = self.playback
        now = monotonic()
        step = min((now - self._clock_read) * self.options.speed, self._decoded_to - p.position)
        ahead = self._decoded_to - p.position
        self._weighed += (ahead - step / 2) * step / self.options.speed
        p.played_s += step / self.options.speed
        p.position += step
        self._shown += step
        self._clock_read = now

    def _tell_view(self) -> None:
        """Once, beside the playback, which does not wait for it."""
        if self._view is None and self._shown >= min(VIEW, self.video.seconds / 2):
            self._view = asyncio.create_task(self.mesh.viewed(self.video.id, os.urandom(16)))

    def _notice_stall(self) -> None:
        """A chunk is here: if the clock ran dry before, and nobody looked meanwhile, that was a stall."""
        p = self.playback
        if p.state != "playing":
            return
        now = monotonic()
        dry = now - self._clock_read - (self._decoded_to - p.position) / self.options.speed
        if dry > LATE:
            self._advance()
            p.rebuffers += 1
            p.stall_s += dry
            self._clock_read = now

    async def _stall(self) -> None:
        p = self.playback
        p.state = "stalled"
        p.rebuffers += 1
        since = monotonic()
        reached = self._decoded_to
        while self._decoded_to <= reached and not self._loaded:
            await self._next_news()
            p.stall_s += monotonic() - since
            since = monotonic()
            self.on_progress(p)
        p.state = "playing"
        self._clock_read = monotonic()

    async def _next_news(self) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(TICK):
                await self._news.wait()
        except TimeoutError:
            pass

    def _measure(self, fetcher: ChunkFetcher) -> None:
        p = self.playback
        p.bytes_received = fetcher.bytes_received
        p.bytes_wasted = fetcher.bytes_wasted
        p.failover_max_s = max(fetcher.failover_times, default=0.0)


async def play(
    mesh: MeshClient,
    video: Video,
    options: PlayOptions | None = None,
    on_progress: Callable[[Playback], None] = lambda _: None,
) -> Playback:
    """Plays a video to its end. Raises MeshUnavailable, DamagedData, UsageError."""
    return await Player(mesh, video, options, on_progress).play()
