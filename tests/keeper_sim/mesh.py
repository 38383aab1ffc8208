"""What one node, or one client, can reach: registers, listings, and the pieces of others, over a network that
delays, loses, and answers for what happened only later."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256 as hash_of
from typing import TYPE_CHECKING, Any, TypeVar

from vstack.errors import MeshUnavailable, OutcomeUnknown
from vstack.mesh.config import NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import Change, Page
from vstack.mesh.messages import Failure, Found, Held, Listing, Mismatch, Ok, PieceData, Row
from vstack.mesh.registers import PieceKey, Scheme

if TYPE_CHECKING:
    from tests.keeper_sim.world import World

T = TypeVar("T")

PAGE = 3
"""Registers to a page of a listing."""
CLIENT = "client"


class SimMesh:
    """In the place of `MeshClient`. What it asked for may still happen when whoever asked has ended."""

    def __init__(self, world: World, me: NodeId) -> None:
        """`me`: a node, or CLIENT."""
        self._world = world
        self._me = me

    # -- registers --------------------------------------------------------------------------------

    async def read(self, key: str) -> Found:
        w = self._world
        await w.delay()
        if w.cut_off(self._me) or w.chance(w.profile.unavailable):
            await asyncio.sleep(w.random.uniform(0.1, 3.0))
            raise MeshUnavailable(f"{key} cannot be read")
        cell = w.ledger.registers.read(key)
        await w.delay()
        return Found(cell.version, cell.data)

    async def change(self, change: Change) -> Ok | Mismatch:
        return (await self.change_all([change]))[0]

    async def change_all(self, changes: Sequence[Change]) -> list[Ok | Mismatch]:
        outcomes = await asyncio.gather(*(self._change(c) for c in changes), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [o for o in outcomes if isinstance(o, Ok | Mismatch)]

    async def _change(self, change: Change) -> Ok | Mismatch:
        w = self._world
        if w.cut_off(self._me):
            await asyncio.sleep(w.random.uniform(0.1, 3.0))
            raise OutcomeUnknown(f"the change of {change.key} may or may not have happened")
        if not w.chance(w.profile.unknown):
            w.ledger.under_way.append(change)
            return await self._later(w.lag(), lambda: self._apply(change))
        fate = w.random.choice(("never", "now", "late"))
        if fate != "never":
            w.ledger.under_way.append(change)
            after = w.lag() if fate == "now" else w.random.uniform(0.0, w.profile.late)
            w.loop.call_later(after, self._apply, change)
        await asyncio.sleep(w.random.uniform(0.1, 4.0))
        raise OutcomeUnknown(f"the change of {change.key} may or may not have happened")

    def _apply(self, change: Change) -> Ok | Mismatch:
        self._world.ledger.under_way.remove(change)
        return self._world.ledger.registers.change(change, self._world.config.epoch, self._me)

    async def list(self, prefix: str) -> Page:
        page = Page([], True, ())
        async for part in self.pages(prefix):
            page.rows += part.rows
            page.complete &= part.complete
        return page

    async def pages(self, prefix: str) -> AsyncIterator[Listing]:
        """Each row is from some moment of the call. An incomplete one misses rows."""
        w = self._world
        registers = w.ledger.registers
        keys = registers.keys(prefix)
        while True:
            some, keys = keys[:PAGE], keys[PAGE:]
            early = {key: registers.read(key) for key in some}
            await w.delay()
            if w.cut_off(self._me) or w.chance(w.profile.unavailable):
                await asyncio.sleep(w.random.uniform(0.1, 3.0))
                raise MeshUnavailable(f"no node could list {prefix}")
            complete = not w.chance(w.profile.incomplete)
            rows: list[Row] = []
            for key in some:
                cell = early[key] if w.chance(0.5) else registers.read(key)
                if cell.data is not None and (complete or w.chance(0.5)):
                    rows.append(Row(key, cell.version, cell.data))
            await w.delay()
            yield Listing(tuple(rows), keys[0] if keys else "", complete, ())
            if not keys:
                return

    # -- pieces -----------------------------------------------------------------------------------

    async def put_piece(
        self,
        node: NodeId,
        key: PieceKey,
        scheme: Scheme,
        chunk_length: int,
        sha256: bytes,
        payload: bytes | memoryview,
        *,
        timeout: float = 20.0,
        purpose: str = "upload",
    ) -> bool:
        data = bytes(payload)

        def put() -> bool:
            w = self._world
            target = w.nodes[node]
            if target.is_draining:
                raise _refused("refused", "this node is draining")
            if hash_of(data).digest() != sha256:
                raise _refused("refused", "payload and hash differ")
            if target.disk.get(key) is None and target.disk.full:
                raise _refused("full", "the disk is full")
            present = target.disk.get(key) is not None
            w.ledger.on_put(node, key, scheme, sha256)
            target.disk.put(key, scheme, chunk_length, sha256, data)
            return present

        return await self._ask(node, timeout, put)

    async def get_range(
        self, node: NodeId, key: PieceKey, offset: int, length: int, *, timeout: float
    ) -> tuple[memoryview, PieceData]:
        def get() -> tuple[memoryview, PieceData]:
            stored = self._world.nodes[node].disk.get(key)
            if stored is None:
                raise _refused("not-found", "no such piece")
            data = memoryview(stored.payload)[offset : offset + length]
            return data, PieceData(len(stored.payload))

        return await self._ask(node, timeout, get)

    async def inventory(
        self,
        node: NodeId,
        keys: Sequence[PieceKey],
        *,
        verified_within: int | None = None,
        timeout: float = 30.0,
    ) -> builtins.list[Held]:
        def take() -> builtins.list[Held]:
            disk = self._world.nodes[node].disk
            return [Held(*disk.state(key, verified_within)) for key in keys]

        return await self._ask(node, timeout, take)

    async def _ask(self, node: NodeId, timeout: float, answer: Callable[[], T]) -> T:
        """`answer` runs on the node, if the request gets there."""
        w = self._world
        if not w.reaches(self._me, node):
            await asyncio.sleep(w.random.uniform(0.05, min(timeout, 2.0)))
            raise NoAnswer(f"node {node[:4]} does not answer")
        if w.chance(w.profile.busy):
            await w.delay()
            raise _refused(w.random.choice(("busy", "late", "io")), "not now")
        lost = node != self._me and w.chance(w.profile.loss)
        if lost and w.chance(0.5):
            await asyncio.sleep(w.random.uniform(0.1, min(timeout, 4.0)))
            raise NoAnswer(f"node {node[:4]} does not answer")

        def on_node() -> T:
            if not w.reaches(self._me, node):
                raise NoAnswer(f"node {node[:4]} does not answer")
            return answer()

        found = await self._later(w.lag(), on_node)
        if lost:
            await asyncio.sleep(w.random.uniform(0.1, min(timeout, 4.0)))
            raise NoAnswer(f"node {node[:4]} does not answer")
        return found

    async def _later(self, lag: float, do: Callable[[], T]) -> T:
        """The result of `do`, which happens after `lag` even if the caller ends, and is known later."""
        w = self._world
        done: asyncio.Future[T] = w.loop.create_future()

        def happen() -> None:
            try:
                result = do()
            except (NoAnswer, Refused) as e:
                w.loop.call_later(w.lag(), _settle, done, None, e)
            else:
                w.loop.call_later(w.lag(), _settle, done, result, None)

        w.loop.call_later(lag, happen)
        return await done


def _settle(done: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if done.done():
        return  # whoever asked has ended
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)


def _refused(code: str, text: str) -> Refused:
    return Refused(Failure(code, text))
