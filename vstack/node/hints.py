"""Hints: what a sealed superblock holds, as its own last record, so that a rebuild need not read the rest.

    payload of a record of kind 3; numbers are big-endian
         0  160 n  one entry for each record before this one, in order of offset
       160 n    8  offset of this record
    an entry, 160 bytes
         0   8  offset of the record
         8   8  sequence number
        16   8  against
        24   8  length of the chunk
        32   8  length of the payload
        40   2  k
        42   2  m
        44   1  kind
        45   1  reserved, zero
        46  32  SHA-256 of the payload
        78  82  packed PieceKey

The file ends where this record ends, so the last 16 bytes of the file (the offset, and the record's footer)
lead to it. Hints are good if the record is whole by the check and hash that every record has, ends the file,
and its entries follow each other without a gap from the file header to the record itself. They are trusted
all or not at all; where they are not good, the file is scanned.

Hints say what was written, not what has become of it since: a payload that rotted is found by the scrub.

What a crash leaves: the hints are the last thing written to a superblock. Before they are synced they may be
torn; then they are a torn tail like any other, and the file is scanned.
"""

from __future__ import annotations

import hashlib
import struct

from vstack.mesh.registers import PIECE_KEY_BYTES
from vstack.node.disk import Disk
from vstack.node.scan import Found
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    FOOTER,
    RECORD_HEADER_BYTES,
    Kind,
    Record,
    read_record,
    record_size,
)

_ENTRY = struct.Struct(f">QQQQQHHBx32s{PIECE_KEY_BYTES}s")
_OFFSET_BYTES = 8

MOST_BYTES = 4 << 20
"""Of the entries of one superblock: it is closed when they reach this, so that they fit in memory."""


class Hints:
    """The entries of a superblock that is being written, gathered in memory."""

    def __init__(self) -> None:
        self._entries = bytearray()

    def add(self, offset: int, r: Record) -> None:
        self._entries += _ENTRY.pack(
            offset, r.sequence, r.against, r.chunk_length, r.length, r.k, r.m, r.kind, r.sha256, r.key
        )

    @property
    def full(self) -> bool:
        return len(self._entries) >= MOST_BYTES

    @property
    def record_bytes(self) -> int:
        """Size of the record that would hold these hints and one entry more."""
        return record_size(len(self._entries) + _ENTRY.size + _OFFSET_BYTES)

    def record(self, offset: int) -> tuple[Record, bytes]:
        """The record that holds these hints, to be written at `offset`, and its payload."""
        payload = bytes(self._entries) + offset.to_bytes(_OFFSET_BYTES, "big")
        digest = hashlib.sha256(payload).digest()
        return Record(Kind.HINTS, 0, bytes(PIECE_KEY_BYTES), 0, 0, 0, 0, len(payload), digest), payload


def walk(disk: Disk, fd: int, salt: bytes, end: int) -> Hints | None:
    """The hints of a file whose records end at `end`, from their headers; None if one is damaged.

    Raises OSError.
    """
    hints = Hints()
    offset = FILE_HEADER_BYTES
    while offset < end:
        record = read_record(disk.read(fd, offset, RECORD_HEADER_BYTES), salt, offset)
        if record is None:
            return None
        hints.add(offset, record)
        offset += record.size
    return hints if offset == end else None


def read_hints(disk: Disk, fd: int, salt: bytes) -> list[Found] | None:
    """Every record of the file, the hints themselves last; None if it has no good hints. Raises OSError."""
    size = disk.size(fd)
    if size <= FILE_HEADER_BYTES:
        return None
    end = disk.read(fd, size - _OFFSET_BYTES - len(FOOTER), _OFFSET_BYTES + len(FOOTER))
    at = int.from_bytes(end[:_OFFSET_BYTES], "big")
    if end[_OFFSET_BYTES:] != FOOTER or not FILE_HEADER_BYTES <= at < size:
        return None
    record = read_record(disk.read(fd, at, RECORD_HEADER_BYTES), salt, at)
    if record is None or record.kind != Kind.HINTS or at + record.size != size:
        return None
    payload = disk.read(fd, at + RECORD_HEADER_BYTES, record.length)
    if hashlib.sha256(payload).digest() != record.sha256 or record.length % _ENTRY.size != _OFFSET_BYTES:
        return None
    entries: list[Found] = []
    expected = FILE_HEADER_BYTES
    for fields in _ENTRY.iter_unpack(memoryview(payload)[:-_OFFSET_BYTES]):
        offset, sequence, against, chunk_length, length, k, m, kind, sha256, key = fields
        if offset != expected:
            return None
        entries.append(
            Found(offset, Record(kind, sequence, key, against, k, m, chunk_length, length, sha256))
        )
        expected += record_size(length)
    if expected != at:
        return None
    entries.append(Found(at, record))
    return entries
