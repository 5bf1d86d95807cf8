"""The trainer against real torch: what it consumes, what a snapshot and a merge mean, and what it refuses."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from node import trainer as child
from node import training
from node.training import (
    Exited,
    Failed,
    OutOfData,
    Skipped,
    Stepped,
    Trainer,
    TrainerSpec,
    Vectors,
)
from protocol import model
from protocol.errors import Code, Refused
from protocol.order import sequence_at
from protocol.types import DataRange

CONTEXT, VOCABULARY = 16, 64
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = model.model_config("llama", TINY, vocabulary=VOCABULARY, context=CONTEXT)
SIZE = model.measure(CONFIG)
TRAIN = {"optimizer": "muon", "learning_rate": 3e-3, "batch_sequences": 8, "warmup_steps": 2}
SPEC = TrainerSpec(CONFIG, SIZE.parameters, SIZE.digest, VOCABULARY, CONTEXT, 2, TRAIN)
SHARD = "ab" * 32


def shard(folder: Path, *, sequences: int, token: int | None = None) -> Path:
    """A shard that counts upwards, which a model learns in a few steps."""
    tokens = np.arange(sequences * CONTEXT + 1) % VOCABULARY
    if token is not None:
        tokens[len(tokens) // 2] = token
    path = folder / f"shard-{sequences}-{token}"
    path.write_bytes(tokens.astype("<u2").tobytes())
    return path


def piece(start, stop, *, pass_number=0):
    return DataRange(pass_number, SHARD, start, stop)


@pytest.fixture
def vectors(tmp_path):
    made = Vectors.create(SIZE.parameters, runtime_dir=tmp_path)
    made.shared[:] = model.initial_vector(CONFIG, 1)
    yield made
    made.close()


@pytest.fixture
async def started(vectors, tmp_path):
    """A running trainer, its events, and a function that waits for one of them."""
    events = []

    async def heard(kind, *, seconds=30):
        async with asyncio.timeout(seconds):
            while not any(isinstance(each, kind) for each in events):
                await asyncio.sleep(0.01)
        return next(each for each in events if isinstance(each, kind))

    with open(tmp_path / "log", "wb") as log:
        trainer = await Trainer.start(SPEC, vectors=vectors, log=log, on_event=events.append)
    yield trainer, events, heard
    await trainer.stop()


async def test_a_round_of_training_is_accounted_exactly(started, vectors, tmp_path):
    trainer, events, heard = started
    path = shard(tmp_path, sequences=200)
    assert (trainer.started.device, trainer.started.micro_batch, trainer.started.accumulate) == ("cpu", 8, 1)

    await trainer.add_data([(piece(0, 44), path), (piece(100, 120, pass_number=1), path), (piece(150, 160), path)])
    await trainer.drop([piece(152, 155)])
    await trainer.run()
    await heard(OutOfData)
    assert trainer.steps > 0
    first = await trainer.snapshot()
    assert trainer.steps == 0, "as soon as the answer is there"
    assert first.ranges == (piece(0, 44), piece(100, 120, pass_number=1), piece(150, 152), piece(155, 160))
    assert (first.steps, first.tokens) == (9, (44 + 20 + 2 + 5) * CONTEXT)
    after_first = vectors.snapshot.copy()
    assert not np.array_equal(after_first, vectors.shared)

    events.clear()
    await trainer.goal(3)
    await trainer.add_data([(piece(0, 200), path)])
    assert (await heard(Stepped)).steps == 3
    await heard(OutOfData)
    second = await trainer.snapshot()
    assert second.ranges == (piece(0, 200),) and second.steps == 25
    assert second.loss < first.loss - 0.5, "it learns"
    assert 0 < trainer.busy_share <= 1
    assert (await trainer.snapshot()).loss is None


async def test_a_share_of_the_learning_rates_makes_smaller_steps(started, vectors, tmp_path):
    trainer, events, heard = started
    path = shard(tmp_path, sequences=200)

    async def moved(share, first):
        await trainer.snapshot()
        before = vectors.snapshot.copy()
        events.clear()
        await trainer.goal(1, rate_share=share)
        await trainer.add_data([(piece(first, first + 8), path)])
        await trainer.run()
        await heard(OutOfData)
        await trainer.snapshot()
        return float(np.abs(vectors.snapshot - before).max())

    for number in range(12):  # beyond the warm-up
        whole = await moved(1.0, 8 * number)
    tiny = await moved(0.001, 96)
    assert 0 < tiny < 0.01 * whole


async def test_a_merge_keeps_the_steps_made_since_the_snapshot(started, vectors, tmp_path):
    trainer, events, heard = started
    await trainer.snapshot()
    assert np.array_equal(vectors.snapshot, vectors.shared), "a snapshot before any step is the shared state"
    path = shard(tmp_path, sequences=64)
    await trainer.add_data([(piece(0, 64), path)])
    await trainer.run()
    await heard(OutOfData)
    vectors.shared += np.float32(0.25)
    base = vectors.snapshot.copy()
    await trainer.merge(from_snapshot=True)
    await trainer.snapshot()
    merged = vectors.snapshot.copy()

    vectors.shared[:] = base  # undo the move, this time with no snapshot pending
    vectors.snapshot[:] = base + np.float32(0.25)
    await trainer.merge(from_snapshot=False)
    await trainer.snapshot()
    local = vectors.snapshot.copy()
    assert not np.array_equal(local, base), "the steps are kept"
    np.testing.assert_allclose(merged - local, 0.25, atol=1e-5)

    vectors.shared[:] = 0.5
    await trainer.merge(from_snapshot=True)
    await trainer.snapshot()
    assert np.all(vectors.snapshot == 0.5), "without a step since the snapshot the merge is exact"
    with pytest.raises(AssertionError, match="no snapshot"):
        await trainer.merge(from_snapshot=True)
        await trainer.merge(from_snapshot=True)


async def test_a_trainer_that_is_looked_at_goes_on_as_if_nobody_had_looked(started, vectors, tmp_path):
    trainer, events, heard = started
    path = shard(tmp_path, sequences=240)
    alone = Vectors.create(SIZE.parameters, runtime_dir=tmp_path)
    alone.shared[:] = vectors.shared
    goals, alone_events = [], []
    with open(tmp_path / "alone.log", "wb") as log:
        unseen = await Trainer.start(SPEC, vectors=alone, log=log, on_event=alone_events.append)
    try:
        await unseen.add_data([(piece(0, 240), path)])
        await unseen.run()
        await trainer.goal(25)
        for start in (0, 80, 160):
            await trainer.add_data([(piece(start, start + 80), path)])
            await trainer.run()
            on_the_way = await trainer.peek()  # wherever it is
            await heard(OutOfData)
            goals += [each.steps for each in events if isinstance(each, Stepped)]
            events.clear()
            seen = await trainer.peek()
            assert seen.steps == (start + 80) // 8 and seen.tokens == (start + 80) * CONTEXT
            assert seen.ranges == (piece(0, start + 80),), "nothing is forgotten between two looks"
            assert start // 8 <= on_the_way.steps <= seen.steps
            assert sum(each.stop - each.start for each in on_the_way.ranges) == 8 * on_the_way.steps
        assert 25 in goals, "the goal is still counted from the last snapshot"
        looked_at = vectors.snapshot.copy()
        last = await trainer.snapshot()
        assert last == seen and np.array_equal(vectors.snapshot, looked_at)
        async with asyncio.timeout(60):
            while not any(isinstance(each, OutOfData) for each in alone_events):
                await asyncio.sleep(0.01)
        assert await unseen.snapshot() == last, "the same steps, data and losses"
        assert np.array_equal(alone.snapshot, vectors.snapshot), "the same parameters, to the bit"
        with pytest.raises(AssertionError, match="merge"):
            await trainer.peek()
        await trainer.merge(from_snapshot=True)
        assert (await trainer.peek()).steps == 0
    finally:
        await unseen.stop()
        alone.close()


async def test_a_paused_trainer_makes_no_step_and_loses_no_data(started, tmp_path):
    trainer, events, heard = started
    path = shard(tmp_path, sequences=1000)
    await trainer.add_data([(piece(0, 1000), path)])
    await trainer.run()
    await heard(Stepped)
    await trainer.pause()
    paused = await trainer.snapshot()
    assert 1 <= paused.steps < 125
    await asyncio.sleep(0.2)
    assert (await trainer.snapshot()).steps == 0
    await trainer.run()
    await heard(OutOfData)
    rest = await trainer.snapshot()
    assert paused.ranges + rest.ranges == (piece(0, paused.ranges[0].stop), piece(paused.ranges[0].stop, 1000))


async def test_a_token_outside_the_vocabulary_names_the_shard_and_other_data_goes_on(started, tmp_path):
    trainer, events, heard = started
    other = replace(piece(0, 8), shard="cd" * 32)
    await trainer.add_data(
        [
            (piece(0, 80), shard(tmp_path, sequences=80, token=VOCABULARY)),
            (other, shard(tmp_path, sequences=8)),
        ]
    )
    await trainer.run()
    failed = await heard(Failed)
    assert (failed.reason, failed.shard) == (Code.TOKEN_RANGE, SHARD) and SHARD in failed.what
    await trainer.run()
    await heard(OutOfData)
    order = [sequence_at(position, sequences=80, pass_number=0) for position in range(80)]
    bad = min(order.index(39), order.index(40))  # the token ends one sequence's targets and begins the next one
    assert (await trainer.snapshot()).ranges == (piece(0, bad // 8 * 8), other), "whole batches before the bad token"


async def test_a_step_that_is_not_finite_changes_nothing_and_three_in_a_row_stop_the_trainer(
    started, vectors, tmp_path
):
    trainer, events, heard = started
    await trainer.snapshot()
    vectors.shared[:100] = np.nan
    await trainer.merge(from_snapshot=True)
    await trainer.add_data([(piece(0, 64), shard(tmp_path, sequences=64))])
    await trainer.run()
    assert (await heard(Failed)).reason is Code.DIVERGED
    skipped = [each.ranges for each in events if isinstance(each, Skipped)]
    assert skipped == [(piece(0, 8),), (piece(8, 16),), (piece(16, 24),)]
    snapshot = await trainer.snapshot()
    assert (snapshot.steps, snapshot.ranges) == (0, ())
    assert np.array_equal(vectors.snapshot[100:], vectors.shared[100:])


async def test_a_killed_trainer_is_an_event_and_what_was_asked_of_it_is_refused(started, tmp_path):
    trainer, events, heard = started
    await trainer.add_data([(piece(0, 4000), shard(tmp_path, sequences=4000))])
    await trainer.run()
    os.kill(trainer.pid, signal.SIGKILL)
    assert (await heard(Exited)).returncode == -signal.SIGKILL
    with pytest.raises(Refused) as refused:
        await trainer.snapshot()
    assert refused.value.reason is Code.CHILD_DIED


async def test_a_trainer_that_hangs_is_ended_and_how_long_that_takes_follows_its_steps(started, monkeypatch, tmp_path):
    trainer, _, heard = started
    assert trainer._patience_seconds == training.ANSWER_SECONDS, "nothing is known of its steps"
    await trainer.add_data([(piece(0, 64), shard(tmp_path, sequences=64))])
    await trainer.run()
    await heard(OutOfData)
    assert training.GRACE_SECONDS < trainer._patience_seconds < training.GRACE_SECONDS + 20
    monkeypatch.setattr(training, "GRACE_SECONDS", 0.3)
    os.kill(trainer.pid, signal.SIGSTOP)
    with pytest.raises(Refused, match="did not snapshot"):
        await trainer.snapshot()
    assert (await heard(Exited)).returncode == -signal.SIGKILL


async def test_a_trainer_dies_with_its_owner_and_leaves_no_shared_memory(tmp_path):
    before = set(os.listdir("/dev/shm"))
    code = f"""
import asyncio, sys
from pathlib import Path
from node.training import *
async def main():
    vectors = Vectors.create({SIZE.parameters}, runtime_dir=Path({str(tmp_path)!r}))
    spec = TrainerSpec(**{ {**vars(SPEC)}!r})
    trainer = await Trainer.start(spec, vectors=vectors, log=None, on_event=print)
    print(trainer.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(owner.stdout.readline())
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            await asyncio.sleep(0.05)
    assert set(os.listdir("/dev/shm")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"parameters": SIZE.parameters - 1}, Code.MODEL_BAD),
        ({"layout": "00" * 32}, Code.MODEL_BAD),
        ({"device": "cuda:7"}, Code.DEVICE_MISSING),
        ({"workload": "os"}, Code.MODEL_BAD),
        ({"model_config": CONFIG.replace('"llama"', '"lama"')}, Code.MODEL_BAD),
        ({"model_config": "{"}, Code.MODEL_BAD),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_built(vectors, monkeypatch, change, reason):
    monkeypatch.setattr(model, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(Refused) as refused:
        child.Learner(replace(SPEC, **change), vectors)
    assert refused.value.reason is reason


def test_a_model_that_this_machine_cannot_train_is_refused_with_the_number(vectors, monkeypatch):
    monkeypatch.setattr(model, "build", lambda *_: pytest.fail("built"))
    needed = SIZE.parameters * child.STATE_BYTES
    little = replace(child.hardware.measure(Path.cwd()), memory_available_bytes=needed - 1)
    monkeypatch.setattr(child.hardware, "measure", lambda folder: little)
    with pytest.raises(Refused, match=f"{needed:,} bytes of memory, {needed - 1:,} are free") as caught:
        child.Learner(SPEC, vectors)
    assert caught.value.reason is Code.MODEL_TOO_LARGE and caught.value.reason.exit.value == 5


def test_a_model_above_its_owners_cap_is_refused_whatever_is_free(vectors, monkeypatch):
    monkeypatch.setattr(model, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(Refused, match="bytes of memory, 0 are free") as caught:
        child.Learner(replace(SPEC, memory_cap=1), vectors)
    assert caught.value.reason is Code.MODEL_TOO_LARGE


@pytest.mark.parametrize(("cap", "share"), [(2 << 30, 0.25), (100 << 30, 1.0)])
def test_a_device_is_filled_to_its_owners_cap_only(vectors, monkeypatch, cap, share):
    learner, told = child.Learner(replace(SPEC, vram_cap=cap), vectors), []
    learner.device = "cuda:1"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given))
    learner._cap_device()
    assert told == [(share, "cuda:1")]


def test_a_device_without_room_for_one_sequence_is_refused_by_name(vectors, monkeypatch):
    def short(self, sequences):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(child.Learner, "_try", short)
    with pytest.raises(Refused, match="cpu has too little memory for the model and one sequence") as caught:
        child.Learner(SPEC, vectors)
    assert caught.value.reason is Code.MEMORY and caught.value.reason.exit.value == 5


BROKEN_DEVICE = """
import asyncio
from node import trainer
steps = trainer.Learner.step
def step(self, *arguments):
    if self._step == 3:
        raise RuntimeError("CUDA error: device-side assert triggered")
    return steps(self, *arguments)
trainer.Learner.step = step
asyncio.run(trainer._main())
"""


async def test_an_error_of_the_device_ends_the_trainer_with_its_words_in_the_log(vectors, tmp_path, monkeypatch):
    (tmp_path / "broken_device.py").write_text(BROKEN_DEVICE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.setattr(training, "MODULE", "broken_device")
    ended = asyncio.Future()
    with open(tmp_path / "log", "wb") as log:
        trainer = await Trainer.start(
            SPEC,
            vectors=vectors,
            log=log,
            on_event=lambda event: ended.set_result(event) if isinstance(event, Exited) else None,
        )
    await trainer.add_data([(piece(0, 64), shard(tmp_path, sequences=64))])
    await trainer.run()
    assert (await asyncio.wait_for(ended, 30)).returncode == Code.CHILD_DIED.exit.value
    assert b"device-side assert" in (tmp_path / "log").read_bytes()
    await trainer.stop()


async def test_a_refusal_in_the_child_reaches_the_owner_by_name(vectors, tmp_path):
    with open(tmp_path / "log", "wb") as log, pytest.raises(Refused, match="E-MODEL-001"):
        await Trainer.start(replace(SPEC, layout="00" * 32), vectors=vectors, log=log, on_event=print)


def test_accumulated_micro_batches_make_the_same_step(vectors):
    tokens = np.arange(8 * CONTEXT).reshape(8, CONTEXT) % VOCABULARY
    ends = []
    for cap in (8, 2):
        learner = child.Learner(replace(SPEC, batch_cap=cap), vectors)
        assert learner.micro_batch == cap
        learner.step(tokens, np.roll(tokens, -1), lambda: False)
        learner.save()
        ends.append(vectors.snapshot.copy())
    np.testing.assert_allclose(*ends, atol=2e-4)


def test_the_probe_leaves_no_trace(vectors):
    learner = child.Learner(SPEC, vectors)
    learner.save()
    assert np.array_equal(vectors.snapshot, vectors.shared)
    assert all(not optimizer.state for optimizer in learner._optimizers)


def test_an_abandoned_step_changes_nothing(vectors):
    learner = child.Learner(replace(SPEC, batch_cap=2), vectors)
    answers = iter([False, False, True])
    tokens = np.zeros((8, CONTEXT), np.int64)
    assert learner.step(tokens, tokens, lambda: next(answers)) is None
    learner.save()
    assert np.array_equal(vectors.snapshot, vectors.shared)
    assert all(parameter.grad is None for parameter in learner._parameters)


def test_a_step_that_runs_out_of_memory_is_made_again_in_smaller_pieces(vectors, monkeypatch):
    learner = child.Learner(SPEC, vectors)
    real = learner._workload.loss

    def with_little_memory(module, inputs, targets):
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("pretended")
        return real(module, inputs, targets)

    monkeypatch.setattr(learner._workload, "loss", with_little_memory)
    tokens = np.zeros((8, CONTEXT), np.int64)
    assert learner.step(tokens, tokens, lambda: False) > 0
    assert learner.micro_batch == 2


def test_muon_is_for_hidden_matrices_only(vectors):
    learner = child.Learner(SPEC, vectors)
    names = {id(parameter): name for name, parameter in learner._module.named_parameters()}
    adam, muon = ({names[id(p)] for g in each.param_groups for p in g["params"]} for each in learner._optimizers)
    assert all("proj" in name for name in muon) and len(muon) == 14
    assert all("embed" in name or "norm" in name or "lm_head" in name for name in adam)
    assert adam | muon == set(names.values())


def test_a_shard_that_ends_early_or_is_gone_is_named(tmp_path):
    feed = child.Feed(SPEC)
    path = shard(tmp_path, sequences=4)
    for wanted in (piece(0, 5), piece(3, 10**9)):
        with pytest.raises(child.ShardError, match=f"{SHARD} ends before sequence {wanted.stop}"):
            feed.read([(wanted, path)])
    with pytest.raises(child.ShardError, match="cannot be read"):
        feed.read([(piece(0, 4), tmp_path / "gone")])


def test_targets_are_the_inputs_one_token_later_across_ranges(tmp_path):
    feed = child.Feed(SPEC)
    path = shard(tmp_path, sequences=12)
    inputs, targets = feed.read([(piece(10, 12), path), (piece(0, 1), path)])
    read = [sequence_at(position, sequences=12, pass_number=0) for position in (10, 11, 0)]
    assert inputs[:, 0].tolist() == [index * CONTEXT % VOCABULARY for index in read]
    assert np.array_equal(targets, (inputs + 1) % VOCABULARY)


@pytest.mark.parametrize(
    "architecture, change, said",
    [
        ("lama", {}, "did you mean llama"),
        ("llama", {"hiden_size": 32}, "did you mean hidden_size"),
        ("llama", {"vocab_size": 9}, "comes from the data"),
        ("llama", {"attn_implementation": "someone/kernel"}, "has no key"),
        ("llama", {"_attn_implementation": "someone/kernel"}, "has no key"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "someone/code--x.Y"}}, "has no key"),
        ("llama", {"quantization_config": {}}, "has no key"),
        ("llama", {"rope_parameters": {"_x": 1}}, "may not set"),
        ("llama", {"num_hidden_layers": 10**9}, "wanted 1 to 1024"),
        ("llama", {"hidden_size": 10**15}, "at most"),
        ("llama", {"hidden_size": 0}, "wanted 1 to"),
        ("llama", {"hidden_size": "many"}, "expected int"),
        ("llama", {"hidden_size": 33}, "multiple of the number of attention heads"),
        ("llama", {"hidden_size": 1 << 30, "num_attention_heads": 1 << 20}, "parameters, at most"),
        ("deepseek_v3", {"n_routed_experts": 10**6}, "experts"),
        ("t5", {}, "no causal language model"),
        ("gemma3", {}, "wanted a text model"),
    ],
)
def test_a_hostile_or_mistaken_config_is_refused_before_anything_is_allocated(architecture, change, said):
    values = change if architecture != "llama" else TINY | change
    with pytest.raises(Refused, match=said) as refused:
        model.measure(model.model_config(architecture, values, vocabulary=VOCABULARY, context=CONTEXT))
    assert refused.value.reason in (Code.MODEL_BAD, Code.MODEL_TOO_LARGE)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mamba", "opt", "bloom"])
@pytest.mark.parametrize("tied", [True, False])
def test_any_architecture_is_one_vector_and_back(architecture, tied):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": tied}
    if architecture == "mamba":
        del sizes["num_attention_heads"]
    config = model.model_config(architecture, sizes, vocabulary=VOCABULARY, context=CONTEXT)
    size = model.measure(config)
    module = model.build(config)
    assert model.layout(module) == size.layout and model.count(size.layout) == size.parameters
    vector = model.initial_vector(config, 3)
    assert np.array_equal(vector, model.initial_vector(config, 3))
    model.load(module, vector)
    out = np.zeros_like(vector)
    model.flatten(module, out)
    assert np.array_equal(out, vector) and np.isfinite(vector).all()
