"""What `vstack status` makes of the members' answers, and of a mesh of few voters."""

from __future__ import annotations

from msgspec.structs import replace

from vstack.cli.health import NotServing, few_voters, serving
from vstack.mesh.config import Config, Member
from vstack.mesh.messages import Status

MESH, OTHER = "a" * 32, "b" * 32
NODES = [f"{n}" * 32 for n in range(1, 5)]
SAID = Status(NODES[0], MESH, 1, 1, "10.0.0.1:7400", "1", 1.0, (), {}, {}, 0, 0)


def config(voting: int, draining: int = 0) -> Config:
    members = [
        Member(n, f"10.0.0.{i}:7400", draining=i >= voting) for i, n in enumerate(NODES[: voting + draining])
    ]
    return Config(1, tuple(members), 1)


def test_a_member_that_answers_for_itself_serves() -> None:
    assert serving(MESH, NODES[0], SAID) == SAID


def test_a_node_of_no_mesh_or_of_another_does_not_serve() -> None:
    waiting = serving(MESH, NODES[0], replace(SAID, mesh=""))
    assert isinstance(waiting, NotServing)
    assert "no mesh yet" in str(waiting)
    strange = serving(MESH, NODES[0], replace(SAID, mesh=OTHER))
    assert isinstance(strange, NotServing)
    assert "mesh bbbbbbbb" in str(strange)


def test_another_node_at_the_address_of_a_member_does_not_serve_for_it() -> None:
    assert isinstance(serving(MESH, NODES[1], SAID), NotServing)


def test_voters_say_what_a_small_mesh_cannot_do_and_draining_nodes_do_not_help() -> None:
    assert "mesh of one" in few_voters(config(1))
    assert "one node alone votes" in few_voters(config(1, 2))
    assert "two nodes vote" in few_voters(config(2))
    assert "two nodes vote" in few_voters(config(2, 1))
    assert few_voters(config(3)) == few_voters(config(3, 1)) == ""
