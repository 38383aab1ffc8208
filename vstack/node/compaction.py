"""Gives back the space of dead records: copies what is live in a superblock elsewhere, then unlinks it.

It decides which superblock is worth it, and when one may go. A sealed superblock is compacted when a quarter
of it is dead, or at once when it holds something unknown: it was retired, or has damaged records. (As long
as it stays, no tombstone may go.) The one with the highest number never is; when as much of that is dead,
and it is worth the while, another one is opened, so that a node with little to store gets its space back too.

Steps, each of which a crash may interrupt without loss:

    copy and switch   some live records at a time: read and verified, then, under the store's lock, appended
                      to the active superblock, synced, and their rows switched. A record whose row no longer
                      points here by then (deleted, or written anew) is not copied.
    doom              when no row points here: said in the index, durably
    unlink            and the folder synced
    forget            the index drops the superblock, and the tombstones that only it had made necessary

A copy keeps its sequence number. While both exist a rebuild takes the copy, because it lies in the higher
superblock. A tombstone is not copied if all older records of its key lie in the superblock that goes.

Invariants: an error while reading ends the compaction and changes nothing more: only a record that was read
and is not what its hash says is left behind, in quarantine. What is unlinked holds nothing that a row points
to; the index's own count says so, not only the list of records that was worked through. What the index has
never seen is not thrown away: a superblock that could not be read when the index was made is read again
first, and stays if that fails.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

from vstack.errors import VstackError
from vstack.mesh.registers import PieceKey
from vstack.node.disk import Disk
from vstack.node.files import OpenFiles
from vstack.node.hints import read_hints
from vstack.node.index import Index
from vstack.node.log import Log, Write
from vstack.node.pieces import StoreFull, WriteFailed
from vstack.node.room import Purpose
from vstack.node.rows import PieceRow, SuperblockState, TombstoneRow
from vstack.node.scan import Found, scan
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Kind,
    Record,
    read_record,
    superblock_path,
    tombstone_record,
    trailer,
)
from vstack.node.update import Update

log = logging.getLogger(__name__)

DEAD_SHARE = 0.25
RENEW_BYTES = 64 << 20
"""That must be dead in the latest superblock before another one is opened in its place."""

_STEP_BYTES = 4 << 20
_STEP_RECORDS = 1000
"""What is copied at a time at most, unless one record is larger: the store's writers wait for so long."""


class Compaction:
    """One at a time, by one thread; the store goes on meanwhile."""

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        index: Index,
        appender: Log,
        files: OpenFiles,
        lock: threading.Lock,
    ) -> None:
        self.failed: set[int] = set()
        """Superblocks whose compaction ended in an error: not tried again until the next start."""
        self.stuck = False
        """The last one found no room for its copies. It is tried again with the next step."""
        self.reclaimed = 0
        """Bytes given back since the start: of superblocks removed, less what was copied."""
        self._disk = disk
        self._folder = folder
        self._index = index
        self._log = appender
        self._files = files
        self._lock = lock
        self._steps: Iterator[int] | None = None

    def candidate(self) -> int | None:
        """The superblock that is most worth compacting, if one is."""
        best, share = None, 0.0
        for number, state in self._index.superblocks.items():
            if not state.sealed or number in self.failed or number == self._log.highest:
                continue
            if state.given_up:
                continue
            dead = 1.0 if state.holds_unknown else _dead_share(state)
            if (dead >= DEAD_SHARE or not state.live_bytes) and dead >= share:
                best, share = number, dead
        return best

    def step(self) -> int:
        """Does a little of what is to be done; the bytes that it read, or 0 if there is nothing to do.

        Errors are logged, and end the compaction of that superblock. Raises IndexDamaged.
        """
        if self._steps is None:
            if self._log.read_only:
                return 0
            self._renew()
            number = self.candidate()
            if number is None:
                return 0
            self._steps = self._compact(number)
        done = next(self._steps, None)
        if done is None:
            self._steps = None
            return 0 if self.stuck else self.step()
        return done

    def _renew(self) -> None:
        """Opens another superblock if the latest one is worth compacting."""
        try:
            with self._lock:
                state = self._index.superblocks.get(self._log.highest)
                if state is None or self._log.highest in self.failed or state.given_up:
                    return
                if state.dead_bytes < RENEW_BYTES or _dead_share(state) < DEAD_SHARE:
                    return
                log.info("superblock %d: %d bytes of it are dead", self._log.highest, state.dead_bytes)
                self._log.renew()
        except StoreFull as error:
            if not self.stuck:
                log.error("no other superblock can be opened now: %s", error)
            self.stuck = True
        except WriteFailed as error:
            self.failed.add(self._log.highest)
            log.error("no other superblock was opened: %s", error)

    def _compact(self, number: int) -> Iterator[int]:
        """Yields after each step the bytes it read, at least 1."""
        state = self._index.superblocks[number]
        try:
            with self._files.use(number) as fd:
                if self._disk.size(fd) != state.watermark:
                    raise VstackError("parts of it were never indexed; restart the node")
                records = yield from self._records(number, fd, state)
                for batch in _batches(records):
                    yield self._copy(number, fd, state, batch)
                missed = self._missed(number, records)
                for batch in _batches(missed):
                    yield self._copy(number, fd, state, batch)
                records += missed
            self._remove(number, records)
            self.stuck = False
        except StoreFull as error:
            if not self.stuck:
                log.error("superblock %d cannot be compacted now: %s", number, error)
            self.stuck = True
        except (OSError, VstackError) as error:
            self.failed.add(number)
            log.error("superblock %d was not compacted: %s", number, error)

    def _records(self, number: int, fd: int, state: SuperblockState) -> Generator[int, None, list[Found]]:
        """What the superblock holds: by its hints, or else by reading all of it. Yields the bytes it read.

        Raises OSError.
        """
        known = None if state.damaged else read_hints(self._disk, fd, state.salt)
        if known is not None:
            yield known[-1].record.size
            return known
        known = []
        read = 0
        for item in scan(self._disk, fd, state.salt, FILE_HEADER_BYTES, strict=True):
            if isinstance(item, Found):
                known.append(item)
                read += item.record.size
            if read >= _STEP_BYTES:
                yield read
                read = 0
        if state.damaged:
            self._adopt(number, [found for found in known if self._row(found.record.key) is None])
        return known

    def _missed(self, number: int, records: list[Found]) -> list[Found]:
        """What rows say lies here though it was not found: its header is damaged. The records are as the rows
        have them."""
        with self._lock:
            state = self._index.superblocks[number]
            if not state.pieces and state.tombstones == self._leaving(number, records):
                return []
        known = {found.record.key for found in records}
        missed: list[Found] = []
        for key, row in self._index.pieces(b"", b""):
            if row.superblock == number and key not in known:
                against = PieceKey.unpack(key).generation.against
                figures = (row.k, row.m, row.chunk_length, row.length, row.sha256)
                missed.append(Found(row.offset, Record(Kind.DATA, row.sequence, key, against, *figures)))
        for key, tombstone in self._index.tombstones():
            if tombstone.superblock == number and key not in known:
                missed.append(Found(tombstone.offset, tombstone_record(key, tombstone.sequence)))
        return missed

    def _leaving(self, number: int, records: list[Found]) -> int:
        """How many tombstones can go together with the superblock."""
        update = Update(self._index)
        keys = {found.record.key for found in records}
        return sum(_goes_along(update, self._index.tombstone(key), number) for key in keys)

    def _adopt(self, number: int, records: list[Found]) -> None:
        """Indexes what could not be read when the index was made, and can be now."""
        with self._lock:
            update = Update(self._index)
            for found in records:
                if found.record.key not in self._index.quarantined:
                    update.add(number, found.offset, found.record)
            update.commit(self._index.next_sequence)

    def _copy(self, number: int, fd: int, state: SuperblockState, batch: list[Found]) -> int:
        """Copies those that are live; the bytes that were read, at least 1. Raises OSError, VstackError."""
        read = 1
        copies: list[Write] = []
        view = Update(self._index)
        for found in batch:
            record = found.record
            row = self._row(record.key)
            if not _is_needed(view, row, number, found.offset):
                continue
            raw = self._disk.read(fd, found.offset, record.size)
            read += len(raw)
            payload = memoryview(raw)[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + record.length]
            if (
                read_record(raw, state.salt, found.offset) == record
                and hashlib.sha256(payload).digest() == record.sha256
                and raw[RECORD_HEADER_BYTES + record.length :] == trailer(record.length)
            ):
                copies.append(Write(record, payload, found.offset, copy=True))
            elif isinstance(row, PieceRow):
                self._quarantine(record.key, row)
            else:  # what a tombstone says is in the index, whatever became of its bytes
                copies.append(Write(record, b"", found.offset, copy=True))
        with self._lock:
            view = Update(self._index)
            copies = [c for c in copies if _is_needed(view, self._row(c.record.key), number, c.offset)]
            self._log.append(copies, Purpose.UPKEEP)
        self.reclaimed -= sum(copy.record.size for copy in copies if copy.error is None)
        for copy in copies:
            if copy.error is not None:
                raise copy.error
        return read

    def _remove(self, number: int, records: list[Found]) -> None:
        """Unlinks the superblock if no row needs it. Raises OSError, VstackError."""
        for key, row in list(self._index.quarantined.items()):
            if row.superblock == number:
                log.error("piece %s stays in quarantine without its bytes", key.hex()[:12])
        keys = {found.record.key for found in records}
        buried = {key for key in keys if self._index.tombstone(key) is not None}
        with self._lock:
            state = self._index.superblocks[number]
            if state.pieces or state.tombstones != self._leaving(number, records):
                raise VstackError(f"{state.pieces} pieces, {state.tombstones} tombstones point to it still")
            update = Update(self._index)
            update.doom(number)
            update.commit(self._index.next_sequence, sync=True)
        self._disk.unlink(superblock_path(self._folder, number))
        self._files.forget(number)
        self._disk.sync_folder(self._folder)
        self.reclaimed += state.watermark
        with self._lock:
            update = Update(self._index)
            update.remove_superblock(number)
            if state.holds_unknown:  # it alone may have kept any tombstone
                buried = {key for key, _ in self._index.tombstones()}
            for key in buried:
                update.drop_if_useless(key)
            update.commit(self._index.next_sequence)
        log.info("superblock %d is compacted: %d bytes are free again", number, state.watermark)

    def _row(self, key: bytes) -> PieceRow | TombstoneRow | None:
        return self._index.piece(key) or self._index.tombstone(key)

    def _quarantine(self, key: bytes, row: PieceRow) -> None:
        log.error("superblock %d: the piece at %d is damaged, in quarantine", row.superblock, row.offset)
        with self._lock:
            update = Update(self._index)
            update.quarantine(key, row)
            update.commit(self._index.next_sequence)


def _dead_share(state: SuperblockState) -> float:
    """Of its records, 0 to 1."""
    return state.dead_bytes / max(state.dead_bytes + state.live_bytes, 1)


def _is_needed(update: Update, row: PieceRow | TombstoneRow | None, number: int, offset: int) -> bool:
    """Whether the record at this place is the one that the row points to, and cannot just go."""
    if row is None or (row.superblock, row.offset) != (number, offset):
        return False
    return isinstance(row, PieceRow) or not _goes_along(update, row, number)


def _goes_along(update: Update, row: TombstoneRow | None, number: int) -> bool:
    """Whether the tombstone lies in the superblock, as do all the records that it keeps down."""
    return row is not None and row.superblock == number and not update.tombstone_matters(row, number)


def _batches(records: list[Found]) -> Iterator[list[Found]]:
    batch: list[Found] = []
    size = 0
    for found in records:
        if found.record.kind not in (Kind.DATA, Kind.TOMBSTONE):
            continue
        if batch and (size + found.record.size > _STEP_BYTES or len(batch) == _STEP_RECORDS):
            yield batch
            batch, size = [], 0
        batch.append(found)
        size += found.record.size
    if batch:
        yield batch
