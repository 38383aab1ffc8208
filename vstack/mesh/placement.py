"""Which nodes a chunk's pieces go to: weighted rendezvous hashing, spread over zones.

Pure. The chosen nodes are recorded in the chunk's register: placement is looked up, not
recomputed, so this order may change from version to version without moving a byte.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence

from vstack.mesh.config import Member, NodeId
from vstack.mesh.registers import REPLICATED, Scheme


def order(members: Sequence[Member], video: str, chunk: int) -> list[Member]:
    """All members, best first: highest weighted random score (Thaler and Ravishankar 1998; weights as
    -weight / ln(u)), then rearranged so that each zone appears once before any zone appears twice."""

    def score(member: Member) -> float:
        digest = hashlib.blake2b(f"{video}\0{chunk}\0{member.node}".encode(), digest_size=8).digest()
        u = (int.from_bytes(digest) + 1) / (2**64 + 1)
        return -member.weight / math.log(u)

    ranked = sorted((m for m in members if m.weight > 0), key=score, reverse=True)
    seen: dict[str, int] = {}
    turns: list[tuple[int, int, Member]] = []
    for position, member in enumerate(ranked):
        zone = member.zone or member.node
        turns.append((seen.get(zone, 0), position, member))
        seen[zone] = seen.get(zone, 0) + 1
    return [member for _, _, member in sorted(turns, key=lambda t: t[:2])]


def takers(members: Iterable[Member]) -> list[Member]:
    """The members that new pieces may go to."""
    return [m for m in members if not m.draining and m.weight > 0]


def fits(scheme: Scheme, nodes: int) -> bool:
    """Whether any one of `nodes` nodes can be lost: ceil(m / n) <= m - k."""
    return nodes > 0 and math.ceil(scheme.m / nodes) <= scheme.m - scheme.k


def choose_scheme(wanted: Scheme, nodes: int) -> Scheme:
    """The scheme to write with on `nodes` nodes: `wanted`, or the widest spread of whole copies that fits."""
    if wanted.k == 1:
        return Scheme(1, min(wanted.m, max(nodes, 1)))
    return wanted if fits(wanted, nodes) else Scheme(1, min(REPLICATED.m, max(nodes, 1)))


def shortfall(wanted: Scheme, written: Scheme) -> str:
    """What a too small mesh could not give, in words; empty if nothing is missing. Whole copies in the place
    of fragments are said to be fewer than they should be, or that they are none."""
    if written == wanted:
        return ""
    if written.k == 1 and written.m < REPLICATED.m:
        return f"degraded: {written.m} of {REPLICATED.m} copies"
    return f"degraded: {written.name} instead of {wanted.name}"


def survives(scheme: Scheme, holders: Sequence[NodeId]) -> bool:
    """Whether the pieces outside any one node still number k. `holders` names the node of each piece."""
    if not holders:
        return False
    most = max(holders.count(node) for node in set(holders))
    return len(holders) - most >= scheme.k


def next_holder(
    ranked: Sequence[Member], taken: Sequence[NodeId], unusable: Collection[NodeId]
) -> Member | None:
    """The node for the next piece: never a second piece on a node while another usable one is free."""
    usable = [m for m in ranked if m.node not in unusable]
    if not usable:
        return None
    return min(usable, key=lambda m: (taken.count(m.node), usable.index(m)))
