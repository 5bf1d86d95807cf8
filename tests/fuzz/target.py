"""A target: what reads a stranger's bytes, as a function of bytes that ends well or fails. tests/fuzz/targets holds them.

It ends well when the bytes were taken or refused by name. What a signature or a checksum would hold back is signed or
summed there, so that what lies behind it is reached too. An input may begin with a line of its own that says how to read
the rest, such as the name of a type.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from protocol import canonical
from protocol.errors import Refused

FOUND = Path(__file__).with_name("found")  # what fuzzing found, a folder for each target
PARAMETERS = 70  # of the checkpoints here: over one block of a codec

_SENTENCE_CHARACTERS_MAX = 1000  # of a refusal: some lines of a terminal


@dataclass(frozen=True)
class Target:
    """One reader. `seeds` makes inputs that it mostly takes."""

    name: str
    read: Callable[[bytes], None]
    seeds: st.SearchStrategy[bytes]


TARGETS: dict[str, Target] = {}


def target(seeds: st.SearchStrategy[bytes]) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def register(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
        name = read.__name__
        TARGETS[name] = Target(name, lambda data: _by_name(read, data), seeds)
        return read

    return register


def _by_name(read: Callable[[bytes], None], data: bytes) -> None:
    """A refusal is one line that a terminal can show; anything else that comes out is a finding."""
    try:
        read(data)
    except Refused as refused:
        assert refused.what.isprintable(), f"a refusal with control characters: {refused.what[:200]!r}"
        assert len(refused.what) <= _SENTENCE_CHARACTERS_MAX, f"a refusal of {len(refused.what)} characters"


def split(data: bytes) -> tuple[str, bytes]:
    head, _, body = data.partition(b"\n")
    return head.decode("utf-8", "replace"), body


@cache
def scratch() -> Path:
    """A folder in memory where there is one: each input writes files."""
    root = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="barnraise-fuzz-", dir=root if root.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def named(name: str, value: object) -> bytes:
    return name.encode() + b"\n" + canonical.to_bytes(value)
