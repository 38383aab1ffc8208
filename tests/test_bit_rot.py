"""Bits rot on the disks of running nodes, and whole superblocks go bad: no reader ever sees it, all is found,
and all is made good."""

from __future__ import annotations

import asyncio
import os
import random
import zlib
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import msgspec
import pytest

from tests.at_rest import at_rest, everybody_answers
from tests.cluster import running_mesh, vstack, wait_for, with_client
from tests.kept import QUICK, content, eventually, figures, put, set_policy, until
from tests.test_store_check import run as vstack_node
from vstack.client.catalogue import Video, chunk_table
from vstack.local import LocalMesh, LocalNode, NodeFailed
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ERASURE, PieceKey
from vstack.node.disk import Disk
from vstack.node.scan import Found, scan
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    FORMAT,
    RECORD_HEADER_BYTES,
    Kind,
    Record,
    read_file_header,
    superblock_numbers,
    superblock_path,
)

KB = 1 << 10


class Lies(NamedTuple):
    """Where a piece lies on a node's disk."""

    superblock: int
    offset: int
    record: Record


def folder_of(node: LocalNode) -> Path:
    return node.data / "store" / "superblocks"


def on_disk(node: LocalNode) -> dict[PieceKey, Lies]:
    """The pieces in the files of a node, which may be running: of each key the record that holds."""
    found: dict[PieceKey, Lies] = {}
    disk, folder = Disk(), folder_of(node)
    for number in superblock_numbers(folder):
        fd = disk.open(superblock_path(folder, number))
        try:
            header = read_file_header(disk, fd)
            if header is None:
                continue
            for item in scan(disk, fd, header.salt, FILE_HEADER_BYTES):
                if isinstance(item, Found) and item.record.kind == Kind.DATA:
                    key = PieceKey.unpack(item.record.key)
                    lies = Lies(number, item.offset, item.record)
                    if key not in found or found[key].record.sequence < item.record.sequence:
                        found[key] = lies
        finally:
            disk.close(fd)
    return found


def rot(node: LocalNode, lies: Lies, rng: random.Random) -> None:
    """Flips one bit of the record: mostly of its payload, sometimes of its header or footer."""
    where = rng.random()
    if where < 0.2:
        at = rng.randrange(RECORD_HEADER_BYTES)
    elif where < 0.25:
        at = lies.record.size - 1 - rng.randrange(8)
    else:
        at = RECORD_HEADER_BYTES + rng.randrange(lies.record.length)
    fd = os.open(superblock_path(folder_of(node), lies.superblock), os.O_RDWR)
    try:
        byte = os.pread(fd, 1, lies.offset + at)[0]
        os.pwrite(fd, bytes([byte ^ 1 << rng.randrange(8)]), lies.offset + at)
    finally:
        os.close(fd)


class Named(NamedTuple):
    """A piece that a register names."""

    node: NodeId
    key: PieceKey
    tolerates: int
    """Pieces of its chunk that may be lost."""

    @property
    def chunk(self) -> tuple[str, int]:
        return self.key.video, self.key.chunk


async def all_named(mesh: MeshClient, videos: list[Video]) -> list[Named]:
    return [
        Named(place.node, record.key(video.id, video.upload, place), record.scheme.m - record.scheme.k)
        for video in videos
        for record in await chunk_table(mesh, video)
        for place in record.places
    ]


async def store_figure(mesh: MeshClient, name: str) -> int:
    """Of all nodes together."""
    statuses = [await mesh.status(member.node) for member in mesh.members]
    return int(sum(status.store[name] for status in statuses))


async def sound_pieces(mesh: MeshClient, named: list[Named]) -> int:
    """How many pieces their holders, having read them just now, say are as they should be."""
    by_node: dict[NodeId, list[PieceKey]] = defaultdict(list)
    for piece in named:
        by_node[piece.node].append(piece.key)
    held = [await mesh.inventory(node, keys, verified_within=0) for node, keys in by_node.items()]
    return sum(answer.state == "present" for some in held for answer in some)


class Readers:
    """Read everything, again and again, until they are told to stop."""

    def __init__(self, mesh: MeshClient, videos: list[tuple[Video, bytes]], folder: Path) -> None:
        self._mesh = mesh
        self._videos = videos
        self._folder = folder
        self.rounds = 0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            for video, data in self._videos:
                assert await content(self._mesh, video, self._folder) == data
            self.rounds += 1

    async def another_round(self) -> None:
        """Returns when everything was read once more, from its beginning; raises what a reader ran into."""
        goal = self.rounds + 2
        async with asyncio.timeout(120):
            while self.rounds < goal and not self._task.done():
                await asyncio.sleep(0.05)
        self.check()

    def check(self) -> None:
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        self.check()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def pick(named: list[Named], spent: set[Named], count: int, rng: random.Random) -> list[Named]:
    """Pieces that have not rotted yet, of each chunk no more than may be lost."""
    rotten: Counter[tuple[str, int]] = Counter()
    out: list[Named] = []
    for piece in rng.sample(named, len(named)):
        if piece not in spent and rotten[piece.chunk] < piece.tolerates and len(out) < count:
            rotten[piece.chunk] += 1
            out.append(piece)
    return out


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> list[int]:
    """Pieces that are to rot in each round."""
    return [200] * 6 if request.config.getoption("--long") else [110] * 3


def test_a_thousand_pieces_with_rotting_bits_are_read_found_and_restored(
    tmp_path: Path, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vstack.client.chunker.OPAQUE_BYTES", 96 * KB)
    rng = random.Random(20)
    began = monotonic()

    async def work(mesh: MeshClient) -> tuple[int, list[tuple[Video, bytes]]]:
        await set_policy(mesh, msgspec.structs.replace(QUICK, undelete=1000))
        size = 16 << 20 if len(rounds) > 3 else 9 << 20
        videos = [await put(mesh, tmp_path, size) for _ in range(2)]
        videos += [await put(mesh, tmp_path, size // 2, redundancy="replicated")]
        await at_rest(mesh)  # a node that was late at first has its share now
        named = await all_named(mesh, [video for video, _ in videos])
        assert len(named) >= 1000
        assert {ERASURE.m - ERASURE.k, 2} == {piece.tolerates for piece in named}
        nodes = {node.node: node for node in local.nodes}
        readers = Readers(mesh, videos, tmp_path)
        spent: set[Named] = set()
        by_scrub = 0
        for count in rounds:
            disks = {node: on_disk(nodes[node]) for node in nodes}
            chosen = pick(named, spent, count, rng)
            assert len(chosen) == count
            for piece in chosen:
                rot(nodes[piece.node], disks[piece.node][piece.key], rng)
            spent |= set(chosen)
            await readers.another_round()
            done = await asyncio.to_thread(vstack, "scrub", "--json", peers=",".join(local.peers))
            assert done.code in (0, 1), done
            by_scrub = await store_figure(mesh, "scrub_damaged")

            async def is_restored() -> bool:
                readers.check()
                if await store_figure(mesh, "quarantined"):
                    return False
                now = await all_named(mesh, [video for video, _ in videos])
                return await sound_pieces(mesh, now) == len(named)

            await eventually(is_restored, within=120)
            assert await store_figure(mesh, "found_damaged") == len(spent), "all of it is found, and no more"
        await readers.another_round()
        await readers.stop()
        assert by_scrub > 0
        for video, data in videos:
            assert await content(mesh, video, tmp_path) == data
            await until(mesh, video, lambda k: k.whole)
        keepers = await figures(mesh)
        assert not keepers.get("unreadable")
        assert not keepers.get("degraded")
        print(
            f"\n{len(named)} pieces; bits of {len(spent)} flipped; found by the scrub {by_scrub}, by readers "
            f"and keepers {len(spent) - by_scrub}; all restored, {keepers['bytes_restored'] / 1e6:.1f} MB; "
            f"everything read {readers.rounds} times meanwhile; {monotonic() - began:.0f} s"
        )
        return len(spent), videos

    with running_mesh(tmp_path / "mesh") as local:
        flipped, videos = with_client(local, work)
        for video, _ in videos:
            done = vstack("verify", video.id, peers=",".join(local.peers))
            assert done.code == 0, done
        scrubbed = vstack("scrub", peers=",".join(local.peers))
        assert scrubbed.code == 0, scrubbed
        assert "no damage" in scrubbed.out
        local.stop()
        dead = 0
        for node in local.nodes:
            checked = vstack_node(node.data, "--check")
            assert checked.returncode == 0, checked.stdout
            assert "damage         none" in checked.stdout
            assert ", 0 quarantined" in checked.stdout
            dead += sum(int(line.split()[2]) for line in checked.stdout.splitlines() if "dead" in line)
        # Two that follow each other without their headers are one place.
        assert 0.9 * flipped < dead <= flipped


# Whole superblocks


def restart(node: LocalNode, mesh: LocalMesh) -> None:
    node.start(mesh.peers, detach=False, extra=mesh.options)
    node.wait_ready()


def in_two_superblocks(node: LocalNode, mesh: LocalMesh) -> None:
    """What the node stores from now on lies in another superblock than what it has."""
    node.kill()
    restart(node, mesh)


@pytest.mark.parametrize("harm", ["garbage", "shorter garbage", "removed"])
def test_what_a_node_loses_with_a_superblock_is_restored_and_it_serves_the_rest(
    tmp_path: Path, harm: str
) -> None:
    async def work(mesh: MeshClient) -> None:
        await set_policy(mesh, msgspec.structs.replace(QUICK, repair_delay=1000, undelete=1000))
        victim = local.nodes[1]
        first = await put(mesh, tmp_path, 6 << 20)
        in_two_superblocks(victim, local)
        await eventually(partial(everybody_answers, mesh))
        second = await put(mesh, tmp_path, 6 << 20)
        videos = [first[0], second[0]]
        for video in videos:
            await until(mesh, video, lambda k: k.whole and k.named[victim.node] == len(k.records))
        victim.stop()
        path = superblock_path(folder_of(victim), 1)
        size = path.stat().st_size
        if harm == "removed":
            path.unlink()
        else:
            path.write_bytes(random.Random(6).randbytes(size if harm == "garbage" else size // 2))
        restart(victim, local)
        await eventually(partial(everybody_answers, mesh))
        there = [piece for piece in await all_named(mesh, [second[0]]) if piece.node == victim.node]
        assert await sound_pieces(mesh, there) == len(there) > 0
        for video, data in (first, second):
            assert await content(mesh, video, tmp_path) == data
        await mesh.hasten(victim.node, "scrub")

        async def is_restored() -> bool:
            named = await all_named(mesh, videos)
            sound = await sound_pieces(mesh, named) == len(named)
            return sound and not await store_figure(mesh, "quarantined")

        await eventually(is_restored, within=120)
        for video, data in (first, second):
            assert await content(mesh, video, tmp_path) == data
            await until(mesh, video, lambda k: k.whole and k.named[victim.node] == len(k.records))
        if harm == "garbage":  # all of it is dead now, and goes like any other
            await asyncio.to_thread(wait_for, lambda: not path.exists())
        victim.stop()
        if harm == "shorter garbage":  # nobody can say what was in it: it is the operator's to remove
            checked = vstack_node(victim.data, "--check")
            assert checked.returncode == 1
            assert "superblock 1 at 0: its header is damaged" in checked.stdout
            path.unlink()
        restart(victim, local)
        await eventually(partial(everybody_answers, mesh))
        assert await is_restored()
        victim.stop()
        checked = vstack_node(victim.data, "--check")
        assert checked.returncode == 0, checked.stdout

    with running_mesh(tmp_path / "mesh") as local:
        with_client(local, work)


def test_a_superblock_of_a_newer_format_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    def all_files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (node.data / "store").rglob("*") if path.is_file()}

    async def fill(mesh: MeshClient) -> tuple[Video, bytes]:
        return await put(mesh, tmp_path, 3 << 20)

    async def is_there(mesh: MeshClient) -> None:
        assert await content(mesh, video, tmp_path) == data

    with running_mesh(tmp_path / "mesh", 1) as local:
        (node,) = local.nodes
        video, data = with_client(local, fill)
        node.stop()
        path = superblock_path(folder_of(node), 1)
        ours = path.read_bytes()
        newer = bytearray(ours)
        for copy in (0, 2048):
            newer[copy + 8 : copy + 10] = (FORMAT + 1).to_bytes(2, "big")
            newer[copy + 60 : copy + 64] = zlib.crc32(newer[copy : copy + 60]).to_bytes(4, "big")
        path.write_bytes(newer)
        before = all_files()
        with pytest.raises(NodeFailed, match=f"superblock 1 has format {FORMAT + 1}.*: update vstack"):
            restart(node, local)
        assert node.stop() == 1
        assert all_files() == before
        for words in (("--check",), ("--rebuild-index",)):
            done = vstack_node(node.data, *words)
            assert done.returncode == 1
            assert "update vstack" in done.stderr
        assert path.read_bytes() == newer
        path.write_bytes(ours)
        restart(node, local)
        with_client(local, is_there)
