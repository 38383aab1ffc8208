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
from random import Random
from time import monotonic, time

from vstack import __version__
from vstack.errors import UsageError, VstackError
from vstack.mesh.access import directory
from vstack.mesh.changes import (
    leaving,
)
from vstack.mesh.config import CONFIG_KEY, Config, Member, NodeId, key_epoch, pack_config
from vstack.mesh.forming import FORMING_KEY
from vstack.mesh.links import Answer, Link
from vstack.mesh.messages import (
    ENVELOPE_BYTES,
    ENVELOPE_ITEMS,
    Accept,
    Accepted,
    AnyItem,
    Body,
    Chain,
    ChangeMesh,
    Created,
    Creates,
    Envelope,
    Failure,
    ForceConfig,
    GetConfig,
    GetHoldings,
    GetInventory,
    GetPiece,
    GetStatus,
    GetUsage,
    Hasten,
    Hello,
    Holdings,
    Join,
    List,
    MeshChanged,
    Nack,
    Noted,
    Outcome,
    Outcomes,
    PeerStatus,
    Ping,
    PingRequest,
    Pong,
    Promise,
    PutPiece,
    ReadReply,
    Reply,
    Scan,
    ScanReply,
    State,
    Status,
    Submit,
    Told,
    Viewed,
)
from vstack.mesh.paxos.replica import Replica
from vstack.mesh.registers import PIECE_KEY_BYTES
from vstack.mesh.transport import Incoming, Session, Transport
from vstack.node.admission import Admission
from vstack.node.entrance import Entrance
from vstack.node.journal import Journal
from vstack.node.keeper.keeper import Sight
from vstack.node.keeper.thread import Keeping
from vstack.node.listing import Gather, Listings
from vstack.node.peers import Peers
from vstack.node.settings import NodeSettings, NotOurMesh
from vstack.node.store import ChunkStore
from vstack.node.views import Views
from vstack.node.votes import VoteStore
from vstack.node.workers import PieceWorkers

log = logging.getLogger(__name__)

PATIENCE = 0.25
"""Seconds that the reactor waits at most for something to happen."""
SIGHT_EVERY = 0.2
"""Seconds between two looks at how the others are, for the keeper."""
STATEMENTS_EVERY = 0.05
"""Seconds between two looks at what is known of other nodes, while none of them says anything."""
INTRODUCTION = 1.0
"""Seconds that a node with a mesh waits for another member before it serves all the same."""
MAX_LISTINGS = 4
"""Listings of one connection at once."""
MAX_OPS_IN_FLIGHT = 20_000
MAX_HOLDINGS = 200
"""Videos in one answer about what a node holds."""
VIEW_PATIENCE = 5.0
"""Seconds that one step of writing views has."""
LAST_VIEWS = 2.0
"""Seconds that a node which is asked to stop goes on for, at most, to write the views it has noted."""
DAY = 86_400
CHAIN_BYTES = 512 * 1024
"""Bytes of configurations in one answer."""


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
        self._rng = Random()
        self._started = monotonic()
        self.votes = VoteStore(settings.data / "votes")
        self.me = self.votes.node
        chain = self.votes.chain()
        self.replica = Replica(self.me, self.votes.boot, chain, self.votes, self._rng)
        self.view = self.replica.view
        self.acceptor = self.replica.acceptor
        self.proposer = self.replica.proposer
        self._journal = Journal(settings.vote_journal, self.me) if settings.vote_journal else None
        self.acceptor.journal = [] if self._journal else None
        seeds = (settings.peers or (settings.advertise,)) if not settings.found else (settings.advertise,)
        self.peers = Peers(settings, self.votes, self.view, seeds, self._rng, self._started)
        self.proposer.is_live = self.peers.is_live
        member = Member(self.me, settings.advertise, settings.zone, settings.weight, settings.public_key)
        self._check_own_key()
        self._entrance = None if chain else Entrance(member, self.votes.boot, seeds, self.acceptor, self._rng)
        if self._entrance is not None and settings.keys is not None:
            self._entrance.forming.grants = settings.keys.mesh.admins
        self._admission = Admission(settings, self.votes, self.replica, self.peers, member)
        self.transport = self.peers.transport = Transport(self.peers.greet, self.peers.hello, settings.keys)
        self.transport.epoch = self.view.epoch
        self._admit()
        self.transport.listen(settings.listen)
        self.store = ChunkStore(
            settings.data / "store",
            node=self.me,
            reserve=settings.reserve,
            scrub_days=settings.scrub_days,
        )
        self._workers = PieceWorkers(self.store, self.transport.wakeup, monotonic)
        self._replies: list[tuple[Incoming, Body, bytes | memoryview]] = []
        self._scans: list[Incoming] = []
        self._listings = Listings(
            self.me, self.view, self.proposer, self._scan, self.peers.is_live, self.peers.is_met
        )
        self._views = Views(self.me, self.votes.boot, self.view, self._rng)
        self._keeping: Keeping | None = None
        self._sight_at = 0.0
        """When to tell the keeper how the others are."""
        self._said_waiting = ""
        self._statements_at = 0.0
        """When to look at what is known of other nodes."""
        self._counters: Counter[str] = Counter()

    def _check_own_key(self) -> None:
        """Raises UsageError if the mesh knows this node by another key than it has, or by none."""
        member = self.view.config.member(self.me)
        if member is None or member.key == self.settings.public_key:
            return
        if self.settings.keys is None:
            raise UsageError("the mesh of this data directory uses keys: start the node with --keys")
        if not member.key:
            raise UsageError("the mesh of this data directory was founded without keys: leave out --keys")
        raise UsageError(
            f"node.key in {self.settings.data} is not the key that the mesh knows this node by: put it "
            "back, or start this machine with an empty data directory"
        )

    def _admit(self) -> None:
        """Who may connect is as the open configurations say."""
        if self.settings.keys is not None:
            mesh = self.settings.keys.mesh
            chain = self.view.chain() if self.view.epoch else ()
            self.transport.admit(directory(chain, mesh.pair.public, mesh.admins))

    @property
    def mesh(self) -> str:
        """Mesh id; empty before there is one."""
        return self.peers.mesh

    # -- the reactor ------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends `run` soon. May be called from a signal handler or another thread."""
        self._stopping = True
        self.transport.wakeup.set()

    def run(self) -> None:
        """Serves until `stop`. Raises VoteCommitFailed, NotOurMesh, Removed."""
        try:
            while not self._stopping:
                self._turn()
            until = monotonic() + LAST_VIEWS
            while self._views.unwritten and monotonic() < until:
                self._views.hurry(monotonic())
                self._turn()
        finally:
            if self._keeping is not None:
                self._keeping.close()
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
        self.peers.keep_links(now)
        self._enter(now)
        self._listings.tick(now)
        self.replica.tick(now)
        self._collect_outcomes(now)
        self._write_views(now)
        self._gossip(now)
        self._commit()
        self._flush()
        self.peers.flush_gossip(now)

    def _patience(self, now: float) -> float:
        wakes = (self.replica.next_wake(), self._listings.next_wake())
        times = [self.peers.gossip.next_wake(), *(wake for wake in wakes if wake is not None)]
        return max(0.0, min(PATIENCE, min(times) - now))

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
        by_session: dict[Session, list[AnyItem]] = {}
        for to, reply in self.replica.replies:
            assert isinstance(to, Session)
            by_session.setdefault(to, []).append(reply)
        self.replica.replies = []
        for session, items in by_session.items():
            for envelope in envelopes(items):
                self.transport.push(session, envelope)
        for request, body, payload in self._replies:
            self.transport.reply(request, body, payload)
        self._scans, self._replies = [], []
        for node, scan_message, correlation, budget in self._listings.to_send:
            if (link := self.peers.links.get(node)) is not None:
                self.transport.send(link, scan_message, correlation, budget)
        self._listings.to_send = []
        outbox = self.replica.outbox
        if self._entrance is not None:
            outbox += self._entrance.forming.outbox
            self._entrance.forming.outbox = []
        by_node: dict[NodeId, list[AnyItem]] = {}
        for node, item in outbox:
            by_node.setdefault(node, []).append(item)
        for node, items in by_node.items():
            if (link := self.peers.links.get(node)) is None:
                self._counters["unreachable"] += len(items)
                continue
            for envelope in envelopes(items):
                self.transport.send(link, envelope)

    # -- the mesh ---------------------------------------------------------------------------------

    def _enter(self, now: float) -> None:
        """Founds or joins a mesh, if there is none yet; says once that this node serves."""
        if self._entrance is None:
            if not self.peers.introduced and (self._met_somebody() or now - self._started > INTRODUCTION):
                self.peers.introduced = True
                self._on_ready(self)
            if self.peers.introduced and now >= self._sight_at:
                self._sight_at = now + SIGHT_EVERY
                self._keep()
            return
        for link, m in self._entrance.tick(now, self.replica.chain_end):
            self.transport.send(link, m)
        if self._entrance.decided is not None:
            self.replica.adopt([self._entrance.decided], now)
            self._on_epoch()
            return
        waiting = self._entrance.waiting_for()
        if waiting and waiting != self._said_waiting and now - self._started > 1.0:
            self._said_waiting = waiting
            log.warning("waiting for a mesh: %s", waiting)

    def _keep(self) -> None:
        """Tells the keeper what this node sees of the others; begins with it."""
        config = self.view.config
        down = frozenset(m.node for m in config.members if self.peers.state(m.node) is State.DOWN)
        sight = Sight(config, down)
        if self._keeping is not None:
            self._keeping.observe(sight)
        elif config.member(self.me) is not None:
            address = self.settings.advertise
            here = {address: reachable_here(self.settings.listen)}
            self._keeping = Keeping(
                self.me,
                self.votes.boot,
                address,
                here,
                self.settings.keys,
                self.store,
                sight,
                self._workers.refresh,
            )

    def _met_somebody(self) -> bool:
        """Whether a member has said hello: then this data directory is of the mesh that is out there."""
        return len(self.view.config.members) == 1 or bool(self.peers.links)

    def _gossip(self, now: float) -> None:
        """Exchanges who is alive, and which epochs are adopted and settled."""
        gossip = self.peers.gossip
        if gossip.next_wake() <= now:
            gossip.tick(now)
        if self._entrance is None:
            self.peers.say(self.view.epoch, self.replica.settled)
            if now >= self._statements_at:
                self._statements_at = now + STATEMENTS_EVERY
                self._take_statements(now)
        for node in self.replica.fetch:
            link = self.peers.links.get(node) or next(iter(self.peers.links.values()), None)
            if link is not None:
                self.transport.send(link, GetConfig(self.replica.chain_end), bytes(7) + b"\1")
        self.replica.fetch = []

    def _take_statements(self, now: float) -> None:
        """What the others say of themselves may call for the chain, or for base to move."""
        newest, node = self.peers.gossip.newest
        if newest > self.view.epoch:
            self.replica.hear(node, newest, 0)
        if not self.view.is_settled():
            for other in sorted(self.view.participants - {self.me}):
                said = self.peers.gossip.statement(other)
                self.replica.hear(other, said.epoch, said.settled)
        self._admission.keep_up_to_date(now)

    def _on_epoch(self) -> None:
        """A configuration was adopted."""
        config = self.view.config
        self._statements_at = 0.0
        self._entrance = None
        self.transport.epoch = config.epoch
        self._admit()
        self.peers.on_configuration()
        log.info(
            "mesh %s: epoch %d, base %d, %d members",
            self.mesh[:8], config.epoch, config.base, len(config.members),
        )  # fmt: skip

    # -- requests ---------------------------------------------------------------------------------

    def _on_request(self, request: Incoming, now: float) -> None:
        body = request.body
        if isinstance(body, Envelope):
            self._on_envelope(request, body, now)
        elif isinstance(body, Ping | Pong | PingRequest):
            self._on_gossip(request, body, now)
        elif isinstance(body, GetConfig):
            open_only = Chain(self.mesh, self.view.chain() if self.mesh else ())
            self._reply(request, open_only if body.open else self._chain_after(body.after))
        elif isinstance(body, GetStatus):
            self._reply(request, self.status(now))
        elif self._entrance is not None:
            waiting = self._entrance.waiting_for()
            self._reply(request, Failure("forming", f"this node has no mesh yet: {waiting}"[:1000]))
        elif isinstance(body, PutPiece) and self._is_draining():
            why = "this node is draining: it takes no more pieces. Write it to another member"
            self._reply(request, Failure("refused", why))
        elif isinstance(body, PutPiece | GetPiece | GetInventory | GetUsage):
            self._workers.submit(request)
        elif isinstance(body, Submit):
            self._on_submit(request, body, now)
        elif isinstance(body, Scan):
            if self.peers.is_participant(request):
                self._scans.append(request)
            else:
                self._reply(request, Failure("refused", "only members of the mesh are shown raw votes"))
        elif isinstance(body, List):
            self._on_list(request, body, now)
        elif isinstance(body, Viewed):
            self._on_viewed(request, body, now)
        elif isinstance(body, GetHoldings):
            self._reply(request, self._holdings(body.after))
        elif isinstance(body, Hasten):
            self._on_hasten(request, body.job)
        elif isinstance(body, Join):
            self._admission.on_join(request, body.member, now)
        elif isinstance(body, ChangeMesh):
            self._admission.on_change(request, body, now)
        elif isinstance(body, ForceConfig):
            self._admission.on_force(request, body, now)
        else:
            self.transport.counters["malformed"] += 1
            self._reply(request, Failure("refused", f"{type(body).__name__} is not a request"))

    def _is_draining(self) -> bool:
        member = self.view.config.member(self.me)
        return member is not None and member.draining

    def _on_hasten(self, request: Incoming, job: str) -> None:
        if job == "scrub":
            self._workers.hasten_scrub()
        elif self._keeping is None:
            self._reply(request, Failure("busy", "this node has only just begun: try again"))
            return
        else:
            self._keeping.hasten(job)
        self._reply(request, Noted())

    def _on_envelope(self, request: Incoming, envelope: Envelope, now: float) -> None:
        """Votes. Those of a node that is no member count for nothing, unless it is ahead of us."""
        sender = self.peers.sender(request.session)
        if not sender or not (
            self._entrance is not None
            or sender in self.view.participants
            or request.session.hello.epoch > self.view.epoch
        ):
            self._reply(request, Failure("refused", "only members of the mesh take part in its votes"))
            return
        self.transport.forget(request)
        self.peers.gossip.heard(sender, now)
        for item in envelope.items:
            if (item.key == FORMING_KEY) != (self._entrance is not None):
                continue  # a node of a mesh has no vote on founding one: whoever asks takes its chain
            self.replica.receive(request.session, sender, item, now)

    def _on_gossip(self, request: Incoming, m: Ping | Pong | PingRequest, now: float) -> None:
        sender = self.peers.sender(request.session)
        self._statements_at = 0.0
        if not sender:
            self._reply(request, Failure("forbidden", "a member speaks with its own key"))
            return
        answer = self.peers.on_gossip(sender, m, now)
        if answer is not None:
            self._reply(request, answer)
        else:
            self.transport.forget(request)

    def _chain_after(self, after: int) -> Chain:
        """As much of the decided chain as fits one message."""
        configs: list[Config] = []
        size = 0
        for config in self.votes.chain():
            if config.epoch > after and (not configs or size < CHAIN_BYTES):
                configs.append(config)
                size += len(pack_config(config))
        return Chain(self.mesh, tuple(configs))

    def _holdings(self, after: str) -> Body:
        """Videos that this node has pieces of, by the index."""
        videos: list[str] = []
        try:
            while len(videos) < MAX_HOLDINGS:
                below = bytes.fromhex(after) + b"\xff" * (PIECE_KEY_BYTES - 32) if after else b""
                found = self.store.list(after=below, limit=1)
                if not found:
                    return Holdings(tuple(videos), False)
                after = found[0].key.video
                videos.append(after)
        except VstackError as e:
            return Failure("damaged", str(e)[:1000])
        return Holdings(tuple(videos), True)

    def _on_list(self, request: Incoming, wanted: List, now: float) -> None:
        if self._listings.of(request.session) >= MAX_LISTINGS:
            self._reply(request, Failure("busy", "this connection has listings under way already"))
            return
        self._listings.start(request, wanted, now)

    def _on_submit(self, request: Incoming, submit: Submit, now: float) -> None:
        if self.proposer.in_flight + len(submit.ops) > MAX_OPS_IN_FLIGHT:
            self._reply(request, Failure("busy", "too many operations are in flight at this node"))
            return
        if not submit.ops:
            self._reply(request, Outcomes(()))
            return
        for op in submit.ops:
            if op.key.startswith(CONFIG_KEY):
                self._reply(request, Failure("refused", "configurations are not changed this way"))
                return
            if key_epoch(op.key) > self.view.epoch:
                text = f"this node has yet to hear of epoch {key_epoch(op.key)}"
                self._reply(request, Failure("busy", text))
                return
            if op.expect is not None and op.born < self.view.base:
                text = f"epoch {op.born} is over: the mesh is in epoch {self.view.epoch}"
                self._reply(request, Failure("epoch", text))
                return
        batch = Batch(request, [None] * len(submit.ops), len(submit.ops))
        tags = [(batch, i) for i in range(len(submit.ops))]
        self.proposer.submit_all(submit.ops, now, request.deadline, tags)

    def _on_viewed(self, request: Incoming, m: Viewed, now: float) -> None:
        if self._stopping or not self._views.note(m.video, m.id, int(time() // DAY), now):
            self._reply(request, Failure("busy", "this node counts no more views just now"))
        else:
            self._reply(request, Noted())

    def _write_views(self, now: float) -> None:
        self._views.tick(now)
        for key, op in self._views.take():
            self.proposer.submit(op, now, now + VIEW_PATIENCE, (self._views, key))

    def _collect_outcomes(self, now: float) -> None:
        for tag, outcome in self.replica.take_done():
            assert isinstance(tag, tuple)
            owner, which = tag
            if isinstance(owner, Batch):
                owner.outcomes[which] = outcome
                owner.missing -= 1
                if owner.missing == 0:
                    self._reply(owner.request, Outcomes(tuple(o for o in owner.outcomes if o is not None)))
            elif isinstance(owner, Gather):
                self._listings.on_read(owner, which, outcome)
            elif isinstance(owner, Views):
                owner.on_outcome(which, outcome, now)
        self._replies += [(request, answer, b"") for request, answer in self._admission.take_answers()]
        if self.replica.counters["epochs"] != self._counters["epochs_seen"]:
            self._counters["epochs_seen"] = self.replica.counters["epochs"]
            self._on_epoch()

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
        if isinstance(body, Hello) and self.peers.on_hello(link, body) and self._entrance is not None:
            self._entrance.on_hello(link, body)
        node = link.hello.node if link.hello is not None else ""
        if node and self._entrance is None and answer.header.epoch > self.view.epoch:
            self.replica.hear(node, answer.header.epoch, 0)
        if isinstance(body, Hello):
            pass
        elif isinstance(body, Failure):
            self._on_failure(link, body)
        elif isinstance(body, Pong):
            self._statements_at = 0.0
            if node:
                self.peers.on_gossip(node, body, now)
        elif isinstance(body, Chain):
            self._on_chain(node, body, now)
        elif isinstance(body, MeshChanged):
            if self._entrance is not None:
                self._entrance.on_joined()
        elif isinstance(body, ScanReply):
            if node:
                self._listings.on_page(node, answer.correlation, body, now)
        elif isinstance(body, Envelope) and node:
            self.peers.gossip.heard(node, now)
            for item in body.items:
                if self._entrance is None:
                    if isinstance(item, Promise | Accepted | ReadReply | Nack | Created | Told):
                        self.replica.receive(None, node, item, now)
                elif item.key == FORMING_KEY and isinstance(item, Reply):
                    self._entrance.forming.receive(node, item)

    def _on_failure(self, link: Link, failure: Failure) -> None:
        if failure.code == "stale":
            self.votes.retire(failure.text)
            raise NotOurMesh(
                f"{link.address} says: {failure.text}. These votes are retired: "
                "start this machine with an empty data directory"
            )
        if failure.code == "wrong-mesh" and not self.peers.introduced and not self.peers.links:
            raise NotOurMesh(
                f"{self.settings.data} belongs to mesh {self.mesh[:8]}, "
                f"but {link.address} says: {failure.text}"
            )
        if self._entrance is not None:
            self._entrance.on_failure(failure)
        elif failure.code != "forming" and failure.text != self._said_waiting:
            self._said_waiting = failure.text
            log.warning("%s answered: %s", link.address, failure.text)

    def _on_chain(self, node: NodeId, chain: Chain, now: float) -> None:
        if not self.mesh or chain.mesh == self.mesh:
            self.replica.on_chain(node, chain.configs, now)

    # -- status -----------------------------------------------------------------------------------

    def status(self, now: float) -> Status:
        disk = shutil.disk_usage(self.settings.data)
        peers = tuple(
            PeerStatus(
                m.node,
                m.address,
                self.peers.state(m.node).name.lower(),
                None if (rtt := self.peers.gossip.rtt(m.node)) is None else round(rtt * 1000, 3),
            )
            for m in self.view.config.members
        )
        waiting = {} if self.view.is_settled() else self.replica.unsettled()
        return Status(
            self.me,
            self.mesh,
            self.view.epoch,
            self.votes.boot,
            self.settings.advertise,
            __version__,
            round(now - self._started, 3),
            peers,
            self._all_counters(),
            self._store_figures(),
            disk.free,
            disk.total,
            self.view.base,
            self.replica.settled,
            tuple(sorted(leaving(self.view))),
            not self.view.is_settled(),
            {epoch: tuple(nodes) for epoch, nodes in waiting.items()},
            {} if self._keeping is None else self._keeping.figures,
        )

    def _all_counters(self) -> dict[str, int]:
        counters = self.transport.counters + self._counters + self.peers.counters
        for prefix, more in (
            ("paxos", self.proposer.counters),
            ("chain", self.replica.counters),
            ("gossip", self.peers.gossip.counters),
            ("views", self._views.counters),
        ):
            counters.update({f"{prefix}.{k}": v for k, v in more.items()})
        counters["paxos.in_flight"] = self.proposer.in_flight
        counters["paxos.damaged"] = self.acceptor.damaged
        return dict(sorted(counters.items()))

    def _store_figures(self) -> dict[str, float]:
        figures = self._workers.upkeep_figures()._asdict() | self._workers.figures._asdict()
        start = figures.pop("start")._asdict()
        return {k: float(v) for k, v in {**figures, **{f"start_{k}": v for k, v in start.items()}}.items()}


def reachable_here(listen: str) -> str:
    """Where a node that listens on this address is dialled on its own machine."""
    host, _, port = listen.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '*': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"


def envelopes(items: list[AnyItem]) -> list[Envelope]:
    """As few envelopes as their bounds allow, items in order."""
    out: list[Envelope] = []
    now: list[AnyItem] = []
    size = 0
    for item in items:
        bulk = 400
        if isinstance(item, (Accept, Promise, ReadReply)) and item.value.data is not None:
            bulk += len(item.value.data)
        elif isinstance(item, Creates):
            bulk += item.bulk
        if now and (len(now) == ENVELOPE_ITEMS or size + bulk > ENVELOPE_BYTES):
            out.append(Envelope(tuple(now)))
            now, size = [], 0
        now.append(item)
        size += bulk
    if now:
        out.append(Envelope(tuple(now)))
    return out
