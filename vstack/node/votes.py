"""The node's votes on disk: identity, boot counter, the chain, and one record per register.

A RocksDB of its own, `votes/`, which shares nothing with the chunk store. One synced write batch
per reactor batch; when `commit` returns, what it was given survives a power cut. What cannot be read
is reported as damaged, never as absent (bug B18): every row carries a CRC-32 of its key and body; the
write-ahead log is recovered in the mode that takes a torn tail in its stride and refuses anything
else; what RocksDB mistakes for a torn tail, or does not miss at all, `rocklog` finds.

    votes/<number>/         a generation of the store; the highest number counts
    votes/<number>/rocks/   the database
    votes/<number>/mark     the last write that was acknowledged, see `rocklog`

    row                   body, behind the CRC-32 (4 bytes, big endian) of row key and body
    m/identity            NodeId and boot
    m/retired             why this store must never vote again, if so
    c/<epoch, 10 digits>  a decided configuration
    p/<NodeId>            the highest boot of that node ever met, and which process that was
    r/<register key>      the packed Record

The NodeId is minted here, at the first start, and lost with this folder: never reused. A generation
and the folder are made under a name that ends in `.new`, synced, and only then renamed: where `votes`
exists it was whole once, and an empty one (a file system that is not mounted looks like that) is
damage, not a first start.

**After a failed commit** the kernel may call pages clean that never reached the disk (a failed fsync
does that), so that what the next process reads may vanish with the next power cut. The failure is
noted in the mark, which needs no disk for that: the note has to live exactly as long as the page
cache does. The next start copies all rows into a new generation, synced and compared, and votes
there. Only then: a copy takes 0.2 s for 100,000 records and 3.5 s for a million, and one block that
cannot be read stops it, while without it that block costs the records inside. After any other
end nothing was called clean wrongly, and RocksDB's recovery writes the log into a synced table anyway.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import uuid4

import msgspec
from rocksdict import DBRecoveryMode, Options, Rdict, RdictIter, Snapshot, WriteBatch, WriteOptions

from vstack.errors import DamagedData, VstackError
from vstack.mesh.config import Config, NodeId, mesh_id, pack_config, unpack_config
from vstack.mesh.messages import Record, ScanRow
from vstack.node.disk import Disk
from vstack.node.rocklog import Mark, MarkFile, check_logs, manifest_of, read_mark, synced_manifest

log = logging.getLogger(__name__)

SCAN_BYTES = 128 * 1024
"""Bytes of records in one page of a scan."""
FLUSH_BYTES = 4 << 20
"""Bytes of batches between two flushes; one takes about 10 ms. RocksDB is never left to flush on its own:
then the mark knows every manifest that names a table whose log is gone."""
_COPY_ROWS = 1000

_IDENTITY = b"m/identity"
_RETIRED = b"m/retired"
_KINDS = (b"r/video/", b"r/chunk/", b"r/views/")
"""Of the registers that have a subject."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class Identity(msgspec.Struct, frozen=True, array_like=True):
    node: NodeId
    boot: int


class VoteCommitFailed(VstackError):
    """A commit of votes failed: nothing of that batch may leave, and the process must end."""


class VotesUnavailable(VstackError):
    """The votes cannot be opened now, by no fault of theirs: a full disk, another process, permissions."""


class VoteStore:
    """Opened by one process at a time; opening it is a new boot, on disk before this returns.

    Raises DamagedData if the store cannot be opened whole: then this node must not vote. Raises
    VotesUnavailable if the same store may open another time. After VoteCommitFailed every call raises
    it again, except `close`.
    """

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._synced = WriteOptions()
        self._synced.sync = True
        self._unflushed = 0
        self._failure: VoteCommitFailed | None = None
        self._closed = False
        try:
            with ExitStack() as undo:
                self.folder = generation = _current_generation(folder, self._disk)
                """Of the generation that is open."""
                self._db = _open_checked(generation)
                undo.callback(self._db.close)
                self._mark = MarkFile(generation / "mark", self._disk)
                undo.callback(self._mark.close)
                self._manifest = synced_manifest(self.folder / "rocks", self._disk)
                self._note()
                self._chain = self._load_chain()
                self._met = {row[2:].decode(): body for row, body in self._rows(b"p/")}
                self.identity = self._next_boot()
                self._mark.sync()
                undo.pop_all()
        except Exception as e:  # rocksdict raises plain Exception
            raise _refusal(folder, e) from e
        self.process = os.urandom(16)
        """Of this process alone; see `meet`."""

    def _next_boot(self) -> Identity:
        retired = self._get(_RETIRED)
        if retired is not None:
            raise DamagedData(f"they are retired: {retired.decode()}")
        raw = self._get(_IDENTITY)
        if raw is None:
            raise DamagedData("the identity of the node that gave them is missing")
        old = msgspec.msgpack.decode(raw, type=Identity)
        identity = Identity(old.node, old.boot + 1)
        self._put(_IDENTITY, _encode(identity))
        return identity

    @property
    def node(self) -> NodeId:
        return self.identity.node

    @property
    def boot(self) -> int:
        return self.identity.boot

    def close(self) -> None:
        """Whatever was acknowledged is on disk already: this only makes the next start quicker."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._failure is None:
                self._flush()
                self._note()
                self._mark.sync()
            self._db.close()
            self._mark.close()
        except Exception:
            log.warning("the votes were not closed in order", exc_info=True)

    # -- records ----------------------------------------------------------------------------------

    def lookup(self, key: str) -> Record | None:
        """Raises DamagedData."""
        body = self._get(_row(key))
        return None if body is None else _decode_record(key, body)

    def any_between(self, first: str, last: str) -> bool:
        """Whether there is a record, readable or not, with a key from `first` to `last`, both included.

        Raises DamagedData where RocksDB cannot read on.
        """
        cursor = next(self._walk(b"r/", _row(first)), None)
        return cursor is not None and bytes(cursor.key()) <= _row(last)

    def commit(self, records: Mapping[str, Record]) -> None:
        """On disk, all of them, when this returns. Raises VoteCommitFailed."""
        batch = WriteBatch(raw_mode=True)
        for key, record in records.items():
            row = _row(key)
            batch.put(row, _seal(row, _encode(record)))
        self._write(batch)

    def scan(self, prefix: str, after: str, limit: int) -> tuple[list[ScanRow], bool]:
        """Records below `prefix` with a key above `after`, in order; and whether more follow.

        At most `limit` of them, and at most SCAN_BYTES.

        Raises DamagedData if a record on the way cannot be read: a listing must not skip it.
        """
        rows: list[ScanRow] = []
        size = 0
        start = _row(prefix)
        begin = max(start, _row(after) + b"\0") if after else start
        for row, body in self._rows(start, begin):
            if len(rows) == limit or size > SCAN_BYTES:
                return rows, True
            size += len(body)
            key = _key(row)
            record = _decode_record(key, body)
            rows.append(ScanRow(key, record.accepted, record.value))
        return rows, False

    def keys(self, after: str, limit: int) -> list[str]:
        """The first `limit` register keys above `after`, in order, whether or not their records can be
        read. Raises DamagedData where RocksDB cannot read on."""
        found: list[str] = []
        for cursor in self._walk(b"r/", _row(after) + b"\0"):
            if len(found) == limit:
                break
            found.append(_key(cursor.key()))
        return found

    def subjects(self) -> Iterator[str]:
        """The videos that have a register here, each once, in no order, as of the first step.

        Seeks from one to the next: reads a few rows per video, however many chunks it has.

        Raises DamagedData where RocksDB cannot read on.
        """
        self._must_not_have_failed()
        snapshot = self._db.snapshot()
        for number, kind in enumerate(_KINDS):
            cursor = snapshot.iter()
            cursor.seek(kind)
            while cursor.valid() and cursor.key().startswith(kind):
                subject, slash, _ = cursor.key()[len(kind) :].partition(b"/")
                if not any(_occurs(snapshot, earlier + subject) for earlier in _KINDS[:number]):
                    yield subject.decode()
                cursor.seek(kind + subject + (b"0" if slash else b"\0"))  # "0" follows "/"
            _must_be_well(cursor)

    # -- the chain, and who was met ---------------------------------------------------------------

    def chain(self) -> tuple[Config, ...]:
        """The decided configurations known here: epochs 1, 2, ... without a gap."""
        return self._chain

    @property
    def mesh(self) -> str:
        """The mesh this node belongs to; empty before it belongs to one."""
        return mesh_id(self._chain[0]) if self._chain else ""

    def adopt(self, configs: Sequence[Config], drop: Iterable[str] = ()) -> None:
        """Stores configurations that are known to be decided, and forgets every register of the videos
        in `drop`. All of it is on disk when this returns, and after a crash all of it or nothing.

        Raises VoteCommitFailed; ValueError if a configuration is not the one after the newest, nor one
        that is stored already.
        """
        chain = list(self._chain)
        batch = WriteBatch(raw_mode=True)
        for config in sorted(configs, key=lambda c: c.epoch):
            if config.epoch == len(chain) + 1:
                chain.append(config)
                row = _chain_row(config.epoch)
                batch.put(row, _seal(row, pack_config(config)))
            elif config not in chain:
                raise ValueError(f"the configuration of epoch {config.epoch} does not continue this chain")
        subjects = [_subject(video) for video in drop]
        for subject in subjects:
            for kind in _KINDS:
                batch.delete(kind + subject)
                batch.delete_range(kind + subject + b"/", kind + subject + b"0")
        self._write(batch)
        self._chain = tuple(chain)
        if subjects:
            self._or_fail(self._flush)  # reads pass deleted ranges quickly in a table, not in memory

    def _load_chain(self) -> tuple[Config, ...]:
        chain = []
        for epoch, (row, body) in enumerate(self._rows(b"c/"), 1):
            config = unpack_config(body)
            if row != _chain_row(epoch) or config.epoch != epoch:
                raise DamagedData(f"the configuration of epoch {epoch} is missing")
            chain.append(config)
        return tuple(chain)

    def meet(self, node: NodeId, boot: int, process: bytes) -> bool:
        """Whether this process of `node` is acceptable: its boot is above all met before, or it is the
        very process that was met with that boot.

        A restored snapshot, and a copy beside the original, come with a boot that was used (bug B17).
        """
        known = self._met.get(node, bytes(8))
        highest = int.from_bytes(known[:8])
        if boot == highest and known[8:]:
            return known[8:] == process
        if boot < highest:
            return False
        met = boot.to_bytes(8) + process
        self._put(b"p/" + node.encode(), met)
        self._met[node] = met
        return True

    def retire(self, why: str) -> None:
        """These votes are an old copy: from now on this store does not open. On disk when this returns."""
        self._put(_RETIRED, why.encode())

    # -- rows -------------------------------------------------------------------------------------

    def _get(self, row: bytes) -> bytes | None:
        """The body. Raises DamagedData."""
        self._must_not_have_failed()
        try:
            raw = self._db.get(row)
        except Exception as e:
            raise _unreadable(e) from e
        return None if raw is None else _unseal(row, raw)

    def _rows(self, prefix: bytes, begin: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys and bodies of all rows below `prefix`, from `begin` on, in order. Raises DamagedData."""
        for cursor in self._walk(prefix, begin):
            row = cursor.key()
            yield row, _unseal(row, cursor.value())

    def _walk(self, prefix: bytes, begin: bytes = b"") -> Iterator[RdictIter]:
        self._must_not_have_failed()
        return _walk(self._db, prefix, begin)

    def _put(self, row: bytes, body: bytes) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.put(row, _seal(row, body))
        self._write(batch)

    def _write(self, batch: WriteBatch) -> None:
        """On disk when this returns, and the mark says so. Raises VoteCommitFailed."""
        self._must_not_have_failed()
        self._or_fail(lambda: self._write_through(batch))

    def _write_through(self, batch: WriteBatch) -> None:
        self._unflushed += batch.size_in_bytes()
        self._db.write(batch, self._synced)
        if self._unflushed > FLUSH_BYTES:
            self._flush()
        self._note()

    def _flush(self) -> None:
        self._db.flush(wait=True)
        self._unflushed = 0
        self._manifest = synced_manifest(self.folder / "rocks", self._disk)

    def _note(self) -> None:
        self._noted = Mark(self._db.latest_sequence_number(), self._manifest)
        self._mark.write(self._noted)

    def _or_fail(self, write: Callable[[], None]) -> None:
        """Raises VoteCommitFailed, now and from now on, if `write` does not come to its end."""
        try:
            write()
        except Exception as e:
            self._failure = VoteCommitFailed(f"votes could not be written: {e}")
            try:
                self._mark.write(self._noted._replace(failed=True))
            except OSError as also:
                log.error("nor could it be noted that they were not: %s", also)
            raise self._failure from e

    def _must_not_have_failed(self) -> None:
        if self._failure is not None:
            raise self._failure


def _current_generation(folder: Path, disk: Disk) -> Path:
    """The generation to open, after first start and failed commits have been seen to; no other is left.

    Raises DamagedData, OSError, and what RocksDB raises.
    """
    if not os.path.lexists(folder):
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        disk.make_folder(new)
        _build(new / "1", [(_IDENTITY, _seal(_IDENTITY, _encode(Identity(uuid4().hex, 0))))], disk)
        disk.rename(new, folder)
        disk.sync_folder(folder.parent)
    numbers = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
    if not numbers:
        raise DamagedData("there are none in it")
    generation = folder / str(numbers[-1])
    if read_mark(generation / "mark").failed:
        log.warning("the last commit of votes failed: copying them to a new place before they are used")
        old = _open_checked(generation)
        generation = folder / str(numbers[-1] + 1)
        try:
            _build(generation, ((c.key(), c.value()) for c in _walk(old, b"")), disk)
        finally:
            old.close()
    for entry in folder.iterdir():
        if entry != generation and entry.name.removesuffix(".new").isdigit():
            shutil.rmtree(entry, ignore_errors=True)
    return generation


def _build(generation: Path, rows: Iterable[tuple[bytes, bytes]], disk: Disk) -> None:
    """A generation with these rows. On disk when this returns; after a crash it is there whole or not."""
    new = generation.with_name(generation.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    db = Rdict(str(new / "rocks"), _options(create=True))
    try:
        given = _Sum()
        source = iter(rows)
        while some := list(islice(source, _COPY_ROWS)):
            batch = WriteBatch(raw_mode=True)
            for row, raw in some:
                batch.put(row, raw)
                given.add(row, raw)
            db.write(batch)
        db.flush(wait=True)
        if _sum(db) != given:
            raise OSError(f"{new} does not give back what was written to it")
        sequence = db.latest_sequence_number()
    finally:
        db.close()
    mark = MarkFile(new / "mark", disk)
    mark.write(Mark(sequence, manifest_of(new / "rocks")))
    mark.close()
    for path, _, names in os.walk(new):
        for name in names:
            fd = disk.open(Path(path, name))
            disk.sync(fd)
            disk.close(fd)
        disk.sync_folder(Path(path))
    disk.rename(new, generation)
    disk.sync_folder(generation.parent)


@dataclass
class _Sum:
    """Of rows in order."""

    rows: int = 0
    crc: int = 0

    def add(self, row: bytes, raw: bytes) -> None:
        self.rows += 1
        self.crc = zlib.crc32(raw, zlib.crc32(row, self.crc))


def _sum(db: Rdict) -> _Sum:
    found = _Sum()
    for cursor in _walk(db, b""):  # a cursor keeps the database open: here none is left behind
        found.add(cursor.key(), cursor.value())
    return found


def _options(*, create: bool) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(create)
    options.set_error_if_exists(create)
    options.set_paranoid_checks(True)
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_write_buffer_size(4 * FLUSH_BYTES)
    options.set_max_log_file_size(1 << 20)
    options.set_keep_log_file_num(2)
    options.set_max_background_jobs(1)
    return options


def _open_checked(generation: Path) -> Rdict:
    """Raises DamagedData, OSError, and what RocksDB raises."""
    rocks = generation / "rocks"
    mark = read_mark(generation / "mark")
    mark.check_before_open(manifest_of(rocks))
    check_logs(rocks)
    db = Rdict(str(rocks), _options(create=False))
    try:
        mark.check_after_open(db.latest_sequence_number())
    except DamagedData:
        db.close()
        raise
    return db


def _refusal(folder: Path, why: Exception) -> VstackError:
    """What to tell a person whose node does not start."""
    text = str(why)
    passing = isinstance(why, OSError | VoteCommitFailed) or text.startswith("IO error")
    if passing and not isinstance(why, FileNotFoundError) and "No such file" not in text:
        return VotesUnavailable(
            f"the votes in {folder} cannot be opened now: {text}. They are not known to be damaged: "
            "put that right and start the node again"
        )
    return DamagedData(
        f"the votes in {folder} cannot be opened, so this node must not vote: {text}. "
        "Start it with --rejoin to join as a new node and keep its pieces, or with an empty data directory"
    )


def _walk(source: Rdict | Snapshot, prefix: bytes, begin: bytes = b"") -> Iterator[RdictIter]:
    """A cursor on each row below `prefix`, from `begin` on, in order. Raises DamagedData."""
    cursor = source.iter()
    cursor.seek(begin or prefix)
    while cursor.valid():
        if not cursor.key().startswith(prefix):
            return
        yield cursor
        cursor.next()
    _must_be_well(cursor)


def _occurs(source: Rdict | Snapshot, row: bytes) -> bool:
    """Whether the row, or one below it, exists. Raises DamagedData."""
    first = next(_walk(source, row), None)
    return first is not None and (first.key() == row or next(_walk(source, row + b"/"), None) is not None)


def _must_be_well(cursor: RdictIter) -> None:
    """Raises DamagedData: a cursor of RocksDB ends where it cannot read on, and only its status says that
    this was not the end."""
    try:
        cursor.status()
    except Exception as e:
        raise _unreadable(e) from e


def _unreadable(why: Exception) -> DamagedData:
    return DamagedData(f"the votes cannot be read: {why}")


def _seal(row: bytes, body: bytes) -> bytes:
    return zlib.crc32(body, zlib.crc32(row)).to_bytes(4) + body


def _unseal(row: bytes, raw: bytes) -> bytes:
    """Raises DamagedData."""
    body = raw[4:]
    if zlib.crc32(body, zlib.crc32(row)) != int.from_bytes(raw[:4]):
        raise DamagedData(f"the row {row.decode(errors='replace')} of the votes is damaged on disk")
    return body


def _decode_record(key: str, body: bytes) -> Record:
    try:
        return _decode(body)
    except msgspec.DecodeError as e:
        raise DamagedData(f"the vote on {key} is not one: {e}") from e


def _row(key: str) -> bytes:
    return b"r/" + key.encode()


def _key(row: bytes) -> str:
    return row[2:].decode()


def _chain_row(epoch: int) -> bytes:
    return b"c/%010d" % epoch


def _subject(video: str) -> bytes:
    if not video or "/" in video:
        raise ValueError(f"{video!r} is not the id of a video")
    return video.encode()
