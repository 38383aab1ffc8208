"""Damage to the vote store, and commits that fail (bugs B3, B17, B18): it refuses to open, or says of a
record that it is damaged, or everything that was acknowledged is there. Nothing is ever merely absent.

The random part is seeded by VSTACK_SEED.
"""

from __future__ import annotations

import os
import resource
import selectors
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from vstack.errors import DamagedData
from vstack.mesh.config import Config, Member
from vstack.mesh.dialer import NoAnswer
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.messages import Ok, Op, Outcomes, Record, Submit
from vstack.node import votes
from vstack.node.disk import Disk
from vstack.node.rocklog import BLOCK, Manifest, Mark, MarkFile, damaged_header, read_mark
from vstack.node.votes import VoteStore, VotesUnavailable

from .cluster import running_mesh, wait_for, with_client
from .test_votes import NODE, ROOT, key_of, record_of

SEED = int(os.environ.get("VSTACK_SEED", "18"))
HEADER = 7
"""Bytes of the header of a record in RocksDB's logs: checksum, length, type."""
COUNT = 420
BATCH = 6
PAGE = 4096
JUDGED_WITHIN = 30.0
"""Seconds; opening and reading takes a tenth of one."""
BOOTS = 3
"""That `written` spends."""
LAST = [f"video/{'f' * 60}{i:04x}" for i in range(12)]
"""What the last batch of `torn` writes: more than one block of a log."""


def size_of(number: int) -> int:
    return 100 + number * 37 % 900


def records(first: int, last: int) -> dict[str, Record]:
    return {key_of(i): record_of(i, size_of(i)) for i in range(first, last)}


def configs() -> list[Config]:
    members = (Member(NODE, "a:1"), Member("b" * 32, "b:1"))
    return [Config(epoch, members, 1) for epoch in (1, 2, 3)]


# -- stores to be damaged -------------------------------------------------------------------------

_WRITER = """
import shutil, sys
from pathlib import Path
from tests.test_damaged_votes import BATCH, BOOTS, COUNT, LAST, NODE, configs, record_of, records
from vstack.node import votes
folder, end = Path(sys.argv[1]), sys.argv[2]
votes.FLUSH_BYTES = 48 * 1024
for _ in range(BOOTS - 1):
    votes.VoteStore(folder).close()
store = votes.VoteStore(folder)
store.adopt(configs())
for first in range(0, COUNT, BATCH):
    store.commit(records(first, first + BATCH))
    store.meet("c" * 32, 3 + first, b"process")
if end == "closed":
    store.close()
if end == "failed":
    store._mark.write(store._noted._replace(failed=True))
if end == "retired":
    store.retire("met elsewhere")
if end == "torn":
    votes.FLUSH_BYTES = 1 << 20
    shutil.copy(store.folder / "mark", folder.with_name("mark"))
    print((folder / "1/rocks" / max(p.name for p in (folder / "1/rocks").glob("*.log"))).stat().st_size)
    store.commit({key: record_of(number, 4000) for number, key in enumerate(LAST)})
print("done", flush=True)
sys.stdin.read()
"""


def written(folder: Path, end: str) -> str:
    """The store of a process that wrote `records`, some of them in tables and some in the log only, and was
    then killed with SIGKILL. Returns what it said."""
    child = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder), end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    with child:
        said = ""
        while not said.endswith("done\n"):
            line = child.stdout.readline()
            assert line, "the writer ended"
            said += line
        child.kill()
    rocks = folder / "1/rocks"
    assert sum(p.stat().st_size for p in rocks.glob("*.sst")) > 20 * PAGE
    assert end == "closed" or max(rocks.glob("*.log")).stat().st_size > 2 * PAGE
    return said


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By how their process ended."""
    made = {}
    for end in ("killed", "closed", "failed", "retired"):
        made[end] = tmp_path_factory.mktemp(end) / "votes"
        written(made[end], end)
    return made


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def log_of(folder: Path) -> Path:
    return max((folder / "1/rocks").glob("*.log"))


def manifest_of(folder: Path) -> Path:
    return next((folder / "1/rocks").glob("MANIFEST-*"))


Damage = Callable[[bytearray], object]


def damaged(folder: Path, to: Path, name: str, change: Damage) -> Path:
    """A copy with one file changed."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    raw = bytearray((to / name).read_bytes())
    change(raw)
    (to / name).write_bytes(raw)
    return to


def flip(offset: int, bit: int) -> Damage:
    def change(raw: bytearray) -> None:
        raw[offset] ^= 1 << bit

    return change


def cut(end: int) -> Damage:
    def change(raw: bytearray) -> None:
        del raw[end:]

    return change


def zero(offset: int) -> Damage:
    def change(raw: bytearray) -> None:
        raw[offset : offset + PAGE] = bytes(len(raw[offset : offset + PAGE]))

    return change


# -- judging ---------------------------------------------------------------------------------------

_JUDGE = """
import sys
from pathlib import Path
from tests.test_damaged_votes import judge
for line in sys.stdin:
    try:
        verdict = judge(Path(line.rstrip("\\n")))
    except Exception as e:
        verdict = f"WRONG: {type(e).__name__}: {e}"
    print(verdict.replace("\\n", " "), flush=True)
"""


def judge(folder: Path, boots: int = BOOTS) -> str:
    """Opens and reads everything of a store that `written` made: "refused", "partly" (it opens, and says
    DamagedData for some of it) or "whole". Fails if anything else than what was acknowledged comes out."""
    try:
        store = VoteStore(folder)
    except DamagedData:
        return "refused"
    try:
        said: Counter[str] = Counter()
        assert store.boot > boots, "its boot went down"
        assert store.chain() == tuple(configs()), "its chain is another"
        assert not store.meet("c" * 32, 2 + COUNT - BATCH, b"another"), "it forgot whom it met"
        wanted = records(0, COUNT)
        for key, record in wanted.items():
            try:
                assert store.lookup(key) == record, f"{key} is not what was acknowledged"
            except DamagedData:
                said["lookup"] += 1
        for what, walk in (("scan", _scanned), ("keys", _walked), ("subjects", _subjects)):
            try:
                assert [k for k in walk(store) if k not in LAST] == sorted(wanted), f"{what}: not all"
            except DamagedData:
                said[what] += 1
        last = {store.lookup(key) == record_of(n, 4000) for n, key in enumerate(LAST)}
        assert len(last) == 1, "a batch is there whole or not at all"
        store.commit({key_of(COUNT): record_of(COUNT)})
        return "partly" if said else "whole"
    finally:
        store.close()


def _scanned(store: VoteStore) -> list[str]:
    found: list[str] = []
    more = True
    while more:
        rows, more = store.scan("video/", found[-1] if found else "", 100)
        found += [row.key for row in rows]
    return found


def _walked(store: VoteStore) -> list[str]:
    found: list[str] = []
    while page := store.keys(found[-1] if found else "", 100):
        found += page
    return found


def _subjects(store: VoteStore) -> list[str]:
    return [f"video/{subject}" for subject in store.subjects()]


VERDICTS = ("refused", "partly", "whole")


class Judges:
    """A process that judges one store after the other, so that one without end is noticed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _JUDGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ)

    def __call__(self, folder: Path, what: str) -> str:
        """The verdict on a store; a wrong one fails the test, `what` says which trial it was."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        assert self._ready.select(JUDGED_WITHIN), f"{what}: still reading after {JUDGED_WITHIN} s"
        verdict = self._process.stdout.readline().strip()
        assert verdict in VERDICTS, f"{what}: {verdict or 'the process died'}"
        return verdict

    def close(self) -> None:
        self._ready.close()
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def judged() -> Iterator[Judges]:
    judges = Judges()
    yield judges
    judges.close()


# -- damage ----------------------------------------------------------------------------------------


def test_undamaged_stores_are_whole_and_a_retired_one_is_refused(
    stores: dict[str, Path], tmp_path: Path, judged: Judges
) -> None:
    for end, verdict in (
        ("killed", "whole"),
        ("closed", "whole"),
        ("failed", "whole"),
        ("retired", "refused"),
    ):
        assert judged(shutil.copytree(stores[end], tmp_path / end), end) == verdict


def test_a_flipped_bit_anywhere_never_loses_anything_in_silence(
    stores: dict[str, Path], tmp_path: Path, judged: Judges
) -> None:
    rng = Random(SEED)
    verdicts: Counter[tuple[str, str]] = Counter()
    for end, trials in (("killed", 80), ("closed", 70), ("failed", 20), ("retired", 30)):
        files = [n for n in files_of(stores[end]) if (stores[end] / n).stat().st_size]
        for trial in range(trials):
            name = rng.choice(files)
            offset, bit = rng.randrange((stores[end] / name).stat().st_size), rng.randrange(8)
            copy = damaged(stores[end], tmp_path / "votes", name, flip(offset, bit))
            what = f"VSTACK_SEED={SEED}, {end}, trial {trial}: bit {bit} of byte {offset} of {name}"
            verdicts[end, judged(copy, what)] += 1
    assert verdicts["retired", "whole"] == verdicts["retired", "partly"] == 0, "it must not vote again"
    seen = {said: sum(n for (_, verdict), n in verdicts.items() if verdict == said) for said in VERDICTS}
    assert seen["refused"] > 40, verdicts
    assert seen["partly"] > 2, verdicts
    assert seen["whole"] > 40, "there are files that do not matter"


@pytest.mark.parametrize("end", ["killed", "closed", "failed", "retired"])
def test_a_file_that_is_gone_cut_or_has_a_page_of_zeros_never_loses_anything_in_silence(
    stores: dict[str, Path], tmp_path: Path, judged: Judges, end: str
) -> None:
    rng = Random(SEED)
    verdicts: Counter[str] = Counter()
    for name in files_of(stores[end]):
        if end != "killed" and Path(name).name.startswith(("LOG", "OPTIONS", "IDENTITY")):
            continue  # nobody reads them: one store shows it
        size = (stores[end] / name).stat().st_size
        pages = range(0, size, PAGE)
        changes: dict[str, Damage] = {f"cut to {n}": cut(n) for n in {0, size // 2, max(0, size - 1)}}
        changes |= {f"zeros at {at}": zero(at) for at in rng.sample(pages, min(3, len(pages)))}
        for what, change in changes.items():
            copy = damaged(stores[end], tmp_path / "votes", name, change)
            verdicts[judged(copy, f"VSTACK_SEED={SEED}, {end}: {name} {what}")] += 1
        copy = damaged(stores[end], tmp_path / "votes", name, cut(0))
        (copy / name).unlink()
        verdicts[judged(copy, f"{end}: {name} deleted")] += 1
    assert verdicts["refused"] > 10, verdicts
    if end == "retired":
        assert verdicts.total() == verdicts["refused"], "it must not vote again"


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_a_log_that_ends_after_a_whole_record_is_missed(
    stores: dict[str, Path], tmp_path: Path, judged: Judges, end: str
) -> None:
    """Nothing in it is damaged: only the mark knows that it was longer."""
    logs = [manifest_of(stores[end])] + ([log_of(stores[end])] if end == "killed" else [])
    for log in logs:
        name = str(log.relative_to(stores[end]))
        starts = [at for at, _ in log_records(log.read_bytes())]
        for at in Random(SEED).sample(starts, min(8, len(starts))) + starts[-1:]:
            copy = damaged(stores[end], tmp_path / "votes", name, cut(at))
            assert judged(copy, f"{end}: {name} cut to {at}") == "refused"


def log_records(raw: bytes) -> list[tuple[int, int]]:
    """Offset and payload length of each record of a log; a record in several blocks is several."""
    at, found = 0, []
    while at + HEADER <= len(raw):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length = int.from_bytes(raw[at + 4 : at + 6], "little")
        found.append((at, length))
        at += HEADER + length
    assert at == len(raw)
    return found


def test_a_flipped_bit_in_a_log_header_is_no_torn_tail_even_if_the_mark_is_as_old_as_a_power_cut_leaves_it(
    stores: dict[str, Path], tmp_path: Path, judged: Judges
) -> None:
    """RocksDB drops a record whose length grew, and all after it, without a word; of another type it takes
    the record for one that it has to read again, without end."""
    log = log_of(stores["killed"])
    name = str(log.relative_to(stores["killed"]))
    found = log_records(log.read_bytes())
    for number in (0, len(found) // 2, len(found) - 1):
        for byte, bit in [(5, 0), (5, 6), (5, 7), (4, 3), (0, 1), (3, 7), (6, 0), (6, 1), (6, 2)]:
            copy = damaged(stores["killed"], tmp_path / "votes", name, flip(found[number][0] + byte, bit))
            file = MarkFile(copy / "1/mark", Disk())
            file.write(Mark(1, Manifest(1, 1)))
            file.close()
            assert judged(copy, f"record {number}, bit {bit} of byte {byte}") == "refused"


def test_headers_tell_a_torn_record_from_a_lengthened_one_and_zeros_at_the_end_from_zeros_inside(
    stores: dict[str, Path],
) -> None:
    raw = log_of(stores["killed"]).read_bytes()[:BLOCK]
    found = [(at, length) for at, length in log_records(log_of(stores["killed"]).read_bytes()) if at < BLOCK]
    whole = raw[: found[-1][0]]
    assert damaged_header(whole) is None
    assert damaged_header(b"") is None
    assert damaged_header(whole + bytes(5000)) is None
    for at, length in found[:-1]:
        longer = bytearray(whole)
        longer[at + 4 : at + 6] = (length + 30_000).to_bytes(2, "little")
        assert damaged_header(bytes(longer)) == at
        assert damaged_header(bytes(longer[: at + HEADER + length])) == at
        assert damaged_header(bytes(longer[: at + HEADER + length - 1])) is None
        recycled = bytearray(whole)
        recycled[at + 6] ^= 4
        assert damaged_header(bytes(recycled)) == at
    for at, length in found[:-2]:
        zeros = bytearray(whole)
        zeros[at : at + HEADER + length] = bytes(HEADER + length)
        assert damaged_header(bytes(zeros)) == at


def test_a_damaged_slot_of_the_mark_leaves_the_one_before_and_two_leave_none(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    marks = [Mark(n, Manifest(5, 100 + n), failed=n == 4) for n in range(5)]
    file = MarkFile(path, Disk())
    for mark in marks[:3]:
        file.write(mark)
    file.close()
    file = MarkFile(path, Disk())
    for mark in marks[3:]:
        file.write(mark)
        assert read_mark(path) == mark
    file.close()
    raw = path.read_bytes()
    newest = max((0, PAGE), key=lambda at: int.from_bytes(raw[at + 8 : at + 16], "little"))
    for offset in range(45):
        path.write_bytes(damaged_bytes(raw, newest + offset))
        assert read_mark(path) == marks[3]
        path.write_bytes(damaged_bytes(raw, PAGE - newest + offset))
        assert read_mark(path) == marks[4]
    for lost in (damaged_bytes(damaged_bytes(raw, 3), PAGE + 3), b"", bytes(PAGE)):
        path.write_bytes(lost)
        with pytest.raises(DamagedData, match="missing or damaged"):
            read_mark(path)


def damaged_bytes(raw: bytes, offset: int) -> bytes:
    changed = bytearray(raw)
    changed[offset] ^= 16
    return bytes(changed)


def test_an_empty_folder_of_votes_is_not_a_first_start(tmp_path: Path) -> None:
    """The file system that they are on may not be mounted."""
    (tmp_path / "votes").mkdir()
    with pytest.raises(DamagedData, match="must not vote"):
        VoteStore(tmp_path / "votes")
    assert list((tmp_path / "votes").iterdir()) == []


def test_a_row_that_does_not_fit_its_checksum_is_damage_for_lookup_and_listing(tmp_path: Path) -> None:
    """What RocksDB itself would hand out without a complaint. The key alone is still given."""
    store = VoteStore(tmp_path / "votes")
    store.commit({key_of(i): record_of(i) for i in range(3)})
    row = b"r/" + key_of(1).encode()
    raw = store._db.get(row)
    assert isinstance(raw, bytes)
    for wrong in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:3], b"", raw[:4], votes._seal(row, b"\xc1")):
        store._db.put(row, wrong)
        with pytest.raises(DamagedData, match=key_of(1)):
            store.lookup(key_of(1))
        with pytest.raises(DamagedData):
            store.scan("video/", "", 10)
        assert store.keys("", 10) == [key_of(i) for i in range(3)]
        assert len(list(store.subjects())) == 3
    store._db.put(row, store._db.get(b"r/" + key_of(2).encode()) or b"")
    with pytest.raises(DamagedData):  # a whole record under another key
        store.lookup(key_of(1))
    assert store.lookup(key_of(2)) == record_of(2)
    assert len(store.scan("video/", key_of(1), 10)[0]) == 1
    store.close()


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("row", [b"m/identity", b"m/retired", b"c/0000000002", b"p/" + b"c" * 32])
def test_a_row_about_the_node_that_does_not_fit_its_checksum_refuses_to_open(
    tmp_path: Path, row: bytes, empty: bool
) -> None:
    store = VoteStore(tmp_path / "votes")
    store.adopt(configs())
    store.meet("c" * 32, 3, b"process")
    raw = store._db.get(row) or votes._seal(row, b"because")
    assert isinstance(raw, bytes)
    store._db.put(row, b"" if empty else damaged_bytes(raw, len(raw) - 1))
    store.close()
    with pytest.raises(DamagedData, match=f"{row.decode()} of the votes is damaged"):
        VoteStore(tmp_path / "votes")


@pytest.mark.parametrize("row", [b"m/identity", b"c/0000000001", b"c/0000000002"])
def test_an_identity_or_a_configuration_that_is_missing_refuses_to_open(tmp_path: Path, row: bytes) -> None:
    store = VoteStore(tmp_path / "votes")
    store.adopt(configs())
    store._db.delete(row)
    store.close()
    with pytest.raises(DamagedData, match="missing"):
        VoteStore(tmp_path / "votes")


# -- torn tails ------------------------------------------------------------------------------------


def test_a_torn_tail_opens_and_only_what_was_never_acknowledged_is_gone(
    tmp_path: Path, judged: Judges
) -> None:
    """Killed between the write of a batch of several blocks and its mark, and the disk has a part of it."""
    folder = tmp_path / "votes"
    before = int(written(folder, "torn").split()[0])
    log = log_of(folder)
    after = log.stat().st_size
    assert after - before > BLOCK
    name = str(log.relative_to(folder))
    for number, size in enumerate(
        [before, before + 1, after - 1, *Random(SEED).sample(range(before, after), 47)]
    ):
        copy = damaged(folder, tmp_path / "copy", name, cut(size))
        assert number > 4 or judged(copy, f"acknowledged, cut to {size}") == "refused"
        shutil.rmtree(copy)
        copy = damaged(folder, copy, name, cut(size))
        shutil.copy(tmp_path / "mark", copy / "1/mark")
        assert judged(copy, f"not acknowledged, cut to {size}") == "whole"


def test_a_process_killed_right_before_or_after_a_mark_leaves_a_store_that_opens(tmp_path: Path) -> None:
    copies: list[Path] = []

    class Copying(Disk):
        def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
            if copying:
                copies.append(shutil.copytree(tmp_path / "votes", tmp_path / f"{len(copies)}"))
            super().write(fd, buffers, offset)
            if copying:
                copies.append(shutil.copytree(tmp_path / "votes", tmp_path / f"{len(copies)}"))

    copying = False
    store = VoteStore(tmp_path / "votes", Copying())
    copying = True
    store.commit({key_of(1): record_of(1)})
    copying = False
    store.close()
    assert len(copies) == 2
    for copy in copies:
        store = VoteStore(copy)
        assert store.lookup(key_of(1)) == record_of(1), "its log was written before the mark"
        store.close()


# -- failed commits --------------------------------------------------------------------------------

_FAILING = """
import resource, sys
from pathlib import Path
from tests.test_damaged_votes import COUNT, configs, record_of, records, key_of
from vstack.node.votes import VoteCommitFailed, VoteStore
store = VoteStore(Path(sys.argv[1]))
store.adopt(configs())
store.meet("c" * 32, 3 + COUNT, b"process")
store.commit(records(0, COUNT))
log = max((store.folder / "rocks").glob("*.log"))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 1000, hard))
said = []
for attempt in (lambda: store.commit({key_of(COUNT + 1): record_of(1, 2000)}),
                lambda: store.commit({key_of(COUNT + 2): record_of(2, 10)}),
                lambda: store.lookup(key_of(1)), lambda: store.scan("", "", 10), lambda: store.keys("", 10),
                lambda: next(store.subjects()), lambda: store.adopt([]), lambda: store.retire("")):
    try:
        attempt()
    except VoteCommitFailed:
        said.append("failed")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # room again: too late
store.close()
print(*said)
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a process whose last commit hit a limit, which then went away."""
    folder = tmp_path_factory.mktemp("failing") / "votes"
    done = subprocess.run(
        [sys.executable, "-c", _FAILING, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.split() == ["failed"] * 8, (done.stdout, done.stderr)
    return folder


def test_after_a_failed_commit_nothing_more_is_committed_or_read(failed: Path) -> None:
    assert read_mark(failed / "1/mark").failed


def test_after_a_failed_commit_the_store_is_copied_before_it_is_used(failed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(failed, tmp_path / "votes")
    synced: list[str] = []

    class Watched(Disk):
        def sync(self, fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            super().sync(fd)

        def rename(self, old: Path, new: Path) -> None:
            for path in old.rglob("*"):
                assert path.is_dir() or str(path) in synced, f"{path} is not on disk yet"
            super().rename(old, new)

    store = VoteStore(folder, Watched())
    assert store.folder == folder / "2"
    assert [p.name for p in folder.iterdir()] == ["2"]
    assert store.lookup(key_of(COUNT + 2)) is None
    store.close()
    assert judge(folder, 2) == "whole"
    store = VoteStore(folder)
    assert store.folder == folder / "2", "once is enough"
    store.close()


class Stopping(Disk):
    """Stops the process, as far as it can tell, before its `last`th operation."""

    def __init__(self, last: int) -> None:
        self._left = last

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise OSError("power cut")

    def sync(self, fd: int) -> None:
        self._count()
        super().sync(fd)

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._count()
        super().rename(old, new)

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)


def _stopped_everywhere(make: Callable[[], Path], check: Callable[[Path], object]) -> int:
    """Opens what `make` gives, stopping at each operation in turn, and then again; how many there are."""
    for operations in range(200):
        folder = make()
        with suppress(VotesUnavailable):
            VoteStore(folder, Stopping(operations)).close()
            return operations
        check(folder)
    raise AssertionError("no end")


def test_a_crash_at_any_point_of_the_copying_leaves_a_store_that_opens_whole(
    failed: Path, tmp_path: Path
) -> None:
    def make() -> Path:
        shutil.rmtree(tmp_path / "votes", ignore_errors=True)
        return shutil.copytree(failed, tmp_path / "votes")

    def check(folder: Path) -> None:
        store = VoteStore(folder)
        assert store.boot in (2, 3)
        assert store.chain() == tuple(configs())
        assert all(store.lookup(key) == record for key, record in records(0, COUNT).items())
        assert [p for p in folder.iterdir() if p != store.folder] == []
        store.close()

    assert _stopped_everywhere(make, check) > 8


def test_a_crash_at_any_point_of_the_first_start_leaves_nothing_or_a_node(tmp_path: Path) -> None:
    nodes: set[str] = set()

    def make() -> Path:
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        return tmp_path / "votes"

    def check(folder: Path) -> None:
        store = VoteStore(folder)
        assert store.boot in (1, 2)
        assert store.chain() == ()
        assert [p.name for p in tmp_path.iterdir()] == ["votes"]
        nodes.add(store.node)
        store.close()

    assert _stopped_everywhere(make, check) == len(nodes) > 8


@pytest.mark.processes
def test_a_node_whose_commit_fails_ends_without_a_reply_and_has_every_acknowledged_change_afterwards(
    tmp_path: Path,
) -> None:
    with running_mesh(tmp_path / "mesh", 1) as mesh:
        (node,) = mesh.nodes
        acknowledged: dict[str, bytes] = {}

        async def change(client: MeshClient, first: int, last: int) -> None:
            for number in range(first, last):
                await change_one(client, number)

        async def change_one(client: MeshClient, number: int) -> None:
            op = Op(os.urandom(16), key_of(number), client.config.epoch, 0, Random(number).randbytes(900))
            answer = await client.ask(client.members[0].node, Submit((op,)), timeout=3.0)
            assert isinstance(answer.header.body, Outcomes)
            assert isinstance(answer.header.body.outcomes[0], Ok)
            assert op.data is not None
            acknowledged[op.key] = op.data

        async def until_it_fails(client: MeshClient) -> None:
            await change(client, 0, 30)
            assert node.process is not None
            room = log_of(node.data / "votes").stat().st_size + 20_000
            resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (room, room))
            with pytest.raises(NoAnswer):
                await change(client, 30, 90)

        with_client(mesh, until_it_fails)
        assert 30 < len(acknowledged) < 90
        wait_for(lambda: not node.alive)
        assert node.stop() == 1
        assert "votes could not be written" in node.last_words()
        assert read_mark(node.data / "votes/1/mark").failed
        node.start(mesh.peers, detach=False)
        node.wait_ready()
        assert [p.name for p in (node.data / "votes").iterdir()] == ["2"]

        async def check(client: MeshClient) -> None:
            for key, data in acknowledged.items():
                assert (await client.read(key)).data == data
            assert isinstance(await client.change(Change(key_of(1000), 0, b"again")), Ok)

        with_client(mesh, check)
