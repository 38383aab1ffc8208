"""The fetcher over a mesh made by hand: chunks come out whole, or an error does."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import cast

import msgspec
import pytest

from vstack import erasure
from vstack.client import fetcher as fetching
from vstack.client.fetcher import ChunkFetcher
from vstack.errors import DamagedData, MeshUnavailable
from vstack.mesh.config import Member
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import Failure, Found, Held, PieceData
from vstack.mesh.registers import (
    ERASURE,
    REPLICATED,
    ChunkEntry,
    ChunkRecord,
    PieceKey,
    Place,
    Scheme,
    UploadId,
    pack,
)

VIDEO = "ab" * 32
UPLOAD = UploadId(1, 2)
NODES = {letter: letter * 32 for letter in "abcdef"}


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class FakeMesh:
    """Pieces by node and number. `before` may delay or refuse a request."""

    def __init__(self, data: bytes, scheme: Scheme, holders: str) -> None:
        self.data = data
        self.pieces: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, int, int]] = []
        self.reads = 0
        self.doubted: list[tuple[str, int]] = []
        """Pieces that their nodes were asked to read."""
        self.members: tuple[Member, ...] = ()
        self.register: ChunkRecord | None = None
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.estimates: dict[str, object] = {}
        self.record = self.stored(scheme, holders)

    def stored(self, scheme: Scheme, holders: str) -> ChunkRecord:
        pieces = [bytes(p) for p in erasure.encode(self.data, scheme.k, scheme.m)]
        places = []
        for i, letter in enumerate(holders):
            number = 0 if scheme.k == 1 else i
            self.pieces[NODES[letter], number] = pieces[number]
            places.append(Place(NODES[letter], number, digest(pieces[number])))
        entry = ChunkEntry(4, 0, 10, len(self.data), digest(self.data))
        return ChunkRecord(entry, scheme, tuple(places))

    async def inventory(self, node: str, keys: list[PieceKey], *, verified_within: int) -> list[Held]:
        self.doubted += [(node, key.piece) for key in keys]
        return [Held("quarantined", bytes(32)) for _ in keys]

    async def get_range(
        self, node: str, key: PieceKey, offset: int, length: int, *, timeout: float
    ) -> tuple[memoryview, PieceData]:
        self.requests.append((node, key.piece, offset))
        piece = self.pieces.get((node, key.piece))
        if self.before is not None:
            await self.before(node)
        if piece is None:
            raise Refused(Failure("not-found", "no such piece"))
        return memoryview(piece)[offset : offset + length], PieceData(len(piece))

    async def read(self, key: str) -> Found:
        self.reads += 1
        return Found(1, pack(self.register or self.record))


def fetcher_of(mesh: FakeMesh) -> ChunkFetcher:
    return ChunkFetcher(cast(MeshClient, mesh), VIDEO, UPLOAD)


def noise(size: int) -> bytes:
    return Random(size).randbytes(size)


@pytest.mark.parametrize(("scheme", "holders"), [(ERASURE, "abcde"), (ERASURE, "abcab"), (REPLICATED, "abc")])
@pytest.mark.parametrize("size", [1, 65_536, 1_000_001])
def test_a_chunk_comes_out_whole_and_says_who_served_it(scheme: Scheme, holders: str, size: int) -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(size), scheme, holders)
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(mesh.record)
        assert chunk.data == mesh.data
        assert sum(chunk.served.values()) == scheme.k * erasure.fragment_size(size, scheme.k)
        assert fetcher.bytes_received == sum(chunk.served.values())
        assert fetcher.bytes_wasted == chunk.failovers == 0

    asyncio.run(run())


def test_a_damaged_piece_is_fetched_from_elsewhere_and_its_node_is_asked_to_look() -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(300_000), ERASURE, "abcde")
        bad = NODES["a"], 0
        mesh.pieces[bad] = bytes(len(mesh.pieces[bad]))
        mesh.register = mesh.record
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(mesh.record)
        assert chunk.data == mesh.data
        assert NODES["a"] not in chunk.served
        assert [why for _, node, why in fetcher.failures if node == NODES["a"]] == [
            "piece 0 of chunk 4 is damaged"
        ]
        assert mesh.doubted == [bad]

    asyncio.run(run())


@pytest.mark.parametrize("size", [1_000_001, 8 << 20])
@pytest.mark.parametrize("spoilt", ["a", "b", "c", "ab", "bc"])
def test_of_several_that_gave_of_a_damaged_piece_the_one_that_has_it_damaged_is_found(
    spoilt: str, size: int
) -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(size), REPLICATED, "abc")
        bad = {NODES[letter] for letter in spoilt}
        for node in bad:
            mesh.pieces[node, 0] = bytes(size)
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(mesh.record)
        assert chunk.data == mesh.data
        assert not bad & chunk.served.keys()
        assert len(chunk.served) == 1
        assert mesh.reads == 0, "no holder was given up that is in order"
        blamed = {node for _, node, why in fetcher.failures if why == "piece 0 of chunk 4 is damaged"}
        assert blamed <= bad
        assert {node for node, _ in mesh.doubted} >= bad

    asyncio.run(run())


@pytest.mark.parametrize(("scheme", "holders"), [(ERASURE, "abcde"), (REPLICATED, "abc")])
def test_what_need_not_be_decoded_is_not_copied(scheme: Scheme, holders: str) -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(1_000_001), scheme, holders)
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(mesh.record)
        assert all(isinstance(part, memoryview) for part in chunk.parts)
        assert b"".join(chunk.parts) == mesh.data

    asyncio.run(run())


def test_damage_in_the_padding_of_a_fragment_does_no_harm_to_the_chunk() -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(1000), ERASURE, "abc")  # without the last fragment there would be too few
        mesh.pieces[NODES["c"], 2] = mesh.pieces[NODES["c"], 2][:-1] + b"x"
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(mesh.record)
        assert chunk.data == mesh.data

    asyncio.run(run())


def test_pieces_that_are_as_stored_but_make_another_chunk_are_damage() -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(1000), ERASURE, "abcde")
        entry = ChunkEntry(4, 0, 10, 1000, digest(b"something else"))
        async with fetcher_of(mesh) as fetcher:
            with pytest.raises(DamagedData):
                await fetcher.fetch(ChunkRecord(entry, ERASURE, mesh.record.places))

    asyncio.run(run())


def test_pieces_that_have_moved_are_found_through_the_register() -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(1000), REPLICATED, "abc")
        before = mesh.record
        mesh.pieces.clear()
        mesh.register = mesh.stored(REPLICATED, "def")
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(before)
        assert chunk.data == mesh.data
        assert mesh.reads == 1

    asyncio.run(run())


@pytest.mark.parametrize(("first", "then"), [(ERASURE, REPLICATED), (REPLICATED, ERASURE)])
def test_a_chunk_whose_redundancy_changes_while_it_is_read_comes_out_whole(
    first: Scheme, then: Scheme
) -> None:
    """Some blocks of the old pieces are here, and bear the numbers and offsets of new ones."""

    async def run() -> None:
        mesh = FakeMesh(noise(900_000), first, "abcde"[: first.m])
        old = mesh.record
        served = 0

        async def switch(node: str) -> None:
            nonlocal served
            served += 1
            if served == 6:
                mesh.pieces.clear()
                mesh.register = mesh.stored(then, "fedcb"[: then.m])
            await asyncio.sleep(0)

        mesh.before = switch
        async with fetcher_of(mesh) as fetcher:
            chunk = await fetcher.fetch(old)
        assert chunk.data == mesh.data
        assert mesh.reads >= 1
        assert not [why for _, _, why in fetcher.failures if "damaged" in why]

    asyncio.run(run())


def test_a_chunk_that_is_fetched_again_does_not_lose_what_was_under_way_for_the_first_time() -> None:
    """A seek away and back: the old answers arrive while the new requests are out."""

    async def run() -> None:
        mesh = FakeMesh(noise(50_000), REPLICATED, "abc")
        gates = [asyncio.Event(), asyncio.Event()]
        seen = 0

        async def wait(node: str) -> None:
            nonlocal seen
            seen += 1
            await gates[min(seen, 2) - 1].wait()

        mesh.before = wait
        async with fetcher_of(mesh) as fetcher:
            first = asyncio.create_task(fetcher.fetch(mesh.record))
            while seen < 1:
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            again = asyncio.create_task(fetcher.fetch(mesh.record))
            while seen < 2:
                await asyncio.sleep(0)
            gates[0].set()
            while fetcher.bytes_received == 0:
                await asyncio.sleep(0)
            gates[1].set()
            chunk = await again
        assert chunk.data == mesh.data
        assert not fetcher.failures
        assert fetcher.bytes_wasted == 50_000

    asyncio.run(run())


def test_nodes_that_refuse_connections_are_not_asked_without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(1000), ERASURE, "abcde")

        async def refuse(node: str) -> None:
            if node in (NODES["a"], NODES["b"], NODES["c"]):
                raise NoAnswer("nobody answers there")

        mesh.before = refuse
        monkeypatch.setattr(fetching, "PATIENCE", 1.2)
        async with fetcher_of(mesh) as fetcher:
            with pytest.raises(
                MeshUnavailable, match=r"chunk 4 .* it takes 3 of its 5 pieces.*nobody answers"
            ):
                await fetcher.fetch(mesh.record)
        assert len(mesh.requests) < 30

    asyncio.run(run())


def test_a_chunk_that_only_waits_its_turn_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        mesh = FakeMesh(noise(700_000), REPLICATED, "abc")
        for key in list(mesh.pieces):
            if key[0] != NODES["a"]:
                del mesh.pieces[key]
        one_at_a_time = asyncio.Lock()

        async def serve(node: str) -> None:
            async with one_at_a_time:
                await asyncio.sleep(0.08)

        mesh.before = serve
        monkeypatch.setattr(fetching, "PATIENCE", 0.4)
        later = msgspec.structs.replace(mesh.record.entry, index=5)
        async with fetcher_of(mesh) as fetcher:
            chunks = await asyncio.gather(
                fetcher.fetch(mesh.record, within=1.0),
                fetcher.fetch(msgspec.structs.replace(mesh.record, entry=later), within=9.0),
            )
        assert [c.data for c in chunks] == [mesh.data] * 2
        assert chunks[1].seconds > 2 * 0.4

    asyncio.run(run())


def test_a_chunk_that_nobody_has_any_more_is_an_error_after_a_few_looks_at_the_register(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = asyncio.sleep

    async def run() -> None:
        mesh = FakeMesh(noise(1000), REPLICATED, "abc")
        mesh.pieces.clear()
        monkeypatch.setattr("vstack.client.fetcher.asyncio.sleep", lambda _: real(0))
        async with fetcher_of(mesh) as fetcher:
            with pytest.raises(MeshUnavailable, match="no such piece"):
                await fetcher.fetch(mesh.record)
        assert mesh.reads == 5

    asyncio.run(run())
