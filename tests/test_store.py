"""The chunk store on a real disk: storing, reading, deleting, damage, a failing and a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rocksdict import WriteBatch

from tests.store_helpers import (
    VIDEO,
    Crash,
    FailingDisk,
    PlainDisk,
    SmallDisk,
    abandon,
    figures,
    key_of,
    open_store,
    outcomes,
    piece_of,
    recount,
    superblocks,
)
from vstack.errors import DamagedData, VstackError
from vstack.mesh.registers import PieceKey
from vstack.node.disk import Disk
from vstack.node.files import OpenFiles
from vstack.node.index import IndexDamaged
from vstack.node.store import (
    ChunkStore,
    PieceNotFound,
    PieceRefused,
    StoreFull,
    WriteFailed,
)
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Appender,
    FileHeader,
    Kind,
    Record,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def contents(store: ChunkStore) -> dict[PieceKey, bytes]:
    return {info.key: store.read(info.key).payload for info in store.list(limit=1 << 20)}


def payload_place(folder: Path, store: ChunkStore, key: PieceKey) -> tuple[Path, int]:
    row = store._index.piece(key.pack())
    assert row is not None
    return superblocks(folder)[row.superblock - 1], row.offset + RECORD_HEADER_BYTES


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# Storing and reading


def test_a_stored_piece_comes_back_with_what_was_said_of_it(store: ChunkStore) -> None:
    piece = piece_of(5, b"some bytes of video")
    assert outcomes(store, [piece]) == ["stored"]
    answer = store.read(piece.key)
    assert answer.payload == piece.payload
    info = store.info(piece.key)
    assert info == answer.info
    assert info is not None
    assert info[:6] == (piece.key, 3, 5, piece.chunk_length, len(piece.payload), piece.sha256)
    assert store.verify(piece.key) == info


def test_a_range_comes_back_and_a_range_outside_is_an_error(store: ChunkStore) -> None:
    piece = piece_of(1, random.Random(1).randbytes(5000))
    store.put([piece])
    for offset, length in ((0, 10), (4096, 904), (4999, 1), (5000, 0), (17, None)):
        answer = store.read(piece.key, offset, length)
        expected = piece.payload[offset:] if length is None else piece.payload[offset : offset + length]
        assert (answer.offset, answer.payload) == (offset, expected)
    for offset, length in ((0, 5001), (5000, 1), (-1, 2), (0, -1), (6000, None)):
        with pytest.raises(ValueError, match="5000"):
            store.read(piece.key, offset, length)


def test_a_memoryview_is_stored_without_being_turned_into_bytes(store: ChunkStore) -> None:
    piece = piece_of(2, b"0123456789abcdef")
    assert outcomes(store, [piece._replace(payload=memoryview(piece.payload))]) == ["stored"]
    assert store.read(piece.key).payload == piece.payload


def test_a_repeated_piece_is_present_and_costs_nothing(store: ChunkStore) -> None:
    pieces = [piece_of(n) for n in range(5)]
    assert outcomes(store, [*pieces, pieces[0]]) == ["stored"] * 6
    before = store.stats()
    assert outcomes(store, pieces) == ["present"] * 5
    assert store.stats() == before
    assert before.pieces == 5


def test_the_same_key_with_other_bytes_is_refused(store: ChunkStore) -> None:
    first, second = piece_of(1, b"first"), piece_of(1, b"other")
    assert outcomes(store, [first, second]) == ["stored", "refused"]
    (result,) = store.put([second])
    assert isinstance(result.error, PieceRefused)
    assert not result.durable
    assert store.read(first.key).payload == b"first"


def test_a_bad_piece_is_refused_and_does_not_hinder_the_others(store: ChunkStore) -> None:
    good = piece_of(1)
    bad = [
        piece_of(2)._replace(payload=b"not what the hash says"),
        piece_of(3)._replace(sha256=b"short"),
        piece_of(4)._replace(k=6),
        piece_of(5)._replace(k=0),
        piece_of(6)._replace(key=key_of(6)._replace(video="no hex")),
        piece_of(7)._replace(key=key_of(7)._replace(video="ab")),
        piece_of(8)._replace(key=key_of(8)._replace(chunk=1 << 40)),
        piece_of(9)._replace(chunk_length=-1),
    ]
    assert outcomes(store, [*bad, good]) == ["refused"] * len(bad) + ["stored"]
    assert [info.key for info in store.list()] == [good.key]


def test_the_hash_is_not_checked_again_if_the_caller_has_done_so(store: ChunkStore) -> None:
    wrong = piece_of(1)._replace(payload=b"x")
    assert [r.outcome for r in store.put([wrong], verified=True)] == ["stored"]
    with pytest.raises(DamagedData):
        store.verify(wrong.key)


def test_a_piece_that_is_not_here_is_not_found(store: ChunkStore) -> None:
    assert store.info(key_of(1)) is None
    with pytest.raises(PieceNotFound):
        store.read(key_of(1))


def test_a_listing_is_sorted_and_can_be_taken_in_pages_by_prefix(store: ChunkStore) -> None:
    other = "ff" * 32
    store.put([piece_of(n) for n in range(25)] + [piece_of(n, video=other) for n in range(5)])
    keys = [key_of(n) for n in range(25)]
    assert [info.key for info in store.list()] == keys + [key_of(n, video=other) for n in range(5)]
    pages: list[PieceKey] = []
    while page := store.list(bytes.fromhex(VIDEO), pages[-1].pack() if pages else b"", 10):
        pages += [info.key for info in page]
    assert pages == keys
    assert store.list(b"\x00") == []


def test_superblocks_are_closed_before_they_exceed_their_size(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=100_000)
    pieces = [piece_of(n, random.Random(n).randbytes(30_000)) for n in range(10)]
    assert outcomes(store, pieces) == ["stored"] * 10
    assert outcomes(store, [piece_of(99, bytes(200_000))]) == ["stored"]  # one piece may be larger
    sizes = [path.stat().st_size for path in superblocks(tmp_path)]
    assert len(sizes) == 5
    assert max(sizes[:-1]) <= 100_000
    assert sum(sizes) == store.stats().file_bytes
    assert contents(store)[pieces[3].key] == pieces[3].payload
    store.close()


def test_a_file_system_that_cannot_preallocate_serves_as_well(tmp_path: Path) -> None:
    store = open_store(tmp_path, PlainDisk())
    pieces = [piece_of(n) for n in range(20)]
    store.put(pieces)
    assert superblocks(tmp_path)[0].stat().st_size == store.stats().file_bytes
    abandon(store)
    store = open_store(tmp_path, PlainDisk())
    assert contents(store) == {piece.key: piece.payload for piece in pieces}
    assert outcomes(store, [piece_of(100)]) == ["stored"]
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


# Start and stop


def test_a_clean_restart_scans_nothing_and_goes_on_in_the_same_superblock(tmp_path: Path) -> None:
    pieces = [piece_of(n) for n in range(30)]
    for round_ in range(3):
        store = open_store(tmp_path)
        assert store.stats().start[:4] == (0, 0, 0, False)
        store.put(pieces[10 * round_ : 10 * round_ + 10])
        store.close()
        store.close()
    store = open_store(tmp_path)
    assert contents(store) == {piece.key: piece.payload for piece in pieces}
    assert len(superblocks(tmp_path)) == 1
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_store_in_use_is_refused_and_its_index_left_alone(tmp_path: Path, store: ChunkStore) -> None:
    store.put([piece_of(1)])
    with pytest.raises(VstackError, match="in use"):
        open_store(tmp_path)
    store.put([piece_of(2)])
    assert len(store.list()) == 2


def test_a_closed_store_says_so_instead_of_taking_writes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    for use in (
        lambda: store.put([piece_of(1)]),
        lambda: store.delete([key_of(1)]),
        lambda: store.read(key_of(1)),
    ):
        with pytest.raises(VstackError, match="cannot be read now"):
            use()


@pytest.mark.parametrize("how", ["gone", "emptied", "overwritten", "another store's"])
def test_an_index_that_cannot_be_trusted_is_made_anew_from_the_superblocks(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "store"
    store = open_store(folder)
    pieces = [piece_of(n) for n in range(200)]
    store.put(pieces)
    store.delete([piece.key for piece in pieces[:50]])
    before, stats = contents(store), figures(store.stats())
    store.close()
    index = folder / "index"
    if how == "overwritten":
        for path in index.iterdir():
            path.write_bytes(random.Random(path.name).randbytes(max(path.stat().st_size, 10)))
    else:
        shutil.rmtree(index)
        if how == "emptied":
            index.mkdir()
        if how == "another store's":
            other = open_store(tmp_path / "other")
            other.put(pieces[:9])
            other.close()
            shutil.copytree(tmp_path / "other" / "index", index)
    store = open_store(folder)
    assert contents(store) == before
    assert figures(store.stats()) == stats == recount(folder)
    assert store.stats().start.scanned_records == 250
    store.close()
    store = open_store(folder)
    assert store.stats().start.scanned_records == 0
    store.close()


def test_an_index_found_damaged_while_running_is_not_trusted_by_the_next_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n) for n in range(300)]
    store.put(pieces)
    store._index._db.flush()
    store.close()
    for path in (tmp_path / "index").glob("*.sst"):
        at = path.read_bytes().find(pieces[150].sha256)
        if at >= 0:
            flip(path, at)
    store = open_store(tmp_path)
    assert not store.stats().start.rebuilt
    with pytest.raises(IndexDamaged):
        store.list()
    store.close()
    store = open_store(tmp_path)
    assert store.stats().start.rebuilt
    assert contents(store) == {piece.key: piece.payload for piece in pieces}
    store.close()


def test_a_scan_that_is_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 100) for n in range(10)]
    store.put(pieces)
    path, offset = payload_place(tmp_path, store, pieces[3].key)
    abandon(store)
    flip(path, offset)
    shutil.rmtree(tmp_path / "index")
    monkeypatch.setattr("vstack.node.recovery._RECORDS_A_BATCH", 4)

    class StopsAtTheEnd(Disk):
        def truncate(self, fd: int, size: int) -> None:
            raise Crash

    with pytest.raises(Crash):
        open_store(tmp_path, StopsAtTheEnd())
    store = open_store(tmp_path)
    assert store.stats().start.scanned_records == 1
    assert len(store.list()) == 9
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_an_older_index_catches_up(tmp_path: Path) -> None:
    """A power loss takes the end of the index away, however far back."""
    store = open_store(tmp_path, superblock_bytes=20_000)
    pieces = [piece_of(n) for n in range(60)]
    store.put(pieces[:20])
    shutil.copytree(tmp_path / "index", tmp_path / "older")
    store.put(pieces[20:])
    store.delete([pieces[3].key, pieces[30].key])
    before, stats = contents(store), figures(store.stats())
    store.close()
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "older").rename(tmp_path / "index")
    store = open_store(tmp_path, superblock_bytes=20_000)
    assert contents(store) == before
    assert figures(store.stats()) == stats == recount(tmp_path)
    assert 0 < store.stats().start.scanned_records < 62
    store.close()


def test_a_store_hidden_in_the_payload_of_a_video_stays_hidden(tmp_path: Path) -> None:
    """Whole superblocks, hints and all, are stored as pieces; a rebuild finds the outer records only."""
    inner = open_store(tmp_path / "inner", superblock_bytes=20_000)
    inner.put([piece_of(n, bytes([n]) * 3000) for n in range(12)])
    inner.delete([key_of(3)])
    inner.close()
    folder = tmp_path / "outer"
    store = open_store(folder)
    smuggled = [
        piece_of(100 + n, path.read_bytes()) for n, path in enumerate(superblocks(tmp_path / "inner"))
    ]
    store.put(smuggled)
    store.put([piece_of(200, (folder / "superblocks" / "0000000001.vsb").read_bytes()[:50_000])])
    expected = contents(store)
    store.close()
    for damage_first in (False, True):
        if damage_first:  # the scan then looks for the next header in the middle of the payload
            path = superblocks(folder)[0]
            flip(path, FILE_HEADER_BYTES + 20)
            del expected[smuggled[0].key]
        shutil.rmtree(folder / "index")
        store = open_store(folder)
        assert contents(store) == expected
        assert figures(store.stats()) == recount(folder)
        store.close()


def test_nothing_that_was_written_is_overwritten_or_cut_off(tmp_path: Path) -> None:
    """Metadata is never changed in place: a stop half way leaves what was there before."""

    class OnlyAppends(Disk):
        writes = truncations = 0

        def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
            self.writes += 1
            assert not os.pread(fd, sum(map(len, buffers)), offset).strip(b"\0")
            super().write(fd, buffers, offset)

        def truncate(self, fd: int, size: int) -> None:
            self.truncations += 1
            assert not os.pread(fd, max(0, self.size(fd) - size), size).strip(b"\0")
            super().truncate(fd, size)

    disk = OnlyAppends()
    for round_ in range(4):
        store = open_store(tmp_path, disk, superblock_bytes=50_000)
        store.put([piece_of(100 * round_ + n, random.Random(n).randbytes(7000)) for n in range(20)])
        store.delete([key_of(100 * round_ + n) for n in range(10)])
        while store.compaction.step():
            pass
        if round_ % 2:
            store.close()
        else:
            abandon(store)
    assert disk.writes > 20
    assert disk.truncations > 4


# Deleting


def test_a_deleted_piece_stays_deleted_when_the_index_is_made_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n) for n in range(4)]
    store.put(pieces)
    store.delete([pieces[1].key, pieces[2].key, pieces[1].key, key_of(99)])
    store.delete([pieces[1].key])
    assert [info.key for info in store.list()] == [pieces[0].key, pieces[3].key]
    assert store.stats().tombstones == 2
    store.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [pieces[0].key, pieces[3].key]
    with pytest.raises(PieceNotFound):
        store.read(pieces[1].key)
    store.close()


def test_the_highest_sequence_number_of_a_key_wins_in_a_rebuild(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, second = piece_of(1, b"first"), piece_of(1, b"second")
    store.put([first])
    store.delete([first.key])
    assert outcomes(store, [second]) == ["stored"]
    store.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    assert store.read(first.key).payload == b"second"
    assert figures(store.stats()) == recount(tmp_path)
    assert store.stats().tombstones == 0
    store.close()


def test_sequence_numbers_grow_across_restarts_and_lost_indexes(tmp_path: Path) -> None:
    seen: list[int] = []
    for number in range(6):
        store = open_store(tmp_path)
        store.put([piece_of(number)])
        info = store.info(key_of(number))
        assert info is not None
        seen.append(info.sequence)
        store.delete([key_of(number)])
        if number % 2:
            store.close()
            shutil.rmtree(tmp_path / "index")
        else:
            abandon(store)
    assert seen == sorted(set(seen))


def test_an_older_record_in_a_later_superblock_does_not_win(tmp_path: Path) -> None:
    """As compaction leaves it: a copy keeps its sequence number and lies behind what superseded it."""
    store = open_store(tmp_path)
    kept, gone = piece_of(1, b"old"), piece_of(2, b"deleted")
    store.put([kept, gone])
    store.delete([kept.key, gone.key])
    store.put([piece_of(1, b"new")])
    store.close()
    header = FileHeader("5a" * 16, 2, 0, bytes(16))
    appender = Appender.create(Disk(), tmp_path / "superblocks", header)
    for sequence, piece in enumerate((kept, gone)):
        copy = Record(Kind.DATA, sequence, piece.key.pack(), 0, 3, 5, 9, len(piece.payload), piece.sha256)
        appender.stage(copy, piece.payload)
    appender.flush()
    appender.close()
    for index in ("kept", "lost"):
        if index == "lost":
            shutil.rmtree(tmp_path / "index")
        store = open_store(tmp_path)
        assert contents(store) == {kept.key: b"new"}
        assert figures(store.stats()) == recount(tmp_path)
        store.close()


def test_sequence_numbers_go_on_where_the_latest_superblock_says(tmp_path: Path) -> None:
    """Even if all the records below are gone."""
    store = open_store(tmp_path, superblock_bytes=9000)
    store.put([piece_of(n, bytes(600)) for n in range(6)])
    store.close()
    first, second = superblocks(tmp_path)
    first.unlink()
    os.truncate(second, FILE_HEADER_BYTES)
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    store.put([piece_of(9)])
    info = store.info(key_of(9))
    assert info is not None
    assert info.sequence >= 4
    store.close()


# Damage


def test_a_flipped_bit_in_a_payload_is_found_by_verify_and_mended_by_a_put(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 5000) for n in range(5)]
    store.put(pieces)
    path, offset = payload_place(tmp_path, store, pieces[2].key)
    flip(path, offset + 2500)
    for piece in pieces:
        if piece is pieces[2]:
            with pytest.raises(DamagedData):
                store.verify(piece.key)
        else:
            store.verify(piece.key)
    assert store.stats().damaged_records == 1
    assert outcomes(store, pieces) == ["present", "present", "stored", "present", "present"]
    store.verify(pieces[2].key)
    assert store.stats().damaged_records == 0
    store.close()


def test_damage_beyond_the_watermark_is_reported_and_costs_one_piece(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 5000) for n in range(5)]
    store.put(pieces)
    places = [payload_place(tmp_path, store, piece.key) for piece in pieces]
    store.close()
    shutil.rmtree(tmp_path / "index")
    flip(places[1][0], places[1][1] + 100)  # in a payload
    flip(places[3][0], places[3][1] - 100)  # in a header
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [pieces[n].key for n in (0, 2, 4)]
    assert store.stats().damaged_records == 2
    assert figures(store.stats()) == recount(tmp_path)
    assert outcomes(store, pieces) == ["present", "stored", "present", "stored", "present"]
    store.close()


def test_the_index_is_not_trusted_over_the_log(tmp_path: Path, store: ChunkStore) -> None:
    pieces = [piece_of(n, b"same length") for n in range(2)]
    store.put(pieces)
    path, offset = payload_place(tmp_path, store, pieces[0].key)
    flip(path, offset - 20)
    with pytest.raises(DamagedData, match="header"):
        store.read(pieces[0].key, 2, 3)
    rows = store._index._db
    rows[b"p" + pieces[0].key.pack()] = rows[b"p" + pieces[1].key.pack()]
    with pytest.raises(DamagedData, match="header"):
        store.read(pieces[0].key)


def test_a_superblock_whose_header_is_gone_is_read_with_the_salt_from_the_index(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(1)])
    store.close()
    with superblocks(tmp_path)[0].open("r+b") as file:
        file.write(bytes(FILE_HEADER_BYTES))
    store = open_store(tmp_path)
    store.verify(key_of(1))
    assert store.stats().read_only_superblocks == 0
    assert outcomes(store, [piece_of(2)]) == ["stored"]
    assert len(superblocks(tmp_path)) == 2
    store.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [key_of(2)]
    assert store.stats().read_only_superblocks == 1
    assert store.stats().damaged_records == 1
    store.close()


def test_a_superblock_that_vanished_costs_its_pieces_only(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=12_000)
    pieces = [piece_of(n, bytes(5000)) for n in range(2)]
    store.put(pieces)
    superblocks(tmp_path)[0].unlink()
    with pytest.raises(DamagedData, match="gone"):
        store.read(pieces[0].key)
    abandon(store)
    store = open_store(tmp_path, superblock_bytes=12_000)
    assert [info.key for info in store.list()] == [pieces[1].key]
    store.close()


def test_a_superblock_that_lost_its_end_costs_the_pieces_there_only(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 5000) for n in range(4)]
    store.put(pieces)
    path, offset = payload_place(tmp_path, store, pieces[2].key)
    store.close()
    os.truncate(path, offset + 100)
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [pieces[0].key, pieces[1].key]
    assert figures(store.stats()) == recount(tmp_path)
    assert outcomes(store, pieces) == ["present", "present", "stored", "stored"]
    store.close()


def test_what_an_unfinished_write_left_is_not_cut_off(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(1, b"x" * 100)])
    abandon(store)
    (path,) = superblocks(tmp_path)
    content = path.read_bytes().rstrip(b"\0")
    with path.open("r+b") as file:
        file.seek(len(content) + 50)
        file.write(b"half a record")
    before = path.read_bytes().rstrip(b"\0")
    store = open_store(tmp_path)
    assert store.stats().start.torn_tails == 1
    assert outcomes(store, [piece_of(2)]) == ["stored"]
    store.close()
    assert path.read_bytes().rstrip(b"\0") == before
    assert path.stat().st_size < len(before) + 8


# A failing disk


@pytest.mark.parametrize("operation", ["sync", "write"])
def test_a_failed_write_or_fsync_fails_the_pieces_and_retires_the_file(
    tmp_path: Path, operation: str
) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    assert outcomes(store, [piece_of(1)]) == ["stored"]
    disk.errors[operation] = errno.EIO
    failed = store.put([piece_of(2), piece_of(3)])
    assert [result.outcome for result in failed] == ["failed", "failed"]
    assert isinstance(failed[0].error, WriteFailed)
    assert store.info(key_of(2)) is None
    disk.errors.clear()
    assert outcomes(store, [piece_of(2), piece_of(1)]) == ["stored", "present"]
    assert len(superblocks(tmp_path)) == 2
    assert store.stats().read_only_superblocks == 1
    store.verify(key_of(1))
    store.verify(key_of(2))
    abandon(store)
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [key_of(1), key_of(2)]
    assert store.stats().read_only_superblocks == 1
    assert outcomes(store, [piece_of(3)]) == ["stored"]
    store.close()


def test_a_superblock_that_cannot_be_made_durable_is_not_used(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    disk.errors["sync_folder"] = errno.EIO
    assert outcomes(store, [piece_of(1)]) == ["failed"]
    assert list((tmp_path / "superblocks").iterdir()) == []
    disk.errors.clear()
    assert outcomes(store, [piece_of(1)]) == ["stored"]
    store.close()


def test_records_that_cannot_be_synced_at_start_are_not_counted_as_stored(tmp_path: Path) -> None:
    """They may be in the page cache alone, and would be acknowledged as present."""
    store = open_store(tmp_path)
    store.put([piece_of(1)])
    abandon(store)
    shutil.rmtree(tmp_path / "index")
    disk = FailingDisk()
    disk.errors["sync"] = errno.EIO
    store = open_store(tmp_path, disk)
    assert store.list() == []
    disk.errors.clear()
    assert outcomes(store, [piece_of(2)]) == ["stored"]
    store.close()
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [key_of(1), key_of(2)]
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_an_index_that_takes_no_writes_stops_the_store_until_it_is_opened_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(1)])

    class Refusing:
        def get(self, key: bytes) -> None:
            return None

        def write(self, *_: object) -> None:
            raise Exception("IO error: No space left on device")

    real, store._index._db = store._index._db, Refusing()  # type: ignore[assignment]
    assert outcomes(store, [piece_of(2)]) == ["failed"]
    assert store.stats().pieces == 1
    store._index._db = real
    assert outcomes(store, [piece_of(3)]) == ["failed"]
    abandon(store)
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [key_of(1), key_of(2)]
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_an_error_while_reading_is_an_error_and_not_damage(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    store.put([piece_of(1)])
    disk.errors["read"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        store.read(key_of(1))
    disk.errors.clear()
    assert store.stats().damaged_records == 0
    assert outcomes(store, [piece_of(1)]) == ["present"]
    store.close()


# A full disk


@pytest.mark.parametrize("operation", ["preallocate", "write"])
def test_a_full_disk_is_refused_clearly_and_recovered_from(tmp_path: Path, operation: str) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    disk.errors[operation] = errno.ENOSPC
    (result,) = store.put([piece_of(1)])
    assert result.outcome == "full"
    assert isinstance(result.error, StoreFull)
    disk.errors.clear()
    assert outcomes(store, [piece_of(1)]) == ["stored"]
    store.close()
    store = open_store(tmp_path)
    assert contents(store) == {key_of(1): piece_of(1).payload}
    store.close()


def test_pieces_stop_at_the_reserve_and_deletes_go_on(tmp_path: Path) -> None:
    disk = SmallDisk(1 << 20)  # of 10 MiB: the reserve is half a MiB
    store = ChunkStore(tmp_path, node="00" * 16, superblock_bytes=64 << 10, reserve=0.05, disk=disk)
    stored = []
    for number in range(1000):
        (result,) = store.put([piece_of(number, bytes(10_000))])
        if result.outcome == "full":
            break
        stored.append(result.key)
    assert 40 < len(stored) < 60
    assert disk.free >= 512 << 10
    assert outcomes(store, [piece_of(2000, bytes(10_000)), piece_of(0, bytes(10_000))]) == ["full", "present"]
    store.delete(stored)
    assert store.list() == []
    disk.free = 10 << 20
    assert outcomes(store, [piece_of(3000)]) == ["stored"]
    store.close()


# The system calls


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal, a quota or a network file system may cut them."""
    pread, pwritev = os.pread, os.pwritev

    def short_write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return pwritev(fd, [b"".join(buffers)[:7]], offset)

    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 5), offset))
    monkeypatch.setattr(os, "pwritev", short_write)
    buffers: list[bytes | memoryview] = [b"", b"one", memoryview(b"a longer buffer"), b"", b"x", b"seven b"]
    disk = Disk()
    fd = disk.create(tmp_path / "file")
    disk.write(fd, buffers, 3)
    assert disk.read(fd, 0, 100) == bytes(3) + b"".join(buffers)
    assert disk.read(fd, 3, 11) == b"onea longer"
    disk.close(fd)


def test_more_buffers_than_one_call_takes_are_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n) for n in range(1000)]
    assert outcomes(store, pieces) == ["stored"] * 1000
    assert contents(store) == {piece.key: piece.payload for piece in pieces}
    store.close()


def test_each_new_superblock_makes_the_index_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a power loss never costs the scan of more than a superblock or two."""
    store = open_store(tmp_path, superblock_bytes=8000)
    synced: list[bool] = []
    write = store._index.write

    def spy(batch: WriteBatch, *, sync: bool) -> None:
        synced.append(sync)
        write(batch, sync=sync)

    monkeypatch.setattr(store._index, "write", spy)
    for number in range(6):
        store.put([piece_of(number, bytes(1500))])
    assert synced == [True, False, True, False, True, False]
    store.close()


# Many threads


def test_readers_see_whole_pieces_while_others_are_stored_and_deleted(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=200_000)
    kept = [piece_of(n, random.Random(n).randbytes(20_000)) for n in range(20)]
    store.put(kept)
    stop = threading.Event()
    problems: list[BaseException] = []
    reads = 0

    def reader(seed: int) -> None:
        nonlocal reads
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                piece = rng.choice(kept)
                at = rng.randrange(20_000)
                assert store.read(piece.key, at).payload == piece.payload[at:]
                fresh = key_of(1000 + rng.randrange(60))
                try:
                    answer = store.read(fresh)
                    assert hashlib.sha256(answer.payload).digest() == answer.info.sha256
                except PieceNotFound:
                    pass
                reads += 1
        except (AssertionError, VstackError, OSError, LookupError) as error:
            problems.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    number = 0
    while (number < 60 or reads < 300) and not problems and time.monotonic() < deadline:
        batch = [piece_of(1000 + (number + i) % 60, os.urandom(9000)) for i in range(4)]
        assert {result.outcome for result in store.put(batch)} <= {"stored", "refused"}
        store.delete([batch[0].key, batch[2].key])
        number += 4
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert reads >= 300
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_file_stays_readable_for_whoever_reads_it_though_it_is_pushed_out(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=4200)
    store.put([piece_of(n, b"x" * 50) for n in range(200)])
    files = OpenFiles(Disk(), tmp_path / "superblocks")
    with files.use(1) as held:
        for number in range(2, 200):
            with files.use(number) as other:
                assert other != held
        files.close()
        assert os.pread(held, 8, 0) == b"vstackSB"
    with pytest.raises(OSError, match="descriptor"):
        os.pread(held, 8, 0)
    store.close()


def test_no_more_files_stay_open_than_a_bound(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(tmp_path, superblock_bytes=4200)
    pieces = [piece_of(n, b"x" * 50) for n in range(200)]
    store.put(pieces)
    assert len(superblocks(tmp_path)) == 200
    assert contents(store) == {piece.key: piece.payload for piece in pieces}
    assert len(os.listdir("/proc/self/fd")) < before + 190
    store.close()
