"""Short floods of `make flood`, so that it is known to work; and, on a machine with nothing else to do, every flood's goals."""

import pytest

from tests.flood.__main__ import FLOODS, GROWTH_BYTES_MAX, run


@pytest.mark.parametrize("flood", ["calls_of_strangers", "slow_page"])
async def test_honest_nodes_are_answered_beside_a_flood_and_memory_stays_in_its_bounds(flood):
    seen = await run(flood, seconds=1.0, quiet_seconds=0.3, honest=1)
    assert seen.lost == 0 < seen.beats
    assert seen.growth_bytes < GROWTH_BYTES_MAX
    if flood == "calls_of_strangers":
        assert seen.attack["unauthenticated"] > 0 == seen.attack.get("answered", 0)
        assert seen.refused["gate"]["calls"] > 0  # whoever went on was hung up on


@pytest.mark.long
@pytest.mark.parametrize("flood", FLOODS)
async def test_no_flood_delays_honest_heartbeats_longer_than_wanted_and_a_thousand_nodes_are_in_within_a_minute(flood):
    assert not (seen := await run(flood, seconds=10.0)).missed, seen
