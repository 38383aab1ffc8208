"""The change function: what one operation does to the value of a register (CHUNKPAXOS, section 4).

A compare-and-swap names the exact version that it replaces, and versions never repeat. A value
remembers its last 16 changes as (operation id, version replaced), so that an operation which is
tried again, through any node, applies once.
"""

from __future__ import annotations

from vstack.mesh.messages import Applied, Found, Mismatch, Ok, Op, Outcome, Unknown, Value
from vstack.mesh.registers import EPOCH_SHIFT

OPS_REMEMBERED = 16


def apply(op: Op, value: Value, epoch: int) -> tuple[Value, Outcome]:
    """The value after `op`, and what to tell its client once that value is chosen.

    The same object comes back if nothing changes.
    """
    if op.expect is None:
        return value, Found(value.version, value.data)
    produced = _version_produced_by(op.id, value)
    if produced is not None:
        return value, Ok(produced)
    if value.version == op.expect:
        version = max(value.version, epoch << EPOCH_SHIFT) + 1
        ops = (*value.ops, Applied(op.id, op.expect))[-OPS_REMEMBERED:]
        return Value(version, op.data, ops), Ok(version)
    if len(value.ops) == OPS_REMEMBERED and all(a.replaced != op.expect for a in value.ops):
        return value, Unknown("the register has changed too often since to tell whether this was applied")
    return value, Mismatch(value.version, value.data)


def _version_produced_by(op_id: bytes, value: Value) -> int | None:
    """An earlier try of the operation won: each change's version is what the next one replaced."""
    for i, applied in enumerate(value.ops):
        if applied.op == op_id:
            last = i + 1 == len(value.ops)
            return value.version if last else value.ops[i + 1].replaced
    return None
