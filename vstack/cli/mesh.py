"""`vstack mesh`: plan, add, remove, drain, recover."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from time import monotonic

from vstack.cli import show
from vstack.cli.health import few_voters
from vstack.client import members
from vstack.client.members import Moving, Plan, Stake
from vstack.errors import MeshUnavailable, UsageError
from vstack.mesh.changes import DrainMember, MeshChange, RemoveMember
from vstack.mesh.config import Config, Member, NodeId
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Status

SERVES_WITHIN = 60.0
"""Seconds that a new member has to adopt the configuration that names it."""
SETTLE_WITHIN = 300.0
"""Seconds that a command waits for votes to move."""
LOOK_EVERY = 1.0
"""Seconds between two looks at what still lies on a node, at least; and at least as long as a look takes."""
STUCK_AFTER = 60.0
"""Seconds without a piece moving after which that is said."""


async def run(mesh: MeshClient, options: argparse.Namespace) -> int:
    """One action; its exit code."""
    return await ACTIONS[options.action](mesh, options)


async def plan(mesh: MeshClient, options: argparse.Namespace) -> int:
    """How far the last change is; with --add, --remove or --drain, what that change would do."""
    now = await members.moving(mesh)
    change: MeshChange | None = None
    if options.add:
        change = await members.addition(mesh, options.add)
    elif options.remove:
        change = RemoveMember(members.find_member(mesh.config, options.remove).node)
    elif options.drain:
        change = DrainMember(members.find_member(mesh.config, options.drain).node)
    planned = None if change is None else await members.plan(mesh, change)
    if options.json:
        document: dict[str, object] = {"moving": _moving_json(now), "members": _members_json(mesh.config)}
        if planned is not None:
            document["plan"] = {
                "members": _members_json(planned.after),
                "videos": planned.videos,
                "videos_whose_votes_move": planned.moving,
                "votes_per_register": planned.after.g,
                "piece_bytes_moving": planned.piece_bytes,
            }
        show.print_json(document)
        return 0
    _show_moving(now, mesh.config)
    if planned is not None:
        before, after = planned.before, planned.after
        show.out.print(
            f"the mesh would have {show.count(len(after.members), 'member')} instead of "
            f"{len(before.members)}, {len(after.voters)} instead of {len(before.voters)} of them voting, "
            f"{after.g} for each register; the votes of {planned.moving} of "
            f"{show.count(planned.videos, 'video')} would move"
        )
        show.out.print(_pieces_line(planned))
        show.out.print(_survives(after))
    return 0


def _pieces_line(planned: Plan) -> str:
    if planned.piece_bytes is None:
        return "how much of the pieces would move is not known: a node that would say so does not answer"
    which = "to it" if len(planned.after.members) > len(planned.before.members) else "away from it"
    return f"{show.size(planned.piece_bytes)} of pieces would move {which}, in the background"


async def add(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Lets in the node that waits at an address."""
    change = await members.addition(mesh, options.address)
    epoch = await mesh.change_mesh(change)
    await members.until_serving(mesh, change.member.node, epoch, SERVES_WITHIN)
    return await _finish(mesh, options, epoch, f"node {change.member.node[:8]} is a member")


async def remove(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Takes a node out of the mesh."""
    member = members.find_member(mesh.config, options.node)
    if len(mesh.members) == 1:
        raise UsageError("the last node of a mesh cannot be removed: add another one first, or just stop it")
    if not options.yes:
        await _must_not_lose_pieces(mesh, member.node)
    await _wait_for_the_last(mesh, options)
    epoch = await members.remove(mesh, member)
    return await _finish(mesh, options, epoch, f"node {member.node[:8]} is out and may be switched off")


async def drain(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Moves a node's votes and pieces elsewhere, or lets it have some again."""
    member = members.find_member(mesh.config, options.node)
    name = f"node {member.node[:8]}"
    if options.undo:
        await _wait_for_the_last(mesh, options)
        epoch = await members.drain(mesh, member, False)
        return await _finish(mesh, options, epoch, f"{name} votes and takes pieces again")
    if not options.force:
        await _must_be_dispensable(mesh, member)
    epoch = mesh.config.epoch
    if not member.draining:  # otherwise the command was given before, and goes on
        await _wait_for_the_last(mesh, options)
        epoch = await members.drain(mesh, member, True)
    if options.no_wait:
        return await _finish(mesh, options, epoch, f"{name} votes no more; its pieces move elsewhere")
    try:
        await _until_settled(mesh, "this change", epoch)
        await _until_empty(mesh, member.node)
    except asyncio.CancelledError:
        show.err.print(f"{name} goes on draining; the same command follows it, and with --undo ends it")
        raise
    return await _finish(mesh, options, epoch, f"{name} votes no more, and no video needs what lies on it")


async def recover(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Gives up nodes that are gone for good, when too few are left to decide anything."""
    words = [word.strip() for word in options.lost.split(",") if word.strip()]
    lost = [await members.find_open_member(mesh, word) for word in words]
    _ask(
        options,
        f"{len(lost)} nodes are given up for good: {', '.join(m.node[:8] for m in lost)}. They must never "
        "come back with their data. Registers that had most of their votes on them may lose their latest "
        "change.",
    )
    done = await members.recover(mesh, [m.node for m in lost])
    if options.json:
        show.print_json(
            {"epoch": done.epoch, "doubtful": list(done.doubtful), "given_up": list(done.given_up)}
        )
    else:
        show.out.print(
            f"the mesh goes on in epoch {done.epoch} with {show.count(len(mesh.members), 'member')}"
        )
        for video in done.doubtful:
            show.out.print(f"video {video[:12]}: rebuilt from a minority of its votes; check it")
        for video in done.given_up:
            show.out.print(f"video {video[:12]}: given up: pieces are there, but no register")
        if not done.doubtful and not done.given_up:
            show.out.print("no register had to be given up")
    return 0


ACTIONS: dict[str, Callable[[MeshClient, argparse.Namespace], Awaitable[int]]] = {
    "plan": plan, "add": add, "remove": remove, "drain": drain, "recover": recover,
}  # fmt: skip


def add_parser(v: argparse.ArgumentParser, mesh_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """The actions of `vstack mesh` and their options."""
    nouns = v.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help_: str) -> argparse.ArgumentParser:
        a = nouns.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        a.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document")
        mesh_options(a)
        return a

    a = action("plan", "how far the last change is, and what another one would do")
    group = a.add_mutually_exclusive_group()
    group.add_argument("--add", metavar="H:P", help="show what letting in the node that waits there would do")
    group.add_argument("--remove", metavar="NODE", help="show what removing a node would do")
    group.add_argument("--drain", metavar="NODE", help="show what draining a node would do")
    a = action("add", "let in the node that waits at an address")
    a.add_argument("address", metavar="HOST:PORT")
    _waiting(a)
    a = action("remove", "take a node out of the mesh; it may be switched off when this is done")
    a.add_argument("node", metavar="NODE", help="its id, the beginning of it, or its address")
    a.add_argument(
        "--yes", action="store_true", help="although chunks may be lost with it, or only one node is left"
    )
    _waiting(a)
    a = action("drain", "move a node's votes and pieces elsewhere")
    a.add_argument("node", metavar="NODE")
    a.add_argument("--undo", action="store_true", help="let it vote and take pieces again")
    a.add_argument("--force", action="store_true", help="although there is no room, or copies are down")
    _waiting(a)
    a = action("recover", "go on without nodes that are gone for good, when no majority is left")
    a.add_argument("--lost", metavar="NODE,...", required=True, help="the nodes that are given up")
    a.add_argument("--yes", action="store_true", help="do not ask")


def _waiting(a: argparse.ArgumentParser) -> None:
    a.add_argument("--no-wait", action="store_true", help="do not wait until all has moved")


async def _wait_for_the_last(mesh: MeshClient, options: argparse.Namespace) -> None:
    """One node leaves at a time: an earlier change is waited for, unless that is not wanted."""
    if not options.no_wait:
        await _until_settled(mesh, "an earlier change")


async def _until_settled(mesh: MeshClient, label: str, epoch: int = 0) -> None:
    with show.counting(f"{label}: votes are moving") as bar:
        most = 1
        began = monotonic()
        async for now in members.until_settled(mesh, epoch):
            if monotonic() - began > SETTLE_WITHIN:
                raise MeshUnavailable(
                    f"votes are still moving after {SETTLE_WITHIN:.0f} s: `vstack mesh plan` says for whom "
                    "they wait. Nothing is lost; it goes on by itself when they answer"
                )
            left = len({n for nodes in now.waiting.values() for n in nodes})
            most = max(most, left)
            bar.update("votes", most - left, most)


async def _finish(mesh: MeshClient, options: argparse.Namespace, epoch: int, done: str) -> int:
    if not options.no_wait:
        await _until_settled(mesh, "this change", epoch)
    now = await members.moving(mesh)
    if options.json:
        show.print_json({"epoch": epoch, "moving": _moving_json(now), "members": _members_json(mesh.config)})
    elif now.done and now.epoch >= epoch:
        show.out.print(f"{done} (epoch {epoch})")
        if few := few_voters(mesh.config):
            show.warn(few)
    else:
        show.out.print(
            f"decided in epoch {epoch}; the votes are still moving: `vstack mesh plan` shows how far"
        )
    return 0


async def _until_empty(mesh: MeshClient, node: NodeId) -> None:
    """Returns when no register names a piece on `node` any more."""
    most = 0
    moved_at = monotonic()
    left: int | None = None
    stuck = False
    with show.bar(f"node {node[:8]}: pieces move elsewhere") as bar:
        while True:
            began = monotonic()
            now = await members.stake(mesh, node, ())
            if not now.chunks and not now.incomplete:
                if now.strange:
                    show.warn(f"{show.count(now.strange, 'register')} of a newer version may name it still")
                return
            if left is None or now.bytes < left:
                left, moved_at = now.bytes, began
            elif began - moved_at > STUCK_AFTER and not stuck:
                stuck = True
                show.warn(
                    f"nothing has moved for {STUCK_AFTER:.0f} s, {show.size(now.bytes)} are left: `vstack "
                    "status` says how the nodes are. It goes on without this command, too"
                )
            most = max(most, now.bytes)
            bar.update("moved", most - now.bytes, most)
            await asyncio.sleep(max(LOOK_EVERY, monotonic() - began))


async def _stake(mesh: MeshClient, node: NodeId, told: dict[NodeId, Status]) -> Stake:
    with show.counting("what lies where") as bar:
        live = [n for n in told if n != node]
        return await members.stake(mesh, node, live, lambda done, total: bar.update("videos", done, total))


async def _must_be_dispensable(mesh: MeshClient, member: Member) -> None:
    """Raises UsageError, with the reason, if a node had better not be drained now."""
    others = [m for m in mesh.members if not m.draining and m.node != member.node]
    if not others:
        raise UsageError(
            f"besides node {member.node[:8]} there is none to take pieces and votes: add a node first"
        )
    if len(others) == 1:
        raise UsageError(
            f"only node {others[0].node[:8]} would be left to hold pieces, and its loss would lose them. "
            "Add a node first, or repeat with --force"
        )
    told = await members.statuses(mesh)
    stake = await _stake(mesh, member.node, told)
    room = members.room_elsewhere(mesh, member.node, told)
    if stake.bytes > room:
        raise UsageError(
            f"node {member.node[:8]} holds {show.size(stake.bytes)}, and the other nodes that answer have "
            f"{show.size(room)} free above their reserve. Add a node or a disk first, or repeat with --force"
        )
    if stake.last:
        raise UsageError(
            _needed(member.node, stake, mesh, told) + ". Start them first, or repeat with --force"
        )
    _must_be_known(stake, member.node, "--force")


async def _must_not_lose_pieces(mesh: MeshClient, node: NodeId) -> None:
    """Raises UsageError if some chunk could not be read any more without `node`, or that is not known."""
    told = await members.statuses(mesh)
    if node in told and not told[node].store["pieces"]:
        return
    stake = await _stake(mesh, node, told)
    if stake.last:
        raise UsageError(
            _needed(node, stake, mesh, told)
            + ". `vstack mesh drain` moves its pieces elsewhere first; if it "
            "is gone for good, repeat with --yes"
        )
    _must_be_known(stake, node, "--yes")
    if len(mesh.members) == 2:
        raise UsageError(
            "the node that is left would have the only copy of everything, and its loss would lose it. Add a "
            "node first, or repeat with --yes"
        )
    if stake.chunks:
        show.warn(
            f"pieces of {show.count(stake.chunks, 'chunk')} are on node {node[:8]}: they are made again "
            "elsewhere when it is out"
        )


def _needed(node: NodeId, stake: Stake, mesh: MeshClient, told: dict[NodeId, Status]) -> str:
    silent = [m.node[:8] for m in mesh.members if m.node not in told and m.node != node]
    does = "does" if len(silent) == 1 else "do"
    down = f"; of the other nodes, {', '.join(silent)} {does} not answer" if silent else ""
    more = ", ..." if len(stake.last) > 3 else ""
    return (
        f"without node {node[:8]} {show.count(len(stake.last), 'chunk')} could not be read "
        f"({', '.join(stake.last[:3])}{more}){down}"
    )


def _must_be_known(stake: Stake, node: NodeId, way_out: str) -> None:
    if stake.is_known:
        return
    why = (
        f"{show.count(len(stake.incomplete), 'node')} that would say so do not answer"
        if stake.incomplete
        else f"{show.count(stake.strange, 'register')} cannot be read by this version"
    )
    raise UsageError(
        f"what would be missing without node {node[:8]} is not known: {why}. To do it anyway: {way_out}"
    )


def _ask(options: argparse.Namespace, text: str) -> None:
    if options.yes:
        return
    show.err.print(text)
    if not sys.stdin.isatty():
        raise UsageError("this needs --yes where nobody can be asked")
    show.err.print("Go on? [y/N] ", end="")
    if input().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was changed")


def _show_moving(now: Moving, config: Config) -> None:
    show.out.print(
        f"epoch {now.epoch}, base {now.base}: {show.count(len(config.members), 'member')}, "
        f"{len(config.voters)} voting"
    )
    for node in now.silent:
        show.out.print(f"  node {node[:8]} does not answer")
    for node in now.leaving:
        show.out.print(f"  node {node[:8]} is leaving: its votes are needed until they have moved")
    for epoch, nodes in sorted(now.waiting.items()):
        show.out.print(
            f"  epoch {epoch} is open until some of these are through: {', '.join(n[:8] for n in nodes)}"
        )
    if not now.done and not now.waiting:
        show.out.print("  votes have moved; the older epochs are being closed")
    if now.done:
        show.out.print("  nothing is moving")


def _survives(config: Config) -> str:
    n, g = len(config.voters), config.g
    if n <= 2:
        return "writes would stop when any voting node fails" if n == 2 else "nothing would survive its loss"
    return f"each register would survive the loss of any {show.count((g - 1) // 2, 'node')}"


def _moving_json(now: Moving) -> dict[str, object]:
    return {
        "done": now.done,
        "epoch": now.epoch,
        "base": now.base,
        "leaving": list(now.leaving),
        "waiting": {str(e): list(n) for e, n in now.waiting.items()},
        "silent": list(now.silent),
    }


def _members_json(config: Config) -> list[dict[str, object]]:
    return [
        {"node": m.node, "address": m.address, "zone": m.zone, "weight": m.weight, "draining": m.draining}
        for m in config.members
    ]
