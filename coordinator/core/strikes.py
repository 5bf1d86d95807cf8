"""Strikes: what was proved against a node, or ordered by the researcher, and what follows. Knows no evidence's bytes.

The trail of a node is append-only; whether it is shut out, and for how long, is read from the trail and never kept
beside it. A fault that an honest node shows once after an accident (a folder restored or copied, a bit that flipped)
sets it aside for some rounds; only what it cannot show again and again, or not at all, shuts it out for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocol.types import Digest, Fault, NodeId, RoundNumber

ASIDE_ROUNDS: Final = (10, 40)  # out of the rosters after the first fault and the next: longer than any accident
REMEMBERED_ROUNDS: Final = 400  # a fault longer ago says nothing about the machine of today


class Kind(Enum):
    STRIKE = "strike"
    WARNING = "warning"  # a fault as proved as a strike, which an honest node may show after an accident
    BAN = "ban"
    KICK = "kick"  # a ban that ends
    UNBAN = "unban"  # what is before it counts no more


class By(Enum):
    RESEARCHER = "researcher"
    COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Mark:
    """One line of a node's trail."""

    node: NodeId
    kind: Kind
    reason: str
    by: By
    ms: int
    round: RoundNumber  # of the fault; of the head for an order
    fault: Fault | None = None
    evidence: Digest | None = None  # of what proves the fault
    until_ms: int | None = None  # of a kick
    aside_until: RoundNumber = RoundNumber(0)  # out of the rosters before this round
    void: tuple[Digest, ...] = ()  # contributions that the fault is about: they count for nothing


Trail = Sequence[Mark]  # of one node, in order


@dataclass(frozen=True)
class Policy:
    warnings: int  # faults of this kind that are no strike
    strikes: int  # strikes of this kind that ban
    what: str  # for people, after the node's name
    advice: str  # for the volunteer


POLICIES: Final[Mapping[Fault, Policy]] = {
    Fault.FORGED: Policy(
        0, 1, "put work into a record that its member had not signed", "Run barnraise as it was published."
    ),
    Fault.REDUCED_WRONG: Policy(
        0,
        2,  # one bit that flips in a memory without error correction does so once
        "sent a mean that is not the mean of what it was sent",
        "Test this machine's memory, and run barnraise as it was published.",
    ),
    Fault.TRAINED_WRONG: Policy(
        0,
        3,  # a card that is overclocked or too hot is found out, and its owner told, before it is shut out
        "brought work that does not fit the data it names",
        "Test this machine's memory and its GPU without overclocking, or join with --device cpu.",
    ),
    Fault.GARBLED: Policy(
        0,
        3,  # as above: what leaves a broken machine is not what it signed either
        "sent others what it had not signed",
        "Test this machine's memory, and run barnraise as it was published.",
    ),
    Fault.SLANDERED: Policy(
        0,
        3,
        "complained about most others, who had sent what they signed",
        "Test this machine's memory, and run barnraise as it was published.",
    ),
    Fault.WITHHELD: Policy(
        4,  # each is six times in a row, and sets it aside: a disk may be full for a while, and its owner away
        3,
        "did not show work that it had brought",
        "See that the disk that holds the node's folder has room, and that the line carries uploads.",
    ),
    Fault.CONTRADICTED: Policy(
        2,  # a machine taken back to an earlier moment may sign for a second time what it signed before
        1,
        "signed two letters that contradict each other",
        "Has this folder been copied, or restored from a backup? One folder is one node, and runs once.",
    ),
}


def judge(
    trail: Trail,
    node: NodeId,
    fault: Fault,
    *,
    round_number: RoundNumber,
    head: RoundNumber,
    reason: str,
    evidence: Digest,
    now_ms: int,
    void: tuple[Digest, ...] = (),
) -> tuple[Mark, ...]:
    """What follows from a fault that was proved: marks for its trail, none if it is known already.

    One round's faults of a kind are one: a lie is told to many, and each of them reports it."""
    since = current(trail)
    alike = [mark for mark in since if mark.fault is fault]
    if any(mark.evidence == evidence for mark in trail) or any(mark.round == round_number for mark in alike):
        return ()
    policy = POLICIES[fault]
    recent = [mark for mark in alike if mark.round >= round_number - REMEMBERED_ROUNDS]
    warned = sum(mark.kind is Kind.WARNING for mark in recent)
    struck = sum(mark.kind is Kind.STRIKE for mark in recent)
    kind = Kind.WARNING if warned < policy.warnings else Kind.STRIKE
    aside = RoundNumber(head + ASIDE_ROUNDS[min(len(recent), len(ASIDE_ROUNDS) - 1)])
    mark = Mark(node, kind, reason, By.COORDINATOR, now_ms, round_number, fault, evidence, aside_until=aside, void=void)
    if kind is Kind.WARNING or struck + 1 < policy.strikes or shut(trail, now_ms) is not None:
        return (mark,)
    return mark, Mark(node, Kind.BAN, f"it {policy.what} ({reason})", By.COORDINATOR, now_ms, head, fault, evidence)


def current(trail: Trail) -> Trail:
    """What counts: all after the last time that it was let in again."""
    pardons = [index for index, mark in enumerate(trail) if mark.kind is Kind.UNBAN]
    return trail[pardons[-1] + 1 :] if pardons else trail


def shut(trail: Trail, now_ms: int) -> Mark | None:
    """The ban or the kick that keeps it out now."""
    orders = [mark for mark in current(trail) if mark.kind in (Kind.BAN, Kind.KICK)]
    lasting = (mark for mark in orders if mark.until_ms is None or now_ms < mark.until_ms)
    return max(lasting, key=lambda mark: mark.kind is Kind.BAN, default=None)


def void(trail: Trail) -> frozenset[Digest]:
    """The contributions for which it has no credit."""
    return frozenset(update for mark in current(trail) for update in mark.void)


def aside_until(trail: Trail) -> RoundNumber:
    """The first round that it may be rostered for again."""
    return max((mark.aside_until for mark in current(trail)), default=RoundNumber(0))


def faults(trail: Trail, kind: Kind) -> tuple[Mark, ...]:
    return tuple(mark for mark in current(trail) if mark.kind is kind)


def refusal(mark: Mark, now_ms: int) -> str:
    """What a node is told that is shut out."""
    who = "the researcher" if mark.by is By.RESEARCHER else "the coordinator"
    why = f": {mark.reason}" if mark.reason else ""
    if mark.until_ms is None:
        return f"{who} has excluded this node{why}"
    return f"{who} has sent this node away for another {-(-(mark.until_ms - now_ms) // 60_000)} min{why}"


def notice(trail: Trail, head: RoundNumber) -> str:
    """One line for the volunteer; empty for a node without a fault."""
    if not trail:
        return ""
    said = " and ".join(filter(None, _counts(trail)))
    found = [mark for mark in current(trail) if mark.fault is not None and mark.kind is not Kind.BAN]
    if not found or found[-1].fault is None:
        return ""
    policy, until = POLICIES[found[-1].fault], aside_until(trail)
    aside = f"; it is left out until round {until}" if until > head else ""
    frozen = f"; its credit for {len(gone)} of its updates is frozen" if (gone := void(trail)) else ""
    what = f"in round {found[-1].round} this node {policy.what} ({found[-1].reason}){aside}{frozen}"
    return f"{said}: {what}. {policy.advice}"


def _counts(trail: Trail) -> tuple[str, ...]:
    """How many strikes and warnings, in words; empty for none."""
    found = ((len(faults(trail, kind)), kind.value) for kind in (Kind.STRIKE, Kind.WARNING))
    return tuple(f"{count} {word}{'' if count == 1 else 's'}" if count else "" for count, word in found)


def standing(trail: Trail, head: RoundNumber, now_ms: int) -> str:
    """What is held against a node, in a few words for the researcher; empty for most."""
    words = []
    if (mark := shut(trail, now_ms)) is not None:
        for_how_long = "" if mark.until_ms is None else f" for another {-(-(mark.until_ms - now_ms) // 60_000)} min"
        what = "banned" if mark.kind is Kind.BAN else "sent away"
        words.append(f"{what}{for_how_long}" + (f": {mark.reason}" if mark.reason else ""))
    words += [count for count in _counts(trail) if count]
    if aside_until(trail) > head:
        words.append(f"left out until round {aside_until(trail)}")
    return "; ".join(words)


def said(mark: Mark, name: str) -> str:
    """One line of the run's history, for everybody."""
    why = f": {mark.reason}" if mark.reason else ""
    match mark.kind:
        case Kind.STRIKE | Kind.WARNING:
            assert mark.fault is not None
            what = f"{name} {POLICIES[mark.fault].what} in round {mark.round} ({mark.reason})"
            return f"{what}: a {mark.kind.value}, and left out until round {mark.aside_until}"
        case Kind.BAN:
            return f"{name} was banned by the {mark.by.value}{why}"
        case Kind.KICK:
            return f"{name} was sent away by the {mark.by.value}{why}"
        case Kind.UNBAN:
            return f"{name} may come again{why}"


def by_node(marks: Iterable[Mark]) -> dict[NodeId, tuple[Mark, ...]]:
    """The trails of all nodes."""
    trails: dict[NodeId, tuple[Mark, ...]] = {}
    for mark in marks:
        trails[mark.node] = (*trails.get(mark.node, ()), mark)
    return trails
