"""Writes the pieces of a chunk to the nodes that placement names, and to others where those fail; and has
nodes say whether theirs are good.

A chunk's pieces count as written when all are on disk and those outside any one node still number k.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Literal, NamedTuple

from vstack import erasure
from vstack.errors import BadInput, MeshUnavailable
from vstack.mesh.config import NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import MAX_PIECE, Held
from vstack.mesh.placement import next_holder, order, survives, takers
from vstack.mesh.registers import (
    ChunkRecord,
    PieceKey,
    Place,
    Scheme,
    UploadId,
    uploaded,
    what,
)

BUSY_TRIES = 50
"""How often a node that is busy is asked again before it counts as failed."""
CHECK_TRIES = 20
"""How often a node that has no time to read all pieces in question is asked to go on."""

PieceState = Literal["good", "missing", "damaged", "other", "silent", "gone"]
"""What is known of a piece where it should lie: there, and its bytes have their hash; not there; its bytes
are spoilt; there with other bytes than the register names; the node does not say; the node is no member."""


class TooFewNodes(MeshUnavailable):
    """Not enough nodes took their pieces for any one of them to be expendable."""


class Encoded(NamedTuple):
    """The fragments of a chunk and their hashes."""

    scheme: Scheme
    pieces: list[bytes | memoryview]
    hashes: list[bytes]


class PieceWriter:
    """Writes the pieces of a chunk to nodes, and to others where those fail."""

    def __init__(self, mesh: MeshClient, video: str) -> None:
        self._mesh = mesh
        self._video = video
        self._down: dict[NodeId, str] = {}
        """Nodes that failed a write of this upload, and why."""

    async def write(
        self,
        upload: UploadId,
        index: int,
        data: bytes,
        sha256: bytes,
        scheme: Scheme,
        encoded: Encoded | None = None,
    ) -> tuple[Place, ...]:
        """On disk, all of them, when this returns. `encoded` is the chunk's own, if that is done already.

        Raises TooFewNodes if too few nodes took theirs, BadInput if a piece is over MAX_PIECE bytes.
        """
        pieces: list[bytes | memoryview]
        if scheme.k == 1:
            pieces, hashes = [data] * scheme.m, [sha256] * scheme.m
        elif encoded is not None and encoded.scheme == scheme:
            pieces, hashes = encoded.pieces, encoded.hashes
        else:
            pieces, hashes = await asyncio.to_thread(erasure.encode_hashed, data, *scheme)
        if len(pieces[0]) > MAX_PIECE:
            raise BadInput(
                f"{what(index)} has pieces of {len(pieces[0]) >> 20} MiB, over the bound of "
                f"{MAX_PIECE >> 20} MiB: its pictures are too large to be cut; --opaque stores the bytes"
            )
        ranked = order(takers(self._mesh.members), self._video, index)
        unusable = {m.node for m in ranked if m.node in self._down or self._mesh.silent(m.node)}
        if len(ranked) - len(unusable) < min(scheme.m, len(ranked)):
            unusable = set()  # too few others: try them again
        taken: dict[int, NodeId] = {}
        todo = list(range(scheme.m))
        while todo:
            tries: list[tuple[int, NodeId]] = []
            for piece in todo:
                member = next_holder(ranked, [*taken.values(), *(n for _, n in tries)], unusable)
                if member is None:
                    raise self._too_few(index, scheme)
                if scheme.k == 1 and member.node in [*taken.values(), *(n for _, n in tries)]:
                    continue  # a second copy on one node would be none
                tries.append((piece, member.node))
            if not tries:
                break
            results = await asyncio.gather(
                *(self._put(n, upload, index, p, data, pieces[p], hashes[p], scheme) for p, n in tries)
            )
            for (piece, node), why in zip(tries, results, strict=True):
                if why is None:
                    taken[piece] = node
                else:
                    unusable.add(node)
                    self._down[node] = why
            todo = [p for p in todo if p not in taken]
        holders = list(taken.values())
        if not survives(scheme, holders) and len(self._mesh.members) > 1:
            raise self._too_few(index, scheme)
        number = 0 if scheme.k == 1 else None
        return tuple(
            Place(node, piece if number is None else number, hashes[piece], uploaded(scheme))
            for piece, node in sorted(taken.items())
        )

    async def _put(
        self,
        node: NodeId,
        upload: UploadId,
        index: int,
        piece: int,
        data: bytes,
        payload: bytes | memoryview,
        sha256: bytes,
        scheme: Scheme,
    ) -> str | None:
        """None if it is on that node's disk now, else why not."""
        key = PieceKey(self._video, upload, index, 0 if scheme.k == 1 else piece, uploaded(scheme))
        for attempt in range(BUSY_TRIES):
            try:
                await self._mesh.put_piece(node, key, scheme, len(data), sha256, payload)
            except Refused as e:
                if e.code != "busy":
                    return str(e)
                await asyncio.sleep(min(0.5, 0.02 * 2**attempt) * (0.5 + os.urandom(1)[0] / 255))
            except NoAnswer as e:
                return str(e)
            else:
                return None
        return f"node {node[:8]} stayed busy"

    def _too_few(self, index: int, scheme: Scheme) -> TooFewNodes:
        why = "; ".join(f"{node[:8]}: {reason}" for node, reason in self._down.items())
        return TooFewNodes(
            f"too few nodes take pieces: {what(index)} needs {scheme.name}, such that any one node may be "
            f"lost ({why or 'no node is usable'}). Start the nodes that are down, and upload again to resume"
        )


@dataclass(frozen=True)
class Checked:
    """What the holders of a chunk's pieces found when they read them."""

    record: ChunkRecord
    states: tuple[PieceState, ...]
    """Of each of the record's places."""

    @property
    def good(self) -> list[Place]:
        return [p for p, state in zip(self.record.places, self.states, strict=True) if state == "good"]

    @property
    def readable(self) -> bool:
        """Whether the good pieces suffice: one copy, or k different fragments."""
        return len({p.piece for p in self.good}) >= self.record.scheme.k


async def check_pieces(
    mesh: MeshClient, video: str, upload: UploadId, records: Sequence[ChunkRecord]
) -> list[Checked]:
    """Has each holder read its pieces of some chunks whole and compare them with their hashes. A node that
    does not answer, or cannot read its disk, is `silent`; nothing is raised for it."""
    began = monotonic()
    asked: dict[NodeId, list[tuple[int, int]]] = {}
    for i, record in enumerate(records):
        for j, place in enumerate(record.places):
            asked.setdefault(place.node, []).append((i, j))

    async def one(node: NodeId, which: list[tuple[int, int]]) -> list[PieceState]:
        if mesh.config.member(node) is None:
            return ["gone"] * len(which)
        keys = [records[i].key(video, upload, records[i].places[j]) for i, j in which]
        held = await _verified(mesh, node, keys, began)
        if held is None:
            return ["silent"] * len(which)
        return [_judge(h, records[i].places[j]) for h, (i, j) in zip(held, which, strict=True)]

    states: list[list[PieceState]] = [["silent"] * len(r.places) for r in records]
    answers = await asyncio.gather(*(one(node, which) for node, which in asked.items()))
    for which, answer in zip(asked.values(), answers, strict=True):
        for (i, j), state in zip(which, answer, strict=True):
            states[i][j] = state
    return [Checked(r, tuple(s)) for r, s in zip(records, states, strict=True)]


async def _verified(
    mesh: MeshClient, node: NodeId, keys: Sequence[PieceKey], began: float
) -> list[Held] | None:
    """What `node` says of its pieces after it has read them, after `began`; None if it does not say."""
    for _ in range(CHECK_TRIES):
        try:
            # What it has read since is not read again, when it had no time for the rest.
            return await mesh.inventory(node, keys, verified_within=int(monotonic() - began))
        except Refused as e:
            if e.code not in ("busy", "late"):
                return None
            await asyncio.sleep(0.2)
        except NoAnswer:
            return None
    return None


def _judge(held: Held, place: Place) -> PieceState:
    if held.state == "present":
        return "good" if held.sha256 == place.sha256 else "other"
    return "missing" if held.state == "absent" else "damaged"
