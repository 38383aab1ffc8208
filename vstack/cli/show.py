"""How things look on a terminal: sizes, times, tables, progress. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

out = Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def plain(text: str) -> str:
    """Titles and names as they may be shown: control characters become visible escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def count(number: int, one: str) -> str:
    """1, "node" -> `1 node`; 2 -> `2 nodes`. For nouns that take an s."""
    return f"{number} {one}" if number == 1 else f"{number} {one}s"


def clock(seconds: float) -> str:
    """3723.4 -> `1:02:03`."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def print_json(value: object) -> None:
    """One document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    err.print(f"warning: {text}", markup=False, style="yellow")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A plain table on stdout, never cut; `right` are the columns that are flush right."""
    widths = [max(cell_len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for number, row in enumerate((columns, *rows)):
        cells = [
            " " * (w - cell_len(c)) + c if i in right else c + " " * (w - cell_len(c))
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        out.print("  ".join(cells).rstrip(), style="bold" if number == 0 else None, markup=False)


class Bar:
    """One line of progress; silent where stderr is no terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, stage: str, done: float, total: float) -> None:
        self._progress.update(self._task, description=stage, completed=done, total=total or None)


@contextmanager
def bar(label: str) -> Iterator[Bar]:
    """A progress bar in bytes on stderr, gone when it is done."""
    columns = (
        TextColumn("{task.description:<11}"), TextColumn("{task.fields[label]}", markup=False), BarColumn(),
        DownloadColumn(binary_units=True), TransferSpeedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield Bar(progress, progress.add_task("", total=None, label=plain(label)))


@contextmanager
def counting(label: str) -> Iterator[Bar]:
    """A progress bar that counts things, on stderr, gone when it is done."""
    columns = (TextColumn("{task.fields[label]}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield Bar(progress, progress.add_task("", total=None, label=plain(label)))
