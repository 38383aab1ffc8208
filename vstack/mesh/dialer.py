"""The client's side of a connection, for asyncio: one DEALER to one lane of one node.

Requests are numbered and may overlap; each has a deadline. A connection that breaks, that cannot
be made, or whose heartbeats stop (1.5 s) fails everything that waits on it at once, instead of
leaving it to time out: the socket monitor tells. Nothing is resent here, except to a node that
asks for a hello first, because such a node has not looked at the request.

The sockets are plain ones, without a task of their own: the event loop watches their file descriptors,
which is a third of what `zmq.asyncio` costs a request. libzmq's descriptor becomes readable when
something *may* have happened, once: so whatever wakes us, and each send, is followed by a look at
ZMQ_EVENTS, and all that has come is taken.

With keys, a handshake that fails says so at once, and as far as ZeroMQ tells, why. After a definite
no the socket does not try again: the connection is `gone`, and whoever wants another one makes it.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from vstack.errors import MeshUnavailable, UsageError, VstackError
from vstack.mesh.keys import ClientKey, short
from vstack.mesh.messages import PROTOCOL_VERSION, Body, Failure, Header, Hello, HelloRequired, decode, encode
from vstack.mesh.sockets import (
    NO_REPLY,
    REFUSED_AGAIN,
    SILENT_HANDSHAKES,
    Lane,
    Refusal,
    endpoint,
    set_options,
    speak_as,
    why_refused,
)

MAX_HELLOS = 3
"""Hellos that one request is worth."""
DRAIN = 64
"""Messages taken before other tasks of the event loop get their turn."""


class NoAnswer(MeshUnavailable):
    """The node did not answer in time, or the connection to it broke. The request may have been done."""


class KeyRefused(NoAnswer):
    """The handshake failed because of the keys: this client's, the mesh's, or because there are none."""

    exit_code = 2


class Refused(VstackError):
    """The node answered, and its answer is no. `code` is one of `messages.FAILURES`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.code = failure.code
        if failure.code == "forbidden":
            self.exit_code = UsageError.exit_code


@dataclass(slots=True, frozen=True)
class Answered:
    header: Header
    payload: memoryview
    """Empty, or the payload part: the socket's own memory, not a copy."""


@dataclass(slots=True)
class _Pending:
    parts: list[bytes | memoryview]
    done: asyncio.Future[Answered]
    hellos: int = 0
    """How often the node asked for a hello before it would look at this request."""


class Dialer:
    """One connection. Close it with `close`; after that every request fails with NoAnswer."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        lane: Lane,
        mesh: str,
        key: ClientKey | None = None,
    ) -> None:
        """Without `key`, the connection is neither encrypted nor authenticated."""
        self.address = address
        self.lane = lane
        self.mesh = mesh
        """Sent in the hello; empty if not known yet."""
        self._key = key
        self._silent_handshakes = 0
        self._refused_at: float | None = None
        self._numbers = count(1)
        self._pending: dict[bytes, _Pending] = {}
        self._unsent: deque[list[bytes | memoryview]] = deque()
        """What the socket has no room for just now, in order."""
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.DEALER, socket_class=zmq.Socket)
        set_options(self._socket, lane)
        self._socket.routing_id = b"c" + os.urandom(16)
        self._socket.set(zmq.RECONNECT_IVL, 100)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        if key is not None:
            speak_as(self._socket, key.pair, key.mesh)
        self._broken: NoAnswer | None = None
        """Why nobody can be reached just now; requests fail at once until the connection is back."""
        watched = (
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )  # fmt: skip
        told = f"inproc://dialer.{os.urandom(16).hex()}"
        self._socket.monitor(told, watched)
        self._monitor = context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._monitor.connect(told)
        self._loop.add_reader(self._socket.FD, self._look)
        self._loop.add_reader(self._monitor.FD, self._watch)
        self._socket.connect(endpoint(address, lane))
        self._send([NO_REPLY, self._hello()])
        self._watch()

    @property
    def gone(self) -> bool:
        """Whether its keys were refused, long enough ago to try again with a new connection."""
        return self._refused_at is not None and monotonic() - self._refused_at > REFUSED_AGAIN

    def _hello(self) -> bytes:
        return encode(Header(Hello(PROTOCOL_VERSION, self.mesh, "client")))

    def _send(self, parts: list[bytes | memoryview]) -> None:
        """Now, or in the order of the calls when there is room. Raises zmq.ZMQError."""
        if self._unsent or not self._takes(parts):
            self._unsent.append(parts)
        self._heed()

    def _heed(self) -> None:
        """After a send, which may have taken from the descriptor the news that something has come."""
        now = int(self._socket.EVENTS)
        if now & zmq.POLLIN or (self._unsent and now & zmq.POLLOUT):
            self._loop.call_soon(self._look)

    def _takes(self, parts: list[bytes | memoryview]) -> bool:
        """Whether the socket has room for it, and has it now. Raises zmq.ZMQError."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=len(parts) < 3)
        except zmq.Again:
            return False
        return True

    async def request(self, body: Body, payload: bytes | memoryview = b"", *, timeout: float) -> Answered:
        """Sends `body` and returns the answer. `timeout` is in seconds; the node is given nine tenths of
        it, so that what it has to say in the end still arrives.

        Raises NoAnswer (KeyRefused is one), Refused.
        """
        number = next(self._numbers).to_bytes(8)
        parts: list[bytes | memoryview] = [number, encode(Header(body, min(600_000, int(timeout * 900))))]
        if payload:
            parts.append(payload)
        if self._broken is not None:
            raise _again(self._broken)
        if self._socket.closed:
            raise NoAnswer(f"{self.address}: the connection was closed")
        pending = _Pending(parts, self._loop.create_future())
        self._pending[number] = pending
        timer = self._loop.call_later(timeout, self._late, pending, timeout)
        try:
            self._send(parts)
            answer = await pending.done
        except zmq.ZMQError as e:
            raise NoAnswer(f"{self.address} takes no more requests: {e.strerror}") from e
        finally:
            timer.cancel()
            self._pending.pop(number, None)
            if self._unsent:  # nobody waits for its answer any more
                self._unsent = deque(other for other in self._unsent if other is not parts)
        if isinstance(answer.header.body, Failure):
            raise Refused(answer.header.body)
        return answer

    async def hello(self, timeout: float) -> Hello:
        """Asks the node who it is. Raises NoAnswer, Refused."""
        answer = await self.request(Hello(PROTOCOL_VERSION, self.mesh, "client"), timeout=timeout)
        if not isinstance(answer.header.body, Hello):
            raise NoAnswer(f"{self.address} answered a hello with {type(answer.header.body).__name__}")
        return answer.header.body

    def close(self) -> None:
        self._fail(NoAnswer(f"the connection to {self.address} was closed"))
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
            self._loop.remove_reader(self._monitor.FD)
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)

    def _fail(self, error: NoAnswer | Refused) -> None:
        for pending in list(self._pending.values()):
            if not pending.done.done():
                pending.done.set_exception(error)

    def _late(self, pending: _Pending, timeout: float) -> None:
        if not pending.done.done():
            pending.done.set_exception(NoAnswer(f"{self.address} did not answer within {timeout:.1f} s"))

    def _look(self) -> None:
        """Takes what has come, and sends what has waited for room."""
        for _ in range(DRAIN):
            if self._socket.closed:
                return
            try:
                parts = self._receive()
            except zmq.Again:
                break
            self._on_message(parts)
        else:
            self._loop.call_soon(self._look)
        if self._unsent and not self._socket.closed:
            while self._unsent and self._takes(self._unsent[0]):
                self._unsent.popleft()
            self._heed()

    def _receive(self) -> Sequence[bytes | memoryview]:
        """One message; a piece is not copied. Raises zmq.Again."""
        if self.lane is Lane.CONTROL:
            small: list[bytes] = self._socket.recv_multipart(zmq.NOBLOCK)
            return small
        return [f.buffer for f in self._socket.recv_multipart(zmq.NOBLOCK, copy=False)]

    def _watch(self) -> None:
        """Hears what became of the connection."""
        while not self._monitor.closed:
            try:
                event = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_event(event)

    def _on_message(self, parts: Sequence[bytes | memoryview]) -> None:
        if not 2 <= len(parts) <= 3:
            return
        number = bytes(parts[0])
        pending = self._pending.get(number)
        try:
            header = decode(parts[1])
        except msgspec.DecodeError:
            return  # its request will time out: a node that talks nonsense counts as silent
        if number == NO_REPLY and isinstance(header.body, Failure):
            self._fail(Refused(header.body))  # our hello: this node will do nothing for us
            return
        if pending is None or pending.done.done():
            return  # an answer that nobody waits for any more
        if isinstance(header.body, HelloRequired):
            pending.hellos += 1
            if pending.hellos <= MAX_HELLOS:  # else it asks again and again: counts as silent
                self._send([NO_REPLY, self._hello()])
                self._send(pending.parts)
            return
        payload = memoryview(parts[2]) if len(parts) == 3 else memoryview(b"")
        pending.done.set_result(Answered(header, payload))

    def _on_event(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)
        kind = event["event"]
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._broken = None
            self._silent_handshakes = 0
            return
        if kind not in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CONNECT_RETRIED):
            self._on_handshake_failed(why_refused(kind, event["value"]))
        elif not isinstance(self._broken, KeyRefused):
            how = "the connection broke" if kind == zmq.EVENT_DISCONNECTED else "nobody answers there"
            self._broken = NoAnswer(f"{self.address}: {how}")
        if self._broken is not None:
            self._fail(self._broken)

    def _on_handshake_failed(self, refusal: Refusal) -> None:
        if refusal is Refusal.SILENT:
            self._silent_handshakes += 1
            if self._silent_handshakes < SILENT_HANDSHAKES:
                return  # its reason may have been lost with the connection: it is tried again
        else:
            self._refused_at = monotonic()
        self._broken = KeyRefused(f"{self.address} {self._in_words(refusal)}")

    def _in_words(self, refusal: Refusal) -> str:
        if self._key is None:
            return "admits only clients with a key, or is no vstack node: name your key file with --keys"
        if refusal is Refusal.KEY:
            public = self._key.pair.public
            return (
                f"does not admit the key {short(public)}... ({self._key.name}): it was revoked, or never "
                f"authorised. An admin of the mesh can: vstack keys authorise {public.hex()} --role ROLE"
            )
        if refusal is Refusal.SECURITY:
            return f"uses no keys, and you came with one ({self._key.name}): say --keys none"
        return (
            f"is of another mesh than the key {self._key.name} is for, or uses no keys "
            "(then say --keys none), or is no vstack node"
        )


def _again(error: NoAnswer) -> NoAnswer:
    """The same error for another request: an exception carries the traceback of one."""
    return type(error)(str(error))
