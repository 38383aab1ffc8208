"""Machines come and go: joins, replacements, removals, returns, the operator's way out. Real nodes."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from vstack.client.members import Moving, moving
from vstack.local import LocalMesh, LocalNode, NodeFailed, free_port
from vstack.mesh.changes import DrainMember, RemoveMember
from vstack.mesh.config import group, leader
from vstack.mesh.dialer import Refused
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import ChangeMesh, MeshChanged, Ok
from vstack.mesh.registers import UploadId, chunk_key, video_key

from .cluster import running_mesh, vstack, wait_for, with_client

pytestmark = pytest.mark.processes

VIDEOS = [f"{i * 7919:064x}" for i in range(60)]


def spare(mesh: LocalMesh, number: int, port: int | None = None) -> LocalNode:
    """A node that is not a member yet."""
    at = free_port(1) if port is None else port
    return LocalNode(
        number, f"127.0.0.1:{at}", mesh.folder / f"node-{number}", mesh.folder / f"node-{number}.log"
    )


@pytest.fixture
def spares() -> Iterator[list[LocalNode]]:
    """Nodes beyond those of the mesh; none is left afterwards."""
    nodes: list[LocalNode] = []
    yield nodes
    for node in nodes:
        node.stop()


def join(mesh: LocalMesh, spares: list[LocalNode], number: int) -> LocalNode:
    node = spare(mesh, number)
    spares.append(node)
    node.start(mesh.peers, detach=False)
    node.wait_ready()
    return node


def peers_of(*nodes: LocalNode) -> str:
    return ",".join(n.address for n in nodes)


def how_far(peers: str) -> Moving:
    async def inside() -> Moving:
        async with connect(peers) as mesh:
            return await moving(mesh)

    return asyncio.run(inside())


def wait_settled(peers: str) -> Moving:
    wait_for(lambda: how_far(peers).done, within=60)
    return how_far(peers)


async def write_all(mesh: MeshClient) -> None:
    changes = [Change(video_key(v), 0, v.encode()) for v in VIDEOS]
    assert all(isinstance(o, Ok) for o in await mesh.change_all(changes))


async def read_all(mesh: MeshClient) -> None:
    for v in VIDEOS:
        assert (await mesh.read(video_key(v))).data == v.encode()
    listing = await mesh.list("video/")
    assert listing.complete
    assert len(listing.rows) == len(VIDEOS)


def wait_gone(node: LocalNode) -> None:
    wait_for(lambda: not node.alive)


def check(peers: str) -> None:
    async def inside() -> None:
        async with connect(peers) as mesh:
            await read_all(mesh)

    asyncio.run(inside())


@pytest.mark.timeout(600)
def test_a_mesh_of_one_grows_to_seven_and_shrinks_back_under_load(
    tmp_path: Path, spares: list[LocalNode]
) -> None:
    """All the while a client creates, replaces and reads; nothing fails that a retry does not mend."""
    done = {"changes": 0}

    async def load(peers: str, over: asyncio.Event) -> dict[str, tuple[int, bytes]]:
        told: dict[str, tuple[int, bytes]] = {}
        async with connect(peers) as mesh:
            number = 0
            while not over.is_set():
                number += 1
                video = VIDEOS[number % len(VIDEOS)]
                expect, _ = told.get(video, (0, b""))
                data = b"%d" % number
                outcome = await mesh.change(Change(video_key(video), expect, data))
                assert isinstance(outcome, Ok), outcome
                told[video] = (outcome.version, data)
                if number % 10 == 0:
                    key = chunk_key(video, UploadId(mesh.config.epoch, (mesh.config.epoch << 20) + number), 0)
                    assert isinstance(await mesh.change(Change(key, 0, data)), Ok)
                done["changes"] += 1
        return told

    async def inside(first: LocalMesh) -> None:
        over = asyncio.Event()
        work = asyncio.create_task(load(first.peers[0], over))
        nodes = list(first.nodes)
        for number in range(2, 8):
            nodes.append(await asyncio.to_thread(join, first, spares, number))
        assert (await asyncio.to_thread(wait_settled, peers_of(*nodes))).done
        while len(nodes) > 1:
            leaver = nodes.pop(0)
            words = ("mesh", "remove", leaver.node[:12])
            said = await asyncio.to_thread(partial(vstack, *words, peers=peers_of(*nodes)))
            assert said.code == 0, said
            await asyncio.to_thread(partial(wait_gone, leaver))
            assert leaver.stop() == 0
            assert not work.done(), work
        before = done["changes"]
        await asyncio.to_thread(wait_for, lambda: done["changes"] > before + 20)
        over.set()
        told = await work
        async with connect(peers_of(*nodes)) as mesh:
            assert len(mesh.members) == 1
            for video, (version, data) in told.items():
                found = await mesh.read(video_key(video))
                assert (found.version, found.data) == (version, data)

    with running_mesh(tmp_path, 1) as mesh:
        asyncio.run(inside(mesh))


def test_a_wiped_node_comes_back_as_a_new_one_in_the_place_of_the_old(tmp_path: Path) -> None:
    with running_mesh(tmp_path, 3) as mesh:
        with_client(mesh, write_all)
        node = mesh.nodes[2]
        old = node.node
        node.kill()
        shutil.rmtree(node.data)
        node.start(mesh.peers, detach=False)
        node.wait_ready(60)
        assert node.node != old
        wait_settled(peers_of(*mesh.nodes))
        members = with_client(mesh, lambda m: _members(m))
        assert sorted(members) == sorted(n.node for n in mesh.nodes), "one in, one out"
        mesh.nodes[0].kill()
        check(peers_of(*mesh.nodes[1:]))


async def _members(mesh: MeshClient) -> list[str]:
    return [m.node for m in mesh.members]


def test_a_node_that_was_removed_while_it_was_off_ends_and_may_come_back_as_a_new_one(
    tmp_path: Path, spares: list[LocalNode]
) -> None:
    with running_mesh(tmp_path, 3) as mesh:
        with_client(mesh, write_all)
        away = mesh.nodes[2]
        old = away.node
        away.stop()
        rest = peers_of(*mesh.nodes[:2])
        refused = vstack("mesh", "remove", old, peers=rest)
        refused.failed_with(2, "--yes")
        assert vstack("mesh", "remove", old, "--yes", peers=rest).code == 0
        other = join(mesh, spares, 4)
        wait_settled(rest)
        away.start(mesh.peers, detach=False)
        wait_for(lambda: not away.alive)
        assert away.stop() == 0
        assert "removed" in away.last_words()
        away.start(mesh.peers, detach=False)
        wait_for(lambda: not away.alive)
        assert away.stop() == 1
        assert "--rejoin" in away.last_words()
        away.start(mesh.peers, detach=False, extra=("--rejoin",))
        away.wait_ready(60)
        assert away.node != old
        wait_settled(rest)
        check(peers_of(mesh.nodes[0], other, away))


def test_a_late_joiner_walks_the_whole_chain(tmp_path: Path, spares: list[LocalNode]) -> None:
    with running_mesh(tmp_path, 3) as mesh:
        for _ in range(4):
            for words in (("drain", mesh.nodes[0].node), ("drain", "--undo", mesh.nodes[0].node)):
                said = vstack("mesh", *words, peers=peers_of(*mesh.nodes))
                assert said.code == 0, said
        epoch = how_far(mesh.peers[0]).epoch
        assert epoch > 8
        node = join(mesh, spares, 4)
        assert wait_settled(node.address).epoch > epoch


def test_a_node_that_was_off_for_many_epochs_goes_on_as_a_member(
    tmp_path: Path, spares: list[LocalNode]
) -> None:
    with running_mesh(tmp_path, 5) as mesh:
        with_client(mesh, write_all)
        away = mesh.nodes[4]
        away.kill()
        rest = peers_of(*mesh.nodes[:4])
        for number in (6, 7):
            join(mesh, spares, number)
            wait_settled(rest)
        assert vstack("mesh", "remove", mesh.nodes[0].node, peers=rest).code == 0
        away.start(mesh.peers, detach=False)
        away.wait_ready()
        wait_for(lambda: how_far(away.address).epoch == how_far(mesh.peers[1]).epoch)
        for node in mesh.nodes[2:4]:
            node.kill()  # now it is needed
        check(peers_of(away, mesh.nodes[1], *spares))


def test_of_two_administrators_only_one_wins(tmp_path: Path) -> None:
    async def inside(mesh: MeshClient) -> None:
        epoch = mesh.config.epoch
        wishes = [(m.node, ChangeMesh(os.urandom(16), epoch, DrainMember(m.node))) for m in mesh.members[:2]]
        answers = await asyncio.gather(
            *(mesh.ask(node, wish, timeout=10.0) for node, wish in wishes), return_exceptions=True
        )
        won = [a for a in answers if not isinstance(a, BaseException)]
        lost = [a for a in answers if isinstance(a, Refused)]
        assert len(won) == len(lost) == 1
        assert isinstance(won[0].header.body, MeshChanged)
        assert lost[0].code in ("epoch", "busy")
        await mesh.refresh()
        assert sum(m.draining for m in mesh.members) == 1

    with running_mesh(tmp_path, 5) as mesh:
        with_client(mesh, inside)


def test_a_change_that_is_asked_for_again_happens_once(tmp_path: Path) -> None:
    async def inside(mesh: MeshClient) -> None:
        wish = ChangeMesh(os.urandom(16), mesh.config.epoch, DrainMember(mesh.members[0].node))
        answers = [
            (await mesh.ask(member.node, wish, timeout=10.0)).header.body for member in mesh.members[1:]
        ]
        assert answers == [MeshChanged(2)] * 2

    with running_mesh(tmp_path, 3) as mesh:
        with_client(mesh, inside)


def test_a_drained_node_votes_no_more_and_gets_no_new_pieces(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 4) as mesh:
        node = mesh.nodes[0]
        said = vstack("mesh", "drain", node.address, "--json", peers=peers_of(*mesh.nodes))
        assert said.code == 0, said
        config = with_client(mesh, lambda m: _config(m))
        assert all(node.node not in group(config, v) for v in VIDEOS)
        source = tmp_path / "bytes.bin"
        source.write_bytes(os.urandom(3 << 20))
        assert vstack("put", source, "--opaque", peers=mesh.peers[1]).code == 0
        told = vstack("nodes", "--json", peers=mesh.peers[1]).json["nodes"]
        assert isinstance(told, list)
        assert {n["pieces"] for n in told if n["node"] == node.node} == {0}
        assert vstack("mesh", "remove", node.node, peers=mesh.peers[1]).code == 0
        wait_for(lambda: not node.alive)


async def _config(mesh: MeshClient) -> object:
    await mesh.refresh()
    return mesh.config


def test_the_member_with_the_lowest_id_may_be_switched_off_when_the_command_says_so(tmp_path: Path) -> None:
    """It is asked first, and may be the only one that knows of its removal when it answers."""
    with running_mesh(tmp_path, 4) as mesh:
        with_client(mesh, write_all)
        leaver, *rest = sorted(mesh.nodes, key=lambda n: n.node)
        said = vstack("mesh", "remove", leaver.node, peers=peers_of(*mesh.nodes))
        assert said.code == 0, said
        leaver.kill()
        told = vstack("mesh", "plan", "--json", peers=peers_of(*rest)).json["moving"]
        assert isinstance(told, dict)
        assert told["done"]
        assert told["leaving"] == []
        check(peers_of(*rest))


@pytest.mark.parametrize("keys", [False, True])
def test_a_node_that_waits_with_nobody_who_is_a_member_is_let_in_by_an_operator(
    tmp_path: Path, spares: list[LocalNode], keys: bool
) -> None:
    folder = tmp_path / "keys" if keys else None
    with running_mesh(tmp_path / "mesh", 3, keys=folder) as mesh:
        node = spare(mesh, 9)
        spares.append(node)
        nobody = "127.0.0.1:9"
        node.start((node.address, nobody), detach=False, extra=mesh.options)
        wait_for(lambda: "waiting for a mesh" in node.log.read_text(), within=30)
        said = vstack("mesh", "add", node.address, peers=peers_of(*mesh.nodes), key=mesh.client_key)
        assert said.code == 0, said
        node.wait_ready()
        told = vstack("nodes", "--json", peers=node.address, key=mesh.client_key).json["nodes"]
        assert isinstance(told, list)
        assert len(told) == 4
        assert all(n["answers"] for n in told)


def test_the_last_voting_node_cannot_leave(tmp_path: Path) -> None:
    with running_mesh(tmp_path, 1) as mesh:
        for verb in ("remove", "drain"):
            vstack("mesh", verb, mesh.nodes[0].node, peers=mesh.peers[0]).failed_with(2, "add ")
        check_alive = vstack("status", peers=mesh.peers[0])
        assert check_alive.code == 0


def test_the_operator_recovers_a_mesh_that_has_lost_its_majority_for_good(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        source = tmp_path / "bytes.bin"
        source.write_bytes(os.urandom(1 << 20))
        put = vstack("put", source, "--opaque", "--redundancy", "replicated", "--json", peers=mesh.peers[0])
        assert put.code == 0, put
        with_client(mesh, write_all)
        lost = [n.node for n in mesh.nodes[2:]]
        for node in mesh.nodes[2:]:
            node.kill()
        left = peers_of(*mesh.nodes[:2])
        words = ("mesh", "recover", "--lost", ",".join(lost))
        vstack(*words, peers=left).failed_with(2, "--yes")
        said = vstack(*words, "--yes", "--json", peers=left)
        assert said.code == 0, said
        doubtful = said.json["doubtful"]
        assert isinstance(doubtful, list)
        assert set(VIDEOS) <= set(doubtful), "groups of five that lost three"
        assert said.json["given_up"] == []
        check_values = with_client(mesh, lambda m: _values(m))
        assert check_values == [v.encode() for v in VIDEOS], "the two that are left held everything"
        status = vstack("status", peers=left)
        assert status.code in (0, 8), "8 once the keepers have seen that two nodes do not hold three copies"
        assert "2 of 2 nodes up" in status.out


async def _values(mesh: MeshClient) -> list[bytes | None]:
    return [(await mesh.read(video_key(v))).data for v in VIDEOS]


def test_nobody_recovers_while_the_lost_ones_answer(tmp_path: Path) -> None:
    with running_mesh(tmp_path, 3) as mesh:
        said = vstack(
            "mesh", "recover", "--lost", mesh.nodes[0].node, "--yes", peers=mesh.peers[1], within=60
        )
        assert said.code != 0
        assert "not lost" in said.err
        assert how_far(mesh.peers[1]).epoch == 1


def test_an_unknown_node_is_named_with_the_way_out(tmp_path: Path) -> None:
    with running_mesh(tmp_path, 1) as mesh:
        vstack("mesh", "remove", "ffffffff", peers=mesh.peers[0]).failed_with(4, "vstack nodes")
        vstack("mesh", "add", f"127.0.0.1:{free_port(1)}", peers=mesh.peers[0]).failed_with(3)


def test_a_plan_shows_what_a_change_would_do_and_changes_nothing(tmp_path: Path) -> None:
    with running_mesh(tmp_path, 5) as mesh:
        with_client(mesh, write_all)
        said = vstack("mesh", "plan", "--remove", mesh.nodes[0].node, "--json", peers=mesh.peers[1])
        assert said.code == 0, said
        plan = said.json["plan"]
        assert isinstance(plan, dict)
        assert plan["videos"] == len(VIDEOS)
        assert plan["votes_per_register"] == 3
        assert how_far(mesh.peers[1]).epoch == 1


def test_a_node_waits_for_the_mesh_that_does_not_let_it_in_yet(
    tmp_path: Path, spares: list[LocalNode]
) -> None:
    """At the address of a member that still counts as alive: not before that one is down."""
    with running_mesh(tmp_path, 3) as mesh:
        node = mesh.nodes[0]
        node.kill()
        newcomer = spare(mesh, 9, port=int(node.address.split(":")[1]))
        spares.append(newcomer)
        newcomer.start(mesh.peers, detach=False)
        newcomer.wait_ready(60)
        wait_settled(mesh.peers[1])
        assert node.node not in with_client(mesh, lambda m: _members(m))
        node.start(mesh.peers, detach=False)  # the old one finds its address taken
        with pytest.raises(NodeFailed, match="cannot listen"):
            node.wait_ready()
        node.stop()


def test_creates_of_a_dead_leaders_chunks_go_on_through_the_others_without_an_election(
    tmp_path: Path,
) -> None:
    async def inside(mesh: MeshClient) -> None:
        upload = UploadId(1, (1 << 20) + 1)
        keys = [chunk_key(v, upload, 128 * i) for v in VIDEOS for i in range(5)]
        victim = local.nodes[0]
        its = [k for k in keys if leader(mesh.config, k) == victim.node]
        others = [k for k in keys if leader(mesh.config, k) != victim.node]
        assert its
        victim.kill()
        async with asyncio.timeout(20):
            for key in (*its[:10], *others[:10]):
                assert isinstance(await mesh.change(Change(key, 0, b"x")), Ok)
        status = await mesh.status(local.nodes[1].node)
        assert status.epoch == 1, "nothing had to be decided about who leads"

    with running_mesh(tmp_path, 5) as local:
        with_client(local, inside)


def test_no_node_leaves_where_too_few_voting_ones_would_be_left(tmp_path: Path) -> None:
    """Of three, one is dead: without another one, nothing could be decided any more."""
    with running_mesh(tmp_path, 3) as mesh:
        dead, leaver, other = mesh.nodes
        dead.kill()
        peers = peers_of(leaver, other)

        for node in (leaver, other):
            wait_for(partial(_is_down, dead.node, node.address))
        vstack("mesh", "remove", leaver.node, peers=peers).failed_with(1, dead.node[:8], "replace")
        assert vstack("mesh", "remove", dead.node, "--yes", peers=peers).code == 0


def _is_down(node: str, asked: str) -> bool:
    """As the node at the address `asked` sees it."""

    async def inside() -> bool:
        async with connect(asked) as mesh:
            asked_node = next(m.node for m in mesh.members if m.address == asked)
            return any(p.node == node and p.state == "down" for p in (await mesh.status(asked_node)).peers)

    return asyncio.run(inside())


def test_removals_wait_for_each_other(tmp_path: Path) -> None:
    async def inside(mesh: MeshClient) -> None:
        first, second = mesh.members[:2]
        await mesh.change_mesh(RemoveMember(first.node))
        await mesh.refresh()
        if not (await moving(mesh)).leaving:
            return  # it was that quick
        with pytest.raises(Refused, match="one node leaves at a time"):
            await mesh.change_mesh(RemoveMember(second.node))

    with running_mesh(tmp_path, 5) as mesh:
        with_client(mesh, inside)
