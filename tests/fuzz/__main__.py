"""Coverage-guided fuzzing of everything that reads a stranger's bytes (tests/fuzz/targets), with atheris.

    make fuzz MINUTES=60                 # in turns of a few minutes; what was reached is kept in .fuzz and goes on
    make fuzz MINUTES=5 ARGS="letter invitation"

A finding is written to tests/fuzz/found/TARGET, where `make test` reads it from then on. Ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.target import FOUND
from tests.fuzz.targets import TARGETS

CORPORA = Path(".fuzz")  # not in the repository: some thousand small files
TURN_SECONDS = 60.0  # of one target, so that a run that is stopped early has seen all of them
TURN_SECONDS_MIN = 5.0  # a process takes two until it has read everything in
INPUT_BYTES_MAX = 64 << 10  # what is longer is refused for its length, or is more of the same
INPUT_SECONDS_MAX = 20  # for one input; under load the slowest honest one takes 1
MEMORY_MEGABYTES_MAX = 2048  # with torch in it a process begins at 600


@dataclass
class Tally:
    """What became of one target."""

    executions: int = 0
    cpu_seconds: float = 0.0
    inputs: int = 0  # kept because each reached something new
    memory_megabytes: int = 0
    found: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"all without: {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=20.0, help="of CPU, for all of them together")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}")
    names = given.targets or list(TARGETS)
    tallies = {name: Tally() for name in names}
    with suppress(KeyboardInterrupt):  # what was done until then is told
        fuzz(tallies, seconds=given.minutes * 60)
    print(table(tallies))
    sys.exit(any(tally.found for tally in tallies.values()))


def fuzz(tallies: dict[str, Tally], *, seconds: float) -> None:
    """One turn of each target after the other, until so much CPU time is spent; of those without a finding."""
    while seconds > TURN_SECONDS_MIN and (going := [name for name, tally in tallies.items() if not tally.found]):
        share = max(TURN_SECONDS_MIN, min(TURN_SECONDS, seconds / len(going)))
        for name in going:
            seconds -= turn(name, tallies[name], seconds=share)
            print(f"{name}: {tallies[name].executions:,} executions", flush=True)


def turn(name: str, tally: Tally, *, seconds: float) -> float:
    """Fuzz one target for a while; answers the CPU time that it took."""
    corpus, found = CORPORA / name, FOUND / name
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    options = {
        "max_total_time": int(seconds),
        "max_len": INPUT_BYTES_MAX,
        "timeout": INPUT_SECONDS_MAX,
        "rss_limit_mb": MEMORY_MEGABYTES_MAX,
        "artifact_prefix": f"{found}/",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    words = [sys.executable, "-m", "tests.fuzz.one", name, str(corpus)]
    before = _cpu_seconds()
    done = subprocess.run(
        [*words, *(f"-{key}={value}" for key, value in options.items())],
        capture_output=True,
        text=True,
        errors="replace",
    )
    spent = _cpu_seconds() - before
    tally.cpu_seconds += spent
    tally.executions += _stat(done.stderr, "number_of_executed_units")
    tally.memory_megabytes = max(tally.memory_megabytes, _stat(done.stderr, "peak_rss_mb"))
    tally.inputs = len(list(corpus.iterdir()))
    if done.returncode:
        tally.found += 1
        print(f"{name}: ended with {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}", flush=True)
    if not any(found.iterdir()):
        found.rmdir()
    return spent


def table(tallies: dict[str, Tally]) -> str:
    lines = [f"{'target':16}{'executions':>12}{'CPU min':>9}{'inputs':>8}{'MB':>6}{'found':>7}"]
    for name, each in [*tallies.items(), ("all", _sum(list(tallies.values())))]:
        minutes = each.cpu_seconds / 60
        lines.append(
            f"{name:16}{each.executions:>12,}{minutes:>9.1f}{each.inputs:>8,}{each.memory_megabytes:>6}{each.found:>7}"
        )
    return "\n".join(lines)


def _sum(tallies: list[Tally]) -> Tally:
    return Tally(
        sum(each.executions for each in tallies),
        sum(each.cpu_seconds for each in tallies),
        sum(each.inputs for each in tallies),
        max(each.memory_megabytes for each in tallies),
        sum(each.found for each in tallies),
    )


def _stat(text: str, name: str) -> int:
    return max((int(found) for found in re.findall(rf"stat::{name}:\s+(\d+)", text)), default=0)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
