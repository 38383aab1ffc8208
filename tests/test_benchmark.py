"""The benchmark runs on small data, proves what came back, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "put_get.py"


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
