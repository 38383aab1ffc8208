"""The verbs that speak with a mesh, by name."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable

from vstack.cli import catalogue, health, playback, store
from vstack.client.mesh_client import MeshClient, connect

VERBS: dict[str, Callable[[MeshClient, argparse.Namespace], Awaitable[int]]] = {
    "put": store.put,
    "ls": catalogue.ls,
    "info": catalogue.info,
    "rm": catalogue.rm,
    "get": store.get,
    "play": playback.play,
    "status": health.status,
    "nodes": health.nodes,
}


async def run(options: argparse.Namespace, peers: str) -> int:
    """Connects and runs one verb; its exit code."""
    async with connect(peers) as mesh:
        return await VERBS[options.verb](mesh, options)
