"""Local progress: what this machine has trained and no record has taken yet, in one file that outlives kill -9.

The file is a hint and never a promise: whenever it is missing, torn, rotten or out of date, the steps in it are lost
and nothing else. What makes it safe is one rule: **a file that a round has heard more of than the file says is gone
before the round hears it.** So what is read back is u as it was at `head`, and of what it holds either nothing was
ever offered to a round that may still be open (`offered` is false), or exactly this contribution was.

Layout: MAGIC, the header's length (8 bytes), the header (Progress as canonical JSON), u (float32, little-endian), and
SHA-256 over everything before it.

How much is written: at most one save for each `spacing_seconds` on the long run, which is 2.9 GB an hour for a model
of 1M parameters (4 MB every 5 s), 3.8 GB an hour for 100M (400 MB every 6 minutes) and for 1B (4 GB every 64
minutes). Day and night for a year that is 33 TB at most; a consumer's SSD of 500 GB is sold for 300 TB.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from node.core.rounds import holds
from protocol import canonical
from protocol.contribution import check_shape
from protocol.errors import Code, Refused
from protocol.limits import CHUNK_VALUES, VALUE_ABS_MAX
from protocol.state import Consumed
from protocol.types import Contribution, Head, LogEntry, RoundNumber

MAGIC: Final = b"barnraise-progress-1\n"
SPACING_SECONDS: Final = 5.0  # a kill costs a small model half of this on average, less than the restart does
TIME_SHARE: Final = 0.01  # of the time, at most, goes into saving
BYTES_PER_SECOND_MAX: Final = 1 << 20  # on average: volunteers pay for the wear of their SSDs

_HEADER_BYTES_MAX: Final = 1 << 20  # RANGES_MAX ranges take 40 kB
_PIECE_VALUES: Final = 16 * CHUNK_VALUES  # computed, hashed and written together: 4 MB
_HASH_BYTES: Final = 32
_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)

Floats = NDArray[np.float32]

log = structlog.get_logger()


@dataclass(frozen=True)
class Progress:
    """What a saved u is made of, and where the log was."""

    head: Head
    branch: int
    missed: int  # rounds in a row that had taken nothing of it
    contribution: Contribution
    offered: bool  # to the round of this head: a record may take it while this node is away


# what to do with it after a restart


@dataclass(frozen=True)
class Drop:
    """Start with nothing: part of it counts elsewhere, or nobody can say."""

    why: str


@dataclass(frozen=True)
class Offer:
    """Its round is still open: bring the very same contribution again, and the same bytes."""

    contribution: Contribution
    missed: int


@dataclass(frozen=True)
class Carry:
    """No record has taken it, and none can any more: bring it together with what is trained next."""

    contribution: Contribution
    missed: int  # rounds in a row by now
    missed_away: int  # those of them that went by without this node: u has not been halved for them yet


@dataclass(frozen=True)
class Settle:
    """This record took it: take the record's parts out of u, and keep what compression left over."""

    entry: LogEntry
    missed: int  # rounds since then


Resumption = Drop | Offer | Carry | Settle


def resume(
    progress: Progress,
    consumed: Consumed,
    entry_of: Callable[[RoundNumber], LogEntry | None],
    *,
    head: Head,
    branch: int,
    stale_rounds: int,
) -> Resumption:
    """What a saved u is worth at this head. `entry_of` knows the log's records, as far back as it likes."""
    saved, contribution = progress.head, progress.contribution
    if progress.branch != branch:
        return Drop(f"it is of branch {progress.branch}, the log has followed {branch} rollbacks")
    if saved.round > head.round:
        return Drop(f"it is of round {saved.round}, the log is at {head.round}")
    entry = entry_of(saved.round) if saved.round < head.round else None
    follows = head.hash if saved.round == head.round else entry.record.previous if entry is not None else None
    if follows not in (saved.hash, None):  # none: a new base checkpoint came without the records before it
        return Drop(f"round {saved.round} of this log follows another record")
    if progress.offered and entry is not None and holds(entry.record, contribution):
        return Settle(entry, head.round - saved.round - 1)
    if any(consumed.overlaps(span) for span in contribution.ranges):
        return Drop("a record has consumed some of its data")
    away = head.round - saved.round
    missed = progress.missed + away
    if missed > stale_rounds:
        return Drop(f"{missed} rounds have passed without it, at most {stale_rounds} may")
    if progress.offered and not away:
        return Offer(contribution, missed)
    return Carry(contribution, missed, away)


# how often


@dataclass(frozen=True)
class Pace:
    """When saving is due: a budget that time refills. A round's snapshot may overdraw it by one save.

    What a round takes with it is at stake as a whole until its record is there, so of all moments the one after a
    snapshot is the best; between rounds only what is left of the budget is spent. Nothing depends on a save for being
    correct, so both can be refused.
    """

    paid_until: float  # saves so far are paid for by the time up to then
    spacing_seconds: float

    @classmethod
    def begin(cls, now: float, size: int) -> Pace:
        spacing = _spacing_seconds(size, took_seconds=0.0)
        return cls(now + spacing, spacing)

    def due(self, now: float, *, offered: bool) -> bool:
        return now >= self.paid_until - (self.spacing_seconds if offered else 0.0)

    def looked(self, now: float) -> Pace:
        """Nothing was trained since: a machine that is paused is not looked at every second."""
        return replace(self, paid_until=max(self.paid_until, now + SPACING_SECONDS))

    def saved(self, now: float, size: int, *, took_seconds: float) -> Pace:
        spacing = _spacing_seconds(size, took_seconds)
        return Pace(max(now, self.paid_until) + spacing, spacing)


def _spacing_seconds(size: int, took_seconds: float) -> float:
    return max(SPACING_SECONDS, took_seconds / TIME_SHARE, size / BYTES_PER_SECOND_MAX)


# the file


class ProgressFile:
    """The file and its pace. Blocking; the caller sees to it that no vector changes while it is written."""

    def __init__(self, path: Path, parameters: int, *, room: Callable[[int], bool], now: float) -> None:
        self._path = path
        self._new = path.with_name(path.name + ".new")  # one name: what a kill leaves is overwritten or removed
        self._parameters = parameters
        self._room = room  # whether the volunteer's disk has so many bytes for us
        self._pace = Pace.begin(now, self._values_bytes)
        self._saved: Progress | None = None
        self._refused = False  # and said so

    @property
    def _values_bytes(self) -> int:
        return 4 * self._parameters

    def due(self, now: float, *, offered: bool) -> bool:
        return self._pace.due(now, offered=offered)

    def save(
        self, progress: Progress, residual: Floats, *, shared: Floats | None = None, local: Floats | None = None
    ) -> None:
        """Write u = residual, or with what the trainer has done since: residual + (shared - local).

        A machine that cannot keep it goes on without, and says so once. An older file that a round is about to hear
        more of does not outlive the attempt.
        """
        began = time.monotonic()
        if progress == self._saved or not progress.contribution.ranges:
            self._pace = self._pace.looked(began)
            return
        try:
            self._write(progress, _pieces(residual, shared, local))
        except (OSError, Refused) as error:
            if not self._refused:
                log.warning("local progress is not saved", why=str(error))
            self._refused = True
            if progress.offered:
                self.forget()
        else:
            self._saved, self._refused = progress, False
        finally:  # a failure is not tried again at once
            ended = time.monotonic()
            self._pace = self._pace.saved(ended, self._values_bytes, took_seconds=ended - began)

    def forget(self) -> None:
        """Durable when it returns."""
        self._saved = None
        self._new.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self._path.unlink()
            _sync_folder(self._path.parent)

    def load(self) -> tuple[Progress, Floats] | None:
        """What was saved, if every byte of it is as it was written."""
        self._new.unlink(missing_ok=True)
        try:
            found = self._read()
        except FileNotFoundError:
            return None
        except (OSError, Refused) as error:
            log.warning("saved progress is of no use", why=str(error))
            return None
        self._saved = found[0]
        return found

    def _write(self, progress: Progress, pieces: Iterator[Floats]) -> None:
        header = canonical.to_bytes(progress)
        head = MAGIC + struct.pack("<Q", len(header)) + header
        size = len(head) + self._values_bytes + _HASH_BYTES
        if not self._room(size):
            raise Refused(Code.DISK_CAP, f"there is no room for {size:,} bytes")
        hashed = hashlib.sha256(head)
        try:
            with open(self._new, "wb", opener=_private) as file:
                file.write(head)
                for piece in pieces:
                    hashed.update(piece.data)
                    file.write(piece.data)
                file.write(hashed.digest())
                file.flush()
                os.fsync(file.fileno())
            self._new.replace(self._path)
            _sync_folder(self._path.parent)
        except OSError:
            with suppress(OSError):
                self._new.unlink(missing_ok=True)
            raise

    def _read(self) -> tuple[Progress, Floats]:
        with open(self._path, "rb", opener=_plain_file) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(len(MAGIC) + 8)
            if len(prefix) < len(MAGIC) + 8 or not prefix.startswith(MAGIC):
                raise Refused(Code.CHECKPOINT_BAD, f"{size:,} bytes that do not begin as saved progress")
            (length,) = struct.unpack("<Q", prefix[len(MAGIC) :])
            wanted = len(prefix) + length + self._values_bytes + _HASH_BYTES
            if length > _HEADER_BYTES_MAX or size != wanted:
                raise Refused(Code.CHECKPOINT_BAD, f"saved progress of {size:,} bytes, expected {wanted:,}")
            header = file.read(length)
            progress = _checked(canonical.from_bytes(Progress, header))
            values = self._read_values(file, hashlib.sha256(prefix + header))
        return progress, values

    def _read_values(self, file: BinaryIO, hashed: hashlib._Hash) -> Floats:
        values = np.empty(self._parameters, np.float32)
        for start in range(0, values.size, _PIECE_VALUES):
            piece = values[start : start + _PIECE_VALUES]
            if file.readinto(piece.data.cast("B")) != piece.nbytes:  # type: ignore[attr-defined]
                raise Refused(Code.CHECKPOINT_BAD, "saved progress that ends early")
            hashed.update(piece.data)
            if not -VALUE_ABS_MAX <= piece.min() <= piece.max() <= VALUE_ABS_MAX:  # a NaN passes into both
                raise Refused(Code.CHECKPOINT_BAD, f"NaN or a value beyond {VALUE_ABS_MAX:g} after {start:,}")
        if file.read() != hashed.digest():
            raise Refused(Code.CHECKPOINT_BAD, "saved progress that has changed on disk")
        return values


def _pieces(residual: Floats, shared: Floats | None, local: Floats | None) -> Iterator[Floats]:
    """u in pieces, in the very order of additions that a snapshot makes; a whole one would be one more model."""
    room = np.empty(min(_PIECE_VALUES, residual.size), np.float32)
    for start in range(0, residual.size, _PIECE_VALUES):
        piece = slice(start, start + _PIECE_VALUES)
        if shared is None or local is None:
            yield residual[piece]
            continue
        moved = room[: residual[piece].size]
        np.subtract(shared[piece], local[piece], out=moved)
        moved += residual[piece]
        yield moved


def _checked(progress: Progress) -> Progress:
    check_shape(progress.contribution)
    if min(progress.head.round, progress.branch, progress.missed) < 0:
        raise Refused(Code.CHECKPOINT_BAD, "saved progress with a number below zero")
    return progress


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_FOLLOW, 0o600)


def _plain_file(path: str, flags: int) -> int:
    """What somebody else has put in its place must not be followed, and must not make us wait."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Refused(Code.CHECKPOINT_BAD, "saved progress that is not a plain file")
    return os.open(path, flags | _NO_FOLLOW)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
