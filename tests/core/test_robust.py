"""The robust rules: what each makes of honest contributions and of spoilt ones, and that its bits are the same everywhere."""

import hashlib
import math

import numpy as np
import pytest

from protocol.codec import NAMES, codec
from protocol.limits import CHUNK_VALUES as CHUNK
from protocol.robust import Rule, means, shares

P = 2 * CHUNK + 300
HALF, INT4 = codec("fp16"), codec("int4")
ROBUST = (Rule.CLIP, Rule.TRIMMED, Rule.CENTERED)


def vector(seed, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(P) * scale).astype(np.float32)


def whole(rule, vectors, tokens=None, how=HALF):
    """The mean under a rule, in one piece."""
    encoded = [how.encode(np.asarray(each, np.float32)) for each in vectors]
    mean = np.full(P, np.nan, np.float32)
    for start, chunk in means(rule, how, encoded, tokens or [1] * len(encoded), P):
        mean[start : start + chunk.size] = chunk
    return mean


def length(values):
    return float(np.linalg.norm(values.astype(np.float64)))


def honest(count, spread=0.5):
    """Contributions that agree as far as those of one round do, and what they agree on."""
    common = vector(99)
    return [common + vector(seed, spread) for seed in range(count)], common


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [1, 63, 64, 65, 4095, 4097, CHUNK, CHUNK + 1, P])
def test_the_sum_of_squares_is_that_of_the_decoded_values(name, values):
    how = codec(name)
    for scale in (1e-3, 6e4):
        data = how.encode(vector(3, scale)[:values])
        wanted = math.fsum(np.square(how.decode(data, values).astype(np.float64)))
        assert how.squares(data, values) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_mean_is_weighted_by_tokens_in_float32(name):
    how, tokens = codec(name), [100, 300, 50]
    vectors = [vector(seed) for seed in range(3)]
    wanted = np.zeros(P, np.float32)
    for each, weight in zip(vectors, tokens, strict=True):
        wanted += how.decode(how.encode(each), P) * np.float32(weight / 450)
    assert whole(Rule.MEAN, vectors, tokens, how).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_clip_leaves_contributions_of_one_length_as_they_are(name):
    how = codec(name)
    vectors = [vector(1), -vector(1), vector(1)]
    assert whole(Rule.CLIP, vectors, [5, 7, 9], how).tobytes() == whole(Rule.MEAN, vectors, [5, 7, 9], how).tobytes()


def test_clip_keeps_the_direction_of_what_is_too_long():
    vectors, _ = honest(3)
    spoilt = whole(Rule.CLIP, [vectors[0] * 100, *vectors[1:]])
    decoded = [HALF.decode(HALF.encode(each), P) for each in (vectors[0] * 100, *vectors[1:])]
    median = sorted(map(length, decoded))[1]
    wanted = sum(each * min(1, median / length(each)) for each in decoded) / 3
    np.testing.assert_allclose(spoilt, wanted, rtol=1e-4, atol=1e-5)


def test_a_length_that_grows_with_its_tokens_is_not_clipped():
    assert shares([1.0, 2.0, 4.0, 8.0], [10, 20, 40, 80]) == [1.0] * 4
    assert shares([1.0, 1.4, 2.0, 2.8], [10, 20, 40, 80]) == [1.0] * 4
    assert shares([0.0, 0.0, 0.0], [10, 20, 40]) == [1.0] * 3


def test_what_is_longer_than_its_tokens_allow_is_cut_to_that():
    assert shares([1.0, 1.0, 100.0], [10, 10, 10]) == [1.0, 1.0, 0.01]
    assert shares([1.0, 1.0, 100.0], [10, 10, 20]) == [1.0, 1.0, 0.02]
    assert shares([1.0, 1.0, 100.0], [10, 10, 1]) == [1.0, 1.0, 0.01], "few tokens are no way to a longer one"


def test_of_two_the_longer_is_cut_to_the_shorter():
    assert shares([3.0, 300.0], [10, 10]) == [1.0, 0.01]
    assert shares([300.0], [10]) == [1.0]


@pytest.mark.parametrize("rule", Rule)
def test_whoever_is_alone_gets_back_what_it_brought(rule):
    assert whole(rule, [vector(1)], how=INT4).tobytes() == INT4.decode(INT4.encode(vector(1)), P).tobytes()


ATTACKS = {
    "times 100": lambda mean: mean * 100,
    "as large as the codec goes": lambda mean: np.full(P, 6e4),
    "sign flip times 10": lambda mean: mean * -10,
    "random": lambda mean: vector(77, 50),
}


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("attack", ATTACKS)
def test_two_of_eight_cannot_take_the_mean_far(rule, attack):
    """A plain mean is hundreds of honest lengths away where they shout; a robust one stays within one, on its way."""
    vectors, common = honest(6)
    bad = ATTACKS[attack](common)
    got = whole(rule, [bad, *vectors, bad])
    assert length(got - common) < 0.75 * length(common)
    assert float(np.vdot(got, common)) > 0.5 * length(common) ** 2 * (0.8 if rule is Rule.CLIP else 1)
    assert length(whole(Rule.MEAN, [bad, *vectors, bad]) - common) > 2 * length(common)


@pytest.mark.parametrize("rule", ROBUST)
def test_honest_contributions_of_unequal_tokens_are_averaged_nearly_as_before(rule):
    vectors, common = honest(8)
    tokens = [1000, 900, 1100, 1000, 500, 1000, 950, 1050]
    vectors[4] = common * 0.5 + vector(4, 0.35)
    plain, robust = whole(Rule.MEAN, vectors, tokens), whole(rule, vectors, tokens)
    assert length(robust - plain) < 0.12 * length(plain)


def test_trimmed_is_the_mean_by_tokens_of_what_is_left_of_each_value():
    vectors, tokens = [vector(seed) for seed in range(5)], [10, 20, 30, 40, 50]
    vectors[1][:100] = vectors[2][:100] = vectors[3][:100] = 1.0  # equal: the first are the lesser
    decoded = np.stack([HALF.decode(HALF.encode(each), P) for each in vectors]).astype(np.float64)
    order = np.argsort(decoded, axis=0, kind="stable")[2:3]
    wanted = np.take_along_axis(decoded, order, axis=0)[0]
    np.testing.assert_allclose(whole(Rule.TRIMMED, vectors, tokens), wanted, rtol=1e-6)
    four = decoded[:4]
    order = np.argsort(four, axis=0, kind="stable")[1:3]
    kept, heavy = np.take_along_axis(four, order, axis=0), np.array(tokens[:4], np.float64)[order]
    np.testing.assert_allclose(
        whole(Rule.TRIMMED, vectors[:4], tokens[:4]), (kept * heavy).sum(0) / heavy.sum(0), rtol=1e-6
    )


def test_below_three_members_single_values_have_no_majority_and_lengths_decide():
    pair = [vector(1), vector(2, 100)]
    for rule in (Rule.TRIMMED, Rule.CENTERED):
        assert whole(rule, pair).tobytes() == whole(Rule.CLIP, pair).tobytes()


def test_what_was_zeros_all_along_stays_zero():
    for rule in Rule:
        assert not whole(rule, [np.zeros(P)] * 4, how=INT4).any()


BITS = {
    "mean": "c1afb9ab3521c11a",
    "clip": "7cf88778eace7f6d",
    "trimmed": "fbc1e99c326101ed",
    "centered": "979816c7b48e5ef0",
}


@pytest.mark.parametrize("rule", Rule)
def test_the_bits_are_the_same_on_every_machine(rule):
    """A machine that adds in another order, or fuses, gets other digests."""
    counting = np.arange(P, dtype=np.int64)
    vectors = [((counting * (7 + 2 * index) % 1009) - 504 - 50 * index).astype(np.float32) / 512 for index in range(5)]
    vectors[2] *= 5
    encoded = [INT4.encode(each) for each in vectors]
    hashed = hashlib.sha256()
    for _, chunk in means(rule, INT4, encoded, [7, 11, 13, 17, 100], P):
        hashed.update(chunk.tobytes())
    assert hashed.hexdigest()[:16] == BITS[rule.value]
