"""What must hold after every event (CHUNKPAXOS, section 7). Raises `Violation` at once.

The watcher sees what acceptors did (once it is durable), what leaves a node, and what a client
is told. It keeps, per key, every value ever proposed, every vote, and which ballots are chosen:
those that a majority of the group accepted, at whatever times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vstack.errors import DamagedData
from vstack.mesh.config import NodeId, View, group, key_epoch, key_subject
from vstack.mesh.messages import (
    EMPTY,
    Accept,
    Accepted,
    Ballot,
    Found,
    Mismatch,
    Ok,
    Op,
    Outcome,
    Prepare,
    Promise,
    Read,
    Record,
    Reply,
    Request,
    Unknown,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor


class Violation(Exception):
    """An invariant does not hold; the first word names it."""


class Vote(NamedTuple):
    """One request that an acceptor answered, with the record before it."""

    request: Request
    reply: Reply
    before: Record


class WatchedAcceptor(Acceptor):
    """Mixed into each variant of the acceptor: logs what it did since the last commit."""

    log: list[Vote]

    def receive(self, m: Request) -> Reply | None:
        before = self._lenient(m.key)
        reply = super().receive(m)
        after = self._lenient(m.key)
        if after is not before:
            if after.promised < before.promised or after.accepted < before.accepted:
                raise Violation(f"I1 {m.key}: {before} became {after}")
            if after.accepted > after.promised:
                raise Violation(f"I2 {m.key}: {after}")
        if reply is not None:
            self.log.append(Vote(m, reply, before))
        return reply

    def _lenient(self, key: str) -> Record:
        try:
            return self.record(key)
        except DamagedData:
            return EMPTY


def follows(later: Value, earlier: Value) -> bool:
    """Whether `later` can have grown from `earlier` by changes that each replaced one version."""
    if later.version == earlier.version:
        return later == earlier
    replaced = [a.replaced for a in later.ops]
    if earlier.version in replaced:
        i = replaced.index(earlier.version)
        return not (i and earlier.ops) or later.ops[i - 1] == earlier.ops[-1]
    return len(replaced) == 16 and replaced[0] > earlier.version


@dataclass(slots=True)
class Register:
    """All that happened to one key."""

    proposals: dict[Ballot, Value] = field(default_factory=dict)
    promises: dict[Ballot, set[NodeId]] = field(default_factory=dict)
    votes: dict[Ballot, set[NodeId]] = field(default_factory=dict)
    chosen: dict[Ballot, Value] = field(default_factory=dict)


class Watcher:
    """One for a whole world."""

    def __init__(self, view: View) -> None:
        self.view = view
        """Every configuration that was ever decided."""
        self.registers: dict[str, Register] = {}
        self.disks: dict[NodeId, dict[str, Record]] = {}
        """What each node ever made durable: more than its disk has, if it loses something."""
        self.decisions = 0

    def register(self, key: str) -> Register:
        found = self.registers.get(key)
        if found is None:
            found = self.registers[key] = Register()
        return found

    # -- what nodes do ----------------------------------------------------------------------------

    def durable(self, node: NodeId, written: dict[str, Record], log: list[Vote]) -> None:
        """A commit of `node` is complete."""
        disk = self.disks.setdefault(node, {})
        for key, record in written.items():
            old = disk.get(key, EMPTY)
            if record.promised < old.promised or record.accepted < old.accepted:
                raise Violation(f"I1 {key}: {old} on disk became {record}")
            if record.accepted > record.promised:
                raise Violation(f"I2 {key}: {record}")
            if not self.view.serves(node, key):
                raise Violation(f"I7 {node} stores {key}")
        disk.update(written)
        for vote in log:
            if isinstance(vote.reply, Accepted) and isinstance(vote.request, Accept):
                self._voted(node, vote.request, vote.before)

    def _voted(self, node: NodeId, m: Accept, before: Record) -> None:
        if m.fresh:
            again = before.accepted == m.ballot and before.value == m.value
            if before != EMPTY and not again:
                raise Violation(f"I8 {m.key}: fresh {m.ballot} accepted over {before}")
            self._check_fresh(m)
        register = self.register(m.key)
        self._proposed(register, m)
        votes = register.votes.setdefault(m.ballot, set())
        votes.add(node)
        acceptors = group(self.view.at(m.ballot.epoch), key_subject(m.key))
        if m.ballot not in register.chosen and 2 * sum(n in votes for n in acceptors) > len(acceptors):
            self._chosen(register, m)

    def _proposed(self, register: Register, m: Accept) -> None:
        known = register.proposals.get(m.ballot)
        if known is None:
            register.proposals[m.ballot] = m.value
            for ballot, value in register.chosen.items():
                if ballot < m.ballot and not follows(m.value, value):
                    raise Violation(f"I5 {m.key}: {m.ballot} {m.value} ignores chosen {ballot} {value}")
        elif known != m.value:
            raise Violation(f"I3 {m.key}: {m.ballot} stands for {known} and for {m.value}")

    def _chosen(self, register: Register, m: Accept) -> None:
        self.decisions += 1
        for ballot, value in register.proposals.items():
            if ballot > m.ballot and not follows(value, m.value):
                raise Violation(f"I5 {m.key}: {ballot} {value} ignores chosen {m.ballot} {m.value}")
        for ballot, value in register.chosen.items():
            older, newer = (value, m.value) if ballot < m.ballot else (m.value, value)
            if not follows(newer, older):
                raise Violation(f"I10 {m.key}: {older} and then {newer} are chosen")
        register.chosen[m.ballot] = m.value

    def _check_fresh(self, m: Accept) -> None:
        right = m.ballot.round == 0 and m.ballot.node == self.view.leader(m.key)
        if not right or m.ballot.epoch != key_epoch(m.key):
            raise Violation(f"I8 {m.key}: {m.ballot} may not create")

    # -- what travels -----------------------------------------------------------------------------

    def sent(self, node: NodeId, m: Request) -> None:
        """A request leaves `node`; everything that it had to make durable is on its disk."""
        epoch = m.epoch if isinstance(m, Read) else m.ballot.epoch
        if epoch < key_epoch(m.key):
            raise Violation(f"I8 {m.key}: a message of epoch {epoch}")
        if isinstance(m, Prepare) and m.ballot.round == 0:
            raise Violation(f"I8 {m.key}: phase 1 at round 0")
        if not isinstance(m, Accept):
            return
        register = self.register(m.key)
        self._proposed(register, m)
        own = self.disks.get(node, {}).get(m.key, EMPTY)
        if m.fresh:
            self._check_fresh(m)
            if own.promised < m.ballot or node not in register.votes.get(m.ballot, ()):
                raise Violation(f"I8 {m.key}: {m.ballot} leaves before it is on the own disk")
            return
        promised = set(register.promises.get(m.ballot, ()))
        if own.promised >= m.ballot:
            promised.add(node)
        for era in self.view.eras(m.key):
            if sum(n in promised for n in era.group) < era.majority:
                raise Violation(f"I4 {m.key}: {m.ballot} is proposed after promises of {sorted(promised)}")

    def promised(self, sender: NodeId, m: Promise) -> None:
        """A promise reaches the node that asked for it."""
        self.register(m.key).promises.setdefault(m.ballot, set()).add(sender)

    def told(self, op: Op, outcome: Outcome) -> None:
        """I6: a client learns of an outcome."""
        if isinstance(outcome, Unknown):
            return
        chosen = self.register(op.key).chosen
        if isinstance(outcome, Ok):
            if not any(self._made(value, op, outcome.version) for value in chosen.values()):
                raise Violation(f"I6 {op.key}: {outcome} is not chosen")
        elif isinstance(outcome, Found | Mismatch) and outcome.version:
            if not any(self._held(value, outcome) for value in chosen.values()):
                raise Violation(f"I6 {op.key}: {outcome} is not chosen")
        elif isinstance(outcome, Mismatch) and not chosen:
            raise Violation(f"I6 {op.key}: {outcome} without a decision")

    @staticmethod
    def _made(value: Value, op: Op, version: int) -> bool:
        versions = [a.replaced for a in value.ops[1:]] + [value.version]
        return any(a.op == op.id and v == version for a, v in zip(value.ops, versions, strict=False))

    @staticmethod
    def _held(value: Value, outcome: Found | Mismatch) -> bool:
        if value.version == outcome.version:
            return value.data == outcome.data
        return any(a.replaced == outcome.version for a in value.ops)


class Blind(Watcher):
    """Sees nothing: for runs in which the clients' histories alone have to show what is wrong."""

    def durable(self, node: NodeId, written: dict[str, Record], log: list[Vote]) -> None:
        pass

    def sent(self, node: NodeId, m: Request) -> None:
        pass

    def told(self, op: Op, outcome: Outcome) -> None:
        pass
