"""One node's part in everything that the mesh agrees on: its votes, its proposals, and the chain.

    register traffic   `receive` hands requests to the acceptor, replies to the proposer
    the chain          who has a newer configuration is asked for it; what needs it waits meanwhile;
                       `propose` decides what follows, `adopt` makes it durable and goes on in it
    settling           after a change of voters, every key that this node holds is read once in the
                       new epoch, which writes it to the new group (CHUNKPAXOS, *base*); when enough
                       nodes have said that they are through, base moves, by a change of its own

Pure but for the `Storage` that it is handed: no clock, no sockets, no chance of its own. The caller
commits `acceptor.dirty` before anything in `outbox`, `replies` or `done` leaves. The same code runs
in the simulator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from vstack.errors import DamagedData
from vstack.mesh.changes import ChangeRefused, MeshChange, MoveBase, leaving, successor, unsettled
from vstack.mesh.config import CONFIG_KEY, GENESIS, Config, NodeId, View
from vstack.mesh.messages import (
    Accept,
    Accepted,
    AnyItem,
    Created,
    Creates,
    Failure,
    Forward,
    Found,
    MeshChanged,
    Op,
    Outcome,
    Prepare,
    Read,
    Record,
    Reply,
    Request,
    Told,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.decree import Decree, Rounds, config_in
from vstack.mesh.paxos.proposer import Proposer, Timing

MAX_HELD = 4096
"""Requests that wait for a configuration."""
HELD_FOR = 2.0
"""Seconds that a request waits for the configuration it was made under."""
FETCH_EVERY = 0.25
"""Seconds between two questions for the chain."""
FETCH_TRIES = 8
"""Questions to one node that it may leave unanswered, until it is heard of again."""
FINISH_AFTER = 2.0
"""Seconds after which the first member brings to its end what it has voted for; then the next one does."""
BEGUN_PATIENCE = 10.0
"""Seconds that a decree has that nobody asked for: of base, or of what somebody else began."""
SETTLE_WINDOW = 256
"""Keys that are being settled at once."""
SETTLE_PAGES = 16
"""Pages of keys that are looked through in one turn."""
SETTLE_PATIENCE = 10.0
"""Seconds that one read has, when settling."""
SECOND_PASS = 0.5
"""Seconds between settling the keys that fall to this node and all others that it holds."""
FORWARD_PATIENCE = 5.0
"""Seconds that an operation has that a rival forwarded."""


class Storage(Protocol):
    """What must survive. Each call is on disk when it returns."""

    def lookup(self, key: str) -> Record | None: ...

    def keys(self, after: str, limit: int) -> Sequence[str]:
        """Keys of registers above `after`, in order; fewer than `limit` only at the end."""

    def subjects(self) -> Iterable[str]:
        """All video ids that occur in keys."""

    def any_between(self, first: str, last: str) -> bool:
        """Whether there is a register with a key from `first` to `last`, both included."""

    def commit(self, records: Mapping[str, Record]) -> None:
        """These, and whatever commit is in flight before them."""

    def adopt(self, configs: Sequence[Config], drop: Iterable[str]) -> None:
        """Stores decided configurations, and deletes the registers of the subjects in `drop`."""


class Settle(NamedTuple):
    """Tag of a read that settles a key."""

    epoch: int
    key: str


class ForwardedBy(NamedTuple):
    """Tag of an operation that another node forwarded."""

    node: NodeId
    key: str
    token: int


@dataclass(slots=True)
class Held:
    reply_to: Hashable
    sender: NodeId
    m: Request | Creates
    until: float


class Replica:
    """See above. `chain` is what storage holds, oldest first; empty before there is a mesh."""

    def __init__(
        self,
        me: NodeId,
        boot: int,
        chain: Sequence[Config],
        storage: Storage,
        rng: Random,
        *,
        timing: Timing | None = None,
        kindness: float = 2.0,
    ) -> None:
        """`kindness`: seconds between settling and moving base, for operations born before."""
        self.me = me
        self.boot = boot
        base = chain[-1].base if chain else 0
        self.view = self.make_view(tuple(c for c in chain if c.epoch >= base) or (GENESIS,))
        self.acceptor = self.make_acceptor(storage)
        self.proposer = self.make_proposer(rng, timing)
        self.settled = 0
        """The newest epoch at which all that this node holds is settled; to be told to everyone."""
        self.statements: dict[NodeId, tuple[int, int]] = {}
        """What other nodes say of themselves: (epoch, settled)."""
        self.replies: list[tuple[Hashable, Reply | Created]] = []
        """Replies to requests, by the `reply_to` they came with. The caller empties it."""
        self.fetch: list[NodeId] = []
        """Who is to be asked for the chain after `view.epoch`. The caller empties it."""
        self.changes: list[tuple[Hashable, MeshChanged | Failure]] = []
        """What became of proposed changes, by their tag. The caller empties it."""
        self.counters = dict.fromkeys(("epochs", "settle_reads", "held", "dropped_subjects", "unlistable"), 0)
        self._storage = storage
        self._rng = rng
        self._kindness = kindness
        self._told: list[tuple[NodeId, Told]] = []
        self._held: list[Held] = []
        self._wanted_from: dict[NodeId, int] = {}
        """Nodes that spoke of an epoch newer than ours, and which."""
        self._unanswered: dict[NodeId, int] = {}
        """Questions to nodes in `_wanted_from` since they last answered."""
        self._so_far: list[Config] = []
        """The beginning of a mesh's chain, before a configuration in it names this node."""
        self._fetch_at = 0.0
        self._rounds = Rounds()
        self._decree: Decree | None = None
        self._made = {c.change: c.epoch for c in chain if c.change}
        """Which epoch each change made, over the whole chain: whoever asks again is told so for ever."""
        self._asked: list[tuple[bytes, float, Hashable]] = []
        """Whose change the decree is about: id, deadline, tag."""
        self._vote_cast = True
        """This node may have accepted a configuration that it does not know to be decided."""
        self._finish_at: float | None = None
        self._base_at: float | None = None
        self._pass = 0
        """The epoch that is being settled."""
        self._mine_first = True
        self._cursor: str | None = ""
        self._pass_from = 0.0
        self._settling: set[str] = set()
        self._again: list[str] = []
        """Keys whose read found no majority."""
        self._news = True
        """Something has happened since the last `tick` that settling or base may have waited for."""

    # Its parts, and the rule of succession. A subclass may make others.

    def make_view(self, chain: tuple[Config, ...]) -> View:
        return View(chain)

    def make_acceptor(self, storage: Storage) -> Acceptor:
        return Acceptor(self.me, self.view, storage.lookup, storage.any_between)

    def make_proposer(self, rng: Random, timing: Timing | None) -> Proposer:
        return Proposer(self.me, self.boot, self.view, self.acceptor, rng, timing)

    def make_decree(self, wish: Config) -> Decree:
        return Decree(self.view.config, wish, self.me, self.boot, self.acceptor, self._rounds, self._rng)

    def successor(self, change: MeshChange, change_id: bytes) -> Config:
        return successor(self.view, change, change_id)

    def unsettled(self) -> dict[int, list[NodeId]]:
        """Why base cannot move, as far as this node has heard: see `changes.unsettled`."""
        return unsettled(self.view, {n: s for n, (_, s) in self.statements.items()})

    # -- traffic ----------------------------------------------------------------------------------

    @property
    def outbox(self) -> list[tuple[NodeId, AnyItem]]:
        """Everything for other nodes since the last call."""
        out: list[tuple[NodeId, AnyItem]] = [*self.proposer.outbox, *self._told]
        self.proposer.outbox, self._told = [], []
        if self._decree is not None:
            out += self._decree.outbox
            self._decree.outbox = []
        return out

    def take_done(self) -> list[tuple[Hashable, Outcome]]:
        """Outcomes of submitted operations since the last call, by their tag."""
        done, self.proposer.done = self.proposer.done, []
        mine: list[tuple[Hashable, Outcome]] = []
        for tag, outcome in done:
            if isinstance(tag, Settle):
                self._on_settled(tag, outcome)
            elif isinstance(tag, ForwardedBy):
                self._told.append((tag.node, Told(tag.key, tag.token, outcome)))
            else:
                mine.append((tag, outcome))
        return mine

    def receive(self, reply_to: Hashable, sender: NodeId, m: AnyItem, now: float) -> None:
        """One item from another node. Its reply, if it has one, appears in `replies` under `reply_to`."""
        if isinstance(m, (Prepare, Accept, Read, Creates)):
            self._on_request(reply_to, sender, m, now)
        elif isinstance(m, Forward):
            if m.op.key == m.key and not m.key.startswith(CONFIG_KEY):
                tag = ForwardedBy(sender, m.key, m.token)
                self.proposer.submit(m.op, now, now + FORWARD_PATIENCE, tag, forwarded=True)
        elif isinstance(m, Told):
            self.proposer.told(m)
        elif isinstance(m, Created):
            self.proposer.created(sender, m, now)
        elif m.key.startswith(CONFIG_KEY):
            if self._decree is not None:
                self._decree.receive(sender, m, now)
                self._conclude(now)
        else:
            self.proposer.receive(sender, m, now)
            self._look_for_epoch(sender)

    def _on_request(self, reply_to: Hashable, sender: NodeId, m: Request | Creates, now: float) -> None:
        epoch = m.epoch if isinstance(m, Read) else m.ballot.epoch
        if epoch > self.view.epoch and not m.key.startswith(CONFIG_KEY):
            self._wanted_from[sender] = max(epoch, self._wanted_from.get(sender, 0))
            if len(self._held) < MAX_HELD:
                self.counters["held"] += 1
                self._held.append(Held(reply_to, sender, m, now + HELD_FOR))
            self._ask_for_chain(now)
            return
        if self.view.epoch > 0 and sender not in self.view.participants:
            return  # it may have been a member once, or be one some day
        if isinstance(m, Creates):
            self.replies += [(reply_to, reply) for reply in self.acceptor.on_creates(m)]
            return
        reply = self.acceptor.receive(m)
        if reply is not None:
            self.replies.append((reply_to, reply))
            if isinstance(reply, Accepted) and m.key.startswith(CONFIG_KEY):
                self._vote_cast = self._news = True

    def _look_for_epoch(self, sender: NodeId) -> None:
        if self.acceptor.epoch_wanted > self.view.epoch:
            self._wanted_from[sender] = max(self.acceptor.epoch_wanted, self._wanted_from.get(sender, 0))
            self.acceptor.epoch_wanted = 0

    def tick(self, now: float) -> None:
        """Does everything that is due."""
        self.proposer.tick(now)
        if self.acceptor.epoch_wanted > self.view.epoch:  # a key of an epoch that nobody told us of
            others = sorted(self.view.participants - {self.me})
            if others:
                self._wanted_from[self._rng.choice(others)] = self.acceptor.epoch_wanted
            self.acceptor.epoch_wanted = 0
        self._ask_for_chain(now)
        if self._held:
            self._held = [h for h in self._held if h.until > now]
        if self._decree is not None:
            self._decree.tick(now)
            self._conclude(now)
            self._expire_changes(now)
        self._news = False
        self._finish(now)
        self._settle(now)
        self._move_base(now)

    def next_wake(self) -> float | None:
        """When `tick` has something to do next; None if nothing is planned."""
        times = [t for t in (self.proposer.next_wake(), self._base_at, self._finish_at) if t is not None]
        if self._news:
            times.append(0.0)
        if self._decree is not None:
            times += [self._decree.next_try, *(deadline for _, deadline, _ in self._asked)]
        if self._wanted_from:
            times.append(self._fetch_at)
        if self._pass and (self._again or (self._cursor is not None and len(self._settling) < SETTLE_WINDOW)):
            times.append(self._pass_from)
        return min(times, default=None)

    # -- the chain --------------------------------------------------------------------------------

    def hear(self, node: NodeId, epoch: int, settled: int) -> None:
        """What `node` says of itself: both are true for ever once they are said."""
        known = self.statements.get(node, (0, 0))
        said = (max(known[0], epoch), max(known[1], settled))
        if said != known:
            self.statements[node] = said
            self._news = True
        if epoch > self.view.epoch:
            self._wanted_from[node] = max(epoch, self._wanted_from.get(node, 0))

    def _ask_for_chain(self, now: float) -> None:
        if not self._wanted_from:
            return
        self._wanted_from = {n: e for n, e in self._wanted_from.items() if e > self.view.epoch}
        if self._wanted_from and now >= self._fetch_at:
            self._fetch_at = now + FETCH_EVERY
            node = self._rng.choice(sorted(self._wanted_from))
            self.fetch.append(node)
            self._unanswered[node] = self._unanswered.get(node, 0) + 1
            if self._unanswered[node] == FETCH_TRIES:  # it may be gone for good
                del self._unanswered[node], self._wanted_from[node]

    def on_chain(self, sender: NodeId, configs: Sequence[Config], now: float) -> list[Config]:
        """The decided chain, or a part of it, as another node has it. Returns what was adopted."""
        self._unanswered.pop(sender, None)
        new = self._so_far
        epoch = self.chain_end
        for config in sorted(configs, key=lambda c: c.epoch):
            if config.epoch == epoch + 1:
                new.append(config)
                epoch += 1
        self._so_far = []
        if self.view.epoch == 0 and not any(c.member(self.me) for c in new):
            # A mesh that this node is not a member of, or the beginning of a chain that comes in parts.
            self._so_far, new = new, []
        if new:
            self.adopt(new, now)
        if self._wanted_from.get(sender, 0) > self.view.epoch:
            # It spoke of an epoch that its chain does not lead to.
            wanted = self._wanted_from.pop(sender)
            self._held = [h for h in self._held if h.sender != sender]
            if not new:
                self.proposer.give_up(wanted)
        return new

    @property
    def chain_end(self) -> int:
        """The epoch up to which the chain is known here, be it adopted or not."""
        return self._so_far[-1].epoch if self._so_far else self.view.epoch

    def adopt(self, configs: Sequence[Config], now: float) -> None:
        """Decided successors of the newest configuration: durable, and in force, when this returns."""
        self._storage.commit(self.acceptor.dirty)  # even if empty: what is in flight must be there to drop
        self.acceptor.committed()
        drop = self.dropped_by(configs)
        self._storage.adopt(configs, drop)
        self.counters["epochs"] += len(configs)
        self.counters["dropped_subjects"] += len(drop)
        for config in configs:
            self.view.adopt(config)
            if config.change:
                self._made[config.change] = config.epoch
        self._base_at = self._finish_at = None
        self._rounds.in_vain, self._rounds.not_before = 0, 0.0
        self._pass = 0
        self._vote_cast = self._news = True
        self.proposer.on_epoch(now)
        self._answer_changes()
        held, self._held = self._held, []
        for h in held:
            self._on_request(h.reply_to, h.sender, h.m, now)

    def dropped_by(self, configs: Sequence[Config]) -> list[str]:
        """Subjects whose registers this node must forget on the way through `configs`: at some point it
        is in no group of base..epoch, and must not come back with old votes (I7, bug B13)."""
        scratch = self.make_view(self.view.chain())
        drop: dict[str, None] = {}
        subjects: list[str] | None = None
        for config in configs:
            base = scratch.base
            scratch.adopt(config)
            if config.base != base or config.lost:
                if subjects is None:
                    subjects = list(self._storage.subjects())
                drop.update((s, None) for s in subjects if not scratch.serves(self.me, f"video/{s}"))
        return list(drop)

    # -- changes ----------------------------------------------------------------------------------

    def propose(
        self, change: MeshChange, change_id: bytes, replaces: int, now: float, deadline: float, tag: Hashable
    ) -> None:
        """Decides a change of the configuration; what became of it appears in `changes` under `tag`."""
        if change_id in self._made:
            self.changes.append((tag, MeshChanged(self._made[change_id])))
            return
        if replaces > self.view.epoch:  # whether it was made is for others to say
            self.acceptor.epoch_wanted = max(self.acceptor.epoch_wanted, replaces)
            self._news = True
            text = f"this node has yet to hear of epoch {replaces}: try again"
            self.changes.append((tag, Failure("late", text)))
            return
        if replaces != self.view.epoch:
            text = f"the change was made for epoch {replaces}, and the mesh is in epoch {self.view.epoch}"
            self.changes.append((tag, Failure("epoch", text)))
            return
        if self._decree is not None:
            if all(change_id != asked for asked, _, _ in self._asked):
                self.changes.append((tag, Failure("busy", "another change is being decided: try again")))
                return
        else:
            try:
                wish = self.successor(change, change_id)
            except ChangeRefused as e:
                self.changes.append((tag, Failure("refused", str(e))))
                return
            self._decree = self.make_decree(wish)
        self._asked.append((change_id, deadline, tag))

    def _conclude(self, now: float) -> None:
        decree = self._decree
        if decree is not None and decree.decided is not None:
            self.adopt([decree.decided], now)

    def _answer_changes(self) -> None:
        """After a new epoch: what was asked for has happened, or something else has."""
        for change_id, _, tag in self._asked:
            if change_id in self._made:
                self.changes.append((tag, MeshChanged(self._made[change_id])))
            else:
                text = f"another change was decided first: the mesh is in epoch {self.view.epoch}"
                self.changes.append((tag, Failure("epoch", text)))
        self._asked = []
        self._decree = None

    def _expire_changes(self, now: float) -> None:
        """Nobody waits any more. What was proposed may still be decided, by whoever tries next."""
        for change_id, deadline, tag in [a for a in self._asked if a[1] <= now]:
            self._asked.remove((change_id, deadline, tag))
            self.changes.append((tag, Failure("late", "no majority of the members answered in time")))
        if not self._asked:
            self._decree = None

    def _finish(self, now: float) -> None:
        """What this node has accepted may be decided, and whoever knew may be gone for good, while nothing
        else can be proposed before it is known: so what was begun is brought to an end."""
        if self._vote_cast:
            self._vote_cast = False
            self._finish_at = None if self._accepted_next() is None else now + self._turn()
        if self._finish_at is None or now < self._finish_at:
            return
        self._finish_at = now + BEGUN_PATIENCE + self._turn()
        wish = self._accepted_next()
        if wish is not None and self._decree is None:
            self._decide(wish, now)

    def _turn(self) -> float:
        """Seconds until it is this node's turn to finish: one member after the other, not all at once."""
        members = sorted(self.view.config.nodes)
        rank = members.index(self.me) if self.me in members else len(members)
        return FINISH_AFTER * (1.0 + min(rank, 8) * self._rng.uniform(0.75, 1.0))

    def _accepted_next(self) -> Config | None:
        """The configuration after this one that this node has accepted."""
        if self.view.epoch == 0:
            return None  # the first one is decided by `Forming`
        try:
            value = self.acceptor.record(f"{CONFIG_KEY}{self.view.epoch + 1}").value
        except DamagedData:
            return None
        return config_in(value, self.view.epoch + 1)

    def _decide(self, wish: Config, now: float) -> None:
        """A decree that nobody waits for."""
        self._decree = self.make_decree(wish)
        self._asked.append((b"", now + BEGUN_PATIENCE, None))
        self._decree.tick(now)
        self._conclude(now)

    # -- settling, and base -----------------------------------------------------------------------

    @property
    def may_leave(self) -> bool:
        """Whether this node is out of the mesh, and nobody needs its votes any more."""
        return (
            self.view.epoch > 0
            and self.me not in self.view.config.nodes
            and self.me not in leaving(self.view)
        )

    def _settle(self, now: float) -> None:
        if self.view.epoch == 0 or self.settled == self.view.epoch:
            return
        if self.view.is_settled():
            self._through()
            return
        if self._pass != self.view.epoch:
            self._pass, self._mine_first = self.view.epoch, True
            self._cursor, self._pass_from = "", now
            self._settling, self._again = set(), []
        again, self._again = self._again, []
        for key in again:
            self._read_once(key, now)
        for _ in range(SETTLE_PAGES):
            if self._cursor is None or len(self._settling) >= SETTLE_WINDOW or now < self._pass_from:
                break
            try:
                page = self._storage.keys(self._cursor, SETTLE_WINDOW)
            except DamagedData:
                # What cannot be listed cannot be said to be settled: others have to do without this node.
                self.counters["unlistable"] = 1
                self._pass_from = now + SETTLE_PATIENCE
                break
            for key in page:
                if key.startswith(CONFIG_KEY) or len(self.view.eras(key)) == 1:
                    continue
                if not self._mine_first or self._falls_to_me(key):
                    self._read_once(key, now)
            self._cursor = page[-1] if len(page) == SETTLE_WINDOW else None
        if self._cursor is None and not self._settling:
            if self._mine_first:
                self._mine_first, self._cursor, self._pass_from = False, "", now + SECOND_PASS
            else:
                self._through()

    def _through(self) -> None:
        self._pass = 0
        self.settled = self.view.epoch
        self.hear(self.me, self.view.epoch, self.settled)

    def _falls_to_me(self, key: str) -> bool:
        """Whether this node is the first old holder of `key` that lives: it moves it, others look later."""
        holders = self.view.eras(key)[1].group
        return next((n for n in holders if n == self.me or self.proposer.is_live(n)), self.me) == self.me

    def _read_once(self, key: str, now: float) -> None:
        self.counters["settle_reads"] += 1
        self._settling.add(key)
        op = Op(self._rng.randbytes(16), key, self.view.epoch)
        tag = Settle(self._pass, key)
        self.proposer.submit(op, now, now + SETTLE_PATIENCE, tag, full_way=self._mine_first)

    def _on_settled(self, tag: Settle, outcome: Outcome) -> None:
        if tag.epoch != self._pass or tag.key not in self._settling:
            return
        self._news = True
        if isinstance(outcome, Found):
            self._settling.discard(tag.key)
        else:
            self._again.append(tag.key)

    def _move_base(self, now: float) -> None:
        if self.view.epoch == 0 or self.view.is_settled() or self._decree is not None or self.unsettled():
            self._base_at = None
            return
        if self._base_at is None:
            live = [n for n in sorted(self.view.participants) if n == self.me or self.proposer.is_live(n)]
            rank = live.index(self.me) if self.me in live else len(live)
            self._base_at = now + self._kindness + rank * self._rng.uniform(0.2, 0.6)
        if now >= self._base_at:
            self._base_at = None
            try:
                wish = self.successor(MoveBase(self.view.epoch), self._rng.randbytes(16))
            except ChangeRefused:
                return
            self._decide(wish, now)
