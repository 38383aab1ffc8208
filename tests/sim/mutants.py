"""Variants of the core that are wrong on purpose, each in one way.

They keep the checkers honest: each must be caught, by the seeds of its profile. The names with
a B are the bugs that others shipped (CHUNKPAXOS, section 8); the rest break one rule each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import msgspec

from vstack.errors import DamagedData
from vstack.mesh.changes import ChangeRefused, MeshChange, successor
from vstack.mesh.config import (
    CHUNKS_A_TURN,
    CONFIG_KEY,
    Config,
    Era,
    NodeId,
    Place,
    View,
    key_epoch,
    unpack_config,
)
from vstack.mesh.forming import Forming
from vstack.mesh.messages import (
    ABSENT,
    EMPTY,
    ZERO,
    Accept,
    Accepted,
    Creates,
    Found,
    Mismatch,
    Nack,
    Op,
    Outcome,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Record,
    Reply,
    Request,
    Told,
    Unknown,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.change import apply
from vstack.mesh.paxos.decree import Decree, Rounds
from vstack.mesh.paxos.proposer import Attempt, KeyState, Phase, Proposer, Run, Timing, Waiting
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


class ForwardsShareAToken(Proposer):
    """A late answer to the first time that an operation was asked for counts for the second."""

    def _forward(self, key: str, state: KeyState, now: float) -> None:
        self._name(state)
        super()._forward(key, state, now)

    def told(self, m: Told) -> None:
        if (state := self._keys.get(m.key)) is not None:
            self._name(state)
        super().told(m)

    @staticmethod
    def _name(state: KeyState) -> None:
        for w in (*state.queue, *(state.attempt.waiting if state.attempt else ())):
            w.token = int.from_bytes(w.op.id[4:8] + w.op.id[12:16]) | 1 << 62


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


# -- runs of fast creates ---------------------------------------------------------------------------


class RunOverwrites(Acceptor):
    def _all_absent(self, keys: list[str]) -> bool:
        return True


class RunIgnoresWhatIsNotOnDiskYet(Acceptor):
    """Looks at the disk only, and not at what this very batch has changed."""

    def _all_absent(self, keys: list[str]) -> bool:
        return not self._any_between(keys[0], keys[-1])


class RunIgnoresLeader(Acceptor):
    def _may_create_all(self, m: Creates) -> bool:
        place = self.view.place(m.key)
        return m.ballot.epoch == self.view.epoch == place.epoch and self.me in place.everyone


class EveryoneRuns(Proposer):
    def _may_create_all(self, place: Place, indexes: tuple[int, ...]) -> bool:
        return place.epoch == self.view.epoch


class RunOfFirstLeader(Proposer):
    """Takes the leader of the first chunk for that of all."""

    def _may_create_all(self, place: Place, indexes: tuple[int, ...]) -> bool:
        return super()._may_create_all(place, indexes[:1])


class RunIgnoresFence(Acceptor):
    def _may_create_all(self, m: Creates) -> bool:
        place = self.view.place(m.key)
        return m.ballot.epoch == place.epoch and self.me in place.everyone


class RunInAnyEpoch(Acceptor):
    def _may_create_all(self, m: Creates) -> bool:
        place = self.view.place(m.key)
        return m.ballot.epoch == self.view.epoch and self.me in place.everyone


class RunsLate(Proposer):
    """The leader of the keys' epoch creates them in a later one."""

    def _may_create_all(self, place: Place, indexes: tuple[int, ...]) -> bool:
        turns = {i // CHUNKS_A_TURN for i in indexes}
        mine = all(place.leader_of_turn(turn) == self.me for turn in turns)
        return mine and place.epoch <= self.view.epoch and self.me in place.group


class RunLeavesOwnDiskOut(Proposer):
    def _is_on_own_disk(self, m: Creates) -> bool:
        return True


class OneVoteLessForARun(Proposer):
    def _end_run_if_chosen(self, run: Run) -> None:
        run.accepted.add("nobody")
        super()._end_run_if_chosen(run)


class DissolvedIsAccepted(Proposer):
    """When a run comes to nothing, all to whom it was sent count as having accepted it."""

    def _dissolve(self, run: Run, now: float) -> list[Attempt]:
        run.accepted |= set(self.view.group(run.sent.key))
        return super()._dissolve(run, now)


class DissolvedWithAnotherValue(Proposer):
    """What waits behind a run that comes to nothing joins its ballot."""

    def _dissolve(self, run: Run, now: float) -> list[Attempt]:
        attempts = super()._dissolve(run, now)
        for attempt in attempts:
            op = attempt.waiting[0].op
            again = msgspec.structs.replace(op, expect=attempt.value.version, id=op.id[::-1])
            attempt.value, _ = apply(again, attempt.value, attempt.ballot.epoch)
        return attempts


# -- epochs: acceptors and proposers ------------------------------------------------------------------


class NoFence(Acceptor):
    """Goes on voting in epochs that are over."""

    def receive(self, m: Request) -> Reply | None:
        epoch = m.epoch if isinstance(m, Read) else m.ballot.epoch
        old = key_epoch(m.key) <= epoch < self.view.epoch and not m.key.startswith(CONFIG_KEY)
        if old and self.view.serves(self.me, m.key):
            if isinstance(m, Prepare):
                return self.on_prepare(m)
            if isinstance(m, Accept):
                return self.on_accept(m)
        return super().receive(m)


class VotesInAnyEpoch(Acceptor):
    def receive(self, m: Request) -> Reply | None:
        if isinstance(m, Prepare):
            return self.on_prepare(m)
        if isinstance(m, Accept):
            return self.on_accept(m)
        return super().receive(m)


class CreatesInAnyEpoch(Acceptor):
    def _may_create(self, m: Accept) -> bool:
        return m.ballot.node == self.view.leader(m.key)


class CreatesLate(Proposer):
    """The leader of the key's epoch creates it in a later one."""

    def _may_create(self, key: str, waiting: list[Waiting]) -> bool:
        op = waiting[0].op
        mine = self.view.leader(key) == self.me and self.me in self.view.group(key)
        return mine and op.expect == 0 and op.data is not None and self.acceptor.record(key) == EMPTY


class KeysOfTheFuture(Proposer):
    """Reads and writes keys of an epoch that it has not heard of, in the groups that it knows."""

    def _is_unheard_of(self, key: str) -> bool:
        return False


class AttemptsGoOn(Proposer):
    """An attempt that began in one epoch ends in the next."""

    def on_epoch(self, now: float) -> None:
        pass

    def _receive(self, sender: NodeId, m: Reply, now: float) -> None:
        state = self._keys.get(m.key)
        attempt = state.attempt if state else None
        if state is None or attempt is None or attempt.phase is Phase.READ:
            super()._receive(sender, m, now)
        elif not isinstance(m, ReadReply) and m.ballot == attempt.ballot:
            if isinstance(m, Promise) and attempt.phase is Phase.PREPARE:
                attempt.promises[sender] = m
                self._on_promises(attempt, now)
            elif isinstance(m, Accepted) and attempt.phase is Phase.ACCEPT:
                self._on_accepted(state, attempt, sender, now)
            elif isinstance(m, Nack):
                self._on_nack(state, attempt, sender, m, now)


class OldestEraCounts(Proposer):
    """Votes are counted in the group of the oldest open epoch."""

    def _on_accepted(self, state: KeyState, attempt: Attempt, sender: NodeId, now: float) -> None:
        oldest = self.view.eras(attempt.key)[-1]
        attempt.accepted.add(sender)
        if len(attempt.accepted & set(oldest.group)) >= oldest.majority:
            attempt.accepted |= set(self.view.group(attempt.key))
            super()._on_accepted(state, attempt, self.view.group(attempt.key)[0], now)


class NewestEraPromises(Proposer):
    """Older groups are not asked what they hold."""

    def _on_promises(self, attempt: Attempt, now: float) -> None:
        newest = self.view.eras(attempt.key)[0]
        here = [p for n, p in attempt.promises.items() if n in newest.group]
        if len(here) >= newest.majority:
            attempt.phase = Phase.ACCEPT
            self._propose(attempt, max(here, key=lambda p: p.accepted).value, now)


class OlderEraRead(Proposer):
    """Takes a majority's ballot of an older era for the answer."""

    def _on_read_reply(
        self, state: KeyState, attempt: Attempt, sender: NodeId, m: ReadReply, now: float
    ) -> None:
        newest = self.view.eras(attempt.key)[0]
        attempt.replies[sender] = m
        same = [r for n, r in attempt.replies.items() if r.accepted == m.accepted and n in newest.group]
        if len(same) >= newest.majority and m.epoch == self.view.epoch:
            for w in attempt.waiting:
                self._finish(w, Found(m.value.version, m.value.data))
            self._end(state, attempt, now)
        else:
            super()._on_read_reply(state, attempt, sender, m, now)


class OldOperationsAreTried(Proposer):
    def submit(
        self,
        op: Op,
        now: float,
        deadline: float,
        tag: Hashable,
        *,
        forwarded: bool = False,
        full_way: bool = False,
    ) -> None:
        timeless = msgspec.structs.replace(op, born=1 << 40)
        super().submit(timeless, now, deadline, tag, forwarded=forwarded, full_way=full_way)


class PrunesAtQuorum(Proposer):
    """What is decided needs no votes any more, it thinks."""

    def _end(self, state: KeyState, attempt: Attempt, now: float) -> None:
        super()._end(state, attempt, now)
        if attempt.phase is Phase.ACCEPT and self.me in self.view.group(attempt.key):
            self.acceptor.dirty[attempt.key] = EMPTY


# -- epochs: groups -----------------------------------------------------------------------------------


class ErasAsSet(View):
    """A, B, A becomes A, B: what B decided is skipped."""

    def eras(self, key: str) -> tuple[Era, ...]:
        merged: dict[tuple[NodeId, ...], Era] = {}
        for era in super().eras(key):
            known = merged.get(era.group)
            merged[era.group] = era if known is None else known._replace(first=era.first)
        return tuple(merged.values())


class MergesEras(Replica):
    def make_view(self, chain: tuple[Config, ...]) -> View:
        return ErasAsSet(chain)


class LocalView(View):
    """Each node finds itself the best acceptor, as one does with weights that were measured."""

    me: NodeId = ""

    def eras(self, key: str) -> tuple[Era, ...]:
        newest, *older = super().eras(key)
        if self.me in self.config.voters and self.me not in newest.group:
            newest = newest._replace(group=(self.me, *newest.group[:-1]))
        return (newest, *older)


class PrefersItself(Replica):
    def make_view(self, chain: tuple[Config, ...]) -> View:
        view = LocalView(chain)
        view.me = self.me
        return view


# -- epochs: the chain, settling, base ----------------------------------------------------------------


class AnswersUnknownEpochs(Replica):
    def _on_request(self, reply_to: Hashable, sender: NodeId, m: Request | Creates, now: float) -> None:
        for request in m.accepts() if isinstance(m, Creates) else [m]:
            self._answer(reply_to, request)

    def _answer(self, reply_to: Hashable, m: Request) -> None:
        reply = self.acceptor.receive(m)
        if reply is not None:
            self.replies.append((reply_to, reply))


class HastyDecree(Decree):
    def receive(self, sender: NodeId, m: Reply, now: float) -> None:
        super().receive(sender, m, now)
        if isinstance(m, Accepted) and m.ballot == self._ballot and self._proposal is not None:
            self.decided = unpack_config(self._proposal.data or b"")


class ActsOnAccepted(Replica):
    """One vote for a configuration, and it is in force."""

    def make_decree(self, wish: Config) -> Decree:
        return HastyDecree(self.view.config, wish, self.me, self.boot, self.acceptor, self._rounds, self._rng)


class ForgetfulDecree(Decree):
    def tick(self, now: float) -> None:
        self._acceptor, real = Acceptor(self._me, self._acceptor.view, lambda _: None), self._acceptor
        waits = self.decided is not None or now < self.next_try
        if not waits:
            self._floor = 0
        send, self._send = self._send, lambda m, now: None  # type: ignore[method-assign]
        super().tick(now)
        self._acceptor = real
        del self._send
        if not waits:
            send(Prepare(self._key, self._ballot), now)


class RoundsStartOverForChanges(Replica):
    """Each wish counts its ballots from one."""

    def make_decree(self, wish: Config) -> Decree:
        self._rounds = Rounds()
        return ForgetfulDecree(
            self.view.config, wish, self.me, self.boot, self.acceptor, self._rounds, self._rng
        )


class ReplacesNotChecked(Replica):
    def propose(
        self, change: MeshChange, change_id: bytes, replaces: int, now: float, deadline: float, tag: Hashable
    ) -> None:
        super().propose(change, change_id, self.view.epoch, now, deadline, tag)


class BaseJumps(Replica):
    """A change of members forgets the old groups at once."""

    def successor(self, change: MeshChange, change_id: bytes) -> Config:
        config = super().successor(change, change_id)
        return msgspec.structs.replace(config, base=config.epoch)


class Forgiving(Replica):
    """Does not see why a change should wait for others."""

    forgives = ""

    def successor(self, change: MeshChange, change_id: bytes) -> Config:
        try:
            return super().successor(change, change_id)
        except ChangeRefused as refused:
            if self.forgives not in str(refused):
                raise
            config = successor(View((self.view.config,)), change, change_id)
            return msgspec.structs.replace(config, base=self.view.base)


class ManyLeave(Forgiving):
    forgives = "still moving"


class ManyOpen(Forgiving):
    forgives = "under way"


class ForgetsNobody(Replica):
    """Comes back with the votes that it had before it left a group."""

    def dropped_by(self, configs: Sequence[Config]) -> list[str]:
        return []


class IgnoresCutOff(Replica):
    """Does not wait for old voters that nobody hears of."""

    def unsettled(self) -> dict[int, list[NodeId]]:
        live = {
            epoch: [n for n in missing if n == self.me or self.proposer.is_live(n)]
            for epoch, missing in super().unsettled().items()
        }
        return {epoch: missing for epoch, missing in live.items() if missing}


class OneTooFew(Replica):
    """One old voter less than it takes has settled what it holds."""

    def unsettled(self) -> dict[int, list[NodeId]]:
        allowed = {c.epoch: (c.g - 1) // 2 + 1 for c in self.view.chain()}
        return {e: missing for e, missing in super().unsettled().items() if len(missing) > allowed[e]}


class SettledBeforeListing(Replica):
    def _settle(self, now: float) -> None:
        if self.view.epoch and self.settled != self.view.epoch:
            self._through()


class SettledBeforeAdopting(Replica):
    """Says that it has settled an epoch of which it has only heard."""

    def hear(self, node: NodeId, epoch: int, settled: int) -> None:
        super().hear(node, epoch, settled)
        if epoch > self.view.epoch > 0 and node != self.me:
            self.settled = max(self.settled, epoch)
            super().hear(self.me, epoch, epoch)


class MajorityFounds(Forming):
    """Begins when most of the list has answered."""

    def waiting_for(self) -> list[str]:
        return [] if 2 * len(self._met) > len(self.addresses) else super().waiting_for()

    def tick(self, now: float) -> None:
        everybody, self.addresses = self.addresses, tuple(a for a in self.addresses if a in self._met)
        super().tick(now)
        self.addresses = everybody

    def _everyone(self) -> tuple[NodeId, ...]:
        return tuple(self._met[a].node for a in self.addresses if a in self._met)

    def _first_config(self) -> Value:
        everybody, self.addresses = self.addresses, tuple(a for a in self.addresses if a in self._met)
        value = super()._first_config()
        self.addresses = everybody
        return value


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
        Variant("forwards-share-a-token", proposer=ForwardsShareAToken),
        Variant("everyone-creates", AnyoneMayCreate, EveryoneCreates),
        Variant("others-vote-first", proposer=OthersVoteFirst),
        Variant("B9-pruned-at-quorum", proposer=PrunesAtQuorum),
        Variant("B10-groups-change-without-their-state", replica=BaseJumps),
        Variant("B11-one-key-is-rescanned", keys_listed=1),
        Variant("B13-zombie-keeps-its-votes", replica=ForgetsNobody),
        Variant("B14-votes-of-another-epochs-group", proposer=OldestEraCounts),
        Variant("B14-promises-of-the-newest-group-only", proposer=NewestEraPromises),
        Variant("B15-base-passes-who-is-cut-off", replica=IgnoresCutOff),
        Variant("B15-one-settled-node-too-few", replica=OneTooFew),
        Variant("B15-settled-before-listing", replica=SettledBeforeListing),
        Variant("B15-settled-before-adopting", replica=SettledBeforeAdopting),
        Variant("B16-eras-are-a-set", replica=MergesEras),
        Variant("B17-snapshot-votes", snapshots_vote=True),
        Variant("B17-identity-outlives-the-votes", wiped_keeps_name=True),
        Variant("B18-commits-are-dropped", drops_commits=0.02),
        Variant("B19-two-groups-in-one-epoch", replica=PrefersItself),
        Variant("run-overwrites", RunOverwrites),
        Variant("run-ignores-what-is-not-on-disk-yet", RunIgnoresWhatIsNotOnDiskYet),
        Variant("run-ignores-leader", RunIgnoresLeader, EveryoneRuns),
        Variant("run-of-first-leader", RunIgnoresLeader, RunOfFirstLeader),
        Variant("run-ignores-fence", RunIgnoresFence),
        Variant("run-in-a-later-epoch", RunInAnyEpoch, RunsLate),
        Variant("run-leaves-own-disk-out", proposer=RunLeavesOwnDiskOut),
        Variant("one-vote-less-for-a-run", proposer=OneVoteLessForARun),
        Variant("dissolved-run-is-accepted", proposer=DissolvedIsAccepted),
        Variant("dissolved-run-has-another-value", proposer=DissolvedWithAnotherValue),
        Variant("no-fence", NoFence),
        Variant("unknown-epochs-are-answered", VotesInAnyEpoch, replica=AnswersUnknownEpochs),
        Variant("epochs-in-memory", adopts_in_memory=True),
        Variant("create-in-a-later-epoch", CreatesInAnyEpoch, CreatesLate),
        Variant("keys-of-the-future", proposer=KeysOfTheFuture),
        Variant("attempts-go-on", proposer=AttemptsGoOn),
        Variant("older-era-is-read", proposer=OlderEraRead),
        Variant("old-operations-are-tried", proposer=OldOperationsAreTried),
        Variant("accepted-is-decided", replica=ActsOnAccepted),
        Variant("rounds-of-changes-start-over", replica=RoundsStartOverForChanges),
        Variant("changes-of-another-epoch", replica=ReplacesNotChecked),
        Variant("many-leave-at-once", replica=ManyLeave, leaves_early=True),
        Variant("switched-off-early", leaves_early=True),
        Variant("too-many-open", replica=ManyOpen),
        Variant("a-majority-founds", forming=MajorityFounds),
    )
}
