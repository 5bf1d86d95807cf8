"""Recounts: whose mean is made again, and what silence counts for. Knows no bytes, no clock and no network.

A reducer signs its part, and with it the slices that it was made of (protocol/evidence.py), before anybody knows whose is
made again. The same slices give the same bits on every machine, so one mean that differs is a proof, and there is nothing
to weigh. A reducer is asked as soon as it is known, and once in every PERIOD rounds at a time that only luck knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from coordinator.core.audits import ANSWER_ROUNDS, UNANSWERED_MAX, Rules
from protocol.types import NodeId, Part, Record, RoundNumber


@dataclass(frozen=True)
class Ask:
    """One part of a certified record, to be made again."""

    record: Record
    part: Part


@dataclass(frozen=True)
class History:
    """What is known of one reducer."""

    due: RoundNumber = RoundNumber(0)
    unanswered: int = 0  # in a row


@dataclass(frozen=True)
class Recounts:
    histories: Mapping[NodeId, History] = field(default_factory=dict)
    open: tuple[Ask, ...] = ()


def certified(state: Recounts, record: Record, rules: Rules) -> Recounts:
    """A record of the line: of its reducers, those who have been due for longest are asked."""
    if not rules.share:
        return state
    parts = [part for part in record.parts if part.evidence is not None]
    histories = {part.reducer: History() for part in parts} | dict(state.histories)
    due = [part for part in parts if histories[part.reducer].due <= record.round]
    due.sort(key=lambda part: histories[part.reducer].due)
    asks = tuple(Ask(record, part) for part in due[: rules.most(len(parts))])
    return replace(state, histories=histories, open=state.open + asks)


def recounted(state: Recounts, ask: Ask, rules: Rules, *, lied: bool, luck: float) -> Recounts:
    """`luck`, from 0 up to 1, chooses the reducer's next; a liar's is the next that there is."""
    if ask not in state.open:
        return state  # undone meanwhile
    wait = 1 if lied else 1 + int(luck * rules.period)
    history = History(due=RoundNumber(ask.record.round + wait))
    return _with(dropped(state, ask), ask.part.reducer, history)


def dropped(state: Recounts, ask: Ask) -> Recounts:
    """Nothing was found out; its reducer stays due."""
    return replace(state, open=tuple(other for other in state.open if other != ask))


def expired(
    state: Recounts, newest: RoundNumber, heard: Collection[NodeId], answered: Collection[Ask]
) -> tuple[Recounts, tuple[Ask, ...]]:
    """Close what is too old to be answered, and tell which of it was withheld once too often.

    `heard`: the reducers that have been heard of since they were asked; on others' silence nothing counts."""
    withheld: list[Ask] = []
    for ask in [ask for ask in state.open if ask.record.round + ANSWER_ROUNDS < newest]:
        state = dropped(state, ask)
        if ask in answered or ask.part.reducer not in heard:
            continue
        history = state.histories[ask.part.reducer]
        history = replace(history, unanswered=history.unanswered + 1)
        if history.unanswered >= UNANSWERED_MAX:
            withheld.append(ask)
            history = replace(history, unanswered=0)
        state = _with(state, ask.part.reducer, history)
    return state, tuple(withheld)


def gone_back(state: Recounts, to: RoundNumber) -> Recounts:
    """What is undone moves nobody's model any more."""
    histories = {node: replace(each, due=min(each.due, to)) for node, each in state.histories.items()}
    return replace(state, histories=histories, open=tuple(ask for ask in state.open if ask.record.round < to))


def _with(state: Recounts, node: NodeId, history: History) -> Recounts:
    return replace(state, histories={**state.histories, node: history})
