"""Keys at a node's sockets: who may come in and send what, and with which key we come to others.

With keys, every connection is CURVE: the ROUTERs have the mesh's key pair, and whoever dials has one
of its own. CURVE alone admits any key, so libzmq asks at each handshake, over ZAP (rfc.zeromq.org/spec/27),
whether this one may come in; it is answered from the `Directory` that was given last, between two
messages, without a thread. A stalled reactor delays handshakes, as it delays everything else. libzmq
cannot close one peer of a ROUTER, so each message is checked again by the key of its connection.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import zmq

from vstack.mesh.access import Directory, Identity, allowed, directory
from vstack.mesh.keys import NodeKeys, short
from vstack.mesh.messages import Body, Failure, Hello
from vstack.mesh.sockets import DRAIN, speak_as
from vstack.mesh.tally import Tally

MAX_REFUSALS = 2
"""Refusals of our own key after which we come with the mesh's: we may have been removed meanwhile, and
as a stranger we can learn that."""
MAX_MET = 1024
"""Keys of nodes that are known from their hellos only."""
ZAP: Final = "inproc://zeromq.zap.01"
"""Where libzmq asks; bound before anybody can connect."""


class Gate:
    """Of one node of a mesh with keys."""

    def __init__(self, keys: NodeKeys, tally: Tally) -> None:
        self._keys = keys
        self._tally = tally
        self._is_member = False
        """Whether we are known by our own key, and dial with it: with the mesh's until then."""
        self._directory = directory((), keys.mesh.pair.public, keys.mesh.admins)
        self._met: set[bytes] = set()
        """Keys that somebody who holds the mesh's secret key named as its own."""
        self._revoked: set[bytes] = set()
        self._refusals: Counter[str] = Counter()
        """How often each address has refused our own key, since it last admitted it."""

    @property
    def own(self) -> bytes:
        """The public key of this node."""
        return self._keys.own.public

    # -- who comes to us --------------------------------------------------------------------------

    def guard(self, router: zmq.Socket[bytes]) -> None:
        """Before it is bound: only CURVE, and only whom `answer` admits."""
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, self._keys.mesh.pair.secret)
        router.set(zmq.ZAP_DOMAIN, b"vstack")
        router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody to ask: nobody is admitted

    def admit(self, whom: Directory) -> bool:
        """From now on these may connect and send; for those who are connected it counts from their next
        message. True if our own key has become a member's: from now on we are known by it, and connections
        have to be made anew.
        """
        self._revoked |= self._directory.people.keys() - whom.people.keys()
        self._revoked -= whom.people.keys()
        self._met -= self._revoked
        self._directory = whom
        me = whom.people.get(self.own)
        self._refusals.clear()
        if self._is_member or me is None or me.role != "node":
            return False
        self._is_member = True
        return True

    @property
    def _is_forming(self) -> bool:
        founders = self._directory.people.get(self._keys.mesh.pair.public)
        return founders is not None and founders.role == "founder"

    def _identity(self, key: bytes) -> Identity | None:
        """Whose key that is just now, None if nobody's."""
        if key in self._met and key not in self._directory.people:
            return self._directory.people.get(self._keys.mesh.pair.public)
        return self._directory.people.get(key)

    def meet(self, key: bytes) -> None:
        """A node that we dialled says that it will come with this key. It has proved to hold the mesh's
        secret key, and could come with that one as well."""
        if len(key) == 32 and len(self._met) < MAX_MET and key not in self._revoked:
            self._met.add(key)

    def answer(self, zap: zmq.Socket[bytes]) -> None:
        """Answers libzmq's questions about keys, one for each handshake."""
        for _ in range(DRAIN):
            try:
                _, number, _, address, _, mechanism, *credentials = zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            key = credentials[0] if mechanism == b"CURVE" and credentials else b""
            if self._identity(key) is not None:
                answer = [b"200", b"OK", key.hex().encode(), b""]
            else:
                answer = [b"400", b"", b"", b""]
                self._note_stranger(key, address.decode(errors="replace").removeprefix("::ffff:"))
            zap.send_multipart([b"1.0", number, *answer])

    def _note_stranger(self, key: bytes, address: str) -> None:
        if self._is_forming and len(key) == 32:
            # It may be that of a member of the mesh, of which this node has not heard yet.
            self._tally.counters["keys.unknown_while_forming"] += 1
            return
        revoked = key in self._revoked
        self._count_refused("revoked" if revoked else "unknown")
        self._tally.log_once(
            "handshake", key.hex(), "a connection from %s was refused: its key %s... %s",
            address, short(key), "was revoked" if revoked else "is not one of this mesh's",
        )  # fmt: skip

    def on_handshake_failed(self, event: int, value: int) -> None:
        """Counts what a ROUTER's monitor says of keys. Whose connection it was is not known: libzmq names
        our own end only."""
        if event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self._count_refused("plain")
            self._tally.log_once("handshake", "plain", "a connection without keys was refused")
        elif value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            self._count_refused("other_mesh")
            self._tally.log_once(
                "handshake", "other", "a connection with the key of another mesh was refused"
            )

    def _count_refused(self, why: str) -> None:
        self._tally.counters["keys.refused"] += 1
        self._tally.counters[f"keys.refused.{why}"] += 1

    def key_of(self, frame: zmq.Frame) -> bytes:
        """The key that the connection of a message proved to hold, as `answer` attached it."""
        return bytes.fromhex(str(frame.get("User-Id")))

    def forbidden(self, key: bytes, body: Body) -> Failure | None:
        """None if the holder of `key` may send `body`; else it is counted, and logged once."""
        who = self._identity(key)
        why = allowed(who, body)
        if why is None:
            return None
        if who is not None and who.role == "founder":
            return Failure("forming", "this node has no mesh yet: it takes nothing from members")
        return self._refuse(key, who, type(body).__name__, why)

    def believed(self, key: bytes, hello: Hello) -> Hello | Failure:
        """The hello as it is to be taken; a refusal is counted, and logged once."""
        who = self._identity(key)
        believed = self._directory.believed(who, hello) if who is not None else hello
        return self._refuse(key, who, "Hello", believed) if isinstance(believed, str) else believed

    def _refuse(self, key: bytes, who: Identity | None, kind: str, why: str) -> Failure:
        self._tally.counters["keys.forbidden"] += 1
        self._tally.log_once(
            kind, key.hex(), "%s refused from key %s... (%s): %s",
            kind, short(key), who or ("revoked" if key in self._revoked else "unknown"), why,
        )  # fmt: skip
        return Failure("forbidden", why[:1000])

    # -- to whom we come --------------------------------------------------------------------------

    def introduce(self, dealer: zmq.Socket[bytes], address: str) -> bool:
        """Gives a socket that will dial `address` the key to come with. True if that is the mesh's although
        we are a member: our own was refused there."""
        mesh = self._keys.mesh.pair
        refusals = self._refusals[address]
        stranger = self._is_member and refusals >= MAX_REFUSALS and refusals % MAX_REFUSALS == 0
        self._refusals[address] += stranger  # the next time with our own again
        speak_as(dealer, self._keys.own if self._is_member and not stranger else mesh, mesh.public)
        return stranger

    def refused_by(self, address: str) -> None:
        """A key that we came with was not admitted there."""
        self._refusals[address] += 1

    def admitted_by(self, address: str) -> None:
        """Our own key was admitted there."""
        self._refusals.pop(address, None)
