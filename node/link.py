"""The link: a node's only door to its coordinator. Checks whatever comes through; decides nothing.

Nothing is sent to a server that does not hold the pinned certificate.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # an outage is ours to report, once

import grpc
import structlog

from node.core.backoff import wait_seconds
from node.core.pace import Bucket
from protocol import address, canonical, identity, tls
from protocol.blobs import LEAF_BYTES, BlobStore, Writer, atomic_write, check_digest
from protocol.contribution import Complaint, grant_is_genuine, grant_of
from protocol.errors import Code, Refused
from protocol.identity import Key, coordinator_key, peer_id_of
from protocol.invite import Invite
from protocol.limits import (
    ADDRESSES_MAX,
    BLOB_CHUNK_BYTES,
    CONTEXT_MAX,
    CONTROL_BYTES_MAX,
    INCARNATION_BYTES,
    NUMBER_MAX,
    PARAMETERS_MAX,
    PROTOCOL_VERSION,
    REASON_CHARACTERS_MAX,
    ROLLBACKS_MAX,
    ROSTERS_RECALLED_MAX,
    TOKEN_BYTES,
    VOCABULARY_MAX,
)
from protocol.proof import Evidence
from protocol.types import (
    BaseCheckpoint,
    BlobRef,
    Digest,
    Epoch,
    Head,
    Lease,
    LogEntry,
    Manifest,
    NodeId,
    PeerId,
    RunId,
    Seal,
    Shard,
    SignedManifest,
    SignedPass,
    SignedRollback,
    SignedRoster,
)
from protocol.v1 import barnraise_pb2 as wire
from protocol.v1 import barnraise_pb2_grpc as wire_grpc

CONNECT_SECONDS: Final = 10.0  # a handshake over a satellite takes two
CALL_SECONDS: Final = 20.0
LOG_SECONDS: Final = 60.0  # 3 MB over a slow line
LEAVES_SECONDS: Final = 180.0  # the coordinator reads a blob of up to 16 GiB first
STALL_SECONDS: Final = 60.0  # a download from which nothing comes for so long is begun again where it stopped
LEAVE_SECONDS: Final = 5.0  # whoever leaves does not wait for long
BUSY_TRIES: Final = 6  # of one call, some minutes in all: as long as a network of many nodes takes to be let in
BUSY_SECONDS_MAX: Final = 60.0  # of one wait, whatever the coordinator says
PIN_SECONDS: Final = 30.0  # some tries
UPLOAD_BYTES_PER_SECOND_MIN: Final = 16 << 10
RECONNECT_MS: Final = (
    500,
    3000,
)  # gRPC spreads its tries by a fifth: too little for a thousand nodes that lost one server
LEAVES_BYTES_MAX: Final = 2 << 20  # of a blob of 16 GiB; larger ones are checked at their end
OPTIONS: Final = (
    ("grpc.ssl_target_name_override", tls.SERVER_NAME),
    ("grpc.default_authority", tls.SERVER_NAME),
    ("grpc.max_receive_message_length", CONTROL_BYTES_MAX + (64 << 10)),
    ("grpc.max_send_message_length", CONTROL_BYTES_MAX + (64 << 10)),
    ("grpc.keepalive_time_ms", 15_000),  # with the 10 s below: a node that has moved is back within 30
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the one that counts where nothing else comes; gRPC's own is a minute
    ("grpc.max_reconnect_backoff_ms", 10_000),  # gRPC's own two minutes would outlast the outage
    ("grpc.enable_http_proxy", 0),  # the pin was checked without one
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is small on the line must not grow here
)

log = structlog.get_logger()
T = TypeVar("T")
Progress = Callable[[int, int], None]  # bytes here, bytes in all


@dataclass(frozen=True)
class Door:
    """Where a coordinator is and how to know it: what a node keeps of its invite."""

    addresses: tuple[str, ...]  # host:port
    fingerprint: str
    run: RunId
    endorsed: int = 0  # the highest number of a certificate that it has shown

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts, as the invite spells them."""
        return tuple(found.host for text in self.addresses if (found := address.parse(text)) is not None)

    @classmethod
    def of(cls, invite: Invite) -> Door:
        return cls(invite.addresses, invite.fingerprint, invite.run)

    @classmethod
    def load(cls, path: Path) -> Door:
        door = canonical.from_bytes(cls, path.read_bytes())
        identity.check_run_id(door.run)
        return door

    def save(self, path: Path) -> None:
        atomic_write(path, canonical.to_bytes(self))


@dataclass(frozen=True)
class Opened:
    """What a coordinator says to a node that it lets in; all of it checked."""

    signed_pass: SignedPass
    manifest: SignedManifest
    roster: SignedRoster | None
    base: BaseCheckpoint
    rendezvous: tuple[str, ...]
    shards: tuple[Shard, ...]
    skew_seconds: float  # how far the coordinator's clock is ahead of ours
    rollbacks: tuple[SignedRollback, ...]  # all of the run
    silent_epoch: Epoch | None  # this node has forgotten promises: it signs nothing under rosters up to this one
    life: int  # highest that the coordinator knows of this node: its next start must say a higher one
    coordinator: str = ""  # the IP address that it was reached at


@dataclass(frozen=True)
class Beat:
    """What a node says of itself."""

    activity: str
    head: Head | None = None
    epoch: int = -1  # of the newest roster that it holds
    branch: int = 0  # how many rollbacks it knows of
    life: int = 0  # when it was raised since the open
    known_round: int = 0  # the coordinator's head, as the node knows it
    addresses: tuple[str, ...] = ()
    lease_ids: tuple[str, ...] = ()
    tokens_per_second: float = 0.0
    train_loss: float | None = None
    busy_share: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True)
class News:
    roster: SignedRoster | None  # when newer than the node's
    head_round: int
    wanted: tuple[Digest, ...]  # parts that the coordinator lacks
    asked: tuple[Digest, ...]  # what this node is to show: its contributions, and the evidence of its means
    renewed: tuple[str, ...]  # lease ids
    notice: str
    coordinator_ms: int
    finished: bool
    rollbacks: tuple[SignedRollback, ...]  # those that the node does not know of
    epoch: int  # of the newest roster that the coordinator knows of; with `branch`, how much it has forgotten
    branch: int  # how many rollbacks it knows of
    astray_from: int | None  # our head is not on the log: our records from this round on are wanted
    silent_epoch: Epoch | None  # as in Opened; a session that was opened again may have raised it
    nobody_callable: bool = False  # no round can end until a node comes that the others can call


@dataclass(frozen=True)
class Page:
    """Consecutive entries of the line, the rosters that they name, the newest base checkpoint, all rollbacks."""

    entries: tuple[LogEntry, ...]
    rosters: tuple[SignedRoster, ...]
    base: BaseCheckpoint
    rollbacks: tuple[SignedRollback, ...]


@dataclass(frozen=True)
class _Hello:
    """What an open says again when the coordinator has forgotten the session."""

    invite: str
    name: str
    addresses: tuple[str, ...]
    software: str
    life: int


class Link:
    """One coordinator, as one node talks to it. Open it first; it opens a lost session again by itself."""

    def __init__(
        self, door: Door, *, key: Key, transport_key: Key, upload_bytes_per_second: float | None = None
    ) -> None:
        self.door = door
        self.peer = peer_id_of(transport_key.public_bytes)
        self._key = key
        self._transport_key = transport_key
        self._coordinator = coordinator_key(door.run)
        self._channel: grpc.aio.Channel | None = None
        self._stub: wire_grpc.CoordinatorAsyncStub | None = None
        self._pace = None if upload_bytes_per_second is None else Bucket(upload_bytes_per_second)
        self._session = ""
        self._host = ""
        self._hello = _Hello("", "", (), "", 0)
        self._incarnation = secrets.token_bytes(INCARNATION_BYTES)  # one link is one running process
        self._silent_epoch: Epoch | None = None
        self._manifest: Manifest | None = None
        self._opening = asyncio.Lock()
        # What each address has shown, and until when that counts.
        self._pins: dict[address.Address, tuple[tls.Pinned, float]] = {}

    def expect(self, manifest: Manifest) -> None:
        """What this coordinator said its run is: it may not say anything else from here on."""
        self._manifest = manifest

    async def open(
        self, *, life: int, invite: str = "", name: str = "", addresses: Sequence[str] = (), software: str = ""
    ) -> Opened:
        """Connect at the first address that answers with the pinned certificate, and be let in.

        The invite is needed once; later the node's key is known. A life that the coordinator has heard before from
        another process is that of a disk which came from a backup.
        """
        async with self._opening:
            self._hello = _Hello(invite, name, tuple(addresses)[:ADDRESSES_MAX], software, life)
            await self._connect()
            opened = await self._enter()
            self._pins.clear()  # who comes back later looks anew
            return opened

    async def heartbeat(self, beat: Beat, *, wait_seconds: float = 0.0) -> News:
        """Say how things are; answered at once when there is news, else after about `wait_seconds`."""
        self._hello = replace(self._hello, life=max(self._hello.life, beat.life))
        request = wire.HeartbeatRequest(
            activity=beat.activity,
            head_round=beat.head.round if beat.head else 0,
            head_hash=beat.head.hash if beat.head else "",
            epoch=beat.epoch + 1,
            addresses=beat.addresses[:ADDRESSES_MAX],
            tokens_per_second=beat.tokens_per_second,
            train_loss=math.nan if beat.train_loss is None else beat.train_loss,
            wait_seconds=wait_seconds,
            bytes_sent=beat.bytes_sent,
            bytes_received=beat.bytes_received,
            lease_ids=beat.lease_ids,
            busy_share=min(max(beat.busy_share, 0.0), 1.0),
            known_round=beat.known_round,
            branch=beat.branch,
            life=beat.life,
        )
        reply: wire.HeartbeatReply = await self._call("Heartbeat", request, seconds=wait_seconds + CALL_SECONDS)
        return News(
            self._roster(reply.roster) if reply.roster else None,
            reply.head_round,
            tuple(check_digest(digest) for digest in reply.wanted),
            tuple(check_digest(digest) for digest in reply.asked),
            tuple(reply.renewed),
            canonical.shown(reply.notice),
            reply.coordinator_ms,
            reply.finished,
            self._rollbacks(reply.rollbacks, known=beat.branch),
            _number("epoch", reply.epoch) - 1,
            _number("branch", reply.branch),
            _number("astray_from", reply.astray_from) - 1 if reply.astray_from else None,
            self._silent_epoch,
            reply.nobody_callable,
        )

    async def acquire_leases(self, sequences: int) -> tuple[Lease, ...]:
        reply: wire.LeaseReply = await self._call("AcquireLeases", wire.LeaseRequest(sequences=sequences))
        leases = tuple(canonical.from_bytes(Lease, data) for data in reply.leases)
        for lease in leases:
            check_lease(lease, self.door.run, self._key.public)
        return leases

    async def read_log(self, from_round: int) -> Page:
        """The next entries from a round on; none when the log ends before it."""
        request = wire.ReadLogRequest(from_round=from_round)
        reply: wire.ReadLogReply = await self._call("ReadLog", request, seconds=LOG_SECONDS)
        entries = tuple(canonical.from_bytes(LogEntry, data) for data in reply.entries)
        for expected, entry in enumerate(entries, from_round):
            if entry.record.round != expected or entry.record.run != self.door.run:
                raise Refused(Code.RECORD_BAD, f"record {entry.record.round}, expected {expected}")
        rosters = tuple(self._roster(data) for data in reply.rosters)
        base = canonical.from_bytes(BaseCheckpoint, reply.base)
        return Page(entries, rosters, base, self._rollbacks(reply.rollbacks))

    async def push_entry(
        self,
        entry: LogEntry | None,
        rosters: Sequence[SignedRoster] = (),
        rollbacks: Sequence[SignedRollback] = (),
    ) -> tuple[Digest, ...]:
        """Bring a certified record; tells which parts the coordinator lacks.

        With it, or alone, what the coordinator once signed and may not know any more. Of many rosters those go that the
        record names, and then the first ones.
        """
        named = {entry.record.epoch, entry.certificate.ballot.epoch} if entry is not None else set()
        needed_first = sorted(rosters, key=lambda signed: signed.roster.epoch not in named)
        request = wire.PushEntryRequest(
            entry=canonical.to_bytes(entry) if entry is not None else b"",
            rosters=map(canonical.to_bytes, needed_first[:ROSTERS_RECALLED_MAX]),
            rollbacks=map(canonical.to_bytes, rollbacks),
        )
        reply: wire.PushEntryReply = await self._call("PushEntry", request)
        return tuple(check_digest(digest) for digest in reply.missing)

    async def fetch_blob(self, ref: BlobRef, store: BlobStore, on_progress: Progress | None = None) -> None:
        """Bring a blob into the store. An earlier download goes on where it stopped, and so does a cut one.

        Wrong bytes are asked for once more: something on the way may have mixed two answers up."""
        if store.has(ref.digest):
            return
        wrong_at = -1
        with store.writer(ref.digest, ref.size, await self._leaves(ref)) as writer:
            while writer.position < ref.size:
                before, session = writer.position, self._session
                try:
                    async with aclosing(self._chunks(ref.digest, before)) as chunks:
                        async for chunk in chunks:
                            _take(writer, chunk)
                            if on_progress is not None:
                                on_progress(writer.position, ref.size)
                except Refused as refusal:
                    if refusal.reason is Code.SESSION:
                        await self._reenter(session)
                        continue
                    if refusal.reason is Code.BUSY:
                        await _wait_for(refusal, failures=0)
                        continue
                    if refusal.reason is Code.BLOB_CORRUPT and writer.is_open and writer.position != wrong_at:
                        wrong_at = writer.position
                        continue
                    if refusal.reason not in (Code.UNREACHABLE, Code.LIMIT) or writer.position == before:
                        raise
                if writer.position == before:
                    raise Refused(Code.BLOB_CORRUPT, f"blob {ref.digest[:12]} ends at {before:,} of {ref.size:,} bytes")
            writer.finish()

    async def upload_part(self, digest: Digest, data: bytes) -> bool:
        """Give the coordinator a part that it wants; false when it had it already."""

        async def chunks() -> AsyncIterator[wire.BlobChunk]:
            for offset in range(0, len(data), BLOB_CHUNK_BYTES):
                piece = data[offset : offset + BLOB_CHUNK_BYTES]
                if self._pace is not None:
                    self._pace, seconds = self._pace.take(len(piece), asyncio.get_running_loop().time())
                    await asyncio.sleep(seconds)
                yield wire.BlobChunk(data=piece, offset=offset, digest=digest, size=len(data))

        seconds = CALL_SECONDS + len(data) / UPLOAD_BYTES_PER_SECOND_MIN
        reply: wire.WriteBlobReply = await self._call("WriteBlob", chunks, seconds=seconds)
        return reply.stored

    async def report(self, evidence: Evidence) -> str:
        """Show the coordinator what proves that a member lied; tells which fault it is."""
        request = wire.ReportRequest(evidence=canonical.to_bytes(evidence))
        reply: wire.ReportReply = await self._call("Report", request)
        return canonical.shown(reply.fault)

    async def complain(self, complaint: Complaint) -> None:
        """Have the coordinator ask a member for what it signed, and we could not read."""
        await self._call("Report", wire.ReportRequest(complaint=canonical.to_bytes(complaint)))

    async def leave(self, why: str = "", seal: Seal | None = None) -> None:
        """Give the leases back, and close. With a seal, nobody has to reckon with this node's vote."""
        request = wire.LeaveRequest(why=why[:80])
        if seal is not None:
            request.sealed, request.seal_round, request.seal_epoch = True, seal.round, seal.epoch
        try:
            await self._try("Leave", request, LEAVE_SECONDS)
        finally:
            await self.close()

    async def close(self) -> None:
        channel, self._channel, self._stub, self._session = self._channel, None, None, ""
        if channel is not None:
            await channel.close(None)

    # connecting

    async def _connect(self) -> None:
        """To the first address that answers; what was connected before stays so until one does."""
        failures: list[Refused] = []
        for text in self.door.addresses:
            found = address.parse(text)
            if found is None:
                continue
            try:
                pinned = await self._pinned(found)
            except Refused as refusal:
                failures.append(refusal)
                continue
            await self.close()
            low, high = RECONNECT_MS
            own_pace = ("grpc.initial_reconnect_backoff_ms", low + secrets.randbelow(high - low))
            credentials = grpc.ssl_channel_credentials(pinned.root)
            self._channel, self._host = grpc.aio.secure_channel(text, credentials, (*OPTIONS, own_pace)), pinned.host
            self._stub = wire_grpc.CoordinatorStub(self._channel)
            self.door = replace(self.door, endorsed=pinned.number)
            return
        impostors = [refusal for refusal in failures if refusal.reason is Code.PIN_MISMATCH]
        raise next(iter(impostors + failures), Refused(Code.UNREACHABLE, "no address of the coordinator is known"))

    async def _pinned(self, at: address.Address) -> tls.Pinned:
        """The certificate that this address shows. Who tries again soon does not look again: a coordinator to which everybody
        comes at once has half as many connections to take."""
        known, until = self._pins.get(at, (None, 0.0))
        if known is None or time.monotonic() > until or known.number < self.door.endorsed:
            fetching = partial(tls.fetch_pinned, newest=self.door.endorsed, timeout_seconds=CONNECT_SECONDS)
            known = await asyncio.to_thread(fetching, at, self.door.fingerprint, self.door.run)
            self._pins[at] = known, time.monotonic() + PIN_SECONDS
        return known

    async def _enter(self) -> Opened:
        """Answer a challenge with both keys; then check all that is said in return."""
        node, began = self._key.public, time.time()
        asked = wire.ChallengeRequest(node=node, protocol=PROTOCOL_VERSION)
        challenge: wire.ChallengeReply = await self._once("Challenge", asked)
        skew_seconds = challenge.coordinator_ms / 1000 - (began + time.time()) / 2
        proof = challenge.nonce + self.door.run.encode()
        request = wire.OpenRequest(
            node=node,
            nonce=challenge.nonce,
            signature=bytes.fromhex(self._key.sign("open", proof)),
            invite=self._hello.invite,
            peer=self.peer,
            peer_public_key=self._transport_key.public_bytes,
            peer_signature=bytes.fromhex(self._transport_key.sign("peer", proof + node.encode())),
            addresses=self._hello.addresses,
            name=self._hello.name,
            protocol=PROTOCOL_VERSION,
            software=self._hello.software,
            life=self._hello.life,
            incarnation=self._incarnation,
        )
        reply: wire.OpenReply = await self._once("Open", request)
        opened = self._opened(reply, skew_seconds)
        self._session, self._silent_epoch = reply.session, opened.silent_epoch
        self._hello = replace(self._hello, life=opened.life)
        return opened

    def _opened(self, reply: wire.OpenReply, skew_seconds: float) -> Opened:
        signed = canonical.from_bytes(SignedManifest, reply.manifest)
        manifest = check_manifest(signed, self.door.run)
        if self._manifest not in (None, manifest):
            two = " and ".join(canonical.digest(each)[:12] for each in (self._manifest, manifest))
            raise Refused(Code.TWO_STORIES, f"the coordinator has signed two manifests of this run: {two}")
        self.expect(manifest)
        base = canonical.from_bytes(BaseCheckpoint, reply.base)
        check_base(base, manifest)
        shards = tuple(canonical.from_bytes(Shard, data) for data in reply.shards)
        check_shards(shards, manifest)
        return Opened(
            self._pass(getattr(reply, "pass"), reply.coordinator_ms),
            signed,
            self._roster(reply.roster) if reply.roster else None,
            base,
            tuple(canonical.shown(text) for text in reply.rendezvous[:ADDRESSES_MAX]),
            shards,
            skew_seconds,
            self._rollbacks(reply.rollbacks),
            Epoch(_number("silent_epoch", reply.silent_epoch) - 1) if reply.silent_epoch else None,
            max(self._hello.life, _number("life", reply.life)),
            self._host,
        )

    def _pass(self, data: bytes, coordinator_ms: int) -> SignedPass:
        """Checked by the coordinator's clock: ours may be wrong."""
        signed = canonical.from_bytes(SignedPass, data)
        check_pass(signed, self.door.run, node=self._key.public, peer=self.peer, now_ms=coordinator_ms)
        return signed

    def _roster(self, data: bytes) -> SignedRoster:
        signed = canonical.from_bytes(SignedRoster, data)
        if identity.check_roster(self._coordinator, signed).run != self.door.run:
            raise Refused(Code.SIGNATURE, "the roster is of another run")
        return signed

    def _rollbacks(self, data: Sequence[bytes], *, known: int = 0) -> tuple[SignedRollback, ...]:
        signed = tuple(canonical.from_bytes(SignedRollback, each) for each in data)
        check_rollbacks(signed, self.door.run, known=known)
        return signed

    # calling

    async def _call(self, method: str, request: Any, *, seconds: float = CALL_SECONDS) -> Any:
        """One call; a second one after a session that the coordinator has forgotten was opened again."""
        session = self._session
        try:
            return await self._once(method, request, seconds=seconds)
        except Refused as refusal:
            if refusal.reason is not Code.SESSION:
                raise
        await self._reenter(session)
        return await self._once(method, request, seconds=seconds)

    async def _reenter(self, forgotten: str) -> None:
        async with self._opening:
            if self._session == forgotten:  # else another call has done it
                await self._enter()

    async def _once(self, method: str, request: Any, *, seconds: float = CALL_SECONDS) -> Any:
        """One call, again only where the coordinator says when. A request is a message, or begins a stream of them."""
        for failures in range(BUSY_TRIES - 1):
            try:
                return await self._try(method, request, seconds)
            except Refused as refusal:
                if refusal.reason is not Code.BUSY:
                    raise
                await _wait_for(refusal, failures=failures)
        return await self._try(method, request, seconds)

    async def _try(self, method: str, request: Any, seconds: float) -> Any:
        if self._stub is None:
            raise Refused(Code.UNREACHABLE, "the link to the coordinator is not open")
        stub = self._stub
        message = request() if callable(request) else request
        try:
            return await getattr(stub, method)(message, timeout=seconds, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from None
        except asyncio.CancelledError:
            raise self._closed(stub) from None

    async def _chunks(self, digest: Digest, offset: int) -> AsyncGenerator[wire.BlobChunk, None]:
        """A download from an offset on; a stall or a cut ends it as UNREACHABLE."""
        if self._stub is None:
            raise Refused(Code.UNREACHABLE, "the link to the coordinator is not open")
        stub = self._stub
        call = stub.ReadBlob(wire.ReadBlobRequest(digest=digest, offset=offset), metadata=self._metadata())
        try:
            while True:
                async with asyncio.timeout(STALL_SECONDS):
                    chunk = await call.read()
                if not isinstance(chunk, wire.BlobChunk):  # grpc.aio.EOF
                    return
                yield chunk
        except TimeoutError:
            raise Refused(Code.UNREACHABLE, f"nothing came for {STALL_SECONDS:.0f} seconds") from None
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from None
        except asyncio.CancelledError:
            raise self._closed(stub) from None
        finally:
            call.cancel()

    async def _leaves(self, ref: BlobRef) -> bytes | None:
        if not BLOB_CHUNK_BYTES < ref.size <= LEAVES_BYTES_MAX // LEAF_BYTES * BLOB_CHUNK_BYTES:
            return None
        request = wire.ReadLeavesRequest(digest=ref.digest)
        reply: wire.ReadLeavesReply = await self._call("ReadLeaves", request, seconds=LEAVES_SECONDS)
        return reply.leaves or None

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("session", self._session),) if self._session else ()

    def _closed(self, stub: object) -> BaseException:
        """gRPC cancels the waiting call when its channel is closed, which must not look like our own task's end."""
        task = asyncio.current_task()
        if self._stub is not stub and task is not None and not task.cancelling():
            return Refused(Code.UNREACHABLE, "the link to the coordinator was closed")
        return asyncio.CancelledError()


_VERSION: Final = re.compile(r"[0-9][0-9a-z.]{0,31}")
_NOBODY_CAN: Final = "No node can train this run: tell the researcher who invited you."


def check_manifest(signed: SignedManifest, run: RunId) -> Manifest:
    manifest = identity.check_manifest(coordinator_key(run), signed)
    if manifest.run != run:
        raise Refused(Code.SIGNATURE, f"the manifest is of run {manifest.name}, not of this one")
    for what, value, most in (
        ("parameters", manifest.parameters, PARAMETERS_MAX),
        ("vocabulary", manifest.vocabulary, VOCABULARY_MAX),
        ("context", manifest.context, CONTEXT_MAX),
    ):
        if not 1 <= value <= most:
            raise Refused(Code.FIELD, f"the manifest's {what} is {value}, wanted 1 to {most}", fix=_NOBODY_CAN)
    if not _VERSION.fullmatch(manifest.transformers):  # it becomes part of a command that a volunteer may type
        wrong = f"the manifest's transformers is {canonical.shown(manifest.transformers)!r}, wanted a version"
        raise Refused(Code.FIELD, wrong, fix=_NOBODY_CAN)
    if manifest.token_bytes not in TOKEN_BYTES:
        wrong = f"the manifest's token_bytes is {manifest.token_bytes}, wanted 2 or 4"
        raise Refused(Code.FIELD, wrong, fix=_NOBODY_CAN)
    return manifest


def check_pass(signed: SignedPass, run: RunId, *, node: NodeId, peer: PeerId, now_ms: int) -> None:
    body = identity.check_pass(coordinator_key(run), signed, now_ms)
    if (body.run, body.node, body.peer) != (run, node, peer):
        raise Refused(Code.SIGNATURE, "the pass is not for this node")


def check_base(base: BaseCheckpoint, manifest: Manifest) -> None:
    if base.round == 0 and base.state != manifest.genesis:
        raise Refused(Code.STATE_MISMATCH, "the first base checkpoint is not the manifest's first state")


def check_shards(shards: tuple[Shard, ...], manifest: Manifest) -> None:
    """Every node of a run is told of the same data."""
    if (found := canonical.digest(shards)) != manifest.data:
        what = f"{len(shards)} shards with the digest {found[:12]}, the manifest has {manifest.data[:12]}"
        raise Refused(Code.TWO_STORIES, what)


def check_lease(lease: Lease, run: RunId, node: NodeId) -> None:
    """Refuse what no other member would let us count."""
    if lease.node != node or not 0 <= lease.range.start < lease.range.stop:
        raise Refused(Code.FIELD, f"lease {canonical.shown(lease.lease_id)} is not one of this node's")
    if not grant_is_genuine(run, node, grant_of(lease)):
        raise Refused(
            Code.SIGNATURE, f"lease {canonical.shown(lease.lease_id)} was not granted by the run's coordinator"
        )


def check_rollbacks(rollbacks: Sequence[SignedRollback], run: RunId, *, known: int = 0) -> None:
    """Refuse any but those that follow the `known` first ones without a gap."""
    if known + len(rollbacks) > ROLLBACKS_MAX:
        raise Refused(Code.LIMIT, f"{known + len(rollbacks)} rollbacks, at most {ROLLBACKS_MAX} are allowed")
    for expected, signed in enumerate(rollbacks, known + 1):
        rollback = identity.check_rollback(coordinator_key(run), signed)
        if rollback.run != run:
            raise Refused(Code.SIGNATURE, "the rollback is of another run")
        if rollback.number != expected:
            raise Refused(Code.FIELD, f"rollback {rollback.number}, expected {expected}")
        if len(rollback.reason) > REASON_CHARACTERS_MAX:
            what = f"rollback {expected} for a reason of {len(rollback.reason)} characters"
            raise Refused(Code.LIMIT, f"{what}, at most {REASON_CHARACTERS_MAX} are allowed")


def _number(name: str, value: int) -> int:
    if value > NUMBER_MAX:
        raise Refused(Code.FIELD, f"{name} {value}, expected at most {NUMBER_MAX}")
    return value


def _take(writer: Writer, chunk: wire.BlobChunk) -> None:
    if chunk.size != writer.size:
        raise Refused(Code.BLOB_CORRUPT, f"a blob of {chunk.size} bytes, expected {writer.size}")
    writer.write(chunk.data, chunk.offset)


def _refusal(error: grpc.aio.AioRpcError) -> Refused:
    """A refusal that the coordinator named, or what the network did."""
    what = canonical.shown(error.details() or error.code().name.lower())
    told = error.trailing_metadata() or ()
    named = _told(told, "barnraise-code")
    if named:
        return Refused.from_wire(named, what, _seconds(_told(told, "retry-after")))
    match error.code():
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Refused(Code.LIMIT, what)
        case grpc.StatusCode.UNIMPLEMENTED:
            return Refused(Code.VERSION, f"the coordinator does not know a call: {what}")
        case _:
            return Refused(Code.UNREACHABLE, what)


def _told(metadata: Iterable[Any], name: str) -> str:
    return next((str(value) for key, value in metadata if key == name), "")


def _seconds(text: str) -> float:
    """At most BUSY_SECONDS_MAX, and 0 for what is no number."""
    return min(float(text), BUSY_SECONDS_MAX) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else 0.0


async def _wait_for(refusal: Refused, *, failures: int) -> None:
    """What the coordinator said, and more for each time that it was not enough; never together with others."""
    seconds = refusal.retry_seconds + wait_seconds(failures=failures, luck=random.random())  # noqa: S311  # only spreads the load
    log.warning("the coordinator asks for patience", why=refusal.what, seconds=round(seconds, 1))
    await asyncio.sleep(seconds)
