"""How a node was started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vstack.errors import VstackError
from vstack.mesh.keys import NodeKeys


class NotOurMesh(VstackError):
    """The data directory belongs to another mesh than the peers do, or must not be used any more."""

    exit_code = 4


class Removed(VstackError):
    """This node is not a member of its mesh any more, and nobody needs its votes."""


@dataclass(frozen=True)
class NodeSettings:
    """How a node was started."""

    listen: str
    """host:port to bind."""
    advertise: str
    """host:port that others dial."""
    data: Path
    peers: tuple[str, ...] = ()
    zone: str = ""
    weight: int = 1
    vote_journal: Path | None = None
    """Where to append every vote accepted, for audits."""
    found: bool = False
    """Found a mesh of one, whatever else is out there."""
    keys: NodeKeys | None = None
    """None: connections are neither encrypted nor authenticated."""
    scrub_days: float = 7.0
    """Days of running time in which every piece is read once."""
    reserve: float = 0.05
    """The share of the file system, 0 to 1, that uploads leave free."""

    @property
    def public_key(self) -> bytes:
        """This node's; empty without keys."""
        return self.keys.own.public if self.keys else b""
