"""`python -m tests.sim --seed 7` replays one simulated swarm; `--seeds 1000` runs many and says how fast."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.swarm import InvariantBroken, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed and print what happened")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        try:
            world = simulate(arguments.seed)
        except InvariantBroken as broken:
            print(broken)
            return 1
        print("\n".join(world.trace))
        print(f"seed {arguments.seed}: {len(world.certified)} rounds certified, every invariant held")
        return 0
    started = time.monotonic()
    rounds = failures = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            rounds += len(simulate(seed).certified)
        except InvariantBroken as broken:
            failures += 1
            print(broken)
    took = time.monotonic() - started
    print(f"{arguments.seeds} seeds, {rounds} rounds, {failures} failures, {arguments.seeds / took:.1f} seeds/s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
