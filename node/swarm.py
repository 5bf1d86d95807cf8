"""The engine process, the only door to hivemind: P2P, DHT and averaging on one event loop. Started by node.engine.

It obeys one parent, answers rostered peers, and knows nothing of rounds or models. p2pd, the libp2p process below it,
dies with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final
from typing import AsyncIterator as Stream  # noqa: UP035  # hivemind tells streams by this one's name

import torch
from google.protobuf.message import DecodeError
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, P2PDaemonError, P2PHandlerError, PeerID, ServicerBase
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import achain, as_aiter

from node.core.pace import Bucket
from node.leftover import Leftover
from node.p2p import CONNECT_SECONDS, GuardedP2P
from node.reduction import GroupRunner, Plan, Taken
from protocol.address import may_dial
from protocol.codec import codec
from protocol.errors import Code, Refused
from protocol.evidence import Basis, header, is_kept
from protocol.exchange import Packing
from protocol.limits import ADDRESSES_MAX, CHUNK_VALUES, MEMBERS_MAX
from protocol.process import Channel, ChannelClosed, Frame, parent_channel
from protocol.robust import Rule
from protocol.types import Exchange, Signature
from protocol.v1 import barnraise_pb2

LETTER_SECONDS: Final = 60.0  # for the largest letter on a line of 0.3 Mbit/s
LINES_SECONDS: Final = 15.0  # a line that has dropped is missed for so long; a round waits longer than that
EARLY_SECONDS: Final = 5.0  # how long a stream for a group that we do not know yet waits for our own Begin
ADDRESS_SECONDS: Final = 900.0  # how long the DHT keeps where we are
FETCH_SILENCE_SECONDS: Final = 10.0  # a peer from which nothing of a part comes for so long: another may have it
PART_PIECE_BYTES: Final = 1 << 15  # of it in one message: 4 s of 64 kbit/s; 256 KiB were a silence below 210 kbit/s
PUBLISH_SECONDS: Final = 300.0  # a third of it
ADDRESS_CHARACTERS_MAX: Final = 256
RECORD_BYTES_MAX: Final = 2048  # ADDRESSES_MAX of the longest that there are; the rendezvous takes no more either
DHT_SHAPE: Final = (20, 5, 1)  # bucket size, depth, replicas: of a table that only ever holds the rendezvous

_ADDRESS: Final = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/]+/tcp/\d{1,5}")


class BarnraisePeer(ServicerBase):  # type: ignore[misc]
    """What rostered peers may ask of us. The names of the class and its methods are part of the wire."""

    def __init__(
        self,
        p2p: GuardedP2P,
        *,
        run: str,
        packing: Packing,
        residual_decay: float,
        parameters: int,
        blob_dir: Path,
        deliver: Callable[[PeerID, bytes], Awaitable[None]],
    ) -> None:
        self._p2p = p2p
        self._run = run
        self._packing = packing
        self._residual_decay = residual_decay
        self._parameters = parameters
        self._blob_dir = blob_dir
        self._deliver = deliver
        self._groups: dict[bytes, GroupRunner] = {}
        self._leftovers: dict[bytes, Leftover] = {}  # by group: of the means that a record took, and of the newest
        self._averaging: dict[bytes, asyncio.Task[Any]] = {}
        self._registered = asyncio.Condition()

    async def rpc_message(
        self, stream: Stream[barnraise_pb2.PeerEnvelope], context: P2PContext
    ) -> Stream[barnraise_pb2.PeerAck]:
        """One letter. A stream, so that no byte of it is read before its bringer is known."""
        async with asyncio.timeout(LETTER_SECONDS):
            letter = await anext(stream, None)
        if letter is not None:
            await self._deliver(context.remote_id, letter.SerializeToString())
            yield barnraise_pb2.PeerAck()

    async def rpc_part(
        self, request: barnraise_pb2.PartRequest, context: P2PContext
    ) -> Stream[barnraise_pb2.PartChunk]:
        """A blob we keep, if its size is the one asked for; else nothing."""
        handle = _open_blob(self._blob_dir, request.digest, request.size)
        if handle is None:
            return
        with os.fdopen(handle, "rb") as blob:
            while data := await asyncio.to_thread(blob.read, PART_PIECE_BYTES):
                yield barnraise_pb2.PartChunk(data=data)

    async def rpc_aggregate_part(
        self, stream: Stream[averaging_pb2.AveragingData], context: P2PContext
    ) -> Stream[averaging_pb2.AveragingData]:
        async with asyncio.timeout(EARLY_SECONDS):
            opening = await anext(stream, averaging_pb2.AveragingData())
        runner = await self._group(opening.group_id)
        if runner is None or context.remote_id not in runner:
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            return
        async with aclosing(runner.rpc_aggregate_part(achain(as_aiter(opening), stream), context)) as replies:
            async for reply in replies:
                yield reply

    async def _group(self, group: bytes) -> GroupRunner | None:
        """An early bird waits a moment for us to hear of the group."""
        with suppress(TimeoutError):
            async with asyncio.timeout(EARLY_SECONDS), self._registered:
                await self._registered.wait_for(lambda: group in self._groups)
        return self._groups.get(group)

    async def send(self, peer: PeerID, envelope: bytes) -> None:
        await self._p2p.reach(peer)
        letter = as_aiter(barnraise_pb2.PeerEnvelope.FromString(envelope))
        async with aclosing(await self.get_stub(self._p2p, peer, namespace=self._run).rpc_message(letter)) as answers:
            async for _ in answers:
                return
        raise Refused(Code.UNREACHABLE, f"{peer} did not take a letter")

    async def fetch(self, peer: PeerID, digest: str, size: int) -> bytes:
        await self._p2p.reach(peer)
        request = barnraise_pb2.PartRequest(digest=digest, size=size)
        part, now = bytearray(), asyncio.get_running_loop().time
        async with (
            asyncio.timeout(FETCH_SILENCE_SECONDS) as silence,
            aclosing(await self.get_stub(self._p2p, peer, namespace=self._run).rpc_part(request)) as stream,
        ):
            async for chunk in stream:
                silence.reschedule(now() + FETCH_SILENCE_SECONDS)
                part += chunk.data
                if len(part) > size:
                    raise Refused(Code.BLOB_CORRUPT, f"{peer} sent more than the {size} bytes of {digest}")
        if len(part) != size:
            raise Refused(Code.UNREACHABLE, f"{peer} sent {len(part)} of the {size} bytes of {digest}")
        return bytes(part)

    async def average(self, plan: Plan, payload: bytes) -> tuple[dict[str, Any], bytes]:
        """The outcome, and the bytes of the spans that it names."""
        self._check(plan, payload)
        loop, began = asyncio.get_running_loop(), time.monotonic()
        before = self._leftovers.get(plan.after)
        kept = {plan.after, next(reversed(self._leftovers), b"")}  # a record may take the attempt before this one
        self._leftovers = {group: left for group, left in self._leftovers.items() if group in kept}
        runner = GroupRunner(
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=self._run,
            plan=plan,
            payload=payload,
            packing=self._packing,
            before=before,
            residual_decay=self._residual_decay,
        )
        self._groups[plan.group] = runner
        loop.call_later(plan.deadline_seconds, self._groups.pop, plan.group)  # late members may still want the means
        async with self._registered:
            self._registered.notify_all()
        parts: dict[int, bytes] = {}

        async def collect() -> None:
            async with asyncio.timeout(plan.deadline_seconds), aclosing(runner.run()) as spans:
                async for index, encoded in spans:
                    parts.update({index: encoded})  # one by one: a deadline keeps what is complete

        collecting = self._averaging[plan.group] = loop.create_task(collect())
        await asyncio.wait({collecting})
        del self._averaging[plan.group]
        reason = "given up" if collecting.cancelled() else f"unfinished: {collecting.exception()!r}"
        if (left := runner.leftover) is not None:
            self._leftovers[plan.group] = left
        taken, evidence = runner.hand_over(), None
        if runner.index in parts and is_kept(plan.exchange, self._packing):
            evidence = await asyncio.to_thread(self._keep_evidence, plan, taken)
        failed = runner.failed
        for index, (start, stop) in enumerate(plan.spans):
            if start < stop and index not in parts:
                failed.setdefault(index, reason)
        outcome = {
            "parts": [(index, len(part)) for index, part in parts.items()],
            "included": runner.included if runner.index in parts else (),
            "failed": failed,
            "garbled": runner.garbled,
            "seconds": time.monotonic() - began,
            "bytes_sent": runner.bytes_sent,
            "bytes_received": runner.bytes_received,
            "evidence": str(evidence) if evidence else None,
        }
        return outcome, b"".join(parts.values())

    def _keep_evidence(self, plan: Plan, taken: Taken) -> Path:
        """Beside the blobs under a name that their store sweeps, should nobody take it over."""
        signed = tuple(Signature(plan.members[index], signature) for index, signature, _ in taken)
        path = self._blob_dir / f".new-evidence-{plan.group.hex()[:16]}"
        with path.open("wb") as file:
            file.write(header(Basis(plan.attempt, signed)))
            file.writelines(data for *_, data in taken)
        return path

    def cancel(self, group: bytes) -> None:
        if (averaging := self._averaging.get(group)) is not None:
            averaging.cancel()

    def _check(self, plan: Plan, payload: bytes) -> None:
        members = len(plan.peers)
        if plan.group in self._groups:
            raise Refused(Code.FIELD, f"group {plan.group.hex()[:16]} was averaged before")
        if len(set(plan.peers)) != members or members > MEMBERS_MAX or self._p2p.peer_id not in plan.peers:
            raise Refused(Code.FIELD, f"a group of {members} peers, wanted at most {MEMBERS_MAX} different ones and us")
        if {len(plan.weights), len(plan.spans), len(plan.members)} != {members} or min(plan.weights) < 0:
            raise Refused(Code.FIELD, f"{len(plan.weights)} weights and {len(plan.spans)} spans for {members} peers")
        self._check_spans(plan)
        expected = self._packing.up.encoded_bytes(self._parameters)
        if plan.weights[plan.peers.index(self._p2p.peer_id)] and len(payload) != expected:
            raise Refused(Code.UPDATE_BAD, f"an encoded vector of {len(payload)} bytes, wanted {expected}")

    def _check_spans(self, plan: Plan) -> None:
        if plan.exchange is Exchange.ALL_GATHER:
            if set(plan.spans) - {(0, 0), (0, self._parameters)}:
                raise Refused(Code.FIELD, f"an all-gather of slices, wanted all {self._parameters} values of each")
            return
        at = 0
        for start, stop in plan.spans:
            if start == stop:
                continue
            if start != at or stop < start or start % CHUNK_VALUES:
                raise Refused(Code.FIELD, f"a span from {start} to {stop}, wanted one from {at} at a chunk's boundary")
            at = stop
        if at != self._parameters:
            raise Refused(Code.FIELD, f"spans of {at} values, wanted {self._parameters}")


class Directory:
    """Where peers are when the roster is out of date: the run's hivemind DHT. It carries addresses, never trust."""

    def __init__(self, p2p: GuardedP2P, *, run: str, rendezvous: Sequence[str]) -> None:
        self._p2p = p2p
        self._run = run
        self._rendezvous = rendezvous
        self._protocol: DHTProtocol | None = None

    async def keep(self) -> None:
        """Say where we are, again and again, to each rendezvous that answers. Whoever cannot be called has no need to."""
        while self._rendezvous:
            if not self._p2p.calls_only:
                with suppress(P2PDaemonError, P2PHandlerError, TimeoutError, OSError):
                    await self._publish()
            await asyncio.sleep(PUBLISH_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311  # only spreads the load

    async def look_up(self, peer: PeerID) -> tuple[str, ...]:
        with suppress(P2PDaemonError, P2PHandlerError, TimeoutError, OSError):
            async with asyncio.timeout(CONNECT_SECONDS):
                key = self._key(peer)
                async for protocol, rendezvous in self._reached():
                    found, _ = (await protocol.call_find(rendezvous, [key]) or {}).get(key, (None, {}))
                    if found is not None:
                        return _addresses(found.value)
        return ()

    async def _publish(self) -> None:
        record, until = json.dumps(self._p2p.addresses()).encode(), time.time() + ADDRESS_SECONDS
        async for protocol, rendezvous in self._reached():
            await protocol.call_store(rendezvous, [self._key(self._p2p.peer_id)], [record], until)

    def _key(self, peer: PeerID) -> DHTID:
        """One for each peer: nobody writes another's."""
        return DHTID.generate(f"{self._run}/{peer}")

    async def _reached(self) -> Stream[tuple[DHTProtocol, PeerID]]:
        """Every rendezvous that answers, and how to speak to it. A DHTNode would ask others in turn, and unpack before
        we can look; there are no others, and what is stored is a stranger's."""
        if self._protocol is None:
            self._protocol = await DHTProtocol.create(
                self._p2p, DHTID.generate(), *DHT_SHAPE, wait_timeout=CONNECT_SECONDS / 2, client_mode=True
            )
        for address in self._rendezvous:
            if await self._p2p.reached(address):
                yield self._protocol, PeerID.from_base58(address.rpartition("/p2p/")[2])


def _addresses(record: object) -> tuple[str, ...]:
    """The multiaddrs in a stranger's record."""
    try:
        value = json.loads(record) if isinstance(record, bytes) and len(record) <= RECORD_BYTES_MAX else ()
    except (ValueError, RecursionError):
        return ()
    if not isinstance(value, list) or len(value) > ADDRESSES_MAX:
        return ()
    texts = [text for text in value if isinstance(text, str) and len(text) <= ADDRESS_CHARACTERS_MAX]
    return tuple(text for text in texts if _ADDRESS.fullmatch(text))


def _open_blob(folder: Path, digest: str, size: int) -> int | None:
    """A file descriptor of a regular file named by 64 hex digits, or none."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        return None
    try:
        handle = os.open(folder / digest[:2] / digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_size == size:
        return handle
    os.close(handle)
    return None


class Desk:
    """The parent's orders, one task each, and the answers to them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._p2p: GuardedP2P | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._told = asyncio.Event()  # of a roster

    async def work(self) -> None:
        """Until the parent closes the channel or ends."""
        try:
            with suppress(ChannelClosed):
                await self._start(await self._channel.receive())
                while True:
                    self._take(await self._channel.receive())
        finally:
            for task in self._tasks:
                task.cancel()
            if self._p2p is not None:
                await self._p2p.shutdown()

    async def _start(self, frame: Frame) -> None:
        settings, number = frame.body, frame.body["number"]
        assert settings["order"] == "start", "the first order is to start"
        try:
            self._p2p = p2p = await GuardedP2P.start(
                runtime_dir=Path(settings["runtime_dir"]),
                identity_path=Path(settings["identity_path"]),
                listen=settings["listen"],
                announce=settings["announce"],
            )
        except Refused as refused:
            await self._channel.send({"number": number, "refused": refused.reason.code, "what": refused.what})
            raise ChannelClosed from refused
        p2p.may_dial = partial(may_dial, coordinator=settings["coordinator"], named=settings["named"])
        if (rate := settings["upload_bytes_per_second"]) is not None:
            p2p.pace = Bucket(rate)
        up, down = map(codec, settings["codecs"])
        self._peer = BarnraisePeer(
            p2p,
            run=settings["run"],
            packing=Packing(up, down, Rule(settings["rule"])),
            residual_decay=settings["residual_decay"],
            parameters=settings["parameters"],
            blob_dir=Path(settings["blob_dir"]),
            deliver=self._deliver,
        )
        await self._peer.add_p2p_handlers(p2p, namespace=settings["run"])
        directory = Directory(p2p, run=settings["run"], rendezvous=settings["rendezvous"])
        p2p.look_up = directory.look_up
        self._spawn(directory.keep())
        self._spawn(self._keep_lines(p2p))
        self._spawn(self._watch(p2p))
        await self._channel.send({"number": number, "peer": str(p2p.peer_id), "addresses": p2p.addresses()})

    async def _watch(self, p2p: GuardedP2P) -> None:
        """An engine without p2pd is of no use: end, and let the parent start another."""
        await p2p.ended()
        os._exit(1)

    async def _keep_lines(self, p2p: GuardedP2P) -> None:
        while True:
            self._told.clear()
            await p2p.keep_lines()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINES_SECONDS):
                    await self._told.wait()

    async def _deliver(self, peer: PeerID, envelope: bytes) -> None:
        await self._channel.send({"message_from": str(peer)}, envelope)

    def _take(self, frame: Frame) -> None:
        if frame.body["order"] == "roster":  # at once, so that no later order meets the roster before
            assert self._p2p is not None
            peers = frame.body["peers"]
            self._p2p.roster = {PeerID.from_base58(peer): tuple(addresses) for peer, addresses in peers.items()}
            self._p2p.calls_only = frame.body["calls_only"]
            self._told.set()
        self._spawn(self._answer(frame))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, frame: Frame) -> None:
        answer, payload = {"number": frame.body["number"]}, b""
        try:
            async with asyncio.timeout(frame.body.get("seconds")):
                body, payload = await self._obey(frame)
            answer |= body
        except Refused as refused:
            answer |= {"refused": refused.reason.code, "what": refused.what}
        except TimeoutError:
            answer |= {"refused": Code.UNREACHABLE.code, "what": f"no answer in {frame.body['seconds']} s"}
        except (P2PDaemonError, P2PHandlerError, OSError, DecodeError) as error:
            answer |= {"refused": Code.UNREACHABLE.code, "what": f"{error}"[:200]}
        with suppress(ChannelClosed):
            await self._channel.send(answer, payload)

    async def _obey(self, frame: Frame) -> tuple[Mapping[str, Any], bytes]:
        assert self._p2p is not None
        body = frame.body
        match body["order"]:
            case "roster":
                pass
            case "send":
                await self._peer.send(PeerID.from_base58(body["peer"]), frame.payload)
            case "fetch":
                return {}, await self._peer.fetch(PeerID.from_base58(body["peer"]), body["digest"], body["size"])
            case "average":
                return await self._peer.average(_plan(body), frame.payload)
            case "cancel":
                self._peer.cancel(bytes.fromhex(body["group"]))
            case "usage":
                await self._p2p.look_around()
                usage = {"sent": self._p2p.bytes_sent, "received": self._p2p.bytes_received}
                return {"usage": usage, "addresses": self._p2p.addresses()}, b""
            case order:
                raise AssertionError(f"unknown order {order}")
        return {}, b""


def _plan(body: Mapping[str, Any]) -> Plan:
    return Plan(
        group=bytes.fromhex(body["group"]),
        peers=tuple(PeerID.from_base58(peer) for peer in body["peers"]),
        weights=tuple(body["weights"]),
        exchange=Exchange(body["exchange"]),
        spans=tuple((start, stop) for start, stop in body["spans"]),
        deadline_seconds=body["deadline_seconds"],
        sender_seconds=body["sender_seconds"],
        after=bytes.fromhex(body["after"]),
        members=tuple(body["members"]),
        attempt=body["attempt"],
        signatures=tuple(body["signatures"]),
    )


async def main() -> None:
    torch.set_num_threads(1)
    await Desk(await parent_channel()).work()


if __name__ == "__main__":
    asyncio.run(main())
