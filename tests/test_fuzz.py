"""What strangers may send: to the decoder, and to the ports of a node that runs.

The decoder raises DecodeError and nothing else. The node goes on serving, does not grow, has no
traceback in its log, and counts what it dropped. Each batch comes from a seed that is printed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from vstack.errors import VstackError
from vstack.local import LocalMesh, free_port
from vstack.mesh.keys import KeyPair, MeshKey, NodeKeys, new_pair
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Ballot,
    Body,
    Chain,
    Envelope,
    Failure,
    GetStatus,
    Header,
    Hello,
    HelloRequired,
    Ping,
    Pong,
    Status,
    Stored,
    Submit,
    decode,
    encode,
)
from vstack.mesh.sockets import Lane
from vstack.mesh.transport import Incoming, Transport

from .cluster import running_mesh, wait_for, with_client
from .flooder import GREETING, HELLO, frame, malformed, message, ready, shake_hands
from .test_messages import BODIES, KEY, NODE, headers

SEED = int(os.environ.get("VSTACK_SEED", time.time_ns() % 100_000))
MOST_GROWTH = 256 << 20
"""Bytes by which a node may grow through one batch. A message without an end comes as fast as loopback is,
until the next look at it."""


# -- the decoder ----------------------------------------------------------------------------------


def is_rejected(raw: bytes) -> bool:
    """True for a DecodeError; anything else that is raised fails the test."""
    try:
        decode(raw)
    except msgspec.DecodeError:
        return True
    return False


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data(), st.integers(0, 1 << 32))
@pytest.mark.parametrize("body", BODIES, ids=lambda t: t.__name__)
def test_a_mutated_message_of_any_kind_is_a_decode_error_or_a_message(
    body: type, data: st.DataObject, seed: int
) -> None:
    rng = Random(seed)
    raw = encode(Header(data.draw(BODIES[body])))
    for _ in range(20):
        is_rejected(mutated(raw, rng))


def mutated(raw: bytes, rng: Random) -> bytes:
    """Bytes replaced, inserted, removed, doubled; lengths made huge; values nested."""
    out = bytearray(raw)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del out[at : at + rng.randint(1, 9)]
        elif kind == 3:
            out[at:at] = out[: rng.randint(0, 50)]
        elif kind == 4:  # array, map, text, bytes or extension of four thousand million
            out[at : at + 1] = bytes([rng.choice((0xDD, 0xDF, 0xDB, 0xC6, 0xC9))]) + b"\xff" * 4
        else:
            out[at:at] = bytes([rng.choice((0x91, 0x81, 0xDC))]) * rng.choice((1, 100, 5000))
    return bytes(out)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(headers, headers, st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_head_of_one_message_and_the_tail_of_another_are_a_decode_error_or_a_message(
    a: Header, b: Header, cut_a: int, cut_b: int
) -> None:
    one, other = encode(a), encode(b)
    is_rejected(one[: cut_a % len(one)] + other[cut_b % len(other) :])


def test_a_length_that_is_not_there_costs_no_memory() -> None:
    """A billion items announced in nine bytes, in each place that holds a list."""
    code = (
        "import resource, msgspec; from vstack.mesh.messages import decode\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        "for tag in range(1, 40):\n"
        "    for opcode in (0xdd, 0xdf, 0xdb, 0xc6, 0xc9):\n"
        "        for fields in range(1, 10):\n"
        "            raw = bytes([0x91, 0x90 + fields + 1, tag]) + b'\\1' * (fields - 1)\n"
        "            try: decode(raw + bytes([opcode, 0x3b, 0x9a, 0xca, 0, 1, 1]))\n"
        "            except msgspec.DecodeError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import atheris"], capture_output=True, check=False).returncode
    != 0,
    reason="atheris is not installed: pip install atheris",
)
def test_a_fuzzer_finds_nothing_in_its_time(tmp_path: Path) -> None:
    seconds = os.environ.get("VSTACK_FUZZ", "20")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_decoder", f"-max_total_time={seconds}", "-verbosity=0",
         f"-artifact_prefix={tmp_path}/", f"-seed={SEED + 1}"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# -- a node that runs -----------------------------------------------------------------------------

processes = pytest.mark.processes


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), 3) as mesh:
        yield mesh


def resident(mesh: LocalMesh) -> int:
    """Bytes of memory of the first node's process."""
    process = mesh.nodes[0].process
    assert process is not None
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counters(mesh: LocalMesh) -> dict[str, int]:
    """Of the first node, once it answers."""
    found: list[Status] = []

    async def ask(client: MeshClient) -> Status:
        return await client.status(mesh.nodes[0].node)

    def answers() -> bool:
        try:
            found.append(with_client(mesh, ask))
        except VstackError:
            return False
        return True

    wait_for(answers)
    return found[0].counters


@pytest.fixture
def unharmed(request: pytest.FixtureRequest) -> Iterator[LocalMesh]:
    """The mesh; afterwards it must be as well as before."""
    mesh: LocalMesh = request.getfixturevalue("mesh")
    counters(mesh)
    before = resident(mesh)
    print(f"VSTACK_SEED={SEED}")
    yield mesh

    async def put_and_read(client: MeshClient) -> None:
        key = f"video/{os.urandom(32).hex()}"
        await client.change(Change(key, 0, b"still here"))
        assert (await client.read(key)).data == b"still here"

    counters(mesh)
    with_client(mesh, put_and_read)
    assert all(n.alive for n in mesh.nodes)
    assert resident(mesh) < before + MOST_GROWTH
    for node in mesh.nodes:
        assert "Traceback" not in node.log.read_text()


def call(mesh: LocalMesh, lane: int = 0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", mesh.port + lane), timeout=10)


def greeted(mesh: LocalMesh, lane: int = 0) -> socket.socket:
    """After the handshake."""
    s = call(mesh, lane)
    shake_hands(s)
    return s


def send(s: socket.socket, raw: bytes) -> bool:
    """False if the far side has hung up."""
    try:
        s.sendall(raw)
    except OSError:
        return False
    return True


def is_hung_up(s: socket.socket) -> bool:
    """Reads what comes until the end, which must come."""
    try:
        while s.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def dealer(context: zmq.Context[Any], mesh: LocalMesh, lane: Lane = Lane.CONTROL) -> zmq.Socket[bytes]:
    sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.rcvtimeo = 10_000
    sock.connect(f"tcp://127.0.0.1:{mesh.port + (lane is Lane.DATA)}")
    return sock


PLAIN, CURVE = (GREETING.replace(b"NULL\0", name) for name in (b"PLAIN", b"CURVE"))
HUGE = b"\xff" * 4
BROKEN_HANDSHAKES: dict[str, bytes] = {
    "an endless greeting": b"\xff" * 100_000,
    "an unknown mechanism": GREETING.replace(b"NULL", b"EVIL") + ready(),
    "PLAIN": PLAIN + frame(b"\x05HELLO\x01a\x01b", command=True),
    "CURVE without keys": GREETING.replace(b"NULL\0", b"CURVE")
    + frame(b"\x05HELLO" + bytes(194), command=True),
    "an old version": b"\xff" + bytes(8) + b"\x7f\x00" + bytes(100),
    "a message before READY": GREETING + message(bytes(8), b"x"),
    "an unknown command": GREETING + frame(b"\x04EVIL", command=True),
    "a property of four gigabytes": GREETING + frame(b"\x05READY\x0bSocket-Type" + HUGE + b"X", command=True),
    "a frame that is too large": GREETING + ready() + b"\x02" + (1 << 62).to_bytes(8),
    "a socket type that does not fit": GREETING + ready(b"PUB"),
    "reserved flags": GREETING + ready() + b"\xf8\x05hello",
}


@processes
def test_broken_handshakes_end_and_are_counted(unharmed: LocalMesh) -> None:
    before = counters(unharmed).get("handshakes_failed", 0)
    for lane in (0, 1):
        for name, raw in BROKEN_HANDSHAKES.items():
            with call(unharmed, lane) as s:
                send(s, raw)
                assert is_hung_up(s), name
    wait_for(lambda: counters(unharmed).get("handshakes_failed", 0) >= before + len(BROKEN_HANDSHAKES))


@processes
def test_random_bytes_after_a_handshake_do_no_harm(unharmed: LocalMesh) -> None:
    rng = Random(SEED)
    for i in range(200):
        with greeted(unharmed, i % 2) as s:
            send(s, rng.randbytes(rng.choice((1, 10, 100, 5000))))
        with call(unharmed, i % 2) as s:  # libzmq takes what begins so for ZMTP 1.0
            send(s, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)


@processes
def test_connections_that_stop_half_way_end_by_themselves(unharmed: LocalMesh) -> None:
    """Nothing, half a greeting, a greeting without READY: 300 of each at the same time."""
    with ExitStack() as stack:
        held = []
        for raw in (b"", GREETING[:30], GREETING):
            for i in range(300):
                s = stack.enter_context(call(unharmed, i % 2))
                send(s, raw)
                held.append(s)
        counters(unharmed)  # it answers others meanwhile
        assert all(is_hung_up(s) for s in held)


@processes
def test_a_message_without_an_end_is_hung_up_on(unharmed: LocalMesh) -> None:
    """ZeroMQ bounds the size of a part, not the number of parts."""
    before = counters(unharmed).get("hung_up", 0)
    for size in (0, 100, 60_000):
        part = frame(b"x" * size, more=True)
        chunk = part * max(1, (1 << 16) // len(part))
        with greeted(unharmed) as s:
            deadline = time.monotonic() + 30
            while send(s, chunk):
                assert time.monotonic() < deadline, "it lets us go on"
    assert counters(unharmed)["hung_up"] >= before + 3


@processes
def test_a_message_of_very_many_parts_is_dropped(unharmed: LocalMesh) -> None:
    before = counters(unharmed).get("malformed", 0)
    with greeted(unharmed) as s:
        s.sendall(frame(b"", more=True) * 100_000 + frame(b""))
        wait_for(lambda: counters(unharmed).get("malformed", 0) > before)


def test_without_a_key_an_endless_message_ends_at_the_handshake() -> None:
    """With CURVE, strangers do not get as far as to send messages."""
    mesh_pair: KeyPair = new_pair()
    transport = Transport(lambda hello: hello, lambda: HELLO, NodeKeys(MeshKey(mesh_pair, ()), new_pair()))
    port = free_port(1)
    try:
        transport.listen(f"127.0.0.1:{port}")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
            s.sendall(GREETING + ready())
            part = frame(b"x" * 60_000, more=True)
            sent = 0
            while send(s, part):
                sent += len(part)
                assert sent < 64 << 20, "it lets us go on"
        taken: list[Incoming] = []

        def is_counted() -> bool:
            taken.extend(transport.poll(0.01)[0])
            return transport.counters["keys.refused.plain"] > 0

        wait_for(is_counted)
        assert not taken
    finally:
        transport.close()


FULL_AND_RESET = """
import socket, struct, time, zmq
from tests.flooder import frame, message, shake_hands
from vstack.mesh.sockets import Lane, set_options
router = zmq.Context().socket(zmq.ROUTER)
set_options(router, Lane.CONTROL)
port = router.bind_to_random_port("tcp://127.0.0.1")
s = socket.create_connection(("127.0.0.1", port))
shake_hands(s)
ping = frame(bytes([4]) + b"PING" + bytes(2), command=True)
s.sendall((message(bytes(8), b"x") + ping) * 20_000)
assert router.poll(5000)
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
s.close()
until = time.monotonic() + 1.5  # three heartbeats
while time.monotonic() < until:
    if time.monotonic() > until - 0.5 and router.poll(10):
        router.recv_multipart()
print("alive")
"""


def test_a_connection_that_is_reset_while_nobody_reads_from_it_does_not_end_the_process() -> None:
    """libzmq asserts that it does not happen, if there is a high-water mark that stops it from reading."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_AND_RESET],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent, timeout=60,
    )  # fmt: skip
    assert done.stdout == "alive\n", done.stderr


@processes
@pytest.mark.parametrize("lane", Lane)
def test_sequences_of_any_messages_do_no_harm(unharmed: LocalMesh, lane: Lane) -> None:
    """Valid and invalid, requests, answers, and hellos as anybody: by a seeded generator."""
    rng = Random(f"{SEED} {lane}")
    me = unharmed.nodes[1].node
    bodies: list[Body] = [
        HELLO, Hello(PROTOCOL_VERSION, "", "node", "f" * 32, 1), Hello(PROTOCOL_VERSION, "", "node", me, 0),
        Hello(99, "", "client"), Hello(PROTOCOL_VERSION, "e" * 32, "client"), HelloRequired(), GetStatus(),
        Failure("stale", "you are old"), Ping(1, ()), Pong(1, ()), Stored(True), Submit(()),
        Envelope((Accepted(KEY, Ballot(1, 1, NODE, 1)),) * 256), Chain("", ()),
        Envelope(()),
    ]  # fmt: skip
    context: zmq.Context[Any] = zmq.Context()
    try:
        for _ in range(20):
            sock = dealer(context, unharmed, lane)
            sock.send_multipart([bytes(8), encode(Header(HELLO))])
            for _ in range(200):
                if rng.random() < 0.2:
                    sock.send_multipart(malformed(rng))
                    continue
                raw = encode(Header(rng.choice(bodies), rng.choice((0, 1000, 600_000))))
                raw = mutated(raw, rng) if rng.random() < 0.3 else raw
                payload = [rng.randbytes(rng.choice((0, 1, 1000)))] if rng.random() < 0.3 else []
                sock.send_multipart([rng.randbytes(8), raw, *payload])
            sock.recv_multipart()  # at least the first hello is answered
            sock.close()
    finally:
        context.destroy(0)


@processes
def test_answers_instead_of_requests_are_refused_and_counted(unharmed: LocalMesh) -> None:
    before = counters(unharmed).get("malformed", 0)
    context: zmq.Context[Any] = zmq.Context()
    try:
        sock = dealer(context, unharmed)
        sock.send_multipart([bytes(8), encode(Header(HELLO))])
        assert isinstance(decode(sock.recv_multipart()[1]).body, Hello)
        for body in (Stored(True), Chain("", ()), HelloRequired(), Failure("io", "no")):
            sock.send_multipart([b"12345678", encode(Header(body, 1000))])
            number, raw = sock.recv_multipart()
            answer = decode(raw).body
            assert number == b"12345678"
            assert isinstance(answer, Failure)
            assert "not a request" in answer.text
        sock.close()
    finally:
        context.destroy(0)
    assert counters(unharmed)["malformed"] >= before + 4


@processes
def test_hellos_again_and_again_are_answered_and_take_one_session(unharmed: LocalMesh) -> None:
    context: zmq.Context[Any] = zmq.Context()
    try:
        sock = dealer(context, unharmed)
        for _ in range(300):
            sock.send_multipart([bytes(8), encode(Header(HELLO))])
        for _ in range(300):
            assert isinstance(decode(sock.recv_multipart()[1]).body, Hello)
        sock.close()
    finally:
        context.destroy(0)


@processes
def test_a_node_without_a_node_id_is_refused_and_its_gossip_ends_nobody(unharmed: LocalMesh) -> None:
    context: zmq.Context[Any] = zmq.Context()
    try:
        sock = dealer(context, unharmed)
        for name in ("", "x" * 32, "\u0661" * 32, "ab" * 15):
            sock.send_multipart([bytes(8), encode(Header(Hello(PROTOCOL_VERSION, "", "node", name, 1)))])
            if not name:  # what is no NodeId cannot be read, and is dropped
                assert isinstance(decode(sock.recv_multipart()[1]).body, Failure)
            sock.send_multipart([bytes(8), encode(Header(Ping(1, ()), 1000))])
            assert isinstance(decode(sock.recv_multipart()[1]).body, HelloRequired)
        sock.close()
    finally:
        context.destroy(0)


@processes
def test_a_hello_with_the_id_of_another_node_is_refused_and_harms_that_node_not(unharmed: LocalMesh) -> None:
    """The same boot from another process; votes that come after it count for nothing."""
    boots: list[Status] = []

    async def ask(client: MeshClient) -> None:
        boots.append(await client.status(unharmed.nodes[1].node))

    with_client(unharmed, ask)
    other = boots[0]
    context: zmq.Context[Any] = zmq.Context()
    try:
        sock = dealer(context, unharmed)
        hello = Hello(PROTOCOL_VERSION, other.mesh, "node", other.node, other.boot, process=bytes(16))
        sock.send_multipart([bytes(8), encode(Header(hello))])
        answer = decode(sock.recv_multipart()[1]).body
        assert isinstance(answer, Failure)
        assert answer.code == "stale"
        sock.send_multipart([bytes(8), encode(Header(Envelope(()), 1000))])
        assert isinstance(decode(sock.recv_multipart()[1]).body, HelloRequired)
        sock.close()
    finally:
        context.destroy(0)
