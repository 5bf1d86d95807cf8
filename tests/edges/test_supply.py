"""The supply of data: whatever comes in which order, a trainer is given each sequence once."""

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from node.core import session
from node.core.rounds import Rounds
from node.decider import Decider
from node.status import Tally
from node.supply import Supply
from protocol.blobs import BlobStore
from protocol.errors import Code, Refused
from protocol.runspec import RunSpec
from protocol.state import Consumed
from protocol.types import Contribution, DataRange, Digest, Head, Lease, NodeId, Shard

ME = NodeId("me")
SHARD = Shard(Digest("ab" * 32), 100_000, 50_000, 1000)


def span(start, stop):
    return DataRange(0, SHARD.digest, start, stop)


def lease(name, start, stop):
    return Lease(name, ME, span(start, stop), 0)


def record(*contributions):
    return SimpleNamespace(contributions=contributions)


def positions(ranges):
    return {at for each in ranges for at in range(each.start, each.stop)}


class Trainer:
    """A queue; what it was given is never forgotten."""

    def __init__(self, *, dead=False):
        self.queue = []
        self.given = Counter()
        self.may_take = asyncio.Event()
        self.may_take.set()
        self.dead = dead

    async def add_data(self, pieces):
        await self.may_take.wait()
        if self.dead:
            raise Refused(Code.CHILD_DIED, "the trainer has ended")
        for each, _ in pieces:
            self.queue += range(each.start, each.stop)
            self.given.update(range(each.start, each.stop))

    async def drop(self, ranges):
        if self.dead:
            raise Refused(Code.CHILD_DIED, "the trainer has ended")
        dropped = [at for at in self.queue if at in positions(ranges)]
        self.queue = [at for at in self.queue if at not in positions(ranges)]
        self.given.subtract(dropped)
        return tuple(span(at, at + 1) for at in dropped)

    def train(self, count):
        trained, self.queue = self.queue[:count], self.queue[count:]
        return tuple(span(at, at + 1) for at in trained)


class Stand:
    def __init__(self, *leases, **state):
        self.granted = []
        self.rotten = set()
        self.fetching = asyncio.Event()
        self.fetching.set()
        fields = {"head": Head(0, Digest("0" * 64)), "digest": Digest("1" * 64), "consumed": Consumed()}
        rules = SimpleNamespace(
            context=16, me=ME, is_data=lambda data: data.shard == SHARD.digest and data.stop <= 1000
        )
        self.decider = Decider(rules, lambda effect: None)
        self.decider.begin(Rounds(**fields | state))
        self.membership = SimpleNamespace(
            opened=SimpleNamespace(shards=(SHARD,)), leases=leases, keep=lambda leases: None
        )
        self.supply = Supply(
            RunSpec.model_validate({"run": {"name": "test"}}),
            decider=self.decider,
            membership=self.membership,
            link=SimpleNamespace(acquire_leases=self._grant),
            blobs=SimpleNamespace(is_sound=lambda digest: digest not in self.rotten, path=lambda digest: digest),
            fetch=self._fetch,
            tally=Tally(),
        )

    async def _grant(self, sequences):
        return self.granted.pop(0)

    async def _fetch(self, shard):
        await self.fetching.wait()
        self.rotten.discard(shard.digest)

    def know(self, **state):
        self.decider.begin(replace(self.decider.rounds, **state))


async def test_a_new_trainer_gets_what_is_leased_and_neither_in_a_record_nor_on_its_way_to_one():
    stand = Stand(
        lease("1", 0, 10),
        consumed=Consumed().with_ranges([span(0, 2)]),
        contribution=Contribution(ME, 32, (span(2, 4),)),
        carried=Contribution(ME, 32, (span(6, 8),)),
    )
    trainer = Trainer()
    await stand.supply.supply(trainer)
    assert trainer.given == Counter([4, 5, 8, 9])


async def test_what_diverged_here_is_given_up_with_the_end_of_its_lease_and_not_trained_again():
    stand, trainer = Stand(lease("1", 0, 10), lease("2", 10, 20)), Trainer()
    await stand.supply.supply(trainer)
    trained = trainer.train(10)
    stand.supply.leave_out([span(4, 6)])
    stand.know(consumed=Consumed().with_ranges([span(0, 3)]))
    await stand.supply.settle(record())
    assert stand.supply.lease_ids == ("1", "2"), "the rest of it is still to come"
    stand.know(consumed=Consumed().with_ranges(each for each in trained if each.start not in (4, 5)))
    await stand.supply.settle(record())
    assert stand.supply.lease_ids == ("2",), "nobody renews it: it goes to somebody else"

    another = Trainer()
    stand.granted = [(lease("3", 4, 6),)]
    await stand.supply.supply(another)
    await stand.supply.acquire(2)
    assert set(another.given) == set(range(10, 20))


async def test_a_shard_that_rotted_is_not_given_and_comes_again_with_the_next_data():
    stand, trainer = Stand(lease("1", 0, 10)), Trainer()
    stand.rotten.add(SHARD.digest)
    await stand.supply.supply(trainer)
    assert not trainer.given
    stand.granted = [()]
    await stand.supply.acquire(4)
    await stand.supply.settle(record())
    assert set(trainer.given) == set(range(10))


async def test_a_shard_that_the_trainer_cannot_read_is_fetched_and_given_again():
    stand, trainer = Stand(lease("1", 0, 10)), Trainer()
    await stand.supply.supply(trainer)
    trained = trainer.train(4)
    lost, trainer.queue = trainer.queue, []
    trainer.given.subtract(lost)
    stand.rotten.add(SHARD.digest)
    await stand.supply.mend(SHARD.digest, [span(at, at + 1) for at in lost])
    assert trainer.queue == lost and not stand.rotten
    assert all(count == 1 for count in trainer.given.values()), trained


@pytest.mark.parametrize(
    "data", [span(0, SHARD.sequences + 1), replace(span(0, 4), shard=Digest("cd" * 32))], ids=["too long", "unknown"]
)
async def test_a_lease_of_data_that_the_run_does_not_have_is_not_taken(data):
    stand, trainer = Stand(), Trainer()
    await stand.supply.supply(trainer)
    stand.granted = [(replace(lease("1", 0, 4), range=data),)]
    await stand.supply.acquire(4)
    assert not trainer.given and not stand.supply.lease_ids


async def test_a_shard_above_the_owners_cap_is_named_and_the_node_goes_on_with_what_it_has(tmp_path):
    stand, trainer = Stand(lease("1", 0, 10)), Trainer()
    blobs = BlobStore(tmp_path, bytes_max=50_000)
    old = blobs.put_bytes(bytes(20_000)).digest
    large = Shard(Digest("cd" * 32), 50_001, 25_000, 500)

    async def fetch(shard):
        if shard is large:
            blobs.writer(shard.digest, shard.size)

    await stand.supply.supply(trainer)
    events = []
    stand.decider.post = events.append
    stand.decider.rules.is_data = lambda data: True
    stand.supply._fetch, stand.supply._blobs = fetch, blobs
    stand.supply._shards |= {large.digest: large, old: replace(SHARD, digest=old)}
    stand.granted = [(replace(lease("2", 0, 4), range=DataRange(0, large.digest, 0, 4)),)]
    await stand.supply.acquire(4)
    assert stand.supply._tally.notice == "E-BLOB-002: blob of 50,001 bytes, the cap is 50,000"
    assert events == [session.LeasesArrived(0)]  # so that it asks again, later
    assert stand.supply.lease_ids == ("1",) and trainer.given == Counter(range(10))
    assert not blobs.has(old)  # what could be had again made room


async def test_a_lease_that_comes_while_a_trainer_starts_is_given_once():
    stand = Stand(lease("1", 0, 10))
    stand.granted = [(lease("2", 10, 20),)]
    old, new = Trainer(), Trainer()
    await stand.supply.supply(old)
    new.may_take.clear()
    starting = asyncio.create_task(stand.supply.supply(new))
    await asyncio.sleep(0)
    coming = asyncio.create_task(stand.supply.acquire(10))
    for _ in range(5):
        await asyncio.sleep(0)
    new.may_take.set()
    await asyncio.gather(starting, coming)
    assert new.given == Counter(range(20)) and old.given == Counter(range(10))


async def test_a_lease_that_comes_before_a_new_trainer_is_supplied_waits_for_it():
    stand = Stand(lease("1", 0, 10))
    await stand.supply.supply(Trainer(dead=True))
    stand.granted = [(lease("2", 10, 20),)]
    await stand.supply.acquire(10)
    trainer = Trainer()
    await stand.supply.supply(trainer)
    assert trainer.given == Counter(range(20))


async def test_what_a_dead_trainer_had_not_handed_over_is_trained_again_and_what_it_had_is_not():
    stand = Stand(lease("1", 0, 10))
    trainer = Trainer()
    await stand.supply.supply(trainer)
    handed_over = trainer.train(3)
    stand.know(contribution=Contribution(ME, 48, handed_over))
    trainer.train(4)
    trainer.dead = True
    again = Trainer()
    await stand.supply.supply(again)
    assert again.given == Counter(range(3, 10))


async def test_data_that_is_leased_again_after_it_was_lost_is_not_trained_twice():
    stand = Stand(lease("1", 0, 10))
    trainer = Trainer()
    await stand.supply.supply(trainer)
    trainer.train(4)
    await stand.supply.lose(["1"])
    assert not trainer.queue
    stand.granted = [(lease("2", 0, 10),)]
    await stand.supply.acquire(10)
    assert trainer.given == Counter(range(10)) and trainer.queue == list(range(4, 10))


async def test_work_that_no_round_took_is_given_again_once_and_only_where_it_is_still_leased():
    stand = Stand(lease("1", 0, 10), lease("2", 10, 20))
    trainer = Trainer()
    await stand.supply.supply(trainer)
    dropped = trainer.train(20)
    await stand.supply.lose(["2"])
    stand.supply.take_back(dropped)
    new = Trainer()  # after a crash at the same time
    await asyncio.gather(stand.supply.supply(new), stand.supply.settle(record()))
    await stand.supply.settle(record())
    assert new.given == Counter(range(10))
    stand.supply.take_back([span(0, 10)])
    stand.know(consumed=Consumed().with_ranges([span(0, 10)]))
    await stand.supply.settle(record(Contribution(ME, 160, (span(0, 10),))))
    assert new.given == Counter(range(10)), "a record has it after all"


async def test_what_others_brought_while_this_node_slept_is_not_trained_in_vain():
    stand = Stand(lease("1", 0, 10), lease("2", 10, 20))
    trainer = Trainer()
    await stand.supply.supply(trainer)
    trained = trainer.train(2)
    theirs = (Contribution(NodeId("other"), 128, (span(0, 8),)), Contribution(NodeId("third"), 64, (span(8, 12),)))
    stand.know(
        contribution=Contribution(ME, 32, trained),
        consumed=Consumed().with_ranges(each for brought in theirs for each in brought.ranges),
    )
    await stand.supply.settle(record(*theirs))
    assert trainer.queue == list(range(12, 20))
    assert stand.supply.lease_ids == ("2",)


async def test_only_what_was_given_counts_as_data_in_hand():
    stand = Stand(lease("1", 0, 10))
    await stand.supply.supply(Trainer())
    stand.granted = [(lease("2", 5, 15),)]
    seen = []
    stand.decider.post = seen.append
    await stand.supply.acquire(10)
    assert seen == [session.LeasesArrived(5)]


actions = st.one_of(
    st.tuples(st.just("lease"), st.integers(0, 7)),
    st.tuples(st.just("lose"), st.integers(0, 7)),
    st.tuples(st.just("train"), st.integers(1, 12)),
    st.tuples(st.just("snapshot"), st.just(0)),
    st.tuples(st.just("take"), st.just(0)),
    st.tuples(st.just("drop"), st.just(0)),
    st.tuples(st.just("theirs"), st.integers(0, 8)),
    st.tuples(st.just("die"), st.just(0)),
    st.tuples(st.just("yield"), st.integers(1, 4)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=40))
@example([("lease", 0), ("yield", 4), ("yield", 4), ("theirs", 0)])  # chance seldom puts these in a row
async def test_in_any_order_no_trainer_ever_holds_a_sequence_twice(story):
    """Held: queued, trained since the snapshot, waiting for a round, or in a record."""
    stand = Stand()
    trainer, fresh, tasks, count, lost = Trainer(), (), [], 0, set()
    tasks.append(asyncio.create_task(stand.supply.supply(trainer)))
    for do, number in story:
        state, held = stand.decider.rounds, stand.decider.rounds.carried
        match do:
            case "lease":
                count += 1
                stand.granted.append((lease(str(count), number * 10, number * 10 + 15),))
                tasks.append(asyncio.create_task(stand.supply.acquire(15)))
            case "lose":
                tasks.append(asyncio.create_task(stand.supply.lose(stand.supply.lease_ids[number : number + 1])))
            case "train":
                fresh += trainer.train(number)
            case "snapshot" if fresh:
                before = held.ranges if held is not None else ()
                stand.know(carried=Contribution(ME, 0, before + fresh))
                fresh = ()
            case "take" if held is not None:
                stand.know(carried=None, consumed=state.consumed.with_ranges(held.ranges))
                tasks.append(asyncio.create_task(stand.supply.settle(record(held))))
            case "theirs" if not state.consumed.overlaps(taken := span(number * 10, number * 10 + 5)):
                stand.know(consumed=state.consumed.with_ranges([taken]))
                lost |= positions([taken])
                theirs = record(Contribution(NodeId("other"), 80, (taken,)))
                tasks.append(asyncio.create_task(stand.supply.settle(theirs)))
            case "drop" if held is not None:
                stand.know(carried=None)
                stand.supply.take_back(held.ranges)
                tasks.append(asyncio.create_task(stand.supply.settle(record())))
            case "die":
                trainer.dead, fresh = True, ()
                trainer = Trainer()
                tasks.append(asyncio.create_task(stand.supply.supply(trainer)))
            case "yield":
                for _ in range(number):
                    await asyncio.sleep(0)
        state = stand.decider.rounds
        carried = state.carried.ranges if state.carried is not None else ()
        everything = [*trainer.queue, *(at for each in (*fresh, *carried) for at in range(each.start, each.stop))]
        assert len(everything) == len(set(everything)), do
        assert not any(state.consumed.overlaps(span(at, at + 1)) for at in everything if at not in lost), do
    await asyncio.gather(*tasks)
    leased = {at for each in stand.supply._leases.values() for at in range(each.range.start, each.range.stop)}
    consumed = {at for at in leased if stand.decider.rounds.consumed.overlaps(span(at, at + 1))}
    assert lost.isdisjoint(trainer.queue), "what others brought is not trained in vain"
    await stand.supply.settle(record())
    carried = stand.decider.rounds.carried
    waiting = positions(carried.ranges) if carried is not None else set()
    assert leased - consumed - waiting <= set(trainer.queue) | positions(fresh), "nothing leased is forgotten"
