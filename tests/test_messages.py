"""The wire: what is encoded comes back, and whatever else arrives is a DecodeError."""

from __future__ import annotations

from random import Random
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vstack.mesh.config import Config, Member, View, group, key_epoch, key_subject, leader
from vstack.mesh.messages import (
    ENVELOPE_BYTES,
    ENVELOPE_ITEMS,
    MAX_CONTROL,
    MAX_INVENTORY,
    MAX_SCAN,
    ZERO,
    Accept,
    Accepted,
    Ballot,
    Body,
    Chain,
    Created,
    Creates,
    Envelope,
    Failure,
    GetInventory,
    GetPiece,
    GetUsage,
    Hasten,
    Header,
    Held,
    Hello,
    Inventory,
    Item,
    List,
    Prepare,
    Promise,
    PutPiece,
    Read,
    Value,
    WirePieceKey,
    decode,
    encode,
)
from vstack.mesh.registers import MAX_RECORD

VIDEO = "0123456789abcdef" * 4
NODE = "ab" * 16
MEMBERS = tuple(Member(f"{i:032x}", f"10.0.0.{i}:7400", "z", 3) for i in range(1, 8))
CONFIG = Config(1, MEMBERS, 1)

# msgspec's own annotations say what is valid; strategies for them, one for each kind of leaf.
u63 = st.integers(0, (1 << 63) - 1)
keys = st.from_regex(
    r"\A(video/[0-9a-f]{64}|chunk/[0-9a-f]{64}/[0-9]{1,10}\.[0-9]{1,19}/[0-9]{8}"
    r"|views/[0-9a-f]{64}/[0-9]{1,10}|config/[0-9]{1,10})\Z"
)
ballots = st.builds(Ballot, u63, u63, st.sampled_from(["", NODE]), u63)
datas = st.none() | st.binary(max_size=200) | st.just(b"x" * MAX_RECORD)
applied = st.tuples(st.binary(min_size=16, max_size=16), u63)
values = st.builds(Value, u63, datas, st.lists(applied, max_size=16).map(tuple))
stems = st.from_regex(r"\Achunk/[0-9a-f]{64}/[0-9]{1,10}\.[0-9]{1,19}/\Z")
neighbours = st.dictionaries(st.integers(0, 10**8 - 1), values, min_size=1, max_size=5).map(
    lambda d: dict(sorted(d.items()))
)
creates = st.tuples(stems, ballots, neighbours).map(
    lambda t: Creates(t[0], t[1], tuple(t[2]), tuple(t[2].values()))
)
BY_FIELD: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("Hello", "role"): st.sampled_from(["node", "client"]),
    ("Hello", "mesh"): st.text(max_size=32),
    ("Hello", "node"): st.sampled_from(["", NODE]),
    ("Hello", "peers"): st.binary(max_size=32),
    ("Hello", "zone"): st.text(max_size=64),
    ("Hello", "weight"): st.integers(0, 1 << 20),
    ("Failure", "code"): st.text(max_size=32),
    ("Scan", "prefix"): st.sampled_from(["video/", f"chunk/{VIDEO}/1.2/", "views/"]),
    ("List", "prefix"): st.sampled_from(["video/", f"chunk/{VIDEO}/1.2/", "views/"]),
    ("Scan", "limit"): st.integers(1, MAX_SCAN),
    ("List", "limit"): st.integers(1, MAX_SCAN),
    ("PutPiece", "k"): st.integers(1, 255),
    ("PutPiece", "m"): st.integers(1, 255),
    ("PutPiece", "chunk_length"): st.integers(0, 1 << 32),
    ("PutPiece", "sha256"): st.binary(min_size=32, max_size=32),
    ("PutPiece", "purpose"): st.sampled_from(["upload", "repair", "demotion"]),
    ("Held", "state"): st.sampled_from(["present", "absent", "quarantined"]),
    ("Hasten", "job"): st.sampled_from(["repair", "scrub", "gc"]),
    ("GetPiece", "offset"): st.integers(0, 8 << 20),
    ("GetPiece", "length"): st.integers(1, 1 << 20),
    ("Op", "id"): st.binary(min_size=16, max_size=16),
    ("Mismatch", "data"): datas,
    ("Op", "data"): datas,
    ("Found", "data"): datas,
    ("WirePieceKey", "video"): st.just(VIDEO),
    ("WirePieceKey", "upload"): st.tuples(st.integers(0, (1 << 32) - 1), u63),
    ("WirePieceKey", "chunk"): st.integers(0, (1 << 32) - 1),
    ("WirePieceKey", "piece"): st.integers(0, (1 << 16) - 1),
    ("WirePieceKey", "generation"): st.tuples(u63, st.just(NODE), st.integers(0, 99), st.integers(0, 99)),
}


def of_type(info: msgspec.inspect.Type, owner: str = "", field: str = "") -> st.SearchStrategy[Any]:
    """Valid values of a type, as its bounds stand in the messages."""
    inspect = msgspec.inspect
    if (owner, field) in BY_FIELD:
        return BY_FIELD[owner, field]
    if isinstance(info, inspect.StructType | inspect.NamedTupleType):
        cls = info.cls
        if cls is Ballot:
            return ballots
        if cls is Value:
            return values
        if cls is Creates:
            return creates
        if cls is Created:
            return creates.map(lambda m: Created(m.stem, m.ballot, m.indexes))
        fields = [of_type(f.type, cls.__name__, f.name) for f in info.fields]
        return st.tuples(*fields).map(lambda args: cls(*args))
    if isinstance(info, inspect.UnionType):
        return st.one_of([of_type(t, owner, field) for t in info.types])
    if isinstance(info, inspect.TupleType):
        return st.tuples(*(of_type(t, owner, field) for t in info.item_types))
    if isinstance(info, inspect.VarTupleType):
        items = of_type(info.item_type, owner, field)
        return st.lists(items, min_size=info.min_length or 0, max_size=3).map(tuple)
    if isinstance(info, inspect.DictType):
        return st.dictionaries(of_type(info.key_type), of_type(info.value_type), max_size=3)
    if isinstance(info, inspect.StrType):
        if info.pattern == r"^([0-9a-f]{64})?\Z":
            return st.sampled_from(["", VIDEO])
        if info.pattern == r"^[0-9a-f]{32}\Z":
            return st.just(NODE)
        if info.pattern == r"^[0-9a-f]{64}\Z":
            return st.just(VIDEO)
        return keys if field == "key" else st.text(max_size=min(30, info.max_length or 30))
    if isinstance(info, inspect.EnumType):
        return st.sampled_from(list(info.cls))
    if isinstance(info, inspect.LiteralType):
        return st.sampled_from(list(info.values))
    if isinstance(info, inspect.IntType):
        highest = info.le if info.le is not None else info.lt - 1 if info.lt is not None else (1 << 63) - 1
        return st.integers(info.ge or 0, highest)
    if isinstance(info, inspect.BytesType):
        return st.binary(min_size=info.min_length or 0, max_size=min(50, info.max_length or 50))
    leaves: list[tuple[Any, st.SearchStrategy[Any]]] = [
        (inspect.FloatType, st.floats(allow_nan=False)),
        (inspect.BoolType, st.booleans()),
        (inspect.NoneType, st.none()),
    ]
    return next(strategy for kind, strategy in leaves if isinstance(info, kind))


BODIES = {t: of_type(msgspec.inspect.type_info(t)) for t in get_args(Body)}
headers = st.builds(
    Header,
    st.sampled_from(sorted(BODIES, key=lambda t: str(t.__name__))).flatmap(lambda t: BODIES[t]),
    st.integers(0, 600_000),
    u63,
    u63,
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("body", BODIES, ids=lambda t: t.__name__)
def test_every_kind_of_message_comes_back_as_it_was(body: type, data: st.DataObject) -> None:
    header = Header(data.draw(BODIES[body]), 1234, 5, 6)
    raw = encode(header)
    again = decode(raw)
    assert again == header
    assert type(again.body) is body
    assert encode(again) == raw
    assert decode(memoryview(raw)) == header


def test_every_kind_of_message_has_a_tag_of_its_own() -> None:
    assert len(BODIES) == 34
    items = {t.__struct_config__.tag for t in Item.__subclasses__()}
    assert items == set(range(1, 10))


# -- what is not a message ------------------------------------------------------------------------


def rejected(raw: bytes) -> bool:
    """True for a DecodeError, False if it was a message that can be encoded again; fails for all else."""
    try:
        header = decode(raw)
    except msgspec.DecodeError:
        return True
    assert decode(encode(header)) == header or header != header  # a NaN is no fault
    return False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_message(raw: bytes) -> None:
    rejected(raw)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(headers, st.integers(0, 1 << 32))
def test_a_damaged_message_is_a_decode_error_or_another_valid_one(header: Header, seed: int) -> None:
    rng = Random(seed)
    raw = bytearray(encode(header))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        if rng.random() < 0.5 and at < len(raw):
            raw[at] = rng.choice([0x90, 0xC0, 0xC1, 0xCF, 0xD9, 0xDD, 0xDF, 0xFF, rng.randrange(256)])
        else:
            raw[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 5))
    rejected(bytes(raw))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(headers)
def test_no_beginning_of_a_message_is_a_message_nor_is_one_with_a_tail(header: Header) -> None:
    raw = encode(header)
    ends = {*range(min(len(raw), 60)), *range(0, len(raw), 97), len(raw) - 1}
    assert all(rejected(raw[:end]) for end in ends)
    assert rejected(raw + b"\0")
    assert rejected(raw + raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\x91\x93\x04\xa1\xff\xa1a", id="text that is not UTF-8"),
        pytest.param(b"\x91\x93\x05\x01" + b"\x91" * 900_000 + b"\x01", id="lists in lists, in a body"),
        pytest.param(b"\x95\x92\x05\x01\0\0\0" + b"\x91" * 900_000 + b"\x01", id="lists in lists, after it"),
        pytest.param(b"\x94\x92\x05\x01\0\0\0" + b"\x81\xa1a" * 300_000 + b"\x01", id="maps in maps"),
        pytest.param(b"\x91\x92\x0a\xdd\xff\xff\xff\xff", id="four thousand million outcomes"),
        pytest.param(b"\x91\x92\x01\xdd\xff\xff\xff\xff", id="four thousand million items"),
        pytest.param(b"\x91\x93\x04\xdb\xff\xff\xff\xff", id="four gigabytes of text"),
        pytest.param(b"\x91\x92\xcf" + b"\xff" * 8 + b"\x01", id="a huge tag"),
        pytest.param(b"\x91\x90", id="no tag"),
        pytest.param(b"\x91\xc7\x03\x01abc", id="an extension"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_hostile_bytes_are_a_decode_error_and_nothing_else(raw: bytes) -> None:
    assert rejected(raw)


def envelope(*items: Any) -> Header:
    return Header(Envelope(items))


KEY = f"video/{VIDEO}"
BALLOT = Ballot(1, 1, NODE, 1)
PIECE = WirePieceKey(VIDEO, (1, 2), 3, 4, (0, NODE, 0, 0))


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(envelope(*[Accepted(KEY, BALLOT)] * 257), id="too many items"),
        pytest.param(envelope(Accept(KEY, BALLOT, Value(1, b"x" * (192 * 1024 + 1)))), id="a large record"),
        pytest.param(envelope(Promise(KEY, BALLOT, ZERO, Value(-1))), id="a negative version"),
        pytest.param(envelope(Accept(KEY, BALLOT, Value(1, b"", ((b"short", 1),)))), id="a short op id"),  # type: ignore[arg-type]
        pytest.param(
            envelope(Accept(KEY, BALLOT, Value(1, b"", ((bytes(16), 1),) * 17))),  # type: ignore[arg-type]
            id="too many ops",
        ),
        pytest.param(envelope(Prepare(KEY, Ballot(1, -1, NODE, 1))), id="a negative round"),
        pytest.param(envelope(Prepare(KEY, Ballot(1, 1, NODE * 2, 1))), id="a long owner"),
        pytest.param(envelope(Prepare(KEY, Ballot(1, (1 << 64) - 1, NODE, 1))), id="a round with no next"),
        pytest.param(envelope(Read(KEY, -1, 1)), id="a negative epoch"),
        pytest.param(Header(Hello(1, "", "root")), id="no such role"),
        pytest.param(Header(Hello(1, "", "node", "x" * 32)), id="a hello with letters for a NodeId"),
        pytest.param(Header(Hello(1, "", "node", "ab" * 15)), id="a hello with half a NodeId"),
        pytest.param(Header(Hello(1, "", "node", NODE + "\n")), id="a hello with a newline in its NodeId"),
        pytest.param(Header(Hello(1, "", "node\n")), id="a role with a newline"),
        pytest.param(Header(List("video/\n")), id="a prefix with a newline"),
        pytest.param(Header(List("config/")), id="a prefix that is not listed"),
        pytest.param(Header(List("video/", "", 0)), id="an empty page"),
        pytest.param(Header(List("video/", "", MAX_SCAN + 1)), id="a page too large"),
        pytest.param(Header(Failure("x", "t" * 1001)), id="a long text"),
        pytest.param(Header(GetPiece(PIECE, 0, 0)), id="a range of nothing"),
        pytest.param(Header(GetPiece(PIECE, -1, 5)), id="a range before the beginning"),
        pytest.param(Header(GetPiece(PIECE._replace(video=f"{VIDEO}\n"), 0, 5)), id="an id with a newline"),
        pytest.param(Header(GetInventory(())), id="an inventory of nothing"),
        pytest.param(Header(GetInventory((PIECE,) * (MAX_INVENTORY + 1))), id="an inventory too large"),
        pytest.param(Header(GetInventory((PIECE,), -1)), id="verified in the future"),
        pytest.param(Header(Inventory((Held("lost"),))), id="no such state of a piece"),
        pytest.param(Header(PutPiece(PIECE, 1, 3, 5, bytes(32), "upkeep")), id="a purpose of the node's own"),
        pytest.param(Header(GetUsage("video")), id="usage after what is no video"),
        pytest.param(Header(Hasten("upload")), id="a job that nodes do not do by themselves"),
        pytest.param(Header(Hello(1, "", "node"), 600_001), id="a budget beyond reason"),
    ],
)
def test_a_value_over_its_bound_is_a_decode_error(header: Header) -> None:
    assert rejected(encode(header))


@pytest.mark.parametrize(
    "key",
    [
        f"{KEY}\n",
        f"{KEY}/",
        f"video/{VIDEO[:-1]}",
        f"video/{VIDEO.upper()}",
        f" {KEY}",
        f"chunk/{VIDEO}/1.5/0000003",
        f"chunk/{VIDEO}/1.5/00000003\n",
        f"chunk/{VIDEO}/1/00000003",
        f"chunk/{VIDEO}/-1.5/00000003",
        f"chunk/{VIDEO}/1.5/٠0000003",
        f"chunk/{VIDEO}/{'9' * 11}.5/00000003",
        f"views/{VIDEO}/",
        "config/",
        "config/1\n",
        "config/-1",
        "",
        "other/1",
    ],
)
def test_a_key_that_is_not_exactly_one_is_refused(key: str) -> None:
    assert rejected(encode(envelope(Accepted(key, BALLOT))))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(keys)
def test_whatever_key_the_decoder_lets_through_has_an_epoch_a_group_and_a_leader(key: str) -> None:
    assert not rejected(encode(envelope(Accepted(key, BALLOT))))
    view = View((CONFIG,))
    assert key_epoch(key) >= 0
    acceptors = group(CONFIG, key_subject(key))
    assert len(acceptors) == 5
    assert view.group(key) == acceptors
    assert view.serves(acceptors[0], key)
    if key.startswith("chunk/"):
        assert leader(CONFIG, key) in acceptors
        assert view.leader(key) in acceptors
    else:
        assert leader(CONFIG, key) is None
        assert view.leader(key) is None


def test_the_largest_envelope_of_small_replies_fits_a_part_of_the_control_lane() -> None:
    raw = encode(envelope(*[Accepted(f"chunk/{VIDEO}/9999999999.{'9' * 19}/99999999", BALLOT)] * 256))
    assert len(raw) < MAX_CONTROL
    assert not rejected(raw)


def test_the_largest_inventory_fits_a_part_of_the_control_lane() -> None:
    upload = ((1 << 32) - 1, (1 << 63) - 1)
    key = WirePieceKey(VIDEO, upload, upload[0], (1 << 16) - 1, (upload[1], NODE, upload[0], upload[0]))
    asked = encode(Header(GetInventory((key,) * MAX_INVENTORY, 3600), 60_000))
    told = encode(Header(Inventory((Held("quarantined", bytes(32)),) * MAX_INVENTORY)))
    assert max(len(asked), len(told)) < MAX_CONTROL
    assert not rejected(asked)
    assert not rejected(told)


def test_a_chain_comes_back_with_all_its_members() -> None:
    chain = Chain("ab" * 16, tuple(Config(e, MEMBERS, 1) for e in range(1, 5)))
    assert decode(encode(Header(chain))).body == chain


STEM = f"chunk/{VIDEO}/1.2/"


def test_a_run_of_creates_is_exactly_its_accepts_and_so_is_its_answer() -> None:
    ballot = Ballot(1, 0, NODE, 3)
    some = (Value(1, b"a"), Value(1, b"b"))
    run = Creates(STEM, ballot, (7, 130), some)
    keys_of_it = [f"{STEM}00000007", f"{STEM}00000130"]
    assert run.key == keys_of_it[0]
    assert run.accepts() == [Accept(k, ballot, v, True) for k, v in zip(keys_of_it, some, strict=True)]
    answer = Created(STEM, ballot, (7, 130))
    assert answer.accepteds() == [Accepted(k, ballot) for k in keys_of_it]


@pytest.mark.parametrize(
    ("stem", "indexes", "count"),
    [
        (STEM, (), 0),
        (STEM, (1, 2), 1),
        (STEM, (1,), 2),
        (STEM, (2, 1), 2),
        (STEM, (1, 1), 2),
        (STEM, (-1,), 1),
        (STEM, (10**8,), 1),
        (STEM, tuple(range(ENVELOPE_ITEMS + 1)), ENVELOPE_ITEMS + 1),
        (f"video/{VIDEO}", (1,), 1),
        (f"{STEM}\n", (1,), 1),
        (f"{STEM}00000001", (1,), 1),
    ],
)
def test_runs_of_creates_without_form_are_not_decoded(
    stem: str, indexes: tuple[int, ...], count: int
) -> None:
    fields = [stem, list(ZERO), list(indexes)]
    run = [10, *fields, [[1, b"x", []]] * count]
    with pytest.raises(msgspec.DecodeError):
        decode(msgspec.msgpack.encode([[1, [run]], 0]))
    if count == len(indexes):
        with pytest.raises(msgspec.DecodeError):
            decode(msgspec.msgpack.encode([[1, [[11, *fields]]], 0]))


def test_a_run_of_creates_has_no_more_bytes_than_an_envelope() -> None:
    def encoded(length: int) -> bytes:
        data = [b"x" * (ENVELOPE_BYTES // 2), b"x" * length]
        run = [10, STEM, list(ZERO), [1, 2], [[1, d, []] for d in data]]
        return msgspec.msgpack.encode([[1, [run]], 0])

    assert isinstance(decode(encoded(ENVELOPE_BYTES // 2)).body, Envelope)
    with pytest.raises(msgspec.DecodeError):
        decode(encoded(ENVELOPE_BYTES // 2 + 1))
