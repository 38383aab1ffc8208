"""Who the other nodes are, how to reach them, and how they do.

A connection to every member of an open epoch (or listed peer, while there is no mesh), one hello on
it, gossip now and then, and a new connection where the old one has gone deaf. Who is a member comes
from the configurations; gossip says how the members do. Whoever says hello with the NodeId of a
member must be that member: the same process as before, or one with a higher boot (bug B17).
"""

from __future__ import annotations

import logging
from collections import Counter
from random import Random

from vstack.mesh.config import NodeId, View, host_and_port
from vstack.mesh.forming import list_digest
from vstack.mesh.links import Link
from vstack.mesh.membership import Gossip
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Failure,
    Hello,
    Ping,
    PingRequest,
    Pong,
    State,
)
from vstack.mesh.transport import Incoming, Session, Transport
from vstack.node.settings import NodeSettings
from vstack.node.votes import VoteStore

log = logging.getLogger(__name__)

HELLO_EVERY = 0.3
"""Seconds between two hellos to an address where nobody has answered yet, or while there is no mesh."""
LINKS_EVERY = 0.05
"""Seconds between two looks at all connections, while nothing calls for one earlier."""
MAX_INVITED = 16
"""Callers that a node without a mesh calls back."""
RECONNECT_AFTER = 5.0
"""Seconds without any answer after which a connection is made anew, under another routing id."""


class Peers:
    """The other nodes, as this one knows them. `transport` is set by the server before anything else."""

    transport: Transport

    def __init__(
        self,
        settings: NodeSettings,
        votes: VoteStore,
        view: View,
        seeds: tuple[str, ...],
        rng: Random,
        now: float,
    ) -> None:
        """`seeds`: the addresses that this node was started with."""
        self.me = votes.node
        self.mesh = votes.mesh
        self.seeds = seeds
        self.links: dict[NodeId, Link] = {}
        """The connection on which each node has said hello."""
        self._met: set[NodeId] = set()
        """Who has said hello since this node started, on a connection that may have ended."""
        self.gossip = Gossip(self.me, votes.boot, rng, now)
        self.founding = not self.mesh
        """There is no mesh yet: whoever was started with the same list is a founder."""
        self.introduced = False
        """Somebody has been met, or was waited for long enough: the seeds are not asked any more."""
        self.counters: Counter[str] = Counter()
        self._invited: dict[str, None] = {}
        """Addresses of members that called while this node had no mesh: there it may be one already."""
        self._settings = settings
        self._votes = votes
        self._view = view
        self._said = (0, 0)
        self._links_at = 0.0
        self._hello_at: dict[str, float] = {}
        self._unanswered: dict[str, float] = {}
        """Since when an address owes an answer."""
        self.on_configuration()

    def on_configuration(self) -> None:
        """The view has changed: other members, other connections."""
        self.mesh = self._votes.mesh
        self.founding = not self.mesh
        self.gossip.set_members(sorted(self._view.participants))
        self._links_at = 0.0

    def addresses(self) -> set[str]:
        """Everybody that this node keeps a connection to."""
        found = {
            m.node: m.address
            for c in self._view.chain()
            for m in c.members
            if m.node in self._view.participants
        }
        found.pop(self.me, None)
        addresses = set(found.values())
        if self.founding or not self.introduced:
            addresses |= {*self.seeds, *(self._invited if self.founding else ())}
            if not self.founding:
                addresses.discard(self._settings.advertise)
        return addresses

    # -- hellos -----------------------------------------------------------------------------------

    def hello(self) -> Hello:
        return Hello(
            PROTOCOL_VERSION,
            self.mesh,
            "node",
            self.me,
            self._votes.boot,
            self._view.epoch,
            list_digest(self.seeds) if self.founding else b"",
            self._settings.zone,
            self._settings.weight,
            self._votes.process,
            self._settings.advertise,
            self._settings.public_key,
        )

    def greet(self, hello: Hello) -> Hello | Failure:
        """Whether to talk to whoever says this hello."""
        if hello.mesh and self.mesh and hello.mesh != self.mesh:
            return Failure("wrong-mesh", f"this node is of mesh {self.mesh[:8]}, not {hello.mesh[:8]}")
        if self.founding and hello.role == "node" and hello.mesh and len(self._invited) < MAX_INVITED:
            self._invited[hello.address] = None
        if hello.role == "node":
            if len(hello.node) != 32:
                return Failure("refused", "a node says hello with its NodeId of 32 hex digits")
            if not self._is_who_it_says(hello):
                return Failure(
                    "stale",
                    f"another process with the identity of node {hello.node[:8]} was met, with boot "
                    f"{hello.boot} or later: this data directory is an old copy, or is in use twice",
                )
        return self.hello()

    def _is_who_it_says(self, hello: Hello) -> bool:
        """False for a node that comes from a copy of its data directory. Remembers nobody who has no vote."""
        if hello.node == self.me:
            return hello.process == self._votes.process
        founder = self.founding and hello.peers == list_digest(self.seeds)
        if not founder and hello.node not in self._view.participants:
            return True
        return self._votes.meet(hello.node, hello.boot, hello.process)

    def on_hello(self, link: Link, hello: Hello) -> bool:
        """Somebody said who is at the other end of `link`; False if that cannot be."""
        if not self._is_who_it_says(hello):
            log.error("node %s at %s came back with an old boot: ignored", hello.node[:8], link.address)
            self.forget(link)
            return False
        if link.hello is not None and link.hello.node != hello.node:
            self.forget(link)
        link.hello = hello
        self.links[hello.node] = link
        self._met.add(hello.node)
        return True

    def forget(self, link: Link) -> None:
        """Whoever said hello on this connection is not there any more: what comes on it is not theirs."""
        if link.hello is not None and self.links.get(link.hello.node) is link:
            del self.links[link.hello.node]
        link.hello = None
        self._links_at = 0.0

    # -- connections ------------------------------------------------------------------------------

    def keep_links(self, now: float) -> None:
        """Connects to whom there is, says hello where nobody has answered, gives up deaf connections.

        Called in each turn of the reactor; looks now and then.
        """
        if now < self._links_at:
            return
        self._links_at = now + LINKS_EVERY
        wanted = self.addresses()
        for link in self.transport.links:
            if link.address not in wanted:
                self.forget(link)
                self.transport.disconnect(link.address)
                self._unanswered.pop(link.address, None)
        for address in sorted(a for a in wanted if host_and_port(a)):
            link = self.transport.connect(address, now)
            since = self._unanswered.get(address)
            if since is not None and link.heard > since:
                del self._unanswered[address]
            elif since is not None and now - since > RECONNECT_AFTER:
                self.forget(link)
                link = self.transport.reconnect(address, now)
                self._unanswered[address] = now
            if (link.hello is None or self.founding) and now >= self._hello_at.get(address, 0.0):
                self._hello_at[address] = now + HELLO_EVERY
                self._unanswered.setdefault(address, now)
                self.transport.send(link, self.hello())

    # -- gossip -----------------------------------------------------------------------------------

    def say(self, epoch: int, settled: int) -> None:
        """What this node has durably adopted, and settled."""
        if (epoch, settled) > self._said:
            self._said = (epoch, settled)
            self.gossip.say(epoch, settled)

    def on_gossip(self, sender: NodeId, m: Ping | Pong | PingRequest, now: float) -> Pong | None:
        """A message of another node. Returns the answer that goes back where it came from, if any."""
        if isinstance(m, Pong):
            self.gossip.on_ack(sender, m, now)
            return None
        before = len(self.gossip.outbox)
        if isinstance(m, Ping):
            self.gossip.on_ping(sender, m, now)
        else:
            self.gossip.on_ping_request(sender, m, now)
        for i in range(before, len(self.gossip.outbox)):
            to, answer = self.gossip.outbox[i]
            if to == sender and isinstance(answer, Pong):
                del self.gossip.outbox[i]
                return answer
        return None

    def flush_gossip(self, now: float) -> None:
        """Sends what gossip has to say."""
        outbox, self.gossip.outbox = self.gossip.outbox, []
        for node, m in outbox:
            link = self.links.get(node)
            if link is None:
                self.counters["unreachable"] += 1
                continue
            if not isinstance(m, Pong):
                self._unanswered.setdefault(link.address, now)
            self.transport.send(link, m)
        for node, before, after in self.gossip.changes:
            if State.DOWN in (before, after):
                log.info("node %s is %s", node[:8], after.name.lower())
        self.gossip.changes = []

    def state(self, node: NodeId) -> State:
        """How a participant does; down if it is none."""
        if node == self.me:
            return State.UP
        if node not in self._view.participants:
            return State.DOWN
        try:
            return self.gossip.state(node)
        except KeyError:
            return State.DOWN  # a configuration has just been adopted: nothing was heard of it yet

    def is_heard(self, node: NodeId) -> bool:
        """Whether a node may be alive: connected, and not known to be down."""
        return node in self.links and self.state(node) is not State.DOWN

    def is_met(self, node: NodeId) -> bool:
        """Whether a node has answered since this one started."""
        return node == self.me or node in self._met

    def sender(self, session: Session) -> NodeId:
        """Who speaks on a connection: the NodeId of its hello, empty for clients, and for whoever has said
        that it is a member without that member's key."""
        hello = session.hello
        if hello.role != "node":
            return ""
        member = next((m for c in self._view.chain() if (m := c.member(hello.node))), None)
        return hello.node if member is None or not member.key or member.key == session.key else ""

    def is_live(self, node: NodeId) -> bool:
        """Whether it is worth asking: connected, and neither suspect nor down."""
        return node == self.me or (node in self.links and self.state(node) <= State.SLOW)

    def is_participant(self, request: Incoming) -> bool:
        """Whether a request came from a member of an open epoch."""
        return self.sender(request.session) in self._view.participants
