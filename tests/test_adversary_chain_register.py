"""A schedule that an adversary would choose, and that must come to nothing."""

import pytest

from vstack.mesh.changes import AddMember
from vstack.mesh.config import Member
from vstack.mesh.messages import Accept, AnyItem, Ballot, Forward, MeshChanged, Op, Prepare, Value

from .test_replica import NODES, Mesh, config

A, B, C, D = NODES[:4]


@pytest.mark.parametrize(
    "m",
    [
        Forward("config/2", Op(b"f" * 16, "config/2", 1, 0, b"nonsense"), 1),
        Prepare("config/2", Ballot(1, 1, B, 1)),
        Accept("config/2", Ballot(7, 1, B, 1), Value(2, b"nonsense")),
    ],
    ids=["forwarded", "a promise in an epoch", "a vote in an epoch"],
)
def test_no_message_of_one_member_makes_every_later_change_impossible(m: AnyItem) -> None:
    mesh = Mesh(config(1, [A, B, C], 1))
    for node in (A, C):
        mesh.replicas[node].receive(B, B, m, mesh.now)
    for _ in range(10):
        mesh.step(0.1)
    mesh.replicas[A].propose(AddMember(Member(D, "d:1")), b"c" * 16, 1, mesh.now, mesh.now + 60, "it")
    mesh.until(lambda: "it" in mesh.changed, 120)
    assert isinstance(mesh.changed["it"], MeshChanged)
