"""The log: a chain of certified records. Says what fits and what certifies; knows no clock, no network, no parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

from protocol import canonical, identity
from protocol.contribution import check_genuine, check_range, check_shape
from protocol.errors import Code, Refused
from protocol.limits import CHUNK_VALUES, MEMBERS_MAX
from protocol.state import Consumed
from protocol.types import (
    Certificate,
    DataRange,
    Digest,
    Exchange,
    Head,
    LogEntry,
    Manifest,
    NodeId,
    Part,
    Record,
    Role,
    Rollback,
    Roster,
    RoundNumber,
    VoteBody,
)

VOTE: Final = "vote"  # the purpose that votes are signed for
PROPOSAL: Final = "proposal"  # and that of proposals, which are signed over the same body
HELPER_SHARES: Final = 2  # a helper has a public address and chose to reduce more; a peer has one share
_DIGEST = re.compile(r"[0-9a-f]{64}")


@lru_cache(maxsize=64)  # each record of the current rounds is named in dozens of votes
def record_hash(record: Record) -> Digest:
    return canonical.digest(record)


def vote_bytes(body: VoteBody) -> bytes:
    """What a member signs, with the purpose VOTE."""
    return canonical.to_bytes(body)


def genesis_head(manifest: Manifest) -> Head:
    """The head of a log without records."""
    return Head(RoundNumber(0), canonical.digest(manifest))


def next_head(record: Record) -> Head:
    """The head once this record is appended."""
    return Head(RoundNumber(record.round + 1), record_hash(record))


def head_after(rollback: Rollback) -> Head:
    """The head once this rollback is followed: the next record is of an earlier round, and fits nothing else."""
    return Head(rollback.to.round, canonical.digest(rollback))


def next_turn(round_number: RoundNumber, branch: int, rollbacks: Iterable[Rollback]) -> Rollback | None:
    """The rollback that a log of so many records, which has followed `branch` of them, must follow next.

    Of those to come, the one that goes back furthest, and the last of equals: whatever the others left is undone by it.
    A log that is beyond `to.round` goes back; one that is exactly there only turns. None before it is reached."""
    ahead = [each for each in rollbacks if each.number > branch]
    furthest = min(ahead, key=lambda each: (each.to.round, -each.number), default=None)
    return furthest if furthest is not None and round_number >= furthest.to.round else None


def on_line(rollbacks: Iterable[Rollback]) -> tuple[Rollback, ...]:
    """Of a run's rollbacks, in order, those whose turn no later one has undone."""
    kept: list[Rollback] = []
    for each in rollbacks:
        kept = [*(other for other in kept if other.to.round < each.to.round), each]
    return tuple(kept)


def line_head(records: Head, rollbacks: Iterable[Rollback]) -> tuple[Head, int]:
    """The head of the line after so many records, where it turns there, and its branch."""
    passed = [each for each in on_line(rollbacks) if each.to.round <= records.round]
    if not passed:
        return records, 0
    return head_after(passed[-1]) if passed[-1].to.round == records.round else records, passed[-1].number


def turned(head: Head, branch: int, rollbacks: Sequence[Rollback]) -> tuple[Head, int]:
    """Head and branch once the rollbacks are followed that turn the log exactly here."""
    while (due := next_turn(head.round, branch, rollbacks)) is not None:
        assert due.to.round == head.round, f"rollback {due.number} goes back to {due.to.round}, before {head.round}"
        head, branch = head_after(due), due.number
    return head, branch


def ranges_of(record: Record) -> tuple[DataRange, ...]:
    return tuple(span for contribution in record.contributions for span in contribution.ranges)


def check_link(record: Record, head: Head, manifest: Manifest) -> None:
    """Refuse a record that does not follow this head."""
    if record.run != manifest.run:
        raise Refused(Code.RECORD_BAD, f"record of run {canonical.shown(record.run)}, expected {manifest.run}")
    if record.round != head.round:
        raise Refused(Code.RECORD_BAD, f"record of round {record.round}, expected {head.round}")
    if record.previous != head.hash:
        what = f"record {record.round} follows {canonical.shown(record.previous[:12])}, expected {head.hash[:12]}"
        raise Refused(Code.RECORD_BAD, what)


def check_certificate(entry: LogEntry, roster: Roster) -> None:
    """Refuse what a strict majority of this roster, that of the certificate's ballot, did not sign.

    The record may name an earlier roster: a newer leader proposes again, unchanged, what members had accepted.
    """
    record, certificate = entry.record, entry.certificate
    if record.run != roster.run or certificate.ballot.epoch != roster.epoch or record.epoch > roster.epoch:
        raise Refused(Code.RECORD_BAD, f"certificate under roster {certificate.ballot.epoch}, expected {roster.epoch}")
    if certificate.record != record_hash(record):
        raise Refused(Code.RECORD_BAD, f"certificate of another record than {record.round}")
    _check_signers(certificate, roster)
    body = vote_bytes(VoteBody(record.run, record.round, certificate.ballot, certificate.record))
    for signature in certificate.signatures:
        identity.verify(signature.node, VOTE, body, signature.value)


def is_certified(entry: LogEntry, roster: Roster) -> bool:
    """The same as a question."""
    try:
        check_certificate(entry, roster)
    except Refused:
        return False
    return True


def check_record_shape(record: Record, parameters: int) -> None:
    """Refuse what no honest leader proposes: members twice, empty ranges, parts that overlap or leave the chunks."""
    if record.round < 0 or record.epoch < 0:
        raise Refused(Code.RECORD_BAD, f"round {record.round} under roster {record.epoch}")
    check_contributions(record)
    if not 0 < len(record.parts) <= MEMBERS_MAX:
        raise Refused(Code.RECORD_BAD, f"{len(record.parts)} parts, expected 1 to {MEMBERS_MAX}")
    index, stop, gathered = -1, 0, record.exchange is Exchange.ALL_GATHER
    members = {contribution.node for contribution in record.contributions}
    for part in record.parts:
        _check_part(part, parameters, members)
        if part.index <= index or (part.start < stop and not gathered):
            raise Refused(Code.RECORD_BAD, f"part {part.index} from {part.start} after part {index} up to {stop}")
        index, stop = part.index, part.stop
    if gathered:
        _check_gathered(record, parameters)


def check_contributions(record: Record) -> None:
    """Refuse more contributions than anybody reads, or such as no honest member brings: before any signature is checked,
    of which each has one and as many more as grants."""
    members = [contribution.node for contribution in record.contributions]
    if not 0 < len(members) <= MEMBERS_MAX or len(set(members)) != len(members):
        raise Refused(Code.RECORD_BAD, f"{len(members)} contributions, expected 1 to {MEMBERS_MAX} distinct members")
    for contribution in record.contributions:
        check_shape(contribution)


def check_members(record: Record, roster: Roster) -> None:
    """Refuse members that the record's own roster does not list, and weights above its caps."""
    assert record.epoch == roster.epoch
    for contribution in record.contributions:
        member = roster.member(contribution.node)
        if member is None or contribution.tokens > member.weight_cap:
            cap = None if member is None else member.weight_cap
            what = f"{contribution.tokens} tokens of {canonical.shown(contribution.node[:12])}, its cap is {cap}"
            raise Refused(Code.RECORD_BAD, what)
    for node in (record.leader, *(part.reducer for part in record.parts)):
        if roster.member(node) is None:
            raise Refused(Code.RECORD_BAD, f"{canonical.shown(node[:12])} is not in roster {roster.epoch}")


def check_brought(record: Record) -> None:
    """Refuse a record that gives a member what it did not bring, or weight that was not granted to it."""
    for contribution in record.contributions:
        check_genuine(record.run, record.round, record.previous, contribution)


def is_brought(record: Record) -> bool:
    """The same as a question."""
    try:
        check_brought(record)
    except Refused:
        return False
    return True


def check_ranges(record: Record, consumed: Consumed) -> None:
    """Refuse data that an earlier record consumed, or that the record names twice."""
    taken = Consumed()
    for span in ranges_of(record):
        check_range(span)
        if consumed.overlaps(span) or taken.overlaps(span):
            where = f"[{span.start}, {span.stop}) of shard {span.shard[:12]} in pass {span.pass_number}"
            raise Refused(Code.RECORD_BAD, f"data {where} counts twice")
        taken = taken.with_ranges((span,))


def spans(parameters: int, roles: Sequence[Role]) -> tuple[tuple[int, int], ...]:
    """Which values each member reduces: equal shares cut between chunks, none for clients, more for helpers.

    A group of clients only has nobody to reduce; all its spans are empty.
    """
    shares = [{Role.PEER: 1, Role.CLIENT: 0, Role.HELPER: HELPER_SHARES}[role] for role in roles]
    chunks, total = -(-parameters // CHUNK_VALUES), sum(shares) or 1
    cuts = [chunks * sum(shares[:index]) // total * CHUNK_VALUES for index in range(len(shares) + 1)]
    return tuple((min(low, parameters), min(high, parameters)) for low, high in pairwise(cuts))


def _check_signers(certificate: Certificate, roster: Roster) -> None:
    signers = [signature.node for signature in certificate.signatures]
    strangers = [node for node in signers if roster.member(node) is None]
    if strangers or len(set(signers)) != len(signers):
        what = f"certificate with {len(strangers)} strangers and {len(signers) - len(set(signers))} double votes"
        raise Refused(Code.RECORD_BAD, what)
    if len(signers) < roster.quorum:
        raise Refused(Code.RECORD_BAD, f"{len(signers)} votes, {roster.quorum} of {len(roster.members)} certify")


def _check_gathered(record: Record, parameters: int) -> None:
    """Each part is one contribution, all of it, and each contribution is a part that weighs something."""
    for part in record.parts:
        if part.included != (part.reducer,) or (part.start, part.stop) != (0, parameters):
            members = len(part.included)
            what = f"part {part.index} of [{part.start}, {part.stop}) by {members} members, expected all by one"
            raise Refused(Code.RECORD_BAD, what)
    tokens = {contribution.node: contribution.tokens for contribution in record.contributions}
    if sorted(part.reducer for part in record.parts) != sorted(tokens) or not all(tokens.values()):
        what = f"{len(record.parts)} parts of {len(tokens)} contributions, expected one of each that has tokens"
        raise Refused(Code.RECORD_BAD, what)


def _check_part(part: Part, parameters: int, members: set[NodeId]) -> None:
    at_chunks = part.start % CHUNK_VALUES == 0 and (part.stop % CHUNK_VALUES == 0 or part.stop == parameters)
    if not at_chunks or not 0 <= part.start < part.stop <= parameters:
        what = f"part {part.index} of [{part.start}, {part.stop}), expected chunks of {CHUNK_VALUES} below {parameters}"
        raise Refused(Code.RECORD_BAD, what)
    if part.size <= 0 or not _DIGEST.fullmatch(part.digest):
        raise Refused(Code.RECORD_BAD, f"part {part.index} of {part.size} bytes, {canonical.shown(part.digest)}")
    included = set(part.included)
    if not included or len(included) != len(part.included) or not included <= members:
        raise Refused(Code.RECORD_BAD, f"part {part.index} includes others than the record's members")
