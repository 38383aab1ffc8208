"""Vote latency of a node that is busy with pieces, beside the same node when it is not.

Each register that is created and read has the node in its group and as its implicit leader, so that
nobody can decide without it. One operation at a time, fsync on, in turns of one run:

    quiet       nobody writes pieces
    ingest      several processes write pieces of 2 MiB to the node, as fast as it takes them
    elsewhere   they write to another node of the group: as much work for the machine, none for the node

and, in a mesh of its own that has lost a node for good, whose videos the measured node keeps:

    held        its keeper has pieces to restore, and is not allowed to
    repair      its keeper restores them as fast as it can

Beside each turn stands what the disk does meanwhile: appends of 512 bytes, each with an fdatasync, by this
process to a file of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from decisions import Wrong

from vstack.cli import interrupt, show
from vstack.client.members import until_settled
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import MeshUnavailable, VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.changes import SetPolicy
from vstack.mesh.config import Config, NodeId, Policy, group, leader
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import Ok
from vstack.mesh.registers import (
    EPOCH_SHIFT,
    REPLICATED,
    PieceKey,
    UploadId,
    VideoRecord,
    chunk_key,
    pack,
    uploaded,
    video_key,
)

NODES = 3
WRITERS = 2
"""Processes that write pieces."""
IN_FLIGHT = 6
"""Pieces that each of them writes at once."""
PIECE = 2 << 20
VALUE = 240
"""Bytes of a value: those of a chunk's record with three places."""
PAUSE = 0.002
"""Seconds between two operations."""
WARM_UP = 0.5
"""Seconds that a turn with writers runs before it is measured."""
SYNC_EVERY = 0.02
REPAIR_NODES = 4
"""Of which one dies."""
HELD, FREE = 1 << 10, 1 << 40
"""Bytes a second that a keeper may move."""
FILMS = 4
"""Videos that the measured node keeps."""
WITHIN = 60.0
"""Seconds that anything may take which is waited for."""


@dataclass
class Seconds:
    """How long operations of one kind took."""

    rounds: list[list[float]] = field(default_factory=list)
    """By round."""

    def as_json(self) -> dict[str, object]:
        """In milliseconds, of all rounds together; `p99_rounds` of each."""
        every = sorted(s for r in self.rounds for s in r)
        return {
            "count": len(every),
            "p50_ms": quantile_ms(every, 0.5),
            "p99_ms": quantile_ms(every, 0.99),
            "max_ms": quantile_ms(every, 1.0),
            "p99_rounds": [quantile_ms(sorted(r), 0.99) for r in self.rounds],
        }


def quantile_ms(values: Sequence[float], q: float) -> float:
    """Of sorted seconds, in milliseconds. Raises Wrong if there are none."""
    if not values:
        raise Wrong("nothing was done in the time that was measured: give it more --seconds")
    return round(1000 * values[min(len(values) - 1, int(q * len(values)))], 2)


@dataclass(eq=False)
class Turn:
    """What was measured under one kind of load."""

    name: str
    creates: Seconds = field(default_factory=Seconds)
    reads: Seconds = field(default_factory=Seconds)
    syncs: Seconds = field(default_factory=Seconds)
    seconds: float = 0.0
    moved: float = 0.0
    """Bytes of pieces, by those who write or by the keeper, while it was measured."""

    def as_json(self) -> dict[str, object]:
        return {
            "turn": self.name,
            "create": self.creates.as_json(),
            "read": self.reads.as_json(),
            "fdatasync": self.syncs.as_json(),
            "mb_s": round(self.moved / self.seconds / 1e6, 1),
        }


class Keys:
    """Chunk registers that nobody has created, with one leader, in a group without those who are dead."""

    def __init__(self, config: Config, first: NodeId, dead: Sequence[NodeId] = ()) -> None:
        self._config = config
        self._leader = first
        self._dead = set(dead)
        self._index = 0
        self._video = self._draw()

    def _draw(self) -> str:
        while True:
            video = os.urandom(32).hex()
            key = chunk_key(video, self._upload, 0)
            if leader(self._config, key) == self._leader and not self._dead & set(group(self._config, video)):
                return video

    @property
    def _upload(self) -> UploadId:
        return UploadId(self._config.epoch, (self._config.epoch << EPOCH_SHIFT) + 1)

    def next(self) -> str:
        """The chunks of a video that it leads, and then those of another."""
        if self._index == 100:
            self._index, self._video = 0, self._draw()
        self._index += 1
        return chunk_key(self._video, self._upload, self._index - 1)


async def measure(
    mesh: MeshClient,
    turn: Turn,
    keys: Keys,
    folder: Path,
    seconds: float,
    moved: Callable[[], float],
    lasts: Callable[[], bool] = lambda: True,
) -> None:
    """Adds a round to the turn, which ends sooner if what it is about does not last. `moved`: bytes of pieces
    so far. Raises Wrong, OutcomeUnknown."""
    creates: list[float] = []
    reads: list[float] = []
    with syncing(folder) as syncs:
        before, began = moved(), time.perf_counter()
        await _operate(mesh, keys, seconds, creates, reads, lasts)
        turn.seconds += time.perf_counter() - began
        turn.moved += moved() - before
    turn.creates.rounds.append(creates)
    turn.reads.rounds.append(reads)
    turn.syncs.rounds.append(list(syncs))


async def _operate(
    mesh: MeshClient,
    keys: Keys,
    seconds: float,
    creates: list[float],
    reads: list[float],
    lasts: Callable[[], bool],
) -> None:
    """At least once."""
    until = time.perf_counter() + seconds
    over = False
    while not over:
        key, value = keys.next(), os.urandom(VALUE)
        began = time.perf_counter()
        made = await mesh.change(Change(key, 0, value))
        between = time.perf_counter()
        found = await mesh.read(key)
        ended = time.perf_counter()
        if not isinstance(made, Ok) or found.data != value:
            raise Wrong(f"the create of a new register was answered {made}, and reading it {found}")
        creates.append(between - began)
        reads.append(ended - between)
        await asyncio.sleep(PAUSE)
        over = time.perf_counter() >= until or not lasts()


@contextmanager
def syncing(folder: Path) -> Iterator[list[float]]:
    """Seconds of each append of 512 bytes with its fdatasync, one every SYNC_EVERY, while the block runs."""
    path, block = folder / "sync", os.urandom(512)
    took: list[float] = []
    over = threading.Event()

    def work() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            while not over.wait(SYNC_EVERY):
                began = time.perf_counter()
                os.write(fd, block)
                os.fdatasync(fd)
                took.append(time.perf_counter() - began)
        finally:
            os.close(fd)
            path.unlink()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield took
    finally:
        over.set()
        thread.join()


# -- writers --------------------------------------------------------------------------------------


class Writers:
    """Processes that write pieces to one node at a time. Use as `async with`: none stays."""

    def __init__(self, peers: Sequence[str], video: str, upload: UploadId) -> None:
        """`upload`: open, of `video`, so that its pieces are kept."""
        self._command = [
            sys.executable, str(Path(__file__).resolve()),
            "--writer", ",".join(peers), video, *map(str, upload),
        ]  # fmt: skip
        self._running: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Writers:
        try:
            for number in range(WRITERS):
                self._running.append(
                    await asyncio.create_subprocess_exec(
                        *self._command, str(number), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        start_new_session=True,
                    )
                )  # fmt: skip
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._running:
            if process.returncode is None:
                process.kill()
        for process in self._running:
            await process.wait()

    async def write_to(self, node: NodeId) -> None:
        """From now on; an empty `node`: they pause. Returns when all do."""
        for process in self._running:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{node}\n".encode())
            await process.stdin.drain()
            said = await asyncio.wait_for(process.stdout.readline(), WITHIN)
            if not said:
                raise Wrong("a process that writes pieces has ended")


async def write_pieces(peers: str, video: str, epoch: int, version: int, number: int) -> None:
    """What a writer does: a line on stdin names the node to write to from then on, and is repeated on stdout
    when nothing is under way to another one. Until stdin ends."""
    payload = os.urandom(PIECE)
    sha256 = hashlib.sha256(payload).digest()
    upload_id, index = UploadId(epoch, version), number << 24
    now = ""

    async def hand(mesh: MeshClient, node: NodeId) -> None:
        nonlocal index
        while now == node:
            index += 1
            key = PieceKey(video, upload_id, index, 0, uploaded(REPLICATED))
            try:
                await mesh.put_piece(node, key, REPLICATED, PIECE, sha256, payload)
            except NoAnswer:
                await asyncio.sleep(0.02)  # it was too busy even for heartbeats
            except Refused as e:
                if e.code not in ("busy", "late"):
                    raise
                await asyncio.sleep(0.02)

    async with connect(peers) as mesh:
        hands: list[asyncio.Task[None]] = []
        while line := await asyncio.to_thread(sys.stdin.readline):
            now = line.strip()
            await asyncio.gather(*hands)
            hands = [asyncio.create_task(hand(mesh, now)) for _ in range(IN_FLIGHT if now else 0)]
            print(now, flush=True)
        now = ""
        await asyncio.gather(*hands)


async def open_upload(mesh: MeshClient) -> tuple[str, UploadId]:
    """A video that is being uploaded, for ever."""
    video = os.urandom(32).hex()
    record = VideoRecord(
        state="uploading", title="pieces", redundancy="replicated", recipe="none", source_size=1
    )
    outcome = await mesh.change(Change(video_key(video), 0, pack(record)))
    if not isinstance(outcome, Ok):
        raise Wrong(f"the upload could not be opened: {outcome}")
    return video, UploadId(outcome.version >> EPOCH_SHIFT, outcome.version)


async def under_ingest(
    local: LocalMesh, mesh: MeshClient, folder: Path, options: argparse.Namespace
) -> list[Turn]:
    """The turns quiet, ingest and elsewhere, in another order each round."""
    here, there = local.nodes[0].node, local.nodes[1].node
    turns = {Turn("quiet"): "", Turn("ingest"): here, Turn("elsewhere"): there}
    keys = Keys(mesh.config, here)
    async with Writers(local.peers, *await open_upload(mesh)) as writers:
        await writers.write_to("")
        for number in range(options.rounds):
            order = list(turns)
            shift = number % len(order)
            for turn in order[shift:] + order[:shift]:
                show.err.print(f"round {number + 1}: {turn.name}")
                await asyncio.to_thread(
                    os.sync
                )  # what the turn before left to write is not this one's burden
                await writers.write_to(turns[turn])
                async with Watch(mesh, turns[turn]) as watch:
                    await _operate(mesh, keys, WARM_UP, [], [], lambda: True)
                    await measure(mesh, turn, keys, folder, options.seconds, watch.stored)
                await writers.write_to("")
    return list(turns)


# -- repair ---------------------------------------------------------------------------------------


async def under_repair(
    local: LocalMesh, mesh: MeshClient, folder: Path, options: argparse.Namespace
) -> list[Turn]:
    """The turns held and repair, again and again until nothing is left to restore, at least once."""
    here, dead = local.nodes[0], local.nodes[1]
    held, repair = Turn("held"), Turn("repair")
    policy = Policy(repair_delay=1, repair_rate=HELD)
    await set_policy(mesh, policy)
    show.err.print("repair: storing what is to be restored")
    for number in range(FILMS):
        await _store_for(mesh, here.node, folder / f"film-{number}", options.repair << 20)
    dead.kill()
    keys = Keys(mesh.config, here.node, [dead.node])
    async with Watch(mesh, here.node) as watch:
        await watch.until(lambda: watch.waiting() > 0)
        while watch.waiting() and len(repair.creates.rounds) < options.rounds:
            for turn, rate in ((held, HELD), (repair, FREE)):
                show.err.print(f"repair, round {len(turn.creates.rounds) + 1}: {turn.name}")
                await set_policy(mesh, Policy(repair_delay=1, repair_rate=rate))
                begun = watch.moved()
                if turn is repair:
                    await watch.until(lambda begun=begun: watch.moved() > begun)  # type: ignore[misc]
                await measure(
                    mesh, turn, keys, folder, options.seconds, watch.moved, lambda: watch.waiting() > 0
                )
    return [held, repair]


async def _store_for(mesh: MeshClient, node: NodeId, path: Path, size: int) -> None:
    """Stores random bytes, of which a video is made that is kept by `node`. Raises Wrong."""
    await asyncio.to_thread(_draw_bytes, mesh.config, node, path, size // FILMS)
    stored = await upload(mesh, path, UploadOptions(path.name, "erasure", opaque=True))
    await asyncio.to_thread(path.unlink)
    if group(mesh.config, stored.video.id)[0] != node:
        raise Wrong("a video has another id than the SHA-256 of its bytes")


def _draw_bytes(config: Config, node: NodeId, path: Path, size: int) -> None:
    start = os.urandom(max(0, size - 8))
    digest = hashlib.sha256(start)
    while True:
        end = os.urandom(8)
        whole = digest.copy()
        whole.update(end)
        if group(config, whole.hexdigest())[0] == node:
            path.write_bytes(start + end)
            return


async def set_policy(mesh: MeshClient, policy: Policy) -> None:
    """In force at all nodes when this returns."""
    if mesh.config.policy != policy:
        epoch = await mesh.change_mesh(SetPolicy(policy))
        await mesh.refresh()
        async for _ in until_settled(mesh, epoch):
            pass


class Watch:
    """The status of a node, asked for several times a second while the block runs; nothing of no node."""

    def __init__(self, mesh: MeshClient, node: NodeId) -> None:
        self._mesh = mesh
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._store: Mapping[str, float] = {}
        self._keeper: Mapping[str, float] = {}

    def stored(self) -> float:
        """Bytes of pieces that it holds."""
        return self._store.get("payload_bytes", 0.0)

    def moved(self) -> float:
        """Bytes of pieces that its keeper has read and written."""
        return self.figure("bytes_read") + self.figure("bytes_written")

    def waiting(self) -> float:
        """Chunks that its keeper has to repair, those that it is at included."""
        return self.figure("queue_chunks")

    def figure(self, name: str) -> float:
        """One of those of its keeper."""
        return self._keeper.get(name, 0.0)

    async def __aenter__(self) -> Watch:
        if self._node:
            await self._look()
            self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        try:
            status = await self._mesh.status(self._node, timeout=5.0)
        except (NoAnswer, Refused):
            return  # it is busy: the next look tells
        self._store, self._keeper = status.store, status.keeper

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self._look()

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Raises MeshUnavailable."""
        deadline = time.monotonic() + WITHIN
        while not wanted():
            if time.monotonic() > deadline:
                raise MeshUnavailable(f"node {self._node[:8]} has restored nothing in {WITHIN:.0f} s")
            await asyncio.sleep(0.05)


# -- the program ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="benchmarks/ingest.py",
        description="Vote latency of a node that takes pieces, or restores them, as fast as it can.",
        epilog="what the figures mean: docs/benchmarks-keeper.md",
    )
    p.add_argument("--rounds", type=int, default=3, help="of each turn (default 3)")
    p.add_argument("--seconds", type=float, default=4.0, help="of each turn and round (default 4)")
    p.add_argument("--repair", type=int, default=256, metavar="MIB", help="stored for repair (default 256)")
    p.add_argument("--only", choices=("ingest", "repair"), help="one half of it")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    p.add_argument("--writer", nargs=5, help=argparse.SUPPRESS)
    options = p.parse_args(argv)
    if options.rounds < 1 or options.repair < 8 or options.seconds < 0.1:
        p.error("--rounds is at least 1, --seconds at least 0.1, --repair at least 8")
    return options


async def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The report."""
    began = time.monotonic()
    turns: list[Turn] = []
    if options.only != "repair":
        with LocalMesh(folder / "ingest", NODES, free_port(NODES)) as local:
            local.start()
            async with connect(local.peers) as mesh:
                turns += await under_ingest(local, mesh, folder, options)
    if options.only != "ingest":
        with LocalMesh(folder / "repair", REPAIR_NODES, free_port(REPAIR_NODES)) as local:
            local.start()
            async with connect(local.peers) as mesh:
                turns += await under_repair(local, mesh, folder, options)
    return {
        "writers": WRITERS,
        "in_flight": WRITERS * IN_FLIGHT,
        "piece_bytes": PIECE,
        "rounds": options.rounds,
        "seconds_a_turn": options.seconds,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [t.as_json() for t in turns],
    }


def print_report(report: dict[str, object]) -> None:
    """The table, on stdout. Milliseconds."""
    lines = []
    for row in cast("list[dict[str, object]]", report["rows"]):
        create, read, sync = (cast("dict[str, float]", row[k]) for k in ("create", "read", "fdatasync"))
        lines.append(
            (
                str(row["turn"]), f"{create['count']}",
                *(f"{d[q]:.2f}" for d in (create, read) for q in ("p50_ms", "p99_ms", "max_ms")),
                f"{sync['p50_ms']:.2f}", f"{sync['p99_ms']:.2f}", f"{row['mb_s']:.0f}",
            )
        )  # fmt: skip
    head = ("", "creates", "p50 ms", "p99", "max", "read p50", "p99", "max", "fdatasync p50", "p99", "MB/s")
    show.table(head, lines, right=tuple(range(1, 11)))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 only if everything was decided and read back as it was."""
    options = parse(argv)
    if options.writer:
        peers, video, epoch, version, number = options.writer
        asyncio.run(write_pieces(peers, video, int(epoch), int(version), int(number)))
        return 0
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
