"""The benchmark of the store in its short form: it measures what it says it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_of_the_store_starts_rebuilds_and_looks_up(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/store.py", "--pieces", "4000", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    valid, hints, scan = (figures[n] for n in ("valid_index", "rebuild_by_hints", "rebuild_by_scan"))
    assert (valid["pieces"], valid["scanned"], valid["hinted"]) == (4000, 0, 0)
    assert (hints["pieces"], hints["scanned"] + hints["hinted"]) == (4000, 4000)
    assert scan["hinted"] == 0
    assert scan["scanned"] >= 3990
    assert figures["rebuild_large_by_scan"]["scanned_bytes"] > 2 << 20
    assert figures["lookups"]["lookup_median_us"] > 0
    assert list(tmp_path.iterdir()) == []
