"""Blobs through the door: which of them nodes may have, which are taken from them, how much and how fast. Knows no gRPC."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from coordinator.core import quotas
from coordinator.desk import Desk
from protocol.blobs import LEAF_BYTES, BlobStore, Writer, check_digest, check_leaves
from protocol.errors import Code, Refused
from protocol.limits import BLOB_CHUNK_BYTES
from protocol.types import BlobRef, Digest, NodeId

CHUNK_SECONDS_MAX: Final = 60.0  # so long a line may be silent, or slower than the next line says
BYTES_PER_SECOND_MIN: Final = 16 << 10  # of uploads and downloads: no slower line can take part in a round
DOWNLOAD_HOUR_BYTES_MIN: Final = 1 << 30  # what a node may download in an hour; of a larger run, all of it twice
PIECE_BYTES: Final = 32 << 10  # of a download, in one message: two seconds of the slowest line; more each time
PIECE_SECONDS: Final = 0.1  # that one takes no longer than this
LEAVES_BYTES_MAX: Final = 2 << 20  # of a blob of 16 GiB; larger ones are checked at their end
LEAVES_KEPT: Final = 64  # blobs whose hashes are remembered, some 10 KB each

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A piece of a blob; its place, the blob's digest and size are what the sender says."""

    data: bytes
    offset: int
    digest: str
    size: int


class Transfers:
    """What goes on between nodes and the blob stores."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._downloads: dict[NodeId, float] = {}  # when its quota is whole again
        self._uploading: set[Digest] = set()
        self._leaves: OrderedDict[Digest, bytes] = OrderedDict()

    async def send(self, node: NodeId, text: str, offset: int, send: Callable[[Chunk], Awaitable[object]]) -> None:
        """A blob from this byte on, as fast as the node takes it."""
        digest, start = self._served(text), offset
        with self._desk.blobs.open(digest) as file:
            size = os.fstat(file.fileno()).st_size
            if offset > size:
                raise Refused(Code.FIELD, f"offset {offset}, the blob has {size} bytes")
            file.seek(offset)
            now = time.monotonic()
            due, piece = now + CHUNK_SECONDS_MAX, PIECE_BYTES
            while data := await asyncio.to_thread(file.read, piece):
                self._charge(node, len(data))
                await _in_time(send(Chunk(data, offset, digest, size)), until=due)
                offset += len(data)
                began, now = now, time.monotonic()
                due = min(due + len(data) / BYTES_PER_SECOND_MIN, now + CHUNK_SECONDS_MAX)
                piece = min(piece + PIECE_BYTES, BLOB_CHUNK_BYTES) if now - began < PIECE_SECONDS else PIECE_BYTES
        # A model, a shard or the tokenizer: few, and worth a line.
        if not start and not self._desk.store.has_part(digest):
            log.info("a node has downloaded a blob", node=node[:16], digest=digest[:16], bytes=size)

    async def leaves(self, text: str) -> bytes:
        """The hashes of a blob's pieces; none of a blob that has too many."""
        digest = self._served(text)
        if digest not in self._leaves:
            size = self._desk.blobs.size(digest)
            if -(-size // BLOB_CHUNK_BYTES) * LEAF_BYTES > LEAVES_BYTES_MAX:
                return b""
            leaves = await asyncio.to_thread(self._desk.blobs.leaves, digest)
            check_leaves(leaves, digest, size)
            self._leaves[digest] = leaves
        while len(self._leaves) > LEAVES_KEPT:
            self._leaves.popitem(last=False)
        return self._leaves[digest]

    async def receive(self, node: NodeId, chunks: AsyncIterator[Chunk]) -> bool:
        """Take what is wanted of this node; whether it was."""
        first = await _in_time(anext(chunks, None))
        if first is None:
            raise Refused(Code.FIELD, "an upload without a chunk")
        wanted, store = self._wanted(node, first)
        if wanted is None or wanted.digest in self._uploading:
            return False
        self._uploading.add(wanted.digest)
        try:
            await self._write(store, wanted, first, chunks)
        finally:
            self._uploading.discard(wanted.digest)
        if store is self._desk.blobs:
            self._desk.part_stored(wanted.digest)
        else:
            self._desk.auditor.stir()
            self._desk.recounter.stir()
        return True

    def asked(self, node: NodeId) -> tuple[Digest, ...]:
        """What this node is to show of what it brought, and of what it made its means of."""
        return (*self._desk.auditor.asked(node), *(each.digest for each in self._desk.recounter.asked(node)))

    def _charge(self, node: NodeId, size: int) -> None:
        """Of what a node may download in an hour: its first join, and once more for a disk that was lost."""
        hour = max(DOWNLOAD_HOUR_BYTES_MIN, 2 * self._desk.blobs.bytes_used)
        now = time.monotonic()
        full_at = self._downloads.get(node, now)
        self._downloads[node], wait_seconds = quotas.take(full_at, quotas.Rate(hour, hour / 3600), now=now, amount=size)
        quotas.check(f"bytes of the {hour:,} that a node may download in an hour", wait_seconds)

    def _served(self, text: str) -> Digest:
        """A blob of this run that nodes may have. The held-out data is not among them."""
        digest, manifest = check_digest(text), self._desk.manifest.manifest
        served = {shard.digest for shard in self._desk.shards} | {self._desk.base().blob.digest}
        if manifest.tokenizer is not None:
            served.add(manifest.tokenizer.digest)
        allowed = digest in served or self._desk.store.has_part(digest)
        if not allowed and all(base.blob.digest != digest for base in self._desk.store.bases()):
            raise Refused(Code.BLOB_MISSING, f"blob {digest[:12]} is not one of this run's")
        return digest

    def _wanted(self, node: NodeId, first: Chunk) -> tuple[BlobRef | None, BlobStore]:
        """What these bytes are said to be, and where they belong: what this node was asked to show of its own work, or a
        part of a certified record. None when it is here already."""
        digest, auditor = check_digest(first.digest), self._desk.auditor
        if digest in auditor.asked(node):
            if first.size != auditor.size:
                raise Refused(Code.FIELD, f"size {first.size}, a contribution has {auditor.size}")
            return BlobRef(digest, auditor.size), auditor.blobs
        for evidence in self._desk.recounter.asked(node):
            if digest == evidence.digest:
                if first.size != evidence.size:
                    raise Refused(Code.FIELD, f"size {first.size}, its part says {evidence.size}")
                return evidence, self._desk.recounter.blobs
        part = next((part for part in self._desk.state.wanted if part.digest == digest), None)
        if part is None and not self._desk.store.has_part(digest):
            raise Refused(
                Code.BLOB_MISSING, f"no certified record names part {digest[:12]}", fix="Push the record first."
            )
        if part is not None and first.size != part.size:
            raise Refused(Code.FIELD, f"size {first.size}, the record says {part.size}")
        return (None if part is None else BlobRef(part.digest, part.size)), self._desk.blobs

    async def _write(self, store: BlobStore, wanted: BlobRef, first: Chunk, chunks: AsyncIterator[Chunk]) -> None:
        if store.has(wanted.digest):  # an earlier upload ended between the file and the event
            return
        writer = self._writer(store, wanted)
        try:
            async with asyncio.timeout(CHUNK_SECONDS_MAX + wanted.size / BYTES_PER_SECOND_MIN):
                _take(writer, first)
                while (chunk := await _in_time(anext(chunks, None))) is not None:
                    _take(writer, chunk)
            if writer.position != wanted.size:  # finish would keep what came for a later writer
                raise Refused(Code.BLOB_CORRUPT, f"{writer.position} bytes, the record says {wanted.size}")
            writer.finish()
        except TimeoutError:
            raise Refused(Code.LIMIT, f"an upload slower than {BYTES_PER_SECOND_MIN} bytes per second") from None
        finally:
            writer.discard()

    def _writer(self, store: BlobStore, wanted: BlobRef) -> Writer:
        """From the first byte: what a stranger left half-done may be wrong, and is only found out at the end."""
        writer = store.writer(wanted.digest, wanted.size)
        if writer.position:
            writer.discard()
            writer = store.writer(wanted.digest, wanted.size)
        return writer


async def _in_time(act: Awaitable[T], *, until: float | None = None) -> T:
    """`until` is by the monotonic clock."""
    seconds = CHUNK_SECONDS_MAX if until is None else until - time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            return await act
    except TimeoutError:
        what = f"nothing moved for {CHUNK_SECONDS_MAX:.0f} s, or less than {BYTES_PER_SECOND_MIN} bytes per second"
        raise Refused(Code.LIMIT, what) from None


def _take(writer: Writer, chunk: Chunk) -> None:
    if not 0 < len(chunk.data) <= BLOB_CHUNK_BYTES:
        raise Refused(Code.LIMIT, f"a chunk of {len(chunk.data)} bytes, expected 1 to {BLOB_CHUNK_BYTES}")
    writer.write(chunk.data, chunk.offset)
