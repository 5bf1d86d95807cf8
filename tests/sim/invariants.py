"""What must hold after every step, whatever happens. It sees everything, and takes no machine's word for anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

from coordinator.core.leases import Leases
from coordinator.core.machine import State
from coordinator.core.strikes import Kind, Mark
from node.core.rounds import Phase, Rounds, Rules
from protocol.canonical import digest
from protocol.errors import Code, Refused
from protocol.evidence import Vouched, vouched
from protocol.log import PROPOSAL, VOTE, head_after, ranges_of, record_hash
from protocol.messages import Begin, Message, Propose, Ready, Vote
from protocol.proof import Said
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Contribution,
    DataRange,
    Digest,
    Epoch,
    Head,
    LogEntry,
    NodeId,
    Part,
    Record,
    Rollback,
    Roster,
    RoundNumber,
    RunId,
    Shard,
    SignedRoster,
    VoteBody,
)

RUN = RunId("00.sim")
CONTEXT = 16
GENESIS = Head(RoundNumber(0), Digest("0" * 64))
GENESIS_STATE = digest("state 0")
SHARDS = tuple(
    Shard(digest(f"shard {sequences}"), 2 * CONTEXT * sequences, CONTEXT * sequences, sequences)
    for sequences in (70, 130, 300)  # small, so that a few rounds go through all the data and begin another pass
)
_PASS = sum(shard.sequences for shard in SHARDS)
_OFFSETS = {shard.digest: sum(s.sequences for s in SHARDS[:index]) for index, shard in enumerate(SHARDS)}

Spans = list[tuple[int, int]]  # of the whole data, pass after pass, as one line of numbers


class InvariantBroken(AssertionError):
    """The message names the seed, and what happened."""


@dataclass(frozen=True)
class Known:
    """What is true at one head, of whichever branch."""

    head: Head
    branch: int
    state: Digest
    consumed: Consumed
    record: Record | None = None  # the one that led here; none for the start of a branch

    @cached_property
    def spent(self) -> Spans:
        return joined(
            span(DataRange(*key, *pair)) for key, bounds in self.consumed.bounds.items() for pair in pairs(bounds)
        )


class Truth:
    """Everything that was ever certified, signed or promised, and whether it can all be so."""

    def __init__(self) -> None:
        self.heads = {GENESIS.hash: Known(GENESIS, 0, GENESIS_STATE, Consumed())}
        self.rosters: dict[Epoch, Roster] = {}
        self.rollbacks: list[Rollback] = []
        self.attempts: set[tuple[int, Ballot]] = set()
        self.liars: set[NodeId] = set()  # who may say anything
        self.forks = 0  # rounds that liars have had two records certified of
        self.certified = 0
        self.newest = self.heads[GENESIS.hash]  # the record certified last
        self.bringers: set[NodeId] = set()  # whose work certified records took, since somebody last cleared this
        self._after: dict[Digest, Digest] = {}  # the record that follows a head
        self._promises: dict[tuple[NodeId, int, int], Ballot] = {}
        self._votes: dict[tuple[NodeId, int, Ballot], Digest] = {}
        self._accepted: dict[tuple[NodeId, int, int], Ballot] = {}
        self._proposals: dict[tuple[int, Ballot], Digest] = {}
        self._decided: dict[tuple[int, int], Digest] = {}  # what a majority voted for, whether or not anybody knows
        self._grants: tuple[object, ...] = ()

    # the log

    def roster_signed(self, signed: SignedRoster) -> None:
        roster = signed.roster
        if self.rosters.setdefault(roster.epoch, roster) != roster:
            raise InvariantBroken(f"two rosters have epoch {roster.epoch}")

    def rolled_back(self, rollback: Rollback) -> None:
        """The coordinator has made it durable; from here on others may hear of it."""
        if rollback.number <= len(self.rollbacks):
            if self.rollbacks[rollback.number - 1] != rollback:
                raise InvariantBroken(f"two rollbacks have number {rollback.number}")
            return
        stays = self.heads.get(rollback.to.hash)
        if stays is None or stays.head != rollback.to:
            raise InvariantBroken(f"rollback {rollback.number} to {rollback.to}, which was never a head")
        self.rollbacks.append(rollback)
        head = head_after(rollback)
        self.heads[head.hash] = Known(head, rollback.number, stays.state, stays.consumed)

    def entry_certified(self, entry: LogEntry, who: str) -> bool:
        """Whether this is news; it follows a certified head, alone, and was signed by those who may."""
        record, hashed = entry.record, record_hash(entry.record)
        if hashed in self.heads:
            return False
        before = self.heads.get(record.previous)
        if before is None or before.head.round != record.round:
            raise InvariantBroken(f"{who}: record {record.round} follows no certified head")
        if self._after.setdefault(record.previous, hashed) != hashed:
            if not self.liars:
                raise InvariantBroken(f"{who} has another record for round {record.round}")
            self.forks += 1
        ballot = entry.certificate.ballot
        roster = self.rosters[ballot.epoch]
        body = VoteBody(RUN, record.round, ballot, hashed)
        signers = {s.node for s in entry.certificate.signatures if s.value == sign(s.node, body)}
        if 2 * len(signers & set(roster.nodes)) <= len(roster.members):
            raise InvariantBroken(f"{who}: round {record.round} was certified by {len(signers)} of {len(roster.nodes)}")
        if not roster.branch == self.rosters[record.epoch].branch == before.branch:
            raise InvariantBroken(f"{who}: round {record.round} of branch {before.branch} certified by {roster.branch}")
        if record.state != before.state:
            raise InvariantBroken(f"{who}: round {record.round} starts from another state")
        consumed = before.consumed
        for used in ranges_of(record):
            if consumed.overlaps(used):
                raise InvariantBroken(f"{used} is in two certified records of one line")
            consumed = consumed.with_ranges((used,))
        head = Head(RoundNumber(record.round + 1), hashed)
        self.newest = Known(head, before.branch, state_after(before.state, record), consumed, record)
        self.heads[hashed] = self.newest
        self.certified += 1
        self.bringers |= {contribution.node for contribution in record.contributions}
        return True

    # what single-decree Paxos rests on, checked as it leaves a node

    def said(self, node: NodeId, message: Message) -> None:
        if node in self.liars:
            return
        match message:
            case Ready():
                self._promised(node, message)
            case Vote(round=number, ballot=ballot, record=record):
                self._voted(node, number, ballot, record)
            case Begin(round=number, ballot=ballot):
                self.attempts.add((number, ballot))
            case Propose(round=number, ballot=ballot, record=proposed):
                self.attempts.add((number, ballot))
                hashed = record_hash(proposed)
                if self._proposals.setdefault((number, ballot), hashed) != hashed:
                    raise InvariantBroken(f"{node} proposes twice in {ballot} of round {number}")

    def _promised(self, node: NodeId, ready: Ready) -> None:
        place = (node, self.rosters[ready.ballot.epoch].branch, ready.round)
        self._promises[place] = max(self._promises.get(place, ready.ballot), ready.ballot)
        voted = self._accepted.get(place)
        if voted is not None and (ready.accepted is None or ready.accepted.ballot < voted):
            raise InvariantBroken(f"{node} keeps silent about its vote in {voted} of round {ready.round}")

    def _voted(self, node: NodeId, number: int, ballot: Ballot, record: Digest) -> None:
        roster = self.rosters[ballot.epoch]
        place = (node, roster.branch, number)
        if self._promises.get(place, ballot) > ballot:
            raise InvariantBroken(f"{node} signs {ballot} below its promise")
        if self._votes.setdefault((node, number, ballot), record) != record:
            raise InvariantBroken(f"{node} signs two records in {ballot} of round {number}")
        self._accepted[place] = max(self._accepted.get(place, ballot), ballot)
        voters = [n for n in roster.nodes if self._votes.get((n, number, ballot)) == record]
        if 2 * len(voters) > len(roster.members) and self._decided.setdefault(place[1:], record) != record:
            raise InvariantBroken(f"two majorities signed two records in round {number}")

    def forgot(self, node: NodeId) -> None:
        """Its disk came back from a backup: what it says of itself from here on may contradict what it said before."""
        self._promises = {place: ballot for place, ballot in self._promises.items() if place[0] != node}
        self._accepted = {place: ballot for place, ballot in self._accepted.items() if place[0] != node}

    # what a node is

    def replica_is_true(self, head: Head, state: Digest, consumed: Consumed, branch: int, who: str) -> None:
        known = self.heads.get(head.hash)
        if known is None or known.head != head:
            raise InvariantBroken(f"{who} is at {head}, which nobody certified")
        if known.state != state:
            raise InvariantBroken(f"{who} is at round {head.round} with another state")
        if known.consumed != consumed:
            raise InvariantBroken(f"{who} is at round {head.round} with other data consumed")
        if known.branch != branch:
            raise InvariantBroken(f"{who} is at round {head.round} of branch {known.branch}, and takes it for {branch}")

    def attempt_is_bounded(self, state: Rounds, now: float, rules: Rules, who: str) -> None:
        """Whatever a node waits for in a round, it gives up in time."""
        if state.phase in (Phase.AVERAGING, Phase.DECIDING) and state.committed is None:
            if not now < state.deadline <= now + rules.attempt_seconds_max:
                raise InvariantBroken(
                    f"{who} waits until {state.deadline:.1f} in phase {state.phase.value}, now {now:.1f}"
                )
        elif (
            state.phase is Phase.GATHERING
            and state.majority_since is not None
            and state.committed is None
            and now - state.majority_since > rules.gather_seconds + rules.attempt_seconds_max
        ):
            raise InvariantBroken(f"{who} waits for its leader since {state.majority_since:.1f}, now {now:.1f}")

    def work_is_kept(self, state: Rounds, trained: Spans, who: str) -> Spans:
        """What was trained here is certified, or goes with a contribution; returns what is not yet certified."""
        pending = [c for c in (state.contribution, state.carried) if c is not None]
        for brought in pending:
            if brought.tokens != sum(r.stop - r.start for r in brought.ranges) * CONTEXT:
                raise InvariantBroken(f"{who} brings {brought}")
        rest = without(joined(trained), self.heads[state.head.hash].spent)
        lost = without(rest, joined(span(r) for c in pending for r in c.ranges))
        if lost:
            raise InvariantBroken(f"{who} lost {lost} that it had trained on")
        return rest

    # what the coordinator keeps

    def data_adds_up(self, leases: Leases, consumed: Consumed) -> None:
        """Consumed, held and returned data are all that was ever granted, each sequence once."""
        seen = (leases.cursor, leases.returned, leases.held.keys(), consumed)
        if all(one is other or one == other for one, other in zip(self._grants, seen, strict=False)) and self._grants:
            return  # a lease renewed is the same data
        self._grants = seen
        spans = [span(DataRange(*key, *pair)) for key, bounds in consumed.bounds.items() for pair in pairs(bounds)]
        spans += [span(lease.range) for lease in leases.held.values()] + [span(each) for each in leases.returned]
        cursor = leases.cursor
        end = cursor.pass_number * _PASS + _OFFSETS[SHARDS[cursor.shard].digest] + cursor.start
        spans = [(0, 0), *sorted(spans), (end, end)]
        for (_, stop), (start, _) in pairwise(spans):
            if start < stop:
                raise InvariantBroken(f"data [{start}, {stop}) is granted, returned or consumed twice")
            if start > stop:
                raise InvariantBroken(f"data [{stop}, {start}) is lost")

    def nobody_honest_is_struck(self, trails: Mapping[NodeId, Sequence[Mark]]) -> None:
        """Whatever the network, the disks and the power do. A disk that was put back may earn a warning."""
        for node, trail in trails.items():
            struck = [mark for mark in trail if mark.kind is not Kind.WARNING]
            if struck and node not in self.liars:
                raise InvariantBroken(f"{node} did not lie, and has {struck[-1]}")

    def credit_adds_up(self, state: State, line: Iterable[LogEntry], undone: Iterable[LogEntry]) -> None:
        """Credit is the sum over certified records, those that a rollback has undone included."""
        line = tuple(line)
        credit: dict[NodeId, int] = defaultdict(int)
        for entry in (*line, *undone):
            for contribution in entry.record.contributions:
                credit[contribution.node] += contribution.tokens
        found = {node.node: node.credit_tokens for node in state.nodes.values() if node.credit_tokens}
        if found != {node: tokens for node, tokens in credit.items() if tokens}:
            raise InvariantBroken(f"credit is {found}, the records say {dict(credit)}")
        if state.tokens != sum(c.tokens for entry in line for c in entry.record.contributions):
            raise InvariantBroken(f"{state.tokens} tokens, the line says otherwise")

    def nothing_is_lost(self, line: Iterable[LogEntry], followed: Iterable[LogEntry]) -> None:
        """Every certified record is in the coordinator's line, or to come, or was undone by a signed rollback.

        With liars there may be certificates that they keep to themselves: then what members follow is meant."""
        kept = {record_hash(entry.record) for entry in line}
        meant = {record_hash(entry.record) for entry in followed} if self.liars else self.heads.keys()
        for hashed, known in self.heads.items():
            if known.record is None or hashed in kept or hashed not in meant:
                continue
            to_come = known.branch == len(self.rollbacks) and known.record.round >= len(line)
            undone = any(rollback.to.round <= known.record.round for rollback in self.rollbacks[known.branch :])
            if not to_come and not undone:
                raise InvariantBroken(f"round {known.record.round} of branch {known.branch} was certified, and is lost")


def sign(node: NodeId, body: VoteBody) -> str:
    return f"{node} {body.round} {body.ballot.epoch} {body.ballot.attempt} {body.record}"


def sign_proposal(node: NodeId, body: VoteBody) -> str:
    return f"{node} proposes {body.round} {body.ballot.epoch} {body.ballot.attempt} {body.record}"


def granted(node: NodeId, data: DataRange) -> str:
    """The coordinator's signature."""
    return f"{node} may train on {data}"


def brings(head: Head, contribution: Contribution) -> Contribution:
    return replace(contribution, signature=_brought(head, contribution))


@lru_cache(maxsize=4096)  # each stands in dozens of messages, as in the product
def is_brought(head: Head, contribution: Contribution) -> bool:
    """As protocol/contribution.py has it."""
    node, grants = contribution.node, contribution.grants
    proved = Consumed().with_ranges(grant.range for grant in grants if grant.signature == granted(node, grant.range))
    return contribution.signature == _brought(head, contribution) and all(map(proved.covers, contribution.ranges))


def check_brought(record: Record) -> None:
    if not everyone_brought(record):
        raise Refused(Code.RECORD_BAD, f"record {record.round} holds what nobody brought")


def vouch(body: Vouched) -> Part:
    """As protocol/evidence.py has it."""
    return replace(body.part, signature=f"{body.part.reducer} made {digest(body)}")


def is_vouched(record: Record, part: Part) -> bool:
    return part.size == (part.stop - part.start) // 2 and vouch(vouched(record, part)) == part


def is_said(said: Said) -> bool:
    return said.signature == {VOTE: sign, PROPOSAL: sign_proposal}[said.purpose](said.node, said.body)


def everyone_brought(record: Record) -> bool:
    return all(is_brought(Head(record.round, record.previous), each) for each in record.contributions)


@lru_cache(maxsize=4096)
def _brought(head: Head, contribution: Contribution) -> str:
    return f"{contribution.node} brings {digest((head.round, head.hash, replace(contribution, signature='')))}"


def state_after(state: Digest, record: Record) -> Digest:
    """Folding, as far as it matters here."""
    return digest((state, record_hash(record)))


def pairs(bounds: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    return zip(bounds[::2], bounds[1::2], strict=True)


def span(data: DataRange) -> tuple[int, int]:
    base = data.pass_number * _PASS + _OFFSETS[data.shard]
    return base + data.start, base + data.stop


def ranged(span: tuple[int, int]) -> DataRange:
    """The other way round, for a span inside one shard."""
    pass_number, start = divmod(span[0], _PASS)
    shard = max((s for s in SHARDS if _OFFSETS[s.digest] <= start), key=lambda s: _OFFSETS[s.digest])
    first = start - _OFFSETS[shard.digest]
    return DataRange(pass_number, shard.digest, first, first + span[1] - span[0])


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """The same set in order, without overlaps; what only touches stays apart, so that a span lies in one shard."""
    result: Spans = []
    for start, stop in sorted(spans):
        if result and start < result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def without(spans: Spans, taken: Spans) -> Spans:
    """What is left of the first; both are in order, without overlaps."""
    rest: Spans = []
    index = 0
    for start, stop in spans:
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        ahead = index
        while ahead < len(taken) and taken[ahead][0] < stop:
            if start < taken[ahead][0]:
                rest.append((start, taken[ahead][0]))
            start = max(start, taken[ahead][1])
            ahead += 1
        if start < stop:
            rest.append((start, stop))
    return rest
