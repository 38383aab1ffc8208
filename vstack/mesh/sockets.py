"""What the sockets of the mesh have in common, on nodes and on clients.

This file decides which lanes there are and where they lie, how much may wait to be sent, how large a part
of a message may be, how soon a silent connection counts as broken, and what a socket monitor's words mean.
What is sent and received is none of its business.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from enum import Enum
from typing import Final

import zmq
import zmq.asyncio

from vstack.errors import UsageError
from vstack.mesh.config import host_and_port
from vstack.mesh.keys import KeyPair
from vstack.mesh.messages import MAX_CONTROL, MAX_DATA

NO_REPLY: Final = bytes(8)
"""The correlation id of a message that expects no reply."""


class Lane(Enum):
    CONTROL = "control"
    DATA = "data"


HIGH_WATER = {Lane.CONTROL: 512, Lane.DATA: 32}
"""Messages that may wait in a socket to be sent on a connection: what a peer that reads nothing can cost."""
MAX_PART = {Lane.CONTROL: MAX_CONTROL, Lane.DATA: MAX_DATA}
DRAIN = 256
"""Messages that a node takes from one socket before the others get their turn."""
REFUSED_AGAIN = 1.0
"""Seconds after which a peer that refused our key is asked again: it may have learnt it."""
SILENT_HANDSHAKES = 3
"""Handshakes in a row that the far side ended without a reason, before we name the likely one."""
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENT: Final = struct.Struct("=HI")
"""Of a socket monitor: which event, and its value."""


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
    found = host_and_port(text)
    if found is None:
        raise UsageError(f"{text!r} is not an address: HOST:PORT, with a port below 65535, is needed")
    return found


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


def events(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """What a socket monitor has to say just now: (zmq.EVENT_..., its value)."""
    while True:
        try:
            frames = monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        event, value = _EVENT.unpack(frames[0])
        yield event, value


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
