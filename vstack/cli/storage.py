"""`vstack storage` and `vstack scrub`."""

from __future__ import annotations

import argparse
import asyncio

from vstack.cli import show
from vstack.client.members import find_member
from vstack.client.storage import COPIES, NodeReport, Scrubbed, Storage, Taken, VideoReport, scheme_name
from vstack.client.storage import scrub as scrub_nodes
from vstack.client.storage import storage as take_stock
from vstack.errors import MeshUnavailable
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.registers import Scheme

NOT_NAMED = "not named"
"""Pieces that no register names: waiting for collection, or just written and not claimed yet."""


async def storage(mesh: MeshClient, options: argparse.Namespace) -> int:
    with show.counting("videos and nodes") as bar:
        found = await take_stock(mesh, lambda done, total: bar.update("", done, total))
    if options.json:
        show.print_json(_storage_json(found, options.videos))
        return 0
    total = found.total
    videos = show.count(sum(bool(v.state) for v in found.videos), "video")
    show.out.print(f"chunks    {show.size(total.chunk_bytes)} of {videos}, by their registers")
    on_disk = f"on disk   {show.size(total.on_disk)} in {show.count(_pieces(total), 'piece')}"
    if found.overhead is not None and found.savings is not None:
        on_disk += f" = {found.overhead:.2f} x; {_saved(found.savings)} than {COPIES} whole copies"
    show.out.print(on_disk)
    _say_what_is_amiss(found)
    show.out.print("")
    rows = [
        (
            scheme_name(scheme), str(t.chunks), show.size(t.chunk_bytes), str(t.pieces),
            show.size(t.record_bytes), _times(t.overhead if found.complete else None),
        )
        for scheme, t in found.by_scheme.items() if t.chunks
    ]  # fmt: skip
    if total.not_named_pieces:
        rows.append((NOT_NAMED, "-", "-", str(total.not_named_pieces), show.size(total.not_named_bytes), "-"))
    if rows:
        show.table(
            ("scheme", "chunks", "bytes", "pieces", "on disk", "overhead"), rows, right=(1, 2, 3, 4, 5)
        )
        show.out.print("")
    columns = (
        "node", "pieces", "live", "not named", "dead", "preallocated", "hints", "index", "disk free", "of",
    )  # fmt: skip
    show.table(columns, [_node_row(n) for n in found.nodes], right=tuple(range(1, 10)))
    if options.videos:
        show.out.print("")
        show.table(
            ("id", "state", "bytes", "on disk", "not named", "overhead", "kept as", "title"),
            [_video_row(v, found.complete) for v in found.videos],
            right=(2, 3, 4, 5),
        )
    return 0


def _pieces(taken: Taken) -> int:
    return taken.pieces + taken.not_named_pieces


def _saved(savings: float) -> str:
    """0.44 -> `44.0 % less`."""
    return f"{abs(savings):.1%} {'less' if savings >= 0 else 'more'}".replace("%", " %")


def _times(overhead: float | None) -> str:
    return "-" if overhead is None else f"{overhead:.3f} x"


def _say_what_is_amiss(found: Storage) -> None:
    total = found.total
    if found.silent:
        names = ", ".join(node[:8] for node in found.silent)
        show.warn(f"incomplete: {names} did not answer, and what lies there is not counted")
    elif not found.complete:
        show.warn("incomplete: the mesh could not list all registers just now")
    if found.unseen_pieces:
        pieces = show.count(found.unseen_pieces, "piece")
        show.warn(f"{pieces} named by registers on nodes that did not answer, or are no members")
    if total.missing_pieces:
        pieces = show.count(total.missing_pieces, "piece")
        show.warn(
            f"{pieces} named by registers, {show.size(total.missing_bytes)}, are not on the nodes named: "
            "`vstack verify VIDEO` says which"
        )


def _node_row(n: NodeReport) -> tuple[str, ...]:
    s = n.status.store
    sizes = [
        s["live_bytes"], n.taken.not_named_bytes, s["dead_bytes"], s["preallocated_bytes"], s["hint_bytes"],
        s["index_bytes"], n.status.disk_free, n.status.disk_total,
    ]  # fmt: skip
    return n.member.node[:8], f"{s['pieces']:.0f}", *map(show.size, sizes)


def _video_row(v: VideoReport, complete: bool) -> tuple[str, ...]:
    t = v.taken
    kept = ", ".join(scheme_name(s) for s, part in v.by_scheme.items() if part.chunks) or "-"
    return (
        v.video[:12], v.state or NOT_NAMED, show.size(t.chunk_bytes), show.size(t.record_bytes),
        show.size(t.not_named_bytes), _times(t.overhead if complete else None), kept, show.plain(v.title),
    )  # fmt: skip


def _taken_json(t: Taken, complete: bool) -> dict[str, object]:
    return {
        "chunks": t.chunks, "chunk_bytes": t.chunk_bytes, "pieces": t.pieces, "record_bytes": t.record_bytes,
        "overhead": t.overhead if complete else None, "not_named_pieces": t.not_named_pieces,
        "not_named_bytes": t.not_named_bytes, "missing_pieces": t.missing_pieces,
        "missing_bytes": t.missing_bytes,
    }  # fmt: skip


def _schemes_json(schemes: dict[Scheme, Taken], complete: bool) -> list[dict[str, object]]:
    return [
        {"scheme": scheme_name(s), "k": s.k, "m": s.m or None} | _taken_json(t, complete)
        for s, t in schemes.items()
    ]


def _storage_json(found: Storage, videos: bool) -> dict[str, object]:
    document: dict[str, object] = _taken_json(found.total, found.complete) | {
        "complete": found.complete,
        "silent_nodes": list(found.silent),
        "unseen_pieces": found.unseen_pieces,
        "on_disk_bytes": found.total.on_disk,
        "overhead": found.overhead,
        "savings": found.savings,
        "schemes": _schemes_json(found.by_scheme, found.complete),
        "nodes": [_node_json(n) for n in found.nodes],
    }
    if videos:
        document["videos"] = [
            {"id": v.video, "title": v.title, "state": v.state or None}
            | _taken_json(v.taken, found.complete)
            | {"schemes": _schemes_json(v.by_scheme, found.complete)}
            for v in found.videos
        ]
    return document


def _node_json(n: NodeReport) -> dict[str, object]:
    figures = (
        "pieces", "live_bytes", "dead_bytes", "preallocated_bytes", "hint_bytes", "index_bytes",
        "payload_bytes", "tombstones", "quarantined",
    )  # fmt: skip
    return {
        "node": n.member.node, "address": n.member.address, "named_bytes": n.taken.record_bytes,
        "not_named_bytes": n.taken.not_named_bytes, "not_named_pieces": n.taken.not_named_pieces,
        "missing_pieces": n.taken.missing_pieces,
        "disk_free": n.status.disk_free, "disk_total": n.status.disk_total,
    } | {name: int(n.status.store[name]) for name in figures}  # fmt: skip


async def scrub(mesh: MeshClient, options: argparse.Namespace) -> int:
    members = [find_member(mesh.config, options.node)] if options.node else list(mesh.members)
    label = members[0].node[:8] if options.node else show.count(len(members), "node")
    with show.bar(label) as bar:
        try:
            found = await scrub_nodes(
                mesh, members, lambda done, total: bar.update("scrub", done, total), begin=not options.watch
            )
        except asyncio.CancelledError:
            show.err.print("the nodes go on with their scrub; `vstack scrub --watch` follows it")
            raise
    silent = [s for s in found if s.error is not None]
    dirty = any(s.quarantined or s.counted("scrub_errors") for s in found)
    if options.json:
        show.print_json(
            {
                "clean": None if silent and not dirty else not dirty,
                "silent_nodes": [s.member.node for s in silent],
                "nodes": [_scrubbed_json(s) for s in found if s.error is None],
            }
        )
    else:
        rows = [
            (s.member.node[:8], s.member.address, *(["no answer"] + ["-"] * 4 if s.error else _scrubbed(s)))
            for s in found
        ]
        columns = ("node", "address", "verified", "pieces", "damaged", "in quarantine", "read errors")
        show.table(columns, rows, right=(2, 3, 4, 5, 6))
        for s in silent:
            show.warn(f"node {s.member.node[:8]} at {s.member.address} does not answer: {s.error}")
        show.out.print(_verdict(found, dirty, options.watch))
    return 1 if dirty else MeshUnavailable.exit_code if silent else 0


def _scrubbed(s: Scrubbed) -> list[str]:
    return [
        show.size(s.counted("scrub_bytes")),
        *(str(s.counted(name)) for name in ("scrub_pieces", "scrub_damaged")),
        str(s.quarantined),
        str(s.counted("scrub_errors")),
    ]


def _scrubbed_json(s: Scrubbed) -> dict[str, object]:
    return {
        "node": s.member.node,
        "address": s.member.address,
        "rounds": int(s.now.store["scrub_rounds"]) if s.now else None,
        "share": s.now.store["scrub_share"] if s.now else None,
        "seconds_left": s.now.store["scrub_seconds_left"] if s.now else None,
        "verified_bytes": s.counted("scrub_bytes"),
        "verified_pieces": s.counted("scrub_pieces"),
        "damaged": s.counted("scrub_damaged"),
        "quarantined": s.quarantined,
        "read_errors": s.counted("scrub_errors"),
    }


def _verdict(found: list[Scrubbed], dirty: bool, watching: bool) -> str:
    verified = show.size(sum(s.counted("scrub_bytes") for s in found))
    since = " since the nodes started" if watching else ""
    damaged = sum(s.counted("scrub_damaged") for s in found)
    said = f"{verified} verified{since}, {show.count(damaged, 'damaged record') if damaged else 'no damage'}"
    quarantined = sum(s.quarantined for s in found)
    if quarantined:
        pieces = show.count(quarantined, "piece")
        return f"{said} found; {pieces} in quarantine: not served, and to be written anew by repair"
    if dirty:
        return f"{said} found; what could not be read is tried again in the next round"
    answered = " by the nodes that answered" if any(s.error for s in found) else ""
    return f"{said} found{answered}{'; nothing is in quarantine' if damaged else ''}"
