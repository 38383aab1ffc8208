"""A video crosses a thousand views and is kept as copies, and later as fragments again, while it is read all
the time and nodes are killed at random. No byte is lost, no read fails, and nothing is left over.

VSTACK_SEED sets the first seed; otherwise the day does. `--long` makes a hundred runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import msgspec
import pytest

from tests.cluster import running_mesh, with_client
from tests.kept import QUICK, content, put, set_policy, until
from vstack.client.catalogue import Video, chunk_table, read_video, views
from vstack.client.fetcher import ChunkFetcher
from vstack.errors import VstackError
from vstack.local import LocalMesh
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ERASURE, REPLICATED

pytestmark = [pytest.mark.processes, pytest.mark.timeout(7200)]

BASE = int(os.environ.get("VSTACK_SEED") or datetime.now(UTC).strftime("%Y%m%d00"))
SHORT = 2
LONG = 100
RUNS_A_MESH = 10
VIEWS = 1001
HOT = msgspec.structs.replace(QUICK, repair_delay=6, grace=2)
COLD = msgspec.structs.replace(HOT, hot_views=10 * VIEWS)
"""With this policy, a thousand views are few."""


@dataclass
class Figures:
    runs: int = 0
    reads: int = 0
    kills: int = 0
    failed: list[str] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    """Record bytes over chunk bytes."""
    cold: list[float] = field(default_factory=list)


async def read_always(mesh: MeshClient, video: Video, data: bytes, figures: Figures, rng: Random) -> None:
    """Reads chunks at random by what was known of them a moment ago, as a player does."""
    while True:
        try:
            table = await chunk_table(mesh, video)
            async with ChunkFetcher(mesh, video.id, video.upload) as fetcher:
                for _ in range(10):
                    record = rng.choice(table)
                    chunk = await fetcher.fetch(record)
                    begin = record.entry.index * 2 * 1024 * 1024
                    if chunk.data != data[begin : begin + record.entry.size]:
                        figures.failed.append(f"chunk {record.entry.index} has other bytes")
                    figures.reads += 1
                    await asyncio.sleep(rng.uniform(0, 0.1))
        except VstackError as e:
            figures.failed.append(f"{type(e).__name__}: {e}")


async def kill_at_random(local: LocalMesh, figures: Figures, rng: Random, over: asyncio.Event) -> None:
    """At most two of five are down at once; all are up in the end."""
    down: list[int] = []
    while not over.is_set() or down:
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), rng.uniform(0.2, 1.5))
        if down and (over.is_set() or len(down) == 2 or rng.random() < 0.5):
            node = local.nodes[down.pop(rng.randrange(len(down)))]
            node.start(local.peers, detach=False, extra=local.options)
            await asyncio.to_thread(node.wait_ready)
        elif not over.is_set():
            which = rng.choice([i for i in range(5) if i not in down])
            await asyncio.to_thread(local.nodes[which].kill)
            figures.kills += 1
            down.append(which)


async def watch(mesh: MeshClient, video: str) -> None:
    """More than a thousand views: those that a killed node had not written yet are lost, and seen again."""
    seen = 0
    while seen < VIEWS:
        for _ in range(0, VIEWS - seen, 50):
            await asyncio.gather(*(mesh.viewed(video, os.urandom(16)) for _ in range(50)))
        await asyncio.sleep(0.5)
        with suppress(VstackError):
            seen = await views(mesh, video)


async def one_run(mesh: MeshClient, local: LocalMesh, folder: Path, seed: int, figures: Figures) -> None:
    rng = Random(seed)
    await set_policy(mesh, HOT)
    video, data = await put(mesh, folder, rng.randrange(3 << 20, 9 << 20))
    reader = asyncio.create_task(read_always(mesh, video, data, figures, rng))
    over = asyncio.Event()
    killer = asyncio.create_task(kill_at_random(local, figures, rng, over))
    try:
        await watch(mesh, video.id)
        await until(mesh, video, lambda k: k.schemes == {REPLICATED.name}, within=120)
        over.set()
        await killer
        hot = await until(mesh, video, lambda k: k.whole and k.schemes == {REPLICATED.name}, within=120)
        over.clear()
        killer = asyncio.create_task(kill_at_random(local, figures, rng, over))
        await asyncio.sleep(rng.uniform(0, 2))
        await set_policy(mesh, COLD)
        await until(mesh, video, lambda k: k.schemes == {ERASURE.name}, within=120)
        over.set()
        await killer
        cold = await until(mesh, video, lambda k: k.whole and k.schemes == {ERASURE.name}, within=120)
    finally:
        over.set()
        reader.cancel()
        await asyncio.gather(reader, killer, return_exceptions=True)
    assert await content(mesh, video, folder) == data
    figures.hot.append(hot.record_bytes / len(data))
    figures.cold.append(cold.record_bytes / len(data))
    figures.runs += 1
    now = await read_video(mesh, video.id)
    assert now is not None
    assert not figures.failed, f"seed {seed}: {figures.failed}"


def test_nothing_is_lost_while_videos_become_hot_and_cold_and_nodes_die(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    count = LONG if request.config.getoption("--long") else SHORT
    figures = Figures()

    async def work(mesh: MeshClient) -> None:
        for seed in seeds:
            try:
                await one_run(mesh, local, tmp_path, seed, figures)
            except BaseException:
                print(f"VSTACK_SEED={seed} repeats this run")
                raise

    for first in range(BASE, BASE + count, RUNS_A_MESH):
        seeds = range(first, min(first + RUNS_A_MESH, BASE + count))
        with running_mesh(tmp_path / f"mesh-{first}") as local:
            with_client(local, work)
        shutil.rmtree(tmp_path / f"mesh-{first}")
        with capsys.disabled():
            print(f"\n{figures.runs} runs, {figures.kills} kills, {figures.reads} chunks read", flush=True)
    with capsys.disabled():
        print(
            f"{len(figures.failed)} reads failed; hot {min(figures.hot):.3f} to {max(figures.hot):.3f}, "
            f"cold {min(figures.cold):.3f} to {max(figures.cold):.3f}, "
            f"at least {min(1 - c / h for c, h in zip(figures.cold, figures.hot, strict=True)):.1%} saved"
        )
    assert figures.runs == count
    assert figures.kills
    assert min(figures.hot) >= 3.0
    assert max(figures.hot) < 3.01
    assert max(figures.cold) <= 1.70
    assert all(1 - c / h >= 0.43 for c, h in zip(figures.cold, figures.hot, strict=True))
