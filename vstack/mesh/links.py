"""A node's connections to others: a DEALER to the control lane of each address that it dials.

ZeroMQ's traps, and what is done about each: a DEALER reconnects invisibly and keeps queued messages across
its peer's restart, so a connection is known by its routing id, which holds NodeId, boot, lane and a
counter; a second DEALER under a routing id in use stays deaf, so a new one gets a new id. Everything is
lossy: retries belong to the core, never to the socket. Only hellos are said here without being told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import zmq

from vstack.mesh.config import NodeId
from vstack.mesh.gate import Gate
from vstack.mesh.keys import short
from vstack.mesh.messages import Body, Failure, Header, Hello, HelloRequired, decode, encode
from vstack.mesh.sockets import (
    DRAIN,
    HANDSHAKE_FAILED,
    NO_REPLY,
    REFUSED_AGAIN,
    SILENT_HANDSHAKES,
    Lane,
    Refusal,
    endpoint,
    events,
    set_options,
    why_refused,
)
from vstack.mesh.tally import Tally

STRANGER_FOR = 5.0
"""Seconds after which we try our own key again."""


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


@dataclass(slots=True, eq=False)
class Answer:
    """What a peer sent back on a connection that we opened."""

    link: Link
    correlation: bytes
    header: Header


def is_somebody(hello: Hello) -> bool:
    """Whether a node says who it is: whoever handles its messages relies on its NodeId."""
    return hello.role != "node" or hello.node != ""


class Links:
    """At most one connection to an address."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        my_hello: Callable[[], Hello],
        gate: Gate | None,
        tally: Tally,
    ) -> None:
        """Sockets are registered with `poller`. Without `gate`, connections are neither encrypted nor
        authenticated."""
        self._context = context
        self._poller = poller
        self._my_hello = my_hello
        self._gate = gate
        self._tally = tally
        self._links: dict[str, Link] = {}
        self._by_socket: dict[zmq.Socket[bytes], Link] = {}
        self._monitors: dict[zmq.Socket[bytes], Link] = {}
        self._opened = 0

    def __iter__(self) -> Iterator[Link]:
        """Those of now: they may be closed meanwhile."""
        return iter(tuple(self._links.values()))

    def to(self, node: NodeId) -> Link | None:
        """The connection on which `node` has said hello."""
        return next((k for k in self._links.values() if k.hello and k.hello.node == node), None)

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

    def forbidden(self, link: Link, now: float) -> None:
        """The other end hears nothing of us under our own key any more: as after a refused handshake, it is
        called again, and then as a stranger, who may learn the configuration."""
        if self._gate is not None and link.refused is None and not link.as_stranger:
            link.refused = now
            self._gate.refused_by(link.address)

    def disconnect(self, address: str) -> None:
        link = self._links.pop(address, None)
        if link is not None:
            self._poller.unregister(link.socket)
            del self._by_socket[link.socket]
            monitor = next(m for m, owner in self._monitors.items() if owner is link)
            del self._monitors[monitor]
            self._poller.unregister(monitor)
            link.socket.disable_monitor()
            monitor.close(0)
            link.socket.close(0)

    def reconnect_all(self, now: float) -> None:
        for address in list(self._links):
            self.reconnect(address, now)

    def close(self) -> None:
        for address in list(self._links):
            self.disconnect(address)

    def _open(self, address: str, now: float) -> Link:
        dealer = self._context.socket(zmq.DEALER)
        set_options(dealer, Lane.CONTROL)
        me = self._my_hello()
        self._opened += 1
        counter = self._opened.to_bytes(4)
        dealer.routing_id = b"n" + bytes.fromhex(me.node) + me.boot.to_bytes(8) + b"c" + counter
        stranger = self._gate is not None and self._gate.introduce(dealer, address)
        monitor = dealer.get_monitor_socket(HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(endpoint(address, Lane.CONTROL))
        link = Link(address, dealer, now, as_stranger=stranger)
        self._by_socket[dealer] = link
        self._monitors[monitor] = link
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        self.send(link, me)
        return link

    def send(self, link: Link, body: Body, correlation: bytes = NO_REPLY, budget_ms: int = 0) -> None:
        """Queues one message; it may be lost, and a loss here is counted as `dropped`."""
        try:
            link.socket.send_multipart([correlation, encode(Header(body, budget_ms))], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._tally.counters["dropped"] += 1
            return
        self._tally.count("sent", body)

    def take(self, sock: zmq.Socket[bytes], out: list[Answer], now: float) -> bool:
        """Takes what has come on one of our sockets. False if it is none of ours."""
        if (link := self._by_socket.get(sock)) is not None:
            self._drain(link, out, now)
        elif (link := self._monitors.get(sock)) is not None:
            self._on_monitor(sock, link, now)
        return link is not None

    def _drain(self, link: Link, out: list[Answer], now: float) -> None:
        for _ in range(DRAIN):
            try:
                frames = link.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                return  # closed while its messages were being handled
            if len(frames) < 2 or len(frames[0]) != 8:
                self._tally.malformed(link.address.encode(), f"{len(frames)} parts")
                continue
            try:
                header = decode(frames[1])
            except msgspec.DecodeError as e:
                self._tally.malformed(link.address.encode(), str(e))
                continue
            if isinstance(header.body, Hello) and not is_somebody(header.body):
                self._tally.malformed(link.address.encode(), "a hello without a NodeId")
                continue
            self._tally.count("received", header.body)
            link.heard = now
            if isinstance(header.body, Failure) and header.body.code == "forbidden":
                self.forbidden(link, now)
            if isinstance(header.body, HelloRequired):
                self.send(link, self._my_hello())
                continue
            if isinstance(header.body, Hello) and self._gate is not None:
                self._gate.meet(header.body.key)
            out.append(Answer(link, frames[0], header))

    def _on_monitor(self, monitor: zmq.Socket[bytes], link: Link, now: float) -> None:
        for event, value in events(monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                link.silent_handshakes = 0
                if self._gate is not None and not link.as_stranger:
                    self._gate.admitted_by(link.address)
                continue
            refusal = why_refused(event, value)
            if refusal is Refusal.SILENT:
                link.silent_handshakes += 1
            else:
                link.refused = now
                if self._gate is not None and refusal is Refusal.KEY:
                    self._gate.refused_by(link.address)
            if refusal is not Refusal.SILENT or link.silent_handshakes >= SILENT_HANDSHAKES:
                why = self._refusal_in_words(refusal)
                self._tally.log_once(
                    f"link {refusal.value}", link.address, "%s refuses this node: %s", link.address, why
                )

    def _refusal_in_words(self, refusal: Refusal) -> str:
        if self._gate is None:
            return "it uses keys, or is no vstack node: start this node with --keys"
        if refusal is Refusal.KEY:
            return f"it does not know this node's key {short(self._gate.own)}... (yet, or any more)"
        if refusal is Refusal.SECURITY:
            return "it uses no keys: start it with --keys"
        return "it has another mesh.key than this node, or is no vstack node"
