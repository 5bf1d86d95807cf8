"""Evidence: what a reducer made its mean of, and everybody's word on it, so that a mean that is made up can be proved.

A member signs each slice that it sends. The reducer keeps those that its mean holds, with the signatures, as one blob, and
signs its part, which names that blob. Whoever gets the blob repeats the mean to the same bits: nobody believes a reducer,
and nobody, no leader either, can make an honest one look like a liar. Knows no clock, no disk and no network.

The blob: the length of a header (4 bytes, little-endian), the header (canonical JSON of `Basis`), the slices in its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from protocol import canonical, identity
from protocol.blobs import digest_of
from protocol.codec import Codec, Data
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.identity import Key
from protocol.robust import means
from protocol.types import Digest, Epoch, Exchange, NodeId, Part, Record, RoundNumber, RunId, Signature

SLICE: Final = "slice"  # what a member signs for a reducer
PART: Final = "part"  # what a reducer signs
HEADER_BYTES_MAX: Final = 1 << 15  # 64 members at 240 bytes take half of it
_LENGTH_BYTES: Final = 4


@dataclass(frozen=True)
class Slice:
    """Values [start, stop) of a member's contribution to one group, encoded."""

    group: str  # hex
    start: int
    stop: int
    digest: Digest  # SHA-256 of the bytes


@dataclass(frozen=True)
class Basis:
    """Which slices a mean was made of."""

    attempt: int  # with the record it names the group
    slices: tuple[Signature, ...]  # a member and its signature of its slice, in the order in which the mean adds them


@dataclass(frozen=True)
class Vouched:
    """A part is for one round that follows one head, and made of contributions that weigh so much: of others it is not."""

    run: RunId
    round: RoundNumber
    previous: Digest
    epoch: Epoch
    exchange: Exchange
    tokens: tuple[int, ...]  # of those whose contributions are included, in that order
    part: Part  # without its signature


def group_id(run: RunId, previous: Digest, epoch: Epoch, attempt: int) -> bytes:
    """Members with another head, roster or attempt are in another group."""
    return hashlib.sha256(f"{run}\0{previous}\0{epoch}\0{attempt}".encode()).digest()


def sign_slices(
    key: Key, group: bytes, payload: Data, spans: Sequence[tuple[int, int]], codec: Codec
) -> tuple[str, ...]:
    """A signature for each span; empty for an empty one."""
    whole, signatures = memoryview(payload), []
    for start, stop in spans:
        data = whole[codec.encoded_bytes(start) : codec.encoded_bytes(stop)]
        body = Slice(group.hex(), start, stop, Digest(hashlib.sha256(data).hexdigest()))
        signatures.append(key.sign(SLICE, canonical.to_bytes(body)) if start < stop else "")
    return tuple(signatures)


def check_slice(node: NodeId, body: Slice, signature: str) -> None:
    """Refuse a slice that this member did not sign for this group."""
    identity.verify(node, SLICE, canonical.to_bytes(body), signature)


def header(basis: Basis) -> bytes:
    """What stands before the slices."""
    data = canonical.to_bytes(basis)
    assert len(data) <= HEADER_BYTES_MAX
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def is_kept(exchange: Exchange, packing: Packing) -> bool:
    """Whether reducers keep evidence: not of what everybody averages, nor of sparse means, which hold what was left out
    before and nobody else can know."""
    return exchange is Exchange.ALL_REDUCE and not packing.down.sparse


def sign_part(key: Key, body: Vouched) -> Part:
    """The part, signed by its reducer."""
    return replace(body.part, signature=key.sign(PART, canonical.to_bytes(body)))


def vouched(record: Record, part: Part) -> Vouched:
    """What the part's reducer has signed, if this record is what it took part in."""
    tokens = {contribution.node: contribution.tokens for contribution in record.contributions}
    return Vouched(
        record.run,
        record.round,
        record.previous,
        record.epoch,
        record.exchange,
        tuple(tokens[node] for node in part.included),
        replace(part, signature=""),
    )


def check_part(record: Record, part: Part, packing: Packing) -> None:
    """Refuse a part of another size than its codec's, without the evidence that can prove it, or not signed for this.

    Of an all-gather's, refuse what is not the contribution that its member has signed."""
    expected = packing.of(record.exchange).encoded_bytes(part.stop - part.start)
    if part.size != expected:
        raise Refused(Code.RECORD_BAD, f"part {part.index} of {part.size} bytes, expected {expected}")
    wanted = is_kept(record.exchange, packing)
    slices = len(part.included) * packing.up.encoded_bytes(part.stop - part.start)
    if (part.evidence is not None) is not wanted:
        raise Refused(
            Code.RECORD_BAD, f"part {part.index} {'without evidence' if wanted else 'with evidence of nothing'}"
        )
    if part.evidence is not None and not 0 <= part.evidence.size - slices <= _LENGTH_BYTES + HEADER_BYTES_MAX:
        what = f"evidence of {part.evidence.size} bytes for part {part.index}, expected little more than {slices}"
        raise Refused(Code.RECORD_BAD, what)
    if record.exchange is Exchange.ALL_GATHER:
        updates = {contribution.node: contribution.update for contribution in record.contributions}
        if updates.get(part.reducer) != part.digest:
            raise Refused(Code.RECORD_BAD, f"part {part.index} is not the update that its member brought")
    if not {contribution.node for contribution in record.contributions}.issuperset(part.included):
        raise Refused(Code.RECORD_BAD, f"part {part.index} includes others than the record's members")
    identity.verify(part.reducer, PART, canonical.to_bytes(vouched(record, part)), part.signature)


def is_vouched(record: Record, part: Part, packing: Packing) -> bool:
    """The same as a question."""
    try:
        check_part(record, part, packing)
    except Refused:
        return False
    return True


def check_reduction(record: Record, part: Part, evidence: bytes, packing: Packing) -> str | None:
    """What proves that the part's reducer lied, in words; none if its mean is what it says.

    `evidence` is the blob that the part names, `packing` that of the run. A part that its reducer did not sign, or that
    names no evidence, proves nothing against anybody and is refused."""
    check_part(record, part, packing)
    if part.evidence is None or digest_of(evidence) != part.evidence.digest:
        raise Refused(Code.FIELD, f"this is no evidence of part {part.index} in record {record.round}")
    try:
        _repeat(record, part, evidence, packing)
    except Refused as refused:
        return refused.what
    return None


def encoded_mean(packing: Packing, slices: Sequence[Data], tokens: Sequence[int], values: int) -> bytes:
    """The part that an honest reducer makes of these slices; not for sparse means."""
    chunks = means(packing.rule, packing.up, slices, tokens, values)
    return b"".join(packing.down.encode(mean) for _, mean in chunks)


def _repeat(record: Record, part: Part, evidence: bytes, packing: Packing) -> None:
    values = part.stop - part.start
    basis, slices = _opened(evidence, packing.up.encoded_bytes(values))
    named = tuple(signature.node for signature in basis.slices)
    if named != part.included:
        what = f"slices of {len(named)} members, other than the {len(part.included)} that the part includes"
        raise Refused(Code.RECORD_BAD, what)
    group = group_id(record.run, record.previous, record.epoch, basis.attempt).hex()
    for signature, data in zip(basis.slices, slices, strict=True):
        body = Slice(group, part.start, part.stop, Digest(hashlib.sha256(data).hexdigest()))
        check_slice(signature.node, body, signature.value)
        packing.up.check(data, values)
    tokens = {contribution.node: contribution.tokens for contribution in record.contributions}
    repeated = encoded_mean(packing, slices, [tokens[node] for node in named], values)
    if digest_of(repeated) != part.digest:
        raise Refused(Code.RECORD_BAD, f"the mean of these {len(named)} slices is {digest_of(repeated)[:12]}")


def _opened(evidence: bytes, slice_bytes: int) -> tuple[Basis, list[memoryview]]:
    length = int.from_bytes(evidence[:_LENGTH_BYTES], "little")
    if length > HEADER_BYTES_MAX:
        raise Refused(Code.FIELD, f"evidence with a header of {length} bytes, at most {HEADER_BYTES_MAX} are allowed")
    basis = canonical.from_bytes(Basis, evidence[_LENGTH_BYTES : _LENGTH_BYTES + length])
    slices = memoryview(evidence)[_LENGTH_BYTES + length :]
    if len(slices) != len(basis.slices) * slice_bytes:
        what = f"evidence with {len(slices)} bytes of slices, expected {slice_bytes} from each of {len(basis.slices)}"
        raise Refused(Code.FIELD, what)
    return basis, list(_cut(slices, slice_bytes))


def _cut(data: memoryview, size: int) -> Iterator[memoryview]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
