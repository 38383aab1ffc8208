"""For tests of what nodes keep: waiting until keepers and collectors have been through everything."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

from tests.kept import eventually, figures
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient


async def everybody_answers(mesh: MeshClient) -> bool:
    try:
        await asyncio.gather(*(mesh.status(member.node) for member in mesh.members))
    except NoAnswer:
        return False
    return True


async def passes(mesh: MeshClient) -> list[float]:
    """Of the keeper and of the collector of each node, since it started. Raises NoAnswer."""
    statuses = await asyncio.gather(*(mesh.status(member.node) for member in mesh.members))
    return [s.keeper.get(name, 0.0) for s in statuses for name in ("passes", "gc_passes")]


async def everybody_has_looked(mesh: MeshClient, within: float = 120.0) -> None:
    """Returns when each keeper and each collector has gone through everything, from beginning to end."""
    await eventually(partial(everybody_answers, mesh))
    before = await passes(mesh)

    async def have() -> bool:
        for member in mesh.members:
            for job in ("repair", "gc"):
                with suppress(NoAnswer, Refused):  # it is slow, or has only just begun
                    await mesh.hasten(member.node, job)
        if not await everybody_answers(mesh):
            return False
        return all(now >= then + 2 for now, then in zip(await passes(mesh), before, strict=True))

    await eventually(have, within)


async def at_rest(mesh: MeshClient) -> None:
    """Returns when keepers and collectors have gone through everything without finding anything to do."""

    async def nothing_was_done() -> bool:
        before = await figures(mesh)
        await everybody_has_looked(mesh)
        after = await figures(mesh)
        done = ("chunks_repair", "chunks_drain", "chunks_switch", "chunks_move", "gc_dropped")
        left = ("queue_chunks", "degraded", "unreadable", "gc_waiting")
        return all(before.get(name) == after.get(name) for name in done) and not any(
            after.get(name) for name in left
        )

    await eventually(nothing_was_done, within=180)
