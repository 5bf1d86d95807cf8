"""A run of the demo's kind, by the public commands, with the sizes that a part of the bench wants."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import tomlkit

from coordinator.local import NAMES, Swarm, call, texts, write_run_file
from protocol.runspec import RunSpec, load

POLL_SECONDS = 0.25


@asynccontextmanager
async def swarm_of(
    nodes: int, rounds: Sequence[Sequence[int]], changes: Mapping[str, Mapping[str, Any]]
) -> AsyncIterator[Swarm]:
    """Started, and stopped at the end. `changes` go into the run file over the demo's own."""
    with tempfile.TemporaryDirectory(prefix="barnraise-bench-") as folder:
        swarm = Swarm(Path(folder), NAMES[:nodes])
        await call("barnraise-coordinator", "new", "demo", "--dir", str(swarm.run), log=swarm.log("new"))
        path = swarm.run / "run.toml"
        write_run_file(path, nodes=nodes, rounds=rounds)
        document: Any = tomlkit.parse(path.read_text())
        for section, values in changes.items():
            table = document
            for name in section.split("."):
                table = table[name]
            table.update(values)
        path.write_text(tomlkit.dumps(document))
        files = [str(each) for each in texts() if each.suffix == ".py"]
        words = ("data", "add", *files, "--skip-bad", "--run", str(swarm.run))
        await call("barnraise-coordinator", *words, log=swarm.log("data"))
        try:
            await swarm.start()
            yield swarm
        finally:
            await swarm.stop()


def spec_of(swarm: Swarm) -> RunSpec:
    return load(swarm.run / "run.toml")


async def reached(swarm: Swarm, rounds: int, *, seconds_max: float) -> None:
    """Wait until every node has folded so many rounds."""
    async with asyncio.timeout(seconds_max):
        while min((node.status.get("round") or 0) for node in swarm.nodes.values()) < rounds:
            for name, node in swarm.nodes.items():
                assert node.process.returncode is None, f"{name} ended: {node.log.read_text()[-2000:]}"
            await asyncio.sleep(POLL_SECONDS)


def family(pid: int) -> dict[str, psutil.Process]:
    """A process and its children by what they are: `daemon` is the first, the others are named after their program."""
    first = psutil.Process(pid)
    found = {"daemon": first}
    for child in first.children(recursive=True):
        try:
            words = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words:
            found[words[2] if words[1:2] == ["-m"] else Path(words[0]).name] = child
    return found
