"""`vstack ls`, `info`, `rm`, `undelete`, `pin` and `verify`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Sequence

from vstack.cli import show
from vstack.cli.policy import show_duration
from vstack.client.catalogue import (
    Video,
    chunk_table,
    delete_video,
    find_video,
    list_videos,
    pin_video,
    undelete_video,
    verify_video,
    views,
)
from vstack.client.downloader import media_of
from vstack.client.fetcher import holders
from vstack.client.members import statuses
from vstack.client.pieces import Checked, PieceState
from vstack.errors import MeshUnavailable
from vstack.mesh.config import Config, NodeId
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.placement import choose_scheme, shortfall, takers
from vstack.mesh.registers import INIT_INDEX, ChunkRecord, Place, Scheme, init_record, what

VIEW_DAYS = 30
"""Days over which `info` counts views."""

STATES: dict[PieceState, str] = {
    "good": "is good",
    "missing": "is missing",
    "damaged": "is damaged",
    "other": "has other bytes than its register names",
    "silent": "could not be checked: the node does not answer",
    "gone": "is on a node that has left the mesh",
}
"""What `verify` says of a piece."""


async def ls(mesh: MeshClient, options: argparse.Namespace) -> int:
    listing = await list_videos(mesh, hidden=options.all)
    if options.json:
        show.print_json(
            {
                "videos": [_video_json(v) | _left_json(v, mesh.config) for v in listing.videos],
                "complete": listing.complete,
                "silent_nodes": list(listing.silent),
            }
        )
    else:
        rows = [
            (
                v.id[:12],
                show.clock(v.seconds),
                show.size(v.record.size),
                v.record.redundancy,
                *([_state(v, mesh.config)] if options.all else []),
                show.plain(v.record.title),
            )
            for v in listing.videos
        ]
        columns = ["id", "length", "size", "redundancy", *(["state"] if options.all else []), "title"]
        if rows:
            show.table(columns, rows, right=(1, 2))
        elif listing.complete:
            show.err.print("no videos yet: `vstack put FILE` stores one")
        if not listing.complete:
            silent = show.count(len(listing.silent), "node")
            show.warn(f"{silent} did not answer: there are more videos, or there may be")
    return 0 if listing.complete else MeshUnavailable.exit_code


def _left(v: Video, config: Config) -> int:
    """Seconds of the mesh's running time for which a deleted video can still be had back."""
    return max(0, config.policy.undelete - v.record.waited)


def _left_json(v: Video, config: Config) -> dict[str, object]:
    return {"undelete_s": _left(v, config)} if v.record.state == "deleted" else {}


def _state(v: Video, config: Config) -> str:
    if v.record.state != "deleted":
        return v.record.state
    return f"deleted, {show.clock(_left(v, config))} left"


def _video_json(v: Video) -> dict[str, object]:
    r = v.record
    return {
        "id": v.id,
        "title": r.title,
        "state": r.state,
        "seconds": round(v.seconds, 6),
        "bytes": r.size,
        "chunks": r.chunks,
        "redundancy": r.redundancy,
        "erasure": "/".join(map(str, r.erasure)),
        "hot": r.hot,
        "container": r.media.container if r.media else None,
        "source_bytes": r.source_size,
    }


async def info(mesh: MeshClient, options: argparse.Namespace) -> int:
    video = await find_video(mesh, options.video)
    table = await chunk_table(mesh, video)
    seen = await views(mesh, video.id, VIEW_DAYS)
    r, media = video.record, media_of(video)
    schemes = Counter(c.scheme for c in table)
    needed = [*table, *([] if r.init is None else [init_record(r.init)])]
    if any(mesh.config.member(p.node) is None for c in needed for p in c.places):
        await mesh.refresh()  # the node may be a newer member than this client knows
    config = mesh.config
    short = sorted({_behind(r.wanted, s, n, config) for s, n in schemes.items()} - {""})
    stored = sum(_on(c, config.nodes) * -(-c.entry.size // c.scheme.k) for c in table)
    lost = [c for c in needed if not readable(c, config.nodes)]
    tick = media.clock[0] / media.clock[1]
    if options.json:
        show.print_json(
            _video_json(video)
            | {
                "version": video.version,
                "upload": str(video.upload),
                "tracks": [
                    {
                        "kind": t.kind, "codec": t.codec, "language": t.language, "width": t.width,
                        "height": t.height, "sample_rate": t.sample_rate, "channels": t.channels,
                    }
                    for t in media.tracks
                ],
                "lost": list(media.lost),
                "piece_bytes": stored,
                "views": seen,
                "warnings": [*_lost_line(lost), *short],
                "missing": len(lost),
                "chunk_table": [_chunk_json(c, tick, config.nodes) for c in table],
            }
        )  # fmt: skip
        return 0
    show.out.print(f"{show.plain(r.title)}\n  id          {video.id}")
    show.out.print(
        f"  length      {show.clock(video.seconds)} ({video.seconds:.3f} s), {show.count(r.chunks, 'chunk')}"
    )
    show.out.print(
        f"  size        {show.size(r.size)}; pieces {show.size(stored)} = {stored / max(1, r.size):.2f} x"
    )
    for t in media.tracks:
        shape = f" {t.width}x{t.height}" if t.width else f" {t.sample_rate} Hz" if t.sample_rate else ""
        show.out.print(f"  {t.kind:<11} {t.codec}{shape} {t.language}".rstrip())
    said = ", ".join(f"{show.count(n, 'chunk')} as {s.name}" for s, n in schemes.items())
    how = "" if r.redundancy == "replicated" else f", fragments {r.erasure.k}/{r.erasure.m}"
    show.out.print(f"  redundancy  {r.redundancy}{' (hot)' if r.hot else ''}{how}: {said}")
    show.out.print(f"  views       {seen} in the last {VIEW_DAYS} days")
    show.out.print(f"  survives    {survives(config, needed, await _silent(mesh))}")
    for line in (*_lost_line(lost), *short, *(f"not kept of the source: {x}" for x in media.lost)):
        show.warn(line)
    rows = [
        (
            str(c.entry.index), f"{c.entry.start * tick:.3f}", f"{c.entry.duration * tick:.3f}",
            show.size(c.entry.size), c.scheme.name,
            " ".join(holder(p, config.nodes) for p in c.places)
            + ("" if readable(c, config.nodes) else "  cannot be read"),
        )
        for c in table
    ]  # fmt: skip
    show.table(("chunk", "start", "seconds", "size", "scheme", "on"), rows, right=(0, 1, 2, 3))
    return 0


def _behind(wanted: Scheme, scheme: Scheme, chunks: int, config: Config) -> str:
    """Why chunks that are kept as `scheme` are not kept as wanted; empty if they are."""
    target = choose_scheme(wanted, len(takers(config.members)))
    if scheme == target:
        return shortfall(wanted, scheme)
    return f"{show.count(chunks, 'chunk')} as {scheme.name} will become {target.name} in the background"


def _chunk_json(c: ChunkRecord, tick: float, nodes: Sequence[NodeId]) -> dict[str, object]:
    return {
        "index": c.entry.index, "start_s": c.entry.start * tick, "seconds": c.entry.duration * tick,
        "bytes": c.entry.size, "sha256": c.entry.sha256.hex(), "dependent": c.entry.dependent,
        "k": c.scheme.k, "m": c.scheme.m, "readable": readable(c, nodes),
        "places": [
            {"node": p.node, "piece": p.piece, "sha256": p.sha256.hex(), "gone": p.node not in nodes}
            for p in c.places
        ],
    }  # fmt: skip


def _on(c: ChunkRecord, nodes: Sequence[NodeId]) -> int:
    """How many pieces of a chunk lie on `nodes`: copies, or different fragments."""
    return len(holders(c, nodes))


def readable(c: ChunkRecord, nodes: Sequence[NodeId]) -> bool:
    """Whether enough pieces of a chunk lie on `nodes`."""
    return _on(c, nodes) >= c.scheme.k


def holder(place: Place, nodes: Sequence[NodeId]) -> str:
    """The node of a piece as the table names it: marked if it is none of `nodes`."""
    return ("" if place.node in nodes else "gone:") + place.node[:8]


def survives(config: Config, needed: Sequence[ChunkRecord], silent: Collection[NodeId] = ()) -> str:
    """How many members may be lost until some chunk of `needed` cannot be read, or some vote cannot be
    taken, and which of the two sets the limit. `silent` members count as lost already."""
    live = [n for n in config.nodes if n not in silent]
    lost = sum(not readable(c, live) for c in needed)
    if lost:
        why = f" while {show.count(len(config.nodes) - len(live), 'node')} do not answer" if silent else ""
        return f"nothing: {show.count(lost, 'chunk')} cannot be read{why}"
    votes = max(0, (config.g - 1) // 2 - sum(n in silent for n in config.voters))
    pieces = min((_expendable(c, live) for c in needed), default=len(live))
    limit = (
        "its pieces" if pieces < votes else "the votes on it" if votes < pieces else "pieces and votes alike"
    )
    nodes = show.count(len(live), "node") + (" that answer" if silent else "")
    most = min(votes, pieces)
    return f"{f'the loss of any {most}' if most else 'the loss of none'} of {nodes} (the limit: {limit})"


async def _silent(mesh: MeshClient) -> set[NodeId]:
    """The members that do not answer now, or at whose address another node does."""
    told = await statuses(mesh)
    return {n for n in mesh.config.nodes if n not in told or told[n].node != n}


def _lost_line(lost: Sequence[ChunkRecord]) -> list[str]:
    """The warning about chunks that cannot be read, and the way out; empty if there are none."""
    if not lost:
        return []
    names = ", ".join([*(what(c.entry.index) for c in lost[:5]), *(["..."] if len(lost) > 5 else [])])
    return [
        f"{show.count(len(lost), 'chunk')} cannot be read ({names}): too few of their pieces are on nodes of "
        "the mesh; `vstack put` of the same file stores it anew"
    ]


def _expendable(c: ChunkRecord, nodes: Sequence[NodeId]) -> int:
    """How many of `nodes`, whichever they are, may be lost while a readable chunk stays readable."""
    held = sorted(Counter(holders(c, nodes)).values(), reverse=True)
    lost = 0
    while lost < len(held) and sum(held[lost + 1 :]) >= c.scheme.k:
        lost += 1
    return lost


async def rm(mesh: MeshClient, options: argparse.Namespace) -> int:
    video = await delete_video(mesh, await find_video(mesh, options.video))
    if options.json:
        show.print_json({"id": video.id, "state": "deleted"} | _left_json(video, mesh.config))
    else:
        show.out.print(f"{show.plain(video.record.title)}: deleted ({video.id[:12]})")
        left = _left(video, mesh.config)
        show.err.print(
            f"`vstack undelete {video.id[:12]}` brings it back, within {show_duration(left)} of the mesh's "
            "running time; so does putting the same file again"
            if left
            else "it is removed for good: `undelete` in `vstack policy` gives no time to have it back"
        )
    return 0


async def undelete(mesh: MeshClient, options: argparse.Namespace) -> int:
    video = await undelete_video(mesh, await find_video(mesh, options.video, "deleted"))
    if options.json:
        show.print_json({"id": video.id, "state": "ready"})
    else:
        show.out.print(f"{show.plain(video.record.title)}: ready again ({video.id[:12]})")
    return 0


async def pin(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Says how a video is to be kept; the nodes do it."""
    before = await find_video(mesh, options.video)
    video = await pin_video(mesh, before, options.redundancy, options.erasure)
    old, new = before.record, video.record
    changed = (old.redundancy, old.erasure) != (new.redundancy, new.erasure)
    if options.json:
        show.print_json(
            {
                "id": video.id,
                "redundancy": new.redundancy,
                "erasure": "/".join(map(str, new.erasure)),
                "changed": changed,
            }
        )
        return 0
    how = f"{new.redundancy}, fragments {new.erasure.k}/{new.erasure.m}"
    target = choose_scheme(new.wanted, len(takers(mesh.members)))
    then = (
        f"its chunks are kept as {target.name}; the nodes rewrite those that are not yet, in the background"
    )
    show.out.print(f"{show.plain(new.title)}: {how}{'' if changed else ', as it was'}")
    show.err.print(then if changed else "nothing was changed")
    return 0


async def verify(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Has every piece read where it lies; exit code 1 if any is not good."""
    video = await find_video(mesh, options.video)
    table = await chunk_table(mesh, video)
    bad: list[Checked] = []
    pieces = good = done = 0
    total = len(table) + (video.record.init is not None)
    with show.counting(video.record.title[:40]) as bar:
        bar.update("chunks", 0, total)
        async for some in verify_video(mesh, video, table):
            done += len(some)
            pieces += sum(len(c.states) for c in some)
            good += sum(len(c.good) for c in some)
            bad += [c for c in some if len(c.good) < len(c.states)]
            bar.update("chunks", done, total)
    hastened = await _hasten(mesh) if options.repair and bad else 0
    lost = [c for c in bad if not c.readable]
    if options.json:
        show.print_json(
            {
                "id": video.id,
                "chunks": len(table),
                "pieces": pieces,
                "good": good,
                "bad": [
                    {"chunk": _number(c), "piece": p.piece, "node": p.node, "state": state}
                    for c, p, state in _not_good(bad)
                ],
                "unreadable": [_number(c) for c in lost],
                "hastened_nodes": hastened,
            }
        )
        return 1 if bad else 0
    for c, p, state in _not_good(bad):
        show.out.print(f"{what(c.record.entry.index)}: piece {p.piece} on {p.node[:8]} {STATES[state]}")
    for c in lost:
        have = len({p.piece for p in c.good})
        show.out.print(
            f"{what(c.record.entry.index)} CANNOT BE READ: {have} of the {c.record.scheme.k} pieces that it "
            "takes are good"
        )
    verdict = f"; {show.count(len(lost), 'chunk')} cannot be read" if lost else ""
    show.out.print(f"{show.plain(video.record.title)}: {good} of {pieces} pieces are good{verdict}")
    if hastened:
        show.err.print(f"{show.count(hastened, 'node')} will look now for what is to be repaired")
    return 1 if bad else 0


def _number(c: Checked) -> int | str:
    return "init" if c.record.entry.index == INIT_INDEX else c.record.entry.index


def _not_good(checked: Sequence[Checked]) -> list[tuple[Checked, Place, PieceState]]:
    return [
        (c, p, state)
        for c in checked
        for p, state in zip(c.record.places, c.states, strict=True)
        if state != "good"
    ]


async def _hasten(mesh: MeshClient) -> int:
    """How many nodes were told to look now for what is to be repaired. Raises Refused if none may be told."""
    told = 0
    refused: Refused | None = None
    for node in mesh.config.nodes:
        try:
            await mesh.hasten(node, "repair")
            told += 1
        except NoAnswer:
            continue
        except Refused as e:
            refused = e
    if refused is not None and not told:
        raise refused
    return told
