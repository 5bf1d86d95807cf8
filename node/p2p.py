"""hivemind's P2P, guarded: who is answered, how much is read, how long is waited. Knows nothing of averaging."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final

from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.multiaddr import Multiaddr

from node.core.pace import Bucket
from protocol import p2pd
from protocol.errors import Code, Refused
from protocol.limits import ADDRESSES_MAX, PEER_MESSAGE_BYTES_MAX

UNARY_BYTES_MAX: Final = 1 << 16  # what the rendezvous answers with: one record, and the few other bootstrap peers
CONNECT_SECONDS: Final = 10.0  # a TCP and TLS handshake across the world, twice over
STALL_SECONDS: Final = 60.0  # a peer that takes no byte for so long is let go
LAST_WORD_SECONDS: Final = 5.0  # for the caller to say that it has said all, after we have
STREAMS_WAITING: Final = 4096  # until they are looked at; Linux keeps no more. One more is dropped, whoever brings it
CALLS_PER_PEER_MAX: Final = 16  # at once: one stream for each group, a few parts, a burst of messages


class UnwelcomeError(Exception):
    """A caller who is not in the roster, or calls too often at once."""


# What a caller, or our own end, can bring about: it ends that caller's stream, and is not worth a line in the log.
CALLER_ERRORS: Final = (
    *(UnwelcomeError, Refused, DecodeError, P2PHandlerError, ConnectionError, TimeoutError),
    asyncio.CancelledError,
)


class GuardedP2P(P2P):  # type: ignore[misc]
    """Answers rostered peers only, reads no message past the bound, waits for nobody for ever."""

    DHT_MODE_MAPPING: ClassVar[dict[str, dict[str, int]]] = {
        "none": {}
    }  # no libp2p DHT in p2pd: the roster says where peers are

    def __init__(self) -> None:
        super().__init__()
        self.roster: Mapping[PeerID, tuple[str, ...]] = {}
        self.calls_only = False  # nobody can call us, the roster says: we keep lines open instead
        self.may_dial: Callable[[str], bool] = lambda address: False
        self.pace: Bucket | None = None  # of all that we send; none: as fast as the line
        self.bytes_sent = self.bytes_received = 0
        self.look_up: Callable[[PeerID], Awaitable[tuple[str, ...]]] | None = None
        self._calls: Counter[PeerID] = Counter()

    @classmethod
    async def start(
        cls, *, runtime_dir: Path, identity_path: Path, listen: Sequence[str], announce: Sequence[str] = ()
    ) -> GuardedP2P:
        p2pd.check_free(listen)
        os.environ.update(p2pd.ENVIRONMENT)
        cls._UNIX_SOCKET_PREFIX = f"/unix{p2pd.socket_folder(runtime_dir)}/"
        try:
            return await cls.create(  # type: ignore[no-any-return]
                host_maddrs=list(listen) or None,
                no_listen=not listen,
                announce_maddrs=list(announce) or None,
                identity_path=str(identity_path),
                dht_mode="none",
                persistent_conn_max_msg_size=UNARY_BYTES_MAX,
                **p2pd.OPTIONS,
            )
        except P2PDaemonError as error:
            raise Refused(Code.CHILD_DIED, f"p2pd on {', '.join(listen) or 'no address'}: {error}") from error

    @property
    def pid(self) -> int:
        return self._child.pid  # type: ignore[no-any-return]

    async def ended(self) -> None:
        await self._child.wait()

    async def shutdown(self) -> None:
        await super().shutdown()
        if self._child is not None:
            await asyncio.gather(self._reader_task, return_exceptions=True)
            await self._child.communicate()  # to the end of what it prints: its pipe would outlive the loop

    def _start_listening(self) -> None:
        """hivemind lets a hundred streams wait: strangers fill that while this process is busy for a moment."""
        control = self._client.control
        path = control.listen_maddr.value_for_protocol("unix")

        async def listen() -> None:
            async with await asyncio.start_unix_server(control._handler, path, backlog=STREAMS_WAITING):
                await asyncio.Future()  # until it is cancelled

        self._listen_task = asyncio.create_task(listen())

    async def reach(self, peer: PeerID) -> None:
        """Connect, unless we are: at the roster's addresses, then wherever the DHT says. One without any calls us."""
        known = self.roster.get(peer, ())
        if not known:
            if not await self._is_here(peer):
                raise Refused(Code.UNREACHABLE, f"{peer} takes no calls, and keeps no line open to us")
            return
        if await self._connected(peer, known):
            return
        found = await self.look_up(peer) if self.look_up is not None else ()
        if not found or not await self._connected(peer, found):
            raise Refused(Code.UNREACHABLE, f"{peer} answers at none of its addresses")

    async def keep_lines(self) -> None:
        """Be connected to everyone who can be called. libp2p finds a dead connection within a minute."""
        if self.calls_only:
            await asyncio.gather(*(self._connected(peer, known) for peer, known in self.roster.items() if known))

    async def reached(self, rendezvous: str) -> bool:
        """Whether we are connected to the peer that a multiaddr with /p2p names."""
        address, _, peer = rendezvous.rpartition("/p2p/")
        return await self._connected(PeerID.from_base58(peer), [address])

    def addresses(self) -> tuple[str, ...]:
        return tuple(str(address) for address in self._visible_maddrs[:ADDRESSES_MAX])

    async def look_around(self) -> None:
        """Ask p2pd again where it can be reached: a laptop goes from one network to another."""
        with suppress(P2PDaemonError):
            _, self._visible_maddrs = await self._client.identify()

    async def _is_here(self, peer: PeerID) -> bool:
        """Whether a connection stands, whoever opened it. Nothing is dialled."""
        with suppress(P2PDaemonError):
            return any(info.peer_id == peer for info in await self._client.list_peers())
        return False

    async def _connected(self, peer: PeerID, addresses: Sequence[str]) -> bool:
        allowed = [address for address in addresses if self.may_dial(address)]
        if not allowed:  # p2pd would dial where else it thinks that the peer is
            return await self._is_here(peer)
        with suppress(P2PDaemonError, TimeoutError, ValueError):
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.connect(peer, [Multiaddr(address) for address in allowed])
                return True
        return False

    @contextmanager
    def _admitted(self, peer: PeerID) -> Iterator[None]:
        if peer not in self.roster or self._calls[peer] >= CALLS_PER_PEER_MAX:
            raise UnwelcomeError
        self._calls[peer] += 1
        try:
            yield
        finally:
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]

    @staticmethod
    def _make_process_args(*args: Any, **options: Any) -> list[str]:
        return p2pd.tied(P2P._make_process_args(*args, **options))

    async def _add_protobuf_unary_handler(self, *_: Any, **__: Any) -> None:
        raise AssertionError("p2pd reads a unary request whole before we learn who calls: nothing is offered that way")

    async def _add_protobuf_stream_handler(
        self,
        name: str,
        handler: Callable[[AsyncIterator[Message], P2PContext], AsyncGenerator[Message, None]],
        input_protobuf_type: type[Message],
        max_prefetch: int = 0,
        balanced: bool = False,
    ) -> None:
        """Unlike hivemind's, it reads when the handler asks, so nobody makes us keep what we do not want."""

        async def serve(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            context = P2PContext(handle_name=name, local_id=self.peer_id, remote_id=info.peer_id)
            requests = Messages(input_protobuf_type, reader, self._on_received)
            with closing(writer), suppress(*CALLER_ERRORS), self._admitted(info.peer_id):
                async with aclosing(handler(requests, context)) as replies:
                    async for reply in replies:
                        await self._write(reply, writer)
                await requests.read_out()

        await self.add_binary_stream_handler(name, serve, balanced=balanced)

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, message: Message, output_protobuf_type: type[Message]
    ) -> Message:
        request = message.SerializeToString()
        self.bytes_sent += len(request)
        reply = await self._client.call_unary_handler(peer_id, handle_name, request)
        self.bytes_received += len(reply)
        return output_protobuf_type.FromString(reply)

    async def _iterate_protobuf_stream_handler(
        self, peer_id: PeerID, name: str, requests: AsyncIterator[Message], output_protobuf_type: type[Message]
    ) -> AsyncIterator[Message]:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, reader, writer = await self.call_binary_stream_handler(peer_id, name)

        async def send() -> None:
            with suppress(ConnectionError, TimeoutError):  # the reader sees the end of the stream
                async for request in requests:
                    await self._write(request, writer)
                await self._write(P2P.END_OF_STREAM, writer)

        async def receive() -> AsyncIterator[Message]:
            sending = asyncio.create_task(send())
            try:
                with closing(writer):
                    async for message in Messages(output_protobuf_type, reader, self._on_received):
                        yield message
            finally:
                sending.cancel()

        return receive()

    async def _write(self, message: Message, writer: asyncio.StreamWriter) -> None:
        if self.pace is not None:
            now = asyncio.get_running_loop().time()
            self.pace, seconds = self.pace.take(message.ByteSize(), now)
            await asyncio.sleep(seconds)
        async with asyncio.timeout(STALL_SECONDS):
            await P2P.send_protobuf(message, writer)
        self.bytes_sent += message.ByteSize()

    def _on_received(self, size: int) -> None:
        self.bytes_received += size


class Messages:
    """The messages of a stream, each read when it is asked for; one that says it is larger than the bound is not read."""

    def __init__(self, kind: type[Message], reader: asyncio.StreamReader, on_received: Callable[[int], None]) -> None:
        self._kind = kind
        self._reader = reader
        self._on_received = on_received
        self._ended = False

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Message:
        if (data := await self._next()) is None:
            raise StopAsyncIteration
        return self._kind.FromString(data)

    async def read_out(self) -> None:
        """Until the sender has said all, for a moment. p2pd resets a stream that we close while something still comes
        in, and what we said last is lost."""
        async with asyncio.timeout(LAST_WORD_SECONDS):
            while await self._next() is not None:
                pass

    async def _next(self) -> bytes | None:
        if self._ended:
            return None
        self._ended = True  # also if we are cancelled in the middle of a message
        try:
            marker = await self._reader.readexactly(1)
            size = int.from_bytes(await self._reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
            if size > PEER_MESSAGE_BYTES_MAX:
                raise Refused(Code.LIMIT, f"a message of {size} bytes, at most {PEER_MESSAGE_BYTES_MAX}")
            data = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._on_received(size)
        if marker != P2P.ERROR_MARKER:
            self._ended = False
            return data
        if error := RPCError.FromString(data).message:
            raise P2PHandlerError(error[:200])
        return None
