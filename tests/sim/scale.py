"""Meshes of many nodes in one process: gossip in virtual time, decisions counted, balance measured.

The nodes are the real `Gossip`, `Acceptor`, `Proposer` and `View`. The same seed gives the same run.
Bytes are those of the encoded message with its header and correlation id: what vstack hands to
ZeroMQ, without what ZeroMQ, encryption and TCP add.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from statistics import fmean
from typing import Any

import msgspec

from vstack.mesh import placement
from vstack.mesh.config import Config, Member, NodeId, View, group, leader
from vstack.mesh.membership import Gossip, Message
from vstack.mesh.messages import Found, Ok, Op, Outcome, Ping, Pong, Record, Reply, Request, State
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.proposer import Proposer
from vstack.mesh.registers import UploadId, chunk_key, video_key

CORRELATION = 8
"""Bytes of the correlation id in front of each message."""

_encode = msgspec.msgpack.Encoder().encode


def names(n: int) -> list[NodeId]:
    """NodeIds of a mesh, always the same ones."""
    return [blake2b(b"node %d" % i, digest_size=16).hexdigest() for i in range(n)]


def wire_bytes(m: Message) -> int:
    """Of a message with its header: body, budget, queue, rate, epoch."""
    return CORRELATION + len(_encode((m, 1000, 0, 0, 0)))


# -- gossip -------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class GossipNode:
    name: NodeId
    gossip: Gossip
    alive: bool = True
    paused: bool = False
    inbox: list[tuple[NodeId, Message]] | None = None
    """What arrived during a pause."""
    wake_at: float = float("inf")


class GossipMesh:
    """`loss` is the chance that a message disappears; `delay` its mean time in seconds.

    Nodes that are `quiet` have said nothing but what everybody assumes of everybody: as in a mesh that
    has been up for long, there is no news when the run begins.
    """

    def __init__(
        self, n: int, seed: int, *, loss: float = 0.0, delay: float = 0.002, quiet: bool = False
    ) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.loss = loss
        self.delay = delay
        self.cut: Callable[[NodeId, NodeId], bool] = lambda sender, to: False
        """Whether messages of one node to another disappear."""
        self.adopts = False
        """Nodes that hear of a newer epoch fetch it, and say that they have adopted it."""
        self.messages: Counter[NodeId] = Counter()
        """Sent, by sender."""
        self.bytes = 0
        self.changes: list[tuple[float, NodeId, NodeId, State, State]] = []
        """(when, who saw it, of whom, before, after)."""
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ordinal = 0
        self.names = names(n)
        self.nodes: dict[NodeId, GossipNode] = {}
        for name in self.names:
            self.start(name, boot=0 if quiet else 1)

    def start(self, name: NodeId, boot: int) -> GossipNode:
        """A new process of the node, which knows nothing but who the members are."""
        gossip = Gossip(name, boot, Random(self.rng.getrandbits(64)), self.now)
        gossip.set_members(self.names)
        if boot:
            gossip.say(1, 1)
        node = self.nodes[name] = GossipNode(name, gossip)
        self._schedule(node)
        return node

    def crash(self, name: NodeId) -> None:
        self.nodes[name].alive = False

    def pause(self, name: NodeId, seconds: float) -> None:
        """The process stands still; what arrives meanwhile waits for it."""
        node = self.nodes[name]
        node.paused, node.inbox = True, []
        self._at(self.now + seconds, self._resume, node)

    def _resume(self, node: GossipNode) -> None:
        node.paused = False
        waiting, node.inbox = node.inbox or [], None
        for sender, m in waiting:
            self._deliver(sender, node.name, m)
        self._wake(node)

    # -- time -------------------------------------------------------------------------------------

    def run(self, seconds: float, until: Callable[[], bool] | None = None, every: float = 0.1) -> bool:
        """Lets time pass, or stops early when `until` holds, which is asked so often. Whether it held."""
        end = self.now + seconds
        while self.now < end:
            if until is not None and until():
                return True
            step = min(end, self.now + (every if until is not None else seconds))
            while self._events and self._events[0][0] <= step:
                self.now, _, action, arguments = heapq.heappop(self._events)
                action(*arguments)
            self.now = step
        return until is not None and until()

    def _at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        self._ordinal += 1
        heapq.heappush(self._events, (when, self._ordinal, action, arguments))

    def _wake(self, node: GossipNode) -> None:
        node.wake_at = float("inf")
        if node.alive and not node.paused and self.nodes[node.name] is node:
            node.gossip.tick(self.now)
            self._settle(node)

    def _schedule(self, node: GossipNode) -> None:
        due = max(node.gossip.next_wake(), self.now)
        if due < node.wake_at:
            node.wake_at = due
            self._at(due, self._wake, node)

    # -- the network ------------------------------------------------------------------------------

    def _settle(self, node: GossipNode) -> None:
        gossip = node.gossip
        for to, m in gossip.outbox:
            self.messages[node.name] += 1
            self.bytes += wire_bytes(m)
            if not self.cut(node.name, to) and self.rng.random() >= self.loss:
                self._at(self.now + self.rng.expovariate(1 / self.delay), self._deliver, node.name, to, m)
        gossip.outbox.clear()
        for of, before, after in gossip.changes:
            self.changes.append((self.now, node.name, of, before, after))
        gossip.changes.clear()
        if self.adopts and gossip.newest[0] > gossip.statement(node.name).epoch:
            gossip.say(gossip.newest[0], gossip.newest[0])
        self._schedule(node)

    def _deliver(self, sender: NodeId, to: NodeId, m: Message) -> None:
        node = self.nodes[to]
        if not node.alive:
            return
        if node.paused:
            assert node.inbox is not None
            node.inbox.append((sender, m))
            return
        gossip = node.gossip
        if isinstance(m, Ping):
            gossip.on_ping(sender, m, self.now)
        elif isinstance(m, Pong):
            gossip.on_ack(sender, m, self.now)
        else:
            gossip.on_ping_request(sender, m, self.now)
        self._settle(node)

    # -- what they know ---------------------------------------------------------------------------

    def live(self) -> list[GossipNode]:
        return [n for n in self.nodes.values() if n.alive]

    def share_that(self, knows: Callable[[Gossip], bool]) -> float:
        """Of the live nodes."""
        return fmean(knows(n.gossip) for n in self.live())

    def all_know_all(self, epoch: int) -> bool:
        """Whether every live node knows that every live node has adopted `epoch`."""
        live = self.live()
        return all(n.gossip.statement(m.name).epoch >= epoch for n in live for m in live)

    def is_quiet(self) -> bool:
        """Whether there is nothing left to pass on."""
        return all(n.gossip.backlog() == 0 for n in self.live())

    def all_up(self) -> bool:
        return all(n.gossip.state(m) is State.UP for n in self.live() for m in self.names)


@dataclass
class GossipFigures:
    """Rates are per node and second; times in virtual seconds from the event on."""

    nodes: int
    acquainted: float
    """From the start until everybody has a statement of everybody."""
    messages: float
    bytes: float
    """Sent, with no news."""
    heard_99: float
    heard_100: float
    """Until so many per cent know of an epoch that one node announced."""
    adopted_100: float
    """Until everybody knows that everybody has adopted it."""
    change_messages: float
    change_bytes: float
    """Sent while that spread."""
    suspected: float
    """From a crash until the first node suspects it."""
    down_first: float
    down_99: float
    down_100: float
    """Until the first, and so many per cent, hold it for down."""


def measure_gossip(n: int, seed: int = 1, steady: float = 20.0) -> GossipFigures:
    """A start of all nodes at once; then, in a mesh that has been up for long, an epoch that one node
    announces, quiet time, and a crash."""
    mesh = GossipMesh(n, seed)
    acquainted = _time(mesh, lambda: mesh.all_know_all(1), 400.0, 1.0)

    mesh = GossipMesh(n, seed, quiet=True)
    mesh.run(2.0)
    mesh.adopts = True
    began = mesh.now
    mesh.nodes[mesh.names[0]].gossip.say(2, 2)
    times: dict[str, float] = {}

    def spread() -> None:
        def heard(share: float) -> bool:
            return mesh.share_that(lambda g: g.newest[0] >= 2) >= share

        _time(mesh, lambda: heard(0.99), 100.0)
        times["99"] = mesh.now - began
        _time(mesh, lambda: heard(1.0), 100.0)
        times["100"] = mesh.now - began
        _time(mesh, lambda: mesh.all_know_all(2), 600.0, 0.1 if n <= 100 else 1.0)
        times["all"] = mesh.now - began

    change_messages, change_bytes = _rates(mesh, spread)
    _time(mesh, mesh.is_quiet, 400.0, 1.0)
    messages, quiet_bytes = _rates(mesh, lambda: mesh.run(steady))

    victim = mesh.names[-1]
    mesh.crash(victim)

    def sees(state: State, share: float) -> bool:
        return mesh.share_that(lambda g: g.state(victim) >= state) >= share

    suspected = _time(mesh, lambda: sees(State.SUSPECT, 1 / n), 100.0)
    first = suspected + _time(mesh, lambda: sees(State.DOWN, 1 / n), 100.0)
    down_99 = first + _time(mesh, lambda: sees(State.DOWN, 0.99), 100.0)
    down_100 = down_99 + _time(mesh, lambda: sees(State.DOWN, 1.0), 100.0)
    return GossipFigures(
        n, acquainted, messages, quiet_bytes, times["99"], times["100"], times["all"],
        change_messages, change_bytes, suspected, first, down_99, down_100,
    )  # fmt: skip


def _time(mesh: GossipMesh, until: Callable[[], bool], limit: float, every: float = 0.1) -> float:
    """Virtual seconds until it holds. Raises TimeoutError after `limit`."""
    began = mesh.now
    if not mesh.run(limit, until, every):
        raise TimeoutError(f"not within {limit} virtual seconds in a mesh of {len(mesh.names)}")
    return mesh.now - began


def _rates(mesh: GossipMesh, work: Callable[[], object]) -> tuple[float, float]:
    """Messages and bytes per node and virtual second during `work`."""
    began, messages, sent = mesh.now, mesh.messages.total(), mesh.bytes
    work()
    span = (mesh.now - began) * len(mesh.live())
    return (mesh.messages.total() - messages) / span, (mesh.bytes - sent) / span


# -- decisions ----------------------------------------------------------------------------------------


class RegisterMesh:
    """Real acceptors and proposers over a network that loses nothing; counts what travels on it."""

    def __init__(self, n: int) -> None:
        self.config = Config(1, tuple(Member(name, "node:1") for name in names(n)), 1)
        self.sent = 0
        """Messages from one node to another."""
        self._disks: dict[NodeId, dict[str, Record]] = {}
        self._nodes: dict[NodeId, tuple[Acceptor, Proposer]] = {}
        self._operations = 0

    @property
    def started(self) -> tuple[NodeId, ...]:
        """Nodes that had anything to do so far."""
        return tuple(self._nodes)

    def node(self, name: NodeId) -> tuple[Acceptor, Proposer]:
        """Started when it is first needed: nobody else ever hears of a register."""
        if name not in self._nodes:
            view = View((self.config,))
            disk = self._disks[name] = {}
            acceptor = Acceptor(name, view, disk.get)
            self._nodes[name] = acceptor, Proposer(name, 1, view, acceptor, Random(name))
        return self._nodes[name]

    def decide(
        self, through: NodeId, key: str, expect: int | None, data: bytes | None
    ) -> tuple[Outcome, int]:
        """One operation submitted to one node; its outcome, and the messages that it took."""
        before = self.sent
        self._operations += 1
        _, proposer = self.node(through)
        op = Op(self._operations.to_bytes(16), key, 1, expect, data)
        proposer.submit(op, 0.0, 10.0, "it")
        under_way: list[tuple[NodeId, NodeId, Request | Reply]] = []
        self._leave(through, under_way)
        while under_way:
            sender, to, m = under_way.pop(0)
            self.sent += 1
            acceptor, its_proposer = self.node(to)
            if isinstance(m, Request):
                reply = acceptor.receive(m)
                if reply is not None:
                    under_way.append((to, sender, reply))
            else:
                its_proposer.receive(sender, m, 0.0)
            self._leave(to, under_way)
        [(_, outcome)] = proposer.done
        proposer.done = []
        return outcome, self.sent - before

    def _leave(self, name: NodeId, under_way: list[tuple[NodeId, NodeId, Request | Reply]]) -> None:
        """Commits, and lets go what waited for it."""
        acceptor, proposer = self.node(name)
        self._disks[name].update(acceptor.dirty)
        acceptor.committed()
        for to, m in proposer.outbox:
            assert isinstance(m, Request)
            under_way.append((name, to, m))
        proposer.outbox = []


def measure_decisions(n: int) -> dict[str, int]:
    """Messages between nodes for one decision, without contention. Raises AssertionError if an
    operation does not end as it should."""
    mesh = RegisterMesh(n)
    video = video_id(0)
    acceptors = group(mesh.config, video)
    other = next(node for node in mesh.config.nodes if node not in acceptors)
    costs: dict[str, int] = {}

    def decide(what: str, through: NodeId, key: str, expect: int | None, data: bytes | None) -> None:
        outcome, costs[what] = mesh.decide(through, key, expect, data)
        assert isinstance(outcome, Ok if data is not None else Found), outcome

    create = chunk_key(video, UploadId(1, (1 << 20) + 1), 0)
    first = leader(mesh.config, create)
    assert first is not None
    decide("fast create, through the leader", first, create, 0, b"chunk")
    decide("full way, through a node of the group", acceptors[0], video_key(video), 0, b"video")
    elsewhere = next(v for v in map(video_id, range(1, 1000)) if other not in group(mesh.config, v))
    decide("full way, through any other node", other, video_key(elsewhere), 0, b"video")
    decide("quorum read, through a node of the group", acceptors[1], video_key(video), None, None)
    decide("quorum read, through any other node", other, video_key(video), None, None)
    return costs


# -- balance ------------------------------------------------------------------------------------------


def members(n: int, weights: Sequence[int] = ()) -> tuple[Member, ...]:
    """Each in a zone of its own."""
    return tuple(
        Member(name, "node:1", weight=weights[i] if weights else 1) for i, name in enumerate(names(n))
    )


def video_id(i: int) -> str:
    return blake2b(b"video %d" % i, digest_size=32).hexdigest()


def group_balance(n: int, videos: int) -> float:
    """Most groups on a node over the mean."""
    config = Config(1, members(n), 1)
    load: Counter[NodeId] = Counter()
    for i in range(videos):
        load.update(group(config, video_id(i)))
    return max(load.values()) / (load.total() / n)


def drawn_balance(n: int, g: int, videos: int, seed: int = 1) -> float:
    """As `group_balance`, for groups drawn evenly at random: what the best of hashes would give."""
    rng = Random(seed)
    load: Counter[int] = Counter()
    for _ in range(videos):
        load.update(rng.sample(range(n), g))
    return max(load.values()) / (load.total() / n)


def piece_balance(all_members: Sequence[Member], chunks: int, pieces: Sequence[int]) -> list[float]:
    """The most that a node holds over its share by weight, for each number of pieces of a chunk."""
    loads: list[Counter[NodeId]] = [Counter() for _ in pieces]
    for i in range(chunks):
        ranked = [m.node for m in placement.order(all_members, video_id(i // 100), i % 100)]
        for count, load in zip(pieces, loads, strict=True):
            load.update(ranked[:count])
    weight = sum(m.weight for m in all_members)
    return [max(load[m.node] / (load.total() * m.weight / weight) for m in all_members) for load in loads]
