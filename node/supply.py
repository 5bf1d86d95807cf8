"""The supply of data: what is leased to this node, fetched, and given to its trainer; each sequence once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from node.core import rounds, session
from node.decider import Decider
from node.link import Link
from node.membership import Membership
from node.status import Tally
from node.training import Trainer
from protocol.blobs import BlobStore
from protocol.contribution import grant_of
from protocol.errors import Code, Exit, Refused
from protocol.log import ranges_of
from protocol.runspec import RunSpec
from protocol.state import Consumed
from protocol.types import DataRange, Digest, Grant, Lease, Record, Shard

ROUNDS_AHEAD: Final = 8  # data kept in hand, in rounds: a coordinator's outage is not felt for so long

log = structlog.get_logger()


class Supply:
    """The leases, and how much of them the trainer has been given.

    Only `_top_up` gives, and only what is leased, in no record, on its way to none, and not given before. So data may
    come from any side at any time, and reaches a trainer once.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        decider: Decider,
        membership: Membership,
        link: Link,
        blobs: BlobStore,
        fetch: Callable[[Shard], Awaitable[None]],
        tally: Tally,
    ) -> None:
        self._spec = spec
        self._decider = decider
        self._membership = membership
        self._link = link
        self._blobs = blobs
        self._fetch = fetch
        self._tally = tally
        self._shards: dict[Digest, Shard] = {shard.digest: shard for shard in membership.opened.shards}
        self._leases: dict[str, Lease] = {lease.lease_id: lease for lease in membership.leases}
        self._grants = [grant_of(lease) for lease in membership.leases]  # a lease may be lost when its data is trained
        self._trainer: Trainer | None = None
        self._given = Consumed()  # to this trainer
        self._left_out = Consumed()  # no step could be made on it here: for others to try
        self._turn = asyncio.Lock()  # one gives or takes at a time

    @property
    def lease_ids(self) -> tuple[str, ...]:
        return tuple(self._leases)

    def knows(self, shard: Digest) -> bool:
        """Whether the run has it."""
        return shard in self._shards

    def grants_of(self, ranges: Iterable[DataRange]) -> tuple[Grant, ...]:
        """What proves that this data was granted to us."""
        listed = tuple(ranges)
        return tuple(grant for grant in self._grants if any(grant.range.overlaps(each) for each in listed))

    def wanted(self) -> int:
        """Sequences to have in hand at least; twice as many are asked for. They last through an outage.

        Never so many that the others would lack them."""
        state, stepped = self._decider.rounds, self._tally.stepped
        some_rounds = ROUNDS_AHEAD * self._spec.rounds.steps(state.head.round) * self._spec.train.batch_sequences
        speed = stepped.tokens_per_second / self._decider.rules.context if stepped else 0.0
        members = len(state.roster.members) if state.roster else 1
        share = sum(shard.sequences for shard in self._shards.values()) // (2 * members)
        outage = min(speed * self._spec.leases.hours_ahead * 3600, share)
        return max(some_rounds, int(outage) // 2)

    # what comes

    async def acquire(self, sequences: int) -> None:
        """Get data: leases from the coordinator, their shards from wherever they are, into the trainer's queue."""
        given = 0
        try:
            for held in {lease.range.shard for lease in self._leases.values()}:
                if not await asyncio.to_thread(self._blobs.is_sound, held):
                    await self._fetch(self._shards[held])
            for lease in await self._link.acquire_leases(sequences):
                if not self._decider.rules.is_data(lease.range):
                    what = f"a lease of sequences {lease.range.start} to {lease.range.stop} of a shard that has not so many"
                    raise Refused(Code.FIELD, what)
                await self._fetch(self._shards[lease.range.shard])
                async with self._turn:
                    self._leases[lease.lease_id] = lease
                    self._grants.append(grant_of(lease))
                    self._membership.keep(self._leases.values())
                    given += await self._top_up()
        except Refused as refused:
            log.warning("no data", why=refused.what)
            if refused.reason.exit is Exit.RESOURCE:
                self._tally.notice = f"{refused.reason.code}: {refused.what}"
                self.make_room()
        self._decider.post(session.LeasesArrived(given))

    async def supply(self, trainer: Trainer) -> None:
        """Give a new trainer what there is. What the one before it had not handed over is trained again."""
        async with self._turn:
            self._trainer, self._given = trainer, Consumed()
            given = await self._top_up()
            self._decider.post(session.DataUsed(given, self.wanted()))

    # what goes

    async def lose(self, lease_ids: Iterable[str]) -> None:
        """The coordinator has given them to somebody else, or will."""
        lost = [self._leases.pop(lease_id).range for lease_id in lease_ids if lease_id in self._leases]
        if not lost:
            return
        self._membership.keep(self._leases.values())
        log.warning("leases were lost", sequences=_sequences(lost))
        async with self._turn:
            await self._forget(lost)
            await self._top_up()  # some of it may have been leased to us again meanwhile

    def take_back(self, ranges: Iterable[DataRange]) -> None:
        """What was trained too long ago to be of use is data like any other; `settle` gives it again."""
        self._given = _without(self._given, ranges)

    def leave_out(self, ranges: Iterable[DataRange]) -> None:
        """Steps on it diverged. The rest of its leases is trained, then they are given up."""
        self._left_out = self._left_out.with_ranges(ranges)

    async def mend(self, shard: Digest, ranges: Iterable[DataRange]) -> None:
        """The trainer could not read this shard, and has dropped these ranges: fetch it again if it is not whole."""
        async with self._turn:
            self._given = _without(self._given, ranges)
            await asyncio.to_thread(self._blobs.is_sound, shard)
        with suppress(Refused):  # then with the next lease
            await self._fetch(self._shards[shard])
        async with self._turn:
            left = self._decider.session.sequences_left + await self._top_up()
        self._decider.post(session.DataUsed(left, self.wanted()))

    async def settle(self, record: Record) -> None:
        """After a round: leases that are used up are leases no more; whatever is left is for the trainer.

        What others brought while our lease was theirs would be trained here in vain: who slept finds much of it."""
        consumed = self._decider.rounds.consumed
        done = consumed.with_ranges(_listed(self._left_out))  # a lease that nobody renews goes to somebody else
        self._leases = {key: lease for key, lease in self._leases.items() if not done.covers(lease.range)}
        self._grants = [grant for grant in self._grants if not consumed.covers(grant.range)]
        async with self._turn:
            await self._forget([each for each in ranges_of(record) if self._given.overlaps(each)])
            if again := await self._top_up():
                log.info("work that no round took is done again", sequences=again)

    def clear(self) -> None:
        """The coordinator has taken everything back, and the trainer is gone."""
        self._leases.clear()
        self._grants.clear()
        self._trainer = None

    def give_up(self) -> None:
        """What an earlier life had leased is for others: nobody trains here."""
        self.clear()
        self._membership.keep(())

    def make_room(self) -> None:
        """Shards that no lease of ours names can be had again."""
        leased = {lease.range.shard for lease in self._leases.values()}
        for digest in self._shards.keys() - leased:
            self._blobs.delete(digest)

    async def _forget(self, ranges: list[DataRange]) -> None:
        """Take what is queued of these ranges from the trainer. What it has trained on stays trained."""
        if self._trainer is None or not ranges:
            return
        with suppress(Refused):  # it has ended; the next one never gets it
            dropped = await self._trainer.drop(ranges)
            if dropped:
                self._given = _without(self._given, dropped)
                left = self._decider.session.sequences_left - _sequences(dropped)
                self._decider.post(session.DataUsed(max(0, left), self.wanted()))  # perhaps asks for more

    async def _top_up(self) -> int:
        """Give the trainer all that it lacks; how many sequences that were."""
        state = self._decider.rounds
        waiting = [c for c in (state.contribution, state.carried) if c is not None]
        used = state.consumed.with_ranges(each for contribution in waiting for each in contribution.ranges)
        used = used.with_ranges(_listed(self._given)).with_ranges(_listed(self._left_out))
        shards = {lease.range.shard for lease in self._leases.values()}
        sound = {shard for shard in shards if await asyncio.to_thread(self._blobs.is_sound, shard)}
        here = [lease.range for lease in self._leases.values() if lease.range.shard in sound]
        free = rounds.unused(tuple(here), used)
        if self._trainer is None or not free:
            return 0
        pieces: list[tuple[DataRange, Path]] = [(each, self._blobs.path(each.shard)) for each in free]
        self._given = self._given.with_ranges(free)
        try:
            await self._trainer.add_data(pieces)
        except Refused:  # it has ended; the next one gets it
            return 0
        return _sequences(free)


def _sequences(ranges: Iterable[DataRange]) -> int:
    return sum(each.stop - each.start for each in ranges)


def _without(given: Consumed, gone: Iterable[DataRange]) -> Consumed:
    return Consumed().with_ranges(rounds.unused(_listed(given), Consumed().with_ranges(gone)))


def _listed(given: Consumed) -> tuple[DataRange, ...]:
    return tuple(
        DataRange(each.pass_number, each.shard, start, stop)
        for each in given.listed()
        for start, stop in zip(each.bounds[::2], each.bounds[1::2], strict=True)
    )
