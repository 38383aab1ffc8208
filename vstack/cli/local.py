"""`vstack up` and `vstack down`."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from vstack.cli import interrupt, show
from vstack.errors import UsageError
from vstack.local import LocalMesh, recorded, running, stop_recorded

__all__ = ["down", "recorded", "up"]


def up(options: argparse.Namespace) -> int:
    """Starts the mesh that the folder holds, or a new one, or those nodes of a detached one that have ended.
    Raises UsageError, NodeFailed."""
    folder: Path = options.dir
    known = recorded(folder)
    alive = running(folder)
    if known is not None and alive:
        _must_have_ended_nodes(folder, known, int(str(known.get("count"))) - len(alive), options)
    count = 5 if options.count is None else options.count
    port = 7400 if options.port is None else options.port
    if known is not None:
        was, at = known.get("count"), known.get("port")
        if options.count not in (None, was) or options.port not in (None, at):
            size = show.count(int(str(was)), "node")
            raise UsageError(f"{folder} holds a mesh of {size} from port {at}: name another --dir")
        count, port = int(str(was)), int(str(at))
    if not 1 <= count <= 50:
        raise UsageError(f"a mesh of {count} nodes cannot be started here: 1 to 50")
    if not 1 <= port <= 65536 - 2 * count:
        most = 65536 - 2 * count
        raise UsageError(
            f"no room for {show.count(count, 'node')} from port {port} on: --port is 1 to {most}"
        )
    if known is not None and options.insecure and known.get("keys"):
        raise UsageError(f"the mesh in {folder} was founded with keys: leave out --insecure")
    secure = not options.insecure if known is None else bool(known.get("keys"))
    folder.mkdir(parents=True, exist_ok=True)
    mesh = LocalMesh(folder, count, port, keys=folder / "keys" if secure else None, running=alive)
    interrupt.as_ctrl_c()
    failed = mesh.start(detach=options.detach, known=known is not None)
    mesh.record(detached=options.detach)
    stop = threading.Event()
    for number in interrupt.SIGNALS:
        signal.signal(number, lambda *_: stop.set())
    started = [n for n in mesh.to_start if n.process is not None]
    if options.json:
        key = str(mesh.client_key) if mesh.client_key else None
        show.print_json({"peers": mesh.peers, "nodes": [n.node for n in started], "keys": key})
    else:
        for node in started:
            show.out.print(f"node {node.number}  {node.address}  {node.node[:8]}  {node.data}")
        show.out.print(f"the mesh is up; use it with: vstack --help   (peers: {','.join(mesh.peers)})")
        at_hand = folder.resolve() == Path(".vstack").resolve()
        key = "" if mesh.client_key is None else f" --keys {mesh.client_key.absolute()}"
        where = "from another folder" if at_hand else "as it is not in ./.vstack"
        show.out.print(
            f"{where}, say which mesh{' and who you are' if key else ''}: --peers {mesh.peers[0]}{key}"
        )
        if options.detach:
            show.out.print(f"`vstack down{'' if at_hand else f' --dir {folder}'}` stops it")
    for failure in failed:
        show.warn(str(failure))
    if options.detach:
        return failed[0].exit_code if failed else 0
    with mesh:
        while not stop.wait(0.5):
            for node in mesh.nodes:
                if not node.alive and node.process is not None:
                    show.warn(f"node {node.number} ended: {node.last_words()}")
                    node.process = None
            if not any(n.process for n in mesh.nodes):
                show.err.print("vstack: all nodes have ended")
                return 1
    show.err.print("the mesh is down; its data stays in", str(folder))
    return 0


def _must_have_ended_nodes(
    folder: Path, known: dict[str, object], ended: int, options: argparse.Namespace
) -> None:
    """Raises UsageError unless some nodes of a detached mesh that runs are to be started again."""
    if not ended:
        raise UsageError(f"the mesh in {folder} is running already: `vstack down` stops it")
    what = f"the mesh in {folder} is running already, without {show.count(ended, 'node')} that ended"
    if not known.get("detached"):
        raise UsageError(f"{what}: end it with Ctrl-C or `vstack down`, and start all of it")
    if not options.detach:
        raise UsageError(f"{what}: `vstack up --detach` starts what is missing")


def down(options: argparse.Namespace) -> int:
    """Stops what `up --detach` started."""
    count = stop_recorded(options.dir)
    if options.json:
        show.print_json({"stopped": count})
    else:
        show.out.print(
            f"{show.count(count, 'node')} stopped" if count else f"no node of {options.dir} is running"
        )
    return 0
