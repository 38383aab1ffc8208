"""Finds the damage that RocksDB overlooks: what it takes for a torn tail (bug B18), or for ever.

RocksDB's logs, the write-ahead log and the manifest, are blocks of 32 KiB filled with records:

    masked CRC-32C of type and payload (4) | length of the payload (2) | type (1) | payload     little endian

A record of the last block whose length reaches beyond the end of the file is taken for one that a
crash left half written, and it and all that follow are dropped in silence. That is right for a torn
record, and loses acknowledged votes if a bit of the length flipped: the length is not under the
checksum. The two can be told apart: the payload of a torn record is not all there, so that no
beginning of it fits the checksum; where one does, the record was whole once, and its length is
damaged. A type of 5 to 8 is that of a recycled log, which ours never are: one flipped bit makes it
of an ordinary one, and RocksDB then reads the same record again without end. Every other damage
fails a checksum, and RocksDB itself refuses to open.
"""

from __future__ import annotations

import struct
from pathlib import Path

from vstack.errors import DamagedData

BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
_RECYCLED = range(5, 9)


def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC32C = _table()


def _unmask(masked: int) -> int:
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def check_logs(folder: Path) -> None:
    """Looks at the headers in the logs of a database's folder. Raises DamagedData, OSError."""
    for path in sorted([*folder.glob("*.log"), *folder.glob("MANIFEST-*")]):
        at = damaged_header(path.read_bytes())
        if at is not None:
            raise DamagedData(f"{path} is damaged at byte {at}: the header of a record is not as written")


def damaged_header(log: bytes) -> int | None:
    """Where in a log the first record begins whose type or length is not what was written; None if
    nowhere, which says nothing about payloads."""
    for block in range(0, len(log), BLOCK):
        at, end = block, min(block + BLOCK, len(log))
        while at + _HEADER.size <= end:
            masked, length, kind = _HEADER.unpack_from(log, at)
            if kind in _RECYCLED:
                return at
            start = at + _HEADER.size
            if start + length > end:
                if end == len(log) and _begins_with(_unmask(masked), log[start - 1 : end]):
                    return at
                break
            at = start + length
    return None


def _begins_with(crc: int, rest: bytes) -> bool:
    """Whether type and some beginning of the payload have this checksum."""
    state = 0xFFFFFFFF
    for byte in rest:
        state = _CRC32C[(state ^ byte) & 0xFF] ^ state >> 8
        if state ^ 0xFFFFFFFF == crc:
            return True
    return False
