"""The faults: each a small function that brings one about, undoes it, and says when it struck and whom."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tests.e2e.processes import alive, gone, until, words_of

STOPPED_SECONDS = 65.0  # longer than a round's deadline, a lease, a call and the wait for a stalled download
STALLED_SECONDS = 30.0
CUT_SECONDS = 20.0  # a round's deadline, and then some
FULL_SECONDS = 15.0
AWAY_SECONDS = 30.0
SLOW_ROUNDS = 4
SLOW_RATE = "1mbit"
STAGES_OF_A_ROUND = ("step", "promise", "begin", "send", "reduce", "vote", "voted", "commit", "fold", "save", "sync")
STAGES_OF_A_JOIN = ("download", "verify", "load")
STAGES_OF_THE_COORDINATOR = ("effect", "transaction", "entry", "leases", "roster", "blob", "checkpoint", "sync")
COUNT_MAX = {"step": 50, "send": 4, "reduce": 2, "sync": 12, "effect": 30, "transaction": 12, "download": 2}

FAULTS: dict[str, "Fault"] = {}


@dataclass(frozen=True)
class Strike:
    """A fault that has been brought about, and undone."""

    at: float
    victims: tuple = ()
    over: float = 0.0  # when it was undone: a restart ordered, a link whole again
    note: str = ""
    back_seconds: float | None = None  # the coordinator's own return with the full log
    afterwards: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Fault:
    name: str
    cause: Callable
    needs: str  # a network or a disk of our own, which takes root
    tries: int


def fault(name, *, needs="", tries=1):
    def register(cause):
        FAULTS[name] = Fault(name, cause, needs, tries)
        return cause

    return register


# nodes


@fault("node: kill -9 at any moment", tries=2)
def node_killed(swarm, luck):
    victim = luck.choice(swarm.members)
    time.sleep(luck.uniform(0, 3))
    tree = victim.kill()
    at = time.time()
    gone(tree)
    victim.start()
    return Strike(at, (victim,), time.time())


def _node_killed_at(stage):
    def cause(swarm, luck):
        victim = luck.choice(swarm.members)
        at = swarm.dies_at(victim, stage, luck.randint(1, COUNT_MAX.get(stage, 1)))
        victim.start()
        return Strike(at, (victim,), time.time())

    return cause


for _stage in STAGES_OF_A_ROUND:
    fault(f"node: kill -9 at {_stage}")(_node_killed_at(_stage))


def _joiner_killed_at(stage):
    def cause(swarm, luck):
        newcomer = swarm.newcomer()
        swarm.arena.order(newcomer.name, stage, luck.randint(1, COUNT_MAX.get(stage, 1)))
        newcomer.join(swarm.invite)
        until(newcomer.ended, f"{newcomer.name} dies at {stage}")
        at = time.time()
        assert not swarm.arena.pending(newcomer.name), newcomer.said()
        newcomer.start()
        swarm.members.append(newcomer)
        return Strike(at, (newcomer,), time.time(), afterwards=lambda: swarm.retire(newcomer))

    return cause


for _stage in STAGES_OF_A_JOIN:
    fault(f"joiner: kill -9 at {_stage}")(_joiner_killed_at(_stage))


@fault("joiner: late", tries=2)
def late_joiner(swarm, luck):
    newcomer = swarm.newcomer()
    at = time.time()
    newcomer.join(swarm.invite)
    swarm.members.append(newcomer)
    return Strike(at, (newcomer,), time.time(), afterwards=lambda: swarm.retire(newcomer))


def _part_killed(which):
    def cause(swarm, luck):
        victim = luck.choice(swarm.members)
        time.sleep(luck.uniform(0, 3))
        find = victim.p2pd if which == "p2pd" else lambda: victim.part(which)
        part = until(find, f"{victim.name} has a {which}")  # the fault before may have been in it
        tree = [part, *part.children(recursive=True)]
        part.kill()
        at = time.time()
        gone(tree)
        return Strike(at, (victim,), at)

    return cause


for _which, _what in (("node.trainer", "trainer"), ("node.swarm", "averager"), ("p2pd", "p2pd")):
    fault(f"node: kill -9 of its {_what}")(_part_killed(_which))


@fault("node: SIGSTOP of all of it, as a laptop sleeps")
def node_asleep(swarm, luck):
    victim = luck.choice(swarm.members)
    tree = victim.tree()
    at = time.time()
    _stop(tree)
    time.sleep(STOPPED_SECONDS)
    _go_on(tree)
    return Strike(at, (victim,), time.time(), f"stopped for {STOPPED_SECONDS:.0f} s")


@fault("node: SIGSTOP of its averager")
def averager_stalled(swarm, luck):
    victim = luck.choice(swarm.members)
    part = victim.part("node.swarm")
    tree = [part, *part.children(recursive=True)]
    at = time.time()
    _stop(tree)
    time.sleep(STALLED_SECONDS)
    _go_on(tree)
    return Strike(at, (victim,), time.time(), f"stopped for {STALLED_SECONDS:.0f} s")


@fault("most nodes: kill -9 at once")
def majority_killed(swarm, luck):
    victims = tuple(luck.sample(swarm.members, len(swarm.members) // 2 + 1))
    trees = [member.tree() for member in victims]
    for member in victims:
        member.kill()
    at = time.time()
    for tree in trees:
        gone(tree)
    for member in victims:
        member.start()
    return Strike(at, victims, time.time())


@fault("power cut: kill -9 of all nodes and the coordinator")
def power_cut(swarm, luck):
    trees = [member.tree() for member in (*swarm.members, swarm.coordinator)]
    for member in swarm.members:
        member.kill()
    swarm.coordinator.kill()
    at = time.time()
    for tree in trees:
        gone(tree)
    began = time.monotonic()
    swarm.coordinator.start()
    back = time.monotonic() - began
    for member in swarm.members:
        member.start()
    return Strike(at, tuple(swarm.members), time.time(), back_seconds=back)


# the coordinator


@fault("coordinator: kill -9 at any moment", tries=2)
def coordinator_killed(swarm, luck):
    time.sleep(luck.uniform(0, 5))
    tree = swarm.coordinator.tree()
    swarm.coordinator.kill()
    return _coordinator_back(swarm, time.time(), tree)


def _coordinator_killed_at(stage):
    def cause(swarm, luck):
        tree = swarm.coordinator.tree()
        swarm.arena.order(swarm.coordinator.name, stage, luck.randint(1, COUNT_MAX.get(stage, 1)))
        if stage == "roster":  # it signs one when a node comes or goes
            luck.choice(swarm.members).tell("pause")
        until(swarm.coordinator.ended, f"the coordinator dies at {stage}")
        at = time.time()
        assert not swarm.arena.pending(swarm.coordinator.name), "it ended by itself"
        strike = _coordinator_back(swarm, at, tree)
        if stage == "roster":
            for member in swarm.members:
                member.tell("resume")
        return strike

    return cause


for _stage in STAGES_OF_THE_COORDINATOR:
    fault(f"coordinator: kill -9 at {_stage}")(_coordinator_killed_at(_stage))


@fault("coordinator: away")
def coordinator_away(swarm, luck):
    tree = swarm.coordinator.tree()
    swarm.coordinator.kill()
    at = time.time()
    time.sleep(AWAY_SECONDS)
    strike = _coordinator_back(swarm, at, tree)
    return Strike(at, (), strike.over, f"away for {AWAY_SECONDS:.0f} s", strike.back_seconds)


@fault("coordinator: rollback by three rounds")
def rolled_back(swarm, luck):
    to = max(0, swarm.coordinator.round() - 3)
    at = time.time()
    words = ("rollback", "--to", to, "--yes", "--reason", "chaos", "--run", swarm.coordinator.folder)
    swarm.arena.call("barnraise-coordinator", *words)
    return Strike(at, tuple(swarm.members), time.time(), f"to round {to}")


@fault("coordinator: kill -9 of its rendezvous")
def rendezvous_killed(swarm, luck):
    (found,) = [each for each in swarm.coordinator.tree() if "coordinator.rendezvous" in words_of(each)]
    found.kill()
    at = time.time()
    time.sleep(5)
    return _unless_ended(swarm, Strike(at, (), at))


@fault("coordinator: newest checkpoint rotten on disk")
def checkpoint_rotten(swarm, luck):
    tree = swarm.coordinator.tree()
    swarm.coordinator.kill()
    at = time.time()
    store = swarm.coordinator.store()
    try:
        base = store.newest_base()
    finally:
        store.close()
    if base is not None:
        blobs = [path for path in swarm.coordinator.folder.rglob(base.blob.digest) if path.is_file()]
        _flip(blobs[0], luck)
    return _coordinator_back(swarm, at, tree)


# disks


@fault("node: disk full", needs="disk")
def node_disk_full(swarm, luck):
    victim = luck.choice(swarm.members)
    at = time.time()
    swarm.fill(victim.home)
    time.sleep(FULL_SECONDS)
    swarm.make_room(victim.home)
    over, note = time.time(), "it went on"
    if victim.ended():
        note = f"it ended with exit code {victim.process.returncode}, and was started again"
        victim.start()
    return Strike(at, (victim,), over, note)


@fault("coordinator: disk full", needs="disk")
def coordinator_disk_full(swarm, luck):
    at = time.time()
    swarm.fill(swarm.coordinator.disk)
    time.sleep(FULL_SECONDS)
    swarm.make_room(swarm.coordinator.disk)
    return _unless_ended(swarm, Strike(at, (), time.time(), "it went on"))


@fault("node: its own checkpoint rotten on disk")
def own_checkpoint_rotten(swarm, luck):
    victim = luck.choice(swarm.members)
    gone(victim.kill())
    at = time.time()
    rotten = list(victim.home.glob("journal/*/base*.safetensors"))
    assert rotten, "it has no checkpoint of its own"
    for path in rotten:
        _flip(path, luck)
    victim.start()
    return Strike(at, (victim,), time.time())


@fault("node: disk restored from an old backup")
def restored_from_backup(swarm, luck):
    victim = luck.choice(swarm.members)
    backup = swarm.arena.folder / "backup"
    gone(victim.kill())
    shutil.copytree(victim.home, backup, ignore=shutil.ignore_patterns("runtime"))
    victim.start()
    began = time.time()
    swarm.settle(began)
    swarm.certified_after(time.time(), 3)
    gone(victim.kill())
    at = time.time()
    for name in ("blobs", "journal"):
        shutil.rmtree(victim.home / name)
        shutil.copytree(backup / name, victim.home / name)
    for path in backup.iterdir():
        if path.is_file():
            shutil.copy2(path, victim.home / path.name)
    shutil.rmtree(backup)
    victim.start()
    return Strike(at, (victim,), time.time())


# the network


def _cut(swarm, pairs, seconds, *, victims, note):
    at = time.time()
    for source, target in pairs:
        swarm.lan.cut(source, target)
    time.sleep(seconds)
    for source, target in pairs:
        swarm.lan.heal(source, target)
    return Strike(at, tuple(victims), time.time(), note)


def _both_ways(left, right):
    return [pair for a in left for b in right for pair in ((a, b), (b, a))]


@fault("network: cut between halves, the coordinator with the greater", needs="network")
def halves(swarm, luck):
    few = luck.sample(swarm.members, (len(swarm.members) - 1) // 2)
    many = [member.index for member in swarm.others(*few)]
    pairs = _both_ways([member.index for member in few], [*many, None])
    return _cut(swarm, pairs, CUT_SECONDS, victims=few, note=f"{len(few)} | {len(many)} + coordinator")


@fault("network: cut between halves, the coordinator with the lesser", needs="network")
def halves_without_coordinator(swarm, luck):
    few = luck.sample(swarm.members, (len(swarm.members) - 1) // 2)
    many = [member.index for member in swarm.others(*few)]
    pairs = _both_ways([*(member.index for member in few), None], many)
    return _cut(swarm, pairs, CUT_SECONDS, victims=few, note=f"{len(few)} + coordinator | {len(many)}")


@fault("network: one way, a node is heard by nobody", needs="network")
def mute(swarm, luck):
    victim = luck.choice(swarm.members)
    others = [member.index for member in swarm.others(victim)]
    pairs = [(victim.index, other) for other in others]
    return _cut(swarm, pairs, CUT_SECONDS, victims=[victim], note="the coordinator still hears it")


@fault("network: one way, a node hears nobody", needs="network")
def deaf(swarm, luck):
    victim = luck.choice(swarm.members)
    others = [member.index for member in swarm.others(victim)]
    pairs = [(other, victim.index) for other in [*others, None]]
    return _cut(swarm, pairs, CUT_SECONDS, victims=[victim], note="not even the coordinator")


@fault("network: 1 Mbit/s for a node", needs="network")
def slow_node(swarm, luck):
    victim = luck.choice(swarm.members)
    return _slow(swarm, [victim])


@fault("network: 1 Mbit/s for all nodes", needs="network")
def slow_network(swarm, luck):
    return _slow(swarm, swarm.members)


def _slow(swarm, victims):
    at = time.time()
    for member in victims:
        swarm.lan.slow(member.index, SLOW_RATE)
    try:
        swarm.certified_after(at, SLOW_ROUNDS)
    finally:
        for member in victims:
            swarm.lan.full_speed(member.index)
    seen = swarm.watch.after(at)[:SLOW_ROUNDS]
    keys = [member.key for member in victims]
    inside = sum(any(node.startswith(key) for node in each.tokens) for key in keys for each in seen)
    note = f"in {inside} of {len(seen) * len(keys)} places of {SLOW_ROUNDS} rounds, {seen[-1].at - at:.0f} s"
    return Strike(at, tuple(victims), time.time(), note)


# helpers


def _coordinator_back(swarm, at, tree):
    """Start it again; how long until it serves, with every round that it had."""
    gone(tree[1:])
    kept = swarm.watch.newest_round()
    began = time.monotonic()
    swarm.coordinator.start()
    until(lambda: swarm.coordinator.round() > kept, "the coordinator has the full log")
    return Strike(at, (), time.time(), back_seconds=time.monotonic() - began)


def _unless_ended(swarm, strike):
    """A coordinator that could not go on may end with a clear word; then it is started again."""
    newest = swarm.watch.newest_round()
    until(lambda: swarm.coordinator.ended() or swarm.coordinator.round() > newest, "the coordinator goes on or ends")
    if not swarm.coordinator.ended():
        return strike
    code = swarm.coordinator.process.returncode
    again = _coordinator_back(swarm, strike.at, [])
    note = f"it ended with exit code {code}, and was started again"
    return Strike(strike.at, strike.victims, again.over, note, again.back_seconds)


def _flip(path, luck):
    """One bit of the second half, where the parameters are."""
    size = path.stat().st_size
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(luck.randrange(size // 2, size))
        old = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([old ^ (1 << luck.randrange(8))]))


def _stop(tree):
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)


def _go_on(tree):
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            if alive(process):
                process.send_signal(signal.SIGCONT)


def any_luck(seed, *words):
    """Luck of its own for each try, so that one can be repeated without those before it."""
    return random.Random(":".join(map(str, (seed, *words))))
