"""Where pieces go: in proportion, apart from each other, and hardly moving."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstack.mesh.config import Member
from vstack.mesh.placement import choose_scheme, fits, next_holder, order, shortfall, survives
from vstack.mesh.registers import ERASURE, REPLICATED, Scheme

VIDEO = "ab" * 32


def members(count: int, zones: int = 0, weight: int = 1) -> list[Member]:
    return [
        Member(f"{i:032x}", f"n{i}:1", f"zone {i % zones}" if zones else "", weight)
        for i in range(1, count + 1)
    ]


def place(nodes: list[Member], pieces: int, chunk: int, unusable: tuple[str, ...] = ()) -> list[str]:
    """Nodes of a chunk's pieces, chosen one after the other as an uploader does."""
    ranked, taken = order(nodes, VIDEO, chunk), list[str]()
    for _ in range(pieces):
        member = next_holder(ranked, taken, unusable)
        assert member is not None
        taken.append(member.node)
    return taken


@pytest.mark.parametrize("count", [5, 6, 8, 13, 20, 30])
def test_pieces_are_spread_within_ten_percent_of_even(count: int) -> None:
    nodes = members(count)
    chunks = 600 * count
    counts = Counter(n for chunk in range(chunks) for n in place(nodes, 5, chunk))
    even = chunks * 5 / count
    assert set(counts) == {m.node for m in nodes}
    assert max(counts.values()) < even * 1.1
    assert min(counts.values()) > even * 0.9


def test_a_node_of_twice_the_weight_gets_twice_the_pieces() -> None:
    nodes = [
        Member(m.node, m.address, "", w) for m, w in zip(members(8), [1, 1, 1, 1, 2, 2, 4, 0], strict=True)
    ]
    counts = Counter(order(nodes, VIDEO, chunk)[0].node for chunk in range(12_000))
    for m in nodes[:7]:
        assert counts[m.node] == pytest.approx(12_000 * m.weight / 12, rel=0.1)
    assert counts[nodes[7].node] == 0


def test_a_node_of_no_weight_gets_nothing_even_if_it_is_the_only_one() -> None:
    assert order([Member("a" * 32, "a:1", "", 0)], VIDEO, 0) == []
    assert order([], VIDEO, 0) == []


def test_the_first_pieces_go_to_different_zones() -> None:
    nodes = members(12, zones=4)
    for chunk in range(200):
        zones = [m.zone for m in order(nodes, VIDEO, chunk)]
        for turn in range(3):
            assert len(set(zones[4 * turn : 4 * turn + 4])) == 4, "each zone once before any twice"


def test_zones_of_different_sizes_are_each_served_before_one_is_served_twice() -> None:
    nodes = [Member(f"{i:032x}", "a:1", z) for i, z in enumerate(["big"] * 7 + ["small", ""])]
    for chunk in range(100):
        zones = [m.zone for m in order(nodes, VIDEO, chunk)]
        assert sorted(zones[:3]) == ["", "big", "small"]
        assert sorted(m.node for m in order(nodes, VIDEO, chunk)) == sorted(m.node for m in nodes)


def test_nodes_without_a_zone_are_zones_of_their_own() -> None:
    nodes = members(6)
    by_score = [m.node for m in order(nodes, VIDEO, 7)]
    named = [Member(m.node, m.address, f"zone {i}") for i, m in enumerate(nodes)]
    assert [m.node for m in order(named, VIDEO, 7)] == by_score


def test_nodes_without_a_zone_do_not_wait_for_each_other() -> None:
    nodes = [*members(4), *[Member(f"{i:032x}", "a:1", "rack") for i in range(11, 14)]]
    for chunk in range(50):
        zones = [m.zone for m in order(nodes, VIDEO, chunk)]
        assert sorted(zones[:5]) == ["", "", "", "", "rack"]


def test_the_order_depends_on_nothing_but_members_video_and_chunk() -> None:
    nodes = members(9, zones=3)
    shuffled = Random(1).sample(nodes, len(nodes))
    assert all(order(nodes, VIDEO, c) == order(shuffled, VIDEO, c) for c in range(50))
    assert len({tuple(order(nodes, VIDEO, c)) for c in range(50)}) > 40
    assert order(nodes, VIDEO, 0) != order(nodes, "cd" * 32, 0)


@pytest.mark.parametrize("count", [5, 9, 20])
def test_a_new_node_takes_its_share_and_nothing_else_moves(count: int) -> None:
    before, after = members(count), members(count + 1)
    new = after[-1].node
    moved = 0
    for chunk in range(1500):
        old, now = set(place(before, 3, chunk)), set(place(after, 3, chunk))
        assert now - old <= {new}, "pieces move to the new node only"
        moved += len(now - old)
    assert moved / (1500 * 3) == pytest.approx(1 / (count + 1), rel=0.15)


def test_a_lost_nodes_pieces_are_spread_over_all_others() -> None:
    nodes = members(10)
    inherited: Counter[str] = Counter()
    for chunk in range(3000):
        old = set(place(nodes, 3, chunk))
        new = set(place(nodes, 3, chunk, unusable=(nodes[0].node,)))
        assert old - new <= {nodes[0].node}
        inherited.update(new - old)
    assert set(inherited) == {m.node for m in nodes[1:]}
    assert max(inherited.values()) < 2 * min(inherited.values())


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 4), st.integers(0, 1000), st.integers(0, 1 << 30)
)
def test_no_node_gets_a_second_piece_while_another_usable_one_is_free(
    count: int, pieces: int, zones: int, chunk: int, seed: int
) -> None:
    nodes = members(count, zones)
    rng = Random(seed)
    unusable = tuple(m.node for m in nodes if rng.random() < 0.3)
    if len(unusable) == count:
        assert next_holder(order(nodes, VIDEO, chunk), [], unusable) is None
        return
    taken = Counter(place(nodes, pieces, chunk, unusable))
    assert not set(taken) & set(unusable)
    usable = count - len(unusable)
    assert len(taken) == min(pieces, usable)
    assert max(taken.values()) - min(taken.values()) <= (1 if pieces > usable else 0)


# -- schemes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "wanted", "written", "short"),
    [
        (1, ERASURE, Scheme(1, 1), "degraded: 1 of 3 copies"),
        (2, ERASURE, Scheme(1, 2), "degraded: 2 of 3 copies"),
        (3, ERASURE, ERASURE, ""),
        (4, ERASURE, ERASURE, ""),
        (5, ERASURE, ERASURE, ""),
        (30, ERASURE, ERASURE, ""),
        (1, REPLICATED, Scheme(1, 1), "degraded: 1 of 3 copies"),
        (2, REPLICATED, Scheme(1, 2), "degraded: 2 of 3 copies"),
        (3, REPLICATED, REPLICATED, ""),
        (4, REPLICATED, REPLICATED, ""),
        (5, REPLICATED, REPLICATED, ""),
        (0, REPLICATED, Scheme(1, 1), "degraded: 1 of 3 copies"),
        (0, ERASURE, Scheme(1, 1), "degraded: 1 of 3 copies"),
    ],
)
def test_what_is_written_on_few_nodes_and_what_is_said_about_it(
    nodes: int, wanted: Scheme, written: Scheme, short: str
) -> None:
    assert choose_scheme(wanted, nodes) == written
    assert shortfall(wanted, written) == short


@pytest.mark.parametrize(
    ("scheme", "fewest"),
    [(ERASURE, 3), (Scheme(2, 3), 3), (Scheme(4, 6), 3), (Scheme(1, 2), 2), (Scheme(1, 3), 2)],
)
def test_a_scheme_fits_if_any_one_node_may_be_lost(scheme: Scheme, fewest: int) -> None:
    for nodes in range(12):
        assert fits(scheme, nodes) == (nodes >= fewest)
        if nodes:
            spread = [f"{i % nodes}" for i in range(scheme.m)]
            assert survives(scheme, spread) == fits(scheme, nodes), "the rule and the count agree"


def test_a_scheme_without_redundancy_never_fits() -> None:
    assert not any(fits(Scheme(3, 3), n) for n in range(10))
    assert choose_scheme(Scheme(3, 3), 9) == REPLICATED


@pytest.mark.parametrize(
    ("scheme", "holders", "expected"),
    [
        (ERASURE, "ABCDE", True),
        (ERASURE, "AABBC", True),
        (ERASURE, "AAABC", False),
        (ERASURE, "ABCD", True),
        (ERASURE, "ABC", False),
        (ERASURE, "", False),
        (REPLICATED, "AB", True),
        (REPLICATED, "A", False),
        (REPLICATED, "AA", False),
        (REPLICATED, "", False),
    ],
)
def test_an_upload_survives_if_the_pieces_outside_any_one_node_still_number_k(
    scheme: Scheme, holders: str, expected: bool
) -> None:
    assert survives(scheme, tuple(holders)) is expected


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_what_is_placed_survives_the_loss_of_any_node(count: int) -> None:
    nodes = members(count)
    for chunk in range(100):
        assert survives(ERASURE, place(nodes, 5, chunk))
