"""Keepers that are wrong on purpose, each in one way: each must be caught, or the invariants lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import msgspec

from tests.keeper_sim.world import Parts
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import Page
from vstack.mesh.messages import Listing, Row
from vstack.mesh.registers import (
    ChunkRecord,
    Generation,
    PieceKey,
    Place,
    UploadId,
    VideoRecord,
    chunk_key,
    chunk_prefix,
    unpack_chunk,
)
from vstack.node.keeper import collector, garbage, keeper, mender
from vstack.node.keeper.collector import Collector
from vstack.node.keeper.garbage import Register, Verdict
from vstack.node.keeper.keeper import Keeper, Sight, Video
from vstack.node.keeper.mender import Mended, Mender
from vstack.node.keeper.plan import Nodes, Work
from vstack.node.pieces import PieceInfo

Functions = tuple[tuple[object, str, Callable[..., object]], ...]
REAL = Parts()


@dataclass(frozen=True)
class Mutant:
    """Other classes in the place of the true ones, or other functions in their modules."""

    parts: Parts = REAL
    functions: Functions = ()

    @contextmanager
    def in_force(self) -> Iterator[Parts]:
        with ExitStack() as stack:
            for module, name, function in self.functions:
                stack.enter_context(patch.object(module, name, function))
            yield self.parts


# -- collectors -----------------------------------------------------------------------------------


def _verdicts(changed: dict[Verdict, Verdict]) -> Functions:
    """What is judged as one is judged as another."""

    def judge(
        me: NodeId, key: PieceKey, video: Register[VideoRecord], chunk: Register[ChunkRecord]
    ) -> Verdict:
        said = garbage.judge(me, key, video, chunk)
        return changed.get(said, said)

    def judge_by_video(key: PieceKey, video: Register[VideoRecord]) -> Verdict | None:
        said = garbage.judge_by_video(key, video)
        return None if said is None else changed.get(said, said)

    return (collector, "judge", judge), (collector, "judge_by_video", judge_by_video)


class WithoutGrace(Collector):
    def __init__(self, mesh: Any, node: NodeId, store: Any, sight: Callable[[], Sight], *others: Any) -> None:
        def hurried() -> Sight:
            config, down = sight()
            policy = msgspec.structs.replace(config.policy, grace=0)
            return Sight(msgspec.structs.replace(config, policy=policy), down)

        super().__init__(mesh, node, store, hurried, *others)


class WithoutLook(Collector):
    async def _is_whole(self, keys: Sequence[PieceKey], record: ChunkRecord) -> bool:
        return True


class FromTheListing(Collector):
    async def _read_chunk(self, video: str, upload: UploadId, index: int) -> Register[ChunkRecord]:
        page = await self._mesh.list(chunk_prefix(video, upload))
        for row in page.rows:
            if row.key == chunk_key(video, upload, index):
                return Register(row.version, unpack_chunk(row.data))
        return Register(1 << 62, None)


class _Unseen:
    """A store that says that everything is as it should be."""

    def __init__(self, store: Any) -> None:
        self.list, self.delete, self.quarantined = store.list, store.delete, store.quarantined

        self.info = store.get

    def verify(self, key: PieceKey) -> PieceInfo:
        info: PieceInfo = self.info(key).info
        return info


class AdoptsUnseen(Collector):
    def __init__(self, mesh: Any, node: NodeId, store: Any, *others: Any) -> None:
        super().__init__(mesh, node, _Unseen(store), *others)


class _StillOld(collector._Candidate):
    def look(self, verdict: Verdict, version: int, now: float) -> None:
        since = self.since
        super().look(verdict, version, now)
        self.since = since


class ForgetsAdoption(Collector):
    async def _adopt(
        self,
        keys: Sequence[PieceKey],
        candidates: dict[PieceKey, PieceInfo],
        register: Register[VideoRecord],
        chunk: Register[ChunkRecord],
    ) -> bool:
        try:
            return await super()._adopt(keys, candidates, register, chunk)
        finally:
            for key in keys:
                if key in self._candidates:
                    self._candidates[key].open_at = None


# -- keepers --------------------------------------------------------------------------------------


class _Complete:
    """A mesh whose listings never miss anything, as it says."""

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, name)

    async def list(self, prefix: str) -> Page:
        page: Page = await self._mesh.list(prefix)
        page.complete = True
        return page

    async def pages(self, prefix: str) -> AsyncIterator[Listing]:
        async for page in self._mesh.pages(prefix):
            yield msgspec.structs.replace(page, complete=True)


class TrustsListings(Keeper):
    def __init__(self, mesh: Any, *others: Any) -> None:
        super().__init__(_Complete(mesh), *others)


class ByTheClock(Keeper):
    def __init__(
        self,
        mesh: Any,
        node: NodeId,
        mender: Mender,
        sight: Callable[[], Sight],
        now: Callable[[], float],
        today: Callable[[], int],
    ) -> None:
        super().__init__(mesh, node, mender, sight, lambda: now() + 86_400.0 * today(), today)


class PurgesAtOnce(Keeper):
    async def _change(self, video: Video, **changes: object) -> Video | None:
        if changes.get("state") != "purging":
            return await super()._change(video, **changes)
        await self._delete((await self._mesh.list(f"chunk/{video.id}/")).rows)
        return await super()._change(video, **changes)


class AsksNobody(Keeper):
    async def _inventory(
        self, video: Video, records: Sequence[ChunkRecord], nodes: Nodes
    ) -> tuple[set[Place], bool]:
        return set(), True


class CountsAllTime(Keeper):
    async def _count_time(self, video: Video, chunks: int) -> Video | None:
        if video.id in self._waiting:
            self._waiting[video.id].version = video.version
        return await super()._count_time(video, chunks)


def _all_of_them(rows: Sequence[Row], video: Video) -> list[Row]:
    return list(rows)


# -- menders --------------------------------------------------------------------------------------


class NamesBeforeWriting(Mender):
    async def _write(self, *arguments: Any) -> bool:
        writing = asyncio.create_task(super()._write(*arguments))
        await asyncio.wait([writing], timeout=0.0)
        return True


class FailedWritesCount(Mender):
    async def _write(self, *arguments: Any) -> bool:
        await super()._write(*arguments)
        return True


class ExpectsWhateverIsThere(Mender):
    async def _commit(self, target: Any, found: Any, record: ChunkRecord) -> bool:
        now = await self._mesh.read(target.key)
        return await super()._commit(target, found._replace(version=now.version), record)


class ReliesOnTheUnseen(Mender):
    async def _are_there(
        self, target: Any, record: ChunkRecord, places: Sequence[Place], done: Mended
    ) -> bool:
        return True


def _forgets_old_places(record: ChunkRecord, work: Work, written: Sequence[Place]) -> tuple[Place, ...]:
    return (*work.keep, *work.heal, *written)


def _one_name_for_all(against: int, *_: Any) -> Generation:
    return Generation(against, "5a" * 16, 1, 1)


def _always(*_: Any) -> bool:
    return True


MUTANTS: dict[str, Mutant] = {
    "no-fence": Mutant(functions=_verdicts({Verdict.FENCE: Verdict.DROP})),
    "no-grace": Mutant(Parts(collector=WithoutGrace)),
    "named-pieces-are-not-looked-at": Mutant(Parts(collector=WithoutLook)),
    "absent-is-deleted": Mutant(functions=_verdicts({Verdict.UNCLAIMED: Verdict.DROP})),
    "open-uploads-are-garbage": Mutant(functions=_verdicts({Verdict.STAYS: Verdict.DROP})),
    "garbage-stays": Mutant(functions=_verdicts({Verdict.DROP: Verdict.NAMED})),
    "a-listing-decides": Mutant(Parts(collector=FromTheListing)),
    "adopts-what-it-has-not-seen": Mutant(Parts(collector=AdoptsUnseen)),
    "named-meanwhile-is-no-matter": Mutant(functions=((collector, "_Candidate", _StillOld),)),
    "adoptions-under-way-are-forgotten": Mutant(Parts(collector=ForgetsAdoption)),
    "newer-uploads-are-deleted": Mutant(functions=((keeper, "_older", _all_of_them),)),
    "listings-are-complete": Mutant(Parts(keeper=TrustsListings)),
    "windows-by-the-clock": Mutant(Parts(keeper=ByTheClock)),
    "purges-before-it-says-so": Mutant(Parts(keeper=PurgesAtOnce)),
    "nobody-is-asked": Mutant(Parts(keeper=AsksNobody)),
    "time-is-counted-twice": Mutant(Parts(keeper=CountsAllTime)),
    "names-before-writing": Mutant(Parts(mender=NamesBeforeWriting)),
    "failed-writes-count": Mutant(Parts(mender=FailedWritesCount)),
    "expects-whatever-is-there": Mutant(Parts(mender=ExpectsWhateverIsThere)),
    "relies-on-the-unseen": Mutant(Parts(mender=ReliesOnTheUnseen)),
    "old-places-are-forgotten": Mutant(functions=((mender, "settled", _forgets_old_places),)),
    "two-keepers-share-a-name": Mutant(functions=((mender, "Generation", _one_name_for_all),)),
    "switches-by-half": Mutant(functions=((mender, "alike", _always),)),
}
