"""A schedule that an adversary would choose, and that must come to nothing."""

from vstack.mesh.messages import Ballot, Envelope, Header, Nack, Ok, Op, decode, encode

from .test_replica import NODES, VIDEO, Mesh, config

A, B, C = NODES[:3]


def test_a_refusal_that_names_the_last_round_does_not_end_the_proposals_of_whoever_reads_it() -> None:
    mesh = Mesh(config(1, [A, B, C], 1))
    mine = mesh.replicas[A]
    mine.proposer.submit(Op(b"1" * 16, VIDEO, 1, 0, b"x"), mesh.now, mesh.now + 1, "first")
    ballot = next(m.ballot for _, m in mine.proposer.outbox)  # type: ignore[union-attr]
    mine.receive(B, B, Nack(VIDEO, ballot, Ballot(1, (1 << 63) - 1, B, 1), 1), mesh.now)
    other = "video/" + "77" * 32
    mine.proposer.submit(Op(b"2" * 16, other, 1, 0, b"y"), mesh.now, mesh.now + 9, "second")
    mesh.until(lambda: "second" in mesh.done, 20)
    assert isinstance(mesh.done["second"], Ok)
    for _, _, m in mesh.sent:
        decode(encode(Header(Envelope((m,)))))
