"""A schedule that an adversary would choose, and that must come to nothing."""

import pytest

from vstack.mesh.changes import AddMember, ChangeRefused, MeshChange, ReplaceMember, successor
from vstack.mesh.config import Member

from .test_changes import NODES, settled_view


@pytest.mark.parametrize(
    "address", ["", "nonsense", "-:99999", "host:0", "a b:7400", "[abc:7400", "abc]:7400"]
)
@pytest.mark.parametrize("replaces", [False, True])
def test_nobody_becomes_a_member_at_an_address_that_cannot_be_dialled(address: str, replaces: bool) -> None:
    new = Member(NODES[3], address)
    change: MeshChange = ReplaceMember(NODES[0], new) if replaces else AddMember(new)
    with pytest.raises(ChangeRefused, match="address"):
        successor(settled_view(NODES[:3]), change)
