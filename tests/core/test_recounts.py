"""Recounts: every reducer's turn comes and nobody knows when, and silence counts only of those who were there."""

from dataclasses import replace
from itertools import pairwise

import pytest

from coordinator.core import recounts
from coordinator.core.inquiries import ANSWER_ROUNDS, UNANSWERED_MAX, Rules
from coordinator.core.recounts import Recounts
from protocol.types import BlobRef, Part, Record

NODES = ("ash", "birch", "cedar", "oak")
RULES = Rules(0.2)


def record(number, nodes=NODES, evidence=True):
    kept = BlobRef("ee" * 32, 10) if evidence else None
    parts = tuple(Part(i, i, i + 1, f"{number:062x}{i:02x}", 10, node, (node,), kept) for i, node in enumerate(nodes))
    return Record("run", number, "00" * 32, 0, nodes[0], (), parts, "11" * 32)


def test_every_reducer_is_asked_soon_and_again_within_a_period():
    state, asked = Recounts(), {node: [] for node in NODES}
    for number in range(60):
        state = recounts.certified(state, record(number), RULES)
        for ask in state.open:
            asked[ask.part.reducer].append(number)
            state = recounts.recounted(state, ask, RULES, lied=False, luck=(number * 0.37) % 1)
    for rounds in asked.values():
        assert rounds[0] <= 2, "not all at once: lines are thin"
        gaps = [after - before for before, after in pairwise(rounds)]
        assert max(gaps) <= RULES.period + 2 and len(set(gaps)) > 2
    assert sum(map(len, asked.values())) <= 60 * len(NODES) * RULES.share * 1.3


def test_a_liars_next_mean_is_made_again_at_once():
    state = recounts.certified(Recounts(), record(0, NODES[:1]), RULES)
    (ask,) = state.open
    state = recounts.recounted(state, ask, RULES, lied=True, luck=0.99)
    assert recounts.certified(state, record(1, NODES[:1]), RULES).open


@pytest.mark.parametrize("how", ["of an all-gather", "switched off"])
def test_where_there_is_nothing_to_ask_for_nobody_is_asked(how):
    rules = RULES if how == "of an all-gather" else replace(RULES, share=0.0)
    assert not recounts.certified(Recounts(), record(0, evidence=how == "switched off"), rules).open


def silent(state, *, heard, answered=False, rounds=40):
    told = []
    for number in range(rounds):
        state = recounts.certified(state, record(number, NODES[:1]), RULES)
        state, withheld = state.expired(number, NODES if heard else (), state.open if answered else ())
        told += withheld
    return told


def test_silence_counts_only_of_a_reducer_that_was_heard_of_and_only_time_after_time():
    assert silent(Recounts(), heard=True)
    assert not silent(Recounts(), heard=True, rounds=UNANSWERED_MAX + ANSWER_ROUNDS)
    assert not silent(Recounts(), heard=False)
    assert not silent(Recounts(), heard=True, answered=True)


def test_who_was_last_heard_of_before_it_was_asked_may_not_know_and_asking_again_changes_nothing():
    state = recounts.certified(Recounts(), record(0, NODES[:1]), RULES).told(10.0)
    assert state.heard(lambda node: 10.0) == set()
    assert state.told(20.0).heard(lambda node: 15.0) == {NODES[0]}


def test_what_a_rollback_undoes_is_not_asked_for():
    state = recounts.certified(Recounts(), record(5), RULES)
    assert state.gone_back(6).open == state.open
    assert state.gone_back(5).open == ()
    assert recounts.recounted(state.gone_back(5), state.open[0], RULES, lied=True, luck=0.5).open == ()
