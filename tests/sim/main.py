"""Runs many seeds, on all cores, and says how to run a failing one again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from os import cpu_count
from time import perf_counter
from typing import NamedTuple

from tests.sim.invariants import Violation
from tests.sim.mutants import MUTANTS, REAL
from tests.sim.profiles import NAMES, Profile
from tests.sim.world import Figures, World

SLICE = 25
"""Seeds in one job."""

MESSAGE = 300
"""Characters of a violation that are printed."""


Setting = int | float | bool | str
SMALLER: dict[str, tuple[Setting, ...]] = {
    "changes": (0.0,),
    "losses": (0.0,),
    "absences": (0.0,),
    "disaster": (False,),
    "power_cuts": (0.0,),
    "crashes": (0.0,),
    "partitions": (0.0,),
    "cuts": (0.0,),
    "damage": (0.0,),
    "undead": (0.0,),
    "slow": (0.0,),
    "duplicate": (0.0,),
    "loss": (0.0,),
    "lost_outcome": (0.0,),
    "echo": (0.0,),
    "rush": (0.0,),
    "rivals": (0.0,),
    "uploads": (0.0,),
    "delete": (0.0,),
    "stale": (0.0,),
    "ops": (0, 1, 2, 3, 5, 8, 12, 18, 26),
    "clients": (1, 2, 3),
    "videos": (1,),
    "chunks": (0, 1, 2),
    "spares": (0, 1, 2),
    "horizon": (1.0, 2.0, 3.0, 4.0),
}
"""What a failing profile is tried with, the smallest first."""


class Job(NamedTuple):
    profile: str
    first: int
    seeds: int
    mutant: str = REAL.name
    long: bool = False
    blind: bool = False
    settings: tuple[tuple[str, Setting], ...] = ()
    """What replaces parts of the profile."""

    def world(self, seed: int, trace: bool = False) -> World:
        variant = MUTANTS.get(self.mutant, REAL)
        settings = dict(self.settings)
        return World(
            seed, self.profile, variant, long=self.long, trace=trace, blind=self.blind, settings=settings
        )

    def again(self, seed: int) -> str:
        """The line that runs one seed of this job again."""
        mutant = f" --mutant {self.mutant}" if self.mutant in MUTANTS else ""
        long = " --long" if self.long else ""
        settings = "".join(f" --set {name}={value}" for name, value in self.settings)
        return f"scripts/simulate --profile {self.profile} --seed {seed}{mutant}{long}{settings}"


@dataclass
class Report:
    figures: Figures = field(default_factory=Figures)
    failures: list[str] = field(default_factory=list)
    """One line each: how to see it again, and what it is."""
    failed: list[tuple[Job, int]] = field(default_factory=list)
    """The same, as a job and a seed."""


def run(job: Job) -> Report:
    """All seeds of one job, in this process."""
    report = Report()
    for seed in range(job.first, job.first + job.seeds):
        world = job.world(seed)
        try:
            world.run()
        except Violation as violation:
            report.failures.append(f"{job.again(seed)}    # {str(violation)[:MESSAGE]}")
            report.failed.append((job, seed))
        report.figures.add(world.figures)
    return report


def first_caught(job: Job) -> int | None:
    """The first seed of the job that shows a violation."""
    for seed in range(job.first, job.first + job.seeds):
        try:
            job.world(seed).run()
        except Violation:
            return seed
    return None


def shrink(job: Job, seed: int) -> Job:
    """The job with the smallest profile that still fails, in whatever way: each part is made as small as
    it can be, one after the other, until none can be made smaller."""
    profile = job.world(seed).profile
    shrunk = True
    while shrunk:
        shrunk = False
        for name, values in SMALLER.items():
            now = dict(job.settings).get(name, getattr(profile, name))
            for value in values:
                if value >= now:
                    break
                smaller = job._replace(settings=tuple({**dict(job.settings), name: value}.items()))
                if first_caught(smaller._replace(first=seed, seeds=1)) is not None:
                    job, shrunk = smaller, True
                    break
    return job


def _setting(text: str) -> tuple[str, Setting]:
    """`name=value`, of a part of a profile. Raises ArgumentTypeError."""
    name, _, value = text.partition("=")
    known = {f.name: f.default for f in fields(Profile)}
    kind = type(known.get(name))
    if kind not in (int, float, bool, str):
        raise argparse.ArgumentTypeError(f"{name} is no number of a profile")
    try:
        return name, value == "True" if kind is bool else kind(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sliced(job: Job) -> Iterator[Job]:
    for first in range(job.first, job.first + job.seeds, SLICE):
        yield job._replace(first=first, seeds=min(SLICE, job.first + job.seeds - first))


def run_all(jobs: Iterable[Job], workers: int | None = None) -> Iterator[Report]:
    """Reports as they come, in order."""
    with ProcessPoolExecutor(workers or cpu_count()) as pool:
        yield from pool.map(run, jobs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (of each profile)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--profile", choices=(*NAMES, "all"), default="mixed")
    parser.add_argument("--mutant", choices=MUTANTS, default=None, help="run a wrong variant instead")
    parser.add_argument("--long", action="store_true", help="five times as long, five times the operations")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="look for the smallest profile that still fails; by default for a single seed",
    )
    parser.add_argument("--jobs", type=int, default=None, help="processes; one per core by default")
    parser.add_argument("--trace", action="store_true", help="print the hash of each seed's schedule, only")
    options = parser.parse_args(arguments)
    profiles = NAMES if options.profile == "all" else (options.profile,)
    mutant, settings = options.mutant or REAL.name, tuple(options.set)
    jobs = [Job(p, options.seed, options.seeds, mutant, options.long, settings=settings) for p in profiles]
    if options.trace:
        for job in jobs:
            for seed in range(job.first, job.first + job.seeds):
                world = job.world(seed, trace=True)
                world.run()
                print(job.profile, seed, world.trace_hash())
        return 0
    began = perf_counter()
    figures, failures = Figures(), 0
    for report in run_all([part for job in jobs for part in sliced(job)], options.jobs):
        figures.add(report.figures)
        failures += len(report.failures)
        for line in report.failures:
            print(line, flush=True)
        if options.shrink if options.shrink is not None else options.seeds == 1:
            for job, seed in report.failed:
                print(f"smallest: {shrink(job, seed).again(seed)}", flush=True)
    seconds = perf_counter() - began
    print(
        f"{figures.seeds} seeds, {figures.operations} tries of operations, {figures.messages} messages, "
        f"{figures.epochs} epoch changes, {figures.crashes} crashes, {figures.lost_disks} lost disks, "
        f"{figures.decisions} decisions, {figures.undecided} histories undecided, {failures} violations, "
        f"{seconds:.1f} s ({figures.seeds / seconds:.0f} seeds/s)"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
