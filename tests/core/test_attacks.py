"""The attack bench's own claims: what it says is refused, is; what attackers make is what it says."""

import numpy as np
import pytest

from protocol.codec import codec
from protocol.errors import Refused
from tests.attacks import attackers, refused
from tests.attacks.swarm import Scene, Setting

HONEST = [np.random.default_rng(seed).standard_normal(4096).astype(np.float32) + 1 for seed in range(6)]
INT4 = codec("int4")


def scene(own=HONEST[0]):
    before = [INT4.encode(each) for each in HONEST]
    return Scene(Setting(), 3, np.random.default_rng(99), own, HONEST, before, {}, 2)


def test_every_attack_on_the_protocol_is_refused():
    answers = dict(refused.all_of())
    assert len(answers) >= 8
    assert all(answer.startswith("refused: ") for answer in answers.values()), answers


def made(attack):
    return INT4.decode(attack(scene()), 4096)


def test_attackers_make_what_their_names_say():
    mean, deviation = np.mean(HONEST, axis=0), np.std(HONEST, axis=0)
    close = {"atol": 0.6}  # of one contribution of int4
    np.testing.assert_allclose(made(attackers.sign_flip), -HONEST[0], **close)
    np.testing.assert_allclose(made(attackers.times_100), 100 * HONEST[0], atol=60)
    np.testing.assert_allclose(made(attackers.inner_product), -mean, **close)
    assert not made(attackers.zeros).any()
    hidden = (mean - made(attackers.alie)) / deviation
    assert 0.9 < np.median(hidden) < 1.1
    noise = made(attackers.noise)
    assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(HONEST[0]), rel=0.1)
    assert abs(np.dot(noise, mean)) < 0.1 * np.linalg.norm(noise) * np.linalg.norm(mean)
    with pytest.raises(Refused):
        INT4.check(attackers.not_a_number(scene()), 4096)


def test_stale_parts_are_the_same_bytes_and_disguised_ones_are_not():
    first, later = scene(), scene(own=HONEST[1])
    later.memory, later.round = first.memory, 4
    assert attackers.stale(first) == attackers.stale(later)
    assert attackers.stale_disguised(first) != attackers.stale_disguised(later)
