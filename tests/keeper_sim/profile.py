"""What a seed draws: how large its mesh is, how it is kept, who uses it, and what fails in it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from vstack.mesh.config import Policy


@dataclass(frozen=True)
class Profile:
    """Probabilities are per message or call, rates per virtual second over the whole mesh."""

    nodes: int = 5
    zones: int = 0
    """0: none are told."""
    erasure: tuple[int, int] = (3, 5)
    repair_delay: int = 4
    grace: int = 6
    undelete: int = 15
    videos: int = 2
    chunks: int = 2
    seconds: float = 60.0
    """For which clients and faults go on."""
    lag: float = 0.01
    """Mean seconds of one way of a message; one in a hundred takes a hundred times as long."""
    loss: float = 0.0
    unknown: float = 0.0
    """Changes of which the caller is not told what became of them."""
    late: float = 20.0
    """Seconds after which such a change may still happen."""
    unavailable: float = 0.0
    incomplete: float = 0.0
    busy: float = 0.0
    uses: float = 0.5
    """Rate at which clients upload, delete, undelete, pin and view."""
    crashes: float = 0.0
    silences: float = 0.0
    losses: float = 0.0
    """Of nodes, for good."""
    joins: float = 0.0
    drains: float = 0.0
    rot: float = 0.0
    fulls: float = 0.0
    years: float = 0.0
    """Clocks that jump by a year."""

    @property
    def policy(self) -> Policy:
        return Policy(
            erasure=self.erasure,
            hot_views=10,
            repair_delay=self.repair_delay,
            grace=self.grace,
            undelete=self.undelete,
            repair_rate=1 << 20,
        )


def _mixed(random: Random) -> Profile:
    """Each seed has its own mix, and leaves many faults out altogether."""

    def sometimes(most: float, share: float = 0.5) -> float:
        return random.uniform(0.2, 1.0) * most if random.random() < share else 0.0

    return Profile(
        nodes=random.choice((1, 2, 3, 3, 4, 5, 5, 6, 7, 8)),
        zones=random.choice((0, 0, 2, 3)),
        erasure=random.choice(((3, 5), (3, 5), (2, 3), (2, 4))),
        repair_delay=random.choice((1, 3, 6, 12)),
        grace=random.choice((2, 5, 10)),
        undelete=random.choice((5, 15, 30)),
        videos=random.randint(1, 3),
        chunks=random.randint(1, 3),
        seconds=random.choice((20.0, 40.0, 60.0)),
        lag=random.choice((0.002, 0.02, 0.1)),
        loss=sometimes(0.1),
        unknown=sometimes(0.3),
        unavailable=sometimes(0.05),
        incomplete=sometimes(0.2),
        busy=sometimes(0.1),
        uses=random.uniform(0.2, 1.0),
        crashes=sometimes(0.15),
        silences=sometimes(0.15),
        losses=sometimes(0.06),
        joins=sometimes(0.05),
        drains=sometimes(0.05),
        rot=sometimes(1.0),
        fulls=sometimes(0.05),
        years=sometimes(0.05, 0.2),
    )


def _late(random: Random) -> Profile:
    """Two keepers at once, changes that happen when nobody expects them any more, garbage that goes soon."""
    return Profile(
        nodes=random.choice((3, 4, 5)),
        erasure=random.choice(((2, 3), (2, 4))),
        repair_delay=random.choice((1, 3)),
        grace=random.choice((0, 1, 2)),
        undelete=60,
        videos=1,
        chunks=1,
        seconds=60.0,
        lag=random.choice((0.02, 0.1)),
        loss=random.uniform(0.0, 0.15),
        unknown=random.uniform(0.1, 0.5),
        late=random.choice((3.0, 10.0, 30.0)),
        uses=random.uniform(0.5, 1.5),
        silences=random.uniform(0.1, 0.4),
        joins=random.choice((0.0, 0.05)),
        drains=random.choice((0.0, 0.05)),
    )


def _brink(random: Random) -> Profile:
    """As much is lost all the time as the mesh just survives, and writes fail."""
    return Profile(
        nodes=random.choice((3, 4, 5, 6)),
        erasure=random.choice(((3, 5), (2, 3), (2, 4))),
        repair_delay=random.choice((1, 3)),
        grace=random.choice((1, 4)),
        undelete=60,
        videos=1,
        chunks=2,
        seconds=60.0,
        loss=random.uniform(0.0, 0.2),
        uses=random.uniform(0.1, 0.6),
        crashes=random.choice((0.0, 0.1)),
        silences=random.uniform(0.0, 0.2),
        losses=random.uniform(0.0, 0.1),
        joins=0.1,
        drains=random.uniform(0.0, 0.15),
        rot=random.uniform(0.5, 6.0),
        fulls=random.uniform(0.0, 0.5),
    )


def _partial(random: Random) -> Profile:
    """Listings miss what is there, reads fail; videos come and go."""
    return Profile(
        nodes=random.choice((2, 3, 5)),
        grace=random.choice((1, 3)),
        undelete=random.choice((2, 5)),
        videos=2,
        chunks=3,
        seconds=40.0,
        incomplete=random.uniform(0.2, 0.7),
        unavailable=random.uniform(0.0, 0.1),
        uses=random.uniform(0.5, 2.0),
        crashes=random.choice((0.0, 0.1)),
    )


PROFILES = {"mixed": _mixed, "late": _late, "brink": _brink, "partial": _partial}
