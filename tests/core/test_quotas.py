"""Quotas, against a clock of our own."""

import heapq
import random

import pytest

from coordinator.core import quotas
from coordinator.core.quotas import Buckets, Crowd, Rate, block_of, take
from node.core.backoff import wait_seconds

RATE = Rate(burst=3, per_second=2)


def test_a_burst_is_had_at_once_and_then_so_much_per_second():
    buckets = Buckets(RATE)
    assert [buckets.take("a", now=10.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("a", now=10.4) == pytest.approx(0.1)
    assert buckets.take("a", now=10.5) == 0
    assert buckets.take("a", now=10.5) == 0.5


@pytest.mark.parametrize("tries_per_second", [3, 10, 1000])
def test_whoever_asks_more_often_gets_no_more(tries_per_second):
    buckets = Buckets(RATE)
    taken = sum(not buckets.take("a", now=i / tries_per_second) for i in range(100 * tries_per_second))
    assert taken == pytest.approx(RATE.burst + 100 * RATE.per_second, abs=1)


def test_a_silence_gives_no_more_than_the_burst():
    buckets = Buckets(RATE)
    buckets.take("a", now=0.0)
    assert [buckets.take("a", now=1e9) for _ in range(4)] == [0, 0, 0, 0.5]


def test_an_amount_beyond_the_burst_is_had_once_and_waited_for():
    full_at, wait_seconds = take(0.0, RATE, now=0.0, amount=10)
    assert wait_seconds == 0
    assert take(full_at, RATE, now=0.0) == (full_at, pytest.approx(4.0))


def test_one_key_does_not_pay_for_another_and_full_buckets_are_forgotten():
    buckets = Buckets(RATE)
    for number in range(1000):
        assert buckets.take(number, now=0.0) == 0
    assert len(buckets) == 1000
    for number in range(1000):
        assert buckets.take("late", now=100.0 + number) == 0
    assert len(buckets) == 1


def test_a_refused_key_takes_no_room():
    buckets = Buckets(Rate(burst=1, per_second=1))
    assert buckets.take("a", now=0.0) == 0
    assert all(buckets.take("a", now=0.0) for _ in range(100))
    assert len(buckets) == 1


@pytest.mark.parametrize(
    ("host", "block"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("::ffff:8.8.8.8", "8.8.8.0/24"),
        ("2606:4700:1:2:3::4", "2606:4700:1::/48"),
        ("127.0.0.1", "127.0.0.1/32"),
        ("192.168.1.7", "192.168.1.7/32"),
        ("fe80::1%eth0", "fe80::1/128"),
    ],
)
def test_an_address_stands_for_its_network_but_a_local_one_for_itself(host, block):
    assert str(block_of(host)) == block


def test_one_network_uses_up_its_own_share_and_not_the_others():
    crowd = Crowd(Rate(2, 1), Rate(100, 100))
    assert [bool(crowd.take(f"8.8.8.{i}", now=0.0)) for i in range(4)] == [False, False, True, True]
    assert not crowd.take("9.9.9.9", now=0.0)


def test_all_networks_have_a_common_bound_from_which_a_known_one_is_free():
    crowd = Crowd(Rate(3, 1), Rate(5, 1))
    crowd.welcome("9.9.9.1")
    assert sum(not crowd.take(f"8.8.{i}.8", now=0.0) for i in range(50)) == 5
    assert [crowd.take("9.9.9.9", now=0.0) for _ in range(4)] == [0, 0, 0, 1.0]  # and still pays for itself


def test_a_local_address_has_the_common_bound_alone_for_it_may_be_a_proxys():
    crowd = Crowd(Rate(1, 1), Rate(4, 1))
    crowd.welcome("127.0.0.1")
    assert [bool(crowd.take("127.0.0.1", now=0.0)) for _ in range(5)] == [False] * 4 + [True]


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_nodes_are_back_within_a_minute_and_never_more_at_once_than_is_let_in(seed):
    luck = random.Random(seed)
    crowd = Crowd(quotas.JOINS_OF_A_BLOCK, quotas.JOINS)
    tries = [(0.0, f"{luck.randrange(1, 100)}.{number // 256}.{number % 256}.1", 0) for number in range(1000)]
    back = []
    while tries:
        now, host, failures = heapq.heappop(tries)
        if (wait := crowd.take(host, now=now)) == 0:
            back.append(now)
        else:
            heapq.heappush(
                tries, (now + wait + wait_seconds(failures=failures, luck=luck.random()), host, failures + 1)
            )
    assert max(back) < 60
    for second in range(60):
        assert sum(second <= each < second + 1 for each in back) <= quotas.JOINS.burst + quotas.JOINS.per_second


def test_members_share_what_we_can_answer_and_few_have_more_than_many():
    assert quotas.share(1).per_second == quotas.CALLS_PER_SECOND
    assert quotas.share(8).per_second == quotas.CALLS_PER_SECOND / 8
    for members in (0, 1, 5, 64, 1000):
        each = quotas.share(members)
        assert each.per_second >= quotas.CALLS_OF_A_MEMBER.per_second
        assert each.burst >= quotas.CALLS_OF_A_MEMBER.burst
