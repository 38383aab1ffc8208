"""Messages per decision, counted on the wire between real nodes (docs/protocol.md, *Messages*)."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from vstack.local import LocalNode, free_port
from vstack.mesh.config import leader
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import Ok
from vstack.mesh.registers import UploadId, chunk_key, video_key

from .relay import Relay

UPLOAD = UploadId(1, (1 << 20) + 1)


class Tapped:
    """A mesh whose nodes reach each other only through relays that count."""

    def __init__(self, mesh: MeshClient, counts: Counter[str]) -> None:
        self.mesh = mesh
        self.counts = counts

    async def counters(self) -> Counter[str]:
        """Sum over the nodes of what `vstack status` shows."""
        total: Counter[str] = Counter()
        for member in self.mesh.members:
            total.update((await self.mesh.status(member.node)).counters)
        return total

    async def cost(self, work: Callable[[], Awaitable[object]]) -> tuple[int, int, int]:
        """What `work` costs: envelopes on the wire, envelopes by the nodes' counters, own messages."""
        before, told = self.counts["Envelope"], await self.counters()
        await work()
        after = await self._settled()
        now = await self.counters()
        return (
            after - before,
            now["sent.Envelope"] - told["sent.Envelope"],
            now["paxos.to_self"] - told["paxos.to_self"],
        )

    async def _settled(self) -> int:
        """The count once every request's answer has been counted too, and nothing is under way."""
        async with asyncio.timeout(20):
            while True:
                c = self.counts
                asked = sum(c[f"item.{kind}"] for kind in ("Accept", "Prepare", "Read", "Creates"))
                answers = ("Accepted", "Promise", "ReadReply", "Nack", "Created")
                answered = sum(c[f"item.{kind}"] for kind in answers)
                if asked == answered:
                    return c["Envelope"]
                await asyncio.sleep(0.02)


@asynccontextmanager
async def tapped_mesh(folder: Path, count: int) -> AsyncIterator[Tapped]:
    base = free_port(2 * count)
    counts: Counter[str] = Counter()
    nodes, relays, addresses = [], [], {}
    for i in range(count):
        real, shown = base + 2 * i, base + 2 * (count + i)
        relays += [Relay(shown, real, counts), Relay(shown + 1, real + 1, counts)]
        nodes.append(LocalNode(i + 1, f"127.0.0.1:{real}", folder / f"n{i}", folder / f"n{i}.log"))
        addresses[f"127.0.0.1:{shown}"] = f"127.0.0.1:{real}"
    try:
        for relay in relays:
            await relay.start()
        for node, shown_address in zip(nodes, addresses, strict=True):
            node.start(tuple(addresses), detach=False, extra=("--advertise", shown_address))
        for node in nodes:
            await asyncio.to_thread(node.wait_ready)
        async with connect(tuple(addresses), address_map=addresses) as mesh:
            yield Tapped(mesh, counts)
    finally:
        for node in nodes:
            await asyncio.to_thread(node.stop)
        for relay in relays:
            await relay.stop()


def new_video() -> str:
    return os.urandom(32).hex()


async def create_one(mesh: MeshClient) -> None:
    assert isinstance(await mesh.change(Change(chunk_key(new_video(), UPLOAD, 7), 0, b"x" * 300)), Ok)


async def create_batch(mesh: MeshClient) -> None:
    video = new_video()
    keys = [chunk_key(video, UPLOAD, i) for i in range(100)]
    assert len({leader(mesh.config, key) for key in keys}) == 1
    outcomes = await mesh.change_all([Change(key, 0, b"x" * 300) for key in keys])
    assert all(isinstance(o, Ok) for o in outcomes)


async def full_way(mesh: MeshClient) -> None:
    assert isinstance(await mesh.change(Change(video_key(new_video()), 0, b"x" * 300)), Ok)


async def read_absent(mesh: MeshClient) -> None:
    assert (await mesh.read(video_key(new_video()))).data is None


TRIES = 3
"""Of each row, the cheapest counts: now and then a keeper looks at the registers meanwhile."""

ROWS: dict[str, Callable[[MeshClient], Awaitable[None]]] = {
    "implicit leader creates a chunk": create_one,
    "100 chunks of one leader in a batch": create_batch,
    "full way (prepare, promise, accept, accepted)": full_way,
    "quorum read": read_absent,
}


def counted(folder: Path, count: int) -> dict[str, tuple[int, int, int]]:
    """What each row costs in a mesh of `count`."""

    async def inside() -> dict[str, tuple[int, int, int]]:
        async with tapped_mesh(folder, count) as tapped:
            assert tapped.mesh.config.g == count
            return {
                name: min([await tapped.cost(lambda work=work: work(tapped.mesh)) for _ in range(TRIES)])  # type: ignore[misc]
                for name, work in ROWS.items()
            }

    return asyncio.run(inside())


def test_messages_per_decision_are_those_of_the_table(tmp_path: Path) -> None:
    """The table in the protocol's page is made of what is counted here."""
    three, five = counted(tmp_path / "3", 3), counted(tmp_path / "5", 5)
    for n, costs in ((3, three), (5, five)):
        one, two = 2 * (n - 1), 4 * (n - 1)
        assert [costs[name][0] for name in ROWS] == [one, one, two, one]
    table = "| | n = 3 | n = 5 |\n|---|---|---|\n"
    for name in ROWS:
        for on_wire, told, _ in (three[name], five[name]):
            assert on_wire == told, "what status shows is what was on the wire"
        if ROWS[name] is create_batch:
            table += f"| {name} | {three[name][0]} | {five[name][0]} |\n"
        else:
            cells = [f"{wire} / {wire + own}" for wire, _, own in (three[name], five[name])]
            table += f"| {name} | {cells[0]} | {cells[1]} |\n"
    page = (Path(__file__).parents[1] / "docs/protocol.md").read_text()
    assert f"<!-- counted -->\n{table}<!-- /counted -->" in page, table
