"""Runs many seeds, on all cores, and says how to run a failing one again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from time import perf_counter
from typing import NamedTuple

from tests.sim.invariants import Violation
from tests.sim.mutants import MUTANTS, REAL
from tests.sim.profiles import NAMES
from tests.sim.world import Figures, World

SLICE = 25
"""Seeds in one job."""

MESSAGE = 300
"""Characters of a violation that are printed."""


class Job(NamedTuple):
    profile: str
    first: int
    seeds: int
    mutant: str = REAL.name
    long: bool = False
    blind: bool = False

    def world(self, seed: int, trace: bool = False) -> World:
        variant = MUTANTS.get(self.mutant, REAL)
        return World(seed, self.profile, variant, long=self.long, trace=trace, blind=self.blind)

    def again(self, seed: int) -> str:
        """The line that runs one seed of this job again."""
        mutant = f" --mutant {self.mutant}" if self.mutant in MUTANTS else ""
        long = " --long" if self.long else ""
        return f"scripts/simulate --profile {self.profile} --seed {seed}{mutant}{long}"


@dataclass
class Report:
    figures: Figures = field(default_factory=Figures)
    failures: list[str] = field(default_factory=list)
    """One line each: how to see it again, and what it is."""


def run(job: Job) -> Report:
    """All seeds of one job, in this process."""
    report = Report()
    for seed in range(job.first, job.first + job.seeds):
        world = job.world(seed)
        try:
            world.run()
        except Violation as violation:
            report.failures.append(f"{job.again(seed)}    # {str(violation)[:MESSAGE]}")
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
    parser.add_argument("--jobs", type=int, default=None, help="processes; one per core by default")
    parser.add_argument("--trace", action="store_true", help="print the hash of each seed's schedule, only")
    options = parser.parse_args(arguments)
    profiles = NAMES if options.profile == "all" else (options.profile,)
    jobs = [Job(p, options.seed, options.seeds, options.mutant or REAL.name, options.long) for p in profiles]
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
