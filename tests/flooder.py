"""A peer that talks nonsense as fast as a share of one core lets it: a program of its own.

    python -m tests.flooder PORT --share 0.2 --seconds 5 --seed 1 [--key FILE] [--spin]

Without a key it writes ZMTP 3.1 (rfc.zeromq.org/spec/23) by hand, which costs it least; with one, it is
a ZeroMQ DEALER that speaks CURVE. It disconnects at random, at any byte. `--spin` uses the same processor
time for nothing: what the flood is compared with. One line of JSON says what it did.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import zmq

from vstack.mesh.keys import load_client
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    GetStatus,
    Header,
    Hello,
    Ping,
    Pong,
    Stored,
    Submit,
    encode,
)
from vstack.mesh.sockets import Lane, endpoint, set_options, speak_as

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
HELLO = Hello(PROTOCOL_VERSION, "", "client")
PER_CHUNK = 100
"""Messages in one write."""
NO_REPLY = bytes(8)


def frame(body: bytes, *, more: bool = False, command: bool = False) -> bytes:
    """One ZMTP frame."""
    flags = more | (len(body) > 255) << 1 | command << 2
    return bytes([flags]) + len(body).to_bytes(8 if len(body) > 255 else 1) + body


def ready(kind: bytes = b"DEALER") -> bytes:
    """The command that ends the handshake of mechanism NULL."""
    return frame(b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4) + kind, command=True)


def message(*parts: bytes) -> bytes:
    """One ZMTP message."""
    return b"".join(frame(part, more=i + 1 < len(parts)) for i, part in enumerate(parts))


def shake_hands(s: socket.socket) -> None:
    """Greets as a DEALER with the mechanism NULL, and returns once the far side has greeted back."""
    s.sendall(GREETING + ready())
    got = b""
    while len(got) < len(GREETING) + 2 or len(got) < len(GREETING) + 2 + got[len(GREETING) + 1]:
        more = s.recv(1024)
        if not more:
            raise ConnectionError("it hung up during the handshake")
        got += more


def malformed(rng: Random) -> list[bytes]:
    """The parts of a message that no node can make sense of."""
    valid = encode(Header(rng.choice((Ping(1, ()), HELLO, Submit(()), GetStatus(), Pong(1, ()))), 1000))
    number = rng.randbytes(8)
    kind = rng.randrange(6)
    if kind == 0:
        return [rng.randbytes(rng.choice((0, 1, 7, 9))), valid]
    if kind == 1:
        return [number]
    if kind == 2:
        return [number, b"\xc1" + rng.randbytes(rng.randrange(100))]  # 0xc1 begins nothing in msgpack
    if kind == 3:
        return [number, valid[: rng.randrange(len(valid) - 1)]]
    if kind == 4:
        return [number, valid + rng.randbytes(rng.randint(1, 20))]
    return [number, valid, b"", *([b"x"] * rng.randint(1, 5))]


def useless(rng: Random) -> list[bytes]:
    """Malformed, or well formed and out of place: an answer, or what needs a hello."""
    if rng.random() < 0.9:
        return malformed(rng)
    return [rng.randbytes(8), encode(Header(rng.choice((Stored(True), Submit(()), GetStatus())), 1000))]


class Throttle:
    """Holds this process to a share of one core."""

    def __init__(self, share: float, seconds: float) -> None:
        self._share = share
        self._began = time.monotonic()
        self._cpu = time.process_time()
        self._until = self._began + seconds

    def turns(self) -> Iterator[None]:
        """Again and again, until the time is over."""
        while (now := time.monotonic()) < self._until:
            ahead = self.used - self._share * (now - self._began)
            if ahead > 0:
                time.sleep(min(ahead / self._share, self._until - now))
            yield

    @property
    def used(self) -> float:
        """Seconds of processor time."""
        return time.process_time() - self._cpu

    @property
    def over(self) -> float:
        """Seconds that it took."""
        return time.monotonic() - self._began


def spin(throttle: Throttle) -> Counter[str]:
    """Uses the processor, and nothing else."""
    for _ in throttle.turns():
        sum(range(5000))
    return Counter()


def flood_by_hand(port: int, rng: Random, throttle: Throttle, mean: int) -> Counter[str]:
    """Over plain TCP. `mean`: messages of one connection, if it is not hung up on before."""
    counts: Counter[str] = Counter()
    chunks = [b"".join(message(*useless(rng)) for _ in range(PER_CHUNK)) for _ in range(200)]
    s: socket.socket | None = None
    left = 0
    for _ in throttle.turns():
        try:
            if s is None:
                s = socket.create_connection(("127.0.0.1", port), timeout=5)
                counts["connections"] += 1
                left = round(rng.expovariate(1 / mean))
                shake_hands(s)
            chunk = rng.choice(chunks)
            if left < PER_CHUNK:
                s.sendall(chunk[: rng.randrange(len(chunk))])
                if rng.random() < 0.5:  # reset, instead of an orderly end
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                s.close()
                s = None
                counts["disconnects"] += 1
                counts["messages"] += left
            else:
                s.sendall(chunk)
                left -= PER_CHUNK
                counts["messages"] += PER_CHUNK
        except TimeoutError:
            counts["blocked"] += 1
        except OSError:
            counts["hung_up"] += 1
            if s is not None:
                s.close()
            s = None
    if s is not None:
        s.close()
    return counts


def flood_with_key(port: int, key: Path, rng: Random, throttle: Throttle, mean: int) -> Counter[str]:
    """As a client of the mesh, with CURVE."""
    counts: Counter[str] = Counter()
    client = load_client(key)
    parts = [useless(rng) for _ in range(20_000)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer: zmq.Socket[bytes] | None = None
    left = 0
    for _ in throttle.turns():
        if dealer is None:
            dealer = context.socket(zmq.DEALER)
            set_options(dealer, Lane.CONTROL)
            dealer.sndtimeo = 500
            speak_as(dealer, client.pair, client.mesh)
            dealer.connect(endpoint(f"127.0.0.1:{port}", Lane.CONTROL))
            counts["connections"] += 1
            left = round(rng.expovariate(1 / mean))
        try:
            for _ in range(min(left, PER_CHUNK)):
                dealer.send_multipart(rng.choice(parts))
                left -= 1
                counts["messages"] += 1
        except zmq.Again:
            counts["blocked"] += 1
        if left <= 0:
            dealer.close(100)  # with 0, libzmq may assert: half a message is left when the far side hangs up
            dealer = None
            counts["disconnects"] += 1
    if dealer is not None:
        dealer.close(100)
    context.term()
    return counts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("port", type=int)
    p.add_argument("--share", type=float, default=0.2, help="of one core")
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--mean", type=int, default=1000, help="messages between two disconnects")
    p.add_argument("--key", type=Path)
    p.add_argument("--spin", action="store_true")
    options = p.parse_args()
    rng = Random(options.seed)
    throttle = Throttle(options.share, options.seconds)
    if options.spin:
        counts = spin(throttle)
    elif options.key:
        counts = flood_with_key(options.port, options.key, rng, throttle, options.mean)
    else:
        counts = flood_by_hand(options.port, rng, throttle, options.mean)
    json.dump({**counts, "share": round(throttle.used / throttle.over, 3)}, sys.stdout)
    print(flush=True)


if __name__ == "__main__":
    main()
