"""`python -m tests.sim --seed 7` replays one simulated swarm; `--seeds 10000` runs many on all cores, and says how fast."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.sim.invariants import InvariantBroken
from tests.sim.swarm import simulate
from tests.sim.sweep import summed_up, sweep


def replay(seed: int) -> int:
    try:
        world = simulate(seed)
    except InvariantBroken as broken:
        print(broken)
        return 1
    print("\n".join(world.trace))
    print(f"seed {seed}: {world.truth.certified} rounds certified, every invariant held")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed and print what happened")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    started = time.monotonic()
    reports, failures = sweep(arguments.first, arguments.seeds, arguments.jobs)
    print(summed_up(reports, failures, time.monotonic() - started))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
