"""What a dead leader, a join and a removal cost the others: latencies before, during and after.

    .venv/bin/python benchmarks/members.py [--seconds 5] [--keys 2000] [--json]

A mesh of five on loopback, with fsync on. First the implicit leader of some chunks is killed while
creates go on everywhere; then, in a fresh mesh, a sixth node joins and one is removed, once without
other work (messages per key that moves) and once under load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic

from vstack.client.members import find_member, until_settled
from vstack.errors import MeshUnavailable, OutcomeUnknown
from vstack.local import LocalMesh, LocalNode, free_port
from vstack.mesh.changes import RemoveMember
from vstack.mesh.config import Config, NodeId, group, leader
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import Ok
from vstack.mesh.registers import UploadId, chunk_key, video_key

WORKERS = 8
DATA = bytes(240)


@dataclass
class Load:
    """Creates of chunk registers by WORKERS clients' tasks, each through its implicit leader."""

    mesh: MeshClient
    rng: Random
    started: list[tuple[float, float, NodeId]] = field(default_factory=list)
    """(when it began, how long it took in seconds, the chunk's leader) of each create that was done."""
    doubtful: int = 0
    retried: int = 0
    over: bool = False

    async def run(self) -> None:
        await asyncio.gather(*(self._work() for _ in range(WORKERS)))

    async def _work(self) -> None:
        while not self.over:
            video = f"{self.rng.getrandbits(256):064x}"
            epoch = self.mesh.config.epoch
            key = chunk_key(video, UploadId(epoch, (epoch << 20) + 1), 128 * self.rng.randrange(5))
            first = leader(self.mesh.config, key) or ""
            began = monotonic()
            change = Change(key, 0, DATA)
            done: object = None
            try:
                done = await self.mesh.change(change)
            except (OutcomeUnknown, MeshUnavailable):
                self.retried += 1
                done = await self._again(change)
            if isinstance(done, Ok):
                self.started.append((began, monotonic() - began, first))

    async def _again(self, change: Change) -> object:
        """A retry with the same id: it applies once."""
        try:
            return await self.mesh.change(change)
        except (OutcomeUnknown, MeshUnavailable):
            self.doubtful += 1
            return None

    def latencies(self, begin: float, end: float, which: Callable[[NodeId], bool]) -> list[float]:
        return sorted(t for at, t, who in self.started if begin <= at < end and which(who))


def percentile(values: Sequence[float], p: float) -> float | None:
    """In milliseconds; None without values."""
    return round(1000 * values[min(len(values) - 1, int(p * len(values)))], 1) if values else None


def three(load: Load, marks: Sequence[float], which: Callable[[NodeId], bool]) -> dict[str, object]:
    """Before, during and after an event, between four marks."""
    out: dict[str, object] = {}
    for name, begin, end in zip(("before", "during", "after"), marks[:-1], marks[1:], strict=True):
        found = load.latencies(begin, end, which)
        out[name] = {
            "creates": len(found), "p50_ms": percentile(found, 0.5), "p99_ms": percentile(found, 0.99),
            "max_ms": percentile(found, 1.0),
        }  # fmt: skip
    return out


async def kill_the_leader(local: LocalMesh, seconds: float) -> dict[str, object]:
    """The implicit leader of some chunks dies: what happens to creates of its chunks, and of others."""
    async with connect(local.peers) as mesh:
        load = Load(mesh, Random(1))
        work = asyncio.create_task(load.run())
        begin = monotonic()
        await asyncio.sleep(seconds)
        victim = local.nodes[0]
        killed = monotonic()
        victim.kill()
        await asyncio.sleep(2.0)
        settled = monotonic()
        await asyncio.sleep(seconds)
        load.over = True
        await work
        marks = (begin, killed, settled, monotonic())
        its = [at + took for at, took, who in load.started if who == victim.node and at >= killed]
        return {
            "first_create_of_its_chunks_after_s": round(min(its) - killed, 3) if its else None,
            "its_chunks": three(load, marks, lambda n: n == victim.node),
            "other_chunks": three(load, marks, lambda n: n != victim.node),
            "retried": load.retried,
            "doubtful": load.doubtful,
        }


async def items_sent(mesh: MeshClient, nodes: Sequence[NodeId]) -> int:
    """Paxos messages that the nodes have sent to each other since they started."""
    total = 0
    for node in nodes:
        counters = (await mesh.status(node)).counters
        total += sum(v for k, v in counters.items() if k.startswith("sent.item."))
    return total


async def join_and_remove(
    local: LocalMesh, newcomer: LocalNode, keys: int, *, loaded: bool
) -> dict[str, object]:
    """A node joins and another leaves; with or without other work meanwhile."""
    async with connect(local.peers) as mesh:
        rng = Random(2)
        videos = [f"{rng.getrandbits(256):064x}" for _ in range(keys)]
        for part in range(0, keys, 200):
            await mesh.change_all([Change(video_key(v), 0, DATA) for v in videos[part : part + 200]])
        load = Load(mesh, rng)
        work = asyncio.create_task(load.run()) if loaded else None
        begin = monotonic()
        await asyncio.sleep(2.0 if loaded else 0.0)
        figures: dict[str, object] = {}

        async def change(name: str, work: Callable[[], object], old: Config, members: list[NodeId]) -> None:
            before = await items_sent(mesh, members)
            since = monotonic()
            done = work()
            if asyncio.iscoroutine(done):
                await done
            decided = monotonic()
            async for _ in until_settled(mesh):
                pass
            over = monotonic()
            now = mesh.config
            moved = sum(group(old, v) != group(now, v) for v in videos)
            there = [n for n in members if now.member(n) is not None] + [
                n for n in now.nodes if n not in members
            ]
            cost: dict[str, object] = {
                "seconds_until_decided": round(decided - since, 3),
                "seconds_until_votes_have_moved": round(over - since, 3),
                "keys": keys,
                "keys_moved": moved,
            }
            if loaded:
                cost["creates"] = three(load, (begin, since, over, monotonic()), lambda n: True)
            else:
                sent = await items_sent(mesh, there) - before
                cost["messages_per_key_moved"] = round(sent / max(1, moved), 1)
            figures[name] = cost

        def join() -> None:
            newcomer.start(local.peers, detach=False)
            newcomer.wait_ready()

        await change("join", lambda: asyncio.to_thread(join), mesh.config, list(mesh.config.nodes))
        await mesh.refresh()
        leaver = find_member(mesh.config, local.nodes[0].node)
        rest = [n for n in mesh.config.nodes if n != leaver.node]
        await change("removal", lambda: mesh.change_mesh(RemoveMember(leaver.node)), mesh.config, rest)
        await asyncio.sleep(2.0 if loaded else 0.0)
        load.over = True
        if work is not None:
            await work
            figures["retried"], figures["doubtful"] = load.retried, load.doubtful
            figures["creates_done"] = len(load.started)
        return figures


def run(seconds: float, keys: int) -> dict[str, object]:
    """All three, in one folder that is gone afterwards."""
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="vstack-members-") as name:
        folder = Path(name)
        with LocalMesh(folder / "leader", 5, free_port(5)) as local:
            local.start()
            results["leader_killed"] = asyncio.run(kill_the_leader(local, seconds))
        for loaded in (False, True):
            what = "join_and_removal_under_load" if loaded else "join_and_removal"
            port = free_port(6)
            with LocalMesh(folder / what, 5, port) as local:
                local.start()
                newcomer = LocalNode(
                    6, f"127.0.0.1:{port + 10}", folder / what / "n6", folder / what / "n6.log"
                )
                try:
                    results[what] = asyncio.run(join_and_remove(local, newcomer, keys, loaded=loaded))
                finally:
                    newcomer.stop()
    return results


def show(value: object, indent: int = 0) -> None:
    """Nested figures as text."""
    assert isinstance(value, dict)
    for key, inner in value.items():
        if isinstance(inner, dict) and not all(isinstance(v, int | float | None) for v in inner.values()):
            print(f"{'  ' * indent}{key}")
            show(inner, indent + 1)
        elif isinstance(inner, dict):
            print(f"{'  ' * indent}{key:<14} " + "  ".join(f"{k} {v}" for k, v in inner.items()))
        else:
            print(f"{'  ' * indent}{key:<40} {inner}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of load before and after the kill")
    parser.add_argument("--keys", type=int, default=2000, help="registers in the mesh that changes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run(options.seconds, options.keys)
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
    else:
        show(results)


if __name__ == "__main__":
    main()
