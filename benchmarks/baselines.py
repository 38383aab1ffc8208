"""What the machine itself can do, measured beside the product: the disk and loopback TCP.

Both move blocks of 2 MiB, the size of a full chunk, and neither hashes, checks or looks anything up.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

BLOCK = 2 << 20

_SENDER = """
import os, socket, sys
block = os.urandom(int(sys.argv[2]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as s:
    count = int.from_bytes(s.recv(4), "big")
    for _ in range(count):
        s.sendall(block)
"""


def disk_rate(folder: Path, size: int, writers: int) -> float:
    """Bytes a second of about `size` bytes written by `writers` threads, each to a file of its own.

    Every block is followed by an fdatasync. The files are preallocated first, as the store's are.
    """
    block = os.urandom(BLOCK)
    count = max(1, round(size / BLOCK / writers))
    start = threading.Barrier(writers + 1)
    failed: list[OSError] = []

    def write(fd: int) -> None:
        start.wait()
        try:
            for i in range(count):
                os.pwrite(fd, block, i * BLOCK)
                os.fdatasync(fd)
        except OSError as e:
            failed.append(e)

    files: list[int] = []
    paths = [folder / f"disk-{i}" for i in range(writers)]
    try:
        for path in paths:
            files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
            os.posix_fallocate(files[-1], 0, count * BLOCK)
        threads = [threading.Thread(target=write, args=(fd,)) for fd in files]
        for thread in threads:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
    finally:
        for fd in files:
            os.close(fd)
        for path in paths:
            path.unlink(missing_ok=True)
    if failed:
        raise failed[0]
    return writers * count * BLOCK / took


def tcp_rate(size: int) -> float:
    """Bytes a second of about `size` bytes that another process sends to this one through loopback."""
    count = max(1, round(size / BLOCK))
    buffer = bytearray(BLOCK)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        command = [sys.executable, "-c", _SENDER, str(server.getsockname()[1]), str(BLOCK)]
        # In a session of its own it hears no Ctrl-C; it ends when the connection does.
        sender = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            connection, _ = server.accept()
            with connection:
                began = time.perf_counter()
                connection.sendall(count.to_bytes(4, "big"))
                received = 0
                while got := connection.recv_into(buffer):
                    received += got
                took = time.perf_counter() - began
        finally:
            sender.kill()
            sender.wait()
    if received != count * BLOCK:
        raise OSError(f"loopback gave {received} of {count * BLOCK} bytes")
    return received / took
