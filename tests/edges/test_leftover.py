"""What a reducer's encoding left out is neither lost nor counted twice."""

import numpy as np
import pytest

from node.leftover import Leftover, encode
from protocol.codec import codec
from protocol.limits import CHUNK_VALUES

SPARSE = codec("sparse2")
N = CHUNK_VALUES + 5000


def vector(seed):
    return np.random.default_rng(seed).standard_normal(N).astype(np.float32)


@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_what_is_sent_and_what_is_left_is_the_mean_and_what_was_left_before(decay):
    before = Leftover(0, vector(1))
    data, left = encode(vector(0), 0, SPARSE, before, decay)
    whole = SPARSE.decode(data, N) + left / np.float32(decay)
    assert np.allclose(whole, vector(0) + vector(1), atol=1e-5)


def test_what_is_too_small_to_be_sent_is_sent_in_the_end():
    """Always the same mean: after many rounds what was sent of each value comes near to what there was of it."""
    mean, before, sent = vector(0), None, np.zeros(N, np.float32)
    for _ in range(400):
        data, left = encode(mean.copy(), 0, SPARSE, before, 1.0)
        sent += SPARSE.decode(data, N)
        before = Leftover(0, left)
    assert np.abs(sent / 400 - mean).mean() < 0.25 * np.abs(mean).mean()
    alone = SPARSE.decode(SPARSE.encode(mean), N)
    assert np.abs(alone - mean).mean() > 0.8 * np.abs(mean).mean()


@pytest.mark.parametrize(
    ("left_from", "span_from", "both"),
    [(0, 0, (0, 10)), (0, 4, (4, 10)), (4, 0, (4, 10)), (0, 10, (0, 0)), (10, 0, (0, 0))],
)
def test_of_a_span_that_moved_the_values_that_both_hold_are_added(left_from, span_from, both):
    mean = np.zeros(10, np.float32)
    Leftover(left_from, np.ones(10, np.float32)).add_to(mean, span_from)
    wanted = np.zeros(30, np.float32)
    wanted[both[0] : both[1]] = 1
    assert (mean == wanted[span_from : span_from + 10]).all()


def test_a_shorter_leftover_lies_within_a_longer_span():
    mean = np.zeros(10, np.float32)
    Leftover(3, np.ones(2, np.float32)).add_to(mean, 0)
    assert mean.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
