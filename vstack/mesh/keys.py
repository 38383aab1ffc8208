"""The keys of a mesh, and the files that they lie in.

    mesh.key    the mesh's own CURVE pair, and its founding admins. Whoever holds it may run a node
    node.key    a node's pair, in its data directory beside the votes: the key is bound to the NodeId
    NAME.key    a client's pair, and the mesh's public key, by which the client knows the nodes

All are TOML with a version and a kind; keys are 64 hex digits, which survive a shell and can be
told apart by their first eight. A file is written whole or not at all, mode 0600, never over
another one, and is on disk when the call returns. One that other users may read is not used.

A secret key leaves this module only towards a socket: no repr, error or log shows one.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import zmq
from msgspec import Meta
from zmq.utils import z85

from vstack.errors import UsageError
from vstack.mesh.config import Grant

MESH_KEY = "mesh.key"
NODE_KEY = "node.key"
ADMIN_KEY = "admin.key"
VERSION = 1

_Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Name = Annotated[str, Meta(min_length=1, max_length=64)]


@dataclass(frozen=True)
class KeyPair:
    """A CURVE pair, 32 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class MeshKey:
    """What `mesh.key` holds."""

    pair: KeyPair
    admins: tuple[Grant, ...]
    """The clients of the first configuration."""


@dataclass(frozen=True)
class NodeKeys:
    """What a node needs."""

    mesh: MeshKey
    own: KeyPair


@dataclass(frozen=True)
class ClientKey:
    """What a client needs. What it may do is not here: the configuration says so."""

    name: str
    mesh: bytes
    """The mesh's public key."""
    pair: KeyPair


class _AdminEntry(msgspec.Struct, forbid_unknown_fields=True):
    name: _Name
    public: _Hex


class _MeshFile(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal[1]
    kind: Literal["mesh"]
    public: _Hex
    secret: _Hex
    admins: list[_AdminEntry]


class _NodeFile(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal[1]
    kind: Literal["node"]
    public: _Hex
    secret: _Hex


class _ClientFile(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal[1]
    kind: Literal["client"]
    name: _Name
    mesh: _Hex
    public: _Hex
    secret: _Hex


_File = TypeVar("_File", _MeshFile, _NodeFile, _ClientFile)


def short(key: bytes) -> str:
    """What a person tells public keys apart by: the first eight hex digits."""
    return key.hex()[:8]


def parse_public(text: str) -> bytes:
    """64 hex digits -> the 32 bytes of a public key. Raises UsageError."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise UsageError("a public key is 64 hex digits, as `vstack keys new` prints it")
    return key


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(z85.decode(public), z85.decode(secret))


# -- making ---------------------------------------------------------------------------------------


def init_mesh(folder: Path, admin: str = "admin") -> ClientKey:
    """Makes `mesh.key` and its first admin's `admin.key`, which is returned. Raises UsageError."""
    _make_folder(folder)
    mesh = new_pair()
    for name in (ADMIN_KEY, MESH_KEY):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists, and keys are not replaced: name another folder")
    client = new_client(folder / ADMIN_KEY, mesh.public, admin)
    header = "Whoever has this file can run a node of the mesh. Copy it to its machines, and to no other."
    entries = f'\n[[admins]]\nname = {_quoted(admin)}\npublic = "{client.pair.public.hex()}"\n'
    _write(folder / MESH_KEY, header, "mesh", _pair_lines(mesh) + entries)
    return client


def new_client(path: Path, mesh: bytes, name: str) -> ClientKey:
    """Makes a client's pair and writes it to `path`. Raises UsageError."""
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise UsageError("the name of a key is 1 to 64 printable characters")
    pair = new_pair()
    header = "Whoever has this file is this client. Its role is in the mesh: vstack keys list."
    body = f'name = {_quoted(name)}\nmesh = "{mesh.hex()}"\n' + _pair_lines(pair)
    _write(path, header, "client", body)
    return ClientKey(name, mesh, pair)


def _pair_lines(pair: KeyPair) -> str:
    return f'public = "{pair.public.hex()}"\nsecret = "{pair.secret.hex()}"\n'


def _quoted(text: str) -> str:
    """A TOML string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"cannot make the folder {folder}: {e.strerror}") from e


def _write(path: Path, header: str, kind: str, body: str) -> None:
    """A link of the finished file: another one of that name is never replaced, nor half written."""
    text = f'# vstack key. {header}\nversion = {VERSION}\nkind = "{kind}"\n{body}'
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise UsageError(f"{path} exists, and keys are not replaced: name another file") from None
    except OSError as e:
        raise UsageError(f"cannot write the key {path}: {e.strerror}") from e


# -- reading --------------------------------------------------------------------------------------


def load_mesh(path: Path) -> MeshKey:
    """`mesh.key`, or the folder that holds it. Raises UsageError."""
    path = path / MESH_KEY if path.is_dir() else path
    found = _read(path, _MeshFile, "mesh")
    if not found.admins:
        raise UsageError(f"{path} names no admin: nobody could change a mesh that is founded with it")
    admins = tuple(Grant(bytes.fromhex(a.public), "admin", a.name) for a in found.admins)
    return MeshKey(_pair(path, found.public, found.secret), admins)


def load_client(path: Path) -> ClientKey:
    """Raises UsageError."""
    found = _read(path, _ClientFile, "client")
    return ClientKey(found.name, bytes.fromhex(found.mesh), _pair(path, found.public, found.secret))


def load_node(keys: Path, data: Path) -> NodeKeys:
    """The mesh's key, and the node's own from its data directory, made there at the first start.

    Raises UsageError.
    """
    mesh = load_mesh(keys)
    path = data / NODE_KEY
    if not path.exists():
        header = "It is this node's alone, and belongs to the votes beside it: do not copy it."
        _write(path, header, "node", _pair_lines(new_pair()))
    found = _read(path, _NodeFile, "node")
    return NodeKeys(mesh, _pair(path, found.public, found.secret))


def load_mesh_public(path: Path) -> bytes:
    """The mesh's public key, from its `mesh.key` (or the folder with it) or any client's file.

    Raises UsageError.
    """
    path = path / MESH_KEY if path.is_dir() else path
    if _table(path).get("kind") == "client":
        return load_client(path).mesh
    return load_mesh(path).pair.public


def _read(path: Path, kind: type[_File], name: str) -> _File:
    table = _table(path)
    if table.get("kind") != name:
        raise UsageError(f"{path} is not the key of a {name}")
    if table.get("version") != VERSION:
        raise UsageError(f"{path} is of another version than this vstack reads ({VERSION})")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as e:
        raise UsageError(f"{path} is damaged: {e}") from None


def _table(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as f:
            if stat.S_IMODE(os.fstat(f.fileno()).st_mode) & 0o077:
                raise UsageError(f"other users may read the key {path}: chmod 600 {path}")
            return tomllib.load(f)
    except FileNotFoundError:
        raise UsageError(
            f"there is no key {path}: `vstack keys init` and `vstack keys new` make keys"
        ) from None
    except OSError as e:
        raise UsageError(f"cannot read the key {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise UsageError(f"{path} is damaged: it is not TOML") from None


def _pair(path: Path, public: str, secret: str) -> KeyPair:
    pair = KeyPair(bytes.fromhex(public), bytes.fromhex(secret))
    if z85.decode(zmq.curve_public(z85.encode(pair.secret))) != pair.public:
        raise UsageError(f"{path} is damaged: its public and its secret key do not belong together")
    return pair


# -- finding --------------------------------------------------------------------------------------

PLAIN = "none"
"""Instead of the name of a key file: connect without keys."""


def find_client_key(
    given: str | None, environment: Mapping[str, str], folders: Sequence[Path]
) -> Path | None:
    """Where the client's key is: what was said, VSTACK_KEY, else the first of `folders` that has one.

    None: there is none, or `none` was said.
    """
    said = given or environment.get("VSTACK_KEY")
    if said:
        return None if said == PLAIN else Path(said)
    return next((path for path in folders if path.exists()), None)
