"""The auditor: asks members for what they signed, and has the evaluator measure it. What follows is decided in core.

It keeps what was brought to it, and the states that audited rounds began and ended with, in a folder of its own; nothing
of this outlives the process. A busy evaluator makes an audit late, and a late one is dropped: no round waits for it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from coordinator.core import audits
from coordinator.core.audits import Accusation, Ask, Audits, Broken, Measured, Rules
from coordinator.evaluation import Evaluator
from protocol.blobs import BlobStore, digest_of
from protocol.codec import Codec, Floats
from protocol.errors import Code, Refused
from protocol.types import Digest, Manifest, NodeId, Record, RoundNumber, Shard

SEQUENCES: Final = 64  # of a contribution's data: the spread over more would say the same

log = structlog.get_logger()


class Auditor:
    """`run` measures, for ever; the rest is told to it by the coordinator's loop."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shards: tuple[Shard, ...],
        codec: Codec,
        *,
        share: float,
        archive: BlobStore,
        evaluator: Callable[[], Evaluator | None],
        heard_ms: Callable[[NodeId], float],
        now_ms: Callable[[], float],
        accuse: Callable[[Accusation], None],
    ) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.size = codec.encoded_bytes(manifest.parameters)
        self.blobs = BlobStore(folder / "answers")
        self._folder = folder
        self._manifest = manifest
        self._shards = {shard.digest: shard for shard in shards}
        self._codec = codec
        self._archive = archive
        self._evaluator = evaluator
        self._heard_ms = heard_ms
        self._now_ms = now_ms
        self._accuse = accuse
        self._rules = Rules(share, nothing=_zeros(codec, manifest.parameters) if share else Digest(""))
        self._audits = Audits()
        self._gathered: frozenset[Digest] = frozenset()  # parts of records: they come without being asked for
        self._asked_ms: dict[Ask, float] = {}
        self._luck = random.SystemRandom()  # nobody can know beforehand whom it chooses
        self._stirred = asyncio.Event()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the files lie that the evaluator is to read."""
        return self._folder, self._archive.folder

    def asked(self, node: NodeId) -> tuple[Digest, ...]:
        """What this member is to show now."""
        return tuple(
            ask.update
            for ask in self._audits.open
            if ask.node == node and ask.update not in self._gathered and not self.blobs.has(ask.update)
        )

    def certified(self, record: Record) -> None:
        """A record of the line, in order, before it is folded."""
        self._gathered |= {part.digest for part in record.parts}
        heard = {ask.node for ask, at in self._asked_ms.items() if self._heard_ms(ask.node) > at}
        answered = {ask.update for ask in self._audits.open if self._path(ask) is not None}
        self._audits, late = audits.expired(self._audits, record.round, heard, answered)
        self._audits, found = audits.certified(self._audits, record, self._rules)
        now_ms = self._now_ms()
        self._asked_ms = {ask: self._asked_ms.get(ask, now_ms) for ask in self._audits.open}
        self._tidy()
        self._tell((*late, *found))

    def keep(self, round_number: RoundNumber, params: Floats) -> None:
        """The replica's state before this round's record is folded: on disk from here on if an audit needs it."""
        path = self._state(round_number)
        if not path.exists() and any(round_number in (ask.round, ask.round + 1) for ask in self._audits.open):
            params.tofile(new := path.with_suffix(".new"))
            new.replace(path)

    def stir(self) -> None:
        """Something has come that an audit may have waited for."""
        self._stirred.set()

    def alarm(self) -> None:
        """The held-out loss has jumped."""
        self._audits = audits.alarmed(self._audits)

    def gone_back(self, to: RoundNumber) -> None:
        """The line has lost what came after: states and answers of it are of no use."""
        self._audits = audits.gone_back(self._audits, to)
        for path in self._folder.glob("state-*"):
            if path.name > self._state(to).name:
                path.unlink(missing_ok=True)
        self._tidy()

    async def run(self) -> None:
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while (ready := self._ready()) is not None:
                await self._measure(*ready)

    def _ready(self) -> tuple[Ask, Evaluator, Path] | None:
        evaluator = self._evaluator()
        if evaluator is None:
            return None
        for ask in self._audits.open:
            path = self._path(ask)
            states = (self._state(ask.round), self._state(RoundNumber(ask.round + 1)))
            if path is not None and all(state.exists() for state in states):
                return ask, evaluator, path
        return None

    async def _measure(self, ask: Ask, evaluator: Evaluator, update: Path) -> None:
        luck = self._luck.random
        with self._held(ask, update) as files:
            result = await self._result(evaluator, {**files, "data": self._data(ask, luck())})
        if result is None:
            self._audits = audits.dropped(self._audits, ask)
        else:
            self._audits, accusation = audits.measured(self._audits, ask, result, self._rules, luck())
            log.info("audited", round=ask.round, node=ask.node[:16], **_said(result))
            self._tell(() if accusation is None else (accusation,))
        self._tidy()

    @contextmanager
    def _held(self, ask: Ask, update: Path) -> Iterator[Mapping[str, str]]:
        """The files of this audit under names of their own: a rollback, or rounds that pass, may drop them meanwhile."""
        held = {name: self._folder / f"held-{name}" for name in ("state", "following", "update")}
        try:
            held["state"].hardlink_to(self._state(ask.round))
            held["following"].hardlink_to(self._state(RoundNumber(ask.round + 1)))
            shutil.copyfile(update, held["update"])  # a blob with a second name is taken for one that somebody planted
            yield {name: str(path) for name, path in held.items()}
        finally:
            for path in held.values():
                path.unlink(missing_ok=True)

    async def _result(self, evaluator: Evaluator, order: Mapping[str, Any]) -> Measured | Broken | None:
        order = {
            **order,
            "codec": self._codec.name,
            "token_bytes": self._manifest.token_bytes,
        }
        try:
            found = await evaluator.audit(order)
        except Refused as refused:
            if refused.reason is not Code.UPDATE_BAD:
                raise
            return Broken(refused.what)
        return None if found is None else Measured(**found)

    def _data(self, ask: Ask, luck: float) -> list[Any]:
        """Where the sequences lie that this contribution is measured on."""
        return [
            [str(self._archive.path(span.shard)), self._shards[span.shard].sequences, span.pass_number, positions]
            for span, positions in audits.sample(ask.ranges, SEQUENCES, luck)
        ]

    def _tell(self, accusations: tuple[Accusation, ...]) -> None:
        for accusation in accusations:
            log.warning("a member is accused", node=accusation.node[:16], why=accusation.reason)
            self._accuse(accusation)

    def _path(self, ask: Ask) -> Path | None:
        for store in (self._archive, self.blobs):
            if store.has(ask.update):
                return store.path(ask.update)
        return None

    def _state(self, round_number: RoundNumber) -> Path:
        return self._folder / f"state-{round_number:012d}"

    def _tidy(self) -> None:
        """Drop what no open audit needs."""
        asks = self._audits.open
        self._gathered &= {ask.update for ask in asks}
        for digest in set(self.blobs.digests()) - {ask.update for ask in asks}:
            self.blobs.delete(digest)
        needed = {self._state(RoundNumber(ask.round + more)) for ask in asks for more in (0, 1)}
        for path in self._folder.glob("state-*"):
            if path not in needed and path.suffix != ".new":
                path.unlink(missing_ok=True)


def _said(result: Measured | Broken) -> Mapping[str, Any]:
    if isinstance(result, Broken):
        return {"broken": result.what}
    return {"gain": round(result.gain, 1), "trace": round(result.trace, 1)}


def _zeros(codec: Codec, parameters: int) -> Digest:
    return digest_of(codec.encode(np.zeros(parameters, np.float32)))
