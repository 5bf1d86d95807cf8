"""Many faults at once, by seed, for some minutes; then calm, and everything must be as if nothing had been.

make chaos PART=storm ARGS="--seed 7 --seconds 300"
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from protocol.errors import Refused
from tests.chaos import audit, report
from tests.chaos.causes import STAGES_OF_A_ROUND, STAGES_OF_THE_COORDINATOR, any_luck
from tests.chaos.faults import options
from tests.chaos.swarm import Swarm, ends_when_told

PAUSE_SECONDS = (0.5, 6.0)  # between two faults
HURT_SECONDS = (0.5, 20.0)  # that each lasts


class Storm:
    """What is broken at the moment, and when each is to be mended."""

    def __init__(self, swarm, luck):
        self.swarm, self.luck = swarm, luck
        self.mending = []  # (when, what)
        self.struck = Counter()

    def blow(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.strike()
            wake = time.monotonic() + self.luck.uniform(*PAUSE_SECONDS)
            while time.monotonic() < wake:
                self.mend(time.monotonic())
                time.sleep(0.1)
        self.mend(float("inf"))

    def mend(self, now):
        for each in [each for each in self.mending if each[0] <= now]:
            self.mending.remove(each)
            each[1]()

    def strike(self):
        causes = [self.kill, self.kill, self.kill_part, self.stop, self.die_at_a_stage, self.kill_coordinator]
        causes += [self.coordinator_dies_at_a_stage]
        if self.swarm.lan is not None:
            causes += [self.cut, self.cut, self.throttle]
        cause = self.luck.choice(causes)
        with suppress(psutil.Error, Refused, ValueError, OSError):  # it may be dead, or not yet whole
            if cause(self.luck.choice(self.swarm.members)) is not False:
                self.struck[cause.__name__.replace("_", " ")] += 1

    def later(self, what):
        self.mending.append((time.monotonic() + self.luck.uniform(*HURT_SECONDS), what))

    def kill(self, victim):
        if not victim.running:
            return False
        victim.kill()
        self.later(lambda: victim.running or victim.start())
        return True

    def kill_part(self, victim):
        if not victim.running:
            return False
        part = self.luck.choice([victim.p2pd, lambda: victim.part("node.swarm"), lambda: victim.part("node.trainer")])()
        part.kill()
        return True

    def stop(self, victim):
        if not victim.running:
            return False
        tree = victim.tree()
        for process in tree:
            process.suspend()
        self.later(lambda: [_resume(process) for process in tree])
        return True

    def die_at_a_stage(self, victim):
        if not victim.running:
            return False
        self.swarm.arena.order(victim.name, self.luck.choice(STAGES_OF_A_ROUND), self.luck.randint(1, 4))

        def revive():
            self.swarm.arena.withdraw(victim.name)
            if not victim.running:
                victim.start()

        self.later(revive)
        return True

    def kill_coordinator(self, _):
        if self.swarm.coordinator.ended():
            return False
        self.swarm.coordinator.kill()
        self.later(self.revive_coordinator)
        return True

    def coordinator_dies_at_a_stage(self, _):
        if self.swarm.coordinator.ended():
            return False
        stage = self.luck.choice(STAGES_OF_THE_COORDINATOR)
        self.swarm.arena.order(self.swarm.coordinator.name, stage, self.luck.randint(1, 20))
        self.later(self.revive_coordinator)
        return True

    def revive_coordinator(self):
        self.swarm.arena.withdraw(self.swarm.coordinator.name)
        if self.swarm.coordinator.ended():
            self.swarm.coordinator.start()

    def cut(self, victim):
        others = [None, *(member.index for member in self.swarm.others(victim))]
        some = self.luck.sample(others, self.luck.randint(1, len(others)))
        ways = self.luck.choice([(True, False), (False, True), (True, True)])
        pairs = [pair for other in some for pair, on in zip(_ways(victim.index, other), ways, strict=True) if on]
        for source, target in pairs:
            self.swarm.lan.cut(source, target)
        self.later(lambda: [self.swarm.lan.heal(source, target) for source, target in pairs])
        return True

    def throttle(self, victim):
        self.swarm.lan.slow(victim.index, self.luck.choice(["256kbit", "1mbit", "5mbit"]))
        self.later(lambda: self.swarm.lan.full_speed(victim.index))
        return True


def _ways(one, other):
    return (one, other), (other, one)


def _resume(process):
    with suppress(psutil.Error):
        process.resume()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--seconds", type=float, default=180.0)
    given = parser.parse_args()
    ends_when_told()
    swarm = Swarm(Path(tempfile.mkdtemp(prefix="barnraise-chaos-")) / "w", nodes=given.nodes)
    print(f"storm, seed {given.seed}: {given.nodes} nodes and a coordinator for {given.seconds:.0f} s", flush=True)
    try:
        swarm.start()
        swarm.settle(time.time())
        storm = Storm(swarm, any_luck(given.seed, "storm"))
        began = time.time()
        storm.blow(given.seconds)
        calm = time.time()
        inside = len(swarm.watch.after(began))
        wrong, taken = [], float("nan")
        try:
            taken = swarm.certified_after(calm).at - calm
            swarm.settle(calm)
        except AssertionError as error:
            wrong.append(str(error))
        found, facts = audit.everything(swarm, swarm.members)
        wrong += found + swarm.unplanned
    finally:
        swarm.close(keep=given.keep)
    print(f"\n{sum(storm.struck.values())} faults: {', '.join(f'{n} × {what}' for what, n in storm.struck.items())}")
    print(f"{inside} rounds were certified meanwhile; the next after it {taken:.1f} s into the calm")
    report.ending(wrong, facts)
    report.save(
        "storm",
        seed=given.seed,
        seconds=given.seconds,
        struck=storm.struck,
        rounds=inside,
        first_round_after_seconds=taken,
        wrong=wrong,
        facts=facts,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
