"""A node's sockets: two ROUTERs that others dial, and a DEALER per peer.

One thread owns all of it. Work that finishes elsewhere comes back through `Wakeup`. What this
file decides is little: what is a message, whose session it belongs to, and whether it fits the
bounds. It never answers a request by itself, except to ask who is calling (`HelloRequired`), to
refuse what is over a bound (`Busy`), and to exchange hellos. Who is hung up on is the `Door`'s to
decide, who may come in and send what the `Gate`'s; what we dial ourselves are `Links`.

ZeroMQ's traps, and what is done about each: a connection outlives our restart, so a ROUTER that does
not know its routing id asks; a ROUTER drops silently at its high-water mark, so ROUTER_MANDATORY is on
and a drop is counted. Everything is lossy: retries belong to the core, never to the socket. Bytes that
are not ZMTP never become messages; connections that end before their handshake are counted through the
socket monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec
import zmq

from vstack.errors import UsageError
from vstack.mesh.access import Directory
from vstack.mesh.door import LOOK_EVERY, MALFORMED, NO_HELLO, WATCHED, Connection, Door, source
from vstack.mesh.gate import ZAP, Gate
from vstack.mesh.keys import NodeKeys
from vstack.mesh.links import Answer, Link, Links, is_somebody
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Body,
    Failure,
    Header,
    Hello,
    HelloRequired,
    decode,
    encode,
)
from vstack.mesh.sockets import DRAIN, HANDSHAKE_FAILED, NO_REPLY, Lane, Wakeup, endpoint, events, set_options
from vstack.mesh.tally import Tally

MAX_IN_FLIGHT = {Lane.CONTROL: 4096, Lane.DATA: 64}
"""Requests of one connection that have no reply yet."""
MAX_QUEUED = 64 << 20
"""Bytes of payload that one connection may have waiting."""
MAX_QUEUED_ALL = 256 << 20
"""Bytes of payload that all connections together may have waiting."""
MAX_BUDGET = 60.0
"""Seconds that any request may take, whatever it says."""
MAX_SESSIONS = 4096
SESSION_IDLE = 120.0
"""Seconds of silence after which a connection has to say hello again, when others need its room."""
FULL_FOR = 0.5
"""Seconds during which nobody looks again whether there is room for another session."""
DRAIN_USELESS = 64
"""Of `DRAIN` messages, how many may be of no use: what nonsense can cost the others in one turn."""
PARTS = 4
"""Of a message, as a ROUTER gives it: routing id, correlation id, header, payload."""


def receive(router: zmq.Socket[bytes], most: int) -> tuple[list[zmq.Frame], int]:
    """The first `most` parts of the next message, and how many it has. The others are dropped one by one:
    there may be a million of them. Raises zmq.Again."""
    frames = [router.recv(zmq.NOBLOCK, copy=False)]
    while frames[-1].more and len(frames) < most:
        frames.append(router.recv(zmq.NOBLOCK, copy=False))
    parts = len(frames)
    more = frames[-1].more
    while more:
        router.recv(zmq.NOBLOCK)
        parts += 1
        more = bool(router.get(zmq.RCVMORE))
    return frames, parts


@dataclass(slots=True, eq=False)
class Session:
    """One connection that somebody opened to us and said hello on."""

    routing_id: bytes
    lane: Lane
    hello: Hello
    heard: float
    key: bytes = b""
    """The public key that its connection proved to hold; empty in a mesh without keys."""
    connection: Connection | None = None
    """On which it was heard last."""
    in_flight: int = 0
    queued: int = 0


@dataclass(slots=True, eq=False)
class Incoming:
    """One request. `payload` is empty or one part; its memory is the socket's own, not a copy."""

    session: Session
    correlation: bytes
    body: Body
    payload: memoryview
    deadline: float
    """On this node's monotonic clock, in seconds."""
    answered: bool = False


class Transport:
    """Sockets of one node. `greet` decides about a hello: our own in return, or a Failure."""

    def __init__(
        self,
        greet: Callable[[Hello], Hello | Failure],
        my_hello: Callable[[], Hello],
        keys: NodeKeys | None = None,
    ) -> None:
        """Without `keys`, connections are neither encrypted nor authenticated."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._greet = greet
        self._poller = zmq.Poller()
        self._routers: dict[Lane, zmq.Socket[bytes]] = {}
        self._monitors: dict[zmq.Socket[bytes], Lane] = {}
        self._sessions: dict[tuple[Lane, bytes], Session] = {}
        self._full_until = 0.0
        """Until when there is no use in looking for room for another session."""
        self._zap: zmq.Socket[bytes] | None = None
        self._tally = Tally()
        self._door = Door(self._tally)
        self._gate = None if keys is None else Gate(keys, self._tally)
        self._links = Links(self._context, self._poller, my_hello, self._gate, self._tally)
        self._queued = 0
        """Bytes of payload that wait, over all sessions."""
        self._served_bytes = 0
        self._served_since = monotonic()
        self._rate = 0
        self.counters = self._tally.counters
        self.epoch = 0
        """The newest configuration that the node has adopted: every answer says so."""
        self.wakeup = Wakeup()
        self._poller.register(self.wakeup.receiver, zmq.POLLIN)

    # -- opening and closing ----------------------------------------------------------------------

    def listen(self, address: str) -> None:
        """Binds both lanes. Raises UsageError if the address cannot be bound."""
        if self._gate is not None:
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind(ZAP)
            self._poller.register(self._zap, zmq.POLLIN)
        for lane in Lane:
            router = self._context.socket(zmq.ROUTER)
            set_options(router, lane)
            router.set(zmq.ROUTER_MANDATORY, 1)
            if self._gate is not None:
                self._gate.guard(router)
            where = endpoint(address, lane)
            monitor = router.get_monitor_socket(HANDSHAKE_FAILED | WATCHED)
            try:
                router.bind(where)
            except zmq.ZMQError as e:
                router.close()
                raise UsageError(
                    f"cannot listen on {where.removeprefix('tcp://')}: {e.strerror}. "
                    "A node needs its port and the next one; choose another with --listen"
                ) from e
            self._routers[lane] = router
            self._monitors[monitor] = lane
            self._poller.register(router, zmq.POLLIN)
            self._poller.register(monitor, zmq.POLLIN)

    def connect(self, address: str, now: float) -> Link:
        """As `Links.connect`."""
        return self._links.connect(address, now)

    def reconnect(self, address: str, now: float) -> Link:
        """As `Links.reconnect`."""
        return self._links.reconnect(address, now)

    def disconnect(self, address: str) -> None:
        """As `Links.disconnect`."""
        self._links.disconnect(address)

    @property
    def links(self) -> Sequence[Link]:
        return tuple(self._links)

    def admit(self, whom: Directory) -> None:
        """As `Gate.admit`, and connections are made anew if they have to be. Without keys it changes
        nothing."""
        if self._gate is not None and self._gate.admit(whom):
            self._links.reconnect_all(monotonic())

    def close(self) -> None:
        self._links.close()
        for router in self._routers.values():
            router.disable_monitor()
            router.close(0)
        self.wakeup.close()
        self._context.destroy(0)

    # -- sending ----------------------------------------------------------------------------------

    def send(self, link: Link, body: Body, correlation: bytes = NO_REPLY, budget_ms: int = 0) -> None:
        """As `Links.send`."""
        self._links.send(link, body, correlation, budget_ms)

    def reply(self, request: Incoming, body: Body, payload: bytes | memoryview = b"") -> None:
        """Answers a request, once; later answers to the same request are dropped."""
        if not request.answered:
            self.forget(request)
            session = request.session
            self._send_to(session.lane, session.routing_id, request.correlation, body, payload)

    def forget(self, request: Incoming) -> None:
        """Done with a request, without an answer."""
        if not request.answered:
            request.answered = True
            request.session.in_flight -= 1
            request.session.queued -= len(request.payload)
            self._queued -= len(request.payload)

    def push(self, session: Session, body: Body) -> None:
        """Sends one more message to where a request came from; it answers nothing by number."""
        self._send_to(session.lane, session.routing_id, NO_REPLY, body)

    def _send_to(
        self, lane: Lane, routing_id: bytes, correlation: bytes, body: Body, payload: bytes | memoryview = b""
    ) -> None:
        data = lane is Lane.DATA
        head = encode(Header(body, 0, self._queued if data else 0, self._rate if data else 0, self.epoch))
        parts: list[bytes | memoryview] = [routing_id, correlation, head]
        if payload:
            parts.append(payload)
        try:
            self._routers[lane].send_multipart(parts, zmq.NOBLOCK, copy=not payload)
        except zmq.ZMQError:
            self.counters["dropped"] += 1
            return
        self._tally.count("sent", body)
        self._served_bytes += len(payload)

    # -- receiving --------------------------------------------------------------------------------

    def poll(self, timeout: float) -> tuple[list[Incoming], list[Answer]]:
        """Waits up to `timeout` seconds for anything, then takes what has arrived."""
        requests: list[Incoming] = []
        answers: list[Answer] = []
        if self._door.connections:
            timeout = min(timeout, LOOK_EVERY)
        ready = [sock for sock, _ in self._poller.poll(max(0, int(timeout * 1000 + 0.999)))]
        now = monotonic()
        for monitor, lane in self._monitors.items():
            if monitor in ready:  # before the messages of the connections that it is about
                self._on_monitor(monitor, lane)
        emptied = {lane for lane, router in self._routers.items() if router not in ready}
        for sock in ready:
            if not isinstance(sock, zmq.Socket):
                self.wakeup.clear()
            elif sock is self._zap and self._gate is not None:
                self._gate.answer(sock)
            elif sock in self._monitors:
                pass
            elif not self._links.take(sock, answers, now):
                lane = next(lane for lane, router in self._routers.items() if router is sock)
                if self._drain_router(lane, sock, requests, now):
                    emptied.add(lane)
        if now - self._served_since > 1.0:
            self._rate = int(self._served_bytes / (now - self._served_since))
            self._served_bytes, self._served_since = 0, now
        self._door.look(emptied, now)
        return requests, answers

    def _on_monitor(self, monitor: zmq.Socket[bytes], lane: Lane) -> None:
        for event, value in events(monitor):
            if event & WATCHED:
                self._door.on_event(lane, event, value)
                continue
            self.counters["handshakes_failed"] += 1
            if self._gate is not None:
                self._gate.on_handshake_failed(event, value)

    def _drain_router(self, lane: Lane, router: zmq.Socket[bytes], out: list[Incoming], now: float) -> bool:
        """Takes messages; True if these were all."""
        useless = self._door.useless
        most, dropped = useless[lane] + DRAIN_USELESS, 0
        for _ in range(DRAIN):
            if useless[lane] + dropped >= most:
                return False
            try:
                frames, parts = receive(router, PARTS)
            except zmq.Again:
                return True
            routing_id = frames[0].bytes
            fd = source(frames[0])
            connection = None if fd is None else self._door.connections.get((lane, fd))
            if connection is not None:
                connection.took(parts, sum(map(len, frames)))
            if self._door.is_hung_up(lane, routing_id, now):
                self.counters["dropped_unread"] += 1
                dropped += 1
                continue
            if not 3 <= parts <= PARTS or len(frames[1]) != 8 or fd is None:
                self._tally.malformed(routing_id, "not ZMTP 3" if fd is None else f"{parts - 1} parts")
                self._door.blame(lane, routing_id, connection, MALFORMED, now)
                continue
            try:
                header = decode(frames[2].buffer)
            except msgspec.DecodeError as e:
                self._tally.malformed(routing_id, str(e))
                self._door.blame(lane, routing_id, connection, MALFORMED, now)
                continue
            correlation = frames[1].bytes
            body = header.body
            self._tally.count("received", body)
            key = b""
            if self._gate is not None:
                key = self._gate.key_of(frames[-1])
                if (refused := self._gate.forbidden(key, body)) is not None:
                    self._send_to(lane, routing_id, correlation, refused)
                    continue
            if isinstance(body, Hello):
                self._on_hello(lane, routing_id, correlation, key, body, connection, now)
                continue
            session = self._sessions.get((lane, routing_id))
            if session is None or session.key != key:
                self.counters["hello_required"] += 1
                self._door.blame(lane, routing_id, connection, NO_HELLO, now)
                self._send_to(lane, routing_id, correlation, HelloRequired())
                continue
            session.heard = now
            session.connection = connection
            payload = frames[3].buffer if len(frames) == 4 else memoryview(b"")
            request = Incoming(
                session, correlation, body, payload, now + min(MAX_BUDGET, header.budget_ms / 1000)
            )
            session.in_flight += 1
            session.queued += len(payload)
            self._queued += len(payload)
            full = session.queued > MAX_QUEUED or self._queued > MAX_QUEUED_ALL
            if full or session.in_flight > MAX_IN_FLIGHT[lane]:
                self.counters["busy"] += 1
                self.reply(request, Failure("busy", "too much is waiting at this node already"))
                continue
            out.append(request)
        return False

    def _on_hello(
        self,
        lane: Lane,
        routing_id: bytes,
        correlation: bytes,
        key: bytes,
        hello: Hello,
        connection: Connection | None,
        now: float,
    ) -> None:
        believed = hello if self._gate is None else self._gate.believed(key, hello)
        answer: Hello | Failure
        if isinstance(believed, Failure):
            answer = believed
        elif hello.version not in (PROTOCOL_VERSION, PROTOCOL_VERSION - 1):
            answer = Failure(
                "refused", f"this node speaks protocol version {PROTOCOL_VERSION}, not {hello.version}"
            )
        elif not is_somebody(believed):
            answer = Failure("refused", "a node says hello with its NodeId of 32 hex digits")
        else:
            hello = believed
            answer = self._greet(hello)
        if isinstance(answer, Hello):
            known = self._sessions.get((lane, routing_id))
            if known is not None:
                known.hello, known.heard, known.key, known.connection = hello, now, key, connection
            elif self._make_room(hello, now):
                self._sessions[lane, routing_id] = Session(routing_id, lane, hello, now, key, connection)
            else:
                self.counters["sessions_full"] += 1
                answer = Failure("busy", f"this node has {MAX_SESSIONS} connections already")
        else:
            self._sessions.pop((lane, routing_id), None)
            self.counters["hello_refused"] += 1
        self._send_to(lane, routing_id, correlation, answer)

    def _make_room(self, hello: Hello, now: float) -> bool:
        """Whether there is room for one more session. Those whose connection has ended make room first,
        then those that have been silent for long; for a node that we know, any client that asks nothing
        just now."""
        if len(self._sessions) < MAX_SESSIONS:
            return True
        is_known = hello.role == "node" and self._links.to(hello.node) is not None
        if now < self._full_until and not is_known:
            return False
        idle = [(s.heard, k) for k, s in self._sessions.items() if s.in_flight == 0]
        for heard, k in idle:
            connection = self._sessions[k].connection
            if now - heard > SESSION_IDLE or (connection is not None and connection.closed):
                del self._sessions[k]
        if len(self._sessions) < MAX_SESSIONS:
            return True
        self._full_until = now + FULL_FOR
        clients = [(heard, k[0].value, k) for heard, k in idle if self._sessions[k].hello.role == "client"]
        if is_known and clients:
            del self._sessions[min(clients)[2]]
        return len(self._sessions) < MAX_SESSIONS
