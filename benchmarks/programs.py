"""Programs of others on loopback: found, started, asked over HTTP, and ended with all that they wrote."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vstack.errors import VstackError

STARTS_WITHIN = 60.0
SOCKET_BLOCK = 1 << 20
IDLE = 5.0
"""Seconds after which a connection is not used again: the other side may be about to close it."""


class Wrong(VstackError):
    """A system answered otherwise than it should."""


def find(program: str, installed: Path | None) -> Path | None:
    """In `installed`, a virtual environment, or on the PATH."""
    if installed is not None and (installed / "bin" / program).exists():
        return (installed / "bin" / program).absolute()
    found = shutil.which(program)
    return Path(found) if found else None


class Programs:
    """Processes that run in the background, their output in files. Use as `with`: none stays."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made; it is also the HOME, the temporary and the working folder of them all."""
        self.folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
        folder.mkdir(parents=True)

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()

    @property
    def pids(self) -> list[int]:
        """Of those that were not killed."""
        return [p.pid for p in self._running.values() if p.poll() is None]

    def run(self, command: list[str], said: str = "") -> str:
        """What a command that ends by itself printed; `said` is its input. Raises Wrong if it fails."""
        done = subprocess.run(
            command, input=said, capture_output=True, text=True, timeout=STARTS_WITHIN,
            env=self._environment, cwd=self.folder,
        )  # fmt: skip
        if done.returncode != 0:
            raise Wrong(f"{' '.join(command[:2])} failed: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout

    def start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=self._environment, cwd=self.folder, preexec_fn=_ends_with_parent,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """kill -9."""
        self._running[name].kill()
        self._running[name].wait()

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        """Returns once `ready`, which may raise OSError and Wrong until then. Raises Wrong if that takes too
        long, or if one of the programs ends instead."""
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            for name, process in self._running.items():
                if process.poll() is not None:
                    log = (self.folder / f"{name}.log").read_text(errors="replace").strip()
                    raise Wrong(f"{name} ended instead of serving: {log[-300:]}")
            try:
                if ready():
                    return
            except (OSError, Wrong):
                pass  # it does not listen yet, or not to this
            time.sleep(0.1)
        raise Wrong(f"{what} is not ready after {STARTS_WITHIN:.0f} s")


def _ends_with_parent() -> None:
    """In the child: the kernel ends it when this process is gone, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Http:
    """HTTP/1.1 with connections that stay open, one to each server and thread."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._used: dict[http.client.HTTPConnection, float] = {}
        """When each was last used."""

    def ask(self, server: str, method: str, path: str, body: bytes | memoryview | None = None) -> bytes:
        """The body of the answer. Raises Wrong for a status that is not 2xx, OSError."""
        connections: dict[str, http.client.HTTPConnection] = self._mine.__dict__.setdefault("open", {})
        connection = connections.get(server)
        if connection is None:
            connection = http.client.HTTPConnection(server, timeout=STARTS_WITHIN, blocksize=SOCKET_BLOCK)
            connections[server] = connection
        elif time.monotonic() - self._used[connection] > IDLE:
            connection.close()  # the question opens it again
        self._used[connection] = time.monotonic()
        try:
            headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            self._used[connection] = time.monotonic()
        except (OSError, http.client.HTTPException) as e:
            connection.close()  # the next question opens it again
            raise OSError(f"{server}: {e!r}") from e
        if not 200 <= answer.status < 300:
            raise Wrong(f"{method} {server}{path[:60]} was answered {answer.status}: {data[:200]!r}")
        return data

    def json(self, server: str, path: str) -> dict[str, object]:
        found = json.loads(self.ask(server, "GET", path))
        if not isinstance(found, dict):
            raise Wrong(f"{server}{path} did not answer with an object")
        return found

    def close(self) -> None:
        for connection in self._used:
            connection.close()
