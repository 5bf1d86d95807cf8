"""What a node stands on while its coordinator is away: files of its own that let it start again. Knows no network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from node.link import Door, Opened, check_base, check_lease, check_manifest, check_pass, check_rollbacks, check_shards
from protocol import canonical
from protocol.blobs import atomic_write
from protocol.errors import Code, Refused
from protocol.limits import CONTROL_BYTES_MAX
from protocol.types import (
    BaseCheckpoint,
    Lease,
    NodeId,
    PeerId,
    Shard,
    SignedManifest,
    SignedPass,
    SignedRollback,
)

LIFE: Final = "life"
_LIFE: Final = re.compile(rb"[0-9]{1,16}\n")

log = structlog.get_logger()


@dataclass(frozen=True)
class Standing:
    """The part of an Opened that lasts, and the data that this node may train on."""

    manifest: SignedManifest
    signed_pass: SignedPass
    shards: tuple[Shard, ...]
    rendezvous: tuple[str, ...]
    base: BaseCheckpoint
    rollbacks: tuple[SignedRollback, ...]
    leases: tuple[Lease, ...] = ()
    coordinator: str = ""  # the IP address that it was last reached at

    @classmethod
    def of(cls, opened: Opened, leases: Iterable[Lease] = ()) -> Standing:
        return cls(
            opened.manifest,
            opened.signed_pass,
            opened.shards,
            opened.rendezvous,
            opened.base,
            opened.rollbacks,
            tuple(leases),
            opened.coordinator,
        )

    def opened(self, life: int) -> Opened:
        """As if the coordinator had said it. The rosters, and what must not be signed, are in the journal."""
        return Opened(
            self.signed_pass,
            self.manifest,
            None,
            self.base,
            self.rendezvous,
            self.shards,
            skew_seconds=0.0,
            rollbacks=self.rollbacks,
            silent_epoch=None,
            life=life,
            coordinator=self.coordinator,
        )

    def with_leases(self, leases: Iterable[Lease]) -> Standing:
        return replace(self, leases=tuple(leases))

    def save(self, path: Path) -> None:
        data = canonical.to_bytes(self)
        atomic_write(path, _sum(data) + b"\n" + data)

    @classmethod
    def load(cls, path: Path, door: Door, *, node: NodeId, peer: PeerId) -> Standing | None:
        """What was saved, if it is whole and of this run and node; checked as if it came through the link."""
        try:
            with path.open("rb") as file:
                told, _, data = file.read(CONTROL_BYTES_MAX + 66).partition(b"\n")  # the sum and its line end are 65
            if told != _sum(data):
                raise Refused(Code.BLOB_CORRUPT, "it is not what was written")
            standing = canonical.from_bytes(cls, data)
            _check(standing, door, node=node, peer=peer)
        except FileNotFoundError:
            return None
        except (OSError, Refused) as error:
            log.warning(
                "what was kept for a start without the coordinator is of no use", path=str(path), why=str(error)
            )
            return None
        return standing


def _sum(data: bytes) -> bytes:
    """Half of what is kept is not signed, and disks rot."""
    return hashlib.sha256(data).hexdigest().encode()


def _check(standing: Standing, door: Door, *, node: NodeId, peer: PeerId) -> None:
    manifest = check_manifest(standing.manifest, door.run)
    signed = standing.signed_pass
    issued_ms = signed.body.issued_ms  # whether it has ended is for the coordinator's clock to say
    check_pass(signed, door.run, node=node, peer=peer, now_ms=issued_ms)
    check_base(standing.base, manifest)
    check_shards(standing.shards, manifest)
    check_rollbacks(standing.rollbacks, door.run)
    sequences = {shard.digest: shard.sequences for shard in standing.shards}
    for lease in standing.leases:
        check_lease(lease, door.run, node)
        if lease.range.stop > sequences.get(lease.range.shard, 0):
            raise Refused(Code.FIELD, f"lease {canonical.shown(lease.lease_id)} is of data that the run does not have")


# lives


def begin_life(folder: Path) -> int:
    """A number that this node has not used before, durable when the call returns.

    Raised by each start, and by each round if backups are to be noticed that are younger than the last start. A file
    that is missing or rotten begins again: the coordinator has heard those lives, and knows that promises were lost.
    """
    life = _life(folder) + 1
    _save_life(folder, life)
    return life


def raise_life(folder: Path, at_least: int) -> None:
    """The coordinator knows of a higher one: the next must be above that."""
    if _life(folder) < at_least:
        _save_life(folder, at_least)


def _life(folder: Path) -> int:
    path = folder / LIFE
    try:
        with path.open("rb") as file:
            text = file.read(32)
    except FileNotFoundError:
        return 0
    if not _LIFE.fullmatch(text):
        log.warning("the file that counts this node's lives is rotten: it begins again", path=str(path))
        return 0
    return int(text)


def _save_life(folder: Path, life: int) -> None:
    atomic_write(folder / LIFE, b"%d\n" % life)
