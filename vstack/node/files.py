"""Open superblocks for reading, shared by all readers and counted.

Invariant: a descriptor that a reader holds stays open, and its file readable, until that reader lets go,
whatever happens to the file's name meanwhile. Nothing here survives a stop, so a crash leaves nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vstack.node.disk import Disk
from vstack.node.superblock import superblock_path

_KEPT_OPEN = 128


class _Open:
    """One descriptor. `stale` means: close it when the last reader lets go."""

    __slots__ = ("fd", "readers", "stale")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readers = 0
        self.stale = False


class OpenFiles:
    """Thread-safe. At most 128 files stay open, and those that are being read."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk = disk
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[int, _Open] = {}

    @contextmanager
    def use(self, number: int) -> Iterator[int]:
        """A descriptor of the superblock, good until the block ends. Raises FileNotFoundError, OSError."""
        with self._lock:
            file = self._files.pop(number, None) or _Open(
                self._disk.open(superblock_path(self._folder, number))
            )
            self._files[number] = file  # the last of the dict is the latest used
            file.readers += 1
            if len(self._files) > _KEPT_OPEN:
                self._retire(next(iter(self._files)))
        try:
            yield file.fd
        finally:
            with self._lock:
                file.readers -= 1
                if file.stale and not file.readers:
                    self._disk.close(file.fd)

    def forget(self, number: int) -> None:
        """The superblock is about to be unlinked: its space returns when the last reader lets go."""
        with self._lock:
            if number in self._files:
                self._retire(number)

    def close(self) -> None:
        """Closes every file; those that are being read as soon as that is done."""
        with self._lock:
            for number in list(self._files):
                self._retire(number)

    def _retire(self, number: int) -> None:
        file = self._files.pop(number)
        file.stale = True
        if not file.readers:
            self._disk.close(file.fd)
