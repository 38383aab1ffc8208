"""What the tests of the chunk store share: pieces, disks that fail, a recount that trusts nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vstack.mesh.registers import Generation, PieceKey, UploadId
from vstack.node.disk import Disk, Space
from vstack.node.scan import Damage, Tail, scan
from vstack.node.store import ChunkStore, Piece, StoreStats
from vstack.node.superblock import FILE_HEADER_BYTES, Kind, Record, read_file_header

NODE = "5a" * 16
VIDEO = "ab" * 32


def key_of(number: int, *, video: str = VIDEO) -> PieceKey:
    return PieceKey(video, UploadId(3, 7), number, number % 5, Generation(number, NODE, 1, number))


def piece_of(number: int, payload: bytes | None = None, *, video: str = VIDEO) -> Piece:
    """A piece that follows from its number alone, of 0 to 5000 bytes unless told."""
    if payload is None:
        rng = random.Random(number)
        payload = rng.randbytes(rng.choice((0, 1, 7, 8, 100, 1000, 5000)))
    key = key_of(number, video=video)
    return Piece(key, 3, 5, 3 * len(payload), hashlib.sha256(payload).digest(), payload)


def open_store(folder: Path, disk: Disk | None = None, *, superblock_bytes: int = 1 << 20) -> ChunkStore:
    return ChunkStore(folder, node=NODE, superblock_bytes=superblock_bytes, reserve=0.0, disk=disk)


def superblocks(folder: Path) -> list[Path]:
    return sorted((folder / "superblocks").glob("*.vsb"))


def outcomes(store: ChunkStore, pieces: Sequence[Piece]) -> list[str]:
    return [result.outcome for result in store.put(pieces)]


def abandon(store: ChunkStore) -> None:
    """What is left when the process dies: descriptors close, nothing is written."""
    if store._closed:  # it died in `close`, whose `finally` has run
        return
    store._files.close()
    store._index.close()
    active = store._log._active
    if active is not None:
        os.close(active._fd)
    os.close(store._claim)


class Recount(NamedTuple):
    """Figures taken from the files alone, by other code than the store's."""

    pieces: int
    payload_bytes: int
    tombstones: int
    live_bytes: int
    dead_bytes: int
    hint_bytes: int
    damaged_records: int


def recount(folder: Path) -> Recount:
    disk = Disk()
    latest: dict[bytes, tuple[int, int, Record]] = {}
    stored: set[bytes] = set()
    damaged = written = hints = 0
    for path in superblocks(folder):
        fd = os.open(path, os.O_RDONLY)
        header = read_file_header(disk, fd)
        assert header is not None
        for item in scan(disk, fd, header.salt, FILE_HEADER_BYTES):
            if isinstance(item, Damage):
                damaged += 1
            elif isinstance(item, Tail):
                written += item.end - FILE_HEADER_BYTES
            elif item.record.kind == Kind.HINTS:
                hints += item.record.size
            else:
                record = item.record
                if record.kind == Kind.DATA:
                    stored.add(record.key)
                place = (record.sequence, header.number, record)
                latest[record.key] = max(latest.get(record.key, place), place)
        os.close(fd)
    live = [
        record
        for key, (_, _, record) in latest.items()
        if record.kind == Kind.DATA or damaged or key in stored
    ]
    pieces = [record for record in live if record.kind == Kind.DATA]
    live_bytes = sum(record.size for record in live)
    return Recount(
        len(pieces),
        sum(record.length for record in pieces),
        len(live) - len(pieces),
        live_bytes,
        written - live_bytes - hints,
        hints,
        damaged,
    )


def figures(stats: StoreStats) -> Recount:
    return Recount(
        stats.pieces,
        stats.payload_bytes,
        stats.tombstones,
        stats.live_bytes,
        stats.dead_bytes,
        stats.hint_bytes,
        stats.damaged_records,
    )


def agree(told: Recount, counted: Recount) -> bool:
    """Exactly; but while records are damaged, a tombstone may still be live or have been dropped before."""
    if not counted.damaged_records:
        return told == counted
    return (
        told.tombstones <= counted.tombstones
        and told.live_bytes + told.dead_bytes == counted.live_bytes + counted.dead_bytes
        and told._replace(tombstones=0, live_bytes=0, dead_bytes=0)
        == counted._replace(tombstones=0, live_bytes=0, dead_bytes=0)
    )


class FailingDisk(Disk):
    """Fails the named operations with an errno, as long as they are in `errors`."""

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}

    def _maybe(self, operation: str) -> None:
        if operation in self.errors:
            raise OSError(self.errors[operation], os.strerror(self.errors[operation]))

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        if "write" in self.errors:
            super().write(fd, [b"".join(buffers)[: sum(map(len, buffers)) // 2]], offset)
        self._maybe("write")
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._maybe("sync")
        super().sync(fd)

    def sync_folder(self, path: Path) -> None:
        self._maybe("sync_folder")
        super().sync_folder(path)

    def preallocate(self, fd: int, offset: int, length: int) -> bool:
        self._maybe("preallocate")
        return super().preallocate(fd, offset, length)

    def read(self, fd: int, offset: int, length: int) -> bytes:
        self._maybe("read")
        return super().read(fd, offset, length)


class PlainDisk(Disk):
    """A file system that cannot preallocate."""

    def preallocate(self, fd: int, offset: int, length: int) -> bool:
        return False


class SmallDisk(Disk):
    """A file system with `free` bytes left, of ten times `free` at the start."""

    def __init__(self, free: int) -> None:
        self.free = free
        self._total = 10 * free

    def space(self, fd: int) -> Space:
        return Space(self._total, self.free)

    def preallocate(self, fd: int, offset: int, length: int) -> bool:
        if length > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.free -= length
        return super().preallocate(fd, offset, length)

    def truncate(self, fd: int, size: int) -> None:
        self.free += self.size(fd) - size
        super().truncate(fd, size)

    def unlink(self, path: Path) -> None:
        self.free += path.stat().st_size
        super().unlink(path)


class Crash(BaseException):
    """The process stops here."""


class ForgetfulDisk(Disk):
    """A disk that loses, at `lose_power`, any part of what was not synced: sectors, sizes and names."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}
        self._unsynced: dict[Path, list[tuple[int, bytes]]] = {}
        self._sizes: dict[Path, int] = {}
        """Of files, when they were synced last."""
        self._unnamed: dict[Path, Path | None] = {}
        """New names, and the names that the files had before."""
        self._unlinked: dict[Path, Path] = {}
        """Names that are gone, and where the file is kept in case the name comes back."""

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._paths[fd] = path
        self._sizes[path] = 0
        self._unnamed[path] = None
        return fd

    def open(self, path: Path, *, write: bool = False) -> int:
        fd = super().open(path, write=write)
        self._paths[fd] = path
        self._sizes.setdefault(path, os.fstat(fd).st_size)
        return fd

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        length = sum(map(len, buffers))
        before = super().read(fd, offset, length).ljust(length, b"\0")
        self._unsynced.setdefault(self._paths[fd], []).append((offset, before))
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._unsynced.pop(self._paths[fd], None)
        self._sizes[self._paths[fd]] = self.size(fd)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._unnamed = {new: old for new, old in self._unnamed.items() if new.parent != path}
        for gone in [gone for gone in self._unlinked if gone.parent == path]:
            self._unlinked.pop(gone).unlink()

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        known = old not in self._unnamed
        self._unnamed.pop(old, None)
        self._unnamed[new] = old if known else None
        for fd, path in self._paths.items():
            if path == old:
                self._paths[fd] = new
        if old in self._unsynced:
            self._unsynced[new] = self._unsynced.pop(old)
        self._sizes[new] = self._sizes.pop(old, 0)

    def unlink(self, path: Path) -> None:
        if path in self._unnamed or path.suffix == ".tmp":
            self._unnamed.pop(path, None)
        else:
            kept = path.parent.parent / f"unlinked-{path.name}"
            kept.unlink(missing_ok=True)
            os.link(path, kept)
            self._unlinked[path] = kept
        super().unlink(path)

    def lose_power(self, rng: random.Random) -> None:
        for path, kept in self._unlinked.items():
            if rng.random() < 0.5 and not path.exists():
                kept.rename(path)
            else:
                kept.unlink()
        for path, writes in self._unsynced.items():
            if path.exists():
                with path.open("r+b") as file:
                    for offset, before in writes:
                        for at in range(0, len(before), 512):
                            if rng.random() < 0.5:
                                file.seek(offset + at)
                                file.write(before[at : at + 512])
        for path, size in self._sizes.items():
            if path.exists() and rng.random() < 0.3:
                os.truncate(path, size)
        for path, before_it in self._unnamed.items():
            fate = rng.choice(("kept", "gone", "as before"))
            if fate == "as before" and before_it is not None and path.exists():
                path.rename(before_it)
            elif fate == "gone":
                path.unlink(missing_ok=True)


class CrashingDisk(ForgetfulDisk):
    """Stops the process at the operation number `stop_at` (from 1); a write stops half way."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.operations = 0
        self._stop_at = stop_at

    def boundary(self) -> bool:
        """Counts an operation; True if the process is to stop in it."""
        self.operations += 1
        return self.operations == self._stop_at

    def _stop_if_due(self) -> None:
        if self.boundary():
            raise Crash

    def create(self, path: Path) -> int:
        self._stop_if_due()
        return super().create(path)

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        if self.boundary():
            joined = b"".join(buffers)
            torn = joined[: random.Random(self._stop_at).randrange(len(joined) + 1)]
            super().write(fd, [torn], offset)
            raise Crash
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._stop_if_due()
        super().sync(fd)

    def sync_folder(self, path: Path) -> None:
        self._stop_if_due()
        super().sync_folder(path)

    def preallocate(self, fd: int, offset: int, length: int) -> bool:
        self._stop_if_due()
        return super().preallocate(fd, offset, length)

    def truncate(self, fd: int, size: int) -> None:
        self._stop_if_due()
        super().truncate(fd, size)

    def rename(self, old: Path, new: Path) -> None:
        self._stop_if_due()
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self._stop_if_due()
        super().unlink(path)


class Ledger:
    """What the store has promised, kept by the test."""

    def __init__(self) -> None:
        self.stored: dict[PieceKey, Piece] = {}
        """Acknowledged and not since deleted."""
        self.deleted: set[PieceKey] = set()
        """The delete was acknowledged."""
        self.unknown: dict[PieceKey, Piece] = {}
        """A put or delete was begun and not answered."""

    def put(self, store: ChunkStore, pieces: list[Piece]) -> None:
        self.unknown |= {piece.key: piece for piece in pieces}
        self.deleted -= self.unknown.keys()
        for piece, result in zip(pieces, store.put(pieces), strict=True):
            assert result.durable
            self.stored[piece.key] = self.unknown.pop(piece.key)

    def delete(self, store: ChunkStore, keys: list[PieceKey]) -> None:
        self.unknown |= {key: self.stored.pop(key) for key in keys}
        store.delete(keys)
        for key in keys:
            del self.unknown[key]
        self.deleted |= set(keys)

    def settle(self, store: ChunkStore) -> None:
        """What was unknown is what the store says, from now on."""
        held = {info.key for info in store.list(limit=1 << 20)}
        self.stored |= {key: piece for key, piece in self.unknown.items() if key in held}
        self.deleted |= self.unknown.keys() - held
        self.unknown.clear()

    def check(self, store: ChunkStore, folder: Path) -> None:
        held = {info.key for info in store.list(limit=1 << 20)}
        assert set(self.stored) <= held <= set(self.stored) | set(self.unknown)
        assert not held & self.deleted
        for key in held:
            piece = self.stored.get(key) or self.unknown[key]
            store.verify(key)
            assert store.read(key).payload == piece.payload
        told, counted = figures(store.stats()), recount(folder)
        assert agree(told, counted), (told, counted)
        assert store.stats().read_only_superblocks == 0
        assert store.stats().file_bytes - sum(p.stat().st_size for p in folder.glob("superblocks/*")) == 0
