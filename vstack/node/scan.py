"""Reads a superblock from some point to its end, whatever state it is in.

It decides what counts as a record: a header whose check is right for its place, inside the file, a payload
with its hash, and a footer. After bytes that are no record it goes on at the next valid header, so damage
costs the damaged record alone. What is not a record is *damage* if a whole record follows, and otherwise
the *torn* tail of a write that was never acknowledged: records are written in order, and synced before
they are acknowledged. (Records of one unfinished batch may reach the disk out of order at a power loss;
the torn ones among them are then reported as damage, though nobody was promised them.)

Invariants: it writes nothing; it never takes zeros, or bytes inside the payload of a whole record, for
more than they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from vstack.node.disk import Disk
from vstack.node.superblock import RECORD_HEADER_BYTES, RECORD_MAGIC, Record, read_record, trailer

_WINDOW = 1 << 20
_PAGE = 4096


class Found(NamedTuple):
    """A whole record: its header, payload hash and footer are right."""

    offset: int
    record: Record


class Damage(NamedTuple):
    """Bytes that were once written and hold no whole record, though one follows."""

    offset: int
    length: int
    record: Record | None
    """Of the record, if its header is whole."""


class Tail(NamedTuple):
    """The end of the scan: what lies between the last whole record and the end of the file."""

    offset: int
    """Where the last whole record ends."""
    torn: bool
    """True if something other than zeros follows."""
    end: int
    """A multiple of 8 beyond which there are only zeros."""


class _Window:
    """The file through one buffer of 1 MiB. What cannot be read (EIO) reads as 0xEE: damage, not an end.

    Unless it is `strict`: then it raises OSError.
    """

    def __init__(self, disk: Disk, fd: int, size: int, strict: bool) -> None:
        self.size = size
        self._strict = strict
        self._disk = disk
        self._fd = fd
        self._start = 0
        self._data = b""

    def view(self, offset: int, length: int) -> memoryview:
        """`length` bytes at `offset`, at most a window; fewer only at the end of the file."""
        length = min(length, self.size - offset)
        inside = offset - self._start
        if inside < 0 or inside + length > len(self._data):
            self._start, inside = offset, 0
            self._data = self._read(offset, min(_WINDOW, self.size - offset))
        return memoryview(self._data)[inside : inside + length]

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._disk.read(self._fd, offset, length)
        except OSError:
            if self._strict:
                raise
            if length <= _PAGE:
                return b"\xee" * length
        pages = range(offset, offset + length, _PAGE)
        return b"".join(self._read(at, min(_PAGE, offset + length - at)) for at in pages)


def _payload_is_whole(window: _Window, offset: int, record: Record) -> bool:
    start = offset + RECORD_HEADER_BYTES
    if record.size <= _WINDOW:
        rest = window.view(start, record.size - RECORD_HEADER_BYTES)
        whole = hashlib.sha256(rest[: record.length]).digest() == record.sha256
        return whole and rest[record.length :] == trailer(record.length)
    digest = hashlib.sha256()
    for at in range(start, start + record.length, _WINDOW):
        digest.update(window.view(at, min(_WINDOW, start + record.length - at)))
    after = trailer(record.length)
    return digest.digest() == record.sha256 and window.view(start + record.length, len(after)) == after


def _header_at(window: _Window, salt: bytes, offset: int) -> Record | None:
    """A valid header of a record that lies inside the file."""
    record = read_record(window.view(offset, RECORD_HEADER_BYTES), salt, offset)
    return record if record is not None and offset + record.size <= window.size else None


def _next_header(window: _Window, salt: bytes, start: int) -> int:
    """Offset of the first valid header at or after `start`, or the size of the file.

    Headers lie at multiples of 8, and so does `start`: the magic never spans two windows.
    """
    for offset in range(start, window.size, _WINDOW):
        block = bytes(window.view(offset, _WINDOW))
        at = block.find(RECORD_MAGIC)
        while at >= 0:
            if at % 8 == 0 and _header_at(window, salt, offset + at) is not None:
                return offset + at
            at = block.find(RECORD_MAGIC, at + 1)
    return window.size


def _end_of_content(window: _Window, start: int) -> int:
    """The multiple of 8 at or after `start` beyond which the file holds only zeros."""
    end = start
    for at in range(start, window.size, _WINDOW):
        inside = len(bytes(window.view(at, _WINDOW)).rstrip(b"\0"))
        if inside:
            end = at + inside
    return min(end + -end % 8, max(window.size, start))


def scan(
    disk: Disk, fd: int, salt: bytes, start: int, *, strict: bool = False
) -> Iterator[Found | Damage | Tail]:
    """What the file holds from `start` (a record boundary) on, in order of offset; the last item is the Tail.

    Reads everything and hashes every payload. After bytes that are no record it goes on at the next valid
    header. Reading errors count as damage of what could not be read; if `strict`, they are raised.
    """
    window = _Window(disk, fd, disk.size(fd), strict)
    offset = whole = start
    waiting: list[Damage] = []
    while offset < window.size:
        record = _header_at(window, salt, offset)
        if record is None:
            following = _next_header(window, salt, offset + 8)
            waiting.append(Damage(offset, following - offset, None))
            offset = following
        elif _payload_is_whole(window, offset, record):
            yield from waiting
            waiting.clear()
            yield Found(offset, record)
            offset = whole = offset + record.size
        else:
            waiting.append(Damage(offset, record.size, record))
            offset += record.size
    end = _end_of_content(window, whole)
    yield Tail(whole, end > whole, end)
