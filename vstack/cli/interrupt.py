"""Ends a command in order when it is told to: Ctrl-C, SIGTERM and SIGHUP cancel its work.

Cancelling lets every `finally` run: nodes are stopped, temporary files removed, connections closed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def as_ctrl_c() -> None:
    """From now on each of SIGNALS raises KeyboardInterrupt, also where Ctrl-C was ignored."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def run(work: Coroutine[object, object, T]) -> T:
    """The result of `work`, in an event loop of its own. Raises KeyboardInterrupt if it was told to end."""
    told = False

    async def inside() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            nonlocal told
            told = True
            task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, end)
        return await work

    try:
        return asyncio.run(inside())
    except asyncio.CancelledError:
        if told:
            raise KeyboardInterrupt from None
        raise
