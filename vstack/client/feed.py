"""A stream of bytes as FFmpeg reads it: a file-like object over an iterator. No seeking.

FFmpeg swallows what a reader raises while it probes its input. So an error of the iterator is kept
and looks like the end of the stream; whoever reads must call `check` when the demuxer has ended.
"""

from __future__ import annotations

from collections.abc import Iterable


class Feed:
    """Reads the byte strings of an iterator one after the other; holds one of them at a time."""

    def __init__(self, parts: Iterable[bytes | memoryview]) -> None:
        self._parts = iter(parts)
        self._part: bytes | memoryview = b""
        self._at = 0
        self._error: BaseException | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer where a part ends; none at the end, or after an error."""
        while self._at >= len(self._part):
            if self._error is not None:
                return b""
            try:
                part = next(self._parts, None)
            except BaseException as error:  # noqa: BLE001  (KeyboardInterrupt too: C code runs between us and the caller)
                self._error = error
                return b""
            if part is None:
                return b""
            self._part, self._at = part, 0
        data = bytes(self._part[self._at : self._at + size])
        self._at += len(data)
        return data

    def check(self) -> None:
        """Raise what the iterator raised, if it did."""
        if self._error is not None:
            raise self._error


class Sink:
    """What a muxer writes, until it is taken. No seeking."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Everything written since the last call."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data
