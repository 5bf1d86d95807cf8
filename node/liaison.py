"""The liaison: this node's dealings with its coordinator, by way of the link. What the coordinator signed comes in here.

Whatever is learned is durable before the rounds machine goes by it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import structlog

from node.core import rounds, session
from node.core.backoff import wait_seconds
from node.courier import LOG_PAGE, Courier
from node.decider import Decider
from node.journal import Journal
from node.link import Beat, Link, News, Page
from node.membership import Membership
from node.status import Tally
from node.supply import Supply
from node.workbench import Workbench
from protocol import canonical
from protocol.blobs import BlobStore
from protocol.contribution import Complaint
from protocol.errors import Code, Exit, Refused
from protocol.limits import MEMBERS_MAX, ROSTERS_RECALLED_MAX
from protocol.log import genesis_head
from protocol.proof import Evidence
from protocol.types import Digest, Epoch, LogEntry, NodeId, Part, RoundNumber, SignedRollback, SignedRoster

FAILURES_BEFORE_ANEW: Final = 3  # in a row, some seconds: a coordinator that was only started again is back by then
REPORTS_MAX: Final = 64  # one of each member of a roster, while the coordinator is away
COMPLAINTS_KEPT: Final = 2 * MEMBERS_MAX  # those of the open round and the one before it
SKEW_SECONDS_MAX: Final = 60.0  # a clock that is set by the network is right to a second
STUCK_SECONDS: Final = 30.0  # without a record folded: the page that was read may be of a branch that is no more

log = structlog.get_logger()


class Liaison:
    """`heartbeat` keeps it up for ever; the rest is asked for."""

    def __init__(
        self,
        link: Link,
        membership: Membership,
        *,
        heartbeat_seconds: float,
        decider: Decider,
        journal: Journal,
        blobs: BlobStore,
        courier: Courier,
        supply: Supply,
        workbench: Workbench,
        tally: Tally,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        pass_on: Callable[[SignedRoster], Coroutine[Any, Any, None]],
    ) -> None:
        self._link = link
        self._membership = membership
        self._heartbeat_seconds = heartbeat_seconds
        self._decider = decider
        self._journal = journal
        self._blobs = blobs
        self._courier = courier
        self._supply = supply
        self._workbench = workbench
        self._tally = tally
        self._spawn = spawn
        self._pass_on = pass_on
        self._wanted_before: frozenset[Digest] = frozenset()
        self._showing: set[Digest] = set()
        self._known_round = RoundNumber(0)
        self._reports: set[Evidence] = set()  # on their way
        self._complained: deque[tuple[Digest, NodeId]] = deque(maxlen=COMPLAINTS_KEPT)  # in the round after a head

    # what the coordinator signed, whoever brings it

    def learn_roster(self, signed: SignedRoster) -> None:
        """Keep it and pass it on if it was never heard of: an old one that comes again is only the rounds' affair.
        Refuses, whoever brings it, a second roster of an epoch, and one of a run by another manifest: the coordinator
        tells its nodes different stories."""
        roster, rosters = signed.roster, self._decider.rounds.rosters
        if roster.run != self._decider.rules.run:
            return
        manifest = genesis_head(self._membership.opened.manifest.manifest).hash
        if roster.manifest != manifest:
            two = f"{manifest[:12]} shown to this node, {roster.manifest[:12]} in roster {roster.epoch}"
            raise Refused(Code.TWO_STORIES, f"the coordinator has signed two manifests: {two}")
        known, digest = rosters.get(roster.epoch), canonical.digest(roster)
        before = self._journal.roster_digest(roster.epoch) if known is None else canonical.digest(known.roster)
        if before is not None and before != digest:
            what = f"the coordinator has signed two rosters {roster.epoch}: {before[:12]} and {digest[:12]}"
            raise Refused(Code.TWO_STORIES, what)
        if before is None:
            self._journal.save_roster(signed)
            self._spawn(self._pass_on(signed))
            log.info("roster", epoch=roster.epoch, members=len(roster.members))
        if known is None:
            self._decider.step(rounds.RosterArrived(signed))

    def learn_rollbacks(self, arrived: Iterable[SignedRollback]) -> None:
        new = self.save_rollbacks(arrived, known=self._decider.rounds.rollbacks)
        if new:
            self._decider.step(rounds.RollbacksArrived(new))

    def save_rollbacks(
        self, arrived: Iterable[SignedRollback], *, known: tuple[SignedRollback, ...]
    ) -> tuple[SignedRollback, ...]:
        """Those that continue what is known, durable now; refuses a second story under a number that is known."""
        new: list[SignedRollback] = []
        for signed in sorted(arrived, key=lambda each: each.rollback.number):
            number = signed.rollback.number
            if signed.rollback.run != self._decider.rules.run:
                continue
            if number <= len(known) and known[number - 1].rollback != signed.rollback:
                raise Refused(Code.TWO_STORIES, f"the coordinator has signed two rollbacks with the number {number}")
            if number == len(known) + len(new) + 1:
                self._journal.save_rollback(signed)
                new.append(signed)
        return tuple(new)

    def silence(self, epoch: Epoch | None) -> None:
        """Sign nothing under the rosters up to this one from here on, and remember it."""
        if epoch is None or epoch <= self._journal.silence():
            return
        log.warning("this folder is an older copy of itself: it signs nothing under older rosters", epoch=epoch)
        self._journal.save_silence(epoch)
        self._decider.step(rounds.Silenced(epoch))

    def unseal(self) -> None:
        """Once a session is open and its roster learned: only the coordinator can lift a seal, as others rely on it."""
        self._journal.lift_seal()
        self._decider.step(rounds.Unsealed())

    # who lies

    def report(self, evidence: Evidence) -> None:
        """Tell the coordinator, now or when it is there."""
        log.warning("a member lied", node=evidence.said.node[:16], kind=evidence.said.purpose)
        if len(self._reports) < REPORTS_MAX:
            self._reports.add(evidence)
            self._spawn(self._bring(evidence))

    async def _bring(self, evidence: Evidence) -> None:
        async def bring() -> None:
            log.warning("the coordinator knows of it", fault=await self._link.report(evidence))

        try:
            await self.retrying(bring)
        except Refused as refused:
            log.warning("a report was refused", why=refused.what)
        finally:
            self._reports.discard(evidence)

    async def complain(self, complaint: Complaint) -> None:
        """Once in a round, and no more when it fails: who goes on sends the like in the next one."""
        about = complaint.previous, complaint.contribution.node
        if about in self._complained:
            return
        self._complained.append(about)
        node, at = complaint.contribution.node[:16], complaint.round
        log.warning("a member sent what no codec reads", node=node, round=at)
        try:
            await self._link.complain(complaint)
        except Refused as refused:
            log.warning("a complaint was not heard", node=node, round=at, why=refused.what)

    # the log

    async def read_log(self, start: int) -> Page:
        """A page of the coordinator's log, with what it takes to follow it."""
        page = await self._link.read_log(start)
        for signed in page.rosters:
            self.learn_roster(signed)
        self.learn_rollbacks(page.rollbacks)
        if page.entries:
            self._decider.post(rounds.LogArrived(page.entries, page.rosters))
        return page

    async def catch_up(self) -> None:
        """Read the coordinator's log up to its head, and wait until it is folded.

        One that goes on from another record than ours may be a fork: the coordinator hears of ours, and takes it back.
        If it does not, what we have is of no run that it knows."""
        told = False
        while True:
            start = self._decider.rounds.head.round
            page = await self.read_log(start)
            if not page.entries:
                return
            until = page.entries[-1].record.round + 1
            asked = time.monotonic()
            while start <= self._decider.rounds.head.round < until and time.monotonic() - asked < STUCK_SECONDS:
                await asyncio.sleep(0.05)
                self._tally.download = {"what": "rounds", "done": self._decider.rounds.head.round, "size": until}
            self._tally.download = None
            state, previous = self._decider.rounds, page.entries[0].record.previous
            if state.head.round != start or state.branch != len(state.rollbacks) or previous == state.head.hash:
                told = False
            elif told:
                what = f"record {start} follows {previous[:12]}, this copy of the log ends with {state.head.hash[:12]}"
                raise Refused(Code.TWO_STORIES, what)
            else:
                await self.beat()
                told = True

    async def hand_in(self, entry: LogEntry, parts: Sequence[Part]) -> None:
        """Give the coordinator the record and the parts reduced here; what fails is asked for by a later heartbeat."""
        with suppress(Refused):
            missing = set(await self._push(entry))
            for part in parts:
                if part.digest in missing:
                    await self._link.upload_part(part.digest, await asyncio.to_thread(self._blobs.read, part.digest))

    async def _push(self, entry: LogEntry) -> tuple[Digest, ...]:
        """Bring the coordinator a record, with what it signed itself: its database may be an older one."""
        state = self._decider.rounds
        oldest = min(entry.record.epoch, entry.certificate.ballot.epoch)
        return await self._link.push_entry(entry, self._rosters_from(oldest), state.rollbacks)

    async def _remind(self, news: News) -> None:
        """The coordinator's database is an older copy of itself: bring it what it has signed since.

        Before any record, for it must not sign another story under a number that it has used."""
        log.warning("the coordinator has forgotten what it signed", epoch=news.epoch, branch=news.branch)
        await self._link.push_entry(None, (), self._decider.rounds.rollbacks)
        rosters = self._rosters_from(Epoch(news.epoch + 1))
        for start in range(0, len(rosters), ROSTERS_RECALLED_MAX):
            await self._link.push_entry(None, rosters[start : start + ROSTERS_RECALLED_MAX])

    def _rosters_from(self, oldest: Epoch) -> tuple[SignedRoster, ...]:
        known = self._decider.rounds.rosters
        return tuple(known[epoch] for epoch in sorted(known) if epoch >= oldest)

    # the heartbeat

    async def heartbeat(self) -> None:
        """Say what we do, learn what is new, for ever; a lost link comes back by itself, at any address of the invite."""
        failures = 0
        while True:
            try:
                if not self._membership.online or failures >= FAILURES_BEFORE_ANEW:
                    await self._come_back()
                await self.beat()
                if failures or not self._decider.session.linked:
                    self._decider.post(session.LinkOpened())
                failures = 0
            except Refused as refused:
                ends = refused.reason.exit in (Exit.REFUSED, Exit.INTEGRITY)
                if ends and refused.reason not in (Code.LIMIT, Code.PIN_MISMATCH):  # of these each may pass
                    raise
                failures += 1
                self._decider.post(session.LinkLost(refused.what))
                await asyncio.sleep(wait_seconds(failures=failures, luck=random.random()))  # noqa: S311  # only spreads the load

    async def retrying(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Until the coordinator answers, at any address of the invite."""
        failures = 0
        while True:
            try:
                if failures >= FAILURES_BEFORE_ANEW:
                    await self._membership.enter()
                return await work()
            except Refused as refused:
                if refused.reason not in (Code.UNREACHABLE, Code.PIN_MISMATCH):
                    raise
                self._decider.post(session.LinkLost(refused.what))
                await asyncio.sleep(wait_seconds(failures=failures, luck=random.random()))  # noqa: S311  # only spreads the load
                failures += 1

    async def _come_back(self) -> None:
        """Be let in after a start without the coordinator, or where it has moved to."""
        opened = await self._membership.enter()
        self.silence(opened.silent_epoch)
        self.learn_rollbacks(opened.rollbacks)
        if opened.roster is not None:
            self.learn_roster(opened.roster)
        self.unseal()

    async def beat(self) -> None:
        """Once: say what we do, and act on the answer."""
        beat = await self._beat()
        asking = self._link.heartbeat(beat, wait_seconds=self._heartbeat_seconds)
        news = await self._unless_changed(asking)
        if news is None:
            return
        self._tally.notice = news.notice or self._tally.notice
        self._tally.nobody_callable = news.nobody_callable
        self._heed_clock(news.coordinator_ms / 1000 - time.time())
        if news.epoch < beat.epoch or news.branch < beat.branch:
            await self._remind(news)
        if news.roster is not None:
            self.learn_roster(news.roster)
        self.silence(news.silent_epoch)
        self.learn_rollbacks(news.rollbacks)
        self._known_round = RoundNumber(news.head_round)
        state = self._decider.rounds
        head = state.head.round
        if head >= news.head_round:  # else a lease may be missing because a record that we lack consumed it
            self._spawn(self._supply.lose(frozenset(beat.lease_ids) - frozenset(news.renewed)))
        if news.head_round > head and state.committed is None:
            await self.read_log(head)
        lacking = news.head_round if news.astray_from is None else news.astray_from
        for entry in self._journal.entries(lacking, most=LOG_PAGE):
            await self._push(entry)
        wanted = frozenset(news.wanted)
        for digest in wanted & self._wanted_before:  # its reducer had a heartbeat's time to bring it
            if self._blobs.has(digest):
                with suppress(Refused):
                    await self._link.upload_part(digest, await asyncio.to_thread(self._blobs.read, digest))
        self._wanted_before = wanted
        for digest in news.asked:
            self._spawn(self._show(digest))
        if news.finished and head >= news.head_round:
            self._decider.post(session.RunEnded())

    async def _show(self, digest: Digest) -> None:
        """What this node brought to a round, or made its mean of, for the coordinator to look at."""
        if digest in self._showing:
            return
        self._showing.add(digest)
        try:
            data = await asyncio.to_thread(self._workbench.brought.read, digest)
            if data is None:
                data = await asyncio.to_thread(self._courier.evidence.read, digest)
            if data is not None:
                with suppress(Refused):  # asked for again by the next heartbeat
                    await self._link.upload_part(digest, data)
        finally:
            self._showing.discard(digest)

    def _heed_clock(self, ahead_seconds: float) -> None:
        """Nothing goes by this machine's clock but dates that people read, and an invite's end. They should know."""
        wrong = abs(ahead_seconds) > SKEW_SECONDS_MAX
        if wrong and not self._tally.clock:
            log.warning("this machine's clock differs from the coordinator's", seconds=round(ahead_seconds))
        word = "behind" if ahead_seconds > 0 else "ahead of"
        told = f"this machine's clock is {_span(abs(ahead_seconds))} {word} the coordinator's; only dates go by it"
        self._tally.clock = told if wrong else ""

    async def _beat(self) -> Beat:
        state, tally, engine, trainer = self._decider.rounds, self._tally, self._courier.engine, self._workbench.trainer
        if engine is not None:
            with suppress(Refused):
                usage = await engine.usage()
                tally.sent, tally.received = usage.sent, usage.received
        return Beat(
            activity=session.activity(self._decider.session).value,
            head=state.head,
            epoch=max(state.rosters, default=Epoch(-1)),
            addresses=engine.addresses if engine is not None else (),
            tokens_per_second=tally.stepped.tokens_per_second if tally.stepped else 0.0,
            train_loss=tally.mean_loss(),
            busy_share=trainer.busy_share if trainer is not None else 0.0,
            bytes_sent=tally.sent,
            bytes_received=tally.received,
            lease_ids=self._supply.lease_ids,
            known_round=max(self._known_round, state.head.round),
            branch=len(state.rollbacks),
            life=self._membership.life,
        )

    async def _unless_changed(self, asking: Coroutine[Any, Any, News]) -> News | None:
        """The answer, or none as soon as we do something else: the coordinator should hear of that at once."""
        self._decider.changed.clear()
        answer, changed = asyncio.ensure_future(asking), asyncio.ensure_future(self._decider.changed.wait())
        try:
            await asyncio.wait([answer, changed], return_when=asyncio.FIRST_COMPLETED)
            return await answer if answer.done() else None
        finally:
            answer.cancel()
            changed.cancel()


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
