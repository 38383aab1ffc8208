"""Where the pieces lie: key -> superblock and offset, in RocksDB. A cache of the superblocks.

It decides which of two records of a key holds (the one with the higher sequence number), and keeps the
figures of each superblock in step with the rows: all of a change is one atomic write batch.

Rows; numbers are big-endian:

    "f"                       format of the index (2 bytes)
    "n"                       next sequence number (8)
    "s" number (8)            superblock: salt (16), watermark, pieces, payload bytes, tombstones,
                              live bytes, damaged records (8 each), flags (1)
    "p" packed key (82)       piece: superblock, offset, sequence, chunk length, length (8 each),
                              k, m (2 each), SHA-256 (32)
    "t" packed key (82)       tombstone: superblock, offset, sequence (8 each)

Invariants. A row is written only after its record is on disk. The *watermark* of a superblock is the end
of the prefix whose records are all in the rows; a row never points beyond it. Batches are written in
the order of the log, without fsync: a crash of the machine loses a suffix of them, so watermarks fall
back together with their rows, and the scan at the next start finds what is missing. A crash of the
process loses none. What is lost otherwise makes the index *damaged*: it is thrown away and made anew.

RocksDB's errors have no class of their own, hence the `except Exception` here.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rocksdict import (
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

FORMAT = b"\x00\x01"

_STATE = struct.Struct(">16sQQQQQQB")
_PIECE = struct.Struct(">QQQQQHH32s")
_TOMBSTONE = struct.Struct(">QQQ")

_SEALED = 1
_RETIRED = 2

_DAMAGE_MARK = "DAMAGED"
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


class TombstoneRow(NamedTuple):
    superblock: int
    offset: int
    sequence: int


class SuperblockState(NamedTuple):
    """What the index knows of one superblock."""

    salt: bytes
    watermark: int = FILE_HEADER_BYTES
    pieces: int = 0
    payload_bytes: int = 0
    tombstones: int = 0
    live_bytes: int = 0
    """Of the records that rows point to."""
    damaged: int = 0
    sealed: bool = False
    """Takes no more records."""
    retired: bool = False
    """Sealed because the disk failed."""

    def pack(self) -> bytes:
        return _STATE.pack(*self[:-2], self.sealed * _SEALED | self.retired * _RETIRED)

    @classmethod
    def unpack(cls, raw: bytes) -> SuperblockState:
        *figures, flags = _STATE.unpack(raw)
        return cls._make([*figures, bool(flags & _SEALED), bool(flags & _RETIRED)])


class Index:
    """Lookups are thread-safe. Changes are made through `Update`, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes the index. Raises IndexDamaged."""
        self._mark = folder / _DAMAGE_MARK
        if self._mark.exists():
            raise IndexDamaged(f"the index in {folder} was found damaged before")
        try:
            self._db = Rdict(str(folder), _options())
        except Exception as error:
            raise IndexDamaged(f"the index in {folder} does not open: {error}") from error
        try:
            self._load()
        except (VstackError, struct.error) as error:
            self._db.close()
            raise IndexDamaged(f"the index in {folder} is not readable: {error}") from error

    def _load(self) -> None:
        stored = self._get(b"f")
        if stored is None:
            self._db.put(b"f", FORMAT)
        elif stored != FORMAT:
            raise IndexDamaged("the index has another format")
        self.next_sequence = int.from_bytes(self._get(b"n") or b"", "big")
        self.superblocks = {
            int.from_bytes(key[1:], "big"): SuperblockState.unpack(value)
            for key, value in self._rows(b"s", b"s")
        }

    def piece(self, key: bytes) -> PieceRow | None:
        """Raises IndexDamaged."""
        raw = self._get(b"p" + key)
        return None if raw is None else PieceRow._make(_PIECE.unpack(raw))

    def tombstone(self, key: bytes) -> TombstoneRow | None:
        """Raises IndexDamaged."""
        raw = self._get(b"t" + key)
        return None if raw is None else TombstoneRow._make(_TOMBSTONE.unpack(raw))

    def pieces(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, PieceRow]]:
        """The pieces whose packed keys begin with `prefix` and lie above `after`, in order."""
        start = max(prefix, after + b"\0") if after else prefix
        for key, value in self._rows(b"p" + prefix, b"p" + start):
            yield key[1:], PieceRow._make(_PIECE.unpack(value))

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
        self._changed: set[int] = set()
        self._pieces: dict[bytes, PieceRow | None] = {}
        self._tombstones: dict[bytes, TombstoneRow | None] = {}

    def open_superblock(self, number: int, state: SuperblockState) -> None:
        """The first that the index hears of a superblock."""
        self._set(number, state)

    def add(self, number: int, offset: int, record: Record) -> bool:
        """A record that is on disk. False if it is not the latest of its key, and is therefore dead."""
        key = record.key
        piece = self._pieces[key] if key in self._pieces else self._index.piece(key)
        tombstone = self._tombstones[key] if key in self._tombstones else self._index.tombstone(key)
        newest = max((row.sequence for row in (piece, tombstone) if row is not None), default=-1)
        if record.kind not in (Kind.DATA, Kind.TOMBSTONE) or record.sequence <= newest:
            return False
        if piece is not None:
            self._count(piece.superblock, -1, 0, piece.length)
            self._pieces[key] = None
        if tombstone is not None:
            self._count(tombstone.superblock, 0, -1, 0)
            self._tombstones[key] = None
        if record.kind == Kind.DATA:
            self._pieces[key] = PieceRow(
                number,
                offset,
                record.sequence,
                record.chunk_length,
                record.length,
                record.k,
                record.m,
                record.sha256,
            )
            self._count(number, 1, 0, record.length)
        else:
            self._tombstones[key] = TombstoneRow(number, offset, record.sequence)
            self._count(number, 0, 1, 0)
        return True

    def damaged(self, number: int) -> None:
        """One more damaged record in the superblock."""
        state = self._states[number]
        self._set(number, state._replace(damaged=state.damaged + 1))

    def advance(self, number: int, watermark: int) -> None:
        """Everything below `watermark` is accounted for."""
        self._set(number, self._states[number]._replace(watermark=watermark))

    def seal(self, number: int, *, retired: bool = False) -> None:
        self._set(number, self._states[number]._replace(sealed=True, retired=retired))

    def commit(self, next_sequence: int, *, sync: bool = False) -> None:
        """Writes the change; with `sync`, durably. Raises IndexWriteFailed, and nothing has changed."""
        batch = WriteBatch(raw_mode=True)
        batch[b"n"] = next_sequence.to_bytes(8, "big")
        for number in self._changed:
            batch[b"s" + number.to_bytes(8, "big")] = self._states[number].pack()
        for key, piece in self._pieces.items():
            if piece is None:
                del batch[b"p" + key]
            else:
                batch[b"p" + key] = _PIECE.pack(*piece)
        for key, tombstone in self._tombstones.items():
            if tombstone is None:
                del batch[b"t" + key]
            else:
                batch[b"t" + key] = _TOMBSTONE.pack(*tombstone)
        before = self._index.superblocks
        self._index.superblocks = self._states  # first: whoever sees a row may look its superblock up
        try:
            self._index.write(batch, sync=sync)
        except IndexWriteFailed:
            self._index.superblocks = before
            raise
        self._index.next_sequence = next_sequence

    def _set(self, number: int, state: SuperblockState) -> None:
        self._states[number] = state
        self._changed.add(number)

    def _count(self, number: int, pieces: int, tombstones: int, length: int) -> None:
        """Adds to (1) or takes from (-1) the live figures of a superblock one piece or one tombstone."""
        state = self._states[number]
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


def delete_index(disk: Disk, folder: Path) -> None:
    """Throws the index away, if there is one. A crash leaves it whole, or leaves none."""
    discarded = folder.with_name(folder.name + ".discarded")
    shutil.rmtree(discarded, ignore_errors=True)
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
