"""`vstack-node --check`: reads all that a stopped node's store holds, says what is wrong, changes nothing.

It decides what is damage and what is not. Damage: a record that is not whole though another follows, a
superblock without a header, a row of the index that points to something else than its piece, a piece below a
watermark that has no row. No damage: an unfinished write at an end, hints that are not good, an index that
is missing or behind; the next start sees to them. Nor is a damaged record that nothing needs any more: its
piece was written anew or deleted since. It is counted, and goes when its superblock is compacted.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vstack.errors import UsageError, VstackError
from vstack.mesh.registers import PieceKey
from vstack.node.disk import Disk
from vstack.node.hints import read_hints
from vstack.node.index import Index, IndexDamaged
from vstack.node.rows import PieceRow, TombstoneRow
from vstack.node.scan import Damage, Found, Tail, scan
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    Kind,
    Record,
    read_file_header,
    superblock_numbers,
    superblock_path,
)

_EVERY_BYTES = 8 << 20
_COPIED = {"rocksdict-config.json", "LOCK"}
"""Files of the index that even a reader rewrites."""


class _Place(NamedTuple):
    """Of the record of a key that holds. Compares as `index` does."""

    sequence: int
    superblock: int
    offset: int
    kind: int


class _Damaged(NamedTuple):
    """Bytes of a superblock that hold no whole record."""

    superblock: int
    offset: int
    end: int
    record: Record | None
    """Of the record, if its header is whole."""

    @property
    def what(self) -> str:
        name = "record" if self.record is None else _piece(self.record.key)
        return f"{name} damaged, {self.end - self.offset} bytes"


@dataclass
class CheckReport:
    """What was found. `problems` are sentences, one for each thing that is damaged."""

    superblocks: int = 0
    records: int = 0
    pieces: int = 0
    payload_bytes: int = 0
    torn_tails: int = 0
    without_hints: int = 0
    """Sealed superblocks that a rebuild would have to scan."""
    index: str = "agrees with the superblocks"
    quarantined: int = 0
    dead_damage: int = 0
    """Damaged records that nothing needs any more."""
    problems: list[str] = field(default_factory=list)


def check(folder: Path, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Checks the store in `folder`, which no process may have open. `progress` gets (bytes read, of all).

    Raises UsageError if there is no store, VstackError if a superblock is of a newer format, OSError.
    """
    superblocks = folder / "superblocks"
    if not superblocks.is_dir():
        raise UsageError(f"{folder} holds no pieces: is it the data directory of a node?")
    run = _Check(superblocks, progress)
    for number in superblock_numbers(superblocks):
        run.superblock(number)
    if not (folder / "index").exists():
        run.report.index = "missing; the next start makes it anew"
    else:
        run.index(folder / "index")
    run.sort_damage()
    return run.report


class _Check:
    def __init__(self, folder: Path, progress: Callable[[int, int], None] | None) -> None:
        self.report = CheckReport()
        self._disk = Disk()
        self._folder = folder
        self._progress = progress
        self._done = 0
        self._total = sum(path.stat().st_size for path in folder.glob("*.vsb"))
        self._latest: dict[bytes, _Place] = {}
        self._lengths: dict[bytes, int] = {}
        self._damaged: dict[int, list[_Damaged]] = {}
        """By superblock, in order of offset."""
        self._needed: set[_Damaged] | None = None
        """Damage that rows of the index point into, or beyond what it has seen. None without an index."""
        self._unreadable: set[int] = set()
        """Superblocks without a header."""

    def superblock(self, number: int) -> None:
        """Reads one superblock, and remembers which records of which keys it holds."""
        self.report.superblocks += 1
        fd = self._disk.open(superblock_path(self._folder, number))
        try:
            header = read_file_header(self._disk, fd)
            if header is None or header.number != number:
                self._problem(number, 0, "its header is damaged")
                self._unreadable.add(number)
                return
            has_hints = read_hints(self._disk, fd, header.salt) is not None
            self.report.without_hints += not has_hints
            start = self._done
            for item in scan(self._disk, fd, header.salt, FILE_HEADER_BYTES):
                match item:
                    case Found(offset, record):
                        self._record(number, offset, record)
                    case Damage(offset, length, damaged):
                        found = _Damaged(number, offset, offset + length, damaged)
                        self._damaged.setdefault(number, []).append(found)
                    case Tail(_, torn, _):
                        self.report.torn_tails += torn
                self._tell(start + item.offset)
            self._done = start + self._disk.size(fd)
        finally:
            self._disk.close(fd)

    def sort_damage(self) -> None:
        """Says of each damaged record whether anything needs it. Call it last."""
        for number in sorted(self._damaged):
            for damaged in self._damaged[number]:
                if self._is_dead(damaged):
                    self.report.dead_damage += 1
                else:
                    self._problem(number, damaged.offset, damaged.what)

    def _is_dead(self, damaged: _Damaged) -> bool:
        if self._needed is not None:
            return damaged not in self._needed
        latest = None if damaged.record is None else self._latest.get(damaged.record.key)
        return latest is not None and damaged.record is not None and latest.sequence > damaged.record.sequence

    def index(self, folder: Path) -> None:
        """Compares the index with what was read."""
        with tempfile.TemporaryDirectory() as temporary:
            mirror = Path(temporary) / "index"
            mirror.mkdir()
            for path in folder.iterdir():
                if path.name in _COPIED:
                    shutil.copy(path, mirror)
                else:
                    (mirror / path.name).symlink_to(path.resolve())
            try:
                index = Index(mirror, read_only=True)
            except IndexDamaged as error:
                self.report.index = f"damaged; the next start makes it anew ({error})"
                return
            try:
                self._compare(index)
            except VstackError as error:
                self.report.index = f"damaged; --rebuild-index makes it anew ({error})"
                self.report.problems.append(str(error))
            finally:
                index.close()

    def _compare(self, index: Index) -> None:
        wrong = 0
        behind = False
        self._needed = self._needed_by(index)
        for key, row in index.pieces(b"", b""):
            place = self._latest.get(key)
            if place is None or (place.superblock, place.offset) != (row.superblock, row.offset):
                state = None if place is None else index.superblocks.get(place.superblock)
                if place is not None and (state is None or place.offset >= state.watermark):
                    behind = True
                    continue
                if (
                    self._damage_at(row.superblock, row.offset) is not None
                    or row.superblock in self._unreadable
                ):
                    continue  # reported already
                wrong += 1
                self._problem(
                    row.superblock, row.offset, f"the index says {_piece(key)} lies here; it does not"
                )
        for key, place in self._latest.items():
            state = index.superblocks.get(place.superblock)
            if state is None or place.offset >= state.watermark:
                behind = True
            elif place.kind == Kind.DATA and not self._is_known(index, key, place.sequence):
                wrong += 1
                self._problem(place.superblock, place.offset, f"the index does not know {_piece(key)}")
        self.report.quarantined = len(index.quarantined)
        if wrong:
            self.report.index = f"disagrees with the superblocks in {wrong} places: --rebuild-index"
        elif behind:
            self.report.index = "is behind the superblocks; the next start catches up"

    def _needed_by(self, index: Index) -> set[_Damaged]:
        rows: Iterator[tuple[bytes, PieceRow | TombstoneRow]] = itertools.chain(
            index.pieces(b"", b""), index.quarantined.items(), index.tombstones()
        )
        needed = {self._damage_at(row.superblock, row.offset) for _, row in rows} if self._damaged else set()
        for number, some in self._damaged.items():
            state = index.superblocks.get(number)
            needed |= {d for d in some if state is None or d.end > state.watermark}
        return {damaged for damaged in needed if damaged is not None}

    def _damage_at(self, number: int, offset: int) -> _Damaged | None:
        some = self._damaged.get(number, [])
        at = bisect_right(some, offset, key=lambda d: d.offset) - 1
        return some[at] if at >= 0 and offset < some[at].end else None

    def _is_known(self, index: Index, key: bytes, sequence: int) -> bool:
        """Whether the index knows the piece, or that it was deleted (its tombstone may be damaged here)."""
        deleted = index.tombstone(key)
        known = index.piece(key) is not None or key in index.quarantined
        return known or (deleted is not None and deleted.sequence > sequence)

    def _record(self, number: int, offset: int, record: Record) -> None:
        self.report.records += 1
        if record.kind not in (Kind.DATA, Kind.TOMBSTONE):
            return
        place = _Place(record.sequence, number, offset, record.kind)
        before = self._latest.get(record.key)
        if before is not None and before > place:
            return
        if before is None or before.kind != Kind.DATA:
            self.report.pieces += record.kind == Kind.DATA
        else:
            self.report.pieces -= record.kind != Kind.DATA
        self.report.payload_bytes += record.length - self._lengths.get(record.key, 0)
        self._lengths[record.key] = record.length
        self._latest[record.key] = place

    def _problem(self, number: int, offset: int, what: str) -> None:
        self.report.problems.append(f"superblock {number} at {offset}: {what}")

    def _tell(self, done: int) -> None:
        if self._progress is not None and done - self._done >= _EVERY_BYTES:
            self._progress(done, self._total)


def _piece(key: bytes) -> str:
    try:
        name = PieceKey.unpack(key)
    except ValueError:
        return "a piece with a malformed key"
    return f"piece {name.piece} of chunk {name.chunk} of video {name.video[:12]}"
