"""Reading many registers at once: what a quorum says of a range of keys (CHUNKPAXOS, *Listing*).

Pure. Each acceptor gives a page of its records, in order of key; here the pages are laid over
each other. A key is settled where a majority of its group shares one ballot; every other key must
be read by itself. Ids are not known in advance, so an acceptor that is silent may be the only one
asked that knows of a key: the listing is complete only if too few are silent to hide a majority.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import NamedTuple

from vstack.mesh.config import NodeId, View, key_subject
from vstack.mesh.messages import ABSENT, ZERO, Ballot, ScanReply, Value

LISTING_BYTES = 128 * 1024
"""Bytes of register data in one page of a listing."""
VIDEO_ID = 64
"""Hex digits of a video's id."""


class Merged(NamedTuple):
    rows: dict[str, Value]
    """Settled registers by key."""
    unsettled: list[str]
    """Keys that need a read of their own."""
    after: str
    """Keys above this were not covered; empty if everything was."""
    complete: bool


def askers(view: View, prefix: str) -> tuple[NodeId, ...]:
    """The acceptors that a listing of `prefix` has to ask."""
    if _of_one_video(prefix):  # one group
        return tuple(dict.fromkeys(n for era in view.eras(prefix) for n in era.group))
    return tuple(dict.fromkeys(n for config in view.chain() for n in config.voters if n not in view.lost))


def _of_one_video(prefix: str) -> bool:
    """Whether all keys below `prefix` have one subject: not so while the video id is cut short."""
    return len(key_subject(prefix)) == VIDEO_ID


def merge(view: View, prefix: str, replies: Mapping[NodeId, ScanReply], limit: int) -> Merged:
    """Lays the pages over each other. Replies of another epoch than the view's do not count."""
    pages = {n: r for n, r in replies.items() if r.epoch == view.epoch}
    bounds = [r.rows[-1].key for r in pages.values() if r.more and r.rows]
    bound = min(bounds, default="")
    seen: dict[str, dict[NodeId, tuple[Ballot, Value]]] = {}
    for node, page in pages.items():
        for row in page.rows:
            if not bound or row.key <= bound:
                seen.setdefault(row.key, {})[node] = (row.accepted, row.value)
    rows: dict[str, Value] = {}
    unsettled: list[str] = []
    size = 0
    after = bound
    keys = sorted(seen)
    for position, key in enumerate(keys):
        if position == limit or size > LISTING_BYTES:
            after = keys[position - 1]
            break
        value = _settled(view, key, {n: seen[key].get(n, (ZERO, ABSENT)) for n in pages})
        if value is None:
            unsettled.append(key)
            size += 4096
        else:
            rows[key] = value
            size += 100 + len(value.data or b"")
    return Merged(rows, unsettled, after, complete(view, prefix, replies))


def _settled(view: View, key: str, said: Mapping[NodeId, tuple[Ballot, Value]]) -> Value | None:
    eras = view.eras(key)
    newest = eras[0]
    ballots = [said[n] for n in newest.group if n in said]
    for ballot, value in ballots:
        same = sum(b == ballot for b, _ in ballots)
        if same >= newest.majority and (len(eras) == 1 or ballot.epoch >= newest.first):
            return value
    return None


def complete(view: View, prefix: str, replies: Mapping[NodeId, ScanReply]) -> bool:
    """Whether these replies are enough. Replies of another epoch than the view's do not count."""
    return suffice(view, prefix, {n for n, r in replies.items() if r.epoch == view.epoch})


def suffice(view: View, prefix: str, here: Set[NodeId]) -> bool:
    """Whether the pages of these nodes are enough: too few acceptors are missing to hide a majority."""
    if _of_one_video(prefix):
        return all(len(here & set(era.group)) >= era.majority for era in view.eras(prefix))
    for config in view.chain():
        lost = view.lost & set(config.voters)
        silent = set(config.voters) - lost - here
        if len(silent) > max(0, (config.g - 1) // 2 - len(lost)):
            return False
    return True
