"""How a mesh is founded: by all listed nodes together, once."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from vstack.local import free_port
from vstack.mesh.config import GENESIS, Config, Member, View, mesh_id, pack_config
from vstack.mesh.forming import FORMING_KEY, Forming, list_digest
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    ZERO,
    Accept,
    Accepted,
    Ballot,
    Envelope,
    Hello,
    Prepare,
    Promise,
    Record,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.sockets import Lane
from vstack.mesh.transport import Incoming, Session
from vstack.node.server import Node as Server
from vstack.node.settings import NodeSettings

SEEDS = 400


class Impatient(Random):
    def uniform(self, a: float, b: float) -> float:
        return super().uniform(a / 20, b / 10)


@dataclass
class Process:
    """One start of one node: everything but `disk` and `config` is lost with it."""

    address: str
    node: str
    boot: int
    peers: tuple[str, ...]
    rng: Random
    disk: dict[str, Record]
    config: Config | None = None
    """Durable, once it is known to be decided."""
    forming: Forming = field(init=False)
    acceptor: Acceptor = field(init=False)

    def __post_init__(self) -> None:
        self.acceptor = Acceptor(self.node, View((GENESIS,)), self.disk.get)
        self.forming = Forming(self.node, self.boot, self.peers, self.acceptor, self.rng)

    def commit(self) -> None:
        self.disk.update(self.acceptor.dirty)
        self.acceptor.committed()

    def hello(self, zone: str) -> Hello:
        mesh = mesh_id(self.config) if self.config else ""
        digest = b"" if mesh else list_digest(self.peers)
        return Hello(PROTOCOL_VERSION, mesh, "node", self.node, self.boot, int(bool(mesh)), digest, zone)


class World:
    """Nodes at addresses, a network that loses, repeats and delays, and hellos every 0.1 s, which carry
    the chain of a node that has one. Every hello names another zone, so that no two nodes would propose
    the same, and attempts follow each other quickly, so that they meet. The shell around `Forming` is as
    in the server."""

    def __init__(self, seed: int, count: int, loss: float = 0.0, late: float = 0.0) -> None:
        self.rng = Random(seed)
        self.loss = loss
        self.now = 0.0
        self.addresses = tuple(f"10.0.0.{i}:7400" for i in range(count))
        self.up: dict[str, Process] = {}
        self.off: dict[str, Process] = {}
        self.ever: set[bytes] = set()
        """Every configuration that any process took for decided."""
        self.excluded: set[str] = set()
        """Nodes that found a mesh that does not list them: the server ends there."""
        self._events: list[tuple[float, int, str, tuple[Any, ...]]] = []
        self._serial = 0
        for address in self.addresses:
            self.at(self.rng.uniform(0, late), "start", address)

    def at(self, delay: float, what: str, *details: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (self.now + delay, self._serial, what, details))

    # -- what happens to nodes --------------------------------------------------------------------

    def start(self, address: str, peers: tuple[str, ...] | None = None) -> Process:
        old = self.off.pop(address, None)
        node = old.node if old else f"{self.rng.getrandbits(128):032x}"
        disk, config = (old.disk, old.config) if old else ({}, None)
        boot = old.boot + 1 if old else 1
        listed = peers or (old.peers if old else self.addresses)
        process = Process(address, node, boot, listed, Impatient(self.rng.random()), disk, config)
        self.up[address] = process
        self.at(0.0, "turn", process)
        return process

    def crash(self, address: str) -> None:
        if address in self.up:
            process = self.up.pop(address)
            process.acceptor.dirty.clear()
            self.off[address] = process

    def wipe(self, address: str) -> None:
        self.crash(address)
        self.off.pop(address, None)

    # -- the network ------------------------------------------------------------------------------

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what, details = heapq.heappop(self._events)
            getattr(self, f"_on_{what}")(*details)
        self.now = until

    def settle(self, until: float) -> None:
        """Runs until all nodes belong to a mesh, but no longer than that."""
        while self.now < until and None in self.configs():
            self.run(min(until, self.now + 0.5))

    def _travel(self, what: str, *details: Any) -> None:
        for _ in range(1 + (self.rng.random() < self.loss / 2)):
            if self.rng.random() >= self.loss:
                self.at(
                    self.rng.uniform(0.001, 0.02) * (20 if self.rng.random() < self.loss else 1),
                    what,
                    *details,
                )

    def _on_start(self, address: str) -> None:
        if address not in self.up:
            self.start(address)

    def _on_crash(self, address: str) -> None:
        self.crash(address)

    def _on_wipe(self, address: str) -> None:
        self.wipe(address)

    def _on_turn(self, p: Process) -> None:
        if self.up.get(p.address) is not p:
            return
        for address in p.peers:
            self._travel("ask", p, address)
        p.forming.tick(self.now)
        self._flush(p)
        self.at(0.1, "turn", p)

    def _on_ask(self, p: Process, address: str) -> None:
        there = self.up.get(address)
        if there is not None:
            self._travel("hello", p, address, there.hello(str(self.rng.getrandbits(20))), there.config)

    def _on_hello(self, p: Process, address: str, hello: Hello, config: Config | None) -> None:
        if self.up.get(p.address) is not p or p.config is not None:
            return
        p.forming.met(address, hello)
        if config is not None:
            self._adopt(p, config)

    def _adopt(self, p: Process, config: Config) -> None:
        self.ever.add(mesh_id(config).encode())
        if config.member(p.node) is None:
            self.excluded.add(p.node)
            self.wipe(p.address)
            return
        p.commit()
        p.config = config

    def _flush(self, p: Process) -> None:
        if p.forming.decided is not None and p.config is None:
            self._adopt(p, p.forming.decided)
        p.commit()
        outbox, p.forming.outbox = p.forming.outbox, []
        for node, request in outbox:
            where = next((a for a, h in p.forming._met.items() if h.node == node), None)
            if where is not None:
                self._travel("request", p, where, request)

    def _on_request(self, p: Process, address: str, request: Any) -> None:
        there = self.up.get(address)
        if there is None or there.config is not None:  # a node of a mesh has no vote on founding one
            return
        reply = there.acceptor.receive(request)
        there.commit()
        if reply is not None:
            self._travel("reply", p, there.node, reply)

    def _on_reply(self, p: Process, sender: str, reply: Any) -> None:
        if self.up.get(p.address) is p and p.config is None:
            p.forming.receive(sender, reply)
            self._flush(p)

    def configs(self) -> list[Config | None]:
        return [self.up[a].config if a in self.up else None for a in self.addresses]

    def waiting(self) -> dict[str, list[str]]:
        return {p.address: p.forming.waiting_for() for p in self.up.values()}


def assert_one_mesh(world: World) -> Config:
    configs = world.configs()
    assert None not in configs, world.waiting()
    assert len(world.ever) == 1
    (config, *others) = configs
    assert config is not None
    assert all(c == config for c in others)
    assert {m.node for m in config.members} == {p.node for p in world.up.values()}
    assert {m.address for m in config.members} == set(world.addresses)
    assert (config.epoch, config.base) == (1, 1)
    return config


# -- all is well ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_all_listed_nodes_decide_the_same_configuration(count: int) -> None:
    world = World(1, count)
    world.run(1.0)
    config = assert_one_mesh(world)
    assert [m.node for m in config.members] == sorted(m.node for m in config.members)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_they_do_so_over_a_network_that_loses_repeats_and_reorders(count: int) -> None:
    for seed in range(30):
        world = World(seed, count, loss=0.25, late=2.0)
        world.settle(120.0)
        assert_one_mesh(world)


def test_zones_and_weights_are_those_of_the_hellos() -> None:
    records: dict[str, Record] = {}
    acceptor = Acceptor("a" * 32, View((GENESIS,)), records.get)
    forming = Forming("a" * 32, 1, ("h:1",), acceptor, Random(1))
    digest = list_digest(("h:1",))
    forming.met("h:1", Hello(PROTOCOL_VERSION, "", "node", "a" * 32, 1, 0, digest, "cellar", 7))
    forming.tick(0.0)
    assert forming.decided == Config(1, (Member("a" * 32, "h:1", "cellar", 7),), 1)
    assert forming.outbox == []
    assert acceptor.dirty[FORMING_KEY].accepted.round == 1, "its own vote is there to be committed"


# -- who is waited for ----------------------------------------------------------------------------


def test_a_missing_peer_is_waited_for_and_named() -> None:
    world = World(2, 3)
    world.run(0.0)
    world.wipe(world.addresses[1])
    world.run(30.0)
    assert world.configs() == [None] * 3
    assert set(world.waiting()) == {world.addresses[0], world.addresses[2]}
    assert all(w == ["10.0.0.1:7400 has not answered"] for w in world.waiting().values())
    world.start(world.addresses[1])
    world.run(31.0)
    assert_one_mesh(world)


def test_nodes_with_different_lists_wait_and_say_for_whom() -> None:
    world = World(3, 3)
    world.run(0.0)
    world.wipe(world.addresses[2])
    world.start(world.addresses[2], peers=world.addresses[1:])
    world.run(30.0)
    assert world.configs() == [None] * 3
    assert world.waiting() == {
        world.addresses[0]: ["10.0.0.2:7400 was started with another list of peers"],
        world.addresses[1]: ["10.0.0.2:7400 was started with another list of peers"],
        world.addresses[2]: ["10.0.0.1:7400 was started with another list of peers"],
    }
    world.wipe(world.addresses[2])
    world.start(world.addresses[2])
    world.run(31.0)
    assert_one_mesh(world)


def test_the_order_of_the_list_and_repetitions_do_not_matter() -> None:
    assert list_digest(("a:1", "b:1")) == list_digest(("b:1", "a:1", "b:1"))
    assert list_digest(("a:1", "b:1")) != list_digest(("a:1",))
    assert list_digest(("a:1\nb:1",)) != list_digest(("a:1 b:1",))


def alone(addresses: tuple[str, ...]) -> Forming:
    return Forming("a" * 32, 1, addresses, Acceptor("a" * 32, View((GENESIS,)), lambda _: None), Random(1))


def greeting(node: str, addresses: tuple[str, ...], mesh: str = "") -> Hello:
    return Hello(PROTOCOL_VERSION, mesh, "node", node * 32, 1, 0, b"" if mesh else list_digest(addresses))


def test_two_addresses_of_one_node_are_reported_and_no_mesh_is_founded() -> None:
    addresses = ("h1:1", "h2:1", "h3:1")
    forming = alone(addresses)
    forming.met("h1:1", greeting("a", addresses))
    forming.met("h2:1", greeting("b", addresses))
    forming.met("h3:1", greeting("b", addresses))
    assert forming.waiting_for() == ["h2:1 and h3:1 are the same node"]
    forming.tick(0.0)
    assert forming.outbox == []
    forming.met("h3:1", greeting("c", addresses))
    assert forming.waiting_for() == []
    forming.tick(0.1)
    assert [node for node, _ in forming.outbox] == ["b" * 32, "c" * 32]


def test_a_list_without_this_node_is_reported() -> None:
    addresses = ("h1:1", "h2:1")
    forming = alone(addresses)
    forming.met("h1:1", greeting("b", addresses))
    forming.met("h2:1", greeting("c", addresses))
    assert forming.waiting_for() == ["none of the listed addresses is this node itself"]
    forming.tick(0.0)
    assert forming.outbox == []


def test_beside_a_node_of_a_mesh_nothing_is_founded() -> None:
    addresses = ("h1:1", "h2:1")
    forming = alone(addresses)
    forming.met("h1:1", greeting("a", addresses))
    forming.met("h2:1", greeting("b", addresses, mesh="f" * 32))
    forming.tick(0.0)
    forming.tick(10.0)
    assert forming.outbox == []


# -- one vote at a time ---------------------------------------------------------------------------


def proposing(count: int) -> tuple[Forming, tuple[str, ...], Ballot]:
    """A machine that has sent its Prepare to all others."""
    addresses = tuple(f"h{i}:1" for i in range(count))
    forming = alone(addresses)
    for i, address in enumerate(addresses):
        forming.met(address, greeting("abcdef"[i], addresses))
    forming.tick(0.0)
    (_, first), *_ = forming.outbox
    assert isinstance(first, Prepare)
    forming.outbox.clear()
    return forming, addresses, first.ballot


def test_all_must_promise_not_only_a_majority() -> None:
    forming, _, ballot = proposing(5)
    for sender in "bcd":
        forming.receive(sender * 32, Promise(FORMING_KEY, ballot, ZERO, Value()))
        assert forming.outbox == []
    forming.receive("e" * 32, Promise(FORMING_KEY, ballot, ZERO, Value()))
    assert [type(m) for _, m in forming.outbox] == [Accept] * 4


def test_promises_for_another_ballot_do_not_count() -> None:
    """Bug B6; and B5: the ballot of an earlier start of the same node."""
    forming, _, ballot = proposing(3)
    for wrong in (ballot._replace(boot=0), ballot._replace(round=9), ballot._replace(node="b" * 32)):
        for sender in "bc":
            forming.receive(sender * 32, Promise(FORMING_KEY, wrong, ZERO, Value()))
    assert forming.outbox == []


def test_what_was_accepted_before_is_proposed_again() -> None:
    forming, _, ballot = proposing(3)

    def config(name: str) -> Config:
        return Config(1, tuple(Member(n * 32, f"{name}:1") for n in "abc"), 1)

    def promise(sender: str, round: int, name: str) -> None:
        accepted = Ballot(0, round, sender * 32, 1)
        forming.receive(
            sender * 32, Promise(FORMING_KEY, ballot, accepted, Value(1, pack_config(config(name))))
        )

    promise("b", 2, "newer")
    promise("c", 1, "older")
    (_, accept), *_ = forming.outbox
    assert isinstance(accept, Accept)
    assert accept.value.data == pack_config(config("newer"))


def test_an_attempt_without_news_is_followed_by_another_with_a_higher_ballot() -> None:
    forming, _, ballot = proposing(3)
    forming.tick(0.9)
    assert forming.outbox == []
    forming.tick(3.1)
    assert all(isinstance(m, Prepare) and m.ballot > ballot for _, m in forming.outbox)
    assert len(forming.outbox) == 2


def test_a_majority_must_have_accepted_this_very_ballot() -> None:
    forming, _, ballot = proposing(5)
    for sender in "bcde":
        forming.receive(sender * 32, Promise(FORMING_KEY, ballot, ZERO, Value()))
    assert forming.acceptor.record(FORMING_KEY).accepted == ballot, "its own vote is one"
    forming.receive("b" * 32, Accepted(FORMING_KEY, ballot))
    forming.receive("b" * 32, Accepted(FORMING_KEY, ballot))
    for stranger in "xyz":
        forming.receive(stranger * 32, Accepted(FORMING_KEY, ballot))
    for other in (ballot._replace(round=9), ballot._replace(boot=0)):
        forming.receive("c" * 32, Accepted(FORMING_KEY, other))
    forming.receive("d" * 32, Accepted("config/2", ballot))
    assert forming.decided is None
    forming.receive("c" * 32, Accepted(FORMING_KEY, ballot))
    assert forming.decided is not None
    assert forming.decided.nodes == tuple(n * 32 for n in "abcde")


def test_a_restarted_node_begins_above_what_it_promised() -> None:
    _, addresses, _ = proposing(3)
    ballot = Ballot(0, 7, "f" * 32, 1)
    records = {FORMING_KEY: Record(ballot)}
    again = Forming("a" * 32, 2, addresses, Acceptor("a" * 32, View((GENESIS,)), records.get), Random(2))
    for i, address in enumerate(addresses):
        again.met(address, greeting("abc"[i], addresses))
    again.tick(0.0)
    (_, prepare), *_ = again.outbox
    assert isinstance(prepare, Prepare)
    assert prepare.ballot > ballot


# -- crashes and wiped disks ----------------------------------------------------------------------


def test_crashes_and_restarts_in_the_middle_never_give_two_configurations() -> None:
    decided = 0
    for seed in range(SEEDS):
        world = World(seed, Random(seed).choice([2, 3, 5]), loss=0.25, late=1.0)
        for _ in range(world.rng.randint(1, 12)):
            address, when = world.rng.choice(world.addresses), world.rng.uniform(0.0, 5.0)
            world.at(when, "crash", address)
            world.at(when + world.rng.uniform(0.01, 0.5), "start", address)
        world.run(5.5)
        assert len(world.ever) <= 1, f"seed {seed}"
        decided += len(world.ever)
        world.loss = 0.0
        world.settle(60.0)
        assert len(world.ever) == 1, f"seed {seed}: {world.waiting()}"
        assert_one_mesh(world)
    assert decided > SEEDS / 4, "some were done in the midst of it"


def test_a_wiped_node_beside_late_starters_never_founds_a_second_mesh() -> None:
    """Nodes start late, crash, and lose their disks at any moment, as long as one keeps what it knows: a
    node that belongs to a mesh, or any before that. Then all configurations are one."""
    excluded = 0
    for seed in range(2 * SEEDS):
        rng = Random(seed)
        world = World(seed, rng.choice([3, 5]), loss=0.2, late=3.0)
        for _ in range(rng.randint(3, 30)):
            world.run(world.now + rng.uniform(0.02, 0.6))
            members = [
                a for a in world.addresses for p in [world.up.get(a) or world.off.get(a)] if p and p.config
            ]
            losers = [a for a in world.addresses if a not in members or len(members) > 1]
            for address in rng.sample(losers, min(len(losers), rng.choice([0, 1, 1, len(losers) - 1]))):
                if len([a for a in members if a != address]) or not members:
                    world.wipe(address)
                    members = [a for a in members if a != address]
                    world.at(rng.uniform(0.01, 1.0), "start", address)
            if rng.random() < 0.3:
                address = rng.choice(world.addresses)
                world.crash(address)
                world.at(rng.uniform(0.01, 1.0), "start", address)
        world.loss = 0.0
        world.settle(world.now + 20.0)
        assert len(world.ever) <= 1, f"seed {seed}: two meshes"
        excluded += len(world.excluded)
    assert excluded > SEEDS / 4, "wiped nodes did come back and meet the mesh"


# -- the shell ------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    address = f"127.0.0.1:{free_port(1)}"
    node = Server(NodeSettings(address, address, tmp_path), lambda _: None)
    yield node
    node.stop()
    node.run()


OTHER = "b" * 32


def hello_of(node: str, boot: int) -> Hello:
    return Hello(PROTOCOL_VERSION, "", "node", node, boot)


def envelope(server: Server, item: Prepare) -> list[Any]:
    """What the server would answer, after its commit."""
    session = Session(b"x", Lane.CONTROL, hello_of(OTHER, 1), 0.0, in_flight=1)
    request = Incoming(session, bytes(8), Envelope((item,)), memoryview(b""), 1e9)
    server._on_envelope(request, Envelope((item,)), 0.0)
    answers = [reply for _, reply in server.replica.replies]
    server.replica.replies.clear()
    return answers


def adopt(server: Server) -> None:
    """The mesh of this node and OTHER."""
    server.replica.adopt([Config(1, (Member(server.me, "a:1"), Member(OTHER, "b:1")), 1)], 0.0)
    server._on_epoch()


def test_a_node_of_a_mesh_has_no_vote_on_founding_one(server: Server) -> None:
    item = Prepare(FORMING_KEY, Ballot(0, 1, OTHER, 1))
    assert [type(a) for a in envelope(server, item)] == [Promise]
    adopt(server)
    assert envelope(server, Prepare(FORMING_KEY, Ballot(0, 2, OTHER, 1))) == []
    video = Prepare(f"video/{'c' * 64}", Ballot(1, 1, OTHER, 1))
    assert [type(a) for a in envelope(server, video)] == [Promise]


def test_votes_of_strangers_get_no_reply(server: Server) -> None:
    server.replica.adopt([Config(1, (Member(server.me, "a:1"),), 1)], 0.0)
    server._on_epoch()
    assert envelope(server, Prepare(f"video/{'c' * 64}", Ballot(1, 1, OTHER, 1))) == []


def test_answers_of_a_node_that_came_back_with_an_old_boot_are_nobodys(server: Server) -> None:
    """Bug B17: its votes are from before those that it has forgotten."""
    adopt(server)
    link = server.transport.connect(f"127.0.0.1:{free_port(1)}", 0.0)
    assert server.peers.on_hello(link, hello_of(OTHER, 5))
    assert link.hello is not None
    assert server.peers.links[OTHER] is link
    assert not server.peers.on_hello(link, hello_of(OTHER, 4))
    assert link.hello is None
    assert OTHER not in server.peers.links
    assert server.peers.on_hello(link, hello_of(OTHER, 6))
    assert server.peers.links[OTHER] is link


def test_a_new_node_at_an_old_ones_address_is_not_taken_for_it(server: Server) -> None:
    adopt(server)
    link = server.transport.connect(f"127.0.0.1:{free_port(1)}", 0.0)
    assert server.peers.on_hello(link, hello_of(OTHER, 5))
    assert server.peers.is_live(OTHER)
    assert server.peers.on_hello(link, hello_of("c" * 32, 1))
    assert not server.peers.is_live(OTHER)
    assert OTHER not in server.peers.links
