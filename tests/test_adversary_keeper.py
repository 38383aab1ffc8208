"""Schedules and states that would cost somebody's only copy, or hold up the repair of another for ever."""

from __future__ import annotations

from tests.keeper_sim.scene import Scene
from vstack.mesh.registers import ERASURE
from vstack.node.keeper.plan import Nodes

# -- one node, or one video, does not hold up the rest -------------------------------------------------


def test_a_damaged_piece_that_its_node_cannot_take_again_is_written_elsewhere_at_once() -> None:
    scene = Scene(6)

    async def schedule() -> None:
        places = await scene.store(ERASURE, scene.nodes[:5])
        damaged = scene.nodes[0]
        assert scene.world.spoil(scene.key_of(places[0]))
        damaged.disk.scrub()
        damaged.disk.full = True
        members = Nodes(scene.world.config.members)
        mended = await scene.nodes[1].mender.mend(scene.target, ERASURE, members, places[:1])
        assert (mended.outcome, set(mended.closed)) == ("done", {damaged.id})
        assert scene.nodes[5] in scene.holders

    scene.play(schedule())
