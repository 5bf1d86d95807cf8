"""The pseudo-gradient: what is sent, what stays, what moves."""

import numpy as np
import pytest

from node.pseudograd import PseudoGradient
from protocol.codec import codec
from protocol.limits import CHUNK_VALUES
from protocol.types import Digest, NodeId, Part

SIZE = 2 * CHUNK_VALUES
INT4 = codec("int4")


def made(*, decay=1.0, stale_rounds=8):
    rng = np.random.default_rng(7)
    shared = rng.normal(size=SIZE).astype(np.float32)
    snapshot = shared - rng.normal(scale=1e-3, size=SIZE).astype(np.float32)
    return PseudoGradient(shared, snapshot, INT4, residual_decay=decay, stale_rounds=stale_rounds), shared, snapshot


def part(start, stop):
    return Part(0, start, stop, Digest("0" * 64), 1, NodeId("me"), (NodeId("me"),))


def test_what_compression_leaves_out_is_kept():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    sent = INT4.decode(gradient.payload, SIZE)
    gradient.settle([part(0, SIZE)])
    assert np.array_equal(gradient.residual, (shared - snapshot) - sent)
    assert 0 < np.abs(gradient.residual).max() < np.abs(sent).max() / 5


def test_a_slice_that_no_part_took_stays_whole():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    gradient.settle([part(0, CHUNK_VALUES)])
    assert np.array_equal(gradient.residual[CHUNK_VALUES:], (shared - snapshot)[CHUNK_VALUES:])


def test_a_round_without_us_leaves_everything_and_its_encoding():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    payload = gradient.payload
    gradient.settle([])
    assert np.array_equal(gradient.residual, shared - snapshot) and gradient.payload == payload
    assert not gradient.pending


def test_a_second_snapshot_in_a_round_replaces_the_first():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    gradient.expect_snapshot()
    snapshot -= np.float32(1e-3)  # the trainer went on
    gradient.take_snapshot()
    assert np.allclose(gradient.residual, shared - snapshot, atol=1e-6)


def test_without_a_snapshot_the_trainer_moves_by_what_the_fold_moves():
    gradient, shared, snapshot = made()
    gradient.before_fold()
    assert np.array_equal(snapshot, shared)
    gradient.take_snapshot()
    snapshot -= np.float32(1)
    gradient.before_fold()
    assert not np.array_equal(snapshot, shared), "a pending snapshot is where the trainer's steps begin"


def test_a_restarted_trainer_has_nothing_of_an_older_snapshot():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    gradient.trainer_restarted()
    gradient.expect_snapshot()
    assert np.array_equal(gradient.residual, shared - snapshot), "the old trainer's work still waits for a round"


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_residual_decays_by_the_run_files_share(decay):
    gradient, shared, snapshot = made(decay=decay)
    gradient.take_snapshot()
    left = (shared - snapshot) - INT4.decode(gradient.payload, SIZE)
    gradient.settle([part(0, SIZE)])
    assert np.array_equal(gradient.residual, left * np.float32(decay))


def test_everything_sent_over_many_rounds_adds_up_to_everything_trained():
    gradient, shared, snapshot = made()
    total, trained = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    for seed in range(30):
        step = np.random.default_rng(seed).normal(scale=1e-3, size=SIZE).astype(np.float32)
        snapshot[:] = shared - step
        trained += step
        gradient.take_snapshot()
        total += INT4.decode(gradient.payload, SIZE)
        gradient.settle([part(0, SIZE)])
    assert np.abs(trained - total - gradient.residual).max() < 1e-5


def test_what_missed_rounds_leave_is_whole_then_halves_then_is_dropped():
    gradient, shared, snapshot = made(stale_rounds=4)
    gradient.take_snapshot()
    trained = shared - snapshot
    for missed, weight in ((1, 1), (2, 1 / 2), (3, 1 / 4), (4, 1 / 8), (5, 0)):
        gradient.settle([], missed=missed)
        assert np.array_equal(gradient.residual, trained * np.float32(weight))
    assert gradient.payload == b""


def test_with_one_stale_round_the_second_missed_one_drops_everything():
    gradient, shared, snapshot = made(stale_rounds=1)
    gradient.take_snapshot()
    gradient.settle([], missed=1)
    assert np.array_equal(gradient.residual, shared - snapshot)
    gradient.settle([], missed=2)
    assert not gradient.residual.any()


def test_a_halved_pseudo_gradient_is_never_sent_at_its_former_size():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    gradient.settle([], missed=2)
    assert gradient.payload == b""
    gradient.encode()
    half = gradient.residual.copy()
    assert np.abs(INT4.decode(gradient.payload, SIZE) - half).max() < np.abs(half).max() / 5


@pytest.mark.parametrize(("missed", "weight"), [(0, 1), (1, 1), (2, 1 / 2), (8, 1 / 2), (9, 0)])
def test_a_snapshot_after_missed_rounds_adds_its_own_steps_and_takes_out_none(missed, weight):
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    before = shared - snapshot
    assert gradient.pending
    gradient.before_fold()
    shared += np.float32(0.5)  # the fold moves the shared state; the trainer merges from the snapshot, and goes on
    gradient.settle([], missed=missed)
    assert not gradient.pending
    gradient.expect_snapshot()
    snapshot[:] = shared - np.float32(0.25)
    gradient.take_snapshot()
    assert np.allclose(gradient.residual, before * np.float32(weight) + np.float32(0.25), atol=1e-6)
    gradient.expect_snapshot()  # now one is pending again, whole: taking it out leaves what the missed rounds left
    assert np.allclose(gradient.residual, before * np.float32(weight), atol=1e-6)


def test_everything_trained_is_sent_or_held_or_lost_by_the_rule_over_many_missed_and_taken_rounds():
    gradient, shared, snapshot = made(stale_rounds=3)
    luck, missed, held = np.random.default_rng(1), 0, np.zeros(SIZE, np.float32)
    for _ in range(40):
        step = luck.normal(scale=1e-3, size=SIZE).astype(np.float32)
        gradient.expect_snapshot()
        snapshot[:] = shared - step
        gradient.take_snapshot()
        held += step
        if luck.random() < 0.3:
            held -= INT4.decode(gradient.payload, SIZE)
            gradient.settle([part(0, SIZE)])
            missed = 0
        else:
            missed += 1
            held *= np.float32(1 if missed == 1 else 1 / 2 if missed <= 3 else 0)
            gradient.settle([], missed=missed)
        assert np.abs(gradient.residual - held).max() < 1e-5


def test_a_node_that_forgets_holds_nothing_back():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    gradient.forget()
    assert not gradient.residual.any() and gradient.payload == b"" and not gradient.pending
    gradient.expect_snapshot()
    assert not gradient.residual.any(), "the snapshot that was forgotten is not taken out again"


def test_what_an_earlier_life_saved_waits_for_a_round_beside_what_is_new():
    gradient, shared, snapshot = made()
    gradient.take_snapshot()
    saved = gradient.residual.copy()
    again, shared, snapshot = made()
    again.load(saved)
    saved[:] = 0
    again.expect_snapshot()
    snapshot[:] = shared - np.float32(0.25)
    again.take_snapshot()
    assert np.allclose(again.residual, gradient.residual + np.float32(0.25), atol=1e-6)
    assert again.residual is not saved
