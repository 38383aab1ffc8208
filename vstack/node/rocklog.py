"""Finds the damage that RocksDB overlooks: what it takes for a torn tail (bug B18), or for ever.

**Logs.** RocksDB's write-ahead log and manifest are blocks of 32 KiB filled with records:

    masked CRC-32C of type and payload (4) | length of the payload (2) | type (1) | payload     little endian

A record of the last block whose length reaches beyond the end of the file is taken for one that a
crash left half written, and it and all that follow are dropped in silence. That is right for a torn
record, and loses acknowledged votes if a bit of the length flipped: the length is not under the
checksum. The two can be told apart: the payload of a torn record is not all there, so that no
beginning of it fits the checksum; where one does, the record was whole once, and its length is
damaged. A type of 5 to 8 is that of a recycled log, which ours never are: one flipped bit makes it
of an ordinary one, and RocksDB then reads the same record again without end. After a record of type
and length 0 it skips the rest of the block: zeros are an end only where nothing but zeros follows.
Every other damage fails a checksum, and RocksDB itself refuses to open.

**Mark.** A log that is cut short, or gone, looks like one that never was longer. So the last
acknowledged write is noted a second time, in a small file of its own, `mark`:

    offset 0 and 4096, in turns, little endian:
    magic "votemark" (8) | turn (8) | sequence number (8) | manifest's number (8) | manifest's length (8)
    | 1 if a commit failed (1) | CRC-32 of these 41 bytes (4)

It is written after the write-ahead log was synced and before anybody is told, so that it never says
more than is on disk, and a database with less has lost something. It is synced only now and then:
without a power cut it is exact, because the page cache outlives the process; after one it may be
older than the log, and then notices less. A crash can tear one slot; the other is one turn older.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from vstack.errors import DamagedData
from vstack.node.disk import Disk

BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
_RECYCLED = range(5, 9)

_SLOT = struct.Struct("<8sQQQQB")
_SLOTS = (0, 4096)
_MAGIC = b"votemark"


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
            if kind == 0 and length == 0:
                return None if log.count(0, at) == len(log) - at else at
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


class Manifest(NamedTuple):
    """Which manifest counts, and how long it is: it names the tables, and only ever grows or gives way to
    one with a higher number."""

    number: int
    length: int


def manifest_of(database: Path) -> Manifest:
    """Raises DamagedData, OSError."""
    name = (database / "CURRENT").read_bytes()
    prefix, _, number = name.partition(b"-")
    if prefix != b"MANIFEST" or not number.endswith(b"\n") or not number[:-1].isdigit():
        raise DamagedData(f"{database / 'CURRENT'} does not name a manifest: {name[:40]!r}")
    return Manifest(int(number), (database / name.decode().strip()).stat().st_size)


def synced_manifest(database: Path, disk: Disk) -> Manifest:
    """As `manifest_of`, of what is on disk: a compaction may be about to sync what it has just appended,
    and a mark must not be ahead of that. Raises DamagedData, OSError."""
    manifest = manifest_of(database)
    fd = disk.open(database / f"MANIFEST-{manifest.number:06}")
    try:
        disk.sync(fd)
    finally:
        disk.close(fd)
    return manifest


class Mark(NamedTuple):
    """What a database is known to hold."""

    sequence: int
    """RocksDB's number of the last acknowledged write."""
    manifest: Manifest
    failed: bool = False
    """A commit failed: what the page cache shows may not be what is on disk."""

    def check_before_open(self, manifest: Manifest) -> None:
        """Raises DamagedData if tables that were listed may be listed no more."""
        if manifest < self.manifest:
            raise DamagedData(
                f"the manifest {manifest.number:06} has {manifest.length} bytes; "
                f"{self.manifest.number:06} had {self.manifest.length} already"
            )

    def check_after_open(self, sequence: int) -> None:
        """Raises DamagedData if the last acknowledged writes are gone."""
        if sequence < self.sequence:
            raise DamagedData(f"it ends with write {sequence}, but {self.sequence} was acknowledged")


class MarkFile:
    """The file that holds the mark, open. All methods raise OSError."""

    def __init__(self, path: Path, disk: Disk) -> None:
        """Opens it, or makes it if it is absent. Nothing is read: see `read_mark`."""
        self._disk = disk
        turns = [turn for turn, _ in _slots(path.read_bytes())] if path.exists() else []
        self._turn = max(turns, default=0)
        self._fd = disk.open(path, write=True) if path.exists() else disk.create(path)

    def write(self, mark: Mark) -> None:
        """The page cache has it when this returns."""
        self._turn += 1
        body = _SLOT.pack(_MAGIC, self._turn, mark.sequence, *mark.manifest, mark.failed)
        slot = body + zlib.crc32(body).to_bytes(4, "little")
        self._disk.write(self._fd, [slot], _SLOTS[self._turn % 2])

    def sync(self) -> None:
        """The disk has what was written when this returns."""
        self._disk.sync(self._fd)

    def close(self) -> None:
        self._disk.close(self._fd)


def read_mark(path: Path) -> Mark:
    """The latest mark that can be read. Raises DamagedData if there is none, OSError."""
    slots = _slots(path.read_bytes()) if path.exists() else []
    if not slots:
        raise DamagedData(f"{path} is missing or damaged: it says what was acknowledged")
    return max(slots)[1]


def _slots(raw: bytes) -> list[tuple[int, Mark]]:
    """The slots that can be read: turn, mark."""
    found = []
    for offset in _SLOTS:
        body = raw[offset : offset + _SLOT.size]
        checksum = raw[offset + _SLOT.size : offset + _SLOT.size + 4]
        if len(checksum) == 4 and zlib.crc32(body) == int.from_bytes(checksum, "little"):
            magic, turn, sequence, number, length, failed = _SLOT.unpack(body)
            if magic == _MAGIC:
                found.append((turn, Mark(sequence, Manifest(number, length), bool(failed))))
    return found
