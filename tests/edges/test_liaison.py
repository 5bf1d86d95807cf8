"""The liaison with a coordinator made of a few lines: in which order a node brings it what it has forgotten."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from node.brought import KEPT, Brought
from node.core import rounds
from node.core.rounds import ROSTERS_KEPT, Phase, Rounds
from node.daemon import Daemon
from node.decider import Decider
from node.journal import Journal, Promise
from node.liaison import REPORTS_MAX, Liaison
from node.link import News, Page
from node.status import Tally
from protocol import canonical
from protocol.blobs import digest_of
from protocol.contribution import Complaint
from protocol.errors import Code, Exit, Refused
from protocol.limits import ROSTERS_RECALLED_MAX
from protocol.log import genesis_head
from protocol.messages import Accepted, Begin, LogReply, Ready, SignedReady
from protocol.proof import Evidence, Said
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    Digest,
    Head,
    LogEntry,
    Manifest,
    Member,
    Record,
    Rollback,
    Roster,
    SignedManifest,
    SignedRollback,
    SignedRoster,
    VoteBody,
)

HEAD = Head(5, Digest("55" * 32))
MANIFEST = Manifest(
    "run", "run", "{}", "{}", None, 256, 65536, Digest("22" * 32), Digest("11" * 32), 16, 2, Digest(""), "5.0"
)


def roster(epoch, *, run="run", manifest=MANIFEST, issued_ms=0):
    return SignedRoster(Roster(run, epoch, (), issued_ms, manifest=genesis_head(manifest).hash), "s")


def rollback(number):
    return SignedRollback(Rollback("run", number, Head(2, Digest("22" * 32)), HEAD, "", 0), "s")


def entry(number, epoch=0):
    record = Record("run", number, Digest("00" * 32), epoch, "ash", (), (), Digest("11" * 32))
    return LogEntry(record, Certificate(Digest("99" * 32), Ballot(epoch, 0), ()))


class Coordinator:
    """It says what it is told to; all that is brought is noted."""

    def __init__(self):
        self.news = {}
        self.page = Page((), (), None, ())
        self.calls = []
        self.report_refused = None

    async def heartbeat(self, beat, *, wait_seconds):
        said = {"head_round": beat.head.round, "epoch": beat.epoch, "branch": beat.branch}
        said |= {
            "roster": None,
            "wanted": (),
            "asked": (),
            "renewed": beat.lease_ids,
            "notice": "",
            "coordinator_ms": 0,
        }
        said |= {"finished": False, "rollbacks": (), "silent_epoch": None, "astray_from": None}
        return News(**said | self.news)

    async def push_entry(self, brought, rosters=(), rollbacks=()):
        number = brought.record.round if brought is not None else None
        self.calls.append((number, tuple(each.roster.epoch for each in rosters), len(rollbacks)))
        return ()

    async def report(self, evidence):
        self.calls.append(evidence)
        if self.report_refused is not None:
            raise Refused(self.report_refused, "because")

    async def complain(self, complaint):
        await self.report(complaint)

    async def upload_part(self, digest, data):
        self.calls.append(digest)

    async def read_log(self, start):
        self.calls.append("read")
        return self.page


class Stand:
    def __init__(self, folder, **state):
        self.coordinator = Coordinator()
        self.journal = Journal(folder / "journal")
        self.decider = Decider(SimpleNamespace(run="run"), lambda effect: None)
        fields = {"head": HEAD, "digest": Digest("11" * 32), "consumed": Consumed()}
        self.decider.begin(Rounds(**fields | state))
        self.lost = []
        self.passed_on, self.tasks = [], []
        self.brought, self.evidence = Brought(folder / "brought"), Brought(folder / "evidence")
        self.liaison = Liaison(
            self.coordinator,
            SimpleNamespace(online=True, life=1, opened=SimpleNamespace(manifest=SignedManifest(MANIFEST, "s"))),
            heartbeat_seconds=0.0,
            decider=self.decider,
            journal=self.journal,
            blobs=SimpleNamespace(has=lambda digest: True, read=self._rotten),
            courier=SimpleNamespace(engine=None, evidence=self.evidence),
            supply=SimpleNamespace(lease_ids=("1", "2"), lose=self.lost.append),
            workbench=SimpleNamespace(trainer=None, brought=self.brought),
            tally=Tally(),
            spawn=self._spawn,
            pass_on=self.passed_on.append,
        )

    def _spawn(self, work):
        if work is not None:
            self.tasks.append(asyncio.ensure_future(work))

    def _rotten(self, digest):
        raise Refused(Code.BLOB_CORRUPT, "it has changed on disk")


async def test_a_coordinator_that_has_forgotten_is_told_what_it_signed_before_any_record(tmp_path):
    rosters = {epoch: roster(epoch) for epoch in range(8)}
    stand = Stand(tmp_path, rosters=rosters, rollbacks=(rollback(1), rollback(2)), branch=2)
    for number in (3, 4):
        stand.journal.append(entry(number))
    stand.coordinator.news = {"epoch": 5, "branch": 1, "head_round": 3}
    await stand.liaison.beat()
    recalled, *records = stand.coordinator.calls
    assert recalled == (None, (), 2)
    assert records[0] == (None, (6, 7), 0)
    assert [number for number, _, _ in records[1:]] == [3, 4]


async def test_a_node_whose_head_is_not_on_the_log_brings_the_records_that_led_there(tmp_path):
    stand = Stand(tmp_path)
    for number in (3, 4, 5):
        stand.journal.append(entry(number))
    stand.coordinator.news = {"astray_from": 4, "head_round": 9}
    await stand.liaison.beat()
    assert [call[0] for call in stand.coordinator.calls if call != "read"] == [4, 5]


@pytest.mark.parametrize("news", [{"epoch": 6}, {"branch": 0}])
async def test_one_forgotten_thing_is_enough(tmp_path, news):
    stand = Stand(tmp_path, rosters={7: roster(7)}, rollbacks=(rollback(1),), branch=1)
    stand.coordinator.news = {**news, "head_round": 9}
    await stand.liaison.beat()
    assert stand.coordinator.calls[0] == (None, (), 1) and stand.coordinator.calls[-1] == "read"


async def test_nothing_is_brought_to_a_coordinator_that_knows_all(tmp_path):
    stand = Stand(tmp_path, rosters={7: roster(7)}, rollbacks=(rollback(1),), branch=1)
    await stand.liaison.beat()
    assert not stand.coordinator.calls


async def test_many_forgotten_rosters_are_brought_in_messages_that_it_takes(tmp_path):
    stand = Stand(tmp_path, rosters={epoch: roster(epoch) for epoch in range(60)})
    stand.coordinator.news = {"epoch": -1}
    await stand.liaison.beat()
    brought = [epochs for _, epochs, _ in stand.coordinator.calls]
    assert [epoch for epochs in brought for epoch in epochs] == list(range(60))
    assert max(map(len, brought)) <= ROSTERS_RECALLED_MAX


async def test_leases_that_were_not_renewed_are_lost_unless_a_record_that_we_lack_may_have_used_them(tmp_path):
    stand = Stand(tmp_path)
    stand.coordinator.news = {"renewed": ("2",), "head_round": 6}
    await stand.liaison.beat()
    assert not stand.lost
    stand.coordinator.news = {"renewed": ("2",), "head_round": 5}
    await stand.liaison.beat()
    assert stand.lost == [frozenset({"1"})]


async def test_a_part_that_rotted_here_does_not_end_the_node_that_is_asked_for_it(tmp_path):
    stand = Stand(tmp_path)
    stand.coordinator.news = {"wanted": (Digest("77" * 32),)}
    await stand.liaison.beat()
    await stand.liaison.beat()
    assert not stand.coordinator.calls


# two stories


def test_a_roster_is_learned_once_and_passed_on(tmp_path):
    stand = Stand(tmp_path)
    stand.liaison.learn_roster(roster(3))
    stand.liaison.learn_roster(roster(3))
    assert stand.decider.rounds.rosters == stand.journal.rosters() == {3: roster(3)}
    assert stand.passed_on == [roster(3)]


async def test_a_new_roster_goes_to_one_other_member_once_the_engine_may_reach_it():
    done = []

    async def tell_engine():
        done.append("engine")

    daemon = SimpleNamespace(
        _courier=SimpleNamespace(tell_engine=tell_engine),
        _decider=SimpleNamespace(rounds=Rounds(head=HEAD, digest=Digest("11" * 32), consumed=Consumed())),
        _manifest=MANIFEST,
        _me="ash",
        _send=lambda to, message: done.append((to, message)),
    )
    members = tuple(Member(node, f"peer of {node}", (), 1) for node in ("ash", "birch"))
    signed = SignedRoster(replace(roster(3).roster, members=members), "s")
    await Daemon._pass_on(daemon, signed)
    assert done == ["engine", (("birch",), LogReply("run", HEAD.round, "ash", (), (signed,), ()))]
    alone = SignedRoster(replace(signed.roster, members=members[:1]), "s")
    await Daemon._pass_on(daemon, alone)
    assert done[2:] == ["engine"]


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_a_second_roster_of_one_epoch_stops_the_node_and_both_are_named(tmp_path, restarted):
    first, second = roster(3), roster(3, issued_ms=1)
    stand = Stand(tmp_path)
    stand.liaison.learn_roster(first)
    if restarted:  # or the roster is one of so long ago that only the disk knows it
        stand = Stand(tmp_path)
    with pytest.raises(Refused) as caught:
        stand.liaison.learn_roster(second)
    assert caught.value.reason is Code.TWO_STORIES and caught.value.reason.exit is Exit.INTEGRITY
    assert all(canonical.digest(each.roster)[:12] in caught.value.what for each in (first, second))
    assert stand.journal.rosters() == {3: first}


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_old_rosters_take_no_room_and_a_second_one_is_noticed_all_the_same(tmp_path, restarted):
    stand = Stand(tmp_path)
    voted = Accepted(Ballot(1, 0), entry(HEAD.round).record, "")
    stand.journal.save_promise(Promise(HEAD.round, Ballot(2, 0), voted, HEAD.hash))
    for epoch in range(300):
        stand.liaison.learn_roster(roster(epoch))
    kept = stand.journal.rosters()
    assert ROSTERS_KEPT <= len(kept) < 2 * ROSTERS_KEPT and 299 in kept
    assert [epoch for epoch in kept if epoch < 10] == [0, 1, 2], "those that our promise names, and the record in it"
    if restarted:
        stand = Stand(tmp_path)
    with pytest.raises(Refused) as caught:
        stand.liaison.learn_roster(roster(4, issued_ms=1))
    assert caught.value.reason is Code.TWO_STORIES and 4 not in stand.journal.rosters()


def test_an_old_roster_that_comes_again_is_gone_by_if_a_record_names_it_and_neither_saved_nor_passed_on(tmp_path):
    """Else each would go round among the nodes for ever."""
    stand = Stand(tmp_path, rosters={epoch: roster(epoch) for epoch in range(10, 10 + ROSTERS_KEPT)})
    stand.journal.save_roster(roster(3))
    stand.journal.save_roster = stand.passed_on.append
    stand.liaison.learn_roster(roster(3))
    assert 3 not in stand.decider.rounds.rosters
    stand.decider.begin(replace(stand.decider.rounds, committed=entry(HEAD.round, epoch=3), phase=Phase.FOLDING))
    stand.liaison.learn_roster(roster(3))
    assert 3 in stand.decider.rounds.rosters and not stand.passed_on


async def test_whoever_is_shown_another_manifest_than_others_finds_it_in_the_next_roster(tmp_path):
    stand = Stand(tmp_path)
    other = replace(MANIFEST, context=32)
    stand.coordinator.news = {"roster": roster(0, manifest=other)}
    with pytest.raises(Refused, match="two manifests") as caught:
        await stand.liaison.beat()
    assert caught.value.reason is Code.TWO_STORIES
    assert genesis_head(MANIFEST).hash[:12] in caught.value.what and genesis_head(other).hash[:12] in caught.value.what
    assert not stand.journal.rosters()


def test_a_roster_of_another_run_of_the_same_coordinator_is_not_heard(tmp_path):
    stand = Stand(tmp_path)
    stand.liaison.learn_roster(roster(3, run="else"))
    assert not stand.decider.rounds.rosters and not stand.journal.rosters()


def test_a_second_rollback_under_a_number_stops_the_node(tmp_path):
    stand = Stand(tmp_path, rollbacks=(rollback(1),), branch=1)
    stand.liaison.learn_rollbacks([rollback(1)])
    again = SignedRollback(replace(rollback(1).rollback, reason="else"), "s")
    with pytest.raises(Refused) as caught:
        stand.liaison.learn_rollbacks([again])
    assert caught.value.reason is Code.TWO_STORIES and caught.value.reason.exit is Exit.INTEGRITY
    assert not stand.journal.rollbacks()


async def test_a_story_that_differs_ends_the_heartbeat_where_an_outage_does_not(tmp_path):
    stand = Stand(tmp_path, rosters={3: roster(3)})
    stand.coordinator.news = {"roster": roster(3, issued_ms=1)}
    with pytest.raises(Refused, match="two rosters 3"):
        await stand.liaison.heartbeat()


async def test_a_log_that_goes_on_from_another_record_than_ours_ends_the_start_instead_of_waiting_for_ever(
    tmp_path, monkeypatch
):
    """Such as after a base checkpoint whose head was forged. If it is a fork, the coordinator hears of our records first."""
    monkeypatch.setattr("node.liaison.STUCK_SECONDS", 0.1)
    stand = Stand(tmp_path)
    stand.journal.append(entry(HEAD.round - 1))
    stand.coordinator.news = {"head_round": 6, "astray_from": 4}
    other = entry(HEAD.round)
    stand.coordinator.page = Page((other,), (), None, ())
    with pytest.raises(
        Refused, match="record 5 follows 000000000000, this copy of the log ends with 555555555555"
    ) as caught:
        await stand.liaison.catch_up()
    assert caught.value.reason is Code.TWO_STORIES
    assert [call for call in stand.coordinator.calls if call != "read"] == [(4, (), 0)]
    fits = replace(other, record=replace(other.record, previous=HEAD.hash))
    stand.coordinator.page = Page((fits,), (), None, ())
    with pytest.raises(TimeoutError):  # its parts may only be slow to come
        await asyncio.wait_for(stand.liaison.catch_up(), 0.5)


SAID = Said("a" * 64, "vote", VoteBody("run", 5, Ballot(0, 0), Digest("77" * 32)), "0" * 128)


async def test_who_lied_is_told_now_or_when_the_coordinator_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("node.liaison.wait_seconds", lambda **_: 0.01)
    stand, evidence = Stand(tmp_path), Evidence(SAID, SAID)
    stand.liaison._spawn = asyncio.create_task
    stand.coordinator.report_refused = Code.UNREACHABLE
    stand.liaison.report(evidence)
    await asyncio.sleep(0.05)
    assert stand.coordinator.calls.count(evidence) > 1
    stand.coordinator.report_refused = None
    await asyncio.sleep(0.05)
    told = stand.coordinator.calls.count(evidence)
    stand.coordinator.report_refused = Code.UNPROVED
    stand.liaison.report(evidence)
    await asyncio.sleep(0.05)
    assert stand.coordinator.calls.count(evidence) == told + 1 and not stand.liaison._reports


async def test_reports_on_their_way_are_bounded(tmp_path):
    stand, begun = Stand(tmp_path), []
    stand.liaison._spawn = lambda work: begun.append(work.close())
    for number in range(REPORTS_MAX + 5):
        stand.liaison.report(Evidence(replace(SAID, signature=f"{number:0128x}"), SAID))
    assert len(begun) == REPORTS_MAX


BROUGHT = Contribution("birch", 64, (), update=Digest("77" * 32), signature="s")


async def test_who_sends_what_no_honest_member_sends_is_complained_about_with_what_it_signed(tmp_path):
    stand, done = Stand(tmp_path), []
    ready = Ready("run", 5, HEAD.hash, Ballot(0, 0), "birch", BROUGHT, None)
    ash = replace(ready, sender="ash", contribution=replace(BROUGHT, node="ash"))
    begin = Begin("run", 5, ready.ballot, "ash", (SignedReady(ash, ""), SignedReady(ready, "")))

    async def average(begin, roster, payload, *, seconds):
        return None, {}, frozenset({"birch"})

    daemon = SimpleNamespace(
        _courier=SimpleNamespace(average=average),
        _decider=SimpleNamespace(post=done.append),
        _liaison=stand.liaison,
        _spawn=stand._spawn,
        _workbench=SimpleNamespace(payload=b""),
    )
    for refusal in (Code.UNREACHABLE, None, Code.UNPROVED):
        stand.coordinator.report_refused = refusal
        await Daemon._average(daemon, begin, roster(0).roster, 1.0)
        await asyncio.gather(*stand.tasks)
    assert done == [rounds.Averaged(ready.ballot, None, {})] * 3
    told = Complaint(5, HEAD.hash, BROUGHT)
    assert stand.coordinator.calls == [told], "once, heard or not, however many attempts a round takes"
    for other in (replace(told, round=6, previous=Digest("66" * 32)), replace(told, contribution=ash.contribution)):
        await stand.liaison.complain(other)
        assert stand.coordinator.calls[-1] == other
    await stand.liaison.complain(told)
    assert len(stand.coordinator.calls) == 3


async def test_what_was_brought_to_the_newest_rounds_is_shown_when_it_is_asked_for_and_no_more(tmp_path):
    stand = Stand(tmp_path)
    updates = [bytes([number]) * 100 for number in range(KEPT + 1)]
    for data in updates:
        stand.brought.keep(data)
    (made_of := tmp_path / "file").write_bytes(b"slices")
    stand.evidence.move_in(made_of)
    stand.coordinator.news = {"asked": tuple(map(digest_of, [*updates, b"slices", b"another's"]))}
    await stand.liaison.beat()
    await asyncio.gather(*stand.tasks)
    assert sorted(stand.coordinator.calls) == sorted(map(digest_of, [*updates[1:], b"slices"]))
    assert Brought(tmp_path / "brought").read(digest_of(updates[-1])) is None  # a new process begins empty


@pytest.mark.parametrize(
    ("ahead", "told"),
    [
        (0.0, ""),
        (50.0, ""),
        (-600.0, "10 min ahead of"),
        (90.0, "90 s behind"),
        (26 * 3600.0, "26 h behind"),
        (-40 * 365 * 86400.0, "14,600 days ahead of"),
    ],
)
async def test_a_clock_that_is_wrong_is_said_and_nothing_else_changes(tmp_path, ahead, told):
    stand = Stand(tmp_path)
    stand.coordinator.news = {"coordinator_ms": int((time.time() + ahead) * 1000)}
    await stand.liaison.beat()
    assert told in stand.liaison._tally.clock and bool(told) == bool(stand.liaison._tally.clock)
    stand.coordinator.news = {"coordinator_ms": int(time.time() * 1000)}
    await stand.liaison.beat()
    assert stand.liaison._tally.clock == ""  # it was set while the node ran
