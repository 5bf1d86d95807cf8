"""The door: what nodes may ask of the coordinator over gRPC, and what they are refused. Decides nothing about rounds.

Whoever has no session can ask for a challenge and answer it, and nothing else.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")  # read at the import; see serve()
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # every stranger's broken handshake is a line otherwise

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from coordinator.core import machine, quotas, strikes
from coordinator.core.inquiries import ANSWER_ROUNDS
from coordinator.core.names import distinct_name, visible
from coordinator.core.strikes import Kind
from coordinator.desk import Desk
from coordinator.gate import DOOR, Gate, Passage
from coordinator.store import StoredNode
from coordinator.transfers import Chunk, Transfers
from coordinator.turns import Turns
from protocol import address, canonical, identity, invite, p2pd
from protocol.contribution import Complaint, check_genuine, check_shape, sign_grant
from protocol.errors import DISK_CODES, Code, Exit, Refused
from protocol.identity import peer_id_of
from protocol.limits import (
    ADDRESSES_MAX,
    CONTROL_BYTES_MAX,
    INCARNATION_BYTES,
    NUMBER_MAX,
    PROTOCOL_VERSION,
    RANGES_MAX,
    ROLLBACKS_MAX,
    ROSTERS_RECALLED_MAX,
)
from protocol.proof import Evidence, prove
from protocol.types import (
    Digest,
    Epoch,
    Head,
    Lease,
    LogEntry,
    NodeId,
    Pass,
    PeerId,
    RoundNumber,
    RunId,
    Seal,
    SignedRollback,
    SignedRoster,
)
from protocol.v1 import barnraise_pb2 as wire

NONCE_SECONDS: Final = 30
ALIVE_SECONDS: Final = 5.0  # for a process that is there to answer, over any line
GOODBYE_SECONDS: Final = 1.0  # for the reason to arrive before the connection of a banned node is closed
NONCES_MAX: Final = 4096  # unanswered challenges: nearly twice what all networks together may ask for in that time
PASS_SECONDS: Final = 30 * 86400  # renewed with every session
WAIT_SECONDS_MAX: Final = 30.0  # of a heartbeat: proxies and routers forget a silent connection after a minute
CALLS_PER_NODE_MAX: Final = 32  # at the same time
CALLS_MAX: Final = 4096
PAGE_ENTRIES_MAX: Final = 256
PAGE_BYTES_MAX: Final = 64 << 10  # four seconds of the slowest line: a ping waits behind it
PAGE_STEP: Final = 16  # entries read from the store at a time
WANTED_MAX: Final = 1024  # parts named in one answer: those of 16 rounds of a full roster
SEQUENCES_MAX: Final = 1 << 31
REFUSAL_CHARACTERS_MAX: Final = 300  # HTTP/2 trailers are small
WHY_CHARACTERS_MAX: Final = 80
SOFTWARE_CHARACTERS_MAX: Final = 200
READS: Final = {"ReadBlob", "ReadLeaves"}  # decide nothing, and write nothing down
ACTIVITIES: Final = machine.TAKES_PART | machine.RESTS | {"joining", "syncing"}
OPTIONS: Final = (
    ("grpc.max_receive_message_length", CONTROL_BYTES_MAX + (64 << 10)),
    ("grpc.max_send_message_length", CONTROL_BYTES_MAX + (64 << 10)),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 2 * CALLS_PER_NODE_MAX),  # per connection
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the one that counts where nothing else is sent; gRPC's own is a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: 4 MiB of zeros must be 4 MiB on the line too
)

log = structlog.get_logger()
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
Messages = AsyncIterator[Any]

_NODE = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(
    r"/ip([46])/([0-9A-Fa-f:.]{2,45})/(?:tcp|udp)/([1-9][0-9]{0,4})((?:/(?:quic|quic-v1|ws|p2p-circuit))*)"
)


@dataclass(frozen=True)
class Nonce:
    node: NodeId
    passage: Passage
    until_ms: int


@dataclass
class Session:
    """What the door remembers of one connected node."""

    node: NodeId
    token: str
    incarnation: bytes
    passage: Passage  # it is good on no other connection
    calls: int = 0
    told: frozenset[Digest] = frozenset()  # wanted parts that it has heard of: no news any more
    told_finished: bool = False
    told_asked: frozenset[Digest] = frozenset()  # the same for what it is to show of its own
    told_notice: str = ""
    notice: str = ""  # besides what is held against it
    since_ms: int = 0
    heard: float = 0.0  # when its newest call began
    roused: asyncio.Event = field(default_factory=asyncio.Event)  # its heartbeat is answered at once
    life: int = 0  # the highest that it has said


class Server:
    """A listening door."""

    def __init__(self, server: grpc.aio.Server, gate: Gate, port: int, sockets: Path) -> None:
        self.port = port
        self.gate = gate
        self._server = server
        self._sockets = sockets

    async def stop(self, grace: float | None = None) -> None:
        await self._server.stop(grace)
        self.gate.stop()
        _clear(self._sockets)


async def serve(service: CoordinatorService, *, listen: str, key: Path, certificate: Path, sockets: Path) -> Server:
    """Listen on host:port behind a gate, with the certificate whose fingerprint is in the invites.

    `sockets`: a folder that is made here, and gone after the server's end; no user but ours gets to what is in it.
    TLS 1.3 only: the one cipher left to TLS 1.2 needs an RSA certificate, and ours is ECDSA. grpcio has no other way.
    """
    where = address.parse(listen)
    if where is None:
        raise Refused(Code.FIELD, f"{canonical.shown(listen)} is not host:port")
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
    server.add_generic_rpc_handlers((_handlers(service),))
    gate = Gate(p2pd.socket_folder(sockets))
    try:
        pair = (key.read_bytes(), certificate.read_bytes())
        server.add_secure_port("unix:" + quote(os.fsencode(gate.folder / DOOR)), grpc.ssl_server_credentials([pair]))
        port = await gate.listen(where.host, where.port)
    except BaseException:
        await server.stop(None)
        _clear(sockets)
        raise
    service.gate = gate
    await server.start()
    return Server(server, gate, port, sockets)


def _handlers(service: CoordinatorService) -> grpc.GenericRpcHandler[Any, Any]:
    """Every call as one that brings a stream of messages, which is the same on the line: so gRPC reads none of them before
    the call is let in. None is registered with the server: it looks through all of those for each call that comes."""
    named = wire.DESCRIPTOR.services_by_name["Coordinator"]
    handlers = {}
    for method in named.methods:
        streams = method.server_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        asked, answered = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        handlers[method.name] = make(partial(service.answer, method.name), asked.FromString, answered.SerializeToString)
    return grpc.method_handlers_generic_handler(named.full_name, handlers)


def _clear(sockets: Path) -> None:
    p2pd.sweep(sockets)
    shutil.rmtree(sockets, ignore_errors=True)


class CoordinatorService:
    """Checks every field, then asks the desk."""

    def __init__(self, desk: Desk) -> None:
        self.refusals: Counter[str] = Counter()
        self.gate: Gate  # from serve on
        self._desk = desk
        self._nonces: OrderedDict[bytes, Nonce] = OrderedDict()
        self._sessions: dict[str, Session] = {}
        self._session_of: dict[NodeId, Session] = {}
        self._away: dict[NodeId, float] = {}  # until when nothing is heard from those who were hung up on
        self._turns = Turns(quotas.CALLS_PER_SECOND)
        self._joins = quotas.Crowd(quotas.JOINS_OF_A_BLOCK, quotas.JOINS)
        self._shares = quotas.Buckets(quotas.share(1))
        self._asked = quotas.Buckets(quotas.IN_TURN)
        self._reports = quotas.Buckets(quotas.REPORTS)
        self._transfers = Transfers(desk)
        self._written: tuple[SignedRoster, bytes] | None = None
        stranger, member = self._of_stranger, self._of_member
        self._calls: dict[str, Callable[[Messages, Context], Awaitable[Any]]] = {
            "Challenge": lambda _, context: stranger(context, self._challenge),
            "Open": lambda _, context: stranger(context, self._open, cost=quotas.OPENING_COST),
            "Heartbeat": lambda _, context: member(context, self._heartbeat),
            "AcquireLeases": lambda _, context: member(context, self._acquire_leases),
            "ReadLog": lambda _, context: member(context, self._read_log),
            "PushEntry": lambda _, context: member(context, self._push_entry),
            "ReadBlob": lambda _, context: member(context, partial(self._read_blob, context=context)),
            "ReadLeaves": lambda _, context: member(context, self._read_leaves),
            "WriteBlob": lambda messages, context: member(context, self._write_blob, messages),
            "Report": lambda _, context: member(context, self._report),
            "Leave": lambda _, context: member(context, self._leave),
        }

    async def answer(self, call: str, messages: Messages, context: Context) -> Any:
        """What gRPC calls, with the name of the call. A refusal travels with its code; a surprise is logged under an id, and
        says nothing of us."""
        try:
            return await self._act(call, messages, context)
        except Refused as refusal:
            code, what = refusal.reason, canonical.shown(refusal.what)[:REFUSAL_CHARACTERS_MAX]
            retry_seconds = refusal.retry_seconds
        except (asyncio.CancelledError, grpc.aio.BaseError):
            raise
        except Exception:
            code, what = Code.INTERNAL, f"a failure of the coordinator, id {secrets.token_hex(4)}"
            retry_seconds = 0.0
            log.exception("a call failed", call=call, id=what[-8:])
        self.refusals[code.code] += 1
        if (passage := self._passage(context)) is not None and self.gate.blame(passage):
            self._keep_away(passage)
        later = (("retry-after", f"{retry_seconds:.3f}"),) if retry_seconds else ()
        await context.abort(_status(code), what, (("barnraise-code", code.code), *later))
        raise AssertionError("abort raises")

    async def _act(self, call: str, messages: Messages, context: Context) -> Any:
        """A disk of ours that takes nothing is ours to mend, and not the caller's."""
        if call not in READS:
            self._desk.check_deciding()
        try:
            return await self._calls[call](messages, context)
        except Refused as refused:
            if refused.reason in DISK_CODES and call not in (*READS, "WriteBlob"):
                self._desk.stand_still(refused)
            raise

    async def _of_stranger(
        self, context: Context, act: Callable[[Any, Passage], Awaitable[T]], *, cost: float = 1.0
    ) -> T:
        """A call that needs no session. Whoever has one goes first, unless it has asked for a lot."""
        await self._turns.wait(quotas.STRANGERS_NUMBER, cost=cost)
        return await act(await _message(context), self._caller(context))

    async def _of_member(
        self, context: Context, act: Callable[[Session, Any], Awaitable[T]], messages: Messages | None = None
    ) -> T:
        """A call of a session, while it runs. Whoever has called least of late goes first; what a call brings is read only
        when its turn has come."""
        session, now = self._session(context), time.monotonic()
        if session is None:
            await self._turns.wait(quotas.STRANGERS_NUMBER)
            raise Refused(Code.SESSION, "the session is unknown, of another connection, or was replaced by a newer one")
        session.heard = now
        session.calls += 1
        self._asked.take(session.node, now=now)
        try:
            if session.calls > CALLS_PER_NODE_MAX:
                raise Refused(Code.LIMIT, f"{session.calls} calls at the same time")
            self._shares.rate = quotas.share(self.gate.members)
            wait_seconds = self._shares.take(session.node, now=now)
            await self._turns.wait(self._asked.level(session.node, now=now))
            quotas.check("calls of this node", wait_seconds)
            self._check_welcome(session.node)
            self._check_current(session)
            return await act(session, await _message(context) if messages is None else messages)
        finally:
            session.calls -= 1

    # admission

    async def _challenge(self, request: wire.ChallengeRequest, caller: Passage) -> wire.ChallengeReply:
        _check_version(request.protocol)
        node = _node(request.node)
        now_ms = self._desk.now_ms()
        self._check_away(node)
        quotas.check("joins from this network, or from all", self._joins.take(caller.host, now=time.monotonic()))
        while self._nonces and next(iter(self._nonces.values())).until_ms <= now_ms:
            self._nonces.popitem(last=False)
        if len(self._nonces) >= NONCES_MAX:
            quotas.check("challenges without an answer", NONCE_SECONDS)
        nonce = secrets.token_bytes(32)
        self._nonces[nonce] = Nonce(node, caller, now_ms + NONCE_SECONDS * 1000)
        return wire.ChallengeReply(nonce=nonce, coordinator_ms=now_ms)

    async def _open(self, request: wire.OpenRequest, caller: Passage) -> wire.OpenReply:
        _check_version(request.protocol)
        node, now_ms = _node(request.node), self._desk.now_ms()
        self._check_away(node)
        self._check_answer(request, caller, now_ms)
        peer = self._check_peer(request)
        addresses = _addresses(request.addresses)
        _bounded("software", request.software, SOFTWARE_CHARACTERS_MAX)
        _number("life", request.life, high=NUMBER_MAX)
        if len(request.incarnation) != INCARNATION_BYTES:
            what = f"incarnation of {len(request.incarnation)} bytes, expected {INCARNATION_BYTES}"
            raise Refused(Code.FIELD, what)
        known = self._desk.store.node(node)
        self._check_welcome(node)
        await self._check_alone(node, request.incarnation, caller)
        token = known.invite if known else self._admit(request.invite, node, peer, now_ms)
        name = self._name(request.name, node, known)
        body = Pass(self._desk.manifest.manifest.run, node, peer, name, now_ms, now_ms + PASS_SECONDS * 1000)
        signed = identity.sign_pass(self._desk.key, body)
        admitted_ms = known.admitted_ms if known else now_ms
        self._desk.store.save_node(StoredNode(node, peer, name, token, signed, admitted_ms))
        session = self._new_session(node, request.incarnation, caller)
        self._joins.welcome(session.passage.host)
        life, silent = self._begin_life(session, request.life)
        forgot = silent is not None and silent != self._desk.state.silent.get(node)
        self._desk.submit(machine.NodeOpened(node, peer, name, addresses, forgot, session.passage.host, token or ""))
        software = canonical.shown(request.software)
        log.info("a node opened a session", node=node[:16], name=name, software=software, life=life, forgot=forgot)
        state = self._desk.state
        return wire.OpenReply(
            session=session.token,
            coordinator_ms=now_ms,
            manifest=canonical.to_bytes(self._desk.manifest),
            roster=self._bytes_of(state.roster),
            base=canonical.to_bytes(self._desk.base()),
            rendezvous=self._desk.rendezvous,
            shards=[canonical.to_bytes(shard) for shard in self._desk.shards],
            rollbacks=map(canonical.to_bytes, state.rollbacks),
            silent_epoch=0 if silent is None else silent + 1,
            life=life,
            **{"pass": canonical.to_bytes(signed)},  # a word of Python's
        )

    def _check_answer(self, request: wire.OpenRequest, caller: Passage, now_ms: int) -> None:
        """The challenge is spent by the first answer, right or wrong."""
        nonce = self._nonces.pop(request.nonce, None)
        if nonce is None or nonce.until_ms <= now_ms:
            raise Refused(Code.CHALLENGE, f"an answer to no challenge of the last {NONCE_SECONDS} seconds")
        if nonce.node != request.node or nonce.passage is not caller:
            raise Refused(Code.CHALLENGE, "an answer to a challenge that another node or connection was given")
        identity.verify(request.node, "open", self._proof(request.nonce), request.signature.hex())

    def _check_peer(self, request: wire.OpenRequest) -> PeerId:
        if len(request.peer_public_key) != 32 or peer_id_of(request.peer_public_key) != request.peer:
            raise Refused(Code.FIELD, "peer is not the id of peer_public_key, 32 bytes of Ed25519")
        body = self._proof(request.nonce) + request.node.encode()
        identity.verify(request.peer_public_key.hex(), "peer", body, request.peer_signature.hex())
        return PeerId(request.peer)

    def _proof(self, nonce: bytes) -> bytes:
        """With the run in it, another run's coordinator cannot pass our challenges on to its own nodes."""
        return nonce + self._desk.manifest.manifest.run.encode()

    def _admit(self, text: str, node: NodeId, peer: PeerId, now_ms: int) -> str:
        """Spend one use of the invite; tells its token id."""
        if not text:
            raise Refused(Code.NOT_ADMITTED, "this node has not been admitted to the run, and shows no invite")
        shown = invite.decode(text)
        if shown.run != self._desk.manifest.manifest.run:
            raise Refused(Code.INVITE_FORGED, "the invite is for another run")
        invite.check(shown, now_ms=now_ms, allow_private=True)
        if self._desk.store.peer_owner(peer) is not None:
            raise Refused(Code.IDENTITY_TAKEN, f"peer {peer} belongs to another node")
        self._desk.store.spend_invite(shown.token, node, now_ms)
        return shown.token

    def _name(self, wished: str, node: NodeId, known: StoredNode | None) -> str:
        if not wished and known is not None:
            return known.name
        others = (name for other, name in self._desk.store.names().items() if other != node)
        return distinct_name(wished, node, others)

    # sessions

    def _caller(self, context: Context) -> Passage:
        """Where a call came from."""
        passage = self._passage(context)
        if passage is None:
            raise Refused(Code.UNREACHABLE, "the connection has ended")
        return passage

    def _passage(self, context: Context) -> Passage | None:
        """gRPC writes unix:FOLDER/NAME."""
        return self.gate.passage(context.peer().rpartition("/")[2])

    def _new_session(self, node: NodeId, incarnation: bytes, caller: Passage) -> Session:
        session = Session(node, secrets.token_hex(32), incarnation, caller, since_ms=self._desk.now_ms())
        older = self._end_session(node)
        if older is not None and older.passage is not caller:
            older.passage.close()  # one connection is enough for one node
        self.gate.welcome(caller)
        self._sessions[session.token] = self._session_of[node] = session
        return session

    async def _check_alone(self, node: NodeId, incarnation: bytes, caller: Passage) -> None:
        """Of two processes with one key, the one that is here and answers stays, and both are told.

        Nothing is held against either: a folder was copied, or its key stolen."""
        older = self._session_of.get(node)
        if older is None or older.incarnation == incarnation or not older.calls:  # a process that ends ends its calls
            return
        if not await self._answers(older):
            return
        now, began = _clock_text(self._desk.now_ms()), _clock_text(older.since_ms)
        where = "this address" if older.passage.host == caller.host else "another address"
        if not older.notice:
            name = self._desk.store.names()[node]
            self._desk.submit(machine.Noticed(f"{name}: a second process with its key was refused"))
        older.notice = f"at {now} another process with this node's key came, and was refused: one folder is one node"
        raise Refused(Code.IDENTITY_TAKEN, f"this node's key is in use since {began} from {where}")

    async def _answers(self, session: Session) -> bool:
        """Whether this process is there: it is told something, and has to ask again."""
        asked = time.monotonic()
        session.roused.set()
        while session.heard < asked and time.monotonic() - asked < ALIVE_SECONDS:
            await asyncio.sleep(ALIVE_SECONDS / 100)
        return session.heard >= asked and self._session_of.get(session.node) is session

    def _begin_life(self, session: Session, life: int) -> tuple[int, Epoch | None]:
        """Keep the life that this process says; tells the highest, and up to which roster the node signs nothing."""
        newest = Epoch(self._desk.state.next_epoch - 1)
        session.life, silent = self._desk.store.begin_life(session.node, life, newest, session.incarnation)
        return session.life, silent

    def _end_session(self, node: NodeId) -> Session | None:
        older = self._session_of.pop(node, None)
        if older is not None:
            del self._sessions[older.token]
            self.gate.dismiss(older.passage)
        return older

    def _session(self, context: Context) -> Session | None:
        """That the call belongs to; none of another connection."""
        token = next((value for name, value in context.invocation_metadata() or () if name == "session"), "")
        session = self._sessions.get(str(token))
        return session if session is not None and session.passage is self._passage(context) else None

    def _check_current(self, session: Session) -> None:
        if self._sessions.get(session.token) is not session:
            raise Refused(Code.SESSION, "a newer session replaced this one")

    def _keep_away(self, passage: Passage) -> None:
        """A connection is hung up on: whoever had its session on it does not come back at once."""
        now = time.monotonic()
        self._away = {node: until for node, until in self._away.items() if until > now}
        self._away |= {
            each.node: now + quotas.AWAY_SECONDS for each in self._sessions.values() if each.passage is passage
        }

    def _check_away(self, node: NodeId) -> None:
        quotas.check("refused calls of this node", max(0.0, self._away.get(node, 0.0) - time.monotonic()))

    def _check_welcome(self, node: NodeId) -> None:
        """Whoever is shut out is told by whom and why, and has no session from then on."""
        now_ms = self._desk.now_ms()
        mark = self._desk.state.shut(node, now_ms / 1000)
        if mark is not None:
            older = self._end_session(node)
            if older is not None:
                asyncio.get_running_loop().call_later(GOODBYE_SECONDS, older.passage.close)
            raise Refused(Code.BANNED if mark.kind is Kind.BAN else Code.KICKED, strikes.refusal(mark, now_ms))

    # what a member may ask

    async def _heartbeat(self, session: Session, request: wire.HeartbeatRequest) -> wire.HeartbeatReply:
        beat = _beat(session.node, request, session.passage.host)
        wait_seconds = _number("wait_seconds", request.wait_seconds, high=math.inf)
        if request.life > session.life:
            self._begin_life(session, request.life)
        self._desk.submit(beat)
        end = time.monotonic() + min(wait_seconds, WAIT_SECONDS_MAX)
        while not self._news(session, request, beat) and (left := end - time.monotonic()) > 0:
            await self._stirred(session, left)
            self._desk.check_deciding()
            self._check_welcome(session.node)
            self._check_current(session)
        return self._answer(session, request, beat)

    async def _stirred(self, session: Session, seconds: float) -> None:
        """Returns when there may be news, for all or for this one."""
        waits = {asyncio.ensure_future(each) for each in (self._desk.news(), session.roused.wait())}
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    def _news(self, session: Session, request: wire.HeartbeatRequest, beat: machine.HeartbeatArrived) -> bool:
        state = self._desk.state
        return (
            self._newer_roster(beat) is not None
            or state.head.round > request.known_round
            or len(state.rollbacks) > request.branch
            or not session.told.issuperset(part.digest for part in state.wanted[:WANTED_MAX])
            or (self._desk.finished() and not session.told_finished)
            or not session.told_asked.issuperset(self._transfers.asked(session.node))
            or self._notice(session) != session.told_notice
            or session.roused.is_set()
        )

    def _notice(self, session: Session) -> str:
        """One line for the volunteer."""
        state = self._desk.state
        held = strikes.notice(state.trails.get(session.node, ()), state.head.round)
        return "; ".join(filter(None, (held, session.notice)))

    def _newer_roster(self, beat: machine.HeartbeatArrived) -> SignedRoster | None:
        signed = self._desk.state.roster
        return signed if signed is not None and signed.roster.epoch > beat.epoch else None

    def _bytes_of(self, signed: SignedRoster | None) -> bytes:
        """Its canonical form, written once however many ask for it."""
        if signed is None:
            return b""
        if self._written is None or self._written[0] is not signed:
            self._written = signed, canonical.to_bytes(signed)
        return self._written[1]

    def _answer(
        self, session: Session, request: wire.HeartbeatRequest, beat: machine.HeartbeatArrived
    ) -> wire.HeartbeatReply:
        state, roster = self._desk.state, self._newer_roster(beat)
        wanted = [part.digest for part in state.wanted[:WANTED_MAX]]
        session.told, session.told_finished = frozenset(wanted), self._desk.finished()
        session.told_notice = self._notice(session)
        session.roused.clear()
        session.told_asked = frozenset(asked := self._transfers.asked(session.node))
        mine = {lease.lease_id for lease in state.leases.of(session.node)}
        return wire.HeartbeatReply(
            roster=self._bytes_of(roster),
            head_round=state.head.round,
            wanted=wanted,
            asked=asked,
            renewed=[lease_id for lease_id in beat.lease_ids if lease_id in mine],
            notice=session.told_notice,
            coordinator_ms=self._desk.now_ms(),
            finished=session.told_finished,
            rollbacks=[canonical.to_bytes(each) for each in state.rollbacks if each.rollback.number > beat.branch],
            epoch=state.next_epoch,
            branch=len(state.rollbacks),
            astray_from=self._astray_from(request),
            nobody_callable=self._desk.nobody_callable,
        )

    def _astray_from(self, request: wire.HeartbeatRequest) -> int:
        """From which round on its records are wanted, plus one, because two of one round must have been certified."""
        head = Head(RoundNumber(request.head_round), Digest(request.head_hash))
        knows_all = request.branch == len(self._desk.state.rollbacks)
        if not knows_all or not self._desk.state.astray(head):
            return 0
        return 1 + max(0, head.round - machine.FORK_UNDONE_MAX)

    async def _acquire_leases(self, session: Session, request: wire.LeaseRequest) -> wire.LeaseReply:
        if not 1 <= request.sequences <= SEQUENCES_MAX:
            raise Refused(Code.FIELD, f"sequences {request.sequences}, expected 1 to {SEQUENCES_MAX}")
        effects = self._desk.submit(machine.LeasesAsked(session.node, request.sequences))
        granted = (e for e in effects if isinstance(e, machine.GrantLeases) and e.node == session.node)
        leases = (self._signed(lease) for grant in granted for lease in grant.leases)
        return wire.LeaseReply(leases=map(canonical.to_bytes, leases))

    def _signed(self, lease: Lease) -> Lease:
        """With the grant that its node shows to the other members."""
        run = self._desk.manifest.manifest.run
        return replace(lease, signature=sign_grant(self._desk.key, run, lease.node, lease.range))

    async def _read_log(self, session: Session, request: wire.ReadLogRequest) -> wire.ReadLogReply:
        if request.from_round > NUMBER_MAX:
            raise Refused(Code.FIELD, f"from_round {request.from_round}, expected at most {NUMBER_MAX}")
        rollbacks = [canonical.to_bytes(each) for each in self._desk.state.rollbacks]
        reply = wire.ReadLogReply(base=canonical.to_bytes(self._desk.base()), rollbacks=rollbacks)
        rosters: dict[Epoch, bytes] = {}
        if (newest := self._desk.state.roster) is not None:
            rosters[newest.roster.epoch] = self._bytes_of(newest)
        used = len(reply.base) + sum(map(len, rollbacks)) + sum(map(len, rosters.values()))
        for entry in self._entries(request.from_round):
            data, named = canonical.to_bytes(entry), self._rosters_of(entry)
            used += len(data) + sum(len(signed) for epoch, signed in named.items() if epoch not in rosters)
            if reply.entries and (used > PAGE_BYTES_MAX or len(reply.entries) >= PAGE_ENTRIES_MAX):
                break
            reply.entries.append(data)
            rosters |= named
        reply.rosters.extend(rosters[epoch] for epoch in sorted(rosters))
        return reply

    def _entries(self, start: int) -> Iterator[LogEntry]:
        while page := self._desk.store.entries(start, PAGE_STEP):
            yield from page
            start += len(page)

    def _rosters_of(self, entry: LogEntry) -> dict[Epoch, bytes]:
        history = self._desk.state.history
        epochs = {entry.record.epoch, entry.certificate.ballot.epoch}
        return {epoch: canonical.to_bytes(history[epoch]) for epoch in epochs if epoch in history}

    async def _push_entry(self, session: Session, request: wire.PushEntryRequest) -> wire.PushEntryReply:
        recalls = bool(request.rosters or request.rollbacks)
        entry = None if recalls and not request.entry else canonical.from_bytes(LogEntry, request.entry)
        rosters, rollbacks = self._unknown_rosters(request.rosters), self._unknown_rollbacks(request.rollbacks)
        if rosters or rollbacks:
            log.warning("nodes brought back what was forgotten", rosters=len(rosters), rollbacks=len(rollbacks))
            self._desk.submit(machine.Recalled(rosters, rollbacks))
        if entry is not None:
            self._desk.submit(machine.EntryArrived(entry))
        state = self._desk.state
        return wire.PushEntryReply(
            missing=[part.digest for part in state.wanted[:WANTED_MAX]], head_round=state.head.round
        )

    def _unknown_rosters(self, brought: Sequence[bytes]) -> tuple[SignedRoster, ...]:
        """Rosters that this coordinator signed and has no memory of: its database came from a backup."""
        if len(brought) > ROSTERS_RECALLED_MAX:
            raise Refused(Code.LIMIT, f"{len(brought)} rosters, at most {ROSTERS_RECALLED_MAX} are allowed")
        unknown: dict[Epoch, SignedRoster] = {}
        for signed in (canonical.from_bytes(SignedRoster, data) for data in brought):
            known = self._desk.state.history.get(signed.roster.epoch) or unknown.get(signed.roster.epoch)
            if signed == known:
                continue
            roster = identity.check_roster(self._desk.key.public, signed)
            self._check_run("roster", roster.run)
            if known is not None:
                raise Refused(Code.TWO_STORIES, f"this coordinator has signed two rosters {roster.epoch}")
            unknown[roster.epoch] = signed
        return tuple(unknown[epoch] for epoch in sorted(unknown))

    def _unknown_rollbacks(self, brought: Sequence[bytes]) -> tuple[SignedRollback, ...]:
        """The same for rollbacks, which follow the known ones without a gap."""
        if len(brought) > ROLLBACKS_MAX:
            raise Refused(Code.LIMIT, f"{len(brought)} rollbacks, at most {ROLLBACKS_MAX} are allowed")
        known = {each.rollback.number: each for each in self._desk.state.rollbacks}
        after = len(known)
        for signed in (canonical.from_bytes(SignedRollback, data) for data in brought):
            number = signed.rollback.number
            if signed == known.get(number):
                continue
            self._check_run("rollback", identity.check_rollback(self._desk.key.public, signed).run)
            if number in known:
                raise Refused(Code.TWO_STORIES, f"this coordinator has signed two rollbacks {number}")
            if number != len(known) + 1 or number > ROLLBACKS_MAX:
                raise Refused(Code.FIELD, f"rollback {number}, expected {len(known) + 1}")
            known[number] = signed
        return tuple(known.values())[after:]

    def _check_run(self, what: str, run: RunId) -> None:
        if run != self._desk.manifest.manifest.run:
            raise Refused(Code.SIGNATURE, f"the {what} is of another run")

    async def _report(self, session: Session, request: wire.ReportRequest) -> wire.ReportReply:
        """What is proved is judged, whoever shows it; what is not costs the reporter nothing, and is counted."""
        quotas.check("reports of this node", self._reports.take(session.node, now=time.monotonic()))
        if request.complaint:
            await self._hear(session.node, canonical.from_bytes(Complaint, request.complaint))
            return wire.ReportReply()
        evidence = canonical.from_bytes(Evidence, request.evidence)
        if self._desk.store.node(evidence.said.node) is None:
            raise Refused(Code.UNPROVED, "evidence of nobody who was ever admitted")
        found = await asyncio.to_thread(prove, evidence, self._desk.manifest.manifest.run)
        log.warning("a member lied", node=found.node[:16], what=found.what, reporter=session.node[:16])
        self._desk.submit(machine.Struck(found.node, found.fault, found.round, found.what, found.evidence))
        return wire.ReportReply(fault=found.fault.value)

    async def _hear(self, accuser: NodeId, complaint: Complaint) -> None:
        """Let a member be asked for what it has signed, if it has, for a round in which it may still show it."""
        brought, at = complaint.contribution, complaint.round
        check_shape(brought)
        await asyncio.to_thread(check_genuine, self._desk.manifest.manifest.run, at, complaint.previous, brought)
        state = self._desk.state
        members = frozenset(node for signed in state.rosters for node in signed.roster.nodes)
        if not {accuser, brought.node} <= members:
            raise Refused(Code.UNPROVED, "a complaint by or about a node that is in no roster now")
        if at < state.head.round - ANSWER_ROUNDS or complaint.previous != state.head_before(at):
            what = f"a complaint about round {at}, expected one of the newest {ANSWER_ROUNDS} or the open one, {state.head.round}"
            raise Refused(Code.UNPROVED, what)
        log.warning("a member could not use what it was sent", round=at, node=brought.node[:16], accuser=accuser[:16])
        self._desk.auditor.complained(complaint, accuser, members)
        if (accused := self._session_of.get(brought.node)) is not None:
            accused.roused.set()

    async def _leave(self, session: Session, request: wire.LeaveRequest) -> wire.LeaveReply:
        _bounded("why", request.why, WHY_CHARACTERS_MAX)
        for name in ("seal_round", "seal_epoch"):
            _number(name, getattr(request, name), high=NUMBER_MAX)
        seal = Seal(RoundNumber(request.seal_round), Epoch(request.seal_epoch)) if request.sealed else None
        self._end_session(session.node)
        self._desk.submit(machine.NodeLeft(session.node, visible(request.why) or "it said so", seal))
        return wire.LeaveReply()

    # blobs

    async def _read_blob(self, session: Session, request: wire.ReadBlobRequest, context: Context) -> None:

        async def send(chunk: Chunk) -> None:
            self._check_welcome(session.node)  # a model takes hours; a ban does not wait for its end
            message = wire.BlobChunk(data=chunk.data, offset=chunk.offset, digest=chunk.digest, size=chunk.size)
            await session.passage.room()
            await context.write(message)

        await self._transfers.send(session.node, request.digest, request.offset, send)

    async def _read_leaves(self, session: Session, request: wire.ReadLeavesRequest) -> wire.ReadLeavesReply:
        return wire.ReadLeavesReply(leaves=await self._transfers.leaves(request.digest))

    async def _write_blob(self, session: Session, chunks: AsyncIterator[wire.BlobChunk]) -> wire.WriteBlobReply:
        pieces = (Chunk(each.data, each.offset, each.digest, each.size) async for each in chunks)
        return wire.WriteBlobReply(stored=await self._transfers.receive(session.node, pieces))


_STATUS: Final = {
    Code.SESSION: grpc.StatusCode.UNAUTHENTICATED,
    Code.CHALLENGE: grpc.StatusCode.UNAUTHENTICATED,
    Code.SIGNATURE: grpc.StatusCode.UNAUTHENTICATED,
    Code.FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Code.BLOB_CORRUPT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.BLOB_MISSING: grpc.StatusCode.NOT_FOUND,
    Code.LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
    Code.UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
}
_STATUS_OF_EXIT: Final = {
    Exit.REFUSED: grpc.StatusCode.PERMISSION_DENIED,
    Exit.INTEGRITY: grpc.StatusCode.PERMISSION_DENIED,
    Exit.BAD_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Exit.RESOURCE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def _status(code: Code) -> grpc.StatusCode:
    return _STATUS.get(code) or _STATUS_OF_EXIT.get(code.exit, grpc.StatusCode.FAILED_PRECONDITION)


def _clock_text(ms: int) -> str:
    return time.strftime("%H:%M UTC", time.gmtime(ms / 1000))


async def _message(context: Context) -> Any:
    """What a call brings that brings one message."""
    try:
        message = await context.read()
    except DecodeError:
        raise Refused(Code.FIELD, "the message is none of this call's") from None
    if not isinstance(message, Message):  # grpc.aio.EOF
        raise Refused(Code.FIELD, "no message came with this call")
    return message


def _check_version(theirs: int) -> None:
    if theirs != PROTOCOL_VERSION:
        raise Refused(Code.VERSION, f"the node speaks protocol {theirs}, the coordinator {PROTOCOL_VERSION}")


def _node(text: str) -> NodeId:
    if not _NODE.fullmatch(text):
        raise Refused(Code.FIELD, "node is not a key of 64 hex digits")
    return NodeId(text)


def _bounded(name: str, text: str, characters_max: int) -> None:
    if len(text) > characters_max:
        raise Refused(Code.FIELD, f"{name} of {len(text)} characters, at most {characters_max} are allowed")


def _number(name: str, value: float, *, high: float) -> float:
    if not 0 <= value <= high:  # not so for NaN
        raise Refused(Code.FIELD, f"{name} {value}, expected 0 to {high:g}")
    return value


def _addresses(texts: Iterable[str]) -> tuple[str, ...]:
    addresses = tuple(texts)
    if len(addresses) > ADDRESSES_MAX:
        raise Refused(Code.FIELD, f"{len(addresses)} addresses, at most {ADDRESSES_MAX} are allowed")
    for text in addresses:
        if not _is_address(text):
            raise Refused(Code.FIELD, f"addresses: {canonical.shown(text)!r} is not /ip4|ip6/IP/tcp|udp/PORT")
    return addresses


def _is_address(text: str) -> bool:
    """A multiaddr that others could connect to. Loopback is one: a whole swarm may live on one machine."""
    parts = _ADDRESS.fullmatch(text)
    if parts is None or int(parts[3]) > 65535:
        return False
    with suppress(ValueError):
        ip = ip_address(parts[2])
        return str(ip.version) == parts[1] and not ip.is_unspecified and not ip.is_multicast
    return False


def _beat(node: NodeId, request: wire.HeartbeatRequest, source: str) -> machine.HeartbeatArrived:
    if request.activity not in ACTIVITIES:
        raise Refused(Code.FIELD, f"activity {canonical.shown(request.activity[:40])!r} is not one that we know")
    if len(request.lease_ids) > RANGES_MAX:
        raise Refused(Code.FIELD, f"{len(request.lease_ids)} lease_ids, at most {RANGES_MAX} are allowed")
    for lease_id in request.lease_ids:
        if not re.fullmatch(r"[0-9a-f]{1,16}", lease_id):
            raise Refused(Code.FIELD, "lease_ids: one is not a hex number")
    for name in ("head_round", "epoch", "known_round", "bytes_sent", "bytes_received", "branch", "life"):
        _number(name, getattr(request, name), high=NUMBER_MAX)
    return machine.HeartbeatArrived(
        node,
        request.activity,
        request.head_round,
        request.epoch - 1,
        _addresses(request.addresses),
        request.branch,
        _number("tokens_per_second", request.tokens_per_second, high=1e12),
        request.train_loss if math.isfinite(request.train_loss) else None,
        _number("busy_share", request.busy_share, high=1.0),
        request.bytes_sent,
        request.bytes_received,
        tuple(request.lease_ids),
        source,
    )
