"""One group's averaging: hivemind's butterfly all-reduce over spans that stay encoded and count whole or not at all.

Knows nothing of rosters, rounds or sockets. A reducer takes every sender's encoded chunks of its span, decides once
who counts, encodes the mean once, and sends the same bytes to everyone. Weights and spans come from the plan, never
from the wire; nothing a sender does can touch a span other than by being left out of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, BannedException, TensorPartContainer, TensorPartReducer
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import aiter_with_timeout

from node.leftover import Leftover, encode
from protocol import robust
from protocol.codec import Codec
from protocol.errors import Refused
from protocol.evidence import Slice, check_slice
from protocol.exchange import Packing
from protocol.limits import CHUNK_VALUES
from protocol.types import Digest, Exchange, NodeId

# Tensor.compression; hivemind's own codecs end below 100
CODES: Final = {"fp16": 101, "int8": 102, "int4": 103, "sparse2": 104}
GATHER_SHARE: Final = 0.5  # of the deadline: sending the means takes as long as gathering did
# Of an encoded vector in one message, or a single chunk: what carries it should weigh little.
PIECE_BYTES: Final = 1 << 15


Taken = tuple[tuple[int, str, bytes], ...]  # what a mean was made of: each sender, its signature and its slice


@dataclass(frozen=True)
class Plan:
    """What every member of a group knows alike before the first byte is sent."""

    group: bytes
    peers: tuple[PeerID, ...]
    weights: tuple[int, ...]  # tokens; 0 brings nothing, and may still reduce
    exchange: Exchange
    spans: tuple[tuple[int, int], ...]  # values of each peer's part; empty for a client
    deadline_seconds: float
    sender_seconds: float  # without progress
    after: bytes  # the group whose leftover our means take up
    members: tuple[NodeId, ...]  # whose peers they are
    attempt: int
    signatures: tuple[str, ...]  # ours, of what we send to each; empty where nothing is signed


class Violation(AllreduceException):  # type: ignore[misc]
    """A member sent what no honest member sends."""


class Unreadable(Violation):
    """No codec of this run reads it."""


class SpanContainer(TensorPartContainer):  # type: ignore[misc]
    """The local vector, already encoded, cut at chunk boundaries; and the means that came back for each span."""

    def __init__(
        self, payload: bytes, spans: Sequence[tuple[int, int]], codec: Codec, *, step: int, receivers: Sequence[int]
    ) -> None:
        super().__init__((), [stop - start for start, stop in spans])
        self.failed: dict[int, str] = {}
        self._code = CODES[codec.name]
        self._settled: asyncio.Queue[int] = asyncio.Queue()
        self.num_parts_by_peer = tuple(len(pieces(span, step)) for span in spans)
        whole = memoryview(payload)
        for index in receivers if payload else ():
            offset = codec.encoded_bytes(spans[index][0])
            for values in pieces(spans[index], step):
                size = codec.encoded_bytes(values)
                self._input_parts_by_peer[index].append(whole[offset : offset + size])
                offset += size

    def own_parts(self, peer_index: int) -> deque[memoryview]:
        return self._input_parts_by_peer[peer_index]  # type: ignore[no-any-return]

    async def iterate_input_parts_for(self, peer_index: int) -> AsyncIterator[runtime_pb2.Tensor]:
        for part in tuple(self._input_parts_by_peer[peer_index]):
            yield runtime_pb2.Tensor(compression=self._code, buffer=bytes(part))

    def register_processed_part(self, peer_index: int, part_index: int, part: bytes) -> None:
        super().register_processed_part(peer_index, part_index, part)
        if self._outputs_registered_by_peer[peer_index] == self.num_parts_by_peer[peer_index]:
            self._settled.put_nowait(peer_index)

    def register_failed_reducer(self, peer_index: int, reason: str = "failed") -> None:
        self.failed[peer_index] = reason
        self._settled.put_nowait(peer_index)

    async def iterate_output_tensors(self) -> AsyncIterator[tuple[int, bytes]]:
        """Whole spans in the order in which they settle; failed ones are left out."""
        for _ in range(sum(parts > 0 for parts in self.num_parts_by_peer)):
            index = await self._settled.get()
            if index not in self.failed:
                yield index, b"".join(self._output_parts_by_peer[index])
                self._output_parts_by_peer[index].clear()


class SpanReducer(TensorPartReducer):  # type: ignore[misc]
    """Buffers every sender's encoded span, then computes one mean of those that came whole and valid.

    Without a codec for means, the one contribution that is awaited is passed on as it came."""

    def __init__(
        self,
        part_values: Sequence[int],
        weights: Sequence[int],
        packing: Packing,
        down: Codec | None,
        *,
        start: int,
        before: Leftover | None,
        residual_decay: float,
        check_slice: Callable[[int, Digest, str], None],
    ) -> None:
        self.taken: Taken = ()
        self.signatures: dict[int, str] = {}  # to be set before a sender's last chunk
        self._check_slice = check_slice
        self._hashes = [hashlib.sha256() for _ in weights]
        self.included: tuple[int, ...] = ()
        self.leftover: Leftover | None = None  # of sparse means, once there are any
        self._start = start
        self._ends = tuple(itertools.accumulate(part_values))
        self._left = np.empty(sum(part_values) if down is not None and down.sparse else 0, np.float32)
        self._before = before
        self._residual_decay = residual_decay
        self._weights = weights
        self._codec, self._rule = packing.up, packing.rule
        self._down = down
        self._received: list[list[bytes]] = [[] for _ in weights]
        self._means: list[asyncio.Future[bytes]] = [asyncio.get_running_loop().create_future() for _ in part_values]
        self._awaited = {index for index, weight in enumerate(weights) if weight > 0}
        self._reducing: asyncio.Task[None] | None = None
        super().__init__(tuple(torch.Size((values,)) for values in part_values), len(weights))

    def reset_accumulators(self) -> None:
        self.check_current_part_finished()

    @property
    def awaited(self) -> frozenset[int]:
        """Senders that may still count."""
        return frozenset(self._awaited)

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: bytes, weight: float = 0.0
    ) -> None:
        """Take one encoded chunk; the weight that came with it is ignored."""
        if self.sender_failed_after[sender_index] != float("inf") or self.finished.is_set():
            raise BannedException(f"sender {sender_index} comes too late")
        if self._weights[sender_index] == 0:
            raise Violation(f"sender {sender_index} has no weight and sent a chunk")
        if part_index != self.num_parts_received[sender_index] or part_index >= self.num_parts:
            raise Violation(f"sender {sender_index} sent chunk {part_index} out of turn")
        values = self.part_shapes[part_index].numel()
        try:
            self._codec.check(tensor_part, values)  # kept encoded: as float32 the buffers would be 8 times as large
        except Refused as refused:
            raise Unreadable(f"sender {sender_index}, chunk {part_index}: {refused.what}") from refused
        self._received[sender_index].append(tensor_part)
        self._hashes[sender_index].update(tensor_part)
        if self.num_parts_received[sender_index] + 1 == self.num_parts and self._down is not None:
            self._check_signed(sender_index)
        self.num_parts_received[sender_index] += 1
        if self.num_parts_received[sender_index] == self.num_parts:
            self._awaited.discard(sender_index)
            self.check_current_part_finished()

    def _check_signed(self, sender_index: int) -> None:
        digest = Digest(self._hashes[sender_index].hexdigest())
        try:
            self._check_slice(sender_index, digest, self.signatures.get(sender_index, ""))
        except Refused as refused:
            raise Violation(f"sender {sender_index}: {refused.what}") from refused

    def on_sender_failed(self, sender_index: int) -> None:
        if sender_index in self._awaited:
            self.sender_failed_after[sender_index] = self.num_parts_received[sender_index]
            self._awaited.discard(sender_index)
            self._received[sender_index].clear()
            self.check_current_part_finished()

    def check_current_part_finished(self) -> None:
        if not self._awaited and self._reducing is None and self._means:
            self._reducing = asyncio.create_task(self._reduce())

    async def mean(self, part_index: int) -> bytes:
        return await asyncio.shield(self._means[part_index])

    def finalize(self) -> None:
        if not self.finished.is_set():
            self._fail("the group has ended")

    async def _reduce(self) -> None:
        included = tuple(index for index, parts in enumerate(self._received) if len(parts) == self.num_parts)
        if not included:
            self._fail("no valid contribution arrived")
            return
        self.included = included
        try:
            await self._publish(included)
            if self._left.size:
                self.leftover = Leftover(self._start, self._left)
        except Refused as refused:
            self._fail(refused.what)
        self._before = None
        self._received = [[] for _ in self._weights]
        self.finished.set()

    async def _publish(self, included: tuple[int, ...]) -> None:
        """The means one by one, as soon as each is encoded."""
        if self._down is None:
            (only,) = included
            encodings = iter(self._received[only])
        else:
            encodings = self._encoded_means(included, self._down)
        for mean in self._means:
            encoded = await asyncio.to_thread(next, encodings)
            if not mean.done():
                mean.set_result(encoded)

    def _encoded_means(self, included: tuple[int, ...], down: Codec) -> Iterator[bytes]:
        """In the roster's order, so that anyone who repeats it gets the same bits, but for sparse means."""
        slices = []
        for index in included:
            slices.append(b"".join(self._received[index]))
            self._received[index] = []
        tokens = [self._weights[index] for index in included]
        self.taken = tuple((index, self.signatures[index], data) for index, data in zip(included, slices, strict=True))
        chunks = robust.means(self._rule, self._codec, slices, tokens, self._ends[-1])
        for part, end in zip(self.part_shapes, self._ends, strict=True):
            mean = np.empty(part.numel(), np.float32)
            at = end - mean.size
            for start, chunk in itertools.islice(chunks, -(-mean.size // CHUNK_VALUES)):
                mean[start - at : start - at + chunk.size] = chunk
            if down.sparse:
                encoded, self._left[at:end] = encode(mean, self._start + at, down, self._before, self._residual_decay)
                yield encoded
            else:
                yield down.encode(mean)

    def _fail(self, reason: str) -> None:
        self.included = ()
        for mean in self._means:
            if not mean.done():
                mean.set_exception(AllreduceException(reason))
                mean.exception()  # retrieved here, as it may be that nobody waits for it
        self.finished.set()


class GroupRunner(AllReduceRunner):  # type: ignore[misc]
    """This peer's side of one group: a stream to each reducer, and a stream from each member to our own span."""

    def __init__(
        self,
        *,
        p2p: P2P,
        servicer_type: type[ServicerBase],
        prefix: str,
        plan: Plan,
        payload: bytes,
        packing: Packing,
        before: Leftover | None,
        residual_decay: float,
    ) -> None:
        super().__init__(
            p2p=p2p,
            servicer_type=servicer_type,
            prefix=prefix,
            group_id=plan.group,
            tensors=(),
            ordered_peer_ids=plan.peers,
            peer_fractions=tuple(stop - start for start, stop in plan.spans),
            sender_timeout=plan.sender_seconds,
        )
        self.index = plan.peers.index(self.peer_id)
        self.bytes_sent = self.bytes_received = 0
        self._plan = plan
        self._up, self._down = packing.up, packing.of(plan.exchange)
        chunk_bytes = max(each.encoded_bytes(CHUNK_VALUES) for each in (self._up, self._down))
        self._step = CHUNK_VALUES * max(1, PIECE_BYTES // chunk_bytes)
        self._gathered_by = time.monotonic() + plan.deadline_seconds * GATHER_SHARE
        self._streams: set[PeerID] = set()
        self._garbled: set[int] = set()
        everyone, mine = range(len(plan.peers)), (self.index,)
        gathers = plan.exchange is Exchange.ALL_GATHER
        self._weights = tuple(w if i == self.index or not gathers else 0 for i, w in enumerate(plan.weights))
        self.tensor_part_container = SpanContainer(
            payload if plan.weights[self.index] else b"",
            plan.spans,
            self._up,
            step=self._step,
            receivers=mine if gathers else everyone,
        )
        self.tensor_part_reducer = SpanReducer(
            pieces(plan.spans[self.index], self._step),
            self._weights,
            packing,
            None if gathers else self._down,
            start=plan.spans[self.index][0],
            before=before,
            residual_decay=residual_decay,
            check_slice=self._check_slice,
        )

    def hand_over(self) -> Taken:
        """What our mean was made of. It is as large as a contribution, so it is not kept here until the group ends."""
        taken: Taken = self.tensor_part_reducer.taken
        self.tensor_part_reducer.taken = ()
        return taken

    @property
    def failed(self) -> dict[int, str]:
        return dict(self.tensor_part_container.failed)

    @property
    def included(self) -> tuple[int, ...]:
        return self.tensor_part_reducer.included

    @property
    def garbled(self) -> tuple[int, ...]:
        """Members of whose contributions something came here that no honest member sends."""
        return tuple(sorted(index for index in self._garbled if self._plan.weights[index]))

    @property
    def leftover(self) -> Leftover | None:
        return self.tensor_part_reducer.leftover

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncGenerator[averaging_pb2.AveragingData, None]:
        """A member sends its chunks of our span; once the span is decided it gets the means, late or not."""
        if context.remote_id in self._streams or not self.tensor_part_container.num_parts_by_peer[self.index]:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        self._streams.add(context.remote_id)
        self.active_senders.add(context.remote_id)
        if len(self.active_senders) == len(self.sender_peer_ids):
            self.all_senders_started.set()
        sender_index = self.ordered_peer_ids.index(context.remote_id)
        try:
            await self._gather(stream, sender_index)
        except (BannedException, TimeoutError):
            await self._ban_sender(context.remote_id)  # too slow to count, but welcome to the means
        except Exception as error:  # Violation, or whatever else its bytes brought about
            if isinstance(error, Violation):
                self._garbled.add(sender_index)
            await self._ban_sender(context.remote_id)
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        try:
            for part_index in range(self.tensor_part_reducer.num_parts):
                encoded = await self.tensor_part_reducer.mean(part_index)
                self.bytes_sent += len(encoded)
                part = runtime_pb2.Tensor(compression=CODES[self._down.name], buffer=encoded)
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=part)
        except AllreduceException:
            yield averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR)

    async def _gather(self, stream: AsyncIterator[averaging_pb2.AveragingData], sender_index: int) -> None:
        reducer = self.tensor_part_reducer
        if self._weights[sender_index] == 0:
            message = await asyncio.wait_for(anext(stream), self.sender_timeout)
            if message.HasField("tensor_part"):
                raise Violation(f"sender {sender_index} was to bring nothing here, and sent a chunk")
            return
        part_index = 0
        async for message in aiter_with_timeout(stream, self.sender_timeout):
            part = _part_of(message, averaging_pb2.PART_FOR_AVERAGING, self._up)
            if not part_index:
                reducer.signatures[sender_index] = message.peer_id.hex()
            await reducer.accumulate_part(sender_index, part_index, part)
            self.bytes_received += len(part)
            part_index += 1
            if part_index == reducer.num_parts:
                return
        raise BannedException(f"sender {sender_index} stopped after {part_index} of {reducer.num_parts} chunks")

    async def _handle_missing_senders(self) -> None:
        await super()._handle_missing_senders()
        with suppress(TimeoutError):
            await asyncio.wait_for(
                self.tensor_part_reducer.finished.wait(), max(0.0, self._gathered_by - time.monotonic())
            )
        for sender_index in self.tensor_part_reducer.awaited:
            await self._ban_sender(self.ordered_peer_ids[sender_index])

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        index = self.ordered_peer_ids.index(peer_id)
        expected = self.tensor_part_container.num_parts_by_peer[index]
        means = self._own_means() if index == self.index else self._means_from(peer_id, index)
        registered = 0
        try:
            async with aclosing(means):
                async for encoded in means:
                    self.tensor_part_container.register_processed_part(index, registered, encoded)
                    registered += 1
                    if registered == expected:
                        return
            raise AllreduceException(f"its reducer sent {registered} of {expected} chunks")
        except Exception as error:  # whatever befalls one span is that span's failure and nobody else's
            gathers = self._plan.exchange is Exchange.ALL_GATHER  # else what comes is a mean
            if gathers and isinstance(error, Unreadable):
                self._garbled.add(index)
            self.tensor_part_container.register_failed_reducer(index, str(error) or type(error).__name__)

    async def _own_means(self) -> AsyncGenerator[bytes, None]:
        try:
            if self._plan.signatures:
                self.tensor_part_reducer.signatures[self.index] = self._plan.signatures[self.index]
            for part_index, part in enumerate(self.tensor_part_container.own_parts(self.index)):
                await self.tensor_part_reducer.accumulate_part(self.index, part_index, bytes(part))
        except AllreduceException:
            await self._ban_sender(self.peer_id)
        for part_index in range(self.tensor_part_reducer.num_parts):
            yield await self.tensor_part_reducer.mean(part_index)

    async def _means_from(self, peer_id: PeerID, index: int) -> AsyncGenerator[bytes, None]:
        await self._p2p.reach(peer_id)
        stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(self._generate_input_for_peer(index))
        patience = max(0.0, self._gathered_by - time.monotonic()) + self._plan.sender_seconds
        async with aclosing(stream):
            for values in pieces(self._plan.spans[index], self._step):
                try:
                    message = await asyncio.wait_for(anext(stream), patience)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise AllreduceException("its reducer sent nothing in time") from None
                encoded = _part_of(message, averaging_pb2.AVERAGED_PART, self._down)
                try:
                    self._down.check(encoded, values)
                except Refused as refused:
                    raise Unreadable(refused.what) from refused
                self.bytes_received += len(encoded)
                yield encoded
                patience = self._plan.sender_seconds

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        opening = averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=self.group_id)
        if self._plan.signatures:
            opening.peer_id = bytes.fromhex(
                self._plan.signatures[peer_index]
            )  # a field that is free: libp2p proves who it is
        async for part in self.tensor_part_container.iterate_input_parts_for(peer_index):
            self.bytes_sent += len(part.buffer)
            opening.tensor_part.CopyFrom(part)
            yield opening
            opening = averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING)
        if opening.group_id:
            yield opening  # nothing to send to this one, but its part is wanted

    def _check_slice(self, sender_index: int, digest: Digest, signature: str) -> None:
        start, stop = self._plan.spans[self.index]
        body = Slice(self._plan.group.hex(), start, stop, digest)
        check_slice(self._plan.members[sender_index], body, signature)

    def finalize(self, **outcome: Any) -> None:
        super().finalize(**outcome)
        if not self._future.cancelled():
            self._future.exception()  # told in the outcome; asyncio need not complain that nobody asked


def pieces(span: tuple[int, int], step: int) -> list[int]:
    """How many values each message about a span holds: whole chunks, as many as make `step`, except for the last."""
    start, stop = span
    return [min(step, stop - at) for at in range(start, stop, step)]


def _part_of(message: averaging_pb2.AveragingData, code: int, codec: Codec) -> bytes:
    if message.code != code:
        raise Violation(f"message code {message.code}, wanted {code}")
    if message.tensor_part.compression != CODES[codec.name]:
        raise Unreadable(f"codec {message.tensor_part.compression}, wanted {CODES[codec.name]}")
    return message.tensor_part.buffer  # type: ignore[no-any-return]
