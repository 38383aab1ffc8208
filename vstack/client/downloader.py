"""`get`: all chunks of a video, in order, as one ordinary file or as a stream.

Chunks are fetched ahead while earlier ones are written; the writing, which is FFmpeg's and blocks,
runs in a thread and pulls from a bounded queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vstack.client import output
from vstack.client.catalogue import Video, chunk_table
from vstack.client.fetcher import ChunkFetcher, FetchedChunk
from vstack.errors import DamagedData
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ChunkRecord, Media, init_record

AHEAD_BYTES = 16 << 20
"""Chunk bytes that are fetched before they are needed."""


_Parts = tuple[bytes | memoryview, ...]
"""Of a chunk, in order."""


@dataclass(frozen=True)
class Downloaded:
    """What a `get` did."""

    bytes: int
    chunks: int
    seconds: float
    served: dict[NodeId, int]
    """Bytes by node."""
    failovers: int


async def in_order(fetcher: ChunkFetcher, table: Sequence[ChunkRecord]) -> AsyncIterator[FetchedChunk]:
    """The chunks of `table` in order, fetching up to AHEAD_BYTES beyond the one that is waited for."""
    tasks: list[asyncio.Task[FetchedChunk]] = []
    sizes: list[int] = []
    ahead = iter(table)
    upcoming = next(ahead, None)
    try:
        while tasks or upcoming is not None:
            while upcoming is not None and (not tasks or sum(sizes) + upcoming.entry.size <= AHEAD_BYTES):
                # an earlier chunk is more urgent: deadlines are a second apart
                tasks.append(asyncio.create_task(fetcher.fetch(upcoming, within=10.0 + len(tasks))))
                sizes.append(upcoming.entry.size)
                upcoming = next(ahead, None)
            yield await tasks[0]
            del tasks[0], sizes[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fetch_init(fetcher: ChunkFetcher, video: Video) -> bytes:
    """The init segment; empty where the container needs none."""
    init = video.record.init
    return b"" if init is None else (await fetcher.fetch(init_record(init), within=1.0)).data


def media_of(video: Video) -> Media:
    """Raises DamagedData if the register of a ready video has none."""
    if video.record.media is None:
        raise DamagedData(f"the register of video {video.id[:12]} says nothing of its media")
    return video.record.media


async def download(
    mesh: MeshClient,
    video: Video,
    target: Path | BinaryIO,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    table: Sequence[ChunkRecord] | None = None,
) -> Downloaded:
    """Writes the video: to a path as an ordinary seekable file, to an open file as a stream.

    `table` is the video's chunk table, if it is known already. A path appears only when it is whole.
    `on_progress` gets (bytes done, bytes in all). Raises MeshUnavailable, DamagedData, VstackError (the
    container does not go into that kind of file).
    """
    began = time.monotonic()
    if table is None:
        table = await chunk_table(mesh, video)
    media = media_of(video)
    served: dict[NodeId, int] = {}
    failovers = done = 0
    pipe: queue.Queue[_Parts | None] = queue.Queue(maxsize=4)
    over = threading.Event()

    def chunks() -> Iterator[bytes | memoryview]:
        while not over.is_set() and (parts := pipe.get()) is not None:
            yield from parts
        if over.is_set():
            raise InterruptedError

    def write(init: bytes) -> None:
        if isinstance(target, Path):
            output.write_file(media, init, chunks(), target)
            return
        for part in output.stream(media, init, chunks()):
            target.write(part)
        target.flush()

    async with ChunkFetcher(mesh, video.id, video.upload) as fetcher:
        init = await fetch_init(fetcher, video)
        writer = _in_thread(lambda: write(init))
        try:
            async for chunk in in_order(fetcher, table):
                if not await _hand_over(pipe, chunk.parts, writer):
                    break
                done += chunk.entry.size
                failovers += chunk.failovers
                for node, size in chunk.served.items():
                    served[node] = served.get(node, 0) + size
                on_progress(done, video.record.size)
            else:
                await _hand_over(pipe, None, writer)
            await writer
        except BaseException:
            over.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    pipe.get_nowait()
            pipe.put_nowait(None)
            if isinstance(target, Path):  # it removes its temporary file; a pipe may never be read again
                await asyncio.wait({writer})
            raise
    return Downloaded(done, len(table), time.monotonic() - began, served, failovers)


async def _hand_over(
    pipe: queue.Queue[_Parts | None], parts: _Parts | None, writer: asyncio.Future[None]
) -> bool:
    """Whether the writer takes it: not if it has ended."""
    while not writer.done():
        try:
            pipe.put_nowait(parts)
        except queue.Full:
            await asyncio.sleep(0.005)
        else:
            return True
    return False


def _in_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """Runs `work` in a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    # Whoever gave up on it does not ask how it ended.
    done.add_done_callback(lambda f: f.cancelled() or f.exception())

    def settle(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - it is handed on
            error = e
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="writer", daemon=True).start()
    return done
