"""What a node keeps to start again without its coordinator: real files, whole or not at all."""

import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest

from node.link import Door, Opened
from node.membership import STANDING as STANDING_FILE
from node.membership import Membership
from node.standing import LIFE, Standing, begin_life, raise_life
from protocol import canonical, identity
from protocol.blobs import digest_of
from protocol.contribution import sign_grant
from protocol.errors import Refused
from protocol.identity import Key, peer_id_of
from protocol.log import genesis_head
from protocol.types import (
    BaseCheckpoint,
    BlobRef,
    DataRange,
    Head,
    Lease,
    Manifest,
    Pass,
    Rollback,
    Shard,
)

COORDINATOR, NODE, TRANSPORT, STRANGER = (Key.generate() for _ in range(4))
RUN = identity.run_id(COORDINATOR.public, "test")
OTHER = identity.run_id(COORDINATOR.public, "other")
DOOR = Door(("127.0.0.1:1",), "00" * 32, RUN)
PEER = peer_id_of(TRANSPORT.public_bytes)
GENESIS = "11" * 32
SHARD = Shard(digest_of(b"shard"), 4096, 2048, 128)
DATA = canonical.digest((SHARD,))


def manifest(run=RUN, *, key=COORDINATOR):
    body = Manifest(run, run.partition(".")[2], "{}", "{}", None, 256, 65536, "22" * 32, GENESIS, 16, 2, DATA, "5.0")
    return identity.sign_manifest(key, body)


def node_pass(*, key=COORDINATOR, run=RUN, node=NODE.public, peer=PEER):
    return identity.sign_pass(key, Pass(run, node, peer, "heron", 1_000, 2_000))


def rollback(number, *, key=COORDINATOR, run=RUN):
    to = genesis_head(manifest(run).manifest)
    return identity.sign_rollback(key, Rollback(run, number, to, Head(5, "33" * 32), "because", 1_000))


def lease(*, node=NODE.public, shard=SHARD.digest, start=0, stop=128):
    data = DataRange(0, shard, start, stop)
    return Lease("1f", node, data, 5_000, sign_grant(COORDINATOR, RUN, node, data))


def base(round_number=0, state=GENESIS):
    return BaseCheckpoint(round_number, "44" * 32, state, BlobRef("55" * 32, 99))


STANDING = Standing(
    manifest(),
    node_pass(),
    (SHARD,),
    ("/ip4/127.0.0.1/tcp/4001/p2p/12D3",),
    base(),
    (rollback(1), rollback(2)),
    (lease(),),
)


def load(path, door=DOOR):
    return Standing.load(path, door, node=NODE.public, peer=PEER)


def test_what_was_kept_is_found_again(tmp_path):
    path = tmp_path / "standing"
    STANDING.save(path)
    assert load(path) == STANDING
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["standing"]


def test_it_is_what_the_coordinator_said_when_the_node_was_let_in():
    opened = Opened(
        STANDING.signed_pass, STANDING.manifest, None, STANDING.base, STANDING.rendezvous, (SHARD,),
        skew_seconds=0.0, rollbacks=STANDING.rollbacks, silent_epoch=None, life=7,
    )  # fmt: skip
    assert Standing.of(opened, [lease()]) == STANDING
    assert Standing.of(opened).with_leases([lease()]) == STANDING
    assert STANDING.opened(7) == opened


def test_a_pass_that_has_ended_still_starts_the_node(tmp_path):
    """Only the coordinator asks for it, by a clock of its own."""
    STANDING.save(tmp_path / "standing")
    assert load(tmp_path / "standing").signed_pass.body.expires_ms == 2_000


def test_nothing_kept_is_no_standing(tmp_path):
    assert load(tmp_path / "standing") is None
    (tmp_path / "standing").mkdir()
    assert load(tmp_path / "standing") is None


def test_a_file_that_rotted_anywhere_is_of_no_use(tmp_path):
    path = tmp_path / "standing"
    STANDING.save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 61):
        path.write_bytes(whole[:at])
        assert load(path) is None
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load(path) is None
    for data in (whole + b" ", b"\0" * len(whole), b"", b"\n", b"{}", os.urandom(999)):
        path.write_bytes(data)
        assert load(path) is None
    path.write_bytes(whole)
    assert load(path) == STANDING


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest": manifest(key=STRANGER)},
        {"manifest": manifest(OTHER)},
        {"signed_pass": node_pass(key=STRANGER)},
        {"signed_pass": node_pass(run=OTHER)},
        {"signed_pass": node_pass(node=STRANGER.public)},
        {"signed_pass": node_pass(peer=peer_id_of(STRANGER.public_bytes))},
        {"base": base(state="66" * 32)},
        {"rollbacks": (rollback(1, key=STRANGER),)},
        {"rollbacks": (rollback(1, run=OTHER),)},
        {"rollbacks": (rollback(2),)},
        {"rollbacks": (rollback(1), rollback(3))},
        {"rollbacks": tuple(map(rollback, range(1, 258)))},
        {"shards": (SHARD, replace(SHARD, digest=digest_of(b"another")))},
        {"shards": (replace(SHARD, sequences=127),), "leases": ()},
        {"shards": (), "leases": ()},
        {"leases": (lease(node=STRANGER.public),)},
        {"leases": (lease(start=128, stop=128),)},
        {"leases": (lease(stop=129),)},
        {"leases": (lease(shard="77" * 32),)},
    ],
)
def test_what_another_signed_or_is_of_another_run_or_node_is_of_no_use(tmp_path, changes):
    path = tmp_path / "standing"
    replace(STANDING, **changes).save(path)
    assert load(path) is None


def test_a_file_of_another_run_or_node_is_of_no_use(tmp_path):
    path = tmp_path / "standing"
    STANDING.save(path)
    assert load(path, replace(DOOR, run=OTHER)) is None
    assert Standing.load(path, DOOR, node=STRANGER.public, peer=PEER) is None
    assert Standing.load(path, DOOR, node=NODE.public, peer=peer_id_of(STRANGER.public_bytes)) is None


def test_a_file_over_the_cap_is_of_no_use(tmp_path):
    path = tmp_path / "standing"
    replace(STANDING, rendezvous=("x" * (5 << 20),)).save(path)
    assert load(path) is None


# lives


def test_each_life_is_higher_than_the_one_before_and_durable_before_it_is_used(tmp_path):
    for expected in (1, 2, 3):
        assert begin_life(tmp_path) == expected
        assert (tmp_path / LIFE).read_bytes() == b"%d\n" % expected
    assert stat.S_IMODE((tmp_path / LIFE).stat().st_mode) == 0o600


def test_a_life_that_could_not_be_saved_is_not_begun(tmp_path, monkeypatch):
    begin_life(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match="No space"):
        begin_life(tmp_path)
    monkeypatch.undo()
    assert begin_life(tmp_path) == 2
    assert os.listdir(tmp_path) == [LIFE]


def test_the_next_life_is_above_the_highest_that_the_coordinator_knows(tmp_path):
    begin_life(tmp_path)
    raise_life(tmp_path, 8)
    raise_life(tmp_path, 3)
    assert begin_life(tmp_path) == 9


@pytest.mark.parametrize("rotten", [b"", b"7", b"-7\n", b"7\n7\n", b"\0" * 9, b"9" * 17 + b"\n", b"\xff\n", b"7.0\n"])
def test_a_rotten_count_begins_again(tmp_path, rotten):
    (tmp_path / LIFE).write_bytes(rotten)
    assert begin_life(tmp_path) == 1


# a full disk


def test_what_a_node_can_do_without_does_not_end_it_when_the_disk_is_full(tmp_path, monkeypatch):
    """Its promises and records are another matter: see Journal."""
    begin_life(tmp_path)
    invite = SimpleNamespace(run=RUN)
    membership = Membership(NODE.public, SimpleNamespace(door=DOOR, peer=PEER), invite, "heron", tmp_path)
    membership._save(STANDING)
    life = membership.life

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    membership.renew()
    membership.keep(())
    monkeypatch.undo()
    assert membership.life == life
    assert load(tmp_path / STANDING_FILE) == STANDING
    membership.keep(())
    assert load(tmp_path / STANDING_FILE).leases == ()
