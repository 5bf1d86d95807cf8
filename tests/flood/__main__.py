"""make flood: every flood for some seconds, honest nodes beside it, and what it cost them and the coordinator.

It fails where the honest nodes' heartbeats, or the memory, miss their goal."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

HEARTBEAT_P99_MS = 250  # wanted, whatever is thrown
GROWTH_BYTES_MAX = 512 << 20  # the stated cap: 1,024 strangers, 512 viewers and their buffers
HONEST = 8
FLOODS = {  # name: how many times, how many hostile members
    "joins_of_one": (10_000, 0),
    "joins_of_many": (10_000, 0),
    "calls_of_strangers": (1_000_000, 0),
    "calls_of_members": (1_000_000, 1),
    "calls_of_members, 32 of them": (1_000_000, 32),
    "slow_door": (2_000, 0),
    "slow_page": (2_000, 0),
    "huge_messages": (16, 0),
    "event_readers": (5_000, 0),
    "herd": (1_000, 1_000),  # honest ones, who come all at once
}
HERD_SECONDS = 60.0  # wanted, until all of them are in


@dataclass(frozen=True)
class Seen:
    name: str
    quiet_ms: float  # p99 before
    p99_ms: float
    worst_ms: float
    lost: int
    beats: int
    growth_bytes: int
    attack: dict[str, float]
    refused: dict[str, dict[str, int]]

    @property
    def missed(self) -> tuple[str, ...]:
        """Which goals. Honest nodes that come all at once may slow heartbeats down, as long as all are in soon."""
        herd = self.name == "herd"
        goals = {
            "p99": herd or self.p99_ms <= HEARTBEAT_P99_MS,
            "memory": self.growth_bytes <= GROWTH_BYTES_MAX,
            "lost": not self.lost,
            "late": not herd or self.attack.get("in") == FLOODS["herd"][0],
        }
        return tuple(name for name, met in goals.items() if not met)


async def run(name: str, *, seconds: float, quiet_seconds: float = 3.0, honest: int = HONEST) -> Seen:
    """One flood against a target of its own."""
    count, hostile = FLOODS[name]
    theirs, ours = _cores()
    scattered = ["--scattered"] if name == "herd" else []
    async with _python("target", str(honest + hostile), *scattered, cores=ours, stdin=True, stderr=True) as target:
        assert target.stdout is not None
        told = json.loads(await target.stdout.readline())
        invites = told.pop("invites")
        beats: list[tuple[float, float, float]] = []
        async with _python("honest", json.dumps(told | {"invites": invites[:honest]}), cores=ours) as nodes:
            assert nodes.stdout is not None
            for _ in range(honest):
                while (await nodes.stdout.readline()).strip() != b"in":
                    pass
            listening = asyncio.create_task(_listen(nodes.stdout, beats))
            await asyncio.sleep(quiet_seconds)
            quiet, process = tuple(beats), psutil.Process(told["pid"])
            before, most = process.memory_info().rss, 0
            told["invites"] = invites[honest:]
            words = name.split(",")[0], str(HERD_SECONDS if name == "herd" else seconds), str(count)
            async with _python("attacks", *words, cores=theirs, stdin=True) as attack:
                assert attack.stdin is not None and attack.stdout is not None
                attack.stdin.write(json.dumps(told).encode())
                attack.stdin.write_eof()
                ended = asyncio.create_task(attack.stdout.readline())
                while not ended.done():
                    most = max(most, process.memory_info().rss)
                    await asyncio.wait([ended], timeout=0.1)
                did = json.loads(ended.result())
            during = tuple(beats[len(quiet) :])
            listening.cancel()
        refused = json.loads((await target.communicate(b""))[1].splitlines()[-1])
    lost = sum(not good for _, _, good in during)
    return Seen(name, _p99(quiet), _p99(during), _worst(during), lost, len(during), max(0, most - before), did, refused)


def _cores() -> tuple[list[int], list[int]]:
    """Half of this machine's for the attackers, who bring their own; the rest for the coordinator and the honest nodes."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[len(cores) // 2 :], cores[: len(cores) // 2]) if len(cores) > 1 else (cores, cores)


async def _listen(lines: asyncio.StreamReader, beats: list[tuple[float, float, float]]) -> None:
    while line := await lines.readline():
        words = line.split()
        if len(words) == 3:
            beats.append((float(words[0]), float(words[1]), float(words[2])))


def _p99(beats: tuple[tuple[float, float, float], ...]) -> float:
    took = sorted(seconds for _, seconds, _ in beats)
    return 1000 * took[min(len(took) - 1, int(0.99 * len(took)))] if took else float("inf")


def _worst(beats: tuple[tuple[float, float, float], ...]) -> float:
    return 1000 * max((seconds for _, seconds, _ in beats), default=float("inf"))


@asynccontextmanager
async def _python(module: str, *words: str, cores: list[int], stdin: bool = False, stderr: bool = False):
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"tests.flood.{module}", *words,
        stdin=pipe if stdin else asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe if stderr else asyncio.subprocess.DEVNULL,
        limit=1 << 22,
    )  # fmt: skip
    os.sched_setaffinity(child.pid, cores)  # before it has a second thread
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()  # to the end of its output: what is left open outlives the loop


def main() -> None:
    parser = argparse.ArgumentParser(prog="make flood")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each flood")
    parser.add_argument("--only", choices=FLOODS)
    asked = parser.parse_args()
    theirs, ours = map(len, _cores())
    print(
        f"{HONEST} honest nodes beside each flood. Attackers have {theirs} cores; coordinator and nodes share {ours}.\n"
    )
    print(
        "| flood | done | p99 before | p99 | worst | lost | memory | refused |\n|---|---|---:|---:|---:|---:|---:|---|"
    )
    missed = []
    for name in [asked.only] if asked.only else FLOODS:
        seen = asyncio.run(run(name, seconds=asked.seconds))
        did = ", ".join(f"{count:,} {what}" for what, count in seen.attack.items())
        refused = ", ".join(f"{count:,} {what}" for kind in seen.refused.values() for what, count in kind.items())
        print(
            f"| {name} | {did} | {seen.quiet_ms:.0f} ms | {seen.p99_ms:.0f} ms | {seen.worst_ms:.0f} ms "
            f"| {seen.lost} of {seen.beats} | +{seen.growth_bytes / (1 << 20):.0f} MiB | {refused} |",
            flush=True,
        )
        if seen.missed:
            missed.append(f"{name} ({', '.join(seen.missed)})")
    print(f"\nGOAL MISSED: {'; '.join(missed)}" if missed else "\nno goal missed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
