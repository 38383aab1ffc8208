"""The pure parts of ingest: the comparison of packets, and the rules by which chunks are cut."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstack.client.cuts import CutRules, Cutter, Fragment
from vstack.client.feed import Feed
from vstack.client.proof import Fields, Print, TrackProof, stored_fields
from vstack.client.split import Mp4Splitter

ALL = Fields(dts=True, duration=True)
PACKET = Print(pts=48, dts=24, duration=24, key=True, size=3, digest=b"abc")


def proof(fields: Fields = ALL) -> TrackProof:
    """The source counts in 1/24 s, the copy in 1/1200 s: fifty ticks to one."""
    track = TrackProof("video track 0 (h264)", Fraction(1, 24), fields)
    track.against(Fraction(1, 1200))
    return track


def copied(packet: Print, shift: int = 0) -> Print:
    pts, dts = packet.pts, packet.dts
    return packet._replace(
        pts=None if pts is None else pts * 50 + shift,
        dts=None if dts is None else dts * 50 + shift,
        duration=packet.duration * 50,
    )


def test_equal_packets_in_other_units_are_equal() -> None:
    track = proof()
    for number in range(5):
        packet = PACKET._replace(pts=number * 24, dts=number * 24 - 24)
        track.source(packet)
        track.copy(copied(packet))
    track.finish()
    assert (track.equal, track.unequal, track.offset) == (5, 0, Fraction(0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pts": 48 * 50 + 1}, "presentation time"),
        ({"pts": None}, "presentation time"),
        ({"dts": 24 * 50 - 1}, "decode time"),
        ({"dts": None}, "decode time"),
        ({"duration": 0}, "duration"),
        ({"key": False}, "keyframe"),
        ({"digest": b"abd"}, "payload"),
        ({"size": 4}, "payload"),
    ],
)
def test_any_field_that_differs_is_named(change: dict[str, int | bytes | None], word: str) -> None:
    track = proof()
    for packet in (PACKET._replace(pts=0, dts=0), PACKET):
        track.source(packet)
    track.copy(copied(PACKET._replace(pts=0, dts=0)))
    track.copy(copied(PACKET)._replace(**change))  # type: ignore[arg-type]
    assert (track.equal, track.unequal) == (1, 1)
    assert track.first_difference.startswith(f"video track 0 (h264), packet 1: {word}")


def test_times_that_a_container_does_not_store_are_not_compared() -> None:
    track = proof(Fields(dts=False, duration=False))
    track.source(PACKET)
    track.copy(copied(PACKET)._replace(dts=None, duration=7))
    assert track.first_difference == ""
    assert stored_fields("mov,mp4,m4a,3gp,3g2,mj2", "audio") == ALL
    assert stored_fields("matroska,webm", "video") == Fields(dts=False, duration=False)
    assert stored_fields("matroska,webm", "subtitle") == Fields(dts=False, duration=True)
    assert (
        stored_fields("mpegts", "video") == stored_fields("flv", "video") == Fields(dts=True, duration=False)
    )


def test_a_constant_offset_is_found_and_a_second_one_refused() -> None:
    track = proof()
    for number in range(3):
        packet = PACKET._replace(pts=number * 24, dts=number * 24)
        track.source(packet)
        track.copy(copied(packet, shift=-7))
    assert (track.equal, track.offset) == (3, Fraction(-7))
    track.source(PACKET)
    track.copy(copied(PACKET, shift=-8))
    assert "presentation time" in track.first_difference


def test_packets_without_a_partner_are_differences() -> None:
    track = proof()
    track.source(PACKET)
    track.source(PACKET)
    track.copy(copied(PACKET))
    assert track.waiting == 1
    track.finish()
    assert track.first_difference.endswith("the source has 1 packets more than the copy")


@st.composite
def fragments(draw: st.DrawFn) -> list[Fragment]:
    """A video of short fragments; the first begins on a keyframe; one tick is a tenth of a second."""
    made, tick = [], draw(st.integers(-50, 50))
    for number in range(draw(st.integers(1, 40))):
        key = number == 0 or draw(st.booleans())
        seen = key or draw(st.integers(0, 4)) > 0
        made.append(Fragment(bytes([number]) * draw(st.integers(1, 60)), key, tick if seen else None))
        tick += draw(st.integers(1, 15))
    return made


@given(fragments(), st.integers(20, 120), st.integers(1, 5))
def test_cuts_keep_every_byte_and_every_bound(pieces: list[Fragment], max_bytes: int, seconds: int) -> None:
    rules = CutRules(max_seconds=seconds, max_bytes=max_bytes, hard_bytes=200, first=(0.5,))
    cutter = Cutter(rules, Fraction(1, 10))
    end = max(piece.start for piece in pieces if piece.start is not None) + 5
    cuts = [cut for piece in pieces for cut in cutter.add(piece)] + list(cutter.finish(end))
    assert b"".join(cut.data for cut in cuts) == b"".join(piece.data for piece in pieces)
    assert [cut.start for cut in cuts] == sorted(cut.start for cut in cuts)
    assert cuts[0].start == pieces[0].start
    keys = {piece.data[:1]: piece for piece in pieces if piece.key}
    for number, cut in enumerate(cuts):
        assert len(cut.data) <= 200
        first = keys.get(cut.data[:1])
        assert cut.dependent == (first is None)
        if first is not None:
            assert cut.start == first.start
        stop = cuts[number + 1].start if number + 1 < len(cuts) else end
        groups = len({byte for byte in cut.data if bytes([byte]) in keys})
        if groups > 1:
            assert len(cut.data) <= max_bytes
            assert (stop - cut.start) / 10 <= rules.seconds(number) * 1.01
        if cut.dependent:
            assert groups == 0, "a keyframe in a dependent chunk could not be found"


def test_rules_that_differ_describe_themselves_differently() -> None:
    base = CutRules()
    others = [
        dataclasses.replace(base, max_seconds=9.0),
        dataclasses.replace(base, max_bytes=1),
        dataclasses.replace(base, hard_bytes=1),
        dataclasses.replace(base, first=()),
    ]
    assert len({rules.describe() for rules in [base, *others]}) == 5
    assert base.describe() == CutRules().describe()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 30))
def test_boxes_are_split_at_fragments_however_they_arrive(sizes: list[int], step: int) -> None:
    def box(kind: bytes, size: int) -> bytes:
        return (size + 8).to_bytes(4, "big") + kind + b"moof" * (size // 4) + bytes(size % 4)

    parts = [box(b"ftyp", 16) + box(b"moov", 40)]
    parts += [box(b"moof", size) + box(b"mdat", 3 * size) for size in sizes]
    data = b"".join(parts)
    splitter = Mp4Splitter()
    pieces = [p for at in range(0, len(data), step) for p in splitter.feed(data[at : at + step])]
    pieces.append(splitter.finish())
    # A head of 16 bytes is read at once, so boxes shorter than that wait for the end.
    assert b"".join(pieces) == data
    assert pieces[: len(pieces) - 1] == parts[: len(pieces) - 1]


def test_a_feed_keeps_the_error_of_its_iterator_until_it_is_asked() -> None:
    def parts() -> list[bytes]:
        return [b"abc", b"", b"defg"]

    feed = Feed(parts())
    assert [feed.read(2) for _ in range(5)] == [b"ab", b"c", b"de", b"fg", b""]
    feed.check()
    broken = Feed(1 // zero for zero in [0])  # type: ignore[misc]
    assert broken.read(1) == b""
    assert broken.read(1) == b""
    with pytest.raises(ZeroDivisionError):
        broken.check()
