"""What a node costs beside a bare torch loop: tokens per second on the same model, batch, optimizers and threads.

One real node (`barnraise join`, its daemon, engine and trainer) takes part in a run with its coordinator on the same
machine; the bare loop runs while the node is paused, in turn with it, so that a busy machine hits both. The node's
time is from one folded round to another, everything between included. By processor time, the node is all its
processes; the coordinator's are in a row of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from coordinator.local import Swarm, call
from tests.bench.swarm import family, reached, spec_of, swarm_of
from tests.bench.table import Row, show
from tests.bench.trainer import WARM_STEPS, bare_loop, text

VOCABULARY = 257
ROUND_STEPS = 25
_FOLDED = re.compile(r"^timestamp=(\S+) .*event=\"?round folded\"? .*\bround=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Turn:
    """Tokens per second: by the clock, and by processor time."""

    node_clock: float
    node_processor: float
    trainer_share: float  # of the node's processor time
    coordinator: float  # processor seconds of its processes for each of the node's
    bare_clock: float
    bare_processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="of the node in each pair")
    parser.add_argument("--steps", type=int, default=50, help="of the bare loop in each pair")
    parser.add_argument("--bare", nargs=2, metavar=("CONFIG", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare is not None:
        print(*bare_loop(Path(given.bare[1]), given.steps, Path(given.bare[0]).read_text(), 1))
        return
    turns = asyncio.run(measure(given.pairs, given.rounds, given.steps))
    clock = [turn.node_clock / turn.bare_clock for turn in turns]
    processor = [turn.node_processor / turn.bare_processor for turn in turns]
    show(
        "overhead",
        [
            Row("node / bare loop, by the clock", statistics.median(clock), note=_each(clock)),
            Row("node / bare loop, by processor time", statistics.median(processor), note=_each(processor)),
            Row("node", statistics.median(turn.node_clock for turn in turns), "tokens/s", digits=0),
            Row("bare loop", statistics.median(turn.bare_clock for turn in turns), "tokens/s", digits=0),
            Row("trainer's share of the node's processor time", statistics.median(t.trainer_share for t in turns)),
            Row(
                "coordinator's processor time beside the node's",
                statistics.median(turn.coordinator for turn in turns),
                note="it measures on held-out text after each round",
            ),
        ],
        f"Median of {given.pairs} pairs; the node's part of a pair is {given.rounds} rounds of {ROUND_STEPS} steps.",
        "No goal was set; 1 would be no overhead at all. With one thread and an idle core the rest runs beside it.",
    )


async def measure(pairs: int, rounds: int, steps: int) -> list[Turn]:
    from protocol import model

    turns = []
    async with swarm_of(1, [[1000, ROUND_STEPS]], {"run": {"rounds": 0}}) as swarm:
        (name,) = swarm.names
        node, spec, home = swarm.nodes[name], spec_of(swarm), swarm.folder / swarm.names[0]
        config, tokens = swarm.folder / "config.json", swarm.folder / "tokens"
        values = spec.model.architecture, spec.model.config
        config.write_text(model.model_config(*values, vocabulary=VOCABULARY, context=spec.data.context))
        batch = spec.train.batch_sequences * spec.data.context
        tokens.write_bytes(text((WARM_STEPS + steps) * batch + 1).astype("<u2").tobytes())
        await reached(swarm, 1, seconds_max=180)
        for _ in range(pairs):
            first = int(node.status["round"]) + 1  # the round under way was interrupted
            began = await _folded(home, first - 1)
            before = _processor(node.process.pid), _processor(_coordinator(swarm))
            ended = await _folded(home, first + rounds - 1)
            after = _processor(node.process.pid), _processor(_coordinator(swarm))
            await reached(swarm, first + rounds, seconds_max=10)
            brought = {each["round"]: each["tokens"] for each in node.status["recent"]}
            done = sum(brought[number] for number in range(first, first + rounds))
            seconds = (ended - began).total_seconds()
            used = {part: after[0][part] - before[0].get(part, 0.0) for part in after[0]}
            coordinator = sum(after[1].values()) - sum(before[1].values())
            await call("barnraise", "pause", "--home", str(home), log=swarm.log("pause"))
            bare = await asyncio.to_thread(_bare, config, tokens, steps)
            await call("barnraise", "resume", "--home", str(home), log=swarm.log("pause"))
            whole = sum(used.values())
            shares = used["node.trainer"] / whole, coordinator / whole
            turns.append(Turn(done / seconds, done / whole, *shares, *bare))
    return turns


def _bare(config: Path, tokens: Path, steps: int) -> tuple[float, float]:
    words = [sys.executable, "-m", "tests.bench.overhead", "--steps", str(steps), "--bare", str(config), str(tokens)]
    clock, processor = subprocess.check_output(words, text=True).split()[-2:]
    return float(clock), float(processor)


def _coordinator(swarm: Swarm) -> int:
    assert swarm.coordinator is not None
    return swarm.coordinator.process.pid


def _processor(pid: int) -> dict[str, float]:
    """Processor seconds of a process and its children, by name."""
    seconds = {}
    for name, process in family(pid).items():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[name] = times.user + times.system
    return seconds


async def _folded(home: Path, number: int) -> datetime:
    """When the node folded this round, by its own log; returns at once when it has."""
    async with asyncio.timeout(180):
        while True:
            for at, found in _FOLDED.findall((home / "logs" / "node.log").read_text()):
                if int(found) == number:
                    return datetime.fromisoformat(at)
            await asyncio.sleep(0.05)


def _each(ratios: Iterable[float]) -> str:
    return " ".join(f"{ratio:.3f}" for ratio in itertools.islice(ratios, 8))


if __name__ == "__main__":
    main()
