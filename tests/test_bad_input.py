"""What goes wrong in users' hands: each gives one clear line, a non-zero exit, and harms nothing."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import zmq

from vstack.local import LocalMesh, LocalNode, NodeFailed, free_port
from vstack.mesh.mesh_client import MeshClient
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Ballot,
    Envelope,
    Header,
    Hello,
    Ping,
    Prepare,
    Status,
    encode,
)
from vstack.samples import make_sample

from .cluster import running_mesh, vstack, wait_for, with_client

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), 3) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    make_sample(path, seconds=4, size=(160, 90))
    return path


@pytest.fixture(scope="module")
def peers(mesh: LocalMesh) -> str:
    return ",".join(mesh.peers)


@pytest.fixture(scope="module")
def stored(peers: str, film: Path) -> str:
    """The id of a video that must outlive everything below."""
    done = vstack("put", film, peers=peers)
    assert done.code == 0, done
    return done.out.strip()


@pytest.fixture(autouse=True)
def nothing_is_harmed(stored: str, peers: str, film: Path, tmp_path: Path) -> Iterator[None]:
    yield
    copy = tmp_path / "harmed.mp4"
    assert vstack("get", stored, "-o", copy, peers=peers).code == 0
    listing = vstack("ls", "--json", "--all", peers=peers).json["videos"]
    assert isinstance(listing, list)
    assert [v["id"] for v in listing if v["state"] == "ready"] == [stored]


def test_what_is_not_media_is_refused_and_opaque_is_offered(peers: str, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear all,\n" * 500)
    vstack("put", path, peers=peers).failed_with(5, "letter.txt", "--opaque")
    path.write_bytes(Random(5).randbytes(300_000))
    vstack("put", path, peers=peers).failed_with(5, "letter.txt", "--opaque")


def test_an_empty_file_is_refused(peers: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    vstack("put", path, peers=peers).failed_with(5, "empty.mp4", "empty")


def test_a_missing_file_and_an_empty_folder_are_refused(peers: str, tmp_path: Path) -> None:
    vstack("put", tmp_path / "none.mp4", peers=peers).failed_with(5, "none.mp4")
    (tmp_path / "folder").mkdir()
    vstack("put", tmp_path / "folder", peers=peers).failed_with(5, "folder")


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_mp4_is_refused(peers: str, film: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.mp4"
    whole = film.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    vstack("put", path, peers=peers).failed_with(5, "cut.mp4")


def test_a_mesh_that_is_not_there_is_named(film: Path) -> None:
    nowhere = f"127.0.0.1:{free_port(1)}"
    vstack("put", film, peers=nowhere).failed_with(3, nowhere, "vstack up")
    vstack("ls", peers=nowhere).failed_with(3, nowhere)
    vstack("ls", peers="nonsense").failed_with(2, "nonsense", "HOST:PORT")


def test_unknown_and_ambiguous_names_are_said_to_be_so(peers: str, tmp_path: Path) -> None:
    vstack("get", "no such film", "-o", tmp_path / "x.mp4", peers=peers).failed_with(4, "no such film")
    vstack("info", "0" * 64, peers=peers).failed_with(4, "vstack ls")
    assert not (tmp_path / "x.mp4").exists()


def test_a_file_that_exists_is_not_replaced_unasked(peers: str, stored: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.mp4"
    path.write_text("mine")
    vstack("get", stored, "-o", path, peers=peers).failed_with(2, "mine.mp4", "--force")
    assert path.read_text() == "mine"
    assert vstack("get", stored, "-o", path, "--force", peers=peers).code == 0
    assert path.stat().st_size > 1000
    vstack("get", stored, "-o", tmp_path / "x.exe", peers=peers).failed_with(2, "x.exe")
    assert not list(tmp_path.glob("*.part*"))


def test_a_mesh_with_too_few_nodes_refuses_uploads_and_says_so(film: Path, tmp_path: Path) -> None:
    with running_mesh(tmp_path / "five", 5) as five:
        for node in five.nodes[:3]:
            node.kill()
        some = ",".join(five.peers)
        done = vstack("put", film, peers=some)
        assert done.code in (3, 6), done
        assert "Traceback" not in done.err
        status = vstack("status", peers=some)
        assert status.code == 3
        assert "too many nodes are down" in status.out
        for node in five.nodes[:3]:
            node.start(five.peers, detach=False)
        for node in five.nodes[:3]:
            node.wait_ready()
        assert vstack("put", film, peers=some).code == 0


def test_status_is_degraded_while_one_node_is_down(film: Path, tmp_path: Path) -> None:
    with running_mesh(tmp_path / "three", 3) as three:
        some = ",".join(three.peers)
        assert vstack("status", peers=some).code == 0
        three.nodes[2].kill()
        done = vstack("status", "--json", peers=some)
        assert done.code == 8
        assert done.json["health"] == "degraded"
        assert three.nodes[2].address in str(done.json["reasons"])
        assert f"or after `vstack mesh remove {three.nodes[2].node[:8]}`" in str(done.json["reasons"])
        assert vstack("put", film, peers=some).code == 0


# -- starting a node ------------------------------------------------------------------------------


def start_node(folder: Path, port: int, peers: tuple[str, ...] = (), *extra: str) -> tuple[int, str]:
    """Starts a node that is to fail; its exit code and its last words."""
    node = LocalNode(1, f"127.0.0.1:{port}", folder, folder.with_suffix(".log"))
    node.start(peers or (node.address,), detach=False, extra=extra)
    try:
        with pytest.raises(NodeFailed):
            node.wait_ready(20)
        assert node.process is not None
        return node.process.wait(5), node.last_words()
    finally:
        node.stop()


def test_a_port_in_use_ends_the_node_with_2(mesh: LocalMesh, tmp_path: Path) -> None:
    code, said = start_node(tmp_path / "new", mesh.port)
    assert code == 2
    assert str(mesh.port) in said
    assert "--listen" in said


def test_a_data_directory_in_use_ends_the_node_with_3(mesh: LocalMesh) -> None:
    code, said = start_node(mesh.nodes[0].data, free_port(1))
    assert code == 3
    assert "in use" in said


def test_a_data_directory_of_another_mesh_ends_the_node_with_4(mesh: LocalMesh, tmp_path: Path) -> None:
    with running_mesh(tmp_path / "other", 3) as other:
        data = other.nodes[0].data
        for node in other.nodes:
            node.stop()
        code, said = start_node(data, other.port, (f"127.0.0.1:{other.port}", *mesh.peers[1:]))
        assert code == 4, said
        assert "mesh" in said


def test_a_folder_that_is_not_a_nodes_ends_the_node_with_4(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.doc").write_text("years of work")
    code, said = start_node(tmp_path / "home", free_port(1))
    assert code == 4
    assert "not made by vstack" in said
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.doc"]


def test_a_copy_of_a_data_directory_beside_the_original_never_votes(tmp_path: Path, film: Path) -> None:
    with running_mesh(tmp_path / "three", 3) as three:
        third = three.nodes[2]
        third.stop()
        shutil.copytree(third.data, tmp_path / "copy")
        third.start(three.peers, detach=False)
        third.wait_ready()
        for _ in range(3):  # a supervisor that starts it again and again, with a higher boot each time
            code, said = start_node(tmp_path / "copy", free_port(1), three.peers)
            assert code in (1, 4), said
            assert "old copy" in said
        assert third.alive
        assert vstack("put", film, peers=",".join(three.peers)).code == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--listen", "0.0.0.0:7400"), "--insecure"),
        (("--listen", "nonsense"), "HOST:PORT"),
        (("--capacity", "lots"), "lots"),
        (("--config", "/nonexistent.toml"), "/nonexistent.toml"),
    ],
)
def test_bad_configuration_ends_the_node_with_2(tmp_path: Path, words: tuple[str, ...], named: str) -> None:
    code, said = start_node(tmp_path / "new", free_port(1), (), *words)
    assert code == 2
    assert named in said


def test_an_unknown_key_in_the_configuration_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('lissen = "127.0.0.1:7400"\n')
    code, said = start_node(tmp_path / "new", free_port(1), (), "--config", str(config))
    assert code == 2
    assert "lissen" in said


# -- what strangers send --------------------------------------------------------------------------


def status_of_first(mesh: LocalMesh) -> Status:
    async def ask(client: MeshClient) -> Status:
        return await client.status(mesh.nodes[0].node)

    return with_client(mesh, ask)


def test_random_bytes_at_both_ports_are_counted_and_dropped(mesh: LocalMesh) -> None:
    before = status_of_first(mesh).counters
    rng = Random(7)
    for i in range(60):
        with socket.create_connection(("127.0.0.1", mesh.port + i % 2)) as s:
            try:
                s.sendall(rng.randbytes(rng.choice((1, 64, 500, 20_000))))
                if i % 3 == 0:  # a proper greeting, then rubbish
                    s.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + bytes(32))
                    s.sendall(rng.randbytes(300))
            except OSError:
                pass  # it hung up on us
    wait_for(
        lambda: (
            status_of_first(mesh).counters.get("handshakes_failed", 0)
            > before.get("handshakes_failed", 0) + 10
        )
    )
    assert all(n.alive for n in mesh.nodes)


def test_malformed_messages_are_counted_and_dropped(mesh: LocalMesh) -> None:
    before = status_of_first(mesh).counters.get("malformed", 0)
    rng = Random(8)
    hello = encode(Header(Hello(PROTOCOL_VERSION, "", "client")))
    valid = encode(Header(Ping(1, ()), 1000))
    sent = 0
    context = zmq.Context()
    try:
        for lane in (0, 1):
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 2000
            dealer.connect(f"tcp://127.0.0.1:{mesh.port + lane}")
            dealer.send_multipart([bytes(8), hello])
            for parts in (
                [b"short", valid],
                [bytes(8)],
                [bytes(8), b""],
                [bytes(8), rng.randbytes(100)],
                [bytes(8), valid[:-1]],
                [bytes(8), valid + b"x"],
                [bytes(8), valid, b"", b"too many parts"],
            ):
                dealer.send_multipart(parts)
                sent += 1
            dealer.close()
    finally:
        context.term()
    wait_for(lambda: status_of_first(mesh).counters.get("malformed", 0) >= before + sent)
    assert all(n.alive for n in mesh.nodes)


def test_votes_of_a_stranger_do_not_count(mesh: LocalMesh) -> None:
    mesh_id = status_of_first(mesh).mesh
    key = "video/" + os.urandom(32).hex()
    prepare = Prepare(key, Ballot(1, 1 << 40, "f" * 32, 1))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for role in ("client", "node"):
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.rcvtimeo = 5000
            dealer.connect(f"tcp://127.0.0.1:{mesh.port}")
            dealer.send_multipart(
                [bytes(8), encode(Header(Hello(PROTOCOL_VERSION, mesh_id, role, "f" * 32, 1)))]
            )
            dealer.recv_multipart()
            dealer.send_multipart([bytes(8), encode(Header(Envelope((prepare,)), 1000))])
            assert b"only members" in dealer.recv_multipart()[1]
            dealer.close()
    finally:
        context.term()
