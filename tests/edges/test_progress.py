"""Local progress: what a file gives back after a kill, what it refuses, and what is still true of it in the log."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from node import progress as progress_file
from node.progress import (
    BYTES_PER_SECOND_MAX,
    MAGIC,
    SPACING_SECONDS,
    Carry,
    Drop,
    Offer,
    Pace,
    Progress,
    ProgressFile,
    Settle,
    resume,
)
from node.pseudograd import PseudoGradient
from protocol import canonical
from protocol.codec import codec
from protocol.limits import CHUNK_VALUES
from protocol.log import next_head
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Epoch,
    Head,
    LogEntry,
    NodeId,
    Part,
    Record,
    RoundNumber,
    RunId,
)  # fmt: skip

PARAMETERS = 17 * CHUNK_VALUES + 5  # more than one piece, and not a whole one
SHARD = Digest("ab" * 32)
ME, PEER = NodeId("me"), NodeId("peer")
FREE = Consumed()


def span(start, stop):
    return DataRange(0, SHARD, start, stop)


def brought(*spans, node=ME):
    return Contribution(node, sum(each.stop - each.start for each in spans), spans)


MINE = brought(span(0, 40), span(60, 70))
SAVED = Progress(Head(RoundNumber(7), Digest("07" * 32)), 0, 0, MINE, offered=False)
OFFERED = replace(SAVED, offered=True)


def vector(seed, size=PARAMETERS):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def opened(path, *, parameters=PARAMETERS, room=lambda size: True):
    return ProgressFile(path, parameters, room=room, now=time.monotonic() - 3600)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "progress"


# the file


def test_what_was_saved_comes_back_to_the_bit_and_nothing_else_lies_around(path):
    residual = vector(1)
    opened(path).save(OFFERED, residual)
    found, values = opened(path).load()
    assert found == OFFERED and np.array_equal(values, residual)
    assert [each.name for each in path.parent.iterdir()] == ["progress"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_peek_is_saved_as_the_pseudo_gradient_that_a_snapshot_would_make(path):
    shared, local, residual = vector(1), vector(2), vector(3)
    opened(path).save(SAVED, residual, shared=shared, local=local)
    gradient = PseudoGradient(shared, local, codec("int4"), residual_decay=1.0)
    gradient.residual[:] = residual
    gradient.take_snapshot()
    _, values = opened(path).load()
    assert np.array_equal(values, gradient.residual)
    assert np.array_equal(residual, vector(3)), "the live one is as it was"


def test_what_a_restarted_node_brings_is_encoded_to_the_same_bytes(path):
    shared, local = vector(1), vector(2)
    gradient = PseudoGradient(shared, local, codec("int4"), residual_decay=1.0)
    gradient.take_snapshot()
    opened(path).save(OFFERED, gradient.residual)
    again = PseudoGradient(shared, local, codec("int4"), residual_decay=1.0)
    again.residual[:] = opened(path).load()[1]
    again.encode()
    assert again.payload == gradient.payload


def test_nothing_is_there_before_the_first_save_and_after_forgetting(path):
    file = opened(path)
    assert file.load() is None
    file.save(SAVED, vector(1))
    file.forget()
    assert file.load() is None and not list(path.parent.iterdir())
    file.forget()


def test_the_same_steps_are_not_written_again(path):
    file = opened(path)
    file.save(SAVED, vector(1))
    before = path.stat().st_ino
    file.save(SAVED, vector(1))
    assert path.stat().st_ino == before
    file.save(replace(SAVED, missed=1), vector(1))
    assert path.stat().st_ino != before


def test_without_data_there_is_nothing_worth_a_write(path):
    opened(path).save(replace(SAVED, contribution=brought()), vector(1))
    assert not path.exists()


SMALL = 64  # values: every byte can be tried


def small(path, progress=OFFERED):
    opened(path, parameters=SMALL).save(progress, vector(1, SMALL))
    return path.read_bytes()


def test_a_file_cut_anywhere_or_with_more_at_its_end_is_refused(path):
    whole = small(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert opened(path, parameters=SMALL).load() is None, f"{size} of {len(whole)} bytes"
    path.write_bytes(whole + b"\0")
    assert opened(path, parameters=SMALL).load() is None


def test_a_bit_that_turned_in_any_byte_is_refused(path):
    whole = small(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert opened(path, parameters=SMALL).load() is None, f"byte {at} of {len(whole)}"
    path.write_bytes(whole)
    assert opened(path, parameters=SMALL).load() is not None


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), keep=st.integers(0, 60))
def test_bytes_of_somebody_else_are_refused(tmp_path_factory, data, keep):
    path = tmp_path_factory.mktemp("progress") / "progress"
    path.write_bytes((MAGIC + (300).to_bytes(8, "little"))[:keep] + data)
    assert opened(path, parameters=SMALL).load() is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_values_that_no_training_makes_are_refused_even_with_the_right_hash(path, value):
    values = vector(1)
    values[PARAMETERS - 2] = value
    opened(path).save(SAVED, values)
    assert opened(path).load() is None


@pytest.mark.parametrize(
    "bad",
    [
        replace(SAVED, missed=-1),
        replace(SAVED, branch=-1),
        replace(SAVED, head=Head(RoundNumber(-1), SAVED.head.hash)),
        replace(SAVED, contribution=brought(DataRange(0, SHARD, 5, 5))),
        replace(SAVED, contribution=brought(DataRange(0, "../../etc", 0, 5))),
        replace(SAVED, contribution=brought(*(span(2 * each, 2 * each + 1) for each in range(300)))),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_even_with_the_right_hash(path, bad):
    small(path, bad)
    assert path.exists() and opened(path, parameters=SMALL).load() is None


def test_the_progress_of_another_model_is_refused(path):
    small(path)
    assert opened(path, parameters=SMALL + 1).load() is None


def test_a_link_or_a_pipe_in_its_place_is_neither_followed_nor_waited_for(path, tmp_path):
    small(path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert opened(path, parameters=SMALL).load() is None
    path.unlink()
    os.mkfifo(path)
    assert opened(path, parameters=SMALL).load() is None


def test_a_link_in_the_way_of_a_save_is_not_written_through(path, tmp_path):
    (tmp_path / "precious").write_bytes(b"theirs")
    (tmp_path / "progress.new").symlink_to(tmp_path / "precious")
    opened(path, parameters=SMALL).save(SAVED, vector(1, SMALL))
    assert (tmp_path / "precious").read_bytes() == b"theirs"


def test_a_disk_without_room_keeps_the_older_file_and_is_named_once(path):
    room = True
    file = opened(path, parameters=SMALL, room=lambda size: room)
    file.save(SAVED, vector(1, SMALL))
    room = False
    with capture_logs() as said:
        for missed in (1, 2):
            file.save(replace(SAVED, missed=missed), vector(2, SMALL))
    assert [each["event"] for each in said] == ["local progress is not saved"]
    found, values = opened(path, parameters=SMALL).load()
    assert found == SAVED and np.array_equal(values, vector(1, SMALL))


def test_a_disk_that_fills_up_during_a_save_leaves_nothing_half_written(path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    file = opened(path, parameters=SMALL)
    file.save(SAVED, vector(1, SMALL))
    with monkeypatch.context() as patched:
        patched.setattr(progress_file.os, "fsync", full)
        file.save(replace(SAVED, missed=1), vector(2, SMALL))
    assert [each.name for each in path.parent.iterdir()] == ["progress"]
    assert opened(path, parameters=SMALL).load()[0] == SAVED


def test_a_file_that_says_less_than_a_round_is_told_does_not_outlive_a_failed_save(path):
    room = True
    file = opened(path, parameters=SMALL, room=lambda size: room)
    file.save(SAVED, vector(1, SMALL))
    room = False
    file.save(OFFERED, vector(2, SMALL))
    assert not list(path.parent.iterdir())


def test_a_kill_at_any_piece_of_a_save_leaves_the_old_file_or_the_new_one(path):
    """The child kills itself before its first, second … piece, its fsync and its rename, until none is left."""
    code = f"""
import itertools, os, signal, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from node import progress
from protocol import canonical
left = itertools.count(int(sys.argv[1]), -1)
def dying(real):
    def call(*given):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    return call
os.fsync, os.replace = dying(os.fsync), dying(os.replace)
pieces, go_on = progress._pieces, dying(lambda piece: piece)
progress._pieces = lambda *given: map(go_on, pieces(*given))
path = Path({str(path)!r})
file = progress.ProgressFile(path, {PARAMETERS}, room=lambda size: True, now=0.0)
saved = canonical.from_bytes(progress.Progress, {canonical.to_bytes(SAVED)!r})
file.save(replace(saved, missed=1), np.random.default_rng(2).normal(size={PARAMETERS}).astype(np.float32))
"""
    opened(path).save(SAVED, vector(1))
    outcomes = []
    while not outcomes or outcomes[-1][0]:
        child = [sys.executable, "-c", code, str(len(outcomes))]
        done = subprocess.run(child, check=False, cwd=Path(__file__).parents[2], timeout=300)
        found, values = opened(path).load()
        assert np.array_equal(values, vector(1 + found.missed))
        assert [each.name for each in path.parent.iterdir()] == ["progress"], "what the kill left is gone"
        outcomes.append((done.returncode, found.missed))
    killed = [(-signal.SIGKILL, missed) for missed in (0, 0, 0, 0, 1)]
    assert outcomes == [*killed, (0, 1)], "before two pieces, the fsync, the rename, the folder's fsync; and not at all"


# what it is worth


def entry(number, *contributions, previous=SAVED.head.hash, included=(ME, PEER)):
    part = Part(0, 0, PARAMETERS, Digest("0" * 64), 1, PEER, included)
    record = Record(
        RunId("run"), RoundNumber(number), previous, Epoch(0), PEER, contributions, (part,), Digest("1" * 64)
    )
    return LogEntry(record, Certificate(canonical.digest(record), Ballot(Epoch(0), 0), ()))


def outcome(progress, *entries, head=None, branch=0, stale_rounds=8, consumed=None):
    known = {each.record.round: each for each in entries}
    spans = [s for each in entries for c in each.record.contributions for s in c.ranges]
    if head is None:
        head = next_head(entries[-1].record) if entries else progress.head
    return resume(
        progress,
        FREE.with_ranges(spans) if consumed is None else consumed,
        known.get,
        head=head,
        branch=branch,
        stale_rounds=stale_rounds,
    )


OTHERS = brought(span(100, 200), node=PEER)


def test_a_round_that_is_still_open_is_brought_the_very_same_again():
    assert outcome(OFFERED) == Offer(MINE, 0)
    assert outcome(replace(OFFERED, missed=2)) == Offer(MINE, 2)


def test_what_no_round_has_heard_of_is_carried():
    assert outcome(SAVED) == Carry(MINE, 0, 0)


def test_what_a_record_took_is_settled_with_it():
    taken = entry(7, MINE, OTHERS)
    assert outcome(OFFERED, taken) == Settle(taken, 0)
    following = entry(8, brought(span(300, 301), node=PEER), previous=Digest("2" * 64))
    assert outcome(OFFERED, taken, following) == Settle(taken, 1), "however long ago; and it has missed what followed"


def test_what_a_round_left_out_is_carried_and_has_missed_it():
    assert outcome(OFFERED, entry(7, OTHERS, included=(PEER,))) == Carry(MINE, 1, 1)
    assert outcome(replace(SAVED, missed=2), entry(7, OTHERS, included=(PEER,))) == Carry(MINE, 3, 1)


def test_a_record_that_lists_us_but_whose_parts_leave_us_out_has_still_consumed_our_data():
    assert isinstance(outcome(OFFERED, entry(7, MINE, OTHERS, included=(PEER,))), Drop)


def test_too_many_missed_rounds_drop_it():
    later = Head(RoundNumber(10), Digest("3" * 64))
    assert outcome(SAVED, head=later, stale_rounds=3) == Carry(MINE, 3, 3)
    assert isinstance(outcome(SAVED, head=later, stale_rounds=2), Drop)
    assert isinstance(outcome(replace(SAVED, missed=1), head=later, stale_rounds=3), Drop)


@pytest.mark.parametrize("progress", [SAVED, OFFERED])
def test_data_that_counts_elsewhere_drops_the_whole(progress):
    for other in (brought(span(69, 75), node=PEER), brought(span(0, 80)), brought(span(0, 40))):
        assert isinstance(outcome(progress, entry(7, other)), Drop)
    assert isinstance(outcome(progress, consumed=FREE.with_ranges([span(10, 11)])), Drop)


def test_steps_that_a_later_snapshot_offered_are_not_settled_from_an_earlier_peek():
    """The peek holds part of what the record took, and nobody knows which part of the bytes that was."""
    assert isinstance(outcome(SAVED, entry(7, MINE)), Drop)


def test_the_records_before_a_new_base_checkpoint_are_not_needed_when_its_data_is_free():
    later = Head(RoundNumber(9), Digest("3" * 64))
    assert outcome(OFFERED, head=later) == Carry(MINE, 2, 2)
    assert isinstance(outcome(OFFERED, head=later, consumed=FREE.with_ranges(MINE.ranges)), Drop)


def test_another_branch_another_chain_and_a_log_that_is_behind_drop_it():
    assert isinstance(outcome(SAVED, branch=1), Drop)
    assert isinstance(outcome(SAVED, head=replace(SAVED.head, hash=Digest("9" * 64))), Drop)
    assert isinstance(outcome(SAVED, entry(7, OTHERS, previous=Digest("9" * 64))), Drop)
    assert isinstance(outcome(SAVED, head=Head(RoundNumber(6), Digest("6" * 64))), Drop)


# how often


def saves(size, *, took_seconds, round_seconds, hours=1):
    """When it is saved, by a daemon that looks every second and makes a snapshot at the end of each round."""
    pace, made = Pace.begin(0.0, size), []
    for now in range(1, hours * 3600):
        offered = now % round_seconds == 0
        if pace.due(now, offered=offered):
            pace = pace.saved(now, size, took_seconds=took_seconds)
            made.append((now, offered))
    return made


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(4, 1 << 40),
    took_seconds=st.floats(0, 60),
    round_seconds=st.integers(1, 2000),
)
def test_saving_stays_within_its_budget_of_time_bytes_and_number(size, took_seconds, round_seconds):
    count = len(saves(size, took_seconds=took_seconds, round_seconds=round_seconds))
    over = 2  # the one overdrawn, and the first hour's edge
    assert count <= 3600 / SPACING_SECONDS + over
    assert (count - over) * took_seconds <= 36
    assert (count - over) * size <= 3600 * BYTES_PER_SECOND_MAX


def test_a_paused_machine_is_looked_at_seldom_and_its_snapshot_is_still_saved(path):
    file = opened(path, parameters=SMALL)
    file.save(SAVED, vector(1, SMALL))
    file = opened(path, parameters=SMALL)  # as after a restart, long after the clock's zero
    file.load()
    later = time.monotonic() + 0.75 * SPACING_SECONDS
    assert file.due(later, offered=False)
    file.save(SAVED, vector(1, SMALL))
    assert not file.due(later, offered=False) and file.due(later, offered=True)


@pytest.mark.parametrize("round_seconds", [20, 30, 60, 61, 300])
def test_every_snapshot_of_a_small_model_is_saved_when_rounds_are_no_shorter_than_the_spacing(round_seconds):
    made = [now for now, offered in saves(4_000_000, took_seconds=0.05, round_seconds=round_seconds) if offered]
    assert made == list(range(round_seconds, 3600, round_seconds))


def test_between_snapshots_of_long_rounds_it_is_saved_at_the_spacing():
    made = [now for now, _ in saves(4_000_000, took_seconds=0.05, round_seconds=1800)]
    assert max(after - before for before, after in pairwise(made)) <= 2 * SPACING_SECONDS
    assert len(made) == pytest.approx(3600 / SPACING_SECONDS, abs=3)


def test_a_large_model_is_saved_seldom():
    assert len(saves(400_000_000, took_seconds=1.0, round_seconds=600)) <= 11
    assert len(saves(4_000_000_000, took_seconds=10.0, round_seconds=3000)) <= 2
