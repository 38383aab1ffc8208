"""One node's attempts to read and change registers (CHUNKPAXOS, section 4).

Operations on a key wait in a queue; one attempt per key is in flight, and it carries all
operations that waited when it began. An attempt lives and dies in one epoch, and its ballot is
never used for two values (I3): rounds come from one counter of this process, and the ballot's
owner names the process's boot.

Ways through:

  fast create   the implicit leader of a chunk, on an absent record of its own, in the key's own
                epoch: accept on the own disk, then Accept(fresh) to the rest. One round trip.
  run           fast creates that are submitted together, of neighbouring chunks: the same messages for
                all of them in one item (`Creates`, `Created`), while nothing happens to any of them.
                Whatever else happens dissolves it into one attempt for each, which go on from there.
  quorum read   only reads wait: Read to the group; a majority with one ballot is the answer.
  full way      Prepare to the groups of all live eras, then Accept to the newest.

Nothing here is durable. The caller commits the acceptor's `dirty` before anything in `outbox`
or `done` leaves; that is also what puts a fast create on the own disk first.

An operation is never reported as failed when it may have happened: that outcome is Unknown.

Two proposers that keep outbidding each other waste both: after two defeats by the same live rival,
the operations are handed to it (`Forward`), with the same ids, and come back as `Told`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from random import Random

from vstack.errors import DamagedData
from vstack.mesh.config import CHUNKS_A_TURN, INDEX_DIGITS, NodeId, Place, View, key_epoch
from vstack.mesh.messages import (
    ABSENT,
    EMPTY,
    ENVELOPE_BYTES,
    ENVELOPE_ITEMS,
    Accept,
    Accepted,
    Ballot,
    Created,
    Creates,
    Forward,
    Found,
    Nack,
    Op,
    Outcome,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Reply,
    Request,
    Told,
    Unknown,
    Value,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.change import apply

MAX_ROUND = 1 << 40
"""No proposer gets as far: a refusal that names a later round is nonsense, and not to be outbid."""


@dataclass(frozen=True)
class Timing:
    """Seconds. None of these carries safety."""

    resend: float = 0.3
    """Silence after which an Accept is sent again, a Prepare given up, a read taken the full way.
    The least: it grows with the round trips that are measured, and with each attempt in vain."""
    resends: int = 3
    """How often an Accept is sent again before the attempt ends."""
    backoff: float = 1.0
    """Upper bound of the jittered pause after a lost duel."""
    defeats: int = 2
    """Attempts lost to one live rival after which it is asked to do the operations."""
    forwarded: float = 0.5
    """How long to wait for it, before the next attempt of one's own."""
    unheard: float = 0.25
    """How often to look whether the epoch that a key names has been adopted: `on_epoch` looks at once."""


class Phase(Enum):
    READ = "read"
    PREPARE = "prepare"
    ACCEPT = "accept"


@dataclass(slots=True, eq=False)
class Waiting:
    """One operation of a client, and when to stop trying."""

    op: Op
    tag: Hashable
    deadline: float
    forwarded: bool = False
    """It came from a rival, and is not sent on."""
    token: int = 0
    """Of its `Forward`; 0 if it was not sent on. Not the operation's id: when an operation is asked for
    again, a late answer to the first time is from before the second, and may be out of date."""
    done: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    key: str
    ballot: Ballot
    """In the READ phase only its epoch means anything."""
    phase: Phase
    waiting: list[Waiting]
    began: float
    fresh: bool = False
    token: int = 0
    promises: dict[NodeId, Promise] = field(default_factory=dict)
    replies: dict[NodeId, ReadReply] = field(default_factory=dict)
    accepted: set[NodeId] = field(default_factory=set)
    refused: set[NodeId] = field(default_factory=set)
    value: Value = ABSENT
    outcomes: list[Outcome] = field(default_factory=list)
    resent: int = 0


@dataclass(slots=True, eq=False)
class Run:
    """Fast creates under way together. Its keys have no KeyState."""

    sent: Creates
    keys: list[str]
    waiting: list[Waiting]
    outcomes: list[Outcome]
    """In the order of the keys, as are `waiting` and the values."""
    began: float
    until: float
    """When it is not waited for any longer."""
    accepted: set[NodeId] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class KeyState:
    queue: list[Waiting] = field(default_factory=list)
    attempt: Attempt | None = None
    lost: int = 0
    """Attempts that ended without a decision, in a row."""
    silent: int = 0
    """Attempts that nobody answered in time, in a row."""
    paused_until: float = 0.0
    full_way: bool = False
    """A fast create or a quorum read did not settle it: prepare next time."""
    rival: NodeId = ""
    """Who won the last duel."""
    defeats: int = 0
    """Duels lost to it, in a row."""


class Proposer:
    """Pure: `outbox` and `done` leave only after the acceptor's `dirty` is on disk."""

    def __init__(
        self, me: NodeId, boot: int, view: View, acceptor: Acceptor, rng: Random, timing: Timing | None = None
    ) -> None:
        self.me = me
        self.boot = boot
        self.view = view
        self.acceptor = acceptor
        self.timing = timing or Timing()
        self.outbox: list[tuple[NodeId, Request | Forward | Creates]] = []
        """Requests to other nodes. The caller empties it."""
        self.is_live: Callable[[NodeId], bool] = lambda node: True
        """Whether a rival is worth forwarding to. Carries no safety."""
        self.done: list[tuple[Hashable, Outcome]] = []
        """Outcomes by the tag given to `submit`. The caller empties it."""
        self.counters = dict.fromkeys(
            ("fast", "reads", "full", "chosen", "lost", "timeouts", "to_self", "unknown", "forwarded"), 0
        )
        self.in_flight = 0
        """Operations that have no outcome yet."""
        self._rng = rng
        self._round = 0
        self._tokens = count((boot << 40) + 1)
        """Never the token of an earlier process of this node: its replies may still be on their way."""
        self._keys: dict[str, KeyState] = {}
        self._runs: dict[str, Run] = {}
        """By each of their keys."""
        self._due: dict[float, list[tuple[str, Attempt | None]]] = {}
        """What is to be looked at, by when: the operations of a batch have their times in common."""
        self._timers: list[float] = []
        """The times of `_due`, as a heap."""
        self._local: list[tuple[Reply, float]] = []
        self._rtt = 0.005

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
        """Takes one operation; its outcome appears in `done` under `tag` by `deadline` (both in seconds).

        `full_way`: a quick read would find nothing settled, so do not try one.
        """
        run = self._runs.get(op.key)
        if run is not None:
            self._dissolve(run, now)  # it waits for the attempt, as any later operation does
        state = self._keys.setdefault(op.key, KeyState())
        state.full_way |= full_way
        state.queue.append(Waiting(op, tag, deadline, forwarded))
        self.in_flight += 1
        self._at(deadline, op.key, None)
        if state.attempt is None and state.paused_until <= now:
            self._start(op.key, state, now)

    def submit_all(self, ops: Sequence[Op], now: float, deadline: float, tags: Sequence[Hashable]) -> None:
        """As `submit` of each. Creates of neighbouring chunks go together where they can."""
        if len(ops) == 1:
            self.submit(ops[0], now, deadline, tags[0])
            return
        together: dict[str, dict[str, Waiting]] = {}
        alone: list[Waiting] = []
        base = self.view.base
        for op, tag in zip(ops, tags, strict=True):
            w, key = Waiting(op, tag, deadline), op.key
            is_create = op.expect == 0 and op.data is not None and key.startswith("chunk/")
            if is_create and op.born >= base and key not in self._keys and key not in self._runs:
                neighbours = together.setdefault(key[:-INDEX_DIGITS], {})
                if key not in neighbours:
                    neighbours[key] = w
                    continue
            alone.append(w)
        for stem, neighbours in together.items():
            for part in _parts(sorted(neighbours.values(), key=_key_of)):
                if not self._begin_run(stem, part, now):
                    alone += part
        for w in alone:
            self.submit(w.op, now, deadline, w.tag)

    def receive(self, sender: NodeId, m: Reply, now: float) -> None:
        """One reply of an acceptor. What does not match the current attempt is dropped (bug B6)."""
        self._receive(sender, m, now)
        self._drain()

    def created(self, sender: NodeId, m: Created, now: float) -> None:
        """The same, for all of its keys."""
        run = self._runs.get(m.key)
        if run is not None and self._is_whole(run, m):
            if sender in self.view.group(m.key):
                run.accepted.add(sender)
                self._end_run_if_chosen(run)
        else:
            for accepted in m.accepteds():
                self._receive(sender, accepted, now)
        self._drain()

    def told(self, m: Told) -> None:
        """What a rival made of an operation that was forwarded to it."""
        state = self._keys.get(m.key)
        if state is None or isinstance(m.outcome, Unknown):
            return
        for w in (*state.queue, *(state.attempt.waiting if state.attempt else ())):
            if w.token == m.token:
                self._finish(w, m.outcome)
        state.queue = [w for w in state.queue if not w.done]
        self._forget_if_idle(m.key, state)

    def give_up(self, epoch: int) -> None:
        """No chain leads to `epoch`, which some keys name: their operations end, instead of waiting."""
        for key, state in list(self._keys.items()):
            if key_epoch(key) >= epoch and state.attempt is None:
                for w in state.queue:
                    self._finish(w, Unknown(f"no configuration of epoch {epoch} is known"))
                state.queue = []
                self._forget_if_idle(key, state)

    def on_epoch(self, now: float) -> None:
        """The view has a newer epoch: no attempt of an older one goes on (I9)."""
        for run in dict.fromkeys(self._runs.values()):
            self._dissolve(run, now)
        for key, state in self._keys.items():
            if state.attempt is not None:
                state.queue[:0] = [w for w in state.attempt.waiting if not w.done]
                state.attempt = None
            state.full_way = False
            state.lost = 0
            state.defeats = 0  # who won in an older epoch may be in it still: it is not asked (`_forward`)
            state.paused_until = now
            self._at(now, key, None)

    def tick(self, now: float) -> None:
        """Does everything that is due at `now`."""
        while self._timers and self._timers[0] <= now:
            for key, attempt in self._due.pop(heapq.heappop(self._timers)):
                run = self._runs.get(key)
                if run is not None and run.until <= now:
                    self._on_silent_run(run, now)
                state = self._keys.get(key)
                if state is not None:
                    self._on_timer(key, state, attempt, now)
        self._drain()

    def _on_timer(self, key: str, state: KeyState, attempt: Attempt | None, now: float) -> None:
        self._expire(state, now)
        if attempt is not None and state.attempt is attempt:
            self._on_silence(state, attempt, now)
        elif state.attempt is None and state.queue and state.paused_until <= now:
            self._start(key, state, now)
        self._forget_if_idle(key, state)

    def next_wake(self) -> float | None:
        """When `tick` has something to do next."""
        return self._timers[0] if self._timers else None

    # -- runs -------------------------------------------------------------------------------------

    def _begin_run(self, stem: str, creates: list[Waiting], now: float) -> bool:
        """False, and nothing has happened, if these must go one by one. In order of their keys."""
        keys = [w.op.key for w in creates]
        place, epoch = self.view.place(keys[0]), self.view.epoch
        indexes = tuple([int(key[-INDEX_DIGITS:]) for key in keys])
        if len(creates) == 1 or not self._may_create_all(place, indexes):
            return False
        values: list[Value] = []
        outcomes: list[Outcome] = []
        for w in creates:
            value, outcome = apply(w.op, ABSENT, epoch)
            values.append(value)
            outcomes.append(outcome)
        m = Creates(stem, Ballot(epoch, 0, self.me, self.boot), indexes, tuple(values))
        if not self._is_on_own_disk(m):
            return False
        run = Run(m, keys, creates, outcomes, now, min(creates[0].deadline, now + self._patience(KeyState())))
        run.accepted.add(self.me)
        self._runs.update(dict.fromkeys(keys, run))
        self.in_flight += len(keys)
        self.counters["fast"] += len(keys)
        self.counters["to_self"] += 2
        self._at(run.until, keys[0], None)
        self.outbox.extend((node, m) for node in place.group if node != self.me)
        self._end_run_if_chosen(run)
        return True

    def _may_create_all(self, place: Place, indexes: tuple[int, ...]) -> bool:
        """The right to round 0 of each; what the own disk says of it is asked by `_is_on_own_disk`."""
        turns = {i // CHUNKS_A_TURN for i in indexes}
        return place.epoch == self.view.epoch and all(place.leader_of_turn(turn) == self.me for turn in turns)

    def _is_on_own_disk(self, m: Creates) -> bool:
        """The own vote is part of the same commit that the outbox waits for. None of the own records may
        be there before: round 0 is spent only where the own disk remembers it."""
        return self.acceptor.create_all(m) is not None

    def _is_whole(self, run: Run, m: Created) -> bool:
        """Whether `m` accepts all of `run`, in the epoch of which this node is."""
        sent = run.sent
        return m.ballot == sent.ballot and m.indexes == sent.indexes and m.ballot.epoch == self.view.epoch

    def _end_run_if_chosen(self, run: Run) -> None:
        if len(run.accepted) < self.view.place(run.sent.key).majority:
            return
        for key in run.keys:
            del self._runs[key]
        self.counters["chosen"] += len(run.keys)
        for w, outcome in zip(run.waiting, run.outcomes, strict=True):
            self._finish(w, outcome)

    def _dissolve(self, run: Run, now: float) -> list[Attempt]:
        """From here on each create goes its own way: what has been accepted of it stays accepted."""
        attempts: list[Attempt] = []
        for key, w, value, outcome in zip(run.keys, run.waiting, run.sent.values, run.outcomes, strict=True):
            del self._runs[key]
            state = self._keys[key] = KeyState()
            attempt = Attempt(key, run.sent.ballot, Phase.ACCEPT, [w], run.began, fresh=True)
            attempt.accepted |= run.accepted
            attempt.value = value
            attempt.outcomes.append(outcome)
            self._begin(state, attempt, now)
            self._at(w.deadline, key, None)
            attempts.append(attempt)
        return attempts

    def _on_silent_run(self, run: Run, now: float) -> None:
        for attempt in self._dissolve(run, now):
            state = self._keys[attempt.key]
            self._expire(state, now)
            self._on_silence(state, attempt, now)
            self._forget_if_idle(attempt.key, state)

    # -- attempts ---------------------------------------------------------------------------------

    def _start(self, key: str, state: KeyState, now: float) -> None:
        self._expire(state, now)
        waiting, state.queue = state.queue, []
        for w in [w for w in waiting if w.op.born < self.view.base and w.op.expect is not None]:
            self._finish(
                w, Unknown(f"the operation is older than epoch {self.view.base}, the oldest still open")
            )
        waiting = [w for w in waiting if not w.done]
        if not waiting:
            return
        if self._is_unheard_of(key):
            self.acceptor.epoch_wanted = max(self.acceptor.epoch_wanted, key_epoch(key))
            state.queue[:0] = waiting
            state.paused_until = now + self.timing.unheard
            self._at(state.paused_until, key, None)
            return
        epoch = self.view.epoch
        if not state.full_way and all(w.op.expect is None for w in waiting):
            self.counters["reads"] += 1
            ballot = Ballot(epoch, 0, self.me, self.boot)
            attempt = Attempt(key, ballot, Phase.READ, waiting, now, token=next(self._tokens))
            self._begin(state, attempt, now)
            self._send(self.view.group(key), Read(key, epoch, attempt.token), now)
        elif not state.full_way and self._may_create(key, waiting):
            self.counters["fast"] += 1
            ballot = Ballot(epoch, 0, self.me, self.boot)
            attempt = Attempt(key, ballot, Phase.ACCEPT, waiting, now, fresh=True)
            self._begin(state, attempt, now)
            self._propose(attempt, ABSENT, now)
        else:
            self.counters["full"] += 1
            self._round = max(self._round, self._own_round(key)) + 1
            attempt = Attempt(
                key, Ballot(epoch, self._round, self.me, self.boot), Phase.PREPARE, waiting, now
            )
            self._begin(state, attempt, now)
            self._send(self.view.place(key).everyone, Prepare(key, attempt.ballot), now)
        self._drain()

    def _is_unheard_of(self, key: str) -> bool:
        """Whether the key's upload was opened in an epoch that this node has to adopt first."""
        return self.view.place(key).epoch > self.view.epoch

    def _may_create(self, key: str, waiting: list[Waiting]) -> bool:
        """The right to round 0: see *fast create* above. Asked of the own disk, so a restart remembers."""
        if waiting[0].op.expect != 0 or waiting[0].op.data is None:
            return False
        place = self.view.place(key)
        if place.epoch != self.view.epoch or place.leader(key) != self.me:
            return False
        try:
            return self.acceptor.record(key) == EMPTY
        except DamagedData:
            return False

    def _own_round(self, key: str) -> int:
        try:
            return self.acceptor.record(key).promised.round if self.view.serves(self.me, key) else 0
        except DamagedData:
            return 0

    def _begin(self, state: KeyState, attempt: Attempt, now: float) -> None:
        state.attempt = attempt
        self._at(now + self._patience(state), attempt.key, attempt)

    def _patience(self, state: KeyState) -> float:
        """A fixed bound would never end an operation where round trips and commits are slower than it."""
        return max(self.timing.resend, 4 * self._rtt) * (1 << min(state.silent, 4))

    def _propose(self, attempt: Attempt, base: Value, now: float) -> None:
        """Phase 2: the value of this ballot is fixed here, once (I3)."""
        assert attempt.phase is Phase.ACCEPT
        value = base
        for w in attempt.waiting:
            value, outcome = apply(w.op, value, attempt.ballot.epoch)
            attempt.outcomes.append(outcome)
        attempt.value = value
        self._send(
            self.view.group(attempt.key), Accept(attempt.key, attempt.ballot, value, attempt.fresh), now
        )

    def _receive(self, sender: NodeId, m: Reply, now: float) -> None:
        run = self._runs.get(m.key)
        if run is not None and isinstance(m, (Accepted, Nack)) and m.ballot == run.sent.ballot:
            self._dissolve(run, now)
        state = self._keys.get(m.key)
        attempt = state.attempt if state else None
        if state is None or attempt is None or attempt.ballot.epoch != self.view.epoch:
            return
        if isinstance(m, ReadReply):
            if attempt.phase is Phase.READ and m.token == attempt.token:
                self._on_read_reply(state, attempt, sender, m, now)
        elif m.ballot != attempt.ballot or attempt.phase is Phase.READ:
            return
        elif isinstance(m, Promise):
            if attempt.phase is Phase.PREPARE:
                attempt.promises[sender] = m
                self._on_promises(attempt, now)
        elif isinstance(m, Accepted):
            if attempt.phase is Phase.ACCEPT:
                self._on_accepted(state, attempt, sender, now)
        elif isinstance(m, Nack):
            self._on_nack(state, attempt, sender, m, now)

    def _on_promises(self, attempt: Attempt, now: float) -> None:
        for era in self.view.eras(attempt.key):  # newest first
            here = [attempt.promises[n] for n in era.group if n in attempt.promises]
            if len(here) < era.majority:
                return
            if max((p.accepted.epoch for p in here), default=-1) >= era.first:
                break  # settled in this era: older ones have nothing newer
        best = max(attempt.promises.values(), key=lambda p: p.accepted)
        self._rtt += (now - attempt.began - self._rtt) / 8
        attempt.phase = Phase.ACCEPT
        self._propose(attempt, best.value, now)

    def _on_accepted(self, state: KeyState, attempt: Attempt, sender: NodeId, now: float) -> None:
        place = self.view.place(attempt.key)
        if sender not in place.group:
            return
        attempt.accepted.add(sender)
        if len(attempt.accepted) < place.majority:
            return
        self.counters["chosen"] += 1
        for w, outcome in zip(attempt.waiting, attempt.outcomes, strict=True):
            self._finish(w, outcome)
        self._end(state, attempt, now)

    def _on_read_reply(
        self, state: KeyState, attempt: Attempt, sender: NodeId, m: ReadReply, now: float
    ) -> None:
        if m.epoch > self.view.epoch:
            self.acceptor.epoch_wanted = max(self.acceptor.epoch_wanted, m.epoch)
            self._lose(state, attempt, now)
            return
        eras = self.view.eras(attempt.key)
        if sender not in eras[0].group or m.epoch < self.view.epoch:
            return
        attempt.replies[sender] = m
        same = [r for r in attempt.replies.values() if r.accepted == m.accepted]
        if len(same) >= eras[0].majority and (len(eras) == 1 or m.accepted.epoch >= eras[0].first):
            for w in attempt.waiting:
                self._finish(w, Found(m.value.version, m.value.data))
            self._end(state, attempt, now)
        elif len(same) >= eras[0].majority or len(attempt.replies) == len(eras[0].group):
            # An older era's ballot, or a mixed quorum, settles nothing: never the highest of it (bug B7).
            state.full_way = True
            self._retry(state, attempt, now)

    def _on_nack(self, state: KeyState, attempt: Attempt, sender: NodeId, m: Nack, now: float) -> None:
        if m.seen == attempt.ballot and m.epoch == attempt.ballot.epoch:
            return  # a late copy of this attempt's own Prepare: the sender has accepted since
        if m.seen.round < MAX_ROUND:
            self._round = max(self._round, m.seen.round)
        if m.epoch > self.view.epoch:
            self.acceptor.epoch_wanted = max(self.acceptor.epoch_wanted, m.epoch)
        attempt.refused.add(sender)
        majority_gone = any(
            len(set(era.group) - attempt.refused) < era.majority for era in self.view.eras(attempt.key)
        )
        if attempt.fresh:
            state.full_way = True
            self._retry(state, attempt, now)
        elif m.seen > attempt.ballot or m.epoch > self.view.epoch or majority_gone:
            if m.seen > attempt.ballot and m.seen.node != self.me:
                state.defeats = state.defeats + 1 if m.seen.node == state.rival else 1
                state.rival = m.seen.node
            self._lose(state, attempt, now)

    def _on_silence(self, state: KeyState, attempt: Attempt, now: float) -> None:
        same_epoch = attempt.ballot.epoch == self.view.epoch  # I9: never to the group of another one
        if attempt.phase is Phase.ACCEPT and same_epoch and attempt.resent < self.timing.resends:
            attempt.resent += 1
            missing = tuple(n for n in self.view.group(attempt.key) if n not in attempt.accepted)
            self._at(now + self.timing.resend * 2**attempt.resent, attempt.key, attempt)
            self._send(missing, Accept(attempt.key, attempt.ballot, attempt.value, attempt.fresh), now)
            return
        self.counters["timeouts"] += 1
        state.silent += 1
        state.full_way = True
        self._lose(state, attempt, now)

    # -- endings ----------------------------------------------------------------------------------

    def _end(self, state: KeyState, attempt: Attempt, now: float) -> None:
        """Decided. What waited meanwhile gets its own attempt."""
        state.attempt = None
        state.lost = 0
        state.silent = 0
        state.defeats = 0
        state.full_way = False
        if state.queue:
            self._at(now, attempt.key, None)
        else:
            self._forget_if_idle(attempt.key, state)

    def _retry(self, state: KeyState, attempt: Attempt, now: float) -> None:
        """Not lost to a rival: the same operations at once, another way."""
        state.attempt = None
        state.queue[:0] = [w for w in attempt.waiting if not w.done]
        self._at(now, attempt.key, None)

    def _lose(self, state: KeyState, attempt: Attempt, now: float) -> None:
        self.counters["lost"] += 1
        state.attempt = None
        state.lost += 1
        self._pause(attempt.key, state, [w for w in attempt.waiting if not w.done], now)
        if state.defeats >= self.timing.defeats and self.is_live(state.rival):
            self._forward(attempt.key, state, now)

    def _forward(self, key: str, state: KeyState, now: float) -> None:
        """Instead of the next duel. What is not answered in time is tried here again."""
        ours = [w for w in state.queue if not w.forwarded]
        if not ours:
            return
        state.defeats = 0
        self.counters["forwarded"] += len(ours)
        for w in ours:
            w.token = w.token or next(self._tokens)
            self.outbox.append((state.rival, Forward(key, w.op, w.token)))
        state.paused_until = now + self.timing.forwarded + 4 * self._rtt
        self._at(state.paused_until, key, None)

    def _pause(self, key: str, state: KeyState, waiting: list[Waiting], now: float) -> None:
        """Full jitter (CHUNKPAXOS, *Duels*)."""
        state.queue[:0] = waiting
        ceiling = min(self.timing.backoff, 2 * self._rtt * 2 ** min(state.lost, 16))
        state.paused_until = now + self._rng.uniform(0, ceiling)
        self._at(state.paused_until, key, None)

    def _expire(self, state: KeyState, now: float) -> None:
        late = [w for w in state.queue if w.deadline <= now]
        if state.attempt is not None:
            late += [w for w in state.attempt.waiting if w.deadline <= now]
        for w in late:
            self._finish(w, Unknown("no majority answered in time"))
        state.queue = [w for w in state.queue if not w.done]

    def _finish(self, w: Waiting, outcome: Outcome) -> None:
        if not w.done:
            w.done = True
            self.in_flight -= 1
            self.counters["unknown"] += isinstance(outcome, Unknown)
            self.done.append((w.tag, outcome))

    def _forget_if_idle(self, key: str, state: KeyState) -> None:
        attempt = state.attempt
        if attempt is not None and all(w.done for w in attempt.waiting):
            state.attempt = attempt = None
            if state.queue:  # it must not wait for a timer of the attempt that nobody waits for
                self._at(0.0, key, None)
        if attempt is None and not state.queue and self._keys.get(key) is state:
            del self._keys[key]

    # -- sending ----------------------------------------------------------------------------------

    def _send(self, nodes: tuple[NodeId, ...], m: Request, now: float) -> None:
        """To others through the outbox; to the own acceptor directly, and first: its vote is part of
        the same commit that everything in the outbox waits for."""
        if self.me in nodes:
            self.counters["to_self"] += 1
            reply = self.acceptor.receive(m)
            if reply is not None:
                self.counters["to_self"] += 1
                self._local.append((reply, now))
            if isinstance(m, Accept) and m.fresh and not isinstance(reply, Accepted):
                return  # round 0 is spent only where the own disk remembers it
        self.outbox.extend((node, m) for node in nodes if node != self.me)

    def _drain(self) -> None:
        """The own acceptor's replies. What they lead to may add to them; it never comes back here."""
        while self._local:
            reply, now = self._local.pop(0)
            self._receive(self.me, reply, now)

    def _at(self, when: float, key: str, attempt: Attempt | None) -> None:
        due = self._due.get(when)
        if due is None:
            due = self._due[when] = []
            heapq.heappush(self._timers, when)
        due.append((key, attempt))


def _key_of(w: Waiting) -> str:
    return w.op.key


def _parts(creates: Iterable[Waiting]) -> Iterable[list[Waiting]]:
    """Cut so that each part fits one item."""
    part: list[Waiting] = []
    size = 0
    for w in creates:
        bulk = len(w.op.data or b"")
        if part and (len(part) == ENVELOPE_ITEMS or size + bulk > ENVELOPE_BYTES):
            yield part
            part, size = [], 0
        part.append(w)
        size += bulk
    if part:
        yield part
