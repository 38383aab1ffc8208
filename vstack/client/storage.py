"""What the videos take, by what their registers name and what lies on the nodes' disks; and a scrub of the
whole mesh, from asking for it to its end.

Nothing here is inferred from a policy: chunk bytes are those of the chunk registers, record bytes those that
each node counts in its index, headers and padding included. The two are joined by numbers (pieces and bytes
of a video and scheme on a node), not piece by piece: more than the registers name is *not named*, less is
*missing*. A piece that is missing where another one is that nobody names is not seen: a video's pieces are
checked one by one by `vstack verify`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

import msgspec

from vstack.client.catalogue import Video, list_videos
from vstack.erasure import fragment_size
from vstack.errors import VstackError
from vstack.mesh.config import Member, NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Status, UsageRow
from vstack.mesh.registers import ChunkRecord, Scheme, chunk_prefix, init_record, unpack_chunk

COPIES = 3
"""Whole copies that savings are reckoned against: what survives two losses without fragments."""
AT_ONCE = 8
"""Videos whose registers are listed at the same time."""
WHOLE = Scheme(1, 0)
"""Stands for whole copies, however many: their number is that of a chunk's places."""

Told = Callable[[float, float], None]
"""Of progress: what is done, and of how much."""


# -- what the videos take ---------------------------------------------------------------------------


@dataclass
class Taken:
    """Pieces, of some videos, schemes or nodes."""

    chunks: int = 0
    """Chunks and init segments that the registers describe."""
    chunk_bytes: int = 0
    """Of these."""
    pieces: int = 0
    """That registers name, and that are on the disks of the nodes that answered."""
    record_bytes: int = 0
    """That these take there: headers, payloads, padding, footers."""
    not_named_pieces: int = 0
    """On the disks, and named by no register: to be collected, or not claimed yet."""
    not_named_bytes: int = 0
    """That these take."""
    missing_pieces: int = 0
    """Named as being on a node that answered, which has fewer."""
    missing_bytes: int = 0
    """Of payload."""

    @property
    def on_disk(self) -> int:
        return self.record_bytes + self.not_named_bytes

    @property
    def overhead(self) -> float | None:
        """Bytes that the named pieces take, for one byte of the chunks; None without chunks."""
        return self.record_bytes / self.chunk_bytes if self.chunk_bytes else None

    def add(self, other: Taken) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class NodeReport:
    """One member that answered."""

    member: Member
    status: Status
    taken: Taken
    """`chunks` and `chunk_bytes` are 0: a chunk lies on several nodes."""


@dataclass(frozen=True)
class VideoReport:
    video: str
    title: str
    state: str
    """Empty if there is no register of it: pieces alone."""
    by_scheme: dict[Scheme, Taken]
    taken: Taken


@dataclass(frozen=True)
class Storage:
    """What all of it takes. If it is not `complete`, what is on disk is that of the nodes that answered."""

    total: Taken
    by_scheme: dict[Scheme, Taken]
    nodes: list[NodeReport]
    videos: list[VideoReport]
    unseen_pieces: int
    """Named by registers as being on nodes that did not answer, or are no members."""
    complete: bool
    silent: tuple[NodeId, ...]

    @property
    def overhead(self) -> float | None:
        """Bytes on all disks, not named ones included, for one byte of the chunks. None if unknown."""
        if not self.complete or not self.total.chunk_bytes:
            return None
        return self.total.on_disk / self.total.chunk_bytes

    @property
    def savings(self) -> float | None:
        """The share of what `COPIES` whole copies would take that is not taken."""
        return None if self.overhead is None else 1 - self.overhead / COPIES


def scheme_name(scheme: Scheme) -> str:
    return "whole copies" if scheme.k == 1 else scheme.name


def split(named_pieces: int, named_payload: int, row: UsageRow | None) -> Taken:
    """Joins what registers name with what a node counts, of one video and scheme on one node.

    The bytes that records take besides their payloads are shared out evenly: they differ by padding only.
    """
    if row is None:
        return Taken(missing_pieces=named_pieces, missing_bytes=named_payload)
    pieces, payload = min(named_pieces, row.pieces), min(named_payload, row.payload_bytes)
    around = (row.record_bytes - row.payload_bytes) * pieces // row.pieces
    return Taken(
        pieces=pieces,
        record_bytes=payload + around,
        not_named_pieces=row.pieces - pieces,
        not_named_bytes=row.record_bytes - payload - around,
        missing_pieces=named_pieces - pieces,
        missing_bytes=named_payload - payload,
    )


@dataclass
class Ledger:
    """Gathers what registers say and what nodes count. Pure."""

    videos: dict[str, Video] = field(default_factory=dict)
    _chunks: dict[tuple[str, Scheme], Taken] = field(default_factory=lambda: defaultdict(Taken))
    _named: dict[NodeId, dict[tuple[str, Scheme], list[int]]] = field(default_factory=dict)
    """Pieces and bytes of payload."""
    _held: dict[NodeId, dict[tuple[str, Scheme], UsageRow]] = field(default_factory=dict)

    def add_video(self, video: Video) -> None:
        """Its register, with the init segment that it names."""
        self.videos[video.id] = video
        if video.record.init is not None:
            self.add_chunk(video.id, init_record(video.record.init))

    def add_chunk(self, video: str, record: ChunkRecord) -> None:
        size, scheme = record.entry.size, _kind(record.scheme)
        of_scheme = self._chunks[video, scheme]
        of_scheme.chunks += 1
        of_scheme.chunk_bytes += size
        for node, _, _ in {(p.node, p.piece, p.generation) for p in record.places}:
            named = self._named.setdefault(node, {}).setdefault((video, scheme), [0, 0])
            named[0] += 1
            named[1] += fragment_size(size, scheme.k)

    def add_usage(self, node: NodeId, rows: Iterable[UsageRow]) -> None:
        """What a node counts: all of it, once."""
        held = self._held.setdefault(node, {})
        for row in rows:
            key = row.video, _kind(Scheme(row.k, row.m))
            if (other := held.get(key)) is not None:  # whole copies that were made for different numbers
                row = UsageRow(*row[:3], *(a + b for a, b in zip(row[3:], other[3:], strict=True)))
            held[key] = row

    def close(
        self, answered: Sequence[tuple[Member, Status]], complete: bool, silent: Iterable[NodeId]
    ) -> Storage:
        """The sums. `answered`: the members whose usage was added."""
        by_key: dict[tuple[str, Scheme], Taken] = defaultdict(Taken)
        for key, chunks in self._chunks.items():
            by_key[key].add(chunks)
        nodes = []
        for member, status in answered:
            named, held = self._named.get(member.node, {}), self._held.get(member.node, {})
            of_node = Taken()
            for key in named.keys() | held.keys():
                pieces, payload = named.get(key, (0, 0))
                part = split(pieces, payload, held.get(key))
                by_key[key].add(part)
                of_node.add(part)
            nodes.append(NodeReport(member, status, of_node))
        total, by_scheme = Taken(), dict[Scheme, Taken]()
        by_video: dict[str, dict[Scheme, Taken]] = {video: {} for video in self.videos}
        for (video, scheme), taken in sorted(by_key.items(), key=lambda item: item[0]):
            total.add(taken)
            by_scheme.setdefault(scheme, Taken()).add(taken)
            by_video.setdefault(video, {})[scheme] = taken
        seen = {member.node for member, _ in answered}
        unseen = sum(n for node in self._named.keys() - seen for n, _ in self._named[node].values())
        videos = [self._video(video, schemes) for video, schemes in by_video.items()]
        return Storage(total, by_scheme, nodes, videos, unseen, complete, tuple(sorted(silent)))

    def _video(self, video: str, schemes: dict[Scheme, Taken]) -> VideoReport:
        total = Taken()
        for taken in schemes.values():
            total.add(taken)
        known = self.videos.get(video)
        title, state = (known.record.title, known.record.state) if known else ("", "")
        return VideoReport(video, title, state, schemes, total)


def _kind(scheme: Scheme) -> Scheme:
    return WHOLE if scheme.k == 1 else scheme


async def storage(mesh: MeshClient, told: Told) -> Storage:
    """Asks all nodes and reads all registers. `told` counts videos and nodes. Raises MeshUnavailable."""
    ledger = Ledger()
    listing = await list_videos(mesh, hidden=True)
    complete, silent = listing.complete, set(listing.silent)
    total, done = len(listing.videos) + len(mesh.members), 0
    turns = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def step() -> AsyncIterator[None]:
        nonlocal done
        async with turns:
            yield
        done += 1
        told(done, total)

    async def read_registers(video: Video) -> None:
        nonlocal complete
        async with step():
            page = await mesh.list(chunk_prefix(video.id, video.upload))
            silent.update(page.silent)
            complete &= page.complete
            for row in page.rows:
                try:
                    ledger.add_chunk(video.id, unpack_chunk(row.data))
                except msgspec.DecodeError:  # written by a newer version
                    complete = False

    async def ask_node(member: Member) -> Status | None:
        async with step():
            try:
                status = await member_status(mesh, member)
                ledger.add_usage(member.node, await mesh.usage(member.node))
            except (NoAnswer, Refused):
                return None
        return status

    told(0, total)
    for video in listing.videos:
        ledger.add_video(video)
    # Registers first: what is written meanwhile is then on the disks and not named, and nothing is missing.
    await asyncio.gather(*map(read_registers, listing.videos))
    members = mesh.members
    answers = await asyncio.gather(*map(ask_node, members))
    answered = [(m, said) for m, said in zip(members, answers, strict=True) if said is not None]
    mute = {m.node for m, said in zip(members, answers, strict=True) if said is None}
    return ledger.close(answered, complete and not mute, silent | mute)


async def member_status(mesh: MeshClient, member: Member) -> Status:
    """Raises NoAnswer, also if something else than that member answers at its address; Refused."""
    said = await mesh.status(member.node)
    if (said.mesh, said.node) != (mesh.mesh, member.node):
        raise NoAnswer(f"not node {member.node[:8]} but {said.node[:8]} answers at {member.address}")
    return said


# -- scrub ------------------------------------------------------------------------------------------

LOOK_EVERY = 0.3
SILENCE = 30.0
"""Seconds without an answer after which a node is not waited for any more."""


@dataclass
class Scrubbed:
    """A round of one node's scrub."""

    member: Member
    before: Status | None = None
    """None: figures count from the start of the node."""
    now: Status | None = None
    error: VstackError | None = None
    """Why the node is not waited for any more."""

    @property
    def quarantined(self) -> int:
        """Pieces that were found damaged, by whomever, and are not whole again."""
        return int(self.now.store["quarantined"]) if self.now else 0

    def counted(self, figure: str) -> int:
        """How much scrub_bytes, scrub_pieces, scrub_damaged, scrub_errors has grown in the round."""
        if self.now is None:
            return 0
        same = self.before is not None and self.before.boot == self.now.boot
        return int(self.now.store[figure] - (self.before.store[figure] if same and self.before else 0))

    @property
    def share(self) -> float:
        """Of the round that is done; a node that is not waited for holds nobody up."""
        if self.error is not None:
            return 1.0
        return self.now.store["scrub_share"] if self.now and self.now.store["scrub_hastened"] else 1.0


async def scrub(
    mesh: MeshClient, members: Sequence[Member], told: Told, *, begin: bool = True
) -> list[Scrubbed]:
    """Has `members` read all their pieces, and returns when they have.

    With `begin` false none is begun: it returns when those under way that somebody has asked for are over.
    A node that was restarted meanwhile begins anew. `told` counts bytes of payload. Raises Refused if the
    client may not do it; what it has begun goes on, here and if it is cancelled.
    """
    found = [Scrubbed(member) for member in members]

    def tell() -> None:
        sizes = [s.now.store["payload_bytes"] if s.now else 0.0 for s in found]
        if all(s.now or s.error for s in found):
            told(sum(size * s.share for size, s in zip(sizes, found, strict=True)), sum(sizes))

    await asyncio.gather(*(_scrub_one(mesh, s, begin, tell) for s in found))
    return found


async def _scrub_one(mesh: MeshClient, s: Scrubbed, begin: bool, tell: Callable[[], None]) -> None:
    """Raises Refused if the client may not do it."""
    begun_at: float | None = None
    """Rounds that were completed when ours was asked for."""
    heard = monotonic()
    while s.error is None:
        try:
            said = await member_status(mesh, s.member)
            rounds, under_way = said.store["scrub_rounds"], bool(said.store["scrub_hastened"])
            if begin and (begun_at is None or (not under_way and rounds <= begun_at)):
                s.before = s.before or said
                await mesh.hasten(s.member.node, "scrub")
                begun_at = rounds
            else:
                s.now = said
                tell()
                if not under_way:
                    return
            heard = monotonic()
        except (NoAnswer, Refused) as e:
            if isinstance(e, Refused) and e.code == "forbidden":
                raise
            if s.now is None or monotonic() - heard > SILENCE:
                s.error = e
                tell()
        await asyncio.sleep(LOOK_EVERY)
