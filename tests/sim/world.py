"""A world in virtual time: nodes made of the real acceptor and proposer, disks, a network, faults.

Events are (time, sequence number, action). All chance comes from one seeded source, and nothing
iterates over sets, so a seed is a schedule.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random
from typing import Any

from tests.sim.clients import Client
from tests.sim.invariants import Blind, Violation, WatchedAcceptor, Watcher
from tests.sim.linearizability import TooManyStates, Try, explains
from tests.sim.mutants import REAL, Variant
from tests.sim.node import Node
from tests.sim.profiles import draw
from vstack.mesh.config import Config, Member, NodeId, View
from vstack.mesh.messages import Op, Outcome, Reply, Request


@dataclass(slots=True)
class Figures:
    """What one or many runs did."""

    seeds: int = 0
    operations: int = 0
    messages: int = 0
    crashes: int = 0
    decisions: int = 0
    undecided: int = 0
    """Histories too entangled to search."""

    def add(self, other: Figures) -> None:
        self.seeds += other.seeds
        self.operations += other.operations
        self.messages += other.messages
        self.crashes += other.crashes
        self.decisions += other.decisions
        self.undecided += other.undecided


class World:
    """One seed. `run` returns quietly or raises `Violation`.

    `blind` switches the invariants off: only the clients' histories are judged.
    """

    def __init__(
        self,
        seed: int,
        profile: str = "mixed",
        variant: Variant = REAL,
        *,
        long: bool = False,
        trace: bool = False,
        blind: bool = False,
    ) -> None:
        self.rng = Random(seed)
        self.profile = draw(profile, self.rng)
        if long:
            self.profile = replace(self.profile, ops=5 * self.profile.ops, horizon=5 * self.profile.horizon)
        self.variant = variant
        self.blind = blind
        self.now = 0.0
        self.healed = False
        self.ops_left = self.profile.ops
        self.figures = Figures(seeds=1)
        self.history: dict[str, list[Try]] = {}
        self._trace = blake2b(digest_size=16) if trace else None
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ordinal = 0
        self._cut_until: dict[tuple[NodeId, NodeId], float] = {}

        names = [f"{self.rng.getrandbits(128):032x}" for _ in range(self.rng.choice(self.profile.sizes))]
        self.chain = (Config(1, tuple(Member(n, "node:1") for n in names), 1),)
        self.view = View(self.chain)
        self.watcher = Watcher(self.view) if not blind else Blind(self.view)
        self.acceptor_class: type[WatchedAcceptor] = type("Acceptor", (WatchedAcceptor, variant.acceptor), {})
        self.names = tuple(names)
        self.nodes = {name: Node(self, name) for name in names}
        self.keys = self._draw_keys()
        self.clients = [Client(self, i) for i in range(self.profile.clients)]

    def _draw_keys(self) -> list[str]:
        keys = []
        for _ in range(self.profile.videos):
            video = f"{self.rng.getrandbits(256):064x}"
            keys.append(f"video/{video}")
            keys += [f"chunk/{video}/1.{1 << 20}/{128 * i:08d}" for i in range(self.profile.chunks)]
        return keys

    # -- time -------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, self.ordinal(), action, arguments))

    def ordinal(self) -> int:
        """A number higher than all before it: orders what happens at one time."""
        self._ordinal += 1
        return self._ordinal

    def run(self) -> None:
        """Faults and clients; then everything heals, and every operation must end; then the histories."""
        try:
            for client in self.clients:
                client.think()
            self._schedule_faults()
            self.at(self.profile.horizon, self._heal)
            self._drain()
            for client in self.clients:
                client.look()
            self._drain()
        except AssertionError as error:
            raise Violation(f"assertion {error}") from error
        self.figures.decisions = self.watcher.decisions
        for key, tries in self.history.items():
            try:
                if not explains(tries):
                    raise Violation(f"linearizability of {key}")
            except TooManyStates:
                self.figures.undecided += 1

    def _drain(self) -> None:
        while self._events:
            self.now, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        waiting = [c.current for c in self.clients if c.busy]
        if waiting:
            raise Violation(f"liveness: nothing happens any more, and these wait: {waiting}")

    def trace_hash(self) -> str:
        """Of everything that was sent, told and done to nodes, in order. Needs `trace`."""
        assert self._trace is not None
        return self._trace.hexdigest()

    def _note(self, *what: object) -> None:
        if self._trace is not None:
            self._trace.update(f"{self.now!r} {what!r}\n".encode())

    # -- clients ----------------------------------------------------------------------------------

    def submit(self, client: Client, node: Node, op: Op, patience: float) -> Try:
        """Hands one try of an operation to a live node."""
        attempt = Try(op, self.ordinal())
        self.history.setdefault(op.key, []).append(attempt)
        self.figures.operations += 1
        self._note("submit", node.name, op)
        node.submit(op, self.now + patience, (client, attempt))
        return attempt

    def told(self, tag: tuple[Client, Try], outcome: Outcome) -> None:
        client, attempt = tag
        self._note("told", attempt.op, outcome)
        self.watcher.told(attempt.op, outcome)
        if not self.healed and self.rng.random() < self.profile.lost_outcome:
            return
        attempt.returned = self.ordinal()
        attempt.outcome = outcome
        client.on_outcome(attempt, outcome)

    def some_node(self) -> Node | None:
        """Any live node."""
        alive = [n for n in self.nodes.values() if n.alive]
        return self.rng.choice(alive) if alive else None

    # -- the network ------------------------------------------------------------------------------

    def send(self, sender: NodeId, to: NodeId, m: Request | Reply) -> None:
        """Puts a message on its way, perhaps twice, perhaps never."""
        self.figures.messages += 1
        self._note(sender, to, m)
        p, rng = self.profile, self.rng
        copies = 1
        if not self.healed:
            if self._cut_until and self._cut_until.get((sender, to), 0.0) > self.now:
                return
            chance = rng.random()
            if chance < p.loss:
                return
            copies = 2 if chance < p.loss + p.duplicate else 1
        for _ in range(copies):
            delay = p.distance + rng.expovariate(1 / p.delay)
            if not self.healed:
                chance = rng.random()
                if chance < p.undead:
                    delay = rng.uniform(0.0, 2 * p.horizon)
                elif chance < p.undead + p.slow:
                    delay += rng.uniform(0.0, 0.5)
            self.at(self.now + delay, self._deliver, sender, to, m)

    def _deliver(self, sender: NodeId, to: NodeId, m: Request | Reply) -> None:
        node = self.nodes[to]
        if not node.alive:
            return
        if isinstance(m, Request):
            node.on_request(sender, m)
        else:
            node.on_reply(sender, m)

    # -- faults -----------------------------------------------------------------------------------

    def _schedule_faults(self) -> None:
        p = self.profile
        for rate, fault in (
            (p.crashes, self._crash_one),
            (p.power_cuts, self._power_cut),
            (p.partitions, self._partition),
            (p.cuts, self._cut_one_way),
            (p.damage, self._damage),
        ):
            when = self.rng.expovariate(rate) if rate else p.horizon
            while when < p.horizon:
                self.at(when, fault)
                when += self.rng.expovariate(rate)

    def _crash_one(self) -> None:
        """Often in the middle of a commit."""
        alive = [n for n in self.nodes.values() if n.alive]
        writing = [n for n in alive if n.in_flight is not None]
        if alive:
            self._crash(self.rng.choice(writing if writing and self.rng.random() < 0.7 else alive))

    def _power_cut(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                self._crash(node)

    def _crash(self, node: Node) -> None:
        self._note("crash", node.name)
        self.figures.crashes += 1
        node.crash()
        self.at(self.now + self.rng.expovariate(1 / self.profile.downtime), self._restart, node)

    def _restart(self, node: Node) -> None:
        if not node.alive:
            self._note("restart", node.name)
            node.start()

    def _partition(self) -> None:
        side = [self.rng.random() < 0.5 for _ in self.names]
        until = self.now + self.rng.expovariate(1 / self.profile.outage)
        for a, left in zip(self.names, side, strict=True):
            for b, right in zip(self.names, side, strict=True):
                if left != right:
                    self._cut_until[a, b] = until

    def _cut_one_way(self) -> None:
        a, b = self.rng.sample(self.names, 2)
        self._cut_until[a, b] = self.now + self.rng.expovariate(1 / self.profile.outage)

    def _damage(self) -> None:
        """One record on one disk; per key on fewer than half of its group."""
        key = self.rng.choice(self.keys)
        group = self.view.group(key)
        if sum(key in self.nodes[n].damaged for n in group) < (len(group) - 1) // 2:
            self.nodes[self.rng.choice(group)].damaged[key] = None

    def _heal(self) -> None:
        """No fault from here on; messages on their way arrive when they arrive."""
        self._note("heal")
        self.healed = True
        for node in self.nodes.values():
            self._restart(node)
        for client in self.clients:
            client.on_heal()
