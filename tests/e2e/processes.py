"""A run and its nodes as real processes, started by the public commands; knows how to wait, to kill, and to look."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import tomlkit

from coordinator.folder import RunFolder
from node.control import ask
from protocol.errors import Refused

MARK = "BARNRAISE_E2E"  # in the environment of everything that a world starts
PATIENCE_SECONDS = 240.0  # the machine may be shared; on two quiet cores nothing here takes a tenth of it
POLL_SECONDS = 0.1
PORTS_OF_A_PROCESS = 100  # between finding a port and listening there another process may find it as well
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TEXT = tuple(LIBRARY / name for name in ("asyncio", "email", "json", "unittest"))
TINY = {
    "run": {"rounds": 0, "min_nodes": 2, "seed": 1},
    "model": {
        "config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    },
    "data": {"context": 64, "heldout": 0.02},
    "train": {"batch_sequences": 8},
    "rounds": {"inner_steps": [[1, 4]], "gather_seconds": 2.0, "deadline_seconds": 30.0},
    "evaluate": {"sequences": 64, "base_every_rounds": 4},
    "leases": {"sequences": 64, "seconds": 15.0},
    "coordinator": {"heartbeat_seconds": 1.0},
}


def until(true, what, *, seconds=PATIENCE_SECONDS):
    """Wait for a condition and answer with what it returned; it may refuse while things are on their way."""
    end, trouble = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found := true():
                return found
        except (Refused, OSError, ValueError) as error:
            trouble = error
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"waited {seconds:.0f} s in vain until {what}" + (f"; last: {trouble!r}" if trouble else ""))


def free_ports(count):
    """Ports that nothing listens on now, below those that the kernel deals out by itself; no neighbour looks there first."""
    found = []
    for port in range(20_000 + os.getpid() % 100 * PORTS_OF_A_PROCESS, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection may linger; nobody listens
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def words_of(process):
    """Its command line; none of one that has ended meanwhile."""
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def gone(processes, *, seconds=PATIENCE_SECONDS):
    until(lambda: not [each for each in processes if alive(each)], f"{processes} are gone", seconds=seconds)


class World:
    """A folder for everything that one test starts, and the processes that bear its mark."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="e2e-"))  # short: a socket's path has to fit in it
        self.started = []

    def environment(self):
        return {
            **os.environ,
            "BARNRAISE_ALLOW_ROOT": "1",
            MARK: str(self.folder),
            "BARNRAISE_PARENT": str(os.getpid()),  # nothing outlives the test, however it ends
            "HOME": str(self.folder),
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
        }

    def program(self, name, log):
        """How a public command is started."""
        return [str(Path(sys.executable).with_name(name))]

    def command(self, *words, log, **options):
        """A public command that goes on; its two outputs go to files."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "logs" / f"{log}.out").open("ab") as out, self.log(log).open("ab") as err:
            process = subprocess.Popen(
                [*self.program(words[0], log), *map(str, words[1:])],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment(),
                cwd=self.folder,
                **options,
            )
        self.started.append(process)
        return process

    def log(self, name):
        return self.folder / "logs" / f"{name}.log"

    def call(self, *words, code=0):
        """A public command that ends; its stdout and stderr."""
        ended = subprocess.run(
            [str(Path(sys.executable).with_name(words[0])), *map(str, words[1:])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=self.folder,
            timeout=PATIENCE_SECONDS,
        )
        assert ended.returncode == code, f"{words} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout, ended.stderr

    def family(self):
        """Every living process that this world has started, whoever its parent is now."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and alive(process):
                    mine.append(process)
            except (psutil.Error, OSError):
                continue
        return mine

    def sockets(self):
        return [path for path in self.folder.rglob("*") if path.is_socket()]

    def nothing_is_left(self):
        until(lambda: not self.family(), "every process has ended")
        assert not self.sockets()
        assert not [path for path in self.temporary.iterdir() if not path.name.startswith("torchinductor_")]

    def close(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for process in self.family():
            process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


class Run:
    """A coordinator in a folder of its own."""

    def __init__(self, world, name="tiny", settings=None, ports=None):
        self.world = world
        self.name = name
        self.folder = world.folder / name
        self.grpc, self.http, self.p2p = ports or free_ports(3)
        self.process = None
        world.call("barnraise-coordinator", "new", name, "--dir", self.folder)
        addresses = {"listen": self.grpc, "http": self.http, "p2p": self.p2p}
        self.write({**TINY, **(settings or {})})
        self.write({"coordinator": {key: f"127.0.0.1:{port}" for key, port in addresses.items()}})

    def write(self, settings):
        """Change the run file, as a researcher would."""
        path = self.folder / "run.toml"
        document = tomlkit.parse(path.read_text())
        for section, values in settings.items():
            if section not in document:
                document[section] = tomlkit.table()
            for key, value in values.items():
                document[section][key] = value
        path.write_text(tomlkit.dumps(document))

    def add(self, *paths):
        self.world.call("barnraise-coordinator", "data", "add", *paths, "--skip-bad", "--run", self.folder)

    def start(self):
        self.process = self.world.command(
            "barnraise-coordinator", "start", "--run", self.folder, "--json", log=self.name
        )
        until(lambda: self.ended() or self.page("status"), f"{self.name} serves")
        assert not self.ended(), self.world.log(self.name).read_text()

    def ended(self):
        return self.process.poll() is not None

    def page(self, what):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/api/v1/{what}", timeout=5) as answer:
            return json.load(answer)

    def invite(self, *words):
        out, _ = self.world.call("barnraise-coordinator", "invite", "create", *words, "--run", self.folder)
        return out.strip()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_SECONDS)

    def store(self):
        return RunFolder(self.folder).open_store()

    def entries(self):
        store = self.store()
        try:
            return store.entries()
        finally:
            store.close()

    def marks(self):
        """All that is held against anybody."""
        store = self.store()
        try:
            return store.marks()
        finally:
            store.close()

    def members(self):
        """The newest roster's nodes, in its order."""
        store = self.store()
        try:
            rosters = store.rosters()
        finally:
            store.close()
        return rosters[-1].roster.nodes if rosters else ()


class Node:
    """One daemon with its home."""

    def __init__(self, world, name):
        self.world = world
        self.name = name
        self.home = world.folder / name
        self.process = None

    def join(self, invite):
        self._run("join", invite, "--yes", "--name", self.name)

    def start(self):
        self._run("start")

    def _run(self, *words):
        options = ("--home", self.home, "--threads", "1", "--device", "cpu", "--listen", "127.0.0.1:0", "--json")
        self.process = self.world.command("barnraise", *words, *options, log=self.name)

    def ended(self):
        return self.process.poll() is not None

    def status(self):
        assert not self.ended(), f"{self.name} ended with {self.process.returncode}: {self.said()}"
        return ask(self.home, "status", seconds_max=10.0)

    def said(self):
        paths = (self.world.log(self.name), self.home / "logs" / "node.log")
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in paths if path.exists())

    def reaches(self, round_number):
        return until(
            lambda: (self.status().get("round") or 0) >= round_number and self.status(),
            f"{self.name} reaches round {round_number}",
        )

    def rostered(self):
        return until(lambda: self.status().get("rostered") and self.status(), f"{self.name} is rostered")

    def tell(self, *words, code=0):
        return self.world.call("barnraise", *words, "--home", self.home, code=code)

    def tree(self):
        """The daemon and everything under it."""
        daemon = psutil.Process(self.process.pid)
        return [daemon, *daemon.children(recursive=True)]

    def part(self, module):
        """The process of the daemon that runs this module."""
        (found,) = [each for each in self.tree() if module in words_of(each)]
        return found

    def kill(self):
        """kill -9 of the daemon alone; what it had started must go by itself."""
        tree = self.tree()
        self.process.kill()
        self.process.wait()
        return tree

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_SECONDS)

    def last_words(self):
        """The last status that the daemon printed."""
        lines = (self.world.folder / "logs" / f"{self.name}.out").read_text().splitlines()
        return json.loads(lines[-1])
