"""The ledger: who contributed what, and whether every row of the books is what the log says. Knows no database.

A balance is a sum over certified records, never a field. Everything else in the books is recomputed as well, from
the manifest on, along every branch; the first row that is not what it should be is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.core.leases import Leases
from coordinator.core.rosters import may_follow
from coordinator.core.strikes import Mark, shut, void
from protocol import canonical, identity
from protocol.errors import Refused
from protocol.log import (
    check_brought,
    check_certificate,
    check_members,
    check_ranges,
    check_record_shape,
    genesis_head,
    head_after,
    ranges_of,
    record_hash,
)
from protocol.state import Consumed
from protocol.types import (
    BaseCheckpoint,
    DataRange,
    Digest,
    Head,
    LogEntry,
    Manifest,
    NodeId,
    Rollback,
    Roster,
    RoundNumber,
    Shard,
    SignedManifest,
    SignedRollback,
    SignedRoster,
)

SHORT = 12  # digits of a hash that tell rows apart


@dataclass(frozen=True)
class EntryRow:
    """A record as the database has it: its own columns, and the bytes beside them."""

    round: int
    hash: str
    entry: LogEntry
    undone_by: int | None = None  # number of a rollback


@dataclass(frozen=True)
class EvaluationRow:
    round: int
    tokens: int
    undone_by: int | None = None


@dataclass(frozen=True)
class Books:
    """All rows that follow from the log, as they were at one moment. Mappings go from a row's key to its value."""

    manifest: SignedManifest
    rosters: Mapping[int, SignedRoster] = field(default_factory=dict)
    rollbacks: Mapping[int, SignedRollback] = field(default_factory=dict)
    entries: tuple[EntryRow, ...] = ()
    parts: Mapping[Digest, str] = field(default_factory=dict)  # hash of a record that names it
    credit: Mapping[NodeId, int] = field(default_factory=dict)  # tokens
    names: Mapping[NodeId, str] = field(default_factory=dict)
    trails: Mapping[NodeId, tuple[Mark, ...]] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    leases: Leases = field(default_factory=lambda: Leases(()))
    bases: Mapping[int, BaseCheckpoint] = field(default_factory=dict)
    evaluations: tuple[EvaluationRow, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A row that is not what the log says."""

    table: str
    key: str
    says: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.table}, {self.key}: it says {self.says}; the log says {self.wanted}"


class Wrong(Exception):
    """The first wrong row ends the check: what would be computed from it means nothing."""

    def __init__(self, table: str, key: str, *, says: str, wanted: str) -> None:
        self.finding = Finding(table, key, says, wanted)
        super().__init__(str(self.finding))


@dataclass(frozen=True)
class Balance:
    """What one node brought into certified records. A rollback undoes records, not the work in them."""

    node: NodeId
    name: str
    tokens: int
    undone_tokens: int
    rounds: int
    undone_rounds: int
    frozen_tokens: int = 0  # of contributions that audits found void, and of all on the line after it was shut out


@dataclass(frozen=True)
class Log:
    """What the records and rollbacks say, once all are followed."""

    story: tuple[LogEntry | Rollback, ...]  # in the order in which it happened
    line: tuple[LogEntry, ...]  # what all rollbacks leave
    branches: tuple[int, ...]  # of each record of the line
    branch: int
    hashes: tuple[Digest, ...]  # of the manifest and of each record of the line
    states: Mapping[int, Digest]  # by round, as far as records tell
    tokens: tuple[int, ...]  # in the first 0, 1, 2 … records
    consumed: Consumed


def balances(books: Books, now_ms: int = 0) -> tuple[Balance, ...]:
    """Credit per node, the largest first."""
    sums: dict[NodeId, list[int]] = {node: [0, 0, 0, 0, 0] for node in books.credit}
    out = {node: mark for node, trail in books.trails.items() if (mark := shut(trail, now_ms)) is not None}
    nothing = {node: void(trail) for node, trail in books.trails.items()}
    for row in books.entries:
        undone = int(row.undone_by is not None)
        for each in row.entry.record.contributions:
            mine = sums.setdefault(each.node, [0, 0, 0, 0, 0])
            late = each.node in out and not undone and row.round >= out[each.node].round
            frozen = late or each.update in nothing.get(each.node, ())
            for place, more in enumerate((each.tokens, undone * each.tokens, 1, undone, frozen * each.tokens)):
                mine[place] += more
    found = (Balance(node, books.names.get(node, ""), *mine) for node, mine in sums.items())
    return tuple(sorted(found, key=lambda each: (-each.tokens, each.node)))


def credited(entries: Iterable[LogEntry], trails: Mapping[NodeId, Sequence[Mark]]) -> dict[NodeId, int]:
    """Tokens per node in these records, without the contributions that audits found void."""
    nothing = {node: void(trail) for node, trail in trails.items()}
    sums: dict[NodeId, int] = {}
    for each in (each for entry in entries for each in entry.record.contributions):
        if each.update not in nothing.get(each.node, ()):
            sums[each.node] = sums.get(each.node, 0) + each.tokens
    return sums


def first_wrong(books: Books) -> Finding | None:
    """The first row that is not what the log says; none when all are."""
    try:
        check(books)
    except Wrong as wrong:
        return wrong.finding
    return None


def check(books: Books) -> Log:
    """What the log says. Raises Wrong with the first row that says something else."""
    log = _follow(books)
    _check_parts(books)
    _check_credit(books)
    _check_leases(books.leases, log.consumed)
    _check_bases(books, log)
    return log


# the log


@dataclass
class _Line:
    """The log while it is followed. Lists have one item for each number of records, from 0 on."""

    manifest: Manifest
    links: list[Digest]  # what the next record follows: a record, or the rollback that turned there
    records: list[Digest]  # the last record, whatever turned there
    rows: list[EntryRow] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)  # of each row
    tokens: list[int] = field(default_factory=lambda: [0])
    states: dict[int, Digest] = field(default_factory=dict)
    consumed: Consumed = field(default_factory=Consumed)
    branch: int = 0
    epoch: int = -1  # of the newest certificate


def _follow(books: Books) -> Log:
    """Every record and rollback in the order in which it happened, each checked against those before it."""
    manifest = _manifest(books.manifest)
    if (data := canonical.digest(books.shards)) != manifest.data:
        raise Wrong("shards", "all", says=f"data {data[:12]}", wanted=f"data {manifest.data[:12]}")
    rosters = _rosters(books, manifest)
    _check_rollbacks(books, manifest)
    segments = _segments(books, rosters)
    start = genesis_head(manifest).hash
    line = _Line(manifest, [start], [start], states={0: manifest.genesis})
    story: list[LogEntry | Rollback] = []
    passed = False
    for number in range(len(books.rollbacks) + 1):
        if number:
            rollback = books.rollbacks[number].rollback
            if _overtaken(rollback, line, books, segments):
                passed = True
                continue
            _turn(line, rollback, books.evaluations, passed=passed)
            passed = False
            story.append(rollback)
        for row in segments.get(number, ()):
            _append(line, row, rosters)
            story.append(row.entry)
    for row in line.rows:
        if row.undone_by is not None:
            raise Wrong("entries", _key(row), says=f"undone by rollback {row.undone_by}", wanted="that it stays")
    _check_evaluations(line, books.evaluations, None)
    return Log(
        story=tuple(story),
        line=tuple(row.entry for row in line.rows),
        branches=tuple(line.branches),
        branch=line.branch,
        hashes=tuple(line.records),
        states=line.states,
        tokens=tuple(line.tokens),
        consumed=line.consumed,
    )


def _manifest(signed: SignedManifest) -> Manifest:
    try:
        return identity.check_manifest(identity.coordinator_key(signed.manifest.run), signed)
    except Refused as refused:
        raise Wrong("meta", "manifest", says=refused.what, wanted="one that the run's key signed") from None


def _rosters(books: Books, manifest: Manifest) -> dict[int, Roster]:
    """All rosters by epoch, each the run's own, and none a step that no promise of those who left could make safe."""
    found: dict[int, Roster] = {}
    coordinator = identity.coordinator_key(manifest.run)
    last: Roster | None = None
    for epoch, signed in sorted(books.rosters.items()):
        key = f"epoch {epoch}"
        try:
            roster = identity.check_roster(coordinator, signed)
        except Refused as refused:
            raise Wrong("rosters", key, says=refused.what, wanted="one that the run's key signed") from None
        if (roster.run, roster.epoch) != (manifest.run, epoch):
            says = f"roster {roster.epoch} of run {canonical.shown(roster.run)}"
            raise Wrong("rosters", key, says=says, wanted=f"roster {epoch} of run {manifest.run}")
        if roster.manifest != (promised := genesis_head(manifest).hash):
            raise Wrong("rosters", key, says=f"manifest {roster.manifest[:12]}", wanted=f"manifest {promised[:12]}")
        if not roster.members:
            raise Wrong("rosters", key, says="nobody", wanted="at least one member")
        if last is not None:
            _check_succession(key, last, roster)
        found[epoch] = last = roster
    return found


def _check_succession(key: str, last: Roster, roster: Roster) -> None:
    if roster.branch < last.branch:
        raise Wrong("rosters", key, says=f"branch {roster.branch}", wanted=f"branch {last.branch} or later")
    if roster.branch > last.branch or roster.after != last.epoch:
        return  # the first of a branch need not meet older ones; one that is missing would have stood between
    if roster.floor < last.floor:
        raise Wrong("rosters", key, says=f"from round {roster.floor} on", wanted=f"round {last.floor} or later")
    left = set(last.nodes) - set(roster.nodes)  # seals are not kept; take it that everybody who left gave one
    if not may_follow(last.nodes, roster.nodes, left):
        says = f"{len(roster.members)} members after {len(last.members)}"
        raise Wrong("rosters", key, says=says, wanted="a majority that meets every majority before it")


def _check_rollbacks(books: Books, manifest: Manifest) -> None:
    coordinator = identity.coordinator_key(manifest.run)
    for wanted, (number, signed) in enumerate(sorted(books.rollbacks.items()), 1):
        key = f"number {number}"
        try:
            rollback = identity.check_rollback(coordinator, signed)
        except Refused as refused:
            raise Wrong("rollbacks", key, says=refused.what, wanted="one that the run's key signed") from None
        if not rollback.number == number == wanted or rollback.run != manifest.run:
            says = f"rollback {rollback.number} of run {canonical.shown(rollback.run)}"
            raise Wrong("rollbacks", key, says=says, wanted=f"rollback {wanted} of run {manifest.run}")


def _segments(books: Books, rosters: Mapping[int, Roster]) -> dict[int, list[EntryRow]]:
    """The records of each branch, in order. A record is of the branch of the roster that certified it."""
    found: dict[int, list[EntryRow]] = {}
    for row in books.entries:
        epoch = row.entry.certificate.ballot.epoch
        for each in (epoch, row.entry.record.epoch):
            if each not in rosters:
                raise Wrong("entries", _key(row), says=f"roster {each}", wanted="no such roster")
        branch = rosters[epoch].branch
        if not 0 <= branch <= len(books.rollbacks):
            raise Wrong("entries", _key(row), says=f"branch {branch}", wanted=f"{len(books.rollbacks)} rollbacks")
        found.setdefault(branch, []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row.round)
    return found


def _overtaken(rollback: Rollback, line: _Line, books: Books, segments: Mapping[int, Sequence[EntryRow]]) -> bool:
    """Whether the log never came to follow this one: its coordinator heard of it and of a later, deeper one at once."""
    beyond = line.rows[rollback.to.round :]
    if rollback.to.round < len(line.links) and (not beyond or beyond[0].undone_by == rollback.number):
        return False
    for later in range(rollback.number, len(books.rollbacks)):
        if segments.get(later):
            return False
        if books.rollbacks[later + 1].rollback.to.round <= rollback.to.round:
            return True
    return False


def _append(line: _Line, row: EntryRow, rosters: Mapping[int, Roster]) -> None:
    record, certificate, key = row.entry.record, row.entry.certificate, _key(row)
    head = Head(RoundNumber(len(line.rows)), line.links[-1])
    hashed = record_hash(record)
    if (row.round, row.hash) != (record.round, hashed):
        wanted = f"round {record.round}, hash {hashed[:SHORT]}"
        raise Wrong("entries", key, says=f"round {row.round}, hash {canonical.shown(row.hash[:SHORT])}", wanted=wanted)
    if record.run != line.manifest.run:
        raise Wrong("entries", key, says=f"run {canonical.shown(record.run)}", wanted=f"run {line.manifest.run}")
    if record.round > head.round:
        raise Wrong("entries", f"round {head.round}", says="nothing", wanted=f"a record before that of {key}")
    if (record.round, record.previous) != (head.round, head.hash):
        says = f"round {record.round} after {canonical.shown(record.previous[:SHORT])}"
        raise Wrong("entries", key, says=says, wanted=f"round {head.round} after {head.hash[:SHORT]}")
    own, ballot = rosters[record.epoch], rosters[certificate.ballot.epoch]
    if own.branch != ballot.branch:
        says = f"roster {own.epoch} of branch {own.branch}"
        raise Wrong("entries", key, says=says, wanted=f"a roster of branch {ballot.branch}")
    if ballot.epoch < line.epoch or ballot.floor > record.round:
        wanted = f"round {record.round}, and a roster no older than {line.epoch}"
        raise Wrong("entries", key, says=f"roster {ballot.epoch} from round {ballot.floor} on", wanted=wanted)
    if line.states.setdefault(record.round, record.state) != record.state:
        says = f"state {canonical.shown(record.state[:SHORT])}"
        raise Wrong("entries", key, says=says, wanted=f"state {line.states[record.round][:SHORT]}")
    try:
        check_record_shape(record, line.manifest.parameters)
        check_members(record, own)
        check_brought(record)
        check_ranges(record, line.consumed)
        check_certificate(row.entry, ballot)
    except Refused as refused:
        raise Wrong("entries", key, says=refused.what, wanted="what a majority can have certified") from None
    line.rows.append(row)
    line.branches.append(line.branch)
    line.links.append(hashed)
    line.records.append(hashed)
    line.tokens.append(line.tokens[-1] + _tokens(row.entry))
    line.consumed = line.consumed.with_ranges(ranges_of(record))
    line.epoch = ballot.epoch


def _turn(line: _Line, rollback: Rollback, evaluations: Iterable[EvaluationRow], *, passed: bool) -> None:
    """Follow a rollback: what it undoes leaves the line, and is marked with its number.

    Of what was undone only what is here is compared: a coordinator that was restored from a backup may lack some of
    it, and where it passed over a rollback, it may have had other records instead."""
    to, undone, key = rollback.to, rollback.undone, f"number {rollback.number}"
    if to.round >= len(line.links) or to.hash != line.records[to.round]:
        known = f"{line.records[to.round][:SHORT]} there" if to.round < len(line.links) else f"{len(line.rows)} records"
        says = f"back to round {to.round}, {canonical.shown(to.hash[:SHORT])}"
        raise Wrong("rollbacks", key, says=says, wanted=known)
    if not passed and undone.round < len(line.links) and undone.hash != line.links[undone.round]:
        says = f"head {canonical.shown(undone.hash[:SHORT])} at round {undone.round}"
        raise Wrong("rollbacks", key, says=says, wanted=f"head {line.links[undone.round][:SHORT]}")
    for row in line.rows[to.round :]:
        if row.undone_by != rollback.number:
            says = "that it stays" if row.undone_by is None else f"undone by rollback {row.undone_by}"
            raise Wrong("entries", _key(row), says=says, wanted=f"undone by rollback {rollback.number}")
    _check_evaluations(line, evaluations, rollback)
    del line.rows[to.round :], line.branches[to.round :]
    del line.links[to.round + 1 :], line.records[to.round + 1 :], line.tokens[to.round + 1 :]
    line.links[to.round] = head_after(rollback).hash
    line.states = {number: state for number, state in line.states.items() if number <= to.round}
    line.consumed = Consumed().with_ranges(span for row in line.rows for span in ranges_of(row.entry.record))
    line.branch = rollback.number


def _check_evaluations(line: _Line, evaluations: Iterable[EvaluationRow], undone: Rollback | None) -> None:
    """The evaluations that this rollback undoes, or those that stay: of states on the line, with the tokens in them."""
    number, after = (undone.number, undone.to.round) if undone is not None else (None, -1)
    for row in evaluations:
        if row.undone_by != number:
            continue
        key = f"round {row.round}" + (f", undone by rollback {number}" if undone is not None else "")
        if not after < row.round < len(line.tokens):
            wanted = f"{after + 1} to {len(line.rows)} records"
            raise Wrong("evaluations", key, says=f"measured after {row.round} records", wanted=wanted)
        if row.tokens != line.tokens[row.round]:
            wanted = f"{line.tokens[row.round]:,} tokens"
            raise Wrong("evaluations", key, says=f"{row.tokens:,} tokens", wanted=wanted)


# what follows from it


def _check_parts(books: Books) -> None:
    named = {(part.digest, row.hash): row for row in books.entries for part in row.entry.record.parts}
    for digest, record in books.parts.items():
        if (digest, record) not in named:
            says = f"a part of record {canonical.shown(record[:SHORT]) or 'nothing'}"
            raise Wrong("parts", canonical.shown(digest[:SHORT]), says=says, wanted="no such part")
    for (digest, _), row in named.items():
        if digest not in books.parts:
            raise Wrong("parts", digest[:SHORT], says="nothing", wanted=f"a part of {_key(row)}")


def _check_credit(books: Books) -> None:
    for each in balances(books):
        stored = books.credit.get(each.node)
        if stored != each.tokens:
            key = f"{canonical.shown(each.name)} {each.node[:SHORT]}".strip()
            says = "nothing" if stored is None else f"{stored:,} tokens"
            raise Wrong("nodes", key, says=says, wanted=f"{each.tokens:,} tokens")


def _check_leases(leases: Leases, consumed: Consumed) -> None:
    """Every sequence that was ever granted is consumed, held or given back, and only one of them; no other is any."""
    granted = _granted(leases)
    for (pass_number, shard), bounds in sorted(consumed.bounds.items()):
        if bounds[-1] > granted.get((pass_number, shard), 0):
            where = _place(DataRange(pass_number, shard, bounds[0], bounds[-1]))
            raise Wrong("cursor", "id 0", says="that it was never granted", wanted=f"that {where} was consumed")
    taken = consumed
    for lease_id, lease in leases.held.items():
        key = f"lease_id {canonical.shown(lease_id)}"
        if lease.lease_id != lease_id or not _given_before(lease_id, leases.serial):
            wanted = f"a lease below {leases.serial:x}"
            raise Wrong("leases", key, says=f"lease {canonical.shown(lease.lease_id)}", wanted=wanted)
        taken = _take(taken, lease.range, granted, "leases", key)
    for position, span in enumerate(leases.returned):
        taken = _take(taken, span, granted, "returned", f"position {position}")
    for (pass_number, shard), stop in granted.items():
        if stop and not taken.covers(whole := DataRange(pass_number, shard, 0, stop)):
            says = f"that {_place(_first_gap(taken, whole))} was granted"
            raise Wrong("cursor", "id 0", says=says, wanted="neither that it was consumed nor who has it")


def _granted(leases: Leases) -> dict[tuple[int, Digest], int]:
    """How many sequences of each shard were ever granted in each pass."""
    cursor, shards = leases.cursor, leases.shards
    inside = 0 <= cursor.shard < len(shards) and 0 <= cursor.start <= shards[cursor.shard].sequences
    if cursor.pass_number < 0 or not (inside or (not shards and cursor.shard == cursor.start == 0)):
        says = f"sequence {cursor.start} of shard {cursor.shard} in pass {cursor.pass_number}"
        raise Wrong("cursor", "id 0", says=says, wanted=f"{len(shards)} shards")
    granted = {
        (number, shard.digest): shard.sequences if number < cursor.pass_number or index < cursor.shard else 0
        for number in range(cursor.pass_number + 1)
        for index, shard in enumerate(shards)
    }
    if shards:
        granted[cursor.pass_number, shards[cursor.shard].digest] = cursor.start
    return granted


def _take(
    taken: Consumed, span: DataRange, granted: Mapping[tuple[int, Digest], int], table: str, key: str
) -> Consumed:
    if not 0 <= span.start < span.stop <= granted.get((span.pass_number, span.shard), 0):
        raise Wrong(table, key, says=_place(span), wanted="that it was never granted")
    if taken.overlaps(span):
        raise Wrong(table, key, says=_place(span), wanted="that some of it was consumed, or is in another row")
    return taken.with_ranges((span,))


def _given_before(lease_id: str, serial: int) -> bool:
    try:
        return 0 <= int(lease_id, 16) < serial
    except ValueError:
        return False


def _first_gap(taken: Consumed, whole: DataRange) -> DataRange:
    bounds = taken.bounds.get((whole.pass_number, whole.shard), ())
    start = bounds[1] if bounds and bounds[0] == 0 else 0
    stop = next((bound for bound in bounds[::2] if bound > start), whole.stop)
    return DataRange(whole.pass_number, whole.shard, start, stop)


def _check_bases(books: Books, log: Log) -> None:
    if 0 not in books.bases:
        raise Wrong("bases", "round 0", says="nothing", wanted="that the run began with one")
    for number, base in sorted(books.bases.items()):
        key = f"round {number}"
        if base.round != number or not 0 <= number < len(log.hashes):
            raise Wrong("bases", key, says=f"the state after {base.round} records", wanted=f"{len(log.line)} records")
        if base.head != log.hashes[number]:
            says = f"head {canonical.shown(base.head[:SHORT])}"
            raise Wrong("bases", key, says=says, wanted=f"head {log.hashes[number][:SHORT]}")
        begun = log.branches[number - 1] if number else 0  # the branch of the record before it
        if not begun <= base.branch <= log.branch:
            wanted = f"branch {begun} to {log.branch}"
            raise Wrong("bases", key, says=f"branch {base.branch}", wanted=wanted)
        if log.states.get(number, base.state) != base.state:
            says = f"state {canonical.shown(base.state[:SHORT])}"
            raise Wrong("bases", key, says=says, wanted=f"state {log.states[number][:SHORT]}")


# words


def _tokens(entry: LogEntry) -> int:
    return sum(contribution.tokens for contribution in entry.record.contributions)


def _key(row: EntryRow) -> str:
    return f"round {row.round}, {canonical.shown(row.hash[:SHORT])}"


def _place(span: DataRange) -> str:
    return f"[{span.start}, {span.stop}) of shard {canonical.shown(span.shard[:SHORT])} in pass {span.pass_number}"
