"""What the store does when it is opened: brings the index in step with the superblocks.

It decides whether the index can be trusted, and what of a superblock beyond its watermark counts. The
superblocks are the truth. Each file whose size is its watermark is fully accounted for (a clean stop
cuts the preallocated space off, so that all of them are); of any other, the rest is scanned, synced,
indexed, and the file sealed: it takes no more records. A file that the index has never heard of is read by
its hints if they are good. What compaction had not finished is finished: a doomed superblock is unlinked.
Last, when the index was made anew, by this start or one that was interrupted, or a superblock has become
readable, tombstones that keep nothing from coming back are dropped.

A crash in here loses nothing: watermarks advance together with their rows, and the next start goes on
from there. Nothing but trailing zeros is cut off.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vstack.errors import UsageError, VstackError
from vstack.node.disk import Disk
from vstack.node.hints import Hints, read_hints, walk
from vstack.node.index import (
    Index,
    IndexDamaged,
    collect_discarded,
    delete_index,
)
from vstack.node.pieces import StartReport
from vstack.node.rows import SuperblockState
from vstack.node.scan import Damage, Found, Tail, scan
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    FileHeader,
    collect_temporary_files,
    read_file_header,
    superblock_numbers,
    superblock_path,
)
from vstack.node.update import Update

log = logging.getLogger(__name__)

_RECORDS_A_BATCH = 1000


Progress = Callable[[int, int], None]
"""Called with the bytes of superblocks that are done, and of all."""


class Resume(NamedTuple):
    """A superblock that was closed cleanly and may take more records."""

    header: FileHeader
    hints: Hints
    """Of what it holds already."""


@dataclass(frozen=True)
class Opened:
    """What a store works with after its start."""

    index: Index
    highest: int
    """Highest number of a superblock on disk, 0 if there is none."""
    resume: Resume | None
    next_sequence: int
    report: StartReport


class _File(NamedTuple):
    number: int
    size: int
    header: FileHeader | None
    """None if it is damaged."""


def open_store(disk: Disk, index_folder: Path, folder: Path, progress: Progress | None = None) -> Opened:
    """Opens the index beside the superblocks in `folder`; it holds what they hold when this returns.

    Raises VstackError if a superblock is of a newer format or no index can be made, OSError.
    """
    began = time.monotonic()
    collect_temporary_files(disk, folder)
    collect_discarded(index_folder)
    files = [_look_at(disk, folder, number) for number in superblock_numbers(folder)]
    index, rebuilt = _open_index(disk, index_folder, files)
    start = _Start(disk, folder, index)
    try:
        removed = start.finish_removals()
        files = [file for file in files if file.number not in removed]
        done, total = 0, sum(file.size for file in files)
        for file in files:
            start.catch_up(file)
            done += file.size
            if progress is not None:
                progress(done, total)
        if removed or start.resolved or not index.is_complete():
            start.drop_useless_tombstones()
            index.mark_complete()
        resume = start.resume(files[-1]) if files else None
    except BaseException:
        index.close()
        raise
    report = StartReport(
        start.records,
        start.bytes,
        start.torn,
        rebuilt and bool(files),
        time.monotonic() - began,
        start.hinted,
    )
    return Opened(index, files[-1].number if files else 0, resume, start.next_sequence, report)


def rebuild_index(folder: Path, progress: Progress | None = None) -> StartReport:
    """Makes the index of the store in `folder` anew; it is on disk when this returns.

    Raises UsageError if there is no store, VstackError if it is in use or of a newer format, OSError.
    """
    disk = Disk()
    if not (folder / "superblocks").is_dir():
        raise UsageError(f"{folder} holds no pieces: is it the data directory of a node?")
    claim = claim_store(disk, folder)
    try:
        delete_index(disk, folder / "index")
        opened = open_store(disk, folder / "index", folder / "superblocks", progress)
        try:
            Update(opened.index).commit(opened.next_sequence, sync=True)
        finally:
            opened.index.close()
    finally:
        disk.close(claim)
    return opened.report


def claim_store(disk: Disk, folder: Path) -> int:
    """A descriptor that holds the store for this process. Raises VstackError if another has it, OSError."""
    try:
        return disk.lock(folder / "LOCK")
    except BlockingIOError:
        raise VstackError(f"{folder} is in use by another process: stop that node first") from None


def _look_at(disk: Disk, folder: Path, number: int) -> _File:
    fd = disk.open(superblock_path(folder, number))
    try:
        size = disk.size(fd)
        try:
            header = read_file_header(disk, fd)
        except OSError as error:
            log.error("superblock %d: its header cannot be read: %s", number, error)
            header = None
    finally:
        disk.close(fd)
    if header is not None and header.number != number:
        header = None
    return _File(number, size, header)


def _open_index(disk: Disk, folder: Path, files: list[_File]) -> tuple[Index, bool]:
    """The index, and whether it had to be begun anew."""
    missing = not folder.exists()
    try:
        index = Index(folder)
    except IndexDamaged as error:
        log.error("%s; making it anew from the superblocks", error)
    else:
        quarrel = _quarrel(index, files)
        if quarrel is None:
            return index, missing
        log.error("the index does not fit the superblocks (%s); making it anew from them", quarrel)
        index.close()
    delete_index(disk, folder)
    return Index(folder), True


def _quarrel(index: Index, files: list[_File]) -> str | None:
    """Why the index cannot belong to these files, in words; None if it can."""
    by_number = {file.number: file for file in files}
    for number, state in index.superblocks.items():
        file = by_number.get(number)
        if file is None:
            if state.doomed:
                continue
            return f"superblock {number} is gone"
        if file.size < state.watermark:
            return f"superblock {number} has {file.size} bytes of {state.watermark}"
        if file.header is not None and file.header.salt != state.salt:
            return f"superblock {number} is another file"
    return None


class _Start:
    """Catches up with one superblock after the other, and counts."""

    def __init__(self, disk: Disk, folder: Path, index: Index) -> None:
        self.records = 0
        self.bytes = 0
        self.torn = 0
        self.hinted = 0
        self.resolved = False
        """A superblock that could not be read at an earlier start is known now."""
        self.next_sequence = index.next_sequence
        self._disk = disk
        self._folder = folder
        self._index = index

    def finish_removals(self) -> set[int]:
        """Unlinks doomed superblocks; their numbers. Raises OSError, IndexWriteFailed."""
        doomed = {number for number, state in self._index.superblocks.items() if state.doomed}
        if doomed:
            for number in doomed:
                with contextlib.suppress(FileNotFoundError):
                    self._disk.unlink(superblock_path(self._folder, number))
            self._disk.sync_folder(self._folder)
            update = Update(self._index)
            for number in doomed:
                update.remove_superblock(number)
            update.commit(self.next_sequence)
        return doomed

    def drop_useless_tombstones(self) -> None:
        """Raises IndexDamaged, IndexWriteFailed."""
        keys = (key for key, _ in self._index.tombstones())
        while batch := list(itertools.islice(keys, _RECORDS_A_BATCH)):
            update = Update(self._index)
            for key in batch:
                update.drop_if_useless(key)
            update.commit(self.next_sequence)

    def resume(self, file: _File) -> Resume | None:
        """The latest superblock, if it may take more records."""
        state = self._index.superblocks[file.number]
        if state.sealed or file.header is None:
            return None
        fd = self._disk.open(superblock_path(self._folder, file.number))
        try:
            hints = walk(self._disk, fd, state.salt, state.watermark)
        except OSError as error:
            log.error("superblock %d: takes no more records: %s", file.number, error)
            hints = None
        finally:
            self._disk.close(fd)
        if hints is not None:
            return Resume(file.header, hints)
        update = Update(self._index)
        update.seal(file.number)
        update.commit(self.next_sequence)
        return None

    def catch_up(self, file: _File) -> None:
        """Indexes what lies beyond the watermark; afterwards the watermark is the file's size."""
        number, header = file.number, file.header
        if header is not None:
            self.next_sequence = max(self.next_sequence, header.first_sequence)
        state = self._index.superblocks.get(number)
        if state is None:
            if header is None:
                self._give_up(file)
                return
            state = SuperblockState(header.salt)
        elif file.size == state.watermark:
            return
        fd = self._disk.open(superblock_path(self._folder, number), write=True)
        try:
            try:
                self._disk.sync(fd)
            except OSError as error:
                log.error("superblock %d: not indexed from %d on: %s", number, state.watermark, error)
                self._retire(number, state)
                return
            known = None
            if number not in self._index.superblocks:
                with contextlib.suppress(OSError):
                    known = read_hints(self._disk, fd, state.salt)
            if known is None:
                self._scan(number, state, fd)
            else:
                self._take(number, state, known)
        finally:
            self._disk.close(fd)

    def _take(self, number: int, state: SuperblockState, known: list[Found]) -> None:
        """Indexes what the hints of a sealed superblock say, all in one."""
        update = self._update(number, state)
        for offset, record in known:
            update.add(number, offset, record)
            self.next_sequence = max(self.next_sequence, record.sequence + 1)
        last = known[-1]
        update.advance(number, last.offset + last.record.size)
        update.seal(number)
        update.commit(self.next_sequence)
        self.hinted += len(known) - 1

    def _scan(self, number: int, state: SuperblockState, fd: int) -> None:
        update = self._update(number, state)
        self.resolved |= state.retired
        for item in scan(self._disk, fd, state.salt, state.watermark):
            match item:
                case Found(offset, record):
                    size = record.size
                    update.add(number, offset, record)
                    self.next_sequence = max(self.next_sequence, record.sequence + 1)
                    self.records += 1
                    self.bytes += size
                    if self.records % _RECORDS_A_BATCH == 0:
                        update.advance(number, offset + size)
                        update.commit(self.next_sequence)
                        update = Update(self._index)
                case Damage(offset, length, record):
                    update.damaged(number)
                    what = f"record {record.sequence}" if record else f"{length} bytes"
                    log.error("superblock %d: %s at %d damaged", number, what, offset)
                case Tail(offset, torn, end):
                    if torn:
                        self.torn += 1
                        log.info("superblock %d: ends in an unfinished write, at %d", number, offset)
                    if end < self._disk.size(fd):
                        self._disk.truncate(fd, end)
                        self._disk.sync(fd)
                    update.advance(number, end)
                    update.seal(number)
        update.commit(self.next_sequence)

    def _give_up(self, file: _File) -> None:
        """A superblock with neither header nor entry in the index: without its salt no record is known."""
        log.error("superblock %d: header damaged, nothing in it can be read", file.number)
        lost = SuperblockState(bytes(16), watermark=max(file.size, FILE_HEADER_BYTES), damaged=1)
        self._retire(file.number, lost)

    def _retire(self, number: int, state: SuperblockState) -> None:
        update = self._update(number, state)
        update.seal(number, retired=True)
        update.commit(self.next_sequence)

    def _update(self, number: int, state: SuperblockState) -> Update:
        update = Update(self._index)
        if number not in self._index.superblocks:
            update.open_superblock(number, state)
        return update
