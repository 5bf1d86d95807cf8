"""Tokens in certified rounds when one of four nodes is killed in every round, against none in the same run.

    make chaos PART=goodput ARGS="--rounds 8"

Fault-free stretches come before and after, so that what else the machine does weighs on both alike.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos import audit, report
from tests.chaos.causes import any_luck
from tests.chaos.swarm import SETTINGS, Swarm, ends_when_told
from tests.e2e.processes import gone

GOAL = 0.88
NODES = 4
ROUND_SECONDS_MAX = 600.0  # other work may share the machine


@dataclass(frozen=True)
class Stretch:
    """Some rounds in a row."""

    tokens: int  # in certified rounds
    seconds: float
    rounds: int
    kills: int
    dead_share: float  # of the nodes' time: from a death until it trains again

    @property
    def speed(self):
        return self.tokens / self.seconds


def stretch(swarm, rounds, *, killing, luck):
    """So many rounds from a certified one on. Kills one node in each, and starts it at once."""
    start = swarm.certified_after(time.time(), seconds=ROUND_SECONDS_MAX)
    kills, newest = [], start  # (when, whom)
    while newest.round < start.round + rounds:
        if killing:
            time.sleep(luck.uniform(0, 0.9) * killing)
            victim = luck.choice([member for member in swarm.members if member.running])
            kills.append((time.time(), victim))
            gone(victim.kill())
            victim.start()
        newest = swarm.certified_after(newest.at, seconds=ROUND_SECONDS_MAX)
    inside = [each for each in swarm.watch.after(start.at) if each.at <= newest.at]
    dead = sum(_dead_seconds(kills, number, newest.at) for number in range(len(kills)))
    tokens, seconds = sum(sum(each.tokens.values()) for each in inside), newest.at - start.at
    return Stretch(tokens, seconds, len(inside), len(kills), dead / (seconds * len(swarm.members)))


def _dead_seconds(kills, number, end):
    """From a death until the node trains again, dies again, or the stretch is over."""
    killed, victim = kills[number]
    again = [at for at, other in kills[number + 1 :] if other is victim]
    back = [at for at in report.moments(victim, "training") if at > killed]
    return max(0.0, min([end, *again, *back]) - killed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="with kills; half as many without before and after")
    parser.add_argument("--steps", type=int, default=400, help="inner steps of a round: a restart should fit in one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the folder with all logs")
    given = parser.parse_args()
    ends_when_told()
    settings = {
        **SETTINGS,
        "rounds": {**SETTINGS["rounds"], "inner_steps": [[1, given.steps]], "deadline_seconds": 60.0},
        "leases": {"sequences": 4096, "seconds": 120.0},
    }
    swarm = Swarm(Path(tempfile.mkdtemp(prefix="barnraise-chaos-")) / "w", nodes=NODES, settings=settings)
    luck = any_luck(given.seed, "goodput")
    try:
        swarm.start()
        swarm.settle(time.time(), seconds=600)
        half = max(1, given.rounds // 2)
        calm = [stretch(swarm, half, killing=0, luck=luck)]
        round_seconds = calm[0].seconds / calm[0].rounds
        print(f"a round takes {round_seconds:.1f} s", flush=True)
        faulty = stretch(swarm, given.rounds, killing=round_seconds, luck=luck)
        print(f"with faults: {faulty}", flush=True)
        swarm.settle(time.time(), seconds=ROUND_SECONDS_MAX)
        calm.append(stretch(swarm, half, killing=0, luck=luck))
        print(f"without: {calm}", flush=True)
        wrong, facts = audit.everything(swarm, swarm.members)
    finally:
        swarm.close(keep=given.keep)
    free = max(each.speed for each in calm)  # the machine may be shared: what it can when it is left alone most
    share = faulty.speed / free
    print(f"fault-free {calm[0].speed:,.0f} tokens/s before, {calm[1].speed:,.0f} after")
    print(f"with {faulty.kills} kills in {faulty.rounds} rounds {faulty.speed:,.0f} tokens/s")
    print(
        f"goodput: {share:.3f} of the faster fault-free stretch (goal {GOAL}: {'met' if share >= GOAL else 'MISSED'})"
    )
    print(f"nodes were dead or starting for {faulty.dead_share:.3f} of their time, in which they cannot compute;")
    print(f"of what the others could compute, {share / (1 - faulty.dead_share):.3f} entered rounds")
    report.ending(wrong, facts)
    report.save("goodput", share=share, calm=[asdict(each) for each in calm], faulty=asdict(faulty), wrong=wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
