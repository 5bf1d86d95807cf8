"""The courier: letters and parts between this node and its peers, by way of the engine. Decides nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from weakref import WeakValueDictionary

import structlog

from node import letters
from node.brought import Brought
from node.core.rounds import group
from node.decider import Decider
from node.engine import AveragingJob, Engine
from node.journal import Journal
from node.link import Link
from protocol import canonical
from protocol.blobs import BlobStore, digest_of
from protocol.codec import Codec
from protocol.errors import Code, Refused
from protocol.evidence import Vouched, group_id, sign_part, sign_slices
from protocol.exchange import Packing, layout
from protocol.identity import Key, check_rollback, check_roster, coordinator_key
from protocol.limits import LOG_ROSTERS_MAX, PEER_MESSAGE_BYTES_MAX, ROLLBACKS_MAX
from protocol.messages import Begin, LogReply, LogRequest, Message
from protocol.types import (
    BlobRef,
    Digest,
    Epoch,
    Exchange,
    LogEntry,
    Manifest,
    Member,
    NodeId,
    Part,
    PeerId,
    Roster,
    RoundNumber,
    SignedRoster,
)

SEND_SECONDS = 10.0  # a small message that takes longer is lost; the round has its own deadline
LOG_PAGE = 16  # entries in one answer to a peer
FRAME_BYTES = 4096  # of a letter besides what it tells
SENDER_SECONDS_MIN = 2.0  # without progress for less, a sender on a home line is only slow
ENGINE_SHARE = 0.9  # of an averaging's time: in the rest its outcome comes here
PART_SECONDS = 60.0  # for a part from peers, and again from the coordinator; large parts get more
PART_BYTES_PER_SECOND_MIN = 16 << 10  # slower than any line that can take part in a round
EVIDENCE_KEPT = 4  # of our newest means: a recount is ordered within two rounds, and each may take a second attempt
REFUSED_SECONDS = 60.0  # one line about a peer's refused letters, however many come: a log is not theirs to fill
REDUCED_KEPT = 8  # means of ours, until a record has taken newer ones
PARTS_AT_ONCE = 8  # half of the calls that a peer answers at once

log = structlog.get_logger()


class Courier:
    """One node's dealings with its peers. `engine` is set while there is one."""

    def __init__(
        self,
        manifest: Manifest,
        me: NodeId,
        *,
        packing: Packing,
        journal: Journal,
        blobs: BlobStore,
        make_room: Callable[[], None],
        link: Link,
        decider: Decider,
        key: Key,
    ) -> None:
        self.evidence = Brought(journal.folder / "evidence", EVIDENCE_KEPT)
        self.engine: Engine | None = None
        self._manifest = manifest
        self._me = me
        self._packing = packing
        self._journal = journal
        self._blobs = blobs
        self._make_room = make_room
        self._link = link
        self._decider = decider
        self._key = key
        self._refused_at: dict[PeerId, float] = {}
        self._group = b""
        self._reduced: deque[tuple[RoundNumber, Digest, bytes]] = deque(maxlen=REDUCED_KEPT)  # our means, their group
        self._store_turn = asyncio.Lock()  # one part at a time is put into the store
        self._fetching = asyncio.Semaphore(PARTS_AT_ONCE)
        self._on_their_way: WeakValueDictionary[Digest, asyncio.Lock] = WeakValueDictionary()

    # letters

    async def deliver(self, node: NodeId, letter: bytes) -> None:
        """Once, and without a word when it fails: whoever needs it more says it again."""
        peer = self._peer_of(node)
        if self._calls_only(self._me) and self._calls_only(node):
            peer, letter = self._carrier(), letters.addressed(letter, node)
        if peer is None or self.engine is None:
            return
        try:
            await self.engine.send(peer, letter, timeout_seconds=SEND_SECONDS)
        except Refused as refused:
            log.debug("not delivered", to=node[:8], why=refused.what)

    def open(self, peer: PeerId, letter: bytes) -> tuple[Message, str] | None:
        """The message in a letter, if it is genuine, and brought by its author's own peer or passed on for it."""
        try:
            message, signature = letters.unseal(letter)
            passed_on = letters.addressee(letter) == self._me and self._calls_only(message.sender)
            if self._peer_of(message.sender) != peer and not passed_on:
                raise Refused(Code.SIGNATURE, "a letter by another hand")
            if isinstance(message, LogReply):
                self._check_reply(message)
        except Refused as refused:
            self._note_refused(peer, refused)
            return None
        return message, signature

    def _check_reply(self, reply: LogReply) -> None:
        """Refuse more than a member tells, and rosters and rollbacks that are not the coordinator's for this run."""
        if len(reply.rosters) > LOG_ROSTERS_MAX or len(reply.rollbacks) > ROLLBACKS_MAX:
            what = f"{len(reply.rosters)} rosters and {len(reply.rollbacks)} rollbacks"
            raise Refused(Code.FIELD, f"{what}, expected at most {LOG_ROSTERS_MAX} and {ROLLBACKS_MAX}")
        coordinator, known = coordinator_key(self._manifest.run), self._rosters()
        new = [signed for signed in reply.rosters if signed != known.get(signed.roster.epoch)]
        signed_of = [check_roster(coordinator, signed).run for signed in new]
        signed_of += [check_rollback(coordinator, signed).run for signed in reply.rollbacks]
        if any(run != self._manifest.run for run in signed_of):
            raise Refused(Code.SIGNATURE, "a roster or rollback of another run")

    def _note_refused(self, peer: PeerId, refused: Refused) -> None:
        now = time.monotonic()
        if now - self._refused_at.get(peer, -REFUSED_SECONDS) >= REFUSED_SECONDS:
            self._refused_at[peer] = now
            log.warning("a letter was refused", peer=peer[-8:], why=refused.what)

    def onward(self, letter: bytes) -> NodeId | None:
        """Whom a letter is to be passed on to: from one that nobody can call to another."""
        to = letters.addressee(letter)
        return to if to != self._me and self._calls_only(to) else None

    def log_reply(self, request: LogRequest) -> LogReply:
        """What this node has of the log from a round on, with the rosters that it takes to check it: as much as one letter
        holds, and one entry at least."""
        known, rollbacks = self._rosters(), self._decider.rounds.rollbacks
        room = PEER_MESSAGE_BYTES_MAX - FRAME_BYTES - _bytes(rollbacks)
        entries, rosters = list[LogEntry](), dict[Epoch, SignedRoster]()
        for entry in self._journal.entries(request.round, most=LOG_PAGE):
            named = {entry.certificate.ballot.epoch, entry.record.epoch} - rosters.keys()
            more = {epoch: known[epoch] for epoch in named & known.keys()}
            room -= _bytes(entry) + _bytes(tuple(more.values()))
            if entries and room < 0:
                break
            entries.append(entry)
            rosters |= more
        last = entries[-1] if entries else self._journal.entry(RoundNumber(request.round - 1))
        settled = last.certificate.ballot.epoch if last is not None else Epoch(0)
        for epoch in sorted((e for e in known if e >= settled and e not in rosters), reverse=True):
            room -= _bytes(known[epoch])  # a record proposed again may be of any of these
            if room < 0 or len(rosters) == LOG_ROSTERS_MAX:
                break
            rosters[epoch] = known[epoch]
        told = tuple(rosters[epoch] for epoch in sorted(rosters))
        return LogReply(self._manifest.run, request.round, self._me, tuple(entries), told, rollbacks)

    async def tell_engine(self) -> None:
        """Give the engine the members that it may answer and reach: those of every roster still in use."""
        rosters = self._rosters()
        if self.engine is None or not rosters:
            return
        peers: dict[PeerId, tuple[str, ...]] = {}
        for epoch in sorted({max(rosters), self._decider.rounds.ballot.epoch} & rosters.keys()):
            members = rosters[epoch].roster.members
            peers |= {member.peer: member.addresses for member in members if member.node != self._me}
        with suppress(Refused):
            await self.engine.set_roster(peers, calls_only=self._calls_only(self._me))

    def _rosters(self) -> Mapping[Epoch, SignedRoster]:
        return self._decider.rounds.rosters if self._decider.begun else {}

    def _member(self, node: NodeId) -> Member | None:
        """As the newest roster that lists it does."""
        known = self._rosters()
        newest_first = (known[epoch].roster.member(node) for epoch in sorted(known, reverse=True))
        return next((member for member in newest_first if member is not None), None)

    def _peer_of(self, node: NodeId) -> PeerId | None:
        member = self._member(node)
        return None if member is None else member.peer

    def _calls_only(self, node: NodeId) -> bool:
        """Whether nobody can call it."""
        member = self._member(node)
        return member is not None and not member.is_callable

    def _carrier(self) -> PeerId | None:
        """Any member that everybody can call; another one the next time, should this one be gone."""
        known = self._rosters()
        members = known[max(known)].roster.members if known else ()
        able = [member.peer for member in members if member.is_callable]
        return random.choice(able) if able else None  # noqa: S311  # only spreads the load

    # averaging and parts

    async def average(
        self, begin: Begin, roster: Roster, payload: bytes, *, seconds: float
    ) -> tuple[Part | None, dict[int, Digest], frozenset[NodeId]]:
        """The part reduced here, the hashes of all parts that this node holds now, and who sent what no honest member sends.

        Never raises a refusal. Whatever the peers or the engine do, nothing is waited for past these seconds."""
        members = group(begin, roster)
        index = [node for node, _ in members].index(self._me)
        named = [member for node, _ in members if (member := roster.member(node)) is not None]
        roles = [member.role for member in named]
        exchange = self._packing.exchange(roles)
        shares = layout(exchange, self._manifest.parameters, roles)
        weights = tuple(weight for _, weight in members)
        previous, ballot = begin.readies[0].ready.previous, begin.ballot
        self._group = group_id(begin.run, previous, ballot.epoch, ballot.attempt)
        held: dict[int, Digest] = {}
        garbled: frozenset[NodeId] = frozenset()
        try:
            job = AveragingJob(
                group=self._group,
                peers=tuple(member.peer for member in named),
                weights=weights,
                exchange=exchange,
                spans=shares,
                deadline_seconds=seconds * ENGINE_SHARE,
                sender_seconds=max(SENDER_SECONDS_MIN, seconds / 3),
                members=tuple(node for node, _ in members),
                attempt=ballot.attempt,
                after=self._taken_last(),
            )
            if weights[index] and exchange is Exchange.ALL_REDUCE:
                signing = asyncio.to_thread(sign_slices, self._key, self._group, payload, shares, self._packing.up)
                job = replace(job, signatures=await signing)
            if self.engine is None:
                raise Refused(Code.CHILD_DIED, "the engine is being restarted")
            async with asyncio.timeout(seconds):
                outcome = await self.engine.average(job, payload if weights[index] else b"")
            garbled = frozenset(members[each][0] for each in outcome.garbled)
            for number, data in outcome.parts.items():
                held[number] = await self._keep(data)
            evidence = None
            if outcome.evidence is not None:
                evidence = await asyncio.to_thread(self.evidence.move_in, outcome.evidence)
        except TimeoutError:
            log.warning("averaging failed", round=begin.round, why=f"the engine said nothing for {seconds:.0f} s")
            return None, held, garbled
        except Refused as refused:
            log.warning("averaging failed", round=begin.round, why=refused.what)
            return None, held, garbled
        if outcome.failed:
            log.warning("averaging was incomplete", round=begin.round, failed=dict(outcome.failed))
        included = tuple(members[each][0] for each in outcome.included)
        if index not in held or not included:
            return None, held, garbled
        start, stop = shares[index]
        self._reduced.append((begin.round, held[index], self._group))
        part = Part(index, start, stop, held[index], len(outcome.parts[index]), self._me, included, evidence)
        tokens = tuple(weights[each] for each in outcome.included)
        body = Vouched(begin.run, begin.round, previous, ballot.epoch, exchange, tokens, part)
        return sign_part(self._key, body), held, garbled

    def _taken_last(self) -> bytes:
        """The newest group whose means of ours are in a record; empty if none are, or if they left nothing out."""
        for round_number, digest, taken in reversed(self._reduced) if self._packing.down.sparse else ():
            entry = self._journal.entry(round_number)
            if entry is not None and any((p.reducer, p.digest) == (self._me, digest) for p in entry.record.parts):
                return taken
        return b""

    async def stop_averaging(self) -> None:
        if self.engine is not None and self._group:
            with suppress(Refused):
                await self.engine.cancel(self._group)

    async def fetch_part(self, part: Part, sources: Sequence[NodeId]) -> bool:
        """By hash, from whoever has it: its reducer, the other peers, the coordinator's archive. Ends in bounded time."""
        values = part.stop - part.start
        codecs = [each for each in (self._packing.up, self._packing.down) if each.encoded_bytes(values) == part.size]
        if not codecs:
            return False
        seconds = PART_SECONDS + part.size / PART_BYTES_PER_SECOND_MIN
        turn = self._on_their_way.setdefault(part.digest, asyncio.Lock())
        async with self._fetching, turn:  # of two orders for one part the second finds it here
            if not (await self._fetch_from_peers(part, sources, seconds) or await self._fetch_archived(part, seconds)):
                return False
            return await asyncio.to_thread(self._decodes, part, codecs[0])

    async def _fetch_from_peers(self, part: Part, sources: Sequence[NodeId], seconds: float) -> bool:
        others = [node for node in sources if node not in (part.reducer, self._me)]
        random.shuffle(others)  # the next try meets others first
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for node in (part.reducer, *others):
                    if self._blobs.has(part.digest):
                        return True
                    peer = self._peer_of(node)
                    if peer is None or self.engine is None:
                        continue
                    with suppress(Refused):
                        data = await self.engine.fetch_part(peer, part.digest, part.size, timeout_seconds=seconds)
                        if digest_of(data) == part.digest:
                            await self._keep(data)
        return self._blobs.has(part.digest)

    async def _fetch_archived(self, part: Part, seconds: float) -> bool:
        with suppress(Refused, TimeoutError):
            async with asyncio.timeout(seconds):
                await self._link.fetch_blob(BlobRef(part.digest, part.size), self._blobs)
        return self._blobs.has(part.digest)

    def _decodes(self, part: Part, codec: Codec) -> bool:
        """Whether a record may name it. What its hash promises may still be what no codec reads: then nobody could fold
        a record that holds it, so nobody may vote for one."""
        try:
            codec.check(self._blobs.read(part.digest), part.stop - part.start)
        except Refused as refused:
            log.warning("a part that cannot be folded", reducer=part.reducer[:16], why=refused.what)
            return False
        return True

    async def _keep(self, data: bytes) -> Digest:
        """Put a part where peers and the next start find it."""
        async with self._store_turn:
            try:
                return (await asyncio.to_thread(self._blobs.put_bytes, data)).digest
            except Refused as refused:
                if refused.reason is not Code.DISK_CAP:
                    raise
            self._make_room()  # a part is needed now; a shard can be had again
            return (await asyncio.to_thread(self._blobs.put_bytes, data)).digest


def _bytes(told: object) -> int:
    """What it takes of a letter."""
    return len(canonical.to_bytes(told))
