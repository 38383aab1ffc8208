"""The end of the log: appends records to the active superblock, one fsync for all that wait.

It decides when a superblock is full, and what a failing disk costs. Invariants: a record is synced before
the index hears of it; the index is written before the caller hears of it; a superblock whose write or
fsync failed is *retired*, it takes no more records, because what the kernel still holds of it cannot be
known (a second fsync may succeed without having written anything). Three failures without a success between
them make the log *read-only* until the next start: a disk that fails again and again would otherwise be
written full of retired superblocks.

What a crash leaves, in order: before the sync, records that are whole, torn or absent, none of them
acknowledged, of which the next start keeps the whole ones; between the sync and the index, records that
the next start indexes; after that, nothing is left to do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vstack.errors import VstackError
from vstack.node import hints
from vstack.node.disk import NO_SPACE, Disk
from vstack.node.index import IndexWriteFailed
from vstack.node.pieces import StoreFull, WriteFailed
from vstack.node.recovery import Opened
from vstack.node.room import Purpose, keep_free
from vstack.node.rows import SuperblockState
from vstack.node.superblock import FILE_HEADER_BYTES, Appender, FileHeader, NoRoom, Record, new_salt
from vstack.node.update import Update

log = logging.getLogger(__name__)

_MOST_FAILURES = 3


@dataclass(slots=True)
class Write:
    """One record on its way to the disk. `append` gives it its sequence number, offset, and fate."""

    record: Record
    payload: bytes | memoryview
    offset: int = 0
    error: VstackError | None = None
    copy: bool = False
    """It lies elsewhere already, and keeps its sequence number."""


class Log:
    """Not thread-safe: the store's lock is held around every call."""

    def __init__(
        self, disk: Disk, folder: Path, opened: Opened, *, node: str, limit: int, reserve: float
    ) -> None:
        """`limit` is the size in bytes beyond which a superblock does not grow, unless by a single record;
        `reserve` the share of the file system, 0 to 1, that uploads leave free."""
        self._disk = disk
        self._folder = folder
        self._node = node
        self._limit = limit
        self._keep_free = {purpose: keep_free(purpose, reserve, limit) for purpose in Purpose}
        self._index = opened.index
        self._highest = opened.highest
        self._tried = opened.highest
        """The highest number that a superblock was to get, whether it could be made or not."""
        self._sequence = opened.next_sequence
        self._failures = 0
        self._broken: WriteFailed | None = None
        self._active: Appender | None = None
        self._hints = hints.Hints()
        if opened.resume is not None:
            end = self._index.superblocks[opened.highest].watermark
            self._active = Appender.resume(disk, folder, opened.resume.header, end)
            self._hints = opened.resume.hints

    @property
    def active(self) -> int | None:
        """Number of the superblock that takes appends, if there is one."""
        return None if self._active is None else self._active.number

    @property
    def highest(self) -> int:
        """Number of the superblock made last: it is never removed."""
        return self._highest

    @property
    def read_only(self) -> bool:
        return self._broken is not None

    def append(self, writes: Sequence[Write], purpose: Purpose) -> None:
        """Writes, syncs and indexes the records; sets `error` (StoreFull, WriteFailed) of those that failed.

        If the index fails, everything is refused from then on: the next start finds the records that lie
        on disk without it.
        """
        if not writes:
            return
        if self._broken is not None:
            for write in writes:
                write.error = self._broken
            return
        try:
            self._append(writes, purpose)
        except VstackError as error:
            self._broken = WriteFailed(f"{error}; restart the node")
            for write in writes:
                write.error = write.error or self._broken

    def renew(self) -> None:
        """Opens another superblock, which has no more than its header until a record comes. The latest one is
        closed first, if it is not yet; from then on it may be compacted. Raises VstackError."""
        if self._broken is not None:
            raise self._broken
        update = Update(self._index)
        try:
            self._seal(update)
            try:
                self._open(update)
            finally:
                update.commit(self._sequence, sync=True)
        except OSError as error:
            self._note(error)
            raise _as_store_error(error) from error
        except IndexWriteFailed as error:
            self._broken = WriteFailed(f"{error}; restart the node")
            raise

    def retire_active(self) -> None:
        """The active superblock takes no more records, because reading from it failed. Raises
        IndexWriteFailed."""
        update = Update(self._index)
        self._seal(update)
        update.commit(self._sequence)

    def spare_bytes(self) -> int:
        """Size of the active superblock beyond its last record: space that is preallocated."""
        return 0 if self._active is None else self._active.file_bytes - self._active.end

    def close(self) -> None:
        """Gives back the spare space and makes the index durable, so that the next start scans nothing."""
        self._broken = WriteFailed("the store is closed")
        try:
            if self._active is not None:
                self._active.close()
            Update(self._index).commit(self._sequence, sync=True)
        except (OSError, IndexWriteFailed) as error:
            log.error("not a clean stop, the next start will scan: %s", error)

    def _append(self, writes: Sequence[Write], purpose: Purpose) -> None:
        update = Update(self._index)
        highest = self._highest
        staged: list[Write] = []
        for write in writes:
            try:
                active = self._superblock_for(write.record.size, update, staged)
                active.make_room(write.record.size, self._keep_free[purpose], self._limit)
                if not write.copy:
                    write.record = write.record._replace(sequence=self._sequence)
                    self._sequence += 1
                write.offset = active.stage(write.record, write.payload)
                self._hints.add(write.offset, write.record)
                staged.append(write)
            except (NoRoom, OSError) as error:
                self._note(error)
                write.error = _as_store_error(error)
        self._flush(update, staged)
        update.commit(self._sequence, sync=self._highest > highest)

    def _superblock_for(self, size: int, update: Update, staged: list[Write]) -> Appender:
        """The superblock that takes a record of `size` bytes; a new one if the active one is full."""
        active = self._active
        if active is not None and active.end > FILE_HEADER_BYTES and self._is_full(active, size):
            self._flush(update, staged)
            self._seal(update)
        return self._active or self._open(update)

    def _open(self, update: Update) -> Appender:
        """A new superblock. Raises OSError."""
        self._tried += 1
        header = FileHeader(self._node, self._tried, self._sequence, new_salt())
        self._active = Appender.create(self._disk, self._folder, header)
        self._highest = header.number
        self._hints = hints.Hints()
        update.open_superblock(header.number, SuperblockState(header.salt))
        return self._active

    def _is_full(self, active: Appender, size: int) -> bool:
        return self._hints.full or active.end + size + self._hints.record_bytes > self._limit

    def _flush(self, update: Update, staged: list[Write]) -> None:
        """Makes the staged records durable and enters them in the update, or fails them and retires."""
        active = self._active
        if active is None or not staged:
            return
        try:
            active.flush()
        except OSError as error:
            for write in staged:
                write.error = _as_store_error(error)
            self._retire(active, update, error)
        else:
            self._failures = 0
            for write in staged:
                update.add(active.number, write.offset, write.record)
            update.advance(active.number, active.end)
        staged.clear()

    def _seal(self, update: Update) -> None:
        """Closes the active superblock with its hints, if a failure has not closed it already.

        Without room for hints it goes without: a rebuild then reads all of it.
        """
        active = self._active
        if active is None:
            return
        record, payload = self._hints.record(active.end)
        try:
            active.make_room(record.size, self._keep_free[Purpose.UPKEEP], self._limit)
            offset = active.stage(record, payload)
            active.flush()
        except NoRoom:
            pass
        except OSError as error:
            self._retire(active, update, error)
            return
        else:
            update.add(active.number, offset, record)
            update.advance(active.number, active.end)
        self._active = None
        update.seal(active.number)
        try:
            active.close()
        except OSError as error:
            log.error("superblock %d: its spare space could not be given back: %s", active.number, error)

    def _retire(self, active: Appender, update: Update, error: OSError) -> None:
        """A write or fsync failed: what lies beyond the watermark is unknown, now and later."""
        log.error("superblock %d: a write failed, it takes no more: %s", active.number, error)
        self._note(error)
        self._active = None
        update.advance(active.number, active.abandon())
        update.seal(active.number, retired=True)

    def _note(self, error: NoRoom | OSError) -> None:
        """Counts failures of the disk; a full disk is none."""
        if isinstance(error, NoRoom) or error.errno in NO_SPACE:
            return
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            self._broken = WriteFailed(
                f"the disk failed {self._failures} times in a row, pieces are only read: replace the disk, "
                "or restart the node"
            )
            log.error("%s", self._broken)


def _as_store_error(error: NoRoom | OSError) -> VstackError:
    if isinstance(error, NoRoom):
        return StoreFull("the disk is full up to its reserve: free space, or add a node")
    if error.errno in NO_SPACE:
        return StoreFull("the disk is full: free space, or add a node")
    return WriteFailed(f"the disk failed: {error}")
