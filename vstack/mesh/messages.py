"""Every message on the wire, in one place.

A message is one ZeroMQ multipart: `[correlation id, 8 bytes][header: msgpack][payload...]`.
The header is a `Header`: the time that the request may still take, or the server's load in a
reply, and one tagged struct of `Body`. Payloads travel as raw parts, never inside msgpack.

Paxos items (CHUNKPAXOS, section 2) travel in an `Envelope`, up to ENVELOPE_ITEMS of them or
ENVELOPE_BYTES, each independent of the others. A reply echoes its request's ballot or token.

Decoding is strict: unknown tags, wrong types, and values over their bound raise
`msgspec.DecodeError` (`ValidationError` is one), and nothing else.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from vstack.mesh.changes import MeshChange
from vstack.mesh.config import INDEX_DIGITS, Config, Member, PublicKey
from vstack.mesh.registers import MAX_RECORD

PROTOCOL_VERSION = 1
ENVELOPE_ITEMS = 256
ENVELOPE_BYTES = 256 * 1024
MAX_CONTROL = 1 << 20
"""Bytes of one part on the control lane."""
MAX_PIECE = 8 << 20
"""Bytes of one piece: a whole copy of the largest chunk."""
MAX_RANGE = 2 << 20
"""Bytes that one request reads: what a node keeps in memory for a connection is bounded by it."""
MAX_DATA = 9 << 20
"""Bytes of one part on the data lane."""
MAX_ZONE = 64
"""Characters of a zone's name."""
MAX_WEIGHT = 1 << 20
MAX_SUBMIT = 512
"""Operations in one request."""
MAX_UPDATES = 40
"""Statements in one message of gossip: with 30 bytes each, it usually fits one Ethernet frame."""
MAX_SCAN = 1000
MAX_INVENTORY = 512
"""Pieces in one question about what a node holds."""
"""Registers in one page of a range."""

Key = Annotated[
    str,
    Meta(
        max_length=200,
        pattern=r"^(video/[0-9a-f]{64}|chunk/[0-9a-f]{64}/[0-9]{1,10}\.[0-9]{1,19}/[0-9]{8}"
        r"|views/[0-9a-f]{64}/[0-9]{1,10}|config/[0-9]{1,10})\Z",
    ),
]
Prefix = Annotated[str, Meta(max_length=200, pattern=r"^(video|chunk|views)/[0-9a-f./]*\Z")]
Node = Annotated[str, Meta(min_length=32, max_length=32, pattern=r"^[0-9a-f]{32}\Z")]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Data = Annotated[bytes, Meta(max_length=MAX_RECORD)]
ValueData = Annotated[bytes, Meta(max_length=192 * 1024)]
"""What an acceptor may hold: a configuration of a thousand members is larger than any other register."""
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Text = Annotated[str, Meta(max_length=1000)]
OpId = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Ballot(NamedTuple):
    """Compared lexicographically. The owner is (node, boot): unique per process incarnation."""

    epoch: U64
    round: U64
    node: Annotated[str, Meta(max_length=32)]
    boot: U64


ZERO = Ballot(0, 0, "", 0)


class Applied(NamedTuple):
    """One change that a value remembers, so that a repeated operation applies once."""

    op: OpId
    replaced: U64
    """The version that this change replaced."""


class Value(msgspec.Struct, frozen=True, array_like=True):
    """What a register holds. `data` is None for a tombstone, and at version 0 (absent)."""

    version: U64 = 0
    data: ValueData | None = None
    ops: Annotated[tuple[Applied, ...], Meta(max_length=16)] = ()
    """The last changes, oldest first; at most 16."""


ABSENT = Value()


class Record(msgspec.Struct, frozen=True, array_like=True):
    """An acceptor's durable state of one register. No record means (ZERO, ZERO, ABSENT)."""

    promised: Ballot = ZERO
    accepted: Ballot = ZERO
    value: Value = ABSENT


EMPTY = Record()


class Op(msgspec.Struct, frozen=True, array_like=True):
    """One operation on one register, as a client sends it. `expect` None means: read.

    `id` stays the same over all retries through any node; that is what makes them harmless.
    """

    id: OpId
    key: Key
    born: U64
    """The client's epoch when it first sent the operation."""
    expect: U64 | None = None
    data: Data | None = None


class Ok(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The change was applied and chosen. `version` is the one it produced."""

    version: U64


class Mismatch(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The change was not applied: the register holds something else."""

    version: U64
    data: Data | None


class Unknown(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """It may or may not have happened, and may still happen."""

    reason: Text


class Found(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """What a read returned: a chosen value and its version. `data` is None if absent or deleted."""

    version: U64
    data: Data | None


Outcome = Ok | Mismatch | Unknown | Found


class Item(msgspec.Struct, frozen=True, array_like=True):
    """Base of what travels in envelopes."""

    key: Key


class Prepare(Item, frozen=True, tag=1):
    ballot: Ballot


class Promise(Item, frozen=True, tag=2):
    ballot: Ballot
    accepted: Ballot
    value: Value


class Accept(Item, frozen=True, tag=3):
    ballot: Ballot
    value: Value
    fresh: bool = False


class Accepted(Item, frozen=True, tag=4):
    ballot: Ballot


class Read(Item, frozen=True, tag=5):
    epoch: U64
    token: U64


class ReadReply(Item, frozen=True, tag=6):
    token: U64
    epoch: U64
    accepted: Ballot
    value: Value


class Nack(Item, frozen=True, tag=7):
    """A refusal always names what beat it: the ballot `seen` and the acceptor's epoch."""

    ballot: Ballot
    seen: Ballot
    epoch: U64


class Forward(Item, frozen=True, tag=8):
    """An operation for the rival that keeps winning: it has the register's newest ballot."""

    op: Op
    token: U64
    """Names this request of this operation: the same one may be asked for again, and is another request."""


class Told(Item, frozen=True, tag=9):
    """What became of a forwarded operation, by the token it came with."""

    token: U64
    outcome: Outcome


Indexes = Annotated[
    tuple[Annotated[int, Meta(ge=0, lt=10**INDEX_DIGITS)], ...],
    Meta(min_length=1, max_length=ENVELOPE_ITEMS),
]


class Neighbours(msgspec.Struct, frozen=True, array_like=True):
    """Base of items about several chunk registers of one upload: `stem` and an index is a key."""

    stem: Annotated[str, Meta(max_length=200, pattern=r"^chunk/[0-9a-f]{64}/[0-9]{1,10}\.[0-9]{1,19}/\Z")]
    ballot: Ballot
    indexes: Indexes
    """In order, none of them twice."""

    def __post_init__(self) -> None:
        """Raises ValueError, which decoding makes a ValidationError."""
        if any(a >= b for a, b in pairwise(self.indexes)):
            raise ValueError("indexes out of order")

    @property
    def key(self) -> str:
        """The first register's."""
        return f"{self.stem}{self.indexes[0]:0{INDEX_DIGITS}d}"

    def keys(self) -> list[str]:
        stem = self.stem
        return [f"{stem}{i:0{INDEX_DIGITS}d}" for i in self.indexes]


class Creates(Neighbours, frozen=True, tag=10):
    """Exactly the fresh `Accept`s of one ballot for each of the keys, in one item."""

    values: Annotated[tuple[Value, ...], Meta(max_length=ENVELOPE_ITEMS)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.indexes):
            raise ValueError("as many values as indexes are needed")
        if self.bulk > ENVELOPE_BYTES:
            raise ValueError(f"more than {ENVELOPE_BYTES} bytes of values")

    @property
    def bulk(self) -> int:
        """Bytes of all values' data."""
        return sum([len(v.data) for v in self.values if v.data is not None])

    def accepts(self) -> list[Accept]:
        return [Accept(k, self.ballot, v, True) for k, v in zip(self.keys(), self.values, strict=True)]


class Created(Neighbours, frozen=True, tag=11):
    """Exactly the `Accepted`s of one ballot for each of the keys, in one item."""

    def accepteds(self) -> list[Accepted]:
        return [Accepted(k, self.ballot) for k in self.keys()]


Request = Prepare | Accept | Read
"""About one register."""
Reply = Promise | Accepted | ReadReply | Nack
AnyItem = Prepare | Promise | Accept | Accepted | Read | ReadReply | Nack | Forward | Told | Creates | Created


class Envelope(msgspec.Struct, frozen=True, array_like=True, tag=1):
    items: Annotated[tuple[AnyItem, ...], Meta(max_length=ENVELOPE_ITEMS)]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The first message of every connection, and its answer."""

    version: U64
    mesh: Annotated[str, Meta(max_length=32)]
    """Mesh id; empty while there is none."""
    role: Annotated[str, Meta(pattern=r"^(node|client)\Z")]
    node: Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""
    """A node's NodeId; empty for a client."""
    boot: U64 = 0
    epoch: U64 = 0
    peers: Annotated[bytes, Meta(max_length=32)] = b""
    """Hash of the list of peers that a forming node was started with."""
    zone: Annotated[str, Meta(max_length=MAX_ZONE)] = ""
    weight: Annotated[int, Meta(ge=0, le=MAX_WEIGHT)] = 1
    process: Annotated[bytes, Meta(max_length=16)] = b""
    """Random, of this process: two processes with the same NodeId and boot are told apart by it."""
    address: Annotated[str, Meta(max_length=300)] = ""
    """Where a node is dialled: host:port of its control lane."""
    key: PublicKey = b""
    """A node's public key."""


class HelloRequired(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Who are you? Sent for a message from a connection that has not said hello."""


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A request was refused. `code` is one of FAILURES; `text` is one line for a person."""

    code: Annotated[str, Meta(max_length=32)]
    text: Text


FAILURES = (
    "busy", "epoch", "forbidden", "removed", "forming", "wrong-mesh", "stale", "refused", "not-found",
    "full", "io", "damaged", "late",
)  # fmt: skip


class State(IntEnum):
    """How a member does. Of two statements of one incarnation, the one of higher rank holds."""

    UP = 0
    SLOW = 1
    SUSPECT = 2
    DOWN = 3


class Statement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is said of one member, in gossip. Boot 0 means that nothing was heard of it yet."""

    node: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """The 16 bytes of the NodeId."""
    boot: U64 = 0
    incarnation: U64 = 0
    """Raised by the member itself, and by nobody else."""
    state: State = State.UP
    epoch: U64 = 0
    """The newest configuration that it has durably adopted."""
    settled: U64 = 0
    """The newest epoch in which it has listed and settled every register that it holds."""
    by: U32 = 0
    """Of a suspicion on its way: the start of the NodeId of one who has it at first hand."""


Updates = Annotated[tuple[Statement, ...], Meta(max_length=MAX_UPDATES)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Answered by `Pong`, at once."""

    sequence: U32
    updates: Updates


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=6):
    sequence: U32
    updates: Updates
    reached: bool = True
    """False in answer to a `PingRequest` whose target did not answer: the helper is there at least."""


class GetConfig(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Asks for the decided chain from `after` on, as much of it as fits one message."""

    after: U64 = 0
    open: bool = False
    """Only the configurations that are still open, base to the newest: what a client needs to know."""


class Chain(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Decided configurations, oldest first."""

    mesh: Annotated[str, Meta(max_length=32)]
    configs: tuple[Config, ...]


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=9):
    ops: Annotated[tuple[Op, ...], Meta(max_length=MAX_SUBMIT)]


class Outcomes(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """One outcome per operation, in order."""

    outcomes: tuple[Outcome, ...]


class Scan(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Asks one acceptor for a page of its records below `prefix`, after `after`."""

    prefix: Prefix
    after: Annotated[str, Meta(max_length=200)]
    limit: Annotated[int, Meta(ge=1, le=MAX_SCAN)]
    epoch: U64


class ScanRow(NamedTuple):
    key: Key
    accepted: Ballot
    value: Value


class ScanReply(msgspec.Struct, frozen=True, array_like=True, tag=12):
    rows: tuple[ScanRow, ...]
    more: bool
    epoch: U64


class List(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """Asks a node for a page of registers as a quorum has them."""

    prefix: Prefix
    after: Annotated[str, Meta(max_length=200)] = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_SCAN)] = MAX_SCAN


class Row(NamedTuple):
    key: str
    version: int
    data: bytes


class Listing(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Registers with data, in order of key. `silent` names the nodes that did not answer;
    if `complete` is false, registers may be missing because of them."""

    rows: tuple[Row, ...]
    after: str
    """Where the next page starts; empty at the end."""
    complete: bool
    silent: tuple[str, ...]


class WirePieceKey(NamedTuple):
    """`PieceKey` with its bounds, as it travels."""

    video: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    upload: tuple[U32, U64]
    chunk: Annotated[int, Meta(ge=0, lt=1 << 32)]
    piece: Annotated[int, Meta(ge=0, lt=1 << 16)]
    generation: tuple[
        U64, Node, Annotated[int, Meta(ge=0, lt=1 << 32)], Annotated[int, Meta(ge=0, lt=1 << 32)]
    ]


class PutPiece(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """Store the payload part under `key`. Answered by `Stored` once it is on disk."""

    key: WirePieceKey
    k: Annotated[int, Meta(ge=1, le=255)]
    m: Annotated[int, Meta(ge=1, le=255)]
    chunk_length: Annotated[int, Meta(ge=0, le=1 << 32)]
    sha256: Hash
    purpose: Annotated[str, Meta(pattern=r"^(upload|repair|demotion)\Z")] = "upload"
    """How full the disk may get for it: see `Purpose`."""


class Stored(msgspec.Struct, frozen=True, array_like=True, tag=16):
    present: bool
    """It was there already, byte for byte."""


class GetPiece(msgspec.Struct, frozen=True, array_like=True, tag=17):
    key: WirePieceKey
    offset: Annotated[int, Meta(ge=0, le=MAX_PIECE)]
    length: Annotated[int, Meta(ge=1, le=MAX_RANGE)]


class PieceData(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """Answer to `GetPiece`; the bytes are the payload part."""

    total: U64
    """Length of the whole piece."""


class GetInventory(msgspec.Struct, frozen=True, array_like=True, tag=30):
    """Asks what a node holds of some pieces. Answered by `Inventory`."""

    keys: Annotated[tuple[WirePieceKey, ...], Meta(min_length=1, max_length=MAX_INVENTORY)]
    verified_within: U32 | None = None
    """Seconds: a piece counts if it was written, or read and compared with its hash, within so many;
    otherwise it is read now. None: what the index says is enough."""


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of one piece."""

    state: Annotated[str, Meta(pattern=r"^(present|absent|quarantined)\Z")]
    """quarantined: it was there, was found damaged, and is not served."""
    sha256: Annotated[bytes, Meta(max_length=32)] = b""
    """Of the payload, as it was stored; empty if absent."""


class Inventory(msgspec.Struct, frozen=True, array_like=True, tag=31):
    """One answer for each key, in order."""

    held: Annotated[tuple[Held, ...], Meta(max_length=MAX_INVENTORY)]


class GetUsage(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """Asks what the pieces of each video take on a node's disk, from video `after` on."""

    after: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class UsageRow(NamedTuple):
    """The pieces of one video and one scheme."""

    video: str
    k: int
    m: int
    pieces: int
    payload_bytes: int
    record_bytes: int
    """As they lie on disk: headers, payloads, padding, footers."""


class Usage(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """Whole videos, in order of their ids."""

    rows: tuple[UsageRow, ...]
    after: str
    """Where the next page starts; empty at the end."""


class Hasten(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """Asks a node to begin now what it does from time to time. Answered by `Noted`."""

    job: Annotated[str, Meta(pattern=r"^(repair|scrub|gc)\Z")]


class GetStatus(msgspec.Struct, frozen=True, array_like=True, tag=19):
    pass


class PeerStatus(msgspec.Struct, frozen=True):
    node: str
    address: str
    state: str
    """up, suspect or down, as the answering node sees it."""
    rtt_ms: float | None = None


class Status(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """What a node says of itself. Counters count from its start."""

    node: str
    mesh: str
    epoch: int
    boot: int
    address: str
    version: str
    uptime_s: float
    peers: tuple[PeerStatus, ...]
    counters: dict[str, int]
    store: dict[str, float]
    disk_free: int
    disk_total: int
    base: int = 0
    settled: int = 0
    """The newest epoch at which all registers that this node holds are settled."""
    leaving: tuple[str, ...] = ()
    """Nodes that are not in the mesh any more, and whose votes have not all moved: they must stay up."""
    moving: bool = False
    """Some registers may still be held by groups of older epochs: base has not passed them."""
    waiting: dict[int, tuple[str, ...]] = {}
    """Why they have not: by open epoch, the nodes that still have to settle what they hold."""
    keeper: dict[str, float] = {}
    """What this node does to keep the pieces of its videos: queues, bytes, seconds."""


class ChangeMesh(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """An operator's change of the configuration. Answered by `MeshChanged`, or by a Failure."""

    id: OpId
    """The same over all retries."""
    replaces: U64
    """The epoch that the change was made for: if another one is the newest, it is refused."""
    change: MeshChange


class MeshChanged(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """The change was decided, in this epoch."""

    epoch: U64


class Join(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """A node without a mesh asks to become a member. Answered by `MeshChanged`, or by a Failure."""

    member: Member


class ForceConfig(msgspec.Struct, frozen=True, array_like=True, tag=24):
    """The operator's way out: adopt a configuration that no majority can decide any more."""

    config: Config


class PingRequest(msgspec.Struct, frozen=True, array_like=True, tag=27):
    """Asks to ping `target`. Answered by `Pong` with this sequence, whatever comes of it."""

    sequence: U32
    target: Annotated[bytes, Meta(min_length=16, max_length=16)]
    updates: Updates


class Viewed(msgspec.Struct, frozen=True, array_like=True, tag=25):
    """A playback has played long enough to count. `id` is the playback's, the same over all retries."""

    video: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    id: OpId


class Noted(msgspec.Struct, frozen=True, array_like=True, tag=26):
    """Taken note of; nothing is promised."""


class GetHoldings(msgspec.Struct, frozen=True, array_like=True, tag=28):
    """Asks which videos a node holds pieces of, from `after` on: for what no register names any more."""

    after: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class Holdings(msgspec.Struct, frozen=True, array_like=True, tag=29):
    """Video ids in order."""

    videos: Annotated[tuple[str, ...], Meta(max_length=MAX_SCAN)]
    more: bool


Body = (
    Envelope
    | Hello
    | HelloRequired
    | Failure
    | Ping
    | Pong
    | GetConfig
    | Chain
    | Submit
    | Outcomes
    | Scan
    | ScanReply
    | List
    | Listing
    | PutPiece
    | Stored
    | GetPiece
    | PieceData
    | GetStatus
    | Status
    | ChangeMesh
    | MeshChanged
    | Join
    | ForceConfig
    | Viewed
    | Noted
    | PingRequest
    | GetHoldings
    | Holdings
    | GetInventory
    | Inventory
    | GetUsage
    | Usage
    | Hasten
)


class Header(msgspec.Struct, frozen=True, array_like=True):
    body: Body
    budget_ms: Annotated[int, Meta(ge=0, le=600_000)] = 0
    """In a request: how long it may still take; after that the server drops it."""
    queued: U64 = 0
    """In a reply: bytes that wait at the server for the same lane."""
    rate: U64 = 0
    """In a reply: bytes a second that the server has lately served on this lane; 0 unknown."""
    epoch: U64 = 0
    """In a reply: the configuration that the server knows."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Header).decode


def encode(header: Header) -> bytes:
    return _encode(header)


def decode(raw: bytes | memoryview) -> Header:
    """Raises msgspec.DecodeError for anything that is not exactly one valid header."""
    try:
        return _decode(raw)
    except (UnicodeDecodeError, RecursionError) as e:  # text that is not UTF-8; lists in lists in lists
        raise msgspec.DecodeError(str(e)) from e
