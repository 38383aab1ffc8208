"""A continuous load of uploads, downloads, listings and deletes, while nodes are killed and paused.

Never more than two of five nodes at once: so nothing may fail for good, nothing may come back other
than it went in, and in the end every video is in the state that its user was told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from vstack.client.catalogue import delete_video, find_video, list_videos
from vstack.client.downloader import download
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import NotFound, OutcomeUnknown
from vstack.local import LocalMesh, LocalNode
from vstack.mesh.mesh_client import MeshClient, connect

from .cluster import running_mesh
from .test_kill_during_upload import assert_one_chosen_value_per_version, start_journaling

CLIENTS = 3
SEED = int(os.environ.get("VSTACK_SEED", time.time_ns() % 100_000))


class Soak:
    """The load, the faults, and what is known to be stored."""

    def __init__(self, mesh: LocalMesh, folder: Path, rng: Random) -> None:
        self.mesh = mesh
        self.folder = folder
        self.rng = rng
        self.over = False
        self.counts: Counter[str] = Counter()
        self.ready: set[str] = set()
        """Ids, each the SHA-256 of its content, of videos that must be there."""
        self.deleted: set[str] = set()

    async def break_things(self) -> None:
        while not self.over:
            await asyncio.sleep(self.rng.uniform(0.2, 2.0))
            nodes = self.rng.sample(self.mesh.nodes, self.rng.choice((1, 1, 2)))
            pause = self.rng.uniform(0.0, 4.0)
            if self.rng.random() < 0.35:
                self.counts["pauses"] += len(nodes)
                await self.pause(nodes, pause)
            else:
                self.counts["kills"] += len(nodes)
                for node in nodes:
                    node.kill()
                await asyncio.sleep(pause)
                for node in nodes:
                    start_journaling(self.mesh, node)
                for node in nodes:
                    await asyncio.to_thread(node.wait_ready)

    async def pause(self, nodes: list[LocalNode], seconds: float) -> None:
        pids = [n.process.pid for n in nodes if n.process is not None]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    async def use(self, number: int) -> None:
        """One client; now and then it connects anew."""
        rng = Random(self.rng.getrandbits(64))
        while not self.over:
            async with connect(self.mesh.peers, patience=30) as client:
                for _ in range(6):
                    await rng.choice((self.put, self.put, self.get, self.get, self.list, self.remove))(
                        client, rng, self.folder / f"{number}.bin"
                    )

    async def put(self, client: MeshClient, rng: Random, path: Path) -> None:
        path.write_bytes(rng.randbytes(rng.randint(1, 6 << 20)))
        redundancy = rng.choice(("erasure", "replicated"))
        result = await upload(client, path, UploadOptions(f"film {rng.random()}", redundancy, opaque=True))  # type: ignore[arg-type]
        self.ready.add(result.video.id)
        self.counts["puts"] += 1

    async def get(self, client: MeshClient, rng: Random, path: Path) -> None:
        if not self.ready:
            return
        video_id = rng.choice(sorted(self.ready))
        try:
            video = await find_video(client, video_id)
        except NotFound:
            assert video_id not in self.ready, "a video is gone that nobody deleted"
            return
        await download(client, video, path)
        assert sha256(path.read_bytes()).hexdigest() == video_id
        self.counts["gets"] += 1

    async def list(self, client: MeshClient, rng: Random, path: Path) -> None:
        must = set(self.ready)
        listing = await list_videos(client)
        if listing.complete:
            missing = must & self.ready - {v.id for v in listing.videos}
            assert not missing, "a listing that calls itself complete is not"
            self.counts["listings"] += 1

    async def remove(self, client: MeshClient, rng: Random, path: Path) -> None:
        if len(self.ready) < 5:
            return
        video_id = rng.choice(sorted(self.ready))
        self.ready.discard(video_id)  # from now on it may or may not be there
        try:
            await delete_video(client, await find_video(client, video_id))
        except (NotFound, OutcomeUnknown):
            return
        self.deleted.add(video_id)
        self.counts["deletes"] += 1

    async def check_all(self) -> None:
        async with connect(self.mesh.peers, patience=30) as client:
            listing = await list_videos(client, hidden=True)
            assert listing.complete
            found = {v.id: v for v in listing.videos}
            assert all(found[v].record.state == "deleted" for v in self.deleted)
            for video_id in sorted(self.ready):
                assert found[video_id].record.state == "ready"
                path = self.folder / "check.bin"
                await download(client, found[video_id], path)
                assert sha256(path.read_bytes()).hexdigest() == video_id


@pytest.mark.processes
@pytest.mark.timeout(1200)
def test_nothing_is_lost_or_changed_under_load_while_two_of_five_nodes_fail_at_a_time(
    tmp_path: Path, soak_seconds: float
) -> None:
    print(f"reproduce with VSTACK_SEED={SEED}")

    async def inside(soak: Soak) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(soak.use(number))
            group.create_task(soak.break_things())
            await asyncio.sleep(soak_seconds)
            soak.over = True
        for node in soak.mesh.nodes:
            node.kill()
        for node in soak.mesh.nodes:
            start_journaling(soak.mesh, node)
        for node in soak.mesh.nodes:
            node.wait_ready()
        await soak.check_all()

    with running_mesh(tmp_path / "mesh") as mesh:
        for node in mesh.nodes:
            node.stop()
        for node in mesh.nodes:
            start_journaling(mesh, node)
        for node in mesh.nodes:
            node.wait_ready()
        soak = Soak(mesh, tmp_path, Random(SEED))
        asyncio.run(inside(soak))
    print(dict(soak.counts))
    assert soak.counts["kills"]
    assert soak.counts["puts"]
    assert soak.counts["gets"]
    assert_one_chosen_value_per_version(mesh)
