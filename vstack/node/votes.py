"""The node's votes on disk: identity, boot counter, the chain, and one record per register.

A RocksDB of its own, `votes/`, which shares nothing with the chunk store. One synced write batch
per reactor batch; when `commit` returns, what it was given survives a power cut. The write-ahead
log is recovered in the mode that takes a torn tail in its stride and refuses anything else; what
that mode mistakes for a torn tail, `rocklog` finds before. Every record carries a CRC-32 of its key
and body. A record that cannot be read is reported as damaged, never as absent (bug B18).

    key                 value
    m/identity          NodeId and boot
    c/<epoch, 10 digits>  a decided configuration
    m/retired           why this store must never vote again, if so
    p/<NodeId>          the highest boot of that node ever met, and which process that was
    r/<register key>    CRC-32 (4 bytes, big endian) of key and body, then the packed Record

The NodeId is minted here, at the first start, and lost with this folder: never reused.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import msgspec
from rocksdict import DBRecoveryMode, Options, Rdict, WriteBatch, WriteOptions

from vstack.errors import DamagedData, VstackError
from vstack.mesh.config import Config, NodeId, mesh_id, pack_config, unpack_config
from vstack.mesh.messages import Record, ScanRow
from vstack.node.rocklog import check_logs

SCAN_BYTES = 128 * 1024
"""Bytes of records in one page of a scan."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class Identity(msgspec.Struct, frozen=True, array_like=True):
    node: NodeId
    boot: int


class VoteCommitFailed(VstackError):
    """A commit of votes failed: nothing of that batch may leave, and the process must end."""


class VoteStore:
    """Opened by one process at a time; opening it is a new boot, on disk before this returns.

    Raises DamagedData if the store cannot be opened whole: then this node must not vote.
    """

    def __init__(self, folder: Path) -> None:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_paranoid_checks(True)
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        options.set_write_buffer_size(8 << 20)
        options.set_max_log_file_size(1 << 20)
        options.set_keep_log_file_num(2)
        options.set_max_background_jobs(1)
        try:
            check_logs(folder)
            self._db = Rdict(str(folder), options)
        except Exception as e:  # rocksdict raises plain Exception
            raise _must_not_vote(folder, e) from e
        self._synced = WriteOptions()
        self._synced.sync = True
        try:
            self.identity = self._next_boot()
            self.process = os.urandom(16)
            """Of this process alone; see `meet`."""
        except Exception as e:
            self._db.close()
            raise _must_not_vote(folder, e) from e

    def _next_boot(self) -> Identity:
        retired = self._get(b"m/retired")
        if retired is not None:
            raise DamagedData(f"they are an old copy ({retired.decode()})")
        raw = self._get(b"m/identity")
        if raw is None:
            if any(True for _ in self._rows(b"")):
                raise DamagedData("there are votes, but not the identity of the node that gave them")
            old = Identity(uuid4().hex, 0)
        else:
            old = msgspec.msgpack.decode(raw, type=Identity)
        identity = Identity(old.node, old.boot + 1)
        self._put(b"m/identity", _encode(identity))
        return identity

    @property
    def node(self) -> NodeId:
        return self.identity.node

    @property
    def boot(self) -> int:
        return self.identity.boot

    def close(self) -> None:
        self._db.close()

    # -- records ----------------------------------------------------------------------------------

    def lookup(self, key: str) -> Record | None:
        """Raises DamagedData."""
        raw = self._get(b"r/" + key.encode())
        return None if raw is None else _unpack(key, raw)

    def commit(self, records: Mapping[str, Record]) -> None:
        """On disk, all of them, when this returns. Raises VoteCommitFailed."""
        batch = WriteBatch(raw_mode=True)
        for key, record in records.items():
            body = _encode(record)
            batch.put(b"r/" + key.encode(), zlib.crc32(body, zlib.crc32(key.encode())).to_bytes(4) + body)
        try:
            self._db.write(batch, self._synced)
        except Exception as e:
            raise VoteCommitFailed(f"votes could not be written: {e}") from e

    def scan(self, prefix: str, after: str, limit: int) -> tuple[list[ScanRow], bool]:
        """Records below `prefix` with a key above `after`, in order; and whether more follow.

        At most `limit` of them, and at most SCAN_BYTES.

        Raises DamagedData if a record on the way cannot be read: a listing must not skip it.
        """
        rows: list[ScanRow] = []
        size = 0
        start = b"r/" + prefix.encode()
        begin = max(start, b"r/" + after.encode() + b"\0") if after else start
        for raw_key, raw in self._rows(start, begin):
            if len(rows) == limit or size > SCAN_BYTES:
                return rows, True
            size += len(raw)
            key = raw_key[2:].decode()
            record = _unpack(key, raw)
            rows.append(ScanRow(key, record.accepted, record.value))
        return rows, False

    # -- the chain, and who was met ---------------------------------------------------------------

    def chain(self) -> tuple[Config, ...]:
        """The decided configurations known here, oldest first. Raises DamagedData."""
        return tuple(unpack_config(raw) for _, raw in self._rows(b"c/"))

    @property
    def mesh(self) -> str:
        """The mesh this node belongs to; empty before it belongs to one."""
        chain = self.chain()
        return mesh_id(chain[0]) if chain else ""

    def save_config(self, config: Config) -> None:
        """Stores a configuration that is known to be decided. On disk when this returns."""
        self._put(b"c/%010d" % config.epoch, pack_config(config))

    def meet(self, node: NodeId, boot: int, process: bytes) -> bool:
        """Whether this process of `node` is acceptable: its boot is above all met before, or it is the
        very process that was met with that boot.

        A restored snapshot, and a copy beside the original, come with a boot that was used (bug B17).
        """
        key = b"p/" + node.encode()
        known = self._get(key) or bytes(8)
        highest = int.from_bytes(known[:8])
        if boot == highest and known[8:]:
            return known[8:] == process
        if boot < highest:
            return False
        self._put(key, boot.to_bytes(8) + process)
        return True

    def retire(self, why: str) -> None:
        """These votes are an old copy: from now on this store does not open. On disk when this returns."""
        self._put(b"m/retired", why.encode())

    def _get(self, key: bytes) -> bytes | None:
        """Raises DamagedData."""
        try:
            return self._db.get(key)
        except Exception as e:
            raise DamagedData(f"the votes cannot be read: {e}") from e

    def _rows(self, prefix: bytes, begin: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All rows below `prefix`, from `begin` on, in order. Raises DamagedData: an iterator of RocksDB
        ends where it cannot read on, and only its status says that this was not the end."""
        it = self._db.iter()
        it.seek(begin or prefix)
        while it.valid():
            key, value = it.key(), it.value()
            assert isinstance(key, bytes)
            assert isinstance(value, bytes)
            if not key.startswith(prefix):
                return
            yield key, value
            it.next()
        try:
            it.status()
        except Exception as e:
            raise DamagedData(f"the votes cannot be read: {e}") from e

    def _put(self, key: bytes, value: bytes) -> None:
        try:
            self._db.put(key, value, self._synced)
        except Exception as e:
            raise VoteCommitFailed(f"votes could not be written: {e}") from e


def _must_not_vote(folder: Path, why: Exception) -> DamagedData:
    return DamagedData(
        f"the votes in {folder} cannot be opened, so this node must not vote: {why}. "
        "Start it with an empty data directory to join as a new node"
    )


def _unpack(key: str, raw: bytes) -> Record:
    body = raw[4:]
    if zlib.crc32(body, zlib.crc32(key.encode())) != int.from_bytes(raw[:4]):
        raise DamagedData(f"the vote on {key} is damaged on disk")
    return _decode(body)
