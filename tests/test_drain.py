"""Nodes that hold pieces leave: what it would cost, when it is refused, and that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from vstack.cli import mesh as verbs
from vstack.cli.main import build_parser
from vstack.client import members
from vstack.client.catalogue import chunk_table, find_video
from vstack.errors import UsageError
from vstack.local import LocalMesh, LocalNode, free_port
from vstack.mesh.changes import AddMember
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import ChunkRecord

from .cluster import Finished, running_mesh, vstack, wait_for, with_client

pytestmark = pytest.mark.processes


def run(mesh: LocalMesh, *words: str | Path) -> Finished:
    return vstack(*words, peers=",".join(n.address for n in mesh.nodes if n.alive))


def put(mesh: LocalMesh, path: Path, *words: str, size: int = 3 << 20) -> None:
    path.write_bytes(os.urandom(size))
    done = run(mesh, "put", path, "--opaque", *words)
    assert done.code == 0, done


def table_of(mesh: LocalMesh, title: str) -> list[ChunkRecord]:
    async def look(client: MeshClient) -> list[ChunkRecord]:
        return await chunk_table(client, await find_video(client, title))

    return with_client(mesh, look)


def on(mesh: LocalMesh, record: ChunkRecord) -> tuple[list[LocalNode], list[LocalNode]]:
    """The nodes that hold pieces of a chunk, in order; and the others."""
    by_id = {n.node: n for n in mesh.nodes}
    holding = [by_id[p.node] for p in record.places]
    return holding, [n for n in mesh.nodes if n not in holding]


def epoch_of(mesh: LocalMesh) -> int:
    document = run(mesh, "mesh", "plan", "--json").json["moving"]
    assert isinstance(document, dict)
    return int(document["epoch"])


@pytest.fixture
def spares() -> Iterator[list[LocalNode]]:
    """Nodes beyond those of the mesh; none is left afterwards."""
    nodes: list[LocalNode] = []
    yield nodes
    for node in nodes:
        node.stop()


def test_a_plan_says_how_many_bytes_of_pieces_would_move(tmp_path: Path, spares: list[LocalNode]) -> None:
    async def held(client: MeshClient) -> dict[str, int]:
        return {n: round(s.store["payload_bytes"]) for n, s in (await members.statuses(client)).items()}

    async def joins(client: MeshClient) -> tuple[int | None, int | None]:
        change = await members.addition(client, spares[0].address)
        twice = replace(change.member, weight=2 * change.member.weight)
        plans = [await members.plan(client, c) for c in (change, AddMember(twice))]
        return plans[0].piece_bytes, plans[1].piece_bytes

    with running_mesh(tmp_path / "mesh", 4) as mesh:
        put(mesh, tmp_path / "film", "--redundancy", "replicated")
        by_node = with_client(mesh, held)
        total = sum(by_node.values())
        assert total == 3 * (3 << 20)
        leaver = max(mesh.nodes, key=lambda n: by_node[n.node])
        for verb in ("--drain", "--remove"):
            plan = run(mesh, "mesh", "plan", verb, leaver.node, "--json").json["plan"]
            assert isinstance(plan, dict)
            assert plan["piece_bytes_moving"] == by_node[leaver.node]
        assert (
            "MiB of pieces would move away from it" in run(mesh, "mesh", "plan", "--drain", leaver.node).out
        )
        address = f"127.0.0.1:{free_port(1)}"
        spares.append(LocalNode(9, address, tmp_path / "node-9", tmp_path / "node-9.log"))
        spares[0].start((address, "127.0.0.1:9"), detach=False)  # it waits for a mesh that is not there
        wait_for(lambda: "wait" in spares[0].log.read_text(), within=30)
        assert with_client(mesh, joins) == (round(total / 5), round(total * 2 / 6))
        leaver.kill()
        plan = run(mesh, "mesh", "plan", "--drain", leaver.node, "--json").json["plan"]
        assert isinstance(plan, dict)
        assert plan["piece_bytes_moving"] is None


@pytest.mark.parametrize("redundancy", ["replicated", "erasure"])
def test_a_drained_node_holds_nothing_that_a_video_needs_and_may_leave(
    tmp_path: Path, redundancy: str
) -> None:
    film, copy = tmp_path / "film", tmp_path / "copy"
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        put(mesh, film, "--redundancy", redundancy)
        leaver = on(mesh, table_of(mesh, "film")[0])[0][0]
        drained = run(mesh, "mesh", "drain", leaver.node)
        assert drained.code == 0, drained
        assert "no video needs what lies on it" in drained.out
        assert all(p.node != leaver.node for c in table_of(mesh, "film") for p in c.places)
        removed = run(mesh, "mesh", "remove", leaver.node)
        assert removed.code == 0, removed
        leaver.kill()
        assert run(mesh, "get", "film", "-o", copy).code == 0
        assert copy.read_bytes() == film.read_bytes()
        assert run(mesh, "verify", "film").code == 0


def test_a_drain_that_was_not_waited_for_is_waited_for_by_the_same_command(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 4) as mesh:
        put(mesh, tmp_path / "film", "--redundancy", "replicated")
        leaver = on(mesh, table_of(mesh, "film")[0])[0][0]
        assert run(mesh, "mesh", "drain", leaver.node, "--no-wait").code == 0
        epoch = epoch_of(mesh)
        again = run(mesh, "mesh", "drain", leaver.node)
        assert again.code == 0, again
        assert all(p.node != leaver.node for c in table_of(mesh, "film") for p in c.places)
        assert "no video needs" in again.out
        undone = run(mesh, "mesh", "drain", leaver.node, "--undo")
        assert undone.code == 0, undone
        assert epoch_of(mesh) > epoch


def test_the_last_but_one_that_takes_pieces_is_not_drained_unless_that_is_meant(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 2) as mesh:
        first, second = mesh.nodes
        epoch = epoch_of(mesh)
        refused = run(mesh, "mesh", "drain", first.node)
        refused.failed_with(2, f"only node {second.node[:8]} would be left", "--force")
        assert epoch_of(mesh) == epoch
        forced = run(mesh, "mesh", "drain", first.node, "--force", "--no-wait")
        assert forced.code == 0, forced


def test_a_node_whose_pieces_fit_nowhere_else_is_not_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drain(client: MeshClient) -> None:
        options = build_parser().parse_args(["mesh", "drain", client.config.nodes[0]])
        with pytest.raises(UsageError, match=r"holds 3\.0 MiB, and the other nodes .* have 0 B free"):
            await verbs.drain(client, options)
        await client.refresh()
        assert not any(m.draining for m in client.members)

    monkeypatch.setattr(members, "RESERVE", 1.0)  # all of each disk is kept free
    with running_mesh(tmp_path / "mesh", 3) as mesh:
        put(mesh, tmp_path / "film", "--redundancy", "replicated")
        with_client(mesh, drain)


def test_the_last_holder_that_is_up_neither_drains_nor_leaves(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        put(mesh, tmp_path / "film", "--redundancy", "replicated", size=1 << 20)
        (first, second, third), _ = on(mesh, table_of(mesh, "film")[0])
        first.kill()
        second.kill()
        epoch = epoch_of(mesh)
        for verb, way_out in (("drain", "--force"), ("remove", "--yes")):
            refused = run(mesh, "mesh", verb, third.node)
            refused.failed_with(2, "1 chunk could not be read (chunk 0 of video", way_out)
            for dead in (first, second):
                refused.failed_with(2, dead.node[:8])
        assert epoch_of(mesh) == epoch


def test_a_node_leaves_the_only_other_one_only_if_that_is_wanted(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 2) as mesh:
        put(mesh, tmp_path / "film")
        leaver, stays = mesh.nodes
        epoch = epoch_of(mesh)
        run(mesh, "mesh", "drain", leaver.node).failed_with(2, stays.node[:8], "--force")
        run(mesh, "mesh", "remove", leaver.node).failed_with(2, "only copy", "--yes")
        assert epoch_of(mesh) == epoch
        removed = run(mesh, "mesh", "remove", leaver.node, "--yes")
        assert removed.code == 0, removed
        leaver.kill()
        assert run(mesh, "get", "film", "-o", tmp_path / "copy").code == 0


def test_a_dead_node_leaves_without_more_ado_if_enough_pieces_are_elsewhere(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        put(mesh, tmp_path / "film")
        dead = mesh.nodes[0]
        dead.kill()
        removed = run(mesh, "mesh", "remove", dead.node)
        assert removed.code == 0, removed
        assert f"pieces of 2 chunks are on node {dead.node[:8]}" in removed.err
        assert run(mesh, "get", "film", "-o", tmp_path / "copy").code == 0


def test_a_node_leaves_only_if_it_is_known_what_it_holds(tmp_path: Path) -> None:
    """Three of five are dead: no listing is complete, so nobody can say what one of them is needed for."""
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        put(mesh, tmp_path / "film", "--erasure", "2/5")
        for node in mesh.nodes[:3]:
            node.kill()
        refused = run(mesh, "mesh", "remove", mesh.nodes[0].node)
        refused.failed_with(2, "not known: 3 nodes", "--yes")
