"""Codes other than 3/5, through real meshes: what is written, and which losses it survives."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vstack.client.catalogue import Video, chunk_table
from vstack.client.downloader import download
from vstack.client.uploader import UploadOptions, UploadResult, upload
from vstack.erasure import decode, encode, fragment_size
from vstack.errors import BadInput, DamagedData
from vstack.local import LocalMesh
from vstack.mesh.config import NodeId, group
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.mesh.placement import choose_scheme, shortfall, takers
from vstack.mesh.registers import (
    MAX_K,
    MAX_M,
    ChunkEntry,
    ChunkRecord,
    Generation,
    Place,
    Scheme,
    check_erasure,
    pack,
    parse_scheme,
)

from .cluster import running_mesh, vstack, with_client

SCHEMES = [Scheme(2, 3), Scheme(3, 5), Scheme(4, 6), Scheme(5, 8)]
WIDE = [Scheme(10, 14), Scheme(16, 32)]


# -- the codes themselves -------------------------------------------------------------------------


@given(st.binary(max_size=400), st.data())
def test_any_k_of_m_fragments_give_the_data_back_up_to_the_bounds(data: bytes, draw: st.DataObject) -> None:
    k = draw.draw(st.integers(2, MAX_K))
    m = draw.draw(st.integers(k + 1, MAX_M))
    check_erasure(Scheme(k, m))
    fragments = encode(data, k, m)
    assert [len(f) for f in fragments] == [fragment_size(len(data), k)] * m
    chosen = draw.draw(st.permutations(range(m)))
    assert decode({i: fragments[i] for i in chosen[:k]}, k, m, len(data)) == data
    with pytest.raises(DamagedData, match=f"{k - 1} are there"):
        decode({i: fragments[i] for i in chosen[: k - 1]}, k, m, len(data))


@settings(max_examples=20)
@given(st.sampled_from(WIDE), st.integers(0, 70_000), st.randoms(use_true_random=False))
def test_the_widest_codes_give_chunks_back_from_parity_alone_where_they_can(
    scheme: Scheme, size: int, rng: Random
) -> None:
    data = rng.randbytes(size)
    fragments = encode(data, *scheme)
    last = range(scheme.m - scheme.k, scheme.m)
    assert decode({i: fragments[i] for i in last}, *scheme, size) == data


@given(st.integers(0, 99), st.integers(0, 99))
def test_a_code_is_one_if_fragments_can_be_lost_and_it_is_within_the_bounds(k: int, m: int) -> None:
    if 2 <= k < m and k <= 16 and m <= 32:
        assert parse_scheme(f"{k}/{m}") == (k, m)
    else:
        with pytest.raises(BadInput):
            parse_scheme(f"{k}/{m}")


def test_a_register_has_room_for_the_widest_code_with_the_largest_numbers() -> None:
    writer = Generation((1 << 64) - 1, "f" * 32, (1 << 32) - 1, (1 << 32) - 1)
    places = tuple(Place("e" * 32, i, bytes(32), writer) for i in range(MAX_M))
    entry = ChunkEntry((1 << 32) - 1, 1 << 62, 1 << 62, 1 << 40, bytes(32), True)
    assert len(pack(ChunkRecord(entry, Scheme(MAX_K, MAX_M), places))) <= 4096, "one small message"


@pytest.mark.parametrize(
    ("wanted", "fewest"),
    [
        (Scheme(2, 3), 3), (Scheme(3, 5), 3), (Scheme(4, 6), 3), (Scheme(5, 8), 3), (Scheme(10, 14), 4),
        (Scheme(16, 32), 2), (Scheme(16, 17), 17),
    ],
)  # fmt: skip
def test_a_code_is_used_where_the_loss_of_any_node_leaves_k_fragments(wanted: Scheme, fewest: int) -> None:
    for nodes in range(1, 20):
        written = choose_scheme(wanted, nodes)
        assert written == (wanted if nodes >= fewest else Scheme(1, min(3, nodes)))


def test_copies_in_the_place_of_a_code_are_called_that() -> None:
    assert shortfall(Scheme(16, 17), Scheme(1, 3)) == "degraded: 3 copies instead of 16-of-17"
    assert shortfall(Scheme(16, 17), Scheme(1, 2)) == "degraded: 2 of 3 copies"


# -- through a mesh -------------------------------------------------------------------------------


def noise(path: Path, size: int, seed: int) -> Path:
    path.write_bytes(Random(seed).randbytes(size))
    return path


async def put(client: MeshClient, path: Path, scheme: Scheme) -> UploadResult:
    return await upload(client, path, UploadOptions(opaque=True, erasure=scheme))


def left(record: ChunkRecord, lost: Sequence[NodeId]) -> int:
    return sum(p.node not in lost for p in record.places)


async def comes_back(mesh: LocalMesh, video: Video, original: Path, copy: Path) -> bool:
    """With a client that knows nothing of who is down."""
    async with connect(mesh.peers) as client:
        await download(client, video, copy)
    return copy.read_bytes() == original.read_bytes()


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_videos_survive_every_loss_that_leaves_k_pieces_and_the_majority(tmp_path: Path) -> None:
    """Five nodes, every set of one or two of them killed: whatever has k pieces left is read, and each
    code is read at the worst loss that it can survive."""
    films = {s: noise(tmp_path / f"{s.k}-{s.m}", 3 << 20, s.m) for s in SCHEMES}

    async def store(client: MeshClient) -> dict[Scheme, Video]:
        return {s: (await put(client, films[s], s)).video for s in SCHEMES}

    async def tables(client: MeshClient) -> dict[Scheme, list[ChunkRecord]]:
        return {s: await chunk_table(client, v) for s, v in videos.items()}

    with running_mesh(tmp_path / "mesh", 5) as mesh:
        videos = with_client(mesh, store)
        chunks = with_client(mesh, tables)
        for s, table in chunks.items():
            for c in table:
                assert c.scheme == s
                assert [p.piece for p in c.places] == list(range(s.m))
                counts = Counter(p.node for p in c.places)
                assert max(counts.values()) - min(counts.values()) <= 1, "as even as five nodes allow"
        tightest = dict.fromkeys(SCHEMES, MAX_M)
        for lost in [*combinations(mesh.nodes, 1), *combinations(mesh.nodes, 2)]:
            for node in lost:
                node.kill()
            gone = [n.node for n in lost]
            for s, table in chunks.items():
                spare = min(left(c, gone) - s.k for c in table)
                if len(lost) == 1:
                    assert spare >= 0, "no code that is used depends on one node"
                if spare >= 0:
                    assert asyncio.run(comes_back(mesh, videos[s], films[s], tmp_path / "copy")), (s, gone)
                    tightest[s] = min(tightest[s], spare)
            for node in lost:
                node.start(mesh.peers, detach=False)
            for node in lost:
                node.wait_ready()
        assert tightest == dict.fromkeys(SCHEMES, 0)


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_sixteen_of_thirty_two_on_eight_nodes_survive_the_loss_of_four(tmp_path: Path) -> None:
    """And ten of fourteen that of any two. Of the killed ones few vote on the video: votes are not pieces."""
    films = {s: noise(tmp_path / f"{s.k}-{s.m}", 3 << 20, s.m) for s in WIDE}

    async def store(client: MeshClient) -> dict[Scheme, Video]:
        results = {s: await put(client, films[s], s) for s in WIDE}
        assert not any(r.warnings for r in results.values())
        for s, r in results.items():
            assert {(c.scheme, len(c.places)) for c in await chunk_table(client, r.video)} == {(s, s.m)}
        return {s: r.video for s, r in results.items()}

    async def voters(client: MeshClient) -> dict[Scheme, tuple[NodeId, ...]]:
        return {s: group(client.config, v.id) for s, v in videos.items()}

    with running_mesh(tmp_path / "mesh", 8) as mesh:
        videos = with_client(mesh, store)
        for s, acceptors in with_client(mesh, voters).items():
            few = sorted(mesh.nodes, key=lambda n, a=acceptors: n.node in a)  # type: ignore[misc]
            lost = few[: 4 if s.k == 16 else 2]
            for node in lost:
                node.kill()
            assert asyncio.run(comes_back(mesh, videos[s], films[s], tmp_path / "copy")), s
            for node in lost:
                node.start(mesh.peers, detach=False)
            for node in lost:
                node.wait_ready()


@pytest.mark.processes
def test_a_code_that_is_too_wide_for_the_mesh_becomes_copies_and_that_is_said(tmp_path: Path) -> None:
    film = noise(tmp_path / "film", 1 << 20, 1)
    with running_mesh(tmp_path / "mesh", 3) as mesh:
        peers = ",".join(mesh.peers)
        done = vstack("put", film, "--opaque", "--erasure", "10/14", peers=peers)
        assert done.code == 0, done
        assert "degraded: 3 copies instead of 10-of-14: the mesh has 3 nodes" in done.err
        info = vstack("info", "film", "--json", peers=peers).json
        assert info["erasure"] == "10/14", "what is wanted is remembered"
        assert info["warnings"] == ["degraded: 3 copies instead of 10-of-14"]
        assert "fragments 10/14: 1 chunk as 3 copies" in vstack("info", "film", peers=peers).out


@pytest.mark.processes
def test_copies_that_are_written_because_nodes_are_down_are_said_too(tmp_path: Path) -> None:
    film = noise(tmp_path / "film", 1 << 20, 1)
    with running_mesh(tmp_path / "mesh", 5) as mesh:
        for node in mesh.nodes[3:]:
            node.kill()
        done = vstack("put", film, "--opaque", "--erasure", "10/14", peers=",".join(mesh.peers[:3]))
        assert done.code == 0, done
        assert "degraded: 3 copies instead of 10-of-14: some nodes are down" in done.err


@pytest.mark.processes
def test_a_draining_node_does_not_count_when_a_code_is_chosen(tmp_path: Path) -> None:
    film = noise(tmp_path / "film", 1 << 20, 1)
    with running_mesh(tmp_path / "mesh", 4) as mesh:
        peers = ",".join(mesh.peers)
        drained = vstack("mesh", "drain", mesh.nodes[3].node, "--no-wait", peers=peers)
        assert drained.code == 0, drained
        done = vstack("put", film, "--opaque", "--erasure", "10/14", peers=peers)
        assert done.code == 0, done
        assert "the mesh has 3 nodes that take pieces" in done.err

        async def nodes(client: MeshClient) -> int:
            return len(takers(client.members))

        assert with_client(mesh, nodes) == 3


@pytest.mark.processes
def test_a_code_is_the_videos_own_and_is_changed_by_putting_it_again(tmp_path: Path) -> None:
    film = noise(tmp_path / "film", 1 << 20, 1)
    with running_mesh(tmp_path / "mesh", 3) as mesh:
        peers = ",".join(mesh.peers)

        def said(*words: str) -> tuple[object, object]:
            done = vstack("put", film, "--opaque", "--json", *words, peers=peers)
            assert done.code == 0, done
            stored = done.json["stored"]
            assert isinstance(stored, list)
            return stored[0]["state"], vstack("info", "film", "--json", peers=peers).json["erasure"]

        assert said("--erasure", "2/3") == ("new", "2/3")
        assert said() == ("present", "2/3")
        assert said("--erasure", "2/3") == ("present", "2/3")
        assert said("--erasure", "4/6") == ("updated", "4/6")
        assert said() == ("present", "4/6")


@pytest.mark.processes
@pytest.mark.parametrize("code", ["5/3", "1/3", "17/40", "three", "3"])
def test_an_impossible_code_is_refused_before_anything_is_stored(tmp_path: Path, code: str) -> None:
    film = noise(tmp_path / "film", 1 << 20, 1)
    # There is no mesh at that address: the refusal comes before it is asked.
    done = vstack("put", film, "--opaque", "--erasure", code, peers="127.0.0.1:9")
    done.failed_with(2, "--erasure")
    assert "is not an erasure code" in done.err or "over the bounds" in done.err
