"""What a node pays and how even the load is do not depend on the size of the mesh.

The short form of benchmarks/scale.py: the same measurements, of smaller meshes or with less load.
"""

from __future__ import annotations

import pytest

from tests.sim.scale import (
    GossipFigures,
    GossipMesh,
    RegisterMesh,
    drawn_balance,
    group_balance,
    measure_decisions,
    measure_gossip,
    members,
    piece_balance,
)


@pytest.fixture(scope="module")
def gossip() -> dict[int, GossipFigures]:
    return {n: measure_gossip(n, seed=1) for n in (10, 100)}


def test_messages_per_node_and_second_are_constant(gossip: dict[int, GossipFigures]) -> None:
    for figures in gossip.values():
        assert figures.messages == pytest.approx(4.0, rel=0.02)  # two probes and two answers
        assert figures.change_messages == pytest.approx(4.0, rel=0.2)


def test_bytes_per_node_and_second_are_bounded_in_quiet_and_in_change(
    gossip: dict[int, GossipFigures],
) -> None:
    assert gossip[100].bytes < 1.2 * gossip[10].bytes < 500
    assert gossip[100].change_bytes < 4 * 40 * 40


def test_an_epoch_and_a_crash_are_known_in_time_that_grows_with_the_logarithm(
    gossip: dict[int, GossipFigures],
) -> None:
    assert gossip[10].heard_100 < 4
    assert gossip[100].heard_100 < 6
    assert gossip[10].down_100 < 10
    assert gossip[100].down_100 < 15


def test_a_thousand_nodes_hear_of_a_new_epoch_within_seconds() -> None:
    mesh = GossipMesh(1000, 1, quiet=True)
    mesh.nodes[mesh.names[0]].gossip.say(2, 2)
    assert mesh.run(6.0, lambda: mesh.share_that(lambda g: g.newest[0] == 2) == 1)
    assert mesh.messages.total() / (1000 * mesh.now) < 4.4


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_messages_per_decision_do_not_depend_on_the_size_of_the_mesh(n: int) -> None:
    costs = measure_decisions(n)
    assert costs == {
        "fast create, through the leader": 8,
        "full way, through a node of the group": 16,
        "full way, through any other node": 20,
        "quorum read, through a node of the group": 8,
        "quorum read, through any other node": 10,
    }


def test_only_the_nodes_of_a_group_and_the_one_asked_take_part_in_a_decision() -> None:
    mesh = RegisterMesh(1000)
    mesh.decide(mesh.config.nodes[17], "video/" + "ab" * 32, 0, b"x")
    assert len(mesh.started) == 6


@pytest.mark.parametrize("n", [10, 100])
def test_groups_are_as_even_as_if_they_were_drawn_at_random(n: int) -> None:
    assert group_balance(n, 2000) == pytest.approx(drawn_balance(n, 5, 2000), rel=0.12)
    assert group_balance(10, 5000) < 1.1


def test_pieces_are_even_over_equal_nodes() -> None:
    assert max(piece_balance(members(10), 4000, [3, 5])) < 1.1


def test_first_pieces_follow_the_weights() -> None:
    [balance] = piece_balance(members(10, [1, 1, 1, 1, 1, 2, 2, 2, 4, 4]), 8000, [1])
    assert balance < 1.15
