"""The chunk store of one node: puts pieces into superblocks, and finds, reads and deletes them.

It decides what may be stored under a key (one hash, for ever), what is damaged, and what may be
acknowledged. Its parts: `superblock` and `hints` are the format, `log` appends, `room` says how full the
disk may get, `index` is the map, `recovery` the start, `scan` reads what a crash left, `compaction` gives
the space of dead records back, `scrub` looks for rot, `files` keeps files open, `disk` has the system calls.

    store/LOCK             held while a process has the store open
    store/superblocks/     0000000001.vsb ...    the truth
    store/index/           RocksDB               a cache of it

Invariants. The same key with another hash is refused. The index is not trusted over the log: what lies
where it points must say that it is the piece. What was found damaged is put in *quarantine*: it is not
served, not listed and never "present"; a `put` of the same bytes writes them anew. An error while reading is
not damage, until it has come three times in a row: the last good copy is not given up for one of them. What
a crash leaves: see `log`; a `delete` is a record like any other.

Not here: which pieces should exist, and repair. The keeper decides that.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import itertools
import logging
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vstack.errors import DamagedData
from vstack.mesh.messages import UsageRow
from vstack.mesh.registers import PIECE_KEY_BYTES, PieceKey
from vstack.node.compaction import Compaction
from vstack.node.disk import Disk
from vstack.node.files import OpenFiles
from vstack.node.index import IndexWriteFailed
from vstack.node.log import Log, Write
from vstack.node.pieces import (
    Holding,
    Outcome,
    Piece,
    PieceInfo,
    PieceNotFound,
    PieceRead,
    PieceRefused,
    PutResult,
    StoreFull,
    StoreStats,
    WriteFailed,
)
from vstack.node.recovery import Progress, claim_store, open_store
from vstack.node.room import Purpose
from vstack.node.rows import PieceRow
from vstack.node.scrub import Scrub, Verified
from vstack.node.superblock import (
    RECORD_HEADER_BYTES,
    Kind,
    Record,
    read_record,
    record_size,
    tombstone_record,
    trailer,
)
from vstack.node.update import Update

__all__ = [
    "ChunkStore",
    "Holding",
    "Piece",
    "PieceInfo",
    "PieceNotFound",
    "PieceRead",
    "PieceRefused",
    "Purpose",
    "PutResult",
    "StoreFull",
    "StoreStats",
    "WriteFailed",
]

log = logging.getLogger(__name__)

USAGE_ROWS = 1000
USAGE_PIECES = 20_000
"""What one page of `usage` counts at most, unless it is a single video: it takes the interpreter from the
node's other threads for so long."""

_MOST_READ_ERRORS = 3
"""In a row: of a piece, and it is quarantined; of the active superblock, and it takes no more records."""


class ChunkStore:
    """All methods are thread-safe. `put` and `delete` take turns; reads wait for nobody."""

    def __init__(
        self,
        folder: Path,
        *,
        node: str,
        superblock_bytes: int = 1 << 30,
        reserve: float = 0.05,
        scrub_days: float = 7.0,
        disk: Disk | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Opens the store in `folder`, making it if need be, and recovers from whatever the last stop left.

        `node` is the NodeId, 32 hex digits. A superblock is closed before it exceeds `superblock_bytes`,
        unless a single piece does. Uploads are refused when less than `reserve` (0 to 1) of the file
        system would stay free; for other writes see `room`. `scrub_days` is how long the scrub takes to
        read everything, in days of running time. `progress` is told how far the start is. Raises
        VstackError if another process has the store open or if it is of a newer format, OSError.
        """
        self._disk = disk or Disk()
        self._superblocks = folder / "superblocks"
        self._disk.make_folder(self._superblocks)
        self._claim = claim_store(self._disk, folder)
        with contextlib.ExitStack() as undo:
            undo.callback(self._disk.close, self._claim)
            opened = open_store(self._disk, folder / "index", self._superblocks, progress)
            undo.callback(opened.index.close)
            self._log = Log(
                self._disk, self._superblocks, opened, node=node, limit=superblock_bytes, reserve=reserve
            )
            undo.pop_all()
        self._lock = threading.Lock()
        self._files = OpenFiles(self._disk, self._superblocks)
        self._index = opened.index
        self._report = opened.report
        self._read_errors: Counter[int | bytes] = Counter()
        """Since the last success: by packed key, and of the active superblock by number."""
        self._verified = Verified()
        self._closed = False
        self.compaction = Compaction(
            self._disk, self._superblocks, self._index, self._log, self._files, self._lock
        )
        self.scrub = Scrub(self, self._index, scrub_days * 86400)

    def put(
        self, pieces: Sequence[Piece], *, verified: bool = False, purpose: Purpose = Purpose.UPLOAD
    ) -> list[PutResult]:
        """Stores the pieces with one fsync for all; one answer for each, in order.

        What is answered "stored" or "present" (same key, same hash) is on disk when this returns. A piece
        that is refused or fails does not hinder the others. With `verified` the caller has checked the
        payloads against their hashes. How full the disk may get depends on `purpose`. Raises IndexDamaged.
        """
        refusals = [_refusal(piece, verified) for piece in pieces]
        answers: list[PutResult | Write] = []
        writes: dict[bytes, Write] = {}
        with self._lock:
            for piece, refusal in zip(pieces, refusals, strict=True):
                if refusal is not None:
                    answers.append(PutResult(piece.key, "refused", refusal))
                else:
                    answers.append(self._answer_or_write(piece, writes))
            self._log.append(list(writes.values()), purpose)
        for write in writes.values():
            if write.error is None:
                self._verified.note(write.record.sequence)
        return [
            answer if isinstance(answer, PutResult) else _answer(piece.key, answer)
            for piece, answer in zip(pieces, answers, strict=True)
        ]

    def read(self, key: PieceKey, offset: int = 0, length: int | None = None) -> PieceRead:
        """A range of a piece, to its end if `length` is None. Its hash is not checked: `verify` does that.

        Raises PieceNotFound, DamagedData if what lies there is not the piece or it is in quarantine,
        ValueError if the range is not inside the piece, OSError if the disk fails.
        """
        row, data = self._load(key, lambda row: _span(row, offset, length))
        return PieceRead(_info(key, row), offset, data)

    def verify(self, key: PieceKey) -> PieceInfo:
        """Reads the whole piece and checks header, hash and footer. Raises as `read` does."""
        row, data = self._load(key, lambda row: (0, record_size(row.length) - RECORD_HEADER_BYTES))
        if hashlib.sha256(memoryview(data)[: row.length]).digest() != row.sha256:
            raise self._found_damaged(key, row, "its payload does not have its hash")
        if memoryview(data)[row.length :] != trailer(row.length):
            raise self._found_damaged(key, row, "its footer is damaged")
        self._verified.note(row.sequence)
        return _info(key, row)

    def info(self, key: PieceKey) -> PieceInfo | None:
        """What the index says of the piece; None if the store does not hold it. Raises IndexDamaged."""
        row = self._index.piece(key.pack())
        return None if row is None else _info(key, row)

    def list(self, prefix: bytes = b"", after: bytes = b"", limit: int = 1000) -> list[PieceInfo]:
        """Up to `limit` pieces whose packed keys begin with `prefix` and lie above `after`, in their order.

        To go on, pass the packed key of the last as `after`. Raises IndexDamaged.
        """
        rows = itertools.islice(self._index.pieces(prefix, after), limit)
        return [_info(PieceKey.unpack(key), row) for key, row in rows]

    def inventory(
        self, keys: Iterable[PieceKey], *, verify: bool = False, within: float = 0.0
    ) -> builtins.list[Holding]:
        """What is held of the keys, in their order, by the index; with `verify`, by reading all of it but
        what was written or verified less than `within` seconds ago.

        A piece that `verify` finds damaged is in quarantine from then on, and said to be. Raises
        IndexDamaged, and with `verify` OSError.
        """
        return [self._holding(key, verify, within) for key in keys]

    def usage(
        self, after: str = "", *, rows: int = USAGE_ROWS, pieces: int = USAGE_PIECES
    ) -> tuple[builtins.list[UsageRow], str]:
        """What the pieces of each video take, by scheme: whole videos, in order, from the first above `after`
        on, until there are `rows` rows or `pieces` pieces.

        With it the video after which to go on, empty at the end. Pieces in quarantine do not count.
        Raises IndexDamaged.
        """
        found: builtins.list[UsageRow] = []
        video = ""
        schemes: dict[tuple[int, int], builtins.list[int]] = {}
        start = bytes.fromhex(after) + b"\xff" * (PIECE_KEY_BYTES - 32) if after else b""
        for counted, (key, row) in enumerate(self._index.pieces(b"", start)):
            if (this := key[:32].hex()) != video:
                found += _usage_rows(video, schemes)
                if len(found) >= rows or counted >= pieces:
                    return found, video
                video, schemes = this, {}
            figures = schemes.setdefault((row.k, row.m), [0, 0, 0])
            figures[0] += 1
            figures[1] += row.length
            figures[2] += record_size(row.length)
        return found + _usage_rows(video, schemes), ""

    def quarantined(self) -> builtins.list[PieceInfo]:
        """The pieces that were found damaged and are to be repaired, in the order of their packed keys."""
        held = self._index.quarantined
        return [_info(PieceKey.unpack(key), row) for key, row in sorted(held.items())]

    def check_tombstone(self, key: bytes) -> bool:
        """Reads the tombstone of the packed key, if there is one; one that rotted is written anew.

        False if it had rotted. Raises OSError, StoreFull, WriteFailed, IndexDamaged.
        """
        row = self._index.tombstone(key)
        if row is None:
            return True
        state = self._index.superblocks.get(row.superblock)
        try:
            if state is None:
                raise FileNotFoundError
            with self._files.use(row.superblock) as fd:
                header = self._disk.read(fd, row.offset, RECORD_HEADER_BYTES)
            record = read_record(header, state.salt, row.offset)
        except FileNotFoundError:
            record = None
        if record is not None and (record.key, record.sequence) == (key, row.sequence):
            return True
        with self._lock:
            if self._index.tombstone(key) != row:
                return True
            log.error("superblock %d: the tombstone at %d is damaged", row.superblock, row.offset)
            write = Write(tombstone_record(key, 0), b"")
            self._log.append([write], Purpose.UPKEEP)
        if write.error is not None:
            raise write.error
        return False

    def delete(self, keys: Iterable[PieceKey]) -> None:
        """The pieces are gone, for every later start too, when this returns; absent ones are no error.

        May use the space above which `put` stops. Raises StoreFull, WriteFailed: some may be deleted
        and some not, and it is right to try again; IndexDamaged.
        """
        with self._lock:
            packed = dict.fromkeys(key.pack() for key in keys)
            writes = [
                Write(tombstone_record(raw, 0), b"")
                for raw in packed
                if self._index.piece(raw) is not None or raw in self._index.quarantined
            ]
            self._log.append(writes, Purpose.UPKEEP)
        for write in writes:
            if write.error is not None:
                raise write.error

    def stats(self) -> StoreStats:
        """Exact at a moment between two changes."""
        with self._lock:
            states = self._index.superblocks.values()
            ends = sum(state.watermark for state in states)
            spare = self._log.spare_bytes()
            quarantined = len(self._index.quarantined)
            return StoreStats(
                pieces=sum(state.pieces for state in states),
                payload_bytes=sum(state.payload_bytes for state in states),
                tombstones=sum(state.tombstones for state in states),
                live_bytes=sum(state.live_bytes for state in states),
                dead_bytes=sum(state.dead_bytes for state in states),
                hint_bytes=sum(state.hint_bytes for state in states),
                preallocated_bytes=spare,
                file_bytes=ends + spare,
                index_bytes=self._index.disk_bytes(),
                superblocks=len(states),
                read_only_superblocks=sum(state.retired for state in states),
                damaged_records=sum(state.damaged for state in states) + quarantined,
                quarantined=quarantined,
                found_damaged=self._index.found_damaged,
                read_only=self._log.read_only,
                start=self._report,
            )

    def superblock_sizes(self) -> dict[int, int]:
        """Bytes written to each superblock, by number."""
        return {number: state.watermark for number, state in self._index.superblocks.items()}

    def close(self) -> None:
        """A clean stop: the next start scans nothing. Call it when no reader is left; twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._log.close()
            finally:
                self._files.close()
                self._index.close()
                self._disk.close(self._claim)

    def _answer_or_write(self, piece: Piece, writes: dict[bytes, Write]) -> PutResult | Write:
        """The answer if nothing need be written, or the entry in `writes` that will tell."""
        key = piece.key.pack()
        row = self._index.piece(key)
        known = row or self._index.quarantined.get(key)
        held = writes[key].record.sha256 if key in writes else known.sha256 if known else piece.sha256
        if held != piece.sha256:
            taken = PieceRefused(f"the key of piece {_name(piece.key)} is taken by other bytes")
            return PutResult(piece.key, "refused", taken)
        if row is not None:
            return PutResult(piece.key, "present")
        return writes.setdefault(key, Write(_data_record(piece, key), piece.payload))

    def _load(self, key: PieceKey, span: Callable[[PieceRow], tuple[int, int]]) -> tuple[PieceRow, bytes]:
        """Where the piece lies, and the bytes of `span(row)`: (offset after the record's header, length).

        If the superblock is gone, the piece may have moved: look it up again.
        """
        packed = key.pack()
        gone = None
        while True:
            row = self._index.piece(packed)
            if row is None:
                if packed in self._index.quarantined:
                    raise DamagedData(f"piece {_name(key)} is damaged here, and in quarantine")
                raise PieceNotFound(f"piece {_name(key)} is not here")
            if row == gone:
                raise self._found_damaged(key, row, "its superblock is gone")
            start, length = span(row)
            state = self._index.superblocks.get(row.superblock)
            try:
                if state is None:
                    raise FileNotFoundError
                with self._files.use(row.superblock) as fd:
                    header = self._disk.read(fd, row.offset, RECORD_HEADER_BYTES)
                    data = self._disk.read(fd, row.offset + RECORD_HEADER_BYTES + start, length)
            except FileNotFoundError:
                gone = row
                continue
            except OSError as error:
                self._note_read_error(key, row, error)
                raise
            if self._read_errors:
                self._forget_read_errors(packed, row.superblock)
            record = read_record(header, state.salt, row.offset)
            if record is None or (record.key, record.sequence) != (packed, row.sequence):
                raise self._found_damaged(key, row, "its header is damaged")
            if len(data) < length:
                raise self._found_damaged(key, row, "its superblock ends inside it")
            return row, data

    def _holding(self, key: PieceKey, verify: bool, within: float) -> Holding:
        packed = key.pack()
        row = self._index.piece(packed)
        while row is not None and verify and not self._verified.is_within(row.sequence, within):
            try:
                return Holding(key, "present", self.verify(key).sha256, True)
            except (PieceNotFound, DamagedData):
                seen, row = row, self._index.piece(packed)
                if row == seen:  # damaged, and the index could not take note of it
                    return Holding(key, "quarantined", row.sha256)
        if row is not None:
            return Holding(key, "present", row.sha256)
        bad = self._index.quarantined.get(packed)
        return Holding(key, "absent") if bad is None else Holding(key, "quarantined", bad.sha256)

    def _found_damaged(self, key: PieceKey, row: PieceRow, why: str) -> DamagedData:
        """Quarantines the piece, unless it has moved or was written anew meanwhile."""
        log.error("piece %s: %s", _name(key), why)
        with self._lock:
            update = Update(self._index)
            update.quarantine(key.pack(), row)
            try:
                update.commit(self._index.next_sequence)
            except IndexWriteFailed as error:
                log.error("piece %s could not be quarantined: %s", _name(key), error)
        return DamagedData(f"piece {_name(key)} is damaged here: {why}")

    def _note_read_error(self, key: PieceKey, row: PieceRow, error: OSError) -> None:
        """Counts, and draws the consequences of the third in a row."""
        packed = key.pack()
        with self._lock:
            self._read_errors.update((packed, row.superblock))
            of_piece, of_file = self._read_errors[packed], self._read_errors[row.superblock]
            if of_file >= _MOST_READ_ERRORS and row.superblock == self._log.active:
                log.error("superblock %d: cannot be read, it takes no more: %s", row.superblock, error)
                self._log.retire_active()
        if of_piece >= _MOST_READ_ERRORS:
            self._found_damaged(key, row, f"it could not be read {of_piece} times: {error}")

    def _forget_read_errors(self, packed: bytes, superblock: int) -> None:
        with self._lock:
            self._read_errors.pop(packed, None)
            self._read_errors.pop(superblock, None)


def _refusal(piece: Piece, verified: bool) -> PieceRefused | None:
    """What is wrong with the piece itself, if anything."""
    name = _name(piece.key)
    try:
        if PieceKey.unpack(piece.key.pack()) != piece.key:
            return PieceRefused(f"the key of piece {name} is malformed")
    except (struct.error, ValueError) as error:
        return PieceRefused(f"the key of piece {name} is malformed: {error}")
    if not (0 < piece.k <= piece.m < 1 << 16 and 0 <= piece.chunk_length < 1 << 64):
        return PieceRefused(f"piece {name}: {piece.k} of {piece.m} is no scheme")
    if len(piece.sha256) != 32 or (not verified and hashlib.sha256(piece.payload).digest() != piece.sha256):
        return PieceRefused(f"the payload of piece {name} does not have its hash")
    return None


def _span(row: PieceRow, offset: int, length: int | None) -> tuple[int, int]:
    """The range as (offset, length). Raises ValueError if it is not inside the piece."""
    if length is None:
        length = row.length - offset
    if offset < 0 or length < 0 or offset + length > row.length:
        raise ValueError(f"{length} bytes at {offset} are not inside a piece of {row.length}")
    return offset, length


def _name(key: PieceKey) -> str:
    return f"{key.video[:12]}/{key.upload}/{key.chunk}.{key.piece}"


def _data_record(piece: Piece, key: bytes) -> Record:
    return Record(
        Kind.DATA,
        0,
        key,
        piece.key.generation.against,
        piece.k,
        piece.m,
        piece.chunk_length,
        len(piece.payload),
        piece.sha256,
    )


def _info(key: PieceKey, row: PieceRow) -> PieceInfo:
    return PieceInfo(key, row.k, row.m, row.chunk_length, row.length, row.sha256, row.sequence)


def _usage_rows(video: str, schemes: dict[tuple[int, int], list[int]]) -> list[UsageRow]:
    return [UsageRow(video, k, m, *figures) for (k, m), figures in sorted(schemes.items())]


def _answer(key: PieceKey, write: Write) -> PutResult:
    outcome: Outcome = "stored"
    if write.error is not None:
        outcome = "full" if isinstance(write.error, StoreFull) else "failed"
    return PutResult(key, outcome, write.error)
