"""One round after another: propose, vote, repair, commit. Knows no socket, clock, tensor or disk.

Each round is decided by single-decree Paxos among the members of a signed roster (Lamport, "Paxos Made
Simple", 2001): `Ready` is the promise, `Propose` the request to accept, `Vote` the acceptance, and the
certificate is the proof that a strict majority accepted. What is decided is a record; the averaging in
between only produces the parts that the leader's record names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from protocol.contribution import check_shape
from protocol.errors import Refused
from protocol.exchange import layout
from protocol.limits import RANGES_MAX
from protocol.log import (
    check_members,
    check_ranges,
    check_record_shape,
    head_after,
    next_head,
    next_turn,
    ranges_of,
    record_hash,
)
from protocol.messages import (
    Accepted,
    Begin,
    Claim,
    Commit,
    LogRequest,
    Message,
    Propose,
    Ready,
    SignedReady,
    Vote,
)
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Epoch,
    Exchange,
    Grant,
    Head,
    LogEntry,
    NodeId,
    Part,
    Record,
    Role,
    Roster,
    RoundNumber,
    RunId,
    Seal,
    Signature,
    SignedRollback,
    SignedRoster,
    VoteBody,
)

ROSTERS_KEPT = 64  # rosters that late certificates may still name
INCLUSIVE_ATTEMPTS = 3  # in which a record must hold half of what could be in it; then any that is sound will do
ATTEMPT_JUMP_MAX = 16  # how far ahead of ours a peer's attempt may pull us
RESEND_SECONDS = 2.0  # a lost promise costs a round this much, not a timeout
MISSED_SECONDS = 30.0  # a majority that is awaited for longer is worth a word
LOG_ASK_SECONDS = 1.0  # between two questions for records that we miss


class Phase(Enum):
    TRAINING = "training"  # no promise made in this round yet
    GATHERING = "gathering"  # promised; waiting for the leader to begin
    AVERAGING = "averaging"
    DECIDING = "deciding"  # averaged; waiting for a proposal, or for its certificate
    FOLDING = "folding"  # certified; the parts are being fetched and folded
    REWINDING = "rewinding"  # the coordinator has undone records that are folded here


@dataclass(frozen=True)
class Rules:
    """What does not change while the machine runs. The callables are pure: same arguments, same answer."""

    me: NodeId
    run: RunId
    parameters: int
    context: int
    inner_steps: Callable[[RoundNumber], int]
    exchange: Callable[[Sequence[Role]], Exchange]  # of a group of members in these roles
    part_is_vouched: Callable[[Record, Part], bool]  # of its codec's size, and its reducer's word for this very record
    is_data: Callable[[DataRange], bool]  # whether the run has it: a weight is made of nothing else
    round_seconds_min: Callable[[int], float]  # with so many members: what they upload is capped
    round_seconds_max: float
    gather_seconds: float
    attempt_seconds_min: float
    attempt_seconds_max: float
    stale_rounds: int  # missed in a row, after which what this node holds back is dropped
    sign: Callable[[VoteBody], str]
    vote_is_valid: Callable[[NodeId, VoteBody, str], bool]
    sign_proposal: Callable[[VoteBody], str]
    proposal_is_valid: Callable[[NodeId, VoteBody, str], bool]
    brings: Callable[[Head, Contribution], Contribution]  # signed by this node for the round that follows this head
    is_brought: Callable[[Head, Contribution], bool]  # its member's own, for that round, of data that was granted to it
    entry_is_certified: Callable[[LogEntry, Roster], bool]


@dataclass(frozen=True)
class Rounds:
    """Where this node stands in the log and in the round being decided."""

    head: Head
    digest: Digest  # of state(head.round)
    consumed: Consumed
    rosters: Mapping[Epoch, SignedRoster] = field(default_factory=dict)
    branch: int = 0  # the number of the newest rollback that this log has followed
    rollbacks: tuple[SignedRollback, ...] = ()  # all that are known, from the first on
    silent: Epoch = Epoch(-1)  # nothing is signed under rosters up to it: what was promised there is forgotten
    sealed: Epoch = Epoch(-1)  # nor up to this one, until it is unsealed: a former life has left, and said so
    last: LogEntry | None = None
    phase: Phase = Phase.TRAINING
    ballot: Ballot = Ballot(Epoch(-1), 0)  # nothing below it is signed any more
    promised_at: float | None = None  # first, in this round
    ballot_is_new: bool = False  # no former life of this process can have led it
    doubted: frozenset[NodeId] = frozenset()  # members whose promises are not counted in this attempt
    heard: Ballot = Ballot(Epoch(-1), 0)  # the highest that a peer has promised in this round
    accepted: Accepted | None = None
    contribution: Contribution | None = None  # the snapshot made for this round
    carried: Contribution | None = None  # what earlier rounds did not take
    missed: int = 0  # rounds in a row that took nothing of ours
    snapshot_asked: bool = False
    steps: int = 0  # inner steps since the last snapshot
    active: bool = False  # may promise, reduce and vote
    trains: bool = False  # brings work to rounds; without it, a member only votes, so that it costs nobody a majority
    finishing: bool = False
    round_started: float = 0.0
    readies: Mapping[NodeId, SignedReady] = field(default_factory=dict)
    asking: frozenset[NodeId] = frozenset()  # have said their promise again: perhaps they lack ours
    wanted_since: float | None = None  # when a majority was first seen to wait only for this node
    majority_since: float | None = None  # when a majority of promises was first seen
    begin: Begin | None = None
    have: frozenset[Digest] = frozenset()  # parts of this round that are on disk here
    fetching: frozenset[Digest] = frozenset()
    fetch_at: float = 0.0  # not again before
    claims: Mapping[NodeId, Part | None] = field(default_factory=dict)
    averaged: bool = False
    proposal: Propose | None = None
    votes: Mapping[NodeId, Vote] = field(default_factory=dict)
    committed: LogEntry | None = None
    backlog: tuple[LogEntry, ...] = ()
    deadline: float = 0.0
    resend_at: float = 0.0
    log_asked_at: float = -1e9
    began_at: float = 0.0
    decide_seconds: float | None = None  # smoothed time from the leader's call to the fold
    attempts_failed: int = 0  # given up here, since the node started; nothing was lost with them
    last_failure: str = ""

    @property
    def newest(self) -> Epoch | None:
        """The newest roster that this node may act under."""
        downwards = sorted(self.rosters, reverse=True)
        return next((epoch for epoch in downwards if self.acts_under(self.rosters[epoch].roster)), None)

    def acts_under(self, roster: Roster) -> bool:
        """It decides on this log's branch, and nothing that was promised under it is forgotten or sealed."""
        return roster.branch == self.branch and roster.epoch > max(self.silent, self.sealed)

    @property
    def signed_roster(self) -> SignedRoster | None:
        """The roster this node goes by: the one its promise names, else the newest."""
        promised = self.rosters.get(self.ballot.epoch)
        if promised is not None and self.acts_under(promised.roster):
            return promised
        newest = self.newest
        return self.rosters[newest] if newest is not None else None

    @property
    def roster(self) -> Roster | None:
        signed = self.signed_roster
        return signed.roster if signed else None

    @property
    def pending(self) -> bool:
        """Whether trained work still waits for a round."""
        brought = self.contribution is not None and self.contribution.tokens > 0
        return brought or self.snapshot_asked or self.could_bring

    @property
    def engaged(self) -> bool:
        """Whether others count on this node to end what it has begun with them, whatever it brings itself."""
        return self.phase in (Phase.AVERAGING, Phase.DECIDING, Phase.FOLDING)

    @property
    def could_bring(self) -> bool:
        """Whether a snapshot made now would bring something."""
        return self.steps > 0 or self.carried is not None


# events


@dataclass(frozen=True)
class RosterArrived:
    signed: SignedRoster


@dataclass(frozen=True)
class Progressed:
    """The trainer made inner steps since the last snapshot."""

    steps: int


@dataclass(frozen=True)
class SnapshotTaken:
    """The data trained on since the last snapshot, that it was granted, and the digest of what is brought."""

    ranges: tuple[DataRange, ...]
    grants: tuple[Grant, ...]
    update: Digest


@dataclass(frozen=True)
class WorkFound:
    """What an earlier process had trained and saved: for this round, or left over by those before it."""

    missed: int
    contribution: Contribution | None = None
    carried: Contribution | None = None


@dataclass(frozen=True)
class Received:
    """A message whose sender and signatures the edge has checked."""

    message: Message
    signature: str = ""


@dataclass(frozen=True)
class Averaged:
    """The averaging of a ballot ended: the part reduced here, and the hashes of all parts held."""

    ballot: Ballot
    part: Part | None
    held: Mapping[int, Digest]


@dataclass(frozen=True)
class PartsArrived:
    digests: frozenset[Digest]


@dataclass(frozen=True)
class PartsLost:
    """Nobody that was asked has these parts."""

    digests: frozenset[Digest]


@dataclass(frozen=True)
class Folded:
    round: RoundNumber
    digest: Digest


@dataclass(frozen=True)
class LogArrived:
    entries: tuple[LogEntry, ...]
    rosters: tuple[SignedRoster, ...] = ()


@dataclass(frozen=True)
class RollbacksArrived:
    """The coordinator's, checked and durable; those that lack a number before them wait for another time."""

    rollbacks: tuple[SignedRollback, ...]


@dataclass(frozen=True)
class Rewound:
    """The shared state is that of the head a rollback leaves, or of a later one on its branch; local work is gone."""

    head: Head
    branch: int
    digest: Digest
    consumed: Consumed
    last: LogEntry | None


@dataclass(frozen=True)
class Silenced:
    """The coordinator says that this node has forgotten what it signed under the rosters up to this one; durable."""

    epoch: Epoch


@dataclass(frozen=True)
class Unsealed:
    """The coordinator has opened a new session: it has forgotten the seal, and whatever roster it issued in reliance
    on it is known here by now; durable."""


@dataclass(frozen=True)
class ActivityChanged:
    """Whether this node can be reached and has the state that rounds start from; and whether it trains, too."""

    active: bool
    trains: bool


@dataclass(frozen=True)
class Finishing:
    """End the round with what has been trained, as soon as the others can."""


@dataclass(frozen=True)
class Ticked:
    pass


Event = (
    RosterArrived
    | Progressed
    | SnapshotTaken
    | WorkFound
    | Received
    | Averaged
    | PartsArrived
    | PartsLost
    | Folded
    | LogArrived
    | RollbacksArrived
    | Rewound
    | Silenced
    | Unsealed
    | ActivityChanged
    | Finishing
    | Ticked
)


# effects


@dataclass(frozen=True)
class TakeSnapshot:
    """Snapshot the local parameters and encode pseudo-gradient plus residual; ends as SnapshotTaken."""

    round: RoundNumber


@dataclass(frozen=True)
class SaveVote:
    """Make the promise and the accepted record durable before anything that follows is sent."""

    round: RoundNumber
    ballot: Ballot
    accepted: Accepted | None
    previous: Digest  # in another branch's round of the same number it binds nobody


@dataclass(frozen=True)
class Send:
    """Sign and send to these nodes; to oneself it is delivered as an event."""

    to: tuple[NodeId, ...]
    message: Message


@dataclass(frozen=True)
class Average:
    """Reduce with this group; ends as Averaged, whatever happens."""

    begin: Begin
    roster: Roster
    seconds: float


@dataclass(frozen=True)
class StopAveraging:
    pass


@dataclass(frozen=True)
class FetchParts:
    """Get these parts by hash from whoever has them; ends as PartsArrived or PartsLost."""

    parts: tuple[Part, ...]
    sources: tuple[NodeId, ...]


@dataclass(frozen=True)
class Fold:
    """Save the entry, apply its parts to the shared state, merge into local progress; ends as Folded.

    Steps made since a pending snapshot are kept."""

    entry: LogEntry


@dataclass(frozen=True)
class Turn:
    """The log goes on from this very head on another branch: nothing that is folded here is undone."""

    rollback: SignedRollback


@dataclass(frozen=True)
class Rewind:
    """Put the undone entries aside, go back to the state that the rollback leaves, begin anew; ends as Rewound."""

    rollback: SignedRollback


@dataclass(frozen=True)
class TellLog:
    """Send this peer our log from a round on, with rosters and rollbacks: it does not know that it has to ask."""

    to: NodeId
    round: RoundNumber


Effect = TakeSnapshot | SaveVote | Send | Average | StopAveraging | FetchParts | Fold | Turn | Rewind | TellLog
Outcome = tuple[Rounds, tuple[Effect, ...]]


def leader(roster: Roster, ballot: Ballot, round_number: RoundNumber) -> NodeId:
    """Rotates by round and attempt, so that a dead leader costs one attempt; among those whom everybody can call."""
    able = [member for member in roster.members if member.is_callable] or roster.members
    return able[(round_number + ballot.attempt) % len(able)].node


def group(begin: Begin, roster: Roster) -> tuple[tuple[NodeId, int], ...]:
    """The members of an averaging in the roster's order, each with its weight in tokens, capped."""
    tokens = {signed.ready.sender: signed.ready.contribution.tokens for signed in begin.readies}
    return tuple((m.node, min(tokens[m.node], m.weight_cap)) for m in roster.members if m.node in tokens)


def holds(record: Record, contribution: Contribution) -> bool:
    """Whether the record took this very contribution, not one that a former life of its node had brought."""
    taken = any(contribution.node in part.included for part in record.parts)
    return taken and contribution in record.contributions


def seal(state: Rounds, *, linked: bool) -> Seal | None:
    """For a node that leaves: its word, to be made durable, to sign nothing more under the rosters it knows.

    None if it has voted in the open round: those who stay may need that vote, and must keep reckoning with it. Nor if it
    is not linked to the coordinator: nobody would rely on its word, and it may be back before the coordinator is."""
    if not linked or state.accepted is not None or state.committed is not None or not state.rosters:
        return None
    return Seal(state.head.round, max(state.ballot.epoch, *state.rosters))


def majority_awaited(state: Rounds, now: float) -> tuple[int, int] | None:
    """How many members of how many are heard of, when a majority has been missing for a while; for people."""
    roster = state.roster
    if state.phase is not Phase.GATHERING or roster is None or state.majority_since is not None:
        return None
    if state.promised_at is None or now - state.promised_at < MISSED_SECONDS:
        return None
    return len(_promises(state, roster, state.ballot)), len(roster.members)


def step(state: Rounds, event: Event, now: float, rules: Rules) -> Outcome:
    """Take one event; return the new state and what must be done, in order."""
    state, effects = _apply(_go_by_newest(state), event, now, rules)
    while True:
        following, more = _advance(state, now, rules)
        effects += more
        if following is state:
            return state, effects
        state = following


def _apply(state: Rounds, event: Event, now: float, rules: Rules) -> Outcome:
    match event:
        case RosterArrived(signed):
            return _learn_rosters(state, (signed,), rules), ()
        case Progressed(steps):
            return (state if steps == state.steps else replace(state, steps=steps)), ()
        case SnapshotTaken():
            return _snapshot_taken(state, event, rules), ()
        case WorkFound(missed, contribution, carried):
            return _work_found(state, missed, contribution, carried), ()
        case Received(message, signature):
            return _received(state, message, signature, now, rules)
        case Averaged(ballot, part, held):
            return _averaged(state, ballot, part, held, now, rules)
        case PartsArrived(digests):
            return replace(state, have=state.have | digests, fetching=state.fetching - digests), ()
        case PartsLost(digests):
            return replace(state, fetching=state.fetching - digests, fetch_at=now + RESEND_SECONDS), ()
        case Folded(round_number, digest):
            return _folded(state, round_number, digest, now, rules), ()
        case LogArrived(entries, rosters):
            return _log_arrived(state, entries, rosters, rules), ()
        case RollbacksArrived(rollbacks):
            return _learn_rollbacks(state, rollbacks, rules), ()
        case Rewound():
            return _rewound(state, event, now), ()
        case Silenced(epoch):
            return _silenced(state, epoch, now)
        case Unsealed():
            return replace(state, sealed=Epoch(-1)), ()
        case ActivityChanged(active, trains):
            return replace(state, active=active, trains=trains, round_started=now), ()
        case Finishing():
            return replace(state, finishing=True), ()
        case Ticked():
            return state, ()


def _advance(state: Rounds, now: float, rules: Rules) -> Outcome:
    """Whatever the state allows next, one move at a time; the same state means that nothing does."""
    if state.phase in (Phase.FOLDING, Phase.REWINDING):
        return state, ()
    if (due := _due(state)) is not None:
        return _turn(state, due, now, rules)
    if state.committed is not None:
        missing = _missing(state, state.committed.record)
        return _fetch(state, state.committed.record, missing, now, rules) if missing else _fold(state)
    if state.backlog:
        return _take_backlog(state, rules)
    roster = state.roster
    if roster is None:
        return state, ()
    match state.phase:
        case Phase.TRAINING:
            return _train(state, now, rules)
        case Phase.GATHERING:
            return _gather(state, roster, now, rules)
        case Phase.AVERAGING:
            return (
                _next_attempt(state, now, rules, "the averaging took too long")
                if now >= state.deadline
                else (state, ())
            )
        case Phase.DECIDING:
            return _decide(state, roster, now, rules)
    raise AssertionError(state.phase)


# training and promising


def _go_by_newest(state: Rounds) -> Rounds:
    """A node without a promise goes by the newest roster that it knows of, and signs for no older one.

    Every majority of an older roster holds a node that knows the newer one: that is why the older one can be closed."""
    if state.phase is not Phase.TRAINING:
        return state
    certified = state.last.certificate.ballot.epoch if state.last is not None else Epoch(-1)
    known = state.newest
    newest = Ballot(certified if known is None else max(certified, known), 0)
    return replace(state, ballot=newest, ballot_is_new=True) if newest > state.ballot else state


def _train(state: Rounds, now: float, rules: Rules) -> Outcome:
    state = _go_by_newest(state)
    ballot = _highest(state)
    if not state.ballot_is_new and ballot == state.ballot:
        ballot = Ballot(ballot.epoch, ballot.attempt + 1)
    signed = state.rosters.get(ballot.epoch)
    if signed is None or not state.acts_under(signed.roster):
        return state, ()
    if not state.active or signed.roster.member(rules.me) is None:
        return state, ()
    if signed.roster.floor > state.head.round:
        return state, ()
    if state.contribution is not None:
        return _promise(state, signed.roster, ballot, now, rules)
    if state.snapshot_asked:
        return state, ()
    promises = _promises(state, signed.roster, ballot)
    others = len(promises.keys() - {rules.me})
    if not state.trains:
        brought = any(promised.ready.contribution.tokens for promised in promises.values())
        return (_with_nothing(state, rules), ()) if brought else (state, ())
    if state.wanted_since is None and others and others + 1 >= signed.roster.quorum:
        state = replace(state, wanted_since=now)
    if not _round_is_over(state, len(signed.roster.members), now, rules):
        return state, ()
    if not state.could_bring:
        return _with_nothing(state, rules), ()
    return replace(state, snapshot_asked=True), (TakeSnapshot(state.head.round),)


def _with_nothing(state: Rounds, rules: Rules) -> Rounds:
    return replace(state, contribution=Contribution(rules.me, 0, ()))


def _round_is_over(state: Rounds, members: int, now: float, rules: Rules) -> bool:
    """Enough steps, or enough time, or a majority that waits only for this node: with a step to bring, or in vain."""
    lasted = now - state.round_started
    paced = lasted >= rules.round_seconds_min(members)
    if paced and state.steps >= rules.inner_steps(state.head.round):
        return True
    if state.could_bring and (state.finishing or (paced and lasted >= rules.round_seconds_max)):
        return True
    if state.wanted_since is None:
        return False
    return state.could_bring or now - state.wanted_since >= rules.gather_seconds


def _snapshot_taken(state: Rounds, event: SnapshotTaken, rules: Rules) -> Rounds:
    if not state.snapshot_asked:
        return state  # asked for before a rollback
    contribution = combine(state.carried, event.ranges, event.grants, state.consumed, rules)
    contribution = rules.brings(state.head, replace(contribution, update=event.update))
    if state.carried is None:
        state = replace(state, missed=0)
    return replace(state, contribution=contribution, carried=None, snapshot_asked=False, steps=0)


def _work_found(state: Rounds, missed: int, contribution: Contribution | None, carried: Contribution | None) -> Rounds:
    return replace(
        state, missed=missed, contribution=contribution or state.contribution, carried=carried or state.carried
    )


def combine(
    carried: Contribution | None,
    ranges: tuple[DataRange, ...],
    grants: tuple[Grant, ...],
    consumed: Consumed,
    rules: Rules,
) -> Contribution:
    """What was left over and what is new, without ranges that count elsewhere or twice; not signed yet."""
    free = unused((carried.ranges if carried else ()) + ranges, consumed)[-RANGES_MAX:]
    known = dict.fromkeys((carried.grants if carried else ()) + grants)
    shown = tuple(grant for grant in known if any(grant.range.overlaps(span) for span in free))[-RANGES_MAX:]
    return Contribution(rules.me, _tokens(free, rules), free, shown)


def _tokens(ranges: tuple[DataRange, ...], rules: Rules) -> int:
    return sum(r.stop - r.start for r in ranges) * rules.context


def unused(ranges: tuple[DataRange, ...], consumed: Consumed) -> tuple[DataRange, ...]:
    """What these ranges hold beyond what is consumed, and beyond those before them."""
    free: list[DataRange] = []
    for data in ranges:
        rests = consumed.rests(data)
        free += rests
        consumed = consumed.with_ranges(rests)
    return tuple(free)


def _promise(state: Rounds, roster: Roster, ballot: Ballot, now: float, rules: Rules) -> Outcome:
    """Promise a ballot to everyone: sign nothing lower from here on."""
    assert state.contribution is not None and ballot >= state.ballot
    ready = _own_ready(state, ballot, rules)
    state = replace(
        state,
        phase=Phase.GATHERING,
        ballot=ballot,
        promised_at=now if state.promised_at is None else state.promised_at,
        ballot_is_new=True,
        begin=None,
        claims={},
        averaged=False,
        proposal=None,
        votes={},
        majority_since=None,
        asking=frozenset(),
        resend_at=now + RESEND_SECONDS,
    )
    return state, (SaveVote(state.head.round, ballot, state.accepted, state.head.hash), Send(roster.nodes, ready))


def _own_ready(state: Rounds, ballot: Ballot, rules: Rules) -> Ready:
    assert state.contribution is not None
    return Ready(rules.run, state.head.round, state.head.hash, ballot, rules.me, state.contribution, state.accepted)


# gathering


def _promises(state: Rounds, roster: Roster, ballot: Ballot) -> dict[NodeId, SignedReady]:
    """The promises of rostered members for exactly this round, head and ballot."""
    return {
        node: signed
        for node, signed in state.readies.items()
        if signed.ready.round == state.head.round
        and signed.ready.previous == state.head.hash
        and signed.ready.ballot == ballot
        and roster.member(node) is not None
    }


def _highest(state: Rounds) -> Ballot:
    """The highest ballot to take part in: that of the newest roster, or a higher one that a peer has promised."""
    known, newest = state.rosters.get(state.heard.epoch), state.newest
    heard = state.heard if known is not None and state.acts_under(known.roster) else state.ballot
    return max(state.ballot, heard, Ballot(newest, 0) if newest is not None else state.ballot)


def _gather(state: Rounds, roster: Roster, now: float, rules: Rules) -> Outcome:
    highest = _highest(state)
    if highest > state.ballot:
        return _move_to(state, highest, now, rules)
    promises = _promises(state, roster, state.ballot)
    if len(promises) >= roster.quorum and state.majority_since is None:
        state = replace(state, majority_since=now)
    if now >= state.resend_at:
        deaf = {node for node in roster.nodes if node not in promises}
        deaf |= (state.asking | {leader(roster, state.ballot, state.head.round)}) - {rules.me}
        again = Send(tuple(n for n in roster.nodes if n in deaf), _own_ready(state, state.ballot, rules))
        return replace(state, resend_at=now + RESEND_SECONDS, asking=frozenset()), (again,) if deaf else ()
    if state.majority_since is None:
        if _has_trained_since(state, len(roster.members), now, rules):
            return _next_attempt(state, now, rules, "there was no majority, and now there is something to bring")
        return state, ()
    waited = now - state.majority_since
    if leader(roster, state.ballot, state.head.round) == rules.me:
        if len(promises) == len(roster.members) or waited >= rules.gather_seconds:
            return _begin(state, roster, promises, now, rules)
        return state, ()
    if waited >= rules.gather_seconds + _attempt_seconds(state, rules):
        return _next_attempt(state, now, rules, "the leader did not begin")
    return state, ()


def _has_trained_since(state: Rounds, members: int, now: float, rules: Rules) -> bool:
    """Whether a promise was made with nothing to bring, and a round's worth has been trained while nobody came.

    Those who only vote wait for somebody who brings something."""
    assert state.contribution is not None
    in_vain = not state.contribution.tokens and state.trains and state.could_bring
    return in_vain and _round_is_over(state, members, now, rules)


def _attempt_seconds(state: Rounds, rules: Rules) -> float:
    """Four times what rounds have needed, longer with each failed attempt, inside the run's bounds."""
    measured = 4 * state.decide_seconds if state.decide_seconds is not None else rules.attempt_seconds_max / 4
    patient = max(measured, rules.attempt_seconds_min) * (1 + min(state.ballot.attempt, 8) / 2)
    return min(patient, rules.attempt_seconds_max)


def _averaging_seconds(state: Rounds, rules: Rules) -> float:
    """An averaging may take half of the time that its round was trained for, so that a slow line is not left out by
    fast ones: training goes on meanwhile."""
    trained = state.promised_at - state.round_started if state.promised_at is not None else 0.0
    return max(_attempt_seconds(state, rules), min(trained / 2, rules.attempt_seconds_max))


def _begin(state: Rounds, roster: Roster, promises: Mapping[NodeId, SignedReady], now: float, rules: Rules) -> Outcome:
    """As leader: carry on with the highest record that anyone has voted for, else average afresh."""
    promises = {node: signed for node, signed in promises.items() if node not in state.doubted}
    if len(promises) < roster.quorum:
        if now - (state.majority_since or now) >= rules.gather_seconds + _attempt_seconds(state, rules):
            return _next_attempt(state, now, rules, "too few whose word is good")
        return state, ()
    accepted = {node: s.ready.accepted for node, s in promises.items() if s.ready.accepted is not None}
    if accepted:
        witness = max(accepted, key=lambda node: accepted[node].ballot)
        highest = accepted[witness]
        if not {highest.record.epoch, highest.ballot.epoch} <= state.rosters.keys():
            if now - (state.majority_since or now) >= rules.gather_seconds + _attempt_seconds(state, rules):
                return _next_attempt(state, now, rules, "nobody sent the roster of a record that has votes")
            return _ask_log(state, witness, now, rules)
        if not _was_proposed(state, highest, rules):
            return replace(state, doubted=state.doubted | {witness}), ()
        proposal = _proposal(state, highest.record, highest, rules)
        state = replace(state, phase=Phase.DECIDING, deadline=now + _attempt_seconds(state, rules), began_at=now)
        return state, (Send(roster.nodes, proposal),)
    chosen = _chosen(state, roster, promises)
    if not chosen:
        if now - (state.majority_since or now) >= _attempt_seconds(state, rules) + rules.gather_seconds:
            return _next_attempt(state, now, rules, "nobody had trained")
        return state, ()
    group_of = _with_helpers(chosen, roster, promises, rules)
    begin = Begin(rules.run, state.head.round, state.ballot, rules.me, group_of)
    deadline = now + _averaging_seconds(state, rules)
    state = replace(state, began_at=now, deadline=deadline, phase=Phase.DECIDING, begin=begin)
    return state, (Send(roster.nodes, begin),)


def _chosen(state: Rounds, roster: Roster, promises: Mapping[NodeId, SignedReady]) -> tuple[SignedReady, ...]:
    """Of these promises, in the roster's order, those whose contributions can be in one record."""
    chosen: list[SignedReady] = []
    taken = state.consumed
    for member in roster.members:
        signed = promises.get(member.node)
        if signed is None or not 0 < signed.ready.contribution.tokens <= member.weight_cap:
            continue  # it only votes; or nobody would sign a record with it
        ranges = signed.ready.contribution.ranges
        if unused(ranges, taken) != ranges:
            continue  # trained on data that counts elsewhere; it learns so from the log
        taken = taken.with_ranges(ranges)
        chosen.append(signed)
    return tuple(chosen)


def _with_helpers(
    chosen: tuple[SignedReady, ...], roster: Roster, promises: Mapping[NodeId, SignedReady], rules: Rules
) -> tuple[SignedReady, ...]:
    """And those who bring nothing and reduce, in the roster's order: helpers; or, where nobody else could reduce, paused
    members that can be called. A group that averages by itself needs neither."""
    group_of = {signed.ready.sender: signed for signed in chosen}
    roles = [member.role for member in roster.members if member.node in group_of]
    if rules.exchange(roles) is Exchange.ALL_GATHER:
        return chosen
    idle = {node: signed for node, signed in promises.items() if not signed.ready.contribution.tokens}
    able = [member for member in roster.members if member.is_callable and member.node in idle]
    helpers = [member for member in able if member.role is Role.HELPER]
    alone = all(role is Role.CLIENT for role in roles)
    group_of |= {member.node: idle[member.node] for member in helpers or (able if alone else ())}
    return tuple(group_of[node] for node in roster.nodes if node in group_of)


def _proposal(state: Rounds, record: Record, accepted: Accepted | None, rules: Rules) -> Propose:
    body = VoteBody(rules.run, state.head.round, state.ballot, record_hash(record))
    return Propose(rules.run, state.head.round, state.ballot, rules.me, record, rules.sign_proposal(body), accepted)


def _was_proposed(state: Rounds, accepted: Accepted, rules: Rules) -> bool:
    """Whether the leader of that ballot did propose this record, and an honest member could have voted for it."""
    signed = state.rosters.get(accepted.ballot.epoch)
    if signed is None:
        return False
    proposer = leader(signed.roster, accepted.ballot, state.head.round)
    body = VoteBody(rules.run, state.head.round, accepted.ballot, record_hash(accepted.record))
    genuine = rules.proposal_is_valid(proposer, body, accepted.signature)
    return genuine and _record_is_sound(state, accepted.record, rules)


def _next_attempt(
    state: Rounds, now: float, rules: Rules, why: str, *, doubted: frozenset[NodeId] = frozenset()
) -> Outcome:
    """Give up this attempt; nothing is lost, because the contribution and the residual are still there."""
    following = Ballot(state.ballot.epoch, state.ballot.attempt + 1)
    state = replace(state, attempts_failed=state.attempts_failed + 1, last_failure=why, doubted=doubted)
    return _move_to(state, max(_highest(state), following), now, rules)


def _move_to(state: Rounds, ballot: Ballot, now: float, rules: Rules) -> Outcome:
    roster = state.rosters[ballot.epoch].roster
    stop: tuple[Effect, ...] = (StopAveraging(),) if state.phase is Phase.AVERAGING else ()
    empty = state.contribution is None or not state.contribution.tokens
    if roster.member(rules.me) is None or roster.floor > state.head.round or not state.active or empty:
        state = replace(
            state, phase=Phase.TRAINING, ballot=ballot, ballot_is_new=True, proposal=None, begin=None, averaged=False
        )
        if empty:
            state = replace(state, contribution=None)
        return state, (*stop, SaveVote(state.head.round, ballot, state.accepted, state.head.hash))
    state, effects = _promise(state, roster, ballot, now, rules)
    return state, stop + effects


# messages


def _received(state: Rounds, message: Message, signature: str, now: float, rules: Rules) -> Outcome:
    if message.run != rules.run or (isinstance(message, Ready) and not _contribution_is_sound(message, rules)):
        return state, ()
    if state.phase is Phase.REWINDING:
        return state, ()  # whoever needs us says it again
    if isinstance(message, Ready) and _is_left_behind(state, message.ballot.epoch):
        return _tell_log(state, message, now)
    if message.round > state.head.round and not isinstance(message, LogRequest):
        if isinstance(message, Ready):
            state = replace(state, readies={**state.readies, message.sender: SignedReady(message, signature)})
        return _ask_log(state, message.sender, now, rules)
    match message:
        case Ready():
            return _ready(state, message, signature, now, rules)
        case Begin():
            return _begun(state, message, now, rules)
        case Claim():
            return _claimed(state, message), ()
        case Propose():
            return _proposed(state, message, now, rules)
        case Vote():
            return _voted(state, message, rules), ()
        case Commit():
            return _commit(state, LogEntry(message.record, message.certificate), message.sender, now, rules)
    return state, ()


def _ask_log(state: Rounds, peer: NodeId, now: float, rules: Rules) -> Outcome:
    if now - state.log_asked_at < LOG_ASK_SECONDS or state.committed is not None or state.backlog:
        return state, ()
    return replace(state, log_asked_at=now), (Send((peer,), LogRequest(rules.run, state.head.round, rules.me)),)


def _is_left_behind(state: Rounds, epoch: Epoch) -> bool:
    """Whether whoever goes by this roster is on a branch that is no more; the coordinator may be away."""
    known = state.rosters.get(epoch)
    return known is not None and known.roster.branch < state.branch


def _tell_log(state: Rounds, ready: Ready, now: float) -> Outcome:
    if now - state.log_asked_at < LOG_ASK_SECONDS:
        return state, ()
    return replace(state, log_asked_at=now), (TellLog(ready.sender, min(ready.round, state.head.round)),)


def _contribution_is_sound(ready: Ready, rules: Rules) -> bool:
    contribution = ready.contribution
    try:
        check_shape(contribution)
    except Refused:
        return False
    head = Head(ready.round, ready.previous)
    return contribution.node == ready.sender and _counts(contribution, head, rules)


def _counts(contribution: Contribution, head: Head, rules: Rules) -> bool:
    """Whether its weight is that of its data, its data the run's, and both are proved; no weight needs no proof."""
    sound = contribution.tokens == _tokens(contribution.ranges, rules) and all(map(rules.is_data, contribution.ranges))
    return sound and (not contribution.tokens or rules.is_brought(head, contribution))


def _ready(state: Rounds, ready: Ready, signature: str, now: float, rules: Rules) -> Outcome:
    if ready.ballot.epoch > max(state.rosters, default=ready.ballot.epoch):
        return _ask_log(state, ready.sender, now, rules)  # perhaps of a newer branch, whose rounds are behind ours
    if ready.round < state.head.round:
        if state.last is None or ready.sender == rules.me:
            return state, ()
        commit = Commit(rules.run, state.last.record.round, rules.me, state.last.record, state.last.certificate)
        return state, (Send((ready.sender,), commit),)
    if ready.ballot.epoch not in state.rosters:
        return _ask_log(state, ready.sender, now, rules)
    return _hear(state, SignedReady(ready, signature)), ()


def _hear(state: Rounds, signed: SignedReady) -> Rounds:
    """Take in a promise for this round. Far ahead, it pulls us a jump nearer; the peer repeats itself."""
    ballot, sender = signed.ready.ballot, signed.ready.sender
    known = state.readies.get(sender)
    if known is not None and known.ready.round == signed.ready.round and known.ready.ballot > ballot:
        return state
    if known is not None and known.ready == signed.ready and ballot == state.ballot:
        return replace(state, asking=state.asking | {sender})
    reach = ATTEMPT_JUMP_MAX + (state.ballot.attempt if ballot.epoch == state.ballot.epoch else 0)
    heard = max(state.heard, Ballot(ballot.epoch, min(ballot.attempt, reach)))
    readies = state.readies if ballot.attempt > reach else {**state.readies, sender: signed}
    return replace(state, heard=heard, readies=readies)


def _begun(state: Rounds, begin: Begin, now: float, rules: Rules) -> Outcome:
    if begin.round != state.head.round or begin.ballot != state.ballot or state.committed is not None:
        return state, ()
    roster = state.roster
    if roster is None or begin.sender != leader(roster, begin.ballot, begin.round):
        return state, ()
    if state.phase not in (Phase.GATHERING, Phase.DECIDING) or state.averaged or state.proposal is not None:
        return state, ()
    readies = [signed.ready for signed in begin.readies]
    fit = all(
        ready.round == begin.round
        and ready.ballot == begin.ballot
        and ready.previous == state.head.hash
        and roster.member(ready.sender) is not None
        and _contribution_is_sound(ready, rules)
        for ready in readies
    )
    if not fit or len({ready.sender for ready in readies}) != len(readies):
        return state, ()
    seconds = _averaging_seconds(state, rules)
    state = replace(state, begin=begin, began_at=now, deadline=now + seconds)
    if rules.me not in {ready.sender for ready in readies}:
        return replace(state, phase=Phase.DECIDING, averaged=True), ()
    return replace(state, phase=Phase.AVERAGING), (Average(begin, roster, seconds * 0.6),)


def _averaged(
    state: Rounds, ballot: Ballot, part: Part | None, held: Mapping[int, Digest], now: float, rules: Rules
) -> Outcome:
    if state.phase is not Phase.AVERAGING or ballot != state.ballot or state.begin is None:
        return state, ()
    roster = state.roster
    assert roster is not None
    claim = Claim(rules.run, state.head.round, ballot, rules.me, part)
    state = replace(state, phase=Phase.DECIDING, have=state.have | frozenset(held.values()), averaged=True)
    return state, (Send((leader(roster, ballot, state.head.round),), claim),)


def _claimed(state: Rounds, claim: Claim) -> Rounds:
    if claim.round != state.head.round or claim.ballot != state.ballot or state.begin is None:
        return state
    if claim.part is not None and claim.part.reducer != claim.sender:
        return state
    return replace(state, claims={**state.claims, claim.sender: claim.part})


# deciding


def _decide(state: Rounds, roster: Roster, now: float, rules: Rules) -> Outcome:
    if now >= state.deadline:
        return _next_attempt(state, now, rules, "no majority signed in time", doubted=_doubted(state))
    if leader(roster, state.ballot, state.head.round) == rules.me:
        if state.proposal is None and state.begin is not None:
            return _propose(state, roster, now, rules)
        if state.proposal is not None and len(state.votes) >= roster.quorum:
            return _certify(state, roster, rules)
    if state.proposal is None:
        return state, ()
    missing = _missing(state, state.proposal.record)
    if missing:
        return _fetch(state, state.proposal.record, missing, now, rules)
    accepted = Accepted(state.ballot, state.proposal.record, state.proposal.signature)
    if state.accepted == accepted:
        return state, ()
    return _vote(replace(state, accepted=accepted), state.proposal, rules)


def _doubted(state: Rounds) -> frozenset[NodeId]:
    """Whoever has voted for a record has its parts. When nobody has handed them out, those who say that they voted for
    it are passed over in the next attempt, as if they had not answered: that is always safe, and so one liar costs a
    round two attempts and does not hold it up for ever."""
    if state.proposal is None or not _missing(state, state.proposal.record):
        return frozenset()
    record = state.proposal.record
    said = {node: signed.ready.accepted for node, signed in state.readies.items()}
    return frozenset(node for node, accepted in said.items() if accepted is not None and accepted.record == record)


def _propose(state: Rounds, roster: Roster, now: float, rules: Rules) -> Outcome:
    """As leader: name the parts that were reduced, once every reducer has spoken or has had its time."""
    assert state.begin is not None
    members = [node for node, _ in group(state.begin, roster)]
    all_spoke = set(members) <= state.claims.keys() and state.averaged
    patience = state.began_at + 0.75 * (state.deadline - state.began_at)
    if not all_spoke and now < patience:
        return state, ()
    roles = [member.role for member in roster.members if member.node in members]
    record = Record(
        run=rules.run,
        round=state.head.round,
        previous=state.head.hash,
        epoch=roster.epoch,
        leader=rules.me,
        contributions=tuple(signed.ready.contribution for signed in state.begin.readies),
        parts=(),
        state=state.digest,
        exchange=rules.exchange(roles),
    )
    parts = _sound_parts(state, record, members, layout(record.exchange, rules.parameters, roles), rules)
    if not parts:
        if not all_spoke:
            return state, ()
        return _next_attempt(state, now, rules, "no part was reduced")
    inside = {node for part in parts for node in part.included}
    contributions = tuple(contribution for contribution in record.contributions if contribution.node in inside)
    record = replace(record, contributions=contributions, parts=parts)
    proposal = _proposal(state, record, None, rules)
    return replace(state, begin=None), (Send(roster.nodes, proposal),)


def _sound_parts(
    state: Rounds, record: Record, members: list[NodeId], spans: Sequence[tuple[int, int]], rules: Rules
) -> tuple[Part, ...]:
    """The claimed parts that can be signed for: each its reducer's own slice, of members of this group."""
    claimed = []
    for index, (node, span) in enumerate(zip(members, spans, strict=True)):
        part = state.claims.get(node)
        if part is None or part.index != index or (part.start, part.stop) != span:
            continue
        if _record_is_sound(state, _only(record, part), rules):
            claimed.append(part)
    return tuple(claimed)


def _only(record: Record, part: Part) -> Record:
    """The record of this part alone."""
    brought = tuple(each for each in record.contributions if each.node in part.included)
    return replace(record, contributions=brought, parts=(part,))


def _proposed(state: Rounds, proposal: Propose, now: float, rules: Rules) -> Outcome:
    if proposal.round != state.head.round or state.committed is not None or proposal.ballot < state.ballot:
        return state, ()
    if not state.active:
        return state, ()  # perhaps with an old disk: nobody has said yet what was promised here and is forgotten
    signed = state.rosters.get(proposal.ballot.epoch)
    if signed is None:
        return _ask_log(state, proposal.sender, now, rules)
    roster = signed.roster
    if not state.acts_under(roster):
        return state, ()
    if proposal.sender != leader(roster, proposal.ballot, proposal.round) or roster.member(rules.me) is None:
        return state, ()
    if roster.floor > state.head.round:
        return state, ()
    if state.proposal is not None and state.proposal.ballot == proposal.ballot:
        return state, ()
    record = proposal.record
    named = {record.epoch} | ({proposal.accepted.ballot.epoch} if proposal.accepted is not None else set())
    if not named <= state.rosters.keys():
        return _ask_log(state, proposal.sender, now, rules)
    accepted = state.accepted
    if accepted is not None and accepted.ballot == proposal.ballot and accepted.record != record:
        return state, ()
    if not _is_rightly_proposed(state, proposal, roster, rules):
        return state, ()
    stop: tuple[Effect, ...] = (StopAveraging(),) if state.phase is Phase.AVERAGING else ()
    state = replace(
        state,
        phase=Phase.DECIDING,
        ballot=proposal.ballot,
        ballot_is_new=state.ballot_is_new or proposal.ballot > state.ballot,
        proposal=proposal,
        votes={} if proposal.ballot > state.ballot else state.votes,
        deadline=max(state.deadline, now + _attempt_seconds(state, rules)),
        began_at=state.began_at or now,
    )
    return state, stop


def _is_rightly_proposed(state: Rounds, proposal: Propose, roster: Roster, rules: Rules) -> bool:
    """Whether it is a sound record: one that has a vote already, or the leader's own, and then of all who brought
    something, half at least, as far as is known here. Else a leader could leave out whom it likes."""
    record, before = proposal.record, proposal.accepted
    body = VoteBody(rules.run, proposal.round, proposal.ballot, record_hash(record))
    if not rules.proposal_is_valid(proposal.sender, body, proposal.signature):
        return False
    if before is not None:
        earlier = before.record == record and before.ballot < proposal.ballot
        return earlier and _was_proposed(state, before, rules)
    if record.leader != proposal.sender or record.epoch != proposal.ballot.epoch:
        return False
    if not _record_is_sound(state, record, rules):
        return False
    brought = _chosen(state, roster, _promises(state, roster, proposal.ballot))
    enough = 2 * len(record.contributions) >= len(brought)
    return enough or proposal.ballot.attempt >= INCLUSIVE_ATTEMPTS


def _record_is_sound(state: Rounds, record: Record, rules: Rules) -> bool:
    """Whether this node could sign the record: it follows its head, from its state, with data not yet used."""
    if record.run != rules.run or record.round != state.head.round or record.previous != state.head.hash:
        return False
    signed = state.rosters.get(record.epoch)
    if record.state != state.digest or signed is None or signed.roster.branch != state.branch:
        return False
    try:
        check_record_shape(record, rules.parameters)
        check_members(record, signed.roster)
        check_ranges(record, state.consumed)
    except Refused:
        return False
    if not all(each.tokens and _counts(each, state.head, rules) for each in record.contributions):
        return False
    return all(rules.part_is_vouched(record, part) for part in record.parts)


def _vote(state: Rounds, proposal: Propose, rules: Rules) -> Outcome:
    hashed = record_hash(proposal.record)
    body = VoteBody(rules.run, proposal.round, proposal.ballot, hashed)
    vote = Vote(rules.run, proposal.round, proposal.ballot, rules.me, hashed, rules.sign(body))
    saved = SaveVote(state.head.round, state.ballot, state.accepted, state.head.hash)
    return state, (saved, Send((proposal.sender,), vote))


def _voted(state: Rounds, vote: Vote, rules: Rules) -> Rounds:
    roster = state.roster
    if roster is None or vote.round != state.head.round or vote.ballot != state.ballot:
        return state
    if roster.member(vote.sender) is None or state.proposal is None:
        return state
    if vote.record != record_hash(state.proposal.record):
        return state
    if not rules.vote_is_valid(vote.sender, VoteBody(vote.run, vote.round, vote.ballot, vote.record), vote.signature):
        return state
    return replace(state, votes={**state.votes, vote.sender: vote})


def _certify(state: Rounds, roster: Roster, rules: Rules) -> Outcome:
    assert state.proposal is not None
    votes = [state.votes[node] for node in roster.nodes if node in state.votes]
    record = state.proposal.record
    certificate = Certificate(
        record_hash(record), state.ballot, tuple(Signature(vote.sender, vote.signature) for vote in votes)
    )
    entry = LogEntry(record, certificate)
    others = tuple(node for node in roster.nodes if node != rules.me)
    commit = Commit(rules.run, record.round, rules.me, record, certificate)
    return replace(state, committed=entry), (Send(others, commit),)


def _commit(state: Rounds, entry: LogEntry, sender: NodeId, now: float, rules: Rules) -> Outcome:
    if entry.record.round != state.head.round or state.committed is not None:
        return state, ()
    signed = state.rosters.get(entry.certificate.ballot.epoch)
    if signed is None:
        return _ask_log(state, sender, now, rules)
    if not _entry_fits(state, entry, signed.roster, rules):
        return state, ()
    stop: tuple[Effect, ...] = (StopAveraging(),) if state.phase is Phase.AVERAGING else ()
    return replace(state, committed=entry), stop


def _entry_fits(state: Rounds, entry: LogEntry, roster: Roster, rules: Rules) -> bool:
    follows = entry.record.previous == state.head.hash and roster.branch == state.branch
    return follows and rules.entry_is_certified(entry, roster)


def _missing(state: Rounds, record: Record) -> tuple[Part, ...]:
    return tuple(part for part in record.parts if part.digest not in state.have)


def _fetch(state: Rounds, record: Record, missing: tuple[Part, ...], now: float, rules: Rules) -> Outcome:
    """Ask for what is not already on its way: the reducers first, then everyone who took part."""
    wanted = tuple(part for part in missing if part.digest not in state.fetching)
    if not wanted or now < state.fetch_at:
        return state, ()
    roster = state.roster
    sources = [part.reducer for part in wanted] + [c.node for c in record.contributions] + [record.leader]
    sources += roster.nodes if roster else ()
    nodes = tuple(dict.fromkeys(node for node in sources if node != rules.me))
    return replace(state, fetching=state.fetching | {p.digest for p in wanted}), (FetchParts(wanted, nodes),)


# the log


def _fold(state: Rounds) -> Outcome:
    assert state.committed is not None
    return replace(state, phase=Phase.FOLDING), (Fold(state.committed),)


def missed_after(state: Rounds, record: Record) -> int:
    """How many rounds in a row, with this one, have taken nothing of ours; fresh work begins to count anew."""
    return 0 if state.contribution is not None and holds(record, state.contribution) else state.missed + 1


def _folded(state: Rounds, round_number: RoundNumber, digest: Digest, now: float, rules: Rules) -> Rounds:
    entry = state.committed
    assert entry is not None and entry.record.round == round_number
    consumed = state.consumed.with_ranges(ranges_of(entry.record))
    missed = missed_after(state, entry.record)
    left = state.contribution
    if left is not None and holds(entry.record, left):
        left = None
    carried = left if left is not None and (left.tokens or left.ranges) else state.carried
    if missed > rules.stale_rounds:
        carried = None
    decide = state.decide_seconds
    if state.began_at:
        took = now - state.began_at
        decide = took if decide is None else 0.7 * decide + 0.3 * took
    head = next_head(entry.record)
    fresh = replace(
        _anew(state, head, now),
        digest=digest,
        consumed=consumed,
        last=entry,
        carried=carried,
        missed=missed,
        snapshot_asked=state.snapshot_asked,
        steps=state.steps,
        backlog=tuple(e for e in state.backlog if e.record.round > round_number),
        decide_seconds=decide,
        fetching=state.fetching,
    )
    fresh = _go_by_newest(fresh)
    for signed in state.readies.values():
        if signed.ready.round == head.round:
            fresh = _hear(fresh, signed)
        elif signed.ready.round > head.round:
            fresh = replace(fresh, readies={**fresh.readies, signed.ready.sender: signed})
    return fresh


def _anew(state: Rounds, head: Head, now: float) -> Rounds:
    """What outlives a round: everything but the round itself, and what was brought to it."""
    return Rounds(
        head=head,
        digest=state.digest,
        consumed=state.consumed,
        rosters=state.rosters,
        branch=state.branch,
        rollbacks=state.rollbacks,
        silent=state.silent,
        sealed=state.sealed,
        last=state.last,
        active=state.active,
        trains=state.trains,
        finishing=state.finishing,
        round_started=now,
        decide_seconds=state.decide_seconds,
        attempts_failed=state.attempts_failed,
        last_failure=state.last_failure,
    )


# rollbacks


def _learn_rollbacks(state: Rounds, arrived: tuple[SignedRollback, ...], rules: Rules) -> Rounds:
    """Take in what is new, in order and without a gap: a later one makes sense only after those before it."""
    known = list(state.rollbacks)
    for signed in sorted(arrived, key=lambda each: each.rollback.number):
        if signed.rollback.run == rules.run and signed.rollback.number == len(known) + 1:
            known.append(signed)
    return replace(state, rollbacks=tuple(known)) if len(known) > len(state.rollbacks) else state


def _due(state: Rounds) -> SignedRollback | None:
    """The rollback to follow now, if there is one."""
    if not state.rollbacks or state.rollbacks[-1].rollback.number <= state.branch:
        return None
    due = next_turn(state.head.round, state.branch, (signed.rollback for signed in state.rollbacks))
    return None if due is None else state.rollbacks[due.number - 1]


def _turn(state: Rounds, signed: SignedRollback, now: float, rules: Rules) -> Outcome:
    """Go back; or, exactly at the head that stays, only go on from it: what was trained there is as good as before."""
    rollback = signed.rollback
    stop: tuple[Effect, ...] = (StopAveraging(),) if state.phase is Phase.AVERAGING else ()
    other = state.last is not None and record_hash(state.last.record) != rollback.to.hash
    if state.head.round > rollback.to.round or other:
        return replace(state, phase=Phase.REWINDING), (*stop, Rewind(signed))
    head, brought = head_after(rollback), state.contribution
    fresh = replace(
        _anew(state, head, now),
        branch=rollback.number,
        contribution=rules.brings(head, brought) if brought is not None and brought.tokens else brought,
        carried=state.carried,
        missed=state.missed,
        snapshot_asked=state.snapshot_asked,
        steps=state.steps,
        backlog=state.backlog,
    )
    return _go_by_newest(fresh), (*stop, Turn(signed))


def _silenced(state: Rounds, epoch: Epoch, now: float) -> Outcome:
    """Leave the open round, if it is one of those, and wait for a newer roster. What was trained is kept."""
    if epoch <= state.silent:
        return state, ()
    state = replace(state, silent=epoch)
    open_round = state.phase in (Phase.GATHERING, Phase.AVERAGING, Phase.DECIDING)
    if not open_round or state.committed is not None:
        return state, ()
    stop: tuple[Effect, ...] = (StopAveraging(),) if state.phase is Phase.AVERAGING else ()
    fresh = replace(
        _anew(state, state.head, now),
        contribution=state.contribution,
        carried=state.carried,
        missed=state.missed,
        snapshot_asked=state.snapshot_asked,
        steps=state.steps,
        ballot=state.ballot,
        backlog=state.backlog,
    )
    return fresh, stop


def _rewound(state: Rounds, event: Rewound, now: float) -> Rounds:
    fresh = replace(
        _anew(state, event.head, now),
        branch=event.branch,
        digest=event.digest,
        consumed=event.consumed,
        last=event.last,
        backlog=state.backlog,
    )
    return _go_by_newest(fresh)


def _learn_rosters(state: Rounds, arrived: tuple[SignedRoster, ...], rules: Rules) -> Rounds:
    """Keep the newest, and those that are named by what is in hand."""
    known = {**state.rosters, **{s.roster.epoch: s for s in arrived if s.roster.run == rules.run}}
    keep = {*sorted(known)[-ROSTERS_KEPT:], *(_named(state) & known.keys())}
    return replace(state, rosters={epoch: known[epoch] for epoch in sorted(keep)})


def _named(state: Rounds) -> set[Epoch]:
    """By our promise, by records in hand (who catches up may be many rosters behind), and by those that have votes in the
    open round: without its rosters such a record cannot be proposed again. The latter are two for each who was heard."""
    entries = state.backlog if state.committed is None else (state.committed, *state.backlog)
    heard = (signed.ready.accepted for signed in state.readies.values())
    voted = [accepted for accepted in (state.accepted, *heard) if accepted is not None]
    named = [(entry.record, entry.certificate.ballot) for entry in entries]
    named += [(accepted.record, accepted.ballot) for accepted in voted]
    return {state.ballot.epoch, *(epoch for record, ballot in named for epoch in (record.epoch, ballot.epoch))}


def _log_arrived(
    state: Rounds, entries: tuple[LogEntry, ...], rosters: tuple[SignedRoster, ...], rules: Rules
) -> Rounds:
    waiting = {e.record.round: e for e in (*state.backlog, *entries) if e.record.round >= state.head.round}
    state = replace(state, backlog=tuple(waiting[number] for number in sorted(waiting)))
    return _learn_rosters(state, rosters, rules)


def _take_backlog(state: Rounds, rules: Rules) -> Outcome:
    """Commit the next record that was read from somebody's log, if it follows our head."""
    entry, rest = state.backlog[0], state.backlog[1:]
    state = replace(state, backlog=rest)
    signed = state.rosters.get(entry.certificate.ballot.epoch)
    if entry.record.round != state.head.round or signed is None or not _entry_fits(state, entry, signed.roster, rules):
        return replace(state, backlog=()), ()
    stop: tuple[Effect, ...] = (StopAveraging(),) if state.phase is Phase.AVERAGING else ()
    return replace(state, committed=entry), stop
