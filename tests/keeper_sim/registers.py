"""Registers as a quorum has them: one value each, replaced by compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vstack.mesh.mesh_client import Change
from vstack.mesh.messages import Mismatch, Ok
from vstack.mesh.registers import EPOCH_SHIFT


class Cell(NamedTuple):
    """Version 0: never written. No data at a later version: a tombstone."""

    version: int
    data: bytes | None


NEVER = Cell(0, None)


class Registers:
    """Linearizable: each change happens at one moment, and so does each read."""

    def __init__(self, on_change: Callable[[str, Cell, Cell, str], None]) -> None:
        """`on_change` is told of each change that has been made: the key, what was and is there, who."""
        self._on_change = on_change
        self._cells: dict[str, Cell] = {}

    def read(self, key: str) -> Cell:
        return self._cells.get(key, NEVER)

    def keys(self, prefix: str) -> list[str]:
        """Of registers that hold something, in order."""
        return sorted(k for k, cell in self._cells.items() if k.startswith(prefix) and cell.data is not None)

    def change(self, change: Change, epoch: int, by: str) -> Ok | Mismatch:
        """`epoch`: of the mesh now."""
        was = self.read(change.key)
        if was.version != change.expect:
            return Mismatch(was.version, was.data)
        now = Cell(max(was.version, epoch << EPOCH_SHIFT) + 1, change.data)
        self._cells[change.key] = now
        self._on_change(change.key, was, now, by)
        return Ok(now.version)
