"""What has to be done about one chunk: from its register and the state of the nodes to a `Work`.

Pure. The order of work is `Work.urgency`: chunks that are nearest to being lost come first, then whatever
else is missing, then what leaves a draining node, then switches, and last what lies elsewhere than
placement would put it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

from vstack.erasure import fragment_size
from vstack.mesh.config import Member, NodeId
from vstack.mesh.placement import choose_scheme, next_holder, order, takers
from vstack.mesh.registers import ChunkRecord, Place, Scheme


class Reason(IntEnum):
    """Why a chunk is worked on, most important first."""

    REPAIR = 0
    """A piece is missing."""
    DRAIN = 1
    """A piece lies on a node that is draining."""
    SWITCH = 2
    """It is kept under another scheme than it should be."""
    MOVE = 3
    """A piece lies elsewhere than placement would put it."""


@dataclass(frozen=True)
class Nodes:
    """The nodes, as a keeper sees them."""

    members: Sequence[Member]
    gone: Collection[NodeId] = ()
    """Members that have been silent for so long that what they hold counts as missing."""
    closed: Collection[NodeId] = ()
    """Members that take no pieces just now: down, full, or failing."""

    def usable(self) -> list[Member]:
        """Where pieces are to lie."""
        return [m for m in takers(self.members) if m.node not in self.gone]


@dataclass(frozen=True)
class Work:
    """How one chunk is brought into order. What is kept, healed and written names its pieces from then on."""

    reason: Reason
    spare: int
    """Pieces that can still be lost before the chunk is; below 0 it cannot be read now."""
    scheme: Scheme
    keep: tuple[Place, ...]
    """Stay as they are."""
    heal: tuple[Place, ...]
    """Are written again where they should be already: the register stays as it is."""
    write: tuple[tuple[int, NodeId], ...]
    """New pieces: number and node."""

    @property
    def urgency(self) -> tuple[int, int]:
        """The smaller, the sooner."""
        endangered = self.reason is Reason.REPAIR
        return (self.spare if endangered else 1 << 16, int(self.reason))

    def bytes(self, record: ChunkRecord) -> int:
        """Payload bytes that are to be written."""
        return (len(self.heal) + len(self.write)) * fragment_size(record.entry.size, self.scheme.k)


def alike(one: Scheme, other: Scheme) -> bool:
    """Whether the pieces of one are pieces of the other: copies are copies, however many."""
    return one == other or one.k == other.k == 1


def sound(record: ChunkRecord, nodes: Nodes, bad: Collection[Place] = ()) -> list[Place]:
    """The places that can be counted on: of members that are not gone, and not known to be bad. One for
    each fragment, or for each node that has a copy; draining nodes last."""
    members = {m.node: m for m in nodes.members}
    found: dict[int | NodeId, Place] = {}
    places = [p for p in record.places if p.node in members and p.node not in nodes.gone and p not in bad]
    for place in sorted(places, key=lambda p: members[p.node].draining):
        found.setdefault(place.node if record.scheme.k == 1 else place.piece, place)
    return list(found.values())


def spare(record: ChunkRecord, nodes: Nodes, bad: Collection[Place] = ()) -> int:
    """Pieces that can still be lost before the chunk is."""
    return len(sound(record, nodes, bad)) - record.scheme.k


def ideal(video: str, index: int, scheme: Scheme, usable: Sequence[Member]) -> list[NodeId]:
    """The node of each piece, as placement would have it."""
    ranked = order(usable, video, index)
    taken: list[NodeId] = []
    for _ in range(scheme.m):
        member = next_holder(ranked, taken, ())
        if member is None:
            break
        taken.append(member.node)
    return taken


def plan(
    video: str, record: ChunkRecord, wanted: Scheme, nodes: Nodes, bad: Collection[Place] = ()
) -> Work | None:
    """None if the chunk is as it should be, or nothing can be done for it now.

    `bad`: places of the record whose pieces were found absent or damaged.
    """
    usable = nodes.usable()
    if not usable:
        return None
    scheme = choose_scheme(wanted, len(usable))
    good = sound(record, nodes, bad)
    left = len(good) - record.scheme.k
    index = record.entry.index
    open_to_writes = {m.node for m in usable} - set(nodes.closed)
    ranked = order(usable, video, index)
    if not alike(record.scheme, scheme):
        if left < 0:
            return None
        targets = _spread(ranked, scheme, [], range(scheme.m), open_to_writes)
        if len(targets) < scheme.m:
            return _plan_same(video, record, record.scheme, ranked, open_to_writes, good, bad)
        reason = Reason.SWITCH if left >= min(1, record.scheme.m - record.scheme.k) else Reason.REPAIR
        return Work(reason, left, scheme, (), (), tuple(targets))
    return _plan_same(video, record, scheme, ranked, open_to_writes, good, bad) or _plan_fewer(
        record, scheme, nodes, good
    )


def _plan_fewer(record: ChunkRecord, scheme: Scheme, nodes: Nodes, good: Sequence[Place]) -> Work | None:
    """There are as many copies as the mesh has room for, and the register names others besides: of nodes that
    left, or are draining. Those of members that are silent may come back, and stay named."""
    usable = {m.node for m in nodes.usable()}
    silent = {m.node for m in nodes.members if not m.draining and m.node in nodes.gone}
    staying = [p for p in good if p.node in usable]
    if scheme.k > 1 or len(staying) < scheme.m:
        return None
    keep = [*staying, *(p for p in record.places if p.node in silent)]
    fewer = Scheme(1, len(keep))
    if record.scheme == fewer and len(record.places) == len(keep):
        return None
    return Work(Reason.MOVE, len(good) - 1, fewer, tuple(keep), (), ())


def _plan_same(
    video: str,
    record: ChunkRecord,
    scheme: Scheme,
    ranked: Sequence[Member],
    open_to_writes: Collection[NodeId],
    good: Sequence[Place],
    bad: Collection[Place],
) -> Work | None:
    """The scheme stays, but for the number of copies."""
    copies = scheme.k == 1
    usable = {m.node for m in ranked}
    left = len(good) - record.scheme.k
    if left < 0:
        return None
    staying = [p for p in good if p.node in usable]
    slots = Counter(ideal(video, record.entry.index, scheme, ranked))
    keep: list[Place] = []
    elsewhere: list[Place] = []
    for place in staying:
        if slots[place.node] > 0:
            slots[place.node] -= 1
            keep.append(place)
        else:
            elsewhere.append(place)
    # A bad piece is written again where it is named, if its node is there: no register changes for that.
    healed: dict[int | NodeId, Place] = {}
    known = {p.node if copies else p.piece for p in staying}
    for place in record.places:
        which = place.node if copies else place.piece
        if place in bad and place.node in open_to_writes and which not in known | healed.keys():
            healed[which] = place
            slots[place.node] -= 1
    heal = tuple(healed.values())
    there = len(keep) + len(elsewhere) + len(heal)
    if copies:
        missing = [0] * max(0, scheme.m - there)
    else:
        have = {p.piece for p in (*keep, *elsewhere, *heal)}
        missing = [n for n in range(scheme.m) if n not in have]
    if missing or heal:
        kept = [*keep, *elsewhere]
        taken = [p.node for p in (*kept, *heal)]
        free = [n for n in slots.elements() if n in open_to_writes]
        write = _assign(missing, free, ranked, taken, open_to_writes, copies)
        if write or heal:
            leaves = len(good) > len(staying) and len(good) >= scheme.m
            reason = Reason.DRAIN if leaves and not heal else Reason.REPAIR
            return Work(reason, left, scheme, tuple(kept), heal, write)
        return None
    if copies and there > scheme.m:  # a copy too many: one that placement would not choose goes
        return Work(Reason.MOVE, left, scheme, tuple([*keep, *elsewhere][: scheme.m]), (), ())
    moves: list[tuple[int, NodeId]] = []
    stay: list[Place] = list(keep)
    free = [n for n in slots.elements() if n in open_to_writes]
    for place in elsewhere:
        if free:
            moves.append((place.piece, free.pop(0)))
        else:
            stay.append(place)
    return Work(Reason.MOVE, left, scheme, tuple(stay), (), tuple(moves)) if moves else None


def _assign(
    missing: Sequence[int],
    free: Sequence[NodeId],
    ranked: Sequence[Member],
    taken: Sequence[NodeId],
    open_to_writes: Collection[NodeId],
    copies: bool,
) -> tuple[tuple[int, NodeId], ...]:
    """A node for each missing piece: where placement would have it, or else where it fits."""
    closed = {m.node for m in ranked} - set(open_to_writes)
    out: list[tuple[int, NodeId]] = []
    free = list(free)
    for piece in missing:
        now = [*taken, *(n for _, n in out)]
        if free:
            node = min(free, key=now.count)
            free.remove(node)
        elif (member := next_holder(ranked, now, closed)) is not None:
            node = member.node
        else:
            break
        if copies and node in now:
            continue  # a second copy on one node would be none
        out.append((piece, node))
    return tuple(out)


def _spread(
    ranked: Sequence[Member],
    scheme: Scheme,
    taken: Sequence[NodeId],
    pieces: Sequence[int] | range,
    open_to_writes: Collection[NodeId],
) -> list[tuple[int, NodeId]]:
    """All pieces of a scheme on nodes that take them; none where that would not survive any one of them."""
    writable = [m for m in ranked if m.node in open_to_writes]
    if choose_scheme(scheme, len(writable)) != scheme:
        return []
    out: list[tuple[int, NodeId]] = []
    for piece in pieces:
        member = next_holder(writable, [*taken, *(n for _, n in out)], ())
        if member is None:
            break
        out.append((0 if scheme.k == 1 else piece, member.node))
    return out


def settled(record: ChunkRecord, work: Work, written: Sequence[Place]) -> tuple[Place, ...]:
    """What the register is to name once `written` is there. Where a piece could not be written, the place
    that it had stays: its node may come back."""
    places = [*work.keep, *work.heal, *written]
    if not alike(record.scheme, work.scheme):
        return tuple(sorted(places, key=lambda p: (p.piece, p.node)))
    if work.scheme.k == 1:
        there = {p.node for p in places}
        spared = [p for p in record.places if p.node not in there]
        places += spared[: max(0, work.scheme.m - len(places))]
    else:
        have = {p.piece for p in places}
        for place in record.places:
            if place.piece not in have:
                have.add(place.piece)
                places.append(place)
    return tuple(sorted(places, key=lambda p: (p.piece, p.node)))
