"""The watch goes back when the model is broken, and only then."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import watch as watching
from coordinator.core.watch import WINDOW, GoBack, Rules, Watch, gone_back, of_history, watch
from protocol.limits import REASON_CHARACTERS_MAX
from protocol.runspec import WatchSection
from protocol.types import Digest, Head, Rollback, RoundNumber, RunId

RULES = Rules(**WatchSection().model_dump())
JUMP = 2 * RULES.jump


def told(state, measurements, rules=RULES):
    """The watch after these measurements, and everything that it said, by round."""
    said = {}
    for number, loss in measurements:
        state, verdict = watch(state, RoundNumber(number), loss, rules)
        if verdict is not None:
            said[number] = verdict
    return state, said


def rollback(verdict, number=1):
    head = Head(verdict.to, Digest("0" * 64))
    return Rollback(RunId("run"), number, head, head, verdict.reason, 0)


def falling(rounds, seed=0, *, share=0.02):
    """Held-out loss as small runs have it: steep, then flat, with noise that lasts, and outliers, at most two in a row."""
    luck, drift, outliers = random.Random(seed), 0.0, []
    for number in range(rounds):
        drift = 0.7 * drift + luck.gauss(0, 0.04)
        if not outliers and luck.random() < share:
            outliers = [0.0, *luck.choices((0.7, 2.0, 5.0), k=luck.randint(1, RULES.evaluations - 1))]
        yield number, 1.2 + 4.4 * (1 + number / 10) ** -0.7 + drift + (outliers.pop() if outliers else 0.0)


FLAT = [(number, 2.0) for number in range(20)]


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_noisy_evaluations_of_a_healthy_run_say_nothing(seed):
    assert told(Watch(), falling(10_000, seed))[1] == {}


@pytest.mark.parametrize("start", [1, 2, 5, 17, 60, 400])
@pytest.mark.parametrize("seed", range(20))
def test_a_jump_of_twice_the_threshold_is_caught_within_one_measurement_more_than_it_takes(start, seed):
    healthy, luck = list(falling(start, seed)), random.Random(seed)
    lowest = min(loss for _, loss in healthy[-WINDOW:])
    broken = [(n, lowest + JUMP + luck.gauss(0, 0.1)) for n in range(start, start + 10)]
    (number, verdict), *more = told(Watch(), healthy + broken)[1].items()
    assert isinstance(verdict, GoBack) and verdict.to < start and not more
    assert start <= number <= start + RULES.evaluations


@settings(deadline=None)
@given(st.data())
def test_skipped_late_repeated_and_swapped_measurements_of_a_healthy_run_say_nothing(data):
    curve = list(falling(60, seed=data.draw(st.integers(0, 50)), share=0))  # else skipping could join outliers
    picked = data.draw(st.lists(st.sampled_from(curve), max_size=120))
    near = sorted(picked, key=lambda each: each[0] + data.draw(st.integers(0, 6)))
    assert told(Watch(), near)[1] == {}


@settings(deadline=None)
@given(st.permutations(range(17, 23)))
def test_what_is_known_in_the_end_does_not_depend_on_the_order_in_which_it_came(order):
    broken = [(n, 2.0 if n < 19 else 4.0) for n in order]
    state, said = told(Watch(), FLAT[:17] + broken)
    assert state.window == told(Watch(), FLAT[:17] + sorted(broken))[0].window
    assert [verdict.to for verdict in said.values()][-1] <= 18


def test_a_loss_that_is_not_a_number_goes_back_at_once_to_the_newest_good_round():
    for nothing in (None, float("nan"), float("inf")):
        said = told(Watch(), [*FLAT, (20, 4.0), (21, nothing), (22, nothing)])[1]
        assert said == {21: GoBack(RoundNumber(19), "by itself: held-out loss at round 21 is not a number")}


def test_a_jump_goes_back_to_the_measurement_before_the_first_of_it():
    said = told(Watch(), [*FLAT, (20, 2.4), (25, 2.6), (30, 3.0), (35, 2.51), (40, 9.0)])[1]
    reason = "by itself: held-out loss 2.51 at round 35, 0.51 above the lowest, 3 measurements in a row"
    assert said == {35: GoBack(RoundNumber(20), reason)}


def test_a_jump_that_one_good_measurement_interrupts_begins_again():
    assert told(Watch(), [*FLAT, (20, 3.0), (21, 3.0), (22, 2.0), (23, 3.0), (24, 3.0)])[1] == {}


def test_a_round_that_is_measured_again_counts_once_with_its_newest_value():
    state, said = told(Watch(), [*FLAT, (20, 3.0), (20, 3.0), (20, 3.0), (20, 3.0)])
    assert said == {}
    assert told(state, [(20, 2.0), (21, 3.0), (22, 3.0)])[1] == {}


def test_a_late_measurement_of_a_round_that_has_recovered_says_nothing():
    assert told(Watch(), [*FLAT, (25, 2.0), (23, None), (21, 9.0), (22, 9.0), (24, 9.0)])[1] == {}


def test_a_rise_that_is_slower_than_the_window_is_no_jump():
    assert told(Watch(), [(n, 2.0 + 0.9 * RULES.jump * n / WINDOW) for n in range(500)])[1] == {}


def test_it_is_said_once_until_the_line_is_good_again_or_has_gone_back():
    state, said = told(Watch(), [*FLAT, *((n, 4.0) for n in range(20, 30))])
    assert list(said) == [22]
    assert list(told(state, [(30, 2.0), *((n, 4.0) for n in range(31, 36))])[1]) == [33]
    back = gone_back(state, rollback(said[22]))
    assert back.window[-1] == (19, 2.0)
    assert list(told(back, [(n, 4.0) for n in range(20, 30)])[1]) == [22]


def test_what_was_measured_beyond_a_rollback_is_forgotten_whoever_asked_for_it():
    state, _ = told(Watch(), FLAT)
    by_hand = gone_back(state, rollback(GoBack(RoundNumber(12), "by a person")))
    assert by_hand.window[-1] == (12, 2.0) and by_hand.returns == ()


def broken_again(state, times, rules=RULES):
    """The line breaks in the same way after every return; what the watch says each time."""
    verdicts = []
    for number in range(times):
        state, said = told(state, [(n, 4.0) for n in range(20, 25)], rules)
        (verdict,) = said.values()
        verdicts.append(verdict)
        state = gone_back(state, rollback(verdict, number + 1)) if isinstance(verdict, GoBack) else state
    return state, verdicts


def test_after_so_many_returns_to_the_same_round_it_only_warns():
    _, verdicts = broken_again(told(Watch(), FLAT)[0], RULES.most + 1)
    assert [isinstance(verdict, GoBack) for verdict in verdicts] == [True] * RULES.most + [False]
    assert "needs a person" in verdicts[-1]


def test_returns_to_a_later_round_are_counted_against_an_earlier_one_and_not_the_other_way_round():
    state, _ = broken_again(told(Watch(), FLAT)[0], RULES.most)
    earlier = gone_back(state, rollback(GoBack(RoundNumber(15), "by a person")))
    assert isinstance(told(earlier, [(16, None)])[1][16], str)
    assert told(state, [(20, 2.1), (21, None)])[1][21].to == 20, "the run got further"


def test_a_new_best_forgives_the_returns_before_it():
    state, _ = broken_again(told(Watch(), FLAT)[0], RULES.most)
    state, _ = told(state, [(20, 1.9)])
    assert state.returns == ()
    state, _ = broken_again(told(Watch(), FLAT)[0], RULES.most)
    assert told(state, [(18, 1.9)])[0].returns == state.returns, "measured late, of a round before the return"


def test_a_run_file_that_forbids_going_back_gets_one_warning():
    rules = Rules(False, RULES.jump, RULES.evaluations, RULES.most)
    said = told(Watch(), [*FLAT, *((n, None) for n in range(20, 50))], rules)[1]
    assert said == {20: "held-out loss at round 20 is not a number; round 19 was good"}


def test_a_run_that_never_was_good_gets_one_warning():
    said = told(Watch(), [(n, None) for n in range(40)])[1]
    assert list(said) == [0] and "needs a person" in said[0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.none() | st.floats(0, 9)), max_size=60))
def test_whatever_is_measured_the_way_back_leads_to_a_measured_round_and_fits_a_rollback(measurements):
    state, best = Watch(), {}
    for number, loss in measurements:
        best[number] = loss
        state, verdict = watch(state, RoundNumber(number), loss, RULES)
        if isinstance(verdict, GoBack):
            assert best[verdict.to] is not None and verdict.to < max(best)
            assert verdict.reason.isprintable() and len(verdict.reason) <= REASON_CHARACTERS_MAX


def test_a_reason_stays_short_for_any_number():
    said = told(Watch(), [*FLAT, *((n, 1e308) for n in range(20, 30))])[1]
    assert len(said[22].reason) <= REASON_CHARACTERS_MAX


def test_a_restarted_coordinator_knows_what_the_stopped_one_knew():
    state, _ = told(Watch(), falling(200))
    rows = [SimpleNamespace(round=n, heldout=loss) for n, loss in falling(200)]
    assert of_history(rows[-WINDOW:]) == of_history(rows) == state


def test_a_restart_between_a_jump_and_its_rollback_says_it_again():
    state, said = told(Watch(), [*FLAT, (20, 4.0), (21, 4.0), (22, 4.0)])
    rows = [SimpleNamespace(round=n, heldout=loss) for n, loss in state.window]
    assert told(of_history(rows), [(22, 4.0)])[1] == said


def test_a_restart_does_not_forget_how_often_the_run_has_gone_back():
    state, verdicts = broken_again(told(Watch(), FLAT)[0], RULES.most)
    rows = [SimpleNamespace(round=n, heldout=loss) for n, loss in FLAT]
    rollbacks = [rollback(verdict) for verdict in verdicts] + [rollback(GoBack(RoundNumber(19), "by a person"))]
    again = of_history(rows, rollbacks)
    assert again.returns == state.returns
    assert isinstance(broken_again(again, 1)[1][0], str)
    rows.append(SimpleNamespace(round=20, heldout=1.5))
    assert of_history(rows, rollbacks).returns == ()


def test_the_window_holds_twice_the_longest_jump_of_a_run_file():
    (longest,) = [bound.le for bound in WatchSection.model_fields["evaluations"].metadata if hasattr(bound, "le")]
    assert 2 * longest == watching.WINDOW
