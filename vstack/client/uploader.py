"""Upload: a file becomes chunks on nodes, and a video in the catalogue.

    hash the source -> open the video register -> for each chunk, several at once:
    cut, encode, place, write pieces, register -> turn the video register to ready

The id is the SHA-256 of the source. Everything up to the last step can be repeated: pieces of an
upload have the same names and bytes each time, registers are created by compare-and-swap, and
chunks that are registered already are skipped. So an upload that was interrupted resumes where it
stopped, and a repeated one copies nothing, unless too few pieces of some chunk are left on members of
the mesh: then all of it is stored anew. The video is visible only once it is ready.

A chunk counts as uploaded when its pieces are on disk, those outside any one node still number k,
and its register is chosen. Never earlier.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vstack import erasure
from vstack.client.catalogue import MAX_TITLE, Video, read_video
from vstack.client.chunker import Chunk, CutRules, Ingest, ProofFailed, recipe
from vstack.client.fetcher import holders
from vstack.client.pieces import Encoded, PieceWriter, TooFewNodes
from vstack.errors import BadInput, MeshUnavailable, VstackError
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.messages import Mismatch
from vstack.mesh.placement import choose_scheme, shortfall, takers
from vstack.mesh.registers import (
    INIT_INDEX,
    REPLICATED,
    SPARE,
    ChunkEntry,
    ChunkRecord,
    InitPiece,
    Media,
    Redundancy,
    Scheme,
    UploadId,
    VideoRecord,
    chunk_key,
    chunk_prefix,
    given_up,
    init_record,
    pack,
    table_hash,
    unpack_chunk,
    unpack_video,
    video_key,
)

IN_FLIGHT_BYTES = 24 << 20
"""Chunk bytes that are being written at once, before redundancy."""
GATHER, GATHER_SECONDS = 16, 0.1
"""Registers that are created together, and how long the first of them waits for those that are to come."""
HASH_BLOCK = 1 << 20
END_TRIES = 20
"""How often the end of an upload is written again, because its register was changed meanwhile."""


@dataclass(frozen=True)
class UploadOptions:
    title: str = ""
    """Empty: unchanged for a known video; for a new one `new_title`, or the file's name without extension."""
    redundancy: Redundancy | None = None
    """None: auto for a new video, unchanged for a known one."""
    erasure: Scheme | None = None
    """How fragments are made. None: as the mesh's policy says for a new video, unchanged for a known one."""
    opaque: bool = False
    salvage: bool = False
    rules: CutRules = field(default_factory=CutRules)
    new_title: str = ""


@dataclass
class Progress:
    """What an upload is doing; given to the callback whenever it changes."""

    stage: str = "checking"
    """checking, hashing, uploading, finishing or done."""
    done: int = 0
    """Bytes of the source."""
    total: int = 0
    resumed: int = 0
    """Chunks that were there already."""
    chunks: int = 0


@dataclass(frozen=True)
class UploadResult:
    video: Video
    state: str
    """new, resumed, present, updated, undeleted, or restored: known, but not all of it could be read any
    more, so that it was stored anew."""
    chunks: int
    resumed: int
    seconds: float
    warnings: tuple[str, ...]


class LostToAnother(VstackError):
    """Somebody else aborted or replaced this upload meanwhile."""


async def upload(
    mesh: MeshClient,
    path: Path,
    options: UploadOptions | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    accept_losses: Callable[[tuple[str, ...]], bool] = lambda _: True,
) -> UploadResult:
    """Stores `path`; its video is readable by everybody when this returns.

    `accept_losses` is asked once, with what the stored form would not keep, if that is anything.
    Raises BadInput, MeshUnavailable, OutcomeUnknown, LostToAnother. Cancelling it loses nothing: the
    same call resumes.
    """
    options = options or UploadOptions()
    progress = Progress()
    on_progress(progress)
    began = time.monotonic()
    make = _IngestFactory(path, options)
    ingest = await asyncio.to_thread(make, None)
    if ingest.lost and not accept_losses(ingest.lost):
        raise BadInput(f"{path} was not stored, because this would be lost: {'; '.join(ingest.lost)}")
    progress.total, progress.stage = ingest.source_size, "hashing"
    was = _look(path)
    over = threading.Event()
    hashing = asyncio.create_task(asyncio.to_thread(_hash_file, path, progress, on_progress, over))
    try:
        while True:
            run = _Upload(mesh, path, was, options, ingest, progress, on_progress)
            try:
                video, state = await run.run(hashing)
            except ProofFailed:
                with suppress(VstackError):
                    await run.abort()
                if not ingest.alternatives:
                    raise
                ingest = await asyncio.to_thread(make, ingest.alternatives[0])
                continue
            except BadInput:
                with suppress(VstackError):
                    await run.abort()
                raise
            progress.stage, progress.done = "done", progress.total
            on_progress(progress)
            seconds = time.monotonic() - began
            return UploadResult(
                video, state, video.record.chunks, progress.resumed, seconds, tuple(run.warnings)
            )
    finally:
        over.set()  # a thread cannot be cancelled: it is told
        hashing.cancel()


@dataclass(frozen=True)
class _IngestFactory:
    path: Path
    options: UploadOptions

    def __call__(self, container: str | None) -> Ingest:
        o = self.options
        return Ingest(self.path, o.rules, container=container, opaque=o.opaque, salvage=o.salvage)


def _look(path: Path) -> tuple[int, int, int]:
    """What differs if somebody writes to the file: it is read twice, and must be the same both times."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _hash_file(
    path: Path, progress: Progress, on_progress: Callable[[Progress], None], over: threading.Event
) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK))  # one for all: fresh memory costs as much as the reading
    with path.open("rb", buffering=0) as f:
        while (size := f.readinto(block)) and not over.is_set():
            digest.update(block[:size])
            progress.done += size
            on_progress(progress)
    return digest.hexdigest()


class _Upload:
    """One try at one upload, with one way of cutting."""

    def __init__(
        self,
        mesh: MeshClient,
        path: Path,
        was: tuple[int, int, int],
        options: UploadOptions,
        ingest: Ingest,
        progress: Progress,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.mesh = mesh
        self.id = ""
        """Known when the file is hashed."""
        self.path = path
        self.was = was
        self.options = options
        self.ingest = ingest
        self.progress = progress
        self.on_progress = on_progress
        self.warnings: list[str] = []
        self._open: Video | None = None
        self._before: Video | None = None
        """What this upload replaces, if that could not be read any more."""
        self._registrar = _Registrar(mesh)
        self._writer: PieceWriter

    async def run(self, hashing: asyncio.Task[str]) -> tuple[Video, str]:
        """`hashing` gives the video's id."""
        chunks = self.ingest.chunks()
        # It goes on while the file is hashed and its register opened.
        first = asyncio.create_task(self._begin(chunks))
        try:
            self.id = await hashing
            self._writer = PieceWriter(self.mesh, self.id)
            return await self._run(chunks, first)
        finally:
            await asyncio.wait({first})
            if not first.cancelled():
                first.exception()  # whoever needed the chunk has seen it
            chunks.close()

    async def _begin(self, chunks: Iterator[Chunk]) -> tuple[Chunk | None, Encoded | None]:
        """The first chunk, and its fragments if it is to have some."""
        chunk = await _next(chunks)
        wanted = self.options.erasure or Scheme(*self.mesh.config.policy.erasure)
        scheme = choose_scheme(wanted, len(self.mesh.members))
        if chunk is None or scheme.k == 1 or self.options.redundancy == "replicated":
            return chunk, None
        return chunk, Encoded(scheme, *await asyncio.to_thread(erasure.encode_hashed, chunk.data, *scheme))

    async def _run(
        self, chunks: Generator[Chunk], first: asyncio.Task[tuple[Chunk | None, Encoded | None]]
    ) -> tuple[Video, str]:
        opened = await self._open_upload(None, 0)  # mostly it is new, and then it need not be looked for
        if opened is None:
            self.warnings.clear()  # they were those of a new video
        while opened is None:
            # One read gives both: what is there, and the version that a change of it has to name.
            register = await self.mesh.read(video_key(self.id))
            found = None
            if register.data is not None:
                found = Video(self.id, register.version, unpack_video(register.data))
            self._before = None
            if found is not None and found.record.state in ("ready", "deleted"):
                lost = await self._lost_chunks(found)
                if not lost:
                    updated = await self._update(found)
                    if updated is None:
                        continue
                    return updated
                self._before = found
                self._warn(
                    f"of what was there, {lost} chunk{'' if lost == 1 else 's'} cannot be read any more: "
                    "too few of their pieces are on nodes of the mesh. All of it was stored anew"
                )
            if found is not None and found.record.state == "purging":
                raise VstackError(
                    f"video {self.id[:12]} is being removed for good: try again when that is done"
                )
            opened = await self._open_upload(found, register.version)
        self._open, known = opened
        self.progress.stage, self.progress.done = "uploading", 0
        self.on_progress(self.progress)
        entries, init, media = await self._store_chunks(self._open.upload, known, chunks, first)
        if _look(self.path) != self.was:
            raise BadInput(f"{self.path} was changed while it was being stored: store it when it is at rest")
        self.progress.stage = "finishing"
        self.on_progress(self.progress)
        record = msgspec.structs.replace(
            self._open.record,
            state="ready",
            upload=self._open.upload,
            media=_bounded(media),
            init=init,
            chunks=len(entries),
            size=sum(e.size for e in entries),
            table=table_hash(entries),
            waited=0,
            before=b"",
        )
        pack(record, spare=SPARE)
        state = "restored" if self._before is not None else "resumed" if known else "new"
        return await self._finish(record), state

    async def abort(self) -> None:
        """Gives the upload up, if it was opened: its pieces are garbage from now on. What it was to replace
        stands again. If somebody else ended it meanwhile, that stands."""
        if self._open is not None:
            await self._end(self._open, given_up(self._open.record, self._open.upload))

    async def _end(self, opened: Video, record: VideoRecord) -> Video | None:
        """Writes what follows the open upload; None if that is not open any more. Its register may have been
        written meanwhile without ending it: nodes count in it how long it has been open."""
        version = opened.version
        for _ in range(END_TRIES):
            outcome = await self.mesh.change(Change(video_key(self.id), version, pack(record)))
            if not isinstance(outcome, Mismatch):
                return Video(self.id, outcome.version, record)
            now = None if outcome.data is None else unpack_video(outcome.data)
            if now is None or (now.state, now.upload) != ("uploading", opened.upload):
                break
            version = outcome.version
        return None

    # -- the video register -----------------------------------------------------------------------

    async def _lost_chunks(self, found: Video) -> int:
        """How many chunks of a known video have lost their register, or have fewer than k pieces on members
        of the mesh; the init segment counts as one. Raises MeshUnavailable if it cannot be known."""
        page = await self.mesh.list(chunk_prefix(found.id, found.upload))
        records = [unpack_chunk(row.data) for row in page.rows]
        video = found.record
        if len(records) != video.chunks or table_hash([c.entry for c in records]) != video.table:
            if not page.complete:
                raise MeshUnavailable(
                    f"video {found.id[:12]} is known, but cannot be checked: {len(page.silent)} of "
                    f"{len(self.mesh.members)} nodes do not answer. Start them, and put the file again"
                )
            if len(records) >= video.chunks:
                return video.chunks  # a table that is not the one it was is worth nothing
        needed = records + ([init_record(video.init)] if video.init is not None else [])
        if any(self.mesh.config.member(p.node) is None for c in needed for p in c.places):
            await self.mesh.refresh()  # the node may be a newer member than this client knows
        nodes = self.mesh.config.nodes
        lost = sum(len(holders(c, nodes)) < c.scheme.k for c in needed)
        return lost + video.chunks - len(records)

    def _title(self, stands: str = "") -> str:
        """`stands`: the title of a known video, if it is one."""
        title = self.options.title or stands or self.options.new_title or self.path.stem
        if len(title) > MAX_TITLE:
            self._warn(f"the title is cut to {MAX_TITLE} characters")
        return title[:MAX_TITLE]

    async def _open_upload(
        self, found: Video | None, expect: int
    ) -> tuple[Video, dict[int, ChunkRecord]] | None:
        """The open upload, ours or one to go on with, and the chunks that it has already. None if
        somebody else was quicker: look again."""
        wanted = f"{recipe(self.options.rules)}; {self.ingest.container}"
        if found is not None and found.record.state == "uploading" and found.record.recipe == wanted:
            if self._title() != found.record.title and self.options.title:
                self._warn(f"an upload under the title {found.record.title!r} goes on: it stands")
            if self.options.redundancy not in (None, found.record.redundancy):
                self._warn(
                    f"an upload with redundancy {found.record.redundancy} goes on, not "
                    f"{self.options.redundancy}: put the file again when it is done to change that"
                )
            if self.options.erasure not in (None, found.record.erasure):
                self._warn(
                    f"an upload as {found.record.erasure.name} goes on: put the file again when it is done "
                    "to change that"
                )
            page = await self.mesh.list(chunk_prefix(self.id, found.upload))
            known = [unpack_chunk(row.data) for row in page.rows]
            return found, {r.entry.index: r for r in known}
        before = self._before.record if self._before is not None else None
        stands = b"" if found is None else found.record.before
        if self._before is not None:
            stands = pack(msgspec.structs.replace(self._before.record, upload=self._before.upload))
        record = VideoRecord(
            state="uploading",
            title=self._title(before.title if before else ""),
            redundancy=self.options.redundancy or (before.redundancy if before else "auto"),
            recipe=wanted,
            source_size=self.ingest.source_size,
            erasure=self.options.erasure
            or (before.erasure if before else Scheme(*self.mesh.config.policy.erasure)),
            before=stands,
        )
        outcome = await self.mesh.change(Change(video_key(self.id), expect, pack(record)))
        return None if isinstance(outcome, Mismatch) else (Video(self.id, outcome.version, record), {})

    async def _update(self, found: Video) -> tuple[Video, str] | None:
        """The bytes are here already: a new title or redundancy, or the return of what was deleted. None if
        somebody else was quicker: look again."""
        record = msgspec.structs.replace(
            found.record,
            state="ready",
            upload=found.upload,
            title=self._title() if self.options.title else found.record.title,
            redundancy=self.options.redundancy or found.record.redundancy,
            erasure=self.options.erasure or found.record.erasure,
            waited=found.record.waited if found.record.state == "ready" else 0,
        )
        if record == msgspec.structs.replace(found.record, upload=found.upload):
            return found, "present"
        outcome = await self.mesh.change(Change(video_key(self.id), found.version, pack(record)))
        if isinstance(outcome, Mismatch):
            return None
        state = "undeleted" if found.record.state == "deleted" else "updated"
        return Video(self.id, outcome.version, record), state

    async def _finish(self, record: VideoRecord) -> Video:
        assert self._open is not None
        done = await self._end(self._open, record)
        if done is not None:
            return done
        now = await read_video(self.mesh, self.id)
        if now is not None and now.record.state == "ready" and now.record.table == record.table:
            return now  # another client finished the same upload
        raise LostToAnother(f"the upload of {self.path} was aborted or replaced by somebody else: try again")

    # -- the chunks -------------------------------------------------------------------------------

    async def _store_chunks(
        self,
        upload: UploadId,
        known: dict[int, ChunkRecord],
        chunks: Iterator[Chunk],
        first: asyncio.Task[tuple[Chunk | None, Encoded | None]],
    ) -> tuple[list[ChunkEntry], InitPiece | None, Media]:
        assert self._open is not None
        scheme = self._scheme(self._open.record.wanted)
        entries: list[ChunkEntry] = []
        room = _Room(IN_FLIGHT_BYTES)
        init: asyncio.Task[InitPiece | None] | None = None
        with one_error():
            async with asyncio.TaskGroup() as group:
                chunk, encoded = await first
                while chunk is not None:
                    if init is None:
                        init = group.create_task(self._store_init(upload))
                    entries.append(chunk.entry)
                    self.progress.chunks = len(entries)
                    there = known.get(chunk.entry.index)
                    if there is not None:
                        if there.entry != chunk.entry:
                            raise ProofFailed(
                                f"{self.path} is cut differently than in the upload that was begun"
                            )
                        self.progress.resumed += 1
                        self._tell()
                    else:
                        await room.take(len(chunk.data))
                        group.create_task(self._store_chunk(upload, chunk, scheme, room, encoded))
                    chunk, encoded = await _next(chunks), None
        if init is None:
            raise BadInput(f"{self.path} holds nothing to store")
        return entries, init.result(), self.ingest.media

    def _scheme(self, wanted: Scheme) -> Scheme:
        nodes = len(takers(self.mesh.members))
        scheme = choose_scheme(wanted, nodes)
        short = shortfall(wanted, scheme)
        if short:
            which = "" if nodes == len(self.mesh.members) else " that take pieces"
            self._warn(f"{short}: the mesh has {nodes} node{'' if nodes == 1 else 's'}{which}")
        return scheme

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    async def _store_chunk(
        self, upload: UploadId, chunk: Chunk, scheme: Scheme, room: _Room, encoded: Encoded | None
    ) -> None:
        entry, wanted = chunk.entry, scheme
        with self._registrar.expecting():
            try:
                places = await self._writer.write(
                    upload, entry.index, chunk.data, entry.sha256, scheme, encoded
                )
            except TooFewNodes:
                if scheme.k == 1:
                    raise
                # Too few nodes are up for fragments: whole copies on those that are, if that is safe.
                scheme = REPLICATED
                places = await self._writer.write(upload, entry.index, chunk.data, entry.sha256, scheme)
            finally:
                room.give(len(chunk.data))
                del chunk, encoded  # they are not needed while the register waits for others
        short = shortfall(wanted, Scheme(1, len(places)) if scheme.k == 1 else scheme)
        if short:
            self._warn(f"{short}: some nodes are down")
        record = ChunkRecord(entry, scheme, places)
        key = chunk_key(self.id, upload, entry.index)
        outcome = await self._registrar.create(Change(key, 0, pack(record)))
        if isinstance(outcome, Mismatch):
            theirs = unpack_chunk(outcome.data) if outcome.data is not None else None
            if theirs is None or theirs.entry != entry:
                raise LostToAnother(f"chunk {entry.index} of {self.path} was registered with other content")
        self._tell()

    def _tell(self) -> None:
        self.progress.done = self.ingest.progress
        self.on_progress(self.progress)

    async def _store_init(self, upload: UploadId) -> InitPiece | None:
        data = self.ingest.init
        if not data:
            return None
        scheme = choose_scheme(REPLICATED, len(takers(self.mesh.members)))
        sha256 = hashlib.sha256(data).digest()
        places = await self._writer.write(upload, INIT_INDEX, data, sha256, scheme)
        return InitPiece(len(data), sha256, places)


async def _next(chunks: Iterator[Chunk]) -> Chunk | None:
    """The next chunk, cut in a thread. Told to end meanwhile, it lets the thread finish that chunk, so
    that the source can be closed."""
    step = asyncio.get_running_loop().run_in_executor(None, next, chunks, None)
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        await asyncio.wait({step})
        raise


@contextmanager
def one_error() -> Iterator[None]:
    """Raises the first error of a task group by itself: what a caller can name and catch."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _bounded(media: Media) -> Media:
    """Keeps the register small: of what was lost, the first few lines."""
    if len(media.lost) <= 8:
        return media
    more = f"and {len(media.lost) - 7} more"
    return msgspec.structs.replace(media, lost=(*(line[:120] for line in media.lost[:7]), more))


class _Room:
    """Lets chunks of so many bytes be under way at once; one alone may be larger."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        while self._used and self._used + size > self._size:
            self._freed.clear()
            await self._freed.wait()
        self._used += size

    def give(self, size: int) -> None:
        self._used -= size
        self._freed.set()


class _Registrar:
    """Creates registers in batches: while one batch is under way, or others are to come soon, the next
    gathers. Each batch costs every node messages and an fsync."""

    def __init__(self, mesh: MeshClient) -> None:
        self._mesh = mesh
        self._waiting: list[tuple[Change, asyncio.Future[object]]] = []
        self._task: asyncio.Task[None] | None = None
        self._expected = 0
        self._news = asyncio.Event()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Inside, something is done after which a register is to be created: it may be waited for."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1
            self._news.set()

    async def create(self, change: Change) -> object:
        """Ok or Mismatch. Raises OutcomeUnknown."""
        done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await done

    async def _gather(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                while self._expected and len(self._waiting) < GATHER:
                    self._news.clear()
                    await self._news.wait()

    async def _run(self) -> None:
        while self._waiting:
            await self._gather()
            batch, self._waiting = self._waiting, []
            try:
                outcomes = await self._mesh.change_all([change for change, _ in batch])
            except Exception as e:  # noqa: BLE001 - whatever it is, those who wait have to know
                for _, done in batch:
                    if not done.done():
                        done.set_exception(e)
                continue
            for (_, done), outcome in zip(batch, outcomes, strict=True):
                if not done.done():
                    done.set_result(outcome)
