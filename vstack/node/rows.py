"""The rows of the index: what each says, and its bytes. Pure.

Numbers are big-endian:

    "f"                       format of the index (2 bytes)
    "n"                       next sequence number (8)
    "e"                       there once the index has heard of every superblock (empty)
    "c"                       where the scrub is: see `scrub`
    "s" number (8)            superblock: salt (16), watermark, pieces, payload bytes, tombstones,
                              live bytes, bytes of hints, damaged records (8 each), flags (1)
    "p" packed key (82)       piece: superblock, offset, sequence, chunk length, length (8 each),
                              k, m (2 each), SHA-256 (32), older (8 each)
    "q" packed key (82)       quarantined piece: found damaged; as "p"
    "t" packed key (82)       tombstone: superblock, offset, sequence (8 each), older (8 each)

A key has one of "p", "q", "t", or none. *Older* are the superblocks that hold further data records of the
key, all of them dead; some may be gone by now. A tombstone matters as long as one of them is on disk: without
it a rebuild would bring the piece back. It also matters while any superblock holds something unknown (damaged
records, what a failed write left), for that may be an older record of the key.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vstack.node.superblock import FILE_HEADER_BYTES

FORMAT = b"\x00\x02"

_STATE = struct.Struct(">16sQQQQQQQB")
_PIECE = struct.Struct(">QQQQQHH32s")
_TOMBSTONE = struct.Struct(">QQQ")
_NUMBER = struct.Struct(">Q")

_SEALED = 1
_RETIRED = 2
_DOOMED = 4


class PieceRow(NamedTuple):
    """Where a piece lies, and what `info` says of it."""

    superblock: int
    offset: int
    sequence: int
    chunk_length: int
    length: int
    k: int
    m: int
    sha256: bytes
    older: tuple[int, ...] = ()
    """Superblocks that hold, or held, further data records of the key."""

    def pack(self) -> bytes:
        return _PIECE.pack(*self[:-1]) + _pack_older(self.older)

    @classmethod
    def unpack(cls, raw: bytes) -> PieceRow:
        return cls._make((*_PIECE.unpack_from(raw), _unpack_older(raw[_PIECE.size :])))


class TombstoneRow(NamedTuple):
    superblock: int
    offset: int
    sequence: int
    older: tuple[int, ...] = ()
    """As in PieceRow."""

    def pack(self) -> bytes:
        return _TOMBSTONE.pack(*self[:-1]) + _pack_older(self.older)

    @classmethod
    def unpack(cls, raw: bytes) -> TombstoneRow:
        return cls._make((*_TOMBSTONE.unpack_from(raw), _unpack_older(raw[_TOMBSTONE.size :])))


def _pack_older(numbers: tuple[int, ...]) -> bytes:
    return b"".join(number.to_bytes(8, "big") for number in numbers) if numbers else b""


def _unpack_older(raw: bytes) -> tuple[int, ...]:
    return tuple(n for (n,) in _NUMBER.iter_unpack(raw)) if raw else ()


class SuperblockState(NamedTuple):
    """What the index knows of one superblock."""

    salt: bytes
    watermark: int = FILE_HEADER_BYTES
    pieces: int = 0
    payload_bytes: int = 0
    tombstones: int = 0
    live_bytes: int = 0
    """Of the records that "p" and "t" rows point to."""
    hint_bytes: int = 0
    damaged: int = 0
    sealed: bool = False
    """Takes no more records."""
    retired: bool = False
    """Sealed because the disk failed."""
    doomed: bool = False
    """Nothing in it matters any more: it is to be unlinked."""

    @property
    def dead_bytes(self) -> int:
        """Superseded and deleted records, damage, torn tails."""
        return self.watermark - FILE_HEADER_BYTES - self.live_bytes - self.hint_bytes

    @property
    def given_up(self) -> bool:
        """Its header is damaged and its salt unknown, so nothing in it can be read."""
        return not any(self.salt)

    @property
    def holds_unknown(self) -> bool:
        """It may hold records that the index has never seen."""
        return self.retired or self.damaged > 0

    def pack(self) -> bytes:
        flags = self.sealed * _SEALED | self.retired * _RETIRED | self.doomed * _DOOMED
        return _STATE.pack(*self[:-3], flags)

    @classmethod
    def unpack(cls, raw: bytes) -> SuperblockState:
        *figures, flags = _STATE.unpack(raw)
        return cls._make([*figures, bool(flags & _SEALED), bool(flags & _RETIRED), bool(flags & _DOOMED)])
