"""The auditor: asks members for what they signed, reads it or has the evaluator measure it. What follows core decides.

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
from typing import Any

import numpy as np
import structlog

from coordinator.core import audits
from coordinator.core.audits import Accusation, Ask, Audits, Broken, Measured, Rules
from coordinator.evaluation import Evaluator
from protocol.blobs import BlobStore, digest_of
from protocol.codec import Codec, Floats
from protocol.contribution import Complaint
from protocol.errors import Code, Refused
from protocol.types import DataRange, Digest, Manifest, NodeId, Record, RoundNumber, Shard

log = structlog.get_logger()


class Auditor:
    """`run` measures and `read` reads, for ever; the rest is told to it by the coordinator's loop. Whoever makes one must
    `close` it."""

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
        nothing = _zeros(codec, manifest.parameters) if share else Digest("")
        self._rules = Rules(share, nothing, traced=not codec.sparse)
        self._audits = Audits()
        self._gathered: frozenset[Digest] = frozenset()  # parts of records: they come without being asked for
        self._luck = random.SystemRandom()  # nobody can know beforehand whom it chooses
        self._stirred = asyncio.Event()
        self._shown = asyncio.Event()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the files lie that the evaluator is to read."""
        return self._folder, self._archive.folder

    def asked(self, node: NodeId) -> tuple[Digest, ...]:
        """What this member is to show now."""
        asks = (ask for ask in self._audits.open if ask.node == node and ask.update not in self._gathered)
        return tuple(dict.fromkeys(ask.update for ask in asks if self._store(ask) is None))

    def certified(self, record: Record) -> None:
        """A record of the line, in order, before it is folded."""
        self._gathered |= {part.digest for part in record.parts}
        heard = self._audits.heard(self._heard_ms)
        answered = {ask for ask in self._audits.open if self._store(ask) is not None}
        self._audits, late = audits.expired(self._audits, record.round, heard, answered)
        self._audits, found = audits.certified(self._audits, record, self._rules)
        self._audits = self._audits.told(self._now_ms())
        self._tidy()
        self._tell((*late, *found))

    def complained(self, complaint: Complaint, accuser: NodeId, members: frozenset[NodeId]) -> None:
        """A member could not use what another sent; whoever calls this has checked that it may say so."""
        self._audits = audits.complained(self._audits, complaint, accuser, members).told(self._now_ms())
        self.stir()  # it may be here already

    def keep(self, round_number: RoundNumber, params: Floats) -> None:
        """The replica's state before this round's record is folded: on disk from here on if an audit needs it."""
        path = self._state(round_number)
        if not path.exists() and path in self._states_needed():
            params.tofile(new := path.with_suffix(".new"))
            new.replace(path)

    def stir(self) -> None:
        """Something has come that an audit may have waited for."""
        self._stirred.set()
        self._shown.set()

    def alarm(self) -> None:
        """The held-out loss has jumped."""
        self._audits = audits.alarmed(self._audits)

    def gone_back(self, to: RoundNumber) -> None:
        """The line has lost what came after: states and answers of it are of no use."""
        self._audits = self._audits.gone_back(to)
        for path in self._folder.glob("state-*"):
            if path.name > self._state(to).name:
                path.unlink(missing_ok=True)
        self._tidy()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    async def run(self) -> None:
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while (ready := self._ready()) is not None:
                await self._measure(*ready)

    async def read(self) -> None:
        """What was complained about: it waits for no evaluator."""
        while True:
            await self._shown.wait()
            self._shown.clear()
            while (found := self._to_read()) is not None:
                await self._read(*found)

    def _to_read(self) -> tuple[Ask, BlobStore] | None:
        shown = ((ask, self._store(ask)) for ask in self._audits.open if ask.accuser is not None)
        return next(((ask, store) for ask, store in shown if store is not None), None)

    async def _read(self, ask: Ask, store: BlobStore) -> None:
        try:
            broken = await asyncio.to_thread(self._broken, store, ask.update)
        except Refused as refused:  # it has rotted here
            log.warning("what was complained about is lost", round=ask.round, why=refused.what)
            self._audits = self._audits.dropped(ask)
        else:
            self._audits, accusation = audits.read(self._audits, ask, broken)
            what = None if broken is None else broken.what
            log.info("read", round=ask.round, node=ask.node[:16], accuser=(ask.accuser or "")[:16], broken=what)
            self._tell(() if accusation is None else (accusation,))
        self._tidy()

    def _broken(self, store: BlobStore, update: Digest) -> Broken | None:
        """What is wrong with it; it may be anything that its author has found in the archive."""
        if (size := store.size(update)) != self.size:
            return Broken(f"{size} bytes, a contribution has {self.size}")
        data = store.read(update)
        try:
            self._codec.check(data, self._manifest.parameters)
        except Refused as refused:
            return Broken(refused.what)
        return None

    def _ready(self) -> tuple[Ask, Evaluator, Path] | None:
        evaluator = self._evaluator()
        if evaluator is None:
            return None
        for ask in self._audits.open:
            if ask.accuser is not None or (store := self._store(ask)) is None:
                continue
            states = (self._state(ask.round), self._state(RoundNumber(ask.round + 1)))
            if all(state.exists() for state in states):
                return ask, evaluator, store.path(ask.update)
        return None

    async def _measure(self, ask: Ask, evaluator: Evaluator, update: Path) -> None:
        luck = self._luck.random
        with self._held(ask, update) as files:
            data = {"data": self._data(ask.ranges, luck()), "elsewhere": self._data(ask.elsewhere, luck())}
            result = await self._result(evaluator, {**files, **data})
        if result is None:
            self._audits = self._audits.dropped(ask)
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

    def _data(self, ranges: tuple[DataRange, ...], luck: float) -> list[Any]:
        """Where the sequences lie that a contribution is measured on."""
        return [
            [str(self._archive.path(span.shard)), self._shards[span.shard].sequences, span.pass_number, positions]
            for span, positions in audits.sample(ranges, luck)
        ]

    def _tell(self, accusations: tuple[Accusation, ...]) -> None:
        for accusation in accusations:
            log.warning("a member is accused", node=accusation.node[:16], why=accusation.reason)
            self._accuse(accusation)

    def _store(self, ask: Ask) -> BlobStore | None:
        """Where it is; none before it is shown."""
        return next((store for store in (self._archive, self.blobs) if store.has(ask.update)), None)

    def _state(self, round_number: RoundNumber) -> Path:
        return self._folder / f"state-{round_number:012d}"

    def _states_needed(self) -> set[Path]:
        measured = (ask for ask in self._audits.open if ask.accuser is None)
        return {self._state(RoundNumber(ask.round + more)) for ask in measured for more in (0, 1)}

    def _tidy(self) -> None:
        """Drop what no open audit needs."""
        updates = {ask.update for ask in self._audits.open}
        self._gathered &= updates
        self.blobs.keep_only(updates)
        needed = self._states_needed()
        for path in self._folder.glob("state-*"):
            if path not in needed and path.suffix != ".new":
                path.unlink(missing_ok=True)


def _said(result: Measured | Broken) -> Mapping[str, Any]:
    if isinstance(result, Broken):
        return {"broken": result.what}
    return {"gain": round(result.gain, 1), "trace": round(result.trace, 1)}


def _zeros(codec: Codec, parameters: int) -> Digest:
    return digest_of(codec.encode(np.zeros(parameters, np.float32)))
