"""The courier: letters and parts between this node and its peers, by way of the engine. Decides nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog

from node import letters
from node.core.rounds import group
from node.engine import AveragingJob, Engine
from node.journal import Journal
from node.link import Link
from protocol.blobs import BlobStore, digest_of
from protocol.codec import Codec
from protocol.errors import Code, Refused
from protocol.identity import check_rollback, check_roster, coordinator_key
from protocol.log import spans
from protocol.messages import Begin, LogReply, LogRequest, Message
from protocol.types import (
    Ballot,
    BlobRef,
    Digest,
    Epoch,
    Manifest,
    NodeId,
    Part,
    PeerId,
    Roster,
    SignedRollback,
    SignedRoster,
)

SEND_SECONDS = 10.0  # a small message that takes longer is lost; the round has its own deadline
FETCH_SECONDS = 60.0
LOG_PAGE = 16  # entries in one answer to a peer
SENDER_SECONDS_MIN = 2.0  # without progress for less, a sender on a home line is only slow

log = structlog.get_logger()


class Courier:
    """One node's dealings with its peers. `engine` is set while there is one."""

    def __init__(
        self,
        manifest: Manifest,
        me: NodeId,
        *,
        codec: Codec,
        journal: Journal,
        blobs: BlobStore,
        store_turn: asyncio.Lock,
        make_room: Callable[[], None],
        link: Link,
        rosters: Callable[[], Mapping[Epoch, SignedRoster]],
        rollbacks: Callable[[], tuple[SignedRollback, ...]],
    ) -> None:
        self.engine: Engine | None = None
        self._manifest = manifest
        self._me = me
        self._codec = codec
        self._journal = journal
        self._blobs = blobs
        self._store_turn = store_turn
        self._make_room = make_room
        self._link = link
        self._rosters = rosters
        self._rollbacks = rollbacks
        self._group = b""

    # letters

    async def deliver(self, node: NodeId, letter: bytes) -> None:
        """Once, and without a word when it fails: whoever needs it more says it again."""
        peer = self._peer_of(node)
        if peer is None or self.engine is None:
            return
        try:
            await self.engine.send(peer, letter, timeout_seconds=SEND_SECONDS)
        except Refused as refused:
            log.debug("not delivered", to=node[:8], why=refused.what)

    def open(self, peer: PeerId, letter: bytes) -> tuple[Message, str] | None:
        """The message in a letter, if it is genuine and its author's own peer brought it."""
        try:
            message, signature = letters.unseal(letter)
            if self._peer_of(message.sender) != peer:
                raise Refused(Code.SIGNATURE, "a letter by another hand")
            if isinstance(message, LogReply):
                coordinator = coordinator_key(self._manifest.run)
                for signed in message.rosters:
                    check_roster(coordinator, signed)
                for rollback in message.rollbacks:
                    check_rollback(coordinator, rollback)
        except Refused as refused:
            log.warning("a letter was refused", peer=peer[-8:], why=refused.what)
            return None
        return message, signature

    def log_reply(self, request: LogRequest) -> LogReply:
        """What this node has of the log from a round on, with the rosters that it takes to check it."""
        entries = self._journal.entries(request.round, most=LOG_PAGE)
        known = self._rosters()
        named = {entry.certificate.ballot.epoch for entry in entries} | {entry.record.epoch for entry in entries}
        last = self._journal.entry(request.round + len(entries) - 1)
        settled = last.certificate.ballot.epoch if last is not None else Epoch(0)
        named |= {epoch for epoch in known if epoch >= settled}  # a record proposed again may be of any of these
        rosters = tuple(known[epoch] for epoch in sorted(named) if epoch in known)
        return LogReply(self._manifest.run, request.round, self._me, entries, rosters, self._rollbacks())

    def _peer_of(self, node: NodeId) -> PeerId | None:
        known = self._rosters()
        for epoch in sorted(known, reverse=True):
            member = known[epoch].roster.member(node)
            if member is not None:
                return member.peer
        return None

    # averaging and parts

    async def average(
        self, begin: Begin, roster: Roster, payload: bytes, *, seconds: float
    ) -> tuple[Part | None, dict[int, Digest]]:
        """The part reduced here, and the hashes of all parts that this node holds now; never raises a refusal."""
        members = group(begin, roster)
        index = [node for node, _ in members].index(self._me)
        named = [member for node, _ in members if (member := roster.member(node)) is not None]
        shares = spans(self._manifest.parameters, [member.role for member in named])
        weights = tuple(weight for _, weight in members)
        self._group = _group_id(begin.run, begin.readies[0].ready.previous, begin.ballot)
        job = AveragingJob(
            group=self._group,
            peers=tuple(member.peer for member in named),
            weights=weights,
            spans=shares,
            deadline_seconds=seconds,
            sender_seconds=max(SENDER_SECONDS_MIN, seconds / 3),
        )
        held: dict[int, Digest] = {}
        try:
            if self.engine is None:
                raise Refused(Code.CHILD_DIED, "the engine is being restarted")
            outcome = await self.engine.average(job, payload if weights[index] else b"")
            for number, data in outcome.parts.items():
                held[number] = await self._keep(data)
        except Refused as refused:
            log.warning("averaging failed", round=begin.round, why=refused.what)
            return None, held
        if outcome.failed:
            log.warning("averaging was incomplete", round=begin.round, failed=dict(outcome.failed))
        included = tuple(members[each][0] for each in outcome.included)
        if index not in held or not included:
            return None, held
        start, stop = shares[index]
        return Part(index, start, stop, held[index], len(outcome.parts[index]), self._me, included), held

    async def stop_averaging(self) -> None:
        if self.engine is not None and self._group:
            with suppress(Refused):
                await self.engine.cancel(self._group)

    async def fetch_part(self, part: Part, sources: tuple[NodeId, ...]) -> bool:
        """By hash, from whoever has it: peers first, then the coordinator's archive."""
        if self._blobs.has(part.digest):
            return True
        if part.size != self._codec.encoded_bytes(part.stop - part.start):
            return False
        for node in sources:
            peer = self._peer_of(node)
            if peer is None or self.engine is None:
                continue
            with suppress(Refused):
                data = await self.engine.fetch_part(peer, part.digest, part.size, timeout_seconds=FETCH_SECONDS)
                if digest_of(data) == part.digest:
                    await self._keep(data)
                    return True
        with suppress(Refused):
            async with self._store_turn:
                await self._link.fetch_blob(BlobRef(part.digest, part.size), self._blobs)
            return True
        return False

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


def _group_id(run: str, previous: Digest, ballot: Ballot) -> bytes:
    """Members with another head, roster or attempt are in another group."""
    return hashlib.sha256(f"{run}\0{previous}\0{ballot.epoch}\0{ballot.attempt}".encode()).digest()
