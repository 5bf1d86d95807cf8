"""An invite: one line that says where a coordinator is, how to know it, and that its bearer may join."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from protocol import address, canonical, identity
from protocol.errors import Code, Refused
from protocol.identity import Key, SignedTicket, Ticket
from protocol.limits import ADDRESSES_MAX
from protocol.types import RunId

PREFIX: Final = "barnraise:"

_FORMAT: Final = 1
_TEXT_CHARACTERS_MAX: Final = 8192  # 8 addresses of 253 characters make 3,700; the rest is line wraps
_CHECK_BYTES: Final = 4  # one in 4 billion mistypings passes, and then meets the signature
_USES_MAX: Final = 65535
_MS_END: Final = 253402300800000  # the year 10000, where dates stop
_NOISE: Final = re.compile(r"[\s\u00ad\u200b\u2060\ufeff]+")  # what mail and chat programs add when they wrap a line
_CHARACTERS: Final = re.compile(r"[a-z2-7]*")


@dataclass(frozen=True)
class Invite:
    """What a researcher gives to a volunteer. Everything in it is bound by the coordinator's signature."""

    addresses: tuple[str, ...]  # host:port
    fingerprint: str  # hex SHA-256 of the coordinator's TLS certificate
    coordinator: str  # hex of the coordinator's public key
    name: str  # of the run
    token: str  # hex of 16 random bytes
    uses: int
    expires_ms: int
    signature: str

    @property
    def run(self) -> RunId:
        return identity.run_id(self.coordinator, self.name)

    @property
    def ticket(self) -> SignedTicket:
        """The part that a coordinator honours; it binds the rest."""
        binds = canonical.digest({"addresses": self.addresses, "fingerprint": self.fingerprint})
        return SignedTicket(Ticket(self.run, self.token, self.uses, self.expires_ms, binds), self.signature)

    def expired(self, now_ms: int) -> bool:
        return self.expires_ms <= now_ms


def issue(
    key: Key, *, addresses: tuple[str, ...], fingerprint: str, name: str, token: bytes, uses: int, expires_ms: int
) -> Invite:
    """An invite signed by its coordinator. `token` is 16 bytes that nobody can guess."""
    assert len(token) == 16, "16 random bytes tell invites apart"
    assert 1 <= uses <= _USES_MAX, f"1 to {_USES_MAX} uses"
    assert 0 < expires_ms < _MS_END, "an invite ends before the year 10000"
    addresses = tuple(str(address.parse(text) or text) for text in addresses)
    _check_addresses(addresses)
    unsigned = Invite(addresses, fingerprint, key.public, name, token.hex(), uses, expires_ms, "")
    return replace(unsigned, signature=identity.sign_ticket(key, unsigned.ticket.ticket).signature)


def encode(invite: Invite) -> str:
    """One word of letters and digits that survives mail, chat and reading aloud."""
    body = b"".join(
        (
            bytes([_FORMAT]),
            bytes.fromhex(invite.coordinator),
            bytes.fromhex(invite.fingerprint),
            bytes.fromhex(invite.token),
            invite.uses.to_bytes(2, "big"),
            invite.expires_ms.to_bytes(6, "big"),
            bytes.fromhex(invite.signature),
            _short(invite.name),
            bytes([len(invite.addresses)]),
            *(_short(text) for text in invite.addresses),
        )
    )
    return PREFIX + base64.b32encode(body + _check_digits(body)).decode().rstrip("=").lower()


def decode(text: str) -> Invite:
    """The invite in this text, whole and signed by the coordinator it names. Says nothing of its age."""
    body = _body(text)
    if body[0] != _FORMAT:
        raise Refused(Code.VERSION, f"an invite of format {body[0]}, this program reads format {_FORMAT}")
    reader = _Reader(body[1:])
    coordinator, fingerprint, token = reader.take(32).hex(), reader.take(32).hex(), reader.take(16).hex()
    uses, expires_ms = reader.number(2), reader.number(6)
    signature, name = reader.take(64).hex(), reader.short()
    addresses = tuple(reader.shorts())
    reader.end()
    if not re.fullmatch(identity.RUN_NAME, name) or not uses or not 0 < expires_ms < _MS_END:
        raise _malformed("a field is out of its range")
    invite = Invite(addresses, fingerprint, coordinator, name, token, uses, expires_ms, signature)
    _check_addresses(addresses)
    _check_signature(invite)
    return invite


def check(invite: Invite, *, now_ms: int, allow_private: bool = False) -> None:
    """Refuses an invite that is over, or that points into the volunteer's own link (cloud metadata services)."""
    if invite.expired(now_ms):
        ended = datetime.fromtimestamp(invite.expires_ms / 1000, UTC)
        here = datetime.fromtimestamp(min(now_ms, _MS_END - 1) / 1000, UTC)
        what = (
            f"the invite expired on {ended:%Y-%m-%d at %H:%M} UTC, and this machine's clock says {here:%Y-%m-%d, %H:%M}"
        )
        raise Refused(Code.INVITE_EXPIRED, what)
    for text in invite.addresses:
        found = address.parse(text)
        if found is not None and found.link_local and not allow_private:
            what = f"the invite names {text}, which is inside your own network"
            raise Refused(Code.INVITE_FORGED, what, fix="Do not use this invite, unless you know why: --allow-private")


def _body(text: str) -> bytes:
    """The checked bytes behind the text, its check digits removed."""
    if len(text) > _TEXT_CHARACTERS_MAX:
        raise _malformed(f"a text of over {_TEXT_CHARACTERS_MAX} characters")
    word = _NOISE.sub("", text).strip("\"'`<>").lower()
    if not word.startswith(PREFIX):
        what = f"{canonical.shown(word[:24])!r} is not an invite" if word else "there is no invite"
        raise _malformed(f"{what}; an invite starts with {PREFIX}")
    word = word.removeprefix(PREFIX)
    good = _CHARACTERS.match(word)
    if good is not None and good.end() < len(word):
        raise Refused(
            Code.INVITE_MISTYPED,
            f"no invite holds {canonical.shown(word[good.end()])!r}, the character {good.end() + 1} after {PREFIX}",
        )
    try:
        data = base64.b32decode(word.upper() + "=" * (-len(word) % 8))
    except ValueError:  # a length that no bytes have
        data = b""
    body, digits = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    again = base64.b32encode(data).decode().rstrip("=").lower()
    if not body or digits != _check_digits(body) or again != word:
        raise Refused(Code.INVITE_MISTYPED, "the invite's check digits do not fit: something is missing or changed")
    return body


class _Reader:
    """Takes fields off bytes that passed the check digits, and may still be anybody's."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self, size: int) -> bytes:
        if len(self._data) < size:
            raise _malformed("the invite ends too early")
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def short(self) -> str:
        try:
            return self.take(self.number(1)).decode("ascii")
        except UnicodeDecodeError:
            raise _malformed("a name in it is not plain ASCII") from None

    def shorts(self) -> Iterator[str]:
        for _ in range(self.number(1)):
            yield self.short()

    def end(self) -> None:
        if self._data:
            raise _malformed(f"the invite goes on for {len(self._data)} bytes after its end")


def _check_addresses(addresses: tuple[str, ...]) -> None:
    if not 1 <= len(addresses) <= ADDRESSES_MAX:
        raise _malformed(f"an invite names 1 to {ADDRESSES_MAX} addresses, not {len(addresses)}")
    for text in addresses:
        found = address.parse(text)
        if found is None or str(found) != text:
            raise _malformed(f"{canonical.shown(text)!r} is not host:port")
        if found.unspecified:
            raise _malformed(f"{text} is not an address that others can connect to")


def _check_signature(invite: Invite) -> None:
    signed = invite.ticket
    try:
        identity.verify(invite.coordinator, "ticket", canonical.to_bytes(signed.ticket), signed.signature)
    except Refused:
        raise Refused(Code.INVITE_FORGED, "the invite was not signed by the coordinator that it names") from None


def _malformed(what: str) -> Refused:
    return Refused(Code.INVITE_MALFORMED, what)


def _short(text: str) -> bytes:
    data = text.encode("ascii")
    return bytes([len(data)]) + data


def _check_digits(body: bytes) -> bytes:
    return hashlib.sha256(b"barnraise invite\0" + body).digest()[:_CHECK_BYTES]
