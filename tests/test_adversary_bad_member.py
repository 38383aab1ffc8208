"""Schedules that an adversary would choose, and that must come to nothing."""

import msgspec
import pytest

from vstack.local import free_port
from vstack.mesh.links import Answer
from vstack.mesh.messages import Ballot, Envelope, Header, Prepare, ScanReply, ScanRow, Value, decode, encode
from vstack.node.server import Node as Server

from .test_forming import OTHER, adopt, hello_of, server  # noqa: F401


def test_a_request_where_answers_come_ends_nobody(server: Server) -> None:  # noqa: F811
    adopt(server)
    link = server.transport.connect(f"127.0.0.1:{free_port(1)}", 0.0)
    assert server.peers.on_hello(link, hello_of(OTHER, 5))
    item = Prepare(f"video/{'c' * 64}", Ballot(1, 1, OTHER, 5))
    server._on_answer(Answer(link, bytes(8), Header(Envelope((item,)))), 1.0)
    server._commit()
    server._flush()


def test_a_page_of_a_listing_names_registers_only() -> None:
    """Else whoever lays it over the others looks for the video in a key that has none."""
    row = ScanRow("x", Ballot(1, 1, OTHER, 1), Value(1, b"x"))
    with pytest.raises(msgspec.DecodeError):
        decode(encode(Header(ScanReply((row,), False, 1))))
