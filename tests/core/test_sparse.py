"""sparse2: what it keeps, its layout to the bit, hostile blocks, and error feedback."""

import numpy as np
import pytest

from protocol.codec import SPARSE_VALUES, codec
from protocol.errors import Code, Refused
from protocol.limits import CHUNK_VALUES

SPARSE = codec("sparse2")
BLOCK_BYTES = 84
LEVELS, HIGHS, LOWS = 0, 4, 20  # where these begin in a block of 4096


def noise(values, seed=0):
    return np.random.default_rng(seed).standard_normal(values).astype(np.float32)


def block_of(change):
    """One encoded block, with some of its bytes changed."""
    encoded = bytearray(SPARSE.encode(noise(SPARSE_VALUES)))
    change(encoded)
    return bytes(encoded)


def test_a_parameter_costs_at_most_0_022_bytes():
    """The goal; 12 bits for each position would take 0.0283 with these magnitudes, their entropy 0.0193."""
    assert SPARSE.encoded_bytes(SPARSE_VALUES) == BLOCK_BYTES
    assert SPARSE.encoded_bytes(10 * CHUNK_VALUES) / (10 * CHUNK_VALUES) <= 0.022
    assert SPARSE.encoded_bytes(1) == SPARSE.encoded_bytes(256) == 9
    assert SPARSE.encoded_bytes(257) == 14


def test_the_largest_of_each_block_are_kept_with_their_signs():
    values = noise(3 * SPARSE_VALUES)
    decoded = SPARSE.decode(SPARSE.encode(values), values.size)
    for start in range(0, values.size, SPARSE_VALUES):
        block = slice(start, start + SPARSE_VALUES)
        largest = np.sort(np.argsort(np.abs(values[block]))[-64:])
        assert np.flatnonzero(decoded[block]).tolist() == largest.tolist()
        assert (np.sign(decoded[block][largest]) == np.sign(values[block][largest])).all()
        assert len(np.unique(np.abs(decoded[block][largest]))) == 2


def test_the_two_magnitudes_are_the_means_of_those_that_they_stand_for():
    values = np.zeros(SPARSE_VALUES, np.float32)
    values[10:74] = [1, -2] * 16 + [10, -12] * 16
    decoded = SPARSE.decode(SPARSE.encode(values), values.size)
    assert decoded[10:74].tolist() == [1.5, -1.5] * 16 + [11, -11] * 16
    assert not decoded[:10].any() and not decoded[74:].any()


def test_a_block_is_written_as_the_layout_says():
    values = np.zeros(256, np.float32)  # of which four are kept
    values[[3, 64, 130, 255]] = [8, -1, 1, -8]
    levels = np.array([1, 8], np.float16).tobytes()
    highs = bytes([1 << 0 | 1 << 2 | 1 << 4 | 1 << 6])  # bit p // 64 + i
    lows = (3 | 0 << 6 | 2 << 12 | 63 << 18).to_bytes(3, "little")
    codes = bytes([2 | 1 << 2 | 0 << 4 | 3 << 6])
    assert SPARSE.encode(values) == levels + highs + lows + codes


def test_of_equal_magnitudes_the_first_are_kept():
    decoded = SPARSE.decode(SPARSE.encode(np.full(SPARSE_VALUES, -0.5, np.float32)), SPARSE_VALUES)
    assert np.flatnonzero(decoded).tolist() == list(range(64))
    assert set(decoded[:64].tolist()) == {-0.5}


def test_what_is_too_small_for_fp16_counts_as_zero():
    values = np.full(SPARSE_VALUES, 1e-9, np.float32)
    values[-3:] = 2.0
    encoded = SPARSE.encode(values)
    decoded = SPARSE.decode(encoded, values.size)
    assert decoded[-3:].tolist() == [2.0] * 3
    assert SPARSE.encode(decoded) == encoded


def test_a_block_of_zeros_decodes_to_zeros():
    encoded = SPARSE.encode(np.zeros(SPARSE_VALUES + 5, np.float32))
    assert not SPARSE.decode(encoded, SPARSE_VALUES + 5).any()


@pytest.mark.parametrize("values", [1, 63, 65, 300, SPARSE_VALUES - 1, SPARSE_VALUES + 1])
def test_a_short_block_keeps_one_in_64_and_nothing_after_its_end(values):
    original = noise(values)
    decoded = SPARSE.decode(SPARSE.encode(original), values)
    rest = values % SPARSE_VALUES
    assert np.count_nonzero(decoded[values - rest :]) == -(-rest // 64)


def set_bytes(at, data):
    def change(encoded):
        encoded[at : at + len(data)] = data

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (set_bytes(LEVELS, np.float16(-1).tobytes()), "magnitudes"),
        (set_bytes(LEVELS + 2, np.float16(np.inf).tobytes()), "magnitudes"),
        (set_bytes(LEVELS, np.float16(np.nan).tobytes()), "magnitudes"),
        (set_bytes(LEVELS, np.array([2, 1], np.float16).tobytes()), "magnitudes"),
        (set_bytes(HIGHS, bytes(16)), "without 64 positions"),
        (set_bytes(HIGHS, b"\xff" * 16), "without 64 positions"),
        (set_bytes(HIGHS, b"\xff" * 8 + bytes(8)), "do not rise"),  # all in the first 64, some of them twice
    ],
)
def test_a_hostile_block_is_refused(change, why):
    data = block_of(change)
    for use in (SPARSE.decode, SPARSE.check):
        with pytest.raises(Refused, match=why) as refused:
            use(data, SPARSE_VALUES)
        assert refused.value.reason is Code.UPDATE_BAD


def test_positions_and_bits_after_the_last_value_are_refused():
    encoded = bytearray(SPARSE.encode(np.ones(70, np.float32)))  # two are kept; bytes: 4, 1, 3, 1
    for at, byte in ((5, 0xC0), (8, 0xF0)):
        spoiled = bytearray(encoded)
        spoiled[at + (at == 5)] |= byte
        with pytest.raises(Refused):
            SPARSE.check(spoiled, 70)
    beyond = np.zeros(128, np.float32)
    beyond[[0, 100]] = 1
    with pytest.raises(Refused, match="after its last"):
        SPARSE.check(SPARSE.encode(beyond), 70)


def test_what_was_left_out_gets_through_by_error_feedback():
    """Sent again and again with what was left, one vector arrives as a whole (Karimireddy et al., arXiv 1901.09847)."""
    goal = noise(SPARSE_VALUES)
    residual, arrived = np.zeros_like(goal), np.zeros_like(goal)
    errors = []
    for _ in range(400):
        residual += goal
        sent = SPARSE.decode(SPARSE.encode(residual), goal.size)
        residual -= sent
        arrived += sent
        errors.append(float(np.linalg.norm(arrived / (len(errors) + 1) - goal) / np.linalg.norm(goal)))
    assert errors[0] > 0.9
    assert errors[-1] < 0.25
