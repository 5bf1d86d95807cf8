"""The simulated world: virtual time, the processes on it, and the network between them. Only edges are simulated."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from coordinator.core import leases, machine
from node.core import rounds, session
from protocol.messages import Commit, Message
from protocol.types import LogEntry, NodeId
from tests.sim.coordinator import SimCoordinator
from tests.sim.faults import Trouble, Weather, weather
from tests.sim.invariants import InvariantBroken, Truth
from tests.sim.liar import Liar
from tests.sim.node import Averaging, SimNode, Swarm

T = TypeVar("T")
Action = Callable[[], None]

LATE_SECONDS = 20.0  # how long a message can stay on its way


class World:
    """One swarm. Everything that happens in it follows from the seed."""

    def __init__(self, seed: int, *, under: Weather | None = None, swarm: Swarm | None = None) -> None:
        self.seed = seed
        self.luck = random.Random(seed)
        self.weather = under if under is not None else weather(self.luck)
        self.now = 0.0
        self.truth = Truth()
        self.averagings: dict[object, Averaging] = {}
        self.cuts: list[set[tuple[str, str]]] = []  # links that are dead, one way
        self.trace: list[str] = []
        self.counts: Counter[str] = Counter()
        self.effects = 0  # carried out by anybody
        self.crash_at: int | None = None  # before this effect its process ends
        self.calm_since = self.calm_certified = self.calm_settled = self.calm_brought = 0.0
        self._queue: list[tuple[float, int, Action]] = []
        self._serial = 0
        self.swarm = swarm if swarm is not None else Swarm.of(self.luck, seed=seed)
        self.trouble = Trouble(self)
        self.coordinator = SimCoordinator(self)
        self.nodes = {node.me: node for node in map(self._node, range(self.swarm.nodes))}
        self.names = [self.coordinator.name, *self.nodes]

    def _node(self, index: int) -> SimNode:
        lie = self.swarm.liars.get(index)
        return SimNode(self, index) if lie is None else Liar(self, index, lie)

    # time

    def at(self, seconds: float, action: Action) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (self.now + seconds, self._serial, action))

    def run(self, until: float, *, goal: Callable[[], bool] = lambda: False) -> None:
        """Until this time, or until the goal is reached."""
        queue = self._queue
        try:
            while not goal():
                if queue[0][0] > until:
                    self.now = until
                    return
                self.now, _, action = heapq.heappop(queue)
                action()
        except AssertionError as error:
            raise self.broken(str(error) or repr(error)) from error

    def broken(self, what: str) -> InvariantBroken:
        return InvariantBroken(f"seed {self.seed}, {self.now:.3f} s: {what}")

    # network

    def reaches(self, one: str, other: str) -> bool:
        return not self.cuts or not any((one, other) in cut for cut in self.cuts)

    def deliver(self, sender: str, receiver: str, action: Action, *, slowness: float = 1.0, once: bool = False) -> None:
        luck, weather = self.luck, self.weather
        if not self.reaches(sender, receiver) or luck.random() < weather.loss:
            self.counts["lost"] += 1
            return
        for _ in range(1 if once or luck.random() >= weather.doubled else 2):
            late = luck.random() < weather.late
            self.at(luck.uniform(0.001, LATE_SECONDS if late else weather.delay_max * slowness), action)

    # faults

    def strikes(self) -> bool:
        """Whether a process ends before the effect that it is about to carry out."""
        self.effects += 1
        if self.effects - 1 == self.crash_at:
            self.struck("crash at an effect")
            return True
        return self.weather.crash_per_effect > 0 and self.luck.random() < self.weather.crash_per_effect

    def struck(self, kind: str, whom: str = "") -> None:
        self.note(f"{kind} {whom}")
        self.counts[kind] += 1

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:9.3f}  {text}")

    # what is true

    def said(self, node: NodeId, message: Message) -> None:
        if isinstance(message, Commit):
            self.entry_certified(LogEntry(message.record, message.certificate), node)
        else:
            self.truth.said(node, message)

    def entry_certified(self, entry: LogEntry, who: str) -> None:
        if self.truth.entry_certified(entry, who):
            self.note(f"round {entry.record.round} certified by {who}")


def _replace(value: T, /, **changes: object) -> T:
    """dataclasses.replace for plain frozen values, several times as fast: half of a simulation was spent in it."""
    fresh: T = object.__new__(type(value))
    fields = fresh.__dict__
    fields.update(value.__dict__)
    size = len(fields)
    fields.update(changes)
    assert len(fields) == size, f"{type(value).__name__} has no such field: {changes.keys()}"
    return fresh


@contextmanager
def swiftly() -> Iterator[None]:
    """The machines as they are, but for how they copy their values."""
    modules = (rounds, session, machine, leases)
    before = [module.replace for module in modules]
    for module in modules:
        module.replace = _replace  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, replace in zip(modules, before, strict=True):
            module.replace = replace  # type: ignore[attr-defined]
