"""A schedule that an adversary would choose, and that must come to nothing."""

import asyncio
from pathlib import Path

import pytest

from vstack.local import free_port
from vstack.mesh.config import Member
from vstack.mesh.keys import load_mesh, new_pair
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Header,
    Hello,
    Join,
    MeshChanged,
    Ping,
    Pong,
    State,
    Statement,
    encode,
)

from .cluster import running_mesh
from .test_keys import Secured, answer, speaking

pytestmark = pytest.mark.processes


def test_who_said_hello_before_its_node_id_was_a_members_is_not_taken_for_that_member(tmp_path: Path) -> None:
    """Else the mesh's key alone says of everybody what is settled, and base moves too early."""
    with running_mesh(tmp_path / "mesh", 3, keys=tmp_path / "keys") as mesh:
        secured = Secured(mesh, tmp_path, tmp_path)
        pair = load_mesh(tmp_path / "keys").pair
        node = "cd" * 16
        lie = Statement(bytes.fromhex(mesh.nodes[2].node), 1 << 40, 1, State.DOWN, 77, 77)

        async def run() -> None:
            hello = Hello(PROTOCOL_VERSION, "", "node", node, 1)
            async with speaking(secured, pair, hello) as dealer:
                assert isinstance(await answer(dealer), Hello)
                member = Member(node, f"127.0.0.1:{free_port(1) + 40}", key=new_pair().public)
                await dealer.send_multipart([bytes(7) + b"\1", encode(Header(Join(member), 5000))])
                assert isinstance(await answer(dealer), MeshChanged)
                await dealer.send_multipart([bytes(7) + b"\2", encode(Header(Ping(1, (lie,)), 1000))])
                said = await answer(dealer)
                if isinstance(said, Pong):  # then as to a stranger: what it says itself, and nothing taken
                    assert len(said.updates) == 1
                await dealer.send_multipart([bytes(7) + b"\3", encode(Header(Ping(2, ()), 1000))])
                said = await answer(dealer)
                assert not (isinstance(said, Pong) and any(s.settled == 77 for s in said.updates))

        asyncio.run(run())
