"""The daemon's loop: events in, decisions by the pure machines, effects out. It owns every process and task."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import IO, Any, Final

import structlog

from node import hardware, letters
from node.config import LOG_BYTES_MAX, Home, Settings, Stopper
from node.control import Control
from node.core import rounds, schedule, session, witness
from node.core.rounds import Rounds
from node.courier import Courier
from node.decider import Decider, Effect
from node.engine import Engine
from node.journal import Journal, Promise
from node.liaison import Liaison
from node.link import Door, Link
from node.membership import Membership
from node.status import VERSION, Tally, view
from node.supply import Supply
from node.training import Event as TrainerEvent
from node.training import Exited, Failed, OutOfData, Skipped, Stepped
from node.workbench import Folded, Workbench
from protocol import console, contribution, p2pd
from protocol import invite as invites
from protocol.blobs import BlobStore
from protocol.console import printable
from protocol.errors import Code, Exit, Refused
from protocol.evidence import is_vouched
from protocol.exchange import packing_of, round_seconds
from protocol.identity import Key, libp2p_private_key_bytes, verify
from protocol.invite import Invite
from protocol.limits import BLOB_BYTES_MAX
from protocol.log import PROPOSAL, VOTE, is_brought, is_certified, vote_bytes
from protocol.messages import Begin, LogReply, LogRequest, Message
from protocol.proof import Said
from protocol.runspec import RunSpec
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Epoch,
    Head,
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

IDENTITY: Final = "p2p.identity"
PEERS_SHARE: Final = 0.75  # of what may be sent; what the coordinator archives is a fifth of that or less
TICK_SECONDS: Final = 0.2
POLICY_SECONDS: Final = 5.0  # a laptop that is unplugged is quiet within ten
STATUS_SECONDS: Final = 0.5
LOG_SECONDS: Final = 60.0  # between two looks at how large the logs are
LEAVE_SECONDS: Final = 2.0  # for the coordinator to hear that we go
POLITE_SECONDS: Final = 7.0  # Ctrl-C waits so long for the round to end; leaving takes the rest of ten seconds

log = structlog.get_logger()


def _rate(settings: Settings, share: float) -> float | None:
    """This share of what the owner lets us send, in bytes per second."""
    return None if settings.max_up is None else settings.max_up * 1e6 / 8 * share


async def run(
    settings: Settings,
    invite: Invite | None,
    *,
    stopper: Stopper,
    on_status: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Be a node until the run ends, the volunteer stops it, or it cannot go on. Returns the exit code."""
    while True:
        try:
            async with AsyncExitStack() as owned:
                daemon = await Daemon.open(settings, invite, owned, on_status)
                return await daemon.run(stopper)
        except Refused as refused:
            if refused.reason is not Code.DISK_CAP or hardware.has_room(settings.home) or stopper.polite.is_set():
                raise
            if not await _room_comes(settings, stopper, on_status, refused.what):
                return Exit.INTERRUPTED.value


async def _room_comes(
    settings: Settings, stopper: Stopper, on_status: Callable[[dict[str, Any]], None] | None, why: str
) -> bool:
    """Another program has filled the disk: wait until there is room. False if the owner does not want to wait."""
    log.warning("waiting for room on the disk", why=why)
    status = {"version": VERSION, "activity": session.Activity.PAUSED.value, "reason": f"the disk is full: {why}"}

    async def answer(verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if verb in ("leave", "finish"):
            stopper.ask()
        return status

    control = Control(Home(settings.home).control, answer)
    await control.start()
    try:
        while not hardware.has_room(settings.home):
            if on_status is not None:
                on_status(status)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopper.polite.wait(), POLICY_SECONDS)
                return False
    finally:
        await control.close()
    return True


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
        self._manifest = manifest = membership.opened.manifest.manifest
        self._spec = RunSpec.from_json(manifest.spec)
        self._packing = packing_of(self._spec.update)
        self._home = Home(settings.home)
        self._blobs = BlobStore(
            self._home.blobs,
            settings.max_disk_bytes or BLOB_BYTES_MAX,
            beside=partial(hardware.bytes_of, self._home.path, but=self._home.blobs),
        )
        self._journal = Journal(self._home.journal / manifest.name)
        self._tally = Tally()
        self._witness = witness.Witness()
        self._witness_rules = witness.Rules(self._manifest.run, _is_said, is_brought)
        self._engine: Engine | None = None
        self._engine_was_up = False
        self._folding = 0  # certified rounds that are being folded and handed in
        self._line = asyncio.Lock()  # one large download at a time: a home line is one line
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[tuple[Exit, str]] = asyncio.get_running_loop().create_future()
        self._decider = decider = Decider(self._make_rules(), self._carry_out, helper=not settings.training)
        self._workbench = Workbench(
            manifest,
            self._spec,
            self._me,
            settings=settings,
            journal=self._journal,
            blobs=self._blobs,
            decider=decider,
            grants_of=lambda ranges: self._supply.grants_of(ranges),
            log_file=self._log_file,
            on_event=self._trained,
        )
        self._supply = Supply(
            self._spec,
            decider=decider,
            membership=membership,
            link=link,
            blobs=self._blobs,
            fetch=self._fetch_shard,
            tally=self._tally,
        )
        self._courier = Courier(
            manifest,
            self._me,
            packing=self._packing,
            journal=self._journal,
            blobs=self._blobs,
            make_room=self._supply.make_room,
            link=link,
            decider=decider,
            key=self._key,
        )
        self._liaison = Liaison(
            link,
            membership,
            heartbeat_seconds=self._spec.coordinator.heartbeat_seconds,
            decider=decider,
            journal=self._journal,
            blobs=self._blobs,
            courier=self._courier,
            supply=self._supply,
            workbench=self._workbench,
            tally=self._tally,
            spawn=self._spawn,
            pass_on=self._pass_on,
        )

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
        rate = _rate(settings, 1 - PEERS_SHARE)
        link = Link(Door.of(invite), key=key, transport_key=transport, upload_bytes_per_second=rate)
        owned.push_async_callback(link.close)
        membership = Membership(key.public, link, invite, settings.name or "", home.journal / invite.name)
        await membership.begin(known=home.remembered() is not None)
        home.remember(invites.encode(invite))
        daemon = cls(settings, key, link, membership, owned, on_status)
        owned.callback(daemon._workbench.close)
        owned.push_async_callback(daemon._close_children)
        await daemon._workbench.check_model()
        return daemon

    def _make_rules(self) -> rounds.Rules:
        sequences = {shard.digest: shard.sequences for shard in self._membership.opened.shards}
        run = self._manifest.run
        return rounds.Rules(
            me=self._me,
            run=run,
            parameters=self._manifest.parameters,
            context=self._manifest.context,
            inner_steps=self._spec.rounds.steps,
            exchange=self._packing.exchange,
            part_is_vouched=lambda record, part: is_vouched(record, part, self._packing),
            is_data=lambda data: data.stop <= sequences.get(data.shard, 0),
            round_seconds_min=lambda members: round_seconds(self._spec, self._manifest.parameters, members),
            round_seconds_max=self._spec.rounds.seconds_max,
            gather_seconds=self._spec.rounds.gather_seconds,
            attempt_seconds_min=min(5.0, self._spec.rounds.deadline_seconds),
            attempt_seconds_max=self._spec.rounds.deadline_seconds,
            stale_rounds=self._spec.update.stale_rounds,
            sign=lambda body: self._key.sign(VOTE, vote_bytes(body)),
            vote_is_valid=partial(_is_signed, VOTE),
            sign_proposal=lambda body: self._key.sign(PROPOSAL, vote_bytes(body)),
            proposal_is_valid=partial(_is_signed, PROPOSAL),
            brings=lambda head, brought: contribution.sign(self._key, run, head.round, head.hash, brought),
            is_brought=lambda head, brought: contribution.is_genuine(run, head.round, head.hash, brought),
            entry_is_certified=is_certified,
        )

    # the loop

    async def run(self, stopper: Stopper) -> int:
        control = Control(self._home.control, self._answer)
        await control.start()
        self._owned.push_async_callback(control.close)
        self._spawn(self._prepare())
        self._spawn(self._tick())
        self._spawn(self._keep_policy())
        self._spawn(self._cap_logs())
        self._spawn(self._stop_when_asked(stopper))
        if self._on_status is not None:
            self._spawn(self._report())
        self._spawn(self._decider.run())  # a task that fails ends the daemon: see _settled
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
        if not self._decider.begun:
            return None
        seal = rounds.seal(self._decider.rounds, linked=self._decider.session.linked)
        if seal is not None:
            self._journal.save_seal(seal.epoch)
        return seal

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, Refused):
            log.error("a task failed", error=repr(error), exc_info=error)
        if not self._ended.done():
            self._ended.set_exception(error)

    def _end(self, code: Exit, why: str) -> None:
        if not self._ended.done():
            self._ended.set_result((code, why))

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case session.SetTraining(on):
                self._spawn(self._set_training(on))
            case session.AcquireLeases(sequences):
                self._spawn(self._supply.acquire(sequences))
            case session.Restart(session.Part.TRAINER):
                self._spawn(self._start_trainer())
            case session.Restart(session.Part.ENGINE):
                self._spawn(self._start_engine())
            case session.Release():
                self._spawn(self._release_trainer())
            case session.End(failed):
                if failed:
                    self._fail(Refused(Code.CHILD_DIED, failed))
                self._end(Exit.OK, "finished")
            case rounds.TakeSnapshot():
                self._spawn(self._workbench.take_snapshot())
            case rounds.SaveVote(round_number, ballot, accepted, previous):
                self._journal.save_promise(Promise(round_number, ballot, accepted, previous))
            case rounds.Send(to, message):
                self._send(to, message)
            case rounds.Average(begin, roster, seconds):
                self._spawn(self._average(begin, roster, seconds))
            case rounds.StopAveraging():
                self._spawn(self._courier.stop_averaging())
            case rounds.FetchParts(parts, sources):
                for part in parts:
                    self._spawn(self._fetch_part(part, sources))
            case rounds.Fold(entry):
                self._spawn(self._fold(entry))
            case rounds.Turn(rollback):
                self._workbench.replica.turn(rollback)
                self._tell_of(rollback)
            case rounds.Rewind(rollback):
                self._spawn(self._rewind(rollback))
            case rounds.TellLog(to, round_number):
                self._send((to,), self._courier.log_reply(LogRequest(self._manifest.run, round_number, self._me)))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._decider.post(session.TimePassed())
            self._decider.post(rounds.Ticked())

    async def _keep_policy(self) -> None:
        """What the owner's policy says, whenever that changes."""
        before = ""
        while True:
            obstacle = await self._obstacle(rests=bool(before))
            if obstacle != before:
                log.info("policy", obstacle=obstacle or "none")
                self._decider.post(session.ObstacleChanged(obstacle))
            before = obstacle
            await asyncio.sleep(POLICY_SECONDS)

    async def _obstacle(self, *, rests: bool = False) -> str:
        """Why not to train now; where nothing is trained, why not to average: what is averaged has to be kept."""
        if not self._settings.training:
            room = self._blobs.has_room(self._update_bytes)
            return "" if room else "--max-disk, or the disk, leaves no room for another round"
        policy = self._settings.policy
        heat = policy.max_celsius is not None
        conditions = await asyncio.to_thread(
            hardware.conditions, self._settings.home, heat=heat, programs=policy.rest_beside
        )
        obstacle = schedule.obstacle(policy, conditions, rests=rests)
        return obstacle if obstacle or self._blobs.has_room(0) else "this node's files have reached --max-disk"

    async def _stop_when_asked(self, stopper: Stopper) -> None:
        await stopper.polite.wait()
        if not self._decider.session.paused:  # else the machine is wanted for something else
            self._decider.post(session.FinishAsked())
            self._decider.post(rounds.Finishing())
        until = time.monotonic() + POLITE_SECONDS
        while self._is_awaited and time.monotonic() < until and not stopper.now.is_set():
            await asyncio.sleep(TICK_SECONDS)
        self._end(Exit.INTERRUPTED, "stopped by you")

    @property
    def _pending(self) -> bool:
        """Whether a round still has work of ours to take."""
        return self._decider.begun and self._decider.rounds.pending

    @property
    def _is_engaged(self) -> bool:
        """Whether a round is being averaged, decided or handed in here."""
        return self._folding > 0 or (self._decider.begun and self._decider.rounds.engaged)

    @property
    def _is_awaited(self) -> bool:
        """Whether a round needs us to its end, or is to take our work once more."""
        state = self._decider.session
        return self._is_engaged or (self._pending and state.votes and not state.paused)

    async def _end_when_free(self) -> None:
        """With nothing to bring: after the round that others do with us, or its attempt, which has a deadline."""
        while self._is_engaged:
            await asyncio.sleep(TICK_SECONDS)
        self._end(Exit.OK, "finished; nothing was waiting for a round")

    # getting ready

    async def _prepare(self) -> None:
        """Load or download the state, follow the log as far as it is known, then start what needs it."""
        opened, online = self._membership.opened, self._membership.online
        self._liaison.save_rollbacks(opened.rollbacks, known=self._journal.rollbacks())
        self._liaison.silence(opened.silent_epoch)
        if not await self._workbench.open_own() or (online and self._whole_model_is_less(opened.base)):
            await self._liaison.retrying(lambda: self._load_base(opened.base))
        self._decider.begin(self._begin())
        if opened.roster is not None:
            self._liaison.learn_roster(opened.roster)
        if online:
            self._liaison.unseal()
        state = self._decider.rounds
        log.info("state loaded", round=state.head.round, state=state.digest[:12], online=online)
        self._decider.post(session.LinkOpened() if online else session.LinkLost("it did not answer at the start"))
        self._spawn(self._start_engine())
        if online:
            await self._liaison.retrying(self._liaison.catch_up)
        if self._settings.training:
            await self._workbench.take_up_saved()
        else:
            self._supply.give_up()
        self._decider.post(session.DataUsed(0, self._supply.wanted()))
        self._decider.post(session.CaughtUp())
        self._spawn(self._start_trainer())
        self._spawn(self._liaison.heartbeat())
        self._spawn(self._workbench.keep_progress())

    def _begin(self) -> Rounds:
        """Where the journal says that this node stands."""
        replica, journal = self._workbench.replica, self._journal
        assert replica.head is not None
        promise = journal.promise(replica.head)
        return Rounds(
            head=replica.head,
            digest=replica.digest,
            consumed=replica.state.consumed,
            rosters=journal.rosters(),
            branch=replica.branch,
            rollbacks=journal.rollbacks(),
            silent=journal.silence(),
            sealed=journal.sealed(),
            last=replica.last,
            ballot=promise.ballot if promise is not None else Ballot(Epoch(-1), 0),
            accepted=promise.accepted if promise is not None else None,
        )

    def _whole_model_is_less(self, base: BaseCheckpoint) -> bool:
        assert self._workbench.replica.head is not None
        return is_less(base, self._workbench.replica.head, self._update_bytes)

    @property
    def _update_bytes(self) -> int:
        """All parts of one round."""
        signed = self._membership.opened.roster
        members = len(signed.roster.members) if signed is not None else self._spec.run.min_nodes
        return self._packing.update_bytes(self._manifest.parameters, members)

    async def _load_base(self, base: BaseCheckpoint) -> None:
        await self._fetch(base.blob, "the model")
        await self._workbench.load(base, self._blobs.path(base.blob.digest))

    async def _fetch_shard(self, shard: Shard) -> None:
        await self._fetch(BlobRef(shard.digest, shard.size), "data")

    async def _fetch(self, ref: BlobRef, what: str) -> None:
        if self._blobs.has(ref.digest):
            return

        began, first = time.monotonic(), 0

        def progress(done: int, size: int) -> None:
            nonlocal began, first
            if not first:  # an earlier download may have brought most of it
                began, first = time.monotonic(), done
            pace = (done - first) / max(0.001, time.monotonic() - began)
            self._tally.download = {"what": what, "done": done, "size": size, "bytes_per_second": pace}

        try:
            async with self._line:
                await self._link.fetch_blob(ref, self._blobs, progress)
        finally:
            self._tally.download = None

    def _log_file(self, name: str) -> IO[bytes]:
        """Where a child's output goes; closed with the daemon."""
        return self._owned.enter_context(self._settings.log_file(name))

    # children

    async def _start_engine(self) -> None:
        try:
            engine = await Engine.start(
                runtime_dir=self._home.runtime,
                identity_path=self._home.runtime / IDENTITY,
                run=self._manifest.run,
                listen=self._settings.listen_multiaddrs,
                announce=self._settings.announce_multiaddrs,
                rendezvous=self._membership.opened.rendezvous,
                coordinator=self._membership.opened.coordinator,
                named=self._link.door.names,
                upload_bytes_per_second=_rate(self._settings, PEERS_SHARE),
                packing=self._packing,
                residual_decay=self._spec.update.residual_decay,
                parameters=self._manifest.parameters,
                blob_dir=self._blobs.folder,
                on_message=self._hear,
                log=self._log_file("engine"),
            )
        except Refused as refused:
            if refused.reason is Code.PORT_IN_USE and not self._engine_was_up:
                raise  # another program has it; later it may be what is left of our own
            self._decider.post(session.PartDied(session.Part.ENGINE, refused.what))
            return
        self._engine_was_up = True
        self._engine = self._courier.engine = engine
        await self._courier.tell_engine()
        self._decider.post(session.PartReady(session.Part.ENGINE))
        code = await engine.closed
        self._engine = self._courier.engine = None
        self._decider.post(session.PartDied(session.Part.ENGINE, f"exit code {code}"))

    async def _start_trainer(self) -> None:
        if not self._settings.training:
            return
        try:
            if not await self._workbench.start_trainer():
                return
        except Refused as refused:
            if refused.reason is not Code.CHILD_DIED:
                raise
            self._decider.post(session.PartDied(session.Part.TRAINER, refused.what))
            return
        await self._workbench.set_goal()
        if (trainer := self._workbench.trainer) is not None:
            await self._supply.supply(trainer)
            self._decider.post(session.PartReady(session.Part.TRAINER))

    def _trained(self, event: TrainerEvent) -> None:
        post = self._decider.post
        match event:
            case Stepped():
                self._tally.trained(event)
                self._decider.step(rounds.Progressed(event.steps))  # at once: a snapshot must not overtake it
                post(session.DataUsed(event.queued_sequences, self._supply.wanted()))
            case OutOfData():
                post(session.DataUsed(0, self._supply.wanted()))
            case Skipped(ranges, what):
                log.warning("a step was left out", why=what)
                self._supply.leave_out(ranges)
            case Failed(reason, what, shard, ranges):
                log.error("training failed", code=reason.code, why=what)
                self._tally.notice = f"{reason.code}: {what}"
                if shard is None or not self._supply.knows(shard):
                    self._spawn(self._replace_trainer(what))
                else:
                    self._spawn(self._supply.mend(shard, ranges))
                    self._spawn(self._set_training(True))
            case Exited(returncode):
                self._spawn(self._workbench.lost_trainer())
                post(session.PartDied(session.Part.TRAINER, f"exit code {returncode}"))

    async def _release_trainer(self) -> None:
        if await self._workbench.release_trainer():
            log.info("the trainer has ended until this machine may train again")
            self._decider.post(session.TrainerReleased())

    async def _replace_trainer(self, why: str) -> None:
        """The local model is past saving: a new trainer starts from the shared state."""
        if await self._workbench.discard_trainer():
            self._decider.post(session.PartDied(session.Part.TRAINER, why))

    async def _set_training(self, on: bool) -> None:
        if self._workbench.trainer is None:
            return
        await self._workbench.train(on)
        if on:
            self._decider.post(session.DataUsed(self._decider.session.sequences_left, self._supply.wanted()))

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _close_children(self) -> None:
        await self._stop_tasks()
        ending: list[Coroutine[Any, Any, object]] = [self._workbench.stop_trainer()]
        if self._engine is not None:
            ending.append(self._engine.stop())
        await asyncio.gather(*ending, return_exceptions=True)
        p2pd.sweep(self._home.runtime)
        (self._home.runtime / IDENTITY).unlink(missing_ok=True)

    # rounds

    def _send(self, to: tuple[NodeId, ...], message: Message) -> None:
        letter, signature = letters.seal(self._key, message)
        for node in to:
            if node == self._me:
                self._decider.post(rounds.Received(message, signature))
            else:
                self._spawn(self._courier.deliver(node, letter))

    def _hear(self, peer: PeerId, letter: bytes) -> None:
        """A letter from a rostered peer: an event, or a question about the log or its answer; or it is another's."""
        opened = self._courier.open(peer, letter)
        if opened is not None and (onward := self._courier.onward(letter)) is not None:
            self._spawn(self._courier.deliver(onward, letter))
            return
        match opened:
            case None:
                pass
            case LogRequest() as request, _:
                self._send((request.sender,), self._courier.log_reply(request))
            case LogReply() as reply, _:
                self._learn(reply)
            case message, signature:
                self._bear_witness(message)
                self._decider.post(rounds.Received(message, signature))

    def _bear_witness(self, message: Message) -> None:
        state = self._decider.rounds
        rules = self._witness_rules
        self._witness, found = witness.hear(self._witness, message, state.rosters, state.head.round, rules)
        for evidence in found:
            self._liaison.report(evidence)

    def _learn(self, reply: LogReply) -> None:
        try:
            for signed in reply.rosters:
                self._liaison.learn_roster(signed)
            self._liaison.learn_rollbacks(reply.rollbacks)
        except Refused as refused:  # two stories, or no room to keep what must be kept
            self._fail(refused)
            return
        self._decider.post(rounds.LogArrived(reply.entries, reply.rosters))

    async def _pass_on(self, signed: SignedRoster) -> None:
        """A new roster, to one member drawn by lot: a coordinator that tells its nodes different stories is found out."""
        await self._courier.tell_engine()
        others = [node for node in signed.roster.nodes if node != self._me]
        if others:
            state = self._decider.rounds
            told = LogReply(self._manifest.run, state.head.round, self._me, (), (signed,), state.rollbacks)
            self._send((secrets.choice(others),), told)

    async def _average(self, begin: Begin, roster: Roster, seconds: float) -> None:
        """Average with the group; whatever happens, say what is held, and tell of who sent what no honest member sends."""
        part, held, garbled = await self._courier.average(begin, roster, self._workbench.payload, seconds=seconds)
        self._decider.post(rounds.Averaged(begin.ballot, part, held))
        for ready in (signed.ready for signed in begin.readies):
            if ready.sender in garbled:
                complaint = contribution.Complaint(begin.round, ready.previous, ready.contribution)
                self._spawn(self._liaison.complain(complaint))

    async def _fetch_part(self, part: Part, sources: tuple[NodeId, ...]) -> None:
        found = await self._courier.fetch_part(part, sources)
        digests = frozenset({part.digest})
        self._decider.post(rounds.PartsArrived(digests) if found else rounds.PartsLost(digests))

    async def _fold(self, entry: LogEntry) -> None:
        self._folding += 1
        try:
            await self._follow(entry)
        finally:
            self._folding -= 1

    async def _follow(self, entry: LogEntry) -> None:
        """Apply a certified record, then do what its end allows."""
        record = entry.record
        folded = await self._fold_whole(entry)
        self._supply.take_back(folded.dropped)
        tokens = next((c.tokens for c in record.contributions if c.node == self._me), 0)
        reduced = [part for part in record.parts if part.reducer == self._me]
        self._tally.settled(record.round, tokens=tokens, accepted=folded.mine, reduced=bool(reduced))
        self._membership.renew()
        await self._supply.settle(record)
        await self._workbench.set_goal()
        if (record.round + 1) % self._spec.evaluate.base_every_rounds == 0:
            await self._save_base()
        if reduced or record.leader == self._me:
            await self._liaison.hand_in(entry, reduced)
        self._decider.post(session.RoundSettled(self._decider.rounds.pending))  # last: whoever ends has handed it in

    async def _fold_whole(self, entry: LogEntry) -> Folded:
        """Fold it; a part that was here for the vote may have rotted or been deleted since, and comes once more."""
        try:
            return await self._workbench.fold(entry)
        except Refused as refused:
            if refused.reason not in (Code.BLOB_MISSING, Code.BLOB_CORRUPT):
                raise
            log.warning("a part was lost here: it is fetched again", why=refused.what)
        members = tuple(each.node for each in entry.record.contributions)
        for part in entry.record.parts:
            if not self._blobs.has(part.digest):
                await self._courier.fetch_part(part, members)
        return await self._workbench.fold(entry)

    async def _save_base(self) -> None:
        """Without our own checkpoint a start takes longer, and that is all."""
        try:
            await self._workbench.save_base()
        except Refused as refused:
            if refused.reason not in (Code.DISK_CAP, Code.LIMIT):
                raise
            log.warning("the model was not saved", why=refused.what)
            self._tally.notice = f"{refused.reason.code}: the model was not saved: {refused.what}"
            self._supply.make_room()  # for the next time

    async def _rewind(self, signed: SignedRollback) -> None:
        """Go back to what a rollback leaves, and begin anew from there."""
        self._tell_of(signed)
        self._decider.post(session.PartStopped(session.Part.TRAINER))
        self._supply.clear()
        if not await self._workbench.rewind(signed):
            await self._liaison.retrying(self._load_newest_base)
        replica = self._workbench.replica
        assert replica.head is not None
        here = rounds.Rewound(replica.head, replica.branch, replica.digest, replica.state.consumed, replica.last)
        self._decider.step(here)
        self._spawn(self._start_trainer())

    async def _load_newest_base(self) -> None:
        page = await self._link.read_log(self._decider.rounds.head.round)
        self._liaison.learn_rollbacks(page.rollbacks)
        await self._load_base(page.base)

    def _tell_of(self, signed: SignedRollback) -> None:
        rollback = signed.rollback
        log.warning("rolled back", number=rollback.number, round=rollback.to.round, why=rollback.reason)
        why = f": {printable(rollback.reason)}" if rollback.reason else ""
        self._tally.notice = f"the researcher took the run back to round {rollback.to.round}{why}"

    # people

    async def _answer(self, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        match verb:
            case "status":
                return self.status()
            case "pause" | "resume" if not self._settings.training:
                what = "this node trains nothing that could be paused"
                raise Refused(Code.USAGE, what, fix="End it with: barnraise finish")
            case "pause":
                until = arguments.get("seconds")
                self._decider.post(session.PauseAsked(time.monotonic() + float(until) if until else None))
            case "resume":
                self._decider.post(session.ResumeAsked())
            case "finish":
                self._decider.post(session.FinishAsked())
                self._decider.post(rounds.Finishing())
                if not self._pending:
                    self._spawn(self._end_when_free())
            case "leave":
                self._end(Exit.OK, "left the run")
            case _:
                raise Refused(Code.FIELD, f"no such order: {verb}")
        await asyncio.sleep(2 * TICK_SECONDS)
        return self.status()

    async def _cap_logs(self) -> None:
        while True:
            await asyncio.to_thread(console.cap_logs, self._home.logs, LOG_BYTES_MAX)
            await asyncio.sleep(LOG_SECONDS)

    async def _report(self) -> None:
        while not self._ended.done():  # the last word is said by whoever ends the loop
            self._on_status(self.status())
            await asyncio.sleep(STATUS_SECONDS)

    def status(self) -> dict[str, Any]:
        """What people and scripts see."""
        return view(
            self._decider.session,
            self._decider.rounds if self._decider.begun else None,
            self._decider.rules,
            run=self._manifest.name,
            name=self._membership.opened.signed_pass.body.name,
            trainer=self._workbench.trainer,
            confinement=self._workbench.confinement if self._settings.training else "",
            tally=self._tally,
        )


def _is_said(said: Said) -> bool:
    return _is_signed(said.purpose, said.node, said.body, said.signature)


def _is_signed(purpose: str, node: NodeId, body: VoteBody, signature: str) -> bool:
    try:
        verify(node, purpose, vote_bytes(body), signature)
    except Refused:
        return False
    return True


def is_less(base: BaseCheckpoint, head: Head, update_bytes: int) -> bool:
    """Whether this base checkpoint is less to download than the updates that lead to it from our head.

    One that is no newer never is: nobody is taken back by being shown an old one."""
    return (base.round - head.round) * update_bytes > base.blob.size
