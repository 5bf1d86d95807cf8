"""Attacks on the protocol: what the members' own checks answer to them. None of these ever reaches a mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from protocol import contribution, evidence
from protocol.blobs import digest_of
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.identity import Key
from protocol.limits import CHUNK_VALUES
from protocol.log import check_brought
from protocol.types import (
    BlobRef,
    Contribution,
    DataRange,
    Digest,
    Epoch,
    Grant,
    NodeId,
    Part,
    Record,
    RoundNumber,
    RunId,
    Signature,
)

ROUND, HEAD, UPDATE = RoundNumber(5), Digest("3" * 64), Digest("4" * 64)
DATA = DataRange(0, Digest("5" * 64), 0, 32)


def all_of() -> Iterator[tuple[str, str]]:
    """Each attack, and the refusal that it meets."""
    for attack, act in _attacks():
        try:
            act()
        except Refused as refused:
            yield attack, f"refused: {refused.what}"
        else:
            yield attack, "NOT REFUSED"


def _lying_reducer(run: RunId, member: Key, liar: Key) -> Callable[[], None]:
    """It signs a part of ones, and what it was sent says otherwise; an honest one's stands."""
    packing, group = Packing(codec("int4"), codec("int4")), evidence.group_id(run, HEAD, Epoch(0), 0)
    slices, signed = [], []
    for key in (member, liar):
        slices.append(packing.up.encode(np.full(CHUNK_VALUES, 1e-3, np.float32)))
        (signature,) = evidence.sign_slices(key, group, slices[-1], [(0, CHUNK_VALUES)], packing.up)
        signed.append(Signature(NodeId(key.public), signature))
    shown = evidence.header(evidence.Basis(0, tuple(signed))) + b"".join(slices)
    brought = tuple(Contribution(NodeId(key.public), 64, ()) for key in (member, liar))

    def lie(mean: bytes) -> str | None:
        kept = BlobRef(digest_of(shown), len(shown))
        included, reducer = tuple(each.node for each in brought), NodeId(liar.public)
        part = Part(0, 0, CHUNK_VALUES, digest_of(mean), len(mean), reducer, included, kept)
        record = Record(run, ROUND, HEAD, Epoch(0), reducer, brought, (part,), UPDATE)
        part = evidence.sign_part(liar, evidence.vouched(record, part))
        return evidence.check_reduction(replace(record, parts=(part,)), part, shown, packing)

    assert lie(evidence.encoded_mean(packing, slices, [64, 64], CHUNK_VALUES)) is None

    def act() -> None:
        if found := lie(packing.down.encode(np.ones(CHUNK_VALUES, np.float32))):
            raise Refused(Code.RECORD_BAD, f"proved, as {found}")

    return act


def _attacks() -> Iterator[tuple[str, Callable[[], None]]]:
    coordinator, member, liar = Key.generate(), Key.generate(), Key.generate()
    run = RunId(f"{coordinator.public}.attacks")

    def brought(key: Key, data: tuple[DataRange, ...], granted: tuple[Grant, ...]) -> Contribution:
        plain = Contribution(NodeId(key.public), 32 * 64, data, granted, UPDATE)
        return contribution.sign(key, run, ROUND, HEAD, plain)

    def grant(key: Key) -> Grant:
        return Grant(DATA, contribution.sign_grant(coordinator, run, NodeId(key.public), DATA))

    honest = brought(member, (DATA,), (grant(member),))

    def record(*contributions: Contribution) -> Record:
        leader = NodeId(liar.public)
        part = Part(0, 0, 65536, UPDATE, 1, leader, tuple(each.node for each in contributions))
        return Record(run, ROUND, HEAD, Epoch(0), leader, contributions, (part,), UPDATE)

    def checked(*contributions: Contribution) -> Callable[[], None]:
        return lambda: check_brought(record(*contributions))

    check_brought(record(honest))
    wide = replace(DATA, stop=32_000)
    yield "weight forger: data that nobody leased to it", checked(brought(liar, (wide,), (grant(liar),)))
    yield "weight forger: another's lease", checked(brought(liar, (DATA,), (grant(member),)))
    forged = Grant(wide, contribution.sign_grant(liar, run, NodeId(liar.public), wide))
    yield "weight forger: a lease that it signed itself", checked(brought(liar, (wide,), (forged,)))
    yield "lying leader: more tokens for a member", checked(replace(honest, tokens=1 << 40))
    yield "lying leader: another update in a member's name", checked(replace(honest, update=Digest("9" * 64)))
    yield (
        "lying leader: a member's work of an earlier round",
        checked(contribution.sign(member, run, RoundNumber(4), Digest("2" * 64), replace(honest, signature=""))),
    )
    yield "lying reducer: another mean than that of its slices", _lying_reducer(run, member, liar)
    yield "copier: another's signed contribution as its own", checked(replace(honest, node=NodeId(liar.public)))
