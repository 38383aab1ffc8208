"""Disks of running nodes get full, and have room again: clear errors, nothing lost, all goes on by itself.

Each node has a small file system of its own, in a mount namespace that ends with the test. Where that may
not be made, the tests are skipped: what the store does when there is no room is tested without one, too, in
`test_store` and `test_compaction`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic

import msgspec
import pytest

from tests.at_rest import everybody_answers, everybody_has_looked
from tests.cluster import vstack, with_client
from tests.kept import QUICK, content, eventually, figures, look, put, set_policy, until
from vstack.client.catalogue import Video, delete_video, pin_video
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ERASURE, REPLICATED, Redundancy, Scheme

MB = 1 << 20
SIZE = 64
"""MB of a disk here. Uploads leave 12.8 of them, repair 8.6, demotion 4.5, compaction 1.3."""
RESERVE = ("--reserve", "20")
PATIENT = msgspec.structs.replace(QUICK, undelete=3600)


class Disk:
    """A file system, and a file of somebody else's in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    @property
    def free(self) -> int:
        about = os.statvfs(self.path)
        return about.f_bavail * about.f_frsize

    def fill(self, leaving: float) -> None:
        """So many MB are free."""
        fd = os.open(self._filler, os.O_RDWR | os.O_CREAT)
        try:
            size = os.fstat(fd).st_size + self.free - int(leaving * MB)
            if size > 0:
                os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disks(folder: Path, count: int, size: int = SIZE) -> Iterator[list[Disk]]:
    """File systems of `size` MB each. Skips the test if they cannot be had."""
    folder.mkdir()
    mounts = " && ".join(
        f"mkdir {folder}/{i} && mount -t tmpfs -o size={size}m tmpfs {folder}/{i}" for i in range(count)
    )
    try:
        holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", f"{mounts} && echo mounted && cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError:
        pytest.skip("unshare is not installed (Debian: apt-get install util-linux)")
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != b"mounted\n":
            why = holder.stderr.read().decode(errors="replace").strip()
            pytest.skip(f"no file systems can be mounted here: {why}")
        yield [Disk(Path(f"/proc/{holder.pid}/root{folder}/{i}")) for i in range(count)]
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()
        holder.stderr.close()


@contextmanager
def mesh_on(disks: Sequence[Disk], folder: Path) -> Iterator[LocalMesh]:
    """A mesh with one node on each disk."""
    with LocalMesh(folder, len(disks), free_port(len(disks)), RESERVE) as mesh:
        for node, disk in zip(mesh.nodes, disks, strict=True):
            node.data = disk.path / "node"
        mesh.start()
        yield mesh


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Disk]]:
    with small_disks(tmp_path / "disks", 5) as made:
        yield made


@pytest.fixture
def local(disks: list[Disk], tmp_path: Path) -> Iterator[LocalMesh]:
    with mesh_on(disks, tmp_path / "mesh") as mesh:
        yield mesh


async def votes_go_on(mesh: MeshClient) -> None:
    """All nodes serve, and what needs a majority of all can be decided."""
    await eventually(partial(everybody_answers, mesh))
    await set_policy(mesh, msgspec.structs.replace(PATIENT, hot_views=mesh.config.policy.hot_views + 1))


def test_a_put_that_fills_all_disks_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, disks: list[Disk], local: LocalMesh
) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, PATIENT)
        before, before_data = await put(mesh, tmp_path, 12 * MB)
        for disk in disks:
            disk.fill(leaving=16)
        source = tmp_path / "large"
        source.write_bytes(data := os.urandom(24 * MB))
        with pytest.raises(VstackError, match="full up to its reserve: free space, or add a node"):
            await upload(mesh, source, UploadOptions(opaque=True))
        assert all(8.6 * MB < disk.free < 16 * MB for disk in disks)
        said = vstack("put", "--opaque", source, peers=",".join(local.peers))
        said.failed_with(said.code, "full")
        assert said.code != 0
        await votes_go_on(mesh)
        assert await content(mesh, before, tmp_path) == before_data
        for disk in disks:
            disk.empty()
        done = await upload(mesh, source, UploadOptions(opaque=True))
        assert done.state == "resumed"
        assert done.resumed > 0
        assert await content(mesh, done.video, tmp_path) == data
        await until(mesh, done.video, lambda k: k.whole and k.schemes == {ERASURE.name})
        assert await content(mesh, before, tmp_path) == before_data

    with_client(local, work)


def test_one_full_disk_is_left_out_and_gets_its_share_when_there_is_room(
    tmp_path: Path, disks: list[Disk], local: LocalMesh
) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, PATIENT)
        full = local.nodes[2]
        disks[2].fill(leaving=10)
        video, data = await put(mesh, tmp_path, 12 * MB)
        kept = await look(mesh, video)
        assert not kept.named[full.node]
        assert all(len(r.places) == r.scheme.m for r in kept.records)
        assert await content(mesh, video, tmp_path) == data
        disks[2].empty()
        await until(mesh, video, lambda k: k.whole and k.named[full.node] == len(k.records), within=120)
        assert await content(mesh, video, tmp_path) == data

    with_client(local, work)


def test_a_repair_that_finds_the_disks_full_goes_on_by_itself_when_there_is_room(
    tmp_path: Path, disks: list[Disk], local: LocalMesh
) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, PATIENT)
        cold, cold_data = await put(mesh, tmp_path, 12 * MB)
        hot, hot_data = await put(mesh, tmp_path, 4 * MB, redundancy="replicated")
        for disk in disks:
            disk.fill(leaving=8)
        dead = local.nodes[4]
        dead.kill()

        async def has_failed() -> bool:
            now = await figures(mesh)
            return bool(now.get("failed")) and bool(now.get("degraded"))

        await eventually(has_failed, within=120)
        assert (await look(mesh, cold)).named[dead.node] > 0
        assert await content(mesh, cold, tmp_path) == cold_data
        assert await content(mesh, hot, tmp_path) == hot_data
        for disk in disks:
            disk.empty()
        for video in (cold, hot):
            await until(mesh, video, lambda k: k.whole and not k.named[dead.node], within=120)
        assert await content(mesh, cold, tmp_path) == cold_data
        assert await content(mesh, hot, tmp_path) == hot_data

    with_client(local, work)


def test_a_switch_in_either_direction_waits_for_room_and_loses_nothing(
    tmp_path: Path, disks: list[Disk], local: LocalMesh
) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, PATIENT)
        video, data = await put(mesh, tmp_path, 12 * MB)
        turns: list[tuple[Redundancy, float, Scheme, Scheme]] = [
            ("replicated", 10, ERASURE, REPLICATED),
            ("erasure", 4, REPLICATED, ERASURE),
        ]
        for redundancy, leaving, before, after in turns:
            await until(mesh, video, lambda k, scheme=before: k.whole and k.schemes == {scheme.name})  # type: ignore[misc]
            for disk in disks:
                disk.fill(leaving=leaving)
            failed = (await figures(mesh)).get("failed", 0)
            await pin_video(mesh, video, redundancy)

            async def has_failed(failed: float = failed) -> bool:
                return (await figures(mesh)).get("failed", 0) > failed

            await eventually(has_failed, within=120)
            await votes_go_on(mesh)
            assert (await look(mesh, video)).schemes == {before.name}
            assert await content(mesh, video, tmp_path) == data
            for disk in disks:
                disk.empty()
            await until(
                mesh,
                video,
                lambda k, scheme=after: k.whole and k.schemes == {scheme.name},  # type: ignore[misc]
                within=120,
            )
            assert await content(mesh, video, tmp_path) == data

    with_client(local, work)


def test_a_compaction_that_finds_no_room_goes_on_when_there_is_some(tmp_path: Path) -> None:
    async def work(mesh: MeshClient, local: LocalMesh, disk: Disk) -> None:
        await set_policy(mesh)
        kept, kept_data = await put(mesh, tmp_path, 40 * MB)
        gone, _ = await put(mesh, tmp_path, 80 * MB)
        await everybody_has_looked(mesh)
        disk.fill(leaving=6)
        await delete_video(mesh, gone)
        log = local.nodes[0].log
        await eventually(lambda: said(log, "cannot be compacted now"))
        assert await content(mesh, kept, tmp_path) == kept_data
        await votes_go_on(mesh)
        disk.empty()
        (member,) = mesh.members

        async def is_given_back() -> bool:
            now = (await mesh.status(member.node)).store
            return now["file_bytes"] - now["preallocated_bytes"] < 42 * MB

        await eventually(is_given_back, within=120)
        assert await content(mesh, kept, tmp_path) == kept_data

    async def said(log: Path, words: str) -> bool:
        return words in log.read_text()

    with (
        small_disks(tmp_path / "disks", 1, 256) as (disk,),
        mesh_on([disk], tmp_path / "mesh") as local,
    ):
        with_client(local, lambda mesh: work(mesh, local, disk))


def test_a_disk_without_a_byte_left_stops_its_node_alone_and_costs_nothing(
    tmp_path: Path, disks: list[Disk], local: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else fills it, the votes' own reserve included: what cannot vote durably does not vote."""
    monkeypatch.setattr("vstack.client.chunker.OPAQUE_BYTES", 8 << 10)  # many registers
    victim = local.nodes[1]
    stored: list[tuple[Video, bytes]] = []

    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, msgspec.structs.replace(PATIENT, repair_delay=3600))
        stored.append(await put(mesh, tmp_path, 4 * MB))
        disks[1].fill(leaving=0)
        deadline = monotonic() + 90
        while victim.alive:
            assert monotonic() < deadline, "it goes on voting without room for its votes"
            stored.append(await put(mesh, tmp_path, MB))
        words = victim.last_words()
        assert "No space left on device" in words
        for video, data in stored:
            assert await content(mesh, video, tmp_path) == data
        stored.append(await put(mesh, tmp_path, MB))
        victim.stop()
        disks[1].empty()
        victim.start(local.peers, detach=False, extra=local.options)
        victim.wait_ready()
        await everybody_has_looked(mesh)
        for video, data in stored:
            await until(mesh, video, lambda k: k.whole)
            assert await content(mesh, video, tmp_path) == data
        status = await mesh.status(victim.node)
        assert not status.counters["paxos.damaged"]
        assert not status.store["read_only"]
        print(f"{len(stored)} videos; the node said: {words}")

    with_client(local, work)
