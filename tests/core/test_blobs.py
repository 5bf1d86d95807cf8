"""Blobs: content addresses, verified and resumed downloads, and a store that never passes its cap."""

import errno
import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import blobs
from protocol.blobs import LEAF_BYTES, BlobStore, atomic_write, check_leaves, digest_of
from protocol.errors import Code, Refused
from protocol.limits import BLOB_CHUNK_BYTES as CHUNK


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "blobs", 10 << 20)


def noise(size, seed=0):
    return hashlib.shake_128(bytes([seed])).digest(size)


def refused(code, call, *arguments, **options):
    with pytest.raises(Refused) as caught:
        call(*arguments, **options)
    assert caught.value.reason is code


def used_on_disk(store):
    return sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())


def naive_root(data):
    level = [hashlib.sha256(b"\0" + data[i : i + CHUNK]).digest() for i in range(0, len(data), CHUNK)]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return hashlib.sha256(b"\2" + len(data).to_bytes(8, "little") + b"".join(level)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 6 * CHUNK + 5, 7 * CHUNK])
def test_a_digest_is_the_root_of_the_chunk_tree(size, store, tmp_path):
    data = noise(size)
    assert digest_of(data) == naive_root(data)
    (tmp_path / "source").write_bytes(data)
    for ref in (store.put_bytes(data), store.put_file(tmp_path / "source")):
        assert (ref.digest, ref.size) == (naive_root(data), size)
    assert store.read(ref.digest) == data
    assert store.size(ref.digest) == size
    store.verify(ref.digest)
    check_leaves(store.leaves(ref.digest), ref.digest, size)
    assert store.digests() == (ref.digest,)


def test_a_leaf_and_a_node_of_the_same_bytes_have_different_digests():
    left, right = noise(CHUNK), noise(CHUNK, 1)
    leaves = b"".join(hashlib.sha256(b"\0" + part).digest() for part in (left, right))
    assert digest_of(left + right) != digest_of(leaves)
    assert digest_of(left) != hashlib.sha256(left).hexdigest()


@pytest.mark.parametrize("name", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" + "0" * 61, "0" * 64 + "\n"])
def test_what_is_not_a_digest_never_becomes_a_path(name, store):
    for use in (store.path, store.has, store.open, store.delete, lambda d: store.writer(d, 1)):
        refused(Code.FIELD, use, name)


@pytest.mark.parametrize("with_leaves", [False, True])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_download_in_pieces_of_any_size_and_with_interruptions_gives_the_blob(tmp_path_factory, with_leaves, data):
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    whole = noise(2 * CHUNK + 999)
    digest = digest_of(whole)
    leaves = blobs_leaves(whole) if with_leaves else None
    writer = store.writer(digest, len(whole), leaves)
    for size in data.draw(st.lists(st.integers(1, 2 * CHUNK), max_size=4)):
        at = writer.position
        writer.write(whole[at : at + size], at)
        if data.draw(st.booleans()):
            at = writer.position
            writer.close()
            writer = store.writer(digest, len(whole), leaves)
            assert writer.position == at // CHUNK * CHUNK
    writer.write(whole[writer.position :])
    ref = writer.finish()
    assert ref.size == len(whole)
    assert store.read(digest) == whole
    assert store.bytes_used == used_on_disk(store) == len(whole)


def blobs_leaves(data):
    return b"".join(hashlib.sha256(b"\0" + data[i : i + CHUNK]).digest() for i in range(0, len(data), CHUNK))


def test_with_leaves_a_wrong_chunk_is_refused_as_it_arrives_and_the_rest_is_kept(store):
    whole = noise(3 * CHUNK)
    writer = store.writer(digest_of(whole), len(whole), blobs_leaves(whole))
    writer.write(whole[:CHUNK])
    refused(Code.BLOB_CORRUPT, writer.write, bytes(CHUNK))
    assert writer.position == CHUNK
    writer.write(whole[CHUNK:])
    assert store.read(writer.finish().digest) == whole


def test_without_leaves_wrong_bytes_are_refused_at_the_end_and_nothing_is_kept(store):
    whole = noise(3 * CHUNK)
    writer = store.writer(digest_of(whole), len(whole))
    writer.write(whole[:-1] + b"?")
    refused(Code.BLOB_CORRUPT, writer.finish)
    assert not store.has(digest_of(whole))
    assert store.bytes_used == used_on_disk(store) == 0


@pytest.mark.parametrize("with_leaves", [False, True])
def test_a_partial_file_that_changed_on_disk_is_hashed_again_before_resuming(store, with_leaves):
    whole = noise(3 * CHUNK)
    leaves = blobs_leaves(whole) if with_leaves else None
    with store.writer(digest_of(whole), len(whole), leaves) as writer:
        writer.write(whole[: 2 * CHUNK])
    partial = next((store.folder / "partial").iterdir())
    partial.write_bytes(whole[:CHUNK] + bytes(CHUNK))
    writer = store.writer(digest_of(whole), len(whole), leaves)
    if with_leaves:
        assert writer.position == CHUNK
        writer.write(whole[CHUNK:])
        assert store.read(writer.finish().digest) == whole
    else:
        writer.write(whole[writer.position :])
        refused(Code.BLOB_CORRUPT, writer.finish)
        assert used_on_disk(store) == 0


def test_forged_leaves_are_refused_before_the_first_byte(store):
    whole = noise(3 * CHUNK)
    good = blobs_leaves(whole)
    for leaves in (good[LEAF_BYTES:], good + good[:LEAF_BYTES], bytes(len(good)), good[:-1], b""):
        refused(Code.BLOB_CORRUPT, store.writer, digest_of(whole), len(whole), leaves)
    refused(Code.BLOB_CORRUPT, store.writer, digest_of(whole), len(whole) - 1, good)
    assert used_on_disk(store) == 0


def test_a_download_stops_at_the_declared_size(store):
    whole = noise(CHUNK + 10)
    writer = store.writer(digest_of(whole), len(whole))
    writer.write(whole)
    refused(Code.BLOB_CORRUPT, writer.write, b"!")
    assert store.bytes_used == used_on_disk(store) == 0


def test_a_short_download_is_refused_and_resumes(store):
    whole = noise(2 * CHUNK)
    writer = store.writer(digest_of(whole), len(whole))
    writer.write(whole[:-1])
    refused(Code.BLOB_CORRUPT, writer.finish)
    writer = store.writer(digest_of(whole), len(whole))
    assert writer.position == CHUNK
    writer.write(whole[CHUNK:])
    writer.finish()


def test_bytes_from_another_place_than_asked_are_refused(store):
    whole = noise(2 * CHUNK)
    writer = store.writer(digest_of(whole), len(whole))
    refused(Code.BLOB_CORRUPT, writer.write, whole[5:], 5)
    writer.write(whole, 0)
    writer.finish()


def test_the_store_never_passes_its_cap(tmp_path):
    store = BlobStore(tmp_path / "blobs", 1000)
    refused(Code.BLOB_TOO_LARGE, store.put_bytes, bytes(1001))
    refused(Code.BLOB_TOO_LARGE, store.writer, digest_of(b"x"), 1001)
    (tmp_path / "large").write_bytes(bytes(1001))
    refused(Code.BLOB_TOO_LARGE, store.put_file, tmp_path / "large")
    first = store.put_bytes(noise(600))
    refused(Code.DISK_CAP, store.put_bytes, noise(401, 1))
    refused(Code.DISK_CAP, store.writer, digest_of(b"x"), 401)
    assert store.bytes_used == used_on_disk(store) == 600
    writer = store.writer(digest_of(b"x" * 400), 400)
    refused(Code.DISK_CAP, store.put_bytes, b"y")
    writer.close()
    store.put_bytes(b"y")
    store.put_bytes(noise(600))
    assert store.bytes_used == used_on_disk(store) == 601
    store.delete(first.digest)
    store.delete(first.digest)
    assert store.bytes_used == used_on_disk(store) == 1
    assert BlobStore(tmp_path / "blobs", 1000).bytes_used == 1


def test_what_lies_beside_the_store_counts_towards_its_cap(tmp_path):
    beside = [0]
    store = BlobStore(tmp_path / "blobs", 100, beside=lambda: beside[0])
    store.put_bytes(bytes(50))
    beside[0] = 40
    with pytest.raises(Refused, match="11 bytes more than the 90 in use pass the cap of 100"):
        store.put_bytes(b"x" * 11)
    store.put_bytes(b"x" * 10)
    assert store.has_room(0)
    beside[0] = 41
    assert not store.has_room(0)


def test_a_free_floor_is_left_to_other_programs(store, monkeypatch):
    monkeypatch.setattr(blobs, "DISK_FREE_BYTES_MIN", 1 << 60)
    refused(Code.DISK_CAP, store.put_bytes, b"one")
    assert used_on_disk(store) == 0


def test_a_link_planted_in_the_store_is_refused(store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path = store.path(digest_of(b"secret"))
    path.parent.mkdir()
    path.symlink_to(secret)
    assert not store.has(digest_of(b"secret"))
    refused(Code.BLOB_CORRUPT, store.open, digest_of(b"secret"))
    path.unlink()
    os.link(secret, path)
    refused(Code.BLOB_CORRUPT, store.read, digest_of(b"secret"))
    partial = store.folder / "partial" / digest_of(b"other")
    partial.symlink_to(secret)
    with pytest.raises(OSError):
        store.writer(digest_of(b"other"), 5)
    assert secret.read_bytes() == b"secret"


def test_a_blob_that_changed_or_went_away_is_refused_by_name(store):
    ref = store.put_bytes(noise(CHUNK + 1))
    path = store.path(ref.digest)
    path.write_bytes(noise(CHUNK + 1, 1))
    refused(Code.BLOB_CORRUPT, store.verify, ref.digest)
    refused(Code.BLOB_CORRUPT, store.read, ref.digest)
    path.unlink()
    for use in (store.verify, store.read, store.open, store.size, store.leaves):
        refused(Code.BLOB_MISSING, use, ref.digest)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    monkeypatch.setattr(blobs.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "EIO")))
    with pytest.raises(Refused, match="the disk fails"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o077 == 0


def test_a_failed_fsync_keeps_nothing_of_a_blob(store, monkeypatch, tmp_path):
    (tmp_path / "source").write_bytes(b"abc")
    writer = store.writer(digest_of(b"xyz"), 3)
    writer.write(b"xyz")
    monkeypatch.setattr(blobs.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "EIO")))
    for use in (lambda: store.put_bytes(b"abc"), lambda: store.put_file(tmp_path / "source"), writer.finish):
        with pytest.raises(Refused):
            use()
    assert store.bytes_used == used_on_disk(store) == 0


def test_a_blob_that_was_edited_is_not_sound_and_is_deleted_and_one_that_was_not_is_hashed_once(store, monkeypatch):
    ref = store.put_bytes(b"whole")
    assert store.is_sound(ref.digest)
    path = store.path(ref.digest)
    hashed = []
    monkeypatch.setattr(store, "verify", lambda digest: (hashed.append(digest), type(store).verify(store, digest)))
    assert store.is_sound(ref.digest) and not hashed
    os.utime(path, (1, 1))
    assert store.is_sound(ref.digest) and hashed == [ref.digest]
    path.write_bytes(b"edits")
    assert not store.is_sound(ref.digest) and not path.exists() and store.bytes_used == 0
    assert not store.is_sound(ref.digest), "it is gone"
    path.symlink_to("/etc/passwd")
    assert not store.is_sound(ref.digest) and not path.is_symlink()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_disk_that_fails_is_named_and_keeps_nothing(store, monkeypatch, number):
    writer = store.writer(digest_of(b"xyz"), 3)
    writer.write(b"xyz")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(blobs.os, "fsync", fail)
    for use in (lambda: store.put_bytes(b"abc"), writer.finish):
        with pytest.raises(Refused, match="the disk fails") as caught:
            use()
        assert caught.value.reason is Code.DISK_BAD and "disk" in caught.value.fix
    assert store.bytes_used == used_on_disk(store) == 0
    monkeypatch.undo()
    monkeypatch.setattr(blobs.Path, "replace", fail)
    with pytest.raises(Refused, match="the disk fails"):
        store.put_bytes(b"abc")
    assert used_on_disk(store) == 0, "a rename that fails leaves no new file"


def test_what_a_crash_left_is_swept_at_start(store):
    orphan, young = store.folder / ".new-abc", store.folder / ".new-def"
    orphan.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(orphan, (0, 0))
    ref = store.put_bytes(b"whole")
    again = BlobStore(store.folder)
    assert not orphan.exists() and young.exists(), "another process may still be writing the young one"
    young.unlink()
    again = BlobStore(store.folder)
    assert used_on_disk(again) == again.bytes_used == 5
    assert again.read(ref.digest) == b"whole"


def test_the_store_is_closed_to_other_users(tmp_path):
    (tmp_path / "blobs").mkdir(mode=0o755)
    store = BlobStore(tmp_path / "blobs")
    ref = store.put_bytes(b"mine")
    assert store.folder.stat().st_mode & 0o077 == 0
    assert store.path(ref.digest).stat().st_mode & 0o077 == 0
