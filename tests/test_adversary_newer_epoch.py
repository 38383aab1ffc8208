"""A schedule that an adversary would choose, and that must come to nothing."""

from vstack.local import free_port
from vstack.mesh.links import Answer
from vstack.mesh.messages import PROTOCOL_VERSION, Header, Hello
from vstack.node.server import Node as Server

from .test_forming import adopt, server  # noqa: F401


def test_a_node_that_is_greeted_from_a_newer_epoch_asks_for_the_chain(server: Server) -> None:  # noqa: F811
    """All that it knew may have been replaced while it was off, by nodes at their addresses."""
    adopt(server)
    stranger = "c" * 32
    link = server.transport.connect(f"127.0.0.1:{free_port(1)}", 0.0)
    hello = Hello(PROTOCOL_VERSION, server.mesh, "node", stranger, 1, 9)
    server._on_answer(Answer(link, bytes(8), Header(hello, epoch=9)), 1.0)
    server.replica.tick(1.0)
    assert server.replica.fetch == [stranger]
