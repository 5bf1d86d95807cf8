"""What has canonical bytes: values, letters, and what our own programs do with them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from node import letters, link
from protocol import blobs, canonical, contribution, identity, log, runspec, state
from protocol.errors import Refused
from protocol.messages import Begin
from protocol.types import (
    BaseCheckpoint,
    Contribution,
    DataRange,
    Digest,
    Grant,
    Lease,
    LogEntry,
    Manifest,
    Pass,
    Record,
    Rollback,
    Roster,
)
from protocol.v1 import barnraise_pb2 as wire
from tests import strategies
from tests.fuzz.target import PARAMETERS, named, split, target
from tests.strategies import CANONICAL, KEY, NOW_MS, PEER, RUN


@target(strategies.canonical_values.map(lambda value: named(type(value).__name__, value)))
def value(data: bytes) -> None:
    """Any type that has canonical bytes: what is read is written as the same bytes, and then checked by what it means."""
    name, body = split(data)
    kind = CANONICAL.get(name)
    if kind is None:
        return
    found = canonical.from_bytes(kind, body)
    assert canonical.to_bytes(found) == body
    assert canonical.from_bytes(kind, body) == found
    _meaning(found)


def _meaning(found: object) -> None:
    """What our own programs do next with a value that they have read, as if it had been signed."""
    match found:
        case Record():
            log.check_record_shape(found, PARAMETERS)
            with suppress(Refused):
                log.check_brought(brought_by_us(found))
            log.check_ranges(found, state.Consumed())
            consumed = state.Consumed().with_ranges(log.ranges_of(found))
            assert all(consumed.covers(span) for span in log.ranges_of(found))
        case LogEntry():
            roster = Roster(RUN, found.certificate.ballot.epoch, (), 0)
            log.is_certified(found, roster)
            _meaning(found.record)
        case Contribution():
            contribution.check_shape(found)
            contribution.is_genuine(RUN, 0, Digest("0" * 64), granted(found))
        case DataRange():
            contribution.check_range(found)
            assert state.Consumed().with_ranges((found,)).covers(found)
        case Roster():
            identity.check_roster(KEY.public, identity.sign_roster(KEY, found))
        case Rollback():
            link.check_rollbacks((identity.sign_rollback(KEY, found),), RUN)
        case Manifest():
            manifest = link.check_manifest(identity.sign_manifest(KEY, found), RUN)
            runspec.RunSpec.from_json(manifest.spec)
        case Pass():
            link.check_pass(identity.sign_pass(KEY, found), RUN, node=KEY.public, peer=PEER, now_ms=NOW_MS)
        case Lease():
            link.check_lease(found, RUN, KEY.public)
            grant = contribution.sign_grant(KEY, RUN, KEY.public, found.range)
            link.check_lease(replace(found, node=KEY.public, signature=grant), RUN, KEY.public)
        case BaseCheckpoint():
            blobs.check_digest(found.blob.digest)


def brought_by_us(record: Record) -> Record:
    return replace(record, contributions=tuple(map(granted, record.contributions)))


def granted(brought: Contribution) -> Contribution:
    """With grants that the coordinator has signed, by a member that has signed it all."""
    grants = (Grant(each.range, contribution.sign_grant(KEY, RUN, KEY.public, each.range)) for each in brought.grants)
    ours = replace(brought, node=KEY.public, grants=tuple(grants))
    return contribution.sign(KEY, RUN, 0, Digest("0" * 64), ours)


@target(strategies.canonical_values.map(lambda value: named(type(value).__name__, value)))
def letter(data: bytes) -> None:
    """What a member may write, signed by itself; and bytes that are no letter at all."""
    name, body = split(data)
    if name == "raw":
        letters.unseal(body)
        letters.addressee(body)
        return
    if name == "Begin":
        with suppress(Refused):
            body = canonical.to_bytes(_signed_within(canonical.from_bytes(Begin, body)))
    signature = bytes.fromhex(KEY.sign("peer-message", name.encode() + b"\0" + body))
    envelope = wire.PeerEnvelope(sender=KEY.public, kind=name, body=body, signature=signature)
    message, proof = letters.unseal(envelope.SerializeToString())
    assert type(message).__name__ == name and proof == signature.hex()
    assert letters.seal(KEY, message)[0] == envelope.SerializeToString()


def _signed_within(begin: Begin) -> Begin:
    """With every promise of our own truly ours."""
    return replace(
        begin,
        readies=tuple(
            replace(each, signature=letters.seal(KEY, each.ready)[1]) if each.ready.sender == KEY.public else each
            for each in begin.readies
        ),
    )
