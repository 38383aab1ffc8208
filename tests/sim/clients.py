"""The clients of a simulated world: what they ask for, and how they try again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.invariants import Violation
from tests.sim.linearizability import Try
from vstack.mesh.config import GENESIS, key_epoch, leader
from vstack.mesh.messages import Found, Mismatch, Ok, Op, Outcome, Unknown

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

LIVENESS = 50.0
"""Virtual seconds in which an operation ends once there are no faults."""

TRIES = 4
"""Tries of an operation while there are faults; what is left over must end after them."""


FOR_EVER = ("too often", "is older than")
"""Another try of such an Unknown would say the same."""


class Client:
    """One operation at a time, tried through any node until it has an outcome."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.current: Op | None = None
        self.seen: dict[str, int] = {}
        """The last version of each key that this client was told."""
        self.epoch = 0
        """The newest epoch that this client has heard of."""
        self._made = 0
        self._tries = 0
        self._left_over: list[Op] = []
        self._to_look: list[str] = []

    @property
    def busy(self) -> bool:
        return self.current is not None or bool(self._left_over)

    # -- what to do -------------------------------------------------------------------------------

    def think(self) -> None:
        world = self.world
        world.at(world.now + world.rng.expovariate(1 / world.profile.think), self._wake)

    def _wake(self) -> None:
        world, p = self.world, self.world.profile
        if self.current is not None or world.healed:
            return
        node = world.some_node()
        if world.ops_left <= 0 or node is None:
            if world.ops_left > 0:
                self.think()
            return
        if p.batches and world.rng.random() < p.batches:
            self._batch(node)
            return
        fresh = p.uploads and world.rng.random() < p.uploads
        key = world.new_key(node) if fresh else world.rng.choice(world.keys)
        op = self._draw(key)
        if op.expect == 0 and op.data is not None and world.rng.random() < p.through_leader:
            first = leader(world.watcher.chain.get(key_epoch(key), GENESIS), key)
            there = world.node(first) if first else None
            node = there if there is not None and there.serves else node
        self.begin(op, node)
        if len(world.clients) > 1 and world.rng.random() < p.rush:
            for other in world.rng.sample(world.clients, world.rng.randint(1, len(world.clients) - 1)):
                if other.current is None:
                    there = node if world.rng.random() < p.same_node else world.some_node()
                    other.begin(other._draw(key), there if there is not None else node)

    def _batch(self, node: Node) -> None:
        """All clients that are idle create neighbouring chunks of one upload in one request, most often
        through their leader: of a new upload, or of one of which some may be there already."""
        world, p = self.world, self.world.profile
        idle = [c for c in world.clients if c.current is None]
        keys = world.new_upload(node, world.rng.randint(2, len(idle) + 2))
        if (
            len(world.clients) > 1 and world.rng.random() < p.rush
        ):  # somebody else does something to one of them
            rival = world.rng.choice(idle)
            if rival is not self:
                idle.remove(rival)
                rival.begin(rival._draw(world.rng.choice(keys)), world.some_node())
        again = [k for k in world.keys if k.startswith("chunk/")] if world.rng.random() < p.echo else keys
        who = [
            (c, c._op(key, 0, b"%d.%d" % (c.number, c._made)))
            for c, key in zip(idle, world.rng.sample(again, min(len(idle), len(again))), strict=False)
        ]
        first = leader(world.watcher.chain.get(key_epoch(who[0][1].key), GENESIS), who[0][1].key)
        there = world.node(first) if first and world.rng.random() < p.through_leader else None
        node = there if there is not None and there.serves else node
        patience = 0.0
        for client, op in who:
            client.epoch = max(client.epoch, node.replica.view.epoch)
            patience = client._start(op)
        world.submit_all(who, node, patience * world.rng.uniform(0.5, 1.5))

    def _draw(self, key: str) -> Op:
        """An operation on `key` that makes some sense to this client."""
        p, rng = self.world.profile, self.world.rng
        version = self.seen.get(key, 0)
        if rng.random() < p.read:
            return self._op(key, None, None)
        if version and rng.random() < p.stale:
            version -= rng.randint(1, 3)
        if rng.random() < p.create:
            version = 0
        elif rng.random() < p.delete:
            return self._op(key, version, None)
        return self._op(key, version, b"%d.%d" % (self.number, self._made))

    def _op(self, key: str, expect: int | None, data: bytes | None) -> Op:
        self._made += 1
        op_id = self.number.to_bytes(8, "big") + self._made.to_bytes(8, "big")
        return Op(op_id, key, max(1, self.epoch, key_epoch(key)), expect, data)

    # -- tries ------------------------------------------------------------------------------------

    def begin(self, op: Op, node: Node | None) -> None:
        patience = self._start(op)
        self._hand_to(node, op, patience)

    def _start(self, op: Op) -> float:
        """Waits for an outcome of it from now on; the patience of the first try."""
        self.world.ops_left -= 1
        self.current = op
        self._tries = 0
        if self.world.healed:
            self._expect_end(op)
        return self._wait()

    def _expect_end(self, op: Op) -> None:
        self.world.at(self.world.now + LIVENESS, self._check_end, op)

    def _check_end(self, op: Op) -> None:
        if self.current is op:
            raise Violation(f"liveness: {op} without an outcome, {LIVENESS} s after the last fault")

    def _try(self, node: Node | None) -> None:
        """Through `node`; the next try goes to any other node, while this one may still go on."""
        op = self.current
        assert op is not None
        self._hand_to(node, op, self._wait())

    def _wait(self) -> float:
        """Begins another try; how long it is waited for."""
        world, op = self.world, self.current
        self._tries += 1
        patience = world.rng.expovariate(1 / world.profile.patience) + 0.05 if not world.healed else 15.0
        world.at(world.now + patience, self._on_patience_end, op, self._tries)
        return patience

    def _hand_to(self, node: Node | None, op: Op, patience: float) -> None:
        world = self.world
        if node is not None:
            self.epoch = max(self.epoch, node.replica.view.epoch)
            world.submit(self, node, op, patience * world.rng.uniform(0.5, 1.5))

    def _on_patience_end(self, op: Op, tries: int) -> None:
        if self.current is not op or self._tries != tries:
            return
        if self._tries < TRIES or self.world.healed:
            self._try(self.world.some_node())
        else:
            self._left_over.append(op)
            self.current = None
            self.think()

    def on_outcome(self, attempt: Try, outcome: Outcome) -> None:
        world, op = self.world, attempt.op
        if isinstance(outcome, Ok | Mismatch | Found):
            self.seen[op.key] = outcome.version
        elif isinstance(outcome, Unknown) and not any(w in outcome.reason for w in FOR_EVER):
            return  # patience will end
        if self.current is not op:
            return
        self.current = None
        if not world.healed and world.rng.random() < world.profile.echo:
            world.at(world.now + world.rng.uniform(0.0, world.profile.horizon), self._echo, op)
        self._next()

    def _echo(self, op: Op) -> None:
        """The same request once more, long after its answer."""
        node = self.world.some_node()
        if node is not None:
            self.world.submit(self, node, op, 1.0)

    # -- the end ----------------------------------------------------------------------------------

    def on_heal(self) -> None:
        """What was given up is taken up again, what waits is asked again, and all of it must end now."""
        if self.current is None:
            self._next()
        else:
            self._expect_end(self.current)
            self._try(self.world.some_node())

    def look(self) -> None:
        """Reads every key, so that what the history left open is seen."""
        self._to_look = list(self.world.keys)
        self._next()

    def _next(self) -> None:
        if not self.world.healed:
            self.think()
        elif self._left_over:
            self._begin_anywhere(self._left_over.pop())
        elif self._to_look:
            self._begin_anywhere(self._op(self._to_look.pop(), None, None))

    def _begin_anywhere(self, op: Op) -> None:
        self.begin(op, self.world.some_node())
