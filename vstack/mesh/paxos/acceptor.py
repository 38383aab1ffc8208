"""One node's votes (CHUNKPAXOS, section 3).

The acceptor decides, for each message about a register, whether to promise, to accept, or to
refuse, and what its record becomes. It touches no disk: changed records gather in `dirty`, and
the caller commits them before any reply of the same batch leaves, reads included, because a
value that was seen and then lost is a lost write.

Invariants: promised and accepted never go down (I1); accepted <= promised (I2); no record for a
key outside the groups of base..epoch (I7); a fresh accept only on an absent record, at round 0,
by the key's implicit leader, in the key's own epoch (I8).

It never answers for a record that it cannot read: a damaged record is unavailable, which is
neither absent nor a refusal.
"""

from __future__ import annotations

from collections.abc import Callable

from vstack.errors import DamagedData
from vstack.mesh.config import CHUNKS_A_TURN, CONFIG_KEY, NodeId, View, key_epoch
from vstack.mesh.messages import (
    EMPTY,
    Accept,
    Accepted,
    Ballot,
    Created,
    Creates,
    Nack,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Record,
    Reply,
    Request,
)

Lookup = Callable[[str], Record | None]
"""What is on disk for a key; None if absent. Raises DamagedData if it cannot be read."""
AnyBetween = Callable[[str, str], bool]
"""Whether any record may be on disk with a key from the first to the last, both included. May raise
DamagedData."""


class Acceptor:
    """Pure: the caller makes `dirty` durable before it sends a reply."""

    def __init__(
        self,
        me: NodeId,
        view: View,
        lookup: Lookup,
        any_between: AnyBetween = lambda first, last: True,
    ) -> None:
        """Without `any_between`, each register is looked up by itself."""
        self.me = me
        self.view = view
        self._lookup = lookup
        self._any_between = any_between
        self.dirty: dict[str, Record] = {}
        """Records changed since the last commit. The caller empties it with `committed`."""
        self.epoch_wanted = 0
        """The highest epoch heard of that `view` does not hold; the caller fetches the chain."""
        self.journal: list[Accept] | None = None
        """If a list: every Accept that is answered Accepted is appended; the caller empties it."""
        self.damaged = 0
        """Requests that met a damaged record and got no answer."""

    def record(self, key: str) -> Record:
        """The current record, committed or not; EMPTY if absent. Raises DamagedData."""
        found = self.dirty.get(key)
        if found is None:
            found = self._lookup(key)
        return EMPTY if found is None else found

    def committed(self) -> None:
        """The caller has made everything in `dirty` durable."""
        self.dirty.clear()

    def receive(self, m: Request) -> Reply | None:
        """The reply, to be sent after the next commit; None if the message gets none."""
        try:
            if m.key.startswith(CONFIG_KEY):
                if not isinstance(m, Read) and m.ballot.epoch:
                    return None  # configurations are decided outside the epochs: nobody means this
            else:
                now = self.view.epoch
                epoch = m.epoch if isinstance(m, Read) else m.ballot.epoch
                if epoch > now:
                    self.epoch_wanted = max(self.epoch_wanted, epoch)
                    return None
                place = self.view.place(m.key)
                if self.me not in place.everyone:
                    return self._outside(m) if epoch < now else None
                if isinstance(m, Read):
                    if epoch < place.epoch:
                        return None  # nothing exists about a key before the epoch that named it
                elif epoch < max(place.epoch, now):
                    return self._nack(m.key, m.ballot, self.record(m.key))
            if isinstance(m, Prepare):
                return self.on_prepare(m)
            if isinstance(m, Accept):
                return self.on_accept(m)
            return self.on_read(m)
        except DamagedData:
            self.damaged += 1
            return None

    def _outside(self, m: Request) -> Reply:
        """To somebody who does not know yet that this node is in no group of the key any more."""
        if isinstance(m, Read):
            return ReadReply(m.key, m.token, self.view.epoch, EMPTY.accepted, EMPTY.value)
        return self._nack(m.key, m.ballot, EMPTY)

    def on_prepare(self, m: Prepare) -> Reply:
        record = self.record(m.key)
        floor = max(record.promised, record.accepted)
        if m.ballot == record.promised > record.accepted:  # a duplicate must not end its own attempt
            return Promise(m.key, m.ballot, record.accepted, record.value)
        if m.ballot <= floor or m.ballot.round == 0:
            return self._nack(m.key, m.ballot, record)
        self._write(m.key, record, Record(m.ballot, record.accepted, record.value))
        return Promise(m.key, m.ballot, record.accepted, record.value)

    def on_accept(self, m: Accept) -> Reply:
        record = self.record(m.key)
        same = m.ballot == record.accepted
        if m.fresh != (m.ballot.round == 0) or (m.fresh and not self._may_create(m)):
            return self._nack(m.key, m.ballot, record)
        if m.fresh and record != EMPTY and not (same and m.value == record.value):
            return self._nack(m.key, m.ballot, record)
        if same and m.value != record.value:  # somebody used one ballot twice
            return self._nack(m.key, m.ballot, record)
        if not same and m.ballot < max(record.promised, record.accepted):
            return self._nack(m.key, m.ballot, record)
        if not same:  # else it is a retransmission
            self._write(m.key, record, Record(m.ballot, m.ballot, m.value))
        if self.journal is not None:
            self.journal.append(m)
        return Accepted(m.key, m.ballot)

    def on_read(self, m: Read) -> Reply:
        """The reply names this node's epoch: a reader of an older one learns of it and starts again."""
        record = self.record(m.key)
        return ReadReply(m.key, m.token, self.view.epoch, record.accepted, record.value)

    def on_creates(self, m: Creates) -> list[Reply | Created]:
        """As `receive` of each of its Accepts, in order; one reply where all of them are accepted."""
        created = self.create_all(m)
        if created is not None:
            return [created]
        return [reply for accept in m.accepts() if (reply := self.receive(accept)) is not None]

    def create_all(self, m: Creates) -> Created | None:
        """Accepts all of them if each would be accepted on an absent record; otherwise changes nothing."""
        keys = m.keys()
        if not self._may_create_all(m) or not self._all_absent(keys):
            return None
        ballot = m.ballot
        self.dirty.update(
            {key: Record(ballot, ballot, value) for key, value in zip(keys, m.values, strict=True)}
        )
        if self.journal is not None:
            self.journal += m.accepts()
        return Created(m.stem, ballot, m.indexes)

    def _may_create_all(self, m: Creates) -> bool:
        """What `receive`, `on_accept` and `_may_create` ask of each of its Accepts."""
        place, ballot = self.view.place(m.key), m.ballot
        turns = {i // CHUNKS_A_TURN for i in m.indexes}
        return (
            ballot.epoch == self.view.epoch == place.epoch
            and ballot.round == 0
            and self.me in place.everyone
            and all(ballot.node == place.leader_of_turn(turn) for turn in turns)
        )

    def _all_absent(self, keys: list[str]) -> bool:
        """`keys` in order."""
        try:
            return self.dirty.keys().isdisjoint(keys) and not self._any_between(keys[0], keys[-1])
        except DamagedData:
            return False

    def _may_create(self, m: Accept) -> bool:
        place = self.view.place(m.key)
        return m.ballot.epoch == place.epoch and m.ballot.node == place.leader(m.key)

    def _nack(self, key: str, ballot: Ballot, record: Record) -> Nack:
        epoch = self.view.epoch if key.startswith(CONFIG_KEY) else max(self.view.epoch, key_epoch(key))
        return Nack(key, ballot, max(record.promised, record.accepted), epoch)

    def _write(self, key: str, old: Record, new: Record) -> None:
        assert new.promised >= old.promised, "I1: a promise never goes down"
        assert new.accepted >= old.accepted, "I1: what is accepted never goes down"
        assert new.accepted <= new.promised, "I2"
        self.dirty[key] = new
