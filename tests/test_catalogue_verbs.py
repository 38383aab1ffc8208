"""Delete and have back, pin, verify: the changes of a video that is there, as a user makes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from vstack.client.catalogue import (
    EDIT_TRIES,
    Video,
    chunk_table,
    delete_video,
    edit_video,
    find_video,
    list_videos,
    pin_video,
    read_video,
    undelete_video,
    verify_video,
)
from vstack.client.uploader import LostToAnother, Progress, UploadOptions, upload
from vstack.errors import BadInput, NotFound, VstackError
from vstack.local import LocalMesh
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.messages import Mismatch, Ok
from vstack.mesh.registers import (
    ChunkRecord,
    Place,
    VideoRecord,
    VideoState,
    chunk_key,
    pack,
    unpack_chunk,
    unpack_video,
    upload_id,
    video_key,
)
from vstack.samples import make_sample

from .cluster import Finished, running_mesh, vstack, with_client

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), 5) as mesh:
        yield mesh


@pytest.fixture
def film(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Another film for each test, under the test's own name: another video."""
    path = tmp_path / f"{request.node.name}.mp4"
    seed = sum(request.node.name.encode()) % 97
    make_sample(path, seconds=4, size=(160 + 2 * seed, 90))
    return path


@pytest.fixture
def title(mesh: LocalMesh, film: Path) -> str:
    """A video that is stored."""

    async def store(client: MeshClient) -> str:
        return (await upload(client, film)).video.record.title

    return with_client(mesh, store)


def run(mesh: LocalMesh, *words: str | Path) -> Finished:
    return vstack(*words, peers=",".join(mesh.peers))


def video_called(mesh: LocalMesh, title: str) -> Video:
    async def look(client: MeshClient) -> Video:
        found = [v for v in (await list_videos(client, hidden=True)).videos if v.record.title == title]
        assert len(found) == 1
        return found[0]

    return with_client(mesh, look)


def put_in_state(mesh: LocalMesh, title: str, state: VideoState, waited: int = 0) -> Video:
    """Writes that state into the video's register, as a node might."""

    async def write(client: MeshClient) -> Video:
        return await edit_video(client, video, lambda v: replace(v.record, state=state, waited=waited))

    video = video_called(mesh, title)
    return with_client(mesh, write)


# -- rm and undelete ------------------------------------------------------------------------------


@pytest.mark.parametrize("called", ["title", "prefix", "id"])
def test_what_was_deleted_is_had_back_by_any_of_its_names(
    mesh: LocalMesh, tmp_path: Path, title: str, called: str
) -> None:
    video = video_called(mesh, title)
    name = {"title": title, "prefix": video.id[:8], "id": video.id}[called]
    removed = run(mesh, "rm", name)
    assert removed.code == 0
    assert f"vstack undelete {video.id[:12]}" in removed.err
    assert "within 24h" in removed.err
    run(mesh, "info", title).failed_with(4, f"vstack undelete {video.id[:12]}")
    assert run(mesh, "undelete", name, "--json").json == {"id": video.id, "state": "ready"}
    now = video_called(mesh, title)
    assert (now.record, now.upload) == (replace(video.record, upload=video.upload), video.upload)
    assert run(mesh, "get", title, "-o", tmp_path / "copy.mp4").code == 0


def test_a_listing_says_how_long_a_deleted_video_can_be_had_back(mesh: LocalMesh, title: str) -> None:
    assert run(mesh, "rm", title).code == 0
    put_in_state(mesh, title, "deleted", waited=3 * 3600 + 90)
    lines = [line for line in run(mesh, "ls", "--all").out.splitlines() if title in line]
    assert len(lines) == 1
    assert "deleted, 20:58:30 left" in lines[0]
    listed = run(mesh, "ls", "--all", "--json").json["videos"]
    assert isinstance(listed, list)
    assert {v["title"]: v["undelete_s"] for v in listed if "undelete_s" in v} == {title: 20 * 3600 + 3510}
    assert run(mesh, "undelete", title).code == 0


def test_a_video_that_is_deleted_anew_can_be_had_back_for_the_whole_time_again(
    mesh: LocalMesh, title: str
) -> None:
    assert run(mesh, "rm", title).code == 0
    put_in_state(mesh, title, "deleted", waited=50_000)
    assert run(mesh, "undelete", title).code == 0
    assert video_called(mesh, title).record.waited == 0
    assert run(mesh, "rm", title, "--json").json["undelete_s"] == 86_400
    assert video_called(mesh, title).record.waited == 0
    assert run(mesh, "undelete", title).code == 0


def test_what_is_not_deleted_is_not_had_back(mesh: LocalMesh, title: str) -> None:
    video = video_called(mesh, title)
    for name in (title, video.id, video.id[:10]):
        run(mesh, "undelete", name).failed_with(1, video.id[:12], "is not deleted")
    run(mesh, "undelete", "no such video").failed_with(4, "no deleted video is called 'no such video'")
    run(mesh, "undelete", "ab" * 32).failed_with(4, "no deleted video")


def test_what_is_being_removed_for_good_is_not_had_back(mesh: LocalMesh, title: str) -> None:
    async def look(client: MeshClient) -> None:
        # Looked at right away: the nodes go on with the removal.
        purging = await edit_video(client, video, lambda v: replace(v.record, state="purging"))
        for name in (title, video.id, video.id[:10]):
            with pytest.raises(VstackError, match=f"{video.id[:12]} is being removed for good"):
                await find_video(client, name, "deleted")
        with pytest.raises(VstackError, match="is being removed for good"):
            await undelete_video(client, purging)

    video = video_called(mesh, title)
    with_client(mesh, look)


def test_of_two_deleted_videos_with_one_title_neither_is_guessed(
    mesh: LocalMesh, tmp_path: Path, title: str
) -> None:
    make_sample(tmp_path / "other.mp4", seconds=2, size=(160, 90), kind="mandelbrot")
    other = run(mesh, "put", tmp_path / "other.mp4", "--title", "other").out.strip()
    assert run(mesh, "rm", title).code == 0
    assert run(mesh, "rm", other).code == 0

    async def rename(client: MeshClient) -> None:
        video = await read_video(client, other)
        assert video is not None
        await edit_video(client, video, lambda v: replace(v.record, title=title))

    with_client(mesh, rename)
    run(mesh, "undelete", title).failed_with(4, "more than one video", other[:12])
    assert run(mesh, "undelete", other).code == 0
    assert run(mesh, "undelete", title).code == 0, "now only one of that title is deleted"


# -- pin ------------------------------------------------------------------------------------------


def test_a_video_is_pinned_and_let_go(mesh: LocalMesh, title: str) -> None:
    video = video_called(mesh, title)

    def pinned(*words: str) -> tuple[object, object, object]:
        done = run(mesh, "pin", title, *words, "--json")
        assert done.code == 0, done
        assert done.json["id"] == video.id
        record = video_called(mesh, title).record
        assert (record.redundancy, "/".join(map(str, record.erasure))) == (
            done.json["redundancy"],
            done.json["erasure"],
        )
        return done.json["redundancy"], done.json["erasure"], done.json["changed"]

    assert pinned("replicated") == ("replicated", "3/5", True)
    assert pinned("replicated") == ("replicated", "3/5", False)
    assert pinned("erasure", "--erasure", "2/3") == ("erasure", "2/3", True)
    assert pinned("auto") == ("auto", "2/3", True)
    assert pinned("auto", "--erasure", "3/5") == ("auto", "3/5", True)
    said = run(mesh, "pin", title, "auto")
    assert said.code == 0
    assert "as it was" in said.out
    assert "nothing was changed" in said.err


def test_what_cannot_be_pinned_is_refused(mesh: LocalMesh, title: str) -> None:
    before = video_called(mesh, title)
    run(mesh, "pin", "no such video", "auto").failed_with(4, "no video is called 'no such video'")
    run(mesh, "pin", title, "erasure", "--erasure", "5/3").failed_with(2, "5/3 is not an erasure code")
    run(mesh, "pin", title, "thrice").failed_with(2, "thrice")
    assert video_called(mesh, title) == before
    assert run(mesh, "rm", title).code == 0
    run(mesh, "pin", title, "replicated").failed_with(4, title)
    assert run(mesh, "undelete", title).code == 0


def test_a_pin_keeps_what_somebody_else_wrote_meanwhile(mesh: LocalMesh, title: str) -> None:
    async def both(client: MeshClient) -> None:
        stale = await read_video(client, video.id)
        assert stale is not None
        await edit_video(client, stale, lambda v: replace(v.record, title="another title"))
        await pin_video(client, stale, "erasure")
        now = await read_video(client, video.id)
        assert now is not None
        assert (now.record.title, now.record.redundancy) == ("another title", "erasure")

    video = video_called(mesh, title)
    with_client(mesh, both)


def test_a_change_of_what_is_gone_or_never_at_rest_ends_with_a_reason(mesh: LocalMesh, title: str) -> None:
    async def never_at_rest(client: MeshClient) -> None:
        original, disturbed = client.change, 0

        async def disturb(change: Change) -> Ok | Mismatch:
            nonlocal disturbed
            disturbed += 1
            now = await read_video(client, video.id)
            assert now is not None
            counted = replace(now.record, waited=disturbed, upload=now.upload)
            assert isinstance(await original(Change(change.key, now.version, pack(counted))), Ok)
            return await original(change)

        client.change = disturb  # type: ignore[method-assign]
        with pytest.raises(VstackError, match="all the time"):
            await pin_video(client, video, "replicated")
        assert disturbed == EDIT_TRIES

    async def gone(client: MeshClient) -> None:
        now = await read_video(client, video.id)
        assert now is not None
        await client.change(Change(video_key(video.id), now.version, None))
        with pytest.raises(NotFound, match="removed for good"):
            await delete_video(client, now)

    video = video_called(mesh, title)
    with_client(mesh, never_at_rest)
    with_client(mesh, gone)


# -- an upload whose register is written meanwhile -------------------------------------------------


def before_the_end(
    client: MeshClient, state: VideoState, meanwhile: Callable[[Video], Awaitable[None]]
) -> None:
    """Has `meanwhile` called with the register as it is just before it is turned to `state`."""
    original = client.change
    pending = True

    async def first(change: Change) -> Ok | Mismatch:
        nonlocal pending
        ends = change.data is not None and change.key.startswith("video/")
        if pending and ends and change.data and unpack_video(change.data).state == state:
            pending = False
            now = await read_video(client, change.key.removeprefix("video/"))
            assert now is not None
            await meanwhile(now)
        return await original(change)

    client.change = first  # type: ignore[method-assign]


async def write(client: MeshClient, video: Video, record: VideoRecord) -> None:
    outcome = await client.change(Change(video_key(video.id), video.version, pack(record)))
    assert isinstance(outcome, Ok)


def test_an_upload_ends_although_a_node_has_counted_in_its_register(mesh: LocalMesh, film: Path) -> None:
    async def store(client: MeshClient) -> None:
        async def count(video: Video) -> None:
            await write(client, video, replace(video.record, waited=60, upload=video.upload))

        before_the_end(client, "ready", count)
        done = await upload(client, film)
        assert (done.state, done.video.record.waited) == ("new", 0)
        assert await read_video(client, done.video.id) == done.video
        assert (await upload(client, film)).state == "present"

    with_client(mesh, store)


@pytest.mark.parametrize("end", ["aborted", "another upload", "removed"])
def test_an_upload_that_somebody_else_ended_does_not_become_a_video(
    mesh: LocalMesh, film: Path, end: str
) -> None:
    async def store(client: MeshClient) -> None:
        async def take_it_away(video: Video) -> None:
            if end == "aborted":
                await write(client, video, replace(video.record, state="aborted", upload=video.upload))
            elif end == "removed":
                await client.change(Change(video_key(video.id), video.version, None))
            else:
                await write(client, video, replace(video.record, title="theirs"))

        before_the_end(client, "ready", take_it_away)
        with pytest.raises(LostToAnother):
            await upload(client, film)
        assert all(v.record.title not in (film.stem, "theirs") for v in (await list_videos(client)).videos)

    with_client(mesh, store)


def test_an_upload_is_given_up_although_a_node_has_counted_in_its_register(
    mesh: LocalMesh, film: Path
) -> None:
    counted: list[Video] = []

    async def store(client: MeshClient) -> None:
        async def count(video: Video) -> None:
            counted.append(video)
            await write(client, video, replace(video.record, waited=60, upload=video.upload))

        def touch(p: Progress) -> None:
            if p.stage == "uploading":
                film.touch()  # the source changes while it is read

        before_the_end(client, "aborted", count)
        with pytest.raises(BadInput, match="changed"):
            await upload(client, film, on_progress=touch)
        assert len(counted) == 1
        now = await read_video(client, counted[0].id)
        assert now is not None
        assert (now.record.state, now.record.waited) == ("aborted", 0)
        assert upload_id(now.record, now.version) == counted[0].upload

    with_client(mesh, store)


def test_putting_a_deleted_video_again_has_it_back_although_a_node_counts(
    mesh: LocalMesh, film: Path, title: str
) -> None:
    async def store(client: MeshClient) -> None:
        async def count(video: Video) -> None:
            await write(client, video, replace(video.record, waited=60, upload=video.upload))

        await delete_video(client, video)
        before_the_end(client, "ready", count)
        again = await upload(client, film, UploadOptions("anew"))
        assert (again.state, again.video.record.title, again.video.record.waited) == ("undeleted", "anew", 0)

    video = video_called(mesh, title)
    with_client(mesh, store)


# -- verify ---------------------------------------------------------------------------------------


async def name_elsewhere(
    client: MeshClient, video: Video, index: int, change: Callable[[Place], Place]
) -> None:
    """Writes other places into the register of a chunk."""
    key = chunk_key(video.id, video.upload, index)
    found = await client.read(key)
    assert found.data is not None
    record = unpack_chunk(found.data)
    changed = ChunkRecord(record.entry, record.scheme, tuple(change(p) for p in record.places))
    assert isinstance(await client.change(Change(key, found.version, pack(changed))), Ok)


def bad_pieces(done: Finished) -> list[tuple[object, object, object]]:
    bad = done.json["bad"]
    assert isinstance(bad, list)
    return [(b["chunk"], b["piece"], b["state"]) for b in bad]


def test_a_video_whose_pieces_are_all_good_verifies(mesh: LocalMesh, title: str) -> None:
    done = run(mesh, "verify", title, "--json")
    assert done.code == 0, done
    chunks = video_called(mesh, title).record.chunks
    assert done.json["chunks"] == chunks
    assert done.json["pieces"] == done.json["good"] == 5 * chunks + 3, "and the copies of the init segment"
    assert (done.json["bad"], done.json["unreadable"]) == ([], [])
    assert "pieces are good" in run(mesh, "verify", title).out
    run(mesh, "verify", "no such video").failed_with(4, "no video is called")


def test_pieces_that_are_missing_or_are_not_what_is_named_are_said(mesh: LocalMesh, title: str) -> None:
    """Three of five: with fewer the nodes would mend it before it can be looked at twice."""
    video = video_called(mesh, title)

    def spoil(p: Place) -> Place:
        if p.piece in (1, 4):
            return p._replace(generation=p.generation._replace(counter=7))
        return p._replace(sha256=bytes(32)) if p.piece == 3 else p

    with_client(mesh, lambda client: name_elsewhere(client, video, 0, spoil))
    done = run(mesh, "verify", title, "--json")
    assert done.code == 1
    assert bad_pieces(done) == [(0, 1, "missing"), (0, 3, "other"), (0, 4, "missing")]
    said = run(mesh, "verify", title)
    assert said.code == 1
    assert "chunk 0: piece 1 on" in said.out
    assert "has other bytes than its register names" in said.out


def test_a_chunk_that_cannot_be_read_is_named_as_that(mesh: LocalMesh, title: str) -> None:
    video = video_called(mesh, title)

    def spoil(p: Place) -> Place:
        return p._replace(node="e" * 32) if p.piece < 3 else p

    with_client(mesh, lambda client: name_elsewhere(client, video, 0, spoil))
    done = run(mesh, "verify", title, "--json", "--repair")
    assert done.code == 1
    assert bad_pieces(done) == [(0, i, "gone") for i in range(3)]
    assert done.json["unreadable"] == [0]
    assert done.json["hastened_nodes"] == 5
    said = run(mesh, "verify", title)
    assert said.code == 1
    assert "chunk 0 CANNOT BE READ: 2 of the 3 pieces that it takes are good" in said.out


def test_a_piece_that_has_moved_is_looked_for_where_it_is_now(mesh: LocalMesh, title: str) -> None:
    """The table was read before the register changed: what it names is gone, and that is no damage."""

    async def check(client: MeshClient) -> None:
        table = await chunk_table(client, video)
        first = table[0]
        stale = tuple(p._replace(generation=p.generation._replace(counter=9)) for p in first.places)
        old = [ChunkRecord(first.entry, first.scheme, stale), *table[1:]]
        found = [c async for some in verify_video(client, video, old) for c in some]
        assert len(found) == len(table) + 1
        assert all(set(c.states) == {"good"} for c in found)

    video = video_called(mesh, title)
    with_client(mesh, check)


def test_a_damaged_piece_is_found_and_those_of_a_silent_node_are_not_called_good(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    make_sample(film, seconds=4, size=(320, 180))
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        assert run(mesh, "put", film).code == 0
        video = video_called(mesh, "film")
        damaged, silent = mesh.nodes[1], mesh.nodes[3]
        needle = with_client(mesh, lambda client: some_of(client, video, damaged.node))
        flip(damaged.data, needle)
        done = run(mesh, "verify", "film", "--json")
        assert done.code == 1
        assert [state for _, _, state in bad_pieces(done)] == ["damaged"]
        assert done.json["unreadable"] == [], "four others are good"
        silent.kill()
        states = [state for _, _, state in bad_pieces(run(mesh, "verify", "film", "--json"))]
        assert set(states) - {"damaged"} == {"silent"}, "and the damaged one may be mended by now"
        said = run(mesh, "verify", "film")
        assert said.code == 1
        assert f"on {silent.node[:8]} could not be checked" in said.out


async def some_of(client: MeshClient, video: Video, node: str) -> bytes:
    """The beginning of a piece of chunk 0 on `node`, as its disk has it."""
    record = (await chunk_table(client, video))[0]
    place = next(p for p in record.places if p.node == node)
    data, _ = await client.get_range(node, record.key(video.id, video.upload, place), 0, 64, timeout=5.0)
    return bytes(data)


def flip(data: Path, needle: bytes) -> None:
    """Flips a bit of the one place where `needle` lies in a node's superblocks."""
    hits = 0
    for path in (data / "store" / "superblocks").iterdir():
        at = path.read_bytes().find(needle)
        if at >= 0:
            hits += 1
            with path.open("r+b") as f:
                f.seek(at)
                f.write(bytes([needle[0] ^ 1]))
    assert hits == 1
