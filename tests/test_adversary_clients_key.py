"""A schedule that an adversary would choose, and that must come to nothing."""

import pytest

from vstack.mesh.changes import AddMember, Authorise, ChangeRefused, successor
from vstack.mesh.config import Config, Grant, Member, View

from .test_changes import NODES


def test_a_client_and_a_node_never_share_a_key() -> None:
    """The node's role would win: whoever may join could take an admin's rights away."""
    admin = Grant(b"a" * 32, "admin")
    view = View((Config(1, (Member(NODES[0], "a:1", key=b"n" * 32),), 1, grants=(admin,)),))
    with pytest.raises(ChangeRefused):
        successor(view, AddMember(Member(NODES[1], "b:1", key=admin.key)))
    with pytest.raises(ChangeRefused):
        successor(view, Authorise(Grant(b"n" * 32, "reader")))
