"""Where the pieces lie: key -> superblock and offset, in RocksDB. A cache of the superblocks.

Its rows are described in `rows`; they are changed through `update` alone.

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
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

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
from vstack.node.rows import FORMAT, PieceRow, SuperblockState, TombstoneRow

log = logging.getLogger(__name__)

_DAMAGE_MARK = "DAMAGED"
_MOST_SEEN = 2_000_000
"""About 130 MB. Beyond that a rebuild asks the rows themselves."""

_WRITE_BUFFER = 4 << 20
_BLOCK_CACHE = 4 << 20


class IndexDamaged(VstackError):
    """The index cannot be read. The pieces are safe: the next start makes it anew from the superblocks."""


class IndexWriteFailed(VstackError):
    """RocksDB refused a batch. Nothing of it is in the index."""


class Index:
    """Lookups are thread-safe. Changes are made through `update.Update`, one at a time."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Opens or makes the index; only opens it if it is `read_only`. Raises IndexDamaged."""
        self._folder = folder
        self._mark = folder / _DAMAGE_MARK
        self._measured, self._measured_until = 0, 0.0
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
        self.found_damaged = 0
        """Pieces put in quarantine since it was opened."""

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
        """What the index itself takes on disk, or took less than a second ago: this is asked often."""
        now = monotonic()
        if now < self._measured_until:
            return self._measured
        total = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # RocksDB removes files as it goes
                    total += entry.stat().st_size
        self._measured, self._measured_until = total, now + 1.0
        return total

    def pieces(self, prefix: bytes, after: bytes) -> Iterator[tuple[bytes, PieceRow]]:
        """The pieces whose packed keys begin with `prefix` and lie above `after`, in order."""
        start = max(prefix, after + b"\0") if after else prefix
        for key, value in self._rows(b"p" + prefix, b"p" + start):
            yield key[1:], PieceRow.unpack(value)

    def close(self) -> None:
        """No iteration may be open. What RocksDB cannot write now (a full disk), the next start finds."""
        try:
            self._db.close()
        except Exception as error:  # noqa: BLE001
            log.error("the index was not closed in order: %s", error)

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
