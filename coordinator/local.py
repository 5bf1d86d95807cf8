"""A whole swarm on this machine: it only starts the public commands, watches them, and ends them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import sysconfig
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tomlkit

from protocol.errors import Code, Refused

NAMES: Final = ("otter", "lynx", "heron", "badger", "wren", "marten", "finch", "vole")
START_SECONDS: Final = 90.0  # four interpreters import torch on two cores
FOLLOW_SECONDS: Final = 0.5
AWAY_SECONDS: Final = 4.0  # how long a killed node stays away
STOP_SECONDS: Final = 15.0
SAMPLE_TOKENS: Final = 120
LEFT_OUT: Final = frozenset({"test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"})

DEMO: Final[Mapping[str, Mapping[str, Any]]] = {
    "run": {"title": "The standard library, learned by three pretend volunteers", "seed": 1},
    "data": {"context": 128, "heldout": 0.02},
    "evaluate": {"sequences": 32, "prompt": '    """Return the ', "base_every_rounds": 1000},
    "rounds": {"gather_seconds": 2.0, "deadline_seconds": 30.0},
    "leases": {"sequences": 256, "seconds": 30.0},
    "audit": {"share": 0.0},  # nobody here is a stranger
    "coordinator": {"listen": "127.0.0.1:0", "http": "127.0.0.1:0", "p2p": "127.0.0.1:0", "heartbeat_seconds": 2.0},
}


@dataclass
class Command:
    """One of our public commands as a process of its own, which dies with us."""

    process: asyncio.subprocess.Process
    log: Path
    status: dict[str, Any] = field(default_factory=dict)

    @classmethod
    async def start(cls, words: Sequence[str], *, log: Path, follow: bool = False) -> Command:
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *_program(words[0]),
                *words[1:],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if follow else file,
                stderr=file,
                env={**os.environ, "BARNRAISE_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"},
                limit=1 << 20,
            )
        return cls(process, log)

    async def follow(self) -> None:
        """Keep the newest of the JSON lines that it prints."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            with suppress(ValueError):
                self.status = json.loads(line)

    async def stop(self) -> None:
        """Ask politely, then not."""
        for order, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            if self.process.returncode is not None:
                return
            with suppress(ProcessLookupError):
                self.process.send_signal(order)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), seconds)


async def call(*words: str, log: Path) -> str:
    """Run a public command to its end; its stdout."""
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *_program(words[0]),
            *words[1:],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env={**os.environ, "BARNRAISE_PARENT": str(os.getpid())},
        )
        try:
            out, _ = await process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise Refused(Code.CHILD_DIED, f"{' '.join(words[:2])} failed: {' '.join(lines[-2:])}", fix=f"See {log}")
    return out.decode()


def _program(name: str) -> tuple[str, ...]:
    """The command that stands beside this interpreter, so that a virtual environment finds its own."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Refused(Code.CHILD_DIED, f"{name} is not installed beside {sys.executable}")
    return (found,)


@dataclass
class Swarm:
    """A coordinator and its nodes in one folder."""

    folder: Path
    names: tuple[str, ...]
    coordinator: Command | None = None
    nodes: dict[str, Command] = field(default_factory=dict)
    followers: set[asyncio.Task[None]] = field(default_factory=set)
    invite: str = ""
    page: str = ""
    view: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    killed: set[str] = field(default_factory=set)
    kills: int = 0
    recoveries: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "demo"

    def log(self, name: str) -> Path:
        (self.folder / "logs").mkdir(exist_ok=True)
        return self.folder / "logs" / f"{name}.log"

    async def prepare(self, *, rounds: Sequence[Sequence[int]]) -> None:
        """A run of the demo's size on real text."""
        await call("barnraise-coordinator", "new", "demo", "--dir", str(self.run), log=self.log("new"))
        write_run_file(self.run / "run.toml", nodes=len(self.names), rounds=rounds)
        paths = [str(path) for path in texts()]
        words = ("data", "add", *paths, "--skip-bad", "--run", str(self.run))
        await call("barnraise-coordinator", *words, log=self.log("data"))

    async def start(self) -> None:
        words = ("barnraise-coordinator", "start", "--run", str(self.run), "--json")
        self.coordinator = await Command.start(words, log=self.log("coordinator"), follow=True)
        self._follow(self.coordinator)
        async with asyncio.timeout(START_SECONDS):
            while "http" not in self.coordinator.status:
                if self.coordinator.process.returncode is not None:
                    raise Refused(Code.CHILD_DIED, "the coordinator did not start", fix=f"See {self.coordinator.log}")
                await asyncio.sleep(0.1)
        self.page = f"http://127.0.0.1:{self.coordinator.status['http']}"
        asked = ("invite", "create", "--uses", str(len(self.names)), "--expires", "1d", "--run", str(self.run))
        self.invite = (await call("barnraise-coordinator", *asked, log=self.log("invite"))).strip()
        for name in self.names:
            await self.start_node(name)

    async def start_node(self, name: str) -> None:
        words = ["barnraise", "join", self.invite, "--yes", "--json", "--home", str(self.folder / name), "--name", name]
        words += ["--threads", "1", "--device", "cpu", "--listen", "127.0.0.1:0"]
        words += ["--allow-root"]  # whoever started all this as root has decided it
        self.nodes[name] = await Command.start(words, log=self.log(name), follow=True)
        self._follow(self.nodes[name])

    def _follow(self, command: Command) -> None:
        task = asyncio.create_task(command.follow())
        self.followers.add(task)
        task.add_done_callback(self.followers.discard)

    async def kill_node(self, name: str) -> None:
        """kill -9, then the same command again: the node finds its home and goes on."""
        self.kills += 1
        self.killed.add(name)
        self.nodes[name].process.kill()
        await self.nodes[name].process.wait()
        before = self.view.get("run", {}).get("round", 0)
        await asyncio.sleep(AWAY_SECONDS)
        await self.start_node(name)
        while (self.nodes[name].status.get("round") or 0) <= before or not self.nodes[name].status.get("rostered"):
            await asyncio.sleep(FOLLOW_SECONDS)
        self.killed.discard(name)
        self.recoveries += 1

    async def look(self) -> None:
        """Read the coordinator's REST view, as any dashboard would."""
        with suppress(OSError, ValueError):
            self.view = await asyncio.to_thread(_get, f"{self.page}/api/v1/status")
            self.history = (await asyncio.to_thread(_get, f"{self.page}/api/v1/history"))["rows"]

    async def stop(self) -> None:
        for task in self.followers:
            task.cancel()
        commands = [*self.nodes.values(), *((self.coordinator,) if self.coordinator else ())]
        await asyncio.gather(*(command.stop() for command in commands), return_exceptions=True)


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # our own page on loopback
        value: dict[str, Any] = json.load(answer)
        return value


def texts() -> list[Path]:
    """Real text that is on every machine: the standard library's own sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in library.iterdir() if path.suffix == ".py"]
    packages = [path for path in library.iterdir() if (path / "__init__.py").exists() and path.name not in LEFT_OUT]
    return sorted(found + packages)


def write_run_file(path: Path, *, nodes: int, rounds: Sequence[Sequence[int]]) -> None:
    """The demo's run: the defaults, but small, quick and on loopback."""
    document = tomlkit.parse(path.read_text())
    for section, values in DEMO.items():
        for key, value in values.items():
            _set(document, section, key, value)
    _set(document, "run", "min_nodes", nodes)
    _set(document, "run", "rounds", sum(count for count, _ in rounds))
    _set(document, "rounds", "inner_steps", [list(pair) for pair in rounds])
    path.write_text(tomlkit.dumps(document))


def _set(document: Any, section: str, key: str, value: Any) -> None:
    if section not in document:
        document[section] = tomlkit.table()
    document[section][key] = value
