"""How the first configuration is decided (CHUNKPAXOS, section 5, *Forming*).

Pure. A node without a mesh says hello to every address of its list, itself included, and waits
until all of them have answered: reachable, of no mesh, started with the identical list. Then
the configuration of epoch 1 is decided by single-decree Paxos among exactly these nodes, in the
register `config/1`, whose votes are as durable as any. Phase 1 asks all of them, not a majority:
with a majority only, a wiped node beside late starters could found a second mesh.

Any of them may propose. The one with the lowest NodeId begins at once; the others step in, at a
random moment, when nothing was decided for a while. A node that learns of a mesh through a peer's
hello stops forming and takes that mesh's chain instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from vstack.mesh.config import Config, Grant, Member, NodeId, pack_config, unpack_config
from vstack.mesh.messages import (
    ZERO,
    Accept,
    Accepted,
    Ballot,
    Hello,
    Nack,
    Prepare,
    Promise,
    Reply,
    Request,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor

FORMING_KEY = "config/1"


def _is_config(value: Value) -> bool:
    try:
        return unpack_config(value.data or b"").epoch == 1
    except msgspec.DecodeError:
        return False


def list_digest(addresses: Sequence[str]) -> bytes:
    """Equal for equal lists, in any order."""
    return hashlib.sha256("\n".join(sorted(set(addresses))).encode()).digest()


@dataclass
class Forming:
    """Events in (`met`, `receive`, `tick`), requests out (`outbox`), until `decided` is set.

    As with every proposer, the caller commits the acceptor's votes before the outbox leaves.
    """

    me: NodeId
    boot: int
    addresses: tuple[str, ...]
    acceptor: Acceptor
    rng: Random
    grants: tuple[Grant, ...] = ()
    """The clients that the first configuration knows."""
    outbox: list[tuple[NodeId, Request]] = field(default_factory=list)
    decided: Config | None = None
    _met: dict[str, Hello] = field(default_factory=dict)
    _ballot: Ballot = ZERO
    _promises: dict[NodeId, Promise] = field(default_factory=dict)
    _accepted: set[NodeId] = field(default_factory=set)
    _proposal: Value | None = None
    _next_try: float | None = None

    def met(self, address: str, hello: Hello) -> None:
        """The node at `address` said who it is."""
        self._met[address] = hello

    def waiting_for(self) -> list[str]:
        """What is missing before the mesh can be founded, in words, one line per peer."""
        digest = list_digest(self.addresses)
        lines = []
        for address in self.addresses:
            hello = self._met.get(address)
            if hello is None:
                lines.append(f"{address} has not answered")
            elif hello.peers != digest and not hello.mesh:
                lines.append(f"{address} was started with another list of peers")
        nodes = [h.node for h in self._met.values()]
        if len(self._met) == len(self.addresses) and self.me not in nodes:
            lines.append("none of the listed addresses is this node itself")
        for node in sorted({n for n in nodes if nodes.count(n) > 1}):
            same = [a for a, h in self._met.items() if h.node == node]
            lines.append(f"{' and '.join(same)} are the same node")
        return lines

    def tick(self, now: float) -> None:
        """Begins an attempt when it is time and everybody is there."""
        if self.decided or self.waiting_for() or any(h.mesh for h in self._met.values()):
            return  # who knows of a mesh has no vote on founding another, and its chain is on the way
        if self._next_try is None:
            first = self.me == min(h.node for h in self._met.values())
            self._next_try = now if first else now + self.rng.uniform(1.0, 3.0)
        if now < self._next_try:
            return
        self._next_try = now + self.rng.uniform(1.0, 3.0)
        floor = max(self._ballot.round, self.acceptor.record(FORMING_KEY).promised.round)
        self._ballot = Ballot(0, floor + 1, self.me, self.boot)
        self._promises, self._accepted, self._proposal = {}, set(), None
        self._send(self._everyone(), Prepare(FORMING_KEY, self._ballot))

    def receive(self, sender: NodeId, m: Reply) -> None:
        """A reply about the register `config/1`."""
        if self.decided or m.key != FORMING_KEY:
            return
        if isinstance(m, Promise) and m.accepted > ZERO and not _is_config(m.value):
            return  # nonsense that a stranger got accepted there must not end us
        if isinstance(m, Nack) and m.ballot == self._ballot:
            self._ballot = self._ballot._replace(round=max(self._ballot.round, m.seen.round))
        elif isinstance(m, Promise) and m.ballot == self._ballot and self._proposal is None:
            self._promises[sender] = m
            if set(self._everyone()) <= set(self._promises):
                best = max(self._promises.values(), key=lambda p: p.accepted)
                self._proposal = best.value if best.accepted > ZERO else self._first_config()
                members = unpack_config(self._proposal.data or b"").nodes
                self._send(members, Accept(FORMING_KEY, self._ballot, self._proposal))
        elif isinstance(m, Accepted) and m.ballot == self._ballot and self._proposal is not None:
            self._accepted.add(sender)
            config = unpack_config(self._proposal.data or b"")
            if len(self._accepted & set(config.nodes)) > len(config.nodes) // 2:
                self.decided = config

    def _everyone(self) -> tuple[NodeId, ...]:
        return tuple(self._met[a].node for a in self.addresses)

    def _first_config(self) -> Value:
        members = tuple(
            Member(h.node, address, h.zone, h.weight, h.key)
            for h, address in sorted(((self._met[a], a) for a in self.addresses), key=lambda t: t[0].node)
        )
        return Value(1, pack_config(Config(1, members, base=1, grants=self.grants)))

    def _send(self, nodes: Sequence[NodeId], m: Request) -> None:
        self.outbox.extend((n, m) for n in nodes if n != self.me)
        if self.me in nodes:
            reply = self.acceptor.receive(m)
            if reply is not None:
                self.receive(self.me, reply)
