"""What `vstack storage` and `vstack scrub` say is what is on the disks; what the upkeep is asked for, and how
a node is told how fast to scrub and how much to keep free."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from tests.cluster import running_mesh, vstack, wait_for, with_client
from tests.store_helpers import key_of, open_store, piece_of, recount
from vstack.client.catalogue import Video
from vstack.client.storage import WHOLE, Ledger, Storage, Taken, scrub, split, storage
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import UsageError
from vstack.local import LocalMesh, LocalNode
from vstack.mesh.config import Member
from vstack.mesh.dialer import Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Status, UsageRow
from vstack.mesh.registers import (
    ERASURE,
    REPLICATED,
    ChunkEntry,
    ChunkRecord,
    InitPiece,
    PieceKey,
    Place,
    Scheme,
    UploadId,
    VideoRecord,
    VideoState,
)
from vstack.node.main import read_options, settings_from
from vstack.node.scrub import DONE
from vstack.node.scrub import Place as ScrubPlace
from vstack.node.superblock import record_size
from vstack.node.upkeep import RATE, Upkeep

VIDEOS = [f"{n:02x}" * 32 for n in range(1, 5)]
NODES = [f"{n:02x}" * 16 for n in range(0x10, 0x16)]


# What registers name, and what is there


def test_what_is_named_and_there_is_named() -> None:
    assert split(3, 300, UsageRow("v", 1, 3, 3, 300, 500)) == Taken(pieces=3, record_bytes=500)


def test_what_is_more_is_not_named_and_what_is_less_is_missing() -> None:
    more = split(2, 200, UsageRow("v", 1, 3, 3, 300, 600))
    assert more == Taken(pieces=2, record_bytes=400, not_named_pieces=1, not_named_bytes=200)
    less = split(4, 400, UsageRow("v", 1, 3, 3, 300, 600))
    assert less == Taken(pieces=3, record_bytes=600, missing_pieces=1, missing_bytes=100)
    assert split(2, 200, None) == Taken(missing_pieces=2, missing_bytes=200)
    assert split(0, 0, UsageRow("v", 1, 3, 3, 300, 600)) == Taken(not_named_pieces=3, not_named_bytes=600)


def test_no_byte_is_counted_twice_or_lost() -> None:
    rng = Random(3)
    for _ in range(500):
        pieces = rng.randint(1, 9)
        payload = rng.randint(0, 10_000)
        row = UsageRow("v", 3, 5, pieces, payload, payload + pieces * rng.randint(170, 190))
        taken = split(rng.randint(0, 12), rng.randint(0, 12_000), row)
        assert taken.on_disk == row.record_bytes
        assert taken.pieces + taken.not_named_pieces == row.pieces


def chunk(index: int, size: int, scheme: Scheme, *nodes: str) -> ChunkRecord:
    places = tuple(Place(n, 0 if scheme.k == 1 else i, bytes(32)) for i, n in enumerate(nodes))
    return ChunkRecord(ChunkEntry(index, 0, 1, size, bytes(32)), scheme, places)


def video(number: int, state: VideoState = "ready", init: InitPiece | None = None) -> Video:
    record = VideoRecord(
        state=state, title=f"film {number}", redundancy="auto", recipe="r", source_size=1, init=init
    )
    return Video(VIDEOS[number], 1, record)


def status(node: str) -> Status:
    return Status(node, "m", 1, 1, "a:1", "0", 0.0, (), {}, {}, 0, 0)


def closed(ledger: Ledger, *nodes: str, complete: bool = True) -> Storage:
    return ledger.close([(Member(n, f"{n[:2]}:1"), status(n)) for n in nodes], complete, ())


def test_each_scheme_costs_what_lies_on_the_disks_for_it() -> None:
    ledger = Ledger()
    init = InitPiece(100, bytes(32), tuple(Place(n, 0, bytes(32)) for n in NODES[:3]))
    ledger.add_video(video(0, init=init))
    ledger.add_video(video(1, "deleted"))
    ledger.add_chunk(VIDEOS[0], chunk(0, 1000, REPLICATED, *NODES[:3]))
    ledger.add_chunk(VIDEOS[1], chunk(0, 3000, ERASURE, *NODES[:5]))
    for i, node in enumerate(NODES[:5]):
        rows = [UsageRow(VIDEOS[1], 3, 5, 1, 1000, 1100)]
        if i < 3:
            rows.append(UsageRow(VIDEOS[0], 1, 3, 2, 1100, 1300))
        ledger.add_usage(node, rows)
    found = closed(ledger, *NODES[:5])
    whole, fragments = found.by_scheme[WHOLE], found.by_scheme[ERASURE]
    assert whole == Taken(chunks=2, chunk_bytes=1100, pieces=6, record_bytes=3900)
    assert fragments == Taken(chunks=1, chunk_bytes=3000, pieces=5, record_bytes=5500)
    assert found.overhead == (3900 + 5500) / 4100
    assert found.savings == 1 - found.overhead / 3
    assert [(v.state, v.taken.record_bytes) for v in found.videos] == [("ready", 3900), ("deleted", 5500)]
    assert [n.taken.record_bytes for n in found.nodes] == [2400] * 3 + [1100] * 2


def test_whole_copies_are_one_scheme_whatever_number_they_were_made_for() -> None:
    ledger = Ledger()
    ledger.add_video(video(0))
    ledger.add_chunk(VIDEOS[0], chunk(0, 50, Scheme(1, 2), *NODES[:1]))
    ledger.add_chunk(VIDEOS[0], chunk(1, 70, Scheme(1, 3), *NODES[:1]))
    ledger.add_usage(NODES[0], [UsageRow(VIDEOS[0], 1, 2, 1, 50, 60), UsageRow(VIDEOS[0], 1, 3, 1, 70, 80)])
    found = closed(ledger, NODES[0])
    assert found.by_scheme == {WHOLE: Taken(chunks=2, chunk_bytes=120, pieces=2, record_bytes=140)}


def test_pieces_of_a_video_without_a_register_are_not_named() -> None:
    ledger = Ledger()
    ledger.add_usage(NODES[0], [UsageRow(VIDEOS[0], 3, 5, 2, 50, 60)])
    found = closed(ledger, NODES[0])
    assert found.total == Taken(not_named_pieces=2, not_named_bytes=60)
    assert [(v.video, v.state) for v in found.videos] == [(VIDEOS[0], "")]
    assert found.overhead is None


def test_what_lies_on_a_silent_node_is_unseen_and_there_are_no_savings_to_boast_of() -> None:
    ledger = Ledger()
    ledger.add_video(video(0))
    ledger.add_chunk(VIDEOS[0], chunk(0, 100, REPLICATED, *NODES[:3]))
    ledger.add_usage(NODES[0], [UsageRow(VIDEOS[0], 1, 3, 1, 100, 110)])
    found = closed(ledger, NODES[0], complete=False)
    assert (found.unseen_pieces, found.total.missing_pieces) == (2, 0)
    assert (found.overhead, found.savings) == (None, None)


def test_two_places_of_one_piece_on_one_node_are_one_piece() -> None:
    ledger = Ledger()
    place = Place(NODES[0], 0, bytes(32))
    ledger.add_chunk(VIDEOS[0], ChunkRecord(ChunkEntry(0, 0, 1, 9, bytes(32)), REPLICATED, (place, place)))
    ledger.add_usage(NODES[0], [UsageRow(VIDEOS[0], 1, 3, 1, 9, 20)])
    assert closed(ledger, NODES[0]).total.missing_pieces == 0


# Asking for a round


def test_a_hastened_scrub_reads_everything_now_and_says_how_far_it_is(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 1000) for n in range(500)])
    while store.scrub.step(1.0):  # what is due of a round of seven days
        pass
    assert 0 < store.scrub.place.verified < 500_000
    upkeep = Upkeep(store, busy=lambda: False, changed=lambda: None)
    before = upkeep.figures()
    upkeep.hasten_scrub()
    assert upkeep.figures().scrub_hastened
    wait_for(lambda: not upkeep.figures().scrub_hastened)
    after = upkeep.figures()
    upkeep.close()
    assert (before.scrub_rounds, after.scrub_rounds) == (0, 1)
    assert after.scrub_pieces - before.scrub_pieces == 500, "a whole round, not what was left of the other"
    assert after.scrub_bytes - before.scrub_bytes == 500_000
    assert (after.scrub_share, after.scrub_seconds_left) == (1.0, 0.0)
    assert store.scrub.place.phase == DONE
    store.close()


def test_the_figures_of_the_store_are_told_before_the_round_counts_as_over(tmp_path: Path) -> None:
    """Else somebody who waits for its end would miss what it found last."""
    store = open_store(tmp_path)
    payloads = [bytes([n]) * 1000 for n in range(3)]
    store.put([piece_of(n, payload) for n, payload in enumerate(payloads)])
    rot(tmp_path, payloads[2])
    seen: list[tuple[int, bool]] = []
    upkeep: Upkeep | None = None

    def changed() -> None:
        assert upkeep is not None
        seen.append((store.stats().quarantined, upkeep.figures().scrub_hastened))

    upkeep = Upkeep(store, busy=lambda: False, changed=changed)
    upkeep.hasten_scrub()
    wait_for(lambda: bool(seen) and upkeep is not None and not upkeep.figures().scrub_hastened)
    upkeep.close()
    assert seen[-1] == (1, True)
    store.close()


def test_a_second_wish_joins_the_round_under_way(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 1000) for n in range(1000)])
    asked = 0
    upkeep: Upkeep | None = None

    def changed() -> None:
        nonlocal asked
        if upkeep is not None and upkeep.figures().scrub_hastened and store.scrub.place.phase != DONE:
            asked += 1
            upkeep.hasten_scrub()

    upkeep = Upkeep(store, busy=lambda: False, changed=changed)
    upkeep.hasten_scrub()
    wait_for(lambda: upkeep is not None and not upkeep.figures().scrub_hastened)
    upkeep.close()
    assert asked >= 4
    assert store.scrub.place.rounds == 1
    assert store.scrub.report.pieces == 1000
    store.close()


def test_a_scrub_of_nothing_is_soon_over(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    upkeep = Upkeep(store, busy=lambda: False, changed=lambda: None)
    upkeep.hasten_scrub()
    wait_for(lambda: upkeep.figures().scrub_rounds == 1 and not upkeep.figures().scrub_hastened)
    upkeep.close()
    store.close()


def test_the_time_left_goes_by_the_pace_so_far(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([piece_of(n, b"x" * 1000) for n in range(10)])
    place = ScrubPlace()
    store.scrub.place = place
    assert store.scrub.seconds_left(RATE, hurry=True) == 10_000 / RATE
    store.scrub.place = place._replace(seconds=8.0, verified=4_000)
    assert store.scrub.seconds_left(RATE, hurry=True) == 12.0
    assert store.scrub.share() == 0.4
    assert store.scrub.seconds_left(RATE) == 7 * 86_400 - 8
    store.scrub.place = place._replace(seconds=8.0, phase=DONE)
    assert store.scrub.seconds_left(RATE) == 0
    store.close()


def test_compaction_says_what_it_has_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path, superblock_bytes=100_000)
    store.put([piece_of(n, Random(n).randbytes(20_000)) for n in range(12)])
    first = tmp_path / "superblocks" / "0000000001.vsb"
    size = store.superblock_sizes()[1]
    store.delete([key_of(n) for n in range(0, 12, 2)])
    upkeep = Upkeep(store, busy=lambda: False, changed=lambda: None)
    wait_for(lambda: upkeep.figures().compacted_superblocks > 0)
    upkeep.close()
    told = upkeep.figures()
    assert not first.exists()
    assert told.compacted_bytes >= size
    store.close()


# Settings


def settings(*words: str) -> tuple[float, float]:
    made = settings_from(read_options(["--data", "x", *words]))
    return made.scrub_days, made.reserve


def test_the_pace_of_the_scrub_and_the_reserve_are_options_and_keys_of_the_file(tmp_path: Path) -> None:
    assert settings() == (7.0, 0.05)
    assert settings("--scrub-days", "0.5", "--reserve", "20") == (0.5, 0.2)
    file = tmp_path / "node.toml"
    file.write_text("scrub-days = 30\nreserve = 2.5\n")
    assert settings("--config", str(file)) == (30.0, 0.025)
    assert settings("--config", str(file), "--reserve", "0") == (30.0, 0.0)


@pytest.mark.parametrize(
    "words",
    ["--scrub-days 0", "--scrub-days -1", "--scrub-days nan", "--scrub-days 1e9", "--reserve 91",
     "--reserve=-1", "--reserve nan"],
)  # fmt: skip
def test_a_pace_or_reserve_beyond_reason_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match=words.split("=")[0].split()[0]):
        settings(*words.split())


@pytest.mark.parametrize("line", ['reserve = "5"', "scrub_days = true"])
def test_what_is_no_number_in_the_file_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(line)
    with pytest.raises(UsageError, match="needs a number"):
        settings("--config", str(file))


@pytest.mark.processes
def test_uploads_leave_the_reserve_free_and_demotion_may_use_more(tmp_path: Path) -> None:
    disk = shutil.disk_usage(tmp_path)
    if not 0.15 < disk.free / disk.total < 0.85:
        pytest.skip("the disk of the tests is too full, or too empty, for a reserve of 90 %")

    async def work(mesh: MeshClient) -> None:
        node = mesh.members[0].node
        p = piece_of(1, b"x" * 100)
        with pytest.raises(Refused) as refused:
            await mesh.put_piece(node, p.key, Scheme(p.k, p.m), p.chunk_length, p.sha256, p.payload)
        assert refused.value.code == "full"
        await mesh.put_piece(
            node, p.key, Scheme(p.k, p.m), p.chunk_length, p.sha256, p.payload, purpose="demotion"
        )

    with running_mesh(tmp_path, 1, ("--reserve", "90")) as mesh:
        with_client(mesh, work)


# Whole meshes


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """A mesh of five nodes that holds no pieces, or such that other tests do not mind."""
    with running_mesh(tmp_path_factory.mktemp("storage"), 5) as mesh:
        yield mesh


async def store_piece(mesh: MeshClient, node: str, number: int, payload: bytes) -> PieceKey:
    """A piece of a video that has no register: it is nobody's to repair."""
    key = PieceKey(VIDEOS[0], UploadId(1, 1), number, 0)
    await mesh.put_piece(node, key, REPLICATED, len(payload), sha256(payload).digest(), payload)
    return key


def numbers(document: dict[str, object], *names: str) -> list[int]:
    found = [document[name] for name in names]
    assert all(isinstance(n, int) for n in found), found
    return [n for n in found if isinstance(n, int)]


def rows_of(document: dict[str, object], name: str) -> list[dict[str, object]]:
    rows = document[name]
    assert isinstance(rows, list)
    return rows


@pytest.mark.processes
def test_storage_tells_the_bytes_that_are_on_the_disks(tmp_path: Path) -> None:
    """Against a recount of the files, which trusts neither the index nor the registers."""
    sizes = {"erasure": 7_000_001, "replicated": 3_000_000}
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        peers = ",".join(mesh.peers)
        for redundancy, size in sizes.items():
            path = tmp_path / f"{redundancy}.bin"
            path.write_bytes(Random(size).randbytes(size))
            assert vstack("put", path, "--opaque", "--redundancy", redundancy, peers=peers).code == 0
        done = vstack("storage", "--json", "--videos", peers=peers)
        assert done.code == 0, done
        said = done.json
        counts = [recount(node.data / "store") for node in mesh.nodes]
        plain = vstack("storage", "--videos", peers=peers)
    on_disk = sum(c.live_bytes for c in counts)
    assert numbers(said, "chunk_bytes", "on_disk_bytes", "record_bytes", "pieces") == [
        10_000_001, on_disk, on_disk, sum(c.pieces for c in counts),
    ]  # fmt: skip
    assert said["overhead"] == on_disk / 10_000_001
    assert said["savings"] == 1 - on_disk / 10_000_001 / 3
    assert (said["complete"], said["silent_nodes"]) == (True, [])
    assert numbers(said, "not_named_pieces", "missing_pieces", "unseen_pieces") == [0, 0, 0]
    schemes = {row["scheme"]: row for row in rows_of(said, "schemes")}
    assert {name: row["chunk_bytes"] for name, row in schemes.items()} == {
        "whole copies": 3_000_000,
        "3-of-5": 7_000_001,
    }
    per_node = {row["node"]: row for row in rows_of(said, "nodes")}
    for node, count in zip(mesh.nodes, counts, strict=True):
        row = per_node[node.node]
        assert numbers(row, "pieces", "live_bytes", "dead_bytes", "hint_bytes", "named_bytes") == [
            count.pieces, count.live_bytes, count.dead_bytes, count.hint_bytes, count.live_bytes,
        ]  # fmt: skip
    videos = {row["title"]: row for row in rows_of(said, "videos")}
    assert {title: row["chunk_bytes"] for title, row in videos.items()} == sizes
    assert sum(numbers(row, "record_bytes")[0] for row in videos.values()) == on_disk
    assert plain.code == 0
    for word in ("3-of-5", "whole copies", "erasure", "replicated", "less than 3 whole copies"):
        assert word in plain.out


@pytest.mark.processes
def test_pieces_that_no_register_names_have_a_row_of_their_own(shared: LocalMesh) -> None:
    async def work(client: MeshClient) -> None:
        for number in range(3):
            await store_piece(client, client.members[0].node, number, b"y" * (1000 + number))

    with_client(shared, work)
    peers = ",".join(shared.peers)
    said = vstack("storage", "--json", "--videos", peers=peers).json
    taken = sum(record_size(1000 + n) for n in range(3))
    (row,) = [row for row in rows_of(said, "videos") if row["id"] == VIDEOS[0]]
    assert row["state"] is None
    assert numbers(row, "not_named_pieces", "not_named_bytes", "chunks", "pieces") == [3, taken, 0, 0]
    assert numbers(said, "not_named_pieces", "not_named_bytes") == [3, taken]
    assert "not named" in vstack("storage", peers=peers).out


@pytest.mark.processes
def test_storage_of_a_mesh_with_a_dead_node_says_that_it_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "film.bin"
    path.write_bytes(os.urandom(3 << 20))
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        peers = ",".join(mesh.peers)
        assert vstack("put", path, "--opaque", peers=peers).code == 0
        mesh.nodes[3].kill()
        done = vstack("storage", "--json", peers=peers)
        assert done.code == 0, done
        assert done.json["complete"] is False
        assert done.json["silent_nodes"] == [mesh.nodes[3].node]
        assert done.json["overhead"] is None
        assert numbers(done.json, "unseen_pieces")[0] > 0
        assert numbers(done.json, "missing_pieces") == [0]
        plain = vstack("storage", peers=peers)
        assert "incomplete" in plain.err
        assert mesh.nodes[3].node[:8] in plain.err


@pytest.mark.processes
def test_storage_lists_many_videos_a_few_at_a_time(shared: LocalMesh, tmp_path: Path) -> None:
    async def work(client: MeshClient) -> None:
        for n in range(20):
            path = tmp_path / f"{n}.bin"
            path.write_bytes(f"{n}".encode() * 100)
            await upload(client, path, UploadOptions(opaque=True))
        under_way = most = 0
        whole = client.list

        async def counted(prefix: str) -> object:
            nonlocal under_way, most
            under_way += prefix.startswith("chunk/")
            most = max(most, under_way)
            try:
                return await whole(prefix)
            finally:
                under_way -= prefix.startswith("chunk/")

        client.list = counted  # type: ignore[method-assign, assignment]
        told: list[tuple[float, float]] = []
        found = await storage(client, lambda done, total: told.append((done, total)))
        assert 1 < most <= 8
        assert found.complete
        assert sum(v.state == "ready" for v in found.videos) == 20
        assert told[0][0] == 0
        assert told[-1] == (told[-1][1], 20 + 5)

    with_client(shared, work)


# Scrubbing a mesh


def rot(store: Path, payload: bytes) -> None:
    """One bit of that payload, on disk."""
    for path in (store / "superblocks").glob("*.vsb"):
        at = path.read_bytes().find(payload)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + len(payload) // 2)
                byte = file.read(1)[0]
                file.seek(at + len(payload) // 2)
                file.write(bytes([byte ^ 4]))
            return
    raise AssertionError("it is not there")


@pytest.mark.processes
def test_a_scrub_of_the_mesh_finds_what_rots_and_is_clean_once_it_was_written_anew(tmp_path: Path) -> None:
    payloads = [os.urandom(100_000) for _ in range(6)]

    async def write(client: MeshClient) -> None:
        for number, payload in enumerate(payloads):
            await store_piece(client, mesh.nodes[number % 2].node, number, payload)

    with running_mesh(tmp_path, 3) as mesh:
        peers = ",".join(mesh.peers)
        with_client(mesh, write)
        clean = vstack("scrub", "--json", peers=peers)
        assert (clean.code, clean.json["clean"]) == (0, True), clean
        rows = {row["node"]: row for row in rows_of(clean.json, "nodes")}
        assert [rows[n.node]["verified_bytes"] for n in mesh.nodes] == [300_000, 300_000, 0]
        rot(mesh.nodes[1].data / "store", payloads[1])
        rot(mesh.nodes[1].data / "store", payloads[5])
        one = vstack("scrub", "--node", mesh.nodes[0].address, peers=peers)
        assert one.code == 0, "the other node was not asked"
        found = vstack("scrub", "--json", peers=peers)
        assert (found.code, found.json["clean"]) == (1, False), found
        rows = {row["node"]: row for row in rows_of(found.json, "nodes")}
        assert [(rows[n.node]["damaged"], rows[n.node]["quarantined"]) for n in mesh.nodes] == [
            (0, 0), (2, 2), (0, 0),
        ]  # fmt: skip
        again = vstack("scrub", peers=peers)
        assert again.code == 1, "it is still in quarantine"
        assert "2 pieces in quarantine" in again.out
        with_client(mesh, write)
        healed = vstack("scrub", peers=peers)
        assert healed.code == 0, healed
        assert "no damage found" in healed.out


@pytest.mark.processes
def test_watching_begins_no_round(shared: LocalMesh) -> None:
    def rounds(*words: str) -> list[object]:
        done = vstack("scrub", "--json", *words, peers=",".join(shared.peers))
        assert done.code == 0, done
        return [row["rounds"] for row in rows_of(done.json, "nodes")]

    before = rounds()
    assert rounds("--watch") == before
    assert rounds() == [n + 1 for n in before if isinstance(n, int)]


@pytest.mark.processes
def test_a_scrub_that_a_node_cannot_be_asked_for_ends_with_3(tmp_path: Path) -> None:
    with running_mesh(tmp_path, 3) as mesh:
        mesh.nodes[2].kill()
        done = vstack("scrub", "--json", peers=",".join(mesh.peers))
        assert done.code == 3, done
        assert done.json["clean"] is None
        assert done.json["silent_nodes"] == [mesh.nodes[2].node]
        assert len(rows_of(done.json, "nodes")) == 2


def store_much(mesh: LocalMesh) -> None:
    """What takes a scrub at its full rate four seconds, on the first node."""

    async def work(client: MeshClient) -> None:
        for number in range(32):
            await store_piece(client, mesh.nodes[0].node, number, os.urandom(4 << 20))

    with_client(mesh, work)


@pytest.mark.processes
def test_ctrl_c_ends_the_watching_and_the_round_goes_on(tmp_path: Path) -> None:
    async def first(client: MeshClient) -> Status:
        return await client.status(mesh.nodes[0].node)

    with running_mesh(tmp_path, 1) as mesh:
        store_much(mesh)
        command = [sys.executable, "-c", "from vstack.cli import main; main()", "scrub", "--keys", "none"]
        with subprocess.Popen(
            [*command, "--peers", mesh.peers[0]], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as watching:
            wait_for(lambda: bool(with_client(mesh, first).store["scrub_hastened"]))
            watching.send_signal(signal.SIGINT)
            out, err = watching.communicate(timeout=60)
        assert watching.returncode == 130, (out, err)
        assert "vstack scrub --watch" in err
        assert "Traceback" not in err
        done = vstack("scrub", "--watch", "--json", peers=mesh.peers[0])
        assert done.code == 0, done
        assert [row["rounds"] for row in rows_of(done.json, "nodes")] == [1], "it went on to its end"


@pytest.mark.processes
def test_a_node_that_is_killed_in_its_round_begins_it_anew(tmp_path: Path) -> None:
    async def work(client: MeshClient) -> None:
        told: list[float] = []
        scrubbing = asyncio.create_task(
            scrub(client, client.members, lambda done, total: told.append(done / total))
        )
        deadline = asyncio.get_running_loop().time() + 30
        while not told:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)
        first = mesh.nodes[0]
        first.kill()
        await asyncio.to_thread(start, first)
        (found,) = await asyncio.wait_for(scrubbing, 60)
        assert found.error is None
        assert found.counted("scrub_bytes") >= 128 << 20, "all of it since the restart"
        assert min(told) < 1
        assert told[-1] == 1

    def start(node: LocalNode) -> None:
        node.start(mesh.peers, detach=False)
        node.wait_ready()

    with running_mesh(tmp_path, 1) as mesh:
        store_much(mesh)
        with_client(mesh, work)


@pytest.mark.processes
def test_a_reader_may_see_what_is_stored_and_not_have_it_scrubbed(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 1, keys=tmp_path / "keys") as mesh:
        peers, reader = ",".join(mesh.peers), tmp_path / "rita.key"
        assert mesh.client_key is not None
        made = vstack("keys", "new", reader, "--mesh", mesh.client_key, "--json")
        public = made.json["public"]
        assert isinstance(public, str)
        given = vstack("keys", "authorise", public, "--role", "reader", peers=peers, key=mesh.client_key)
        assert given.code == 0, given
        assert vstack("storage", peers=peers, key=reader).code == 0
        assert vstack("scrub", "--watch", peers=peers, key=reader).code == 0
        vstack("scrub", peers=peers, key=reader).failed_with(2, "scrub", "role writer")
