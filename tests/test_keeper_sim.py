"""The keeper, mender and collector under seeded faults, and wrong variants of them that must be caught.

VSTACK_SEED sets the first seed; otherwise the day does, so that every day runs other schedules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.keeper_sim import schedules
from tests.keeper_sim.ledger import Violation
from tests.keeper_sim.main import Job, first_caught, run_all, violation_of
from tests.keeper_sim.mutants import MUTANTS
from tests.keeper_sim.profile import PROFILES
from tests.keeper_sim.world import Parts

ROOT = Path(__file__).parents[1]
BASE = int(os.environ.get("VSTACK_SEED") or datetime.now(UTC).strftime("%Y%m%d0000"))
EACH, EACH_LONG = 30, 1500
"""Seeds of each profile."""

BY_HAND: dict[str, Callable[[Parts], None]] = {
    "no-fence": schedules.late_commit_does_not_name_what_was_collected,
    "no-grace": schedules.piece_that_was_named_between_two_passes_has_its_whole_grace_again,
    "named-pieces-are-not-looked-at": schedules.last_copies_stay_while_the_named_ones_are_not_all_there,
    "absent-is-deleted": schedules.absent_register_authorises_no_drop,
    "open-uploads-are-garbage": schedules.pieces_of_an_open_upload_stay,
    "garbage-stays": schedules.two_keepers_do_not_write_the_same_piece,
    "a-listing-decides": schedules.garbage_is_not_what_a_partial_listing_misses,
    "adopts-what-it-has-not-seen": schedules.damaged_pieces_are_not_adopted,
    "named-meanwhile-is-no-matter": (
        schedules.piece_that_was_named_between_two_passes_has_its_whole_grace_again
    ),
    "adoptions-under-way-are-forgotten": schedules.late_adoption_does_not_name_what_was_collected,
    "listings-are-complete": schedules.video_does_not_end_while_a_listing_may_miss_its_chunks,
    "windows-by-the-clock": schedules.clock_that_jumps_ends_no_window,
    "nobody-is-asked": schedules.piece_that_is_not_there_is_missed,
    "time-is-counted-twice": schedules.two_keepers_do_not_count_the_same_time_twice,
    "names-before-writing": schedules.source_is_kept_until_the_new_pieces_are_safe,
    "failed-writes-count": schedules.what_could_not_be_written_stays_where_it_was,
    "expects-whatever-is-there": schedules.keeper_that_was_overtaken_changes_nothing,
    "relies-on-the-unseen": schedules.no_copy_is_given_up_for_others_that_nobody_has_looked_at,
    "old-places-are-forgotten": schedules.what_could_not_be_written_stays_where_it_was,
    "two-keepers-share-a-name": schedules.two_keepers_do_not_write_the_same_piece,
    "switches-by-half": schedules.nearly_lost_chunk_is_not_switched_by_half,
}
"""Each wrong variant, and a schedule that shows it."""

BY_SEEDS: dict[str, str] = {
    "no-grace": "mixed",
    "absent-is-deleted": "mixed",
    "open-uploads-are-garbage": "mixed",
    "a-listing-decides": "partial",
    "adopts-what-it-has-not-seen": "brink",
    "newer-uploads-are-deleted": "mixed",
    "purges-before-it-says-so": "mixed",
    "names-before-writing": "mixed",
    "failed-writes-count": "mixed",
    "two-keepers-share-a-name": "mixed",
    "switches-by-half": "brink",
}
"""Those that chance finds soon, and the profile that shows them."""
SOON = 60
"""Seeds."""


def test_seeds_show_no_violation(request: pytest.FixtureRequest) -> None:
    each = EACH_LONG if request.config.getoption("--long") else EACH
    figures, failures = Counter[str](), list[str]()
    for report in run_all([Job(profile, BASE, each) for profile in PROFILES]):
        figures.update(report.figures)
        failures += report.failures
    assert not failures, "\n".join(failures[:20])
    seeds = figures["seeds"]
    assert seeds == each * len(PROFILES)
    happened = {"crashes", "silences", "losses", "joins", "drains", "upload", "upload_anew", "delete", "view"}
    assert min(figures[what] for what in happened) > seeds / 4
    assert figures["spoilt"] > 2 * seeds


def test_every_wrong_variant_is_caught_by_chance_or_by_a_schedule() -> None:
    assert set(BY_HAND) | set(BY_SEEDS) == set(MUTANTS)


@pytest.mark.parametrize("mutant", BY_HAND)
def test_a_schedule_shows_a_wrong_variant(mutant: str) -> None:
    with MUTANTS[mutant].in_force() as parts, pytest.raises((AssertionError, Violation)):
        BY_HAND[mutant](parts)


@pytest.mark.parametrize("mutant", BY_SEEDS)
def test_chance_shows_a_wrong_variant(mutant: str) -> None:
    assert first_caught(Job(BY_SEEDS[mutant], 0, SOON, mutant)) is not None


def test_a_seed_is_a_schedule_whatever_the_hash_seed() -> None:
    command = [sys.executable, "-m", "tests.keeper_sim.main", "--seeds", "2", "--seed", "7", "--jobs", "1"]

    def figures(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )  # fmt: skip
        return ran.stdout.split(";")[0]

    assert figures("1") == figures("2")
    assert violation_of("mixed", 7)[1] == violation_of("mixed", 7)[1]
