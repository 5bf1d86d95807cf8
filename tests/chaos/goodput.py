"""Tokens in certified rounds when one of four nodes is killed in every round, against none in the same run.

    make chaos PART=goodput ARGS="--steps 800"

Stretches with kills and without take turns, so that what else the machine does weighs on both alike.
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
KILLED_BY = 0.6  # of a round: the restart should end in what is measured
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
    """So many rounds from a certified one on. `killing` is the seconds of a round: kills one node in each, starts it at once."""
    start = swarm.certified_after(time.time(), seconds=ROUND_SECONDS_MAX)
    kills, newest = [], start  # (when, whom)
    while newest.round < start.round + rounds:
        if killing:
            time.sleep(luck.uniform(0, KILLED_BY) * killing)
            victim = luck.choice([member for member in swarm.members if member.running])
            kills.append((time.time(), victim))
            gone(victim.kill())
            victim.start()
        newest = swarm.certified_after(newest.at, seconds=ROUND_SECONDS_MAX)
    inside = [each for each in swarm.watch.after(start.at) if each.at <= newest.at]
    dead = sum(_dead_seconds(kills, number, newest.at) for number in range(len(kills)))
    tokens, seconds = sum(sum(each.tokens.values()) for each in inside), newest.at - start.at
    return Stretch(tokens, seconds, len(inside), len(kills), dead / (seconds * len(swarm.members)))


def _speed(stretches):
    return sum(each.tokens for each in stretches) / sum(each.seconds for each in stretches)


def _dead_seconds(kills, number, end):
    """From a death until the node trains again, dies again, or the stretch is over."""
    killed, victim = kills[number]
    again = [at for at, other in kills[number + 1 :] if other is victim]
    back = [at for at in report.moments(victim, "training") if at > killed]
    return max(0.0, min([end, *again, *back]) - killed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--turns", type=int, default=2, help="stretches with kills, one without before each and at the end"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of a stretch with kills")
    parser.add_argument("--calm-rounds", type=int, default=2, help="of a stretch without")
    parser.add_argument("--steps", type=int, default=800, help="inner steps of a round: a restart should fit in one")
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
        calm, faulty = [], []

        def take_turn(*, killing):
            """One stretch, once everybody is there; answers with the seconds of a round."""
            swarm.settle(time.time(), seconds=ROUND_SECONDS_MAX)
            rounds = given.rounds if killing else given.calm_rounds
            (faulty if killing else calm).append(now := stretch(swarm, rounds, killing=killing, luck=luck))
            print(
                f"  {now.kills} kills in {now.rounds} rounds, {now.seconds:.0f} s: {now.speed:,.0f} tokens/s",
                flush=True,
            )
            return now.seconds / now.rounds

        for _ in range(given.turns):
            take_turn(killing=take_turn(killing=0))
        take_turn(killing=0)
        wrong, facts = audit.everything(swarm, swarm.members)
    finally:
        swarm.close(keep=given.keep)
    share = _speed(faulty) / _speed(calm)
    dead_share = sum(each.dead_share * each.seconds for each in faulty) / sum(each.seconds for each in faulty)
    kills, rounds = sum(each.kills for each in faulty), sum(each.rounds for each in faulty)
    print(f"{_speed(calm):,.0f} tokens/s without faults, {_speed(faulty):,.0f} with {kills} kills in {rounds} rounds")
    print(f"goodput: {share:.3f} (goal {GOAL}: {'met' if share >= GOAL else 'MISSED'})")
    print(f"nodes were dead or starting for {dead_share:.3f} of their time, in which they cannot compute;")
    print(f"of what the others could compute, {share / (1 - dead_share):.3f} entered rounds")
    report.ending(wrong, facts)
    stretches = {"calm": [asdict(each) for each in calm], "faulty": [asdict(each) for each in faulty]}
    report.save("goodput", share=share, **stretches, wrong=wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
