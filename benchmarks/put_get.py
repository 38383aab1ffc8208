"""Put and get through a real mesh, beside what the disk and loopback TCP of the same machine can do.

Five `vstack-node` processes on loopback, data in a temporary folder, this process as the client.
Everything goes through the product's own upload and download. Each case has its baseline measured
just before it, each round has fresh content, and what comes back is compared by SHA-256.

    put   of a file: hashed, cut, encoded, on the disks of the nodes, registered, visible
    get   of that video into this process's memory: every byte verified against its chunk's SHA-256

Rates are bytes of the file, or of the video that came back, in 10^6 bytes a second: redundancy does
not count as work done. A put's baseline is five threads that write and fdatasync 2 MiB blocks,
divided by the redundancy's overhead; a get's is one TCP connection through loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import BinaryIO, cast

from baselines import disk_rate, tcp_rate
from cpu import Cpu, cpu_of, profiled, sampled

from vstack.cli import interrupt, show
from vstack.client.catalogue import Video
from vstack.client.chunker import Ingest
from vstack.client.downloader import download
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.mesh.registers import Redundancy
from vstack.samples import loop_copy, make_sample

NODES = 5
OVERHEAD: dict[Redundancy, float] = {"replicated": 3.0, "erasure": 5 / 3}
SCHEME: dict[Redundancy, str] = {"replicated": "3 copies", "erasure": "3 of 5"}
TURN_SECONDS = 8.0
"""Length of the sample that is looped until it is large enough."""
TOP = 15
"""Lines of a profile."""
TIMES = 5
"""Puts, and gets, that a profile is taken of: one is over too soon for a sampler."""


class Wrong(VstackError):
    """What came back is not what went in."""


@dataclass(frozen=True)
class Case:
    """One kind of content with one redundancy."""

    content: str
    """bytes (stored as they are) or video (cut at keyframes)."""
    redundancy: Redundancy


CASES = [Case(c, r) for c in ("bytes", "video") for r in OVERHEAD]


@dataclass
class Row:
    """One line of the table: a rate a round, each with the baseline measured just before it."""

    case: Case
    what: str
    rates: list[float] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Rates are in MB/s."""
        rate, baseline = median(self.rates), median(self.baselines)
        return {
            "what": self.what,
            "content": self.case.content,
            "scheme": SCHEME[self.case.redundancy],
            "rate": round(rate, 1),
            "rounds": [round(r, 1) for r in self.rates],
            "baseline": round(baseline, 1),
            "baseline_rounds": [round(b, 1) for b in self.baselines],
            "ratio": round(rate / baseline, 3),
        }


class Sink(io.RawIOBase):
    """Takes what a download writes, without copying it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes | memoryview] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        assert isinstance(data, bytes | memoryview)
        self.parts.append(data)
        return len(data)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part)
        return digest.hexdigest()


class Content:
    """Makes files that were never stored before."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._size = size
        self._made = 0

    @contextmanager
    def fresh(self, kind: str) -> Iterator[tuple[Path, str]]:
        """A file and the SHA-256 of what a get of it must give, in hex. The file is gone afterwards."""
        self._made += 1
        path = self._folder / f"{kind}-{self._made}{'.mp4' if kind == 'video' else ''}"
        try:
            yield path, self._make_video(path) if kind == "video" else self._make_bytes(path)
        finally:
            path.unlink(missing_ok=True)

    def _make_bytes(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("wb") as f:
            for at in range(0, self._size, 1 << 20):
                block = os.urandom(min(1 << 20, self._size - at))
                digest.update(block)
                f.write(block)
        return digest.hexdigest()

    def _make_video(self, path: Path) -> str:
        """A generated sample, another bit rate each time, looped by stream copy."""
        turn = path.with_name(f"turn-{path.name}")
        try:
            make_sample(turn, seconds=TURN_SECONDS, bit_rate=4_000_000 + 10_000 * self._made)
            loop_copy(turn, path, TURN_SECONDS * self._size / turn.stat().st_size)
        finally:
            turn.unlink(missing_ok=True)
        ingest = Ingest(path)
        digest = hashlib.sha256()
        chunks = ingest.chunks()
        first = next(chunks).data  # the init segment is whole once this is here
        digest.update(ingest.init + first)
        for chunk in chunks:
            digest.update(chunk.data)
        return digest.hexdigest()


async def timed_put(mesh: MeshClient, path: Path, case: Case) -> tuple[Video, float]:
    """The video and the rate, in bytes of the file a second."""
    options = UploadOptions(path.name, case.redundancy, opaque=case.content == "bytes")
    size = await asyncio.to_thread(os.path.getsize, path)
    began = time.perf_counter()
    stored = await upload(mesh, path, options)
    took = time.perf_counter() - began
    if stored.state != "new":
        raise Wrong(f"{path.name} was not new to the mesh: {stored.state}")
    return stored.video, size / took


async def timed_get(mesh: MeshClient, video: Video, expected: str) -> float:
    """Bytes a second. Raises Wrong if they are not those that went in."""
    sink = Sink()
    began = time.perf_counter()
    await download(mesh, video, cast(BinaryIO, sink))
    took = time.perf_counter() - began
    if await asyncio.to_thread(sink.sha256) != expected:
        raise Wrong(f"{video.record.title}: what came back is not what was stored")
    return sum(map(len, sink.parts)) / took


async def measure(mesh: MeshClient, content: Content, folder: Path, size: int, rounds: int) -> list[Row]:
    """All cases, `rounds` times, in another order each time."""
    rows = {(case, what): Row(case, what) for case in CASES for what in ("put", "get")}
    for number in range(rounds):
        shift = number % len(CASES)
        for case in CASES[shift:] + CASES[:shift]:
            show.err.print(f"round {number + 1}: {case.content}, {SCHEME[case.redundancy]}")
            overhead = OVERHEAD[case.redundancy]
            with content.fresh(case.content) as (path, expected):
                disk = await asyncio.to_thread(disk_rate, folder, int(size * overhead), NODES)
                video, rate = await timed_put(mesh, path, case)
                rows[case, "put"].baselines.append(disk / overhead / 1e6)
                rows[case, "put"].rates.append(rate / 1e6)
                tcp = await asyncio.to_thread(tcp_rate, size)
                rate = await timed_get(mesh, video, expected)
                rows[case, "get"].baselines.append(tcp / 1e6)
                rows[case, "get"].rates.append(rate / 1e6)
    return list(rows.values())


# -- profile --------------------------------------------------------------------------------------


@dataclass
class Profile:
    """Where the time of one put or get went. CPU is in seconds per 10^9 bytes."""

    what: str
    scheme: str
    wall: float
    """Seconds per 10^9 bytes, without any profiler."""
    client: Cpu
    nodes: Cpu
    """All five together."""
    client_functions: list[str] = field(default_factory=list)
    """Of TIMES other runs, under cProfile: the event loop's thread only."""
    node_functions: list[str] = field(default_factory=list)
    """Of those other runs, one node under py-spy."""


async def profile(mesh: MeshClient, local: LocalMesh, content: Content, folder: Path) -> list[Profile]:
    """A put and a get of bytes with each redundancy: once for the CPU seconds, and then under profilers."""
    pids = [n.process.pid for n in local.nodes if n.process is not None]
    profiles: list[Profile] = []
    for case in (c for c in CASES if c.content == "bytes"):
        show.err.print(f"profile: {SCHEME[case.redundancy]}")
        found: dict[str, Profile] = {}
        with content.fresh("bytes") as (path, expected):
            before = [cpu_of(p) for p in (os.getpid(), *pids)]
            video, put_rate = await timed_put(mesh, path, case)
            between = [cpu_of(p) for p in (os.getpid(), *pids)]
            get_rate = await timed_get(mesh, video, expected)
            after = [cpu_of(p) for p in (os.getpid(), *pids)]
            giga = path.stat().st_size / 1e9
        for what, rate, a, b in (("put", put_rate, before, between), ("get", get_rate, between, after)):
            used = [_per(y.since(x), giga) for x, y in zip(a, b, strict=True)]
            found[what] = Profile(what, SCHEME[case.redundancy], 1e9 / rate, used[0], _sum(used[1:]))
        with ExitStack() as stack:
            files = [stack.enter_context(content.fresh("bytes")) for _ in range(TIMES)]
            stored: list[tuple[Video, str]] = []
            for what, p in found.items():
                with (
                    sampled(pids[0], folder / f"{case.redundancy}-{what}.txt", TOP) as samples,
                    profiled(p.client_functions, TOP),
                ):
                    if what == "put":
                        stored += [((await timed_put(mesh, f, case))[0], sha) for f, sha in files]
                    else:
                        for video, sha in stored:
                            await timed_get(mesh, video, sha)
                p.node_functions = samples.lines or [samples.why_none]
        profiles += found.values()
    return profiles


def _per(cpu: Cpu, giga: float) -> Cpu:
    return Cpu(cpu.main / giga, cpu.zmq / giga, cpu.workers / giga, cpu.system / giga)


def _sum(cpus: list[Cpu]) -> Cpu:
    return Cpu(*(sum(getattr(c, name) for c in cpus) for name in ("main", "zmq", "workers", "system")))


# -- the program ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="benchmarks/put_get.py",
        description="Put and get through five real nodes, beside the disk and loopback TCP.",
        epilog="what the figures mean: docs/benchmarks.md",
    )
    p.add_argument("--rounds", type=int, default=3, help="medians are of so many (default 3)")
    p.add_argument("--mib", type=int, default=64, help="size of each file, MiB (default 64)")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    p.add_argument("--profile", action="store_true", help="also show where the time goes")
    options = p.parse_args(argv)
    if options.rounds < 1 or options.mib < 1:
        p.error("--rounds and --mib are at least 1")
    return options


async def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The report. Ends as if cancelled on SIGTERM and SIGHUP; asyncio does so on SIGINT."""
    size = options.mib << 20
    content = Content(folder, size)
    began = time.monotonic()
    with LocalMesh(folder / "mesh", NODES, free_port(NODES)) as local:
        local.start()
        async with connect(local.peers) as mesh:
            rows = await measure(mesh, content, folder, size, options.rounds)
            profiles = await profile(mesh, local, content, folder) if options.profile else []
    return {
        "nodes": NODES,
        "bytes": size,
        "rounds": options.rounds,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [row.as_json() for row in rows],
        "profile": [_profile_json(p) for p in profiles],
    }


def _profile_json(p: Profile) -> dict[str, object]:
    def cpu(c: Cpu) -> dict[str, float]:
        return {
            "total": round(c.total, 3),
            "main": round(c.main, 3),
            "zmq": round(c.zmq, 3),
            "workers": round(c.workers, 3),
            "system": round(c.system, 3),
        }

    return {
        "what": p.what,
        "scheme": p.scheme,
        "wall_s_per_gb": round(p.wall, 2),
        "client_cpu_s_per_gb": cpu(p.client),
        "nodes_cpu_s_per_gb": cpu(p.nodes),
        "client_functions": p.client_functions,
        "node_functions": p.node_functions,
    }


def print_report(report: dict[str, object]) -> None:
    """The tables, on stdout."""
    rows = []
    for r in cast("list[dict[str, object]]", report["rows"]):
        rates, bases = cast("list[float]", r["rounds"]), cast("list[float]", r["baseline_rounds"])
        rows.append(
            (
                f"{r['what']} {r['content']}, {r['scheme']}",
                f"{r['rate']:.0f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                "disk" if r["what"] == "put" else "tcp",
                f"{r['baseline']:.0f}",
                f"{min(bases):.0f}-{max(bases):.0f}",
                f"{r['ratio']:.2f}",
            )
        )
    show.table(("", "MB/s", "range", "beside", "MB/s", "range", "ratio"), rows, right=(1, 2, 4, 5, 6))
    profiles = cast("list[dict[str, object]]", report["profile"])
    if not profiles:
        return
    show.out.print("\nCPU seconds per 10^9 bytes", style="bold")
    columns = ("total", "main", "zmq", "workers", "system")
    lines = [
        (
            f"{p['what']}, {p['scheme']}, {who}",
            f"{p['wall_s_per_gb']:.2f}",
            *(f"{cast('dict[str, float]', p[f'{who}_cpu_s_per_gb'])[c]:.2f}" for c in columns),
        )
        for p in profiles
        for who in ("client", "nodes")
    ]
    show.table(("", "wall", *columns), lines, right=tuple(range(1, 7)))
    for p in profiles:
        for who, how in (("client", "cProfile, the event loop"), ("node", "py-spy, one node, by samples")):
            show.out.print(f"\n{p['what']}, {p['scheme']}: {who} ({how})", style="bold", markup=False)
            for line in cast("list[str]", p[f"{who}_functions"]):
                show.out.print(f"  {line}", markup=False)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 only if everything came back as it was."""
    options = parse(argv)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
            report = interrupt.run(run(options, Path(folder)))
        except (VstackError, OSError) as e:
            show.err.print(f"benchmark: {e}", markup=False)
            return e.exit_code if isinstance(e, VstackError) else 1
        except KeyboardInterrupt:
            show.err.print("benchmark: interrupted; its nodes are stopped and its files removed")
            return 130
    if options.json:
        show.print_json(report)
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
