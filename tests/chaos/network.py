"""Links that can be cut in one direction, or made slow: the bench's small Ethernet, with faults. Needs root."""

import subprocess
from contextlib import contextmanager

from tests.bench import ethernet
from tests.bench.ethernet import possible  # noqa: F401  # asked by whoever would make one

NOBODY = "02:00:00:00:00:99"  # no card has it: what is sent there is lost without a word
FOR_EVER = ("nud", "permanent")
BURST = "16kb"
QUEUE = "300ms"


class Lan(ethernet.Network):
    """Namespaces on one bridge; None is the hub, where the coordinator is."""

    def cut(self, source, target):
        """From now on nothing that `source` sends arrives at `target`."""
        self._in(source, "neigh", "replace", self.address(target), "lladdr", NOBODY, "dev", _device(source), *FOR_EVER)

    def heal(self, source, target):
        self._in(source, "neigh", "flush", "to", self.address(target), "dev", _device(source), *FOR_EVER)

    def slow(self, index, rate):
        """Both directions of a node's line, such as 1mbit."""
        shape = ("tbf", "rate", rate, "burst", BURST, "latency", QUEUE)
        self._in(index, "qdisc", "replace", "dev", _device(index), "root", *shape, tool="tc")
        self._in(None, "qdisc", "replace", "dev", f"port{index}", "root", *shape, tool="tc")

    def full_speed(self, index):
        self._in(index, "qdisc", "del", "dev", _device(index), "root", tool="tc")
        self._in(None, "qdisc", "del", "dev", f"port{index}", "root", tool="tc")

    @contextmanager
    def inside(self, space):
        """In a namespace by its file; then back in the hub."""
        ethernet.enter(space)
        try:
            yield
        finally:
            self.enter(None)

    def _in(self, index, *words, tool="ip"):
        self.enter(index)
        try:
            subprocess.run([tool, *words], check=True, capture_output=True)
        finally:
            self.enter(None)


def _device(index):
    return "hub" if index is None else f"node{index}"
