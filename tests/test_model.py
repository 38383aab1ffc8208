"""The model of the protocol, searched by Spin, through the script that users run."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = Path("scripts/check-model")
MODEL = Path("spec/chunkpaxos.pml")

MISSING = [tool for tool in ("spin", "cc") if shutil.which(tool) is None]
needs_spin = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {MISSING}; on Debian: apt-get install spin gcc libc6-dev"
)


@dataclass(frozen=True)
class Row:
    """One search: a line of the script's table."""

    model: str
    asserts: str
    states: int
    result: str


def check(*options: str, root: Path = ROOT) -> tuple[int, list[Row], str]:
    """Exit code, table and whole output of the script."""
    done = subprocess.run([root / SCRIPT, *options], capture_output=True, text=True)
    line = re.compile(r"(\S.*?)  +(all|outcomes|possible) +(\d+) +\d+ +[\d.]+ +\d+  (\w.*)")
    rows = [
        Row(m[1], m[2], int(m[3]), m[4])
        for m in map(line.fullmatch, done.stdout.splitlines())
        if m is not None
    ]
    return done.returncode, rows, done.stdout + done.stderr


@pytest.fixture(scope="module")
def table() -> list[Row]:
    code, rows, output = check()
    assert code == 0, output
    return rows


@pytest.fixture
def long_run(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("a minute and 3 GB: --long runs it")


def named_in_model(section: str) -> set[str]:
    """The variants that the model's own introduction lists under `section`."""
    listed = (ROOT / MODEL).read_text().split(section)[1].split("\n *\n")[0].split("*/")[0]
    return set(re.findall(r"^ \*   ([A-Z_0-9]+) ", listed, re.M))


@needs_spin
def test_three_ballots_hold_in_every_state(table: list[Row]) -> None:
    sound = {row.model: row for row in table if row.model.startswith("sound")}
    assert {name: row.result for name, row in sound.items()} == {
        "sound, 3 acceptors, 2+3": "holds",
        "sound, 5 acceptors, 2+1": "holds",
    }
    assert sound["sound, 3 acceptors, 2+3"].states > 500_000


@needs_spin
def test_every_wrong_variant_of_the_model_fails(table: list[Row]) -> None:
    failed = {row.model for row in table if row.result.startswith("violates")}
    wrong = named_in_model("Wrong variants")
    assert len(wrong) == 11
    assert wrong <= failed


@needs_spin
def test_wrong_variants_show_in_what_users_see(table: list[Row]) -> None:
    outcomes = {row.model: row.result for row in table if row.asserts == "outcomes"}
    assert set(outcomes) == named_in_model("Wrong variants") - {"BALLOT_TWICE"}
    assert set(outcomes.values()) <= {
        "violates agreement",
        "violates read_is_chosen",
        "violates read_is_recent",
    }


@needs_spin
def test_what_the_model_must_be_able_to_do_is_possible(table: list[Row]) -> None:
    possible = {row.model: row.result for row in table if row.asserts == "possible"}
    assert possible == dict.fromkeys(named_in_model("Must be possible"), "violates not_seen")


@needs_spin
def test_each_assertion_of_the_model_can_fail(table: list[Row]) -> None:
    text = (ROOT / MODEL).read_text()
    asserted = set(re.findall(r"assert\((\w+)\)|INVARIANT\((\w+), ", text))
    names = {a or b for a, b in asserted} - {"name"}
    assert len(names) == 9
    assert names == {row.result.removeprefix("violates ") for row in table if row.result != "holds"}


@needs_spin
def test_the_script_refuses_a_model_that_fails_a_variant_that_holds_and_a_search_cut_short(
    tmp_path: Path,
) -> None:
    """Three faults at once, each in other searches."""
    for part in (SCRIPT, MODEL):
        (tmp_path / part).parent.mkdir()
        shutil.copy(ROOT / part, tmp_path / part)
    text = (tmp_path / MODEL).read_text()
    wrong = "#if BALLOTS == 1 && ACCEPTORS == 3\n#define FRESH_OVER_PROMISE\n#endif\n"
    harmless = text.replace("#ifdef READ_TAKES_HIGHEST", "#ifdef READ_AS_IT_SHOULD")
    assert harmless != text
    (tmp_path / MODEL).write_text(wrong + harmless)
    script = (tmp_path / SCRIPT).read_text()
    shallow = script.replace("-m100000", "-m33")
    assert shallow != script
    (tmp_path / SCRIPT).write_text(shallow)

    code, rows, output = check("--ballots", "1", root=tmp_path)

    results = {(row.model, row.asserts): row.result for row in rows}
    assert code == 1
    assert results["sound, 3 acceptors, 2+1", "all"].startswith("violates")
    assert results["sound, 5 acceptors, 2+1", "all"] == "incomplete"
    assert results["READ_TAKES_HIGHEST", "outcomes"] == "holds"
    assert output.count("wanted: holds") == 2
    assert "wanted: violates" in output


def test_without_spin_the_script_names_the_packages(tmp_path: Path) -> None:
    for tool in ("bash", "dirname"):
        where = shutil.which(tool)
        assert where is not None
        (tmp_path / tool).symlink_to(where)
    done = subprocess.run(
        [tmp_path / "bash", ROOT / SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "apt-get install spin gcc" in done.stderr


@pytest.mark.parametrize(
    "options", [("--ballots", "5"), ("--ballots",), ("--acceptors", "5", "--ballots", "3")]
)
def test_sizes_that_cannot_be_searched_are_refused(options: tuple[str, ...]) -> None:
    code, rows, _ = check(*options)
    assert code == 2
    assert rows == []


@needs_spin
@pytest.mark.usefixtures("long_run")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--ballots", "4"), "sound, 3 acceptors, 2+4"),
        (("--acceptors", "5", "--ballots", "2"), "sound, 5 acceptors, 2+2"),
    ],
)
def test_larger_models_hold_in_every_state(options: tuple[str, ...], name: str) -> None:
    code, rows, output = check(*options)
    assert code == 0, output
    assert [row.result for row in rows if row.model == name] == ["holds"]
