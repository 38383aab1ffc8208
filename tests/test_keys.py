"""Keys, with real processes over TCP: who is refused, how it shows, and what travels in the clear."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import pytest
import zmq
import zmq.asyncio
from zmq.utils import z85

from vstack.client.members import moving
from vstack.errors import UsageError
from vstack.local import LocalMesh, LocalNode, free_port
from vstack.mesh.changes import AddMember, Authorise, ChangeRefused, RemoveMember, Revoke, successor
from vstack.mesh.config import Config, Grant, Member, View
from vstack.mesh.dialer import KeyRefused, Refused
from vstack.mesh.keys import (
    KeyPair,
    find_client_key,
    init_mesh,
    load_client,
    load_mesh,
    load_mesh_public,
    load_node,
    new_client,
    new_pair,
    parse_public,
    short,
)
from vstack.mesh.mesh_client import Change, MeshClient, connect
from vstack.mesh.messages import PROTOCOL_VERSION, Body, Envelope, Failure, Header, Hello, decode, encode
from vstack.mesh.sockets import Lane, endpoint, speak_as
from vstack.samples import make_sample

from .cluster import running_mesh, vstack, wait_for, with_client

TITLE = "a title that nobody on the way should read"
QUICK = 4.0
"""Seconds: below the patience of a client, which is what a wrong key must not cost."""

# -- files ----------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_key_files_are_their_owners_alone_and_read_back_as_they_were_made(tmp_path: Path) -> None:
    admin = init_mesh(tmp_path / "keys")
    mesh = load_mesh(tmp_path / "keys")
    assert mesh == load_mesh(tmp_path / "keys" / "mesh.key")
    assert mesh.admins == (Grant(admin.pair.public, "admin", "admin"),)
    assert load_client(tmp_path / "keys" / "admin.key") == admin
    assert admin.mesh == mesh.pair.public
    (tmp_path / "data").mkdir()
    node = load_node(tmp_path / "keys", tmp_path / "data")
    assert load_node(tmp_path / "keys", tmp_path / "data") == node, "made once"
    assert mode(tmp_path / "keys") == 0o700
    for path in tmp_path.rglob("*.key"):
        assert mode(path) == 0o600
    assert not list(tmp_path.rglob(".*")), "nothing half made is left"


def test_the_name_of_a_client_may_be_anything_printable(tmp_path: Path) -> None:
    mesh = new_pair().public
    for i, name in enumerate(('a "quoted" \\ name', "Zoë", "x" * 64)):
        new_client(tmp_path / f"{i}.key", mesh, name)
        assert load_client(tmp_path / f"{i}.key").name == name
    for name in ("", "x" * 65, "two\nlines"):
        with pytest.raises(UsageError, match="printable"):
            new_client(tmp_path / "no.key", mesh, name)


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    init_mesh(tmp_path)
    before = (tmp_path / "mesh.key").read_bytes(), (tmp_path / "admin.key").read_bytes()
    with pytest.raises(UsageError, match="not replaced"):
        init_mesh(tmp_path)
    with pytest.raises(UsageError, match="not replaced"):
        new_client(tmp_path / "admin.key", bytes(32), "other")
    assert before == ((tmp_path / "mesh.key").read_bytes(), (tmp_path / "admin.key").read_bytes())


@pytest.mark.parametrize("others", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_may_read_or_write_is_not_used(tmp_path: Path, others: int) -> None:
    init_mesh(tmp_path)
    for name, load in (("mesh.key", load_mesh), ("admin.key", load_client)):
        (tmp_path / name).chmod(others)
        with pytest.raises(UsageError, match="chmod 600"):
            load(tmp_path / name)


def test_a_damaged_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    client = init_mesh(tmp_path)
    path = tmp_path / "admin.key"
    text = path.read_text()
    secret = client.pair.secret.hex()
    for damaged in (
        "",
        text[:-3],
        text.replace(secret, secret[:-1]),
        text.replace(secret, secret[:-2] + "zz"),
        text.replace(secret, new_pair().secret.hex()),
        text.replace("version = 1", "version = 2"),
        text.replace('kind = "client"', 'kind = "mesh"'),
        text.replace("secret =", "secrets ="),
        text.replace("secret =", 'role = "admin"\nsecret ='),
        "\0\xff",
    ):
        path.write_text(damaged)
        with pytest.raises(UsageError, match=r"admin\.key") as e:
            load_client(path)
        assert secret[:16] not in str(e.value)
    with pytest.raises(UsageError, match="no key"):
        load_client(tmp_path / "absent.key")


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    client = init_mesh(tmp_path)
    (tmp_path / "data").mkdir()
    node = load_node(tmp_path, tmp_path / "data")
    shown = repr(client) + repr(node) + str(client) + f"{node}"
    for pair in (client.pair, node.own, node.mesh.pair):
        for form in forms(pair):
            assert form.decode("latin-1") not in shown
        assert repr(pair.secret) not in shown


def forms(pair: KeyPair) -> list[bytes]:
    """How a secret key could be written."""
    return [pair.secret.hex().encode(), z85.encode(pair.secret), pair.secret]


def test_the_meshs_public_key_is_in_every_key_of_it(tmp_path: Path) -> None:
    admin = init_mesh(tmp_path)
    assert {load_mesh_public(tmp_path / n) for n in ("", "mesh.key", "admin.key")} == {admin.mesh}


def test_public_keys_are_64_hex_digits() -> None:
    assert parse_public("ab" * 32) == b"\xab" * 32
    for text in ("", "ab" * 31, "ab" * 33, "zz" * 32):
        with pytest.raises(UsageError, match="64 hex"):
            parse_public(text)


def test_the_clients_key_is_what_was_said_or_else_the_first_found(tmp_path: Path) -> None:
    here, home = tmp_path / "here.key", tmp_path / "home.key"
    assert find_client_key(None, {}, [here, home]) is None
    home.touch()
    assert find_client_key(None, {}, [here, home]) == home
    here.touch()
    assert find_client_key(None, {}, [here, home]) == here
    assert find_client_key(None, {"VSTACK_KEY": "x.key"}, [here, home]) == Path("x.key")
    assert find_client_key("y.key", {"VSTACK_KEY": "x.key"}, [here, home]) == Path("y.key")
    assert find_client_key("none", {"VSTACK_KEY": "x.key"}, [here, home]) is None


def test_each_node_has_its_own_key() -> None:
    """A copy of a data directory that becomes another node must not take the original's place."""
    one, two = Member("1" * 32, "a:1", key=bytes(32)), Member("2" * 32, "b:1", key=bytes(32))
    with pytest.raises(ChangeRefused, match="member with that key"):
        successor(View((Config(1, (one,), 1),)), AddMember(two))


# -- a mesh with keys -----------------------------------------------------------------------------


@dataclass
class Secured:
    """A mesh with keys, and whatever was said around it."""

    mesh: LocalMesh
    folder: Path
    film: Path
    outputs: list[str] = field(default_factory=list)

    def vstack(self, *words: str | Path, key: Path | None = None) -> tuple[int, str, str]:
        """Exit code, stdout, stderr of one command with the admin's key, or another."""
        done = vstack(*words, peers=",".join(self.mesh.peers), key=key or self.mesh.client_key)
        self.outputs += [done.out, done.err]
        assert "Traceback" not in done.err, done
        return done.code, done.out, done.err

    def new_key(self, name: str) -> Path:
        """A key of this mesh that nobody has authorised."""
        assert self.mesh.keys is not None
        new_client(self.folder / f"{name}.key", load_mesh_public(self.mesh.keys), name)
        return self.folder / f"{name}.key"

    def authorised(self, name: str, role: str) -> Path:
        """A key that the mesh has given a role."""
        key = self.new_key(name)
        public = load_client(key).pair.public.hex()
        code, out, err = self.vstack("keys", "authorise", public, "--role", role, "--name", name)
        assert code == 0, (out, err)
        epoch = int(re.findall(r"epoch (\d+)", out)[0])
        wait_for(lambda: all(e >= epoch for e in self.epochs()))
        return key

    def epochs(self) -> list[int]:
        """What every node has adopted."""

        async def ask(client: MeshClient) -> list[int]:
            return [(await client.status(n)).epoch for n in client.config.nodes]

        return with_client(self.mesh, ask)

    def counters(self) -> dict[str, int]:
        """Of all nodes together, as `vstack status` has them."""
        status = vstack("status", "--json", peers=",".join(self.mesh.peers), key=self.mesh.client_key).json
        counters = status["counters"]
        assert isinstance(counters, dict)
        return counters

    def count(self, name: str) -> int:
        return self.counters().get(name, 0)

    def logged(self, *words: str) -> list[tuple[str, str]]:
        """Lines of the nodes' logs that have all `words`, with the log's name."""
        return [
            (node.log.name, line)
            for node in self.mesh.nodes
            for line in node.log.read_text().splitlines()
            if all(word in line for word in words)
        ]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, film: Path) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    with running_mesh(folder / "mesh", 3, keys=folder / "keys") as mesh:
        yield Secured(mesh, folder, film)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    make_sample(path, seconds=9, size=(320, 180))
    return path


pytestmark = pytest.mark.processes


def quickly(began: float) -> bool:
    return monotonic() - began < QUICK


def test_a_video_is_stored_and_played_and_fetched(secured: Secured, tmp_path: Path) -> None:
    code, out, err = secured.vstack("put", secured.film, "--title", "film")
    assert code == 0, err
    assert secured.vstack("play", "film", "--speed", "8")[0] == 0
    assert secured.vstack("get", "film", "-o", tmp_path / "copy.mp4")[0] == 0
    code, out, err = secured.vstack("keys", "list")
    assert len(re.findall(r"(?m)^[0-9a-f]{8}  node ", out)) == 3, out
    assert len(re.findall(r"(?m)^[0-9a-f]{8}  admin  admin$", out)) == 1, out


def test_a_client_without_a_key_is_told_so_at_once(secured: Secured) -> None:
    began = monotonic()
    done = vstack("ls", peers=secured.mesh.peers[0])
    assert quickly(began)
    done.failed_with(2, "--keys")


def test_a_client_with_an_unknown_key_is_refused_counted_and_logged_once(secured: Secured) -> None:
    key = secured.new_key("stranger")
    public = load_client(key).pair.public
    before = secured.count("keys.refused.unknown")
    for _ in range(2):
        began = monotonic()
        code, _, err = secured.vstack("ls", key=key)
        assert quickly(began)
        assert code == 2
        assert f"vstack keys authorise {public.hex()}" in err
    wait_for(lambda: secured.count("keys.refused.unknown") >= before + 6)
    assert secured.count("keys.refused") >= secured.count("keys.refused.unknown")
    lines = secured.logged(short(public), "not one of this mesh's")
    assert sorted(name for name, _ in lines) == sorted(n.log.name for n in secured.mesh.nodes)
    assert "refused for their keys: " in secured.vstack("status")[1]


def test_a_client_of_another_mesh_is_refused_and_counted(secured: Secured, tmp_path: Path) -> None:
    init_mesh(tmp_path / "other")
    before = secured.count("keys.refused.other_mesh")
    began = monotonic()
    code, _, err = secured.vstack("ls", key=tmp_path / "other" / "admin.key")
    assert quickly(began)
    assert code == 2
    assert "another mesh" in err
    assert secured.count("keys.refused.other_mesh") > before
    assert len({name for name, _ in secured.logged("key of another mesh")}) == len(
        secured.logged("key of another mesh")
    )


def test_a_client_with_a_key_is_told_at_once_that_a_mesh_uses_none(tmp_path: Path) -> None:
    init_mesh(tmp_path / "keys")
    with running_mesh(tmp_path / "plain", 1) as plain:
        began = monotonic()
        done = vstack("ls", peers=plain.peers[0], key=tmp_path / "keys" / "admin.key")
        assert quickly(began)
        done.failed_with(2, "uses no keys", "--keys none")


@pytest.mark.parametrize("whose", ["nobody's", "another mesh's"])
def test_a_node_that_does_not_hold_the_mesh_key_does_not_come_in(
    secured: Secured, tmp_path: Path, whose: str
) -> None:
    counter = "keys.refused.plain" if whose == "nobody's" else "keys.refused.other_mesh"
    before = secured.count(counter)
    options: tuple[str, ...] = ()
    if whose == "another mesh's":
        init_mesh(tmp_path / "other")
        options = ("--keys", str(tmp_path / "other"))
    address = f"127.0.0.1:{free_port(1)}"
    node = LocalNode(9, address, tmp_path / "node", tmp_path / "node.log")
    node.start([*secured.mesh.peers, address], detach=False, extra=options)
    try:
        wait_for(lambda: "refuses this node" in node.log.read_text())
        wait_for(lambda: secured.count(counter) > before, within=40.0)
        assert not node.is_ready()
    finally:
        node.stop()
    assert len(with_client(secured.mesh, members)) == 3


async def members(client: MeshClient) -> tuple[str, ...]:
    return client.config.nodes


def test_a_node_that_others_may_read_the_key_of_does_not_start(tmp_path: Path) -> None:
    init_mesh(tmp_path / "keys")
    (tmp_path / "keys" / "mesh.key").chmod(0o644)
    address = f"127.0.0.1:{free_port(1)}"
    node = LocalNode(1, address, tmp_path / "node", tmp_path / "node.log")
    node.start([address], detach=False, extra=("--keys", str(tmp_path / "keys")))
    wait_for(lambda: not node.alive)
    assert node.stop() == 2
    assert "chmod 600" in node.last_words()


def test_a_reader_that_writes_is_refused_counted_and_logged_once(secured: Secured) -> None:
    secured.vstack("put", secured.film, "--title", "film")
    key = secured.authorised("rita", "reader")
    assert secured.vstack("ls", key=key)[0] == 0
    assert secured.vstack("play", "film", "--speed", "8", key=key)[0] == 0
    before = secured.count("keys.forbidden")
    began = monotonic()
    for words in (("put", secured.film, "--title", "hers"), ("rm", "film")):
        code, _, err = secured.vstack(*words, key=key)
        assert code == 2
        assert "needs the role writer" in err
    assert monotonic() - began < 3 * QUICK
    assert secured.count("keys.forbidden") > before
    lines = secured.logged(short(load_client(key).pair.public), "Submit refused", "reader rita")
    assert 0 < len(lines) == len({name for name, _ in lines})
    assert "film" in secured.vstack("ls")[1]


def test_a_writer_that_changes_who_may_do_what_is_refused(secured: Secured) -> None:
    key = secured.authorised("will", "writer")
    assert secured.vstack("put", secured.film, "--title", "film", key=key)[0] == 0
    before = secured.count("keys.forbidden"), secured.epochs()
    for words in (("authorise", "ab" * 32, "--role", "admin"), ("revoke", "admin")):
        code, _, err = secured.vstack("keys", *words, key=key)
        assert code == 2
        assert "needs the role admin" in err
    assert secured.count("keys.forbidden") >= before[0] + 2
    assert secured.epochs() == before[1]
    assert secured.logged(short(load_client(key).pair.public), "ChangeMesh refused", "writer will")


async def status_without_end(client: MeshClient, node: str) -> None:
    while True:
        await client.status(node)


def test_a_revocation_counts_from_the_next_message_of_an_open_connection(secured: Secured) -> None:
    key = secured.authorised("rob", "writer")
    public = load_client(key).pair.public

    async def run() -> None:
        async with connect(secured.mesh.peers, keys=key) as his:
            nodes = his.config.nodes
            for node in nodes:
                await his.status(node)  # connections to all of them
            async with connect(secured.mesh.peers, keys=secured.mesh.client_key) as admin:
                await admin.change_mesh(Revoke(public))
            async with asyncio.timeout(10.0):
                for node in nodes:
                    with pytest.raises(Refused, match="revoked") as e:
                        await status_without_end(his, node)
                    assert e.value.code == "forbidden"
            with pytest.raises(Refused, match="revoked"):
                await his.read("video/" + "a" * 64)
        with pytest.raises(KeyRefused, match="revoked"):
            async with connect(secured.mesh.peers, keys=key):
                pass

    asyncio.run(run())
    assert secured.count("keys.refused.revoked") > 0
    lines = secured.logged(short(public), "GetStatus refused", "revoked")
    assert sorted(name for name, _ in lines) == sorted(n.log.name for n in secured.mesh.nodes)
    assert secured.logged(short(public), "a connection from", "was revoked")
    assert "rob" not in secured.vstack("keys", "list")[1]


def test_a_change_of_a_mesh_that_has_moved_on_is_made_all_the_same(secured: Secured) -> None:
    """Two admins at once: one of them has to look again, and both get what they asked for."""
    one, two = new_pair().public, new_pair().public

    async def run() -> tuple[int, int]:
        async with (
            connect(secured.mesh.peers, keys=secured.mesh.client_key) as first,
            connect(secured.mesh.peers, keys=secured.mesh.client_key) as second,
        ):
            begun = first.config.epoch
            epochs = await asyncio.gather(
                first.change_mesh(Authorise(Grant(one, "reader", "one"))),
                second.change_mesh(Authorise(Grant(two, "reader", "two"))),
            )
            assert min(epochs) > begun
            again = await second.change_mesh(Authorise(Grant(two, "reader", "two")))
            assert again >= epochs[1]
            return epochs[0], epochs[1]

    epochs = asyncio.run(run())
    assert epochs[0] != epochs[1]
    listed = secured.vstack("keys", "list")[1]
    assert short(one) in listed
    assert short(two) in listed
    for name in ("one", short(two)):
        assert secured.vstack("keys", "revoke", name)[0] == 0


def test_the_last_admin_stays(secured: Secured) -> None:
    code, _, err = secured.vstack("keys", "revoke", "admin")
    assert code == 1
    assert "last admin" in err


@asynccontextmanager
async def speaking(secured: Secured, pair: KeyPair, hello: Hello) -> AsyncIterator[zmq.asyncio.Socket]:
    """A raw connection to the first node, its hello said."""
    assert secured.mesh.keys is not None
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    speak_as(dealer, pair, load_mesh_public(secured.mesh.keys))
    dealer.connect(endpoint(secured.mesh.peers[0], Lane.CONTROL))
    try:
        await dealer.send_multipart([bytes(8), encode(Header(hello))])
        yield dealer
    finally:
        dealer.close(0)
        context.term()


async def answer(dealer: zmq.asyncio.Socket) -> Body:
    async with asyncio.timeout(10.0):
        return decode((await dealer.recv_multipart())[1]).body


def test_the_mesh_key_alone_makes_nobody_a_member(secured: Secured) -> None:
    """Else whoever joins could vote for others, or have their votes retired by a higher boot."""
    assert secured.mesh.keys is not None
    mesh = load_mesh(secured.mesh.keys).pair
    other = secured.mesh.nodes[1].node

    async def run() -> None:
        hello = Hello(PROTOCOL_VERSION, "", "node", other, 1 << 40)
        async with speaking(secured, mesh, hello) as dealer:
            assert isinstance(await answer(dealer), Hello), "a stranger is heard"
            await dealer.send_multipart([bytes(8), encode(Header(Envelope(()), 1000))])
            refused = await answer(dealer)
            assert isinstance(refused, Failure)
            assert refused.code == "forbidden"

    asyncio.run(run())
    assert secured.vstack("status")[0] == 0
    assert all(node.alive for node in secured.mesh.nodes)


def test_a_client_that_says_it_is_a_node_is_refused(secured: Secured) -> None:
    assert secured.mesh.client_key is not None
    admin = load_client(secured.mesh.client_key).pair

    async def run() -> None:
        hello = Hello(PROTOCOL_VERSION, "", "node", secured.mesh.nodes[1].node, 1 << 40)
        async with speaking(secured, admin, hello) as dealer:
            refused = await answer(dealer)
            assert isinstance(refused, Failure)
            assert (refused.code, "client's" in refused.text) == ("forbidden", True)

    asyncio.run(run())


def test_a_node_with_the_mesh_key_joins_and_is_known_by_its_own(secured: Secured, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port(1)}"
    node = LocalNode(9, address, tmp_path / "node", tmp_path / "node.log")
    peers = [*secured.mesh.peers, address]
    node.start(peers, detach=False, extra=secured.mesh.options)
    try:
        node.wait_ready()
        node.kill()
        node.start(peers, detach=False, extra=secured.mesh.options)
        node.wait_ready()
        wait_for(lambda: node.node in with_client(secured.mesh, members))
        wait_for(lambda: "up" in node_states(secured, node.node))
        public = load_node(secured.mesh.keys or tmp_path, node.data).own.public
        assert re.search(rf"(?m)^{short(public)}  node +{node.node[:8]}$", secured.vstack("keys", "list")[1])
        node.stop()
        node.start(peers, detach=False)
        wait_for(lambda: not node.alive)
        assert node.stop() == 2
        assert "start the node with --keys" in node.last_words()
    finally:
        node.stop()


def test_a_node_that_was_removed_while_it_was_down_learns_it_as_a_stranger(tmp_path: Path) -> None:
    """Its own key is not admitted any more; with the mesh's it may still learn what happened."""
    with running_mesh(tmp_path / "mesh", 3, keys=tmp_path / "keys") as mesh:
        gone, *others = reversed(mesh.nodes)
        gone.stop()
        wait_for(lambda: "down" in states(mesh, others[0], gone.node))

        async def remove(client: MeshClient) -> None:
            await client.change_mesh(RemoveMember(gone.node))

        with_client(mesh, remove)
        wait_for(lambda: with_client(mesh, moving).done, within=40.0)
        gone.start(mesh.peers, detach=False, extra=mesh.options)
        wait_for(lambda: not gone.alive, within=40.0)
        assert gone.stop() == 0
        assert "was removed from the mesh" in gone.last_words()
        assert all(node.alive for node in others)
        key = load_node(tmp_path / "keys", gone.data).own.public
        gone.start(mesh.peers, detach=False, extra=(*mesh.options, "--rejoin"))
        gone.wait_ready()
        assert load_node(tmp_path / "keys", gone.data).own.public != key, "another node, with another key"


def states(mesh: LocalMesh, asked: LocalNode, node: str) -> list[str]:
    """How one node sees another."""

    async def ask(client: MeshClient) -> list[str]:
        return [p.state for p in (await client.status(asked.node)).peers if p.node == node]

    return with_client(mesh, ask)


def node_states(secured: Secured, node: str) -> list[str]:
    """How the nodes of the mesh see one."""

    async def ask(client: MeshClient) -> list[str]:
        seen = [await client.status(n.node) for n in secured.mesh.nodes]
        return [p.state for s in seen for p in s.peers if p.node == node]

    return with_client(secured.mesh, ask)


def test_nodes_come_back_with_their_keys(tmp_path: Path) -> None:
    with running_mesh(tmp_path / "mesh", 3, keys=tmp_path / "keys") as mesh:
        first = with_client(mesh, members)
        mesh.stop()
        mesh.start()
        assert with_client(mesh, members) == first
        status = vstack("status", "--json", peers=mesh.peers[0], key=mesh.client_key)
        assert status.code == 0
        counters = status.json["counters"]
        assert isinstance(counters, dict)
        assert counters.get("keys.refused", 0) == counters.get("keys.forbidden", 0) == 0


def test_up_makes_keys_and_the_next_command_finds_them(tmp_path: Path, film: Path) -> None:
    port = str(free_port(3))
    done = vstack("up", "3", "--detach", "--port", port, cwd=tmp_path)
    try:
        assert done.code == 0, done
        for path in (".vstack/keys/mesh.key", ".vstack/keys/admin.key", ".vstack/node-1/node.key"):
            assert mode(tmp_path / path) == 0o600
        assert vstack("put", film, "--title", "film", cwd=tmp_path).code == 0
        assert vstack("play", "film", "--speed", "8", cwd=tmp_path).code == 0
        vstack("ls", "--keys", "none", cwd=tmp_path).failed_with(2, "--keys")
        assert vstack("down", cwd=tmp_path).code == 0
        vstack("up", "--insecure", cwd=tmp_path).failed_with(2, "--insecure")
        assert vstack("up", "--detach", cwd=tmp_path).code == 0, "the same mesh, with the same keys"
        assert "film" in vstack("ls", cwd=tmp_path).out
    finally:
        vstack("down", cwd=tmp_path)


def test_up_without_keys_stays_without(tmp_path: Path) -> None:
    port = str(free_port(1))
    try:
        assert vstack("up", "1", "--detach", "--insecure", "--port", port, cwd=tmp_path).code == 0
        assert vstack("ls", cwd=tmp_path).code == 0
        assert vstack("down", cwd=tmp_path).code == 0
        assert vstack("up", "--detach", cwd=tmp_path).code == 0
        assert vstack("ls", cwd=tmp_path).code == 0
        assert "no keys" in vstack("keys", "list", cwd=tmp_path).out
        assert not list(tmp_path.rglob("*.key"))
    finally:
        vstack("down", cwd=tmp_path)


# -- on the wire ----------------------------------------------------------------------------------


class Tap:
    """Passes TCP on to `target` and keeps all that came by, in both directions."""

    def __init__(self, target: int) -> None:
        self.heard = bytearray()
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> None:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", port)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            writer.close()
            far_writer.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.heard += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def overheard(mesh: LocalMesh) -> bytes:
    """What a client that opens a register with a title, and lists it, shows on the wire."""

    async def run() -> bytes:
        port = free_port(len(mesh.peers))
        taps = {}
        for i, peer in enumerate(mesh.peers):
            for lane in (0, 1):
                tap = Tap(mesh.port + 2 * i + lane)
                await tap.start(port + 2 * i + lane)
                taps[peer, lane] = tap
        relayed = {peer: f"127.0.0.1:{port + 2 * i}" for i, peer in enumerate(mesh.peers)}
        try:
            async with connect(mesh.peers, address_map=relayed, keys=mesh.client_key) as client:
                key = "video/" + os.urandom(32).hex()
                await client.change(Change(key, 0, TITLE.encode()))
                assert (await client.read(key)).data == TITLE.encode()
        finally:
            for tap in taps.values():
                await tap.stop()
        return b"".join(bytes(tap.heard) for tap in taps.values())

    return asyncio.run(run())


def test_what_travels_can_be_read_without_keys_and_not_with_them(tmp_path: Path, secured: Secured) -> None:
    with running_mesh(tmp_path / "plain", 1) as plain:
        heard = overheard(plain)
        assert TITLE.encode() in heard
        assert b"video/" in heard
    heard = overheard(secured.mesh)
    assert len(heard) > 1000
    assert TITLE.encode() not in heard
    assert b"video/" not in heard
    assert b"CURVE" in heard


def test_no_secret_is_in_any_log_or_output(secured: Secured) -> None:
    """After all that was said and refused above."""
    for words in (("status",), ("nodes",), ("keys", "list")):
        secured.vstack(*words)
        secured.vstack(*words, "--json")
    said = "\n".join(secured.outputs).encode()
    said += b"".join(p.read_bytes() for p in secured.folder.rglob("*") if p.suffix in (".log", ".json"))
    pairs = [load_mesh(secured.folder / "keys").pair]
    pairs += [load_client(p).pair for p in secured.folder.glob("*.key")]
    pairs += [load_client(secured.folder / "keys" / "admin.key").pair]
    pairs += [load_node(secured.folder / "keys", n.data).own for n in secured.mesh.nodes]
    assert len(pairs) >= 5
    for pair in pairs:
        for form in forms(pair):
            assert form not in said
    assert short(pairs[-1].public).encode() in said, "public keys are shown: this looks where they would be"
