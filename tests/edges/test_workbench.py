"""The workbench with real vectors, files and folds, and a trainer made of a few lines: in which order things happen."""

import asyncio
import contextlib
import os
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import AsyncMock

import numpy as np
import pytest

from node import hardware, workbench
from node.config import Home, Settings
from node.core import rounds
from node.core.rounds import Phase, Rounds
from node.daemon import Daemon
from node.decider import Decider
from node.journal import Journal
from node.progress import Progress, ProgressFile
from node.training import Snapshot, Started
from node.workbench import Workbench
from protocol import blobs
from protocol.blobs import BlobStore, digest_of
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.limits import CHUNK_VALUES
from protocol.log import record_hash
from protocol.runspec import RunSpec
from protocol.state import initial_state, write_base
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Exchange,
    Head,
    LogEntry,
    Manifest,
    NodeId,
    Part,
    Record,
)

ME, PEER = NodeId("me"), NodeId("peer")
SHARD = Digest("ab" * 32)
SIZE = CHUNK_VALUES + 7
CONTEXT = 16
GENESIS = Head(0, Digest("00" * 32))
START = np.linspace(-1, 1, SIZE, dtype=np.float32)
STEP = np.float32(0.25)  # what the trainer below takes off each parameter


def span(start, stop):
    return DataRange(0, SHARD, start, stop)


def brings(*spans, node=ME):
    return Contribution(node, sum(each.stop - each.start for each in spans) * CONTEXT, spans)


def plain(contribution):
    """Without what says whose it is, and for which round."""
    return replace(contribution, update="", signature="")


class Trainer:
    """It has trained on what it is said to have trained on."""

    started = Started("cpu", "fp32", 1, 1, 0.0)
    steps = 0

    def __init__(self, vectors, ranges=()):
        self.vectors = vectors
        self.ranges = tuple(ranges)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.dead = False

    async def peek(self):
        await self.may_answer.wait()
        if self.dead:
            raise Refused(Code.CHILD_DIED, "the trainer has ended")
        self.vectors.snapshot[:] = self.vectors.shared - (STEP if self.ranges else 0)
        return Snapshot(len(self.ranges), 0, self.ranges, None)

    async def snapshot(self):
        answer = await self.peek()
        self.ranges = ()
        return answer

    async def merge(self, *, from_snapshot):
        self.merged = from_snapshot

    async def stop(self):
        self.dead = True


def rules():
    return rounds.Rules(
        me=ME,
        run="run",
        parameters=SIZE,
        context=CONTEXT,
        inner_steps=lambda _: 10,
        exchange=lambda roles: Exchange.ALL_REDUCE,
        part_is_vouched=lambda record, part: True,
        is_data=lambda data: True,
        round_seconds_min=lambda members: 0.0,
        round_seconds_max=100.0,
        gather_seconds=1.0,
        attempt_seconds_min=5.0,
        attempt_seconds_max=20.0,
        stale_rounds=8,
        sign=lambda body: "s",
        vote_is_valid=lambda *_: True,
        sign_proposal=lambda body: "s",
        proposal_is_valid=lambda *_: True,
        brings=lambda head, contribution: replace(contribution, signature=f"for {head.round}"),
        is_brought=lambda head, contribution: contribution.signature == f"for {head.round}",
        entry_is_certified=lambda *_: True,
    )


class Stand:
    """A workbench, where its rounds machine is, and what that wanted done."""

    def __init__(self, folder, *, training=True):
        self.folder = folder
        home = Home(folder)
        home.runtime.mkdir(parents=True, exist_ok=True)
        self.spec = RunSpec.model_validate({"run": {"name": "test"}})
        self.blobs = BlobStore(home.blobs)
        self.journal = Journal(home.journal / "test")
        self.effects = []
        self.decider = Decider(rules(), self.effects.append)
        manifest = Manifest(
            "run", "test", "{}", "{}", None, 256, SIZE, Digest("22" * 32), Digest(""), CONTEXT, 2, Digest(""), "5.0"
        )
        self.bench = Workbench(
            manifest,
            self.spec,
            ME,
            settings=Settings(folder, training=training),
            journal=self.journal,
            blobs=self.blobs,
            decider=self.decider,
            grants_of=lambda ranges: (),
            log_file=lambda name: None,
            on_event=lambda event: None,
        )

    async def begin(self, **state):
        """From the journal's checkpoint, or from the first state."""
        if not await self.bench.open_own():
            path = self.folder / "genesis"
            digest = write_base(path, initial_state(START.copy(), momentum=False))
            await self.bench.load(BaseCheckpoint(0, GENESIS.hash, digest, BlobRef(Digest(""), 0)), path)
        replica = self.bench.replica
        fields = {"head": replica.head, "digest": replica.digest, "consumed": replica.state.consumed}
        self.decider.begin(Rounds(**fields | state))
        return self

    @property
    def rounds(self):
        return self.decider.rounds

    @property
    def u(self):
        return self.bench._gradient.residual

    def progress(self):
        """As a start would find it."""
        path = self.journal.folder / "progress"
        return ProgressFile(path, SIZE, room=lambda size: True, now=0.0).load()

    def save_soon(self):
        self.bench._progress._pace = replace(self.bench._progress._pace, paid_until=0.0)

    def with_trainer(self, *ranges):
        self.bench.trainer = Trainer(self.bench._vectors, ranges)
        return self.bench.trainer

    def record(self, *contributions, update=0.5):
        """A certified record that follows the head."""
        data = codec("int4").encode(np.full(SIZE, update, np.float32))
        self.blobs.put_bytes(data)
        included = tuple(each.node for each in contributions)
        part = Part(0, 0, SIZE, digest_of(data), len(data), PEER, included)
        head = self.rounds.head
        record = Record("run", head.round, head.hash, 0, PEER, contributions, (part,), self.rounds.digest)
        return LogEntry(record, Certificate(record_hash(record), Ballot(0, 0), ()))

    async def fold(self, *contributions, **state):
        entry = self.record(*contributions)
        self.decider.begin(replace(self.rounds, committed=entry, phase=Phase.FOLDING, **state))
        return await self.bench.fold(entry)


@pytest.fixture
async def stand(tmp_path):
    stand = await Stand(tmp_path).begin()
    yield stand
    stand.bench.close()


async def again(stand):
    """The same folder after a kill."""
    return await Stand(stand.folder).begin()


# snapshots and folds


async def test_a_fold_that_waits_for_a_snapshot_finds_it_in_the_round_that_it_was_made_for(stand):
    trainer = stand.with_trainer(span(0, 4))
    trainer.may_answer.clear()
    others = brings(span(8, 9), node=PEER)
    entry = stand.record(others)
    stand.decider.begin(replace(stand.rounds, snapshot_asked=True, committed=entry, phase=Phase.FOLDING))
    stand.save_soon()
    snapshot = asyncio.create_task(stand.bench.take_snapshot())
    await asyncio.sleep(0)
    fold = asyncio.create_task(stand.bench.fold(entry))
    await asyncio.sleep(0)
    trainer.may_answer.set()
    await asyncio.gather(snapshot, fold)
    assert stand.rounds.head.round == 1
    assert plain(stand.rounds.carried) == brings(span(0, 4)), "it was held when the round ended without it"
    assert stand.rounds.missed == 1
    found, _ = stand.progress()
    assert replace(found, contribution=plain(found.contribution)) == Progress(GENESIS, 0, 0, brings(span(0, 4)), True)


async def test_what_it_brought_can_be_shown_whether_the_record_took_it_or_not(stand):
    shown = []
    for taken, data in ((False, span(0, 4)), (True, span(4, 8))):
        stand.with_trainer(data)
        stand.decider.begin(replace(stand.rounds, snapshot_asked=True))
        stand.save_soon()
        await stand.bench.take_snapshot()
        shown.append(stand.bench.payload)
        brought = stand.rounds.contribution
        await stand.fold(brought if taken else brings(span(8, 9), node=PEER))
    await stand.fold(brings(span(9, 10), node=PEER))  # a round to which it brought nothing
    assert [stand.bench.brought.read(digest_of(data)) for data in shown] == shown
    assert len(list((stand.journal.folder / "brought").glob("??/*"))) == 2


async def test_the_file_is_gone_before_a_round_hears_more_than_it_says(stand):
    stand.with_trainer(span(0, 4))
    stand.bench._progress.save(Progress(GENESIS, 0, 0, brings(span(0, 2)), offered=False), stand.u)
    stand.decider.begin(replace(stand.rounds, snapshot_asked=True))
    seen = []
    step = stand.decider.step
    stand.decider.step = lambda event: (seen.append(stand.progress()), step(event))
    await stand.bench.take_snapshot()
    assert seen == [None]
    assert plain(stand.rounds.contribution) == brings(span(0, 4))


async def test_a_snapshot_that_a_rollback_made_needless_is_not_taken(stand):
    trainer = stand.with_trainer(span(0, 4))
    await stand.bench.take_snapshot()
    assert trainer.ranges == (span(0, 4),) and stand.rounds.contribution is None


# a start


async def test_what_was_saved_is_judged_by_the_log_as_far_as_it_has_been_followed(stand):
    mine = brings(span(0, 4))
    u = np.full(SIZE, 0.3, np.float32)
    stand.bench._progress.save(Progress(GENESIS, 0, 0, mine, offered=True), u)
    node = await again(stand)
    await node.fold(mine)  # the round had ended without us, but with our work
    await node.bench.take_up_saved()
    assert node.rounds.contribution is None and node.rounds.carried is None
    left = u - codec("int4").decode(codec("int4").encode(u), SIZE)
    assert np.array_equal(node.u, left)


async def test_work_that_an_open_round_was_offered_is_brought_to_it_again_in_the_same_bytes(stand):
    stand.with_trainer(span(0, 4))
    stand.decider.begin(replace(stand.rounds, snapshot_asked=True))
    stand.save_soon()
    await stand.bench.take_snapshot()
    node = await again(stand)
    await node.bench.take_up_saved()
    assert node.rounds.contribution == stand.rounds.contribution and node.rounds.carried is None
    assert plain(node.rounds.contribution) == brings(span(0, 4))
    assert node.bench.payload == stand.bench.payload != b""
    assert node.rounds.contribution.update == digest_of(node.bench.payload)


async def test_work_that_rounds_went_by_without_weighs_what_it_would_if_the_node_had_stayed(stand):
    mine = brings(span(0, 4))
    stand.bench._progress.save(Progress(GENESIS, 0, 0, mine, offered=True), np.full(SIZE, 1, np.float32))
    node = await again(stand)
    for number in range(3):
        await node.fold(brings(span(10 + number, 11 + number), node=PEER))
    await node.bench.take_up_saved()
    assert node.rounds.carried == mine and node.rounds.missed == 3
    assert np.all(node.u == 0.25)
    assert node.progress() is not None, "until a round hears of it"


async def test_what_compression_left_over_ages_with_the_rounds_that_followed(stand):
    mine = brings(span(0, 4))
    u = np.full(SIZE, 0.3, np.float32)
    stand.bench._progress.save(Progress(GENESIS, 0, 0, mine, offered=True), u)
    node = await again(stand)
    await node.fold(mine)
    for number in range(2):
        await node.fold(brings(span(10 + number, 11 + number), node=PEER))
    await node.bench.take_up_saved()
    left = u - codec("int4").decode(codec("int4").encode(u), SIZE)
    assert np.array_equal(node.u, left * np.float32(0.5)) and node.rounds.missed == 2


# a trainer that died


async def saved(stand, *ranges, **state):
    """A file between two rounds, as `keep_progress` writes it."""
    stand.decider.begin(replace(stand.rounds, **state))
    await stand.bench._save_progress(stand.with_trainer(*ranges))


async def test_of_a_trainer_that_died_what_was_saved_is_taken_up(stand):
    await saved(stand, span(0, 4), steps=3)
    await stand.bench.lost_trainer()
    assert stand.bench.trainer is None
    assert plain(stand.rounds.carried) == brings(span(0, 4)) and stand.rounds.contribution is None
    assert np.allclose(stand.u, STEP)
    await stand.bench.lost_trainer()
    assert plain(stand.rounds.carried) == brings(span(0, 4)) and np.allclose(stand.u, STEP), "and only once"


async def test_a_round_that_asks_while_the_trainer_is_dead_gets_what_was_saved(stand):
    await saved(stand, span(0, 4), snapshot_asked=True)
    stand.bench.trainer.dead = True
    await stand.bench.take_snapshot()
    assert plain(stand.rounds.contribution) == brings(span(0, 4))
    assert stand.bench.payload == codec("int4").encode(stand.u)
    assert np.allclose(stand.u, STEP)


async def test_what_a_round_was_offered_is_not_taken_up_a_second_time(stand):
    stand.with_trainer(span(0, 4))
    stand.decider.begin(replace(stand.rounds, snapshot_asked=True))
    stand.save_soon()
    await stand.bench.take_snapshot()
    before = stand.u.copy()
    await stand.bench.lost_trainer()
    assert plain(stand.rounds.contribution) == brings(span(0, 4)) and stand.rounds.carried is None
    assert np.array_equal(stand.u, before)
    await stand.fold(brings(span(8, 9), node=PEER))
    stand.with_trainer()
    await stand.bench.lost_trainer()
    assert plain(stand.rounds.carried) == brings(span(0, 4)) and np.array_equal(stand.u, before)


async def test_work_that_diverged_is_not_taken_up(stand):
    await saved(stand, span(0, 4))
    assert await stand.bench.discard_trainer()
    assert stand.progress() is None and stand.rounds.carried is None and not stand.u.any()


async def test_a_dead_trainer_leaves_the_work_that_was_held_back_before(stand):
    stand.u[:] = 1
    await saved(stand, span(0, 4), carried=brings(span(20, 22)), missed=2)
    await stand.bench.lost_trainer()
    assert plain(stand.rounds.carried) == brings(span(20, 22), span(0, 4)) and stand.rounds.missed == 2
    assert np.allclose(stand.u, 1 + STEP)


async def test_fresh_work_has_missed_no_round(stand):
    await saved(stand, span(0, 4), missed=5)
    assert stand.progress()[0].missed == 0


# the owner's cap on memory


def test_a_model_whose_state_passes_the_owners_cap_is_refused_before_anything_is_allocated(tmp_path):
    held = SIZE * workbench.HELD_BYTES
    least = held + workbench.TRAINER_BYTES_MIN
    assert workbench._check_room(SIZE, tmp_path, momentum=False, cap=least, training=True) == held
    with pytest.raises(Refused, match=f"pass max_memory, {least - 1:,}") as caught:
        workbench._check_room(SIZE, tmp_path, momentum=False, cap=least - 1, training=True)
    assert caught.value.reason is Code.MODEL_TOO_LARGE
    needed = SIZE * workbench.HELPER_BYTES
    assert workbench._check_room(SIZE, tmp_path, momentum=False, cap=needed, training=False) == needed < held


# a long pause


async def test_a_trainer_that_is_released_leaves_its_work_behind(stand):
    trainer = stand.with_trainer(span(0, 4))
    trainer.steps = 3
    assert await stand.bench.release_trainer()
    assert trainer.dead and stand.bench.trainer is None
    assert plain(stand.rounds.carried) == brings(span(0, 4))
    assert np.allclose(stand.u, STEP)
    assert not await stand.bench.release_trainer(), "there is none"


async def test_a_trainer_whose_work_a_round_is_about_to_take_is_not_released(stand):
    trainer = stand.with_trainer(span(0, 4))
    trainer.steps = 3
    stand.decider.begin(replace(stand.rounds, snapshot_asked=True))
    assert not await stand.bench.release_trainer() and not trainer.dead
    stand.decider.begin(replace(stand.rounds, snapshot_asked=False))
    assert await stand.bench.release_trainer()


# a full disk


def fill(monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blobs.os, "fsync", full)


async def test_a_disk_full_while_the_model_is_saved_leaves_the_one_before_and_says_so(stand, monkeypatch):
    await stand.bench.save_base()
    await stand.fold(brings(span(0, 1), node=PEER))
    fill(monkeypatch)
    with pytest.raises(Refused, match="no room to write") as refused:
        await stand.bench.save_base()
    assert refused.value.reason is Code.DISK_CAP
    monkeypatch.undo()
    node = await again(stand)
    assert node.rounds.head == stand.rounds.head and node.rounds.digest == stand.rounds.digest
    assert len(list(stand.journal.folder.glob("base-*"))) == 1


async def test_a_checkpoint_that_the_journal_does_not_name_yet_does_not_hide_the_one_before(stand, monkeypatch):
    await stand.bench.save_base()
    await stand.fold(brings(span(0, 1), node=PEER))

    def killed(base):
        raise KeyboardInterrupt

    monkeypatch.setattr(stand.journal, "save_base", killed)
    monkeypatch.setattr(stand.bench.replica, "_drop_bases_but", lambda kept: None)
    with pytest.raises(KeyboardInterrupt):
        await stand.bench.save_base()
    node = Stand(stand.folder)
    assert await node.bench.open_own()
    assert node.bench.replica.head == stand.rounds.head


async def test_a_disk_full_while_a_record_is_made_durable_applies_nothing_of_it(stand, monkeypatch):
    before = stand.bench._vectors.shared.copy()
    entry = stand.record(brings(span(0, 1), node=PEER))
    stand.decider.begin(replace(stand.rounds, committed=entry, phase=Phase.FOLDING))
    fill(monkeypatch)
    with pytest.raises(Refused, match="no room to write"):
        await stand.bench.fold(entry)
    assert np.array_equal(stand.bench._vectors.shared, before)
    assert stand.journal.entry(0) is None and stand.rounds.head == GENESIS


async def test_a_part_that_rotted_is_fetched_again_by_the_next_start(stand):
    entry = stand.record(brings(span(0, 1), node=PEER))
    await stand.bench.save_base()
    stand.decider.begin(replace(stand.rounds, committed=entry, phase=Phase.FOLDING))
    await stand.bench.fold(entry)
    (part,) = entry.record.parts
    stand.blobs.path(part.digest).write_bytes(bytes(part.size))
    node = await again(stand)
    assert node.rounds.head == GENESIS and not node.blobs.has(part.digest)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"rot")])
async def test_a_part_that_is_lost_between_vote_and_fold_comes_once_more(stand, spoil):
    entry = stand.record(brings(span(0, 1), node=PEER))
    (part,) = entry.record.parts
    data, asked = stand.blobs.read(part.digest), []
    spoil(stand.blobs.path(part.digest))

    async def fetch_part(wanted, sources):
        asked.append((wanted, sources))
        stand.blobs.put_bytes(data)
        return True

    courier = SimpleNamespace(fetch_part=fetch_part)
    node = SimpleNamespace(_workbench=stand.bench, _blobs=stand.blobs, _courier=courier)
    stand.decider.begin(replace(stand.rounds, committed=entry, phase=Phase.FOLDING))
    await Daemon._fold_whole(node, entry)
    assert asked == [(part, (PEER,))] and stand.rounds.head.round == 1

    stand.blobs.delete(part.digest)
    again = stand.record(brings(span(1, 2), node=PEER))
    stand.decider.begin(replace(stand.rounds, committed=again, phase=Phase.FOLDING))
    stand.blobs.delete(again.record.parts[0].digest)

    async def nowhere(wanted, sources):
        return False

    courier.fetch_part = nowhere
    with pytest.raises(Refused, match="is not here"):
        await Daemon._fold_whole(node, again)
    assert stand.rounds.head.round == 1, "nothing of it was applied"


async def test_what_this_machine_cannot_train_is_refused_before_the_download(stand, monkeypatch):
    bench, needed = stand.bench, workbench.STATE_BYTES * SIZE
    machine = hardware.measure(stand.folder)
    asked = []

    async def choose(wanted, bytes_needed, *, cap, log, sandbox):
        asked.append((wanted, bytes_needed, cap))
        return "cpu"

    monkeypatch.setattr(workbench.rehearsal, "choose_device", choose)
    monkeypatch.setattr(workbench.rehearsal, "check_model", AsyncMock())
    monkeypatch.setattr(workbench, "DEVICE_BYTES_MIN", needed - 1)
    bench._settings = replace(bench._settings, device="auto", max_vram_bytes=1 << 40)
    for missing, refused in ((0, contextlib.nullcontext()), (1, pytest.raises(Refused))):
        room = replace(machine, memory_available_bytes=workbench.HELD_BYTES * SIZE + needed - missing)
        monkeypatch.setattr(hardware, "measure", lambda folder, room=room: room)
        with refused as caught:
            await bench.check_model()
    assert caught.value.reason is Code.MODEL_TOO_LARGE and f"training needs {needed:,} bytes" in caught.value.what
    assert asked == [("auto", needed, 1 << 40)] * 2
    bench._settings = replace(bench._settings, training=False)
    await bench.check_model()
    assert len(asked) == 2, "a helper trains nothing"


def test_a_model_that_this_machine_cannot_hold_is_refused_before_anything_is_allocated(stand, monkeypatch):
    machine = hardware.measure(stand.folder)
    small = replace(machine, memory_available_bytes=workbench.HELD_BYTES * SIZE - 1)
    monkeypatch.setattr(hardware, "measure", lambda folder: small)
    with pytest.raises(Refused) as caught:
        Stand(stand.folder)
    assert caught.value.reason is Code.MODEL_TOO_LARGE


async def test_a_node_that_trains_nothing_follows_the_log_and_touches_no_vector_of_training(tmp_path):
    stand = await Stand(tmp_path, training=False).begin()
    for number in range(12):  # far more than the rounds after which a trainer's leftovers are dropped
        await stand.fold(brings(span(number, number + 1), node=PEER))
    assert stand.rounds.head.round == 12 and stand.bench.trainer is None
    assert os.fstat(stand.bench._vectors.files[1]).st_blocks == 0, "no page of the trainer's vector was ever needed"
