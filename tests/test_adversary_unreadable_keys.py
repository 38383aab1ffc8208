"""A schedule that an adversary would choose, and that must come to nothing."""

from collections.abc import Sequence

from vstack.errors import DamagedData
from vstack.mesh.changes import AddMember
from vstack.mesh.config import Member
from vstack.mesh.messages import MeshChanged

from .test_replica import NODES, Memory, Mesh, config

A, B, C, D = NODES[:4]


class Unreadable(Memory):
    """A block of the votes cannot be read: their keys cannot be listed."""

    def keys(self, after: str, limit: int) -> Sequence[str]:
        raise DamagedData("the votes cannot be read")


def test_a_node_that_cannot_list_its_keys_goes_on_and_never_says_that_they_are_settled() -> None:
    mesh = Mesh()
    mesh.storage[B] = Unreadable()
    for node in (A, B, C):
        mesh.start(node, [config(1, [A, B, C], 1)])
    mesh.step()
    mesh.replicas[A].propose(AddMember(Member(D, "d:1")), b"c" * 16, 1, mesh.now, mesh.now + 20, "it")
    mesh.until(lambda: "it" in mesh.changed)
    for _ in range(10):
        mesh.step(0.1)
    assert isinstance(mesh.changed["it"], MeshChanged)
    assert mesh.replicas[B].view.epoch >= 2
    assert mesh.replicas[B].settled < 2 or mesh.replicas[B].view.is_settled()
