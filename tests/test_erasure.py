"""The erasure code: any k of m fragments, and no fewer."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstack.erasure import decode, encode, fragment_size
from vstack.errors import DamagedData


def noise(size: int) -> bytes:
    return Random(size).randbytes(size)


@pytest.mark.parametrize("size", [*range(101), 65_537, 2 << 20, (2 << 20) + 1])
def test_any_three_of_five_fragments_give_the_data_back(size: int) -> None:
    data = noise(size)
    fragments = encode(data, 3, 5)
    assert len(fragments) == 5
    assert {len(f) for f in fragments} == {fragment_size(size, 3)}
    for chosen in combinations(range(5), 3):
        assert decode({i: fragments[i] for i in chosen}, 3, 5, size) == data, chosen


@given(st.binary(max_size=300), st.data())
def test_any_k_of_m_do_for_all_schemes(data: bytes, draw: st.DataObject) -> None:
    k = draw.draw(st.integers(1, 8))
    m = draw.draw(st.integers(k, 12))
    fragments = encode(data, k, m)
    assert len(fragments) == m
    chosen = draw.draw(st.permutations(range(m)))[: draw.draw(st.integers(k, m))]
    assert decode({i: fragments[i] for i in chosen}, k, m, len(data)) == data


def test_the_first_fragments_are_the_data_itself() -> None:
    data = noise(1000)
    fragments = encode(data, 3, 5)
    assert (b"".join(fragments[:3]))[:1000] == data
    assert fragments[2][-2:] == bytes(2), "the last one is padded with zeros"
    assert len(set(fragments)) == 5


def test_one_of_m_are_whole_copies() -> None:
    data = noise(100)
    assert encode(data, 1, 3) == [data] * 3
    for copy in range(3):
        assert decode({copy: data}, 1, 3, 100) == data


def test_fragments_are_these_for_ever() -> None:
    """Written down once: fragments on disk outlive the program."""
    fragments = encode(b"The quick brown fox jumps over the lazy dog", 3, 5)
    assert [f.hex() for f in fragments[3:]] == GOLDEN


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_too_few_fragments_are_an_error_that_counts_them(missing: int) -> None:
    fragments = encode(noise(50), 3, 5)
    some = {i: fragments[i] for i in range(3 - missing)}
    with pytest.raises(DamagedData, match=f"{3 - missing} are there"):
        decode(some, 3, 5, 50)


def test_fragments_of_a_wrong_size_do_not_count() -> None:
    fragments = dict(enumerate(encode(noise(50), 3, 5)))
    for wrong in (fragments[1][:-1], bytes(fragments[1]) + b"\0", b""):
        spoiled = {**fragments, 1: wrong}
        assert decode(spoiled, 3, 5, 50) == noise(50), "there are four others"
        with pytest.raises(DamagedData):
            decode({i: spoiled[i] for i in (0, 1, 2)}, 3, 5, 50)
    with pytest.raises(DamagedData):
        decode(fragments, 3, 5, 60)
    with pytest.raises(DamagedData):
        decode({0: b"x" * 99}, 1, 3, 100)


def test_numbers_that_are_none_of_the_codes_do_not_count() -> None:
    fragments = encode(noise(50), 3, 5)
    with pytest.raises(DamagedData):
        decode({0: fragments[0], 1: fragments[1], 5: fragments[2], -1: fragments[3]}, 3, 5, 50)


@pytest.mark.parametrize(
    ("length", "k", "size"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (9, 3, 3), (7, 1, 7)]
)
def test_the_size_of_a_fragment(length: int, k: int, size: int) -> None:
    assert fragment_size(length, k) == size


GOLDEN = ["f6501b5938dbb945df825cd497c8f7", "38181439687ef37f64cbd669054d48"]
