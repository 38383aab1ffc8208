"""Schedules by hand: how others have lost data, and how it would be lost here if one guard were missing.

Each raises AssertionError or Violation if the classes that it is given do the wrong thing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import msgspec

from tests.keeper_sim.scene import GRACE, UNDELETE, Scene
from tests.keeper_sim.world import Parts, SimNode
from vstack.errors import OutcomeUnknown
from vstack.mesh.config import group
from vstack.mesh.mesh_client import Change
from vstack.mesh.messages import Mismatch, Ok
from vstack.mesh.registers import ERASURE, REPLICATED, UPLOADED, PieceKey, Scheme, UploadId, chunk_prefix
from vstack.node.keeper.budget import Budget
from vstack.node.keeper.plan import Nodes, plan


async def collect(nodes: Sequence[SimNode], passes: int = 1) -> None:
    """The grace passes, and the collectors go through their stores."""
    for _ in range(passes):
        await asyncio.sleep(GRACE + 1)
        for node in nodes:
            await node.collector.collect()


def source_is_kept_until_the_new_pieces_are_safe(parts: Parts) -> None:
    """The switch is done, but one of the new fragments rots before anybody has looked at it again."""
    scene = Scene(6, parts)

    async def schedule() -> None:
        copies = await scene.store(REPLICATED, scene.nodes[:3])
        nodes, mender = Nodes(scene.world.config.members), scene.nodes[0].mender
        old = [scene.key_of(place) for place in copies]
        assert (await mender.mend(scene.target, ERASURE, nodes)).outcome == "done"
        fragment = scene.record.places[0]
        assert scene.world.spoil(scene.key_of(fragment))
        await collect(scene.nodes[:3], 3)
        assert all(scene.ledger.good(held) for held in old), "the source went first"
        assert (await mender.mend(scene.target, ERASURE, nodes, [fragment])).outcome == "done"
        await collect(scene.nodes[:3], 2)
        assert not any(scene.ledger.good(held) for held in old)

    scene.play(schedule())


def garbage_is_not_what_a_partial_listing_misses(parts: Parts) -> None:
    """Every listing is incomplete, and says so."""
    scene = Scene(3, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes)
        scene.world.profile = replace(scene.world.profile, incomplete=1.0)
        await collect(scene.nodes, 6)
        assert all(scene.has(place) for place in places)

    scene.play(schedule())


def late_commit_does_not_name_what_was_collected(parts: Parts) -> None:
    """A keeper has written a piece, and its change of the register happens when the piece has long gone."""
    scene = Scene(4, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        expect = scene.version
        new = scene.put(scene.nodes[3], 0, REPLICATED, scene.generation(scene.nodes[0]))
        await scene.nodes[3].collector.collect()
        await collect([scene.nodes[3]], 3)
        assert not scene.has(new)
        assert not await scene.name(REPLICATED, [*places[:2], new], expect)
        assert scene.record.places == places

    scene.play(schedule())


def two_keepers_do_not_write_the_same_piece(parts: Parts) -> None:
    """Both switch the same chunk, one of them to what an operator has just said."""
    scene = Scene(6, parts)

    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes[:3])
        nodes = Nodes(scene.world.config.members)
        mended = await asyncio.gather(
            scene.nodes[0].mender.mend(scene.target, ERASURE, nodes),
            scene.nodes[1].mender.mend(scene.target, Scheme(2, 4), nodes),
        )
        assert sorted(m.outcome for m in mended) == ["done", "overtaken"]
        await collect(scene.nodes, 4)
        assert sum(len(n.disk.pieces) for n in scene.nodes) == scene.record.scheme.m

    scene.play(schedule())


def last_copies_stay_while_the_named_ones_are_not_all_there(parts: Parts) -> None:
    """Two of three named copies have gone, and nobody has noticed yet."""
    scene = Scene(4, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        spare = scene.put(scene.nodes[3], 0, REPLICATED, scene.generation(scene.nodes[0]))
        assert await scene.name(REPLICATED, places)  # the register moves past it
        for place in places[:2]:
            assert scene.world.spoil(scene.key_of(place), vanish=True)
        await scene.nodes[3].collector.collect()
        await collect([scene.nodes[3]], 3)
        assert scene.has(spare)

    scene.play(schedule())


def late_adoption_does_not_name_what_was_collected(parts: Parts) -> None:
    """A node adopts one of its pieces, is not told that it did, and finds that it is not needed after all."""
    scene = Scene(4, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        fourth, lost = scene.nodes[3], scene.nodes[2]
        orphan = scene.put(fourth, 0, REPLICATED, scene.generation(scene.nodes[0]))
        assert await scene.name(REPLICATED, places)
        await _count_as_gone(lost, fourth)
        asked: list[Change] = []

        async def change(wanted: Change) -> Ok | Mismatch:
            asked.append(wanted)
            raise OutcomeUnknown("nobody knows")

        with patch.object(fourth.collector._mesh, "change", change):
            await fourth.collector.collect()
        lost.silent = False
        fourth.look()
        await collect([fourth], 3)
        assert len(asked) == 1
        assert not scene.has(orphan)
        assert isinstance(await scene.client.change(asked[0]), Mismatch)

    scene.play(schedule())


async def _count_as_gone(lost: SimNode, by: SimNode) -> None:
    lost.silent = True
    by.look()
    by.keeper.gone()
    await asyncio.sleep(lost.world.profile.repair_delay + 1)
    assert by.keeper.gone() == {lost.id}


def damaged_pieces_are_not_adopted(parts: Parts) -> None:
    """A node is gone, and another one has a copy of what it held, which nobody has read for long."""
    scene = Scene(4, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        fourth = scene.nodes[3]
        orphan = scene.put(fourth, 0, REPLICATED, scene.generation(scene.nodes[0]))
        assert await scene.name(REPLICATED, places)
        assert scene.world.spoil(scene.key_of(orphan))
        await _count_as_gone(scene.nodes[2], fourth)
        await fourth.collector.collect()
        assert scene.record.places == places

    scene.play(schedule())


def piece_that_was_named_between_two_passes_has_its_whole_grace_again(parts: Parts) -> None:
    scene = Scene(4, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        fourth = scene.nodes[3]
        new = scene.put(fourth, 0, REPLICATED, scene.generation(scene.nodes[0]))
        await fourth.collector.collect()  # nobody has named it yet
        assert await scene.name(REPLICATED, [*places[:2], new])
        await asyncio.sleep(GRACE + 1)
        assert await scene.name(REPLICATED, places)
        await fourth.collector.collect()
        assert scene.has(new), "somebody may be reading it"
        await collect([fourth])
        assert not scene.has(new)

    scene.play(schedule())


def keeper_that_was_overtaken_changes_nothing(parts: Parts) -> None:
    """It is so slow that another one has switched the chunk meanwhile, and the fragments that it wants to
    keep were collected."""
    scene = Scene(6, parts)

    async def schedule() -> None:
        fragments = await scene.store(ERASURE, scene.nodes[:5])
        nodes = Nodes(scene.world.config.members)
        slow = scene.nodes[5].mender
        slow._budget = _Slow(lambda: 1.0, scene.world.now)
        mending = asyncio.ensure_future(
            slow.mend(scene.target, ERASURE, replace(nodes, gone=[scene.nodes[0].id]))
        )
        await asyncio.sleep(0.5)
        assert (await scene.nodes[0].mender.mend(scene.target, REPLICATED, nodes)).outcome == "done"
        for node in scene.nodes:
            await node.collector.collect()
        await collect(scene.nodes[:5], 2)
        assert not any(scene.has(place) for place in fragments)
        assert (await mending).outcome == "overtaken"
        assert scene.record.scheme == REPLICATED

    scene.play(schedule())


class _Slow(Budget):
    """Lets each piece through when most of the grace has passed."""

    async def take(self, size: int) -> None:
        await asyncio.sleep(0.8 * GRACE)


def nearly_lost_chunk_is_not_switched_by_half(parts: Parts) -> None:
    scene = Scene(6, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        for place in places[:2]:
            assert scene.world.spoil(scene.key_of(place), vanish=True)
        for node in scene.nodes[2:]:
            node.disk.full = True
        node = scene.nodes[0]
        mended = await node.mender.mend(scene.target, ERASURE, Nodes(scene.world.config.members), places[:2])
        assert mended.closed
        assert scene.record.scheme.k == 1

    scene.play(schedule())


def no_copy_is_given_up_for_others_that_nobody_has_looked_at(parts: Parts) -> None:
    scene = Scene(3, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes)
        for place in places[:2]:
            assert scene.world.spoil(scene.key_of(place))
        nodes = _draining(scene, scene.nodes[2:])
        mender = scene.nodes[0].mender
        mended = await mender.mend(scene.target, REPLICATED, nodes)
        assert (mended.outcome, mended.bad) == ("failed", [*places[:2]])
        assert scene.record.places == places
        assert (await mender.mend(scene.target, REPLICATED, nodes, mended.bad)).outcome == "done"
        assert (await mender.mend(scene.target, REPLICATED, nodes)).outcome == "done"
        assert scene.record.places == tuple(sorted(places[:2], key=lambda p: p.node))

    scene.play(schedule())


def what_could_not_be_written_stays_where_it_was(parts: Parts) -> None:
    """Two nodes are to be drained, and one of the nodes that are to take over is full."""
    scene = Scene(7, parts)

    async def schedule() -> None:
        places = await scene.store(ERASURE, scene.nodes[:5])
        nodes = _draining(scene, scene.nodes[:2])
        work = plan(scene.video, scene.record, ERASURE, nodes)
        assert work is not None
        (stays, full), (moves, taker) = work.write
        assert full != taker
        scene.world.nodes[full].disk.full = True
        assert (await scene.nodes[2].mender.mend(scene.target, ERASURE, nodes)).outcome == "done"
        assert {p.piece: p.node for p in scene.record.places} == (
            {p.piece: p.node for p in places} | {moves: taker}
        )
        assert places[stays] in scene.record.places

    scene.play(schedule())


def _draining(scene: Scene, drained: Sequence[SimNode]) -> Nodes:
    ids = {n.id for n in drained}
    scene.world.change_members(lambda m: msgspec.structs.replace(m, draining=m.node in ids))
    for node in drained:
        node.look()
    return Nodes(scene.world.config.members)


def video_does_not_end_while_a_listing_may_miss_its_chunks(parts: Parts) -> None:
    """What a listing misses is chance: it is tried some times."""
    for seed in range(12):
        _purge_with_partial_listings(Scene(3, parts, seed))


def _purge_with_partial_listings(scene: Scene) -> None:
    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes)
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        await scene.world.clients.delete(scene.video)
        await keeper.look()
        await asyncio.sleep(UNDELETE + 1)
        await keeper.look()
        assert scene.state == "purging"
        scene.world.profile = replace(scene.world.profile, incomplete=1.0)
        for _ in range(40):
            await keeper.look()
        scene.world.profile = replace(scene.world.profile, incomplete=0.0)
        chunks = scene.ledger.registers.keys(chunk_prefix(scene.video, scene.upload))
        assert scene.state == "purging" or not chunks, "nobody will find them any more"
        await keeper.look()
        assert scene.state == "gone"

    scene.play(schedule())


def undeleted_video_has_its_whole_time_again(parts: Parts) -> None:
    """It is deleted again before the next pass."""
    scene = Scene(3, parts)

    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes)
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        await scene.world.clients.delete(scene.video)
        await keeper.look()
        await asyncio.sleep(UNDELETE + 1)
        await scene.world.clients.undelete(scene.video)
        await scene.world.clients.delete(scene.video)
        await keeper.look()
        assert scene.state == "deleted"
        await asyncio.sleep(UNDELETE + 1)
        await keeper.look()
        assert scene.state == "purging"

    scene.play(schedule())


def two_keepers_do_not_count_the_same_time_twice(parts: Parts) -> None:
    scene = Scene(3, parts)

    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes)
        first, second, _ = (scene.world.nodes[n] for n in group(scene.world.config, scene.video))
        first.silent = True
        second.look()
        await scene.world.clients.delete(scene.video)
        for _ in range(3):
            await first.keeper.look()
            await second.keeper.look()
            await asyncio.sleep(UNDELETE / 3)
        assert scene.state == "deleted"
        await first.keeper.look()
        assert scene.state == "purging"

    scene.play(schedule())


def clock_that_jumps_ends_no_window(parts: Parts) -> None:
    scene = Scene(3, parts)

    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes)
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        await scene.world.clients.delete(scene.video)
        for _ in range(3):
            await keeper.look()
            scene.world.day += 365
        assert scene.state == "deleted"

    scene.play(schedule())


def absent_register_authorises_no_drop(parts: Parts) -> None:
    """That of the video was never written, or is lost."""
    scene = Scene(3, parts)

    async def schedule() -> None:
        scene.upload = UploadId(1, 99)
        scene.put(scene.nodes[0], 0, REPLICATED, UPLOADED)
        key = PieceKey(scene.video, scene.upload, 0, 0)
        await scene.nodes[0].collector.collect()
        await collect(scene.nodes, 3)
        assert scene.nodes[0].disk.get(key) is not None
        assert scene.nodes[0].collector.state()["gc_unclaimed"] == 1

    scene.play(schedule())


def pieces_of_an_open_upload_stay(parts: Parts) -> None:
    """However long it takes."""
    scene = Scene(3, parts)

    async def schedule() -> None:
        await scene.open()
        for node in scene.nodes:
            scene.put(node, 0, REPLICATED, UPLOADED)
            await node.collector.collect()
        await collect(scene.nodes, 5)
        assert [len(node.disk.pieces) for node in scene.nodes] == [1, 1, 1]

    scene.play(schedule())


def piece_that_is_not_there_is_missed(parts: Parts) -> None:
    scene = Scene(3, parts)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes, "replicated")
        assert scene.world.spoil(scene.key_of(places[1]), vanish=True)
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        await keeper.look()
        assert keeper.state()["queue_repair"] == 1

    scene.play(schedule())
