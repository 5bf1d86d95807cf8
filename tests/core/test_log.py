"""The log: what follows, what certifies, what no honest leader proposes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.limits import CHUNK_VALUES as CHUNK
from protocol.limits import MEMBERS_MAX, RANGES_MAX
from protocol.log import (
    HELPER_SHARES,
    VOTE,
    check_certificate,
    check_link,
    check_members,
    check_ranges,
    check_record_shape,
    genesis_head,
    next_head,
    record_hash,
    spans,
    vote_bytes,
)
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    LogEntry,
    Manifest,
    Member,
    Part,
    Record,
    Role,
    Roster,
    Signature,
    VoteBody,
)

P = 3 * CHUNK + 5
SHARD, OTHER = "ab" * 32, "cd" * 32
KEYS = [Key.generate() for _ in range(5)]
NODES = [key.public for key in KEYS]
ROSTER = Roster("run", 7, tuple(Member(node, "peer", (), 1000) for node in NODES[:4]), 0)
MANIFEST = Manifest("run", "name", "{}", "{}", None, 256, P, "0" * 64, "0" * 64, 8, 1, "0" * 64, "5.0")
BALLOT = Ballot(7, 2)


def span(start, stop, shard=SHARD, pass_number=0):
    return DataRange(pass_number, shard, start, stop)


PARTS = (
    Part(0, 0, CHUNK, "1" * 64, 10, NODES[0], tuple(NODES[:3])),
    Part(2, 2 * CHUNK, P, "2" * 64, 10, NODES[2], tuple(NODES[:2])),
)
CONTRIBUTIONS = tuple(Contribution(node, 80, (span(10 * i, 10 * i + 10),)) for i, node in enumerate(NODES[:3]))
RECORD = Record("run", 0, genesis_head(MANIFEST).hash, 7, NODES[0], CONTRIBUTIONS, PARTS, "0" * 64)


def signature(key, record=RECORD, ballot=BALLOT, purpose=VOTE):
    body = VoteBody(record.run, record.round, ballot, record_hash(record))
    return Signature(key.public, key.sign(purpose, vote_bytes(body)))


def entry(keys=KEYS[:3], record=RECORD, ballot=BALLOT, **fields):
    signatures = tuple(signature(key, record, ballot) for key in keys)
    return LogEntry(record, replace(Certificate(record_hash(record), ballot, signatures), **fields))


def refused(call, *arguments):
    with pytest.raises(Refused) as caught:
        call(*arguments)
    assert caught.value.reason in (Code.RECORD_BAD, Code.SIGNATURE)


def test_a_strict_majority_of_the_roster_certifies():
    check_certificate(entry(), ROSTER)
    check_certificate(entry(KEYS[:4]), ROSTER)
    refused(check_certificate, entry(KEYS[:2]), ROSTER)
    refused(check_certificate, entry([]), ROSTER)


def test_one_vote_counts_once_and_a_stranger_never():
    refused(check_certificate, entry([KEYS[0], KEYS[1], KEYS[1]]), ROSTER)
    refused(check_certificate, entry([KEYS[0], KEYS[1], KEYS[4]]), ROSTER)
    refused(check_certificate, entry([*KEYS[:3], KEYS[4]]), ROSTER)


@pytest.mark.parametrize(
    "forged",
    [
        signature(KEYS[2], replace(RECORD, state="9" * 64)),
        signature(KEYS[2], ballot=Ballot(7, 3)),
        signature(KEYS[2], purpose="roster"),
        replace(signature(KEYS[1]), node=NODES[2]),
        Signature(NODES[2], "00" * 64),
        Signature(NODES[2], ""),
        Signature(NODES[2], "not hex"),
    ],
)
def test_a_forged_or_borrowed_vote_is_refused(forged):
    signatures = (signature(KEYS[0]), signature(KEYS[1]), forged)
    refused(check_certificate, entry(signatures=signatures), ROSTER)


def test_a_certificate_is_for_its_record_and_its_roster():
    refused(check_certificate, entry(record=replace(RECORD, run="other")), ROSTER)
    refused(check_certificate, LogEntry(replace(RECORD, state="9" * 64), entry().certificate), ROSTER)
    refused(check_certificate, entry(ballot=Ballot(6, 0)), ROSTER)
    refused(check_certificate, entry(), replace(ROSTER, epoch=8))
    refused(check_certificate, entry(record=replace(RECORD, epoch=8)), ROSTER)


def test_a_record_of_an_older_roster_can_be_certified_by_a_newer_one():
    check_certificate(entry(record=replace(RECORD, epoch=5)), ROSTER)


def test_a_record_follows_exactly_its_head():
    head = genesis_head(MANIFEST)
    check_link(RECORD, head, MANIFEST)
    following = replace(RECORD, round=1, previous=record_hash(RECORD))
    check_link(following, next_head(RECORD), MANIFEST)
    refused(check_link, following, head, MANIFEST)
    refused(check_link, RECORD, next_head(RECORD), MANIFEST)
    refused(check_link, replace(RECORD, previous="9" * 64), head, MANIFEST)
    refused(check_link, RECORD, replace(head, hash="9" * 64), MANIFEST)
    refused(check_link, replace(RECORD, run="other"), head, MANIFEST)
    refused(check_link, RECORD, head, replace(MANIFEST, run="other"))


def with_part(**fields):
    return replace(RECORD, parts=(PARTS[0], replace(PARTS[1], **fields)))


def with_contribution(**fields):
    return replace(RECORD, contributions=(*CONTRIBUTIONS[:2], replace(CONTRIBUTIONS[2], **fields)))


@pytest.mark.parametrize(
    "record",
    [
        replace(RECORD, round=-1),
        replace(RECORD, epoch=-1),
        replace(RECORD, parts=()),
        replace(RECORD, parts=PARTS[::-1]),
        replace(RECORD, parts=PARTS + PARTS),
        replace(RECORD, contributions=()),
        replace(RECORD, contributions=CONTRIBUTIONS + CONTRIBUTIONS[:1]),
        replace(RECORD, contributions=tuple(Contribution(str(i), 1, ()) for i in range(MEMBERS_MAX + 1))),
        with_part(start=CHUNK + 1),
        with_part(start=2 * CHUNK, stop=2 * CHUNK),
        with_part(start=-CHUNK),
        with_part(start=0),
        with_part(stop=P - 1),
        with_part(stop=4 * CHUNK),
        with_part(index=0),
        with_part(index=-1),
        with_part(size=0),
        with_part(digest="../../etc/passwd"),
        with_part(included=()),
        with_part(included=(NODES[0], NODES[0])),
        with_part(included=(NODES[0], NODES[4])),
        with_contribution(tokens=-1),
        with_contribution(ranges=(span(5, 5),)),
        with_contribution(ranges=(span(6, 5),)),
        with_contribution(ranges=(span(-1, 5),)),
        with_contribution(ranges=(span(20, 30, pass_number=-1),)),
        with_contribution(ranges=(span(20, 30, shard="AB" * 32),)),
        with_contribution(ranges=tuple(span(i, i + 1) for i in range(100, 101 + RANGES_MAX))),
    ],
)
def test_a_misshapen_record_is_refused(record):
    check_record_shape(RECORD, P)
    refused(check_record_shape, record, P)


def test_members_and_weights_are_those_of_the_roster():
    check_members(RECORD, ROSTER)
    refused(check_members, with_contribution(tokens=1001), ROSTER)
    refused(check_members, with_contribution(node=NODES[4]), ROSTER)
    refused(check_members, replace(RECORD, leader=NODES[4]), ROSTER)
    refused(check_members, with_part(reducer=NODES[4]), ROSTER)


def test_data_counts_once():
    check_ranges(RECORD, Consumed())
    check_ranges(RECORD, Consumed().with_ranges((span(30, 40), span(0, 30, OTHER), span(0, 30, pass_number=1))))
    refused(check_ranges, RECORD, Consumed().with_ranges((span(29, 40),)))
    refused(check_ranges, with_contribution(ranges=(span(19, 21),)), Consumed())
    refused(check_ranges, with_contribution(ranges=(span(20, 25), span(24, 26))), Consumed())


def test_any_change_of_a_record_changes_its_hash():
    others = [with_part(size=11), with_contribution(tokens=81), replace(RECORD, state="9" * 64)]
    assert len({record_hash(record) for record in (RECORD, *others)}) == 4


@given(st.integers(1, 40 * CHUNK), st.lists(st.sampled_from(Role), min_size=1, max_size=9))
def test_spans_cover_every_value_once_in_shares_of_whole_chunks(parameters, roles):
    result = spans(parameters, roles)
    assert len(result) == len(roles)
    reducing = [role for role in roles if role is not Role.CLIENT]
    position = 0
    for role, (start, stop) in zip(roles, result, strict=True):
        assert start == position and stop >= start
        assert start % CHUNK == 0 or start == parameters
        assert stop > start or role is Role.CLIENT or parameters < len(reducing) * HELPER_SHARES * CHUNK
        assert stop == start or role is not Role.CLIENT
        position = stop
    assert position == (parameters if reducing else 0)


def test_peers_get_equal_spans_and_helpers_more():
    assert spans(8 * CHUNK, [Role.PEER, Role.CLIENT, Role.PEER, Role.HELPER]) == (
        (0, 2 * CHUNK),
        (2 * CHUNK, 2 * CHUNK),
        (2 * CHUNK, 4 * CHUNK),
        (4 * CHUNK, 8 * CHUNK),
    )
