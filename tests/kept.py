"""For tests of what nodes keep: quick policies, looking at what there is, waiting until it is in order."""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from vstack.client.catalogue import Video, chunk_table, read_video
from vstack.client.downloader import download
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import VstackError
from vstack.mesh.changes import SetPolicy
from vstack.mesh.config import NodeId, Policy
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ChunkRecord, init_record

QUICK = Policy(grace=2, repair_delay=3, undelete=4, repair_rate=1 << 30)
"""Everything within seconds."""


async def set_policy(mesh: MeshClient, policy: Policy = QUICK) -> None:
    if mesh.config.policy != policy:
        await mesh.change_mesh(SetPolicy(policy))
        await mesh.refresh()


async def put(mesh: MeshClient, folder: Path, size: int, **options: object) -> tuple[Video, bytes]:
    """Stores random bytes; the video and the bytes."""
    data = os.urandom(size)
    path = folder / f"source-{os.urandom(4).hex()}"
    path.write_bytes(data)
    stored = await upload(mesh, path, UploadOptions(opaque=True, **options))  # type: ignore[arg-type]
    return stored.video, data


async def content(mesh: MeshClient, video: Video, folder: Path) -> bytes:
    """All of its bytes, as a reader gets them."""
    path = folder / f"got-{os.urandom(4).hex()}"
    now = await read_video(mesh, video.id)
    assert now is not None
    await download(mesh, now, path)
    data = path.read_bytes()
    path.unlink()
    return data


class Kept(NamedTuple):
    """What registers name of a video, and what lies on the disks of live nodes."""

    records: list[ChunkRecord]
    """The init segment's, if there is one, and the chunks'."""
    named: Counter[NodeId]
    """Pieces that registers name, by node."""
    held: Counter[NodeId]
    """Pieces on the disk of each node that answers."""
    record_bytes: int
    """On all of them: headers, payloads, padding, footers."""

    @property
    def schemes(self) -> set[str]:
        return {r.scheme.name for r in self.records}

    @property
    def whole(self) -> bool:
        """Every piece of every scheme is named, and nothing else lies on any disk."""
        full = all(len(r.places) == r.scheme.m for r in self.records)
        return full and {n: c for n, c in self.named.items() if n in self.held or c} == {
            n: c for n, c in self.held.items() if c
        }


async def look(mesh: MeshClient, video: Video) -> Kept:
    now = await read_video(mesh, video.id)
    records: list[ChunkRecord] = []
    if now is not None and now.record.state != "uploading":
        records = await chunk_table(mesh, now)
        if now.record.init is not None:
            records.append(init_record(now.record.init))
    named = Counter(p.node for r in records for p in r.places)
    held: Counter[NodeId] = Counter()
    size = 0
    for member in mesh.members:
        try:
            rows = [row for row in await mesh.usage(member.node) if row.video == video.id]
        except VstackError:
            continue
        held[member.node] = sum(row.pieces for row in rows)
        size += sum(row.record_bytes for row in rows)
    return Kept(records, named, held, size)


async def until(
    mesh: MeshClient, video: Video, condition: Callable[[Kept], bool], within: float = 150.0
) -> Kept:
    """What is kept once `condition` holds; fails the test when it does not in time."""
    deadline = monotonic() + within
    while True:
        try:
            kept = await look(mesh, video)
            if condition(kept):
                return kept
            why = f"{kept.schemes} named {dict(kept.named)} held {dict(kept.held)}"
        except VstackError as e:
            why = str(e)
        if monotonic() > deadline:
            raise AssertionError(f"not so within {within} s: {why}; {await figures(mesh)}")
        await asyncio.sleep(0.2)


async def eventually(condition: Callable[[], Awaitable[bool]], within: float = 150.0) -> None:
    """Returns once `condition` holds; fails the test when it does not in time."""
    deadline = monotonic() + within
    while not await condition():
        assert monotonic() < deadline, f"not so within {within} s"
        await asyncio.sleep(0.2)


async def figures(mesh: MeshClient) -> dict[str, float]:
    """What the keepers of all nodes that answer say, added up."""
    total: dict[str, float] = defaultdict(float)
    for member in mesh.members:
        try:
            status = await mesh.status(member.node)
        except VstackError:
            continue
        for name, value in status.keeper.items():
            total[name] += value
    return dict(total)
