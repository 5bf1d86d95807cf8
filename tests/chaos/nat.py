"""Nodes behind routers that masquerade, as at home: they have no address that anybody else could call.

make chaos PART=nat [ARGS="--rounds 5"]       # root and nft (Debian: nftables); without them it says so and is left out

All homes have the same private addresses, and no router forwards a port.

some: two of four are at home. Then one router gets another address, as lines at home do every night: all connections
through it are dead, and nobody is told.
all: everybody is at home. The coordinator says so, and a node beside it that trains nothing averages for them; then that
one is killed, stays away for a while, and is started again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protocol.errors import Code
from tests.chaos import audit, network, report
from tests.chaos.swarm import Member, Swarm, ends_when_told, until
from tests.e2e.processes import words_of

HUB, PUBLIC, ROUTERS = "9.9.1.1", "9.9.1.{}", "9.9.2.{}"  # addresses of the internet, which is not here
HOME, GATEWAY = "192.168.1.2", "192.168.1.1"  # in every home the same
AWAY_SECONDS = 45.0  # of the only node that can be called: it is missed, and said to be
TOLD_SECONDS = 240.0  # from the start of nodes on a machine that other work shares; after 30 s of training at most
BACK_SECONDS = 120.0  # from another address of a router to the next round with what the node behind it has trained
IDLE = {"activity": "averaging for others", "trains": False, "sequences_left": 0, "credit_tokens": 0, "device": None}
MASQUERADE = """
table ip nat {
    chain out { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }
}
table ip filter {
    chain in { type filter hook input priority filter; policy drop; ct state established,related accept; }
    chain through {
        type filter hook forward priority filter; policy drop
        ct state established,related accept
        iifname "lan" accept
    }
}
"""


class Internet(network.Lan):
    """A hub with the coordinator, members with addresses of their own, and members behind routers."""

    def __init__(self, nodes, homes):
        super().__init__(0)
        ip("addr", "add", f"{HUB}/16", "dev", "hub")
        self.routers = {}
        for index in range(nodes):
            space = self._space()
            if index not in homes:
                self._plug(f"port{index}", space, "wan", PUBLIC.format(10 + index))
            else:
                self.routers[index] = router = self._space()
                self._plug(f"port{index}", router, "wan", ROUTERS.format(10 + index))
                self._behind(router, space)
            self._spaces.append(space)
        self._homes = homes

    def address(self, index):
        if index is None:
            return HUB
        return HOME if index in self._homes else PUBLIC.format(10 + index)

    def moves(self, index):
        """The router of this member has another address from now on; what it was forwarding is forgotten."""
        with self.inside(self.routers[index]):
            ip("addr", "flush", "dev", "wan")
            ip("addr", "add", f"{ROUTERS.format(100 + index)}/16", "dev", "wan")
            subprocess.run(["nft", "flush", "ruleset"], check=True)
            subprocess.run(["nft", "-f", "-"], input=MASQUERADE, text=True, check=True)

    def _space(self):
        network.ethernet.enter_own_network()
        space = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.enter(None)
        return space

    def _plug(self, port, space, name, address):
        ip("link", "add", port, "type", "veth", "peer", "name", name, "netns", f"/proc/{os.getpid()}/fd/{space}")
        ip("link", "set", port, "master", "hub", "up")
        with self.inside(space):
            ip("addr", "add", f"{address}/16", "dev", name)
            ip("link", "set", name, "up")

    def _behind(self, router, space):
        with self.inside(router):
            ip("link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", f"/proc/{os.getpid()}/fd/{space}")
            ip("addr", "add", f"{GATEWAY}/24", "dev", "lan")
            ip("link", "set", "lan", "up")
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            subprocess.run(["nft", "-f", "-"], input=MASQUERADE, text=True, check=True)
        with self.inside(space):
            ip("addr", "add", f"{HOME}/24", "dev", "eth0")
            ip("link", "set", "eth0", "up")
            ip("route", "add", "default", "via", GATEWAY)


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def possible():
    return network.possible() and shutil.which("nft") is not None


class Helper(Member):
    """A node beside the coordinator that trains nothing."""

    def __init__(self, arena, lan):
        super().__init__(arena, "helper", lan, None)

    def _run(self, *words):
        super()._run(*words, "--no-training")


def main():
    ends_when_told()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="with something by everybody, before anything happens")
    parser.add_argument("--homes", choices=("some", "all"), nargs="+", default=("some", "all"), help="which nodes' are")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the run")
    given = parser.parse_args()
    if not possible():
        print("left out: it takes root, ip and nft")
        return 0
    return max([played(given, {"some": some, "all": everybody}[homes]) for homes in given.homes])


def played(given, play):
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="barnraise-chaos-")) / "w"
    homes = (2, 3) if play is some else (0, 1, 2)
    nodes = max(homes) + 1
    swarm = Swarm(folder, nodes=nodes, lan=Internet(nodes, homes))
    try:
        print(f"{len(homes)} of {nodes} nodes are at home")
        wrong, facts = play(swarm, [swarm.members[index] for index in homes], given.rounds)
    finally:
        swarm.close(keep=given.keep)
    print(f"{time.monotonic() - began:.0f} s")
    report.ending(wrong + swarm.unplanned, facts)
    return 1 if wrong or swarm.unplanned else 0


def some(swarm, behind, count):
    swarm.start()
    wrong = _everybody_brings(swarm, behind, count)
    moved, at = behind[0], time.time()
    swarm.lan.moves(swarm.members.index(moved))
    back = until(
        lambda: swarm.watch.contributed(moved.key, at + 5.0),  # what was on its way had been sent before
        f"{moved.name} brings something through its router's new address",
        seconds=BACK_SECONDS,
    )
    print(f"its router has another address: {moved.name} is in a round again after {back.at - at:.0f} s")
    found, facts = audit.everything(swarm, swarm.members)
    return wrong + found, facts


def everybody(swarm, behind, count):
    swarm.start()
    at = time.time()
    _nobody_can_be_called(swarm, behind, times=1)
    print(f"nobody can be called: all are told after {time.time() - at:.0f} s; rounds: {len(swarm.watch.after(0))}")
    wrong = [f"round {each.round} was certified though nobody could be called" for each in swarm.watch.after(0)]
    helper = Helper(swarm.arena, swarm.lan)
    swarm.homes.append(helper.home)
    at = time.time()
    helper.join(swarm.invite)
    first = swarm.certified_after(at)
    print(f"the first round ends {first.at - at:.0f} s after a node that trains nothing was started")
    wrong += _everybody_brings(swarm, behind, count, helper=helper)
    helper.kill()
    time.sleep(AWAY_SECONDS)
    _nobody_can_be_called(swarm, behind, times=2)
    at = time.time()
    helper.start()
    again = swarm.certified_after(at)
    print(f"killed and away for {AWAY_SECONDS:.0f} s, back: a round ends {again.at - at:.0f} s later")
    swarm.settle(at)
    swarm.members.append(helper)
    said = helper.status()
    wrong += [f"the helper says {key} {said[key]}" for key, value in IDLE.items() if said[key] != value]
    wrong += [f"the helper runs {words}" for words in map(words_of, helper.tree()) if "node.trainer" in words]
    wrong += [
        f"the helper holds {path.name}" for path in _shards(swarm) & {p.name for p in helper.home.glob("blobs/*/*")}
    ]
    found, facts = audit.everything(swarm, swarm.members)
    return wrong + found, facts


def _nobody_can_be_called(swarm, behind, times):
    """The page, the coordinator's output and each node say so, for the first time or again."""
    code = Code.NOBODY_CALLABLE.code
    until(
        lambda: code in swarm.coordinator.page("status")["run"]["state"], f"the page says {code}", seconds=TOLD_SECONDS
    )
    log = swarm.arena.log(swarm.coordinator.name).read_text()
    assert log.count(f"warning: {code}") == times == log.count("--no-training --listen 0.0.0.0:49303"), log[-2000:]
    for member in behind:
        until(
            lambda member=member: member.status()["reach"] == "nobody", f"{member.name} says that nobody can be called"
        )


def _everybody_brings(swarm, behind, count, helper=None):
    """Rounds in which all take part; what the status, the roster and the records say of who is where."""
    calm = swarm.settle(time.time())
    print(f"everybody has brought something after {max(each.round for each in calm.values()) + 1} rounds", flush=True)
    keys = {member.key: member.name for member in swarm.members}
    start = time.time()
    swarm.certified_after(start, count)
    rounds = swarm.watch.after(start)[:count]
    shares = {name: sum(any(n.startswith(key) for n in r.tokens) for r in rounds) for key, name in keys.items()}
    print(f"of {len(rounds)} rounds, those with something by each: {shares}; attempts {[r.attempt for r in rounds]}")
    open_ones = [member for member in (*swarm.others(*behind), helper) if member is not None]
    reach = {member.name: member.status()["reach"] for member in (*behind, *open_ones)}
    print(f"status says: {reach}")
    wrong = [f"{m.name} is {reach[m.name]}" for m in behind if reach[m.name] != "outbound-only"]
    wrong += [f"{m.name} is {reach[m.name]}" for m in open_ones if reach[m.name] != "direct"]
    return [*wrong, *_roles(swarm, {member.key for member in behind})]


def _shards(swarm):
    with audit.opened(swarm.coordinator) as store:
        return {shard.digest for shard in store.shards()}


def _roles(swarm, behind):
    """What the newest roster and the records say of those behind routers."""
    with audit.opened(swarm.coordinator) as store:
        roster, entries = store.rosters()[-1].roster, store.entries()

    def is_behind(node):
        return any(node.startswith(key) for key in behind)

    for member in roster.members:
        if is_behind(member.node) != (member.role.value == "client"):
            yield f"{member.node[:8]} is rostered as {member.role.value}"
        if any("192.168." in address for address in member.addresses):
            yield f"the roster names {member.addresses}"
    for entry in entries:
        if is_behind(entry.record.leader) or any(is_behind(part.reducer) for part in entry.record.parts):
            yield f"round {entry.record.round} was led or reduced from behind a router"


if __name__ == "__main__":
    sys.exit(main())
