"""Who the mesh is: configurations, acceptor groups, eras, implicit leaders.

Pure and integers only: two nodes with the same configuration compute the same groups, on any
machine (CHUNKPAXOS, section 1; bug B19 is what happens when weights or gossip leak in here).
A configuration is immutable once decided. The mesh id is the hash of the first one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

NodeId = str
"""32 hex digits, random, minted inside the vote store."""

HASH_VERSION = 1

INDEX_DIGITS = 8
"""Of a chunk's index at the end of its key."""

CHUNKS_A_TURN = 128
"""Neighbouring chunks that share a leader."""

CONFIG_KEY = "config/"
"""Keys below this prefix decide configurations. They live outside the epoch fence."""


Hex32 = Annotated[str, Meta(min_length=32, max_length=32, pattern=r"^[0-9a-f]{32}\Z")]
PublicKey = Annotated[bytes, Meta(max_length=32)]
"""A CURVE public key, 32 bytes; empty in a mesh without keys."""
Role = Literal["admin", "writer", "reader"]
"""What a client may do. Each role may do what the ones after it may."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One node of a configuration."""

    node: Hex32
    address: Annotated[str, Meta(max_length=300)]
    """host:port of its control lane, as others dial it; the data lane is the next port."""
    zone: Annotated[str, Meta(max_length=64)] = ""
    weight: Annotated[int, Meta(ge=0, le=1 << 20)] = 1
    """Share of the pieces, by capacity. Never used for acceptor groups."""
    key: PublicKey = b""
    draining: bool = False
    """It keeps what it has, gets no new pieces, and votes in no group of this configuration."""


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """A client that may use the mesh, by its public key."""

    key: PublicKey
    role: Role
    name: Annotated[str, Meta(max_length=64)] = ""


Seconds = Annotated[int, Meta(ge=0, le=10 * 365 * 86_400)]


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the mesh keeps videos: the same for all of its nodes and clients, and changed while it runs."""

    erasure: tuple[Annotated[int, Meta(ge=2, le=16)], Annotated[int, Meta(ge=3, le=32)]] = (3, 5)
    """k and m of new videos' fragments: any k of m give a chunk back."""
    hot_views: Annotated[int, Meta(ge=1, le=1 << 40)] = 1000
    """A video with more views than this, over the window, is kept as whole copies."""
    window_days: Annotated[int, Meta(ge=1, le=3650)] = 30
    repair_delay: Seconds = 600
    """After which what a silent node held counts as missing."""
    grace: Seconds = 600
    """For which pieces stay that no register names any more: somebody may be reading them."""
    undelete: Seconds = 86_400
    """For which a deleted video can be had back, and an upload that nobody goes on with is kept."""
    repair_rate: Annotated[int, Meta(ge=1 << 10, le=1 << 40)] = 32 << 20
    """Bytes a second that each node reads and writes at most, to repair and to move."""


class Config(msgspec.Struct, frozen=True):
    """One configuration of the mesh: immutable once decided."""

    epoch: Annotated[int, Meta(ge=0, lt=1 << 32)]
    members: Annotated[tuple[Member, ...], Meta(max_length=1024)]
    base: Annotated[int, Meta(ge=0, lt=1 << 32)]
    """The oldest epoch whose groups may still hold undecided or unmigrated values; base <= epoch."""
    hash_version: int = HASH_VERSION
    grants: Annotated[tuple[Grant, ...], Meta(max_length=1024)] = ()
    change: Annotated[bytes, Meta(max_length=16)] = b""
    """Names the change that made this configuration, so that whoever asked for it, and asks again,
    knows that it happened."""
    lost: Annotated[tuple[Hex32, ...], Meta(max_length=1024)] = ()
    """Nodes that the operator has declared lost for good, in this very change: nobody waits for their
    votes in older epochs. Their registers may have lost their latest change."""
    policy: Policy = Policy()

    @property
    def g(self) -> int:
        """Acceptors per register: all voters up to 3, 3 for four, 5 from five voters on."""
        n = len(self.voters)
        return n if n <= 3 else 3 if n == 4 else 5

    def member(self, node: NodeId) -> Member | None:
        return next((m for m in self.members if m.node == node), None)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(m.node for m in self.members)

    @property
    def voters(self) -> tuple[NodeId, ...]:
        """The members that groups are drawn from."""
        return tuple(m.node for m in self.members if not m.draining)


GENESIS = Config(epoch=0, members=(), base=0)
"""Before the first configuration: nobody is a member, nobody votes, except on `config/1`."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Config).decode


def host_and_port(text: str) -> tuple[str, int] | None:
    """`host:port` -> (host, port), IPv6 hosts without their brackets; None if that cannot be dialled. The
    port must have a next one, for the data lane."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    named = re.fullmatch(r"[0-9A-Fa-f:.%a-z]+" if bracketed else r"[0-9A-Za-z._-]+", host)
    if not named or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65535:
        return None
    return host, int(port)


def pack_config(config: Config) -> bytes:
    return _encode(config)


def unpack_config(raw: bytes) -> Config:
    """Raises msgspec.DecodeError."""
    return _decode(raw)


def mesh_id(first: Config) -> str:
    """32 hex digits: the hash of the configuration of epoch 1."""
    return hashlib.sha256(_encode(first)).hexdigest()[:32]


def key_subject(key: str) -> str:
    """What a key's group is drawn by: the video id, for every register of a video."""
    return key.split("/", 2)[1]


@lru_cache(maxsize=65536)
def key_epoch(key: str) -> int:
    """The epoch that named a chunk's upload; 0 for other keys. Nothing exists about a key before it.

    Raises ValueError for a malformed chunk key.
    """
    if not key.startswith("chunk/"):
        return 0
    _, _, upload, _ = key.split("/")
    return int(upload.split(".")[0])


def _score(subject: str, node: NodeId) -> int:
    return int.from_bytes(hashlib.blake2b(f"{subject}\0{node}".encode(), digest_size=8).digest())


@lru_cache(maxsize=65536)
def group(config: Config, subject: str) -> tuple[NodeId, ...]:
    """The acceptors of every key of `subject`: the first g voters by rendezvous hash, unweighted."""
    ranked = sorted(config.voters, key=lambda node: (_score(subject, node), node), reverse=True)
    return tuple(ranked[: config.g])


class Era(NamedTuple):
    """A maximal run of consecutive epochs in which a key has the same group."""

    first: int
    group: tuple[NodeId, ...]
    """Without those that were declared lost since."""
    size: int
    """Of the group as it was."""

    @property
    def majority(self) -> int:
        """How many of `group` speak for it: a majority, or all that are left where that many are not."""
        return min(self.size // 2 + 1, len(self.group))


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """What a view says of one register, or of all chunk registers of one upload."""

    epoch: int
    """The epoch that named the upload; 0 for other keys."""
    eras: tuple[Era, ...]
    """Newest first."""
    group: tuple[NodeId, ...]
    """Of the newest era."""
    majority: int
    everyone: tuple[NodeId, ...]
    """The acceptors of all eras."""
    leaders: tuple[NodeId, ...]
    """In turns, each for CHUNKS_A_TURN chunks; empty for keys that have no leader."""

    def leader(self, key: str) -> NodeId | None:
        return self.leader_of_turn(int(key[-INDEX_DIGITS:]) // CHUNKS_A_TURN) if self.leaders else None

    def leader_of_turn(self, turn: int) -> NodeId | None:
        """`turn`: a chunk's index divided by CHUNKS_A_TURN."""
        return self.leaders[turn % len(self.leaders)] if self.leaders else None


class View:
    """What one node knows of the chain: the configurations from `base` to `epoch`.

    Grows by `adopt`, which the caller makes durable before any reply leaves.
    """

    def __init__(self, chain: tuple[Config, ...]) -> None:
        if not chain:
            raise ValueError("a view needs at least one configuration")
        self._chain = {c.epoch: c for c in chain}
        self.config = chain[-1]
        """The newest configuration."""
        self._eras: dict[str, tuple[Era, ...]] = {}
        self._places: dict[str, Place] = {}
        self._look()

    @property
    def epoch(self) -> int:
        return self.config.epoch

    @property
    def base(self) -> int:
        return self.config.base

    def adopt(self, config: Config) -> None:
        """Takes the decided successor of the newest configuration. Raises ValueError for any other."""
        if config.epoch != self.epoch + 1:
            raise ValueError(f"epoch {config.epoch} does not follow {self.epoch}")
        self._chain[config.epoch] = config
        self.config = config
        for epoch in [e for e in self._chain if e < config.base]:
            del self._chain[epoch]
        self._eras.clear()
        self._places.clear()
        self._look()

    def chain(self) -> tuple[Config, ...]:
        """The configurations that are open: base..epoch, oldest first."""
        return self._open

    def at(self, epoch: int) -> Config:
        """Raises KeyError for an epoch that is not open."""
        return self._chain[epoch]

    def _look(self) -> None:
        """What follows from the chain, worked out once: it is asked for with every message."""
        self._open = tuple(c for e, c in sorted(self._chain.items()) if e >= self.config.base)
        self.lost = frozenset(n for c in self._open for n in c.lost)
        """Nodes of open epochs that the operator has declared lost."""
        self.participants = frozenset(n for c in self._open for n in c.nodes) - self.lost
        """All members of open epochs: whose messages about registers count."""
        self._settled = all(set(c.voters) == set(self.config.voters) for c in self._open)

    def is_settled(self) -> bool:
        """Whether every key has one era: all open configurations have the same voters."""
        return self._settled

    def place(self, key: str) -> Place:
        """All of it at once, looked up by what the chunks of an upload have in common.

        Raises ValueError for a malformed chunk key.
        """
        stem = key[:-INDEX_DIGITS] if key.startswith("chunk/") else key
        found = self._places.get(stem)
        if found is None:
            if len(self._places) >= 65536:
                self._places.clear()
            found = self._places[stem] = self._find_place(key)
        return found

    def _find_place(self, key: str) -> Place:
        eras, epoch = self.eras(key), key_epoch(key)
        leaders: tuple[NodeId, ...] = ()
        if key.startswith("chunk/"):
            video = key_subject(key)
            acceptors = group(self._chain.get(epoch, self.config), video)
            turn = _score(video, "leader") % len(acceptors) if acceptors else 0
            leaders = acceptors[turn:] + acceptors[:turn]
        everyone = tuple(dict.fromkeys(node for era in eras for node in era.group))
        return Place(epoch, eras, eras[0].group, eras[0].majority, everyone, leaders)

    def group(self, key: str) -> tuple[NodeId, ...]:
        """The acceptors of `key` in the newest epoch."""
        return self.place(key).group

    def eras(self, key: str) -> tuple[Era, ...]:
        """The eras of `key` in base..epoch, newest first. A -> B -> A is three eras (bug B16)."""
        subject = key_subject(key)
        found = self._eras.get(subject)
        if found is None:
            runs: list[tuple[int, tuple[NodeId, ...]]] = []
            for config in self._open:
                acceptors = group(config, subject)
                if not runs or runs[-1][1] != acceptors:
                    runs.append((config.epoch, acceptors))
            lost = self.lost
            found = tuple(
                Era(first, tuple(n for n in acceptors if n not in lost), len(acceptors))
                for first, acceptors in reversed(runs)
            )
            if len(self._eras) >= 65536:
                self._eras.clear()
            self._eras[subject] = found
        return found

    def serves(self, node: NodeId, key: str) -> bool:
        """Whether `node` is an acceptor of `key` in any live era."""
        return node in self.place(key).everyone

    def leader(self, key: str) -> NodeId | None:
        """The implicit leader of a chunk register, or None for keys that have none.

        A right to one fast create, and otherwise only a hint where to send a request first.
        CHUNKS_A_TURN neighbouring chunks share one, so that their creates share envelopes.
        """
        return self.place(key).leader(key)


def same_leader(key: str) -> str | tuple[str, int]:
    """Equal for keys that have the same leader and group in every configuration, because they are
    neighbouring chunks of one upload."""
    return (
        (key[:-INDEX_DIGITS], int(key[-INDEX_DIGITS:]) // CHUNKS_A_TURN) if key.startswith("chunk/") else key
    )


def leader(config: Config, key: str) -> NodeId | None:
    """As `View.leader`, with the configuration of the key's own epoch. None without members."""
    if not key.startswith("chunk/") or not config.voters:
        return None
    _, video, _, index = key.split("/")
    acceptors = group(config, video)
    return acceptors[(_score(video, "leader") + int(index) // CHUNKS_A_TURN) % len(acceptors)]
