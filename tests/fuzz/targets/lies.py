"""What members say of each other, and what a liar says among honest members."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from coordinator.core import audits
from protocol import blobs, canonical, contribution, log, proof
from protocol.codec import codec
from protocol.contribution import Complaint
from protocol.errors import Refused
from protocol.evidence import SLICE, Basis, Slice, check_reduction, group_id, sign_part, vouched
from protocol.exchange import Packing
from protocol.proof import Evidence
from protocol.types import BlobRef, Contribution, Digest, Part, Record, Signature
from tests import strategies
from tests.fuzz import liar
from tests.fuzz.target import PARAMETERS, split, target
from tests.fuzz.targets.values import brought_by_us, granted
from tests.strategies import KEY, RUN


@target(strategies.of(Evidence).map(lambda each: b"said\n" + canonical.to_bytes(each)))
def report(data: bytes) -> None:
    """What one node tells of another, as if the other had signed all of it."""
    _, body = split(data)
    evidence = canonical.from_bytes(Evidence, body)
    record = evidence.record and brought_by_us(evidence.record)
    digest = record and log.record_hash(record)
    said, other = (each and _said_by_us(each, digest) for each in (evidence.said, evidence.other))
    found = proof.prove(Evidence(said, other, record), RUN)
    assert found.node == KEY.public and found.what.isprintable()


@target(strategies.of(Complaint).map(canonical.to_bytes))
def complaint(data: bytes) -> None:
    """What one node could not read of what another brought, as if the other had signed it, and we had granted its data."""
    told = canonical.from_bytes(Complaint, data)
    contribution.check_shape(told.contribution)
    brought = contribution.sign(KEY, RUN, told.round, told.previous, granted(told.contribution))
    contribution.check_genuine(RUN, told.round, told.previous, brought)
    asked = audits.complained(
        audits.Audits(), replace(told, contribution=brought), KEY.public, frozenset((KEY.public, "another"))
    )
    assert [ask.update for ask in asked.open] == [brought.update]
    assert not audits.expired(asked, told.round, {KEY.public}, ())[1]


def _said_by_us(said: proof.Said, record: Digest | None) -> proof.Said:
    body = replace(said.body, record=record or said.body.record)
    purpose = said.purpose if said.purpose in (log.VOTE, log.PROPOSAL) else log.VOTE
    return proof.Said(KEY.public, purpose, body, KEY.sign(purpose, log.vote_bytes(body)))


_SLICE = codec("int4").encode(np.ones(PARAMETERS, np.float32))


@target(
    st.integers(1, 3).map(
        lambda members: (
            canonical.to_bytes(Basis(0, (Signature(KEY.public, "0" * 128),) * members)) + b"\0" + _SLICE * members
        )
    )
)
def reduction(data: bytes) -> None:
    """The evidence of a part, which its reducer has signed: proof that it lied, or none, but nothing else.

    What stands before the first zero byte is the header; its length and its signatures are made to fit."""
    header, _, slices = data.partition(b"\0")
    packing = Packing(codec("int4"), codec("int4"))
    group = group_id(RUN, Digest("0" * 64), 0, 0).hex()
    with suppress(Refused):
        basis = canonical.from_bytes(Basis, header)
        pieces = [slices[at : at + len(_SLICE)] for at in range(0, len(slices), len(_SLICE))]
        header = canonical.to_bytes(replace(basis, slices=tuple(_slices_by_us(basis, pieces, group))))
    blob = len(header).to_bytes(4, "little") + header + slices
    brought = Contribution(KEY.public, 5, ())
    unsigned = Part(
        0,
        0,
        PARAMETERS,
        blobs.digest_of(_SLICE),
        len(_SLICE),
        KEY.public,
        (KEY.public,),
        evidence=BlobRef(blobs.digest_of(blob), len(blob)),
    )
    record = Record(RUN, 0, Digest("0" * 64), 0, KEY.public, (brought,), (unsigned,), Digest("0" * 64))
    part = sign_part(KEY, vouched(record, unsigned))
    lie = check_reduction(record, part, blob, packing)
    assert lie is None or lie.isprintable()


def _slices_by_us(basis: Basis, pieces: list[bytes], group: str) -> Iterator[Signature]:
    for signature, piece in zip(basis.slices, pieces, strict=False):
        body = Slice(group, 0, PARAMETERS, Digest(hashlib.sha256(piece).hexdigest()))
        ours = signature.node == KEY.public
        yield Signature(signature.node, KEY.sign(SLICE, canonical.to_bytes(body)) if ours else signature.value)


def _member_seeds() -> list[bytes]:
    return [
        json.dumps({"me": number, "said": script}, sort_keys=True, separators=(",", ":")).encode()
        for number, me in enumerate(liar.MEMBERS)
        if me != liar.LIAR
        for script in liar.scripts(me)
    ]


@target(st.deferred(lambda: st.sampled_from(_member_seeds())))
def member(data: bytes) -> None:
    """One member of a round hears a liar among honest members: nothing of it may trip the machine."""
    try:
        script = json.loads(data)
        number, said = script["me"], script["said"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if number not in (0, 2, 3) or isinstance(number, bool | float) or not isinstance(said, list):
        return
    player = liar.play(liar.MEMBERS[number], said)
    assert player.state.head.round <= 2
