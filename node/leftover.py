"""What a reducer left out of its means: it goes into its next means of the same values.

Error feedback on the way down (Tang et al., "DoubleSqueeze", arXiv 1905.05957, algorithm 1), for codecs that leave values
out altogether. A leftover is of one averaging, and waits until a record takes newer means of the same reducer: what was left
out of means that nobody folded is still with those who brought it. When spans have moved, the values that both spans hold
are added and the rest is dropped. A reducer that ends, or whose means were undone, drops it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.codec import Codec, Floats


@dataclass(frozen=True)
class Leftover:
    """Of the values from `start` on."""

    start: int
    values: Floats

    def add_to(self, mean: Floats, start: int) -> None:
        """To the means of the values from `start` on, as far as both hold them."""
        low, high = max(start, self.start), min(start + mean.size, self.start + self.values.size)
        if low < high:
            mean[low - start : high - start] += self.values[low - self.start : high - self.start]


def encode(mean: Floats, start: int, codec: Codec, before: Leftover | None, decay: float) -> tuple[bytes, Floats]:
    """The encoded means of the values from `start` on, and what that left out of them, times `decay`.

    `mean` is changed: what was left out before is added."""
    if before is not None:
        before.add_to(mean, start)
    data = codec.encode(mean)
    left = mean - codec.decode(data, mean.size)
    left *= np.float32(decay)
    return data, left
