"""The catalogue's records, their bounds, and the names of pieces."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstack.errors import BadInput
from vstack.mesh.registers import (
    EPOCH_SHIFT,
    ERASURE,
    INIT_INDEX,
    MAX_K,
    MAX_M,
    MAX_RECORD,
    NO_NODE,
    PIECE_KEY_BYTES,
    ChunkEntry,
    ChunkRecord,
    Generation,
    InitPiece,
    Media,
    PieceKey,
    Place,
    Scheme,
    Track,
    UploadId,
    VideoRecord,
    chunk_key,
    chunk_prefix,
    pack,
    table_hash,
    unpack_chunk,
    unpack_video,
    upload_id,
)

VIDEO = "c0ffee00" * 8
HASH = bytes(range(32))
PLACES = tuple(Place(f"{i:032x}", i, HASH) for i in range(5))


def video(tracks: int, *, title: str = "T", lost: tuple[str, ...] = ()) -> VideoRecord:
    """A film as it lies in the catalogue, with one picture and many languages."""
    picture = Track(
        kind="video",
        codec="hevc",
        time_base=(1, 1000),
        source_time_base=(1, 24000),
        offset=125,
        width=3840,
        height=2160,
    )
    words = Track(
        kind="subtitle", codec="subrip", time_base=(1, 1000), source_time_base=(1, 1000), language="por"
    )
    media = Media(
        container="matroska",
        source_format="matroska,webm",
        clock=(1, 1000),
        duration=7_200_000,
        tracks=(picture, *[words] * (tracks - 1)),
        lost=lost,
    )
    return VideoRecord(
        state="uploading",
        title=title,
        redundancy="replicated",
        recipe="vstack 1; 10 s, 2097152 bytes; matroska",
        source_size=1 << 36,
        upload=UploadId(1, 1 << 21),
        media=media,
        init=InitPiece(4096, HASH, PLACES[:3]),
        chunks=9999,
        size=1 << 36,
        table=HASH,
    )


@given(
    st.binary(min_size=32, max_size=32),
    st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)),
    st.integers(0, INIT_INDEX),
    st.integers(0, (1 << 16) - 1),
    st.tuples(
        st.integers(0, (1 << 64) - 1),
        st.binary(min_size=16, max_size=16),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, (1 << 32) - 1),
    ),
)
def test_the_name_of_a_piece_comes_back_from_its_bytes(
    name: bytes, upload: tuple[int, int], chunk: int, piece: int, generation: tuple[int, bytes, int, int]
) -> None:
    against, node, boot, counter = generation
    key = PieceKey(
        name.hex(), UploadId(*upload), chunk, piece, Generation(against, node.hex(), boot, counter)
    )
    raw = key.pack()
    assert len(raw) == PIECE_KEY_BYTES == 82
    assert PieceKey.unpack(raw) == key
    assert PieceKey.unpack(memoryview(raw)) == key
    for wrong in (raw[:-1], raw + b"\0", b""):
        with pytest.raises(struct.error):
            PieceKey.unpack(wrong)


numbers = st.integers(0, 300) | st.integers(0, (1 << 32) - 1)
piece_keys = st.builds(
    PieceKey,
    st.sampled_from(["00" * 32, "0f" * 32, "ff" * 32]),
    st.builds(UploadId, st.integers(0, 300), st.integers(0, (1 << 63) - 1)),
    numbers,
    st.integers(0, 300),
    st.builds(Generation, numbers, st.just(NO_NODE), st.integers(0, 300), st.integers(0, 300)),
)


@given(st.lists(piece_keys, max_size=20))
def test_names_of_pieces_sort_as_their_bytes_do(keys: list[PieceKey]) -> None:
    assert [k.pack() for k in sorted(keys)] == sorted(k.pack() for k in keys)


def test_the_keys_of_a_chunk_table_sort_as_its_indexes_do_and_lie_below_their_prefix() -> None:
    upload = UploadId(3, 3 << EPOCH_SHIFT | 17)
    indexes = [0, 1, 9, 10, 99, 100, 12345678, 99_999_999]
    keys = [chunk_key(VIDEO, upload, i) for i in indexes]
    assert keys == sorted(keys)
    assert all(k.startswith(chunk_prefix(VIDEO, upload)) for k in keys)
    assert not keys[0].startswith(chunk_prefix(VIDEO, UploadId(3, upload.version // 10)))


def test_records_come_back_as_they_were_packed() -> None:
    record = video(3, title="Ein Titel, ünïcode 🎬", lost=("chapter names",))
    assert unpack_video(pack(record)) == record
    entry = ChunkEntry(7, 100, 10, 2 << 20, HASH, dependent=True)
    chunk = ChunkRecord(entry, ERASURE, PLACES)
    assert unpack_chunk(pack(chunk)) == chunk


def test_rubbish_is_no_record() -> None:
    raw = pack(video(1))
    for wrong in (b"", raw[:-1], raw + b"\0", b"\xff" * 40):
        with pytest.raises(msgspec.DecodeError):
            unpack_video(wrong)
        with pytest.raises(msgspec.DecodeError):
            unpack_chunk(wrong)


def test_a_film_with_many_languages_and_a_long_title_fits() -> None:
    assert len(pack(video(24, title="片" * 200))) <= MAX_RECORD


def test_a_chunk_on_many_nodes_fits() -> None:
    entry = ChunkEntry(99_999_999, 1 << 60, 1 << 40, 8 << 20, HASH, dependent=True)
    places = tuple(
        Place(f"{i:032x}", i, HASH, Generation(1 << 62, f"{i:032x}", 1 << 31, 1 << 31)) for i in range(MAX_M)
    )
    assert len(pack(ChunkRecord(entry, Scheme(MAX_K, MAX_M), places))) <= MAX_RECORD


def test_a_record_that_does_not_fit_is_an_error_for_a_person_and_says_how_large_it_is() -> None:
    """A film with forty tracks is rare, but there are some."""
    fits = max(n for n in range(1, 100) if len(msgspec.msgpack.encode(video(n))) <= MAX_RECORD)
    assert fits >= 25
    assert len(pack(video(fits))) <= MAX_RECORD
    with pytest.raises(
        ValueError, match=rf"{len(msgspec.msgpack.encode(video(fits + 1)))} bytes.*{MAX_RECORD}"
    ):
        pack(video(fits + 1))
    with pytest.raises(BadInput, match="tracks"):
        pack(video(fits + 1))


def test_the_value_that_opens_an_upload_names_it_by_its_own_version() -> None:
    record = video(1)
    opened = msgspec.structs.replace(record, upload=UploadId(0, 0))
    version = (5 << EPOCH_SHIFT) + 9
    assert upload_id(opened, version) == UploadId(5, version)
    assert upload_id(record, version) == record.upload


def test_the_hash_of_a_table_depends_on_every_field_and_on_the_order() -> None:
    entries = [ChunkEntry(i, i * 10, 10, 5, HASH) for i in range(3)]
    whole = table_hash(entries)
    assert whole == table_hash(list(entries))
    changed = [
        [*entries[:2], ChunkEntry(2, 20, 10, 5, HASH, dependent=True)],
        [*entries[:2], ChunkEntry(2, 20, 10, 6, HASH)],
        [*entries[:2], ChunkEntry(2, 20, 11, 5, HASH)],
        [*entries[:2], ChunkEntry(2, 21, 10, 5, HASH)],
        [*entries[:2], ChunkEntry(2, 20, 10, 5, HASH[::-1])],
        entries[:2],
        entries[::-1],
        [],
    ]
    assert len({whole, *map(table_hash, changed)}) == len(changed) + 1
