"""A schedule that an adversary would choose, and that must come to nothing."""

from vstack.mesh.messages import Op

from .test_replica import NODES, Mesh, config


def test_an_operation_that_waits_for_an_epoch_is_looked_at_now_and_then() -> None:
    mesh = Mesh(config(1, NODES[:1], 1))
    proposer = mesh.replicas[NODES[0]].proposer
    key = f"chunk/{'5e' * 32}/9000000.1/00000000"
    proposer.submit(Op(b"1" * 16, key, 1), 0.0, 60.0, "read")
    looks = 0
    while (at := proposer.next_wake()) is not None and at < 10.0:
        proposer.tick(at)
        looks += 1
    assert looks < 100, f"{looks} times in 10 s, for one operation"
