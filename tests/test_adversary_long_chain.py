"""A schedule that an adversary would choose, and that must come to nothing."""

import os
from pathlib import Path

import pytest

from vstack.local import LocalNode
from vstack.mesh.changes import Authorise
from vstack.mesh.config import Grant
from vstack.mesh.mesh_client import MeshClient

from .cluster import running_mesh, with_client
from .test_members import join, spares  # noqa: F401

pytestmark = pytest.mark.processes


def test_a_node_joins_a_mesh_whose_chain_is_longer_than_one_message(
    tmp_path: Path,
    spares: list[LocalNode],  # noqa: F811
) -> None:
    async def many_clients(client: MeshClient) -> None:
        for number in range(120):
            await client.change_mesh(Authorise(Grant(os.urandom(32), "admin", f"{number:064d}")))

    with running_mesh(tmp_path, 1) as mesh:
        with_client(mesh, many_clients)
        join(mesh, spares, 2)
