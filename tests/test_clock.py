"""Wall clocks of running nodes jump by a year, forwards and back: they decide nothing but the day of a view.

The nodes run under libfaketime, which changes the time of day and leaves the monotonic clock alone.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from time import time

import msgspec
import pytest

from tests.at_rest import everybody_has_looked
from tests.cluster import with_client
from tests.kept import QUICK, content, figures, look, put, set_policy, until
from vstack.client.catalogue import Video, delete_video, read_video, undelete_video
from vstack.local import LocalMesh, free_port
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.registers import (
    EPOCH_SHIFT,
    ERASURE,
    REPLICATED,
    PieceKey,
    UploadId,
    VideoRecord,
    pack,
    unpack_video,
    video_key,
)

MB = 1 << 20
DAY = 86_400
OPEN = "cd" * 32
"""The id of an upload that stays open."""
PATIENT = msgspec.structs.replace(QUICK, hot_views=20, undelete=3600)
"""So that what is deleted, or left open, has to stay for the whole test, unless a clock is believed."""


class Clock:
    """The time of day that the nodes see."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    def jump(self, days: int) -> None:
        """Within a second it is so many days later than it really is, or earlier."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{days:+d}d\n")
        new.rename(self._file)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Processes that are started while this is in use live by it."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: apt-get install libfaketime)")
    clock = Clock(tmp_path / "clock")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(tmp_path / "clock"))
    monkeypatch.setenv("FAKETIME_CACHE_DURATION", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("NO_FAKE_STAT", "1")
    return clock


async def open_upload(mesh: MeshClient) -> tuple[NodeId, PieceKey]:
    """Begins an upload, stores one piece of it, and leaves it at that."""
    record = VideoRecord(state="uploading", title="open", redundancy="auto", recipe="x", source_size=1)
    opened = await mesh.change(Change(video_key(OPEN), 0, pack(record)))
    key = PieceKey(OPEN, UploadId(opened.version >> EPOCH_SHIFT, opened.version), 0, 0)
    node = mesh.members[0].node
    await mesh.put_piece(node, key, REPLICATED, 10, sha256(b"some bytes").digest(), b"some bytes")
    return node, key


async def watch(mesh: MeshClient, video: Video, times: int) -> None:
    for _ in range(times):
        assert await mesh.viewed(video.id, os.urandom(16))


async def days_of_views(mesh: MeshClient, video: Video) -> set[int]:
    page = await mesh.list(f"views/{video.id}/")
    return {int(row.key.rpartition("/")[2]) for row in page.rows}


@pytest.mark.parametrize("who", ["all", "two of five"])
def test_a_clock_that_jumps_by_a_year_deletes_nothing_and_loses_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, PATIENT)
        cold, cold_data = await put(mesh, tmp_path, 6 * MB)
        hot, hot_data = await put(mesh, tmp_path, 6 * MB)
        gone, gone_data = await put(mesh, tmp_path, 6 * MB)
        holder, piece = await open_upload(mesh)
        await watch(mesh, hot, 21)
        await until(mesh, hot, lambda k: k.whole and k.schemes == {REPLICATED.name})
        await delete_video(mesh, gone)
        before = [await mesh.status(member.node) for member in mesh.members]

        async def nothing_is_lost() -> None:
            await everybody_has_looked(mesh)
            register = await mesh.read(video_key(gone.id))
            assert register.data is not None
            assert unpack_video(register.data).state == "deleted"
            assert unpack_video(register.data).waited < 600, "running time, and not that of a clock"
            register = await mesh.read(video_key(OPEN))
            assert register.data is not None
            assert unpack_video(register.data).state == "uploading"
            (held,) = await mesh.inventory(holder, [piece], verified_within=0)
            assert held.state == "present"
            named = await look(mesh, gone)
            assert sum(named.held.values()) >= 5 * len(named.records)
            assert await content(mesh, cold, tmp_path) == cold_data
            assert await content(mesh, hot, tmp_path) == hot_data
            after = [await mesh.status(member.node) for member in mesh.members]
            assert [s.boot for s in after] == [s.boot for s in before], "no node has ended"
            assert {s.epoch for s in after} == {mesh.config.epoch}
            assert not any(s.counters["paxos.damaged"] for s in after)
            assert not any(p.state == "down" for s in after for p in s.peers)
            assert not (await figures(mesh)).get("unreadable")

        clock.jump(365)
        await nothing_is_lost()
        if who == "all":  # otherwise it depends on which node is the keeper
            await until(mesh, hot, lambda k: k.whole and k.schemes == {ERASURE.name})
            await watch(mesh, cold, 21)
            await until(mesh, cold, lambda k: k.whole and k.schemes == {REPLICATED.name})
            later = int(time()) // DAY + 365
            assert await days_of_views(mesh, cold) <= {later, later + 1}
        clock.jump(-365)
        await nothing_is_lost()
        if who == "all":  # views of days to come count as well
            await until(mesh, hot, lambda k: k.whole and k.schemes == {REPLICATED.name})
        clock.jump(0)
        await nothing_is_lost()
        now = await read_video(mesh, gone.id)
        assert now is not None
        await undelete_video(mesh, now)
        await until(mesh, gone, lambda k: k.whole)
        assert await content(mesh, gone, tmp_path) == gone_data
        now = await read_video(mesh, gone.id)
        assert now is not None
        await delete_video(mesh, now)
        clock.jump(-365)
        await set_policy(mesh, msgspec.structs.replace(PATIENT, undelete=4))
        await until(mesh, gone, lambda k: not k.held.total(), within=120)
        assert await content(mesh, cold, tmp_path) == cold_data

    with LocalMesh(tmp_path / "mesh", 5, free_port(5)) as local:
        for node in local.nodes:
            if who != "all" and node.number > 2:
                monkeypatch.delenv("LD_PRELOAD", raising=False)
            node.start(local.peers, detach=False)
        for node in local.nodes:
            node.wait_ready()
        monkeypatch.delenv("LD_PRELOAD", raising=False)
        with_client(local, work)
