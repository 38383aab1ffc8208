"""Uploads and downloads through a real mesh: formats, repeats, two clients at once, nodes that hang."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from vstack.client.catalogue import chunk_table, find_video, list_videos, read_video
from vstack.client.chunker import Chunk, CutRules, Ingest
from vstack.client.downloader import download
from vstack.client.pieces import PieceWriter
from vstack.client.player import PlayOptions, play
from vstack.client.proof import compare_files
from vstack.client.uploader import Progress, UploadOptions, upload
from vstack.errors import BadInput
from vstack.local import LocalMesh
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.registers import ERASURE, REPLICATED, UploadId, chunk_key, chunk_prefix
from vstack.samples import make_sample

from .cluster import running_mesh, with_client

pytestmark = pytest.mark.processes

FORMATS: dict[str, dict[str, object]] = {
    "h264-aac.mp4": {},
    "h264-aac.mov": {},
    "h264-aac.mkv": {},
    "h264-aac.ts": {},
    "hevc-aac.mp4": {"video_codec": "libx265"},
    "vp9-opus.webm": {"video_codec": "libvpx-vp9", "audio_codec": "libopus"},
    "aac.m4a": {"video_codec": None},
    "mp3.mp3": {"video_codec": None, "audio_codec": "libmp3lame"},
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), 5) as mesh:
        yield mesh


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("redundancy", ["erasure", "replicated"])
def test_every_packet_comes_back_after_put_and_get(
    mesh: LocalMesh, tmp_path: Path, name: str, redundancy: str
) -> None:
    source, copy = tmp_path / name, tmp_path / f"copy-{name}"
    # Another length for each redundancy: another file, and so another video.
    seconds = 5 if redundancy == "erasure" else 4
    make_sample(source, seconds=seconds, size=(160, 90), **FORMATS[name])  # type: ignore[arg-type]

    async def there_and_back(client: MeshClient) -> None:
        options = UploadOptions(name, redundancy)  # type: ignore[arg-type]
        result = await upload(client, source, options)
        table = await chunk_table(client, result.video)
        wanted = REPLICATED if redundancy == "replicated" else ERASURE
        assert {(r.scheme, len({p.node for p in r.places})) for r in table} == {(wanted, wanted.m)}
        await download(client, result.video, copy)

    with_client(mesh, there_and_back)
    comparison = compare_files(source, copy)
    assert comparison.equal, comparison
    assert comparison.packets > 100


def random_file(path: Path, size: int, seed: int) -> Path:
    path.write_bytes(Random(seed).randbytes(size))
    return path


def test_an_interrupted_upload_resumes_where_it_stopped(mesh: LocalMesh, tmp_path: Path) -> None:
    source = random_file(tmp_path / "big.bin", 30 << 20, 1)
    options = UploadOptions(opaque=True)

    async def twice(client: MeshClient) -> None:
        enough = asyncio.Event()

        def watch(p: Progress) -> None:
            if p.stage == "uploading" and p.done > 12 << 20:
                enough.set()

        first = asyncio.create_task(upload(client, source, options, watch))
        await enough.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        hidden = (await list_videos(client, hidden=True)).videos
        assert [v.record.state for v in hidden if v.record.title == "big"] == ["uploading"]
        second = await upload(client, source, options)
        assert second.state == "resumed"
        assert second.resumed > 0
        await download(client, second.video, tmp_path / "copy.bin")

    with_client(mesh, twice)
    assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()


def test_clients_at_once_make_one_video(mesh: LocalMesh, tmp_path: Path) -> None:
    source = random_file(tmp_path / "shared.bin", 8 << 20, time.time_ns())

    async def all_at_once() -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connect(mesh.peers)) for _ in range(4)]
            options = UploadOptions(opaque=True)
            results = await asyncio.gather(*(upload(client, source, options) for client in clients))
            assert len({r.video.id for r in results}) == 1
            assert len({r.video.upload for r in results}) == 1
            await download(clients[0], results[0].video, tmp_path / "copy.bin")

    asyncio.run(all_at_once())
    assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()


def test_an_upload_cut_by_other_rules_replaces_the_one_that_was_left_open(
    mesh: LocalMesh, tmp_path: Path
) -> None:
    source = random_file(tmp_path / "rules.bin", 20 << 20, 3)

    async def other_rules(client: MeshClient) -> None:
        begun = asyncio.Event()

        def watch(p: Progress) -> None:
            if p.stage == "uploading" and p.chunks > 2:
                begun.set()

        first = asyncio.create_task(upload(client, source, UploadOptions(opaque=True), watch))
        await begun.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        rules = CutRules(max_seconds=3.0)
        second = await upload(client, source, UploadOptions(opaque=True, rules=rules))
        assert second.resumed == 0
        await download(client, second.video, tmp_path / "copy.bin")

    with_client(mesh, other_rules)
    assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()


def test_a_source_that_fails_midway_is_aborted_stays_hidden_and_can_be_stored_later(
    mesh: LocalMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_file(tmp_path / "fails.bin", 10 << 20, 4)
    real = Ingest.chunks

    def breaks_off(self: Ingest) -> Generator[Chunk, None, None]:
        yield from islice(real(self), 3)
        raise BadInput(f"{self.path} broke off")

    async def refused(client: MeshClient) -> list[str]:
        with pytest.raises(BadInput, match=r"fails\.bin broke off"):
            await upload(client, source, UploadOptions(opaque=True))
        videos = (await list_videos(client, hidden=True)).videos
        return [v.record.state for v in videos if v.record.title == "fails"]

    async def stored(client: MeshClient) -> str:
        return (await upload(client, source, UploadOptions(opaque=True))).state

    with monkeypatch.context() as patch:
        patch.setattr(Ingest, "chunks", breaks_off)
        assert with_client(mesh, refused) == ["aborted"]
    assert with_client(mesh, stored) == "new"


def test_a_file_that_is_written_to_meanwhile_is_refused(mesh: LocalMesh, tmp_path: Path) -> None:
    source = random_file(tmp_path / "growing.bin", 10 << 20, 7)

    async def grows(client: MeshClient) -> None:
        def watch(p: Progress) -> None:
            if p.stage == "uploading" and source.stat().st_size == 10 << 20:
                with source.open("ab") as f:
                    f.write(b"more")

        with pytest.raises(BadInput, match="changed while it was being stored"):
            await upload(client, source, UploadOptions(opaque=True), watch)

    with_client(mesh, grows)


def test_a_piece_over_the_bound_is_refused_by_name(mesh: LocalMesh) -> None:
    data = bytes((8 << 20) + 1)

    async def write(client: MeshClient) -> None:
        writer = PieceWriter(client, "ab" * 32)
        with pytest.raises(BadInput, match=r"chunk 3 has pieces of 8 MiB.*--opaque"):
            await writer.write(UploadId(1, 1), 3, data, sha256(data).digest(), REPLICATED)

    with_client(mesh, write)


def test_thousands_of_registers_are_listed_in_order_page_by_page(mesh: LocalMesh) -> None:
    video, upload_id = "cd" * 32, UploadId(1, (1 << 20) + 1)
    keys = [chunk_key(video, upload_id, i) for i in range(2500)]

    async def create_and_list(client: MeshClient) -> None:
        large = bytes(4000)  # 2.5 times what one message may hold, in as many operations as one may have
        await client.change_all([Change(key, 0, key.encode()) for key in keys[512:]])
        await client.change_all([Change(key, 0, large) for key in keys[:512]])
        rows = (await client.list(chunk_prefix(video, upload_id))).rows
        assert [row.data for row in rows[:512]] == [large] * 512
        versions = {row.key: row.version for row in rows[:512]}
        await client.change_all([Change(key, versions[key], key.encode()) for key in keys[:512]])
        page = await client.list(chunk_prefix(video, upload_id))
        assert page.complete
        assert [row.key for row in page.rows] == keys
        assert all(row.data == row.key.encode() for row in page.rows)

    with_client(mesh, create_and_list)


@asynccontextmanager
async def paused(mesh: LocalMesh, *numbers: int) -> AsyncIterator[None]:
    """SIGSTOP: the sockets stay open, and nobody is home."""
    pids = [p.pid for n in numbers if (p := mesh.nodes[n - 1].process) is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_uploads_and_downloads_go_on_while_two_nodes_hang(mesh: LocalMesh, tmp_path: Path) -> None:
    source = random_file(tmp_path / "hang.bin", 10 << 20, 5)

    async def hang(client: MeshClient) -> None:
        async with paused(mesh, 2, 4):
            result = await upload(client, source, UploadOptions(opaque=True))
            await download(client, result.video, tmp_path / "copy.bin")

    with_client(mesh, hang, patience=20)
    assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()


def test_playback_goes_on_while_two_serving_nodes_hang(mesh: LocalMesh, tmp_path: Path) -> None:
    film = tmp_path / "hang.mp4"
    make_sample(film, seconds=16, size=(160, 90), gop_seconds=2.0, bit_rate=300_000)

    async def watch(client: MeshClient) -> None:
        rules = CutRules(max_seconds=2.0)
        video = (await upload(client, film, UploadOptions(rules=rules))).video
        playing = asyncio.create_task(play(client, video, PlayOptions(buffer=6)))
        await asyncio.sleep(2)
        async with paused(mesh, 1, 3):
            playback = await playing
        assert playback.rebuffers == 0
        assert playback.decode_errors == 0
        assert playback.video_frames == 16 * 24

    with_client(mesh, watch)


def test_a_piece_that_is_damaged_on_disk_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    source = random_file(tmp_path / "rot.bin", 4 << 20, 6)
    with running_mesh(tmp_path / "own", 5) as own:

        async def put(client: MeshClient) -> str:
            return (await upload(client, source, UploadOptions(opaque=True))).video.id

        video_id = with_client(own, put)
        for node in own.nodes[:2]:  # two of five: as many as the scheme tolerates
            node.stop()
            for superblock in (node.data / "store" / "superblocks").glob("*.vsb"):
                raw = bytearray(superblock.read_bytes())
                middle = len(raw) // 2
                for at in range(8192, len(raw), max(1, middle // 50)):
                    raw[at] ^= 0x40
                superblock.write_bytes(raw)
            node.start(own.peers, detach=False)
            node.wait_ready()

        async def get(client: MeshClient) -> None:
            video = await find_video(client, video_id)
            assert video == await read_video(client, video_id)
            await download(client, video, tmp_path / "copy.bin")

        with_client(own, get)
    assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()
