"""Signed letters between peers: a message, who wrote it, and the proof. Knows nothing of how they travel."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from protocol import canonical
from protocol.errors import Code, Refused
from protocol.identity import Key, verify
from protocol.limits import MEMBERS_MAX
from protocol.log import check_contributions
from protocol.messages import (
    Begin,
    Claim,
    Commit,
    LogReply,
    LogRequest,
    Message,
    Propose,
    Ready,
    SignedReady,
    Vote,
)
from protocol.types import NodeId, Record
from protocol.v1 import barnraise_pb2 as wire

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Ready, Begin, Claim, Propose, Vote, Commit, LogRequest, LogReply)
}
_PURPOSE = "peer-message"


def seal(key: Key, message: Message) -> tuple[bytes, str]:
    """The letter's bytes, and the signature inside it."""
    kind, body = type(message).__name__, canonical.to_bytes(message)
    signature = key.sign(_PURPOSE, _signed(kind, body))
    envelope = wire.PeerEnvelope(sender=message.sender, kind=kind, body=body, signature=bytes.fromhex(signature))
    return envelope.SerializeToString(), signature


def unseal(letter: bytes) -> tuple[Message, str]:
    """The message in a letter and its signature. Refused unless its sender wrote it, every promise that it quotes is
    genuine, and its lists are no longer than honest ones."""
    try:
        envelope = wire.PeerEnvelope.FromString(letter)
    except DecodeError:
        raise Refused(Code.FIELD, "a letter that is not one") from None
    kind = _KINDS.get(envelope.kind)
    if kind is None:
        raise Refused(Code.FIELD, f"a letter of kind {canonical.shown(envelope.kind)!r}")
    signature = envelope.signature.hex()
    verify(envelope.sender, _PURPOSE, _signed(envelope.kind, envelope.body), signature)
    message: Message = canonical.from_bytes(kind, envelope.body)
    if message.sender != envelope.sender:
        raise Refused(Code.SIGNATURE, "a letter whose sender is not its author")
    _check_bounds(message)
    if isinstance(message, Begin):
        for signed in message.readies:
            _check_promise(signed)
    return message, signature


def addressed(letter: bytes, to: NodeId) -> bytes:
    """The same letter, to be passed on by whoever gets it."""
    envelope = wire.PeerEnvelope.FromString(letter)
    envelope.to = to
    return envelope.SerializeToString()


def addressee(letter: bytes) -> NodeId:
    """Who a letter is to be passed on to; empty for whoever gets it."""
    return NodeId(wire.PeerEnvelope.FromString(letter).to)


def _check_bounds(message: Message) -> None:
    """Refuse what no honest member writes: each promise, vote and contribution costs its readers a signature check."""
    said: list[NodeId] = []
    match message:
        case Begin():
            said = [signed.ready.sender for signed in message.readies]
        case Commit():
            said = [signature.node for signature in message.certificate.signatures]
    if len(said) > MEMBERS_MAX or len(set(said)) != len(said):
        raise Refused(Code.FIELD, f"{len(said)} promises or votes, expected up to {MEMBERS_MAX} of distinct members")
    for record in _uncertified(message):
        check_contributions(record)


def _uncertified(message: Message) -> Iterator[Record]:
    match message:
        case Ready():
            if message.accepted is not None:
                yield message.accepted.record
        case Begin():
            for signed in message.readies:
                yield from _uncertified(signed.ready)
        case Propose():
            yield message.record
            if message.accepted is not None:
                yield message.accepted.record


def _check_promise(signed: SignedReady) -> None:
    body = canonical.to_bytes(signed.ready)
    verify(signed.ready.sender, _PURPOSE, _signed(Ready.__name__, body), signed.signature)
    if signed.ready.contribution.node != signed.ready.sender:
        raise Refused(Code.FIELD, "a promise that brings somebody else's contribution")


def _signed(kind: str, body: bytes) -> bytes:
    return kind.encode() + b"\0" + body
