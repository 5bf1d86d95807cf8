"""Blobs: content addresses, and a folder of verified files. Knows nothing of what the bytes mean.

A blob's digest is the root of a tree of SHA-256 over chunks of BLOB_CHUNK_BYTES. Whoever holds the leaves of
that tree can check every chunk as it arrives; whoever does not checks at the end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from protocol.canonical import shown
from protocol.errors import DISK_CODES, Code, Refused
from protocol.limits import BLOB_BYTES_MAX, BLOB_CHUNK_BYTES, DISK_FREE_BYTES_MIN
from protocol.types import BlobRef, Digest

Data = bytes | bytearray | memoryview

LEAF_BYTES: Final = 32
_ORPHAN_SECONDS: Final = 3600.0  # a new file that nobody has written to for so long was left by a crash
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})  # Windows has no quota
_FAILS = frozenset({errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, getattr(errno, "EUCLEAN", errno.EIO)})
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has neither the flag nor, without rights, the links


def digest_of(data: Data) -> Digest:
    """The content address of these bytes."""
    tree, view = _Tree(), _bytes_of(data)
    for start in range(0, len(view), BLOB_CHUNK_BYTES):
        tree.add(_leaf(view[start : start + BLOB_CHUNK_BYTES]))
    return tree.root(len(view))


def check_digest(text: str) -> Digest:
    """Refuse what is not 64 lower-case hex digits, before it can become part of a path."""
    if not _DIGEST.fullmatch(text):
        raise Refused(Code.FIELD, f"digest {shown(text)!r}, expected 64 hex digits")
    return Digest(text)


def check_leaves(leaves: bytes, digest: Digest, size: int) -> None:
    """Refuse a list of leaves that is not the one under this digest."""
    count = -(-size // BLOB_CHUNK_BYTES)
    if len(leaves) != count * LEAF_BYTES:
        raise Refused(Code.BLOB_CORRUPT, f"{len(leaves)} bytes of leaf hashes, expected {count * LEAF_BYTES}")
    tree = _Tree()
    for start in range(0, len(leaves), LEAF_BYTES):
        tree.add(leaves[start : start + LEAF_BYTES])
    if tree.root(size) != digest:
        raise Refused(Code.BLOB_CORRUPT, f"leaf hashes that do not lead to blob {digest[:12]}")


def atomic_write(path: Path, data: Data, *, full_fix: str | None = None) -> None:
    """Replace a file whole: a crash or a full disk leaves the old bytes or the new, never a mixture."""
    with atomic_file(path, full_fix=full_fix) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path, *, full_fix: str | None = None) -> Iterator[BinaryIO]:
    """A new file that takes its place only when the block ends without an exception."""
    with full_disk_refused(path.parent, fix=full_fix):
        handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)  # 0600, O_EXCL
        new = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def full_disk_refused(folder: Path, *, fix: str | None = None) -> Iterator[None]:
    """A disk that is full, fails, or became read-only is no fault of ours: a refusal, which says where."""
    try:
        yield
    except OSError as error:
        refusal = disk_refusal(error, folder, fix=fix)
        if refusal is None:
            raise
        raise refusal from None


def disk_refusal(error: BaseException, folder: Path, *, fix: str | None = None) -> Refused | None:
    """The refusal for a disk that is full, fails, or became read-only, as it is or of what the system says; none for others."""
    if isinstance(error, Refused) and error.reason in DISK_CODES:
        return error
    if isinstance(error, OSError) and error.errno in _FAILS:
        return Refused(Code.DISK_BAD, f"the disk fails: {folder}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return Refused(Code.DISK_CAP, f"no room to write to {folder}: {error.strerror}", fix=fix)
    return None


class BlobStore:
    """A folder of files named by their content, at most `bytes_max` in all, with what is beside it.

    One thread at a time writes through it; any number read. Where two processes write, each counts only its own
    writes towards the cap until it starts anew.
    """

    def __init__(
        self,
        folder: Path,
        bytes_max: int = BLOB_BYTES_MAX,
        *,
        full_fix: str | None = None,
        beside: Callable[[], int] = lambda: 0,
    ) -> None:
        self.folder = folder
        self.bytes_max = bytes_max
        self._beside = beside  # bytes of other files that count towards the cap
        self._full_fix = full_fix  # what to do here when the disk is full
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._partial = folder / "partial"
        self._partial.mkdir(mode=0o700, exist_ok=True)
        _sweep(folder)
        self.bytes_used = sum(_file_sizes(folder))
        self._writing: set[Digest] = set()
        self._hashed: dict[Digest, tuple[int, int, int]] = {}  # inode, size and time of change when it was

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be. Read it through open or read, which check more."""
        check_digest(digest)
        return self.folder / digest[:2] / digest

    def has(self, digest: Digest) -> bool:
        with suppress(FileNotFoundError):
            return stat.S_ISREG(self.path(digest).lstat().st_mode)
        return False

    def digests(self) -> tuple[Digest, ...]:
        return tuple(Digest(path.name) for path in sorted(self.folder.glob("??/*")) if _DIGEST.fullmatch(path.name))

    def size(self, digest: Digest) -> int:
        with self.open(digest) as file:
            return os.fstat(file.fileno()).st_size

    def open(self, digest: Digest) -> BinaryIO:
        """The blob for reading. A link that somebody planted in its place is refused."""
        path = self.path(digest)
        try:
            handle = os.open(path, os.O_RDONLY | _NO_FOLLOW)
        except FileNotFoundError:
            raise Refused(Code.BLOB_MISSING, f"blob {digest[:12]} is not here") from None
        except OSError as error:
            raise Refused(Code.BLOB_CORRUPT, f"blob {digest[:12]} cannot be opened: {error.strerror}") from None
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(handle)
            raise Refused(Code.BLOB_CORRUPT, f"blob {digest[:12]} is not a plain file of its own")
        return os.fdopen(handle, "rb")

    def read(self, digest: Digest) -> bytes:
        """All bytes, hashed again: for blobs that fit in memory, such as parts."""
        with self.open(digest) as file:
            data = file.read()
        if digest_of(data) != digest:
            raise Refused(Code.BLOB_CORRUPT, f"blob {digest[:12]} has changed on disk")
        return data

    def verify(self, digest: Digest) -> None:
        """Hash the file again; refuse it when its bytes have changed."""
        tree = _Tree()
        with self.open(digest) as file:
            while chunk := file.read(BLOB_CHUNK_BYTES):
                tree.add(_leaf(chunk))
            size = file.tell()
        if tree.root(size) != digest:
            raise Refused(Code.BLOB_CORRUPT, f"blob {digest[:12]} has changed on disk")

    def is_sound(self, digest: Digest) -> bool:
        """Whether the blob is here, whole. It is hashed, unless it was and its file has not changed since; what has
        rotted, or was edited, is deleted."""
        try:
            with self.open(digest) as file:
                status = os.fstat(file.fileno())
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._hashed.get(digest) != stamp:
                self.verify(digest)
                self._hashed[digest] = stamp
        except Refused as refused:
            if refused.reason is not Code.BLOB_MISSING:
                self.delete(digest)
            return False
        return True

    def leaves(self, digest: Digest) -> bytes:
        """The hashes of the blob's chunks, one after the other: with them a reader checks each chunk as it comes."""
        with self.open(digest) as file:
            return b"".join(_leaf(chunk) for chunk in iter(lambda: file.read(BLOB_CHUNK_BYTES), b""))

    def put_bytes(self, data: Data) -> BlobRef:
        view = _bytes_of(data)
        digest = digest_of(view)
        if not self.has(digest):
            with self._reserved(len(view)):
                path = self.path(digest)
                path.parent.mkdir(mode=0o700, exist_ok=True)
                atomic_write(path, view, full_fix=self._full_fix)
        return BlobRef(digest, len(view))

    def put_file(self, source: Path) -> BlobRef:
        """Copy a file in. It is read once, so what is hashed is what is kept."""
        size = source.stat().st_size
        with self._reserved(size):
            handle, name = tempfile.mkstemp(prefix=".new-", dir=self.folder)
            new = Path(name)
            try:
                with os.fdopen(handle, "wb") as copy:
                    digest = _copy(source, copy, size)
                if self.has(digest):
                    self.bytes_used -= size
                else:
                    self._move_in(new, digest)
            finally:
                new.unlink(missing_ok=True)
        return BlobRef(digest, size)

    def delete(self, digest: Digest) -> None:
        path = self.path(digest)
        with suppress(FileNotFoundError):
            size = path.lstat().st_size
            path.unlink()
            self.bytes_used -= size

    def keep_only(self, needed: Set[Digest]) -> None:
        for digest in set(self.digests()) - needed:
            self.delete(digest)

    def writer(self, digest: Digest, size: int, leaves: bytes | None = None) -> Writer:
        """Receive a blob whose address and size are known; goes on where an earlier writer stopped."""
        check_digest(digest)
        if leaves is not None:
            check_leaves(leaves, digest, size)
        return Writer(self, digest, size, leaves)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more would stay below the cap, and leave the disk its free room."""
        try:
            self._check_room(size)
        except Refused:
            return False
        return True

    def _reserve(self, size: int) -> None:
        self._check_room(size)
        self.bytes_used += size

    def _check_room(self, size: int) -> None:
        if not 0 <= size <= min(self.bytes_max, BLOB_BYTES_MAX):
            raise Refused(Code.BLOB_TOO_LARGE, f"blob of {size:,} bytes, the cap is {self.bytes_max:,}")
        in_use = self.bytes_used + self._beside()
        if in_use + size > self.bytes_max:
            what = f"{size:,} bytes more than the {in_use:,} in use pass the cap of {self.bytes_max:,}"
            raise Refused(Code.DISK_CAP, what, fix=self._full_fix)
        free = shutil.disk_usage(self.folder).free
        if free - size < DISK_FREE_BYTES_MIN:
            what = f"{size:,} bytes of the {free:,} free would leave less than {DISK_FREE_BYTES_MIN:,}"
            raise Refused(Code.DISK_CAP, what, fix=self._full_fix)

    @contextmanager
    def _reserved(self, size: int) -> Iterator[None]:
        """Room for a new blob, given back when the block fails."""
        self._reserve(size)
        try:
            with self._named():
                yield
        except BaseException:
            self.bytes_used -= size
            raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A disk that is full all the same, for others write to it too, is a refusal."""
        with full_disk_refused(self.folder, fix=self._full_fix):
            yield

    def _move_in(self, new: Path, digest: Digest) -> None:
        path = self.path(digest)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        new.replace(path)
        _sync_folder(path.parent)


class Writer:
    """A blob on its way in. Every byte is hashed before it counts; an early end keeps the whole chunks for later."""

    def __init__(self, store: BlobStore, digest: Digest, size: int, leaves: bytes | None) -> None:
        assert digest not in store._writing, "two writers of one blob would mix their bytes"
        self.digest = digest
        self.size = size
        self._store = store
        self._leaves = leaves
        self._path = store._partial / digest
        self._tree = _Tree()
        self._written = 0
        self._buffer = bytearray()
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o600)
        self._file = os.fdopen(handle, "r+b")
        store.bytes_used -= os.fstat(handle).st_size
        try:
            store._reserve(size)
        except Refused:
            kept = os.fstat(handle).st_size
            store.bytes_used += kept
            self._file.close()
            if not kept:
                self._path.unlink()
            raise
        store._writing.add(digest)
        self._open = True
        self._resume()

    @property
    def position(self) -> int:
        """Which byte is wanted next."""
        return self._written + len(self._buffer)

    @property
    def is_open(self) -> bool:
        """Whether it takes more; it does not once it was finished, closed or discarded."""
        return self._open

    def write(self, data: Data, offset: int | None = None) -> None:
        """Append; refuse more than the size, another place than wanted, and chunks that have another hash."""
        view = _bytes_of(data)
        if offset is not None and offset != self.position:
            raise Refused(Code.BLOB_CORRUPT, f"bytes from {offset}, expected from {self.position}")
        if self.position + len(view) > self.size:
            self.discard()
            raise Refused(Code.BLOB_CORRUPT, f"more than the {self.size:,} bytes of blob {self.digest[:12]}")
        with self._filling():
            while len(view):
                taken = BLOB_CHUNK_BYTES - len(self._buffer)
                self._buffer += view[:taken]
                view = view[taken:]
                if len(self._buffer) == BLOB_CHUNK_BYTES:
                    self._take_chunk()

    def finish(self) -> BlobRef:
        """Verify the whole, and put it into the store."""
        if self._buffer:
            with self._filling():
                self._take_chunk()
        if self._written != self.size:
            self.close()
            raise Refused(Code.BLOB_CORRUPT, f"{self._written:,} bytes, expected {self.size:,}")
        if self._tree.root(self.size) != self.digest:
            self.discard()
            raise Refused(Code.BLOB_CORRUPT, f"bytes that are not those of blob {self.digest[:12]}")
        with self._filling():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._open = False
        self._store._writing.discard(self.digest)
        if self._store.has(self.digest):
            self._path.unlink()
            self._store.bytes_used -= self.size
        else:
            with self._store._named():
                self._store._move_in(self._path, self.digest)
        return BlobRef(self.digest, self.size)

    def close(self) -> None:
        """Stop for now; whole chunks stay on disk for the next writer of this blob."""
        if self._open:
            with self._filling():
                self._file.truncate(self._written)
                self._file.close()
            self._end(kept=self._written)

    def discard(self) -> None:
        """Stop and keep nothing."""
        if self._open:
            with suppress(OSError):
                self._file.close()  # what it holds back may find no room
            with suppress(OSError):  # on a disk that became read-only it stays, and is hashed again before it is used
                self._path.unlink(missing_ok=True)
            self._end(kept=0)

    @contextmanager
    def _filling(self) -> Iterator[None]:
        """After a write or fsync that failed nobody knows what is on the disk: nothing is kept."""
        try:
            with self._store._named():
                yield
        except (OSError, Refused) as error:
            if not isinstance(error, Refused) or error.reason in (Code.DISK_CAP, Code.DISK_BAD):
                self.discard()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _end(self, *, kept: int) -> None:
        self._open = False
        self._store.bytes_used += kept - self.size
        self._store._writing.discard(self.digest)

    def _resume(self) -> None:
        """Hash again what an earlier writer left, up to the first chunk that is not whole or not right."""
        while self._written < self.size:
            chunk = self._file.read(min(BLOB_CHUNK_BYTES, self.size - self._written))
            if len(chunk) < BLOB_CHUNK_BYTES or not self._fits(chunk):
                break
            self._tree.add(_leaf(chunk))
            self._written += len(chunk)
        self._file.seek(self._written)
        self._file.truncate()

    def _take_chunk(self) -> None:
        if not self._fits(self._buffer):
            self._buffer.clear()  # what came before is right and stays
            raise Refused(Code.BLOB_CORRUPT, f"wrong bytes at {self._written:,} of blob {self.digest[:12]}")
        self._tree.add(_leaf(self._buffer))
        self._file.write(self._buffer)
        self._written += len(self._buffer)
        self._buffer.clear()

    def _fits(self, chunk: Data) -> bool:
        if self._leaves is None:
            return True
        start = self._written // BLOB_CHUNK_BYTES * LEAF_BYTES
        return _leaf(chunk) == self._leaves[start : start + LEAF_BYTES]


class _Tree:
    """A hash tree that grows at its right end; it remembers one hash for each full subtree (RFC 6962's shape)."""

    def __init__(self) -> None:
        self._subtrees: list[tuple[int, bytes]] = []  # (leaves, hash), largest first

    def add(self, leaf: bytes) -> None:
        leaves, top = 1, leaf
        while self._subtrees and self._subtrees[-1][0] == leaves:
            top = _node(self._subtrees.pop()[1], top)
            leaves *= 2
        self._subtrees.append((leaves, top))

    def root(self, size: int) -> Digest:
        """The top hash mixed with the size, so that no two shapes share a digest."""
        hashes = [top for _, top in self._subtrees]
        top = hashes.pop() if hashes else b""
        while hashes:
            top = _node(hashes.pop(), top)
        return Digest(hashlib.sha256(b"\2" + size.to_bytes(8, "little") + top).hexdigest())


def _leaf(chunk: Data) -> bytes:
    hashed = hashlib.sha256(b"\0")
    hashed.update(chunk)
    return hashed.digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _bytes_of(data: Data) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view of another type cannot be cast


def _copy(source: Path, copy: BinaryIO, size: int) -> Digest:
    tree, copied = _Tree(), 0
    with source.open("rb") as file:
        while chunk := file.read(BLOB_CHUNK_BYTES):
            tree.add(_leaf(chunk))
            copied += copy.write(chunk)
            if copied > size:
                break
    if copied != size:
        raise Refused(Code.BLOB_CORRUPT, f"{source} changed while it was read")
    copy.flush()
    os.fsync(copy.fileno())
    return tree.root(size)


def _file_sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may have moved it into its place
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                yield status.st_size


def _sweep(folder: Path) -> None:
    oldest = time.time() - _ORPHAN_SECONDS
    for new in folder.rglob(".new-*"):
        with suppress(FileNotFoundError):  # its writer may have finished meanwhile
            if new.lstat().st_mtime < oldest:
                new.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
