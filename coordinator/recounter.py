"""The recounter: asks reducers what their means were made of, and makes them again. Who is asked is decided in core.

What was brought to it lies in a folder of its own until it is looked at; nothing of this outlives the process.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import structlog

from coordinator.core import recounts
from coordinator.core.audits import UNANSWERED_MAX, Rules
from coordinator.core.recounts import Ask, Recounts
from protocol.blobs import BlobStore
from protocol.errors import Refused
from protocol.evidence import check_reduction
from protocol.exchange import Packing
from protocol.types import BlobRef, Digest, Fault, NodeId, Record, RoundNumber

log = structlog.get_logger()


class Recounter:
    """`run` makes means again, for ever; the rest is told to it by the coordinator's loop."""

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
        self._rules = Rules(share, nothing=Digest(""))
        self._heard_ms = heard_ms
        self._now_ms = now_ms
        self._strike = strike
        self._recounts = Recounts()
        self._asked_ms: dict[Ask, float] = {}
        self._luck = random.SystemRandom()  # nobody can know beforehand whom it chooses
        self._stirred = asyncio.Event()

    def asked(self, node: NodeId) -> tuple[BlobRef, ...]:
        """What this reducer is to show now."""
        wanted = [ask.part.evidence for ask in self._recounts.open if ask.part.reducer == node]
        return tuple(each for each in wanted if each is not None and not self.blobs.has(each.digest))

    def certified(self, record: Record) -> None:
        """A record of the line, in order."""
        asks = self._recounts.open
        heard = {ask.part.reducer for ask in asks if self._heard_ms(ask.part.reducer) > self._asked_ms[ask]}
        answered = {ask for ask in asks if self._is_here(ask)}
        self._recounts, withheld = recounts.expired(self._recounts, record.round, heard, answered)
        self._recounts = recounts.certified(self._recounts, record, self._rules)
        self._asked_ms = {ask: self._asked_ms.get(ask, self._now_ms()) for ask in self._recounts.open}
        self._tidy()
        for ask in withheld:
            what = f"{UNANSWERED_MAX} times in a row it did not show what its mean was made of"
            self._tell(ask, Fault.WITHHELD, what)

    def stir(self) -> None:
        """Something has come."""
        self._stirred.set()

    def gone_back(self, to: RoundNumber) -> None:
        self._recounts = recounts.gone_back(self._recounts, to)
        self._tidy()

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
            log.warning("a part that cannot be made again", round=ask.record.round, why=refused.what)
            self._recounts = recounts.dropped(self._recounts, ask)
        else:
            luck = self._luck.random()
            self._recounts = recounts.recounted(self._recounts, ask, self._rules, lied=lie is not None, luck=luck)
            log.info("made again", round=ask.record.round, reducer=ask.part.reducer[:16], lie=lie)
            if lie is not None:
                self._tell(ask, Fault.REDUCED_WRONG, f"in round {ask.record.round} its mean was not one: {lie}")
        self._tidy()

    def _lie_in(self, ask: Ask) -> str | None:
        assert ask.part.evidence is not None, "only parts with evidence are asked about"
        return check_reduction(ask.record, ask.part, self.blobs.read(ask.part.evidence.digest), self._packing)

    def _tell(self, ask: Ask, fault: Fault, reason: str) -> None:
        assert ask.part.evidence is not None
        log.warning("a reducer is accused", node=ask.part.reducer[:16], why=reason)
        self._strike(ask.part.reducer, fault, ask.record.round, reason, ask.part.evidence.digest)

    def _is_here(self, ask: Ask) -> bool:
        return ask.part.evidence is not None and self.blobs.has(ask.part.evidence.digest)

    def _tidy(self) -> None:
        """Drop what no open recount needs."""
        needed = {ask.part.evidence.digest for ask in self._recounts.open if ask.part.evidence is not None}
        for digest in set(self.blobs.digests()) - needed:
            self.blobs.delete(digest)
