"""A node's part in listings: whom it asks, whom it waits for, and for how long."""

from __future__ import annotations

import random
from typing import cast

import pytest

from vstack.mesh.config import Config, Member, View
from vstack.mesh.messages import List, Listing, Scan, ScanReply
from vstack.mesh.paxos.acceptor import Acceptor
from vstack.mesh.paxos.proposer import Proposer
from vstack.mesh.transport import Incoming, Session
from vstack.node.listing import LAST_PAGES, Listings

NODES = tuple(f"{i:032x}" for i in range(1, 6))
ME = NODES[0]
VIEW = View((Config(1, tuple(Member(n, "a:1") for n in NODES), 1),))
PAGE = ScanReply((), more=False, epoch=VIEW.epoch)
DEADLINE = 6.0


class Listener:
    """One node, seen from outside, of a mesh of five."""

    def __init__(self, *live: str) -> None:
        self.live = {ME, *live}
        self.met = set(self.live)
        acceptor = cast(Acceptor, None)  # no register is read here
        self.listings = Listings(
            ME,
            VIEW,
            Proposer(ME, 1, VIEW, acceptor, random.Random(1)),
            lambda _: PAGE,
            self.live.__contains__,
            self.met.__contains__,
        )

    def start(self) -> None:
        request = Incoming(cast(Session, None), b"12345678", List("video/"), memoryview(b""), DEADLINE)
        self.listings.start(request, List("video/"), 0.0)

    def asked(self) -> set[str]:
        nodes = {node for node, scan, _, _ in self.listings.to_send if isinstance(scan, Scan)}
        self.listings.to_send = []
        return nodes

    def answer(self, *nodes: str, at: float) -> None:
        for node in nodes:
            self.listings.on_page(node, (1).to_bytes(8), PAGE, at)

    def done(self) -> Listing | None:
        return self.listings.done[0][1] if self.listings.done else None


def test_nodes_that_are_down_are_not_waited_for_where_the_others_are_enough() -> None:
    node = Listener(*NODES[1:4])
    node.start()
    assert node.asked() == set(NODES[1:4])
    node.answer(*NODES[1:4], at=0.01)
    listing = node.done()
    assert listing is not None
    assert listing.complete
    assert listing.silent == (NODES[4],)


def test_a_node_that_has_just_started_waits_for_those_that_it_takes_to_be_complete() -> None:
    """All others are down to it until they have answered it for the first time."""
    node = Listener(NODES[1])
    node.start()
    assert node.asked() == {NODES[1]}
    node.answer(NODES[1], at=0.01)
    node.listings.tick(0.1)
    assert node.done() is None
    node.live |= set(NODES[2:])
    node.listings.tick(0.2)
    assert node.asked() == set(NODES[2:])
    node.listings.tick(0.3)
    assert node.asked() == set()
    node.answer(*NODES[2:], at=0.4)
    listing = node.done()
    assert listing is not None
    assert listing.complete
    assert listing.silent == ()


@pytest.mark.parametrize(
    ("took", "then"), [(0.0001, LAST_PAGES[0]), (0.02, 0.02), (1.0, LAST_PAGES[1])], ids=str
)
def test_where_some_are_enough_the_last_pages_get_as_long_again(took: float, then: float) -> None:
    node = Listener(*NODES[1:])
    node.start()
    node.answer(*NODES[1:3], at=took)
    node.listings.tick(took + then * 0.9)
    assert node.done() is None
    assert node.listings.next_wake() == pytest.approx(took + then)
    node.listings.tick(took + then)
    listing = node.done()
    assert listing is not None
    assert listing.complete
    assert listing.silent == NODES[3:]


def test_nodes_that_were_there_and_are_down_now_are_not_waited_for() -> None:
    node = Listener(*NODES[1:])
    node.live -= set(NODES[2:])
    node.start()
    assert node.asked() == {NODES[1]}
    node.answer(NODES[1], at=0.01)
    listing = node.done()
    assert listing is not None
    assert not listing.complete
    assert listing.silent == NODES[2:]


def test_a_listing_without_a_majority_ends_and_says_that_it_is_incomplete() -> None:
    node = Listener(NODES[1])
    node.start()
    node.answer(NODES[1], at=0.01)
    node.listings.tick(DEADLINE / 3 - 0.01)
    assert node.done() is None
    node.listings.tick(DEADLINE / 3)
    listing = node.done()
    assert listing is not None
    assert not listing.complete
    assert listing.silent == NODES[2:]
