"""Coordinators whose database is put back as it was some time ago, while the nodes go on."""

from __future__ import annotations

import pytest

from coordinator.core import machine
from tests.sim.faults import Weather
from tests.sim.invariants import InvariantBroken
from tests.sim.node import Swarm
from tests.sim.swarm import simulate

RESTORED = Weather(
    loss=0.1,
    delay_max=0.3,
    node_kills=1.0,
    node_leaves=1.0,
    coordinator_kills=0.3,
    coordinator_outages=0.1,
    coordinator_backups=2.0,
    partitions=1.0,
    exoduses=1.0,
)


def restored(seed):
    return simulate(seed, rounds=25, under=RESTORED, swarm=Swarm(nodes=4))


def test_no_roster_has_the_number_of_one_that_the_coordinator_has_forgotten():
    """Nodes would take it for a second story, and stop. Rounds go on as well, and none is lost."""
    assert sum(restored(seed).counts["coordinator's database put back"] for seed in range(4)) > 20


def test_a_coordinator_that_goes_on_counting_is_caught(monkeypatch):
    monkeypatch.setattr(machine, "_fresh_epoch", lambda state, now: state.next_epoch)
    with pytest.raises(InvariantBroken, match="two rosters have epoch"):
        for seed in range(8, 68):  # of those before it none shows it
            restored(seed)
