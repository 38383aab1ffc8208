"""What goes into the chunk store and comes out of it: pieces, answers, figures, errors. Pure data."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vstack.errors import VstackError
from vstack.mesh.registers import PieceKey


class StoreFull(VstackError):
    """The disk has no room above its reserve."""


class PieceRefused(VstackError):
    """The piece is wrong: payload and hash differ, the key is taken by other bytes, a number does not fit."""


class WriteFailed(VstackError):
    """The disk or the index failed. The change was not made, but parts of it may appear after a restart."""


class PieceNotFound(VstackError):
    """The store does not hold the piece."""


class Piece(NamedTuple):
    """A piece to be stored."""

    key: PieceKey
    k: int
    """Pieces that give the chunk back; 1 for a whole copy."""
    m: int
    chunk_length: int
    """Bytes of the whole chunk."""
    sha256: bytes
    """Of the payload, 32 bytes."""
    payload: bytes | memoryview


class PieceInfo(NamedTuple):
    """What the store knows of a piece without reading it."""

    key: PieceKey
    k: int
    m: int
    chunk_length: int
    """Bytes of the whole chunk."""
    length: int
    """Bytes of the piece's payload."""
    sha256: bytes
    """Of the payload."""
    sequence: int
    """Grows with each record that this store writes; orders the records of one store, nothing else."""


class PieceRead(NamedTuple):
    """A range of a piece."""

    info: PieceInfo
    offset: int
    payload: bytes
    """A buffer of its own: it may be sent without copying, and kept."""


class Holding(NamedTuple):
    """What the store says of one key in an inventory."""

    key: PieceKey
    state: Literal["present", "absent", "quarantined"]
    """"quarantined": it was here, was found damaged, and is not served; to be repaired."""
    sha256: bytes = b""
    """Of the payload, as it was stored; empty if absent."""
    verified: bool = False
    """True if all of it was read and compared with its hash for this answer."""


Outcome = Literal["stored", "present", "refused", "full", "failed"]


class PutResult(NamedTuple):
    """What became of one piece of a `put`."""

    key: PieceKey
    outcome: Outcome
    error: VstackError | None = None
    """PieceRefused if "refused", StoreFull if "full", WriteFailed if "failed", otherwise None."""

    @property
    def durable(self) -> bool:
        """True if the piece is on this disk, and may be acknowledged."""
        return self.error is None


class StartReport(NamedTuple):
    """What the store had to do when it was opened."""

    scanned_records: int
    scanned_bytes: int
    """Of whole records."""
    torn_tails: int
    """Superblocks that ended in the middle of a write which was never acknowledged."""
    rebuilt: bool
    """True if the index was missing or damaged and was made anew from the superblocks."""
    seconds: float
    hinted_records: int = 0
    """Taken from the hints of their superblocks, without reading them."""


class StoreStats(NamedTuple):
    """Figures of one store. Bytes are as they lie on disk.

    live_bytes + dead_bytes + hint_bytes + 4096 per superblock is what has been written; with
    `preallocated_bytes` it is `file_bytes`.
    """

    pieces: int
    """Without those in quarantine."""
    payload_bytes: int
    """Sum of the payloads of all pieces."""
    tombstones: int
    """That still keep a deleted piece from coming back."""
    live_bytes: int
    """Records of all pieces and of the tombstones that still matter: headers, payloads, padding, footers."""
    dead_bytes: int
    """Superseded and deleted records, damage, quarantine and torn tails."""
    hint_bytes: int
    """What lets a rebuild do without reading the pieces."""
    preallocated_bytes: int
    """Reserved for the next records."""
    file_bytes: int
    """Sum of the superblocks' sizes."""
    index_bytes: int
    """Of the index, a cache beside the superblocks."""
    superblocks: int
    read_only_superblocks: int
    """Retired because a write or fsync failed, or because their header is damaged."""
    damaged_records: int
    """Found by scans at start, and the pieces in quarantine."""
    quarantined: int
    """Pieces found damaged by a read, `verify`, the scrub or compaction, and not yet written anew."""
    found_damaged: int
    """Times that a piece was put in quarantine since the start."""
    read_only: bool
    """No writes are taken until the next start: the disk or the index failed too often."""
    start: StartReport
