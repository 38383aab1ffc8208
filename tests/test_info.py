"""What `vstack info` says of where a video lies: only pieces on members of the mesh count."""

from __future__ import annotations

from vstack.cli.catalogue import holder, readable, survives
from vstack.mesh.config import Config, Member
from vstack.mesh.registers import (
    ERASURE,
    REPLICATED,
    ChunkEntry,
    ChunkRecord,
    Place,
    Scheme,
)

NODES = [f"{n:02x}" * 16 for n in range(0x10, 0x16)]
GONE = [f"{n:02x}" * 16 for n in range(0xE0, 0xE6)]


def mesh(count: int) -> Config:
    return Config(1, tuple(Member(n, f"10.0.0.{i}:7400") for i, n in enumerate(NODES[:count])), 1)


def chunk(scheme: Scheme, *nodes: str) -> ChunkRecord:
    """Its pieces on `nodes`, in order."""
    places = tuple(Place(n, 0 if scheme.k == 1 else i, bytes(32)) for i, n in enumerate(nodes))
    return ChunkRecord(ChunkEntry(0, 0, 1, 10, bytes(32)), scheme, places)


def test_all_pieces_on_members_survive_what_their_code_and_the_votes_allow() -> None:
    said = survives(mesh(5), [chunk(ERASURE, *NODES[:5])])
    assert said == "the loss of any 2 of 5 nodes (the limit: pieces and votes alike)"


def test_pieces_on_nodes_that_are_gone_do_not_count() -> None:
    one_gone = chunk(ERASURE, *NODES[:4], GONE[0])
    assert "any 1 of 5 nodes (the limit: its pieces)" in survives(mesh(5), [one_gone])
    two_gone = chunk(ERASURE, *NODES[:3], *GONE[:2])
    assert "the loss of none of 5 nodes" in survives(mesh(5), [two_gone])
    assert "any 1 of 5 nodes" in survives(mesh(5), [chunk(REPLICATED, *NODES[:2], GONE[0])])


def test_the_worst_chunk_sets_the_limit() -> None:
    good, bad = chunk(ERASURE, *NODES[:5]), chunk(ERASURE, *NODES[:4], GONE[0])
    assert "any 1 of 5" in survives(mesh(5), [good, bad, good])


def test_a_chunk_with_too_few_pieces_on_members_cannot_be_read() -> None:
    good, lost = chunk(ERASURE, *NODES[:3]), chunk(ERASURE, *NODES[:2], *GONE[:3])
    assert readable(good, NODES)
    assert not readable(lost, NODES)
    assert not readable(chunk(REPLICATED, *GONE[:3]), NODES)
    assert survives(mesh(5), [good, lost]).startswith("nothing: 1 chunk cannot be read")


def test_two_places_of_the_same_fragment_count_once() -> None:
    twice = chunk(ERASURE, *NODES[:3])
    twice = ChunkRecord(
        twice.entry,
        ERASURE,
        tuple(Place(p.node, min(p.piece, 1), p.sha256) for p in twice.places),
    )
    assert not readable(twice, NODES)


def test_nodes_that_do_not_answer_count_as_lost_already() -> None:
    spread = [chunk(ERASURE, *NODES[:5])]
    assert survives(mesh(5), spread, NODES[:1]).startswith("the loss of any 1 of 4 nodes that answer")
    assert survives(mesh(5), spread, NODES[:2]).startswith("the loss of none of 3 nodes that answer")
    assert (
        survives(mesh(5), spread, NODES[:3]) == "nothing: 1 chunk cannot be read while 3 nodes do not answer"
    )


def test_several_fragments_on_one_node_are_lost_together() -> None:
    spread = chunk(ERASURE, NODES[0], NODES[1], NODES[2], NODES[0], NODES[1])
    assert "any 1 of 3 nodes" in survives(mesh(3), [spread])


def test_a_place_on_a_node_that_is_gone_is_marked() -> None:
    assert holder(Place(NODES[0], 0, bytes(32)), NODES) == NODES[0][:8]
    assert holder(Place(GONE[0], 0, bytes(32)), NODES) == f"gone:{GONE[0][:8]}"


def test_a_mesh_of_one_is_spoken_of_in_the_singular() -> None:
    assert "the loss of none of 1 node (" in survives(mesh(1), [chunk(Scheme(1, 1), NODES[0])])
