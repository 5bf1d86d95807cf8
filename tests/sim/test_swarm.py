"""Hundreds of simulated swarms, and proof that the simulator sees what it is there to see: mutants of the rules die."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.core import leases, machine, rosters
from node.core import rounds, session
from protocol.types import NodeId, Role, Roster
from tests.sim import swarm
from tests.sim.faults import CALM, Weather
from tests.sim.invariants import InvariantBroken
from tests.sim.liar import Lie
from tests.sim.node import Swarm
from tests.sim.swarm import simulate
from tests.sim.world import World

SEEDS = 60  # of at least 50 rounds each; thousands more by `make sim`
ROOT = Path(__file__).parents[2]
ROUGH = Weather(
    loss=0.2,
    doubled=0.1,
    late=0.2,
    delay_max=0.5,
    reduce_failure=0.3,
    crash_per_effect=0.005,
    node_kills=2.0,
    node_leaves=0.5,
    node_backups=0.3,
    coordinator_kills=0.3,
    partitions=2.0,
    rollbacks=0.5,
)


def short(crash_at):
    gentle = replace(CALM, rollbacks=6.0)
    return simulate(3, rounds=5, under=gentle, swarm=Swarm(nodes=3, start_seconds=1.0), crash_at=crash_at)


def rough(seed, under=ROUGH):
    return simulate(seed, rounds=25, under=under, swarm=Swarm(nodes=5))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_invariant_holds_in_swarm_after_swarm(seed):
    simulate(seed)


def test_a_sweep_goes_through_the_seeds_that_it_was_given():
    command = [sys.executable, "-m", "tests.sim", "--first", "60", "--seeds", "2", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 seeds, " in done.stdout and "0 failures" in done.stdout, done


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_every_invariant_holds_where_everything_fails_at_once(seed):
    rough(seed)


@pytest.mark.parametrize("lie", Lie)
@pytest.mark.parametrize(("seed", "nodes"), [(0, 3), (1, 4), (2, 5)])
def test_a_liar_costs_attempts_and_nobody_else_is_struck(lie, seed, nodes):
    rainy = replace(CALM, loss=0.05, reduce_failure=0.1, delay_max=0.2)
    world = simulate(seed, rounds=12, under=rainy, swarm=Swarm(nodes=nodes, liars={1: lie}))
    liar = world.nodes[NodeId("node01")]
    assert liar.told or lie is Lie.FORGETS, "it lied, or had nothing to lie about"
    assert world.coordinator.state.trails.keys() <= {liar.me}
    assert world.truth.forks == 0 or lie is Lie.TWO_FACED


def test_a_two_faced_leader_is_found_out_and_the_fork_taken_back():
    """By itself it has the third vote of five for both records."""
    world = simulate(0, rounds=12, under=CALM, swarm=Swarm(nodes=5, liars={1: Lie.TWO_FACED}))
    assert world.truth.forks and world.truth.rollbacks
    assert world.coordinator.state.trails.keys() == {"node01"}


def test_a_process_that_ends_before_any_one_effect_costs_nobody_anything():
    """The effects of a few rounds, a rollback among them: each in its turn is the last thing that did not happen."""
    effects = short(None).effects
    assert effects > 200
    for crash_at in range(effects):
        assert short(crash_at).counts["crash at an effect"] == 1


def test_a_swarm_of_64_keeps_its_round_when_the_coordinators_machine_starts_again():
    """In the middle of a round. What is true is checked at every step: one record of each round, each range once."""
    with swarm.swiftly():
        world = World(64, under=CALM, swarm=Swarm(nodes=64, steps=(15,), speeds=(1.4, 1.6), start_seconds=2.0))
        truth, coordinator, nodes = world.truth, world.coordinator, world.nodes.values()
        coordinator.rules = replace(coordinator.rules, min_nodes=64)

        def amid_a_round():
            busy = (rounds.Phase.AVERAGING, rounds.Phase.DECIDING)
            return truth.certified == 1 and sum(node.rounds.phase in busy for node in nodes) == 64

        def linked():
            return coordinator.sessions.keys() == world.nodes.keys()

        world.run(60, goal=lambda: truth.certified == 1)
        world.run(60, goal=amid_a_round)
        assert amid_a_round() and linked()
        coordinator.kill()
        world.run(world.now + 8)
        assert truth.certified == 2  # nobody waits for it
        coordinator.start()
        world.run(world.now + 30, goal=linked)
        assert linked()
        world.run(world.now + 20, goal=lambda: not swarm._lacking(world, truth.newest))
        assert not swarm._lacking(world, truth.newest)
        assert set(Counter(number for number, _ in truth.attempts).values()) == {1}  # no round was begun again
        truth.nothing_is_lost(coordinator.store.line, ())


def test_a_calm_swarm_certifies_round_after_round():
    world = simulate(1, rounds=10, under=CALM, swarm=Swarm(nodes=3))
    assert world.truth.certified >= 10
    assert world.counts["lost"] == 0


@pytest.mark.parametrize(("nodes", "behind"), [(3, 2), (5, 3), (7, 6)])
def test_nodes_that_nobody_can_call_bring_what_they_train_like_the_others(nodes, behind):
    """And where a single one can be called, it is all that the others need."""
    world = simulate(1, rounds=14, under=CALM, swarm=Swarm(nodes=nodes, behind_routers=behind))
    line, roster = world.coordinator.store.line, world.coordinator.state.roster.roster
    assert {each.node for entry in line for each in entry.record.contributions} == world.nodes.keys()
    for member in roster.members:
        assert (member.role is Role.CLIENT) is world.nodes[member.node].behind_router
    assert len(world.truth.attempts) <= world.truth.certified + 4, "no round had to be tried again and again"


def test_where_nobody_who_trains_can_be_called_one_that_trains_nothing_is_all_that_they_need():
    world = simulate(1, rounds=10, under=CALM, swarm=Swarm(nodes=4, behind_routers=3, helpers=1))
    roles = {member.node: member.role for member in world.coordinator.state.roster.roster.members}
    assert [roles.pop("node00"), *roles.values()] == [Role.HELPER, *[Role.CLIENT] * 3]
    assert world.truth.bringers == roles.keys(), "all who train, and nobody else"
    assert len(world.truth.attempts) <= world.truth.certified + 4


def test_while_the_only_one_that_can_be_called_is_paused_rounds_go_on_without_its_work():
    with swarm.swiftly():
        world = World(1, under=CALM, swarm=Swarm(nodes=4, behind_routers=3))
        truth, coordinator = world.truth, world.coordinator
        paused, late = world.nodes[NodeId("node00")], world.nodes[NodeId("node03")]
        late.kill()
        world.run(60, goal=lambda: truth.certified == 2)
        paused.asked(session.PauseAsked(None))
        world.run(world.now + 60, goal=lambda: truth.certified == 4)
        late.start()  # whoever comes is let in all the same
        truth.bringers.clear()
        world.run(world.now + 120, goal=lambda: truth.certified == 12)
        assert truth.certified == 12 and truth.bringers == world.nodes.keys() - {paused.me}
        assert len(truth.attempts) <= truth.certified + 4
        assert not machine.nobody_is_callable(coordinator.state, coordinator.clock, coordinator.rules)


@pytest.mark.parametrize("seed", [19, 82])
def test_every_invariant_holds_where_the_only_one_that_can_be_called_comes_and_goes(seed):
    simulate(seed, rounds=10)


@pytest.mark.parametrize("seed", [4, 5])
def test_every_invariant_holds_where_everything_fails_and_most_cannot_be_called(seed):
    simulate(seed, rounds=10, under=ROUGH, swarm=Swarm(nodes=5, behind_routers=3))


def test_a_seed_replays_to_the_same_trace():
    assert simulate(11, rounds=10).trace == simulate(11, rounds=10).trace


def test_a_failure_names_its_seed(monkeypatch):
    monkeypatch.setattr(rounds, "_round_is_over", lambda *_: False)
    monkeypatch.setattr(swarm, "WEATHER_SECONDS_MAX", 60.0)
    with pytest.raises(InvariantBroken, match=r"seed 5"):
        simulate(5, rounds=1)


# mutants: each drops one rule, and some seed must notice


def no_majority(monkeypatch):
    monkeypatch.setattr(Roster, "quorum", property(lambda roster: max(1, len(roster.members) // 2)))


def no_memory(monkeypatch):
    """Votes and promises are sent before they are durable."""
    step = rounds.step

    def forgetful(*arguments):
        state, effects = step(*arguments)
        return state, tuple(effect for effect in effects if not isinstance(effect, rounds.SaveVote))

    monkeypatch.setattr(rounds, "step", forgetful)


def no_second_hand_votes(monkeypatch):
    """A new leader starts afresh, whatever members have voted for."""
    begin = rounds._begin

    def afresh(state, roster, promises, now, rules):
        blank = {n: replace(s, ready=replace(s.ready, accepted=None)) for n, s in promises.items()}
        return begin(state, roster, blank, now, rules)

    monkeypatch.setattr(rounds, "_begin", afresh)


def any_roster_follows(monkeypatch):
    """Whoever is here is the next roster, whether or not its majorities meet those of the last."""
    monkeypatch.setattr(rosters, "may_follow", lambda old, new, sealed: bool(tuple(new)))


def whoever_leaves_is_sealed(monkeypatch):
    """A node that has voted in the open round leaves as if it had not."""
    seal = rounds.seal
    monkeypatch.setattr(rounds, "seal", lambda state, **given: seal(replace(state, accepted=None), **given))


def data_counts_twice(monkeypatch):
    monkeypatch.setattr(rounds, "unused", lambda ranges, consumed: ranges)
    monkeypatch.setattr(rounds, "check_ranges", lambda record, consumed: None)
    monkeypatch.setattr(machine, "check_ranges", lambda record, consumed: None)


def what_no_round_took_is_forgotten(monkeypatch):
    monkeypatch.setattr(rounds, "holds", lambda record, contribution: True)


def undone_data_stays_used(monkeypatch):
    monkeypatch.setattr(leases, "undo", lambda held, ranges: held)


def nobody_goes_back(monkeypatch):
    """A node follows a rollback in its log alone: what is folded stays folded."""
    turn = rounds._turn

    def in_place(state, signed, now, rules):
        to = signed.rollback.to
        return turn(replace(state, head=to, last=None), signed, now, rules)

    monkeypatch.setattr(rounds, "_turn", in_place)


def a_roster_outlives_its_branch(monkeypatch):
    monkeypatch.setattr(rounds.Rounds, "acts_under", lambda state, roster: roster.epoch > state.silent)
    monkeypatch.setattr(rounds, "_entry_fits", lambda state, entry, *_: entry.record.previous == state.head.hash)
    monkeypatch.setattr(rounds, "_record_is_sound", lambda *_: True)


def a_record_counts_its_data_once_more(monkeypatch):
    """What a record consumed is not struck from what is leased or was given back."""
    monkeypatch.setattr(leases, "consume", lambda held, ranges: held)


MUTANTS = [
    no_majority,
    no_memory,
    no_second_hand_votes,
    any_roster_follows,
    whoever_leaves_is_sealed,
    data_counts_twice,
    what_no_round_took_is_forgotten,
    undone_data_stays_used,
    nobody_goes_back,
    a_roster_outlives_its_branch,
    a_record_counts_its_data_once_more,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_swarm_without_this_rule_is_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(InvariantBroken) as caught:
        for seed in range(60):
            rough(seed)
    assert "no round was certified" not in str(caught.value)
