"""Whether a node can be called from elsewhere: found out by calling it, whatever it says itself. Calls nobody."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from protocol.address import Span, span_of
from protocol.limits import ADDRESSES_MAX

CANDIDATES_MAX = 4  # addresses in one call: of a node's, one or two can be right
SOON_SECONDS = 30.0  # between two calls while we are about to think otherwise of a node, and the least there is
AGAIN_SECONDS = 600.0  # between two calls otherwise: routers and firewalls change by the day
STANDSTILL_SECONDS = 30.0  # so long nobody can be called before anybody is told: a node may be starting again
MISSES_MAX = 3  # in a row, before one that has answered counts as closed: a minute of bad network is no reason

_ADDRESS: Final = re.compile(r"/ip([46])/([0-9A-Fa-f:.]+)/tcp/([0-9]{1,5})")


@dataclass(frozen=True)
class Reach:
    """What calls of one node have shown. Without a source nobody is asked, and it is taken to be open."""

    source: str = ""  # the IP address that its own connection to us comes from
    candidates: tuple[str, ...] = ()  # multiaddrs at which it is called
    open: bool | None = None  # at one of them; None: not known yet
    answered: str = ""  # where it did, last
    misses: int = 0  # in a row
    calling: bool = False
    called_at: float = -math.inf

    @property
    def known(self) -> bool:
        return not self.source or self.open is not None

    def due(self, now: float, *, needed: bool) -> bool:
        """Whether it is to be called now; `needed`: nobody else can be called."""
        settled = bool(self.answered) and self.misses == 0 if self.open else self.misses >= MISSES_MAX and not needed
        wait_seconds = AGAIN_SECONDS if settled else SOON_SECONDS
        return bool(self.candidates) and not self.calling and now >= self.called_at + wait_seconds


@dataclass(frozen=True)
class Standstill:
    """Nodes are here, and none of them can be called: no round can end."""

    since: float = math.inf
    lasts: bool = False  # longer than it takes a node to start again

    def at(self, now: float, nobody_is_callable: bool) -> Standstill:
        since = min(self.since, now) if nobody_is_callable else math.inf
        return Standstill(since, now - since >= STANDSTILL_SECONDS)


def heard(reach: Reach, named: Iterable[str], source: str) -> Reach:
    """It says where it is. Elsewhere it is called anew, and counts as what it was until then."""
    named, source = tuple(named), _plain(source)
    where = candidates(named, source)
    if not source or not named or (where, source) == (reach.candidates, reach.source):
        return reach if reach.source or not source else replace(reach, source=source)
    return replace(
        reach,
        source=source,
        candidates=where,
        open=reach.open if where else False,
        answered="",
        misses=0,
        calling=False,
    )


def silent(reach: Reach) -> Reach:
    """It takes part, and names no address that it ever had: it calls the others."""
    return replace(reach, open=False) if reach.source and not reach.candidates and reach.open is None else reach


def _plain(source: str) -> str:
    """A socket for both families writes IPv4 addresses as ::ffff:1.2.3.4."""
    return source.removeprefix("::ffff:") if "." in source else source


def returned(reach: Reach) -> Reach:
    """It has been started again, or is back on the network: what was found is worth another look."""
    return replace(reach, misses=min(reach.misses, MISSES_MAX - 1))


def candidates(named: Iterable[str], source: str) -> tuple[str, ...]:
    """Where to call a node: at addresses of the whole internet that it names, and at its own ports where it calls from.

    Nowhere else: nobody has us knock at doors of our own network."""
    found: dict[str, None] = {}
    for text in named:
        parts = _ADDRESS.fullmatch(text)
        if parts is None:
            continue
        if span_of(parts[2]) is Span.WORLD:
            found[text] = None
        elif span_of(source) is not None and (":" in source) == (parts[1] == "6"):
            found[f"/ip{parts[1]}/{source}/tcp/{parts[3]}"] = None
    return tuple(found)[:CANDIDATES_MAX]


def called(reach: Reach, tried: tuple[str, ...], answered: str | None, now: float) -> Reach:
    """The end of a call: the address that answered, or "" if none did; None if we could not call at all."""
    reach = replace(reach, calling=False, called_at=now)
    if tried != reach.candidates:
        return reach
    if answered is None:
        return replace(reach, open=reach.open is not False)
    if answered:
        return replace(reach, open=True, answered=answered, misses=0)
    misses = reach.misses + 1
    return replace(reach, open=bool(reach.answered) and misses < MISSES_MAX, misses=misses)


def is_wide(reaches: Iterable[Reach]) -> bool:
    """Whether somebody comes from the internet: then an address that is good here only is no address."""
    return any(span_of(reach.source) is Span.WORLD for reach in reaches)


def addresses(reach: Reach, named: tuple[str, ...], *, wide: bool) -> tuple[str, ...]:
    """Where its peers can call it, the surest first; nowhere if they cannot."""
    if not reach.source or reach.open is None:
        return named
    if not reach.open or (wide and reach.answered and not _is_world(reach.answered)):
        return ()
    sure = (reach.answered,) if reach.answered else reach.candidates
    return tuple(dict.fromkeys((*sure, *(text for text in named if not wide or _is_world(text)))))[:ADDRESSES_MAX]


def _is_world(text: str) -> bool:
    parts = _ADDRESS.fullmatch(text)
    return parts is not None and span_of(parts[2]) is Span.WORLD
