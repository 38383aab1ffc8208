"""`vstack repair` and `vstack gc`: have the keepers and collectors begin now, and watch them."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping

from vstack.cli import show
from vstack.cli.policy import change_policy, parse_settings, show_duration
from vstack.client.members import statuses
from vstack.errors import MeshUnavailable, VstackError
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import MeshClient

DEGRADED = 8
"""Exit code when the mesh serves, and not everything is as it should be."""
LOOK_EVERY = 0.3
"""Seconds between two looks at how far the nodes are."""

Figures = Mapping[NodeId, Mapping[str, float]]


async def figures(mesh: MeshClient) -> dict[NodeId, dict[str, float]]:
    """What each member that answers says of its keeper."""
    return {node: said.keeper for node, said in (await statuses(mesh)).items()}


def total(found: Figures, name: str) -> int:
    return round(sum(f.get(name, 0.0) for f in found.values()))


def repair_lines(found: Figures) -> list[str]:
    """How repair stands, in words; nothing if there is nothing to do."""
    lines = []
    if unreadable := total(found, "unreadable"):
        lines.append(
            f"{show.count(unreadable, 'chunk')} cannot be read: too few of their pieces are on live nodes"
        )
    if left := total(found, "queue_chunks"):
        rate = total(found, "rate")
        eta = max((f.get("eta_s", 0.0) for f in found.values()), default=0.0)
        parts = [
            f"{total(found, f'queue_{reason}')} {words}"
            for reason, words in (
                ("repair", "to repair"), ("drain", "to drain"), ("switch", "to switch"), ("move", "to move"),
            )
            if total(found, f"queue_{reason}")
        ]  # fmt: skip
        urgent = total(found, "queue_spare_0")
        said = f"{show.count(left, 'chunk')} in work ({', '.join(parts) or 'the last ones'})"
        if urgent:
            said += f", {urgent} of them can lose no more piece"
        said += f"; {show.size(total(found, 'queue_bytes'))} to write"
        if rate:
            said += f", {show.size(rate)}/s, {show.clock(eta)} left"
        lines.append(said)
    elif degraded := total(found, "degraded"):
        has = "has" if degraded == 1 else "have"
        lines.append(f"{show.count(degraded, 'chunk')} {has} less redundancy than is wanted")
    if unclaimed := total(found, "gc_unclaimed"):
        lines.append(
            f"{show.count(unclaimed, 'piece')} of which no register says anything "
            f"({show.size(total(found, 'gc_unclaimed_bytes'))}): kept"
        )
    return lines


async def repair(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Has all nodes look for what is missing, and waits until it is mended."""
    if options.rate is not None:
        await change_policy(mesh, parse_settings([f"repair-rate={options.rate}"]))
    before = await _begin(mesh, "repair", "passes_begun")
    if options.no_wait:
        return _told(options, "the keepers begin")
    now = before
    with show.bar("repair") as bar:

        def tell(found: Figures) -> bool:
            done = total(found, "bytes_restored") - total(before, "bytes_restored")
            bar.update("repairing", done, done + total(found, "queue_bytes"))
            return all(
                f.get("passes", 0) > before[n].get("passes_begun", 0) and not f.get("queue_chunks")
                for n, f in found.items()
                if n in before
            )

        try:
            now = await _until(mesh, tell)
        except asyncio.CancelledError:
            show.err.print("the nodes go on repairing; `vstack status` shows how far they are")
            raise
    return _show_repair(mesh, options, before, now)


def of_a_silent_node(mesh: MeshClient, node: NodeId) -> str:
    """What becomes of the pieces of a node that does not answer, in words."""
    return (
        f"what it holds is made again elsewhere once it has been down for "
        f"{show_duration(mesh.config.policy.repair_delay)} (`repair-delay`), or after "
        f"`vstack mesh remove {node[:8]}`"
    )


def _show_repair(mesh: MeshClient, options: argparse.Namespace, before: Figures, now: Figures) -> int:
    silent = [m.node for m in mesh.members if m.node not in now]
    names = (
        "chunks_repair", "chunks_drain", "chunks_switch", "chunks_move", "bytes_read", "bytes_written",
        "bytes_restored", "failed", "overtaken",
    )  # fmt: skip
    changed = {name: total(now, name) - total(before, name) for name in names}
    left = {name: total(now, name) for name in ("degraded", "unreadable")}
    if options.json:
        show.print_json(
            {**changed, **left, "silent_nodes": list(silent), "nodes": {n: dict(f) for n, f in now.items()}}
        )
    else:
        moved = changed["chunks_drain"] + changed["chunks_move"]
        show.out.print(
            f"{show.count(changed['chunks_repair'], 'chunk')} repaired, {changed['chunks_switch']} switched, "
            f"{moved} moved: {show.size(changed['bytes_read'])} read, "
            f"{show.size(changed['bytes_written'])} written"
        )
        for line in repair_lines(now):
            show.out.print(f"  {line}")
        for node in silent:
            show.warn(f"node {node[:8]} does not answer: {of_a_silent_node(mesh, node)}")
        if not any(left.values()) and not silent:
            show.out.print("  all that is stored has its full redundancy")
    return 1 if left["unreadable"] else DEGRADED if left["degraded"] or silent else 0


async def gc(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Has all nodes look at the pieces that nothing names, and tells what they found."""
    before = await _begin(mesh, "gc", "gc_passes_begun")
    if options.no_wait:
        return _told(options, "the nodes begin")

    def done(found: Figures) -> bool:
        return all(
            f.get("gc_passes", 0) > before[n].get("gc_passes_begun", 0)
            for n, f in found.items()
            if n in before
        )

    try:
        now = await _until(mesh, done)
    except asyncio.CancelledError:
        show.err.print("the nodes go on looking; `vstack gc` tells what they find")
        raise
    names = ("gc_dropped", "gc_dropped_bytes", "gc_adopted")
    changed = {name: total(now, name) - total(before, name) for name in names}
    kinds = ("named", "waiting", "unclaimed", "stays", "unknown")
    kept = {f"gc_{k}{suffix}": total(now, f"gc_{k}{suffix}") for k in kinds for suffix in ("", "_bytes")}
    if options.json:
        show.print_json({**changed, **kept, "nodes": {n: dict(f) for n, f in now.items()}})
        return 0
    grace = mesh.config.policy.grace
    show.out.print(
        f"{show.count(changed['gc_dropped'], 'piece')} dropped, {show.size(changed['gc_dropped_bytes'])}"
    )
    for name, words in (
        ("named", "named by registers"),
        ("waiting", f"named no more: dropped once that has been so for {grace} s"),
        ("stays", "of uploads that are open"),
        ("unclaimed", "of which no register says anything: kept"),
        ("unknown", "whose registers could not be read: kept"),
    ):
        if kept[f"gc_{name}"] or name in ("named", "waiting"):
            size = f", {show.size(kept[f'gc_{name}_bytes'])}" if kept[f"gc_{name}_bytes"] else ""
            show.out.print(f"  {show.count(kept[f'gc_{name}'], 'piece')}{size} {words}")
    return 0


async def _begin(mesh: MeshClient, job: str, counter: str) -> dict[NodeId, dict[str, float]]:
    """The figures from before; then every node that answers is told to begin. Raises MeshUnavailable."""
    await mesh.refresh()
    before = {n: f for n, f in (await figures(mesh)).items() if counter in f}
    for node in list(before):
        try:
            await mesh.hasten(node, job)
        except VstackError as e:
            show.warn(f"node {node[:8]} does not begin: {e}")
            del before[node]
    if not before:
        raise MeshUnavailable("no node of the mesh could be told to begin")
    return before


async def _until(mesh: MeshClient, done: Callable[[Figures], bool]) -> dict[NodeId, dict[str, float]]:
    while True:
        now = await figures(mesh)
        if now and done(now):
            return now
        await asyncio.sleep(LOOK_EVERY)


def _told(options: argparse.Namespace, text: str) -> int:
    if options.json:
        show.print_json({"begun": True})
    else:
        show.out.print(f"{text}; `vstack status` shows how far they are")
    return 0
