"""One turn of one storage system: bulk, latency, and what is left when two nodes are dead.

Nothing here knows which system it is. Every byte that comes back is compared by SHA-256, outside the
measured time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from programs import Wrong
from put_get import Content

DEAD = 2
"""Nodes that are killed."""
BULK = 2
"""Large files that a turn puts and gets in each way."""
DEGRADED = 3
"""Gets in each way while nodes are dead."""
SMALL = 2 << 20
WARM_UP = 5
"""Small files that each way puts and gets before it is measured."""
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class System:
    """What is measured, running."""

    ways: tuple[str, ...]
    """In which it can store."""
    pids: Callable[[], list[int]]
    put: Callable[[Path, str], Awaitable[str]]
    """Stores a file in one of the ways; what `get` needs to find it."""
    get: Callable[[str, str], Awaitable[Sequence[bytes | memoryview]]]
    kill: Callable[[], None]
    """Kills DEAD of its nodes with SIGKILL."""


Start = Callable[[Path], AbstractAsyncContextManager[System]]
"""Starts a system whose data is below a folder."""


@dataclass
class Measured:
    """One way in one round."""

    put: list[float] = field(default_factory=list)
    """Bytes of the file a second."""
    get: list[float] = field(default_factory=list)
    put_cpu: float = 0.0
    """Seconds per 10^9 bytes, of all processes and this one."""
    get_cpu: float = 0.0
    put_seconds: list[float] = field(default_factory=list)
    """Of each small file."""
    get_seconds: list[float] = field(default_factory=list)
    degraded: list[float] = field(default_factory=list)
    """Bytes a second while nodes are dead."""
    first_degraded: float | None = None
    """Of the first get after the nodes were killed; None if another way had it."""


class Turn:
    """One system, all its ways."""

    def __init__(self, system: System, content: Content, small: Content, first: int) -> None:
        """`first` is the way that begins, by number."""
        self._system = system
        self._content = content
        self._small = small
        at = first % len(system.ways)
        self._ways = system.ways[at:] + system.ways[:at]
        self._stored: dict[str, list[tuple[str, str]]] = {way: [] for way in self._ways}
        """Handle and SHA-256 of the large files."""
        self.found = {way: Measured() for way in self._ways}

    async def run(self, tries: int) -> dict[str, Measured]:
        for way in self._ways:
            await self._latency(way, WARM_UP, Measured())
        for way in self._ways:
            await self._bulk(way)
        for way in self._ways:
            await self._latency(way, tries, self.found[way])
        self._system.kill()
        for way in self._ways:
            await self._degraded(way)
        return self.found

    async def _bulk(self, way: str) -> None:
        found, stored = self.found[way], self._stored[way]
        put_cpu = get_cpu = 0.0
        done = 0
        for _ in range(BULK):
            with self._content.fresh("bytes") as (path, sha256):
                os.sync()  # what others have left to write is not this one's burden
                before, began = self._cpu(), time.perf_counter()
                handle = await self._system.put(path, way)
                found.put.append(path.stat().st_size / (time.perf_counter() - began))
                put_cpu += self._cpu() - before
                stored.append((handle, sha256))
                done += path.stat().st_size
        for handle, sha256 in stored:
            before = self._cpu()
            rate, used = await self._get(handle, way, sha256)
            found.get.append(rate)
            get_cpu += used - before
        found.put_cpu, found.get_cpu = put_cpu * 1e9 / done, get_cpu * 1e9 / done

    async def _latency(self, way: str, tries: int, found: Measured) -> None:
        stored: list[tuple[str, str]] = []
        for _ in range(tries):
            with self._small.fresh("bytes") as (path, sha256):
                began = time.perf_counter()
                stored.append((await self._system.put(path, way), sha256))
                found.put_seconds.append(time.perf_counter() - began)
        for handle, sha256 in stored:
            rate, _ = await self._get(handle, way, sha256)
            found.get_seconds.append(SMALL / rate)

    async def _degraded(self, way: str) -> None:
        found = self.found[way]
        for number in range(DEGRADED + (way == self._ways[0])):
            handle, sha256 = self._stored[way][number % BULK]
            rate, _ = await self._get(handle, way, sha256)
            if way == self._ways[0] and number == 0:
                found.first_degraded = rate
            else:
                found.degraded.append(rate)

    async def _get(self, handle: str, way: str, sha256: str) -> tuple[float, float]:
        """Bytes a second, and the CPU seconds that had been used when it was done. Raises Wrong."""
        began = time.perf_counter()
        parts = await self._system.get(handle, way)
        took, used = time.perf_counter() - began, self._cpu()
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        if digest.hexdigest() != sha256:
            raise Wrong(f"{way}: what came back is not what was stored")
        return sum(map(len, parts)) / took, used

    def _cpu(self) -> float:
        """CPU seconds that the system's processes and this one have used so far, ended threads included."""
        used = time.process_time()
        for pid in self._system.pids():
            stat = Path(f"/proc/{pid}/stat").read_text()
            fields = stat[stat.rindex(")") + 2 :].split()
            used += (int(fields[11]) + int(fields[12])) * _TICK
        return used
