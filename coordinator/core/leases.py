"""Which node may train on which data until when. Ranges are granted in order, and again when they come back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from protocol.state import Consumed
from protocol.types import DataRange, Lease, NodeId, Shard

NOTHING = Consumed()


@dataclass(frozen=True)
class Cursor:
    """The first data that was never granted."""

    pass_number: int = 0
    shard: int = 0  # index into the run's shards
    start: int = 0


@dataclass(frozen=True)
class Leases:
    """All data of a run: granted, given back, and not yet touched."""

    shards: tuple[Shard, ...]
    cursor: Cursor = Cursor()
    returned: tuple[DataRange, ...] = ()
    held: dict[str, Lease] = field(default_factory=dict)
    serial: int = 0

    def of(self, node: NodeId) -> tuple[Lease, ...]:
        return tuple(lease for lease in self.held.values() if lease.node == node)


def grant(
    leases: Leases, node: NodeId, *, sequences: int, largest: int, until_ms: int, consumed: Consumed = NOTHING
) -> tuple[Leases, tuple[Lease, ...]]:
    """Lease about `sequences` sequences in ranges of at most `largest`; data that came back goes first.

    What records have consumed is passed over: they may have used data that a lost database had granted."""
    granted: list[Lease] = []
    while sequences > 0:
        leases, data = _take(leases, min(sequences, largest))
        if data is None:
            break
        for rest in consumed.rests(data):
            lease = Lease(f"{leases.serial:x}", node, rest, until_ms)
            leases = replace(leases, serial=leases.serial + 1, held={**leases.held, lease.lease_id: lease})
            granted.append(lease)
            sequences -= rest.stop - rest.start
    return leases, tuple(granted)


def _take(leases: Leases, sequences: int) -> tuple[Leases, DataRange | None]:
    if leases.returned:
        first, rest = leases.returned[0], leases.returned[1:]
        if first.stop - first.start > sequences:
            left = replace(first, start=first.start + sequences)
            return replace(leases, returned=(left, *rest)), replace(first, stop=first.start + sequences)
        return replace(leases, returned=rest), first
    if not any(shard.sequences for shard in leases.shards):
        return leases, None
    cursor = leases.cursor
    while cursor.start >= leases.shards[cursor.shard].sequences:
        following = cursor.shard + 1
        if following == len(leases.shards):
            cursor = Cursor(cursor.pass_number + 1, 0, 0)
        else:
            cursor = Cursor(cursor.pass_number, following, 0)
    shard = leases.shards[cursor.shard]
    stop = min(cursor.start + sequences, shard.sequences)
    data = DataRange(cursor.pass_number, shard.digest, cursor.start, stop)
    return replace(leases, cursor=replace(cursor, start=stop)), data


def renew(leases: Leases, node: NodeId, lease_ids: Iterable[str], until_ms: int) -> tuple[Leases, tuple[str, ...]]:
    """Extend those leases that this node holds; the others are not its own any more."""
    mine = [i for i in lease_ids if i in leases.held and leases.held[i].node == node]
    held = dict(leases.held)
    for lease_id in mine:
        held[lease_id] = replace(held[lease_id], until_ms=until_ms)
    return (replace(leases, held=held) if mine else leases), tuple(mine)


def give_back(leases: Leases, lease_ids: Sequence[str]) -> Leases:
    """End these leases; what was not consumed is granted again."""
    gone = [leases.held[lease_id].range for lease_id in lease_ids]
    held = {lease_id: lease for lease_id, lease in leases.held.items() if lease_id not in set(lease_ids)}
    return replace(leases, held=held, returned=(*leases.returned, *gone))


def expired(leases: Leases, now_ms: int) -> tuple[str, ...]:
    return tuple(lease_id for lease_id, lease in leases.held.items() if lease.until_ms <= now_ms)


def consume(leases: Leases, ranges: Iterable[DataRange]) -> Leases:
    """Strike certified ranges from whatever is held or was given back."""
    return strike(leases, Consumed().with_ranges(ranges))


def strike(leases: Leases, consumed: Consumed) -> Leases:
    """Strike all that certified records have consumed: after a restart, records may be newer than the leases."""
    returned = [rest for data in leases.returned for rest in consumed.rests(data)]
    held: dict[str, Lease] = {}
    for lease_id, lease in leases.held.items():
        rests = consumed.rests(lease.range)
        if rests:
            held[lease_id] = replace(lease, range=rests[-1])  # its holder trains forwards
            returned += rests[:-1]
    return replace(leases, returned=tuple(returned), held=held)


def undo(leases: Leases, ranges: Iterable[DataRange]) -> Leases:
    """A rollback: every lease ends, and what the undone records consumed is data again. All of it is granted in order.

    A record may name data that was never leased, for its members cannot know; beyond the cursor it is granted anyway."""
    order = {shard.digest: index for index, shard in enumerate(leases.shards)}
    known = [data for data in ranges if data.shard in order]
    touched = [below for data in known if (below := _below_cursor(leases, data, order[data.shard])) is not None]
    free = [*leases.returned, *(lease.range for lease in leases.held.values()), *touched]
    joined: list[DataRange] = []
    for data in sorted(free, key=lambda data: (data.pass_number, order[data.shard], data.start)):
        last = joined[-1] if joined else None
        if last and (last.pass_number, last.shard) == (data.pass_number, data.shard) and data.start <= last.stop:
            joined[-1] = replace(last, stop=max(last.stop, data.stop))
        else:
            joined.append(data)
    return replace(leases, returned=tuple(joined), held={})


def _below_cursor(leases: Leases, data: DataRange, index: int) -> DataRange | None:
    """What of this range was granted once."""
    cursor, stop = leases.cursor, leases.shards[index].sequences
    if (data.pass_number, index) > (cursor.pass_number, cursor.shard):
        return None
    if (data.pass_number, index) == (cursor.pass_number, cursor.shard):
        stop = cursor.start
    stop = min(stop, data.stop)
    return replace(data, stop=stop) if data.start < stop else None
