"""What meshes of 10, 100 and 1,000 nodes cost each node, in a simulator with virtual time.

The nodes are the product's own: gossip, acceptors, proposers, groups and placement; the network is
simulated (mean delay 2 ms, no loss). So the times are virtual seconds, and they and all counts are the
same on every machine. Bytes are the encoded messages, without what ZeroMQ, CURVE and TCP add.

    python benchmarks/scale.py [--nodes 10 100 1000] [--videos 20000] [--json]
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.sim.scale import (
    drawn_balance,
    group_balance,
    measure_decisions,
    measure_gossip,
    members,
    piece_balance,
)
from vstack.cli import show

MANY = 10
"""How many times more videos the last column of the balance of groups has."""
WEIGHTS = (1, 1, 1, 1, 1, 2, 2, 2, 4, 4)
"""Capacities of ten unlike nodes: the largest four times the smallest."""
PIECES = (1, 3, 5)
"""Pieces of a chunk: the first alone, three copies, five fragments."""

GOSSIP_ROWS = (
    ("messages / node / s, quiet", "messages", 2),
    ("bytes / node / s, quiet", "bytes", 0),
    ("messages / node / s, change", "change_messages", 2),
    ("bytes / node / s, change", "change_bytes", 0),
    ("start: all know all, s", "acquainted", 1),
    ("epoch heard by 99 %, s", "heard_99", 1),
    ("epoch heard by 100 %, s", "heard_100", 1),
    ("all know that all adopted it, s", "adopted_100", 1),
    ("crash: first suspicion, s", "suspected", 1),
    ("crash: first holds it for down, s", "down_first", 1),
    ("crash: 99 % do, s", "down_99", 1),
    ("crash: 100 % do, s", "down_100", 1),
)


def measure(nodes: list[int], videos: int) -> dict[str, Any]:
    """All figures, as `--json` prints them. The largest meshes start first; two processes at most."""
    unlike = members(len(WEIGHTS), WEIGHTS)
    with ProcessPoolExecutor(2) as pool:
        gossip = {n: pool.submit(measure_gossip, n) for n in sorted(nodes, reverse=True)}
        groups = {n: pool.submit(group_balance, n, videos) for n in nodes}
        pieces = {n: pool.submit(piece_balance, members(n), videos, PIECES) for n in nodes}
        weighted = pool.submit(piece_balance, unlike, videos, PIECES)
        drawn = {
            (n, v): pool.submit(drawn_balance, n, min(n, 5), v)
            for n in nodes
            for v in (videos, MANY * videos)
        }
        decisions = {n: pool.submit(measure_decisions, n) for n in nodes}
        return {
            "nodes": nodes,
            "videos": videos,
            "gossip": {str(n): asdict(gossip[n].result()) for n in nodes},
            "decisions": {str(n): decisions[n].result() for n in nodes},
            "groups": {str(n): groups[n].result() for n in nodes},
            "groups_drawn": {str(n): [drawn[n, v].result() for v in (videos, MANY * videos)] for n in nodes},
            "pieces": {str(n): pieces[n].result() for n in nodes},
            "pieces_weighted": weighted.result(),
        }


def print_report(report: dict[str, Any]) -> None:
    """The tables, on stdout."""
    nodes = report["nodes"]
    columns = ("", *(f"n = {n}" for n in nodes))
    right = tuple(range(1, len(columns)))
    rows = [
        (label, *(f"{report['gossip'][str(n)][name]:.{digits}f}" for n in nodes))
        for label, name, digits in GOSSIP_ROWS
    ]
    show.out.print("Gossip (virtual seconds; mean delay 2 ms)", style="bold")
    show.table(columns, rows, right)
    show.out.print("\nMessages between nodes for one decision", style="bold")
    first = report["decisions"][str(nodes[0])]
    rows = [(what, *(str(report["decisions"][str(n)][what]) for n in nodes)) for what in first]
    show.table(columns, rows, right)
    videos = report["videos"]
    show.out.print("\nMost on a node over the mean", style="bold")
    rows = [(f"groups of {videos} videos", *(f"{report['groups'][str(n)]:.3f}" for n in nodes))]
    for i, count in enumerate((videos, MANY * videos)):
        label = f"the same, {count} drawn evenly at random"
        rows.append((label, *(f"{report['groups_drawn'][str(n)][i]:.3f}" for n in nodes)))
    for i, k in enumerate(PIECES):
        label = f"first {k} pieces of {videos} chunks"
        rows.append((label, *(f"{report['pieces'][str(n)][i]:.3f}" for n in nodes)))
    show.table(columns, rows, right)
    weights = ", ".join(map(str, WEIGHTS))
    show.out.print(f"\nMost on a node over its share by weight (ten nodes: {weights})", style="bold")
    rows = [(f"first {k} pieces", f"{report['pieces_weighted'][i]:.3f}") for i, k in enumerate(PIECES)]
    show.table(("", "n = 10"), rows, (1,))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/scale.py", description=__doc__)
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[10, 100, 1000], help="sizes of meshes, from 6"
    )
    parser.add_argument("--videos", type=int, default=20_000, help="videos, and chunks, that are spread")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    options = parser.parse_args(argv)
    if min(options.nodes) < 6 or options.videos < 1:
        parser.error("meshes need at least 6 nodes, and something to spread")
    began = perf_counter()
    report = measure(options.nodes, options.videos)
    if options.json:
        show.print_json(report)
    else:
        print_report(report)
        show.err.print(f"measured in {perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
