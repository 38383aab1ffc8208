"""The vote store on real files: what it acknowledged it has, or it refuses to speak."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from vstack.mesh.config import Config, Member, mesh_id
from vstack.mesh.messages import Ballot, Record, Value
from vstack.node.votes import FLUSH_BYTES, SCAN_BYTES, VoteStore

NODE = "a" * 32
ROOT = Path(__file__).parents[1]


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
    store.adopt([configs[0]])
    store.adopt(configs[5:0:-1])
    store.adopt(configs)
    assert store.chain() == tuple(configs)
    store.commit({key_of(1): record_of(1)})
    store.close()
    store = opened()
    assert store.chain() == tuple(configs)
    assert store.mesh == mesh_id(configs[0])


def test_a_configuration_that_does_not_continue_the_chain_is_not_stored(
    opened: Callable[..., VoteStore],
) -> None:
    store = opened()
    first, other = Config(1, (Member(NODE, "a:1"),), 1), Config(1, (Member(NODE, "b:1"),), 1)
    store.adopt([first])
    store.commit({key_of(1): record_of(1)})
    for wrong in (Config(3, (), 1), other, Config(0, (), 0)):
        with pytest.raises(ValueError, match="does not continue"):
            store.adopt([wrong], drop=["f" * 63 + "1"])
    store.close()
    store = opened()
    assert store.chain() == (first,)
    assert store.lookup(key_of(1)) == record_of(1)


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
    store.adopt([Config(1, (Member(NODE, "a:1"),), 1)])
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


def registers_of(video: str, chunks: int) -> dict[str, Record]:
    keys = [f"chunk/{video}/1.{upload}/{i:08d}" for upload in (5, 6) for i in range(chunks)]
    keys += [f"video/{video}", f"views/{video}/7", f"views/{video}/8"]
    return {key: record_of(number) for number, key in enumerate(keys)}


def test_the_registers_of_a_dropped_video_are_forgotten_and_no_others(
    opened: Callable[..., VoteStore],
) -> None:
    """Neighbours in order and ids that begin alike stay."""
    store = opened()
    gone, kept = ["5" * 64, "7" * 64, "12"], ["4" * 64, "5" * 63 + "6", "6" * 64, "1", "120", "12."]
    for video in gone + kept:
        store.commit(registers_of(video, 3))
    store.commit({"config/1": record_of(1)})
    config = Config(1, (Member(store.node, "a:1"),), 1)
    store.adopt([config], drop=[*gone, "9" * 64])
    for again in (store, None):
        if again is None:
            store.close()
            again = opened()
        held = sorted(key for video in kept for key in registers_of(video, 3))
        assert again.keys("", 1000) == sorted([*held, "config/1"])
        assert all(again.lookup(k) == r for video in kept for k, r in registers_of(video, 3).items())
        assert all(again.lookup(k) is None for video in gone for k in registers_of(video, 3))
        assert sorted(again.subjects()) == sorted(kept)
        assert again.chain() == (config,)
        store = again
    store.commit(registers_of("12", 1))
    assert store.lookup("video/12") == registers_of("12", 1)["video/12"], "it may come back"


def test_only_whole_videos_are_dropped(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    store.commit(registers_of("a", 1))
    for wrong in ("", "a/1.5", "/"):
        with pytest.raises(ValueError, match="not the id of a video"):
            store.adopt([], drop=["a", wrong])
    assert sorted(store.keys("", 10)) == sorted(registers_of("a", 1))


def test_a_video_is_a_subject_once_whichever_of_its_registers_are_here(
    opened: Callable[..., VoteStore],
) -> None:
    store = opened()
    assert list(store.subjects()) == []
    store.commit({"config/1": record_of(0)})
    for video in ("a", "b", "ab"):
        store.commit(registers_of(video, 40))
    store.commit({"chunk/c/1.1/00000000": record_of(1), "views/d/1": record_of(2), "video/e": record_of(3)})
    store.commit({"chunk/f/1.1/00000000": record_of(1), "views/f/1": record_of(2)})
    assert sorted(store.subjects()) == ["a", "ab", "b", "c", "d", "e", "f"]


def test_subjects_are_those_at_the_first_step(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    for video in ("a", "b", "c"):
        store.commit(registers_of(video, 2))
    subjects = store.subjects()
    first = next(subjects)
    store.commit(registers_of("d", 2))
    store.adopt([], drop=["b"])
    assert sorted([first, *subjects]) == ["a", "b", "c"]


def test_keys_are_walked_in_order_page_by_page(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    store.adopt([Config(1, (Member(NODE, "a:1"),), 1)])
    assert store.keys("", 5) == []
    records = {**registers_of("a", 10), **registers_of("b", 10), "config/1": record_of(0)}
    store.commit(records)
    for limit in (1, 7, len(records), 1000):
        found: list[str] = []
        while page := store.keys(found[-1] if found else "", limit):
            assert len(page) <= limit
            found += page
        assert found == sorted(records)
    assert store.keys("chunk/b", 1) == ["chunk/b/1.5/00000000"]


def test_records_survive_that_no_log_holds_any_more(opened: Callable[..., VoteStore]) -> None:
    store = opened()
    size = 4000
    count = 2 * FLUSH_BYTES // size + 100
    for first in range(0, count, 100):
        store.commit({key_of(i): record_of(i, size) for i in range(first, first + 100)})
    log = max((store.folder / "rocks").glob("*.log"))
    assert log.stat().st_size < FLUSH_BYTES
    assert len(list((store.folder / "rocks").glob("*.sst"))) >= 2
    for again in (store, None):
        if again is None:
            store.close()
            again = opened()
        assert all(again.lookup(key_of(i)) == record_of(i, size) for i in range(count))


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
    assert "VotesUnavailable" in second.stderr, "another time it may open"
    store.commit({key_of(2): record_of(2)})
    boot = store.boot
    store.close()
    store = opened()
    assert store.boot == boot + 1, "the refused process spent no boot"
    assert store.lookup(key_of(2)) == record_of(2)


def test_whether_any_record_lies_between_two_keys_counts_both_ends(opened: Callable[..., VoteStore]) -> None:
    votes = opened()
    assert not votes.any_between(key_of(0), key_of(99))
    votes.commit({key_of(10): record_of(10), key_of(30): record_of(30)})
    assert votes.any_between(key_of(10), key_of(10))
    assert votes.any_between(key_of(5), key_of(10))
    assert votes.any_between(key_of(10), key_of(15))
    assert votes.any_between(key_of(5), key_of(15))
    assert not votes.any_between(key_of(11), key_of(29))
    assert not votes.any_between(key_of(31), key_of(99))
