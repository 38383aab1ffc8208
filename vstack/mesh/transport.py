"""A node's sockets: two ROUTERs that others dial, and a DEALER per peer.

One thread owns all of it. Work that finishes elsewhere comes back through `Wakeup`. What this
file decides is little: what is a message, whose connection it came on, and whether it fits the
bounds. It never answers a request by itself, except to ask who is calling (`HelloRequired`), to
refuse what is over a bound (`Busy`), and to exchange hellos.

ZeroMQ's traps, and what is done about each: a DEALER reconnects invisibly and keeps queued
messages across its peer's restart, so a connection is known by its routing id, which holds
NodeId, boot, lane and a counter, and a ROUTER that does not know it asks; a ROUTER drops silently
at its high-water mark, so ROUTER_MANDATORY is on and a drop is counted; a second DEALER under a
routing id in use stays deaf, so a new one gets a new id. Everything is lossy: retries belong to
the core, never to the socket. Bytes that are not ZMTP never become messages; connections that
end before their handshake are counted through the socket monitor.

With keys, every connection is CURVE: the ROUTERs have the mesh's key pair, and whoever dials has one
of its own. CURVE alone admits any key, so libzmq asks at each handshake, over ZAP (rfc.zeromq.org/spec/27),
whether this one may come in; the reactor answers from the `Directory` it was given last, between two
messages, without a thread. A stalled reactor delays handshakes, as it delays everything else. libzmq
cannot close one peer of a ROUTER, so each message is checked again by the key of its connection.

A peer that sends what is of no use is hung up on. libzmq offers no way to do so, but says which file
descriptor a connection has (its monitor when it begins, ZMQ_SRCFD with each message), and shutdown(2)
ends it for both sides. It bounds the size of a part and not the number of parts, and a message whose
last part never comes is never seen here: so TCP's own count of bytes is held against the messages that
came out of them (`_look_for_unread`).
"""

from __future__ import annotations

import ctypes
import logging
import re
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from time import monotonic
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from vstack.errors import UsageError
from vstack.mesh.access import Directory, Identity, allowed, directory
from vstack.mesh.config import NodeId
from vstack.mesh.keys import KeyPair, NodeKeys, short
from vstack.mesh.messages import (
    MAX_CONTROL,
    MAX_DATA,
    PROTOCOL_VERSION,
    Body,
    Envelope,
    Failure,
    Header,
    Hello,
    HelloRequired,
    decode,
    encode,
)

log = logging.getLogger(__name__)

NO_REPLY: Final = bytes(8)
"""The correlation id of a message that expects no reply."""


class Lane(Enum):
    CONTROL = "control"
    DATA = "data"


HIGH_WATER = {Lane.CONTROL: 512, Lane.DATA: 64}
"""Messages that may wait in a socket to be sent on a connection: what a peer that reads nothing can cost."""
MAX_PART = {Lane.CONTROL: MAX_CONTROL, Lane.DATA: MAX_DATA}
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
DRAIN = 256
"""Messages taken from one socket before the others get their turn."""
DRAIN_USELESS = 64
"""Of these, messages that turn out to be of no use: what nonsense can cost the others in one turn."""
PARTS = 4
"""Of a message, as a ROUTER gives it: routing id, correlation id, header, payload."""
PATIENCE_WITH = 4096
"""What a connection may send that is of no use, in points; then it is hung up on."""
MALFORMED = 32
"""Points of a message that cannot be read: 128 of them are enough."""
NO_HELLO = 1
"""Points of a message without a hello. A client whose node was restarted sends all that it has queued."""
FORGIVEN_AFTER = 60.0
"""Seconds after which the points of a connection count no more."""
LEFT_OVER = 1.0
"""Seconds during which messages of a connection that was hung up on still come out of the socket."""
LOOK_EVERY = 0.1
"""Seconds between two looks at how much has come on each connection without a message to show for it."""
USELESS = 250
"""Messages of no use between two looks after which nobody new is let in until all are taken: whoever is
hung up on comes back otherwise, and sends faster than we read."""
SHUT_FOR = 0.25
"""Seconds that this lasts at least."""
UNREAD = {Lane.CONTROL: 16 << 20, Lane.DATA: 160 << 20}
"""Bytes that may have come on a connection and wait in the socket to be taken."""
UNREAD_ALL = 512 << 20
"""The same, on all connections together."""
UNFINISHED = {Lane.CONTROL: MAX_CONTROL + (64 << 10), Lane.DATA: MAX_DATA + (64 << 10)}
"""Bytes that a connection may send without finishing a message: more than the largest of its lane has."""
FRAMING = 2
"""Bytes that ZMTP adds to a part, at least."""
HEARTBEATS = 512
"""Bytes a second that are no part of a message: ZeroMQ's heartbeats, both ways, encrypted, and some."""
REFUSED_AGAIN = 1.0
"""Seconds after which a peer that refused our key is asked again: it may have learnt it."""
MAX_REFUSALS = 2
"""Refusals of our own key after which we come with the mesh's: we may have been removed meanwhile, and
as a stranger we can learn that."""
STRANGER_FOR = 5.0
"""Seconds after which we try our own key again."""
MAX_COMPLAINTS = 4096
"""Lines in the log about peers, of each kind, whoever they are: what strangers can cost."""
MAX_MET = 1024
"""Keys of nodes that are known from their hellos only."""
_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_ZAP: Final = "inproc://zeromq.zap.01"
SILENT_HANDSHAKES = 3
"""Handshakes in a row that the far side ended without a reason, before we name the likely one."""


class Refusal(Enum):
    """Why a handshake failed, as far as the far side lets us know."""

    KEY = "key"
    """It does not admit our key."""
    SECURITY = "security"
    """One side uses keys and the other does not."""
    SILENT = "silent"
    """It ended the connection: another mesh key does that, and so does a program of another kind."""


def why_refused(event: int, value: int) -> Refusal:
    """What a monitor's EVENT_HANDSHAKE_FAILED_* means on the side that dialled."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return Refusal.KEY
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return Refusal.SECURITY
    return Refusal.SILENT


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` -> (host, port). Raises UsageError."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    named = re.fullmatch(r"[0-9A-Fa-f:.%a-z]+" if bracketed else r"[0-9A-Za-z._-]+", host)
    if not named or not port.isdigit() or not 0 < int(port) < 65535:
        raise UsageError(f"{text!r} is not an address: HOST:PORT, with a port below 65535, is needed")
    return host, int(port)


def endpoint(address: str, lane: Lane) -> str:
    """The ZeroMQ endpoint of a node's lane: control on its port, data on the next."""
    host, port = parse_address(address)
    shown = f"[{host}]" if ":" in host else host
    return f"tcp://{shown}:{port + (lane is Lane.DATA)}"


def set_options(sock: zmq.Socket[bytes] | zmq.asyncio.Socket, lane: Lane) -> None:
    """What every socket of the mesh has in common, on nodes and clients."""
    sock.linger = 0
    sock.sndhwm = HIGH_WATER[lane]
    # libzmq 4.3.5 ends the process (an assertion in stream_engine_base.cpp) if a connection is reset
    # while it does not read from it, for its high-water mark, and a heartbeat is due before it does again.
    sock.rcvhwm = 0
    sock.maxmsgsize = MAX_PART[lane]
    sock.set(zmq.IPV6, 1)
    sock.set(zmq.HEARTBEAT_IVL, 500)
    sock.set(zmq.HEARTBEAT_TIMEOUT, 1500)
    sock.set(zmq.HANDSHAKE_IVL, 3000)
    sock.set(zmq.TCP_KEEPALIVE, 1)


def speak_as(sock: zmq.Socket[bytes] | zmq.asyncio.Socket, pair: KeyPair, mesh: bytes) -> None:
    """Makes a socket that dials a CURVE client: known by `pair`, to nodes that prove the key `mesh`."""
    sock.set(zmq.CURVE_PUBLICKEY, pair.public)
    sock.set(zmq.CURVE_SECRETKEY, pair.secret)
    sock.set(zmq.CURVE_SERVERKEY, mesh)


_EVENT: Final = struct.Struct("=HI")
"""Of a socket monitor: which event, and its value."""
_SO_ATTACH_FILTER: Final = 26
_SO_DETACH_FILTER: Final = 27
"""Of Linux; Python has no names for them."""
_DROP: Final = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)
"""A packet filter of one instruction: return 0, keep nothing."""
_RESET: Final = struct.pack("ii", 1, 0)
"""A linger of nothing: once libzmq closes the connection, the far side learns so whatever it is doing."""
_BYTES_RECEIVED: Final = 128
"""Where Linux's struct tcp_info counts the bytes that came, in a u64."""


@dataclass(slots=True, eq=False)
class Connection:
    """One TCP connection that somebody opened to us, from the monitor's word that it is there to its
    word that it is not."""

    lane: Lane
    fd: int
    """libzmq's own: it may have closed it, and it may be something else's, before we are told."""
    peer: tuple[object, ...]
    """Its far end; no two connections have the same one at a time, so that `fd` is checked by it."""
    closed: bool = False
    received: int = 0
    """Bytes that had come by the last look."""
    taken: int = 0
    """Bytes of the messages since the last look."""
    unread: float = 0.0
    """Bytes that had come by the last look and of which no message was taken yet."""

    def bytes_received(self) -> int | None:
        """By TCP's own count, those that nobody has read yet included. None if it has ended."""
        try:
            with borrowed(self.fd) as s:
                if s.getpeername() != self.peer:
                    return None
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8)
                return int.from_bytes(info[_BYTES_RECEIVED:], sys.byteorder)
        except OSError:
            return None

    def hang_up(self) -> None:
        """Ends it, if it is still there. To libzmq it looks as if the peer had gone."""
        try:
            with borrowed(self.fd) as s:
                if s.getpeername() == self.peer:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    s.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself


def ignore_callers(listener: socket.socket) -> None:
    """The kernel drops who calls: they try again, as if the packet had been lost, and connections that
    exist are not touched. To unbind a ZeroMQ socket would end all of these."""
    program = struct.pack("HP", 1, ctypes.addressof(_DROP))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


@contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A TCP socket that somebody else owns and closes. Raises OSError if it is closed."""
    s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        yield s
    finally:
        s.detach()


def events(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """What a socket monitor has to say just now: (zmq.EVENT_..., its value)."""
    while True:
        try:
            frames = monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        event, value = _EVENT.unpack(frames[0])
        yield event, value


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


def is_somebody(hello: Hello) -> bool:
    """Whether a node says who it is: whoever handles its messages relies on a NodeId of 32 hex digits."""
    return hello.role != "node" or re.fullmatch("[0-9a-f]{32}", hello.node) is not None


def source(frame: zmq.Frame) -> int | None:
    """The file descriptor of the connection that a message came on; None if that does not speak ZMTP 3."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


@dataclass(slots=True, eq=False)
class Offender:
    """Somebody who has sent what is of no use, by the routing id: of a connection that has ended, messages
    come out of the socket for a while, when its descriptor may be another's."""

    connection: Connection | None
    since: float
    points: int = 0
    hung_up: float | None = None


class Wakeup:
    """Lets another thread end the reactor's poll."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)

    def set(self) -> None:
        try:
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # it is awake already
        except OSError:
            pass  # it is closed already

    def clear(self) -> None:
        try:
            while self.receiver.recv(4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        self.receiver.close()
        self._sender.close()


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


@dataclass(slots=True, eq=False)
class Answer:
    """What a peer sent back on a connection that we opened."""

    link: Link
    correlation: bytes
    header: Header


@dataclass(slots=True, eq=False)
class Link:
    """Our connection to one address."""

    address: str
    socket: zmq.Socket[bytes]
    opened: float
    hello: Hello | None = None
    """Who answered there; None until it did."""
    heard: float = 0.0
    """When it last answered anything."""
    pinged: float = 0.0
    rtt: float | None = None
    """Seconds, smoothed."""
    refused: float | None = None
    """When its handshake was refused: libzmq does not try again by itself."""
    silent_handshakes: int = 0
    as_stranger: bool = False
    """We came with the mesh's key pair although we are a member: our own was refused."""


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
        self._my_hello = my_hello
        self._poller = zmq.Poller()
        self._routers: dict[Lane, zmq.Socket[bytes]] = {}
        self._listeners: dict[Lane, int] = {}
        """File descriptors of the sockets that listen. They stay open as long as the ROUTERs."""
        self._monitors: dict[zmq.Socket[bytes], Lane] = {}
        self._link_monitors: dict[zmq.Socket[bytes], Link] = {}
        self._sessions: dict[tuple[Lane, bytes], Session] = {}
        self._links: dict[str, Link] = {}
        self._by_socket: dict[zmq.Socket[bytes], Link] = {}
        self._full_until = 0.0
        """Until when there is no use in looking for room for another session."""
        self._connections: dict[tuple[Lane, int], Connection] = {}
        """By libzmq's file descriptor."""
        self._most_connections = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        """Half of the files that this process may have open: the other half is the stores'."""
        self._offenders: dict[tuple[Lane, bytes], Offender] = {}
        self._emptied: set[Lane] = set()
        """Lanes whose messages have all been taken at some time since the last look."""
        self._looked = monotonic()
        self._useless: Counter[Lane] = Counter()
        """Messages of no use since the last look."""
        self._shut: dict[Lane, float] = {}
        """Lanes to which nobody new is let in just now, and since when."""
        self._complained: set[bytes] = set()
        self._logged: set[tuple[str, str]] = set()
        self._keys = keys
        self._is_member = False
        """Whether we are known by our own key, and dial with it: with the mesh's until then."""
        self._directory = Directory({}, frozenset())
        self._met: set[bytes] = set()
        """Keys that somebody who holds the mesh's secret key named as its own."""
        self._revoked: set[bytes] = set()
        self._refusals: Counter[str] = Counter()
        """How often each address has refused our own key, since it last admitted it."""
        self._zap: zmq.Socket[bytes] | None = None
        if keys is not None:
            self._directory = directory((), keys.mesh.pair.public, keys.mesh.admins)
        self._opened = 0
        self._queued = 0
        """Bytes of payload that wait, over all sessions."""
        self._served_bytes = 0
        self._served_since = monotonic()
        self._rate = 0
        self.counters: Counter[str] = Counter()
        self.epoch = 0
        """The newest configuration that the node has adopted: every answer says so."""
        self.wakeup = Wakeup()
        self._poller.register(self.wakeup.receiver, zmq.POLLIN)

    # -- opening and closing ----------------------------------------------------------------------

    def listen(self, address: str) -> None:
        """Binds both lanes. Raises UsageError if the address cannot be bound."""
        if self._keys is not None:
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind(_ZAP)  # before anybody can connect
            self._poller.register(self._zap, zmq.POLLIN)
        for lane in Lane:
            router = self._context.socket(zmq.ROUTER)
            set_options(router, lane)
            router.set(zmq.ROUTER_MANDATORY, 1)
            if self._keys is not None:
                router.set(zmq.CURVE_SERVER, 1)
                router.set(zmq.CURVE_SECRETKEY, self._keys.mesh.pair.secret)
                router.set(zmq.ZAP_DOMAIN, b"vstack")
                router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody to ask: nobody is admitted
            where = endpoint(address, lane)
            monitor = router.get_monitor_socket(
                _HANDSHAKE_FAILED | zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
            )
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
        """The control connection to `address`, opened now if there is none. It says hello first.

        One that was refused a while ago is opened anew, and one on which we are strangers.
        """
        link = self._links.get(address)
        if link is not None and (
            (link.refused is not None and now - link.refused > REFUSED_AGAIN)
            or (link.as_stranger and now - link.opened > STRANGER_FOR)
        ):
            self.disconnect(address)
            link = None
        if link is None:
            link = self._links[address] = self._open(address, now)
        return link

    def reconnect(self, address: str, now: float) -> Link:
        """Closes the connection to `address` and opens another, under a new routing id."""
        self.disconnect(address)
        return self.connect(address, now)

    def disconnect(self, address: str) -> None:
        link = self._links.pop(address, None)
        if link is not None:
            self._poller.unregister(link.socket)
            del self._by_socket[link.socket]
            monitor = next(m for m, owner in self._link_monitors.items() if owner is link)
            del self._link_monitors[monitor]
            self._poller.unregister(monitor)
            link.socket.disable_monitor()
            monitor.close(0)
            link.socket.close(0)

    def close(self) -> None:
        for address in list(self._links):
            self.disconnect(address)
        for router in self._routers.values():
            router.disable_monitor()
            router.close(0)
        self.wakeup.close()
        self._context.destroy(0)

    def _open(self, address: str, now: float) -> Link:
        dealer = self._context.socket(zmq.DEALER)
        set_options(dealer, Lane.CONTROL)
        me = self._my_hello()
        self._opened += 1
        counter = self._opened.to_bytes(4)
        dealer.routing_id = b"n" + bytes.fromhex(me.node) + me.boot.to_bytes(8) + b"c" + counter
        stranger = False
        if self._keys is not None:
            mesh = self._keys.mesh.pair
            refusals = self._refusals[address]
            stranger = self._is_member and refusals >= MAX_REFUSALS and refusals % MAX_REFUSALS == 0
            self._refusals[address] += stranger  # the next time with our own again
            speak_as(dealer, self._keys.own if self._is_member and not stranger else mesh, mesh.public)
        monitor = dealer.get_monitor_socket(_HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(endpoint(address, Lane.CONTROL))
        link = Link(address, dealer, now, as_stranger=stranger)
        self._by_socket[dealer] = link
        self._link_monitors[monitor] = link
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        self.send(link, me)
        return link

    @property
    def links(self) -> Sequence[Link]:
        return tuple(self._links.values())

    def link_to(self, node: NodeId) -> Link | None:
        """The connection on which `node` has said hello."""
        return next((k for k in self._links.values() if k.hello and k.hello.node == node), None)

    # -- keys -------------------------------------------------------------------------------------

    def admit(self, whom: Directory) -> None:
        """From now on these may connect and send; for those who are connected it counts from their next
        message. Once our own key is a member's, we are known by it: connections are made anew.

        Without keys it changes nothing.
        """
        if self._keys is None:
            return
        self._revoked |= self._directory.people.keys() - whom.people.keys()
        self._revoked -= whom.people.keys()
        self._met -= self._revoked
        self._directory = whom
        own = self._keys.own
        me = whom.people.get(own.public)
        self._refusals.clear()
        if not self._is_member and me is not None and me.role == "node":
            self._is_member = True
            now = monotonic()
            for address in list(self._links):
                self.reconnect(address, now)

    def identity(self, key: bytes) -> Identity | None:
        """Whose key that is just now, None if nobody's."""
        if self._keys is None:
            return None
        if key in self._met and key not in self._directory.people:
            return self._directory.people.get(self._keys.mesh.pair.public)
        return self._directory.people.get(key)

    def _meet(self, key: bytes) -> None:
        """A node that we dialled says that it will come with this key. It has proved to hold the mesh's
        secret key, and could come with that one as well."""
        if len(key) == 32 and len(self._met) < MAX_MET and key not in self._revoked:
            self._met.add(key)

    def _drain_zap(self, zap: zmq.Socket[bytes]) -> None:
        """Answers libzmq's questions about keys, one for each handshake."""
        for _ in range(DRAIN):
            try:
                _, number, _, address, _, mechanism, *credentials = zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            key = credentials[0] if mechanism == b"CURVE" and credentials else b""
            if self.identity(key) is not None:
                answer = [b"200", b"OK", key.hex().encode(), b""]
            else:
                answer = [b"400", b"", b"", b""]
                revoked = key in self._revoked
                self._count_refused("revoked" if revoked else "unknown")
                self._log_once(
                    "handshake", key.hex(), "a connection from %s was refused: its key %s... %s",
                    address.decode(errors="replace").removeprefix("::ffff:"), short(key),
                    "was revoked" if revoked else "is not one of this mesh's",
                )  # fmt: skip
            zap.send_multipart([b"1.0", number, *answer])

    def _count_refused(self, why: str) -> None:
        self.counters["keys.refused"] += 1
        self.counters[f"keys.refused.{why}"] += 1

    def _log_once(self, kind: str, about: str, message: str, *args: object) -> None:
        """One warning for each `about`."""
        if (kind, about) not in self._logged and len(self._logged) < MAX_COMPLAINTS:
            self._logged.add((kind, about))
            log.warning(message, *args)

    def _forbidden(self, key: bytes, body: Body) -> Failure | None:
        """None if the holder of `key` may send `body`; else it is counted, and logged once."""
        if self._keys is None:
            return None
        who = self.identity(key)
        why = allowed(who, body)
        if why is None:
            return None
        return self._refuse(key, who, type(body).__name__, why)

    def _refuse(self, key: bytes, who: Identity | None, kind: str, why: str) -> Failure:
        self.counters["keys.forbidden"] += 1
        self._log_once(
            kind, key.hex(), "%s refused from key %s... (%s): %s",
            kind, short(key), who or ("revoked" if key in self._revoked else "unknown"), why,
        )  # fmt: skip
        return Failure("forbidden", why[:1000])

    # -- sending ----------------------------------------------------------------------------------

    def send(self, link: Link, body: Body, correlation: bytes = NO_REPLY, budget_ms: int = 0) -> None:
        """Queues one message; it may be lost, and a loss here is counted as `dropped`."""
        try:
            link.socket.send_multipart([correlation, encode(Header(body, budget_ms))], zmq.NOBLOCK)
        except zmq.ZMQError:
            self.counters["dropped"] += 1
            return
        self._count("sent", body)

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
        self._count("sent", body)
        self._served_bytes += len(payload)

    # -- receiving --------------------------------------------------------------------------------

    def poll(self, timeout: float) -> tuple[list[Incoming], list[Answer]]:
        """Waits up to `timeout` seconds for anything, then takes what has arrived."""
        requests: list[Incoming] = []
        answers: list[Answer] = []
        if self._connections:
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
            elif sock is self._zap:
                self._drain_zap(sock)
            elif sock in self._monitors:
                pass
            elif sock in self._link_monitors:
                self._on_link_monitor(sock, self._link_monitors[sock], now)
            elif sock in self._by_socket:
                self._drain_link(self._by_socket[sock], answers, now)
            else:
                lane = next(lane for lane, router in self._routers.items() if router is sock)
                if self._drain_router(lane, sock, requests, now):
                    emptied.add(lane)
        if now - self._served_since > 1.0:
            self._rate = int(self._served_bytes / (now - self._served_since))
            self._served_bytes, self._served_since = 0, now
        self._emptied |= emptied
        for lane in [lane for lane, since in self._shut.items() if now - since > SHUT_FOR]:
            if lane in emptied:
                self._let_in(lane)
        if now - self._looked > LOOK_EVERY:
            self._look_for_unread(now)
        return requests, answers

    def _drain_router(self, lane: Lane, router: zmq.Socket[bytes], out: list[Incoming], now: float) -> bool:
        """Takes messages; True if these were all."""
        most, dropped = self._useless[lane] + DRAIN_USELESS, 0
        for _ in range(DRAIN):
            if self._useless[lane] + dropped >= most:
                return False
            try:
                frames, parts = receive(router, PARTS)
            except zmq.Again:
                return True
            routing_id = frames[0].bytes
            fd = source(frames[0])
            connection = None if fd is None else self._connections.get((lane, fd))
            if connection is not None:
                connection.taken += FRAMING * parts + sum(map(len, frames))
            if self._offenders and self._is_hung_up(lane, routing_id, now):
                self.counters["dropped_unread"] += 1
                dropped += 1
                continue
            if not 3 <= parts <= PARTS or len(frames[1]) != 8 or fd is None:
                self._malformed(routing_id, "not ZMTP 3" if fd is None else f"{parts - 1} parts")
                self._blame(lane, routing_id, connection, MALFORMED, now)
                continue
            try:
                header = decode(frames[2].buffer)
            except msgspec.DecodeError as e:
                self._malformed(routing_id, str(e))
                self._blame(lane, routing_id, connection, MALFORMED, now)
                continue
            correlation = frames[1].bytes
            body = header.body
            self._count("received", body)
            # A string that libzmq attached to the connection at its handshake: see `_drain_zap`.
            key = b"" if self._keys is None else bytes.fromhex(str(frames[-1].get("User-Id")))
            if (refused := self._forbidden(key, body)) is not None:
                self._send_to(lane, routing_id, correlation, refused)
                continue
            if isinstance(body, Hello):
                self._on_hello(lane, routing_id, correlation, key, body, connection, now)
                continue
            session = self._sessions.get((lane, routing_id))
            if session is None or session.key != key:
                self.counters["hello_required"] += 1
                self._blame(lane, routing_id, connection, NO_HELLO, now)
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

    def _drain_link(self, link: Link, out: list[Answer], now: float) -> None:
        for _ in range(DRAIN):
            try:
                frames = link.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                return  # closed while its messages were being handled
            if len(frames) < 2 or len(frames[0]) != 8:
                self._malformed(link.address.encode(), f"{len(frames)} parts")
                continue
            try:
                header = decode(frames[1])
            except msgspec.DecodeError as e:
                self._malformed(link.address.encode(), str(e))
                continue
            if isinstance(header.body, Hello) and not is_somebody(header.body):
                self._malformed(link.address.encode(), "a hello without a NodeId")
                continue
            self._count("received", header.body)
            link.heard = now
            if isinstance(header.body, HelloRequired):
                self.send(link, self._my_hello())
                continue
            if isinstance(header.body, Hello) and self._keys is not None:
                self._meet(header.body.key)
            out.append(Answer(link, frames[0], header))

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
        who = self.identity(key)
        believed = self._directory.believed(who, hello) if who is not None else hello
        answer: Hello | Failure
        if isinstance(believed, str):
            answer = self._refuse(key, who, "Hello", believed)
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
        is_known = hello.role == "node" and self.link_to(hello.node) is not None
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

    # -- peers that misbehave ---------------------------------------------------------------------

    def _blame(
        self, lane: Lane, routing_id: bytes, connection: Connection | None, points: int, now: float
    ) -> None:
        """Whoever has sent too much that is of no use is hung up on. When it comes from everywhere, nobody
        new is let in."""
        offender = self._offenders.get((lane, routing_id))
        if offender is None or now - offender.since > FORGIVEN_AFTER:
            if len(self._offenders) >= MAX_SESSIONS:
                self._offenders.clear()
            offender = self._offenders[lane, routing_id] = Offender(connection, now)
        offender.points += points
        if offender.points >= PATIENCE_WITH:
            offender.hung_up = now
            self._hang_up(offender.connection, "it sent too much that is of no use")
        if points == MALFORMED:
            self._useless[lane] += 1
            if self._useless[lane] >= USELESS and lane not in self._shut:
                self._shut_out(lane, now)

    def _shut_out(self, lane: Lane, now: float) -> None:
        """Nobody new from now on."""
        self._shut[lane] = now
        self.counters["shut"] += 1
        self._log_once("shut", lane.value, "flooded with messages of no use: nobody new is let in meanwhile")
        with borrowed(self._listeners[lane]) as listener:
            ignore_callers(listener)

    def _let_in(self, lane: Lane) -> None:
        del self._shut[lane]
        with borrowed(self._listeners[lane]) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def _is_hung_up(self, lane: Lane, routing_id: bytes, now: float) -> bool:
        """Whether a message is what was left over of a connection that was hung up on."""
        offender = self._offenders.get((lane, routing_id))
        if offender is None or offender.hung_up is None:
            return False
        if now - offender.hung_up > LEFT_OVER:
            del self._offenders[lane, routing_id]  # it has come again
            return False
        return True

    def _hang_up(self, connection: Connection | None, why: str) -> None:
        if connection is not None and not connection.closed:
            self.counters["hung_up"] += 1
            connection.unread = 0.0
            connection.hang_up()
            host = str(connection.peer[0]).removeprefix("::ffff:")
            self._log_once("hung up", f"{host} {why}", "hung up on a connection from %s: %s", host, why)

    def _look_for_unread(self, now: float) -> None:
        """Hangs up on connections on which more has come than should wait: because no message ever ends
        (then nothing is left to take, and more has come than the largest message has), or because more
        comes than we can take."""
        passed = now - self._looked
        for connection in self._connections.values():
            received = connection.bytes_received()
            if received is None:
                continue  # the monitor will say so
            grown = max(0.0, received - connection.received - HEARTBEATS * passed)
            emptied = connection.lane in self._emptied
            if emptied and connection.taken:
                connection.unread = 0.0
            else:
                connection.unread = max(0.0, connection.unread + grown - connection.taken)
            connection.received, connection.taken = received, 0
            if connection.unread > (UNFINISHED if emptied else UNREAD)[connection.lane]:
                self._hang_up(connection, "it sends without an end")
        if sum(c.unread for c in self._connections.values()) > UNREAD_ALL:
            most = max(self._connections.values(), key=lambda c: c.unread)
            self._hang_up(most, "it sends most, and together they send more than this node can take")
        self._emptied.clear()
        self._useless.clear()
        self._looked = now

    def _malformed(self, peer: bytes, why: str) -> None:
        """Counted, logged once per peer, dropped."""
        self.counters["malformed"] += 1
        if peer not in self._complained and len(self._complained) < MAX_SESSIONS:
            self._complained.add(peer)
            log.warning("malformed message from %s dropped: %s", peer.hex()[:24], why)

    def _on_monitor(self, monitor: zmq.Socket[bytes], lane: Lane) -> None:
        for event, value in events(monitor):
            if event == zmq.EVENT_LISTENING:
                self._listeners[lane] = value
                continue
            if event == zmq.EVENT_ACCEPTED:
                self._on_accepted(lane, value)
                continue
            if event == zmq.EVENT_DISCONNECTED:
                if (ended := self._connections.pop((lane, value), None)) is not None:
                    ended.closed = True
                continue
            self.counters["handshakes_failed"] += 1
            if self._keys is None or event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                continue
            # Whose connection it was is not known: libzmq names our own end only.
            if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                self._count_refused("plain")
                self._log_once("handshake", "plain", "a connection without keys was refused")
            elif value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
                self._count_refused("other_mesh")
                self._log_once("handshake", "other", "a connection with the key of another mesh was refused")

    def _on_accepted(self, lane: Lane, fd: int) -> None:
        try:
            with borrowed(fd) as s:
                connection = Connection(lane, fd, s.getpeername())
        except OSError:
            return  # it has ended again
        if len(self._connections) < self._most_connections:
            self._connections[lane, fd] = connection
        else:
            self._hang_up(connection, "this node has as many connections as it can have")

    def _on_link_monitor(self, monitor: zmq.Socket[bytes], link: Link, now: float) -> None:
        for event, value in events(monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                link.silent_handshakes = 0
                if not link.as_stranger:
                    self._refusals.pop(link.address, None)
                continue
            refusal = why_refused(event, value)
            if refusal is Refusal.SILENT:
                link.silent_handshakes += 1
            else:
                link.refused = now
                self._refusals[link.address] += refusal is Refusal.KEY
            if refusal is not Refusal.SILENT or link.silent_handshakes >= SILENT_HANDSHAKES:
                why = self._refusal_in_words(refusal)
                self._log_once(
                    f"link {refusal.value}", link.address, "%s refuses this node: %s", link.address, why
                )

    def _refusal_in_words(self, refusal: Refusal) -> str:
        if self._keys is None:
            return "it uses keys, or is no vstack node: start this node with --keys"
        if refusal is Refusal.KEY:
            return f"it does not know this node's key {short(self._keys.own.public)}... (yet, or any more)"
        if refusal is Refusal.SECURITY:
            return "it uses no keys: start it with --keys"
        return "it has another mesh.key than this node, or is no vstack node"

    def _count(self, way: str, body: Body) -> None:
        kind = type(body).__name__
        self.counters[f"{way}.{kind}"] += 1
        if isinstance(body, Envelope):
            for kind_of, count in Counter(map(type, body.items)).items():
                self.counters[f"{way}.item.{kind_of.__name__}"] += count
