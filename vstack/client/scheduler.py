"""Which block of which chunk is asked of which node, and when: decided here, done elsewhere.

Pure: no sockets and no clock; times are monotonic seconds and come as arguments. The caller says
what it wants (`want`), asks what to request now (`requests`), and reports what became of each
request (`received`, `failed`). What is complete appears in `finished`, and what cannot be had from
the places that were named appears in `stuck`.

The unit of work is a block: a range of one piece, small enough that binding is late and a slow
node holds up little. `BestHolder` gives each block to the holder that would finish it first by what
was measured so far; a node that is silent for SILENCE seconds, or whose connection breaks, loses
its blocks to the next best, and is left alone for a while. Any k pieces of a chunk do: whole
copies are k = 1, with several holders of one piece.

It never gives up by itself: when all holders fail it goes on trying them, in turns, every RETRY
seconds. A block that a silent node still owes is not asked of it a second time: a slow node would
drown in repetitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol

from vstack.mesh.config import NodeId
from vstack.mesh.messages import MAX_RANGE

SILENCE = 1.5
"""Seconds without a byte from a node that owes us some, after which it counts as failed."""
PRIOR_RATE = 2e6
"""Bytes a second that an unknown node is expected to give."""
PRIOR_RTT = 0.02
FORGET = 30.0
"""Seconds after which an estimate is not believed any more."""
MIN_BLOCK, MAX_BLOCK = 64 << 10, MAX_RANGE
MIN_SAMPLE = 16 << 10
HALF_LIFE = 0.5
"""Seconds of service after which an old measurement weighs half."""
SUSPICION = 2.0
"""Seconds by which a node that failed last time counts as slower, until it answers again."""
RETRY = 0.5
"""Seconds for which a failed node is left alone although nobody else has what it has."""
TIE = 0.02
"""Seconds within which two holders count as equally fast."""


class PieceWanted(NamedTuple):
    length: int
    holders: tuple[NodeId, ...]


@dataclass(frozen=True)
class Wanted:
    """One chunk: any `k` of its `pieces` (by number), by `deadline`."""

    index: int
    deadline: float
    k: int
    pieces: Mapping[int, PieceWanted]


class Fetch(NamedTuple):
    """One request to be made now."""

    number: int
    node: NodeId
    chunk: int
    piece: int
    offset: int
    length: int


class Scheduler(Protocol):
    """What every policy offers. Numbers in `received` and `failed` are those of `Fetch`."""

    finished: list[tuple[int, tuple[int, ...]]]
    """Chunks that are complete, with the pieces that are. The caller empties it."""
    stuck: list[int]
    """Chunks of which fewer than k pieces have a holder left. The caller empties it."""

    def want(self, wanted: Wanted) -> None: ...
    def forget(self, index: int) -> None: ...
    def requests(self, now: float) -> list[Fetch]: ...
    def received(self, number: int, now: float) -> bool: ...
    def failed(self, number: int, now: float, *, gone: bool) -> None: ...
    def reject(self, index: int, piece: int, node: NodeId | None) -> None: ...
    def next_wake(self) -> float | None: ...


@dataclass(slots=True)
class Estimate:
    """What was measured of a node; outlives the schedulers that measured it."""

    rate: float = 0.0
    """Bytes a second, smoothed; 0 if never measured. `bytes` / `busy` seconds, of late."""
    bytes: float = 0.0
    busy: float = 0.0
    rtt: float = PRIOR_RTT
    measured: float = -1e9


@dataclass(slots=True)
class _Node:
    estimate: Estimate = field(default_factory=Estimate)
    last_byte: float = -1e9
    free_at: float = -1e9
    """When its last answer arrived: service begins there at the earliest."""
    owed: int = 0
    requests: dict[int, float] = field(default_factory=dict)
    failures: int = 0
    failed_at: float = -1e9
    closed_until: float = -1e9


@dataclass(slots=True)
class _Block:
    offset: int
    length: int
    got: bool = False
    asked: set[int] = field(default_factory=set)
    late: set[NodeId] = field(default_factory=set)
    """Nodes that lost it by their silence, and may still send it."""


@dataclass(slots=True)
class _Piece:
    length: int
    holders: list[NodeId]
    blocks: list[_Block] = field(default_factory=list)
    apart: bool = False
    """To come from one holder alone, so that it shows whose is damaged."""
    only: NodeId | None = None
    """That holder."""

    @property
    def complete(self) -> bool:
        return not self.length or (bool(self.blocks) and all(b.got for b in self.blocks))


@dataclass(slots=True)
class _Chunk:
    wanted: Wanted
    pieces: dict[int, _Piece]
    stuck: bool = False
    finished: bool = False

    @property
    def complete(self) -> tuple[int, ...]:
        """k complete pieces, or as many as there are."""
        return tuple(sorted(n for n, p in self.pieces.items() if p.complete))[: self.wanted.k]


@dataclass(slots=True)
class _Request:
    fetch: Fetch
    sent: float
    block: _Block
    lost: bool = False
    """Its node failed meanwhile, and the block was given back."""


class BestHolder:
    """The best known holder, then the next."""

    def __init__(self, estimates: dict[NodeId, Estimate] | None = None) -> None:
        """`estimates` is what is known of nodes from before, and takes what is learned of them."""
        self.finished: list[tuple[int, tuple[int, ...]]] = []
        self.stuck: list[int] = []
        self._estimates = {} if estimates is None else estimates
        self.failovers = 0
        """Blocks that were taken from a failed node and given to another."""
        self._nodes: dict[NodeId, _Node] = {}
        self._chunks: dict[int, _Chunk] = {}
        self._open: dict[int, _Request] = {}
        self._numbers = count(1)
        self._now = -1e9
        """When `requests` was last called."""

    # -- what is wanted ---------------------------------------------------------------------------

    def want(self, wanted: Wanted) -> None:
        """Adds a chunk, or tells newer places of one: blocks that arrived are kept."""
        old = self._chunks.get(wanted.index)
        pieces = {n: _Piece(p.length, list(p.holders)) for n, p in wanted.pieces.items()}
        if old is not None:
            for n, piece in pieces.items():
                if n in old.pieces and old.pieces[n].length == piece.length:
                    piece.blocks = old.pieces[n].blocks
                    piece.apart, piece.only = old.pieces[n].apart, old.pieces[n].only
        chunk = self._chunks[wanted.index] = _Chunk(wanted, pieces)
        if old is not None and old.finished and len(chunk.complete) == wanted.k:
            chunk.finished = True  # and said so already
        else:
            self._see_whether_finished(chunk)

    def forget(self, index: int) -> None:
        """The chunk is not wanted any more; what arrives for it is wasted."""
        self._chunks.pop(index, None)

    def reject(self, index: int, piece: int, node: NodeId | None) -> None:
        """What `node` holds as this piece is not what it should be: start the piece again without it. None:
        several have given of it, and it is not known whose part was bad; from now on it comes from one at a
        time, so that it shows."""
        chunk = self._chunks.get(index)
        if chunk is not None and piece in chunk.pieces:
            p = chunk.pieces[piece]
            p.blocks = []  # what is still under way belongs to these, and is wasted
            p.holders = [n for n in p.holders if n != node]
            p.apart |= node is None
            p.only = None
            chunk.finished = False

    # -- what to do -------------------------------------------------------------------------------

    def requests(self, now: float) -> list[Fetch]:
        """The requests to make now, most urgent first."""
        self._now = now
        self._notice_silence(now)
        out: list[Fetch] = []
        for chunk in sorted(self._chunks.values(), key=lambda c: (c.wanted.deadline, c.wanted.index)):
            for number in self._choose(chunk, now):
                piece = chunk.pieces[number]
                for block in piece.blocks:
                    if block.got or block.asked:
                        continue
                    node = self._best(piece, block, now)
                    if node is not None and self._has_credit(node, block.length, now):
                        out.append(self._ask(chunk.wanted.index, number, block, node, now))
        return out

    def _best(self, piece: _Piece, block: _Block, now: float) -> NodeId | None:
        """The holder that would have the block here first; None if all are to be left alone just now."""
        holders = [piece.only] if piece.only is not None else piece.holders
        usable = self._usable([n for n in holders if n not in block.late], now)
        return min(usable, key=lambda n: self._finish(n, block.length, now), default=None)

    def _usable(self, holders: Sequence[NodeId], now: float) -> list[NodeId]:
        """Those that are not to be left alone just now."""
        return [n for n in holders if self._node(n).closed_until <= now] or [
            n for n in holders if now >= self._node(n).failed_at + RETRY
        ]

    def _set_apart(self, piece: _Piece, now: float) -> None:
        """Chooses the one holder from which the piece is to come; if that fails another, from which all of it
        is fetched again."""
        usable = self._usable(piece.holders, now)
        if usable and piece.only not in usable:
            piece.only = min(usable, key=lambda n: self._finish(n, piece.length, now))
            piece.blocks = [_Block(b.offset, b.length) for b in piece.blocks]

    def _choose(self, chunk: _Chunk, now: float) -> list[int]:
        """The pieces to work on: complete or begun ones first, then those that would be here first."""

        def rank(number: int) -> tuple[int, int, int]:
            piece = chunk.pieces[number]
            finish = min(self._finish(n, piece.length, now) for n in piece.holders)
            closed = all(self._node(n).closed_until > now for n in piece.holders)
            begun = 0 if piece.complete else 1 if piece.blocks and not closed else 2
            return begun, int(finish / TIE), number

        usable = [n for n, p in chunk.pieces.items() if p.holders or p.complete]
        if len(usable) < chunk.wanted.k:
            if not chunk.stuck:
                chunk.stuck = True
                self.stuck.append(chunk.wanted.index)
            return []
        done = [n for n in usable if chunk.pieces[n].complete]
        chosen = done + sorted((n for n in usable if n not in done), key=rank)
        chosen = chosen[: chunk.wanted.k]
        for number in chosen:
            piece = chunk.pieces[number]
            if piece.apart and not piece.complete:
                self._set_apart(piece, now)
            if not piece.blocks:
                size = self._block_size(piece.holders, now)
                piece.blocks = [
                    _Block(at, min(size, piece.length - at)) for at in range(0, piece.length, size)
                ]
        return [n for n in chosen if not chunk.pieces[n].complete]

    def _ask(self, index: int, piece: int, block: _Block, node: NodeId, now: float) -> Fetch:
        fetch = Fetch(next(self._numbers), node, index, piece, block.offset, block.length)
        block.asked.add(fetch.number)
        state = self._node(node)
        state.owed += block.length
        state.requests[fetch.number] = now
        self._open[fetch.number] = _Request(fetch, now, block)
        return fetch

    # -- what happened ----------------------------------------------------------------------------

    def received(self, number: int, now: float) -> bool:
        """The block is here. True if it was still needed: otherwise its bytes are wasted."""
        request = self._open.pop(number)
        self._sample(request.fetch, request.sent, now)
        request.block.asked.discard(number)
        request.block.late.discard(request.fetch.node)
        if not self._is_wanted(request) or request.block.got:
            return False
        request.block.got = True
        self._see_whether_finished(self._chunks[request.fetch.chunk])
        return True

    def _see_whether_finished(self, chunk: _Chunk) -> None:
        if not chunk.finished and len(chunk.complete) == chunk.wanted.k:
            chunk.finished = True
            self.finished.append((chunk.wanted.index, chunk.complete))

    def failed(self, number: int, now: float, *, gone: bool) -> None:
        """The request failed. `gone`: the node answers, but does not have the piece, or not whole."""
        request = self._open.pop(number)
        fetch = request.fetch
        state = self._node(fetch.node)
        if state.requests.pop(number, None) is not None:
            state.owed -= fetch.length
        request.block.asked.discard(number)
        request.block.late.discard(fetch.node)
        if gone:
            state.last_byte = now  # it did answer
            if self._is_wanted(request):
                piece = self._chunks[fetch.chunk].pieces[fetch.piece]
                piece.holders = [n for n in piece.holders if n != fetch.node]
        elif not request.lost:
            self._close(fetch.node, now)

    def next_wake(self) -> float | None:
        """When `requests` may have something new to say, if nothing happens before."""
        nodes = self._nodes.values()
        times = [max(n.last_byte, min(n.requests.values())) + SILENCE for n in nodes if n.requests]
        if any(not c.finished for c in self._chunks.values()):
            again = [t for n in nodes for t in (n.closed_until, n.failed_at + RETRY)]
            times += [t for t in again if t > self._now]
        return min(times, default=None)

    # -- what is known of the nodes ---------------------------------------------------------------

    def _node(self, node: NodeId) -> _Node:
        state = self._nodes.get(node)
        if state is None:
            estimate = self._estimates.setdefault(node, Estimate())
            state = self._nodes[node] = _Node(estimate)
        return state

    def _rate(self, state: _Node, now: float) -> float:
        """What is believed of this node; of one never measured: the mean of those that were."""
        if self._known(state, now):
            return state.estimate.rate
        rates = [n.estimate.rate for n in self._nodes.values() if self._known(n, now)]
        return sum(rates) / len(rates) if rates else PRIOR_RATE

    def _rtt(self, state: _Node, now: float) -> float:
        if self._known(state, now):
            return state.estimate.rtt
        rtts = [n.estimate.rtt for n in self._nodes.values() if self._known(n, now)]
        return sum(rtts) / len(rtts) if rtts else PRIOR_RTT

    @staticmethod
    def _known(state: _Node, now: float) -> bool:
        return state.estimate.rate > 0 and now - state.estimate.measured < FORGET

    def _finish(self, node: NodeId, size: int, now: float) -> float:
        """Seconds until `size` more bytes of this node would be here."""
        state = self._node(node)
        penalty = SUSPICION * state.failures
        if state.closed_until > now:
            penalty += 1000.0 + state.closed_until - now
        return penalty + self._rtt(state, now) + (state.owed + size) / self._rate(state, now)

    def _has_credit(self, node: NodeId, size: int, now: float) -> bool:
        state = self._node(node)
        if not self._known(state, now) or state.failures:
            return not state.requests
        window = self._rate(state, now) * (state.estimate.rtt + 0.15) / size
        return len(state.requests) < max(2, min(16, window))

    def _block_size(self, holders: Sequence[NodeId], now: float) -> int:
        rate = max((self._rate(self._node(n), now) for n in holders), default=PRIOR_RATE)
        return int(max(MIN_BLOCK, min(MAX_BLOCK, rate * 0.05)))

    def _sample(self, fetch: Fetch, sent: float, now: float) -> None:
        state = self._node(fetch.node)
        if state.requests.pop(fetch.number, None) is not None:
            state.owed -= fetch.length
        began = max(state.free_at, sent)
        busy = max(1e-4, now - began)
        seen = state.estimate
        if fetch.length >= MIN_SAMPLE:
            # Weighed by time, so that of two answers that are handled in one go the second, which seems
            # to have taken none, does not make a slow node look fast.
            keep = 0.5 ** (busy / HALF_LIFE) if self._known(state, now) else 0.0
            seen.bytes = seen.bytes * keep + fetch.length
            seen.busy = seen.busy * keep + busy
            seen.rate = max(2000.0, seen.bytes / seen.busy)
            seen.measured = now
        seen.rtt += (min(0.5, max(0.0005, now - sent)) - seen.rtt) * 0.1
        state.free_at = state.last_byte = now
        state.failures = 0
        state.closed_until = -1e9

    def _notice_silence(self, now: float) -> None:
        for node, state in self._nodes.items():
            if state.requests and now >= max(state.last_byte, min(state.requests.values())) + SILENCE:
                self._close(node, now)

    def _close(self, node: NodeId, now: float) -> None:
        """The node failed: its blocks return at once, and it is left alone for a while."""
        state = self._node(node)
        state.failures += 1
        state.failed_at = now
        state.closed_until = now + min(5.0, 0.5 * 2 ** min(state.failures, 5))
        for number in state.requests:
            request = self._open[number]
            request.lost = True
            request.block.asked.discard(number)
            request.block.late.add(node)
            if self._is_wanted(request) and not request.block.got:
                self.failovers += 1
        state.requests.clear()
        state.owed = 0

    def _is_wanted(self, request: _Request) -> bool:
        """Whether its block is still one of those that are to make a chunk. Blocks are told apart by
        identity: the same range may have been given up and asked for anew."""
        chunk = self._chunks.get(request.fetch.chunk)
        piece = chunk.pieces.get(request.fetch.piece) if chunk and not chunk.finished else None
        return piece is not None and any(b is request.block for b in piece.blocks)
