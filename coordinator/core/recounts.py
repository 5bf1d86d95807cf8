"""Recounts: whose mean is made again. Knows no bytes, no clock and no network.

A reducer signs its part, and with it the slices that it was made of (protocol/evidence.py), before anybody knows whose is
made again. The same slices give the same bits on every machine, so one mean that differs is a proof, and there is nothing
to weigh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.core import inquiries
from coordinator.core.inquiries import History, Inquiries, Rules
from protocol.types import BlobRef, Part, Record


@dataclass(frozen=True)
class Ask(inquiries.Ask):
    """One part of a certified record, to be made again."""

    record: Record
    part: Part
    evidence: BlobRef  # the part's


Recounts = Inquiries[Ask, History]


def certified(state: Recounts, record: Record, rules: Rules) -> Recounts:
    """A record of the line: those of its reducers who are due are asked."""
    if not rules.share:
        return state
    asks = [Ask(record.round, part.reducer, record, part, kept) for part in record.parts if (kept := part.evidence)]
    state = replace(state, histories={ask.node: History() for ask in asks} | dict(state.histories))
    return state.opened(asks, rules.most(len(asks)))


def recounted(state: Recounts, ask: Ask, rules: Rules, *, lied: bool, luck: float) -> Recounts:
    """`luck`, from 0 up to 1, chooses the reducer's next; a liar's is the next that there is."""
    if ask not in state.open:
        return state  # undone meanwhile
    return state.shown(ask, History(due=rules.due(ask.round, soon=lied, luck=luck)))
