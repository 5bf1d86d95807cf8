"""The daemon's loop: events in, decisions by the pure machines, effects out. It owns every process and task."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import IO, Any

import structlog

from node import letters
from node.config import Home, Settings, Stopper
from node.control import Control
from node.core import rounds, session
from node.core.backoff import wait_seconds
from node.core.rounds import Rounds
from node.courier import LOG_PAGE, Courier
from node.engine import Engine
from node.hardware import usable_threads
from node.journal import Journal, Promise
from node.link import Beat, Door, Link, News, Page
from node.membership import Membership
from node.progress import Carry, Drop, Offer, Progress, ProgressFile, Settle, resume
from node.pseudograd import PseudoGradient
from node.replica import Replica
from node.status import Tally, view
from node.training import Event as TrainerEvent
from node.training import Exited, Failed, OutOfData, Skipped, Stepped, Trainer, TrainerSpec, Vectors
from protocol import invite as invites
from protocol import p2pd
from protocol.blobs import BlobStore
from protocol.codec import codec
from protocol.console import printable
from protocol.errors import Code, Exit, Refused
from protocol.fold import outer_of
from protocol.identity import Key, libp2p_private_key_bytes, verify
from protocol.invite import Invite
from protocol.limits import BLOB_BYTES_MAX
from protocol.log import VOTE, is_certified, vote_bytes
from protocol.messages import Begin, LogReply, LogRequest, Message
from protocol.runspec import RunSpec
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    DataRange,
    Digest,
    Epoch,
    Lease,
    LogEntry,
    NodeId,
    Part,
    PeerId,
    Roster,
    Seal,
    Shard,
    SignedRollback,
    SignedRoster,
    VoteBody,
)

IDENTITY = "p2p.identity"
TICK_SECONDS = 0.2
STATUS_SECONDS = 0.5
KEEP_SECONDS = 1.0  # between two looks whether local progress is to be saved
ROUNDS_AHEAD = 8  # data kept in hand, in rounds: a coordinator's outage is not felt for so long
STUCK_SECONDS = 30.0  # without a record folded: the page that was read may be of a branch that is no more
LEAVE_SECONDS = 2.0  # for the coordinator to hear that we go
POLITE_SECONDS = 7.0  # Ctrl-C waits so long for the round to end; leaving takes the rest of ten seconds

log = structlog.get_logger()


async def run(
    settings: Settings,
    invite: Invite | None,
    *,
    stopper: Stopper,
    on_status: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Be a node until the run ends, the volunteer stops it, or it cannot go on. Returns the exit code."""
    async with AsyncExitStack() as owned:
        daemon = await Daemon.open(settings, invite, owned, on_status)
        return await daemon.run(stopper)


class Daemon:
    """One node. Everything that decides is in node.core; this carries it out."""

    def __init__(
        self, settings: Settings, key: Key, link: Link, membership: Membership, owned: AsyncExitStack, on_status: Any
    ) -> None:
        self._settings = settings
        self._key = key
        self._me = key.public
        self._link = link
        self._membership = membership
        self._owned = owned
        self._on_status = on_status
        self._manifest = membership.opened.manifest.manifest
        self._spec = RunSpec.from_json(self._manifest.spec)
        self._codec = codec(self._spec.update.codec)
        self._home = Home(settings.home)
        self._blobs = BlobStore(self._home.blobs, settings.max_disk_bytes or BLOB_BYTES_MAX)
        self._journal = Journal(self._home.journal / self._manifest.name)
        self._shards: dict[Digest, Shard] = {shard.digest: shard for shard in membership.opened.shards}
        self._vectors = Vectors.create(self._manifest.parameters, runtime_dir=self._home.runtime)
        self._replica = Replica(
            self._manifest,
            journal=self._journal,
            blobs=self._blobs,
            vectors=self._vectors,
            codec=self._codec,
            outer=outer_of(self._spec.update),
        )
        self._gradient = PseudoGradient(
            self._vectors.shared,
            self._vectors.snapshot,
            self._codec,
            residual_decay=self._spec.update.residual_decay,
            stale_rounds=self._spec.update.stale_rounds,
        )
        self._progress = ProgressFile(
            self._journal.folder / "progress",
            self._manifest.parameters,
            room=self._blobs.has_room,
            now=time.monotonic(),
        )
        self._rules = self._make_rules()
        self._session = session.Session()
        self._rounds: Rounds | None = None
        self._store_turn = asyncio.Lock()  # one writer of blobs at a time; a home line is one line
        self._courier = Courier(
            self._manifest,
            self._me,
            codec=self._codec,
            journal=self._journal,
            blobs=self._blobs,
            store_turn=self._store_turn,
            make_room=self._forget_shards,
            link=link,
            rosters=lambda: self._rounds.rosters if self._rounds is not None else {},
            rollbacks=lambda: self._rounds.rollbacks if self._rounds is not None else (),
        )
        self._engine: Engine | None = None
        self._trainer: Trainer | None = None
        self._data_turn = asyncio.Lock()  # a lease reaches the trainer once
        self._vector_turn = asyncio.Lock()  # snapshot, fold and merge, one at a time
        self._inbox: asyncio.Queue[rounds.Event | session.Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[tuple[Exit, str]] = asyncio.get_running_loop().create_future()
        self._leases: dict[str, Lease] = {lease.lease_id: lease for lease in membership.leases}
        self._changed = asyncio.Event()  # another activity than the last heartbeat said
        self._wanted_before: frozenset[str] = frozenset()
        self._known_round = 0
        self._tally = Tally()

    # opening

    @classmethod
    async def open(cls, settings: Settings, invite: Invite | None, owned: AsyncExitStack, on_status: Any) -> Daemon:
        """Keys, admission, and the limits; nothing is downloaded before the run is known to fit them."""
        home = Home(settings.home)
        if invite is None:
            text = home.remembered()
            if text is None:
                raise Refused(Code.NOT_ADMITTED, f"{home.path} has not joined a run")
            invite = invites.decode(text)
        key = Key.load_or_create(home.key)
        transport = Key.load_or_create(home.transport_key)
        p2pd.write_identity(home.runtime / IDENTITY, libp2p_private_key_bytes(transport))
        link = Link(Door.of(invite), key=key, transport_key=transport)
        owned.push_async_callback(link.close)
        membership = Membership(key.public, link, invite, settings.name or "", home.journal / invite.name)
        await membership.begin(known=home.remembered() is not None)
        home.remember(invites.encode(invite))
        daemon = cls(settings, key, link, membership, owned, on_status)
        owned.callback(daemon._vectors.close)
        owned.push_async_callback(daemon._close_children)
        return daemon

    def _make_rules(self) -> rounds.Rules:
        return rounds.Rules(
            me=self._me,
            run=self._manifest.run,
            parameters=self._manifest.parameters,
            context=self._manifest.context,
            inner_steps=self._spec.rounds.steps,
            round_seconds_max=self._spec.rounds.seconds_max,
            gather_seconds=self._spec.rounds.gather_seconds,
            attempt_seconds_min=min(5.0, self._spec.rounds.deadline_seconds),
            attempt_seconds_max=self._spec.rounds.deadline_seconds,
            stale_rounds=self._spec.update.stale_rounds,
            sign=lambda body: self._key.sign(VOTE, vote_bytes(body)),
            vote_is_valid=_vote_is_valid,
            entry_is_certified=is_certified,
        )

    # the loop

    async def run(self, stopper: Stopper) -> int:
        control = Control(self._home.control, self._answer)
        await control.start()
        self._owned.push_async_callback(control.close)
        self._spawn(self._prepare())
        self._spawn(self._tick())
        self._spawn(self._stop_when_asked(stopper))
        if self._on_status is not None:
            self._spawn(self._report())
        self._spawn(self._decide())  # a task that fails ends the daemon: see _settled
        why = "a failure"
        try:
            code, why = await self._ended
        finally:
            log.info("stopping", why=why)
            if self._on_status is not None:
                self._on_status(self.status() | {"activity": "stopped", "reason": why})
            await self._stop_tasks()
            with suppress(Refused, TimeoutError):
                await asyncio.wait_for(self._link.leave(why, self._seal()), LEAVE_SECONDS)
                self._membership.keep(())
        return int(code.value)

    def _seal(self) -> Seal | None:
        """Our last promise, durable before anybody hears of it. Nothing of ours signs any more."""
        sealed = rounds.seal(self._rounds) if self._rounds is not None else None
        if sealed is None:
            return None
        seal, vote = sealed
        self._carry_out_round(vote)
        return seal

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, Refused):
            log.error("a task failed", error=repr(error), exc_info=error)
        if not self._ended.done():
            self._ended.set_exception(error)

    def _end(self, code: Exit, why: str) -> None:
        if not self._ended.done():
            self._ended.set_result((code, why))

    async def _decide(self) -> None:
        """One event at a time; effects are carried out in order before the next event is looked at."""
        while True:
            event = await self._inbox.get()
            if isinstance(event, session.Event):
                await self._decide_session(event)
            else:
                self._step_rounds(event)

    async def _decide_session(self, event: session.Event) -> None:
        if isinstance(event, session.PartDied):
            log.warning("a child process ended", part=event.part.value, why=event.why)
        before = session.activity(self._session)
        before_rounds = self._session.votes, self._session.trains
        self._session, effects = session.step(self._session, event, time.monotonic())
        if session.activity(self._session) is not before:
            log.info(session.activity(self._session).value, why=session.reason(self._session, time.monotonic()))
            self._changed.set()
        for effect in effects:
            await self._carry_out_session(effect)
        rounds_now = self._session.votes, self._session.trains
        if rounds_now != before_rounds:
            self._post(rounds.ActivityChanged(*rounds_now))

    async def _carry_out_session(self, effect: session.Effect) -> None:
        match effect:
            case session.SetTraining(on):
                self._spawn(self._set_training(on))
            case session.AcquireLeases(sequences):
                self._spawn(self._acquire_leases(sequences))
            case session.Restart(part):
                self._spawn(self._start_trainer() if part is session.Part.TRAINER else self._start_engine())
            case session.End(failed):
                if failed and not self._ended.done():
                    self._ended.set_exception(Refused(Code.CHILD_DIED, failed))
                self._end(Exit.OK, "finished")

    def _step_rounds(self, event: rounds.Event) -> None:
        if self._rounds is None:
            return
        phase = self._rounds.phase
        failure = self._rounds.last_failure
        self._rounds, effects = rounds.step(self._rounds, event, time.monotonic(), self._rules)
        if self._rounds.phase is not phase:
            log.debug(
                "round", round=self._rounds.head.round, phase=self._rounds.phase.value, ballot=self._rounds.ballot
            )
        if self._rounds.last_failure != failure:
            log.warning("attempt failed", round=self._rounds.head.round, why=self._rounds.last_failure)
        for effect in effects:
            self._carry_out_round(effect)

    def _carry_out_round(self, effect: rounds.Effect) -> None:
        match effect:
            case rounds.TakeSnapshot():
                self._spawn(self._take_snapshot())
            case rounds.SaveVote(round_number, ballot, accepted, previous):
                self._journal.save_promise(Promise(round_number, ballot, accepted, previous))
            case rounds.Send(to, message):
                self._send(to, message)
            case rounds.Average(begin, roster, seconds):
                self._spawn(self._average(begin, roster, seconds))
            case rounds.StopAveraging():
                self._spawn(self._courier.stop_averaging())
            case rounds.FetchParts(parts, sources):
                self._spawn(self._fetch_parts(parts, sources))
            case rounds.Fold(entry):
                self._spawn(self._fold(entry))
            case rounds.Turn(rollback):
                self._replica.turn(rollback)
                self._tell_of(rollback)
            case rounds.Rewind(rollback):
                self._spawn(self._rewind(rollback))
            case rounds.TellLog(to, round_number):
                self._send((to,), self._courier.log_reply(LogRequest(self._manifest.run, round_number, self._me)))

    def _post(self, event: rounds.Event | session.Event) -> None:
        self._inbox.put_nowait(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._post(session.TimePassed())
            self._post(rounds.Ticked())

    async def _stop_when_asked(self, stopper: Stopper) -> None:
        await stopper.polite.wait()
        self._post(session.FinishAsked())
        self._post(rounds.Finishing())
        pending = self._rounds is not None and self._rounds.pending and self._session.votes
        with suppress(TimeoutError):
            await asyncio.wait_for(stopper.now.wait(), POLITE_SECONDS if pending else 0.1)
        self._end(Exit.INTERRUPTED, "stopped by you")

    # getting ready

    async def _prepare(self) -> None:
        """Load or download the state, then start what needs it."""
        opened, online = self._membership.opened, self._membership.online
        self._save_rollbacks(opened.rollbacks, known=self._journal.rollbacks())
        self._silence(opened.silent_epoch)
        own = await asyncio.to_thread(self._replica.open_own, self._journal.folder)
        if not own or (online and self._whole_model_is_less(opened.base)):
            await self._retrying(lambda: self._load_base(opened.base))
        assert self._replica.head is not None
        head = self._replica.head
        promise = self._journal.promise(head)
        self._rounds = Rounds(
            head=head,
            digest=self._replica.digest,
            consumed=self._replica.state.consumed,
            rosters=self._journal.rosters(),
            branch=self._replica.branch,
            rollbacks=self._journal.rollbacks(),
            silent=self._journal.silence(),
            last=self._replica.last,
            ballot=self._promised(promise, lift=online),
            accepted=promise.accepted if promise else None,
        )
        await asyncio.to_thread(self._resume_progress)
        if opened.roster is not None:
            self._learn_roster(opened.roster)
        log.info("state loaded", round=head.round, state=self._replica.digest[:12], online=online)
        self._post(session.LinkOpened() if online else session.LinkLost("it did not answer at the start"))
        self._spawn(self._start_engine())
        if online:
            await self._retrying(self._catch_up)
        self._post(session.DataUsed(0, self._sequences_wanted()))
        self._post(session.CaughtUp())
        self._spawn(self._start_trainer())
        self._spawn(self._heartbeat())
        self._spawn(self._keep_progress())

    def _promised(self, promise: Promise | None, *, lift: bool) -> Ballot:
        """Only the coordinator can lift a seal: others may rely on it."""
        if promise is None:
            return Ballot(Epoch(-1), 0)
        return rounds.lifted(promise.ballot) if lift else promise.ballot

    def _silence(self, epoch: Epoch | None) -> None:
        """Sign nothing under the rosters up to this one from here on, and remember it."""
        if epoch is None or epoch <= self._journal.silence():
            return
        log.warning("this folder is an older copy of itself: it signs nothing under older rosters", epoch=epoch)
        self._journal.save_silence(epoch)
        self._step_rounds(rounds.Silenced(epoch))

    def _whole_model_is_less(self, base: BaseCheckpoint) -> bool:
        """Whether this base checkpoint is less to download than the updates that lead to it from what is here."""
        assert self._replica.head is not None
        missed = base.round - self._replica.head.round
        return missed * self._codec.encoded_bytes(self._manifest.parameters) > base.blob.size

    async def _load_base(self, base: BaseCheckpoint) -> None:
        """Start from a base checkpoint of the coordinator's, and go on with what is on disk here."""
        await self._fetch_blob(base.blob.digest, base.blob.size, "the model")
        async with self._vector_turn:
            await asyncio.to_thread(self._replica.load, base, self._blobs.path(base.blob.digest))
            await asyncio.to_thread(self._replica.replay)

    async def _catch_up(self) -> None:
        """Read the coordinator's log up to its head, and wait until it is folded."""
        while True:
            assert self._rounds is not None
            start = self._rounds.head.round
            page = await self._read_log(start)
            if not page.entries:
                return
            until = page.entries[-1].record.round + 1
            asked = time.monotonic()
            while start <= self._rounds.head.round < until and time.monotonic() - asked < STUCK_SECONDS:
                await asyncio.sleep(0.05)
                self._tally.download = {"what": "rounds", "done": self._rounds.head.round, "size": until}
            self._tally.download = None

    async def _read_log(self, start: int) -> Page:
        """A page of the coordinator's log, with what it takes to follow it: on disk before anything is signed by it."""
        page = await self._link.read_log(start)
        for signed in page.rosters:
            self._learn_roster(signed)
        self._learn_rollbacks(page.rollbacks)
        if page.entries:
            self._post(rounds.LogArrived(page.entries, page.rosters))
        return page

    async def _retrying(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        failures = 0
        while True:
            try:
                return await work()
            except Refused as refused:
                if refused.reason is not Code.UNREACHABLE:
                    raise
                self._post(session.LinkLost(refused.what))
                await asyncio.sleep(wait_seconds(failures=failures, luck=random.random()))  # noqa: S311  # only spreads the load
                failures += 1

    async def _fetch_blob(self, digest: Digest, size: int, what: str) -> None:
        if self._blobs.has(digest):
            return

        def progress(done: int, size: int) -> None:
            self._tally.download = {"what": what, "done": done, "size": size}

        try:
            async with self._store_turn:
                await self._link.fetch_blob(BlobRef(digest, size), self._blobs, progress)
        finally:
            self._tally.download = None

    def _log_file(self, name: str) -> IO[bytes]:
        """Where a child's output goes; closed with the daemon."""
        return self._owned.enter_context(self._settings.log_file(name))

    async def _start_engine(self) -> None:
        try:
            engine = await Engine.start(
                runtime_dir=self._home.runtime,
                identity_path=self._home.runtime / IDENTITY,
                run=self._manifest.run,
                listen=self._settings.listen_multiaddrs,
                rendezvous=self._membership.opened.rendezvous,
                codec=self._spec.update.codec,
                parameters=self._manifest.parameters,
                blob_dir=self._blobs.folder,
                on_message=self._hear,
                log=self._log_file("engine"),
            )
        except Refused as refused:
            self._post(session.PartDied(session.Part.ENGINE, refused.what))
            return
        self._engine = self._courier.engine = engine
        await self._tell_engine()
        self._post(session.PartReady(session.Part.ENGINE))
        code = await engine.closed
        self._engine = self._courier.engine = None
        self._post(session.PartDied(session.Part.ENGINE, f"exit code {code}"))

    async def _tell_engine(self) -> None:
        """Give the engine the members that it may answer and reach: those of every roster still in use."""
        if self._engine is None or self._rounds is None or not self._rounds.rosters:
            return
        newest = max(self._rounds.rosters)
        in_use = {newest, self._rounds.ballot.epoch}
        peers: dict[PeerId, tuple[str, ...]] = {}
        for epoch in sorted(in_use):
            if epoch in self._rounds.rosters:
                for member in self._rounds.rosters[epoch].roster.members:
                    if member.node != self._me:
                        peers[member.peer] = member.addresses
        with suppress(Refused):
            await self._engine.set_roster(peers)

    async def _start_trainer(self) -> None:
        train = self._spec.train.model_dump(mode="json")
        spec = TrainerSpec(
            model_config=self._manifest.model_config,
            parameters=self._manifest.parameters,
            layout=self._manifest.layout,
            vocabulary=self._manifest.vocabulary,
            context=self._manifest.context,
            token_bytes=self._manifest.token_bytes,
            train=train,
            seed=int.from_bytes(hashlib.sha256(self._me.encode()).digest()[:4], "little"),
            device=self._settings.device,
            threads=self._settings.threads or usable_threads(),
            batch_cap=self._settings.batch,
        )
        try:
            async with self._vector_turn:
                if self._trainer is not None:
                    return  # after a rollback and a crash at the same time, two of us are on their way
                self._trainer = await Trainer.start(
                    spec,
                    vectors=self._vectors,
                    scratch=self._home.runtime,
                    log=self._log_file("trainer"),
                    on_event=self._trained,
                )
                self._gradient.trainer_restarted()
        except Refused as refused:
            if refused.reason is Code.CHILD_DIED:
                self._post(session.PartDied(session.Part.TRAINER, refused.what))
                return
            raise
        log.info("trainer ready", device=self._trainer.started.device, micro_batch=self._trainer.started.micro_batch)
        await self._set_goal()
        await self._refill()
        self._post(session.PartReady(session.Part.TRAINER))

    async def _refill(self) -> None:
        """Give a new trainer what is leased and neither in a record nor on its way to one."""
        assert self._rounds is not None
        state, pieces = self._rounds, []
        waiting = [c for c in (state.contribution, state.carried) if c is not None]
        used = state.consumed.with_ranges(each for contribution in waiting for each in contribution.ranges)
        async with self._data_turn:
            for lease in self._leases.values():
                shard = self._shards[lease.range.shard]
                if self._blobs.has(shard.digest):
                    path = self._blobs.path(shard.digest)
                    pieces += [(rest, path) for rest in rounds.unused((lease.range,), used)]
            left = sum(each.stop - each.start for each, _ in pieces)
            if self._trainer is not None and pieces:
                with suppress(Refused):
                    await self._trainer.add_data(pieces)
                    self._post(session.DataUsed(left, self._sequences_wanted()))

    async def _train_again(self, dropped: list[DataRange]) -> None:
        """What was trained too long ago to be of use is data like any other, where it is still ours."""
        leased = [lease.range for lease in self._leases.values()]
        again = rounds.unused(tuple(dropped), self._replica.state.consumed)
        shared = [common for each in again for lease in leased if (common := each.common(lease)) is not None]
        if shared and self._trainer is not None:
            log.info("work that no round took is done again", sequences=sum(each.stop - each.start for each in shared))
            with suppress(Refused):
                await self._trainer.add_data([(each, self._blobs.path(each.shard)) for each in shared])

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _close_children(self) -> None:
        await self._stop_tasks()
        ending: list[Coroutine[Any, Any, None]] = []
        if self._trainer is not None:
            ending.append(self._trainer.stop())
        if self._engine is not None:
            ending.append(self._engine.stop())
        await asyncio.gather(*ending, return_exceptions=True)
        p2pd.sweep(self._home.runtime)
        (self._home.runtime / IDENTITY).unlink(missing_ok=True)

    # training

    def _trained(self, event: TrainerEvent) -> None:
        match event:
            case Stepped():
                self._tally.trained(event)
                self._post(rounds.Progressed(event.steps))
                self._post(session.DataUsed(event.queued_sequences, self._sequences_wanted()))
            case OutOfData():
                self._post(session.DataUsed(0, self._sequences_wanted()))
            case Skipped(_, what):
                log.warning("a step was left out", why=what)
            case Failed(reason, what, shard):
                log.error("training failed", code=reason.code, why=what)
                self._tally.notice = f"{reason.code}: {what}"
                self._spawn(self._set_training(True) if shard is not None else self._replace_trainer(what))
            case Exited(returncode):
                self._trainer = None
                self._post(session.PartDied(session.Part.TRAINER, f"exit code {returncode}"))

    async def _replace_trainer(self, why: str) -> None:
        """The local model is past saving: a new trainer starts from the shared state."""
        if await self._stop_trainer():
            self._post(session.PartDied(session.Part.TRAINER, why))

    async def _stop_trainer(self) -> bool:
        """End it, and with it the local model; false if there was none."""
        trainer, self._trainer = self._trainer, None
        if trainer is None:
            return False
        await trainer.stop()
        return True

    def _sequences_wanted(self) -> int:
        """Data to have in hand at least; twice of it is asked for. It lasts through an outage of the coordinator.

        Never so much that the others would lack it."""
        assert self._rounds is not None
        some_rounds = ROUNDS_AHEAD * self._spec.rounds.steps(self._rounds.head.round) * self._spec.train.batch_sequences
        stepped, roster = self._tally.stepped, self._rounds.roster
        speed = stepped.tokens_per_second / self._manifest.context if stepped else 0.0
        share = sum(shard.sequences for shard in self._shards.values()) // (2 * len(roster.members) if roster else 2)
        outage = min(speed * self._spec.leases.hours_ahead * 3600, share)
        return max(some_rounds, int(outage) // 2)

    async def _set_training(self, on: bool) -> None:
        if self._trainer is None:
            return
        with suppress(Refused):
            await (self._trainer.run() if on else self._trainer.pause())
        if on:
            self._post(session.DataUsed(self._session.sequences_left, self._sequences_wanted()))

    async def _set_goal(self) -> None:
        if self._trainer is not None and self._rounds is not None:
            with suppress(Refused):
                await self._trainer.goal(self._spec.rounds.steps(self._rounds.head.round))

    async def _acquire_leases(self, sequences: int) -> None:
        """Get data: leases from the coordinator, their shards from wherever they are, into the trainer's queue."""
        granted = 0
        try:
            leases = await self._link.acquire_leases(sequences)
            for lease in leases:
                shard = self._shards[lease.range.shard]
                await self._fetch_blob(shard.digest, shard.size, "data")
                async with self._data_turn:
                    self._leases[lease.lease_id] = lease
                    self._membership.keep(self._leases.values())
                    if self._trainer is not None:  # else the next one gets it
                        await self._trainer.add_data([(lease.range, self._blobs.path(shard.digest))])
                granted += lease.range.stop - lease.range.start
        except Refused as refused:
            log.warning("no data", why=refused.what)
            if refused.reason.exit is Exit.RESOURCE:
                self._tally.notice = f"{refused.reason.code}: {refused.what}"
                self._forget_shards()
        self._post(session.LeasesArrived(granted))

    def _forget_shards(self) -> None:
        """Make room: shards that no lease of ours names can be had again."""
        leased = {lease.range.shard for lease in self._leases.values()}
        for digest in self._shards.keys() - leased:
            self._blobs.delete(digest)

    async def _take_snapshot(self) -> None:
        ranges: tuple[DataRange, ...] = ()
        async with self._vector_turn:
            try:
                if self._trainer is None:
                    raise Refused(Code.CHILD_DIED, "no trainer")
                await asyncio.to_thread(self._gradient.expect_snapshot)
                snapshot = await self._trainer.snapshot()
                await asyncio.to_thread(self._gradient.take_snapshot)
                ranges = snapshot.ranges
            except Refused as refused:  # the trainer is gone, and with it what it had not handed over
                log.warning("no snapshot", why=refused.what)
                await asyncio.to_thread(self._gradient.encode)
            await asyncio.to_thread(self._save_offered, ranges)
        self._post(rounds.SnapshotTaken(ranges))

    # local progress

    def _save_offered(self, ranges: tuple[DataRange, ...]) -> None:
        """Before a round hears of a snapshot: the file says the same, or nothing."""
        if self._progress.due(time.monotonic(), offered=True):
            self._progress.save(self._progress_of(ranges, offered=True), self._gradient.residual)
        else:
            self._progress.forget()

    async def _keep_progress(self) -> None:
        """Between rounds, now and then: what the trainer has made is on disk when this machine loses its power."""
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            if not self._progress.due(time.monotonic(), offered=False):
                continue
            async with self._vector_turn:
                state = self._rounds
                assert state is not None
                idle = state.phase is rounds.Phase.TRAINING and state.contribution is None and not state.snapshot_asked
                if self._trainer is None or not idle or self._gradient.pending:
                    continue
                with suppress(Refused):  # the trainer has died
                    seen = await self._trainer.peek()
                    progress = self._progress_of(seen.ranges, offered=False)
                    residual, vectors = self._gradient.residual, self._vectors
                    save = self._progress.save
                    await asyncio.to_thread(save, progress, residual, shared=vectors.shared, local=vectors.snapshot)

    def _progress_of(self, ranges: tuple[DataRange, ...], *, offered: bool) -> Progress:
        state = self._rounds
        assert state is not None
        brings = rounds.combine(state.carried, ranges, state.consumed, self._rules)
        return Progress(state.head, state.branch, state.missed, brings, offered)

    def _resume_progress(self) -> None:
        """Take up what an earlier life of this node had trained, as far as the log has no other use for it."""
        found, state = self._progress.load(), self._rounds
        assert state is not None
        if found is None:
            return
        progress, values = found
        found_use = resume(
            progress,
            state.consumed,
            self._journal.entry,
            head=state.head,
            branch=state.branch,
            stale_rounds=self._rules.stale_rounds,
        )
        log.info("saved progress", tokens=progress.contribution.tokens, use=type(found_use).__name__)
        match found_use:
            case Drop(why):
                log.info("saved progress was dropped", why=why)
                self._progress.forget()
            case Offer(contribution, missed):
                self._gradient.load(values)
                self._gradient.encode()
                self._rounds = replace(state, contribution=contribution, missed=missed)
            case Carry(contribution, missed, missed_away):
                self._gradient.load(values)
                for number in range(missed - missed_away + 1, missed + 1):
                    self._gradient.settle((), missed=number)
                self._rounds = replace(state, carried=contribution, missed=missed)
            case Settle(entry):
                self._gradient.load(values)
                self._gradient.encode()
                self._gradient.settle([part for part in entry.record.parts if self._me in part.included])

    # rounds

    def _send(self, to: tuple[NodeId, ...], message: Message) -> None:
        letter, signature = letters.seal(self._key, message)
        for node in to:
            if node == self._me:
                self._post(rounds.Received(message, signature))
            else:
                self._spawn(self._courier.deliver(node, letter))

    def _hear(self, peer: PeerId, letter: bytes) -> None:
        """A letter from a rostered peer: an event, or a question about the log or its answer."""
        match self._courier.open(peer, letter):
            case None:
                pass
            case LogRequest() as request, _:
                self._send((request.sender,), self._courier.log_reply(request))
            case LogReply() as reply, _:
                for signed in reply.rosters:
                    self._learn_roster(signed)
                self._learn_rollbacks(reply.rollbacks)
                self._post(rounds.LogArrived(reply.entries, reply.rosters))
            case message, signature:
                self._post(rounds.Received(message, signature))

    def _learn_roster(self, signed: SignedRoster) -> None:
        assert self._rounds is not None
        if signed.roster.epoch not in self._rounds.rosters:
            self._journal.save_roster(signed)
            self._step_rounds(rounds.RosterArrived(signed))
            self._spawn(self._tell_engine())
            log.info("roster", epoch=signed.roster.epoch, members=len(signed.roster.members))

    def _learn_rollbacks(self, arrived: tuple[SignedRollback, ...]) -> None:
        assert self._rounds is not None
        new = self._save_rollbacks(arrived, known=self._rounds.rollbacks)
        if new:
            self._step_rounds(rounds.RollbacksArrived(new))

    def _save_rollbacks(
        self, arrived: tuple[SignedRollback, ...], *, known: tuple[SignedRollback, ...]
    ) -> tuple[SignedRollback, ...]:
        """Those that continue what is known, durable now; refuses a second story under a number that is known."""
        new: list[SignedRollback] = []
        for signed in sorted(arrived, key=lambda each: each.rollback.number):
            number = signed.rollback.number
            if signed.rollback.run != self._manifest.run:
                continue
            if number <= len(known) and known[number - 1].rollback != signed.rollback:
                raise Refused(Code.TWO_STORIES, f"the coordinator has signed two rollbacks with the number {number}")
            if number == len(known) + len(new) + 1:
                self._journal.save_rollback(signed)
                new.append(signed)
        return tuple(new)

    def _tell_of(self, signed: SignedRollback) -> None:
        rollback = signed.rollback
        log.warning("rolled back", number=rollback.number, round=rollback.to.round, why=rollback.reason)
        why = f": {printable(rollback.reason)}" if rollback.reason else ""
        self._tally.notice = f"the researcher took the run back to round {rollback.to.round}{why}"

    async def _rewind(self, signed: SignedRollback) -> None:
        """Go back to what a rollback leaves. Local work began from what is undone, and goes with it."""
        self._tell_of(signed)
        await self._stop_trainer()
        self._post(session.PartStopped(session.Part.TRAINER))
        self._leases.clear()  # the coordinator has taken them back
        async with self._vector_turn:
            own = await asyncio.to_thread(self._replica.rewind, signed)
            self._gradient.forget()
            self._progress.forget()
        if not own:
            await self._retrying(self._load_newest_base)
        replica = self._replica
        assert replica.head is not None
        here = rounds.Rewound(replica.head, replica.branch, replica.digest, replica.state.consumed, replica.last)
        self._step_rounds(here)
        self._spawn(self._start_trainer())

    async def _load_newest_base(self) -> None:
        assert self._rounds is not None
        page = await self._link.read_log(self._rounds.head.round)
        self._learn_rollbacks(page.rollbacks)
        await self._load_base(page.base)

    async def _average(self, begin: Begin, roster: Roster, seconds: float) -> None:
        """Average with the group; whatever happens, say what is held."""
        part, held = await self._courier.average(begin, roster, self._gradient.payload, seconds=seconds)
        self._post(rounds.Averaged(begin.ballot, part, held))

    async def _fetch_parts(self, parts: tuple[Part, ...], sources: tuple[NodeId, ...]) -> None:
        found: set[Digest] = set()
        lost: set[Digest] = set()
        for part in parts:
            (found if await self._courier.fetch_part(part, sources) else lost).add(part.digest)
        if found:
            self._post(rounds.PartsArrived(frozenset(found)))
        if lost:
            self._post(rounds.PartsLost(frozenset(lost)))

    async def _fold(self, entry: LogEntry) -> None:
        """Apply a certified record, and move the trainer with it without losing its newest steps."""
        record = entry.record
        async with self._vector_turn:
            assert self._rounds is not None
            brought = self._rounds.contribution
            mine = brought is not None and rounds.holds(record, brought)
            taken = [part for part in record.parts if mine and self._me in part.included]
            missed = rounds.missed_after(self._rounds, record)
            held = [c for c in (brought, self._rounds.carried) if c is not None]
            dropped = [r for c in held for r in c.ranges] if missed > self._rules.stale_rounds else []
            pending = self._gradient.pending
            await asyncio.to_thread(self._gradient.before_fold)
            digest = await asyncio.to_thread(self._replica.fold, entry)
            await asyncio.to_thread(self._gradient.settle, taken, missed=missed)
            if self._trainer is not None:
                with suppress(Refused):
                    await self._trainer.merge(from_snapshot=pending)
        tokens = next((c.tokens for c in record.contributions if c.node == self._me), 0)
        self._tally.settled(record.round, tokens=tokens, accepted=mine)
        log.info("round folded", round=record.round, members=len(record.contributions), state=digest[:12], mine=mine)
        self._step_rounds(rounds.Folded(record.round, digest))
        self._membership.renew()
        await self._train_again(dropped)
        self._post(session.RoundSettled(self._rounds.pending))
        self._leases = {
            lease_id: lease
            for lease_id, lease in self._leases.items()
            if not self._replica.state.consumed.covers(lease.range)
        }
        await self._set_goal()
        if self._replica.state.round % self._spec.evaluate.base_every_rounds == 0:
            async with self._vector_turn:
                await asyncio.to_thread(self._replica.save_base, self._journal.folder)
        reduced = [part for part in record.parts if part.reducer == self._me]
        if reduced or record.leader == self._me:
            await self._hand_in(entry, reduced)

    async def _hand_in(self, entry: LogEntry, parts: list[Part]) -> None:
        """Give the coordinator the record and the parts reduced here; what fails is asked for by a later heartbeat."""
        with suppress(Refused):
            missing = set(await self._push(entry))
            for part in parts:
                if part.digest in missing:
                    await self._link.upload_part(part.digest, await asyncio.to_thread(self._blobs.read, part.digest))

    async def _push(self, entry: LogEntry) -> tuple[Digest, ...]:
        """Bring the coordinator a record, with what it signed itself: its database may be an older one."""
        assert self._rounds is not None
        known = self._rounds.rosters
        named = {entry.record.epoch, entry.certificate.ballot.epoch}
        rosters = tuple(known[epoch] for epoch in sorted(known) if epoch >= min(named))
        return await self._link.push_entry(entry, rosters, self._rounds.rollbacks)

    # the coordinator

    async def _heartbeat(self) -> None:
        """Say what we do, learn what is new, for ever; a lost link comes back by itself."""
        failures = 0
        while True:
            assert self._rounds is not None
            try:
                if not self._membership.online:
                    await self._come_back()
                await self._beat()
                if failures or not self._session.linked:
                    self._post(session.LinkOpened())
                failures = 0
            except Refused as refused:
                if refused.reason.exit in (Exit.REFUSED, Exit.INTEGRITY) and refused.reason is not Code.LIMIT:
                    raise
                failures += 1
                self._post(session.LinkLost(refused.what))
                await asyncio.sleep(wait_seconds(failures=failures, luck=random.random()))  # noqa: S311  # only spreads the load

    async def _come_back(self) -> None:
        """Be let in after a start without the coordinator."""
        opened = await self._membership.enter()
        self._silence(opened.silent_epoch)
        self._learn_rollbacks(opened.rollbacks)
        if opened.roster is not None:
            self._learn_roster(opened.roster)

    async def _beat(self) -> None:
        state = self._rounds
        assert state is not None
        if self._engine is not None:
            with suppress(Refused):
                usage = await self._engine.usage()
                self._tally.sent, self._tally.received = usage.sent, usage.received
        tally = self._tally
        beat = Beat(
            activity=session.activity(self._session).value,
            head=state.head,
            epoch=max(state.rosters, default=Epoch(-1)),
            addresses=self._engine.addresses if self._engine is not None else (),
            tokens_per_second=tally.stepped.tokens_per_second if tally.stepped else 0.0,
            train_loss=tally.mean_loss(),
            busy_share=self._trainer.busy_share if self._trainer else 0.0,
            bytes_sent=tally.sent,
            bytes_received=tally.received,
            lease_ids=tuple(self._leases),
            known_round=max(self._known_round, state.head.round),
            branch=len(state.rollbacks),
            life=self._membership.life,
        )
        reply = await self._unless_changed(
            self._link.heartbeat(beat, wait_seconds=self._spec.coordinator.heartbeat_seconds)
        )
        if reply is None:
            return
        self._tally.notice = reply.notice or self._tally.notice
        if reply.roster is not None:
            self._learn_roster(reply.roster)
        self._silence(reply.silent_epoch)
        self._learn_rollbacks(reply.rollbacks)
        self._known_round = reply.head_round
        assert self._rounds is not None
        head = self._rounds.head.round
        if head >= reply.head_round:  # else a lease may be missing because a record that we lack consumed it
            await self._lose_leases(frozenset(beat.lease_ids) - frozenset(reply.renewed))
        if reply.head_round > head and self._rounds.committed is None:
            await self._read_log(head)
        for entry in self._journal.entries(reply.head_round, most=LOG_PAGE):
            await self._push(entry)
        wanted = frozenset(reply.wanted)
        for digest in wanted & self._wanted_before:  # its reducer had a heartbeat's time to bring it
            if self._blobs.has(Digest(digest)):
                data = await asyncio.to_thread(self._blobs.read, Digest(digest))
                with suppress(Refused):
                    await self._link.upload_part(Digest(digest), data)
        self._wanted_before = wanted
        if reply.finished and head >= reply.head_round:
            self._post(session.RunEnded())

    async def _unless_changed(self, asking: Coroutine[Any, Any, News]) -> News | None:
        """The answer, or none as soon as we do something else: the coordinator should hear of that at once."""
        self._changed.clear()
        answer, changed = asyncio.ensure_future(asking), asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([answer, changed], return_when=asyncio.FIRST_COMPLETED)
            return await answer if answer.done() else None
        finally:
            answer.cancel()
            changed.cancel()

    async def _lose_leases(self, lost: frozenset[str]) -> None:
        ranges = [self._leases.pop(lease_id).range for lease_id in lost if lease_id in self._leases]
        if ranges:
            self._membership.keep(self._leases.values())
        if ranges and self._trainer is not None:
            log.warning("leases were lost", sequences=sum(each.stop - each.start for each in ranges))
            with suppress(Refused):
                await self._trainer.drop(ranges)
            self._post(
                session.DataUsed(0, self._sequences_wanted())
            )  # asks for more; the next step says how much is left

    # people

    async def _answer(self, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        match verb:
            case "status":
                return self.status()
            case "pause":
                until = arguments.get("seconds")
                self._post(session.PauseAsked(time.monotonic() + float(until) if until else None))
            case "resume":
                self._post(session.ResumeAsked())
            case "finish":
                self._post(session.FinishAsked())
                self._post(rounds.Finishing())
                if self._rounds is None or not self._rounds.pending:
                    self._end(Exit.OK, "finished; nothing was waiting for a round")
            case "leave":
                self._end(Exit.OK, "left the run")
            case _:
                raise Refused(Code.FIELD, f"no such order: {verb}")
        await asyncio.sleep(2 * TICK_SECONDS)
        return self.status()

    async def _report(self) -> None:
        while not self._ended.done():  # the last word is said by whoever ends the loop
            self._on_status(self.status())
            await asyncio.sleep(STATUS_SECONDS)

    def status(self) -> dict[str, Any]:
        """What people and scripts see."""
        return view(
            self._session,
            self._rounds,
            self._rules,
            run=self._manifest.name,
            name=self._membership.opened.signed_pass.body.name,
            trainer=self._trainer,
            tally=self._tally,
        )


def _vote_is_valid(node: NodeId, body: VoteBody, signature: str) -> bool:
    try:
        verify(node, VOTE, vote_bytes(body), signature)
    except Refused:
        return False
    return True
