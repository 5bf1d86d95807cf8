"""Audits of training: who is asked, what a measurement says, when it counts."""

import math
import random
from dataclasses import replace

import pytest

from coordinator.core import audits
from coordinator.core.audits import Ask, Audits, Broken, Kind, Measured, Rules
from coordinator.core.inquiries import ANSWER_ROUNDS
from protocol.contribution import Complaint
from protocol.types import Contribution, DataRange, Digest, Epoch, Fault, NodeId, Record, RoundNumber, RunId

NOTHING = Digest("0" * 64)
RULES = Rules(0.2, NOTHING)
NODES = [NodeId(f"node{number}") for number in range(8)]


def measured(own, more, *, length=2.0, error=0.003, usual=0.02):
    """In nats per token."""
    return Measured(own, error, length, more, error, more, error, usual, error)


HONEST = measured(0.03, 0.018)
HARMFUL = measured(-0.03, -0.001)
TOO_LONG = measured(0.03, 0.018, length=100.0)
NO_NUMBER = measured(math.nan, math.nan)
ZERO = measured(0.0, 0.0, error=0.0)
STRANGER = measured(0.02, 0.0)  # it makes the model better, and knows nothing of its data
LITTLE = measured(0.001, 0.0)
NOISE = measured(0.004, 0.018, error=0.001)  # clear, by chance: a sixth of the honest share


def record(number, members=NODES, updates=None, sequences=32):
    contributions = tuple(
        Contribution(
            node,
            sequences * 64,
            (DataRange(number, Digest("5" * 64), 1000 * index, 1000 * index + sequences),),
            update=(updates or {}).get(node, Digest(f"{number:04x}{index + 1:060x}")),
        )
        for index, node in enumerate(members)
    )
    return Record(RunId("run"), RoundNumber(number), NOTHING, Epoch(0), members[0], contributions, (), NOTHING)


def play(results, rounds, *, rules=RULES, seed=0, updates=lambda number: None, judged=None):
    """Every audit is answered in its own round; what a node brings is told by `results`, honest if it is not there."""
    luck, state, accused = random.Random(seed), Audits(), []
    count = dict.fromkeys(NODES, 0)
    for number in range(rounds):
        out = {each.node for each in accused}
        here = [node for node in NODES if node not in out]
        state, found = audits.certified(state, record(number, here, updates(number)), rules)
        accused += found
        for ask in state.open:
            count[ask.node] += 1
            result = results.get(ask.node, HONEST)
            result = result(number) if callable(result) else result
            state, accusation = audits.measured(state, ask, result, rules, luck.random())
            accused += [accusation] if accusation else []
    return state, accused, count


def test_everybody_is_audited_once_in_a_period_at_a_time_that_luck_chooses():
    times = {node: [] for node in NODES}
    luck, state = random.Random(1), Audits()
    for number in range(400):
        state, _ = audits.certified(state, record(number), RULES)
        for ask in state.open:
            times[ask.node].append(number)
            state, _ = audits.measured(state, ask, HONEST, RULES, luck.random())
    for node in NODES:
        gaps = {later - earlier for earlier, later in zip(times[node][3:], times[node][4:], strict=False)}
        assert max(gaps) <= RULES.period + 1  # where more are due than one round may have, the last waits a round
        assert len(gaps) >= RULES.period - 2  # none can be counted on
    assert sum(map(len, times.values())) / (400 * len(NODES)) == pytest.approx(RULES.share, abs=0.02)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_where_too_few_are_known_to_judge_anybody_no_more_is_asked_for_than_elsewhere(members):
    luck, state, asked = random.Random(1), Audits(), 0
    for number in range(200):
        state, _ = audits.certified(state, record(number, NODES[:members]), RULES)
        for ask in state.open:
            asked += 1
            state, _ = audits.measured(state, ask, HONEST, RULES, luck.random())
    assert asked / (200 * members) == pytest.approx(RULES.share, abs=0.03)


def test_a_crowd_of_newcomers_is_spread_over_several_rounds():
    state, _ = audits.certified(Audits(), record(0), RULES)
    assert len(state.open) == RULES.most(8) == 4
    assert len({ask.node for ask in state.open}) == 4


def test_no_honest_member_is_ever_accused():
    _, accused, _ = play({}, 500)
    assert accused == []


@pytest.mark.parametrize(
    ("result", "most"), [(HARMFUL, 5), (TOO_LONG, 5), (NO_NUMBER, 5), (ZERO, 8), (STRANGER, 8), (NOISE, 8)]
)
def test_a_newcomer_that_harms_is_out_after_two_audits_and_an_idle_one_after_four(result, most):
    state, accused, count = play({NODES[6]: result, NODES[7]: result}, 20)
    assert {each.node for each in accused} == {NODES[6], NODES[7]}
    assert all(each.kind is Kind.POINTS and not each.proved and each.round <= most for each in accused)
    history = state.histories[NODES[7]]
    assert sum(history.points) == audits.POINTS_MAX
    bad = tuple(update for points, update in zip(history.points, history.updates, strict=True) if points)
    assert [each.void for each in accused if each.node == NODES[7]] == [bad] and len(bad) in (2, 4)
    assert count[NODES[7]] <= (
        5 if result in (ZERO, STRANGER, NOISE) else 3
    )  # the first may come before others are known


def test_one_that_turns_late_is_out_within_ten_rounds_of_harm():
    for seed in range(50):
        _, accused, _ = play({NODES[7]: lambda number: HARMFUL if number >= 30 else HONEST}, 60, seed=seed)
        (accusation,) = accused
        assert 30 <= accusation.round < 30 + RULES.period + 2


def test_one_bad_audit_is_forgotten():
    bad = {40, 60, 80}
    _, accused, _ = play({NODES[3]: lambda number: ZERO if number in bad else HONEST}, 120, rules=Rules(1.0, NOTHING))
    assert accused == []


def test_where_others_gain_nothing_either_nobody_is_judged():
    results = dict.fromkeys(NODES, HARMFUL)
    assert play(results, 50)[1] == []
    results = dict.fromkeys(NODES[:7], LITTLE) | {NODES[7]: HARMFUL}
    assert play(results, 50)[1] == []


def test_who_brings_more_tokens_may_bring_more_and_where_all_are_long_nobody_is_judged_by_it():
    assert play(dict.fromkeys(NODES, measured(0.03, 0.018, length=100.0)), 50)[1] == []
    contributions = list(record(1).contributions)
    contributions[0] = replace(contributions[0], tokens=50 * contributions[0].tokens)
    state, _, _ = play({}, 1)
    state, _ = audits.certified(audits.alarmed(state), replace(record(1), contributions=tuple(contributions)), RULES)
    heavy = next(ask for ask in state.open if ask.node == NODES[0])
    assert heavy.weight == pytest.approx(50 * 8 / 57)
    state, _ = audits.measured(state, heavy, measured(0.03, 0.018, length=100.0), RULES, 0.0)
    assert not any(state.histories[NODES[0]].points)


def test_who_brings_fewer_tokens_may_gain_less_and_where_the_model_gained_nothing_clear_nobody_is_judged_by_it():
    contributions = list(record(1).contributions)
    contributions[0] = replace(contributions[0], tokens=contributions[0].tokens // 8)
    state, _, _ = play({}, 1)
    state, _ = audits.certified(audits.alarmed(state), replace(record(1), contributions=tuple(contributions)), RULES)
    light = next(ask for ask in state.open if ask.node == NODES[0])
    state, _ = audits.measured(state, light, NOISE, RULES, 0.0)
    assert not any(state.histories[NODES[0]].points)
    unclear = replace(NOISE, usual=0.003)
    assert math.isnan(unclear.share)
    assert play({NODES[7]: unclear}, 50)[1] == []


def test_in_a_run_that_turns_bad_nobody_is_accused_though_each_was_better_before():
    turned = replace(HARMFUL, usual=-0.02)
    for seed in range(20):
        _, accused, _ = play(dict.fromkeys(NODES, lambda number: turned if number >= 15 else HONEST), 60, seed=seed)
        assert accused == []


def test_beside_a_suspect_others_are_measured_in_the_same_round_and_no_more_often_for_it():
    state, _, _ = play({}, 12)
    due = {node: RoundNumber(1000) for node in NODES} | {NODES[0]: RoundNumber(12)}
    histories = {node: replace(each, due=due[node]) for node, each in state.histories.items()}
    histories[NODES[0]] = replace(histories[NODES[0]], points=(1,), updates=("ab" * 32,))
    state, _ = audits.certified(replace(state, histories=histories), record(12), RULES)
    assert len(state.open) == 1 + audits.CONTROLS and state.open[0].node == NODES[0]
    for ask in state.open[1:]:
        state, _ = audits.measured(state, ask, HONEST, RULES, 0.0)
        assert state.histories[ask.node].due == 1000


def test_a_trace_that_is_faint_time_after_time_is_none_however_clear_it_is_now_and_then():
    def hiding(number):
        return measured(0.03, (0.0065, 0.0035, 0.0035)[number % 3])  # honest: 0.018, six errors

    _, accused, count = play({NODES[7]: hiding}, 30)
    assert [each.node for each in accused] == [NODES[7]] and accused[0].round <= 10 and count[NODES[7]] <= 6
    often = [0.018, 0.009, 0.003, 0.016]  # honest work now and then
    luck = random.Random(3)
    _, accused, _ = play(
        {node: lambda number: measured(0.03, luck.choice(often)) for node in NODES}, 500, rules=Rules(1.0, NOTHING)
    )
    assert accused == []


def test_a_trace_is_missed_only_where_the_others_leave_a_clear_one():
    faint = measured(0.03, 0.006)
    results = dict.fromkeys(NODES, faint) | {NODES[7]: STRANGER}
    assert play(results, 50)[1] == []
    results = dict.fromkeys(NODES[:6], faint) | {NODES[7]: STRANGER}  # one other is clear
    assert play(results, 50)[1] == []
    assert play({NODES[7]: STRANGER}, 50, rules=replace(RULES, traced=False))[1] == [], (
        "sparse work leaves none for sure"
    )


def test_bytes_that_nobody_reads_are_a_proof_for_its_author_has_signed_them():
    state, _ = audits.certified(Audits(), record(0), RULES)
    ask = state.open[0]
    _, accusation = audits.measured(state, ask, Broken("int4 update holds a scale that is NaN"), RULES, 0.5)
    assert accusation is not None and accusation.proved and accusation.kind is Kind.BROKEN
    assert (accusation.node, accusation.evidence) == (ask.node, ask.update)


def test_ones_own_update_a_second_time_is_a_proof():
    again = Digest("a" * 64)
    _, accused, _ = play({}, 12, updates=lambda number: {NODES[2]: again} if number in (3, 11) else None)
    assert [(each.node, each.kind, each.round) for each in accused] == [(NODES[2], Kind.REPLAYED, 11)]


def test_zeros_again_are_no_replay():
    _, accused, _ = play({}, 12, updates=lambda number: {NODES[2]: NOTHING})
    assert accused == []


def test_who_brings_what_another_had_brought_is_out_after_four_rounds_and_the_other_is_not():
    def updates(number):
        return {NODES[7]: Digest(f"{number - 1:04x}{1:060x}")}  # that of node 0 in the round before

    _, accused, _ = play({}, 20, updates=updates)
    assert [(each.node, each.round) for each in accused] == [(NODES[7], 4)]


def test_two_with_one_update_in_one_round_are_both_audited_and_neither_has_a_point():
    same = Digest("b" * 64)
    state, _, _ = play({}, 5)
    state, accused = audits.certified(state, record(5, updates={NODES[1]: same, NODES[2]: same}), RULES)
    assert accused == ()
    assert {NODES[1], NODES[2]} <= {ask.node for ask in state.open}
    assert not any(state.histories[NODES[1]].points) and not any(state.histories[NODES[2]].points)


def test_what_is_undone_may_rightly_be_brought_again():
    again = Digest("a" * 64)
    state, _ = audits.certified(Audits(), record(3, updates={NODES[2]: again}), RULES)
    state = state.gone_back(RoundNumber(3))
    assert state.open == ()
    _, accused = audits.certified(state, record(3, updates={NODES[2]: again}), RULES)
    assert accused == ()


def test_a_result_of_what_was_undone_meanwhile_counts_for_nothing():
    state, _ = audits.certified(Audits(), record(3), RULES)
    ask = state.open[0]
    state = state.gone_back(RoundNumber(2))
    assert audits.measured(state, ask, Broken("nonsense"), RULES, 0.5) == (state, None)


def test_who_never_shows_what_it_signed_is_accused_and_who_is_gone_is_not():
    state, accused, number = Audits(), [], 0
    while not accused:
        state, _ = audits.certified(state, record(number, NODES[:4]), RULES)
        for ask in [ask for ask in state.open if ask.node not in NODES[:2]]:
            state, _ = audits.measured(state, ask, HONEST, RULES, 0.0)
        state, found = audits.expired(state, RoundNumber(number + 1), heard=[NODES[0]], answered=[])
        accused += found
        number += 1
        assert number < 40
    assert {each.node for each in accused} == {NODES[0]} and not accused[0].proved
    assert accused[0].kind is Kind.UNANSWERED
    assert state.histories[NODES[1]].unanswered == 0  # it was not heard of: its connection is lost, or it has left


def test_an_answer_that_waits_for_a_busy_evaluator_is_dropped_and_its_author_stays_due():
    state, _ = audits.certified(Audits(), record(0), RULES)
    ask = state.open[0]
    state, accused = audits.expired(state, RoundNumber(3), heard=NODES, answered=[ask])
    assert state.open == () and accused == ()
    assert state.histories[ask.node].unanswered == 0 and state.histories[ask.node].due == 0


def test_after_a_jump_of_the_loss_everybody_is_due():
    state, _, _ = play({}, 50)
    state, _ = audits.certified(audits.alarmed(state), record(50), Rules(0.5, NOTHING))
    assert {ask.node for ask in state.open} == set(NODES)


def test_who_brings_a_handful_of_sequences_is_not_measured():
    state, _ = audits.certified(Audits(), record(0, sequences=audits.SEQUENCES_MIN - 1), RULES)
    assert state.open == ()


def test_without_a_share_nothing_is_audited():
    state, _ = audits.certified(Audits(), record(0), replace(RULES, share=0.0))
    assert state == Audits()


def test_a_sample_is_spread_over_all_ranges_and_never_names_other_data():
    shard = Digest("5" * 64)
    for stop in (250, 52):
        ranges = (DataRange(0, shard, 10, 20), DataRange(1, shard, 0, 3), DataRange(0, shard, 50, stop))
        for luck in (0.0, 0.3, 0.999):
            chosen = audits.sample(ranges, luck)
            assert sum(len(where) for _, where in chosen) == min(audits.SAMPLED, 13 + stop - 50)
            assert stop == 250 or [span for span, _ in chosen] == list(ranges)
            for span, where in chosen:
                assert span in ranges and len(set(where)) == len(where)
                assert all(span.start <= each < span.stop for each in where)


def test_it_is_measured_against_what_the_others_of_its_record_name():
    state, _ = audits.certified(Audits(), record(7), RULES)
    for ask in state.open:
        others = [each for each in record(7).contributions if each.node != ask.node]
        assert ask.elsewhere == tuple(span for each in others for span in each.ranges)


def test_an_ask_names_what_its_author_signed():
    state, _ = audits.certified(Audits(), record(7), RULES)
    first = record(7).contributions[0]
    assert state.open[0] == Ask(RoundNumber(7), first.node, first.update, first.ranges)


# complaints


def complaint(number, accused=NODES[7], update=Digest("c" * 64)):
    return Complaint(RoundNumber(number), NOTHING, Contribution(accused, 64, (), update=update))


def complained(state, number, accuser=NODES[0], accused=NODES[7], members=8):
    return audits.complained(state, complaint(number, accused), accuser, frozenset(NODES[:members]))


def test_bytes_that_a_member_could_not_read_are_asked_for_though_they_stand_in_no_record():
    state = complained(Audits(), 5)
    (ask,) = state.open
    assert (ask.round, ask.node, ask.update, ask.accuser) == (5, NODES[7], Digest("c" * 64), NODES[0])
    state, accusation = audits.read(state, ask, Broken("int4 update holds a scale that is NaN"))
    assert accusation.proved and accusation.kind is Kind.BROKEN and "a scale that is NaN" in accusation.reason
    assert (accusation.node, accusation.round, accusation.evidence) == (NODES[7], 5, ask.update)
    assert state.open == () and audits.read(state, ask, Broken("again")) == (state, None)


def test_of_one_members_work_in_one_round_the_first_complaint_is_heard():
    state = complained(complained(Audits(), 5), 5, accuser=NODES[1])
    assert [ask.accuser for ask in state.open] == [NODES[0]]
    state, _ = audits.read(state, state.open[0], None)
    assert complained(state, 5, accuser=NODES[1]).open == ()
    assert len(complained(state, 6, accuser=NODES[1]).open) == 1


def test_who_complained_in_vain_is_not_heard_about_that_member_for_long_and_others_are():
    state = complained(Audits(), 5)
    state, accusation = audits.read(state, state.open[0], None)
    assert accusation is None and not any(history.points for history in state.histories.values())
    until = 5 + audits.WORD_ROUNDS
    assert complained(state, until - 1).open == ()
    assert len(complained(state, 6, accuser=NODES[1]).open) == len(complained(state, 6, accused=NODES[6]).open) == 1
    state, _ = audits.expired(state, RoundNumber(until), heard=NODES, answered=[])
    assert len(complained(state, until).open) == 1
    state, _ = audits.expired(state, RoundNumber(until + 1), heard=NODES, answered=[])
    assert state.vain == {}


def said_in_vain(state, number, accusers, members=8, accused=NODES[7]):
    """So many complain in a round, and nothing is wrong with what was signed."""
    for accuser in accusers:
        state = complained(state, number, accuser, accused, members)
    state, found = audits.read(state, state.open[0], None)
    assert state.open == ()
    return state, found


@pytest.mark.parametrize("members", [2, 3, 4, 5, 8])
def test_who_sends_most_members_other_than_it_signed_is_accused_by_their_words_and_by_those_of_half_is_not(members):
    accused, others = NODES[members - 1], NODES[: members - 1]
    most = members // 2 + 1
    state, found = said_in_vain(Audits(), 5, others[: most - 1], members, accused)
    assert found is None
    if members == 2:
        return  # one word against one
    state, found = said_in_vain(state, 6, others[most - 1 : most], members, accused)  # one more
    assert (found.node, found.kind, found.fault, found.proved) == (accused, Kind.GARBLED, Fault.GARBLED, False)
    assert f"{most} of {members} members" in found.reason
    assert said_in_vain(state, 7, others[most - 2 :: -1], members, accused)[1] is None, "it takes as many words again"


def test_words_gather_over_rounds_until_they_are_old_and_only_those_of_members_count():
    state = Audits()
    for number, accuser in enumerate(NODES[:4]):
        state, found = said_in_vain(state, number, [accuser])
        assert found is None
    twice = replace(state, vain={})
    assert said_in_vain(twice, 5, [NODES[3]])[1] is None, "nobody has two words"
    assert said_in_vain(state, 5, [NODES[4]])[1] is not None
    fewer = audits.complained(state, complaint(5), NODES[4], frozenset(NODES[1:]) | {NodeId("new")})
    assert audits.read(fewer, fewer.open[0], None)[1] is None, "one that has left has no word"
    old, _ = audits.expired(state, RoundNumber(audits.WORD_ROUNDS + 1), heard=NODES, answered=[])
    assert said_in_vain(old, audits.WORD_ROUNDS + 1, [NODES[4]])[1] is None


def test_the_words_of_most_count_as_much_where_nothing_is_ever_shown():
    state = Audits()
    for accuser in NODES[:5]:
        state = complained(state, 5, accuser)
    state, (found,) = audits.expired(state, RoundNumber(8), heard=(), answered=[])
    assert (found.node, found.kind) == (NODES[7], Kind.GARBLED) and state.words == {}
    less = complained(Audits(), 5)
    assert audits.expired(less, RoundNumber(8), heard=(), answered=[])[1] == ()
    state, found = audits.expired(complained(state, 9), RoundNumber(12), heard=(), answered=state.open)
    assert found == ()


@pytest.mark.parametrize("members", [2, 3, 8])
def test_who_complains_in_vain_about_most_members_is_accused_and_about_half_is_not(members):
    liar, others, most = NODES[0], NODES[1:members], members // 2 + 1
    state = Audits()
    for number, other in enumerate(others[: most - 1]):
        state, found = said_in_vain(state, number, [liar], members, other)
        assert found is None
    if members == 2:
        return
    last, found = said_in_vain(state, 9, [liar], members, others[most - 1])
    assert (found.node, found.kind, found.fault) == (liar, Kind.SLANDERED, Fault.SLANDERED)
    assert f"{most} of {members} members" in found.reason and last.vain == last.words == {}
    here = frozenset(NODES[:members]) - {others[0]} | {NodeId("new")}
    gone = audits.complained(state, complaint(9, others[most - 1]), liar, here)
    assert audits.read(gone, gone.open[0], None)[1] is None, "who has left is no member"


def test_what_is_proved_needs_no_words():
    state = Audits()
    for accuser in NODES[:7]:
        state = complained(state, 5, accuser)
    state, found = audits.read(state, state.open[0], Broken("a scale that is NaN"))
    assert found.kind is Kind.BROKEN and state.words == {} and state.open == ()


@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_in_one_round_half_of_the_members_may_be_complained_about(members):
    state = Audits()
    for accused in NODES[:members]:
        state = complained(state, 5, accused=accused, members=members)
    assert len(state.open) == math.ceil(members / 2)
    assert len(complained(state, 6, members=members).open) == len(state.open) + 1


def test_who_never_shows_what_others_could_not_read_is_accused_in_its_tenth_round_at_the_latest():
    state, accused, number = Audits(), [], 0
    while not accused:
        state = complained(state, number)
        state, found = audits.expired(state, RoundNumber(number), heard=NODES, answered=[])
        state, _ = audits.certified(state, record(number, NODES[:7]), replace(RULES, share=0.0))
        accused += found
        number += 1
    assert number <= 10
    assert [(each.node, each.kind) for each in accused] == [(NODES[7], Kind.UNANSWERED)]
    assert len(state.complaints) <= ANSWER_ROUNDS + 1


def test_what_is_to_be_measured_and_to_be_read_is_missed_once():
    state, _ = audits.certified(Audits(), record(0), RULES)
    audited = state.open[0].node
    state = complained(state, 0, accuser=NODES[7], accused=audited)
    assert [ask.node for ask in state.open].count(audited) == 2
    state, _ = audits.expired(state, RoundNumber(3), heard=NODES, answered=[])
    assert state.open == () and state.histories[audited].unanswered == 1


def test_what_is_undone_is_neither_read_nor_known_to_have_been_complained_about():
    state = complained(complained(Audits(), 4), 5).gone_back(RoundNumber(5))
    assert [ask.round for ask in state.open] == [4]
    assert [ask.round for ask in complained(state, 5).open] == [4, 5]
