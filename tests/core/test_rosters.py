"""A roster may only follow if no two majorities can miss each other."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.rosters import may_follow, next_members, quorum
from protocol.types import Epoch, Member, NodeId, PeerId, Roster

NODES = "abcdefg"
sets = st.sets(st.sampled_from(NODES), min_size=1)


def members(nodes, address="x"):
    return tuple(Member(NodeId(node), PeerId(node), (address,), 1) for node in nodes)


def roster(nodes, epoch=0):
    return Roster("run", epoch, members(nodes), 0)


def names(chosen):
    return None if chosen is None else "".join(member.node for member in chosen)


def majorities(nodes):
    return [set(chosen) for chosen in combinations(sorted(nodes), quorum(len(nodes)))]


@given(sets, sets)
def test_a_roster_may_follow_exactly_when_all_majorities_meet(old, new):
    assert may_follow(old, new) == all(one & other for one in majorities(old) for other in majorities(new))


@given(sets, sets, sets)
def test_majorities_that_need_a_sealed_node_do_not_count(old, new, sealed):
    possible = [one for one in majorities(old) if not one & sealed]
    assert may_follow(old, new, sealed) == all(one & other for one in possible for other in majorities(new))


def test_those_who_leave_politely_stall_nobody():
    seals = {NodeId("a"): Epoch(0), NodeId("b"): Epoch(0)}
    assert next_members([roster("abc")], members("c")) is not None
    assert names(next_members([roster("abc")], members("c"), seals)) == "c"
    assert names(next_members([roster("abc", epoch=1)], members("c"), seals)) != "c", "a seal ends with its epoch"


def test_nobody_is_no_roster():
    assert not may_follow("ab", "")


@given(st.lists(sets, min_size=1, max_size=12))
def test_every_pair_of_open_rosters_stays_safe(wishes):
    opened = []
    for wish in wishes:
        chosen = next_members(opened, members(sorted(wish)))
        if chosen is not None:
            opened.append(Roster("run", len(opened), chosen, 0))
    for one, other in combinations(opened, 2):
        assert may_follow(one.nodes, other.nodes)


@given(sets, sets)
def test_a_roster_gets_to_what_is_wished_step_by_step_when_rounds_go_on(start, wish):
    current = roster(sorted(start))
    for epoch in range(1, 20):
        chosen = next_members([current], members(sorted(wish)))
        if chosen is None:
            break
        current = Roster("run", epoch, chosen, 0)
    assert set(current.nodes) == wish


def test_the_first_roster_is_whoever_is_there():
    assert names(next_members([], members("abc"))) == "abc"
    assert next_members([], ()) is None


def test_a_roster_that_is_right_stays():
    assert next_members([roster("ab")], members("ba")) is None


def test_a_roster_is_never_emptied():
    assert next_members([roster("ab")], ()) is None


def test_one_of_two_nodes_can_be_dropped():
    assert names(next_members([roster("ab")], members("a"))) == "a"


def test_a_majority_is_not_dropped_at_once():
    assert names(next_members([roster("abcde")], members("a"))) == "acde"


def test_as_long_as_no_record_is_certified_older_rosters_hold_newer_ones_back():
    old, new = roster("abcde"), roster("abc", 1)
    assert next_members([old, new], members("a")) is None
    assert names(next_members([new], members("a"))) == "ac"


def test_a_new_address_makes_a_new_roster():
    chosen = next_members([roster("ab")], members("ab", address="y"))
    assert chosen == members("ab", address="y")
