"""Which node may train on which data until when. Ranges are granted in order, and again when they come back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from protocol.types import DataRange, Lease, NodeId, Shard


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
    leases: Leases, node: NodeId, *, sequences: int, largest: int, until_ms: int
) -> tuple[Leases, tuple[Lease, ...]]:
    """Lease about `sequences` sequences in ranges of at most `largest`; data that came back goes first."""
    granted: list[Lease] = []
    while sequences > 0:
        leases, data = _take(leases, min(sequences, largest))
        if data is None:
            break
        lease = Lease(f"{leases.serial:x}", node, data, until_ms)
        leases = replace(leases, serial=leases.serial + 1, held={**leases.held, lease.lease_id: lease})
        granted.append(lease)
        sequences -= data.stop - data.start
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
    for used in ranges:
        returned = [rest for r in leases.returned for rest in _without(r, used)]
        held = dict(leases.held)
        for lease_id, lease in leases.held.items():
            if not lease.range.overlaps(used):
                continue
            del held[lease_id]
            rests = _without(lease.range, used)
            if rests:
                held[lease_id] = replace(lease, range=rests[-1])  # its holder trains forwards
                returned += rests[:-1]
        leases = replace(leases, returned=tuple(returned), held=held)
    return leases


def _without(whole: DataRange, used: DataRange) -> list[DataRange]:
    if not whole.overlaps(used):
        return [whole]
    before = replace(whole, stop=max(whole.start, used.start))
    after = replace(whole, start=min(whole.stop, used.stop))
    return [part for part in (before, after) if part.start < part.stop]
