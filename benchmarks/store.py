"""The chunk store of one node: a million tiny pieces, and how fast an index is made anew.

    python benchmarks/store.py [--pieces 1000000] [--folder DIR] [--json]

Each start is a process of its own, so that its time and memory are its own: from the start of the interpreter
on, and the peak of its resident memory. The page cache is warm: what is measured is the store, not the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from vstack.cli import show
from vstack.mesh.registers import UPLOADED, PieceKey, UploadId
from vstack.node.store import ChunkStore, Piece

NODE = "5a" * 16
TINY = 1 << 10
LARGE = 2 << 20
BATCH = 5000

START = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from vstack.node.store import ChunkStore
store = ChunkStore(Path(sys.argv[1]), node=sys.argv[2])
ready = time.perf_counter() - began
figures = store.stats()
store.close()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps({"seconds": ready, "peak_mib": peak, "pieces": figures.pieces,
    "scanned": figures.start.scanned_records, "hinted": figures.start.hinted_records,
    "scanned_bytes": figures.start.scanned_bytes, "index_bytes": figures.index_bytes}))
"""


def pieces(count: int, size: int) -> Iterator[list[Piece]]:
    """Batches of pieces of `size` bytes, in no order of their keys."""
    rng = random.Random(size)
    filler = rng.randbytes(size)
    for first in range(0, count, BATCH):
        batch = []
        for number in range(first, min(first + BATCH, count)):
            payload = number.to_bytes(8, "big") + filler[8:]
            video = hashlib.sha256(number.to_bytes(8, "big")).hexdigest()
            key = PieceKey(video, UploadId(1, 1), number % 100, 0, UPLOADED)
            batch.append(Piece(key, 3, 5, 3 * size, hashlib.sha256(payload).digest(), payload))
        yield batch


def fill(folder: Path, count: int, size: int) -> float:
    """Stores the pieces; seconds."""
    began = perf_counter()
    store = ChunkStore(folder, node=NODE)
    for batch in pieces(count, size):
        if not all(result.durable for result in store.put(batch, verified=True)):
            raise SystemExit(f"{folder} has no room for {count} pieces of {size} bytes")
    store.close()
    return perf_counter() - began


def start(folder: Path) -> dict[str, float]:
    """Opens the store in a process of its own, and closes it."""
    command = [sys.executable, "-c", START, str(folder), NODE]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def without_hints(folder: Path) -> None:
    """Damages the end of every superblock, so that each has to be scanned."""
    for path in (folder / "superblocks").glob("*.vsb"):
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))


def lookups(folder: Path, count: int) -> dict[str, float]:
    """Times of 2000 lookups and of 2000 reads of random tiny pieces, in microseconds."""
    store = ChunkStore(folder, node=NODE)
    rng = random.Random(1)
    keys = []
    for _ in range(2000):
        number = rng.randrange(count)
        video = hashlib.sha256(number.to_bytes(8, "big")).hexdigest()
        keys.append(PieceKey(video, UploadId(1, 1), number % 100, 0, UPLOADED))
    found, read = [], []
    for key in keys:
        began = perf_counter()
        known = store.info(key)
        found.append(perf_counter() - began)
        if known is None:
            raise SystemExit(f"a piece of video {key.video} is not found")
    for key in keys:
        began = perf_counter()
        store.read(key)
        read.append(perf_counter() - began)
    store.close()
    return {
        "lookup_median_us": statistics.median(found) * 1e6,
        "lookup_p99_us": statistics.quantiles(found, n=100)[98] * 1e6,
        "read_median_us": statistics.median(read) * 1e6,
    }


def measure(folder: Path, count: int) -> dict[str, Any]:
    """All figures, as `--json` prints them."""
    tiny, large = folder / "tiny", folder / "large"
    figures: dict[str, Any] = {"pieces": count, "put_seconds": fill(tiny, count, TINY)}
    figures["valid_index"] = start(tiny)
    figures["lookups"] = lookups(tiny, count)
    shutil.rmtree(tiny / "index")
    figures["rebuild_by_hints"] = start(tiny)
    shutil.rmtree(tiny / "index")
    without_hints(tiny)
    figures["rebuild_by_scan"] = start(tiny)
    shutil.rmtree(tiny)
    fill(large, max(4, count * TINY // LARGE), LARGE)
    shutil.rmtree(large / "index")
    without_hints(large)
    figures["rebuild_large_by_scan"] = start(large)
    for name in ("rebuild_by_hints", "rebuild_by_scan", "rebuild_large_by_scan"):
        it = figures[name]
        it["records_per_second"] = (it["scanned"] + it["hinted"]) / it["seconds"]
        it["megabytes_per_second"] = it["scanned_bytes"] / it["seconds"] / 1e6
    return figures


def rows(figures: dict[str, Any]) -> list[list[str]]:
    out = []
    for name in ("valid_index", "rebuild_by_hints", "rebuild_by_scan", "rebuild_large_by_scan"):
        it = figures[name]
        rate, speed = it.get("records_per_second"), it.get("megabytes_per_second")
        out.append(
            [
                name.replace("_", " "),
                f"{it['pieces']:.0f}",
                f"{it['seconds']:.2f}",
                f"{it['peak_mib']:.0f}",
                "" if rate is None else f"{rate:.0f}",
                "" if not speed else f"{speed:.0f}",
            ]
        )
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/store.py", description=__doc__)
    parser.add_argument("--pieces", type=int, default=1_000_000, help="tiny pieces of 1 KiB")
    parser.add_argument("--folder", type=Path, help="where the stores are made (default: temporary)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options.pieces)
    if options.json:
        show.print_json(figures)
        return 0
    columns = ("start", "pieces", "seconds", "peak MiB", "records/s", "MB/s")
    show.table(columns, rows(figures), (1, 2, 3, 4, 5))
    found = figures["lookups"]
    show.out.print(
        f"lookup {found['lookup_median_us']:.0f} us median, {found['lookup_p99_us']:.0f} us p99; "
        f"read of 1 KiB {found['read_median_us']:.0f} us median; "
        f"stored {figures['pieces'] / figures['put_seconds']:.0f} pieces/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
