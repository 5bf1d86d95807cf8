"""The attack bench: `python -m tests.attacks`, or `make attacks`. Eight nodes, some of them attackers, in one process.

For each attack and each robust rule: the final held-out loss against a run in which nobody attacks, and in which round of
its own each attacker was put out. Nothing fails because an attack succeeded; the table says so.

    make attacks                                              # two attackers of each kind, no rule and the default
    make attacks ARGS="--rules mean clip trimmed centered --attackers 1 2 3"
    make attacks ARGS="--honest --seeds 20"                   # nobody attacks: who is accused, and of what
    make attacks ARGS="--lucks 1000 --only ALIE label"        # the same measurements, a thousand lucks of who is asked when
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from protocol.fold import Outer, OuterKind
from protocol.runspec import RoundsSection
from tests.attacks import refused, replay
from tests.attacks.attackers import ATTACKS
from tests.attacks.swarm import Attack, Habit, Outcome, Setting, Swarm

WITHIN_SHARE, WITHIN_ROUNDS = 0.02, 10  # of the clean run's loss; from an attacker's first to its last
ODD = (
    ("eight alike", Setting(), {}),
    ("one brings 1 step of each round", Setting(), {3: Habit(steps_most=1)}),
    ("one joins in round 20", Setting(), {3: Habit(first_round=20)}),
    ("one misses every second round", Setting(), {3: Habit(misses=2)}),
    ("half of one's text is noise", Setting(), {3: Habit(noise=0.5)}),
    ("sparse2", Setting(codec="sparse2", residual_decay=0.95), {}),
    ("AdamW", Setting(optimizer="adamw"), {}),
    ("a run that diverges", Setting(outer=Outer(OuterKind.AVERAGE, 8.0)), {}),
    ("long rounds, learning rates that fall to 1 %", Setting(inner_steps=((1, 25),), steps=250, decay_to=0.01), {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["mean", "clip"], help="of mean, clip, trimmed, centered")
    parser.add_argument("--attackers", type=int, nargs="+", default=[2], help="of eight nodes")
    parser.add_argument("--only", nargs="*", default=[""], help="words of the attacks to run")
    parser.add_argument("--start", type=int, default=0, help="the round from which on attackers are there")
    parser.add_argument("--steps", type=int, default=100, help="of each node")
    parser.add_argument("--codec", choices=["int4", "sparse2"], default="int4")
    parser.add_argument("--share", type=float, default=0.2, help="of contributions that are audited; 0: none")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--honest", action="store_true", help="no attackers, but nodes and runs of many kinds, instead")
    parser.add_argument(
        "--lucks", type=int, default=0, help="play the audits' rule so often over one run's measurements"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="barnraise-attacks-") as folder:
        if given.lucks:
            replayed(given, Path(folder))
        elif given.honest:
            honest(given, Path(folder))
        else:
            attacked(given, Path(folder))
            print("\nWhat no honest member takes, and who is told:\n")
            for name, answer in refused.all_of():
                print(f"  {name:52}  {answer}")
    print(f"\n{time.monotonic() - began:.0f} s")


def attacked(given: argparse.Namespace, folder: Path) -> None:
    decay = 0.95 if given.codec == "sparse2" else 1.0
    base = Setting(steps=given.steps, codec=given.codec, residual_decay=decay, share=given.share)
    print(
        f"{base.nodes} nodes, {len(base.rounds())} rounds, {given.codec}, {given.share:.0%} audited, {given.seeds} seeds"
    )
    print(f"\n  {'attack':24} {'rule':10} {'loss':>8} {'':>8}  attackers out after so many rounds of theirs")
    clean: dict[int, float] = {}
    runs = iter(range(1 << 30))

    def play(setting: Setting, attackers: int, attack: Attack | None) -> Iterator[tuple[int, Outcome]]:
        habit = Habit(first_round=given.start)
        for seed in range(given.seeds):
            who = {} if attack is None else {setting.nodes - 1 - number: attack for number in range(attackers)}
            swarm = Swarm(replace(setting, seed=seed), folder / str(next(runs)), who, dict.fromkeys(who, habit))
            yield seed, swarm.run()

    for rule in given.rules:
        outcomes = dict(play(replace(base, rule=rule), 0, None))
        for seed, outcome in outcomes.items():
            clean.setdefault(seed, outcome.loss)
        _row("nobody attacks", rule, list(outcomes.values()), clean, 0, given.start)
    for attack in ATTACKS:
        if any(word in attack.name for word in given.only):
            for attackers in given.attackers:
                for rule in given.rules:
                    outcomes = dict(play(replace(base, rule=rule), attackers, attack))
                    name = f"{attackers} {attack.name}"
                    _row(name, rule, list(outcomes.values()), clean, attackers, given.start)


def _row(
    name: str, rule: str, outcomes: Sequence[Outcome], clean: dict[int, float], attackers: int, start: int
) -> None:
    loss = fmean(outcome.loss for outcome in outcomes)
    worse = fmean(outcome.loss / clean[seed] - 1 for seed, outcome in enumerate(outcomes))
    nodes = range(8 - attackers, 8)
    rounds = [outcome.out[node][0] - start + 1 for outcome in outcomes for node in nodes if node in outcome.out]
    stayed = sum(node not in outcome.out for outcome in outcomes for node in nodes)
    falsely = sum(node < 8 - attackers for outcome in outcomes for node in outcome.out)
    words = [", ".join(map(str, sorted(rounds)))] if rounds else []
    if stayed:
        words.append(f"{stayed} stayed")
    if falsely:
        words.append(f"{falsely} HONEST OUT")
    goal = "" if worse <= WITHIN_SHARE and not falsely and all(each <= WITHIN_ROUNDS for each in rounds) else "  MISSED"
    print(f"  {name:24} {rule:10} {loss:8.4f} {worse:+8.1%}  {'; '.join(words)}{goal}", flush=True)


def honest(given: argparse.Namespace, folder: Path) -> None:
    print("Nobody attacks. Of the audits of all seeds: how many, how many gave points, and who was accused.\n")
    for number, (name, setting, habits) in enumerate(ODD):
        if not any(word in name for word in given.only):
            continue
        audited = bad = unclear = 0
        accused: list[str] = []
        for seed in range(given.seeds):
            setting = replace(setting, seed=seed, rule=given.rules[-1], share=given.share)
            outcome = Swarm(setting, folder / f"{number}-{seed}", {}, habits).run()
            audited, bad, unclear = audited + outcome.audited, bad + outcome.bad, unclear + outcome.unclear
            accused += [f"node {node} in round {at}: {why.reason}" for node, (at, why) in outcome.out.items()]
        line = f"{audited:6} audits, {bad:4} bad, {unclear:4} before two others were known, {len(accused)} accused"
        print(f"  {name:46} {line}", *accused, sep="\n      ", flush=True)


def replayed(given: argparse.Namespace, folder: Path) -> None:
    print(
        f"Everybody measured in every round; then {given.lucks} lucks of who is asked when, {given.share:.0%} of all.\n"
    )
    kinds = list(ODD) if given.honest else []
    runs = [(name, setting, habits, {}) for name, setting, habits in kinds]
    if not given.honest:
        theirs = range(Setting.nodes - given.attackers[0], Setting.nodes)
        runs = [(attack.name, Setting(), {}, dict.fromkeys(theirs, attack)) for attack in ATTACKS]
    for name, setting, habits, who in runs:
        if not any(word in name for word in given.only):
            continue
        for seed in range(given.seeds):
            chosen = replace(setting, seed=seed, rule=given.rules[-1], share=1.0, puts_out=False)
            swarm = Swarm(chosen, folder / f"{name}-{seed}", who, habits)
            rows = swarm.run().measured
            rules = replace(swarm.rules, share=given.share)
            found = [replay.accused(rows, rules, random.Random(luck)) for luck in range(given.lucks)]  # repeatable
            falsely = sum(any(node not in who for node in out) for out in found)
            rounds = sorted(out.get(node, len(swarm.setting.rounds()) + 1) for out in found for node in who)
            said = f"attackers out after {rounds[len(rounds) // 2]} rounds, {rounds[-1]} at most; " if rounds else ""
            print(f"  {name:46} seed {seed}  {said}an honest one accused under {falsely} lucks", flush=True)


assert RoundsSection().inner_steps == Setting().inner_steps  # the bench goes by the defaults


if __name__ == "__main__":
    main()
