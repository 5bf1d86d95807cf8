"""The rehearsal with a real process: a model that this installation cannot build is refused before a download."""

import socket
from dataclasses import replace
from importlib.metadata import version

import pytest

from node import rehearsal
from protocol import model
from protocol.errors import Code, Exit, Refused
from protocol.process import Channel
from protocol.types import Digest, Manifest

CONFIG = model.model_config(
    "llama",
    {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    vocabulary=32,
    context=16,
)
ZERO = Digest("00" * 32)
MADE_ELSEWHERE = Manifest(
    "run", "run", "{}", CONFIG, None, 32, 9, model.measure(CONFIG).digest, ZERO, 16, 2, ZERO, transformers="4.99.0"
)


async def test_another_version_that_builds_the_same_model_will_do_and_one_that_does_not_is_refused(monkeypatch):
    await rehearsal.check_model(MADE_ELSEWHERE)  # in a process of its own
    monkeypatch.setattr(rehearsal, "_ask", in_here)
    await rehearsal.check_model(MADE_ELSEWHERE)
    unknown = replace(MADE_ELSEWHERE, model_config='{"model_type":"llama","rope_flavour":"new"}')
    for manifest, why in ((replace(MADE_ELSEWHERE, layout=ZERO), "other parameters"), (unknown, "rope_flavour")):
        with pytest.raises(Refused, match=why) as caught:
            await rehearsal.check_model(manifest)
        assert (caught.value.reason, caught.value.reason.exit) == (Code.VERSION, Exit.VERSION)
        assert "transformers 4.99.0" in caught.value.what and version("transformers") in caught.value.what
        assert caught.value.fix == "Run pip install transformers==4.99.0"


async def in_here(config, log, sandbox):
    """The child's part, where torch is imported already."""
    ours, theirs = socket.socketpair()
    parent, child = await Channel.over(ours), await Channel.over(theirs)
    await parent.send({"config": config})
    await rehearsal.answer(child)
    answered = (await parent.receive()).body
    parent.close()
    child.close()
    return answered


async def test_the_same_version_needs_no_rehearsal(monkeypatch):
    monkeypatch.setattr(rehearsal, "_ask", None)
    await rehearsal.check_model(replace(MADE_ELSEWHERE, layout=ZERO, transformers=version("transformers")))


@pytest.mark.parametrize("end", ["stuck", "dead"])
async def test_a_config_that_keeps_the_rehearsal_busy_or_ends_it_is_refused(monkeypatch, end):
    monkeypatch.setattr(rehearsal, "SECONDS", 0.05 if end == "stuck" else 60.0)
    start = rehearsal.Child.start

    async def started(*arguments, **options):
        child = await start(*arguments, **options)
        if end == "dead":
            child._process.kill()
        return child

    monkeypatch.setattr(rehearsal.Child, "start", started)
    with pytest.raises(Refused, match=r"not built within|ended") as caught:
        await rehearsal.check_model(MADE_ELSEWHERE)
    assert caught.value.reason is Code.VERSION
