"""What the coordinator's loop offers to its doors."""

from __future__ import annotations

from typing import Protocol

from coordinator.auditor import Auditor
from coordinator.core import machine
from coordinator.recounter import Recounter
from coordinator.store import Store
from protocol.blobs import BlobStore
from protocol.errors import Refused
from protocol.identity import Key
from protocol.types import BaseCheckpoint, Digest, Shard, SignedManifest


class Desk(Protocol):
    @property
    def manifest(self) -> SignedManifest: ...
    @property
    def state(self) -> machine.State: ...
    @property
    def store(self) -> Store: ...
    @property
    def blobs(self) -> BlobStore: ...
    @property
    def key(self) -> Key: ...
    @property
    def shards(self) -> tuple[Shard, ...]: ...
    @property
    def rendezvous(self) -> tuple[str, ...]: ...
    @property
    def heartbeat_seconds(self) -> float: ...
    @property
    def nobody_callable(self) -> bool: ...
    def base(self) -> BaseCheckpoint: ...
    def now_ms(self) -> int: ...
    def finished(self) -> bool: ...

    def check_deciding(self) -> None:
        """Refuses where nothing is decided any more."""

    def stand_still(self, trouble: Refused) -> None:
        """The disk takes nothing: refuse, with what is told to others, and decide nothing until it does."""

    def submit(self, event: machine.Event) -> tuple[machine.Effect, ...]:
        """Step the machine, carry out the effects, and tell which they were."""

    async def news(self) -> None:
        """Returns at the next Announce."""

    def part_stored(self, digest: Digest) -> None: ...
    @property
    def auditor(self) -> Auditor: ...
    @property
    def recounter(self) -> Recounter: ...
