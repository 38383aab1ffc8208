"""Stopping and starting a whole mesh: everything is there again, cleanly stopped or killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vstack.client.catalogue import list_videos
from vstack.client.downloader import download
from vstack.client.proof import compare_files
from vstack.client.uploader import UploadOptions, upload
from vstack.local import LocalNode
from vstack.mesh.mesh_client import MeshClient
from vstack.samples import make_sample

from .cluster import running_mesh, with_client


def stop(node: LocalNode) -> None:
    assert node.stop() == 0


def kill(node: LocalNode) -> None:
    node.kill()


@pytest.mark.processes
@pytest.mark.parametrize("end", [stop, kill])
@pytest.mark.parametrize("redundancy", ["replicated", "erasure"])
def test_a_whole_mesh_comes_back_with_everything(
    tmp_path: Path, end: Callable[[LocalNode], None], redundancy: str
) -> None:
    film = tmp_path / "film.mp4"
    make_sample(film, seconds=6, size=(320, 180))
    with running_mesh(tmp_path / "mesh") as mesh:

        async def put(client: MeshClient) -> str:
            options = UploadOptions("film", redundancy)  # type: ignore[arg-type]
            return (await upload(client, film, options)).video.id

        video_id = with_client(mesh, put)
        was = [n.node for n in mesh.nodes]
        for node in mesh.nodes:
            end(node)
        for node in mesh.nodes:
            node.start(mesh.peers, detach=False)
        for node in mesh.nodes:
            node.wait_ready()
        print(f"ready after {[round(n.ready_after, 2) for n in mesh.nodes]} s")
        assert [n.node for n in mesh.nodes] == was
        copy = tmp_path / "copy.mp4"

        async def check(client: MeshClient) -> None:
            listing = await list_videos(client)
            assert listing.complete
            assert [v.id for v in listing.videos] == [video_id]
            await download(client, listing.videos[0], copy)

        with_client(mesh, check)
        assert compare_files(film, copy).equal


@pytest.mark.processes
def test_two_dead_nodes_of_five_hide_nothing_and_a_mesh_of_one_says_it_is_degraded(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    make_sample(film, seconds=3, size=(160, 90))
    with running_mesh(tmp_path / "five") as mesh:

        async def put(client: MeshClient) -> tuple[str, ...]:
            return (await upload(client, film)).warnings

        assert with_client(mesh, put) == ()
        mesh.nodes[0].kill()
        mesh.nodes[3].kill()

        async def fetch(client: MeshClient) -> bool:
            listing = await list_videos(client)
            await download(client, listing.videos[0], tmp_path / "copy.mp4")
            return listing.complete

        assert with_client(mesh, fetch)
        assert compare_files(film, tmp_path / "copy.mp4").equal
        mesh.nodes[1].kill()

        async def incomplete(client: MeshClient) -> bool:
            return (await list_videos(client)).complete

        assert not with_client(mesh, incomplete)
    with running_mesh(tmp_path / "one", 1) as alone:
        assert any("degraded: 1 of 3 copies" in w for w in with_client(alone, put))
