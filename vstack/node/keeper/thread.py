"""The thread in which a node keeps: its own event loop, its own connections, the node's own key.

The reactor tells it what it sees of the mesh, and takes its figures; nothing else is shared but the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from itertools import count
from time import monotonic, time
from typing import Any

from vstack.errors import VstackError
from vstack.mesh.config import NodeId
from vstack.mesh.keys import ClientKey, NodeKeys
from vstack.mesh.mesh_client import connect
from vstack.node.keeper.budget import Budget
from vstack.node.keeper.collector import Collector
from vstack.node.keeper.keeper import Keeper, Sight
from vstack.node.keeper.mender import Mender
from vstack.node.keeper.voice import Voice
from vstack.node.store import ChunkStore

log = logging.getLogger(__name__)

FIGURES_EVERY = 0.25
"""Seconds between two looks at the figures."""
BEGIN_ANEW = 10.0
"""Seconds after an error that nobody expected."""
DAY = 86_400


class Keeping:
    """Works from when it is made until `close`."""

    def __init__(
        self,
        node: NodeId,
        boot: int,
        address: str,
        address_map: Mapping[str, str],
        keys: NodeKeys | None,
        store: ChunkStore,
        sight: Sight,
        changed: Callable[[], None],
    ) -> None:
        """`address` is the one that this node is known by; `address_map` says where that is dialled here.
        `changed` is called, in another thread, after pieces were dropped."""
        self._node = node
        self._boot = boot
        self._address = address
        self._address_map = address_map
        self._key = None if keys is None else ClientKey("keeper", keys.mesh.pair.public, keys.own)
        self._store = store
        self._sight = sight
        self._changed = changed
        self._pieces = count(1)
        """Part of the names of pieces: no two menders of this process write under the same."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._keeper: Keeper | None = None
        self._collector: Collector | None = None
        self._closing = False
        self.figures: dict[str, float] = {}
        """As they were a moment ago."""
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def observe(self, sight: Sight) -> None:
        """What the reactor sees of the mesh now."""
        self._sight = sight

    def hasten(self, job: str) -> None:
        """`job`: repair or gc. The next pass begins at once."""
        worker = self._keeper if job == "repair" else self._collector
        if self._loop is not None and worker is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(worker.hasten)

    def close(self) -> None:
        """Returns when nothing of it touches the store any more."""
        self._closing = True
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        """Until `close`, whatever happens: without it the node would repair nothing."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        voice = Voice(log, monotonic)
        while not self._closing:
            pause = 1.0
            try:
                async with connect((self._address,), address_map=self._address_map, keys=self._key) as mesh:
                    mesh.near = self._node
                    await self._keep(mesh)
            except VstackError as e:
                voice.warn("connect", f"the keeper cannot reach its own node: {e}")
            except Exception:  # noqa: BLE001 - the log has it
                voice.fail("keeper", f"the keeper has ended, and begins anew in {BEGIN_ANEW:.0f} s")
                pause = BEGIN_ANEW
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)

    async def _keep(self, mesh: Any) -> None:
        assert self._stop is not None
        budget = Budget(lambda: self._sight.config.policy.repair_rate, monotonic)
        mender = Mender(mesh, self._node, self._boot, budget, asyncio.to_thread, self._pieces)
        keeper = Keeper(mesh, self._node, mender, lambda: self._sight, monotonic, lambda: int(time() // DAY))
        collector = Collector(
            mesh, self._node, self._store, lambda: self._sight, keeper.gone, monotonic, asyncio.to_thread
        )
        self._keeper, self._collector = keeper, collector
        tasks = [asyncio.create_task(keeper.run()), asyncio.create_task(collector.run())]
        stop = asyncio.create_task(self._stop.wait())
        dropped = 0
        try:
            while not stop.done() and not any(t.done() for t in tasks):
                await asyncio.wait([stop, *tasks], timeout=FIGURES_EVERY, return_when=asyncio.FIRST_COMPLETED)
                self.figures = keeper.state() | collector.state()
                if collector.figures["gc_dropped"] != dropped:
                    dropped = collector.figures["gc_dropped"]
                    await asyncio.to_thread(self._changed)
        finally:
            for task in (stop, *tasks):
                task.cancel()
            _, *ended = await asyncio.gather(stop, *tasks, return_exceptions=True)
        for error in ended:  # they end only when they are cancelled, or by an error that nobody expected
            if isinstance(error, Exception):
                raise error
