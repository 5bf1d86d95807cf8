"""The coordinator: the real machine, a database that survives, and doors that nodes knock at."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.core import leases as data
from coordinator.core import machine, strikes
from coordinator.core.leases import Leases
from protocol.log import head_after, line_head, next_head, ranges_of
from protocol.proof import Evidence
from protocol.state import Consumed
from protocol.types import (
    Digest,
    Epoch,
    Fault,
    Head,
    Lease,
    LogEntry,
    NodeId,
    Part,
    PeerId,
    RoundNumber,
    Seal,
    SignedRollback,
    SignedRoster,
)
from tests.sim.faults import CLOCK_JUMP_SECONDS
from tests.sim.invariants import GENESIS, GENESIS_STATE, RUN, SHARDS, check_brought, granted, state_after
from tests.sim.node import HEARTBEAT_SECONDS, LOG_PAGE, PARAMETERS, certified, named
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.world import World

TICK_SECONDS = 2.0
LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class Page:
    """One answer about the log."""

    entries: tuple[LogEntry, ...]
    rosters: tuple[SignedRoster, ...]
    rollbacks: tuple[SignedRollback, ...]


@dataclass(frozen=True)
class Pulse:
    """The answer to a heartbeat."""

    head_round: int
    branch: int
    roster: SignedRoster | None
    rollbacks: tuple[SignedRollback, ...]  # those that the node does not know
    wanted: tuple[Part, ...]
    renewed: frozenset[str]
    life: int  # the highest that is known of the node
    silent: Epoch  # it signs nothing under rosters up to this one
    wanted_from: int  # its records from this round on


@dataclass
class Store:
    """The database and the archive: each method is one transaction."""

    line: list[LogEntry] = field(default_factory=list)
    undone: list[LogEntry] = field(default_factory=list)
    rollbacks: tuple[SignedRollback, ...] = ()
    rosters: dict[Epoch, SignedRoster] = field(default_factory=dict)
    leases: Leases = field(default_factory=lambda: Leases(SHARDS))
    members: dict[NodeId, None] = field(default_factory=dict)  # in the order they came
    lives: dict[NodeId, tuple[int, int]] = field(default_factory=dict)  # and which process said so
    silent: dict[NodeId, Epoch] = field(default_factory=dict)
    marks: list[strikes.Mark] = field(default_factory=list)
    parts: set[Digest] = field(default_factory=set)

    def copied(self) -> Store:
        fresh = copy.copy(self)
        fresh.line, fresh.undone, fresh.rosters = list(self.line), list(self.undone), dict(self.rosters)
        fresh.members, fresh.lives, fresh.silent = dict(self.members), dict(self.lives), dict(self.silent)
        return fresh  # what is in the archive stays there

    def begin_life(self, node: NodeId, life: int, newest: Epoch, process: int) -> tuple[int, Epoch]:
        stored, before = self.lives.get(node, (0, -1))
        if process == before:
            life = max(life, stored)
        elif life <= stored:
            life, self.silent[node] = stored + 1, newest
        self.lives[node] = (life, process)
        return life, self.silent.get(node, Epoch(-1))

    def save_rollback(self, signed: SignedRollback, leases: Leases) -> None:
        stays = signed.rollback.to.round
        self.undone += self.line[stays:]
        self.line, self.rollbacks, self.leases = self.line[:stays], (*self.rollbacks, signed), leases

    def credit(self, node: NodeId) -> int:
        brought = (c for entry in (*self.line, *self.undone) for c in entry.record.contributions)
        return sum(contribution.tokens for contribution in brought if contribution.node == node)


class SimCoordinator(Process):
    def __init__(self, world: World) -> None:
        super().__init__(world, "coordinator")
        self.store = Store()
        self.backup: Store | None = None
        self.unavailable = False
        self.sessions: dict[NodeId, tuple[int, int]] = {}  # which process, and its life
        self.granted: tuple[Lease, ...] = ()
        node_sequences = max(200, 2 * max(world.swarm.steps) * world.swarm.ahead_rounds)
        self.rules = machine.Rules(
            run=RUN,
            parameters=PARAMETERS,
            min_nodes=2,
            rounds_goal=0,
            absent_seconds=3 * HEARTBEAT_SECONDS + 1,
            lease_seconds=LEASE_SECONDS,
            lease_sequences_max=16,
            lease_sequences_node_max=node_sequences,
            weight_cap=10**9,
            evaluate_every=1,
            base_every=50,
            entry_is_certified=certified,
            check_brought=check_brought,
            manifest=GENESIS.hash,
        )
        self.start()

    def start(self) -> None:
        if self.alive or self.unavailable:
            return
        self.begin()
        if self.world.luck.random() < self.world.weather.clock_jumps:
            self.clock_offset += self.world.luck.uniform(-1, 1) * CLOCK_JUMP_SECONDS
        self.sessions.clear()
        self._busy_until = self.world.now
        self.state = self._restored()
        self._check(None)
        self.later(TICK_SECONDS, self._tick)

    def _restored(self) -> machine.State:
        """The machine as the database has it, as in the engine."""
        store = self.store
        line, rollbacks = store.line, [signed.rollback for signed in store.rollbacks]
        whole = self._archived_rounds()
        head, branch = line_head(_head(line), rollbacks)
        replica, state = self._folded(whole)
        consumed, tokens = _taken(line)
        leases = data.strike(store.leases, consumed)
        until_ms = int((self.clock + LEASE_SECONDS) * 1000)
        for lease in tuple(leases.held.values()):
            leases, _ = data.renew(leases, lease.node, [lease.lease_id], until_ms)
        newest = line[-1].certificate.ballot.epoch if line else Epoch(-1)
        open_rosters = [s for e, s in sorted(store.rosters.items()) if e >= newest and s.roster.branch == branch]
        return machine.State(
            head=head,
            replica=replica,
            replica_digest=state,
            consumed=consumed,
            leases=leases,
            branch=branch,
            rollbacks=store.rollbacks,
            silent=dict(store.silent),
            trails=strikes.by_node(store.marks),
            nodes={
                n: replace(_node(n), activity="left", seen=-1e9, credit_tokens=store.credit(n)) for n in store.members
            },
            rosters=tuple(open_rosters),
            history=dict(store.rosters),
            next_epoch=Epoch(max(store.rosters, default=-1) + 1),
            recent=tuple(line[-machine.RECENT_KEPT :]),
            unfolded=tuple(line[whole:]),
            have=self._archived(line[whole:]),
            started=self.clock,
            tokens=tokens,
        )

    def _archived_rounds(self) -> int:
        """How many records of the line have all their parts in the archive, from the first on."""
        line, parts = self.store.line, self.store.parts
        lacking = (i for i, entry in enumerate(line) if any(p.digest not in parts for p in entry.record.parts))
        return next(lacking, len(line))

    def _folded(self, rounds: int) -> tuple[Head, Digest]:
        state = GENESIS_STATE
        for entry in self.store.line[:rounds]:
            state = state_after(state, entry.record)
        head, _ = line_head(_head(self.store.line[:rounds]), [signed.rollback for signed in self.store.rollbacks])
        return head, state

    def _archived(self, entries: Iterable[LogEntry]) -> frozenset[Digest]:
        return frozenset(p.digest for entry in entries for p in entry.record.parts if p.digest in self.store.parts)

    def _tick(self) -> None:
        self.later(TICK_SECONDS, self._tick)
        self._event(machine.Ticked())
        if self.world.weather.coordinator_backups and self.alive and self.world.luck.random() < 0.02:
            self.backup = self.store.copied()

    def _event(self, event: machine.Event) -> None:
        if not self.alive:
            return
        before = self.state
        self.state, effects = machine.step(before, event, self.clock, self.rules)
        for effect in effects:
            if self.world.strikes():
                self.kill()
                self.world.at(self.world.trouble.restart_seconds(), self.start)
                return
            self._do(effect)
            if not self.alive:
                return
        self._check(before)

    def _do(self, effect: machine.Effect) -> None:
        world, store = self.world, self.store
        match effect:
            case machine.SignRoster(roster):
                signed = SignedRoster(roster, "s")
                store.rosters[roster.epoch] = signed
                world.truth.roster_signed(signed)
                self._event(machine.RosterSigned(signed))
            case machine.SaveRosters(rosters):
                store.rosters |= {signed.roster.epoch: signed for signed in rosters}
            case machine.SignRollback(rollback):
                self._event(machine.Recalled((), (SignedRollback(rollback, "s"),)))
            case machine.BranchOff(number, reason):
                self._event(machine.RollbackAsked(_head(self.store.line[:number]), reason))
            case machine.TurnLog(turn):
                self._turn(turn)
            case machine.SaveLeases():
                store.leases = self.state.leases
            case machine.SaveMarks(marks):
                store.marks += marks
            case machine.SaveEntry(entry, leases):
                world.entry_certified(entry, self.name)
                store.line.append(entry)
                store.leases = leases
            case machine.GrantLeases(_, granted):
                self.granted = granted
            case machine.Call(node, _, addresses):
                self._call(node, addresses)
            case machine.Fold(entry):
                self._slowly(lambda: self._fold(entry))
            case machine.Rewind():
                self._slowly(self._rewind)

    def _call(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        world = self.world
        seconds = world.luck.uniform(0.1, 12.0)

        def end() -> None:
            called = world.nodes[node]
            there = called.awake and not called.behind_router and world.reaches(self.name, node)
            lost = world.luck.random() < world.weather.loss
            self._event(machine.Called(node, addresses, addresses[0] if there and not lost else ""))

        self.later(seconds, end)

    def _slowly(self, work: object) -> None:
        """One after the other, as in the engine's queue."""
        self._busy_until = max(self._busy_until, self.world.now) + self.world.luck.uniform(0.01, 0.2)
        self.later(self._busy_until - self.world.now, work)  # type: ignore[arg-type]

    def _fold(self, entry: LogEntry) -> None:
        if not self.state.rewinding:
            state = state_after(self.state.replica_digest, entry.record)
            self._event(machine.Folded(entry.record.round, state))

    def _turn(self, signed: SignedRollback) -> None:
        start = signed.rollback.to.round
        stay, undone = self.store.line[:start], self.store.line[start:]
        consumed, tokens = _taken(stay)
        freed = [each for entry in undone for each in ranges_of(entry.record)]
        leases = data.undo(self.state.leases, freed) if undone else self.state.leases
        self.store.save_rollback(signed, leases)
        self.world.truth.rolled_back(signed.rollback)
        self._event(machine.RolledBack(signed, head_after(signed.rollback), consumed, tokens, leases))

    def _rewind(self) -> None:
        whole = self._archived_rounds()
        head, state = self._folded(whole)
        unfolded = tuple(self.store.line[whole:])
        self._event(machine.Rewound(head, state, unfolded, self._archived(unfolded)))

    def _check(self, before: machine.State | None) -> None:
        truth, state = self.world.truth, self.state
        if self.backup is None:  # what it granted and owed after the database's copy was made, it has forgotten
            truth.data_adds_up(state.leases, state.consumed)
        if before is None or state.trails is not before.trails:
            truth.nobody_honest_is_struck(state.trails)
        if before is None or state.head is not before.head:
            known = truth.heads[state.head.hash]
            truth.replica_is_true(state.head, known.state, state.consumed, state.branch, self.name)
            if self.backup is None:
                truth.credit_adds_up(state, self.store.line, self.store.undone)
        if not state.rewinding and (before is None or state.replica is not before.replica):
            known = truth.heads[state.replica.hash]
            truth.replica_is_true(state.replica, state.replica_digest, known.consumed, known.branch, "the archive")

    # what nodes and the researcher can ask

    def open(self, node: NodeId, process: int, life: int, start: int) -> tuple[int, Epoch, Page]:
        """A session: what a former life of the node has said, and what of it still travels, counts no more."""
        store, newest = self.store, Epoch(self.state.next_epoch - 1)
        store.members[node] = None
        before = store.silent.get(node)
        life, silent = store.begin_life(node, life, newest, process)
        self.sessions[node] = (process, life)
        self._event(machine.NodeOpened(node, PeerId(node), node, (), store.silent.get(node) != before))
        return life, silent, self.page(start)

    def heartbeat(self, beat: machine.HeartbeatArrived, process: int, life: int, head_hash: Digest) -> tuple[Pulse]:
        if self.sessions.get(beat.node, (0, 0))[0] != process:
            self.open(beat.node, process, life, 0)
        elif life > self.sessions[beat.node][1]:
            self.store.begin_life(beat.node, life, Epoch(self.state.next_epoch - 1), process)
            self.sessions[beat.node] = (process, life)
        self._event(beat)
        state = self.state
        newer = state.roster if state.roster is not None and state.roster.roster.epoch > beat.epoch else None
        renewed = frozenset(lease.lease_id for lease in state.leases.of(beat.node))
        known, silent = self.store.lives[beat.node][0], self.store.silent.get(beat.node, Epoch(-1))
        news = state.rollbacks[beat.branch :]
        head = Head(RoundNumber(beat.head_round), head_hash)
        astray = beat.branch == len(state.rollbacks) and state.astray(head)
        wanted_from = max(0, beat.head_round - machine.FORK_UNDONE_MAX) if astray else state.head.round
        return (Pulse(state.head.round, state.branch, newer, news, state.wanted, renewed, known, silent, wanted_from),)

    def left(self, node: NodeId, process: int, seal: Seal | None) -> None:
        if self.sessions.get(node, (0, 0))[0] == process:
            self._event(machine.NodeLeft(node, "it said so", seal))

    def lease(self, node: NodeId, sequences: int) -> tuple[tuple[Lease, ...]]:
        self.granted = ()
        self._event(machine.LeasesAsked(node, sequences))
        return (tuple(replace(lease, signature=granted(node, lease.range)) for lease in self.granted),)

    def page(self, start: int) -> Page:
        entries = tuple(self.store.line[start : start + LOG_PAGE])
        newest = {self.state.roster.roster.epoch: self.state.roster} if self.state.roster else {}
        return Page(entries, tuple((named(entries, self.store.rosters) | newest).values()), self.state.rollbacks)

    def read_log(self, start: int) -> tuple[Page]:
        return (self.page(start),)

    def push(
        self, entry: LogEntry, rosters: tuple[SignedRoster, ...], rollbacks: tuple[SignedRollback, ...]
    ) -> tuple[()]:
        forgotten = tuple(signed for signed in rosters if signed.roster.epoch not in self.state.history)
        if forgotten or len(rollbacks) > len(self.state.rollbacks):
            self._event(machine.Recalled(forgotten, rollbacks))
        self._event(machine.EntryArrived(entry))
        return ()

    def report(self, evidence: Evidence) -> tuple[()]:
        said, fault = evidence.said, Fault.FORGED if evidence.other is None else Fault.CONTRADICTED
        self._event(machine.Struck(said.node, fault, said.body.round, "a witness has said so", said.body.record))
        return ()

    def store_part(self, part: Digest) -> tuple[()]:
        self.store.parts.add(part)
        self._event(machine.PartStored(part))
        return ()

    def roll_back(self, rounds: int) -> None:
        self.take(lambda: self._event(machine.RollbackAsked(_head(self.store.line[:rounds]), "the simulator wants it")))


def _node(node: NodeId) -> machine.Node:
    return machine.Node(node, PeerId(node), node)


def _head(line: list[LogEntry]) -> Head:
    """So many records, and the hash of the last of them."""
    return next_head(line[-1].record) if line else GENESIS


def _taken(entries: Iterable[LogEntry]) -> tuple[Consumed, int]:
    consumed, tokens = Consumed(), 0
    for entry in entries:
        consumed = consumed.with_ranges(ranges_of(entry.record))
        tokens += sum(contribution.tokens for contribution in entry.record.contributions)
    return consumed, tokens
