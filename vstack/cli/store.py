"""`vstack put` and `vstack get`."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from vstack.cli import interrupt, show
from vstack.client import output
from vstack.client.catalogue import Video, find_with_table
from vstack.client.downloader import download, media_of
from vstack.client.uploader import Progress, UploadOptions, upload
from vstack.errors import BadInput, UsageError, VstackError
from vstack.mesh.mesh_client import MeshClient

MEDIA_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".m4a", ".mkv", ".mka", ".webm", ".avi", ".flv", ".ts", ".m2ts", ".mts",
    ".mpg", ".mpeg", ".mp3", ".aac", ".ogg", ".opus", ".wav", ".3gp",
)  # fmt: skip
"""What `put FOLDER` takes for media."""
_KNOWN = {
    "present": "was there already",
    "updated": "was there already; now has this title and redundancy",
    "undeleted": "was deleted; is there again",
}


async def put(mesh: MeshClient, options: argparse.Namespace) -> int:
    files = collect(options.files)
    if options.title is not None and (not options.title.strip() or len(files) != 1):
        raise UsageError("--title names a single file, and is not empty")
    results, failures = [], []
    for path in files:
        try:
            results.append(await _put_one(mesh, path, options))
        except VstackError as e:
            if len(files) == 1:
                raise
            failures.append((path, e))
            show.err.print(f"vstack: {e}")
    if options.json:
        failed = [{"file": str(p), "error": str(e), "exit_code": e.exit_code} for p, e in failures]
        show.print_json({"stored": results, "failed": failed})
    elif len(files) > 1:
        counts = Counter(str(r["state"]) for r in results)
        said = ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "none stored"
        show.err.print(f"{len(files)} files: {said}, {len(failures)} failed")
    return failures[0][1].exit_code if failures else 0


async def _put_one(mesh: MeshClient, path: Path, options: argparse.Namespace) -> dict[str, object]:
    with contextlib.ExitStack() as stack:
        new_title = ""
        if str(path) == "-":
            path, new_title = _spool(stack), "stdin"
        elif path.exists() and not path.is_file():
            raise BadInput(f"{path} is not a regular file: pipe it in with `vstack put - < {path}`")
        wanted = UploadOptions(
            title=options.title or "",
            redundancy=options.redundancy,
            erasure=options.erasure,
            opaque=options.opaque,
            salvage=options.salvage,
            new_title=new_title,
        )
        bar = stack.enter_context(show.bar((options.title or new_title or path.stem)[:40]))

        def tell(p: Progress) -> None:
            bar.update(p.stage, p.done, p.total)

        result = await upload(mesh, path, wanted, tell, lambda lost: options.yes or _ask(path, lost))
    record = result.video.record
    for text in result.warnings:
        show.warn(text)
    if not options.json:
        show.out.print(result.video.id)
        note = _KNOWN.get(result.state) or (
            f"{result.state}, {show.count(result.chunks, 'chunk')}, {show.size(record.size)}"
        )
        if result.state == "updated":
            note += f" ({record.redundancy}, fragments {record.erasure.name})"
        if result.resumed:
            note += f", {result.resumed} of them from before"
        show.err.print(f"{show.plain(record.title)}: {note}, in {result.seconds:.1f} s")
    return {
        "file": str(path),
        "id": result.video.id,
        "title": record.title,
        "state": result.state,
        "chunks": result.chunks,
        "resumed_chunks": result.resumed,
        "bytes": record.size,
        "seconds": round(result.seconds, 3),
        "warnings": list(result.warnings),
    }


def collect(names: list[str]) -> list[Path]:
    """The files that are meant; those in folders by their suffix. Raises BadInput."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in MEDIA_SUFFIXES)
        if not inside:
            raise BadInput(f"the folder {path} holds no media files")
        files += inside
    return files


def _spool(stack: contextlib.ExitStack) -> Path:
    """Standard input as a file, which is gone when `stack` closes: the id needs a first pass."""
    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="vstack-"))  # noqa: SIM115
    if sys.stdin.isatty():
        raise UsageError("`put -` reads standard input: pipe a file into it")
    # Not in a thread: Ctrl-C must end it, and nothing else runs meanwhile.
    interrupt.as_ctrl_c()
    shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    file.flush()
    if not file.tell():
        raise BadInput("standard input is empty")
    return Path(file.name)


def _ask(path: Path, lost: tuple[str, ...]) -> bool:
    for line in lost:
        show.warn(f"{path.name}: {line} will not be kept")
    if not sys.stdin.isatty():
        show.err.print("say --yes to store it without")
        return False
    return input("store it without? [y/N] ").strip().lower() in ("y", "yes")


async def get(mesh: MeshClient, options: argparse.Namespace) -> int:
    video, table = await find_with_table(mesh, options.video)
    target = Path(options.output) if options.output else _default_target(video)
    to_pipe = options.output == "-"
    if not to_pipe and target.is_dir():
        target = target / _default_target(video).name
    if not to_pipe and target.exists() and not options.force:
        raise UsageError(f"{target} exists: name another with -o, or replace it with --force")
    if not to_pipe and not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    with show.bar(video.record.title[:40]) as bar:
        done = await download(
            mesh,
            video,
            sys.stdout.buffer if to_pipe else target,
            lambda got, total: bar.update("getting", got, total),
            table,
        )
    report = {
        "id": video.id,
        "file": None if to_pipe else str(target),
        "bytes": done.bytes,
        "chunks": done.chunks,
        "seconds": round(done.seconds, 3),
        "served": done.served,
        "failovers": done.failovers,
    }
    if options.json and not to_pipe:
        show.print_json(report)
    elif not to_pipe:
        show.err.print(f"{target}: {show.size(done.bytes)} in {done.seconds:.1f} s")
    return 0


def _default_target(video: Video) -> Path:
    stem = re.sub(r"[/\\]", "_", show.plain(video.record.title)).lstrip(".")[:100] or video.id[:12]
    return Path(stem + output.default_extension(media_of(video)))
