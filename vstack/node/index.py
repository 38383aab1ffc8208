"""Where the pieces lie: key -> superblock and offset, in RocksDB. A cache of the superblocks.

It decides which of two records of a key holds (the one with the higher sequence number; of two copies of
one record the one in the higher superblock), which tombstones still matter, and keeps the figures of each
superblock in step with the rows: all of a change is one atomic write batch.

Rows; numbers are big-endian:

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

Invariants. A row is written only after its record is on disk. The *watermark* of a superblock is the end
of the prefix whose records are all in the rows; a row never points beyond it. Batches are written in
the order of the log, mostly without fsync: a crash of the machine loses a suffix of them, so watermarks
fall back together with their rows, and the scan at the next start finds what is missing. A crash of the
process loses none. What is lost otherwise makes the index *damaged*: it is thrown away and made anew.

A superblock goes in three steps: its state is marked *doomed*, durably, when no row points to it any more
(but those of tombstones that go with it); the file is unlinked, durably; its state is removed. The next
start finishes what a crash interrupted. Quarantine and the place of the scrub are kept here alone: an index
made anew does not know what was found damaged, and its first scrub finds it again.

RocksDB's errors have no class of their own, hence the `except Exception` here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

from vstack.errors import VstackError
from vstack.node.disk import Disk
from vstack.node.superblock import FILE_HEADER_BYTES, Kind, Record, record_size

FORMAT = b"\x00\x02"

_STATE = struct.Struct(">16sQQQQQQQB")
_PIECE = struct.Struct(">QQQQQHH32s")
_TOMBSTONE = struct.Struct(">QQQ")
_NUMBER = struct.Struct(">Q")

_SEALED = 1
_RETIRED = 2
_DOOMED = 4

_DAMAGE_MARK = "DAMAGED"
_MOST_SEEN = 2_000_000
"""About 130 MB. Beyond that a rebuild asks the rows themselves."""

_WRITE_BUFFER = 4 << 20
_BLOCK_CACHE = 4 << 20


class IndexDamaged(VstackError):
    """The index cannot be read. The pieces are safe: the next start makes it anew from the superblocks."""


class IndexWriteFailed(VstackError):
    """RocksDB refused a batch. Nothing of it is in the index."""


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


class Index:
    """Lookups are thread-safe. Changes are made through `Update`, one at a time."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Opens or makes the index; only opens it if it is `read_only`. Raises IndexDamaged."""
        self._folder = folder
        self._mark = folder / _DAMAGE_MARK
        if self._mark.exists():
            raise IndexDamaged(f"the index in {folder} was found damaged before")
        try:
            access = AccessType.read_only(False) if read_only else AccessType.read_write()
            self._db = Rdict(str(folder), _options(), access_type=access)
        except Exception as error:
            raise IndexDamaged(f"the index in {folder} does not open: {error}") from error
        try:
            self._load()
        except (VstackError, struct.error) as error:
            self._db.close()
            raise IndexDamaged(f"the index in {folder} is not readable: {error}") from error

    def _load(self) -> None:
        self._seen: set[int] | None = None
        """Hashes of all keys that have rows, while an index that began empty is being made."""
        stored = self._get(b"f")
        if stored is None:
            self._db.put(b"f", FORMAT)
            self._seen = set()
        elif stored != FORMAT:
            raise IndexDamaged("the index has another format")
        self.next_sequence = int.from_bytes(self._get(b"n") or b"", "big")
        self.superblocks = {
            int.from_bytes(key[1:], "big"): SuperblockState.unpack(value)
            for key, value in self._rows(b"s", b"s")
        }
        self.quarantined = {key[1:]: PieceRow.unpack(value) for key, value in self._rows(b"q", b"q")}
        """By packed key. In memory: there are few, and every lookup needs them."""

    def may_know(self, key: bytes) -> bool:
        """False if there is certainly no row of the key. Saves an index that is being made most lookups."""
        return self._seen is None or hash(key) in self._seen

    def saw(self, key: bytes) -> None:
        """A row of the key is about to be written."""
        if self._seen is not None:
            self._seen.add(hash(key))
            if len(self._seen) > _MOST_SEEN:
                self._seen = None

    def piece(self, key: bytes) -> PieceRow | None:
        """Raises IndexDamaged."""
        raw = self._get(b"p" + key)
        return None if raw is None else PieceRow.unpack(raw)

    def tombstone(self, key: bytes) -> TombstoneRow | None:
        """Raises IndexDamaged."""
        raw = self._get(b"t" + key)
        return None if raw is None else TombstoneRow.unpack(raw)

    def tombstones(self, after: bytes = b"") -> Iterator[tuple[bytes, TombstoneRow]]:
        """Those whose packed keys lie above `after`, in order."""
        for key, value in self._rows(b"t", b"t" + after + b"\0" if after else b"t"):
            yield key[1:], TombstoneRow.unpack(value)

    def is_complete(self) -> bool:
        """Whether it has heard of every superblock since it was made. Raises IndexDamaged."""
        return self._get(b"e") is not None

    def mark_complete(self) -> None:
        """Raises IndexWriteFailed."""
        self._seen = None
        batch = WriteBatch(raw_mode=True)
        batch[b"e"] = b""
        self.write(batch, sync=False)

    def scrub_place(self) -> bytes | None:
        """What `save_scrub_place` was given last. Raises IndexDamaged."""
        return self._get(b"c")

    def save_scrub_place(self, place: bytes) -> None:
        """Raises IndexWriteFailed. Not durable by itself: a crash may set the scrub back."""
        batch = WriteBatch(raw_mode=True)
        batch[b"c"] = place
        self.write(batch, sync=False)

    def disk_bytes(self) -> int:
        """What the index itself takes on disk."""
        total = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # RocksDB removes files as it goes
                    total += entry.stat().st_size
        return total

    def pieces(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, PieceRow]]:
        """The pieces whose packed keys begin with `prefix` and lie above `after`, in order."""
        start = max(prefix, after + b"\0") if after else prefix
        for key, value in self._rows(b"p" + prefix, b"p" + start):
            yield key[1:], PieceRow.unpack(value)

    def close(self) -> None:
        """No iteration may be open."""
        self._db.close()

    def write(self, batch: WriteBatch, *, sync: bool) -> None:
        """Raises IndexWriteFailed."""
        options = WriteOptions()
        options.sync = sync
        try:
            self._db.write(batch, options)
        except Exception as error:
            raise IndexWriteFailed(f"the index takes no writes: {error}") from error

    def _get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise self._damaged(error) from error
        return value

    def _rows(self, prefix: bytes, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._db.iter()
        cursor.seek(start)
        while cursor.valid():
            key: bytes = cursor.key()
            if not key.startswith(prefix):
                return
            yield key, cursor.value()
            cursor.next()
        try:
            cursor.status()
        except Exception as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> VstackError:
        """Remembers damage, so that the next start does not trust the index again."""
        if "Corruption" not in str(error):
            return VstackError(f"the index cannot be read now: {error}")
        self._mark.touch()
        return IndexDamaged(f"the index is damaged, restart the node to make it anew: {error}")


class Update:
    """A change of the index, prepared in memory: all of it is applied by `commit`, or nothing.

    Rows and figures change together, so that the figures are exact at every moment.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._states = dict(index.superblocks)
        self._quarantined = index.quarantined
        self._changed: set[int] = set()
        self._rows: dict[bytes, PieceRow | TombstoneRow | None] = {}
        """The only row of each key that was looked at, quarantined ones included."""
        self._before: dict[bytes, bytes] = {}
        """Under which prefix the row of a key lies now."""
        self._touched: set[bytes] = set()
        self._unknown: set[int] | None = None
        """Superblocks that hold something unknown, once somebody has asked."""

    def open_superblock(self, number: int, state: SuperblockState) -> None:
        """The first that the index hears of a superblock."""
        self._set(number, state)

    def add(self, number: int, offset: int, record: Record) -> bool:
        """A record that is on disk. False if it is not the latest of its key, and is therefore dead."""
        kind, key, sequence = record.kind, record.key, record.sequence
        if kind == Kind.HINTS:
            state = self._states[number]
            self._set(number, state._replace(hint_bytes=state.hint_bytes + record.size))
        if kind not in (Kind.DATA, Kind.TOMBSTONE):
            return False
        held = self._row(key)
        older: tuple[int, ...] = ()
        if held is not None:
            if (held.sequence, held.superblock) >= (sequence, number):
                if kind == Kind.DATA:
                    self._put(key, held._replace(older=self._on_disk((*held.older, number))))
                return False
            buried = (held.superblock,) if isinstance(held, PieceRow) else ()
            older = self._on_disk((*held.older, *buried))
            self._forget(key, held)
        if kind == Kind.DATA:
            self._put(
                key,
                PieceRow(
                    number,
                    offset,
                    sequence,
                    record.chunk_length,
                    record.length,
                    record.k,
                    record.m,
                    record.sha256,
                    older,
                ),
            )
            self._count(number, 1, 0, record.length)
        else:
            self._put(key, TombstoneRow(number, offset, sequence, older))
            self._count(number, 0, 1, 0)
        return True

    def quarantine(self, key: bytes, row: PieceRow) -> None:
        """The piece is damaged, and not served any more, if it still lies where `row` says."""
        if self._row(key) != row or key in self._quarantined:
            return
        self._forget(key, row)
        self._quarantined = {**self._quarantined, key: row}
        self._put(key, row)

    def drop_if_useless(self, key: bytes) -> None:
        """Drops the tombstone of the key, if there is one and it no longer matters."""
        row = self._row(key)
        if isinstance(row, TombstoneRow) and not self.tombstone_matters(row):
            self._forget(key, row)
            self._put(key, None)

    def tombstone_matters(self, row: TombstoneRow, without: int | None = None) -> bool:
        """Whether it keeps a piece from coming back; `without` a superblock as if that were gone."""
        if any(number in self._states and number != without for number in row.older):
            return True
        if self._unknown is None:
            self._unknown = {number for number, state in self._states.items() if state.holds_unknown}
        return bool(self._unknown - {without})

    def damaged(self, number: int) -> None:
        """One more damaged record in the superblock."""
        state = self._states[number]
        self._set(number, state._replace(damaged=state.damaged + 1))

    def advance(self, number: int, watermark: int) -> None:
        """Everything below `watermark` is accounted for."""
        self._set(number, self._states[number]._replace(watermark=watermark))

    def seal(self, number: int, *, retired: bool = False) -> None:
        self._set(number, self._states[number]._replace(sealed=True, retired=retired))

    def doom(self, number: int) -> None:
        """No row points to the superblock any more, or only those of tombstones that go with it."""
        self._set(number, self._states[number]._replace(doomed=True))

    def remove_superblock(self, number: int) -> None:
        """The superblock is unlinked, durably. Tombstones that this frees: see `drop_if_useless`."""
        del self._states[number]
        self._changed.add(number)
        self._unknown = None

    def commit(self, next_sequence: int, *, sync: bool = False) -> None:
        """Writes the change; with `sync`, durably. Raises IndexWriteFailed, and nothing has changed."""
        batch = WriteBatch(raw_mode=True)
        batch[b"n"] = next_sequence.to_bytes(8, "big")
        for number in self._changed:
            if number in self._states:
                batch[b"s" + number.to_bytes(8, "big")] = self._states[number].pack()
            else:
                del batch[b"s" + number.to_bytes(8, "big")]
        for key in self._touched:
            row = self._rows[key]
            prefix = None if row is None else self._prefix(key, row)
            before = self._before.get(key)
            if before is not None and before != prefix:
                del batch[before + key]
            if row is not None and prefix is not None:
                batch[prefix + key] = row.pack()
        states = self._index.superblocks
        self._index.superblocks = self._states  # first: whoever sees a row may look its superblock up
        try:
            self._index.write(batch, sync=sync)
        except IndexWriteFailed:
            self._index.superblocks = states
            raise
        self._index.quarantined = self._quarantined
        self._index.next_sequence = next_sequence

    def _row(self, key: bytes) -> PieceRow | TombstoneRow | None:
        if key not in self._rows:
            row: PieceRow | TombstoneRow | None = None
            if self._index.may_know(key):
                row = self._index.piece(key) or self._quarantined.get(key) or self._index.tombstone(key)
            self._rows[key] = row
            if row is not None:
                self._before[key] = self._prefix(key, row)
        return self._rows[key]

    def _put(self, key: bytes, row: PieceRow | TombstoneRow | None) -> None:
        self._rows[key] = row
        self._touched.add(key)
        self._index.saw(key)
        if key in self._quarantined and isinstance(row, PieceRow):
            self._quarantined = {**self._quarantined, key: row}

    def _prefix(self, key: bytes, row: PieceRow | TombstoneRow) -> bytes:
        if isinstance(row, TombstoneRow):
            return b"t"
        return b"q" if key in self._quarantined else b"p"

    def _forget(self, key: bytes, row: PieceRow | TombstoneRow) -> None:
        """Takes the key's row out of the figures, or out of quarantine."""
        if isinstance(row, TombstoneRow):
            self._count(row.superblock, 0, -1, 0)
        elif key in self._quarantined:
            self._quarantined = {k: r for k, r in self._quarantined.items() if k != key}
        else:
            self._count(row.superblock, -1, 0, row.length)

    def _on_disk(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Those that are superblocks still, each once."""
        return tuple(sorted({n for n in numbers if n in self._states})) if numbers else ()

    def _set(self, number: int, state: SuperblockState) -> None:
        self._states[number] = state
        self._changed.add(number)
        self._unknown = None

    def _count(self, number: int, pieces: int, tombstones: int, length: int) -> None:
        """Adds to (1) or takes from (-1) the live figures of a superblock one piece or one tombstone."""
        state = self._states.get(number)
        if state is None:  # the row outlived its superblock
            return
        sign = pieces + tombstones
        self._set(
            number,
            state._replace(
                pieces=state.pieces + pieces,
                payload_bytes=state.payload_bytes + sign * length,
                tombstones=state.tombstones + tombstones,
                live_bytes=state.live_bytes + sign * record_size(length),
            ),
        )


def collect_discarded(folder: Path) -> None:
    """Removes what a crash left of an index that was being thrown away."""
    shutil.rmtree(folder.with_name(folder.name + ".discarded"), ignore_errors=True)


def delete_index(disk: Disk, folder: Path) -> None:
    """Throws the index away, if there is one. A crash leaves it whole, or leaves none."""
    discarded = folder.with_name(folder.name + ".discarded")
    collect_discarded(folder)
    if folder.exists():
        disk.rename(folder, discarded)
        disk.sync_folder(folder.parent)
        shutil.rmtree(discarded, ignore_errors=True)


def _options() -> Options:
    """Small: a node must start in a second and share a machine with four others."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    options.set_paranoid_checks(True)
    options.set_write_buffer_size(_WRITE_BUFFER)
    options.set_max_background_jobs(2)
    options.set_max_open_files(64)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1 << 20)
    options.set_compression_type(DBCompressionType.none())
    table = BlockBasedOptions()
    table.set_block_cache(Cache(_BLOCK_CACHE))
    table.set_bloom_filter(10, False)
    options.set_block_based_table_factory(table)
    return options
