"""How a node without a mesh comes to one: it founds it with its peers, or joins that of its peers.

It says hello to all addresses that it was started with. If somebody there belongs to a mesh, it asks
to become a member, again and again, until the chain says that it is one. Otherwise the mesh is formed
by all listed nodes together (`mesh.forming`).
"""

from __future__ import annotations

from random import Random

from vstack.mesh.config import Config, Member
from vstack.mesh.forming import Forming
from vstack.mesh.links import Link
from vstack.mesh.messages import Failure, GetConfig, Hello, Join
from vstack.mesh.paxos.acceptor import Acceptor

JOIN_EVERY = 1.0
"""Seconds between two requests to be let in."""


class Entrance:
    """Until this node has a mesh."""

    def __init__(
        self, me: Member, boot: int, addresses: tuple[str, ...], acceptor: Acceptor, rng: Random
    ) -> None:
        self.forming = Forming(me.node, boot, tuple(sorted(set(addresses))), acceptor, rng)
        self._me = me
        self._mesh_at: dict[str, Link] = {}
        """Connections on which somebody spoke of a mesh."""
        self._join_at = 0.0
        self._answer = ""

    @property
    def decided(self) -> Config | None:
        """The first configuration, if this node founded the mesh with the others."""
        return self.forming.decided

    def on_hello(self, link: Link, hello: Hello) -> None:
        """Who is at one of the listed addresses."""
        self.forming.met(link.address, hello)
        if hello.mesh and hello.node != self._me.node:
            self._mesh_at[link.address] = link
        else:
            self._mesh_at.pop(link.address, None)

    def on_failure(self, failure: Failure) -> None:
        """Why a mesh does not let this node in yet."""
        self._answer = failure.text

    def on_joined(self) -> None:
        """The mesh has let this node in; its chain is asked for next."""
        self._join_at = 0.0

    def tick(self, now: float, after: int) -> list[tuple[Link, GetConfig | Join]]:
        """What to send where, now. `after`: the epoch up to which the mesh's chain is known."""
        if not self._mesh_at:
            self.forming.tick(now)
            return []
        if now < self._join_at:
            return []
        self._join_at = now + JOIN_EVERY
        addresses = sorted(self._mesh_at)
        link = self._mesh_at[addresses[int(now / JOIN_EVERY) % len(addresses)]]
        return [(link, Join(self._me)), (link, GetConfig(after))]

    def waiting_for(self) -> str:
        """In words."""
        if self._mesh_at:
            return f"joining the mesh at {', '.join(sorted(self._mesh_at))}: {self._answer or 'asked'}"
        return "; ".join(self.forming.waiting_for()) or "deciding"
