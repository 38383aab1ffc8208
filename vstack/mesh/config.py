"""Who the mesh is: configurations, acceptor groups, eras, implicit leaders.

Pure and integers only: two nodes with the same configuration compute the same groups, on any
machine (CHUNKPAXOS, section 1; bug B19 is what happens when weights or gossip leak in here).
A configuration is immutable once decided. The mesh id is the hash of the first one.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import msgspec

NodeId = str
"""32 hex digits, random, minted inside the vote store."""

HASH_VERSION = 1

CONFIG_KEY = "config/"
"""Keys below this prefix decide configurations. They live outside the epoch fence."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One node of a configuration."""

    node: NodeId
    address: str
    """host:port of its control lane, as others dial it; the data lane is the next port."""
    zone: str = ""
    weight: int = 1
    """Share of the pieces, by capacity. Never used for acceptor groups."""


class Config(msgspec.Struct, frozen=True):
    """One configuration of the mesh: immutable once decided."""

    epoch: int
    members: tuple[Member, ...]
    base: int
    """The oldest epoch whose groups may still hold undecided or unmigrated values; base <= epoch."""
    hash_version: int = HASH_VERSION

    @property
    def g(self) -> int:
        """Acceptors per register: all members up to 3, 3 for four, 5 from five members on."""
        n = len(self.members)
        return n if n <= 3 else 3 if n == 4 else 5

    def member(self, node: NodeId) -> Member | None:
        return next((m for m in self.members if m.node == node), None)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(m.node for m in self.members)


GENESIS = Config(epoch=0, members=(), base=0)
"""Before the first configuration: nobody is a member, nobody votes, except on `config/1`."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Config).decode


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
    """The acceptors of every key of `subject`: the first g members by rendezvous hash, unweighted."""
    ranked = sorted(config.nodes, key=lambda node: (_score(subject, node), node), reverse=True)
    return tuple(ranked[: config.g])


class Era(NamedTuple):
    """A maximal run of consecutive epochs in which a key has the same group."""

    first: int
    group: tuple[NodeId, ...]

    @property
    def majority(self) -> int:
        return len(self.group) // 2 + 1


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
        self._eras.clear()

    def chain(self) -> tuple[Config, ...]:
        return tuple(self._chain[e] for e in sorted(self._chain))

    def at(self, epoch: int) -> Config:
        """Raises KeyError for an epoch that this view does not hold."""
        return self._chain[epoch]

    def group(self, key: str) -> tuple[NodeId, ...]:
        return group(self.config, key_subject(key))

    def eras(self, key: str) -> tuple[Era, ...]:
        """The eras of `key` in base..epoch, newest first. A -> B -> A is three eras (bug B16)."""
        subject = key_subject(key)
        found = self._eras.get(subject)
        if found is None:
            eras: list[Era] = []
            for epoch in range(self.base, self.epoch + 1):
                acceptors = group(self._chain[epoch], subject)
                if not eras or eras[-1].group != acceptors:
                    eras.append(Era(epoch, acceptors))
            found = tuple(reversed(eras))
            if len(self._eras) >= 65536:
                self._eras.clear()
            self._eras[subject] = found
        return found

    def serves(self, node: NodeId, key: str) -> bool:
        """Whether `node` is an acceptor of `key` in any live era."""
        return any(node in era.group for era in self.eras(key))

    def leader(self, key: str) -> NodeId | None:
        """The implicit leader of a chunk register, or None for keys that have none.

        A right to one fast create, and otherwise only a hint where to send a request first.
        128 neighbouring chunks share one, so that their creates share envelopes.
        """
        return leader(self._chain.get(key_epoch(key), self.config), key)


def leader(config: Config, key: str) -> NodeId | None:
    """As `View.leader`, with the configuration of the key's own epoch. None without members."""
    if not key.startswith("chunk/") or not config.members:
        return None
    _, video, _, index = key.split("/")
    acceptors = group(config, video)
    return acceptors[(_score(video, "leader") + int(index) // 128) % len(acceptors)]
