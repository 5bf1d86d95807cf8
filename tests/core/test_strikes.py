"""What follows from a fault that was proved, each rule as a trail of marks."""

import pytest

from coordinator.core import strikes
from coordinator.core.strikes import ASIDE_ROUNDS, REMEMBERED_ROUNDS, By, Kind, Mark
from protocol.types import Fault

NODE = "a" * 64


def judge(trail, fault, round_number, *, evidence=None, now_ms=1000, void=()):
    """The trail with whatever follows from this fault."""
    head = round_number + 1
    more = strikes.judge(
        trail,
        NODE,
        fault,
        round_number=round_number,
        head=head,
        reason="seen",
        evidence=evidence or f"{fault.value} {round_number}",
        now_ms=now_ms,
        void=void,
    )
    return (*trail, *more)


def order(kind, *, ms=0, until_ms=None):
    return Mark(NODE, kind, "because", By.RESEARCHER, ms, 0, until_ms=until_ms)


def kinds(trail):
    return [mark.kind for mark in trail]


def test_a_proof_of_forging_bans_at_once():
    trail = judge((), Fault.FORGED, 7)
    assert kinds(trail) == [Kind.STRIKE, Kind.BAN]
    ban = strikes.shut(trail, now_ms=10**15)
    assert ban.by is By.COORDINATOR and ban.evidence == "forged 7"
    assert "had not signed (seen)" in strikes.refusal(ban, 0)


@pytest.mark.parametrize(("fault", "times"), [(Fault.REDUCED_WRONG, 2), (Fault.TRAINED_WRONG, 3)])
def test_so_many_strikes_of_a_kind_ban_and_fewer_set_aside(fault, times):
    trail = ()
    for strike in range(times):
        assert strikes.shut(trail, 0) is None
        trail = judge(trail, fault, 100 * strike)
        rounds = ASIDE_ROUNDS[min(strike, 1)]
        assert strikes.aside_until(trail) == 100 * strike + 1 + rounds
    assert kinds(trail) == [Kind.STRIKE] * times + [Kind.BAN]


def test_a_contradiction_is_a_warning_until_no_accident_explains_it():
    """A folder that came back from a backup contradicts itself once; that is never a strike."""
    trail = judge(judge((), Fault.CONTRADICTED, 1), Fault.CONTRADICTED, 50)
    assert kinds(trail) == [Kind.WARNING, Kind.WARNING] and strikes.shut(trail, 0) is None
    trail = judge(trail, Fault.CONTRADICTED, 99)
    assert kinds(trail)[2:] == [Kind.STRIKE, Kind.BAN]


def test_what_is_long_ago_does_not_add_up():
    trail = ()
    for time in range(5):
        trail = judge(trail, Fault.REDUCED_WRONG, time * (REMEMBERED_ROUNDS + 1))
    assert kinds(trail) == [Kind.STRIKE] * 5


def test_one_fault_counts_once_however_many_report_it():
    trail = judge((), Fault.TRAINED_WRONG, 3)
    assert judge(trail, Fault.TRAINED_WRONG, 3, evidence="another witness") == trail
    assert judge(trail, Fault.TRAINED_WRONG, 4, evidence="trained-wrong 3") == trail


def test_credit_is_gone_for_the_contributions_that_a_strike_names_until_it_is_forgiven():
    trail = judge((), Fault.TRAINED_WRONG, 3, void=("one", "two"))
    trail = judge(trail, Fault.TRAINED_WRONG, 50, void=("two", "three"))
    assert strikes.void(trail) == {"one", "two", "three"}
    assert "; its credit for 3 of its updates is frozen. " in strikes.notice(trail, 10**6)
    assert strikes.void((*trail, order(Kind.BAN))) == {"one", "two", "three"}
    assert strikes.void((*trail, order(Kind.UNBAN))) == frozenset()


def test_an_unban_forgives_all_before_it_and_the_trail_keeps_it():
    trail = judge(judge((), Fault.REDUCED_WRONG, 1), Fault.REDUCED_WRONG, 2)
    assert strikes.shut(trail, 0) is not None
    trail = (*trail, order(Kind.UNBAN))
    assert strikes.shut(trail, 0) is None and strikes.aside_until(trail) == 0 and strikes.notice(trail, 0) == ""
    assert kinds(judge(trail, Fault.REDUCED_WRONG, 3))[-1] is Kind.STRIKE
    assert judge(trail, Fault.REDUCED_WRONG, 9, evidence="reduced-wrong 2") == trail  # an old proof is no new fault


def test_a_kick_ends_and_a_ban_does_not():
    trail = (order(Kind.KICK, until_ms=600_000),)
    assert strikes.shut(trail, 599_999).kind is Kind.KICK and strikes.shut(trail, 600_000) is None
    assert strikes.refusal(trail[0], 1) == "the researcher has sent this node away for another 10 min: because"
    assert strikes.shut((*trail, order(Kind.BAN)), 1).kind is Kind.BAN
    assert strikes.shut((order(Kind.BAN), *trail), 10**15).kind is Kind.BAN


def test_the_volunteer_reads_what_it_was_and_what_to_do():
    trail = judge((), Fault.TRAINED_WRONG, 3)
    said = strikes.notice(trail, 5)
    assert said.startswith("1 strike: in round 3 this node brought work that does not fit the data it names (seen)")
    assert "left out until round 14" in said and "--device cpu" in said
    assert "left out" not in strikes.notice(trail, 14)
    both = judge(trail, Fault.CONTRADICTED, 9)
    assert strikes.notice(both, 0).startswith("1 strike and 1 warning: in round 9")


@pytest.mark.parametrize("fault", list(Fault))
def test_every_fault_has_a_policy_that_ends_in_a_ban(fault):
    trail, policy = (), strikes.POLICIES[fault]
    for time in range(policy.warnings + policy.strikes):
        trail = judge(trail, fault, time)
    assert strikes.shut(trail, 0).kind is Kind.BAN
    assert judge(trail, fault, 99) != trail and kinds(judge(trail, fault, 99)).count(Kind.BAN) == 1
