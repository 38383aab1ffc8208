"""A TCP relay that reads along: it counts the messages between nodes on the wire itself.

Understands as much of ZMTP 3.1 (rfc.zeromq.org/spec/23) as is needed to find the messages: a greeting
of 64 bytes, then frames of flags (1 more, 2 long, 4 command), a size of one or eight bytes, and a body.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec

from vstack.mesh.messages import Envelope, decode

GREETING = 64


class Splitter:
    """Cuts one direction of a connection into messages."""

    def __init__(self, counts: Counter[str]) -> None:
        self._buffer = bytearray()
        self._greeted = False
        self._parts: list[bytes] = []
        self._counts = counts

    def feed(self, data: bytes) -> None:
        self._buffer += data
        if not self._greeted:
            if len(self._buffer) < GREETING:
                return
            del self._buffer[:GREETING]
            self._greeted = True
        while (frame := self._next_frame()) is not None:
            flags, body = frame
            if flags & 4:
                continue  # READY, PING, PONG: not messages
            self._parts.append(body)
            if not flags & 1:
                self._count(self._parts)
                self._parts = []

    def _next_frame(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < 2:
            return None
        flags = self._buffer[0]
        head = 9 if flags & 2 else 2
        if len(self._buffer) < head:
            return None
        size = int.from_bytes(self._buffer[1:head])
        if len(self._buffer) < head + size:
            return None
        body = bytes(self._buffer[head : head + size])
        del self._buffer[: head + size]
        return flags, body

    def _count(self, parts: list[bytes]) -> None:
        self._counts["messages"] += 1
        try:
            body = decode(parts[1]).body
        except (msgspec.DecodeError, IndexError):
            self._counts["unknown"] += 1
            return
        self._counts[type(body).__name__] += 1
        if isinstance(body, Envelope):
            for item in body.items:
                self._counts[f"item.{type(item).__name__}"] += 1


class Relay:
    """Listens on `port` and passes everything on to `target`, both ways, on 127.0.0.1."""

    def __init__(self, port: int, target: int, counts: Counter[str]) -> None:
        self._port = port
        self._target = target
        self._counts = counts
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", self._port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(
                self._pump(reader, far_writer, Splitter(self._counts)),
                self._pump(far_reader, writer, Splitter(self._counts)),
            )
        finally:
            writer.close()
            far_writer.close()
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, splitter: Splitter
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                splitter.feed(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
