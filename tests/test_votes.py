"""The vote store on real files: what it acknowledged it has, or it refuses to speak."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from rocksdict import DbClosedError

from vstack.errors import DamagedData
from vstack.mesh.config import Config, Member, mesh_id
from vstack.mesh.messages import Ballot, Record, Value
from vstack.node.rocklog import BLOCK, damaged_header
from vstack.node.votes import SCAN_BYTES, VoteStore

NODE = "a" * 32
ROOT = Path(__file__).parents[1]
HEADER = 7
"""Bytes of the header of a record in RocksDB's logs: checksum, length, type."""
COUNT = 40


def key_of(number: int) -> str:
    return f"video/{number:064x}"


def record_of(number: int, size: int = 100) -> Record:
    ballot = Ballot(1, number + 1, NODE, 1)
    return Record(ballot, ballot, Value(number + 1, Random(number).randbytes(size)))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., VoteStore]]:
    """Opens stores, and closes those that the test did not."""
    stores: list[VoteStore] = []

    def open_(folder: Path = tmp_path / "votes") -> VoteStore:
        stores.append(VoteStore(folder))
        return stores[-1]

    yield open_
    for store in stores:
        with suppress(DbClosedError):
            store.close()


# -- identity, boots, the chain -------------------------------------------------------------------


def test_the_identity_survives_and_the_boot_rises_with_each_start(opened: Callable[..., VoteStore]) -> None:
    first = opened()
    node, boot = first.node, first.boot
    assert len(node) == 32
    assert int(node, 16) >= 0
    assert boot == 1
    first.close()
    for expected in (2, 3, 4):
        store = opened()
        assert (store.node, store.boot) == (node, expected)
        store.close()


def test_a_boot_is_on_disk_before_the_store_is_used(tmp_path: Path) -> None:
    """A process that is killed right after its start has spent its boot."""
    boots = [_run_child(tmp_path / "votes", 0).boot for _ in range(3)]
    assert boots == [1, 2, 3]


def test_two_stores_never_get_one_identity(opened: Callable[..., VoteStore], tmp_path: Path) -> None:
    assert len({opened(tmp_path / str(i)).node for i in range(5)}) == 5


def test_a_lower_boot_of_a_known_node_is_refused_also_after_a_restart(
    opened: Callable[..., VoteStore],
) -> None:
    store = opened()
    assert store.meet(NODE, 3, b"one")
    assert store.meet(NODE, 3, b"one")
    assert not store.meet(NODE, 3, b"another"), "a copy beside the original"
    assert store.meet(NODE, 300, b"one")
    assert not store.meet(NODE, 299, b"one")
    assert store.meet("b" * 32, 1, b"one")
    store.close()
    store = opened()
    assert not store.meet(NODE, 299, b"one")
    assert store.meet(NODE, 300, b"one")
    assert store.meet("b" * 32, 1, b"one")


def test_the_chain_comes_back_in_order_and_names_the_mesh(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    assert store.chain() == ()
    assert store.mesh == ""
    members = (Member(store.node, "127.0.0.1:7400", "z", 3),)
    configs = [Config(epoch, members, base=1) for epoch in range(1, 12)]
    for config in reversed(configs):
        store.save_config(config)
    store.commit({key_of(1): record_of(1)})
    store.close()
    store = opened()
    assert store.chain() == tuple(configs)
    assert store.mesh == mesh_id(configs[0])


# -- records and listings -------------------------------------------------------------------------


def test_records_come_back_whole_and_others_are_absent(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    large = record_of(7, 4096)
    store.commit({key_of(1): record_of(1), key_of(7): large})
    store.commit({key_of(1): record_of(2)})
    for again in (store, None):
        if again is None:
            store.close()
            again = opened()
        assert again.lookup(key_of(1)) == record_of(2)
        assert again.lookup(key_of(7)) == large
        assert again.lookup(key_of(3)) is None
        assert again.lookup("video/") is None


def test_a_scan_walks_its_prefix_in_pages_and_nothing_beside_it(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    store.save_config(Config(1, (Member(NODE, "a:1"),), 1))
    chunks = {f"chunk/{'a' * 64}/1.5/{i:08d}": record_of(i) for i in range(25)}
    others = {
        f"chunk/{'a' * 64}/1.6/00000000": record_of(1),
        key_of(1): record_of(1),
        "views/x/1": record_of(1),
    }
    store.commit({**others, **dict(reversed(chunks.items()))})
    prefix = f"chunk/{'a' * 64}/1.5/"
    for limit in (1, 7, 24, 25, 1000):
        found: list[str] = []
        after, more = "", True
        while more:
            rows, more = store.scan(prefix, after, limit)
            assert len(rows) <= limit
            assert all(row.value == chunks[row.key].value for row in rows)
            assert all(row.accepted == chunks[row.key].accepted for row in rows)
            found += [row.key for row in rows]
            after = found[-1]
        assert found == sorted(chunks)
    assert store.scan(prefix, sorted(chunks)[-1], 10) == ([], False)
    assert store.scan("video/", "", 10)[0][0].key == key_of(1)
    assert store.scan("video/", "views/", 10) == ([], False)


def test_a_page_ends_at_its_bound_of_bytes_and_says_that_more_follows(
    opened: Callable[..., VoteStore],
) -> None:
    store = opened()
    store.commit({key_of(i): record_of(i, 4000) for i in range(200)})
    rows, more = store.scan("video/", "", 1000)
    assert more
    assert SCAN_BYTES // 4200 <= len(rows) <= SCAN_BYTES // 4000 + 2
    rest, more = store.scan("video/", rows[-1].key, 1000)
    while more:
        page, more = store.scan("video/", rest[-1].key, 1000)
        rest += page
    assert [row.key for row in [*rows, *rest]] == [key_of(i) for i in range(200)]


# -- processes that die or meet -------------------------------------------------------------------

_CHILD = """
import sys
from pathlib import Path
from tests.test_votes import key_of, record_of
from vstack.node.votes import VoteStore
store = VoteStore(Path(sys.argv[1]))
print(store.boot, flush=True)
for number in range(1_000_000):
    store.commit({key_of(number): record_of(number)})
    print(number, flush=True)
"""


class Child(NamedTuple):
    boot: int
    acknowledged: int
    """Records 0..acknowledged-1 were acknowledged before the kill."""


def _run_child(folder: Path, commits: int) -> Child:
    """A process that commits and is killed with SIGKILL after it has acknowledged `commits`."""
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    with child, child.stdout as out:
        boot = int(out.readline())
        last = -1
        while last + 1 < commits:
            last = int(out.readline())
        child.kill()
        for line in out:  # acknowledged between our last look and the kill
            if line.endswith(b"\n"):
                last = int(line)
    return Child(boot, last + 1)


def test_every_acknowledged_record_survives_a_kill(tmp_path: Path, opened: Callable[..., VoteStore]) -> None:
    for commits in (1, 50, 300):
        child = _run_child(tmp_path / "votes", commits)
        assert child.acknowledged >= commits
        store = opened(tmp_path / "votes")
        assert all(store.lookup(key_of(i)) == record_of(i) for i in range(child.acknowledged))
        store.close()


def test_a_second_process_cannot_open_the_store(opened: Callable[..., VoteStore], tmp_path: Path) -> None:
    store = opened()
    store.commit({key_of(1): record_of(1)})
    second = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "votes")],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
    )
    assert second.returncode == 1
    assert second.stdout == ""
    assert "DamagedData" in second.stderr
    store.commit({key_of(2): record_of(2)})
    boot = store.boot
    store.close()
    store = opened()
    assert store.boot == boot + 1, "the refused process spent no boot"
    assert store.lookup(key_of(2)) == record_of(2)


# -- damage (bug B18) -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a process that was killed after some commits: all of them are in the log."""
    folder = tmp_path_factory.mktemp("killed") / "votes"
    assert _run_child(folder, COUNT).acknowledged >= COUNT
    return folder


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose records are in a sorted table, several blocks long."""
    folder = tmp_path_factory.mktemp("settled") / "votes"
    for last in (False, True):
        store = VoteStore(folder)  # recovery writes the log of the start before into a table
        if not last:
            store.save_config(Config(1, (Member(store.node, "a:1"),), 1))
            store.commit({key_of(i): record_of(i, 1000) for i in range(COUNT)})
        store.close()
    assert list(folder.glob("*.sst"))
    return folder


def _damaged(folder: Path, to: Path, name: str, change: Callable[[bytearray], object]) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    raw = bytearray((to / name).read_bytes())
    change(raw)
    (to / name).write_bytes(raw)
    return to


def _flip(offset: int, bit: int) -> Callable[[bytearray], None]:
    def flip(raw: bytearray) -> None:
        raw[offset] ^= 1 << bit

    return flip


def _what_is_lost(folder: Path, size: int) -> set[str]:
    """Opens and reads everything: a subset of "open", "lookup" and "scan", where it said DamagedData.
    Fails if anything else than what was committed comes out."""
    said: set[str] = set()
    try:
        store = VoteStore(folder)
    except DamagedData:
        return {"open"}
    try:
        for i in range(COUNT):
            try:
                assert store.lookup(key_of(i)) == record_of(i, size), f"record {i} is not what was committed"
            except DamagedData:
                said.add("lookup")
        try:
            rows, more = store.scan("video/", "", 1000)
            keys = [row.key for row in rows]
            assert keys[:COUNT] == [key_of(i) for i in range(COUNT)], "a listing skips records"
            assert not more
        except DamagedData:
            said.add("scan")
    finally:
        store.close()
    return said


def _log_records(raw: bytes) -> list[tuple[int, int]]:
    """Offset and payload length of each record of a log of less than one block."""
    at, found = 0, []
    while at + HEADER <= len(raw):
        length = int.from_bytes(raw[at + 4 : at + 6], "little")
        found.append((at, length))
        at += HEADER + length
    assert at == len(raw) < BLOCK
    return found


def test_a_flipped_bit_in_the_log_never_loses_a_record_in_silence(killed: Path, tmp_path: Path) -> None:
    (log,) = killed.glob("*.log")
    rng = Random(18)
    for trial in range(30):
        offset, bit = rng.randrange(log.stat().st_size), rng.randrange(8)
        copy = _damaged(killed, tmp_path / "copy", log.name, _flip(offset, bit))
        assert _what_is_lost(copy, 100), f"trial {trial}: bit {bit} of byte {offset}"


def test_a_flipped_bit_in_the_length_of_a_log_record_is_not_taken_for_a_torn_tail(
    killed: Path, tmp_path: Path
) -> None:
    """RocksDB drops such a record and all after it without a word."""
    (log,) = killed.glob("*.log")
    records = _log_records(log.read_bytes())
    for number in (0, 1, len(records) // 2, len(records) - 2, len(records) - 1):
        for bit in (0, 6, 7):
            copy = _damaged(killed, tmp_path / "copy", log.name, _flip(records[number][0] + 5, bit))
            assert _what_is_lost(copy, 100) == {"open"}, f"record {number}, bit {bit}"


def test_a_flipped_bit_anywhere_in_a_log_header_is_noticed(killed: Path, tmp_path: Path) -> None:
    (log,) = killed.glob("*.log")
    at = _log_records(log.read_bytes())[20][0]
    for offset in range(at, at + HEADER):
        for bit in (2, 5):
            copy = _damaged(killed, tmp_path / "copy", log.name, _flip(offset, bit))
            assert _what_is_lost(copy, 100) == {"open"}, f"byte {offset - at}, bit {bit}"


def test_a_torn_tail_opens_and_only_the_record_that_was_never_acknowledged_is_gone(
    killed: Path, tmp_path: Path
) -> None:
    (log,) = killed.glob("*.log")
    raw = log.read_bytes()
    last, _ = _log_records(raw)[-1]
    whole = _run_and_count(killed, tmp_path)
    for size in (1, HEADER - 1, HEADER, HEADER + 1, (len(raw) - last) // 2, len(raw) - last - 1):
        copy = _damaged(killed, tmp_path / "copy", log.name, _cut(last + size))
        assert _run_and_count(copy, tmp_path) == whole - 1, f"torn after {size} bytes of the last record"


def _cut(end: int) -> Callable[[bytearray], None]:
    def cut(raw: bytearray) -> None:
        del raw[end:]

    return cut


def _run_and_count(folder: Path, tmp_path: Path) -> int:
    """How many records a copy of this store has; they must be the first so many."""
    shutil.rmtree(tmp_path / "counted", ignore_errors=True)
    store = VoteStore(shutil.copytree(folder, tmp_path / "counted"))
    rows, more = store.scan("video/", "", 1000)
    store.close()
    assert not more
    assert [row.key for row in rows] == [key_of(i) for i in range(len(rows))]
    return len(rows)


def test_a_record_torn_in_the_middle_of_noise_is_a_torn_tail_and_a_lengthened_one_is_not(
    killed: Path,
) -> None:
    (log,) = killed.glob("*.log")
    raw = log.read_bytes()
    assert damaged_header(raw) is None
    assert damaged_header(b"") is None
    records = _log_records(raw)
    for at, length in records:
        longer = bytearray(raw)
        longer[at + 4 : at + 6] = (length + 30_000).to_bytes(2, "little")
        assert damaged_header(bytes(longer)) == at
        assert damaged_header(bytes(longer[: at + HEADER + length])) == at
        assert damaged_header(bytes(longer[: at + HEADER + length - 1])) is None


def test_a_flipped_bit_in_a_table_is_damage_on_opening_or_reading_never_an_absent_record(
    settled: Path, tmp_path: Path
) -> None:
    tables = sorted(settled.glob("*.sst"), key=lambda p: p.stat().st_size)
    assert tables[-1].stat().st_size > 20_000, "the records are in here"
    rng = Random(5)
    said: set[str] = set()
    for trial in range(30):
        offset, bit = rng.randrange(tables[-1].stat().st_size), rng.randrange(8)
        copy = _damaged(settled, tmp_path / "copy", tables[-1].name, _flip(offset, bit))
        said |= _what_is_lost(copy, 1000)
        assert not trial or said, "some bit of thirty must matter"
    assert said >= {"lookup", "scan"}


def test_a_damaged_manifest_never_loses_a_table_in_silence(settled: Path, tmp_path: Path) -> None:
    (manifest,) = settled.glob("MANIFEST-*")
    for number, (at, _) in enumerate(_log_records(manifest.read_bytes())):
        for offset, bit in ((5, 7), (5, 0), (0, 3), (HEADER + 1, 2)):
            if at + offset < manifest.stat().st_size:
                copy = _damaged(settled, tmp_path / "copy", manifest.name, _flip(at + offset, bit))
                assert _what_is_lost(copy, 1000) == {"open"}, f"record {number}, byte {offset}, bit {bit}"


def test_a_row_that_does_not_fit_its_checksum_is_damage_for_lookup_and_listing(
    opened: Callable[..., VoteStore],
) -> None:
    """What RocksDB itself would hand out without a complaint."""
    store = opened()
    store.commit({key_of(i): record_of(i) for i in range(3)})
    raw = store._db.get(b"r/" + key_of(1).encode())
    assert isinstance(raw, bytes)
    for wrong in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:3], b"", raw[:4]):
        store._db.put(b"r/" + key_of(1).encode(), wrong)
        with pytest.raises(DamagedData, match=key_of(1)):
            store.lookup(key_of(1))
        with pytest.raises(DamagedData):
            store.scan("video/", "", 10)
    store._db.put(b"r/" + key_of(1).encode(), store._db.get(b"r/" + key_of(2).encode()) or b"")
    with pytest.raises(DamagedData):  # a whole record under another key
        store.lookup(key_of(1))
    assert store.lookup(key_of(2)) == record_of(2)
    assert len(store.scan("video/", key_of(1), 10)[0]) == 1


def test_votes_without_an_identity_are_not_given_a_new_one(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    store.commit({key_of(1): record_of(1)})
    store._db.delete(b"m/identity")
    store.close()
    with pytest.raises(DamagedData, match="must not vote"):
        opened()
