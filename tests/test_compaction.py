"""Compaction: the space of dead records comes back, and nothing else changes."""

from __future__ import annotations

import errno
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import running_mesh, with_client
from tests.kept import content, eventually, put, set_policy
from tests.store_helpers import (
    Crash,
    FailingDisk,
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
from vstack.client.catalogue import delete_video
from vstack.errors import DamagedData, VstackError
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import PieceKey
from vstack.node.disk import Disk
from vstack.node.hints import read_hints
from vstack.node.scan import Found
from vstack.node.store import ChunkStore, Piece, PieceNotFound, Purpose
from vstack.node.superblock import FILE_HEADER_BYTES, RECORD_HEADER_BYTES

LIMIT = 100_000


def big(number: int) -> Piece:
    return piece_of(number, random.Random(number).randbytes(20_000))


def contents(store: ChunkStore) -> dict[PieceKey, bytes]:
    return {info.key: store.read(info.key).payload for info in store.list(limit=1 << 20)}


def compact(store: ChunkStore) -> None:
    while store.compaction.step():
        pass


def numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in superblocks(folder)]


def reopened_without_index(folder: Path, store: ChunkStore) -> ChunkStore:
    store.close()
    shutil.rmtree(folder / "index")
    return open_store(folder, superblock_bytes=LIMIT)


def place(store: ChunkStore, folder: Path, key: PieceKey) -> tuple[Path, int]:
    row = store._index.piece(key.pack())
    assert row is not None
    return folder / "superblocks" / f"{row.superblock:010d}.vsb", row.offset


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


class FirstFails(Disk):
    """Superblock 1 cannot be synced."""

    def sync(self, fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().stem == "0000000001":
            raise OSError(errno.EIO, "Input/output error")
        super().sync(fd)


def test_dead_space_comes_back_and_what_lives_is_unchanged(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(40)])
    before = store.stats()
    store.delete([key_of(n) for n in range(40) if n % 2])
    sequences = {info.key: info.sequence for info in store.list()}
    compact(store)
    after = store.stats()
    assert after.file_bytes < 0.7 * before.file_bytes
    assert contents(store) == {key_of(n): big(n).payload for n in range(0, 40, 2)}
    assert {info.key: info.sequence for info in store.list()} == sequences
    assert figures(after) == recount(tmp_path)
    assert store.compaction.step() == 0
    store = reopened_without_index(tmp_path, store)
    assert contents(store) == {key_of(n): big(n).payload for n in range(0, 40, 2)}
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_superblock_is_left_alone_until_a_quarter_of_it_is_dead(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=220_000)
    store.put([big(n) for n in range(12)])
    store.delete([key_of(0), key_of(1)])
    assert store.compaction.candidate() is None
    store.delete([key_of(2)])
    assert store.compaction.candidate() == 1
    store.close()


def test_the_latest_superblock_is_never_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(0)])
    store.delete([key_of(0)])
    abandon(store)
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    compact(store)
    assert numbers(tmp_path) == [1]
    store.put([big(1)])
    compact(store)
    assert numbers(tmp_path) == [2]
    assert contents(store) == {key_of(1): big(1).payload}
    store.close()


# The latest superblock


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much less than in earnest is worth a new superblock."""
    monkeypatch.setattr("vstack.node.compaction.RENEW_BYTES", 50_000)


@pytest.mark.usefixtures("small")
def test_the_space_of_the_latest_superblock_comes_back_too(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=10 << 20)
    store.put([big(n) for n in range(10)])
    before = store.stats()
    store.delete([key_of(n) for n in range(0, 10, 2)])
    compact(store)
    after = store.stats()
    assert numbers(tmp_path) == [2]
    assert contents(store) == {key_of(n): big(n).payload for n in range(1, 10, 2)}
    written = sum(store.superblock_sizes().values())
    assert written == after.file_bytes - after.preallocated_bytes < 0.55 * before.file_bytes
    assert figures(after) == recount(tmp_path)
    assert store.compaction.step() == 0
    store = reopened_without_index(tmp_path, store)
    assert contents(store) == {key_of(n): big(n).payload for n in range(1, 10, 2)}
    store.close()


@pytest.mark.usefixtures("small")
def test_when_all_of_the_latest_superblock_is_dead_a_header_is_left(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=10 << 20)
    store.put([big(n) for n in range(10)])
    store.delete([key_of(n) for n in range(10)])
    sequence = store._index.next_sequence
    compact(store)
    assert numbers(tmp_path) == [2]
    assert store.stats().file_bytes == FILE_HEADER_BYTES
    assert store.stats().tombstones == 0
    store = reopened_without_index(tmp_path, store)
    assert store._index.next_sequence == sequence, "no sequence number is given twice"
    assert store.list() == []
    assert outcomes(store, [big(1)]) == ["stored"]
    store.close()


def test_a_little_dead_space_is_no_reason_for_a_new_superblock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, superblock_bytes=10 << 20)
    store.put([big(n) for n in range(20)])
    store.delete([key_of(0), key_of(1)])
    compact(store)
    assert numbers(tmp_path) == [1], "64 MiB are not dead"
    monkeypatch.setattr("vstack.node.compaction.RENEW_BYTES", 20_000)
    compact(store)
    assert numbers(tmp_path) == [1], "nor is a quarter"
    store.delete([key_of(n) for n in range(2, 6)])
    compact(store)
    assert numbers(tmp_path) == [2]
    store.close()


@pytest.mark.usefixtures("small")
def test_a_sealed_superblock_that_is_the_latest_is_compacted_too(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=10 << 20)
    store.put([big(n) for n in range(10)])
    store.delete([key_of(n) for n in range(5)])
    abandon(store)
    store = open_store(tmp_path, superblock_bytes=10 << 20)
    compact(store)
    assert numbers(tmp_path) == [2]
    assert contents(store) == {key_of(n): big(n).payload for n in range(5, 10)}
    store.close()


@pytest.mark.usefixtures("small")
def test_no_superblock_is_removed_when_the_one_after_it_could_not_be_made(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk, superblock_bytes=10 << 20)
    store.put([big(n) for n in range(10)])
    store.delete([key_of(n) for n in range(10)])
    disk.errors["sync_folder"] = errno.ENOSPC
    compact(store)
    compact(store)
    assert numbers(tmp_path) == [1]
    assert outcomes(store, [big(20)]) == ["full"]
    compact(store)
    assert numbers(tmp_path) == [1], "its header alone says where the sequence numbers go on"
    disk.errors.clear()
    compact(store)
    assert len(numbers(tmp_path)) == 1
    assert numbers(tmp_path) != [1]
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


@pytest.mark.usefixtures("small")
def test_what_was_given_back_is_what_the_files_have_become_smaller_by(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(40)])
    store.delete([key_of(n) for n in range(40) if n % 3])
    before = store.superblock_sizes()
    dead = store.stats().dead_bytes
    compact(store)
    after = store.superblock_sizes()
    smaller = sum(before.values()) - sum(after.values())
    headers = FILE_HEADER_BYTES * len(after.keys() - before.keys())
    hints = 3 * 160 * 100  # at most three times for each of less than a hundred records
    assert 0 <= store.compaction.reclaimed - smaller <= headers + hints
    assert store.compaction.reclaimed > 0.8 * dead
    store.close()


# Tombstones


def test_a_tombstone_goes_with_the_last_older_record_of_its_key(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(5)])
    store.delete([key_of(n) for n in range(4)])
    assert store.stats().tombstones == 4
    compact(store)
    assert store.stats().tombstones == 0
    assert figures(store.stats()) == recount(tmp_path)
    store = reopened_without_index(tmp_path, store)
    assert set(contents(store)) == {key_of(4)}
    assert store.stats().tombstones == 0
    store.close()


def test_a_tombstone_outlives_the_compaction_of_its_own_superblock(tmp_path: Path) -> None:
    """The piece that it keeps down lies elsewhere still."""
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(4)])  # superblock 1 stays: little of it is dead
    store.put([big(n) for n in range(10, 13)])
    store.delete([key_of(0)])
    store.put([big(13), big(14)])
    store.delete([key_of(n) for n in range(10, 13)])
    tombstone = store._index.tombstone(key_of(0).pack())
    assert tombstone is not None
    store.compaction.failed.add(1)
    compact(store)
    assert tombstone.superblock not in numbers(tmp_path)
    assert 1 in numbers(tmp_path)
    store = reopened_without_index(tmp_path, store)
    with pytest.raises(PieceNotFound):
        store.read(key_of(0))
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_deleted_piece_that_was_copied_twice_does_not_come_back(tmp_path: Path) -> None:
    """Its tombstone must wait for every superblock that a copy has passed through."""
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    rng = random.Random(5)
    alive: dict[PieceKey, Piece] = {}
    for number in range(0, 120, 4):
        batch = [big(n) for n in range(number, number + 4)]
        store.put(batch)
        alive |= {piece.key: piece for piece in batch}
        gone = rng.sample(sorted(alive), min(len(alive) - 1, rng.randint(1, 5)))
        store.delete(gone)
        for key in gone:
            del alive[key]
        if number % 12 == 0:
            compact(store)
        if number % 20 == 0:
            store = reopened_without_index(tmp_path, store)
        assert set(contents(store)) == set(alive)
        assert figures(store.stats()) == recount(tmp_path)
    assert numbers(tmp_path)[0] > 5
    store.close()


def test_no_tombstone_goes_while_a_superblock_holds_something_unknown(tmp_path: Path) -> None:
    """What a failed write left may be the very piece that was deleted later."""
    disk = FailingDisk()
    store = open_store(tmp_path, disk, superblock_bytes=LIMIT)
    store.put([big(0)])
    disk.errors["sync"] = errno.EIO
    assert outcomes(store, [big(1)]) == ["failed"]  # whole on disk, and not indexed
    disk.errors.clear()
    store.put([big(n) for n in range(1, 7)])
    store.delete([key_of(n) for n in range(1, 7)])
    store.compaction.failed.add(1)
    kept = [big(n) for n in range(20, 26)]
    store.put(kept)
    compact(store)
    assert numbers(tmp_path)[0] == 1
    assert numbers(tmp_path)[1] > 3  # the deleted pieces are gone, and what told of the delete was copied
    store = reopened_without_index(tmp_path, store)
    assert set(contents(store)) == {key_of(0), *(piece.key for piece in kept)}
    store.close()


def test_a_tombstone_learns_of_an_older_record_that_could_not_be_read_before_it(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(4)])
    store.put([big(n) for n in range(4, 7)])
    store.delete([key_of(0), *(key_of(n) for n in range(4, 7))])
    store.put([big(n) for n in range(7, 10)])
    store.close()
    shutil.rmtree(tmp_path / "index")

    store = open_store(tmp_path, FirstFails(), superblock_bytes=LIMIT)
    assert store.stats().read_only_superblocks == 1
    store.close()
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.compaction.failed.add(1)
    compact(store)
    assert numbers(tmp_path)[:2] == [1, 3]
    store = reopened_without_index(tmp_path, store)
    assert set(contents(store)) == {key_of(n) for n in (1, 2, 3, 7, 8, 9)}
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_retired_superblock_is_evacuated(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk, superblock_bytes=LIMIT)
    store.put([big(0)])
    disk.errors["sync"] = errno.EIO
    store.put([big(1)])
    disk.errors.clear()
    store.put([big(2)])
    store.delete([key_of(2)])
    assert store.stats().tombstones == 1
    store.put([big(n) for n in range(3, 9)])
    compact(store)
    assert 1 not in numbers(tmp_path)
    assert store.stats().read_only_superblocks == 0
    assert set(contents(store)) == {key_of(0), *(key_of(n) for n in range(3, 9))}
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


# What happens meanwhile


def between_copy_and_switch(store: ChunkStore, act: Callable[[], None]) -> None:
    """Compacts, and does something after a piece was read and before its row is switched."""
    done: list[bool] = []
    lock = store._lock

    class Watched:
        """The store's lock: the first time that compaction takes it to switch, something came before."""

        def __enter__(self) -> None:
            if not done:
                done.append(True)
                act()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    store.compaction._lock = Watched()  # type: ignore[assignment]
    compact(store)
    assert done


def test_a_delete_between_copy_and_switch_is_honoured(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.delete([key_of(0), key_of(1)])
    between_copy_and_switch(store, lambda: store.delete([key_of(2)]))
    assert set(contents(store)) == {key_of(n) for n in range(3, 6)}
    assert numbers(tmp_path)[0] > 1
    assert figures(store.stats()) == recount(tmp_path)
    store = reopened_without_index(tmp_path, store)
    assert set(contents(store)) == {key_of(n) for n in range(3, 6)}
    store.close()


def test_a_piece_deleted_and_stored_anew_between_copy_and_switch_is_the_new_one(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.delete([key_of(0), key_of(1)])

    def replace() -> None:
        store.delete([key_of(2)])
        store.put([piece_of(2, b"new")])

    between_copy_and_switch(store, replace)
    assert store.read(key_of(2)).payload == b"new"
    assert figures(store.stats()) == recount(tmp_path)
    store = reopened_without_index(tmp_path, store)
    assert store.read(key_of(2)).payload == b"new"
    store.close()


def test_a_swap_that_is_stopped_half_way_is_undone_or_done(tmp_path: Path) -> None:
    """Both copies are on disk: one of them counts, and nothing is lost with either."""
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.delete([key_of(0), key_of(1)])

    def stop(*_: object, **__: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vstack.node.log.Update.commit", stop)
        with pytest.raises(Crash):
            compact(store)
    abandon(store)
    assert numbers(tmp_path)[0] == 1
    for index in ("kept", "lost"):
        if index == "lost":
            shutil.rmtree(tmp_path / "index")
        store = open_store(tmp_path, superblock_bytes=LIMIT)
        assert contents(store) == {key_of(n): big(n).payload for n in range(2, 6)}
        assert figures(store.stats()) == recount(tmp_path)
        store.close()


def test_readers_go_on_while_pieces_move(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    kept = [big(n) for n in range(0, 60, 3)]
    stop = threading.Event()
    problems: list[BaseException] = []
    store.put(kept)

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                piece = rng.choice(kept)
                assert store.read(piece.key).payload == piece.payload
        except (AssertionError, VstackError, OSError, LookupError) as error:
            problems.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    for round_ in range(8):
        batch = [big(1000 * round_ + 1000 + n) for n in range(20)]
        store.put(batch)
        store.delete([piece.key for piece in batch])
        compact(store)
        assert time.monotonic() < deadline
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


# A failing disk


def test_an_error_while_reading_ends_the_compaction_and_loses_nothing(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.delete([key_of(0), key_of(1)])
    assert store.compaction.step() > 0
    disk.errors["read"] = errno.EIO
    compact(store)
    disk.errors.clear()
    assert store.compaction.failed == {1}
    assert numbers(tmp_path)[0] == 1
    assert contents(store) == {key_of(n): big(n).payload for n in range(2, 6)}
    assert store.quarantined() == []
    store.close()
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    compact(store)
    assert numbers(tmp_path)[0] > 1
    assert contents(store) == {key_of(n): big(n).payload for n in range(2, 6)}
    store.close()


@pytest.mark.parametrize("where", ["payload", "header"])
def test_a_damaged_piece_is_left_behind_in_quarantine(tmp_path: Path, where: str) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.delete([key_of(0), key_of(1)])
    path, offset = place(store, tmp_path, key_of(2))
    flip(path, offset + (RECORD_HEADER_BYTES + 77 if where == "payload" else 20))
    compact(store)
    assert not path.exists()
    assert [info.key for info in store.quarantined()] == [key_of(2)]
    with pytest.raises(DamagedData, match="quarantine"):
        store.read(key_of(2))
    assert store.inventory([key_of(2)])[0].state == "quarantined"
    assert set(contents(store)) == {key_of(n) for n in range(3, 6)}
    assert outcomes(store, [big(2)]) == ["stored"]
    assert store.quarantined() == []
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_piece_that_could_not_be_read_at_a_rebuild_is_not_thrown_away(tmp_path: Path) -> None:
    """An error while scanning looks like damage; compaction reads again before it gives anything up."""
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(3)])
    path, offset = place(store, tmp_path, key_of(1))
    abandon(store)
    shutil.rmtree(tmp_path / "index")

    class Flaky(Disk):
        broken = True

        def read(self, fd: int, at: int, length: int) -> bytes:
            if self.broken and at < offset + 9000 and at + length > offset + 5000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(fd, at, length)

    disk = Flaky()
    store = open_store(tmp_path, disk, superblock_bytes=LIMIT)
    assert set(contents(store)) == {key_of(0), key_of(2)}
    store.put([big(9)])
    store.delete([key_of(0)])
    compact(store)
    assert path.exists()
    disk.broken = False
    store.compaction.failed.clear()
    compact(store)
    assert not path.exists()
    assert contents(store)[key_of(1)] == big(1).payload
    store.close()


def test_a_superblock_is_not_unlinked_while_a_row_points_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the list of its records, for whatever reason, lacks one."""
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.delete([key_of(0), key_of(1)])

    def forgetful(disk: Disk, fd: int, salt: bytes) -> list[Found] | None:
        known = read_hints(disk, fd, salt)
        return known and [found for found in known if found.record.key != key_of(3).pack()]

    monkeypatch.setattr("vstack.node.compaction.read_hints", forgetful)
    monkeypatch.setattr("vstack.node.compaction.Compaction._missed", lambda *_: [])
    compact(store)
    assert numbers(tmp_path)[0] == 1
    assert contents(store) == {key_of(n): big(n).payload for n in range(2, 6)}
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


@pytest.mark.parametrize("what", ["piece", "tombstone"])
def test_damaged_headers_do_not_keep_a_superblock_that_has_no_hints(tmp_path: Path, what: str) -> None:
    """A scan meets neither the piece nor the tombstone; the index knows of both."""
    store = open_store(tmp_path)
    store.put([big(n) for n in range(8)])
    abandon(store)
    store = open_store(tmp_path)
    store.put([big(n) for n in range(10, 14)])
    store.delete([key_of(0)])
    tombstone = store._index.tombstone(key_of(0).pack())
    assert tombstone is not None
    abandon(store)  # no hints: both are sealed as they are
    store = open_store(tmp_path)
    store.put([big(20)])
    second, offset = place(store, tmp_path, key_of(12))
    flip(second, (offset if what == "piece" else tombstone.offset) + 20)
    store.delete([key_of(10), key_of(11)])
    compact(store)
    assert not second.exists()
    assert superblocks(tmp_path)[0].stem == "0000000001", "the piece that was deleted lies here still"
    lost = [key_of(12)] if what == "piece" else []
    assert [info.key for info in store.quarantined()] == lost
    alive = {key_of(n) for n in (*range(1, 8), 12, 13, 20)} - set(lost)
    assert set(contents(store)) == alive
    store = reopened_without_index(tmp_path, store)
    assert set(contents(store)) == alive
    store.close()


def test_a_superblock_that_was_not_indexed_to_its_end_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(7)])
    store.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path, FirstFails(), superblock_bytes=LIMIT)
    assert set(contents(store)) == {key_of(n) for n in range(4, 7)}
    compact(store)
    store.close()
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    assert set(contents(store)) == {key_of(n) for n in range(7)}
    store.close()


def test_a_superblock_without_a_readable_header_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    store.put([big(n) for n in range(6)])
    store.close()
    with superblocks(tmp_path)[0].open("r+b") as file:
        file.write(bytes(4096))
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path, superblock_bytes=LIMIT)
    compact(store)
    assert numbers(tmp_path)[0] == 1
    store.close()


# A full disk


def test_a_compaction_that_finds_no_room_is_tried_again_when_there_is_some(tmp_path: Path) -> None:
    disk = SmallDisk(2 << 20)
    store = ChunkStore(tmp_path, node="00" * 16, superblock_bytes=100_000, reserve=0.05, disk=disk)
    store.put([big(n) for n in range(12)])
    store.delete([key_of(n) for n in range(0, 12, 2)])
    free, disk.free = disk.free, 0
    compact(store)
    assert store.compaction.stuck
    assert numbers(tmp_path)[0] == 1
    disk.free = free
    compact(store)
    assert not store.compaction.stuck
    assert numbers(tmp_path)[0] > 1
    assert set(contents(store)) == {key_of(n) for n in range(1, 12, 2)}
    store.close()


def test_uploads_stop_first_then_repair_then_demotion_and_compaction_makes_room(tmp_path: Path) -> None:
    disk = SmallDisk(2 << 20)  # of 20 MiB: the reserve is one MiB
    store = ChunkStore(tmp_path, node="00" * 16, superblock_bytes=64 << 10, reserve=0.05, disk=disk)
    left: dict[Purpose, int] = {}
    number = 0
    for purpose in (Purpose.UPLOAD, Purpose.REPAIR, Purpose.DEMOTION):
        while store.put([piece_of(number, bytes(10_000))], purpose=purpose)[0].outcome == "stored":
            number += 1
        left[purpose] = disk.free
    assert left[Purpose.UPLOAD] >= 1 << 20
    assert 512 << 10 < left[Purpose.REPAIR] < left[Purpose.UPLOAD]
    assert 64 << 10 < left[Purpose.DEMOTION] < left[Purpose.REPAIR]
    store.delete([key_of(n) for n in range(0, number, 2)])
    compact(store)
    assert disk.free > left[Purpose.DEMOTION]
    assert len(store.list(limit=1000)) == number // 2
    assert figures(store.stats()) == recount(tmp_path)
    store.delete([info.key for info in store.list(limit=1000)])
    compact(store)
    assert outcomes(store, [piece_of(9999, bytes(10_000))]) == ["stored"]
    store.close()


def test_a_node_that_stores_little_gives_the_space_of_a_deleted_video_back(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh)
        kept, data = await put(mesh, tmp_path, 20 << 20)
        gone, _ = await put(mesh, tmp_path, 80 << 20)
        (member,) = mesh.members
        before = (await mesh.status(member.node)).store
        assert before["file_bytes"] > 100 << 20
        await delete_video(mesh, gone)

        async def is_given_back() -> bool:
            now = (await mesh.status(member.node)).store
            return now["file_bytes"] - now["preallocated_bytes"] < 22 << 20

        await eventually(is_given_back)
        now = (await mesh.status(member.node)).store
        assert now["reclaimed_bytes"] > 80 << 20
        assert now["compacted_bytes"] > 100 << 20
        assert now["payload_bytes"] == len(data)
        assert await content(mesh, kept, tmp_path) == data

    with running_mesh(tmp_path / "mesh", 1) as mesh:
        with_client(mesh, work)
