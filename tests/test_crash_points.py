"""The chunk store is stopped at every operation on the disk and on the index, once for each kind of loss.

Operations are each write, fsync, preallocation, truncation, rename, unlink, folder fsync, and each write
batch of the index. What is lost: nothing but the process; or the power, and with it any part of what was
not synced, in any order, while the index keeps what it has, falls back to its last synced batch, or is gone.

One rule for all: after the restart what was acknowledged is there, identical; what was deleted stays away,
also when the index is made anew; the figures are those of the files.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from rocksdict import Checkpoint, WriteBatch

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
from vstack.node.index import Index
from vstack.node.store import ChunkStore

LIMIT = 30_000
"""Bytes of a superblock here: a handful of pieces."""

LOSSES = ("process", "power, index kept", "power, index older", "power, index lost")


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: these tests lose power in earnest, not on the real disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


class Run(NamedTuple):
    """One life of a store that ends at some operation."""

    folder: Path
    ledger: Ledger
    disk: CrashingDisk


def compact(store: ChunkStore) -> None:
    while store.compaction.step():
        pass
    assert not store.compaction.failed


def put_delete_seal_compact(run: Run) -> None:
    """Two processes' worth of everything a store does."""
    ledger = run.ledger
    store = open_store(run.folder, run.disk, superblock_bytes=LIMIT)
    with ending(store):
        ledger.put(store, [piece_of(1, b"a" * 3000)])
        ledger.put(store, [piece_of(n, bytes([n]) * 7000) for n in range(2, 7)])
        ledger.delete(store, [key_of(1), key_of(5)])
        compact(store)
        ledger.put(store, [piece_of(8), piece_of(9, b""), piece_of(10, b"x" * 20_000)])
        ledger.put(store, [piece_of(1, b"again" * 100)])
        store.close()
    store = open_store(run.folder, run.disk, superblock_bytes=LIMIT)
    with ending(store):
        ledger.delete(store, [key_of(1), key_of(2), key_of(10)])
        compact(store)
        ledger.put(store, [piece_of(n, bytes([n]) * 6000) for n in range(11, 16)])
        ledger.delete(store, [key_of(11), key_of(12), key_of(3)])
        compact(store)
        store.close()


def give_the_latest_back(run: Run) -> None:
    """The space of a superblock that still takes records comes back: with what lives in it, with nothing
    in it, and after an end that left it sealed."""
    ledger = run.ledger
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vstack.node.compaction.RENEW_BYTES", 5000)
        store = open_store(run.folder, run.disk, superblock_bytes=1 << 20)
        with ending(store):
            ledger.put(store, [piece_of(n, bytes([n]) * 4000) for n in range(1, 6)])
            ledger.delete(store, [key_of(2), key_of(4)])
            compact(store)
            ledger.put(store, [piece_of(6, b"after")])
            ledger.delete(store, [key_of(1), key_of(3), key_of(5), key_of(6)])
            compact(store)
            store.close()
        store = open_store(run.folder, run.disk, superblock_bytes=1 << 20)
        with ending(store):
            ledger.put(store, [piece_of(2, b"again"), piece_of(7, b"x" * 9000)])
            ledger.delete(store, [key_of(7)])
        abandon(store)
        store = open_store(run.folder, run.disk, superblock_bytes=1 << 20)
        with ending(store):
            compact(store)
            ledger.put(store, [piece_of(8)])
            store.close()


def nothing(run: Run) -> None:
    """The store begins empty."""


def lose_an_index(run: Run) -> None:
    """Leaves superblocks in every state, and no index."""
    store = open_store(run.folder, superblock_bytes=LIMIT)
    run.ledger.put(store, [piece_of(n, bytes([n]) * 6000) for n in range(1, 40)])
    run.ledger.delete(store, [key_of(n) for n in (1, 2, 7)])
    abandon(store)
    store = open_store(run.folder, superblock_bytes=LIMIT)
    run.ledger.put(store, [piece_of(50)])
    compact(store)
    run.ledger.delete(store, [key_of(50), key_of(4)])
    abandon(store)
    shutil.rmtree(run.folder / "index")


def rebuild(run: Run) -> None:
    """From hints, and by scanning where there are none."""
    open_store(run.folder, run.disk, superblock_bytes=LIMIT).close()


Work = Callable[[Run], None]


class ending:
    """Lets go of the store's descriptors if the process stops inside the block."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            abandon(self._store)


def stop_at_index_writes(patch: pytest.MonkeyPatch, run: Run) -> None:
    """Makes each batch of the index an operation, and keeps a copy of the index as it was last synced."""
    real = Index.write

    def write(self: Index, batch: WriteBatch, *, sync: bool) -> None:
        if run.disk.boundary():
            raise Crash
        real(self, batch, sync=sync)
        if sync:
            shutil.rmtree(run.folder / "synced", ignore_errors=True)
            Checkpoint(self._db).create_checkpoint(str(run.folder / "synced"))

    patch.setattr(Index, "write", write)


def lives(before: Work, work: Work, folder: Path, loss: str) -> Iterator[tuple[int, Run]]:
    """Runs the work up to its first operation, its second, and so on, with the loss after each."""
    step = 1
    while True:
        run = Run(folder / str(step), Ledger(), CrashingDisk(step))
        before(run)
        with pytest.MonkeyPatch.context() as patch:
            stop_at_index_writes(patch, run)
            try:
                work(run)
            except Crash:
                pass
            else:
                return
        lose(run, random.Random(step), loss)
        yield step, run
        shutil.rmtree(run.folder)
        step += 1


def lose(run: Run, rng: random.Random, loss: str) -> None:
    """What goes with the process, or with the power."""
    if loss != "process":
        run.disk.lose_power(rng)
    if loss in ("power, index older", "power, index lost"):
        shutil.rmtree(run.folder / "index", ignore_errors=True)
    if loss == "power, index older" and (run.folder / "synced").exists():
        (run.folder / "synced").rename(run.folder / "index")


def check(run: Run) -> None:
    """After a restart; after compaction; after another restart; and with an index made anew.

    The index is not thrown away for what a crash can do to it: that start would be a slow one.
    """
    had_index = (run.folder / "index").exists()
    store = open_store(run.folder, superblock_bytes=LIMIT)
    assert not (had_index and store.stats().start.rebuilt)
    run.ledger.check(store, run.folder)
    compact(store)
    run.ledger.check(store, run.folder)
    store.close()
    shutil.rmtree(run.folder / "index")
    store = open_store(run.folder, superblock_bytes=LIMIT)
    run.ledger.check(store, run.folder)
    store.close()
    store = open_store(run.folder, superblock_bytes=LIMIT)
    assert store.stats().start[:4] == (0, 0, 0, False)
    store.close()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("before", "work", "least"),
    [
        (nothing, put_delete_seal_compact, 100),
        (nothing, give_the_latest_back, 60),
        (lose_an_index, rebuild, 20),
    ],
)
def test_stopped_at_any_point_the_store_keeps_what_it_acknowledged(
    quick: Path, before: Work, work: Work, least: int, loss: str
) -> None:
    points = 0
    for step, run in lives(before, work, quick, loss):
        try:
            check(run)
        except BaseException:
            print(f"stopped at operation {step} of {work.__name__}; lost: {loss}")
            raise
        points = step
    print(f"{work.__name__}, {loss}: {points} points")
    assert points >= least


def test_a_removal_finished_at_start_is_durable_before_its_tombstones_go(quick: Path) -> None:
    """A superblock that came back after its tombstones were dropped would bring deleted pieces back."""

    class StopsAtUnlink(CrashingDisk):
        def unlink(self, path: Path) -> None:
            raise Crash

    for seed in range(6):
        folder, ledger = quick / str(seed), Ledger()
        store = open_store(folder, StopsAtUnlink(0), superblock_bytes=LIMIT)
        ledger.put(store, [piece_of(n, bytes([n]) * 7000) for n in range(1, 5)])
        ledger.delete(store, [key_of(1), key_of(2)])
        with pytest.raises(Crash):
            compact(store)
        abandon(store)
        disk = ForgetfulDisk()
        store = open_store(folder, disk, superblock_bytes=LIMIT)
        assert store.stats().tombstones == 0
        abandon(store)
        disk.lose_power(random.Random(seed))
        store = open_store(folder, superblock_bytes=LIMIT)
        ledger.check(store, folder)
        store.close()


@pytest.mark.parametrize("seed", range(12))
def test_many_lives_with_an_end_at_random_lose_nothing(quick: Path, seed: int) -> None:
    """Each life begins with what the one before left: crashes, lost power and lost indexes add up."""
    rng = random.Random(seed)
    folder, ledger = quick / "store", Ledger()
    ends = 0
    for life in range(12):
        run = Run(folder, ledger, CrashingDisk(rng.randint(5, 60)))
        with pytest.MonkeyPatch.context() as patch:
            stop_at_index_writes(patch, run)
            try:
                live_at_random(run, rng, 1000 * life)
            except Crash:
                ends += 1
        lose(run, rng, rng.choice(LOSSES))
        store = open_store(folder, superblock_bytes=LIMIT)
        ledger.check(store, folder)
        ledger.settle(store)
        store.close()
    assert ends > 2
    assert len(ledger.deleted) > 5


def live_at_random(run: Run, rng: random.Random, number: int) -> None:
    """Some operations in no order, the last a clean stop."""
    ledger = run.ledger
    store = open_store(run.folder, run.disk, superblock_bytes=LIMIT)
    with ending(store):
        for _ in range(rng.randint(1, 25)):
            match rng.choice(("put", "put", "delete", "delete", "again", "compact", "scrub")):
                case "put":
                    ledger.put(store, [piece_of(number + n) for n in range(rng.randint(1, 6))])
                    number += 6
                case "delete" if ledger.stored:
                    held = sorted(ledger.stored)
                    ledger.delete(store, rng.sample(held, rng.randint(1, min(5, len(held)))))
                case "again" if ledger.deleted:
                    key = rng.choice(sorted(ledger.deleted))
                    ledger.put(store, [piece_of(key.generation.counter)])
                case "compact":
                    compact(store)
                case "scrub":
                    store.scrub.run()
                    assert store.quarantined() == []
        store.close()


def test_a_swap_that_forgets_to_sync_the_copies_is_caught(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that the test above can fail: here nothing but headers is ever synced."""
    real = CrashingDisk.sync

    def sync(self: CrashingDisk, fd: int) -> None:
        if self.size(fd) <= 4096:
            real(self, fd)

    monkeypatch.setattr(CrashingDisk, "sync", sync)

    def find_out() -> None:
        for _, run in lives(nothing, put_delete_seal_compact, quick, "power, index lost"):
            check(run)

    with pytest.raises(AssertionError):
        find_out()
