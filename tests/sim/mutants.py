"""Variants of the core that are wrong on purpose, each in one way.

They keep the checkers honest: each must be caught, by the seeds of its profile. The names with
a B are the bugs that others shipped (CHUNKPAXOS, section 8); the rest break one rule each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random

import msgspec

from vstack.errors import DamagedData
from vstack.mesh.config import NodeId, View
from vstack.mesh.forming import Forming
from vstack.mesh.messages import (
    ABSENT,
    EMPTY,
    ZERO,
    Accept,
    Accepted,
    Found,
    Mismatch,
    Nack,
    Op,
    Outcome,
    Prepare,
    Promise,
    ReadReply,
    Record,
    Reply,
    Request,
    Unknown,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.change import apply
from vstack.mesh.paxos.proposer import Attempt, KeyState, Phase, Proposer, Timing, Waiting
from vstack.mesh.paxos.replica import Replica


@dataclass(frozen=True)
class Variant:
    """One build of the core, and how its node treats the disk."""

    name: str
    acceptor: type[Acceptor] = Acceptor
    proposer: type[Proposer] = Proposer
    replies_before_sync: bool = False
    requests_before_sync: bool = False
    boot_counts: bool = True
    survives: Callable[[Record], Record] | None = None
    """What a crash leaves of each record on disk; all of it if None."""
    replica: type[Replica] = Replica
    forming: type[Forming] = Forming
    adopts_in_memory: bool = False
    drops_commits: float = 0.0
    """The probability that a commit never reaches the disk."""
    keys_listed: int = 1 << 30
    """How many keys a listing gives."""
    snapshots_vote: bool = False
    """Nobody minds a boot that goes backwards."""
    wiped_keeps_name: bool = False
    """The identity does not go with the vote store."""
    leaves_early: bool = False
    """A removed node is switched off at once."""


REAL = Variant("none")

# -- acceptors --------------------------------------------------------------------------------------


class AcceptKeepsPromise(Acceptor):
    def _write(self, key: str, old: Record, new: Record) -> None:
        promised = old.promised if new.accepted != old.accepted else new.promised
        self.dirty[key] = Record(promised, new.accepted, new.value)


class PrepareIgnoresAccepted(AcceptKeepsPromise):
    def on_prepare(self, m: Prepare) -> Reply:
        record = self.record(m.key)
        if m.ballot < record.promised:
            return self._nack(m.key, m.ballot, record)
        self._write(m.key, record, Record(m.ballot, record.accepted, record.value))
        return Promise(m.key, m.ballot, record.accepted, record.value)


class PromiseHidesValue(Acceptor):
    def on_prepare(self, m: Prepare) -> Reply:
        reply = super().on_prepare(m)
        return Promise(m.key, m.ballot, ZERO, ABSENT) if isinstance(reply, Promise) else reply


class AcceptIgnoresPromise(Acceptor):
    def on_accept(self, m: Accept) -> Reply:
        record = self.record(m.key)
        if record.accepted < m.ballot < record.promised:
            self.dirty[m.key] = Record(record.promised, m.ballot, m.value)
            return Accepted(m.key, m.ballot)
        return super().on_accept(m)


class FreshIgnoresPromise(Acceptor):
    def on_accept(self, m: Accept) -> Reply:
        record = self.record(m.key)
        if m.fresh and record.accepted == ZERO and record.promised > m.ballot:
            self.dirty[m.key] = Record(record.promised, m.ballot, m.value)
            return Accepted(m.key, m.ballot)
        return super().on_accept(m)


class FreshOverwrites(Acceptor):
    def on_accept(self, m: Accept) -> Reply:
        if m.fresh and self._may_create(m):
            self.dirty[m.key] = Record(m.ballot, m.ballot, m.value)
            return Accepted(m.key, m.ballot)
        return super().on_accept(m)


class AnyoneMayCreate(Acceptor):
    def _may_create(self, m: Accept) -> bool:
        return True


class DamagedIsAbsent(Acceptor):
    def record(self, key: str) -> Record:
        try:
            return super().record(key)
        except DamagedData:
            return EMPTY


# -- proposers: ballots and quorums -----------------------------------------------------------------


class NewValueUnderOldBallot(Proposer):
    def _on_silence(self, state: KeyState, attempt: Attempt, now: float) -> None:
        if attempt.phase is Phase.ACCEPT:
            for w in state.queue:
                attempt.value, outcome = apply(w.op, attempt.value, attempt.ballot.epoch)
                attempt.outcomes.append(outcome)
                attempt.waiting.append(w)
            state.queue = []
        super()._on_silence(state, attempt, now)


class BallotsWithoutOwner(Proposer):
    def _begin(self, state: KeyState, attempt: Attempt, now: float) -> None:
        if attempt.phase is Phase.PREPARE:
            attempt.ballot = attempt.ballot._replace(node="", boot=0)
        super()._begin(state, attempt, now)


class RoundsStartOver(Proposer):
    """Does not ask its own disk which rounds were used. Its tokens are sound."""

    def __init__(
        self, me: NodeId, boot: int, view: View, acceptor: Acceptor, rng: Random, timing: Timing | None = None
    ) -> None:
        super().__init__(me, boot, view, acceptor, rng, timing)
        self._tokens = count(rng.getrandbits(60))

    def _own_round(self, key: str) -> int:
        return 0


class TokensStartOver(Proposer):
    """A read's token names no process, so replies to an earlier process count."""

    def __init__(
        self, me: NodeId, boot: int, view: View, acceptor: Acceptor, rng: Random, timing: Timing | None = None
    ) -> None:
        super().__init__(me, boot, view, acceptor, rng, timing)
        self._tokens = count(1)


class OldPromisesCount(Proposer):
    def _receive(self, sender: NodeId, m: Reply, now: float) -> None:
        state = self._keys.get(m.key)
        attempt = state.attempt if state else None
        if isinstance(m, Promise) and attempt is not None and m.ballot < attempt.ballot:
            m = msgspec.structs.replace(m, ballot=attempt.ballot)
        super()._receive(sender, m, now)


class OldVotesCount(Proposer):
    def _receive(self, sender: NodeId, m: Reply, now: float) -> None:
        state = self._keys.get(m.key)
        attempt = state.attempt if state else None
        if isinstance(m, Accepted) and attempt is not None:
            m = Accepted(m.key, attempt.ballot)
        super()._receive(sender, m, now)


class RefusalsCountAsPromises(Proposer):
    def _receive(self, sender: NodeId, m: Reply, now: float) -> None:
        state = self._keys.get(m.key)
        attempt = state.attempt if state else None
        if isinstance(m, Nack) and attempt is not None and attempt.phase is Phase.PREPARE:
            m = Promise(m.key, m.ballot, ZERO, ABSENT)
        super()._receive(sender, m, now)


class OnePromiseLess(Proposer):
    def _on_promises(self, attempt: Attempt, now: float) -> None:
        if len(attempt.promises) >= self.view.eras(attempt.key)[0].majority - 1:
            best = max(attempt.promises.values(), key=lambda p: p.accepted)
            attempt.phase = Phase.ACCEPT
            self._propose(attempt, best.value, now)


class AnyPromisedValue(Proposer):
    """Takes the value of the promise that came last, not that of the highest ballot."""

    def _on_promises(self, attempt: Attempt, now: float) -> None:
        if len(attempt.promises) >= self.view.eras(attempt.key)[0].majority:
            attempt.phase = Phase.ACCEPT
            self._propose(attempt, list(attempt.promises.values())[-1].value, now)


class OneVoteLess(Proposer):
    def _on_accepted(self, state: KeyState, attempt: Attempt, sender: NodeId, now: float) -> None:
        if len(attempt.accepted) + 1 == self.view.eras(attempt.key)[0].majority - 1:
            attempt.accepted.add("nobody")
        super()._on_accepted(state, attempt, sender, now)


class FailedRoundIsCleanedUp(Proposer):
    def _lose(self, state: KeyState, attempt: Attempt, now: float) -> None:
        if attempt.phase is Phase.ACCEPT and self.me in attempt.accepted:
            self.acceptor.dirty[attempt.key] = Record(self.acceptor.record(attempt.key).promised)
        super()._lose(state, attempt, now)


# -- proposers: reads and outcomes ------------------------------------------------------------------


class HighestOfMixedQuorum(Proposer):
    def _on_read_reply(
        self, state: KeyState, attempt: Attempt, sender: NodeId, m: ReadReply, now: float
    ) -> None:
        attempt.replies[sender] = m
        if len(attempt.replies) >= self.view.eras(attempt.key)[0].majority:
            best = max(attempt.replies.values(), key=lambda r: r.accepted).value
            for w in attempt.waiting:
                self._finish(w, Found(best.version, best.data))
            self._end(state, attempt, now)


class FirstReplyIsTheAnswer(Proposer):
    def _on_read_reply(
        self, state: KeyState, attempt: Attempt, sender: NodeId, m: ReadReply, now: float
    ) -> None:
        for w in attempt.waiting:
            self._finish(w, Found(m.value.version, m.value.data))
        self._end(state, attempt, now)


class MismatchWithoutDecision(Proposer):
    def _propose(self, attempt: Attempt, base: Value, now: float) -> None:
        for w in attempt.waiting:
            outcome = apply(w.op, base, attempt.ballot.epoch)[1]
            if isinstance(outcome, Mismatch):
                self._finish(w, outcome)
        super()._propose(attempt, base, now)


class GivingUpIsFailure(Proposer):
    def _finish(self, w: Waiting, outcome: Outcome) -> None:
        if isinstance(outcome, Unknown) and w.op.expect is not None:
            outcome = Mismatch(0, None) if w.op.expect else Mismatch(1, None)
        super()._finish(w, outcome)


class PatienceStandsStill(Proposer):
    """Where round trips take longer than this, nothing ever ends."""

    def _patience(self, state: KeyState) -> float:
        return self.timing.resend


class Changing(Proposer):
    """Another change function."""

    def change(self, op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
        raise NotImplementedError

    def _propose(self, attempt: Attempt, base: Value, now: float) -> None:
        for w in attempt.waiting:
            base, outcome = self.change(w.op, base, attempt.ballot.epoch)
            attempt.outcomes.append(outcome)
        attempt.value = base
        m = Accept(attempt.key, attempt.ballot, base, attempt.fresh)
        self._send(self.view.group(attempt.key), m, now)


class NoOperationIds(Changing):
    def change(self, op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
        return apply(msgspec.structs.replace(op, id=b""), value, epoch)


class VersionIsNotCompared(Changing):
    """A compare-and-swap tried again after others changed the register applies once more."""

    def change(self, op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
        if op.expect and value.version > op.expect:
            op = msgspec.structs.replace(op, expect=value.version)
        return apply(op, value, epoch)


class DeleteStartsOver(Changing):
    def change(self, op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
        after, outcome = apply(op, value, epoch)
        gone = after is not value and after.data is None
        return (ABSENT if gone else after), outcome


class VersionsStandStill(Changing):
    def change(self, op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
        after, outcome = apply(op, value, epoch)
        if after is not value and value.version:
            return msgspec.structs.replace(after, version=value.version), outcome
        return after, outcome


class ForgottenEvidenceIsMismatch(Changing):
    def change(self, op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
        after, outcome = apply(op, value, epoch)
        return after, Mismatch(value.version, value.data) if isinstance(outcome, Unknown) else outcome


# -- proposers: fast create -------------------------------------------------------------------------


class EveryoneCreates(Proposer):
    def _may_create(self, key: str, waiting: list[Waiting]) -> bool:
        op = waiting[0].op
        return op.expect == 0 and op.data is not None and self.acceptor.record(key) == EMPTY


class OthersVoteFirst(Proposer):
    """A fast create leaves the own disk out."""

    def _send(self, nodes: tuple[NodeId, ...], m: Request, now: float) -> None:
        if isinstance(m, Accept) and m.fresh:
            nodes = tuple(n for n in nodes if n != self.me)
        super()._send(nodes, m, now)


class RestartForgetsRoundZero(Proposer):
    """Creates although its own record says that round 0 was spent."""

    def _may_create(self, key: str, waiting: list[Waiting]) -> bool:
        op = waiting[0].op
        return self.view.leader(key) == self.me and op.expect == 0 and op.data is not None


def _without_promise(record: Record) -> Record:
    return Record(record.accepted, record.accepted, record.value)


MUTANTS = {
    v.name: v
    for v in (
        Variant("B1-new-value-under-old-ballot", proposer=NewValueUnderOldBallot),
        Variant("B2-accept-keeps-promise", AcceptKeepsPromise),
        Variant("B2-prepare-ignores-accepted", PrepareIgnoresAccepted),
        Variant("B3-replies-before-sync", replies_before_sync=True),
        Variant("B3-requests-before-sync", requests_before_sync=True),
        Variant("B3-promises-in-memory", survives=_without_promise),
        Variant("B3-votes-in-memory", survives=lambda _: EMPTY),
        Variant("B4-ballots-without-owner", proposer=BallotsWithoutOwner),
        Variant("B5-boot-stands-still", boot_counts=False),
        Variant("B5-boot-and-rounds-start-over", proposer=RoundsStartOver, boot_counts=False),
        Variant("B5-tokens-start-over", proposer=TokensStartOver),
        Variant("B6-old-promises-count", proposer=OldPromisesCount),
        Variant("B7-highest-of-mixed-quorum", proposer=HighestOfMixedQuorum),
        Variant("B7-mismatch-without-decision", proposer=MismatchWithoutDecision),
        Variant("B8-no-operation-ids", proposer=NoOperationIds),
        Variant("B8-version-is-not-compared", proposer=VersionIsNotCompared),
        Variant("B12-failed-round-is-cleaned-up", proposer=FailedRoundIsCleanedUp),
        Variant("B13-delete-starts-over", proposer=DeleteStartsOver),
        Variant("promise-hides-value", PromiseHidesValue),
        Variant("accept-ignores-promise", AcceptIgnoresPromise),
        Variant("fresh-ignores-promise", FreshIgnoresPromise),
        Variant("fresh-overwrites", FreshOverwrites, RestartForgetsRoundZero),
        Variant("damaged-is-absent", DamagedIsAbsent),
        Variant("old-votes-count", proposer=OldVotesCount),
        Variant("refusals-count-as-promises", proposer=RefusalsCountAsPromises),
        Variant("one-promise-less", proposer=OnePromiseLess),
        Variant("any-promised-value", proposer=AnyPromisedValue),
        Variant("one-vote-less", proposer=OneVoteLess),
        Variant("first-reply-is-the-answer", proposer=FirstReplyIsTheAnswer),
        Variant("giving-up-is-failure", proposer=GivingUpIsFailure),
        Variant("versions-stand-still", proposer=VersionsStandStill),
        Variant("forgotten-evidence-is-mismatch", proposer=ForgottenEvidenceIsMismatch),
        Variant("patience-stands-still", proposer=PatienceStandsStill),
        Variant("everyone-creates", AnyoneMayCreate, EveryoneCreates),
        Variant("others-vote-first", proposer=OthersVoteFirst),
    )
}
