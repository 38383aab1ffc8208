"""Six nodes from five, and five from six: bytes that move beside the fewest that could, and what is there
meanwhile.

Five `vstack-node` processes on loopback hold cold videos (fragments, 3 of 5) and hot ones (three copies). A
sixth node joins, and is given its share; then one of the first five is drained. All the time every chunk's
register is read, again and again, and every node is asked which of the pieces that registers name it has:
the fewest good pieces that any chunk was ever seen with must be as many as its scheme has.

The ideal of a join is the new node's share of all bytes, by its weight; the ideal of a drain is what the
drained node held. A change is over when every piece lies where placement would have it, and nothing else lies
on any disk.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from decisions import Wrong
from ingest import set_policy
from repair import FREE, distinct, store_bytes

from vstack.cli import interrupt, show
from vstack.client.catalogue import Video
from vstack.client.members import drain, find_member, statuses
from vstack.errors import MeshUnavailable, VstackError
from vstack.local import LocalMesh, LocalNode, free_port
from vstack.mesh.config import NodeId, Policy
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.mesh.placement import takers
from vstack.mesh.registers import ChunkRecord, Place, chunk_key, unpack_chunk
from vstack.node.keeper.plan import ideal

NODES = 5
GRACE = 5
"""Seconds for which pieces stay that no register names any more: a sample must not take longer."""
WITHIN = 240.0
"""Seconds that a change may take."""
PAUSE = 0.1


@dataclass
class Fewest:
    """Of all samples: the fewest good pieces of any chunk, by scheme."""

    schemes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Fewest seen, and how many there are to be."""
    samples: int = 0
    chunks: int = 0
    """Looked at, over all samples."""
    longest: float = 0.0
    """Seconds that a sample took."""
    again: int = 0
    """Chunks that were looked at anew: their register had moved on before its pieces were looked for."""

    def note(self, record: ChunkRecord, good: int) -> None:
        fewest, _ = self.schemes.get(record.scheme.name, (good, 0))
        self.schemes[record.scheme.name] = min(fewest, good), record.scheme.m
        self.chunks += 1

    @property
    def ever_short(self) -> bool:
        return any(fewest < m for fewest, m in self.schemes.values())

    def as_json(self) -> dict[str, object]:
        return {
            "schemes": {name: {"fewest": few, "of": m} for name, (few, m) in sorted(self.schemes.items())},
            "samples": self.samples,
            "chunks": self.chunks,
            "longest_s": round(self.longest, 2),
            "again": self.again,
        }


class Sampler:
    """Samples while the block runs. Raises Wrong at the end if it could not."""

    def __init__(self, mesh: MeshClient, videos: Sequence[Video]) -> None:
        self._mesh = mesh
        self._uploads = {v.id: v.upload for v in videos}
        self.fewest = Fewest()
        self.records: dict[tuple[str, int], ChunkRecord] = {}
        """By video and index, as they were last seen."""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Sampler:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        (ended,) = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended

    async def _run(self) -> None:
        while True:
            await self._sample()
            await asyncio.sleep(PAUSE)

    async def _sample(self) -> None:
        began = time.monotonic()
        page = await self._mesh.list("chunk/")
        records: dict[tuple[str, int], ChunkRecord] = {}
        for row in page.rows:
            record = unpack_chunk(row.data)
            records[row.key.split("/")[1], record.entry.index] = record
        if not page.complete or len(records) < len(self.records):
            raise Wrong("a listing of all chunks was incomplete, with all nodes up")
        self.records = records
        good = await self._good(records)
        for which, record in records.items():
            count = distinct(record, good[which])
            while count < record.scheme.m:  # it may have moved on: then the pieces that it names now count
                now = await self._read(which)
                if now.places == record.places:
                    break
                self.fewest.again += 1
                record = now
                count = distinct(record, (await self._good({which: record}))[which])
            self.fewest.note(record, count)
        self.fewest.samples += 1
        self.fewest.longest = max(self.fewest.longest, time.monotonic() - began)

    async def _read(self, which: tuple[str, int]) -> ChunkRecord:
        video, index = which
        data = (await self._mesh.read(chunk_key(video, self._uploads[video], index))).data
        if data is None:
            raise Wrong(f"chunk {index} of video {video[:12]} is gone")
        return unpack_chunk(data)

    async def _good(
        self, records: Mapping[tuple[str, int], ChunkRecord]
    ) -> dict[tuple[str, int], set[Place]]:
        """The places whose node says that it has the piece, with the hash that the register names."""
        asked: dict[NodeId, list[tuple[tuple[str, int], Place]]] = defaultdict(list)
        for which, record in records.items():
            for place in record.places:
                asked[place.node].append((which, place))
        good: dict[tuple[str, int], set[Place]] = {which: set() for which in records}

        async def one(node: NodeId, places: Sequence[tuple[tuple[str, int], Place]]) -> None:
            keys = [records[w].key(w[0], self._uploads[w[0]], place) for w, place in places]
            try:
                if self._mesh.config.member(node) is None:
                    await self._mesh.refresh()  # it is a newer member than this client knows
                held = await self._mesh.inventory(node, keys)
            except (NoAnswer, Refused) as e:
                raise Wrong(f"node {node[:8]} does not say what it has: {e}") from e
            for (which, place), h in zip(places, held, strict=True):
                if h.state == "present" and h.sha256 == place.sha256:
                    good[which].add(place)

        await asyncio.gather(*(one(node, places) for node, places in asked.items()))
        return good


# -- what lies where ------------------------------------------------------------------------------


async def bytes_held(mesh: MeshClient) -> dict[NodeId, int]:
    """Bytes of pieces on the disk of each member, without headers. Raises NoAnswer, Refused."""
    held: dict[NodeId, int] = {}
    for member in mesh.members:
        held[member.node] = sum(row.payload_bytes for row in await mesh.usage(member.node))
    return held


def spread(held: Mapping[NodeId, int], nodes: Sequence[NodeId]) -> dict[str, float]:
    """Of what some nodes hold. `max_to_mean` is 1 where all hold the same."""
    some = [held.get(n, 0) for n in nodes]
    mean = sum(some) / len(some)
    return {
        "mean_mb": round(mean / 1e6, 1),
        "max_to_mean": round(max(some) / mean, 3),
        "min_to_mean": round(min(some) / mean, 3),
    }


async def until_in_place(mesh: MeshClient, sampler: Sampler, bar: show.Bar) -> None:
    """Returns when every piece is where placement would have it, and no node holds another one. Raises
    MeshUnavailable."""
    deadline = time.monotonic() + WITHIN
    while True:
        usable = takers(mesh.members)
        named: Counter[NodeId] = Counter(p.node for r in sampler.records.values() for p in r.places)
        astray = 0
        for (video, index), record in sampler.records.items():
            wanted = Counter(ideal(video, index, record.scheme, usable))
            astray += (wanted - Counter(p.node for p in record.places)).total()
        bar.update("moving", named.total() - astray, named.total())
        if not astray:
            held = {m.node: sum(row.pieces for row in await mesh.usage(m.node)) for m in mesh.members}
            if all(held[n] == named[n] for n in held):
                return
        if time.monotonic() > deadline:
            raise MeshUnavailable(f"{astray} of {named.total()} pieces are astray after {WITHIN:.0f} s")
        await asyncio.sleep(PAUSE)


async def moved(mesh: MeshClient) -> int:
    """Bytes of pieces that the keepers have written so far."""
    return round(sum(s.keeper.get("bytes_written", 0.0) for s in (await statuses(mesh)).values()))


# -- the run --------------------------------------------------------------------------------------


async def measure(
    local: LocalMesh, newcomer: LocalNode, mesh: MeshClient, folder: Path, size: int, bar: show.Bar
) -> dict[str, object]:
    """The figures. Raises Wrong if redundancy could not be seen, MeshUnavailable if a change does not end."""
    bar.update("storing", 0, 0)
    await set_policy(mesh, Policy(grace=GRACE, repair_delay=GRACE, repair_rate=FREE))
    videos = await store_bytes(mesh, folder, size)
    rows: list[dict[str, object]] = []
    async with Sampler(mesh, videos) as sampler:

        async def change(name: str, best: int, before: Mapping[NodeId, int], written: int) -> None:
            await until_in_place(mesh, sampler, bar)
            done = await moved(mesh) - written
            there = [m.node for m in takers(mesh.members)]
            rows.append(
                {
                    "change": name,
                    "seconds": round(time.monotonic() - began, 1),
                    "moved_mb": round(done / 1e6, 1),
                    "ideal_mb": round(best / 1e6, 1),
                    "moved_to_ideal": round(done / best, 3),
                    "before": spread(before, [n for n in before if before[n]]),
                    "after": spread(await bytes_held(mesh), there),
                    "redundancy": sampler.fewest.as_json(),
                }
            )
            if sampler.fewest.ever_short:
                raise Wrong(f"chunks had fewer pieces than they should: {sampler.fewest.schemes}")
            sampler.fewest = Fewest()

        held, written = await bytes_held(mesh), await moved(mesh)
        began = time.monotonic()
        newcomer.start(local.peers, detach=False)
        await asyncio.to_thread(newcomer.wait_ready)
        await mesh.refresh()
        weights = {m.node: m.weight for m in takers(mesh.members)}
        share = weights[newcomer.node] / sum(weights.values())
        await change("a sixth joins", round(sum(held.values()) * share), held, written)
        held, written = await bytes_held(mesh), await moved(mesh)
        leaver = find_member(mesh.config, local.nodes[0].node)
        began = time.monotonic()
        await drain(mesh, leaver, True)
        await mesh.refresh()
        await change("one is drained", held[leaver.node], held, written)
    return {"changes": rows}


# -- the program ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="benchmarks/balance.py",
        description="A sixth node joins a mesh of five, and one is drained: what moves.",
        epilog="what the figures mean: docs/benchmarks-keeper.md",
    )
    p.add_argument("--size", type=int, default=384, metavar="MIB", help="of all videos (default 384)")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    options = p.parse_args(argv)
    if options.size < 24:
        p.error("--size is at least 24")
    return options


async def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The report."""
    began = time.monotonic()
    port = free_port(NODES + 1)
    newcomer = LocalNode(NODES + 1, f"127.0.0.1:{port + 2 * NODES}", folder / "new", folder / "new.log")
    with LocalMesh(folder / "mesh", NODES, port) as local, show.counting("balance") as bar:
        local.start()
        async with connect(local.peers) as mesh:
            try:
                figures = await measure(local, newcomer, mesh, folder, options.size << 20, bar)
            finally:
                await asyncio.to_thread(newcomer.stop)
    return {
        "nodes": NODES,
        "bytes": options.size << 20,
        **figures,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began, 1),
    }


def print_report(report: dict[str, object]) -> None:
    """The table, on stdout."""
    lines = []
    for row in cast("list[dict[str, object]]", report["changes"]):
        before, after = (cast("dict[str, float]", row[k]) for k in ("before", "after"))
        redundancy = cast("dict[str, object]", row["redundancy"])
        schemes = cast("dict[str, dict[str, int]]", redundancy["schemes"])
        fewest = ", ".join(f"{s['fewest']} of {s['of']}" for s in schemes.values())
        lines.append(
            (
                *(str(row[k]) for k in ("change", "seconds", "moved_mb", "ideal_mb", "moved_to_ideal")),
                f"{before['max_to_mean']:.3f}", f"{after['max_to_mean']:.3f}", fewest,
                str(redundancy["samples"]),
            )
        )  # fmt: skip
    head = ("", "s", "moved MB", "ideal", "ratio", "max/mean before", "after", "fewest pieces", "samples")
    show.table(head, lines, right=(1, 2, 3, 4, 5, 6, 8))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 only if all moved and no chunk ever had fewer pieces than it should."""
    options = parse(argv)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
            report = interrupt.run(run(options, Path(folder)))
        except (VstackError, OSError) as e:
            show.err.print(f"benchmark: {e}", markup=False)
            return e.exit_code if isinstance(e, VstackError) else 1
        except KeyboardInterrupt:
            show.err.print("benchmark: interrupted; its nodes are stopped and its files removed")
            return 130
    if options.json:
        show.print_json(report)
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
