"""Data is granted in order, to one node at a time, and comes back when its node does not."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coordinator.core.leases import Cursor, Leases, consume, expired, give_back, grant, renew, strike, undo
from protocol.state import Consumed
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


def test_data_that_records_have_used_already_is_passed_over():
    """A database that came back from a backup lacks what its successor granted; the records do not."""
    used = Consumed().with_ranges((DataRange(0, ONE, 2, 4), DataRange(0, TWO, 0, 5)))
    _, granted = grant(fresh(), A, sequences=10, largest=100, until_ms=1000, consumed=used)
    assert spans(granted) == [(0, "1", 0, 2), (0, "1", 4, 10), (1, "1", 0, 2)]


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


def test_a_restart_strikes_what_records_consumed_after_the_leases_were_last_saved():
    saved, granted = take(fresh(), A, 12)
    saved = give_back(saved, [granted[1].lease_id])
    consumed = Consumed().with_ranges([DataRange(0, ONE, 0, 2), DataRange(0, ONE, 4, 6), DataRange(0, TWO, 0, 1)])
    leases = strike(saved, consumed)
    assert spans(leases.of(A)) == [(0, "1", 6, 10)]
    assert leases.returned == (DataRange(0, TWO, 1, 2), DataRange(0, ONE, 2, 4))
    assert strike(leases, consumed) == leases
    assert strike(saved, Consumed()) == saved


def test_after_a_rollback_nobody_holds_data_and_all_of_it_is_granted_again_in_order():
    leases, granted = take(fresh(), A, 22, largest=4)
    leases = consume(leases, [DataRange(0, ONE, 2, 6), DataRange(1, ONE, 0, 1)])
    leases = undo(leases, [DataRange(1, ONE, 0, 1), DataRange(0, ONE, 2, 6)])
    assert leases.held == {}
    assert leases.returned == (DataRange(0, ONE, 0, 10), DataRange(0, TWO, 0, 5), DataRange(1, ONE, 0, 7))
    leases, again = take(leases, B, 24)
    assert spans(again) == [(0, "1", 0, 10), (0, "2", 0, 5), (1, "1", 0, 7), (1, "1", 7, 9)]
    assert not {lease.lease_id for lease in granted} & {lease.lease_id for lease in again}, "an old id names nothing"


def test_shards_are_granted_again_in_their_order_not_by_name():
    leases, granted = take(Leases((shard(TWO, 3), shard(ONE, 3))), A, 6)
    leases = undo(give_back(leases, [granted[1].lease_id, granted[0].lease_id]), ())
    assert leases.returned == (DataRange(0, TWO, 0, 3), DataRange(0, ONE, 0, 3))


def test_undone_data_that_was_never_granted_is_left_to_the_cursor():
    leases, _ = take(fresh(), A, 12)
    beyond = [
        DataRange(0, TWO, 1, 5),
        DataRange(0, TWO, 3, 5),
        DataRange(1, ONE, 0, 9),
        DataRange(9, ONE, 0, 9),
        DataRange(0, ONE, 5, 99),
        DataRange(0, Digest("9" * 64), 0, 9),
    ]
    assert undo(leases, beyond).returned == (DataRange(0, ONE, 0, 10), DataRange(0, TWO, 0, 2))
    assert undo(leases, beyond).cursor == Cursor(0, 2, 2)


def test_undone_data_that_is_also_held_comes_back_once():
    leases, _ = take(fresh(), A, 4)
    assert undo(leases, [DataRange(0, ONE, 1, 3), DataRange(0, ONE, 1, 3)]).returned == (DataRange(0, ONE, 0, 4),)


class Ledger(RuleBasedStateMachine):
    """No sequence is granted twice while it is held or after it is consumed, and none is lost."""

    def __init__(self):
        super().__init__()
        self.leases = fresh()
        self.saved = self.leases  # as the store has them: all that is granted or comes back, not all that is used
        self.log = []  # the ranges of each record

    @property
    def consumed(self):
        return set(self.sequences(self.log))

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
        self.saved = self.leases

    @rule(data=st.data())
    def lose(self, data):
        if self.leases.held:
            self.leases = give_back(self.leases, [data.draw(st.sampled_from(sorted(self.leases.held)))])
            self.saved = self.leases

    @rule(data=st.data())
    def certify(self, data):
        if not self.leases.held:
            return
        held = self.leases.held[data.draw(st.sampled_from(sorted(self.leases.held)))].range
        start = data.draw(st.integers(held.start, held.stop - 1))
        used = DataRange(held.pass_number, held.shard, start, data.draw(st.integers(start + 1, held.stop)))
        self.leases = consume(self.leases, [used])
        self.log.append(used)
        if data.draw(st.booleans()):
            self.saved = self.leases

    @rule()
    def restart(self):
        self.leases = self.saved = strike(self.saved, Consumed().with_ranges(self.log))

    @rule(data=st.data())
    def roll_back(self, data):
        stays = data.draw(st.integers(0, len(self.log)))
        self.leases = self.saved = undo(self.leases, self.log[stays:])
        self.log = self.log[:stays]
        assert self.leases.held == {}
        names = [s.digest for s in self.leases.shards]
        order = [(r.pass_number, names.index(r.shard), r.start, r.stop) for r in self.leases.returned]
        for one, next_one in pairwise(order):
            assert one < next_one and (one[:2] < next_one[:2] or one[3] < next_one[2]), "sorted, disjoint, joined"

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
