"""How fast a node may send: never more than its owner allows, and no slower than need be."""

from hypothesis import given
from hypothesis import strategies as st

from node.core.pace import BURST_SECONDS, Bucket


def test_after_a_silence_a_letter_goes_at_once_and_a_flood_waits_its_turn():
    bucket, wait = Bucket(1000.0, at=0.0).take(100, 100.0)
    assert wait == 0
    bucket, wait = bucket.take(1900, 100.0)
    assert wait == 1.0
    assert bucket.take(500, 100.0)[1] == 1.5, "behind what was promised before"
    assert bucket.take(500, 102.0)[1] == 0


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=40))
def test_no_stretch_of_time_sees_more_than_the_rate_and_one_burst(sends):
    rate, now, bucket, gone = 1000.0, 10.0, Bucket(1000.0), []
    for size, pause in sends:
        now += pause
        bucket, wait = bucket.take(size, now)
        gone.append((now + wait, size))
    for first in range(len(gone)):
        for last in range(first + 1, len(gone)):
            sent = sum(size for _, size in gone[first + 1 : last + 1])
            assert sent <= rate * (gone[last][0] - gone[first][0] + BURST_SECONDS) + 1e-6


@given(st.integers(1, 10**6))
def test_a_steady_sender_gets_the_whole_rate(size):
    bucket, now = Bucket(1000.0), 0.0
    for _ in range(50):
        bucket, wait = bucket.take(size, now)
        now += wait
    assert now <= 50 * size / 1000.0 + 1e-6
