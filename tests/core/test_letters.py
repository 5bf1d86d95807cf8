"""A letter is its author's, whole and unchanged, and so is every promise that it quotes; anything else is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import letters
from protocol import canonical
from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.limits import MEMBERS_MAX, RANGES_MAX
from protocol.messages import Accepted, Begin, Commit, LogRequest, Propose, Ready, SignedReady
from protocol.types import Ballot, Certificate, Contribution, DataRange, Digest, Grant, Record, Signature
from protocol.v1 import barnraise_pb2 as wire

OURS, ANOTHER = Key.generate(), Key.generate()
REQUEST = LogRequest("run", 3, OURS.public)
DATA = DataRange(0, Digest("5" * 64), 0, 4)


def promise(key, node=None):
    contribution = Contribution(node or key.public, 64, (DATA,))
    return Ready("run", 3, Digest("0" * 64), Ballot(0, 0), key.public, contribution, None)


def signed(key, ready):
    return SignedReady(ready, letters.seal(key, ready)[1])


def begin(*readies):
    return letters.seal(OURS, Begin("run", 3, Ballot(0, 0), OURS.public, readies))[0]


def changed(letter, **fields):
    envelope = wire.PeerEnvelope.FromString(letter)
    for name, value in fields.items():
        setattr(envelope, name, value)
    return envelope.SerializeToString()


def refusal(letter):
    with pytest.raises(Refused) as caught:
        letters.unseal(letter)
    return caught.value.reason


def test_a_letter_is_read_as_it_was_written():
    letter, signature = letters.seal(OURS, REQUEST)
    assert letters.unseal(letter) == (REQUEST, signature)


def test_a_call_is_read_with_the_promises_that_it_quotes():
    quoted = (signed(OURS, promise(OURS)), signed(ANOTHER, promise(ANOTHER)))
    message, _ = letters.unseal(begin(*quoted))
    assert message.readies == quoted


@pytest.mark.parametrize(
    "change",
    [
        {"signature": bytes(64)},
        {"signature": b""},
        {"body": canonical.to_bytes(replace(REQUEST, round=4))},
        {"sender": ANOTHER.public},
        {"kind": "Commit"},
    ],
    ids=["forged", "unsigned", "another body", "another's name", "another kind"],
)
def test_a_letter_that_was_changed_on_its_way_is_refused(change):
    assert refusal(changed(letters.seal(OURS, REQUEST)[0], **change)) is Code.SIGNATURE


def test_a_letter_in_anothers_name_is_refused_though_its_writer_signed_it():
    letter, _ = letters.seal(OURS, replace(REQUEST, sender=ANOTHER.public))
    assert refusal(letter) is Code.SIGNATURE
    assert refusal(changed(letter, sender=OURS.public)) is Code.SIGNATURE


@pytest.mark.parametrize("kind", ["", "Roster", "SignedReady", "__class__", "\u202e"])
def test_a_letter_of_no_known_kind_is_refused(kind):
    assert refusal(changed(letters.seal(OURS, REQUEST)[0], kind=kind)) is Code.FIELD


@pytest.mark.parametrize(
    "quoted, reason",
    [
        (SignedReady(promise(ANOTHER), "00" * 64), Code.SIGNATURE),
        (signed(OURS, promise(ANOTHER)), Code.SIGNATURE),
        (replace(signed(ANOTHER, promise(ANOTHER)), ready=replace(promise(ANOTHER), round=4)), Code.SIGNATURE),
        (signed(ANOTHER, promise(ANOTHER, node=OURS.public)), Code.FIELD),
    ],
    ids=["forged", "signed by the caller", "changed", "of another's work"],
)
def test_a_call_that_quotes_a_promise_nobody_gave_is_refused(quoted, reason):
    assert refusal(begin(signed(OURS, promise(OURS)), quoted)) is reason


def proposes(record, accepted=None):
    return Propose("run", 3, Ballot(0, 1), OURS.public, record, "", accepted)


def says_accepted(record, key=OURS):
    return replace(promise(key), accepted=Accepted(Ballot(0, 0), record, ""))


def commits(*voters):
    votes = tuple(Signature(key, "") for key in voters)
    return Commit("run", 3, OURS.public, RECORD, Certificate(Digest("9" * 64), Ballot(0, 0), votes))


BROUGHT = promise(OURS).contribution
RECORD = Record("run", 3, Digest("0" * 64), 0, OURS.public, (BROUGHT,), (), Digest("1" * 64))
MEMBERS = tuple(f"{number:064x}" for number in range(MEMBERS_MAX + 1))
CROWD = replace(RECORD, contributions=tuple(replace(BROUGHT, node=node) for node in MEMBERS))
TWICE = replace(RECORD, contributions=(BROUGHT, replace(BROUGHT, tokens=16)))
GRANTED = replace(RECORD, contributions=(replace(BROUGHT, grants=(Grant(DATA, ""),) * (RANGES_MAX + 1)),))
EARLIER = Accepted(Ballot(0, 0), TWICE, "")


@pytest.mark.parametrize(
    "message",
    [
        proposes(CROWD),
        proposes(TWICE),
        proposes(GRANTED),
        proposes(RECORD, EARLIER),
        says_accepted(TWICE),
        Begin("run", 3, Ballot(0, 0), OURS.public, (signed(OURS, says_accepted(TWICE)),)),
        Begin("run", 3, Ballot(0, 0), OURS.public, (signed(OURS, promise(OURS)),) * 2),
        commits(*MEMBERS),
        commits(OURS.public, OURS.public),
    ],
    ids=[
        "more members than there may be", "a member twice", "more grants than are read", "in a record of before",
        "in a promise", "in a promise that is quoted", "a promise twice", "more votes than members", "a vote twice",
    ],
)  # fmt: skip
def test_a_letter_is_refused_that_would_cost_its_reader_more_signature_checks_than_an_honest_one(message):
    assert refusal(letters.seal(OURS, message)[0]) in (Code.FIELD, Code.RECORD_BAD)


def test_a_letter_may_say_one_thing_of_each_member():
    crowd = replace(CROWD, contributions=CROWD.contributions[1:])
    for message in (proposes(crowd, Accepted(Ballot(0, 0), crowd, "")), says_accepted(crowd), commits(*MEMBERS[1:])):
        assert letters.unseal(letters.seal(OURS, message)[0])[0] == message


@given(st.binary(max_size=300))
def test_any_bytes_raise_nothing_but_a_refusal(data):
    with pytest.raises(Refused):
        letters.unseal(data)


@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_letter_with_one_bit_flipped_is_refused_or_says_the_same(at, bit):
    letter, _ = letters.seal(OURS, REQUEST)
    data = bytearray(letter)
    data[at % len(data)] ^= 1 << bit
    try:
        message, _ = letters.unseal(bytes(data))
    except Refused:
        return
    assert message == REQUEST  # a field that nobody reads
