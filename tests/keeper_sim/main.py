"""Runs many seeds, and says how to run a failing one again."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from os import cpu_count
from time import perf_counter
from typing import NamedTuple

from tests.keeper_sim.ledger import Violation
from tests.keeper_sim.mutants import MUTANTS
from tests.keeper_sim.profile import PROFILES
from tests.keeper_sim.world import World

SLICE = 10
"""Seeds in one job."""


class Job(NamedTuple):
    profile: str
    first: int
    seeds: int
    mutant: str = ""


class Report(NamedTuple):
    figures: Counter[str]
    failures: list[str]
    """One line each: how to see it again, and what it is."""


def again(profile: str, seed: int, mutant: str = "") -> str:
    """The line that runs one seed again."""
    variant = f" --mutant {mutant}" if mutant else ""
    return f"python -m tests.keeper_sim.main --profile {profile} --seed {seed}{variant}"


def violation_of(profile: str, seed: int, mutant: str = "") -> tuple[str, Counter[str]]:
    """Runs one seed: what was violated, empty if nothing, and what happened in it."""
    if mutant:
        with MUTANTS[mutant].in_force() as parts:
            return _run(World(seed, profile, parts))
    return _run(World(seed, profile))


def _run(world: World) -> tuple[str, Counter[str]]:
    try:
        world.run()
    except Violation as violation:
        return str(violation), world.figures
    return "", world.figures


def run(job: Job) -> Report:
    report = Report(Counter(), [])
    for seed in range(job.first, job.first + job.seeds):
        violation, figures = violation_of(job.profile, seed, job.mutant)
        report.figures.update(figures)
        report.figures["seeds"] += 1
        if violation:
            report.failures.append(f"{again(job.profile, seed, job.mutant)}    # {violation[:300]}")
    return report


def first_caught(job: Job) -> int | None:
    """The first seed of the job that shows a violation."""
    seeds = range(job.first, job.first + job.seeds)
    return next((seed for seed in seeds if violation_of(job.profile, seed, job.mutant)[0]), None)


def run_all(jobs: Iterable[Job], workers: int | None = None) -> Iterator[Report]:
    """Reports as they come, in order."""
    slices = [
        job._replace(first=first, seeds=min(SLICE, job.first + job.seeds - first))
        for job in jobs
        for first in range(job.first, job.first + job.seeds, SLICE)
    ]
    if workers == 1:
        yield from map(run, slices)
        return
    with ProcessPoolExecutor(workers or cpu_count()) as pool:
        yield from pool.map(run, slices)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.keeper_sim.main", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many, of each profile")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--profile", choices=(*PROFILES, "all"), default="all")
    parser.add_argument("--mutant", choices=MUTANTS, default="", help="run a wrong variant instead")
    parser.add_argument("--jobs", type=int, default=None, help="processes; one per core by default")
    options = parser.parse_args(arguments)
    began = perf_counter()
    figures: Counter[str] = Counter()
    failures = 0
    profiles = PROFILES if options.profile == "all" else (options.profile,)
    jobs = [Job(p, options.seed, options.seeds, options.mutant) for p in profiles]
    for report in run_all(jobs, options.jobs):
        figures.update(report.figures)
        failures += len(report.failures)
        for line in report.failures:
            print(line, flush=True)
    seconds = perf_counter() - began
    told = ", ".join(f"{n} {what}" for what, n in sorted(figures.items()))
    print(f"{told}; {failures} violations, {seconds:.1f} s ({figures['seeds'] / seconds:.1f} seeds/s)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
