"""What reads a stranger's bytes, each as a function of bytes that ends well or fails.

It ends well when the bytes were taken or refused by name. What a signature or a checksum would hold back is signed or
summed here, so that what lies behind it is reached too. An input may begin with a line of its own that says how to read
the rest, such as the name of a type.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import gzip
import hashlib
import io
import json
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from structlog.testing import capture_logs

from coordinator import documents, service
from coordinator.tokenizer import Tokenizer, byte_tokenizer
from node import config, control, journal, letters, link
from node.progress import MAGIC, ProgressFile
from node.standing import Standing
from protocol import (
    address,
    blobs,
    canonical,
    console,
    contribution,
    identity,
    invite,
    log,
    process,
    proof,
    runspec,
    state,
    tls,
)
from protocol.codec import NAMES, codec
from protocol.errors import Refused
from protocol.evidence import SLICE, Basis, Slice, check_reduction, group_id, sign_part, vouched
from protocol.exchange import Packing
from protocol.messages import Begin
from protocol.proof import Evidence
from protocol.types import (
    BaseCheckpoint,
    BlobRef,
    Contribution,
    DataRange,
    Digest,
    Grant,
    Lease,
    LogEntry,
    Manifest,
    Part,
    Pass,
    Record,
    Rollback,
    Roster,
    Signature,
)
from protocol.v1 import barnraise_pb2 as wire
from tests import strategies
from tests.fuzz import liar
from tests.strategies import CANONICAL, KEY, NOW_MS, PEER, RUN

PARAMETERS = 70  # of the checkpoints here: over one block of a codec
_SENTENCE_CHARACTERS_MAX = 1000  # of a refusal: some lines of a terminal
_DOOR = link.Door(("127.0.0.1:1",), "0" * 64, RUN)


@dataclass(frozen=True)
class Target:
    """One reader. `seeds` makes inputs that it mostly takes."""

    name: str
    read: Callable[[bytes], None]
    seeds: st.SearchStrategy[bytes]


TARGETS: dict[str, Target] = {}


def target(seeds: st.SearchStrategy[bytes]) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def register(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
        name = read.__name__
        TARGETS[name] = Target(name, lambda data: _by_name(read, data), seeds)
        return read

    return register


def _by_name(read: Callable[[bytes], None], data: bytes) -> None:
    """A refusal is one line that a terminal can show; anything else that comes out is a finding."""
    try:
        read(data)
    except Refused as refused:
        assert refused.what.isprintable(), f"a refusal with control characters: {refused.what[:200]!r}"
        assert len(refused.what) <= _SENTENCE_CHARACTERS_MAX, f"a refusal of {len(refused.what)} characters"


def _split(data: bytes) -> tuple[str, bytes]:
    head, _, body = data.partition(b"\n")
    return head.decode("utf-8", "replace"), body


@cache
def _scratch() -> Path:
    """A folder in memory where there is one: each input writes files."""
    root = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="barnraise-fuzz-", dir=root if root.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# canonical values


def _named(name: str, value: object) -> bytes:
    return name.encode() + b"\n" + canonical.to_bytes(value)


@target(strategies.canonical_values.map(lambda value: _named(type(value).__name__, value)))
def value(data: bytes) -> None:
    """Any type that has canonical bytes: what is read is written as the same bytes, and then checked by what it means."""
    name, body = _split(data)
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
                log.check_brought(_brought_by_us(found))
            log.check_ranges(found, state.Consumed())
            consumed = state.Consumed().with_ranges(log.ranges_of(found))
            assert all(consumed.covers(span) for span in log.ranges_of(found))
        case LogEntry():
            roster = Roster(RUN, found.certificate.ballot.epoch, (), 0)
            log.is_certified(found, roster)
            _meaning(found.record)
        case Contribution():
            contribution.check_shape(found)
            contribution.is_genuine(RUN, 0, Digest("0" * 64), _granted(found))
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


def _brought_by_us(record: Record) -> Record:
    return replace(record, contributions=tuple(map(_granted, record.contributions)))


def _granted(brought: Contribution) -> Contribution:
    """With grants that the coordinator has signed, by a member that has signed it all."""
    grants = (Grant(each.range, contribution.sign_grant(KEY, RUN, KEY.public, each.range)) for each in brought.grants)
    ours = replace(brought, node=KEY.public, grants=tuple(grants))
    return contribution.sign(KEY, RUN, 0, Digest("0" * 64), ours)


@target(strategies.canonical_values.map(lambda value: _named(type(value).__name__, value)))
def letter(data: bytes) -> None:
    """What a member may write, signed by itself; and bytes that are no letter at all."""
    name, body = _split(data)
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


@target(strategies.of(Evidence).map(lambda each: b"said\n" + canonical.to_bytes(each)))
def report(data: bytes) -> None:
    """What one node tells of another, as if the other had signed all of it; and what a reducer's mean was made of."""
    _, body = _split(data)
    evidence = canonical.from_bytes(Evidence, body)
    record = evidence.record and _brought_by_us(evidence.record)
    digest = record and log.record_hash(record)
    said, other = (each and _said_by_us(each, digest) for each in (evidence.said, evidence.other))
    found = proof.prove(Evidence(said, other, record), RUN)
    assert found.node == KEY.public and found.what.isprintable()


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


def _certificate() -> bytes:
    """One that `RUN` endorses; it was found with another version in it."""
    found = (Path(__file__).with_name("found") / "certificate" / "of-version-6").read_bytes()
    return found.replace(bytes.fromhex("a003020105"), bytes.fromhex("a003020102"), 1)


@target(st.builds(_certificate))
def certificate(data: bytes) -> None:
    """What a server shows before anybody knows who it is."""
    number = tls.endorsed(data, RUN)
    assert number >= 0
    with suppress(Refused):
        tls.fingerprint(data)


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


# invites, addresses, what people type


@target(
    st.builds(
        lambda places, uses, name: invite.encode(
            invite.issue(
                KEY,
                addresses=tuple(places),
                fingerprint="0" * 64,
                name=name,
                token=b"\2" * 16,
                uses=uses,
                expires_ms=NOW_MS,
            )
        ).encode(),
        st.lists(strategies.addresses, min_size=1, max_size=8),
        st.integers(1, 65535),
        st.from_regex(identity.RUN_NAME, fullmatch=True),
    ).map(lambda text: b"text\n" + text)
)
def invitation(data: bytes) -> None:
    """An invite as text; or, after `body`, the bytes behind a text whose check digits fit."""
    how, body = _split(data)
    if how == "text":
        text = body.decode("utf-8", "replace")
    else:
        whole = body + invite._check_digits(body)
        text = invite.PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()
    found = invite.decode(text)
    assert invite.decode(invite.encode(found)) == found
    invite.check(found, now_ms=0)


@target(
    strategies.addresses.map(str.encode) | st.just(b"/ip4/10.0.0.1/tcp/4001") | st.just(b"5 GiB") | st.just(b"1h30m")
)
def typed(data: bytes) -> None:
    """Words that people type: addresses, sizes, spans of time, names; and multiaddrs that nodes say."""
    text = data[:2000].decode("utf-8", "replace")
    found = address.parse(text)
    if found is not None:
        assert address.parse(str(found)) == found
        assert isinstance(found.unspecified, bool) and isinstance(found.link_local, bool)
    if service._is_address(text):
        assert text.isascii() and text.startswith("/ip")
    name = service.distinct_name(text, KEY.public, ("keen-otter",))
    assert name and name.isprintable() and len(name) <= 40
    assert service.visible(service.visible(text)) == service.visible(text)
    for parse in (console.parse_size, console.parse_duration):
        with suppress(Refused):
            assert parse(text) > 0
    assert console.printable(text).isprintable()
    blobs.check_digest(text)


@target(st.sampled_from(("threads = 2", 'max_disk = "5GB"', 'name = "keen"\nlisten = "0.0.0.0:4000"')).map(str.encode))
def owners_file(data: bytes) -> None:
    """config.toml, written by the owner."""
    home = config.Home(_scratch())
    home.config.write_bytes(data)
    found = config.settings(home, {}, {})
    assert found.threads is None or 1 <= found.threads <= config.THREADS_MAX


@target(st.just(b'{"version": 1, "invite": "barnraise:aa"}\n'))
def membership(data: bytes) -> None:
    home = config.Home(_scratch())
    home.membership.write_bytes(data)
    home.remembered()


@target(
    st.sampled_from((b'{"verb":"pause","arguments":{"seconds":5}}\n', b'{"verb":"leave","arguments":{"purge":true}}\n'))
)
def question(data: bytes) -> None:
    """What comes through the node's own socket, and what its answer is read as."""
    with suppress(Refused):
        control._request(data)
    control._result(data, Path("/"))


# run files and models


_SPEC = runspec.parse('[run]\nname = "fuzz"')


@target(
    st.sampled_from(
        (
            runspec.template("fuzz"),
            '[run]\nname = "a"\n[data]\ncontext = 8\n',
            '[run]\nname = "b"\n[model.config]\nx = [[1]]\n',
        )
    )
    .map(str.encode)
    .map(lambda text: b"toml\n" + text)
    | st.just(b"json\n" + _SPEC.to_json().encode())
)
def run_file(data: bytes) -> None:
    """A run file, and the form of it that a manifest carries."""
    how, body = _split(data)
    text = body.decode("utf-8", "replace")
    spec = runspec.RunSpec.from_json(text) if how == "json" else runspec.parse(text)
    assert runspec.RunSpec.from_json(spec.to_json()) == spec
    assert 0 < spec.rate_share(0) <= 1 and spec.rounds.steps(0) >= 1


_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 257,
}


@target(
    st.sampled_from(("llama", "gpt2", "mamba", "mixtral", "qwen3", "gemma3_text")).map(
        lambda name: json.dumps({"model_type": name, **_LLAMA}, sort_keys=True).encode()
    )
)
def model(data: bytes) -> None:
    """A model's config as a manifest carries it; nothing is built, for that takes seconds."""
    from protocol import model as models

    config_of = models._from_json(data.decode("utf-8", "replace"))
    text = models._to_json(config_of)
    assert models._to_json(models._from_json(text)) == text


@target(st.just(byte_tokenizer().json))
def tokenizer(data: bytes) -> None:
    found = Tokenizer(data)
    ids = found.encode("a b\n1")
    assert all(0 <= each < found.vocabulary for each in ids)
    found.decode(ids)


# tensors


@target(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 5000), st.integers(0, 2**32 - 1)).map(
        lambda drawn: (
            b"%s %d\n" % (drawn[0].encode(), drawn[1])
            + codec(drawn[0]).encode(np.random.default_rng(drawn[2]).standard_normal(drawn[1]).astype(np.float32))
        )
    )
)
def update(data: bytes) -> None:
    """A part of an update: taken by `check` if and only if by every way to decode it, and to the same finite values."""
    head, body = _split(data)
    name, _, count = head.partition(" ")
    if name not in NAMES or not count.isascii() or not count.isdigit() or len(count) > 6:
        return
    chosen, values = codec(name), int(count)
    try:
        chosen.check(body, values)
    except Refused:
        for decode in (chosen.decode, lambda *given: list(chosen.decode_chunks(*given))):
            try:
                decode(body, values)
            except Refused:
                continue
            raise AssertionError("decoded what check refuses") from None
        raise
    found = chosen.decode(body, values)
    assert np.isfinite(found).all()
    pieces = [piece.copy() for _, piece in chosen.decode_chunks(body, values)]
    assert np.array_equal(np.concatenate(pieces) if pieces else np.empty(0, np.float32), found)
    again = chosen.encode(found)
    assert chosen.encode(chosen.decode(again, values)) == again


def _base_file() -> bytes:
    path = _scratch() / "seed"
    spans = (DataRange(0, Digest("5" * 64), 0, 4), DataRange(1, Digest("a" * 64), 8, 16))
    whole = state.State(3, np.ones(PARAMETERS, np.float32), np.zeros(PARAMETERS, np.float32))
    whole.consumed = whole.consumed.with_ranges(spans)
    state.write_base(path, whole)
    found = path.read_bytes()
    return b"header\n" + found[8 : 8 + struct.unpack("<Q", found[:8])[0]]


@target(st.builds(_base_file))
def checkpoint(data: bytes) -> None:
    """A base checkpoint: after `header`, its JSON with tensors of the right size behind it; else the whole file."""
    how, body = _split(data)
    if how == "header":
        body = struct.pack("<Q", len(body)) + body + bytes(8 * PARAMETERS)
    path = _scratch() / "base"
    path.write_bytes(body)
    found = state.read_base(path, parameters=PARAMETERS, momentum=True, digest=Digest("0" * 64))
    raise AssertionError(f"a state of another digest was taken: {found.round}")


@target(strategies.of(CANONICAL["Progress"]).map(lambda each: b"header\n" + canonical.to_bytes(each)))
def saved_progress(data: bytes) -> None:
    """The file of local progress: after `header`, its header with right values and a right sum; else the whole file."""
    how, body = _split(data)
    if how == "header":
        body = MAGIC + struct.pack("<Q", len(body)) + body + bytes(4 * PARAMETERS)
        body += hashlib.sha256(body).digest()
    path = _scratch() / "progress"
    path.write_bytes(body)
    with capture_logs():  # where a refusal goes: without the file the node starts all the same
        found = ProgressFile(path, PARAMETERS, room=lambda size: True, now=0.0).load()
    assert found is None or found[1].size == PARAMETERS


@target(strategies.of(Standing).map(lambda each: b"sum\n" + canonical.to_bytes(each)))
def standing(data: bytes) -> None:
    """What a node keeps for a start without its coordinator."""
    how, body = _split(data)
    path = _scratch() / "standing"
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body if how == "sum" else body)
    with capture_logs():
        Standing.load(path, _DOOR, node=KEY.public, peer=PEER)


_JOURNAL = {
    "promise.json": "Promise",
    "base.json": "BaseCheckpoint",
    "log/00000003.json": "LogEntry",
    "rosters/00000001.json": "SignedRoster",
    "rollbacks/0001.json": "SignedRollback",
}


@target(
    st.sampled_from(sorted(_JOURNAL)).flatmap(
        lambda name: strategies.of(CANONICAL[_JOURNAL[name]]).map(lambda each: _named(name, each))
    )
    | st.just(b'silence.json\n{"epoch":1}')
)
def diary(data: bytes) -> None:
    """A node's journal with one file of it changed."""
    name, body = _split(data)
    if name not in (*_JOURNAL, "silence.json", "seal.json"):
        return
    folder = _scratch() / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    found = journal.Journal(folder)
    (folder / name).write_bytes(body)
    found.rosters(), found.rollbacks(), found.base(), found.silence(), found.sealed()
    found.entries(3, most=2)
    found.promise(log.next_head(found.entry(3).record) if found.entry(3) else log.Head(0, Digest("0" * 64)))


# blobs


_CHUNK_BYTES = 1000  # for 256 KiB, so that a hundred times as many downloads are seen
_BLOB = Random(0).randbytes(4 * _CHUNK_BYTES)


@target(
    st.tuples(st.integers(0, len(_BLOB)), st.integers(0, 1)).map(lambda drawn: b"%d %d\n" % drawn + bytes((0, 1, 2, 3)))
)
def download(data: bytes) -> None:
    """A blob on its way in: the rest of the input says what comes, in pieces right and wrong, cut and begun again.

    Whatever happened, what is in the store then is the blob, and the store knows its own size."""
    head, script = _split(data)
    words = head.split(" ")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 8 for word in words):
        return
    with mock.patch.object(blobs, "BLOB_CHUNK_BYTES", _CHUNK_BYTES):
        _download(_BLOB[: int(words[0])], script, with_leaves=bool(int(words[1]) % 2))


def _download(whole: bytes, script: bytes, *, with_leaves: bool) -> None:
    digest, folder = blobs.digest_of(whole), _scratch() / "blobs"
    shutil.rmtree(folder, ignore_errors=True)
    store = blobs.BlobStore(folder)
    leaves = b"".join(blobs._leaf(whole[at : at + _CHUNK_BYTES]) for at in range(0, len(whole), _CHUNK_BYTES))
    if script[:1] == b"\xff":
        leaves = script[1:]
    writer = store.writer(digest, len(whole), leaves if with_leaves else None)
    for order in script[:64]:
        try:
            _advance(writer, order, whole)
        except Refused:
            writer.close()
        if not writer.is_open:
            writer = store.writer(digest, len(whole), leaves if with_leaves else None)
    with suppress(Refused):
        writer.write(whole[writer.position :], writer.position)
        writer.finish()
    writer.close()
    assert store.bytes_used == sum(blobs._file_sizes(folder))
    if store.has(digest):
        assert store.read(digest) == whole
        store.verify(digest)


def _advance(writer: blobs.Writer, order: int, whole: bytes) -> None:
    """One thing that a link can do to a download."""
    piece, at = (1, 100, _CHUNK_BYTES, _CHUNK_BYTES + 1)[order >> 3 & 3], writer.position
    match order & 7:
        case 0 | 1 | 2:
            writer.write(whole[at : at + piece], at)
        case 3:
            writer.write(b"\1" * piece, at)
        case 4:
            writer.write(whole[at : at + piece], at + 1)
        case 5:
            writer.close()
        case 6:
            writer.write(bytes(len(whole) + 1), at)
        case 7:
            writer.discard()


# frames between our own processes


def _frame(body: object, payload: bytes = b"") -> bytes:
    header = json.dumps(body).encode()
    return struct.pack("<IQ", len(header), len(payload)) + header + payload


@target(st.sampled_from((_frame({"a": 1}), _frame({"do": "average"}, b"xyz"), _frame({}) * 2)))
def frames(data: bytes) -> None:
    """What a child says to its parent: frames, and then the end of the channel."""

    async def read() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            theirs.sendall(data[: 64 << 10])
            theirs.shutdown(socket.SHUT_WR)
            channel = await process.Channel.over(ours)
            with suppress(process.ChannelClosed):
                while True:
                    assert isinstance((await channel.receive()).body, dict)
            channel.close()

    asyncio.run(read())


# what nodes say to the coordinator


_MESSAGES = {
    "Heartbeat": wire.HeartbeatRequest(activity="training", lease_ids=["1f"], addresses=["/ip4/10.0.0.1/tcp/1"]),
    "Open": wire.OpenRequest(node=KEY.public, name="keen", addresses=["/ip4/10.0.0.1/tcp/1"], software="x"),
}


@target(
    st.sampled_from(sorted(_MESSAGES)).map(lambda name: name.encode() + b"\n" + _MESSAGES[name].SerializeToString())
)
def fields(data: bytes) -> None:
    """The fields of a protobuf message from a node, which are checked before anything is done with them."""
    name, body = _split(data)
    if name not in _MESSAGES:
        return
    try:
        message = type(_MESSAGES[name]).FromString(body)
    except DecodeError:
        return
    if isinstance(message, wire.HeartbeatRequest):
        beat = service._beat(KEY.public, message, "10.0.0.1")
        json.dumps(replace(beat, node="").__dict__, allow_nan=False, default=str)  # it is shown on the page
    else:
        service._node(message.node)
        service._addresses(message.addresses)
        assert service.distinct_name(message.name, KEY.public, ()).isprintable()
        assert canonical.shown(message.software).isprintable()


# documents


def _parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


_LINES = b'{"text": "one"}\n{"id": 2, "text": "two \\u00e9"}\n'
_DOCUMENTS = {
    "txt": b"one\n\ntwo\n",
    "jsonl": _LINES,
    "jsonl.gz": gzip.compress(_LINES, mtime=0),
    "jsonl.zst": zstandard.compress(_LINES),
    "parquet": _parquet(["one", "two"]),
}


@target(st.sampled_from(sorted(_DOCUMENTS)).map(lambda kind: f"{kind}\n".encode() + _DOCUMENTS[kind]))
def corpus(data: bytes) -> None:
    """A file of documents. `+` before its kind packs the rest first; words after it are --skip-bad and --lossy."""
    head, body = _split(data)
    kind, *options = head.split(" ")
    if kind.lstrip("+") not in _DOCUMENTS:
        return
    pack = {"+jsonl.gz": gzip.compress, "+jsonl.zst": zstandard.compress}.get(kind)
    path = _scratch() / f"corpus.{kind.lstrip('+')}"
    path.write_bytes(pack(body) if pack else body)
    reader = documents.Reader(skip_bad="skip" in options, lossy="lossy" in options)
    for text in reader.documents(reader.find([path])):
        text.encode()
        assert "\0" not in text and not text.isspace()
