"""Real meshes for tests: processes over TCP on loopback, real files, `kill -9`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vstack.local import LocalMesh, free_port
from vstack.mesh.mesh_client import MeshClient, connect

T = TypeVar("T")


@contextmanager
def running_mesh(
    folder: Path, count: int = 5, extra: tuple[str, ...] = (), keys: Path | None = None
) -> Iterator[LocalMesh]:
    """A mesh of `count` nodes that serve, with or without keys; none is left afterwards."""
    with LocalMesh(folder, count, free_port(count), extra, keys=keys) as mesh:
        mesh.start()
        yield mesh


def with_client(
    mesh: LocalMesh,
    work: Callable[[MeshClient], Awaitable[T]],
    *,
    patience: float = 5.0,
    key: Path | None = None,
) -> T:
    """Runs `work` with a client of the mesh, in an event loop of its own. `key`: instead of the admin's."""

    async def inside() -> T:
        async with connect(mesh.peers, patience=patience, keys=key or mesh.client_key) as client:
            return await work(client)

    return asyncio.run(inside())


def vstack(
    *words: str | Path,
    peers: str = "",
    key: Path | None = None,
    cwd: Path | None = None,
    within: float = 120,
) -> Finished:
    """Runs the command line as a user does; never raises for its exit code.

    The key of whoever runs the tests is never used: only `key`, or what is found in `cwd`.
    """
    command = [sys.executable, "-c", "from vstack.cli import main; main()", *map(str, words)]
    if peers:
        command += ["--peers", peers, "--keys", str(key) if key else "none"]
    elif key:
        command += ["--keys", str(key)]
    environment = {k: v for k, v in os.environ.items() if k not in ("VSTACK_KEY", "VSTACK_PEERS")}
    environment["XDG_CONFIG_HOME"] = os.devnull
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=within, check=False, env=environment
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class Finished:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> dict[str, object]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def failed_with(self, code: int, *words: str) -> None:
        """One clear line on stderr that names `words`, that exit code, and no traceback."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        last = self.err.strip().splitlines()[-1]
        for word in words:
            assert word in last, (word, self.err)

    def __repr__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


def wait_for(condition: Callable[[], bool], within: float = 20.0) -> None:
    """Returns once `condition` holds; fails the test when it does not in time."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not so within {within} s: {condition}"
        time.sleep(0.02)
