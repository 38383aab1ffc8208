"""Groups, eras and leaders: the same on every machine, computed from the configuration alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import msgspec
import pytest

from vstack.mesh.config import (
    GENESIS,
    Config,
    Member,
    NodeId,
    View,
    group,
    key_epoch,
    key_subject,
    leader,
    mesh_id,
    pack_config,
    unpack_config,
)

NODES = tuple(f"{i:032x}" for i in range(1, 31))
VIDEO = "ab" * 32


def config(nodes: tuple[NodeId, ...], epoch: int = 1, base: int = 1) -> Config:
    return Config(epoch, tuple(Member(n, "node:1") for n in nodes), base)


def videos(count: int) -> list[str]:
    return [f"{i:064x}" for i in range(count)]


@pytest.mark.parametrize(
    ("members", "g"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (6, 5), (7, 5), (8, 5), (30, 5)]
)
def test_the_size_of_a_group_follows_from_the_number_of_members(members: int, g: int) -> None:
    c = config(NODES[:members])
    assert c.g == g
    for video in videos(50):
        acceptors = group(c, video)
        assert len(set(acceptors)) == len(acceptors) == g
        assert set(acceptors) <= set(c.nodes)


def test_groups_are_these_on_every_machine() -> None:
    """Written down once: if they change, meshes that exist lose their registers."""
    seven, four = config(NODES[:7]), config(NODES[:4])
    numbers = {video: [int(n, 16) for n in group(seven, video)] for video in (VIDEO, "00" * 32, "ff" * 32)}
    assert numbers == GOLDEN_SEVEN
    assert [int(n, 16) for n in group(four, VIDEO)] == GOLDEN_FOUR
    keys = [f"chunk/{VIDEO}/1.1048577/{i * 128:08d}" for i in range(7)]
    assert [int(leader(seven, k) or "", 16) for k in keys] == GOLDEN_LEADERS
    assert mesh_id(seven) == GOLDEN_MESH


def test_groups_do_not_depend_on_the_process_or_the_order_or_what_else_members_say() -> None:
    code = (
        "from tests.test_config import *\n"
        "print(*[n for v in videos(20) for n in group(config(NODES[:7]), v)], leader(config(NODES[:7]), "
        "'chunk/' + VIDEO + '/1.5/00000000'))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p) + ":."},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    plain = config(NODES[:7])
    members = tuple(Member(n, f"elsewhere:{i}", "zone", 1000 * i) for i, n in enumerate(reversed(NODES[:7])))
    other = Config(9, members, 3)
    assert all(group(plain, v) == group(other, v) for v in videos(50))


def test_groups_are_spread_evenly() -> None:
    c = config(NODES[:10])
    counts = Counter(n for v in videos(4000) for n in group(c, v))
    assert set(counts) == set(c.nodes)
    assert max(counts.values()) < 2000 * 1.1
    assert min(counts.values()) > 2000 * 0.9


def test_a_new_member_changes_few_groups_and_each_by_one_node() -> None:
    before, after = config(NODES[:10]), config(NODES[:11])
    changed = 0
    for video in videos(2000):
        old, new = set(group(before, video)), set(group(after, video))
        assert len(old - new) == len(new - old) <= 1
        assert new - old <= {NODES[10]}
        changed += old != new
    assert 0.38 < changed / 2000 < 0.53, "5 of 11"


def test_all_registers_of_a_video_share_a_group() -> None:
    view = View((config(NODES[:12]),))
    keys = [
        f"video/{VIDEO}",
        f"views/{VIDEO}/19000",
        f"chunk/{VIDEO}/1.5/00000000",
        f"chunk/{VIDEO}/1.6/00999999",
    ]
    assert len({view.group(k) for k in keys}) == 1
    assert {key_subject(k) for k in [*keys, f"chunk/{VIDEO}/1.5/"]} == {VIDEO}


# -- eras -----------------------------------------------------------------------------------------


def chain(*groups: tuple[NodeId, ...], base: int = 1) -> View:
    return View(tuple(config(g, epoch, min(base, epoch)) for epoch, g in enumerate(groups, 1)))


A, B = NODES[:3], NODES[3:6]


def test_epochs_with_the_same_group_are_one_era() -> None:
    eras = chain(A, A, A).eras(f"video/{VIDEO}")
    assert [(e.first, set(e.group)) for e in eras] == [(1, set(A))]
    assert eras[0].majority == 2


def test_a_group_that_comes_back_is_an_era_of_its_own() -> None:
    """Bug B16: A, B, A taken as a set skips what was chosen in B."""
    eras = chain(A, B, A).eras(f"video/{VIDEO}")
    assert [(e.first, set(e.group)) for e in eras] == [(3, set(A)), (2, set(B)), (1, set(A))]


def test_eras_begin_at_the_base() -> None:
    eras = chain(A, B, A, base=2).eras(f"video/{VIDEO}")
    assert [e.first for e in eras] == [3, 2]
    view = chain(A, B, base=2)
    assert not view.serves(A[0], f"video/{VIDEO}")
    assert view.serves(B[0], f"video/{VIDEO}")
    assert chain(A, B).serves(A[0], f"video/{VIDEO}")


def test_adopting_an_epoch_forgets_the_eras_of_before() -> None:
    view = chain(A)
    key = f"video/{VIDEO}"
    assert len(view.eras(key)) == 1
    view.adopt(config(B, 2))
    assert [e.first for e in view.eras(key)] == [2, 1]
    view.adopt(config(B, 3, base=2))
    assert [e.first for e in view.eras(key)] == [2]
    assert (view.epoch, view.base) == (3, 2)
    assert [c.epoch for c in view.chain()] == [2, 3], "what is older than base is forgotten"
    assert view.at(2).epoch == 2


@pytest.mark.parametrize("epoch", [0, 1, 3, 7])
def test_only_the_successor_can_be_adopted(epoch: int) -> None:
    view = chain(A)
    with pytest.raises(ValueError, match="does not follow"):
        view.adopt(config(B, epoch))
    assert view.epoch == 1


def test_a_view_needs_a_configuration() -> None:
    with pytest.raises(ValueError):
        View(())


# -- leaders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 3, 4, 5, 9])
def test_the_leader_is_an_acceptor_and_turns_every_128_chunks(members: int) -> None:
    c = config(NODES[:members])
    for video in videos(10):
        acceptors = group(c, video)
        leaders = [leader(c, f"chunk/{video}/1.5/{i:08d}") for i in range(128 * 11)]
        for i in range(0, len(leaders), 128):
            assert len(set(leaders[i : i + 128])) == 1
        turns = [acceptors.index(n or "") for n in leaders[::128]]
        assert turns == [(turns[0] + i) % len(acceptors) for i in range(len(turns))]


def test_first_leaders_of_many_videos_are_spread_over_the_group() -> None:
    c = config(NODES[:5])
    counts = Counter(leader(c, f"chunk/{v}/1.5/00000000") for v in videos(2000))
    assert len(counts) == 5
    assert max(counts.values()) < 400 * 1.2


def test_only_chunks_have_a_leader() -> None:
    view = chain(A)
    for key in (f"video/{VIDEO}", f"views/{VIDEO}/1", "config/1"):
        assert view.leader(key) is None
    assert leader(GENESIS, f"chunk/{VIDEO}/0.5/00000000") is None, "nobody is a member"


def test_the_leader_is_drawn_from_the_epoch_that_named_the_upload() -> None:
    view = chain(A, B)
    assert view.leader(f"chunk/{VIDEO}/1.5/00000000") in A
    assert view.leader(f"chunk/{VIDEO}/2.5/00000000") in B
    assert view.leader(f"chunk/{VIDEO}/9.5/00000000") in B, "of an unknown epoch: a hint only"


def test_the_epoch_of_a_key_is_that_of_its_upload() -> None:
    assert key_epoch(f"chunk/{VIDEO}/17.1048577/00000003") == 17
    assert key_epoch(f"video/{VIDEO}") == 0
    assert key_epoch("config/1") == 0
    with pytest.raises(ValueError):
        key_epoch("chunk/x/y")


# -- packing --------------------------------------------------------------------------------------


def test_a_configuration_comes_back_as_it_was_and_rubbish_does_not() -> None:
    c = Config(7, (Member(NODES[0], "[::1]:7400", "rack 1", 12), Member(NODES[1], "b:1")), 3)
    assert unpack_config(pack_config(c)) == c
    assert c.member(NODES[1]) == c.members[1]
    assert c.member(NODES[2]) is None
    for raw in (b"", b"\xc0", pack_config(c)[:-1], pack_config(c) + b"\0"):
        with pytest.raises(msgspec.DecodeError):
            unpack_config(raw)


def test_meshes_with_different_members_have_different_names() -> None:
    first = config(NODES[:3])
    others = [
        config(NODES[:2]),
        config(NODES[1:4]),
        msgspec.structs.replace(first, members=first.members[::-1]),
        msgspec.structs.replace(first, members=(Member(NODES[0], "node:2"), *first.members[1:])),
    ]
    assert len({mesh_id(c) for c in [first, *others]}) == 5
    assert all(len(mesh_id(c)) == 32 for c in others)


GOLDEN_SEVEN = {VIDEO: [6, 5, 7, 2, 4], "00" * 32: [4, 1, 7, 3, 5], "ff" * 32: [1, 3, 2, 7, 4]}
GOLDEN_FOUR = [2, 4, 1]
GOLDEN_LEADERS = [2, 4, 6, 5, 7, 2, 4]
GOLDEN_MESH = "413b833553027db996bff4503fdb1823"
