"""The rehearsal with a real process: a model that this installation cannot build is refused before a download."""

import socket
from dataclasses import replace
from importlib.metadata import version

import pytest

from node import rehearsal
from node.hardware import Device
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


async def in_here(question, log, sandbox):
    """The child's part, where torch is imported already."""
    ours, theirs = socket.socketpair()
    parent, child = await Channel.over(ours), await Channel.over(theirs)
    await parent.send(question)
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


HELD = (Device("cuda:0", "A small GPU", 8 << 30, bf16=True), Device("cuda:1", "A large GPU", 80 << 30, bf16=True))


@pytest.mark.parametrize(
    ("wanted", "cap", "what"),
    [
        ("auto", None, "training needs 10,737,418,240 bytes of cuda:0, A small GPU, it has 8,589,934,592"),
        (
            "cuda:1",
            4 << 30,
            "training needs 10,737,418,240 bytes of cuda:1, A large GPU, max_vram leaves 4,294,967,296",
        ),
    ],
)
async def test_a_device_that_cannot_hold_the_model_is_refused_before_the_download(monkeypatch, wanted, cap, what):
    monkeypatch.setattr(rehearsal, "_ask", in_here)
    monkeypatch.setattr(rehearsal.hardware, "torch_devices", lambda: HELD)
    with pytest.raises(Refused) as caught:
        await rehearsal.choose_device(wanted, 10 << 30, cap=cap)
    assert (caught.value.reason, caught.value.what) == (Code.MODEL_TOO_LARGE, what)
    assert await rehearsal.choose_device("cuda:1", 10 << 30, cap=None) == "cuda:1"


async def test_a_device_is_looked_for_in_a_process_of_its_own():
    assert await rehearsal.choose_device("auto", 1, cap=None)
    with pytest.raises(Refused, match="device 'cuda:99' not found") as caught:
        await rehearsal.choose_device("cuda:99", 1, cap=None)
    assert caught.value.reason is Code.DEVICE_MISSING
