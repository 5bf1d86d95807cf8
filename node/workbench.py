"""The workbench: the shared state, the trainer at work on it, and what it made that no record has taken yet."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import structlog

from node import hardware, rehearsal
from node.brought import Brought
from node.config import Home, Settings
from node.core import rounds
from node.core.rounds import Phase, Rounds
from node.decider import Decider
from node.journal import Journal
from node.progress import Carry, Drop, Floats, Offer, Progress, ProgressFile, Settle, resume
from node.pseudograd import PseudoGradient
from node.replica import Replica
from node.training import STATE_BYTES, Trainer, TrainerSpec, Vectors
from node.training import Event as TrainerEvent
from protocol import sandbox
from protocol.blobs import BlobStore, digest_of
from protocol.errors import Code, Refused
from protocol.exchange import packing_of
from protocol.fold import outer_of
from protocol.runspec import RunSpec
from protocol.types import BaseCheckpoint, DataRange, Grant, LogEntry, Manifest, NodeId, SignedRollback

KEEP_SECONDS: Final = 1.0  # between two looks whether local progress is to be saved
HELD_BYTES: Final = 16  # for each parameter: the state, what the trainer shares, its snapshot, and the residual
HELPER_BYTES: Final = 8  # where nothing is trained: the state, and what folding takes
MOMENTUM_BYTES: Final = 4
TRAINER_BYTES_MIN: Final = 1 << 30  # torch and transformers by themselves reserve half of it
DEVICE_BYTES_MIN: Final = 1 << 30  # every device that torch knows holds so much: it is not asked then
NICENESS: Final = 5  # the owner's own programs come first; a coordinator's evaluator on the same machine, at 10, last

log = structlog.get_logger()


@dataclass(frozen=True)
class Folded:
    """What a record meant to this node."""

    mine: bool  # it took what we brought
    dropped: tuple[DataRange, ...]  # trained too long ago to be of use


class Workbench:
    """One thing at a time happens to the vectors: a snapshot, a fold with its merge, a save, a rewind.

    What the rounds machine must see before the next of them, it is told while the turn is still ours.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: RunSpec,
        me: NodeId,
        *,
        settings: Settings,
        journal: Journal,
        blobs: BlobStore,
        decider: Decider,
        grants_of: Callable[[tuple[DataRange, ...]], tuple[Grant, ...]],
        log_file: Callable[[str], IO[bytes]],
        on_event: Callable[[TrainerEvent], None],
    ) -> None:
        self.trainer: Trainer | None = None
        self._manifest = manifest
        self._spec = spec
        self._me = me
        self._settings = settings
        self._journal = journal
        self._decider = decider
        self._grants_of = grants_of
        self._log_file = log_file
        self._on_event = on_event
        self._scratch = Home(settings.home).scratch
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        outer, packing = outer_of(spec.update), packing_of(spec.update)
        held = _check_room(
            manifest.parameters,
            self._scratch,
            momentum=outer.keeps_momentum,
            cap=settings.max_memory_bytes,
            training=settings.training,
        )
        self._held = held
        self._memory_cap = None if settings.max_memory_bytes is None else settings.max_memory_bytes - held
        self._sandbox = sandbox.plan(
            settings.sandbox,
            sandbox.kernel(),
            read=[blobs.folder],
            write=[self._scratch],
            nice=NICENESS,
            memory_bytes=self._memory_cap,
        )
        self._vectors = Vectors.create(manifest.parameters, runtime_dir=self._scratch)
        self.replica = Replica(
            manifest,
            journal=journal,
            blobs=blobs,
            vectors=self._vectors,
            packing=packing,
            outer=outer,
        )
        self._gradient = PseudoGradient(
            self._vectors.shared,
            self._vectors.snapshot,
            packing.up,
            residual_decay=spec.update.residual_decay,
            stale_rounds=spec.update.stale_rounds,
        )
        self._progress = ProgressFile(
            journal.folder / "progress", manifest.parameters, room=blobs.has_room, now=time.monotonic()
        )
        self.brought = Brought(journal.folder / "brought")
        self._turn = asyncio.Lock()

    @property
    def payload(self) -> bytes:
        """What a round may take, encoded."""
        return self._gradient.payload

    @property
    def confinement(self) -> str:
        """What the trainer cannot do, for people."""
        return sandbox.NONE_TEXT if self._sandbox is None else self._sandbox.text

    def close(self) -> None:
        self._vectors.close()

    async def check_model(self) -> None:
        """Refuse, before a download, a model that this machine does not build or cannot hold; a helper builds none."""
        if not self._settings.training:
            return
        await rehearsal.check_model(self._manifest, log=self._log_file("trainer"), sandbox=self._sandbox)
        needed, device = self._manifest.parameters * STATE_BYTES, self._settings.device
        if needed > DEVICE_BYTES_MIN and device != "cpu":
            log, cap = self._log_file("trainer"), self._settings.max_vram_bytes
            device = await rehearsal.choose_device(device, needed, cap=cap, log=log, sandbox=self._sandbox)
        if device == "cpu":
            _check_training_room(needed, self._held, self._scratch, cap=self._memory_cap)

    # the shared state

    async def open_own(self) -> bool:
        """Start from this node's own checkpoint and log; false if they are of no use."""
        async with self._turn:
            return await asyncio.to_thread(self.replica.open_own)

    async def load(self, base: BaseCheckpoint, path: Path) -> None:
        """Start from a base checkpoint of the coordinator's, and go on with what is on disk here."""
        async with self._turn:
            await asyncio.to_thread(self.replica.load, base, path)
            await asyncio.to_thread(self.replica.replay)

    async def fold(self, entry: LogEntry) -> Folded:
        """Apply a certified record, and move the trainer with it without losing its newest steps."""
        record = entry.record
        async with self._turn:
            state = self._decider.rounds
            brought = state.contribution
            mine = brought is not None and rounds.holds(record, brought)
            taken = [part for part in record.parts if mine and self._me in part.included]
            missed = rounds.missed_after(state, record)
            held = [each for each in (brought, state.carried) if each is not None]
            stale = missed > self._decider.rules.stale_rounds
            pending = self._gradient.pending
            if self._settings.training:  # else both vectors stay without a page
                await asyncio.to_thread(self._gradient.before_fold)
            digest = await asyncio.to_thread(self.replica.fold, entry)
            if brought is not None and brought.tokens:  # in the record or not: it may be asked for
                await asyncio.to_thread(self.brought.keep, self._gradient.payload)
            if self._settings.training:
                await asyncio.to_thread(self._gradient.settle, taken, missed=missed)
            if self.trainer is not None:
                with suppress(Refused):
                    await self.trainer.merge(from_snapshot=pending)
            log.info(
                "round folded", round=record.round, members=len(record.contributions), state=digest[:12], mine=mine
            )
            self._decider.step(rounds.Folded(record.round, digest))
        return Folded(mine, tuple(span for each in held for span in each.ranges) if stale else ())

    async def rewind(self, signed: SignedRollback) -> bool:
        """Go back to what a rollback leaves; local work began from what is undone, and goes with it.

        False if this node has nothing so old."""
        await self.stop_trainer()
        async with self._turn:
            own = await asyncio.to_thread(self.replica.rewind, signed)
            if self._settings.training:
                self._gradient.forget()
            self._progress.forget()
        return own

    async def save_base(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self.replica.save_base)

    # the trainer

    async def start_trainer(self) -> bool:
        """On the shared state; false if there is one: after a rollback and a crash at once, two are on their way."""
        async with self._turn:
            if self.trainer is not None:
                return False
            self.trainer = await Trainer.start(
                self._trainer_spec(),
                vectors=self._vectors,
                scratch=self._scratch,
                sandbox=self._sandbox,
                log=self._log_file("trainer"),
                on_event=self._on_event,
            )
            self._gradient.trainer_restarted()
        started = self.trainer.started
        log.info("trainer ready", device=started.device, micro_batch=started.micro_batch, sandbox=self.confinement)
        return True

    async def stop_trainer(self) -> bool:
        """End it, and with it the local model; false if there was none."""
        trainer, self.trainer = self.trainer, None
        if trainer is None:
            return False
        await trainer.stop()
        return True

    async def release_trainer(self) -> bool:
        """End it and keep what it has made; false if that cannot be now: a round is about to take it."""
        async with self._turn:
            trainer = self.trainer
            if trainer is None or self._gradient.pending:
                return False
            if trainer.steps:
                if not _idle(self._decider.rounds):
                    return False
                with suppress(Refused):  # it has died
                    await self._save_progress(trainer)
            await self.stop_trainer()
            await self._take_up_lost()
            self._decider.post(rounds.Progressed(0))
        return True

    async def discard_trainer(self) -> bool:
        """The local model is past saving, and what was saved of it is not to be trusted; false if there was none."""
        if not await self.stop_trainer():
            return False
        async with self._turn:
            self._progress.forget()
        self._decider.post(rounds.Progressed(0))
        return True

    async def lost_trainer(self) -> None:
        """It has ended by itself: take up what was saved of its work. The rest is trained again."""
        self.trainer = None
        async with self._turn:
            if self.trainer is None:
                await self._take_up_lost()
                self._decider.post(rounds.Progressed(0))

    async def train(self, on: bool) -> None:
        if self.trainer is not None:
            with suppress(Refused):
                await (self.trainer.run() if on else self.trainer.pause())

    async def set_goal(self) -> None:
        """Have the trainer speak up when the round is over for it."""
        if self.trainer is not None:
            with suppress(Refused):
                number = self._decider.rounds.head.round
                share = self._spec.rate_share(number)
                await self.trainer.goal(self._decider.rules.inner_steps(number), rate_share=share)

    def _trainer_spec(self) -> TrainerSpec:
        manifest, settings = self._manifest, self._settings
        return TrainerSpec(
            model_config=manifest.model_config,
            parameters=manifest.parameters,
            layout=manifest.layout,
            vocabulary=manifest.vocabulary,
            context=manifest.context,
            token_bytes=manifest.token_bytes,
            train=self._spec.train.model_dump(mode="json"),
            seed=int.from_bytes(hashlib.sha256(self._me.encode()).digest()[:4], "little"),
            device=settings.device,
            threads=settings.threads or hardware.usable_threads(),
            batch_cap=settings.batch,
            memory_cap=self._memory_cap,
            vram_cap=settings.max_vram_bytes,
        )

    # what was trained

    async def take_snapshot(self) -> None:
        """Bring what was trained into u, and tell the round; a saved file never says less than a round has heard."""
        async with self._turn:
            if not self._decider.rounds.snapshot_asked:
                return  # a rollback came in between
            ranges: tuple[DataRange, ...] = ()
            try:
                if self.trainer is None:
                    raise Refused(Code.CHILD_DIED, "no trainer")
                await asyncio.to_thread(self._gradient.expect_snapshot)
                snapshot = await self.trainer.snapshot()
                await asyncio.to_thread(self._gradient.take_snapshot)
                ranges = snapshot.ranges
            except Refused as refused:  # the trainer is gone, and with it what was neither handed over nor saved
                log.warning("no snapshot", why=refused.what)
                await self._take_up_lost()
                await asyncio.to_thread(self._gradient.encode)
            await asyncio.to_thread(self._progress.forget)
            update = await asyncio.to_thread(digest_of, self._gradient.payload)
            self._decider.step(rounds.SnapshotTaken(ranges, self._grants_of(ranges), update))
            if self.trainer is not None and self.trainer.steps:  # made while that was written down
                self._decider.step(rounds.Progressed(self.trainer.steps))
            state = self._decider.rounds
            if state.contribution is not None and self._progress.due(time.monotonic(), offered=True):
                progress = Progress(state.head, state.branch, state.missed, state.contribution, offered=True)
                await asyncio.to_thread(self._progress.save, progress, self._gradient.residual)

    async def keep_progress(self) -> None:
        """Between rounds, now and then: what the trainer has made is on disk when this machine loses its power."""
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            if self._progress.due(time.monotonic(), offered=False):
                async with self._turn:
                    if self.trainer is not None and _idle(self._decider.rounds) and not self._gradient.pending:
                        with suppress(Refused):  # the trainer has died
                            await self._save_progress(self.trainer)

    async def _save_progress(self, trainer: Trainer) -> None:
        state = self._decider.rounds
        seen = await trainer.peek()
        grants = self._grants_of(seen.ranges)
        brings = rounds.combine(state.carried, seen.ranges, grants, state.consumed, self._decider.rules)
        missed = state.missed if state.carried is not None else 0  # fresh work begins to count anew
        progress = Progress(state.head, state.branch, missed, brings, offered=False)
        residual, vectors = self._gradient.residual, self._vectors
        save = self._progress.save
        await asyncio.to_thread(save, progress, residual, shared=vectors.shared, local=vectors.snapshot)

    async def take_up_saved(self) -> None:
        """At a start, when the log has been followed as far as it is known: go on with what an earlier life left."""
        async with self._turn:
            if (found := await asyncio.to_thread(self._progress.load)) is not None:
                await self._take_up(*found)

    async def _take_up_lost(self) -> None:
        """Of a trainer that is gone, what was saved since the last snapshot; what a round was offered is in u."""
        state = self._decider.rounds
        if state.contribution is None and (found := await asyncio.to_thread(self._progress.load)) is not None:
            progress, values = found
            if not progress.offered:
                await self._take_up(progress, values)

    async def _take_up(self, progress: Progress, values: Floats) -> None:
        state = self._decider.rounds
        use = resume(
            progress,
            state.consumed,
            self._journal.entry,
            head=state.head,
            branch=state.branch,
            stale_rounds=self._decider.rules.stale_rounds,
        )
        log.info("saved progress", tokens=progress.contribution.tokens, use=type(use).__name__)
        if isinstance(use, Drop):
            log.info("saved progress was dropped", why=use.why)
            self._progress.forget()
            return
        await asyncio.to_thread(self._restore, use, values)
        if (self._decider.rounds.head, self._decider.rounds.branch) != (state.head, state.branch):
            log.info("saved progress was dropped", why="the log has turned")
            self._gradient.forget()
            self._progress.forget()
            return
        match use:
            case Offer(contribution, missed):
                self._decider.step(rounds.WorkFound(missed, contribution=contribution))
            case Carry(contribution, missed):
                self._decider.step(rounds.WorkFound(missed, carried=contribution))
            case Settle(_, missed):
                self._decider.step(rounds.WorkFound(missed))

    def _restore(self, use: Offer | Carry | Settle, values: Floats) -> None:
        """u, as it would be if this process had been there all the time."""
        self._gradient.load(values)
        match use:
            case Offer():
                self._gradient.encode()
            case Carry(_, missed, missed_away):
                self._miss(missed - missed_away, missed)
            case Settle(entry, missed):
                self._gradient.encode()
                self._gradient.settle([part for part in entry.record.parts if self._me in part.included])
                self._miss(0, missed)

    def _miss(self, before: int, until: int) -> None:
        for number in range(before + 1, until + 1):
            self._gradient.settle((), missed=number)


def _idle(state: Rounds) -> bool:
    """No round has heard of what the trainer makes now, nor is about to."""
    return state.phase is Phase.TRAINING and state.contribution is None and not state.snapshot_asked


def _check_room(parameters: int, folder: Path, *, momentum: bool, cap: int | None, training: bool) -> int:
    """Before anything of the run's size is allocated: the bytes that will be, beside training."""
    needed = parameters * ((HELD_BYTES if training else HELPER_BYTES) + MOMENTUM_BYTES * momentum)
    free = hardware.measure(folder).memory_available_bytes
    if needed > free:
        what = f"a model of {parameters:,} parameters takes a node {needed:,} bytes beside training, {free:,} are free"
        raise Refused(Code.MODEL_TOO_LARGE, what)
    trainer = TRAINER_BYTES_MIN if training else 0
    if cap is not None and cap < needed + trainer:
        what = f"{needed:,} bytes beside training and {trainer:,} for it pass max_memory, {cap:,}"
        raise Refused(Code.MODEL_TOO_LARGE, what, fix="Raise max_memory, or choose a run with a smaller model.")
    return needed


def _check_training_room(needed: int, held: int, folder: Path, *, cap: int | None) -> None:
    """As the trainer itself, that finds `held` taken; `cap` is what its owner gives of the rest."""
    free = max(0, hardware.measure(folder).memory_available_bytes - held)
    room = free if cap is None else min(free, cap)
    if needed > room:
        what = f"training needs {needed:,} bytes of memory beside {held:,} of the node's, {room:,} are free for it"
        raise Refused(Code.MODEL_TOO_LARGE, what)
