"""The daemon's handle on the engine process: send, average, fetch. Imports neither torch nor hivemind."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from protocol import p2pd
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.limits import PEER_MESSAGE_BYTES_MAX
from protocol.process import MALFORMED, Channel, ChannelClosed, Child, Frame, value_of
from protocol.types import Digest, Exchange, NodeId, PeerId, RunId

T = TypeVar("T")
START_SECONDS: Final = 60.0  # importing torch on a slow disk, and p2pd's own 15 seconds
STOP_SECONDS: Final = 5.0
GRACE_SECONDS: Final = 10.0  # the engine keeps its own deadlines; past them by this much, it hangs
UNANSWERED_MAX: Final = 3  # orders in a row, while it says nothing else either: then it is ended, and another started
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",  # the trainer needs the cores
    "MALLOC_ARENA_MAX": "2",  # worker threads come and go; their arenas would stay
    "HIVEMIND_LOGLEVEL": "ERROR",  # what matters is in the outcome
    "HIVEMIND_COLORS": "0",
}


@dataclass(frozen=True)
class AveragingJob:
    """One attempt to average: everything that the members must know alike."""

    group: bytes  # 32-byte id
    peers: tuple[PeerId, ...]  # in the roster's order
    weights: tuple[int, ...]  # tokens; 0 brings nothing, and may still reduce
    exchange: Exchange
    spans: tuple[tuple[int, int], ...]  # values of each peer's part, at CHUNK_VALUES boundaries; empty for a client
    deadline_seconds: float  # for the whole
    sender_seconds: float  # a sender without progress for so long is left out
    members: tuple[NodeId, ...]  # whose peers they are: what they send is signed
    attempt: int  # that the group's id is made of: evidence says it
    signatures: tuple[str, ...] = ()  # ours, of the slice for each span; empty in an all-gather, or without a payload
    after: bytes = b""  # for us alone: the newest group whose means of ours a record has taken; empty: none


@dataclass(frozen=True)
class AveragingOutcome:
    """What came of a job. A span is here whole, or in `failed` with the reason."""

    parts: Mapping[int, bytes]  # encoded means, by index of the span
    included: tuple[int, ...]  # members inside the mean of our own span
    failed: Mapping[int, str]
    seconds: float
    bytes_sent: int  # encoded values, without what carries them
    bytes_received: int
    evidence: Path | None = None  # of our own mean, as protocol/evidence.py has it; the caller's to remove
    garbled: tuple[int, ...] = ()  # members of whose contributions something came here that no honest member sends


@dataclass(frozen=True)
class Usage:
    """Bytes of all messages since the engine started."""

    sent: int
    received: int


class Engine:
    """A running engine. Whoever starts it must `stop` it; `closed` tells when it ended by itself."""

    def __init__(self, child: Child, runtime_dir: Path, on_message: Callable[[PeerId, bytes], None]) -> None:
        self.peer = PeerId("")
        self.addresses: tuple[str, ...] = ()
        self.closed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._child = child
        self._runtime_dir = runtime_dir
        self._on_message = on_message
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._unanswered = 0  # since it was last heard
        self._reading = asyncio.create_task(self._read(child.channel))

    @classmethod
    async def start(
        cls,
        *,
        runtime_dir: Path,
        identity_path: Path,
        run: RunId,
        listen: Sequence[str],
        announce: Sequence[str] = (),
        rendezvous: Sequence[str],
        coordinator: str,
        named: Sequence[str] = (),
        upload_bytes_per_second: float | None = None,
        packing: Packing,
        residual_decay: float = 1.0,
        parameters: int,
        blob_dir: Path,
        on_message: Callable[[PeerId, bytes], None],
        log: Any = None,
    ) -> Engine:
        """Start the process and its p2pd. `listen` and `rendezvous` are multiaddrs; a client listens on none.

        What `announce` has is told to others in place of where it listens. `coordinator` and `named`, as
        protocol.address.may_dial has them, say whom this engine may connect to.
        """
        engine = cls(await Child.start("node.swarm", env=ENVIRONMENT, log=log), runtime_dir, on_message)
        settings = {
            "runtime_dir": str(runtime_dir),
            "identity_path": str(identity_path),
            "run": run,
            "listen": list(listen),
            "announce": list(announce),
            "rendezvous": list(rendezvous),
            "coordinator": coordinator,
            "named": list(named),
            "upload_bytes_per_second": upload_bytes_per_second,
            "codecs": [packing.up.name, packing.down.name],
            "rule": packing.rule.value,
            "residual_decay": residual_decay,
            "parameters": parameters,
            "blob_dir": str(blob_dir),
        }
        try:
            started = await engine._ask("start", settings, seconds=START_SECONDS)
            engine.peer, engine.addresses = await engine._told("start", started, _started)
        except BaseException:
            await engine.stop()
            raise
        return engine

    @property
    def pid(self) -> int:
        return self._child.pid

    async def set_roster(self, peers: Mapping[PeerId, Sequence[str]], *, calls_only: bool = False) -> None:
        """Who is answered at all, and where they are: nowhere, for those who call us. Replaces the roster before.

        One that `calls_only` cannot be called itself, and keeps lines open to all who can."""
        known = {peer: list(addresses) for peer, addresses in peers.items()}
        await self._ask("roster", {"peers": known, "calls_only": calls_only})

    async def send(self, peer: PeerId, envelope: bytes, *, timeout_seconds: float) -> None:
        """Hand one PeerEnvelope to a peer; refused as UNREACHABLE when it did not take it."""
        if len(envelope) > PEER_MESSAGE_BYTES_MAX:
            raise Refused(Code.LIMIT, f"a message of {len(envelope)} bytes, at most {PEER_MESSAGE_BYTES_MAX}")
        await self._ask("send", {"peer": peer, "seconds": timeout_seconds}, envelope, seconds=timeout_seconds)

    async def average(self, job: AveragingJob, payload: bytes) -> AveragingOutcome:
        """Average the encoded vector with the group. What fails is in the outcome; only a wrong job is refused."""
        body = asdict(job) | {"group": job.group.hex(), "after": job.after.hex(), "exchange": job.exchange.value}
        answer = await self._ask("average", body, payload, seconds=job.deadline_seconds)
        return await self._told("average", answer, lambda frame: _outcome(frame, len(job.peers)))

    async def cancel(self, group: bytes) -> None:
        """Give a group up: its `average` returns with what is complete."""
        await self._ask("cancel", {"group": group.hex()})

    async def fetch_part(self, peer: PeerId, digest: Digest, size: int, *, timeout_seconds: float) -> bytes:
        """A part from a peer that keeps it: `size` bytes, whose hash the caller checks."""
        body = {"peer": peer, "digest": digest, "size": size, "seconds": timeout_seconds}
        return (await self._ask("fetch", body, seconds=timeout_seconds)).payload

    async def usage(self) -> Usage:
        """What was sent and received; it also finds where this node can be reached by now."""
        usage, self.addresses = await self._told("usage", await self._ask("usage", {}), _usage)
        return usage

    async def stop(self) -> None:
        await self._child.stop(grace_seconds=STOP_SECONDS)
        await self._reading
        p2pd.sweep(self._runtime_dir)

    async def _ask(
        self, order: str, body: Mapping[str, Any], payload: bytes = b"", *, seconds: float = GRACE_SECONDS
    ) -> Frame:
        if self.closed.done():
            raise Refused(Code.CHILD_DIED, "the engine has ended")
        number = next(self._numbers)
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            async with asyncio.timeout(seconds + GRACE_SECONDS):
                await self._child.channel.send({"order": order, "number": number, **body}, payload)
                frame = await answer
        except ChannelClosed:
            raise Refused(Code.CHILD_DIED, f"the engine ended during {order}") from None
        except TimeoutError:
            self._unanswered += 1
            if self._unanswered >= UNANSWERED_MAX:
                await self._child.stop(grace_seconds=0)  # the reader hears of it
            raise Refused(Code.CHILD_DIED, f"the engine does not answer to {order}") from None
        finally:
            self._answers.pop(number, None)
        if "refused" in frame.body:
            raise Refused.from_wire(str(frame.body["refused"]), str(frame.body.get("what")))
        return frame

    async def _told(self, order: str, answer: Frame, read: Callable[[Frame], T]) -> T:
        """What the answer says. An engine whose answer lacks it is ended, and the daemon starts another."""
        try:
            return read(answer)
        except MALFORMED as error:
            await self._child.stop(grace_seconds=0)
            raise Refused(Code.CHILD_DIED, f"the engine's answer to {order} cannot be read: {error!r}") from error

    async def _read(self, channel: Channel) -> None:
        with suppress(ChannelClosed):
            while True:
                self._take(await channel.receive())
        await self._child.stop(grace_seconds=STOP_SECONDS)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ChannelClosed("the engine has ended"))
        self.closed.set_result(self._child.returncode or 0)

    def _take(self, frame: Frame) -> None:
        self._unanswered = 0
        match frame.body:
            case {"message_from": str(peer)}:
                self._on_message(PeerId(peer), frame.payload)
            case {"number": int(number)}:
                if (answer := self._answers.get(number)) is not None and not answer.done():
                    answer.set_result(frame)
            case _:
                raise ChannelClosed("the engine said what is neither a message nor an answer")


def _started(answer: Frame) -> tuple[PeerId, tuple[str, ...]]:
    return PeerId(value_of(str, answer.body["peer"])), value_of(tuple[str, ...], answer.body["addresses"])


def _outcome(answer: Frame, members: int) -> AveragingOutcome:
    said = {key: value for key, value in answer.body.items() if key != "number"}
    sizes = value_of(tuple[tuple[int, int], ...], said["parts"])
    outcome = value_of(AveragingOutcome, said | {"parts": {}})
    parts, at = {}, 0
    for index, size in sizes:
        parts[index] = answer.payload[at : at + size]
        at += size
    if not {*parts, *outcome.included, *outcome.failed, *outcome.garbled} <= set(range(members)):
        raise ValueError(f"a member beyond the {members} of this group")
    return replace(outcome, parts=parts)


def _usage(answer: Frame) -> tuple[Usage, tuple[str, ...]]:
    return value_of(Usage, answer.body["usage"]), value_of(tuple[str, ...], answer.body["addresses"])
