"""When a machine may train: its owner's hours, its battery, its line, its heat, its disk."""

from dataclasses import replace

import pytest

from node.core.schedule import Conditions, Hours, Policy, obstacle
from protocol.limits import DISK_FREE_BYTES_MIN

FINE = Conditions(minute=12 * 60, on_battery=False, on_metered=False, celsius=None, disk_free_bytes=DISK_FREE_BYTES_MIN)
HOT = "a processor or GPU has reached 85 °C, and has to cool below 80"
NIGHT, LUNCH = Hours(22 * 60, 7 * 60), Hours(12 * 60, 13 * 60)


def test_without_a_policy_a_machine_on_the_mains_trains_at_any_time():
    assert {obstacle(Policy(), replace(FINE, minute=minute)) for minute in range(1440)} == {""}


@pytest.mark.parametrize(
    ("hours", "minutes"),
    [
        ((NIGHT,), {*range(22 * 60, 1440), *range(7 * 60)}),
        ((LUNCH,), set(range(12 * 60, 13 * 60))),
        ((NIGHT, LUNCH), {*range(22 * 60, 1440), *range(7 * 60), *range(12 * 60, 13 * 60)}),
        ((Hours(18 * 60, 0),), set(range(18 * 60, 1440))),
    ],
)
def test_it_trains_in_its_owners_hours_and_only_then(hours, minutes):
    assert {each for each in range(1440) if not obstacle(Policy(hours), replace(FINE, minute=each))} == minutes


def test_the_reason_names_the_hours():
    assert (
        obstacle(Policy((NIGHT, LUNCH)), replace(FINE, minute=600)) == "outside of your hours, 22:00-07:00, 12:00-13:00"
    )


def test_on_its_battery_it_rests_unless_its_owner_allows_it():
    unplugged = replace(FINE, on_battery=True)
    assert "battery" in obstacle(Policy(), unplugged)
    assert obstacle(Policy(on_battery=True), unplugged) == ""


def test_on_a_metered_line_it_rests_unless_its_owner_allows_it():
    on_a_telephone = replace(FINE, on_metered=True)
    assert "metered" in obstacle(Policy(), on_a_telephone)
    assert obstacle(Policy(on_metered=True), on_a_telephone) == ""


@pytest.mark.parametrize(
    ("most", "celsius", "rests", "said"),
    [
        (85, 84.9, False, ""),
        (85, 85, False, HOT),
        (85, 80, True, HOT),
        (85, 79.9, True, ""),
        (None, 105, True, ""),
        (85, None, True, ""),
    ],
)
def test_it_rests_from_when_it_is_as_hot_as_its_owner_allows_until_it_is_cooler(most, celsius, rests, said):
    assert obstacle(Policy(max_celsius=most), replace(FINE, celsius=celsius), rests=rests) == said


def test_it_rests_beside_programs_that_its_owner_names():
    policy = Policy(rest_beside=("blender", "a game"))
    assert obstacle(policy, FINE) == ""
    assert obstacle(policy, replace(FINE, programs=frozenset({"a game"}))) == "a game is running"
    assert (
        obstacle(policy, replace(FINE, programs=frozenset({"a game", "blender"}))) == "blender and a game are running"
    )


def test_it_rests_while_the_disk_is_almost_full():
    assert "less than 1 GiB" in obstacle(Policy(), replace(FINE, disk_free_bytes=DISK_FREE_BYTES_MIN - 1))
