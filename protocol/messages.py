"""What peers say to each other in a round. Every message is signed by its sender before it travels."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    Digest,
    LogEntry,
    NodeId,
    Part,
    Record,
    RoundNumber,
    RunId,
    SignedRollback,
    SignedRoster,
)


@dataclass(frozen=True)
class Accepted:
    """The newest record a member has voted for in this round, under which ballot, and that its leader proposed it."""

    ballot: Ballot
    record: Record
    signature: str  # as in Propose


@dataclass(frozen=True)
class Ready:
    """A member's promise for a ballot: it brings this, and will sign nothing under a lower ballot."""

    run: RunId
    round: RoundNumber
    previous: Digest
    ballot: Ballot
    sender: NodeId
    contribution: Contribution
    accepted: Accepted | None


@dataclass(frozen=True)
class SignedReady:
    ready: Ready
    signature: str


@dataclass(frozen=True)
class Begin:
    """The leader's call to average: the promises of its group, in the roster's order. The group is those who bring
    something, and in an all-reduce the helpers who bring nothing."""

    run: RunId
    round: RoundNumber
    ballot: Ballot
    sender: NodeId
    readies: tuple[SignedReady, ...]


@dataclass(frozen=True)
class Claim:
    """A reducer's word on the part it reduced: the bytes it sent to everyone have this hash."""

    run: RunId
    round: RoundNumber
    ballot: Ballot
    sender: NodeId
    part: Part | None  # none: this member reduced nothing, or its reduction failed


@dataclass(frozen=True)
class Propose:
    """The leader's request to vote: for a record of its own, or for one that a member has voted for before."""

    run: RunId
    round: RoundNumber
    ballot: Ballot
    sender: NodeId
    record: Record
    signature: str  # hex; the leader's, purpose "proposal", over a VoteBody: whoever votes can show whose record it is
    accepted: Accepted | None = None  # that vote; none for a record of the leader's own


@dataclass(frozen=True)
class Vote:
    run: RunId
    round: RoundNumber
    ballot: Ballot
    sender: NodeId
    record: Digest
    signature: str  # over VoteBody: it goes into the certificate


@dataclass(frozen=True)
class Commit:
    run: RunId
    round: RoundNumber
    sender: NodeId
    record: Record
    certificate: Certificate


@dataclass(frozen=True)
class LogRequest:
    """Asks a peer for the records from a round on."""

    run: RunId
    round: RoundNumber
    sender: NodeId


@dataclass(frozen=True)
class LogReply:
    run: RunId
    round: RoundNumber
    sender: NodeId
    entries: tuple[LogEntry, ...]
    rosters: tuple[SignedRoster, ...]  # those that the entries name, and the newest
    rollbacks: tuple[SignedRollback, ...] = ()  # all


Message = Ready | Begin | Claim | Propose | Vote | Commit | LogRequest | LogReply
