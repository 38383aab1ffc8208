"""Decisions a second, beside etcd: the same keys and values, the same machine, in turns.

Three `vstack-node` processes and three `etcd` processes on loopback, their data in one temporary
folder, this process as the client of both. Each writes every change to disk before it answers.

    one at a time     the next create begins when the one before is decided
    64 in flight      as many creates at once, each in a message of its own
    batches of 100    100 creates in one call, several calls at once: neighbouring chunks of a
                      video, which share a leader; for etcd a transaction of 100 puts

A decision of vstack is one register created by compare-and-swap, through its implicit leader, as
any program does it with `MeshClient`. A decision of etcd is one key put without a condition. Keys
and values are of the same length and never used before. etcd is asked at its leader, through its
HTTP/JSON gateway, on connections that stay open. Some of what was written is read back each time.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import cast

import msgspec
from cpu import Cpu, cpu_of, profiled

from vstack.cli import interrupt, show
from vstack.errors import VstackError
from vstack.local import LocalMesh, NodeFailed, free_port
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import Ok
from vstack.mesh.registers import EPOCH_SHIFT, UploadId, chunk_key

NODES = 3
VALUE = 240
"""Bytes of a value: those of a chunk's record with three places."""
WARM_UP = 0.2
"""Part of the measured time that each case runs before it is measured."""
TOP = 25
"""Lines of a profile."""
READ_BACK = 32
"""The last keys of a case that are read and compared."""
ETCD_PACKAGE = "etcd-server"
"""Debian's name for what has the program `etcd`."""


class Wrong(VstackError):
    """Something answered otherwise than it should."""


@dataclass(frozen=True)
class Case:
    name: str
    in_flight: int
    """Calls at once."""
    batch: int
    """Decisions a call."""


Key = tuple[str, bytes]
"""A register's key, and the value that it is given."""
Decide = Callable[[list[Key]], Awaitable[None]]


def fresh(batch: int) -> list[Key]:
    """Keys of neighbouring chunks of a video that nobody knows, and values for them."""
    video, upload = os.urandom(32).hex(), UploadId(1, (1 << EPOCH_SHIFT) + 1)
    return [(chunk_key(video, upload, i), os.urandom(VALUE)) for i in range(batch)]


@dataclass
class Measured:
    """One case of one system in one round."""

    rate: float
    """Decisions a second."""
    calls: list[float]
    """Seconds that each call took, sorted."""
    client: Cpu
    nodes: list[Cpu]
    """CPU seconds in 1,000 decisions."""

    def quantile_ms(self, q: float) -> float:
        return 1000 * self.calls[min(len(self.calls) - 1, int(q * len(self.calls)))]


@dataclass
class System:
    """What is measured, running."""

    name: str
    pids: list[int]
    decide: Decide
    """Returns once all of these are decided. Raises VstackError."""
    read: Callable[[str], Awaitable[bytes | None]]
    log: deque[Key] = field(default_factory=lambda: deque(maxlen=READ_BACK))

    async def run(self, case: Case, seconds: float) -> list[float]:
        """Seconds that each call took. Raises Wrong if what was written is not there afterwards."""
        took: list[float] = []
        end = time.perf_counter() + seconds

        async def work() -> None:
            while (began := time.perf_counter()) < end:
                keys = fresh(case.batch)
                await self.decide(keys)
                took.append(time.perf_counter() - began)
                self.log.extend(keys)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(case.in_flight):
                    group.create_task(work())
        except ExceptionGroup as e:
            raise e.exceptions[0] from None
        return took

    async def measure(self, case: Case, seconds: float) -> Measured:
        await self.run(case, WARM_UP * seconds)
        before = [cpu_of(p) for p in (os.getpid(), *self.pids)]
        began = time.perf_counter()
        calls = await self.run(case, seconds)
        elapsed = time.perf_counter() - began
        after = [cpu_of(p) for p in (os.getpid(), *self.pids)]
        decisions = len(calls) * case.batch
        used = [_per_thousand(b.since(a), decisions) for a, b in zip(before, after, strict=True)]
        await self.check()
        return Measured(decisions / elapsed, sorted(calls), used[0], used[1:])

    async def check(self) -> None:
        """Reads back the last keys. Raises Wrong."""
        for key, value in self.log:
            if await self.read(key) != value:
                raise Wrong(f"{self.name}: {key} does not hold what was decided")


def _per_thousand(cpu: Cpu, decisions: int) -> Cpu:
    return Cpu(*(1000 * part / decisions for part in (cpu.main, cpu.zmq, cpu.workers, cpu.system)))


def sync_rate(folder: Path, seconds: float) -> float:
    """Appends of 512 bytes a second to one file, each followed by an fdatasync."""
    path, block, count = folder / "sync", os.urandom(512), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            os.write(fd, block)
            os.fdatasync(fd)
            count += 1
    finally:
        os.close(fd)
        path.unlink()
    return count / took


# -- vstack ---------------------------------------------------------------------------------------


@asynccontextmanager
async def vstack(folder: Path, port: int) -> AsyncIterator[System]:
    with LocalMesh(folder, NODES, port) as local:
        local.start()
        async with connect(local.peers) as mesh:
            pids = [n.process.pid for n in local.nodes if n.process is not None]

            async def read(key: str) -> bytes | None:
                return (await mesh.read(key)).data

            yield System("vstack", pids, _creates(mesh), read)


def _creates(mesh: MeshClient) -> Decide:
    async def decide(keys: list[Key]) -> None:
        outcomes = await mesh.change_all([Change(key, 0, value) for key, value in keys])
        for outcome in outcomes:
            if not isinstance(outcome, Ok):
                raise Wrong(f"vstack: the create of a new register was answered {outcome}")

    return decide


# -- etcd -----------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """HTTP/1.1 to one etcd, a request at a time: as little as its gateway needs."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Wrong(f"etcd closed the connection ({exc})"))

    async def post(self, path: str, body: object) -> bytes:
        """The body of the answer. Raises Wrong unless the status is 200."""
        assert self._transport is not None
        raw = msgspec.json.encode(body)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(
            b"POST %b HTTP/1.1\r\nHost: etcd\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(raw)) + raw
        )
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._answer is None or self._answer.done():
            return
        head = bytes(self._buffer[:end])
        body = _http_body(head, bytes(self._buffer[end + 4 :]))
        if body is None:
            return
        self._buffer.clear()
        if head.startswith(b"HTTP/1.1 200 "):
            self._answer.set_result(body)
        else:
            self._answer.set_exception(Wrong(f"etcd answered {body[:300]!r}"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _http_body(head: bytes, rest: bytes) -> bytes | None:
    """The body, once it is all there. Lengths and chunks are what Go's server answers with."""
    fields = head.lower().split(b"\r\n")
    for line in fields:
        if line.startswith(b"content-length:"):
            return rest if len(rest) >= int(line[15:]) else None
    if b"transfer-encoding: chunked" not in fields:
        raise Wrong(f"etcd answered without a length: {head[:300]!r}")
    body, at = b"", 0
    while (line_end := rest.find(b"\r\n", at)) >= 0:
        size = int(rest[at:line_end], 16)
        if size == 0:
            return body if len(rest) >= line_end + 4 else None
        body += rest[line_end + 2 : line_end + 2 + size]
        at = line_end + 2 + size + 2
    return None


class EtcdClient:
    """Connections to the leader, as many as requests were ever in flight."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []
        self._all: list[Connection] = []

    async def post(self, path: str, body: object) -> bytes:
        connection = self._idle.pop() if self._idle else await self._open()
        answer = await connection.post(path, body)
        self._idle.append(connection)
        return answer

    async def _open(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, "127.0.0.1", self._port
        )
        self._all.append(connection)
        return connection

    async def decide(self, keys: list[Key]) -> None:
        puts = [{"key": key.encode(), "value": value} for key, value in keys]
        if len(puts) == 1:
            await self.post("/v3/kv/put", puts[0])
            return
        answer = await self.post("/v3/kv/txn", {"success": [{"requestPut": put} for put in puts]})
        if b'"succeeded":true' not in answer:
            raise Wrong(f"etcd did not do a transaction: {answer[:300]!r}")

    async def read(self, key: str) -> bytes | None:
        answer = msgspec.json.decode(await self.post("/v3/kv/range", {"key": key.encode()}), type=_Range)
        return answer.kvs[0].value if answer.kvs else None

    def close(self) -> None:
        for connection in self._all:
            connection.close()


class _KeyValue(msgspec.Struct):
    value: bytes


class _Range(msgspec.Struct):
    kvs: tuple[_KeyValue, ...] = ()


class _Header(msgspec.Struct):
    member_id: str


class _EtcdStatus(msgspec.Struct):
    header: _Header
    leader: str = "0"
    """The zero of one that knows no leader is left out."""


def _ends_with_parent() -> None:
    """In the child: the kernel ends it when this process is gone, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def etcd_processes(folder: Path, ports: list[int]) -> Iterator[list[int]]:
    """Starts one etcd for each pair of `ports` (clients, peers) and yields their process ids."""
    folder.mkdir()
    peers = ",".join(f"e{p}=http://127.0.0.1:{p + 1}" for p in ports)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for port in ports:
            here, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
            command = [
                "etcd", "--name", f"e{port}", "--data-dir", str(folder / f"e{port}"),
                "--listen-client-urls", here, "--advertise-client-urls", here,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", peers, "--initial-cluster-state", "new",
                "--initial-cluster-token", folder.parent.name, "--logger", "zap", "--log-level", "warn",
            ]  # fmt: skip
            with (folder / f"e{port}.log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_ends_with_parent,
                )
            running.append(process)
        yield [p.pid for p in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


async def _etcd_leader(ports: list[int], within: float = 20.0) -> int:
    """The client port of the leader, once there is one. Raises NodeFailed."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        for port in ports:
            client = EtcdClient(port)
            try:
                raw = await client.post("/v3/maintenance/status", {})
            except (OSError, Wrong):
                continue
            finally:
                client.close()
            status = msgspec.json.decode(raw, type=_EtcdStatus)
            if status.leader == status.header.member_id:
                return port
        await asyncio.sleep(0.1)
    raise NodeFailed(f"etcd has no leader after {within:.0f} s")


@asynccontextmanager
async def etcd(folder: Path, port: int) -> AsyncIterator[System]:
    ports = [port + 2 * i for i in range(NODES)]
    with etcd_processes(folder, ports) as pids:
        client = EtcdClient(await _etcd_leader(ports))
        try:
            yield System("etcd", pids, client.decide, client.read)
        finally:
            client.close()


# -- measuring ------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: what each round measured."""

    case: Case
    vstack: list[Measured] = field(default_factory=list)
    etcd: list[Measured] = field(default_factory=list)
    syncs: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        ours, theirs = _figures(self.vstack), _figures(self.etcd) if self.etcd else None
        return {
            "case": self.case.name,
            "in_flight": self.case.in_flight,
            "batch": self.case.batch,
            "vstack": ours,
            "etcd": theirs,
            "ratio": None if theirs is None else round(_rate(self.vstack) / _rate(self.etcd), 3),
            "syncs": round(median(self.syncs)),
        }


def _rate(rounds: list[Measured]) -> float:
    return median(m.rate for m in rounds)


def _figures(rounds: list[Measured]) -> dict[str, object]:
    """Medians over the rounds; CPU in seconds per 1,000 decisions."""

    def cpu(of: Callable[[Measured], Cpu]) -> dict[str, float]:
        parts = ("total", "main", "zmq", "workers", "system")
        return {part: round(median(getattr(of(m), part) for m in rounds), 4) for part in parts}

    return {
        "rate": round(_rate(rounds)),
        "rounds": [round(m.rate) for m in rounds],
        "p50_ms": round(median(m.quantile_ms(0.5) for m in rounds), 2),
        "p99_ms": round(median(m.quantile_ms(0.99) for m in rounds), 2),
        "client_cpu": cpu(lambda m: m.client),
        "node_cpu": [cpu(lambda m, i=i: m.nodes[i]) for i in range(NODES)],  # type: ignore[misc]
    }


async def measure(
    ours: System, theirs: System | None, folder: Path, cases: list[Case], options: argparse.Namespace
) -> list[Row]:
    """All cases, `rounds` times; who begins changes from round to round."""
    rows = [Row(case) for case in cases]
    for number in range(options.rounds):
        for row in rows:
            show.err.print(f"round {number + 1}: {row.case.name}")
            row.syncs.append(await asyncio.to_thread(sync_rate, folder, min(0.5, options.seconds / 4)))
            turns = [s for s in (ours, theirs) if s is not None]
            for system in turns if number % 2 == 0 else reversed(turns):
                found = await system.measure(row.case, options.seconds)
                (row.vstack if system is ours else row.etcd).append(found)
    return rows


# -- profile --------------------------------------------------------------------------------------

_PROFILED_NODE = """
import os, signal
from contextlib import ExitStack
from pathlib import Path
from cpu import profiled

lines, running = [], ExitStack()

def begin(*_):
    lines.clear()
    running.enter_context(profiled(lines, %d))

def end(*_):
    running.close()
    part = Path(%r) / f"profile-{os.getpid()}"
    part.with_suffix(".part").write_text("\\n".join(lines))
    part.with_suffix(".part").rename(part)

signal.signal(signal.SIGUSR1, begin)
signal.signal(signal.SIGUSR2, end)
"""
"""Run by Python in every node as it starts: SIGUSR1 begins a profile of the reactor, SIGUSR2 writes it."""


@dataclass
class Profile:
    case: Case
    rate: float
    """Decisions a second, with client and one node under cProfile."""
    client: list[str] = field(default_factory=list)
    node: list[str] = field(default_factory=list)


async def profile(folder: Path, port: int, cases: list[Case], seconds: float) -> list[Profile]:
    """Each case once more, in a mesh of its own, with the client's event loop and one reactor profiled."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_PROFILED_NODE % (TOP, str(hook)))
    paths = [str(hook), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    found: list[Profile] = []
    with _environment("PYTHONPATH", os.pathsep.join(p for p in paths if p)):
        async with vstack(folder / "profiled", port) as system:
            for case in cases:
                show.err.print(f"profile: {case.name}")
                await system.run(case, WARM_UP * seconds)
                result, lines = hook / f"profile-{system.pids[0]}", list[str]()
                os.kill(system.pids[0], signal.SIGUSR1)
                began = time.perf_counter()
                with profiled(lines, TOP):
                    calls = await system.run(case, seconds)
                rate = len(calls) * case.batch / (time.perf_counter() - began)
                os.kill(system.pids[0], signal.SIGUSR2)
                async with asyncio.timeout(10):
                    while not result.exists():
                        await asyncio.sleep(0.05)
                found.append(Profile(case, rate, lines, result.read_text().splitlines()))
                result.unlink()
    return found


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# -- the program ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="benchmarks/decisions.py",
        description="Decisions a second of three nodes, beside three of etcd.",
        epilog="what the figures mean: docs/benchmarks-decisions.md",
    )
    p.add_argument("--rounds", type=int, default=3, help="medians are of so many (default 3)")
    p.add_argument("--seconds", type=float, default=3.0, help="of each case and round (default 3)")
    p.add_argument("--batches", type=int, default=16, help="batches of 100 in flight (default 16)")
    p.add_argument("--no-etcd", action="store_true", help="measure vstack alone")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    p.add_argument("--profile", action="store_true", help="also show where the time goes")
    options = p.parse_args(argv)
    if options.rounds < 1 or options.batches < 1 or options.seconds < 0.1:
        p.error("--rounds and --batches are at least 1, --seconds at least 0.1")
    return options


async def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The report. Ends as if cancelled on SIGTERM and SIGHUP; asyncio does so on SIGINT."""
    cases = [Case("one at a time", 1, 1), Case("64 in flight", 64, 1)]
    cases.append(Case("batches of 100", options.batches, 100))
    with_etcd = not options.no_etcd and shutil.which("etcd") is not None
    if not with_etcd and not options.no_etcd:
        show.warn(f"no etcd on the PATH (Debian: apt-get install {ETCD_PACKAGE}): vstack is measured alone")
    port = free_port(3 * NODES)
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(vstack(folder / "vstack", port))
        theirs = None
        if with_etcd:
            theirs = await stack.enter_async_context(etcd(folder / "etcd", port + 2 * NODES))
        rows = await measure(ours, theirs, folder, cases, options)
    profiles = []
    if options.profile:
        profiles = await profile(folder, port + 4 * NODES, cases, options.seconds)
    return {
        "nodes": NODES,
        "value_bytes": VALUE,
        "rounds": options.rounds,
        "seconds_a_case": options.seconds,
        "etcd": await asyncio.to_thread(_etcd_version) if with_etcd else None,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [row.as_json() for row in rows],
        "profile": [
            {"case": p.case.name, "rate": round(p.rate), "client": p.client, "node": p.node} for p in profiles
        ],
    }


def _etcd_version() -> str:
    said = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0].removeprefix("etcd Version: ")


def print_report(report: dict[str, object]) -> None:
    """The tables, on stdout."""
    rows = cast("list[dict[str, object]]", report["rows"])
    lines: list[tuple[str, ...]] = []
    cpus: list[tuple[str, ...]] = []
    for r in rows:
        for name in ("vstack", "etcd"):
            if (figures := cast("dict[str, object] | None", r[name])) is None:
                continue
            rounds = cast("list[float]", figures["rounds"])
            what = f"{r['case']}" + (f" ({r['in_flight']} at once)" if r["batch"] != 1 else "")
            ratio = f"{r['ratio']:.2f}" if name == "vstack" and r["ratio"] is not None else ""
            lines.append(
                (
                    what, name, f"{figures['rate']}", f"{min(rounds)}-{max(rounds)}", ratio,
                    f"{figures['p50_ms']:.2f}", f"{figures['p99_ms']:.2f}", f"{r['syncs']}",
                )
            )  # fmt: skip
            client = cast("dict[str, float]", figures["client_cpu"])["total"]
            nodes = [c["total"] for c in cast("list[dict[str, float]]", figures["node_cpu"])]
            cpus.append((what, name, *(f"{1000 * c:.1f}" for c in (client, *nodes, client + sum(nodes)))))
    head = ("", "", "decisions/s", "range", "ratio", "p50 ms", "p99 ms", "fdatasyncs/s")
    show.table(head, lines, right=tuple(range(2, 8)))
    show.out.print("\nCPU milliseconds per 1,000 decisions", style="bold")
    columns = ("", "", "client", *(f"node {i + 1}" for i in range(NODES)), "all")
    show.table(columns, cpus, right=tuple(range(2, 7)))
    for p in cast("list[dict[str, object]]", report["profile"]):
        for who in ("client", "node"):
            title = f"\n{p['case']}, {who} under cProfile, at {p['rate']} decisions/s"
            show.out.print(title, style="bold", markup=False)
            for line in cast("list[str]", p[who]):
                show.out.print(f"  {line}", markup=False)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 only if everything was decided and read back as it was."""
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
