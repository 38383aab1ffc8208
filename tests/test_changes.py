"""How one configuration follows another: what is allowed, when, and what base becomes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vstack.mesh.changes import (
    MAX_OPEN,
    AddMember,
    Authorise,
    ChangeRefused,
    DrainMember,
    MeshChange,
    MoveBase,
    RemoveMember,
    ReplaceMember,
    Revoke,
    forced,
    leaving,
    successor,
    unsettled,
)
from vstack.mesh.config import Config, Grant, Member, NodeId, View

NODES = [f"{i:032x}" for i in range(1, 10)]


def member(node: NodeId, draining: bool = False) -> Member:
    return Member(node, f"{node[-2:]}:1", draining=draining)


def config(epoch: int, nodes: Sequence[NodeId], base: int, grants: tuple[Grant, ...] = ()) -> Config:
    return Config(epoch, tuple(member(n) for n in nodes), base, grants=grants)


def settled_view(nodes: Sequence[NodeId], grants: tuple[Grant, ...] = ()) -> View:
    return View((config(1, nodes, 1, grants),))


def after(view: View, change: MeshChange) -> View:
    view.adopt(successor(view, change))
    return view


def test_base_follows_by_itself_while_voters_stay_and_stands_still_while_they_move() -> None:
    view = settled_view(NODES[:3])
    after(view, Authorise(Grant(b"k" * 32, "admin")))
    assert (view.epoch, view.base) == (2, 1)
    after(view, AddMember(member(NODES[3])))
    assert (view.epoch, view.base) == (3, 2)
    after(view, Authorise(Grant(b"l" * 32, "reader")))
    assert (view.epoch, view.base) == (4, 2)
    after(view, MoveBase(4))
    assert (view.epoch, view.base) == (5, 4)


def test_members_are_sorted_whatever_the_order_of_changes() -> None:
    one = after(after(settled_view(NODES[:1]), AddMember(member(NODES[5]))), AddMember(member(NODES[3])))
    assert one.config.nodes == (NODES[0], NODES[3], NODES[5])


def test_a_change_carries_its_id() -> None:
    assert successor(settled_view(NODES[:1]), AddMember(member(NODES[1])), b"id").change == b"id"


def test_one_voter_leaves_at_a_time() -> None:
    view = after(settled_view(NODES[:5]), RemoveMember(NODES[0]))
    assert leaving(view) == {NODES[0]}
    for change in (RemoveMember(NODES[1]), DrainMember(NODES[1]), ReplaceMember(NODES[1], member(NODES[7]))):
        with pytest.raises(ChangeRefused, match="still moving"):
            successor(view, change)
    after(view, MoveBase(2))
    assert leaving(view) == frozenset()
    assert NODES[1] not in successor(view, RemoveMember(NODES[1])).nodes


def test_a_draining_node_leaves_the_voters_and_may_be_removed_at_once_afterwards() -> None:
    view = after(settled_view(NODES[:3]), DrainMember(NODES[0]))
    assert view.config.voters == tuple(NODES[1:3])
    assert leaving(view) == {NODES[0]}
    removed = successor(view, RemoveMember(NODES[0]))
    assert removed.voters == view.config.voters, "no voter leaves by this"


def test_draining_can_be_taken_back_and_is_not_asked_for_twice() -> None:
    view = after(settled_view(NODES[:3]), DrainMember(NODES[0]))
    with pytest.raises(ChangeRefused, match="draining already"):
        successor(view, DrainMember(NODES[0]))
    after(view, DrainMember(NODES[0], draining=False))
    assert view.config.voters == tuple(NODES[:3])
    with pytest.raises(ChangeRefused, match="is not draining"):
        successor(view, DrainMember(NODES[0], draining=False))


def test_so_many_runs_of_voters_are_open_and_no_more() -> None:
    view = settled_view(NODES[:1])
    for node in NODES[1:MAX_OPEN]:
        after(view, AddMember(member(node)))
    with pytest.raises(ChangeRefused, match="under way"):
        successor(view, AddMember(member(NODES[7])))
    assert successor(view, Authorise(Grant(b"k" * 32, "admin"))).epoch == view.epoch + 1
    after(view, MoveBase(view.epoch))
    assert NODES[7] in successor(view, AddMember(member(NODES[7]))).nodes


@pytest.mark.parametrize("node", [NODES[0], NODES[1]])
def test_the_last_voter_stays(node: NodeId) -> None:
    view = after(settled_view(NODES[:2]), DrainMember(NODES[1]))
    after(view, MoveBase(2))
    if node == NODES[0]:
        with pytest.raises(ChangeRefused, match="at least one voting node"):
            successor(view, RemoveMember(node))
        with pytest.raises(ChangeRefused, match="at least one voting node"):
            successor(view, DrainMember(node))
    else:
        assert successor(view, RemoveMember(node)).voters == (NODES[0],)


def test_a_replacement_takes_the_address_of_the_old_one_and_an_added_node_must_not() -> None:
    view = settled_view(NODES[:3])
    new = Member(NODES[7], member(NODES[0]).address)
    with pytest.raises(ChangeRefused, match="remove or replace it first"):
        successor(view, AddMember(new))
    assert successor(view, ReplaceMember(NODES[0], new)).voters == (NODES[1], NODES[2], NODES[7])


def test_who_is_no_member_is_neither_removed_nor_replaced_nor_drained() -> None:
    view = settled_view(NODES[:3])
    stranger = NODES[8]
    for change in (RemoveMember(stranger), ReplaceMember(stranger, member(NODES[7])), DrainMember(stranger)):
        with pytest.raises(ChangeRefused, match="not a member"):
            successor(view, change)


def test_adding_a_member_again_changes_its_place_and_keeps_it_draining() -> None:
    view = after(settled_view(NODES[:2]), DrainMember(NODES[1]))
    with pytest.raises(ChangeRefused, match="a member already"):
        successor(view, AddMember(member(NODES[1])))
    moved = successor(view, AddMember(Member(NODES[1], "elsewhere:1")))
    assert moved.member(NODES[1]) == Member(NODES[1], "elsewhere:1", draining=True)


def test_the_last_admin_stays_one() -> None:
    admin, reader = Grant(b"a" * 32, "admin"), Grant(b"r" * 32, "reader")
    view = settled_view(NODES[:1], (admin, reader))
    for change in (Revoke(admin.key), Authorise(Grant(admin.key, "writer"))):
        with pytest.raises(ChangeRefused, match="last admin"):
            successor(view, change)
    assert successor(view, Revoke(reader.key)).grants == (admin,)
    with pytest.raises(ChangeRefused, match="no client"):
        successor(view, Revoke(b"x" * 32))
    with pytest.raises(ChangeRefused, match="32 bytes"):
        successor(view, Authorise(Grant(b"short", "admin")))


# -- when base may move -----------------------------------------------------------------------------


@pytest.mark.parametrize(("voters", "silent"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (7, 2)])
def test_base_waits_for_all_old_voters_but_as_many_as_a_group_can_miss(voters: int, silent: int) -> None:
    view = View((config(1, NODES[:voters], 1), config(2, [*NODES[:voters], NODES[8]], 1)))
    enough = dict.fromkeys(NODES[silent:voters], 2)
    assert unsettled(view, enough) == {}
    too_few = dict.fromkeys(NODES[silent + 1 : voters], 2)
    assert list(unsettled(view, too_few)) == [1]


def test_what_was_settled_in_an_older_epoch_does_not_count_in_this_one() -> None:
    view = View((config(1, NODES[:1], 1), config(2, NODES[:2], 1), config(3, NODES[:3], 1)))
    assert unsettled(view, dict.fromkeys(NODES[:3], 2)) == {1: [NODES[0]], 2: NODES[:2]}
    assert unsettled(view, dict.fromkeys(NODES[:2], 3)) == {}


def test_each_open_epoch_is_waited_for_and_the_newest_is_not() -> None:
    view = View((config(1, NODES[:3], 1), config(2, NODES[3:6], 1)))
    assert list(unsettled(view, {})) == [1]
    assert unsettled(view, dict.fromkeys(NODES[:2], 2)) == {}


# -- the operator's way out -------------------------------------------------------------------------


def test_who_is_lost_is_waited_for_no_more_and_leaves_room_for_nobody_else() -> None:
    view = settled_view(NODES[:3])
    view.adopt(forced(view, NODES[:2], b"id"))
    assert view.config.nodes == (NODES[2],)
    assert view.lost == set(NODES[:2])
    assert leaving(view) == frozenset()
    assert list(unsettled(view, {})) == [1], "who is left still has to settle"
    assert unsettled(view, {NODES[2]: 2}) == {}


def test_somebody_who_votes_must_be_left_and_the_lost_must_be_members() -> None:
    view = after(settled_view(NODES[:3]), DrainMember(NODES[0]))
    with pytest.raises(ChangeRefused, match="at least one voting node"):
        forced(view, NODES[1:3], b"id")
    with pytest.raises(ChangeRefused, match="not a member"):
        forced(view, [NODES[8]], b"id")
