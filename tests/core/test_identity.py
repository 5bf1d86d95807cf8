"""Keys and signatures: one purpose, one run, one body; key files that are private or refused."""

import os
import subprocess
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from protocol import identity
from protocol.errors import Code, Refused
from protocol.identity import Key, SignedTicket, Ticket
from protocol.limits import MEMBERS_MAX
from protocol.types import Manifest, Member, Pass, Roster, SignedManifest, SignedPass, SignedRoster

OURS, THEIRS = Key.generate(), Key.generate()
RUN = identity.run_id(OURS.public, "tiny")
H = "a" * 64


def member(number):
    return Member(f"{number:064x}", f"peer{number}", (), 1000)


ROSTER = Roster(RUN, 1, (member(1), member(2)), 5)
MANIFEST = Manifest(RUN, "tiny", "{}", "{}", None, 259, 100, H, H, 256, 2, H, "5.0")
PASS = Pass(RUN, H, "peer", "ann", 1000, 2000)
TICKET = Ticket(RUN, "00" * 16, 1, 2000, H)


def refusal(act, *arguments):
    with pytest.raises(Refused) as caught:
        act(*arguments)
    return caught.value.reason


def test_a_signature_holds_for_its_key_purpose_and_body_only():
    signature = OURS.sign("roster", b"body")
    identity.verify(OURS.public, "roster", b"body", signature)
    assert refusal(identity.verify, THEIRS.public, "roster", b"body", signature) is Code.SIGNATURE
    assert refusal(identity.verify, OURS.public, "pass", b"body", signature) is Code.SIGNATURE
    assert refusal(identity.verify, OURS.public, "roster", b"other", signature) is Code.SIGNATURE


def test_a_signature_binds_our_domain_so_a_bare_signature_of_the_body_is_refused():
    bare = ed25519.Ed25519PrivateKey.from_private_bytes(OURS.private_bytes()).sign(b"body").hex()
    assert refusal(identity.verify, OURS.public, "roster", b"body", bare) is Code.SIGNATURE


@given(st.integers(0, 511))
def test_one_changed_bit_voids_a_signature(bit):
    signature = bytearray.fromhex(OURS.sign("vote", b"body"))
    signature[bit // 8] ^= 1 << bit % 8
    assert refusal(identity.verify, OURS.public, "vote", b"body", signature.hex()) is Code.SIGNATURE


@given(st.text(), st.text())
def test_a_key_or_signature_that_is_no_hex_is_refused(public, signature):
    assert refusal(identity.verify, public, "vote", b"", signature) is Code.SIGNATURE
    assert refusal(identity.verify, OURS.public, "vote", b"", signature) is Code.SIGNATURE


def test_a_signature_has_one_spelling():
    assert refusal(identity.verify, OURS.public, "vote", b"", OURS.sign("vote", b"").upper()) is Code.SIGNATURE


@pytest.mark.parametrize(
    ("sign", "check", "body", "wrong"),
    [
        (identity.sign_roster, identity.check_roster, ROSTER, replace(ROSTER, epoch=2)),
        (identity.sign_manifest, identity.check_manifest, MANIFEST, replace(MANIFEST, vocabulary=260)),
        (identity.sign_pass, lambda key, signed: identity.check_pass(key, signed, 1999), PASS, replace(PASS, name="b")),
        (
            identity.sign_ticket,
            lambda key, signed: identity.check_ticket(key, signed, 1999),
            TICKET,
            replace(TICKET, uses=2),
        ),
    ],
    ids=["roster", "manifest", "pass", "ticket"],
)
def test_what_a_coordinator_signs_is_good_for_its_run_and_cannot_be_changed(sign, check, body, wrong):
    signed = sign(OURS, body)
    assert check(OURS.public, signed) == body
    assert refusal(check, THEIRS.public, signed) is Code.SIGNATURE
    assert refusal(check, OURS.public, type(signed)(wrong, signed.signature)) is Code.SIGNATURE
    foreign = sign(THEIRS, body)  # signed well, for a run of somebody else
    assert refusal(check, THEIRS.public, foreign) is Code.SIGNATURE
    assert refusal(check, OURS.public, foreign) is Code.SIGNATURE


def test_a_pass_ends_at_its_time():
    signed = identity.sign_pass(OURS, PASS)
    assert refusal(identity.check_pass, OURS.public, signed, 2000) is Code.EXPIRED
    assert isinstance(signed, SignedPass)


def test_a_ticket_ends_at_its_time_and_its_end_cannot_be_moved():
    signed = identity.sign_ticket(OURS, TICKET)
    assert refusal(identity.check_ticket, OURS.public, signed, 2000) is Code.EXPIRED
    longer = SignedTicket(replace(TICKET, expires_ms=10**15), signed.signature)
    assert refusal(identity.check_ticket, OURS.public, longer, 2000) is Code.SIGNATURE


def test_a_roster_that_names_a_node_or_a_peer_twice_is_refused():
    for second in (member(1), replace(member(2), peer="peer1"), replace(member(1), peer="peer2")):
        signed = identity.sign_roster(OURS, replace(ROSTER, members=(member(1), second)))
        assert refusal(identity.check_roster, OURS.public, signed) is Code.FIELD


def test_a_roster_is_bounded():
    full = replace(ROSTER, members=tuple(map(member, range(MEMBERS_MAX))))
    identity.check_roster(OURS.public, identity.sign_roster(OURS, full))
    over = replace(ROSTER, members=tuple(map(member, range(MEMBERS_MAX + 1))))
    assert refusal(identity.check_roster, OURS.public, identity.sign_roster(OURS, over)) is Code.LIMIT
    assert isinstance(identity.sign_roster(OURS, over), SignedRoster)


def test_a_manifest_carries_the_name_of_its_run():
    signed = identity.sign_manifest(OURS, replace(MANIFEST, name="other"))
    assert refusal(identity.check_manifest, OURS.public, signed) is Code.FIELD
    assert isinstance(signed, SignedManifest)


def test_a_run_is_named_by_its_coordinators_key():
    assert identity.coordinator_key(RUN) == OURS.public
    for text in (
        "",
        "tiny",
        f"{OURS.public}.",
        f"{OURS.public}.Tiny",
        f"{OURS.public}.../x",
        f"{H}.a\n",
        H[:-1] + ".a",
    ):
        assert refusal(identity.check_run_id, text) is Code.FIELD


def test_a_missing_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "home" / "node.key"
    key = Key.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Key.load_or_create(path).public == key.public
    assert list(path.parent.iterdir()) == [path]
    assert bytes.fromhex(key.public) == key.public_bytes


def test_two_starts_at_once_get_the_same_key(tmp_path):
    keys, gate = [], threading.Barrier(8)

    def start():
        gate.wait()
        keys.append(Key.load_or_create(tmp_path / "node.key").public)

    threads = [threading.Thread(target=start) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(keys) == 8 and len(set(keys)) == 1


def write_key(path, key, password=None):
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    path.chmod(0o600)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "node.key"
    Key.load_or_create(path)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        assert refusal(Key.load_or_create, path) is Code.KEY_READABLE


def test_a_key_of_another_kind_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "node.key"
    write_key(path, rsa.generate_private_key(public_exponent=65537, key_size=2048))
    before = path.read_bytes()
    with pytest.raises(Refused, match="RSA"):
        Key.load_or_create(path)
    write_key(path, ed25519.Ed25519PrivateKey.generate(), b"secret")
    with pytest.raises(Refused, match="encrypted"):
        Key.load_or_create(path)
    assert path.read_bytes() != before


@pytest.mark.parametrize("data", [b"", b"-----BEGIN PRIVATE KEY-----\nMC4CAQAw", b"\0" * 64, b"x" * 100_000])
def test_a_truncated_or_foreign_file_is_refused_and_left_alone(tmp_path, data):
    path = tmp_path / "node.key"
    path.write_bytes(data)
    path.chmod(0o600)
    assert refusal(Key.load_or_create, path) is Code.KEY_UNUSABLE
    assert path.read_bytes() == data


@pytest.mark.timeout(10)
def test_a_pipe_a_folder_or_a_dangling_link_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "folder", "link"):
        assert refusal(Key.load_or_create, tmp_path / name) is Code.KEY_UNUSABLE
    assert not (tmp_path / "nowhere").exists()


def test_a_key_shows_only_its_public_half():
    key = Key.generate()
    assert key.private_bytes().hex() not in f"{key!r} {key} {vars(key)}"


def test_a_peer_id_is_what_libp2p_says_it_is():
    """The example key of the libp2p peer id specification."""
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    seed = bytes.fromhex("7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d")
    key = Key(ed25519.Ed25519PrivateKey.from_private_bytes(seed))
    assert key.public_bytes == public
    assert identity.libp2p_private_key_bytes(key).hex() == "08011240" + seed.hex() + public.hex()
    assert identity.peer_id_of(public) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def p2pd():
    found = find_spec("hivemind")
    return Path(found.origin).parent / "hivemind_cli" / "p2pd" if found else Path("missing")


@pytest.mark.skipif(not p2pd().exists(), reason="hivemind's daemon is not installed")
@pytest.mark.timeout(30)
def test_the_libp2p_daemon_reads_our_key_and_agrees_on_the_peer_id(tmp_path):
    key = Key.generate()
    file = tmp_path / "p2p.key"
    identity.create_private(file, identity.libp2p_private_key_bytes(key))
    arguments = ["-id", str(file), "-hostAddrs", "/ip4/127.0.0.1/tcp/0", "-listen", f"/unix{tmp_path}/p2pd.sock"]
    with subprocess.Popen([p2pd(), *arguments], stdout=subprocess.PIPE, text=True) as daemon:
        try:
            line = next(line for line in daemon.stdout if line.startswith("Peer ID:"))
        finally:
            daemon.kill()
    assert line.split()[-1] == identity.peer_id_of(key.public_bytes)
