"""What a holder may do with one of its pieces: from the registers, as a quorum has them, to a verdict.

Pure. A piece goes only if what the registers say can never again name it:

    the video's register is a tombstone, or its upload is over          it may go
    it was never written                                                not a word about the piece: it stays
    the upload is open, or another one is that may fail                 it stays
    the chunk's register is a tombstone                                 it may go
    it was never written                                                not a word about the piece: it stays
    it names the piece                                                  it stays
    it has moved past the version that the piece was written against    it may go
    it has not                                                          it is moved on first: FENCE

A keeper names a piece by a compare-and-swap that expects the version in its generation, and an upload by one
that expects an absent register: once the register has moved on, that can only fail.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from vstack.mesh.config import NodeId
from vstack.mesh.registers import INIT_INDEX, ChunkRecord, PieceKey, VideoRecord, init_record, upload_id

R = TypeVar("R", VideoRecord, ChunkRecord)


class Register(NamedTuple, Generic[R]):
    """A register as a quorum has it. Version 0: never written. No record at a later version: a tombstone."""

    version: int
    record: R | None


class Verdict(Enum):
    STAYS = "stays"
    NAMED = "named"
    UNCLAIMED = "unclaimed"
    """No register says anything of it. It stays, and is reported."""
    FENCE = "fence"
    """It may still be named by a change under way: the register has to be moved on first."""
    DROP = "drop"
    """Nothing will ever name it."""


def judge_by_video(key: PieceKey, video: Register[VideoRecord]) -> Verdict | None:
    """What the video's register says by itself; None: it is for the chunk's register to say."""
    record = video.record
    if video.version == 0 or key.upload.version > video.version:
        return Verdict.UNCLAIMED  # of an upload that the register has not heard of, or has lost
    if record is None:
        return Verdict.DROP
    current = upload_id(record, video.version)
    if record.state == "uploading":
        return Verdict.STAYS  # of the open upload; or of the one before, which stands again if that one fails
    if key.upload != current or record.state == "aborted":
        return Verdict.DROP
    return None


def judge(me: NodeId, key: PieceKey, video: Register[VideoRecord], chunk: Register[ChunkRecord]) -> Verdict:
    """`chunk`: of the piece's chunk; see `init_register` for pieces of the init segment."""
    said = judge_by_video(key, video)
    if said is not None:
        return said
    if chunk.version == 0 or key.generation.against > chunk.version:
        return Verdict.UNCLAIMED
    if chunk.record is None:
        return Verdict.DROP
    if names(chunk.record, me, key):
        return Verdict.NAMED
    return Verdict.FENCE if chunk.version == key.generation.against else Verdict.DROP


def names(record: ChunkRecord, node: NodeId, key: PieceKey) -> bool:
    return any((p.node, p.piece, p.generation) == (node, key.piece, key.generation) for p in record.places)


def init_register(video: Register[VideoRecord]) -> Register[ChunkRecord]:
    """The part of a video's register that names the pieces of its init segment."""
    init = video.record.init if video.record is not None else None
    if init is None:
        return Register(0, None)
    return Register(video.version, init_record(init))


def adopted(
    me: NodeId, key: PieceKey, sha256: bytes, record: ChunkRecord, members: Collection[NodeId]
) -> ChunkRecord | None:
    """The record with a piece of ours in place of one that was lost with its node, if it is the same; None
    if that is not called for. `members`: nodes of the mesh that are not gone for good."""
    if record.scheme.k == 1 and any(p.node == me for p in record.places):
        return None
    for i, place in enumerate(record.places):
        if place.node not in members and place.piece == key.piece and place.sha256 == sha256:
            mine = place._replace(node=me, generation=key.generation)
            places = (*record.places[:i], mine, *record.places[i + 1 :])
            return ChunkRecord(record.entry, record.scheme, places)
    return None


def is_init(key: PieceKey) -> bool:
    return key.chunk == INIT_INDEX
