"""Pages of several acceptors laid over each other."""

from __future__ import annotations

import pytest

from vstack.mesh.config import Config, Member, View, group, key_subject
from vstack.mesh.messages import ABSENT, ZERO, Ballot, ScanReply, ScanRow, Value
from vstack.mesh.paxos.ranges import LISTING_BYTES, Merged, askers, merge

NODES = tuple(f"{i:032x}" for i in range(1, 10))
A, B, C = NODES[:3]


def config(count: int, epoch: int = 1, base: int = 1, first: int = 0) -> Config:
    return Config(epoch, tuple(Member(n, "a:1") for n in NODES[first : first + count]), base)


THREE = View((config(3),))


def key(number: int) -> str:
    return f"video/{number:064x}"


def ballot(round: int, epoch: int = 1) -> Ballot:
    return Ballot(epoch, round, A, 1)


def row(number: int, round: int = 1, epoch: int = 1) -> ScanRow:
    return ScanRow(key(number), ballot(round, epoch), Value(round, b"%d" % round))


def page(*rows: ScanRow, more: bool = False, epoch: int = 1) -> ScanReply:
    return ScanReply(rows, more, epoch)


def merged(*pages: ScanReply | None, view: View = THREE, limit: int = 1000) -> Merged:
    """Of the nodes of `view` in order; None: that one is silent."""
    replies = {n: p for n, p in zip(view.config.nodes, pages, strict=False) if p is not None}
    return merge(view, "video/", replies, limit)


# -- one key --------------------------------------------------------------------------------------


def test_a_majority_with_one_ballot_settles_a_key() -> None:
    m = merged(page(row(1, 5)), page(row(1, 5)), page(row(1, 4)))
    assert m.rows == {key(1): Value(5, b"5")}
    assert m.unsettled == []
    assert m.after == ""
    assert m.complete


def test_also_where_the_minority_has_the_higher_ballot() -> None:
    """It may be chosen later; at this moment the majority's is what a read may report."""
    m = merged(page(row(1, 5)), page(row(1, 5)), page(row(1, 9)))
    assert m.rows == {key(1): Value(5, b"5")}


def test_three_ballots_are_unsettled() -> None:
    m = merged(page(row(1, 5)), page(row(1, 6)), page(row(1, 7)))
    assert m.rows == {}
    assert m.unsettled == [key(1)]


def test_the_highest_ballot_of_a_mixed_pair_is_never_taken() -> None:
    m = merged(page(row(1, 5)), page(row(1, 6)), None)
    assert (m.rows, m.unsettled, m.complete) == ({}, [key(1)], True)


def test_one_page_alone_settles_nothing() -> None:
    m = merged(page(row(1, 5)), None, None)
    assert (m.rows, m.unsettled, m.complete) == ({}, [key(1)], False)


def test_a_record_that_only_one_of_three_has_is_settled_as_absent() -> None:
    m = merged(page(row(1, 5)), page(), page())
    assert m.rows == {key(1): ABSENT}
    m = merged(page(row(1, 5)), page(), None)
    assert m.unsettled == [key(1)], "of two, one has it and one does not"


def test_a_promise_without_a_value_counts_as_absent() -> None:
    empty = ScanRow(key(1), ZERO, ABSENT)
    m = merged(page(empty), page(empty), page(row(1, 3)))
    assert m.rows == {key(1): ABSENT}


def test_equal_rounds_of_different_owners_are_different_ballots() -> None:
    other = ScanRow(key(1), Ballot(1, 5, B, 1), Value(5, b"other"))
    m = merged(page(row(1, 5)), page(other), None)
    assert m.unsettled == [key(1)]


def test_pages_of_nodes_outside_the_group_do_not_settle_a_key() -> None:
    view = View((config(8),))
    inside = view.group(key(1))
    outside = [n for n in view.config.nodes if n not in inside]
    assert len(inside) == 5
    replies = {n: page(row(1, 5)) for n in [*inside[:2], *outside]}
    assert merge(view, "video/", replies, 10).unsettled == [key(1)]
    replies[inside[2]] = page(row(1, 5))
    assert merge(view, "video/", replies, 10).rows == {key(1): Value(5, b"5")}


# -- epochs ---------------------------------------------------------------------------------------


def test_pages_of_another_epoch_do_not_count() -> None:
    m = merged(page(row(1, 5)), page(row(1, 5), epoch=2), page(row(1, 5), epoch=0))
    assert (m.rows, m.unsettled, m.complete) == ({}, [key(1)], False)


def test_in_a_new_era_a_ballot_of_an_old_one_settles_nothing() -> None:
    view = View((config(3, 1), config(3, 2, base=1, first=1)))
    replies = {n: page(row(1, 5), epoch=2) for n in NODES[:4]}
    assert merge(view, "video/", replies, 10).unsettled == [key(1)]
    replies = {n: page(row(1, 5, epoch=2), epoch=2) for n in NODES[:4]}
    assert merge(view, "video/", replies, 10).rows == {key(1): Value(5, b"5")}


def test_with_two_eras_both_majorities_must_have_answered() -> None:
    view = View((config(3, 1), config(3, 2, base=1, first=3)))
    chunks = f"chunk/{'a' * 64}/1.2/"
    for prefix in ("video/", chunks):
        assert set(askers(view, prefix)) == set(NODES[:6])
        for silent, complete in [
            ((), True),
            ((0, 3), True),
            ((0, 1), False),
            ((3, 5), False),
            ((0, 1, 2), False),
        ]:
            replies = {n: page(epoch=2) for i, n in enumerate(NODES[:6]) if i not in silent}
            assert merge(view, prefix, replies, 10).complete == complete, (prefix, silent)


def test_eras_before_the_base_are_not_asked() -> None:
    view = View((config(3, 1), config(3, 2, base=2, first=3)))
    assert set(askers(view, "video/")) == set(NODES[3:6])


# -- completeness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "may_be_silent"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (9, 2)]
)
def test_a_listing_of_videos_is_complete_if_no_group_can_have_lost_its_majority(
    members: int, may_be_silent: int
) -> None:
    view = View((config(members),))
    assert set(askers(view, "video/")) == set(NODES[:members])
    for silent in range(members + 1):
        replies = {n: page() for n in NODES[silent:members]}
        assert merge(view, "video/", replies, 10).complete == (silent <= may_be_silent)


@pytest.mark.parametrize("prefix", [f"chunk/{'b' * 64}/1.2/", f"views/{'b' * 64}/", f"video/{'b' * 64}"])
def test_a_listing_of_one_videos_registers_asks_its_group_and_needs_a_majority_of_it(prefix: str) -> None:
    view = View((config(9),))
    acceptors = askers(view, prefix)
    assert acceptors == group(view.config, key_subject(prefix))
    assert len(acceptors) == 5
    strangers = {n: page() for n in NODES if n not in acceptors}
    for answered in range(6):
        replies = {n: page() for n in acceptors[:answered]}
        assert merge(view, prefix, {**replies, **strangers}, 10).complete == (answered >= 3)


@pytest.mark.parametrize("rest", ["", "b" * 63, f"{'b' * 63}/"])
@pytest.mark.parametrize("kind", ["chunk", "views", "video"])
def test_registers_of_more_than_one_video_have_more_than_one_group(kind: str, rest: str) -> None:
    view = View((config(9),))
    prefix = f"{kind}/{rest}"
    assert set(askers(view, prefix)) == set(NODES)
    assert not merge(view, prefix, {n: page() for n in NODES[:5]}, 10).complete
    assert merge(view, prefix, {n: page() for n in NODES[:7]}, 10).complete


# -- pages ----------------------------------------------------------------------------------------


def test_nothing_above_the_end_of_the_shortest_page_is_believed() -> None:
    """Node C stopped at 3: that it does not show 4 says nothing about 4."""
    full = page(*(row(i) for i in range(1, 7)))
    m = merged(full, page(), page(*(row(i) for i in range(1, 4)), more=True))
    assert sorted(m.rows) == [key(1), key(2), key(3)]
    assert m.after == key(3)
    assert m.unsettled == []


def test_of_several_pages_that_end_early_the_shortest_counts() -> None:
    one = page(*(row(i) for i in range(1, 4)), more=True)
    two = page(*(row(i) for i in range(1, 6)), more=True)
    m = merged(one, two, page(*(row(i) for i in range(1, 9))))
    assert sorted(m.rows) == [key(1), key(2), key(3)]
    assert m.after == key(3)


def test_a_short_page_that_is_the_last_one_bounds_nothing() -> None:
    full = page(*(row(i) for i in range(1, 7)))
    m = merged(full, full, page(row(1)))
    assert sorted(m.rows) == [key(i) for i in range(1, 7)]
    assert m.after == ""


def walk(pages: dict[str, list[ScanRow]], limit: int, of_node: int) -> tuple[dict[str, Value], int]:
    """A whole listing, page by page, as a client makes it: every node's pages have `of_node` rows."""
    found: dict[str, Value] = {}
    after, turns = "", 0
    while True:
        turns += 1
        replies = {}
        for node, rows in pages.items():
            rest = [r for r in rows if r.key > after]
            replies[node] = page(*rest[:of_node], more=len(rest) > of_node)
        m = merge(THREE, "video/", replies, limit)
        assert len(m.rows) + len(m.unsettled) <= limit
        for k, value in m.rows.items():
            assert k > after
            assert k not in found, "a key on two pages"
            found[k] = value
        assert not m.after or m.after > after, "no progress"
        after = m.after
        if not after:
            return found, turns


@pytest.mark.parametrize(("limit", "of_node"), [(1, 1), (3, 7), (7, 3), (4, 4), (1000, 1000)])
def test_pages_follow_each_other_without_a_gap(limit: int, of_node: int) -> None:
    rows = {n: [row(i) for i in range(1, 40) if i % 4 != which] for which, n in enumerate((A, B, C), 1)}
    found, turns = walk(rows, limit, of_node)
    assert sorted(found) == [key(i) for i in range(1, 40)]
    assert all(v == Value(1, b"1") for v in found.values()), "each is on two of three nodes"
    assert turns >= 39 / max(limit, 1)


def test_a_page_of_large_records_ends_early() -> None:
    rows = [ScanRow(key(i), ballot(1), Value(1, bytes(4096))) for i in range(1000)]
    m = merged(page(*rows), page(*rows), page(*rows))
    assert m.after == key(len(m.rows) - 1)
    assert LISTING_BYTES <= sum(len(v.data or b"") + 100 for v in m.rows.values()) <= LISTING_BYTES + 2 * 4200


def test_unsettled_keys_count_as_large_because_they_are_read_one_by_one() -> None:
    m = merged(page(*(row(i, 1) for i in range(900))), page(*(row(i, 2) for i in range(900))), None)
    assert m.rows == {}
    assert LISTING_BYTES // 4096 <= len(m.unsettled) <= LISTING_BYTES // 4096 + 2
    assert m.after == m.unsettled[-1]


def test_nothing_at_all_is_an_empty_and_incomplete_listing() -> None:
    assert merged(None, None, None) == Merged({}, [], "", False)
    assert merged(page(), page(), page()) == Merged({}, [], "", True)
