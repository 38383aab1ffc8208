"""A schedule that an adversary would choose, and that must come to nothing."""

import pytest

from vstack.mesh.changes import RemoveMember
from vstack.mesh.config import Config, Member
from vstack.mesh.messages import ChangeMesh, Failure, State
from vstack.mesh.sockets import Lane
from vstack.mesh.transport import Incoming, Session
from vstack.node.server import Node as Server

from .test_forming import hello_of, server  # noqa: F401


def test_no_node_leaves_where_no_majority_of_the_members_would_be_up(
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A member that is draining has no vote on registers; on what follows an epoch it has one."""
    b, c, d, e = (x * 32 for x in "bcde")
    members = (
        Member(server.me, "a:1"),
        Member(b, "b:1"),
        Member(c, "c:1"),
        Member(d, "d:1", draining=True),
        Member(e, "e:1", draining=True),
    )
    server.replica.adopt([Config(1, members, 1)], 0.0)
    server._on_epoch()
    monkeypatch.setattr(server.peers, "state", lambda n: State.DOWN if n in (d, e) else State.UP)
    change = ChangeMesh(b"i" * 16, 1, RemoveMember(c))
    session = Session(b"x", Lane.CONTROL, hello_of(b, 1), 0.0, in_flight=1)
    server._admission.on_change(Incoming(session, bytes(8), change, memoryview(b""), 1e9), change, 0.0)
    answers = [answer for _, answer in server._admission.take_answers()]
    assert [type(a) for a in answers] == [Failure]
