"""Keepers that are wrong on purpose, each in one way: each must be caught, or the invariants lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from tests.keeper_sim.world import Parts

REAL = Parts()


@dataclass(frozen=True)
class Mutant:
    """Other classes in the place of the true ones, or other functions in their modules."""

    parts: Parts = REAL
    functions: tuple[tuple[object, str, Callable[..., object]], ...] = ()

    @contextmanager
    def in_force(self) -> Iterator[Parts]:
        with ExitStack() as stack:
            for module, name, function in self.functions:
                stack.enter_context(patch.object(module, name, function))
            yield self.parts


MUTANTS: dict[str, Mutant] = {}
