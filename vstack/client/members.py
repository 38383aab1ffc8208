"""Changing who is in the mesh, and knowing what that means before and while it happens.

A change is one decision; after it, the votes of the registers whose groups have changed move, key by
key, and only when enough nodes have said that theirs are settled may a removed node be switched off.
Pieces move as well, more slowly: what still lies on a node is what registers name there.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec

from vstack.client.catalogue import Video
from vstack.client.fetcher import holders
from vstack.erasure import fragment_size
from vstack.errors import MeshUnavailable, NotFound, UsageError, VstackError
from vstack.mesh.changes import (
    AddMember,
    DrainMember,
    GiveUp,
    MeshChange,
    RemoveMember,
    forced,
    successor,
)
from vstack.mesh.config import Config, Member, NodeId, View, group, key_subject
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Chain, ForceConfig, GetConfig, GetHoldings, Holdings, MeshChanged, Status
from vstack.mesh.placement import takers
from vstack.mesh.registers import ChunkRecord, chunk_prefix, init_record, unpack_chunk, unpack_video, what
from vstack.mesh.sockets import Lane

FORCE_WITHIN = 20.0
"""Seconds in which every node that is left must take a forced configuration."""
TABLES_AT_ONCE = 8
"""Videos whose chunk registers are read at a time."""
RESERVE = 0.05
"""Share of a disk that is counted as full: uploads stop there, unless a node was told otherwise."""


@dataclass(frozen=True)
class Moving:
    """How far the mesh is after its last change."""

    epoch: int
    base: int
    leaving: tuple[NodeId, ...]
    """Removed or drained nodes whose votes are still needed."""
    waiting: dict[int, tuple[NodeId, ...]]
    """By open epoch, the nodes that have not settled what they hold."""
    silent: tuple[NodeId, ...]
    """Members that did not answer."""
    done: bool
    """Nothing is moving: base has passed every other set of voters."""


@dataclass(frozen=True)
class Plan:
    """What a change would do to the videos' groups of votes."""

    before: Config
    after: Config
    videos: int
    moving: int
    """Videos whose group would be another one."""
    piece_bytes: int | None
    """Of the pieces that would lie elsewhere in the end: all on a node that leaves; the share of a new one,
    by its weight. None if a node that has to be asked does not answer."""


@dataclass(frozen=True)
class Recovered:
    """What became of the registers after nodes were given up."""

    epoch: int
    doubtful: tuple[str, ...]
    """Videos whose group had lost its majority: their registers go on with what was left, and may have
    lost their latest change."""
    given_up: tuple[str, ...]
    """Videos of which pieces are stored, but no register is left."""


@dataclass(frozen=True)
class Stake:
    """What the registers of videos name on one node, and what would be without it."""

    chunks: int
    """Chunks, and init segments, with a piece on it."""
    bytes: int
    """Of these pieces, without headers."""
    last: tuple[str, ...]
    """Chunks that could not be read without it, and could with it."""
    incomplete: tuple[NodeId, ...]
    """Nodes that did not answer, and without which it is not known what all registers say."""
    strange: int
    """Registers that a newer version has written: what they name is not known."""

    @property
    def is_known(self) -> bool:
        return not self.incomplete and not self.strange


def find_member(config: Config, text: str) -> Member:
    """A member by its id, a unique beginning of it, or its address. Raises NotFound, UsageError."""
    found = [m for m in config.members if m.address == text or (len(text) >= 4 and m.node.startswith(text))]
    if len(found) > 1:
        raise UsageError(f"{text} is the beginning of {len(found)} nodes' ids: give more of it")
    if not found:
        raise NotFound(f"no member of the mesh is called {text}: `vstack nodes` lists them")
    return found[0]


async def open_view(mesh: MeshClient) -> View:
    """The configurations that are open, as the member with the newest one tells them. Raises
    MeshUnavailable if none answers."""

    async def one(node: NodeId) -> tuple[Config, ...]:
        try:
            answer = (await mesh.ask(node, GetConfig(open=True), timeout=3.0)).header.body
        except (NoAnswer, Refused):
            return ()
        return answer.configs if isinstance(answer, Chain) else ()

    told = [c for c in await asyncio.gather(*(one(n) for n in mesh.config.nodes)) if c]
    if not told:
        raise MeshUnavailable("no node of the mesh answers")
    return View(max(told, key=lambda c: c[-1].epoch))


async def find_open_member(mesh: MeshClient, text: str) -> Member:
    """As `find_member`, among the members of all open epochs: one that was given up is found, too.

    Raises NotFound, UsageError, MeshUnavailable.
    """
    found = NotFound("")
    for config in reversed((await open_view(mesh)).chain()):
        try:
            return find_member(config, text)
        except NotFound as e:
            found = e
    raise found


async def moving(mesh: MeshClient) -> Moving:
    """Asks all members. Raises MeshUnavailable if none answers."""
    await mesh.refresh()
    answers = await asyncio.gather(*(_status(mesh, m.node) for m in mesh.members))
    told = [a for a in answers if a is not None]
    if not told:
        raise MeshUnavailable("no node of the mesh answers")
    newest = max(told, key=lambda s: (s.epoch, -sum(len(w) for w in s.waiting.values())))
    silent = tuple(m.node for m, a in zip(mesh.members, answers, strict=True) if a is None)
    return Moving(newest.epoch, newest.base, newest.leaving, newest.waiting, silent, not newest.moving)


async def statuses(mesh: MeshClient) -> dict[NodeId, Status]:
    """What the members that answer say of themselves."""
    answers = await asyncio.gather(*(_status(mesh, m.node) for m in mesh.members))
    return {m.node: a for m, a in zip(mesh.members, answers, strict=True) if a is not None}


async def _status(mesh: MeshClient, node: NodeId) -> Status | None:
    try:
        return await mesh.status(node)
    except VstackError:
        return None


async def until_settled(mesh: MeshClient, epoch: int = 0) -> AsyncIterator[Moving]:
    """How far the mesh is, again and again, until the votes have moved after a change.

    `epoch`: that of the change. Until some node that is left knows of it, nothing is done.
    """
    while True:
        now = await moving(mesh)
        yield now
        if now.done and now.epoch >= epoch:
            return
        await asyncio.sleep(0.3)


async def plan(mesh: MeshClient, change: MeshChange) -> Plan:
    """What `change` would do. Raises ChangeRefused if it cannot be made now, MeshUnavailable."""
    view = await open_view(mesh)
    after = successor(view, change)
    videos = [key_subject(row.key) for row in (await mesh.list("video/")).rows]
    before = view.config
    moving = sum(group(before, v) != group(after, v) for v in videos)
    return Plan(before, after, len(videos), moving, _piece_bytes(await statuses(mesh), before, after))


def _piece_bytes(told: dict[NodeId, Status], before: Config, after: Config) -> int | None:
    """As `Plan.piece_bytes`."""
    old, new = takers(before.members), takers(after.members)
    leaves = [m.node for m in old if m.node not in {n.node for n in new}]
    joins = [m for m in new if m.node not in {o.node for o in old}]
    asked = leaves if leaves else before.nodes if joins else ()
    if any(node not in told for node in asked):
        return None
    total = sum(told[node].store["payload_bytes"] for node in asked)
    if leaves or not joins:
        return round(total)
    return round(total * sum(m.weight for m in joins) / sum(m.weight for m in new))


# -- what lies on a node ----------------------------------------------------------------------------


async def stake(
    mesh: MeshClient,
    node: NodeId,
    live: Collection[NodeId],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stake:
    """Reads the registers of all videos that are ready or deleted. `live` are nodes whose pieces count when
    `node` is gone. `on_progress` is told of videos. Raises MeshUnavailable.

    What an upload has written that is still under way is not in it.
    """
    page = await mesh.list("video/")
    silent = set() if page.complete else set(page.silent)
    videos: list[Video] = []
    chunks = size = strange = 0
    last: list[str] = []
    for row in page.rows:
        try:
            videos.append(Video(key_subject(row.key), row.version, unpack_video(row.data)))
        except msgspec.DecodeError:
            strange += 1
    videos = [v for v in videos if v.record.state in ("ready", "deleted")]
    for first in range(0, len(videos), TABLES_AT_ONCE):
        some = videos[first : first + TABLES_AT_ONCE]
        tables = await asyncio.gather(*(mesh.list(chunk_prefix(v.id, v.upload)) for v in some))
        for video, table in zip(some, tables, strict=True):
            silent |= set() if table.complete else set(table.silent)
            records = [] if video.record.init is None else [init_record(video.record.init)]
            for row in table.rows:
                try:
                    records.append(unpack_chunk(row.data))
                except msgspec.DecodeError:
                    strange += 1
            named = [r for r in records if any(p.node == node for p in r.places)]
            chunks += len(named)
            size += sum(_bytes_on(r, node) for r in named)
            last += [f"{what(r.entry.index)} of video {video.id[:12]}" for r in _only_with(named, node, live)]
        on_progress(first + len(some), len(videos))
    return Stake(chunks, size, tuple(last), tuple(sorted(silent)), strange)


def _bytes_on(record: ChunkRecord, node: NodeId) -> int:
    return sum(p.node == node for p in record.places) * fragment_size(record.entry.size, record.scheme.k)


def _only_with(
    records: Iterable[ChunkRecord], node: NodeId, live: Collection[NodeId]
) -> Iterable[ChunkRecord]:
    """Those that can be read with `node`, and cannot without it."""
    others = set(live) - {node}
    for record in records:
        if len(holders(record, others)) < record.scheme.k <= len(holders(record, {*others, node})):
            yield record


def room_elsewhere(mesh: MeshClient, node: NodeId, told: dict[NodeId, Status]) -> int:
    """Bytes that the other members which take pieces, and answer, have free above their reserve."""
    others = [told[m.node] for m in takers(mesh.members) if m.node != node and m.node in told]
    return sum(max(0, s.disk_free - round(RESERVE * s.disk_total)) for s in others)


# -- one by one -------------------------------------------------------------------------------------


async def addition(mesh: MeshClient, address: str) -> AddMember:
    """The node that waits at `address`, as a new member. Raises UsageError if it cannot become one,
    NoAnswer."""
    hello = await mesh.dialer(address, Lane.CONTROL).hello(5.0)
    if hello.mesh == mesh.mesh and mesh.config.member(hello.node):
        raise UsageError(f"node {hello.node[:8]} at {address} is a member already")
    if hello.mesh:
        raise UsageError(
            f"the node at {address} belongs to mesh {hello.mesh[:8]}: give it an empty data folder"
        )
    return AddMember(Member(hello.node, address, hello.zone, hello.weight, hello.key))


async def until_serving(mesh: MeshClient, node: NodeId, epoch: int, within: float) -> None:
    """Returns when a new member has adopted the configuration that names it. Raises MeshUnavailable."""
    deadline = monotonic() + within
    while True:
        await mesh.refresh()
        status = await _status(mesh, node)
        if status is not None and status.mesh == mesh.mesh and status.epoch >= epoch:
            return
        if monotonic() > deadline:
            raise MeshUnavailable(
                f"node {node[:8]} is a member since epoch {epoch}, but does not serve after {within:.0f} s: "
                "look at its log, or take it out again with `vstack mesh remove`"
            )
        await asyncio.sleep(0.3)


async def remove(mesh: MeshClient, member: Member) -> int:
    """Raises Refused, OutcomeUnknown."""
    return await mesh.change_mesh(RemoveMember(member.node))


async def drain(mesh: MeshClient, member: Member, draining: bool) -> int:
    """Raises Refused, OutcomeUnknown."""
    return await mesh.change_mesh(DrainMember(member.node, draining))


# -- recovering -------------------------------------------------------------------------------------


async def recover(mesh: MeshClient, lost: Sequence[NodeId]) -> Recovered:
    """Gives up nodes that are gone for good, whose votes some registers cannot do without.

    Where a majority of the members is left, it decides so. Otherwise every one that is left must answer,
    and takes the new configuration at the operator's word. Then the registers are rebuilt from what is
    left of their groups. To be repeated if it was interrupted. Raises MeshUnavailable, Refused.
    """
    view = await open_view(mesh)
    gone = set(lost)
    if any(view.config.member(n) for n in lost):
        new = forced(view, [n for n in lost if view.config.member(n)], os.urandom(16))
        if 2 * len(new.members) > len(view.config.members):
            await mesh.change_mesh(GiveUp(new.lost))
        else:
            await _must_all_be_ready(mesh, new)
            await asyncio.gather(*(_force(mesh, m, new) for m in new.members))
            mesh.config = new
    await mesh.refresh()
    async for _ in until_settled(mesh, view.epoch + 1):
        pass
    eras = [c for c in view.chain() if gone & set(c.voters)]
    listing = await mesh.list("video/")
    known = {key_subject(row.key) for row in listing.rows}
    doubtful = [v for v in sorted(known) if any(_majority_lost(c, v, gone) for c in eras)]
    held: set[str] = set()
    for member in mesh.members:
        held |= await _holdings(mesh, member.node)
    return Recovered(mesh.config.epoch, tuple(doubtful), tuple(sorted(held - known)))


async def _must_all_be_ready(mesh: MeshClient, new: Config) -> None:
    """Before anything is forced: every node that is left answers, is in the epoch before, and counts the
    lost ones as down. Raises MeshUnavailable: then nothing was changed."""
    deadline = monotonic() + FORCE_WITHIN
    while True:
        why = ""
        for member in new.members:
            status = await _status(mesh, member.node)
            if status is None:
                why = f"node {member.node[:8]} at {member.address} does not answer"
            elif status.epoch != new.epoch - 1:
                why = f"node {member.node[:8]} is in epoch {status.epoch}, not {new.epoch - 1}"
            else:
                alive = [p.node for p in status.peers if p.node in new.lost and p.state != "down"]
                if alive:
                    why = f"node {member.node[:8]} does not count {alive[0][:8]} as down: it may not be lost"
        if not why:
            return
        if monotonic() > deadline:
            raise MeshUnavailable(f"nothing was changed: {why}. Every node that is not given up must agree")
        await asyncio.sleep(0.5)


def _majority_lost(config: Config, video: str, gone: set[NodeId]) -> bool:
    acceptors = group(config, video)
    return 2 * sum(n not in gone for n in acceptors) <= len(acceptors)


async def _force(mesh: MeshClient, member: Member, config: Config) -> None:
    deadline = monotonic() + FORCE_WITHIN
    while True:
        try:
            answer = await mesh.dialer(member.address, Lane.CONTROL).request(ForceConfig(config), timeout=5.0)
            if isinstance(answer.header.body, MeshChanged):
                return
            why: VstackError = MeshUnavailable("a strange answer")
        except (NoAnswer, Refused) as e:
            if isinstance(e, Refused) and e.code == "forbidden":
                raise
            why = e
        if monotonic() > deadline:
            raise MeshUnavailable(
                f"node {member.node[:8]} at {member.address} did not take the new configuration: {why}. "
                "Every node that is not given up must do so: repeat the command when it can"
            )
        await asyncio.sleep(0.5)


async def _holdings(mesh: MeshClient, node: NodeId) -> set[str]:
    videos: set[str] = set()
    after = ""
    while True:
        answer = (await mesh.ask(node, GetHoldings(after), timeout=5.0)).header.body
        if not isinstance(answer, Holdings):
            raise MeshUnavailable(f"node {node[:8]} does not say what it holds")
        videos.update(answer.videos)
        if not answer.more:
            return videos
        after = answer.videos[-1]
