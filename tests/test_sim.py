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

from tests import test_replica
from tests.sim.linearizability import Try, explains
from tests.sim.main import Job, first_caught, run_all, shrink, sliced
from tests.sim.mutants import MUTANTS
from tests.sim.profiles import CHANGING, NAMES
from tests.sim.world import Figures
from vstack.mesh.messages import Found, Mismatch, Ok, Op, Outcome, Unknown

ROOT = Path(__file__).parents[1]
BASE = int(os.environ.get("VSTACK_SEED") or datetime.now(UTC).strftime("%Y%m%d0000"))
MIXED, STILL, CHANGING_EACH = 800, 140, 90
"""Seeds of the mixed profile, of each in which the mesh stays as it is, and of each in which it changes."""

CAUGHT: dict[str, tuple[str, int]] = {
    "B1-new-value-under-old-ballot": ("undead", 3),  # I3
    "B2-accept-keeps-promise": ("crashy", 0),  # I2
    "B2-prepare-ignores-accepted": ("crashy", 0),  # I2
    "B3-replies-before-sync": ("crashy", 0),  # I6
    "B3-requests-before-sync": ("crashy", 0),  # I8
    "B3-promises-in-memory": ("crashy", 0),  # I1
    "B3-votes-in-memory": ("crashy", 0),  # I1
    "B4-ballots-without-owner": ("create-races", 0),  # I4
    "B5-boot-stands-still": ("reborn", 0),  # boot
    "B5-boot-and-rounds-start-over": ("reborn", 0),  # boot
    "B5-tokens-start-over": ("reborn", 2),  # token
    "B6-old-promises-count": ("undead", 0),  # I4
    "B7-highest-of-mixed-quorum": ("hot", 2),  # I6
    "B7-mismatch-without-decision": ("hot", 0),  # I6
    "B8-no-operation-ids": ("calm", 0),  # I6
    "B8-version-is-not-compared": ("calm", 0),  # linearizability
    "B12-failed-round-is-cleaned-up": ("crashy", 0),  # I1
    "B13-delete-starts-over": ("graveyard", 0),  # I6
    "promise-hides-value": ("create-races", 0),  # I5
    "accept-ignores-promise": ("crashy", 1),  # I8
    "fresh-ignores-promise": ("graveyard", 0),  # I8
    "fresh-overwrites": ("create-races", 0),  # I1
    "damaged-is-absent": ("mixed", 5),  # I1
    "old-votes-count": ("graveyard", 2),  # I6
    "refusals-count-as-promises": ("create-races", 0),  # I4
    "one-promise-less": ("create-races", 0),  # I4
    "any-promised-value": ("create-races", 1),  # I5
    "one-vote-less": ("create-races", 0),  # I6
    "first-reply-is-the-answer": ("graveyard", 1),  # linearizability
    "giving-up-is-failure": ("create-races", 0),  # I6
    "versions-stand-still": ("create-races", 0),  # I5
    "forgotten-evidence-is-mismatch": ("hot", 17),  # linearizability
    "patience-stands-still": ("far", 0),  # liveness
    "forwards-share-a-token": ("hot", 85),  # linearizability
    "everyone-creates": ("create-races", 0),  # I8
    "others-vote-first": ("create-races", 0),  # I8
    "B9-pruned-at-quorum": ("lagging", 0),  # I1
    "B10-groups-change-without-their-state": ("lagging", 0),  # linearizability
    "B11-one-key-is-rescanned": ("lagging", 0),  # base
    "B13-zombie-keeps-its-votes": ("lagging", 0),  # I7
    "B14-votes-of-another-epochs-group": ("lagging", 0),  # I6
    "B14-promises-of-the-newest-group-only": ("lagging", 0),  # I4
    "B15-base-passes-who-is-cut-off": ("lagging", 20),  # base
    "B15-one-settled-node-too-few": ("lagging", 2),  # base
    "B15-settled-before-listing": ("lagging", 0),  # base
    "B15-settled-before-adopting": ("regrow", 0),  # base
    "B16-eras-are-a-set": ("lagging", 0),  # I4
    "B17-snapshot-votes": ("restored", 8),  # boot
    "B17-identity-outlives-the-votes": ("restored", 0),  # boot
    "B18-commits-are-dropped": ("lagging", 0),  # I1
    "B19-two-groups-in-one-epoch": ("recover", 0),  # I7
    "run-overwrites": ("batches", 0),  # I8
    "run-ignores-what-is-not-on-disk-yet": ("batches", 0),  # I8
    "run-ignores-leader": ("batches", 1),  # I8
    "run-of-first-leader": ("batches", 3),  # I8
    "run-ignores-fence": ("batches-moving", 1),  # fence
    "run-in-a-later-epoch": ("batches-moving", 3),  # I8
    "run-leaves-own-disk-out": ("batches", 0),  # I8
    "one-vote-less-for-a-run": ("batches", 0),  # I6
    "dissolved-run-is-accepted": ("batches", 9),  # I6
    "dissolved-run-has-another-value": ("batches", 1),  # I3
    "no-fence": ("lagging", 0),  # fence
    "unknown-epochs-are-answered": ("lagging", 0),  # fence
    "epochs-in-memory": ("lagging", 0),  # I1
    "create-in-a-later-epoch": ("regrow", 0),  # I8
    "keys-of-the-future": ("lagging", 1),  # I8
    "attempts-go-on": ("regrow", 0),  # I9
    "older-era-is-read": ("churn", 0),  # base
    "old-operations-are-tried": ("regrow", 0),  # born
    "accepted-is-decided": ("lagging", 0),  # chain
    "changes-of-another-epoch": ("churn", 0),  # chain
    "many-leave-at-once": ("lagging", 0),  # open
    "switched-off-early": ("recover", 3),  # liveness
    "too-many-open": ("lagging", 0),  # open
    "a-majority-founds": ("forming", 0),  # chain
}
"""Each wrong variant: the profile that shows it, and the first of its seeds that does."""

BY_HAND = {
    "rounds-of-changes-start-over": test_replica.test_rounds_that_start_over_are_used_twice,
}
"""Variants that need a schedule of their own."""

BY_HISTORIES: dict[str, tuple[str, int]] = {
    "B3-votes-in-memory": ("crashy", 0),
    "B4-ballots-without-owner": ("hot", 3),
    "B6-old-promises-count": ("reborn", 37),
    "B7-highest-of-mixed-quorum": ("reborn", 15),
    "B7-mismatch-without-decision": ("hot", 15),
    "B8-no-operation-ids": ("calm", 0),
    "B12-failed-round-is-cleaned-up": ("create-races", 2),
    "accept-ignores-promise": ("crashy", 6),
    "fresh-ignores-promise": ("calm", 8),
    "refusals-count-as-promises": ("hot", 50),
    "one-promise-less": ("crashy", 1),
    "any-promised-value": ("crashy", 0),
    "one-vote-less": ("hot", 1),
    "everyone-creates": ("create-races", 1),
    "B9-pruned-at-quorum": ("lagging", 0),
    "B10-groups-change-without-their-state": ("lagging", 0),
    "B11-one-key-is-rescanned": ("restored", 0),
    "B14-promises-of-the-newest-group-only": ("churn", 1),
}
"""Variants that must show in what clients are told, with the invariants switched off."""

SLACK = 200
"""Seeds that a variant may need beyond five times the one on record, after a change of anything."""


def test_thousands_of_seeds_show_no_violation() -> None:
    seeds = {p: MIXED if p == "mixed" else CHANGING_EACH if p in CHANGING else STILL for p in NAMES}
    jobs = [Job(p, BASE, n) for p, n in seeds.items()]
    figures, failures = Figures(), list[str]()
    for report in run_all([part for job in jobs for part in sliced(job)]):
        figures.add(report.figures)
        failures += report.failures
    assert not failures, f"VSTACK_SEED={BASE}\n" + "\n".join(failures[:20])
    assert figures.seeds == sum(seeds.values()) >= 2500
    assert figures.undecided == 0
    assert figures.crashes > figures.seeds
    assert figures.epochs > figures.seeds
    assert figures.lost_disks > 50
    assert figures.decisions > 10 * figures.seeds


def test_every_wrong_variant_is_caught() -> None:
    assert set(CAUGHT) | set(BY_HAND) == set(MUTANTS)
    assert _missed(CAUGHT, blind=False) == []


def test_the_histories_of_clients_alone_show_what_is_wrong() -> None:
    assert _missed(BY_HISTORIES, blind=True) == []


def _missed(table: dict[str, tuple[str, int]], blind: bool) -> list[str]:
    jobs = [Job(p, 0, 5 * seed + SLACK, name, blind=blind) for name, (p, seed) in table.items()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(table, pool.map(first_caught, jobs), strict=True))
    return [name for name, seed in found.items() if seed is None]


def test_a_failing_seed_is_shrunk_to_a_smaller_one_that_fails() -> None:
    job = Job("crashy", 0, 1, "B2-accept-keeps-promise")
    small = shrink(job, 0)
    assert first_caught(small) == 0
    assert small.world(0).profile.ops < job.world(0).profile.ops
    assert "--set crashes=0.0" in small.again(0)


def _trace(profile: str, seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-m", "tests.sim.main", "--trace", "--seeds", "3"]
    command += ["--seed", str(seed), "--profile", profile]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("profile", ["mixed", "restored", "recover"])
def test_a_seed_is_a_schedule_whatever_the_hash_seed(profile: str) -> None:
    assert _trace(profile, 7, "1") == _trace(profile, 7, "2")
    words = set(_trace(profile, 7, "1").split())
    assert len(words) == 3 + 3 + 1, "three different hashes, three seeds, one profile"


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
