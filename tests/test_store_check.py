"""`vstack-node --check` and `--rebuild-index`: what they say, how they end, that a check changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store_helpers import abandon, key_of, open_store, piece_of, superblocks
from vstack.errors import DamagedData, UsageError
from vstack.node.check import check
from vstack.node.disk import Disk
from vstack.node.store import ChunkStore
from vstack.node.superblock import RECORD_HEADER_BYTES, superblock_path


def fill(folder: Path, *, clean: bool = True) -> None:
    store = open_store(folder, superblock_bytes=100_000)
    store.put([piece_of(n, bytes([n]) * 9000) for n in range(40)])
    store.delete([key_of(n) for n in range(0, 40, 8)])
    if clean:
        store.close()
    else:
        abandon(store)


def content(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def place_of(store: ChunkStore, folder: Path, number: int) -> tuple[Path, int]:
    row = store._index.piece(key_of(number).pack())
    assert row is not None
    return superblock_path(folder / "superblocks", row.superblock), row.offset


@pytest.mark.parametrize("clean", [True, False])
def test_a_sound_store_is_found_sound_and_nothing_is_changed(tmp_path: Path, clean: bool) -> None:
    fill(tmp_path, clean=clean)
    before = content(tmp_path)
    report = check(tmp_path)
    assert content(tmp_path) == before
    assert report.problems == []
    assert (report.pieces, report.payload_bytes) == (35, 35 * 9000)
    assert report.index == "agrees with the superblocks"
    assert report.superblocks == len(superblocks(tmp_path))
    assert report.without_hints == 1


def test_damage_is_named_and_the_index_is_not_blamed_for_it(tmp_path: Path) -> None:
    fill(tmp_path)
    flip(superblocks(tmp_path)[1], 4096 + RECORD_HEADER_BYTES + 50)
    report = check(tmp_path)
    assert len(report.problems) == 1
    assert "superblock 2 at 4096: piece" in report.problems[0]
    assert report.pieces == 34
    assert report.index == "agrees with the superblocks"


@pytest.mark.parametrize("where", ["payload", "header"])
@pytest.mark.parametrize("fate", ["written anew", "deleted", "in quarantine"])
def test_a_damaged_record_is_damage_as_long_as_something_needs_it(
    tmp_path: Path, where: str, fate: str
) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, bytes([n]) * 9000) for n in range(10)])
    path, offset = place_of(store, tmp_path, 3)
    flip(path, offset + (RECORD_HEADER_BYTES + 50 if where == "payload" else 20))
    with pytest.raises(DamagedData):
        store.verify(key_of(3))
    if fate == "written anew":
        store.put([piece_of(3, bytes([3]) * 9000)])
    if fate == "deleted":
        store.delete([key_of(3)])
    store.close()
    report = check(tmp_path)
    assert report.index == "agrees with the superblocks"
    if fate == "in quarantine":
        assert (len(report.problems), report.dead_damage, report.quarantined) == (1, 0, 1)
    else:
        assert (report.problems, report.dead_damage, report.quarantined) == ([], 1, 0)
    shutil.rmtree(tmp_path / "index")
    report = check(tmp_path)
    needed = fate == "in quarantine" or where == "header"  # without its header, who can tell
    assert (len(report.problems), report.dead_damage) == ((1, 0) if needed else (0, 1))


def test_a_damaged_tombstone_is_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, bytes([n]) * 9000) for n in range(4)])
    store.delete([key_of(2)])
    row = store._index.tombstone(key_of(2).pack())
    assert row is not None
    store.put([piece_of(9)])
    store.close()
    flip(superblocks(tmp_path)[0], row.offset + 20)
    report = check(tmp_path)
    assert len(report.problems) == 1
    assert report.dead_damage == 0


def test_a_superblock_without_a_header_is_damage(tmp_path: Path) -> None:
    fill(tmp_path)
    with superblocks(tmp_path)[0].open("r+b") as file:
        file.write(bytes(4096))
    assert check(tmp_path).problems == ["superblock 1 at 0: its header is damaged"]


def test_an_index_that_points_elsewhere_is_found_out(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 500) for n in range(4)])
    rows = store._index._db
    first, second = (b"p" + key_of(n).pack() for n in (0, 1))
    rows[first] = rows[second]
    del rows[b"p" + key_of(2).pack()]
    store.close()
    report = check(tmp_path)
    assert len(report.problems) == 2
    assert "in 2 places" in report.index


def test_an_index_that_is_behind_or_missing_is_no_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(0)])
    shutil.copytree(tmp_path / "index", tmp_path / "older")
    store.put([piece_of(1)])
    abandon(store)
    shutil.rmtree(tmp_path / "index")
    report = check(tmp_path)
    assert report.problems == []
    assert "missing" in report.index
    (tmp_path / "older").rename(tmp_path / "index")
    report = check(tmp_path)
    assert report.problems == []
    assert "behind" in report.index


def test_a_folder_without_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pieces"):
        check(tmp_path)


def run(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vstack.node.main", "--data", str(data), *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
    )


def test_the_commands_say_what_they_found_and_end_accordingly(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "votes").mkdir(parents=True)
    fill(data / "store")
    done = run(data, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "damage         none" in done.stdout
    flip(superblocks(data / "store")[0], 4096 + RECORD_HEADER_BYTES + 50)  # a piece that was deleted
    done = run(data, "--check")
    assert done.returncode == 0
    assert "damaged, dead  1 record" in done.stdout
    assert "damage         none" in done.stdout
    flip(superblocks(data / "store")[1], 4096 + RECORD_HEADER_BYTES + 50)
    done = run(data, "--check")
    assert done.returncode == 1
    assert "superblock 2 at 4096" in done.stdout
    before = (data / "store" / "index" / "IDENTITY").read_text()
    done = run(data, "--rebuild-index")
    assert done.returncode == 0
    assert "index made anew" in done.stdout
    assert (data / "store" / "index" / "IDENTITY").read_text() != before
    store = open_store(data / "store")
    assert not store.stats().start.rebuilt
    assert len(store.list()) == 35  # hints say what was written, the scrub what has become of it
    store.close()


def test_a_running_node_is_not_checked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "votes").mkdir(parents=True)
    fill(data / "store")
    held = Disk().lock(data / "lock")
    done = run(data, "--check")
    os.close(held)
    assert done.returncode == 3
    assert "in use" in done.stderr
    assert run(tmp_path / "elsewhere", "--check").returncode == 2
    assert not (tmp_path / "elsewhere").exists()
