"""`vstack status` and `vstack nodes`."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter

from vstack.cli import show
from vstack.cli.keep import DEGRADED, of_a_silent_node, repair_lines, total
from vstack.errors import VstackError
from vstack.mesh.config import Config, Member, NodeId
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Status


class NotServing(VstackError):
    """What answers at a member's address is not that member at work."""


def serving(mesh: str, node: NodeId, said: Status) -> Status | NotServing:
    """The status of a member, or why what answered for it does not count as one."""
    if said.mesh == mesh and said.node == node:
        return said
    if not said.mesh:
        return NotServing(f"node {said.node[:8]} answers there, and is in no mesh yet")
    if said.mesh != mesh:
        return NotServing(f"node {said.node[:8]} of mesh {said.mesh[:8]} answers there")
    return NotServing(f"node {said.node[:8]} answers there")


def few_voters(config: Config) -> str:
    """What a mesh of so few voting nodes cannot do, in words; empty from three on."""
    voters = len(config.voters)
    if len(config.members) == 1:
        return "a mesh of one keeps one copy of everything: add machines to survive a loss"
    if voters == 1:
        return "one node alone votes: nothing can be read or written while it is down"
    if voters == 2:
        return "two nodes vote: a loss of data is survived, but nothing can be written while one is down"
    return ""


async def _all_status(mesh: MeshClient) -> list[Status | VstackError]:
    async def one(node: str) -> Status | VstackError:
        try:
            return serving(mesh.mesh, node, await mesh.status(node))
        except VstackError as e:
            return e

    return list(await asyncio.gather(*(one(m.node) for m in mesh.members)))


async def status(mesh: MeshClient, options: argparse.Namespace) -> int:
    answers = await _all_status(mesh)
    up = [a for a in answers if isinstance(a, Status)]
    members = len(mesh.members)
    reasons = [
        f"node {m.node[:8]} at {m.address} is {_state(m, a)}: {a}"
        for m, a in zip(mesh.members, answers, strict=True)
        if isinstance(a, VstackError)
    ]
    reasons += [
        f"node {a.node[:8]} at {a.address} found {int(a.store['damaged_records'])} damaged records"
        for a in up
        if a.store.get("damaged_records")
    ]
    reasons += filter(None, [few_voters(mesh.config)])
    moving = max(up, key=lambda a: a.epoch, default=None)
    if moving is not None:
        reasons += [
            f"node {node[:8]} has left, and must stay up until its votes have moved"
            for node in moving.leaving
        ]
        if moving.moving:
            reasons.append("votes are moving after a change of members: `vstack mesh plan` shows how far")
    answering = {a.node for a in up}
    silent_voters = sum(node not in answering for node in mesh.config.voters)
    quorum = silent_voters <= (mesh.config.g - 1) // 2
    if not quorum:
        reasons.append("too many nodes are down: some videos can be neither read nor written")
    keepers = {a.node: a.keeper for a in up}
    if down := [m.node for m in mesh.members if m.node not in answering]:
        which = down[0] if len(down) == 1 else "NODE"
        reasons.append(f"a node that is down: {of_a_silent_node(mesh, which)}")
    if short := total(keepers, "lacking"):
        reasons.append(f"{show.count(short, 'chunk')} without full redundancy")
    health = "unavailable" if not quorum else "degraded" if down or short else "healthy"
    totals: Counter[str] = Counter()
    for a in up:
        totals.update(a.counters)
    if options.json:
        show.print_json(
            {
                "mesh": mesh.mesh,
                "epoch": mesh.config.epoch,
                "base": mesh.config.base,
                "health": health,
                "reasons": reasons,
                "votes_moving": bool(moving and moving.moving),
                "messages_per_attempt": _per_attempt(totals),
                "nodes_up": len(up),
                "nodes": members,
                "counters": dict(totals),
                "per_node": {
                    a.node: {
                        "address": a.address, "boot": a.boot, "uptime_s": a.uptime_s, "counters": a.counters,
                        "store": a.store, "keeper": a.keeper, "disk_free": a.disk_free,
                        "disk_total": a.disk_total,
                    }
                    for a in up
                },
            }
        )  # fmt: skip
    else:
        show.out.print(
            f"mesh {mesh.mesh[:8]}  epoch {mesh.config.epoch}  "
            f"{len(up)} of {show.count(members, 'node')} up: {health}"
        )
        for reason in reasons:
            show.out.print(f"  {reason}")
        pieces = sum(a.store["pieces"] for a in up)
        bytes_ = sum(a.store["payload_bytes"] for a in up)
        free = min((a.disk_free for a in up), default=0)
        show.out.print(
            f"  {show.count(round(pieces), 'piece')}, {show.size(bytes_)}; "
            f"at least {show.size(free)} free on each node"
        )
        for line in repair_lines(keepers):
            show.out.print(f"  {line}")
        if (per_attempt := _per_attempt(totals)) is not None:
            show.out.print(
                f"  {show.count(totals['paxos.chosen'], 'decision')} ({totals['paxos.fast']} by their leader "
                f"in one round trip), {per_attempt:.1f} messages between nodes for each try to decide or read"
            )
        if totals["malformed"]:
            show.out.print(f"  {show.count(totals['malformed'], 'malformed message')} dropped")
        if totals["keys.refused"] or totals["keys.forbidden"]:
            show.out.print(
                f"  refused for their keys: {show.count(totals['keys.refused'], 'connection')}, "
                f"{show.count(totals['keys.forbidden'], 'message')}"
            )
    return 3 if not quorum else DEGRADED if health == "degraded" else 0


def _state(member: Member, answer: Status | VstackError) -> str:
    """Of a member, in a word or two."""
    if isinstance(answer, NotServing):
        return "not serving"
    return "down" if isinstance(answer, VstackError) else "draining" if member.draining else "up"


def _per_attempt(totals: Counter[str]) -> float | None:
    """Paxos messages on the wire between nodes, by fast create, full way or quorum read that was begun."""
    attempts = totals["paxos.fast"] + totals["paxos.full"] + totals["paxos.reads"]
    items = sum(v for k, v in totals.items() if k.startswith("sent.item."))
    return round(items / attempts, 2) if attempts else None


async def nodes(mesh: MeshClient, options: argparse.Namespace) -> int:
    answers = await _all_status(mesh)
    rows, found = [], []
    for m, a in zip(mesh.members, answers, strict=True):
        up = isinstance(a, Status)
        seen = (
            {p.state for s in answers if isinstance(s, Status) and s.node != m.node for p in s.peers
             if p.node == m.node}
        )  # fmt: skip
        entry: dict[str, object] = {
            "node": m.node, "address": m.address, "zone": m.zone, "weight": m.weight, "answers": up,
            "draining": m.draining, "seen_by_others_as": sorted(seen),
        }  # fmt: skip
        if isinstance(a, Status):
            entry |= {
                "boot": a.boot, "uptime_s": a.uptime_s, "version": a.version,
                "pieces": int(a.store["pieces"]),
                "payload_bytes": int(a.store["payload_bytes"]), "disk_free": a.disk_free,
                "peers": {p.node: {"state": p.state, "rtt_ms": p.rtt_ms} for p in a.peers},
            }  # fmt: skip
            rtts = [p.rtt_ms for p in a.peers if p.rtt_ms is not None]
            cells = (
                _state(m, a), f"{sum(rtts) / len(rtts):.1f} ms" if rtts else "-",
                f"{a.store['pieces']:.0f}",
                show.size(a.store["payload_bytes"]), show.size(a.disk_free), show.clock(a.uptime_s),
            )  # fmt: skip
        else:
            cells = (_state(m, a), "-", "-", "-", "-", "-")
        found.append(entry)
        rows.append((m.node[:8], m.address, m.zone or "-", *cells))
    if options.json:
        show.print_json({"nodes": found, "epoch": mesh.config.epoch})
    else:
        columns = ("node", "address", "zone", "state", "rtt", "pieces", "stored", "free", "uptime")
        show.table(columns, rows, right=(4, 5, 6, 7, 8))
    return 0
