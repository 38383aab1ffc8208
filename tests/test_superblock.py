"""The format of superblocks, and what a scan makes of them in any state."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store_helpers import NODE, key_of
from vstack.errors import VstackError
from vstack.node.disk import Disk
from vstack.node.scan import Damage, Found, Tail, scan
from vstack.node.superblock import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    Appender,
    FileHeader,
    Kind,
    Record,
    read_file_header,
    read_record,
    superblock_path,
    write_record,
)

SALT = bytes(range(16))
HEADER = FileHeader(NODE, 1, 0, SALT)

payloads = st.lists(st.binary(max_size=300) | st.sampled_from([b"", bytes(64), b"x" * 5000]), max_size=12)


def record_of(number: int, payload: bytes) -> Record:
    key = key_of(number)
    digest = hashlib.sha256(payload).digest()
    return Record(Kind.DATA, number, key.pack(), number, 3, 5, 999, len(payload), digest)


class Written(NamedTuple):
    path: Path
    found: list[Found]
    """What was written."""

    @property
    def end(self) -> int:
        last = self.found[-1] if self.found else None
        return FILE_HEADER_BYTES if last is None else last.offset + last.record.size


def write_superblock(folder: Path, contents: list[bytes]) -> Written:
    """A superblock with one record for each payload, cut off behind the last."""
    disk = Disk()
    appender = Appender.create(disk, folder, HEADER)
    found = []
    for number, payload in enumerate(contents):
        record = record_of(number, payload)
        found.append(Found(appender.stage(record, payload), record))
    appender.flush()
    appender.close()
    return Written(superblock_path(folder, 1), found)


def scan_file(path: Path, start: int = FILE_HEADER_BYTES) -> list[Found | Damage | Tail]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(scan(Disk(), fd, SALT, start))
    finally:
        os.close(fd)


def flip(path: Path, offset: int, bits: int = 0x40) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@given(payloads, st.integers(0, 3 << 20))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_what_a_scan_finds(contents: list[bytes], spare: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write_superblock(Path(folder), contents)
        os.truncate(written.path, written.end + spare)
        *found, tail = scan_file(written.path)
        assert found == written.found
        assert tail == Tail(written.end, False, written.end)
        raw = written.path.read_bytes()
        for item, payload in zip(written.found, contents, strict=True):
            start = item.offset + RECORD_HEADER_BYTES
            assert raw[start : start + item.record.length] == payload


@given(payloads.filter(bool), st.data())
@settings(max_examples=150, deadline=None)
def test_a_torn_tail_is_ignored_and_the_records_before_it_survive(
    contents: list[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write_superblock(Path(folder), contents)
        cut = data.draw(st.integers(FILE_HEADER_BYTES, written.end - 1))
        spare = data.draw(st.sampled_from([0, 5, 100_000]))
        os.truncate(written.path, cut)
        os.truncate(written.path, cut + spare)
        whole = [item for item in written.found if item.offset + item.record.size <= cut]
        *found, tail = scan_file(written.path)
        assert found == whole
        assert isinstance(tail, Tail)
        assert tail.offset == (whole[-1].offset + whole[-1].record.size if whole else FILE_HEADER_BYTES)
        content = written.path.read_bytes().rstrip(b"\0")
        assert max(len(content), tail.offset) <= tail.end <= max(len(content), tail.offset) + 7
        assert tail.torn == (tail.end > tail.offset)


@given(payloads.filter(bool), st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_costs_the_record_it_is_in_and_no_other(
    contents: list[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write_superblock(Path(folder), contents)
        at = data.draw(st.integers(FILE_HEADER_BYTES, written.end - 1))
        flip(written.path, at, 1 << data.draw(st.integers(0, 7)))
        hit = next(item for item in written.found if item.offset <= at < item.offset + item.record.size)
        result = scan_file(written.path)
        assert [item for item in result if isinstance(item, Found)] == [i for i in written.found if i != hit]
        damage = [item for item in result if isinstance(item, Damage)]
        if hit == written.found[-1]:
            assert damage == []  # nothing follows: it may as well be an unfinished write
        else:
            assert [(item.offset, item.length) for item in damage] == [(hit.offset, hit.record.size)]


def test_a_damaged_payload_is_reported_with_its_record(tmp_path: Path) -> None:
    written = write_superblock(tmp_path, [b"a" * 100, b"b" * 100, b"c" * 100])
    flip(written.path, written.found[1].offset + RECORD_HEADER_BYTES + 50)
    damage = scan_file(written.path)[1]
    assert damage == Damage(written.found[1].offset, written.found[1].record.size, written.found[1].record)


def test_zeros_in_the_middle_are_damage_and_not_the_end(tmp_path: Path) -> None:
    written = write_superblock(tmp_path, [bytes([n]) * 9000 for n in range(1, 6)])
    hole = written.found[1]
    overwrite(written.path, hole.offset, bytes(hole.record.size))
    found = [item for item in scan_file(written.path) if isinstance(item, Found)]
    assert found == [item for item in written.found if item is not hole]
    assert Damage(hole.offset, hole.record.size, None) in scan_file(written.path)


def test_a_record_is_found_wherever_the_scan_window_ends(tmp_path: Path) -> None:
    for size in range((1 << 20) - 400, (1 << 20) + 40, 40):
        written = write_superblock(tmp_path, [b"\xf5vst" * (size // 4), b"after"])
        flip(written.path, FILE_HEADER_BYTES)
        assert [item for item in scan_file(written.path) if isinstance(item, Found)] == written.found[1:]
        written.path.unlink()


def test_a_scan_goes_on_from_any_record_boundary(tmp_path: Path) -> None:
    written = write_superblock(tmp_path, [b"one", b"two", b"three"])
    assert scan_file(written.path, written.found[1].offset)[:-1] == written.found[1:]


def test_a_payload_larger_than_the_scan_window_is_read_whole(tmp_path: Path) -> None:
    written = write_superblock(tmp_path, [random.Random(1).randbytes((3 << 20) + 5), b"next"])
    assert scan_file(written.path)[:-1] == written.found


def test_a_record_inside_a_payload_is_not_found_even_when_the_header_before_it_is_damaged(
    tmp_path: Path,
) -> None:
    """The payload holds records that would be valid if the salt, or the offset, were not in the check."""
    inner = record_of(77, b"smuggled")
    start = FILE_HEADER_BYTES + RECORD_HEADER_BYTES
    other_salt = write_record(inner, bytes(16), start)
    size = inner.size
    own_salt_other_place = write_record(inner, SALT, FILE_HEADER_BYTES)
    payload = b"smuggled".join(other_salt) + b"smuggled".join(own_salt_other_place)
    assert len(payload) == 2 * size
    written = write_superblock(tmp_path, [payload, b"after"])
    assert scan_file(written.path)[:-1] == written.found
    flip(written.path, FILE_HEADER_BYTES + 20)
    assert [item for item in scan_file(written.path) if isinstance(item, Found)] == written.found[1:]


def test_the_same_bytes_with_the_right_salt_and_place_would_be_found(tmp_path: Path) -> None:
    """Proves that the test above can fail: only the check keeps the smuggled record out."""
    start = FILE_HEADER_BYTES + RECORD_HEADER_BYTES
    inner = record_of(77, b"smuggled")
    written = write_superblock(tmp_path, [b"smuggled".join(write_record(inner, SALT, start)), b"after"])
    flip(written.path, FILE_HEADER_BYTES + 20)
    found = [item for item in scan_file(written.path) if isinstance(item, Found)]
    assert found == [Found(start, inner), *written.found[1:]]


def test_a_page_that_cannot_be_read_costs_the_records_on_it(tmp_path: Path) -> None:
    written = write_superblock(tmp_path, [bytes([n]) * 6000 for n in range(1, 9)])
    bad = range(16384, 20480)

    class Scratched(Disk):
        def read(self, fd: int, offset: int, length: int) -> bytes:
            if offset < bad.stop and offset + length > bad.start:
                raise OSError(5, "Input/output error")
            return super().read(fd, offset, length)

    fd = os.open(written.path, os.O_RDONLY)
    found = [item for item in scan(Scratched(), fd, SALT, FILE_HEADER_BYTES) if isinstance(item, Found)]
    os.close(fd)
    untouched = [
        item
        for item in written.found
        if item.offset + item.record.size <= bad.start or item.offset >= bad.stop
    ]
    assert found == untouched
    assert 5 <= len(untouched) < 8


def test_a_record_is_read_only_where_it_was_written() -> None:
    before, _ = write_record(record_of(1, b""), SALT, 4096)
    assert read_record(before, SALT, 4096) == record_of(1, b"")
    assert read_record(before, SALT, 4104) is None
    assert read_record(before, bytes(16), 4096) is None
    assert read_record(before[:-1], SALT, 4096) is None


def test_the_bytes_of_the_format_do_not_change_unnoticed() -> None:
    before, after = write_record(record_of(9, b"abc"), SALT, 4096)
    assert len(before) == RECORD_HEADER_BYTES == 176
    assert after == b"\0\0\0\0\0recend\xf5\n"
    assert before[:32].hex() == "f57673746b72656301010003000500000000000000000009" + "0000000000000009"
    assert (
        hashlib.sha256(before).hexdigest()
        == "734bd9cb37a0a8ce71b76717f1650da19137e2ddcfeabd476cea0ba81760afd3"
    )
    assert (
        hashlib.sha256(HEADER.pack()).hexdigest()
        == "1a98d729a8fbd857d17e11821dbec84f326e066f8507a9b723753d5d226e830d"
    )


@pytest.mark.parametrize("damaged", [0, 2048])
def test_a_file_header_survives_damage_of_one_of_its_copies(tmp_path: Path, damaged: int) -> None:
    written = write_superblock(tmp_path, [])
    overwrite(written.path, damaged, b"\xff" * 512)
    fd = os.open(written.path, os.O_RDONLY)
    assert read_file_header(Disk(), fd) == HEADER
    overwrite(written.path, 2048 - damaged, b"\xff" * 512)
    assert read_file_header(Disk(), fd) is None
    os.close(fd)


def test_a_newer_format_is_refused_by_name() -> None:
    fields = bytearray(HEADER.pack()[:60])
    fields[9] = 2
    raw = bytes(fields) + zlib.crc32(fields).to_bytes(4, "big")
    with pytest.raises(VstackError, match="format 2"):
        FileHeader.unpack(raw)
