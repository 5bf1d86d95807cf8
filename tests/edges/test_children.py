"""What a child of a node may say: anything at all. A real process says it, and is ended for it by its parent."""

import asyncio
import json
from dataclasses import replace

import pytest

from node import training
from node.engine import AveragingJob, AveragingOutcome, Engine
from node.training import Exited, Started, Stepped, Trainer, TrainerSpec, Vectors
from protocol.errors import Code, Refused
from protocol.process import Child
from protocol.types import Exchange

BABBLER = """
import asyncio, json, os
from protocol.process import parent_channel

async def main():
    channel, answers = await parent_channel(), json.loads(os.environ["ANSWERS"])
    while True:
        order = (await channel.receive()).body
        answer = answers.pop(0)
        await channel.send({key: order["number"] if value == "its number" else value for key, value in answer.items()})

asyncio.run(main())
"""
JOB = AveragingJob(b"g" * 32, (), (), Exchange.ALL_REDUCE, (), 5.0, 5.0, (), 0)
OUTCOME = {
    "included": [],
    "failed": {},
    "seconds": 1.0,
    "bytes_sent": 0,
    "bytes_received": 0,
    "evidence": None,
    "garbled": [],
}
SPEC = TrainerSpec("{}", 8, "0" * 64, 256, 8, 2, {})
SPAN = {"pass_number": 0, "shard": "0" * 64, "start": 0, "stop": 4}
BUSY = {"since": 0.0, "until": 1.0, "seconds": 1.0, "step_seconds": 1.0}
COUNTS = {"steps": 1, "tokens": 8, "loss": 1.0, "tokens_per_second": 8.0, "queued_sequences": 1}
STEPPED = {"event": "stepped", **COUNTS, "busy": BUSY}
STARTED = {"event": "started", "started": {"device": "cpu", "precision": "f32", "micro_batch": 1, "accumulate": 1}}


@pytest.fixture
def says(tmp_path, monkeypatch):
    """A module whose process answers each order with the next of these."""
    (tmp_path / "babbler.py").write_text(BABBLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return lambda *answers: monkeypatch.setenv("ANSWERS", json.dumps(answers))


@pytest.mark.parametrize(
    "answer",
    [
        {"number": "its number"},
        {"number": "its number", "parts": 7, **OUTCOME},
        {"number": "its number", "parts": [["one"]], **OUTCOME},
        {"number": "its number", "parts": [[[], 1]], **OUTCOME},
        {"number": "its number", "parts": [], **OUTCOME, "failed": {"one": "why"}},
        {"number": "its number", "parts": [[0, 0]], **OUTCOME},
        {"number": "its number", "parts": [], **OUTCOME, "included": [0]},
        {"number": "its number", "parts": [], **OUTCOME, "garbled": [-1]},
        {"number": "its number", "parts": [], **OUTCOME, "failed": {"7": "why"}},
        {"number": "its number", "parts": [], **OUTCOME, "failed": {"0": 7}},
        {"number": "its number", "parts": [], **OUTCOME, "seconds": "one"},
        {"number": "its number", "refused": ["x"]},
        {"number": [1]},
        {"message_from": 7},
        {},
    ],
)
async def test_an_engine_that_answers_what_nobody_can_read_is_a_refusal_and_an_end(says, tmp_path, answer):
    says(answer)
    engine = Engine(await Child.start("babbler"), tmp_path, lambda peer, message: None)
    with pytest.raises(Refused) as refused:
        await engine.average(JOB, b"")
    assert refused.value.reason in (Code.CHILD_DIED, Code.FIELD)
    if "refused" not in answer:
        await asyncio.wait_for(engine.closed, 10)
    await engine.stop()


async def test_an_engine_is_believed_what_can_be_read(says, tmp_path):
    failed, evidence = {"0": "why"}, str(tmp_path)
    says(
        {"number": "its number", "parts": [[1, 0]], **OUTCOME, "included": [0], "failed": failed, "evidence": evidence}
    )
    engine = Engine(await Child.start("babbler"), tmp_path, lambda peer, message: None)
    outcome = await engine.average(replace(JOB, peers=("one", "other")), b"")
    assert outcome == AveragingOutcome({1: b""}, (0,), {0: "why"}, 1.0, 0, 0, tmp_path, ())
    await engine.stop()


async def test_a_trainer_is_believed_what_can_be_read(says, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MODULE", "babbler")
    says(STARTED, STEPPED)
    heard, vectors = asyncio.Queue(), Vectors.create(8, runtime_dir=tmp_path)
    trainer = await Trainer.start(SPEC, vectors=vectors, log=None, on_event=heard.put_nowait)
    running = asyncio.create_task(trainer.run())
    assert await asyncio.wait_for(heard.get(), 10) == Stepped(**COUNTS) and trainer.busy_share == 1.0
    await trainer.stop()
    await asyncio.gather(running, return_exceptions=True)
    vectors.close()


@pytest.mark.parametrize("answer", [{"reply": 1}, {"event": "started"}, {"event": "started", "started": {"x": 1}}])
async def test_a_trainer_whose_first_word_nobody_can_read_is_refused_by_name(says, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(training, "MODULE", "babbler")
    says(answer)
    vectors = Vectors.create(8, runtime_dir=tmp_path)
    with pytest.raises(Refused) as refused:
        await Trainer.start(SPEC, vectors=vectors, log=None, on_event=pytest.fail)
    assert refused.value.reason is Code.CHILD_DIED
    vectors.close()


@pytest.mark.parametrize(
    "answer",
    [
        {"reply": "its number"},
        {"reply": "its number", "steps": 1, "tokens": 1, "ranges": [[0]], "loss": None},
        {"event": "stepped"},
        {**STEPPED, "more": 1},
        {**STEPPED, "tokens_per_second": "x"},
        {**STEPPED, "tokens_per_second": float("nan")},
        {**STEPPED, "tokens_per_second": 10**400},
        {**STEPPED, "steps": None},
        {**STEPPED, "busy": {**BUSY, "since": "then"}},
        {"event": "skipped", "ranges": 7, "what": ""},
        {"event": "skipped", "ranges": [], "what": 7},
        {"event": "skipped", "ranges": [{**SPAN, "start": 1.5}], "what": ""},
        {"event": "skipped", "ranges": [{**SPAN, "start": 4}], "what": ""},
        {"event": "failed", "code": [], "what": "", "shard": None, "ranges": []},
        {"event": "failed", "code": "E-DATA-001", "what": "", "shard": 7, "ranges": []},
        {"reply": "its number", "steps": "1", "tokens": 1, "ranges": [], "loss": None},
        {},
    ],
)
async def test_a_trainer_that_says_what_nobody_can_read_is_ended_and_its_owner_hears_of_it(
    says, tmp_path, monkeypatch, answer
):
    monkeypatch.setattr(training, "MODULE", "babbler")
    says(STARTED, answer)
    heard, vectors = asyncio.Queue(), Vectors.create(8, runtime_dir=tmp_path)
    trainer = await Trainer.start(SPEC, vectors=vectors, log=None, on_event=heard.put_nowait)
    assert isinstance(trainer.started, Started)
    with pytest.raises(Refused) as refused:
        await trainer.snapshot()
    assert refused.value.reason is Code.CHILD_DIED
    assert isinstance(await asyncio.wait_for(heard.get(), 10), Exited)
    await trainer.stop()
    vectors.close()
