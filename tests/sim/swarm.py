"""Simulates one swarm: rounds under faults, then calm, in which everyone has to go on within a stated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.types import Head
from tests.sim.faults import Weather
from tests.sim.invariants import Known
from tests.sim.node import Swarm
from tests.sim.world import World, swiftly

ROUND_SECONDS = 10.0  # a round time: what a round without faults takes in these swarms, when it takes long
CALM_ROUNDS = 8  # round times from the end of all faults to the next certified round, at most
SETTLED_ROUNDS = 12  # and to the moment when every node and the archive are there as well
BRINGING_ROUNDS = 20  # and until a record has taken work of everyone who trains
WEATHER_SECONDS_MAX = 3600.0  # however bad it is: then the rounds that are missing are certified in the calm


@dataclass(frozen=True)
class Report:
    """What one swarm went through."""

    rounds: int
    attempts: int
    to_certify: float  # round times from the end of the faults to the next certified round
    to_settle: float  # and until everyone was there
    to_bring: float  # and until everyone had brought something


def simulate(
    seed: int,
    *,
    rounds: int = 50,
    under: Weather | None = None,
    swarm: Swarm | None = None,
    crash_at: int | None = None,
) -> World:
    """A swarm under faults until so many rounds are certified, then calm; checks that it then goes on.

    `crash_at` names one effect, counted over all processes, before which its process ends."""
    with swiftly():
        world = World(seed, under=under, swarm=swarm)
        world.crash_at = crash_at
        play(world, rounds)
    return world


def play(world: World, rounds: int) -> None:
    truth = world.truth
    world.trouble.begin()
    world.run(WEATHER_SECONDS_MAX, goal=lambda: truth.certified >= rounds)
    world.trouble.end()
    world.calm_since = world.now
    truth.bringers.clear()
    target = _next_round(world, "after the faults ended")
    world.calm_certified = world.now
    _wait_while(world, lambda: _lacking(world, target), SETTLED_ROUNDS)
    world.calm_settled = world.now
    _wait_while(world, lambda: _brings_nothing(world), BRINGING_ROUNDS)
    world.calm_brought = world.now
    followed = (entry for node in world.nodes.values() for entry in node.disk.log if node.me not in truth.liars)
    truth.nothing_is_lost(world.coordinator.store.line, followed)
    while truth.certified < rounds:
        _next_round(world, "in the calm")


def _next_round(world: World, when: str) -> Known:
    """Wait for a record on the newest branch."""
    truth, before = world.truth, world.truth.certified

    def found() -> bool:
        return truth.certified > before and truth.newest.branch == len(truth.rollbacks)

    world.run(world.now + CALM_ROUNDS * ROUND_SECONDS, goal=found)
    if not found():
        raise world.broken(f"no round was certified within {CALM_ROUNDS} round times {when}")
    return truth.newest


def _wait_while(world: World, lacking: Callable[[], str], rounds: int) -> None:
    while (what := lacking()) and world.now < world.calm_since + rounds * ROUND_SECONDS:
        world.run(world.now + 0.5)
    if what:
        raise world.broken(f"{rounds} round times after the faults ended, {what}")


def _lacking(world: World, target: Known) -> str:
    """Who has not yet gone on to this head."""

    def there(head: Head, branch: int) -> bool:
        return branch > target.branch or (branch == target.branch and head.round >= target.head.round)

    for node in world.nodes.values():
        if not there(node.rounds.head, node.rounds.branch):
            return (
                f"{node.name} is at round {node.rounds.head.round} of branch {node.rounds.branch}, not at {target.head}"
            )
    state = world.coordinator.state
    if not there(state.head, state.branch):
        return f"the coordinator's log ends at round {state.head.round} of branch {state.branch}"
    if state.branch == target.branch and state.replica.round < target.head.round:
        return f"the archive ends at round {state.replica.round}, {len(state.wanted)} parts are wanted"
    return ""


def _brings_nothing(world: World) -> str:
    """Who trains, and no record since the faults ended has taken any of it."""
    well = world.truth.bringers | world.truth.liars
    idle = (n for n in world.nodes.values() if n.session.trains and n.me not in well)
    return next((f"no record has taken work of {node.name}" for node in idle), "")


def report(world: World) -> Report:
    return Report(
        rounds=world.truth.certified,
        attempts=len(world.truth.attempts),
        to_certify=(world.calm_certified - world.calm_since) / ROUND_SECONDS,
        to_settle=(world.calm_settled - world.calm_since) / ROUND_SECONDS,
        to_bring=(world.calm_brought - world.calm_since) / ROUND_SECONDS,
    )
