"""Carries out what the scheduler decides, and turns pieces into chunks.

A chunk leaves here only if its SHA-256 is the one its register names. If it is not, the pieces are compared
with theirs, and a bad one is fetched from elsewhere. When no named place has what is needed, the
register is read again: pieces move, and that is never an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from vstack import erasure
from vstack.client.scheduler import BestHolder, Fetch, PieceWanted, Scheduler, Wanted
from vstack.errors import DamagedData, MeshUnavailable, VstackError
from vstack.mesh.config import NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import (
    INIT_INDEX,
    ChunkEntry,
    ChunkRecord,
    UploadId,
    chunk_key,
    unpack_chunk,
    what,
)

PATIENCE = 20.0
"""Seconds without progress after which a chunk is given up."""


@dataclass(frozen=True)
class FetchedChunk:
    """A chunk, whole and verified, and where it came from."""

    entry: ChunkEntry
    parts: tuple[bytes | memoryview, ...]
    """Its bytes, as they came: most chunks are written somewhere, and need not be joined for that."""
    served: Mapping[NodeId, int]
    """Bytes by node."""
    seconds: float
    failovers: int
    """Blocks that a failed node had to leave to another."""

    @property
    def data(self) -> bytes:
        """All of it, joined anew each time."""
        return b"".join(self.parts)


class _Block(NamedTuple):
    node: NodeId
    data: memoryview


@dataclass(eq=False)
class _Job:
    record: ChunkRecord
    deadline: float
    began: float
    done: asyncio.Future[FetchedChunk]
    progress: float
    blocks: dict[int, dict[int, _Block]] = field(default_factory=dict)
    """What has arrived, by piece and offset: the sockets' own memory, joined once the piece is whole."""
    failovers: int = 0
    failed_at: float | None = None
    """When a request failed, until the next byte arrives."""
    rereads: int = 0


def holders(record: ChunkRecord, nodes: Collection[NodeId]) -> list[NodeId]:
    """Those of `nodes` that hold what a reader can use: one for each copy or different fragment.

    Fewer than `record.scheme.k` of them: without other nodes the chunk cannot be read.
    """
    useful = {place.node if record.scheme.k == 1 else place.piece: place.node
              for place in record.places if place.node in nodes}  # fmt: skip
    return list(useful.values())


class ChunkFetcher:
    """Fetches chunks of one upload. Use as `async with`; several `fetch` calls may overlap."""

    def __init__(
        self, mesh: MeshClient, video: str, upload: UploadId, scheduler: Scheduler | None = None
    ) -> None:
        self._mesh = mesh
        self._video = video
        self._upload = upload
        self._scheduler = scheduler or BestHolder(mesh.estimates)
        self._jobs: dict[int, _Job] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump: asyncio.Task[None] | None = None
        self.bytes_received = 0
        self.bytes_wasted = 0
        self.failures: deque[tuple[float, NodeId, str]] = deque(maxlen=1000)
        """When (monotonic seconds), who and why, for the last requests that failed."""
        self.failover_times: deque[float] = deque(maxlen=1000)
        """Seconds from a request's failure to the next byte for its chunk."""

    async def __aenter__(self) -> ChunkFetcher:
        self._pump = asyncio.create_task(self._run())
        self._pump.add_done_callback(self._on_end)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks, *([self._pump] if self._pump else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def fetch(self, record: ChunkRecord, within: float = 10.0) -> FetchedChunk:
        """The chunk, verified. `within` (seconds) says how urgent it is beside others.

        Raises MeshUnavailable (too few pieces can be had), DamagedData.
        """
        index = record.entry.index
        now = monotonic()
        job = _Job(record, now + within, now, asyncio.get_running_loop().create_future(), now)
        self._jobs[index] = job
        self._want(job)
        self._wake.set()
        try:
            return await job.done
        finally:
            del self._jobs[index]
            self._scheduler.forget(index)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """An error that nobody expected fails every fetch, instead of leaving it to wait for ever."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            for job in self._jobs.values():
                if not job.done.done():
                    job.done.set_exception(error)

    def _want(self, job: _Job) -> None:
        record = job.record
        holders: dict[int, list[NodeId]] = {}
        for place in record.places:
            holders.setdefault(place.piece, []).append(place.node)
        size = erasure.fragment_size(record.entry.size, record.scheme.k)
        pieces = {n: PieceWanted(size, tuple(nodes)) for n, nodes in holders.items()}
        self._scheduler.want(Wanted(record.entry.index, job.deadline, record.scheme.k, pieces))

    # -- the pump ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            now = monotonic()
            self._wake.clear()
            for fetch in self._scheduler.requests(now):
                self._spawn(self._get(fetch))
            while self._scheduler.stuck:
                self._spawn(self._reread(self._scheduler.stuck.pop()))
            self._finish_all()
            progress = 0.0
            for job in sorted(self._jobs.values(), key=lambda j: (j.deadline, j.record.entry.index)):
                # while a more urgent chunk gets on, this one only waits its turn
                progress = job.progress = max(progress, job.progress)
                if now - progress > PATIENCE and not job.done.done():
                    job.done.set_exception(self._too_few(job))
            wake = self._scheduler.next_wake()
            pause = 1.0 if wake is None else min(1.0, max(0.001, wake - now))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    async def _get(self, fetch: Fetch) -> None:
        job = self._jobs.get(fetch.chunk)
        if job is None:  # not wanted any more, and never asked for: the node has not failed
            self._scheduler.failed(fetch.number, monotonic(), gone=True)
            return
        record = job.record
        place = next((p for p in record.places if (p.node, p.piece) == (fetch.node, fetch.piece)), None)
        if place is None:  # the register was read again meanwhile, and names other places
            self._scheduler.failed(fetch.number, monotonic(), gone=True)
            return
        key = record.key(self._video, self._upload, place)
        try:
            data, info = await self._mesh.get_range(fetch.node, key, fetch.offset, fetch.length, timeout=10.0)
            size = erasure.fragment_size(record.entry.size, record.scheme.k)
            if len(data) != fetch.length or info.total != size:
                raise DamagedData(f"node {fetch.node[:8]} holds a piece of another size")
        except (NoAnswer, Refused, DamagedData) as e:
            gone = isinstance(e, DamagedData) or (
                isinstance(e, Refused) and e.code in ("not-found", "damaged", "refused", "io")
            )
            self.failures.append((monotonic(), fetch.node, str(e)))
            job.failovers += 1
            job.failed_at = job.failed_at or monotonic()
            self._scheduler.failed(fetch.number, monotonic(), gone=gone)
        else:
            self._take(fetch, job, data)
        self._wake.set()

    def _take(self, fetch: Fetch, job: _Job, data: memoryview) -> None:
        self.bytes_received += len(data)
        if not self._scheduler.received(fetch.number, monotonic()):
            self.bytes_wasted += len(data)
            return
        job.progress = monotonic()
        if job.failed_at is not None:
            self.failover_times.append(job.progress - job.failed_at)
            job.failed_at = None
        job.blocks.setdefault(fetch.piece, {})[fetch.offset] = _Block(fetch.node, data)
        self._finish_all()

    def _finish_all(self) -> None:
        while self._scheduler.finished:
            index, pieces = self._scheduler.finished.pop()
            finished = self._jobs.get(index)
            if finished is not None and not finished.done.done():
                self._spawn(self._finish(finished, pieces))

    async def _finish(self, job: _Job, pieces: tuple[int, ...]) -> None:
        """Puts the chunk together and checks it; if it is not what it should be, the pieces, for who is to
        blame. A chunk that has its hash says that the pieces were good."""
        record, entry = job.record, job.record.entry
        hashes = {place.piece: place.sha256 for place in record.places}
        blocks = {n: [b for _, b in sorted(job.blocks.get(n, {}).items())] for n in pieces}
        served: dict[NodeId, int] = {}
        for block in (b for found in blocks.values() for b in found):
            served[block.node] = served.get(block.node, 0) + len(block.data)

        def assemble() -> tuple[tuple[bytes | memoryview, ...], bool]:
            parts = _assemble({n: [b.data for b in found] for n, found in blocks.items()}, record)
            return parts, _sha256(parts) == entry.sha256

        def damaged() -> list[int]:
            return [n for n, found in blocks.items() if _sha256(b.data for b in found) != hashes[n]]

        parts, whole = await asyncio.to_thread(assemble)
        bad = [] if whole else await asyncio.to_thread(damaged)
        if job.done.done():
            return
        for n in bad:
            self._reject(job, n)
        if bad:
            job.failovers += len(bad)
            self._wake.set()
            return
        if not whole:
            job.done.set_exception(
                DamagedData(f"the pieces of {what(entry.index)} are as stored, but do not make it")
            )
            return
        job.done.set_result(FetchedChunk(entry, parts, served, monotonic() - job.began, job.failovers))

    def _reject(self, job: _Job, piece: int) -> None:
        """A damaged piece: whoever gave it is told, and asked for it no more. If several gave of it, whoever
        is to blame shows when all of it comes from one."""
        index = job.record.entry.index
        sources = {block.node for block in job.blocks.pop(piece).values()}
        certain = len(sources) == 1
        gave = "" if certain else "gave some of it, and "
        for node in sources:
            why = f"{gave}piece {piece} of {what(index)} is damaged"
            self.failures.append((monotonic(), node, why))
            self._spawn(self._report(job.record, piece, node))
        self._scheduler.reject(index, piece, sources.pop() if certain else None)

    async def _report(self, record: ChunkRecord, piece: int, node: NodeId) -> None:
        """Has the node that gave a damaged piece read it: what is bad there is repaired."""
        for place in record.places:
            if (place.node, place.piece) == (node, piece):
                key = record.key(self._video, self._upload, place)
                with contextlib.suppress(NoAnswer, Refused):
                    await self._mesh.inventory(node, [key], verified_within=0)

    async def _reread(self, index: int) -> None:
        """No named place has it: the register may name others by now."""
        job = self._jobs.get(index)
        if job is None or job.done.done():
            return
        job.rereads += 1
        await asyncio.sleep(min(2.0, 0.2 * job.rereads))
        if job.done.done():
            return
        if job.rereads > 5 or index == INIT_INDEX:
            job.done.set_exception(self._too_few(job))
            return
        try:
            found = await self._mesh.read(chunk_key(self._video, self._upload, index))
        except VstackError as e:
            if not job.done.done():
                job.done.set_exception(e)
            return
        if found.data is not None:
            record = unpack_chunk(found.data)
            if record.scheme != job.record.scheme:  # fragments became copies, or the other way round
                job.blocks.clear()
            job.record = record
        self._want(job)
        self._wake.set()

    def _too_few(self, job: _Job) -> VstackError:
        record = job.record
        named = {place.node for place in record.places}
        addresses = {m.node: m.address for m in self._mesh.members}
        why = reasons(((node, reason) for _, node, reason in self.failures if node in named), addresses)
        count = len(record.places)
        return MeshUnavailable(
            f"{what(record.entry.index)} of video {self._video[:8]} cannot be read: it takes "
            f"{'its only piece' if count == 1 else f'{record.scheme.k} of its {count} pieces'}, "
            f"and too few nodes give theirs ({why or 'none answers'})"
        )


def _assemble(
    pieces: Mapping[int, Sequence[bytes | memoryview]], record: ChunkRecord
) -> tuple[bytes | memoryview, ...]:
    """The chunk that k pieces make, each in parts. Nothing is copied if these are the chunk itself: a whole
    copy, or the first k fragments."""
    k, size = record.scheme.k, record.entry.size
    if sorted(pieces) != list(range(k)):
        joined = {n: parts[0] if len(parts) == 1 else b"".join(parts) for n, parts in pieces.items()}
        return erasure.decode_parts(joined, k, record.scheme.m, size)
    out: list[bytes | memoryview] = []
    left = size
    for part in (part for n in range(k) for part in pieces[n]):
        if left < len(part):
            part = part[:left]  # what is left out is padding
        if part:
            out.append(part)
            left -= len(part)
    return tuple(out)


def _sha256(parts: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def reasons(failures: Iterable[tuple[NodeId, str]], addresses: Mapping[NodeId, str]) -> str:
    """Why nodes failed, the last reason of each, in words; those that failed alike together.

    Reasons that differ only in the node's own id or address are alike.
    """
    last: dict[NodeId, str] = {}
    for node, reason in failures:
        address = addresses.get(node)
        own = [f"node {node[:8]} ", *([f"{address}: ", f"{address} "] if address else [])]
        for name in own:
            reason = reason.removeprefix(name)
        last.pop(node, None)
        last[node] = reason.replace(f" to {address}", "") if address else reason
    alike: dict[str, list[str]] = {}
    for node, reason in last.items():
        alike.setdefault(reason, []).append(node[:8])
    return "; ".join(f"{', '.join(nodes)}: {reason}" for reason, nodes in alike.items())
