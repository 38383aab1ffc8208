"""Who uses the mesh: uploads that go through, break off or are given up; deletes, undeletes, pins and views.

Each does what the true client does with registers and pieces, in the same order.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from tests.keeper_sim.ledger import Held
from tests.keeper_sim.mesh import CLIENT, SimMesh
from vstack import erasure
from vstack.errors import MeshUnavailable, OutcomeUnknown
from vstack.mesh.config import NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import Change
from vstack.mesh.messages import Mismatch, Ok
from vstack.mesh.placement import choose_scheme, next_holder, order, survives, takers
from vstack.mesh.registers import (
    INIT_INDEX,
    REPLICATED,
    ChunkEntry,
    ChunkRecord,
    Generation,
    InitPiece,
    PieceKey,
    Place,
    Scheme,
    Slot,
    UploadId,
    VideoRecord,
    ViewRecord,
    chunk_key,
    given_up,
    pack,
    unpack_video,
    unpack_views,
    upload_id,
    uploaded,
    video_key,
    views_key,
)

if TYPE_CHECKING:
    from tests.keeper_sim.world import World


class _GivenUp(Exception):
    """The client says that it could not do it."""


def content(video: str, index: int) -> bytes:
    """The bytes of a chunk: they follow from its name."""
    seed = hashlib.sha256(f"{video}/{index}".encode()).digest()
    return (seed * 4)[: 1 + seed[0] % 100]


class Clients:
    def __init__(self, world: World) -> None:
        self._world = world
        self._mesh = SimMesh(world, CLIENT)
        self._tasks: set[asyncio.Task[None]] = set()
        self.videos = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(world.profile.videos)]
        self.unclaimed: set[Held] = set()
        """Pieces of uploads that no register has ever heard of."""

    async def run(self) -> None:
        """Until it is cancelled."""
        w = self._world
        for video in self.videos:
            self._begin(self.upload, video)
        while True:
            await asyncio.sleep(w.random.expovariate(w.profile.uses))
            kinds: tuple[Callable[[str], Coroutine[Any, Any, None]], ...] = (
                self.upload, self.upload, self.upload_anew, self.delete, self.delete, self.undelete,
                self.undelete, self.pin, self.view, self.view, self.put_unclaimed,
            )  # fmt: skip
            self._begin(w.random.choice(kinds), w.random.choice(self.videos))

    async def end(self) -> None:
        """All that goes on comes to its end."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(self, do: Callable[[str], Coroutine[Any, Any, None]], video: str) -> None:
        w = self._world
        task = w.loop.create_task(self._try(do, video))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if w.chance(0.15):  # somebody pulls the plug
            w.loop.call_later(w.random.uniform(0.0, 3.0), task.cancel)

    async def _try(self, do: Callable[[str], Coroutine[Any, Any, None]], video: str) -> None:
        try:
            await do(video)
        except (MeshUnavailable, OutcomeUnknown, NoAnswer, Refused, _GivenUp):
            self._world.figures["given up"] += 1
        else:
            self._world.figures[do.__name__] += 1

    # -- uploads ----------------------------------------------------------------------------------

    async def upload(self, video: str) -> None:
        await self._upload(video, anew=False)

    async def upload_anew(self, video: str) -> None:
        """Somebody whose client says that the video cannot be read any more."""
        await self._upload(video, anew=True)

    async def _upload(self, video: str, *, anew: bool) -> None:
        w = self._world
        found = await self._mesh.read(video_key(video))
        record = None if found.data is None else unpack_video(found.data)
        before: tuple[UploadId, VideoRecord] | None = None
        if record is not None and record.state in ("ready", "deleted"):
            before = upload_id(record, found.version), record
            if not anew:
                again = msgspec.structs.replace(record, state="ready", upload=before[0], waited=0)
                await self._mesh.change(Change(video_key(video), found.version, pack(again)))
                return
        if record is not None and record.state == "purging":
            raise _GivenUp
        known: set[int] = set()
        if record is not None and record.state == "uploading":
            upload = upload_id(record, found.version)
            page = await self._mesh.list(f"chunk/{video}/{upload}/")
            known = {int(row.key[-8:]) for row in page.rows}
            version = found.version
        else:
            record = VideoRecord(
                state="uploading", title="t", redundancy="auto", recipe="r", source_size=1,
                erasure=Scheme(*w.profile.erasure),
                before=b"" if before is None else pack(msgspec.structs.replace(before[1], upload=before[0])),
            )  # fmt: skip
            outcome = await self._mesh.change(Change(video_key(video), found.version, pack(record)))
            if isinstance(outcome, Mismatch):
                raise _GivenUp
            upload = upload_id(record, outcome.version)
            version = outcome.version
        chunks = w.profile.chunks
        made = await asyncio.gather(
            *(self._store(video, upload, i, record.wanted) for i in range(chunks) if i not in known),
            return_exceptions=True,
        )
        failed = next((m for m in made if isinstance(m, BaseException)), None)
        init: InitPiece | None = None
        if failed is None:
            data = content(video, INIT_INDEX)
            scheme = choose_scheme(REPLICATED, len(takers(w.config.members)))
            places = await self._write(video, upload, INIT_INDEX, data, scheme)
            init = InitPiece(len(data), hashlib.sha256(data).digest(), places)
        if failed is not None or w.chance(0.1):
            if w.chance(0.5):
                await self._end(video, upload, version, given_up(record, upload))
            raise failed or _GivenUp
        ready = msgspec.structs.replace(
            record, state="ready", upload=upload, init=init, chunks=chunks, waited=0, before=b""
        )  # fmt: skip
        await self._end(video, upload, version, ready)

    async def _end(self, video: str, upload: UploadId, version: int, record: VideoRecord) -> None:
        while True:
            outcome = await self._mesh.change(Change(video_key(video), version, pack(record)))
            if isinstance(outcome, Ok):
                return
            now = None if outcome.data is None else unpack_video(outcome.data)
            if now is None or now.state != "uploading" or upload_id(now, outcome.version) != upload:
                raise _GivenUp
            version = outcome.version

    async def _store(self, video: str, upload: UploadId, index: int, wanted: Scheme) -> None:
        data = content(video, index)
        scheme = choose_scheme(wanted, len(takers(self._world.config.members)))
        try:
            places = await self._write(video, upload, index, data, scheme)
        except _GivenUp:
            if scheme.k == 1:
                raise
            scheme = REPLICATED
            places = await self._write(video, upload, index, data, scheme)
        entry = ChunkEntry(index, index, 1, len(data), hashlib.sha256(data).digest())
        record = ChunkRecord(entry, scheme, places)
        await self._mesh.change(Change(chunk_key(video, upload, index), 0, pack(record)))

    async def _write(
        self, video: str, upload: UploadId, index: int, data: bytes, scheme: Scheme
    ) -> tuple[Place, ...]:
        pieces = erasure.encode(data, scheme.k, scheme.m)
        hashes = [hashlib.sha256(p).digest() for p in pieces]
        ranked = order(takers(self._world.config.members), video, index)
        unusable: set[NodeId] = set()
        taken: dict[int, NodeId] = {}
        todo = list(range(scheme.m))
        while todo:
            tries: list[tuple[int, NodeId]] = []
            for piece in todo:
                now = [*taken.values(), *(n for _, n in tries)]
                member = next_holder(ranked, now, unusable)
                if member is None:
                    raise _GivenUp
                if scheme.k > 1 or member.node not in now:
                    tries.append((piece, member.node))
            if not tries:
                break
            for piece, node in tries:
                number = 0 if scheme.k == 1 else piece
                key = PieceKey(video, upload, index, number, uploaded(scheme))
                try:
                    await self._mesh.put_piece(node, key, scheme, len(data), hashes[piece], pieces[piece])
                    taken[piece] = node
                except (NoAnswer, Refused):
                    unusable.add(node)
            todo = [p for p in todo if p not in taken]
        if not survives(scheme, list(taken.values())) and len(self._world.config.members) > 1:
            raise _GivenUp
        return tuple(
            Place(node, 0 if scheme.k == 1 else piece, hashes[piece], uploaded(scheme))
            for piece, node in sorted(taken.items())
        )

    async def put_unclaimed(self, video: str) -> None:
        """A piece of an upload that no register has heard of, or does not remember."""
        w = self._world
        node = w.random.choice(w.members())
        upload = UploadId(w.config.epoch, 1 << 60)
        key = PieceKey(video, upload, 0, 0, Generation(1 << 60, node.id, 1, w.random.getrandbits(30)))
        self.unclaimed.add(Held(node.id, key))
        await self._mesh.put_piece(node.id, key, Scheme(1, 3), 5, hashlib.sha256(b"lost?").digest(), b"lost?")

    # -- what else is done with videos ------------------------------------------------------------

    async def _edit(self, video: str, edit: Callable[[VideoRecord], VideoRecord | None]) -> None:
        for _ in range(5):
            found = await self._mesh.read(video_key(video))
            record = None if found.data is None else unpack_video(found.data)
            edited = None if record is None else edit(record)
            if edited is None or record is None:
                raise _GivenUp
            named = msgspec.structs.replace(edited, upload=upload_id(record, found.version))
            outcome = await self._mesh.change(Change(video_key(video), found.version, pack(named)))
            if isinstance(outcome, Ok):
                return

    async def delete(self, video: str) -> None:
        await self._edit(video, lambda r: _moved(r, ("ready",), "deleted"))

    async def undelete(self, video: str) -> None:
        await self._edit(video, lambda r: _moved(r, ("deleted",), "ready"))

    async def pin(self, video: str) -> None:
        w = self._world
        redundancy = w.random.choice(("auto", "replicated", "erasure"))
        code = w.random.choice((Scheme(3, 5), Scheme(2, 3)))
        await self._edit(
            video,
            lambda r: (
                msgspec.structs.replace(r, redundancy=redundancy, erasure=code)
                if r.state == "ready"
                else None
            ),
        )

    async def view(self, video: str) -> None:
        """Many at once."""
        w = self._world
        key = views_key(video, w.day)
        found = await self._mesh.read(key)
        slots: Sequence[Slot] = () if found.data is None else unpack_views(found.data).slots
        views = (slots[0].views if slots else 0) + w.random.choice((3, 9, 14))
        record = ViewRecord((Slot(bytes(16), 1, views),))
        await self._mesh.change(Change(key, found.version, pack(record)))


def _moved(record: VideoRecord, states: Sequence[str], to: str) -> VideoRecord | None:
    if record.state not in states:
        return None
    return msgspec.structs.replace(record, state=to, waited=0)
