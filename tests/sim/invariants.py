"""What must hold after every event (CHUNKPAXOS, section 7). Raises `Violation` at once.

The watcher sees what acceptors did (once it is durable), what leaves a node, which configurations
nodes adopt, and what a client is told. It keeps the chain as it was decided and, per key, every
value ever proposed, every vote, and which ballots are chosen: those that a majority of the group of
the ballot's epoch accepted, at whatever times. Each ballot is judged by the eras of its own epoch.

Beside I1 to I10, of the chain:

    boot        goes up with each process of a node
    agreement   one configuration per epoch, adopted only if a majority of the members before accepted
                it in one ballot, or the operator forced it
    base        never goes down; when it moves, every key that has a chosen value in an older epoch has
                a majority of its group with a ballot of the newest era (bug B15)
    open        at most MAX_OPEN runs of equal voters; one voter leaves at a time
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vstack.errors import DamagedData
from vstack.mesh.changes import MAX_OPEN
from vstack.mesh.config import (
    CONFIG_KEY,
    GENESIS,
    Config,
    NodeId,
    View,
    group,
    key_epoch,
    key_subject,
    leader,
    unpack_config,
)
from vstack.mesh.messages import (
    EMPTY,
    Accept,
    Accepted,
    Ballot,
    Created,
    Creates,
    Found,
    Mismatch,
    Nack,
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

    def create_all(self, m: Creates) -> Created | None:
        accepts = m.accepts()
        before = [self._lenient(accept.key) for accept in accepts]
        created = super().create_all(m)
        if created is not None and created != Created(m.stem, m.ballot, m.indexes):
            raise Violation(f"run {m.key}: {created} answers {m}")
        if created is not None:
            self.log += [
                Vote(accept, Accepted(accept.key, accept.ballot), old)
                for accept, old in zip(accepts, before, strict=True)
            ]
        return created

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
    promises: dict[Ballot, dict[NodeId, Ballot]] = field(default_factory=dict)
    """Who promised, and what it had accepted then."""
    votes: dict[Ballot, dict[NodeId, None]] = field(default_factory=dict)
    chosen: dict[Ballot, Value] = field(default_factory=dict)


class Watcher:
    """One for a whole world."""

    def __init__(self) -> None:
        self.chain: dict[int, Config] = {0: GENESIS}
        """Every configuration that was ever decided."""
        self.registers: dict[str, Register] = {}
        self.disks: dict[NodeId, dict[str, Record]] = {}
        """What each node ever made durable: more than its disk has, if it loses something."""
        self.epochs: dict[NodeId, int] = {}
        """The newest epoch that each node ever adopted."""
        self.boots: dict[NodeId, int] = {}
        self.tokens: dict[tuple[NodeId, int], int] = {}
        """Which process used each token of a read."""
        self.born: dict[bytes, int] = {}
        """The epoch of each operation, when its client first sent it."""
        self.forced: dict[int, Config] = {}
        """What an operator made when no majority could decide any more."""
        self.given_up: dict[str, None] = {}
        """Subjects whose group lost its majority: nothing is claimed of them any more."""
        self.void: dict[NodeId, None] = {}
        """Nodes that lost what they had promised, and know it: nothing is claimed of them either."""
        self.founders = 0
        """How many nodes must found a mesh together; 0: there is one already."""
        self.decisions = 0
        self._views: dict[int, View] = {}

    def register(self, key: str) -> Register:
        found = self.registers.get(key)
        if found is None:
            found = self.registers[key] = Register()
        return found

    @property
    def newest(self) -> int:
        return len(self.chain) - 1

    def view(self, epoch: int) -> View:
        """As a node knows the mesh that is in `epoch`. Raises Violation for one that nobody decided."""
        found = self._views.get(epoch)
        if found is None:
            if epoch not in self.chain:
                raise Violation(f"chain: epoch {epoch} is used, and was never decided")
            base = self.chain[epoch].base
            found = self._views[epoch] = View(tuple(self.chain[e] for e in range(base, epoch + 1)))
        return found

    def _ignored(self, key: str) -> bool:
        return not key.startswith(CONFIG_KEY) and key_subject(key) in self.given_up

    # -- the chain --------------------------------------------------------------------------------

    def founded(self, config: Config) -> None:
        """A mesh that exists when the world begins."""
        self.chain[1] = config

    def started(self, node: NodeId, epoch: int, boot: int) -> None:
        """A process starts, with what its disk has."""
        if boot <= self.boots.get(node, 0) and node not in self.void:
            raise Violation(f"boot {node}: {boot} after {self.boots[node]}")
        self.boots[node] = max(boot, self.boots.get(node, 0))
        if epoch < self.epochs.get(node, 0) and node not in self.void:
            raise Violation(f"I1 {node}: epoch {self.epochs[node]} on disk became {epoch}")
        self.epochs[node] = max(epoch, self.epochs.get(node, 0))

    def adopted(
        self, node: NodeId, configs: Sequence[Config], disk: dict[str, Record], dropped: Iterable[str]
    ) -> None:
        """`node` has made `configs` durable, and forgotten the registers of `dropped`."""
        for config in configs:
            known = self.chain.get(config.epoch)
            if known is None:
                self._decided(config)
            elif known != config:
                raise Violation(f"chain: epoch {config.epoch} is {known} and {config}")
        epoch = configs[-1].epoch
        if epoch <= self.epochs.get(node, 0) and node not in self.void:
            raise Violation(f"I1 {node}: adopts {epoch} after {self.epochs[node]}")
        self.epochs[node] = epoch
        gone = set(dropped)
        mine = self.disks.setdefault(node, {})
        for key in [k for k in mine if not k.startswith(CONFIG_KEY) and key_subject(k) in gone]:
            del mine[key]
        view = self.view(epoch)
        for key in disk:
            if not key.startswith(CONFIG_KEY) and not view.serves(node, key):
                raise Violation(f"I7 {node} keeps {key} in epoch {epoch}")

    def _decided(self, config: Config) -> None:
        before = self.chain.get(config.epoch - 1)
        if before is None:
            raise Violation(f"chain: {config} follows nothing")
        if self.forced.get(config.epoch) != config:
            chosen = self.register(f"{CONFIG_KEY}{config.epoch}").chosen.values()
            if not any(unpack_config(v.data or b"") == config for v in chosen):
                raise Violation(f"chain: {config} is adopted, and is not chosen")
        if config.epoch == 1 and len(config.members) < self.founders:
            raise Violation(f"chain: {len(config.members)} of {self.founders} found a mesh")
        if config.base < before.base or config.base > config.epoch:
            raise Violation(f"base goes from {before.base} to {config.base} in epoch {config.epoch}")
        self.chain[config.epoch] = config
        view = self.view(config.epoch)
        runs: list[set[NodeId]] = []
        for c in view.chain():
            if not runs or runs[-1] != set(c.voters):
                runs.append(set(c.voters))
        if len(runs) > MAX_OPEN and not any(c.epoch in self.forced for c in view.chain()):
            raise Violation(f"open: {len(runs)} runs of voters in epoch {config.epoch}")
        leaving = {n for run in runs for n in run} - set(config.voters) - view.lost
        if len(leaving) > 1 and len(set(before.voters) - set(config.voters)) == 1:
            raise Violation(f"open: {len(leaving)} voters leave at once in epoch {config.epoch}")
        if config.base > before.base and before.epoch:
            self._check_base(before, config)

    def _check_base(self, before: Config, config: Config) -> None:
        """What is older than the new base is nowhere else (bug B15)."""
        seen = View(tuple(self.chain[e] for e in range(before.base, config.base + 1)))
        for key, register in self.registers.items():
            if key.startswith(CONFIG_KEY) or self._ignored(key) or not register.chosen:
                continue
            eras = seen.eras(key)
            if len(eras) == 1 or min(register.chosen).epoch >= eras[0].first:
                continue
            moved = [
                n
                for n in eras[0].group
                if self.disks.get(n, {}).get(key, EMPTY).accepted.epoch >= eras[0].first
            ]
            if len(moved) < eras[0].majority:
                raise Violation(f"base moves to {config.base}, and {key} has moved to {sorted(moved)} only")

    # -- what nodes do ----------------------------------------------------------------------------

    def durable(self, node: NodeId, written: dict[str, Record], log: list[Vote]) -> None:
        """A commit of `node` is complete."""
        if node in self.void:
            return
        disk = self.disks.setdefault(node, {})
        for key, record in written.items():
            old = disk.get(key, EMPTY)
            if record.promised < old.promised or record.accepted < old.accepted:
                raise Violation(f"I1 {key}: {old} on disk became {record}")
            if record.accepted > record.promised:
                raise Violation(f"I2 {key}: {record}")
            if not key.startswith(CONFIG_KEY) and not self.view(self.epochs.get(node, 0)).serves(node, key):
                raise Violation(f"I7 {node} stores {key}")
        disk.update(written)
        for vote in log:
            self._check_fence(node, vote)
            if isinstance(vote.reply, Accepted) and isinstance(vote.request, Accept):
                self._voted(node, vote.request, vote.before)
            elif isinstance(vote.reply, Promise) and vote.reply.ballot.node == node:
                self.promised(node, vote.reply)

    def _check_fence(self, node: NodeId, vote: Vote) -> None:
        """A node votes in the epoch that it is in, and in no other."""
        m = vote.request
        if m.key.startswith(CONFIG_KEY) or isinstance(m, Read) or isinstance(vote.reply, Nack):
            return
        if m.ballot.epoch != self.epochs.get(node, 0):
            raise Violation(f"fence {m.key}: {node} in epoch {self.epochs.get(node, 0)} votes for {m.ballot}")

    def _voted(self, node: NodeId, m: Accept, before: Record) -> None:
        if self._ignored(m.key):
            return
        if m.fresh:
            again = before.accepted == m.ballot and before.value == m.value
            if before != EMPTY and not again:
                raise Violation(f"I8 {m.key}: fresh {m.ballot} accepted over {before}")
            self._check_fresh(m)
        register = self.register(m.key)
        self._proposed(register, m)
        votes = register.votes.setdefault(m.ballot, {})
        votes[node] = None
        acceptors = self._acceptors(m)
        if m.ballot not in register.chosen and 2 * sum(n in votes for n in acceptors) > len(acceptors):
            self._chosen(register, m)

    def _acceptors(self, m: Accept) -> tuple[NodeId, ...]:
        """Those of whom a majority chooses what `m` proposes."""
        if not m.key.startswith(CONFIG_KEY):
            return group(self.view(m.ballot.epoch).config, key_subject(m.key))
        epoch = int(m.key.removeprefix(CONFIG_KEY))
        return self.chain[epoch - 1].nodes if epoch > 1 else unpack_config(m.value.data or b"").nodes

    def _proposed(self, register: Register, m: Accept) -> None:
        known = register.proposals.get(m.ballot)
        if known is None:
            register.proposals[m.ballot] = m.value
            for ballot, value in register.chosen.items():
                if ballot < m.ballot and not follows(m.value, value):
                    raise Violation(f"I5 {m.key}: {m.ballot} {m.value} ignores chosen {ballot} {value}")
            if m.value.ops and not m.key.startswith(CONFIG_KEY):
                self._check_born(register, m)
        elif known != m.value:
            raise Violation(f"I3 {m.key}: {m.ballot} stands for {known} and for {m.value}")

    def _check_born(self, register: Register, m: Accept) -> None:
        """An operation older than base is not tried."""
        op = m.value.ops[-1].op
        if self.born.get(op, m.ballot.epoch) >= self.view(m.ballot.epoch).base:
            return
        if not any(a.op == op for b, v in register.proposals.items() if b != m.ballot for a in v.ops):
            raise Violation(f"born {m.key}: {m.ballot} applies {op.hex()} of epoch {self.born[op]}")

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
        named = key_epoch(m.key)
        right = m.ballot.round == 0 and m.ballot.epoch == named
        if not right or m.ballot.node != leader(self.view(named).config, m.key):
            raise Violation(f"I8 {m.key}: {m.ballot} may not create")

    # -- what travels -----------------------------------------------------------------------------

    def sent(self, node: NodeId, to: NodeId, m: object) -> None:
        """A message leaves `node`; everything that it had to make durable is on its disk."""
        if isinstance(m, Creates):
            for accept in m.accepts():
                self.sent(node, to, accept)
            return
        if not isinstance(m, Prepare | Accept | Read) or self._ignored(m.key) or node in self.void:
            return
        if m.key.startswith(CONFIG_KEY):
            if isinstance(m, Accept):
                self._sent_config(m)
            return
        epoch = m.epoch if isinstance(m, Read) else m.ballot.epoch
        if epoch < key_epoch(m.key):
            raise Violation(f"I8 {m.key}: a message of epoch {epoch}")
        if isinstance(m, Prepare) and m.ballot.round == 0:
            raise Violation(f"I8 {m.key}: phase 1 at round 0")
        if isinstance(m, Read):
            boot = self.boots.get(node, 0)
            if self.tokens.setdefault((node, m.token), boot) != boot:
                raise Violation(f"token {m.key}: {node} asks with {m.token} again after a restart")
        if not isinstance(m, Accept):
            return
        view = self.view(epoch)
        if to not in view.group(m.key):
            raise Violation(f"I9 {m.key}: {m.ballot} is proposed to {to}, of another epoch's group")
        register = self.register(m.key)
        self._proposed(register, m)
        if m.fresh:
            self._check_fresh(m)
            own = self.disks.get(node, {}).get(m.key, EMPTY)
            moved = self.epochs.get(node, 0) > epoch  # and its record may have gone elsewhere since
            if node not in register.votes.get(m.ballot, ()) or (own.promised < m.ballot and not moved):
                raise Violation(f"I8 {m.key}: {m.ballot} leaves before it is on the own disk")
            return
        promised = register.promises.get(m.ballot, {})
        for era in view.eras(m.key):
            here = [promised[n] for n in era.group if n in promised]
            if len(here) < era.majority:
                raise Violation(f"I4 {m.key}: {m.ballot} is proposed after promises of {sorted(promised)}")
            if max((b.epoch for b in here), default=-1) >= era.first:
                break  # settled in this era

    def _sent_config(self, m: Accept) -> None:
        register = self.register(m.key)
        founding = m.key == f"{CONFIG_KEY}1"
        said_before = m.value in register.proposals.values()
        self._proposed(register, m)
        acceptors = self._acceptors(m)
        promised = register.promises.get(m.ballot, {})
        needed = len(acceptors) if founding and not said_before else len(acceptors) // 2 + 1
        if sum(n in promised for n in acceptors) < needed and not (founding and said_before):
            raise Violation(f"I4 {m.key}: {m.ballot} is proposed after promises of {sorted(promised)}")

    def promised(self, sender: NodeId, m: Promise) -> None:
        """A promise reaches the node that asked for it."""
        self.register(m.key).promises.setdefault(m.ballot, {}).setdefault(sender, m.accepted)

    def told(self, op: Op, outcome: Outcome) -> None:
        """I6: a client learns of an outcome."""
        if isinstance(outcome, Unknown) or self._ignored(op.key):
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
    """Knows the chain, and judges nothing: the clients' histories alone have to show what is wrong."""

    def started(self, node: NodeId, epoch: int, boot: int) -> None:
        pass

    def adopted(
        self, node: NodeId, configs: Sequence[Config], disk: dict[str, Record], dropped: Iterable[str]
    ) -> None:
        for config in configs:
            self.chain.setdefault(config.epoch, config)

    def durable(self, node: NodeId, written: dict[str, Record], log: list[Vote]) -> None:
        pass

    def sent(self, node: NodeId, to: NodeId, m: object) -> None:
        pass

    def told(self, op: Op, outcome: Outcome) -> None:
        pass
