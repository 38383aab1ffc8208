"""The keeper: looks at the videos of which this node is the keeper, and mends what calls for it.

A pass lists all videos, reads the chunk tables of its own, takes inventory of every piece that they name,
and queues what has to be done; then the queue is worked off, most endangered chunks first. Nothing of it
is kept on disk: the registers say what is to be done, so a crash forgets nothing. A pass begins again
at once when a node comes or goes for good, and otherwise after a pause in proportion to what it cost.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from vstack.errors import VstackError
from vstack.mesh.config import Config, NodeId, group, key_subject
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import Change, Page
from vstack.mesh.messages import Listing, Mismatch, Ok, Row
from vstack.mesh.registers import (
    ChunkRecord,
    PieceKey,
    Place,
    Scheme,
    UploadId,
    VideoRecord,
    chunk_prefix,
    given_up,
    init_record,
    pack,
    unpack_chunk,
    unpack_video,
    unpack_views,
    upload_id,
    uploads_prefix,
    video_key,
    views_prefix,
    what,
)
from vstack.node.keeper.heat import is_hot, views_within
from vstack.node.keeper.mender import Mended, Mender, Target, wanted_of
from vstack.node.keeper.mender import Mesh as MenderMesh
from vstack.node.keeper.plan import Nodes, Reason, plan, spare
from vstack.node.keeper.voice import Voice

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_QUEUE = 20_000
"""Chunks that wait; of more, the most urgent ones, and the next pass finds the others."""
TABLE = 1000
"""Chunks of a video that are looked at in one go: nothing else happens in this thread meanwhile."""
LOOKS = 3
"""Videos that are looked at at once."""
HANDS = 2
"""Chunks that are worked on at once."""
CLOSED_FOR = 30.0
"""Seconds for which a node that did not take a piece is given none."""
PAUSE = 15.0
"""Seconds between two passes, at least, unless the policy's delays are shorter than a minute."""
SHARE = 10
"""A pause lasts this many times as long as the pass before it, up to the policy's delay or a minute."""
WORK_FOR = 600.0
"""Seconds of work after which a keeper looks again: or SHARE times as long as it has looked."""
COUNT_EVERY = 600.0
"""Seconds after which running time is written into registers that wait for something."""
BATCH = 200
"""Registers that are deleted at once."""


class Sight(NamedTuple):
    """What the node sees of the mesh."""

    config: Config
    down: frozenset[NodeId]
    """Members that do not answer."""


class Mesh(MenderMesh, Protocol):
    """What is needed of `MeshClient`."""

    async def list(self, prefix: str) -> Page: ...

    def pages(self, prefix: str) -> AsyncIterator[Listing]: ...

    async def change_all(self, changes: Sequence[Change]) -> Sequence[Ok | Mismatch]: ...


class Video(NamedTuple):
    """A video's register, as it was read."""

    id: str
    version: int
    record: VideoRecord

    @property
    def upload(self) -> UploadId:
        return upload_id(self.record, self.version)


@dataclass(order=True)
class Queued:
    urgency: tuple[int, int]
    size: int
    """Bytes to be written."""
    target: Target = field(compare=False)
    wanted: Scheme = field(compare=False)
    spare: int = field(compare=False)
    reason: Reason = field(compare=False)
    bad: tuple[Place, ...] = field(compare=False)


@dataclass
class _Waiting:
    """A video in a state that ends after a while, as this process has seen it."""

    state: tuple[str, UploadId]
    version: int
    """Of its register. If somebody else has written it, it may have been in another state meanwhile, or that
    one has counted the same time."""
    counted: float
    """Up to when its running time is in the register."""
    chunks: int = 0


class Keeper:
    """Belongs to one event loop. `run` until it is cancelled."""

    def __init__(
        self,
        mesh: Mesh,
        node: NodeId,
        mender: Mender,
        sight: Callable[[], Sight],
        now: Callable[[], float],
        today: Callable[[], int],
    ) -> None:
        """`now` gives monotonic seconds, `today` the days since 1970 by the clock."""
        self._mesh = mesh
        self._me = node
        self._mender = mender
        self._sight = sight
        self._now = now
        self._today = today
        self._down_since: dict[NodeId, float] = {}
        self._closed: dict[NodeId, float] = {}
        """Until when a node is given no pieces."""
        self._waiting: dict[str, _Waiting] = {}
        self._queue: list[Queued] = []
        self._hasten = asyncio.Event()
        self._busy = 0
        self._work_began = 0.0
        self._work_bytes = 0
        self._worked = 0
        """Chunks of the queue that are done: of too few, no rate is told."""
        self.figures: Counter[str] = Counter()
        """Since the start: passes, chunks_<reason>, bytes_read, bytes_written, bytes_restored, failed, ..."""
        self._state: dict[str, float] = {}
        self._voice = Voice(log, now)

    # -- what is seen -----------------------------------------------------------------------------

    def hasten(self) -> None:
        """The next pass begins at once."""
        self._hasten.set()

    def gone(self) -> frozenset[NodeId]:
        """Members that have been down for longer than the policy's delay."""
        sight, now = self._sight(), self._now()
        for node in sight.down:
            self._down_since.setdefault(node, now)
        for node in self._down_since.keys() - sight.down:
            del self._down_since[node]
            self._closed.pop(node, None)  # it is back: what it did not take while it was down says nothing
        delay = sight.config.policy.repair_delay
        return frozenset(n for n, since in self._down_since.items() if now - since >= delay)

    def _nodes(self) -> Nodes:
        sight = self._sight()
        now = self._now()
        self._closed = {n: until for n, until in self._closed.items() if until > now}
        return Nodes(sight.config.members, self.gone(), self._closed.keys() | sight.down)

    def _outlook(self) -> tuple[int, frozenset[NodeId]]:
        """What a pass rests on: if it changes, another one is due."""
        sight = self._sight()
        return sight.config.epoch, self.gone()

    def _is_mine(self, sight: Sight, video: str) -> bool:
        """Whether this node is the first live member of the video's group."""
        first = next((n for n in group(sight.config, video) if n == self._me or n not in sight.down), "")
        return first == self._me

    def state(self) -> dict[str, float]:
        """The queue, as it is now, and the figures of `figures`."""
        out = dict(self._state)
        left = sum(q.size for q in self._queue)
        spent = self._now() - self._work_began
        rate = self._work_bytes / spent if self._queue and self._worked >= 2 * HANDS else 0.0
        out |= {"queue_chunks": float(len(self._queue) + self._busy), "queue_bytes": float(left)}
        for reason in Reason:
            out[f"queue_{reason.name.lower()}"] = 0.0
        for queued in self._queue:
            out[f"queue_{queued.reason.name.lower()}"] += 1
            if queued.reason is Reason.REPAIR:
                name = f"queue_spare_{min(queued.spare, 3)}"
                out[name] = out.get(name, 0.0) + 1
        out |= {"rate": rate, "eta_s": left / rate if rate else 0.0}
        return out | {k: float(v) for k, v in self.figures.items()}

    # -- passes -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._hasten.clear()
            self.figures["passes_begun"] += 1
            began, outlook = self._now(), self._outlook()
            try:
                complete = await self.look()
                took = self._now() - began
                is_done = await self._work(outlook, max(WORK_FOR, SHARE * took))
                self.figures["passes"] += 1
                if not is_done:
                    continue
            except VstackError as e:
                complete, took = False, self._now() - began
                self._voice.warn("pass", f"the pass over the videos was broken off: {e}")
            except Exception:  # noqa: BLE001 - the log has it
                complete, took = False, self._now() - began
                self._voice.fail("pass", "the pass over the videos failed")
            self._state["pass_s"] = took
            over = partial(self._is_due, outlook)
            await rest(self._now, took if complete else 0.0, self._shortest_delay, over)

    def _is_due(self, outlook: tuple[int, frozenset[NodeId]]) -> bool:
        """Whether another pass has to begin at once, after one that rested on `outlook`."""
        return self._hasten.is_set() or self._outlook() != outlook

    def _shortest_delay(self) -> float:
        policy = self._sight().config.policy
        return min(policy.repair_delay, policy.grace)

    async def look(self) -> bool:
        """Queues what the videos of this node call for; whether all of them could be looked at."""
        sight, nodes = self._sight(), self._nodes()
        queue: list[Queued] = []
        tally: Counter[str] = Counter(videos=0, chunks=0, degraded=0, unreadable=0)
        complete = True
        seen: set[str] = set()
        async for page in self._mesh.pages("video/"):
            complete &= page.complete
            mine: list[Video] = []
            for row in page.rows:
                video = key_subject(row.key)
                if self._is_mine(sight, video):
                    seen.add(video)
                    try:
                        mine.append(Video(video, row.version, unpack_video(row.data)))
                    except msgspec.DecodeError:
                        continue  # written by a newer version: not ours to keep
            for some in _batches(mine, LOOKS):
                for ok in await asyncio.gather(*(self._look_at(v, nodes, queue, tally) for v in some)):
                    complete &= ok
        self._queue = sorted(queue)[:MAX_QUEUE]
        for gone in self._waiting.keys() - seen:
            del self._waiting[gone]
        self._state = {k: float(v) for k, v in tally.items()} | {"complete": float(complete)}
        return complete

    async def _look_at(self, video: Video, nodes: Nodes, queue: list[Queued], tally: Counter[str]) -> bool:
        """One video; whether all of it could be looked at. Raises nothing: others wait for their turn."""
        try:
            table = await self._mesh.list(uploads_prefix(video.id))
            if len(_older(table.rows, video)) < len(table.rows):
                # It has just been changed, and the next pass sees how; or a recovery has left its register at
                # what it said before. Then a later version would turn what is there into garbage.
                self._voice.warn("newer", f"video {video.id[:12]}: there are chunks of a newer upload")
                return True
            state = video.record.state
            if state in ("aborted", "purging"):
                await self._purge(video, table)
                return True
            if state in ("uploading", "deleted"):
                aged = await self._count_time(video, len(table.rows))
                if aged is None or state == "uploading":
                    return True
                video = aged
            elif video.record.redundancy == "auto":
                video = await self._take_temperature(video)
            return await self._plan(video, table, nodes, queue, tally) and table.complete
        except VstackError as e:
            self._voice.warn("video", f"video {video.id[:12]} could not be looked at: {e}")
        except Exception:  # noqa: BLE001 - the log has it
            self._voice.fail("video", f"video {video.id[:12]} could not be looked at")
        return False

    async def _plan(
        self, video: Video, table: Page, nodes: Nodes, queue: list[Queued], tally: Counter[str]
    ) -> bool:
        prefix = chunk_prefix(video.id, video.upload)
        await self._delete([row for row in _older(table.rows, video) if not row.key.startswith(prefix)])
        tally["videos"] += 1
        init = video.record.init
        asked = init is None or await self._plan_chunks(video, [init_record(init)], nodes, queue, tally)
        for some in _batches([row for row in table.rows if row.key.startswith(prefix)], TABLE):
            records: list[ChunkRecord] = []
            for row in some:
                try:
                    records.append(unpack_chunk(row.data))
                except msgspec.DecodeError:
                    continue  # written by a newer version: not ours to keep
            asked &= await self._plan_chunks(video, records, nodes, queue, tally)
        return asked

    async def _plan_chunks(
        self,
        video: Video,
        records: Sequence[ChunkRecord],
        nodes: Nodes,
        queue: list[Queued],
        tally: Counter[str],
    ) -> bool:
        """Whether all live nodes that hold pieces of them said what they have."""
        bad, asked = await self._inventory(video, records, nodes)
        tally["chunks"] += len(records)
        for record in records:
            wrong = tuple(p for p in record.places if p in bad)
            wanted = wanted_of(video.record, record.entry.index)
            left = spare(record, nodes, wrong)
            tally["unreadable"] += left < 0
            tally["degraded"] += record.scheme != wanted or left < record.scheme.m - record.scheme.k
            tally["lacking"] += left < wanted.m - wanted.k
            work = plan(video.id, record, wanted, nodes, wrong)
            if work is not None:
                target = Target(video.id, video.upload, record.entry.index)
                size = work.bytes(record)
                queue.append(Queued(work.urgency, size, target, wanted, work.spare, work.reason, wrong))
        if len(queue) > 2 * MAX_QUEUE:
            queue[:] = heapq.nsmallest(MAX_QUEUE, queue)
        return asked

    async def _inventory(
        self, video: Video, records: Sequence[ChunkRecord], nodes: Nodes
    ) -> tuple[set[Place], bool]:
        """The places whose pieces are not there, or damaged; and whether all live nodes said so."""
        by_node: dict[NodeId, list[tuple[PieceKey, Place]]] = defaultdict(list)
        live = {m.node for m in nodes.members} - set(nodes.gone) - self._sight().down
        for record in records:
            for place in record.places:
                if place.node in live:
                    by_node[place.node].append((record.key(video.id, video.upload, place), place))
        bad: set[Place] = set()
        complete = True
        for node, wanted in by_node.items():
            try:
                held = await self._mesh.inventory(node, [key for key, _ in wanted], timeout=10.0)
            except (NoAnswer, Refused):
                complete = False
                continue
            for (_, place), answer in zip(wanted, held, strict=True):
                if answer.state != "present" or answer.sha256 != place.sha256:
                    bad.add(place)
        return bad, complete

    # -- the states of videos ---------------------------------------------------------------------

    async def _change(self, video: Video, **changes: object) -> Video | None:
        """None if somebody else changed it meanwhile: the next pass sees how it is then."""
        return await self._write(video, msgspec.structs.replace(video.record, upload=video.upload, **changes))

    async def _write(self, video: Video, record: VideoRecord) -> Video | None:
        """As `_change`."""
        outcome = await self._mesh.change(Change(video_key(video.id), video.version, pack(record)))
        return Video(video.id, outcome.version, record) if isinstance(outcome, Ok) else None

    async def _count_time(self, video: Video, chunks: int) -> Video | None:
        """Adds the running time that has passed; what has waited for long enough comes to its end: a deleted
        video is purged, an upload that nobody goes on with is aborted. None if it changed."""
        now, undelete = self._now(), self._sight().config.policy.undelete
        state = (video.record.state, video.upload)
        known = self._waiting.get(video.id)
        if known is None or (known.state, known.version) != (state, video.version) or chunks > known.chunks:
            self._waiting[video.id] = _Waiting(state, video.version, now, chunks)
            if known is not None and known.state == state and chunks > known.chunks and video.record.waited:
                return await self._change(video, waited=0)  # the upload goes on
            return video
        elapsed = int(now - known.counted)
        waited = video.record.waited + elapsed
        if waited < undelete and elapsed < max(1.0, min(COUNT_EVERY, undelete / 10)):
            return video
        if waited < undelete:
            changed = await self._change(video, waited=waited)
        elif video.record.state == "deleted":
            changed = await self._change(video, state="purging", waited=0)
            if changed is not None:
                log.info("video %s was deleted: its space is given back now", video.id[:12])
        else:
            changed = await self._write(video, given_up(video.record, video.upload))
            if changed is not None:
                log.info("the upload of video %s was given up: nobody goes on with it", video.id[:12])
        if waited >= undelete:
            self._hasten.set()
            return None
        if changed is not None:
            known.counted, known.version = now, changed.version
        return changed

    async def _take_temperature(self, video: Video) -> Video:
        """Makes the video hot or cold, as its views call for."""
        sight = self._sight()
        prefix = views_prefix(video.id)
        page = await self._mesh.list(prefix)
        if not page.complete:
            return video
        by_day: dict[int, int] = {}
        for row in page.rows:
            try:
                by_day[int(row.key.removeprefix(prefix))] = unpack_views(row.data).total
            except msgspec.DecodeError:
                continue  # written by a newer version: not ours to count
        policy = sight.config.policy
        views = views_within(by_day, self._today(), policy.window_days)
        hot = is_hot(video.record.hot, views, policy)
        if hot == video.record.hot:
            return video
        log.info("video %s is %s: %d views", video.id[:12], "hot" if hot else "cold", views)
        self.figures["became_hot" if hot else "became_cold"] += 1
        return await self._change(video, hot=hot) or video

    async def _purge(self, video: Video, table: Page) -> None:
        """Deletes all registers of a video that is over: its chunks', its views', and last its own."""
        if not await self._delete(_older(table.rows, video)) or not table.complete:
            return
        if video.record.state == "purging":
            views = await self._mesh.list(views_prefix(video.id))
            if not await self._delete(views.rows) or not views.complete:
                return
        again = await self._mesh.list(uploads_prefix(video.id))
        if again.complete and not _older(again.rows, video):
            await self._mesh.change(Change(video_key(video.id), video.version, None))
            self.figures["purged"] += 1

    async def _delete(self, rows: Sequence[Row]) -> bool:
        """Whether all of them are tombstones now."""
        deleted = True
        for some in _batches(rows, BATCH):
            changes = [Change(row.key, row.version, None) for row in some]
            deleted &= all(isinstance(o, Ok) for o in await self._mesh.change_all(changes))
        return deleted

    # -- work -------------------------------------------------------------------------------------

    async def _work(self, outlook: tuple[int, frozenset[NodeId]], seconds: float) -> bool:
        """Works the queue off, until it is empty or the outlook has changed; False if `seconds` were over
        before: something else may be more urgent by now."""
        self._work_began, self._work_bytes, self._worked = self._now(), 0, 0
        heapq.heapify(self._queue)

        async def hand() -> None:
            while self._queue and self._outlook() == outlook and self._now() - self._work_began < seconds:
                queued = heapq.heappop(self._queue)
                self._busy += 1
                try:
                    mended = await self._mender.mend(queued.target, queued.wanted, self._nodes(), queued.bad)
                except Exception:  # noqa: BLE001 - the log has it
                    self._voice.fail("chunk", f"{_name(queued.target)} could not be mended")
                    mended = Mended("failed")
                finally:
                    self._busy -= 1
                self._count(queued, mended)

        before = Counter(self.figures)
        await asyncio.gather(*(hand() for _ in range(HANDS)))
        done = self.figures - before
        words = ", ".join(
            f"{n} ({r})" for r in map(str.lower, Reason.__members__) if (n := done[f"chunks_{r}"])
        )
        if words:
            log.info("chunks brought into order: %s; %d bytes written", words, done["bytes_written"])
        return not self._queue or self._outlook() != outlook

    def _count(self, queued: Queued, mended: Mended) -> None:
        self._work_bytes += queued.size
        self._worked += 1
        for node, why in mended.closed.items():
            self._closed[node] = self._now() + CLOSED_FOR
            self._voice.warn(node, f"node {node[:8]} is given no pieces for {CLOSED_FOR:.0f} s: {why}")
        self.figures["bytes_read"] += mended.bytes_read
        self.figures["bytes_written"] += mended.bytes_written
        self.figures["bytes_restored"] += mended.bytes_restored
        if mended.outcome == "done" and mended.work is not None:
            self.figures[f"chunks_{mended.work.reason.name.lower()}"] += 1
            self.figures[f"bytes_{mended.work.reason.name.lower()}"] += mended.bytes_restored
        elif mended.outcome != "nothing":
            self.figures[mended.outcome] += 1
            if mended.outcome == "failed":
                self._voice.warn("chunk", f"{_name(queued.target)} could not be mended: {mended.why}")


def _name(target: Target) -> str:
    return f"{what(target.index)} of video {target.video[:12]}"


async def rest(
    now: Callable[[], float], took: float, delay: Callable[[], float], over: Callable[[], bool]
) -> None:
    """The pause after a pass that took so many seconds, unless it is `over` sooner. `delay`: the policy's,
    in seconds, after which what a pass does has to be seen; asked again and again, for it may change."""
    began = now()
    while not over():
        least = min(PAUSE, max(0.5, delay() / 4))
        left = began + max(least, min(SHARE * took, max(60.0, delay()))) - now()
        if left <= 0:
            return
        await asyncio.sleep(min(0.25, max(0.01, left)))


def _older(rows: Sequence[Row], video: Video) -> list[Row]:
    """Registers of uploads that were opened before `video` was read: what somebody has begun since is left
    alone."""
    return [row for row in rows if int(row.key.split("/")[2].split(".")[1]) <= video.version]


def _batches(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]
