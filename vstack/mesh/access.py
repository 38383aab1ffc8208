"""Who may do what: from the public key of a message's sender to an answer in words.

Pure. ZeroMQ tells with every message which key its connection proved to hold; nothing that a hello
says about its sender counts for more than that. Who a key belongs to is looked up for each message
in the configuration as it is then, so a revocation takes effect on open connections.

There are two ladders. Clients: an admin may do what a writer may, and a writer what a reader may.
Nodes: a member, identified by its own key; below it whoever holds the mesh's own key pair and is
no member (yet). Such a node may learn of the mesh and ask to join it; while there is no mesh, it is
a founder, and its votes on founding one count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import msgspec

from vstack.mesh.config import Config, Grant, NodeId
from vstack.mesh.messages import (
    Body,
    Chain,
    ChangeMesh,
    Envelope,
    Failure,
    ForceConfig,
    GetConfig,
    GetHoldings,
    GetInventory,
    GetPiece,
    GetStatus,
    GetUsage,
    Hasten,
    Hello,
    HelloRequired,
    Holdings,
    Inventory,
    Join,
    List,
    Listing,
    MeshChanged,
    Noted,
    Outcomes,
    PieceData,
    Ping,
    PingRequest,
    Pong,
    PutPiece,
    Scan,
    ScanReply,
    Status,
    Stored,
    Submit,
    Usage,
    Viewed,
)

ClientRole = Literal["reader", "writer", "admin"]
NodeRole = Literal["joining", "founder", "node"]

_RANK: Final = {"reader": 0, "writer": 1, "admin": 2, "joining": 0, "founder": 1, "node": 2}


class Identity(NamedTuple):
    """Whom a key belongs to."""

    role: ClientRole | NodeRole
    name: str = ""
    """A client's, for people."""
    node: NodeId = ""
    """A member's."""

    @property
    def is_client(self) -> bool:
        return self.role in ("reader", "writer", "admin")

    def __str__(self) -> str:
        if self.node:
            return f"node {self.node[:8]}"
        if self.is_client:
            return f"{self.role} {self.name}".rstrip()
        return "a node that is no member"


class Least(NamedTuple):
    """The least that a sender must be, on each ladder; None: nobody on it may."""

    client: ClientRole | None
    node: NodeRole | None


READ: Final = Least("reader", "node")
WRITE: Final = Least("writer", "node")
NOBODY: Final = Least(None, None)

TABLE: Final[Mapping[type[Body], Least]] = {
    Hello: Least("reader", "joining"),
    GetConfig: Least("reader", "joining"),
    GetStatus: READ,
    GetHoldings: READ,
    GetUsage: READ,
    GetInventory: READ,
    Hasten: WRITE,
    List: READ,
    GetPiece: READ,
    Viewed: READ,
    Submit: WRITE,  # with reads only: READ, see `least`
    PutPiece: WRITE,
    ChangeMesh: Least("admin", None),
    ForceConfig: Least("admin", None),
    Join: Least(None, "joining"),
    # A stranger learns from gossip which epoch it is, and nothing is taken from it.
    Ping: Least(None, "joining"),
    PingRequest: Least(None, "joining"),
    Pong: Least(None, "joining"),
    Envelope: Least(None, "founder"),
    Scan: Least(None, "node"),
    # Answers. Nobody sends them unasked.
    HelloRequired: NOBODY,
    Failure: NOBODY,
    Chain: NOBODY,
    Outcomes: NOBODY,
    ScanReply: NOBODY,
    Listing: NOBODY,
    Holdings: NOBODY,
    Usage: NOBODY,
    Inventory: NOBODY,
    Stored: NOBODY,
    PieceData: NOBODY,
    Status: NOBODY,
    MeshChanged: NOBODY,
    Noted: NOBODY,
}


DEEDS: Final[Mapping[type[Body], str]] = {
    Hello: "connect to this mesh",
    GetConfig: "see who is in the mesh",
    GetStatus: "see how the nodes are",
    GetHoldings: "see what the nodes hold",
    GetUsage: "see what the nodes hold",
    GetInventory: "see what the nodes hold",
    Hasten: "hasten repair, scrub or garbage collection",
    List: "list videos",
    GetPiece: "read videos",
    Viewed: "count views",
    Submit: "store or change videos",  # with reads only: see `deed`
    PutPiece: "store or change videos",
    ChangeMesh: "change who is in the mesh, or who may use it",
    ForceConfig: "change who is in the mesh, or who may use it",
    Join: "join the mesh",
    Ping: "gossip with nodes",
    PingRequest: "gossip with nodes",
    Pong: "gossip with nodes",
    Envelope: "vote",
    Scan: "read the votes of nodes",
}
"""What a sender wants with each request, in the words of whoever uses the mesh: "you may not ..."."""


def deed(body: Body) -> str:
    """What the sender of a request wants, as in `DEEDS`."""
    return "read videos" if isinstance(body, Submit) and least(body) == READ else DEEDS[type(body)]


def least(body: Body) -> Least:
    """The least that the sender of `body` must be."""
    if isinstance(body, Submit) and all(op.expect is None for op in body.ops):
        return READ
    return TABLE[type(body)]


def allowed(who: Identity | None, body: Body) -> str | None:
    """None if `who` (None: a key that belongs to nobody) may send `body`, else why not, in words."""
    if who is None:
        return "this key was revoked, or was never one of this mesh's: ask an admin of it"
    needed = least(body)
    on_ladder = needed.client if who.is_client else needed.node
    if on_ladder is not None and _RANK[who.role] >= _RANK[on_ladder]:
        return None
    if needed == NOBODY:
        return f"{type(body).__name__} is not a request"
    refused = f"you may not {deed(body)}: that"
    if who.is_client and on_ladder is not None:
        return f"{refused} needs the role {on_ladder}, and this key's is {who.role}: ask an admin of the mesh"
    if who.is_client:
        return f"{refused} is for nodes, and this key is a client's"
    if on_ladder is None:
        return f"{refused} needs the key of a client with the role {needed.client}"
    return f"{refused} is for members of the mesh, and this is {who}"


@dataclass(frozen=True)
class Directory:
    """Whose keys are known, and as whose."""

    people: Mapping[bytes, Identity]
    """By public key."""
    members: frozenset[NodeId]
    """Nodes that are known by a key of their own."""

    def believed(self, who: Identity, hello: Hello) -> Hello | str:
        """The hello as it is to be taken, or in words why it is refused.

        A node that holds the mesh's key pair and says it is a member may be one that has not learned
        so yet. Until it comes with its own key it can be anybody: it is taken as a stranger, who may
        learn the configuration.
        """
        if hello.role == "client":
            return hello
        if who.is_client:
            return f"this key is a client's ({who}), not a node's"
        if who.role == "node" and hello.node != who.node:
            return f"this key is that of node {who.node[:8]}, not of {hello.node[:8]}"
        if who.role != "node" and hello.node in self.members:
            return msgspec.structs.replace(hello, role="client", node="")
        return hello


def directory(configs: Sequence[Config], mesh_key: bytes, founders: Iterable[Grant]) -> Directory:
    """Whom to admit, by the open configurations, oldest first; none: a mesh is to be founded.

    Members of every open epoch that are not lost, each by its newest key; clients by the newest
    configuration alone.
    """
    lost = {n for c in configs for n in c.lost}
    keys = {m.node: m.key for c in configs for m in c.members if m.key and m.node not in lost}
    grants = configs[-1].grants if configs else tuple(founders)
    people: dict[bytes, Identity] = {g.key: Identity(g.role, g.name) for g in grants}
    people |= {key: Identity("node", node=node) for node, key in keys.items()}
    people[mesh_key] = Identity("joining" if configs else "founder")
    return Directory(people, frozenset(keys))
