"""What a node says of the pieces it holds: inventories, usage, why pieces are written, and what it remembers
of having verified them."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import running_mesh, wait_for, with_client
from tests.store_helpers import FailingDisk, key_of, open_store, piece_of
from vstack.mesh.changes import DrainMember
from vstack.mesh.dialer import Refused
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import (
    MAX_INVENTORY,
    Body,
    Failure,
    GetInventory,
    GetPiece,
    Hello,
    Inventory,
    PieceData,
    PutPiece,
    Stored,
    UsageRow,
    WirePieceKey,
)
from vstack.mesh.registers import PieceKey, Scheme
from vstack.mesh.sockets import Lane, Wakeup
from vstack.mesh.transport import Incoming, Session
from vstack.node import workers
from vstack.node.scrub import Verified
from vstack.node.store import ChunkStore, Piece, Purpose, PutResult
from vstack.node.superblock import RECORD_HEADER_BYTES, record_size
from vstack.node.workers import PieceWorkers

VIDEOS = [f"{n:02x}" * 32 for n in range(1, 9)]


def wire(key: PieceKey) -> WirePieceKey:
    return WirePieceKey(key.video, key.upload, key.chunk, key.piece, key.generation)


def put(piece: Piece, purpose: str = "upload") -> PutPiece:
    return PutPiece(wire(piece.key), piece.k, piece.m, piece.chunk_length, piece.sha256, purpose)


def flip_payload(folder: Path, store: ChunkStore, key: PieceKey) -> None:
    """One bit of the first byte of the payload."""
    row = store._index.piece(key.pack())
    assert row is not None
    with (folder / "superblocks" / f"{row.superblock:010d}.vsb").open("r+b") as file:
        file.seek(row.offset + RECORD_HEADER_BYTES)
        byte = file.read(1)[0]
        file.seek(row.offset + RECORD_HEADER_BYTES)
        file.write(bytes([byte ^ 1]))


# What was verified when


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_piece_counts_as_verified_for_so_long_and_no_longer() -> None:
    clock = Clock()
    verified = Verified(10, clock)
    assert not verified.is_within(1, 1e9)
    verified.note(1)
    clock.now += 10
    assert verified.is_within(1, 10.1)
    assert not verified.is_within(1, 10)
    verified.note(1)
    assert verified.is_within(1, 1)
    assert not verified.is_within(1, 0)


def test_what_was_verified_longest_ago_is_forgotten_first() -> None:
    verified = Verified(3, Clock())
    for sequence in (1, 2, 3, 1, 4, 5):
        verified.note(sequence)
    assert [n for n in range(6) if verified.is_within(n, 1)] == [1, 4, 5]


class CountingStore:
    """A store of pieces 0 to 9, and how often `verify` read one."""

    def __init__(self, folder: Path, disk: FailingDisk | None = None) -> None:
        self.folder = folder
        self.store = open_store(folder, disk)
        self.clock = Clock()
        self.store._verified = Verified(now=self.clock)
        self.reads: list[PieceKey] = []
        whole = self.store.verify

        def verify(key: PieceKey) -> object:
            self.reads.append(key)
            return whole(key)

        self.store.verify = verify  # type: ignore[method-assign, assignment]
        self.store.put([piece_of(n, bytes([n]) * 1000) for n in range(10)])

    def states(self, within: float, *numbers: int) -> list[str]:
        """Of the inventory that reads what was not verified `within` seconds; `reads` is that inventory's."""
        self.reads.clear()
        keys = [key_of(n) for n in numbers]
        return [h.state for h in self.store.inventory(keys, verify=True, within=within)]


def test_what_was_just_written_is_not_read_again(tmp_path: Path) -> None:
    s = CountingStore(tmp_path)
    s.clock.now += 5
    assert s.states(6, 0, 1) == ["present"] * 2
    assert s.reads == []
    assert s.states(5, 0, 1) == ["present"] * 2
    assert s.reads == [key_of(0), key_of(1)]
    s.clock.now += 3
    assert s.states(5, 0, 1, 2) == ["present"] * 3
    assert s.reads == [key_of(2)], "0 and 1 were read 3 s ago, 2 was written 8 s ago"
    s.store.close()


def test_an_inventory_with_no_time_to_spare_reads_everything(tmp_path: Path) -> None:
    s = CountingStore(tmp_path)
    assert s.states(0, *range(10)) == ["present"] * 10
    assert len(s.reads) == 10
    s.store.close()


def test_a_piece_that_rots_is_found_once_its_time_is_over_and_its_new_copy_counts_anew(
    tmp_path: Path,
) -> None:
    s = CountingStore(tmp_path)
    flip_payload(tmp_path, s.store, key_of(3))
    s.clock.now += 5
    assert s.states(6, 3) == ["present"], "so much is what the caller accepts"
    assert s.states(5, 3) == ["quarantined"]
    assert s.states(1000, 3) == ["quarantined"]
    s.store.put([piece_of(3, bytes([3]) * 1000)])
    s.clock.now += 1
    assert s.states(2, 3) == ["present"]
    assert s.reads == []
    s.store.close()


def test_what_the_scrub_has_read_counts_as_verified(tmp_path: Path) -> None:
    s = CountingStore(tmp_path)
    s.clock.now += 100
    while s.store.scrub.place.rounds == 0:
        s.store.scrub.run()
    assert s.states(50, *range(10)) == ["present"] * 10
    assert s.reads == []
    s.store.close()


def test_nothing_counts_as_verified_after_a_restart(tmp_path: Path) -> None:
    CountingStore(tmp_path).store.close()
    s = CountingStore(tmp_path)
    assert s.states(1e9, 0) == ["present"]
    assert s.reads == [key_of(0)]
    s.store.close()


# What the videos take


def test_usage_counts_pieces_payloads_and_records_by_video_and_scheme(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    rng = random.Random(5)
    expected: dict[tuple[str, int, int], list[int]] = {}
    pieces = []
    for n in range(300):
        video, (k, m) = rng.choice(VIDEOS), rng.choice([(1, 3), (3, 5), (4, 6)])
        piece = piece_of(n, rng.randbytes(rng.randrange(3000)), video=video)._replace(k=k, m=m)
        pieces.append(piece)
        row = expected.setdefault((video, k, m), [0, 0, 0])
        row[0] += 1
        row[1] += len(piece.payload)
        row[2] += record_size(len(piece.payload))
    store.put(pieces)
    all_rows = [UsageRow(*key, *figures) for key, figures in sorted(expected.items())]
    assert store.usage() == (all_rows, "")
    stats = store.stats()
    assert sum(row.record_bytes for row in all_rows) == stats.live_bytes
    assert sum(row.payload_bytes for row in all_rows) == stats.payload_bytes
    store.close()


@pytest.mark.parametrize(("rows", "pieces"), [(1, 10_000), (2, 10_000), (10_000, 1), (10_000, 7), (3, 5)])
def test_pages_of_usage_are_whole_videos_and_join_to_the_whole(
    tmp_path: Path, rows: int, pieces: int
) -> None:
    store = open_store(tmp_path)
    rng = random.Random(rows * 31 + pieces)
    store.put(
        [
            piece_of(n, video=rng.choice(VIDEOS[:6]))._replace(k=k, m=3)
            for n, k in ((n, rng.choice((1, 2))) for n in range(60))
        ]
    )
    whole, _ = store.usage()
    joined: list[UsageRow] = []
    after, pages = "", 0
    while True:
        page, after = store.usage(after, rows=rows, pieces=pieces)
        assert not {row.video for row in page} & {row.video for row in joined}
        joined += page
        pages += 1
        if not after:
            break
        assert page[-1].video == after
    assert joined == whole
    assert pages > 1
    store.close()


def test_an_empty_store_uses_nothing_and_quarantine_is_not_counted(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.usage() == ([], "")
    store.put([piece_of(n, b"x" * 100) for n in range(3)])
    flip_payload(tmp_path, store, key_of(1))
    store.inventory([key_of(1)], verify=True)
    ((row,), after) = store.usage()
    assert (row.pieces, row.payload_bytes, after) == (2, 200, "")
    store.close()


# The threads


class Desk:
    """Workers over a store of their own, without a socket."""

    def __init__(self, folder: Path, disk: FailingDisk | None = None) -> None:
        self.folder = folder
        self.store = open_store(folder, disk)
        self.clock = Clock()
        self.session = Session(b"x", Lane.DATA, Hello(1, "", "client"), 0.0)
        self.wakeup = Wakeup()
        self.workers = PieceWorkers(self.store, self.wakeup, self.clock)
        self.numbers = 0

    def submit(self, body: Body, payload: bytes | memoryview = b"", seconds: float = 60.0) -> bytes:
        """The correlation id of the request."""
        self.numbers += 1
        number = self.numbers.to_bytes(8, "big")
        deadline = self.clock.now + seconds
        self.workers.submit(Incoming(self.session, number, body, memoryview(payload), deadline))
        return number

    def answers(self, *numbers: bytes) -> list[Body]:
        """To these requests, in the order in which they came; waits for all of them."""
        found: list[tuple[bytes, Body]] = []

        def all_there() -> bool:
            found.extend((d.request.correlation, d.body) for d in self.workers.take_done())
            return set(numbers) <= {number for number, _ in found}

        wait_for(all_there)
        return [body for number, body in found if number in numbers]

    def ask(self, body: Body, payload: bytes | memoryview = b"", seconds: float = 60.0) -> Body:
        return self.answers(self.submit(body, payload, seconds))[0]

    def close(self) -> None:
        self.workers.close()
        self.store.close()
        self.wakeup.close()


def states(answer: Body) -> list[str]:
    assert isinstance(answer, Inventory), answer
    return [held.state for held in answer.held]


def test_an_inventory_is_answered_in_order_and_tells_hashes(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    pieces = [piece_of(n, bytes([n]) * 100) for n in range(3)]
    for piece in pieces:
        assert desk.ask(put(piece), piece.payload) == Stored(False)
    flip_payload(tmp_path, desk.store, key_of(1))
    keys = tuple(wire(key_of(n)) for n in (2, 7, 1))
    assert states(desk.ask(GetInventory(keys))) == ["present", "absent", "present"]
    assert states(desk.ask(GetInventory(keys, 3600))) == ["present", "absent", "present"]
    answer = desk.ask(GetInventory(keys, 0))
    assert states(answer) == ["present", "absent", "quarantined"]
    assert isinstance(answer, Inventory)
    assert [h.sha256 for h in answer.held] == [pieces[2].sha256, b"", pieces[1].sha256]
    desk.close()


def test_a_disk_that_cannot_be_read_is_no_word_on_the_piece(tmp_path: Path) -> None:
    disk = FailingDisk()
    desk = Desk(tmp_path, disk)
    desk.store.put([piece_of(0, b"whole")])
    disk.errors["read"] = errno.EIO
    answer = desk.ask(GetInventory((wire(key_of(0)),), 0))
    assert isinstance(answer, Failure)
    assert answer.code == "io"
    disk.errors.clear()
    assert states(desk.ask(GetInventory((wire(key_of(0)),), 0))) == ["present"]
    desk.close()


def held_up(
    monkeypatch: pytest.MonkeyPatch, store: ChunkStore, name: str
) -> tuple[threading.Event, threading.Event]:
    """The first call of that method of the store waits: (it has begun, it may go on)."""
    begun, go_on = threading.Event(), threading.Event()
    method: Callable[..., object] = getattr(store, name)

    def waits(*args: object, **options: object) -> object:
        begun.set()
        assert go_on.wait(30)
        return method(*args, **options)

    monkeypatch.setattr(store, name, waits)
    return begun, go_on


def test_pieces_are_read_while_an_inventory_is_being_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    desk.store.put([piece_of(n, b"x" * 100) for n in range(2)])
    begun, go_on = held_up(monkeypatch, desk.store, "verify")
    inventories = [desk.submit(GetInventory((wire(key_of(0)),), 0)) for _ in range(5)]
    assert begun.wait(30)
    answer = desk.ask(GetPiece(wire(key_of(1)), 0, 100))
    assert isinstance(answer, PieceData), "all readers are free, however many inventories wait"
    go_on.set()
    assert [states(a) for a in desk.answers(*inventories)] == [["present"]] * 5
    desk.close()


def test_an_inventory_waits_for_those_who_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The readers are held up with a read waiting: the inventory does not read meanwhile."""
    monkeypatch.setattr(workers, "YIELD", 1e9)
    desk = Desk(tmp_path)
    desk.store.put([piece_of(n, b"x" * 100) for n in range(2)])
    begun, go_on = held_up(monkeypatch, desk.store, "read")
    reads = [desk.submit(GetPiece(wire(key_of(1)), 0, 100)) for _ in range(3)]
    assert begun.wait(30)
    inventory = desk.submit(GetInventory((wire(key_of(0)),), 0))
    wait_for(lambda: not desk.workers._surveys)
    assert desk.workers.take_done() == []
    go_on.set()
    told = desk.answers(*reads, inventory)
    assert isinstance(told[0], PieceData)
    assert Inventory in [type(a) for a in told]
    desk.close()


def test_under_constant_load_an_inventory_gets_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    desk.store.put([piece_of(n, b"x" * 100) for n in range(2)])
    begun, go_on = held_up(monkeypatch, desk.store, "read")
    reads = [desk.submit(GetPiece(wire(key_of(1)), 0, 100)) for _ in range(3)]
    assert begun.wait(30)
    inventory = desk.submit(GetInventory((wire(key_of(0)),), 0))
    wait_for(lambda: not desk.workers._surveys)
    desk.clock.now += workers.YIELD
    assert states(desk.answers(inventory)[0]) == ["present"], "a read waits still"
    go_on.set()
    desk.answers(*reads)
    desk.close()


def test_an_inventory_that_runs_out_of_time_says_so_and_has_not_read_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    desk.store.put([piece_of(n, b"x" * 100) for n in range(3)])
    desk.store._verified = Verified(now=desk.clock)
    read = []
    whole = desk.store.verify

    def slow(key: PieceKey) -> object:
        desk.clock.now += 10
        read.append(key)
        return whole(key)

    monkeypatch.setattr(desk.store, "verify", slow)
    question = GetInventory(tuple(wire(key_of(n)) for n in range(3)), 3600)
    late = desk.ask(question, seconds=15)
    assert isinstance(late, Failure)
    assert late.code == "late"
    assert read == [key_of(0), key_of(1)]
    assert states(desk.ask(question, seconds=15)) == ["present"] * 3
    assert read == [key_of(0), key_of(1), key_of(2)]
    desk.close()


def test_closing_does_not_wait_for_an_inventory_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    desk.store.put([piece_of(n, b"x" * 100) for n in range(3)])
    begun, go_on = held_up(monkeypatch, desk.store, "verify")
    desk.submit(GetInventory(tuple(wire(key_of(n)) for n in range(3)), 0))
    assert begun.wait(30)
    closing = threading.Thread(target=desk.close)
    closing.start()
    wait_for(lambda: desk.workers._closing)
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    assert desk.workers.take_done() == []


def test_what_a_piece_is_written_for_reaches_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that wait together and are for different purposes: each is stored for its own."""
    desk = Desk(tmp_path)
    told: list[tuple[Purpose, list[int]]] = []
    begun, go_on = threading.Event(), threading.Event()
    whole = desk.store.put

    def seen(pieces: list[Piece], *, purpose: Purpose) -> list[PutResult]:
        begun.set()
        assert go_on.wait(30)
        told.append((purpose, [p.key.chunk for p in pieces]))
        return whole(pieces, purpose=purpose)

    monkeypatch.setattr(desk.store, "put", seen)
    pieces = [piece_of(n, bytes([n])) for n in range(6)]
    numbers = [desk.submit(put(pieces[0]), pieces[0].payload)]
    assert begun.wait(30)
    purposes = ("repair", "demotion", "upload", "repair", "upload")
    bad = desk.submit(put(pieces[1], "repair"), b"other bytes")
    numbers += [
        desk.submit(put(p, purpose), p.payload) for p, purpose in zip(pieces[1:], purposes, strict=True)
    ]
    go_on.set()
    answers = desk.answers(*numbers, bad)
    assert answers.count(Stored(False)) == 6
    assert [a.code for a in answers if isinstance(a, Failure)] == ["refused"], "each has its own answer"
    assert told == [
        (Purpose.UPLOAD, [0]),
        (Purpose.REPAIR, [1, 1, 4]),
        (Purpose.DEMOTION, [2]),
        (Purpose.UPLOAD, [3, 5]),
    ]
    desk.close()


# Over the wire


async def write(mesh: MeshClient, node: str, count: int, video: str = VIDEOS[0]) -> list[Piece]:
    pieces = [piece_of(n, f"{video} {n}".encode() * 20, video=video) for n in range(count)]
    for p in pieces:
        await mesh.put_piece(
            node, p.key, Scheme(p.k, p.m), p.chunk_length, p.sha256, p.payload, purpose="repair"
        )
    return pieces


@pytest.mark.processes
def test_a_client_takes_an_inventory_of_more_pieces_than_fit_one_message(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        node = mesh.members[0].node
        pieces = await write(mesh, node, 70)
        keys = [p.key for p in pieces] + [key_of(n, video=VIDEOS[1]) for n in range(MAX_INVENTORY)]
        for within in (None, 0, 3600):
            held = await mesh.inventory(node, keys, verified_within=within)
            assert [h.state for h in held] == ["present"] * 70 + ["absent"] * MAX_INVENTORY
            assert [h.sha256 for h in held[:70]] == [p.sha256 for p in pieces]
        assert await mesh.inventory(node, []) == []

    with running_mesh(tmp_path, 1) as mesh:
        with_client(mesh, work)


@pytest.mark.processes
def test_a_client_sees_what_each_video_takes_on_each_node(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        nodes = [m.node for m in mesh.members]
        await asyncio.gather(*(write(mesh, nodes[0], n + 1, video) for n, video in enumerate(VIDEOS)))
        rows = await mesh.usage(nodes[0])
        assert [(row.video, row.k, row.m, row.pieces) for row in rows] == [
            (video, 3, 5, n + 1) for n, video in enumerate(VIDEOS)
        ]
        said = await mesh.status(nodes[0])
        assert sum(row.payload_bytes for row in rows) == said.store["payload_bytes"]
        assert sum(row.record_bytes for row in rows) == said.store["live_bytes"]
        assert await mesh.usage(nodes[1]) == []

    with running_mesh(tmp_path, 2) as mesh:
        with_client(mesh, work)


@pytest.mark.processes
def test_a_draining_node_takes_no_pieces_and_still_serves_those_it_has(tmp_path: Path) -> None:
    async def work(mesh: MeshClient) -> None:
        node = mesh.members[0].node
        (piece,) = await write(mesh, node, 1)
        await mesh.change_mesh(DrainMember(node))
        with pytest.raises(Refused, match="draining") as refused:
            await write(mesh, node, 2)
        assert refused.value.code == "refused"
        (held,) = await mesh.inventory(node, [piece.key], verified_within=0)
        assert held.state == "present"
        data, _ = await mesh.get_range(node, piece.key, 0, len(piece.payload), timeout=10)
        assert data == piece.payload
        await write(mesh, mesh.members[1].node, 1)
        await mesh.change_mesh(DrainMember(node, draining=False))
        await write(mesh, node, 2)

    with running_mesh(tmp_path, 3) as mesh:
        with_client(mesh, work)
