"""The scrub finds what rots, quarantine keeps it away from readers, and the inventory says so."""

from __future__ import annotations

import errno
import random
import shutil
import time
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
from vstack.errors import DamagedData
from vstack.mesh.registers import PieceKey
from vstack.node.scrub import DONE, PIECES, Place, is_due
from vstack.node.store import ChunkStore, Holding, PieceNotFound
from vstack.node.superblock import RECORD_HEADER_BYTES
from vstack.node.upkeep import Upkeep


def scrub_all(store: ChunkStore) -> None:
    """Finishes the round that is under way, or does one."""
    rounds = store.scrub.place.rounds
    while store.scrub.place.rounds == rounds:
        store.scrub.run()


def flip_bit(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def place(store: ChunkStore, folder: Path, key: PieceKey) -> tuple[Path, int, int]:
    """(file, offset of the record, length of the payload)."""
    row = store._index.piece(key.pack())
    assert row is not None
    return folder / "superblocks" / f"{row.superblock:010d}.vsb", row.offset, row.length


def rot(store: ChunkStore, folder: Path, key: PieceKey, rng: random.Random) -> None:
    """One bit of the record, anywhere in it."""
    path, offset, length = place(store, folder, key)
    flip_bit(path, offset + rng.randrange(RECORD_HEADER_BYTES + length), rng.randrange(8))


# Bit rot


@pytest.mark.parametrize("seed", range(5))
def test_every_flipped_bit_is_found_and_nothing_else_is_accused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = open_store(tmp_path, superblock_bytes=300_000)
    pieces = [piece_of(n, rng.randbytes(rng.randrange(8000))) for n in range(300)]
    store.put(pieces)
    bad = sorted(rng.sample([piece.key for piece in pieces], 40))
    for key in bad:
        rot(store, tmp_path, key, rng)
    scrub_all(store)
    assert [info.key for info in store.quarantined()] == bad
    assert store.scrub.report[:1] + store.scrub.report[2:] == (260, 40, 0)
    assert {info.key for info in store.list(limit=1000)} == {p.key for p in pieces} - set(bad)
    for key in bad:
        with pytest.raises(DamagedData):
            store.read(key)
    store.close()


def test_quarantine_survives_a_restart_and_ends_when_the_piece_is_written_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 3000) for n in range(5)]
    store.put(pieces)
    rot(store, tmp_path, key_of(3), random.Random(1))
    scrub_all(store)
    abandon(store)
    store = open_store(tmp_path)
    assert [info.key for info in store.quarantined()] == [key_of(3)]
    assert store.stats().quarantined == 1
    with pytest.raises(DamagedData, match="quarantine"):
        store.read(key_of(3))
    assert outcomes(store, [piece_of(3, b"other bytes")]) == ["refused"]
    assert outcomes(store, [pieces[3]]) == ["stored"]
    assert store.quarantined() == []
    assert store.read(key_of(3)).payload == pieces[3].payload
    store.close()
    store = open_store(tmp_path)
    assert store.quarantined() == []
    assert len(store.list()) == 5
    store.close()


def test_a_quarantined_piece_that_is_deleted_does_not_come_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 1000) for n in range(2)])
    path, offset, _ = place(store, tmp_path, key_of(0))
    flip_bit(path, offset + RECORD_HEADER_BYTES + 5, 0)
    scrub_all(store)
    store.delete([key_of(0)])
    assert store.quarantined() == []
    store.close()
    flip_bit(path, offset + RECORD_HEADER_BYTES + 5, 0)  # what is rotten may read well another day
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    assert [info.key for info in store.list()] == [key_of(1)]
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_a_rotten_tombstone_is_written_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 1000) for n in range(2)])
    store.delete([key_of(0)])
    store.put([piece_of(2)])
    row = store._index.tombstone(key_of(0).pack())
    assert row is not None
    (path,) = superblocks(tmp_path)
    flip_bit(path, row.offset + 30, 3)
    scrub_all(store)
    assert store.scrub.report.damaged == 1
    store.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    with pytest.raises(PieceNotFound):
        store.read(key_of(0))
    store.close()


def test_a_rebuild_from_hints_forgets_quarantine_and_the_next_scrub_finds_it_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=20_000)
    store.put([piece_of(n, bytes([n]) * 5000) for n in range(10)])
    rot_at = place(store, tmp_path, key_of(0))
    flip_bit(rot_at[0], rot_at[1] + RECORD_HEADER_BYTES + 100, 0)
    scrub_all(store)
    store.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path, superblock_bytes=20_000)
    assert store.quarantined() == []
    assert store.scrub.place == Place()
    scrub_all(store)
    assert [info.key for info in store.quarantined()] == [key_of(0)]
    store.close()


# Errors


def test_one_reading_error_does_not_give_up_a_piece_and_three_in_a_row_do(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    store.put([piece_of(1, b"the last good copy")])

    def fail_once() -> None:
        disk.errors["read"] = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            store.read(key_of(1))
        disk.errors.clear()

    fail_once()
    fail_once()
    assert store.read(key_of(1)).payload == b"the last good copy"
    fail_once()
    fail_once()
    assert store.quarantined() == []
    fail_once()
    assert [info.key for info in store.quarantined()] == [key_of(1)]
    store.close()


def test_a_superblock_that_cannot_be_read_repeatedly_takes_no_more_pieces(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    store.put([piece_of(n, b"x" * 100) for n in range(5)])
    disk.errors["read"] = errno.EIO
    for number in range(3):
        with pytest.raises(OSError, match="Input/output"):
            store.read(key_of(number))
    disk.errors.clear()
    assert outcomes(store, [piece_of(9)]) == ["stored"]
    assert len(superblocks(tmp_path)) == 2
    assert len(store.list()) == 6
    assert figures(store.stats()) == recount(tmp_path)
    store.close()


def test_the_scrub_counts_errors_and_goes_on(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    store.put([piece_of(n, b"x" * 100) for n in range(5)])
    disk.errors["read"] = errno.EIO
    scrub_all(store)
    disk.errors.clear()
    assert store.scrub.report.errors == 5
    assert store.quarantined() == []
    scrub_all(store)
    assert store.scrub.report.pieces == 5
    store.close()


def test_a_disk_that_fails_again_and_again_is_only_read_until_the_next_start(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    store.put([piece_of(0)])
    disk.errors["sync"] = errno.EIO
    for number in range(1, 4):
        assert outcomes(store, [piece_of(number)]) == ["failed"]
    disk.errors.clear()
    assert store.stats().read_only
    assert outcomes(store, [piece_of(5)]) == ["failed"]
    assert store.read(key_of(0)).payload == piece_of(0).payload
    store.close()
    store = open_store(tmp_path)
    assert not store.stats().read_only
    assert outcomes(store, [piece_of(5)]) == ["stored"]
    store.close()


def test_a_success_between_failures_keeps_the_store_writable(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    for number in range(0, 8, 2):
        disk.errors["sync"] = errno.EIO
        assert outcomes(store, [piece_of(number)]) == ["failed"]
        disk.errors.clear()
        assert outcomes(store, [piece_of(number + 1)]) == ["stored"]
    assert not store.stats().read_only
    store.close()


# Pace


def test_a_round_is_spread_over_the_period_and_done_by_its_end(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, node=NODE, scrub_days=1000 / 86400)
    store.put([piece_of(n, bytes(50_000)) for n in range(400)])
    read = []
    for _ in range(1000):
        read.append(store.scrub.step(1.0))
        if store.scrub.place.phase == DONE:
            break
    assert store.scrub.report.pieces == 400
    assert len(read) > 700  # not all at once
    while store.scrub.place.phase == DONE:
        assert store.scrub.place.seconds <= 1001
        store.scrub.step(1.0)
    assert store.scrub.place.rounds == 1
    store.close()


def test_a_round_that_lags_is_due_and_one_that_leads_is_not() -> None:
    assert is_due(Place(seconds=50, verified=400), total=1000, period=100)
    assert not is_due(Place(seconds=50, verified=600), total=1000, period=100)
    assert is_due(Place(seconds=100, verified=1000), total=1000, period=100)
    assert not is_due(Place(seconds=99, phase=DONE), total=1000, period=100)
    assert is_due(Place(seconds=100, phase=DONE), total=1000, period=100)


def test_the_scrub_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 100) for n in range(500)])
    store.scrub.step(10.0)
    before = store.scrub.place
    assert before.phase == PIECES
    assert before.key
    abandon(store)
    store = open_store(tmp_path)
    assert store.scrub.place == before
    scrub_all(store)
    assert store.scrub.report.pieces == 500 - 200
    store.close()


def test_pieces_that_move_during_a_round_are_met_all_the_same(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=100_000)
    store.put([piece_of(n, random.Random(n).randbytes(1000)) for n in range(600)])
    store.scrub.run()
    store.delete([key_of(n) for n in range(600) if n % 2])
    while store.compaction.step():
        pass
    scrub_all(store)
    assert store.scrub.report.pieces == 200 + 200
    assert store.quarantined() == []
    store.close()


def test_the_upkeep_thread_compacts_and_scrubs_by_itself(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=100_000)
    pieces = [piece_of(n, random.Random(n).randbytes(20_000)) for n in range(12)]
    store.put(pieces)
    store.delete([key_of(n) for n in range(0, 12, 2)])
    rot(store, tmp_path, key_of(5), random.Random(3))
    changes: list[None] = []
    upkeep = Upkeep(store, busy=lambda: False, changed=lambda: changes.append(None))
    deadline = time.monotonic() + 60
    while not (store.quarantined() and superblocks(tmp_path)[0].stem != "0000000001"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    upkeep.close()
    assert changes
    assert [info.key for info in store.list()] == [key_of(n) for n in (1, 3, 7, 9, 11)]
    store.close()


# Inventory


def test_an_inventory_says_what_is_present_absent_and_quarantined(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 500) for n in range(4)]
    store.put(pieces)
    store.delete([key_of(1)])
    rot(store, tmp_path, key_of(2), random.Random(7))
    keys = [key_of(n) for n in (0, 1, 2, 3, 99)]
    by_index = store.inventory(keys)
    assert [h.state for h in by_index] == ["present", "absent", "present", "present", "absent"]
    assert not any(h.verified for h in by_index)
    assert store.inventory(keys, verify=True) == [
        Holding(key_of(0), "present", pieces[0].sha256, True),
        Holding(key_of(1), "absent"),
        Holding(key_of(2), "quarantined", pieces[2].sha256),
        Holding(key_of(3), "present", pieces[3].sha256, True),
        Holding(key_of(99), "absent"),
    ]
    store.close()


def test_a_piece_whose_row_and_header_are_both_gone_is_absent_in_the_inventory(tmp_path: Path) -> None:
    """A scrub cannot see it: nothing says that it was ever here."""
    store = open_store(tmp_path)
    store.put([piece_of(n, bytes([n]) * 500) for n in range(3)])
    path, offset, _ = place(store, tmp_path, key_of(1))
    store.close()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(RECORD_HEADER_BYTES))
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path)
    scrub_all(store)
    assert store.quarantined() == []
    assert [h.state for h in store.inventory([key_of(n) for n in range(3)])] == [
        "present",
        "absent",
        "present",
    ]
    store.close()
