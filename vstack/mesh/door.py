"""A node's listening sockets: who is hung up on, and when nobody new is let in.

A peer that sends what is of no use is hung up on. libzmq offers no way to do so, but says which file
descriptor a connection has (its monitor when it begins, ZMQ_SRCFD with each message), and shutdown(2)
ends it for both sides. It bounds the size of a part and not the number of parts, and a message whose
last part never comes is never seen here: so TCP's own count of bytes is held against the messages that
came out of them (`Door.look`).

Whoever is hung up on comes back, and sends faster than we read. So when nonsense comes from everywhere,
the door is shut for a while: the kernel drops who calls, and connections that exist are not touched.
"""

from __future__ import annotations

import ctypes
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Final

import zmq

from vstack.mesh.messages import MAX_CONTROL, MAX_DATA
from vstack.mesh.sockets import Lane
from vstack.mesh.tally import Tally

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
MAX_OFFENDERS = 4096
"""Routing ids whose points are remembered; with more, all are forgotten."""
WATCHED: Final = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
"""Events of a ROUTER's monitor that `Door.on_event` has to hear of."""
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

    def took(self, parts: int, size: int) -> None:
        """A message of so many parts and bytes has come out of the socket."""
        self.taken += FRAMING * parts + size

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


class Door:
    """Of one node, for both lanes. Called by the thread that owns the sockets."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._listeners: dict[Lane, int] = {}
        """File descriptors of the sockets that listen. They stay open as long as the ROUTERs."""
        self.connections: dict[tuple[Lane, int], Connection] = {}
        """By libzmq's file descriptor."""
        self._most_connections = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        """Half of the files that this process may have open: the other half is the stores'."""
        self._offenders: dict[tuple[Lane, bytes], Offender] = {}
        self._emptied: set[Lane] = set()
        """Lanes whose messages have all been taken at some time since the last look."""
        self._looked = monotonic()
        self.useless: Counter[Lane] = Counter()
        """Messages of no use since the last look. Whoever takes messages stops when they become too many."""
        self._shut: dict[Lane, float] = {}
        """Lanes to which nobody new is let in just now, and since when."""

    def on_event(self, lane: Lane, event: int, value: int) -> None:
        """One of `WATCHED`, and the file descriptor that it is about."""
        if event == zmq.EVENT_LISTENING:
            self._listeners[lane] = value
        elif event == zmq.EVENT_ACCEPTED:
            self._on_accepted(lane, value)
        elif (ended := self.connections.pop((lane, value), None)) is not None:
            ended.closed = True

    def is_hung_up(self, lane: Lane, routing_id: bytes, now: float) -> bool:
        """Whether a message is what was left over of a connection that was hung up on."""
        offender = self._offenders.get((lane, routing_id))
        if offender is None or offender.hung_up is None:
            return False
        if now - offender.hung_up > LEFT_OVER:
            del self._offenders[lane, routing_id]  # it has come again
            return False
        return True

    def blame(
        self, lane: Lane, routing_id: bytes, connection: Connection | None, points: int, now: float
    ) -> None:
        """Whoever has sent too much that is of no use is hung up on. When it comes from everywhere, nobody
        new is let in."""
        offender = self._offenders.get((lane, routing_id))
        if offender is None or now - offender.since > FORGIVEN_AFTER:
            if len(self._offenders) >= MAX_OFFENDERS:
                self._offenders.clear()
            offender = self._offenders[lane, routing_id] = Offender(connection, now)
        offender.points += points
        if offender.points >= PATIENCE_WITH:
            offender.hung_up = now
            self._hang_up(offender.connection, "it sent too much that is of no use")
        if points == MALFORMED:
            self.useless[lane] += 1
            if self.useless[lane] >= USELESS and lane not in self._shut:
                self._shut_out(lane, now)

    def look(self, emptied: set[Lane], now: float) -> None:
        """After each poll: lets callers in again, and looks at how much has come. `emptied` are the lanes
        whose messages have all been taken."""
        self._emptied |= emptied
        for lane in [lane for lane, since in self._shut.items() if now - since > SHUT_FOR]:
            if lane in emptied:
                self._let_in(lane)
        if now - self._looked > LOOK_EVERY:
            self._look_for_unread(now)

    def _shut_out(self, lane: Lane, now: float) -> None:
        """Nobody new from now on."""
        self._shut[lane] = now
        self._tally.counters["shut"] += 1
        self._tally.log_once(
            "shut", lane.value, "flooded with messages of no use: nobody new is let in meanwhile"
        )
        with borrowed(self._listeners[lane]) as listener:
            ignore_callers(listener)

    def _let_in(self, lane: Lane) -> None:
        del self._shut[lane]
        with borrowed(self._listeners[lane]) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def _hang_up(self, connection: Connection | None, why: str) -> None:
        if connection is not None and not connection.closed:
            self._tally.counters["hung_up"] += 1
            connection.unread = 0.0
            connection.hang_up()
            host = str(connection.peer[0]).removeprefix("::ffff:")
            self._tally.log_once("hung up", f"{host} {why}", "hung up on a connection from %s: %s", host, why)

    def _look_for_unread(self, now: float) -> None:
        """Hangs up on connections on which more has come than should wait: because no message ever ends
        (then nothing is left to take, and more has come than the largest message has), or because more
        comes than we can take."""
        passed = now - self._looked
        for connection in self.connections.values():
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
        if sum(c.unread for c in self.connections.values()) > UNREAD_ALL:
            most = max(self.connections.values(), key=lambda c: c.unread)
            self._hang_up(most, "it sends most, and together they send more than this node can take")
        self._emptied.clear()
        self.useless.clear()
        self._looked = now

    def _on_accepted(self, lane: Lane, fd: int) -> None:
        try:
            with borrowed(fd) as s:
                connection = Connection(lane, fd, s.getpeername())
        except OSError:
            return  # it has ended again
        if len(self.connections) < self._most_connections:
            self.connections[lane, fd] = connection
        else:
            self._hang_up(connection, "this node has as many connections as it can have")
