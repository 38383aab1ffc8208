"""What follows an epoch: one proposer's attempts at a write-once register (CHUNKPAXOS, *Chain*).

Single-decree Paxos among all members of the configuration of epoch e, by majority, in the register
`config/<e+1>`, outside the epoch fence. Whoever asks, and with whatever wish: what comes out is the
same everywhere, because a proposer that finds a value accepted finishes that one instead of its own.

Pure, as every proposer: the caller commits the acceptor's votes before the outbox leaves.
"""

from __future__ import annotations

from random import Random

import msgspec

from vstack.errors import DamagedData
from vstack.mesh.config import CONFIG_KEY, Config, NodeId, pack_config, unpack_config
from vstack.mesh.messages import (
    ZERO,
    Accept,
    Accepted,
    Ballot,
    Nack,
    Prepare,
    Promise,
    Reply,
    Request,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.proposer import MAX_ROUND

PATIENCE = 0.5
"""Seconds that an attempt may take before the next one; jittered, and doubled with each in vain."""
DOUBLINGS = 4
"""How often, at most."""


class Rounds:
    """The rounds of one process, over all its decrees: none is used twice (I3).

    Also its patience, over all decrees about one epoch: many who want something at once, and are far from
    each other, would otherwise keep outbidding each other for ever.
    """

    def __init__(self) -> None:
        self._last = 0
        self.in_vain = 0
        """Attempts since the last epoch. Who adopts one sets it back."""
        self.not_before = 0.0
        """When the next attempt may begin."""

    def above(self, floor: int) -> int:
        self._last = max(self._last, floor) + 1
        return self._last


def config_in(value: Value, epoch: int) -> Config | None:
    """The configuration of `epoch` that an acceptor of its register holds; None if it holds nothing, or
    nonsense that a stranger got accepted there."""
    try:
        config = unpack_config(value.data or b"")
    except msgspec.DecodeError:
        return None
    return config if config.epoch == epoch else None


class Decree:
    """Begun by its first `tick`; over when `decided` is set."""

    def __init__(
        self,
        current: Config,
        wish: Config,
        me: NodeId,
        boot: int,
        acceptor: Acceptor,
        rounds: Rounds,
        rng: Random,
    ) -> None:
        self.wish = wish
        self.decided: Config | None = None
        self.outbox: list[tuple[NodeId, Request]] = []
        self.next_try = rounds.not_before
        """When `tick` begins the next attempt."""
        self._key = f"{CONFIG_KEY}{wish.epoch}"
        self._acceptors = current.nodes
        self._majority = len(current.nodes) // 2 + 1
        self._me = me
        self._boot = boot
        self._acceptor = acceptor
        self._rounds = rounds
        self._rng = rng
        self._floor = 0
        self._ballot = ZERO
        self._promises: dict[NodeId, Promise] = {}
        self._accepted: set[NodeId] = set()
        self._proposal: Value | None = None

    def tick(self, now: float) -> None:
        """Begins an attempt if it is time."""
        if self.decided is not None or now < self.next_try:
            return
        self._rounds.in_vain += 1
        self._pause_until(now + self._ceiling() * self._rng.uniform(0.5, 1.0))
        try:
            own = self._acceptor.record(self._key).promised.round
        except DamagedData:
            own = 0
        self._ballot = Ballot(0, self._rounds.above(max(self._floor, own)), self._me, self._boot)
        self._promises, self._accepted, self._proposal = {}, set(), None
        self._send(Prepare(self._key, self._ballot), now)

    def receive(self, sender: NodeId, m: Reply, now: float) -> None:
        """A reply about this register; any other is ignored."""
        if m.key != self._key or self.decided is not None or sender not in self._acceptors:
            return
        if isinstance(m, Nack):
            if m.seen.round < MAX_ROUND:
                self._floor = max(self._floor, m.seen.round)
            if m.ballot == self._ballot and m.seen > self._ballot:
                self._pause_until(min(self.next_try, now + self._ceiling() * self._rng.random()))
        elif isinstance(m, Promise) and m.ballot == self._ballot and self._proposal is None:
            if m.accepted > ZERO and config_in(m.value, self.wish.epoch) is None:
                return
            self._promises[sender] = m
            if len(self._promises) >= self._majority:
                best = max(self._promises.values(), key=lambda p: p.accepted)
                mine = Value(self.wish.epoch, pack_config(self.wish))
                self._proposal = best.value if best.accepted > ZERO else mine
                self._send(Accept(self._key, self._ballot, self._proposal), now)
        elif isinstance(m, Accepted) and m.ballot == self._ballot and self._proposal is not None:
            self._accepted.add(sender)
            if len(self._accepted) >= self._majority:
                self.decided = unpack_config(self._proposal.data or b"")

    def _ceiling(self) -> float:
        return PATIENCE * (1 << min(self._rounds.in_vain, DOUBLINGS))

    def _pause_until(self, when: float) -> None:
        self.next_try = self._rounds.not_before = when

    def _send(self, m: Request, now: float) -> None:
        self.outbox.extend((n, m) for n in self._acceptors if n != self._me)
        if self._me in self._acceptors:
            reply = self._acceptor.receive(m)
            if reply is not None:
                self.receive(self._me, reply, now)
