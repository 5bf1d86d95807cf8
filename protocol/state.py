"""State: what every replica at a round holds, its digest, and its base checkpoint. Knows nothing of how rounds come about.

Both pure machines use Consumed, so nothing imported here may reach a thread or a socket.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol import blobs, canonical
from protocol.canonical import shown
from protocol.errors import Code, Refused
from protocol.limits import BASE_HEADER_BYTES_MAX, PARAMETERS_MAX, VALUE_ABS_MAX
from protocol.types import DataRange, Digest, RoundNumber

Floats = npt.NDArray[np.float32]

_FORMAT: Final = "barnraise-base-1"
_PIECE_VALUES: Final = 1 << 20  # read and checked together while they are in the cache
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class ConsumedShard:
    """The consumed sequences of one shard in one pass: start, stop, start, stop … in ascending order."""

    pass_number: int
    shard: Digest
    bounds: tuple[int, ...]


@dataclass(frozen=True)
class _Listing:
    shards: tuple[ConsumedShard, ...]


@dataclass(frozen=True)
class Consumed:
    """Which data certified records have used. Equal sets are equal, however they grew."""

    bounds: Mapping[tuple[int, Digest], tuple[int, ...]] = field(default_factory=dict)

    def overlaps(self, span: DataRange) -> bool:
        bounds = self.bounds.get((span.pass_number, span.shard), ())
        index = bisect_right(bounds, span.start)
        return index % 2 == 1 or (index < len(bounds) and bounds[index] < span.stop)

    def covers(self, span: DataRange) -> bool:
        """Whether all of it has been used."""
        bounds = self.bounds.get((span.pass_number, span.shard), ())
        index = bisect_right(bounds, span.start)
        return index % 2 == 1 and bounds[index] >= span.stop

    def rests(self, span: DataRange) -> list[DataRange]:
        """What of it has not been used, in order."""
        if not self.overlaps(span):
            return [span]
        bounds = self.bounds[span.pass_number, span.shard]
        edges = pairwise((span.start, *(min(max(bound, span.start), span.stop) for bound in bounds), span.stop))
        return [replace(span, start=start, stop=stop) for start, stop in list(edges)[::2] if start < stop]

    def with_ranges(self, ranges: Iterable[DataRange]) -> Consumed:
        bounds = dict(self.bounds)
        for span in ranges:
            assert 0 <= span.start < span.stop
            key = (span.pass_number, span.shard)
            bounds[key] = _joined(bounds.get(key, ()), span.start, span.stop)
        return Consumed(bounds)

    def listed(self) -> tuple[ConsumedShard, ...]:
        return tuple(ConsumedShard(*key, bounds) for key, bounds in sorted(self.bounds.items()))

    @property
    def digest(self) -> Digest:
        return canonical.digest(_Listing(self.listed()))


@dataclass
class State:
    """The shared model after some rounds. `fold` advances it in place; nothing else may write to it."""

    round: RoundNumber
    params: Floats
    momentum: Floats | None  # the outer optimizer's; none when it keeps none
    consumed: Consumed = field(default_factory=Consumed)

    def __post_init__(self) -> None:
        for values in (self.params, self.momentum):
            assert values is None or (values.dtype == np.float32 and values.shape == self.params.shape)
        assert self.params.ndim == 1

    def digest(self) -> Digest:
        """The same for the same bits on every machine. Hashes all parameters: ask once a round."""
        values = blobs.digest_of(self.params.data)
        momentum = None if self.momentum is None else blobs.digest_of(self.momentum.data)
        return canonical.digest(_Header(self.round, self.params.size, values, momentum, self.consumed.digest))


@dataclass(frozen=True)
class _Header:
    """What a state digest is the hash of."""

    round: RoundNumber
    parameters: int
    params: Digest
    momentum: Digest | None
    consumed: Digest


def initial_state(params: Floats, *, momentum: bool) -> State:
    """state(0) of a run."""
    return State(RoundNumber(0), params, np.zeros_like(params) if momentum else None)


def write_base(path: Path, state: State) -> Digest:
    """Write a base checkpoint, a safetensors file, atomically. Returns the state's digest.

    Refused when the data that members have used is in more pieces than the header holds: the checkpoint before serves."""
    digest = state.digest()
    metadata = {
        "consumed": canonical.to_bytes(_Listing(state.consumed.listed())).decode(),
        "format": _FORMAT,
        "round": str(state.round),
        "state": digest,
    }
    tensors = _tensors(state.params.size, momentum=state.momentum is not None)
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin aligned
    if len(header) > BASE_HEADER_BYTES_MAX:
        pieces = sum(map(len, state.consumed.bounds.values())) // 2
        what = (
            f"{pieces:,} pieces of used data take a header of {len(header):,} bytes, at most {BASE_HEADER_BYTES_MAX:,}"
        )
        raise Refused(Code.LIMIT, what)
    with blobs.atomic_file(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for values in (state.params, state.momentum):
            if values is not None:
                file.write(values.data)
    return digest


def read_base(path: Path, *, parameters: int, momentum: bool, digest: Digest) -> State:
    """Read a base checkpoint of a known shape and digest; anything else is refused by name.

    The header is compared with the only one that this shape can have, so overlaps, holes, other types and
    overflowing products have nowhere to hide; sizes are checked before anything is allocated.
    """
    assert 0 < parameters <= PARAMETERS_MAX
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_size = _header_size(file, size)
        metadata = _metadata(_parsed(file.read(header_size)), _tensors(parameters, momentum=momentum))
        expected = 8 + header_size + 4 * parameters * (2 if momentum else 1)
        if size != expected:
            raise Refused(Code.CHECKPOINT_BAD, f"base checkpoint of {size:,} bytes, expected {expected:,}")
        consumed = _consumed(metadata["consumed"])
        params = _read_values(file, parameters, "params")
        inertia = _read_values(file, parameters, "momentum") if momentum else None
    state = State(RoundNumber(int(metadata["round"])), params, inertia, consumed)
    found = state.digest()
    if not found == digest == metadata["state"]:
        raise Refused(Code.STATE_MISMATCH, f"base checkpoint with state {found[:12]}, expected {digest[:12]}")
    return state


def _joined(bounds: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """Union with one interval: what it covers goes, and what it touches grows."""
    first, last = bisect_left(bounds, start), bisect_right(bounds, stop)
    left = (start,) if first % 2 == 0 else ()
    right = (stop,) if last % 2 == 0 else ()
    return bounds[:first] + left + right + bounds[last:]


def _tensors(parameters: int, *, momentum: bool) -> dict[str, dict[str, Any]]:
    names = ("params", "momentum") if momentum else ("params",)
    size = 4 * parameters
    return {
        name: {"dtype": "F32", "shape": [parameters], "data_offsets": [index * size, (index + 1) * size]}
        for index, name in enumerate(names)
    }


def _header_size(file: io.BufferedReader, size: int) -> int:
    prefix = file.read(8)
    announced: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= announced <= min(BASE_HEADER_BYTES_MAX, size - 8):
        what = f"base checkpoint of {size:,} bytes with a header of {announced:,}; not a safetensors file of ours"
        raise Refused(Code.CHECKPOINT_BAD, what)
    return announced


def _parsed(header: bytes) -> dict[str, Any]:
    try:
        value = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Refused(Code.CHECKPOINT_BAD, f"base checkpoint header: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise Refused(Code.CHECKPOINT_BAD, "base checkpoint header that is not an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _metadata(header: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    for name in sorted(header.keys() | tensors.keys()):
        if header.get(name) != tensors.get(name):
            what = f"tensor {shown(name)!r} is not as expected: {tensors.get(name)}"
            raise Refused(Code.CHECKPOINT_BAD, what)
    wanted = {"consumed", "format", "round", "state"}
    if not isinstance(metadata, dict) or metadata.keys() != wanted:
        raise Refused(Code.CHECKPOINT_BAD, f"base checkpoint metadata without exactly {sorted(wanted)}")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(Code.CHECKPOINT_BAD, "base checkpoint metadata that is not text")
    if metadata["format"] != _FORMAT or not _NUMBER.fullmatch(metadata["round"]):
        what = f"format {shown(metadata['format'])!r} round {shown(metadata['round'])!r}, expected {_FORMAT!r} and a number"
        raise Refused(Code.CHECKPOINT_BAD, what)
    return metadata


def _read_values(file: io.BufferedReader, parameters: int, name: str) -> Floats:
    values = np.empty(parameters, np.float32)
    for start in range(0, parameters, _PIECE_VALUES):
        piece = values[start : start + _PIECE_VALUES]
        if file.readinto(piece.data.cast("B")) != piece.nbytes:
            raise Refused(Code.CHECKPOINT_BAD, f"tensor {name!r} ends early")
        if not -VALUE_ABS_MAX <= piece.min() <= piece.max() <= VALUE_ABS_MAX:  # a NaN passes into both
            what = f"tensor {name!r} holds NaN or a value beyond {VALUE_ABS_MAX:g} after {start:,}"
            raise Refused(Code.CHECKPOINT_BAD, what)
    return values


def _consumed(text: str) -> Consumed:
    try:
        listing = canonical.from_bytes(_Listing, text.encode())
    except UnicodeEncodeError:
        raise Refused(Code.CHECKPOINT_BAD, "base checkpoint metadata that is not UTF-8") from None
    consumed = Consumed({(each.pass_number, each.shard): each.bounds for each in listing.shards})
    if not all(_in_order(each) for each in listing.shards) or consumed.listed() != listing.shards:
        raise Refused(Code.CHECKPOINT_BAD, "base checkpoint whose consumed ranges are not in order")
    return consumed


def _in_order(shard: ConsumedShard) -> bool:
    pairs = bool(shard.bounds) and len(shard.bounds) % 2 == 0 and shard.bounds[0] >= 0 and shard.pass_number >= 0
    return pairs and all(low < high for low, high in pairwise(shard.bounds))
