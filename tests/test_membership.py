"""Gossip: each rule by itself, then small meshes in virtual time with loss, cuts, pauses and crashes."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.scale import GossipMesh, names
from vstack.mesh.config import NodeId
from vstack.mesh.membership import MAX_HEALTH, MAX_INCARNATION, STATEMENT_BYTES, Gossip, Timing, join
from vstack.mesh.messages import (
    MAX_UPDATES,
    Header,
    Ping,
    PingRequest,
    Pong,
    State,
    Statement,
    decode,
    encode,
)

TIMING = Timing()
A, B, C, D, E = names(5)
START = 100.0
SOON = 0.01


def raw(node: NodeId) -> bytes:
    return bytes.fromhex(node)


def gossip(*others: NodeId, boot: int = 1, now: float = START) -> Gossip:
    """Of node A, among others."""
    g = Gossip(A, boot, Random(7), now)
    g.set_members((A, *others))
    return g


def up(node: NodeId, boot: int = 1, incarnation: int = 0, epoch: int = 0, settled: int = 0) -> Statement:
    return Statement(raw(node), boot, incarnation, State.UP, epoch, settled)


def told(g: Gossip, said: Statement, by: NodeId = B, now: float = START) -> tuple[Statement, ...]:
    """Somebody pings with a statement; what the answer carries."""
    g.on_ping(by, Ping(1, (said,)), now)
    to, answer = g.outbox.pop()
    assert to == by
    assert isinstance(answer, Pong)
    return answer.updates


def only_answers(g: Gossip, to: NodeId) -> None:
    """From here on it carries no old statements in turn, and no news of before."""
    g._ring = [g._peers[raw(to)]]
    for peer in g._peers.values():
        while peer.sent >= 0:
            g._sent_on(peer)


def about(node: NodeId, updates: tuple[Statement, ...]) -> Statement:
    [said] = [s for s in updates if s.node == raw(node)]
    return said


def probed(g: Gossip) -> tuple[NodeId, Ping, float]:
    """Lets time pass until the node pings somebody by its own will."""
    g.outbox.clear()
    for _ in range(1000):
        now = g.next_wake()
        g.tick(now)
        pings = [(to, m) for to, m in g.outbox if isinstance(m, Ping)]
        if pings:
            g.outbox.clear()
            return (*pings[0], now)
    raise AssertionError("it never probes")


def advance(g: Gossip, until: float) -> None:
    """Ticks whenever something is due."""
    while g.next_wake() <= until:
        g.tick(g.next_wake())
    g.tick(until)


def ask_helpers(g: Gossip) -> tuple[NodeId, float, list[tuple[NodeId, PingRequest]]]:
    """A probe that nobody answers in time: its target, now, and who was asked for help."""
    target, _, now = probed(g)
    now += TIMING.timeout + SOON
    advance(g, now)
    requests = [(to, m) for to, m in g.outbox if isinstance(m, PingRequest)]
    g.outbox.clear()
    return target, now, requests


def fail_probe(g: Gossip) -> tuple[NodeId, float]:
    """A probe that nobody answers at all."""
    target, now, _ = ask_helpers(g)
    now += 2 * TIMING.timeout + SOON
    advance(g, now)
    return target, now


# -- statements ---------------------------------------------------------------------------------------

statements = st.builds(
    Statement,
    st.just(raw(B)),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(State),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 1),
)


@given(statements, statements, statements)
def test_statements_join_in_any_order_and_any_number_of_times(
    a: Statement, b: Statement, c: Statement
) -> None:
    assert join(a, b) == join(b, a)
    assert join(join(a, b), c) == join(a, join(b, c))
    assert join(join(a, b), b) == join(a, b)


@given(statements, statements)
def test_within_a_boot_epoch_and_settled_never_fall(a: Statement, b: Statement) -> None:
    joined = join(a, b)
    assert joined.boot == max(a.boot, b.boot)
    for s in (a, b):
        if s.boot == joined.boot:
            assert joined.epoch >= s.epoch
            assert joined.settled >= s.settled


def test_a_newer_boot_replaces_everything_and_an_older_one_counts_for_nothing() -> None:
    g = gossip(B, C)
    told(g, Statement(raw(C), 3, 9, State.DOWN, 5, 5))
    told(g, up(C, boot=4, epoch=2))
    assert g.statement(C) == up(C, boot=4, epoch=2)
    told(g, Statement(raw(C), 3, 99, State.DOWN, 9, 9))
    assert g.statement(C) == up(C, boot=4, epoch=2)
    assert [(n, b, a) for n, b, a in g.changes] == [
        (C, State.UP, State.DOWN),
        (C, State.DOWN, State.UP),
    ]


def test_of_one_incarnation_the_worse_state_holds_and_a_higher_incarnation_lifts_it() -> None:
    g = gossip(B, C)
    for state in (State.SLOW, State.SUSPECT, State.DOWN, State.SUSPECT, State.UP):
        told(g, Statement(raw(C), 1, 4, state, by=1 if state is State.SUSPECT else 0))
    assert g.state(C) is State.DOWN
    told(g, up(C, incarnation=5))
    assert g.state(C) is State.UP


def test_whoever_is_told_less_than_it_knows_answers_with_what_it_knows() -> None:
    g = gossip(B, C, D)
    told(g, up(C, incarnation=7, epoch=3))
    only_answers(g, D)
    answer = told(g, up(C, incarnation=6, epoch=2), by=D)
    assert about(C, answer) == up(C, incarnation=7, epoch=3)


def test_whoever_tells_less_of_the_same_incarnation_is_answered_with_more() -> None:
    g = gossip(B, C, D)
    told(g, Statement(raw(C), 1, 0, State.DOWN, 2, 2))
    only_answers(g, D)
    for less in (Statement(raw(C), 1, 0, State.SUSPECT, 2, 2, 5), Statement(raw(C), 1, 0, State.DOWN, 1, 2)):
        assert about(C, told(g, less, by=D)) == g.statement(C)


def test_two_who_suspect_a_member_tell_each_other_whose_suspicion_it_is() -> None:
    answers = set()
    for seed in range(8):
        g = gossip(B, C, D)
        told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=5))
        g._rng = Random(seed)
        answers.add(about(C, told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=6), by=D)).by)
    assert answers == {5, 6}


def test_a_statement_that_is_behind_rides_on_pings_until_a_newer_one_is_known() -> None:
    g = gossip(B, C)
    g.say(2, 2)
    told(g, up(B, epoch=2, settled=2))
    asked = probed(g)[1].updates
    assert Statement(raw(C)) in asked
    told(g, up(C, epoch=2, settled=2))
    assert not g._behind


# -- who is a member ----------------------------------------------------------------------------------


def test_who_is_no_member_is_neither_believed_nor_believed_in() -> None:
    g = gossip(B)
    answer = told(g, up(B, incarnation=5), by=C)
    assert [s.node for s in answer] == [raw(A)]
    assert g.statement(B).incarnation == 0
    told(g, up(D, epoch=9))
    g.heard(D, START)
    g.on_ack(D, Pong(1, (up(B, incarnation=6),)), START)
    g.on_ping_request(D, PingRequest(1, raw(B), ()), START)
    with pytest.raises(KeyError):
        g.state(D)
    assert g.newest == (0, A)
    assert g.outbox == []


def test_a_member_that_left_is_forgotten_and_one_that_stays_is_not() -> None:
    g = gossip(B, C)
    told(g, up(C, incarnation=3))
    told(g, up(B, incarnation=4))
    g.set_members((A, B, D))
    assert g.statement(B) == up(B, incarnation=4)
    assert g.statement(D) == Statement(raw(D))
    told(g, up(C, incarnation=5))
    with pytest.raises(KeyError):
        g.statement(C)


def test_all_that_is_under_way_with_a_member_ends_when_it_leaves() -> None:
    g = gossip(B, C)
    g.on_ping_request(B, PingRequest(5, raw(C), ()), START)
    target, now = fail_probe(g)
    assert g.state(target) is State.SUSPECT
    g.set_members((A,))
    g.outbox.clear()
    for _ in range(100):
        g.tick(now)
        now += 1.0
    assert g.outbox == []
    assert g.next_wake() == float("inf")


# -- probing ------------------------------------------------------------------------------------------


def test_every_member_is_probed_once_in_each_round() -> None:
    others = names(20)[1:]
    g = gossip(*others)
    for _ in range(5):
        round_: list[NodeId] = []
        for _ in others:
            target, ping, now = probed(g)
            round_.append(target)
            g.on_ack(target, Pong(ping.sequence, ()), now + 0.01)
        assert sorted(round_) == sorted(others)


def test_a_silent_member_is_probed_through_three_others_and_then_suspected() -> None:
    g = gossip(B, C, D, E)
    target, now, requests = ask_helpers(g)
    assert len(requests) == TIMING.helpers
    assert {to for to, _ in requests} == {B, C, D, E} - {target}
    assert {m.target for _, m in requests} == {raw(target)}
    assert g.state(target) is State.UP
    advance(g, now + 2 * TIMING.timeout + SOON)
    assert g.state(target) is State.SUSPECT
    assert g.changes == [(target, State.UP, State.SUSPECT)]


def test_a_member_that_others_reach_is_not_suspected() -> None:
    g = gossip(B, C, D, E)
    target, now, requests = ask_helpers(g)
    helper, m = requests[0]
    g.on_ack(helper, Pong(m.sequence, ()), now + 0.01)
    advance(g, now + 2 * TIMING.timeout + SOON)
    assert g.state(target) is State.UP


def test_an_answer_counts_only_from_whom_it_was_asked() -> None:
    g = gossip(B, C, D, E)
    target, ping, now = probed(g)
    other = next(n for n in (B, C) if n != target)
    g.on_ack(other, Pong(ping.sequence, ()), now + 0.01)
    g.on_ack(target, Pong(ping.sequence ^ 1, ()), now - 1)  # of long ago: heard before the probe
    advance(g, now + 3 * TIMING.timeout + SOON)
    assert g.state(target) is State.SUSPECT


def test_any_message_of_a_member_counts_as_life() -> None:
    g = gossip(B, C, D, E)
    target, now, _ = ask_helpers(g)
    g.heard(target, now)
    advance(g, now + 2 * TIMING.timeout + SOON)
    assert g.state(target) is State.UP


def test_a_helper_passes_the_answer_on() -> None:
    g = gossip(B, C)
    g.on_ping_request(B, PingRequest(77, raw(C), ()), START)
    [(to, ping)] = g.outbox
    assert to == C
    assert isinstance(ping, Ping)
    g.outbox.clear()
    g.on_ack(C, Pong(ping.sequence, ()), START + 0.1)
    [(to, answer)] = g.outbox
    assert (to, answer.sequence) == (B, 77)
    assert isinstance(answer, Pong)
    assert answer.reached


def test_a_helper_without_an_answer_says_that_it_is_there_itself() -> None:
    g = gossip(B, C)
    g._probe_at = START + 10
    g.on_ping_request(B, PingRequest(77, raw(C), ()), START)
    g.outbox.clear()
    g.tick(START + TIMING.timeout)
    [(to, answer)] = g.outbox
    assert (to, answer.sequence) == (B, 77)
    assert isinstance(answer, Pong)
    assert not answer.reached


def test_a_member_that_is_down_is_still_probed_now_and_then() -> None:
    g = gossip(B, C)
    told(g, Statement(raw(C), 1, 0, State.DOWN))
    targets = []
    for _ in range(2 * TIMING.down_every):
        target, ping, now = probed(g)
        targets.append(target)
        if target == B:
            g.on_ack(B, Pong(ping.sequence, ()), now + 0.01)
    assert targets.count(C) == 2


def test_where_all_are_down_all_are_probed() -> None:
    g = gossip(B, C)
    for node in (B, C):
        told(g, Statement(raw(node), 1, 0, State.DOWN))
    assert {probed(g)[0] for _ in range(4)} == {B, C}


def test_a_member_that_is_down_and_heard_is_told_so_at_once() -> None:
    g = gossip(B, C, D)
    told(g, Statement(raw(C), 1, 0, State.DOWN))
    g.heard(C, START)
    for _ in range(2):
        target, ping, _ = probed(g)
        if target == C:
            assert about(C, ping.updates).state is State.DOWN
            return
    raise AssertionError("it was not probed before its turn")


# -- objecting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.SUSPECT, State.DOWN])
def test_who_hears_that_it_is_suspected_or_down_objects_in_the_same_answer(state: State) -> None:
    g = gossip(B, boot=3)
    g.say(4, 2)
    incarnation = g.statement(A).incarnation
    answer = told(g, Statement(raw(A), 3, incarnation, state))
    assert about(A, answer) == Statement(raw(A), 3, incarnation + 1, State.UP, 4, 2)
    assert g.counters["refutations"] == 1


def test_what_is_said_of_an_older_incarnation_or_boot_needs_no_objection() -> None:
    g = gossip(B, boot=3)
    g.say(1, 1)
    for said in (g.statement(A), Statement(raw(A), 3, 0, State.DOWN), Statement(raw(A), 2, 50, State.DOWN)):
        assert about(A, told(g, said)) == g.statement(A)
    assert g.counters["refutations"] == 0


def test_who_is_slow_says_so_itself_for_a_while_and_then_objects() -> None:
    g = gossip(B)
    g.say(1, 1)
    own = g.statement(A)
    answer = told(g, msgspec.structs.replace(own, state=State.SLOW))
    assert about(A, answer) == msgspec.structs.replace(own, state=State.SLOW)
    end = START + TIMING.slow * TIMING.period
    while g.next_wake() < end:
        g.tick(g.next_wake())
        assert g.state(A) is State.SLOW
    g.tick(end)
    assert g.statement(A) == msgspec.structs.replace(own, incarnation=own.incarnation + 1)


def test_no_incarnation_leaves_the_bounds_of_the_wire() -> None:
    g = gossip(B)
    told(g, Statement(raw(A), 1, MAX_INCARNATION, State.DOWN))
    ping = probed(g)[1]
    assert decode(encode(Header(ping))).body == ping


def test_epoch_and_settled_only_rise() -> None:
    g = gossip(B)
    g.say(3, 2)
    before = g.statement(A)
    g.say(3, 2)
    assert g.statement(A) == before
    g.say(3, 3)
    assert (g.statement(A).incarnation, g.statement(A).settled) == (before.incarnation + 1, 3)
    for epoch, settled in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="before"):
            g.say(epoch, settled)


def test_the_newest_epoch_is_known_with_who_has_it() -> None:
    g = gossip(B, C)
    told(g, up(C, epoch=5), by=B)
    told(g, up(B, epoch=4))
    assert g.newest == (5, C)


# -- suspicion ----------------------------------------------------------------------------------------


def time_to_down(members: int, accusers: int) -> float:
    """Seconds from a suspicion that arrives to down, with so many who have it at first hand."""
    everybody = names(members)
    g = gossip(*everybody[1:])
    for i in range(accusers):
        told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=i + 1))
    g._probe_at = float("inf")
    while g.state(C) is State.SUSPECT:
        now = g.next_wake()
        g.tick(now)
    return now - START


def test_the_more_suspect_a_member_the_sooner_it_is_down() -> None:
    times = [time_to_down(10, accusers) for accusers in (1, 2, 3, 4, 5)]
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(TIMING.patience * times[3])
    assert times[3] == times[4] == pytest.approx(TIMING.suspicion * TIMING.period)


def test_the_time_of_a_suspicion_grows_with_the_logarithm_of_the_mesh() -> None:
    assert time_to_down(1000, 4) == pytest.approx(3 * time_to_down(10, 4))


def test_in_a_mesh_of_two_nobody_can_confirm_a_suspicion_and_nobody_needs_to() -> None:
    g = gossip(C)
    told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=1), by=C)
    g._probe_at = float("inf")
    now = g.next_wake()
    g.tick(now)
    assert g.state(C) is State.DOWN
    assert now == pytest.approx(START + TIMING.suspicion * TIMING.period)


def test_the_same_accuser_twice_is_one_accuser() -> None:
    g = gossip(B, C, D, E)
    told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=9))
    g._probe_at = float("inf")
    due = g.next_wake()
    told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=9), by=D)
    assert g.next_wake() == due
    told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=8), by=D)
    assert g.next_wake() < due


def test_an_accuser_who_is_known_is_no_news() -> None:
    g = gossip(B, C, D)
    for _ in range(50):
        told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=9))
    assert g.backlog() == 0


def test_a_suspicion_that_is_passed_on_names_who_has_it_at_first_hand() -> None:
    g = gossip(B, C, D)
    told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=9))
    answer = told(g, up(D), by=D)
    assert about(C, answer).by == 9


def test_an_objection_in_time_ends_the_suspicion() -> None:
    g = gossip(B, C, D)
    told(g, Statement(raw(C), 1, 0, State.SUSPECT, by=9))
    told(g, up(C, incarnation=1))
    g._probe_at = float("inf")
    assert g.next_wake() == float("inf")
    assert g.state(C) is State.UP


def test_who_is_heard_is_not_down_while_it_is() -> None:
    g = gossip(B)
    told(g, Statement(raw(B), 1, 0, State.SUSPECT, by=9))
    g._probe_at = float("inf")
    due = g.next_wake()
    g.heard(B, due - 0.1)
    g.tick(due)
    assert g.state(B) is State.SUSPECT
    g.tick(g.next_wake())
    assert g.state(B) is State.DOWN


# -- slow ---------------------------------------------------------------------------------------------


def answer_in_time(g: Gossip, probes: int) -> None:
    for _ in range(probes):
        target, ping, now = probed(g)
        g.on_ack(target, Pong(ping.sequence, ()), now + SOON)


def late_answer(g: Gossip, node: NodeId) -> None:
    """Answers the next probe of `node` after the timeout, and others' in time."""
    while True:
        target, ping, now = probed(g)
        if target == node:
            advance(g, now + TIMING.timeout + SOON)
            g.on_ack(target, Pong(ping.sequence, ()), now + TIMING.timeout + SOON)
            return
        g.on_ack(target, Pong(ping.sequence, ()), now + 0.01)


def test_a_few_late_answers_in_a_row_make_a_member_slow() -> None:
    g = gossip(B, C, D, E)
    answer_in_time(g, 4)
    for _ in range(TIMING.late - 1):
        late_answer(g, C)
    assert g.state(C) is State.UP
    late_answer(g, C)
    assert g.state(C) is State.SLOW


def test_an_answer_in_time_between_late_ones_starts_the_count_again() -> None:
    g = gossip(B, C)
    answer_in_time(g, 2)
    for _ in range(3):
        for _ in range(TIMING.late - 1):
            late_answer(g, C)
        target = ""
        while target != C:
            target, ping, now = probed(g)
            g.on_ack(target, Pong(ping.sequence, ()), now + 0.01)
    assert g.state(C) is State.UP


def test_a_member_that_always_needed_so_long_is_not_slow() -> None:
    g = gossip(B, C)
    for _ in range(10 * TIMING.late):
        late_answer(g, C)
    assert g.state(C) is State.UP


def test_a_round_trip_far_over_the_usual_is_late_though_within_the_timeout() -> None:
    g = gossip(B)
    answer_in_time(g, 5)
    for _ in range(TIMING.late):
        target, ping, now = probed(g)
        g.on_ack(target, Pong(ping.sequence, ()), now + 0.8 * TIMING.timeout)
    assert g.state(B) is State.SLOW


@pytest.mark.parametrize(("health", "state"), [(0, State.SLOW), (1, State.UP), (MAX_HEALTH, State.UP)])
def test_a_node_in_trouble_calls_nobody_slow(health: int, state: State) -> None:
    g = gossip(B, C, D, E)
    answer_in_time(g, 4)
    for _ in range(TIMING.late):
        target = ""
        while target != C:
            target, ping, now = probed(g)
            g.on_ack(target, Pong(ping.sequence, ()), now + (0.9 * TIMING.timeout if target == C else SOON))
            g.health = health
    assert g.state(C) is state


# -- the node's own health ----------------------------------------------------------------------------


def test_silent_helpers_make_a_node_doubt_itself_and_helpers_that_answer_do_not() -> None:
    g = gossip(B, C, D, E)
    _, now, requests = ask_helpers(g)
    for helper, m in requests:
        g.on_ack(helper, Pong(m.sequence, (), reached=False), now + TIMING.timeout)
    advance(g, now + 2 * TIMING.timeout + SOON)
    assert (g.counters["suspicions"], g.health) == (1, 0)
    g = gossip(B, C, D, E)
    fail_probe(g)
    assert (g.counters["suspicions"], g.health) == (1, TIMING.helpers)


def test_a_node_in_trouble_probes_less_often_and_recovers_with_good_probes() -> None:
    g = gossip(B, C, D, E)
    g.health = 3
    times = []
    for _ in range(4):
        target, ping, now = probed(g)
        g.on_ack(target, Pong(ping.sequence, ()), now + SOON)
        times.append(now)
    assert [b - a for a, b in pairwise(times)] == pytest.approx([TIMING.period * x for x in (4, 3, 2)])
    assert g.health == 0


def test_time_in_which_the_node_did_not_run_counts_against_nobody() -> None:
    g = gossip(B, C, D, E)
    told(g, Statement(raw(E), 1, 0, State.SUSPECT, by=1), by=B)
    target, ping, now = probed(g)
    now += 60.0
    g.tick(now)
    assert State.DOWN not in {g.state(n) for n in (B, C, D, E)}
    assert g.counters["suspicions"] == 0
    g.on_ack(target, Pong(ping.sequence, ()), now + 0.01)
    assert g.counters["late"] == 0


# -- what a message carries ---------------------------------------------------------------------------


def test_news_are_sent_a_bounded_number_of_times_and_the_own_statement_always() -> None:
    g = gossip(B, C)
    told(g, Statement(raw(C), 1, 1, State.UP), by=B)
    carried = 0
    for _ in range(50):
        g._ring = [g._peers[raw(B)]]  # nothing but news may carry it
        g.on_ping(B, Ping(1, ()), START)
        _, answer = g.outbox.pop()
        assert answer.updates[0] == g.statement(A)
        carried += any(s.node == raw(C) for s in answer.updates)
    assert carried == TIMING.retransmit * 2  # log2 of three members and one, rounded up
    assert g.backlog() == 0


def test_news_that_come_back_count_as_told() -> None:
    g = gossip(B, C, D)
    said = Statement(raw(C), 1, 1, State.UP)
    told(g, said)
    assert g.backlog() == 1
    for _ in range(20):
        g.on_ack(D, Pong(1, (said,)), START)
    assert g.backlog() == 0


def test_no_message_is_longer_than_its_bounds() -> None:
    everybody = names(300)
    g = gossip(*everybody[1:])
    g.say(9, 9)
    big = (1 << 63) - 1
    said = [Statement(raw(n), big, big, State.SUSPECT, 1, 1, (1 << 32) - 1) for n in everybody[2:]]
    while said:
        g.on_ack(B, Pong(1, tuple(said[:MAX_UPDATES])), START)
        del said[:MAX_UPDATES]
    _, ping, _ = probed(g)
    assert len(ping.updates) == MAX_UPDATES
    assert len({s.node for s in ping.updates}) == MAX_UPDATES
    assert len(encode(Header(ping))) <= MAX_UPDATES * STATEMENT_BYTES + 30
    widest = Statement(raw(A), big, big, State.SUSPECT, big, big, (1 << 32) - 1)
    assert len(msgspec.msgpack.encode(widest)) == STATEMENT_BYTES


def test_what_travels_is_decoded_as_it_was_and_nothing_beyond_the_bounds_is() -> None:
    for m in (Ping(1, (up(A),)), Pong(2, (up(B),), False), PingRequest(3, raw(C), (up(A),))):
        assert decode(encode(Header(m))).body == m
    many = tuple(up(n) for n in names(MAX_UPDATES + 1))
    short = Statement(b"short")
    bad = Statement(raw(A), state=4)  # type: ignore[arg-type]
    for wrong in (
        Ping(1, many),
        Ping(1 << 32, ()),
        Pong(1, (short,)),
        Ping(1, (bad,)),
        Ping(1, (up(A, -1),)),
    ):
        with pytest.raises(msgspec.DecodeError):
            decode(encode(Header(wrong)))


# -- meshes in virtual time ---------------------------------------------------------------------------


def settled(n: int, seed: int, loss: float = 0.0) -> GossipMesh:
    """A mesh in which everybody has heard of everybody."""
    mesh = GossipMesh(n, seed, loss=loss)
    assert mesh.run(60.0, lambda: mesh.all_know_all(1))
    mesh.changes.clear()
    return mesh


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_a_crash_is_known_to_all_within_bounded_time(n: int, seed: int) -> None:
    mesh = settled(n, seed)
    victim = mesh.names[-1]
    mesh.crash(victim)
    assert mesh.run(20.0, lambda: mesh.share_that(lambda g: g.state(victim) is State.DOWN) == 1)
    assert {of for _, _, of, _, _ in mesh.changes} == {victim}


@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_held_for_down_though_a_tenth_of_all_messages_is_lost(seed: int) -> None:
    mesh = GossipMesh(30, seed, loss=0.1)
    mesh.run(200.0)
    states = [after for _, _, _, _, after in mesh.changes]
    assert State.SUSPECT in states  # it is suspected wrongly, and objects
    assert sum(n.gossip.counters["refutations"] for n in mesh.live()) > 0
    assert State.DOWN not in states


@pytest.mark.parametrize("seed", range(3))
def test_a_partition_is_seen_on_both_sides_and_heals(seed: int) -> None:
    mesh = settled(9, seed)
    left = set(mesh.names[:4])
    mesh.cut = lambda a, b: (a in left) != (b in left)

    def apart() -> bool:
        return all(
            (n.gossip.state(m) is State.DOWN) == ((n.name in left) != (m in left))
            for n in mesh.live()
            for m in mesh.names
        )

    assert mesh.run(90.0, apart)
    mesh.cut = lambda a, b: False
    assert mesh.run(60.0, mesh.all_up)


@pytest.mark.parametrize("seed", range(3))
def test_a_link_cut_one_way_takes_nobody_down(seed: int) -> None:
    mesh = settled(6, seed)
    a, b = mesh.names[:2]
    mesh.cut = lambda sender, to: (sender, to) == (a, b)
    mesh.run(60.0)
    assert State.DOWN not in {after for _, _, _, _, after in mesh.changes}


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_hears_nothing_takes_nobody_else_down_for_the_others(seed: int) -> None:
    mesh = settled(8, seed)
    deaf = mesh.names[0]
    mesh.cut = lambda sender, to: to == deaf
    mesh.run(60.0)
    wrong = [c for c in mesh.changes if c[1] != deaf and c[2] != deaf and c[4] is State.DOWN]
    assert wrong == []


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_stood_still_holds_nobody_for_down_and_is_back_soon(seed: int) -> None:
    mesh = settled(7, seed)
    sleeper = mesh.names[3]
    mesh.pause(sleeper, 30.0)
    mesh.run(29.9)
    assert mesh.share_that(lambda g: g.state(sleeper) is State.DOWN) == 6 / 7
    assert mesh.run(20.0, mesh.all_up)
    assert State.DOWN not in {after for _, who, _, _, after in mesh.changes if who == sleeper}


def test_a_node_that_restarts_is_up_again_by_its_new_boot() -> None:
    mesh = settled(6, 1)
    victim = mesh.names[2]
    mesh.crash(victim)
    assert mesh.run(20.0, lambda: mesh.share_that(lambda g: g.state(victim) is State.DOWN) == 1)
    mesh.start(victim, boot=2)
    assert mesh.run(10.0, lambda: mesh.all_up() and mesh.all_know_all(1))
    assert {n.gossip.statement(victim).boot for n in mesh.live()} == {2}


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_what_each_node_says_of_its_epochs_reaches_everybody(loss: float) -> None:
    mesh = settled(12, 5, loss=loss)
    for i, node in enumerate(mesh.live()):
        node.gossip.say(10 + i, 5 + i)

    def known() -> bool:
        return all(
            (s.epoch, s.settled) == (10 + i, 5 + i)
            for n in mesh.live()
            for i, m in enumerate(mesh.names)
            for s in [n.gossip.statement(m)]
        )

    assert mesh.run(30.0, known)
    assert {n.gossip.newest[0] for n in mesh.live()} == {10 + 11}


def test_what_was_said_during_a_short_cut_is_made_up_for() -> None:
    mesh = settled(6, 2)
    mesh.run(20.0)
    quiet = mesh.names[0]
    mesh.cut = lambda a, b: quiet in (a, b)
    mesh.nodes[mesh.names[1]].gossip.say(2, 2)
    mesh.run(1.0)
    mesh.cut = lambda a, b: False
    assert mesh.run(20.0, lambda: mesh.nodes[quiet].gossip.newest[0] == 2)


def test_the_same_seed_is_the_same_run() -> None:
    runs = []
    for _ in range(2):
        mesh = GossipMesh(10, 3, loss=0.2)
        mesh.run(30.0)
        runs.append((mesh.changes, mesh.bytes, mesh.messages))
    assert runs[0] == runs[1]
