"""How much memory a node's helpers take beside its trainer: the daemon, the engine and p2pd, at two model sizes.

Everything is the peak of samples over whole rounds. "Once" counts each page of the helpers once, whoever else has it:
what is their own, their files' pages, and the vectors that they share with the trainer in full. PSS gives a shared
page to its sharers in equal parts, so here other processes of this machine (the trainer, the other node, the
coordinator) carry some of it. RSS counts shared pages in each process again.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from coordinator.local import Swarm
from tests.bench.swarm import POLL_SECONDS, family, reached, swarm_of
from tests.bench.table import Row, show

TRAINER = "node.trainer"
HELPERS = ("daemon", "node.swarm", "p2pd")
GOAL_FIXED = 600e6
GOAL_EACH = 16.0
ROUNDS = 4
MODELS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "1M": {},
    "20M": {
        "model.config": {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
        },
        "train": {"optimizer": "adamw", "batch_sequences": 2},
        "data": {"context": 64},
        "evaluate": {"sequences": 2},
        "rounds": {"deadline_seconds": 120.0},
    },
}
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+) *(.*)$")


@dataclass
class Use:
    """Bytes of one process."""

    rss: int = 0
    pss: int = 0
    own: int = 0  # anonymous
    files: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # resident pages by mapped file


@dataclass
class Peak:
    parameters: int
    once: int = 0
    pss: int = 0
    rss: int = 0
    shares: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # anonymous bytes by process


def use_of(pid: int) -> Use:
    use, file = Use(), ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := _MAPPING.match(line):
            file = found[2] if found[1] != "0" else ""
            continue
        name, _, rest = line.partition(":")
        match name:
            case "Rss":
                resident = int(rest.split()[0]) * 1024
                use.rss += resident
            case "Pss":
                use.pss += int(rest.split()[0]) * 1024
            case "Anonymous":
                own = int(rest.split()[0]) * 1024
                use.own += own
                if file:
                    use.files[file] += resident - own
    return use


def sample(pid: int, peak: Peak) -> None:
    processes = family(pid)
    if not {*HELPERS, TRAINER} <= processes.keys():
        return
    uses = {name: use_of(processes[name].pid) for name in HELPERS}
    files: dict[str, int] = defaultdict(int)
    for use in uses.values():
        for file, size in use.files.items():
            files[file] = max(files[file], size)
    for name, use in uses.items():
        peak.shares[name] = max(peak.shares[name], use.own)
    peak.once = max(peak.once, sum(use.own for use in uses.values()) + sum(files.values()))
    peak.pss = max(peak.pss, sum(use.pss for use in uses.values()))
    peak.rss = max(peak.rss, sum(use.rss for use in uses.values()))
    peak.shares["mapped files"] = max(peak.shares["mapped files"], sum(files.values()))


async def measure(changes: Mapping[str, Mapping[str, Any]], rounds: int) -> Peak:
    async with swarm_of(2, [[rounds, 3]], {"run": {"rounds": 0}, **changes}) as swarm:
        peaks = {name: Peak(_parameters(swarm)) for name in swarm.names}
        ready = asyncio.create_task(reached(swarm, rounds, seconds_max=420))
        while not ready.done():
            for name in swarm.names:
                with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    await asyncio.to_thread(sample, swarm.nodes[name].process.pid, peaks[name])
            await asyncio.sleep(POLL_SECONDS)
        ready.result()
        await swarm.look()
    return max(peaks.values(), key=lambda peak: peak.once)


def _parameters(swarm: Swarm) -> int:
    from protocol import model
    from tests.bench.swarm import spec_of

    spec = spec_of(swarm)
    made = model.model_config(spec.model.architecture, spec.model.config, vocabulary=257, context=spec.data.context)
    return model.measure(made).parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    given = parser.parse_args()
    peaks = [asyncio.run(measure(MODELS[name], given.rounds)) for name in given.models]
    rows, notes = [], ["The rows `of it`: each process's own pages, and the mapped files once, vectors included."]
    for peak in peaks:
        goal = (GOAL_EACH * peak.parameters + GOAL_FIXED) / 1e6
        title = f"{peak.parameters / 1e6:.1f}M parameters"
        rows += [
            Row(f"{title}: once", peak.once / 1e6, "MB", at_most=goal, digits=0),
            Row(f"{title}: PSS", peak.pss / 1e6, "MB", at_most=goal, digits=0),
            Row(f"{title}: RSS", peak.rss / 1e6, "MB", digits=0),
            *(Row(f"  of it {name}", size / 1e6, "MB", digits=0) for name, size in peak.shares.items()),
        ]
    if len(peaks) > 1:
        small, large = peaks[0], peaks[-1]
        for what, first, last in (
            ("once", small.once, large.once), ("PSS", small.pss, large.pss), ("RSS", small.rss, large.rss),
        ):  # fmt: skip
            each = (last - first) / (large.parameters - small.parameters)
            goal_each, goal_fixed = (GOAL_EACH, GOAL_FIXED / 1e6) if what != "RSS" else (None, None)
            rows.append(Row(f"{what}: for each parameter", each, "bytes", at_most=goal_each, digits=1))
            fixed = (first - each * small.parameters) / 1e6
            rows.append(Row(f"{what}: without parameters", fixed, "MB", at_most=goal_fixed, digits=0))
            if goal_each is not None and each > goal_each:
                limit = (GOAL_FIXED - fixed * 1e6) / (each - GOAL_EACH) / 1e6
                notes.append(f"{what}: beyond {limit:,.0f}M parameters the whole would miss its goal.")
    show("memory", rows, *notes)


if __name__ == "__main__":
    main()
