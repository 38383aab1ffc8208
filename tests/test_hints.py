"""Hints at the end of sealed superblocks: a rebuild reads nothing else where they are good."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.store_helpers import (
    NODE,
    FailingDisk,
    abandon,
    figures,
    key_of,
    open_store,
    outcomes,
    piece_of,
    recount,
    superblocks,
)
from vstack.node.disk import Disk
from vstack.node.hints import Hints, read_hints, walk
from vstack.node.scan import Found, scan
from vstack.node.store import ChunkStore
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    Appender,
    FileHeader,
    Kind,
    Record,
    read_file_header,
    superblock_path,
)


class CountingDisk(Disk):
    """Counts the bytes that are read."""

    def __init__(self) -> None:
        self.bytes = 0

    def read(self, fd: int, offset: int, length: int) -> bytes:
        self.bytes += length
        return super().read(fd, offset, length)


def fill(folder: Path, *, size: int = 20_000) -> ChunkStore:
    """A store of some sealed superblocks and an active one, with deletes in both."""
    store = open_store(folder, superblock_bytes=200_000)
    store.put([piece_of(n, random.Random(n).randbytes(size)) for n in range(40)])
    store.delete([key_of(n) for n in range(0, 40, 7)])
    return store


def hints_of(path: Path) -> list[Found] | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        header = read_file_header(Disk(), fd)
        assert header is not None
        return read_hints(Disk(), fd, header.salt)
    finally:
        os.close(fd)


def found_in(path: Path) -> list[Found]:
    fd = os.open(path, os.O_RDONLY)
    try:
        header = read_file_header(Disk(), fd)
        assert header is not None
        return [x for x in scan(Disk(), fd, header.salt, FILE_HEADER_BYTES) if isinstance(x, Found)]
    finally:
        os.close(fd)


def test_hints_say_exactly_what_a_scan_finds_tombstones_too(tmp_path: Path) -> None:
    fill(tmp_path).close()
    store = open_store(tmp_path, superblock_bytes=200_000)
    store.put([piece_of(n, bytes(20_000)) for n in range(100, 120)])
    store.close()
    *sealed, active = superblocks(tmp_path)
    assert len(sealed) > 4
    for path in sealed:
        assert hints_of(path) == found_in(path)
    assert hints_of(active) is None
    kinds = {found.record.kind for path in sealed for found in found_in(path)}
    assert kinds == {Kind.DATA, Kind.TOMBSTONE, Kind.HINTS}


def test_a_rebuild_reads_hints_and_not_the_pieces(tmp_path: Path) -> None:
    store = fill(tmp_path)
    before, stats = store.list(), figures(store.stats())
    store.close()
    shutil.rmtree(tmp_path / "index")
    disk = CountingDisk()
    store = open_store(tmp_path, disk, superblock_bytes=200_000)
    assert store.list() == before
    assert figures(store.stats()) == stats == recount(tmp_path)
    start = store.stats().start
    assert start.rebuilt
    assert start.hinted_records + start.scanned_records == 46
    assert start.hinted_records > 30
    active = superblocks(tmp_path)[-1].stat().st_size
    assert disk.bytes < active * 2 + 100_000
    store.close()


@pytest.mark.parametrize("where", ["offset", "entries", "header", "footer", "cut short"])
def test_damaged_hints_are_not_trusted_and_the_file_is_scanned(tmp_path: Path, where: str) -> None:
    store = fill(tmp_path)
    before = store.list()
    store.close()
    path = superblocks(tmp_path)[1]
    hints = found_in(path)[-1]
    size = path.stat().st_size
    if where == "cut short":
        os.truncate(path, size - 8)
    else:
        at = {"offset": size - 10, "entries": hints.offset + 300, "header": hints.offset, "footer": size - 2}
        with path.open("r+b") as file:
            file.seek(at[where])
            byte = file.read(1)[0]
            file.seek(at[where])
            file.write(bytes([byte ^ 1]))
    assert hints_of(path) is None
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path, superblock_bytes=200_000)
    assert store.list() == before
    assert store.stats().start.scanned_records >= len(found_in(path))
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_hints_that_leave_a_record_out_are_not_trusted(tmp_path: Path) -> None:
    """Whole and with the right hash, but with a gap."""
    header = FileHeader(NODE, 1, 0, bytes(range(16)))
    for kept in ((0, 1, 2), (0, 2), (1, 2), (0, 1)):
        appender = Appender.create(Disk(), tmp_path, header)
        hints = Hints()
        for number in range(3):
            piece = piece_of(number, b"x" * 100)
            record = Record(Kind.DATA, number, piece.key.pack(), 0, 3, 5, 9, 100, piece.sha256)
            offset = appender.stage(record, piece.payload)
            if number in kept:
                hints.add(offset, record)
        appender.stage(*hints.record(appender.end))
        appender.flush()
        appender.close()
        path = superblock_path(tmp_path, 1)
        assert (hints_of(path) is not None) == (kept == (0, 1, 2))
        path.unlink()


def test_hints_of_another_file_are_not_taken(tmp_path: Path) -> None:
    """A piece whose payload is the end of a superblock, cut so that the file ends there."""
    fill(tmp_path / "a").close()
    fill(tmp_path / "b").close()
    first, second = (superblocks(tmp_path / name)[0] for name in "ab")
    hints = found_in(first)[-1]
    raw = first.read_bytes()[hints.offset :]
    with second.open("r+b") as file:
        file.seek(hints.offset)
        file.write(raw)
    assert hints_of(first) is not None
    assert hints_of(second) is None


def test_a_superblock_that_was_resumed_has_hints_of_all_its_records(tmp_path: Path) -> None:
    for first in range(0, 12, 3):
        store = open_store(tmp_path, superblock_bytes=100_000)
        store.put([piece_of(first + n, bytes(9_000)) for n in range(3)])
        store.close()
    path = superblocks(tmp_path)[0]
    assert len(superblocks(tmp_path)) == 2
    assert hints_of(path) == found_in(path)


def test_a_superblock_with_a_damaged_header_inside_is_not_resumed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, bytes(500)) for n in range(3)])
    store.close()
    (path,) = superblocks(tmp_path)
    with path.open("r+b") as file:
        file.seek(found_in(path)[1].offset + 20)
        file.write(b"\xff\xff")
    store = open_store(tmp_path)
    store.put([piece_of(9)])
    assert len(superblocks(tmp_path)) == 2
    assert len(store.list()) == 4
    store.close()


def test_a_walk_over_headers_gives_the_hints_that_were_gathered(tmp_path: Path) -> None:
    store = fill(tmp_path)
    gathered = store._log._hints
    active, end = superblocks(tmp_path)[-1], store._log._active
    assert end is not None
    fd = os.open(active, os.O_RDONLY)
    header = read_file_header(Disk(), fd)
    assert header is not None
    walked = walk(Disk(), fd, header.salt, end.end)
    os.close(fd)
    assert isinstance(walked, Hints)
    assert walked.record(4096) == gathered.record(4096)
    store.close()


def test_many_tiny_records_close_a_superblock_before_their_hints_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vstack.node.hints.MOST_BYTES", 1600)
    store = open_store(tmp_path)
    store.put([piece_of(n, b"") for n in range(35)])
    assert len(superblocks(tmp_path)) == 4
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_full_disk_costs_the_hints_and_not_the_superblock(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = ChunkStore(tmp_path, node=NODE, superblock_bytes=10_000, reserve=0.0, disk=disk)
    store.put([piece_of(1, bytes(12_000))])
    disk.errors["preallocate"] = 28
    assert outcomes(store, [piece_of(2, bytes(4000))]) == ["full"]
    disk.errors.clear()
    assert outcomes(store, [piece_of(2, bytes(4000))]) == ["stored"]
    assert [path for path in superblocks(tmp_path) if hints_of(path)] == []
    assert figures(store.stats()) == recount(tmp_path)
    assert store.stats().read_only_superblocks == 0
    abandon(store)
    store = ChunkStore(tmp_path, node=NODE, superblock_bytes=10_000, reserve=0.0)
    assert len(store.list()) == 2
    store.close()


def test_the_header_of_a_sealed_superblock_says_where_sequence_numbers_go_on(tmp_path: Path) -> None:
    """Also when all that is left is read by its hints."""
    store = fill(tmp_path)
    store.close()
    highest = max(f.record.sequence for path in superblocks(tmp_path) for f in found_in(path))
    superblocks(tmp_path)[-1].unlink()
    assert superblock_path(tmp_path / "superblocks", 1).exists()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    store.put([piece_of(500)])
    info = store.info(key_of(500))
    assert info is not None
    left = max(f.record.sequence for path in superblocks(tmp_path)[:-1] for f in found_in(path))
    assert left < info.sequence <= highest + 1
    store.close()
