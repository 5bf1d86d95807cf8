"""Robust rules: the mean of a group's contributions, of which a minority cannot make what it likes.

Everybody who repeats a rule gets the same bits: each step is one float operation on each value, rounded on its own, in the
members' order; lengths are sums of squares in a fixed order. Knows no network and no torch.

`mean`      sum of tokens_i / tokens * x_i.
`clip`      the same, where what is longer than its bound is shortened to it (below).
`trimmed`   of each value, the mean without the quarter of the members that brought the least and the quarter that
            brought the most (Yin et al. 2018, arXiv 1803.01498).
`centered`  around a center, the mean of the way to each x_i, shortened to its bound; the result is the next center
            (Karimireddy et al. 2021, arXiv 2012.10333). It begins at the middle one of each value, so that nobody has to
            remember a center from the round before.

The bound of a length is the group's median, times tokens_i / the median of tokens for a member with more tokens. Steps of
equal length take nobody further than in proportion to their number, so a fast machine is not cut down to the slow ones;
one with fewer tokens gets no more than the median. Of an even number the lower one is the median: half of a group
can stop the rounds anyway, by silence, and shall not decide how long a contribution may be. So of two members the longer
is cut to the shorter. One of two is not a majority, for single values either, so `trimmed` and `centered` are `clip` then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.codec import Codec, Data, Doubles, Floats, halved
from protocol.limits import CHUNK_VALUES, MEMBERS_MAX

TRIM_SHARE: Final = 0.25  # of the members, at each end: two liars of eight
CENTERINGS: Final = 3  # each decodes everything again; liars that pull alike move a fourth center by little
_MAGNITUDE: Final = np.int32(0x7FFFFFFF)  # turned over in what is negative, a float's bits are in the order of floats
_PLACE_BITS: Final = (MEMBERS_MAX - 1).bit_length()
_COLUMNS: Final = 4096  # values sorted together: 64 members' fit into a cache


class Rule(Enum):
    MEAN = "mean"
    CLIP = "clip"
    TRIMMED = "trimmed"
    CENTERED = "centered"


def means(
    rule: Rule, codec: Codec, contributions: Sequence[Data], tokens: Sequence[int], values: int
) -> Iterator[tuple[int, Floats]]:
    """Where each chunk of the mean starts, and its values, lent until the next.

    Contributions are encodings of so many values each, which the caller has checked, in the roster's order; all tokens are
    positive. Lengths are those of all the values given."""
    assert 0 < len(contributions) == len(tokens) <= MEMBERS_MAX and min(tokens) > 0
    if rule in (Rule.TRIMMED, Rule.CENTERED) and len(contributions) < 3:
        rule = Rule.CLIP
    match rule:
        case Rule.MEAN:
            return _weighted(codec, contributions, _factors(tokens, [1.0] * len(tokens)), values)
        case Rule.CLIP:
            lengths = [math.sqrt(codec.squares(contribution, values)) for contribution in contributions]
            return _weighted(codec, contributions, _factors(tokens, shares(lengths, tokens)), values)
        case Rule.TRIMMED:
            return _trimmed(codec, contributions, tokens, values)
        case Rule.CENTERED:
            return _centered(codec, contributions, tokens, values)


def shares(lengths: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """What each member's contribution is multiplied with, so that none is longer than its bound."""
    median, usual = _median(lengths), _median(tokens)
    bounds = [median * max(1.0, each / usual) for each in tokens]
    return [bound / length if length > bound else 1.0 for length, bound in zip(lengths, bounds, strict=True)]


def _median(numbers: Sequence[float]) -> float:
    return sorted(numbers)[(len(numbers) - 1) // 2]


def _factors(tokens: Sequence[int], shortened: Sequence[float]) -> list[np.float32]:
    total = sum(tokens)
    return [np.float32(each / total * share) for each, share in zip(tokens, shortened, strict=True)]


def _weighted(
    codec: Codec, contributions: Sequence[Data], factors: Sequence[np.float32], values: int
) -> Iterator[tuple[int, Floats]]:
    """In float32, the factors rounded to it first."""
    room = np.empty(min(values, CHUNK_VALUES), np.float32)
    for start, pieces in _decoded(codec, contributions, values):
        mean = room[: pieces[0].size]
        mean.fill(0)
        for piece, factor in zip(pieces, factors, strict=True):
            piece *= factor
            mean += piece
        yield start, mean


def _trimmed(
    codec: Codec, contributions: Sequence[Data], tokens: Sequence[int], values: int
) -> Iterator[tuple[int, Floats]]:
    """Weighted by tokens in float64; of equal values the first member's is the lesser."""
    members, weights = len(tokens), np.array(tokens, np.float64)
    cut = min(math.ceil(members * TRIM_SHARE), (members - 1) // 2)
    room = np.empty(min(values, CHUNK_VALUES), np.float32)
    for start, pieces in _decoded(codec, contributions, values):
        mean = room[: pieces[0].size]
        for at, rows in _columns(pieces):
            values_left, who = _middle(rows, cut)
            heavy = weights[who]
            weighted = values_left.astype(np.float64)
            weighted *= heavy
            mean[at : at + len(rows)] = _added(weighted) / _added(heavy)
        yield start, mean


def _middle(rows: Floats, cut: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Of each row all values but the least and the largest `cut`, and whose they are. Of equals the first is the least.

    Sorted as whole numbers, the value above and its place below: half the time that argsort takes."""
    members = rows.shape[1]
    bits = rows.view(np.int32)
    keys = (bits ^ (bits >> 31 & _MAGNITUDE)).astype(np.int64) << _PLACE_BITS | np.arange(members)
    keys.sort(axis=1)
    kept = keys[:, cut : members - cut]
    ordered = (kept >> _PLACE_BITS).astype(np.int32)
    return (ordered ^ (ordered >> 31 & _MAGNITUDE)).view(np.float32), kept & (1 << _PLACE_BITS) - 1


def _centered(
    codec: Codec, contributions: Sequence[Data], tokens: Sequence[int], values: int
) -> Iterator[tuple[int, Floats]]:
    center = np.empty(values, np.float32)
    middle = (len(tokens) - 1) // 2
    squares = [0.0] * len(tokens)  # of the way from the center to each contribution
    for start, pieces in _decoded(codec, contributions, values):
        around = center[start : start + pieces[0].size]
        for at, rows in _columns(pieces):
            around[at : at + len(rows)] = np.partition(rows, middle, axis=1)[:, middle]
        _measure(pieces, around, squares)
    for _ in range(CENTERINGS):
        factors = _factors(tokens, shares([math.sqrt(each) for each in squares], tokens))
        squares = [0.0] * len(tokens)
        for start, pieces in _decoded(codec, contributions, values):
            around = center[start : start + pieces[0].size]
            step = np.zeros_like(around)
            for piece, factor in zip(pieces, factors, strict=True):
                step += (piece - around) * factor
            around += step
            _measure(pieces, around, squares)
    for start in range(0, values, CHUNK_VALUES):
        yield start, center[start : start + CHUNK_VALUES]


def _measure(pieces: Sequence[Floats], center: Floats, squares: list[float]) -> None:
    for index, piece in enumerate(pieces):
        squares[index] += halved(np.square(piece - center, dtype=np.float64))


def _decoded(codec: Codec, contributions: Sequence[Data], values: int) -> Iterator[tuple[int, list[Floats]]]:
    """Where each chunk starts, and everybody's values of it, lent until the next."""
    for chunks in zip(*(codec.decode_chunks(each, values) for each in contributions), strict=True):
        yield chunks[0][0], [piece for _, piece in chunks]


def _columns(pieces: Sequence[Floats]) -> Iterator[tuple[int, Floats]]:
    """Where some values of a chunk start, and a row for each, of what everybody brought; -0 is 0."""
    for at in range(0, pieces[0].size, _COLUMNS):
        yield at, np.stack([piece[at : at + _COLUMNS] for piece in pieces], axis=1) + np.float32(0)


def _added(table: npt.NDArray[np.float64]) -> Doubles:
    """The sum of each row, from left to right."""
    total = table[:, 0].copy()
    for column in table.T[1:]:
        total += column
    return total
