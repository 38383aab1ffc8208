"""`kill -9` of random nodes at random moments during uploads: nothing acknowledged is lost.

Each run has a seed; `VSTACK_SEED` sets the first, so that a failing run can be seen again.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from random import Random

import pytest

from vstack.client.catalogue import Video, chunk_table, read_video
from vstack.client.downloader import download
from vstack.client.fetcher import ChunkFetcher
from vstack.client.uploader import UploadOptions, UploadResult, upload
from vstack.errors import VstackError
from vstack.local import LocalMesh, LocalNode
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.mesh.registers import chunk_prefix, unpack_chunk

from .cluster import running_mesh

RUNS = 10
SIZE = 40 << 20
FIRST_SEED = int(os.environ.get("VSTACK_SEED", time.time_ns() % 100_000))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "bytes.bin"
    path.write_bytes(Random(1).randbytes(SIZE))
    return path


def start_journaling(mesh: LocalMesh, node: LocalNode) -> None:
    node.start(mesh.peers, detach=False, extra=("--vote-journal", str(node.data) + ".votes"))


@pytest.mark.processes
@pytest.mark.parametrize("run", range(RUNS))
def test_uploads_survive_kills_and_no_register_has_two_chosen_values(
    tmp_path: Path, source: Path, run: int
) -> None:
    seed = FIRST_SEED + run
    print(f"reproduce with VSTACK_SEED={seed} and run 0")
    rng = Random(seed)
    with running_mesh(tmp_path / "mesh") as mesh:
        for node in mesh.nodes:  # again, now with a journal: the mesh is formed before the first kill
            node.stop()
        for node in mesh.nodes:
            start_journaling(mesh, node)
        for node in mesh.nodes:
            node.wait_ready()
        result = asyncio.run(upload_under_fire(mesh, source, rng))
        for node in mesh.nodes:
            node.kill()
        for node in mesh.nodes:
            start_journaling(mesh, node)
        for node in mesh.nodes:
            node.wait_ready()
        copy = tmp_path / "copy.bin"

        async def fetch() -> None:
            async with connect(mesh.peers) as client:
                await download(client, result.video, copy)

        asyncio.run(fetch())
        assert copy.read_bytes() == source.read_bytes()
    assert_one_chosen_value_per_version(mesh)


async def upload_under_fire(mesh: LocalMesh, source: Path, rng: Random) -> UploadResult:
    """Uploads while nodes die and come back; gives up and resumes as a user would."""
    options = UploadOptions(opaque=True, redundancy=rng.choice(("erasure", "replicated")))
    killer = asyncio.create_task(kill_at_random(mesh, rng))
    give_up = rng.random() < 0.3
    try:
        for attempt in range(5):
            async with connect(mesh.peers, patience=30) as client:
                work = asyncio.create_task(upload(client, source, options))
                try:
                    if give_up and attempt == 0:
                        await asyncio.wait({work}, timeout=rng.uniform(0.1, 1.0))
                        work.cancel()
                    result = await work
                except asyncio.CancelledError:
                    await killer
                    await assert_registered_chunks_read_back(mesh, source)
                    continue
                except VstackError as e:
                    print(f"attempt {attempt}: {e}")
                    await killer
                    continue
                await killer
                return result
    finally:
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)
    raise AssertionError("the upload did not end in five attempts, although all nodes were up again")


async def kill_at_random(mesh: LocalMesh, rng: Random) -> None:
    for _ in range(rng.randint(1, 3)):
        await asyncio.sleep(rng.uniform(0.0, 0.8))
        node = rng.choice(mesh.nodes)
        node.kill()
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        start_journaling(mesh, node)
        await asyncio.to_thread(node.wait_ready)


async def assert_registered_chunks_read_back(mesh: LocalMesh, source: Path) -> None:
    """What was registered was acknowledged: it is there, whether the upload went on or not."""
    data = source.read_bytes()
    async with connect(mesh.peers) as client:
        video = await open_upload(client)
        if video is None:
            return
        rows = (await client.list(chunk_prefix(video.id, video.upload))).rows
        async with ChunkFetcher(client, video.id, video.upload) as fetcher:
            for record in [unpack_chunk(row.data) for row in rows]:
                chunk = await fetcher.fetch(record)
                at = record.entry.index * (2 << 20)
                assert chunk.data == data[at : at + (2 << 20)]


async def open_upload(client: MeshClient) -> Video | None:
    for row in (await client.list("video/")).rows:
        return await read_video(client, row.key.removeprefix("video/"))
    return None


def assert_one_chosen_value_per_version(mesh: LocalMesh) -> None:
    """From every Accepted that any node ever gave: one value per ballot, and per version that was chosen."""
    voters: dict[tuple[str, tuple[object, ...]], set[str]] = defaultdict(set)
    values: dict[tuple[str, tuple[object, ...]], set[tuple[int, str]]] = defaultdict(set)
    for node in mesh.nodes:
        for line in Path(f"{node.data}.votes").read_text().splitlines():
            vote = json.loads(line)
            ballot = (vote["key"], tuple(vote["ballot"]))
            voters[ballot].add(vote["node"])
            values[ballot].add((vote["version"], vote["value"]))
    assert values, "no vote was journaled"
    assert all(len(v) == 1 for v in values.values()), "one ballot carried two values"
    chosen: dict[tuple[str, int], set[str]] = defaultdict(set)
    for ballot, nodes in voters.items():
        if len(nodes) >= 3:
            version, value = next(iter(values[ballot]))
            chosen[ballot[0], version].add(value)
    assert chosen, "no register was decided"
    assert all(len(v) == 1 for v in chosen.values()), "a register had two chosen values of one version"


@pytest.mark.processes
def test_a_table_of_chunks_with_a_row_missing_is_refused(tmp_path: Path, source: Path) -> None:
    """The check that makes one answer for a whole table enough: mutated here to see it bite."""

    async def inside(mesh: LocalMesh) -> None:
        async with connect(mesh.peers) as client:
            small = tmp_path / "small.bin"
            small.write_bytes(source.read_bytes()[: 5 << 20])
            result = await upload(client, small, UploadOptions(opaque=True))
            assert len(await chunk_table(client, result.video)) == 3
            real = client.list

            async def without_last(prefix: str) -> object:
                page = await real(prefix)
                page.rows = page.rows[:-1]
                return page

            client.list = without_last  # type: ignore[method-assign, assignment]
            with pytest.raises(VstackError, match="has 2 of 3 rows"):
                await chunk_table(client, result.video)

    with running_mesh(tmp_path / "mesh", 3) as mesh:
        asyncio.run(inside(mesh))
