"""The auditor with a real evaluator process, and what real training brings: who is accused, and what stays behind."""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.auditor import Auditor
from coordinator.core.audits import Kind
from coordinator.evaluation import Evaluator
from protocol import model, robust
from protocol.blobs import BlobStore, digest_of
from protocol.contribution import Complaint
from protocol.state import initial_state
from protocol.types import Contribution, Digest, Epoch, Record, RoundNumber, RunId
from tests.attacks.swarm import HELDOUT, TOKEN_BYTES, Habit, Setting, Text, Worker

SETTING = Setting(nodes=5, hidden=32, steps=40, context=32, rule="mean")
FLIPPED, ZERO, BROKEN = 3, 4, 2
ROUNDS = 6


class Stand:
    """Five members who train, and a coordinator's auditor; what it asks for is shown in the same round."""

    def __init__(self, folder):
        self.text = Text(SETTING, folder)
        self.archive = BlobStore(folder / "archive")
        blob = self.archive.put_file(self.text.shard)
        self.shard = SimpleNamespace(digest=blob.digest, sequences=self.text.sequences)
        self.state = initial_state(model.initial_vector(SETTING.config, 0), momentum=False)
        self.workers = [Worker(SETTING, number, self.state, folder, Habit(), None) for number in range(5)]
        self.manifest = SimpleNamespace(parameters=self.state.params.size, token_bytes=TOKEN_BYTES)
        self.evaluator, self.accused, self.heard_ms = None, [], 1.0
        self.auditor = Auditor(
            folder / "audits",
            self.manifest,
            (self.shard,),
            SETTING.packing.up,
            share=1.0,
            archive=self.archive,
            evaluator=lambda: self.evaluator,
            heard_ms=lambda node: self.heard_ms,
            now_ms=lambda: 0.0,
            accuse=self.accused.append,
        )

    async def start(self, folder):
        self.evaluator = await Evaluator.start(
            folder=folder,
            model_config=SETTING.config,
            parameters=self.manifest.parameters,
            heldout=self.text.heldout,
            token_bytes=TOKEN_BYTES,
            context=SETTING.context,
            sequences=HELDOUT,
            tokenizer=None,
            audited=self.auditor.folders,
        )

    def bring(self, number, steps):
        """What each has trained, but for those who lie; those who were accused are gone."""
        up, size = SETTING.packing.up, self.state.params.size
        out = {each.node for each in self.accused}
        payloads = {}
        for index, worker in enumerate(self.workers):
            if worker.node in out:
                continue
            worker.train(self.text, steps, 1.0)
            payload = worker.bring()
            if index == FLIPPED:
                payload = up.encode(-up.decode(payload, size))
            elif index == ZERO:
                payload = up.encode(np.zeros(size, np.float32))
            elif index == BROKEN and number == ROUNDS - 1:
                payload = b"\xff\xff" + payload[2:]
            payloads[worker] = payload
        return payloads

    def record(self, number, payloads):
        contributions = tuple(
            Contribution(
                worker.node,
                SETTING.context,
                tuple(replace(span, shard=self.shard.digest) for span in worker.ranges),
                update=digest_of(payload),
            )
            for worker, payload in payloads.items()
        )
        leader = contributions[0].node
        return Record(RunId("run"), RoundNumber(number), Digest(""), Epoch(0), leader, contributions, (), Digest(""))

    async def round(self, number, *, shown=True, steps=1):
        payloads = self.bring(number, steps)
        record = self.record(number, payloads)
        self.auditor.certified(record)
        self.auditor.keep(RoundNumber(number), self.state.params)
        good = [payload for payload in payloads.values() if payload[:2] != b"\xff\xff"]
        for start, mean in robust.means(
            SETTING.packing.rule, SETTING.packing.up, good, [1] * len(good), self.state.params.size
        ):
            self.state.params[start : start + mean.size] -= mean
        self.auditor.keep(RoundNumber(number + 1), self.state.params)
        for worker, payload in payloads.items():
            worker.ranges = []
            worker.vectors.shared[:] = self.state.params
            worker.gradient.settle([SimpleNamespace(start=0, stop=self.state.params.size)])
            worker.learner.merge()
            if shown and digest_of(payload) in self.auditor.asked(worker.node):
                self.auditor.blobs.put_bytes(payload)
        self.auditor.stir()
        return payloads

    def complain(self, number, worker, payload, accuser=0):
        told = Contribution(worker.node, 64, (), update=digest_of(payload))
        complaint = Complaint(RoundNumber(number), Digest(""), told)
        self.auditor.complained(complaint, self.workers[accuser].node, frozenset(each.node for each in self.workers))

    def close(self):
        for worker in self.workers:
            worker.close()


@pytest.fixture
def stand(tmp_path):
    stand = Stand(tmp_path)
    yield stand
    stand.close()


async def test_real_audits_accuse_who_lies_and_nobody_else(stand, tmp_path):
    await stand.start(tmp_path)
    measuring = asyncio.create_task(stand.auditor.run())
    try:
        before = await stand.evaluator.loss(stand.state.params)
        for number in range(ROUNDS):
            await stand.round(number, steps=3)
            while stand.auditor._audits.open:
                await asyncio.sleep(0.01)
                assert not measuring.done(), measuring
        assert await stand.evaluator.loss(stand.state.params) < before  # measuring goes on as if nothing had been
    finally:
        measuring.cancel()
        await stand.evaluator.stop()
    found = {each.node: each.kind for each in stand.accused}
    nodes = [worker.node for worker in stand.workers]
    assert found == {nodes[FLIPPED]: Kind.POINTS, nodes[ZERO]: Kind.POINTS, nodes[BROKEN]: Kind.BROKEN}
    (flipped,) = (each for each in stand.accused if each.node == nodes[FLIPPED])
    assert flipped.round <= 3 and "raised the loss" in flipped.reason
    for honest in nodes[:2]:
        assert stand.auditor._audits.histories[honest].newest.gain > 3
    left = {path.name for path in (tmp_path / "audits").rglob("*") if path.is_file()}
    assert left <= {".lock"}, left  # neither states nor answers


async def test_a_busy_evaluator_drops_audits_and_who_is_silent_is_warned_only_after_many(stand, tmp_path):
    for number in range(4):
        await stand.round(number)
    audits = stand.auditor._audits
    assert {ask.round for ask in audits.open} == {1, 2, 3}  # what waits longer is dropped
    assert all(history.unanswered == 0 for history in audits.histories.values())
    states = sorted(path.name for path in (tmp_path / "audits").glob("state-*"))
    assert states == [f"state-{number:012d}" for number in (1, 2, 3, 4)]
    for number in range(4, 14):
        await stand.round(number, shown=False)
        assert len(stand.auditor.blobs.digests()) <= 5 * 2
    assert {each.kind for each in stand.accused} == {Kind.UNANSWERED}


async def test_what_is_being_measured_stays_readable_though_its_round_is_undone_meanwhile(stand, tmp_path):
    seen = []

    class Slow:
        async def audit(self, order):
            stand.auditor.gone_back(RoundNumber(0))
            seen.extend(Path(order[name]).stat().st_size for name in ("state", "following", "update"))

    await stand.round(0)
    await stand.round(1)
    stand.evaluator = Slow()
    measuring = asyncio.create_task(stand.auditor.run())
    while stand.auditor._audits.open or list((tmp_path / "audits").glob("held-*")):
        await asyncio.sleep(0.01)
        assert not measuring.done(), measuring
    measuring.cancel()
    size = 4 * stand.manifest.parameters
    assert seen == [size, size, stand.auditor.size]
    assert stand.auditor._audits.open == ()
    assert not [path.name for path in (tmp_path / "audits").iterdir() if path.is_file()]


async def test_who_has_lost_its_line_is_not_said_to_be_silent(stand):
    stand.heard_ms = -1.0
    for number in range(9):
        await stand.round(number, shown=False)
    assert stand.accused == []


async def test_a_rollback_leaves_nothing_to_be_measured_of_what_is_undone(stand, tmp_path):
    for number in range(3):
        await stand.round(number)
    stand.auditor.gone_back(RoundNumber(1))
    assert {ask.round for ask in stand.auditor._audits.open} == {0}
    assert sorted(path.name for path in (tmp_path / "audits").glob("state-*")) == [f"state-{0:012d}", f"state-{1:012d}"]
    assert len(stand.auditor.blobs.digests()) <= 5


@contextlib.asynccontextmanager
async def reading(stand):
    """The auditor reads; tells how to wait until it has read what has come."""
    task = asyncio.create_task(stand.auditor.read())

    async def until_read():
        async with asyncio.timeout(20):
            while stand.auditor._to_read() is not None:
                await asyncio.sleep(0.01)
                assert not task.done(), task

    try:
        yield until_read
    finally:
        task.cancel()


async def test_what_others_could_not_read_is_read_without_an_evaluator_and_whoever_signed_it_is_accused(stand):
    up, size = SETTING.packing.up, stand.manifest.parameters
    good = up.encode(np.ones(size, np.float32))
    bad, liar, honest = b"\xff\xff" + good[2:], stand.workers[BROKEN], stand.workers[0]
    async with reading(stand) as until_read:
        stand.complain(0, liar, bad)
        stand.complain(0, honest, good, accuser=BROKEN)
        assert (stand.auditor.asked(liar.node), stand.auditor.asked(honest.node)) == (
            (digest_of(bad),),
            (digest_of(good),),
        )
        for payload in (bad, good):
            stand.auditor.blobs.put_bytes(payload)
        stand.auditor.stir()
        await until_read()
        assert [(each.node, each.kind, each.proved) for each in stand.accused] == [(liar.node, Kind.BROKEN, True)]
        assert "nobody can read its update" in stand.accused[0].reason
        assert stand.auditor.blobs.digests() == () and stand.auditor._audits.open == ()
        stand.complain(1, honest, good, accuser=BROKEN)
        assert stand.auditor.asked(honest.node) == (), "it has complained in vain"


async def test_what_lies_in_the_archive_is_not_asked_for_and_is_read_only_if_it_is_as_long_as_a_contribution(stand):
    bad, liar = bytes(17), stand.workers[BROKEN]
    stand.archive.put_bytes(bad)
    async with reading(stand) as until_read:
        stand.complain(0, liar, bad)
        assert stand.auditor.asked(liar.node) == ()
        await until_read()
    (accusation,) = stand.accused
    assert accusation.kind is Kind.BROKEN and "17 bytes" in accusation.reason
    assert stand.archive.has(digest_of(bad))


async def test_bytes_that_have_rotted_here_are_held_against_nobody(stand):
    bad, liar = bytes(stand.auditor.size), stand.workers[BROKEN]
    stand.complain(0, liar, bad)
    stand.auditor.blobs.put_bytes(bad)
    stand.auditor.blobs.path(digest_of(bad)).write_bytes(b"\1" + bad[1:])
    async with reading(stand) as until_read:
        await until_read()
    assert stand.accused == [] and stand.auditor._audits.open == () and stand.auditor.blobs.digests() == ()


async def test_what_is_to_be_read_needs_no_states_is_never_measured_and_ends_with_its_time(stand, tmp_path):
    stand.auditor._rules = replace(stand.auditor._rules, share=0.0)
    liar, payload = stand.workers[BROKEN], b"never shown"
    for number in range(9):
        stand.complain(number, liar, payload + bytes([number]))
        brought = {worker: each for worker, each in stand.bring(number, 1).items() if worker is not liar}
        stand.auditor.certified(stand.record(number, brought))
        stand.auditor.keep(RoundNumber(number), stand.state.params)
        assert not list((tmp_path / "audits").glob("state-*"))
        assert len(stand.auditor.asked(liar.node)) <= 3
    assert [(each.node, each.kind) for each in stand.accused] == [(liar.node, Kind.UNANSWERED)]
    stand.evaluator = object()
    stand.auditor.blobs.put_bytes(payload + bytes([8]))
    assert stand.auditor._to_read() is not None and stand.auditor._ready() is None
    stand.auditor.gone_back(RoundNumber(8))
    assert stand.auditor._to_read() is None and stand.auditor.blobs.digests() == ()
