"""One fault after the other against a running swarm, and what became of the round each time.

make chaos PART=faults ARGS="--only p2pd --tries 3 --seed 7"
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.chaos import audit, report
from tests.chaos.causes import FAULTS, any_luck
from tests.chaos.swarm import Swarm, ends_when_told
from tests.e2e.processes import until

WARM_ROUNDS = 8
QUIET_ROUNDS = 1  # between two faults, to know how long a round takes now


@dataclass
class Trial:
    """What came of one fault."""

    fault: str
    number: int
    round: int = -1  # that was open when it struck
    outcome: str = "?"
    recovery_seconds: float | None = None  # until the next certified round
    during: int = 0  # rounds certified while it lasted
    back_seconds: float | None = None  # until the last victim was in a round again, once it was over
    coordinator_seconds: float | None = None
    late_rounds: int | None = None  # rounds between a joiner's sync and its first contribution
    rounds_lost: int | None = None  # not counted yet
    sequences_lost: int | None = None
    sequences_doubled: int | None = None
    note: str = ""
    troubles: list = field(default_factory=list)


class Drill:
    """The swarm, the rounds of quiet hours, and the trials so far."""

    def __init__(self, swarm, seed):
        self.swarm = swarm
        self.seed = seed
        self.quiet = []  # seconds between two rounds that nothing disturbed
        self.trials = []

    def warm_up(self):
        began = time.time()
        self.swarm.settle(began)
        self.rest(WARM_ROUNDS)

    def rest(self, rounds):
        at = time.time()
        self.swarm.certified_after(at, rounds + 1)
        ends = [each.at for each in self.swarm.watch.after(at)]
        self.quiet += [later - sooner for sooner, later in pairwise(ends)]

    @property
    def round_seconds(self):
        return statistics.median(self.quiet)

    def attempt(self, fault, number):
        """One try. What goes wrong is written down, and the swarm is brought back for the next."""
        trial, swarm = Trial(fault.name, number), self.swarm
        unplanned = len(swarm.unplanned)
        try:
            self._strike(trial, fault, any_luck(self.seed, fault.name, number))
        except Exception as error:
            trial.troubles.append(f"{type(error).__name__}: {error}"[:1500])
            self._mend()
        trial.troubles += swarm.unplanned[unplanned:]
        self.trials.append(trial)
        return trial

    def _strike(self, trial, fault, luck):
        swarm = self.swarm
        known = {member: member.key for member in swarm.members}
        strike = fault.cause(swarm, luck)
        first = swarm.certified_after(strike.at)
        swarm.settle(strike.over)
        keys = [known.get(member) or member.key for member in strike.victims]
        trial.round, trial.note = first.round, strike.note
        trial.outcome = _outcome(first, keys, _before(first, swarm.watch))
        trial.recovery_seconds = first.at - strike.at
        trial.during = sum(each.at < strike.over for each in swarm.watch.after(strike.at))
        back = [swarm.watch.contributed(key, strike.over) for key in keys]
        trial.back_seconds = max((each.at - strike.over for each in back), default=None)
        trial.coordinator_seconds = strike.back_seconds
        if fault.name.startswith("joiner"):
            trial.late_rounds = _late(strike.victims[0], back[0], swarm.watch)
        trial.rounds_lost = until(lambda: audit_is_settled(swarm), "the coordinator has every round") - 1
        trial.sequences_lost, trial.sequences_doubled = audit.ranges(swarm.coordinator)
        strike.afterwards()
        self.rest(QUIET_ROUNDS)

    def _mend(self):
        """Whatever a failed try has left: everybody runs, and every line is whole."""
        swarm = self.swarm
        for name in (swarm.coordinator.name, *(member.name for member in swarm.members)):
            swarm.arena.withdraw(name)
        if swarm.coordinator.ended():
            swarm.coordinator.start()
        for member in swarm.members:
            if not member.running:
                member.start()


def audit_is_settled(swarm):
    """One more than the rounds that are lost, once those of a moment ago have arrived; else nothing."""
    missing = audit.missing_rounds(swarm)
    newest = swarm.watch.newest_round()
    return 1 + len(missing) if not missing or newest - max(missing) > 20 else None


def _outcome(first, keys, before):
    """What happened to the round that was open."""
    words = []
    if keys:
        inside = sum(any(node.startswith(key) for node in first.tokens) for key in keys)
        words.append("with it" if inside == len(keys) else "without it" if not inside else "with some")
    else:
        words.append("certified")
    if before is not None and first.epoch != before.epoch:
        words.append("new roster")
    if first.attempt:
        words.append(f"attempt {first.attempt + 1}")
    return ", ".join(words)


def _before(certified, watch):
    earlier = [each for each in watch.in_order() if each.at < certified.at]
    return earlier[-1] if earlier else None


def _late(member, first, watch):
    """Rounds from the one that was open when it began to train to the one that it first brought something to."""
    synced = report.moments(member, "training")[-1]
    return first.round - watch.after(synced)[0].round


def options(parser):
    parser.add_argument("--nodes", type=int, default=5, choices=range(4, 7))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the folder with all logs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="faults whose name has one of these")
    parser.add_argument("--tries", type=int, help="of each fault")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    chosen = [each for each in FAULTS.values() if any(word in each.name for word in given.only)]
    if given.list:
        print("\n".join(each.name for each in chosen))
        return 0
    ends_when_told()
    swarm = Swarm(Path(tempfile.mkdtemp(prefix="barnraise-chaos-")) / "w", nodes=given.nodes)
    print(f"chaos, seed {given.seed}: {given.nodes} nodes and a coordinator in {swarm.arena.folder}", flush=True)
    drill = Drill(swarm, given.seed)
    wrong, facts, left_out = ["it did not start"], {}, []
    began = time.monotonic()
    try:
        swarm.start()
        drill.warm_up()
        print(f"a round takes {drill.round_seconds:.2f} s", flush=True)
        for fault in chosen:
            if (fault.needs == "network" and swarm.lan is None) or (fault.needs == "disk" and not swarm.small_disks):
                left_out.append(fault.name)
                continue
            for number in range(given.tries or fault.tries):
                report.line(drill.attempt(fault, number), drill.round_seconds)
        wrong, facts = audit.everything(swarm, swarm.members)
    finally:
        swarm.close(keep=given.keep)
    report.show(
        drill.trials,
        drill.round_seconds,
        wrong=wrong + [f"{trial.fault}: {each}" for trial in drill.trials for each in trial.troubles],
        facts=facts,
        left_out=left_out,
        seconds=time.monotonic() - began,
        command=" ".join(
            ["make chaos PART=faults", *([f"ARGS={shlex.quote(shlex.join(sys.argv[1:]))}"] if sys.argv[1:] else [])]
        ),
        tried=[asdict(trial) for trial in drill.trials],
    )
    return 1 if wrong or any(trial.troubles for trial in drill.trials) else 0


if __name__ == "__main__":
    sys.exit(main())
