"""The demo: five nodes, a video, two of them killed in the middle of its playback, and a comparison.

Everything is real: five `vstack-node` processes on loopback with data on disk, an upload, playback
in real time that decodes every frame, `kill -9`, and at the end every packet that comes back is
compared with the source. All figures in the table are measured in this run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.live import Live

from vstack.cli import interrupt, show
from vstack.cli.playback import chunk_rows, play_line
from vstack.client.catalogue import chunk_table
from vstack.client.downloader import download
from vstack.client.player import Playback, PlayedChunk, Player, PlayOptions
from vstack.client.proof import Comparison, compare_files
from vstack.client.uploader import Progress, UploadOptions, UploadResult, upload
from vstack.errors import VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.samples import loop_copy, make_sample

NODES = 5
MIN_AFTER = 4
"""Chunks that have to come from the survivors for the demo to prove anything."""


MIN_SECONDS = 40


class DemoFailed(VstackError):
    """Something that the demo is there to show was not so."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Five nodes on this machine store a video; two are killed while it plays; it plays on.",
        epilog="exit code 0 only if playback never stalled and every packet came back as it was",
    )
    p.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: a generated film")
    p.add_argument("--seconds", type=float, default=75, help="play at least so long (default 75)")
    p.add_argument("--buffer", type=float, default=6, help="cap of the player's buffer, seconds (default 6)")
    p.add_argument("--redundancy", choices=("auto", "replicated", "erasure"), default="auto")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    options = p.parse_args(argv)
    if options.seconds < MIN_SECONDS:
        p.error(f"--seconds needs at least {MIN_SECONDS}, so that enough of the film is left after the kill")
    return options


def say(text: str) -> None:
    """One line of the story, on stderr with the seconds since the start."""
    show.err.print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}")


BEGAN = time.monotonic()


def prepare_film(options: argparse.Namespace, folder: Path) -> Path:
    """FILE looped by stream copy until it is long enough, or what FFmpeg's own sources generate."""
    if options.file is None:
        film = folder / "generated.mp4"
        say(f"making {options.seconds:.0f} s of moving picture and sound; takes about half a minute")
        make_sample(film, seconds=options.seconds, gop_seconds=3, bit_rate=4_000_000, kind="mandelbrot")
        return film
    if not options.file.is_file():
        raise DemoFailed(f"{options.file} is not a file")
    film = folder / f"looped{options.file.suffix}"
    say(f"looping {options.file} by stream copy to at least {options.seconds:.0f} s")
    loop_copy(options.file, film, options.seconds)
    return film


async def upload_film(mesh: MeshClient, film: Path, redundancy: str) -> UploadResult:
    with show.bar("upload") as bar:

        def tell(p: Progress) -> None:
            bar.update(p.stage, p.done, p.total)

        return await upload(mesh, film, UploadOptions("demo film", redundancy), tell)  # type: ignore[arg-type]


def victims(chunks: list[PlayedChunk]) -> tuple[str, ...]:
    """The two nodes that have served most of the last chunks."""
    served: Counter[str] = Counter()
    for chunk in chunks[-3:]:
        served.update(chunk.served)
    return tuple(node for node, _ in served.most_common(2))


@dataclass
class Kill:
    """Who was killed, and when."""

    nodes: tuple[str, ...] = ()
    position: float = 0.0
    """Seconds into the film."""
    at: float = 0.0
    """Seconds since playback was asked for."""


async def play_and_kill(player: Player, local: LocalMesh, chunks: int) -> Kill:
    """Plays to the end, and kills two nodes that have been serving in the middle of it."""
    numbers = {n.node: n.number for n in local.nodes}
    kill = Kill()
    line_at = 0.0
    began = time.monotonic()
    with Live(console=show.err, auto_refresh=False, transient=True) as live:

        def tell(p: Playback) -> None:
            nonlocal line_at
            few_left = chunks - len(p.chunks) <= MIN_AFTER + 1
            if not kill.nodes and p.position >= (0.4 if few_left else 0.5) * p.end:
                kill.nodes, kill.position = victims(p.chunks), p.position
                for node in local.nodes:
                    if node.node in kill.nodes:
                        node.kill()
                kill.at = time.monotonic() - began
                names = " and ".join(str(numbers[n]) for n in kill.nodes)
                say(f"kill -9 of nodes {names}, which have been serving, at {p.position:.1f} s of the film")
            text = play_line(p)
            if p.chunks:
                text += f"  from {','.join(str(n) for n in sorted(numbers[x] for x in p.chunks[-1].served))}"
            if show.err.is_terminal:
                live.update(text, refresh=True)
            elif time.monotonic() - line_at > 5:
                line_at = time.monotonic()
                say(text)

        player.on_progress = tell
        await player.play()
    return kill


def check(playback: Playback, kill: Kill, after: list[PlayedChunk], same: Comparison) -> list[str]:
    """What is not as it should be, in words."""
    pictures = sum(t.equal for t in same.tracks if t.name.startswith("video"))
    wrong = {
        "no two nodes were killed": len(kill.nodes) != 2,
        f"playback stalled {playback.rebuffers} times, {playback.stall_s:.2f} s": playback.rebuffers > 0,
        f"only {len(after)} chunks were fetched after the kill": len(after) < MIN_AFTER,
        "a killed node is said to have served": any(set(c.served) & set(kill.nodes) for c in after),
        f"{playback.decode_errors} frames could not be decoded": playback.decode_errors > 0,
        f"{playback.video_frames} of {pictures} frames were decoded": playback.video_frames != pictures,
        f"what came back differs from the source: {same.difference}": not same.equal,
    }
    return [text for text, is_so in wrong.items() if is_so]


async def run(options: argparse.Namespace, film: Path, folder: Path) -> dict[str, object]:
    """The whole story; its report. Raises VstackError if it cannot be told to the end."""
    film_bytes = film.stat().st_size  # noqa: ASYNC240 - before anything else runs
    with LocalMesh(folder / "mesh", NODES, free_port(NODES)) as local:
        say(f"starting {NODES} nodes on 127.0.0.1, ports {local.port} to {local.port + 2 * NODES - 1}")
        local.start()  # not in a thread: told to end meanwhile, we would stop what it still starts
        numbers = {n.node: n.number for n in local.nodes}
        slowest = max(n.ready_after for n in local.nodes)
        async with connect(local.peers) as mesh:
            say(f"mesh {mesh.mesh[:8]} is up after {slowest:.1f} s; nobody is its leader")
            stored = await upload_film(mesh, film, options.redundancy)
            video, record = stored.video, stored.video.record
            scheme = (await chunk_table(mesh, video))[0].scheme.name
            say(
                f"uploaded {show.size(record.size)} in {stored.seconds:.1f} s: "
                f"{record.chunks} chunks as {scheme}, id {video.id[:12]}"
            )
            say(f"playing {video.seconds:.0f} s in real time, buffer capped at {options.buffer:g} s")
            player = Player(mesh, video, PlayOptions(buffer=options.buffer))
            kill = await play_and_kill(player, local, record.chunks)
            say("played to the end; fetching it whole from the nodes that are left")
            copy = folder / f"copy{film.suffix}"
            got = await download(mesh, video, copy)
            say("comparing it with the source, packet by packet")
            same = await asyncio.to_thread(compare_files, film, copy)
    playback = player.playback
    after = [c for c in playback.chunks if c.requested_at > kill.at > 0]
    return {
        "film_s": round(video.seconds, 3),
        "film_bytes": film_bytes,
        "scheme": scheme,
        "ready_s": round(slowest, 3),
        "upload_s": round(stored.seconds, 3),
        "upload_mb_per_s": round(record.size / 1e6 / stored.seconds, 1),
        "killed_nodes": sorted(numbers[n] for n in kill.nodes),
        "killed_at_s": round(kill.position, 3),
        "chunks_after_kill": len(after),
        "buffer_cap_s": options.buffer,
        "longest_chunk_s": round(max(c.seconds for c in playback.chunks), 3),
        **playback.metrics(),
        "chunks": [
            {
                **row,
                "served": {str(numbers[n]): size for n, size in c.served.items()},
                "after_kill": c in after,
            }
            for row, c in zip(chunk_rows(playback), playback.chunks, strict=True)
        ],
        "get_s": round(got.seconds, 3),
        "get_mb_per_s": round(got.bytes / 1e6 / got.seconds, 1),
        "packets_compared": same.packets,
        "packets_equal": same.equal,
        "problems": check(playback, kill, after, same),
        "seconds": round(time.monotonic() - BEGAN, 1),
    }


def print_report(report: dict[str, object]) -> None:
    """The tables, on stdout."""
    rows = []
    chunks = report["chunks"]
    assert isinstance(chunks, list)
    for c in chunks:
        by_node = [
            show.size(c["served"][str(n)]) if str(n) in c["served"] else "·" for n in range(1, NODES + 1)
        ]
        rows.append(
            (
                str(c["index"]),
                f"{c['start_s']:.2f}",
                f"{c['seconds']:.2f}",
                show.size(c["bytes"]),
                f"{c['took_s'] * 1000:.0f} ms",
                *by_node,
                "after the kill" if c["after_kill"] else "",
            )
        )
    nodes = [f"node {n}" for n in range(1, NODES + 1)]
    columns = ("chunk", "start", "seconds", "size", "fetched", *nodes, "")
    show.table(columns, rows, right=tuple(range(len(columns) - 1)))
    show.out.print()
    for name, value in report.items():
        if name not in ("chunks", "problems"):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            show.out.print(f"{name:<20} {shown}")


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    interrupt.as_ctrl_c()
    try:
        with tempfile.TemporaryDirectory(prefix="demo-") as folder:
            film = prepare_film(options, Path(folder))
            report = interrupt.run(run(options, film, Path(folder)))
    except VstackError as e:
        show.err.print(f"demo: {e}")
        return e.exit_code
    except KeyboardInterrupt:
        show.err.print("demo: interrupted; its nodes are stopped and its files removed")
        return 130
    if options.json:
        show.print_json(report)
    else:
        print_report(report)
    problems = report["problems"]
    assert isinstance(problems, list)
    for problem in problems:
        show.err.print(f"demo: FAILED: {problem}")
    if not problems:
        say("two of five nodes died in the middle; no stall, and every packet came back as it was")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
