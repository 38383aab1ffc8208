"""The Paxos core under seeded faults, and wrong variants of it that must be caught.

VSTACK_SEED sets the first seed; otherwise the day does, so that every day runs other schedules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.sim.linearizability import Try, explains
from tests.sim.main import Job, first_caught, run_all, sliced
from tests.sim.mutants import MUTANTS
from tests.sim.profiles import NAMES, PROFILES
from tests.sim.world import Figures
from vstack.mesh.messages import Found, Mismatch, Ok, Op, Outcome, Unknown

ROOT = Path(__file__).parents[1]
BASE = int(os.environ.get("VSTACK_SEED") or datetime.now(UTC).strftime("%Y%m%d0000"))
MIXED, EACH = 2000, 200
"""Seeds of the mixed profile and of each other."""

CAUGHT: dict[str, tuple[str, int]] = {
    "B1-new-value-under-old-ballot": ("undead", 1),  # I3
    "B2-accept-keeps-promise": ("crashy", 0),  # I2
    "B2-prepare-ignores-accepted": ("crashy", 0),  # I2
    "B3-replies-before-sync": ("crashy", 0),  # I6
    "B3-requests-before-sync": ("crashy", 0),  # I8
    "B3-promises-in-memory": ("crashy", 0),  # I1
    "B3-votes-in-memory": ("crashy", 0),  # I1
    "B4-ballots-without-owner": ("create-races", 1),  # I3
    "B5-boot-stands-still": ("reborn", 8),  # linearizability
    "B5-boot-and-rounds-start-over": ("reborn", 351),  # I3
    "B5-tokens-start-over": ("reborn", 8),  # linearizability
    "B6-old-promises-count": ("undead", 1),  # I4
    "B7-highest-of-mixed-quorum": ("hot", 0),  # I6
    "B7-mismatch-without-decision": ("hot", 0),  # I6
    "B8-no-operation-ids": ("calm", 0),  # I6
    "B8-version-is-not-compared": ("calm", 0),  # linearizability
    "B12-failed-round-is-cleaned-up": ("crashy", 0),  # I1
    "B13-delete-starts-over": ("graveyard", 0),  # I6
    "promise-hides-value": ("create-races", 0),  # I5
    "accept-ignores-promise": ("crashy", 0),  # I5
    "fresh-ignores-promise": ("graveyard", 0),  # I8
    "fresh-overwrites": ("create-races", 0),  # I1
    "damaged-is-absent": ("mixed", 6),  # I1
    "old-votes-count": ("graveyard", 3),  # I6
    "refusals-count-as-promises": ("create-races", 0),  # I4
    "one-promise-less": ("create-races", 0),  # I4
    "any-promised-value": ("create-races", 0),  # I5
    "one-vote-less": ("create-races", 0),  # I6
    "first-reply-is-the-answer": ("graveyard", 0),  # linearizability
    "giving-up-is-failure": ("create-races", 0),  # I6
    "versions-stand-still": ("create-races", 0),  # I5
    "forgotten-evidence-is-mismatch": ("hot", 17),  # linearizability
    "patience-stands-still": ("far", 0),  # liveness
    "everyone-creates": ("create-races", 0),  # I8
    "others-vote-first": ("create-races", 0),  # I8
}
"""Each wrong variant: the profile that shows it, and the first of its seeds that does."""

BY_HISTORIES: dict[str, tuple[str, int]] = {
    "B1-new-value-under-old-ballot": ("reborn", 21),
    "B3-votes-in-memory": ("crashy", 0),
    "B4-ballots-without-owner": ("hot", 0),
    "B6-old-promises-count": ("reborn", 3),
    "B7-highest-of-mixed-quorum": ("reborn", 6),
    "B7-mismatch-without-decision": ("hot", 15),
    "B8-no-operation-ids": ("calm", 0),
    "B12-failed-round-is-cleaned-up": ("create-races", 3),
    "accept-ignores-promise": ("crashy", 0),
    "fresh-ignores-promise": ("calm", 8),
    "old-votes-count": ("undead", 1),
    "refusals-count-as-promises": ("hot", 9),
    "one-promise-less": ("crashy", 1),
    "any-promised-value": ("crashy", 0),
    "one-vote-less": ("hot", 0),
    "everyone-creates": ("create-races", 1),
    "others-vote-first": ("crashy", 24),
}
"""Variants that must show in what clients are told, with the invariants switched off."""

SLACK = 200
"""Seeds that a variant may need beyond five times the one on record, after a change of anything."""


def test_thousands_of_seeds_show_no_violation() -> None:
    jobs = [Job(p, BASE, MIXED if p == "mixed" else EACH) for p in NAMES]
    figures, failures = Figures(), list[str]()
    for report in run_all([part for job in jobs for part in sliced(job)]):
        figures.add(report.figures)
        failures += report.failures
    assert not failures, f"VSTACK_SEED={BASE}\n" + "\n".join(failures[:20])
    assert figures.seeds == MIXED + EACH * len(PROFILES)
    assert figures.undecided == 0
    assert figures.crashes > figures.seeds
    assert figures.decisions > 10 * figures.seeds


def test_every_wrong_variant_is_caught() -> None:
    assert set(CAUGHT) == set(MUTANTS)
    assert _missed(CAUGHT, blind=False) == []


def test_the_histories_of_clients_alone_show_what_is_wrong() -> None:
    assert _missed(BY_HISTORIES, blind=True) == []


def _missed(table: dict[str, tuple[str, int]], blind: bool) -> list[str]:
    jobs = [Job(p, 0, 5 * seed + SLACK, name, blind=blind) for name, (p, seed) in table.items()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(table, pool.map(first_caught, jobs), strict=True))
    return [name for name, seed in found.items() if seed is None]


def _trace(seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-m", "tests.sim.main", "--trace", "--seeds", "3", "--seed", str(seed)]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_a_seed_is_a_schedule_whatever_the_hash_seed() -> None:
    assert _trace(7, "1") == _trace(7, "2")
    assert len(set(_trace(7, "1").split())) == 3 + 3 + 1, "three different hashes, three seeds, one profile"


# -- the judge of histories -------------------------------------------------------------------------


def _try(number: int, called: int, returned: int, expect: int | None, outcome: Outcome | None) -> Try:
    data = None if expect is None else b"%d" % number
    return Try(Op(b"%16d" % number, "video/x", 1, expect, data), called, returned, outcome)


def test_a_read_that_ends_before_a_write_begins_does_not_see_it() -> None:
    write = _try(1, 10, 20, 0, Ok(5))
    assert explains([write, _try(2, 30, 40, None, Found(5, b"1"))])
    assert not explains([write, _try(2, 1, 5, None, Found(5, b"1"))])
    assert not explains([write, _try(2, 30, 40, None, Found(0, None))])
    assert explains([write, _try(2, 15, 40, None, Found(0, None))])


def test_an_unknown_write_happens_late_or_never_but_once() -> None:
    lost = _try(1, 1, 2, 0, Unknown("-"))
    assert explains([lost, _try(2, 30, 40, None, Found(0, None)), _try(3, 50, 60, None, Found(7, b"1"))])
    assert explains([lost, _try(2, 30, 40, 0, Ok(5)), _try(3, 50, 60, None, Found(5, b"2"))])
    assert not explains([lost, _try(2, 30, 40, None, Found(7, b"1")), _try(3, 50, 60, None, Found(0, None))])
    assert not explains([lost, _try(2, 30, 40, None, Found(7, b"1")), _try(3, 50, 60, None, Found(8, b"1"))])


def test_a_version_that_nobody_reported_is_bound_by_the_change_that_replaces_it() -> None:
    lost = _try(1, 1, 2, 0, None)
    assert explains([lost, _try(2, 30, 40, 7, Ok(8)), _try(3, 50, 60, None, Found(8, b"2"))])
    assert not explains([lost, _try(2, 30, 40, 7, Ok(8)), _try(3, 35, 36, None, Found(6, b"1"))])


def test_a_repeated_operation_is_told_the_same_and_never_a_mismatch() -> None:
    first, other = _try(1, 1, 2, 0, Ok(5)), _try(2, 3, 4, 5, Ok(6))
    assert explains([first, other, _try(1, 5, 6, 0, Ok(5))])
    assert not explains([first, other, _try(1, 5, 6, 0, Ok(7))])
    assert not explains([first, other, _try(1, 5, 6, 0, Mismatch(6, b"2"))])


def test_two_changes_never_replace_one_version() -> None:
    assert not explains([_try(1, 1, 10, 0, Ok(5)), _try(2, 2, 11, 0, Ok(6))])
    assert explains([_try(1, 1, 10, 0, Ok(5)), _try(2, 2, 11, 0, Mismatch(5, b"1"))])


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_runs(name: str) -> None:
    world = Job(name, 1, 1).world(1)
    world.run()
    assert world.figures.operations > 5
