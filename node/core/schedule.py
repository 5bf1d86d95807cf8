"""May this machine train now? What its owner allows against how things are; knows no clock and no sensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.limits import DISK_FREE_BYTES_MIN

MINUTES_A_DAY = 24 * 60
COOLER_DEGREES = 5.0  # than its owner allows, before it trains again: else it would rest and train by turns of seconds


@dataclass(frozen=True)
class Hours:
    """A part of the day by the owner's clock, in minutes since midnight; over midnight when it stops before it starts."""

    start: int
    stop: int

    def __str__(self) -> str:
        return "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (self.start, self.stop))

    def hold(self, minute: int) -> bool:
        return (minute - self.start) % MINUTES_A_DAY < (self.stop - self.start) % MINUTES_A_DAY


@dataclass(frozen=True)
class Policy:
    """What the owner allows."""

    hours: Sequence[Hours] = ()  # none: always
    on_battery: bool = False
    on_metered: bool = False
    max_celsius: float | None = None
    rest_beside: Sequence[str] = ()  # programs, in small letters


@dataclass(frozen=True)
class Conditions:
    """How things are."""

    minute: int  # since midnight
    on_battery: bool
    on_metered: bool  # a line that is paid by what goes over it, such as a telephone's
    celsius: float | None  # of the hottest processor or GPU; none where nothing tells
    disk_free_bytes: int
    programs: frozenset[str] = frozenset()  # of those that the owner has named, those that run


def obstacle(policy: Policy, now: Conditions, *, rests: bool = False) -> str:
    """Why not to train now, for people; empty when nothing speaks against it. `rests`: something did just now."""
    if policy.hours and not any(hours.hold(now.minute) for hours in policy.hours):
        return f"outside of your hours, {', '.join(map(str, policy.hours))}"
    if now.on_battery and not policy.on_battery:
        return "this machine runs on its battery"
    if now.on_metered and not policy.on_metered:
        return "this machine's line is metered"
    if beside := [each for each in policy.rest_beside if each in now.programs]:
        return f"{' and '.join(beside)} {'is' if len(beside) == 1 else 'are'} running"
    if policy.max_celsius is not None and now.celsius is not None:
        cool = policy.max_celsius - COOLER_DEGREES
        if now.celsius >= (cool if rests else policy.max_celsius):
            return f"a processor or GPU has reached {policy.max_celsius:g} °C, and has to cool below {cool:g}"
    if now.disk_free_bytes < DISK_FREE_BYTES_MIN:
        return f"the disk has less than {DISK_FREE_BYTES_MIN >> 30} GiB left"
    return ""
