"""The tokenizer: text to token ids and back, always a Hugging Face tokenizer.json; knows nothing of files of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from protocol.canonical import shown
from protocol.errors import Code, Refused

END: Final = "<|end|>"  # what we add where a tokenizer brings no end of document of its own
KNOWN_ENDS: Final = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
BYTES: Final = 256
TOKENIZER_BYTES_MAX: Final = 64 << 20  # the largest in use (256 000 entries, with merges) is about 35 MB
VOCABULARY_MAX: Final = 1 << 20  # four times the largest in use; an embedding is allocated from it

Tokens = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


class Tokenizer:
    """One tokenizer.json. Text is plain text: a special token that is spelled out in it stays spelled out."""

    def __init__(self, serialized: bytes) -> None:
        if len(serialized) > TOKENIZER_BYTES_MAX:
            raise Refused(
                Code.TOKENIZER_BAD, f"tokenizer of {len(serialized)} bytes; at most {TOKENIZER_BYTES_MAX} are read"
            )
        with _refusing("not a tokenizer.json"):
            fast = Fast.from_str(serialized.decode("utf-8"))
            fast.no_padding()
            fast.no_truncation()
            fast.encode_special_tokens = True
            ids = fast.get_vocab(with_added_tokens=True)
        end = next((ids[name] for name in KNOWN_ENDS if name in ids), None)
        if end is None:
            raise Refused(Code.TOKENIZER_BAD, f"it has no end token; wanted one of {', '.join(KNOWN_ENDS)}")
        self._fast = fast
        self.json: Final = serialized
        self.end: Final = end
        self.end_text: Final = next(name for name in KNOWN_ENDS if name in ids)
        self.vocabulary: Final = max(ids.values()) + 1
        if self.vocabulary > VOCABULARY_MAX:
            raise Refused(Code.TOKENIZER_BAD, f"{self.vocabulary} entries; at most {VOCABULARY_MAX} are taken")
        self.is_bytes: Final = serialized == _BYTE_JSON
        self.token_bytes: Final = 2 if self.vocabulary <= 1 << 16 else 4
        self.dtype: Final = np.dtype(f"<u{self.token_bytes}")

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, each followed by the end token."""
        if self.is_bytes:  # the same ids as below, without a Python object per byte
            return [self._ended(np.frombuffer(text.encode(), np.uint8)) for text in texts]
        with _refusing("it failed on this corpus"):
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._ended(encoding.ids) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        with _refusing("it failed on this text"):
            return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def _ended(self, ids: Any) -> Tokens:
        tokens = np.empty(len(ids) + 1, self.dtype)
        tokens[:-1] = ids
        tokens[-1] = self.end
        return tokens


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""
    return Tokenizer(_BYTE_JSON)


def load_tokenizer(path: Path) -> Tokenizer:
    """Any Hugging Face tokenizer.json; one without an end token gets ours, as a new last entry."""
    try:
        size = path.stat().st_size
        serialized = path.read_bytes() if size <= TOKENIZER_BYTES_MAX else b""
    except OSError as error:
        raise Refused(Code.TOKENIZER_BAD, f"{path}: {error.strerror}") from error
    if size > TOKENIZER_BYTES_MAX:
        raise Refused(Code.TOKENIZER_BAD, f"{path}: {size} bytes; at most {TOKENIZER_BYTES_MAX} are read")
    with _refusing(f"{path} is not a tokenizer.json"):
        fast = Fast.from_str(serialized.decode("utf-8"))
        if not any(fast.token_to_id(name) is not None for name in KNOWN_ENDS):
            fast.add_special_tokens([AddedToken(END, special=True, normalized=False)])
            serialized = fast.to_str().encode()
    return Tokenizer(serialized)


def train_tokenizer(texts: Iterable[str], *, entries: int) -> Tokenizer:
    """A byte-level BPE of at most `entries` entries: a small corpus may not hold that many pairs worth merging."""
    if not BYTES < entries <= VOCABULARY_MAX:
        raise Refused(
            Code.TOKENIZER_BAD,
            f"a vocabulary of {entries} entries; wanted {BYTES + 1} to {VOCABULARY_MAX}",
            fix="Choose another number for --train-tokenizer.",
        )
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        min_frequency=2,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(fast.to_str().encode())


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """The library fails in many ways, from bad JSON to a regular expression out of retries; all are refusals."""
    try:
        yield
    except Refused:
        raise
    except UnicodeDecodeError as error:
        raise Refused(Code.TOKENIZER_BAD, f"{what}: byte {error.start} is not UTF-8") from error
    except Exception as error:
        raise Refused(Code.TOKENIZER_BAD, f"{what}: {shown(str(error))}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic of its Rust code is no Exception
            raise
        raise Refused(Code.TOKENIZER_BAD, f"{what}: {shown(str(error))}") from error


def _byte_json() -> bytes:
    """BPE over the byte alphabet without a single merge, so that an id is a byte."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return json.dumps(json.loads(fast.to_str()), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _byte_characters() -> list[str]:
    """The visible character that byte-level tokenizers write for each byte (GPT-2's table)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(BYTES) if byte not in visible]
    return [chr(byte if byte in visible else BYTES + hidden.index(byte)) for byte in range(BYTES)]


_BYTE_JSON: Final = _byte_json()
