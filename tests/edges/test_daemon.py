"""What the daemon makes of its owner's wishes and limits, with the rest of it a few lines."""

import random
from types import SimpleNamespace

import pytest

from node.core.schedule import Hours, Policy
from node.daemon import Daemon
from protocol.blobs import BlobStore
from protocol.errors import Refused

NEVER = Policy(hours=(Hours(0, 0),))


@pytest.mark.parametrize("training", [True, False])
def test_a_node_that_trains_nothing_needs_room_for_a_round_and_no_leave_to_train(tmp_path, training):
    blobs = BlobStore(tmp_path / "blobs", 4096)
    settings = SimpleNamespace(training=training, policy=NEVER, home=tmp_path)
    daemon = SimpleNamespace(_settings=settings, _blobs=blobs, _update_bytes=3000)
    assert Daemon._obstacle(daemon) == ("outside of your hours, 00:00-00:00" if training else "")
    blobs.put_bytes(random.Random(0).randbytes(2000))
    settings.policy = Policy(on_battery=True)
    said = Daemon._obstacle(daemon)
    assert said == ("" if training else "--max-disk, or the disk, leaves no room for another round")


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_who_trains_nothing_has_nothing_to_pause_and_is_told_how_it_ends_wherever_it_runs(verb):
    with pytest.raises(Refused) as refused:
        await Daemon._answer(SimpleNamespace(_settings=SimpleNamespace(training=False)), verb, {})
    assert "barnraise finish" in refused.value.fix
