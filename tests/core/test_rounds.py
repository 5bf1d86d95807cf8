"""The rules of a round, each as a short list of events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.core import rounds
from node.core.rounds import Phase, Received, Rounds, step
from protocol.log import next_head, record_hash
from protocol.messages import Accepted, Begin, Claim, Commit, LogRequest, Propose, Ready, SignedReady, Vote
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    Certificate,
    Contribution,
    DataRange,
    Digest,
    Exchange,
    Head,
    LogEntry,
    Member,
    NodeId,
    Part,
    PeerId,
    Record,
    Role,
    Rollback,
    Roster,
    Seal,
    Signature,
    SignedRollback,
    SignedRoster,
    VoteBody,
)

RUN = "run"
A, B, C, D, E = (NodeId(name) for name in "abcde")
SHARD = Digest("5" * 64)
GENESIS = Digest("0" * 64)
STATE = Digest("1" * 64)
PARAMETERS = 4 * 65536
CONTEXT = 16
STEPS = 10
SEQUENCES = 1 << 20  # of the shard


def signed_roster(*nodes, epoch=0):
    members = tuple(Member(node, PeerId(node), (), 10**6) for node in nodes)
    return SignedRoster(Roster(RUN, epoch, members, 0), "s")


def rules(me=A):
    return rounds.Rules(
        me=me,
        run=RUN,
        parameters=PARAMETERS,
        context=CONTEXT,
        inner_steps=lambda _: STEPS,
        exchange=lambda roles: Exchange.ALL_REDUCE,
        part_is_vouched=lambda record, part: part.size == 10 and part.signature == "",
        is_data=lambda data: data.shard == SHARD and data.stop <= SEQUENCES,
        round_seconds_min=lambda members: 0.0,
        round_seconds_max=100.0,
        gather_seconds=1.0,
        attempt_seconds_min=5.0,
        attempt_seconds_max=20.0,
        stale_rounds=8,
        sign=lambda body: f"{me} signs",
        vote_is_valid=lambda node, body, signature: signature == f"{node} signs",
        sign_proposal=lambda body: f"{me} proposes",
        proposal_is_valid=lambda node, body, signature: signature == f"{node} proposes",
        brings=lambda head, contribution: contribution,
        is_brought=lambda head, contribution: not contribution.signature.startswith("forged"),
        entry_is_certified=lambda entry, roster: len(entry.certificate.signatures) >= roster.quorum,
    )


def data(start, stop):
    return DataRange(0, SHARD, start, stop)


def brings(node, *ranges):
    return Contribution(node, sum(r.stop - r.start for r in ranges) * CONTEXT, ranges)


def part_of(index, nodes, included, share=None):
    share = share or PARAMETERS // len(nodes) // 65536 * 65536
    stop = PARAMETERS if index == len(nodes) - 1 else (index + 1) * share
    return Part(index, index * share, stop, Digest(f"{index:064x}"), 10, nodes[index], included)


def record_of(*contributions, nodes=(A, B), epoch=0, round_number=0, previous=GENESIS):
    included = tuple(c.node for c in contributions)
    parts = tuple(part_of(index, nodes, included) for index in range(len(nodes)))
    return Record(RUN, round_number, previous, epoch, nodes[0], contributions, parts, STATE)


def ready(node, contribution=None, ballot=Ballot(0, 0), accepted=None, round_number=0, previous=GENESIS):
    mine = contribution or brings(node)
    return Received(Ready(RUN, round_number, previous, ballot, node, mine, accepted), "s")


def entry_of(record, signers, ballot=Ballot(0, 0)):
    votes = tuple(Signature(node, f"{node} signs") for node in signers)
    return LogEntry(record, Certificate(record_hash(record), ballot, votes))


def proposes(ballot, sender, record, accepted=None):
    return Propose(RUN, record.round, ballot, sender, record, f"{sender} proposes", accepted)


def accepts(ballot, record, by=A):
    """A vote for what the leader of that ballot has proposed."""
    return Accepted(ballot, record, f"{by} proposes")


def snapshot(*ranges):
    return rounds.SnapshotTaken(ranges, (), Digest(""))


class Node:
    """A machine, its clock, and everything it wanted done."""

    def __init__(self, *roster, me=A, **state):
        self.rules = rules(me)
        rosters = {0: signed_roster(*roster)} if roster else {}
        fields = {"head": Head(0, GENESIS), "digest": STATE, "consumed": Consumed(), "rosters": rosters}
        fields |= {"active": True, "trains": True}
        self.state = Rounds(**fields | state)
        self.now = 0.0
        self.effects = []

    def see(self, *events, at=None):
        """Take the events, and what the node sends to itself, until it is quiet. The newest effects are kept."""
        self.now = self.now if at is None else at
        self.effects, waiting = [], list(events)
        while waiting:
            self.state, effects = step(self.state, waiting.pop(0), self.now, self.rules)
            self.effects += effects
            own = [e.message for e in effects if isinstance(e, rounds.Send) and self.rules.me in e.to]
            waiting += [Received(message, "s") for message in own]
        return self

    def sent(self, kind):
        return [e.message for e in self.effects if isinstance(e, rounds.Send) and isinstance(e.message, kind)]

    def did(self, kind):
        return [e for e in self.effects if isinstance(e, kind)]

    def trained(self, *ranges, at=None):
        """Trains a whole round, and promises."""
        self.see(rounds.Progressed(STEPS), at=at)
        return self.see(snapshot(*ranges))


# training and promising


def test_a_round_ends_when_its_steps_are_made():
    node = Node(A, B).see(rounds.Progressed(STEPS - 1))
    assert not node.did(rounds.TakeSnapshot)
    assert node.see(rounds.Progressed(STEPS)).did(rounds.TakeSnapshot) == [rounds.TakeSnapshot(0)]


def test_a_slow_node_ends_its_round_when_the_time_is_up():
    node = Node(A, B).see(rounds.Progressed(1))
    assert not node.see(rounds.Ticked(), at=99.0).effects
    assert node.see(rounds.Ticked(), at=100.0).did(rounds.TakeSnapshot)


def test_a_round_lasts_as_long_as_the_cap_on_uploads_wants():
    node = Node(A, B, C)
    node.rules = replace(node.rules, round_seconds_min=lambda members: 40.0 * members)
    node.see(rounds.Progressed(STEPS), at=119.0)  # enough steps, and more than round_seconds_max
    assert not node.did(rounds.TakeSnapshot)
    assert node.see(rounds.Ticked(), at=120.0).did(rounds.TakeSnapshot)


def test_a_node_that_saw_a_majority_ready_stops_training():
    node = Node(A, B, C).see(rounds.Progressed(1))
    assert node.see(ready(B)).did(rounds.TakeSnapshot)


def test_a_node_that_is_not_needed_for_a_majority_goes_on_training():
    node = Node(A, B, C, D, E).see(rounds.Progressed(1))
    assert not node.see(ready(B)).effects


def test_a_node_with_nothing_to_bring_still_promises_to_a_waiting_majority():
    node = Node(A, B).see(ready(B))
    assert not node.sent(Ready)
    assert node.see(rounds.Ticked(), at=1.0).sent(Ready)[0].contribution == brings(A)


def test_a_majority_that_waits_at_a_later_attempt_is_seen_too():
    node = Node(A, B).see(rounds.Progressed(1))
    assert node.see(ready(B, ballot=Ballot(0, 3))).did(rounds.TakeSnapshot)
    assert node.see(snapshot(data(0, 1))).sent(Ready)[0].ballot == Ballot(0, 3)


@pytest.mark.parametrize("why", ["finishing", "time"])
def test_what_earlier_rounds_left_over_is_brought_without_a_new_step(why):
    node = Node(A, carried=brings(A, data(0, 4)))
    event, at = (rounds.Finishing(), 0.0) if why == "finishing" else (rounds.Ticked(), 100.0)
    assert node.see(event, at=at).did(rounds.TakeSnapshot)
    assert node.see(snapshot()).sent(Ready)[0].contribution == brings(A, data(0, 4))


def test_a_paused_member_votes_for_those_who_have_trained_and_keeps_its_own_work():
    node = Node(A, B, trains=False, carried=brings(A, data(4, 6))).see(rounds.Progressed(STEPS))
    assert not node.see(ready(B)).effects
    assert node.see(ready(B, brings(B, data(0, 4)))).sent(Ready)[0].contribution == brings(A)
    assert node.state.carried == brings(A, data(4, 6))


def test_a_node_that_promised_with_nothing_and_then_trained_brings_that_if_nobody_came():
    """Seed 48 of the simulation, with three nodes whose disks were put back: one trained, and all waited for ever."""
    node = Node(A, B, C, D, E, me=B, trains=False)
    node.see(ready(A, brings(A, data(0, 4))))
    assert node.sent(Ready)[0].contribution.tokens == 0
    node.see(rounds.ActivityChanged(active=True, trains=True), rounds.Progressed(STEPS - 1))
    assert not node.did(rounds.TakeSnapshot)
    assert node.see(rounds.Progressed(STEPS)).did(rounds.TakeSnapshot)
    (promise,) = node.see(snapshot(data(8, 12))).sent(Ready)
    assert promise.contribution == brings(B, data(8, 12)) and promise.ballot == Ballot(0, 1)


def test_members_that_bring_nothing_reduce_nothing():
    node = Node(A, B, C).see(ready(B), ready(C, brings(C, data(4, 8)))).trained(data(0, 4))
    assert [signed.ready.sender for signed in node.sent(Begin)[0].readies] == [A, C]


def helped(me=A, exchange=Exchange.ALL_REDUCE, role=Role.HELPER, more=None):
    """A and C are clients, B averages for them."""
    roles = {A: Role.CLIENT, B: role, C: Role.CLIENT} | (more or {})
    members = tuple(Member(node, PeerId(node), (), 10**6, role) for node, role in roles.items())
    node = Node(me=me, trains=me != B, rosters={0: SignedRoster(Roster(RUN, 0, members, 0), "s")})
    node.rules = replace(node.rules, exchange=lambda roles: exchange)
    return node


def test_a_helper_that_brings_nothing_leads_and_reduces_for_those_who_do():
    node = helped(me=B).see(ready(A, brings(A, data(0, 4))), ready(C, brings(C, data(4, 8))))
    (begin,) = node.sent(Begin)
    assert [signed.ready.sender for signed in begin.readies] == [A, B, C]
    assert rounds.group(begin, node.state.roster) == ((A, 4 * CONTEXT), (B, 0), (C, 4 * CONTEXT))
    assert node.did(rounds.Average)
    part = replace(part_of(1, (A, B, C), (A, C)), start=0, stop=PARAMETERS)
    claims = [Received(Claim(RUN, 0, Ballot(0, 0), each, None), "s") for each in (A, C)]
    node.see(rounds.Averaged(Ballot(0, 0), part, {1: part.digest}), *claims)
    (proposal,) = node.sent(Propose)
    assert [each.node for each in proposal.record.contributions] == [A, C] and proposal.record.parts == (part,)
    assert node.sent(Vote), "and it signs what it has proposed"


def test_where_nobody_who_brings_something_can_be_called_a_paused_member_that_can_be_reduces():
    node = helped(me=B, role=Role.PEER).see(ready(A, brings(A, data(0, 4))), ready(C, brings(C, data(4, 8))))
    assert rounds.group(node.sent(Begin)[0], node.state.roster) == ((A, 4 * CONTEXT), (B, 0), (C, 4 * CONTEXT))
    assert node.did(rounds.Average)


def test_a_paused_member_is_left_in_peace_where_a_helper_can_reduce():
    node = helped(me=B, more={D: Role.PEER})
    node.see(ready(D), ready(A, brings(A, data(0, 4))), ready(C, brings(C, data(4, 8))))
    assert [signed.ready.sender for signed in node.sent(Begin)[0].readies] == [A, B, C]


def test_a_member_takes_part_in_a_group_with_a_helper():
    node = helped().trained(data(0, 4))
    readies = tuple(
        SignedReady(ready(each, brought).message, "s")
        for each, brought in ((A, brings(A, data(0, 4))), (B, brings(B)), (C, brings(C, data(4, 8))))
    )
    (average,) = node.see(Received(Begin(RUN, 0, Ballot(0, 0), B, readies), "s")).did(rounds.Average)
    assert [signed.ready.sender for signed in average.begin.readies] == [A, B, C]


def test_where_everybody_averages_by_itself_a_helper_has_nothing_to_do():
    node = helped(me=B, exchange=Exchange.ALL_GATHER)
    node.see(ready(A, brings(A, data(0, 4))), ready(C, brings(C, data(4, 8))))
    assert [signed.ready.sender for signed in node.sent(Begin)[0].readies] == [A, C]
    assert not node.did(rounds.Average)


def test_a_promise_is_said_again_to_whoever_says_its_own_again():
    """It may lack ours; with one promise lost to each of four, all would wait for ever (seed 641)."""
    node = Node(A, B, C, D, E).trained(data(0, 4)).see(ready(B, brings(B, data(4, 8))))
    assert node.see(rounds.Ticked(), at=2.0).sent(Ready)
    assert B not in to_whom(node)
    node.see(ready(B, brings(B, data(4, 8))))
    assert B in to_whom(node.see(rounds.Ticked(), at=4.0))
    assert B not in to_whom(node.see(rounds.Ticked(), at=6.0)), "once for each time"


def to_whom(node):
    return [to for effect in node.did(rounds.Send) for to in effect.to]


def test_a_promise_is_durable_before_it_is_sent():
    kinds = [type(effect) for effect in Node(A, B).trained(data(0, 4)).effects]
    assert kinds.index(rounds.SaveVote) < kinds.index(rounds.Send)


@pytest.mark.parametrize("state", [{"active": False}, {"rosters": {0: signed_roster(B, C)}}, {"rosters": {}}])
def test_a_node_that_is_paused_or_unrostered_promises_nothing(state):
    node = Node(A, B, C, **state)
    node.see(rounds.Progressed(STEPS), ready(B), ready(C), at=200.0)
    assert node.state.phase is Phase.TRAINING
    assert not node.sent(Ready)
    assert not node.did(rounds.TakeSnapshot)


def test_a_node_that_the_newest_roster_drops_takes_no_part_any_more():
    node = Node(A, B, C).trained(data(0, 4))
    node.see(rounds.RosterArrived(signed_roster(B, C, epoch=1)))
    assert node.state.phase is Phase.TRAINING
    assert node.state.contribution == brings(A, data(0, 4))


def test_what_counts_elsewhere_is_not_brought():
    node = Node(A, B, consumed=Consumed().with_ranges((data(0, 8),)), carried=brings(A, data(6, 10)))
    node.trained(data(9, 12), data(20, 24))
    assert node.state.contribution == brings(A, data(8, 10), data(10, 12), data(20, 24))


# restarts


def test_a_restarted_node_does_not_use_a_ballot_that_it_may_have_led():
    node = Node(A, B, ballot=Ballot(0, 2)).trained(data(0, 4))
    assert node.sent(Ready)[0].ballot == Ballot(0, 3)


def test_a_restarted_node_says_what_it_had_voted_for():
    accepted = accepts(Ballot(0, 0), record_of(brings(B, data(0, 4))))
    node = Node(A, B, ballot=Ballot(0, 0), accepted=accepted).trained(data(8, 9))
    assert node.sent(Ready)[0].accepted == accepted


def test_a_restarted_node_signs_no_second_record_in_one_ballot():
    record = record_of(brings(A, data(0, 4)))
    other = replace(record, contributions=(brings(A, data(4, 8)),))
    have = frozenset(part.digest for part in record.parts)
    node = Node(A, B, me=B, ballot=Ballot(0, 0), accepted=accepts(Ballot(0, 0), record), have=have)
    assert not node.see(Received(proposes(Ballot(0, 0), A, other))).sent(Vote)


def test_a_restarted_node_signs_for_no_roster_older_than_the_newest_that_it_knows():
    rosters = {0: signed_roster(A, B), 1: signed_roster(A, B, epoch=1)}
    record = record_of(brings(A, data(0, 4)))
    have = frozenset(part.digest for part in record.parts)
    node = Node(me=B, rosters=rosters, have=have)
    assert not node.see(Received(proposes(Ballot(0, 0), A, record))).sent(Vote)


def test_a_node_that_leaves_signs_nothing_more_until_it_is_opened_again():
    node = Node(A, B, me=B).trained(data(8, 9))
    assert rounds.seal(node.state, linked=True) == Seal(0, 0)
    record = record_of(brings(A, data(0, 4)))
    have = frozenset(part.digest for part in record.parts)
    proposal = Received(proposes(Ballot(0, 2), A, record))
    sealed = Node(A, B, me=B, sealed=0, ballot=Ballot(0, 0), have=have)
    assert not sealed.see(proposal).sent(Vote)
    assert not sealed.trained(data(8, 9)).sent(Ready)
    sealed.see(rounds.Unsealed())
    assert sealed.see(proposal).sent(Vote)


def test_a_seal_outlives_the_round_that_it_was_made_in():
    """Seed 8494 of the simulation: it left, came back without the coordinator, read the log, and voted where its seal
    had been relied on. Two majorities signed two records."""
    record = record_of(brings(A, data(0, 4)))
    node = Node(A, B, C, me=B, sealed=0)
    node.see(rounds.LogArrived((entry_of(record, (A, C)),)), rounds.PartsArrived({p.digest for p in record.parts}))
    node.see(rounds.Folded(0, STATE))
    assert node.state.head.round == 1
    later = replace(record_of(brings(A, data(4, 8)), round_number=1, previous=node.state.head.hash), leader=B)
    node.see(rounds.PartsArrived({p.digest for p in later.parts}))
    proposal = Received(proposes(Ballot(0, 0), B, later))
    assert not node.see(proposal).sent(Vote)
    assert not node.see(rounds.Progressed(STEPS)).did(rounds.TakeSnapshot)
    node.see(rounds.Unsealed())
    assert node.see(proposal).sent(Vote)


def test_a_node_that_has_voted_in_the_open_round_leaves_without_a_seal():
    accepted = accepts(Ballot(0, 0), record_of(brings(B, data(0, 4))))
    assert rounds.seal(Node(A, B, ballot=Ballot(0, 0), accepted=accepted).state, linked=True) is None


def test_a_roster_is_acted_under_from_its_floor_on():
    later = signed_roster(A, B, epoch=1)
    later = replace(later, roster=replace(later.roster, floor=1))
    node = Node(rosters={0: signed_roster(A, B), 1: later})
    assert not node.trained(data(0, 4)).sent(Ready)


def test_a_node_without_the_roster_of_its_last_record_waits_for_it():
    last = entry_of(record_of(brings(B, data(0, 4))), (A, B), Ballot(5, 0))
    node = Node(A, B, head=next_head(last.record), last=last)
    assert not node.see(rounds.Progressed(STEPS)).effects
    assert node.see(rounds.RosterArrived(signed_roster(A, B, epoch=5))).did(rounds.TakeSnapshot)


# gathering and leading


def test_a_late_member_is_not_waited_for_beyond_the_grace():
    node = Node(A, B, C).trained(data(0, 4)).see(ready(B, brings(B, data(4, 8))))
    assert not node.see(rounds.Ticked(), at=0.9).sent(Begin)
    begin = node.see(rounds.Ticked(), at=1.0).sent(Begin)[0]
    assert [signed.ready.sender for signed in begin.readies] == [A, B]


def test_a_round_begins_at_once_when_everyone_is_there():
    node = Node(A, B, C).trained(data(0, 4))
    assert node.see(ready(B), ready(C)).sent(Begin)


def test_a_leaders_silence_costs_one_attempt():
    node = Node(B, A, C).trained(data(0, 4)).see(ready(C))
    node.see(rounds.Ticked(), at=30.0)
    assert node.sent(Ready)[-1].ballot == Ballot(0, 1)
    assert node.state.last_failure == "the leader did not begin"


def test_a_lost_promise_is_sent_again():
    node = Node(A, B, C).trained(data(0, 4))
    again = node.see(rounds.Ticked(), at=2.0).did(rounds.Send)
    assert [send.to for send in again] == [(B, C)]


def test_a_member_whose_data_another_brings_too_is_left_out_and_still_counts_for_the_majority():
    node = Node(A, B).trained(data(0, 4)).see(ready(B, brings(B, data(2, 6))))
    assert [signed.ready.sender for signed in node.sent(Begin)[0].readies] == [A]


def test_a_member_above_its_weight_cap_does_not_spoil_the_round():
    node = Node(A, B).trained(data(0, 4)).see(ready(B, brings(B, data(100, 10**6))))
    assert [signed.ready.sender for signed in node.sent(Begin)[0].readies] == [A]


def test_failed_attempts_are_counted_whatever_became_of_the_round():
    node = Node(B, C, A).trained(data(0, 4))
    for attempt in range(2):  # led by B and by C, who are silent both
        node.see(ready(C, ballot=Ballot(0, attempt)))
        node.see(rounds.Ticked(), at=node.now + 60.0)
    assert (node.state.ballot, node.state.attempts_failed) == (Ballot(0, 2), 2)
    folding(node, brings(B, data(0, 4)))
    node.see(rounds.Folded(0, Digest("2" * 64)))
    assert (node.state.head.round, node.state.attempts_failed) == (1, 2)


def test_a_round_in_which_nobody_trained_is_tried_again():
    node = Node(A, B).see(ready(B))
    node.see(rounds.Ticked(), at=1.0)
    assert not node.sent(Begin)
    node.see(rounds.Ticked(), at=30.0)
    assert node.state.last_failure == "nobody had trained"


def test_a_peer_far_ahead_is_followed_in_jumps():
    node = Node(A, B).trained(data(0, 4)).see(ready(B, ballot=Ballot(0, 2**62)))
    assert node.state.ballot == Ballot(0, rounds.ATTEMPT_JUMP_MAX)
    assert node.see(ready(B, ballot=Ballot(0, 2**62))).state.ballot == Ballot(0, 2 * rounds.ATTEMPT_JUMP_MAX)


@pytest.mark.parametrize(
    "contribution",
    [
        Contribution(B, 64, (data(4, 0),)),
        Contribution(B, 65, (data(0, 4),)),
        Contribution(A, 64, (data(0, 4),)),
        Contribution(B, 64, (replace(data(0, 4), shard="../x"),)),
        brings(B, replace(data(0, 4), shard=Digest("8" * 64))),
        brings(B, data(SEQUENCES - 3, SEQUENCES + 1)),
    ],
    ids=["backwards", "more tokens than data", "another's", "no digest", "no shard of the run", "past the shard's end"],
)
def test_a_promise_that_brings_nonsense_is_not_heard(contribution):
    node = Node(A, B).trained(data(8, 12)).see(ready(B, contribution))
    assert not node.effects
    assert B not in node.state.readies


# deciding


def gathered_part(index, node):
    return Part(index, 0, PARAMETERS, Digest(f"{index:064x}"), 10, node, (node,))


def averaged(*others, me_brings=data(0, 4), gathers=False):
    """A leads a round with the others, and all have averaged."""
    nodes = (A, *others)
    node = Node(*nodes)
    if gathers:
        node.rules = replace(node.rules, exchange=lambda roles: Exchange.ALL_GATHER)
    node.trained(me_brings)
    node.see(*(ready(other, brings(other, data(100 * i, 100 * i + 4))) for i, other in enumerate(others, 1)))
    parts = [gathered_part(i, n) if gathers else part_of(i, nodes, nodes) for i, n in enumerate(nodes)]
    held = {part.index: part.digest for part in parts}
    node.see(rounds.Averaged(Ballot(0, 0), parts[0], held))
    claims = [Claim(RUN, 0, Ballot(0, 0), n, p) for n, p in zip(others, parts[1:], strict=True)]
    return node, claims


def test_the_leader_proposes_what_the_reducers_claim():
    node, claims = averaged(B)
    record = node.see(*map(Received, claims)).sent(Propose)[0].record
    assert [part.reducer for part in record.parts] == [A, B]
    assert record.contributions == (brings(A, data(0, 4)), brings(B, data(100, 104)))


def test_a_claim_for_a_slice_that_is_not_the_reducers_is_left_out():
    node, (claim,) = averaged(B)
    lie = replace(claim, part=replace(claim.part, start=0))
    record = node.see(Received(lie)).sent(Propose)[0].record
    assert [part.reducer for part in record.parts] == [A]


def test_what_everybody_gathered_is_proposed_as_one_whole_part_of_each_that_claims_it():
    node, _ = averaged(B, C, gathers=True)
    claims = [Claim(RUN, 0, Ballot(0, 0), n, gathered_part(i, n)) for i, n in ((1, B), (2, C))]
    record = node.see(*map(Received, claims)).sent(Propose)[0].record
    assert record.exchange is Exchange.ALL_GATHER
    assert [(part.reducer, part.start, part.stop) for part in record.parts] == [(n, 0, PARAMETERS) for n in (A, B, C)]


def test_a_member_whose_contribution_is_not_whole_is_left_out_of_a_gathered_record():
    node, _ = averaged(B, C, gathers=True)
    slice_only = Claim(RUN, 0, Ballot(0, 0), B, part_of(1, (A, B, C), (B,)))
    node.see(Received(slice_only), Received(Claim(RUN, 0, Ballot(0, 0), C, None)))
    (proposal,) = node.sent(Propose)
    assert [contribution.node for contribution in proposal.record.contributions] == [A]


def test_a_reducer_that_stays_silent_is_not_waited_for_for_ever():
    node, _ = averaged(B)
    assert not node.see(rounds.Ticked(), at=1.0).sent(Propose)
    assert node.see(rounds.Ticked(), at=0.8 * node.state.deadline).sent(Propose)


def test_a_slow_line_has_half_of_the_time_that_its_round_was_trained_for():
    node = Node(A, B).trained(data(0, 4), at=30.0)
    node.state = replace(node.state, decide_seconds=0.5)
    (average,) = node.see(ready(B, brings(B, data(100, 104)))).did(rounds.Average)
    assert average.seconds == 0.6 * 15.0 and node.state.deadline == 30.0 + 15.0


def test_a_long_round_makes_no_leader_wait_longer_than_the_runs_deadline():
    node = Node(A, B).trained(data(0, 4), at=90.0)
    (average,) = node.see(ready(B, brings(B, data(100, 104)))).did(rounds.Average)
    assert average.seconds == 0.6 * node.rules.attempt_seconds_max


def test_a_record_is_signed_only_with_its_parts_on_disk():
    record = record_of(brings(A, data(0, 4)))
    node = Node(A, B, me=B).trained(data(8, 12))
    node.see(Received(proposes(Ballot(0, 0), A, record)))
    assert node.did(rounds.FetchParts)
    assert not node.sent(Vote)
    node.see(rounds.PartsArrived(frozenset(part.digest for part in record.parts)))
    assert [type(effect) for effect in node.effects] == [rounds.SaveVote, rounds.Send]


def test_a_node_that_is_not_ready_yet_signs_nothing():
    """Seed 2225 of the simulation: its disk was an old one, and the coordinator had not said so yet."""
    node = Node(A, B, me=B, active=False)
    node.see(Received(proposes(Ballot(0, 0), A, record_of(brings(A, data(0, 4))))))
    assert not node.effects and node.state.phase is Phase.TRAINING


def test_parts_that_nobody_had_are_asked_for_again():
    record = record_of(brings(A, data(0, 4)))
    node = Node(A, B, me=B).see(Received(proposes(Ballot(0, 0), A, record)))
    lost = frozenset(part.digest for part in record.parts)
    assert not node.see(rounds.PartsLost(lost)).did(rounds.FetchParts)
    assert node.see(rounds.Ticked(), at=2.0).did(rounds.FetchParts)


@pytest.mark.parametrize(
    "change",
    [
        {"previous": Digest("9" * 64)},
        {"state": Digest("9" * 64)},
        {"contributions": (Contribution(A, 65, (data(0, 4),)),)},
        {"contributions": (brings(A, data(0, 4), data(3, 5)),)},
        {"contributions": (brings(A, data(900, 901)),)},
        {"contributions": (brings(A, replace(data(0, 4), shard=Digest("8" * 64))),)},
        {"contributions": (brings(A, data(SEQUENCES - 3, SEQUENCES + 1)),)},
        {"parts": tuple(replace(part_of(index, (A, B), (A,)), size=11) for index in range(2))},
    ],
    ids=[
        *("another head", "another state", "tokens", "data twice", "data that counts elsewhere"),
        *("no shard of the run", "past the shard's end", "parts too large"),
    ],
)
def test_a_record_that_does_not_fit_is_not_signed(change):
    record = record_of(brings(A, data(0, 4)))
    have = frozenset(part.digest for part in record.parts)
    spent = Consumed().with_ranges((data(900, 901),))
    proposal = proposes(Ballot(0, 0), A, replace(record, **change))
    assert not Node(A, B, me=B, have=have, consumed=spent).see(Received(proposal)).sent(Vote)
    assert Node(A, B, me=B, have=have).see(Received(replace(proposal, record=record))).sent(Vote)


def test_nothing_is_signed_below_a_promise():
    record = record_of(brings(A, data(0, 4)))
    node = Node(A, B, me=B, have=frozenset(part.digest for part in record.parts), ballot=Ballot(0, 2))
    assert not node.see(Received(proposes(Ballot(0, 0), A, record))).sent(Vote)


def test_a_re_proposal_keeps_the_records_hash():
    record = record_of(brings(B, data(0, 4)), nodes=(A, B, C))
    node = Node(A, B, C).trained(data(8, 12))
    accepted = accepts(Ballot(0, 0), record)
    node.see(ready(B, ballot=Ballot(0, 3), accepted=accepted), ready(C, ballot=Ballot(0, 3)))
    proposal = node.sent(Propose)[0]
    assert (proposal.ballot, record_hash(proposal.record)) == (Ballot(0, 3), record_hash(record))


def test_the_newest_of_several_accepted_records_is_proposed_again():
    old, new = record_of(brings(B, data(0, 4))), record_of(brings(C, data(4, 8)))
    node = Node(A, B, C).trained(data(8, 12))
    node.see(
        ready(B, ballot=Ballot(0, 3), accepted=accepts(Ballot(0, 1), old, by=B)),
        ready(C, ballot=Ballot(0, 3), accepted=accepts(Ballot(0, 2), new, by=C)),
    )
    assert node.sent(Propose)[0].record == new


def test_a_joiner_asks_for_the_roster_of_a_record_that_is_proposed_again():
    record = record_of(brings(A, data(0, 4)))
    node = Node(me=C, rosters={1: signed_roster(A, C, epoch=1)})
    node.see(Received(proposes(Ballot(1, 0), A, record)))
    assert node.did(rounds.Send) == [rounds.Send((A,), LogRequest(RUN, 0, C))]


def test_a_majority_of_votes_makes_the_certificate():
    node, claims = averaged(B, C)
    node.see(*map(Received, claims))
    hashed = record_hash(node.sent(Propose)[0].record)
    vote = Vote(RUN, 0, Ballot(0, 0), B, hashed, "b signs")
    assert not node.see(Received(replace(vote, signature="forged"))).sent(Commit)
    assert [s.node for s in node.see(Received(vote)).sent(Commit)[0].certificate.signatures] == [A, B]
    assert node.did(rounds.Fold)


def test_a_vote_for_another_record_does_not_count():
    node, claims = averaged(B)
    node.see(*map(Received, claims))
    vote = Vote(RUN, 0, Ballot(0, 0), B, Digest("9" * 64), "b signs")
    assert not node.see(Received(vote)).sent(Commit)


def test_a_pause_in_mid_round_still_lets_the_round_end():
    node, claims = averaged(B)
    node.see(rounds.ActivityChanged(True, trains=False))
    assert node.see(*map(Received, claims)).sent(Vote)


def test_an_attempt_without_a_majority_keeps_the_contribution():
    node, claims = averaged(B)
    node.see(*map(Received, claims))
    again = node.see(rounds.Ticked(), at=60.0).sent(Ready)[0]
    assert (again.ballot, again.contribution) == (Ballot(0, 1), brings(A, data(0, 4)))
    assert again.accepted.ballot == Ballot(0, 0)


# the log


def folding(node, *contributions, **record):
    entry = entry_of(record_of(*contributions, **record), (A, B))
    node.see(Received(Commit(RUN, 0, B, entry.record, entry.certificate)))
    node.see(rounds.PartsArrived(frozenset(part.digest for part in entry.record.parts)))
    return entry


def test_a_folded_record_moves_the_head():
    node = Node(A, B).trained(data(0, 4))
    entry = folding(node, brings(A, data(0, 4)))
    node.see(rounds.Folded(0, Digest("2" * 64)))
    assert (node.state.head, node.state.digest) == (next_head(entry.record), "2" * 64)
    assert node.state.consumed.covers(data(0, 4))
    assert not node.state.pending


def test_what_a_round_left_out_is_brought_to_the_next():
    node = Node(A, B).trained(data(0, 4))
    folding(node, brings(B, data(8, 12)))
    node.see(rounds.Folded(0, STATE)).trained(data(4, 6))
    assert node.state.contribution == brings(A, data(0, 4), data(4, 6))


def test_what_a_former_life_had_brought_does_not_settle_what_this_one_brings():
    node = Node(A, B, ballot=Ballot(0, 0)).trained(data(20, 24))
    folding(node, brings(A, data(0, 4)))
    assert node.see(rounds.Folded(0, STATE)).state.carried == brings(A, data(20, 24))


def test_a_certificate_without_a_majority_is_not_followed():
    entry = entry_of(record_of(brings(B, data(0, 4))), (B,))
    node = Node(A, B).see(Received(Commit(RUN, 0, B, entry.record, entry.certificate)))
    assert node.state.committed is None


def test_a_node_that_is_behind_asks_for_the_log():
    node = Node(A, B).see(ready(B, round_number=3, previous=STATE))
    assert node.sent(LogRequest) == [LogRequest(RUN, 0, A)]
    assert not node.see(ready(B, round_number=3, previous=STATE), at=0.5).effects
    assert node.see(ready(B, round_number=3, previous=STATE), at=1.5).sent(LogRequest)


@pytest.mark.parametrize("behind", [1, 3])
def test_a_peer_that_is_behind_hears_of_the_newest_record(behind):
    last = entry_of(record_of(brings(B, data(0, 4)), round_number=2), (A, B))
    node = Node(A, B, head=next_head(last.record), last=last)
    assert node.see(ready(B, round_number=3 - behind)).sent(Commit)[0].record == last.record


def test_records_are_folded_one_after_the_other():
    first = record_of(brings(A, data(0, 4)))
    second = record_of(brings(B, data(4, 8)), round_number=1, previous=next_head(first).hash)
    node = Node(A, B, have=frozenset(part.digest for part in first.parts))
    node.see(rounds.LogArrived((entry_of(second, (A, B)), entry_of(first, (A, B)))))
    assert [fold.entry.record for fold in node.did(rounds.Fold)] == [first]
    node.see(rounds.Folded(0, STATE))
    node.see(rounds.PartsArrived(frozenset(part.digest for part in second.parts)))
    assert [fold.entry.record for fold in node.did(rounds.Fold)] == [second]


def test_records_of_rosters_long_gone_are_followed():
    newer = {epoch: signed_roster(A, B, epoch=epoch) for epoch in range(1, 2 * rounds.ROSTERS_KEPT)}
    first = record_of(brings(A, data(0, 4)))
    node = Node(rosters=newer, have=frozenset(part.digest for part in first.parts))
    node.see(rounds.LogArrived((entry_of(first, (A, B)),), (signed_roster(A, B),)))
    assert node.did(rounds.Fold)
    node.see(rounds.Folded(0, STATE), rounds.RosterArrived(signed_roster(A, B, epoch=500)))
    assert len(node.state.rosters) == rounds.ROSTERS_KEPT


@pytest.mark.parametrize("voter", [A, B])
def test_a_record_that_has_a_vote_is_proposed_again_however_many_rosters_have_come_since(voter):
    record = record_of(brings(B, data(0, 4)))
    voted = accepts(Ballot(1, 0), record)  # proposed again once before, under a newer roster than its own
    node = Node(A, B, ballot=Ballot(1, 0), accepted=voted if voter == A else None)
    node.see(rounds.RosterArrived(signed_roster(A, B, epoch=1)))
    if voter == B:
        node.see(ready(B, ballot=Ballot(1, 0), accepted=voted))
    newest = 2 * rounds.ROSTERS_KEPT
    node.see(*(rounds.RosterArrived(signed_roster(A, B, epoch=epoch)) for epoch in range(2, newest + 1)))
    node.trained(data(8, 12))
    again = ready(B, ballot=Ballot(newest, 0), accepted=voted if voter == B else None)
    assert [each.record for each in node.see(again).sent(Propose)] == [record]
    assert len(node.state.rosters) == rounds.ROSTERS_KEPT + 2


def test_an_open_round_keeps_its_roster_however_many_come_while_it_is_decided():
    node = Node(A, B).trained(data(0, 4)).see(ready(B))
    node.see(*(rounds.RosterArrived(signed_roster(A, B, C, epoch=epoch)) for epoch in range(1, 100)))
    assert node.state.phase is Phase.AVERAGING and node.state.roster == signed_roster(A, B).roster


def test_steps_made_while_a_record_is_folded_are_kept():
    node = Node(A, B).trained(data(0, 4)).see(rounds.Progressed(3))
    folding(node, brings(A, data(0, 4)))
    assert node.see(rounds.Folded(0, STATE)).state.steps == 3


def test_a_snapshot_that_arrives_after_the_fold_counts_for_the_next_round():
    node = Node(A, B).see(rounds.Progressed(STEPS))
    folding(node, brings(B, data(8, 12)))
    node.see(rounds.Folded(0, STATE), snapshot(data(0, 4)))
    assert node.sent(Ready)[0].round == 1
    assert node.state.contribution == brings(A, data(0, 4))


def test_begin_with_forged_membership_starts_nothing():
    node = Node(A, B, me=B).trained(data(0, 4))
    stranger = SignedReady(Ready(RUN, 0, GENESIS, Ballot(0, 0), E, brings(E), None), "s")
    assert not node.see(Received(Begin(RUN, 0, Ballot(0, 0), A, (stranger,)))).did(rounds.Average)
    assert not node.see(Received(Begin(RUN, 0, Ballot(0, 0), B, ()))).did(rounds.Average)


def test_signatures_name_what_is_signed():
    signed = []
    node = Node(A, B, me=B, have=frozenset(part.digest for part in record_of(brings(A, data(0, 4))).parts))
    node.rules = replace(node.rules, sign=lambda body: signed.append(body) or "s")
    record = record_of(brings(A, data(0, 4)))
    node.see(Received(proposes(Ballot(0, 0), A, record)))
    assert signed == [VoteBody(RUN, 0, Ballot(0, 0), record_hash(record))]


# liars


def test_nothing_is_heard_of_a_member_that_did_not_bring_what_it_says():
    forged = replace(brings(B, data(0, 4)), signature="forged")
    node = Node(A, B).trained(data(8, 12))
    assert not node.see(ready(B, forged)).sent(Begin)
    assert node.see(ready(B, brings(B, data(0, 4)))).sent(Begin)


def test_no_leader_can_put_weight_into_a_members_name():
    record = record_of(replace(brings(A, data(0, 4)), signature="forged"), brings(B, data(4, 8)))
    node = Node(A, B, me=B).see(rounds.PartsArrived({p.digest for p in record.parts}))
    assert not node.see(Received(proposes(Ballot(0, 0), A, record))).sent(Vote)
    honest = record_of(brings(A, data(0, 4)), brings(B, data(4, 8)))
    assert node.see(Received(proposes(Ballot(0, 0), A, honest))).sent(Vote)


def test_a_record_that_nobody_could_sign_costs_no_check_of_its_contributions():
    node, checked = Node(A, B, me=B), []
    node.rules = replace(node.rules, is_brought=lambda head, contribution: checked.append(contribution) or True)
    for brought in ((brings(A, data(0, 4)), brings(A, data(4, 8))), (brings(A, data(0, 4)), brings(E, data(4, 8)))):
        node.see(Received(proposes(Ballot(0, 0), A, record_of(*brought))))
    assert not checked and node.state.proposal is None


def test_a_group_with_a_forged_member_is_not_averaged_with():
    node = Node(A, B, me=B).trained(data(4, 8))
    (mine,) = node.sent(Ready)
    forged = Ready(RUN, 0, GENESIS, Ballot(0, 0), A, replace(brings(A, data(0, 4)), signature="forged"), None)
    begin = Begin(RUN, 0, Ballot(0, 0), A, (SignedReady(forged, "s"), SignedReady(mine, "s")))
    assert not node.see(Received(begin)).did(rounds.Average)


def test_a_member_that_only_votes_proves_nothing():
    node = Node(A, B, C).trained(data(8, 12))
    nothing = replace(brings(B), signature="forged")
    assert node.see(ready(B, nothing), ready(C, brings(C, data(0, 4)))).sent(Begin)


@pytest.mark.parametrize("proposer", [B, C])
def test_a_vote_for_what_its_leader_never_proposed_is_not_believed(proposer):
    """One member that says it has voted for a record of its own would decide the round."""
    invented = replace(record_of(brings(B, data(0, 4)), nodes=(B,)), leader=B)
    node = Node(A, B, C).trained(data(8, 12))
    lie = ready(B, brings(B, data(0, 4)), accepted=accepts(Ballot(0, 0), invented, by=proposer))
    node.see(lie, ready(C, brings(C, data(4, 8))))
    assert not node.sent(Propose)
    assert B not in {signed.ready.sender for signed in node.sent(Begin)[0].readies}


def test_a_liar_that_is_needed_for_the_majority_costs_attempts_and_decides_nothing():
    invented = replace(record_of(brings(B, data(0, 4)), nodes=(B,)), leader=B)
    node = Node(A, B).trained(data(8, 12))
    node.see(ready(B, brings(B, data(0, 4)), accepted=accepts(Ballot(0, 0), invented, by=B)), at=1.0)
    assert not node.sent(Propose) and not node.sent(Begin)
    node.see(rounds.Ticked(), at=60.0)
    assert node.state.ballot == Ballot(0, 1)


def test_a_record_whose_parts_nobody_has_holds_a_round_up_for_two_attempts():
    """Its leader has signed it, and says that it has voted for it, and hands nothing out."""
    hidden = record_of(brings(B, data(0, 4)))
    hidden = replace(hidden, leader=B)
    node = Node(A, B, C, ballot=Ballot(0, 1)).trained(data(8, 12))
    lie = accepts(Ballot(0, 1), hidden, by=B)
    told = [ready(B, ballot=Ballot(0, 3), accepted=lie), ready(C, brings(C, data(4, 8)), ballot=Ballot(0, 3))]
    (again,) = node.see(*told, at=1.0).sent(Propose)
    assert again.record == hidden and again.accepted == lie, "it may have had a majority"
    node.see(rounds.PartsLost({part.digest for part in hidden.parts}), rounds.Ticked(), at=30.0)
    assert node.state.ballot == Ballot(0, 4) and node.state.doubted == {B}
    node.see(ready(B, ballot=Ballot(0, 6), accepted=lie), at=31.0)
    assert node.state.ballot == Ballot(0, 6) and node.state.doubted == {B}
    fresh = node.see(ready(C, brings(C, data(4, 8)), ballot=Ballot(0, 6)), rounds.Ticked(), at=33.0).sent(Begin)[0]
    assert {signed.ready.sender for signed in fresh.readies} == {A, C}


def test_who_has_the_parts_is_heard_though_others_were_doubted_before():
    record = record_of(brings(B, data(0, 4)), brings(C, data(4, 8)))
    node = Node(A, B, C, ballot=Ballot(0, 2), doubted=frozenset({B})).trained(data(8, 12))
    told = accepts(Ballot(0, 0), record)
    promises = [ready(n, ballot=Ballot(0, 3), accepted=told) for n in (B, C)]
    assert node.see(*promises).sent(Propose)[0].record == record


def promised(node, *others):
    """Everybody has promised the first ballot, and node is waiting for its leader."""
    for place, other in enumerate(others):
        node.see(ready(other, brings(other, data(4 * place, 4 * place + 4))))
    return node.trained(data(100, 104))


def test_a_leader_cannot_leave_most_members_out():
    node = promised(Node(A, B, C, D, E, me=E), A, B, C, D)
    alone = record_of(brings(A, data(0, 4)))
    node.see(rounds.PartsArrived({part.digest for part in alone.parts}))
    assert not node.see(Received(proposes(Ballot(0, 0), A, alone))).sent(Vote)


def test_a_record_of_half_of_them_is_signed_for_lines_do_fail():
    node = promised(Node(A, B, C, D, E, me=E), A, B, C, D)
    half = record_of(*(brings(n, data(4 * i, 4 * i + 4)) for i, n in enumerate((A, B, C))))
    node.see(rounds.PartsArrived({part.digest for part in half.parts}))
    assert node.see(Received(proposes(Ballot(0, 0), A, half))).sent(Vote)


def test_after_some_attempts_any_sound_record_is_better_than_none():
    node = Node(A, B, C, D, E, me=E, ballot=Ballot(0, 4))
    for place, other in enumerate((A, B, C, D)):
        node.see(ready(other, brings(other, data(4 * place, 4 * place + 4)), ballot=Ballot(0, 5)))
    node.trained(data(100, 104))
    alone = record_of(brings(A, data(0, 4)))
    node.see(rounds.PartsArrived({part.digest for part in alone.parts}))
    assert node.see(Received(proposes(Ballot(0, 5), A, alone))).sent(Vote)


def test_an_old_record_is_proposed_again_only_with_the_vote_that_it_has():
    old = record_of(brings(B, data(0, 4)), nodes=(A, B, C))
    node = Node(A, B, C, me=C).see(rounds.PartsArrived({part.digest for part in old.parts}))
    assert not node.see(Received(proposes(Ballot(0, 1), B, old))).sent(Vote)
    assert not node.see(Received(proposes(Ballot(0, 1), B, old, accepts(Ballot(0, 0), old, by=B)))).sent(Vote)
    assert not node.see(Received(proposes(Ballot(0, 1), B, old, accepts(Ballot(0, 1), old, by=B)))).sent(Vote)
    assert node.see(Received(proposes(Ballot(0, 1), B, old, accepts(Ballot(0, 0), old)))).sent(Vote)


def test_a_proposal_that_its_leader_did_not_sign_cannot_be_shown_to_others_and_gets_no_vote():
    record = record_of(brings(A, data(0, 4)))
    node = Node(A, B, me=B).see(rounds.PartsArrived({part.digest for part in record.parts}))
    unsigned = replace(proposes(Ballot(0, 0), A, record), signature="B proposes")
    assert not node.see(Received(unsigned)).sent(Vote)


def test_what_is_brought_is_signed_again_for_the_head_that_a_rollback_leaves():
    node = Node(A, B)
    node.rules = replace(node.rules, brings=lambda head, brought: replace(brought, signature=f"for {head.hash[:4]}"))
    node.trained(data(0, 4))
    assert node.state.contribution.signature == "for 0000"
    turn = Rollback(RUN, 1, Head(0, GENESIS), Head(0, GENESIS), "why", 0)
    node.see(rounds.RollbacksArrived((SignedRollback(turn, "s"),)))
    assert node.state.contribution.signature == f"for {node.state.head.hash[:4]}" != "for 0000"
