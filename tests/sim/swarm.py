"""The simulated world: real node and coordinator machines, a virtual clock, and a network that misbehaves by seed.

Only the edges are simulated: messages are delayed, lost and doubled, averaging ends with whoever is there, disks keep
what was saved, processes are killed between two effects. After every event the invariants are checked.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from dataclasses import dataclass, field, replace

from coordinator.core import machine as coordinator
from coordinator.core.leases import Leases
from node.core import rounds, session
from node.core.rounds import Rounds, group
from protocol.log import record_hash, spans
from protocol.messages import Accepted, Begin, LogReply, LogRequest, Message, Propose, Ready, Vote
from protocol.state import Consumed
from protocol.types import (
    Ballot,
    DataRange,
    Digest,
    Epoch,
    Head,
    Lease,
    LogEntry,
    NodeId,
    Part,
    PeerId,
    Roster,
    RoundNumber,
    RunId,
    Seal,
    Shard,
    SignedRoster,
    VoteBody,
)

RUN = RunId("00.sim")
PARAMETERS = 16 * 65536
CONTEXT = 16
GENESIS = Digest("0" * 64)
HEARTBEAT_SECONDS = 2.0
TICK_SECONDS = 0.5
CALM_SECONDS = 60.0  # after the last fault everyone must have gone on within this
LATE_SECONDS = 20.0  # how long a message can stay on its way
LOG_PAGE = 16  # entries in one answer, as in the daemon


def _hash(*words: object) -> Digest:
    return Digest(hashlib.sha256(repr(words).encode()).hexdigest())


def sign(node: NodeId, body: VoteBody) -> str:
    return _hash("signature", node, body)


def certified(entry: LogEntry, roster: Roster) -> bool:
    certificate = entry.certificate
    if certificate.record != record_hash(entry.record) or certificate.ballot.epoch != roster.epoch:
        return False
    body = VoteBody(RUN, entry.record.round, certificate.ballot, certificate.record)
    signers = {s.node for s in certificate.signatures if roster.member(s.node) and s.value == sign(s.node, body)}
    return len(signers) >= roster.quorum


@dataclass(frozen=True)
class Faults:
    """How bad the world is; all chances are per message or per second."""

    loss: float = 0.02
    delay_max: float = 0.3
    crash_per_minute: float = 0.3
    pause_per_minute: float = 0.1
    coordinator_crash_per_minute: float = 0.1
    reduce_failure: float = 0.05
    partition_per_minute: float = 0.1
    late: float = 0.01  # of messages that come when nobody expects them any more
    doubled: float = 0.01
    crash_per_effect: float = 0.0005  # a process ends between two effects of one step
    leave_per_minute: float = 0.2


CALM = Faults(0.0, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class InvariantBroken(AssertionError):
    pass


@dataclass
class Disk:
    """What survives a kill."""

    log: list[LogEntry] = field(default_factory=list)
    promised: Ballot = Ballot(Epoch(-1), 0)
    accepted: Accepted | None = None
    vote_round: int = 0
    parts: set[Digest] = field(default_factory=set)
    rosters: dict[Epoch, SignedRoster] = field(default_factory=dict)


@dataclass
class Averaging:
    """One group's reduction: who joined, and what each reducer made of it."""

    joined: dict[NodeId, float] = field(default_factory=dict)
    reduced: dict[NodeId, Part | None] = field(default_factory=dict)


class World:
    """Virtual time, the network, and everything that happens on it."""

    def __init__(self, seed: int, *, faults: Faults | None = None, nodes: int | None = None) -> None:
        self.luck = random.Random(seed)
        self.seed = seed
        self.faults = faults if faults is not None else Faults()
        self.now = 0.0
        self._queue: list[tuple[float, int, object]] = []
        self._serial = 0
        self.certified: dict[int, Digest] = {}
        self.records: dict[int, LogEntry] = {}
        self.states: dict[int, Digest] = {0: _hash("state", 0)}
        self.spent = Consumed()
        self.averagings: dict[object, Averaging] = {}
        self.promises: dict[tuple[NodeId, int], Ballot] = {}
        self.votes: dict[tuple[NodeId, int, Ballot], Digest] = {}
        self.proposals: dict[tuple[int, Ballot], Digest] = {}
        self.decided: dict[int, Digest] = {}  # what a majority voted for, whether or not anybody knows
        self.cut: set[frozenset[str]] = set()
        self.trace: list[str] = []
        self.counts: Counter[str] = Counter()
        self.coordinator = SimCoordinator(self, min_nodes=2)
        count = nodes if nodes is not None else self.luck.randint(2, 6)
        self.nodes = {node.me: node for node in (SimNode(self, index) for index in range(count))}

    # time

    def at(self, seconds: float, action: object) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (self.now + seconds, self._serial, action))

    def run(self, until: float) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()  # type: ignore[operator]
        self.now = until

    # network

    def reaches(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut

    def deliver(self, sender: str, receiver: str, action: object, *, once: bool = False) -> None:
        if not self.reaches(sender, receiver) or self.luck.random() < self.faults.loss:
            self.counts["lost"] += 1
            return
        for _ in range(1 if once or self.luck.random() >= self.faults.doubled else 2):
            late = self.luck.random() < self.faults.late
            self.at(self.luck.uniform(0.001, LATE_SECONDS if late else self.faults.delay_max), action)

    def crashes_now(self) -> bool:
        return self.luck.random() < self.faults.crash_per_effect

    def restart_seconds(self) -> float:
        """A supervisor starts a process again at once; a person takes their time."""
        return self.luck.uniform(0.05, 0.5) if self.luck.random() < 0.5 else self.luck.uniform(1.0, 30.0)

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:9.3f}  {text}")

    # invariants

    def entry_certified(self, entry: LogEntry, who: str) -> None:
        record = entry.record
        hashed = record_hash(record)
        known = self.certified.get(record.round)
        if known is not None and known != hashed:
            raise InvariantBroken(f"seed {self.seed}: {who} has another record for round {record.round}")
        if known is None:
            ranges = tuple(r for c in record.contributions for r in c.ranges)
            for used in ranges:
                if self.spent.overlaps(used):
                    raise InvariantBroken(f"seed {self.seed}: {used} is in two certified records")
            self.spent = self.spent.with_ranges(ranges)
            self.certified[record.round] = hashed
            self.records[record.round] = entry
            self.note(f"round {record.round} certified by {who}")

    def said(self, node: NodeId, message: Message) -> None:
        """What single-decree Paxos rests on, checked as it leaves a node."""
        match message:
            case Ready(round=number, ballot=ballot):
                known = self.promises.get((node, number), ballot)
                self.promises[node, number] = max(known, ballot)
            case Vote(round=number, ballot=ballot, record=record):
                if self.promises.get((node, number), ballot) > ballot:
                    raise InvariantBroken(f"seed {self.seed}: {node} signs {ballot} below its promise")
                if self.votes.setdefault((node, number, ballot), record) != record:
                    raise InvariantBroken(f"seed {self.seed}: {node} signs two records in {ballot} of round {number}")
                roster = self.coordinator.rosters[ballot.epoch].roster
                voters = [n for n in roster.nodes if self.votes.get((n, number, ballot)) == record]
                if len(voters) >= roster.quorum and self.decided.setdefault(number, record) != record:
                    raise InvariantBroken(f"seed {self.seed}: two majorities signed two records in round {number}")
            case Propose(round=number, ballot=ballot, record=proposed):
                hashed = record_hash(proposed)
                if self.proposals.setdefault((number, ballot), hashed) != hashed:
                    raise InvariantBroken(f"seed {self.seed}: {node} proposes twice in {ballot} of round {number}")

    def folded(self, round_number: int, digest: Digest, who: str) -> None:
        known = self.states.setdefault(round_number, digest)
        if known != digest:
            raise InvariantBroken(f"seed {self.seed}: {who} has another state {round_number}")

    # faults

    def misbehave(self, seconds: float) -> None:
        """Plan every fault of the next `seconds` from the seed."""
        faults = self.faults
        for node in self.nodes.values():
            for start in self._times(faults.crash_per_minute, seconds):
                self.at(start, node.kill)
                self.at(start + self.restart_seconds(), node.start)
            for start in self._times(faults.leave_per_minute, seconds):
                self.at(start, node.leave)
                self.at(start + self.restart_seconds(), node.start)
            for start in self._times(faults.pause_per_minute, seconds):
                self.at(start, lambda n=node: n.session_event(session.PauseAsked(None)))
                self.at(start + self.luck.uniform(1, 30), lambda n=node: n.session_event(session.ResumeAsked()))
        for start in self._times(faults.coordinator_crash_per_minute, seconds):
            self.at(start, self.coordinator.kill)
            self.at(start + self.luck.uniform(1, 40), self.coordinator.start)
        names = ["coordinator", *self.nodes]
        for start in self._times(faults.partition_per_minute, seconds):
            side = {name for name in names if self.luck.random() < 0.4}
            links = {frozenset((a, b)) for a in side for b in names if b not in side}
            self.at(start, lambda links=links: self.cut.update(links))
            self.at(start + self.luck.uniform(1, 30), lambda links=links: self.cut.difference_update(links))

    def _times(self, per_minute: float, seconds: float) -> list[float]:
        times, at = [], 0.0
        while per_minute > 0:
            at += self.luck.expovariate(per_minute / 60)
            if at >= seconds:
                break
            times.append(at)
        return times

    def heal(self) -> None:
        self.faults = CALM
        self.cut.clear()
        self.coordinator.start()
        for node in self.nodes.values():
            node.start()
            node.session_event(session.ResumeAsked())


class SimNode:
    """One node: the real machines, and edges made of luck."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.me = NodeId(f"node{index:02d}")
        self.disk = Disk()
        self.alive = False
        self.life = 0  # counts restarts, so that events of a former life are dropped
        self.speed = world.luck.uniform(1.0, 6.0)
        self.inner_steps = world.luck.choice([3, 5, 8])
        steps = self.inner_steps
        self.rules = rounds.Rules(
            me=self.me,
            run=RUN,
            parameters=PARAMETERS,
            context=CONTEXT,
            inner_steps=lambda _round: steps,
            round_seconds_max=30.0,
            gather_seconds=1.0,
            attempt_seconds_min=2.0,
            attempt_seconds_max=12.0,
            stale_rounds=1000,
            sign=lambda body: sign(self.me, body),
            vote_is_valid=lambda node, body, signature: signature == sign(node, body),
            entry_is_certified=certified,
        )
        world.at(world.luck.uniform(0, 20) if index >= 2 else 0.0, self.start)

    # life and death

    def kill(self) -> None:
        if self.alive:
            self.world.note(f"{self.me} killed")
            self.world.counts["kills"] += 1
        self.alive = False
        self.life += 1

    def leave(self) -> None:
        """A polite end: a last promise on disk, a word to the coordinator that may be lost, and nothing more."""
        if not self.alive:
            return
        seal = None
        if (sealed := rounds.seal(self.rounds)) is not None:
            seal, vote = sealed
            self._do(vote)
        life = self.life
        self.kill()
        self.world.counts["leaves"] += 1

        def arrive() -> None:
            if self.world.coordinator.alive:
                self.world.coordinator.left(self.me, life, seal)

        self.world.deliver(self.me, "coordinator", arrive)

    def start(self) -> None:
        if self.alive:
            return
        self.alive = True
        self.life += 1
        self.world.note(f"{self.me} starts")
        digest, consumed = _hash("state", 0), Consumed()
        head = Head(RoundNumber(0), GENESIS)
        for entry in self.disk.log:
            consumed = consumed.with_ranges(tuple(r for c in entry.record.contributions for r in c.ranges))
            digest = _hash(digest, record_hash(entry.record))
            head = Head(RoundNumber(entry.record.round + 1), record_hash(entry.record))
        same = self.disk.vote_round == head.round
        self.rounds = Rounds(
            head=head,
            digest=digest,
            consumed=consumed,
            rosters=dict(self.disk.rosters),
            last=self.disk.log[-1] if self.disk.log else None,
            ballot=self.disk.promised if same else Ballot(Epoch(-1), 0),
            accepted=self.disk.accepted if same else None,
        )
        self.session = session.Session(sequences_wanted=4)
        self.leases: list[Lease] = []
        self.queue: list[DataRange] = []
        self.since_snapshot: list[DataRange] = []
        self.brought: list[DataRange] = []  # handed to a round, not certified yet
        self.steps = 0
        self.step_credit = 0.0
        self.training = False
        self._later(self.world.luck.uniform(0.1, 2.0), self._ready)
        self._later(TICK_SECONDS, self._tick)
        self._later(0.05, self._heartbeat)

    def _later(self, seconds: float, action: object) -> None:
        life = self.life
        self.world.at(seconds, lambda: action() if self.alive and self.life == life else None)  # type: ignore[operator]

    def _ready(self) -> None:
        self.session_event(session.PartReady(session.Part.TRAINER))
        self.session_event(session.PartReady(session.Part.ENGINE))
        self._sync()

    def _sync(self) -> None:
        """Read the coordinator's log; a node that cannot reach it starts from its own."""

        def answer(entries: tuple[LogEntry, ...], rosters: tuple[SignedRoster, ...]) -> None:
            self.session_event(session.LinkOpened())
            self._log(entries, rosters)
            self.rounds = replace(self.rounds, ballot=rounds.lifted(self.rounds.ballot))
            self.session_event(session.CaughtUp())

        self._call(lambda c: c.open(self.me, self.life, self.rounds.head.round), answer)
        if not self.session.synced:
            self._later(3.0, lambda: None if self.session.synced else self._sync())

    def _tick(self) -> None:
        self._later(TICK_SECONDS, self._tick)
        if self.training and self.queue:
            self.step_credit += self.speed * TICK_SECONDS
            while self.step_credit >= 1 and self.queue:
                self.step_credit -= 1
                self._inner_step()
            self.rounds_event(rounds.Progressed(self.steps))
            left = sum(r.stop - r.start for r in self.queue)
            self.session_event(session.DataUsed(left, 4 * self.inner_steps))
        self.session_event(session.TimePassed())
        self.rounds_event(rounds.Ticked())

    def _inner_step(self) -> None:
        first = self.queue.pop(0)
        following = first.start + 1
        if following < first.stop:
            self.queue.insert(0, DataRange(first.pass_number, first.shard, following, first.stop))
        last = self.since_snapshot.pop() if self.since_snapshot else first
        if (last.pass_number, last.shard, last.stop) == (first.pass_number, first.shard, first.start):
            self.since_snapshot.append(DataRange(first.pass_number, first.shard, last.start, following))
        else:
            self.since_snapshot += [] if last is first else [last]
            self.since_snapshot.append(DataRange(first.pass_number, first.shard, first.start, following))
        self.steps += 1

    def _heartbeat(self) -> None:
        self._later(HEARTBEAT_SECONDS, self._heartbeat)
        beat = coordinator.HeartbeatArrived(
            node=self.me,
            activity=session.activity(self.session).value,
            head_round=self.rounds.head.round,
            epoch=max(self.rounds.rosters, default=-1),
            addresses=("/ip4/127.0.0.1/tcp/1",),
            lease_ids=tuple(lease.lease_id for lease in self.leases),
        )

        def answer(roster: SignedRoster | None, head: int, wanted: tuple[Part, ...]) -> None:
            if roster is not None:
                self.disk.rosters[roster.roster.epoch] = roster
                self.rounds_event(rounds.RosterArrived(roster))
            if head > self.rounds.head.round and self.rounds.committed is None:
                self._call(lambda c: c.read_log(self.rounds.head.round), lambda e, r: self._log(e, r))
            if head < self.rounds.head.round:
                for entry in self.disk.log[head : head + 8]:
                    self._call(lambda c, e=entry: c.push(e), lambda *_: None)
            for part in wanted:
                if part.digest in self.disk.parts:
                    self._call(lambda c, d=part.digest: c.store_part(d), lambda *_: None)

        self._call(lambda c: c.heartbeat(beat), answer)

    def _log(self, entries: tuple[LogEntry, ...], rosters: tuple[SignedRoster, ...]) -> None:
        for signed in rosters:
            self.disk.rosters[signed.roster.epoch] = signed
        self.rounds_event(rounds.LogArrived(entries, rosters))

    def _call(self, ask: object, answer: object) -> None:
        """One RPC to the coordinator: either leg can be lost."""
        life, world = self.life, self.world

        def request() -> None:
            result = ask(world.coordinator) if world.coordinator.alive else None  # type: ignore[operator]
            if result is not None and world.coordinator.alive:
                world.deliver("coordinator", self.me, lambda: hear(result), once=True)

        def hear(result: tuple[object, ...]) -> None:
            if self.alive and self.life == life:
                answer(*result)  # type: ignore[operator]

        world.deliver(self.me, "coordinator", request, once=True)

    # the machines

    def session_event(self, event: session.Event) -> None:
        if not self.alive:
            return
        before = self.session.takes_part
        self.session, effects = session.step(self.session, event, self.world.now)
        for effect in effects:
            match effect:
                case session.SetTraining(on):
                    self.training = on
                case session.AcquireLeases(sequences):
                    self._lease(sequences)
                case session.Restart() | session.End():
                    raise InvariantBroken(f"seed {self.seed_text()}: unexpected {effect}")
        if self.session.takes_part != before:
            self.rounds_event(rounds.ActivityChanged(self.session.takes_part))

    def seed_text(self) -> str:
        return f"{self.world.seed}"

    def _lease(self, sequences: int) -> None:
        answered = []

        def answer(granted: tuple[Lease, ...]) -> None:
            answered.append(1)
            self.leases += granted
            self.queue += [lease.range for lease in granted]
            self.session_event(session.LeasesArrived(sum(g.range.stop - g.range.start for g in granted)))

        self._call(lambda c: c.lease(self.me, sequences), answer)
        self._later(3.0, lambda: None if answered else self.session_event(session.LeasesArrived(0)))

    def rounds_event(self, event: rounds.Event) -> None:
        if not self.alive:
            return
        self.rounds, effects = rounds.step(self.rounds, event, self.world.now, self.rules)
        self._check(event)
        for effect in effects:
            if self.world.crashes_now():
                self.kill()
                self.world.at(self.world.restart_seconds(), self.start)
            if not self.alive:
                return
            self._do(effect)

    def _check(self, event: rounds.Event) -> None:
        """A replica at round r has digest r, and trained data is either in a record or still on its way to one."""
        state, seed = self.rounds, self.world.seed
        if self.world.states.get(state.head.round) != state.digest:
            raise InvariantBroken(f"seed {seed}: {self.me} is at round {state.head.round} with another state")
        if not isinstance(event, rounds.SnapshotTaken | rounds.Folded):
            return
        pending = [c for c in (state.contribution, state.carried) if c is not None]
        ranges = [r for contribution in pending for r in contribution.ranges]
        if sum(c.tokens for c in pending) != sum(r.stop - r.start for r in ranges) * CONTEXT:
            raise InvariantBroken(f"seed {seed}: {self.me} brings {pending}")
        self.brought = [r for r in self.brought if not state.consumed.overlaps(r)]
        known = Consumed().with_ranges(ranges)
        lost = [r for r in self.brought if not known.overlaps(r)]
        if lost:
            raise InvariantBroken(f"seed {seed}: {self.me} lost {lost}")

    def _do(self, effect: rounds.Effect) -> None:
        world = self.world
        match effect:
            case rounds.TakeSnapshot():
                self._later(world.luck.uniform(0.01, 0.4), self._snapshot)
            case rounds.SaveVote(round_number, ballot, accepted):
                if self.disk.vote_round == round_number and ballot < rounds.lifted(self.disk.promised):
                    raise InvariantBroken(f"seed {world.seed}: {self.me} took back a promise")
                self.disk.vote_round, self.disk.promised, self.disk.accepted = round_number, ballot, accepted
            case rounds.Send(to, message):
                world.said(self.me, message)
                for receiver in to:
                    if receiver == self.me:
                        self._later(0.0, lambda m=message: self.rounds_event(rounds.Received(m, "s")))
                    else:
                        world.deliver(self.me, receiver, lambda r=receiver, m=message: world.nodes[r].hear(m))
            case rounds.Average(begin, roster, seconds):
                self._average(begin, roster, seconds)
            case rounds.StopAveraging():
                pass
            case rounds.FetchParts(parts, sources):
                self._later(world.luck.uniform(0.05, 1.0), lambda: self._fetch(parts, sources))
            case rounds.Fold(entry):
                self._fold(entry)

    def hear(self, message: object) -> None:
        if not self.alive:
            return
        if isinstance(message, LogRequest):
            entries = tuple(self.disk.log[message.round : message.round + LOG_PAGE])
            last = self.disk.log[-1].certificate.ballot.epoch if self.disk.log else Epoch(0)
            rosters = named(entries, self.disk.rosters) | {e: s for e, s in self.disk.rosters.items() if e >= last}
            reply = LogReply(RUN, message.round, self.me, entries, tuple(rosters.values()))
            self.world.deliver(self.me, message.sender, lambda: self.world.nodes[message.sender].hear(reply))
        elif isinstance(message, LogReply):
            self._log(message.entries, message.rosters)
        else:
            self.rounds_event(rounds.Received(message, "s"))  # type: ignore[arg-type]

    def _snapshot(self) -> None:
        ranges, self.since_snapshot, self.steps = tuple(self.since_snapshot), [], 0
        self.brought += ranges
        self.rounds_event(rounds.SnapshotTaken(ranges))

    def _average(self, begin: Begin, roster: Roster, seconds: float) -> None:
        world = self.world
        key = (begin.round, begin.ballot, begin.readies[0].ready.previous)
        averaging = world.averagings.setdefault(key, Averaging())
        averaging.joined[self.me] = world.now
        members = [node for node, _ in group(begin, roster)]
        weights = dict(group(begin, roster))
        index = members.index(self.me)
        roles = [member.role for member in roster.members if member.node in weights]
        start, stop = spans(PARAMETERS, roles)[index]

        def reduce() -> None:
            included = tuple(
                node
                for node in members
                if weights[node]
                and node in averaging.joined
                and world.nodes[node].alive
                and (
                    node == self.me
                    or (world.reaches(node, self.me) and world.luck.random() >= world.faults.reduce_failure)
                )
            )
            part = None
            if included:
                digest = _hash(key, index, included)
                part = Part(index, start, stop, digest, (stop - start) // 2, self.me, included)
                self.disk.parts.add(digest)
            averaging.reduced[self.me] = part

        def finish() -> None:
            held: dict[int, Digest] = {}
            for node, part in averaging.reduced.items():
                if part is None or not world.nodes[node].alive:
                    continue
                if node == self.me or (
                    world.reaches(node, self.me) and world.luck.random() >= world.faults.reduce_failure
                ):
                    held[part.index] = part.digest
                    self.disk.parts.add(part.digest)
            self.rounds_event(rounds.Averaged(begin.ballot, averaging.reduced.get(self.me), held))

        self._later(min(seconds, world.luck.uniform(0.3, 1.0)), reduce)
        self._later(min(seconds, world.luck.uniform(1.0, 2.0)), finish)

    def _fetch(self, parts: tuple[Part, ...], sources: tuple[NodeId, ...]) -> None:
        world = self.world
        found = {
            part.digest
            for part in parts
            if part.digest in self.disk.parts
            or any(
                world.nodes[s].alive and world.reaches(s, self.me) and part.digest in world.nodes[s].disk.parts
                for s in sources
            )
            or (
                world.coordinator.alive
                and world.reaches("coordinator", self.me)
                and part.digest in world.coordinator.parts
            )
        }
        self.disk.parts |= found
        if found:
            self.rounds_event(rounds.PartsArrived(frozenset(found)))
        lost = frozenset(part.digest for part in parts) - found
        if lost:
            self.rounds_event(rounds.PartsLost(lost))

    def _fold(self, entry: LogEntry) -> None:
        self.world.entry_certified(entry, self.me)
        if len(self.disk.log) != entry.record.round:
            raise InvariantBroken(f"seed {self.world.seed}: {self.me} folds round {entry.record.round} out of order")
        if not all(part.digest in self.disk.parts for part in entry.record.parts):
            raise InvariantBroken(f"seed {self.world.seed}: {self.me} folds parts that it lacks")
        self.disk.log.append(entry)
        digest = _hash(self.rounds.digest, record_hash(entry.record))
        self.world.folded(entry.record.round + 1, digest, self.me)

        def done() -> None:
            self.rounds_event(rounds.Folded(entry.record.round, digest))
            self._call(lambda c: c.push(entry), lambda *_: None)

        self._later(self.world.luck.uniform(0.01, 0.2), done)


class SimCoordinator:
    """The coordinator's machine with a database that survives."""

    def __init__(self, world: World, *, min_nodes: int) -> None:
        self.world = world
        self.alive = False
        self.shard = Shard(_hash("shard"), 1 << 20, 1 << 20, 100_000)
        self.rules = coordinator.Rules(
            run=RUN,
            parameters=PARAMETERS,
            min_nodes=min_nodes,
            rounds_goal=0,
            absent_seconds=3 * HEARTBEAT_SECONDS + 1,
            lease_seconds=30.0,
            lease_sequences_max=16,
            lease_sequences_node_max=200,
            weight_cap=10**9,
            evaluate_every=1,
            base_every=50,
            entry_is_certified=certified,
        )
        self.log: list[LogEntry] = []
        self.parts: set[Digest] = set()
        self.rosters: dict[Epoch, SignedRoster] = {}
        self.saved_leases = Leases((self.shard,))
        self.members: dict[NodeId, coordinator.Node] = {}
        self.granted: tuple[Lease, ...] = ()
        self.lives: dict[NodeId, int] = {}
        self.start()
        world.at(1.0, self._tick)

    def kill(self) -> None:
        if self.alive:
            self.world.note("coordinator killed")
        self.alive = False

    def start(self) -> None:
        if self.alive:
            return
        self.alive = True
        consumed, head, digest = Consumed(), Head(RoundNumber(0), GENESIS), _hash("state", 0)
        for entry in self.log:
            consumed = consumed.with_ranges(tuple(r for c in entry.record.contributions for r in c.ranges))
            digest = _hash(digest, record_hash(entry.record))
            head = Head(RoundNumber(entry.record.round + 1), record_hash(entry.record))
        last = self.log[-1].certificate.ballot.epoch if self.log else Epoch(-1)
        self.state = coordinator.State(
            head=head,
            replica=head,
            replica_digest=digest,
            consumed=consumed,
            leases=self.saved_leases,
            nodes={n: replace(node, activity="left", seen=-1e9) for n, node in self.members.items()},
            rosters=tuple(s for e, s in sorted(self.rosters.items()) if e >= last),
            history=dict(self.rosters),
            next_epoch=Epoch(max(self.rosters, default=-1) + 1),
            started=self.world.now,
        )

    def _tick(self) -> None:
        self.world.at(1.0, self._tick)
        if self.alive:
            self._event(coordinator.Ticked())

    def _event(self, event: coordinator.Event) -> None:
        self.state, effects = coordinator.step(self.state, event, self.world.now, self.rules)
        for effect in effects:
            if self.world.crashes_now():
                self.kill()
                self.world.at(self.world.restart_seconds(), self.start)
            if not self.alive:
                return
            match effect:
                case coordinator.SignRoster(roster):
                    signed = SignedRoster(roster, "s")
                    self.rosters[roster.epoch] = signed
                    self._event(coordinator.RosterSigned(signed))
                case coordinator.SaveLeases():
                    self.saved_leases = self.state.leases
                case coordinator.SaveEntry(entry, leases):
                    self.world.entry_certified(entry, "coordinator")
                    self.log.append(entry)
                    self.saved_leases = leases
                case coordinator.GrantLeases(_, granted):
                    self.granted = granted
                    self._check_leases()
                case coordinator.Fold(entry):
                    digest = _hash(self.state.replica_digest, record_hash(entry.record))
                    self.world.folded(entry.record.round + 1, digest, "coordinator")
                    self._event(coordinator.Folded(entry.record.round, digest))

    def _check_leases(self) -> None:
        held = Consumed()
        for span in [lease.range for lease in self.state.leases.held.values()] + list(self.state.leases.returned):
            if held.overlaps(span):
                raise InvariantBroken(f"seed {self.world.seed}: {span} is granted twice")
            held = held.with_ranges((span,))

    # what nodes can ask

    def heartbeat(self, beat: coordinator.HeartbeatArrived) -> tuple[object, ...]:
        node = self.state.nodes.get(beat.node)
        if node is None or node.activity == "left":
            self.members[beat.node] = coordinator.Node(beat.node, PeerId(beat.node), beat.node)
            self._event(coordinator.NodeOpened(beat.node, PeerId(beat.node), beat.node, beat.addresses))
        self._event(beat)
        newest = self.state.roster
        newer = newest if newest is not None and newest.roster.epoch > beat.epoch else None
        return newer, self.state.head.round, self.state.wanted

    def open(self, node: NodeId, life: int, start: int) -> tuple[object, ...]:
        """A session: what a former life of the node has said, and what of it still travels, counts no more."""
        self.lives[node] = life
        self.members[node] = coordinator.Node(node, PeerId(node), node)
        self._event(coordinator.NodeOpened(node, PeerId(node), node, ()))
        return self.read_log(start)

    def left(self, node: NodeId, life: int, seal: Seal | None) -> tuple[object, ...]:
        if self.lives.get(node) == life:
            self._event(coordinator.NodeLeft(node, "it said so", seal))
        return ()

    def lease(self, node: NodeId, sequences: int) -> tuple[object, ...]:
        self._event(coordinator.LeasesAsked(node, sequences))
        return (self.granted,)

    def read_log(self, start: int) -> tuple[object, ...]:
        entries = tuple(self.log[start : start + LOG_PAGE])
        newest = {self.state.roster.roster.epoch: self.state.roster} if self.state.roster else {}
        return entries, tuple((named(entries, self.rosters) | newest).values())

    def push(self, entry: LogEntry) -> tuple[object, ...]:
        self._event(coordinator.EntryArrived(entry))
        return ()

    def store_part(self, digest: Digest) -> tuple[object, ...]:
        self.parts.add(digest)
        self._event(coordinator.PartStored(digest))
        return ()


def named(entries: tuple[LogEntry, ...], rosters: dict[Epoch, SignedRoster]) -> dict[Epoch, SignedRoster]:
    epochs = {epoch for entry in entries for epoch in (entry.record.epoch, entry.certificate.ballot.epoch)}
    return {epoch: rosters[epoch] for epoch in sorted(epochs) if epoch in rosters}


def simulate(seed: int, *, seconds: float = 120.0, faults: Faults | None = None, nodes: int | None = None) -> World:
    """A swarm under faults, then calm; checks that it then goes on."""
    world = World(seed, faults=faults, nodes=nodes)
    world.misbehave(seconds)
    world.run(seconds)
    before = max(world.certified, default=-1)
    world.heal()
    while lacks := _lacks(world, before):
        if world.now >= seconds + CALM_SECONDS:
            raise InvariantBroken(f"seed {seed}: {CALM_SECONDS:.0f} s after the faults ended, {lacks}")
        world.run(world.now + 2.0)
    return world


def _lacks(world: World, before: int) -> str:
    """What is still missing for everyone to have gone on after the round `before`."""
    after = max(world.certified, default=-1)
    if after <= before + 1:
        return f"no progress: round {after}"
    heads = {node.me: node.rounds.head.round for node in world.nodes.values()}
    if min(heads.values()) < before + 1:
        return f"a node lacks a committed record: {heads}, {before + 1} were certified"
    if len(world.coordinator.log) < before + 1:
        return "the coordinator lacks a committed record"
    if world.coordinator.state.replica.round < before + 1:
        return "the coordinator's replica lacks a committed record"
    return ""


__all__ = ["CALM", "Faults", "InvariantBroken", "Propose", "Ready", "World", "simulate"]
