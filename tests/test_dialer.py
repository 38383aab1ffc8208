"""A client's connection over real sockets, with a far side made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest
import zmq
import zmq.asyncio

from vstack.local import free_port
from vstack.mesh.dialer import DRAIN, MAX_HELLOS, Dialer, NoAnswer, Refused
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Body,
    Failure,
    GetStatus,
    Header,
    Hello,
    HelloRequired,
    Ping,
    Pong,
    PutPiece,
    WirePieceKey,
    decode,
    encode,
)
from vstack.mesh.sockets import HIGH_WATER, NO_REPLY, Lane

PATIENCE = 5.0
MESH = "ab" * 16


@dataclass
class Heard:
    """One message at the far side."""

    peer: bytes
    number: bytes
    header: Header
    payload: list[bytes]


class Far:
    """A ROUTER that says only what the test tells it to."""

    def __init__(self, context: zmq.asyncio.Context, port: int = 0) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.set(zmq.ROUTER_MANDATORY, 1)
        self.router.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.port = int(self.router.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def hear(self) -> Heard:
        async with asyncio.timeout(PATIENCE):
            peer, number, head, *payload = await self.router.recv_multipart()
        return Heard(peer, number, decode(head), payload)

    async def hear_request(self) -> Heard:
        """The next message that is not the hello of a connection."""
        while True:
            heard = await self.hear()
            if not isinstance(heard.header.body, Hello):
                return heard

    async def say(self, to: Heard, body: Body, *payload: bytes, number: bytes | None = None) -> None:
        parts = [to.peer, to.number if number is None else number, encode(Header(body)), *payload]
        await self.router.send_multipart(parts)


@asynccontextmanager
async def pair(lane: Lane = Lane.CONTROL) -> AsyncIterator[tuple[Far, Dialer]]:
    context = zmq.asyncio.Context()
    far = Far(context)
    address = f"127.0.0.1:{far.port - (lane is Lane.DATA)}"
    dialer = Dialer(context, address, lane, MESH)
    try:
        yield far, dialer
    finally:
        dialer.close()
        far.router.close(0)
        context.destroy(0)
        await asyncio.sleep(0)  # the cancelled tasks end


Test = Callable[[Far, Dialer], Awaitable[None]]


def over_sockets(test: Test) -> Callable[[], None]:
    async def run() -> None:
        async with pair() as (far, dialer):
            await test(far, dialer)

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def asked(dialer: Dialer, body: Body, timeout: float = PATIENCE) -> asyncio.Task[Any]:
    return asyncio.create_task(dialer.request(body, timeout=timeout))


@over_sockets
async def test_a_connection_begins_with_a_hello_that_names_the_mesh(far: Far, dialer: Dialer) -> None:
    request = asked(dialer, Ping(1, ()))
    first = await far.hear()
    assert first.header.body == Hello(PROTOCOL_VERSION, MESH, "client")
    assert first.number == NO_REPLY
    second = await far.hear()
    assert second.header.body == Ping(1, ())
    assert second.number != NO_REPLY
    assert 0 < second.header.budget_ms <= PATIENCE * 1000
    await far.say(second, Pong(2, ()))
    assert (await request).header.body == Pong(2, ())


@over_sockets
async def test_answers_find_their_requests_in_any_order(far: Far, dialer: Dialer) -> None:
    requests = [asked(dialer, Ping(i, ())) for i in range(20)]
    heard = [await far.hear_request() for _ in requests]
    assert len({h.number for h in heard}) == 20
    for h in reversed(heard):
        assert isinstance(h.header.body, Ping)
        await far.say(h, Pong(100 + h.header.body.sequence, ()))
    answers = await asyncio.gather(*requests)
    assert [a.header.body for a in answers] == [Pong(100 + i, ()) for i in range(20)]


def test_payloads_travel_both_ways_beside_the_header() -> None:
    async def run() -> None:
        key = WirePieceKey("a" * 64, (1, 2), 0, 0, (0, "0" * 32, 0, 0))
        payload = bytes(range(256)) * 4096
        async with pair(Lane.DATA) as (far, dialer):
            body = PutPiece(key, 3, 5, 1 << 20, bytes(32))
            request = asyncio.create_task(dialer.request(body, payload, timeout=PATIENCE))
            heard = await far.hear_request()
            assert heard.payload == [payload]
            assert heard.header.body == body
            await far.say(heard, Pong(0, ()), payload[::-1])
            assert bytes((await request).payload) == payload[::-1]

    asyncio.run(run())


@over_sockets
async def test_more_answers_than_one_look_takes_all_arrive(far: Far, dialer: Dialer) -> None:
    requests = [asked(dialer, Ping(i, ())) for i in range(3 * DRAIN)]
    heard = [await far.hear_request() for _ in requests]
    for h in heard:
        assert isinstance(h.header.body, Ping)
        await far.say(h, Pong(h.header.body.sequence, ()))
    answers = await asyncio.gather(*requests)
    assert [a.header.body for a in answers] == [Pong(i, ()) for i in range(3 * DRAIN)]


def test_requests_that_the_socket_has_no_room_for_wait_in_order_unless_given_up() -> None:
    async def run() -> None:
        key = WirePieceKey("a" * 64, (1, 2), 0, 0, (0, "0" * 32, 0, 0))
        many, payload = 5 * HIGH_WATER[Lane.DATA], bytes(256 << 10)
        async with pair(Lane.DATA) as (far, dialer):
            bodies = [PutPiece(key, 3, 5, i, bytes(32)) for i in range(many)]
            requests = [
                asyncio.create_task(dialer.request(body, payload, timeout=6 * PATIENCE)) for body in bodies
            ]
            await asyncio.sleep(0)  # all have been asked, and nobody reads
            assert len(dialer._unsent) > 2
            requests[-2].cancel()
            await asyncio.wait([requests[-2]])
            for i in (*range(many - 2), many - 1):
                heard = await far.hear_request()
                assert heard.header.body == bodies[i]
                await far.say(heard, Pong(i, ()))
                assert (await requests[i]).header.body == Pong(i, ())

    asyncio.run(run())


@over_sockets
async def test_a_node_that_asks_for_a_hello_gets_one_and_then_the_request_again(
    far: Far, dialer: Dialer
) -> None:
    request = asked(dialer, Ping(7, ()))
    heard = await far.hear_request()
    await far.say(heard, HelloRequired())
    hello = await far.hear()
    assert hello.header.body == Hello(PROTOCOL_VERSION, MESH, "client")
    again = await far.hear()
    assert (again.number, again.header.body) == (heard.number, Ping(7, ()))
    await far.say(again, Pong(1, ()))
    assert (await request).header.body == Pong(1, ())


@over_sockets
async def test_a_node_that_asks_for_hellos_without_end_counts_as_silent(far: Far, dialer: Dialer) -> None:
    request = asked(dialer, Ping(7, ()), timeout=0.5)
    times = 0

    async def ask_for_hellos() -> None:
        nonlocal times
        while True:
            await far.say(await far.hear_request(), HelloRequired())
            times += 1

    asking = asyncio.create_task(ask_for_hellos())
    with pytest.raises(NoAnswer):
        await request
    asking.cancel()
    assert times == MAX_HELLOS + 1


@over_sockets
async def test_a_refused_hello_fails_what_waits_with_the_reason(far: Far, dialer: Dialer) -> None:
    """Otherwise every request would be asked for a hello, say it, be refused, and start again."""
    requests = [asked(dialer, Ping(i, ())) for i in range(2)]
    heard = await far.hear_request()
    await far.say(heard, HelloRequired())
    await far.say(heard, Failure("wrong-mesh", "this node is of another mesh"), number=NO_REPLY)
    for request in requests:
        with pytest.raises(Refused, match="another mesh") as e:
            await request
        assert e.value.code == "wrong-mesh"


@over_sockets
async def test_a_failure_is_raised_as_refused_with_its_code(far: Far, dialer: Dialer) -> None:
    request = asked(dialer, GetStatus())
    await far.say(await far.hear_request(), Failure("busy", "come back later"))
    with pytest.raises(Refused, match="come back later") as e:
        await request
    assert e.value.code == "busy"


@over_sockets
async def test_silence_is_no_answer_after_the_timeout_and_not_before(far: Far, dialer: Dialer) -> None:
    began = monotonic()
    with pytest.raises(NoAnswer, match="did not answer within"):
        await dialer.request(Ping(1, ()), timeout=0.3)
    assert 0.29 < monotonic() - began < 2.0
    late = await far.hear_request()
    request = asked(dialer, Ping(2, ()))
    await far.say(late, Pong(1, ()))
    await far.say(await far.hear_request(), Pong(2, ()))
    assert (await request).header.body == Pong(2, ()), "the late answer is not taken for this one's"


@over_sockets
async def test_everything_that_waits_fails_at_once_when_the_far_side_closes(far: Far, dialer: Dialer) -> None:
    requests = [asked(dialer, Ping(i, ()), timeout=60.0) for i in range(5)]
    await far.hear_request()
    far.router.close(0)
    began = monotonic()
    for result in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(result, NoAnswer)
    with pytest.raises(NoAnswer):
        await dialer.request(Ping(9, ()), timeout=60.0)
    assert monotonic() - began < PATIENCE


def test_where_nobody_listens_a_request_fails_at_once() -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        dialer = Dialer(context, f"127.0.0.1:{free_port(1)}", Lane.CONTROL, "")
        began = monotonic()
        for _ in range(3):
            with pytest.raises(NoAnswer, match="nobody answers there"):
                await dialer.request(Ping(1, ()), timeout=60.0)
        assert monotonic() - began < PATIENCE
        dialer.close()
        context.destroy(0)

    asyncio.run(run())


def test_a_connection_comes_back_when_somebody_listens_again() -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        port = free_port(1)
        dialer = Dialer(context, f"127.0.0.1:{port}", Lane.CONTROL, "")
        with pytest.raises(NoAnswer):
            await dialer.request(Ping(1, ()), timeout=60.0)
        far = Far(context, port)
        answered = asyncio.create_task(_answer_pings(far))
        async with asyncio.timeout(10.0):
            while True:
                try:
                    answer = await dialer.request(Ping(2, ()), timeout=2.0)
                    break
                except NoAnswer:
                    await asyncio.sleep(0.01)
        assert answer.header.body == Pong(2, ())
        answered.cancel()
        dialer.close()
        far.router.close(0)
        context.destroy(0)

    asyncio.run(run())


async def _answer_pings(far: Far) -> None:
    while True:
        heard = await far.hear_request()
        assert isinstance(heard.header.body, Ping)
        await far.say(heard, Pong(heard.header.body.sequence, ()))


@over_sockets
async def test_nonsense_is_ignored_and_the_answer_that_follows_is_taken(far: Far, dialer: Dialer) -> None:
    request = asked(dialer, Ping(1, ()))
    heard = await far.hear_request()
    good = encode(Header(Pong(1, ())))
    for parts in (
        [b""],
        [heard.number],
        [heard.number, b""],
        [heard.number, b"\xff" * 50],
        [heard.number, good[:-1]],
        [heard.number, good + b"\0"],
        [heard.number, b"\x91\x93\x04\xa1\xff\xa1a"],
        [heard.number, b"\x91\x93\x05\x01" + b"\x91" * 900_000 + b"\x01"],
        [heard.number, good, b"one payload", b"two payloads"],
        [heard.number[:-1], good],
        [b"\xff" * 8, good],
        [NO_REPLY, good],
    ):
        await far.router.send_multipart([heard.peer, *parts])
    await far.say(heard, Pong(42, ()))
    assert (await request).header.body == Pong(42, ())


@over_sockets
async def test_hello_asks_who_is_there(far: Far, dialer: Dialer) -> None:
    request = asyncio.create_task(dialer.hello(PATIENCE))
    first = await far.hear()
    heard = await far.hear()
    assert first.number == NO_REPLY != heard.number
    answer = Hello(PROTOCOL_VERSION, MESH, "node", "cd" * 16, 4, 2)
    await far.say(heard, answer)
    assert await request == answer
    request = asyncio.create_task(dialer.hello(PATIENCE))
    await far.say(await far.hear(), Pong(1, ()))
    with pytest.raises(NoAnswer, match="Pong"):
        await request


@over_sockets
async def test_a_closed_connection_answers_nothing_more(far: Far, dialer: Dialer) -> None:
    request = asked(dialer, Ping(1, ()), timeout=60.0)
    await far.hear_request()
    with closing(dialer):
        pass
    with pytest.raises(NoAnswer, match="was closed"):
        await request
    with pytest.raises(NoAnswer, match="was closed"):
        await dialer.request(Ping(2, ()), timeout=60.0)
    dialer.close()


@over_sockets
async def test_a_cancelled_request_leaves_nothing_behind(far: Far, dialer: Dialer) -> None:
    request = asked(dialer, Ping(1, ()))
    heard = await far.hear_request()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not dialer._pending
    await far.say(heard, Pong(1, ()))
    following = asked(dialer, Ping(2, ()))
    await far.say(await far.hear_request(), Pong(2, ()))
    assert (await following).header.body == Pong(2, ())
