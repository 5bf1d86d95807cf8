"""Who said it: Ed25519 keys, and signatures that are good for one purpose only. Knows no sockets and no clock."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol import canonical
from protocol.errors import Code, Refused
from protocol.limits import MEMBERS_MAX
from protocol.types import (
    Digest,
    Manifest,
    NodeId,
    Pass,
    PeerId,
    Rollback,
    Roster,
    RunId,
    SignedManifest,
    SignedPass,
    SignedRollback,
    SignedRoster,
)

RUN_NAME: Final = r"[a-z0-9][a-z0-9-]{0,39}"  # safe as a folder, in a URL and on a status line

_DOMAIN: Final = b"barnraise/1\0"  # a signature of ours means nothing to any other program, and theirs nothing to us
_KEY_FILE_BYTES_MAX: Final = 1 << 14  # a private key in PEM takes some 120 bytes
_PUBLIC: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
_PURPOSE: Final = re.compile(r"[a-z][a-z-]*")
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True)
class Ticket:
    """A permission that ends: so many uses of one token, until a time, bound to whatever else was promised with it."""

    run: RunId
    token: str  # hex of 16 random bytes: the nonce that tells tickets apart
    uses: int
    expires_ms: int
    binds: Digest  # digest of what the ticket travels with; changing that voids the ticket


@dataclass(frozen=True)
class SignedTicket:
    ticket: Ticket
    signature: str  # hex; the coordinator's, purpose "ticket"


class Key:
    """An Ed25519 private key. Its public half is a name: a node's id, or the first part of a run's."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_bytes = private.public_key().public_bytes_raw()
        self.public = NodeId(self.public_bytes.hex())

    def __repr__(self) -> str:
        return f"Key({self.public})"

    @classmethod
    def generate(cls) -> Key:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Key:
        """The key in this file. A missing file is made, whole or not at all; a bad one is refused, never replaced."""
        with suppress(FileNotFoundError):
            return cls(_ed25519(path, read_private(path)))
        create_private(path, _pem(Ed25519PrivateKey.generate()))
        try:
            return cls(_ed25519(path, read_private(path)))  # when two starts race, both get the first one's key
        except FileNotFoundError:
            raise Refused(Code.KEY_UNUSABLE, f"{path} is a link to a file that is missing") from None

    def sign(self, purpose: str, body: bytes) -> str:
        return self._private.sign(_signed_bytes(purpose, body)).hex()

    def private_bytes(self) -> bytes:
        """The 32-byte seed. It leaves this process only as p2pd's identity file."""
        return self._private.private_bytes_raw()


def verify(public: str, purpose: str, body: bytes, signature: str) -> None:
    """Refuses unless the holder of this public key (hex) signed exactly this body for exactly this purpose."""
    if not _PUBLIC.fullmatch(public) or not _SIGNATURE.fullmatch(signature):
        raise Refused(Code.SIGNATURE, f"a {purpose} whose key or signature is not hex of the right length")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _signed_bytes(purpose, body))
    except (InvalidSignature, ValueError):
        raise Refused(Code.SIGNATURE, f"the {purpose} was not signed by {public[:16]}…") from None


def run_id(coordinator: str, name: str) -> RunId:
    """A run is named by its coordinator's key, so nobody else can speak for it."""
    return check_run_id(f"{coordinator}.{name}")


def check_run_id(text: str) -> RunId:
    if not re.fullmatch(rf"{_PUBLIC.pattern}\.{RUN_NAME}", text):
        raise Refused(Code.FIELD, f"run id {canonical.shown(text)!r}, wanted a key of 64 hex digits, a dot and a name")
    return RunId(text)


def coordinator_key(run: RunId) -> NodeId:
    """The public key (hex) that signs for this run."""
    return NodeId(check_run_id(run).partition(".")[0])


def sign_roster(key: Key, roster: Roster) -> SignedRoster:
    return SignedRoster(roster, key.sign("roster", canonical.to_bytes(roster)))


def check_roster(coordinator: str, signed: SignedRoster) -> Roster:
    """The roster, if this coordinator signed it and no node or peer is in it twice."""
    roster = signed.roster
    _check(coordinator, "roster", roster.run, roster, signed.signature)
    if len(roster.members) > MEMBERS_MAX:
        raise Refused(Code.LIMIT, f"a roster of {len(roster.members)} members, at most {MEMBERS_MAX} are allowed")
    peers = {member.peer for member in roster.members}
    if len(set(roster.nodes)) != len(roster.members) or len(peers) != len(roster.members):
        raise Refused(Code.FIELD, f"the roster of epoch {roster.epoch} names a node or a peer twice")
    return roster


def sign_rollback(key: Key, rollback: Rollback) -> SignedRollback:
    return SignedRollback(rollback, key.sign("rollback", canonical.to_bytes(rollback)))


def check_rollback(coordinator: str, signed: SignedRollback) -> Rollback:
    """The rollback, if this coordinator signed it and it goes backwards."""
    rollback = signed.rollback
    _check(coordinator, "rollback", rollback.run, rollback, signed.signature)
    if rollback.number < 1 or not 0 <= rollback.to.round <= rollback.undone.round:
        what = f"rollback {rollback.number} from round {rollback.undone.round} to {rollback.to.round}"
        raise Refused(Code.FIELD, what)
    return rollback


def sign_manifest(key: Key, manifest: Manifest) -> SignedManifest:
    return SignedManifest(manifest, key.sign("manifest", canonical.to_bytes(manifest)))


def check_manifest(coordinator: str, signed: SignedManifest) -> Manifest:
    """The manifest, if this coordinator signed it and it describes the run that it names."""
    manifest = signed.manifest
    _check(coordinator, "manifest", manifest.run, manifest, signed.signature)
    if manifest.run != run_id(coordinator, manifest.name):
        raise Refused(Code.FIELD, "the manifest's name is not the one in its run id")
    return manifest


def sign_pass(key: Key, body: Pass) -> SignedPass:
    return SignedPass(body, key.sign("pass", canonical.to_bytes(body)))


def check_pass(coordinator: str, signed: SignedPass, now_ms: int) -> Pass:
    """The pass, if this coordinator signed it and its time has not run out."""
    body = signed.body
    _check(coordinator, "pass", body.run, body, signed.signature)
    if body.expires_ms <= now_ms:
        raise Refused(Code.EXPIRED, f"the pass ended {(now_ms - body.expires_ms) // 1000} s ago")
    return body


def sign_ticket(key: Key, ticket: Ticket) -> SignedTicket:
    return SignedTicket(ticket, key.sign("ticket", canonical.to_bytes(ticket)))


def check_ticket(coordinator: str, signed: SignedTicket, now_ms: int) -> Ticket:
    """The ticket, if this coordinator signed it and its time has not run out. Counting its uses is a store's work."""
    ticket = signed.ticket
    _check(coordinator, "ticket", ticket.run, ticket, signed.signature)
    if ticket.expires_ms <= now_ms:
        raise Refused(Code.EXPIRED, f"the ticket ended {(now_ms - ticket.expires_ms) // 1000} s ago")
    return ticket


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of an Ed25519 key: base58 of an identity multihash of the protobuf public key."""
    assert len(public_key) == 32, "an Ed25519 public key has 32 bytes"
    return PeerId(_base58(b"\x00\x24" + b"\x08\x01\x12\x20" + public_key))


def libp2p_private_key_bytes(key: Key) -> bytes:
    """What p2pd reads with -id: protobuf PrivateKey{Type: Ed25519, Data: seed and public key}."""
    return b"\x08\x01\x12\x40" + key.private_bytes() + key.public_bytes


def create_private(path: Path, data: bytes) -> None:
    """Put a secret where only its owner can read it. A file that is already there stays as it is."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # O_EXCL and 0600
    new = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(new, path)  # unlike a rename, never replaces
        except FileExistsError:
            return
        except OSError:  # a file system without hard links, such as exFAT
            if not path.exists():
                new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_private(path: Path) -> bytes:
    """A secret's bytes, refused when others could have read them before us. FileNotFoundError is the caller's."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not wait
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Refused(Code.KEY_UNUSABLE, f"{path} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(Code.KEY_UNUSABLE, f"{path} is not a plain file")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise Refused(Code.KEY_READABLE, f"{path} has mode {mode:04o}, so others can read it; wanted 0600")
        data = os.read(handle, _KEY_FILE_BYTES_MAX + 1)
    finally:
        os.close(handle)
    if len(data) > _KEY_FILE_BYTES_MAX:
        raise Refused(Code.KEY_UNUSABLE, f"{path} is over {_KEY_FILE_BYTES_MAX} bytes, so it is not a key")
    return data


def _ed25519(path: Path, data: bytes) -> Ed25519PrivateKey:
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise Refused(Code.KEY_UNUSABLE, f"{path} is encrypted; wanted an Ed25519 key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise Refused(Code.KEY_UNUSABLE, f"{path} holds no whole private key in PEM") from None
    if not isinstance(private, Ed25519PrivateKey):
        kind = type(private).__name__.removesuffix("PrivateKey").removeprefix("_")
        raise Refused(Code.KEY_UNUSABLE, f"{path} holds a key of type {kind}, wanted Ed25519")
    return private


def _pem(private: Ed25519PrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _check(coordinator: str, purpose: str, run: RunId, body: object, signature: str) -> None:
    verify(coordinator, purpose, canonical.to_bytes(body), signature)
    if coordinator_key(run) != coordinator:
        raise Refused(Code.SIGNATURE, f"the {purpose} is of a run that its signer does not own")


def _signed_bytes(purpose: str, body: bytes) -> bytes:
    assert _PURPOSE.fullmatch(purpose), f"purpose {purpose!r} is not a word"
    return _DOMAIN + purpose.encode() + b"\0" + hashlib.sha256(body).digest()


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text
