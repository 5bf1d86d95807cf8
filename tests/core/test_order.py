"""The order of a shard's sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.order import sequence_at


@given(sequences=st.integers(1, 500), pass_number=st.integers(0, 50))
def test_every_sequence_has_exactly_one_position_in_each_pass(sequences, pass_number):
    found = [sequence_at(i, sequences=sequences, pass_number=pass_number) for i in range(sequences)]
    assert sorted(found) == list(range(sequences))


@pytest.mark.parametrize("pass_number", range(4))
def test_a_batch_is_spread_over_the_whole_shard(pass_number):
    batch = [sequence_at(i, sequences=32_000, pass_number=pass_number) for i in range(16)]
    assert min(abs(a - b) for i, a in enumerate(batch) for b in batch[:i]) > 32_000 / 100


def test_each_pass_has_another_order():
    first, second = ([sequence_at(i, sequences=1000, pass_number=p) for i in range(1000)] for p in (0, 1))
    assert first != second
