"""Codecs: exact sizes, one quantisation, hostile bytes refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol.codec import BLOCK_VALUES, NAMES, SPARSE_VALUES, codec
from protocol.errors import Code, Refused
from protocol.limits import CHUNK_VALUES

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tiny = st.floats(min_value=-(2.0**-16), max_value=2.0**-16, width=32)  # where fp16 scales are subnormal
vectors = hnp.arrays(np.float32, st.integers(0, 200), elements=st.one_of(finite, tiny, st.just(0.0)))


def spread(values, seed=0):
    """Values of every magnitude that float32 has, from block to block."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.uniform(-149, 120, -(-values // BLOCK_VALUES))).repeat(BLOCK_VALUES)[:values]
    with np.errstate(all="ignore"):
        return (rng.standard_normal(values) * scale).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(values=vectors)
def test_encoding_what_was_decoded_gives_the_same_bytes(name, values):
    chosen = codec(name)
    encoded = chosen.encode(values)
    assert len(encoded) == chosen.encoded_bytes(values.size)
    decoded = chosen.decode(encoded, values.size)
    assert np.isfinite(decoded).all()
    assert chosen.encode(decoded) == encoded
    assert chosen.decode(chosen.encode(decoded), values.size).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [1, 63, 64, 65, CHUNK_VALUES - 1, CHUNK_VALUES, 3 * CHUNK_VALUES + 777])
def test_encoding_is_idempotent_over_every_magnitude_and_partial_chunk(name, values):
    chosen = codec(name)
    original = spread(values)
    encoded = chosen.encode(original)
    assert chosen.encode(chosen.decode(encoded, values)) == encoded


def test_every_small_scale_survives_encoding_again():
    """All peaks whose int4 and int8 scales are among the first few hundred fp16 subnormals."""
    peaks = (np.arange(1, 40_000) * 2.0**-27).astype(np.float32)
    values = np.zeros((peaks.size, BLOCK_VALUES), np.float32)
    values[:, 0], values[:, 1] = peaks, -peaks / 3
    flat = values.reshape(-1)
    for name in ("int4", "int8"):
        encoded = codec(name).encode(flat)
        assert codec(name).encode(codec(name).decode(encoded, flat.size)) == encoded


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(values=hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-65000, 65000, width=32)))
def test_a_decoded_value_is_within_the_stated_error(name, values):
    chosen = codec(name)
    decoded = chosen.decode(chosen.encode(values), values.size).astype(np.float64)
    width = SPARSE_VALUES if name == "sparse2" else BLOCK_VALUES
    for start in range(0, values.size, width):
        block = slice(start, start + width)
        peak = float(np.abs(values[block]).max())
        assert np.abs(decoded[block] - values[block]).max() <= chosen.error_max(peak)


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_at_chunk_boundaries_is_the_encoding_of_that_slice(name):
    chosen = codec(name)
    values = spread(3 * CHUNK_VALUES + 100)
    encoded = chosen.encode(values)
    for start, stop in ((0, 1), (1, 3), (2, 4)):
        low, high = start * CHUNK_VALUES, min(stop * CHUNK_VALUES, values.size)
        begin = chosen.encoded_bytes(low)
        part = encoded[begin : begin + chosen.encoded_bytes(high - low)]
        assert part == chosen.encode(values[low:high])
        assert chosen.decode(part, high - low).tobytes() == chosen.decode(encoded, values.size)[low:high].tobytes()


def test_int4_costs_four_and_a_quarter_bits_and_int8_eight_and_a_quarter():
    for name in NAMES:
        assert codec(name).encoded_bytes(10 * CHUNK_VALUES) * 8 == codec(name).bits * 10 * CHUNK_VALUES
    assert codec("int4").bits == 4.25
    assert codec("int8").bits == 8.25


def test_codes_and_scales_are_those_of_the_layout():
    values = np.zeros(BLOCK_VALUES, np.float32)
    values[:4] = [7, -7, 3, 0.4]
    assert codec("int4").encode(values) == np.float16(1).tobytes() + bytes([0x1F, 0x8B]) + b"\x88" * 30
    values[:4] = [127, -127, 3, 0.4]
    assert (
        codec("int8").encode(values) == np.float16(1).tobytes() + np.array([127, -127, 3] + [0] * 61, np.int8).tobytes()
    )


@pytest.mark.parametrize("name", NAMES)
def test_zero_blocks_decode_to_zero_exactly(name):
    values = spread(3 * BLOCK_VALUES)
    values[BLOCK_VALUES : 2 * BLOCK_VALUES] = 0
    decoded = codec(name).decode(codec(name).encode(values), values.size)
    assert decoded[BLOCK_VALUES : 2 * BLOCK_VALUES].tobytes() == bytes(4 * BLOCK_VALUES)


@pytest.mark.parametrize("name", NAMES)
def test_values_beyond_the_range_are_cut_and_never_become_infinite(name):
    values = np.zeros(128, np.float32)  # of which sparse2 keeps two
    values[:4] = [3e38, -3e38, 1.0, 65520.0]
    decoded = codec(name).decode(codec(name).encode(values), 128)
    assert np.isfinite(decoded).all()
    assert decoded[0] == -decoded[1] >= 65504


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 64, CHUNK_VALUES, CHUNK_VALUES + 4])
def test_a_value_that_is_not_finite_is_refused_before_encoding(name, bad, place):
    values = np.ones(CHUNK_VALUES + 5, np.float32)
    values[place] = bad
    with pytest.raises(Refused) as refused:
        codec(name).encode(values)
    assert refused.value.reason is Code.UPDATE_BAD


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [-1, 1, 33])
def test_a_wrong_length_is_refused_before_anything_is_allocated(name, change):
    encoded = codec(name).encode(np.ones(100, np.float32))
    wrong = encoded[:change] if change < 0 else encoded + bytes(change)
    for use in (codec(name).decode, codec(name).check):
        with pytest.raises(Refused, match="expected"):
            use(wrong, 100)
        with pytest.raises(Refused, match="expected"):
            use(encoded, 10**12)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -0.0])
def test_a_hostile_scale_is_refused(name, scale):
    values = CHUNK_VALUES + 70
    encoded = bytearray(codec(name).encode(np.ones(values, np.float32)))
    last = codec(name).encoded_bytes(CHUNK_VALUES) + 2
    encoded[last : last + 2] = np.float16(scale).tobytes()
    for use in (codec(name).decode, codec(name).check):
        with pytest.raises(Refused, match="scale"):
            use(encoded, values)


@pytest.mark.parametrize(("name", "code"), [("int4", 0x80), ("int4", 0x08), ("int8", 0x80)])
def test_a_code_that_encoding_never_writes_is_refused(name, code):
    encoded = bytearray(codec(name).encode(np.ones(70, np.float32)))
    encoded[-1] = code
    with pytest.raises(Refused, match="code"):
        codec(name).check(encoded, 70)


def test_a_half_byte_after_the_last_value_must_be_empty():
    encoded = bytearray(codec("int4").encode(np.ones(3, np.float32)))
    encoded[-1] = 0x9F
    with pytest.raises(Refused, match="after its last"):
        codec("int4").decode(encoded, 3)


def test_an_infinite_half_is_refused():
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(Refused, match="NaN or infinity"):
            codec("fp16").decode(np.array([1, bad], np.float16).tobytes(), 2)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), values=st.integers(1, 130))
def test_any_bytes_are_refused_or_decode_to_finite_values(name, data, values):
    size = codec(name).encoded_bytes(values)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded = codec(name).decode(raw, values)
    except Refused as refused:
        assert refused.reason is Code.UPDATE_BAD
    else:
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_reads_and_writes_at_any_alignment(name):
    values = spread(CHUNK_VALUES + 130)
    encoded = codec(name).encode(values)
    shifted = memoryview(b"\0" + encoded)[1:]
    room = np.zeros(values.size + 1, np.float32)
    codec(name).decode_into(shifted, room[1:])
    assert room[0] == 0
    assert room[1:].tobytes() == codec(name).decode(encoded, values.size).tobytes()
