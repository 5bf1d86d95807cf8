"""Fold: applies a round's update to the shared state, to the same bits on every machine. Knows no network, no torch.

All arithmetic is float32, one operation at a time, each rounded on its own: no fused multiply-add, no reordering.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from protocol import robust
from protocol.codec import Data, Floats
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.limits import CHUNK_VALUES
from protocol.log import check_ranges, check_record_shape, ranges_of
from protocol.runspec import UpdateSection
from protocol.state import State
from protocol.types import Exchange, Record, RoundNumber

_SUBNORMAL: Final = np.array([1e-40], np.float32)


class OuterKind(Enum):
    AVERAGE = "average"
    NESTEROV = "nesterov"


@dataclass(frozen=True)
class Outer:
    """The outer optimizer. With d the decoded mean pseudo-gradient of a value, float32 throughout:

    average:  p = p - rate * d
    nesterov: m = momentum * m + d;  p = p - rate * (d + momentum * m)      (DiLoCo, arXiv 2311.08105)

    Where the record has no part, neither p nor m changes: what members brought is still in their residuals.
    """

    kind: OuterKind = OuterKind.AVERAGE
    learning_rate: float = 1.0
    momentum: float = 0.0

    @property
    def keeps_momentum(self) -> bool:
        return self.kind is OuterKind.NESTEROV


def outer_of(update: UpdateSection) -> Outer:
    """The outer optimizer that a run file names."""
    return Outer(OuterKind(update.outer), update.outer_learning_rate, update.outer_momentum)


def fold(state: State, record: Record, parts: Mapping[int, Data], packing: Packing, outer: Outer) -> None:
    """Advance the state by one record, whose parts are given by index, or refuse and change nothing.

    The caller has checked certificate, link, part digests, and that record.state is the state's digest.
    """
    assert outer.keeps_momentum == (state.momentum is not None)
    assert (_SUBNORMAL * np.float32(0.5)).any(), (
        "this process flushes subnormal floats to zero; its states would differ"
    )
    check_update(state, record, parts, packing)
    room = np.empty(CHUNK_VALUES, np.float32)
    for start, mean in _means(record, parts, packing):
        span = slice(start, start + mean.size)
        if state.momentum is not None:
            _accelerate(mean, state.momentum[span], outer, room[: mean.size])
        mean *= np.float32(outer.learning_rate)
        state.params[span] -= mean
    state.consumed = state.consumed.with_ranges(ranges_of(record))
    state.round = RoundNumber(state.round + 1)


def _means(record: Record, parts: Mapping[int, Data], packing: Packing) -> Iterator[tuple[int, Floats]]:
    """Where each chunk of the mean pseudo-gradient starts, and its values, lent until the next.

    Contributions that everybody gathered are averaged here, by the run's rule, in the order of the parts."""
    codec = packing.of(record.exchange)
    if record.exchange is Exchange.ALL_REDUCE:
        for part in record.parts:
            for start, mean in codec.decode_chunks(parts[part.index], part.stop - part.start):
                yield part.start + start, mean
        return
    tokens = {contribution.node: contribution.tokens for contribution in record.contributions}
    gathered, weights = [parts[part.index] for part in record.parts], [tokens[part.reducer] for part in record.parts]
    yield from robust.means(packing.rule, codec, gathered, weights, record.parts[0].stop)


def check_update(state: State, record: Record, parts: Mapping[int, Data], packing: Packing) -> None:
    """Refuse a record or parts that cannot be folded into this state."""
    codec = packing.of(record.exchange)
    if record.round != state.round:
        raise Refused(Code.RECORD_BAD, f"record of round {record.round}, expected {state.round}")
    check_record_shape(record, state.params.size)
    check_ranges(record, state.consumed)
    for part in record.parts:
        values = part.stop - part.start
        if part.size != codec.encoded_bytes(values):
            what = f"part {part.index} of {part.size} bytes, expected {codec.encoded_bytes(values)}"
            raise Refused(Code.RECORD_BAD, what)
        if part.index not in parts:
            raise Refused(Code.UPDATE_BAD, f"part {part.index} of record {record.round} is missing")
        codec.check(parts[part.index], values)


def _accelerate(mean: Floats, momentum: Floats, outer: Outer, room: Floats) -> None:
    """Turn the mean into Nesterov's step, and advance the momentum."""
    factor = np.float32(outer.momentum)
    momentum *= factor
    momentum += mean
    np.multiply(momentum, factor, out=room)
    mean += room
