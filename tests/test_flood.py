"""A node that is flooded with nonsense stays up, stays small, and goes on serving everybody else.

The flooder is a process of its own that is held to a fifth of a core (`tests/flooder.py`). What it costs
other clients is compared with what the same processor time costs them when it is spent on nothing, in
phases that take turns, because the machine is shared.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vstack.errors import VstackError
from vstack.local import LocalMesh, LocalNode
from vstack.mesh.changes import Authorise
from vstack.mesh.config import Grant
from vstack.mesh.keys import load_mesh_public, new_client
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import GetStatus, Header, Outcomes, Status, Submit, Unknown, encode
from vstack.mesh.messages import Op as Operation
from vstack.mesh.transport import MAX_SESSIONS

from .cluster import running_mesh, wait_for, with_client
from .flooder import HELLO, message, shake_hands

pytestmark = [pytest.mark.processes, pytest.mark.alone]

SHARE = 0.2
"""Of one core."""
PHASE = 2.5
"""Seconds of one phase."""
THINK = 0.004
"""Seconds between two operations of the load, so that it leaves the machine some room."""
MOST_GROWTH = 256 << 20
"""Bytes by which a flooded node may grow: what one flooder of a fifth of a core was seen to cost is less
than half of it."""
ATTEMPTS = 5
"""Measurements before a ratio is believed: others use this machine too."""


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    with running_mesh(tmp_path / "mesh", 3) as mesh:
        yield mesh


def resident(node: LocalNode) -> int:
    """Bytes of memory of a node's process."""
    assert node.process is not None
    pages = Path(f"/proc/{node.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def counters(mesh: LocalMesh, node: LocalNode) -> dict[str, int]:
    """What a node has counted, once it answers. Fails if it does not within 20 s."""
    found: list[Status] = []

    async def ask(client: MeshClient) -> Status:
        return await client.status(node.node)

    def answers() -> bool:
        try:
            found.append(with_client(mesh, ask))
        except VstackError:
            return False
        return True

    wait_for(answers)
    return found[0].counters


def start_flooder(node: LocalNode, *words: str) -> subprocess.Popen[str]:
    port = node.address.rpartition(":")[2]
    command = [sys.executable, "-m", "tests.flooder", port, "--share", str(SHARE), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    did = json.loads(out)
    assert isinstance(did, dict)
    return did


@dataclass
class Load:
    """Reads and changes of registers: one after the other, through each node at the same time."""

    mesh: LocalMesh
    client: MeshClient
    latencies: dict[str, list[float]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float) -> None:
        """Forgets what it measured before."""
        self.latencies = {n.node: [] for n in self.mesh.nodes}
        keys = [f"video/{os.urandom(32).hex()}" for _ in self.mesh.nodes]
        await self.client.change_all([Change(key, 0, b"x" * 100) for key in keys])
        until = time.monotonic() + seconds
        await asyncio.gather(
            *(self._through(n.node, k, until) for n, k in zip(self.mesh.nodes, keys, strict=True))
        )

    async def _through(self, node: str, key: str, until: float) -> None:
        version = (await self.client.read(key)).version
        turn = 0
        while (began := time.monotonic()) < until:
            turn += 1
            expect = None if turn % 2 else version
            op = Operation(
                os.urandom(16), key, self.client.config.epoch, expect, None if turn % 2 else b"y" * 100
            )
            try:
                answer = await self.client.ask(node, Submit((op,)), timeout=10)
            except VstackError as e:
                self.failures[f"{node[:4]}: {e}"] += 1
                await asyncio.sleep(THINK)
                continue
            outcomes = answer.header.body
            assert isinstance(outcomes, Outcomes)
            if isinstance(outcomes.outcomes[0], Unknown):
                self.failures[f"{node[:4]}: outcome unknown"] += 1
            else:
                version = outcomes.outcomes[0].version
            self.latencies[node].append(time.monotonic() - began)
            await asyncio.sleep(THINK)

    def p99(self, node: str) -> float:
        """Milliseconds."""
        found = self.latencies[node]
        assert len(found) > 20, (len(found), self.failures)
        return statistics.quantiles(found, n=100)[98] * 1000


@dataclass
class Measured:
    """Medians over the rounds, in milliseconds: by phase, then by where the client's requests went."""

    p99: dict[str, dict[str, float]]
    flood: dict[str, float]
    samples: int
    failures: Counter[str]
    largest: int
    """Bytes of memory of the flooded node, at most, at the end of a phase."""

    @property
    def ratios(self) -> dict[str, float]:
        return {where: self.p99["flood"][where] / self.p99["spin"][where] for where in self.p99["spin"]}


async def measure(mesh: LocalMesh, rounds: int, *words: str) -> Measured:
    """Quiet, spinning and flooded phases in turn, with the same load in each, on connections that last."""
    flooded = mesh.nodes[0]
    flood: dict[str, float] = {}
    seen: dict[str, dict[str, list[float]]] = {p: {} for p in ("quiet", "spin", "flood")}
    samples, largest = 0, 0
    async with connect(mesh.peers, keys=mesh.client_key) as client:
        load = Load(mesh, client)
        await load.run(PHASE)
        for turn in range(rounds):
            for phase, found in seen.items():
                process = None
                if phase != "quiet":
                    options = ["--spin"] if phase == "spin" else [*words, "--seed", str(turn)]
                    process = start_flooder(flooded, "--seconds", str(PHASE + 0.5), *options)
                await load.run(PHASE)
                if process is not None:
                    did = await asyncio.to_thread(finish, process)
                    if phase == "flood":
                        flood = {k: flood.get(k, 0) + did.get(k, 0) for k in flood | did}
                largest = max(largest, resident(flooded))
                samples += sum(map(len, load.latencies.values()))
                found.setdefault("flooded node", []).append(load.p99(flooded.node))
                found.setdefault("other nodes", []).append(max(load.p99(n.node) for n in mesh.nodes[1:]))
                await asyncio.to_thread(counters, mesh, flooded)  # it has taken all that was sent
    medians = {p: {w: statistics.median(v) for w, v in found.items()} for p, found in seen.items()}
    flood["share"] /= rounds
    return Measured(medians, flood, samples, load.failures, largest)


def show(measured: Measured, counted: dict[str, int], before: int) -> str:
    names = (
        "malformed",
        "dropped_unread",
        "hello_required",
        "hung_up",
        "shut",
        "handshakes_failed",
        "dropped",
    )
    return (
        f"p99 in ms {measured.p99}, ratios {measured.ratios}, {measured.samples} operations, "
        f"failures {dict(measured.failures)}; sent {measured.flood}; "
        f"counted { {k: counted[k] for k in names if k in counted} }; "
        f"memory {before >> 20} -> at most {measured.largest >> 20} MiB"
    )


def flood_until(mesh: LocalMesh, messages: int, disconnects: int, *words: str) -> dict[str, float]:
    """Floods the first node until so much was sent in all."""
    total: dict[str, float] = {"messages": 0, "disconnects": 0}
    deadline = time.monotonic() + 240
    turn = 0
    while total["messages"] < messages or total["disconnects"] < disconnects:
        assert time.monotonic() < deadline, total
        turn += 1
        for k, v in finish(
            start_flooder(mesh.nodes[0], "--seconds", "4", "--seed", str(turn), *words)
        ).items():
            total[k] = total.get(k, 0) + v
    return total


def test_malformed_messages_and_random_disconnects_do_not_end_a_node_nor_make_it_grow(
    mesh: LocalMesh, request: pytest.FixtureRequest
) -> None:
    """`--long`: a million messages and a thousand disconnects."""
    messages, disconnects = (1_000_000, 1000) if request.config.getoption("--long") else (50_000, 100)
    node = mesh.nodes[0]
    before = resident(node)
    sent = flood_until(mesh, messages, disconnects, "--mean", "500")
    counted = counters(mesh, node)
    print(sent, {k: v for k, v in counted.items() if "." not in k}, before >> 20, resident(node) >> 20)
    assert all(n.alive for n in mesh.nodes)
    assert resident(node) < before + MOST_GROWTH
    assert counted["malformed"] > 100
    assert counted["hung_up"] > 0
    assert "Traceback" not in node.log.read_text()


def hold_flood_to_twice(mesh: LocalMesh, rounds: int, *words: str) -> None:
    """Fails if a flood costs other clients more than twice what its processor time costs them anyway."""
    before = resident(mesh.nodes[0])
    said = []
    for _ in range(ATTEMPTS):
        measured = asyncio.run(measure(mesh, rounds, *words))
        said.append(show(measured, counters(mesh, mesh.nodes[0]), before))
        print(said[-1])
        assert all(n.alive for n in mesh.nodes)
        assert measured.largest < before + MOST_GROWTH
        assert not measured.failures
        if max(measured.ratios.values()) <= 2:
            return
    pytest.fail("\n".join(said))


def test_a_flood_costs_others_no_more_than_twice_what_its_processor_time_costs_them(
    mesh: LocalMesh, request: pytest.FixtureRequest
) -> None:
    hold_flood_to_twice(mesh, 9 if request.config.getoption("--long") else 3)


def test_a_reader_with_a_key_that_floods_costs_no_more_either(tmp_path: Path) -> None:
    """With CURVE: only who has a key gets as far as to send messages."""
    with running_mesh(tmp_path / "mesh", 3, keys=tmp_path / "keys") as mesh:
        reader = new_client(tmp_path / "reader.key", load_mesh_public(tmp_path / "keys"), "reader")

        async def authorise(client: MeshClient) -> None:
            await client.change_mesh(Authorise(Grant(reader.pair.public, "reader", "reader")))

        with_client(mesh, authorise)
        hold_flood_to_twice(mesh, 3, "--key", str(tmp_path / "reader.key"))


# -- slow and silent peers ------------------------------------------------------------------------


def test_sessions_of_connections_that_ended_leave_room_for_others(mesh: LocalMesh) -> None:
    """More hellos, each on a connection of its own, than a node has sessions."""
    count = MAX_SESSIONS + 500
    port = int(mesh.nodes[0].address.rpartition(":")[2])
    hello = message(bytes(8), encode(Header(HELLO)))
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
            shake_hands(s)
            s.sendall(hello)
            assert s.recv(1024)
    counted = counters(mesh, mesh.nodes[0])
    assert "sessions_full" not in counted
    assert counted["received.Hello"] >= count


def test_a_peer_that_reads_nothing_is_answered_up_to_a_bound(mesh: LocalMesh) -> None:
    node = mesh.nodes[0]
    before = resident(node)
    port = int(node.address.rpartition(":")[2])
    question = message(b"12345678", encode(Header(GetStatus(), 60_000)))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        shake_hands(s)
        s.sendall(message(bytes(8), encode(Header(HELLO))))
        for _ in range(60):
            s.sendall(question * 100)
        wait_for(lambda: counters(mesh, node).get("dropped", 0) > 0)
        assert resident(node) < before + MOST_GROWTH


def test_a_node_that_was_stopped_for_a_while_under_load_serves_again(mesh: LocalMesh) -> None:
    process = mesh.nodes[0].process
    assert process is not None
    flooder = start_flooder(mesh.nodes[0], "--seconds", "5")

    async def load() -> None:
        async with connect(mesh.peers) as client:
            await Load(mesh, client).run(4)

    stopper = threading.Timer(1.0, lambda: process.send_signal(signal.SIGSTOP))
    starter = threading.Timer(3.0, lambda: process.send_signal(signal.SIGCONT))
    for timer in (stopper, starter):
        timer.start()
    asyncio.run(load())
    for timer in (stopper, starter):
        timer.join()
    finish(flooder)
    counters(mesh, mesh.nodes[0])
    assert all(n.alive for n in mesh.nodes)
