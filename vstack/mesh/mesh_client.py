"""The mesh as a program sees it: `async with connect(peers) as mesh`.

Registers are read and changed through any node; a request goes first to the node that can do it
in one round trip (the implicit leader, or a member of the key's group) and then, with the same
operation id, to the others: an operation applies once, however often it is sent. What cannot be
known in the end is raised as OutcomeUnknown, never reported as failed.
"""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import msgspec
import zmq

from vstack.errors import MeshUnavailable, OutcomeUnknown, UsageError, VstackError
from vstack.mesh.changes import Authorise, MeshChange, Revoke, SetPolicy
from vstack.mesh.config import Config, Member, NodeId, group, key_subject, leader, same_leader
from vstack.mesh.dialer import Answered, Dialer, KeyRefused, NoAnswer, Refused
from vstack.mesh.keys import ClientKey, load_client
from vstack.mesh.messages import (
    MAX_CONTROL,
    MAX_INVENTORY,
    MAX_SUBMIT,
    Body,
    Chain,
    ChangeMesh,
    Found,
    GetConfig,
    GetInventory,
    GetPiece,
    GetStatus,
    GetUsage,
    Hasten,
    Held,
    Inventory,
    List,
    Listing,
    MeshChanged,
    Mismatch,
    Noted,
    Ok,
    Op,
    Outcome,
    Outcomes,
    PieceData,
    PutPiece,
    Row,
    Status,
    Stored,
    Submit,
    Unknown,
    Usage,
    UsageRow,
    Viewed,
    WirePieceKey,
)
from vstack.mesh.registers import PieceKey, Scheme
from vstack.mesh.sockets import Lane, parse_address

FIRST_ANSWER = 3.0
"""Seconds that a node has for an operation before the next one is asked as well."""
EPOCHS_MEET = 3.0
"""Seconds that a listing waits until enough nodes have adopted the same configuration."""
NEWER_CHAIN = 0.05
"""Seconds that other peers have to name a newer configuration, once one has answered."""
ALIVE = 1.0
"""Seconds that a node has to show that it is there, before it is told of a view."""
VERIFY_AT_ONCE = 32
"""Pieces that one request asks a node to read: at most 256 MiB."""
OPERATION = 15.0
"""Seconds after which the outcome of an operation is called unknown."""


@dataclass(frozen=True)
class Change:
    """A compare-and-swap to be done: the exact version to replace, and what to put there (None: delete)."""

    key: str
    expect: int
    data: bytes | None
    id: bytes = field(default_factory=lambda: os.urandom(16))


@dataclass
class Page:
    """What a listing found, and whether that is all there is."""

    rows: list[Row]
    complete: bool
    silent: tuple[NodeId, ...]


class MeshClient:
    """Made by `connect`. Belongs to one event loop."""

    def __init__(
        self, context: zmq.Context[Any], address_map: Mapping[str, str], key: ClientKey | None = None
    ) -> None:
        self._context = context
        self._key = key
        self._address_map = dict(address_map)
        self._dialers: dict[tuple[str, Lane], Dialer] = {}
        self.estimates: dict[NodeId, Any] = {}
        """What downloads have measured of the nodes, for the next ones."""
        self._failed_at: dict[NodeId, float] = {}
        self._doubted_at: dict[NodeId, float] = {}
        """When a node last found no majority: it may be the one that is cut off."""
        self._seeds: tuple[str, ...] = ()
        self.near: NodeId = ""
        """The node that is asked first where any one would do."""
        self._newer = 0
        """The highest epoch that a node spoke of."""
        self.mesh = ""
        self.config = Config(0, (), 0)

    # -- nodes ------------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[Member, ...]:
        return self.config.members

    def dialer(self, address: str, lane: Lane) -> Dialer:
        """The connection to a lane of the node at `address`, through the address map."""
        found = self._dialers.get((address, lane))
        if found is not None and found.gone:
            found.close()
            found = None
        if found is None:
            real = self._address_map.get(address, address)
            found = self._dialers[address, lane] = Dialer(self._context, real, lane, self.mesh, self._key)
        return found

    async def ask(
        self,
        node: NodeId,
        body: Body,
        payload: bytes | memoryview = b"",
        *,
        lane: Lane = Lane.CONTROL,
        timeout: float,
    ) -> Answered:
        """One request to one member. Raises NoAnswer, Refused; a silent node is remembered as such."""
        if self._newer > self.config.epoch:
            await self.refresh()
        member = self.config.member(node)
        if member is None:
            raise NoAnswer(f"node {node[:8]} is not a member of the mesh")
        try:
            answer = await self.dialer(member.address, lane).request(body, payload, timeout=timeout)
        except NoAnswer:
            self._failed_at[node] = monotonic()
            raise
        self._failed_at.pop(node, None)
        self._newer = max(self._newer, answer.header.epoch)
        return answer

    def silent(self, node: NodeId, within: float = 5.0) -> bool:
        """Whether `node` failed to answer this client in the last `within` seconds."""
        return monotonic() - self._failed_at.get(node, -within) < within

    async def contact(self, peers: Sequence[str], patience: float) -> None:
        """Learns the configuration from the first peer that answers.

        Raises MeshUnavailable; KeyRefused at once if a peer refuses the key and none answers.
        """
        deadline = monotonic() + patience
        why = ""
        while True:
            answers = await self._first_chains(peers, max(0.5, deadline - monotonic()))
            chains = [a for a in answers if isinstance(a, Chain)]
            if chains:
                best = max(chains, key=lambda c: c.configs[-1].epoch)
                self.mesh, self.config = best.mesh, best.configs[-1]
                self._seeds = tuple(peers)
                for dialer in self._dialers.values():
                    dialer.mesh = self.mesh
                return
            for answer in answers:
                if isinstance(answer, KeyRefused):
                    raise answer
            why = "; ".join(str(a) for a in answers if isinstance(a, VstackError))
            if monotonic() + 0.2 > deadline:
                raise MeshUnavailable(
                    f"no mesh answers at {', '.join(peers)} ({why}). Is it running? "
                    "Start one with `vstack up`, or name its nodes with --peers"
                )
            await asyncio.sleep(0.2)

    async def _first_chains(self, peers: Sequence[str], timeout: float) -> list[Chain | VstackError]:
        """The answers of the peers; once one has given a chain, the others have a moment to give a newer."""
        asked = {asyncio.create_task(self._config_from(p, timeout)) for p in peers}
        waiting = set(asked)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if any(isinstance(task.result(), Chain) for task in done):
                    await asyncio.wait(asked, timeout=NEWER_CHAIN)
                    break
            return [task.result() for task in asked if task.done()]
        finally:
            for task in asked:
                task.cancel()

    async def _config_from(self, address: str, timeout: float) -> Chain | VstackError:
        try:
            answer = await self.dialer(address, Lane.CONTROL).request(
                GetConfig(open=True), timeout=min(timeout, 3.0)
            )
        except VstackError as e:
            return e
        chain = answer.header.body
        if not isinstance(chain, Chain) or not chain.configs:
            return MeshUnavailable(f"{address} has not formed a mesh yet")
        return chain

    async def status(self, node: NodeId, timeout: float = 2.0) -> Status:
        """Raises NoAnswer, Refused."""
        return _expect(Status, await self.ask(node, GetStatus(), timeout=timeout))

    # -- the configuration ------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Learns the newest configuration that any node tells; keeps the one it has if none does."""
        wanted, self._newer = self._newer, 0
        for address in dict.fromkeys((*(m.address for m in self.members), *self._seeds)):
            chain = await self._config_from(address, 1.0)
            if isinstance(chain, Chain) and chain.mesh == self.mesh:
                if chain.configs[-1].epoch > self.config.epoch:
                    self.config = chain.configs[-1]
                if self.config.epoch >= wanted:
                    return

    async def change_mesh(self, change: MeshChange, *, patience: float = OPERATION) -> int:
        """Changes the configuration, through any node; the epoch in which the change is in force.

        One that somebody else has made meanwhile counts as made. Raises Refused (with the mesh's
        reason), OutcomeUnknown after `patience` seconds.
        """
        request = os.urandom(16)
        begun = self.config.epoch
        deadline = monotonic() + patience
        why: VstackError = MeshUnavailable("the mesh has no members")
        doubt = False
        """Whether some node may have made it."""
        while True:
            for node in sorted(self.config.nodes, key=self.silent):
                left = deadline - monotonic()
                if left <= 0:
                    raise OutcomeUnknown(f"the change of the mesh may or may not have happened: {why}")
                body = ChangeMesh(request, self.config.epoch, change)
                try:
                    answer = await self.ask(node, body, timeout=left)
                except NoAnswer as e:
                    why, doubt = e, True
                    continue
                except Refused as e:
                    why = e
                    overtaken = e.code in ("epoch", "busy", "forming", "late")
                    if overtaken or doubt:
                        made_in = await self._learn_whether_made(node, begun, request, change)
                        if made_in is not None:
                            return made_in
                    if not overtaken:
                        raise
                    continue
                made = _expect(MeshChanged, answer).epoch
                self._newer = max(self._newer, made)
                return made
            await asyncio.sleep(0.1)

    async def _learn_whether_made(
        self, node: NodeId, after: int, request: bytes, change: MeshChange
    ) -> int | None:
        """Takes the configurations after an epoch from `node`; the one that has the change, None if none."""
        try:
            question = GetConfig(after)
            chain = _expect(Chain, await self.ask(node, question, timeout=FIRST_ANSWER))
        except (NoAnswer, Refused):
            return None
        for config in sorted(chain.configs, key=lambda c: c.epoch):
            if config.epoch > self.config.epoch:
                self.config = config
            if config.change == request:
                return config.epoch
        return self.config.epoch if _is_made(self.config, change) else None

    # -- registers --------------------------------------------------------------------------------

    async def read(self, key: str) -> Found:
        """The register's value as a quorum has it. Raises MeshUnavailable."""
        outcome = (await self._submit([Op(os.urandom(16), key, self.config.epoch)]))[0]
        if isinstance(outcome, Found):
            return outcome
        raise MeshUnavailable(f"{key} cannot be read: {getattr(outcome, 'reason', outcome)}")

    async def change(self, change: Change) -> Ok | Mismatch:
        """Raises OutcomeUnknown if no majority said in time what became of it."""
        return (await self.change_all([change]))[0]

    async def change_all(self, changes: Sequence[Change]) -> list[Ok | Mismatch]:
        """Does many changes, in as few messages as their leaders allow. Raises OutcomeUnknown."""
        ops = [Op(c.id, c.key, self.config.epoch, c.expect, c.data) for c in changes]
        known: list[Ok | Mismatch] = []
        for op, outcome in zip(ops, await self._submit(ops), strict=True):
            if not isinstance(outcome, Ok | Mismatch):
                reason = outcome.reason if isinstance(outcome, Unknown) else "a strange answer"
                raise OutcomeUnknown(f"the change of {op.key} may or may not have happened: {reason}")
            known.append(outcome)
        return known

    async def _submit(self, ops: Sequence[Op]) -> list[Outcome]:
        by_route: dict[tuple[NodeId, ...], list[int]] = {}
        routes: dict[str | tuple[str, int], tuple[NodeId, ...]] = {}
        for i, op in enumerate(ops):
            alike = same_leader(op.key)
            route = routes.get(alike)
            if route is None:
                route = routes[alike] = self._route(op.key)
            by_route.setdefault(route, []).append(i)
        outcomes: list[Outcome] = [Unknown("not asked")] * len(ops)

        async def along(route: tuple[NodeId, ...], which: list[int]) -> None:
            for part in _parts(which, [len(ops[i].data or b"") for i in which]):
                answers = await self._submit_along(route, [ops[i] for i in part])
                for i, outcome in zip(part, answers, strict=True):
                    outcomes[i] = outcome

        await asyncio.gather(*(along(r, w) for r, w in by_route.items()))
        return outcomes

    def _route(self, key: str) -> tuple[NodeId, ...]:
        """Whom to ask, best first: the implicit leader, its group, the rest; silent ones last."""
        first = leader(self.config, key)
        acceptors = group(self.config, key_subject(key))
        order = dict.fromkeys(([first] if first else []) + list(acceptors) + list(self.config.nodes))
        return tuple(sorted(order, key=lambda n: (self.silent(n), self._doubted(n))))

    def _doubted(self, node: NodeId, within: float = 5.0) -> bool:
        """Whether `node` found no majority in the last `within` seconds."""
        return monotonic() - self._doubted_at.get(node, -within) < within

    async def _submit_along(self, route: Sequence[NodeId], ops: Sequence[Op]) -> list[Outcome]:
        """Raises Refused if this client may not do it, and no node can have done it."""
        deadline = monotonic() + OPERATION
        why, sure = "no node answered", False
        doubt = False
        """Whether some node may have done it."""
        while True:
            forbidden: list[Refused] = []
            for node in route:
                left = deadline - monotonic()
                if left <= 0:
                    return [Unknown(why)] * len(ops)
                try:
                    answer = await self.ask(node, Submit(tuple(ops)), timeout=min(FIRST_ANSWER, left))
                except (NoAnswer, Refused) as e:
                    why = why if sure else str(e)
                    doubt |= isinstance(e, NoAnswer)
                    if isinstance(e, Refused) and e.code == "epoch":
                        # Made for an epoch that is over. If no node can have tried it, it is made anew.
                        await self.refresh()
                        if doubt or sure:
                            return [Unknown(str(e))] * len(ops)
                        ops = [msgspec.structs.replace(op, born=self.config.epoch) for op in ops]
                    if isinstance(e, Refused) and e.code == "forbidden":
                        forbidden.append(e)
                    continue
                outcomes = list(_expect(Outcomes, answer).outcomes)
                unknown = [o.reason for o in outcomes if isinstance(o, Unknown)]
                if not unknown and len(outcomes) == len(ops):
                    return outcomes
                why, sure = (unknown[0], True) if unknown else ("a strange answer", False)
                self._doubted_at[node] = monotonic()
                doubt = True
            if len(forbidden) > len(route) // 2:  # fewer may just not have heard of a new role
                if doubt:
                    return [Unknown(str(forbidden[0]))] * len(ops)
                raise forbidden[0]
            await asyncio.sleep(0.1)

    # -- listings ---------------------------------------------------------------------------------

    async def list(self, prefix: str) -> Page:
        """All registers below `prefix` that hold something. Raises MeshUnavailable."""
        page = Page([], True, ())
        async for part in self.pages(prefix):
            page.rows += part.rows
            page.complete &= part.complete
            page.silent = tuple(sorted({*page.silent, *part.silent}))
        return page

    async def pages(self, prefix: str) -> AsyncIterator[Listing]:
        """The same, page by page, in order of key."""
        after = ""
        while True:
            listing = await self._list_page(prefix, after)
            until = monotonic() + EPOCHS_MEET
            while not listing.complete and self._is_between_epochs(listing) and monotonic() < until:
                await asyncio.sleep(0.2)
                listing = await self._list_page(prefix, after)
            yield listing
            after = listing.after
            if not after:
                return

    def _is_between_epochs(self, listing: Listing) -> bool:
        """Whether enough nodes answered, and the listing is incomplete all the same: their answers are of
        different epochs, because a configuration is just being adopted."""
        return len(listing.silent) <= (self.config.g - 1) // 2

    async def _list_page(self, prefix: str, after: str) -> Listing:
        why: VstackError = MeshUnavailable("the mesh has no members")
        for node in sorted(self.config.nodes, key=lambda n: (self.silent(n), n != self.near)):
            try:
                return _expect(Listing, await self.ask(node, List(prefix, after), timeout=6.0))
            except (NoAnswer, Refused) as e:
                why = e
        raise MeshUnavailable(f"no node could list {prefix}: {why}")

    # -- views ------------------------------------------------------------------------------------

    async def viewed(self, video: str, playback: bytes) -> bool:
        """Says that a playback of `video` has played long enough to count; whether a node has taken note.

        `playback` is 16 random bytes of its own. Raises nothing. One node of the video's group is told,
        one that has just answered, and another one only if that one refused: what is told to a node that
        then falls silent may be lost, but no view is counted twice.
        """
        for node in sorted(group(self.config, video), key=self.silent):
            try:
                await self.ask(node, GetConfig(open=True), timeout=ALIVE)
            except (NoAnswer, Refused):
                continue
            try:
                answer = await self.ask(node, Viewed(video, playback), timeout=FIRST_ANSWER)
            except Refused:
                continue
            except NoAnswer:
                return False
            return isinstance(answer.header.body, Noted)
        return False

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
        purpose: str = "upload",
        timeout: float = 20.0,
    ) -> bool:
        """On that node's disk when this returns; True if it was there already. Raises NoAnswer, Refused.

        `purpose` (upload, repair, demotion) says how full the disk may get for it.
        """
        body = PutPiece(_wire(key), scheme.k, scheme.m, chunk_length, sha256, purpose)
        answer = await self.ask(node, body, payload, lane=Lane.DATA, timeout=timeout)
        return _expect(Stored, answer).present

    async def get_range(
        self, node: NodeId, key: PieceKey, offset: int, length: int, *, timeout: float
    ) -> tuple[memoryview, PieceData]:
        """Bytes of one piece, as the node has them: whoever has the whole piece checks its hash.

        Raises NoAnswer, Refused.
        """
        body = GetPiece(_wire(key), offset, length)
        answer = await self.ask(node, body, lane=Lane.DATA, timeout=timeout)
        return answer.payload, _expect(PieceData, answer)

    async def inventory(
        self,
        node: NodeId,
        keys: Sequence[PieceKey],
        *,
        verified_within: int | None = None,
        timeout: float = 30.0,
    ) -> builtins.list[Held]:
        """What `node` holds of the keys, in their order.

        With `verified_within` it reads whole what it has not written, or read and compared with its hash,
        in the last so many seconds; without, its index is enough. `timeout` is for each request, and there
        may be several. Raises NoAnswer; Refused (code "io": its disk failed, which says nothing of the
        pieces; "late": it had no time to read them, and will go on where it was if it is asked again
        with `verified_within` over 0).
        """
        most = MAX_INVENTORY if verified_within is None else VERIFY_AT_ONCE
        held: builtins.list[Held] = []
        for i in range(0, len(keys), most):
            some = tuple(_wire(key) for key in keys[i : i + most])
            question = GetInventory(some, verified_within)
            found = _expect(Inventory, await self.ask(node, question, lane=Lane.DATA, timeout=timeout)).held
            if len(found) != len(some):
                raise NoAnswer(f"node {node[:8]} answered for {len(found)} pieces of {len(some)}")
            held += found
        return held

    async def usage(self, node: NodeId, *, timeout: float = 15.0) -> builtins.list[UsageRow]:
        """What the pieces of each video take on the disk of `node`, by scheme, in the order of the videos.

        `timeout` is for each page. Raises NoAnswer, Refused.
        """
        rows: builtins.list[UsageRow] = []
        after = ""
        while True:
            answer = await self.ask(node, GetUsage(after), lane=Lane.DATA, timeout=timeout)
            page = _expect(Usage, answer)
            rows += page.rows
            if not page.after:
                return rows
            if page.after <= after:
                raise NoAnswer(f"node {node[:8]} does not come to an end with what it holds")
            after = page.after

    async def hasten(self, node: NodeId, job: str, *, timeout: float = FIRST_ANSWER) -> None:
        """Makes `node` begin now with its repair, scrub or gc. Raises NoAnswer, Refused."""
        _expect(Noted, await self.ask(node, Hasten(job), timeout=timeout))

    def close(self) -> None:
        for dialer in self._dialers.values():
            dialer.close()


def _parts(which: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Cuts operations into requests that stay below MAX_SUBMIT and half of what a message may hold."""
    part: list[int] = []
    size = 0
    for i, bytes_ in zip(which, sizes, strict=True):
        if part and (len(part) == MAX_SUBMIT or size + bytes_ + 300 > MAX_CONTROL // 2):
            yield part
            part, size = [], 0
        part.append(i)
        size += bytes_ + 300
    if part:
        yield part


def _is_made(config: Config, change: MeshChange) -> bool:
    """Whether a change of who may use the mesh, and how, has nothing left to do."""
    if isinstance(change, Authorise):
        return change.grant in config.grants
    if isinstance(change, SetPolicy):
        return change.policy == config.policy
    return isinstance(change, Revoke) and all(g.key != change.key for g in config.grants)


def _wire(key: PieceKey) -> WirePieceKey:
    return WirePieceKey(key.video, key.upload, key.chunk, key.piece, key.generation)


_T = TypeVar("_T", bound=Body)


def _expect(kind: type[_T], answer: Answered) -> _T:
    body = answer.header.body
    if not isinstance(body, kind):
        raise NoAnswer(f"a node answered {type(body).__name__} where {kind.__name__} was due")
    return body


def split_peers(text: str | Iterable[str]) -> tuple[str, ...]:
    """`a:1,b:2` -> ("a:1", "b:2"). Raises UsageError for what is not an address, or for none."""
    parts = text.split(",") if isinstance(text, str) else list(text)
    peers = tuple(p.strip() for p in parts if p.strip())
    for peer in peers:
        parse_address(peer)
    if not peers:
        raise UsageError("no node is named: give --peers HOST:PORT,...")
    return peers


@asynccontextmanager
async def connect(
    peers: str | Sequence[str],
    *,
    patience: float = 5.0,
    address_map: Mapping[str, str] | None = None,
    keys: ClientKey | Path | str | None = None,
) -> AsyncIterator[MeshClient]:
    """A client of the mesh that `peers` (addresses of control lanes) belong to.

    `address_map` says where to dial instead of an advertised address (relays, tunnels). `keys` is this
    client's key, or the file with it; None for a mesh without keys. Waits up to `patience` seconds for a
    node to answer. Raises UsageError, MeshUnavailable, KeyRefused.
    """
    key = keys if isinstance(keys, ClientKey) or keys is None else load_client(Path(keys))
    context: zmq.Context[Any] = zmq.Context()
    client = MeshClient(context, address_map or {}, key)
    try:
        await client.contact(split_peers(peers), patience)
        yield client
    finally:
        client.close()
        context.destroy(0)
