"""One machine of a simulated world: the real `Replica`, and a disk that forgets.

A disk keeps whole commits. What an acceptor changed is lost in a crash until its commit is
complete; a commit that a crash interrupts is there afterwards or not, as a whole. Replies,
requests, outcomes and what a node says of itself leave when the commit that covers everything
before them is complete. One commit is in flight at a time, and the node works on meanwhile; what
the replica stores by itself (`Storage`) first completes the commit in flight, so that order holds.

The NodeId is minted with the disk and lost with it. What a machine is at one time is its disk's node.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from tests.sim.invariants import Vote, WatchedAcceptor
from vstack.errors import DamagedData
from vstack.mesh.changes import MeshChange
from vstack.mesh.config import CONFIG_KEY, Config, NodeId, key_subject
from vstack.mesh.forming import FORMING_KEY, Forming, list_digest
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    AnyItem,
    Chain,
    Created,
    GetConfig,
    Hello,
    Nack,
    Op,
    Outcome,
    Promise,
    Record,
    Reply,
)

if TYPE_CHECKING:
    from tests.sim.world import World

RECENT = 1.5
"""Seconds in which a node must have been heard to count as live."""
HELLO_EVERY = 0.3


@dataclass(frozen=True)
class Gossip:
    """What the sender says of itself, and what it was told: (epoch, settled) by node."""

    said: tuple[tuple[NodeId, int, int], ...]


@dataclass(frozen=True)
class Greeting:
    """Who are you? Between nodes that form a mesh."""

    address: str
    """Whom it was sent to."""
    hello: Hello
    answer: bool = False


Message = AnyItem | Gossip | GetConfig | Chain | Greeting


@dataclass(slots=True)
class Disk:
    """What survives the process."""

    node: NodeId
    boot: int = 0
    records: dict[str, Record] = field(default_factory=dict)
    chain: list[Config] = field(default_factory=list)
    heard: dict[NodeId, int] = field(default_factory=dict)
    """The highest boot of each node."""
    damaged: dict[str, None] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk(self.node, self.boot, dict(self.records), list(self.chain), dict(self.heard))


@dataclass(slots=True)
class Batch:
    """What one commit covers, and what leaves after it."""

    records: dict[str, Record]
    log: list[Vote]
    messages: list[tuple[NodeId, Message]]
    replies: list[tuple[NodeId, Reply | Created]]
    done: list[tuple[Any, Outcome]]
    stored: bool = False


class Node:
    """One machine: an address, a disk, and the process on it."""

    def __init__(self, world: World, address: str, node: NodeId, chain: Sequence[Config] = ()) -> None:
        self.world = world
        self.address = address
        self.disk = Disk(node, chain=list(chain))
        self.snapshot: Disk | None = None
        """Of the disk, as it was at an earlier start."""
        self.restored = False
        """The disk was put back from a snapshot."""
        self.alive = False
        self.gone = False
        """It does not come back by itself."""
        self.reserved_until = 0.0
        """Somebody is about to make it a member."""
        self.start()

    @property
    def name(self) -> NodeId:
        return self.disk.node

    def start(self) -> None:
        """A new process on the same disk."""
        world, variant, disk = self.world, self.world.variant, self.disk
        if disk.boot == 0 or variant.boot_counts:
            disk.boot += 1
        self.boot = disk.boot
        self.alive = True
        self.life = object()
        self.heard_at: dict[NodeId, float] = {}
        self.replica = world.replica_class(
            disk.node,
            disk.boot,
            disk.chain,
            self,
            Random(world.rng.getrandbits(32)),
            kindness=world.profile.kindness,
        )
        acceptor = self.replica.acceptor
        assert isinstance(acceptor, WatchedAcceptor)
        self.acceptor = acceptor
        self.acceptor.log = []
        self.replica.proposer.is_live = self._is_live
        self.replies: list[tuple[NodeId, Reply | Created]] = []
        self.messages: list[tuple[NodeId, Message]] = []
        self.in_flight: Batch | None = None
        self.wake_at = float("inf")
        self.forming: Forming | None = None
        world.watcher.started(disk.node, self.replica.view.epoch, disk.boot)
        if self.address in world.forming_list and not disk.chain:
            make = variant.forming
            self.forming = make(
                disk.node, disk.boot, world.forming_list, acceptor, Random(world.rng.getrandbits(32))
            )
            world.at(world.now + world.rng.uniform(0, HELLO_EVERY), self._greet, self.life)
        if world.profile.gossip:
            world.at(world.now + world.rng.uniform(0, world.profile.gossip), self._gossip, self.life)

    def _is_live(self, node: NodeId) -> bool:
        return self.world.now - self.heard_at.get(node, -RECENT) < RECENT

    def crash(self) -> None:
        """The process ends. A commit in flight is on disk, or it is not."""
        if self.in_flight is not None and self.world.rng.random() < 0.5:
            self._complete()
        self.alive = False
        self.life = object()
        self.in_flight = None
        survives = self.world.variant.survives
        if survives is not None:
            self.disk.records = {key: survives(record) for key, record in self.disk.records.items()}

    def wipe(self, node: NodeId) -> None:
        """Another disk, and so another node; the process is down."""
        self.disk = Disk(node)
        self.snapshot = None
        self.restored = False

    def restore(self) -> None:
        """An earlier state of the same disk; the process is down."""
        assert self.snapshot is not None
        self.disk, self.snapshot, self.restored = self.snapshot, None, True

    # -- storage, as the replica sees it ----------------------------------------------------------

    def lookup(self, key: str) -> Record | None:
        if key in self.disk.damaged:
            raise DamagedData(key)
        if self.in_flight is not None and key in self.in_flight.records and not self.in_flight.stored:
            return self.in_flight.records[key]
        return self.disk.records.get(key)

    def any_between(self, first: str, last: str) -> bool:
        writing = self.in_flight.records if self.in_flight is not None else {}
        return any(first <= k <= last for known in (self.disk.records, writing) for k in known)

    def keys(self, after: str, limit: int) -> Sequence[str]:
        known = sorted(k for k in self.disk.records if k > after)
        return known[: min(limit, self.world.variant.keys_listed)]

    def subjects(self) -> Iterable[str]:
        return dict.fromkeys(key_subject(k) for k in self.disk.records if not k.startswith(CONFIG_KEY))

    def commit(self, records: Mapping[str, Record]) -> None:
        self._complete()
        log, self.acceptor.log = self.acceptor.log, []
        self._write(dict(records), log)

    def adopt(self, configs: Sequence[Config], drop: Iterable[str]) -> None:
        self._complete()
        log, self.acceptor.log = self.acceptor.log, []
        self._write({}, log)
        world = self.world
        world.note("adopt", self.name, [c.epoch for c in configs])
        if not world.variant.adopts_in_memory:
            self.disk.chain += configs
        gone = set(drop)
        for key in list(self.disk.records):
            if not key.startswith(CONFIG_KEY) and key_subject(key) in gone:
                del self.disk.records[key]
        world.watcher.adopted(self.name, configs, self.disk.records, sorted(gone))
        world.on_adopted(configs)

    def _complete(self) -> None:
        if self.in_flight is not None and not self.in_flight.stored:
            self._write(self.in_flight.records, self.in_flight.log)
            self.in_flight.stored = True

    def _write(self, records: dict[str, Record], log: list[Vote]) -> None:
        self.world.watcher.durable(self.name, records, log)
        losing = self.world.variant.drops_commits
        if not (losing and records and self.world.rng.random() < losing):
            self.disk.records.update(records)

    # -- events -----------------------------------------------------------------------------------

    @property
    def serves(self) -> bool:
        """Whether clients may use it."""
        return self.alive and self.replica.view.epoch > 0 and not self.replica.may_leave

    def submit(self, op: Op, deadline: float, tag: Any) -> None:
        self.replica.proposer.submit(op, self.world.now, deadline, tag)
        self.settle()

    def submit_all(self, ops: Sequence[Op], deadline: float, tags: Sequence[Any]) -> None:
        self.replica.proposer.submit_all(ops, self.world.now, deadline, tags)
        self.settle()

    def propose(
        self, change: MeshChange, change_id: bytes, replaces: int, deadline: float, tag: Hashable
    ) -> None:
        self.replica.propose(change, change_id, replaces, self.world.now, deadline, tag)
        self.settle()

    def on_message(self, sender: NodeId, m: Message) -> None:
        replica, now = self.replica, self.world.now
        self.heard_at[sender] = now
        if isinstance(m, Gossip):
            for node, epoch, settled in m.said:
                replica.hear(node, epoch, settled)
            behind = next((e for n, e, _ in m.said if n == sender), 0) < replica.view.epoch
            if behind:
                self.messages.append((sender, self._statement()))
        elif isinstance(m, GetConfig):
            known = tuple(c for c in self.disk.chain if c.epoch > m.after)
            self.messages.append((sender, Chain("", known)))
        elif isinstance(m, Chain):
            replica.on_chain(sender, m.configs, now)
            if replica.view.epoch:
                self.forming = None
        elif isinstance(m, Greeting):
            self._on_greeting(sender, m)
        else:
            if isinstance(m, Promise):
                self.world.watcher.promised(sender, m)
            forming = self.forming
            if forming is not None and m.key == FORMING_KEY and isinstance(m, Promise | Nack | Reply):
                forming.receive(sender, m)
                self._on_formed()
            else:
                replica.receive(sender, sender, m, now)
        self.settle()

    def on_wake(self, life: object) -> None:
        if life is self.life:
            self.wake_at = float("inf")
            self.settle()

    def settle(self) -> None:
        """Does what is due, starts a commit if there is something to write or to send."""
        now, replica = self.world.now, self.replica
        wake = replica.next_wake()
        if wake is not None and wake <= now:
            replica.tick(now)
        self._flush()
        wake = replica.next_wake()
        if wake is not None and wake < self.wake_at:
            self.wake_at = max(wake, now)
            self.world.at(self.wake_at, self.on_wake, self.life)

    # -- what a node says of itself ---------------------------------------------------------------

    def _statement(self) -> Gossip:
        said = self.replica.statements
        me = (self.name, self.replica.view.epoch, self.replica.settled)
        return Gossip((me, *((n, *said[n]) for n in sorted(said) if n != self.name)))

    def _gossip(self, life: object) -> None:
        world = self.world
        if life is not self.life or world.quiet():
            return
        if self.replica.view.epoch:
            others = sorted(self.replica.view.participants - {self.name})
            if others and world.rng.random() < 0.8:
                to = world.rng.choice(others)
            else:
                to = world.rng.choice(world.machines).name
            if to != self.name:
                self.messages.append((to, self._statement()))
                self.settle()
            world.retire(self)
        world.at(world.now + world.profile.gossip * world.rng.uniform(0.7, 1.3), self._gossip, life)

    def _hello(self) -> Hello:
        mesh = "mesh" if self.replica.view.epoch else ""
        peers = list_digest(self.world.forming_list)
        return Hello(PROTOCOL_VERSION, mesh, "node", self.name, self.boot, self.replica.view.epoch, peers)

    def _greet(self, life: object) -> None:
        world = self.world
        if life is not self.life or self.forming is None or world.quiet():
            return
        for address in world.forming_list:
            if address == self.address:
                self.forming.met(address, self._hello())
            else:
                self.messages.append((world.at_address(address).name, Greeting(address, self._hello())))
        self.forming.tick(world.now)
        self._on_formed()
        self.settle()
        world.at(world.now + HELLO_EVERY, self._greet, life)

    def _on_greeting(self, sender: NodeId, m: Greeting) -> None:
        if m.answer:
            if self.forming is not None:
                self.forming.met(m.address, m.hello)
        else:
            self.messages.append((sender, Greeting(m.address, self._hello(), answer=True)))
        if m.hello.epoch:
            self.replica.hear(sender, m.hello.epoch, 0)

    def _on_formed(self) -> None:
        config = self.forming.decided if self.forming is not None else None
        if config is not None:
            self.forming = None
            if config.member(self.name) and self.replica.view.epoch == 0:
                self.replica.adopt([config], self.world.now)

    # -- the disk ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        replica, a = self.replica, self.acceptor
        if self.in_flight is not None:
            return
        messages: list[tuple[NodeId, Message]] = [*replica.outbox, *self.messages]
        if self.forming is not None:
            messages += self.forming.outbox
            self.forming.outbox.clear()
        messages += [(to, GetConfig(replica.view.epoch)) for to in replica.fetch]
        replica.fetch = []
        done: list[tuple[Any, Outcome]] = list(replica.take_done())
        for to, reply in replica.replies:
            assert isinstance(to, str)
            self.replies.append((to, reply))
        replica.replies = []
        changes, replica.changes = replica.changes, []
        messages += [(to, m) for to, m in replica.outbox]  # what `take_done` added
        for tag, what in changes:
            if tag is not None:
                self.world.at(self.world.now, self.world.on_changed, tag, what)
        if not (a.log or messages or done or self.replies):
            return
        batch = Batch(dict(a.dirty), a.log, messages, self.replies, done)
        a.committed()
        a.log, self.messages, self.replies = [], [], []
        if not batch.records:
            self.world.watcher.durable(self.name, {}, batch.log)
            self._leave(batch)
            return
        self.in_flight = batch
        world = self.world
        early = Batch({}, [], [], [], [])
        if world.variant.replies_before_sync:
            early.replies, batch.replies = batch.replies, []
        if world.variant.requests_before_sync:
            early.messages, batch.messages = batch.messages, []
        self._leave(early)
        world.at(world.now + world.rng.expovariate(1 / world.profile.sync), self.on_synced, self.life)

    def on_synced(self, life: object) -> None:
        batch = self.in_flight
        if life is not self.life or batch is None:
            return
        self._complete()
        self.in_flight = None
        self._leave(batch)
        if self.alive:
            self.settle()

    def _leave(self, batch: Batch) -> None:
        world = self.world
        for to, m in batch.messages:
            world.watcher.sent(self.name, to, m)
            world.send(self, to, m)
        for to, reply in batch.replies:
            world.send(self, to, reply)
        for tag, outcome in batch.done:
            world.told(tag, outcome)
