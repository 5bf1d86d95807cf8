"""The ledger: true books pass; books with any one row changed are refused, and that row is named."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import leases as data
from coordinator.core.leases import Cursor, Leases
from coordinator.core.ledger import Books, EntryRow, EvaluationRow, balances, check, first_wrong
from coordinator.core.strikes import By, Kind, Mark, by_node
from protocol import canonical, identity
from protocol.contribution import sign, sign_grant
from protocol.identity import Key, peer_id_of
from protocol.limits import CHUNK_VALUES
from protocol.log import VOTE, genesis_head, head_after, next_head, ranges_of, record_hash, vote_bytes
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Certificate,
    Contribution,
    DataRange,
    Fault,
    Grant,
    LogEntry,
    Manifest,
    Member,
    Part,
    Record,
    Rollback,
    Roster,
    Shard,
    Signature,
    VoteBody,
)

OWNER = Key.generate()
RUN = identity.run_id(OWNER.public, "test")
KEYS = {key.public: key for key in (Key.generate() for _ in range(5))}
NODES = tuple(KEYS)
SHARDS = (Shard("aa" * 32, 4096, 2048, 24), Shard("bb" * 32, 2048, 1024, 16))
PARAMETERS = 2 * CHUNK_VALUES
MANIFEST = Manifest(
    RUN, "test", "{}", "{}", None, 257, PARAMETERS, "01" * 32, "00" * 32, 16, 2, canonical.digest(SHARDS), "5.0"
)


def state_of(number, branch):
    return f"{branch:02x}{number:062x}" if number else MANIFEST.genesis


class Run:
    """A coordinator of a dozen lines: rounds, rollbacks and rosters in, books out."""

    def __init__(self):
        self.head, self.branch, self.line = genesis_head(MANIFEST), 0, []
        self.books = Books(identity.sign_manifest(OWNER, MANIFEST), shards=SHARDS, leases=Leases(SHARDS))
        self.books = replace(self.books, names=dict.fromkeys(NODES, "name"), credit=dict.fromkeys(NODES, 0))
        self.base()

    def change(self, **changes):
        self.books = replace(self.books, **changes)

    def roster(self, *nodes, epoch=None, **changes):
        epoch = len(self.books.rosters) if epoch is None else epoch
        members = tuple(Member(n, peer_id_of(KEYS[n].public_bytes), (), 1000) for n in nodes)
        after = max(self.books.rosters, default=-1)
        manifest = genesis_head(MANIFEST).hash
        roster = Roster(RUN, epoch, members, 7, self.head.round, self.branch, manifest, after)
        self.change(rosters=self.books.rosters | {epoch: identity.sign_roster(OWNER, replace(roster, **changes))})

    def brings(self, node, leases):
        ranges = tuple(lease.range for lease in leases)
        grants = tuple(Grant(span, sign_grant(OWNER, RUN, node, span)) for span in ranges)
        told = Contribution(node, 32, ranges, grants, "22" * 32)
        return sign(KEYS[node], RUN, self.head.round, self.head.hash, told)

    def round(self, *, own_epoch=None, **changes):
        """One record: each member trains on two sequences, one lease is left half used, one is given back."""
        newest = self.books.rosters[max(self.books.rosters)].roster
        roster = newest if own_epoch is None else self.books.rosters[own_epoch].roster
        leases, contributions = self.books.leases, []
        for node in roster.nodes:
            leases, granted = data.grant(leases, node, sequences=2, largest=2, until_ms=9)
            contributions.append(self.brings(node, granted))
        leases, (kept,) = data.grant(leases, NODES[0], sequences=1, largest=1, until_ms=9)
        if self.head.round % 2:
            leases = data.give_back(leases, [kept.lease_id])
        number = self.head.round
        parts = tuple(
            Part(i, i * CHUNK_VALUES, (i + 1) * CHUNK_VALUES, f"{self.branch:02x}{number:060x}{i:02x}", 9,
                 roster.nodes[0], roster.nodes)
            for i in range(2)
        )  # fmt: skip
        before = self.branch_of_state(number)
        record = Record(
            RUN,
            number,
            self.head.hash,
            roster.epoch,
            roster.nodes[0],
            tuple(contributions),
            parts,
            state_of(number, before),
        )
        entry = signed(replace(record, **changes), newest)
        row = EntryRow(number, record_hash(entry.record), entry)
        self.change(
            entries=(*self.books.entries, row),
            leases=data.consume(leases, ranges_of(entry.record)),
            parts=self.books.parts | {part.digest: row.hash for part in parts},
            credit=self.books.credit
            | {each.node: self.books.credit[each.node] + each.tokens for each in entry.record.contributions},
        )
        self.line.append((row, self.branch))
        self.head = next_head(entry.record)

    def branch_of_state(self, number):
        return self.line[number - 1][1] if number else 0

    def evaluate(self):
        tokens = sum(32 * len(row.entry.record.contributions) for row, _ in self.line)
        self.change(evaluations=(*self.books.evaluations, EvaluationRow(self.head.round, tokens)))

    def base(self):
        number = self.head.round
        hashed = self.line[-1][0].hash if self.line else genesis_head(MANIFEST).hash
        made = BaseCheckpoint(
            number, hashed, state_of(number, self.branch_of_state(number)), BlobRef("22" * 32, 99), self.branch
        )
        self.change(bases=self.books.bases | {number: made})

    def rollback(self, to):
        number = len(self.books.rollbacks) + 1
        hashed = self.line[to - 1][0].hash if to else genesis_head(MANIFEST).hash
        body = Rollback(RUN, number, replace(self.head, round=to, hash=hashed), self.head, "loss", 9)
        gone = {row.hash for row, _ in self.line[to:]}
        spans = [span for row, _ in self.line[to:] for span in ranges_of(row.entry.record)]
        leases = self.books.leases
        self.change(
            rollbacks=self.books.rollbacks | {number: identity.sign_rollback(OWNER, body)},
            entries=tuple(replace(r, undone_by=number) if r.hash in gone else r for r in self.books.entries),
            evaluations=tuple(
                replace(e, undone_by=number) if e.undone_by is None and e.round > to else e
                for e in self.books.evaluations
            ),
            bases={at: base for at, base in self.books.bases.items() if at <= to},
            leases=replace(leases, returned=(*leases.returned, *spans)),
        )
        del self.line[to:]
        self.head, self.branch = head_after(body), number


def signed(record, roster, attempt=0, signers=None):
    hashed = record_hash(record)
    ballot = Ballot(roster.epoch, attempt)
    body = vote_bytes(VoteBody(record.run, record.round, ballot, hashed))
    voters = roster.nodes[: roster.quorum] if signers is None else signers
    return LogEntry(
        record, Certificate(hashed, ballot, tuple(Signature(node, KEYS[node].sign(VOTE, body)) for node in voters))
    )


def a_run():
    """Five rounds, one undone whole branch of two, a turn in place, and two rounds more; data wraps into a second pass."""
    run = Run()
    run.roster(*NODES[:3])
    run.evaluate()
    for _ in range(2):
        run.round()
    run.roster(*NODES[:4])
    run.round(own_epoch=0)  # proposed under the old roster, and again under the new
    run.base()
    run.evaluate()
    for _ in range(2):
        run.round()
    run.base()
    run.evaluate()
    run.rollback(3)
    run.roster(*NODES[:2])
    for _ in range(3):
        run.round()
    run.evaluate()
    run.rollback(6)
    run.roster(NODES[4], NODES[0])
    for _ in range(2):
        run.round()
    run.base()
    run.evaluate()
    return run


TRUE = a_run().books


def entry_at(books, place):
    return books.entries[place].entry


def with_row(place, **changes):
    def change(books):
        rows = list(books.entries)
        rows[place] = replace(rows[place], **changes)
        return replace(books, entries=tuple(rows))

    return change


def with_record(place, *, resigned=True, under=None, **changes):
    """A record that says something else; signed again by its members, if they are all liars."""

    def change(books):
        entry = entry_at(books, place)
        record = replace(entry.record, **changes)
        epoch = entry.certificate.ballot.epoch if under is None else under
        forged = signed(record, books.rosters[epoch].roster) if resigned else replace(entry, record=record)
        return with_row(place, entry=forged, hash=record_hash(record))(books)

    return change


def with_certificate(place, make):
    def change(books):
        entry = entry_at(books, place)
        roster = books.rosters[entry.certificate.ballot.epoch].roster
        return with_row(place, entry=replace(entry, certificate=make(entry, roster)))(books)

    return change


def without_row(place):
    return lambda books: replace(books, entries=tuple(row for row in books.entries if row is not books.entries[place]))


def with_item(table, key, make):
    def change(books):
        rows = dict(getattr(books, table))
        rows[key] = make(rows.get(key))
        return replace(books, **{table: {k: v for k, v in rows.items() if v is not None}})

    return change


def with_roster(at, **changes):
    return with_item("rosters", at, lambda old: identity.sign_roster(OWNER, replace(old.roster, **changes)))


def with_rollback(at, **changes):
    return with_item("rollbacks", at, lambda old: identity.sign_rollback(OWNER, replace(old.rollback, **changes)))


def with_base(at, **changes):
    return with_item("bases", at, lambda old: replace(old, **changes))


def with_evaluation(place, **changes):
    def change(books):
        rows = list(books.evaluations)
        rows[place] = replace(rows[place], **changes)
        return replace(books, evaluations=tuple(rows))

    return change


def with_leases(make):
    return lambda books: replace(books, leases=make(books.leases))


def first_held(leases):
    return next(iter(leases.held.items()))


def moved(leases, by):
    key, lease = first_held(leases)
    span = replace(lease.range, start=lease.range.start + by, stop=lease.range.stop + by)
    return replace(leases, held=leases.held | {key: replace(lease, range=span)})


def contribution(place, number=0, **changes):
    record = TRUE.entries[place].entry.record
    changed = replace(record.contributions[number], **changes)
    return (*record.contributions[:number], changed, *record.contributions[number + 1 :])


FORGED = "11" * 64
A_PART = TRUE.entries[0].entry.record.parts[0].digest
STRANGER = Key.generate().public
WRONG = {
    "manifest": (lambda books: replace(books, manifest=replace(books.manifest, signature=FORGED)), "meta", "manifest"),
    "manifest of another state": (
        lambda books: replace(books, manifest=identity.sign_manifest(OWNER, replace(MANIFEST, genesis="33" * 32))),
        "rosters", "epoch 0",
    ),
    "data that nobody was promised": (lambda books: replace(books, shards=SHARDS[::-1]), "shards", "all"),
    # rosters
    "roster signed by another": (with_item("rosters", 1, lambda old: replace(old, signature=FORGED)), "rosters", "1"),
    "roster changed": (
        with_item("rosters", 1, lambda old: replace(old, roster=replace(old.roster, issued_ms=8))), "rosters", "1",
    ),
    "roster of another run": (with_roster(0, run=identity.run_id(OWNER.public, "other")), "rosters", "epoch 0"),
    "roster under another epoch": (with_roster(1, epoch=9), "rosters", "epoch 1"),
    "roster of a run by another manifest": (with_roster(1, manifest="44" * 32), "rosters", "epoch 1"),
    "roster of nobody": (with_roster(1, members=()), "rosters", "epoch 1"),
    "roster of a branch to come": (with_roster(3, branch=3), "entries", "round 6"),
    "roster of an earlier branch": (with_roster(3, branch=0), "rosters", "epoch 3"),
    "roster that acts from earlier on": (with_roster(0, floor=3), "rosters", "epoch 1"),
    "roster too far from the one before": (
        with_roster(1, members=tuple(Member(n, n, (), 1000) for n in (*NODES, "cc" * 32, "dd" * 32))),
        "rosters", "epoch 1",
    ),
    "roster gone": (with_item("rosters", 2, lambda _: None), "entries", "round 3"),
    # rollbacks
    "rollback signed by another": (
        with_item("rollbacks", 1, lambda old: replace(old, signature=FORGED)), "rollbacks", "number 1",
    ),
    "rollback with another number": (with_rollback(1, number=3), "rollbacks", "number 1"),
    "rollback of another run": (
        with_rollback(1, run=identity.run_id(OWNER.public, "other")), "rollbacks", "number 1",
    ),
    "rollback gone": (with_item("rollbacks", 1, lambda _: None), "rollbacks", "number 2"),
    "last rollback gone": (with_item("rollbacks", 2, lambda _: None), "entries", "round 6"),
    "rollback to another record": (
        with_rollback(1, to=replace(TRUE.rollbacks[1].rollback.to, hash="33" * 32)), "rollbacks", "number 1",
    ),
    "rollback to another round": (
        with_rollback(1, to=replace(TRUE.rollbacks[1].rollback.to, round=2)), "rollbacks", "number 1",
    ),
    "rollback from another head": (
        with_rollback(1, undone=replace(TRUE.rollbacks[1].rollback.undone, hash="33" * 32)), "rollbacks", "number 1",
    ),
    "rollback for another reason": (with_rollback(1, reason="spite"), "entries", "round 3"),
    "rollback that goes further than the log": (
        with_rollback(2, to=replace(TRUE.rollbacks[2].rollback.to, round=60),
                      undone=replace(TRUE.rollbacks[2].rollback.undone, round=60)), "rollbacks", "number 2",
    ),
    # entries
    "record in another round's row": (with_row(1, round=2), "entries", "round 2"),
    "record under another hash": (with_row(1, hash="33" * 32), "entries", "round 1, 333333333333"),
    "record gone": (without_row(1), "entries", "round 1"),
    "undone record gone": (without_row(4), "evaluations", "round 5, undone by rollback 1"),
    "newest record gone": (without_row(-1), "evaluations", "round 8"),
    "record of another run": (with_record(1, run=identity.run_id(OWNER.public, "other")), "entries", "round 1"),
    "record after another": (with_record(1, previous="33" * 32), "entries", "round 1"),
    "record of another round": (with_record(1, round=7), "entries", "round 1"),
    "record from another state": (with_record(5, state="33" * 32), "entries", "round 3"),
    "record under a roster that does not exist": (with_record(1, epoch=77), "entries", "round 1"),
    "record under another branch's roster": (with_record(6, epoch=0), "entries", "round 4"),
    "record led by a stranger": (with_record(1, leader=STRANGER), "entries", "round 1"),
    "record without members": (with_record(1, contributions=()), "entries", "round 1"),
    "record with a stranger's work": (
        with_record(1, contributions=contribution(1, node=STRANGER)), "entries", "round 1",
    ),
    "record above a weight's cap": (with_record(1, contributions=contribution(1, tokens=1001)), "entries", "round 1"),
    "record with data that counts twice": (
        with_record(1, contributions=contribution(1, ranges=contribution(0)[0].ranges)), "entries", "round 1",
    ),
    "record with parts that overlap": (
        with_record(1, parts=2 * TRUE.entries[1].entry.record.parts[:1]), "entries", "round 1",
    ),
    "record that its signers did not see": (
        with_record(0, resigned=False, leader=NODES[1]), "entries", "round 0",
    ),
    "certificate of too few": (
        with_certificate(0, lambda entry, roster: signed(entry.record, roster, signers=roster.nodes[:1]).certificate),
        "entries", "round 0",
    ),
    "certificate with a double vote": (
        with_certificate(0, lambda entry, roster: signed(entry.record, roster, signers=2 * roster.nodes[:1]).certificate),
        "entries", "round 0",
    ),
    "certificate with a stranger": (
        with_certificate(0, lambda entry, roster: signed(entry.record, roster, signers=NODES[3:5]).certificate),
        "entries", "round 0",
    ),
    "certificate with another's signature": (
        with_certificate(0, lambda entry, _: replace(
            entry.certificate,
            signatures=(entry.certificate.signatures[0],
                        Signature(entry.certificate.signatures[1].node, entry.certificate.signatures[0].value)))),
        "entries", "round 0",
    ),
    "certificate of another attempt": (
        with_certificate(0, lambda entry, _: replace(entry.certificate, ballot=Ballot(0, 1))), "entries", "round 0",
    ),
    "certificate under an older roster than the one before": (
        with_record(3, under=0, epoch=0), "entries", "round 3",
    ),
    "record before its roster acts": (with_roster(1, floor=3), "entries", "round 2"),
    "undone record that is said to stay": (with_row(3, undone_by=None), "entries", "round 3"),
    "record undone by another rollback": (with_row(4, undone_by=2), "entries", "round 4"),
    "record that stays, said to be undone": (with_row(9, undone_by=2), "entries", "round 7"),
    "record from before a rollback, said to be undone": (with_row(2, undone_by=1), "entries", "round 2"),
    # what follows
    "part that no record names": (with_item("parts", "99" * 32, lambda _: "33" * 32), "parts", "999999999999"),
    "part of another record": (with_item("parts", A_PART, lambda _: TRUE.entries[1].hash), "parts", A_PART[:12]),
    "part not listed": (with_item("parts", A_PART, lambda _: None), "parts", A_PART[:12]),
    "credit too high": (with_item("credit", NODES[0], lambda old: old + 1), "nodes", NODES[0][:12]),
    "credit too low": (with_item("credit", NODES[1], lambda old: old - 32), "nodes", NODES[1][:12]),
    "credit for nothing": (with_item("credit", STRANGER, lambda _: 5), "nodes", STRANGER[:12]),
    "node gone": (with_item("credit", NODES[3], lambda _: None), "nodes", NODES[3][:12]),
    "cursor too early": (
        with_leases(lambda old: replace(old, cursor=replace(old.cursor, start=old.cursor.start - 1))), "returned", "position 0",
    ),
    "cursor at the beginning": (with_leases(lambda old: replace(old, cursor=Cursor())), "cursor", "id 0"),
    "cursor too late": (
        with_leases(lambda old: replace(old, cursor=replace(old.cursor, start=old.cursor.start + 1))), "cursor", "id 0",
    ),
    "cursor in a later pass": (
        with_leases(lambda old: replace(old, cursor=Cursor(old.cursor.pass_number + 1, 0, 0))), "cursor", "id 0",
    ),
    "cursor at no shard": (with_leases(lambda old: replace(old, cursor=Cursor(0, 9, 0))), "cursor", "id 0"),
    "cursor behind a shard's end": (with_leases(lambda old: replace(old, cursor=Cursor(0, 0, 99))), "cursor", "id 0"),
    "cursor before a lease that it granted": (with_leases(lambda old: replace(old, serial=0)), "leases", "lease_id"),
    "lease gone": (
        with_leases(lambda old: replace(old, held=dict(list(old.held.items())[1:]))), "cursor", "id 0",
    ),
    "lease of consumed data": (with_leases(lambda old: moved(old, -1)), "leases", "lease_id"),
    "lease of data never granted": (with_leases(lambda old: moved(old, 1000)), "leases", "lease_id"),
    "lease under another name": (
        with_leases(lambda old: replace(old, held={"0": first_held(old)[1]} | dict(list(old.held.items())[1:]))),
        "leases", "lease_id 0",
    ),
    "lease under no name": (
        with_leases(lambda old: replace(
            old, held=old.held | {"x": replace(first_held(old)[1], lease_id="x", range=old.returned[0])})),
        "leases", "lease_id x",
    ),
    "data given back twice": (
        with_leases(lambda old: replace(old, returned=(*old.returned, old.returned[0]))), "returned", "position",
    ),
    "data given back that is held": (
        with_leases(lambda old: replace(old, returned=(*old.returned, first_held(old)[1].range))), "returned", "position",
    ),
    "data given back that was consumed": (
        with_leases(lambda old: replace(old, returned=(DataRange(0, SHARDS[0].digest, 0, 1), *old.returned))),
        "returned", "position 0",
    ),
    "data given back and lost": (with_leases(lambda old: replace(old, returned=old.returned[1:])), "cursor", "id 0"),
    "data given back of no shard": (
        with_leases(lambda old: replace(old, returned=(*old.returned, DataRange(0, "ee" * 32, 0, 1)))),
        "returned", "position",
    ),
    "empty data given back": (
        with_leases(lambda old: replace(old, returned=(*old.returned, DataRange(0, SHARDS[0].digest, 3, 3)))),
        "returned", "position",
    ),
    "first base gone": (with_item("bases", 0, lambda _: None), "bases", "round 0"),
    "base of another round": (with_base(3, round=2), "bases", "round 3"),
    "base beyond the log": (
        with_item("bases", 60, lambda _: replace(TRUE.bases[3], round=60)), "bases", "round 60",
    ),
    "base after another record": (with_base(3, head="33" * 32), "bases", "round 3"),
    "base of a branch to come": (with_base(3, branch=3), "bases", "round 3"),
    "base of a branch that was undone there": (with_base(8, branch=1), "bases", "round 8"),
    "base of another state": (with_base(3, state="33" * 32), "bases", "round 3"),
    "first base of another state": (with_base(0, state="33" * 32), "bases", "round 0"),
    "evaluation with other tokens": (with_evaluation(-1, tokens=5), "evaluations", "round 8"),
    "evaluation of another state": (with_evaluation(1, round=2), "evaluations", "round 2"),
    "evaluation beyond the log": (with_evaluation(-1, round=60), "evaluations", "round 60"),
    "evaluation undone that stays": (with_evaluation(1, undone_by=1), "evaluations", "round 3"),
    "undone evaluation with other tokens": (with_evaluation(2, tokens=5), "evaluations", "round 5"),
    "undone evaluation said to stay": (with_evaluation(2, undone_by=None), "evaluations", "round 5"),
}  # fmt: skip


def test_true_books_pass():
    assert first_wrong(TRUE) is None
    log = check(TRUE)
    assert [entry.record.round for entry in log.line] == list(range(8))
    assert log.branches == (0, 0, 0, 1, 1, 1, 2, 2) and log.branch == 2
    assert [type(each).__name__ for each in log.story] == ["LogEntry"] * 5 + ["Rollback"] + ["LogEntry"] * 3 + [
        "Rollback"
    ] + ["LogEntry"] * 2
    assert log.tokens[-1] == 32 * sum(len(entry.record.contributions) for entry in log.line)


def test_the_run_of_these_tests_has_every_kind_of_row():
    assert TRUE.leases.returned and TRUE.leases.held and TRUE.leases.cursor.pass_number == 1
    assert {row.undone_by for row in TRUE.entries} == {None, 1}
    assert {row.undone_by for row in TRUE.evaluations} == {None, 1}
    assert sorted(TRUE.bases) == [0, 3, 8] and len(TRUE.rollbacks) == 2 and len(TRUE.rosters) == 4


def test_a_run_without_records_passes():
    assert first_wrong(Run().books) is None
    run = Run()
    run.rollback(0)
    run.rollback(0)
    assert first_wrong(run.books) is None


@pytest.mark.parametrize("case", WRONG)
def test_one_wrong_row_is_found_and_named(case):
    change, table, key = WRONG[case]
    finding = first_wrong(change(TRUE))
    assert finding is not None
    assert table in finding.table and key in finding.key, finding
    assert finding.says and finding.wanted and finding.says != finding.wanted


def test_a_finding_names_table_key_what_it_says_and_what_the_log_says():
    change, *_ = WRONG["credit too high"]
    right = TRUE.credit[NODES[0]]
    says = f"nodes, name {NODES[0][:12]}: it says {right + 1:,} tokens; the log says {right:,} tokens"
    assert str(first_wrong(change(TRUE))) == says


def test_the_earliest_wrong_row_is_the_one_that_is_named():
    books = with_record(1, previous="33" * 32)(with_record(4, previous="33" * 32)(TRUE))
    assert first_wrong(books).key.startswith("round 1,")


def test_credit_is_the_sum_over_certified_records_undone_ones_included():
    found = {each.node: each for each in balances(TRUE)}
    assert found[NODES[0]].rounds == 10 and found[NODES[0]].undone_rounds == 2
    assert found[NODES[0]].tokens == 320 and found[NODES[0]].undone_tokens == 64
    assert [each.tokens for each in balances(TRUE)] == sorted((each.tokens for each in balances(TRUE)), reverse=True)
    assert sum(each.tokens for each in balances(TRUE)) == sum(TRUE.credit.values())


def test_frozen_is_what_audits_found_void_undone_or_not_and_what_came_on_the_line_after_a_ban():
    liar, banned, free = NODES[:3]
    strike = Mark(liar, Kind.STRIKE, "", By.COORDINATOR, 1, 9, Fault.TRAINED_WRONG, void=("22" * 32,))
    others = Mark(free, Kind.STRIKE, "", By.COORDINATOR, 1, 9, Fault.TRAINED_WRONG, void=("33" * 32,))
    ban = Mark(banned, Kind.BAN, "", By.COORDINATOR, 1, 3)
    before = {each.node: each for each in balances(TRUE)}
    after = {each.node: each for each in balances(replace(TRUE, trails=by_node((strike, others, ban))))}
    assert {each.frozen_tokens for each in before.values()} == {0}
    assert after[liar].frozen_tokens == after[liar].tokens > after[liar].undone_tokens > 0
    late = [row for row in TRUE.entries if row.undone_by is None and row.round >= 3]
    brought = sum(banned in {each.node for each in row.entry.record.contributions} for row in late)
    assert after[banned].frozen_tokens == 32 * brought > 0 and after[free].frozen_tokens == 0


def test_a_rollback_that_a_deeper_one_overtook_needs_no_records():
    """A coordinator came back without its last records, and its nodes brought it two rollbacks at once."""
    run = Run()
    run.roster(*NODES[:3])
    for _ in range(3):
        run.round()
    beyond = replace(run.head, round=9, hash="33" * 32)
    lost = Rollback(RUN, 1, beyond, beyond, "loss", 9)
    run.change(rollbacks={1: identity.sign_rollback(OWNER, lost)})
    assert first_wrong(run.books).table == "rollbacks"
    run.rollback(2)
    run.roster(*NODES[:3])
    run.round()
    assert first_wrong(run.books) is None


def test_records_that_a_passed_rollback_would_have_undone_are_marked_by_the_one_that_was_followed():
    run = Run()
    run.roster(*NODES[:3])
    for _ in range(5):
        run.round()
        run.evaluate()
    head, kept = run.head, run.line[3][0]
    run.rollback(2)
    followed = run.books.rollbacks[1].rollback
    first = Rollback(RUN, 1, replace(head, round=4, hash=kept.hash), head, "loss", 9)
    other = replace(head, hash="33" * 32)  # of the branch that this coordinator never saw
    second = replace(followed, number=2, undone=other)
    renumbered = {
        "entries": tuple(replace(row, undone_by=row.undone_by and 2) for row in run.books.entries),
        "evaluations": tuple(replace(row, undone_by=row.undone_by and 2) for row in run.books.evaluations),
    }
    both = {number: identity.sign_rollback(OWNER, each) for number, each in ((1, first), (2, second))}
    run.change(rollbacks=both, **renumbered)
    assert first_wrong(run.books) is None
    assert first_wrong(with_row(3, undone_by=1)(run.books)).key.startswith("round 3,")
    assert first_wrong(with_row(4, undone_by=None)(run.books)).key.startswith("round 4,")


def test_a_base_made_before_a_rollback_to_it_or_after_is_of_its_branch():
    for branch in (0, 1, 2):
        assert first_wrong(with_base(3, branch=branch)(TRUE)) is None
    assert first_wrong(with_base(8, branch=2)(TRUE)) is None


def test_a_roster_that_nodes_brought_back_before_its_rollback_is_followed_is_in_its_place():
    run = Run()
    run.roster(*NODES[:3])
    run.round()
    run.roster(*NODES[:3], branch=1)
    assert first_wrong(run.books) is None


def test_a_roster_after_a_gap_in_the_epochs_or_a_rollback_may_be_anybodys():
    run = Run()
    run.roster(*NODES[:3])
    run.round()
    run.rollback(1)
    run.roster(*NODES[3:5], epoch=7)
    run.round()
    assert first_wrong(run.books) is None


LEASE_CHANGES = st.lists(st.tuples(st.sampled_from(["grant", "give back", "consume", "expire"]), st.integers(0, 7)))


@settings(max_examples=60, deadline=None)
@given(changes=LEASE_CHANGES, lost=st.integers(0, 50))
def test_however_leases_went_every_sequence_is_accounted_for_and_a_lost_one_is_missed(changes, lost):
    run = Run()
    run.roster(*NODES[:3])
    for what, number in changes:
        leases = run.books.leases
        if what == "grant":
            leases, _ = data.grant(leases, NODES[number % 3], sequences=number, largest=3, until_ms=number)
        elif what == "give back" and leases.held:
            leases = data.give_back(leases, [sorted(leases.held)[number % len(leases.held)]])
        elif what == "expire":
            leases = data.give_back(leases, data.expired(leases, number))
        run.change(leases=leases)
        if what == "consume":
            run.round()
            if number > 4:
                run.rollback(max(0, run.head.round - 2))
                run.roster(*NODES[:3])
    assert first_wrong(run.books) is None
    leases = run.books.leases
    spans = [lease.range for lease in leases.held.values()] + list(leases.returned)
    if spans:
        gone = spans[lost % len(spans)]
        shorter = data.consume(leases, [replace(gone, stop=gone.start + 1)])
        assert first_wrong(replace(run.books, leases=shorter)).table == "cursor"
