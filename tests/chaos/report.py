"""How chaos shows what it found: a table in Markdown, and the same as JSON in results/."""

import json
import os
import statistics
import time
from collections import Counter
from datetime import datetime

from tests.bench.table import RESULTS

BARS = "▁▂▃▄▅▆▇█"
TRIES_SHOWN = 3  # each of them; of more, the median and the worst
AT_THE_END = (
    "heads",
    "rounds certified",
    "rounds lost",
    "folds compared",
    "sequences lost",
    "sequences doubled",
    "ledger verify",
    "left behind",
)


def seconds_of(stamp):
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def moments(member, event):
    """When a node logged this."""
    lines = (member.home / "logs" / "node.log").read_text().splitlines()
    return [seconds_of(line.split()[0].removeprefix("timestamp=")) for line in lines if f" event={event} " in line]


def line(trial, round_seconds):
    """One trial, as soon as it is over."""
    took = "-" if trial.recovery_seconds is None else f"{trial.recovery_seconds:.1f} s"
    again = "" if trial.back_seconds is None else f", back after {trial.back_seconds:.1f} s"
    served = "" if trial.coordinator_seconds is None else f", coordinator back in {trial.coordinator_seconds:.1f} s"
    lost = f"; sequences lost {_sum([trial.sequences_lost])}, doubled {_sum([trial.sequences_doubled])}"
    words = (f"  {trial.fault}: {trial.outcome}, next round after {took}{again}{served}{lost}", trial.note)
    print("; ".join(filter(None, words)), f"rounds lost {_sum([trial.rounds_lost])}", sep="; ", flush=True)
    for trouble in trial.troubles:
        print(f"    TROUBLE {trouble}", flush=True)


def table(trials, round_seconds):
    rows = [
        "| fault | tried | the open round was certified | next round after (in round times) "
        "| rounds meanwhile | back after | data lost / doubled | rounds lost |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(trial.fault for trial in trials):
        mine = [trial for trial in trials if trial.fault == name]
        outcomes = Counter(trial.outcome for trial in mine)
        said = "; ".join(outcome if len(mine) == 1 else f"{count} × {outcome}" for outcome, count in outcomes.items())
        notes = "; ".join(dict.fromkeys(trial.note for trial in mine if trial.note))
        taken = sorted(trial.recovery_seconds for trial in mine if trial.recovery_seconds is not None)
        shown = taken if len(taken) <= TRIES_SHOWN else [statistics.median(taken), taken[-1]]
        recovery = ", ".join(f"{each:.1f} s ({each / round_seconds:.1f})" for each in shown) or "never"
        back = [trial.back_seconds for trial in mine if trial.back_seconds is not None]
        back += [trial.coordinator_seconds for trial in mine if trial.coordinator_seconds is not None]
        during = max(trial.during for trial in mine)
        failed = sum(bool(trial.troubles) for trial in mine)
        rows.append(
            f"| {_cell(name + (f' ({notes})' if notes else ''))} | {len(mine)}{f', {failed} with troubles' if failed else ''} | {said} | {recovery} | {during or ''} "
            f"| {f'{max(back):.0f} s' if back else ''} "
            f"| {_sum(t.sequences_lost for t in mine)} / {_sum(t.sequences_doubled for t in mine)} "
            f"| {_sum(t.rounds_lost for t in mine)} |"
        )
    return "\n".join(rows)


def _cell(text):
    return text.replace("|", "\\|")


def _sum(counts):
    """Of what was counted; a try that failed before it was counted makes it unknown."""
    counts = list(counts)
    return "?" if None in counts else sum(counts)


def curve(losses):
    """Held-out loss from the first round to the last, as bars."""
    values = [loss for _, loss in losses if loss is not None]
    if len(values) < 2:
        return "no losses"
    picked = [values[index * (len(values) - 1) // 39] for index in range(40)] if len(values) > 40 else values
    low, high = min(picked), max(picked)
    bars = "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in picked)
    return f"{bars} {values[0]:.3f} → {values[-1]:.3f} over {losses[-1][0]} rounds"


def show(trials, round_seconds, *, wrong, facts, left_out, seconds, command, **more):
    print(f"\nRepeat: {command}. {os.cpu_count()} cores, {seconds / 60:.1f} minutes.")
    print(f"A round without faults took {round_seconds:.2f} s (median, same run).\n")
    print(table(trials, round_seconds))
    served = [trial.coordinator_seconds for trial in trials if trial.coordinator_seconds is not None]
    if served:
        print(f"\nThe coordinator was back with the full log {len(served)} times, within {max(served):.1f} s.")
    late = [trial.late_rounds for trial in trials if trial.late_rounds is not None]
    if late:
        print(f"A late joiner's first contribution came {max(late)} rounds after the one open at its sync, at most.")
    if left_out:
        print(f"Not tried, for want of root: {', '.join(left_out)}")
    ending(wrong, facts)
    save("chaos", command=command, round_seconds=round_seconds, wrong=wrong, facts=facts, left_out=left_out, **more)


def ending(wrong, facts):
    """What the last check of all counted, and what it found wrong."""
    print(f"Held-out loss: {curve(facts.get('losses', []))}")
    print("\n".join(f"{name}: {facts.get(name)}" for name in AT_THE_END))
    print("\n".join(["", "WRONG:", *(f"- {each}" for each in wrong)]) if wrong else "\nNothing was wrong.")


def save(name, **what):
    RESULTS.mkdir(exist_ok=True)
    measured = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    (RESULTS / f"{name}.json").write_text(json.dumps({"measured": measured, **what}, indent=1, default=str) + "\n")
