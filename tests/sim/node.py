"""One node: the real machines, a disk that survives, and edges made of luck."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

from coordinator.core import machine
from node.core import rounds, session, witness
from node.core.rounds import Rounds, group
from node.progress import Carry, Drop, Offer, Progress, Settle, resume
from protocol.canonical import digest
from protocol.contribution import grant_of
from protocol.evidence import Vouched
from protocol.exchange import layout
from protocol.log import head_after, next_head, ranges_of, record_hash
from protocol.messages import Accepted, Begin, LogReply, LogRequest, Message, Vote
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    DataRange,
    Digest,
    Epoch,
    Exchange,
    Grant,
    Lease,
    LogEntry,
    NodeId,
    Part,
    Role,
    Roster,
    SignedRollback,
    SignedRoster,
    VoteBody,
)
from tests.sim.faults import SLOW
from tests.sim.invariants import (
    CONTEXT,
    GENESIS,
    GENESIS_STATE,
    RUN,
    InvariantBroken,
    Known,
    Spans,
    brings,
    everyone_brought,
    is_brought,
    is_said,
    is_vouched,
    sign,
    sign_proposal,
    span,
    state_after,
    vouch,
)
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.coordinator import Page, Pulse, SimCoordinator
    from tests.sim.liar import Lie
    from tests.sim.world import World

PARAMETERS = 16 * 65536
WITNESS_RULES = witness.Rules(RUN, is_said, everyone_brought)
UPDATE = digest("an encoded vector")
TICK_SECONDS = 1.0
HEARTBEAT_SECONDS = 3.0
ASK_SECONDS = 3.0  # after which a question to the coordinator is asked again
ALONE_SECONDS = 10.0  # without the coordinator a node starts from its own disk after so long
LOG_PAGE = 16  # entries in one answer, as in the daemon
SLOW_ANSWERS = 8.0  # times longer are the ways to and from a slow node


@dataclass(frozen=True)
class Swarm:
    """What the nodes are like, and the rules they follow."""

    nodes: int
    ahead_rounds: int = 4  # data held for so many rounds
    stale_rounds: int = 3
    steps: tuple[int, ...] = (3, 5, 8)  # of a round; one of them for each node
    speeds: tuple[float, float] = (1.0, 6.0)  # inner steps in a second
    start_seconds: float = 20.0
    round_seconds_max: float = 30.0
    gather_seconds: float = 1.0
    attempt_seconds_max: float = 12.0
    load_seconds: float = 2.0  # from a node's start to its first step, at most
    save_seconds: float | None = None  # between two saves of local progress
    exchange: Exchange = Exchange.ALL_REDUCE
    pace_seconds: float = 0.0  # of a round for each member: what they upload is capped
    behind_routers: int = 0  # so many of the nodes can be called by nobody
    helpers: int = 0  # the first so many average for the others, and train nothing
    liars: Mapping[int, Lie] = field(default_factory=dict)  # which of the nodes

    @classmethod
    def of(cls, luck: Random, *, seed: int) -> Swarm:
        helped, nodes = seed % 7 == 5, luck.randint(2, 7)  # by one that all can call, and that is all of its kind
        return cls(
            exchange=Exchange.ALL_GATHER if seed % 3 == 2 else Exchange.ALL_REDUCE,
            pace_seconds=0.7 if seed % 5 == 4 else 0.0,
            nodes=nodes + helped,
            behind_routers=nodes if helped else nodes // 2 if seed % 7 == 3 else 0,
            helpers=int(helped),
            ahead_rounds=luck.choice((2, 4, 40)),
            stale_rounds=luck.choice((1, 3, 8)),
            save_seconds=luck.choice((None, 2.0, 10.0)),
        )


@dataclass
class Disk:
    """What survives a kill."""

    life: int = 0
    log: list[LogEntry] = field(default_factory=list)
    branch: int = 0  # rollbacks that the log has followed
    rollbacks: tuple[SignedRollback, ...] = ()
    rosters: dict[Epoch, SignedRoster] = field(default_factory=dict)
    silent: Epoch = Epoch(-1)
    sealed: Epoch = Epoch(-1)
    promise: tuple[Digest, Ballot, Accepted | None] | None = None
    parts: set[Digest] = field(default_factory=set)
    leases: dict[str, Lease] = field(default_factory=dict)
    progress: Progress | None = None  # trained, not certified: as it was at the last save

    def copied(self) -> Disk:
        fresh = copy.copy(self)
        fresh.log, fresh.rosters, fresh.parts = list(self.log), dict(self.rosters), set(self.parts)
        fresh.leases = dict(self.leases)
        return fresh


@dataclass
class Averaging:
    """One group's reduction: who joined, and what each reducer made of it."""

    joined: set[NodeId] = field(default_factory=set)
    reduced: dict[NodeId, Part | None] = field(default_factory=dict)


class SimNode(Process):
    def __init__(self, world: World, index: int) -> None:
        self.me = NodeId(f"node{index:02d}")
        super().__init__(world, self.me)
        luck, swarm = world.luck, world.swarm
        self.disk = Disk()
        self.backup: Disk | None = None
        self.helper = index < swarm.helpers
        self.behind_router = index >= swarm.nodes - swarm.behind_routers
        self.slow = SLOW if luck.random() < world.weather.slow_nodes else 1.0
        self.speed = luck.uniform(*swarm.speeds)
        self.inner_steps = luck.choice(swarm.steps)
        steps = self.inner_steps
        self.rules = rounds.Rules(
            me=self.me,
            run=RUN,
            parameters=PARAMETERS,
            context=CONTEXT,
            inner_steps=lambda _round: steps,
            exchange=lambda roles: Exchange.ALL_REDUCE if Role.CLIENT in roles else swarm.exchange,
            part_is_vouched=is_vouched,
            is_data=lambda _data: True,
            round_seconds_min=lambda members: swarm.pace_seconds * members,
            round_seconds_max=swarm.round_seconds_max,
            gather_seconds=swarm.gather_seconds,
            attempt_seconds_min=2.0,
            attempt_seconds_max=swarm.attempt_seconds_max,
            stale_rounds=swarm.stale_rounds,
            sign=lambda body: sign(self.me, body),
            vote_is_valid=lambda node, body, signature: signature == sign(node, body),
            sign_proposal=lambda body: sign_proposal(self.me, body),
            proposal_is_valid=lambda node, body, signature: signature == sign_proposal(node, body),
            brings=brings,
            is_brought=is_brought,
            entry_is_certified=certified,
        )
        self.witness = witness.Witness()
        world.at(luck.uniform(0, swarm.start_seconds) if index >= 2 else 0.0, self.start)

    # life and death

    def leave(self) -> None:
        """A polite end: a last promise on disk, a word to the coordinator that may be lost, and nothing more."""
        if not self.awake:
            return
        seal = rounds.seal(self.rounds, linked=self.session.linked)
        if seal is not None:
            self.disk.sealed = seal.epoch
        life, coordinator = self.life, self.world.coordinator
        self.kill()
        self.world.deliver(
            self.me, coordinator.name, lambda: coordinator.take(lambda: coordinator.left(self.me, life, seal))
        )

    def put_back(self, luck: Random) -> bool:
        """While it is down, its disk is replaced by an older copy, or by nothing at all but its key.

        Older means: older than the newest life that the coordinator has heard of. That is all that it can notice."""
        assert not self.alive
        told = self.world.coordinator.store.lives.get(self.me, (0, 0))[0]
        copies = [copy for copy in (self.backup, Disk()) if copy is not None and copy.life < told]
        if not copies:
            return False
        self.disk = (copies[0] if luck.random() < 0.8 else copies[-1]).copied()
        self.world.truth.forgot(self.me)
        return True

    def start(self) -> None:
        if self.alive:
            return
        self.begin()
        luck, disk = self.world.luck, self.disk
        self.clock_offset = luck.uniform(0, 1e6)  # a machine's own count of seconds begins anywhere
        self.world.note(f"{self.me} starts")
        disk.life += 1
        known = self._replayed()
        promise = disk.promise if disk.promise is not None and disk.promise[0] == known.head.hash else None
        self.rounds = Rounds(
            head=known.head,
            digest=known.state,
            consumed=known.consumed,
            rosters=dict(disk.rosters),
            branch=disk.branch,
            rollbacks=disk.rollbacks,
            silent=disk.silent,
            sealed=disk.sealed,
            last=disk.log[-1] if disk.log else None,
            ballot=promise[1] if promise else Ballot(Epoch(-1), 0),
            accepted=promise[2] if promise else None,
        )
        self.session = session.Session(helper=self.helper, sequences_wanted=4)
        self.grants = [grant_of(lease) for lease in disk.leases.values()]
        self.queue: list[DataRange] = []
        self.since_snapshot: list[DataRange] = []
        self.brought: Spans = []  # handed to a round, not certified yet
        self.steps = 0
        self.step_credit = 0.0
        self.training = False
        self.rewinds = 0
        self.later(luck.uniform(0.05, 1.0) * self.world.swarm.load_seconds, self._ready)
        self.later(TICK_SECONDS, self._tick)
        self.later(0.05, self._heartbeat)
        if self.world.swarm.save_seconds:
            self.later(self.world.swarm.save_seconds, self._keep_progress)

    def _replayed(self) -> Known:
        """The state that the disk's log leads to."""
        head, state, consumed = GENESIS, GENESIS_STATE, Consumed()
        for entry in self.disk.log:
            head, state = next_head(entry.record), state_after(state, entry.record)
            consumed = consumed.with_ranges(ranges_of(entry.record))
        if self.disk.branch:
            rollback = self.disk.rollbacks[self.disk.branch - 1].rollback
            head = head_after(rollback) if rollback.to.round == head.round else head
        return Known(head, self.disk.branch, state, consumed)

    def _resume(self) -> None:
        """What was trained in a former life, as far as the log has no other use for it."""
        progress, state, log = self.disk.progress, self.rounds, self.disk.log
        if progress is None:
            return
        found = resume(
            progress,
            state.consumed,
            lambda number: log[number] if number < len(log) else None,
            head=state.head,
            branch=state.branch,
            stale_rounds=self.rules.stale_rounds,
        )
        match found:
            case Offer(contribution, missed):
                self.brought = [span(each) for each in contribution.ranges]
                self.rounds_event(rounds.WorkFound(missed, contribution=contribution))
            case Carry(contribution, missed, _):
                self.brought = [span(each) for each in contribution.ranges]
                self.rounds_event(rounds.WorkFound(missed, carried=contribution))
            case Settle(_, missed):
                self.rounds_event(rounds.WorkFound(missed))
            case Drop():
                self.disk.progress = None

    def _ready(self) -> None:
        self.session_event(session.PartReady(session.Part.ENGINE))
        self._open()
        self.later(ALONE_SECONDS, self._start_alone)

    def _open(self) -> None:
        """Open a session and read the coordinator's log."""

        def answer(life: int, silent: Epoch, page: Page) -> None:
            self.disk.life = max(self.disk.life, life)
            self._silence(silent)
            self.session_event(session.LinkOpened())
            self._log(page)
            self.disk.sealed = Epoch(-1)
            self.rounds_event(rounds.Unsealed())
            self._begin()

        process, life, head = self.life, self.disk.life, self.rounds.head.round
        self._call(lambda c: c.open(self.me, process, life, head), answer)
        self.later(ASK_SECONDS, lambda: None if self.session.linked else self._open())

    def _start_alone(self) -> None:
        """A node that cannot reach the coordinator goes on from its own disk."""
        if self.world.weather.node_backups:
            return  # only the coordinator can tell it that its disk is an old one
        if self.disk.life > 1:
            self._begin()

    def _begin(self) -> None:
        if self.session.synced:
            return
        self._resume()
        self.session_event(session.CaughtUp())
        self._start_trainer()

    def _start_trainer(self) -> None:
        """It gets what is leased and neither in a record nor on its way to one."""
        if self.helper:
            return
        state = self.rounds
        waiting = [c for c in (state.contribution, state.carried) if c is not None]
        used = state.consumed.with_ranges(each for contribution in waiting for each in contribution.ranges)
        self.queue = [r for lease in self.disk.leases.values() for r in rounds.unused((lease.range,), used)]
        self.since_snapshot, self.steps = [], 0
        self.session_event(session.DataUsed(_sequences(self.queue), self._wanted()))
        self.session_event(session.PartReady(session.Part.TRAINER))

    def _silence(self, epoch: Epoch) -> None:
        if epoch > self.disk.silent:
            self.disk.silent = epoch
            self.rounds_event(rounds.Silenced(epoch))

    # time

    def _tick(self) -> None:
        self.later(TICK_SECONDS, self._tick)
        if self.training and self.queue:
            self.step_credit += self.speed / self.slow * TICK_SECONDS
            while self.step_credit >= 1 and self.queue:
                self._train()
            self.rounds_event(rounds.Progressed(self.steps))
            self.session_event(session.DataUsed(_sequences(self.queue), self._wanted()))
        else:
            self.rounds_event(rounds.Ticked())
            self.session_event(session.TimePassed())
        if self.world.weather.node_backups and self.alive and self.world.luck.random() < 0.02:
            self.backup = self.disk.copied()

    def _wanted(self) -> int:
        return self.world.swarm.ahead_rounds * self.inner_steps

    def _train(self) -> None:
        """As many steps as are due, on the first data in the queue."""
        first = self.queue.pop(0)
        done = min(int(self.step_credit), first.stop - first.start)
        cut = first.start + done
        if cut < first.stop:
            self.queue.insert(0, DataRange(first.pass_number, first.shard, cut, first.stop))
        last = self.since_snapshot[-1] if self.since_snapshot else None
        start = first.start
        if last and (last.pass_number, last.shard, last.stop) == (first.pass_number, first.shard, start):
            self.since_snapshot.pop()
            start = last.start
        self.since_snapshot.append(DataRange(first.pass_number, first.shard, start, cut))
        self.step_credit -= done
        self.steps += done

    def _keep_progress(self) -> None:
        assert self.world.swarm.save_seconds is not None
        self.later(self.world.swarm.save_seconds, self._keep_progress)
        state = self.rounds
        idle = state.phase is rounds.Phase.TRAINING and state.contribution is None and not state.snapshot_asked
        if idle and self.session.trainer_ready:
            self._save_progress(offered=False)

    def _save_progress(self, *, offered: bool) -> None:
        state = self.rounds
        ranges = tuple(self.since_snapshot)
        brought = rounds.combine(state.carried, ranges, self._grants_of(ranges), state.consumed, self.rules)
        if offered:
            brought = brings(state.head, replace(brought, update=UPDATE))
        if brought.ranges:
            self.disk.progress = Progress(state.head, state.branch, state.missed, brought, offered)

    def _grants_of(self, ranges: tuple[DataRange, ...]) -> tuple[Grant, ...]:
        return tuple(grant for grant in self.grants if any(grant.range.overlaps(each) for each in ranges))

    # the coordinator

    def _heartbeat(self) -> None:
        self.later(HEARTBEAT_SECONDS, self._heartbeat)
        state = self.rounds
        beat = machine.HeartbeatArrived(
            node=self.me,
            activity=session.activity(self.session).value,
            head_round=state.head.round,
            epoch=max(state.rosters, default=-1),
            addresses=("/ip4/127.0.0.1/tcp/1",),
            source="127.0.0.1" if self.world.swarm.behind_routers else "",
            branch=len(state.rollbacks),
            lease_ids=tuple(self.disk.leases),
        )
        process, life = self.life, self.disk.life

        def answer(pulse: Pulse) -> None:
            self.disk.life = max(self.disk.life, pulse.life)
            self._silence(pulse.silent)
            self._learn(pulse.rollbacks, (pulse.roster,) if pulse.roster else ())
            head = self.rounds.head.round
            if head >= pulse.head_round:
                self._lose(set(beat.lease_ids) - pulse.renewed)
            if pulse.head_round > head and self.rounds.committed is None:
                self._call(lambda c: c.read_log(self.rounds.head.round), self._log)
            for entry in self.disk.log[pulse.wanted_from : pulse.wanted_from + LOG_PAGE]:
                self._push(entry)
            for part in pulse.wanted:
                if part.digest in self.disk.parts:
                    self._call(lambda c, d=part.digest: c.store_part(d), lambda *_: None)

        self._call(lambda c: c.heartbeat(beat, process, life, state.head.hash), answer)

    def _learn(self, rollbacks: tuple[SignedRollback, ...], rosters: tuple[SignedRoster, ...]) -> None:
        """On disk before anything is signed under it."""
        known = len(self.disk.rollbacks)
        news = tuple(signed for signed in rollbacks if signed.rollback.number > known)
        if news:
            assert news[0].rollback.number == known + 1
            self.disk.rollbacks += news
            self.rounds_event(rounds.RollbacksArrived(news))
        for signed in rosters:
            if signed.roster.epoch not in self.disk.rosters:
                self.disk.rosters[signed.roster.epoch] = signed
                self.rounds_event(rounds.RosterArrived(signed))

    def _log(self, page: Page) -> None:
        self._learn(page.rollbacks, page.rosters)
        self.rounds_event(rounds.LogArrived(page.entries, page.rosters))

    def _push(self, entry: LogEntry) -> None:
        """With what the coordinator signed itself: its database may be an older one."""
        known, least = self.disk.rosters, min(entry.record.epoch, entry.certificate.ballot.epoch)
        rosters = tuple(signed for epoch, signed in sorted(known.items()) if epoch >= least)
        rollbacks = self.disk.rollbacks
        self._call(lambda c: c.push(entry, rosters, rollbacks), lambda *_: None)

    def _lease(self, sequences: int) -> None:
        answered = []

        def answer(granted: tuple[Lease, ...]) -> None:
            answered.append(1)
            self.disk.leases |= {lease.lease_id: lease for lease in granted}
            self.grants += map(grant_of, granted)
            if self.session.trainer_ready:  # else the next one gets it
                self.queue += [lease.range for lease in granted]
            self.session_event(session.LeasesArrived(_sequences([lease.range for lease in granted])))

        self._call(lambda c: c.lease(self.me, sequences), answer)
        self.later(ASK_SECONDS, lambda: None if answered else self.session_event(session.LeasesArrived(0)))

    def _lose(self, lease_ids: set[str]) -> None:
        held = self.disk.leases
        gone = [held.pop(lease_id).range for lease_id in sorted(lease_ids) if lease_id in held]
        if gone:
            self.queue = [r for r in self.queue if not any(r.overlaps(each) for each in gone)]
            self.session_event(session.DataUsed(_sequences(self.queue), self._wanted()))

    def _call(self, ask: Callable[[SimCoordinator], tuple[object, ...]], answer: Callable[..., None]) -> None:
        """One question to the coordinator: either way can fail, and it may have been carried out all the same.

        It goes over a connection, which ends with the coordinator, and is worth nothing once a newer process of ours
        has opened a session."""
        process, world, coordinator = self.life, self.world, self.world.coordinator
        slowness, asked = SLOW_ANSWERS if self.slow > 1 else 1.0, coordinator.life

        def request() -> None:
            if coordinator.sessions.get(self.me, (0, 0))[0] > process:
                return
            result = ask(coordinator)
            if coordinator.life == asked:
                hear = lambda: self.take(lambda: answer(*result), process)  # noqa: E731
                world.deliver(coordinator.name, self.me, hear, slowness=slowness, once=True)

        arrive = lambda: coordinator.take(request, asked)  # noqa: E731
        world.deliver(self.me, coordinator.name, arrive, slowness=slowness, once=True)

    # the machines

    def asked(self, event: session.Event) -> None:
        """By the volunteer."""
        self.take(lambda: self.session_event(event))

    def session_event(self, event: session.Event) -> None:
        if not self.alive:
            return
        before = self.session.votes, self.session.trains
        self.session, effects = session.step(self.session, event, self.clock)
        for effect in effects:
            match effect:
                case session.SetTraining(on):
                    self.training = on
                case session.AcquireLeases(sequences):
                    self._lease(sequences)
                case session.Release():
                    pass  # memory of a device is nothing that a simulation has
                case _:
                    raise AssertionError(f"unexpected {effect}")
        after = self.session.votes, self.session.trains
        if after != before:
            self.rounds_event(rounds.ActivityChanged(*after))

    def rounds_event(self, event: rounds.Event) -> None:
        if not self.alive:
            return
        before = self.rounds
        self.rounds, effects = rounds.step(before, event, self.clock, self.rules)
        self._check(before)
        for effect in effects:
            if self.world.strikes():
                self.kill()
                self.world.at(self.world.trouble.restart_seconds(), self.start)
                return
            self._do(effect)
            if isinstance(effect, rounds.Send) and isinstance(effect.message, Vote):
                self.world.trouble.voted(self)
            if not self.alive:
                return

    def _check(self, before: Rounds) -> None:
        state, truth = self.rounds, self.world.truth
        if state.head is not before.head or state.digest is not before.digest or state.branch != before.branch:
            truth.replica_is_true(state.head, state.digest, state.consumed, state.branch, self.me)
        truth.attempt_is_bounded(state, self.clock, self.rules, self.me)
        if state.contribution is before.contribution and state.carried is before.carried and state.head is before.head:
            return
        self.brought = truth.work_is_kept(state, self.brought, self.me)

    def _do(self, effect: rounds.Effect) -> None:
        world = self.world
        match effect:
            case rounds.TakeSnapshot():
                rewinds = self.rewinds
                self.later(world.luck.uniform(0.01, 0.4), lambda: self._snapshot(rewinds))
            case rounds.SaveVote(_, ballot, accepted, previous):
                kept = self.disk.promise
                if kept is not None and kept[0] == previous and ballot < kept[1]:
                    raise AssertionError(f"{self.me} took back a promise")
                self.disk.promise = (previous, ballot, accepted)
            case rounds.Send(to, message):
                self._send(to, message)
            case rounds.Average(begin, roster, seconds):
                self._average(begin, roster, seconds)
            case rounds.StopAveraging():
                pass
            case rounds.FetchParts(parts, sources):
                self.later(world.luck.uniform(0.05, 1.0), lambda: self._fetch(parts, sources))
            case rounds.Fold(entry):
                self._fold(entry)
            case rounds.Turn(signed):
                self.disk.branch = signed.rollback.number
            case rounds.Rewind(signed):
                self._rewind(signed)
            case rounds.TellLog(to, start):
                self._tell_log(to, start)

    def _send(self, to: tuple[NodeId, ...], message: Message) -> None:
        world = self.world
        world.said(self.me, message)
        for receiver in to:
            if receiver == self.me:
                self.later(0.0, lambda: self.rounds_event(rounds.Received(message, "s")))
            elif receiver in world.nodes:
                self._deliver(world.nodes[receiver], message)

    def _deliver(self, receiver: SimNode, message: Message) -> None:
        """Straight; or, between two that nobody can call, by way of one that everybody can."""
        world = self.world
        slowness = SLOW_ANSWERS if max(self.slow, receiver.slow) > 1 else 1.0
        hear = lambda: receiver.take(lambda: receiver.hear(message))  # noqa: E731
        if not self.cannot_call(receiver.me):
            world.deliver(self.me, receiver.me, hear, slowness=slowness)
            return
        carrier = world.luck.choice([node for node in world.nodes.values() if not node.behind_router])
        carry = lambda: world.deliver(carrier.me, receiver.me, hear, slowness=slowness)  # noqa: E731
        world.deliver(self.me, carrier.me, lambda: carrier.take(carry), slowness=slowness)

    def cannot_call(self, other: str) -> bool:
        return self.behind_router and other in self.world.nodes and self.world.nodes[NodeId(other)].behind_router

    def hear(self, message: Message) -> None:
        match message:
            case LogRequest(round=start, sender=sender):
                self._tell_log(sender, start)
            case LogReply(entries=entries, rosters=rosters, rollbacks=rollbacks):
                self._learn(rollbacks, rosters)
                self.rounds_event(rounds.LogArrived(entries, rosters))
            case _:
                state = self.rounds
                self.witness, lies = witness.hear(self.witness, message, state.rosters, state.head.round, WITNESS_RULES)
                for evidence in lies:  # what crashes, old disks and bad networks bring about must strike nobody
                    if evidence.said.node not in self.world.truth.liars:
                        raise InvariantBroken(f"{self.me} would accuse {evidence.said.node}: {evidence}")
                    self._call(lambda c, found=evidence: c.report(found), lambda *_: None)
                self.rounds_event(rounds.Received(message, "s"))

    def _tell_log(self, to: NodeId, start: int) -> None:
        disk = self.disk
        entries = tuple(disk.log[start : start + LOG_PAGE])
        last = disk.log[-1].certificate.ballot.epoch if disk.log else Epoch(0)
        rosters = named(entries, disk.rosters) | {e: s for e, s in disk.rosters.items() if e >= last}
        self._send((to,), LogReply(RUN, start, self.me, entries, tuple(rosters.values()), disk.rollbacks))  # type: ignore[arg-type]

    # edges

    def _snapshot(self, rewinds: int) -> None:
        if rewinds != self.rewinds:
            return
        if self.world.swarm.save_seconds is not None and self.world.luck.random() < 0.5:
            self._save_progress(offered=True)
        else:
            self.disk.progress = None  # before a round hears of more than it says
        ranges, self.since_snapshot, self.steps = tuple(self.since_snapshot), [], 0
        self.brought += map(span, ranges)
        self.rounds_event(rounds.SnapshotTaken(ranges, self._grants_of(ranges), UPDATE))

    def _average(self, begin: Begin, roster: Roster, seconds: float) -> None:
        world = self.world
        key = (begin.ballot, begin.readies[0].ready.previous)
        averaging = world.averagings.setdefault(key, Averaging())
        averaging.joined.add(self.me)
        weights = dict(group(begin, roster))
        members = list(weights)
        index = members.index(self.me)
        roles = [member.role for member in roster.members if member.node in weights]
        exchange = self.rules.exchange(roles)
        start, stop = layout(exchange, PARAMETERS, roles)[index]

        def came(node: NodeId) -> bool:
            there = world.nodes[node].awake and world.reaches(node, self.me) and not self.cannot_call(node)
            return node == self.me or (there and world.luck.random() >= world.weather.reduce_failure)

        def reduce() -> None:
            included = tuple(n for n in members if weights[n] and n in averaging.joined and came(n))
            if exchange is Exchange.ALL_GATHER:
                included = (self.me,)
            part = None
            if included and start < stop:
                hashed = digest((begin.ballot, key[1], index, included))
                part = Part(index, start, stop, hashed, (stop - start) // 2, self.me, included)
                tokens = tuple(weights[node] for node in included)
                epoch, previous = begin.ballot.epoch, begin.readies[0].ready.previous
                part = vouch(Vouched(RUN, begin.round, previous, epoch, exchange, tokens, part))
                self.disk.parts.add(hashed)
            averaging.reduced[self.me] = part

        def finish() -> None:
            held: dict[int, Digest] = {}
            for node, part in averaging.reduced.items():
                if part is not None and came(node):
                    held[part.index] = part.digest
                    self.disk.parts.add(part.digest)
            self.rounds_event(rounds.Averaged(begin.ballot, averaging.reduced.get(self.me), held))

        slowness = SLOW_ANSWERS if self.slow > 1 else 1.0
        took = world.luck.uniform(0.3, 1.0) * slowness
        if took < seconds:
            self.later(took, reduce)
        self.later(min(seconds, world.luck.uniform(1.0, 2.0) * slowness), finish)

    def _fetch(self, parts: tuple[Part, ...], sources: tuple[NodeId, ...]) -> None:
        world = self.world
        coordinator = world.coordinator

        def both_ways(name: str) -> bool:
            return world.reaches(name, self.me) and world.reaches(self.me, name) and not self.cannot_call(name)

        around = [world.nodes[s].disk.parts for s in sources if world.nodes[s].awake and both_ways(s)]
        around.append(self.disk.parts)
        if coordinator.awake and both_ways(coordinator.name):
            around.append(coordinator.store.parts)
        found = frozenset(part.digest for part in parts if any(part.digest in held for held in around))
        lost = frozenset(part.digest for part in parts) - found
        self.disk.parts |= found
        if found:
            self.rounds_event(rounds.PartsArrived(found))
        if lost:
            self.rounds_event(rounds.PartsLost(lost))

    def _fold(self, entry: LogEntry) -> None:
        world, disk = self.world, self.disk
        world.entry_certified(entry, self.me)
        assert len(disk.log) == entry.record.round, f"{self.me} folds round {entry.record.round} out of order"
        assert all(part.digest in disk.parts for part in entry.record.parts), f"{self.me} folds parts that it lacks"
        disk.log.append(entry)
        state = state_after(self.rounds.digest, entry.record)

        def done() -> None:
            missed = rounds.missed_after(self.rounds, entry.record)
            waiting = [c for c in (self.rounds.contribution, self.rounds.carried) if c is not None]
            dropped = tuple(r for c in waiting for r in c.ranges) if missed > self.rules.stale_rounds else ()
            if dropped:
                world.counts["stale work dropped"] += 1
                self.brought = []
            self.rounds_event(rounds.Folded(entry.record.round, state))
            if self.alive:
                self._folded(entry, dropped)

        self.later(world.luck.uniform(0.01, 0.2) * self.slow, done)

    def _folded(self, entry: LogEntry, dropped: tuple[DataRange, ...]) -> None:
        disk, consumed = self.disk, self.rounds.consumed
        disk.life += 1
        again = rounds.unused(dropped, consumed)
        leased = [lease.range for lease in disk.leases.values()]
        if self.session.trainer_ready:
            self.queue += [common for a in again for b in leased if (common := a.common(b)) is not None]
        disk.leases = {i: lease for i, lease in disk.leases.items() if not consumed.covers(lease.range)}
        taken = Consumed().with_ranges(ranges_of(entry.record))
        if any(taken.overlaps(each) for each in self.queue):
            self.queue = [rest for each in self.queue for rest in taken.rests(each)]
            self.session_event(session.DataUsed(_sequences(self.queue), self._wanted()))
        self._push(entry)

    def _rewind(self, signed: SignedRollback) -> None:
        """The log is shorter at once; the state follows. Whatever was trained here was trained on what is undone."""
        rollback, disk = signed.rollback, self.disk
        self.session_event(session.PartStopped(session.Part.TRAINER))
        disk.leases.clear()
        disk.log = disk.log[: rollback.to.round]
        disk.branch, disk.progress = rollback.number, None
        self.rewinds += 1
        for each in (self.queue, self.since_snapshot, self.brought):
            each.clear()
        self.steps = 0

        def done() -> None:
            known = self._replayed()
            last = disk.log[-1] if disk.log else None
            self.rounds_event(rounds.Rewound(known.head, known.branch, known.state, known.consumed, last))
            self.later(0.1, self._start_trainer)

        self.later(self.world.luck.uniform(0.05, 1.0), done)


def certified(entry: LogEntry, roster: Roster) -> bool:
    certificate = entry.certificate
    if certificate.record != record_hash(entry.record) or certificate.ballot.epoch != roster.epoch:
        return False
    body = VoteBody(RUN, entry.record.round, certificate.ballot, certificate.record)
    signers = {s.node for s in certificate.signatures if roster.member(s.node) and s.value == sign(s.node, body)}
    return len(signers) >= roster.quorum


def named(entries: tuple[LogEntry, ...], rosters: dict[Epoch, SignedRoster]) -> dict[Epoch, SignedRoster]:
    epochs = {epoch for entry in entries for epoch in (entry.record.epoch, entry.certificate.ballot.epoch)}
    return {epoch: rosters[epoch] for epoch in sorted(epochs) if epoch in rosters}


def _sequences(ranges: tuple[DataRange, ...] | list[DataRange]) -> int:
    return sum(each.stop - each.start for each in ranges)
