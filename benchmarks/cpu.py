"""Where the time goes: CPU seconds by process and thread out of /proc, and profiles by function.

The client's event loop is profiled by cProfile, which sees that one thread only. A node is sampled
by py-spy, if that is on the PATH and may look at it; without it, the table of threads must do.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_WAITS = ("wait (threading", "poll (zmq", "select (selectors", "run (zmq/utils/garbage", "_stop_with_stdin")
"""Innermost frames of threads that wait: py-spy cannot always tell."""
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Cpu:
    """CPU seconds of one process."""

    main: float = 0.0
    """The thread that the process began with: event loop or reactor."""
    zmq: float = 0.0
    """ZeroMQ's own threads: the sockets' system calls."""
    workers: float = 0.0
    """All other threads: hashing, coding, disk."""
    system: float = 0.0
    """The part of all of it that was spent in the kernel."""

    @property
    def total(self) -> float:
        return self.main + self.zmq + self.workers

    def since(self, before: Cpu) -> Cpu:
        return Cpu(
            self.main - before.main,
            self.zmq - before.zmq,
            self.workers - before.workers,
            self.system - before.system,
        )


def cpu_of(pid: int) -> Cpu:
    """What the threads of `pid` that live now have used so far. Raises OSError if there is none."""
    cpu = Cpu()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            stat = (task / "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        user, system = int(rest[11]) * _TICK, int(rest[12]) * _TICK
        cpu.system += system
        if int(task.name) == pid:
            cpu.main += user + system
        elif name.startswith("ZMQ"):
            cpu.zmq += user + system
        else:
            cpu.workers += user + system
    return cpu


@dataclass
class Samples:
    """What py-spy saw of one process."""

    lines: list[str] = field(default_factory=list)
    """`12.3 %  function (file:line)`, by own time."""
    why_none: str = ""


@contextmanager
def sampled(pid: int, output: Path, top: int) -> Iterator[Samples]:
    """Samples the process while the block runs; the result is there afterwards."""
    samples = Samples()
    spy = shutil.which("py-spy")
    if spy is None:
        samples.why_none = "py-spy is not on the PATH"
        yield samples
        return
    command = [
        spy, "record", "--pid", str(pid), "--output", str(output), "--format", "raw", "--rate", "200",
        "--duration", "600",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        time.sleep(1.0)  # until it has attached
        yield samples
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        if output.exists():
            samples.lines = _own_time(output.read_text(), top)
        if not samples.lines:
            samples.why_none = f"py-spy saw nothing: {said.decode(errors='replace').strip()[-200:]}"


def _own_time(raw: str, top: int) -> list[str]:
    """Of lines `frame;frame;frame count`: the innermost frames, most frequent first; waiting is left out."""
    own: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frame = stack.rpartition(";")[2]
        if not any(wait in frame for wait in _WAITS):
            own[frame] += int(count)
    whole = sum(own.values())
    return [f"{100 * n / whole:5.1f} %  {frame}" for frame, n in own.most_common(top)]


@contextmanager
def profiled(lines: list[str], top: int) -> Iterator[None]:
    """Runs the block under cProfile; `lines` then has `seconds  calls  function (file:line)`, by own time."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
    rows = []
    for (file, line, function), (_, calls, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = "" if file == "~" else f" ({'/'.join(Path(file).parts[-2:])}:{line})"
        rows.append((own, f"{own:7.3f} s {calls:7} calls  {function}{where}"))
    lines += [text for _, text in sorted(rows, reverse=True)[:top]]
