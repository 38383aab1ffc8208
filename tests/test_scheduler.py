"""The scheduler against a small network in virtual time."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vstack.client.scheduler import (
    MAX_BLOCK,
    MIN_BLOCK,
    PRIOR_RATE,
    RETRY,
    SILENCE,
    BestHolder,
    Fetch,
    PieceWanted,
    Wanted,
)

MB = 1_000_000
TIMEOUT = 10.0
"""Seconds after which the caller gives a request up."""


@dataclass
class Node:
    """Serves its requests one after the other. Times are virtual seconds."""

    rate: float = 5 * MB
    rtt: float = 0.02
    dead: tuple[float, float] = (1e9, 1e9)
    """From when to when its connection is broken: what it owes fails at once, so do new requests."""
    silent: tuple[float, float] = (1e9, 1e9)
    """From when to when it sends nothing, and forgets what it is asked."""
    lacks: frozenset[tuple[int, int]] = frozenset()
    """Chunk and piece that it does not have, although it is named."""
    free_at: float = 0.0


@dataclass
class Net:
    """Carries out what a scheduler decides. `done` has the time at which each chunk was finished."""

    nodes: dict[str, Node]
    scheduler: BestHolder = field(default_factory=BestHolder)
    now: float = 0.0
    wanted: dict[int, Wanted] = field(default_factory=dict)
    done: dict[int, float] = field(default_factory=dict)
    pieces: dict[int, tuple[int, ...]] = field(default_factory=dict)
    asked: list[tuple[float, Fetch]] = field(default_factory=list)
    blocks: dict[tuple[int, int], set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    """(offset, length) of every block that was of use, by chunk and piece."""
    received: int = 0
    wasted: int = 0
    stuck: list[int] = field(default_factory=list)
    turns: int = 0
    _events: list[tuple[float, int, str]] = field(default_factory=list)
    _open: dict[int, Fetch] = field(default_factory=dict)
    _gone: set[tuple[str, int, int]] = field(default_factory=set)

    def want(self, index: int, size: int, k: int, places: dict[int, str], deadline: float = 10.0) -> None:
        """`places`: by piece, the letters of its holders. `size` is that of a piece."""
        pieces = {n: PieceWanted(size, tuple(holders)) for n, holders in places.items()}
        self.wanted[index] = Wanted(index, deadline, k, pieces)
        self.scheduler.want(self.wanted[index])

    def run(self, until: float) -> None:
        """To that time, or until everything that is wanted is finished or stuck."""
        while self.wanted.keys() - self.done.keys() - set(self.stuck):
            self.turns += 1
            for fetch in self.scheduler.requests(self.now):
                self._submit(fetch)
            self.stuck += self.scheduler.stuck
            self.scheduler.stuck.clear()
            wake = self.scheduler.next_wake()
            assert wake is None or wake > self.now, "a wake in the past makes the caller spin"
            events = [self._events[0][0]] if self._events else []
            self.now = min([*events, wake if wake is not None else 1e9, self.now + 1.0])
            if self.now > until:
                self.now = until
                return
            while self._events and self._events[0][0] <= self.now:
                _, number, what = heapq.heappop(self._events)
                self._happen(number, what)

    def _submit(self, fetch: Fetch) -> None:
        wanted = self.wanted[fetch.chunk].pieces[fetch.piece]
        assert fetch.node in wanted.holders, "asked of a node that is not named"
        assert (fetch.node, fetch.chunk, fetch.piece) not in self._gone, "asked again of a node without it"
        assert 0 <= fetch.offset < fetch.offset + fetch.length <= wanted.length
        self.asked.append((self.now, fetch))
        self._open[fetch.number] = fetch
        node = self.nodes[fetch.node]
        if node.dead[0] <= self.now < node.dead[1]:
            self._at(self.now, fetch, "broken")
        elif node.silent[0] <= self.now < node.silent[1]:
            self._at(self.now + TIMEOUT, fetch, "timeout")
        elif (fetch.chunk, fetch.piece) in node.lacks:
            self._at(self.now + node.rtt, fetch, "gone")
        else:
            node.free_at = max(node.free_at, self.now + node.rtt) + fetch.length / node.rate
            if self.now < node.dead[0] <= node.free_at:
                self._at(node.dead[0], fetch, "broken")
            elif self.now < node.silent[0] <= node.free_at or node.free_at > self.now + TIMEOUT:
                self._at(self.now + TIMEOUT, fetch, "timeout")
            else:
                self._at(node.free_at, fetch, "data")

    def _at(self, when: float, fetch: Fetch, what: str) -> None:
        heapq.heappush(self._events, (when, fetch.number, what))

    def _happen(self, number: int, what: str) -> None:
        fetch = self._open.pop(number)
        if what != "data":
            if what == "gone":
                self._gone.add((fetch.node, fetch.chunk, fetch.piece))
            self.scheduler.failed(number, self.now, gone=what == "gone")
            return
        self.received += fetch.length
        if not self.scheduler.received(number, self.now):
            self.wasted += fetch.length
            return
        block = fetch.offset, fetch.length
        assert block not in self.blocks[fetch.chunk, fetch.piece], "one block was of use twice"
        self.blocks[fetch.chunk, fetch.piece].add(block)
        for index, pieces in self.scheduler.finished:
            assert index not in self.done, "finished is said once"
            self.done[index], self.pieces[index] = self.now, pieces
            self._check_whole(index, pieces)
        self.scheduler.finished.clear()

    def _check_whole(self, index: int, pieces: tuple[int, ...]) -> None:
        wanted = self.wanted[index]
        assert len(pieces) == len(set(pieces)) == wanted.k
        for n in pieces:
            at = 0
            for offset, length in sorted(self.blocks[index, n]):
                assert offset == at, "a hole, or an overlap"
                at += length
            assert at == wanted.pieces[n].length

    def owed(self) -> Counter[str]:
        return Counter(f.node for f in self._open.values())


def net(**nodes: Node) -> Net:
    return Net(nodes)


COPIES = {0: "ABC"}
FRAGMENTS = {0: "A", 1: "B", 2: "C", 3: "D", 4: "E"}


# -- all is well ----------------------------------------------------------------------------------


def test_copies_come_from_several_holders_at_once_and_nothing_is_wasted() -> None:
    n = net(A=Node(), B=Node(), C=Node())
    n.want(0, 8 * MB, 1, COPIES)
    n.run(5)
    assert n.done[0] < 8 / 15 * 1.6, "three nodes of 5 MB/s together"
    assert n.wasted == 0
    assert n.received == 8 * MB
    assert {f.node for _, f in n.asked} == set("ABC")


def test_any_k_fragments_do_and_no_others_are_asked_for_when_all_is_well() -> None:
    n = net(**{x: Node() for x in "ABCDE"})
    n.want(0, MB, 3, FRAGMENTS)
    n.run(5)
    assert len(n.pieces[0]) == 3
    assert n.wasted == 0
    assert n.received == 3 * MB


def test_once_it_was_measured_a_fast_node_serves_most() -> None:
    n = net(A=Node(rate=MB), B=Node(rate=20 * MB))
    for index in range(6):
        n.want(index, 2 * MB, 1, {0: "AB"}, deadline=index)
    n.run(10)
    served = Counter({x: sum(f.length for _, f in n.asked if f.node == x) for x in "AB"})
    assert served["B"] > 8 * served["A"]
    assert n.wasted == 0


def test_an_unknown_node_is_expected_to_be_like_the_known_ones() -> None:
    s = BestHolder()
    assert s._rate(s._node("A"), 0.0) == PRIOR_RATE
    for node, rate in (("A", 4 * MB), ("B", 8 * MB)):
        estimate = s._node(node).estimate
        estimate.rate, estimate.measured = rate, 0.0
    assert s._rate(s._node("C"), 1.0) == 6 * MB
    assert s._rate(s._node("A"), 1.0) == 4 * MB
    assert s._rate(s._node("A"), 100.0) == PRIOR_RATE, "an old estimate is not believed"


def test_the_earliest_deadline_is_served_first() -> None:
    n = net(A=Node())
    n.want(3, MB, 1, {0: "A"}, deadline=3.0)
    n.want(7, MB, 1, {0: "A"}, deadline=1.0)
    n.want(5, MB, 1, {0: "A"}, deadline=2.0)
    n.run(5)
    assert sorted(n.done, key=n.done.__getitem__) == [7, 5, 3]
    assert n.done[7] < n.done[3] / 2


def test_what_a_node_owes_is_bounded_and_an_unknown_one_gets_one_request() -> None:
    n = net(A=Node(rate=100 * MB, rtt=0.2))
    n.want(0, 60 * MB, 1, {0: "A"})
    first = n.scheduler.requests(0.0)
    assert len(first) == 1
    assert MIN_BLOCK <= first[0].length <= MAX_BLOCK
    n._submit(first[0])
    most = 0
    while 0 not in n.done and n.now < 20:
        n.run(n.now + 0.05)
        most = max(most, n.owed()["A"])
    assert 0 in n.done
    assert 2 <= most <= 16


def test_answers_that_are_handled_in_one_go_do_not_make_a_slow_node_look_fast() -> None:
    s = BestHolder()
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(100 * MIN_BLOCK, ("A",))}))
    now, owed = 0.0, []
    for _ in range(20):
        owed += s.requests(now)
        now += 0.2 * len(owed)  # each takes 0.2 s, but they are looked at only when all have come
        for fetch in owed:
            s.received(fetch.number, now)
        owed = []
    real = MIN_BLOCK / 0.2
    assert s._rate(s._node("A"), now) < 3 * real


# -- nodes that fail ------------------------------------------------------------------------------


def test_silence_of_a_second_and_a_half_moves_the_blocks_to_another_holder() -> None:
    n = net(A=Node(silent=(0.0, 1e9)), B=Node())
    n.want(0, MIN_BLOCK, 1, {0: "A"})
    n.run(0.5)
    n.want(0, MIN_BLOCK, 1, {0: "AB"})
    n.run(30)
    assert [(round(t, 6), f.node) for t, f in n.asked] == [(0.0, "A"), (SILENCE, "B")]
    assert n.done[0] < SILENCE + 0.1
    assert n.scheduler.failovers == 1


def test_a_node_that_keeps_sending_is_not_silent_however_long_the_chunk_takes() -> None:
    n = net(A=Node(rate=0.1 * MB), B=Node(rate=0.1 * MB))
    n.want(0, MB, 1, {0: "A"}, deadline=1.0)
    n.run(60)
    assert n.done[0] == pytest.approx(10, rel=0.1)
    assert n.scheduler.failovers == 0
    assert n.wasted == 0


def test_a_broken_connection_moves_the_blocks_at_once() -> None:
    n = net(A=Node(dead=(0.1, 1e9)), C=Node())
    n.want(0, 4 * MB, 1, {0: "A"})
    n.run(0.05)
    n.want(0, 4 * MB, 1, {0: "AC"})
    n.run(30)
    lost = [f for t, f in n.asked if f.node == "A"]
    moved = [t for t, f in n.asked if f.node == "C" and any(f[2:] == o[2:] for o in lost)]
    assert moved
    assert 0.1 <= min(moved) < 0.2
    assert n.done[0] < 1.2


def test_fragments_of_silent_nodes_are_replaced_by_others() -> None:
    n = net(**{x: Node(silent=(0.0, 1e9) if x in "AB" else (1e9, 1e9)) for x in "ABCDE"})
    n.want(0, MB, 3, FRAGMENTS)
    n.run(30)
    assert n.pieces[0] == (2, 3, 4)
    assert n.done[0] < SILENCE + 1.0


def test_a_holder_that_does_not_have_the_piece_is_not_asked_again() -> None:
    n = net(A=Node(lacks=frozenset({(0, 0)})), B=Node(), C=Node())
    n.want(0, 2 * MB, 1, COPIES)
    n.want(1, 2 * MB, 1, COPIES)
    n.run(10)
    assert set(n.done) == {0, 1}
    assert sum(f.node == "A" and f.chunk == 0 for _, f in n.asked) >= 1, "it was tried; `Net` checks the rest"
    assert any(f.node == "A" and f.chunk == 1 for _, f in n.asked), "it may have others"
    assert n.scheduler.failovers == 0


def test_a_chunk_is_stuck_when_fewer_than_k_pieces_have_a_holder_and_not_before() -> None:
    lacking = {x: Node(lacks=frozenset({(0, i)})) for i, x in enumerate("ABC")}
    n = net(**lacking, D=Node(), E=Node())
    n.want(0, MB, 3, FRAGMENTS)
    n.run(10)
    assert n.stuck == [0]
    assert 0 not in n.done
    n = net(**{**lacking, "C": Node()}, D=Node(), E=Node())
    n.want(0, MB, 3, FRAGMENTS)
    n.run(10)
    assert n.stuck == []
    assert n.pieces[0] == (2, 3, 4)


def test_a_stuck_chunk_goes_on_with_newer_places_and_keeps_what_it_has() -> None:
    n = net(A=Node(lacks=frozenset({(0, 0)})), B=Node(), C=Node(), D=Node())
    n.want(0, MB, 2, {0: "A", 1: "B"})
    n.run(10)
    assert n.stuck == [0]
    n.stuck.clear()
    before = n.received
    n.want(0, MB, 2, {0: "D", 1: "B"})
    n.run(20)
    assert n.pieces[0] == (0, 1)
    assert n.received == 2 * MB
    assert n.wasted == 0
    assert before <= MB


def test_silent_holders_are_not_stuck_but_tried_again_until_they_speak() -> None:
    n = net(A=Node(silent=(0.0, 7.0)), B=Node(silent=(0.0, 7.0)))
    n.want(0, MB, 1, {0: "AB"})
    n.run(60)
    assert n.stuck == []
    assert 7.0 < n.done[0] < TIMEOUT + 5.0


def test_a_dead_node_alone_with_a_piece_is_tried_again_but_not_without_pause() -> None:
    n = net(A=Node(dead=(0.0, 60.0)))
    n.want(0, MB, 1, {0: "A"})
    n.run(59.9)
    tries = len(n.asked)
    assert 60 / 5 <= tries <= 60 / RETRY + 1
    assert n.turns < 10 * tries
    n.run(90)
    assert n.done[0] < 62.0, "it is back within a moment of its return"


def test_a_node_may_fail_thousands_of_times() -> None:
    s = BestHolder()
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(MIN_BLOCK, ("A",))}))
    now = 0.0
    for _ in range(3000):
        now += 10.0
        (fetch,) = s.requests(now)
        s.failed(fetch.number, now, gone=False)
    (fetch,) = s.requests(now + 5.0)
    assert s.received(fetch.number, now + 5.1)


def test_a_slow_node_alone_with_a_piece_is_not_drowned_in_repetitions() -> None:
    """Its blocks take longer than what counts as silence."""
    n = net(A=Node(rate=40_000, rtt=0.05))
    n.want(0, MB, 1, {0: "A"})
    n.run(300)
    assert n.done[0] < MB / 40_000 * 1.5
    assert n.scheduler.failovers > 0
    assert n.wasted <= MIN_BLOCK


def test_a_node_that_failed_is_the_last_choice_until_it_answers() -> None:
    n = net(A=Node(rate=20 * MB), B=Node(rate=4 * MB))
    n.want(0, 8 * MB, 1, {0: "AB"})
    n.run(10)
    s, now = n.scheduler, n.now
    s.want(Wanted(1, 1.0, 1, {0: PieceWanted(MIN_BLOCK, ("A",))}))
    (fetch,) = s.requests(now)
    s.failed(fetch.number, now, gone=False)
    later = now + 5.0  # it is not left alone any more, only suspected
    s.want(Wanted(1, 1.0, 1, {0: PieceWanted(MIN_BLOCK, ("A", "B"))}))
    (fetch,) = s.requests(later)
    assert fetch.node == "B"
    s.received(fetch.number, later + 0.02)
    s.want(Wanted(2, 1.0, 1, {0: PieceWanted(MIN_BLOCK, ("A",))}))
    (fetch,) = s.requests(later + 0.03)
    s.received(fetch.number, later + 0.04)
    s.want(Wanted(3, 1.0, 1, {0: PieceWanted(MIN_BLOCK, ("A", "B"))}))
    (fetch,) = s.requests(later + 0.05)
    assert fetch.node == "A", "it answered: the faster one is preferred again"


# -- what comes late ------------------------------------------------------------------------------


def one_block(holders: str = "AB") -> tuple[BestHolder, Fetch]:
    s = BestHolder()
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(MIN_BLOCK, tuple(holders))}))
    (fetch,) = s.requests(0.0)
    return s, fetch


def test_data_that_comes_late_is_used_if_the_other_holder_has_not_sent_it_yet() -> None:
    s, first = one_block()
    (second,) = s.requests(SILENCE)
    assert (second.node, second[2:]) == ("B" if first.node == "A" else "A", first[2:])
    assert s.received(first.number, SILENCE + 0.1)
    assert s.finished == [(0, (0,))]
    assert not s.received(second.number, SILENCE + 0.2), "and the other's is wasted"
    assert s.finished == [(0, (0,))]


def test_data_of_a_forgotten_chunk_is_wasted_also_when_it_is_wanted_again() -> None:
    s, first = one_block("A")
    s.forget(0)
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(MIN_BLOCK, ("A", "B"))}))
    (second,) = s.requests(0.1)
    assert not s.received(first.number, 0.2)
    assert s.finished == []
    assert s.received(second.number, 0.3)
    assert s.finished == [(0, (0,))]


def test_data_under_way_from_a_rejected_piece_is_wasted() -> None:
    s, first = one_block("AB")
    (second,) = s.requests(SILENCE)
    assert s.received(second.number, SILENCE + 0.1)
    s.finished.clear()
    s.reject(0, 0, first.node)
    (third,) = s.requests(SILENCE + 0.2)
    assert third.node == second.node
    assert not s.received(first.number, SILENCE + 0.3), "that is what was rejected"
    assert s.received(third.number, SILENCE + 0.4)
    assert s.finished == [(0, (0,))], "finished is said again after a rejection"


def test_a_piece_that_nobody_else_has_is_stuck_when_it_is_rejected() -> None:
    s, first = one_block("A")
    s.received(first.number, 0.1)
    s.reject(0, 0, "A")
    assert s.requests(0.2) == []
    assert s.stuck == [0]
    s.stuck.clear()
    assert s.requests(0.3) == []
    assert s.stuck == [], "said once"


def test_a_piece_that_nobody_is_blamed_for_comes_from_one_holder_and_anew_from_another_if_that_fails() -> (
    None
):
    length = 64 * MIN_BLOCK
    s = BestHolder()
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(length, ("A", "B"))}))

    def serve(now: float, stop_after: int = 100) -> list[Fetch]:
        served: list[Fetch] = []
        while len(served) < stop_after and (fetches := s.requests(now)):
            for fetch in fetches:
                served.append(fetch)
                now += 0.2
                s.received(fetch.number, now)
        return served

    assert {f.node for f in serve(0.0)} == {"A", "B"}
    s.finished.clear()
    s.reject(0, 0, None)
    first = serve(100.0, stop_after=1)
    (only,) = {f.node for f in first}
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(length, ("A", "B"))}))  # the register was read again
    asked = s.requests(101.0)
    assert {f.node for f in asked} == {only}
    s.failed(asked[0].number, 101.1, gone=True)
    second = serve(101.2)
    assert {f.node for f in second} == {"AB".replace(only, "")}
    assert sorted(f[4:] for f in second) == sorted({f[4:] for f in second}), "each block once"
    assert sum(f.length for f in second) == length, "also those that the other one had given"
    assert s.finished == [(0, (0,))]


def test_a_piece_of_another_length_begins_anew_and_old_answers_do_not_fill_it() -> None:
    s, first = one_block("A")
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(2 * MIN_BLOCK, ("B",))}))
    fetches = s.requests(0.1)
    assert {f.node for f in fetches} == {"B"}
    assert not s.received(first.number, 0.2)
    s.failed(fetches[0].number, 0.2, gone=True)
    assert s.requests(0.3) == []
    assert s.stuck == [0]


def test_a_failure_that_comes_after_the_block_was_given_away_is_not_counted_twice() -> None:
    s, first = one_block("AB")
    (second,) = s.requests(SILENCE)
    assert s._node(first.node).failures == 1
    s.failed(first.number, SILENCE + 0.1, gone=False)
    assert s._node(first.node).failures == 1
    assert s.received(second.number, SILENCE + 0.2)


def test_fragments_beyond_k_that_arrive_late_do_not_finish_a_chunk_twice() -> None:
    n = net(**{x: Node(rate=MB) for x in "ABCDE"})
    n.nodes["A"].rate = 30_000  # its one block takes longer than what counts as silence
    n.want(0, MIN_BLOCK, 3, FRAGMENTS)
    n.want(1, 8 * MB, 1, {0: "BC"}, deadline=99.0)
    n.run(60)
    assert set(n.done) == {0, 1}, "`Net` checks that each is said once"
    assert n.done[0] < SILENCE + 1.0
    assert n.wasted == MIN_BLOCK


def test_an_empty_piece_is_complete_from_the_start() -> None:
    s = BestHolder()
    s.want(Wanted(0, 1.0, 1, {0: PieceWanted(0, ("A",))}))
    assert s.requests(0.0) == []
    assert s.finished == [(0, (0,))]


# -- any network ----------------------------------------------------------------------------------


def random_net(seed: int) -> Net:
    """Nodes of all speeds, some of which die, fall silent, or lack pieces; for each chunk, at least k
    pieces lie on nodes that stay well. Slow ones included."""
    rng = Random(seed)
    names = "ABCDEFGH"[: rng.randint(2, 8)]
    well = set(rng.sample(names, max(1, len(names) // 2)))
    n = Net({})
    for name in names:
        node = Node(rate=10 ** rng.uniform(4.7, 7.5), rtt=rng.choice([0.001, 0.02, 0.15, 0.5]))
        if name not in well:
            begin = rng.uniform(0, 3)
            trouble = rng.choice(["dead", "silent", "flaps", "lacks"])
            if trouble == "dead":
                node.dead = (begin, 1e9)
            elif trouble == "silent":
                node.silent = (begin, 1e9)
            elif trouble == "flaps":
                node.dead = (begin, begin + rng.uniform(0.1, 5))
                node.silent = (begin + 6, begin + 9)
            else:
                node.lacks = frozenset((c, p) for c in range(5) for p in range(5))
        n.nodes[name] = node
    for index in range(rng.randint(1, 5)):
        if rng.random() < 0.5:
            holders = {rng.choice(sorted(well)), *rng.sample(names, rng.randint(1, min(3, len(names))))}
            places, k = {0: "".join(sorted(holders))}, 1
        else:
            k = rng.randint(2, 3)
            places = {i: rng.choice(sorted(well) if i < k else names) for i in range(5)}
            order = list(range(5))
            rng.shuffle(order)
            places = {i: places[j] for i, j in enumerate(order)}
        n.want(
            index, rng.choice([1, 1000, 65536, 300_000, 1_500_000]), k, places, deadline=rng.uniform(1, 20)
        )
    return n


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 30))
def test_in_any_network_every_chunk_with_k_reachable_pieces_is_finished(seed: int) -> None:
    n = random_net(seed)
    n.run(600)
    assert set(n.done) == set(n.wanted), f"seed {seed}: unfinished after {n.now:.0f} s, stuck {n.stuck}"
    assert not n.stuck
    used = sum(length for blocks in n.blocks.values() for _, length in blocks)
    assert n.received == used + n.wasted, f"seed {seed}"
    assert max(n.owed().values(), default=0) <= 64
    assert n.turns < 100 + 20 * len(n.asked) + 4 * n.now


def test_a_spare_piece_that_came_too_late_is_asked_for_again_when_the_others_were_bad() -> None:
    """Its answer comes while the chunk is being checked, and is dropped; then what was checked is bad."""
    s = BestHolder()
    s.want(Wanted(0, 10.0, 1, {0: PieceWanted(1000, ("a",)), 1: PieceWanted(1000, ("b",))}))
    (first,) = s.requests(0.0)
    (second,) = s.requests(2.0)
    assert s.received(first.number, 2.1)
    assert not s.received(second.number, 2.2)
    s.reject(0, first.piece, first.node)
    assert [f.piece for f in s.requests(2.3)] == [second.piece]
