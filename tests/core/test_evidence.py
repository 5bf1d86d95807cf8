"""Evidence of a reduction: an honest reducer is never proved a liar, and a lying one always is."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from protocol.blobs import digest_of
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.evidence import (
    HEADER_BYTES_MAX,
    Basis,
    Slice,
    Vouched,
    check_part,
    check_reduction,
    check_slice,
    encoded_mean,
    group_id,
    header,
    is_vouched,
    sign_part,
    sign_slices,
    vouched,
)
from protocol.exchange import Packing
from protocol.identity import Key
from protocol.limits import CHUNK_VALUES as CHUNK
from protocol.robust import Rule
from protocol.types import BlobRef, Contribution, DataRange, Exchange, Part, Record, Signature

P = 2 * CHUNK + 300
SPANS = ((0, CHUNK), (CHUNK, P))
KEYS = [Key.generate() for _ in range(3)]
NODES = [key.public for key in KEYS]
TOKENS = (100, 300, 50)
HEAD, RUN = "ab" * 32, "run"
INT4 = Packing(codec("int4"), codec("int4"), Rule.CLIP)


def encoded(packing=INT4):
    scales = (1e-3, 2e-3, 1.0)  # the last one shouts
    vectors = [np.random.default_rng(seed).standard_normal(P) * scale for seed, scale in enumerate(scales)]
    return [packing.up.encode(vector.astype(np.float32)) for vector in vectors]


def slices_of(payloads, index=1, packing=INT4):
    start, stop = map(packing.up.encoded_bytes, SPANS[index])
    return [payload[start:stop] for payload in payloads]


def basis_of(payloads, *, attempt=2, head=HEAD, keys=KEYS, packing=INT4):
    group = group_id(RUN, head, 5, attempt)
    signed = [sign_slices(key, group, data, SPANS, packing.up)[1] for key, data in zip(keys, payloads, strict=True)]
    return Basis(attempt, tuple(Signature(key.public, each) for key, each in zip(keys, signed, strict=True)))


def blob(basis, slices):
    return header(basis) + b"".join(slices)


def reduced(mean, evidence, included=None, packing=INT4, reducer=KEYS[1]):
    """The part that the second member signs, and the record that took it."""
    start, stop = SPANS[1]
    included = tuple(NODES if included is None else included)
    part = Part(
        1,
        start,
        stop,
        digest_of(mean),
        len(mean),
        reducer.public,
        included,
        BlobRef(digest_of(evidence), len(evidence)),
    )
    tokens = tuple(TOKENS[NODES.index(node)] for node in included)
    part = sign_part(reducer, Vouched(RUN, 7, HEAD, 5, Exchange.ALL_REDUCE, tokens, part))
    brought = tuple(Contribution(node, tokens, ()) for node, tokens in zip(NODES, TOKENS, strict=True))
    return Record(RUN, 7, HEAD, 5, NODES[0], brought, (part,), "cd" * 32), part


def honest(packing=INT4):
    payloads = encoded(packing)
    slices = slices_of(payloads, packing=packing)
    mean = encoded_mean(packing, slices, TOKENS, P - CHUNK)
    evidence = blob(basis_of(payloads, packing=packing), slices)
    return *reduced(mean, evidence, packing=packing), evidence


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("down", ["int4", "fp16"])
def test_an_honest_reducer_is_never_proved_a_liar(rule, down):
    packing = replace(INT4, rule=rule, down=codec(down))
    record, part, evidence = honest(packing)
    check_part(record, part, packing)
    assert check_reduction(record, part, evidence, packing) is None


def test_another_mean_than_that_of_its_slices_proves_the_reducer():
    payloads = encoded()
    slices = slices_of(payloads)
    evidence = blob(basis_of(payloads), slices)
    wrong = {
        "made up": INT4.down.encode(np.full(P - CHUNK, 0.01, np.float32)),
        "one of them": slices[0],
        "under another rule": encoded_mean(replace(INT4, rule=Rule.MEAN), slices, TOKENS, P - CHUNK),
        "with other weights": encoded_mean(INT4, slices, (100, 300, 51), P - CHUNK),
    }
    for how, mean in wrong.items():
        assert "the mean of these 3 slices" in check_reduction(*reduced(mean, evidence), evidence, INT4), how


def lies():
    payloads = encoded()
    slices, basis = slices_of(payloads), basis_of(payloads)
    signed = basis.slices
    pair = encoded_mean(INT4, slices[:2], TOKENS[:2], P - CHUNK)
    all_three = encoded_mean(INT4, slices, TOKENS, P - CHUNK)
    spoilt = bytes(slices[0][:-1]) + bytes([slices[0][-1] ^ 0x11])
    yield "a member without a slice", blob(Basis(2, signed[:2]), slices[:2]), pair, None
    yield "a slice that nobody signed", blob(Basis(2, signed[:2]), slices), all_three, None
    yield "a slice without a member", blob(basis, slices), all_three, NODES[:2]
    yield "another order", blob(basis, slices), all_three, NODES[::-1]
    yield "changed bytes", blob(basis, [spoilt, *slices[1:]]), all_three, None
    yield "slices swapped", blob(basis, [slices[1], slices[0], slices[2]]), all_three, None
    yield "of another attempt", blob(replace(basis_of(payloads, attempt=1), attempt=2), slices), all_three, None
    yield "of another head", blob(basis_of(payloads, head="ef" * 32), slices), all_three, None
    yield (
        "by another hand",
        blob(Basis(2, (replace(signed[0], value=signed[1].value), *signed[1:])), slices),
        all_three,
        None,
    )
    yield "no signature", blob(Basis(2, (replace(signed[0], value=""), *signed[1:])), slices), all_three, None
    yield "of other values", blob(basis_of(payloads), slices_of(payloads, 0)), all_three, None
    yield "nothing at all", b"", all_three, None
    yield "a header without end", b"\xff" * len(blob(basis, slices)), all_three, None
    yield "no header", (10).to_bytes(4, "little") + b"x" * (len(blob(basis, slices)) - 4), all_three, None


@pytest.mark.parametrize(("how", "evidence", "mean", "included"), [pytest.param(*lie, id=lie[0]) for lie in lies()])
def test_evidence_that_does_not_bear_out_the_part_proves_the_reducer(how, evidence, mean, included):
    record, part = reduced(mean, evidence, included)
    try:
        assert check_reduction(record, part, evidence, INT4), how
    except Refused as refused:  # a size that cannot be right gets no votes in the first place
        assert refused.reason is Code.RECORD_BAD and "evidence of" in refused.what, how


def test_a_slice_that_no_codec_reads_is_a_lie_though_its_sender_signed_it():
    payloads = encoded()
    payloads[0] = payloads[0][: INT4.up.encoded_bytes(CHUNK)] + b"\xff" * INT4.up.encoded_bytes(P - CHUNK)
    slices = slices_of(payloads)
    evidence = blob(basis_of(payloads), slices)
    mean = encoded_mean(INT4, slices[1:], TOKENS[1:], P - CHUNK)
    assert "scale" in check_reduction(*reduced(mean, evidence), evidence, INT4)


def test_no_leader_can_change_what_a_reducer_signed():
    record, part, _ = honest()
    others = [
        replace(record, round=8),
        replace(record, previous="ef" * 32),
        replace(record, epoch=6),
        replace(record, run="other"),
        replace(record, contributions=(replace(record.contributions[0], tokens=101), *record.contributions[1:])),
        replace(record, contributions=record.contributions[:2]),
    ]
    assert is_vouched(record, part, INT4)
    assert not any(is_vouched(other, part, INT4) for other in others)
    changed = [
        replace(part, included=part.included[:2]),
        replace(part, included=part.included[::-1]),
        replace(part, digest="00" * 32),
        replace(part, index=0),
        replace(part, reducer=NODES[0]),
        replace(part, evidence=replace(part.evidence, digest="00" * 32)),
        replace(part, evidence=None),
        replace(part, signature=""),
        replace(part, start=0),
    ]
    assert not any(is_vouched(record, other, INT4) for other in changed)
    with pytest.raises(Refused):  # nobody is proved by what its reducer never signed
        check_reduction(record, changed[0], b"", INT4)


def test_other_bytes_than_the_evidence_named_prove_nothing():
    record, part, evidence = honest()
    with pytest.raises(Refused) as caught:
        check_reduction(record, part, evidence + b"\0", INT4)
    assert caught.value.reason is Code.FIELD


def test_a_part_without_evidence_or_with_too_much_is_not_vouched_for():
    payloads = encoded()
    slices = slices_of(payloads)
    mean = encoded_mean(INT4, slices, TOKENS, P - CHUNK)
    for evidence in (b"", b"".join(slices)[:-1], bytes(3 * len(slices[0]) + HEADER_BYTES_MAX + 5)):
        assert not is_vouched(*reduced(mean, evidence), INT4)
    record, part = reduced(mean, blob(basis_of(payloads), slices))
    bare = sign_part(KEYS[1], vouched(record, replace(part, evidence=None)))
    assert not is_vouched(record, bare, INT4)
    sparse = Packing(codec("sparse2"), codec("sparse2"))
    assert not is_vouched(record, sign_part(KEYS[1], vouched(record, part)), sparse)


def test_in_an_all_gather_a_part_is_the_update_that_its_member_signed_and_needs_no_evidence():
    packing = Packing(codec("sparse2"), codec("int4"))
    payload = packing.up.encode(np.random.default_rng(0).standard_normal(P).astype(np.float32))
    brought = Contribution(NODES[0], 100, (DataRange(0, "ab" * 32, 0, 5),), (), digest_of(payload))
    part = Part(0, 0, P, digest_of(payload), len(payload), NODES[0], (NODES[0],))
    record = Record(RUN, 7, HEAD, 5, NODES[0], (brought,), (), "cd" * 32, Exchange.ALL_GATHER)
    signed = sign_part(KEYS[0], vouched(record, part))
    check_part(record, signed, packing)
    other = replace(record, contributions=(replace(brought, update="ef" * 32),))
    assert not is_vouched(other, sign_part(KEYS[0], vouched(other, part)), packing)
    assert not is_vouched(record, part, packing)


def test_a_slice_is_signed_for_one_group_and_one_span():
    payload, group = encoded()[0], group_id(RUN, HEAD, 5, 0)
    first, second = sign_slices(KEYS[0], group, payload, (*SPANS[:1], (CHUNK, CHUNK)), INT4.up)
    assert second == ""
    good = Slice(group.hex(), 0, CHUNK, digest="")
    good = replace(good, digest=hashlib.sha256(payload[: INT4.up.encoded_bytes(CHUNK)]).hexdigest())
    check_slice(NODES[0], good, first)
    for other in (replace(good, group="00" * 32), replace(good, start=CHUNK), replace(good, digest="00" * 32)):
        with pytest.raises(Refused):
            check_slice(NODES[0], other, first)
    with pytest.raises(Refused):
        check_slice(NODES[1], good, first)
