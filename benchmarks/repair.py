"""Two of five nodes lost for good, under reads and playback: what repair costs, and what it costs the others.

Five `vstack-node` processes on loopback hold cold videos (fragments, 3 of 5), hot ones (three copies) and a
film. All the time several readers fetch chunks at random, at a steady pace, and two players play the film.
One node is killed, and while what it held is being repaired a second one. The pace of repair is held down
first, and set free in the middle, by changing the policy. What readers see is compared with the same load
before the first kill, and after everything is repaired, with two nodes dead.

Redundancy counts as restored when every register names as many pieces on the three nodes that are left as it
should, in the spread that survives any one of them, and the nodes have read each of these pieces and found it
good.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple, cast

from decisions import Wrong
from ingest import Watch, quantile_ms, set_policy

from vstack.cli import interrupt, show
from vstack.client.catalogue import Video, chunk_table, read_video, verify_video
from vstack.client.fetcher import ChunkFetcher
from vstack.client.player import Playback, Player
from vstack.client.uploader import UploadOptions, upload
from vstack.errors import MeshUnavailable, VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.changes import SetPolicy
from vstack.mesh.config import NodeId, Policy, group, key_subject
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.mesh.registers import ChunkRecord, Place, Redundancy, unpack_chunk
from vstack.node.keeper.keeper import HANDS
from vstack.samples import loop_copy, make_sample

NODES = 5
FILMS = 6
"""Opaque videos of each kind."""
HOT_SHARE = 1 / 3
READERS = 4
PLAYERS = 2
CHUNKS_A_SESSION = 8
"""That a reader fetches of a video."""
BEHIND = 1.0
"""Seconds by which a reader may be late; what it was to read in more than that is left out."""
SAMPLE_SECONDS = 4.0
FILM_SECONDS = 180.0
"""The film is looped to this length: players decode as fast as they can only when they begin."""
BUFFERED = 20.0
"""Seconds of the film that each player has ahead when it is measured."""
SLOW, HELD, FREE = 2_000_000, 16_000_000, 1 << 40
"""Bytes a second that each keeper may read and write: until the second loss is noticed, then, and in the
end."""
REPAIR_DELAY = 1
SECOND_AT = 0.05
"""Part of what the first loss takes to repair, in chunks, after which the second node is killed."""
FREE_AT = 0.4
"""Part of what then is to be repaired after which the pace is set free."""
LOOK_EVERY = 0.1
WITHIN = 300.0
"""Seconds that a repair may take."""


# -- the load -------------------------------------------------------------------------------------


@dataclass
class Load:
    """Readers at a steady pace, and players, until it is cancelled. A reader has one chunk under way: where
    it could not keep its pace, its reads began late."""

    mesh: MeshClient
    videos: Sequence[Video]
    film: Video
    pace: float
    """Chunks a second, of all readers together."""
    rng: Random
    reads: list[tuple[float, float, float]] = field(default_factory=list)
    """(when it was due, when it was asked for, when it was there) of each chunk."""
    failed: list[str] = field(default_factory=list)
    rebuffers: int = 0
    stalled: float = 0.0
    played: float = 0.0
    decode_errors: int = 0
    now_playing: dict[int, Playback] = field(default_factory=dict)
    """By player."""

    async def run(self) -> None:
        """Raises nothing that the mesh can cause: it is in `failed`."""
        await asyncio.gather(
            *(self._read(i) for i in range(READERS)), *(self._play(i) for i in range(PLAYERS))
        )

    async def _read(self, number: int) -> None:
        """One reader. Opens a video, reads some of its chunks, opens the next."""
        due = time.monotonic() + number / self.pace
        while True:
            video = self.rng.choice(self.videos)
            try:
                table = await chunk_table(self.mesh, video)
                async with ChunkFetcher(self.mesh, video.id, video.upload) as fetcher:
                    for record in self.rng.choices(table, k=CHUNKS_A_SESSION):
                        await asyncio.sleep(max(0.0, due - time.monotonic()))
                        asked = time.monotonic()
                        await fetcher.fetch(record)
                        self.reads.append((due, asked, time.monotonic()))
                        due += READERS / self.pace
            except VstackError as e:
                self.failed.append(str(e))
            due = max(due, time.monotonic() - BEHIND)

    @property
    def is_steady(self) -> bool:
        """Whether all players have filled their buffers."""
        return len(self.now_playing) == PLAYERS and all(
            p.buffered >= BUFFERED for p in self.now_playing.values()
        )

    async def _play(self, number: int) -> None:
        """One viewer after the other, each to the end of the film, in real time."""
        while True:
            player = Player(self.mesh, self.film)
            self.now_playing[number] = player.playback
            try:
                await player.play()
            except VstackError as e:
                self.failed.append(f"playback: {e}")
            finally:
                p = player.playback
                self.rebuffers += p.rebuffers
                self.stalled += p.stall_s
                self.played += p.played_s
                self.decode_errors += p.decode_errors

    def between(self, begin: float, end: float) -> dict[str, object]:
        """What readers saw of the chunks that were due between two moments; no times if none were."""
        reads = [r for r in self.reads if begin <= r[0] < end]
        took = sorted(there - asked for _, asked, there in reads)
        late = sorted(asked - due for due, asked, _ in reads)
        times = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
        return {
            "seconds": round(end - begin, 1),
            "reads": len(reads),
            **{name: quantile_ms(took, q) if reads else None for name, q in times.items()},
            "late_p50_ms": quantile_ms(late, 0.5) if reads else None,
        }


# -- what is repaired, and when -------------------------------------------------------------------


class Change(NamedTuple):
    """A chunk's register named other pieces at a look than at the one before."""

    at: float
    key: str
    before: ChunkRecord


class Timeline:
    """Looks at all chunk registers again and again, while the block runs."""

    def __init__(self, mesh: MeshClient) -> None:
        self._mesh = mesh
        self.records: dict[str, ChunkRecord] = {}
        """By key of the register."""
        self.changes: list[Change] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Timeline:
        await self._look()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self._look()
            except MeshUnavailable:
                pass  # a node has just been killed: the next look tells

    async def _look(self) -> None:
        rows = (await self._mesh.list("chunk/")).rows
        now = time.monotonic()
        for row in rows:
            record = unpack_chunk(row.data)
            before = self.records.get(row.key, record)
            if before.places != record.places:
                self.changes.append(Change(now, row.key, before))
            self.records[row.key] = record

    def to_repair(self, lost: Collection[NodeId]) -> int:
        """Chunks whose registers name a lost node."""
        return sum(any(p.node in lost for p in r.places) for r in self.records.values())


def spare(record: ChunkRecord, lost: Collection[NodeId]) -> int:
    """Pieces that can still be lost before the chunk is."""
    return distinct(record, [p for p in record.places if p.node not in lost]) - record.scheme.k


def distinct(record: ChunkRecord, places: Iterable[Place]) -> int:
    """How many of the places count: one for each fragment, or for each node that has a copy."""
    return len({p.node if record.scheme.k == 1 else p.piece for p in places})


def order_of_repair(
    changes: Sequence[Change],
    since: Mapping[NodeId, float],
    keeper: Callable[[str], NodeId],
    lost: set[NodeId],
) -> dict[str, object]:
    """Whether the most endangered chunks came first, of each keeper by itself.

    `since`: when each of them was first seen to know of both losses. A chunk is out of order if more than
    HANDS chunks of the same keeper that could lose fewer pieces were restored at a later look than this one:
    so many may have been under way already. HANDS chunks of each keeper do not count: those that it was at
    when it learnt of the second loss.
    """
    sequences: list[str] = []
    out_of_order = 0
    for node, knew in since.items():
        mine = [
            (c.at, spare(c.before, lost))
            for c in changes
            if c.at > knew and keeper(c.key) == node and any(p.node in lost for p in c.before.places)
        ]
        sequences.append("".join(str(s) for _, s in mine))
        early = sum(sum(a > at and b < s for a, b in mine) > HANDS for at, s in mine)
        out_of_order += max(0, early - HANDS)
    return {"spare_before": sequences, "out_of_order": out_of_order, "chunks": sum(map(len, sequences))}


async def check(mesh: MeshClient, videos: Sequence[Video], lost: set[NodeId]) -> None:
    """Has the nodes that are left read every piece that is named. Raises Wrong, MeshUnavailable."""
    for video in videos:
        now = await read_video(mesh, video.id)
        if now is None:
            raise Wrong(f"{video.record.title} is gone")
        async for some in verify_video(mesh, now, await chunk_table(mesh, now)):
            for checked in some:
                record = checked.record
                if why := lacks(record, lost) or ("" if set(checked.states) == {"good"} else "bad pieces"):
                    raise Wrong(f"chunk {record.entry.index} of {video.record.title}: {why}")


def lacks(record: ChunkRecord, lost: Collection[NodeId]) -> str:
    """What a chunk still lacks of the redundancy that the nodes that are left can give it."""
    nodes = Counter(p.node for p in record.places)
    if any(p.node in lost for p in record.places):
        return "a lost node is named"
    if distinct(record, record.places) < record.scheme.m:
        return f"{len(record.places)} of {record.scheme.m} pieces"
    if record.scheme.k > 1 and sorted(nodes.values()) != [1, 2, 2]:
        return f"spread over the nodes as {sorted(nodes.values())}"
    return ""


# -- figures of the keepers -----------------------------------------------------------------------


@dataclass
class Spent:
    """What the keepers did between two moments."""

    seconds: float = 0.0
    busy: float = 0.0
    """Seconds in which each of them had work, added up."""
    read: float = 0.0
    written: float = 0.0
    restored: float = 0.0

    def add(self, read: float, written: float, restored: float, *, busy: float) -> None:
        self.read += read
        self.written += written
        self.restored += restored
        self.busy += busy

    def as_json(self) -> dict[str, object]:
        """`keeper_mb_s` is read and written, of one keeper that has work."""
        return {
            "seconds": round(self.seconds, 1),
            "keeper_mb_s": round((self.read + self.written) / max(self.busy, 1e-9) / 1e6, 1),
            "restored_mb_s": round(self.restored / max(self.seconds, 1e-9) / 1e6, 1),
            **self.per_byte(),
        }

    def per_byte(self) -> dict[str, float]:
        """Bytes read and written for one that is restored."""
        return {
            "read_per_byte": round(self.read / max(self.restored, 1), 2),
            "written_per_byte": round(self.written / max(self.restored, 1), 2),
            "restored_mb": round(self.restored / 1e6, 1),
        }


class Meter:
    """Adds up, several times a second, what the keepers of some nodes have done."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches
        self._last: list[tuple[float, ...]] = [(0.0, 0.0, 0.0)] * len(watches)
        self._at = time.monotonic()
        self.spent = Spent()
        """Since `begin`."""
        self.whole = Spent()

    def look(self) -> None:
        now = time.monotonic()
        for i, watch in enumerate(self._watches):
            figures = tuple(watch.figure(f"bytes_{what}") for what in ("read", "written", "restored"))
            new = [a - b for a, b in zip(figures, self._last[i], strict=True)]
            for spent in (self.spent, self.whole):
                spent.add(*new, busy=(now - self._at) * (watch.waiting() > 0))
            self._last[i] = figures
        for spent in (self.spent, self.whole):
            spent.seconds += now - self._at
        self._at = now

    def begin(self) -> Spent:
        """From now on it is added up anew; what was until now."""
        self.look()
        spent, self.spent = self.spent, Spent()
        return spent


# -- the run --------------------------------------------------------------------------------------


async def store_bytes(mesh: MeshClient, folder: Path, size: int) -> list[Video]:
    """Hot and cold videos of random bytes, `size` in all."""
    videos: list[Video] = []
    kinds: list[tuple[Redundancy, float]] = [("erasure", 1 - HOT_SHARE), ("replicated", HOT_SHARE)]
    for redundancy, share in kinds:
        for number in range(FILMS):
            path = folder / f"{redundancy}-{number}"
            await asyncio.to_thread(_random_file, path, int(share * size / FILMS))
            stored = await upload(mesh, path, UploadOptions(path.name, redundancy, opaque=True))
            videos.append(stored.video)
            await asyncio.to_thread(path.unlink)
    return videos


async def store_film(mesh: MeshClient, folder: Path, path: Path | None) -> Video:
    """The one at `path`, or a generated one, looped."""
    if path is None:
        path = folder / "turn.mp4"
        await asyncio.to_thread(make_sample, path, seconds=SAMPLE_SECONDS)
    film = folder / "film.mp4"
    await asyncio.to_thread(loop_copy, path, film, FILM_SECONDS)
    return (await upload(mesh, film, UploadOptions("film", "erasure"))).video


def _random_file(path: Path, size: int) -> None:
    with path.open("wb") as f:
        for at in range(0, size, 1 << 20):
            f.write(os.urandom(min(1 << 20, size - at)))


async def wait(meter: Meter, what: str, over: Callable[[], bool]) -> None:
    """Raises MeshUnavailable."""
    deadline = time.monotonic() + WITHIN
    while not over():
        if time.monotonic() > deadline:
            raise MeshUnavailable(f"{what}: not so after {WITHIN:.0f} s")
        await asyncio.sleep(LOOK_EVERY)
        meter.look()


async def measure(
    local: LocalMesh, mesh: MeshClient, folder: Path, options: argparse.Namespace, bar: show.Bar
) -> dict[str, object]:
    """The figures. Raises Wrong if redundancy is not what it has to be in the end."""
    bar.update("storing", 0, 0)
    await set_policy(mesh, Policy(repair_delay=REPAIR_DELAY, repair_rate=SLOW))
    videos = await store_bytes(mesh, folder, options.size << 20)
    film = await store_film(mesh, folder, options.film)
    first, second = local.nodes[-1], local.nodes[-2]
    lost = {first.node, second.node}
    left = [n.node for n in local.nodes if n.node not in lost]

    def keeper(key: str) -> NodeId:
        return next(n for n in group(mesh.config, key_subject(key)) if n not in lost)

    async with AsyncExitStack() as stack:
        await asyncio.to_thread(os.sync)  # what storing left to write is not the readers' burden
        watches = {n: await stack.enter_async_context(Watch(mesh, n)) for n in (*left, second.node)}
        timeline = await stack.enter_async_context(Timeline(mesh))
        meter = Meter(list(watches.values()))
        load = Load(mesh, videos, film, options.pace, Random(1))
        work = asyncio.create_task(load.run())
        stack.callback(work.cancel)
        knew: dict[NodeId, float] = {}

        def repaired(part: float, of: int) -> Callable[[], bool]:
            def enough() -> bool:
                for n in left:
                    if watches[n].figure("queue_spare_0"):
                        knew.setdefault(n, time.monotonic())
                to_do = timeline.to_repair(gone)
                bar.update("repairing", of - to_do, of)
                return to_do <= (1 - part) * of

            return enough

        await wait(meter, "the players have filled their buffers", lambda: load.is_steady)
        begun = time.monotonic()
        bar.update("healthy", 0, 0)
        await asyncio.sleep(options.seconds)
        killed = time.monotonic()
        first.kill()
        gone = {first.node}
        await wait(meter, "the first loss is noticed", lambda: any(w.waiting() for w in watches.values()))
        meter.begin()
        await wait(meter, "repair after one loss", repaired(SECOND_AT, timeline.to_repair(gone)))
        killed_second = time.monotonic()
        second.kill()
        gone = lost
        chunks = timeline.to_repair(gone)
        await wait(meter, "the second loss is noticed", lambda: repaired(1.0, chunks)() or bool(knew))
        noticed = time.monotonic()
        slow = meter.begin()
        await mesh.change_mesh(SetPolicy(Policy(repair_delay=REPAIR_DELAY, repair_rate=HELD)))
        await wait(meter, "repair after two losses", repaired(FREE_AT, chunks))
        held = meter.begin()
        freed = time.monotonic()
        await mesh.change_mesh(SetPolicy(Policy(repair_delay=REPAIR_DELAY, repair_rate=FREE)))
        await wait(meter, "repair at full speed", repaired(1.0, chunks))
        restored = time.monotonic()
        free = meter.begin()
        bar.update("checking", 0, 0)
        await check(mesh, [*videos, film], lost)
        bar.update("two dead", 0, 0)
        checked = time.monotonic()
        await asyncio.sleep(options.seconds)
        over = time.monotonic()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    return {
        "chunks": len(timeline.records),
        "chunks_repaired_after_both": chunks,
        "until_noticed_s": round(noticed - killed_second, 1),
        "until_restored_s": round(restored - killed_second, 1),
        "spent": {
            "slow": {"allowed_mb_s": SLOW / 1e6, **slow.as_json()},
            "held": {"allowed_mb_s": HELD / 1e6, **held.as_json()},
            "free": {"allowed_mb_s": None, **free.as_json()},
        },
        "all": meter.whole.per_byte(),
        "tried_again": round(sum(w.figure(f) for w in watches.values() for f in ("failed", "unknown"))),
        "order": order_of_repair(timeline.changes, knew, keeper, lost),
        "reads": {
            "before": load.between(begun, killed),
            "losing": load.between(killed, noticed),
            "repair, held": load.between(noticed, freed),
            "repair, free": load.between(freed, restored),
            "two dead": load.between(checked, over),
        },
        "failed": load.failed,
        "playback": {
            "played_s": round(load.played, 1),
            "rebuffers": load.rebuffers,
            "stalled_s": round(load.stalled, 2),
            "decode_errors": load.decode_errors,
        },
    }


# -- the program ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="benchmarks/repair.py",
        description="Two of five nodes lost for good, under reads and playback.",
        epilog="what the figures mean: docs/benchmarks-keeper.md",
    )
    p.add_argument("--size", type=int, default=384, metavar="MIB", help="of all videos (default 384)")
    p.add_argument("--pace", type=float, default=20, help="chunks that are read a second (default 20)")
    p.add_argument("--seconds", type=float, default=12, help="before the losses, and after (default 12)")
    p.add_argument("--film", type=Path, help="what the players play (default: a generated film)")
    p.add_argument("--json", action="store_true", help="the report as one JSON document on stdout")
    options = p.parse_args(argv)
    if options.size < 24 or options.pace < 1 or options.seconds < 1:
        p.error("--size is at least 24, --pace and --seconds at least 1")
    return options


async def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The report."""
    began = time.monotonic()
    with LocalMesh(folder / "mesh", NODES, free_port(NODES)) as local, show.counting("repair") as bar:
        local.start()
        async with connect(local.peers) as mesh:
            figures = await measure(local, mesh, folder, options, bar)
    return {
        "nodes": NODES,
        "dead": 2,
        "bytes": options.size << 20,
        "pace": options.pace,
        **figures,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began, 1),
    }


def print_report(report: dict[str, object]) -> None:
    """The tables, on stdout."""
    lines = []
    for name, row in cast("dict[str, dict[str, float | None]]", report["reads"]).items():
        lines.append((name, *("" if value is None else f"{value}" for value in row.values())))
    columns = ["chunk reads", "s", "reads", "p50 ms", "p99", "max", "begun late, p50"]
    show.table(columns, lines, right=tuple(range(1, 7)))
    show.out.print()
    lines = []
    for name, spent in cast("dict[str, dict[str, float | None]]", report["spent"]).items():
        lines.append((name, *("" if value is None else f"{value}" for value in spent.values())))
        columns = [column.replace("_", " ") for column in spent]
    show.table(("repair", *columns), lines, right=tuple(range(1, 8)))
    order = cast("dict[str, object]", report["order"])
    show.out.print(
        f"\nrestored {report['until_restored_s']} s after the second loss, which was noticed after "
        f"{report['until_noticed_s']} s; {order['out_of_order']} of {order['chunks']} chunks out of order"
    )
    for sequence in cast("list[str]", order["spare_before"]):
        show.out.print(f"  {sequence}", markup=False)
    for name, value in cast("dict[str, float]", report["all"]).items():
        show.out.print(f"{name.replace('_', ' ')}, all in all: {value}")
    show.out.print(f"chunks that a keeper had to try again: {report['tried_again']}")
    playback = cast("dict[str, float]", report["playback"])
    show.out.print(
        f"failed reads: {len(cast('list[str]', report['failed']))}; playback: "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in playback.items())
    )


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 only if all redundancy was restored, and no read failed."""
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
    if report["failed"]:
        show.err.print(f"benchmark: reads failed: {report['failed']}", markup=False)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
