"""Quotas: how often somebody may ask, and how much they may take. Knows the time only as an argument."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from protocol.errors import Code, Refused

_SWEEP: Final = 2  # buckets looked at whenever something is taken: the full ones go faster than new ones come


@dataclass(frozen=True)
class Rate:
    """A bucket: so much at once after a silence, and so much per second for ever."""

    burst: float
    per_second: float


CALLS_PER_SECOND: Final = 400.0  # of all members: some half of what one core answers
CALLS_OF_A_MEMBER: Final = Rate(64, 4)  # at least: twice all that it may ask at once, and a round every few seconds
CALLS_BURST_SECONDS: Final = 5.0
# Counts what a member calls: who stays below it goes first.
IN_TURN: Final = Rate(math.inf, CALLS_OF_A_MEMBER.per_second)
STRANGERS_NUMBER: Final = 8.0  # their place among members: of one that has just called so often
OPENING_COST: Final = 6.0  # calls: it is written down three times; so it has half of our time at most
REPORTS: Final = Rate(64, 0.1)  # of a member: all others may lie at once; one costs up to a second of one core
REFUSALS: Final = Rate(128, 4)  # calls of a member's connection that are refused: all it may have at once, four times
STRANGERS_REFUSALS: Final = Rate(32, 0.1)  # the same before a session is open: all at once, after a restart of ours
AWAY_SECONDS: Final = 30.0  # of whoever was hung up on: an honest node would keep its place in the roster meanwhile
# One join is two connections (the first looks at the certificate) and one challenge; coming back is one of each.
JOINS_OF_A_BLOCK: Final = Rate(64, 1)  # a laboratory behind one address starts at once, or is in within minutes
JOINS: Final = Rate(64, 72)  # each takes seven turns (coordinator/turns.py); more handshakes at once hold heartbeats up
CONNECTIONS_OF_A_BLOCK: Final = Rate(2 * JOINS_OF_A_BLOCK.burst, 2 * JOINS_OF_A_BLOCK.per_second)
CONNECTIONS: Final = Rate(2 * JOINS.burst, JOINS.per_second)
KNOWN_BLOCKS_MAX: Final = 4096  # networks from which a member came lately

Network = IPv4Network | IPv6Network


def take(full_at: float, rate: Rate, *, now: float, amount: float = 1.0) -> tuple[float, float]:
    """When the bucket is full again, and 0; or, with nothing taken, the seconds until so much may be taken.

    A bucket is the one number `full_at`: it fills steadily, so that tells how much is in it (ATM's GCRA). An amount
    beyond the burst is taken from a full bucket, and waited for afterwards.
    """
    since = max(full_at, now)
    missing = (since - now) * rate.per_second + min(amount, rate.burst) - rate.burst
    if missing > 0:
        return full_at, missing / rate.per_second
    return since + amount / rate.per_second, 0.0


def check(what: str, wait_seconds: float) -> None:
    """Refuse what came too often, with the time after which it may come again."""
    if wait_seconds:
        raise Refused(Code.BUSY, f"too many {what}; {wait_seconds:.1f} s from now on", retry_seconds=wait_seconds)


def share(members: int) -> Rate:
    """What each of so many members may call: all have the same part of what we can answer."""
    each = max(CALLS_OF_A_MEMBER.per_second, CALLS_PER_SECOND / max(1, members))
    return Rate(max(CALLS_OF_A_MEMBER.burst, CALLS_BURST_SECONDS * each), each)


class Buckets:
    """One bucket of the same rate for each key. A full one is as good as none, so only those in use are kept."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: Hashable, *, now: float, amount: float = 1.0) -> float:
        """0 if it was taken; else the seconds to wait."""
        full_at, wait_seconds = take(self._full_at.get(key, now), self.rate, now=now, amount=amount)
        if not wait_seconds:
            self._full_at[key] = full_at
            self._sweep(now)
        return wait_seconds

    def level(self, key: Hashable, *, now: float) -> float:
        """How much was taken of late: what the bucket lacks."""
        return max(0.0, self._full_at.get(key, now) - now) * self.rate.per_second

    def _sweep(self, now: float) -> None:
        for _ in range(min(_SWEEP, len(self._full_at))):
            key, full_at = self._full_at.popitem(last=False)
            if full_at > now:
                self._full_at[key] = full_at


class Crowd:
    """What all networks together may ask for, and each of them.

    A network from which a member came lately has its own bucket alone: a flood from elsewhere does not keep it out.
    """

    def __init__(self, each: Rate, together: Rate) -> None:
        self._each = Buckets(each)
        self._together = Buckets(together)
        self._known: OrderedDict[Network, None] = OrderedDict()

    def take(self, host: str, *, now: float) -> float:
        """0, or the seconds to wait."""
        block = block_of(host)
        if block.is_global:
            wait_seconds = self._each.take(block, now=now)
            if wait_seconds or block in self._known:
                return wait_seconds
        return self._together.take(None, now=now)

    def welcome(self, host: str) -> None:
        """A member came from there."""
        block = block_of(host)
        self._known[block] = None
        self._known.move_to_end(block)
        while len(self._known) > KNOWN_BLOCKS_MAX:
            self._known.popitem(last=False)


def block_of(host: str) -> Network:
    """The network that somebody who holds this IP address is likely to hold whole: a /24, or of IPv6 a /48.

    An address of a local network stands for itself; it may be that of a proxy, with everybody behind it."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    bits = address.max_prefixlen if not address.is_global else 24 if address.version == 4 else 48
    return ip_network(f"{address}/{bits}", strict=False)
