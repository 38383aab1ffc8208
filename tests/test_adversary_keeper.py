"""Schedules and states that would cost somebody's only copy, or hold up the repair of another for ever."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tests.cluster import running_mesh, with_client
from tests.keeper_sim.registers import Cell
from tests.keeper_sim.scene import GRACE, UNDELETE, Scene
from tests.kept import content, put
from tests.store_helpers import open_store, outcomes, piece_of, superblocks
from vstack.client.catalogue import read_video
from vstack.client.uploader import Progress, UploadOptions, upload
from vstack.errors import BadInput
from vstack.mesh.config import Config, Member, group
from vstack.mesh.mesh_client import Change, MeshClient, Page
from vstack.mesh.messages import Held, Row
from vstack.mesh.registers import (
    ERASURE,
    MAX_RECORD,
    REPLICATED,
    SPARE,
    ChunkEntry,
    ChunkRecord,
    PieceKey,
    Place,
    RecordTooLarge,
    Scheme,
    UploadId,
    VideoRecord,
    chunk_key,
    pack,
    unpack_chunk,
    unpack_video,
    uploaded,
    video_key,
)
from vstack.node.index import Index, IndexWriteFailed
from vstack.node.keeper import thread
from vstack.node.keeper.collector import Collector
from vstack.node.keeper.keeper import TABLE, Keeper, Queued, Sight
from vstack.node.keeper.keeper import Video as Watched
from vstack.node.keeper.mender import Mended, Target
from vstack.node.keeper.plan import Nodes, Reason, plan
from vstack.node.keeper.thread import Keeping
from vstack.node.keeper.voice import SAY_EVERY, Voice

# -- one node, or one video, does not hold up the rest -------------------------------------------------


def test_a_damaged_piece_that_its_node_cannot_take_again_is_written_elsewhere_at_once() -> None:
    scene = Scene(6)

    async def schedule() -> None:
        places = await scene.store(ERASURE, scene.nodes[:5])
        damaged = scene.nodes[0]
        assert scene.world.spoil(scene.key_of(places[0]))
        damaged.disk.scrub()
        damaged.disk.full = True
        members = Nodes(scene.world.config.members)
        mended = await scene.nodes[1].mender.mend(scene.target, ERASURE, members, places[:1])
        assert (mended.outcome, set(mended.closed)) == ("done", {damaged.id})
        assert scene.nodes[5] in scene.holders

    scene.play(schedule())


def test_a_video_whose_register_has_no_room_left_does_not_keep_the_others_from_repair() -> None:
    scene = Scene(4)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3], "replicated")
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        assert await scene.client.change(Change(video_key(_beside(scene)), 0, _full("deleted")))
        assert await keeper.look()
        await asyncio.sleep(UNDELETE / 2)
        assert scene.world.spoil(scene.key_of(places[0]), vanish=True)
        assert not await keeper.look(), "time cannot be counted in that register"
        assert keeper.state()["queue_repair"] == 1

    scene.play(schedule())


def _beside(scene: Scene) -> str:
    """Another video with the same keeper, that is looked at before the one of the scene."""
    mine = group(scene.world.config, scene.video)[0]
    names = (hashlib.sha256(b"%d" % i).hexdigest() for i in count())
    return next(n for n in names if n < scene.video and group(scene.world.config, n)[0] == mine)


def _full(state: str) -> bytes:
    """A video's record that takes all the room that there is."""
    record = VideoRecord(state=state, title="", redundancy="auto", recipe="", source_size=1)  # type: ignore[arg-type]
    left = MAX_RECORD - len(pack(record)) - 2
    full = pack(VideoRecord(state=state, title="t" * left, redundancy="auto", recipe="", source_size=1))  # type: ignore[arg-type]
    assert len(full) == MAX_RECORD
    return full


def test_a_record_that_becomes_ready_leaves_room_for_what_is_written_into_it_later() -> None:
    with pytest.raises(RecordTooLarge):
        pack(unpack_video(_full("ready")), spare=SPARE)
    pack(unpack_video(_full("ready")))


def test_what_goes_wrong_with_every_chunk_of_every_pass_is_said_now_and_then() -> None:
    now, lines = 0.0, list[str]()
    logger = logging.Logger("voice")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    voice = Voice(logger, lambda: now)
    for chunk in range(100):
        voice.warn("chunk", f"chunk {chunk} could not be mended")
        voice.warn("pass", "a pass was broken off")
    assert lines == ["chunk 0 could not be mended", "a pass was broken off"]
    now = SAY_EVERY
    voice.warn("chunk", "chunk 7 could not be mended")
    assert lines[2:] == ["chunk 7 could not be mended"]


# -- what is there stays ------------------------------------------------------------------------------


def test_what_an_upload_was_to_replace_stands_again_when_nobody_goes_on_with_it() -> None:
    scene = Scene(3)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes)
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        version, stood = scene.ledger.video(scene.video)
        assert stood is not None
        again = VideoRecord(
            state="uploading", title="t", redundancy="auto", recipe="r", source_size=1, before=pack(stood)
        )
        await scene.client.change(Change(video_key(scene.video), version, pack(again)))
        for _ in range(3):
            await keeper.look()
            await asyncio.sleep(UNDELETE)
        for node in scene.nodes:
            await node.collector.collect()
            await asyncio.sleep(GRACE + 1)
            await node.collector.collect()
        assert scene.ledger.video(scene.video)[1] == stood
        assert all(scene.has(p) for p in places)

    scene.play(schedule())


class _Unplugged(Exception):
    """A client ends in the middle."""


@pytest.mark.processes
def test_whoever_gives_up_an_upload_that_another_client_began_leaves_what_it_was_to_replace(
    tmp_path: Path,
) -> None:
    def unplug(progress: Progress) -> None:
        if progress.stage == "uploading":
            raise _Unplugged

    async def run(client: MeshClient) -> None:
        first, data = await put(client, tmp_path, 5 << 20)
        path = next(tmp_path.glob("source-*"))
        key = chunk_key(first.id, first.upload, 0)
        found = await client.read(key)
        assert found.data is not None
        lost = unpack_chunk(found.data)
        lost = msgspec.structs.replace(lost, places=tuple(p._replace(node="e" * 32) for p in lost.places))
        await client.change(Change(key, found.version, pack(lost)))
        with pytest.raises(_Unplugged):
            await upload(client, path, UploadOptions(opaque=True), unplug)
        opened = await read_video(client, first.id)
        assert opened is not None
        assert opened.record.state == "uploading"
        with pytest.raises(BadInput, match="changed"):
            await upload(
                client,
                path,
                UploadOptions(opaque=True),
                lambda p: os.utime(path, (1, 1)) if p.stage == "uploading" else None,
            )
        now = await read_video(client, first.id)
        assert now is not None
        assert (now.record, now.upload) == (first.record, first.upload)
        again = await upload(client, path, UploadOptions(opaque=True))
        assert (again.state, again.video.record.before) == ("restored", b"")
        assert await content(client, again.video, tmp_path) == data

    with running_mesh(tmp_path / "mesh", 3) as mesh:
        with_client(mesh, run)


def test_nodes_that_are_to_take_nothing_do_not_count_as_room_for_fragments() -> None:
    members = [Member(f"{i:032x}", f"n{i}:7400", weight=int(i < 2)) for i in range(4)]
    where = [0, 1, 2, 3, 0]
    places = tuple(Place(members[n].node, i, bytes(32), uploaded(ERASURE)) for i, n in enumerate(where))
    record = ChunkRecord(ChunkEntry(0, 0, 1, 100, bytes(32)), ERASURE, places)
    work = plan("ab" * 32, record, ERASURE, Nodes(members))
    assert work is not None
    assert (work.scheme, {n for _, n in work.write}) == (Scheme(1, 2), {m.node for m in members[:2]})


def test_a_register_that_fell_back_does_not_take_chunks_with_it_that_it_has_not_heard_of() -> None:
    """Recovery may leave a register at what it said before: that an earlier upload was given up."""
    scene = Scene(3)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes)
        key = video_key(scene.video)
        stood = scene.ledger.registers._cells[key]
        earlier = VideoRecord(
            state="aborted", title="", redundancy="auto", recipe="", source_size=1, upload=UploadId(1, 1)
        )
        scene.ledger.registers._cells[key] = Cell(scene.upload.version - 1, pack(earlier))
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        for _ in range(3):
            await keeper.look()
            for node in scene.nodes:
                await node.collector.collect()
            await asyncio.sleep(GRACE + 1)
        assert all(scene.has(p) for p in places)
        scene.ledger.registers._cells[key] = stood
        assert scene.record.places == places

    scene.play(schedule())


def test_a_keeper_that_ends_by_an_error_nobody_expected_begins_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    again = threading.Event()
    began: list[Keeper | None] = []

    async def fail_at_first(keeper: Keeper) -> None:
        began.append(keeper)
        if len(began) < 3:
            raise RuntimeError("nobody expected it")
        again.set()
        await asyncio.Event().wait()

    @asynccontextmanager
    async def connect(*_: object, **__: object) -> AsyncIterator[SimpleNamespace]:
        if not began:
            began.append(None)
            raise OSError("too many open files")
        yield SimpleNamespace()

    async def collect(_: Collector) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(thread, "connect", connect)
    monkeypatch.setattr(thread, "BEGIN_ANEW", 0.01)
    monkeypatch.setattr(Keeper, "run", fail_at_first)
    monkeypatch.setattr(Collector, "run", collect)
    sight = Sight(Config(1, (), 1), frozenset())
    keeping = Keeping("0" * 32, 1, "a:1", {}, None, None, sight, lambda: None)  # type: ignore[arg-type]
    try:
        assert again.wait(20), "it is gone for ever"
    finally:
        keeping.close()
    assert "begins anew" in caplog.text


def test_a_damaged_piece_is_not_said_to_be_there_when_that_cannot_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks may be about to give up other copies for it."""

    def refuse(*_: object, **__: object) -> None:
        raise IndexWriteFailed("the disk is full")

    store = open_store(tmp_path)
    piece = piece_of(1, b"all of it")
    assert outcomes(store, [piece]) == ["stored"]
    path = superblocks(tmp_path)[0]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"all of it", b"not of it"))
    monkeypatch.setattr(Index, "write", refuse)
    assert [h.state for h in store.inventory([piece.key], verify=True)] == ["quarantined"]
    monkeypatch.undo()
    store.close()


def test_a_damaged_piece_that_was_made_anew_elsewhere_does_not_stay_in_quarantine_for_ever() -> None:
    scene = Scene(4)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        damaged = scene.nodes[0]
        assert scene.world.spoil(scene.key_of(places[0]))
        damaged.disk.scrub()
        await damaged.collector.collect()
        await asyncio.sleep(GRACE + 1)
        await damaged.collector.collect()
        assert damaged.disk.quarantine, "its register names it still: it is to be made anew"
        new = scene.put(scene.nodes[3], 0, REPLICATED, scene.generation(scene.nodes[1]))
        assert await scene.name(REPLICATED, [*places[1:], new])
        await damaged.collector.collect()
        assert damaged.disk.quarantine
        await asyncio.sleep(GRACE + 1)
        await damaged.collector.collect()
        assert not damaged.disk.quarantine

    scene.play(schedule())


def test_a_keeper_looks_again_before_it_has_moved_all_that_could_lie_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has rotted meanwhile is not to wait for hours."""
    scene = Scene(3)

    async def mend_slowly(*_: object) -> Mended:
        await asyncio.sleep(100)
        return Mended("nothing")

    async def schedule() -> None:
        keeper = scene.nodes[0].keeper
        monkeypatch.setattr(scene.nodes[0].mender, "mend", mend_slowly)
        moves = [
            Queued((1 << 16, 3), 1, Target(scene.video, scene.upload, i), REPLICATED, 2, Reason.MOVE, ())
            for i in range(100)
        ]
        keeper._queue = list(moves)
        assert not await keeper._work(keeper._outlook(), 600.0)
        assert (scene.world.now(), len(keeper._queue)) == (600.0, 88)
        keeper._queue = moves[:4]
        assert await keeper._work(keeper._outlook(), 600.0)

    scene.play(schedule())


def test_a_video_of_any_length_is_looked_at_a_part_at_a_time() -> None:
    scene = Scene(3)
    asked: list[int] = []

    async def inventory(_: str, keys: Sequence[PieceKey], **__: object) -> list[Held]:
        asked.append(len(keys))
        return [Held("absent", b"") for _ in keys]

    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes)
        keeper, data = scene.nodes[0].keeper, pack(scene.record)
        keeper._mesh.inventory = inventory  # type: ignore[method-assign, assignment]
        rows = [Row(chunk_key(scene.video, scene.upload, i), 1, data) for i in range(2 * TABLE + 1)]
        version, record = scene.ledger.video(scene.video)
        assert record is not None
        video, tally = Watched(scene.video, version, record), Counter[str]()
        assert await keeper._plan(video, Page(rows, True, ()), keeper._nodes(), [], tally)
        assert (tally["chunks"], max(asked)) == (2 * TABLE + 1, TABLE)

    scene.play(schedule())
