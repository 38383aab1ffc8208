"""The benchmarks of what nodes do by themselves run on small data, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import wait_for
from tests.test_benchmark import nothing_is_left

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(folder: Path, program: str, *words: str) -> dict[str, object]:
    """Its report. Fails the test if it does not end well, or leaves anything."""
    command = [sys.executable, str(BENCHMARKS / program), *words, "--json"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert nothing_is_left(folder)
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


@pytest.mark.processes
def test_two_of_five_nodes_are_lost_and_no_read_fails_while_the_most_endangered_chunks_come_first(
    tmp_path: Path,
) -> None:
    report = run(tmp_path, "repair.py", "--size", "48", "--seconds", "1", "--pace", "10")
    assert report["failed"] == []
    playback, order, whole, reads = (report[k] for k in ("playback", "order", "all", "reads"))
    assert isinstance(playback, dict)
    assert isinstance(order, dict)
    assert isinstance(whole, dict)
    assert isinstance(reads, dict)
    assert (playback["rebuffers"], playback["decode_errors"]) == (0, 0)
    assert playback["played_s"] > 0
    assert order["out_of_order"] == 0
    assert any("0" in sequence for sequence in order["spare_before"])
    assert whole["restored_mb"] > 0
    assert whole["written_per_byte"] >= 1
    for when in ("before", "losing", "two dead"):
        figures = reads[when]
        assert figures["reads"] > 0
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]


@pytest.mark.processes
def test_a_join_and_a_drain_move_about_what_they_have_to_and_never_cost_redundancy(tmp_path: Path) -> None:
    report = run(tmp_path, "balance.py", "--size", "24")
    changes = report["changes"]
    assert isinstance(changes, list)
    assert [c["change"] for c in changes] == ["a sixth joins", "one is drained"]
    for change in changes:
        assert 0.5 < change["moved_to_ideal"] < 1.5, "chance weighs more in so few chunks"
        assert change["redundancy"]["schemes"] == {
            "3 copies": {"fewest": 3, "of": 3},
            "3-of-5": {"fewest": 5, "of": 5},
        }
        assert change["redundancy"]["samples"] > 1
    assert changes[1]["moved_mb"] == pytest.approx(changes[1]["ideal_mb"], rel=0.01)


@pytest.mark.processes
def test_votes_are_measured_under_ingest_and_under_repair_beside_quiet(tmp_path: Path) -> None:
    report = run(tmp_path, "ingest.py", "--rounds", "1", "--seconds", "0.5", "--repair", "32")
    rows = report["rows"]
    assert isinstance(rows, list)
    assert [r["turn"] for r in rows] == ["quiet", "ingest", "elsewhere", "held", "repair"]
    for row in rows:
        assert (row["mb_s"] > 0) == (row["turn"] in ("ingest", "elsewhere", "repair")), row
        for what in ("create", "read", "fdatasync"):
            assert 0 < row[what]["p50_ms"] <= row[what]["p99_ms"] <= row[what]["max_ms"]


@pytest.mark.processes
@pytest.mark.parametrize("program", ["repair.py", "balance.py", "ingest.py"])
def test_one_that_is_told_to_end_leaves_nothing(tmp_path: Path, program: str) -> None:
    said = tmp_path / "said"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, str(BENCHMARKS / program)]
    with said.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": str(temporary)}, stdout=out, stderr=out
        )
    try:
        wait_for(lambda: any(temporary.glob("benchmark-*/*/node-*/store/superblocks/*.vsb")), within=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    assert b"interrupted" in said.read_bytes()
    assert nothing_is_left(temporary)


@pytest.mark.parametrize(
    ("program", "words"),
    [("repair.py", ("--size", "1")), ("balance.py", ("--size", "0")), ("ingest.py", ("--rounds", "0"))],
)
def test_what_would_measure_nothing_is_refused(program: str, words: tuple[str, ...]) -> None:
    command = [sys.executable, str(BENCHMARKS / program), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "at least" in done.stderr
