"""What the coordinator decides, each rule as a short list of events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.core import machine
from coordinator.core.leases import Leases
from coordinator.core.machine import (
    ArchiveBase,
    BranchOff,
    EntryArrived,
    Evaluate,
    Fold,
    Folded,
    GrantLeases,
    HeartbeatArrived,
    Judged,
    LeasesAsked,
    NodeLeft,
    NodeOpened,
    PartStored,
    RosterSigned,
    SaveEntry,
    SaveLeases,
    SaveMarks,
    SignRoster,
    State,
    Struck,
    Ticked,
)
from coordinator.core.strikes import Kind
from protocol.limits import MEMBERS_MAX
from protocol.log import head_after, next_head, record_hash
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Fault,
    Head,
    LogEntry,
    NodeId,
    Part,
    Record,
    Rollback,
    Seal,
    Shard,
    Signature,
    SignedRollback,
    SignedRoster,
)

A, B, C, D = (NodeId(name) for name in "abcd")
SHARD, GENESIS, ZERO, ONE = (Digest(digit * 64) for digit in "5012")
PARAMETERS = 65536
RULES = machine.Rules(
    run="run",
    parameters=PARAMETERS,
    min_nodes=2,
    rounds_goal=0,
    absent_seconds=30.0,
    lease_seconds=60.0,
    lease_sequences_max=8,
    lease_sequences_node_max=16,
    weight_cap=10**6,
    evaluate_every=2,
    base_every=3,
    entry_is_certified=lambda entry, roster: len(entry.certificate.signatures) >= roster.quorum,
    check_brought=lambda record: None,
    manifest=GENESIS,
)


class Coordinator:
    """A machine, its clock, and everything it wanted done; rosters are signed at once."""

    def __init__(self, rules=RULES):
        self.rules = rules
        head = Head(0, GENESIS)
        self.state = State(head, head, ZERO, Consumed(), Leases((Shard(SHARD, 100, 100, 100),)))
        self.now = 1.0

    def see(self, *events, at=None):
        """A heartbeat, and the tick that is soon."""
        self.now = self.now if at is None else at
        done, waiting = [], [*events]
        waiting += [Ticked()] * any(isinstance(event, HeartbeatArrived) for event in events)
        while waiting:
            self.state, effects = machine.step(self.state, waiting.pop(0), self.now, self.rules)
            done += effects
            waiting += [RosterSigned(SignedRoster(e.roster, "s")) for e in effects if isinstance(e, SignRoster)]
        return done

    def join(self, *nodes, head_round=0):
        for node in nodes:
            self.see(NodeOpened(node, node, f"node {node}", ()))
            self.see(beat(node, head_round=head_round))
        return self

    @property
    def rostered(self):
        return self.state.roster.roster.nodes if self.state.roster else ()

    def entry(self, *contributions, round_number=None, state=ZERO, signers=(A, B), epoch=0):
        number = self.state.head.round if round_number is None else round_number
        nodes = tuple(c.node for c in contributions)
        part = Part(0, 0, PARAMETERS, Digest(f"{number:064x}"), 10, nodes[0], nodes)
        record = Record("run", number, self.state.head.hash, epoch, A, contributions, (part,), state)
        votes = tuple(Signature(node, "v") for node in signers)
        return LogEntry(record, Certificate(record_hash(record), Ballot(epoch, 0), votes))


def beat(node, activity="training", head_round=0, lease_ids=()):
    return HeartbeatArrived(node, activity, head_round, -1, (), lease_ids=lease_ids)


def brings(node, start, stop):
    return Contribution(node, (stop - start) * 16, (DataRange(0, SHARD, start, stop),))


def of(kind, effects):
    return [effect for effect in effects if isinstance(effect, kind)]


# rosters


def test_an_invite_for_many_gets_the_places_that_nobody_else_wants():
    coordinator = Coordinator(replace(RULES, min_nodes=MEMBERS_MAX))
    many, few = ([NodeId(f"{kind}{n}") for n in range(count)] for kind, count in (("many", MEMBERS_MAX), ("few", 6)))
    for node in (*many, *few):
        coordinator.see(NodeOpened(node, node, node, (), invite="one" if node in many else node), beat(node))
    for number in range(8):
        assert len(coordinator.rostered) <= MEMBERS_MAX
        signed = {"signers": coordinator.rostered, "epoch": coordinator.state.roster.roster.epoch}
        coordinator.see(EntryArrived(coordinator.entry(brings(many[0], 4 * number, 4 * number + 4), **signed)))
        coordinator.see(*(beat(node, head_round=number + 1) for node in (*many, *few)))
    assert set(coordinator.rostered) == {*many[: MEMBERS_MAX - len(few)], *few}


def test_the_first_roster_waits_for_enough_nodes():
    coordinator = Coordinator().join(A)
    assert coordinator.rostered == ()
    assert coordinator.join(B).rostered == (A, B)


def test_a_node_that_is_not_ready_is_not_rostered():
    coordinator = Coordinator().join(A, B, C)
    coordinator.see(beat(C, activity="paused"))
    assert coordinator.rostered == (A, B)
    coordinator.see(beat(C, activity="waiting"))
    assert coordinator.rostered == (A, B, C)


def test_a_joiner_behind_by_more_than_one_record_is_not_rostered():
    coordinator = Coordinator().join(A, B)
    for number in range(2):
        coordinator.see(EntryArrived(coordinator.entry(brings(A, number, number + 1))))
    assert coordinator.join(C, head_round=0).rostered == (A, B)
    coordinator.see(beat(C, head_round=1))
    assert coordinator.rostered == (A, B, C)


def test_a_rostered_node_that_falls_behind_stays():
    coordinator = Coordinator().join(A, B, C)
    for number in range(5):
        coordinator.see(EntryArrived(coordinator.entry(brings(A, number, number + 1))))
    assert C in coordinator.rostered


def test_a_node_not_heard_of_leaves_the_roster_and_comes_back():
    coordinator = Coordinator().join(A, B, C)
    coordinator.see(beat(A), beat(B), at=25.0)
    coordinator.see(Ticked(), at=35.0)
    assert coordinator.rostered == (A, B)
    assert coordinator.join(C).rostered == (A, B, C)


def test_a_restarted_coordinator_gives_everyone_time_to_come_back():
    coordinator = Coordinator().join(A, B, C)
    gone = {node: replace(known, activity="left", seen=-1e9) for node, known in coordinator.state.nodes.items()}
    coordinator.state = replace(coordinator.state, nodes=gone, started=100.0)
    coordinator.see(beat(A), at=101.0)
    assert coordinator.rostered == (A, B, C)
    coordinator.see(beat(A), Ticked(), at=146.0)
    assert len(coordinator.rostered) == 2 and A in coordinator.rostered, "only as far as is safe in one step"


def test_a_member_whose_connection_was_cut_stays_rostered():
    coordinator = Coordinator().join(A, B)
    coordinator.see(NodeOpened(A, A, "node a", ()))
    assert coordinator.rostered == (A, B)


def test_a_certified_record_closes_the_rosters_before_its_own():
    coordinator = Coordinator().join(A, B, C)
    assert [signed.roster.epoch for signed in coordinator.state.rosters] == [0, 1]
    coordinator.see(EntryArrived(coordinator.entry(brings(A, 0, 1), epoch=1)))
    assert [signed.roster.epoch for signed in coordinator.state.rosters] == [1]
    assert set(coordinator.state.history) == {0, 1}


def test_a_coordinator_with_an_old_database_gives_no_roster_a_number_that_it_has_forgotten():
    """Nodes bring back what it forgot, unless none that know it come in time."""
    old = Coordinator().join(A, B)
    before = old.state
    old.see(NodeOpened(C, C, "node C", ()), beat(C), at=500.0)
    forgotten = old.state.roster.roster
    assert forgotten.epoch == before.roster.roster.epoch + 1
    old.state = replace(before, nodes={}, started=501.0)
    old.join(A, C)
    old.see(beat(A), beat(C), at=501.0 + machine.RESTART_PATIENCE * RULES.absent_seconds)
    known, *issued = sorted(old.state.history)
    assert known == before.roster.roster.epoch == old.state.history[issued[0]].roster.after
    assert forgotten.epoch < issued[0] and issued == list(range(issued[0], issued[0] + len(issued))), "it skips once"


def test_nothing_is_taken_back_before_nodes_could_say_what_a_restarted_coordinator_has_forgotten():
    """Else its number may be that of a rollback which they have followed."""
    coordinator = Coordinator().join(A, B)
    coordinator.state = replace(coordinator.state, started=100.0)
    asked, patience = (
        machine.RollbackAsked(coordinator.state.head, "why"),
        machine.RESTART_PATIENCE * RULES.absent_seconds,
    )
    assert not of(machine.SignRollback, coordinator.see(beat(A), beat(B), asked, at=99.0 + patience))
    assert coordinator.state.events[-1][1].startswith("no rollback yet: for 1 s")
    (order,) = of(machine.SignRollback, coordinator.see(asked, at=100.0 + patience))
    assert order.rollback.number == 1


def test_a_coordinator_whose_clock_went_back_goes_on_counting():
    coordinator = Coordinator()
    coordinator.now = 900.0
    coordinator.join(A, B)
    coordinator.state = replace(coordinator.state, nodes={}, started=100.0)
    coordinator.see(NodeOpened(A, A, "node A", ()), NodeOpened(C, C, "node C", ()), at=160.0)
    coordinator.see(beat(A), beat(C))
    assert list(coordinator.state.history) == [0, 1, 2]


# leases


def test_leases_are_durable_before_they_are_granted():
    effects = Coordinator().join(A).see(LeasesAsked(A, 10))
    assert [type(effect) for effect in effects] == [SaveLeases, GrantLeases]
    assert [(lease.range.start, lease.range.stop) for lease in effects[1].leases] == [(0, 8), (8, 10)]


def test_a_node_holds_no_more_than_its_share_and_a_stranger_nothing():
    coordinator = Coordinator().join(A)
    (granted,) = of(GrantLeases, coordinator.see(LeasesAsked(A, 10**9)))
    assert sum(lease.range.stop - lease.range.start for lease in granted.leases) == 16
    assert of(GrantLeases, coordinator.see(LeasesAsked(A, 1))) == [GrantLeases(A, ())]
    assert of(GrantLeases, coordinator.see(LeasesAsked(B, 1))) == [GrantLeases(B, ())]


def test_leases_come_back_when_a_node_leaves():
    coordinator = Coordinator().join(A, B)
    coordinator.see(LeasesAsked(A, 8))
    assert of(SaveLeases, coordinator.see(NodeLeft(A, "done")))
    (granted,) = of(GrantLeases, coordinator.see(LeasesAsked(B, 8)))
    assert granted.leases[0].range == DataRange(0, SHARD, 0, 8)


def test_a_heartbeat_keeps_the_leases_that_it_names():
    coordinator = Coordinator().join(A)
    kept, lost = of(GrantLeases, coordinator.see(LeasesAsked(A, 16)))[0].leases
    for at in (20.0, 40.0, 62.0):
        coordinator.see(beat(A, lease_ids=(kept.lease_id,)), at=at)
    assert [lease.lease_id for lease in coordinator.state.leases.of(A)] == [kept.lease_id]
    assert coordinator.state.leases.returned == (lost.range,)


def test_a_heartbeat_by_which_nothing_changes_is_only_noted_and_settles_nothing_of_the_others():
    coordinator = Coordinator().join(A, B)
    late = coordinator.now + RULES.absent_seconds
    coordinator.see(beat(A), at=late - 1)
    before = coordinator.state
    noted, effects = machine.step(before, replace(beat(A), tokens_per_second=7.0), late, RULES)
    assert noted.nodes[A].seen == late and noted.nodes[B] == before.nodes[B] and not effects
    for event in (beat(A, activity="paused"), Ticked()):
        settled, _ = machine.step(noted, event, late, RULES)
        assert settled.nodes[B].activity == "left"


def test_what_a_record_consumed_is_not_leased_any_more():
    coordinator = Coordinator().join(A, B)
    coordinator.see(LeasesAsked(A, 8))
    coordinator.see(EntryArrived(coordinator.entry(brings(A, 0, 5))))
    assert [lease.range for lease in coordinator.state.leases.of(A)] == [DataRange(0, SHARD, 5, 8)]


# the log


def test_a_record_is_appended_and_credited_once():
    coordinator = Coordinator().join(A, B)
    entry = coordinator.entry(brings(A, 0, 5))
    assert [saved.entry for saved in of(SaveEntry, coordinator.see(EntryArrived(entry)))] == [entry]
    assert not of(SaveEntry, coordinator.see(EntryArrived(entry)))
    assert coordinator.state.head == next_head(entry.record)
    assert (coordinator.state.tokens, coordinator.state.nodes[A].credit_tokens) == (80, 80)


def test_a_record_that_came_early_waits_for_those_before_it():
    coordinator = Coordinator().join(A, B)
    coordinator.see(LeasesAsked(A, 10))
    first = coordinator.entry(brings(A, 0, 5))
    second = replace(first, record=replace(first.record, round=1, previous=record_hash(first.record)))
    second = replace(second, record=replace(second.record, contributions=(brings(A, 5, 6),)))
    assert not of(SaveEntry, coordinator.see(EntryArrived(second)))
    saved = of(SaveEntry, coordinator.see(EntryArrived(first)))
    assert [each.entry for each in saved] == [first, second]
    assert saved[0].leases != saved[1].leases, "each is saved with the leases as it leaves them"


def test_records_from_far_ahead_are_not_hoarded():
    coordinator = Coordinator().join(A, B)
    coordinator.see(EntryArrived(coordinator.entry(brings(A, 0, 5), round_number=10**6)))
    assert not coordinator.state.waiting


def test_a_record_without_a_majority_or_with_data_that_counts_already_is_refused():
    coordinator = Coordinator().join(A, B)
    assert not of(SaveEntry, coordinator.see(EntryArrived(coordinator.entry(brings(A, 0, 5), signers=(A,)))))
    coordinator.see(EntryArrived(coordinator.entry(brings(A, 0, 5))))
    assert not of(SaveEntry, coordinator.see(EntryArrived(coordinator.entry(brings(B, 4, 6)))))
    assert "counts twice" in coordinator.state.events[-1][1]


def test_a_record_is_folded_when_its_parts_are_archived():
    coordinator = Coordinator().join(A, B)
    entry = coordinator.entry(brings(A, 0, 5))
    assert not of(Fold, coordinator.see(EntryArrived(entry)))
    assert [part.digest for part in coordinator.state.wanted] == [entry.record.parts[0].digest]
    assert of(Fold, coordinator.see(PartStored(entry.record.parts[0].digest))) == [Fold(entry)]
    assert not of(Fold, coordinator.see(Ticked()))


def test_a_record_from_another_state_is_held_back():
    coordinator = Coordinator().join(A, B)
    entry = coordinator.entry(brings(A, 0, 5), state=ONE)
    coordinator.see(EntryArrived(entry))
    assert not of(Fold, coordinator.see(PartStored(entry.record.parts[0].digest)))
    assert sum("rollback --to 0" in text for _, text in coordinator.state.events) == 1


def test_rounds_are_measured_and_archived_at_their_turn():
    coordinator, seen = Coordinator().join(A, B), []
    for number in range(6):
        entry = coordinator.entry(brings(A, number, number + 1))
        coordinator.see(EntryArrived(entry), PartStored(entry.record.parts[0].digest))
        seen += [e for e in coordinator.see(Folded(number, ZERO)) if isinstance(e, Evaluate | ArchiveBase)]
    assert seen == [Evaluate(2), ArchiveBase(3), Evaluate(4), Evaluate(6), ArchiveBase(6)]


def test_a_run_that_reached_its_goal_grants_and_rosters_nothing_more():
    coordinator = Coordinator(replace(RULES, rounds_goal=1)).join(A, B)
    entry = coordinator.entry(brings(A, 0, 5))
    coordinator.see(EntryArrived(entry), PartStored(entry.record.parts[0].digest))
    done = coordinator.see(Folded(0, ZERO))
    assert of(Evaluate, done) == [Evaluate(1)]
    assert of(ArchiveBase, done) == [ArchiveBase(1)]
    assert of(GrantLeases, coordinator.see(LeasesAsked(A, 4))) == [GrantLeases(A, ())]
    assert coordinator.join(C, head_round=1).rostered == (A, B)


# strikes and bans


def banned(node, kind=Kind.BAN, until=None):
    return Judged(node, kind, "because", until)


def test_a_banned_node_is_gone_at_once_with_its_leases_and_its_place():
    swarm = Coordinator().join(A, B, C)
    swarm.see(LeasesAsked(A, 8))
    done = swarm.see(banned(A))
    assert isinstance(done[0], SaveMarks) and done.index(of(SaveMarks, done)[0]) < done.index(of(SignRoster, done)[0])
    assert swarm.rostered == (B, C) and not swarm.state.leases.of(A)
    assert swarm.state.events[-2][1] == "node a was banned by the researcher: because"
    assert of(GrantLeases, swarm.see(LeasesAsked(A, 8)))[0].leases == ()
    swarm.see(beat(A))
    assert swarm.rostered == (B, C)
    swarm.see(banned(A, Kind.UNBAN))
    swarm.join(A)
    assert set(swarm.rostered) == {A, B, C}


def test_a_kicked_node_may_come_back_when_its_time_is_over():
    swarm = Coordinator().join(A, B, C)
    swarm.see(banned(A, Kind.KICK, until=61.0))
    swarm.see(beat(A), beat(B), beat(C), at=20.0)
    swarm.see(beat(A), beat(B), beat(C), at=40.0)
    assert swarm.rostered == (B, C)
    swarm.see(beat(A), beat(B), beat(C), at=61.0)
    assert set(swarm.rostered) == {A, B, C}


def test_a_struck_node_is_set_aside_for_some_rounds_and_comes_back():
    swarm = Coordinator().join(A, B, C)
    swarm.see(Struck(A, Fault.TRAINED_WRONG, 0, "seen", ONE))
    assert swarm.rostered == (B, C) and swarm.state.aside(A) and swarm.state.shut(A, swarm.now) is None
    for number in range(10):
        assert swarm.state.aside(A)
        epoch = swarm.state.roster.roster.epoch
        swarm.see(EntryArrived(swarm.entry(brings(B, number, number + 1), signers=(B, C), epoch=epoch)))
        swarm.see(*(beat(node, head_round=swarm.state.head.round) for node in (A, B, C)))
    assert set(swarm.rostered) == {A, B, C}


def test_a_fault_is_judged_once_and_strangers_have_none():
    swarm = Coordinator().join(A, B, C)
    assert len(of(SaveMarks, swarm.see(Struck(A, Fault.FORGED, 0, "seen", ONE)))[0].marks) == 2
    assert not swarm.see(Struck(A, Fault.FORGED, 0, "seen", ONE))
    assert not swarm.see(Struck(NodeId("nobody"), Fault.FORGED, 0, "seen", ZERO))
    assert swarm.rostered == (B, C)


def four():
    """Four members, and nothing left to decide under older rosters."""
    swarm = Coordinator().join(A, B, C, D)
    epoch = swarm.state.roster.roster.epoch
    swarm.see(EntryArrived(swarm.entry(brings(A, 0, 1), signers=(A, B, C), epoch=epoch)))
    swarm.see(*(beat(node, head_round=1) for node in (A, B, C, D)))
    return swarm


def test_a_ban_never_lets_two_majorities_miss_each_other():
    """Two of four may be dropped at once: each majority of the four holds one of the two who stay. Three may not."""
    swarm = four()
    swarm.see(banned(A), banned(B))
    assert set(swarm.rostered) == {C, D}
    swarm = four()
    swarm.see(banned(A), banned(B), banned(C))
    assert set(swarm.rostered) == {C, D}


def test_where_those_who_are_left_are_no_majority_the_run_goes_on_on_a_branch():
    swarm = four()
    swarm.see(banned(A), banned(B), banned(C))
    patience = machine.RESTART_PATIENCE * RULES.absent_seconds
    for now in (2.0, 20.0, 40.0):
        assert not of(BranchOff, swarm.see(beat(D, head_round=1), at=now))
    assert not of(BranchOff, swarm.see(beat(D, head_round=2), at=2.0 + patience))  # it knows a record that we lack
    (branch,) = of(BranchOff, swarm.see(beat(D, head_round=1), at=3.0 + patience))
    assert branch.reason == "1 of 2 nodes are shut out, and the others are no majority"


# two records of one round


def forked(*, signers=(A, C), ballot=Ballot(0, 0), after=0):
    """Three members; A and B have certified a record, and whoever these are another, so many rounds ago."""
    swarm = Coordinator().join(A, B, C)
    one, other = (swarm.entry(brings(A, start, start + 1), signers=(A, B)) for start in (0, 9))
    other = replace(other, certificate=replace(other.certificate, ballot=ballot))
    votes = tuple(Signature(node, "v") for node in signers)
    other = replace(other, certificate=replace(other.certificate, signatures=votes))
    swarm.see(EntryArrived(one))
    for number in range(after):
        swarm.see(EntryArrived(swarm.entry(brings(A, number + 1, number + 2), signers=(A, B))))
    return swarm, other


def test_a_fork_is_taken_back_and_whoever_has_signed_both_is_known():
    swarm, other = forked(after=2)
    (back,) = of(BranchOff, swarm.see(EntryArrived(other)))
    assert back.round == 0
    assert [mark.fault for mark in swarm.state.trails[A]] == [Fault.CONTRADICTED]
    assert swarm.state.trails.keys() == {A}, "the others have signed one record each"
    assert any("certified two records of round 0" in text for _, text in swarm.state.events)


def test_votes_of_two_ballots_prove_nothing_against_anybody():
    """Somebody was silent about a vote; who signed in good faith cannot be told from who did not."""
    swarm, other = forked(ballot=Ballot(0, 3))
    assert of(BranchOff, swarm.see(EntryArrived(other)))
    assert not swarm.state.trails


def test_a_fork_that_somebody_kept_to_himself_for_long_undoes_nothing_and_is_told_once():
    swarm, other = forked(after=machine.FORK_UNDONE_MAX)
    for _ in range(3):
        assert not of(BranchOff, swarm.see(EntryArrived(other)))
    assert sum("waits for a rollback to round 0" in text for _, text in swarm.state.events) == 1
    assert swarm.state.trails.keys() == {A}


def test_the_same_record_told_again_is_no_fork():
    """By another majority of its signers, too: each node has its own certificate of one record."""
    swarm, _ = forked()
    entry = swarm.state.recent[0]
    again = replace(entry, certificate=replace(entry.certificate, signatures=(Signature(B, "v"), Signature(C, "v"))))
    assert not swarm.see(EntryArrived(again)) and not swarm.state.trails


@pytest.mark.parametrize("why", ["too few votes", "another head", "another branch"])
def test_what_proves_no_fork_changes_nothing(why):
    swarm, other = forked()
    if why == "too few votes":
        other = replace(other, certificate=replace(other.certificate, signatures=(Signature(A, "v"),)))
    elif why == "another head":
        other = replace(other, record=replace(other.record, previous=ZERO))
    else:
        history = {epoch: replace(s, roster=replace(s.roster, branch=1)) for epoch, s in swarm.state.history.items()}
        signed = replace(history[0], roster=replace(history[0].roster, epoch=7))
        swarm.state = replace(swarm.state, history={**swarm.state.history, 7: signed})
        other = replace(other, certificate=replace(other.certificate, ballot=Ballot(7, 0)))
    assert not of(BranchOff, swarm.see(EntryArrived(other)))
    assert not swarm.state.trails and swarm.state.head.round == 1


def test_a_head_that_is_not_on_the_log_is_seen_at_the_next_heartbeat():
    swarm, other = forked(after=1)
    assert swarm.state.astray(Head(1, record_hash(other.record)))
    assert not swarm.state.astray(Head(1, record_hash(swarm.state.recent[0].record)))
    assert not swarm.state.astray(swarm.state.head)
    assert not swarm.state.astray(Head(0, GENESIS)) and not swarm.state.astray(Head(9, ZERO)), "who can tell"


def test_a_node_that_has_turned_at_a_head_is_not_astray():
    swarm, _ = forked(after=1)
    turn = Rollback("run", 1, Head(1, record_hash(swarm.state.recent[0].record)), swarm.state.head, "why", 0)
    swarm.state = replace(swarm.state, rollbacks=(SignedRollback(turn, "s"),))
    assert not swarm.state.astray(head_after(turn))


def test_a_roster_ordered_before_a_rollback_is_none_of_the_new_branch():
    """Seed 6 of the simulation, with a two-faced member: the strike had ordered a roster, the fork a rollback, and the
    older roster was taken for the newest."""
    swarm, _ = forked()
    stale = swarm.state.roster.roster
    swarm.state = replace(swarm.state, issuing=None, branch=1, rosters=())
    swarm.state, _ = machine.step(swarm.state, RosterSigned(SignedRoster(replace(stale, epoch=5), "s")), 2.0, RULES)
    assert 5 in swarm.state.history and not any(s.roster.epoch == 5 for s in swarm.state.rosters)


def test_two_nodes_with_the_very_same_update_are_told_of_once_and_not_struck():
    swarm = Coordinator().join(A, B, C)
    for number in range(2):
        epoch = swarm.state.roster.roster.epoch
        same = [
            replace(brings(node, 3 * number + at, 3 * number + at + 1), update=ONE) for at, node in enumerate((A, B))
        ]
        other = replace(brings(C, 3 * number + 2, 3 * number + 3), update=ZERO)
        swarm.see(EntryArrived(swarm.entry(*same, other, signers=(A, B), epoch=epoch)))
    told = [text for _, text in swarm.state.events if "very same update" in text]
    assert told == ["the very same update came from node a, node b in round 0: one machine may be behind them"]
    assert not swarm.state.trails


def test_who_is_left_out_for_some_rounds_does_not_wait_for_rounds_that_nobody_makes():
    swarm = Coordinator().join(A, B)
    swarm.see(Struck(A, Fault.TRAINED_WRONG, 0, "seen", ONE))
    assert swarm.rostered == (B,)
    swarm.see(NodeLeft(B, "bye", Seal(0, swarm.state.roster.roster.epoch)))
    swarm.see(beat(A))
    assert A in swarm.rostered and swarm.state.aside(A)
    assert of(GrantLeases, swarm.see(LeasesAsked(A, 8)))[0].leases
