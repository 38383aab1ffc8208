"""The acceptor, the change function and the proposer, one branch at a time, by hand."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from vstack.errors import DamagedData
from vstack.mesh.config import Config, Member, NodeId, View
from vstack.mesh.messages import (
    ABSENT,
    EMPTY,
    ENVELOPE_BYTES,
    ENVELOPE_ITEMS,
    ZERO,
    Accept,
    Accepted,
    Applied,
    Ballot,
    Created,
    Creates,
    Forward,
    Found,
    Mismatch,
    Nack,
    Ok,
    Op,
    Outcome,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Record,
    Reply,
    Request,
    Unknown,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.change import OPS_REMEMBERED, apply
from vstack.mesh.paxos.proposer import Proposer

NODES = tuple(f"{i:032x}" for i in range(1, 8))
VIDEO = "ab" * 32
KEY = f"video/{VIDEO}"
CHUNK = f"chunk/{VIDEO}/1.1048577/00000003"
FIRST = (1 << 20) + 1
"""The first version that a register gets in epoch 1."""


def config(nodes: tuple[NodeId, ...], epoch: int = 1, base: int = 1) -> Config:
    return Config(epoch, tuple(Member(n, "node:1") for n in nodes), base)


def op(number: int, expect: int | None, data: bytes | None = b"x", key: str = KEY, born: int = 1) -> Op:
    return Op(number.to_bytes(16, "big"), key, born, expect, None if expect is None else data)


def ballot(round: int, node: NodeId = NODES[0], epoch: int = 1, boot: int = 1) -> Ballot:
    return Ballot(epoch, round, node, boot)


class Mesh:
    """Acceptors and proposers whose messages a test moves by hand."""

    def __init__(self, *chain: Config, size: int = 3) -> None:
        self.chain = chain or (config(NODES[:size]),)
        self.names = self.chain[-1].nodes
        self.disks: dict[NodeId, dict[str, Record]] = {n: {} for n in NODES}
        self.views = {n: View(self.chain) for n in NODES}
        self.acceptors = {n: self._acceptor(n) for n in NODES}
        self.proposers = {n: self._proposer(n) for n in NODES}
        self.wire: list[tuple[NodeId, NodeId, Request | Reply | Forward | Creates | Created]] = []
        self.sent = 0
        self.now = 0.0

    def _acceptor(self, n: NodeId) -> Acceptor:
        disk = self.disks[n]
        return Acceptor(n, self.views[n], disk.get, lambda a, b: any(a <= key <= b for key in disk))

    def _proposer(self, n: NodeId, boot: int = 1) -> Proposer:
        return Proposer(n, boot, self.views[n], self.acceptors[n], Random(1))

    def leader(self, key: str = CHUNK) -> NodeId:
        leader = View(self.chain).leader(key)
        assert leader is not None
        return leader

    def submit(self, node: NodeId, *ops: Op, patience: float = 100.0) -> None:
        for o in ops:
            self.proposers[node].submit(o, self.now, self.now + patience, o.id)
        self.commit()

    def submit_all(self, node: NodeId, *ops: Op, patience: float = 100.0) -> None:
        self.proposers[node].submit_all(ops, self.now, self.now + patience, [o.id for o in ops])
        self.commit()

    def commit(self) -> None:
        """Everything dirty is on disk, and what waited for that is on its way."""
        for n in NODES:
            self.disks[n].update(self.acceptors[n].dirty)
            self.acceptors[n].committed()
            outbox, self.proposers[n].outbox = self.proposers[n].outbox, []
            self.sent += len(outbox)
            self.wire += [(n, to, m) for to, m in outbox]

    def at(self, now: float) -> None:
        self.now = now
        for n in NODES:
            self.proposers[n].tick(now)
        self.commit()

    def deliver(self, *kinds: type, to: NodeId | None = None, sender: NodeId | None = None) -> int:
        """Delivers what is on the wire now and of these kinds (all if none), not what follows from it."""
        chosen = [
            x
            for x in self.wire
            if (not kinds or isinstance(x[2], kinds)) and to in (None, x[1]) and sender in (None, x[0])
        ]
        self.wire = [x for x in self.wire if x not in chosen]
        for source, target, m in chosen:
            if isinstance(m, Creates):
                replies = self.acceptors[target].on_creates(m)
                self.sent += len(replies)
                self.wire += [(target, source, reply) for reply in replies]
            elif isinstance(m, Created):
                self.proposers[target].created(source, m, self.now)
            elif isinstance(m, Request):
                reply = self.acceptors[target].receive(m)
                if reply is not None:
                    self.sent += 1
                    self.wire.append((target, source, reply))
            elif not isinstance(m, Forward):
                self.proposers[target].receive(source, m, self.now)
        self.commit()
        return len(chosen)

    def run(self) -> None:
        """Until every operation has ended, as fast as the timers allow."""
        while True:
            self.at(self.now)
            while self.deliver():
                self.at(self.now)
            waiting = [self.proposers[n].next_wake() for n in NODES if self.proposers[n].in_flight]
            if not waiting:
                return
            self.now = max(self.now, min(w for w in waiting if w is not None))

    def lose(self) -> None:
        self.wire.clear()

    def outcomes(self, node: NodeId) -> list[Outcome]:
        done, self.proposers[node].done = self.proposers[node].done, []
        return [outcome for _, outcome in done]

    def ask(self, node: NodeId, *ops: Op) -> list[Outcome]:
        self.submit(node, *ops)
        self.run()
        return self.outcomes(node)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


# -- the acceptor -----------------------------------------------------------------------------------


def acceptor(record: Record | None = None, key: str = KEY, view: View | None = None) -> Acceptor:
    disk = {} if record is None else {key: record}
    return Acceptor(NODES[0], view or View((config(NODES[:3]),)), disk.get)


def test_a_promise_is_repeated_for_a_duplicate_but_not_after_its_accept() -> None:
    a = acceptor()
    promise = Promise(KEY, ballot(1), ZERO, ABSENT)
    assert a.receive(Prepare(KEY, ballot(1))) == promise
    assert a.receive(Prepare(KEY, ballot(1))) == promise
    assert a.receive(Accept(KEY, ballot(1), Value(5))) == Accepted(KEY, ballot(1))
    assert a.receive(Prepare(KEY, ballot(1))) == Nack(KEY, ballot(1), ballot(1), 1)


def test_prepare_is_refused_at_or_below_the_floor_and_at_round_0() -> None:
    a = acceptor(Record(ballot(5), ballot(3), Value(7)))
    assert a.receive(Prepare(KEY, ballot(4))) == Nack(KEY, ballot(4), ballot(5), 1)
    assert isinstance(acceptor().receive(Prepare(KEY, ballot(0))), Nack)
    assert a.dirty == {}


def test_a_promise_tells_what_was_accepted() -> None:
    a = acceptor(Record(ballot(3), ballot(3), Value(7)))
    assert a.receive(Prepare(KEY, ballot(4))) == Promise(KEY, ballot(4), ballot(3), Value(7))
    assert a.record(KEY) == Record(ballot(4), ballot(3), Value(7))


def test_accept_raises_the_promise() -> None:
    a = acceptor(Record(ballot(3)))
    assert a.receive(Accept(KEY, ballot(4), Value(7))) == Accepted(KEY, ballot(4))
    assert a.record(KEY) == Record(ballot(4), ballot(4), Value(7))


def test_accept_below_the_promise_is_refused() -> None:
    a = acceptor(Record(ballot(3)))
    assert a.receive(Accept(KEY, ballot(2), Value(7))) == Nack(KEY, ballot(2), ballot(3), 1)


def test_a_retransmitted_accept_is_acknowledged_again_even_after_a_newer_promise() -> None:
    a = acceptor(Record(ballot(9), ballot(3), Value(7)))
    assert a.receive(Accept(KEY, ballot(3), Value(7))) == Accepted(KEY, ballot(3))
    assert a.dirty == {}


def test_one_ballot_does_not_stand_for_two_values() -> None:
    a = acceptor(Record(ballot(3), ballot(3), Value(7)))
    assert isinstance(a.receive(Accept(KEY, ballot(3), Value(8))), Nack)


def test_a_fresh_accept_needs_an_absent_record_the_leader_and_the_own_epoch_of_the_key() -> None:
    leader = Mesh().leader()
    other = next(n for n in NODES[:3] if n != leader)
    fresh = Accept(CHUNK, ballot(0, leader), Value(7), True)
    assert acceptor().receive(fresh) == Accepted(CHUNK, ballot(0, leader))
    assert isinstance(acceptor().receive(Accept(CHUNK, ballot(0, other), Value(7), True)), Nack)
    assert isinstance(acceptor().receive(Accept(CHUNK, ballot(1, leader), Value(7), True)), Nack)
    assert isinstance(acceptor().receive(Accept(CHUNK, ballot(0, leader), Value(7), False)), Nack)
    assert isinstance(acceptor().receive(Accept(KEY, ballot(0, leader), Value(7), True)), Nack)
    assert isinstance(acceptor(Record(ballot(1)), CHUNK).receive(fresh), Nack)
    later = View((config(NODES[:3]), config(NODES[:3], 2)))
    in_epoch_2 = Accept(CHUNK, ballot(0, leader, 2), Value(7), True)
    assert isinstance(acceptor(view=later).receive(in_epoch_2), Nack)


def test_a_fresh_accept_is_acknowledged_again_after_a_promise_but_never_with_another_value() -> None:
    leader = Mesh().leader()
    b = ballot(0, leader)
    a = acceptor(Record(ballot(4), b, Value(7)), CHUNK)
    assert a.receive(Accept(CHUNK, b, Value(7), True)) == Accepted(CHUNK, b)
    assert isinstance(a.receive(Accept(CHUNK, b, Value(8), True)), Nack)


def test_the_fence_refuses_older_epochs_and_says_nothing_about_unknown_ones() -> None:
    a = acceptor(view=View((config(NODES[:3]), config(NODES[:3], 2))))
    assert a.receive(Prepare(KEY, ballot(1))) == Nack(KEY, ballot(1), ZERO, 2)
    assert a.receive(Prepare(KEY, ballot(1, epoch=4))) is None
    assert a.epoch_wanted == 4
    assert a.receive(Read(KEY, 1, 9)) == ReadReply(KEY, 9, 2, ZERO, ABSENT)
    assert a.receive(Read(KEY, 5, 9)) is None
    assert a.epoch_wanted == 5


def test_a_configuration_register_lives_outside_the_fence() -> None:
    a = acceptor(view=View((config(NODES[:3]), config(NODES[:3], 2))))
    assert isinstance(a.receive(Prepare("config/3", ballot(1, epoch=0))), Promise)
    assert a.receive(Prepare("config/3", ballot(2))) is None, "no proposer of a configuration is of an epoch"


def test_a_node_outside_the_group_stores_nothing() -> None:
    stranger = Acceptor(NODES[6], View((config(NODES[:3]),)), lambda _: None)
    assert stranger.receive(Prepare(KEY, ballot(1))) is None
    assert stranger.dirty == {}


def test_a_damaged_record_is_neither_absent_nor_a_refusal() -> None:
    def broken(key: str) -> Record | None:
        raise DamagedData(key)

    a = Acceptor(NODES[0], View((config(NODES[:3]),)), broken)
    messages: list[Request] = [
        Prepare(KEY, ballot(1)),
        Accept(KEY, ballot(1), Value(7)),
        Read(KEY, 1, 1),
        Prepare(KEY, ballot(1, epoch=0)),
    ]
    assert [a.receive(m) for m in messages] == [None] * 4
    assert a.damaged == 4


def test_the_acceptor_asserts_that_nothing_goes_down() -> None:
    a = acceptor()
    for old, new in (
        (Record(ballot(2)), Record(ballot(1))),
        (Record(ballot(2), ballot(2)), Record(ballot(2), ballot(1))),
        (EMPTY, Record(ballot(1), ballot(2))),
    ):
        with pytest.raises(AssertionError, match=r"I[12]"):
            a._write(KEY, old, new)


def test_the_record_in_memory_counts_until_it_is_committed() -> None:
    a = acceptor(Record(ballot(1)))
    a.receive(Prepare(KEY, ballot(2)))
    assert a.record(KEY).promised == ballot(2)
    a.committed()
    assert a.record(KEY).promised == ballot(1), "the disk of this test was never written"


# -- the change function ----------------------------------------------------------------------------


def test_a_change_replaces_exactly_the_version_it_names() -> None:
    v1, outcome = apply(op(1, 0), ABSENT, 1)
    assert (v1, outcome) == (Value(FIRST, b"x", (Applied(op(1, 0).id, 0),)), Ok(FIRST))
    v2, outcome = apply(op(2, FIRST, None), v1, 1)
    assert (v2.version, v2.data, outcome) == (FIRST + 1, None, Ok(FIRST + 1))
    assert apply(op(3, FIRST), v2, 1) == (v2, Mismatch(FIRST + 1, None))
    assert apply(op(4, None), v1, 1) == (v1, Found(FIRST, b"x"))


def test_versions_rise_to_the_epoch_and_never_fall() -> None:
    assert apply(op(1, 5), Value(5), 3)[1] == Ok((3 << 20) + 1)
    assert apply(op(1, 9 << 20), Value(9 << 20), 3)[1] == Ok((9 << 20) + 1)


def test_a_repeated_operation_is_told_the_version_that_it_made() -> None:
    value = ABSENT
    made = []
    for i in range(5):
        value, outcome = apply(op(i, value.version), value, 1)
        made.append(outcome)
    assert [apply(op(i, 0), value, 1) for i in range(5)] == [(value, outcome) for outcome in made]


def test_when_the_evidence_is_gone_the_outcome_is_unknown() -> None:
    value = ABSENT
    for i in range(OPS_REMEMBERED + 1):
        value, _ = apply(op(i, value.version), value, 1)
    assert len(value.ops) == OPS_REMEMBERED
    assert isinstance(apply(op(0, 0), value, 1)[1], Unknown)
    assert isinstance(apply(op(99, FIRST), value, 1)[1], Mismatch), "another one replaced that version"


# -- messages per decision (CHUNKPAXOS, section 9) --------------------------------------------------


@pytest.mark.parametrize(("size", "wire", "own"), [(3, 4, 2), (5, 8, 2)])
def test_a_create_by_the_leader_takes_one_round_trip(size: int, wire: int, own: int) -> None:
    mesh = Mesh(size=size)
    node = mesh.leader()
    assert mesh.ask(node, op(1, 0, key=CHUNK)) == [Ok(FIRST)]
    assert (mesh.sent, mesh.proposers[node].counters["to_self"]) == (wire, own)


@pytest.mark.parametrize(("size", "wire", "own"), [(3, 8, 4), (5, 16, 4)])
def test_the_full_way_takes_two_round_trips(size: int, wire: int, own: int) -> None:
    mesh = Mesh(size=size)
    node = mesh.names[0]
    assert mesh.ask(node, op(1, 0)) == [Ok(FIRST)]
    assert (mesh.sent, mesh.proposers[node].counters["to_self"]) == (wire, own)


@pytest.mark.parametrize(("size", "wire", "own"), [(3, 4, 2), (5, 8, 2)])
def test_a_read_takes_one_round_trip(size: int, wire: int, own: int) -> None:
    mesh = Mesh(size=size)
    mesh.ask(mesh.names[0], op(1, 0))
    mesh.sent = 0
    node = mesh.names[1]
    assert mesh.ask(node, op(2, None)) == [Found(FIRST, b"x")]
    assert (mesh.sent, mesh.proposers[node].counters["to_self"]) == (wire, own)


def test_a_node_outside_the_group_pays_for_its_distance() -> None:
    mesh = Mesh(size=4)
    outside = next(n for n in mesh.names if n not in View(mesh.chain).group(KEY))
    assert mesh.ask(outside, op(1, 0)) == [Ok(FIRST)]
    assert (mesh.sent, mesh.proposers[outside].counters["to_self"]) == (12, 0)


# -- fast create ------------------------------------------------------------------------------------


def test_a_create_is_on_the_own_disk_before_anybody_hears_of_it(mesh: Mesh) -> None:
    node = mesh.leader()
    p = mesh.proposers[node]
    p.submit(op(1, 0, key=CHUNK), 0.0, 9.0, "t")
    assert mesh.acceptors[node].dirty[CHUNK].accepted == ballot(0, node)
    assert [m for _, m in p.outbox if not isinstance(m, Accept)] == []
    assert p.done == []


def test_only_the_leader_creates_in_one_round_trip_and_only_what_is_a_create(mesh: Mesh) -> None:
    leader = mesh.leader()
    other = next(n for n in mesh.names if n != leader)
    mesh.submit(other, op(1, 0, key=CHUNK))
    mesh.submit(leader, op(2, 5, key=CHUNK.replace("3", "4")))
    mesh.submit(leader, op(3, 0, None, key=CHUNK.replace("3", "5")))
    mesh.submit(leader, op(4, 0))
    assert {type(m) for _, _, m in mesh.wire} == {Prepare}


def test_a_restarted_leader_does_not_create_over_its_own_round_0(mesh: Mesh) -> None:
    node = mesh.leader()
    mesh.submit(node, op(1, 0, b"before", key=CHUNK))
    mesh.lose()
    mesh.proposers[node] = mesh._proposer(node, boot=2)
    assert mesh.ask(node, op(2, 0, b"after", key=CHUNK)) == [Mismatch(FIRST, b"before")]
    assert mesh.proposers[node].counters["fast"] == 0


def test_a_create_that_is_refused_goes_the_full_way_at_once(mesh: Mesh) -> None:
    leader = mesh.leader()
    other = next(n for n in mesh.names if n != leader)
    mesh.submit(other, op(1, 0, b"other", key=CHUNK))
    for kind in (Prepare, Promise, Accept, Accepted):
        mesh.wire = [x for x in mesh.wire if x[1] != leader]
        mesh.deliver(kind)
    assert mesh.outcomes(other) == [Ok(FIRST)]
    assert mesh.ask(leader, op(2, 0, b"leader", key=CHUNK)) == [Mismatch(FIRST, b"other")]
    assert mesh.proposers[leader].counters["fast"] == 1


def test_a_leader_that_cannot_read_its_own_record_takes_the_full_way(mesh: Mesh) -> None:
    node = mesh.leader()

    def broken(key: str) -> Record | None:
        raise DamagedData(key)

    mesh.acceptors[node]._lookup = broken
    assert mesh.ask(node, op(1, 0, key=CHUNK)) == [Ok(FIRST)]
    assert mesh.proposers[node].counters["fast"] == 0


def test_a_create_that_the_own_disk_does_not_take_reaches_nobody(mesh: Mesh) -> None:
    node = mesh.leader()
    looks = iter([None])

    def breaks_at_the_second_look(key: str) -> Record | None:
        for record in looks:
            return record
        raise DamagedData(key)

    mesh.acceptors[node]._lookup = breaks_at_the_second_look
    mesh.submit(node, op(1, 0, key=CHUNK))
    assert mesh.proposers[node].counters["fast"] == 1
    assert mesh.wire == []


def test_a_later_attempt_finds_the_create_that_reached_one_acceptor_only(mesh: Mesh) -> None:
    leader = mesh.leader()
    a, b = (n for n in mesh.names if n != leader)
    mesh.submit(leader, op(1, 0, b"made", key=CHUNK))
    mesh.lose()
    mesh.submit(a, op(2, 0, b"late", key=CHUNK))
    mesh.wire = [x for x in mesh.wire if x[1] != b]
    mesh.run()
    assert mesh.outcomes(a) == [Mismatch(FIRST, b"made")]


# -- quorums and ballots ----------------------------------------------------------------------------


def test_an_answer_to_an_older_ballot_does_not_count(mesh: Mesh) -> None:
    node, a, b = mesh.names
    mesh.submit(node, op(1, 0))
    p = mesh.proposers[node]
    p.receive(a, Promise(KEY, ballot(0, node), ZERO, ABSENT), 0.0)
    p.receive(b, Accepted(KEY, ballot(1, node)), 0.0)
    p.receive(b, ReadReply(KEY, 1, 1, ZERO, ABSENT), 0.0)
    p.receive(b, Promise(CHUNK, ballot(1, node), ZERO, ABSENT), 0.0)
    assert p.outbox == []
    assert p.done == []


def test_a_vote_from_outside_the_group_does_not_count(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0))
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    mesh.proposers[node].receive(NODES[6], Accepted(KEY, ballot(1, node)), 0.0)
    assert mesh.outcomes(node) == []


@pytest.mark.parametrize(("boot", "values"), [(1, 2), (2, 1)], ids=["same boot", "next boot"])
def test_only_the_boot_in_the_ballot_keeps_a_restarted_node_from_using_a_ballot_twice(
    boot: int, values: int
) -> None:
    """Bug B5, with the wrong boot to show that the schedule has teeth."""
    mesh = Mesh(size=4)
    outside = next(n for n in mesh.names if n not in View(mesh.chain).group(KEY))
    proposed: set[bytes | None] = set()
    for incarnation in (1, boot):
        mesh.proposers[outside] = mesh._proposer(outside, incarnation)
        mesh.submit(outside, op(10 * incarnation + len(proposed), 0, b"%d" % len(proposed)))
        mesh.deliver(Prepare)
        mesh.deliver(Promise)
        accepts = [(to, m) for _, to, m in mesh.wire if isinstance(m, Accept)]
        proposed |= {m.value.data for _, m in accepts if m.ballot == ballot(1, outside)}
        mesh.deliver(Accept, to=View(mesh.chain).group(KEY)[0])
        mesh.lose()
    assert len(proposed) == values


@pytest.mark.parametrize("rounds", [(1, 2), (2, 1)])
def test_the_value_of_the_highest_ballot_is_the_base(mesh: Mesh, rounds: tuple[int, int]) -> None:
    for node, round in zip(mesh.names, rounds, strict=False):
        mesh.disks[node][KEY] = Record(ballot(3), ballot(round), Value(FIRST, b"%d" % round))
    assert mesh.ask(mesh.names[0], op(1, 0)) == [Mismatch(FIRST, b"2")]


def test_operations_that_wait_share_an_attempt_and_each_is_told_its_own_outcome(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0))
    mesh.submit(node, op(2, FIRST, b"y"), op(3, None), op(4, FIRST), op(2, FIRST, b"y"))
    mesh.run()
    assert mesh.outcomes(node) == [
        Ok(FIRST),
        Ok(FIRST + 1),
        Found(FIRST + 1, b"y"),
        Mismatch(FIRST + 1, b"y"),
        Ok(FIRST + 1),
    ]
    assert mesh.proposers[node].counters["full"] == 2


def test_a_mismatch_is_reported_only_once_its_value_is_chosen(mesh: Mesh) -> None:
    node, a, _ = mesh.names
    mesh.disks[a][KEY] = Record(ballot(1, a), ballot(1, a), Value(FIRST, b"maybe"))
    mesh.submit(node, op(1, 0))
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    assert mesh.outcomes(node) == []
    mesh.run()
    assert mesh.outcomes(node) == [Mismatch(FIRST, b"maybe")]


def test_a_refusal_that_names_a_higher_ballot_ends_the_attempt_and_the_next_is_above_it(mesh: Mesh) -> None:
    node, a, _ = mesh.names
    mesh.disks[a][KEY] = Record(ballot(7, a))
    mesh.submit(node, op(1, 0))
    mesh.deliver(Prepare, to=a)
    mesh.deliver(Nack)
    assert mesh.proposers[node].counters["lost"] == 1
    mesh.lose()
    mesh.at(1.0)
    assert [m.ballot.round for _, _, m in mesh.wire if isinstance(m, Prepare)] == [8, 8]
    mesh.run()
    assert mesh.outcomes(node) == [Ok(FIRST)]


def test_a_late_copy_of_the_own_prepare_refuses_nothing(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0))
    copies = list(mesh.wire)
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    mesh.deliver(Accept)
    mesh.wire = copies
    mesh.deliver(Prepare)
    assert [m for _, _, m in mesh.wire if not isinstance(m, Nack)] == []
    mesh.deliver(Nack)
    assert mesh.proposers[node].counters["lost"] == 0


def test_an_attempt_ends_when_a_majority_has_become_impossible() -> None:
    mesh = Mesh(size=3)
    node, a, b = mesh.names
    mesh.submit(node, op(1, 0))
    p = mesh.proposers[node]
    p.receive(a, Nack(KEY, ballot(1, node), ZERO, 1), 0.0)
    assert p.counters["lost"] == 0
    p.receive(b, Nack(KEY, ballot(1, node), ZERO, 1), 0.0)
    assert p.counters["lost"] == 1


# -- reads ------------------------------------------------------------------------------------------


def test_a_mixed_quorum_settles_nothing_and_the_read_goes_the_full_way(mesh: Mesh) -> None:
    node, a, _ = mesh.names
    mesh.disks[node][KEY] = Record(ballot(3, node), ballot(1, node), Value(FIRST, b"a"))
    mesh.disks[a][KEY] = Record(ballot(2, a), ballot(2, a), Value(FIRST, b"b"))
    assert mesh.ask(node, op(1, None)) == [Found(FIRST, b"b")]
    assert mesh.proposers[node].counters["full"] == 1
    assert sum(disk[KEY].value.data == b"b" for disk in list(mesh.disks.values())[:3]) >= 2


def test_a_majority_with_one_ballot_is_enough_for_a_read(mesh: Mesh) -> None:
    node, a, b = mesh.names
    mesh.ask(a, op(1, 0))
    mesh.submit(node, op(2, None))
    mesh.wire = [x for x in mesh.wire if x[1] != b]
    mesh.run()
    assert mesh.outcomes(node) == [Found(FIRST, b"x")]


def test_a_read_that_meets_silence_takes_the_full_way(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, None))
    mesh.lose()
    mesh.at(0.4)
    mesh.at(2.0)
    assert {type(m) for _, _, m in mesh.wire} == {Prepare}
    mesh.run()
    assert mesh.outcomes(node) == [Found(0, None)]


def test_a_reply_to_a_read_of_an_earlier_process_does_not_count(mesh: Mesh) -> None:
    node, a, _ = mesh.names
    mesh.submit(node, op(1, None))
    mesh.deliver(Read)
    mesh.proposers[node] = mesh._proposer(node, boot=2)
    mesh.acceptors[node].dirty[KEY] = Record(ballot(1, a), ballot(1, a), Value(FIRST, b"new"))
    mesh.submit(node, op(1, None))
    mesh.deliver(ReadReply)
    assert mesh.outcomes(node) == []


def test_a_reply_from_outside_the_group_or_from_an_older_epoch_is_no_part_of_a_quorum() -> None:
    mesh = Mesh(config(NODES[:3]), config(NODES[:3], 2))
    node, a, b = mesh.names
    mesh.submit(node, op(1, None))
    (token,) = {m.token for _, _, m in mesh.wire if isinstance(m, Read)}
    mesh.proposers[node].receive(a, ReadReply(KEY, token, 1, ZERO, ABSENT), 0.0)
    mesh.proposers[node].receive(NODES[6], ReadReply(KEY, token, 2, ZERO, ABSENT), 0.0)
    assert mesh.outcomes(node) == []
    mesh.proposers[node].receive(b, ReadReply(KEY, token, 2, ZERO, ABSENT), 0.0)
    assert mesh.outcomes(node) == [Found(0, None)], "with the own one, that is a majority"


# -- time -------------------------------------------------------------------------------------------


def test_an_accept_is_sent_again_to_those_who_did_not_answer_with_the_same_value(mesh: Mesh) -> None:
    node, a, b = mesh.names
    mesh.submit(node, op(1, 0))
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    first = list(mesh.wire)
    mesh.lose()
    mesh.at(0.35)
    assert mesh.wire == first
    assert {to for _, to, _ in first} == {a, b}


def test_an_accept_that_nobody_answers_ends_and_the_operation_starts_over_at_a_new_ballot(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0))
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    for now in (0.3, 0.9, 2.1, 4.5, 6.0):
        mesh.lose()
        mesh.at(now)
    assert [m.ballot.round for _, _, m in mesh.wire if isinstance(m, Prepare)] == [2, 2]
    mesh.run()
    assert mesh.outcomes(node) == [Ok(FIRST)]
    assert mesh.proposers[node].in_flight == 0


def test_patience_grows_with_every_attempt_that_nobody_answers_and_with_the_round_trip(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0))
    began = [0.0]
    while len(began) < 5:
        mesh.lose()
        mesh.at(mesh.proposers[node].next_wake() or 0.0)
        began += [mesh.now] if mesh.wire else []
    waits = [after - before for before, after in pairwise(began)]
    assert all(0.3 * 2**i <= wait <= 0.3 * 2**i + 1.0 for i, wait in enumerate(waits))
    mesh.now += 2.0
    mesh.run()
    mesh.submit(node, op(2, 0))
    mesh.lose()
    mesh.at(mesh.now + 0.5)
    assert mesh.wire == [], "a round trip took two seconds"


def test_an_operation_past_its_deadline_is_unknown_and_may_still_happen(mesh: Mesh) -> None:
    node, a, _ = mesh.names
    mesh.submit(node, op(1, 0), patience=0.1)
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    mesh.at(0.1)
    assert [type(o) for o in mesh.outcomes(node)] == [Unknown]
    mesh.run()
    assert mesh.outcomes(node) == []
    assert mesh.ask(a, op(2, None)) == [Found(FIRST, b"x")]
    assert mesh.proposers[node]._keys == {}


def test_what_waits_behind_an_expired_attempt_starts_at_once(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0), patience=0.1)
    mesh.lose()
    mesh.submit(node, op(2, 0))
    mesh.at(0.1)
    mesh.run()
    assert [type(o) for o in mesh.outcomes(node)] == [Unknown, Ok]


def test_nothing_is_left_of_a_key_that_is_idle(mesh: Mesh) -> None:
    node = mesh.names[0]
    done = mesh.ask(node, op(1, 0), op(2, None))
    mesh.submit(node, op(3, None), patience=-1.0)
    mesh.at(mesh.now)
    assert [type(o) for o in done + mesh.outcomes(node)] == [Ok, Found, Unknown]
    mesh.at(1000.0)
    assert mesh.proposers[node]._keys == {}
    assert mesh.proposers[node].next_wake() is None


def test_a_mesh_of_one_decides_without_a_message() -> None:
    mesh = Mesh(size=1)
    assert mesh.ask(NODES[0], op(1, 0), op(2, 0), op(3, None)) == [
        Ok(FIRST),
        Mismatch(FIRST, b"x"),
        Found(FIRST, b"x"),
    ]
    assert mesh.ask(NODES[0], op(4, 0, key=CHUNK)) == [Ok(FIRST)]
    assert mesh.sent == 0


# -- epochs -----------------------------------------------------------------------------------------


def test_a_key_of_an_epoch_not_heard_of_waits_for_the_chain(mesh: Mesh) -> None:
    node = mesh.names[0]
    key = CHUNK.replace("/1.", "/2.")
    mesh.submit(node, op(1, 0, key=key))
    assert mesh.wire == []
    assert mesh.acceptors[node].epoch_wanted == 2
    for view in mesh.views.values():
        view.adopt(config(NODES[:3], 2))
    mesh.at(5.0)
    mesh.run()
    assert mesh.outcomes(node) == [Ok((2 << 20) + 1)]


def test_a_change_older_than_the_base_is_not_tried() -> None:
    mesh = Mesh(config(NODES[:3], 2, 2))
    change, read = mesh.ask(NODES[0], op(1, 0, born=1)), mesh.ask(NODES[0], op(2, None, born=1))
    assert [type(o) for o in change + read] == [Unknown, Found]


def test_a_node_that_is_behind_is_told_so_and_its_attempt_ends(mesh: Mesh) -> None:
    behind, *others = mesh.names
    for n in others:
        mesh.views[n].adopt(config(NODES[:3], 2))
    mesh.submit(behind, op(1, 0))
    mesh.deliver(Prepare)
    mesh.deliver(Nack)
    assert mesh.acceptors[behind].epoch_wanted == 2
    assert mesh.proposers[behind].counters["lost"] == 1
    mesh.lose()
    mesh.submit(behind, op(2, None, key=CHUNK))
    mesh.deliver(Read)
    mesh.deliver(ReadReply)
    assert mesh.proposers[behind].counters["lost"] == 2
    mesh.views[behind].adopt(config(NODES[:3], 2))
    mesh.at(5.0)
    mesh.run()
    assert sorted(map(str, map(type, mesh.outcomes(behind)))) == sorted(map(str, (Ok, Found)))


def test_an_attempt_never_reaches_the_group_of_another_epoch(mesh: Mesh) -> None:
    node = mesh.names[0]
    mesh.submit(node, op(1, 0))
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    mesh.lose()
    mesh.views[node].adopt(config(NODES[3:6], 2))
    mesh.at(0.35)
    assert mesh.wire == []
    mesh.proposers[node].receive(mesh.names[1], Accepted(KEY, ballot(1, node)), 0.4)
    assert mesh.outcomes(node) == []


def test_promises_are_needed_from_every_era_until_one_is_settled() -> None:
    old, new = NODES[:3], NODES[3:6]
    mesh = Mesh(config(old), config(new, 2))
    value = Value(FIRST, b"old", (Applied(b"", 0),))
    for n in old[:2]:
        mesh.disks[n][KEY] = Record(ballot(1, old[0]), ballot(1, old[0]), value)
    mesh.submit(new[0], op(1, FIRST, b"new"))
    assert {to for _, to, _ in mesh.wire} == {*old, *new[1:]}
    for n in new[1:]:
        mesh.deliver(to=n)
        mesh.deliver(Promise)
    assert not any(isinstance(m, Accept) for _, _, m in mesh.wire), "the old group was not heard"
    mesh.run()
    assert mesh.outcomes(new[0]) == [Ok((2 << 20) + 1)]
    mesh.submit(new[0], op(2, None))
    assert {type(m) for _, _, m in mesh.wire} == {Read}
    mesh.run()
    assert mesh.outcomes(new[0]) == [Found((2 << 20) + 1, b"new")]
    mesh.submit(new[1], op(3, (2 << 20) + 1, b"newer"))
    mesh.wire = [x for x in mesh.wire if x[1] not in old]
    mesh.run()
    assert mesh.outcomes(new[1]) == [Ok((2 << 20) + 2)], "settled in the new era: the old one is not needed"


def test_a_read_does_not_trust_a_new_group_that_holds_nothing_of_its_era() -> None:
    old, new = NODES[:3], NODES[3:6]
    mesh = Mesh(config(old), config(new, 2))
    for n in old:
        mesh.disks[n][KEY] = Record(ballot(1, n), ballot(1, old[0]), Value(FIRST, b"old"))
    assert mesh.ask(new[0], op(1, None)) == [Found(FIRST, b"old")]
    assert mesh.proposers[new[0]].counters["full"] == 1


# -- runs of fast creates ---------------------------------------------------------------------------

RUN = [f"chunk/{VIDEO}/1.1048577/{i:08d}" for i in range(3, 6)]


def creates(*keys: str, first: int = 1) -> list[Op]:
    return [op(first + i, 0, b"%d" % i, key) for i, key in enumerate(keys)]


def others(mesh: Mesh) -> list[NodeId]:
    return [n for n in mesh.names if n != mesh.leader()]


def kinds_on_wire(mesh: Mesh) -> list[str]:
    return sorted(type(m).__name__ for _, _, m in mesh.wire)


def test_creates_of_neighbouring_chunks_cost_one_message_and_one_answer_for_each_other_node(
    mesh: Mesh,
) -> None:
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*reversed(RUN)))
    assert kinds_on_wire(mesh) == ["Creates"] * 2
    assert all(mesh.disks[leader][key].accepted == ballot(0, leader) for key in RUN)
    assert mesh.outcomes(leader) == []
    mesh.deliver()
    assert kinds_on_wire(mesh) == ["Created"] * 2
    mesh.deliver()
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3
    assert mesh.sent == 4
    assert [mesh.disks[n][key].value.data for n in mesh.names for key in RUN] == [b"2", b"1", b"0"] * 3
    assert mesh.proposers[leader].in_flight == 0
    assert mesh.proposers[leader].counters["unknown"] == 0


def test_a_run_in_a_mesh_of_one_ends_with_its_commit() -> None:
    mesh = Mesh(size=1)
    mesh.submit_all(NODES[0], *creates(*RUN))
    assert mesh.outcomes(NODES[0]) == [Ok(FIRST)] * 3
    assert mesh.sent == 0


def test_in_a_run_each_key_appears_once_and_what_repeats_it_waits_for_the_first(mesh: Mesh) -> None:
    leader = mesh.leader()
    twice = op(9, 0, b"late", RUN[0])
    mesh.submit_all(leader, *creates(*RUN), twice)
    mesh.run()
    assert sorted(mesh.outcomes(leader), key=repr) == [Mismatch(FIRST, b"0"), *[Ok(FIRST)] * 3]


def test_what_is_no_create_of_the_own_leadership_goes_by_itself(mesh: Mesh) -> None:
    leader = mesh.leader()
    next_turn = next(
        key
        for key in (f"chunk/{VIDEO}/1.1048577/{128 * i:08d}" for i in range(1, 4))
        if mesh.leader(key) != leader
    )
    ops = [*creates(*RUN[:2]), op(5, None, key=RUN[2]), op(6, 0, b"y", KEY), op(7, 0, b"z", next_turn)]
    mesh.submit_all(leader, *ops)
    # The chunk of another leader belongs to the same upload: then none of them is a run.
    assert kinds_on_wire(mesh).count("Creates") == 0
    mesh.run()
    assert len(mesh.outcomes(leader)) == 5
    mesh.submit_all(
        others(mesh)[0], *creates(RUN[0].replace("03", "40"), RUN[0].replace("03", "41"), first=20)
    )
    assert "Creates" not in kinds_on_wire(mesh)


def test_a_run_is_refused_by_an_own_disk_that_holds_one_of_its_records(mesh: Mesh) -> None:
    leader = mesh.leader()
    mesh.disks[leader][RUN[1]] = Record(ballot(1, others(mesh)[0]))
    mesh.submit_all(leader, *creates(*RUN))
    assert "Creates" not in kinds_on_wire(mesh)
    assert {type(m).__name__ for _, _, m in mesh.wire} == {"Accept", "Prepare"}
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3


def test_an_acceptor_that_holds_one_of_the_records_answers_for_each_by_itself(mesh: Mesh) -> None:
    leader, other = mesh.leader(), others(mesh)[0]
    promised = Record(ballot(4, other))
    mesh.disks[other][RUN[1]] = promised
    mesh.submit_all(leader, *creates(*RUN))
    mesh.deliver(to=other)
    assert [(type(m).__name__, m.key) for _, to, m in mesh.wire if to == leader] == [
        ("Accepted", RUN[0]),
        ("Nack", RUN[1]),
        ("Accepted", RUN[2]),
    ]
    assert mesh.disks[other][RUN[1]] == promised
    mesh.deliver(to=leader)
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 2
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST)]
    assert mesh.disks[leader][RUN[1]].accepted.round > 4


def test_an_acceptor_looks_for_records_also_among_what_is_not_on_disk_yet(mesh: Mesh) -> None:
    leader, other = mesh.leader(), others(mesh)[0]
    acceptor = mesh.acceptors[other]
    acceptor.receive(Prepare(RUN[2], ballot(1, other)))
    run = Creates(RUN[0][:-8], ballot(0, leader), (3, 4, 5), (Value(FIRST, b"x"),) * 3)
    assert [type(reply) for reply in acceptor.on_creates(run)] == [Accepted, Accepted, Nack]


@pytest.mark.parametrize(
    "wrong",
    [
        ballot(1),  # phase 1 is missing
        ballot(0, NODES[6]),  # not the leader
        ballot(0, epoch=0),  # before the keys' epoch
    ],
)
def test_a_run_that_may_not_create_is_refused_for_each_key(mesh: Mesh, wrong: Ballot) -> None:
    if wrong.node == NODES[0]:
        wrong = wrong._replace(node=mesh.leader())
    acceptor = mesh.acceptors[others(mesh)[0]]
    run = Creates(RUN[0][:-8], wrong, (3, 4), (Value(FIRST, b"x"),) * 2)
    assert [type(reply) for reply in acceptor.on_creates(run)] == [Nack, Nack]
    assert acceptor.dirty == {}


def test_a_run_over_the_turns_of_two_leaders_is_accepted_for_the_keys_of_its_own_only(mesh: Mesh) -> None:
    stem = RUN[0][:-8]
    turn = next(i for i in range(3) if mesh.leader(f"{stem}{128 * i:08d}") == mesh.leader())
    last = 128 * (turn + 1) - 1
    acceptor = mesh.acceptors[others(mesh)[0]]
    run = Creates(stem, ballot(0, mesh.leader()), (last, last + 1), (Value(FIRST, b"x"),) * 2)
    assert [type(reply) for reply in acceptor.on_creates(run)] == [Accepted, Nack]


def test_the_journal_has_a_line_for_each_key_of_a_run(mesh: Mesh) -> None:
    journal: list[Accept] = []
    mesh.acceptors[others(mesh)[0]].journal = journal
    mesh.submit_all(mesh.leader(), *creates(*RUN))
    mesh.deliver()
    assert [m.key for m in journal] == RUN
    assert all(m.fresh and m.ballot == ballot(0, mesh.leader()) for m in journal)


def test_an_acceptor_that_cannot_read_its_disk_answers_for_each_key_that_it_can() -> None:
    def unreadable(first: str, last: str) -> bool:
        raise DamagedData("a block of records")

    mesh = Mesh()
    acceptor = Acceptor(others(mesh)[0], View(mesh.chain), lambda key: None, unreadable)
    run = Creates(RUN[0][:-8], ballot(0, mesh.leader()), (3, 4), (Value(FIRST, b"x"),) * 2)
    assert [type(reply) for reply in acceptor.on_creates(run)] == [Accepted, Accepted]


def test_a_run_that_nobody_answers_goes_on_as_one_accept_for_each_key_to_those_who_did_not() -> None:
    mesh = Mesh(size=5)
    leader = mesh.leader()
    first, *rest = others(mesh)
    mesh.submit_all(leader, *creates(*RUN))
    mesh.deliver(to=first)
    mesh.deliver(Created)
    mesh.lose()
    assert mesh.outcomes(leader) == []
    mesh.at(1.0)
    sent = [(to, m.key) for _, to, m in mesh.wire if isinstance(m, Accept) and m.fresh]
    assert sorted(sent) == sorted((to, key) for to in rest for key in RUN)
    mesh.deliver(to=rest[0])
    mesh.deliver(Accepted)
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3


def test_a_run_past_its_deadline_is_unknown_and_may_still_happen(mesh: Mesh) -> None:
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN), patience=0.2)
    mesh.at(0.2)
    assert [type(outcome) for outcome in mesh.outcomes(leader)] == [Unknown] * 3
    assert mesh.proposers[leader].in_flight == 0
    mesh.deliver(Creates)
    mesh.deliver(Created)
    assert mesh.outcomes(leader) == []
    found = mesh.ask(leader, op(9, None, key=RUN[0]))
    assert found == [Found(FIRST, b"0")]


def test_a_later_operation_waits_behind_the_create_of_a_run(mesh: Mesh) -> None:
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN))
    mesh.submit(leader, op(9, FIRST, b"next", RUN[1]))
    assert kinds_on_wire(mesh) == ["Creates"] * 2
    mesh.deliver(Creates)
    mesh.deliver(Created, sender=others(mesh)[0])
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST + 1)]


def test_an_answer_for_a_part_of_a_run_counts_for_that_part(mesh: Mesh) -> None:
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN))
    mesh.lose()
    part = Created(RUN[0][:-8], ballot(0, leader), (3, 5))
    mesh.proposers[leader].created(others(mesh)[0], part, 0.0)
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 2
    assert mesh.proposers[leader].in_flight == 1


def test_an_answer_to_a_run_of_another_ballot_or_from_outside_the_group_does_not_count(mesh: Mesh) -> None:
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN))
    stem, indexes = RUN[0][:-8], (3, 4, 5)
    mesh.proposers[leader].created(others(mesh)[0], Created(stem, ballot(0, leader, boot=2), indexes), 0.0)
    mesh.proposers[leader].created(NODES[6], Created(stem, ballot(0, leader), indexes), 0.0)
    assert mesh.outcomes(leader) == []
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3


def test_the_same_node_s_answer_to_a_run_counts_once() -> None:
    mesh = Mesh(size=5)
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN))
    answer = Created(RUN[0][:-8], ballot(0, leader), (3, 4, 5))
    for _ in range(3):
        mesh.proposers[leader].created(others(mesh)[0], answer, 0.0)
    assert mesh.outcomes(leader) == []
    mesh.proposers[leader].created(others(mesh)[1], answer, 0.0)
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3


def test_a_late_answer_to_a_run_does_not_count_for_a_later_ballot() -> None:
    mesh = Mesh(size=5)
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN))
    mesh.lose()
    late = Created(RUN[0][:-8], ballot(0, leader), (3, 4, 5))
    for node in others(mesh)[:2]:  # refused: these go on with phase 1, and get to phase 2
        for key in RUN:
            nack = Nack(key, ballot(0, leader), ballot(2, others(mesh)[0]), 1)
            mesh.proposers[leader].receive(node, nack, 0.0)
    mesh.at(0.0)
    mesh.deliver(Prepare)
    mesh.deliver(Promise)
    assert "Accept" in kinds_on_wire(mesh)
    for node in others(mesh):
        mesh.proposers[leader].created(node, late, 0.0)
    assert mesh.outcomes(leader) == []
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3


def test_a_refusal_of_one_key_leaves_the_rest_of_a_run_as_they_are(mesh: Mesh) -> None:
    leader, other = mesh.leader(), others(mesh)[0]
    mesh.submit_all(leader, *creates(*RUN))
    mesh.proposers[leader].receive(other, Nack(RUN[1], ballot(0, leader), ballot(3, other), 1), 0.0)
    mesh.deliver(Creates)
    mesh.deliver(Created, sender=other)
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 2
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST)]


def test_no_run_goes_on_in_another_epoch(mesh: Mesh) -> None:
    leader = mesh.leader()
    mesh.submit_all(leader, *creates(*RUN))
    mesh.deliver(Creates)
    newer = config(mesh.names, epoch=2)
    for n in mesh.names:
        mesh.views[n].adopt(newer)
        mesh.proposers[n].on_epoch(0.0)
    mesh.deliver(Created)
    assert mesh.outcomes(leader) == []
    mesh.run()
    assert mesh.outcomes(leader) == [Ok(FIRST)] * 3
    assert all(mesh.disks[leader][key].accepted.epoch == 2 for key in RUN)


def test_a_run_has_no_more_registers_and_bytes_than_an_item_may_have(mesh: Mesh) -> None:
    leader, stem = mesh.leader(), RUN[0][:-8]
    turn = next(i for i in range(3) if mesh.leader(f"{stem}{128 * i:08d}") == leader)
    many = [f"{stem}{i:08d}" for i in range(128 * turn, 128 * (turn + 1))]
    many += [f"{stem}{i:08d}" for i in range(128 * (turn + 3), 128 * (turn + 5) - 64) if i // 128 == turn + 3]
    many += [f"{stem}{i:08d}" for i in range(128 * (turn + 6), 128 * (turn + 6) + 64)]
    data = b"x" * 3000
    mesh.submit_all(leader, *[op(i + 1, 0, data, key) for i, key in enumerate(many)])
    items = [m for _, to, m in mesh.wire if isinstance(m, Creates) and to == others(mesh)[0]]
    assert sum(len(m.indexes) for m in items) == len(many) == 320
    assert all(m.bulk <= ENVELOPE_BYTES for m in items)
    mesh.wire = []
    fresh = mesh_of_small_creates()
    assert [len(m) for m in fresh] == [ENVELOPE_ITEMS, 64]


def mesh_of_small_creates() -> list[tuple[int, ...]]:
    """The indexes of each item in which 320 creates of one leader travel."""
    mesh = Mesh(size=1)
    seen: list[tuple[int, ...]] = []
    acceptor = mesh.acceptors[NODES[0]]
    create_all = acceptor.create_all

    def watched(m: Creates) -> Created | None:
        seen.append(m.indexes)
        return create_all(m)

    acceptor.create_all = watched  # type: ignore[method-assign]
    keys = [f"{RUN[0][:-8]}{i:08d}" for i in range(320)]
    mesh.submit_all(NODES[0], *[op(i + 1, 0, b"x", key) for i, key in enumerate(keys)])
    assert mesh.outcomes(NODES[0]) == [Ok(FIRST)] * 320
    return seen
