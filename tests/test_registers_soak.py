"""Registers of a real mesh under everything at once: kills, pauses, cut links, joins, removals.

Eight clients read, create, replace and delete 200 registers. Every history must be linearizable, no
register may lose its value, and every removed node must end by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random

import pytest

from vstack.client.members import find_member, until_settled
from vstack.errors import MeshUnavailable, OutcomeUnknown, VstackError
from vstack.local import LocalNode, free_port
from vstack.mesh.changes import RemoveMember
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import Op, Outcome, Unknown

from .links import Links
from .sim.linearizability import Try, explains

SEED = int(os.environ.get("VSTACK_SEED", time.time_ns() % 100_000))
CLIENTS = 8
VIDEOS = 40
CHUNKS = 4
FIRST, MOST = 5, 12
"""Nodes at the beginning, and nodes that ever exist."""
THINK = 0.03
"""Mean pause of a client between two operations, in seconds."""


class Soak:
    """The mesh, its clients, its troubles, and the history."""

    def __init__(self, folder: Path, rng: Random) -> None:
        self.folder = folder
        self.rng = rng
        self.begun = self.over = False
        self.links = Links()
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.history: dict[str, list[Try]] = {}
        self.clock = itertools.count(1)
        self.seen: dict[str, int] = {}
        """A version of each key that some client was told."""
        self.keys = list(self._keys())
        base = free_port(2 * MOST)
        self.addresses: dict[str, str] = {}
        self.nodes: list[LocalNode] = []
        self.spare: list[LocalNode] = []
        for i in range(MOST):
            real, shown = base + 2 * i, base + 2 * (MOST + i)
            self.addresses[f"127.0.0.1:{shown}"] = f"127.0.0.1:{real}"
            node = LocalNode(i + 1, f"127.0.0.1:{real}", folder / f"n{i}", folder / f"n{i}.log")
            (self.nodes if i < FIRST else self.spare).append(node)
        self.shown = list(self.addresses)
        self.troubled: set[int] = set()
        """Numbers of the nodes that are down, paused or cut off, or are leaving."""

    def _keys(self) -> Iterator[str]:
        for _ in range(VIDEOS):
            video = f"{self.rng.getrandbits(256):064x}"
            yield f"video/{video}"
            for i in range(CHUNKS):
                yield f"chunk/{video}/1.{1 << 20}/{128 * i:08d}"

    # -- nodes ------------------------------------------------------------------------------------

    def start(self, node: LocalNode) -> None:
        """A founder, a node that was killed, or a new one: it is told of those that are there."""
        peers = (
            [self.shown[n.number - 1] for n in self.nodes if n.alive] if self.begun else self.shown[:FIRST]
        )
        node.start(peers, detach=False, extra=("--advertise", self.shown[node.number - 1]))

    async def begin(self) -> None:
        for shown, real in self.addresses.items():
            await self.links.relay(int(shown.split(":")[1]), int(real.split(":")[1]))
        for node in self.nodes:
            self.start(node)
        for node in self.nodes:
            await asyncio.to_thread(node.wait_ready)
        self.begun = True

    async def stop(self) -> None:
        for node in (*self.nodes, *self.spare):
            node.stop()
        await self.links.stop()

    def client(self) -> AbstractAsyncContextManager[MeshClient]:
        return connect(self.shown, patience=30, address_map=self.addresses)

    # -- troubles ---------------------------------------------------------------------------------

    async def break_things(self) -> None:
        """Never more than two nodes at once: what a group of five survives."""
        while not self.over:
            await asyncio.sleep(self.rng.uniform(0.3, 2.0))
            well = [n for n in self.nodes if n.number not in self.troubled]
            most = min(2 - len(self.troubled), len(well) - 3)
            if most < 1:
                continue
            hit = self.rng.sample(well, self.rng.randint(1, most))
            self.troubled |= {n.number for n in hit}
            try:
                await self.rng.choice((self.kill, self.pause, self.cut))(hit)
            finally:
                self.troubled -= {n.number for n in hit}

    async def kill(self, nodes: list[LocalNode]) -> None:
        self.counts["kills"] += len(nodes)
        for node in nodes:
            node.kill()
        await asyncio.sleep(self.rng.uniform(0.0, 4.0))
        for node in nodes:
            self.start(node)
        for node in nodes:
            await asyncio.to_thread(node.wait_ready)

    async def pause(self, nodes: list[LocalNode]) -> None:
        self.counts["pauses"] += len(nodes)
        pids = [n.process.pid for n in nodes if n.process is not None]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self.rng.uniform(0.2, 4.0))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    async def cut(self, nodes: list[LocalNode]) -> None:
        """Some links of these nodes, in one direction or both."""
        cuts = set()
        for node, other in itertools.product(nodes, self.nodes):
            if node is not other and self.rng.random() < 0.7:
                cuts.add((node.node, self.shown[other.number - 1]))
            if node is not other and self.rng.random() < 0.7:
                cuts.add((other.node, self.shown[node.number - 1]))
        self.counts["cuts"] += len(cuts)
        self.links.cut |= cuts
        await asyncio.sleep(self.rng.uniform(0.2, 4.0))
        self.links.cut -= cuts

    # -- members ----------------------------------------------------------------------------------

    async def change_members(self) -> None:
        """Nodes join and leave, between five and seven of them."""
        while not self.over:
            await asyncio.sleep(self.rng.uniform(0.5, 2.0))
            try:
                if len(self.nodes) < 7 and self.spare and (len(self.nodes) <= 5 or self.rng.random() < 0.5):
                    await self.join()
                elif len(self.nodes) > 5:
                    await self.remove()
            except (MeshUnavailable, OutcomeUnknown) as e:
                self.counts[f"changes that failed ({type(e).__name__})"] += 1

    async def join(self) -> None:
        node = self.spare.pop(0)
        began = time.monotonic()
        self.start(node)
        await asyncio.to_thread(node.wait_ready, 120.0)
        self.nodes.append(node)
        self.counts["joins"] += 1
        self.counts["join ms"] += int(1000 * (time.monotonic() - began))

    async def remove(self) -> None:
        """Once base has passed, the node ends by itself, and nobody misses it."""
        well = [n for n in self.nodes if n.number not in self.troubled]
        if not well or len(self.troubled) > 1:
            return
        node = self.rng.choice(well)
        self.troubled.add(node.number)
        began = time.monotonic()
        try:
            async with self.client() as mesh:
                member = find_member(mesh.config, node.node)
                while True:
                    try:
                        await mesh.change_mesh(RemoveMember(member.node))
                        break
                    except VstackError:
                        if mesh.config.member(node.node) is None:
                            break
                        if time.monotonic() > began + 120:
                            raise
                        await asyncio.sleep(0.5)
                        await mesh.refresh()
            while node.alive:
                assert time.monotonic() < began + 120, f"node {node.number} does not leave"
                await asyncio.sleep(0.05)
            assert node.stop() == 0, node.last_words()
            self.counts["removals"] += 1
            self.counts["removal ms"] += int(1000 * (time.monotonic() - began))
            self.nodes.remove(node)
            shutil.rmtree(node.data)  # it comes back as another one
            self.spare.append(node)
        finally:
            self.troubled.discard(node.number)

    # -- clients ----------------------------------------------------------------------------------

    async def use(self, number: int) -> None:
        rng = Random(self.rng.getrandbits(64))
        while not self.over:
            try:
                async with self.client() as mesh:
                    for _ in range(400):
                        if self.over:
                            return
                        await self.operate(mesh, rng, number)
                        await asyncio.sleep(rng.expovariate(1 / THINK))
            except MeshUnavailable:
                self.counts["connections that failed"] += 1

    async def operate(self, mesh: MeshClient, rng: Random, number: int) -> None:
        key = rng.choice(self.keys)
        kind = rng.choices(("read", "create", "replace", "delete"), (45, 15, 30, 10))[0]
        op = Op(os.urandom(16), key, 1)
        if kind != "read":
            expect = 0 if kind == "create" else max(0, self.seen.get(key, 0) - (rng.random() < 0.1))
            data = None if kind == "delete" else b"%d.%d" % (number, next(self.clock))
            op = Op(op.id, key, 1, expect, data)
        attempt = Try(op, next(self.clock))
        self.history.setdefault(key, []).append(attempt)
        began = time.monotonic()
        try:
            if op.expect is None:
                outcome: Outcome = await mesh.read(key)
            else:
                outcome = await mesh.change(Change(key, op.expect, op.data, op.id))
        except (OutcomeUnknown, MeshUnavailable) as e:
            outcome = Unknown(str(e)[:200])
        attempt.returned, attempt.outcome = next(self.clock), outcome
        if isinstance(outcome, Unknown):
            self.counts["unknown outcomes"] += 1
        else:
            self.latencies.append(time.monotonic() - began)
            self.seen[key] = outcome.version
            self.counts[type(outcome).__name__] += 1

    # -- the end ----------------------------------------------------------------------------------

    async def read_everything(self) -> None:
        """With all nodes up: what the history left open is seen now."""
        async with self.client() as mesh:
            async for _ in until_settled(mesh):
                pass
            for key in self.keys:
                op = Op(os.urandom(16), key, 1)
                attempt = Try(op, next(self.clock))
                attempt.outcome = await mesh.read(key)
                attempt.returned = next(self.clock)
                self.history.setdefault(key, []).append(attempt)

    def report(self) -> str:
        done = sorted(self.latencies)
        answered = len(done) / max(1, len(done) + self.counts["unknown outcomes"])

        def percentile(p: float) -> float:
            return done[min(len(done) - 1, int(p * len(done)))]

        return (
            f"{len(done)} operations answered, {answered:.2%} of all; within 1 s "
            f"{sum(t < 1 for t in done) / len(done):.2%}; p50 {percentile(0.5) * 1000:.1f} ms, "
            f"p99 {percentile(0.99) * 1000:.0f} ms, max {done[-1]:.1f} s; {dict(self.counts)}"
        )


@pytest.mark.processes
@pytest.mark.alone
@pytest.mark.timeout(1500)
def test_registers_stay_linearizable_under_kills_pauses_cuts_joins_and_removals(
    tmp_path: Path, registers_soak_seconds: float
) -> None:
    print(f"reproduce with VSTACK_SEED={SEED}")

    async def inside(soak: Soak) -> None:
        await soak.begin()
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(soak.use(number))
                group.create_task(soak.break_things())
                group.create_task(soak.change_members())
                await asyncio.sleep(registers_soak_seconds)
                soak.over = True
            await soak.read_everything()
        finally:
            await soak.stop()

    soak = Soak(tmp_path, Random(SEED))
    asyncio.run(inside(soak))
    print(soak.report())
    for key, history in soak.history.items():
        assert explains(history), f"VSTACK_SEED={SEED}: the history of {key} is not linearizable"
    for kind in ("Ok", "Mismatch", "Found", "kills", "pauses", "cuts", "joins", "removals"):
        assert soak.counts[kind], f"no {kind} in this run"
