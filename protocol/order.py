"""In which order the sequences of a shard are trained on: neighbours in a range are far apart in the text.

A range of data is a range of positions; each pass has an order of its own. The order is arithmetic, so that every
machine has the same one without storing it, and an audit can find the very tokens of a contribution.
"""

from __future__ import annotations

from math import gcd

_GOLDEN = 0.6180339887498949  # multiples of it fall evenly on a circle (Weyl 1916; Knuth, TAOCP 3, 6.4)


def sequence_at(position: int, *, sequences: int, pass_number: int) -> int:
    """Which sequence of a shard stands at this position of this pass. A bijection of [0, sequences)."""
    assert 0 <= position < sequences
    return (position * _stride(sequences, pass_number) + pass_number) % sequences


def _stride(sequences: int, pass_number: int) -> int:
    """About a golden share of the shard, another one for each pass, without a common factor with its length."""
    share = ((pass_number + 1) * _GOLDEN) % 1.0
    stride = max(1, int(share * sequences))
    while gcd(stride, sequences) != 1:
        stride += 1
    return stride
