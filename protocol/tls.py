"""The coordinator's self-made TLS certificate. Its fingerprint in an invite is the pin; the run's key endorses the next.

The endorsement is in the certificate itself: a node whose pin no longer fits has it from the handshake, before it sends
anything.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol import canonical, identity
from protocol.address import Address
from protocol.errors import Code, Refused
from protocol.identity import Key, coordinator_key, create_private, read_private
from protocol.types import RunId

SERVER_NAME: Final = "barnraise"  # what clients ask for (grpc.ssl_target_name_override), whatever the address

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)  # a node whose clock is wrong can still check the pin
_NO_END: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280's "no well-defined expiration date"
_CERTIFICATE_BYTES_MAX: Final = 1 << 14  # ours take 1,500
_ENDORSEMENT: Final = x509.ObjectIdentifier("2.25.142390609227889344452350355881257510097")  # a UUID: nobody else's
_NO_CERTIFICATE: Final = (ValueError, x509.InvalidVersion)  # the second is none of the first
_NO_EXTENSION: Final = (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


@dataclass(frozen=True)
class Endorsement:
    """The run's word that a TLS key is its own. Of two, the higher number is the newer."""

    run: RunId
    number: int  # seconds since 1970 of its making, or one more than the last
    key: str  # hex SHA-256 of the public key's DER form


@dataclass(frozen=True)
class SignedEndorsement:
    endorsement: Endorsement
    signature: str  # hex; the coordinator's, purpose "endorsement"


@dataclass(frozen=True)
class Owner:
    """Whose certificates these are."""

    key: Key
    run: RunId
    now: int  # seconds since 1970


def make_certificate(path_key: Path, path_cert: Path, names: Iterable[str], owner: Owner) -> None:
    """Make the pair where it is missing. A pair that is there stays: its fingerprint is in invites."""
    if path_cert.exists():
        _check_pair(path_key, path_cert)
        return
    create_private(path_key, _pem(ec.generate_private_key(ec.SECP256R1())))  # BoringSSL's servers offer no Ed25519
    pair = _certificate(_private(path_key), names, owner, owner.now)
    create_private(path_cert, pair.public_bytes(serialization.Encoding.PEM))


def replace_certificate(path_key: Path, path_cert: Path, names: Iterable[str], owner: Owner) -> int:
    """Make a new pair in place of the old one; tells its number. A crash between the two is mended by another call."""
    try:
        older = x509.load_pem_x509_certificate(path_cert.read_bytes())
        number = max(owner.now, endorsed(older.public_bytes(serialization.Encoding.DER), owner.run) + 1)
    except (OSError, ValueError):
        number = owner.now
    new_key, new_cert = (path.with_name(f"{path.name}.new") for path in (path_key, path_cert))
    for left in (new_key, new_cert):
        left.unlink(missing_ok=True)
    create_private(new_key, _pem(ec.generate_private_key(ec.SECP256R1())))
    pair = _certificate(_private(new_key), names, owner, number)
    create_private(new_cert, pair.public_bytes(serialization.Encoding.PEM))
    new_key.replace(path_key)
    new_cert.replace(path_cert)
    return number


def endorsed(der: bytes, run: RunId) -> int:
    """The number under which the run's own key endorses this certificate; 0 if it does not."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        extension = certificate.extensions.get_extension_for_oid(_ENDORSEMENT).value
        assert isinstance(extension, x509.UnrecognizedExtension), "nobody else knows it"
        signed = canonical.from_bytes(SignedEndorsement, extension.value)
        said = signed.endorsement
        identity.verify(coordinator_key(run), "endorsement", canonical.to_bytes(said), signed.signature)
        return said.number if (said.run, said.key) == (run, _public(certificate)) else 0
    except (*_NO_CERTIFICATE, *_NO_EXTENSION, UnsupportedAlgorithm, Refused):
        return 0


def fingerprint(pem: bytes | str) -> str:
    """Hex SHA-256 of the certificate's DER form."""
    data = pem.encode("ascii", "replace") if isinstance(pem, str) else pem
    try:
        return x509.load_pem_x509_certificate(data).fingerprint(hashes.SHA256()).hex()
    except _NO_CERTIFICATE:
        raise Refused(Code.KEY_UNUSABLE, "this is no certificate in PEM") from None


class Pinned(NamedTuple):
    """What a server was seen to have."""

    root: bytes  # its certificate in PEM
    host: str  # the IP address that it was reached at
    number: int  # under which the run endorses it


def fetch_pinned(address: Address, pin: str, run: RunId, *, newest: int = 0, timeout_seconds: float) -> Pinned:
    """The server's certificate, if it is the pinned one or one that the run endorses.

    Then it may serve as the only root of a channel. One older than `newest`, the highest number that was seen, is
    refused: its key may have been stolen. Blocks; sends nothing but the handshake. The channel that follows proves
    possession of the key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the pin decides, two lines below
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=timeout_seconds) as plain,
            context.wrap_socket(plain, server_hostname=SERVER_NAME) as secured,
        ):
            der = secured.getpeercert(binary_form=True) or b""
            host = secured.getpeername()[0]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise Refused(Code.UNREACHABLE, f"{address} does not answer: {error}") from None
    got, number = hashlib.sha256(der).hexdigest(), endorsed(der, run)
    if got != pin and not number:
        raise Refused(Code.PIN_MISMATCH, f"{address} shows a certificate {got[:16]}…, wanted {pin[:16]}…")
    if number < newest:
        raise Refused(Code.PIN_MISMATCH, f"{address} shows a certificate {got[:16]}… that the run has replaced")
    return Pinned(ssl.DER_cert_to_PEM_cert(der).encode(), host, number)


def _certificate(key: ec.EllipticCurvePrivateKey, names: Iterable[str], owner: Owner, number: int) -> x509.Certificate:
    said = Endorsement(owner.run, number, _public(key))
    signed = SignedEndorsement(said, owner.key.sign("endorsement", canonical.to_bytes(said)))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_EPOCH)
        .not_valid_after(_NO_END)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in (SERVER_NAME, *names)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.UnrecognizedExtension(_ENDORSEMENT, canonical.to_bytes(signed)), critical=False)
        .sign(key, hashes.SHA256())
    )


def _public(holder: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    """Hex SHA-256 of its public key."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(holder.public_key().public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _general(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _check_pair(path_key: Path, path_cert: Path) -> None:
    try:
        with path_cert.open("rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read(_CERTIFICATE_BYTES_MAX))
    except (OSError, ValueError) as error:
        raise Refused(Code.KEY_UNUSABLE, f"{path_cert} is no certificate: {error}") from None
    if certificate.public_key() != _private(path_key).public_key():
        what = f"{path_key} is not the key of {path_cert}"
        raise Refused(Code.KEY_UNUSABLE, what, fix="Make a new pair with: barnraise-coordinator certificate --new")
    if (end := certificate.not_valid_after_utc) < datetime.now(UTC):  # ours has no end; gRPC would serve it to nobody
        fix = "Make a new pair with: barnraise-coordinator certificate --new"
        raise Refused(Code.KEY_UNUSABLE, f"{path_cert} ended on {end:%Y-%m-%d}: no node would connect", fix=fix)


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_private(path), password=None)
    except FileNotFoundError:
        raise Refused(Code.KEY_UNUSABLE, f"{path} is missing, while its certificate is there") from None
    except (TypeError, ValueError, UnsupportedAlgorithm):
        raise Refused(Code.KEY_UNUSABLE, f"{path} holds no private key without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Refused(Code.KEY_UNUSABLE, f"{path} holds a key of another type, wanted P-256")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
