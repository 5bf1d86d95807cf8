"""Bad lines: every packet between machines goes through a process of ours, which is slow and late, and loses, doubles
and swaps. From a seed; IPv4 and IPv6. Needs root, ip and /dev/net/tun; no netem.

`python -m tests.chaos.line` is that process. `Lines` starts it, and it ends with `close`, or with whoever has started it.
"""

import argparse
import fcntl
import heapq
import ipaddress
import json
import os
import select
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from random import Random

from tests.bench import ethernet

TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ROOT = Path(__file__).parents[2]
PACKET_BYTES_MAX = 1 << 16
READS_AT_ONCE = 64  # of one machine, before the others have their turn
V4, V6 = "9.9.1.{}", "2a0e:77::{}"  # of the internet, which is not here


@dataclass(frozen=True)
class Weather:
    """Of one way of one machine's line: out of it, or in to it."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # at most so many seconds more, for each packet anew: packets overtake each other
    loss: float = 0.0  # shares of packets
    doubled: float = 0.0
    swapped: float = 0.0  # they overtake whatever is on its way
    bits_per_second: float = float("inf")
    queue: float = 0.5  # seconds of it; what finds it full is lost


FINE = Weather()


class Way:
    """When each packet arrives: not at all, once, or twice."""

    def __init__(self, seed):
        self.weather = FINE
        self.counted = dict.fromkeys(("passed", "lost", "full", "doubled", "swapped"), 0)
        self._luck = Random(seed)
        self._sent_at = 0.0

    def arrivals(self, size, now):
        weather, luck = self.weather, self._luck
        if weather == FINE:
            return (now,)
        sent_at = max(self._sent_at, now)
        if sent_at - now > weather.queue:
            return self._count("full")
        self._sent_at = sent_at + size * 8 / weather.bits_per_second
        if luck.random() < weather.loss:
            return self._count("lost")
        at = self._sent_at + weather.delay + weather.jitter * luck.random()
        if luck.random() < weather.swapped:
            at = self._sent_at
            self.counted["swapped"] += 1
        if luck.random() < weather.doubled:
            return self._count("doubled", at, at + weather.jitter * luck.random())
        return self._count("passed", at)

    def _count(self, what, *at):
        self.counted[what] += 1
        return at


class Router:
    """Machines by the addresses that packets name. A packet goes one machine's way out, then another's way in."""

    def __init__(self, handles, addresses, seed):
        self._handles = handles
        self._at = {bytes.fromhex(text): index for text, index in addresses.items()}
        self._ways = {(i, way): Way(f"{seed}/{i}/{way}") for i in range(len(handles)) for way in ("out", "in")}
        self._under_way = []  # (when, number, where it goes next, packet); None: it has arrived
        self._numbers = count()

    def run(self):
        poll = select.poll()
        for handle in (0, *self._handles):
            poll.register(handle, select.POLLIN)
        machines = {handle: index for index, handle in enumerate(self._handles)}
        while True:
            wait = (self._under_way[0][0] - time.monotonic()) * 1000 if self._under_way else None
            for handle, _ in poll.poll(wait if wait is None else max(0.0, wait)):
                if handle:
                    self._read(machines[handle])
                elif not self._obey():
                    return
            self._move(time.monotonic())

    def _obey(self):
        """One order, a line of JSON; none when whoever gave them has gone."""
        line = sys.stdin.buffer.raw.readline()
        if not line:
            return False
        order = json.loads(line)
        if (weather := order.get("weather")) is not None:
            self._ways[order["machine"], order["way"]].weather = Weather(**weather)
        else:
            found = {f"{index} {way}": each.counted for (index, way), each in self._ways.items()}
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        return True

    def _read(self, source):
        for _ in range(READS_AT_ONCE):
            try:
                packet = os.read(self._handles[source], PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            where = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
            if (target := self._at.get(where)) is not None and target != source:
                self._send(packet, (source, "out"), target, time.monotonic())

    def _send(self, packet, way, target, now):
        for at in self._ways[way].arrivals(len(packet), now):
            heapq.heappush(self._under_way, (at, next(self._numbers), way[1], target, packet))

    def _move(self, now):
        while self._under_way and self._under_way[0][0] <= now:
            at, _, way, target, packet = heapq.heappop(self._under_way)
            if way == "out":
                self._send(packet, (target, "in"), target, at)
                continue
            try:
                os.write(self._handles[target], packet)
            except OSError:
                continue  # its machine is full, or down: lost


class Lines:
    """The machines of a swarm, as tests.chaos.network.Lan has them; None is the one with the coordinator."""

    def __init__(self, nodes, *, seed=1):
        ethernet.enter_own_network()
        self._spaces = [_here()]
        for _ in range(nodes):
            ethernet.enter_own_network()
            self._spaces.append(_here())
        handles, addresses = [], {}
        for index in range(nodes + 1):
            ethernet.enter(self._spaces[index])
            handles.append(_tun())
            _ip("addr", "add", f"{V6.format(index + 1)}/64", "dev", "line", "nodad")
            _ip("addr", "add", f"{V4.format(index + 1)}/24", "dev", "line")
            addresses |= {_packed(each.format(index + 1)): index for each in (V4, V6)}
            _ip("link", "set", "line", "up")
        self.enter(None)
        words = ("--seed", str(seed), "--addresses", json.dumps(addresses), *map(str, handles))
        self._router = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.line", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=handles,
            cwd=ROOT,
        )
        for handle in handles:
            os.close(handle)

    @staticmethod
    def address(index):
        """Where it listens."""
        return "[::]"

    def enter(self, index):
        """Let this thread, and what it starts, be in a node's namespace; None is the coordinator's."""
        ethernet.enter(self._spaces[_place(index)])

    def has_v4(self, index, *, has):
        self.enter(index)
        try:
            _ip("addr", "add" if has else "del", f"{V4.format(_place(index) + 1)}/24", "dev", "line")
        finally:
            self.enter(None)

    def becomes(self, index, *, out=FINE, into=FINE):
        """From now on this is the weather of a machine's line."""
        for way, weather in (("out", out), ("in", into)):
            self._order(machine=_place(index), way=way, weather=asdict(weather))

    def counted(self):
        """What every way has done with packets in bad weather, all together."""
        self._order()
        found = json.loads(self._router.stdout.readline())
        return {what: sum(each[what] for each in found.values()) for what in next(iter(found.values()))}

    def _order(self, **words):
        self._router.stdin.write(json.dumps(words).encode() + b"\n")
        self._router.stdin.flush()

    def close(self):
        self._router.stdin.close()
        self._router.wait(10)
        self._router.stdout.close()
        for space in self._spaces:
            os.close(space)


def possible():
    return ethernet.possible() and TUN.exists()


def _place(index):
    return 0 if index is None else index + 1


def _tun():
    """A device of this thread's namespace whose packets we read and write."""
    handle = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", b"line", IFF_TUN | IFF_NO_PI))
    return handle


def _here():
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _ip(*words):
    subprocess.run(["ip", *words], check=True)


def _packed(address):
    return ipaddress.ip_address(address).packed.hex()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", required=True)
    parser.add_argument("--addresses", type=json.loads, required=True)
    parser.add_argument("handles", type=int, nargs="+")
    given = parser.parse_args()
    Router(given.handles, given.addresses, given.seed).run()


if __name__ == "__main__":
    main()
