"""A file that is put again is only said to be there if it can be read: enough pieces are on members."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from vstack.client.catalogue import Video, chunk_table, delete_video, find_with_table, read_video
from vstack.client.downloader import download
from vstack.client.uploader import UploadOptions, UploadResult, upload
from vstack.errors import BadInput
from vstack.local import LocalMesh
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.registers import chunk_key, pack, unpack_chunk, video_key
from vstack.samples import make_sample

from .cluster import running_mesh, with_client

pytestmark = pytest.mark.processes
GONE = "e" * 32
"""A node that is no member."""


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


async def move_away(client: MeshClient, video: Video, index: int, pieces: int) -> None:
    """Writes into the register of a chunk that its first `pieces` pieces lie on a node that has left."""
    key = chunk_key(video.id, video.upload, index)
    found = await client.read(key)
    assert found.data is not None
    record = unpack_chunk(found.data)
    places = [p._replace(node=GONE) if i < pieces else p for i, p in enumerate(record.places)]
    await client.change(Change(key, found.version, pack(replace(record, places=tuple(places)))))


async def readable(client: MeshClient, result: UploadResult, copy: Path) -> bool:
    """Whether all of it is on members, and can be had."""
    await download(client, result.video, copy)
    table = await chunk_table(client, result.video)
    return all(client.config.member(p.node) for c in table for p in c.places)


def test_a_chunk_with_enough_pieces_left_leaves_the_video_as_it_is(mesh: LocalMesh, film: Path) -> None:
    async def run(client: MeshClient) -> None:
        first = await upload(client, film)
        await move_away(client, first.video, 0, 2)
        again = await upload(client, film)
        assert (again.state, again.warnings, again.video) == ("present", (), first.video)

    with_client(mesh, run)


def test_a_chunk_with_too_few_pieces_left_has_the_file_stored_anew(
    mesh: LocalMesh, film: Path, tmp_path: Path
) -> None:
    async def run(client: MeshClient) -> None:
        first = await upload(client, film, UploadOptions("the sea", "erasure"))
        await move_away(client, first.video, 1, 3)
        again = await upload(client, film)
        assert again.state == "restored"
        assert again.video.upload != first.video.upload
        assert (again.video.record.title, again.video.record.redundancy) == ("the sea", "erasure")
        assert any("1 chunk cannot be read" in w for w in again.warnings)
        table = await chunk_table(client, again.video)
        for name in (again.video.id, "the sea"):
            assert await find_with_table(client, name) == (again.video, table), "not that of the first upload"
        assert await readable(client, again, tmp_path / "copy.mp4")
        assert (await upload(client, film)).state == "present"

    with_client(mesh, run)


def test_a_deleted_video_that_cannot_be_read_comes_back_whole(
    mesh: LocalMesh, film: Path, tmp_path: Path
) -> None:
    async def run(client: MeshClient) -> None:
        first = await upload(client, film, UploadOptions(redundancy="replicated"))
        await move_away(client, first.video, 0, 3)
        await delete_video(client, first.video)
        again = await upload(client, film)
        assert again.state == "restored"
        assert again.video.record.state == "ready"
        assert await readable(client, again, tmp_path / "copy.mp4")

    with_client(mesh, run)


def test_an_init_segment_that_is_lost_has_the_file_stored_anew(
    mesh: LocalMesh, film: Path, tmp_path: Path
) -> None:
    async def run(client: MeshClient) -> None:
        first = await upload(client, film)
        record, init = first.video.record, first.video.record.init
        assert init is not None
        lost = replace(init, places=tuple(p._replace(node=GONE) for p in init.places))
        changed = replace(record, init=lost, upload=first.video.upload)
        await client.change(Change(video_key(first.video.id), first.video.version, pack(changed)))
        again = await upload(client, film)
        assert again.state == "restored"
        assert await readable(client, again, tmp_path / "copy.mp4")

    with_client(mesh, run)


def test_a_lost_register_of_a_chunk_has_the_file_stored_anew(
    mesh: LocalMesh, film: Path, tmp_path: Path
) -> None:
    async def run(client: MeshClient) -> None:
        first = await upload(client, film)
        key = chunk_key(first.video.id, first.video.upload, 0)
        await client.change(Change(key, (await client.read(key)).version, None))
        again = await upload(client, film)
        assert again.state == "restored"
        assert await readable(client, again, tmp_path / "copy.mp4")

    with_client(mesh, run)


def test_what_could_not_be_replaced_stands_as_it_was(mesh: LocalMesh, film: Path) -> None:
    """The file changes while it is being stored anew: the upload is given up, and the rest of the video
    can be read as before."""

    async def run(client: MeshClient) -> None:
        first = await upload(client, film)
        await move_away(client, first.video, 0, 3)
        with pytest.raises(BadInput, match="changed"):
            await upload(client, film, on_progress=lambda p: film.touch() if p.stage == "uploading" else None)
        now = await read_video(client, first.video.id)
        assert now is not None
        assert (now.record.state, now.upload) == ("ready", first.video.upload)

    with_client(mesh, run)
