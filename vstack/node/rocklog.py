"""Finds the damage that RocksDB takes for a torn tail (bug B18).

RocksDB's logs, the write-ahead log and the manifest, are blocks of 32 KiB filled with records:

    masked CRC-32C of type and payload (4) | length of the payload (2) | type (1) | payload     little endian

A record of the last block whose length reaches beyond the end of the file is taken for one that a
crash left half written, and it and all that follow are dropped in silence. That is right for a torn
record, and loses acknowledged votes if a bit of the length flipped: the length is not under the
checksum. The two can be told apart: the payload of a torn record is not all there, so that no
beginning of it fits the checksum; where one does, the record was whole once, and its length is
damaged. Every other damage fails a checksum, and RocksDB itself refuses to open.
"""

from __future__ import annotations

import struct
from pathlib import Path

from vstack.errors import DamagedData

BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")


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
    """Looks at the end of each log in a database's folder. Raises DamagedData, OSError."""
    for path in sorted([*folder.glob("*.log"), *folder.glob("MANIFEST-*")]):
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(size - size % BLOCK)
            at = damaged_length(f.read())
        if at is not None:
            raise DamagedData(
                f"{path} is damaged at byte {size - size % BLOCK + at}: "
                "a record claims to be longer than it was written"
            )


def damaged_length(block: bytes) -> int | None:
    """Where in the last block of a log a whole record claims more than is there; None if nowhere."""
    at = 0
    while at + _HEADER.size <= len(block):
        masked, length, _ = _HEADER.unpack_from(block, at)
        start = at + _HEADER.size
        if start + length > len(block):
            return at if _begins_with(_unmask(masked), block[start - 1 :]) else None
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
