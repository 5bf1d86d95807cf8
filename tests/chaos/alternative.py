"""The same faults done to stock `hivemind.Optimizer` from PyPI: what its rounds and its replicas come to.

    python -m tests.chaos.alternative [--tries N] [--only FAULT ...] [--at-once N]

**What runs.** hivemind 1.1.12 as installed, numpy below 2.4 (from 2.4 on its 8-bit decoding fails without a word).
Four peers on loopback, a process group and one torch thread each, and a fifth DHT node to meet at, which does not train.
Each peer trains a byte model of 672,576 parameters on text of the standard library: SGD with momentum, batches of 16,
four steps a second. All start from the same parameters; a late starter comes with its own, as a real one would.

**How it is configured.** For its best case, by its own documentation; tests/chaos/hivemind_peer.py holds the numbers:
  use_local_updates=True; a round each 16 steps of four peers, so each 4 s; average_state_every=1
  delay_state_averaging=False, so the replicas can be compared when a round has ended, before anyone trains on
  state_averaging_compression: Float16Compression or Uniform8BitQuantization; load_state_compression: Float16Compression
  matchmaking_time=5 ("3-5s for small local runs"), so next_chunk_timeout is 5 and a reducer gets 10 s
  averaging_timeout=15: many times what an all-reduce takes here, and what bounds its hangs
  part_size_bytes=32 KiB in place of 512, so the small model has several parts for each peer, as a large one would
  target_group_size=4, so a full group does not sit out the matchmaking time; three peers do
  request_timeout=2, since it is to be below matchmaking_time
Left as they come: retries, state sharing, progress tracking, relay and NAT settings (but for no UPnP on loopback).

**What is done.** One swarm meets all faults in this order for as long as it recovers; if not, the next gets a new swarm.
Each fault comes once two rounds in a row had all peers in one group. The fourth peer has it, in one round only:
  none                        four rounds more
  one part of wrong shape     a part one value too long, to one reducer
  SIGSTOP in mid-round        its whole process group, when a quarter, half, … of its parts are sent; then SIGCONT, 20 s on
  kill -9 in mid-round        the same moments
  late start                  a newcomer in its place; its clock starts when hivemind is set up and it begins to train
  parameters become NaN       all of them, before a round

**What is counted**, of the survivors, which are the other three peers (in `none`, all four).
  said averaged     to how many hivemind said so in the first round that ended after the fault
  values apart      the share of parameters that then differ between them by more than 2^-8, fp16's step at the largest
  most apart        the largest such difference
  NaN               the share of NaN in the worst replica when the try ended
  rounds lost       rounds before the recovery that do not count. One counts if hivemind said to each survivor that it
                    averaged, none holds a NaN, and the share apart is at most 0.5 % above twice that of the fault-free
                    rounds just before: with 8 bit some always are, since each peer keeps its own rounding
  lost in silence   those of them in which hivemind told a survivor that it had averaged
  recovery          time from the fault to the end of the first round that counts, in median fault-free round times; after
                    a late start or a stall the fourth peer has to agree as well. Never: not within 30 s of the fault's end
Reports that came within 2.5 s of each other are one round: peers of one group may count different epochs.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.table import RESULTS
from tests.chaos.hivemind_peer import (
    AVERAGING_SECONDS,
    CODECS,
    PEERS,
    Controls,
    Fault,
    Round,
    bootstrap,
    die_with_parent,
    peer,
)

processes = get_context("fork")  # one import of torch and hivemind serves every peer
FAULTY = PEERS - 1
FAULT_FREE_ROUNDS = 2
CONTROL_ROUNDS = 4
STALL_SECONDS = AVERAGING_SECONDS + 5.0
BOUND_SECONDS = 30.0
WARM_SECONDS_MAX = 120.0  # on a busy machine the first rounds split into pairs
ONE_ROUND_SECONDS = 2.5
FP16_STEP = 2.0**-8  # at parameters of 4 to 8, the largest here
SHARE_ALLOWED = 0.005  # below what one unaveraged part of the 37 makes


@dataclass(frozen=True)
class Tried:
    """What became of one try."""

    fault: Fault
    codec: str
    number: int
    trouble: str = ""  # why there is nothing to count
    round_seconds: tuple[float, ...] = ()  # between fault-free rounds
    said_averaged: int = 0  # survivors to whom hivemind said so in the first round after the fault
    survivors: int = 0
    share_apart: float = 0.0  # of the values, in that round
    most_apart: float = 0.0
    nan_share: float = 0.0  # at the survivor that had most, when the try ended
    rounds: int = 0
    lost: int = 0
    lost_in_silence: int = 0  # lost, though hivemind told a survivor that it had averaged
    recovery_seconds: float | None = None
    reports: tuple[tuple[float, int, int, str], ...] = ()  # seconds after the fault, peer, epoch, what hivemind said


class Swarm:
    """The processes of one run, and what they reported."""

    def __init__(self, codec: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="alternative-")
        self.codec = codec
        self.controls = Controls()
        self.reports: list[Round] = []
        self.links: dict[int, Connection] = {}
        self.pids: dict[int, int] = {}
        self._processes: list[BaseProcess] = []
        self._addresses: list[str] = []

    def begin(self, peers: int) -> None:
        self._meeting = self._start(bootstrap)
        self._addresses = self._meeting.recv()
        for index in range(peers):
            self.join(index)
        for link in self.links.values():
            link.recv()
        for link in self.links.values():
            link.send(None)

    @property
    def members(self) -> frozenset[int]:
        return frozenset(self.links)

    def join(self, index: int, *, late: bool = False) -> None:
        controls = self.controls if index == FAULTY else None
        self.links[index] = self._start(peer, index, self.codec, controls, late, self._addresses)
        self.pids[index] = self._processes[-1].pid or 0

    def listen(self, seconds: float) -> None:
        for link in wait(list(self.links.values()), timeout=seconds):
            index = next(each for each, other in self.links.items() if other is link)
            try:
                came = self.links[index].recv()
            except (EOFError, ConnectionError):
                del self.links[index]
                continue
            if isinstance(came, Round):
                self.reports.append(came)
            else:  # a late starter is ready to train
                self.links[index].send(None)
                self.controls.strike()

    def end(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()  # it may not have come as far as a group of its own
            process.join()
        self._folder.cleanup()

    def _start(self, target: Callable[..., None], *words: object) -> Connection:
        ours, theirs = processes.Pipe()
        process = processes.Process(target=target, args=(*words, Path(self._folder.name) / "log", theirs))
        process.start()
        theirs.close()
        self._processes.append(process)
        return ours


@dataclass(frozen=True)
class Judge:
    """Says of a round whether it was one for those who had to be in it."""

    share_allowed: float

    def kept(self, reports: Sequence[Round], who: frozenset[int]) -> bool:
        held = [each for each in reports if each.peer in who]
        if {each.peer for each in held} != who or not all(each.averaged_with > 1 for each in held):
            return False
        return not any(map(nan_share, held)) and share_apart(held) <= self.share_allowed


def rounds_of(reports: Iterable[Round]) -> list[list[Round]]:
    rounds: list[list[Round]] = []
    for each in sorted(reports, key=lambda report: report.at_seconds):
        near = rounds and each.at_seconds - rounds[-1][-1].at_seconds < ONE_ROUND_SECONDS
        if near and each.peer not in {other.peer for other in rounds[-1]}:
            rounds[-1].append(each)
        else:
            rounds.append([each])
    return rounds


def differences(held: Sequence[Round]) -> np.ndarray[Any, Any]:
    values = np.stack([each.values for each in held])
    apart: np.ndarray[Any, Any] = np.nan_to_num(values.max(axis=0) - values.min(axis=0))
    return apart  # a NaN is counted as such, not as a difference


def share_apart(held: Sequence[Round]) -> float:
    return float((differences(held) > FP16_STEP).mean())


def nan_share(report: Round) -> float:
    return float(np.isnan(report.values).mean())


def attempt(swarm: Swarm, tried: Tried, strike_after_share: float) -> Tried:
    """Wait until all is well, do the fault, and see what comes of it."""
    fault = tried.fault
    everyone = frozenset(range(PEERS))
    survivors = everyone if fault is Fault.NONE else everyone - {FAULTY}
    to_be_there = everyone if fault in (Fault.NONE, Fault.LATE, Fault.STALL) else survivors
    warm = _fault_free_rounds(swarm)
    if warm is None:
        return replace(tried, trouble=f"no {FAULT_FREE_ROUNDS} rounds of all peers in {WARM_SECONDS_MAX:g} s")
    judge = Judge(SHARE_ALLOWED + 2 * max(map(share_apart, warm)))

    swarm.controls.arm(fault, after_share=strike_after_share)
    if fault is Fault.LATE:
        swarm.join(FAULTY, late=True)
    if fault is Fault.NONE:
        swarm.controls.strike()
    armed_seconds = time.monotonic()
    stopped = fault is Fault.STALL
    recovery: float | None = None
    while True:
        swarm.listen(0.2)
        now, struck = time.monotonic(), swarm.controls.struck_seconds
        if not struck:
            if now > armed_seconds + WARM_SECONDS_MAX:
                return replace(tried, trouble=f"no occasion for the fault in {WARM_SECONDS_MAX:g} s")
            continue
        if stopped and now > struck + STALL_SECONDS:
            os.killpg(swarm.pids[FAULTY], signal.SIGCONT)
            stopped = False
        after = rounds_of(each for each in swarm.reports if each.at_seconds > struck)
        good = [each for each in after if judge.kept(each, to_be_there)]
        if good and recovery is None:
            recovery = max(each.at_seconds for each in good[0] if each.peer in to_be_there) - struck
        over = now > struck + BOUND_SECONDS + (STALL_SECONDS if fault is Fault.STALL else 0)
        if over or (recovery is not None and (fault is not Fault.NONE or len(after) >= CONTROL_ROUNDS)):
            break

    until = struck + recovery if recovery and fault is not Fault.NONE else now - ONE_ROUND_SECONDS
    kept = {id(report) for each in after if judge.kept(each, survivors) for report in each}
    own = [[each for each in swarm.reports if each.peer == index and each.at_seconds > struck] for index in survivors]
    lost = [[each for each in reports if each.at_seconds < until and id(each) not in kept] for reports in own]
    hit = [reports[0] for reports in own if reports]
    return replace(
        tried,
        round_seconds=tuple(b[-1].at_seconds - a[-1].at_seconds for a, b in pairwise(warm)),
        said_averaged=sum(each.averaged_with > 1 for each in hit),
        survivors=len(survivors),
        share_apart=share_apart(hit) if hit else 0.0,
        most_apart=float(differences(hit).max()) if hit else 0.0,
        nan_share=max((nan_share(reports[-1]) for reports in own if reports), default=0.0),
        rounds=max(map(len, own)),
        lost=max(map(len, lost)),
        lost_in_silence=max(sum(each.averaged_with > 1 for each in reports) for reports in lost),
        recovery_seconds=recovery,
        reports=tuple((round(r.at_seconds - struck, 2), r.peer, r.epoch, r.said) for each in after for r in each),
    )


def _fault_free_rounds(swarm: Swarm) -> list[list[Round]] | None:
    """Rounds that come from now on, in a row, with all peers in one group."""
    began = time.monotonic()
    while time.monotonic() < began + WARM_SECONDS_MAX:
        swarm.listen(0.2)
        rounds = rounds_of(each for each in swarm.reports if each.at_seconds > began)[-FAULT_FREE_ROUNDS:]
        if len(rounds) == FAULT_FREE_ROUNDS and all(
            {each.peer for each in reports} == swarm.members
            and all(each.averaged_with == len(swarm.members) for each in reports)
            for reports in rounds
        ):
            return rounds
    return None


def lane(jobs: Sequence[tuple[str, int]], faults: Sequence[Fault], tries: int, taken: Any, results: Connection) -> None:
    """One of the swarms that run at a time: all faults once, in the same swarm for as long as it recovers."""
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells all of us; the parent is the one to act
    signal.signal(signal.SIGTERM, _leave)
    while True:
        with taken.get_lock():
            index = taken.value
            taken.value += 1
        if index >= len(jobs):
            return
        codec, number = jobs[index]
        swarm: Swarm | None = None
        try:
            for fault in faults:
                peers = PEERS - (fault is Fault.LATE)
                if swarm is not None and swarm.members != frozenset(range(peers)):
                    swarm.end()
                    swarm = None
                tried = Tried(fault, codec, number)
                try:
                    if swarm is None:
                        swarm = Swarm(codec)
                        swarm.begin(peers)
                    tried = attempt(swarm, tried, number / (tries + 1))
                except EOFError:
                    tried = replace(tried, trouble="a peer ended while it started")
                results.send(tried)
                if swarm is not None and (tried.trouble or tried.recovery_seconds is None):
                    swarm.end()
                    swarm = None
        finally:
            if swarm:
                swarm.end()


def run(faults: Sequence[Fault], tries: int, at_once: int) -> list[Tried]:
    jobs = [(codec, number) for number in range(1, tries + 1) for codec in CODECS]
    taken = processes.Value("i", 0)
    pipes = [processes.Pipe(duplex=False) for _ in range(min(at_once, len(jobs)))]
    lanes = [processes.Process(target=lane, args=(jobs, faults, tries, taken, theirs)) for _, theirs in pipes]
    tried: list[Tried] = []
    try:
        for each in lanes:
            each.start()
        for _, theirs in pipes:
            theirs.close()
        ours = [link for link, _ in pipes]
        while ours:
            for link in [each for each in ours if each in wait(ours)]:
                try:
                    tried.append(link.recv())
                except EOFError:
                    ours.remove(link)
                    continue
                _tell(tried[-1], len(tried), len(jobs) * len(faults))
    finally:
        for each in lanes:
            each.terminate()
        for each in lanes:
            each.join()
    return tried


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break off the cleaning up
    sys.exit(1)


def _tell(tried: Tried, done: int, of: int) -> None:
    took = "never" if tried.recovery_seconds is None else f"{tried.recovery_seconds:.1f} s"
    words = tried.trouble or (
        f"said averaged {tried.said_averaged}/{tried.survivors}, apart {tried.share_apart:.1%}, NaN {tried.nan_share:.0%}, "
        f"lost {tried.lost} of {tried.rounds} ({tried.lost_in_silence} in silence), recovery {took}"
    )
    print(f"  {done}/{of}  {tried.codec:5}  {tried.fault}, try {tried.number}: {words}", file=sys.stderr, flush=True)


def table(tried: Sequence[Tried], round_seconds: float) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        (
            "fault",
            "codec",
            "tries",
            "said averaged",
            "values apart",
            "most apart",
            "NaN",
            "rounds lost",
            "lost in silence",
            "recovery",
        )
    ]
    for fault in Fault:
        for codec in CODECS:
            these = [each for each in tried if each.fault is fault and each.codec == codec and not each.trouble]
            if not these:
                continue
            took = [each.recovery_seconds for each in these if each.recovery_seconds is not None]
            inside = f"{_range([seconds / round_seconds for seconds in took])}" if took else ""
            never = f"never {len(these) - len(took)} of {len(these)}" if len(took) < len(these) else ""
            lines.append(
                (
                    str(fault),
                    codec,
                    str(len(these)),
                    f"{sum(each.said_averaged for each in these)} of {sum(each.survivors for each in these)}",
                    f"{max(each.share_apart for each in these):.1%}",
                    f"{max(each.most_apart for each in these):.2g}",
                    f"{max(each.nan_share for each in these):.0%}",
                    _range([each.lost for each in these], "{:.0f}"),
                    _range([each.lost_in_silence for each in these], "{:.0f}"),
                    "-" if fault is Fault.NONE else ", ".join(filter(None, (inside, never))),
                )
            )
    return lines


def _range(values: Sequence[float], form: str = "{:.1f}") -> str:
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.alternative", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tries", type=int, default=3, help="of each fault with each codec (default 3)")
    parser.add_argument("--only", action="append", metavar="FAULT", help="a part of a fault's name; may be repeated")
    parser.add_argument("--at-once", type=int, default=3, help="swarms that run at a time (default 3)")
    given = parser.parse_args()
    faults = [each for each in Fault if not given.only or any(word.lower() in each.lower() for word in given.only)]
    if not faults:
        parser.error(f"--only names none of: {', '.join(Fault)}")
    signal.signal(signal.SIGTERM, _leave)
    torch.set_num_threads(1)
    began = time.monotonic()
    tried = run(faults, given.tries, given.at_once)
    intervals = [seconds for each in tried for seconds in each.round_seconds]
    if not intervals:
        sys.exit("No try came as far as a fault.")
    round_seconds = statistics.median(intervals)
    lines = table(tried, round_seconds)
    versions = ", ".join(f"{name} {version(name)}" for name in ("hivemind", "numpy", "torch"))
    troubles = [f"{each.codec}, {each.fault}, try {each.number}: {each.trouble}" for each in tried if each.trouble]
    notes = [
        f"{versions}; {os.cpu_count()} cores, {given.at_once} swarms at a time, {time.monotonic() - began:.0f} s in all",
        f"a fault-free round took {round_seconds:.1f} s (median of {len(intervals)})",
        *(f"not counted: {each}" for each in troubles),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print("\nalternative: stock hivemind.Optimizer under faults. Repeat: make chaos PART=alternative\n")
    for at, line in enumerate(lines):
        print("| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |")
        if at == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("".join(f"\n  {note}" for note in notes))
    RESULTS.mkdir(exist_ok=True)
    result = {
        "part": "alternative",
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "round_seconds": round_seconds,
        "table": lines,
        "tries": [asdict(each) for each in tried],
        "notes": notes,
    }
    (RESULTS / "alternative.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
