"""Tahoe-LAFS on loopback: an introducer, five storage servers, and its web API.

Any 3 of 5 shares give a file back, and all five servers have to take theirs (happy = 5). Two client
nodes serve the web API: one as it comes, which speaks HTTPS with the storage servers, and one that is
told to speak Foolscap with them, as versions before 1.19 did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from programs import Http, Programs, Wrong

SERVERS = 5
PORTS = SERVERS + 5
REQUIREMENT = "tahoe-lafs==1.20.0"
PINNED = (
    REQUIREMENT,
    "attrs==26.1.0",
    "autobahn==26.10.2",
    "cryptography==50.0.2",
    "foolscap==24.9.0",
    "klein==24.8.0",
    "pyopenssl==26.4.0",
    "setuptools==65.5.0",
    "treq==26.7.0",
    "twisted==26.10.0",
    "werkzeug==3.1.9",
    "zfec==1.6.0.0",
)
"""What was seen to work with Python 3.11."""
HTTPS, FOOLSCAP = "https", "foolscap"


class Tahoe:
    """A grid that runs. One call at a time."""

    def __init__(self, programs: Programs, web: dict[str, str]) -> None:
        self._programs = programs
        self._http = Http()
        self._web = web
        """The address of the web API, by what is spoken behind it."""

    @property
    def pids(self) -> list[int]:
        return self._programs.pids

    def put(self, path: Path, way: str) -> str:
        """The capability to read what was stored."""
        return self._http.ask(self._web[way], "PUT", "/uri", path.read_bytes()).decode()

    def get(self, handle: str, way: str) -> list[bytes]:
        return [self._http.ask(self._web[way], "GET", f"/uri/{handle}")]

    def kill(self, count: int) -> None:
        for number in range(SERVERS - count, SERVERS):
            self._programs.kill(f"server-{number + 1}")

    def connected(self) -> bool:
        """Whether both client nodes have found all servers."""
        for web in self._web.values():
            servers = self._http.json(web, "/?t=json").get("servers")
            if not isinstance(servers, list):
                raise Wrong("Tahoe-LAFS does not say which servers it knows")
            up = [s for s in servers if str(s.get("connection_status")).lower().startswith("connected")]
            if len(up) < SERVERS:
                return False
        return True

    def close(self) -> None:
        self._http.close()


@contextmanager
def running(tahoe: Path, folder: Path, port: int) -> Iterator[Tahoe]:
    """Starts it on PORTS ports from `port`. Raises Wrong."""

    def create(kind: str, name: str, *options: str) -> Path:
        programs.run([str(tahoe), f"create-{kind}", *options, "--basedir", str(folder / name)])
        return folder / name / "tahoe.cfg"

    def start(name: str) -> None:
        programs.start(name, [str(tahoe), "run", "--allow-stdin-close", str(folder / name)])

    def listen(number: int) -> tuple[str, str]:
        return f"--port=tcp:{port + number}:interface=127.0.0.1", f"--location=tcp:127.0.0.1:{port + number}"

    with Programs(folder) as programs:
        create("introducer", "introducer", *listen(0))
        start("introducer")
        furl = folder / "introducer" / "private" / "introducer.furl"
        programs.wait_for("the introducer", furl.exists)
        introducer = f"--introducer={furl.read_text().strip()}"
        for number in range(1, SERVERS + 1):
            create("node", f"server-{number}", introducer, "--webport=none", *listen(number))
            start(f"server-{number}")
        web = {HTTPS: f"127.0.0.1:{port + SERVERS + 1}", FOOLSCAP: f"127.0.0.1:{port + SERVERS + 2}"}
        for way, address in web.items():
            webport = f"--webport=tcp:{address.rpartition(':')[2]}:interface=127.0.0.1"
            shares = ("--shares-needed=3", f"--shares-happy={SERVERS}", f"--shares-total={SERVERS}")
            config = create("client", f"client-{way}", introducer, webport, *shares)
            if way == FOOLSCAP:
                config.write_text(config.read_text().replace("[client]", "[client]\nforce_foolscap = true"))
            start(f"client-{way}")
        grid = Tahoe(programs, web)
        try:
            programs.wait_for("Tahoe-LAFS", grid.connected)
            yield grid
        finally:
            grid.close()
