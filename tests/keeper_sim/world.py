"""Nodes with their keepers, how they fail, and how all of it has to look once nothing fails any more."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import msgspec

from tests.keeper_sim.clients import Clients
from tests.keeper_sim.disk import Disk
from tests.keeper_sim.ledger import Held, Ledger, Violation
from tests.keeper_sim.loop import VirtualLoop
from tests.keeper_sim.mesh import SimMesh
from tests.keeper_sim.profile import PROFILES, Profile
from vstack.mesh.config import Config, Member, NodeId
from vstack.mesh.placement import choose_scheme
from vstack.mesh.registers import INIT_INDEX, ChunkRecord, Place, unpack_views, views_prefix
from vstack.node.keeper.budget import Budget
from vstack.node.keeper.collector import Collector
from vstack.node.keeper.heat import is_hot, views_within
from vstack.node.keeper.keeper import Keeper, Sight
from vstack.node.keeper.mender import Mender, wanted_of
from vstack.node.keeper.plan import ideal

MOST_NODES = 9
SETTLED_WITHIN = 900.0
"""Virtual seconds in which everything has to be in order, once nothing fails any more."""
QUIET = 8.0
"""Virtual seconds for which nothing may be changed after that."""


@dataclass(frozen=True)
class Parts:
    """What nodes are made of; the true classes, unless a wrong variant is tried."""

    keeper: type[Keeper] = Keeper
    mender: type[Mender] = Mender
    collector: type[Collector] = Collector


class SimNode:
    """A node: its disk stays when its process ends."""

    def __init__(self, world: World, node: NodeId) -> None:
        self.world = world
        self.id = node
        self.disk = Disk(world.now, lambda key: world.ledger.on_collect(node, key))
        self.boot = 0
        self.runs = False
        self.lost = False
        self.silent = False
        """Nobody reaches it, and it does its work all the same."""
        self.cut_off = False
        """It reaches no registers."""
        self.sight = Sight(world.config, frozenset())
        self.keeper: Keeper
        self.mender: Mender
        self.collector: Collector
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_draining(self) -> bool:
        member = self.sight.config.member(self.id)
        return member is not None and member.draining

    def look(self) -> None:
        """Notices how the others are."""
        config = self.world.config
        down = (n for n in config.nodes if n != self.id and not self.world.reaches("", n))
        self.sight = Sight(config, frozenset(down))

    def boot_up(self) -> None:
        """Serves its pieces, and has a keeper and a collector, which do nothing yet."""
        world, parts = self.world, self.world.parts
        self.runs = True
        self.boot += 1
        self.look()
        mesh = SimMesh(world, self.id)
        budget = Budget(lambda: self.sight.config.policy.repair_rate, world.now)
        self.mender = parts.mender(mesh, self.id, self.boot, budget, self._offload)
        self.keeper = parts.keeper(
            mesh, self.id, self.mender, lambda: self.sight, world.now, lambda: world.day
        )  # fmt: skip
        self.collector = parts.collector(
            mesh, self.id, self.disk, lambda: self.sight, self.keeper.gone, world.now, self._offload
        )

    def start(self) -> None:
        """Boots, and works from now on."""
        if self.lost or self.runs:
            return
        self.boot_up()
        world = self.world
        self._tasks = [
            world.loop.create_task(self.keeper.run()),
            world.loop.create_task(self.collector.run()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_end)
        world.spread()

    def crash(self) -> None:
        """In the middle of whatever it does."""
        self.runs = False
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self.disk.forget()
        self.world.spread()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.ledger.fail("ENDED", f"a task of node {self.id[:4]} ended: {error!r}")

    async def _offload(self, do: Callable[..., Any], *arguments: Any) -> Any:
        await self.world.delay()
        return do(*arguments)


class World:
    """One seed. `run` it once."""

    def __init__(self, seed: int, profile: Profile | str = "mixed", parts: Parts | None = None) -> None:
        """`profile`: or the name of one that the seed draws."""
        self.random = Random(seed)
        self.profile = PROFILES[profile](self.random) if isinstance(profile, str) else profile
        self.parts = parts or Parts()
        self.loop = VirtualLoop()
        self.day = 20_000
        self.config = Config(1, (), 1, policy=self.profile.policy)
        self._disks: dict[NodeId, Disk] = {}
        policy = self.profile.policy
        self.ledger = Ledger(self.now, self._disks, policy.grace, policy.undelete)
        self.nodes: dict[NodeId, SimNode] = {}
        self.clients = Clients(self)
        self.figures: Counter[str] = Counter()
        for _ in range(self.profile.nodes):
            self.add_node()

    def now(self) -> float:
        return self.loop.now

    # -- chance -----------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def lag(self) -> float:
        """Seconds that a message takes one way."""
        tail = 100 if self.random.random() < 0.01 else 1
        return min(15.0, tail * self.random.expovariate(1 / self.profile.lag))

    async def delay(self) -> None:
        await asyncio.sleep(self.lag())

    # -- nodes ------------------------------------------------------------------------------------

    def add_node(self) -> SimNode:
        node = f"{self.random.getrandbits(128):032x}"
        zone = f"z{self.random.randrange(self.profile.zones)}" if self.profile.zones else ""
        member = Member(node, f"node{len(self.nodes)}:7400", zone)
        self._set_members((*self.config.members, member))
        self.nodes[node] = SimNode(self, node)
        self._disks[node] = self.nodes[node].disk
        return self.nodes[node]

    def _set_members(self, members: tuple[Member, ...]) -> None:
        self.config = msgspec.structs.replace(self.config, epoch=self.config.epoch + 1, members=members)

    def change_members(self, change: Callable[[Member], Member | None]) -> None:
        """None: it is a member no more."""
        changed = (change(m) for m in self.config.members)
        self._set_members(tuple(m for m in changed if m is not None))
        self.spread()

    def spread(self) -> None:
        """All nodes notice after a while that something is different."""
        for node in self.nodes.values():
            if node.runs:
                self.loop.call_later(self.random.uniform(0.0, 1.5), node.look)

    def reaches(self, me: NodeId, node: NodeId) -> bool:
        target = self.nodes.get(node)
        return target is not None and target.runs and (not target.silent or me == node)

    def cut_off(self, me: NodeId) -> bool:
        node = self.nodes.get(me)
        return node is not None and node.cut_off

    def members(self) -> list[SimNode]:
        return [self.nodes[n] for n in self.config.nodes if not self.nodes[n].lost]

    def lose(self, node: SimNode) -> bool:
        """For good, with its disk; False if that would be more than the mesh is made for."""
        victims = [Held(node.id, s.info.key) for s in node.disk.pieces.values()]
        others = [m for m in self.members() if m is not node and not m.is_draining]
        if not others or not self.ledger.tolerates(victims):
            return False
        self.ledger.on_spoil(victims)
        node.crash()
        node.lost = True
        del self._disks[node.id]
        self._check_all(victims)
        return True

    def spoil(self, held: Held, *, vanish: bool = False) -> bool:
        """Damages a piece, or takes it away; False if that would be more than the mesh is made for."""
        if not self.ledger.tolerates([held]):
            return False
        self.ledger.on_spoil([held])
        disk = self._disks[held.node]
        if vanish:
            disk.remove(held.key)
        else:
            disk.rot(held.key)
        self._check_all([held])
        return True

    def _check_all(self, victims: list[Held]) -> None:
        for video in sorted({h.key.video for h in victims}):
            self.ledger.check_readable(video)

    # -- faults -----------------------------------------------------------------------------------

    def _faults(self) -> Iterator[Coroutine[Any, Any, None]]:
        p = self.profile
        yield self._now_and_then(p.crashes, self._crash)
        yield self._now_and_then(p.silences, self._silence)
        yield self._now_and_then(p.losses, self._lose)
        yield self._now_and_then(p.joins, self._join)
        yield self._now_and_then(p.drains, self._drain)
        yield self._now_and_then(p.rot, self._rot)
        yield self._now_and_then(p.fulls, self._fill)
        yield self._now_and_then(p.years, self._jump)
        yield self._now_and_then(0.2, self._scrub)

    async def _now_and_then(self, rate: float, do: Callable[[], Awaitable[None]]) -> None:
        while rate > 0:
            await asyncio.sleep(self.random.expovariate(rate))
            await do()

    async def _crash(self) -> None:
        node = self.random.choice(self.members())
        if node.runs:
            self.figures["crashes"] += 1
            node.crash()
            self.loop.call_later(self.random.uniform(0.5, 10.0), node.start)

    async def _silence(self) -> None:
        node = self.random.choice(self.members())
        if not node.silent:
            self.figures["silences"] += 1
            node.silent = True
            node.cut_off = self.chance(0.3)
            self.spread()
            self.loop.call_later(
                self.random.uniform(1.0, 3 * self.profile.repair_delay + 5), self._hear, node
            )

    def _hear(self, node: SimNode) -> None:
        node.silent = node.cut_off = False
        self.spread()

    async def _lose(self) -> None:
        node = self.random.choice(self.members())
        if self.lose(node):
            self.figures["losses"] += 1
            self.loop.call_later(self.random.uniform(0.0, 20.0), self._remove, node)

    def _remove(self, node: SimNode) -> None:
        self.change_members(lambda m: None if m.node == node.id else m)

    async def _join(self) -> None:
        if len(self.members()) < MOST_NODES:
            self.figures["joins"] += 1
            self.add_node().start()

    async def _drain(self) -> None:
        """Or removes one that is drained."""
        drained = [m for m in self.members() if m.is_draining and not m.disk.pieces]
        if drained:
            node = self.random.choice(drained)
            if self.lose(node):
                self.figures["removed"] += 1
                self._remove(node)
            return
        usable = [m for m in self.config.members if not m.draining and not self.nodes[m.node].lost]
        if len(usable) > 1:
            self.figures["drains"] += 1
            chosen = self.random.choice(usable)
            self.change_members(lambda m: msgspec.structs.replace(m, draining=True) if m == chosen else m)

    async def _rot(self) -> None:
        node = self.random.choice(self.members())
        pieces = list(node.disk.pieces.values())
        if pieces:
            held = Held(node.id, self.random.choice(pieces).info.key)
            self.figures["spoilt"] += self.spoil(held, vanish=self.chance(0.3))

    async def _fill(self) -> None:
        disk = self.random.choice(self.members()).disk
        disk.full = True
        self.loop.call_later(self.random.uniform(5.0, 30.0), setattr, disk, "full", False)

    async def _jump(self) -> None:
        self.day += 365

    async def _scrub(self) -> None:
        node = self.random.choice(self.members())
        if node.runs:
            node.disk.scrub()

    # -- a run ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation."""
        self.do(self._whole())

    def do(self, schedule: Coroutine[Any, Any, None]) -> None:
        """Runs a schedule to its end, and closes the world. Raises Violation."""
        with _listening(self.ledger):
            asyncio.set_event_loop(self.loop)
            try:
                self.loop.run_until_complete(schedule)
            finally:
                pending = asyncio.all_tasks(self.loop)
                for task in pending:
                    task.cancel()
                self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
                asyncio.set_event_loop(None)
                self.loop.close()
        if self.ledger.violation is not None:
            raise self.ledger.violation

    async def _whole(self) -> None:
        for node in self.nodes.values():
            node.start()
        faults = [self.loop.create_task(f) for f in self._faults()]
        clients = self.loop.create_task(self.clients.run())
        await self.until(lambda: False, self.profile.seconds)
        for task in (*faults, clients):
            task.cancel()
        await self.clients.end()
        await self.settle()

    async def until(self, over: Callable[[], bool], seconds: float) -> bool:
        """Whether it was `over` in time. Raises Violation as soon as there is one."""
        deadline = self.now() + seconds
        while not over():
            if self.ledger.violation is not None:
                raise self.ledger.violation
            if self.now() >= deadline:
                return False
            await asyncio.sleep(0.5)
        return True

    def heal(self) -> None:
        """Nothing fails any more, and what was damaged is known."""
        calm = Profile(lag=0.002)
        self.profile = replace(
            self.profile, lag=calm.lag, loss=0.0, unknown=0.0, unavailable=0.0, incomplete=0.0, busy=0.0
        )
        self.change_members(lambda m: None if self.nodes[m.node].lost else m)
        for node in self.members():
            node.silent = node.cut_off = node.disk.full = False
            node.start()
            node.disk.scrub()
        self.spread()

    async def settle(self) -> None:
        """Until everything is in order and stays so. Raises Violation."""
        late = self.profile.late if self.profile.unknown else 0.0
        self.heal()
        await asyncio.sleep(late)
        if not await self.until(lambda: self.disorder() == "", SETTLED_WITHIN):
            raise Violation(f"SETTLED at {self.now():.0f} s: {self.disorder()}")
        await asyncio.sleep(QUIET)
        changes = self.ledger.changes
        await asyncio.sleep(QUIET)
        if self.disorder():
            raise Violation(f"SETTLED at {self.now():.0f} s, and then: {self.disorder()}")
        if self.ledger.changes != changes:
            raise Violation(f"QUIET at {self.now():.0f} s: registers or pieces are written again and again")

    # -- order ------------------------------------------------------------------------------------

    def disorder(self) -> str:
        """What is not yet as it should be; empty if nothing."""
        named: set[Held] = set()
        for video in self.clients.videos:
            record = self.ledger.video(video)[1]
            if record is not None and record.state != "ready":
                return f"video {video[:4]} is {record.state}"
            prefixes = [f"chunk/{video}/"]
            keys = [k for k in self.ledger.registers.keys(prefixes[0]) if k not in self.ledger.strays]
            if record is None and keys:
                return f"{keys[0]} outlived its video"
            if record is None:
                continue
            upload = self.ledger.live_uploads(video)[0]
            older = [k for k in keys if f"/{upload}/" not in k]
            if older:
                return f"{older[0]} is of an upload that is over"
            if record.redundancy == "auto" and is_hot(record.hot, self._views(video), self.config.policy) != (
                record.hot
            ):
                return f"video {video[:4]} is {'hot' if record.hot else 'cold'}, and should not be"
            for _, index, chunk, _ in self.ledger.records(video):
                wrong = self._misplaced(video, index, chunk, wanted_of(record, index))
                if wrong:
                    return f"chunk {index} of {video[:4]}: {wrong}"
            named |= self.ledger.named(video)
        for node in self.members():
            for stored in node.disk.pieces.values():
                held = Held(node.id, stored.info.key)
                if held not in named and held not in self.clients.unclaimed:
                    return f"an orphan on {node.id[:4]}: {stored.info.key}"
            if node.keeper.state()["queue_chunks"]:
                return f"the queue of {node.id[:4]} is not empty"
        return ""

    def _views(self, video: str) -> int:
        prefix = views_prefix(video)
        by_day = {}
        for key in self.ledger.registers.keys(prefix):
            data = self.ledger.registers.read(key).data
            assert data is not None
            by_day[int(key.removeprefix(prefix))] = unpack_views(data).total
        return views_within(by_day, self.day, self.config.policy.window_days)

    def _misplaced(self, video: str, index: int, record: ChunkRecord, wanted: Any) -> str:
        usable = [m for m in self.config.members if not m.draining]
        scheme = choose_scheme(wanted, len(usable))
        if record.scheme != scheme:
            return f"{record.scheme.name} instead of {scheme.name}"
        where = Counter(p.node for p in record.places)
        if where != Counter(ideal(video, index, scheme, usable)):
            return f"on {sorted(n[:4] for n in where.elements())}, not where placement would have it"
        upload = self.ledger.live_uploads(video)[0]
        if index != INIT_INDEX and scheme.k > 1 and {p.piece for p in record.places} != set(range(scheme.m)):
            return f"pieces {sorted(p.piece for p in record.places)} are named"
        bad = [p for p in record.places if not self._is_good(video, upload, record, p)]
        return f"{len(bad)} pieces are bad" if bad else ""

    def _is_good(self, video: str, upload: Any, record: ChunkRecord, place: Place) -> bool:
        return self.ledger.good(Held(place.node, record.key(video, upload, place)))


class _Listener(logging.Handler):
    """Takes an error that the keeper could not explain for what it is."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(logging.ERROR)
        self._ledger = ledger

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._ledger.fail("RAISED", f"{record.getMessage()}: {error!r}")


@contextmanager
def _listening(ledger: Ledger) -> Iterator[None]:
    logger = logging.getLogger("vstack.node.keeper")
    handler = _Listener(ledger)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
