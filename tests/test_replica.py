"""One node's part in what the mesh agrees on, by hand: the branches that seeds reach rarely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random

import pytest

from tests.sim.mutants import IgnoresCutOff, RoundsStartOverForChanges
from vstack.mesh.changes import AddMember, Authorise, RemoveMember, forced
from vstack.mesh.config import CONFIG_KEY, Config, Grant, Member, NodeId, View, key_subject, pack_config
from vstack.mesh.messages import (
    EMPTY,
    Accept,
    AnyItem,
    Ballot,
    Failure,
    Forward,
    Found,
    MeshChanged,
    Nack,
    Ok,
    Op,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Record,
    Told,
    Unknown,
    Value,
)
from vstack.mesh.paxos.replica import FETCH_TRIES, HELD_FOR, Replica, Settle

NODES = [f"{i:032x}" for i in range(1, 10)]
VIDEO = "video/" + "5e" * 32


class Memory:
    """Storage in memory."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.chain: list[Config] = []

    def lookup(self, key: str) -> Record | None:
        return self.records.get(key)

    def any_between(self, first: str, last: str) -> bool:
        return any(first <= k <= last for k in self.records)

    def keys(self, after: str, limit: int) -> Sequence[str]:
        return sorted(k for k in self.records if k > after)[:limit]

    def subjects(self) -> Iterable[str]:
        return {key_subject(k) for k in self.records if not k.startswith(CONFIG_KEY)}

    def commit(self, records: Mapping[str, Record]) -> None:
        self.records.update(records)

    def adopt(self, configs: Sequence[Config], drop: Iterable[str]) -> None:
        self.chain += configs
        gone = set(drop)
        self.records = {k: r for k, r in self.records.items() if k.split("/")[1] not in gone}


def config(epoch: int, nodes: Sequence[NodeId], base: int, change: bytes = b"") -> Config:
    return Config(epoch, tuple(Member(n, f"{n[-2:]}:1") for n in sorted(nodes)), base, change=change)


class Mesh:
    """Replicas that hand each other everything at once, except to and from those that are `cut`."""

    def __init__(self, *chain: Config, kind: type[Replica] = Replica) -> None:
        self.now = 0.0
        self.kind = kind
        self.replicas: dict[NodeId, Replica] = {}
        self.storage: dict[NodeId, Memory] = {}
        self.cut: set[NodeId] = set()
        self.done: dict[object, object] = {}
        self.changed: dict[object, MeshChanged | Failure] = {}
        self.sent: list[tuple[NodeId, NodeId, AnyItem]] = []
        for node in dict.fromkeys(n for c in chain for n in c.nodes):
            self.start(node, chain)

    def start(self, node: NodeId, chain: Sequence[Config] = ()) -> Replica:
        storage = self.storage.setdefault(node, Memory())
        storage.chain = storage.chain or list(chain)
        replica = self.kind(node, 1, storage.chain, storage, Random(node), kindness=0.0)
        self.replicas[node] = replica
        replica.proposer.is_live = lambda n: n not in self.cut
        return replica

    def step(self, seconds: float = 0.0, gossip: bool = True) -> None:
        """Time passes, and everything that is sent arrives."""
        self.now += seconds
        for _ in range(200):
            moved = False
            for node, replica in self.replicas.items():
                replica.tick(self.now)
                moved |= self._flush(node, replica)
            if not moved:
                break
        if gossip:
            for node, replica in self.replicas.items():
                for other, said in self.replicas.items():
                    if self.reach(node, other) and node != other and said.view.epoch:
                        replica.hear(other, said.view.epoch, said.settled)

    def reach(self, a: NodeId, b: NodeId) -> bool:
        return a not in self.cut and b not in self.cut

    def _flush(self, node: NodeId, replica: Replica) -> bool:
        storage = self.storage[node]
        storage.commit(dict(replica.acceptor.dirty))
        replica.acceptor.committed()
        outbox = replica.outbox
        replies, replica.replies = replica.replies, []
        fetch, replica.fetch = replica.fetch, []
        done = replica.take_done()
        self.done |= done
        self.changed |= replica.changes
        replica.changes = []
        for to, m in outbox:
            self.sent.append((node, to, m))
            if to in self.replicas and self.reach(node, to):
                self.replicas[to].receive(node, node, m, self.now)
        for to_whom, reply in replies:
            assert isinstance(to_whom, str)
            if to_whom in self.replicas and self.reach(node, to_whom):
                self.replicas[to_whom].receive(node, node, reply, self.now)
        for to in fetch:
            if to in self.replicas and self.reach(node, to):
                known = [c for c in self.storage[to].chain if c.epoch > replica.view.epoch]
                replica.on_chain(to, known, self.now)
        return bool(outbox or replies or fetch or done)

    def until(self, condition: object, seconds: float = 60.0) -> None:
        end = self.now + seconds
        while not condition():  # type: ignore[operator]
            assert self.now < end, "it did not come to that"
            self.step(0.1)

    def write(self, node: NodeId, key: str, data: bytes, expect: int = 0) -> None:
        op = Op(Random(data).randbytes(16), key, self.replicas[node].view.epoch, expect, data)
        self.replicas[node].proposer.submit(op, self.now, self.now + 30, data)
        self.until(lambda: data in self.done)
        assert isinstance(self.done[data], Ok)

    def read(self, node: NodeId, key: str) -> object:
        tag = ("read", node, self.now)
        op = Op(Random(str(tag)).randbytes(16), key, self.replicas[node].view.epoch)
        self.replicas[node].proposer.submit(op, self.now, self.now + 30, tag)
        self.until(lambda: tag in self.done)
        return self.done[tag]

    def change(self, node: NodeId, change: object, change_id: bytes) -> MeshChanged | Failure:
        replica = self.replicas[node]
        replica.propose(change, change_id, replica.view.epoch, self.now, self.now + 20, change_id)  # type: ignore[arg-type]
        self.until(lambda: change_id in self.changed)
        return self.changed[change_id]

    def add(self, through: NodeId, node: NodeId) -> None:
        said = self.change(through, AddMember(Member(node, f"{node[-2:]}:1")), node[-16:].encode())
        assert isinstance(said, MeshChanged), said
        self.start(node)
        self.until(lambda: self.replicas[node].view.epoch >= said.epoch)


def stands(replica: Replica) -> bool:
    return replica.view.is_settled() and replica.settled == replica.view.epoch


# -- joining, settling, base ------------------------------------------------------------------------


def test_a_late_joiner_walks_the_chain_from_the_beginning_and_the_mesh_settles() -> None:
    mesh = Mesh(config(1, NODES[:1], 1))
    mesh.write(NODES[0], VIDEO, b"x")
    for node in NODES[1:5]:
        mesh.add(NODES[0], node)
        mesh.until(lambda: all(stands(r) for r in mesh.replicas.values()))
    assert [c.epoch for c in mesh.storage[NODES[4]].chain] == list(
        range(1, mesh.replicas[NODES[4]].view.epoch + 1)
    )
    assert isinstance(mesh.read(NODES[4], VIDEO), Found)
    held = [n for n in NODES[:5] if mesh.storage[n].records.get(VIDEO, EMPTY).value.data == b"x"]
    assert len(held) >= 3


def test_B15_base_waits_for_old_voters_that_are_cut_off() -> None:
    assert not moves_past_the_cut_off(Replica)


def test_B15_base_that_does_not_wait_loses_what_only_the_cut_off_know() -> None:
    assert moves_past_the_cut_off(IgnoresCutOff)


def moves_past_the_cut_off(kind: type[Replica]) -> bool:
    """Two of the three first voters hold a value, and are cut off: whether base moves all the same."""
    chain = tuple(config(e, NODES[:n], 1) for e, n in ((1, 3), (2, 4), (3, 6), (4, 7)))
    mesh = Mesh(chain[0], kind=kind)
    mesh.cut = {NODES[2]}
    mesh.write(NODES[0], VIDEO, b"x")
    for node in chain[-1].nodes[3:]:
        mesh.start(node, chain)
    mesh.replicas[NODES[2]].adopt(chain[1:], mesh.now)
    mesh.cut = {NODES[0], NODES[1]}
    for _ in range(100):
        mesh.step(0.1)
    return mesh.replicas[NODES[6]].view.epoch > chain[-1].epoch


def test_what_was_settled_is_told_only_after_every_key_was_moved() -> None:
    mesh = Mesh(config(1, NODES[:1], 1))
    for i in range(20):
        mesh.write(NODES[0], f"video/{i:064x}", b"%d" % i)
    replica = mesh.replicas[NODES[0]]
    replica.adopt([config(2, NODES[:3], 1)], mesh.now)
    for _ in range(25):
        mesh.step(1.0, gossip=False)
    assert replica.settled < 2, "its two new companions have not voted"
    for node in NODES[1:3]:
        mesh.start(node, [config(1, NODES[:1], 1), config(2, NODES[:3], 1)])
    mesh.until(lambda: replica.settled >= 2)
    for i in range(20):
        held = [n for n in NODES[:3] if f"video/{i:064x}" in mesh.storage[n].records]
        assert len(held) >= 2


def test_a_node_that_nobody_talks_to_still_says_when_it_wants_to_wake() -> None:
    """A shell that sleeps until `next_wake` must not sleep through settling."""
    mesh = Mesh(config(1, NODES[:1], 1))
    replica = mesh.replicas[NODES[0]]
    mesh.write(NODES[0], VIDEO, b"x")
    mesh.step()
    before = replica.next_wake()
    assert before is None or before > mesh.now
    replica.adopt([config(2, NODES[:2], 1)], mesh.now)
    wake = replica.next_wake()
    assert wake is not None
    assert wake <= mesh.now


def test_a_settling_read_is_never_left_to_a_rival_of_an_older_epoch() -> None:
    """It would read its old group, and nothing would have moved."""
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[0]]
    replica.proposer.is_live = lambda _: False
    op = Op(bytes(16), VIDEO, 1, 0, b"x")
    replica.proposer.submit(op, 0.0, 100.0, "op")
    rival, now = NODES[1], 0.0
    while replica.proposer._keys[VIDEO].defeats < 2:
        replica.proposer.tick(now)
        attempt = replica.proposer._keys[VIDEO].attempt
        if attempt is not None:
            seen = Ballot(1, attempt.ballot.round + 1, rival, 1)
            replica.proposer.receive(rival, Nack(VIDEO, attempt.ballot, seen, 1), now)
        now += 0.1
    replica.proposer.is_live = lambda _: True
    replica.adopt([config(2, NODES[:4], 1)], now)
    _ = replica.outbox
    for _ in range(100):
        now += 0.1
        replica.tick(now)
    assert not [m for _, m in replica.outbox if isinstance(m, Forward)]


# -- leaving, and coming back -----------------------------------------------------------------------


def test_B13_a_node_that_left_and_came_back_has_none_of_its_old_votes() -> None:
    a, b = config(1, NODES[:1], 1), config(2, NODES[1:2], 1)
    mesh = Mesh(a)
    mesh.write(NODES[0], VIDEO, b"x")
    replica = mesh.replicas[NODES[0]]
    back = (b, config(3, NODES[1:2], 2), config(4, NODES[:1], 3))
    replica.adopt(back, mesh.now)
    assert VIDEO not in mesh.storage[NODES[0]].records
    assert replica.view.serves(NODES[0], VIDEO)


def test_B13_a_node_that_was_declared_lost_and_returns_has_none_of_its_old_votes() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    mesh.write(NODES[0], VIDEO, b"x")
    mesh.cut = set(NODES[:2])
    replica = mesh.replicas[NODES[0]]
    recovered = forced(replica.view, NODES[:2], b"f" * 16)
    replica.adopt((recovered, config(3, [NODES[0], NODES[2]], 1), config(4, [NODES[0], NODES[2]], 3)), 0.0)
    assert replica.view.serves(NODES[0], VIDEO)
    assert VIDEO not in mesh.storage[NODES[0]].records


def test_a_removed_node_may_leave_only_when_base_has_passed_it() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[2]]
    assert not replica.may_leave
    replica.adopt([config(2, NODES[:2], 1)], 0.0)
    assert not replica.may_leave
    replica.adopt([config(3, NODES[:2], 2)], 0.0)
    assert replica.may_leave


def test_a_stateless_node_does_not_take_the_chain_of_a_mesh_that_it_is_not_in() -> None:
    mesh = Mesh(config(1, NODES[:1], 1))
    stranger = mesh.start(NODES[5])
    assert stranger.on_chain(NODES[0], mesh.storage[NODES[0]].chain, 0.0) == []
    assert stranger.view.epoch == 0
    assert not stranger.may_leave


def test_requests_of_who_has_left_are_not_answered() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[0]]
    replica.adopt([config(2, NODES[:2], 1), config(3, NODES[:2], 2)], 0.0)
    replica.receive("r", NODES[2], Read(VIDEO, 3, 1), 0.0)
    assert replica.replies == []
    replica.receive("r", NODES[1], Read(VIDEO, 3, 1), 0.0)
    assert [type(reply) for _, reply in replica.replies] == [ReadReply]


# -- the chain --------------------------------------------------------------------------------------


def test_a_request_of_a_newer_epoch_waits_for_the_chain_and_is_answered_in_it() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[0]]
    prepare = Prepare(VIDEO, Ballot(2, 1, NODES[1], 1))
    replica.receive("r", NODES[1], prepare, 0.0)
    assert (replica.replies, replica.fetch) == ([], [NODES[1]])
    replica.on_chain(NODES[1], [config(2, NODES[:4], 1)], 0.1)
    assert [type(reply) for _, reply in replica.replies] == [Promise]
    assert [c.epoch for c in mesh.storage[NODES[0]].chain] == [1, 2]


def test_a_request_of_an_epoch_that_no_chain_leads_to_is_forgotten() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[0]]
    replica.receive("r", NODES[1], Prepare(VIDEO, Ballot(9, 1, NODES[1], 1)), 0.0)
    assert replica.on_chain(NODES[1], [config(3, NODES[:2], 1)], 0.1) == [], "it does not follow"
    replica.tick(HELD_FOR + 1)
    replica.adopt([config(2, NODES[:3], 1)], HELD_FOR + 1)
    assert replica.replies == []


def test_who_does_not_answer_is_asked_for_the_chain_so_often_and_no_more() -> None:
    replica = Mesh(config(1, NODES[:3], 1)).replicas[NODES[0]]
    replica.hear(NODES[7], 5, 0)
    for tenth in range(200):
        replica.tick(tenth / 10)
    assert replica.fetch == [NODES[7]] * FETCH_TRIES
    assert replica.next_wake() is None
    replica.hear(NODES[7], 5, 0)
    replica.tick(21.0)
    assert len(replica.fetch) == FETCH_TRIES + 1


def test_what_was_promised_before_an_epoch_is_on_disk_before_the_epoch_is() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[0]]
    replica.receive("r", NODES[1], Prepare(VIDEO, Ballot(1, 1, NODES[1], 1)), 0.0)
    replica.adopt([config(2, NODES[:3], 1)], 0.0)
    assert mesh.storage[NODES[0]].records[VIDEO].promised == Ballot(1, 1, NODES[1], 1)


# -- changes ----------------------------------------------------------------------------------------


def test_of_two_administrators_one_wins_and_the_other_is_told() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    for node, new in ((NODES[0], NODES[5]), (NODES[1], NODES[6])):
        mesh.replicas[node].propose(
            AddMember(Member(new, f"{new}:1")), new[-16:].encode(), 1, 0.0, 20.0, node
        )
    mesh.until(lambda: len([t for t in mesh.changed if t is not None]) == 2)
    said = [mesh.changed[n] for n in NODES[:2]]
    assert sorted(type(s).__name__ for s in said) == ["Failure", "MeshChanged"]
    for replica in mesh.replicas.values():
        assert len(set(replica.view.config.nodes) - set(NODES[:3])) == 1


def test_a_change_for_an_epoch_that_is_over_is_refused() -> None:
    mesh = Mesh(
        config(1, NODES[:3], 1),
    )
    replica = mesh.replicas[NODES[0]]
    replica.adopt([config(2, NODES[:3], 1)], 0.0)
    replica.propose(RemoveMember(NODES[1]), b"-" * 16, 1, 0.0, 9.0, "tag")
    ((tag, said),) = replica.changes
    assert tag == "tag"
    assert isinstance(said, Failure)
    assert said.code == "epoch"


def test_a_change_that_was_asked_for_twice_happens_once() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    change, change_id = AddMember(Member(NODES[5], "x:1")), b"i" * 16
    assert mesh.change(NODES[0], change, change_id) == MeshChanged(2)
    mesh.changed.clear()
    mesh.replicas[NODES[1]].propose(change, change_id, 1, mesh.now, mesh.now + 5, change_id)
    mesh.step()
    assert mesh.changed[change_id] == MeshChanged(2)
    assert mesh.replicas[NODES[1]].view.epoch == 2


def test_a_change_that_only_a_lost_node_knew_to_be_decided_is_found_by_those_who_voted() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    wish = config(2, NODES[:4], 1, b"w" * 16)
    ballot = Ballot(0, 1, NODES[2], 1)
    for node in NODES[:2]:
        mesh.replicas[node].receive(
            NODES[2], NODES[2], Accept("config/2", ballot, Value(2, pack_config(wish))), 0.0
        )
    mesh.cut = {NODES[2]}
    mesh.until(lambda: all(mesh.replicas[n].view.epoch >= 2 for n in NODES[:2]))
    assert mesh.replicas[NODES[0]].view.at(2) == wish


@pytest.mark.parametrize("nonsense", [b"", b"nonsense", pack_config(config(7, NODES[:1], 1))])
def test_nonsense_in_the_register_of_the_next_epoch_ends_nobody(nonsense: bytes) -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    m = Accept("config/2", Ballot(0, 1, NODES[2], 1), Value(2, nonsense))
    mesh.replicas[NODES[0]].receive(NODES[2], NODES[2], m, 0.0)
    for _ in range(80):
        mesh.step(0.1)
    assert mesh.change(NODES[1], AddMember(Member(NODES[5], "x:1")), b"i" * 16) == MeshChanged(2)


def test_a_change_that_was_asked_for_again_when_base_has_passed_it_is_still_known() -> None:
    chain = [config(1, NODES[:1], 1), config(2, NODES[:2], 1, b"i" * 16), config(3, NODES[:2], 2)]
    chain.append(config(4, NODES[:2], 3))
    mesh = Mesh(chain[0])
    mesh.replicas[NODES[0]].adopt(chain[1:], 0.0)
    for replica in (mesh.replicas[NODES[0]], mesh.start(NODES[0])):
        replica.propose(AddMember(Member(NODES[1], "x:1")), b"i" * 16, 1, 0.0, 9.0, "tag")
        assert replica.changes == [("tag", MeshChanged(2))]


def test_an_operation_on_a_key_of_an_epoch_that_does_not_exist_ends_as_unknown() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    op = Op(b"o" * 16, f"chunk/{'5e' * 32}/9.{9 << 20}/00000000", 9, 0, b"x")
    mesh.replicas[NODES[0]].proposer.submit(op, 0.0, 100.0, "op")
    mesh.until(lambda: "op" in mesh.done, seconds=10.0)
    assert isinstance(mesh.done["op"], Unknown)


def test_an_operation_on_a_key_of_an_epoch_that_others_know_waits_for_it() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    for node in NODES[1:3]:
        mesh.replicas[node].adopt([config(2, NODES[:3], 1)], 0.0)
    op = Op(b"o" * 16, f"chunk/{'5e' * 32}/2.{2 << 20}/00000000", 2, 0, b"x")
    mesh.replicas[NODES[0]].proposer.submit(op, 0.0, 100.0, "op")
    mesh.until(lambda: "op" in mesh.done, seconds=10.0)
    assert isinstance(mesh.done["op"], Ok)
    assert mesh.replicas[NODES[0]].view.epoch == 2


def test_a_node_that_is_behind_asks_for_the_chain_instead_of_denying_a_change() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    mesh.replicas[NODES[1]].adopt([config(2, NODES[:3], 1), config(3, NODES[:3], 2, b"i" * 16)], 0.0)
    mesh.replicas[NODES[2]].adopt([config(2, NODES[:3], 1)], 0.0)
    behind = mesh.replicas[NODES[0]]
    behind.propose(RemoveMember(NODES[1]), b"i" * 16, 2, 0.0, 9.0, "tag")
    assert [said.code for _, said in behind.changes if isinstance(said, Failure)] == ["late"]
    wake = behind.next_wake()
    assert wake is not None
    assert wake <= 0.0
    behind.tick(0.0)
    assert behind.fetch


def test_members_far_from_each_other_who_all_want_something_come_to_an_end() -> None:
    """Each attempt takes longer than the first patience of its rivals."""
    nodes = NODES[:7]
    mesh = Mesh(config(1, nodes, 1))
    away: list[tuple[float, NodeId, NodeId, AnyItem]] = []
    now = 0.0
    while all(r.view.epoch == 1 for r in mesh.replicas.values()):
        assert now < 300.0
        now += 0.05
        for i, (node, replica) in enumerate(mesh.replicas.items()):
            if replica._decree is None:
                change = Authorise(Grant(bytes([i]) * 32, "admin"))
                replica.propose(change, Random(f"{i} {now}").randbytes(16), 1, now, now + 5.0, None)
            replica.tick(now)
            sent = [*replica.outbox, *((str(to), reply) for to, reply in replica.replies)]
            replica.replies = []
            away += [(now + 0.2, node, to, m) for to, m in sent]
        due = [m for m in away if m[0] <= now]
        away = [m for m in away if m[0] > now]
        for _, sender, to, m in due:
            mesh.replicas[to].receive(sender, sender, m, now)


def test_another_change_waits_while_one_is_being_decided() -> None:
    replica = Mesh(config(1, NODES[:3], 1)).replicas[NODES[0]]
    replica.propose(RemoveMember(NODES[1]), b"a" * 16, 1, 0.0, 9.0, "a")
    replica.propose(RemoveMember(NODES[2]), b"b" * 16, 1, 0.0, 9.0, "b")
    assert [(tag, said.code) for tag, said in replica.changes if isinstance(said, Failure)] == [("b", "busy")]


def test_a_change_that_no_majority_answers_is_late_and_its_rounds_are_not_used_again() -> None:
    """One ballot for two configurations, by a node that is no member and so has no vote to remind it."""
    assert rounds_of_two_wishes(Replica) == 2


def test_rounds_that_start_over_are_used_twice() -> None:
    assert rounds_of_two_wishes(RoundsStartOverForChanges) == 1


def rounds_of_two_wishes(kind: type[Replica]) -> int:
    """How many ballots a removed node uses for the first tries of two wishes."""
    mesh = Mesh(config(1, NODES[:3], 1), config(2, NODES[:2], 1), kind=kind)
    replica = mesh.replicas[NODES[2]]
    ballots = set()
    for i, now in enumerate((0.0, 50.0)):
        change = Authorise(Grant(bytes([i]) * 32, "admin"))
        replica.propose(change, bytes([i]) * 16, 2, now, now + 1.0, i)
        replica.tick(now)
        ballots |= {m.ballot for _, m in replica.outbox if isinstance(m, Prepare) and m.key == "config/3"}
        replica.tick(now + 1.0)
        _ = replica.outbox
    said = [what for _, what in replica.changes]
    assert [s.code for s in said if isinstance(s, Failure)] == ["late", "late"]
    return len(ballots)


def test_a_mesh_that_lost_its_majority_goes_on_as_it_was_forced_to() -> None:
    mesh = Mesh(config(1, NODES[:5], 1))
    mesh.write(NODES[0], VIDEO, b"x")
    mesh.cut = set(NODES[:3])
    config2 = forced(mesh.replicas[NODES[3]].view, NODES[:3], b"f" * 16)
    for node in NODES[3:5]:
        mesh.replicas[node].adopt([config2], mesh.now)
    mesh.until(lambda: all(mesh.replicas[n].view.is_settled() for n in NODES[3:5]))
    read = mesh.read(NODES[4], VIDEO)
    assert isinstance(read, Found)
    mesh.write(NODES[3], VIDEO, b"y", expect=read.version)


def test_what_a_rival_is_asked_to_do_comes_back_to_who_asked() -> None:
    mesh = Mesh(
        config(1, NODES[:1], 1),
    )
    replica = mesh.replicas[NODES[0]]
    op = Op(b"o" * 16, VIDEO, 1, 0, b"x")
    replica.receive("r", NODES[1], Forward(VIDEO, op, 7), 0.0)
    replica.receive("r", NODES[1], Forward("video/" + "00" * 32, op, 8), 0.0)
    assert replica.take_done() == []
    told = [m for _, m in replica.outbox if isinstance(m, Told)]
    assert [(t.token, type(t.outcome)) for t in told] == [(7, Ok)]


def test_the_reads_that_settle_are_nobodys_business() -> None:
    mesh = Mesh(config(1, NODES[:1], 1))
    mesh.write(NODES[0], VIDEO, b"x")
    replica = mesh.replicas[NODES[0]]
    replica.proposer.done.append((Settle(9, VIDEO), Found(0, None)))
    assert replica.take_done() == []


def test_B10_groups_do_not_change_without_what_they_hold() -> None:
    """After a mesh of one has become another mesh of one, the value is there."""
    mesh = Mesh(config(1, NODES[:1], 1))
    mesh.write(NODES[0], VIDEO, b"x")
    mesh.add(NODES[0], NODES[1])
    mesh.until(lambda: all(stands(r) for r in mesh.replicas.values()))
    assert isinstance(mesh.change(NODES[1], RemoveMember(NODES[0]), b"r" * 16), MeshChanged)
    mesh.until(lambda: mesh.replicas[NODES[0]].may_leave)
    del mesh.replicas[NODES[0]]
    read = mesh.read(NODES[1], VIDEO)
    assert isinstance(read, Found)
    assert read.data == b"x"


def test_B16_what_the_middle_one_of_three_eras_decided_is_not_skipped() -> None:
    """A, B, A: the group of today is the group of the day before yesterday."""
    a, b = NODES[:1], NODES[1:2]
    view = View((config(1, a, 1), config(2, b, 1), config(3, a, 1)))
    assert [(era.first, era.group) for era in view.eras(VIDEO)] == [
        (3, tuple(a)),
        (2, tuple(b)),
        (1, tuple(a)),
    ]
    mesh = Mesh(config(1, a, 1), config(2, b, 1))
    mesh.write(NODES[1], VIDEO, b"middle")
    for node in NODES[:2]:
        mesh.replicas[node].adopt([config(3, a, 1)], mesh.now)
    read = mesh.read(NODES[0], VIDEO)
    assert isinstance(read, Found)
    assert read.data == b"middle"


def test_a_vote_in_an_older_epoch_is_refused_with_the_new_one() -> None:
    mesh = Mesh(config(1, NODES[:3], 1))
    replica = mesh.replicas[NODES[0]]
    replica.adopt([config(2, NODES[:3], 1)], 0.0)
    ballot = Ballot(1, 7, NODES[1], 1)
    for m in (Prepare(VIDEO, ballot), Accept(VIDEO, ballot, Value(1, b"x"))):
        replica.receive("r", NODES[1], m, 0.0)
    assert [(type(r), getattr(r, "epoch", None)) for _, r in replica.replies] == [(Nack, 2), (Nack, 2)]
    assert replica.acceptor.dirty == {}
