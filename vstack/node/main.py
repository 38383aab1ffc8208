"""`vstack-node`: reads how it is to be started, claims its data directory, and runs one node."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import tomllib
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from vstack import __version__
from vstack.errors import DamagedData, UsageError, VstackError
from vstack.mesh.keys import NODE_KEY, load_node
from vstack.mesh.messages import MAX_WEIGHT, MAX_ZONE
from vstack.mesh.sockets import parse_address
from vstack.node.check import check
from vstack.node.disk import Disk
from vstack.node.recovery import rebuild_index
from vstack.node.server import Node
from vstack.node.settings import NodeSettings, NotOurMesh, Removed
from vstack.node.votes import VoteStore

EPILOG = """\
All machines of one mesh are started with the same list of --peers; the first time, they
found the mesh together and wait until all of them are there. Without --peers the node is
a mesh of one. The port and the next one are used: control and data.

exit codes: 0 stopped as asked, or sound; 1 failure (votes could not be written, or are
damaged), or --check found damage;
2 bad configuration or address; 3 the data directory is in use by another process;
4 the data directory is not this node's: of another mesh, or not made by vstack.
"""


NUMBERS = {"scrub_days", "reserve"}
"""Options that are numbers, in a configuration file too."""
MAX_SCRUB_DAYS = 3650
MAX_RESERVE = 90


class DataInUse(VstackError):
    exit_code = 3


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vstack-node",
        description="One node of a vstack mesh: stores pieces of video and votes on where they lie.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--listen", metavar="HOST:PORT", help="address to bind (default 127.0.0.1:7400)")
    p.add_argument("--advertise", metavar="HOST:PORT", help="address that others dial (default: --listen)")
    p.add_argument("--data", metavar="DIR", type=Path, help="data directory, made if absent (required)")
    p.add_argument("--peers", metavar="H:P,...", help="the addresses of all nodes, this one included")
    p.add_argument("--zone", metavar="NAME", help="failure domain: pieces of a chunk are spread over zones")
    p.add_argument("--capacity", metavar="SIZE", help="share of the pieces, as in 500G or 4T (default 1T)")
    p.add_argument("--config", metavar="FILE", type=Path, help="TOML file with the same names as keys")
    p.add_argument(
        "--keys",
        metavar="DIR",
        type=Path,
        help="where mesh.key is: encrypt and authenticate every connection",
    )
    p.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="listen beyond loopback without keys: anybody who reaches the port can do anything",
    )
    p.add_argument("--scrub-days", metavar="N", type=float,
                   help="read every piece once in so many days of running time (default 7)")  # fmt: skip
    p.add_argument("--reserve", metavar="PERCENT", type=float,
                   help="of the file system, left free by uploads, 0 to 90 (default 5)")  # fmt: skip
    p.add_argument("--log-format", choices=("text", "json"), help="of the log on stderr (default text)")
    p.add_argument(
        "--vote-journal", metavar="FILE", type=Path, help="append every accepted vote as JSON, for audits"
    )
    p.add_argument(
        "--with-parent",
        action="store_true",
        default=None,
        help="stop when stdin closes: for a program that starts nodes and must leave none behind",
    )
    p.add_argument(
        "--rejoin",
        action="store_true",
        default=None,
        help="set retired or damaged votes aside and join as a new member; the pieces stay on the disk",
    )
    p.add_argument(
        "--found", action="store_true", default=None, help="found a mesh of one, whatever the peers say"
    )
    p.add_argument(
        "--check",
        action="store_true",
        default=None,
        help="read all pieces of the stopped node, report damage, change nothing, and end",
    )
    p.add_argument(
        "--rebuild-index",
        action="store_true",
        default=None,
        help="make the index of the stopped node's pieces anew, and end",
    )
    p.add_argument("--version", action="version", version=f"vstack-node {__version__}")
    return p


def read_options(argv: list[str] | None) -> dict[str, Any]:
    """The command line over the config file. Raises UsageError for an unknown key."""
    given = {k: v for k, v in vars(build_parser().parse_args(argv)).items() if v is not None}
    path = given.pop("config", None)
    if path is None:
        return given
    try:
        from_file = tomllib.loads(path.read_text())
    except OSError as e:
        raise UsageError(f"cannot read the configuration {path}: {e.strerror}") from e
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"{path} is not TOML: {e}") from e
    known = NUMBERS | {
        "listen", "advertise", "data", "peers", "zone", "capacity", "keys", "insecure", "log_format",
    }  # fmt: skip
    from_file = {k.replace("-", "_"): v for k, v in from_file.items()}
    for key in from_file.keys() - known:
        raise UsageError(f"{path}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    if isinstance(from_file.get("peers"), list):
        from_file["peers"] = ",".join(str(p) for p in from_file["peers"])
    for key, value in from_file.items():
        if key in NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{path}: {key} needs a number")
        elif not isinstance(value, bool if key == "insecure" else str):
            raise UsageError(f"{path}: {key} needs {'true or false' if key == 'insecure' else 'a string'}")
    for name in ("data", "keys"):
        if name in from_file:
            from_file[name] = Path(from_file[name])
    return from_file | given


def parse_size(text: str) -> int:
    """`500G` -> bytes, in powers of 1024. Raises UsageError."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)i?B?", text.strip(), re.IGNORECASE)
    if not m:
        raise UsageError(f"{text!r} is not a size: write it as 500G or 4T")
    return int(float(m[1]) * 1024 ** " KMGTP".index(m[2].upper() or " "))


def settings_from(options: dict[str, Any]) -> NodeSettings:
    """Raises UsageError."""
    if "data" not in options:
        raise UsageError("a node needs a data directory: --data DIR")
    listen = options.get("listen", "127.0.0.1:7400")
    advertise = options.get("advertise", listen)
    host, _ = parse_address(listen)
    parse_address(advertise)
    peers = tuple(p.strip() for p in options.get("peers", "").split(",") if p.strip())
    for peer in peers:
        parse_address(peer)
    if "keys" in options and options.get("insecure"):
        raise UsageError("--keys and --insecure contradict each other: say one of them")
    if not is_loopback(host) and "keys" not in options and not options.get("insecure"):
        raise UsageError(
            f"{listen} is reachable by other machines, and without keys connections are not authenticated: "
            "make keys with `vstack keys init DIR` and say --keys DIR, listen on 127.0.0.1, "
            "or say --insecure if the network is yours alone"
        )
    if host in ("0.0.0.0", "::", "*") and "advertise" not in options:
        raise UsageError(f"{listen} says nothing that others could dial: add --advertise HOST:PORT")
    weight = max(1, round(parse_size(options.get("capacity", "1T")) / 2**30))
    if weight > MAX_WEIGHT:
        raise UsageError(f"--capacity {options['capacity']} is more than {MAX_WEIGHT >> 10}T")
    if len(options.get("zone", "")) > MAX_ZONE:
        raise UsageError(f"--zone may have {MAX_ZONE} characters")
    zone = options.get("zone", "")
    scrub_days = options.get("scrub_days", 7.0)
    if not 0 < scrub_days <= MAX_SCRUB_DAYS:
        raise UsageError(f"--scrub-days {scrub_days:g}: more than 0 days are needed, up to {MAX_SCRUB_DAYS}")
    reserve = options.get("reserve", 5.0)
    if not 0 <= reserve <= MAX_RESERVE:
        raise UsageError(f"--reserve {reserve:g}: a percentage from 0 to {MAX_RESERVE} is needed")
    return NodeSettings(
        listen,
        advertise,
        options["data"],
        peers,
        zone,
        weight,
        options.get("vote_journal"),
        found=bool(options.get("found")),
        scrub_days=scrub_days,
        reserve=reserve / 100,
    )


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def claim(folder: Path) -> int:
    """Makes the data directory and holds it for this process. Raises DataInUse, NotOurMesh, UsageError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()}
        if names and not names & {"lock", "votes"}:
            raise NotOurMesh(f"{folder} is not empty and was not made by vstack-node: name another --data")
        return Disk().lock(folder / "lock")
    except BlockingIOError:
        raise DataInUse(
            f"{folder} is in use by another vstack-node: stop that one, or name another"
        ) from None
    except OSError as e:
        raise UsageError(f"cannot use {folder} as data directory: {e.strerror}") from e


def set_votes_aside(folder: Path) -> None:
    """For `--rejoin`: what must not vote any more makes room for a new identity. Raises UsageError if
    the votes are good, or cannot be moved."""
    votes = folder / "votes"
    if not votes.exists():
        return
    try:
        VoteStore(votes).close()
    except DamagedData as e:
        aside = next(p for i in count(1) if not (p := folder / f"votes.aside-{i}").exists())
        logging.getLogger(__name__).warning("%s: set aside as %s", e, aside)
        try:
            # The key is the old identity's: another node may live with it, if this was a copy.
            (folder / NODE_KEY).unlink(missing_ok=True)
            votes.rename(aside)
        except OSError as error:
            raise UsageError(f"{votes} cannot be set aside: {error.strerror}") from error
    else:
        raise UsageError(f"the votes in {votes} are good: start without --rejoin")


def show_progress(done: int, total: int) -> None:
    print(f"\r{done / max(total, 1):4.0%} of {total / 1e9:.1f} GB", end="", file=sys.stderr, flush=True)


def look_after(options: dict[str, Any]) -> bool:
    """`--check` and `--rebuild-index`. False if there is damage. Raises VstackError, OSError."""
    if not options["data"].is_dir():
        raise UsageError(f"{options['data']} is not there")
    claim(options["data"])
    store = options["data"] / "store"
    progress = show_progress if sys.stderr.isatty() else None
    if options.get("rebuild_index"):
        start = rebuild_index(store, progress)
        erase_progress()
        print(
            f"index made anew in {start.seconds:.1f} s: {start.hinted_records} records from hints, "
            f"{start.scanned_records} by reading {start.scanned_bytes / 1e6:.0f} MB"
        )
    if not options.get("check"):
        return True
    report = check(store, progress)
    erase_progress()
    for problem in report.problems:
        print(problem)
    print(f"superblocks    {report.superblocks}, {report.without_hints} without hints")
    print(f"records        {report.records} whole, {report.torn_tails} unfinished at an end")
    size = f"{report.payload_bytes / 1e6:.1f} MB"
    print(f"pieces         {report.pieces}, {size}, {report.quarantined} quarantined")
    print(f"index          {report.index}")
    if report.dead_damage:
        print(f"damaged, dead  {report.dead_damage} records that nothing needs: they go with compaction")
    print("damage         " + (f"{len(report.problems)} places" if report.problems else "none"))
    return not report.problems


def erase_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class JsonLog(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": round(record.created, 3),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
        )


def set_up_log(kind: str) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLog() if kind == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def announce(node: Node) -> None:
    # What was made until now lives as long as the process: keep it out of the garbage collector's way.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # what a batch makes is freed by its references; cycles are few
    print(
        f"ready node={node.me} mesh={node.mesh} epoch={node.view.epoch} listen={node.settings.listen}",
        flush=True,
    )


def _stop_with_stdin(node: Node) -> None:
    while os.read(0, 4096):
        pass
    node.stop()


def main(argv: list[str] | None = None) -> None:
    """The entry point: never returns."""
    began = time.monotonic()
    try:
        options = read_options(argv)
        settings = settings_from(options)
        set_up_log(options.get("log_format", "text"))
        if options.get("check") or options.get("rebuild_index"):
            sys.exit(0 if look_after(options) else 1)
        claim(settings.data)
        if options.get("rejoin"):
            set_votes_aside(settings.data)
        if "keys" in options:
            settings = replace(settings, keys=load_node(options["keys"], settings.data))
        node = Node(settings, announce)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: node.stop())
        if options.get("with_parent"):
            threading.Thread(target=_stop_with_stdin, args=(node,), daemon=True).start()
        node.run()
    except Removed as e:
        print(f"vstack-node: {e}", file=sys.stderr)
        sys.exit(0)
    except VstackError as e:
        print(f"vstack-node: {e}", file=sys.stderr)
        sys.exit(e.exit_code if e.exit_code in (2, 3, 4) else 1)
    except OSError as e:
        print(f"vstack-node: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    logging.getLogger(__name__).info("stopped after %.0f s", time.monotonic() - began)
    sys.exit(0)


if __name__ == "__main__":
    main()
