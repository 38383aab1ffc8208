"""The verbs that speak with a mesh, by name."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path

from vstack.cli import catalogue, health, keep, keys, mesh, playback, policy, storage, store
from vstack.mesh.mesh_client import MeshClient, connect

VERBS: dict[str, Callable[[MeshClient, argparse.Namespace], Awaitable[int]]] = {
    "put": store.put,
    "ls": catalogue.ls,
    "info": catalogue.info,
    "rm": catalogue.rm,
    "undelete": catalogue.undelete,
    "pin": catalogue.pin,
    "verify": catalogue.verify,
    "get": store.get,
    "play": playback.play,
    "status": health.status,
    "nodes": health.nodes,
    "storage": storage.storage,
    "scrub": storage.scrub,
    "repair": keep.repair,
    "gc": keep.gc,
    "keys": keys.run,
    "mesh": mesh.run,
    "policy": policy.policy,
}


async def run(options: argparse.Namespace, peers: str, key: Path | None) -> int:
    """Connects, with the client's key in the file `key` or without one, and runs one verb; its exit code."""
    async with connect(peers, keys=key) as client:
        return await VERBS[options.verb](client, options)
