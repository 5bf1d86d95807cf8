"""The witness: remembers what members said in the newest rounds, and notices who lies. Knows no coordinator.

It only listens: what it finds goes to the coordinator, which checks it again, and nothing in a round depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from node.core.rounds import leader
from protocol.log import PROPOSAL, VOTE, record_hash
from protocol.messages import Accepted, Begin, Commit, Message, Propose, Ready, Vote
from protocol.proof import Evidence, Said, votes_of
from protocol.types import Ballot, Epoch, LogEntry, NodeId, Record, RoundNumber, RunId, SignedRoster, VoteBody

ROUNDS_KEPT: Final = 2  # the open one, and the one before it: certificates come after its end
WORDS_MAX: Final = 2048  # 64 members, a vote and a proposal each, in eight ballots of both rounds


@dataclass(frozen=True)
class Rules:
    run: RunId
    is_signed: Callable[[Said], bool]
    is_brought: Callable[[Record], bool]  # whether each member brought what the record says of it


@dataclass(frozen=True)
class Witness:
    words: Mapping[tuple[object, ...], Said] = field(default_factory=dict)  # the first that was heard, by its place
    guilty: frozenset[NodeId] = frozenset()  # told of already, in these rounds
    round: RoundNumber = RoundNumber(0)  # the newest that was heard of


def hear(
    witness: Witness, message: Message, rosters: Mapping[Epoch, SignedRoster], head: RoundNumber, rules: Rules
) -> tuple[Witness, tuple[Evidence, ...]]:
    """Take in a genuine letter; tells what it proves, together with those before it."""
    if not isinstance(message, Ready | Begin | Propose | Vote | Commit) or message.run != rules.run:
        return witness, ()
    if not head - ROUNDS_KEPT < message.round <= head:
        return witness, ()
    if head > witness.round:
        kept = {place: said for place, said in witness.words.items() if said.body.round > head - ROUNDS_KEPT}
        witness = Witness(kept, frozenset(), head)
    found: list[Evidence] = []
    for said, record in _words(message, rosters):
        if said.node in witness.guilty or (before := witness.words.get(said.place)) == said:
            continue
        if not rules.is_signed(said):
            continue
        evidence = None
        if before is not None and before.body.record != said.body.record:
            evidence = Evidence(before, said)
        elif record is not None and not rules.is_brought(record):
            evidence = Evidence(said, None, record)
        if evidence is not None:
            found.append(evidence)
            witness = replace(witness, guilty=witness.guilty | {said.node})
        elif before is None and len(witness.words) < WORDS_MAX:
            witness = replace(witness, words={**witness.words, said.place: said})
    return witness, tuple(found)


def _words(message: Message, rosters: Mapping[Epoch, SignedRoster]) -> Iterator[tuple[Said, Record | None]]:
    """The votes and proposals in a letter, those that it passes on included; with a proposal its record."""

    def proposed(node: NodeId, ballot: Ballot, record: Record, signature: str) -> tuple[Said, Record]:
        body = VoteBody(record.run, message.round, ballot, record_hash(record))
        return Said(node, PROPOSAL, body, signature), record

    def accepted(each: Accepted | None) -> Iterator[tuple[Said, Record]]:
        known = rosters.get(each.ballot.epoch) if each is not None else None
        if each is not None and known is not None:
            yield proposed(leader(known.roster, each.ballot, message.round), each.ballot, each.record, each.signature)

    match message:
        case Ready():
            yield from accepted(message.accepted)
        case Begin():
            for signed in message.readies:
                yield from accepted(signed.ready.accepted)
        case Propose():
            yield proposed(message.sender, message.ballot, message.record, message.signature)
            yield from accepted(message.accepted)
        case Vote():
            body = VoteBody(message.run, message.round, message.ballot, message.record)
            yield Said(message.sender, VOTE, body, message.signature), None
        case Commit():
            for said in votes_of(LogEntry(message.record, message.certificate)):
                yield said, None
