"""One node of a simulated world: the real acceptor and proposer, and a disk that forgets.

A node's disk keeps whole commits. What an acceptor changed is lost in a crash until its commit
is complete; a commit that a crash interrupts is there afterwards or not, as a whole. Replies,
requests and outcomes leave when the commit that covers everything before them is complete. One
commit is in flight at a time, and the node works on meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from tests.sim.invariants import Vote
from vstack.errors import DamagedData
from vstack.mesh.config import NodeId, View
from vstack.mesh.messages import Op, Outcome, Promise, Record, Reply, Request

if TYPE_CHECKING:
    from tests.sim.world import World


@dataclass(slots=True)
class Batch:
    """What one commit covers, and what leaves after it."""

    records: dict[str, Record]
    log: list[Vote]
    requests: list[tuple[NodeId, Request]]
    replies: list[tuple[NodeId, Reply]]
    done: list[tuple[Any, Outcome]]


class Node:
    """One node: a disk and a boot counter that survive, and the process that does not."""

    def __init__(self, world: World, name: NodeId) -> None:
        self.world = world
        self.name = name
        self.disk: dict[str, Record] = {}
        self.damaged: dict[str, None] = {}
        self.boot = 0
        self.alive = False
        self.start()

    def start(self) -> None:
        """A new process on the same disk."""
        variant = self.world.variant
        if self.boot == 0 or variant.boot_counts:
            self.boot += 1
        self.alive = True
        self.life = object()
        self.view = View(self.world.chain)
        self.acceptor = self.world.acceptor_class(self.name, self.view, self.lookup)
        self.acceptor.log = []
        self.proposer = variant.proposer(
            self.name, self.boot, self.view, self.acceptor, Random(self.world.rng.getrandbits(32))
        )
        self.replies: list[tuple[NodeId, Reply]] = []
        self.in_flight: Batch | None = None
        self.wake_at = float("inf")

    def crash(self) -> None:
        """The process ends. A commit in flight is on disk, or it is not."""
        if self.in_flight is not None and self.world.rng.random() < 0.5:
            self._store(self.in_flight)
        self.alive = False
        self.life = object()
        self.in_flight = None
        survives = self.world.variant.survives
        if survives is not None:
            self.disk = {key: survives(record) for key, record in self.disk.items()}

    def lookup(self, key: str) -> Record | None:
        if key in self.damaged:
            raise DamagedData(key)
        if self.in_flight is not None and key in self.in_flight.records:
            return self.in_flight.records[key]
        return self.disk.get(key)

    # -- events -----------------------------------------------------------------------------------

    def submit(self, op: Op, deadline: float, tag: Any) -> None:
        self.proposer.submit(op, self.world.now, deadline, tag)
        self.settle()

    def on_request(self, sender: NodeId, m: Request) -> None:
        reply = self.acceptor.receive(m)
        if reply is not None:
            self.replies.append((sender, reply))
            self.settle()

    def on_reply(self, sender: NodeId, m: Reply) -> None:
        if isinstance(m, Promise):
            self.world.watcher.promised(sender, m)
        self.proposer.receive(sender, m, self.world.now)
        self.settle()

    def on_wake(self, life: object) -> None:
        if life is self.life:
            self.wake_at = float("inf")
            self.settle()

    def settle(self) -> None:
        """Does what is due, starts a commit if there is something to write or to send."""
        now = self.world.now
        wake = self.proposer.next_wake()
        if wake is not None and wake <= now:
            self.proposer.tick(now)
            wake = self.proposer.next_wake()
        self._flush()
        if wake is not None and wake < self.wake_at:
            self.wake_at = max(wake, now)
            self.world.at(self.wake_at, self.on_wake, self.life)

    # -- the disk ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        a, p = self.acceptor, self.proposer
        if self.in_flight is not None or not (a.log or p.outbox or p.done or self.replies):
            return
        batch = Batch(dict(a.dirty), a.log, p.outbox, self.replies, p.done)
        a.committed()
        a.log, p.outbox, self.replies, p.done = [], [], [], []
        if not batch.records:
            self._store(batch)
            self._leave(batch)
            return
        self.in_flight = batch
        world = self.world
        early = Batch({}, [], [], [], [])
        if world.variant.replies_before_sync:
            early.replies, batch.replies = batch.replies, []
        if world.variant.requests_before_sync:
            early.requests, batch.requests = batch.requests, []
        self._leave(early)
        world.at(world.now + world.rng.expovariate(1 / world.profile.sync), self.on_synced, self.life)

    def on_synced(self, life: object) -> None:
        batch = self.in_flight
        if life is not self.life or batch is None:
            return
        self._store(batch)
        self.in_flight = None
        self._leave(batch)
        self.settle()

    def _store(self, batch: Batch) -> None:
        self.world.watcher.durable(self.name, batch.records, batch.log)
        self.disk.update(batch.records)

    def _leave(self, batch: Batch) -> None:
        world = self.world
        for to, request in batch.requests:
            world.watcher.sent(self.name, request)
            world.send(self.name, to, request)
        for to, reply in batch.replies:
            world.send(self.name, to, reply)
        for tag, outcome in batch.done:
            world.told(tag, outcome)
