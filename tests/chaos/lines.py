"""Rounds over bad lines: real nodes, a real coordinator, and packets that really come late, twice, out of order or never.

make chaos PART=lines [ARGS="--only 'IPv6' '20 %' --rounds 5 --seed 3"]       # root and ip, no netem

Three nodes train. In each weather a fourth joins, which has to end up in rounds; then it leaves, and the weather clears.
"all": the coordinator's line and every node's; every path then has this weather both ways. "one": the fourth's line.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from node import screen
from tests.chaos import audit, report
from tests.chaos.line import FINE, V4, V6, Lines, Weather, possible
from tests.chaos.swarm import NAMES, SETTINGS, Swarm, ends_when_told, until

MEMBERS = 3
IN_SECONDS = 300.0  # for a node that joins: until something by it is in a round
ROUND_SECONDS = 240.0
LONGER = {
    **SETTINGS,
    "rounds": {"inner_steps": [[1, 16]]},  # the rest as a run has it by default
    "leases": {"sequences": 2048, "seconds": 60.0},
}


@dataclass(frozen=True)
class Kind:
    """Which weather, where."""

    all: Weather = FINE  # out of every machine
    one: Weather = FINE  # out of and in to the one that joins
    up: Weather = FINE  # out of every node
    v6_only: str = ""  # "one" or "all"


KINDS = {
    "nothing": Kind(),
    "all: 300 ms round trip": Kind(all=Weather(delay=0.15)),
    "all: 50 ms, 1 % lost": Kind(all=Weather(delay=0.025, loss=0.01)),
    "all: 50 ms, 5 % lost": Kind(all=Weather(delay=0.025, loss=0.05)),
    "all: 50 ms, 20 % lost": Kind(all=Weather(delay=0.025, loss=0.20)),
    "all: 80 to 140 ms, 3 % lost, 3 % doubled, 10 % swapped": Kind(
        all=Weather(delay=0.04, jitter=0.03, loss=0.03, doubled=0.03, swapped=0.10)
    ),
    "all: 1 Mbit/s up": Kind(up=Weather(delay=0.02, bits_per_second=1e6)),
    "one: 300 ms, 20 % lost": Kind(one=Weather(delay=0.15, loss=0.2)),
    "one: 128 kbit/s, 200 ms": Kind(one=Weather(delay=0.1, bits_per_second=128e3, queue=2.0)),
    "one: 64 kbit/s, 200 ms": Kind(one=Weather(delay=0.1, bits_per_second=64e3, queue=2.0)),
    "one: IPv6 only": Kind(v6_only="one"),
    "all: IPv6 only": Kind(v6_only="all"),
}


class Drill:
    """One swarm, the weathers that it goes through, and the fourth node."""

    def __init__(self, swarm, lan, *, stays):
        self.swarm, self.lan = swarm, lan
        self.stays = stays
        self.one = None

    def falls(self, kind, index):
        for each in (None, *range(MEMBERS)):
            self.lan.becomes(each, out=kind.all if kind.all != FINE else FINE if each is None else kind.up)
        out = next((each for each in (kind.one, kind.all, kind.up) if each != FINE), FINE)
        self.lan.becomes(index, out=out, into=kind.one)

    def through(self, name, kind, rounds):
        swarm, joins = self.swarm, self.one is None
        one = self.one = self.one or swarm.newcomer()
        if kind.v6_only == "one":
            self.lan.has_v4(one.index, has=False)
        before = self.lan.counted()
        self.falls(kind, one.index)
        began = time.time()
        if joins:
            one.join(swarm.invite)
        try:
            row = self._watched(f"{name}{'; it joins' if joins else ''}", one, began, rounds)
        finally:
            self.falls(KINDS["nothing"], one.index)
        now = self.lan.counted()
        row["packets"] = {what: now[what] - before[what] for what in now}
        if not self.stays:
            self.leaves()
        if kind.v6_only == "one":
            self.lan.has_v4(one.index, has=True)
        for what, value in row.items():
            print(f"  {what}: {value}", flush=True)

    def leaves(self):
        """The fourth node, politely."""
        if self.one is not None:
            self.one.stop()
            self.one = None

    def _watched(self, name, one, began, rounds):
        swarm = self.swarm
        print(f"\n{name}", flush=True)
        key = until(lambda: one.key, f"{one.name} answers")
        row = {"name": name, "rostered after": None, "in a round after": None}
        seen = Counter()

        def inside():
            status = one.status()
            seen[f"{status['activity']}: {status['reason']}"] += 1
            if row["rostered after"] is None and status.get("rostered"):
                row["rostered after"] = time.time() - began
            return swarm.watch.contributed(key, began)

        try:
            row["in a round after"] = until(inside, f"{one.name} is in a round", seconds=IN_SECONDS).at - began
        except AssertionError as error:
            row["trouble"] = str(error)
        start = time.time()
        swarm.certified_after(start, rounds + 1, seconds=ROUND_SECONDS)
        ends = swarm.watch.after(start)[: rounds + 1]
        row["round seconds"] = statistics.median(b.at - a.at for a, b in pairwise(ends))
        keys = {member.name: member.key for member in (*swarm.members, one)}
        row["rounds"] = len(ends)
        row["in them"] = {
            n: sum(any(k.startswith(key) for k in each.tokens) for each in ends) for n, key in keys.items()
        }
        row["attempts"] = [each.attempt for each in ends]
        row["said"] = dict(seen)
        row["status"] = screen.status_lines(one.status())
        row["others"] = screen.status_lines(swarm.members[0].status())
        row["recent"] = [each["outcome"] for each in one.status()["recent"]]
        row["struck"] = [str(mark) for mark in swarm.coordinator.marks()]
        return row


def main():
    ends_when_told()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="weathers whose name has one of these")
    parser.add_argument("--stay", action="store_true", help="the fourth joins once, and goes through all weathers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the folder of the run")
    given = parser.parse_args()
    if not possible():
        print("left out: it takes root, ip and /dev/net/tun")
        return 0
    chosen = {name: kind for name, kind in KINDS.items() if any(word in name for word in given.only)}
    mixed = {name: kind for name, kind in chosen.items() if kind.v6_only != "all"}
    without = {name: kind for name, kind in chosen.items() if kind.v6_only == "all"}
    return max([played(given, kinds) for kinds in (mixed, without) if kinds])


def played(given, kinds):
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="barnraise-chaos-")) / "w"
    lan = Lines(len(NAMES), seed=given.seed)
    if any(kind.v6_only == "all" for kind in kinds.values()):
        for index in (None, *range(len(NAMES))):
            lan.has_v4(index, has=False)
    swarm = Swarm(folder, nodes=MEMBERS, settings=LONGER, lan=lan)
    swarm.coordinator.reached_at = (V4.format(1), f"[{V6.format(1)}]")
    drill = Drill(swarm, lan, stays=given.stay)
    try:
        swarm.start()
        swarm.settle(time.time())
        print(f"seed {given.seed}: everybody is in rounds after {time.monotonic() - began:.0f} s", flush=True)
        for name, kind in kinds.items():
            drill.through(name, kind, given.rounds)
        drill.leaves()
        wrong, facts = audit.everything(swarm, swarm.members)
        wrong += [f"struck: {mark}" for mark in swarm.coordinator.marks()]
    finally:
        swarm.close(keep=given.keep)
        lan.close()
    print(f"{time.monotonic() - began:.0f} s")
    report.ending(wrong + swarm.unplanned, facts)
    return 1 if wrong or swarm.unplanned else 0


if __name__ == "__main__":
    sys.exit(main())
