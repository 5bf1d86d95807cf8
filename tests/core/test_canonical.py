"""Canonical bytes: one value, one byte string, and nothing but refusals for hostile ones."""

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import canonical
from protocol.errors import Code, Refused
from protocol.limits import CONTROL_BYTES_MAX
from protocol.messages import Accepted, Begin, Claim, Ready, SignedReady
from protocol.types import (
    Ballot,
    Contribution,
    DataRange,
    Member,
    Part,
    Record,
    Role,
    Roster,
)

H = "a" * 64
RANGE = DataRange(0, H, 0, 8)
RECORD = Record(
    "k.run", 3, H, 1, "n1", (Contribution("n1", 2048, (RANGE,)),), (Part(0, 0, 65536, H, 34816, "n1", ("n1", "n2")),), H
)
ROSTER = Roster("k.run", 1, (Member("n1", "p1", ("/ip4/1.2.3.4/tcp/1",), 10**6, Role.CLIENT),), 17)
READY = Ready("k.run", 3, H, Ballot(1, 2), "n1", RECORD.contributions[0], Accepted(Ballot(1, 1), RECORD, "sig"))
BEGIN = Begin(
    "k.run", 3, Ballot(1, 2), "n1", (SignedReady(READY, "00"), SignedReady(replace(READY, accepted=None), ""))
)
VALUES = [RANGE, RECORD, ROSTER, READY, BEGIN, Claim("k.run", 3, Ballot(1, 2), "n1", None)]


@dataclass(frozen=True)
class Note:
    text: str
    number: int


def refusal(cls, data):
    with pytest.raises(Refused) as caught:
        canonical.from_bytes(cls, data)
    return caught.value


def test_the_bytes_of_a_value_never_change():
    assert canonical.to_bytes(ROSTER) == (
        b'{"after":-1,"branch":0,"epoch":1,"floor":0,"issued_ms":17,"manifest":"","members":[{"addresses":["/ip4/1.2.3.4/tcp/1"],"node":"n1","peer":"p1",'
        b'"role":"client","weight_cap":1000000}],"run":"k.run"}'
    )
    assert canonical.digest(RANGE) == "42f35ae79cb12f79450bf326026505eb16ca5767ee3c4104683d1938dcf476a9"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_message_comes_back_as_it_was(value):
    assert canonical.from_bytes(type(value), canonical.to_bytes(value)) == value


@given(st.builds(Note, st.text(), st.integers(-(2**63), 2**63 - 1)))
def test_any_text_and_any_64_bit_number_come_back(note):
    assert canonical.from_bytes(Note, canonical.to_bytes(note)) == note


def test_different_values_have_different_digests():
    assert canonical.digest(RECORD) != canonical.digest(replace(RECORD, epoch=2))


@pytest.mark.parametrize(
    "data",
    [
        b'{"text":"a", "number":1}',
        b'{"text":"a","number":1}',  # keys not sorted
        b'{"number":1,"text":"\\u0061"}',
        b'{"number":2,"number":1,"text":"a"}',
        b'{"number":1,"text":"a"}\n',
        b'\xef\xbb\xbf{"number":1,"text":"a"}',
    ],
)
def test_a_second_spelling_of_a_value_is_refused(data):
    assert refusal(Note, data).reason is Code.FIELD


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[1]",
        b'{"number":1}',
        b'{"extra":1,"number":1,"text":"a"}',
        b'{"number":"1","text":"a"}',
        b'{"number":1.0,"text":"a"}',
        b'{"number":NaN,"text":"a"}',
        b'{"number":true,"text":"a"}',
        b'{"number":9223372036854775808,"text":"a"}',
        b'{"number":' + b"9" * 100_000 + b',"text":"a"}',
        b'{"number":1,"text":"\\ud800"}',
        b'{"number":1,"text":"\xff"}',
        b'{"number":1,"text":' + b"[" * 1_000_000,
    ],
)
def test_hostile_bytes_are_refused_by_name(data):
    refused = refusal(Note, data)
    assert refused.reason is Code.FIELD
    assert len(refused.what) < 200


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_anything_else_raises_nothing_but_a_refusal(data):
    refusal(Begin, data)


def test_a_message_beyond_the_limit_is_not_even_parsed():
    assert refusal(Note, b" " * (CONTROL_BYTES_MAX + 1)).reason is Code.LIMIT


def test_an_unknown_key_is_named_without_its_control_characters():
    assert "\x1b" not in refusal(Note, b'{"a\\u001b[31m":1,"number":1,"text":"a"}').what


@pytest.mark.parametrize("value", [1.5, {"a": float("nan")}, b"bytes", {1: 2}, object(), Note])
def test_a_float_or_a_foreign_object_is_a_bug_of_ours(value):
    with pytest.raises(AssertionError):
        canonical.to_bytes(value)
