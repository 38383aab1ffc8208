"""A change of the index: which record of a key holds, which tombstones still matter, and the figures.

It decides which of two records of a key holds (the one with the higher sequence number; of two copies of
one record the one in the higher superblock), which tombstones still matter (see `rows`), and keeps the
figures of each superblock in step with the rows: all of a change is one atomic write batch.
"""

from __future__ import annotations

from rocksdict import WriteBatch

from vstack.node.index import Index, IndexWriteFailed
from vstack.node.rows import PieceRow, SuperblockState, TombstoneRow
from vstack.node.superblock import Kind, Record, record_size


class Update:
    """A change of the index, prepared in memory: all of it is applied by `commit`, or nothing.

    Rows and figures change together, so that the figures are exact at every moment.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._states = dict(index.superblocks)
        self._quarantined = index.quarantined
        self._found_damaged = 0
        self._changed: set[int] = set()
        self._rows: dict[bytes, PieceRow | TombstoneRow | None] = {}
        """The only row of each key that was looked at, quarantined ones included."""
        self._before: dict[bytes, bytes] = {}
        """Under which prefix the row of a key lies now."""
        self._touched: set[bytes] = set()
        self._unknown: set[int] | None = None
        """Superblocks that hold something unknown, once somebody has asked."""

    def open_superblock(self, number: int, state: SuperblockState) -> None:
        """The first that the index hears of a superblock."""
        self._set(number, state)

    def add(self, number: int, offset: int, record: Record) -> bool:
        """A record that is on disk. False if it is not the latest of its key, and is therefore dead."""
        kind, key, sequence = record.kind, record.key, record.sequence
        if kind == Kind.HINTS:
            state = self._states[number]
            self._set(number, state._replace(hint_bytes=state.hint_bytes + record.size))
        if kind not in (Kind.DATA, Kind.TOMBSTONE):
            return False
        held = self._row(key)
        older: tuple[int, ...] = ()
        if held is not None:
            if (held.sequence, held.superblock) >= (sequence, number):
                if kind == Kind.DATA:
                    self._put(key, held._replace(older=self._on_disk((*held.older, number))))
                return False
            buried = (held.superblock,) if isinstance(held, PieceRow) else ()
            older = self._on_disk((*held.older, *buried))
            self._forget(key, held)
        if kind == Kind.DATA:
            self._put(
                key,
                PieceRow(
                    number,
                    offset,
                    sequence,
                    record.chunk_length,
                    record.length,
                    record.k,
                    record.m,
                    record.sha256,
                    older,
                ),
            )
            self._count(number, 1, 0, record.length)
        else:
            self._put(key, TombstoneRow(number, offset, sequence, older))
            self._count(number, 0, 1, 0)
        return True

    def quarantine(self, key: bytes, row: PieceRow) -> None:
        """The piece is damaged, and not served any more, if it still lies where `row` says."""
        if self._row(key) != row or key in self._quarantined:
            return
        self._forget(key, row)
        self._quarantined = {**self._quarantined, key: row}
        self._put(key, row)
        self._found_damaged += 1

    def drop_if_useless(self, key: bytes) -> None:
        """Drops the tombstone of the key, if there is one and it no longer matters."""
        row = self._row(key)
        if isinstance(row, TombstoneRow) and not self.tombstone_matters(row):
            self._forget(key, row)
            self._put(key, None)

    def tombstone_matters(self, row: TombstoneRow, without: int | None = None) -> bool:
        """Whether it keeps a piece from coming back; `without` a superblock as if that were gone."""
        if any(number in self._states and number != without for number in row.older):
            return True
        if self._unknown is None:
            self._unknown = {number for number, state in self._states.items() if state.holds_unknown}
        return bool(self._unknown - {without})

    def damaged(self, number: int) -> None:
        """One more damaged record in the superblock."""
        state = self._states[number]
        self._set(number, state._replace(damaged=state.damaged + 1))

    def advance(self, number: int, watermark: int) -> None:
        """Everything below `watermark` is accounted for."""
        self._set(number, self._states[number]._replace(watermark=watermark))

    def seal(self, number: int, *, retired: bool = False) -> None:
        self._set(number, self._states[number]._replace(sealed=True, retired=retired))

    def doom(self, number: int) -> None:
        """No row points to the superblock any more, or only those of tombstones that go with it."""
        self._set(number, self._states[number]._replace(doomed=True))

    def remove_superblock(self, number: int) -> None:
        """The superblock is unlinked, durably. Tombstones that this frees: see `drop_if_useless`."""
        del self._states[number]
        self._changed.add(number)
        self._unknown = None

    def commit(self, next_sequence: int, *, sync: bool = False) -> None:
        """Writes the change; with `sync`, durably. Raises IndexWriteFailed, and nothing has changed."""
        batch = WriteBatch(raw_mode=True)
        batch[b"n"] = next_sequence.to_bytes(8, "big")
        for number in self._changed:
            if number in self._states:
                batch[b"s" + number.to_bytes(8, "big")] = self._states[number].pack()
            else:
                del batch[b"s" + number.to_bytes(8, "big")]
        for key in self._touched:
            row = self._rows[key]
            prefix = None if row is None else self._prefix(key, row)
            before = self._before.get(key)
            if before is not None and before != prefix:
                del batch[before + key]
            if row is not None and prefix is not None:
                batch[prefix + key] = row.pack()
        states = self._index.superblocks
        self._index.superblocks = self._states  # first: whoever sees a row may look its superblock up
        try:
            self._index.write(batch, sync=sync)
        except IndexWriteFailed:
            self._index.superblocks = states
            raise
        self._index.quarantined = self._quarantined
        self._index.found_damaged += self._found_damaged
        self._index.next_sequence = next_sequence

    def _row(self, key: bytes) -> PieceRow | TombstoneRow | None:
        if key not in self._rows:
            row: PieceRow | TombstoneRow | None = None
            if self._index.may_know(key):
                row = self._index.piece(key) or self._quarantined.get(key) or self._index.tombstone(key)
            self._rows[key] = row
            if row is not None:
                self._before[key] = self._prefix(key, row)
        return self._rows[key]

    def _put(self, key: bytes, row: PieceRow | TombstoneRow | None) -> None:
        self._rows[key] = row
        self._touched.add(key)
        self._index.saw(key)
        if key in self._quarantined and isinstance(row, PieceRow):
            self._quarantined = {**self._quarantined, key: row}

    def _prefix(self, key: bytes, row: PieceRow | TombstoneRow) -> bytes:
        if isinstance(row, TombstoneRow):
            return b"t"
        return b"q" if key in self._quarantined else b"p"

    def _forget(self, key: bytes, row: PieceRow | TombstoneRow) -> None:
        """Takes the key's row out of the figures, or out of quarantine."""
        if isinstance(row, TombstoneRow):
            self._count(row.superblock, 0, -1, 0)
        elif key in self._quarantined:
            self._quarantined = {k: r for k, r in self._quarantined.items() if k != key}
        else:
            self._count(row.superblock, -1, 0, row.length)

    def _on_disk(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Those that are superblocks still, each once."""
        return tuple(sorted({n for n in numbers if n in self._states})) if numbers else ()

    def _set(self, number: int, state: SuperblockState) -> None:
        self._states[number] = state
        self._changed.add(number)
        self._unknown = None

    def _count(self, number: int, pieces: int, tombstones: int, length: int) -> None:
        """Adds to (1) or takes from (-1) the live figures of a superblock one piece or one tombstone."""
        state = self._states.get(number)
        if state is None:  # the row outlived its superblock
            return
        sign = pieces + tombstones
        self._set(
            number,
            state._replace(
                pieces=state.pieces + pieces,
                payload_bytes=state.payload_bytes + sign * length,
                tombstones=state.tombstones + tombstones,
                live_bytes=state.live_bytes + sign * record_size(length),
            ),
        )
