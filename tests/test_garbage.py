"""How others have lost data while they cleaned up, moved and switched, by name; and what a holder may drop.

Each schedule fails if its guard is missing: tests/test_keeper_sim.py shows that.
"""

from __future__ import annotations

from tests.keeper_sim import schedules
from tests.keeper_sim.mutants import REAL

# -- classic losses -------------------------------------------------------------------------------


def test_source_dropped_before_the_new_pieces_were_safe() -> None:
    schedules.source_is_kept_until_the_new_pieces_are_safe(REAL)


def test_garbage_collected_from_a_partial_listing() -> None:
    schedules.garbage_is_not_what_a_partial_listing_misses(REAL)


def test_a_late_commit_after_its_pieces_were_collected() -> None:
    schedules.late_commit_does_not_name_what_was_collected(REAL)


def test_two_keepers_writing_the_same_piece() -> None:
    schedules.two_keepers_do_not_write_the_same_piece(REAL)


def test_the_last_copies_dropped_while_the_named_ones_are_not_all_there() -> None:
    schedules.last_copies_stay_while_the_named_ones_are_not_all_there(REAL)


# -- others ---------------------------------------------------------------------------------------


def test_a_late_adoption_after_its_piece_was_collected() -> None:
    schedules.late_adoption_does_not_name_what_was_collected(REAL)


def test_a_damaged_piece_is_not_adopted() -> None:
    schedules.damaged_pieces_are_not_adopted(REAL)


def test_a_piece_that_was_named_between_two_passes_has_its_whole_grace_again() -> None:
    schedules.piece_that_was_named_between_two_passes_has_its_whole_grace_again(REAL)


def test_a_keeper_that_was_overtaken_changes_nothing() -> None:
    schedules.keeper_that_was_overtaken_changes_nothing(REAL)


def test_a_chunk_that_is_nearly_lost_is_not_switched_by_half() -> None:
    schedules.nearly_lost_chunk_is_not_switched_by_half(REAL)


def test_no_copy_is_given_up_for_others_that_nobody_has_looked_at() -> None:
    schedules.no_copy_is_given_up_for_others_that_nobody_has_looked_at(REAL)


def test_what_could_not_be_written_stays_named_where_it_was() -> None:
    schedules.what_could_not_be_written_stays_where_it_was(REAL)


def test_a_video_does_not_end_while_a_listing_may_miss_its_chunks() -> None:
    schedules.video_does_not_end_while_a_listing_may_miss_its_chunks(REAL)


def test_a_video_that_was_undeleted_meanwhile_has_its_whole_time_again() -> None:
    schedules.undeleted_video_has_its_whole_time_again(REAL)


def test_two_keepers_at_once_do_not_count_the_same_time_twice() -> None:
    schedules.two_keepers_do_not_count_the_same_time_twice(REAL)


def test_a_clock_that_jumps_by_years_ends_no_window() -> None:
    schedules.clock_that_jumps_ends_no_window(REAL)


def test_an_absent_register_authorises_no_drop_and_the_piece_is_reported() -> None:
    schedules.absent_register_authorises_no_drop(REAL)


def test_pieces_of_an_open_upload_stay_however_long_it_takes() -> None:
    schedules.pieces_of_an_open_upload_stay(REAL)


def test_a_piece_that_is_not_there_is_missed() -> None:
    schedules.piece_that_is_not_there_is_missed(REAL)
