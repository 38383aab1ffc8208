"""One superblock: the append-only file that pieces lie in. Its format, its writer, its reader.

Numbers are big-endian. Everything begins at a multiple of 8 bytes.

    file header, 4096 bytes; the 60 bytes below stand twice, at 0 and at 2048, the rest is zero
         0   8  magic "vstackSB"
         8   2  format version, 1
        10   2  reserved, zero
        12  16  NodeId of the node that made the file; informational
        28   8  number of the superblock
        36   8  first sequence number that was not taken when the file was made; copies in it have lower ones
        44  16  salt, random
        60   4  CRC-32 of the 60 bytes before
    record header, 176 bytes
         0   8  magic "\\xf5vstkrec"
         8   1  format version, 1
         9   1  kind: 1 data, 2 tombstone, 3 hints (see `hints`); readers skip kinds that they do not know
        10   2  k        pieces that give the chunk back
        12   2  m        pieces of the chunk in all
        14   2  reserved, zero
        16   8  sequence number, unique on this node; of two records of a key the higher one holds.
                A copy made by compaction keeps it; of two copies the one in the higher superblock holds
        24   8  against: version of the register that the piece's commit expects
        32   8  length of the chunk
        40   8  length of the payload
        48  32  SHA-256 of the payload
        80  82  key of the piece, as `PieceKey.pack` makes it
       162   6  reserved, zero
       168   8  check: BLAKE2b, 8 bytes, keyed with the salt, over the record's offset (8 bytes) and 0..167
    payload, then zeros up to a multiple of 8
    footer, 8 bytes "recend\\xf5\\n"

The check depends on the salt and on the offset, so bytes inside a video that look like a record, even a
copy of a record from this very file, are never taken for one.

Invariants. A file is appended to by one process in one go: after an unclean stop, a failed write or a
failed fsync it takes no more records. Nothing but trailing zeros is ever cut off. A number is never used
twice: a new file's number is above all others on disk, and the file with the highest number is never
removed; its header says where the sequence numbers go on, so those are never used twice either.

What a crash leaves. While a file is made: `<number>.vsb.tmp`, which the next start removes; under its
final name a file always has a whole header. While records are written: a torn tail, any part of which may
be missing or zero. It was not acknowledged; `scan` tells what of it is whole. Preallocated space reads as
zeros; zeros are the end of the file only if no valid record follows them.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from vstack.errors import VstackError
from vstack.mesh.registers import PIECE_KEY_BYTES, PieceKey
from vstack.node.disk import NO_SPACE, Disk

FILE_HEADER_BYTES = 4096
FORMAT = 1

_FILE_MAGIC = b"vstackSB"
_FILE_HEADER = struct.Struct(">8sH2x16sQQ16s")
_SECOND_COPY = 2048

RECORD_MAGIC = b"\xf5vstkrec"
FOOTER = b"recend\xf5\n"
_RECORD = struct.Struct(f">8sBBHH2xQQQQ32s{PIECE_KEY_BYTES}s6x")
_CHECK_BYTES = 8
RECORD_HEADER_BYTES = _RECORD.size + _CHECK_BYTES
_TRAILERS = tuple(b"\0" * padding + FOOTER for padding in range(8))
"""What follows a payload, by the padding it needs."""

_STEP = 64 << 20
"""Space is preallocated in steps of this many bytes."""

_PAGE = 4096

KeepFree = Callable[[int], float]
"""From the bytes of a file system to how many of them must stay free."""


class Kind(IntEnum):
    DATA = 1
    TOMBSTONE = 2
    HINTS = 3


class FileHeader(NamedTuple):
    node: str
    """32 hex digits."""
    number: int
    first_sequence: int
    salt: bytes

    def pack(self) -> bytes:
        fields = _FILE_HEADER.pack(
            _FILE_MAGIC, FORMAT, bytes.fromhex(self.node), self.number, self.first_sequence, self.salt
        )
        copy = (fields + struct.pack(">I", zlib.crc32(fields))).ljust(_SECOND_COPY, b"\0")
        return copy + copy

    @classmethod
    def unpack(cls, raw: bytes) -> FileHeader | None:
        """The header, from whichever of its two copies is whole. Raises VstackError on a newer format."""
        for start in (0, _SECOND_COPY):
            fields = raw[start : start + _FILE_HEADER.size]
            crc = raw[start + _FILE_HEADER.size : start + _FILE_HEADER.size + 4]
            if len(crc) < 4 or zlib.crc32(fields) != int.from_bytes(crc, "big"):
                continue
            magic, version, node, number, first_sequence, salt = _FILE_HEADER.unpack(fields)
            if magic != _FILE_MAGIC:
                continue
            if version > FORMAT:
                raise VstackError(
                    f"superblock {number} has format {version}, not up to {FORMAT}: update vstack"
                )
            return cls(node.hex(), number, first_sequence, salt)
        return None


class Record(NamedTuple):
    """What a record says of itself: its header, without the payload."""

    kind: int
    sequence: int
    key: bytes
    """Packed PieceKey."""
    against: int
    k: int
    m: int
    chunk_length: int
    length: int
    """Bytes of payload."""
    sha256: bytes

    @property
    def size(self) -> int:
        """Bytes from the record's header to the end of its footer."""
        return record_size(self.length)


def tombstone_record(key: bytes, sequence: int) -> Record:
    """What says that the piece with this packed key is deleted."""
    against = PieceKey.unpack(key).generation.against
    return Record(Kind.TOMBSTONE, sequence, key, against, 0, 0, 0, 0, hashlib.sha256(b"").digest())


def record_size(length: int) -> int:
    """Bytes that a record with a payload of `length` bytes takes in its superblock."""
    return RECORD_HEADER_BYTES + length + -length % 8 + len(FOOTER)


def trailer(length: int) -> bytes:
    """What follows a payload of `length` bytes: padding and footer."""
    return _TRAILERS[-length % 8]


def _check(salt: bytes, offset: int, fields: bytes) -> bytes:
    return hashlib.blake2b(offset.to_bytes(8, "big") + fields, digest_size=_CHECK_BYTES, key=salt).digest()


def write_record(record: Record, salt: bytes, offset: int) -> tuple[bytes, bytes]:
    """(what goes before the payload, what goes after it). Raises struct.error if a number does not fit."""
    fields = _RECORD.pack(
        RECORD_MAGIC,
        FORMAT,
        record.kind,
        record.k,
        record.m,
        record.sequence,
        record.against,
        record.chunk_length,
        record.length,
        record.sha256,
        record.key,
    )
    return fields + _check(salt, offset, fields), trailer(record.length)


def read_record(raw: bytes | memoryview, salt: bytes, offset: int) -> Record | None:
    """The record whose header `raw` begins with, or None if it is not a header written for this offset."""
    if len(raw) < RECORD_HEADER_BYTES or raw[:8] != RECORD_MAGIC:
        return None
    fields = bytes(raw[: _RECORD.size])
    if _check(salt, offset, fields) != raw[_RECORD.size : RECORD_HEADER_BYTES]:
        return None
    _, version, kind, k, m, sequence, against, chunk_length, length, sha256, key = _RECORD.unpack(fields)
    if version != FORMAT:
        return None
    return Record(kind, sequence, key, against, k, m, chunk_length, length, sha256)


def superblock_path(folder: Path, number: int) -> Path:
    return folder / f"{number:010d}.vsb"


def superblock_numbers(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("*.vsb") if p.stem.isdigit())


def collect_temporary_files(disk: Disk, folder: Path) -> None:
    """Removes what a crash left of files that were being made."""
    for path in folder.glob("*.vsb.tmp"):
        disk.unlink(path)


class NoRoom(Exception):
    """The file system has no room above the share that is kept free."""


class Appender:
    """The superblock that takes appends. Not thread-safe.

    `stage` collects records, `flush` writes and syncs them all at once. An error in `flush` leaves an
    unknown part of them on disk: the caller must not append to this file again.
    """

    def __init__(self, disk: Disk, fd: int, header: FileHeader, end: int) -> None:
        self.number = header.number
        self.end = end
        """Where the next record goes, staged ones included."""
        self._disk = disk
        self._fd = fd
        self._salt = header.salt
        self._flushed = end
        self._allocated = max(end, disk.size(fd))
        self._staged: list[bytes | memoryview] = []

    @classmethod
    def create(cls, disk: Disk, folder: Path, header: FileHeader) -> Appender:
        """A new superblock; its name and header are on disk when this returns."""
        final = superblock_path(folder, header.number)
        temporary = final.with_name(final.name + ".tmp")
        fd = disk.create(temporary)
        try:
            disk.write(fd, [header.pack()], 0)
            disk.sync(fd)
            disk.rename(temporary, final)
            disk.sync_folder(folder)
        except OSError:
            disk.close(fd)
            for path in (temporary, final):
                try:
                    disk.unlink(path)
                except OSError:
                    pass
            raise
        return cls(disk, fd, header, FILE_HEADER_BYTES)

    @classmethod
    def resume(cls, disk: Disk, folder: Path, header: FileHeader, end: int) -> Appender:
        """A superblock that was closed cleanly: it ends at `end`, and nothing lies beyond."""
        return cls(disk, disk.open(superblock_path(folder, header.number), write=True), header, end)

    @property
    def file_bytes(self) -> int:
        """Size of the file, preallocated space included."""
        return self._allocated

    def make_room(self, size: int, keep_free: KeepFree, limit: int) -> None:
        """Room for a record of `size` bytes more; preallocates up to `limit`. Raises NoRoom, OSError.

        Space that is already preallocated is used whatever else fills the disk.
        """
        need = self.end + size
        if need <= self._allocated:
            return
        ample = max(need, min(need + _STEP, limit))
        for goal in (ample, need + -need % _PAGE):
            growth = goal - self._allocated
            space = self._disk.space(self._fd)
            if space.free - growth < keep_free(space.total):
                continue
            try:
                if self._disk.preallocate(self._fd, self._allocated, growth):
                    self._allocated = goal
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                continue
            return
        raise NoRoom

    def stage(self, record: Record, payload: bytes | memoryview) -> int:
        """Puts the record where it will go and returns its offset. Raises struct.error on a bad number."""
        offset = self.end
        before, after = write_record(record, self._salt, offset)
        self._staged += (before, payload, after)
        self.end += record.size
        return offset

    def flush(self) -> None:
        """All staged records are on disk when this returns. Raises OSError; see the class."""
        self._disk.write(self._fd, self._staged, self._flushed)
        self._disk.sync(self._fd)
        self._staged.clear()
        self._flushed = self.end
        self._allocated = max(self._allocated, self.end)

    def close(self) -> None:
        """Gives back what was preallocated beyond the last record. Raises OSError; the records are safe."""
        try:
            if self._allocated > self.end:
                self._disk.truncate(self._fd, self.end)
                self._disk.sync(self._fd)
        finally:
            self._disk.close(self._fd)

    def abandon(self) -> int:
        """Closes the file as it is, after an error. Returns its size in bytes."""
        try:
            return self._disk.size(self._fd)
        finally:
            self._disk.close(self._fd)


def read_file_header(disk: Disk, fd: int) -> FileHeader | None:
    """None if neither copy is whole. Raises OSError, VstackError on a newer format."""
    return FileHeader.unpack(disk.read(fd, 0, FILE_HEADER_BYTES))


def new_salt() -> bytes:
    return os.urandom(16)
