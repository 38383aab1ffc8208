"""The keeper, mender and collector under seeded faults, and wrong variants of them that must be caught.

VSTACK_SEED sets the first seed; otherwise the day does, so that every day runs other schedules.
"""

from __future__ import annotations

import asyncio

import msgspec

from tests.keeper_sim.scene import GRACE, UNDELETE, Scene
from vstack.mesh.config import group
from vstack.mesh.registers import ERASURE, REPLICATED
from vstack.node.keeper.plan import Nodes

# -- schedules by hand ----------------------------------------------------------------------------


def test_a_video_that_was_undeleted_meanwhile_has_its_whole_time_again() -> None:
    scene = Scene(3)

    async def schedule() -> None:
        await scene.store(REPLICATED, scene.nodes)
        keeper = scene.world.nodes[group(scene.world.config, scene.video)[0]].keeper
        await scene.world.clients.delete(scene.video)
        await keeper.look()
        await asyncio.sleep(UNDELETE + 1)
        await scene.world.clients.undelete(scene.video)
        await scene.world.clients.delete(scene.video)
        await keeper.look()
        assert _state(scene) == "deleted"
        await asyncio.sleep(UNDELETE + 1)
        await keeper.look()
        assert _state(scene) == "purging"

    scene.play(schedule())


def test_two_keepers_at_once_do_not_count_the_same_time_twice() -> None:
    scene = Scene(3)

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
        assert _state(scene) == "deleted"
        await first.keeper.look()
        assert _state(scene) == "purging"

    scene.play(schedule())


def test_a_piece_that_was_named_between_two_passes_has_its_whole_grace_again() -> None:
    scene = Scene(4)

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
        await asyncio.sleep(GRACE + 1)
        await fourth.collector.collect()
        assert not scene.has(new)

    scene.play(schedule())


def test_a_chunk_that_is_nearly_lost_is_not_switched_by_half() -> None:
    scene = Scene(6)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes[:3])
        for place in places[:2]:
            assert scene.world.spoil(scene.key_of(place), vanish=True)
        for node in (*scene.nodes[:2], *scene.nodes[3:]):
            node.disk.full = True
        node = scene.nodes[0]
        mended = await node.mender.mend(scene.target, ERASURE, Nodes(scene.world.config.members), places[:2])
        assert mended.outcome == "failed"
        assert mended.bytes_written > 0, "the node that has room took its fragments"
        assert scene.record.places == places

    scene.play(schedule())


def test_no_copy_is_given_up_for_others_that_nobody_has_looked_at() -> None:
    scene = Scene(3)

    async def schedule() -> None:
        places = await scene.store(REPLICATED, scene.nodes)
        for place in places[:2]:
            assert scene.world.spoil(scene.key_of(place))
        scene.world.change_members(lambda m: msgspec.structs.replace(m, draining=m.node == scene.nodes[2].id))
        scene.nodes[2].look()
        nodes = Nodes(scene.world.config.members)
        mender = scene.nodes[0].mender
        mended = await mender.mend(scene.target, REPLICATED, nodes)
        assert (mended.outcome, mended.bad) == ("failed", [*places[:2]])
        assert scene.record.places == places
        assert (await mender.mend(scene.target, REPLICATED, nodes, mended.bad)).outcome == "done"
        assert (await mender.mend(scene.target, REPLICATED, nodes)).outcome == "done"
        assert scene.record.places == tuple(sorted(places[:2], key=lambda p: p.node))

    scene.play(schedule())


def _state(scene: Scene) -> str:
    record = scene.ledger.video(scene.video)[1]
    return "gone" if record is None else record.state
