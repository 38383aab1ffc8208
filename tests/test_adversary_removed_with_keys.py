"""A schedule that an adversary would choose, and that must come to nothing."""

from pathlib import Path

import pytest

from .cluster import running_mesh, vstack, wait_for

pytestmark = pytest.mark.processes


def test_a_node_that_is_removed_while_it_runs_ends_with_keys_too(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 3, keys=tmp_path / "keys") as mesh:
        *rest, last = sorted(mesh.nodes, key=lambda n: n.node)  # who moves base is seldom the last
        words = ("mesh", "remove", last.node, "--yes")
        assert vstack(*words, peers=rest[0].address, key=mesh.client_key).code == 0
        wait_for(lambda: not last.alive, within=30)
        assert last.stop() == 0
        assert "removed" in last.last_words()
