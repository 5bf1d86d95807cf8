"""Many seeds, on all cores, and what came of them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean

from protocol.process import die_with_parent
from tests.sim.invariants import InvariantBroken
from tests.sim.swarm import Report, report, simulate

PROGRESS_SECONDS = 30.0
NICENESS = 10  # a laptop stays usable


def settle_in() -> None:
    die_with_parent()
    os.nice(NICENESS)


def run(seed: int) -> Report | str:
    try:
        return report(simulate(seed))
    except InvariantBroken as broken:
        return str(broken)
    except Exception as error:  # a machine that breaks down is a finding too, and no end of the sweep
        return f"seed {seed}: {type(error).__name__}: {error}"


def sweep(first: int, seeds: int, jobs: int) -> tuple[list[Report], list[str]]:
    """Reports of those that held, and what broke in the others; says so as it goes."""
    told = time.monotonic()
    reports: list[Report] = []
    failures: list[str] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=settle_in) as pool:
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


def summed_up(reports: list[Report], failures: list[str], took_seconds: float) -> str:
    seeds, rounds = len(reports) + len(failures), sum(each.rounds for each in reports)
    lines = [f"{seeds} seeds, {rounds} rounds, {len(failures)} failures, {seeds / took_seconds:.1f} seeds/s"]
    if reports:
        lines.append(f"attempts per round: {sum(each.attempts for each in reports) / rounds:.2f}")
        for what, waits in (
            ("the next certified round", [each.to_certify for each in reports]),
            ("everybody there", [each.to_settle for each in reports]),
            ("work of everybody who trains in a record", [each.to_bring for each in reports]),
        ):
            mean, most = fmean(waits), max(waits)
            lines.append(f"from the end of the faults to {what}: {mean:.2f} round times, at most {most:.2f}")
    return "\n".join(lines)
