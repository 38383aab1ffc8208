"""What a keeper says in the log of what goes wrong: the same may go wrong with every chunk of every pass."""

from __future__ import annotations

import logging
from collections.abc import Callable

SAY_EVERY = 600.0
"""Seconds between two lines of one kind."""


class Voice:
    """Of each kind of trouble one line now and then; figures count the rest. Kinds are few."""

    def __init__(self, log: logging.Logger, now: Callable[[], float]) -> None:
        """`now` gives monotonic seconds."""
        self._log = log
        self._now = now
        self._said: dict[str, float] = {}

    def warn(self, kind: str, text: str) -> None:
        """Of something that is to be expected now and then."""
        if self._is_time(kind):
            self._log.warning("%s", text)

    def fail(self, kind: str, text: str) -> None:
        """Of an exception that nobody expected, with its traceback: to be called where it is handled."""
        if self._is_time(kind):
            self._log.exception("%s", text)

    def _is_time(self, kind: str) -> bool:
        now = self._now()
        if now - self._said.get(kind, now - SAY_EVERY) < SAY_EVERY:
            return False
        self._said[kind] = now
        return True
