"""The coordinator's loop: events in, decisions by the pure machine, effects out. It owns every process and task."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import structlog

from coordinator import archive, orders, service, view, web
from coordinator.auditor import Auditor
from coordinator.core import audits, machine, strikes, watch
from coordinator.core import leases as data
from coordinator.core.reachability import Standstill
from coordinator.core.rosters import quorum
from coordinator.core.strikes import Kind
from coordinator.evaluation import Evaluator
from coordinator.folder import LOG_BYTES_MAX, Published, RunFolder
from coordinator.reach import HELPER_PORT, helper_command
from coordinator.recounter import Recounter
from coordinator.rendezvous import Rendezvous
from coordinator.store import Evaluation, Order, Store, backup_of
from protocol import address, console, p2pd
from protocol.address import Address
from protocol.blobs import BlobStore, disk_refusal
from protocol.errors import Code, Refused
from protocol.exchange import packing_of
from protocol.fold import fold, outer_of
from protocol.identity import Key, libp2p_private_key_bytes, sign_rollback, sign_roster
from protocol.limits import REASON_CHARACTERS_MAX
from protocol.log import (
    check_brought,
    genesis_head,
    head_after,
    is_certified,
    line_head,
    next_head,
    next_turn,
    ranges_of,
)
from protocol.runspec import RunSpec
from protocol.state import Consumed, Floats, write_base
from protocol.types import (
    BaseCheckpoint,
    Digest,
    Epoch,
    Fault,
    Head,
    LogEntry,
    NodeId,
    Rollback,
    RoundNumber,
    Shard,
    SignedManifest,
    SignedRollback,
)

IDENTITY = "p2p.identity"
DOOR = "door"  # the folder of the door's own sockets
TICK_SECONDS = 0.5
RENDEZVOUS_AGAIN_SECONDS = 5.0  # before another is started
ENDING_SECONDS = 5.0  # another may be there by then
DISK_SECONDS = 10.0  # between two looks whether it can be written to again
CHECKPOINT_BYTES = 4  # for each parameter
LOG_SECONDS = 60.0  # between two looks at how large the logs are
MISSED_HEARTBEATS = 3  # a node unheard of for so many is gone
WEIGHT_CAP = 1 << 40  # tokens of one node in one round; the run's robust rules bound what they do
LEASES_OF_A_NODE = 64  # leases that one node may hold at a time
DATA_OF_A_NODE = 8  # or this part of all data, if that is more: an outage of ours must not stop a fast node
SAMPLE_SECONDS = 10.0  # between two samples of text for the page
SAMPLE_TOKENS = 100
EVENTS_SHOWN = 60
ROLLBACKS_SHOWN = 10
NOBODY_TEXT = (
    "no node of this run can be called: all are behind routers that let nothing in, so no round can end. What helps is "
    f"a node that can, such as one here that only averages for the others, with TCP port {HELPER_PORT} open (and, if this "
    f"machine has another address outside, --announce ADDRESS:{HELPER_PORT})"
)

log = structlog.get_logger()


class Stopper(Protocol):
    """Set once when the researcher asks to stop."""

    polite: asyncio.Event


async def run(folder: RunFolder, *, stopper: Stopper, on_ready: Any = None) -> int:
    """Serve one run until asked to stop; from the start again where its disk was full meanwhile. Returns the exit code."""
    again = True
    while again:
        async with AsyncExitStack() as owned:
            coordinator = await Coordinator.open(folder, owned)
            if on_ready is not None:
                on_ready(coordinator.ports, coordinator.manifest.manifest)
            again = await coordinator.run(stopper)
    return 130


class Coordinator:
    """One run being served. What it decides is in coordinator.core; it also is the desk behind every door."""

    def __init__(self, folder: RunFolder, store: Store, blobs: BlobStore, published: Published) -> None:
        self._folder = folder
        self._published = published
        self.store = store
        self.blobs = blobs
        self.key: Key = folder.key()
        self.manifest: SignedManifest = published.manifest
        self.shards: tuple[Shard, ...] = store.shards()
        self.rendezvous: tuple[str, ...] = ()
        self.ports: dict[str, int] = {}
        self._spec: RunSpec = folder.spec()
        self.heartbeat_seconds = self._spec.coordinator.heartbeat_seconds
        self._clock_start = time.time() - time.monotonic()  # wall time that never jumps
        self._packing = packing_of(self._spec.update)
        self._outer = outer_of(self._spec.update)
        self._replica = archive.rebuild(store, blobs, published.manifest.manifest)
        self._rules = self._make_rules()
        self.state = self._restore()
        self._work: asyncio.Queue[machine.Fold | machine.Evaluate | machine.ArchiveBase | machine.Rewind] = (
            asyncio.Queue()
        )
        self._changed = asyncio.Event()  # set and replaced at every change of what the page shows
        self._news = asyncio.Event()  # the same, of what nodes are told
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._trouble: Refused | None = None  # of the disk, while nothing is decided
        self._rendezvous: Rendezvous | None = None
        self._evaluator: Evaluator | None = None
        self._to_measure: list[tuple[Floats, Evaluation, int]] = []  # parameters, what is known of them, their branch
        self._measure = asyncio.Event()
        self._measured = -1
        measured = store.history()
        self._watch = watch.of_history(measured, _rollbacks(self.state))
        wishes = self._spec.watch
        self._watch_rules = watch.Rules(wishes.rollback, wishes.jump, wishes.evaluations, wishes.most)
        self.auditor = Auditor(
            folder.runtime / "audits",
            published.manifest.manifest,
            self.shards,
            self._packing.up,
            share=self._spec.audit.share,
            archive=blobs,
            evaluator=lambda: self._evaluator,
            heard_ms=self._heard_ms,
            now_ms=self.now_ms,
            accuse=self._accuse,
        )
        self.recounter = Recounter(
            folder.runtime / "evidence",
            self._packing,
            share=self._spec.audit.share,
            heard_ms=self._heard_ms,
            now_ms=self.now_ms,
            strike=self._strike,
        )
        self._first = next((row for row in measured if row.heldout is not None), None)
        self._newest = measured[-1] if measured else None
        self._standstill = Standstill()
        self._sample = ""
        self._sampled_at = -math.inf

    # opening

    @classmethod
    async def open(cls, folder: RunFolder, owned: AsyncExitStack) -> Coordinator:
        """Everything that can refuse does so before anything listens."""
        owned.enter_context(folder.lock())
        store = folder.open_store()
        owned.callback(store.close)
        blobs = folder.open_blobs()
        published = await asyncio.to_thread(folder.publish, store, blobs)
        if not backup_of(store.path).exists():
            await asyncio.to_thread(store.backup)
        coordinator = cls(folder, store, blobs, published)
        owned.push_async_callback(coordinator._close)
        for order in store.open_orders():
            if order.kind == orders.JUDGE:
                coordinator._obey(order)  # before anybody is let in
        await coordinator._listen(owned)
        return coordinator

    def _make_rules(self) -> machine.Rules:
        spec = self._spec
        return machine.Rules(
            run=self.manifest.manifest.run,
            parameters=self.manifest.manifest.parameters,
            min_nodes=spec.run.min_nodes,
            rounds_goal=spec.run.rounds,
            absent_seconds=MISSED_HEARTBEATS * self.heartbeat_seconds + 1.0,
            lease_seconds=spec.leases.seconds,
            lease_sequences_max=spec.leases.sequences,
            lease_sequences_node_max=max(
                LEASES_OF_A_NODE * spec.leases.sequences,
                sum(shard.sequences for shard in self.shards) // DATA_OF_A_NODE,
            ),
            weight_cap=WEIGHT_CAP,
            evaluate_every=spec.evaluate.every_rounds,
            base_every=spec.evaluate.base_every_rounds,
            entry_is_certified=is_certified,
            check_brought=check_brought,
            manifest=genesis_head(self.manifest.manifest).hash,
        )

    def _restore(self) -> machine.State:
        """The machine as the database has it. Nodes come back by themselves; their leases wait for them."""
        entries, rollbacks = self.store.entries(), self.store.rollbacks()
        head, branch = self._head_at(len(entries))
        replica, self._replica_branch = self._head_at(self._replica.round)
        consumed, tokens = _taken(entries)
        newest = entries[-1].certificate.ballot.epoch if entries else Epoch(-1)
        unfolded = entries[self._replica.round :]
        history = {signed.roster.epoch: signed for signed in self.store.rosters()}
        leases = data.strike(self.store.load_leases(self.shards), consumed)
        until_ms = self.now_ms() + int(self._spec.leases.seconds * 1000)
        for lease in tuple(leases.held.values()):
            leases, _ = data.renew(leases, lease.node, [lease.lease_id], until_ms)
        return machine.State(
            head=head,
            replica=replica,
            replica_digest=self._replica.digest(),
            consumed=consumed,
            leases=leases,
            branch=branch,
            rollbacks=rollbacks,
            silent=self.store.silent(),
            trails=strikes.by_node(self.store.marks()),
            nodes={
                each.node: machine.Node(
                    each.node, each.peer, each.name, activity="left", seen=-1e9, credit_tokens=each.credit_tokens
                )
                for each in self.store.nodes()
            },
            rosters=tuple(
                signed
                for epoch, signed in sorted(history.items())
                if epoch >= newest and signed.roster.branch == branch
            ),
            history=history,
            next_epoch=Epoch(max(history, default=-1) + 1),
            recent=entries[-machine.RECENT_KEPT :],
            unfolded=unfolded,
            have=self._archived(unfolded),
            started=self._now(),
            tokens=tokens,
            events=tuple((ms / 1000, text) for ms, text in self.store.recent(EVENTS_SHOWN)),
        )

    async def _start_rendezvous(self, where: Address) -> Rendezvous:
        identity = self._folder.runtime / IDENTITY
        p2pd.write_identity(identity, libp2p_private_key_bytes(self._folder.peer_key()))
        return await Rendezvous.start(
            runtime_dir=self._folder.runtime,
            identity_path=identity,
            run=self.manifest.manifest.run,
            listen=where.multiaddrs,
            log=self._folder.log_file("rendezvous"),
        )

    async def _keep_rendezvous(self) -> None:
        """Nodes go on without one, but who moves is not found, and nobody is called to see whether others can."""
        where = address.parse(self._spec.coordinator.p2p)
        assert where is not None
        while self._rendezvous is not None:
            code = await asyncio.shield(self._rendezvous.closed)
            log.warning("the rendezvous has ended, another is started", code=code)
            await self._rendezvous.stop()
            await asyncio.sleep(RENDEZVOUS_AGAIN_SECONDS)
            try:
                self._rendezvous = await self._start_rendezvous(replace(where, port=self.ports["p2p"]))
            except Refused as refused:
                log.warning("no rendezvous yet", why=refused.what)
            await self._tell_rendezvous()

    async def _listen(self, owned: AsyncExitStack) -> None:
        names = self._spec.coordinator
        where = address.parse(names.p2p)
        assert where is not None
        self._rendezvous = await self._start_rendezvous(where)
        self.rendezvous = self._rendezvous.addresses
        page_at = address.parse(names.http)
        assert page_at is not None
        page = await web.serve(
            self, host=page_at.host, port=page_at.port, hosts=tuple(a.rpartition(":")[0] for a in names.addresses)
        )
        owned.push_async_callback(page.stop)
        # Last: whoever is let in is told at once where to find the others.
        tls_key, tls_certificate = self._folder.tls()
        door = await service.serve(
            service.CoordinatorService(self),
            listen=names.listen,
            key=tls_key,
            certificate=tls_certificate,
            sockets=self._folder.runtime / DOOR,
        )
        owned.push_async_callback(door.stop, 1.0)
        p2p_port = int(self.rendezvous[0].split("/")[4]) if self.rendezvous else where.port
        self.ports = {"grpc": door.port, "http": page.port, "p2p": p2p_port}
        self.store.set("ports", json.dumps(self.ports).encode())

    # the loop

    async def run(self, stopper: Stopper) -> bool:
        """Until asked to stop. True: the disk could not be written to, and can be now; another has to go on from what it has."""
        self._queue_evaluation(self._replica.round)  # first: what nodes have brought meanwhile is folded from here on
        self._spawn(self._tick())
        self._spawn(self._cap_logs())
        self._spawn(self._carry_out_slow())
        self._spawn(self._evaluate())
        self._spawn(self.auditor.run())
        self._spawn(self.auditor.read())
        self._spawn(self.recounter.run())
        await self._tell_rendezvous()
        self._spawn(self._keep_rendezvous())
        self._spawn(self._stop_when_asked(stopper))
        try:
            await self._ended
        except Refused:
            if self._trouble is None:
                raise
            await self._wait_for_the_disk(self._trouble, stopper)
            return not stopper.polite.is_set()
        return False

    async def _wait_for_the_disk(self, trouble: Refused, stopper: Stopper) -> None:
        """Decide nothing until the disk can be written to, and say so: what is in memory is ahead of it. Nodes may have what
        it holds meanwhile."""
        for task in self._tasks:
            task.cancel()
        self._show()
        self._call_all()
        log.error(f"{trouble}. {trouble.fix}")
        log.error("Nothing is decided until the disk can be written to; from then on the run goes on by itself")
        while not stopper.polite.is_set() and not self._can_write():
            with suppress(TimeoutError):
                await asyncio.wait_for(stopper.polite.wait(), DISK_SECONDS)

    def _can_write(self) -> bool:
        """Whether there is room for a checkpoint, and the database takes a word."""
        with suppress(Refused):
            self.store.set("written", b"%d" % self.now_ms())
            return self.blobs.has_room(CHECKPOINT_BYTES * self.manifest.manifest.parameters)
        return False

    async def _stop_when_asked(self, stopper: Stopper) -> None:
        await stopper.polite.wait()
        if not self._ended.done():
            self._ended.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._ended.done():
            return
        self._trouble = disk_refusal(error, self._folder.path)
        self._ended.set_exception(self._trouble or error)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in (self._evaluator, self._rendezvous):
            if child is not None:
                await child.stop()
        self.auditor.close()
        self.recounter.close()
        p2pd.sweep(self._folder.runtime)
        (self._folder.runtime / IDENTITY).unlink(missing_ok=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for order in self.store.open_orders():
                self._obey(order)
            self.submit(machine.Ticked())
            self._heed_reach()

    async def _cap_logs(self) -> None:
        while True:
            await asyncio.to_thread(console.cap_logs, self._folder.logs, LOG_BYTES_MAX)
            await asyncio.sleep(LOG_SECONDS)

    def _now(self) -> float:
        return self._clock_start + time.monotonic()

    # the desk

    def now_ms(self) -> int:
        return int(self._now() * 1000)

    def base(self) -> BaseCheckpoint:
        return self.store.newest_base() or self._published.base

    def finished(self) -> bool:
        """The last round is certified, archived and folded: nobody is needed any more."""
        return machine.run_is_over(self.state, self._rules) and self.state.replica == self.state.head

    def check_deciding(self) -> None:
        """Refuse whatever would need a decision, where there are none any more."""
        if self._trouble is not None:
            raise Refused(Code.UNREACHABLE, "the coordinator cannot write to its disk", retry_seconds=DISK_SECONDS)
        if self._ended.done():
            raise Refused(Code.UNREACHABLE, "the coordinator is ending", retry_seconds=ENDING_SECONDS)

    def stand_still(self, trouble: Refused) -> None:
        """The disk takes nothing: refuse, with what is told to others, and decide nothing until it does."""
        self._fail(trouble)
        self.check_deciding()

    def submit(self, event: machine.Event) -> tuple[machine.Effect, ...]:
        """Step the machine and carry out what follows; what must last is in the database when this returns."""
        self.check_deciding()
        newest = self.state.events[-1] if self.state.events else None
        try:
            self.state, effects = machine.step(self.state, event, self._now(), self._rules)
            self._write_down(newest)
            for effect in effects:
                self._carry_out(effect)
        except Exception as error:
            self._fail(error)  # what is in memory is ahead of what is on disk: only a new start brings them together
            if self._trouble is not None:
                self.check_deciding()  # our folder is none of the asker's business
            raise
        self._show()
        return effects

    def _write_down(self, newest: tuple[float, str] | None) -> None:
        """New lines of the run's history: to the log, and to the database."""
        events = self.state.events
        if not events or events[-1] == newest:
            return
        known = events.index(newest) + 1 if newest in events else 0
        for at, text in events[known:]:
            log.info(text)
            self.store.say(int(at * 1000), text)

    def _carry_out(self, effect: machine.Effect) -> None:
        match effect:
            case machine.SignRoster(roster):
                signed = sign_roster(self.key, roster)
                self.store.save_roster(signed)
                self.submit(machine.RosterSigned(signed))
                self._spawn(self._tell_rendezvous())
            case machine.SaveRosters(rosters):
                for each in rosters:
                    self.store.save_roster(each)
            case machine.SignRollback(rollback):
                self.submit(machine.Recalled((), (sign_rollback(self.key, rollback),)))
            case machine.BranchOff(number, reason):
                self.submit(machine.RollbackAsked(self._record_head(number), reason))
            case machine.TurnLog(turn):
                self._turn(turn)
            case machine.Call():
                self._spawn(self._call(effect))
            case machine.SaveLeases():
                self.store.save_leases(self.state.leases)
            case machine.SaveMarks(marks):
                self.store.add_marks(marks)
            case machine.SaveEntry(entry, leases):
                credit = {c.node: c.tokens for c in entry.record.contributions}
                self.store.append_entry(entry, credit, leases)
                self.auditor.certified(entry.record)
                self.recounter.certified(entry.record)
            case machine.Fold() | machine.Evaluate() | machine.ArchiveBase() | machine.Rewind():
                self._work.put_nowait(effect)
            case machine.Announce():
                self._call_all()
            case machine.GrantLeases():
                pass  # the door that asked finds it in what submit returns

    def _call_all(self) -> None:
        """Who waits for news looks whether there are any."""
        self._news.set()
        self._news = asyncio.Event()

    def _show(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    async def news(self) -> None:
        await self._news.wait()

    def part_stored(self, digest: Digest) -> None:
        self.submit(machine.PartStored(digest))
        self.auditor.stir()

    async def _tell_rendezvous(self) -> None:
        if self._rendezvous is not None and self.state.roster is not None:
            with suppress(Refused):
                await self._rendezvous.set_roster(member.peer for member in self.state.roster.roster.members)

    async def _call(self, order: machine.Call) -> None:
        answered: str | None = None
        with suppress(Refused):
            if self._rendezvous is not None:
                answered = await self._rendezvous.call(order.peer, order.addresses)
        self.submit(machine.Called(order.node, order.addresses, answered))

    def _heed_reach(self) -> None:
        """Tell the researcher, once each time, that no round can end, and what to type; the page names no folder."""
        before, now = self.nobody_callable, self._now()
        self._standstill = self._standstill.at(now, machine.nobody_is_callable(self.state, now, self._rules))
        if before and not self.nobody_callable:
            self.submit(machine.Noticed("a node can be called again, or nobody is here"))
        if self.nobody_callable and not before:
            code = Code.NOBODY_CALLABLE.code
            self.submit(machine.Noticed(f"{code} · no node of this run can be called, so no round can end"))
            log.warning(f"{code} · {NOBODY_TEXT}. On this machine, run: {helper_command(self._folder.path)}")

    @property
    def nobody_callable(self) -> bool:
        """So that no round can end, and the researcher was told."""
        return self._standstill.lasts

    # following the log

    async def _carry_out_slow(self) -> None:
        """Folds, checkpoints and orders to measure, one after the other: each sees the state of its own round."""
        while True:
            match await self._work.get():
                case machine.Fold(entry):
                    await self._fold(entry)
                case machine.Evaluate(round_number):
                    self._queue_evaluation(round_number)
                case machine.ArchiveBase():
                    await self._archive()
                case machine.Rewind():
                    await self._rewind()

    async def _fold(self, entry: LogEntry) -> None:
        if self.state.rewinding:
            return

        def apply() -> Digest:
            parts = {part.index: self.blobs.read(part.digest) for part in entry.record.parts}
            self.auditor.keep(self._replica.round, self._replica.params)
            fold(self._replica, entry.record, parts, self._packing, self._outer)
            self.auditor.keep(self._replica.round, self._replica.params)
            digest: Digest = self._replica.digest()
            return digest

        try:
            digest = await asyncio.to_thread(apply)
        except Refused as refused:
            if refused.reason not in (Code.RECORD_BAD, Code.UPDATE_BAD):
                raise
            self.submit(machine.Unfoldable(entry.record.round, refused.what))
            return
        _, self._replica_branch = line_head(next_head(entry.record), _rollbacks(self.state))
        self.submit(machine.Folded(entry.record.round, digest))
        self.auditor.stir()

    async def _archive(self) -> None:
        """Keep the replica as it is now, and a copy of the database that leads to it."""
        head, branch = self.state.replica, self.state.branch

        def write() -> BaseCheckpoint:
            with tempfile.TemporaryDirectory(dir=self._folder.runtime) as folder:
                path = Path(folder) / "base.safetensors"
                state = write_base(path, self._replica)
                return BaseCheckpoint(head.round, head.hash, state, self.blobs.put_file(path), branch)

        if self.state.rewinding:
            return
        try:
            base = await asyncio.to_thread(write)
        except Refused as refused:
            if refused.reason is not Code.LIMIT:
                raise
            self.submit(machine.Noticed(f"round {head.round} has no base checkpoint: {refused.what}"))
            return
        if self.state.branch == branch:  # else it was undone meanwhile
            self.store.save_base(base)
            try:
                await asyncio.to_thread(self.store.backup)
            except Refused as refused:
                self.submit(machine.Noticed(f"the database could not be copied: {refused.what}"))

    # rollbacks

    def _record_head(self, round_number: int) -> Head:
        """So many records, and the hash of the last of them."""
        if round_number == 0:
            return genesis_head(self.manifest.manifest)
        (entry,) = self.store.entries(round_number - 1, 1)
        return next_head(entry.record)

    def _head_at(self, round_number: int) -> tuple[Head, int]:
        """The line's head before this round, and its branch."""
        return line_head(self._record_head(round_number), (signed.rollback for signed in self.store.rollbacks()))

    def _is_undone(self, round_number: int, branch: int) -> bool:
        """Whether the log has since gone back beyond this state of an earlier branch."""
        return any(each.to.round < round_number for each in _rollbacks(self.state)[branch:])

    def _archived(self, entries: Sequence[LogEntry]) -> frozenset[Digest]:
        parts = {part.digest for entry in entries for part in entry.record.parts}
        return frozenset(digest for digest in parts if self.blobs.has(digest))

    def _obey(self, order: Order) -> None:
        """Carry out what a command asked for, or say why not."""
        try:
            match order.kind:
                case orders.ROLLBACK:
                    answer, done = self._roll_back(orders.RollbackOrder.from_bytes(order.body)), True
                case orders.JUDGE:
                    answer, done = self._judge(orders.JudgeOrder.from_bytes(order.body)), True
                case _:
                    raise Refused(Code.FIELD, f"no such order: {order.kind}")
        except Refused as refused:
            answer, done = refused.what, False
        self.store.close_order(order.order_id, answer=answer, done=done)

    def _roll_back(self, order: orders.RollbackOrder) -> str:
        """Go back, and say what that undid."""
        head, branch = self.state.head, self.state.branch
        if order.to > head.round:
            raise Refused(Code.RUN_MISSING, f"round {order.to}, the log has 0 to {head.round}")
        self.submit(machine.RollbackAsked(self._record_head(order.to), order.reason))
        if self.state.branch == branch:
            raise Refused(Code.ORDER_REFUSED, self.state.events[-1][1])
        if head.round == order.to:
            return f"round {order.to} stays; the run goes on with a new roster of those who are here"
        return f"{head.round - order.to} rounds are undone; the run goes on from round {order.to}"

    def _judge(self, order: orders.JudgeOrder) -> str:
        """Shut a node out or let it in again, and say what that meant."""
        known = self.state.nodes.get(order.node)
        if known is None:
            raise Refused(Code.PEER_UNKNOWN, f"node {order.node[:16]} was never admitted")
        now = self._now()
        shut, held = self.state.shut(order.node, now), len(self.state.leases.of(order.node))
        if order.kind is Kind.UNBAN and shut is None and not self.state.aside(order.node):
            raise Refused(Code.FIELD, f"{known.name} is not shut out")
        if order.kind is not Kind.UNBAN and shut is not None and shut.kind is Kind.BAN:
            raise Refused(Code.FIELD, f"{known.name} is banned already")
        until = now + order.seconds if order.kind is Kind.KICK else None
        self.submit(machine.Judged(order.node, order.kind, order.reason, until))
        stored = self.store.node(order.node)
        if order.revoke_invite and stored is not None and stored.invite is not None:
            self.store.revoke_invite(stored.invite)
        if order.kind is Kind.UNBAN:
            return f"{known.name} may come again; what was held against it counts no more"
        what = "is banned" if until is None else f"is sent away for {order.seconds // 60} min"
        return f"{known.name} {what}; {held} of its leases went back"

    def _turn(self, signed: SignedRollback) -> None:
        """What the rollback undoes is undone in the database first, all of it or nothing."""
        start = signed.rollback.to.round
        stay, undone = self.store.entries(0, start), self.store.entries(start)
        consumed, tokens = _taken(stay)
        freed = [each for entry in undone for each in ranges_of(entry.record)]
        leases = data.undo(self.state.leases, freed) if undone else self.state.leases
        passed = self.state.rollbacks[self.state.branch : signed.rollback.number - 1]  # undone by this one at once
        for digest in self.store.save_rollback(signed, leases, passed):
            self.blobs.delete(digest)
        head = head_after(signed.rollback)
        self._watch = watch.gone_back(self._watch, signed.rollback)
        self.auditor.gone_back(signed.rollback.to.round)
        self.recounter.gone_back(signed.rollback.to.round)
        self.submit(machine.RolledBack(signed, head, consumed, tokens, leases))

    async def _rewind(self) -> None:
        """The replica follows the line as the database has it now."""
        branch = self.state.branch
        due = next_turn(self._replica.round, self._replica_branch, _rollbacks(self.state))
        if due is not None and due.to.round < self._replica.round:
            rebuild = archive.rebuild
            self._replica = await asyncio.to_thread(rebuild, self.store, self.blobs, self.manifest.manifest)
        if self.state.branch != branch:
            return  # there is a later one to follow
        unfolded = self.store.entries(self._replica.round)
        head, self._replica_branch = self._head_at(self._replica.round)
        self.submit(machine.Rewound(head, self._replica.digest(), unfolded, self._archived(unfolded)))
        self._queue_evaluation(self._replica.round)

    # measuring

    def _queue_evaluation(self, round_number: RoundNumber) -> None:
        """The newest state replaces one that still waits, but for the first: measuring never holds up the log."""
        nodes = [node for node in self.state.nodes.values() if node.activity != "left"]
        losses = [node.train_loss for node in nodes if node.train_loss is not None]
        facts = Evaluation(
            round=round_number,
            tokens=self.state.tokens - _taken(self.state.unfolded)[1],  # the replica may be behind the log
            heldout=None,
            train=sum(losses) / len(losses) if losses else None,
            ms=self.now_ms(),
            nodes=len(nodes),
            bytes=sum(node.bytes_sent for node in self.state.nodes.values()),
        )
        del self._to_measure[1 if self._measured < 0 else 0 :]
        self._to_measure.append((self._replica.params.copy(), facts, self.state.branch))
        self._measure.set()

    async def _evaluate(self) -> None:
        manifest, spec, corpus = self.manifest.manifest, self._spec, self._published.corpus
        self._evaluator = await Evaluator.start(
            folder=self._folder.runtime,
            model_config=manifest.model_config,
            parameters=manifest.parameters,
            heldout=self.blobs.path(corpus.heldout.digest),
            token_bytes=manifest.token_bytes,
            context=manifest.context,
            sequences=spec.evaluate.sequences,
            tokenizer=self.blobs.path(manifest.tokenizer.digest) if manifest.tokenizer else None,
            audited=self.auditor.folders,
            log=self._folder.log_file("evaluator"),
        )
        self.auditor.stir()
        while True:
            await self._measure.wait()
            params, facts, branch = self._to_measure.pop(0)
            if not self._to_measure:
                self._measure.clear()
            round_number = facts.round
            heldout = await self._evaluator.loss(params)
            if self._is_undone(round_number, branch):
                continue
            self._newest = replace(facts, heldout=heldout)
            self._first = self._first or self._newest
            self.store.save_evaluation(self._newest)
            self._heed(round_number, heldout)
            over = machine.run_is_over(self.state, self._rules)
            if over or time.monotonic() - self._sampled_at > SAMPLE_SECONDS:
                self._sampled_at = time.monotonic()
                prompt = spec.evaluate.prompt
                written = await self._evaluator.sample(params, prompt, tokens=SAMPLE_TOKENS, seed=round_number)
                self._sample = prompt + written
            self._measured = round_number
            self._show()

    def _heed(self, round_number: RoundNumber, heldout: float | None) -> None:
        """Go back by itself, or warn, if the watch says so."""
        self._watch, verdict = watch.watch(self._watch, round_number, heldout, self._watch_rules)
        if verdict is not None:
            self.auditor.alarm()
        if isinstance(verdict, watch.GoBack):
            reason, branch = verdict.reason[:REASON_CHARACTERS_MAX], self.state.branch
            self.submit(machine.RollbackAsked(self._record_head(verdict.to), reason))
            if self.state.branch == branch:  # refused so soon after a start: the next measurement orders it again
                self._watch = replace(self._watch, said=False)
        elif verdict is not None:
            self.submit(machine.Noticed(verdict))

    # audits

    def _heard_ms(self, node: NodeId) -> float:
        known = self.state.nodes.get(node)
        return -math.inf if known is None else known.seen * 1000

    def _accuse(self, accusation: audits.Accusation) -> None:
        """What an audit has found is held against its author."""
        evidence = accusation.evidence, accusation.void
        self._strike(accusation.node, accusation.fault, accusation.round, accusation.reason, *evidence)

    def _strike(
        self,
        node: NodeId,
        fault: Fault,
        round_number: RoundNumber,
        reason: str,
        evidence: Digest,
        void: tuple[Digest, ...] = (),
    ) -> None:
        self.submit(machine.Struck(node, fault, round_number, reason, evidence, void))

    # the page

    def history(self, limit: int) -> Sequence[Mapping[str, Any]]:
        return [
            {
                "round": row.round,
                "tokens": row.tokens,
                "heldout": row.heldout,
                "train": row.train,
                "ms": row.ms,
                "nodes": row.nodes,
                "bytes": row.bytes,
            }
            for row in self.store.history(limit)
        ]

    def view(self) -> Mapping[str, Any]:
        """What the page and the API show. No address of anybody is in it."""
        state, manifest = self.state, self.manifest.manifest
        rostered = state.roster.roster.nodes if state.roster else ()
        sent = sum(node.bytes_sent for node in state.nodes.values())
        rounds = max(1, state.head.round)
        contributions = max(1, sum(1 for node in state.nodes.values() if node.credit_tokens))
        return {
            "run": {
                "name": manifest.name,
                "title": self._spec.run.title,
                "round": state.head.round,
                "rounds_goal": self._spec.run.rounds,
                "tokens": state.tokens,
                "state": self._sentence(),
                "started_ms": int(self.state.started * 1000),
                "parameters": manifest.parameters,
                "codec": self._packing.up.name,
            },
            "loss": {
                "heldout": self._newest.heldout if self._newest else None,
                "heldout_first": self._first.heldout if self._first else None,
                "train": self._newest.train if self._newest else None,
            },
            "nodes": [
                {
                    "name": node.name,
                    "node": node.node[:8],
                    "activity": node.activity,
                    "round": node.head_round,
                    "tokens_per_second": node.tokens_per_second,
                    "credit_tokens": node.credit_tokens,
                    "busy_share": node.busy_share,
                    "last_seen_s": self._now() - node.seen if node.seen > 0 else None,
                    "rostered": node.node in rostered,
                    "held": strikes.standing(state.trails.get(node.node, ()), state.head.round, self.now_ms()),
                }
                for node in sorted(state.nodes.values(), key=lambda node: node.name)
            ],
            "bytes": {
                "per_round": sent / rounds,
                "total": sent,
                "per_parameter_per_round": sent / rounds / contributions / manifest.parameters,
            },
            "events": [{"ms": int(at * 1000), "text": text} for at, text in reversed(state.events[-EVENTS_SHOWN:])],
            "rollbacks": [view.rollback(each) for each in reversed(_rollbacks(state)[-ROLLBACKS_SHOWN:])],
            "sample": self._sample,
            "head": state.head.hash,
        }

    def _sentence(self) -> str:
        """The run's state in one sentence."""
        state = self.state
        if self._trouble is not None:
            return f"{self._trouble.reason.code} · nothing is decided until the run's disk can be written to"
        if machine.run_is_over(state, self._rules):
            behind = not self.finished() or self._measured < state.head.round
            return "finishing: the last round is being measured" if behind else "finished"
        if self.nobody_callable:
            code = Code.NOBODY_CALLABLE
            return f"{code.code} · waiting for a node that the others can call. {code.fix}"
        active = [node for node in state.nodes.values() if node.present(self._now(), self._rules)]
        if state.roster is None:
            active = [node for node in active if node.activity != machine.HELPS]
            return f"waiting for nodes: {len(active)} of {self._rules.min_nodes} are here"
        rostered = state.roster.roster.nodes
        here = sum(1 for node in active if node.node in rostered)
        if here < quorum(len(rostered)):
            return f"waiting for a majority: {here} of {len(rostered)} rostered nodes are here"
        return f"training with {here} node{'s' if here != 1 else ''}"


def _rollbacks(state: machine.State) -> tuple[Rollback, ...]:
    return tuple(signed.rollback for signed in state.rollbacks[: state.branch])


def _taken(entries: Sequence[LogEntry]) -> tuple[Consumed, int]:
    """The data that these records have consumed, and its tokens."""
    consumed, tokens = Consumed(), 0
    for entry in entries:
        consumed = consumed.with_ranges(ranges_of(entry.record))
        tokens += sum(contribution.tokens for contribution in entry.record.contributions)
    return consumed, tokens
