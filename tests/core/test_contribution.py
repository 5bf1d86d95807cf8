"""What proves a contribution: its member's signature for one round, and the coordinator's for its data."""

from dataclasses import replace

import pytest

from protocol import contribution, identity
from protocol.contribution import check_genuine, check_shape, grant_of, is_genuine, sign, sign_grant
from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.limits import RANGES_MAX
from protocol.types import Contribution, DataRange, Digest, Grant, Lease, RoundNumber

COORDINATOR, NODE, OTHER = (Key.generate() for _ in range(3))
RUN = identity.run_id(COORDINATOR.public, "test")
HEAD = Digest("1" * 64)
ROUND = RoundNumber(3)
SHARD = Digest("5" * 64)


def data(start, stop):
    return DataRange(0, SHARD, start, stop)


def grant(start, stop, *, key=COORDINATOR, node=NODE.public, run=RUN):
    return Grant(data(start, stop), sign_grant(key, run, node, data(start, stop)))


def brought(*grants, ranges=(data(0, 4),), key=NODE, node=NODE.public):
    tokens = 16 * sum(each.stop - each.start for each in ranges)
    return sign(key, RUN, ROUND, HEAD, Contribution(node, tokens, ranges, grants, Digest("2" * 64)))


def test_what_a_member_brings_of_its_own_leases_is_genuine():
    lease = Lease("1f", NODE.public, data(0, 4), 5, sign_grant(COORDINATOR, RUN, NODE.public, data(0, 4)))
    check_genuine(RUN, ROUND, HEAD, brought(grant_of(lease)))
    check_genuine(RUN, ROUND, HEAD, brought(grant(0, 2), grant(2, 8)))


@pytest.mark.parametrize(
    "grants",
    [
        (),
        (grant(0, 3),),
        (grant(0, 2), grant(3, 4)),
        (grant(0, 4, node=OTHER.public),),
        (grant(0, 4, key=NODE),),
        (grant(0, 4, run=identity.run_id(COORDINATOR.public, "other")),),
        (replace(grant(0, 3), range=data(0, 4)),),
        (grant(0, 4), replace(grant(0, 9), signature="0" * 128)),
    ],
    ids=["none", "too little", "a gap", "another's", "self-made", "another run's", "stretched", "one is forged"],
)
def test_weight_that_was_never_granted_counts_nowhere(grants):
    assert not is_genuine(RUN, ROUND, HEAD, brought(*grants))


def test_nobody_brings_anything_in_anothers_name():
    assert not is_genuine(RUN, ROUND, HEAD, brought(grant(0, 4), key=OTHER))


@pytest.mark.parametrize(
    "change",
    [{"tokens": 65}, {"update": Digest("3" * 64)}, {"ranges": (data(0, 3),)}, {"signature": ""}, {"update": ""}],
)
def test_nothing_of_it_can_be_changed(change):
    assert not is_genuine(RUN, ROUND, HEAD, replace(brought(grant(0, 4)), **change))


def test_it_is_for_one_round_after_one_head():
    mine = brought(grant(0, 4))
    assert not is_genuine(RUN, RoundNumber(4), HEAD, mine)
    assert not is_genuine(RUN, ROUND, Digest("9" * 64), mine)
    with pytest.raises(Refused) as caught:
        check_genuine(RUN, RoundNumber(4), HEAD, mine)
    assert caught.value.reason is Code.SIGNATURE


def test_an_update_that_is_no_digest_is_refused_by_name():
    with pytest.raises(Refused, match="names no update"):
        check_genuine(RUN, ROUND, HEAD, replace(brought(grant(0, 4)), update="../x"))


def test_its_lists_are_bounded():
    check_shape(brought(*(grant(0, 4),) * RANGES_MAX))
    with pytest.raises(Refused, match="grants"):
        check_shape(brought(*(grant(0, 4),) * (RANGES_MAX + 1)))


def test_a_refusal_is_not_remembered_as_anothers():
    """Both answers are kept; they are of the whole value."""
    contribution.grant_is_genuine.cache_clear()
    assert not contribution.grant_is_genuine(RUN, OTHER.public, grant(0, 4))
    assert contribution.grant_is_genuine(RUN, NODE.public, grant(0, 4))
