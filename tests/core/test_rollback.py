"""A rollback: where the line of the log then is, and what a node and the coordinator do about it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import machine
from coordinator.core.rosters import next_members
from node.core import rounds
from protocol.log import head_after, line_head, next_head, next_turn, on_line, record_hash, turned
from protocol.messages import Begin, Commit, LogRequest, Ready, Vote
from protocol.state import Consumed
from protocol.types import Ballot, Digest, Head, Member, NodeId, Rollback, Roster, SignedRollback, SignedRoster
from tests.core.test_machine import ZERO as START
from tests.core.test_machine import Coordinator
from tests.core.test_machine import beat as beats
from tests.core.test_machine import brings as contributes
from tests.core.test_rounds import (
    GENESIS,
    RUN,
    STATE,
    A,
    B,
    C,
    D,
    E,
    Node,
    accepts,
    brings,
    data,
    entry_of,
    proposes,
    ready,
    record_of,
)

ZERO = Digest("0" * 64)
F = NodeId("f")
OLDER = Digest("7" * 64)  # the state that a rollback leaves


def back_to(number, to, *, record=GENESIS, undone=None):
    undone = undone or Head(to + 3, Digest("u" * 64))
    return SignedRollback(Rollback(RUN, number, Head(to, record), undone, "why", 0), "s")


def roster(*nodes, epoch, branch, floor=0):
    members = tuple(Member(node, node, (), 10**6) for node in nodes)
    return SignedRoster(Roster(RUN, epoch, members, 0, floor, branch), "s")


# the line


def bare(number, to):
    return back_to(number, to).rollback


def test_the_line_goes_on_from_where_each_rollback_leaves_it():
    first, second, third = bare(1, 40), bare(2, 45), bare(3, 42)
    assert on_line((first, second, third)) == (first, third)
    assert line_head(Head(39, ZERO), (first, second, third)) == (Head(39, ZERO), 0)
    assert line_head(Head(40, ZERO), (first, second, third)) == (head_after(first), 1)
    assert line_head(Head(41, ZERO), (first, second, third)) == (Head(41, ZERO), 1)
    assert line_head(Head(42, ZERO), (first, second, third)) == (head_after(third), 3)
    assert line_head(Head(50, ZERO), (first, second, third)) == (Head(50, ZERO), 3)


def test_a_log_follows_the_rollback_that_goes_back_furthest_and_skips_what_that_undoes():
    rollbacks = (bare(1, 40), bare(2, 35), bare(3, 38))
    assert next_turn(50, 0, rollbacks).number == 2
    assert next_turn(35, 0, rollbacks).number == 2
    assert next_turn(34, 0, rollbacks) is None
    assert next_turn(37, 2, rollbacks) is None
    assert next_turn(38, 2, rollbacks).number == 3
    assert next_turn(99, 3, rollbacks) is None


def test_of_two_rollbacks_to_one_round_the_later_is_followed():
    assert turned(Head(40, ZERO), 0, (bare(1, 40), bare(2, 40))) == (head_after(bare(2, 40)), 2)


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(0, 14))
def test_following_turn_after_turn_ends_on_the_line(targets, reached):
    """Whatever happened in between, a log that rewinds and catches up stands where the whole line stands."""
    rollbacks = tuple(bare(number, to) for number, to in enumerate(targets, 1))
    head_round, branch = reached, 0
    while (due := next_turn(head_round, branch, rollbacks)) is not None:
        head_round, branch = due.to.round, due.number
    passed = [each.number for each in on_line(rollbacks) if each.to.round <= head_round]
    assert branch == (passed[-1] if passed else 0)


def test_two_rollbacks_to_the_same_head_lead_to_different_heads():
    assert head_after(bare(1, 40)) != head_after(bare(2, 40))


# a node


def committed(node, rounds_done=2):
    """A node that has folded some records of A's."""
    records, head = [], node.state.head
    for number in range(rounds_done):
        record = record_of(brings(A, data(4 * number, 4 * number + 4)), round_number=number, previous=head.hash)
        head = next_head(record)
        node.see(rounds.PartsArrived(frozenset(part.digest for part in record.parts)))
        node.see(rounds.LogArrived((entry_of(record, (A, B)),)))
        node.see(rounds.Folded(number, STATE))
        records.append(record)
    assert node.state.head == head
    return records


def test_a_node_beyond_the_head_that_stays_rewinds_and_listens_to_nobody_meanwhile():
    node = Node(A, B)
    first, _ = committed(node)
    signed = back_to(1, 1, record=record_hash(first))
    assert node.see(rounds.RollbacksArrived((signed,))).did(rounds.Rewind) == [rounds.Rewind(signed)]
    assert node.state.phase is rounds.Phase.REWINDING
    late = record_of(brings(B, data(40, 44)), round_number=2, previous=node.state.head.hash)
    node.see(rounds.Received(proposes(Ballot(0, 0), A, late)), rounds.Progressed(99))
    assert not node.effects
    entry = entry_of(first, (A, B))
    node.see(rounds.Rewound(head_after(signed.rollback), 1, OLDER, Consumed().with_ranges((data(0, 4),)), entry))
    assert (node.state.head, node.state.branch, node.state.digest) == (head_after(signed.rollback), 1, OLDER)
    assert not node.state.consumed.overlaps(data(4, 8)), "the data of what is undone is free again"
    assert not node.state.pending, "what was trained on the undone state is gone"


def test_a_node_exactly_there_only_turns_and_keeps_what_it_trained():
    node = Node(A, B).trained(data(0, 4))
    promised = node.state.ballot
    signed = back_to(1, 0)
    assert node.see(rounds.RollbacksArrived((signed,))).did(rounds.Turn) == [rounds.Turn(signed)]
    assert node.state.head == head_after(signed.rollback)
    assert node.state.contribution == brings(A, data(0, 4))
    assert not node.sent(Ready), "no roster of this branch is known"
    node.see(rounds.RosterArrived(roster(A, B, epoch=1, branch=1)))
    (said,) = node.sent(Ready)
    assert said.previous == head_after(signed.rollback).hash and said.ballot > promised
    assert said.contribution == brings(A, data(0, 4))


def test_what_was_accepted_on_an_undone_branch_is_not_proposed_again():
    node = Node(A, B).trained(data(0, 4))
    node.state = replace(node.state, accepted=accepts(Ballot(0, 0), record_of(brings(B, data(4, 8)))))
    node.see(rounds.RollbacksArrived((back_to(1, 0),)), rounds.RosterArrived(roster(A, B, epoch=1, branch=1)))
    assert node.sent(Ready)[0].accepted is None


def test_a_rollback_ahead_of_the_log_is_followed_once_it_is_reached():
    node = Node(A, B)
    first = record_of(brings(A, data(0, 4)))
    node.see(rounds.RollbacksArrived((back_to(1, 1, record=record_hash(first)),)))
    assert node.state.branch == 0
    node.see(rounds.PartsArrived(frozenset(part.digest for part in first.parts)))
    node.see(rounds.LogArrived((entry_of(first, (A, B)),))).see(rounds.Folded(0, STATE))
    assert node.did(rounds.Turn) and node.state.branch == 1


def test_a_rollback_whose_record_is_not_ours_is_looked_at_and_not_just_followed():
    node = Node(A, B)
    committed(node, 1)
    assert node.see(rounds.RollbacksArrived((back_to(1, 1, record=OLDER),))).did(rounds.Rewind)


def test_rollbacks_with_a_gap_before_them_wait():
    node = Node(A, B)
    committed(node)
    assert not node.see(rounds.RollbacksArrived((back_to(2, 0),))).effects
    assert node.see(rounds.RollbacksArrived((back_to(1, 1), back_to(2, 0)))).did(rounds.Rewind) == [
        rounds.Rewind(back_to(2, 0))
    ]


def test_a_certificate_of_another_branchs_roster_counts_for_nothing():
    signed = back_to(1, 0)
    node = Node(A, B).see(rounds.RollbacksArrived((signed,)), rounds.RosterArrived(roster(A, B, epoch=1, branch=1)))
    record = record_of(brings(A, data(0, 4)), previous=head_after(signed.rollback).hash)
    stale = entry_of(record, (A, B), Ballot(0, 9))
    node.see(rounds.Received(Commit(RUN, 0, B, stale.record, stale.certificate)))
    assert node.state.committed is None
    good = entry_of(record, (A, B), Ballot(1, 0))
    node.see(rounds.Received(Commit(RUN, 0, B, good.record, good.certificate)))
    assert node.state.committed == good


def test_a_record_under_another_branchs_roster_is_not_signed():
    signed = back_to(1, 0)
    node = Node(A, B, me=B).see(rounds.RollbacksArrived((signed,)))
    node.see(rounds.RosterArrived(roster(A, B, epoch=1, branch=1)))
    record = record_of(brings(A, data(0, 4)), previous=head_after(signed.rollback).hash)
    node.see(rounds.PartsArrived(frozenset(part.digest for part in record.parts)))
    for ballot in (Ballot(0, 0), Ballot(1, 0)):  # a roster of branch 0, and a record that names one
        node.see(rounds.Received(proposes(ballot, A, record)))
        assert not node.sent(Vote)
    node.see(rounds.Received(proposes(Ballot(1, 0), A, replace(record, epoch=1))))
    assert node.sent(Vote)


def test_a_rollback_stops_the_averaging_of_an_undone_round():
    node = Node(A, B).trained(data(0, 4)).see(ready(B, brings(B, data(4, 8))), at=2.0)
    assert node.sent(Begin) and node.state.phase is rounds.Phase.AVERAGING
    assert node.see(rounds.RollbacksArrived((back_to(1, 0),))).did(rounds.StopAveraging)


def test_a_peer_on_a_branch_that_is_no_more_is_told():
    node = Node(A, B).see(
        rounds.RollbacksArrived((back_to(1, 0),)), rounds.RosterArrived(roster(A, B, epoch=1, branch=1))
    )
    node.see(ready(B, round_number=7, previous=OLDER), at=5.0)
    assert node.did(rounds.TellLog) == [rounds.TellLog(B, 0)]
    assert not node.sent(LogRequest)


def test_a_peer_under_a_newer_roster_is_asked_even_if_its_round_is_behind():
    node = Node(A, B)
    committed(node)
    node.see(ready(B, ballot=Ballot(1, 0), round_number=1, previous=OLDER), at=5.0)
    assert node.sent(LogRequest)


# what a node forgot


def test_a_node_that_forgot_its_promises_signs_nothing_under_the_rosters_of_that_time():
    node = Node(A, B, C, silent=0)
    assert not node.see(rounds.Progressed(99)).effects
    record = record_of(brings(B, data(0, 4)), nodes=(A, B, C))
    node.see(rounds.PartsArrived(frozenset(part.digest for part in record.parts)))
    assert not node.see(rounds.Received(proposes(Ballot(0, 0), A, record))).sent(Vote)
    node.see(rounds.RosterArrived(roster(A, B, C, epoch=1, branch=0)))
    assert node.did(rounds.TakeSnapshot)


def rostered(*nodes, epoch=0):
    return Roster(RUN, epoch, tuple(Member(node, node, (), 1) for node in nodes), 0)


def test_a_forgetful_member_leaves_the_roster_and_comes_back_when_that_is_decided_without_it():
    old = rostered(A, B, C)
    members = next_members([old], old.members, silent={C: 0})
    assert [member.node for member in members] == [A, B]
    closed = rostered(A, B, epoch=1)
    members = next_members([closed], old.members, silent={C: 0})
    assert [member.node for member in members] == [A, B, C]


def test_two_of_six_that_forgot_leave_together_where_one_alone_could_not():
    old = rostered(A, B, C, D, E, F)
    members = next_members([old], old.members, silent={E: 0, F: 0})
    assert [member.node for member in members] == [A, B, C, D]


def test_two_of_five_that_forgot_have_to_wait_for_others():
    """The three that are left could be a majority that misses the old one of those two and one of them."""
    old = rostered(A, B, C, D, E)
    assert next_members([old], old.members, silent={D: 0, E: 0}) is None


def forgetful_pair():
    """A coordinator of five, two of which come back with old disks while it gives everyone the time to come back."""
    coordinator = Coordinator().join(A, B, C, D, E)
    for start in (16, 17):  # the roster of all five, and then it alone
        epoch = coordinator.state.roster.roster.epoch
        entry = coordinator.entry(contributes(B, start, start + 1), signers=(A, B, C), epoch=epoch)
        coordinator.see(machine.EntryArrived(entry))
    coordinator.state = replace(coordinator.state, started=coordinator.now)
    for node in (D, E):
        coordinator.see(machine.NodeOpened(node, node, node, (), forgot=True))
    return coordinator


def wait(coordinator, *nodes, head_round=2):
    """Half a patience, with a word from these nodes."""
    later = coordinator.now + machine.RESTART_PATIENCE * coordinator.rules.absent_seconds / 2
    return coordinator.see(*(beats(node, head_round=head_round) for node in nodes), at=later)


def branched(effects):
    return [effect for effect in effects if isinstance(effect, machine.BranchOff)]


def test_a_roster_that_forgotten_promises_hold_is_left_for_a_branch_without_them():
    coordinator = forgetful_pair()
    for _ in range(3):
        assert not branched(wait(coordinator, A, B, C, D, E))
    (effect,) = branched(wait(coordinator, A, B, C, D, E))
    assert effect.reason.startswith("2 of 5 nodes")


def test_nobody_branches_off_while_a_member_that_may_know_more_is_away_or_ahead():
    coordinator = forgetful_pair()
    for _ in range(6):
        assert not branched(wait(coordinator, A, B, D, E))
    for _ in range(6):
        assert not branched(wait(coordinator, A, B, C, D, E, head_round=3)), "its record is on its way"
    assert branched(wait(coordinator, A, B, C, D, E))


def test_the_seal_of_a_member_that_forgot_says_nothing_of_what_it_forgot():
    old = rostered(A, B, C, D, E)
    assert next_members([old], old.members, seals={D: 0, E: 0}, silent={D: 0, E: 0}) is None


def test_a_lone_member_that_forgot_can_not_be_its_own_witness():
    old = rostered(A)
    assert next_members([old], old.members, silent={A: 0}) is None


# rounds that were missed


def misses(node, count):
    for _ in range(count):
        head = node.state.head
        record = record_of(
            brings(B, data(100 * head.round, 100 * head.round + 4)), round_number=head.round, previous=head.hash
        )
        node.see(rounds.PartsArrived(frozenset(part.digest for part in record.parts)))
        node.see(rounds.LogArrived((entry_of(record, (A, B)),)))
        node.see(rounds.Folded(head.round, STATE))


def test_what_rounds_did_not_take_is_kept_until_too_many_have_gone_by():
    node = Node(A, B).trained(data(50, 54))
    misses(node, 8)
    assert node.state.missed == 8 and node.state.carried == brings(A, data(50, 54))
    misses(node, 1)
    assert not node.state.pending


def test_what_is_fresh_does_not_pay_for_what_was_missed_before():
    node = Node(A, B)
    misses(node, 30)  # paused, say: what compression left over has long been dropped
    node.trained(data(50, 54))
    misses(node, 1)
    assert node.state.missed == 1 and node.state.carried == brings(A, data(50, 54))


# the coordinator


def asked(coordinator, to=0, record=None):
    """Order a rollback, and answer its effects as the store would; what was done."""
    done = coordinator.see(machine.RollbackAsked(Head(to, record or GENESIS), "why"))
    (sign,) = [effect for effect in done if isinstance(effect, machine.SignRollback)]
    signed = SignedRollback(sign.rollback, "s")
    done += coordinator.see(machine.Recalled((), (signed,)))
    assert [effect for effect in done if isinstance(effect, machine.TurnLog)] == [machine.TurnLog(signed)]
    leases = coordinator.state.leases
    return signed, done + coordinator.see(
        machine.RolledBack(signed, head_after(signed.rollback), Consumed(), 0, leases)
    )


def running(*nodes):
    coordinator = Coordinator().join(*nodes)
    coordinator.see(machine.LeasesAsked(A, 4))
    coordinator.see(machine.EntryArrived(coordinator.entry(contributes(A, 0, 4))))
    assert coordinator.state.head.round == 1
    return coordinator


def test_a_rollback_moves_the_head_and_gives_the_branch_a_roster_of_its_own():
    coordinator = running(A, B)
    before = coordinator.state.roster.roster.epoch
    signed, _ = asked(coordinator)
    state = coordinator.state
    assert state.head == head_after(signed.rollback) and state.branch == 1 and state.rewinding
    assert state.roster.roster.branch == 1 and state.roster.roster.epoch > before
    assert coordinator.rostered == (A, B)
    assert signed.rollback.undone.round == 1


def test_the_first_roster_of_a_branch_needs_no_majority_of_the_last():
    coordinator = running(A, B, C)
    coordinator.see(beats(A), at=40.0)  # B and C have not been heard of for long
    assert coordinator.rostered == (A, C), "a majority of the roster has to agree, and one of them is away"
    asked(coordinator, to=1, record=coordinator.state.head.hash)
    assert coordinator.rostered == (A,)


def test_records_of_an_undone_branch_are_not_appended():
    coordinator = running(A, B)
    stale = coordinator.entry(contributes(B, 8, 12))
    asked(coordinator)
    head = coordinator.state.head
    coordinator.see(machine.EntryArrived(stale))
    fits = coordinator.entry(contributes(B, 8, 12))
    coordinator.see(machine.EntryArrived(fits))  # certified under a roster of the branch before
    assert coordinator.state.head == head
    epoch = coordinator.state.roster.roster.epoch
    coordinator.see(machine.EntryArrived(coordinator.entry(contributes(B, 8, 12), epoch=epoch)))
    assert coordinator.state.head.round == 1


def test_nothing_is_folded_while_the_replica_is_on_its_way_back():
    coordinator = running(A, B)
    asked(coordinator)
    epoch = coordinator.state.roster.roster.epoch
    entry = coordinator.entry(contributes(B, 8, 12), epoch=epoch)
    parts = [machine.PartStored(part.digest) for part in entry.record.parts]
    done = coordinator.see(machine.EntryArrived(entry), *parts, machine.Folded(0, OLDER))
    assert not [effect for effect in done if isinstance(effect, machine.Fold)]
    have = frozenset(part.digest for part in entry.record.parts)
    rewound = machine.Rewound(coordinator.state.rollbacks[0].rollback.to, START, (entry,), have)
    assert machine.Fold(entry) in coordinator.see(rewound)


def test_two_rollbacks_at_once_are_one_way_back():
    """Seed 4834 of the simulation: the second answer took away a record whose fold was under way."""
    coordinator = running(A, B)
    asked(coordinator)
    signed, _ = asked(coordinator, record=coordinator.state.head.hash)
    epoch = coordinator.state.roster.roster.epoch
    entry = coordinator.entry(contributes(B, 8, 12), epoch=epoch)
    have = frozenset(part.digest for part in entry.record.parts)
    rewound = machine.Rewound(signed.rollback.to, START, (entry,), have)
    assert machine.Fold(entry) in coordinator.see(machine.EntryArrived(entry), rewound)
    assert not coordinator.see(rewound)
    coordinator.see(machine.Folded(0, OLDER))
    assert coordinator.state.unfolded == () and not coordinator.state.folding


def test_a_database_from_a_backup_learns_again_what_it_had_signed():
    coordinator = Coordinator().join(A, B)
    mine = coordinator.state.roster.roster
    newer = SignedRoster(replace(mine, epoch=7), "s")
    done = coordinator.see(machine.Recalled((newer,), ()))
    assert machine.SaveRosters((newer,)) in done
    assert coordinator.state.roster == newer and coordinator.state.next_epoch == 8
    ahead = back_to(1, 5)
    coordinator.see(machine.Recalled((), (ahead,)))
    assert coordinator.state.branch == 0, "the log has not come so far"
    coordinator.see(beats(C))
    coordinator.join(C)
    assert C not in coordinator.rostered, "no roster of a branch that nodes have left"
