"""Proofs: what shows to anybody that a member lied. Knows no clock, no network, and takes nobody's word but signatures.

A vote and a proposal are signed over the same short body, so two of them, or one and its record, are all it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import canonical, identity
from protocol.errors import Code, Refused
from protocol.log import PROPOSAL, VOTE, check_brought, check_contributions, record_hash, vote_bytes
from protocol.types import Digest, Fault, LogEntry, NodeId, Record, RoundNumber, RunId, VoteBody


@dataclass(frozen=True)
class Said:
    """A vote or a proposal, without the letter that it came in."""

    node: NodeId
    purpose: str  # VOTE or PROPOSAL
    body: VoteBody
    signature: str  # hex; over the body, for the purpose

    @property
    def place(self) -> tuple[object, ...]:
        """What an honest node says at most one thing about."""
        return self.node, self.purpose, self.body.run, self.body.round, self.body.ballot


@dataclass(frozen=True)
class Evidence:
    """Two words of one node for different records in one ballot; or one word, and the record that it is for."""

    said: Said
    other: Said | None = None
    record: Record | None = None


@dataclass(frozen=True)
class Proof:
    """Evidence that holds."""

    node: NodeId
    fault: Fault
    round: RoundNumber
    what: str  # for people
    evidence: Digest


def prove(evidence: Evidence, run: RunId) -> Proof:
    """What the evidence proves of a member of this run; refused where it proves nothing.

    A contradiction is the same whichever word comes first, and has one digest."""
    said, other, record = evidence.said, evidence.other, evidence.record
    if said.body.run != run:
        raise Refused(Code.UNPROVED, "evidence of another run")
    check_said(said)
    if other is not None and record is None:
        check_said(other)
        if said.place != other.place or said.body.record == other.body.record:
            raise Refused(Code.UNPROVED, "two words that do not contradict each other")
        return contradiction(said, other)
    if record is None or other is not None or record_hash(record) != said.body.record:
        raise Refused(Code.UNPROVED, "evidence of neither two words nor one with its record")
    if (record.run, record.round) != (run, said.body.round):
        raise Refused(Code.UNPROVED, "a record of another run or round")
    try:
        check_contributions(record)
    except Refused as refused:
        raise Refused(Code.UNPROVED, f"a record that nobody could read: {refused.what}") from refused
    try:
        check_brought(record)
    except Refused as refused:
        what = f"a {said.purpose} in {_where(said)}: {refused.what}"
        return Proof(said.node, Fault.FORGED, said.body.round, what, canonical.digest((said.node, said.body.record)))
    raise Refused(Code.UNPROVED, "each member has signed what the record says of it")


def contradiction(said: Said, other: Said) -> Proof:
    """What two words prove that contradict each other, whoever has checked that they are genuine."""
    digests = sorted((said.body.record, other.body.record))
    what = f"a {said.purpose} for {digests[0][:8]} and one for {digests[1][:8]} in {_where(said)}"
    known = canonical.digest((said.node, said.purpose, canonical.digest(said.body.ballot), *digests))
    return Proof(said.node, Fault.CONTRADICTED, said.body.round, what, known)


def _where(said: Said) -> str:
    ballot = said.body.ballot
    return f"round {said.body.round}, attempt {ballot.attempt} under roster {ballot.epoch}"


def check_said(said: Said) -> None:
    """Refuse what this node did not sign as a vote or a proposal."""
    if said.purpose not in (VOTE, PROPOSAL):
        raise Refused(Code.UNPROVED, f"a word of kind {canonical.shown(said.purpose)!r}, expected a vote or a proposal")
    identity.verify(said.node, said.purpose, vote_bytes(said.body), said.signature)


def votes_of(entry: LogEntry) -> tuple[Said, ...]:
    """The words in a certificate."""
    certificate = entry.certificate
    body = VoteBody(entry.record.run, entry.record.round, certificate.ballot, certificate.record)
    return tuple(Said(signature.node, VOTE, body, signature.value) for signature in certificate.signatures)


def double_voters(first: LogEntry, second: LogEntry) -> tuple[Proof, ...]:
    """Who signed both certificates, where they are of one ballot and of different records; both have been checked.

    Certificates of different ballots prove nobody's guilt alone: a member may vote again in a later one."""
    mine = {said.place: said for said in votes_of(first)}
    both = ((mine[said.place], said) for said in votes_of(second) if said.place in mine)
    return tuple(contradiction(one, other) for one, other in both if one.body.record != other.body.record)
