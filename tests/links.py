"""Relays between nodes that can cut single links: who dials is read off the connection's own hello.

Every node advertises its relay, so all connections of nodes among each other pass one. ZeroMQ's READY
command names the routing id of a DEALER, which begins with `n` and the NodeId (plain connections only).
While a link is cut, its bytes stay where they are: to both ends it looks like a network that swallows.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

ANY = "*"


@dataclass
class Links:
    """All relays of one mesh, and the links between its nodes that are cut just now."""

    cut: set[tuple[str, str]] = field(default_factory=set)
    """(NodeId that dials or ANY, address that it dials)."""
    _servers: list[asyncio.Server] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def relay(self, port: int, target: int) -> None:
        """Passes on what comes to `port`, to `target`, both ways."""

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await self._serve(reader, writer, f"127.0.0.1:{port}", target)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                writer.close()
                self._tasks.discard(task)

        self._servers.append(await asyncio.start_server(on_connection, "127.0.0.1", port))

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, target: int
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        link = _Link(address)
        try:
            there = asyncio.create_task(self._pump(reader, far_writer, link, dialling=True))
            back = asyncio.create_task(self._pump(far_reader, writer, link, dialling=False))
            try:
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
        finally:
            far_writer.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link, *, dialling: bool
    ) -> None:
        while data := await reader.read(1 << 16):
            if dialling:
                link.read_along(data)
            while (link.node, link.address) in self.cut or (ANY, link.address) in self.cut:
                await asyncio.sleep(0.02)
            writer.write(data)
            await writer.drain()

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class _Link:
    address: str
    node: str = ""
    _head: bytes = b""

    def read_along(self, data: bytes) -> None:
        if self.node or len(self._head) > 1024:
            return
        self._head += data
        at = self._head.find(b"Identity")
        value = self._head[at + 12 : at + 12 + 17]
        if at >= 0 and len(value) == 17 and value[:1] == b"n":
            self.node = value[1:].hex()
