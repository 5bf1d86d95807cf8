"""A whole swarm on slow lines: how busy its trainers are, where a round's time goes, and what crosses each line.

Each node has a network namespace of its own behind a token bucket, both ways, and every rate a swarm of its own. The
nodes share this machine's cores, so a step counts as a step even when it waits for one: the share says whether the
network holds training up. Phases are looked up twice a second at every node. Needs root; nothing outside is reached.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.bench import ethernet, llama
from tests.bench.table import Row, show
from tests.chaos.swarm import SETTINGS, Swarm, ends_when_told

LOOK_SECONDS = 0.5
ROUND_SECONDS_MAX = 900.0
GOALS = {"1000mbit": 0.98, "100mbit": 0.98, "20mbit": 0.95}  # Covenant-72B: 94.5 % at 110 Mbit/s; INTELLECT-1: 83 %
PHASES = ("training", "gathering", "averaging", "deciding", "folding")


@dataclass(frozen=True)
class Measured:
    busy: float  # share of wall time in inner steps, of the least busy node
    round_seconds: float
    phases: dict[str, float]  # share of time, mean of the nodes
    sent: float  # bytes of one node in a round, as its interface counts them
    missing: int  # contributions that a round went without


def measure(rate: str, given: argparse.Namespace) -> tuple[Measured, int]:
    """And how many parameters the model has."""
    swarm = Swarm(Path(tempfile.mkdtemp(prefix="barnraise-bench-")) / "w", nodes=given.nodes, settings=_settings(given))
    try:
        swarm.start()
        swarm.settle(time.time(), seconds=ROUND_SECONDS_MAX)
        for member in swarm.members:
            swarm.lan.slow(member.index, rate)
        start = swarm.certified_after(time.time(), seconds=ROUND_SECONDS_MAX)
        before, seen = _sent(swarm), Counter[str]()
        newest = start
        while newest.round < start.round + given.rounds:
            for member in swarm.members:
                seen[str(member.status().get("phase"))] += 1
            time.sleep(LOOK_SECONDS)
            newest = swarm.watch.in_order()[-1]
            assert time.time() < newest.at + ROUND_SECONDS_MAX, "no round was certified"
        inside = [each for each in swarm.watch.after(start.at) if each.at <= newest.at]
        sent = (_sent(swarm) - before) / len(inside) / len(swarm.members)
        missing = sum(len(swarm.members) - len(each.tokens) for each in inside)
        busy = min(member.status()["busy_share"] for member in swarm.members)
        shares = {phase: seen[phase] / seen.total() for phase in PHASES}
        return Measured(busy, (newest.at - start.at) / len(inside), shares, sent, missing), _parameters(swarm)
    finally:
        swarm.close()


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {
        **SETTINGS,
        "run": {**SETTINGS["run"], "min_nodes": given.nodes},
        "model": {"config": llama.sizes(given.hidden)},
        "rounds": {"inner_steps": [[1, given.steps]], "gather_seconds": 5.0, "deadline_seconds": 120.0},
        "leases": {"sequences": 4096, "seconds": 300.0},
        "update": {"codec": given.codec},
        "evaluate": {"sequences": 32, "every_rounds": 1000, "base_every_rounds": 1000},
    }


def _sent(swarm: Any) -> int:
    return sum(swarm.lan.counted(member.index).sent for member in swarm.members)


def _parameters(swarm: Any) -> int:
    return max(part.stop for part in swarm.coordinator.entries()[-1].record.parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1000mbit", "100mbit", "20mbit", "5mbit"])
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="inner steps: about a minute of six nodes on two cores")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--codec", default="int4")
    given = parser.parse_args()
    if not ethernet.possible():
        print("slow_network: not measured; lines of their own need root and iproute2.")
        return
    ends_when_told()
    rows, parameters = [], 0
    for rate in given.rates:
        measured, parameters = measure(rate, given)
        rows += [
            Row(f"{rate}: not in inner steps, the least busy node", 1 - measured.busy, at_most=_goal(rate)),
            Row("  a round", measured.round_seconds, "s", digits=1),
            Row("  sent by a node in a round", measured.sent / parameters, "bytes/parameter", digits=4),
            Row("  contributions that rounds went without", measured.missing, digits=0),
            *(Row(f"  of a node's time: {phase}", share) for phase, share in measured.phases.items()),
        ]
        print(f"  {rate}: busy {measured.busy:.3f}, rounds of {measured.round_seconds:.0f} s", flush=True)
    mean = fmean(row.value for row in rows if row.what == "  a round")
    show(
        "slow_network", rows, f"{given.nodes} nodes, {given.codec}, {parameters:,} parameters, rounds of {mean:.0f} s."
    )


def _goal(rate: str) -> float | None:
    return round(1 - GOALS[rate], 2) if rate in GOALS else None


if __name__ == "__main__":
    main()
