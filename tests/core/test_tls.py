"""The pin: a real gRPC handshake over loopback, and a hard stop when the certificate is another."""

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
import pytest
from cryptography import x509

from protocol import tls
from protocol.address import Address
from protocol.errors import Code, Exit, Refused
from protocol.identity import Key, run_id

KEY = Key.generate()
OWNER = tls.Owner(KEY, run_id(KEY.public, "test"), 1000)
OTHER_KEY = Key.generate()
STRANGER = tls.Owner(OTHER_KEY, run_id(OTHER_KEY.public, "test"), 5000)


@pytest.fixture
def pair(tmp_path):
    key, cert = tmp_path / "private" / "tls.key", tmp_path / "private" / "tls.pem"
    tls.make_certificate(key, cert, ["train.example.org", "127.0.0.1", "::1"], OWNER)
    return key, cert


@contextmanager
def serving(key, cert):
    """A gRPC server with one method, Echo."""
    server = grpc.server(ThreadPoolExecutor(1))
    echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Echo": echo}),))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield Address("127.0.0.1", port)
    finally:
        server.stop(None).wait()


def call(address, root):
    options = [("grpc.ssl_target_name_override", tls.SERVER_NAME)]
    with grpc.secure_channel(str(address), grpc.ssl_channel_credentials(root), options) as channel:
        return channel.unary_unary("/test.Test/Echo")(b"hello", timeout=5)


def refused(act, *arguments, **options):
    with pytest.raises(Refused) as caught:
        act(*arguments, **options)
    return caught.value


def test_a_pinned_client_talks_to_the_coordinator_over_tls_1_3(pair):
    with serving(*pair) as address:
        root, host, number = tls.fetch_pinned(
            address, tls.fingerprint(pair[1].read_bytes()), OWNER.run, timeout_seconds=5
        )
        assert number == OWNER.now
        assert call(address, root) == b"hello"
        assert host == "127.0.0.1"
        assert root.split() == pair[1].read_bytes().split()
        context = ssl.create_default_context(cadata=root.decode())
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        for name in ("127.0.0.1", "train.example.org", tls.SERVER_NAME):
            with (
                socket.create_connection((address.host, address.port), 5) as plain,
                context.wrap_socket(plain, server_hostname=name) as secured,
            ):
                assert secured.version() == "TLSv1.3"


def test_another_certificate_is_a_hard_stop(pair, tmp_path):
    tls.make_certificate(tmp_path / "other.key", tmp_path / "other.pem", [], STRANGER)
    with serving(tmp_path / "other.key", tmp_path / "other.pem") as address:
        pin = tls.fingerprint(pair[1].read_bytes())
        caught = refused(tls.fetch_pinned, address, pin, OWNER.run, timeout_seconds=5)
        assert caught.reason is Code.PIN_MISMATCH
        assert caught.reason.exit is Exit.INTEGRITY
        assert "proxy" in caught.fix  # what a hotel or an employer puts in between looks just so
        with pytest.raises(grpc.RpcError):  # one who swaps servers after the check meets the root
            call(address, pair[1].read_bytes())


@pytest.mark.timeout(20)
def test_a_server_that_never_answers_is_unreachable_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
        assert refused(tls.fetch_pinned, address, "00" * 32, OWNER.run, timeout_seconds=0.2).reason is Code.UNREACHABLE
    assert refused(tls.fetch_pinned, address, "00" * 32, OWNER.run, timeout_seconds=0.2).reason is Code.UNREACHABLE


def test_a_pair_that_is_there_stays(pair):
    key, cert = pair
    before = key.read_bytes(), cert.read_bytes()
    tls.make_certificate(key, cert, ["new.example.org"], OWNER)
    assert (key.read_bytes(), cert.read_bytes()) == before
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_crash_between_key_and_certificate_is_mended(pair):
    key, cert = pair
    before = key.read_bytes()
    cert.unlink()
    tls.make_certificate(key, cert, [], OWNER)
    assert key.read_bytes() == before
    with serving(key, cert) as address:
        tls.fetch_pinned(address, tls.fingerprint(cert.read_bytes()), OWNER.run, timeout_seconds=5)


def test_a_lost_or_foreign_key_is_refused_because_invites_pin_its_certificate(pair, tmp_path):
    key, cert = pair
    tls.make_certificate(tmp_path / "other.key", tmp_path / "other.pem", [], STRANGER)
    assert refused(tls.make_certificate, tmp_path / "other.key", cert, [], OWNER).reason is Code.KEY_UNUSABLE
    key.chmod(0o644)
    assert refused(tls.make_certificate, key, cert, [], OWNER).reason is Code.KEY_READABLE
    key.unlink()
    assert refused(tls.make_certificate, key, cert, [], OWNER).reason is Code.KEY_UNUSABLE
    assert not key.exists()


def test_a_fingerprint_is_of_the_certificate_and_not_of_its_spelling(pair):
    pem = pair[1].read_bytes()
    assert tls.fingerprint(pem) == tls.fingerprint(pem.decode().replace("\n", "\r\n"))
    assert len(tls.fingerprint(pem)) == 64
    for junk in (b"", b"\xff", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"):
        assert refused(tls.fingerprint, junk).reason is Code.KEY_UNUSABLE


def test_our_certificate_has_no_end_and_no_beginning_that_a_wrong_clock_could_miss(pair):
    ours = x509.load_pem_x509_certificate(pair[1].read_bytes())
    assert (ours.not_valid_before_utc.year, ours.not_valid_after_utc.year) == (1970, 9999)


def test_an_expired_certificate_of_another_maker_fits_its_pin_and_is_refused_where_it_would_be_served(
    tmp_path, monkeypatch
):
    """The pin decides for a node; gRPC looks at the dates as well, so the coordinator's owner is told at the start."""
    monkeypatch.setattr(tls, "_NO_END", datetime(2020, 2, 29, tzinfo=UTC))
    pair = tmp_path / "tls.key", tmp_path / "tls.pem"
    tls.make_certificate(*pair, [], OWNER)
    with serving(*pair) as address:
        root, *_ = tls.fetch_pinned(address, tls.fingerprint(pair[1].read_bytes()), OWNER.run, timeout_seconds=5)
        with pytest.raises(grpc.RpcError):
            call(address, root)
    before = [file.read_bytes() for file in pair]
    refusal = refused(tls.make_certificate, *pair, [], OWNER)
    assert refusal.reason is Code.KEY_UNUSABLE and "2020-02-29" in refusal.what and "certificate --new" in refusal.fix
    assert [file.read_bytes() for file in pair] == before


def der(cert):
    return ssl.PEM_cert_to_DER_cert(cert.read_text())


def test_a_new_certificate_is_endorsed_by_the_run_and_the_old_one_refused_from_then_on(pair, tmp_path):
    key, cert = pair
    stolen = tmp_path / "stolen.key", tmp_path / "stolen.pem"
    stolen[0].write_bytes(key.read_bytes())
    stolen[1].write_bytes(cert.read_bytes())
    pin = tls.fingerprint(cert.read_bytes())
    assert tls.replace_certificate(key, cert, [], OWNER) == OWNER.now + 1  # newer, whatever the clock says
    assert key.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in key.parent.iterdir()) == ["tls.key", "tls.pem"]
    with serving(key, cert) as address:
        root, _, newest = tls.fetch_pinned(address, pin, OWNER.run, timeout_seconds=5)
        assert newest == OWNER.now + 1
        assert call(address, root) == b"hello"
    with serving(*stolen) as address:
        assert tls.fetch_pinned(address, pin, OWNER.run, timeout_seconds=5).number == OWNER.now  # who has seen no newer
        caught = refused(tls.fetch_pinned, address, pin, OWNER.run, newest=newest, timeout_seconds=5)
        assert caught.reason is Code.PIN_MISMATCH
        assert "replaced" in caught.what


def test_nobody_else_can_endorse_a_certificate(pair, tmp_path):
    run = OWNER.run
    assert tls.endorsed(der(pair[1]), run) == OWNER.now
    assert tls.endorsed(der(pair[1]), STRANGER.run) == 0
    forger = tls.Owner(OTHER_KEY, run, 9000)  # says our run, signs with its own key
    tls.make_certificate(tmp_path / "forged.key", tmp_path / "forged.pem", [], forger)
    assert tls.endorsed(der(tmp_path / "forged.pem"), run) == 0
    assert tls.endorsed(b"no certificate", run) == 0


def test_an_endorsement_is_for_one_key(pair, tmp_path, monkeypatch):
    """Whoever copies ours into a certificate of their own gains nothing."""
    ours = tls._public(tls._private(pair[0]))
    monkeypatch.setattr(tls, "_public", lambda _: ours)
    tls.make_certificate(tmp_path / "copy.key", tmp_path / "copy.pem", [], OWNER)
    monkeypatch.undo()
    assert tls.endorsed(der(tmp_path / "copy.pem"), OWNER.run) == 0


def test_a_pair_that_a_crash_left_unmatched_is_mended_by_a_new_one(pair, tmp_path):
    key, cert = pair
    tls.make_certificate(tmp_path / "other.key", tmp_path / "other.pem", [], OWNER)
    key.write_bytes((tmp_path / "other.key").read_bytes())
    assert "certificate --new" in refused(tls.make_certificate, key, cert, [], OWNER).fix
    tls.replace_certificate(key, cert, [], OWNER)
    tls.make_certificate(key, cert, [], OWNER)


def test_a_name_that_leads_nowhere_is_unreachable():
    caught = refused(tls.fetch_pinned, Address("nobody.invalid", 1), "00" * 32, OWNER.run, timeout_seconds=5)
    assert caught.reason is Code.UNREACHABLE
    assert "nobody.invalid" in caught.what
