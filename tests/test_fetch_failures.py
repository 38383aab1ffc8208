"""What a reader is told when a chunk cannot be had: which nodes failed, and why, each reason once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vstack.client.downloader import fetch_init
from vstack.client.fetcher import ChunkFetcher, reasons
from vstack.client.uploader import upload
from vstack.errors import MeshUnavailable
from vstack.mesh.mesh_client import MeshClient
from vstack.samples import make_sample

from .cluster import running_mesh, with_client

A, B, C = (f"{n}" * 32 for n in "abc")


def test_nodes_that_failed_alike_share_a_reason() -> None:
    told = reasons([(A, "no answer"), (B, "no such piece"), (C, "no answer")], {})
    assert told == "aaaaaaaa, cccccccc: no answer; bbbbbbbb: no such piece"


def test_a_reason_that_begins_with_the_node_is_still_the_same_reason() -> None:
    told = reasons([(n, f"node {n[:8]} is not a member of the mesh") for n in (A, B)], {})
    assert told == "aaaaaaaa, bbbbbbbb: is not a member of the mesh"


def test_a_reason_that_names_the_address_is_still_the_same_reason() -> None:
    addresses = {A: "10.0.0.1:7400", B: "10.0.0.2:7400"}
    for said in ("{} did not answer within 2.0 s", "{}: the connection was closed"):
        told = reasons([(n, said.format(a)) for n, a in addresses.items()], addresses)
        assert told == f"aaaaaaaa, bbbbbbbb: {said.removeprefix('{}').lstrip(': ')}"
    told = reasons([(n, f"the connection to {a} was closed") for n, a in addresses.items()], addresses)
    assert told == "aaaaaaaa, bbbbbbbb: the connection was closed"


def test_the_last_reason_of_a_node_counts() -> None:
    assert reasons([(A, "busy"), (A, "busy"), (A, "no answer")], {}) == "aaaaaaaa: no answer"


@pytest.mark.processes
def test_an_init_segment_that_cannot_be_had_is_called_so(tmp_path: Path) -> None:
    make_sample(tmp_path / "film.mp4", seconds=2, size=(160, 90))
    with running_mesh(tmp_path / "mesh", 3) as mesh:

        async def run(client: MeshClient) -> str:
            video = (await upload(client, tmp_path / "film.mp4")).video
            for node in mesh.nodes:
                node.kill()
            async with ChunkFetcher(client, video.id, video.upload) as fetcher, asyncio.timeout(60):
                with pytest.raises(MeshUnavailable) as e:
                    await fetch_init(fetcher, video)
            return str(e.value)

        said = with_client(mesh, run)
    assert said.startswith("the init segment of video ")
    assert "1 of its 3 pieces" in said
