"""What the daemon makes of its owner's wishes and limits, with the rest of it a few lines."""

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from node import daemon as module
from node.config import Stopper
from node.core.rounds import Phase, Rounds
from node.core.schedule import Hours, Policy
from node.core.session import Session
from node.daemon import Daemon
from node.status import Tally
from node.supply import Supply
from node.training import Failed
from protocol.blobs import BlobStore
from protocol.errors import Code, Exit, Refused
from protocol.state import Consumed
from protocol.types import Head

NEVER = Policy(hours=(Hours(0, 0),))


@pytest.mark.parametrize("training", [True, False])
async def test_a_node_that_trains_nothing_needs_room_for_a_round_and_no_leave_to_train(tmp_path, training):
    blobs = BlobStore(tmp_path / "blobs", 4096)
    settings = SimpleNamespace(training=training, policy=NEVER, home=tmp_path)
    daemon = SimpleNamespace(_settings=settings, _blobs=blobs, _update_bytes=3000)
    assert await Daemon._obstacle(daemon) == ("outside of your hours, 00:00-00:00" if training else "")
    blobs.put_bytes(random.Random(0).randbytes(2000))
    settings.policy = Policy(on_battery=True, on_metered=True)
    said = await Daemon._obstacle(daemon)
    assert said == ("" if training else "--max-disk, or the disk, leaves no room for another round")


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_who_trains_nothing_has_nothing_to_pause_and_is_told_how_it_ends_wherever_it_runs(verb):
    with pytest.raises(Refused) as refused:
        await Daemon._answer(SimpleNamespace(_settings=SimpleNamespace(training=False)), verb, {})
    assert "barnraise finish" in refused.value.fix


@pytest.fixture
def helper(monkeypatch):
    """One that trains nothing, in the middle of an averaging."""
    monkeypatch.setattr(module, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(Daemon, "status", lambda daemon: {})
    daemon = object.__new__(Daemon)
    state = Rounds(Head(0, "0" * 64), "1" * 64, Consumed(), phase=Phase.AVERAGING)
    session = Session(helper=True, linked=True, synced=True, engine_ready=True)
    daemon._decider = SimpleNamespace(begun=True, rounds=state, session=session, post=lambda event: None)
    daemon._settings, daemon._folding, daemon._tasks = SimpleNamespace(training=False), 0, set()
    return daemon


def ctrl_c(helper):
    stopper = Stopper()
    stopper.polite.set()
    return helper._stop_when_asked(stopper)


@pytest.mark.parametrize(
    ("leaves", "code"), [(ctrl_c, Exit.INTERRUPTED), (lambda helper: helper._answer("finish", {}), Exit.OK)]
)
async def test_who_averages_for_others_leaves_when_that_round_is_over_or_given_up(helper, leaves, code):
    helper._ended = asyncio.get_running_loop().create_future()
    leaving = asyncio.create_task(leaves(helper))
    for phase in (Phase.AVERAGING, Phase.DECIDING, Phase.FOLDING):
        helper._decider.rounds = replace(helper._decider.rounds, phase=phase)
        for _ in range(9):
            await asyncio.sleep(0)
        assert not helper._ended.done()
    helper._decider.rounds, helper._folding = replace(helper._decider.rounds, phase=Phase.GATHERING), 1
    for _ in range(9):
        await asyncio.sleep(0)
    assert not helper._ended.done(), "what it has reduced is being handed in"
    helper._folding = 0
    assert (await asyncio.wait_for(helper._ended, 10))[0] is code
    await leaving


async def test_an_averaging_holds_nobody_for_longer_than_a_polite_end_takes(helper, monkeypatch):
    monkeypatch.setattr(module, "POLITE_SECONDS", 0.0)
    helper._ended = asyncio.get_running_loop().create_future()
    await ctrl_c(helper)
    assert helper._ended.done()


@pytest.mark.parametrize("shard", [None, "of another run"])
async def test_a_trainer_that_fails_and_names_no_shard_of_the_run_is_replaced(shard):
    daemon, done = object.__new__(Daemon), []
    daemon._tally, daemon._spawn, daemon._decider = Tally(), done.append, SimpleNamespace(post=None)
    daemon._supply = Supply.__new__(Supply)
    daemon._supply._shards = {}
    daemon._trained(Failed(Code.TOKEN_RANGE, "why", shard))
    assert [work.__name__ for work in done] == ["_replace_trainer"]
    for work in done:
        work.close()
