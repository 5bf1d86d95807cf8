"""The recounter: asks reducers what their means were made of, and makes them again. Who is asked is decided in core.

What was brought to it lies in a folder of its own until it is looked at; nothing of this outlives the process.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog

from coordinator.core import recounts
from coordinator.core.inquiries import UNANSWERED_MAX, Rules
from coordinator.core.recounts import Ask, Recounts
from protocol.blobs import BlobStore
from protocol.errors import Refused
from protocol.evidence import check_reduction
from protocol.exchange import Packing
from protocol.types import BlobRef, Digest, Fault, NodeId, Record, RoundNumber

log = structlog.get_logger()


class Recounter:
    """`run` makes means again, for ever; the rest is told to it by the coordinator's loop. `close` it at the end."""

    def __init__(
        self,
        folder: Path,
        packing: Packing,
        *,
        share: float,
        heard_ms: Callable[[NodeId], float],
        now_ms: Callable[[], float],
        strike: Callable[[NodeId, Fault, RoundNumber, str, Digest], None],
    ) -> None:
        self.blobs = BlobStore(folder)
        self._packing = packing
        self._rules = Rules(share)
        self._heard_ms = heard_ms
        self._now_ms = now_ms
        self._strike = strike
        self._recounts = Recounts()
        self._luck = random.SystemRandom()  # nobody can know beforehand whom it chooses
        self._stirred = asyncio.Event()

    def asked(self, node: NodeId) -> tuple[BlobRef, ...]:
        """What this reducer is to show now."""
        return tuple(ask.evidence for ask in self._recounts.open if ask.node == node and not self._is_here(ask))

    def certified(self, record: Record) -> None:
        """A record of the line, in order."""
        heard = self._recounts.heard(self._heard_ms)
        answered = set(filter(self._is_here, self._recounts.open))
        late, withheld = self._recounts.expired(record.round, heard, answered)
        self._recounts = recounts.certified(late, record, self._rules).told(self._now_ms())
        self._tidy()
        for ask in withheld:
            what = f"{UNANSWERED_MAX} times in a row it did not show what its mean was made of"
            self._tell(ask, Fault.WITHHELD, what)

    def stir(self) -> None:
        """Something has come."""
        self._stirred.set()

    def gone_back(self, to: RoundNumber) -> None:
        self._recounts = self._recounts.gone_back(to)
        self._tidy()

    def close(self) -> None:
        shutil.rmtree(self.blobs.folder, ignore_errors=True)

    async def run(self) -> None:
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while (ask := next(filter(self._is_here, self._recounts.open), None)) is not None:
                await self._recount(ask)

    async def _recount(self, ask: Ask) -> None:
        try:
            lie = await asyncio.to_thread(self._lie_in, ask)
        except Refused as refused:  # a majority has signed what no honest member signs: that is not this reducer's word
            log.warning("a part that cannot be made again", round=ask.round, why=refused.what)
            self._recounts = self._recounts.dropped(ask)
        else:
            luck = self._luck.random()
            self._recounts = recounts.recounted(self._recounts, ask, self._rules, lied=lie is not None, luck=luck)
            log.info("made again", round=ask.round, reducer=ask.node[:16], lie=lie)
            if lie is not None:
                self._tell(ask, Fault.REDUCED_WRONG, f"in round {ask.round} its mean was not one: {lie}")
        self._tidy()

    def _lie_in(self, ask: Ask) -> str | None:
        return check_reduction(ask.record, ask.part, self.blobs.read(ask.evidence.digest), self._packing)

    def _tell(self, ask: Ask, fault: Fault, reason: str) -> None:
        log.warning("a reducer is accused", node=ask.node[:16], why=reason)
        self._strike(ask.node, fault, ask.round, reason, ask.evidence.digest)

    def _is_here(self, ask: Ask) -> bool:
        return self.blobs.has(ask.evidence.digest)

    def _tidy(self) -> None:
        """Drop what no open recount needs."""
        self.blobs.keep_only({ask.evidence.digest for ask in self._recounts.open})
