"""The pseudo-gradient: what is sent, what stays, what moves."""

import numpy as np
import pytest

from node.pseudograd import PseudoGradient
from protocol.codec import codec
from protocol.limits import CHUNK_VALUES
from protocol.types import Digest, NodeId, Part

SIZE = 2 * CHUNK_VALUES
INT4 = codec("int4")


def made(*, decay=1.0):
    rng = np.random.default_rng(7)
    shared = rng.normal(size=SIZE).astype(np.float32)
    snapshot = shared - rng.normal(scale=1e-3, size=SIZE).astype(np.float32)
    return PseudoGradient(shared, snapshot, INT4, residual_decay=decay), shared, snapshot


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
