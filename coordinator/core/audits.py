"""Audits of training: whose contribution is measured again, what that says of it, and when it counts. Knows no model.

A member signs the digest of all that it brings before a round is decided. Some are asked for those very bytes afterwards,
so nobody knows beforehand who will be. With the state that the round began from, the coordinator measures two gains of a
step of STRIDE times the contribution, in standard errors of their means over sequences (as Gauntlet does with loss
scores, arXiv 2505.21684):

- `gain`: by how much the loss falls on the data that the contribution names. What was trained on it makes it fall.
- `trace`: by how much more it falls there than on what the others of its record name. Nobody else's work knows this data;
  theirs is text of the same run, and their work knows it: what is made of theirs gains less on its own.
- `share`: what it gains of what a step along the way that the model went gains there. Noise has next to none of it, and
  the work of wrong labels little, though chance may lend them a gain that is clear.
- `length`: of the contribution, in lengths of the way that the model went in its round: the run's rule has cut down what
  was too long, so this shows it (under `robust = "mean"` it does not).

It is not trained again to the same bits: a node trains on while a round is decided, with moments that it keeps. One
machine measures everybody, so that hardware plays no part. What counts against a member is measured against the others:
where those gain nothing either, as in a run that goes badly, nobody is judged.

Of what a member complains about (protocol/contribution.py) the bytes are only read, whatever the share of audits: where
they are what their author signed, and no codec reads them, that is proof. Where one does, or they are never shown, either
their author has sent others than it signed or its accuser lies: one word counts against nobody, those of most members do.
Who complains in vain about most of them is the one that lies, or has a broken memory.

A member whose newest audits were bad is audited in every round; then CONTROLS others are measured beside it, as traces fade
and gains turn for all at once. What is bad beside measurements of other times is a suspicion, and no point. Of its newest
KEPT audits, POINTS_MAX points are an accusation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import fmean, median_low
from typing import Final, Self

from coordinator.core import inquiries
from coordinator.core.inquiries import ANSWER_ROUNDS, UNANSWERED_MAX, Inquiries
from protocol.contribution import Complaint
from protocol.types import DataRange, Digest, Fault, NodeId, Record, RoundNumber

STRIDE: Final = 0.25  # of a contribution: whole ones of late rounds overshoot alone, as only the mean of all is good
HARM_ERRORS: Final = -4.0  # standard errors: chance makes so much of one in 30,000 audits
GAIN_TYPICAL_MIN: Final = 2.0  # of the others: below it a gain says nothing
LENGTH_MAX: Final = 32  # of 64 contributions at right angles each is 8 times as long as their mean
TRACES: Final = 4  # of a member's newest, in the others' usual one, ...
TRACE_MIN: Final = 0.35  # ... that are more than this on average: honest work has 1, and what hides in the mean a third
FAINT: Final = 0.5  # and none that is more is held against it for those before: one in twenty honest ones is less
CLEAR_MIN: Final = 4.0  # of the others' gains: below it an honest one may be taken for none
TRACE_CLEAR: Final = 3.0  # of two thirds of the others' traces
CHANCE_MAX: Final = 1.0  # what has nothing to do with the data gains or shows less in five of six audits
SHARE_MIN: Final = 0.2  # of the others' share, and of its weight: honest ones of a fifth of the steps have a third
HARM_POINTS: Final = 2
IDLE_POINTS: Final = 1
POINTS_MAX: Final = 4  # two harmful audits, or four in which it did nothing
KEPT: Final = 6  # audits of a member: one bad one in six rounds is forgotten
OTHERS_MIN: Final = 2  # members that were measured before anybody is judged
CONTROLS: Final = 3  # others that are measured with a suspect, if there are so many
FRESH_ROUNDS: Final = 2  # between two measurements that are compared before a point is given
REPLAY_ROUNDS: Final = 256  # whose digests are remembered: 2 MB for 64 members
SAMPLED: Final = 64  # sequences of a contribution's data, and as many of the others': more would see the same
SEQUENCES_MIN: Final = 8  # of a contribution: the spread of fewer says little, and so light a work harms little
COMPLAINTS_SHARE: Final = 0.5  # of a round's members are asked for what others could not read: liars are a minority
WORD_ROUNDS: Final = 64  # a word counts for so long; nor is another heard about the same member if it came to nothing

Pair = tuple[NodeId, NodeId]  # accuser and accused


@dataclass(frozen=True)
class Rules(inquiries.Rules):
    nothing: Digest  # what a contribution of zeros encodes to
    traced: bool = True  # not where contributions are sparse: they bring the work of many rounds bit by bit


class Kind(Enum):
    BROKEN = "broken"  # no decoder reads what it signed: proved
    GARBLED = "garbled"  # more than half of the members were sent something else than it shows
    SLANDERED = "slandered"  # it has complained about more than half of the members in vain
    REPLAYED = "replayed"  # it signed the same bytes in two rounds: proved
    POINTS = "points"  # too many bad audits
    UNANSWERED = "unanswered"  # it never shows what it signed


_FAULTS: Final = {  # all others: Fault.TRAINED_WRONG
    Kind.GARBLED: Fault.GARBLED,
    Kind.SLANDERED: Fault.SLANDERED,
    Kind.UNANSWERED: Fault.WITHHELD,
}


@dataclass(frozen=True)
class Ask(inquiries.Ask):
    """One contribution of a certified record, to be measured; or of any round, to be read."""

    update: Digest
    ranges: tuple[DataRange, ...]
    elsewhere: tuple[DataRange, ...] = field(default=(), compare=False)  # what the others of the record name
    weight: float = 1.0  # its tokens, in those of the record's mean contribution
    accuser: NodeId | None = None  # who could not use it: then it is read, and stands in no record, or not in all
    members: frozenset[NodeId] = field(default=frozenset(), compare=False)  # when that was said


@dataclass(frozen=True)
class Measured:
    """Means over sequences in nats per token, and their standard errors. Not finite where a loss is no number."""

    own: float  # gained on its own data by a step of STRIDE times the contribution
    own_error: float
    length: float  # of the contribution, in those of the way that the model went in its round
    more: float  # than on what the others name; on held-out text where there are none
    more_error: float
    against: float  # the same, less what the round's mean gains on each sequence: what all sequences share drops out
    against_error: float
    usual: float  # gained on the same data by a step of STRIDE along the way that the model went
    usual_error: float

    @property
    def gain(self) -> float:
        return _in_errors(self.own, self.own_error)

    @property
    def trace(self) -> float:
        """The clearer of the two: where the round's mean is spoilt, nothing can be seen against it."""
        return max(_in_errors(self.more, self.more_error), _in_errors(self.against, self.against_error))

    @property
    def share(self) -> float:
        """Not a number where the way that the model went gained nothing clear: then there is nothing to have a share of."""
        return self.own / self.usual if _in_errors(self.usual, self.usual_error) >= CLEAR_MIN else math.nan


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
    void: tuple[Digest, ...] = ()  # contributions that brought nothing, or harm

    @property
    def proved(self) -> bool:
        """Nothing that luck or a bad network does."""
        return self.kind in (Kind.BROKEN, Kind.REPLAYED)

    @property
    def fault(self) -> Fault:
        return _FAULTS.get(self.kind, Fault.TRAINED_WRONG)


@dataclass(frozen=True)
class History(inquiries.History):
    points: tuple[int, ...] = ()  # of its newest audits, the newest last
    updates: tuple[Digest, ...] = ()  # what each of these looked at
    traces: tuple[float, ...] = ()  # in those of the others, where theirs were clear
    newest: Measured | None = None
    measured_in: RoundNumber = RoundNumber(0)  # that one's round
    suspected: bool = False  # it was bad beside measurements of other times


@dataclass(frozen=True)
class Audits(Inquiries[Ask, History]):
    seen: Mapping[Digest, tuple[RoundNumber, NodeId]] = field(default_factory=dict)
    complaints: frozenset[tuple[RoundNumber, NodeId]] = frozenset()  # those heard, whom they are about
    words: Mapping[Pair, RoundNumber] = field(default_factory=dict)  # the newest of an accuser about an accused
    vain: Mapping[Pair, RoundNumber] = field(default_factory=dict)  # the same of those that came to nothing

    def gone_back(self, to: RoundNumber) -> Self:
        """What is undone is neither measured nor held against anybody: the same work may rightly be brought again."""
        return replace(
            super().gone_back(to),
            seen={digest: known for digest, known in self.seen.items() if known[0] < to},
            complaints=frozenset(each for each in self.complaints if each[0] < to),
        )


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
            accused.append(Accusation(each.node, record.round, Kind.REPLAYED, reason, each.update, (each.update,)))
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
    usual = sum(each.tokens for each in record.contributions) / len(record.contributions)
    named = [(each.node, span) for each in record.contributions for span in each.ranges]
    asks = [
        Ask(
            record.round,
            each.node,
            each.update,
            each.ranges,
            tuple(span for node, span in named if node != each.node),
            each.tokens / usual,
        )
        for each in record.contributions
        if _sequences(each.ranges) >= SEQUENCES_MIN
    ]
    suspects = {ask.node for ask in asks if suspect(state.histories[ask.node])}
    state = state.opened(asks, rules.most(len(record.contributions)), suspects)
    chosen = {ask.node for ask in state.open if ask.round == record.round and ask.accuser is None}
    if not chosen & suspects:
        return state
    free = [ask for ask in asks if ask.node not in chosen | suspects]
    free.sort(key=lambda ask: state.histories[ask.node].due)  # those who would be audited next: it is no earlier for it
    return replace(state, open=(*state.open, *free[: max(0, CONTROLS - len(chosen - suspects))]))


def sample(ranges: Iterable[DataRange], luck: float) -> tuple[tuple[DataRange, tuple[int, ...]], ...]:
    """At most SAMPLED positions of this data, evenly spaced from a place that luck chooses, range by range."""
    ranges = tuple(ranges)
    total = _sequences(ranges)
    count = min(SAMPLED, total)
    wanted = [int((number + luck) * total / count) for number in range(count)]
    found, first = [], 0
    for each in ranges:
        stop = first + each.stop - each.start
        if here := tuple(each.start + number - first for number in wanted if first <= number < stop):
            found.append((each, here))
        first = stop
    return tuple(found)


def suspect(history: History) -> bool:
    return history.suspected or any(history.points[-2:])


def measured(
    state: Audits, ask: Ask, result: Measured | Broken, rules: Rules, luck: float
) -> tuple[Audits, Accusation | None]:
    """An audit has ended. `luck`, from 0 up to 1, chooses the member's next."""
    if ask not in state.open:
        return state, None  # undone meanwhile
    history = state.histories[ask.node]
    if isinstance(result, Broken):
        return state.shown(ask, replace(history, due=RoundNumber(ask.round + 1))), _unreadable(ask, result)
    known, enough = _known(state, ask, result)
    traces = _traces(history.traces, result, [newest for newest, suspected in known if not suspected], rules)
    points, what = _judge(ask, result, traces, [newest for newest, _ in known])
    accusation = None
    soon = history.newest is None  # a newcomer's first may say nothing: nobody else is known
    history = replace(history, newest=result, measured_in=ask.round, suspected=bool(points) and not enough)
    if enough and points is not None:
        history, accusation = _marked(ask.node, ask.round, replace(history, traces=traces), points, what, ask.update)
    if suspect(history) or history.due <= ask.round:  # who was only measured beside a suspect is due when it was
        history = replace(history, due=rules.due(ask.round, soon=soon or suspect(history), luck=luck))
    return state.shown(ask, history), accusation


def _known(state: Audits, ask: Ask, result: Measured) -> tuple[list[tuple[Measured, bool]], bool]:
    """What this is measured against: the others' newest, whether each is a suspect's, and whether enough of them are fresh."""
    others = [(each.newest, each) for node, each in state.histories.items() if node != ask.node and each.newest]
    # where the model's own way harms, perhaps all do
    turned = _in_errors(result.usual, result.usual_error) < GAIN_TYPICAL_MIN
    within = 0 if turned else FRESH_ROUNDS
    fresh = [(newest, each) for newest, each in others if abs(ask.round - each.measured_in) <= within]
    enough = len(fresh) >= min(CONTROLS, len(others))
    return [(newest, suspect(each)) for newest, each in (fresh if enough else others)], enough


def complained(state: Audits, complaint: Complaint, accuser: NodeId, members: frozenset[NodeId]) -> Audits:
    """One of the members could not use what another has sent to it in a round: ask for that, if this is news.

    Whoever calls this has checked that the contribution is genuine, and of a round of the line or the open one."""
    accused, at = complaint.contribution.node, complaint.round
    state = replace(state, words={**state.words, (accuser, accused): at})
    vain = state.vain.get((accuser, accused))
    if (at, accused) in state.complaints or (vain is not None and at < vain + WORD_ROUNDS):
        return state
    if sum(each == at for each, _ in state.complaints) >= math.ceil(COMPLAINTS_SHARE * len(members)):
        return state
    ask = Ask(at, accused, complaint.contribution.update, (), accuser=accuser, members=members)
    state = replace(state, open=(*state.open, ask), complaints=state.complaints | {(at, accused)})
    return state.knowing(accused, state.histories.get(accused, History()))


def read(state: Audits, ask: Ask, broken: Broken | None) -> tuple[Audits, Accusation | None]:
    """What was complained about has been shown, and looked at."""
    assert ask.accuser is not None, "this one is to be measured"
    if ask not in state.open:
        return state, None  # undone meanwhile
    state = state.shown(ask, state.histories[ask.node])
    if broken is not None:
        return _settled(state, ask.node), _unreadable(ask, broken)
    state, accusation = _believed(replace(state, vain={**state.vain, (ask.accuser, ask.node): ask.round}), ask)
    return (state, accusation) if accusation is not None else _disbelieved(state, ask, ask.accuser)


def _believed(state: Audits, ask: Ask) -> tuple[Audits, Accusation | None]:
    """What was complained about proves nothing: whether most members say the same."""
    words = {accuser for accuser, accused in state.words if accused == ask.node} & ask.members
    if 2 * len(words) <= len(ask.members):
        return state, None
    reason = f"{len(words)} of {len(ask.members)} members were sent other bytes than it signed, or what no codec reads"
    return _settled(state, ask.node), Accusation(ask.node, ask.round, Kind.GARBLED, reason, ask.update)


def _disbelieved(state: Audits, ask: Ask, accuser: NodeId) -> tuple[Audits, Accusation | None]:
    """Its complaint has come to nothing: whether those about most members have."""
    accused = {accused for by, accused in state.vain if by == accuser} & ask.members
    if 2 * len(accused) <= len(ask.members):
        return state, None
    reason = f"it complained about {len(accused)} of {len(ask.members)} members, who showed what they had signed"
    state = _without(state, lambda by, _: by == accuser)
    return state, Accusation(accuser, ask.round, Kind.SLANDERED, reason, ask.update)


def _settled(state: Audits, accused: NodeId) -> Audits:
    """It is found out: nobody complained in vain, and the next time it takes as many words again."""
    return _without(state, lambda _, about: about == accused)


def _without(state: Audits, gone: Callable[[NodeId, NodeId], bool]) -> Audits:
    """Without some words, by accuser and accused, and without what came of them."""
    words, vain = ({pair: at for pair, at in each.items() if not gone(*pair)} for each in (state.words, state.vain))
    return replace(state, words=words, vain=vain)


def _unreadable(ask: Ask, result: Broken) -> Accusation:
    reason = f"nobody can read its update: {result.what}"
    return Accusation(ask.node, ask.round, Kind.BROKEN, reason, ask.update, (ask.update,))


def _marked(
    node: NodeId, round_number: RoundNumber, history: History, points: int, what: str, evidence: Digest
) -> tuple[History, Accusation | None]:
    history = replace(history, points=(*history.points, points)[-KEPT:], updates=(*history.updates, evidence)[-KEPT:])
    if not points or sum(history.points) < POINTS_MAX:
        return history, None
    bad = tuple(update for found, update in zip(history.points, history.updates, strict=True) if found)
    reason = f"{len(bad)} of its newest {len(history.points)} audits were bad; in round {round_number} {what}"
    return history, Accusation(node, round_number, Kind.POINTS, reason, evidence, bad)


def _traces(
    before: tuple[float, ...], result: Measured, others: Collection[Measured], rules: Rules
) -> tuple[float, ...]:
    """Its newest ones in the others' usual one, if it would show: two thirds of the others' are clear now.

    One lucky audit does not outweigh the others, nor an unlucky one."""
    traces = sorted(each.trace for each in others)
    if not rules.traced or len(traces) < OTHERS_MIN or traces[len(traces) // 3] < TRACE_CLEAR:
        return ()
    return (*before, min(2.0, max(0.0, result.trace / median_low(traces))))[-TRACES:]


def _judge(
    ask: Ask, result: Measured, traces: tuple[float, ...], known: Collection[Measured]
) -> tuple[int | None, str]:
    """Points against it, and why; none where others' work would be no better."""
    if len(known) < OTHERS_MIN or (gain := median_low(each.gain for each in known)) < GAIN_TYPICAL_MIN:
        return None, ""
    if result.gain < HARM_ERRORS:
        return HARM_POINTS, "its update raised the loss on its own data"
    if result.length / max(1.0, ask.weight) > LENGTH_MAX >= 4 * median_low(each.length for each in known):
        return HARM_POINTS, f"its update was {result.length:.0f} times as long as the way that the model went"
    if result.gain <= 0 or (gain >= CLEAR_MIN and result.gain < CHANCE_MAX):
        return IDLE_POINTS, "its update did not lower the loss on its own data"
    shares = [each.share for each in known if not math.isnan(each.share)]
    if shares and result.share < SHARE_MIN * min(1.0, ask.weight) * median_low(shares):
        return IDLE_POINTS, "its update lowered the loss on its own data much less than others' did on theirs"
    faint = len(traces) > 1 and traces[-1] < FAINT and fmean(traces) < TRACE_MIN
    if traces and (result.trace < CHANCE_MAX or faint):
        return IDLE_POINTS, "its update showed no trace of its own data"
    return 0, ""


def expired(
    state: Audits, newest: RoundNumber, heard: Collection[NodeId], answered: Collection[Ask]
) -> tuple[Audits, tuple[Accusation, ...]]:
    """Forget old complaints as well; accused is who has withheld too much, or what most members could not use."""
    closing = [ask for ask in state.open if ask.accuser and ask.round + ANSWER_ROUNDS < newest and ask not in answered]
    state, withheld = state.expired(newest, heard, answered)
    state = replace(
        state,
        complaints=frozenset(each for each in state.complaints if each[0] + ANSWER_ROUNDS >= newest),
        words=_lasting(state.words, newest),
        vain=_lasting(state.vain, newest),
    )
    reason = f"{UNANSWERED_MAX} times in a row it did not show the update that it had signed"
    accused = [Accusation(ask.node, ask.round, Kind.UNANSWERED, reason, ask.update) for ask in withheld]
    for ask in closing:
        state, found = _believed(state, ask)
        accused += [found] if found else []
    return state, tuple(accused)


def _lasting(words: Mapping[Pair, RoundNumber], newest: RoundNumber) -> dict[Pair, RoundNumber]:
    return {pair: at for pair, at in words.items() if at + WORD_ROUNDS >= newest}


def alarmed(state: Audits) -> Audits:
    """The held-out loss has jumped: everybody is due."""
    due = RoundNumber(0)
    return replace(state, histories={node: replace(each, due=due) for node, each in state.histories.items()})


def _sequences(ranges: Iterable[DataRange]) -> int:
    return sum(each.stop - each.start for each in ranges)


def _in_errors(mean: float, error: float) -> float:
    """Where nothing differs between sequences, the sign is all there is to say."""
    if not math.isfinite(mean):
        return -math.inf
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
