"""How long to wait before trying again: exponential, spread over three quarters; luck is an argument."""

from __future__ import annotations

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0  # a thousand nodes are back within a minute of the coordinator's return


def wait_seconds(*, failures: int, luck: float) -> float:
    """Seconds to wait after so many failures in a row; `luck` is uniform in [0, 1)."""
    ceiling = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures, 16))
    return ceiling * (0.25 + 0.75 * luck)
