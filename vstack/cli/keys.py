"""`vstack keys`: who may use the mesh."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable

from vstack.cli import show
from vstack.errors import NotFound, UsageError
from vstack.mesh.changes import Authorise, Revoke
from vstack.mesh.config import Grant, Role
from vstack.mesh.keys import ADMIN_KEY, MESH_KEY, init_mesh, load_mesh_public, new_client, parse_public, short
from vstack.mesh.mesh_client import MeshClient

MIN_PREFIX = 8
"""Hex digits that name a key, where they name one alone."""


def init(options: argparse.Namespace) -> int:
    """`keys init DIR`."""
    admin = init_mesh(options.folder)
    if options.json:
        files = {"mesh": str(options.folder / MESH_KEY), "admin": str(options.folder / ADMIN_KEY)}
        show.print_json({**files, "admin_public": admin.pair.public.hex()})
    else:
        show.out.print(f"{options.folder / MESH_KEY}   for the machines of the mesh: vstack-node --keys DIR")
        show.out.print(f"{options.folder / ADMIN_KEY}  for you, its first admin: vstack --keys FILE")
    return 0


def new(options: argparse.Namespace) -> int:
    """`keys new FILE`."""
    name = options.file.stem if options.name is None else options.name
    client = new_client(options.file, load_mesh_public(options.mesh), name)
    public = client.pair.public.hex()
    if options.json:
        show.print_json({"file": str(options.file), "name": name, "public": public})
    else:
        show.out.print(public)
        show.err.print(f"an admin lets it in: vstack keys authorise {public} --role ROLE --name NAME")
    return 0


OFFLINE: dict[str, Callable[[argparse.Namespace], int]] = {"init": init, "new": new}
"""Actions that need no mesh."""


async def run(mesh: MeshClient, options: argparse.Namespace) -> int:
    return await _ACTIONS[options.action](mesh, options)


async def _list(mesh: MeshClient, options: argparse.Namespace) -> int:
    config = mesh.config
    members = [(m.key, "node", m.node[:8]) for m in config.members if m.key]
    rows = members + [(g.key, g.role, g.name) for g in config.grants]
    if options.json:
        keys = [{"public": key.hex(), "role": role, "name": name} for key, role, name in rows]
        show.print_json({"epoch": config.epoch, "keys": keys})
    elif rows:
        show.table(("key", "role", "name"), [(short(k), role, show.plain(name)) for k, role, name in rows])
    else:
        show.out.print("this mesh uses no keys: whoever reaches its ports may do anything")
    return 0


async def _authorise(mesh: MeshClient, options: argparse.Namespace) -> int:
    if not mesh.config.grants:
        raise UsageError("this mesh uses no keys: there is nothing to authorise")
    grant = wanted(mesh.config.grants, parse_public(options.public), options.role, options.name)
    if grant in mesh.config.grants:
        _say(options, grant, f"{_shown(grant)} is authorised already: nothing changes", mesh.config.epoch)
        return 0
    epoch = await mesh.change_mesh(Authorise(grant))
    _say(options, grant, f"{_shown(grant)} is authorised, from epoch {epoch} on", epoch)
    return 0


def wanted(grants: tuple[Grant, ...], key: bytes, role: Role, name: str | None) -> Grant:
    """What a client is to be: without a name (None) it keeps the one it has.

    Raises UsageError if the name cannot be one, or is another client's.
    """
    if name is None:
        name = next((g.name for g in grants if g.key == key), "")
    if len(name) > 64 or not name.isprintable():
        raise UsageError("the name of a key has at most 64 printable characters")
    other = next((g for g in grants if name and g.name == name and g.key != key), None)
    if other is not None:
        raise UsageError(
            f"{name!r} is the name of another client, {short(other.key)}: choose another, or revoke that one"
        )
    return Grant(key, role, name)


async def _revoke(mesh: MeshClient, options: argparse.Namespace) -> int:
    grant = _named(mesh.config.grants, options.who)
    epoch = await mesh.change_mesh(Revoke(grant.key))
    _say(options, grant, f"{_shown(grant)} is revoked, from epoch {epoch} on", epoch)
    return 0


def _shown(grant: Grant) -> str:
    return f"{grant.role} {short(grant.key)}" + (f" ({show.plain(grant.name)})" if grant.name else "")


def _say(options: argparse.Namespace, grant: Grant, text: str, epoch: int) -> None:
    if options.json:
        show.print_json({"epoch": epoch, "public": grant.key.hex(), "role": grant.role, "name": grant.name})
    else:
        show.out.print(text)


def _named(grants: tuple[Grant, ...], who: str) -> Grant:
    """The one client that a public key, its beginning, or a name means. Raises NotFound."""
    by_key = [g for g in grants if len(who) >= MIN_PREFIX and g.key.hex().startswith(who.lower())]
    found = by_key or [g for g in grants if g.name == who]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(short(g.key) for g in found)
        raise NotFound(f"{who!r} names several clients ({several}): name one by its key")
    raise NotFound(f"no client has the key or name {who!r}: `vstack keys list` shows all")


_ACTIONS: dict[str, Callable[[MeshClient, argparse.Namespace], Awaitable[int]]] = {
    "list": _list,
    "authorise": _authorise,
    "revoke": _revoke,
}
