"""The coordinator's self-made TLS certificate. Nobody vouches for it: its fingerprint in an invite is the pin."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.address import Address
from protocol.errors import Code, Refused
from protocol.identity import create_private, read_private

SERVER_NAME: Final = "barnraise"  # what clients ask for (grpc.ssl_target_name_override), whatever the address

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)  # a node whose clock is wrong can still check the pin
_NO_END: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280's "no well-defined expiration date"
_CERTIFICATE_BYTES_MAX: Final = 1 << 14  # ours take 700


def make_certificate(path_key: Path, path_cert: Path, names: Iterable[str]) -> None:
    """Make the pair where it is missing. A pair that is there stays: its fingerprint is in invites."""
    if path_cert.exists():
        _check_pair(path_key, path_cert)
        return
    create_private(path_key, _pem(ec.generate_private_key(ec.SECP256R1())))  # BoringSSL's servers offer no Ed25519
    create_private(path_cert, _certificate(_private(path_key), names).public_bytes(serialization.Encoding.PEM))


def fingerprint(pem: bytes | str) -> str:
    """Hex SHA-256 of the certificate's DER form."""
    data = pem.encode("ascii", "replace") if isinstance(pem, str) else pem
    try:
        return x509.load_pem_x509_certificate(data).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        raise Refused(Code.KEY_UNUSABLE, "this is no certificate in PEM") from None


class Pinned(NamedTuple):
    """What a server was seen to have."""

    root: bytes  # its certificate in PEM
    host: str  # the IP address that it was reached at


def fetch_pinned(address: Address, pin: str, *, timeout_seconds: float) -> Pinned:
    """The server's certificate, if it is the pinned one: then it may serve as the only root of a channel.

    Blocks; sends nothing but the handshake. The channel that follows proves possession of the key.
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
    got = hashlib.sha256(der).hexdigest()
    if got != pin:
        raise Refused(Code.PIN_MISMATCH, f"{address} shows a certificate {got[:16]}…, wanted {pin[:16]}…")
    return Pinned(ssl.DER_cert_to_PEM_cert(der).encode(), host)


def _certificate(key: ec.EllipticCurvePrivateKey, names: Iterable[str]) -> x509.Certificate:
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
        .sign(key, hashes.SHA256())
    )


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
        raise Refused(Code.KEY_UNUSABLE, f"{path_key} is not the key of {path_cert}")
    if (end := certificate.not_valid_after_utc) < datetime.now(UTC):  # ours has no end; gRPC would serve it to nobody
        fix = "Move both files away: new ones are made, and their fingerprint goes into new invites."
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
