"""The quickest of the chaos faults: `pytest tests/chaos`. `make chaos` has the rest."""

import time

import pytest

from tests.chaos import audit
from tests.chaos.causes import FAULTS, any_luck
from tests.chaos.swarm import SETTINGS, Swarm

SEED = 1
SMALL = {
    **SETTINGS,
    "run": {**SETTINGS["run"], "min_nodes": 2},
    "model": {"config": {**SETTINGS["model"]["config"], "intermediate_size": 576}},
    "rounds": {**SETTINGS["rounds"], "inner_steps": [[1, 8]]},
    "update": {"codec": "sparse2", "mean": "sparse2", "residual_decay": 0.95},  # make chaos has int4
}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    swarm = Swarm(tmp_path_factory.mktemp("chaos") / "world", nodes=3, settings=SMALL, own_machines=False)
    try:
        swarm.start()
        swarm.settle(time.time())
        yield swarm
    finally:
        swarm.close()


@pytest.mark.parametrize(
    "name",
    [
        "node: kill -9 at voted",  # the promise is on disk and nobody has heard of it
        "node: kill -9 at fold",  # the record is on disk and not yet in the state
        "coordinator: kill -9 at transaction",  # all is written and nothing is committed
    ],
)
def test_a_round_survives(swarm, name):
    strike = FAULTS[name].cause(swarm, any_luck(SEED, name))
    swarm.certified_after(strike.at)
    swarm.settle(strike.over)
    assert audit.ranges(swarm.coordinator) == (0, 0)
    assert not swarm.unplanned


def test_afterwards_all_replicas_are_the_same_and_nothing_is_lost(swarm):
    wrong, _ = audit.everything(swarm, swarm.members)
    assert not wrong, "\n".join(wrong)
