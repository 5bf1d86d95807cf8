"""Everything that goes wrong, and when: all of it follows from the seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from random import Random
from typing import TYPE_CHECKING

from node.core import session
from protocol.types import NodeId

if TYPE_CHECKING:
    from tests.sim.node import SimNode
    from tests.sim.world import World

CLOCK_JUMP_SECONDS = 3600.0  # of the coordinator's wall clock, at a restart
RESEARCHER_SECONDS = 20.0  # between two looks at the page
SLOW = 20.0  # times slower than the others trains a slow node


@dataclass(frozen=True)
class Weather:
    """How bad the world is. Chances are per message or effect; rates are per minute, of each node or of the swarm."""

    loss: float = 0.0
    doubled: float = 0.0
    late: float = 0.0  # messages that come when nobody expects them any more
    delay_max: float = 0.05
    reduce_failure: float = 0.0  # of one member's data for one reducer, or of one part for one member
    crash_per_effect: float = 0.0  # a process ends between two effects of one step
    slow_nodes: float = 0.0  # the share of nodes that are slow for ever
    clock_jumps: float = 0.0  # of the coordinator's starts, those with another idea of the time
    node_kills: float = 0.0
    node_leaves: float = 0.0
    node_pauses: float = 0.0
    node_freezes: float = 0.0
    node_backups: float = 0.0  # a disk is put back as it was some time ago
    coordinator_kills: float = 0.0
    coordinator_freezes: float = 0.0
    coordinator_outages: float = 0.0
    partitions: float = 0.0
    one_way_partitions: float = 0.0
    dead_links: float = 0.0
    exoduses: float = 0.0  # half or all of the nodes go at once, and come back at once
    rollbacks: float = 0.0
    coordinator_backups: float = 0.0  # its database is put back as it was some time ago


CALM = Weather()
WORST = Weather(
    loss=0.25,
    doubled=0.1,
    late=0.2,
    delay_max=0.5,
    reduce_failure=0.3,
    crash_per_effect=0.005,
    slow_nodes=0.5,
    clock_jumps=0.5,
    node_kills=2.0,
    node_leaves=1.0,
    node_pauses=1.0,
    node_freezes=0.5,
    node_backups=0.3,
    coordinator_kills=1.0,
    coordinator_freezes=0.3,
    coordinator_outages=0.1,
    partitions=2.0,
    one_way_partitions=2.0,
    dead_links=2.0,
    exoduses=0.2,
    rollbacks=0.6,
)


def weather(luck: Random) -> Weather:
    """Each swarm has some kinds of trouble and not others: what one kind hides, another swarm without it shows.

    (Groce et al., "Swarm testing", 2012.)"""
    chosen = {}
    for kind in fields(Weather):
        worst = getattr(WORST, kind.name)
        if worst and luck.random() < 0.5:  # the others have tests of their own
            chosen[kind.name] = worst * 10 ** -luck.uniform(0, 1.5)
    return Weather(**chosen)


class Trouble:
    """Keeps things going wrong until it is over."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.luck = world.luck
        self.over = False
        self._doomed: set[NodeId] = set()  # their disks are put back when they next vote
        self._old: dict[NodeId, int] = {}  # with a disk from a backup: the newest roster that they may have voted under

    def begin(self) -> None:
        weather, nodes = self.world.weather, len(self.world.nodes)
        for per_minute, strike in (
            (weather.node_kills * nodes, self._kill),
            (weather.node_leaves * nodes, self._leave),
            (weather.node_pauses * nodes, self._pause),
            (weather.node_freezes * nodes, self._freeze),
            (weather.node_backups * nodes, self._put_back),
            (weather.coordinator_kills, self._kill_coordinator),
            (weather.coordinator_freezes, self._freeze_coordinator),
            (weather.coordinator_outages, self._outage),
            (weather.partitions, self._part),
            (weather.one_way_partitions, self._part_one_way),
            (weather.dead_links, self._cut_link),
            (weather.exoduses, self._exodus),
            (weather.rollbacks, self._roll_back),
            (weather.coordinator_backups, self._put_back_coordinator),
        ):
            self._recur(per_minute / 60, strike)
        self.world.at(RESEARCHER_SECONDS, self._look_after)

    def _look_after(self) -> None:
        """When a majority has lost its memory, nobody can say what it decided: the researcher starts a new branch."""
        self.world.at(RESEARCHER_SECONDS, self._look_after)
        coordinator = self.world.coordinator
        newest = coordinator.state.roster
        if not coordinator.awake or newest is None:
            return
        roster, silent = newest.roster, coordinator.state.silent
        remembering = [node for node in roster.nodes if silent.get(node, -1) < roster.epoch]
        if len(remembering) < roster.quorum:
            self.world.struck("majority forgotten")
            coordinator.roll_back(coordinator.state.head.round)

    def end(self) -> None:
        """Everything works again; a minority may stay paused, and must not matter."""
        self.over = True
        world = self.world
        world.weather = CALM
        world.cuts.clear()
        world.coordinator.unavailable = False
        world.coordinator.thaw()
        world.coordinator.start()
        nodes = list(world.nodes.values())
        paused = self.luck.sample(nodes, self.luck.randrange((len(nodes) + 1) // 2)) if self.luck.random() < 0.3 else []
        for node in nodes:
            node.slow = 1.0
            node.thaw()
            node.start()
            node.asked(session.PauseAsked(None) if node in paused else session.ResumeAsked())

    def _recur(self, per_second: float, strike: Callable[[], None]) -> None:
        if per_second <= 0:
            return

        def happen() -> None:
            if not self.over:
                strike()
                self.world.at(self.luck.expovariate(per_second), happen)

        self.world.at(self.luck.expovariate(per_second), happen)

    def _until(self, seconds: float, mend: Callable[[], None]) -> None:
        """What ends by itself; once all is over, it has been mended already."""
        self.world.at(seconds, lambda: None if self.over else mend())

    def restart_seconds(self) -> float:
        """A supervisor starts a process again at once; a person takes their time."""
        return self.luck.uniform(0.05, 0.5) if self.luck.random() < 0.5 else self.luck.uniform(1.0, 30.0)

    def _any(self) -> SimNode:
        return self.luck.choice(list(self.world.nodes.values()))

    def _kill(self) -> None:
        node = self._any()
        self.world.struck("node killed", node.name)
        node.kill()
        self.world.at(self.restart_seconds(), node.start)

    def _leave(self) -> None:
        node = self._any()
        self.world.struck("node left", node.name)
        node.leave()
        self.world.at(self.restart_seconds(), node.start)

    def _pause(self) -> None:
        node = self._any()
        self.world.struck("node paused", node.name)
        node.asked(session.PauseAsked(None))
        self._until(self.luck.uniform(1, 30), lambda: node.asked(session.ResumeAsked()))

    def _freeze(self) -> None:
        """SIGSTOP, or a laptop that sleeps: then its clock stands still as well."""
        node = self._any()
        self.world.struck("node frozen", node.name)
        node.freeze(clock_stands=self.luck.random() < 0.5)
        self._until(self._long(2, 90), node.thaw)

    def _put_back(self) -> None:
        """At once, or where it hurts most: right after the node has voted."""
        node = self._any()
        if self.luck.random() < 0.5:
            self._doomed.add(node.me)
        else:
            self._forget(node)

    def voted(self, node: SimNode) -> None:
        if node.me in self._doomed:
            self._doomed.discard(node.me)
            self._forget(node)

    def _forget(self, node: SimNode) -> None:
        """A crash, and then a disk as it was at some earlier start or fold; never of a majority at a time.

        What a majority has forgotten nobody can know again: no protocol survives it, and none of ours says so."""
        state = self.world.coordinator.state
        open_rosters = [signed.roster for signed in state.rosters]
        oldest = min((roster.epoch for roster in open_rosters), default=-1)
        self._old = {n: epoch for n, epoch in self._old.items() if epoch >= oldest}
        spare = min((len(roster.members) - roster.quorum for roster in open_rosters), default=0)
        if len(self._old.keys() | {node.me}) > spare:
            return
        self._old[node.me] = state.next_epoch - 1
        node.kill()
        if node.put_back(self.luck):
            self.world.struck("disk put back", node.name)
        self.world.at(self.restart_seconds(), node.start)

    def _kill_coordinator(self) -> None:
        self.world.struck("coordinator killed")
        self.world.coordinator.kill()
        self.world.at(self.restart_seconds(), self.world.coordinator.start)

    def _freeze_coordinator(self) -> None:
        self.world.struck("coordinator frozen")
        self.world.coordinator.freeze(clock_stands=False)
        self._until(self._long(2, 60), self.world.coordinator.thaw)

    def _outage(self) -> None:
        self.world.struck("coordinator away")
        coordinator = self.world.coordinator
        coordinator.kill()
        coordinator.unavailable = True

        def back() -> None:
            coordinator.unavailable = False
            coordinator.start()

        self.world.at(self._long(30, 600), back)

    def _put_back_coordinator(self) -> None:
        coordinator = self.world.coordinator
        coordinator.kill()
        if coordinator.backup is not None:
            self.world.struck("coordinator's database put back")
            coordinator.store = coordinator.backup.copied()
        self.world.at(self._long(1, 120), coordinator.start)

    def _part(self) -> None:
        self._split("partition", both_ways=True)

    def _part_one_way(self) -> None:
        self._split("one-way partition", both_ways=False)

    def _split(self, kind: str, *, both_ways: bool) -> None:
        names = self.world.names
        side = {name for name in names if self.luck.random() < 0.4}
        cut = {(a, b) for a in side for b in names if b not in side}
        self._cut(kind, cut | {(b, a) for a, b in cut} if both_ways else cut)

    def _cut_link(self) -> None:
        one, other = self.luck.sample(self.world.names, 2)
        self._cut("dead link", {(one, other), (other, one)} if self.luck.random() < 0.5 else {(one, other)})

    def _cut(self, kind: str, links: set[tuple[str, str]]) -> None:
        cuts = self.world.cuts
        self.world.struck(kind, " ".join(sorted({a for a, _ in links})))
        cuts.append(links)
        self._until(self._long(1, 60), lambda: cuts.remove(links))

    def _exodus(self) -> None:
        nodes = list(self.world.nodes.values())
        going = nodes if self.luck.random() < 0.5 else self.luck.sample(nodes, (len(nodes) + 1) // 2)
        politely = self.luck.random()
        self.world.struck("mass leave", " ".join(node.name for node in going))
        back = self._long(3, 90)
        for node in going:
            go = node.leave if self.luck.random() < politely else node.kill
            self.world.at(self.luck.uniform(0, 2), lambda go=go: None if self.over else go())
            self.world.at(back + self.luck.uniform(0, 2), node.start)

    def _roll_back(self) -> None:
        """To anywhere: most often to a recent head, sometimes to the newest itself, sometimes twice in a row."""
        coordinator = self.world.coordinator
        if not coordinator.awake:
            return
        head = coordinator.state.head.round
        self.world.struck("rollback", f"from {head}")
        for _ in range(2 if self.luck.random() < 0.2 else 1):
            back = 0 if self.luck.random() < 0.3 else int(self._long(1, 8))
            coordinator.roll_back(max(0, coordinator.state.head.round - back))

    def _long(self, least: float, most: float) -> float:
        """Mostly short, sometimes very long."""
        return math.exp(self.luck.uniform(math.log(least), math.log(most)))
