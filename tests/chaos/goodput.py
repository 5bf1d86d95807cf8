"""Tokens in certified rounds when one of four nodes is killed in every round, against none in the same run.

    make chaos PART=goodput ARGS="--rounds 8"

Fault-free stretches come before and after, so that what else the machine does weighs on both alike.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import audit, report
from tests.chaos.causes import any_luck
from tests.chaos.swarm import SETTINGS, Swarm
from tests.e2e.processes import gone, until

GOAL = 0.88
NODES = 4


def stretch(swarm, rounds, *, killing, luck):
    """So many rounds from a certified one on: tokens and seconds. Kills one node in each, and starts it at once."""
    start = swarm.certified_after(time.time())
    kills, newest = 0, start
    while newest.round < start.round + rounds:
        if killing:
            time.sleep(luck.uniform(0, 0.9) * killing)
            victim = luck.choice([member for member in swarm.members if member.running])
            gone(victim.kill())
            victim.start()
            kills += 1
        newest = swarm.certified_after(newest.at)
    inside = [each for each in swarm.watch.after(start.at) if each.at <= newest.at]
    return sum(sum(each.tokens.values()) for each in inside), newest.at - start.at, kills, len(inside)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="with kills; half as many without before and after")
    parser.add_argument("--steps", type=int, default=400, help="inner steps of a round: a restart should fit in one")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
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
        round_seconds = calm[0][1] / calm[0][3]
        print(f"a round takes {round_seconds:.1f} s", flush=True)
        tokens, seconds, kills, rounds = stretch(swarm, given.rounds, killing=round_seconds, luck=luck)
        until(lambda: swarm.settle(time.time(), seconds=600), "all are back")
        calm.append(stretch(swarm, half, killing=0, luck=luck))
        wrong, facts = audit.everything(swarm, swarm.members)
    finally:
        swarm.close()
    free = sum(each[0] for each in calm) / sum(each[1] for each in calm)
    share = tokens / seconds / free
    print(f"fault-free {free:,.0f} tokens/s; with {kills} kills in {rounds} rounds {tokens / seconds:,.0f} tokens/s")
    print(f"goodput: {share:.3f} of fault-free (goal {GOAL}: {'met' if share >= GOAL else 'MISSED'})")
    print("\n".join(["", "WRONG:", *(f"- {each}" for each in wrong)]) if wrong else "\nNothing was wrong.")
    report.save(
        "goodput", share=share, fault_free=free, kills=kills, rounds=rounds, round_seconds=round_seconds, wrong=wrong
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
