"""Audits of training: whose contribution is measured again, what that says of it, and when it counts. Knows no model.

A member signs the digest of all that it brings before a round is decided. Some are asked for those very bytes afterwards,
so nobody knows beforehand who will be. With the state that the round began from, the coordinator measures two gains of a
step of STRIDE times the contribution, in standard errors of their means over sequences (as Gauntlet does with loss
scores, arXiv 2505.21684):

- `gain`: by how much the loss falls on the data that the contribution names. What was trained on it makes it fall.
- `trace`: by how much more it falls there than on text that nobody trained on. Nobody else's work knows this data.
- `length`: of the contribution, in lengths of the way that the model went in its round: the run's rule has cut down what
  was too long, so this shows it (under `robust = "mean"` it does not).

It is not trained again to the same bits: a node trains on while a round is decided, with moments that it keeps. One
machine measures everybody, so that hardware plays no part. What counts against a member is measured against the others:
where those gain nothing either, as in a run that goes badly, nobody is judged.

A member is audited as soon as it is known, once in every PERIOD rounds at a time that only luck knows, and in every round
while the newest audits were bad. Of its newest KEPT audits, POINTS_MAX points are an accusation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median_low
from typing import Final

from protocol.types import DataRange, Digest, NodeId, Record, RoundNumber

STRIDE: Final = 0.25  # of a contribution: whole ones of late rounds overshoot alone, as only the mean of all is good
HARM_ERRORS: Final = -4.0  # standard errors: chance makes so much of one in 30,000 audits
GAIN_TYPICAL_MIN: Final = 2.0  # of the others: below it a gain says nothing
LENGTH_MAX: Final = 32  # of 64 contributions at right angles each is 8 times as long as their mean
CLEAR_MIN: Final = 4.0  # of the others, gain or trace: below it an honest one may be taken for none
CHANCE_MAX: Final = 1.0  # what has nothing to do with the data gains or shows less in five of six audits
HARM_POINTS: Final = 2
IDLE_POINTS: Final = 1
POINTS_MAX: Final = 4  # two harmful audits, or four in which it did nothing
KEPT: Final = 6  # audits of a member: one bad one in six rounds is forgotten
OTHERS_MIN: Final = 2  # members that were measured before anybody is judged
REPLAY_ROUNDS: Final = 256  # whose digests are remembered: 2 MB for 64 members
SEQUENCES_MIN: Final = 8  # of a contribution: the spread of fewer says little, and so light a work harms little
ANSWER_ROUNDS: Final = 2  # members keep what they brought for so many rounds
UNANSWERED_MAX: Final = 6  # in a row, each by a member that was heard of afterwards: a lost connection is not heard of


@dataclass(frozen=True)
class Rules:
    share: float  # of all contributions that are asked for; 0: none
    nothing: Digest  # what a contribution of zeros encodes to

    @property
    def period(self) -> int:
        """A time drawn evenly from 1 to this many rounds is 1 / share rounds on average."""
        return max(1, round(2 / self.share) - 1)

    def most(self, members: int) -> int:
        """Audits of one round: a crowd of newcomers is spread over several."""
        return math.ceil(2 * self.share * members)


class Kind(Enum):
    BROKEN = "broken"  # no decoder reads what it signed: proved
    REPLAYED = "replayed"  # it signed the same bytes in two rounds: proved
    POINTS = "points"  # too many bad audits
    UNANSWERED = "unanswered"  # it never shows what it signed


@dataclass(frozen=True)
class Ask:
    """One contribution of a certified record, to be measured."""

    round: RoundNumber
    node: NodeId
    update: Digest
    ranges: tuple[DataRange, ...]
    weight: float = 1.0  # its tokens, in those of the record's mean contribution


@dataclass(frozen=True)
class Measured:
    """Means over sequences in nats per token, and their standard errors. Not finite where a loss is no number."""

    own: float  # gained on its own data by a step of STRIDE times the contribution
    own_error: float
    length: float  # of the contribution, in those of the way that the model went in its round
    more: float  # than on held-out text
    more_error: float
    against: float  # the same, less what the round's mean gains on each sequence: what all sequences share drops out
    against_error: float

    @property
    def gain(self) -> float:
        return _in_errors(self.own, self.own_error)

    @property
    def trace(self) -> float:
        """The clearer of the two: where the round's mean is spoilt, nothing can be seen against it."""
        return max(_in_errors(self.more, self.more_error), _in_errors(self.against, self.against_error))


@dataclass(frozen=True)
class Broken:
    """Not an encoded vector of this run, though its author signed these bytes."""

    what: str


@dataclass(frozen=True)
class Accusation:
    node: NodeId
    round: RoundNumber
    kind: Kind
    reason: str  # for its author's eyes, and the researcher's
    evidence: Digest  # the contribution

    @property
    def proved(self) -> bool:
        """Nothing that luck or a bad network does."""
        return self.kind in (Kind.BROKEN, Kind.REPLAYED)


@dataclass(frozen=True)
class History:
    """What is known of one member."""

    due: RoundNumber = RoundNumber(0)
    points: tuple[int, ...] = ()  # of its newest audits, the newest last
    newest: Measured | None = None
    unanswered: int = 0


@dataclass(frozen=True)
class Audits:
    histories: Mapping[NodeId, History] = field(default_factory=dict)
    open: tuple[Ask, ...] = ()  # asked for, or waiting to be measured
    seen: Mapping[Digest, tuple[RoundNumber, NodeId]] = field(default_factory=dict)


def certified(state: Audits, record: Record, rules: Rules) -> tuple[Audits, tuple[Accusation, ...]]:
    """A record of the line: look for bytes that were brought before, and open this round's audits."""
    if not rules.share:
        return state, ()
    accused: list[Accusation] = []
    histories, seen = dict(state.histories), dict(state.seen)
    for each in record.contributions:
        histories.setdefault(each.node, History())
        known = seen.setdefault(each.update, (record.round, each.node))
        if known == (record.round, each.node) or each.update == rules.nothing:
            continue
        if known[1] == each.node:
            reason = f"it brought the same update in rounds {known[0]} and {record.round}"
            accused.append(Accusation(each.node, record.round, Kind.REPLAYED, reason, each.update))
            continue
        if known[0] == record.round:  # one of them has copied: which, their traces say
            for node in (known[1], each.node):
                histories[node] = replace(histories[node], due=record.round)
            continue
        reason = f"it brought what another had brought in round {known[0]}"
        history = replace(histories[each.node], due=RoundNumber(record.round + 1))  # this is as good as an audit
        histories[each.node], found = _marked(each.node, record.round, history, IDLE_POINTS, reason, each.update)
        accused += [found] if found else []
    oldest = record.round - REPLAY_ROUNDS
    state = replace(state, histories=histories, seen={d: k for d, k in seen.items() if k[0] > oldest})
    return _choose(state, record, rules), tuple(accused)


def _choose(state: Audits, record: Record, rules: Rules) -> Audits:
    """Those who are due, the suspects first, then those who are so for longest."""
    due = [
        each
        for each in record.contributions
        if state.histories[each.node].due <= record.round and _sequences(each.ranges) >= SEQUENCES_MIN
    ]
    due.sort(key=lambda each: (not suspect(state.histories[each.node]), state.histories[each.node].due))
    chosen = due[: rules.most(len(record.contributions))]
    usual = sum(each.tokens for each in record.contributions) / len(record.contributions)
    asks = tuple(Ask(record.round, each.node, each.update, each.ranges, each.tokens / usual) for each in chosen)
    return replace(state, open=state.open + asks)


def sample(ranges: Iterable[DataRange], most: int, luck: float) -> tuple[tuple[DataRange, tuple[int, ...]], ...]:
    """At most so many positions of this data, evenly spaced from a place that luck chooses, range by range."""
    ranges = tuple(ranges)
    total = _sequences(ranges)
    count = min(most, total)
    wanted = [int((number + luck) * total / count) for number in range(count)]
    found, first = [], 0
    for each in ranges:
        stop = first + each.stop - each.start
        if here := tuple(each.start + number - first for number in wanted if first <= number < stop):
            found.append((each, here))
        first = stop
    return tuple(found)


def suspect(history: History) -> bool:
    return any(history.points[-2:])


def measured(
    state: Audits, ask: Ask, result: Measured | Broken, rules: Rules, luck: float
) -> tuple[Audits, Accusation | None]:
    """An audit has ended. `luck`, from 0 up to 1, chooses the member's next."""
    if ask not in state.open:
        return state, None  # undone meanwhile
    state = dropped(state, ask)
    history = replace(state.histories[ask.node], unanswered=0)
    if isinstance(result, Broken):
        reason = f"nobody can read its update: {result.what}"
        state = _with(state, ask.node, replace(history, due=RoundNumber(ask.round + 1)))
        return state, Accusation(ask.node, ask.round, Kind.BROKEN, reason, ask.update)
    points, what = _judge(ask, result, [other for node, other in state.histories.items() if node != ask.node])
    accusation = None
    if points is not None:
        history, accusation = _marked(ask.node, ask.round, history, points, what, ask.update)
    soon = suspect(history) or history.newest is None  # a newcomer's first may say nothing: nobody else is known
    wait = 1 if soon else 1 + int(luck * rules.period)
    history = replace(history, newest=result, due=RoundNumber(ask.round + wait))
    return _with(state, ask.node, history), accusation


def _marked(
    node: NodeId, round_number: RoundNumber, history: History, points: int, what: str, evidence: Digest
) -> tuple[History, Accusation | None]:
    history = replace(history, points=(*history.points, points)[-KEPT:])
    if not points or sum(history.points) < POINTS_MAX:
        return history, None
    bad = sum(map(bool, history.points))
    reason = f"{bad} of its newest {len(history.points)} audits were bad; in round {round_number} {what}"
    return history, Accusation(node, round_number, Kind.POINTS, reason, evidence)


def dropped(state: Audits, ask: Ask) -> Audits:
    """It was not measured, for no fault of its author, who stays due."""
    return replace(state, open=tuple(other for other in state.open if other != ask))


def _judge(ask: Ask, result: Measured, others: Iterable[History]) -> tuple[int | None, str]:
    """Points against it, and why; none where others' work would be no better."""
    known = [other.newest for other in others if other.newest is not None]
    if len(known) < OTHERS_MIN or (gain := median_low(each.gain for each in known)) < GAIN_TYPICAL_MIN:
        return None, ""
    if result.gain < HARM_ERRORS:
        return HARM_POINTS, "its update raised the loss on its own data"
    if result.length / max(1.0, ask.weight) > LENGTH_MAX >= 4 * median_low(each.length for each in known):
        return HARM_POINTS, f"its update was {result.length:.0f} times as long as the way that the model went"
    if result.gain <= 0 or (gain >= CLEAR_MIN and result.gain < CHANCE_MAX):
        return IDLE_POINTS, "its update did not lower the loss on its own data"
    if median_low(each.trace for each in known) >= CLEAR_MIN and result.trace < CHANCE_MAX:
        return IDLE_POINTS, "its update showed no trace of its own data"
    return 0, ""


def expired(
    state: Audits, newest: RoundNumber, heard: Collection[NodeId], answered: Collection[Digest]
) -> tuple[Audits, tuple[Accusation, ...]]:
    """Close what is too old to be answered or measured when this round is certified. `heard`: members heard of since.

    Whoever was not asked in time, or has answered and waits for a busy evaluator, stays due and nothing counts."""
    accused: list[Accusation] = []
    for ask in [ask for ask in state.open if ask.round + ANSWER_ROUNDS < newest]:
        state = dropped(state, ask)
        history = state.histories[ask.node]
        if ask.update in answered or ask.node not in heard:
            continue
        history = replace(history, unanswered=history.unanswered + 1)
        if history.unanswered >= UNANSWERED_MAX:
            reason = f"{history.unanswered} times in a row it did not show the update that it had signed"
            accused.append(Accusation(ask.node, ask.round, Kind.UNANSWERED, reason, ask.update))
            history = replace(history, unanswered=0)
        state = _with(state, ask.node, history)
    return state, tuple(accused)


def alarmed(state: Audits) -> Audits:
    """The held-out loss has jumped: everybody is due."""
    due = RoundNumber(0)
    return replace(state, histories={node: replace(each, due=due) for node, each in state.histories.items()})


def gone_back(state: Audits, to: RoundNumber) -> Audits:
    """What is undone is neither measured nor held against anybody: the same work may rightly be brought again."""
    return replace(
        state,
        open=tuple(ask for ask in state.open if ask.round < to),
        seen={digest: known for digest, known in state.seen.items() if known[0] < to},
        histories={node: replace(each, due=min(each.due, to)) for node, each in state.histories.items()},
    )


def _with(state: Audits, node: NodeId, history: History) -> Audits:
    return replace(state, histories={**state.histories, node: history})


def _sequences(ranges: Iterable[DataRange]) -> int:
    return sum(each.stop - each.start for each in ranges)


def _in_errors(mean: float, error: float) -> float:
    """Where nothing differs between sequences, the sign is all there is to say."""
    if not math.isfinite(mean):
        return -math.inf
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
