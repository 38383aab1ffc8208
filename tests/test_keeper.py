"""Real nodes keep what they are given: they switch, repair, move, and give space back, by themselves."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from hashlib import sha256
from pathlib import Path

import msgspec

from tests.cluster import running_mesh, with_client
from tests.kept import QUICK, content, eventually, figures, look, put, set_policy, until
from vstack.client.catalogue import delete_video, read_video, undelete_video
from vstack.client.members import drain
from vstack.local import LocalNode, free_port
from vstack.mesh.changes import RemoveMember
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.registers import (
    EPOCH_SHIFT,
    ERASURE,
    REPLICATED,
    PieceKey,
    UploadId,
    VideoRecord,
    pack,
    video_key,
)

MB = 1 << 20


def test_a_video_becomes_hot_with_its_views_and_cold_again_without_them(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, msgspec.structs.replace(QUICK, hot_views=20))
        video, data = await put(mesh, tmp_path, 9 * MB)
        cold = await until(mesh, video, lambda k: k.whole and k.schemes == {ERASURE.name})
        assert cold.record_bytes / len(data) <= 1.70
        for _ in range(20):
            assert await mesh.viewed(video.id, os.urandom(16))
        await eventually(lambda: counted(mesh, 20))
        assert (await look(mesh, video)).schemes == {ERASURE.name}, "the threshold is not crossed yet"
        assert await mesh.viewed(video.id, os.urandom(16))
        hot = await until(mesh, video, lambda k: k.whole and k.schemes == {REPLICATED.name})
        assert 3.0 <= hot.record_bytes / len(data) < 3.01
        assert await content(mesh, video, tmp_path) == data
        await set_policy(mesh, msgspec.structs.replace(QUICK, hot_views=26))
        await eventually(lambda: passed(mesh))
        assert (await look(mesh, video)).schemes == {REPLICATED.name}, "21 is over 0.8 of 26: it stays hot"
        await set_policy(mesh, msgspec.structs.replace(QUICK, hot_views=27))
        cold = await until(mesh, video, lambda k: k.whole and k.schemes == {ERASURE.name})
        assert 1 - cold.record_bytes / hot.record_bytes >= 0.43
        assert await content(mesh, video, tmp_path) == data

    async def counted(mesh: MeshClient, views: int) -> bool:
        statuses = [await mesh.status(m.node) for m in mesh.members]
        return sum(s.counters.get("views.written", 0) for s in statuses) >= views

    async def passed(mesh: MeshClient) -> bool:
        before = (await figures(mesh))["passes"]
        await asyncio.sleep(2)
        return (await figures(mesh))["passes"] >= before + len(mesh.members)

    with running_mesh(tmp_path / "mesh") as mesh:
        with_client(mesh, work)


def test_what_a_dead_node_held_is_repaired_and_its_return_leaves_nothing_over(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh)
        cold, cold_data = await put(mesh, tmp_path, 12 * MB)
        hot, hot_data = await put(mesh, tmp_path, 12 * MB, redundancy="replicated")
        dead = local.nodes[2]
        dead.kill()
        for video in (cold, hot):
            await until(mesh, video, lambda k: not k.named[dead.node] and k.whole)
        assert (await figures(mesh))["bytes_restored"] > 0
        assert await content(mesh, cold, tmp_path) == cold_data
        assert await content(mesh, hot, tmp_path) == hot_data
        dead.start(local.peers, detach=False, extra=local.options)
        dead.wait_ready()
        for video in (cold, hot):
            await until(mesh, video, lambda k: k.named[dead.node] > 0 and k.whole)
        kept = await look(mesh, cold)
        assert set(kept.named.values()) == {len(kept.records)}, (
            "one fragment of each chunk on each node again"
        )
        assert await content(mesh, cold, tmp_path) == cold_data
        assert await content(mesh, hot, tmp_path) == hot_data

    with running_mesh(tmp_path / "mesh") as local:
        with_client(local, work)


def test_a_new_node_takes_its_share_and_a_drained_one_gives_all_of_it_away(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh)
        video, data = await put(mesh, tmp_path, 60 * MB)
        port = free_port(1)
        new = LocalNode(6, f"127.0.0.1:{port}", tmp_path / "new", tmp_path / "new.log")
        new.start(local.peers, detach=False, extra=local.options)
        try:
            new.wait_ready()
            await mesh.refresh()
            kept = await until(mesh, video, lambda k: k.named[new.node] >= 15 and k.whole)
            chunks = len(kept.records)
            assert all(len({p.node for p in r.places}) == 5 for r in kept.records), "each on its own node"
            moved = (await figures(mesh))["bytes_move"]
            ideal = sum(k.entry.size for k in kept.records) / 3 * 5 / 6
            assert moved <= 1.5 * ideal
            assert max(kept.named.values()) <= chunks
            leaver = local.nodes[0]
            member = mesh.config.member(leaver.node)
            assert member is not None
            await drain(mesh, member, True)
            await until(
                mesh, video, lambda k: not k.named[leaver.node] and not k.held[leaver.node] and k.whole
            )
            assert await content(mesh, video, tmp_path) == data
        finally:
            new.stop()

    with running_mesh(tmp_path / "mesh") as local:
        with_client(local, work)


def test_a_deleted_video_can_be_had_back_for_a_while_and_then_its_space_is_free(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, msgspec.structs.replace(QUICK, undelete=1000))
        kept, kept_data = await put(mesh, tmp_path, 5 * MB)
        gone, _ = await put(mesh, tmp_path, 5 * MB)
        deleted = await delete_video(mesh, kept)
        await delete_video(mesh, gone)
        await undelete_video(mesh, deleted)
        await set_policy(mesh)
        await eventually(lambda: absent(mesh, gone.id))
        await until(mesh, gone, lambda k: not k.held.total())
        assert (await mesh.list(f"chunk/{gone.id}/")).rows == []
        await until(mesh, kept, lambda k: k.whole)
        assert await content(mesh, kept, tmp_path) == kept_data

    async def absent(mesh: MeshClient, video: str) -> bool:
        return await read_video(mesh, video) is None

    with running_mesh(tmp_path / "mesh") as mesh:
        with_client(mesh, work)


def test_an_upload_that_nobody_goes_on_with_is_collected(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh)
        whole, data = await put(mesh, tmp_path, 4 * MB)
        record = VideoRecord(
            state="uploading", title="never done", redundancy="auto", recipe="x", source_size=1
        )
        opened = await mesh.change(Change(video_key("ab" * 32), 0, pack(record)))
        upload = UploadId(opened.version >> EPOCH_SHIFT, opened.version)
        payload = b"some bytes"
        node = mesh.members[0].node
        key = PieceKey("ab" * 32, upload, 0, 0)
        await mesh.put_piece(node, key, REPLICATED, len(payload), sha256(payload).digest(), payload)
        await eventually(lambda: gone(mesh, node))
        assert (await mesh.read(video_key("ab" * 32))).data is None
        assert await content(mesh, whole, tmp_path) == data

    async def gone(mesh: MeshClient, node: str) -> bool:
        return all(row.video != "ab" * 32 for row in await mesh.usage(node))

    with running_mesh(tmp_path / "mesh", 3) as mesh:
        with_client(mesh, work)


def test_a_mesh_that_grows_gives_its_videos_what_they_lacked(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh)
        video, data = await put(mesh, tmp_path, 6 * MB)
        assert (await look(mesh, video)).schemes == {"1 copy"}
        more = []
        try:
            for i in range(2):
                port = free_port(1)
                new = LocalNode(i + 2, f"127.0.0.1:{port}", tmp_path / f"new{i}", tmp_path / f"new{i}.log")
                new.start(local.peers, detach=False, extra=local.options)
                more.append(new)
                new.wait_ready()
                await mesh.refresh()
            kept = await until(mesh, video, lambda k: k.whole and k.schemes == {ERASURE.name})
            for record in kept.records:
                counts = Counter(p.node for p in record.places)
                assert sorted(counts.values()) == [1, 2, 2], "any one node may be lost"
            assert await content(mesh, video, tmp_path) == data
        finally:
            for node in more:
                node.stop()

    with running_mesh(tmp_path / "mesh", 1) as local:
        with_client(local, work)


def test_pieces_are_adopted_when_their_node_comes_back_under_a_new_name(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        # Keepers are too slow to make the pieces anew before their node is back.
        await set_policy(mesh, msgspec.structs.replace(QUICK, repair_delay=1000, repair_rate=1 << 10))
        video, data = await put(mesh, tmp_path, 12 * MB)
        back = local.nodes[3]
        old = back.node
        back.stop()
        mark = max((back.data / "votes").glob("*/mark"))
        mark.write_bytes(b"\0" * len(mark.read_bytes()))
        back.start(local.peers, detach=False, extra=(*local.options, "--rejoin"))
        await mesh.change_mesh(RemoveMember(old))
        back.wait_ready()
        await mesh.refresh()
        assert back.node != old
        before = (await figures(mesh)).get("bytes_restored", 0)
        kept = await until(mesh, video, lambda k: not k.named[old] and k.whole)
        assert kept.named[back.node] == len(kept.records)
        assert (await figures(mesh))["gc_adopted"] > 0
        assert (await figures(mesh)).get("bytes_restored", 0) - before < len(data) / 3 / 2, (
            "mostly not copied"
        )
        assert await content(mesh, video, tmp_path) == data

    with running_mesh(tmp_path / "mesh") as local:
        with_client(local, work)
