"""Reads the command line, runs one verb, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path

from vstack import __version__
from vstack.cli import interrupt, keys, local, mesh, show, verbs
from vstack.errors import BadInput, UsageError, VstackError
from vstack.mesh.keys import ADMIN_KEY, find_client_key
from vstack.mesh.registers import Scheme, parse_scheme

EPILOG = """\
VIDEO is an id, a unique prefix of at least 6 characters, or a unique exact title.
Nodes are found through --peers, VSTACK_PEERS, `peers` in ./.vstack/config.toml, the mesh that `vstack up`
runs in this folder, or 127.0.0.1:7400: the first that is there.
Your key is --keys FILE, VSTACK_KEY, ./.vstack/keys/admin.key, or vstack/client.key in your configuration
folder: the first that is there. `none` means: without a key.

exit codes: 0 success; 1 failure; 2 wrong usage or configuration, or a key that may not do this; 3 the mesh
does not answer, or too few of its nodes do; 4 no such video, or more than one; 5 bad input: the source cannot
be stored, or the change is refused; 6 the outcome is unknown (repeat the command: it is safe); 7 damaged
data; 8 (status, repair) some node is down, or redundancy is lacking; 130 interrupted.

  vstack up                    a mesh of five nodes on this machine, until Ctrl-C
  vstack put holiday.mp4       store it; prints its id
  vstack play holiday          play it, decoding every frame
  vstack get holiday -o x.mp4  one playable file again
"""


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vstack",
        description="Video storage with no coordinator: a mesh of equal nodes keeps your video.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"vstack {__version__}")
    verbs_ = p.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help_: str, *, mesh: bool = True) -> argparse.ArgumentParser:
        v = verbs_.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        v.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if mesh:
            mesh_options(v)
        return v

    def mesh_options(v: argparse.ArgumentParser) -> None:
        v.add_argument("--peers", metavar="H:P,...", help="addresses of some nodes of the mesh")
        v.add_argument("--keys", metavar="FILE", dest="key", help="your key file; none: without a key")

    v = verb("up", "start a mesh on this machine, until Ctrl-C", mesh=False)
    v.add_argument("count", nargs="?", type=int, metavar="N", help="how many nodes, 1 to 50 (default 5)")
    v.add_argument("--detach", action="store_true",
                   help="leave the nodes running; `vstack down` ends them. "
                   "Starts again what has ended of such a mesh")  # fmt: skip
    v.add_argument("--port", type=int, help="first port (default 7400); each node takes two")
    v.add_argument("--dir", type=Path, default=Path(".vstack"), help="folder for data (default ./.vstack)")
    v.add_argument("--insecure", action="store_true", help="a mesh without keys")
    v = verb("down", "stop the nodes that `vstack up --detach` left running", mesh=False)
    v.add_argument("--dir", type=Path, default=Path(".vstack"), help="the folder given to `up`")

    v = verb("put", "store video files; folders recursively")
    v.add_argument("files", nargs="+", metavar="FILE|DIR", help="what to store; - reads standard input")
    v.add_argument("--title", help="instead of the file's name; for a single file")
    v.add_argument("--redundancy", choices=("auto", "replicated", "erasure"), help="default auto")
    v.add_argument("--erasure", type=erasure_code, metavar="K/M",
                   help="any K of M fragments give a chunk back (default: the policy)")  # fmt: skip
    v.add_argument("--opaque", action="store_true", help="store the bytes as they are")
    v.add_argument("--salvage", action="store_true", help="of a file that is cut short, store what is there")
    v.add_argument("--yes", action="store_true", help="accept what the stored form cannot keep")

    v = verb("ls", "list the videos")
    v.add_argument("--all", action="store_true", help="also those uploading, aborted or deleted")
    for name, help_ in (("info", "show a video: tracks, chunks, redundancy, where it lies"),
                        ("rm", "delete a video: it is hidden, and can be had back for a while"),
                        ("undelete", "have a deleted video back")):  # fmt: skip
        verb(name, help_).add_argument("video", metavar="VIDEO")

    v = verb("pin", "say how a video is to be kept: by its views, or always as copies or fragments")
    v.add_argument("video", metavar="VIDEO")
    v.add_argument("redundancy", choices=("auto", "replicated", "erasure"))
    v.add_argument("--erasure", type=erasure_code, metavar="K/M", help="how its fragments are made")
    v = verb("verify", "have every piece of a video read and compared with its hash")
    v.add_argument("video", metavar="VIDEO")
    v.add_argument("--repair", action="store_true", help="if something is not good, begin to repair now")

    v = verb("get", "write a video as one ordinary file")
    v.add_argument("video", metavar="VIDEO")
    v.add_argument("-o", "--output", metavar="FILE", help="default: its title in this folder; - for a pipe")
    v.add_argument("--force", action="store_true", help="replace a file that exists")

    v = verb("play", "play a video in real time, without a screen, and report how it went")
    v.add_argument("video", metavar="VIDEO")
    v.add_argument("--start", type=float, default=0.0, metavar="T", help="begin at T seconds")
    v.add_argument("--speed", type=float, default=1.0, metavar="X", help="play X times as fast")
    v.add_argument("--buffer", type=float, default=30.0, metavar="S", help="buffer at most S seconds")
    v.add_argument("--no-decode", action="store_true", help="fetch and verify only")

    v = verb("status", "health of the mesh, with reasons")
    verb("nodes", "the members, and how they see each other")

    v = verb("storage", "what the videos take on disk, by scheme and node, beside whole copies")
    v.add_argument("--videos", action="store_true", help="also video by video")
    v = verb("scrub", "have the nodes read all their pieces now, and wait for what they find")
    v.add_argument("--node", metavar="NODE", help="this one only: its id, the beginning of it, or an address")
    v.add_argument("--watch", action="store_true", help="begin none: wait for those that are under way")

    v = verb("policy", "how the mesh keeps its videos: shown, or changed with KEY=VALUE")
    v.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as in hot-views=1000 or undelete=24h")

    v = verb("repair", "have the nodes look for missing pieces now, and wait until they are back")
    v.add_argument("--rate", metavar="SIZE", help="bytes a second of each node, from now on: 32M")
    v.add_argument("--no-wait", action="store_true", help="only have them begin")
    v = verb("gc", "have the nodes look at pieces that no register names now, and tell what there is")
    v.add_argument("--no-wait", action="store_true", help="only have them begin")

    v = verb("mesh", "which machines are in the mesh: plan, add, remove, drain, recover", mesh=False)
    mesh.add_parser(v, mesh_options)

    v = verb("keys", "who may use the mesh: make, list, authorise and revoke keys", mesh=False)
    nouns = v.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help_: str, *, mesh: bool) -> argparse.ArgumentParser:
        a = nouns.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        # Said before the action or after it; not said after it, it stays as it was before.
        a.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document")
        if mesh:
            mesh_options(a)
        return a

    a = action("init", "make the keys of a new mesh: mesh.key for its nodes, admin.key for you", mesh=False)
    a.add_argument("folder", metavar="DIR", type=Path)
    a = action("new", "make a client's key, to be authorised", mesh=False)
    a.add_argument("file", metavar="FILE", type=Path)
    a.add_argument("--mesh", metavar="DIR|FILE", type=Path, required=True,
                   help="mesh.key, its folder, or the key of any client of the mesh")  # fmt: skip
    a.add_argument("--name", help="for people (default: the file's name)")
    action("list", "list the keys of the mesh's members and clients", mesh=True)
    a = action("authorise", "let a client use the mesh, or give it another role", mesh=True)
    a.add_argument("public", metavar="PUBLICKEY", help="as `vstack keys new` printed it")
    a.add_argument("--role", choices=("admin", "writer", "reader"), required=True)
    a.add_argument("--name", help="for people; left out, a known key keeps its own")
    a = action("revoke", "take a client's rights away, also on connections that are open", mesh=True)
    a.add_argument("who", metavar="KEY|NAME", help="its public key, the beginning of one, or its name")
    return p


def erasure_code(text: str) -> Scheme:
    """The value of an option K/M. Raises ArgumentTypeError."""
    try:
        return parse_scheme(text)
    except BadInput as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def find_peers(given: str | None) -> str:
    """Option, environment, configuration, default: the first that says something. Raises UsageError."""
    if given or os.environ.get("VSTACK_PEERS"):
        return given or os.environ["VSTACK_PEERS"]
    path = Path(".vstack/config.toml")
    if not path.exists():
        state = local.recorded(Path(".vstack"))
        peers = state.get("peers") if state else None
        return ",".join(peers) if isinstance(peers, list) else "127.0.0.1:7400"
    try:
        config = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from e
    for key in config.keys() - {"peers"}:
        raise UsageError(f"{path}: unknown key {key!r}; known is peers")
    peers = config.get("peers", "127.0.0.1:7400")
    return ",".join(peers) if isinstance(peers, list) else str(peers)


def find_key(given: str | None) -> Path | None:
    """The file of the client's key, None to connect without one."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    folders = (Path(".vstack/keys") / ADMIN_KEY, Path(home) / "vstack" / "client.key")
    return find_client_key(given, os.environ, folders)


def run(argv: list[str] | None) -> int:
    """The exit code of one command line."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help(sys.stderr)
        return UsageError.exit_code
    options = parser.parse_args(words)
    try:
        if options.verb == "up":
            return local.up(options)
        if options.verb == "down":
            return local.down(options)
        if options.verb == "keys" and options.action in keys.OFFLINE:
            return keys.OFFLINE[options.action](options)
        return interrupt.run(verbs.run(options, find_peers(options.peers), find_key(options.key)))
    except VstackError as e:
        show.err.print(f"vstack: {e}")
        return e.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        show.err.print(f"vstack: {e.strerror or e}{f': {e.filename}' if e.filename else ''}")
        return 1
    except KeyboardInterrupt:
        resumes = "; the same command resumes" if options.verb == "put" else ""
        show.err.print(f"vstack: interrupted{resumes}")
        return 130


def main() -> None:
    """The entry point: never returns."""
    sys.exit(run(None))
