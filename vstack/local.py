"""Nodes on this machine: what `vstack up` and `vstack down` do, and the demo and the tests with them.

    FOLDER/mesh.json      addresses and process ids
    FOLDER/node-1/ ...    data directories
    FOLDER/node-1.log     what that node said
    FOLDER/keys/          the mesh's key and its admin's, unless it does without

A node that was started to live with its parent ends when the parent does, however that ends: its
stdin closes. A detached one is ended by `stop_recorded`, which looks at what a process id is before
it sends it anything.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vstack.errors import UsageError, VstackError
from vstack.mesh.keys import ADMIN_KEY, MESH_KEY, init_mesh

READY_WITHIN = 30.0


class NodeFailed(VstackError):
    """A node that was to be started ended instead."""


@dataclass
class LocalNode:
    """One node process of ours."""

    number: int
    address: str
    data: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    node: str = ""
    """NodeId, once it is ready."""
    ready_after: float = 0.0
    """Seconds from its start to its ready line."""
    _log_at: int = 0
    _started: float = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, peers: Sequence[str], *, detach: bool, extra: Sequence[str] = ()) -> None:
        """Starts the process; `wait_ready` waits for it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_at = self.log.stat().st_size if self.log.exists() else 0
        command = [
            sys.executable, "-m", "vstack.node.main", "--listen", self.address, "--data", str(self.data),
            "--peers", ",".join(peers), *extra,
        ]  # fmt: skip
        if not detach:
            command.append("--with-parent")
        self._started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if detach else subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to us alone, and we stop them
            )

    def is_ready(self) -> bool:
        """Whether it serves. Raises NodeFailed with what it said if it has ended."""
        with self.log.open("rb") as f:
            f.seek(self._log_at)
            for line in f.read().decode(errors="replace").splitlines():
                if line.startswith("ready node="):
                    self.node = line.split()[1].removeprefix("node=")
                    self.ready_after = time.monotonic() - self._started
                    return True
        if not self.alive:
            raise NodeFailed(f"node {self.number} ({self.address}) ended: {self.last_words()}")
        return False

    def wait_ready(self, within: float = READY_WITHIN) -> None:
        """Returns when it serves. Raises NodeFailed with what it said if it ends or takes too long."""
        while time.monotonic() < self._started + within:
            if self.is_ready():
                return
            time.sleep(0.02)
        raise NodeFailed(f"node {self.number} ({self.address}) is not ready after {within:.0f} s: {self.log}")

    def last_words(self) -> str:
        """How it ended, in words: the signal that killed it, or the last line of its log."""
        code = self.process.poll() if self.process is not None else None
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return lines[-1] if lines else "it said nothing"

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self._reap()

    def stop(self, within: float = 10.0) -> int | None:
        """SIGTERM, and SIGKILL if that is not enough. Returns the exit code."""
        if self.process is None:
            return None
        if self.alive:
            self.process.terminate()
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        code = self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        return code


@dataclass
class LocalMesh:
    """Several nodes of one mesh under one folder. Use as `with` to be sure that none stays."""

    folder: Path
    count: int = 5
    port: int = 7400
    extra: tuple[str, ...] = ()
    nodes: list[LocalNode] = field(default_factory=list)
    keys: Path | None = None
    """The folder of its keys, made at the first start; None: connections are neither encrypted nor
    authenticated."""
    running: dict[str, int] = field(default_factory=dict)
    """Process ids by data directory, of nodes that run already: they are left as they are."""

    def __post_init__(self) -> None:
        for i in range(self.count):
            self.nodes.append(
                LocalNode(
                    i + 1,
                    f"127.0.0.1:{self.port + 2 * i}",
                    self.folder / f"node-{i + 1}",
                    self.folder / f"node-{i + 1}.log",
                )
            )

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(n.address for n in self.nodes)

    @property
    def to_start(self) -> list[LocalNode]:
        """The nodes that did not run before."""
        names = {Path(data).name for data in self.running}
        return [n for n in self.nodes if n.data.name not in names]

    @property
    def client_key(self) -> Path | None:
        """The admin's key file."""
        return self.keys / ADMIN_KEY if self.keys else None

    @property
    def options(self) -> tuple[str, ...]:
        """What its nodes are started with beside their addresses."""
        return (*self.extra, *(("--keys", str(self.keys)) if self.keys else ()))

    def start(self, *, detach: bool = False, known: bool = False) -> list[NodeFailed]:
        """Starts all that do not run and waits until they serve. Stops these and raises NodeFailed if one
        does not; of a mesh that is `known` the others go on, unless none serves, and the failures are
        returned.

        Raises UsageError if there are no keys and they cannot be made.
        """
        if self.keys is not None and not (self.keys / MESH_KEY).exists():
            init_mesh(self.keys)
        try:
            for node in self.to_start:
                node.start(self.peers, detach=detach, extra=self.options)
            return self._wait_ready(known)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, known: bool) -> list[NodeFailed]:
        """Looks at all in turns: the one that ends says why the others wait."""
        waiting = self.to_start
        failed: list[NodeFailed] = []
        deadline = time.monotonic() + READY_WITHIN
        while waiting:
            for node in list(waiting):
                try:
                    if node.is_ready():
                        waiting.remove(node)
                    elif time.monotonic() > deadline:
                        raise NodeFailed(f"node {node.number} ({node.address}) is not ready: {node.log}")
                except NodeFailed as e:
                    failed.append(e)
                    if not known or len(failed) == len(self.to_start):
                        raise
                    node.stop()
                    node.process = None
                    waiting.remove(node)
            time.sleep(0.02)
        return failed

    def stop(self) -> None:
        """Ends all that run."""
        for node in self.nodes:
            if node.alive and node.process is not None:
                node.process.terminate()
        for node in self.nodes:
            node.stop()

    def __enter__(self) -> LocalMesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def record(self, *, detached: bool) -> None:
        """Writes mesh.json, for `stop_recorded` and for the next start."""
        started = {str(n.process.pid): str(n.data) for n in self.nodes if n.process is not None}
        state = {
            "port": self.port,
            "count": self.count,
            "peers": list(self.peers),
            "keys": self.keys is not None,
            "detached": detached,
            "pids": {**{str(pid): data for data, pid in self.running.items()}, **started},
        }
        temporary = self.folder / "mesh.json.tmp"
        temporary.write_text(json.dumps(state, indent=1))
        temporary.rename(self.folder / "mesh.json")


def free_port(count: int) -> int:
    """The first of `count` consecutive pairs of ports on loopback that nobody listens on.

    Begins at another place in each process, so that two of them seldom meet. Raises NodeFailed.
    """
    size = 2 * count
    for i in range(1000):
        base = 20000 + (os.getpid() * 101 + i * size) % 12000
        held = []
        try:
            for port in range(base, base + size):
                s = socket.socket()
                held.append(s)
                s.bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for s in held:
                s.close()
        return base
    raise NodeFailed(f"no {size} free ports in a row on 127.0.0.1")


def recorded(folder: Path) -> dict[str, object] | None:
    """What `record` wrote, or None. Raises UsageError if it cannot be read."""
    path = folder / "mesh.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} cannot be read ({e}): remove it and start again") from e
    return state if isinstance(state, dict) else None


def running(folder: Path) -> dict[str, int]:
    """Process ids by data directory, of the recorded nodes that are running now."""
    state = recorded(folder)
    pids = state.get("pids") if state else None
    if not isinstance(pids, dict):
        return {}
    return {str(data): int(pid) for pid, data in pids.items() if _is_node(int(pid), str(data))}


def stop_recorded(folder: Path, within: float = 15.0) -> int:
    """Ends the recorded nodes that run; how many those were."""
    pids = running(folder)
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + within
    while (left := running(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
    return len(pids)


def _is_node(pid: int, data: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "vstack.node.main" in words and data in words
