"""The pieces of one node, as its chunk store would hold them."""

from __future__ import annotations

import builtins
import hashlib
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vstack.errors import DamagedData
from vstack.mesh.registers import PieceKey, Scheme
from vstack.node.pieces import PieceInfo, PieceNotFound


@dataclass
class Stored:
    """One piece. What it was stored as, and what lies there."""

    info: PieceInfo
    payload: bytes
    verified: float
    """When it was last written or read whole, as the node remembers; -inf after a restart."""

    @property
    def good(self) -> bool:
        return hashlib.sha256(self.payload).digest() == self.info.sha256


class Disk:
    """Survives the node's process. What fails is the world's doing."""

    def __init__(self, now: Callable[[], float], on_delete: Callable[[PieceKey], None]) -> None:
        """`on_delete` is told of each piece just before the node itself deletes it."""
        self._now = now
        self._on_delete = on_delete
        self._sequence = 0
        self._order: builtins.list[bytes] = []
        self.pieces: dict[bytes, Stored] = {}
        """By packed key."""
        self.quarantine: dict[bytes, Stored] = {}
        """Found damaged, and not served."""
        self.full = False

    # -- what the product asks of a store ---------------------------------------------------------

    def list(self, prefix: bytes = b"", after: bytes = b"", limit: int = 1000) -> builtins.list[PieceInfo]:
        assert prefix == b""
        first = bisect_right(self._order, after)
        return [self.pieces[raw].info for raw in self._order[first : first + limit]]

    def delete(self, keys: Iterable[PieceKey]) -> None:
        for key in keys:
            raw = key.pack()
            if raw in self.pieces:
                self._on_delete(key)
                self.remove(key)
            elif raw in self.quarantine:
                self._on_delete(key)
                del self.quarantine[raw]

    def quarantined(self) -> builtins.list[PieceInfo]:
        return [stored.info for _, stored in sorted(self.quarantine.items())]

    def verify(self, key: PieceKey) -> PieceInfo:
        raw = key.pack()
        stored = self.pieces.get(raw)
        if stored is None:
            raise DamagedData("in quarantine") if raw in self.quarantine else PieceNotFound("not here")
        if not stored.good:
            self.remove(key)
            self.quarantine[raw] = stored
            raise DamagedData("its payload does not have its hash")
        stored.verified = self._now()
        return stored.info

    # -- what a node does for others --------------------------------------------------------------

    def put(self, key: PieceKey, scheme: Scheme, chunk_length: int, sha256: bytes, payload: bytes) -> None:
        raw = key.pack()
        if raw in self.pieces:
            return
        self._sequence += 1
        info = PieceInfo(
            key, scheme.k, scheme.m, chunk_length, len(payload), sha256, self._sequence
        )  # fmt: skip
        self.quarantine.pop(raw, None)
        self.pieces[raw] = Stored(info, payload, self._now())
        insort(self._order, raw)

    def get(self, key: PieceKey) -> Stored | None:
        return self.pieces.get(key.pack())

    def state(self, key: PieceKey, within: float | None) -> tuple[str, bytes]:
        """As in an inventory. `within`: read it, unless that was done in the last so many seconds."""
        raw = key.pack()
        stored = self.pieces.get(raw)
        if stored is not None and within is not None and not stored.verified > self._now() - within:
            try:
                self.verify(key)
            except DamagedData:
                stored = None
        if stored is not None:
            return "present", stored.info.sha256
        bad = self.quarantine.get(raw)
        return ("absent", b"") if bad is None else ("quarantined", bad.info.sha256)

    # -- what befalls it --------------------------------------------------------------------------

    def remove(self, key: PieceKey) -> None:
        raw = key.pack()
        del self.pieces[raw]
        del self._order[bisect_right(self._order, raw) - 1]

    def rot(self, key: PieceKey) -> None:
        """The piece is not what it was, and nobody knows."""
        stored = self.pieces[key.pack()]
        stored.payload = bytes([stored.payload[0] ^ 1]) + stored.payload[1:]

    def scrub(self) -> None:
        """Reads all pieces; damaged ones are in quarantine then."""
        for stored in list(self.pieces.values()):
            try:
                self.verify(stored.info.key)
            except DamagedData:
                continue

    def forget(self) -> None:
        """The process ended: what it had verified is not known any more."""
        for stored in self.pieces.values():
            stored.verified = float("-inf")
