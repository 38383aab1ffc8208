"""Is there an order of the operations that explains every outcome? (Wing and Gong; Lowe's memo.)

Checked per key, against a register that knows nothing of Paxos:

    state    version, data, the operations that were applied
    read     Found(version, data) of the state
    change   applied before: Ok(the version it made then), nothing changes
             expect == version: applied, Ok(a higher version)
             otherwise: Mismatch(version, data)

Every *try* of an operation is an interval of its own, because each was answered by itself; tries
share an operation id, and the operation applies once. A try without an answer, or answered
Unknown, takes effect at any time after its call, or never.

The version that an unanswered change made is not known until somebody sees it, so a state may
hold a version that is only bounded from below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vstack.mesh.messages import Found, Mismatch, Ok, Op, Outcome, Unknown

FOREVER = 1 << 62
MAX_STATES = 300_000
"""A search that visits more gives up; see `TooManyStates`."""


class TooManyStates(Exception):
    """The search was given up: nothing is proved about this history."""


@dataclass(slots=True, eq=False)
class Try:
    """One request of a client. Times are ordinal numbers of events: no two are equal."""

    op: Op
    called: int
    returned: int = FOREVER
    outcome: Outcome | None = None


class State(NamedTuple):
    version: int
    """Exact if `exact`; otherwise the state's version is somewhere above it."""
    exact: bool
    data: bytes | None
    applied: int
    """A bit per operation."""


class _Step(NamedTuple):
    called: int
    returned: int
    op: Op
    bit: int
    made: int
    """Version that some answered try of the operation says it made; 0 if none."""
    outcome: Outcome | None
    """None if it is not known."""


def explains(tries: list[Try]) -> bool:
    """True if the tries of one key are linearizable. Raises TooManyStates."""
    steps = _steps(tries)
    required = sum(1 << i for i, s in enumerate(steps) if s.outcome is not None)
    seen: set[tuple[int, State]] = set()
    stack = [(0, State(0, True, None, 0))]
    while stack:
        node = stack.pop()
        done, state = node
        if done & required == required:
            return True
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > MAX_STATES:
            raise TooManyStates(f"{len(steps)} tries")
        horizon = min(s.returned for i, s in enumerate(steps) if not done >> i & 1)
        for i, step in enumerate(steps):
            if step.called > horizon:
                break
            if not done >> i & 1:
                after = _apply(state, step)
                if after is not None:
                    stack.append((done | 1 << i, after))
    return False


def _steps(tries: list[Try]) -> list[_Step]:
    bits: dict[bytes, int] = {}
    made: dict[bytes, int] = {}
    for t in tries:
        bits.setdefault(t.op.id, 1 << len(bits))
        if isinstance(t.outcome, Ok):
            made[t.op.id] = t.outcome.version
    steps = []
    for t in tries:
        known = None if isinstance(t.outcome, Unknown) else t.outcome
        if known is None and t.op.expect is None:
            continue  # a read that nobody saw
        returned = t.returned if known is not None else FOREVER
        steps.append(_Step(t.called, returned, t.op, bits[t.op.id], made.get(t.op.id, 0), known))
    return sorted(steps, key=lambda s: (s.called, s.returned))


def _apply(state: State, step: _Step) -> State | None:
    """The state after `step`, or None if it cannot happen here with the outcome that it had."""
    outcome = step.outcome
    if isinstance(outcome, Found):
        return _observed(state, outcome.version, outcome.data)
    if state.applied & step.bit:
        return state if isinstance(outcome, Ok) and outcome.version == step.made else None
    if isinstance(outcome, Mismatch):
        return _observed(state, outcome.version, outcome.data) if outcome.version != step.op.expect else None
    expect = step.op.expect
    assert expect is not None
    if _observed(state, expect, state.data) is None:
        return None
    applied = state.applied | step.bit
    if not step.made:
        return State(expect, False, step.op.data, applied)
    if isinstance(outcome, Ok) and outcome.version != step.made:
        return None
    return State(step.made, True, step.op.data, applied) if step.made > expect else None


def _observed(state: State, version: int, data: bytes | None) -> State | None:
    if data != state.data or (version != state.version if state.exact else version <= state.version):
        return None
    return state if state.exact else State(version, True, data, state.applied)
