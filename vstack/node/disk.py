"""The only place in the node's store that touches the disk in a way that matters after a crash.

It decides nothing. It names the operations whose order makes the store safe (write, fdatasync,
preallocate, truncate, rename, unlink, folder fsync), so that a test can hand in a `Disk` that fails,
or stops the process, at any one of them. What holds of each after a power loss:

    write           nothing, until `sync` of the same file returns
    sync            everything written to the file before it, and the file's size
    create, rename, unlink     nothing, until `sync_folder` of the folder returns

All methods raise OSError and leave what they did half done to the caller, who knows what it means.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_MOST_BUFFERS = 1024
"""IOV_MAX of Linux: more buffers than this in one call are EINVAL."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a full disk."""

_NO_PREALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class Space(NamedTuple):
    """Of a file system, in bytes."""

    total: int
    free: int
    """What an ordinary process may still use."""


class Disk:
    """The real disk. File descriptors are plain integers, offsets and lengths are bytes."""

    def make_folder(self, path: Path) -> None:
        """Makes `path` and its parents, each durable in its parent when this returns."""
        if path.is_dir():
            return
        self.make_folder(path.parent)
        path.mkdir(exist_ok=True)
        self.sync_folder(path.parent)

    def lock(self, path: Path) -> int:
        """A descriptor that holds `path` for this process alone. Raises BlockingIOError if another has it."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def create(self, path: Path) -> int:
        """A new file for reading and writing. Raises FileExistsError."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def open(self, path: Path, *, write: bool = False) -> int:
        return os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def read(self, fd: int, offset: int, length: int) -> bytes:
        """`length` bytes in a buffer of their own; fewer only at the end of the file."""
        data = os.pread(fd, length, offset)
        while 0 < len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """All of `buffers`, one after the other from `offset`, without joining them in memory."""
        waiting = [memoryview(b) for b in buffers if len(b)]
        first = 0
        while first < len(waiting):
            done = os.pwritev(fd, waiting[first : first + _MOST_BUFFERS], offset)
            offset += done
            while first < len(waiting) and done >= len(waiting[first]):
                done -= len(waiting[first])
                first += 1
            if done:
                waiting[first] = waiting[first][done:]

    def sync(self, fd: int) -> None:
        """What was written to the file is on disk when this returns. After an error nothing is known."""
        os.fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        """The names in the folder are on disk when this returns."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def preallocate(self, fd: int, offset: int, length: int) -> bool:
        """Reserves a range that reads as zeros. False if the file system cannot do that."""
        try:
            os.posix_fallocate(fd, offset, length)
        except OSError as error:
            if error.errno in _NO_PREALLOCATION:
                return False
            raise
        return True

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def space(self, fd: int) -> Space:
        """Of the file system that the open file or folder lies on."""
        about = os.fstatvfs(fd)
        return Space(about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize)
