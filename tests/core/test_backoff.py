"""How long to wait before trying again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.core.backoff import FIRST_SECONDS, LONGEST_SECONDS, wait_seconds


@given(st.integers(0, 10**9), st.floats(0, 1, exclude_max=True))
def test_no_wait_is_longer_than_the_longest_or_next_to_nothing(failures, luck):
    assert FIRST_SECONDS / 4 <= wait_seconds(failures=failures, luck=luck) <= LONGEST_SECONDS


@given(st.integers(0, 50), st.floats(0, 1, exclude_max=True))
def test_each_failure_doubles_the_wait_until_it_is_the_longest(failures, luck):
    longest = wait_seconds(failures=60, luck=luck)
    now, later = (wait_seconds(failures=failures + more, luck=luck) for more in (0, 1))
    assert later == min(2 * now, longest)


def test_luck_spreads_those_who_failed_together():
    assert wait_seconds(failures=9, luck=0.0) == LONGEST_SECONDS / 4
    assert wait_seconds(failures=9, luck=0.999) > 0.99 * LONGEST_SECONDS
