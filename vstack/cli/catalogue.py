"""`vstack ls`, `info` and `rm`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from vstack.cli import show
from vstack.client.catalogue import Video, chunk_table, delete_video, find_video, list_videos, views
from vstack.client.downloader import media_of
from vstack.client.fetcher import holders
from vstack.client.pieces import what
from vstack.errors import MeshUnavailable
from vstack.mesh.config import Config, NodeId
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.placement import shortfall
from vstack.mesh.registers import ChunkRecord, Place, init_record

VIEW_DAYS = 30
"""Days over which `info` counts views."""


async def ls(mesh: MeshClient, options: argparse.Namespace) -> int:
    listing = await list_videos(mesh, hidden=options.all)
    if options.json:
        show.print_json(
            {
                "videos": [_video_json(v) for v in listing.videos],
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
                *([v.record.state] if options.all else []),
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
    wanted = r.wanted
    short = sorted({shortfall(wanted, s) for s in schemes} - {""})
    needed = [*table, *([] if r.init is None else [init_record(r.init)])]
    if any(mesh.config.member(p.node) is None for c in needed for p in c.places):
        await mesh.refresh()  # the node may be a newer member than this client knows
    config = mesh.config
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
    show.out.print(f"  redundancy  {r.redundancy}{' (hot)' if r.hot else ''}: {said}")
    show.out.print(f"  views       {seen} in the last {VIEW_DAYS} days")
    show.out.print(f"  survives    {survives(config, needed)}")
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


def survives(config: Config, needed: Sequence[ChunkRecord]) -> str:
    """How many members may be lost until some chunk of `needed` cannot be read, or some vote cannot be
    taken, and which of the two sets the limit."""
    lost = sum(not readable(c, config.nodes) for c in needed)
    if lost:
        return f"nothing: {show.count(lost, 'chunk')} cannot be read"
    votes = (config.g - 1) // 2
    pieces = min((_expendable(c, config.nodes) for c in needed), default=len(config.nodes))
    limit = (
        "its pieces" if pieces < votes else "the votes on it" if votes < pieces else "pieces and votes alike"
    )
    nodes = show.count(len(config.nodes), "node")
    most = min(votes, pieces)
    return f"{f'the loss of any {most}' if most else 'the loss of none'} of {nodes} (the limit: {limit})"


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
    video = await find_video(mesh, options.video)
    await delete_video(mesh, video)
    if options.json:
        show.print_json({"id": video.id, "state": "deleted"})
    else:
        show.out.print(f"{show.plain(video.record.title)}: deleted ({video.id[:12]})")
        show.err.print("putting the same file again undoes it")
    return 0
