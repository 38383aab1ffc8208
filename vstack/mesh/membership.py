"""Who of the members is alive, and what they say of themselves: gossip, with no coordinator.

Pure: no sockets, no clock, no randomness of its own. The caller calls `tick` when `next_wake` says
so, hands in what arrives, and empties `outbox` and `changes`.

Who *is* a member comes from the decided configurations alone (`set_members`); gossip only says how
the members do. Consensus never rests on it.

How it works (SWIM: Das, Gupta, Motivala 2002; Lifeguard: Dadgar, Phillips, Currey 2018):

  probe      Once a period a node pings one member: all in turn, in an order that is shuffled at the
             end of each round. No answer in time: a few others are asked to ping it (PingRequest).
             Still nothing: it is *suspect*.
  statement  What is known of a member is one `Statement`. Two of them about the same member join into
             one, in any order and any number of times (`join`), so gossip may lose and repeat them.
  gossip     Statements ride on pings and answers. News go first, each a number of times that grows
             with log(n); the sender's own statement always rides along, and so do a few others in
             turn, which repairs what the news did not reach. Who is told less than it knows answers
             with what it knows. After a change of the configuration everybody has news at once, and
             most of what is sent is known already: then a ping carries some of the statements that
             are behind, and the answer brings just these.
  suspicion  A suspect that does not object in time is *down*. The time shrinks as others suspect it
             too, independently. To object, a member raises its incarnation: only itself can do so.
  slow       A member that answers, but late, several probes in a row. It says so of itself for a
             while before it objects, so that a slow link does not make the gossip flap.
  health     A node whose probes fail while its helpers are silent too, or that has to object, is
             probably the one in trouble: it waits longer before it says anything of others. Time in
             which the node itself did not run counts against nobody.
  down       Members that are down are still probed now and then, so a healed partition is noticed.

Per node and second, probes, messages and their sizes do not depend on the size of the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from math import ceil, log, log2, log10
from random import Random

import msgspec

from vstack.mesh.config import NodeId
from vstack.mesh.messages import MAX_UPDATES, Ping, PingRequest, Pong, State, Statement

STATEMENT_BYTES = 61
"""The most that one statement takes on the wire."""
REFRESH = 2
"""Statements in each message that are no news, taken in turn."""
MAX_ASKED = 20
"""Statements in a ping that are there to be answered with newer ones."""
MAX_HEALTH = 8
"""How far a node in trouble slows down (Lifeguard's S)."""
MAX_RELAYS = 256
"""Pings under way on behalf of others."""
MAX_INCARNATION = (1 << 63) - 1

Message = Ping | Pong | PingRequest


def join(a: Statement, b: Statement) -> Statement:
    """The one statement that both amount to. Commutative, associative and idempotent.

    A newer boot replaces everything. Within a boot the newer incarnation decides the state, equal
    ones the higher rank, and epoch and settled only rise. `by` is no part of it.
    """
    if a.boot != b.boot:
        newer = a if a.boot > b.boot else b
        return msgspec.structs.replace(newer, by=0) if newer.by else newer
    x, y = (a.incarnation, a.state), (b.incarnation, b.state)
    incarnation, state = max(x, y)
    epoch, settled = max(a.epoch, b.epoch), max(a.settled, b.settled)
    for s, rank in ((a, x), (b, y)):
        if (rank, s.epoch, s.settled, s.by) == ((incarnation, state), epoch, settled, 0):
            return s
    return Statement(a.node, a.boot, incarnation, state, epoch, settled)


@dataclass(frozen=True)
class Timing:
    """Seconds, unless it says otherwise. The values of Lifeguard and memberlist where those have one."""

    period: float = 0.5
    """Between two probes."""
    timeout: float = 0.3
    """For a direct answer; up to twice as much for a member whose round trips are known to need it."""
    helpers: int = 3
    """Others that are asked to ping a silent member."""
    suspicion: float = 5.0
    """Periods until a suspect that all suspect is down, times log10 of the members."""
    patience: float = 6.0
    """How many times longer it takes where nobody else suspects it."""
    confirmations: int = 3
    """Others who must suspect it too for the shortest time."""
    retransmit: int = 2
    """Each piece of news is sent this many times log2 of the members."""
    late: int = 3
    """Late answers in a row that make a member slow."""
    unusual: float = 5.0
    """A round trip this many times the usual one is late, if it is over a third of the timeout."""
    slow: float = 20.0
    """Periods that a member stays slow before it objects."""
    down_every: int = 10
    """One probe in so many goes to a member that is down."""


@dataclass(slots=True, eq=False)
class Peer:
    """Another member, as this node knows it."""

    id: bytes
    node: NodeId
    statement: Statement
    heard: float = float("-inf")
    """When anything last came from it."""
    rtt: float | None = None
    """Smoothed round trip of direct probes, and its mean deviation (Jacobson)."""
    deviation: float = 0.0
    late: int = 0
    """Late answers in a row."""
    sent: int = -1
    """How often its statement was sent on as news; -1 when it is none any more."""


@dataclass(slots=True, eq=False)
class Probe:
    target: Peer
    sent: float
    timeout: float
    patience: float
    """Until it has failed."""
    helpers: set[bytes] | None = None
    """Who was asked; None before that."""
    silent: set[bytes] = field(default_factory=set)
    """Helpers that have not answered at all."""


@dataclass(slots=True, eq=False)
class Relay:
    """A ping on behalf of another member."""

    requester: Peer
    sequence: int
    target: Peer
    deadline: float


@dataclass(slots=True, eq=False)
class Suspicion:
    peer: Peer
    began: float
    accusers: dict[int, None]
    """Who suspects it at first hand, as far as known."""


class Gossip:
    """One node's view of how the members do. Times are of one monotonic clock, in seconds."""

    def __init__(self, me: NodeId, boot: int, rng: Random, now: float, timing: Timing | None = None) -> None:
        self.me = me
        self.timing = timing or Timing()
        self.outbox: list[tuple[NodeId, Message]] = []
        """What to send. The caller empties it. A lost message is no harm."""
        self.changes: list[tuple[NodeId, State, State]] = []
        """(member, state before, state now), in order. The caller empties it."""
        self.health = 0
        """0 is well; the probes of a node in trouble take up to 1 + MAX_HEALTH times as long."""
        self.newest: tuple[int, NodeId] = (0, me)
        """The highest epoch that any member says it has adopted, and who: there its chain is found."""
        self.counters = dict.fromkeys(
            ("probes", "indirect", "relayed", "late", "suspicions", "downs", "refutations", "updates"), 0
        )
        self._rng = rng
        self._id = bytes.fromhex(me)
        self._own = Statement(self._id, boot)
        self._slow_until = float("inf")
        """When this node objects to being slow."""
        self._peers: dict[bytes, Peer] = {}
        self._behind: dict[bytes, None] = {}
        """Members of whom it is not known that they have adopted and settled the newest epoch, in the
        order in which they are asked for."""
        self._down: dict[bytes, None] = {}
        """In the order in which they are probed."""
        self._ring: list[Peer] = []
        self._next = 0
        self._refresh = 0
        """Places in the ring: whom to probe next, whose statement to repeat next."""
        self._again: dict[bytes, None] = {}
        """Who is probed before its turn."""
        self._turns = 0
        self._ran = now
        """When anything was last handed in."""
        self._probe_at = now + rng.uniform(0, self.timing.period)
        self._sequence = rng.getrandbits(32)
        self._probes: dict[int, Probe] = {}
        self._relays: dict[int, Relay] = {}
        self._suspicions: dict[bytes, Suspicion] = {}
        self._news: list[dict[bytes, None]] = []
        """News by how often they were sent."""
        self.set_members((me,))

    # -- what the caller knows --------------------------------------------------------------------

    def set_members(self, nodes: Sequence[NodeId]) -> None:
        """Who there is, by the newest decided configuration. What is known of those who stay, stays."""
        ids = {bytes.fromhex(n): n for n in nodes if n != self.me}
        for gone in [i for i in self._peers if i not in ids]:
            del self._peers[gone]
        for id_, node in ids.items():
            if id_ not in self._peers:
                self._peers[id_] = Peer(id_, node, Statement(id_))
        self._down = {i: None for i, p in self._peers.items() if p.statement.state is State.DOWN}
        self._again = {i: None for i in self._again if i in ids}
        self._probes = {s: p for s, p in self._probes.items() if p.target.id in ids}
        self._relays = {s: r for s, r in self._relays.items() if {r.requester.id, r.target.id} <= ids.keys()}
        self._suspicions = {i: s for i, s in self._suspicions.items() if i in ids}
        news = [i for bucket in self._news for i in bucket if i in ids]
        rounds = self.timing.retransmit * ceil(log2(len(ids) + 2))
        self._news = [{} for _ in range(rounds)]
        for id_ in news:
            peer = self._peers[id_]
            peer.sent = min(peer.sent, rounds - 1)
            self._news[peer.sent][id_] = None
        self._shuffle()
        self._find_behind()

    def say(self, epoch: int, settled: int) -> None:
        """This node has durably adopted `epoch`, and settled all its registers at `settled`.

        Raises ValueError if one of them is lower than before: both only rise.
        """
        own = self._own
        if epoch < own.epoch or settled < own.settled:
            raise ValueError(f"said ({own.epoch}, {own.settled}) before, and now ({epoch}, {settled})")
        if (epoch, settled) != (own.epoch, own.settled):
            self._own = msgspec.structs.replace(
                own, incarnation=own.incarnation + 1, epoch=epoch, settled=settled
            )
            self._on_epoch(epoch, self.me)

    def heard(self, node: NodeId, now: float) -> None:
        """Any message of `node` counts as life; of somebody who is no member it counts for nothing."""
        if (peer := self._peer(node)) is not None:
            self._heard(peer, now)

    # -- what the caller asks ---------------------------------------------------------------------

    def state(self, node: NodeId) -> State:
        """Of a member of which nothing was heard yet: UP. Raises KeyError if it is no member."""
        return self.statement(node).state

    def statement(self, node: NodeId) -> Statement:
        """Raises KeyError if it is no member."""
        return self._own if node == self.me else self._peers[bytes.fromhex(node)].statement

    def rtt(self, node: NodeId) -> float | None:
        """Smoothed round trip to another member in seconds; None if none was measured."""
        peer = self._peer(node)
        return None if peer is None else peer.rtt

    def backlog(self) -> int:
        """Of how many members there are news to pass on."""
        return sum(map(len, self._news))

    def next_wake(self) -> float:
        """When `tick` has something to do next."""
        at = min(self._probe_at, self._slow_until) if self._peers else self._slow_until
        for probe in self._probes.values():
            at = min(at, probe.sent + (probe.timeout if probe.helpers is None else probe.patience))
        for relay in self._relays.values():
            at = min(at, relay.deadline)
        for suspicion in self._suspicions.values():
            at = min(at, suspicion.began + self._suspicion_time(suspicion))
        return at

    # -- events -----------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Does everything that is due at `now`."""
        self._excuse_own_absence(now)
        for sequence, relay in list(self._relays.items()):
            if relay.deadline <= now:
                del self._relays[sequence]
                self._answer(relay.requester, relay.sequence, reached=False)
        for sequence, probe in list(self._probes.items()):
            if probe.helpers is None and probe.sent + probe.timeout <= now:
                self._ask_helpers(sequence, probe)
            if probe.sent + probe.patience <= now:
                del self._probes[sequence]
                self._judge(probe, now)
        for suspicion in list(self._suspicions.values()):
            self._expire(suspicion, now)
        if self._slow_until <= now:
            self._object(self._own.incarnation, State.UP)
        if self._probe_at <= now and self._peers:
            self._probe_at = now + self.timing.period * (1 + self.health)
            self._probe(now)

    def on_ping(self, sender: NodeId, m: Ping, now: float) -> None:
        """Answers at once. Whoever is no member learns this node's own statement, and nothing is
        taken from it: one of the two may be behind in the chain."""
        self._excuse_own_absence(now)
        peer = self._peer(sender)
        if peer is None:
            self.outbox.append((sender, Pong(m.sequence, (self._own,))))
            return
        self._heard(peer, now)
        stale = self._take(m.updates, now)
        self._answer(peer, m.sequence, stale=stale, said=m.updates)

    def on_ping_request(self, sender: NodeId, m: PingRequest, now: float) -> None:
        """Pings the target on behalf of the sender."""
        self._excuse_own_absence(now)
        peer = self._peer(sender)
        if peer is None:
            return
        self._heard(peer, now)
        stale = self._take(m.updates, now)
        target = self._peers.get(m.target)
        if m.target == self._id:
            self._answer(peer, m.sequence, stale=stale, said=m.updates)
        elif target is not None and len(self._relays) < MAX_RELAYS:
            self.counters["relayed"] += 1
            sequence = self._ping(target)
            self._relays[sequence] = Relay(peer, m.sequence, target, now + self._timeout(target))

    def on_ack(self, sender: NodeId, m: Pong, now: float) -> None:
        """An answer to a ping, or of a helper."""
        self._excuse_own_absence(now)
        peer = self._peer(sender)
        if peer is None:
            return
        self._heard(peer, now)
        self._take(m.updates, now)
        relay = self._relays.get(m.sequence)
        if relay is not None and relay.target is peer:
            del self._relays[m.sequence]
            self._answer(relay.requester, relay.sequence)
        probe = self._probes.get(m.sequence)
        if probe is None:
            return
        if probe.target is peer:
            del self._probes[m.sequence]
            self._on_direct_answer(probe, now)
        elif probe.helpers is not None and peer.id in probe.helpers:
            probe.silent.discard(peer.id)
            if m.reached:
                del self._probes[m.sequence]
                self._on_late_answer(probe.target)

    # -- probing ----------------------------------------------------------------------------------

    def _probe(self, now: float) -> None:
        target = self._whom_to_probe()
        if target is None:
            return
        self.counters["probes"] += 1
        timeout = self._timeout(target)
        self._probes[self._ping(target)] = Probe(target, now, timeout, 3 * timeout)

    def _whom_to_probe(self) -> Peer | None:
        """Members before their turn at most every second time: nobody waits for more than two rounds."""
        self._turns += 1
        if self._again and self._turns % 2:
            id_ = next(iter(self._again))
            del self._again[id_]
            return self._peers[id_]
        alive = len(self._down) < len(self._peers)
        if self._down and (not alive or self._turns % self.timing.down_every == 0):
            id_ = next(iter(self._down))
            del self._down[id_]
            self._down[id_] = None
            return self._peers[id_]
        while alive:
            if self._next == len(self._ring):
                self._shuffle()
            target = self._ring[self._next]
            self._next += 1
            if target.statement.state is not State.DOWN:
                return target
        return None

    def _shuffle(self) -> None:
        self._ring = list(self._peers.values())
        self._rng.shuffle(self._ring)
        self._next = 0

    def _timeout(self, target: Peer) -> float:
        """For a direct answer."""
        least = self.timing.timeout
        usual = 0.0 if target.rtt is None else target.rtt + 4 * target.deviation
        return max(least, min(2 * least, usual)) * (1 + self.health)

    def _ask_helpers(self, sequence: int, probe: Probe) -> None:
        """No direct answer in time. Members that are down are only pinged."""
        probe.helpers = set()
        if probe.target.statement.state is State.DOWN:
            return
        wanted = self.timing.helpers
        drawn = self._rng.sample(self._ring, min(len(self._ring), 3 * wanted))
        able = [p for p in drawn if p is not probe.target and p.statement.state <= State.SLOW]
        for helper in able[:wanted]:
            probe.helpers.add(helper.id)
            self.counters["indirect"] += 1
            request = PingRequest(sequence, probe.target.id, self._updates(helper))
            self.outbox.append((helper.node, request))
        probe.silent = set(probe.helpers)

    def _judge(self, probe: Probe, now: float) -> None:
        """Nobody has reached the target."""
        target = probe.target
        if target.statement.state is State.DOWN:
            return
        if target.heard >= probe.sent:
            self._on_late_answer(target)
            return
        self._feel(len(probe.silent) if probe.helpers else 1)
        if target.statement.state is not State.SUSPECT:
            self.counters["suspicions"] += 1
            self._believe(target, msgspec.structs.replace(target.statement, state=State.SUSPECT))
        self._accuse(target, int.from_bytes(self._id[:4]), now)

    def _on_direct_answer(self, probe: Probe, now: float) -> None:
        peer, rtt = probe.target, now - probe.sent
        usual = peer.rtt
        unusual = usual is not None and rtt > max(self.timing.unusual * usual, self.timing.timeout / 3)
        if usual is None:
            peer.rtt, peer.deviation = rtt, rtt / 2
        else:
            rtt = min(rtt, 2 * usual)  # what is unusual does not become the usual at once
            peer.deviation += (abs(rtt - usual) - peer.deviation) / 4
            peer.rtt = usual + (rtt - usual) / 8
        if probe.helpers is not None or unusual:
            self._on_late_answer(peer)
        else:
            self._feel(-1)
            peer.late = 0

    def _on_late_answer(self, peer: Peer) -> None:
        """It lives. A few in a row make it slow, unless it is this node that is."""
        self.counters["late"] += 1
        if self.health or peer.statement.state is not State.UP:
            return
        peer.late += 1
        if peer.late < self.timing.late:
            self._again[peer.id] = None
        else:
            peer.late = 0
            self._believe(peer, msgspec.structs.replace(peer.statement, state=State.SLOW))

    def _feel(self, worse: int) -> None:
        self.health = max(0, min(MAX_HEALTH, self.health + worse))

    def _heard(self, peer: Peer, now: float) -> None:
        peer.heard = now
        if peer.id in self._down:  # it does not know yet, or it would object
            self._again[peer.id] = None

    def _excuse_own_absence(self, now: float) -> None:
        """This node did not run for a while: what the others did meanwhile, it could not see."""
        absent, self._ran = now - self._ran, now
        if now - self.next_wake() <= self.timing.timeout:
            return
        self._probe_at += absent
        self._slow_until += absent
        for probe in self._probes.values():
            probe.sent += absent
        for relay in self._relays.values():
            relay.deadline += absent
        for suspicion in self._suspicions.values():
            suspicion.began += absent

    # -- what is known ----------------------------------------------------------------------------

    def _peer(self, node: NodeId) -> Peer | None:
        return self._peers.get(bytes.fromhex(node))

    def _take(self, updates: Iterable[Statement], now: float) -> list[bytes]:
        """What others say. Returns of whom they know less than this node does."""
        stale = []
        for said in updates:
            if said.node == self._id:
                self._on_own(said, now)
                continue
            peer = self._peers.get(said.node)
            if peer is None:
                continue
            known = peer.statement
            if said == known:
                if peer.sent >= 0:  # one more who knows: as good as having told it
                    self._sent_on(peer)
                continue
            joined = join(known, said)
            if joined != known:
                self._believe(peer, joined)
            if joined != msgspec.structs.replace(said, by=0):
                stale.append(peer.id)
            if said.state is State.SUSPECT and (said.boot, said.incarnation, said.state) == (
                joined.boot,
                joined.incarnation,
                joined.state,
            ):
                self._accuse(peer, said.by, now)
        return stale

    def _on_own(self, said: Statement, now: float) -> None:
        """Only this node raises its incarnation; what is said of an older one is settled already."""
        own = self._own
        if said.boot != own.boot or (said.incarnation, said.state) <= (own.incarnation, own.state):
            return
        if said.incarnation == own.incarnation and said.state is State.SLOW:
            self._own = msgspec.structs.replace(own, state=State.SLOW)
            self._slow_until = now + self.timing.slow * self.timing.period
            return
        self._feel(1)
        self._object(said.incarnation, own.state)

    def _object(self, incarnation: int, state: State) -> None:
        """Raises the own incarnation over `incarnation`."""
        self.counters["refutations"] += 1
        if state is State.UP:
            self._slow_until = float("inf")
        self._own = msgspec.structs.replace(
            self._own, incarnation=min(incarnation + 1, MAX_INCARNATION), state=state
        )

    def _believe(self, peer: Peer, statement: Statement) -> None:
        """Something new, to be passed on."""
        before, after = peer.statement.state, statement.state
        renewed = (statement.boot, statement.incarnation) > (
            peer.statement.boot,
            peer.statement.incarnation,
        )
        peer.statement = statement
        self._on_epoch(statement.epoch, peer.node)
        if min(statement.epoch, statement.settled) >= self.newest[0]:
            self._behind.pop(peer.id, None)
        self._pass_on(peer)
        if after is not State.SUSPECT or renewed:
            self._suspicions.pop(peer.id, None)
        if after is before:
            return
        self.changes.append((peer.node, before, after))
        if after is State.DOWN:
            self._down[peer.id] = None
        elif before is State.DOWN:
            del self._down[peer.id]

    def _on_epoch(self, epoch: int, node: NodeId) -> None:
        if epoch > self.newest[0]:
            self.newest = (epoch, node)
            self._find_behind()

    def _find_behind(self) -> None:
        def is_behind(s: Statement) -> bool:
            return min(s.epoch, s.settled) < self.newest[0]

        self._behind = {p.id: None for p in self._ring if is_behind(p.statement)}

    def _accuse(self, peer: Peer, by: int, now: float) -> None:
        """Somebody suspects it at first hand: the more do, the sooner it is down."""
        suspicion = self._suspicions.get(peer.id)
        if suspicion is None:
            self._suspicions[peer.id] = Suspicion(peer, now, {by: None})
        elif by not in suspicion.accusers and len(suspicion.accusers) <= self.timing.confirmations:
            suspicion.accusers[by] = None
            self._pass_on(peer)

    def _suspicion_time(self, suspicion: Suspicion) -> float:
        """Lifeguard: from the longest to the shortest time, by the logarithm of the confirmations."""
        n = len(self._peers) + 1
        shortest = self.timing.suspicion * max(1.0, log10(n)) * self.timing.period
        enough = min(self.timing.confirmations, n - 2)
        if enough < 1:
            return shortest
        share = log(len(suspicion.accusers)) / log(enough + 1)
        return shortest * max(1.0, self.timing.patience - share * (self.timing.patience - 1))

    def _expire(self, suspicion: Suspicion, now: float) -> None:
        peer = suspicion.peer
        if suspicion.began + self._suspicion_time(suspicion) > now:
            return
        if peer.heard > suspicion.began:  # whoever is heard is not down
            suspicion.began = peer.heard
            return
        self.counters["downs"] += 1
        self._believe(peer, msgspec.structs.replace(peer.statement, state=State.DOWN))

    # -- sending ----------------------------------------------------------------------------------

    def _ping(self, target: Peer) -> int:
        self._sequence = (self._sequence + 1) % (1 << 32)
        self.outbox.append((target.node, Ping(self._sequence, self._updates(target, ask=MAX_ASKED))))
        return self._sequence

    def _answer(
        self,
        peer: Peer,
        sequence: int,
        *,
        reached: bool = True,
        stale: Iterable[bytes] = (),
        said: Iterable[Statement] = (),
    ) -> None:
        self.outbox.append((peer.node, Pong(sequence, self._updates(peer, stale, said), reached)))

    def _pass_on(self, peer: Peer) -> None:
        if peer.sent >= 0:
            del self._news[peer.sent][peer.id]
        peer.sent = 0
        self._news[0][peer.id] = None

    def _updates(
        self, to: Peer, stale: Iterable[bytes] = (), said: Iterable[Statement] = (), ask: int = 0
    ) -> tuple[Statement, ...]:
        """What rides along: of this node; of the receiver if it must object; of whom it knows less; up
        to `ask` that are behind; the news that were sent least, but for those that the receiver just
        `said`; then a few in turn."""
        chosen: dict[bytes, None] = {}
        if to.statement.state is not State.UP:
            chosen[to.id] = None
        most = MAX_UPDATES - 1
        for id_ in islice(chain(stale, self._asked(ask)), most - len(chosen)):
            chosen[id_] = None
        heard = {s.node: s for s in said}
        news = (
            i
            for i in chain.from_iterable(self._news)
            if i not in chosen and heard.get(i) != self._peers[i].statement
        )
        for id_ in list(islice(news, most - len(chosen))):
            chosen[id_] = None
            self._sent_on(self._peers[id_])
        for _ in range(min(REFRESH, most - len(chosen), len(self._ring))):
            self._refresh = (self._refresh + 1) % len(self._ring)
            other = self._ring[self._refresh]
            if other is not to:
                chosen[other.id] = None
        self.counters["updates"] += 1 + len(chosen)
        return (self._own, *(self._spoken(self._peers[i]) for i in chosen))

    def _asked(self, most: int) -> list[bytes]:
        """Of those behind, in turn. One that is down will speak for itself when it is back."""
        drawn = list(islice(self._behind, most))
        for id_ in drawn:
            del self._behind[id_]
            self._behind[id_] = None
        return [i for i in drawn if i not in self._down]

    def _sent_on(self, peer: Peer) -> None:
        """Once more; in the end it is no news any more."""
        del self._news[peer.sent][peer.id]
        peer.sent += 1
        if peer.sent < len(self._news):
            self._news[peer.sent][peer.id] = None
        else:
            peer.sent = -1

    def _spoken(self, peer: Peer) -> Statement:
        """A suspicion names one of those who have it at first hand."""
        suspicion = self._suspicions.get(peer.id)
        if suspicion is None:
            return peer.statement
        return msgspec.structs.replace(peer.statement, by=self._rng.choice(list(suspicion.accusers)))
