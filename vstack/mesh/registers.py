"""What the registers hold: the catalogue's records, their keys, and the names of pieces.

Pure data. A register's value is a `VideoRecord`, a `ChunkRecord` or a `ViewRecord`, packed by `pack` and
bounded by `MAX_RECORD` bytes, so that a quorum read stays one small message. Times inside a
video are integers in ticks of the video's `clock` (seconds = ticks * num / den), because a
register must give a chunk's start exactly.

Keys (CHUNKPAXOS, section 1):

    video/<video id>                                    one per video
    chunk/<video id>/<epoch>.<version>/<index, 8 digits>   one per chunk of one upload
    views/<video id>/<day>                              one per video and day on which it was seen

Zero-padded, so that the chunk table of an upload is one contiguous range.
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from vstack.errors import BadInput
from vstack.mesh.config import Policy

MAX_RECORD = 8192
"""Upper bound of a packed record, in bytes."""

SPARE = 1536
"""Bytes below that bound which a video's record leaves free when it becomes ready: for what is written into
it later, where it is deleted, or its init segment is repaired, and for being kept beside an upload which is
to replace it."""

INIT_INDEX = 0xFFFF_FFFF
"""The chunk index under which a video's init segment is stored as pieces."""

NO_NODE = "0" * 32
"""Written as the node of a generation when no keeper was involved: the pieces of an upload."""

MAX_K = 16
MAX_M = 32
"""Bounds of an erasure code, so that a chunk's register stays small."""


class UploadId(NamedTuple):
    """Names one upload of a video for ever: (epoch, version of the register that opened it)."""

    epoch: int
    version: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.version}"


class Generation(NamedTuple):
    """Who wrote a piece, against which version of its register. Two keepers never share one."""

    against: int
    node: str
    boot: int
    counter: int


UPLOADED = Generation(0, NO_NODE, 0, 0)
"""The generation of whole copies written by an upload: equal bytes, equal keys: repeating is harmless."""

_PIECE = struct.Struct(">32sIQIHQ16sII")


class PieceKey(NamedTuple):
    """The name of one stored piece. `pack` is 82 bytes and sorts by video, upload, chunk, piece."""

    video: str
    """64 hex digits."""
    upload: UploadId
    chunk: int
    """Index of the chunk, or INIT_INDEX."""
    piece: int
    """Number of the fragment (0..m-1); 0 for a whole copy, whichever copy it is."""
    generation: Generation = UPLOADED

    def pack(self) -> bytes:
        g = self.generation
        return _PIECE.pack(
            bytes.fromhex(self.video),
            self.upload.epoch,
            self.upload.version,
            self.chunk,
            self.piece,
            g.against,
            bytes.fromhex(g.node),
            g.boot,
            g.counter,
        )

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> PieceKey:
        """Raises struct.error if `raw` is not exactly PIECE_KEY_BYTES long."""
        video, epoch, version, chunk, piece, against, node, boot, counter = _PIECE.unpack(raw)
        return cls(
            video.hex(),
            UploadId(epoch, version),
            chunk,
            piece,
            Generation(against, node.hex(), boot, counter),
        )


PIECE_KEY_BYTES = _PIECE.size


class Scheme(NamedTuple):
    """Redundancy of one chunk: any `k` of `m` pieces give it back. Whole copies are k = 1."""

    k: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.m} cop{'y' if self.m == 1 else 'ies'}" if self.k == 1 else f"{self.k}-of-{self.m}"


REPLICATED = Scheme(1, 3)
ERASURE = Scheme(*Policy().erasure)


def parse_scheme(text: str) -> Scheme:
    """`3/5` -> any 3 of 5. Raises BadInput for what is no erasure code, or over its bounds."""
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    if not found:
        raise BadInput(f"{text!r} is not an erasure code: write it as 3/5, for any 3 of 5 fragments")
    scheme = Scheme(int(found[1]), int(found[2]))
    check_erasure(scheme)
    return scheme


def check_erasure(scheme: Scheme) -> None:
    """Raises BadInput unless fragments of this scheme can be made, stored and lost."""
    k, m = scheme
    if k < 2 or m <= k:
        raise BadInput(
            f"{k}/{m} is not an erasure code: k, the fragments that give a chunk back, must be 2 or more, "
            "and m, all of them, more than k. Whole copies are `--redundancy replicated`"
        )
    if k > MAX_K or m > MAX_M:
        raise BadInput(f"{k}/{m} is over the bounds of {MAX_K}/{MAX_M}")


def uploaded(scheme: Scheme) -> Generation:
    """The generation of pieces written by an upload. Pieces of different schemes never share a key."""
    return UPLOADED if scheme.k == 1 else Generation(0, NO_NODE, scheme.k, scheme.m)


Redundancy = Literal["auto", "replicated", "erasure"]


class Place(NamedTuple):
    """Where one piece lies: the node that acknowledged it durable, the piece's SHA-256, who wrote it."""

    node: str
    piece: int
    sha256: bytes
    generation: Generation = UPLOADED


class Track(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stream of a video, as far as the catalogue speaks of it. Its codec's parameters are in the init."""

    kind: str
    """video, audio, subtitle, data or attachment."""
    codec: str
    time_base: tuple[int, int]
    """Of the stored container (num, den), in which the stored timestamps count."""
    source_time_base: tuple[int, int]
    """Of the source (num, den)."""
    offset: int = 0
    """Ticks of `time_base` by which stored timestamps lie above the source's; `get` takes them back."""
    language: str = ""
    width: int = 0
    height: int = 0
    sample_rate: int = 0
    channels: int = 0


class Media(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the chunks of a video fit together."""

    container: Literal["mp4", "matroska", "mpegts", "flv", "opaque"]
    source_format: str
    """mp4, mov, matroska, webm, mpegts, flv, avi, ...: what `get` writes by default follows from it."""
    clock: tuple[int, int]
    """Ticks of chunk times (num, den): the time base of the track that the cuts follow. (1, 1) if opaque."""
    duration: int
    """Ticks of `clock`."""
    tracks: tuple[Track, ...] = ()
    lost: tuple[str, ...] = ()
    """What the stored form does not keep of the source, in words, as the uploader was told."""


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True):
    """What never changes about a chunk: one row of a video's chunk table."""

    index: int
    start: int
    """Ticks of the media's clock."""
    duration: int
    """Ticks of the media's clock."""
    size: int
    """Bytes."""
    sha256: bytes
    dependent: bool = False
    """True if the chunk does not begin on a keyframe: decoding begins at an earlier chunk."""


class ChunkRecord(msgspec.Struct, frozen=True, array_like=True):
    """Value of a chunk's register: the table row, and where the pieces lie now."""

    entry: ChunkEntry
    scheme: Scheme
    places: tuple[Place, ...]

    def key(self, video: str, upload: UploadId, place: Place) -> PieceKey:
        """The name of the piece that lies at `place`."""
        return PieceKey(video, upload, self.entry.index, place.piece, place.generation)


class InitPiece(msgspec.Struct, frozen=True, array_like=True):
    """Where the whole copies of a video's init segment lie."""

    size: int
    sha256: bytes
    places: tuple[Place, ...]


def init_record(init: InitPiece) -> ChunkRecord:
    """The init segment as if it were a chunk: whole copies, under INIT_INDEX."""
    entry = ChunkEntry(INIT_INDEX, 0, 0, init.size, init.sha256)
    return ChunkRecord(entry, Scheme(1, len(init.places)), init.places)


VideoState = Literal["uploading", "ready", "aborted", "deleted", "purging"]


class VideoRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Value of a video's register.

    `upload` is (0, 0) in the value that opens an upload, because the version which names the
    upload is only made by that change; readers use `upload_id`, which knows.
    """

    state: VideoState
    title: str
    redundancy: Redundancy
    recipe: str
    """Chunker version and cut parameters: two clients share an upload only if this is equal."""
    source_size: int
    upload: UploadId = UploadId(0, 0)
    media: Media | None = None
    init: InitPiece | None = None
    chunks: int = 0
    size: int = 0
    """Sum of the chunks' sizes."""
    table: bytes = b""
    """SHA-256 of the packed chunk table (`table_hash`)."""
    erasure: Scheme = ERASURE
    """How its fragments are made, while it is cold or pinned to fragments."""
    hot: bool = False
    """It is viewed so much that it is to be kept as whole copies, unless it is pinned."""
    waited: int = 0
    """Seconds of the mesh's running time that it has been in its state, as far as keepers have counted:
    for what is done after a while. Starts over with each state."""
    before: bytes = b""
    """Of an open upload of a video that could not be wholly read any more: its packed record, which stands
    again if nothing comes of the upload."""

    @property
    def wanted(self) -> Scheme:
        """How its chunks are to be kept, in a mesh that is large enough."""
        if self.redundancy == "replicated" or (self.redundancy == "auto" and self.hot):
            return REPLICATED
        return self.erasure


class Slot(NamedTuple):
    """Views that one process of one node has counted. Nobody else raises this slot."""

    node: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """The 16 bytes of the NodeId."""
    boot: Annotated[int, Meta(ge=0)]
    """Of that process; 0: the sum of processes of the node that have ended."""
    views: Annotated[int, Meta(ge=0)]


class ViewRecord(msgspec.Struct, frozen=True, array_like=True):
    """Value of the register of a video's views on one day: a slot for each (node, boot), in this order."""

    slots: tuple[Slot, ...] = ()

    @property
    def total(self) -> int:
        return sum(s.views for s in self.slots)

    def of(self, node: bytes, boot: int) -> int:
        """What that slot holds; 0 if there is none."""
        return next((s.views for s in self.slots if (s.node, s.boot) == (node, boot)), 0)


EPOCH_SHIFT = 20
"""A register's version is at least `epoch << EPOCH_SHIFT` of the epoch that produced it."""


def upload_id(record: VideoRecord, version: int) -> UploadId:
    """The upload that `record` is about, where `version` is that of its register."""
    return record.upload if record.upload != (0, 0) else UploadId(version >> EPOCH_SHIFT, version)


def given_up(record: VideoRecord, upload: UploadId) -> VideoRecord:
    """What follows the record of an open upload if nothing comes of it. Raises msgspec.DecodeError."""
    if record.before:
        return unpack_video(record.before)
    return msgspec.structs.replace(record, state="aborted", upload=upload, waited=0)


_encode = msgspec.msgpack.Encoder().encode
_decode_video = msgspec.msgpack.Decoder(VideoRecord).decode
_decode_chunk = msgspec.msgpack.Decoder(ChunkRecord).decode
_decode_views = msgspec.msgpack.Decoder(ViewRecord).decode


class RecordTooLarge(BadInput, ValueError):
    """What would have to be written into a register does not fit."""


def pack(record: VideoRecord | ChunkRecord | ViewRecord, *, spare: int = 0) -> bytes:
    """Raises RecordTooLarge if the packed record is larger than MAX_RECORD, `spare` bytes less."""
    raw = _encode(record)
    if len(raw) > MAX_RECORD - spare:
        raise RecordTooLarge(
            f"what the catalogue has to keep takes {len(raw)} bytes, over the bound of {MAX_RECORD - spare} "
            f"of a {type(record).__name__}: fewer tracks or shorter texts would fit"
        )
    return raw


def unpack_video(raw: bytes) -> VideoRecord:
    """Raises msgspec.DecodeError."""
    return _decode_video(raw)


def unpack_chunk(raw: bytes) -> ChunkRecord:
    """Raises msgspec.DecodeError."""
    return _decode_chunk(raw)


def unpack_views(raw: bytes) -> ViewRecord:
    """Raises msgspec.DecodeError."""
    return _decode_views(raw)


def video_key(video: str) -> str:
    return f"video/{video}"


def uploads_prefix(video: str) -> str:
    """Of the chunks of all uploads of a video."""
    return f"chunk/{video}/"


def chunk_prefix(video: str, upload: UploadId) -> str:
    return f"chunk/{video}/{upload}/"


def what(index: int) -> str:
    """The name of a chunk in messages."""
    return "the init segment" if index == INIT_INDEX else f"chunk {index}"


def chunk_key(video: str, upload: UploadId, index: int) -> str:
    return f"chunk/{video}/{upload}/{index:08d}"


def views_prefix(video: str) -> str:
    return f"views/{video}/"


def views_key(video: str, day: int) -> str:
    """`day` counts from 1970-01-01, by the clock of whoever counts the view: it is only a label."""
    return f"views/{video}/{day}"


def table_hash(entries: list[ChunkEntry]) -> bytes:
    """SHA-256 over the packed rows, in order."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(_encode(entry))
    return digest.digest()
