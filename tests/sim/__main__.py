"""`python -m tests.sim --seed 7` replays one simulated swarm; `--seeds 10000` runs many on all cores, and says how fast."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean

from tests.sim.invariants import InvariantBroken
from tests.sim.swarm import Report, report, simulate

PROGRESS_SECONDS = 30.0


def run(seed: int) -> Report | str:
    try:
        return report(simulate(seed))
    except InvariantBroken as broken:
        return str(broken)


def replay(seed: int) -> int:
    try:
        world = simulate(seed)
    except InvariantBroken as broken:
        print(broken)
        return 1
    print("\n".join(world.trace))
    print(f"seed {seed}: {world.truth.certified} rounds certified, every invariant held")
    return 0


def many(first: int, seeds: int, jobs: int) -> tuple[list[Report], list[str]]:
    """Reports of those that held, and what broke in the others; says so as it goes."""
    told = time.monotonic()
    reports: list[Report] = []
    failures: list[str] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=os.nice, initargs=(10,)) as pool:
        for outcome in pool.map(run, range(first, first + seeds), chunksize=4):
            if isinstance(outcome, str):
                failures.append(outcome)
                print(outcome, flush=True)
            else:
                reports.append(outcome)
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                print(f"{len(reports)} seeds hold, {len(failures)} do not", flush=True)
    return reports, failures


def sweep(first: int, seeds: int, jobs: int) -> int:
    started = time.monotonic()
    reports, failures = many(first, seeds, jobs)
    took = time.monotonic() - started
    rounds = sum(each.rounds for each in reports)
    print(f"{seeds} seeds, {rounds} rounds, {len(failures)} failures, {seeds / took:.1f} seeds/s")
    if reports:
        print(f"attempts per round: {sum(each.attempts for each in reports) / rounds:.2f}")
        for what, waits in (
            ("the next certified round", [each.to_certify for each in reports]),
            ("everybody there", [each.to_settle for each in reports]),
        ):
            print(f"from the end of the faults to {what}: {fmean(waits):.2f} round times, at most {max(waits):.2f}")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed and print what happened")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    return sweep(arguments.first, arguments.seeds, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
