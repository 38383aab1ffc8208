"""The node: one thread that takes what has arrived, handles it, commits once, and only then answers.

    poll sockets -> handle requests and answers -> tick timers -> commit votes -> send everything

Group commit falls out of this order, and so does the rule that no reply leaves before the votes it
rests on are on disk. Pieces are hashed, written and read by `PieceWorkers`; votes never wait for
them. The protocol itself is in `mesh.paxos` and `mesh.forming`; this file carries messages to and
from it, keeps the connections to the other members, and knows who is alive.

A failed commit of votes ends the process with nothing of that batch sent.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic

from vstack import __version__
from vstack.errors import VstackError
from vstack.mesh.config import GENESIS, Config, NodeId, View, mesh_id
from vstack.mesh.forming import FORMING_KEY, Forming, list_digest
from vstack.mesh.messages import (
    ENVELOPE_BYTES,
    ENVELOPE_ITEMS,
    PROTOCOL_VERSION,
    Accept,
    AnyItem,
    Body,
    Chain,
    Envelope,
    Failure,
    GetConfig,
    GetPiece,
    GetStatus,
    Hello,
    List,
    Outcome,
    Outcomes,
    PeerStatus,
    Ping,
    Pong,
    Prepare,
    Promise,
    PutPiece,
    Read,
    ReadReply,
    Scan,
    ScanReply,
    Status,
    Submit,
)
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.proposer import Proposer
from vstack.mesh.transport import Answer, Incoming, Link, Transport
from vstack.node.journal import Journal
from vstack.node.listing import Gather, Listings
from vstack.node.store import ChunkStore
from vstack.node.votes import VoteStore
from vstack.node.workers import PieceWorkers

log = logging.getLogger(__name__)

PING_EVERY = 0.5
PING_EVERY_FORMING = 0.1
SUSPECT_AFTER = 1.5
DOWN_AFTER = 4.0
RECONNECT_AFTER = 5.0
INTRODUCTION = 1.0
"""Seconds that a node with a mesh waits for another member before it serves all the same."""
MAX_LISTINGS = 4
"""Listings of one connection at once."""
MAX_OPS_IN_FLIGHT = 20_000


class NotOurMesh(VstackError):
    """The data directory belongs to another mesh than the peers do."""

    exit_code = 4


@dataclass(frozen=True)
class NodeSettings:
    """How a node was started."""

    listen: str
    """host:port to bind."""
    advertise: str
    """host:port that others dial."""
    data: Path
    peers: tuple[str, ...] = ()
    zone: str = ""
    weight: int = 1
    vote_journal: Path | None = None
    """Where to append every vote accepted, for audits."""


@dataclass(slots=True, eq=False)
class Batch:
    """A client's operations, until each has its outcome."""

    request: Incoming
    outcomes: list[Outcome | None]
    missing: int


class Node:
    """One node. `run` returns after `stop`; everything is opened by the constructor and closed by `run`."""

    def __init__(self, settings: NodeSettings, on_ready: Callable[[Node], None]) -> None:
        """Opens the votes, the store and the sockets, in this order.

        Raises DamagedData (votes), VstackError (store), UsageError (address).
        """
        self.settings = settings
        self._on_ready = on_ready
        self._stopping = False
        self._announced = False
        self._rng = Random()
        self.votes = VoteStore(settings.data / "votes")
        self.me = self.votes.node
        chain = self.votes.chain()
        self.mesh = mesh_id(chain[0]) if chain else ""
        self.view = View(chain[-1:] or (GENESIS,))
        self.acceptor = Acceptor(self.me, self.view, self.votes.lookup)
        self._journal = Journal(settings.vote_journal, self.me) if settings.vote_journal else None
        self.acceptor.journal = [] if self._journal else None
        self.proposer = Proposer(self.me, self.votes.boot, self.view, self.acceptor, self._rng)
        self._peers = settings.peers or (settings.advertise,)
        self._forming = None if chain else self._new_forming()
        self.transport = Transport(self._greet, self._hello)
        self.transport.listen(settings.listen)
        self.store = ChunkStore(settings.data / "store", node=self.me)
        self._workers = PieceWorkers(self.store, self.transport.wakeup, monotonic)
        self._started = monotonic()
        self._links: dict[NodeId, Link] = {}
        self._replies: list[tuple[Incoming, Body, bytes | memoryview]] = []
        self._envelopes: list[tuple[Incoming, list[AnyItem]]] = []
        self._scans: list[Incoming] = []
        self._listings = Listings(self.me, self.view, self.proposer, self._scan)
        self._said_waiting = ""
        self._counters: Counter[str] = Counter()

    def _new_forming(self) -> Forming:
        return Forming(self.me, self.votes.boot, tuple(sorted(set(self._peers))), self.acceptor, self._rng)

    # -- the reactor ------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends `run` soon. May be called from a signal handler or another thread."""
        self._stopping = True
        self.transport.wakeup.set()

    def run(self) -> None:
        """Serves until `stop`. Raises VoteCommitFailed, NotOurMesh."""
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._workers.close()
            self.transport.close()
            self.store.close()
            self.votes.close()

    def _turn(self) -> None:
        requests, answers = self.transport.poll(self._patience(monotonic()))
        now = monotonic()
        for request in requests:
            self._on_request(request, now)
        for answer in answers:
            self._on_answer(answer, now)
        self._replies += self._workers.take_done()
        self._keep_links(now)
        self._form(now)
        self._listings.tick(now)
        self.proposer.tick(now)
        self._collect_outcomes()
        self._commit()
        self._flush()

    def _patience(self, now: float) -> float:
        wake = self.proposer.next_wake()
        ping = PING_EVERY_FORMING if self._forming else PING_EVERY / 2
        return ping if wake is None else max(0.0, min(ping, wake - now))

    def _commit(self) -> None:
        if self.acceptor.dirty:
            self.votes.commit(self.acceptor.dirty)
            self.acceptor.committed()
            self._counters["vote_commits"] += 1
        if self._journal and self.acceptor.journal:
            self._journal.write(self.acceptor.journal)
            self.acceptor.journal = []

    def _flush(self) -> None:
        """Everything that waited for the commit."""
        for scan in self._scans:
            self._answer_scan(scan)
        self._replies += [(request, listing, b"") for request, listing in self._listings.done]
        self._listings.done = []
        for request, answers in self._envelopes:
            *more, last = envelopes(answers)
            for envelope in more:
                self.transport.push(request.session, envelope)
            self._replies.append((request, last, b""))
        for request, body, payload in self._replies:
            self.transport.reply(request, body, payload)
        self._scans, self._envelopes, self._replies = [], [], []
        for node, scan_message, correlation, budget in self._listings.to_send:
            if (link := self._links.get(node)) is not None:
                self.transport.send(link, scan_message, correlation, budget)
        self._listings.to_send = []
        outbox, self.proposer.outbox = self.proposer.outbox, []
        if self._forming:
            outbox += self._forming.outbox
            self._forming.outbox = []
        by_node: dict[NodeId, list[AnyItem]] = {}
        for node, item in outbox:
            by_node.setdefault(node, []).append(item)
        for node, items in by_node.items():
            if (link := self._links.get(node)) is None:
                self._counters["unreachable"] += len(items)
                continue
            for envelope in envelopes(items):
                self.transport.send(link, envelope)

    # -- who is who -------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            PROTOCOL_VERSION,
            self.mesh,
            "node",
            self.me,
            self.votes.boot,
            self.view.epoch,
            b"" if self.mesh else list_digest(self._peers),
            self.settings.zone,
            self.settings.weight,
            self.votes.process,
        )

    def _greet(self, hello: Hello) -> Hello | Failure:
        """Whether to talk to whoever says this hello."""
        if hello.mesh and self.mesh and hello.mesh != self.mesh:
            return Failure("wrong-mesh", f"this node is of mesh {self.mesh[:8]}, not {hello.mesh[:8]}")
        if hello.role == "node":
            if len(hello.node) != 32:
                return Failure("refused", "a node says hello with its NodeId of 32 hex digits")
            if not self._is_who_it_says(hello):
                return Failure(
                    "stale",
                    f"another process with the identity of node {hello.node[:8]} was met, with boot "
                    f"{hello.boot} or later: this data directory is an old copy, or is in use twice",
                )
        return self._hello()

    def _is_who_it_says(self, hello: Hello) -> bool:
        """False for a node that comes from a copy of its data directory. Remembers nobody who has no vote."""
        if hello.node == self.me:
            return hello.process == self.votes.process
        founder = self._forming is not None and hello.peers == list_digest(self._peers)
        if not founder and self.view.config.member(hello.node) is None:
            return True
        return self.votes.meet(hello.node, hello.boot, hello.process)

    def _keep_links(self, now: float) -> None:
        """A connection to every member (or listed peer), a ping now and then, a new one if it is deaf."""
        every = PING_EVERY_FORMING if self._forming else PING_EVERY
        addresses = set(self._peers)
        if not self._forming:
            strangers = set() if self._announced else addresses - {self.settings.advertise}
            addresses = {m.address for m in self.view.config.members if m.node != self.me} | strangers
        for address in sorted(addresses):
            link = self.transport.connect(address, now)
            if now - link.pinged < every:
                continue
            if now - max(link.heard, link.opened) > RECONNECT_AFTER:
                if link.hello:
                    self._links.pop(link.hello.node, None)
                link = self.transport.reconnect(address, now)
            link.pinged = now
            self.transport.send(link, Ping(self.view.epoch))

    def peer_state(self, node: NodeId, now: float) -> str:
        """up, suspect or down."""
        if node == self.me:
            return "up"
        link = self._links.get(node)
        silent = now - link.heard if link else now - self._started + SUSPECT_AFTER
        return "up" if silent < SUSPECT_AFTER else "suspect" if silent < DOWN_AFTER else "down"

    # -- forming ----------------------------------------------------------------------------------

    def _form(self, now: float) -> None:
        if self._forming is None:
            if not self._announced and (self._met_somebody() or now - self._started > INTRODUCTION):
                self._announced = True
                self._drop_strangers()
                self._on_ready(self)
            return
        self._forming.tick(now)
        if self._forming.decided is not None:
            self._adopt(self._forming.decided)
            return
        waiting = "; ".join(self._forming.waiting_for())
        if waiting and waiting != self._said_waiting and now - self._started > 1.0:
            self._said_waiting = waiting
            log.warning("waiting to form a mesh: %s", waiting)

    def _met_somebody(self) -> bool:
        """Whether a member has said hello: then this data directory is of the mesh that is out there."""
        return len(self.view.config.members) == 1 or bool(self._links)

    def _adopt(self, config: Config) -> None:
        """A decided configuration: durable here before anything else is said under it."""
        if config.member(self.me) is None:
            raise NotOurMesh(
                f"the mesh of {', '.join(self._peers)} exists already and does not list this node "
                f"({self.me[:8]}). Start with the data directory of a member, or with other peers"
            )
        self._commit()
        self.votes.save_config(config)
        self.view.adopt(config)
        self.mesh = self.votes.mesh
        self._forming = None
        self._drop_strangers()
        log.info("mesh %s: epoch %d, %d members", self.mesh[:8], config.epoch, len(config.members))

    def _drop_strangers(self) -> None:
        """Closes connections to addresses that are not another member's."""
        listed = {m.address for m in self.view.config.members if m.node != self.me}
        for link in self.transport.links:
            if link.address not in listed:
                self.transport.disconnect(link.address)

    # -- requests ---------------------------------------------------------------------------------

    def _on_request(self, request: Incoming, now: float) -> None:
        body = request.body
        if isinstance(body, Envelope):
            self._on_envelope(request, body)
        elif isinstance(body, Ping):
            self._reply(request, Pong(self.view.epoch))
        elif isinstance(body, GetConfig):
            configs = tuple(c for c in self.votes.chain() if c.epoch > body.after)
            self._reply(request, Chain(self.mesh, configs))
        elif isinstance(body, GetStatus):
            self._reply(request, self.status(now))
        elif self._forming is not None:
            waiting = "; ".join(self._forming.waiting_for()) or "deciding"
            self._reply(request, Failure("forming", f"the mesh is not formed yet: {waiting}"[:1000]))
        elif isinstance(body, PutPiece | GetPiece):
            self._workers.submit(request)
        elif isinstance(body, Submit):
            self._on_submit(request, body, now)
        elif isinstance(body, Scan):
            if self._is_member(request):
                self._scans.append(request)
            else:
                self._reply(request, Failure("refused", "only members of the mesh are shown raw votes"))
        elif isinstance(body, List):
            if self._listings.of(request.session) >= MAX_LISTINGS:
                self._reply(request, Failure("busy", "this connection has listings under way already"))
                return
            members = self.view.config.nodes
            down = {n for n in members if n not in self._links or self.peer_state(n, now) == "down"}
            self._listings.start(request, body, down - {self.me}, now)
        else:
            self.transport.counters["malformed"] += 1
            self._reply(request, Failure("refused", f"{type(body).__name__} is not a request"))

    def _is_member(self, request: Incoming) -> bool:
        hello = request.session.hello
        return hello.role == "node" and self.view.config.member(hello.node) is not None

    def _on_envelope(self, request: Incoming, envelope: Envelope) -> None:
        founder = self._forming is not None and request.session.hello.role == "node"
        if not founder and not self._is_member(request):
            self._reply(request, Failure("refused", "only members of the mesh take part in its votes"))
            return
        answers: list[AnyItem] = []
        for item in envelope.items:
            if (item.key == FORMING_KEY) != (self._forming is not None):
                continue  # a node of a mesh has no vote on founding one: whoever asks takes its chain
            if isinstance(item, Prepare | Accept | Read):
                reply = self.acceptor.receive(item)
                if reply is not None:
                    answers.append(reply)
            else:
                self.transport.counters["malformed"] += 1
        if answers:
            self._envelopes.append((request, answers))
        else:
            self.transport.forget(request)

    def _on_submit(self, request: Incoming, submit: Submit, now: float) -> None:
        if self.proposer.in_flight + len(submit.ops) > MAX_OPS_IN_FLIGHT:
            self._reply(request, Failure("busy", "too many operations are in flight at this node"))
            return
        if not submit.ops:
            self._reply(request, Outcomes(()))
            return
        if any(op.key.startswith("config/") for op in submit.ops):
            self._reply(request, Failure("refused", "configurations are not changed this way"))
            return
        batch = Batch(request, [None] * len(submit.ops), len(submit.ops))
        for i, op in enumerate(submit.ops):
            self.proposer.submit(op, now, request.deadline, (batch, i))

    def _collect_outcomes(self) -> None:
        done, self.proposer.done = self.proposer.done, []
        for tag, outcome in done:
            assert isinstance(tag, tuple)
            owner, which = tag
            if isinstance(owner, Batch):
                owner.outcomes[which] = outcome
                owner.missing -= 1
                if owner.missing == 0:
                    self._reply(owner.request, Outcomes(tuple(o for o in owner.outcomes if o is not None)))
            elif isinstance(owner, Gather):
                self._listings.on_read(owner, which, outcome)

    def _reply(self, request: Incoming, body: Body) -> None:
        self._replies.append((request, body, b""))

    # -- listings ---------------------------------------------------------------------------------

    def _answer_scan(self, request: Incoming) -> None:
        """After the commit: what is shown is on disk."""
        m = request.body
        assert isinstance(m, Scan)
        try:
            self.transport.reply(request, self._scan(m))
        except VstackError as e:
            self.transport.reply(request, Failure("damaged", str(e)[:1000]))

    def _scan(self, m: Scan) -> ScanReply:
        """A page of this node's records, of what is on disk. Raises DamagedData."""
        self._commit()
        rows, more = self.votes.scan(m.prefix, m.after, m.limit)
        return ScanReply(tuple(rows), more, self.view.epoch)

    # -- answers of peers -------------------------------------------------------------------------

    def _on_answer(self, answer: Answer, now: float) -> None:
        link, body = answer.link, answer.header.body
        if isinstance(body, Hello):
            self._on_peer_hello(link, body)
        elif isinstance(body, Failure):
            self._on_failure(link, body)
        elif isinstance(body, Pong):
            rtt = now - link.pinged
            link.rtt = rtt if link.rtt is None else link.rtt + (rtt - link.rtt) / 8
            if body.epoch > self.view.epoch:
                self.transport.send(link, GetConfig(self.view.epoch), bytes(7) + b"\1")
        elif isinstance(body, Chain):
            self._on_chain(body)
        elif isinstance(body, ScanReply):
            if link.hello is not None:
                self._listings.on_page(link.hello.node, answer.correlation, body, now)
        elif isinstance(body, Envelope) and link.hello is not None:
            self._on_replies(link.hello.node, body, now)

    def _on_replies(self, node: NodeId, envelope: Envelope, now: float) -> None:
        """An acceptor's replies. Those of a node that is no member count for nothing."""
        for item in envelope.items:
            if isinstance(item, Prepare | Accept | Read):
                self.transport.counters["malformed"] += 1
            elif self._forming is not None:
                self._forming.receive(node, item)
            elif self.view.config.member(node) is not None:
                self.proposer.receive(node, item, now)

    def _on_peer_hello(self, link: Link, hello: Hello) -> None:
        if not self._is_who_it_says(hello):
            log.error("node %s at %s came back with an old boot: ignored", hello.node[:8], link.address)
            self._forget(link)
            return
        if link.hello is not None and link.hello.node != hello.node:
            self._forget(link)
        link.hello = hello
        self._links[hello.node] = link
        if self._forming is not None:
            self._forming.met(link.address, hello)
            if hello.mesh:
                self.transport.send(link, GetConfig(0), bytes(7) + b"\1")

    def _forget(self, link: Link) -> None:
        """Whoever said hello on this connection is not there any more: what comes on it is not theirs."""
        if link.hello is not None and self._links.get(link.hello.node) is link:
            del self._links[link.hello.node]
        link.hello = None

    def _on_failure(self, link: Link, failure: Failure) -> None:
        if failure.code == "stale":
            self.votes.retire(failure.text)
            raise NotOurMesh(
                f"{link.address} says: {failure.text}. These votes are retired: "
                "start this machine with an empty data directory"
            )
        if failure.code == "wrong-mesh" and not self._announced and not self._links:
            raise NotOurMesh(
                f"{self.settings.data} belongs to mesh {self.mesh[:8]}, "
                f"but {link.address} says: {failure.text}"
            )
        if failure.text != self._said_waiting:
            self._said_waiting = failure.text
            log.warning("%s answered: %s", link.address, failure.text)

    def _on_chain(self, chain: Chain) -> None:
        if self.mesh and chain.mesh != self.mesh:
            return
        for config in sorted(chain.configs, key=lambda c: c.epoch):
            if config.epoch == self.view.epoch + 1:
                self._adopt(config)

    # -- status -----------------------------------------------------------------------------------

    def status(self, now: float) -> Status:
        disk = shutil.disk_usage(self.settings.data)
        peers = tuple(
            PeerStatus(
                m.node,
                m.address,
                self.peer_state(m.node, now),
                None
                if (link := self._links.get(m.node)) is None or link.rtt is None
                else round(link.rtt * 1000, 3),
            )
            for m in self.view.config.members
        )
        counters = self.transport.counters + self._counters
        counters.update({f"paxos.{k}": v for k, v in self.proposer.counters.items()})
        counters["paxos.in_flight"] = self.proposer.in_flight
        counters["paxos.damaged"] = self.acceptor.damaged
        return Status(
            self.me,
            self.mesh,
            self.view.epoch,
            self.votes.boot,
            self.settings.advertise,
            __version__,
            round(now - self._started, 3),
            peers,
            dict(sorted(counters.items())),
            self._store_figures(),
            disk.free,
            disk.total,
        )

    def _store_figures(self) -> dict[str, float]:
        figures = self._workers.figures._asdict()
        start = figures.pop("start")._asdict()
        return {k: float(v) for k, v in {**figures, **{f"start_{k}": v for k, v in start.items()}}.items()}


def envelopes(items: list[AnyItem]) -> list[Envelope]:
    """As few envelopes as their bounds allow, items in order."""
    out: list[Envelope] = []
    now: list[AnyItem] = []
    size = 0
    for item in items:
        bulk = 400 + (len(item.value.data or b"") if isinstance(item, Accept | Promise | ReadReply) else 0)
        if now and (len(now) == ENVELOPE_ITEMS or size + bulk > ENVELOPE_BYTES):
            out.append(Envelope(tuple(now)))
            now, size = [], 0
        now.append(item)
        size += bulk
    if now:
        out.append(Envelope(tuple(now)))
    return out
