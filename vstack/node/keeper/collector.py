"""The collector: decides what becomes of the pieces that lie on this node and that no register names.

A pass goes through the own store, video by video, beside the registers. What `garbage` would drop becomes
a candidate, and is dropped only when it has been one for the policy's grace, on this node's monotonic clock;
when a fresh quorum read still says so; and, for a chunk that is to live on, when each piece that its register
names has been verified on its node since. A restart begins the grace anew.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import msgspec

from vstack.errors import MeshUnavailable, OutcomeUnknown, VstackError
from vstack.mesh.config import NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import Change
from vstack.mesh.messages import Ok
from vstack.mesh.registers import (
    INIT_INDEX,
    ChunkRecord,
    InitPiece,
    PieceKey,
    RecordTooLarge,
    UploadId,
    VideoRecord,
    chunk_key,
    chunk_prefix,
    pack,
    unpack_chunk,
    unpack_video,
    video_key,
)
from vstack.node.keeper.garbage import (
    Register,
    Verdict,
    adopted,
    init_register,
    is_init,
    judge,
    judge_by_video,
)
from vstack.node.keeper.keeper import Mesh, Sight, rest
from vstack.node.keeper.mender import Offload
from vstack.node.keeper.voice import Voice
from vstack.node.pieces import PieceInfo

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_CANDIDATES = 200_000
"""Pieces that wait for their grace to pass; of more, the next pass takes note."""
PAGE = 1000
_OVER = 1 << 63
"""In the place of a register's version where no register can name a piece any more."""


class Store(Protocol):
    """What is needed of `ChunkStore`."""

    def list(
        self, prefix: bytes = b"", after: bytes = b"", limit: int = 1000
    ) -> builtins.list[PieceInfo]: ...

    def quarantined(self) -> builtins.list[PieceInfo]: ...

    def delete(self, keys: Iterable[PieceKey]) -> None: ...

    def verify(self, key: PieceKey) -> PieceInfo: ...


@dataclass
class _Candidate:
    """A piece that nothing names."""

    since: float
    length: int
    open_at: int | None = None
    """The version of the register up to which a change under way may still name the piece."""

    def look(self, verdict: Verdict, version: int, now: float) -> None:
        """Takes what the register says now. If others have moved it past `open_at`, the piece may have been
        named for a while, and somebody may be reading it: its grace begins anew."""
        if self.open_at is not None and version > self.open_at:
            self.since, self.open_at = now, None
        if verdict is Verdict.FENCE:
            self.open_at = version


class Collector:
    """Belongs to one event loop. `run` until it is cancelled."""

    def __init__(
        self,
        mesh: Mesh,
        node: NodeId,
        store: Store,
        sight: Callable[[], Sight],
        gone: Callable[[], frozenset[NodeId]],
        now: Callable[[], float],
        offload: Offload,
    ) -> None:
        """`gone`: members that have been silent for longer than the policy's delay."""
        self._mesh = mesh
        self._me = node
        self._store = store
        self._sight = sight
        self._gone = gone
        self._now = now
        self._offload = offload
        self._candidates: dict[PieceKey, _Candidate] = {}
        self._hasten = asyncio.Event()
        self.figures: Counter[str] = Counter()
        """Since the start: gc_passes, gc_passes_begun, gc_dropped, gc_dropped_bytes, gc_fenced, ..."""
        self._state: dict[str, float] = {}
        self._voice = Voice(log, now)

    def hasten(self) -> None:
        """The next pass begins at once."""
        self._hasten.set()

    def state(self) -> dict[str, float]:
        """What the last pass found, and the figures of `figures`."""
        return self._state | {k: float(v) for k, v in self.figures.items()}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._hasten.clear()
            self.figures["gc_passes_begun"] += 1
            began = self._now()
            try:
                await self.collect()
                self.figures["gc_passes"] += 1
            except VstackError as e:
                self._voice.warn("pass", f"the pass over the pieces was broken off: {e}")
            except Exception:  # noqa: BLE001 - the log has it
                self._voice.fail("pass", "the pass over the pieces failed")
            took = self._now() - began
            self._state["gc_pass_s"] = took
            await rest(self._now, took, lambda: self._sight().config.policy.grace, self._hasten.is_set)

    # -- one pass ---------------------------------------------------------------------------------

    async def collect(self) -> None:
        """Goes through the whole store once. Raises VstackError if it cannot be read."""
        tally: Counter[str] = Counter()
        seen: set[PieceKey] = set()
        after = b""
        while page := await self._offload(self._store.list, b"", after, PAGE):
            after = page[-1].key.pack()
            seen |= await self._go_through(page, tally)
        # What was found damaged is garbage like any other piece, once nothing names it any more.
        seen |= await self._go_through(await self._offload(self._store.quarantined), tally)
        for key in self._candidates.keys() - seen:
            del self._candidates[key]
        tally["waiting"] = len(self._candidates)
        tally["waiting_bytes"] = sum(c.length for c in self._candidates.values())
        self._state = {f"gc_{k}": float(v) for k, v in tally.items()}

    async def _go_through(self, page: Sequence[PieceInfo], tally: Counter[str]) -> set[PieceKey]:
        """Judges pieces, in the order of their keys, and drops what may go; the candidates among them."""
        seen: set[PieceKey] = set()
        for (video, upload), group in groupby(page, lambda info: (info.key.video, info.key.upload)):
            pieces = list(group)
            try:
                candidates = await self._judge(video, upload, pieces, tally)
                seen |= candidates.keys()
                await self._drop(video, upload, candidates)
            except (MeshUnavailable, OutcomeUnknown, NoAnswer, Refused, RecordTooLarge):
                tally["unknown"] += len(pieces)  # nothing is known of them: they stay candidates, or none
                seen |= {p.key for p in pieces} & self._candidates.keys()
        return seen

    async def _judge(
        self, video: str, upload: UploadId, pieces: Sequence[PieceInfo], tally: Counter[str]
    ) -> dict[PieceKey, PieceInfo]:
        """Of the pieces of one upload, those that may go once their grace is over."""
        register = await self._read_video(video)
        chunks: dict[int, Register[ChunkRecord]] = {}
        if any(judge_by_video(p.key, register) is None for p in pieces):
            chunks = await self._read_chunks(video, upload, {p.key.chunk for p in pieces}, register)
        now = self._now()
        found: dict[PieceKey, PieceInfo] = {}
        for info in pieces:
            chunk = chunks.get(info.key.chunk, Register[ChunkRecord](0, None))
            verdict = judge(self._me, info.key, register, chunk)
            tally[verdict.value] += 1
            tally[f"{verdict.value}_bytes"] += info.length
            if verdict not in (Verdict.DROP, Verdict.FENCE):
                self._candidates.pop(info.key, None)
            elif info.key in self._candidates or len(self._candidates) < MAX_CANDIDATES:
                candidate = self._candidates.setdefault(info.key, _Candidate(now, info.length))
                candidate.look(verdict, chunk.version if info.key.chunk in chunks else _OVER, now)
                found[info.key] = info
        return found

    async def _read_video(self, video: str) -> Register[VideoRecord]:
        """Raises MeshUnavailable."""
        found = await self._mesh.read(video_key(video))
        return Register(found.version, None if found.data is None else _decoded(unpack_video, found.data))

    async def _read_chunk(self, video: str, upload: UploadId, index: int) -> Register[ChunkRecord]:
        """Raises MeshUnavailable."""
        found = await self._mesh.read(chunk_key(video, upload, index))
        return Register(found.version, None if found.data is None else _decoded(unpack_chunk, found.data))

    async def _read_chunks(
        self, video: str, upload: UploadId, indexes: set[int], register: Register[VideoRecord]
    ) -> dict[int, Register[ChunkRecord]]:
        """The registers that name the pieces of chunks `indexes`. What a listing does not have is read by
        itself: it may be a tombstone, or not be there. Raises MeshUnavailable."""
        chunks: dict[int, Register[ChunkRecord]] = {}
        page = await self._mesh.list(chunk_prefix(video, upload))
        for row in page.rows:
            chunks[int(row.key[-8:])] = Register(row.version, _decoded(unpack_chunk, row.data))
        for index in indexes:
            if index == INIT_INDEX:
                chunks[index] = init_register(register)
            elif index not in chunks:
                chunks[index] = await self._read_chunk(video, upload, index)
        return chunks

    # -- what is to go ----------------------------------------------------------------------------

    async def _drop(self, video: str, upload: UploadId, candidates: dict[PieceKey, PieceInfo]) -> None:
        """Deletes those whose grace is over, if the registers still say so. Adopts those that are needed."""
        due: dict[int, list[PieceKey]] = defaultdict(list)
        for key in candidates:
            due[key.chunk].append(key)
        register: Register[VideoRecord] | None = None
        for index, keys in due.items():
            if register is None:
                register = await self._read_video(video)
            said = judge_by_video(keys[0], register)
            if said is Verdict.DROP:
                await self._delete([k for k in keys if self._is_ripe(k, said, _OVER)])
            if said is not None:
                continue
            chunk = (
                init_register(register) if is_init(keys[0]) else await self._read_chunk(video, upload, index)
            )
            if await self._adopt(keys, candidates, register, chunk):
                register = None if is_init(keys[0]) else register
                continue
            verdicts = {k: judge(self._me, k, register, chunk) for k in keys}
            unnamed = [k for k, v in verdicts.items() if v in (Verdict.DROP, Verdict.FENCE)]
            ripe = [k for k in unnamed if self._is_ripe(k, verdicts[k], chunk.version)]
            if any(self._candidates[k].open_at is not None for k in ripe):
                await self._fence(ripe, register, chunk)
                register = None if is_init(keys[0]) else register
                continue
            gone = [k for k in ripe if verdicts[k] is Verdict.DROP]
            if gone and (chunk.record is None or await self._is_whole(gone, chunk.record)):
                await self._delete(gone)

    def _is_ripe(self, key: PieceKey, verdict: Verdict, version: int) -> bool:
        """Whether the grace of a candidate is over, its register being as it is."""
        candidate, now = self._candidates[key], self._now()
        candidate.look(verdict, version, now)
        return now - candidate.since >= self._sight().config.policy.grace

    async def _delete(self, keys: Sequence[PieceKey]) -> None:
        if keys:
            await self._offload(self._store.delete, keys)
            for key in keys:
                self.figures["gc_dropped"] += 1
                self.figures["gc_dropped_bytes"] += self._candidates.pop(key).length

    async def _is_whole(self, keys: Sequence[PieceKey], record: ChunkRecord) -> bool:
        """Whether every piece that the register names has been verified where it should be, since the first
        of `keys` was found to be named no more."""
        since = max(self._candidates[k].since for k in keys)
        within = max(0, int(self._now() - since))
        video, upload = keys[0].video, keys[0].upload
        live = {m.node for m in self._sight().config.members}
        by_node: dict[NodeId, list[tuple[PieceKey, bytes]]] = defaultdict(list)
        for place in record.places:
            by_node[place.node].append((record.key(video, upload, place), place.sha256))
        if len(record.places) < record.scheme.m or not by_node.keys() <= live:
            return False
        for node, named in by_node.items():
            held = await self._mesh.inventory(
                node, [k for k, _ in named], verified_within=within, timeout=20.0
            )
            for (_, sha256), answer in zip(named, held, strict=True):
                if answer.state != "present" or answer.sha256 != sha256:
                    return False
        return True

    async def _fence(
        self, keys: Sequence[PieceKey], register: Register[VideoRecord], chunk: Register[ChunkRecord]
    ) -> None:
        """Moves the register on, as it is: whoever was about to name one of the pieces has to look again."""
        if chunk.record is not None and await self._write(keys[0], register, chunk, chunk.record):
            self.figures["gc_fenced"] += 1
            for key in keys:
                self._candidates[key].open_at = None

    async def _adopt(
        self,
        keys: Sequence[PieceKey],
        candidates: dict[PieceKey, PieceInfo],
        register: Register[VideoRecord],
        chunk: Register[ChunkRecord],
    ) -> bool:
        """Names one of the pieces in place of the same one that was lost with its node, if there is one."""
        config = self._sight().config
        member = config.member(self._me)
        if chunk.record is None or member is None or member.draining:
            return False
        members = set(config.nodes) - self._gone()
        for key in keys:
            record = adopted(self._me, key, candidates[key].sha256, chunk.record, members)
            if record is None:
                continue
            try:
                await self._offload(self._store.verify, key)
            except (VstackError, OSError):
                continue
            candidate = self._candidates[key]
            open_at, candidate.open_at = candidate.open_at, chunk.version
            if await self._write(key, register, chunk, record):
                self.figures["gc_adopted"] += 1
                del self._candidates[key]
                return True
            candidate.open_at = open_at  # it has certainly not happened
        return False

    async def _write(
        self,
        key: PieceKey,
        register: Register[VideoRecord],
        chunk: Register[ChunkRecord],
        record: ChunkRecord,
    ) -> bool:
        """Whether the register that names pieces like `key` holds `record` now, by compare-and-swap."""
        assert register.record is not None
        if is_init(key):
            init = InitPiece(record.entry.size, record.entry.sha256, record.places)
            video = msgspec.structs.replace(register.record, init=init, upload=key.upload)
            change = Change(video_key(key.video), register.version, pack(video))
        else:
            change = Change(chunk_key(key.video, key.upload, key.chunk), chunk.version, pack(record))
        return isinstance(await self._mesh.change(change), Ok)


def _decoded(unpack: Callable[[bytes], R], data: bytes) -> R:
    """Raises MeshUnavailable for what a newer version has written: nothing can be said of its pieces."""
    try:
        return unpack(data)
    except msgspec.DecodeError as e:
        raise MeshUnavailable(f"a register cannot be understood: {e}") from e
