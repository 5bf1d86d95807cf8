"""A blob on its way in."""

from __future__ import annotations

import shutil
from contextlib import suppress
from random import Random
from unittest import mock

from hypothesis import strategies as st

from protocol import blobs
from protocol.errors import Refused
from tests.fuzz.target import scratch, split, target

_CHUNK_BYTES = 1000  # for 256 KiB, so that a hundred times as many downloads are seen

_BLOB = Random(0).randbytes(4 * _CHUNK_BYTES)


@target(
    st.tuples(st.integers(0, len(_BLOB)), st.integers(0, 1)).map(lambda drawn: b"%d %d\n" % drawn + bytes((0, 1, 2, 3)))
)
def download(data: bytes) -> None:
    """A blob on its way in: the rest of the input says what comes, in pieces right and wrong, cut and begun again.

    Whatever happened, what is in the store then is the blob, and the store knows its own size."""
    head, script = split(data)
    words = head.split(" ")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 8 for word in words):
        return
    with mock.patch.object(blobs, "BLOB_CHUNK_BYTES", _CHUNK_BYTES):
        _download(_BLOB[: int(words[0])], script, with_leaves=bool(int(words[1]) % 2))


def _download(whole: bytes, script: bytes, *, with_leaves: bool) -> None:
    digest, folder = blobs.digest_of(whole), scratch() / "blobs"
    shutil.rmtree(folder, ignore_errors=True)
    store = blobs.BlobStore(folder)
    leaves = b"".join(blobs._leaf(whole[at : at + _CHUNK_BYTES]) for at in range(0, len(whole), _CHUNK_BYTES))
    if script[:1] == b"\xff":
        leaves = script[1:]
    writer = store.writer(digest, len(whole), leaves if with_leaves else None)
    for order in script[:64]:
        try:
            _advance(writer, order, whole)
        except Refused:
            writer.close()
        if not writer.is_open:
            writer = store.writer(digest, len(whole), leaves if with_leaves else None)
    with suppress(Refused):
        writer.write(whole[writer.position :], writer.position)
        writer.finish()
    writer.close()
    assert store.bytes_used == sum(blobs._file_sizes(folder))
    if store.has(digest):
        assert store.read(digest) == whole
        store.verify(digest)


def _advance(writer: blobs.Writer, order: int, whole: bytes) -> None:
    """One thing that a link can do to a download."""
    piece, at = (1, 100, _CHUNK_BYTES, _CHUNK_BYTES + 1)[order >> 3 & 3], writer.position
    match order & 7:
        case 0 | 1 | 2:
            writer.write(whole[at : at + piece], at)
        case 3:
            writer.write(b"\1" * piece, at)
        case 4:
            writer.write(whole[at : at + piece], at + 1)
        case 5:
            writer.close()
        case 6:
            writer.write(bytes(len(whole) + 1), at)
        case 7:
            writer.discard()
