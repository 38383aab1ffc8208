"""`vstack play`."""

from __future__ import annotations

import argparse

from rich.live import Live

from vstack.cli import show
from vstack.client.catalogue import find_video
from vstack.client.player import Playback, PlayOptions
from vstack.client.player import play as play_video
from vstack.errors import UsageError
from vstack.mesh.mesh_client import MeshClient


async def play(mesh: MeshClient, options: argparse.Namespace) -> int:
    if not (0.01 <= options.speed <= 1000 and 0 < options.buffer <= 3600 and 0 <= options.start < 1e9):
        raise UsageError("--speed is 0.01 to 1000, --buffer above 0 and up to 3600, --start at least 0 s")
    video = await find_video(mesh, options.video)
    wanted = PlayOptions(options.start, options.speed, options.buffer, not options.no_decode)
    with Live(console=show.err, auto_refresh=False, transient=True) as live:

        def tell(p: Playback) -> None:
            if show.err.is_terminal:
                live.update(play_line(p), refresh=True)

        playback = await play_video(mesh, video, wanted, tell)
    names = {m.node: m.address for m in mesh.members}
    if options.json:
        show.print_json({"id": video.id, **playback.metrics(), "chunks": chunk_rows(playback)})
        return 0
    show.table(("chunk", "start", "seconds", "fetched in", "from"), [
        (str(c.index), f"{c.start:.2f}", f"{c.seconds:.2f}", f"{c.took * 1000:.0f} ms",
         " ".join(names.get(n, n[:8]) for n in c.served))
        for c in playback.chunks
    ], right=(0, 1, 2, 3))  # fmt: skip
    for name, value in playback.metrics().items():
        show.out.print(f"{name:<18} {value}")
    return 0


def play_line(p: Playback) -> str:
    """One line that shows where playback is, and how much lies ahead."""
    cells = 20
    filled = min(cells, round(p.buffered))
    return (
        f"{p.state:<8} {show.clock(p.position)} / {show.clock(p.end)}  "
        f"buffer {'█' * filled}{'·' * (cells - filled)} {p.buffered:4.1f} s  "
        f"{show.count(p.video_frames, 'frame')}, {show.count(p.rebuffers, 'stall')}, "
        f"{show.count(p.failovers, 'failover')}"
    )


def chunk_rows(p: Playback) -> list[dict[str, object]]:
    """The table of played chunks, for --json."""
    return [
        {
            "index": c.index, "start_s": round(c.start, 3), "seconds": round(c.seconds, 3), "bytes": c.size,
            "served": c.served, "requested_at_s": round(c.requested_at, 3), "took_s": round(c.took, 4),
            "failovers": c.failovers, "video_frames": c.frames,
        }
        for c in p.chunks
    ]  # fmt: skip
