"""How soon the commands that people wait for answer: `barnraise --help` and `status`, with and without a daemon."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.config import Home
from node.control import Control
from tests.bench.table import Row, show

GOAL_SECONDS = 0.5
STATUS = {
    "version": 1, "run": "bench", "name": "otter", "node": "abcdef01", "activity": "training", "reason": "",
    "linked": True, "credit_tokens": 1, "sequences_left": 1, "bytes_sent": 1, "bytes_received": 1,
    "uptime_seconds": 1.0, "download": None, "trouble": "", "tokens_per_second": 1.0, "loss": 1.0, "busy_share": 1.0,
    "device": "cpu", "micro_batch": 1, "round": 1, "phase": "collecting", "epoch": 1, "rostered": True, "peers": 2,
    "head": {"round": 1, "hash": "00" * 32, "state": "00" * 32}, "round_steps": 1, "round_steps_goal": 12,
    "recent": [{"round": number, "outcome": "accepted", "tokens": 1} for number in range(20)],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    rows = []
    with tempfile.TemporaryDirectory(prefix="barnraise-bench-") as folder:
        rows += measure("barnraise --help", ["--help"], runs, expected=0)
        rows += measure("barnraise status, no daemon", ["status", "--home", f"{folder}/none"], runs, expected=2)
        with _answering(Path(folder) / "home") as home:
            rows += measure("barnraise status, a daemon answers", ["status", "--home", str(home)], runs, expected=0)
    show(
        "startup",
        rows,
        f"Median of {runs}. The daemon that answers is the real control socket with a status of the usual size.",
    )


def measure(what: str, words: list[str], runs: int, *, expected: int) -> list[Row]:
    program = str(Path(sys.executable).with_name("barnraise"))
    walls, processors = [], []
    for _ in range(runs):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        ended = subprocess.run([program, *words], capture_output=True, check=False)
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert ended.returncode == expected, ended.stderr.decode()
    return [
        Row(f"{what}: wall", statistics.median(walls), "s", at_most=GOAL_SECONDS, note=f"best {min(walls):.3f}"),
        Row(f"{what}: processor", statistics.median(processors), "s"),
    ]


@contextmanager
def _answering(path: Path) -> Iterator[Path]:
    """A home whose socket answers, from a thread with a loop of its own."""
    home = Home(path)
    home.prepare()
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def answer(verb: str, arguments: dict[str, object]) -> dict[str, object]:
        return dict(STATUS)

    def serve() -> None:
        control = Control(home.control, answer)
        loop.run_until_complete(control.start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(control.close())

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    try:
        yield path
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


if __name__ == "__main__":
    os.environ.pop("BARNRAISE_PARENT", None)
    main()
