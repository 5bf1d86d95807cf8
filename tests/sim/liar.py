"""A member that lies: its machine is the real one, and its words are not. It says each lie whenever it can."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from node.core.rounds import leader
from protocol.canonical import digest
from protocol.evidence import vouched
from protocol.log import record_hash
from protocol.messages import Accepted, Commit, Message, Propose, Ready, Vote
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    LogEntry,
    NodeId,
    Part,
    Record,
    Roster,
    Signature,
    VoteBody,
)
from tests.sim.invariants import RUN, brings, sign, sign_proposal, vouch
from tests.sim.node import PARAMETERS, SimNode

if TYPE_CHECKING:
    from tests.sim.world import World


class Lie(Enum):
    INVENTS = "says that it has voted for a record of its own, which nobody proposed"
    HIDES = "proposes a record with a part that it keeps to itself, and says that it has voted for that"
    FORGETS = "is silent about its votes"
    WEIGHS = "brings more weight than it was granted"
    LEAVES_OUT = "proposes records with its own work alone"
    CREDITS = "proposes records that give it another's weight"
    TWO_FACED = "shows different members different records, and votes for both"


@dataclass
class Second:
    """The record that only some have been shown, and who has voted for it."""

    proposal: Propose
    shown_to: tuple[NodeId, ...]
    votes: dict[NodeId, str] = field(default_factory=dict)


class Liar(SimNode):
    def __init__(self, world: World, index: int, lie: Lie) -> None:
        self.lie = lie
        self.told = 0  # lies
        self._hidden: Accepted | None = None
        self._second: Second | None = None
        super().__init__(world, index)
        world.truth.liars.add(self.me)

    def _send(self, to: tuple[NodeId, ...], message: Message) -> None:
        ours, theirs = tuple(n for n in to if n == self.me), tuple(n for n in to if n != self.me)
        if ours:
            super()._send(ours, message)
        lied = self._lied(message)
        if lied is not message:
            self.told += 1
        if theirs and self.lie is Lie.TWO_FACED and isinstance(message, Propose):
            theirs = self._show_another(theirs, message)
        if theirs:
            super()._send(theirs, lied)

    def _lied(self, message: Message) -> Message:
        match self.lie, message:
            case Lie.INVENTS, Ready() if message.contribution.tokens:
                return replace(message, accepted=self._never_voted(message))
            case Lie.HIDES, Ready() if self._hidden is not None and self._hidden.record.previous == message.previous:
                return replace(message, accepted=self._hidden)
            case Lie.HIDES, Propose(accepted=None):
                return self._with_a_part_hidden(message)
            case Lie.FORGETS, Ready() if message.accepted is not None:
                return replace(message, accepted=None)
            case Lie.WEIGHS, Ready() if message.contribution.ranges:
                first, *rest = message.contribution.ranges
                stretched = (replace(first, stop=first.stop + 50), *rest)
                tokens = message.contribution.tokens + 50 * self.rules.context
                heavier = replace(message.contribution, ranges=stretched, tokens=tokens)
                return replace(message, contribution=brings(self.rounds.head, heavier))
            case Lie.LEAVES_OUT, Propose(accepted=None):
                mine = [each for each in message.record.contributions if each.node == self.me]
                return self._proposes(message, self._alone(mine[0])) if mine else message
            case Lie.CREDITS, Propose(accepted=None):
                return self._proposes(message, self._robbed(message.record))
        return message

    def _never_voted(self, ready: Ready) -> Accepted | None:
        """With its leader's signature where this node was that leader."""
        roster = self._roster_of(ready.ballot)
        led = [
            Ballot(ready.ballot.epoch, attempt)
            for attempt in range(ready.ballot.attempt)
            if roster is not None and leader(roster, Ballot(ready.ballot.epoch, attempt), ready.round) == self.me
        ]
        ballot = (
            led[-1] if led and self.lie is Lie.HIDES else Ballot(ready.ballot.epoch, max(0, ready.ballot.attempt - 1))
        )
        record = replace(self._alone(ready.contribution), epoch=ballot.epoch)
        return Accepted(ballot, record, sign_proposal(self.me, VoteBody(RUN, ready.round, ballot, record_hash(record))))

    def _with_a_part_hidden(self, proposal: Propose) -> Propose:
        *others, last = proposal.record.parts
        hidden = replace(last, reducer=self.me, digest=digest(("nobody has it", proposal.ballot, self.me)))
        lied = self._proposes(proposal, _vouched(replace(proposal.record, parts=(*others, hidden))))
        self._hidden = Accepted(lied.ballot, lied.record, lied.signature)
        return lied

    def _roster_of(self, ballot: Ballot) -> Roster | None:
        signed = self.rounds.rosters.get(ballot.epoch)
        return signed.roster if signed is not None else None

    def _alone(self, mine: Contribution) -> Record:
        """Sound in itself, but for a part that nobody else has."""
        state = self.rounds
        hidden = digest(("nobody has it", state.head.round, self.me))
        if self.lie is Lie.LEAVES_OUT:
            self.disk.parts.add(hidden)
        part = Part(0, 0, PARAMETERS, hidden, PARAMETERS // 2, self.me, (self.me,))
        roster = self.rounds.roster
        epoch = roster.epoch if roster is not None else state.ballot.epoch
        record = Record(
            RUN,
            state.head.round,
            state.head.hash,
            epoch,
            self.me,
            (mine,),
            (part,),
            state.digest,
            self.rules.exchange(()),
        )
        return _vouched(record)

    def _robbed(self, record: Record) -> Record:
        """Somebody else's weight in our name, with our signature."""
        others = [each for each in record.contributions if each.node != self.me]
        if not others:
            return record
        mine = brings(self.rounds.head, replace(others[0], node=self.me))
        parts = tuple(
            replace(part, included=(self.me,), reducer=self.me)
            for part in record.parts
            if others[0].node in part.included
        )
        return _vouched(replace(record, contributions=(mine,), parts=parts)) if parts else record

    def _proposes(self, proposal: Propose, record: Record) -> Propose:
        body = VoteBody(RUN, proposal.round, proposal.ballot, record_hash(record))
        return replace(proposal, record=record, signature=sign_proposal(self.me, body))

    # two faces

    def _show_another(self, to: tuple[NodeId, ...], proposal: Propose) -> tuple[NodeId, ...]:
        """Half of them are shown a record with a part less; returns the others."""
        record = proposal.record
        if len(record.parts) < 2 or proposal.accepted is not None:
            return to
        parts = record.parts[:-1]
        inside = {node for part in parts for node in part.included}
        fewer = tuple(each for each in record.contributions if each.node in inside)
        half = to[: (len(to) + 1) // 2]
        self.told += 1
        self._second = Second(self._proposes(proposal, replace(record, parts=parts, contributions=fewer)), half)
        super()._send(half, self._second.proposal)
        return to[len(half) :]

    def hear(self, message: Message) -> None:
        second = self._second
        if second is not None and isinstance(message, Vote) and message.record == record_hash(second.proposal.record):
            self._count(second, message)
        else:
            super().hear(message)

    def _count(self, second: Second, vote: Vote) -> None:
        proposal = second.proposal
        roster = self._roster_of(proposal.ballot)
        if roster is None:
            return
        body = VoteBody(RUN, proposal.round, proposal.ballot, record_hash(proposal.record))
        second.votes |= {vote.sender: vote.signature, self.me: sign(self.me, body)}
        if len(second.votes) < roster.quorum:
            return
        signatures = tuple(Signature(node, second.votes[node]) for node in roster.nodes if node in second.votes)
        certificate = Certificate(body.record, proposal.ballot, signatures)
        entry = LogEntry(proposal.record, certificate)
        self.world.struck("fork", self.me)
        super()._send(second.shown_to, Commit(RUN, proposal.round, self.me, entry.record, entry.certificate))


def _vouched(record: Record) -> Record:
    """With its leader's signature on the parts that it says are its own."""
    own = [vouch(vouched(record, part)) if part.reducer == record.leader else part for part in record.parts]
    return replace(record, parts=tuple(own))
