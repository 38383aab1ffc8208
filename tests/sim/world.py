"""A world in virtual time: machines with real replicas on them, disks, a network, faults, administrators.

Events are (time, sequence number, action). All chance comes from one seeded source, and nothing
iterates over sets, so a seed is a schedule.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from random import Random
from typing import Any

from tests.sim import admin
from tests.sim.admin import Admin
from tests.sim.clients import Client
from tests.sim.invariants import Blind, Violation, WatchedAcceptor, Watcher
from tests.sim.linearizability import TooManyStates, Try, explains
from tests.sim.mutants import REAL, Variant
from tests.sim.node import Message, Node
from tests.sim.profiles import draw
from vstack.mesh.changes import forced
from vstack.mesh.config import CHUNKS_A_TURN, INDEX_DIGITS, Config, Member, NodeId, key_subject
from vstack.mesh.messages import Failure, MeshChanged, Op, Outcome
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.proposer import Proposer, Timing
from vstack.mesh.paxos.replica import Replica, Storage

SETTLED = 90.0
"""Virtual seconds in which the mesh comes to rest once there are no faults."""
LAST_CHANGE = 15.0
"""Virtual seconds after which no change goes on that was under way when faults stopped."""
MAX_EVENTS = 400_000


@dataclass(slots=True)
class Figures:
    """What one or many runs did."""

    seeds: int = 0
    operations: int = 0
    messages: int = 0
    epochs: int = 0
    crashes: int = 0
    lost_disks: int = 0
    decisions: int = 0
    undecided: int = 0
    """Histories too entangled to search."""

    def add(self, other: Figures) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class World:
    """One seed. `run` returns quietly or raises `Violation`.

    `blind` switches the invariants off: only the clients' histories are judged. `settings` replace
    parts of the profile.
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
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.rng = Random(seed)
        self.profile = draw(profile, self.rng)
        if long:
            self.profile = replace(self.profile, ops=5 * self.profile.ops, horizon=5 * self.profile.horizon)
        self.profile = replace(self.profile, **(settings or {}))
        self.variant = variant
        self.blind = blind
        self.now = 0.0
        self.healed = False
        self.ops_left = self.profile.ops
        self.figures = Figures(seeds=1)
        self.history: dict[str, list[Try]] = {}
        self.denied: dict[bytes, str] = {}
        """Changes of which an administrator was told that they did not happen, and how."""
        self._trace = blake2b(digest_size=16) if trace else None
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ordinal = 0
        self._cut_until: dict[tuple[str, str], float] = {}

        p = self.profile
        size = self.rng.choice(p.sizes)
        addresses = [f"m{i}:1" for i in range(size + p.spares)]
        names = [self.new_name() for _ in addresses]
        members = tuple(Member(n, a) for n, a in zip(names, addresses[:size], strict=False))
        first = Config(1, tuple(sorted(members, key=lambda m: m.node)), 1)
        self.forming_list = tuple(addresses[:size]) if p.forming else ()
        self.watcher = Blind() if blind else Watcher()
        self.watcher.founders = len(self.forming_list)
        if not p.forming:
            self.watcher.founded(first)
        self.replica_class = self._replica_class()
        self.machines: list[Node] = []
        self._at_address: dict[str, Node] = {}
        for i, (name, address) in enumerate(zip(names, addresses, strict=True)):
            node = Node(self, address, name, (first,) if i < size and not p.forming else ())
            self.machines.append(node)
            self._at_address[address] = node
        self._current = {m.name: m for m in self.machines}
        self.admins: list[Admin] = []
        self.lost: dict[NodeId, Node] = {}
        """Nodes whose disks were lost, and that may still be missed."""
        self._shrinks_until = 0.0
        """Somebody has asked lately for a voter to leave."""
        self._grants = 0
        self._uploads = 0
        self.keys = self._draw_keys()
        self.clients = [Client(self, i) for i in range(p.clients)]

    def _replica_class(self) -> type[Replica]:
        variant = self.variant
        watched: type[WatchedAcceptor] = type("Acceptor", (WatchedAcceptor, variant.acceptor), {})

        class Simulated(variant.replica):  # type: ignore[name-defined,misc]
            def make_acceptor(self, storage: Storage) -> Acceptor:
                return watched(self.me, self.view, storage.lookup, storage.any_between)

            def make_proposer(self, rng: Random, timing: Timing | None) -> Proposer:
                return variant.proposer(self.me, self.boot, self.view, self.acceptor, rng, timing)

        return Simulated

    def new_name(self) -> NodeId:
        return f"{self.rng.getrandbits(128):032x}"

    def at_address(self, address: str) -> Node:
        return self._at_address[address]

    def node(self, name: NodeId) -> Node | None:
        """The machine that is this node now."""
        return self._current.get(name)

    def _draw_keys(self) -> list[str]:
        keys = []
        for _ in range(self.profile.videos):
            video = f"{self.rng.getrandbits(256):064x}"
            keys.append(f"video/{video}")
            keys += [f"chunk/{video}/1.{1 << 20}/{128 * i:08d}" for i in range(self.profile.chunks)]
        return keys

    def new_key(self, node: Node) -> str:
        """A chunk of an upload that is opened in the epoch that `node` knows."""
        self._uploads += 1
        epoch = node.replica.view.epoch
        video = key_subject(self.rng.choice(self.keys))
        key = f"chunk/{video}/{epoch}.{(epoch << 20) + self._uploads}/{self.rng.choice((0, 128)):08d}"
        self.keys.append(key)
        return key

    def new_upload(self, node: Node, count: int) -> list[str]:
        """Neighbouring chunks of an upload that is opened in the epoch that `node` knows. Some uploads
        cross from one leader to the next."""
        first = self.new_key(node)
        self.keys.pop()
        stem, start = first[:-INDEX_DIGITS], self.rng.choice((0, 0, 1, CHUNKS_A_TURN - 2))
        keys = [f"{stem}{start + i:0{INDEX_DIGITS}d}" for i in range(count)]
        self.keys += keys
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
            self._check_rest()
            for client in self.clients:
                client.look()
            self._drain()
        except AssertionError as error:
            raise Violation(f"assertion {error}") from error
        finally:
            self.figures.decisions = self.watcher.decisions
            self.figures.epochs = max(0, self.watcher.newest - 1)
        for key, tries in self.history.items():
            if key_subject(key) in self.watcher.given_up:
                continue
            try:
                if not explains(tries):
                    raise Violation(f"linearizability of {key}")
            except TooManyStates:
                self.figures.undecided += 1

    def _drain(self) -> None:
        events = 0
        while self._events:
            self.now, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
            events += 1
            if events > MAX_EVENTS:
                raise Violation("liveness: events without an end")
        waiting = [c.current for c in self.clients if c.busy]
        if waiting:
            raise Violation(f"liveness: nothing happens any more, and these wait: {waiting}")

    def trace_hash(self) -> str:
        """Of everything that was sent, told and done to nodes, in order. Needs `trace`."""
        assert self._trace is not None
        return self._trace.hexdigest()

    def note(self, *what: object) -> None:
        if self._trace is not None:
            self._trace.update(f"{self.now!r} {what!r}\n".encode())

    # -- clients ----------------------------------------------------------------------------------

    def submit(self, client: Client, node: Node, op: Op, patience: float) -> Try:
        """Hands one try of an operation to a live node."""
        attempt = self._tried(node, op)
        node.submit(op, self.now + patience, (client, attempt))
        return attempt

    def submit_all(self, who: Sequence[tuple[Client, Op]], node: Node, patience: float) -> None:
        """Hands operations of several clients to a live node in one request."""
        tags = [(client, self._tried(node, op)) for client, op in who]
        node.submit_all([op for _, op in who], self.now + patience, tags)

    def _tried(self, node: Node, op: Op) -> Try:
        attempt = Try(op, self.ordinal())
        self.history.setdefault(op.key, []).append(attempt)
        self.watcher.born.setdefault(op.id, op.born)
        self.figures.operations += 1
        self.note("submit", node.name, op)
        return attempt

    def told(self, tag: tuple[Client, Try], outcome: Outcome) -> None:
        client, attempt = tag
        self.note("told", attempt.op, outcome)
        self.watcher.told(attempt.op, outcome)
        if not self.healed and self.rng.random() < self.profile.lost_outcome:
            return
        attempt.returned = self.ordinal()
        attempt.outcome = outcome
        client.on_outcome(attempt, outcome)

    def some_node(self) -> Node | None:
        """Any live node that is of use to a client."""
        serving = [m for m in self.machines if m.serves]
        return self.rng.choice(serving) if serving else None

    # -- the network ------------------------------------------------------------------------------

    def send(self, sender: Node, to: NodeId, m: Message) -> None:
        """Puts a message on its way, perhaps twice, perhaps never."""
        self.figures.messages += 1
        self.note(sender.name, to, m)
        p, rng = self.profile, self.rng
        copies = 1
        if not self.healed:
            there = self._current.get(to)
            cut = self._cut_until.get((sender.address, there.address), 0.0) if there is not None else 0.0
            if cut > self.now:
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
            self.at(self.now + delay, self._deliver, sender.name, sender.boot, sender.restored, to, m)

    def _deliver(self, sender: NodeId, boot: int, restored: bool, to: NodeId, m: Message) -> None:
        node = self._current.get(to)
        if node is None or not node.alive:
            return
        known = node.disk.heard.get(sender, 0)
        if restored and boot <= known and not self.variant.snapshots_vote:
            self._refused(sender)  # its hello names a boot that this node has heard of before
            return
        node.disk.heard[sender] = max(boot, known)
        node.on_message(sender, m)

    def _refused(self, name: NodeId) -> None:
        """A disk that was put back from a snapshot is known for it: it ends, and is lost."""
        node = self._current.get(name)
        if node is not None and node.restored:
            self.note("refused", name)
            if node.alive:
                node.crash()
            self._wipe(node)
            self.at(self.now + 0.1, self._restart, node)

    # -- the mesh changes -------------------------------------------------------------------------

    def on_adopted(self, configs: Sequence[Config]) -> None:
        chain = self.watcher.chain
        for config in configs:
            if config.change and any(
                c.change == config.change for c in chain.values() if c.epoch != config.epoch
            ):
                raise Violation(f"chain: one change makes two configurations: {config}")

    def on_changed(self, tag: tuple[Admin, bytes, int], what: MeshChanged | Failure) -> None:
        tag[0].on_changed(tag[1], tag[2], what)

    def begin(self, wish: admin.Wish, stubborn: bool = False, node: Node | None = None) -> Admin:
        new = Admin(self, wish, stubborn)
        self.admins.append(new)
        new.act(node)
        return new

    def _change(self) -> None:
        """Some administrator, and perhaps another one in the same instant, want something."""
        if self.healed:
            return
        rivals = 2 if self.rng.random() < self.profile.rivals else 1
        for _ in range(rivals):
            node = self.some_node()
            wish = self._draw_wish(node) if node is not None else None
            if wish is not None:
                self.begin(wish, node=node)

    def _draw_wish(self, node: Node) -> admin.Wish | None:
        p, rng, view = self.profile, self.rng, node.replica.view
        kind = rng.choices(("add", "remove", "drain", "grant"), (p.adds, p.removes, p.drains, p.grants))[0]
        members = [m for m in view.config.members if m.node not in self.lost]
        if kind == "grant":
            self._grants += 1
            return admin.grant(self._grants.to_bytes(32, "big"))
        if kind == "add":
            machine = self._spare(view.config.nodes)
            return admin.add(machine.name, machine.address) if machine else None
        if not members or len(view.config.voters) == 1 or self.lost:
            return None
        member = rng.choice(members)
        self._shrinks_until = self.now + 3.0
        return (
            admin.remove(member.node) if kind == "remove" else admin.drain(member.node, not member.draining)
        )

    def _spare(self, members: Sequence[NodeId]) -> Node | None:
        """A machine that is not in use. One that was may come back as what it was, or as a new node."""
        newest = self.watcher.chain[self.watcher.newest].nodes
        free = [
            m
            for m in self.machines
            if m.name not in members
            and m.name not in newest
            and (m.replica.view.epoch == 0 or m.replica.may_leave)
            and m.name not in self.lost
            and m.forming is None
            and m.reserved_until <= self.now
            and not any(m is lost for lost in self.lost.values())
        ]
        if not free:
            return None
        machine = self.rng.choice(free)
        if machine.disk.chain and self.rng.random() < 0.6:
            if machine.alive:
                machine.crash()
            self._rename(machine)
        machine.gone = False
        machine.reserved_until = self.now + 8.0
        self._restart(machine)
        return machine

    def retire(self, node: Node) -> None:
        """It may leave: perhaps somebody switches it off."""
        newest = self.watcher.chain[self.watcher.newest].nodes
        early = self.variant.leaves_early and node.name not in node.replica.view.config.nodes
        may = node.replica.may_leave and node.name not in newest and self.rng.random() < 0.1
        may = may and node.reserved_until <= self.now
        if (may or early) and not self.healed and node.replica.view.epoch:
            self.note("retire", node.name)
            node.crash()
            node.gone = True

    def _rename(self, node: Node) -> None:
        """Another disk: the node that it was is no more."""
        old = node.name
        del self._current[old]
        node.wipe(old if self.variant.wiped_keeps_name else self.new_name())
        self._current[node.name] = node
        if node.name != old:
            self.watcher.void[old] = None

    def _wipe(self, node: Node) -> None:
        old = node.name
        self.note("wipe", old)
        self._rename(node)
        if old not in self.lost:
            self.lost[old] = node
        self.begin(admin.replace(old, node), stubborn=True)

    def _regrow(self) -> None:
        """Up to all machines, one after the other, and down to one."""
        order = list(self.machines)

        def step(i: int, up: bool) -> None:
            if up and i == len(order):
                i, up = 1, False
            if not up and i == len(order):
                return
            node = order[i]
            wish = admin.add(node.name, node.address) if up else admin.remove(node.name)
            new = self.begin(wish, stubborn=True)
            self.at(self.now + 0.1, wait, new, i, up)

        def wait(new: Admin, i: int, up: bool) -> None:
            if new.over:
                step(i + 1, up)
            else:
                self.at(self.now + 0.1, wait, new, i, up)

        self.scripted = True
        step(1, True)

    # -- rest -------------------------------------------------------------------------------------

    def at_rest(self) -> bool:
        """Nobody wants anything, every member is in the newest epoch, and base has come there too."""
        newest = self.watcher.newest
        if not newest or any(a.stubborn and not a.over for a in self.admins):
            return False
        config = self.watcher.chain[newest]
        for machine in self.machines:
            out = machine.alive and machine.replica.view.epoch and machine.name not in config.nodes
            if out and not machine.replica.may_leave:
                return False
        for name in config.nodes:
            node = self._current.get(name)
            if node is None or not node.alive or node.replica.view.epoch != newest:
                return False
            replica = node.replica
            deciding = replica._decree is not None or replica._finish_at is not None
            if deciding or not replica.view.is_settled():
                return False
        return True

    def quiet(self) -> bool:
        """Nobody needs to be told anything any more."""
        return self.healed and self.now > self.profile.horizon + LAST_CHANGE and self.at_rest()

    def _check_rest(self) -> None:
        if self.profile.gossip and not self.at_rest():
            raise Violation(f"liveness: {self._unrest()}")
        made = {c.change for c in self.watcher.chain.values()}
        for change_id, text in self.denied.items():
            if change_id in made:
                raise Violation(f"chain: {change_id.hex()} happened, and an administrator was told: {text}")

    def _unrest(self) -> str:
        newest = self.watcher.newest
        lines = [f"no rest in epoch {newest}, base {self.watcher.chain[newest].base}"]
        for m in self.machines:
            v = m.replica.view
            lines.append(
                f"{m.address} {m.name[:4]} alive={m.alive} epoch={v.epoch} base={v.base} "
                f"settled={m.replica.settled} waits={m.replica.unsettled() if v.epoch else ''}"
            )
        return "; ".join(lines)

    def _check_end(self) -> None:
        if not self.at_rest():
            raise Violation(f"liveness: {self._unrest()}")

    # -- faults -----------------------------------------------------------------------------------

    def _schedule_faults(self) -> None:
        p = self.profile
        for rate, fault in (
            (p.crashes, self._crash_one),
            (p.power_cuts, self._power_cut),
            (p.partitions, self._partition),
            (p.cuts, self._cut_one_way),
            (p.damage, self._damage),
            (p.changes if not p.script else 0.0, self._change),
            (p.losses, self._lose_disk),
            (p.absences, self._absent),
        ):
            when = self.rng.expovariate(rate) if rate else p.horizon
            while when < p.horizon:
                self.at(when, fault)
                when += self.rng.expovariate(rate)
        if p.script == "regrow":
            self.at(0.1, self._regrow)
        if p.disaster:
            self.at(p.horizon * self.rng.uniform(0.2, 0.7), self._disaster)

    def _crash_one(self) -> None:
        """Often in the middle of a commit."""
        alive = [n for n in self.machines if n.alive]
        writing = [n for n in alive if n.in_flight is not None]
        if alive:
            self._crash(self.rng.choice(writing if writing and self.rng.random() < 0.7 else alive))

    def _power_cut(self) -> None:
        for node in self.machines:
            if node.alive:
                self._crash(node)

    def _absent(self) -> None:
        """Somebody is down for so long that the mesh may have changed many times."""
        alive = [n for n in self.machines if n.alive and n.replica.view.epoch]
        if alive:
            self._crash(self.rng.choice(alive), self.rng.expovariate(1 / self.profile.absence))

    def _crash(self, node: Node, downtime: float | None = None) -> None:
        self.note("crash", node.name)
        self.figures.crashes += 1
        if self.rng.random() < 0.3 and not node.restored:
            node.snapshot = node.disk.copy()
        node.crash()
        down = self.rng.expovariate(1 / self.profile.downtime) if downtime is None else downtime
        self.at(self.now + down, self._restart, node)

    def _restart(self, node: Node) -> None:
        if not node.alive and not node.gone:
            self.note("restart", node.name)
            node.start()

    def _lose_disk(self) -> None:
        """As many disks as the mesh can take: one at a time, and the next when no epoch that is open
        counts on the last."""
        watcher = self.watcher
        if self.healed:
            return
        if not watcher.newest:
            self._lose_forming()
            return
        view = watcher.view(watcher.newest)
        for name in [n for n in self.lost if n not in view.participants]:
            del self.lost[name]
        if self.lost or not view.is_settled() or len(view.config.voters) < 3:
            return
        if f"config/{watcher.newest + 1}" in watcher.registers or self.now < self._shrinks_until:
            return  # a voter may be about to leave, and the mesh cannot take both
        node = self._current.get(self.rng.choice(view.config.nodes))
        if node is None or node.gone or node.replica.view.epoch != watcher.newest:
            return
        self.figures.lost_disks += 1
        if node.alive:
            node.crash()
        snapshot = node.snapshot
        if snapshot is not None and snapshot.boot < node.boot and self.rng.random() < self.profile.restores:
            self.note("restore", node.name)
            self.lost[node.name] = node
            if not self.variant.snapshots_vote:
                self.watcher.void[node.name] = None
            node.restore()
        else:
            self._wipe(node)
        self.at(self.now + self.rng.expovariate(1 / self.profile.downtime), self._restart, node)

    def _lose_forming(self) -> None:
        """A machine that waits for a mesh starts over with an empty disk."""
        if self.lost or not self.forming_list:
            return
        node = self.at_address(self.rng.choice(self.forming_list))
        if len(self.forming_list) < 3 or node.replica.view.epoch:
            return
        if node.alive:
            node.crash()
        self.figures.lost_disks += 1
        self._wipe(node)
        self.at(self.now + self.rng.expovariate(1 / self.profile.downtime), self._restart, node)

    def _partition(self) -> None:
        addresses = [m.address for m in self.machines]
        side = [self.rng.random() < 0.5 for _ in addresses]
        until = self.now + self.rng.expovariate(1 / self.profile.outage)
        for a, left in zip(addresses, side, strict=True):
            for b, right in zip(addresses, side, strict=True):
                if left != right:
                    self._cut_until[a, b] = until

    def _cut_one_way(self) -> None:
        if len(self.machines) > 1:
            a, b = self.rng.sample([m.address for m in self.machines], 2)
            self._cut_until[a, b] = self.now + self.rng.expovariate(1 / self.profile.outage)

    def _damage(self) -> None:
        """One record on one disk; per key on fewer than half of its group."""
        key = self.rng.choice(self.keys)
        nodes = [self._current[n] for n in self.watcher.view(self.watcher.newest).group(key)]
        if sum(key in n.disk.damaged for n in nodes) < (len(nodes) - 1) // 2:
            self.rng.choice(nodes).disk.damaged[key] = None

    def _disaster(self) -> None:
        """Most members burn down. What they alone knew of the chain must not be forked, so it happens
        in a quiet moment of the chain."""
        watcher, newest = self.watcher, self.watcher.newest
        config = watcher.chain[newest]
        members = [self._current[n] for n in config.nodes if n in self._current]
        if self.now > self.profile.horizon - 1.0:
            return  # what burns down now would come back before anybody recovers
        decided = f"config/{newest + 1}" in watcher.registers
        if decided or len(members) < 3 or any(m.replica.view.epoch != newest for m in members):
            if self.now < self.profile.horizon - 1.0:
                self.at(self.now + 0.2, self._disaster)
            return
        dead = self.rng.sample(members, len(members) // 2 + 1)
        if set(config.voters) <= {n.name for n in dead}:
            return  # nobody who votes is left: nothing can be recovered
        for node in dead:
            if node.alive:
                node.crash()
            node.gone = True
        gone = [n.name for n in dead]
        view = watcher.view(newest)
        for key in self.keys:
            for era in view.eras(key):
                if sum(n not in gone for n in era.group) <= era.size // 2:
                    watcher.given_up[key_subject(key)] = None
        self.note("disaster", gone)
        self.at(self.now + 0.5, self._recover, newest, gone)

    def _recover(self, epoch: int, gone: list[NodeId]) -> None:
        """The operator tells every survivor how the mesh goes on."""
        if self.watcher.newest != epoch:
            raise Violation("the mesh went on without a majority")
        config = forced(self.watcher.view(epoch), gone, self.rng.randbytes(16))
        self.watcher.forced[config.epoch] = config
        survivors = [m for m in self.machines if m.name in config.nodes]
        for node in survivors:
            if not node.alive:
                self._restart(node)
            if node.replica.view.epoch == epoch:
                node.replica.adopt([config], self.now)
                node.settle()

    def _heal(self) -> None:
        """No fault from here on; messages on their way arrive when they arrive."""
        self.note("heal")
        self.healed = True
        newest = self.watcher.chain[self.watcher.newest].nodes
        for node in self.machines:
            if node.name in newest:
                node.gone = False
            self._restart(node)
        for client in self.clients:
            client.on_heal()
        if self.profile.gossip:
            self.at(self.now + SETTLED, self._check_end)
