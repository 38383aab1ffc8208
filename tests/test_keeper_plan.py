"""What a chunk needs, and what its register is to name afterwards: for any mesh, any places, any losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vstack.mesh.config import Member, NodeId
from vstack.mesh.placement import choose_scheme
from vstack.mesh.registers import REPLICATED, ChunkEntry, ChunkRecord, Generation, Place, Scheme, uploaded
from vstack.node.keeper.plan import Nodes, Reason, Work, alike, ideal, plan, settled, sound, spare

SCHEMES = [REPLICATED, Scheme(2, 3), Scheme(3, 5), Scheme(4, 6), Scheme(2, 6)]
VIDEO = "ab" * 32


def node(number: int) -> NodeId:
    return f"{number:032x}"


def member(number: int, zone: str = "", draining: bool = False) -> Member:
    return Member(node(number), f"n{number}:7400", zone, draining=draining)


def entry(index: int = 0) -> ChunkEntry:
    return ChunkEntry(index, 0, 1, 1000, b"chunk".ljust(32))


def hash_of(scheme: Scheme, piece: int) -> bytes:
    return f"{scheme.k} of {piece if scheme.k > 1 else 0}".encode().ljust(32)


def place(where: NodeId, piece: int, scheme: Scheme, counter: int = 0) -> Place:
    generation = uploaded(scheme) if counter == 0 else Generation(1, node(0), 1, counter)
    return Place(where, 0 if scheme.k == 1 else piece, hash_of(scheme, piece), generation)


def as_placed(members: Collection[Member], wanted: Scheme, index: int = 0) -> ChunkRecord:
    """A chunk as an upload would have written it, with all nodes up."""
    usable = [m for m in members if not m.draining]
    scheme = choose_scheme(wanted, len(usable))
    where = ideal(VIDEO, index, scheme, usable)
    return ChunkRecord(entry(index), scheme, tuple(place(n, i, scheme) for i, n in enumerate(where)))


@dataclass
class Disks:
    """Which pieces of the chunk are where, and good."""

    pieces: set[tuple[NodeId, Scheme, int]] = field(default_factory=set)

    @classmethod
    def of(cls, record: ChunkRecord) -> Disks:
        return cls({(p.node, record.scheme, p.piece) for p in record.places})

    def readable(self, record: ChunkRecord) -> int:
        """Distinct good pieces where the record says; copies are copies, however many there should be."""
        return len(self.good(record))

    def good(self, record: ChunkRecord) -> set[NodeId | int]:
        k = record.scheme.k
        return {
            p.node if k == 1 else p.piece
            for p in record.places
            if any(n == p.node and s.k == k and i == p.piece for n, s, i in self.pieces)
        }


def carry_out(
    record: ChunkRecord, work: Work, disks: Disks, counter: int, fails: Collection[int] = ()
) -> ChunkRecord:
    """What a mender makes of it, when the writes numbered in `fails` fail."""
    written: list[Place] = []
    for i, (piece, where) in enumerate(work.write):
        if i not in fails:
            written.append(place(where, piece, work.scheme, counter))
            disks.pieces.add((where, work.scheme, 0 if work.scheme.k == 1 else piece))
    for p in work.heal:
        disks.pieces.add((p.node, record.scheme, p.piece))
    if not alike(record.scheme, work.scheme) and len(written) < len(work.write):
        return record
    if (work.write or work.heal) and not written:
        return record
    return ChunkRecord(record.entry, work.scheme, settled(record, work, written))


def converge(
    record: ChunkRecord, wanted: Scheme, nodes: Nodes, disks: Disks, bad: Iterable[Place] = ()
) -> tuple[ChunkRecord, list[Work]]:
    """Carries plans out until there is none; all that was done."""
    done: list[Work] = []
    while (work := plan(VIDEO, record, wanted, nodes, wrong(record, disks, nodes))) is not None:
        record = carry_out(record, work, disks, 1 + len(done))
        done.append(work)
        assert len(done) <= 6, f"it goes on and on: {done}"
    return record, done


def wrong(record: ChunkRecord, disks: Disks, nodes: Nodes) -> list[Place]:
    """What an inventory of the nodes that answer finds missing."""
    answering = {m.node for m in nodes.members} - set(nodes.gone)
    return [
        p
        for p in record.places
        if p.node in answering and not disks.good(ChunkRecord(record.entry, record.scheme, (p,)))
    ]


@st.composite
def meshes(draw: st.DrawFn, least: int = 1) -> list[Member]:
    numbers = draw(st.lists(st.integers(1, 60), min_size=least, max_size=9, unique=True))
    zones = draw(st.sampled_from([[""], ["a", "b"], ["a", "b", "c"]]))
    return [member(n, draw(st.sampled_from(zones))) for n in numbers]


@st.composite
def troubled(draw: st.DrawFn) -> tuple[ChunkRecord, Scheme, Nodes, Disks]:
    """A chunk that was written to some mesh, and what has become of nodes and pieces since: it can still be
    read from nodes that are not gone."""
    before = draw(meshes())
    record = as_placed(before, draw(st.sampled_from(SCHEMES)), draw(st.integers(0, 20)))
    stay = [m for m in before if draw(st.integers(0, 5))]
    known = {m.node for m in before}
    joined = [m for m in draw(meshes(0)) if m.node not in known]
    now = [Member(m.node, m.address, m.zone, draining=draw(st.integers(0, 4)) == 0) for m in stay] + joined
    gone = {m.node for m in now if draw(st.integers(0, 6)) == 0}
    closed = {m.node for m in now if draw(st.integers(0, 6)) == 0}
    disks = Disks.of(record)
    disks.pieces -= {p for p in sorted(disks.pieces) if draw(st.integers(0, 6)) == 0}
    nodes = Nodes(now, gone, closed)
    assume(any(not m.draining and m.node not in gone for m in now))
    assume(spare(record, nodes, wrong(record, disks, nodes)) >= 0)
    return record, draw(st.sampled_from(SCHEMES)), nodes, disks


def reachable(record: ChunkRecord, disks: Disks, nodes: Nodes) -> int:
    """Distinct good pieces that the record names, on members that are not gone."""
    there = {m.node for m in nodes.members} - set(nodes.gone)
    places = tuple(p for p in record.places if p.node in there)
    return disks.readable(ChunkRecord(record.entry, record.scheme, places))


# -- what never happens ---------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(troubled(), st.sets(st.integers(0, 6)))
def test_no_step_makes_fewer_pieces_readable_whatever_could_not_be_written(
    case: tuple[ChunkRecord, Scheme, Nodes, Disks], fails: set[int]
) -> None:
    record, wanted, nodes, disks = case
    before = reachable(record, disks, nodes)
    work = plan(VIDEO, record, wanted, nodes, wrong(record, disks, nodes))
    if work is None:
        return
    after = carry_out(record, work, disks, 1, fails)
    assert reachable(after, disks, nodes) >= after.scheme.k
    if after.scheme == record.scheme:
        assert reachable(after, disks, nodes) >= before


@settings(max_examples=600, deadline=None)
@given(troubled())
def test_no_two_pieces_go_to_one_node_while_another_is_free(
    case: tuple[ChunkRecord, Scheme, Nodes, Disks],
) -> None:
    record, wanted, nodes, disks = case
    work = plan(VIDEO, record, wanted, nodes, wrong(record, disks, nodes))
    if work is None:
        return
    open_to_writes = {m.node for m in nodes.usable()} - set(nodes.closed)
    holders = Counter(p.node for p in (*work.keep, *work.heal))
    holders.update(n for _, n in work.write)
    for _, where in work.write:
        assert where in open_to_writes
        if holders[where] > 1:
            assert not [n for n in open_to_writes if holders[n] < holders[where] - 1], "a node is freer"
    if work.scheme.k == 1:
        assert max(holders.values(), default=1) == 1, "a second copy on one node would be none"
    else:
        numbers = [p.piece for p in (*work.keep, *work.heal)] + [i for i, _ in work.write]
        assert len(numbers) == len(set(numbers)), "no fragment is made twice"


@settings(max_examples=600, deadline=None)
@given(troubled())
def test_a_plan_asks_for_no_more_pieces_than_the_scheme_has(
    case: tuple[ChunkRecord, Scheme, Nodes, Disks],
) -> None:
    record, wanted, nodes, disks = case
    work = plan(VIDEO, record, wanted, nodes, wrong(record, disks, nodes))
    if work is not None:
        assert len(work.keep) + len(work.heal) + len(work.write) <= work.scheme.m
        after = carry_out(record, work, disks, 1)
        assert len(after.places) <= max(after.scheme.m, len(record.places))


@settings(max_examples=300, deadline=None)
@given(troubled())
def test_a_chunk_that_cannot_be_read_now_is_left_alone(
    case: tuple[ChunkRecord, Scheme, Nodes, Disks],
) -> None:
    record, wanted, nodes, _ = case
    assert plan(VIDEO, record, wanted, nodes, record.places) is None


# -- where it ends --------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(troubled())
def test_plans_come_to_an_end_with_every_piece_where_placement_would_have_it(
    case: tuple[ChunkRecord, Scheme, Nodes, Disks],
) -> None:
    record, wanted, nodes, disks = case
    nodes = Nodes(nodes.members, nodes.gone)
    record, done = converge(record, wanted, nodes, disks)
    usable = nodes.usable()
    scheme = choose_scheme(wanted, len(usable))
    there = [p for p in record.places if p.node not in nodes.gone]
    assert Counter(p.node for p in there) == Counter(ideal(VIDEO, record.entry.index, scheme, usable))
    assert len(sound(record, nodes, wrong(record, disks, nodes))) == scheme.m
    assert len(done) <= 3
    if not nodes.gone:
        assert record.scheme == scheme


@settings(max_examples=300, deadline=None)
@given(meshes(2), st.sampled_from(SCHEMES), st.data())
def test_a_drained_node_is_named_no_more(members: list[Member], wanted: Scheme, data: st.DataObject) -> None:
    record = as_placed(members, wanted)
    drained = data.draw(st.sampled_from(members))
    nodes = Nodes([Member(m.node, m.address, m.zone, draining=m == drained) for m in members])
    disks = Disks.of(record)
    record, _ = converge(record, wanted, nodes, disks)
    assert drained.node not in {p.node for p in record.places}
    assert disks.readable(record) == record.scheme.m


@settings(max_examples=300, deadline=None)
@given(meshes(2), st.sampled_from(SCHEMES), st.data())
def test_a_bad_piece_is_written_again_where_it_is_named_and_the_register_stays(
    members: list[Member], wanted: Scheme, data: st.DataObject
) -> None:
    record = as_placed(members, wanted)
    assume(record.scheme.m > record.scheme.k)
    bad = data.draw(st.sampled_from(record.places))
    work = plan(VIDEO, record, wanted, Nodes(members), [bad])
    assert work is not None
    assert (work.reason, work.heal, work.write) == (Reason.REPAIR, (bad,), ())
    assert settled(record, work, []) == tuple(sorted(record.places, key=lambda p: (p.piece, p.node)))


@settings(max_examples=200, deadline=None)
@given(meshes(3), st.sampled_from(SCHEMES), st.data())
def test_what_a_silent_node_holds_is_neither_dropped_nor_replaced_before_it_counts_as_gone(
    members: list[Member], wanted: Scheme, data: st.DataObject
) -> None:
    record = as_placed(members, wanted)
    silent = data.draw(st.sampled_from(members)).node
    assert plan(VIDEO, record, wanted, Nodes(members, closed=[silent])) is None


# -- how much is moved ----------------------------------------------------------------------------

CHUNKS = 400


def moved(before: list[Member], after: list[Member], wanted: Scheme) -> tuple[int, int]:
    """Pieces that are written because the mesh changed, of how many."""
    written = pieces = 0
    for index in range(CHUNKS):
        record = as_placed(before, wanted, index)
        left = {m.node for m in after}
        disks = Disks.of(record)
        disks.pieces = {p for p in disks.pieces if p[0] in left}
        _, done = converge(record, wanted, Nodes(after), disks)
        written += sum(len(w.write) for w in done)
        pieces += record.scheme.m
    return written, pieces


def test_a_joining_node_takes_about_its_share_and_nothing_else_moves() -> None:
    for scheme in (REPLICATED, Scheme(3, 5)):
        for n in (5, 8):
            members = [member(i) for i in range(n)]
            written, pieces = moved(members, [*members, member(99)], scheme)
            share = pieces / (n + 1)
            assert 0.8 * share <= written <= 1.2 * share


def test_a_leaving_node_moves_what_it_held_and_nothing_else() -> None:
    for scheme in (REPLICATED, Scheme(3, 5)):
        members = [member(i) for i in range(8)]
        held = sum(p.node == node(3) for i in range(CHUNKS) for p in as_placed(members, scheme, i).places)
        written, _ = moved(members, [m for m in members if m.node != node(3)], scheme)
        assert written == held


# -- the order of work ----------------------------------------------------------------------------


def test_the_chunk_that_is_nearest_to_being_lost_comes_first() -> None:
    members = [member(i) for i in range(8)]
    record = as_placed(members, Scheme(3, 5))
    lost = [plan(VIDEO, record, Scheme(3, 5), Nodes(members, gone=[p.node for p in record.places[:n]]))
            for n in (2, 1)]  # fmt: skip
    draining = [Member(m.node, m.address, draining=m.node == record.places[0].node) for m in members]
    drain = plan(VIDEO, record, Scheme(3, 5), Nodes(draining))
    switch = plan(VIDEO, record, REPLICATED, Nodes(members))
    elsewhere = plan(VIDEO, record, Scheme(3, 5), Nodes([*members, *(member(i) for i in range(20, 60))]))
    works = [*lost, drain, switch, elsewhere]
    reasons = [w.reason for w in works if w is not None]
    assert reasons == [Reason.REPAIR, Reason.REPAIR, Reason.DRAIN, Reason.SWITCH, Reason.MOVE]
    urgencies = [w.urgency for w in works if w is not None]
    assert urgencies == sorted(urgencies)
    assert len(set(urgencies)) == 5


# -- meshes that become too small -----------------------------------------------------------------


def test_a_copy_on_a_node_that_left_is_named_no_more_where_no_other_can_take_it() -> None:
    members = [member(i) for i in range(3)]
    record = as_placed(members, REPLICATED)
    left = Nodes([m for m in members if m.node != record.places[0].node])
    work = plan(VIDEO, record, REPLICATED, left)
    assert work is not None
    assert (work.scheme, work.write, work.heal) == (Scheme(1, 2), (), ())
    assert set(settled(record, work, [])) == set(record.places[1:])


def test_a_copy_on_a_node_that_may_come_back_stays_named() -> None:
    members = [member(i) for i in range(3)]
    record = as_placed(members, REPLICATED)
    assert plan(VIDEO, record, REPLICATED, Nodes(members, gone=[record.places[0].node])) is None
