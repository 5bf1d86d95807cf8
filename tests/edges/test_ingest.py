"""Ingest: every format and every bad input that a corpus can hold, against a real store."""

import gzip
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from coordinator import documents
from coordinator.documents import PIECE_BYTES
from coordinator.ingest import Corpus, Progress, ingest, sample
from coordinator.tokenizer import END, Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer
from protocol import canonical
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused

CONTEXT = 16


def texts(count, seed=0):
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(["héllo", "world", "日本", "🙂", "one", "two", "three\n"], k=20)) + f" {n}"
        for n in range(count)
    ]


def lines(documents):
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(documents))


def take(path, tmp_path, **settings):
    """Ingest into tmp_path/store."""
    settings = {"tokenizer": byte_tokenizer(), "context": CONTEXT, "heldout": 0.1, "batch_sequences": 2} | settings
    paths = path if isinstance(path, list) else [path]
    return ingest(paths, store=BlobStore(tmp_path / "store"), work=tmp_path, **settings)


def tokens_of(shard, tmp_path, dtype="<u2"):
    return np.frombuffer(BlobStore(tmp_path / "store").read(shard.digest), dtype)


def documents_of(shards, tmp_path):
    """The texts that byte shards hold, cut at the end tokens."""
    tokens = np.concatenate([tokens_of(shard, tmp_path) for shard in shards])
    parts = np.split(tokens, np.flatnonzero(tokens == 256) + 1)
    return [part[:-1].astype(np.uint8).tobytes().decode() for part in parts if len(part)]


def refusal(path, tmp_path, **settings):
    with pytest.raises(Refused) as caught:
        take(path, tmp_path, **settings)
    assert not list(tmp_path.glob(".ingest-*")), "scratch was left behind"
    assert BlobStore(tmp_path / "store").digests() == (), "something was half-written"
    return caught.value


def put(path, data):
    path.write_bytes(data)
    return path


def jsonl(tmp_path, bad, at=3):
    """Ten good lines with a bad one among them."""
    good = lines(texts(10)).splitlines(keepends=True)
    return put(tmp_path / "corpus.jsonl", b"".join(good[:at]) + bad + b"".join(good[at:]))


# --- what comes out


def test_every_document_comes_out_once_in_training_or_held_out(tmp_path):
    corpus = take(put(tmp_path / "a.jsonl", lines(texts(200))), tmp_path)
    training = documents_of(corpus.shards, tmp_path)
    heldout = documents_of([corpus.heldout], tmp_path)
    assert sorted(training + heldout) == sorted(texts(200))
    assert len(heldout) == corpus.heldout_documents and 5 <= len(heldout) <= 40
    assert corpus.documents == 200
    assert corpus.tokens == sum(len(text.encode()) + 1 for text in training)
    assert (corpus.vocabulary, corpus.token_bytes, corpus.tokenizer) == (257, 2, None)
    assert corpus.heldout.sequences == (corpus.heldout.tokens - 1) // CONTEXT


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_format_changes_nothing_about_the_corpus(tmp_path, suffix):
    documents = texts(100)
    path = tmp_path / f"corpus.{suffix}"
    plain = lines(documents)
    middle = plain.index(b"\n", len(plain) // 2) + 1
    match suffix:
        case "jsonl":
            path.write_bytes(plain)
        case "jsonl.gz":  # two members, as `cat a.gz b.gz` makes
            path.write_bytes(gzip.compress(plain[:middle]) + gzip.compress(plain[middle:]))
        case "jsonl.zst":
            pack = zstandard.ZstdCompressor().compress
            path.write_bytes(pack(plain[:middle]) + pack(plain[middle:]))
        case "parquet":
            pq.write_table(pa.table({"text": documents, "id": range(100)}), path, row_group_size=30)
    corpus = take(path, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for number, text in enumerate(documents):
        (other / f"{number}.txt").write_text(text, encoding="utf-8")
    assert (corpus.shards, corpus.heldout) == ((same := take(other, tmp_path)).shards, same.heldout)


def test_the_order_of_files_does_not_matter_and_the_seed_does(tmp_path):
    documents = texts(100)
    one = take(put(tmp_path / "a.jsonl", lines(documents)), tmp_path)
    two = take(put(tmp_path / "b.jsonl", lines(documents[::-1])), tmp_path)
    three = take(tmp_path / "a.jsonl", tmp_path, seed=1)
    assert one.shards == two.shards and one.heldout == two.heldout
    assert one.shards != three.shards
    held = [sorted(documents_of([corpus.heldout], tmp_path)) for corpus in (one, three)]
    assert held[0] == held[1], "what is held out must not depend on the seed"
    assert documents_of(one.shards, tmp_path) != [text for text in documents if text not in held[0]]


def test_a_corpus_larger_than_the_buffers_is_cut_into_shards_of_whole_sequences(tmp_path):
    documents = texts(400)
    path = put(tmp_path / "a.jsonl", lines(documents))
    corpus = take(path, tmp_path, shard_tokens=1000, shuffle_tokens=3000)
    again = take(path, tmp_path, shard_tokens=1000, shuffle_tokens=3000)
    assert corpus == again
    assert {shard.tokens for shard in corpus.shards[:-1]} == {993} and len(corpus.shards) > 20
    everything = documents_of(corpus.shards, tmp_path) + documents_of([corpus.heldout], tmp_path)
    assert len(set(documents) - set(everything)) <= 1, "only the end of the last shard may fall short of a sequence"
    assert 0 <= sum(len(text.encode()) + 1 for text in documents) - corpus.tokens - corpus.heldout.tokens <= CONTEXT
    position = {text: index for index, text in enumerate(documents)}
    moved = [abs(position[text] - index) for index, text in enumerate(everything) if text in position]
    assert max(moved) > 20, "nothing was shuffled"


def test_the_trainer_can_read_every_sequence_of_every_shard_and_no_more(tmp_path):
    from node.trainer import Feed, ShardError, TrainerSpec
    from protocol.order import sequence_at
    from protocol.types import DataRange

    path = put(tmp_path / "a.jsonl", lines(texts(60)))
    corpus = take(path, tmp_path, shard_tokens=1000)
    store = BlobStore(tmp_path / "store")
    feed = Feed(TrainerSpec("", 0, "", corpus.vocabulary, CONTEXT, corpus.token_bytes, {}))
    for shard in (*corpus.shards, corpus.heldout):
        whole = tokens_of(shard, tmp_path)
        file = store.path(shard.digest)
        inputs, targets = feed.read([(DataRange(0, shard.digest, 0, shard.sequences), file)])
        assert inputs.shape == (shard.sequences, CONTEXT)
        order = [sequence_at(i, sequences=shard.sequences, pass_number=0) for i in range(shard.sequences)]
        starts = [at * CONTEXT for at in order]
        assert inputs.tolist() == [whole[start : start + CONTEXT].tolist() for start in starts]
        assert targets.tolist() == [whole[start + 1 : start + CONTEXT + 1].tolist() for start in starts]
        with pytest.raises(ShardError):
            feed.read([(DataRange(0, shard.digest, shard.sequences, shard.sequences + 1), file)])
    assert sum(shard.sequences for shard in corpus.shards) == corpus.sequences


def test_a_held_out_shard_is_one_whole_sequence_with_the_token_after_it(tmp_path):
    """With documents of `context` tokens one would do for the inputs, but nothing comes after its last token."""
    documents = [f"{n:0{CONTEXT - 1}}" for n in range(30)]
    corpus = take(put(tmp_path / "a.jsonl", lines(documents)), tmp_path, heldout=1e-9)
    assert (corpus.heldout.tokens, corpus.heldout.sequences) == (2 * CONTEXT, 1)


def test_exact_duplicates_are_dropped_and_counted(tmp_path):
    documents = texts(50)
    corpus = take(put(tmp_path / "a.jsonl", lines(documents + documents[:20] + documents[:1])), tmp_path)
    assert corpus.documents == 50 and corpus.skipped.duplicates == 21


def test_at_least_one_sequence_is_held_out_when_the_share_would_give_none(tmp_path):
    corpus = take(put(tmp_path / "a.jsonl", lines(f"document {n}" for n in range(30))), tmp_path, heldout=1e-9)
    assert corpus.heldout.sequences == 1 and corpus.heldout_documents == 2 and corpus.documents == 30
    assert len(documents_of(corpus.shards, tmp_path)) == 28


def test_one_long_text_file_is_cut_into_documents_at_line_ends_without_losing_a_byte(tmp_path):
    text = "".join(f"line {n} of a long book, ünïcode and all\n" + "\n" * (n % 7 == 0) for n in range(8000))
    corpus = take(put(tmp_path / "book.txt", text.encode()), tmp_path)
    pieces = documents_of([*corpus.shards, corpus.heldout], tmp_path)
    assert len(pieces) == corpus.documents > 4
    assert all(len(piece.encode()) <= PIECE_BYTES and piece.endswith("\n") for piece in pieces)
    assert "".join(sorted(pieces, key=text.index)) == text


def test_a_file_without_lines_is_cut_between_characters(tmp_path):
    text = "".join(f"🙂{n}日{n * n}é" for n in range(30_000))
    corpus = take(put(tmp_path / "one-line.txt", text.encode()), tmp_path)
    assert "".join(sorted(documents_of([*corpus.shards, corpus.heldout], tmp_path), key=text.index)) == text


def test_a_folder_gives_its_readable_files_and_counts_the_rest(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep/er").mkdir(parents=True)
    (folder / ".git").mkdir()
    put(folder / ".git/config.txt", b"hidden")
    put(folder / ".env", b"hidden")
    put(folder / "picture.png", b"\x89PNG....")
    put(folder / "no-suffix", b"unknown")
    put(folder / "really.txt", b"PK\x03\x04 a zip that calls itself text")
    put(folder / "object.py", b"binary \0 code")
    put(folder / "empty.md", b"  \n")
    for number, text in enumerate(texts(20)):
        put(folder / "deep/er" / f"{number}.py", text.encode())
    put(folder / "more.jsonl", lines(texts(20, seed=1)))
    corpus = take(folder, tmp_path)
    assert corpus.documents == 40
    assert vars(corpus.skipped) == {"hidden": 2, "unknown": 2, "binary": 2, "bad": 0, "empty": 1, "duplicates": 0}


def test_a_byte_order_mark_goes_and_line_ends_stay(tmp_path):
    put(tmp_path / "a.txt", b"\xef\xbb\xbfwindows\r\nlines \xe2\x80\xa8 and separators of all kinds")
    put(tmp_path / "b.txt", b"another document of more than a sequence " * 3)
    put(tmp_path / "c.jsonl", b"\xef\xbb\xbf" + lines(texts(3)).replace(b"\n", b"\r\n"))
    corpus = take([tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl")], tmp_path)
    found = documents_of([*corpus.shards, corpus.heldout], tmp_path)
    assert "windows\r\nlines \u2028 and separators of all kinds" in found and len(found) == 5


def test_progress_ends_at_the_total(tmp_path):
    seen: list[Progress] = []
    take(put(tmp_path / "a.jsonl", lines(texts(100))), tmp_path, on_progress=seen.append)
    assert (seen[-1].bytes_done, seen[-1].documents) == (seen[-1].bytes_total, 100)


def test_a_corpus_survives_its_canonical_bytes(tmp_path):
    corpus = take(put(tmp_path / "a.jsonl", lines(texts(20))), tmp_path)
    assert canonical.from_bytes(Corpus, canonical.to_bytes(corpus)) == corpus


def test_scratch_of_a_killed_ingest_is_swept(tmp_path):
    (tmp_path / ".ingest-999999999-abc").mkdir()
    (tmp_path / ".ingest-1-abc").mkdir()  # its process is alive
    take(put(tmp_path / "a.jsonl", lines(texts(20))), tmp_path)
    assert [path.name for path in tmp_path.glob(".ingest-*")] == [".ingest-1-abc"]


def test_a_store_that_fills_up_is_left_as_it_was(tmp_path):
    path = put(tmp_path / "a.jsonl", lines(texts(400)))
    with pytest.raises(Refused) as caught:
        ingest(
            [path],
            store=BlobStore(tmp_path / "store", bytes_max=20_000),
            work=tmp_path,
            tokenizer=byte_tokenizer(),
            context=CONTEXT,
            heldout=0.1,
            batch_sequences=2,
            shard_tokens=2000,
        )
    assert caught.value.reason in (Code.DISK_CAP, Code.BLOB_TOO_LARGE)
    assert BlobStore(tmp_path / "store").digests() == ()


# --- bad content


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"text": "a",}\n', "corpus.jsonl:4"),
        (b'{"text": "a"} {"text": "b"}\n', "corpus.jsonl:4"),
        (b"\n", "corpus.jsonl:4: an empty line"),
        (b'["text"]\n', 'wanted an object with a string "text"'),
        (b'{"text": 3}\n', 'wanted an object with a string "text"'),
        (b'{"other": "a"}\n', 'wanted an object with a string "text"'),
        (b'{"text": "a", "text": "b"}\n', "corpus.jsonl:4: a key twice"),
        (b'{"text": "a", "n": ' + b"9" * 400 + b"}\n", "corpus.jsonl:4: a number of 400"),
        (b'{"text": "a", "n": NaN}\n', "corpus.jsonl:4: NaN is not JSON"),
        (b'{"text": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "corpus.jsonl:4: nested too deeply"),
        (
            json.dumps({"text": "a"} | {str(n): n for n in range(20_000)}).encode() + b"\n",
            "corpus.jsonl:4: an object of",
        ),
        (b'{"text": "caf\xe9"}\n', "corpus.jsonl:4: byte"),
        (b'{"text": "half \\ud83d pair"}\n', "corpus.jsonl:4: a NUL or half"),
        (b'{"text": "nul \\u0000 inside"}\n', "corpus.jsonl:4: a NUL or half"),
    ],
)
def test_a_bad_json_line_is_refused_by_file_and_line_and_skipped_on_request(tmp_path, bad, says):
    path = jsonl(tmp_path, bad)
    refused = refusal(path, tmp_path)
    assert refused.reason is Code.DATA_BAD and says in refused.what
    many = put(tmp_path / "many.jsonl", path.read_bytes() + lines(texts(200, seed=5)))
    corpus = take(many, tmp_path, skip_bad=True)
    assert corpus.skipped.bad == 1 and corpus.documents == 210


def test_the_byte_that_is_not_utf8_is_named(tmp_path):
    good = ("näive text\n" * 9000).encode()
    refused = refusal(put(tmp_path / "a.txt", good + b"caf\xe9 au lait"), tmp_path)
    assert f"a.txt: byte {len(good) + 3} is not UTF-8 (0xe9)" in refused.what
    line = lines(["x"])
    refused = refusal(put(tmp_path / "a.jsonl", line + b'{"text": "\xff"}\n'), tmp_path)
    assert f"a.jsonl:2: byte {len(line) + 10} is not UTF-8" in refused.what
    refused = refusal(put(tmp_path / "b.txt", b"\xef\xbb\xbfabc\0def"), tmp_path)
    assert "b.txt: byte 6 is NUL" in refused.what
    refused = refusal(put(tmp_path / "c.txt", "utf-16".encode("utf-16")), tmp_path)
    assert "c.txt: byte 0 is not UTF-8 (0xff)" in refused.what


def test_lossy_replaces_what_is_no_text(tmp_path):
    put(tmp_path / "a.txt", b"caf\xe9 \0 au lait, and more of it")
    put(tmp_path / "b.jsonl", b'{"text": "half \\ud83d pair, and more of it"}\n' + lines(texts(5)))
    corpus = take([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path, lossy=True)
    found = documents_of([*corpus.shards, corpus.heldout], tmp_path)
    assert "caf\ufffd \ufffd au lait, and more of it" in found and "half \ufffd pair, and more of it" in found


def test_more_than_one_percent_of_bad_documents_is_an_error_even_when_skipped(tmp_path):
    good = lines(texts(99))
    take(put(tmp_path / "one.jsonl", good + b"{\n"), tmp_path, skip_bad=True)
    shutil.rmtree(tmp_path / "store")
    refused = refusal(put(tmp_path / "two.jsonl", good + b"{\n{\n"), tmp_path, skip_bad=True)
    assert "2 of 101 documents are bad" in refused.what


def test_too_little_text_is_refused_with_the_arithmetic(tmp_path):
    (tmp_path / "none").mkdir()
    put(tmp_path / "none/a.png", b"\x89PNG")
    refused = refusal(tmp_path / "none", tmp_path)
    assert refused.reason is Code.DATA_EMPTY and "no text was found (left out: 1 unknown)" in refused.what
    refused = refusal(put(tmp_path / "one.txt", b"only this"), tmp_path)
    assert refused.reason is Code.DATA_EMPTY and "only one document" in refused.what
    refused = refusal(put(tmp_path / "few.jsonl", lines(["a" * 20, "b" * 30])), tmp_path)
    assert refused.reason is Code.DATA_EMPTY
    assert "make 1 sequences of 16 and a batch takes 2" in refused.what


@pytest.mark.parametrize("packed", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_a_damaged_archive_is_refused_even_when_skipping(tmp_path, packed, damage):
    plain = lines(texts(3000))
    data = (
        gzip.compress(plain) if packed == "jsonl.gz" else zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    )
    match damage:
        case "truncated":
            data = data[: len(data) // 2]
        case "flipped":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x5A]) + data[len(data) // 2 + 1 :]
        case "other":
            data = plain
    refused = refusal(put(tmp_path / f"a.{packed}", data), tmp_path, skip_bad=True)
    assert refused.reason is (Code.DATA_FORMAT if damage == "other" else Code.DATA_BAD)
    assert f"a.{packed}" in refused.what


def test_a_zstd_window_beyond_the_cap_is_refused(tmp_path):
    refused = refusal(put(tmp_path / "a.jsonl.zst", window(27, lines(texts(9)))), tmp_path)
    assert refused.reason is Code.DATA_BAD and "a window of 134217728 bytes" in refused.what


def window(log, plain):
    """A frame that asks for a window of so many bits, without saying how much is in it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=log)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(plain) + stream.flush()


READ = r"""
import re, sys
from pathlib import Path
from coordinator.documents import Reader

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

before, reader, count = peak(), Reader(skip_bad=True), 0
try:
    for _ in reader.documents(reader.find([Path(sys.argv[1])])):
        count += 1
except Exception as error:
    print(error)
print(count + reader.skipped.bad, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize(
    ("data", "lines_read", "says"),
    [
        (lambda: zstandard.compress(lines(["one"])) + window(27, lines(["two"])), 1, "too much memory"),
        (lambda: zstandard.compress(lines(["one"])) + window(31, lines(["two"])), 1, "too much memory"),
        (lambda: zstandard.compress(bytes(1 << 30)), 0, "a line of more than"),
        (lambda: zstandard.compress((b"0" * 9999 + b"\n") * 12800), 12800, ""),
    ],
    ids=["a later window of 128 MiB", "one of 2 GiB", "a bomb of one line", "a bomb of many lines"],
)
def test_no_zstd_file_takes_more_memory_than_a_few_documents(tmp_path, data, lines_read, says):
    path = put(tmp_path / "a.jsonl.zst", data())
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120)
    assert says in done.stdout and done.returncode == 0, done.stdout + done.stderr
    count, grown = map(int, done.stdout.split()[-2:])
    assert count == lines_read and grown < 64 << 20, done.stdout


SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0notes"


def test_zstd_frames_one_after_the_other_are_one_file_and_notes_between_them_are_passed_over(tmp_path):
    one, two = (zstandard.compress(lines([text])) for text in ("one", "two"))
    reader = documents.Reader()
    sources = reader.find([put(tmp_path / "a.jsonl.zst", one + SKIPPABLE + two)])
    assert list(reader.documents(sources)) == ["one", "two"]


def dictionary(line):
    trained = zstandard.train_dictionary(4096, [line * 3 + bytes([n]) * 40 for n in range(200)])
    return zstandard.ZstdCompressor(dict_data=trained).compress(line)


@pytest.mark.parametrize(
    "rest",
    [dictionary(lines(["one"])), b"junk", zstandard.compress(lines(["two"]))[:-3], SKIPPABLE[:-2]],
    ids=["a dictionary that nobody has", "no frame", "a torn frame", "torn notes"],
)
def test_what_follows_a_good_zstd_frame_is_looked_at_as_well(rest, tmp_path):
    refused = refusal(put(tmp_path / "a.jsonl.zst", zstandard.compress(lines(["one"])) + rest), tmp_path, skip_bad=True)
    assert refused.reason is Code.DATA_BAD and "a.jsonl.zst" in refused.what


def test_a_zstd_file_that_needs_a_dictionary_is_refused(tmp_path):
    refused = refusal(put(tmp_path / "a.jsonl.zst", dictionary(lines(["one"]))), tmp_path)
    assert refused.reason is Code.DATA_BAD and "ictionary" in refused.what


def test_a_bomb_of_one_endless_line_is_stopped_at_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENT_BYTES_MAX", 1 << 20)
    bomb = zstandard.ZstdCompressor().compress(b"0" * (64 << 20))
    refused = refusal(put(tmp_path / "a.jsonl.zst", bomb), tmp_path)
    assert "a.jsonl.zst:1: a line of more than 1048576 bytes" in refused.what


def archive(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("../../escape.txt", "text")
    else:
        with tarfile.open(fileobj=file, mode="w") as packed:
            packed.addfile(tarfile.TarInfo("../escape.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.zip", archive("zip"), "a zip archive"),
        ("a.txt", archive("zip"), "a zip archive"),
        ("a.tar", archive("tar"), "a tar archive"),
        ("a.py", archive("tar"), "a tar archive"),
        ("model.pt", b"\x80\x02}q\0.", "a Python pickle"),
        ("model.txt", b"\x80\x04\x95", "a Python pickle"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), "gzip"),
        ("a.npy", b"\x93NUMPY\1\0", "a numpy array"),
        ("a.csv", b"a,b\n", "an unknown kind"),
        ("a.parquet", b"PK\x03\x04", "called parquet and is a zip archive"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "it is gzip"),
    ],
)
def test_what_is_no_text_is_refused_by_its_first_bytes(tmp_path, name, data, says):
    refused = refusal(put(tmp_path / name, data), tmp_path)
    assert refused.reason is Code.DATA_FORMAT and says in refused.what


def test_a_damaged_parquet_file_is_refused(tmp_path):
    refused = refusal(put(tmp_path / "a.parquet", b"PAR1" + bytes(100) + b"PAR1"), tmp_path)
    assert refused.reason is Code.DATA_BAD


def test_the_parquet_column_is_found_or_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": texts(20), "n": range(20)}), path)
    assert take(path, tmp_path).documents == 20
    pq.write_table(pa.table({"question": texts(20), "answer": texts(20, seed=1)}), path)
    shutil.rmtree(tmp_path / "store")
    refused = refusal(path, tmp_path)
    assert "no column of strings called text; it has question, answer" in refused.what and "--field" in refused.fix
    assert take(path, tmp_path, field="answer").documents == 20
    pq.write_table(pa.table({"text": [*texts(5), None]}), path)
    shutil.rmtree(tmp_path / "store")
    assert "row 6: no text" in refusal(path, tmp_path).what


def test_a_path_that_is_not_there_is_named_without_its_control_characters(tmp_path):
    refused = refusal(tmp_path / "no\x1b[31m\nsuch.txt", tmp_path)
    assert refused.reason is Code.DATA_BAD and refused.what.isprintable() and "such.txt" in refused.what


def test_a_pipe_is_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt", tmp_path).what


# --- tokenizers


@given(st.text())
def test_the_byte_tokenizer_is_the_bytes_by_either_path(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode()) == tokenizer.encode_documents([text])[0][:-1].tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_trained_tokenizer_packs_text_and_gives_it_back(tmp_path):
    path = put(tmp_path / "a.jsonl", lines(texts(300)) + b"not json\n")
    tokenizer = train_tokenizer(sample([path]), entries=300)
    again = train_tokenizer(sample([path]), entries=300)
    assert tokenizer.json == again.json and tokenizer.vocabulary == 300 and not tokenizer.is_bytes
    corpus = take(path, tmp_path, tokenizer=tokenizer, skip_bad=True)
    assert (corpus.vocabulary, corpus.token_bytes) == (300, 2)
    store = BlobStore(tmp_path / "store")
    loaded = Tokenizer(store.read(corpus.tokenizer.digest))
    tokens = np.concatenate([tokens_of(shard, tmp_path) for shard in (*corpus.shards, corpus.heldout)])
    parts = np.split(tokens, np.flatnonzero(tokens == loaded.end) + 1)
    assert sorted(loaded.decode(part.tolist()) for part in parts if len(part)) == sorted(texts(300))
    assert len(tokens) < 0.7 * sum(len(text.encode()) + 1 for text in texts(300))


def test_an_end_token_spelled_out_in_a_document_ends_nothing(tmp_path):
    sneaky = f"before {END} after"
    for tokenizer in (byte_tokenizer(), train_tokenizer(texts(50), entries=300)):
        tokens = tokenizer.encode_documents([sneaky])[0].tolist()
        assert tokens.count(tokenizer.end) == 1 and tokens[-1] == tokenizer.end
        assert tokenizer.decode(tokens) == sneaky


def test_large_vocabularies_take_four_bytes(tmp_path):
    fast = Fast(models.WordLevel({f"w{n}": n for n in range(70_000)} | {"</s>": 70_000}, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(put(tmp_path / "tokenizer.json", fast.to_str().encode()))
    assert (tokenizer.vocabulary, tokenizer.token_bytes, tokenizer.end) == (70_001, 4, 70_000)
    documents = [" ".join(f"w{n}" for n in range(start, start + 50)) for start in range(69_000, 69_900, 50)]
    corpus = take(put(tmp_path / "a.jsonl", lines(documents)), tmp_path, tokenizer=tokenizer)
    assert tokens_of(corpus.shards[0], tmp_path, "<u4").max() == 70_000


def test_a_tokenizer_without_an_end_gets_one(tmp_path):
    fast = Fast(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = load_tokenizer(put(tmp_path / "tokenizer.json", fast.to_str().encode()))
    assert (tokenizer.vocabulary, tokenizer.end, tokenizer.end_text) == (3, 2, END)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "?"}}', b"[" * 9999]
)
def test_a_bad_tokenizer_is_refused(tmp_path, data):
    with pytest.raises(Refused) as caught:
        load_tokenizer(put(tmp_path / "tokenizer.json", data))
    assert caught.value.reason is Code.TOKENIZER_BAD


def test_a_huge_or_missing_tokenizer_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    for path in (tmp_path / "tokenizer.json", tmp_path / "missing.json"):
        with pytest.raises(Refused) as caught:
            load_tokenizer(path)
        assert caught.value.reason is Code.TOKENIZER_BAD


def test_a_catastrophic_pattern_is_a_refusal_and_not_a_hang(tmp_path):
    fast = Fast(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = Tokenizer(fast.to_str().encode())
    refused = refusal(put(tmp_path / "a.jsonl", lines(["a" * 60 + "!", "b" * 60])), tmp_path, tokenizer=tokenizer)
    assert refused.reason is Code.TOKENIZER_BAD


@pytest.mark.parametrize("entries", [0, 256, 1 << 40])
def test_a_vocabulary_out_of_range_is_refused(entries):
    with pytest.raises(Refused) as caught:
        train_tokenizer(["text"], entries=entries)
    assert caught.value.reason is Code.TOKENIZER_BAD


def test_the_scratch_folder_and_reader_hold_a_corpus_only_in_pieces(tmp_path, monkeypatch):
    """Ten times the buffers go through; Python never holds more than a few of them."""
    import tracemalloc

    monkeypatch.setattr("coordinator.ingest.BATCH_BYTES", 1 << 16)
    line = lines(["x" * 1000])
    with (tmp_path / "a.jsonl").open("wb") as file:
        for number in range(4000):
            file.write(line.replace(b"xxxxxxxx", f"{number:08}".encode(), 1))
    tracemalloc.start()
    try:
        take(tmp_path / "a.jsonl", tmp_path, shuffle_tokens=50_000, shard_tokens=50_000)
        assert tracemalloc.get_traced_memory()[1] < 2_500_000  # the tokens alone are 8 MB
    finally:
        tracemalloc.stop()
