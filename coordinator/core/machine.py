"""What the coordinator decides: who is rostered, who trains on what, and how far the log goes.

It follows the log and never leads it: rounds are decided by the members alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace

from coordinator.core import leases as data
from coordinator.core import reachability, strikes
from coordinator.core.leases import Leases
from coordinator.core.reachability import Reach
from coordinator.core.rosters import next_members, quorum, seated
from coordinator.core.strikes import By, Kind, Mark
from protocol.errors import Refused
from protocol.limits import MEMBERS_MAX, ROLLBACKS_MAX
from protocol.log import check_ranges, check_record_shape, head_after, next_head, next_turn, ranges_of, record_hash
from protocol.proof import double_voters
from protocol.state import Consumed
from protocol.types import (
    Digest,
    Epoch,
    Fault,
    Head,
    Lease,
    LogEntry,
    Member,
    NodeId,
    Part,
    PeerId,
    Record,
    Role,
    Rollback,
    Roster,
    RoundNumber,
    RunId,
    Seal,
    SignedRollback,
    SignedRoster,
)

HELPS = "averaging for others"  # the activity of a node that never trains
TAKES_PART = frozenset({"training", "waiting", "finishing", HELPS})  # activities of a node that can be rostered
RESTS = frozenset({"paused"})  # of one that still votes, and reduces where nobody else can
BEHIND_MAX = 1  # records that a node may lack when it is first rostered: it holds nobody up
AHEAD_MAX = 64  # records kept that came before those between; their senders bring them again
RESTART_PATIENCE = 1.5  # times what it takes to be thought gone
LEASES_AT_ONCE = 16  # about so many answer one request: hours of data are still a short list in a heartbeat
RECENT_KEPT = 64  # records at hand to compare what others follow with
FORK_UNDONE_MAX = 8  # rounds that the coordinator takes back by itself; liars may keep a second record to themselves
EVENTS_KEPT = 200  # lines of history on the page


@dataclass(frozen=True)
class Rules:
    run: RunId
    parameters: int
    min_nodes: int
    rounds_goal: int  # 0: endless
    absent_seconds: float  # a node unheard of for so long is dropped from the roster
    lease_seconds: float
    lease_sequences_max: int
    lease_sequences_node_max: int  # most data that one node may hold
    weight_cap: int
    evaluate_every: int
    base_every: int
    entry_is_certified: Callable[[LogEntry, Roster], bool]
    check_brought: Callable[[Record], None]  # refuses what a member did not bring, or was not granted
    manifest: Digest  # the run's: every roster names it


@dataclass(frozen=True)
class Node:
    """What is known of an admitted node."""

    node: NodeId
    peer: PeerId
    name: str
    invite: str = ""  # that it came with
    addresses: tuple[str, ...] = ()
    reach: Reach = field(default_factory=Reach)
    activity: str = "joining"
    head_round: int = -1
    epoch: int = -1
    seen: float = 0.0
    tokens_per_second: float = 0.0
    train_loss: float | None = None
    busy_share: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    credit_tokens: int = 0

    @property
    def standing(self) -> tuple[object, ...]:
        """All that counts of what a heartbeat tells; the rest is shown to people."""
        return self.activity, self.head_round, self.epoch, self.addresses, self.reach

    def present(self, now: float, rules: Rules) -> bool:
        return now - self.seen < rules.absent_seconds


@dataclass(frozen=True)
class State:
    head: Head  # newest certified record known
    replica: Head  # newest record folded here
    replica_digest: Digest
    consumed: Consumed
    leases: Leases
    nodes: Mapping[NodeId, Node] = field(default_factory=dict)
    branch: int = 0  # the number of the newest rollback that the log has followed
    rollbacks: tuple[SignedRollback, ...] = ()  # all that are known; one that a node brought back may lie ahead
    rewinding: bool = False  # the replica is on its way back
    rosters: tuple[SignedRoster, ...] = ()  # open ones: a record may still be decided under them
    history: Mapping[Epoch, SignedRoster] = field(default_factory=dict)  # all ever issued
    next_epoch: Epoch = Epoch(0)
    issuing: Epoch | None = None
    recent: tuple[LogEntry, ...] = ()  # the newest records of the line
    unfolded: tuple[LogEntry, ...] = ()  # certified, not yet folded here
    waiting: Mapping[RoundNumber, LogEntry] = field(default_factory=dict)  # certified, but records before them lack
    have: frozenset[Digest] = frozenset()  # archived parts of unfolded records
    folding: bool = False
    held: bool = False  # the next record cannot be folded, whoever certified it: only a rollback leads on
    seals: Mapping[NodeId, Seal] = field(default_factory=dict)  # of those who left; forgotten by a restart, at a cost
    silent: Mapping[NodeId, Epoch] = field(default_factory=dict)  # forgot what they signed under rosters up to this
    held_since: float | None = None  # since when forgotten promises keep the roster from changing
    twins: frozenset[frozenset[NodeId]] = frozenset()  # have brought the very same update; told of already
    trails: Mapping[NodeId, tuple[Mark, ...]] = field(default_factory=dict)  # what was ever held against a node
    started: float = -1e9  # when this process began
    tokens: int = 0
    events: tuple[tuple[float, str], ...] = ()

    @property
    def roster(self) -> SignedRoster | None:
        return self.rosters[-1] if self.rosters else None

    @property
    def wanted(self) -> tuple[Part, ...]:
        """Parts that the archive lacks."""
        return tuple(p for entry in self.unfolded for p in entry.record.parts if p.digest not in self.have)

    def recent_entry(self, round_number: int) -> LogEntry | None:
        return next((entry for entry in self.recent if entry.record.round == round_number), None)

    def head_before(self, round_number: RoundNumber) -> Digest | None:
        """What a contribution to this round is signed for: to the open one, or to one of the newest of the line."""
        if round_number == self.head.round:
            return self.head.hash
        entry = self.recent_entry(round_number)
        return None if entry is None else entry.record.previous

    def astray(self, head: Head) -> bool:
        """Whether a log with this head is another than ours, as far as is known here."""
        ours = self.recent_entry(head.round - 1)
        turns = (signed.rollback for signed in self.rollbacks)
        lines = {head_after(turn).hash for turn in turns if turn.to.round == head.round}
        return ours is not None and head.hash not in {record_hash(ours.record), *lines}

    def shut(self, node: NodeId, now: float) -> Mark | None:
        """The ban or the kick that keeps this node out."""
        trail = self.trails.get(node)  # hardly anybody has one, and everybody is asked about at each change
        return strikes.shut(trail, int(now * 1000)) if trail else None

    def aside(self, node: NodeId) -> bool:
        """Whether it is left out of rosters for a while, for what was proved against it."""
        trail = self.trails.get(node)
        return self.head.round < strikes.aside_until(trail) if trail else False


# events


@dataclass(frozen=True)
class NodeOpened:
    node: NodeId
    peer: PeerId
    name: str
    addresses: tuple[str, ...]
    forgot: bool = False  # its disk came back from a backup: it does not know what it has signed
    source: str = ""  # the IP address that it comes from; "" where nobody looks
    invite: str = ""


@dataclass(frozen=True)
class HeartbeatArrived:
    node: NodeId
    activity: str
    head_round: int
    epoch: int
    addresses: tuple[str, ...]
    branch: int = 0  # how many rollbacks it knows
    tokens_per_second: float = 0.0
    train_loss: float | None = None
    busy_share: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    lease_ids: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Called:
    """The end of a Call: the address that answered, "" if none did; None if nothing could be tried."""

    node: NodeId
    tried: tuple[str, ...]
    answered: str | None


@dataclass(frozen=True)
class NodeLeft:
    node: NodeId
    why: str
    seal: Seal | None = None


@dataclass(frozen=True)
class Struck:
    """A fault was proved: whoever says so has checked the evidence, and `evidence` is its digest."""

    node: NodeId
    fault: Fault
    round: RoundNumber
    reason: str  # what exactly, in a few words
    evidence: Digest
    void: tuple[Digest, ...] = ()  # its contributions that this is about


@dataclass(frozen=True)
class Judged:
    """The researcher's order: a ban, a kick or an unban."""

    node: NodeId
    kind: Kind
    reason: str
    until: float | None = None  # of a kick


@dataclass(frozen=True)
class LeasesAsked:
    node: NodeId
    sequences: int


@dataclass(frozen=True)
class EntryArrived:
    entry: LogEntry


@dataclass(frozen=True)
class PartStored:
    digest: Digest


@dataclass(frozen=True)
class Folded:
    round: RoundNumber
    digest: Digest


@dataclass(frozen=True)
class RosterSigned:
    signed: SignedRoster


@dataclass(frozen=True)
class RollbackAsked:
    """By the researcher or by the watch: `to` is a head of the log, named by its record."""

    to: Head
    reason: str


@dataclass(frozen=True)
class Recalled:
    """Signed by this coordinator, and perhaps forgotten with a lost database: nodes bring it back."""

    rosters: tuple[SignedRoster, ...]
    rollbacks: tuple[SignedRollback, ...]


@dataclass(frozen=True)
class RolledBack:
    """The rollback is durable, and so are the leases without what it has undone."""

    signed: SignedRollback
    head: Head
    consumed: Consumed
    tokens: int
    leases: Leases


@dataclass(frozen=True)
class Rewound:
    """The replica is at the newest state of the line that the archive reaches; what comes after it is to be folded."""

    replica: Head
    digest: Digest
    unfolded: tuple[LogEntry, ...]
    have: frozenset[Digest]


@dataclass(frozen=True)
class Unfoldable:
    """The end of a Fold that cannot be: a majority has certified what no honest member signs."""

    round: RoundNumber
    why: str


@dataclass(frozen=True)
class Noticed:
    """Something that the researcher should read on the page."""

    text: str


@dataclass(frozen=True)
class Ticked:
    pass


Event = (
    NodeOpened
    | HeartbeatArrived
    | Called
    | NodeLeft
    | Struck
    | Judged
    | LeasesAsked
    | EntryArrived
    | PartStored
    | Folded
    | RosterSigned
    | RollbackAsked
    | Recalled
    | RolledBack
    | Rewound
    | Unfoldable
    | Noticed
    | Ticked
)


# effects


@dataclass(frozen=True)
class SignRoster:
    """Sign, save, and answer with RosterSigned; every node hears of it with its next heartbeat."""

    roster: Roster


@dataclass(frozen=True)
class SaveRosters:
    """Rosters of our own that nodes have brought back."""

    rosters: tuple[SignedRoster, ...]


@dataclass(frozen=True)
class SignRollback:
    """Sign it, and answer with Recalled."""

    rollback: Rollback


@dataclass(frozen=True)
class BranchOff:
    """Go on from the head before this round on a branch of its own: answer with RollbackAsked to that head.

    If that is the newest head, nothing is undone."""

    round: RoundNumber
    reason: str


@dataclass(frozen=True)
class TurnLog:
    """Make durable, in one transaction: the rollback, what it undoes, and the leases. Ends as RolledBack."""

    signed: SignedRollback


@dataclass(frozen=True)
class Rewind:
    """Rebuild the replica along the line; ends as Rewound."""


@dataclass(frozen=True)
class Call:
    """Connect to a node's peer at one of these addresses, as somebody who has never met it; ends as Called."""

    node: NodeId
    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class SaveMarks:
    """Make them durable before anything that follows: a ban outlives every crash."""

    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class GrantLeases:
    node: NodeId
    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class SaveLeases:
    """Make the leases durable as they now stand, before anything that follows is sent."""


@dataclass(frozen=True)
class SaveEntry:
    """Append to the log, credit its contributors, and save the leases as it leaves them, in one transaction."""

    entry: LogEntry
    leases: Leases


@dataclass(frozen=True)
class Fold:
    """Fold this record into the coordinator's replica; ends as Folded."""

    entry: LogEntry


@dataclass(frozen=True)
class Evaluate:
    round: RoundNumber


@dataclass(frozen=True)
class ArchiveBase:
    round: RoundNumber


@dataclass(frozen=True)
class Announce:
    """Something changed that waiting heartbeats should hear of."""


Effect = (
    SignRoster
    | SaveRosters
    | SignRollback
    | BranchOff
    | TurnLog
    | Rewind
    | Call
    | SaveMarks
    | GrantLeases
    | SaveLeases
    | SaveEntry
    | Fold
    | Evaluate
    | ArchiveBase
    | Announce
)
Outcome = tuple[State, tuple[Effect, ...]]


def run_is_over(state: State, rules: Rules) -> bool:
    return bool(rules.rounds_goal) and state.head.round >= rules.rounds_goal


def nobody_is_callable(state: State, now: float, rules: Rules) -> bool:
    """Whether there are nodes for a roster, and none of them can be called: then no round can end."""
    here = () if run_is_over(state, rules) or _is_early(state, now, rules) else _desired(state, now, rules)
    return bool(here) and not any(member.is_callable for member in here)


def step(state: State, event: Event, now: float, rules: Rules) -> Outcome:
    """Take one event; return the new state and what must be done, in order.

    A heartbeat by which nobody's standing changes is only noted, however many nodes there are: what the time alone brings
    about is settled by the next Ticked."""
    known = state.nodes.get(event.node) if isinstance(event, HeartbeatArrived) else None
    state, effects = _apply(state, event, now, rules)
    if known is not None and known.present(now, rules) and known.standing == state.nodes[known.node].standing:
        return state, effects
    state, more = _settle(state, now, rules)
    return state, effects + more


def _apply(state: State, event: Event, now: float, rules: Rules) -> Outcome:
    match event:
        case NodeOpened(node, peer, name, addresses, forgot, source, invite):
            known = state.nodes.get(node) or Node(node, peer, name)
            goes_on = known.activity in TAKES_PART and known.present(now, rules)  # only its connection was lost
            activity = known.activity if goes_on else "joining"
            where = addresses or known.addresses  # a node says where it is once its engine runs
            reach = reachability.heard(reachability.returned(known.reach), where, source)
            fresh = replace(known, peer=peer, name=name, invite=invite, addresses=where, reach=reach)
            fresh = replace(fresh, seen=now, activity=activity)
            state = replace(state, seals={other: seal for other, seal in state.seals.items() if other != node})
            if forgot:
                fresh = replace(fresh, activity="joining")
                state = replace(state, silent={**state.silent, node: Epoch(state.next_epoch - 1)})
                state = _say(state, now, f"{name} has come back with an older disk: it starts as a new member would")
            return _say(_with_node(state, fresh), now, f"{name} connected"), (Announce(),)
        case HeartbeatArrived():
            return _heartbeat(state, event, now, rules)
        case Called():
            return _called(state, event, now)
        case NodeLeft(node, why, seal):
            return _left(state, node, why, now, seal)
        case Struck():
            return _struck(state, event, now)
        case Judged():
            return _judged(state, event, now)
        case LeasesAsked(node, sequences):
            return _lease(state, node, sequences, now, rules)
        case EntryArrived(entry):
            return _entry(state, entry, now, rules)
        case PartStored(digest):
            return replace(state, have=state.have | {digest}), ()
        case Folded(round_number, digest):
            return _folded(state, round_number, digest, now, rules)
        case RosterSigned(signed):
            return _roster_signed(state, signed, now)
        case RollbackAsked(to, reason):
            return _rollback_asked(state, to, reason, now, rules)
        case Recalled(rosters, rollbacks):
            return _recalled(state, rosters, rollbacks)
        case RolledBack():
            return _rolled_back(state, event, now)
        case Rewound(replica, digest, unfolded, have):
            if not state.rewinding:
                return state, ()  # of two rollbacks at once, the first to be answered was the answer to both
            return replace(
                state,
                replica=replica,
                replica_digest=digest,
                unfolded=unfolded,
                have=have,
                rewinding=False,
                folding=False,
                held=False,
            ), (Announce(),)
        case Unfoldable(round_number, why):
            return (state, ()) if state.rewinding else (_hold(state, round_number, why, now), (Announce(),))
        case Noticed(text):
            return _say(state, now, text), (Announce(),)
        case Ticked():
            return state, ()


def _with_node(state: State, node: Node) -> State:
    return replace(state, nodes={**state.nodes, node.node: node})


def _say(state: State, now: float, text: str) -> State:
    return replace(state, events=(*state.events[-(EVENTS_KEPT - 1) :], (now, text)))


def _heartbeat(state: State, beat: HeartbeatArrived, now: float, rules: Rules) -> Outcome:
    known = state.nodes.get(beat.node)
    if known is None:
        return state, ()
    if known.activity != beat.activity:
        state = _say(state, now, f"{known.name} is {beat.activity}")
    reach = reachability.heard(known.reach, beat.addresses, beat.source)
    if beat.activity in TAKES_PART and not beat.addresses:
        reach = reachability.silent(reach)
    state = _with_node(
        state,
        replace(
            known,
            activity=beat.activity,
            head_round=beat.head_round,
            epoch=beat.epoch,
            addresses=beat.addresses,
            reach=reach,
            seen=now,
            tokens_per_second=beat.tokens_per_second,
            train_loss=beat.train_loss if beat.train_loss is not None else known.train_loss,
            busy_share=beat.busy_share,
            bytes_sent=beat.bytes_sent,
            bytes_received=beat.bytes_received,
        ),
    )
    until_ms = int((now + rules.lease_seconds) * 1000)
    renewed, _ = data.renew(state.leases, beat.node, beat.lease_ids, until_ms)
    return replace(state, leases=renewed), ()


def _called(state: State, event: Called, now: float) -> Outcome:
    known = state.nodes.get(event.node)
    if known is None:
        return state, ()
    reach = reachability.called(known.reach, event.tried, event.answered, now)
    if reach.open is not known.reach.open:
        can = "can be called" if reach.open else "cannot be called: it calls the others"
        state = _say(state, now, f"{known.name} {can}")
    return _with_node(state, replace(known, reach=reach)), ()


def _call(state: State, now: float, rules: Rules) -> Outcome:
    """Call everyone whose turn it is."""
    here = [node for node in state.nodes.values() if node.present(now, rules)]
    needed = not any(node.reach.open for node in here)
    due = [node for node in here if node.reach.due(now, needed=needed)]
    if not due:
        return state, ()
    calling = {node.node: replace(node, reach=replace(node.reach, calling=True)) for node in due}
    calls = tuple(Call(node.node, node.peer, node.reach.candidates) for node in due)
    return replace(state, nodes={**state.nodes, **calling}), calls


def _left(state: State, node: NodeId, why: str, now: float, seal: Seal | None = None) -> Outcome:
    known = state.nodes.get(node)
    if known is None:
        return state, ()
    if seal is not None:
        state = replace(state, seals={**state.seals, node: seal})
    return _say(_gone(state, known), now, f"{known.name} left ({why})"), (SaveLeases(), Announce())


def _gone(state: State, node: Node) -> State:
    """It takes part no more, and its data is for others."""
    state = _with_node(state, replace(node, activity="left", seen=-1e9))
    lease_ids = tuple(lease.lease_id for lease in state.leases.of(node.node))
    return replace(state, leases=data.give_back(state.leases, lease_ids))


# strikes and bans


def _struck(state: State, event: Struck, now: float) -> Outcome:
    known = state.nodes.get(event.node)
    if known is None:
        return state, ()
    marks = strikes.judge(
        state.trails.get(event.node, ()),
        event.node,
        event.fault,
        round_number=event.round,
        head=state.head.round,
        reason=event.reason,
        evidence=event.evidence,
        now_ms=int(now * 1000),
        void=event.void,
    )
    return _marked(state, known, marks, now)


def _judged(state: State, order: Judged, now: float) -> Outcome:
    known = state.nodes.get(order.node)
    if known is None:
        return state, ()
    until_ms = None if order.until is None else int(order.until * 1000)
    at = (int(now * 1000), state.head.round)
    mark = Mark(order.node, order.kind, order.reason, By.RESEARCHER, *at, until_ms=until_ms)
    return _marked(state, known, (mark,), now)


def _marked(state: State, node: Node, marks: tuple[Mark, ...], now: float) -> Outcome:
    """The marks are on its trail; whoever is shut out by them is gone at once."""
    if not marks:
        return state, ()
    was_shut = state.shut(node.node, now) is not None
    trail = (*state.trails.get(node.node, ()), *marks)
    state = replace(state, trails={**state.trails, node.node: trail})
    for mark in marks:
        state = _say(state, now, strikes.said(mark, node.name))
    effects: tuple[Effect, ...] = (SaveMarks(marks), Announce())
    if was_shut or state.shut(node.node, now) is None:
        return state, effects
    return _gone(state, state.nodes[node.node]), (*effects, SaveLeases())


def _lease(state: State, node: NodeId, sequences: int, now: float, rules: Rules) -> Outcome:
    held = sum(lease.range.stop - lease.range.start for lease in state.leases.of(node))
    wanted = min(sequences, rules.lease_sequences_node_max - held)
    rostered = state.roster is not None and state.roster.roster.member(node) is not None
    useful = node in state.nodes and state.shut(node, now) is None and (rostered or not state.aside(node))
    if not useful or wanted <= 0 or run_is_over(state, rules):
        return state, (GrantLeases(node, ()),)
    leases, granted = data.grant(
        state.leases,
        node,
        sequences=wanted,
        largest=max(rules.lease_sequences_max, wanted // LEASES_AT_ONCE),
        until_ms=int((now + rules.lease_seconds) * 1000),
        consumed=state.consumed,
    )
    return replace(state, leases=leases), (SaveLeases(), GrantLeases(node, granted))


def _entry(state: State, entry: LogEntry, now: float, rules: Rules) -> Outcome:
    """Append a record that follows the head; keep one that is ahead of it until those between arrive."""
    if entry.record.run != rules.run:
        return state, ()
    if entry.record.round < state.head.round:
        return _forked(state, entry, now, rules)
    if entry.record.round > state.head.round + AHEAD_MAX:
        return state, ()
    if entry.record.round > state.head.round:
        return replace(state, waiting={**state.waiting, entry.record.round: entry}), ()
    signed = state.history.get(entry.certificate.ballot.epoch)
    if signed is None or signed.roster.branch != state.branch or entry.record.previous != state.head.hash:
        return state, ()
    if not rules.entry_is_certified(entry, signed.roster):
        return state, ()
    try:
        check_record_shape(entry.record, rules.parameters)
        rules.check_brought(entry.record)
        check_ranges(entry.record, state.consumed)
    except Refused as refusal:
        return _say(state, now, f"refused record {entry.record.round}: {refusal.what}"), ()
    return _append(state, entry, now, rules)


def _forked(state: State, entry: LogEntry, now: float, rules: Rules) -> Outcome:
    """A record of a round that the log has: the same one told again, or the proof that members have signed two.

    Those who follow the other cannot go on, so all go back to where both began, unless that is long ago: then somebody
    has kept it to himself, and the researcher decides."""
    ours, number = state.recent_entry(entry.record.round), entry.record.round
    signed = state.history.get(entry.certificate.ballot.epoch)
    if ours is None or signed is None or ours.record == entry.record or ours.record.previous != entry.record.previous:
        return state, ()
    if state.history[ours.certificate.ballot.epoch].roster.branch != signed.roster.branch:
        return state, ()
    if not rules.entry_is_certified(entry, signed.roster):
        return state, ()
    effects: tuple[Effect, ...] = ()
    for found in double_voters(ours, entry):
        struck = Struck(found.node, found.fault, found.round, found.what, found.evidence)
        state, more = _struck(state, struck, now)
        effects += more
    what = f"members have certified two records of round {number}"
    if state.head.round - number > FORK_UNDONE_MAX or state.branch != len(state.rollbacks):
        advice = f"{what}: whoever follows the other waits for a rollback to round {number}"
        known = any(text == advice for _, text in state.events)  # it is brought again with each heartbeat
        return (state if known else _say(state, now, advice)), effects
    return _say(state, now, what), (*effects, BranchOff(number, what))


def _append(state: State, entry: LogEntry, now: float, rules: Rules) -> Outcome:
    record = entry.record
    ranges = ranges_of(record)
    nodes = dict(state.nodes)
    for contribution in record.contributions:
        if contribution.node in nodes:
            known = nodes[contribution.node]
            nodes[contribution.node] = replace(known, credit_tokens=known.credit_tokens + contribution.tokens)
    tokens = sum(contribution.tokens for contribution in record.contributions)
    state = replace(
        state,
        head=next_head(record),
        consumed=state.consumed.with_ranges(ranges),
        leases=data.consume(state.leases, ranges),
        nodes=nodes,
        rosters=tuple(s for s in state.rosters if s.roster.epoch >= entry.certificate.ballot.epoch),
        recent=(*state.recent, entry)[-RECENT_KEPT:],
        unfolded=(*state.unfolded, entry),
        tokens=state.tokens + tokens,
    )
    names = len(record.contributions)
    state = _say(state, now, f"round {record.round} certified: {names} nodes, {tokens:,} tokens")
    state = _notice_twins(state, record, now)
    if run_is_over(state, rules):
        state = _say(state, now, f"the run has reached its {rules.rounds_goal} rounds")
    effects: tuple[Effect, ...] = (SaveEntry(entry, state.leases), Announce())
    following = state.waiting.get(state.head.round)
    state = replace(state, waiting={n: e for n, e in state.waiting.items() if n > state.head.round})
    if following is None:
        return state, effects
    state, more = _entry(state, following, now, rules)
    return state, effects + more


def _notice_twins(state: State, record: Record, now: float) -> State:
    """Say it once of each two nodes that brought the very same update: one machine may be behind both.

    No strike: nobody can tell which of them has copied the other."""
    bringers: dict[Digest, list[NodeId]] = {}
    for contribution in record.contributions:
        bringers.setdefault(contribution.update, []).append(contribution.node)
    for update, nodes in bringers.items():
        twins = frozenset(nodes)
        if len(twins) < 2 or not update or twins in state.twins:
            continue
        names = ", ".join(state.nodes[n].name if n in state.nodes else n[:8] for n in nodes)
        what = f"the very same update came from {names} in round {record.round}: one machine may be behind them"
        state = _say(replace(state, twins=state.twins | {twins}), now, what)
    return state


def _folded(state: State, round_number: RoundNumber, digest: Digest, now: float, rules: Rules) -> Outcome:
    if state.rewinding:
        return state, ()  # begun before the rollback
    entry, rest = state.unfolded[0], state.unfolded[1:]
    assert entry.record.round == round_number
    after = RoundNumber(round_number + 1)
    still = {part.digest for later in rest for part in later.record.parts}
    state = replace(
        state,
        replica=next_head(entry.record),
        replica_digest=digest,
        unfolded=rest,
        folding=False,
        have=frozenset(d for d in state.have if d in still),
    )
    effects: list[Effect] = []
    over = bool(rules.rounds_goal) and after >= rules.rounds_goal
    if after % rules.evaluate_every == 0 or over:
        effects.append(Evaluate(after))
    if after % rules.base_every == 0 or over:
        effects.append(ArchiveBase(after))
    return state, (*effects, Announce())


def _hold(state: State, round_number: RoundNumber, why: str, now: float) -> State:
    """Nothing more is folded; rounds are certified as before, and archived."""
    what = f"record {round_number} is certified and cannot be folded: {why}. No node can follow it"
    advice = f"go back with: barnraise-coordinator rollback --to {round_number}"
    return _say(replace(state, folding=False, held=True), now, f"{what}; {advice}")


def _roster_signed(state: State, signed: SignedRoster, now: float) -> Outcome:
    roster = signed.roster
    names = ", ".join(state.nodes[n].name if n in state.nodes else n[:8] for n in roster.nodes)
    state = replace(state, history={**state.history, roster.epoch: signed})
    if roster.epoch != state.issuing:
        return state, ()  # ordered before a rollback that came first: it is of a branch that is no more
    state = replace(state, rosters=(*state.rosters, signed), issuing=None)
    return _say(state, now, f"roster {roster.epoch}: {names}"), (Announce(),)


# rollbacks


def _rollback_asked(state: State, to: Head, reason: str, now: float, rules: Rules) -> Outcome:
    assert 0 <= to.round <= state.head.round
    number = len(state.rollbacks) + 1
    if state.branch != number - 1:
        return _say(state, now, "no rollback: the log has yet to follow one that nodes remember"), (Announce(),)
    if number > ROLLBACKS_MAX:
        return _say(state, now, f"no rollback: the run has had {ROLLBACKS_MAX}"), (Announce(),)
    left = state.started + RESTART_PATIENCE * rules.absent_seconds - now
    if state.history and left > 0:  # its number may be one that a lost disk forgot
        what = f"no rollback yet: for {left:.0f} s nodes may still bring back what they know of the run"
        return _say(state, now, what), (Announce(),)
    rollback = Rollback(rules.run, number, to, state.head, reason, int(now * 1000))
    return state, (SignRollback(rollback),)


def _recalled(state: State, rosters: tuple[SignedRoster, ...], rollbacks: tuple[SignedRollback, ...]) -> Outcome:
    """Take in what is genuinely ours and new here; the rollbacks in order and without a gap."""
    known = list(state.rollbacks)
    for signed in sorted(rollbacks, key=lambda each: each.rollback.number):
        if signed.rollback.number == len(known) + 1:
            known.append(signed)
    new = tuple(signed for signed in rosters if signed.roster.epoch not in state.history)
    history = {**state.history, **{signed.roster.epoch: signed for signed in new}}
    state = replace(
        state,
        rollbacks=tuple(known),
        history=history,
        rosters=_open(state, history) if new else state.rosters,
        next_epoch=Epoch(max(state.next_epoch, max(history, default=-1) + 1)),
    )
    return state, (SaveRosters(new),) if new else ()


def _open(state: State, history: Mapping[Epoch, SignedRoster]) -> tuple[SignedRoster, ...]:
    """The rosters of this branch from the oldest open one on."""
    oldest = state.rosters[0].roster.epoch if state.rosters else Epoch(-1)
    return tuple(
        signed for epoch, signed in sorted(history.items()) if epoch >= oldest and signed.roster.branch == state.branch
    )


def _turn(state: State) -> SignedRollback | None:
    """The rollback that the log has to follow now."""
    due = next_turn(state.head.round, state.branch, (signed.rollback for signed in state.rollbacks))
    return None if due is None else state.rollbacks[due.number - 1]


def _rolled_back(state: State, event: RolledBack, now: float) -> Outcome:
    """The log goes on from an earlier head: with rosters of its own, and with the data of what is undone."""
    rollback = event.signed.rollback
    undone = rollback.undone.round - rollback.to.round
    state = replace(
        state,
        head=event.head,
        branch=rollback.number,
        consumed=event.consumed,
        tokens=event.tokens,
        leases=event.leases,
        rosters=(),
        issuing=None,
        seals={},
        recent=tuple(each for each in state.recent if each.record.round < event.head.round),
        unfolded=(),
        waiting={},
        have=frozenset(),
        rewinding=True,
    )
    what = f"rollback {rollback.number} to round {rollback.to.round}: {undone} rounds undone ({rollback.reason})"
    return _say(state, now, what), (Rewind(), Announce())


def _settle(state: State, now: float, rules: Rules) -> Outcome:
    """Whatever follows from the state and the time, whichever event led to it."""
    effects: tuple[Effect, ...] = ()
    for node in state.nodes.values():
        if node.activity != "left" and node.seen > 0 and not node.present(now, rules):
            state, more = _left(state, node.node, f"not heard of for {rules.absent_seconds:.0f} s", now)
            effects += more
    state, calls = _call(state, now, rules)
    effects += calls
    gone = data.expired(state.leases, int(now * 1000))
    if gone:
        state = replace(state, leases=data.give_back(state.leases, gone))
        effects += (SaveLeases(),)
    if (turn := _turn(state)) is not None:
        return state, (*effects, TurnLog(turn))
    if state.issuing is None and not run_is_over(state, rules):
        state, more = _roster(state, now, rules)
        effects += more
    if state.unfolded and not (state.folding or state.held or state.rewinding):
        entry = state.unfolded[0]
        if entry.record.state != state.replica_digest:
            what = f"it starts from state {entry.record.state[:12]}, the log leads to {state.replica_digest[:12]}"
            state = _hold(state, entry.record.round, what, now)
        elif all(part.digest in state.have for part in entry.record.parts):
            state = replace(state, folding=True)
            effects += (Fold(entry),)
    return state, effects


def _roster(state: State, now: float, rules: Rules) -> Outcome:
    """Issue a new roster when the active nodes are no longer those of the last one."""
    if _is_early(state, now, rules):
        return state, ()
    if state.rollbacks and state.rollbacks[-1].rollback.number != state.branch:
        return state, ()  # what nodes remember of this log is ahead of it
    desired = _desired(state, now, rules)
    current = state.roster.roster.nodes if state.roster is not None else ()
    if not any(member.is_callable for member in desired) and all(state.shut(node, now) is None for node in current):
        return _held(state, {n.node for n in _able(state, now, rules)}, now, rules)
    seals = {node: seal.epoch for node, seal in state.seals.items() if seal.round <= state.head.round}
    members = next_members([signed.roster for signed in state.rosters], desired, seals, state.silent)
    if members is None:
        return _held(state, {n.node for n in _able(state, now, rules)}, now, rules)
    roster = Roster(
        rules.run,
        _fresh_epoch(state, now),
        members,
        int(now * 1000),
        floor=state.head.round,
        branch=state.branch,
        manifest=rules.manifest,
        after=max(state.history, default=Epoch(-1)),
    )
    state = replace(state, next_epoch=Epoch(roster.epoch + 1), issuing=roster.epoch, held_since=None)
    return state, (SignRoster(roster),)


def _is_early(state: State, now: float, rules: Rules) -> bool:
    """After a restart everyone gets the time to come back, and to bring what a lost disk forgot."""
    return bool(state.history) and now - state.started < RESTART_PATIENCE * rules.absent_seconds


def _newest(state: State) -> SignedRoster | None:
    return state.roster or state.history.get(max(state.history, default=Epoch(-1)))


def _able(state: State, now: float, rules: Rules, activities: Set[str] = TAKES_PART) -> list[Node]:
    """Who can be rostered, of those who do this."""
    newest = _newest(state)
    rostered = frozenset(newest.roster.nodes) if newest else frozenset[NodeId]()
    able = [
        n
        for n in state.nodes.values()
        if n.activity in activities
        and n.present(now, rules)
        and state.shut(n.node, now) is None
        and (n.node in rostered or (n.reach.known and n.head_round >= state.head.round - BEHIND_MAX))
    ]
    return [n for n in able if not state.aside(n.node)] or able  # whoever is left out waits for the rounds of others


def _desired(state: State, now: float, rules: Rules) -> tuple[Member, ...]:
    """Who would be rostered if every step were safe."""
    able, newest = _able(state, now, rules), _newest(state)
    rostered = {member.node: member for member in newest.roster.members} if newest else {}
    wide = reachability.is_wide(n.reach for n in state.nodes.values() if n.present(now, rules))
    if not state.history and sum(n.activity != HELPS for n in able) < rules.min_nodes:
        return ()

    def member_of(node: Node) -> Member:
        return _member(node, rostered.get(node.node), rules, wide=wide)

    members = [member_of(node) for node in able]
    seats = seated(((n.node, n.invite or n.node) for n in able), rostered)
    chosen = [member for member in members if member.node in seats]
    if chosen and not any(member.is_callable for member in chosen):
        # one that can be called is worth more than the last of them, even paused
        resting = sorted(_able(state, now, rules, RESTS), key=lambda each: each.node not in rostered)
        spare = next((member for member in (*members, *map(member_of, resting)) if member.is_callable), None)
        chosen = chosen if spare is None else [*chosen[: MEMBERS_MAX - 1], spare]
    return tuple(chosen)


def _fresh_epoch(state: State, now: float) -> Epoch:
    """The next number; after a restart one that no roster has, though the database may have forgotten the newest.

    It may be a backup, and no node that knows better be here. Those it lacks were issued since the newest that it has,
    and no coordinator signs and saves one in a millisecond."""
    newest = state.history.get(max(state.history, default=Epoch(-1)))
    if newest is None or newest.roster.issued_ms >= int(state.started * 1000):
        return state.next_epoch
    return Epoch(state.next_epoch + max(0, int(now * 1000) - newest.roster.issued_ms))


def _member(node: Node, before: Member | None, rules: Rules, *, wide: bool) -> Member:
    """As its peers are to see it: one that cannot be called reduces nothing, and its addresses are nobody's business."""
    if before is not None and not node.reach.known:
        return before  # after a restart of ours, until it has been called
    where = reachability.addresses(node.reach, node.addresses, wide=wide)
    role = Role.HELPER if node.activity == HELPS else Role.PEER
    if not where and node.reach.source:
        role = Role.CLIENT
    return Member(node.node, node.peer, where, rules.weight_cap, role)


def _held(state: State, here: set[NodeId], now: float, rules: Rules) -> Outcome:
    """No other roster can be issued, and this one cannot go on: so many of its members have forgotten what they signed,
    or are shut out; or nobody on it can be called, and whoever could has no place beside those who are.

    On another branch no promise of theirs matters. It begins once everybody else is here and no log is ahead of ours."""
    roster = state.roster.roster if state.roster is not None else None
    forgetful = [node for node in roster.nodes if state.silent.get(node, -1) >= roster.epoch] if roster else []
    out = [node for node in roster.nodes if state.shut(node, now) is not None] if roster else []
    few = roster is not None and len(roster.members) - len(out) < quorum(len(roster.members))
    mute = roster is not None and not any(member.is_callable for member in roster.members)
    stuck = forgetful or few or (mute and not nobody_is_callable(state, now, rules))
    awaited = {node for node in roster.nodes if node not in out and not state.aside(node)} if roster else set()
    if roster is None or not stuck or not here or not here.issuperset(awaited):
        return replace(state, held_since=None), ()
    since = now if state.held_since is None else state.held_since
    ahead = any(state.nodes[node].head_round > state.head.round for node in here & set(roster.nodes))
    if ahead or now - since < RESTART_PATIENCE * rules.absent_seconds:
        return replace(state, held_since=since), ()
    members = len(roster.members)
    reason = f"{len(forgetful)} of {members} nodes are back with older disks and forgot what they had signed"
    if not forgetful and mute:
        reason = f"of {members} nodes none can be called, and one that can has come"
    elif not forgetful:
        reason = f"{len(out)} of {members} nodes are shut out, and the others are no majority"
    return replace(state, held_since=None), (BranchOff(state.head.round, reason),)
