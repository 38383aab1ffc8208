"""What is left of the chunk store when it stops in the middle: killed, out of power, at each step.

One rule for all: what was acknowledged is there, identical; what was not is there whole or not at all; the
figures are those of the files; and the start after the next scans nothing.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store_helpers import (
    Crash,
    CrashingDisk,
    ForgetfulDisk,
    Ledger,
    abandon,
    key_of,
    open_store,
    piece_of,
)
from vstack.node.disk import Disk
from vstack.node.store import ChunkStore, Piece
from vstack.node.superblock import FILE_HEADER_BYTES

LIMIT = 30_000
"""Bytes of a superblock here: a handful of pieces."""


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests lose power in earnest, not on the real disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def recover(ledger: Ledger, folder: Path) -> None:
    """Opens, checks, closes; and once more, when there must be nothing left to do."""
    store = open_store(folder, superblock_bytes=LIMIT)
    ledger.check(store, folder)
    store.close()
    store = open_store(folder, superblock_bytes=LIMIT)
    assert store.stats().start[:4] == (0, 0, 0, False)
    ledger.check(store, folder)
    store.close()


def work(ledger: Ledger, store: ChunkStore) -> None:
    """Puts, a batch that spans superblocks, deletes."""
    ledger.put(store, [piece_of(1, b"a" * 3000)])
    ledger.put(store, [piece_of(n, bytes([n]) * 9000) for n in range(2, 7)])
    ledger.delete(store, [key_of(1), key_of(5)])
    ledger.put(store, [piece_of(8), piece_of(9, b"")])
    store.close()


def crash_at(step: int, ledger: Ledger, folder: Path) -> int | None:
    """Works until the operation number `step`, and stops there. None if all was done before."""
    disk = CrashingDisk(step)
    store = None
    try:
        store = open_store(folder, disk, superblock_bytes=LIMIT)
        work(ledger, store)
    except Crash:
        if store is not None:
            abandon(store)
        return disk.operations
    return None


def test_stopped_at_any_operation_the_store_keeps_what_it_acknowledged(quick: Path) -> None:
    step = 1
    while True:
        folder, ledger = quick / str(step), Ledger()
        if crash_at(step, ledger, folder) is None:
            break
        recover(ledger, folder)
        shutil.rmtree(folder)
        step += 1
    assert step > 25  # there were that many operations to stop at


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_stopped_again_during_recovery_the_store_recovers_all_the_same(quick: Path, index: str) -> None:
    crashes = 0
    for first in range(5, 40, 4):
        for second in range(1, 12):
            folder, ledger = quick / f"{first}-{second}", Ledger()
            if crash_at(first, ledger, folder) is None:
                break
            if index == "lost":
                shutil.rmtree(folder / "index", ignore_errors=True)
            try:
                open_store(folder, CrashingDisk(second), superblock_bytes=LIMIT).close()
            except Crash:
                crashes += 1
                recover(ledger, folder)
            else:
                recover(ledger, folder)
                break
    assert crashes > 5


@pytest.mark.parametrize("seed", range(25))
def test_a_power_loss_takes_only_what_was_not_acknowledged(quick: Path, seed: int) -> None:
    """Any sector and any name that was not synced may be lost, and any end of the index."""
    rng = random.Random(seed)
    ledger, folder = Ledger(), quick / "store"
    number = 0
    for _ in range(3):
        disk = ForgetfulDisk()
        store = open_store(folder, disk, superblock_bytes=LIMIT)
        ledger.check(store, folder)
        shutil.rmtree(quick / "older", ignore_errors=True)
        for _ in range(rng.randrange(8)):
            if rng.random() < 0.4:
                shutil.rmtree(quick / "older", ignore_errors=True)
                shutil.copytree(folder / "index", quick / "older")
            if ledger.stored and rng.random() < 0.3:
                ledger.delete(store, rng.sample(sorted(ledger.stored), min(2, len(ledger.stored))))
            else:
                ledger.put(store, fresh_pieces(rng, number))
                number += 5
        crash_before_sync(disk, store, ledger, fresh_pieces(rng, number))
        number += 5
        abandon(store)
        disk.lose_power(rng)
        fate = rng.choice(("kept", "older", "lost"))
        if fate != "kept":
            shutil.rmtree(folder / "index")
        if fate == "older" and (quick / "older").exists():
            shutil.copytree(quick / "older", folder / "index")
        recover(ledger, folder)


def fresh_pieces(rng: random.Random, first: int) -> list[Piece]:
    """One to five pieces, numbered from `first`."""
    return [piece_of(first + n, rng.randbytes(rng.randrange(9000))) for n in range(rng.randint(1, 5))]


def crash_before_sync(disk: Disk, store: ChunkStore, ledger: Ledger, pieces: list[Piece]) -> None:
    """A put whose records are written and never synced: the power fails first."""
    real = disk.sync

    def crash(fd: int) -> None:
        if disk.size(fd) > FILE_HEADER_BYTES:
            raise Crash
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "sync", crash)
        with pytest.raises(Crash):
            ledger.put(store, pieces)


CHILD = """
import random, sys
from pathlib import Path
from tests.store_helpers import key_of, open_store, piece_of

folder, first, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
store = open_store(folder, superblock_bytes=3 << 20)
print("opened", flush=True)
stored = []
for number in range(first, first + 1_000_000, 4):
    if stored and rng.random() < 0.3:
        gone = stored.pop(rng.randrange(len(stored)))
        print("deleting", gone, flush=True)
        store.delete([key_of(gone)])
        print("deleted", gone, flush=True)
    batch = list(range(number, number + rng.randint(1, 4)))
    print("putting", *batch, flush=True)
    results = store.put([piece_of(n, random.Random(n).randbytes(n * 7919 % 200_000)) for n in batch])
    assert all(result.outcome == "stored" for result in results)
    print("stored", *batch, flush=True)
    stored += batch
"""


def kill_a_child(folder: Path, first: int, seed: int, lines: int) -> list[list[str]]:
    """What a process that stores and deletes said until it was killed, after about `lines` lines."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(first), str(seed)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        text=True,
    )
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(lines)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.readlines()
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    return [line.split() for line in said if line.endswith("\n")]


def test_killed_in_the_middle_of_puts_everything_acknowledged_is_there(tmp_path: Path) -> None:
    """Ten lives of one store, each begun by the recovery from the kill before."""
    ledger = Ledger()
    first = 0
    for seed in range(10):
        said = kill_a_child(tmp_path, first, seed, random.Random(seed).randint(2, 40))
        assert said[0] == ["opened"]
        for verb, *rest in said[1:]:
            for number in map(int, rest):
                first = max(first, number + 4)
                piece = piece_of(number, random.Random(number).randbytes(number * 7919 % 200_000))
                if verb == "putting":
                    ledger.unknown[piece.key] = piece
                elif verb == "stored":
                    ledger.stored[piece.key] = ledger.unknown.pop(piece.key)
                elif verb == "deleting":
                    ledger.unknown[piece.key] = ledger.stored.pop(piece.key)
                else:
                    del ledger.unknown[piece.key]
                    ledger.deleted.add(piece.key)
        if seed % 3 == 2:
            recover(ledger, tmp_path)
    recover(ledger, tmp_path)
    assert len(ledger.stored) > 50
    assert ledger.deleted
