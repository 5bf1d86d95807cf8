"""Inquiries: who is asked to show what it has signed, and what its silence counts for. Knows not what is shown.

Somebody is asked as soon as it is known, and again after 1 to `Rules.period` rounds, as only luck knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Generic, Self, TypeVar

from protocol.types import NodeId, RoundNumber

ANSWER_ROUNDS: Final = 2  # members keep what they brought for so many rounds
UNANSWERED_MAX: Final = 6  # in a row, each by a member that was heard of afterwards: a lost connection is not heard of


@dataclass(frozen=True)
class Rules:
    share: float  # of all that could be asked for; 0: none

    @property
    def period(self) -> int:
        """A time drawn evenly from 1 to this many rounds is 1 / share rounds on average."""
        return max(1, round(2 / self.share) - 1)

    def most(self, members: int) -> int:
        """Asked in one round: a crowd of newcomers is spread over several."""
        return math.ceil(2 * self.share * members)

    def due(self, asked: RoundNumber, *, soon: bool, luck: float) -> RoundNumber:
        """When it is asked again. `luck` is from 0 up to 1."""
        return RoundNumber(asked + (1 if soon else 1 + int(luck * self.period)))


@dataclass(frozen=True)
class Ask:
    round: RoundNumber
    node: NodeId  # who has signed it, and is to show it


@dataclass(frozen=True)
class History:
    """What is known of one who is asked."""

    due: RoundNumber = RoundNumber(0)
    unanswered: int = 0  # in a row


A = TypeVar("A", bound=Ask)
H = TypeVar("H", bound=History)


@dataclass(frozen=True)
class Inquiries(Generic[A, H]):
    histories: Mapping[NodeId, H] = field(default_factory=dict)
    open: tuple[A, ...] = ()  # asked for, or waiting to be looked at
    asked_ms: Mapping[A, float] = field(default_factory=dict)

    def opened(self, asks: Iterable[A], most: int, suspects: Collection[NodeId] = ()) -> Self:
        """Those whose authors are due are asked for, the suspects first, then those who are so for longest."""
        due = [ask for ask in asks if self.histories[ask.node].due <= ask.round]
        due.sort(key=lambda ask: (ask.node not in suspects, self.histories[ask.node].due))
        return replace(self, open=(*self.open, *due[:most]))

    def told(self, now_ms: float) -> Self:
        """The authors of what is open can know it from now on, where they could not before."""
        return replace(self, asked_ms={ask: self.asked_ms.get(ask, now_ms) for ask in self.open})

    def heard(self, heard_ms: Callable[[NodeId], float]) -> set[NodeId]:
        """Who has been heard of since it was asked; `heard_ms` says when last."""
        return {ask.node for ask in self.open if heard_ms(ask.node) > self.asked_ms[ask]}

    def shown(self, ask: A, history: H) -> Self:
        """It has been looked at; this is what is known of its author now."""
        return self.dropped(ask).knowing(ask.node, replace(history, unanswered=0))

    def dropped(self, ask: A) -> Self:
        """Nothing was found out, for no fault of its author, who stays due."""
        return replace(self, open=tuple(other for other in self.open if other != ask))

    def expired(self, newest: RoundNumber, heard: Collection[NodeId], answered: Collection[A]) -> tuple[Self, list[A]]:
        """Close what is too old to be shown or looked at when this round is certified; what was withheld once too often.

        `heard`: members heard of since they were asked. Whoever was not, or has answered, stays due and nothing counts."""
        state, withheld = self, list[A]()
        for ask in [ask for ask in self.open if ask.round + ANSWER_ROUNDS < newest]:
            state = state.dropped(ask)
            twice = any((other.round, other.node) == (ask.round, ask.node) for other in state.open)  # once for both
            if twice or ask in answered or ask.node not in heard:
                continue
            history = state.histories[ask.node]
            unanswered = (history.unanswered + 1) % UNANSWERED_MAX
            state = state.knowing(ask.node, replace(history, unanswered=unanswered))
            withheld += [] if unanswered else [ask]
        return state, withheld

    def gone_back(self, to: RoundNumber) -> Self:
        """Nobody is asked about what is undone."""
        histories = {node: replace(each, due=min(each.due, to)) for node, each in self.histories.items()}
        return replace(self, histories=histories, open=tuple(ask for ask in self.open if ask.round < to))

    def knowing(self, node: NodeId, history: H) -> Self:
        return replace(self, histories={**self.histories, node: history})
