"""Views are counted at most once, by any nodes at the same time, and none is lost while nodes live."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from vstack.client import catalogue
from vstack.client.player import PlayOptions, play
from vstack.client.uploader import upload
from vstack.local import LocalMesh, LocalNode
from vstack.mesh.config import Config, Member, View, group
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import ABSENT, Found, Ok, Op, Outcome, Unknown, Value
from vstack.mesh.paxos.change import apply
from vstack.mesh.registers import (
    EPOCH_SHIFT,
    MAX_RECORD,
    RecordTooLarge,
    Slot,
    ViewRecord,
    pack,
    unpack_views,
    video_key,
    views_key,
)
from vstack.node import views as counting
from vstack.node.views import BATCH, MAX_OLD_BOOTS, PERIOD, Views, packed, raised
from vstack.samples import make_sample

from .cluster import running_mesh, vstack, wait_for, with_client

VIDEO = "ab" * 32
OTHER = "cd" * 32
DAY = 20_000
A, B = "a" * 32, "b" * 32
RAW_A, RAW_B = bytes.fromhex(A), bytes.fromhex(B)
VIEW = View((Config(1, (Member(A, "a:1"), Member(B, "b:1")), 1),))
KEY = views_key(VIDEO, DAY)
SECONDS = 4
"""Length of the film."""


class Registers:
    """What a mesh that never fails would hold, by the real change function."""

    def __init__(self, *videos: str) -> None:
        self.values: dict[str, Value] = {video_key(v): Value(1, b"a film") for v in videos}
        self.changes = 0

    def do(self, op: Op) -> Outcome:
        before = self.values.get(op.key, ABSENT)
        self.values[op.key], outcome = apply(op, before, 1)
        self.changes += self.values[op.key] is not before
        return outcome

    def record(self, key: str = KEY) -> ViewRecord:
        data = self.values.get(key, ABSENT).data
        return ViewRecord() if data is None else unpack_views(data)

    def total(self, key: str = KEY) -> int:
        return self.record(key).total


def views(node: str = A, boot: int = 1) -> Views:
    return Views(node, boot, VIEW, Random(f"{node} {boot}"))


def playback(number: int) -> bytes:
    return number.to_bytes(16)


def note(v: Views, count: int, now: float, *, first: int = 0, video: str = VIDEO) -> None:
    for i in range(count):
        assert v.note(video, playback(first + i), DAY, now)


def write(v: Views, mesh: Registers, now: float) -> int:
    """Lets `v` write what is due, every operation with its outcome at once; how many that were."""
    done = 0
    v.tick(now)
    while ready := v.take():
        for key, op in ready:
            v.on_outcome(key, mesh.do(op), now)
            done += 1
    return done


def one_step(v: Views, mesh: Registers, now: float) -> None:
    """One operation, with its outcome."""
    v.tick(now)
    ((key, op),) = v.take()
    v.on_outcome(key, mesh.do(op), now)


# -- noting ---------------------------------------------------------------------------------------


def test_views_are_written_together_a_period_after_the_first() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 3, 0.0)
    assert write(v, mesh, PERIOD - 0.01) == 0
    note(v, 1, PERIOD - 0.01, first=3)
    assert write(v, mesh, PERIOD) == 3, "a read, a look whether there is such a video, and one change"
    assert mesh.record() == ViewRecord((Slot(RAW_A, 1, 4),))
    assert v.unwritten == 0


def test_many_views_do_not_wait_for_the_period() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, BATCH - 1, 0.0)
    assert write(v, mesh, 0.1) == 0
    note(v, 1, 0.1, first=BATCH)
    write(v, mesh, 0.1)
    assert mesh.total() == BATCH


def test_after_an_early_write_the_next_views_wait_for_a_period_of_their_own() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, BATCH, 0.0)
    write(v, mesh, 0.1)
    note(v, 1, PERIOD - 1, first=BATCH)
    assert write(v, mesh, PERIOD) == 0
    assert write(v, mesh, 2 * PERIOD - 1) == 2


def test_nothing_waits_when_the_process_is_to_end() -> None:
    v, mesh = views(), Registers(VIDEO, OTHER)
    note(v, 2, 0.0)
    note(v, 3, 0.0, first=10, video=OTHER)
    v.hurry(0.1)
    write(v, mesh, 0.1)
    assert (mesh.total(), mesh.total(views_key(OTHER, DAY)), v.unwritten) == (2, 3, 0)


def test_a_playback_counts_once_before_and_after_it_is_written() -> None:
    v, mesh = views(), Registers(VIDEO)
    for now in (0.0, 1.0, 2 * PERIOD):
        assert v.note(VIDEO, playback(7), DAY, now)
        write(v, mesh, now)
    assert v.note(VIDEO, playback(7), DAY + 1, 3 * PERIOD), "not on the next day either"
    write(v, mesh, 9 * PERIOD)
    assert mesh.total() == 1
    assert mesh.total(views_key(VIDEO, DAY + 1)) == 0
    assert (v.counters["counted"], v.counters["written"], v.counters["repeated"]) == (1, 1, 3)


def test_each_day_has_a_register_of_its_own() -> None:
    v, mesh = views(), Registers(VIDEO)
    for i, day in enumerate((DAY, DAY + 1, DAY + 1)):
        assert v.note(VIDEO, playback(i), day, 0.0)
    write(v, mesh, PERIOD)
    assert (mesh.total(), mesh.total(views_key(VIDEO, DAY + 1))) == (1, 2)


def test_later_views_are_added_to_those_written_before() -> None:
    v, mesh = views(), Registers(VIDEO)
    for turn in range(5):
        note(v, 3, turn * 10.0, first=turn * 10)
        write(v, mesh, turn * 10.0 + PERIOD)
    assert mesh.record() == ViewRecord((Slot(RAW_A, 1, 15),))


def test_views_noted_while_a_write_is_under_way_are_written_next() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 1, 0.0)
    v.tick(PERIOD)
    for _ in range(2):
        ((key, op),) = v.take()
        v.on_outcome(key, mesh.do(op), PERIOD)
    ((key, op),) = v.take()
    assert op.expect == 0
    note(v, 2, PERIOD, first=1)
    v.on_outcome(key, mesh.do(op), PERIOD)
    assert (mesh.total(), v.unwritten) == (1, 2)
    write(v, mesh, 2 * PERIOD)
    assert (mesh.total(), v.unwritten) == (3, 0)


# -- doubtful outcomes ----------------------------------------------------------------------------


@pytest.mark.parametrize("happened", [False, True])
def test_a_change_whose_outcome_is_unknown_is_made_again_and_counts_once(happened: bool) -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 4, 0.0)
    one_step(v, mesh, PERIOD)
    one_step(v, mesh, PERIOD)
    ((key, op),) = v.take()
    if happened:
        mesh.do(op)
    v.on_outcome(key, Unknown("no majority answered in time"), PERIOD)
    assert v.unwritten == 4
    assert write(v, mesh, PERIOD + 0.1) == 0, "not at once"
    write(v, mesh, 2 * PERIOD)
    assert (mesh.total(), v.unwritten, v.counters["written"]) == (4, 0, 4)
    mesh.do(op)
    assert mesh.total() == 4, "late copies of the first try change nothing"


def test_views_that_come_after_a_doubtful_change_are_added_to_it_whether_it_happened_or_not() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 4, 0.0)
    one_step(v, mesh, PERIOD)
    one_step(v, mesh, PERIOD)
    ((key, op),) = v.take()
    mesh.do(op)
    v.on_outcome(key, Unknown("?"), PERIOD)
    note(v, 3, PERIOD, first=10)
    write(v, mesh, 2 * PERIOD)
    assert mesh.total() == 7


def test_a_mismatch_is_tried_again_at_once_with_what_the_register_holds() -> None:
    v, w, mesh = views(A), views(B), Registers(VIDEO)
    note(v, 2, 0.0)
    note(w, 5, 0.0)
    for each in (v, w):
        one_step(each, mesh, PERIOD)
        one_step(each, mesh, PERIOD)
    ((key_v, op_v),), ((key_w, op_w),) = v.take(), w.take()
    w.on_outcome(key_w, mesh.do(op_w), PERIOD)
    v.on_outcome(key_v, mesh.do(op_v), PERIOD)
    assert write(v, mesh, PERIOD) == 1
    assert mesh.record() == ViewRecord((Slot(RAW_A, 1, 2), Slot(RAW_B, 1, 5)))


def test_a_repeated_playback_at_another_node_counts_again_which_is_why_nobody_sends_it() -> None:
    v, w, mesh = views(A), views(B), Registers(VIDEO)
    note(v, 1, 0.0)
    note(w, 1, 0.0)
    write(v, mesh, PERIOD)
    write(w, mesh, PERIOD)
    assert mesh.total() == 2


def test_a_new_process_of_the_same_node_raises_a_slot_of_its_own() -> None:
    mesh = Registers(VIDEO)
    for boot in (1, 2):
        v = views(boot=boot)
        note(v, 3, 0.0)
        write(v, mesh, PERIOD)
    assert mesh.record() == ViewRecord((Slot(RAW_A, 1, 3), Slot(RAW_A, 2, 3)))


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_to_operations_no_view_counts_twice_and_only_a_death_loses_any(seed: int) -> None:
    """Two nodes; outcomes come late, out of order or never; changes happen late or not at all; processes
    die with operations on their way."""
    rng = Random(seed)
    mesh = Registers(VIDEO)
    boots = {A: 1, B: 1}
    alive = {n: views(n, 1) for n in boots}
    waiting: list[tuple[Views, str, Op]] = []
    """Submitted; without an outcome."""
    lost_track: list[Op] = []
    """Reported as unknown, and may still happen."""
    noted = lost = 0
    now = 0.0

    def settle(v: Views, key: str, op: Op) -> None:
        fate = rng.random()
        if fate < 0.6:
            v.on_outcome(key, mesh.do(op), now)
        elif fate < 0.8:
            lost_track.append(op)
            v.on_outcome(key, Unknown("?"), now)
        else:
            mesh.do(op)
            v.on_outcome(key, Unknown("?"), now)

    for _ in range(400):
        now += rng.uniform(0, 2)
        node = rng.choice((A, B))
        v = alive[node]
        what = rng.random()
        if what < 0.3:
            count = rng.choice((1, 2, BATCH))
            for _ in range(count):
                assert v.note(VIDEO, rng.randbytes(16), DAY, now)
            noted += count
        elif what < 0.5:
            v.tick(now)
            waiting += [(v, key, op) for key, op in v.take()]
        elif what < 0.9 and waiting:
            settle(*waiting.pop(rng.randrange(len(waiting))))
        elif what < 0.93 and lost_track:
            mesh.do(lost_track.pop(rng.randrange(len(lost_track))))
        elif what < 0.96:
            lost += v.unwritten
            lost_track += [op for w, _, op in waiting if w is v]
            waiting = [x for x in waiting if x[0] is not v]
            boots[node] += 1
            alive[node] = views(node, boots[node])
        assert mesh.total() <= noted
    while lost_track or waiting or any(v.unwritten for v in alive.values()):
        now += PERIOD
        for op in lost_track:
            mesh.do(op)
        lost_track = []
        for v in alive.values():
            v.tick(now)
            waiting += [(v, key, op) for key, op in v.take()]
        done, waiting = waiting, []
        for v, key, op in done:
            v.on_outcome(key, mesh.do(op), now)
    assert noted - lost <= mesh.total() <= noted
    assert lost == 0 or boots != {A: 1, B: 1}


# -- bounds ---------------------------------------------------------------------------------------


def test_slots_of_ended_processes_become_one_when_there_are_many() -> None:
    mesh = Registers(VIDEO)
    others = views(B, 9)
    note(others, 7, 0.0)
    write(others, mesh, PERIOD)
    for boot in range(1, 30):
        v = views(boot=boot)
        note(v, boot, 0.0, first=1000 * boot)
        write(v, mesh, PERIOD)
        record = mesh.record()
        assert record.total == 7 + sum(range(boot + 1))
        assert record.of(RAW_A, boot) == boot
        assert record.of(RAW_B, 9) == 7
        assert len(record.slots) <= MAX_OLD_BOOTS + 3


def test_a_change_of_an_ended_process_that_comes_after_its_slot_was_folded_does_nothing() -> None:
    mesh = Registers(VIDEO)
    mesh.values[KEY] = Value(5, pack(ViewRecord(tuple(Slot(RAW_A, b, 1) for b in range(1, 5)))))
    dead = views(boot=5)
    note(dead, 2, 0.0)
    one_step(dead, mesh, PERIOD)
    ((_, late),) = dead.take()
    v = views(boot=6)
    note(v, 3, 0.0)
    write(v, mesh, PERIOD)
    again = views(boot=7)
    note(again, 3, 0.0)
    write(again, mesh, PERIOD)
    assert mesh.record().of(RAW_A, 0) > 0
    mesh.do(late)
    assert mesh.total() == 4 + 3 + 3


def test_a_record_that_gets_too_large_keeps_every_view_in_fewer_slots() -> None:
    nodes = [bytes([n]) * 16 for n in range(1, 120)]
    record = ViewRecord(tuple(Slot(n, b, 10**9) for n in nodes for b in (7, 8, 9)))
    with pytest.raises(RecordTooLarge):
        pack(record)
    with_mine = raised(record, RAW_A, 3, 5)
    data = packed(with_mine)
    assert len(data) <= MAX_RECORD
    assert unpack_views(data).total == record.total + 5
    assert {(s.node, s.boot) for s in unpack_views(data).slots} == {
        (RAW_A, 3),
        *((n, b) for n in nodes for b in (0, 9)),
    }


def as_full_as_can_be(spare: int = 0) -> ViewRecord:
    """A record with less than a slot's room, or with `spare` bytes and none more than that."""
    slots = 1
    while len(pack(full := ViewRecord(tuple(Slot(n.to_bytes(16), 1, 10**12) for n in range(slots))))) < (
        MAX_RECORD - spare - 28
    ):
        slots += 1
    left = MAX_RECORD - spare - len(pack(full))  # boots of 128 and more take a byte more each
    return ViewRecord(tuple(s._replace(boot=127 + (i < left)) for i, s in enumerate(full.slots)))


def test_where_not_even_that_fits_the_views_are_dropped_and_said_to_be() -> None:
    full = as_full_as_can_be()
    mesh = Registers(VIDEO)
    mesh.values[KEY] = Value(3, pack(full))
    with pytest.raises(RecordTooLarge):
        packed(raised(full, RAW_A, 1, 2))
    v = views()
    note(v, 2, 0.0)
    write(v, mesh, PERIOD)
    assert (v.unwritten, v.counters["dropped"]) == (0, 2)
    assert mesh.record() == full


def test_a_slot_is_never_lowered_by_views_that_follow_dropped_ones() -> None:
    """The change of the first two is still on its way when there is no room for a larger number."""
    full = as_full_as_can_be(spare=21)  # a slot of few views has room, and no more
    mesh = Registers(VIDEO)
    mesh.values[KEY] = Value(3, pack(full))
    v = views()
    note(v, 2, 0.0)
    one_step(v, mesh, PERIOD)
    ((key, late),) = v.take()
    v.on_outcome(key, Unknown("?"), PERIOD)
    note(v, 200, PERIOD, first=10)
    write(v, mesh, 2 * PERIOD)
    assert v.counters["dropped"] == 202
    note(v, 1, 2 * PERIOD, first=500)
    one_step(v, mesh, 3 * PERIOD)
    assert mesh.do(late) == Ok((1 << EPOCH_SHIFT) + 1)
    write(v, mesh, 3 * PERIOD)
    assert mesh.record().of(RAW_A, 1) == 2
    assert v.unwritten == 0


def test_a_register_that_cannot_be_understood_is_left_alone() -> None:
    mesh = Registers(VIDEO)
    mesh.values[KEY] = Value(3, b"of a newer version")
    v = views()
    note(v, 2, 0.0)
    write(v, mesh, PERIOD)
    assert mesh.values[KEY] == Value(3, b"of a newer version")
    assert (v.unwritten, v.counters["dropped"]) == (0, 2)


def test_a_video_that_the_mesh_does_not_have_gets_no_register() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 2, 0.0, video=OTHER)
    write(v, mesh, PERIOD)
    assert mesh.changes == 0
    assert (v.unwritten, v.counters["dropped"]) == (0, 2)


def test_whether_there_is_the_video_is_asked_again_if_nobody_knew() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 2, 0.0)
    one_step(v, mesh, PERIOD)
    ((key, op),) = v.take()
    assert (op.key, op.expect) == (video_key(VIDEO), None)
    v.on_outcome(key, Unknown("?"), PERIOD)
    write(v, mesh, 2 * PERIOD)
    assert mesh.total() == 2


def test_what_is_kept_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MAX_KEYS", 3)
    monkeypatch.setattr(counting, "MAX_PLAYBACKS", 2)
    v, mesh = views(), Registers(VIDEO, OTHER)
    for i in range(3):
        assert v.note(VIDEO, playback(i), DAY + i, 0.0)
    assert not v.note(OTHER, playback(9), DAY, 0.0)
    assert v.note(VIDEO, playback(3), DAY, 0.0), "a video that is being counted already takes no more room"
    write(v, mesh, PERIOD)
    assert v.note(OTHER, playback(9), DAY, PERIOD), "there is room again, and the refused one was not counted"
    assert v.note(VIDEO, playback(3), DAY, PERIOD)
    assert v.counters["repeated"] == 1
    assert v.note(VIDEO, playback(0), DAY, PERIOD), "forgotten: the oldest of more than two"
    assert v.counters["repeated"] == 1


def test_only_so_many_registers_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "WINDOW", 4)
    videos = [f"{n:064x}" for n in range(10)]
    v, mesh = views(), Registers(*videos)
    for i, video in enumerate(videos):
        assert v.note(video, playback(i), DAY, 0.0)
    v.tick(PERIOD)
    ready = v.take()
    assert len(ready) == 4
    for key, op in ready:
        v.on_outcome(key, Unknown("?") if op.expect is None else mesh.do(op), PERIOD)
    for turn in range(2, 9):
        write(v, mesh, turn * PERIOD)
    assert [mesh.total(views_key(video, DAY)) for video in videos] == [1] * 10


def test_reads_and_changes_are_born_in_the_epoch_that_the_node_is_in() -> None:
    v, mesh = views(), Registers(VIDEO)
    note(v, 1, 0.0)
    v.tick(PERIOD)
    ((key, op),) = v.take()
    assert (op.born, mesh.do(op)) == (1, Found(0, None))
    assert key == KEY


# -- real meshes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    make_sample(path, seconds=SECONDS, size=(160, 90))
    return path


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    with running_mesh(tmp_path / "mesh", 3) as running:
        yield running


def put(mesh: LocalMesh, film: Path) -> str:
    async def work(client: MeshClient) -> str:
        return (await upload(client, film)).video.id

    return with_client(mesh, work)


def seen(mesh: LocalMesh, video: str) -> int:
    async def work(client: MeshClient) -> int:
        return await catalogue.views(client, video)

    return with_client(mesh, work)


def see(mesh: LocalMesh, video: str, count: int) -> int:
    """Tells the mesh of `count` playbacks; of how many it took note."""

    async def work(client: MeshClient) -> int:
        told = [client.viewed(video, os.urandom(16)) for _ in range(count)]
        return sum(await asyncio.gather(*told))

    return with_client(mesh, work)


def counted(mesh: LocalMesh) -> dict[str, int]:
    """The counters of views of all nodes that run."""

    async def work(client: MeshClient) -> dict[str, int]:
        totals: dict[str, int] = {}
        for member in client.members:
            if any(n.alive and n.address == member.address for n in mesh.nodes):
                for name, value in (await client.status(member.node)).counters.items():
                    if name.startswith("views."):
                        totals[name] = totals.get(name, 0) + value
        return totals

    return with_client(mesh, work)


def first_of_group(mesh: LocalMesh, video: str) -> LocalNode:
    async def work(client: MeshClient) -> str:
        return group(client.config, video)[0]

    node = with_client(mesh, work)
    return next(n for n in mesh.nodes if n.node == node)


def restart(mesh: LocalMesh, node: LocalNode) -> None:
    node.start(mesh.peers, detach=False)
    node.wait_ready()


@pytest.mark.processes
def test_a_film_that_is_played_twice_has_two_views(mesh: LocalMesh, film: Path) -> None:
    video = put(mesh, film)
    peers = ",".join(mesh.peers)
    for _ in range(2):
        done = vstack("play", video, "--speed", "8", "--json", peers=peers)
        assert done.code == 0, done
        assert done.json["rebuffers"] == 0
    assert counted(mesh)["views.counted"] == 2
    wait_for(lambda: vstack("info", video, "--json", peers=peers).json["views"] == 2)
    wait_for(lambda: counted(mesh)["views.written"] == 2)
    assert "2 in the last 30 days" in vstack("info", video, peers=peers).out


@pytest.mark.processes
def test_it_counts_what_was_played_of_the_video_whatever_the_speed(mesh: LocalMesh, film: Path) -> None:
    video = put(mesh, film)

    async def played(client: MeshClient) -> None:
        options = PlayOptions(start=SECONDS * 0.6, speed=8, decode=False)
        await play(client, await catalogue.find_video(client, video), options)

    with_client(mesh, played)
    assert counted(mesh)["views.counted"] == 0, "less than half of it, although its end was reached"

    async def played_more(client: MeshClient) -> None:
        options = PlayOptions(start=SECONDS * 0.4, speed=8, decode=False)
        await play(client, await catalogue.find_video(client, video), options)

    with_client(mesh, played_more)
    wait_for(lambda: counted(mesh)["views.counted"] == 1)


@pytest.mark.processes
def test_a_playback_that_is_told_again_counts_once(mesh: LocalMesh, film: Path) -> None:
    video = put(mesh, film)

    async def again(client: MeshClient) -> list[bool]:
        playback = os.urandom(16)
        return [await client.viewed(video, playback) for _ in range(3)]

    assert with_client(mesh, again) == [True] * 3
    assert counted(mesh)["views.counted"] == 1
    wait_for(lambda: seen(mesh, video) == 1)


@pytest.mark.processes
def test_a_node_that_is_stopped_writes_what_it_has_noted(mesh: LocalMesh, film: Path) -> None:
    video = put(mesh, film)
    assert see(mesh, video, 9) == 9
    assert first_of_group(mesh, video).stop() == 0
    wait_for(lambda: seen(mesh, video) == 9)


@pytest.mark.processes
def test_a_killed_node_loses_only_what_it_had_not_written_and_nothing_counts_twice(
    mesh: LocalMesh, film: Path
) -> None:
    video = put(mesh, film)
    node = first_of_group(mesh, video)
    noted = see(mesh, video, 30)
    assert noted == 30
    wait_for(lambda: seen(mesh, video) == noted)
    unwritten = see(mesh, video, 7)
    node.kill()
    noted += unwritten
    elsewhere = see(mesh, video, 11)
    assert elsewhere == 11, "the next node of the group takes them"
    noted += elsewhere
    restart(mesh, node)
    again = see(mesh, video, 150)
    assert again == 150
    noted += again
    wait_for(lambda: (now := counted(mesh))["views.written"] == now["views.counted"])
    assert noted - unwritten <= seen(mesh, video) <= noted
    node.kill()
    assert noted - unwritten <= seen(mesh, video) <= noted


@pytest.mark.processes
def test_a_mesh_that_does_not_answer_takes_no_view_and_raises_nothing(mesh: LocalMesh, film: Path) -> None:
    video = put(mesh, film)

    async def told(client: MeshClient) -> bool:
        for node in mesh.nodes:
            node.kill()
        return await client.viewed(video, os.urandom(16))

    assert with_client(mesh, told) is False


@pytest.mark.processes
def test_views_of_what_the_mesh_does_not_have_make_no_register(mesh: LocalMesh, film: Path) -> None:
    video = put(mesh, film)
    assert see(mesh, "ee" * 32, 3) == 3, "noted; nothing is promised"
    assert see(mesh, video, 2) == 2
    wait_for(lambda: counted(mesh)["views.dropped"] == 3)
    wait_for(lambda: seen(mesh, video) == 2)

    async def registers(client: MeshClient) -> set[str]:
        return {row.key.split("/")[1] for row in (await client.list("views/")).rows}

    assert with_client(mesh, registers) == {video}
