"""A roster may only follow if no two majorities can miss each other."""

from __future__ import annotations

from itertools import combinations
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.rosters import may_follow, next_members, quorum, seated
from protocol.limits import MEMBERS_MAX
from protocol.types import Epoch, Member, NodeId, PeerId, Role, Roster

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


def waiting(**invites):
    return [(NodeId(f"{invite}{n}"), invite) for invite, uses in invites.items() for n in range(uses)]


@given(st.dictionaries(st.sampled_from(NODES), st.integers(1, 90), min_size=1), st.integers())
def test_no_invite_gets_a_second_place_before_every_other_that_waits_has_its_own(invites, seed):
    able, luck = waiting(**invites), Random(seed)
    luck.shuffle(able)
    chosen = seated(able, [node for node, _ in able if luck.random() < 0.5])
    assert len(chosen) == min(len(able), MEMBERS_MAX)
    got = {invite: sum(node.startswith(invite) for node in chosen) for invite in invites}
    short = [got[invite] for invite, uses in invites.items() if got[invite] < uses]
    assert all(max(got.values()) <= places + 1 for places in short)


def test_who_has_a_place_loses_it_to_no_equal():
    first, then = waiting(a=40, b=40), waiting(a=50, b=50)
    seats = seated(first, ())
    assert seated(then[::-1], seats) == seats
    assert len(seats & seated([*then[::-1], *waiting(c=1)], seats)) == MEMBERS_MAX - 1


def test_a_full_roster_changes_places_one_after_the_other_and_is_never_larger():
    nodes = [f"n{number:03}" for number in range(2 * MEMBERS_MAX)]
    current, wish = roster(nodes[:MEMBERS_MAX]), nodes[MEMBERS_MAX - 5 : 2 * MEMBERS_MAX - 5]
    for epoch in range(1, 200):
        if (chosen := next_members([current], members(wish))) is None:
            break
        assert len(chosen) <= MEMBERS_MAX
        current = Roster("run", epoch, chosen, 0)
    assert set(current.nodes) == set(wish)


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


def behind(nodes):
    return tuple(Member(NodeId(node), PeerId(node), (), 1, Role.CLIENT) for node in nodes)


def test_one_that_can_be_called_comes_in_before_the_last_such_one_goes():
    """The other way round it would never come in: no record comes of a roster in which nobody can be called."""
    old = Roster("run", 0, (*members("h"), *behind("abcd")), 0)
    chosen = next_members([old], (*behind("abcd"), *members("i")))
    assert names(chosen) == "habcdi"
    assert names(next_members([Roster("run", 1, chosen, 0)], (*behind("abcd"), *members("i")))) == "abcdi"


def test_no_step_is_made_towards_a_roster_in_which_nobody_could_be_called():
    first, second = Roster("run", 0, behind("a"), 0), Roster("run", 1, behind("ab"), 0)
    assert next_members([first, second], (*behind("ab"), *members("h"))) is None
