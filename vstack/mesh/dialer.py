"""The client's side of a connection, for asyncio: one DEALER to one lane of one node.

Requests are numbered and may overlap; each has a deadline. A connection that breaks, that cannot
be made, or whose heartbeats stop (1.5 s) fails everything that waits on it at once, instead of
leaving it to time out: the socket monitor tells. Nothing is resent here, except to a node that
asks for a hello first, because such a node has not looked at the request.

With keys, a handshake that fails says so at once, and as far as ZeroMQ tells, why. After a definite
no the socket does not try again: the connection is `gone`, and whoever wants another one makes it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from dataclasses import dataclass
from itertools import count
from time import monotonic

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from vstack.errors import MeshUnavailable, VstackError
from vstack.mesh.keys import ClientKey, short
from vstack.mesh.messages import PROTOCOL_VERSION, Body, Failure, Header, Hello, HelloRequired, decode, encode
from vstack.mesh.transport import (
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
        context: zmq.asyncio.Context,
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
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, lane)
        self._socket.routing_id = b"c" + os.urandom(16)
        self._socket.set(zmq.RECONNECT_IVL, 100)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        if key is not None:
            speak_as(self._socket, key.pair, key.mesh)
        self._broken: NoAnswer | None = None
        """Why nobody can be reached just now; requests fail at once until the connection is back."""
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )  # fmt: skip
        self._socket.connect(endpoint(address, lane))
        first = self._send([NO_REPLY, self._hello()])
        self._tasks = [asyncio.create_task(self._receive(first)), asyncio.create_task(self._watch())]

    @property
    def gone(self) -> bool:
        """Whether its keys were refused, long enough ago to try again with a new connection."""
        return self._refused_at is not None and monotonic() - self._refused_at > REFUSED_AGAIN

    def _hello(self) -> bytes:
        return encode(Header(Hello(PROTOCOL_VERSION, self.mesh, "client")))

    def _send(self, parts: list[bytes | memoryview]) -> Awaitable[object]:
        """Begins to send at once, in the order of the calls; to be awaited."""
        return self._socket.send_multipart(parts, copy=len(parts) < 3)

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
        pending = _Pending(parts, asyncio.get_running_loop().create_future())
        self._pending[number] = pending
        try:
            async with asyncio.timeout(timeout):
                await self._send(parts)
                answer = await pending.done
        except zmq.ZMQError as e:
            raise NoAnswer(f"{self.address} takes no more requests: {e.strerror}") from e
        except TimeoutError:
            raise NoAnswer(f"{self.address} did not answer within {timeout:.1f} s") from None
        finally:
            self._pending.pop(number, None)
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
        for task in self._tasks:
            task.cancel()
        self._fail(NoAnswer(f"the connection to {self.address} was closed"))
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)

    def _fail(self, error: NoAnswer | Refused) -> None:
        for pending in list(self._pending.values()):
            if not pending.done.done():
                pending.done.set_exception(error)

    async def _receive(self, hello: Awaitable[object]) -> None:
        await hello
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            if not 2 <= len(frames) <= 3:
                continue
            number = frames[0].bytes
            pending = self._pending.get(number)
            try:
                header = decode(frames[1].buffer)
            except msgspec.DecodeError:
                continue  # its request will time out: a node that talks nonsense counts as silent
            if number == NO_REPLY and isinstance(header.body, Failure):
                self._fail(Refused(header.body))  # our hello: this node will do nothing for us
                continue
            if pending is None or pending.done.done():
                continue  # an answer that nobody waits for any more
            if isinstance(header.body, HelloRequired):
                pending.hellos += 1
                if pending.hellos > MAX_HELLOS:
                    continue  # it asks again and again: counts as silent
                await self._send([NO_REPLY, self._hello()])
                await self._send(pending.parts)
                continue
            payload = frames[2].buffer if len(frames) == 3 else memoryview(b"")
            pending.done.set_result(Answered(header, payload))

    async def _watch(self) -> None:
        while True:
            event = await recv_monitor_message(self._monitor)
            kind = event["event"]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._broken = None
                self._silent_handshakes = 0
                continue
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
        return f"is of another mesh than the key {self._key.name} is for, or is no vstack node"


def _again(error: NoAnswer) -> NoAnswer:
    """The same error for another request: an exception carries the traceback of one."""
    return type(error)(str(error))
