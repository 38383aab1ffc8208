"""A schedule that an adversary would choose, and that must come to nothing."""

import asyncio
import os
from pathlib import Path

import pytest

from vstack.client.members import open_view
from vstack.mesh.changes import DrainMember, forced
from vstack.mesh.config import Config
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Body, Chain, ChangeMesh, ForceConfig, GetConfig
from vstack.mesh.sockets import Lane

from .cluster import running_mesh, with_client

pytestmark = pytest.mark.processes


def test_what_is_forced_at_one_node_is_not_decided_otherwise_by_the_majority_that_is_left(
    tmp_path: Path,
) -> None:
    with running_mesh(tmp_path, 5) as mesh:
        lost = mesh.nodes[4]
        lost.kill()

        async def inside(client: MeshClient) -> list[tuple[Config, ...]]:
            async def ask(address: str, body: Body) -> Body | None:
                try:
                    dialer = client.dialer(address, Lane.CONTROL)
                    return (await dialer.request(body, timeout=5.0)).header.body
                except (NoAnswer, Refused):
                    return None

            new = forced(await open_view(client), [lost.node], os.urandom(16))
            for _ in range(40):  # until the dead one counts as down, if it is taken at all
                if await ask(mesh.nodes[0].address, ForceConfig(new)) is not None:
                    break
                await asyncio.sleep(0.5)
            await ask(mesh.nodes[1].address, ChangeMesh(os.urandom(16), 1, DrainMember(mesh.nodes[3].node)))
            chains = []
            for node in mesh.nodes[:4]:
                chain = await ask(node.address, GetConfig(0))
                assert isinstance(chain, Chain)
                chains.append(tuple(c for c in chain.configs if c.epoch <= 2))
            return chains

        chains = with_client(mesh, inside)
        longest = max(chains, key=len)
        assert all(chain == longest[: len(chain)] for chain in chains), "two configurations of one epoch"
