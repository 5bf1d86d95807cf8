"""Ingest: a corpus of any size into token shards and one held-out shard, the same for the same text and seed.

A sequence is `context` predictions: tokens [i * context, (i + 1) * context] of its file, the last of which is only
predicted. A document's SHA-256 decides everything about it: whether it came before, whether it is held out, and
where in the order it falls. Memory stays bounded but for 16 bytes of each document's hash (about 100
with Python's own), so 10^7 documents take 1 GB.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import psutil

from coordinator.documents import Reader, Skipped, Source
from coordinator.tokenizer import Tokenizer, Tokens
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
from protocol.types import BlobRef, Shard

SHARD_TOKENS: Final = 4 << 20  # 8 MB at two bytes a token: quick to fetch on a home connection
SHUFFLE_TOKENS: Final = 32 << 20  # held back and drawn from: 64 to 128 MB of memory
BATCH_BYTES: Final = 1 << 20  # text handed to the tokenizer at once
TRAINING_BYTES_MAX: Final = 256 << 20  # a tokenizer learns no more from more text than this
SKIPPED_SHARE_MAX: Final = 0.01  # more bad documents than this mean a wrong file, not a few bad lines
_DOCUMENT_OVERHEAD: Final = 64  # tokens that an entry of the shuffle costs besides its own
_STAGING: Final = ".ingest-"


@dataclass(frozen=True)
class Corpus:
    """What was ingested: all that a run needs to know of its data."""

    shards: tuple[Shard, ...]
    heldout: Shard
    documents: int  # distinct, held-out ones included
    heldout_documents: int
    tokens: int  # in the shards to train on
    skipped: Skipped
    tokenizer: BlobRef | None  # none means bytes
    vocabulary: int
    token_bytes: int
    context: int

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)


@dataclass(frozen=True)
class Progress:
    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int


def ingest(
    paths: Sequence[Path],
    *,
    store: BlobStore,
    work: Path,
    tokenizer: Tokenizer,
    context: int,
    heldout: float,
    batch_sequences: int,
    seed: int = 0,
    field: str | None = None,
    skip_bad: bool = False,
    lossy: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shuffle_tokens: int = SHUFFLE_TOKENS,
) -> Corpus:
    """Read, split, shuffle, write; the store gets shards only when all went well. `work` is a folder for scratch."""
    reader = Reader(field=field, skip_bad=skip_bad, lossy=lossy)
    sources = reader.find(paths)
    total = sum(source.size for source in sources)
    with _staging(work) as folder:
        split = _Split(folder, tokenizer, context, heldout, seed, shard_tokens, shuffle_tokens)
        for batch in _batches(_distinct(reader, sources)):
            split.take(batch)
            if on_progress is not None:
                on_progress(Progress(reader.bytes_done, total, split.documents, split.tokens))
        _check_skipped(reader.skipped, split.documents)
        split.finish()
        _check_size(split, reader.skipped, context, batch_sequences)
        return _publish(split, store, reader.skipped, tokenizer, context)


def sample(paths: Sequence[Path], *, field: str | None = None, lossy: bool = False) -> Iterator[str]:
    """Text to train a tokenizer on: all of a small corpus, an even share of a large one, nothing that is bad."""
    reader = Reader(field=field, skip_bad=True, lossy=lossy)
    sources = reader.find(paths)
    share = TRAINING_BYTES_MAX / max(1, sum(source.size for source in sources))
    return (text for text in reader.documents(sources) if _fraction(_digest(text)) < share)


class _Split:
    """Deals documents out to the training and the held-out writer."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        context: int,
        heldout: float,
        seed: int,
        shard_tokens: int,
        shuffle_tokens: int,
    ) -> None:
        whole_sequences = max(1, shard_tokens // context) * context + 1  # the last prediction needs one token more
        self.training = _Shuffle(_Writer(folder / "training", tokenizer, whole_sequences), shuffle_tokens, seed)
        self.heldout = _Shuffle(_Writer(folder / "heldout", tokenizer, None), shuffle_tokens, seed)
        self.reserve = _Reserve(context + 1)
        self.documents = 0
        self.tokens = 0
        self._tokenizer = tokenizer
        self._context = context
        self._share = heldout

    def take(self, batch: Sequence[tuple[bytes, str]]) -> None:
        encoded = self._tokenizer.encode_documents([text for _, text in batch])
        for (digest, _), tokens in zip(batch, encoded, strict=True):
            self.documents += 1
            self.tokens += len(tokens)
            if _fraction(digest) < self._share:
                self.heldout.add(digest, tokens)
                continue
            for entry in self.reserve.swap(digest, tokens):
                self.training.add(*entry)

    def finish(self) -> None:
        """If the hashes held out less than one sequence, the documents with the lowest ones are held out too."""
        for digest, tokens in self.reserve.lowest_first():
            short = self.heldout.tokens <= self._context and self.documents > 1
            (self.heldout if short else self.training).add(digest, tokens)
        self.training.finish()
        self.heldout.finish()


class _Reserve:
    """The documents of lowest hash, just enough of them to make `tokens`; the others are let go at once."""

    def __init__(self, tokens: int) -> None:
        self._wanted = tokens
        self._held = 0
        self._heap: list[tuple[int, bytes, Tokens]] = []  # highest hash first

    def swap(self, digest: bytes, tokens: Tokens) -> Iterator[tuple[bytes, Tokens]]:
        heapq.heappush(self._heap, (-int.from_bytes(digest), digest, tokens))
        self._held += len(tokens)
        while self._held - len(self._heap[0][2]) >= self._wanted:
            _, digest, tokens = heapq.heappop(self._heap)
            self._held -= len(tokens)
            yield digest, tokens

    def lowest_first(self) -> list[tuple[bytes, Tokens]]:
        return [(digest, tokens) for _, digest, tokens in sorted(self._heap, reverse=True)]


class _Shuffle:
    """A bounded buffer that hands on its documents in an order drawn from their hashes and the seed.

    A corpus that fits is shuffled whole and comes out the same however its files were named.
    """

    def __init__(self, writer: _Writer, tokens_max: int, seed: int) -> None:
        self.writer = writer
        self.documents = 0
        self.tokens = 0
        self._room = tokens_max
        self._salt = seed.to_bytes(8, "little", signed=True)
        self._held: list[tuple[bytes, Tokens]] = []

    def add(self, digest: bytes, tokens: Tokens) -> None:
        key = hashlib.sha256(self._salt + digest).digest()
        self.documents += 1
        self.tokens += len(tokens)
        self._held.append((key, tokens))
        self._room -= len(tokens) + _DOCUMENT_OVERHEAD
        while self._room < 0:
            drawn = int.from_bytes(key[:8]) % len(self._held)
            self._held[drawn], self._held[-1] = self._held[-1], self._held[drawn]
            key, tokens = self._held.pop()
            self._room += len(tokens) + _DOCUMENT_OVERHEAD
            self.writer.write(tokens)

    def finish(self) -> None:
        for _, tokens in sorted(self._held, key=lambda entry: entry[0]):
            self.writer.write(tokens)
        self._held.clear()
        self.writer.finish()


class _Writer:
    """Token files of at most `tokens_max` tokens each; a document may go on in the next."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, tokens_max: int | None) -> None:
        self.files: list[tuple[Path, int]] = []  # each with its tokens
        self._prefix = prefix
        self._dtype = tokenizer.dtype
        self._tokens_max = tokens_max
        self._file: IO[bytes] | None = None
        self._tokens = 0

    def write(self, tokens: Tokens) -> None:
        while len(tokens):
            if self._file is None:
                self._file = self._path.open("xb")
            part = tokens if self._tokens_max is None else tokens[: self._tokens_max - self._tokens]
            self._file.write(part.astype(self._dtype, copy=False).tobytes())
            self._tokens += len(part)
            tokens = tokens[len(part) :]
            if self._tokens == self._tokens_max:
                self.finish()

    def finish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self.files.append((self._path, self._tokens))
        self._file, self._tokens = None, 0

    @property
    def _path(self) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{len(self.files):06}")


def _distinct(reader: Reader, sources: Sequence[Source]) -> Iterator[tuple[bytes, str]]:
    """Each document once, with its hash."""
    seen: set[bytes] = set()
    for text in reader.documents(sources):
        digest = _digest(text)
        if digest[:16] in seen:
            reader.skipped.duplicates += 1
            continue
        seen.add(digest[:16])
        yield digest, text


def _batches(documents: Iterator[tuple[bytes, str]]) -> Iterator[list[tuple[bytes, str]]]:
    batch: list[tuple[bytes, str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_BYTES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_skipped(skipped: Skipped, documents: int) -> None:
    seen = documents + skipped.bad + skipped.duplicates + skipped.empty
    if skipped.bad > SKIPPED_SHARE_MAX * seen:
        raise Refused(
            Code.DATA_BAD,
            f"{skipped.bad} of {seen} documents are bad; at most {SKIPPED_SHARE_MAX:.0%} are skipped",
            fix="Run it without --skip-bad to see the first of them, or with --lossy if it is only their encoding.",
        )


def _check_size(split: _Split, skipped: Skipped, context: int, batch_sequences: int) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in vars(skipped).items() if count)
    if split.documents == 0:
        raise Refused(Code.DATA_EMPTY, f"no text was found{f' (left out: {left_out})' if left_out else ''}")
    if split.documents == 1:
        raise Refused(Code.DATA_EMPTY, "only one document was found; one is held out and the others are trained on")
    tokens, held = split.training.tokens, split.heldout.tokens
    sequences = sum((count - 1) // context for _, count in split.training.writer.files)
    if sequences < batch_sequences or held <= context:
        raise Refused(
            Code.DATA_EMPTY,
            f"{split.documents} documents: {tokens} tokens to train on make {sequences} sequences of {context} and a "
            f"batch takes {batch_sequences}; {held} are held out and that takes {context + 1}",
        )


def _publish(split: _Split, store: BlobStore, skipped: Skipped, tokenizer: Tokenizer, context: int) -> Corpus:
    """All of the shards or none: what the store cannot take to the end is taken out again."""
    files = [(path, tokens) for path, tokens in split.training.writer.files if tokens > context]
    before, placed = set(store.digests()), []
    try:
        for path, tokens in (*files, *split.heldout.writer.files):
            ref = store.put_file(path)
            path.unlink()  # the store has copied it, and the disk may be small
            placed.append(Shard(digest=ref.digest, size=ref.size, tokens=tokens, sequences=(tokens - 1) // context))
        tokenizer_ref = None if tokenizer.is_bytes else store.put_bytes(tokenizer.json)
    except BaseException:
        for shard in placed:
            if shard.digest not in before:
                store.delete(shard.digest)
        raise
    *shards, heldout = placed
    return Corpus(
        shards=tuple(shards),
        heldout=heldout,
        documents=split.documents,
        heldout_documents=split.heldout.documents,
        tokens=sum(shard.tokens for shard in shards),
        skipped=skipped,
        tokenizer=tokenizer_ref,
        vocabulary=tokenizer.vocabulary,
        token_bytes=tokenizer.token_bytes,
        context=context,
    )


@contextmanager
def _staging(work: Path) -> Iterator[Path]:
    """A scratch folder that goes with us; those of killed processes are swept first."""
    for left in work.glob(f"{_STAGING}*"):
        owner = left.name.removeprefix(_STAGING).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{os.getpid()}-", dir=work))
    try:
        yield folder
    except OSError as error:  # the reader has turned its own into refusals
        raise Refused(Code.DISK_CAP, f"{work}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _fraction(digest: bytes) -> float:
    """Where a hash falls between 0 and 1."""
    return int.from_bytes(digest[:8]) / 2**64
