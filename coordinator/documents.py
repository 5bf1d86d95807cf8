"""Documents: text out of files and folders, one document at a time; knows nothing of tokens or shards."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, Final, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from protocol.canonical import shown
from protocol.errors import Code, Refused

PIECE_BYTES: Final = 64 << 10  # a longer text file is cut here, so that one long book can be shuffled and held out
DOCUMENT_BYTES_MAX: Final = 16 << 20  # one JSON line or parquet value; memory is bounded by a few of these
ZSTD_WINDOW_BYTES_MAX: Final = 8 << 20  # what RFC 8878 asks of every decoder
ZSTD_PACKED_BYTES: Final = 512  # unpacked together: at most 16 MiB, were all of it zeros
KEYS_MAX: Final = 10_000  # in one JSON object
DIGITS_MAX: Final = 40  # of one JSON number: past any 128-bit integer or decimal
PARQUET_ROWS: Final = 64  # read together
HEAD_BYTES: Final = 8192  # where a NUL byte makes a file binary (git's rule)

TEXT_SUFFIXES: Final = frozenset(
    f".{suffix}"
    for suffixes in (
        "txt text md markdown rst tex org adoc html htm css scss sass less toml yaml yml ini cfg",
        "py pyi pyx c h cc cpp cxx hh hpp hxx cu cuh m mm java kt kts scala groovy go rs zig swift cs vb dart d nim",
        "js mjs cjs jsx ts tsx vue svelte rb php pl pm lua r jl hs ml mli ex exs erl clj cljs lisp el scm fs fsx",
        "v sv vhd vhdl f f90 f95 for pas asm s sh bash zsh fish ps1 bat sql proto graphql cmake mk tf nix gradle",
    )
    for suffix in suffixes.split()
)
MAGICS: Final = (
    (0, b"PK\x03\x04", "a zip archive (or a torch or numpy file)"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"BZh", "bzip2"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x80\x03", "a Python pickle"),
    (0, b"\x80\x04", "a Python pickle"),
    (0, b"\x80\x05", "a Python pickle"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"PAR1", "a parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x7fELF", "a program"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"SQLite format 3", "a database"),
)
EXPECTED_MAGICS: Final = {"jsonl.gz": b"\x1f\x8b", "jsonl.zst": b"\x28\xb5\x2f\xfd", "parquet": b"PAR1"}
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class Kind(Enum):
    """How to read a file."""

    TEXT = "text"
    JSONL = "jsonl"
    JSONL_GZ = "jsonl.gz"
    JSONL_ZST = "jsonl.zst"
    PARQUET = "parquet"


@dataclass(frozen=True)
class Source:
    path: Path
    kind: Kind
    size: int  # bytes on disk


@dataclass
class Skipped:
    """What was left out, by reason."""

    hidden: int = 0  # files and folders whose name begins with a dot
    unknown: int = 0  # files in a folder that are of no format we read
    binary: int = 0  # files in a folder that are called text and are not
    bad: int = 0  # documents passed over by --skip-bad
    empty: int = 0  # documents without a visible character
    duplicates: int = 0  # documents that came before, byte for byte


class Reader:
    """Finds sources and reads their documents, refusing or counting what is bad."""

    def __init__(self, *, field: str | None = None, skip_bad: bool = False, lossy: bool = False) -> None:
        self.skipped = Skipped()
        self.bytes_done = 0
        self._field = field
        self._skip_bad = skip_bad
        self._lossy = lossy

    def find(self, paths: Sequence[Path]) -> list[Source]:
        """Every readable file of the paths, in the order of their names."""
        sources: list[Source] = []
        for path in paths:
            if path.is_dir():
                sources.extend(self._find_in(path))
            else:
                sources.append(_named(path))
        return sources

    def documents(self, sources: Sequence[Source]) -> Iterator[str]:
        """The documents one after the other; one source is open at a time."""
        for source in sources:
            before = self.bytes_done
            try:
                yield from self._read(source, before)
            except OSError as error:  # pyarrow's errors of damaged streams are OSErrors too
                raise Refused(
                    Code.DATA_BAD, f"{shown(str(source.path))}: {shown(error.strerror or str(error))}"
                ) from error
            self.bytes_done = before + source.size

    def _find_in(self, folder: Path) -> Iterator[Source]:
        for where, folders, names in os.walk(folder, onerror=_unreadable):
            self.skipped.hidden += sum(name.startswith(".") for name in (*folders, *names))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                path = Path(where, name)
                kind = _kind(path)
                if kind is None or not path.is_file():
                    self.skipped.unknown += 1
                    continue
                source, head = _opened(path, kind)
                if kind is Kind.TEXT and (_magic(head) is not None or b"\0" in head):
                    self.skipped.binary += 1
                    continue
                _check_magic(source, head)
                yield source

    def _read(self, source: Source, before: int) -> Iterator[str]:
        if source.kind is Kind.PARQUET:
            yield from self._read_parquet(source)
            return
        with source.path.open("rb") as file:
            texts = self._read_text(source, file) if source.kind is Kind.TEXT else self._read_lines(source, file)
            for text in texts:
                self.bytes_done = before + file.tell()
                yield text

    def _read_text(self, source: Source, file: IO[bytes]) -> Iterator[str]:
        rest, offset = b"", 0
        while block := file.read(PIECE_BYTES - len(rest)):
            block = rest + block
            cut = _cut(block) if len(block) == PIECE_BYTES else len(block)
            yield from self._decoded(block[:cut], shown(str(source.path)), offset)
            rest, offset = block[cut:], offset + cut
        if rest:
            yield from self._decoded(rest, shown(str(source.path)), offset)

    def _read_lines(self, source: Source, file: IO[bytes]) -> Iterator[str]:
        lines = _unpacked(source, file)
        number, offset = 0, 0
        while line := lines.readline(DOCUMENT_BYTES_MAX + 1):
            number += 1
            where = f"{shown(str(source.path))}:{number}"
            if len(line) > DOCUMENT_BYTES_MAX:
                raise Refused(Code.DATA_BAD, f"{where}: a line of more than {DOCUMENT_BYTES_MAX} bytes")
            yield from self._parsed(line, where, offset)
            offset += len(line)

    def _parsed(self, line: bytes, where: str, offset: int) -> Iterator[str]:
        field = self._field or "text"
        try:
            text = line.removeprefix(BYTE_ORDER_MARK if offset == 0 else b"").decode(
                "utf-8", "replace" if self._lossy else "strict"
            )
            value = _JSON.decode(text) if text.strip() else _fail("an empty line")
            if not isinstance(value, dict) or not isinstance(value.get(field), str):
                _fail(f'wanted an object with a string "{field}"')
        except UnicodeDecodeError as error:
            self._bad(f"{where}: byte {offset + error.start} is not UTF-8")
        except RecursionError:
            self._bad(f"{where}: nested too deeply")
        except ValueError as error:
            self._bad(f"{where}: {shown(str(error))}")
        else:
            yield from self._checked(value[field], where)

    def _read_parquet(self, source: Source) -> Iterator[str]:
        where = shown(str(source.path))
        try:
            file = pq.ParquetFile(source.path)
            column = self._column(file.schema_arrow, where)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column], use_threads=False):
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    row += 1
                    place = f"{where}: row {row}"
                    if value is None or len(value) > DOCUMENT_BYTES_MAX:
                        self._bad(f"{place}: {'no text' if value is None else f'{len(value)} bytes in one document'}")
                        continue
                    yield from self._decoded(value, place, 0)
        except (pa.ArrowException, UnicodeDecodeError) as error:  # the second for a column's name
            raise Refused(Code.DATA_BAD, f"{where}: {shown(str(error))}") from error

    def _column(self, schema: Any, where: str) -> str:
        strings = [
            str(field.name)
            for field in schema
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        ]
        wanted = self._field or ("text" if "text" in strings or len(strings) != 1 else strings[0])
        if wanted in strings:
            return wanted
        raise Refused(
            Code.DATA_BAD,
            f"{where}: no column of strings called {shown(wanted)}; it has {shown(', '.join(strings)) or 'none'}",
            fix="Name the column with --field.",
        )

    def _decoded(self, block: bytes, where: str, offset: int) -> Iterator[str]:
        skip = len(BYTE_ORDER_MARK) if offset == 0 and block.startswith(BYTE_ORDER_MARK) else 0
        try:
            text = block[skip:].decode("utf-8", "replace" if self._lossy else "strict")
        except UnicodeDecodeError as error:
            self._bad(f"{where}: byte {offset + skip + error.start} is not UTF-8 (0x{error.object[error.start]:02x})")
            return
        if "\0" in text and not self._lossy:
            self._bad(f"{where}: byte {offset + block.index(0)} is NUL")
            return
        yield from self._checked(text, where)

    def _checked(self, text: str, where: str) -> Iterator[str]:
        if self._lossy:
            text = _SURROGATES.sub("\ufffd", text).replace("\0", "\ufffd")
        elif "\0" in text or _SURROGATES.search(text) is not None:
            self._bad(f"{where}: a NUL or half of a surrogate pair in the text")
            return
        if not text or text.isspace():
            self.skipped.empty += 1
            return
        yield text

    def _bad(self, what: str) -> None:
        if not self._skip_bad:
            raise Refused(Code.DATA_BAD, what)
        self.skipped.bad += 1


def _named(path: Path) -> Source:
    """A file that was asked for by name: refused where one in a folder would be skipped."""
    if not path.exists():
        raise Refused(Code.DATA_BAD, f"{shown(str(path))}: no such file or folder", fix="Check the path.")
    kind = (Kind.TEXT if not path.suffix else _kind(path)) if path.is_file() else None
    if kind is None:
        raise Refused(Code.DATA_FORMAT, f"{shown(str(path))}: {_describe(path)}")
    source, head = _opened(path, kind)
    _check_magic(source, head)
    return source


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    if name.endswith((".jsonl", ".ndjson")):
        return Kind.JSONL
    if name.endswith((".jsonl.gz", ".ndjson.gz")):
        return Kind.JSONL_GZ
    if name.endswith((".jsonl.zst", ".ndjson.zst")):
        return Kind.JSONL_ZST
    if name.endswith((".parquet", ".pq")):
        return Kind.PARQUET
    return Kind.TEXT if path.suffix.lower() in TEXT_SUFFIXES else None


def _opened(path: Path, kind: Kind) -> tuple[Source, bytes]:
    try:
        with path.open("rb") as file:
            return Source(path, kind, os.fstat(file.fileno()).st_size), file.read(HEAD_BYTES)
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise Refused(Code.DATA_BAD, f"{shown(str(error.filename))}: {error.strerror}", fix="Check the path.") from error


def _describe(path: Path) -> str:
    if not path.is_file():
        return "not a regular file"
    with path.open("rb") as file:
        return f"{_magic(file.read(HEAD_BYTES)) or 'a file of an unknown kind'}; that cannot be read"


def _magic(head: bytes) -> str | None:
    return next((name for offset, magic, name in MAGICS if head.startswith(magic, offset)), None)


def _check_magic(source: Source, head: bytes) -> None:
    """The first bytes must agree with the file's name."""
    found, path = _magic(head), shown(str(source.path))
    wanted = EXPECTED_MAGICS.get(source.kind.value)
    if wanted is not None:
        if not head.startswith(wanted):
            raise Refused(
                Code.DATA_FORMAT, f"{path}: it is called {source.kind.value} and is {found or 'something else'}"
            )
    elif found is not None:
        raise Refused(Code.DATA_FORMAT, f"{path}: it is {found}, whatever its name says")
    if source.kind is Kind.JSONL_ZST:
        try:
            window = zstandard.get_frame_parameters(head).window_size
        except zstandard.ZstdError as error:
            raise Refused(Code.DATA_BAD, f"{path}: {error}") from error
        if window > ZSTD_WINDOW_BYTES_MAX:
            raise Refused(
                Code.DATA_BAD,
                f"{path}: compressed with a window of {window} bytes; at most {ZSTD_WINDOW_BYTES_MAX} are given",
                fix="Compress it again without --long or --ultra.",
            )


def _unpacked(source: Source, file: IO[bytes]) -> IO[bytes]:
    """A stream of plain bytes in bounded memory; a truncated or damaged one raises OSError."""
    match source.kind:
        case Kind.JSONL_GZ:
            return io.BufferedReader(pa.input_stream(file, compression="gzip"))
        case Kind.JSONL_ZST:
            return io.BufferedReader(_Zstd(file))
        case _:
            return file


class _Zstd(io.RawIOBase):
    """Frames one after the other, each within the cap on windows whatever the first one says."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        self._frame: zstandard.ZstdDecompressionObj | None = None  # the one that is not over
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(ZSTD_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise OSError("the file ends in the middle of a zstd frame")
                return 0
            frame = self._frame or self._unpacker.decompressobj()
            try:
                self._plain = memoryview(frame.decompress(self._packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size


def _cut(block: bytes) -> int:
    """Where to end a piece: after an empty line, a line or a character, in the second half of the block if possible."""
    for mark in (b"\n\n", b"\n"):
        at = block.rfind(mark, len(block) // 2)
        if at >= 0:
            return at + len(mark)
    end = len(block) - 1
    while end > len(block) - 4 and block[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > KEYS_MAX:
        _fail(f"an object of {len(pairs)} keys; at most {KEYS_MAX} are read")
    value = dict(pairs)
    if len(value) < len(pairs):
        _fail("a key twice in one object")
    return value


def _number(digits: str) -> float:
    return float(digits) if len(digits) <= DIGITS_MAX else _fail(f"a number of {len(digits)} characters")


def _fail(what: str) -> NoReturn:
    raise ValueError(what)


_JSON: Final = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_number,
    parse_float=_number,
    parse_constant=lambda name: _fail(f"{name} is not JSON"),
)
