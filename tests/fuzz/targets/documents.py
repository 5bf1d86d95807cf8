"""Files that a researcher makes data of, and tokenizers."""

from __future__ import annotations

import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

from coordinator import documents
from coordinator.tokenizer import Tokenizer, byte_tokenizer
from tests.fuzz.target import scratch, split, target


@target(st.just(byte_tokenizer().json))
def tokenizer(data: bytes) -> None:
    found = Tokenizer(data)
    ids = found.encode("a b\n1")
    assert all(0 <= each < found.vocabulary for each in ids)
    found.decode(ids)


def _parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


_LINES = b'{"text": "one"}\n{"id": 2, "text": "two \\u00e9"}\n'

_DOCUMENTS = {
    "txt": b"one\n\ntwo\n",
    "jsonl": _LINES,
    "jsonl.gz": gzip.compress(_LINES, mtime=0),
    "jsonl.zst": zstandard.compress(_LINES),
    "parquet": _parquet(["one", "two"]),
}


@target(st.sampled_from(sorted(_DOCUMENTS)).map(lambda kind: f"{kind}\n".encode() + _DOCUMENTS[kind]))
def corpus(data: bytes) -> None:
    """A file of documents. `+` before its kind packs the rest first; words after it are --skip-bad and --lossy."""
    head, body = split(data)
    kind, *options = head.split(" ")
    if kind.lstrip("+") not in _DOCUMENTS:
        return
    pack = {"+jsonl.gz": gzip.compress, "+jsonl.zst": zstandard.compress}.get(kind)
    path = scratch() / f"corpus.{kind.lstrip('+')}"
    path.write_bytes(pack(body) if pack else body)
    reader = documents.Reader(skip_bad="skip" in options, lossy="lossy" in options)
    for text in reader.documents(reader.find([path])):
        text.encode()
        assert "\0" not in text and not text.isspace()
