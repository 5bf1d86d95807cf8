"""The watch over held-out loss: when the run goes back by itself. Knows measurements and nothing of who made them.

The rule. The window is the newest WINDOW measurements of the line, in the order of their rounds, however they came; a
round that is measured again counts once, with its newest value. A measurement is *bad* if it is not a number, or more
than `jump` nats above the lowest of the window; else it is *good*. The run goes back to the newest good measurement as
soon as the bad ones after it

- hold one that is not a number, or
- are `evaluations` many: a jump.

It is said once: then the watch is silent until the newest measurement is good again or the line has gone back. Where
the run file forbids going back, where nothing good was ever measured, and where the run has already gone back by itself
`most` times to this round or a later one, the watch only warns. A good measurement below everything in the window is a
new best, and what the run went back to before it is forgiven.

A rise of less than `jump` in WINDOW measurements is no jump: a model that overfits rises so, and going back helps nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from protocol.types import Rollback, RoundNumber

WINDOW: Final = 16  # twice the longest jump that a run file can ask for, so that as many good ones are known
_BY_ITSELF: Final = "by itself: "  # begins the reason of every rollback that no person asked for


@dataclass(frozen=True)
class Rules:
    """The run file's section [watch]."""

    rollback: bool
    jump: float
    evaluations: int
    most: int


class Measured(Protocol):
    """A row of the stored history."""

    @property
    def round(self) -> int: ...
    @property
    def heldout(self) -> float | None: ...


@dataclass(frozen=True)
class Watch:
    """The newest measurements of the line, and where the run has gone back to since its last best."""

    window: tuple[tuple[RoundNumber, float], ...] = ()  # by round; infinite where the loss is not a number
    returns: tuple[RoundNumber, ...] = ()
    said: bool = False


@dataclass(frozen=True)
class GoBack:
    """Keep the records before round `to`, undo the rest."""

    to: RoundNumber
    reason: str


def watch(
    state: Watch, round_number: RoundNumber, heldout: float | None, rules: Rules
) -> tuple[Watch, GoBack | str | None]:
    """Take one more measurement, of the line as it now is: nothing, a warning, or the order to go back.

    `said` lasts until `gone_back` is told of the rollback, so an order that is still under way is not given twice.
    """
    state = _with(state, round_number, heldout)
    good, bad = _parted(state, rules)
    if not bad:
        return replace(state, said=False), None
    not_a_number = [number for number, loss in bad if loss == math.inf]
    if state.said or not (not_a_number or len(bad) >= rules.evaluations):
        return state, None
    state = replace(state, said=True)
    if not_a_number:
        what = f"held-out loss at round {not_a_number[0]} is not a number"
    else:
        lowest = min(loss for _, loss in state.window)
        number, loss = bad[-1]
        what = f"held-out loss {loss:.4g} at round {number}, {loss - lowest:.4g} above the lowest"
        what += f", {len(bad)} measurements in a row"
    if good is None:
        return state, f"{what}; it never was a number: this needs a person"
    if not rules.rollback:
        return state, f"{what}; round {good} was good"
    again = sum(good <= earlier for earlier in state.returns)
    if again >= rules.most:
        return state, f"{what}; gone back {again} times to round {good} already: this needs a person"
    return state, GoBack(good, _BY_ITSELF + what)


def gone_back(state: Watch, rollback: Rollback) -> Watch:
    """The line has gone back, by itself or for a person: forget what was measured beyond."""
    to = rollback.to.round
    returns = (*state.returns, to) if rollback.reason.startswith(_BY_ITSELF) else state.returns
    return Watch(tuple(each for each in state.window if each[0] <= to), returns)


def of_history(rows: Iterable[Measured], rollbacks: Iterable[Rollback] = ()) -> Watch:
    """The watch as a coordinator's store remembers it: the line's measurements by round, and all rollbacks so far."""
    state = Watch(returns=tuple(r.to.round for r in rollbacks if r.reason.startswith(_BY_ITSELF)))
    for row in rows:
        state = _with(state, RoundNumber(row.round), row.heldout)
    return state


def _with(state: Watch, round_number: RoundNumber, heldout: float | None) -> Watch:
    loss = math.inf if heldout is None or not math.isfinite(heldout) else heldout
    known = dict(state.window)
    returns = state.returns
    if known and loss < min(known.values()):  # a new best: measured after every return to a round before it
        returns = tuple(to for to in returns if to >= round_number)
    window = sorted((known | {round_number: loss}).items())[-WINDOW:]
    return replace(state, window=tuple(window), returns=returns)


def _parted(state: Watch, rules: Rules) -> tuple[RoundNumber | None, list[tuple[RoundNumber, float]]]:
    """The newest good round, and the bad measurements after it."""
    most = min(loss for _, loss in state.window) + rules.jump
    bad: list[tuple[RoundNumber, float]] = []
    for number, loss in reversed(state.window):
        if loss <= most < math.inf:
            return number, bad[::-1]
        bad.append((number, loss))
    return None, bad[::-1]
