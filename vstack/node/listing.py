"""A node's part in listings: ask the acceptors for their pages, lay them over each other, read the rest.

No sockets and no clock: the server hands in requests, pages and outcomes, and sends what is in
`to_send` and `done`. How pages are merged is `paxos.ranges`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from vstack.errors import VstackError
from vstack.mesh.config import NodeId, View
from vstack.mesh.messages import Found, List, Listing, Op, Outcome, Row, Scan, ScanReply, Value
from vstack.mesh.paxos.proposer import Proposer
from vstack.mesh.paxos.ranges import Merged, askers, complete, merge, suffice
from vstack.mesh.transport import Incoming, Session

log = logging.getLogger(__name__)

LAST_PAGES = 0.005, 0.05
"""Seconds, at least and at most, for which the remaining pages are waited for once those that have come are
enough: as long as those took. A node that has just died is not known to be down yet, and its page never
comes."""


@dataclass(slots=True, eq=False)
class Gather:
    """One listing under way."""

    request: Incoming
    wanted: List
    waiting: set[NodeId]
    """Acceptors whose page has not come."""
    unasked: set[NodeId]
    """Those of them that have not been met yet: they are asked when they are."""
    began: float
    pages_until: float
    reads_until: float
    correlation: bytes
    replies: dict[NodeId, ScanReply] = field(default_factory=dict)
    merged: Merged | None = None
    unread: set[str] = field(default_factory=set)
    unreadable: bool = False


class Listings:
    """All listings that clients have asked this node for. A third of a request's time is for the pages,
    a third for the reads, and the rest for the way back."""

    def __init__(
        self,
        me: NodeId,
        view: View,
        proposer: Proposer,
        scan: Callable[[Scan], ScanReply],
        is_live: Callable[[NodeId], bool],
        is_met: Callable[[NodeId], bool],
    ) -> None:
        """`scan` gives the own page; it raises VstackError if a record cannot be read. `is_live` says
        whether it is worth asking a node, `is_met` whether it has answered since this one started."""
        self._me = me
        self._view = view
        self._proposer = proposer
        self._scan = scan
        self._is_live = is_live
        self._is_met = is_met
        self._gathers: dict[bytes, Gather] = {}
        self._numbers = count(1)
        self.to_send: list[tuple[NodeId, Scan, bytes, int]] = []
        """Requests for pages: node, message, correlation, budget in ms. The caller empties it."""
        self.done: list[tuple[Incoming, Listing]] = []
        """Finished listings. The caller empties it."""

    def start(self, request: Incoming, wanted: List, now: float) -> None:
        """Begins a listing. Nodes that are down are not waited for; those that have just not answered this
        node yet, which has started, are if it takes them to be complete."""
        third = max(0.1, (request.deadline - now) / 3)
        all_ = askers(self._view, wanted.prefix)
        asked = {n for n in all_ if n == self._me or self._is_live(n)}
        if not suffice(self._view, wanted.prefix, asked):
            asked |= {n for n in all_ if not self._is_met(n)}
        gather = Gather(
            request,
            wanted,
            waiting=asked,
            unasked=asked - {self._me},
            began=now,
            pages_until=now + third,
            reads_until=now + 2 * third,
            correlation=next(self._numbers).to_bytes(8),
        )
        self._gathers[gather.correlation] = gather
        self._ask(gather, now)
        if self._me in asked:
            try:
                self.on_page(self._me, gather.correlation, self._scan(self._question(gather)), now)
            except VstackError as e:
                log.error("%s", e)
                gather.waiting.discard(self._me)
        self._merge_if_all_came(gather, now)

    def _ask(self, gather: Gather, now: float) -> None:
        """Asks those that have not been asked and are not down."""
        scan, budget = self._question(gather), int((gather.pages_until - now) * 1000)
        for node in sorted(n for n in gather.unasked if self._is_live(n)):
            self.to_send.append((node, scan, gather.correlation, budget))
            gather.unasked.discard(node)

    def _question(self, gather: Gather) -> Scan:
        wanted = gather.wanted
        return Scan(wanted.prefix, wanted.after, wanted.limit, self._view.epoch)

    def of(self, session: Session) -> int:
        """How many listings a connection has under way."""
        return sum(g.request.session is session for g in self._gathers.values())

    def on_page(self, node: NodeId, correlation: bytes, page: ScanReply, now: float) -> None:
        """An acceptor's page."""
        gather = self._gathers.get(correlation)
        if gather is not None and gather.merged is None:
            gather.replies[node] = page
            gather.waiting.discard(node)
            if complete(self._view, gather.wanted.prefix, gather.replies):
                least, most = LAST_PAGES
                gather.pages_until = min(gather.pages_until, now + min(most, max(least, now - gather.began)))
            self._merge_if_all_came(gather, now)

    def next_wake(self) -> float | None:
        """When `tick` may have something to do."""
        return min((g.pages_until for g in self._gathers.values() if g.merged is None), default=None)

    def on_read(self, gather: Gather, key: str, outcome: Outcome) -> None:
        """What became of a read that a listing needed."""
        assert gather.merged is not None
        gather.unread.discard(key)
        if isinstance(outcome, Found):
            gather.merged.rows[key] = Value(outcome.version, outcome.data)
        else:
            gather.unreadable = True
        self._finish_if_read(gather)

    def tick(self, now: float) -> None:
        """Asks nodes that are met, and stops waiting for pages that do not come."""
        for gather in [g for g in self._gathers.values() if g.merged is None]:
            if gather.pages_until <= now:
                self._merge(gather, now)
            elif gather.unasked:
                self._ask(gather, now)

    def _merge_if_all_came(self, gather: Gather, now: float) -> None:
        if gather.merged is None and not gather.waiting:
            self._merge(gather, now)

    def _merge(self, gather: Gather, now: float) -> None:
        wanted = gather.wanted
        gather.merged = merge(self._view, wanted.prefix, gather.replies, wanted.limit)
        gather.unread = set(gather.merged.unsettled)
        for key in gather.merged.unsettled:
            op = Op(os.urandom(16), key, self._view.epoch)
            self._proposer.submit(op, now, gather.reads_until, (gather, key))
        self._finish_if_read(gather)

    def _finish_if_read(self, gather: Gather) -> None:
        merged = gather.merged
        if merged is None or gather.unread:
            return
        self._gathers.pop(gather.correlation, None)
        rows = tuple(Row(k, v.version, v.data) for k, v in sorted(merged.rows.items()) if v.data is not None)
        silent = set(askers(self._view, gather.wanted.prefix)) - set(gather.replies)
        complete = merged.complete and not gather.unreadable
        listing = Listing(rows, merged.after, complete, tuple(sorted(silent)))
        self.done.append((gather.request, listing))
