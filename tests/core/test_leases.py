"""Data is granted in order, to one node at a time, and comes back when its node does not."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coordinator.core.leases import Leases, consume, expired, give_back, grant, renew
from protocol.types import DataRange, Digest, NodeId, Shard

ONE, TWO, EMPTY = Digest("1" * 64), Digest("2" * 64), Digest("3" * 64)
A, B = NodeId("a"), NodeId("b")


def shard(digest, sequences):
    return Shard(digest, sequences, sequences, sequences)


def fresh():
    return Leases((shard(ONE, 10), shard(EMPTY, 0), shard(TWO, 5)))


def take(leases, node, sequences, largest=100, until_ms=1000):
    return grant(leases, node, sequences=sequences, largest=largest, until_ms=until_ms)


def spans(granted):
    return [(lease.range.pass_number, lease.range.shard[0], lease.range.start, lease.range.stop) for lease in granted]


def test_ranges_are_granted_in_order_and_no_lease_spans_two_shards():
    leases, granted = take(fresh(), A, 12)
    assert spans(granted) == [(0, "1", 0, 10), (0, "2", 0, 2)]
    assert spans(take(leases, B, 5)[1]) == [(0, "2", 2, 5), (1, "1", 0, 2)]


def test_no_lease_is_larger_than_the_largest():
    assert spans(take(fresh(), A, 7, largest=3)[1]) == [(0, "1", 0, 3), (0, "1", 3, 6), (0, "1", 6, 7)]


def test_without_data_nothing_is_granted():
    assert take(Leases((shard(EMPTY, 0),)), A, 5)[1] == ()
    assert take(Leases(()), A, 5)[1] == ()


def test_data_that_came_back_goes_first():
    leases, granted = take(fresh(), A, 4)
    leases = give_back(leases, [lease.lease_id for lease in granted])
    assert leases.of(A) == ()
    assert spans(take(leases, B, 3)[1]) == [(0, "1", 0, 3)]


def test_a_lease_expires_unless_its_holder_renews_it():
    leases, granted = take(fresh(), A, 4, until_ms=1000)
    lease_id = granted[0].lease_id
    assert expired(leases, 999) == ()
    assert expired(leases, 1000) == (lease_id,)
    leases, renewed = renew(leases, A, [lease_id, "unknown"], 2000)
    assert (renewed, expired(leases, 1000)) == ((lease_id,), ())


def test_nobody_renews_anothers_lease():
    leases, granted = take(fresh(), A, 4, until_ms=1000)
    assert renew(leases, B, [granted[0].lease_id], 2000) == (leases, ())


def test_consumed_ranges_are_struck_from_leases():
    leases, granted = take(fresh(), A, 8)
    leases = consume(leases, [DataRange(0, ONE, 0, 3)])
    assert spans(leases.of(A)) == [(0, "1", 3, 8)]
    leases = consume(leases, [DataRange(0, ONE, 3, 8)])
    assert leases.of(A) == ()
    assert leases.returned == ()


def test_the_holder_of_a_range_consumed_in_its_middle_keeps_what_it_has_yet_to_train_on():
    leases, _ = take(fresh(), A, 8)
    leases = consume(leases, [DataRange(0, ONE, 3, 5)])
    assert spans(leases.of(A)) == [(0, "1", 5, 8)]
    assert leases.returned == (DataRange(0, ONE, 0, 3),)


def test_consumed_ranges_are_struck_from_what_came_back():
    leases, granted = take(fresh(), A, 8)
    leases = consume(give_back(leases, [granted[0].lease_id]), [DataRange(0, ONE, 2, 4)])
    assert leases.returned == (DataRange(0, ONE, 0, 2), DataRange(0, ONE, 4, 8))


def test_another_passes_data_is_other_data():
    leases, _ = take(fresh(), A, 8)
    assert consume(leases, [DataRange(1, ONE, 0, 8), DataRange(0, TWO, 0, 5)]).held == leases.held


class Ledger(RuleBasedStateMachine):
    """No sequence is granted twice while it is held or after it is consumed, and none is lost."""

    def __init__(self):
        super().__init__()
        self.leases = fresh()
        self.consumed = set()

    def sequences(self, ranges):
        return [(r.pass_number, r.shard, n) for r in ranges for n in range(r.start, r.stop)]

    def touched(self):
        """Every sequence below the cursor."""
        cursor, names = self.leases.cursor, self.leases.shards
        full = [(p, s.digest, n) for p in range(cursor.pass_number) for s in names for n in range(s.sequences)]
        before = [(cursor.pass_number, s.digest, n) for s in names[: cursor.shard] for n in range(s.sequences)]
        return full + before + [(cursor.pass_number, names[cursor.shard].digest, n) for n in range(cursor.start)]

    @rule(node=st.sampled_from([A, B]), sequences=st.integers(-1, 9), largest=st.integers(1, 6))
    def acquire(self, node, sequences, largest):
        self.leases, granted = take(self.leases, node, sequences, largest)
        new = self.sequences(lease.range for lease in granted)
        assert len(new) == max(0, sequences)
        assert not self.consumed & set(new)

    @rule(data=st.data())
    def lose(self, data):
        if self.leases.held:
            self.leases = give_back(self.leases, [data.draw(st.sampled_from(sorted(self.leases.held)))])

    @rule(data=st.data())
    def certify(self, data):
        if not self.leases.held:
            return
        held = self.leases.held[data.draw(st.sampled_from(sorted(self.leases.held)))].range
        start = data.draw(st.integers(held.start, held.stop - 1))
        used = DataRange(held.pass_number, held.shard, start, data.draw(st.integers(start + 1, held.stop)))
        self.leases = consume(self.leases, [used])
        self.consumed |= set(self.sequences([used]))

    @invariant()
    def every_sequence_is_in_one_place(self):
        held = self.sequences(lease.range for lease in self.leases.held.values())
        places = Counter(held + self.sequences(self.leases.returned) + list(self.consumed))
        assert set(places.values()) <= {1}
        assert set(places) == set(self.touched())


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@given(st.lists(st.integers(1, 7), max_size=12))
def test_what_is_granted_is_what_was_asked_for(asked):
    leases = fresh()
    for sequences in asked:
        leases, granted = take(leases, A, sequences, largest=3)
        assert sum(lease.range.stop - lease.range.start for lease in granted) == sequences
