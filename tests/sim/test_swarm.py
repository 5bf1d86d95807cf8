"""Hundreds of simulated swarms, and proof that the simulator sees what it is there to see: mutants of the rules die."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.core import machine, rosters
from node.core import rounds
from protocol.types import Roster
from tests.sim.swarm import CALM, Faults, InvariantBroken, simulate

SEEDS = 200
BATCHES = 8
ROUGH = Faults(
    loss=0.2,
    delay_max=0.5,
    crash_per_minute=2.0,
    pause_per_minute=0.2,
    coordinator_crash_per_minute=0.2,
    reduce_failure=0.3,
    partition_per_minute=2.0,
    late=0.2,
    doubled=0.1,
    crash_per_effect=0.005,
)


def rough(seed):
    return simulate(seed, faults=ROUGH, seconds=90.0, nodes=5)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_invariant_holds_in_hundreds_of_swarms(batch):
    for seed in range(batch, SEEDS, BATCHES):
        simulate(seed)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(27, id="27"),
        pytest.param(73, id="73"),
        pytest.param(93, id="93"),
        pytest.param(110, id="110: data that counts in part elsewhere counts for the rest"),
    ],
)
def test_what_once_broke_stays_whole(seed):
    simulate(seed)


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_every_invariant_holds_where_everything_fails_at_once(seed):
    rough(seed)


def test_a_calm_swarm_certifies_round_after_round():
    world = simulate(1, faults=CALM, nodes=3, seconds=30.0)
    assert len(world.certified) >= 5
    assert world.counts["lost"] == 0


def test_a_seed_replays_to_the_same_trace():
    assert simulate(11, seconds=40.0).trace == simulate(11, seconds=40.0).trace


def test_a_failure_names_its_seed(monkeypatch):
    monkeypatch.setattr(rounds, "_round_is_over", lambda *_: False)
    with pytest.raises(InvariantBroken, match=r"seed 5: .*no progress"):
        simulate(5, seconds=5.0)


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
    monkeypatch.setattr(rounds, "seal", lambda state: seal(replace(state, accepted=None)))


def data_counts_twice(monkeypatch):
    monkeypatch.setattr(rounds, "unused", lambda ranges, consumed: ranges)
    monkeypatch.setattr(rounds, "check_ranges", lambda record, consumed: None)
    monkeypatch.setattr(machine, "check_ranges", lambda record, consumed: None)


def what_no_round_took_is_forgotten(monkeypatch):
    monkeypatch.setattr(rounds, "holds", lambda record, contribution: True)


MUTANTS = [
    no_majority,
    no_memory,
    no_second_hand_votes,
    any_roster_follows,
    whoever_leaves_is_sealed,
    data_counts_twice,
    what_no_round_took_is_forgotten,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_swarm_without_this_rule_is_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(InvariantBroken) as caught:
        for seed in range(60):
            rough(seed)
    assert "no progress" not in str(caught.value)
