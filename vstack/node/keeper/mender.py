"""Carries out what a chunk needs: read what is there, make what is missing, write it, verify it, and
only then let the register name it by compare-and-swap.

A keeper that loses the swap deletes nothing: what it wrote is garbage, and the holders know that by
themselves. A piece is used only if its SHA-256 is the one that the register names, a chunk only if its is.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from vstack import erasure
from vstack.errors import DamagedData, OutcomeUnknown, VstackError
from vstack.mesh.config import NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import Change
from vstack.mesh.messages import MAX_RANGE, Found, Held, Mismatch, Ok, PieceData
from vstack.mesh.registers import (
    INIT_INDEX,
    REPLICATED,
    ChunkRecord,
    Generation,
    InitPiece,
    PieceKey,
    Place,
    Scheme,
    UploadId,
    VideoRecord,
    chunk_key,
    init_record,
    pack,
    unpack_chunk,
    unpack_video,
    upload_id,
    video_key,
)
from vstack.node.keeper.budget import Budget
from vstack.node.keeper.plan import Nodes, Reason, Work, alike, plan, settled, sound

TRIES = 3
"""How often a chunk is planned anew, at most, because nodes did not take their pieces: others may."""
BUSY_TRIES = 20
"""How often a node that is busy is asked again before it counts as failed."""
PIECE_TIMEOUT = 20.0
"""Seconds that a node has for one piece."""

T = TypeVar("T")


class Mesh(Protocol):
    """What is needed of `MeshClient`."""

    async def read(self, key: str) -> Found: ...

    async def change(self, change: Change) -> Ok | Mismatch: ...

    async def put_piece(
        self, node: NodeId, key: PieceKey, scheme: Scheme, chunk_length: int, sha256: bytes,
        payload: bytes | memoryview, *, timeout: float = ..., purpose: str = ...,
    ) -> bool: ...  # fmt: skip

    async def get_range(
        self, node: NodeId, key: PieceKey, offset: int, length: int, *, timeout: float
    ) -> tuple[memoryview, PieceData]: ...

    async def inventory(
        self,
        node: NodeId,
        keys: Sequence[PieceKey],
        *,
        verified_within: int | None = ...,
        timeout: float = ...,
    ) -> list[Held]: ...


Offload = Callable[..., Awaitable[Any]]
"""As asyncio.to_thread: what takes long must not hold up the loop."""


@dataclass(frozen=True)
class Target:
    """A chunk, or the init segment, of one upload."""

    video: str
    upload: UploadId
    index: int

    @property
    def key(self) -> str:
        """Of the register that names its pieces."""
        if self.index == INIT_INDEX:
            return video_key(self.video)
        return chunk_key(self.video, self.upload, self.index)


@dataclass
class Mended:
    """What became of one chunk."""

    outcome: str
    """done, nothing (it needs nothing), overtaken (somebody else changed it), unknown, failed."""
    work: Work | None = None
    why: str = ""
    closed: dict[NodeId, str] = field(default_factory=dict)
    """Nodes that did not take their pieces, and why."""
    bad: list[Place] = field(default_factory=list)
    """Places whose pieces turned out to be absent or damaged."""
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_restored: int = 0
    """Of what was written, what counts now."""


class _Unreadable(VstackError):
    """Too few pieces can be had."""


class _Open(NamedTuple):
    """A register that was read to be changed."""

    version: int
    record: ChunkRecord
    video: VideoRecord | None
    """If the init segment is meant: its register is the video's."""


class Mender:
    """Belongs to one event loop; several `mend` calls may overlap."""

    def __init__(
        self,
        mesh: Mesh,
        node: NodeId,
        boot: int,
        budget: Budget,
        offload: Offload,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`numbers`: last part of the generations that it writes; another mender of this boot has others."""
        self._mesh = mesh
        self._node = node
        self._boot = boot
        self._budget = budget
        self._offload = offload
        self._numbers = count(1) if numbers is None else numbers

    async def mend(self, target: Target, wanted: Scheme, nodes: Nodes, bad: Collection[Place] = ()) -> Mended:
        """Reads the register anew, and does what it calls for. Raises nothing that a node or the mesh can
        cause: it is in the outcome."""
        done = Mended("nothing")
        try:
            for _ in range(TRIES):
                found = await self._read(target)
                if found is None:
                    return done
                closed = len(done.closed)
                nodes = replace(nodes, closed={*nodes.closed, *done.closed})
                work = plan(target.video, found.record, wanted, nodes, bad)
                if work is None:
                    return done
                done.work = work
                await self._do(target, found, done, nodes, bad)
                if done.outcome != "failed" or len(done.closed) == closed:
                    return done
        except OutcomeUnknown as e:
            done.outcome, done.why = "unknown", str(e)
        except (VstackError, msgspec.DecodeError) as e:  # a register that a newer version has written
            done.outcome, done.why = "failed", str(e)
        return done

    # -- registers --------------------------------------------------------------------------------

    async def _read(self, target: Target) -> _Open | None:
        """None if there is nothing to keep any more."""
        is_init = target.index == INIT_INDEX
        found = await self._mesh.read(target.key)
        if found.data is None:
            return None
        if not is_init:
            return _Open(found.version, unpack_chunk(found.data), None)
        video = unpack_video(found.data)
        if video.init is None or upload_id(video, found.version) != target.upload:
            return None
        return _Open(found.version, init_record(video.init), video)

    async def _commit(self, target: Target, found: _Open, record: ChunkRecord) -> bool:
        """False if somebody else was quicker. Raises OutcomeUnknown."""
        if found.video is None:
            data = pack(record)
        else:
            init = InitPiece(record.entry.size, record.entry.sha256, record.places)
            video = msgspec.structs.replace(found.video, init=init, upload=target.upload)
            data = pack(video)
        return isinstance(await self._mesh.change(Change(target.key, found.version, data)), Ok)

    # -- the work ---------------------------------------------------------------------------------

    async def _do(
        self, target: Target, found: _Open, done: Mended, nodes: Nodes, bad: Collection[Place]
    ) -> None:
        work, record = done.work, found.record
        assert work is not None
        payloads = await self._payloads(target, record, work, nodes, bad, done)
        generation = Generation(found.version, self._node, self._boot, next(self._numbers))
        new: list[Place] = []
        for piece, node in work.write:
            _, sha256 = payloads[piece]
            new.append(Place(node, piece, sha256, generation))
        purpose = "repair"
        if work.reason is Reason.SWITCH:
            purpose = "demotion" if work.scheme.k > 1 else "upload"
        every = [*work.heal, *new]
        took = await asyncio.gather(
            *(self._write(target, record, work.scheme, p, payloads[p.piece][0], purpose, done) for p in every)
        )
        written = [p for p, ok in zip(every, took, strict=True) if ok and p in new]
        healed = sum(ok for p, ok in zip(every, took, strict=True) if p not in new)
        size = erasure.fragment_size(record.entry.size, work.scheme.k)
        if not alike(record.scheme, work.scheme) and len(written) < len(new):
            done.outcome, done.why = "failed", "not all nodes took their pieces"
            return
        if every and not written:  # the register stays as it is
            done.outcome, done.why = ("done", "") if healed else ("failed", "no node took its piece")
            done.bytes_restored = healed * size
            return
        relied_on = [p for p in work.keep if p.node not in nodes.gone]
        if not every and not await self._are_there(target, record, relied_on, done):
            done.outcome, done.why = "failed", "not all pieces that are to be relied on are there"
            return
        places = settled(record, work, written)
        if await self._commit(target, found, ChunkRecord(record.entry, work.scheme, places)):
            done.outcome, done.bytes_restored = "done", (len(written) + healed) * size
        else:
            done.outcome = "overtaken"

    async def _are_there(
        self, target: Target, record: ChunkRecord, places: Sequence[Place], done: Mended
    ) -> bool:
        """Whether all of them are on their disks, verified now: others are given up for them."""
        for place in places:
            key = record.key(target.video, target.upload, place)
            held = await self._patiently(
                lambda place=place, key=key: self._mesh.inventory(  # type: ignore[misc]
                    place.node, [key], verified_within=0, timeout=PIECE_TIMEOUT
                )
            )
            if held[0].state != "present" or held[0].sha256 != place.sha256:
                done.bad.append(place)
        return not done.bad

    async def _payloads(
        self,
        target: Target,
        record: ChunkRecord,
        work: Work,
        nodes: Nodes,
        bad: Collection[Place],
        done: Mended,
    ) -> dict[int, tuple[bytes, bytes]]:
        """The pieces to be written, by number, with their hashes. Raises _Unreadable."""
        numbers = {p for p, _ in work.write} | {p.piece for p in work.heal}
        if not numbers:
            return {}
        sources = [p for p in sound(record, nodes, bad) if p.node not in nodes.closed]
        sources += [p for p in sound(record, nodes, bad) if p not in sources]
        same = record.scheme == work.scheme and work.scheme.k > 1
        out: dict[int, tuple[bytes, bytes]] = {}
        if same:
            for place in [p for p in sources if p.piece in numbers]:
                data = await self._fetch(target, record, place, done)
                if data is not None:
                    out[place.piece] = (data, place.sha256)
        if numbers <= out.keys():
            return out
        chunk = await self._chunk(target, record, sources, done)
        scheme = work.scheme
        if scheme.k == 1:
            return {0: (chunk, record.entry.sha256)}
        pieces, hashes = await self._offload(erasure.encode_hashed, chunk, *scheme)
        if same:
            for place in record.places:
                if hashes[place.piece] != place.sha256:
                    raise _Unreadable(f"fragment {place.piece} would not be the one that its register names")
        return {n: (pieces[n], hashes[n]) for n in numbers}

    async def _chunk(
        self, target: Target, record: ChunkRecord, sources: Sequence[Place], done: Mended
    ) -> bytes:
        """The whole chunk, from any k of its pieces. Raises _Unreadable."""
        k = record.scheme.k
        waiting = list(sources)
        have: dict[int, bytes] = {}
        while len(have) < k:
            batch, waiting = waiting[: k - len(have)], waiting[k - len(have) :]
            if not batch:
                raise _Unreadable(f"{k} pieces are needed, and {len(have)} can be had")
            for place, data in zip(
                batch,
                await asyncio.gather(*(self._fetch(target, record, p, done) for p in batch)),
                strict=True,
            ):
                if data is not None:
                    have[place.piece] = data
        try:
            chunk: bytes = await self._offload(_decode, have, record)
        except DamagedData as e:
            raise _Unreadable(str(e)) from e
        return chunk

    async def _fetch(self, target: Target, record: ChunkRecord, place: Place, done: Mended) -> bytes | None:
        """One piece, verified; None if it cannot be had there."""
        size = erasure.fragment_size(record.entry.size, record.scheme.k)
        key = record.key(target.video, target.upload, place)
        await self._budget.take(size)
        parts: list[memoryview] = []
        try:
            for offset in range(0, size, MAX_RANGE):
                length = min(MAX_RANGE, size - offset)
                data, info = await self._patiently(
                    lambda offset=offset, length=length: self._mesh.get_range(  # type: ignore[misc]
                        place.node, key, offset, length, timeout=PIECE_TIMEOUT
                    )
                )
                if len(data) != length or info.total != size:
                    raise DamagedData("a piece of another size")
                parts.append(data)
        except NoAnswer:
            return None
        except Refused as e:
            if e.code in ("not-found", "damaged"):
                done.bad.append(place)
            return None
        except DamagedData:
            done.bad.append(place)
            return None
        payload, sha256 = await self._offload(_join, parts)
        done.bytes_read += size
        if sha256 == place.sha256:
            found: bytes = payload
            return found
        done.bad.append(place)
        try:  # whoever holds it is to look, and to put it in quarantine
            await self._mesh.inventory(place.node, [key], verified_within=0, timeout=PIECE_TIMEOUT)
        except (NoAnswer, Refused):
            pass
        return None

    async def _write(
        self,
        target: Target,
        record: ChunkRecord,
        scheme: Scheme,
        place: Place,
        payload: bytes,
        purpose: str,
        done: Mended,
    ) -> bool:
        """Whether the piece is on that node's disk now, read back and verified."""
        key = PieceKey(target.video, target.upload, target.index, place.piece, place.generation)
        await self._budget.take(len(payload))
        try:
            await self._patiently(
                lambda: self._mesh.put_piece(
                    place.node, key, scheme, record.entry.size, place.sha256, payload,
                    timeout=PIECE_TIMEOUT, purpose=purpose,
                )
            )  # fmt: skip
            done.bytes_written += len(payload)
            held = await self._patiently(
                lambda: self._mesh.inventory(place.node, [key], verified_within=0, timeout=PIECE_TIMEOUT)
            )
        except (NoAnswer, Refused) as e:
            done.closed[place.node] = str(e)
            return False
        if held[0].state == "present" and held[0].sha256 == place.sha256:
            return True
        done.closed[place.node] = "what it wrote is not what it was given"
        return False

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks again while the node says that it is busy. Raises NoAnswer, Refused, DamagedData."""
        for attempt in range(BUSY_TRIES):
            try:
                return await ask()
            except Refused as e:
                if e.code not in ("busy", "late") or attempt == BUSY_TRIES - 1:
                    raise
            await asyncio.sleep(min(1.0, 0.05 * 2**attempt))
        raise AssertionError


def wanted_of(video: VideoRecord, index: int) -> Scheme:
    """How a chunk of the video is to be kept; the init segment is always whole."""
    return REPLICATED if index == INIT_INDEX else video.wanted


def _join(parts: Sequence[memoryview]) -> tuple[bytes, bytes]:
    payload = b"".join(parts)
    return payload, hashlib.sha256(payload).digest()


def _decode(pieces: dict[int, bytes], record: ChunkRecord) -> bytes:
    """Raises DamagedData."""
    data = erasure.decode(pieces, record.scheme.k, record.scheme.m, record.entry.size)
    if hashlib.sha256(data).digest() != record.entry.sha256:
        raise DamagedData("the pieces are as stored, but do not make the chunk")
    return data
