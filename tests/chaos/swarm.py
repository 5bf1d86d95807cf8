"""A coordinator and nodes for chaos: each with a network and a disk of its own, where this machine lets us make them.

It starts and ends them, tells them where to die, and reads from their own journals when each round was certified.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from protocol import canonical
from protocol.errors import Refused
from protocol.log import record_hash
from protocol.types import LogEntry
from tests.chaos import network, victim
from tests.e2e.processes import TEXT, TINY, Node, Run, World, alive, gone, until

ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 0.1
PATIENCE_SECONDS = 240.0  # other work may share the machine
DEATH_SECONDS = 150.0  # for a stage to be reached
DISK_BYTES = 4 << 30  # of a small disk of its own; only what is used takes memory
CLONE_NEWNS = 0x00020000
NAMES = ("ash", "birch", "cedar", "dogwood", "elm", "fir", "hazel")  # the last is for those who join later
SETTINGS = {
    **TINY,
    "run": {**TINY["run"], "min_nodes": 3},
    "model": {"config": {**TINY["model"]["config"], "intermediate_size": 1024}},  # a part for each of six nodes
    "rounds": {"inner_steps": [[1, 16]], "gather_seconds": 2.0, "deadline_seconds": 15.0},
    "leases": {"sequences": 512, "seconds": 20.0},
    "coordinator": {"heartbeat_seconds": 2.0},
    "evaluate": {"sequences": 32, "base_every_rounds": 5},
}


class Arena(World):
    """A world whose commands die where they are told to."""

    def __init__(self, folder):
        super().__init__(folder)
        self.orders = folder / "orders"
        self.orders.mkdir()

    def program(self, name, log):
        interpreter = super().program("python", log)
        return [*interpreter, "-m", "tests.chaos.victim", log, name]

    def environment(self):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**super().environment(), victim.FOLDER: str(self.orders), "PYTHONPATH": path}

    def order(self, name, stage, count=1):
        (self.orders / name).write_text(f"{stage}:{count}")

    def pending(self, name):
        return (self.orders / name).exists()

    def withdraw(self, name):
        (self.orders / name).unlink(missing_ok=True)


class Coordinator(Run):
    """The coordinator, in the hub of the network."""

    def __init__(self, arena, settings, lan):
        super().__init__(arena, settings=settings)
        self.disk = self.folder / ".barnraise"
        arena.disk(self.disk)
        self.host = "127.0.0.1"
        if lan is not None:
            self.host = lan.address(None)
            self.write({"coordinator": {"listen": f"{self.host}:{self.grpc}", "p2p": f"{self.host}:{self.p2p}"}})
        self.reached_at = (self.host,)

    def invite(self, *words):
        return super().invite(*(f"--address={host}:{self.grpc}" for host in self.reached_at), *words)

    def tree(self):
        if self.ended():
            return []
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def round(self):
        return self.page("status")["run"]["round"]


class Member(Node):
    """A node on its own line."""

    def __init__(self, arena, name, lan, index):
        super().__init__(arena, name)
        arena.disk(self.home)
        self.lan, self.index = lan, index

    @property
    def host(self):
        return "127.0.0.1" if self.lan is None else self.lan.address(self.index)

    def _run(self, *words):
        options = ("--home", self.home, "--threads", "1", "--device", "cpu", "--listen", f"{self.host}:0", "--json")
        if self.lan is not None:
            self.lan.enter(self.index)
        try:
            self.process = self.world.command("barnraise", *words, *options, log=self.name)
        finally:
            if self.lan is not None:
                self.lan.enter(None)

    @property
    def running(self):
        return self.process is not None and not self.ended()

    @property
    def key(self):
        """The start of its public key, once it has one."""
        return self.status()["node"]

    def p2pd(self):
        (found,) = [each for each in self.tree() if each.name().startswith("p2pd")]
        return found


@dataclass(frozen=True)
class Certified:
    """A round as the first node that folded it has it in its journal."""

    round: int
    at: float  # wall clock
    hash: str
    epoch: int
    attempt: int
    tokens: dict  # by node


@dataclass
class Watch(threading.Thread):
    """Reads every journal again and again. Two records that follow the same head would be the end of all our claims."""

    homes: list
    certified: dict = field(default_factory=dict)  # by the head that a record follows
    conflicts: list = field(default_factory=list)
    _seen: dict = field(default_factory=dict)
    _ending: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self):
        while not self._ending.wait(LOOK_SECONDS):
            self.look()

    def look(self):
        for home in tuple(self.homes):
            for path in sorted(home.glob("journal/*/log/????????.json")):
                with suppress(OSError, Refused, ValueError):
                    at = path.stat().st_mtime
                    if self._seen.get(path) != at:
                        self._take(canonical.from_bytes(LogEntry, path.read_bytes()), at)
                        self._seen[path] = at

    def _take(self, entry, at):
        record, ballot = entry.record, entry.certificate.ballot
        known = self.certified.get(record.previous)
        found = record_hash(record)
        if known is not None and known.hash != found:
            self.conflicts.append(f"round {record.round}: {known.hash[:12]} and {found[:12]}")
        elif known is None or at < known.at:
            tokens = {each.node: each.tokens for each in record.contributions}
            self.certified[record.previous] = Certified(record.round, at, found, ballot.epoch, ballot.attempt, tokens)

    def end(self):
        self._ending.set()
        self.join()

    def in_order(self):
        """As they were certified; a rollback makes round numbers come again."""
        return sorted(self.certified.copy().values(), key=lambda each: each.at)

    def newest_round(self):
        return self.in_order()[-1].round if self.certified else -1

    def after(self, at):
        """The rounds certified after a moment."""
        return [each for each in self.in_order() if each.at > at]

    def contributed(self, key, at):
        """The first round after a moment that holds something by this node."""
        return next((each for each in self.after(at) if any(node.startswith(key) for node in each.tokens)), None)


class Swarm:
    """All of it. `members` are expected to take part; `spare` names are for nodes that join later."""

    def __init__(self, folder, *, nodes, settings=SETTINGS, own_machines=True, lan=None):
        self.arena = Arena(folder)
        self.small_disks, self.disks = own_machines and _own_mounts(), []
        self.arena.disk = self._disk
        self.lan = lan or (network.Lan(len(NAMES)) if own_machines and network.possible() else None)
        self.coordinator = Coordinator(self.arena, settings, self.lan)
        self.homes = []
        self.watch = Watch(self.homes)
        self.members = [self.member(name) for name in NAMES[:nodes]]
        self.left = []
        self.joins = 0
        self.unplanned = []  # ends that nobody ordered

    def member(self, name):
        index = NAMES.index(name.partition("-")[0])
        found = Member(self.arena, name, self.lan, index)
        self.homes.append(found.home)
        return found

    def start(self):
        self.open()
        for member in self.members:  # one by one: five times three interpreters that import torch take their time
            member.join(self.invite)
            until(
                lambda member=member: member.status()["activity"] != "syncing",
                f"{member.name} is ready",
                seconds=PATIENCE_SECONDS,
            )

    def open(self, texts=TEXT):
        """The coordinator serves, and an invite is written; nobody has joined."""
        self.coordinator.add(*texts)
        self.coordinator.start()
        self.invite = self.coordinator.invite("--uses", "1000")
        self.watch.start()

    def newcomer(self):
        """A node that was never here before; it has not joined yet."""
        self.joins += 1
        return self.member(f"{NAMES[-1]}-{self.joins}")

    def retire(self, member):
        """It leaves for good, politely."""
        self.members.remove(member)
        member.tell("leave")
        member.process.wait(60)

    def others(self, *victims):
        return [member for member in self.members if member not in victims]

    # disks

    def _disk(self, folder):
        """A file system of its own for one folder; it goes with our mount namespace."""
        if self.small_disks:
            folder.mkdir()
            self.disks.append(folder)
            assert _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "none", folder)

    def fill(self, folder):
        """Not one byte is left. What is written meanwhile makes the kernel refuse; then it is tried again."""

        def filled():
            used = shutil.disk_usage(folder).used
            return _mount("-o", f"remount,size={max(used, 4096)}", folder)

        until(filled, f"{folder} is full")

    def make_room(self, folder):
        assert _mount("-o", f"remount,size={DISK_BYTES}", folder)

    # deaths

    def dies_at(self, member, stage, count=1):
        """Wait until it has killed itself there; the moment of its death."""
        tree = member.tree()
        self.arena.order(member.name, stage, count)
        try:
            until(lambda: member.ended(), f"{member.name} dies at {stage}", seconds=DEATH_SECONDS)
        finally:
            at = time.time()
            missed = self.arena.pending(member.name)
            self.arena.withdraw(member.name)
        assert not missed, f"{member.name} ended before it came to {stage}: {member.said()}"
        gone(tree)
        return at

    # calm

    def certified_after(self, at, count=1, seconds=PATIENCE_SECONDS):
        """Wait for that many more rounds; the last of them."""
        return until(
            lambda: len(found := self.watch.after(at)) >= count and found[count - 1],
            f"{count} rounds are certified",
            seconds=seconds,
        )

    def settle(self, at, seconds=PATIENCE_SECONDS):
        """Wait until every member has brought something to a round after a moment; when each did."""
        back = {}
        for member in self.members:
            key = until(lambda member=member: self._revived(member) and member.key, f"{member.name} answers")
            back[member.name] = until(
                lambda member=member, key=key: self._revived(member) and self.watch.contributed(key, at),
                f"{member.name} brings something to a round",
                seconds=seconds,
            )
        until(lambda: self.coordinator.round() > self.watch.newest_round(), "the coordinator follows", seconds=seconds)
        return back

    def _revived(self, member):
        """Running; if it has ended though nobody told it to, note that and start it again."""
        if not member.running:
            self.unplanned.append(f"{member.name} ended with {member.process.returncode}: {member.said()[-1500:]}")
            member.start()
        return True

    def heads(self):
        return {member.name: member.status()["head"] for member in self.members}

    def agreed(self):
        """The head and state digest that all replicas and the coordinator share, once nothing is on its way."""
        heads = list(self.heads().values())
        page = self.coordinator.page("status")
        same = all(head == heads[0] for head in heads)
        return (
            heads[0] if same and (page["head"], page["run"]["round"]) == (heads[0]["hash"], heads[0]["round"]) else None
        )

    def close(self, *, keep=False):
        if self.watch.is_alive():
            self.watch.end()
        self.arena.close()
        if keep:
            pipes = shutil.ignore_patterns("*.sock", "blobs")
            shutil.copytree(self.arena.folder, f"{self.arena.folder}-kept", symlinks=True, ignore=pipes)
            print(f"kept: {self.arena.folder}-kept")
        for folder in self.disks:
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
        shutil.rmtree(self.arena.folder, ignore_errors=True)  # --keep has another
        with suppress(OSError):  # the folder around it was made for us; with --keep it holds the other
            self.arena.folder.parent.rmdir()


def ends_when_told():
    """All that was started ends with us on SIGTERM too, also when it comes twice: to us, and to our group."""

    def end(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit("ended by SIGTERM")

    signal.signal(signal.SIGTERM, end)


def _own_mounts():
    """Leave for a mount namespace of our own, so that no mount outlives us; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNS):
        return False
    return _mount("--make-rprivate", "/")


def _mount(*words):
    """Whether it worked."""
    return not subprocess.run(["mount", *map(str, words)], check=False, capture_output=True).returncode


__all__ = ["SETTINGS", "Certified", "Member", "Swarm", "alive", "ends_when_told", "gone", "until"]
