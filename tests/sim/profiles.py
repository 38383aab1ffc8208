"""What a simulated world suffers, and what its clients do.

A uniform mix of faults misses bugs that lopsided ones find, so there are profiles, and `mixed`
draws a mix of its own from every seed (swarm testing).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random


@dataclass(frozen=True)
class Profile:
    """Probabilities are per message or per choice; rates are per virtual second; times in seconds."""

    sizes: tuple[int, ...] = (3, 3, 3, 3, 4, 5, 5, 7)
    """How many nodes; one is drawn."""
    clients: int = 4
    ops: int = 40
    """Operations until the clients stop."""
    horizon: float = 4.0
    """When faults stop and everything heals."""
    think: float = 0.2
    """Mean pause of a client between two operations."""
    patience: float = 0.8
    """Mean time after which a client tries again elsewhere; the first try may still be going on."""
    videos: int = 1
    chunks: int = 3
    """Chunk registers per video."""
    create: float = 0.25
    read: float = 0.3
    delete: float = 0.05
    """What is left are compare-and-swaps of a version seen before."""
    stale: float = 0.1
    """A compare-and-swap names an old version."""
    through_leader: float = 0.5
    """A chunk's create goes to its implicit leader."""
    rush: float = 0.2
    """Other clients do something to the same key in the same instant."""
    same_node: float = 0.5
    """They do it through the same node."""
    echo: float = 0.1
    """An operation that was answered is sent once more."""
    sync: float = 0.004
    """Mean time of a commit."""
    delay: float = 0.004
    """Mean time of a message, beyond the distance."""
    distance: float = 0.0
    """Least time of a message."""
    loss: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    """A message takes up to half a second."""
    undead: float = 0.0
    """A message takes up to twice the horizon, whoever restarts meanwhile."""
    lost_outcome: float = 0.0
    """An outcome never reaches its client."""
    crashes: float = 0.0
    power_cuts: float = 0.0
    """All nodes at once."""
    downtime: float = 0.3
    partitions: float = 0.0
    cuts: float = 0.0
    """One direction between two nodes."""
    outage: float = 0.4
    """Mean length of a partition or cut."""
    damage: float = 0.0
    """A record of one node becomes unreadable."""

    gossip: float = 0.0
    """Seconds between two statements of a node; 0: the mesh never changes, and nobody gossips."""
    kindness: float = 0.5
    spares: int = 0
    """Machines that are no members, and may become some."""
    changes: float = 0.0
    """Changes of the configuration that administrators try, per second."""
    script: str = ""
    """`regrow`: from the first size up to all machines, and back to one."""
    adds: float = 1.0
    """Weights of the kinds of changes."""
    removes: float = 1.0
    drains: float = 0.5
    grants: float = 0.3
    rivals: float = 0.0
    """Another administrator makes another change in the same instant."""
    losses: float = 0.0
    """A disk is lost, and its machine comes back as another node. As many as the mesh can take."""
    restores: float = 0.3
    """The share of lost disks that come back as they once were."""
    absences: float = 0.0
    """A node is down for a long time."""
    absence: float = 2.5
    """Mean length of it."""
    batches: float = 0.0
    """All clients that are idle create neighbouring chunks in one request."""
    uploads: float = 0.0
    """A client's operation is on a register of a new upload, in the epoch that its node knows."""
    forming: bool = False
    """No mesh exists at the start."""
    disaster: bool = False
    """Most members are lost for good at some time, and an operator forces the mesh on."""


_STORMY = Profile(loss=0.03, duplicate=0.05, slow=0.05, lost_outcome=0.05)

PROFILES: dict[str, Profile] = {
    "calm": Profile(),
    "crashy": replace(_STORMY, crashes=2.5, power_cuts=0.3, sync=0.01, rush=0.3),
    "create-races": replace(
        _STORMY,
        chunks=8,
        create=0.7,
        read=0.2,
        rush=0.6,
        crashes=0.8,
        partitions=0.4,
        cuts=0.5,
        through_leader=0.6,
    ),
    "graveyard": replace(_STORMY, videos=2, chunks=2, delete=0.35, crashes=0.6, partitions=0.5, echo=0.25),
    "undead": replace(_STORMY, undead=0.15, slow=0.15, duplicate=0.2, crashes=1.0, echo=0.2, chunks=2),
    "far": replace(_STORMY, distance=0.2, horizon=8.0, patience=3.0, crashes=0.5, partitions=0.3),
    "hot": replace(
        _STORMY, chunks=0, ops=60, clients=6, think=0.1, read=0.15, crashes=0.6, echo=0.4, patience=0.3
    ),
    "reborn": replace(
        _STORMY,
        sizes=(4, 7, 3),
        chunks=0,
        crashes=12.0,
        downtime=0.02,
        loss=0.15,
        slow=0.3,
        rush=0.4,
        patience=0.2,
    ),
}
PROFILES["batches"] = replace(
    _STORMY,
    batches=0.5,
    clients=6,
    ops=80,
    videos=2,
    chunks=2,
    through_leader=0.9,
    rush=0.3,
    patience=1.5,
    crashes=1.0,
    partitions=0.4,
    cuts=0.5,
    damage=0.3,
    sync=0.02,
    echo=0.4,
)
_MOVING = replace(
    _STORMY,
    gossip=0.15,
    spares=3,
    changes=1.5,
    rivals=0.25,
    uploads=0.1,
    horizon=6.0,
    ops=50,
    crashes=0.4,
    partitions=0.2,
    cuts=0.2,
    videos=2,
    chunks=2,
)
CHANGING: dict[str, Profile] = {
    "churn": replace(_MOVING, sizes=(1, 2, 3, 3, 4, 5, 5, 7), losses=0.2),
    "regrow": replace(_MOVING, sizes=(1,), spares=6, script="regrow", horizon=12.0, kindness=0.1, rivals=0.1),
    "returns": replace(_MOVING, sizes=(3, 4, 5), absences=0.6, horizon=8.0, drains=1.5),
    "restored": replace(
        _MOVING, sizes=(3, 3, 5), crashes=2.0, losses=1.0, restores=0.9, changes=0.5, spares=1
    ),
    "lagging": replace(
        _MOVING,
        sizes=(1, 3, 3, 4),
        adds=3.0,
        absences=0.8,
        absence=4.0,
        cuts=1.5,
        outage=1.5,
        gossip=0.4,
        kindness=0.0,
    ),
    "forming": replace(
        _MOVING,
        # Not one: a machine that was removed, and comes back with a list of itself alone, rightly founds
        # another mesh, and all worlds have only one.
        sizes=(2, 2, 3, 3, 5),
        spares=1,
        forming=True,
        changes=0.5,
        losses=0.3,
        crashes=1.0,
        horizon=8.0,
    ),
    "batches-moving": replace(
        _MOVING, batches=0.5, clients=6, ops=80, through_leader=0.9, patience=1.5, absences=0.4
    ),
    "recover": replace(_MOVING, sizes=(3, 4, 5, 7), disaster=True, changes=0.5, losses=0.0),
}
"""Profiles in which the mesh changes."""
PROFILES |= CHANGING
NAMES = (*PROFILES, "mixed")


def draw(name: str, rng: Random) -> Profile:
    """The profile of one seed. Raises KeyError for an unknown name."""
    return _swarm(rng) if name == "mixed" else PROFILES[name]


def _swarm(rng: Random) -> Profile:
    """Every trouble is either off or drawn, by itself."""

    def some(upper: float) -> float:
        return 0.0 if rng.random() < 0.4 else rng.uniform(0.0, upper)

    changing = rng.random() < 0.5
    return Profile(
        clients=rng.randint(2, 6),
        ops=rng.randint(20, 60),
        horizon=rng.uniform(2.0, 5.0) * (1.5 if changing else 1.0),
        think=rng.uniform(0.02, 0.4),
        patience=rng.uniform(0.1, 1.2),
        videos=rng.randint(1, 2),
        chunks=rng.randint(1, 6),
        create=rng.uniform(0.1, 0.6),
        read=rng.uniform(0.05, 0.5),
        delete=some(0.3),
        stale=some(0.3),
        through_leader=rng.random(),
        rush=some(0.6),
        same_node=rng.random(),
        echo=some(0.3),
        sync=rng.choice((0.0005, 0.004, 0.02)),
        delay=rng.choice((0.001, 0.004, 0.03)),
        distance=rng.choice((0.0, 0.0, 0.0, 0.2)),
        loss=some(0.15),
        duplicate=some(0.25),
        slow=some(0.2),
        undead=some(0.15),
        lost_outcome=some(0.2),
        crashes=some(4.0),
        power_cuts=some(0.5),
        downtime=rng.choice((0.05, 0.3, 1.0)),
        partitions=some(1.5),
        cuts=some(2.0),
        outage=rng.uniform(0.1, 1.0),
        damage=0.0 if changing else some(0.5),
        gossip=rng.uniform(0.05, 0.4) if changing else 0.0,
        kindness=rng.choice((0.0, 0.5, 2.0)),
        spares=rng.randint(1, 4),
        changes=rng.uniform(0.3, 3.0) if changing else 0.0,
        adds=rng.random() + 0.1,
        removes=rng.random(),
        drains=rng.random(),
        grants=some(1.0),
        rivals=some(0.5),
        losses=some(0.5) if changing else 0.0,
        restores=some(1.0),
        absences=some(0.8) if changing else 0.0,
        absence=rng.uniform(0.5, 4.0),
        uploads=some(0.3),
    )
