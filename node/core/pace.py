"""How fast this node may send: a bucket that fills with time. Knows no clock and no line."""

from __future__ import annotations

from dataclasses import dataclass, replace

BURST_SECONDS = 1.0  # what may go at once after a silence: letters are short, and wait for nothing


@dataclass(frozen=True)
class Bucket:
    """Bytes that may go now; below zero, what was promised to those who wait already."""

    bytes_per_second: float
    filled: float = 0.0
    at: float = 0.0  # when it held so much

    def take(self, size: int, now: float) -> tuple[Bucket, float]:
        """The bucket after `size` more bytes, and the seconds to wait before they go."""
        most = self.bytes_per_second * BURST_SECONDS
        filled = min(most, self.filled + (now - self.at) * self.bytes_per_second) - size
        return replace(self, filled=filled, at=now), max(0.0, -filled / self.bytes_per_second)
