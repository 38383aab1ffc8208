"""The command line as a user types it, against a mesh that `vstack up` started."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from vstack.cli import show
from vstack.cli.main import build_parser
from vstack.client.proof import compare_files
from vstack.local import free_port, recorded, running
from vstack.node.main import read_options, settings_from
from vstack.samples import make_sample

from .cluster import vstack, wait_for

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a mesh of five nodes runs detached, as a user would have it."""
    folder = tmp_path_factory.mktemp("home")
    port = free_port(5)
    done = vstack("up", "--detach", "--port", str(port), cwd=folder)
    assert done.code == 0, done
    try:
        yield folder
    finally:
        down = vstack("down", "--json", cwd=folder)
        assert down.json == {"stopped": 5}
        assert not running(folder / ".vstack")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "holiday.mp4"
    make_sample(path, seconds=9, size=(320, 180))
    return path


@pytest.fixture(scope="module")
def video(home: Path, film: Path) -> str:
    done = vstack("put", film, cwd=home)
    assert done.code == 0, done
    assert re.fullmatch(r"[0-9a-f]{64}\n", done.out)
    return done.out.strip()


def test_a_second_up_says_that_the_mesh_runs(home: Path) -> None:
    vstack("up", "--detach", cwd=home).failed_with(2, "vstack down")


def test_up_starts_again_what_has_ended_of_a_mesh_that_runs(home: Path) -> None:
    before = running(home / ".vstack")
    killed = sorted(before)[1]
    os.kill(before[killed], signal.SIGKILL)
    wait_for(lambda: len(running(home / ".vstack")) == 4)
    vstack("up", cwd=home).failed_with(2, "1 node that ended", "vstack up --detach")
    said = vstack("up", "--detach", "--dir", home / ".vstack", cwd=home)
    assert said.code == 0, said
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith("node ")] == ["2"]
    now = running(home / ".vstack")
    assert len(now) == 5
    assert {d: pid for d, pid in now.items() if d in before and d != killed} == {
        d: pid for d, pid in before.items() if d != killed
    }
    wait_for(lambda: vstack("status", cwd=home).code == 0)
    vstack("up", "--detach", cwd=home).failed_with(2, "vstack down")


def test_putting_it_again_copies_nothing_and_a_new_title_is_an_update(
    home: Path, film: Path, video: str
) -> None:
    def stored(*words: str) -> tuple[object, object]:
        found = vstack("put", film, "--json", *words, cwd=home).json["stored"]
        assert isinstance(found, list)
        assert found[0]["id"] == video
        return found[0]["state"], found[0]["title"]

    assert stored() == ("present", "holiday")
    assert stored("--title", "by the sea") == ("updated", "by the sea")
    assert stored("--title", "holiday") == ("updated", "holiday")


def test_ls_and_info_show_it_by_id_prefix_and_title(home: Path, video: str) -> None:
    plain = vstack("ls", cwd=home)
    assert video[:12] in plain.out
    assert "holiday" in plain.out
    listing = vstack("ls", "--json", cwd=home).json
    assert listing["complete"] is True
    for name in (video, video[:6], "holiday"):
        found = vstack("info", name, "--json", cwd=home).json
        assert found["id"] == video
        table = found["chunk_table"]
        assert isinstance(table, list)
        assert {(c["k"], c["m"], len({p["node"] for p in c["places"]})) for c in table} == {(3, 5, 5)}
    assert "any 2 of 5 nodes" in vstack("info", "holiday", cwd=home).out


def test_get_gives_a_file_or_a_stream_with_every_packet(
    home: Path, film: Path, video: str, tmp_path: Path
) -> None:
    assert vstack("get", "holiday", "-o", tmp_path / "copy.mp4", cwd=home).code == 0
    assert compare_files(film, tmp_path / "copy.mp4").equal
    with (tmp_path / "stream.mp4").open("wb") as stream:
        command = [sys.executable, "-c", "from vstack.cli import main; main()", "get", video[:8], "-o", "-"]
        subprocess.run(command, stdout=stream, cwd=home, check=True, timeout=60)
    assert compare_files(film, tmp_path / "stream.mp4").equal


def test_play_decodes_every_frame_and_reports_metrics(home: Path, video: str) -> None:
    report = vstack("play", video, "--speed", "2", "--json", cwd=home).json
    assert report["video_frames"] == 9 * 24
    assert report["decode_errors"] == 0
    assert report["rebuffers"] == 0
    plain = vstack("play", video, "--start", "5", "--speed", "6", cwd=home)
    assert plain.code == 0
    assert "startup_s" in plain.out
    vstack("play", video, "--start", "99", cwd=home).failed_with(2, "9.0 s long")


def test_rm_hides_it_and_put_brings_it_back(home: Path, film: Path, video: str) -> None:
    assert vstack("rm", "holiday", cwd=home).code == 0
    assert vstack("ls", "--json", cwd=home).json["videos"] == []
    hidden = vstack("ls", "--all", "--json", cwd=home).json["videos"]
    assert isinstance(hidden, list)
    assert [(v["id"], v["state"]) for v in hidden] == [(video, "deleted")]
    for name in (video, video[:9], "holiday"):
        vstack("get", name, "-o", "x.mp4", cwd=home).failed_with(4, f"vstack undelete {video[:12]}")
    vstack("get", "0" * 64, "-o", "x.mp4", cwd=home).failed_with(4, "vstack ls")
    again = vstack("put", film, "--json", cwd=home).json["stored"]
    assert isinstance(again, list)
    assert again[0]["state"] == "undeleted"


def test_status_and_nodes_answer_in_both_forms(home: Path) -> None:
    status = vstack("status", "--json", cwd=home)
    assert status.code == 0
    assert status.json["nodes_up"] == 5
    counters = status.json["counters"]
    assert isinstance(counters, dict)
    assert counters["paxos.chosen"] > 0
    said = vstack("status", cwd=home).out
    assert "healthy" in said
    assert "refused for their keys" not in said, "not even while they met"
    nodes = vstack("nodes", "--json", cwd=home).json["nodes"]
    assert isinstance(nodes, list)
    assert len(nodes) == 5
    assert len(vstack("nodes", cwd=home).out.splitlines()) == 6


def test_a_folder_is_stored_recursively_with_a_summary_of_failures(
    home: Path, film: Path, tmp_path: Path, video: str
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "same.mp4").write_bytes(film.read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"no film at all" * 100)
    (tmp_path / "notes.txt").write_text("not to be looked at")
    done = vstack("put", tmp_path, "--json", cwd=home)
    assert done.code == 5
    stored, failed = done.json["stored"], done.json["failed"]
    assert isinstance(stored, list)
    assert isinstance(failed, list)
    assert [s["state"] for s in stored] == ["present"]
    assert [Path(f["file"]).name for f in failed] == ["broken.mp4"]
    assert "1 failed" in vstack("put", tmp_path, cwd=home).err


def test_standard_input_is_stored_too(home: Path, tmp_path: Path) -> None:
    film = tmp_path / "pipe.mkv"
    make_sample(film, seconds=2, size=(160, 90), kind="mandelbrot")
    command = [sys.executable, "-c", "from vstack.cli import main; main()", "put", "-", "--title", "piped"]
    with film.open("rb") as source:
        done = subprocess.run(command, stdin=source, capture_output=True, cwd=home, check=True, timeout=60)
    assert re.fullmatch(rb"[0-9a-f]{64}\n", done.stdout)
    assert vstack("rm", "piped", cwd=home).code == 0


def test_up_in_the_foreground_ends_its_nodes_on_ctrl_c_and_when_it_is_killed(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        port = str(free_port(3))
        command = [sys.executable, "-c", "from vstack.cli import main; main()", "up", "3", "--port", port]
        folder = tmp_path / number.name
        folder.mkdir()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert process.stdout is not None
            while b"the mesh is up" not in process.stdout.readline():
                assert process.poll() is None
            pids = running(folder / ".vstack")
            assert len(pids) == 3
            os.kill(process.pid, number)
            process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
        wait_for(lambda folder=folder: not running(folder / ".vstack"))  # type: ignore[misc]


def test_a_node_that_has_left_for_good_does_not_keep_the_others_from_starting(tmp_path: Path) -> None:
    assert vstack("up", "4", "--detach", "--port", str(free_port(4)), cwd=tmp_path).code == 0
    try:
        nodes = {Path(data).name: pid for data, pid in running(tmp_path / ".vstack").items()}
        port = int(str((recorded(tmp_path / ".vstack") or {})["port"])) + 4
        assert vstack("mesh", "remove", f"127.0.0.1:{port}", cwd=tmp_path).code == 0
        wait_for(lambda: len(running(tmp_path / ".vstack")) == 3)
        os.kill(nodes["node-2"], signal.SIGKILL)
        wait_for(lambda: len(running(tmp_path / ".vstack")) == 2)
        said = vstack("up", "--detach", cwd=tmp_path)
        assert said.code == 1
        assert "node 3" in said.err
        assert [line.split()[1] for line in said.out.splitlines() if line.startswith("node ")] == ["2"]
        assert len(running(tmp_path / ".vstack")) == 3
        wait_for(lambda: vstack("status", cwd=tmp_path).code == 0)
        assert vstack("down", cwd=tmp_path).code == 0
        said = vstack("up", "--detach", cwd=tmp_path)
        assert said.code == 1
        assert len(running(tmp_path / ".vstack")) == 3
    finally:
        vstack("down", cwd=tmp_path)


def test_titles_are_shown_as_they_are_and_never_as_markup(home: Path, film: Path, video: str) -> None:
    for title in ("{task.foo} {0}{x", "[/red] [bold]x", "tab\there \x1b[31m red"):
        assert vstack("put", film, "--title", title, cwd=home).code == 0
        listing = vstack("ls", cwd=home).out
        assert "\x1b" not in listing
        assert title.replace("\t", "\\t").replace("\x1b", "\\x1b") in listing
        with show.bar(title) as bar:
            bar.update("there", 1, 2)
    assert vstack("put", film, "--title", "holiday", cwd=home).code == 0
    with film.open("rb") as source:  # a name that nobody typed does not replace one
        command = [sys.executable, "-c", "from vstack.cli import main; main()", "put", "-"]
        subprocess.run(command, stdin=source, capture_output=True, cwd=home, check=True, timeout=60)
    assert vstack("info", "holiday", cwd=home).code == 0


def test_bars_on_a_terminal_take_any_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "err", Console(force_terminal=True, file=io.StringIO(), markup=False))
    with show.bar("{task.foo} {0}{x [/red]") as bar:
        bar.update("there", 1, 2)


@pytest.mark.parametrize(
    "words", [("--start", "nan"), ("--speed", "nan"), ("--speed", "1e300"), ("--buffer", "nan")]
)
def test_numbers_that_are_none_are_refused(home: Path, video: str, words: tuple[str, str]) -> None:
    vstack("play", video, *words, cwd=home).failed_with(2, "--speed")


@pytest.mark.parametrize("words", [("0",), ("51",), ("3", "--port", "0"), ("3", "--port", "65535")])
def test_a_mesh_that_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert vstack("up", *words, cwd=tmp_path).code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_and_strange_peers_are_refused_in_words(home: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    vstack("put", tmp_path / "fifo", cwd=home).failed_with(5, "not a regular file")
    vstack("ls", peers="http://127.0.0.1:7400").failed_with(2, "HOST:PORT")


def has_open(pid: int, path: Path) -> bool:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if fd.resolve() == path.resolve():
                return True
        except OSError:
            pass  # closed meanwhile
    return False


def test_ctrl_c_while_a_large_file_is_hashed_ends_it_at_once(home: Path, tmp_path: Path) -> None:
    large = tmp_path / "sparse.bin"
    with large.open("wb") as f:
        f.truncate(60 << 30)
    command = [sys.executable, "-c", "from vstack.cli import main; main()", "put", "--opaque", str(large)]
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: has_open(process.pid, large))
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert b"resumes" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_get_whose_reader_stalls_ends_when_it_is_told_to(home: Path, video: str) -> None:
    command = [sys.executable, "-c", "from vstack.cli import main; main()", "get", video, "-o", "-"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it writes; from now on nobody reads
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    text = vstack("--help").out
    for verb in ("up", "down", "put", "ls", "info", "get", "play", "rm", "status", "nodes"):
        assert re.search(rf"^    {verb} ", text, re.MULTILINE), verb
        assert vstack(verb, "--help").code == 0
    assert "exit codes" in text


def test_every_vstack_command_in_the_readme_and_the_manual_parses() -> None:
    """Those that need a mesh run in the tests above; scripts/demo and scripts/test run in CI."""
    lines = []
    for page in (ROOT / "README.md", ROOT / "docs" / "cli.md", ROOT / "docs" / "operations.md"):
        for block in re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(), re.DOTALL):
            lines += re.findall(r"^\$?\s*(?:\.venv/bin/)?vstack ([^|\n#]+)", block, re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        build_parser().parse_args(shlex.split(line))


def test_every_vstack_node_command_in_the_pages_is_a_good_configuration() -> None:
    lines = []
    for page in (ROOT / "README.md", ROOT / "docs" / "operations.md"):
        lines += re.findall(r"^vstack-node ([^|\n#]+)", page.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        settings = settings_from(read_options(shlex.split(line)))
        assert settings.advertise in settings.peers
