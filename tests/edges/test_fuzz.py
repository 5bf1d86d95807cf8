"""Whatever reads a stranger's bytes takes them or refuses them by name: found cases, and a few edits of each seed.

`make fuzz` looks for more with the same targets, for as long as it is told to."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node import letters
from protocol import canonical
from protocol.messages import Begin, Commit, Message, Propose, Ready, SignedReady
from protocol.types import Contribution
from tests import strategies
from tests.fuzz.edits import edited
from tests.fuzz.target import FOUND
from tests.fuzz.targets import TARGETS

OURS = strategies.KEY.public
BROUGHT = Contribution(OURS, 64, ())
CASES = sorted(str(path.relative_to(FOUND)) for path in FOUND.glob("*/*"))


@pytest.mark.parametrize("case", CASES)
def test_what_fuzzing_found_stays_mended(case):
    TARGETS[Path(case).parts[0]].read((FOUND / case).read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=15, derandomize=True, database=None, deadline=None)
@given(data=st.data(), luck=st.integers(0, 2**32))
def test_edited_bytes_are_taken_or_refused_by_name(name, data, luck):
    seed = data.draw(TARGETS[name].seeds)
    TARGETS[name].read(seed)
    TARGETS[name].read(edited(seed, Random(luck)))


@pytest.mark.parametrize("kind", strategies.CANONICAL)
@settings(max_examples=4, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_every_value_that_travels_or_is_stored_comes_back_as_it_was(kind, data):
    value = data.draw(strategies.of(strategies.CANONICAL[kind]))
    assert canonical.from_bytes(type(value), canonical.to_bytes(value)) == value
    TARGETS["value"].read(kind.encode() + b"\n" + canonical.to_bytes(value))


@settings(max_examples=30, derandomize=True, database=None, deadline=None)
@given(st.one_of(*(strategies.of(kind) for kind in get_args(Message))))
def test_every_message_comes_back_out_of_its_letter(message):
    letter, signature = letters.seal(strategies.KEY, told := by_us(message))
    assert letters.unseal(letter) == (told, signature)


def by_us(message):
    """The same, said by the one member whose key we have, and so is all that it quotes."""
    match message:
        case Begin():
            readies = (by_us(replace(each.ready, contribution=BROUGHT)) for each in message.readies[:1])
            quoted = tuple(SignedReady(ready, letters.seal(strategies.KEY, ready)[1]) for ready in readies)
            message = replace(message, readies=quoted)
        case Commit():
            votes = message.certificate.signatures[:1]
            message = replace(message, certificate=replace(message.certificate, signatures=votes))
        case Propose():
            message = replace(message, record=of_ours(message.record))
    if isinstance(message, Ready | Propose) and message.accepted is not None:
        record = of_ours(message.accepted.record)
        message = replace(message, accepted=replace(message.accepted, record=record))
    return replace(message, sender=OURS)


def of_ours(record):
    return replace(record, contributions=(BROUGHT,))
