"""Who can be called from elsewhere: what is called, when again, and what is thought of it. A list of calls each."""

from dataclasses import replace

import pytest

from coordinator.core import machine, reachability
from coordinator.core.machine import BranchOff, Call, Called, HeartbeatArrived, Judged, NodeLeft, NodeOpened
from coordinator.core.reachability import (
    AGAIN_SECONDS,
    CANDIDATES_MAX,
    MISSES_MAX,
    SOON_SECONDS,
    STANDSTILL_SECONDS,
    Standstill,
    candidates,
)
from coordinator.core.strikes import Kind
from protocol.types import Role
from tests.core.test_machine import A, B, C, Coordinator, D, of

HOME, CAFE, WORLD, OTHER = "81.2.69.142", "91.198.174.192", "142.250.80.46", "151.101.1.69"
INSIDE = "/ip4/192.168.1.7/tcp/4001"


def at(ip, port=4001):
    return f"/ip4/{ip}/tcp/{port}"


@pytest.mark.parametrize(
    ("named", "source", "called"),
    [
        ([INSIDE], HOME, [at(HOME)]),  # its router may forward the port
        ([at(WORLD)], HOME, [at(WORLD)]),
        ([INSIDE, at("172.17.0.1"), at("127.0.0.1")], HOME, [at(HOME)]),
        ([INSIDE, at(WORLD, 49400)], HOME, [at(HOME), at(WORLD, 49400)]),
        ([at("127.0.0.1", 7)], "127.0.0.1", [at("127.0.0.1", 7)]),  # a whole swarm on this machine
        ([INSIDE], "192.168.1.7", [INSIDE]),
        ([at("169.254.169.254", 80)], HOME, [at(HOME, 80)]),
        ([at("192.168.1.1", 80)], "192.168.1.7", [at("192.168.1.7", 80)]),  # not at our router's door
        (["/ip6/2a00:1450:4001::5/tcp/9", INSIDE], "2a02:8109::3", ["/ip6/2a00:1450:4001::5/tcp/9"]),
        (["/ip6/fd00::1/tcp/9"], "2a02:8109::3", ["/ip6/2a02:8109::3/tcp/9"]),
        (["/ip4/10.0.0.1/udp/5/quic"], HOME, []),
        (["/ip6/fd00::1/tcp/9"], "fe80::1%eth0", []),
        ([INSIDE], "not an address", []),
        (
            [at("10.0.0.1", port) for port in range(1, 9)],
            HOME,
            [at(HOME, port) for port in range(1, 1 + CANDIDATES_MAX)],
        ),
    ],
)
def test_a_node_is_called_where_it_comes_from_or_on_the_internet_and_nowhere_else(named, source, called):
    assert list(candidates(named, source)) == called


class Callers(Coordinator):
    """Answers to calls, by node: an address, or "" for none."""

    def __init__(self):
        super().__init__()
        self.sources, self.named, self.calls, self.activities = {}, {}, [], {}

    def comes(self, node, *, source=HOME, named=(INSIDE,), activity="training"):
        self.sources[node], self.named[node], self.activities[node] = source, named, activity
        self.calls += of(Call, self.see(NodeOpened(node, node, f"node {node}", named, source=source)))
        return self

    def beats(self, *nodes, seconds=0.0):
        for node in nodes or tuple(self.sources):
            where, source = self.named[node], self.sources[node]
            beat = HeartbeatArrived(node, self.activities[node], 0, -1, where, source=source)
            self.calls += of(Call, self.see(beat, at=self.now + seconds))
        return self

    def answers(self, **answers):
        """Every call that is under way ends so."""
        calls, self.calls = self.calls, []
        for call in calls:
            self.calls += of(Call, self.see(Called(call.node, call.addresses, answers[call.node])))
        return [call.node for call in calls]

    def waits(self, seconds):
        while seconds > 0:
            self.beats(seconds=min(seconds, 5.0) / len(self.sources))
            seconds -= 5.0
        return self

    @property
    def roles(self):
        return {member.node: member.role for member in self.state.roster.roster.members}

    def member(self, node):
        return self.state.roster.roster.member(node)


def open_run():
    """A and B answer, C does not."""
    coordinator = Callers().comes(A, source=WORLD, named=(at(WORLD),)).comes(B, source=OTHER).comes(C)
    coordinator.beats()
    assert coordinator.rostered == (), "nobody is rostered before it has been called"
    assert coordinator.answers(a=at(WORLD), b=at(OTHER), c="") == [A, B, C]
    return coordinator


def test_who_does_not_answer_is_rostered_as_one_that_calls_the_others():
    coordinator = open_run()
    assert coordinator.roles == {A: Role.PEER, B: Role.PEER, C: Role.CLIENT}


def test_the_roster_names_where_a_node_answered_and_no_address_inside_its_network():
    coordinator = open_run()
    assert coordinator.member(B).addresses == (at(OTHER),) and coordinator.member(C).addresses == ()


def test_one_that_answers_again_is_open_at_once():
    coordinator = open_run()
    coordinator.waits(SOON_SECONDS + 5)
    assert coordinator.answers(c=at(HOME)) == [C]
    coordinator.beats()
    assert coordinator.roles[C] is Role.PEER


def test_one_that_answered_is_closed_only_after_calls_in_a_row_that_failed():
    coordinator = open_run()
    coordinator.waits(AGAIN_SECONDS + 15)
    for miss in range(1, MISSES_MAX + 1):
        assert A in [call.node for call in coordinator.calls]
        coordinator.answers(a="", b=at(OTHER), c="")
        coordinator.beats()
        assert coordinator.roles[A] is (Role.PEER if miss < MISSES_MAX else Role.CLIENT)
        coordinator.waits(SOON_SECONDS + 10)


def test_one_that_names_no_address_takes_part_as_one_that_calls_the_others():
    coordinator = open_run().comes(D, source=CAFE, named=())
    coordinator.see(HeartbeatArrived(D, "syncing", 0, -1, (), source=CAFE))
    assert not coordinator.state.nodes[D].reach.known, "its engine may not run yet"
    assert coordinator.beats().roles[D] is Role.CLIENT and not coordinator.calls
    coordinator.comes(D, source=CAFE, named=(at(CAFE),)).answers(d=at(CAFE))
    assert coordinator.beats().roles[D] is Role.PEER
    coordinator.named[D] = ()  # its engine is being started again
    assert coordinator.beats().member(D).addresses == (at(CAFE),)


def test_nobody_is_called_more_often_than_stated():
    coordinator = open_run()
    calls = 0
    for minute in range(60):
        coordinator.comes(C, named=(at("192.168.1.7", 1 + minute),))  # another port each time
        coordinator.waits(10)
        calls += coordinator.answers(a=at(WORLD), b=at(OTHER), c="").count(C)
    assert calls <= 60 * 10 / SOON_SECONDS + 1


def test_elsewhere_it_counts_as_what_it_was_until_it_has_been_called_there():
    coordinator = open_run().waits(SOON_SECONDS + 5)
    coordinator.answers(c="")
    coordinator.comes(A, source=CAFE, named=(at(CAFE),)).beats()
    assert coordinator.roles[A] is Role.PEER and coordinator.member(A).addresses == (at(CAFE),)
    coordinator.waits(SOON_SECONDS + 5)
    coordinator.answers(a="", c="")
    coordinator.beats()
    assert coordinator.roles[A] is Role.CLIENT


def test_the_answer_of_another_address_says_nothing():
    coordinator = open_run()
    coordinator.comes(C, source=CAFE)
    coordinator.see(Called(C, (at(HOME),), at(HOME)))
    assert coordinator.beats().roles[C] is Role.CLIENT


def test_an_address_that_is_good_here_only_is_none_once_somebody_comes_from_the_internet():
    inside = Callers().comes(A, source="192.168.1.7").comes(B, source="127.0.0.1", named=(INSIDE, at("127.0.0.1")))
    inside.beats().answers(a=INSIDE, b=at("127.0.0.1"))
    assert inside.beats().roles == {A: Role.PEER, B: Role.PEER}
    assert inside.member(B).addresses == (at("127.0.0.1"), INSIDE)
    inside.comes(C, source=WORLD, named=(at(WORLD),)).beats().answers(c=at(WORLD))
    assert inside.beats().roles == {A: Role.CLIENT, B: Role.CLIENT, C: Role.PEER}


def test_if_we_can_call_nobody_nobody_is_held_up():
    coordinator = Callers().comes(A).comes(B).beats()
    coordinator.answers(a=None, b=None)
    assert coordinator.beats().roles == {A: Role.PEER, B: Role.PEER}


def test_while_nobody_can_be_called_all_are_tried_again_soon():
    coordinator = Callers().comes(A).comes(B).beats()
    for _ in range(2 * MISSES_MAX):
        assert set(coordinator.answers(a="", b="")) == {A, B}
        coordinator.waits(SOON_SECONDS + 10)


def test_after_a_restart_members_stay_what_they_were_until_they_have_been_called():
    coordinator = open_run()
    before = coordinator.state.roster
    fresh = {node: machine.Node(node, node, node, activity="left", seen=-1e9) for node in (A, B, C)}
    coordinator.state = replace(coordinator.state, nodes=fresh, started=coordinator.now)
    coordinator.sources, coordinator.named = {}, {}
    coordinator.comes(A, source=WORLD, named=(at(WORLD),)).comes(B, source=OTHER).comes(C).waits(100)
    assert coordinator.state.roster == before and coordinator.roles[C] is Role.CLIENT


def test_an_ipv4_address_inside_an_ipv6_one_is_that_address():
    reach = reachability.heard(reachability.Reach(), (INSIDE,), f"::ffff:{HOME}")
    assert reach.candidates == (at(HOME),)


def at_home():
    """A and B train, and nobody can call them."""
    return Callers().comes(A).comes(B).beats()


def uncallable(coordinator):
    return machine.nobody_is_callable(coordinator.state, coordinator.now, coordinator.rules)


def test_no_roster_is_made_of_nodes_that_nobody_can_call_and_it_is_known_that_none_can_be():
    coordinator = at_home()
    assert not uncallable(coordinator), "nobody knows yet"
    coordinator.answers(a="", b="")
    coordinator.beats()
    assert coordinator.rostered == () and uncallable(coordinator)


def helped():
    coordinator = at_home()
    coordinator.answers(a="", b="")
    coordinator.comes(C, source=WORLD, named=(at(WORLD),), activity=machine.HELPS).beats()
    assert coordinator.answers(c=at(WORLD)) == [C]
    return coordinator.beats()


def test_a_node_that_trains_nothing_is_rostered_as_a_helper_and_then_rounds_can_end():
    coordinator = helped()
    assert coordinator.roles == {A: Role.CLIENT, B: Role.CLIENT, C: Role.HELPER} and not uncallable(coordinator)


def test_a_helper_that_nobody_can_call_helps_nobody():
    coordinator = at_home().comes(C, activity=machine.HELPS).beats()
    coordinator.answers(a="", b="", c="")
    assert coordinator.beats().rostered == () and uncallable(coordinator)


def test_helpers_are_not_those_that_a_run_waits_for():
    coordinator = Callers().comes(A, source=WORLD, named=(at(WORLD),))
    coordinator.comes(C, source=OTHER, named=(at(OTHER),), activity=machine.HELPS).beats()
    coordinator.answers(a=at(WORLD), c=at(OTHER))
    assert coordinator.beats().rostered == () and not uncallable(coordinator)


def test_the_last_that_could_be_called_keeps_its_place_while_it_is_away():
    """Seed 82 of the simulation: rosters of those who could not be called followed each other, and it never got back."""
    coordinator = helped()
    before = coordinator.state.roster
    coordinator.see(NodeLeft(C, "restarted"))
    del coordinator.sources[C]
    coordinator.comes(D).beats()
    coordinator.answers(d="")
    assert coordinator.beats().state.roster == before and uncallable(coordinator)
    coordinator.comes(C, source=WORLD, named=(at(WORLD),), activity=machine.HELPS).beats()
    assert not uncallable(coordinator) and coordinator.roles[C] is Role.HELPER and D in coordinator.roles


def test_the_only_one_that_can_be_called_keeps_its_place_while_it_is_paused_and_others_come_in():
    coordinator = Callers().comes(A, source=WORLD, named=(at(WORLD),)).comes(B).beats()
    coordinator.answers(a=at(WORLD), b="")
    coordinator.activities[A] = "paused"
    coordinator.beats().comes(C).beats()
    coordinator.answers(c="")
    assert coordinator.beats().roles == {A: Role.PEER, B: Role.CLIENT, C: Role.CLIENT}
    assert not uncallable(coordinator), "it averages for the others"


def test_where_all_are_paused_the_roster_stays_as_it_is():
    coordinator = Callers().comes(A, source=WORLD, named=(at(WORLD),)).comes(B).beats()
    coordinator.answers(a=at(WORLD), b="")
    before = coordinator.beats().state.roster
    coordinator.activities |= dict.fromkeys((A, B), "paused")
    assert coordinator.beats().waits(100).state.roster == before


def test_without_the_only_one_that_could_be_called_and_is_banned_the_run_goes_on_with_the_next_on_a_new_branch():
    coordinator = helped()
    coordinator.see(Judged(C, Kind.BAN, "lied"))
    del coordinator.sources[C]
    assert set(coordinator.beats().roles) == {A, B}, "it is out at once"
    coordinator.comes(D, source=OTHER, named=(at(OTHER),), activity=machine.HELPS).beats()
    coordinator.answers(d=at(OTHER))
    assert D not in coordinator.beats().roles, "a roster of A, B and D need not meet the one of A, B and C"
    found = []
    while not found and coordinator.now < 300:
        coordinator.now += 5
        found = of(BranchOff, coordinator.see(HeartbeatArrived(A, "training", 0, 1, (INSIDE,), source=HOME)))
        coordinator.beats()
    assert "one that can has come" in found[0].reason


def test_a_standstill_is_told_of_once_it_lasts_and_ends_with_the_first_that_can_be_called():
    seen = [Standstill()]
    for now, nobody in ((0.0, True), (STANDSTILL_SECONDS - 1, True), (STANDSTILL_SECONDS, True), (1e6, True)):
        seen.append(seen[-1].at(now, nobody))
    assert [each.lasts for each in seen] == [False, False, False, True, True]
    over = seen[-1].at(1e6 + 1, nobody_is_callable=False)
    assert over == Standstill() and not over.at(1e6 + 2, nobody_is_callable=True).lasts
